"""`fastdiff train` on a folder of photos, and its errors."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.checkpoints import save_folder
from fastdiff.cli.train import _doubts, _network
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.training.lock import locked
from fastdiff.unet import UNet
from tests.support import warm
from tests.training.toys import (
    Toys,
    answer_of,
    digests,
    log_of,
    python,
    toy_trainer,
    toy_unet,
)

SMALL = (
    "--size", "8", "--channels", "8", "--groups", "4", "--layers", "1", "--attention", "", "--timesteps", "20",
    "--steps", "4", "--batch-size", "4", "--lr-warmup", "1", "--log-every", "1", "--save-every", "2",
    "--sample-every", "2",
)  # fmt: skip


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder of two classes, with colour, gray, 16-bit and transparent images, and with files that are unusable."""
    rng, folder = np.random.default_rng(0), tmp_path / "photos"
    for name in ("cats", "dogs"):
        (folder / name).mkdir(parents=True)
    for i in range(2):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(folder / "cats" / f"colour{i}.png")
    Image.fromarray(rng.integers(0, 256, (12, 10), dtype=np.uint8)).save(folder / "cats" / "gray.png")
    Image.fromarray(rng.integers(0, 65536, (8, 8), dtype=np.uint16)).save(folder / "dogs" / "deep.png")
    Image.fromarray(rng.integers(0, 256, (9, 9, 4), dtype=np.uint8)).save(folder / "dogs" / "clear.png")
    Image.fromarray(rng.integers(0, 256, (4, 8, 3), dtype=np.uint8)).save(folder / "dogs" / "small.png")
    (folder / "dogs" / "noise.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    torn = (folder / "cats" / "colour0.png").read_bytes()
    (folder / "cats" / "torn.png").write_bytes(torn[: len(torn) * 2 // 3])
    return folder


def test_command_line(tmp_path: Path, photos: Path) -> None:
    out = tmp_path / "out"
    result = python("-m", "fastdiff", "train", photos, "--out", out, *SMALL, "--json")
    answer = answer_of(result)
    assert len(result.stdout.splitlines()) == 1
    assert answer["model"] == str(out / "model")
    assert answer["step"] == 4
    assert "Traceback" not in result.stderr
    for name in ("small.png", "noise.png", "torn.png"):
        assert name in result.stderr, name
    for name in ("colour0", "gray.png", "deep", "clear"):
        assert name not in result.stderr
    assert [line["step"] for line in log_of(out)] == [1, 2, 3, 4]
    assert sorted(path.name for path in (out / "samples").iterdir()) == ["step-0000002.png", "step-0000004.png"]
    assert Image.open(out / "samples" / "step-0000004.png").size == (8 * 10 + 2, 2 * 10 + 2)

    from diffusers import DDPMPipeline

    unet = UNet.from_pretrained(out / "model")
    assert unet.config.num_classes == 2
    x, t, labels = torch.randn(2, 3, 8, 8), torch.tensor([3, 7]), torch.tensor([0, 2])
    pipeline = DDPMPipeline.from_pretrained(out / "model")
    assert pipeline.scheduler.config.num_train_timesteps == 20
    with torch.no_grad():
        theirs = pipeline.unet(x, t, class_labels=labels).sample
        assert (unet(x, t, labels) - theirs).abs().max() < 1e-5
    ema = UNet.from_pretrained(out / "checkpoint.safetensors").state_dict()
    assert all(torch.equal(ema[k], v) for k, v in unet.state_dict().items())


def command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str | Path
) -> tuple[int, str]:
    """Run the command line in this process; return its exit code and standard error."""
    monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, arguments)])
    with pytest.raises(SystemExit) as leaving:
        cli.main()
    code = leaving.value.code
    assert code is None or isinstance(code, int)
    return code or 0, capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--lr", "0"), "error: lr=0.0: a positive number is needed"),
        (("--prediction", "noise"), "error: prediction='noise': 'epsilon', 'sample', 'v_prediction' or"),
        (("--batch-size", "6", "--accumulate", "4"), "error: batch_size=6: a multiple of accumulate=4"),
        (("--size", "8by8"), "error: --size 8by8: a number"),
        (("--size", "7", "--channels", "8,8"), "error: images of 7x7: both must be multiples of the U-Net's stride 2"),
        (("--attention", "3"), "error: --attention 3: the feature maps are 8 high"),
        (("--device", "abacus"), "error: device='abacus' cannot be used"),
        (("--groups", "3"), "error: block_out_channels[0]=8 is not divisible by norm_num_groups=3"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_command_line_errors(
    tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], message: str
) -> None:
    code, errors = command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "out", *SMALL, *arguments)
    assert code == 2
    assert errors.splitlines()[-1].startswith(message)
    assert errors.count("error:") == 1
    assert not (tmp_path / "out").exists()


