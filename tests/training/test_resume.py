"""Runs that end, are killed or are damaged, and resume: the result has the bits of an uninterrupted run."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.errors import CheckpointError, InvalidArgument, TrainingError
from fastdiff.sampler import Sampler
from tests.training.toys import (
    VARIANTS,
    Change,
    Toys,
    answer_of,
    digests,
    log_of,
    python,
    rewrite,
    snapshot,
    toy_trainer,
    toy_unet,
    variant,
    weights_of,
)


@pytest.mark.parametrize("name", VARIANTS)
def test_resumed_in_process(tmp_path: Path, name: str) -> None:
    variant(tmp_path / "a", name, steps=10).fit()
    for steps in (3, 5, 10):
        trainer = variant(tmp_path / "b", name, steps=steps)
        trainer.fit()
        assert trainer.step == steps
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [line["step"] for line in log_of(tmp_path / "a")] == [4, 8, 10]
    assert [line["step"] for line in log_of(tmp_path / "b")] == [3, 4, 5, 8, 10]  # 3 and 5 ended their parts
    assert log_of(tmp_path / "a")[-1] == log_of(tmp_path / "b")[-1]


def test_a_finished_run_is_left_as_it_is(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=3).fit()
    before = digests(tmp_path), log_of(tmp_path)
    shutil.rmtree(tmp_path / "model")
    toy_trainer(tmp_path, steps=3).fit()
    assert (digests(tmp_path), log_of(tmp_path)) == before


def test_restored_moments_lie_in_memory_as_their_parameters(tmp_path: Path) -> None:
    """Fused AdamW ignores strides, so that moments in another layout would be applied to other weights."""
    variant(tmp_path, "plain", steps=3).fit()
    trainer = variant(tmp_path, "plain", steps=3)
    trainer.fit()
    strides = {p.stride() for p in trainer.unet.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1}
    assert all(stride[1] == 1 for stride in strides)  # channels last
    for p in trainer.unet.parameters():
        moments = trainer.optimizer.state[p]
        assert moments["exp_avg"].stride() == moments["exp_avg_sq"].stride() == p.stride()
        assert moments["step"].device == p.device


def test_ctrl_c_leaves_a_run_that_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant(tmp_path / "a", "plain").fit()
    trainer = variant(tmp_path / "b", "plain")
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *x: loss(*x) if trainer.step < 5 else signal_interrupt())
    with pytest.raises(KeyboardInterrupt):
        trainer.fit()
    assert [line["step"] for line in log_of(tmp_path / "b")] == [4]
    variant(tmp_path / "b", "plain").fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


def test_a_stopped_run_is_saved_and_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    variant(tmp_path / "a", "plain").fit()
    trainer = variant(tmp_path / "b", "plain")
    loss = trainer._loss
    monkeypatch.setattr(trainer, "_loss", lambda *x: (trainer.stop() if trainer.step == 4 else None, loss(*x))[1])
    trainer.fit()
    assert trainer.step == 5
    assert not (tmp_path / "b" / "model").exists()
    again, begun = variant(tmp_path / "b", "plain"), []
    again.fit(lambda: begun.append(again.step))
    assert begun == [5]
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")


@pytest.mark.parametrize(
    ("key", "new"),
    [("lr", 3e-3), ("batch_size", 2), ("accumulate", 2), ("ema_decay", 0.9), ("grad_clip", 0.5), ("hflip", True)],
)
def test_harmless_changes_are_accepted_on_request(tmp_path: Path, key: str, new: Any) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    trainer = toy_trainer(tmp_path, steps=3, **{key: new})
    old = getattr(toy_trainer(tmp_path, steps=2).config, key)
    with pytest.raises(TrainingError, match=rf"train\.{key}: {old} then, {new} now.*accept_changes=True"):
        trainer.fit()
    trainer.fit(accept_changes=True)
    assert trainer.step == 3


def test_other_changes_are_not_accepted(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    for key, new in {"seed": 7, "prediction": "v_prediction"}.items():
        with pytest.raises(
            TrainingError, match=rf"train\.{key}: .* then, .*{new}.* now\. Use those, or another folder$"
        ):
            toy_trainer(tmp_path, steps=3, **{key: new}).fit(accept_changes=True)
    with pytest.raises(InvalidArgument, match="accept_changes"):
        toy_trainer(tmp_path, steps=3).fit(accept_changes="yes")


def signal_interrupt() -> Any:
    raise KeyboardInterrupt


# Forks runs and kills them, at random moments and at every point of a save, and prints how often.
KILLER = """
import json, os, random, shutil, signal, sys, time, traceback
from pathlib import Path

