"""Saving models: full disks, kills and other failures leave the old files whole."""

from __future__ import annotations

import json
import os
import random
import signal
import textwrap
import time

import pytest
import torch
from safetensors.torch import save_file

from fastdiff.checkpoints import load, save_folder, save_unet
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.checkpoints.reading import read_safetensors
from fastdiff.checkpoints.saving import write_safetensors
from fastdiff.errors import CheckpointError, WriteError
from fastdiff.files import atomic_file, write_text
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetConfig
from tests.support import oracles as oracle
from tests.support import warm
from tests.support.checkpoints import assert_equal_weights, names, needs_posix, run_python
from tests.support.unets import TINY, random_unet, randomize_


def test_atomic_file_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    assert path.read_text() == "old"

    def fail(error):
        with atomic_file(path) as file:
            file.write(b"half of the new")
            file.flush()
            assert path.read_text() == "old"
            raise error

    for error in (ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(WriteError if isinstance(error, OSError) else type(error)) as caught:
            fail(error)
        assert path.read_text() == "old"
        assert names(path.parent) == ["a.txt"]
    assert str(caught.value) == f"{path} could not be written (No space left on device); what was there is unchanged"
    assert caught.value.errno == 28
    write_text(path, "new: Ω")
    assert path.read_bytes().decode("utf-8") == "new: Ω"
    assert names(path.parent) == ["a.txt"]


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    """The order must be fsync of the file, rename, fsync of the folder, for a power cut to do no harm."""
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "x")
    expected = ["file", "rename", "folder"] if os.path.isdir("/proc/self/fd") else ["file", "rename", "file"]
    assert events == expected
    events.clear()
    save_unet(random_unet(TINY), tmp_path)
    assert events == expected * 2


@needs_posix
def test_full_disk_keeps_the_old_model(tmp_path):
    """RLIMIT_FSIZE makes writes fail in the middle of a file, after 4 kB, as a full disk does."""
    save_folder(tmp_path / "model", random_unet(TINY), NoiseSchedule())
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    assert max(map(len, before.values())) > 8192
    code = """
    import resource, sys, torch
    from pathlib import Path
    from fastdiff.checkpoints import convert, load, save_folder
    from fastdiff.errors import CheckpointError
    from fastdiff.files import write_text
    model = load(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with torch.no_grad():
        for p in model.unet.parameters():
            p.add_(1)
    for folder in (sys.argv[1], sys.argv[1] + "/unet", sys.argv[1] + "/a.safetensors", sys.argv[1] + "/a.pt"):
        try:
            if "/a." in folder:
                convert(sys.argv[2], folder, to="ddpm")
            elif folder == sys.argv[1]:
                save_folder(folder, model.unet, model.schedule)
            else:
                model.unet.save_pretrained(folder)
            sys.exit("it was saved")
        except CheckpointError as e:
            assert sys.argv[1] in str(e) and "could not be written" in str(e), e
    try:
        write_text(Path(sys.argv[1]) / "model_index.json", "x" * 5000)
        sys.exit("it was written")
    except OSError as e:
        assert e.errno == 27 and "model_index.json" in str(e), e
    """
    (tmp_path / "ddpm").mkdir()
    torch.save(randomize_(oracle.DDPM(32, 3, (1, 1), 1, (), 3, 8)).state_dict(), tmp_path / "ddpm" / "a.pt")
    before |= {tmp_path / "ddpm" / "a.pt": (tmp_path / "ddpm" / "a.pt").read_bytes()}
    run_python(code, tmp_path / "model", tmp_path / "ddpm" / "a.pt")
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert_equal_weights(load(tmp_path / "model").unet, random_unet(TINY))


@needs_posix
def test_others_may_read_what_they_may_read_elsewhere(folder):
    (folder / "plain").write_text("")
    expected = (folder / "plain").stat().st_mode
    assert {n: (folder / n).stat().st_mode for n in names(folder)} == dict.fromkeys(names(folder), expected)


def test_paths_that_cannot_be_folders(tmp_path):
    (tmp_path / "file").write_text("mine")
    for save in (save_unet, lambda unet, path: save_folder(path, unet, NoiseSchedule())):
        with pytest.raises(CheckpointError, match=r"file.*could not be written"):
            save(random_unet(TINY), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@needs_posix
def test_kills_never_leave_a_broken_file(tmp_path):
    """A child saves two models in turn and is killed at random moments; the folder always loads as one of them."""
    models = [random_unet(TINY, seed=s) for s in (1, 2)]
    save_unet(models[0], tmp_path / "model")
    # The children are forked from a process without threads, so that they need not import anything. The kills go on
    # until one has hit a file half written, which can take a while on a busy machine.
    code = """
    import os, random, signal, sys, time, torch
    from fastdiff.checkpoints import load, save_unet
    torch.set_num_threads(1)
    folder = sys.argv[1]
    a = load(folder).unet
    b = load(sys.argv[2]).unet
    rng = random.Random(0)
    for kill in range(500):
        if kill >= int(sys.argv[3]) and any(name.startswith(".") for name in os.listdir(folder)):
            break
        pid = os.fork()
        if not pid:
            while True:
                save_unet(b, folder)
                save_unet(a, folder)
        time.sleep(rng.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tensors = load(folder).unet.state_dict()
        for model in (a, b):
            if all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items()):
                break
        else:
            sys.exit("a mixture")
    """
    save_unet(models[1], tmp_path / "other")
    run_python(code, tmp_path / "model", tmp_path / "other", 20)
    leftovers = [n for n in names(tmp_path / "model") if n not in ("config.json", WEIGHTS)]
    assert all(n.startswith(".") for n in leftovers)
    assert leftovers  # some kill hit a file half written


@needs_posix
def test_kills_of_plain_writes(tmp_path):
    path = tmp_path / "a.bin"
    code = """
    import sys
    from fastdiff.files import atomic_file
    while True:
        for letter in (b"a", b"b"):
            with atomic_file(sys.argv[1]) as file:
                file.write(letter * (4 << 20))
    """
    rng = random.Random(1)
    for _ in range(10):
        process = warm.Process("-c", textwrap.dedent(code), path)
        try:
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.2))
        finally:
            process.send_signal(signal.SIGKILL)
            process.communicate()
        content = path.read_bytes()
        assert content in (b"a" * (4 << 20), b"b" * (4 << 20))
        for leftover in tmp_path.iterdir():
            assert leftover == path or leftover.name.startswith(".")


def test_configuration_is_readable_json(folder):
    text = (folder / "config.json").read_text()
    assert text.count("\n") > 20
    config = json.loads(text)
    assert config["_class_name"] == "UNet2DModel"
    assert UNetConfig.from_dict(config) == TINY


def test_files_are_those_of_the_safetensors_library(tmp_path):
    """Byte for byte, for all dtypes that weights and checkpoints have."""
    kinds = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool)
    tensors = {f"é.{i}.{kind}": torch.ones(3, 2).to(kind) for i in (1, 0) for kind in kinds}
    tensors |= {"a": torch.ones(()), "none": torch.ones(0, 4), "view": torch.arange(12.0).view(3, 4).T}
    for metadata in ({"format": "pt"}, {}):
        with atomic_file(tmp_path / "ours") as file:
            write_safetensors(file, tensors, metadata)
        save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "theirs", metadata=metadata or None)
        assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
        ours, _ = read_safetensors(tmp_path / "ours")
        assert all(torch.equal(ours[k], v) for k, v in tensors.items())
