"""Faults while training: losses that are not finite, full disks, and folders that cannot be written."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.errors import DataError, TrainingError
from fastdiff.sampler import Sampler
from fastdiff.training import TrainConfig
from fastdiff.training.log import TrainingLog
from tests.training.toys import (
    Toys,
    answer_of,
    digests,
    log_of,
    python,
    snapshot,
    toy_trainer,
    weights_of,
)

# Faults ---------------------------------------------------------------------------------------------------------------


def test_a_loss_that_stops_being_finite_ends_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a fault at the fifth step, the checkpoint of the fourth is there, and a sound run resumes from it."""
    toy_trainer(tmp_path / "a", log_every=1).fit()
    for value in (math.nan, math.inf, -math.inf):
        out = tmp_path / str(value)
        trainer = toy_trainer(out, log_every=1)
        loss = trainer._loss
        monkeypatch.setattr(trainer, "_loss", lambda *x, t=trainer, f=loss, v=value: f(*x) * (v if t.step == 4 else 1))
        before = {}
        update = trainer.optimizer.step
        monkeypatch.setattr(
            trainer.optimizer, "step", lambda f=update, t=trainer, b=before: (f(), b.update(weights_of(t)))
        )
        with pytest.raises(TrainingError, match=r"the loss became -?(nan|inf) at step 5; .*checkpoint\.safetensors"):
            trainer.fit()
        assert trainer.step == 4
        assert all(torch.isfinite(x).all() for x in weights_of(trainer).values())
        assert torch.equal(weights_of(trainer)["model.conv_in.weight"], before["model.conv_in.weight"])
        toy_trainer(out, log_every=1).fit()
        assert digests(out) == digests(tmp_path / "a")
        assert log_of(out) == log_of(tmp_path / "a")


def test_a_learning_rate_that_is_too_large(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, lr=1e30, lr_warmup=0, save_every=1)
    with pytest.raises(TrainingError, match=r"(loss|gradient's norm) became (nan|inf) at step 2; .*lower lr"):
        trainer.fit()
    assert trainer.step == 1
    assert Sampler.from_pretrained(tmp_path / "checkpoint.safetensors", device="cpu").info.classes == 3


def test_a_gradient_that_stops_being_finite(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The square root at zero has a finite value and an infinite gradient."""
    trainer = toy_trainer(tmp_path)
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *x: (lambda value: value + (value - value).sqrt())(loss(*x)))
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match="the gradient's norm became nan at step 1"):
        trainer.fit()
    assert torch.equal(before["model.conv_in.weight"], weights_of(trainer)["model.conv_in.weight"])


@pytest.mark.parametrize("what", ["unet", "ema", "moment"])
def test_weights_that_are_not_finite_are_not_saved(tmp_path: Path, what: str) -> None:
    trainer = toy_trainer(tmp_path, steps=2)
    trainer.fit()
    files = snapshot(tmp_path)
    parameter = trainer.unet.conv_out.bias
    broken = {
        "unet": parameter,
        "ema": trainer.ema.conv_out.bias,
        "moment": trainer.optimizer.state[parameter]["exp_avg"],
    }
    with torch.no_grad():
        broken[what][0] = math.inf
    name = {"unet": "model", "ema": "ema", "moment": "optimizer.exp_avg"}[what]
    with pytest.raises(TrainingError, match=rf"{name}\.conv_out\.bias has NaN or infinite values; .*checkpoint"):
        trainer.save()
    assert snapshot(tmp_path) == files


# A full disk is imitated by a limit on the size of files, which the checkpoint exceeds.
FULL = """
import json, resource, sys
from pathlib import Path

from fastdiff.errors import TrainingError
from tests.training.toys import toy_trainer

out = Path(sys.argv[1])
toy_trainer(out, steps=2).fit()
before = (out / "checkpoint.safetensors").read_bytes()
resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) * int(sys.argv[2]) // 100, resource.RLIM_INFINITY))
message = None
try:
    toy_trainer(out, steps=6).fit()
except TrainingError as e:
    message = str(e)
same = (out / "checkpoint.safetensors").read_bytes() == before
hidden = [path.name for path in out.rglob(".*")]
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
toy_trainer(out, steps=6).fit()
print(json.dumps({"message": message, "same": same, "hidden": hidden}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
@pytest.mark.parametrize(
    ("percent", "file"), [("50", "checkpoint.safetensors"), pytest.param("0", "log.jsonl", marks=pytest.mark.slow)]
)
def test_a_full_disk(tmp_path: Path, percent: str, file: str) -> None:
    toy_trainer(tmp_path / "a", steps=6).fit()
    result = python("-c", FULL, tmp_path / "b", percent)
    report = answer_of(result)
    assert report["message"] is not None
    assert report["message"].startswith(f"{tmp_path / 'b' / file} could not be written (")
    assert "File too large" in report["message"]
    assert report["same"]
    assert report["hidden"] == []
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_no_space_left_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: Any, tensors: Any, metadata: Any) -> None:
        file.write(b"some")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fastdiff.training.resume.write_safetensors", full)
    with pytest.raises(TrainingError, match=r"checkpoint.safetensors could not be written .*No space.*Free some space"):
        toy_trainer(tmp_path).fit()
    assert [path.name for path in tmp_path.glob("*") if path.suffix in (".safetensors", ".tmp")] == []
    assert list(tmp_path.glob(".*")) == []


def test_a_log_that_cannot_be_closed(tmp_path: Path) -> None:
    """That is an error, but not one that hides the error that ended the run."""

    def fail() -> None:
        raise OSError("no more")

    def end(error: Exception | None) -> None:
        with TrainingLog(tmp_path, TrainConfig(), 0, [], enabled=True) as log:
            log._open.callback(fail)
            if error is not None:
                raise error

    with pytest.raises(TrainingError, match="what ended it"):
        end(TrainingError("what ended it"))
    with pytest.raises(TrainingError, match=r"log\.jsonl could not be written \(no more\)"):
        end(None)


def test_a_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    trainer = toy_trainer(tmp_path / "file")
    with pytest.raises(TrainingError, match=r"file: nothing can be written there .*; choose another folder"):
        trainer.fit()
    assert trainer.step == 0


def test_unreadable_data_ends_training_with_its_name(tmp_path: Path) -> None:
    """The caller gets the error of the thread that reads the data."""

    class Broken(Toys):
        def __getitems__(self, indices: Any) -> Any:
            raise DataError("toys/7.png: cannot be read")

    with pytest.raises(DataError, match=r"toys/7\.png"):
        toy_trainer(tmp_path, data=Broken()).fit()