import torch
import torch.utils.tensorboard  # once, not in every fork

from fastdiff import files
from fastdiff.training import resume as state
from tests.training.toys import variant

out, name, seed = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
settings = {"steps": 8, "save_every": 1 + seed % 2, "log_every": 3}
POINTS = ("half", "written", "replace", "replaced")


def die_in_save(point, count):
    "Kill this process at a point of its count-th checkpoint."
    left = [count]

    def at(here, path):
        if here == point and (isinstance(path, int) or "checkpoint" in str(path)):
            left[0] -= 1
            if left[0] == 0:
                if point == "half":
                    os.ftruncate(path, os.fstat(path).st_size // 2)
                os.kill(os.getpid(), signal.SIGKILL)

    write, replace = state.write_safetensors, os.replace

    def save(file, tensors, metadata):
        write(file, tensors, metadata)
        file.flush()
        at("half", file.fileno())
        at("written", file.fileno())

    def rename(source, destination):
        at("replace", destination)
        replace(source, destination)
        at("replaced", destination)

    state.write_safetensors, files.os.replace = save, rename


def run(folder, before=lambda: None):
    pid = os.fork()
    if pid:
        return pid
    try:
        before()
        variant(folder, name, **settings).fit()
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        os._exit(1)


def finished(pid, within=None):
    "Wait for a run; kill it when its time is over."
    end = None if within is None else time.monotonic() + within
    while end is None or time.monotonic() < end:
        done, status = os.waitpid(pid, 0 if end is None else os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


started = time.monotonic()
assert finished(run(out / "a")) == 0
usual = time.monotonic() - started

rng = random.Random(seed)
report = {"in_saves": 0, "random": 0, "leftovers": 0}
for point in POINTS:
    code = finished(run(out / "b", lambda: die_in_save(point, rng.randint(1, 2))))
    report["in_saves"] += code == -signal.SIGKILL
    report["leftovers"] += bool(list((out / "b").glob(".*")))
    # The run may have finished before it reached a late point.
    assert code in (0, -signal.SIGKILL), code
for _ in range(4):
    code = finished(run(out / "b"), within=rng.uniform(0.1, 0.9) * usual)
    report["random"] += code == -signal.SIGKILL
    assert code in (0, -signal.SIGKILL), code
assert finished(run(out / "b")) == 0
report["hidden"] = [path.name for path in (out / "b").rglob(".*")]
print(json.dumps(report))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    ("name", "seed"),
    [
        ("dropout", 2),
        ("plain", 1),
        ("bf16", 3),
    ],
)
@pytest.mark.slow
def test_killed_and_resumed(tmp_path: Path, name: str, seed: int) -> None:
    report = answer_of(python("-c", KILLER, tmp_path, name, str(seed)))
    print(f"seed {seed}: {report}")
    assert report["in_saves"] >= 3
    assert report["leftovers"] >= 2  # so some kills were in the middle of a save
    assert report["hidden"] == []  # and the temporary files were removed
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert log_of(tmp_path / "a") == log_of(tmp_path / "b")
    assert [line["step"] for line in log_of(tmp_path / "b")] == [3, 6, 8]


CHANGES: dict[str, dict[str, Any]] = {
    "train.seed": {"seed": 1},
    "train.batch_size": {"batch_size": 16},
    "train.lr": {"lr": 2e-3},
    "train.prediction": {"prediction": "sample"},
    "train.precision": {"precision": "bf16"},
    "unet": {"unet": {"layers_per_block": 2}},
    "scheduler": {"timesteps": 21},
    "data": {"data": {"n": 11}},
}


@pytest.mark.parametrize("what", CHANGES)
def test_changed_settings_are_refused(tmp_path: Path, what: str) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    files = snapshot(tmp_path)
    change = dict(CHANGES[what])
    unet, data = toy_unet(**change.pop("unet", {})), Toys(**change.pop("data", {}))
    trainer = toy_trainer(tmp_path, unet=unet, data=data, **change)
    before = weights_of(trainer)
    with pytest.raises(TrainingError, match=rf"checkpoint\.safetensors was written with other settings \(.*{what}"):
        trainer.fit()
    assert snapshot(tmp_path) == files
    assert trainer.step == 0
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(trainer).values(), strict=True))


