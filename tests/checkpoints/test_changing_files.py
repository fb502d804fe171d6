"""Files that are cut, rewritten or replaced while they are read: an error that names the file, never a crash."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap

import pytest
import torch
import torch.utils.serialization
from safetensors.torch import load_file, save_file

from fastdiff.checkpoints import load, reading
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.errors import CheckpointError, FastdiffError
from tests.support.checkpoints import assert_equal_weights, needs_posix, run_python


def cut(path):
    os.truncate(path, os.path.getsize(path) // 2)


def rewrite(path):
    with open(path, "r+b") as file:
        file.seek(-64, os.SEEK_END)
        file.write(bytes(64))
        file.flush()
        os.utime(file.fileno(), (1, 1))  # the clock of a file system can be too coarse to see two writes


def grow(path):
    with open(path, "ab") as file:
        file.write(bytes(1000))


def replace(path):
    path.with_suffix(".new").write_bytes(b"something else")
    os.replace(path.with_suffix(".new"), path)


def once(monkeypatch, module, name, before):
    """Call ``before`` when the module's function is called for the first time."""
    function, left = getattr(module, name), [before]

    def wrapped(*args, **kwargs):
        if left:
            left.pop()()
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, wrapped)


@pytest.mark.parametrize("change", [cut, rewrite, grow])
@pytest.mark.parametrize("point", ["_places", "_fill"], ids=["behind the header", "behind the data's start"])
def test_weights_that_change_between_header_and_data(folder, monkeypatch, point, change):
    path = folder / WEIGHTS
    with path.open("ab"):
        os.utime(path, (2, 2))
    once(monkeypatch, reading, point, lambda: change(path))
    with pytest.raises(CheckpointError, match=rf"{WEIGHTS}.*(was cut|changed) while it was read"):
        load(folder)


@pytest.mark.parametrize("change", [cut, rewrite])
def test_torch_files_that_change_between_check_and_load(folder, tmp_path, monkeypatch, change):
    path = tmp_path / "w.pt"
    torch.save(load_file(folder / WEIGHTS), path)
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    expected = load(path).unet
    once(monkeypatch, torch, "load", lambda: change(path))
    with torch.utils.serialization.config.patch("load.mmap", True):  # a setting of the process
        assert_equal_weights(load(path).unet, expected)  # it was in memory already
    torch.save(load_file(folder / WEIGHTS), path)
    os.utime(path, (2, 2))
    once(monkeypatch, reading, "_records", lambda: change(path))
    with pytest.raises(CheckpointError, match=r"w\.pt"):
        load(path)


def test_a_file_that_is_replaced_is_read_whole(folder, monkeypatch):
    """The open file stays the old one, whatever takes its name."""
    expected = load(folder).unet
    once(monkeypatch, reading, "_fill", lambda: replace(folder / WEIGHTS))
    assert_equal_weights(load(folder).unet, expected)


@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_json_that_changes(folder, monkeypatch, name):
    (folder / name).write_text('{"num_train_timesteps": 77}')
    os.utime(folder / name, (2, 2))
    real = os.fstat
    seen = []

    def fstat(handle):
        result = real(handle)
        if os.path.samestat(result, os.stat(folder / name)) and not seen:
            seen.append(handle)
            (folder / name).write_text("{}")
        return result

    monkeypatch.setattr(os, "fstat", fstat)
    with pytest.raises(CheckpointError, match=rf"{name}.*changed while it was read"):
        reading.read_json(folder / name)


@needs_posix
def test_loaded_tensors_need_no_file(tmp_path):
    """Cutting a mapped file makes the kernel end the process with SIGBUS at the next use of its tensors."""
    path = tmp_path / "w.safetensors"
    save_file({"a": torch.ones(1 << 20)}, path)
    torch.save({"a": torch.ones(1 << 20)}, tmp_path / "w.pt")
    code = """
    import os, sys
    from pathlib import Path
    import torch, torch.utils.serialization
    from fastdiff.checkpoints.reading import read_safetensors, read_torch
    torch.utils.serialization.config.load.mmap = True
    tensors = read_safetensors(sys.argv[1])[0]["a"], read_torch(Path(sys.argv[2]))["a"]
    for path in sys.argv[1:]:
        os.truncate(path, 100)
    assert [float(t.sum()) for t in tensors] == [1 << 20] * 2
    """
    run_python(code, path, tmp_path / "w.pt")


@needs_posix
def test_a_process_that_rewrites_weights_all_the_time(folder):
    """Every load gives the model, or an error that names the file.

    The writer cuts and appends, as a program does that writes anew: each byte of the file is then right or missing.
    Zeros or other bytes in a file of the full size cannot be seen by size and time: a write sets the time before it
    copies, and the clock of a file system counts in milliseconds.
    """
    path = folder / WEIGHTS
    good = path.read_bytes()
    expected = load(folder).unet
    code = """
    import os, sys
    path, good = sys.argv[1], open(sys.argv[1], "rb").read()
    print("ready", flush=True)
    while True:
        for size in (len(good) // 2, 9, len(good) - 1, 0, len(good)):
            left = min(size, os.path.getsize(path))
            os.truncate(path, left)
            with open(path, "ab") as file:
                file.write(good[left:size])
    """
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), path], stdout=subprocess.PIPE)
    try:
        process.stdout.readline()
        for _ in range(100):
            try:
                found = load(folder).unet
            except FastdiffError as e:
                assert WEIGHTS in str(e)  # noqa: PT017  both outcomes are right
            else:
                assert_equal_weights(found, expected)
    finally:
        process.kill()
        process.wait()
    path.write_bytes(good)
    assert_equal_weights(load(folder).unet, expected)


@needs_posix
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.bmp", {}), ("a.tif", {}), ("b.tif", {"compression": "tiff_lzw"}), ("a.png", {}),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("a.ppm", {}), ("c.tif", {"compression": "packbits"}), ("a.webp", {"lossless": True}), ("a.gif", {}),
            )
        ),
    ],
)  # fmt: skip
def test_images_that_are_cut_while_they_are_decoded(tmp_path, name, options):
    """Pillow maps uncompressed pixels, and libtiff whole files, where they are given a file's name."""
    code = """
    import os, sys
    from pathlib import Path
    import numpy as np
    from PIL import Image
    from fastdiff.data.pixels import open_image, pixels_of
    path, options = Path(sys.argv[1]), eval(sys.argv[2])
    mode = "RGBA" if path.suffix == ".bmp" else "L"
    noise = np.random.default_rng(0).integers(0, 256, (700, 700, 4 if mode == "RGBA" else 1), dtype=np.uint8)
    Image.fromarray(noise.squeeze(), mode).save(path, **options)
    whole = path.read_bytes()
    for point in ("opened", "loaded"):
        path.write_bytes(whole)
        try:
            with open_image(path) as image:
                if point == "loaded":
                    image.load()
                os.truncate(path, 300)
                print(pixels_of(image).astype(int).sum())
        except Exception as e:
            print(type(e).__name__)
    """
    run_python(code, tmp_path / name, options)
