"""The log of a training run, its progress bar, and TensorBoard."""

from __future__ import annotations

import io
import itertools
import json
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.training.toys import (
    log_of,
    toy_trainer,
)


def test_the_log_survives_a_torn_line(tmp_path: Path) -> None:
    toy_trainer(tmp_path, steps=4).fit()
    before = log_of(tmp_path)
    with (tmp_path / "log.jsonl").open("ab") as file:
        file.write(b'{"step": 99, "loss": 1.0}\n5\n\xff\x00\n{"step": 5, "lo')
    toy_trainer(tmp_path, steps=6).fit()
    assert log_of(tmp_path)[:2] == before
    assert [line["step"] for line in log_of(tmp_path)] == [2, 4, 6]
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seconds == sorted(seconds)


def test_the_log_says_what_happened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = toy_trainer(tmp_path, steps=5, log_every=2, lr_warmup=4)
    update, losses = trainer._update, []
    monkeypatch.setattr(trainer, "_update", lambda *x: losses.append(update(*x)) or losses[-1])
    trainer.fit()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 5]
    means = [(losses[0] + losses[1]) / 2, (losses[2] + losses[3]) / 2, losses[4]]
    assert [line["loss"] for line in lines] == pytest.approx(means, rel=1e-12)
    assert [line["lr"] for line in lines] == pytest.approx([5e-4, 1e-3, 1e-3])
    for line in map(json.loads, (tmp_path / "log.jsonl").read_text().splitlines()):
        assert line["images_per_s"] > 0
        assert line["seconds"] >= 0


def test_images_per_second_leave_out_saving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    trainer = toy_trainer(tmp_path, steps=4, log_every=2, save_every=1)
    update, save = trainer._update, trainer.save

    def takes(seconds: float, work: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*x: Any) -> Any:
            clock[0] += seconds
            return work(*x)

        return timed

    monkeypatch.setattr(trainer, "_update", takes(0.5, update))
    monkeypatch.setattr(trainer, "save", takes(100.0, save))
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    trainer.fit()
    lines = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line["images_per_s"] for line in lines] == [16.0, 16.0]
    assert [line["seconds"] for line in lines] == [101.0, 302.0]


def test_tensorboard(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    toy_trainer(tmp_path, steps=4, sample_every=4).fit()
    toy_trainer(tmp_path, steps=6, sample_every=4).fit()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    lines = log_of(tmp_path)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for key in ("loss", "lr"):
        scalars = {event.step: event.value for event in events.Scalars(key)}
        assert scalars == pytest.approx({line["step"]: line[key] for line in lines})
    assert [image.step for image in events.Images("samples")] == [4, 6]


def test_without_tensorboard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tensorboard", "torch.utils.tensorboard"):
        monkeypatch.setitem(sys.modules, name, None)
    toy_trainer(tmp_path, steps=2, sample_every=2).fit()
    assert not (tmp_path / "tensorboard").exists()
    assert len(log_of(tmp_path)) == 1


class Screen(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def test_progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    screen = Screen(terminal=True)
    monkeypatch.setattr(sys, "stderr", screen)
    toy_trainer(tmp_path / "live", steps=3).fit()
    assert "3/3" in screen.getvalue()
    assert "images/s" in screen.getvalue()
    plain = Screen(terminal=False)
    monkeypatch.setattr(sys, "stderr", plain)
    toy_trainer(tmp_path / "plain", steps=3).fit()
    lines = plain.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines] == ["step 1/3", "step 3/3"]  # the first, every 30 s, the last
    assert "\x1b" not in plain.getvalue()


def test_progress_of_a_grid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A grid of samples may take longer than the updates before it."""
    plain, clock = Screen(terminal=False), itertools.count(0.0, 20.0)
    monkeypatch.setattr(sys, "stderr", plain)
    times = types.SimpleNamespace(monotonic=lambda: next(clock), perf_counter=time.perf_counter)
    monkeypatch.setattr("fastdiff.training.log.time", times)
    toy_trainer(tmp_path, steps=2, sample_every=2).fit()
    lines = plain.getvalue().splitlines()
    rows = [int(line.split()[3]) for line in lines if line.startswith("drawing samples: row ")]
    assert rows == sorted(rows)
    assert len(rows) > 5
    assert lines[-1].endswith(f": row {rows[-1]} of {rows[-1]}")