def test_another_number_of_processes_is_noted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    rewrite(tmp_path / "checkpoint.safetensors", lambda tensors, info: info.update(world_size=2))
    trainer = toy_trainer(tmp_path, steps=4)
    trainer.fit()
    assert trainer.step == 4
    assert "1 processes instead of 2" in caplog.text


def test_checkpoints_without_newer_metadata_resume(tmp_path: Path) -> None:
    """Checkpoints of the first release lack the losses since the log's last line."""
    toy_trainer(tmp_path / "a", steps=6).fit()
    toy_trainer(tmp_path / "b", steps=4).fit()
    rewrite(tmp_path / "b" / "checkpoint.safetensors", lambda tensors, info: info.pop("losses"))
    toy_trainer(tmp_path / "b", steps=6).fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def damage(change: Change) -> Callable[[Path], None]:
    return lambda path: rewrite(path, change)


DAMAGES: dict[str, tuple[Callable[[Path], None], str]] = {
    "truncated": (truncated, "truncated"),
    "header only": (lambda path: os.truncate(path, 100), "truncated"),
    "empty": (lambda path: os.truncate(path, 0), "an empty file"),
    "noise": (lambda path: path.write_bytes(b"\x10" + bytes(7) + b"no JSON at all, bytes"), "damaged"),
    "tensor missing": (
        damage(lambda tensors, _: tensors.pop("optimizer.exp_avg.conv_in.weight")),
        "1 tensors",
    ),
    "wrong shape": (damage(lambda tensors, _: tensors.update({"ema.conv_in.bias": torch.zeros(9)})), "1 tensors"),
    "no step": (damage(lambda _, info: info.pop("step")), "lacks step"),
    "strange step": (damage(lambda _, info: info.update(step="x")), "metadata cannot be read"),
    "weights only": (damage(lambda _, info: info.update(kind="model")), "not a training checkpoint"),
}


@pytest.mark.parametrize("what", DAMAGES)
def test_damaged_checkpoints_are_refused(tmp_path: Path, what: str) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    harm, message = DAMAGES[what]
    harm(tmp_path / "checkpoint.safetensors")
    files = snapshot(tmp_path)
    trainer = toy_trainer(tmp_path, steps=4)
    before = weights_of(trainer)
    with pytest.raises(CheckpointError, match=rf"{re.escape(str(tmp_path))}.checkpoint\.safetensors.*{message}"):
        trainer.fit()
    assert snapshot(tmp_path) == files
    assert trainer.step == 0
    assert not any(trainer.optimizer.state.values())
    assert all(torch.equal(a, b) for a, b in zip(before.values(), weights_of(trainer).values(), strict=True))


def test_saved_before_the_first_step(tmp_path: Path) -> None:
    toy_trainer(tmp_path / "a", steps=2).fit()
    toy_trainer(tmp_path / "b", steps=2).save()
    toy_trainer(tmp_path / "b", steps=2).fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")


def test_checkpoints_are_as_readable_as_other_files(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=2).fit()
    modes = {path.name: path.stat().st_mode for path in tmp_path.iterdir() if path.is_file()}
    assert modes["checkpoint.safetensors"] == modes["log.jsonl"]


def test_sampling_from_a_checkpoint(tmp_path: Path) -> None:
    trainer = toy_trainer(tmp_path, steps=3, prediction="v_prediction")
    trainer.fit()
    expected = Sampler(trainer.ema, trainer.schedule, prediction="v_prediction").sample(2, steps=3, labels=1).images
    for model in (tmp_path / "checkpoint.safetensors", tmp_path / "model"):
        images = Sampler.from_pretrained(model, device="cpu").sample(2, steps=3, labels=1, spacing="trailing").images
        assert (images - expected).abs().max() < 1e-5