def test_the_summary(tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes before the first update: data, classes, what is skipped, network, device, time, and what is doubtful."""
    (photos / "birds").mkdir()
    (photos / "cats" / "notes.txt").write_text("none")
    Image.new("L", (8, 8), 7).save(photos / "cats" / "esc\x1b[31m.png")
    code, errors = command(
        capsys, monkeypatch, "train", photos, "--out", tmp_path / "out", *SMALL, "--batch-size", "64"
    )
    assert code == 0
    assert "\x1b" not in errors
    summary, _, _ = errors.partition("step 1/4")
    for line in (
        f"data        {photos}: 6 images, 8x8, colour (files of 8x8 to 12x10; 2 shrunk; 1 cut to the aspect of 8x8)",
        "values      16-bit: ", "8-bit: 0 to 255", "classes     2: 0 cats: 4, 1 dogs: 2", "skipped     4:",
        "1 .txt: files whose names do not end as those of images do", "torn.png: OSError: image file is truncated",
        "small.png: it is 4x8: smaller than 8x8, and images are not enlarged (--fit pad would pad it)",
        "images of 8x8, 2 classes", "device      cpu, fp32\n", "for 4 updates of 64 images (42.67 times all",
        "WARNING     1 of 6 images have an alpha channel", "--alpha white accepts that",
        "WARNING     3 of 6 images have colour",
        "--image-channels 3 accepts that", "WARNING     no image in the sub-folder birds",
        "WARNING     6 images are fewer than a batch of 64",
    ):  # fmt: skip
        assert line in summary, (line, summary)
    written = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert written["data"]["classes"] == {"cats": 4, "dogs": 2}
    assert written["data"]["skipped"] == len(written["data"]["skipped_files"]) == 4
    assert written["network"]["class_names"] == ["cats", "dogs"]
    assert len(written["warnings"]) == 4
    assert written["seconds"] == pytest.approx(4 * written["seconds_per_update"], rel=0.1, abs=0.1)


def test_a_run_of_days_says_so_beforehand(tmp_path: Path) -> None:
    (warning,) = _doubts(toy_trainer(tmp_path, steps=100, lr_warmup=1), None, 3 * 86400.0)
    assert warning.startswith("the run takes about 3 days on this device: --steps makes it shorter")
    assert _doubts(toy_trainer(tmp_path, steps=100, lr_warmup=1), None, 3600.0) == []


def test_what_is_settled_is_no_warning(
    tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ("--alpha", "black", "--image-channels", "3", "--value-range", "0,65535", "--batch-size", "4")
    code, errors = command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "out", *SMALL, *arguments)
    assert code == 0
    assert errors.count("WARNING") == 1  # of a range for images of several kinds
    assert "WARNING     --value-range is applied to images of several kinds alike: 16-bit, 8-bit" in errors
    shape = np.arange(4 * 3 * 8 * 3).reshape(4, 3, 8, 3)
    np.savez(tmp_path / "a.npz", images=shape.astype(np.uint8))
    line = ("train", tmp_path / "a.npz", "--out", tmp_path / "array", *SMALL, "--fit", "pad")
    code, errors = command(capsys, monkeypatch, *line)
    assert code == 2
    assert "may be NHWC or NCHW; --layout NHWC or" in errors
    np.savez(
        tmp_path / "a.npz", images=shape.transpose(0, 2, 1, 3)[:, :, :, :1].astype(np.float32), labels=[0, 1, 3, 0]
    )
    code, errors = command(capsys, monkeypatch, *line)
    assert "images is float32, whose range is unknown; images are uint8, or --value-range declares it" in errors
    code, errors = command(capsys, monkeypatch, *line, "--value-range", "0,1")
    assert "go beyond --value-range=0 to 1" in errors or "go beyond --value-range 0 to 1" in errors
    code, errors = command(capsys, monkeypatch, *line, "--value-range", "0,300", "--class-names", "a, b,c,d", "--json")
    assert code == 0, errors
    assert "WARNING" not in errors
    assert "classes     4: 0 a: 2, 1 b: 1, 2 c: 0, 3 d: 1" in errors


def test_folders_that_cannot_be_used_are_named_first(
    tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    with locked(tmp_path / "out"):
        monkeypatch.setattr("fastdiff.data.datasets.open_data", lambda *_, **__: pytest.fail("the data were read"))
        code, errors = command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "out", *SMALL)
    assert (code, errors.count("\n")) == (2, 1)
    assert f"process {os.getpid()} is training there" in errors


def test_command_line_without_data(tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    for data in ("empty", "nowhere"):
        code, errors = command(capsys, monkeypatch, "train", tmp_path / data, "--out", tmp_path / "out", *SMALL)
        assert code == 2
        assert errors.startswith("error: ")
        assert str(tmp_path / data) in errors
        assert len(errors.splitlines()) == 1


def test_command_line_resumes(tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    line = ("train", photos, "--out", tmp_path / "out", *SMALL, "--lr-decay", "none")
    for steps in ("2", "4"):
        command_code, _ = command(capsys, monkeypatch, *line, "--steps", steps)
        assert command_code == 0
    code, errors = command(capsys, monkeypatch, *line, "--seed", "1")
    assert code == 2
    assert errors.splitlines()[-1].startswith(f"error: {tmp_path / 'out' / 'checkpoint.safetensors'} was written with")
    assert "train.seed" in errors
    command(capsys, monkeypatch, "train", photos, "--out", tmp_path / "whole", *SMALL, "--lr-decay", "none")
    assert digests(tmp_path / "out") == digests(tmp_path / "whole")


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX")
@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_a_signal_saves_and_says_how_to_go_on(
    tmp_path: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    number: signal.Signals,
) -> None:  # fmt: skip
    out = tmp_path / "out"
    options = [*SMALL[:-8], "--steps", "100000", "--batch-size", "4", "--log-every", "1", "--sample-every", "0"]
    process = warm.Process("-m", "fastdiff", "train", photos, "--out", out, *options)
    deadline = time.monotonic() + 200
    while not ((out / "log.jsonl").exists() and log_of(out)) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(number)
    _, error = process.communicate(timeout=100)
    assert process.returncode == 128 + number, error
    found = re.search(r"stopped: step (\d+) of 100000 is saved in .*checkpoint\.safetensors; the same command", error)
    assert found is not None, error
    assert int(found[1]) >= 1
    resumed = python("-m", "fastdiff", "train", photos, "--out", out, *options, "--steps", str(int(found[1]) + 1))
    assert f"step {int(found[1]) + 1}" in resumed.stdout
    for folder in (out, out / "model"):  # a run's folder is a model
        assert command(capsys, monkeypatch, "info", folder) == (0, "")
    shutil.rmtree(out / "model")
    options = ["--n", "2", "--steps", "2", "--labels", "1", "-o", tmp_path / "a.png"]
    assert command(capsys, monkeypatch, "sample", out, *options)[0] == 0
    assert command(capsys, monkeypatch, "convert", out, tmp_path / "m.safetensors")[0] == 0


@pytest.mark.parametrize("size", [16, 28, 32, 48, 64, 96, 100, 128, 256])
def test_every_usual_size_has_a_network(size: int) -> None:
    data = Toys(size=(size, size), channels=3)
    config = _network(data, None, 1, None, None, 32, 0.0, False, None, False)
    heights = [size >> level for level in range(len(config.block_out_channels))]
    attended = [h for h, kind in zip(heights, config.down_block_types, strict=True) if kind.startswith("Attn")]
    assert attended == [h for h in heights if h <= 16][:1]
    assert 4 <= heights[-1] <= 32
    if size <= 64:
        assert config.block_out_channels == (64, 128, 256)
    x = torch.zeros(1, 3, size, size)
    with torch.device("meta"):
        unet = UNet(config)
    assert (
        unet(x.to("meta"), torch.ones(1, device="meta"), torch.ones(1, dtype=torch.int64, device="meta")).shape
        == x.shape
    )


@pytest.mark.slow  # a minute: each command is a process that imports torch
@pytest.mark.parametrize("size", [16, 28, 32, 48, 64, 96, 128, 256])
def test_a_first_training_of_photographs(tmp_path: Path, size: int) -> None:
    """The README's command, with a tiny network and budget, on photographs larger than the size; then its pictures."""
    (tmp_path / "photos").mkdir()
    for i in range(4):
        Image.new("RGB", (300, 260 + i), (i * 50, 20, 90)).save(tmp_path / f"photos/{i}.jpg")
    budget = (
        "--steps",
        "2",
        "--batch-size",
        "2",
        "--sample-every",
        "0",
        "--channels",
        "8,8,8",
        "--groups",
        "4",
        "--layers",
        "1",
    )
    result = python(
        "-m", "fastdiff", "train", tmp_path / "photos", "--size", str(size), "--out", tmp_path / "run", *budget
    )
    assert result.returncode == 0, result.stderr
    assert f"4 images, {size}x{size}, colour" in result.stderr
    drawn = python(
        "-m", "fastdiff", "sample", tmp_path / "run", "--n", "1", "--steps", "1", "--out", tmp_path / "a.png"
    )
    assert drawn.returncode == 0, drawn.stderr
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (size, size)


def test_a_model_goes_on_at_another_size(
    tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--init takes network, weights and noise schedule of a model, --config a network; the size is that of --size."""
    config = dataclasses.replace(
        toy_unet(in_channels=3, out_channels=3).config, block_out_channels=(8, 8), layers_per_block=1,
        down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
        num_class_embeds=3, null_label=2,
    )  # fmt: skip
    schedule = NoiseSchedule("cosine", 30)
    save_folder(tmp_path / "m", UNet(config), schedule, prediction="v_prediction", class_names=("cats", "dogs"))
    at = SMALL.index("--timesteps")
    line = ("train", photos, *SMALL[:at], *SMALL[at + 2 :], "--size", "4", "--steps", "1", "--sample-every", "0")
    code, errors = command(capsys, monkeypatch, *line, "--init", tmp_path / "m", "-o", tmp_path / "on")
    assert code == 0, errors
    made = Sampler.from_pretrained(tmp_path / "on" / "model")
    assert (made.info.size, made.schedule, made.prediction) == ((4, 4), schedule, "v_prediction")
    code, errors = command(
        capsys, monkeypatch, *line, "--init", tmp_path / "m", "-o", tmp_path / "no", "--prediction", "epsilon"
    )
    assert code == 2
    assert "another --schedule" in errors
    assert "v_prediction); leave them out to go on with its own" in errors
    network = tmp_path / "m" / "unet" / "config.json"
    code, errors = command(capsys, monkeypatch, *line, "--config", network, "-o", tmp_path / "new")
    assert code == 0, errors
    made = Sampler.from_pretrained(tmp_path / "new" / "model")
    assert (made.info.size, made.schedule, made.prediction) == ((4, 4), NoiseSchedule(), "epsilon")


@pytest.mark.parametrize(("channels", "groups"), [([64, 128], 32), ([16, 32], 16), ([24, 36], 4), ([7, 11], 1)])
def test_groups_are_those_that_the_channels_allow(channels: list[int], groups: int) -> None:
    config = _network(Toys(size=(8, 8)), channels, 1, [], None, None, 0.0, False, None, False)
    assert config.norm_num_groups == groups


def test_a_size_that_no_network_has_names_one_that_works(
    tmp_path: Path, photos: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = ("train", photos, "--out", tmp_path / "out", *SMALL, "--channels", "8,8", "--size", "7")
    code, errors = command(capsys, monkeypatch, *line)
    assert code == 2
    assert errors.splitlines()[-1].endswith("multiples of the U-Net's stride 2, as --size 6x6")
