"""`fastdiff train` on a folder of photos, and its errors."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import cli
from fastdiff.unet import UNet
from tests.training.toys import (
    answer_of,
    digests,
    log_of,
    python,
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
        (("--prediction", "noise"), "error: prediction='noise': 'epsilon' or"),
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
