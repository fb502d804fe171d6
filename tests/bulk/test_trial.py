"""The number of workers and of their threads: what is measured, and what follows from it; and the GPUs of workers."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from fastdiff.bulk import drawing, local, trial
from fastdiff.errors import InvalidArgument
from tests.bulk.jobs import draw, files, saved, tiny
from tests.bulk.test_workers import job_with_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    ("rates", "expected"),
    [([10.0, 9.0], (4, 1)), ([9.0, 10.0], (1, 4)), ([9.0, 9.0], (4, 1)), ([None, 9.0], (4, 1)), ([9.0, None], (4, 1))],
)
def test_the_faster_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rates: list[float | None], expected: tuple[int, int]
) -> None:
    left = list(rates)
    monkeypatch.setattr(trial, "measure", lambda folder, workers, threads: left.pop(0))
    assert trial.faster(tmp_path, [(4, 1), (1, 4)]) == expected


class Started(Exception):
    """The arguments of `local.run`, in place of workers."""


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(folder: Path, workers: int, threads: int, *others: Any) -> None:
        raise Started(workers, threads, others[-1])

    monkeypatch.setattr(local, "run", run)


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("processors", "memory", "options", "measured", "expected"),
    [
        (8, 8, {}, [], (4, 2)),  # four shards: no more workers than these, which share the processors
        (2, 8, {}, [], (2, 1)),
        (1, 8, {}, [], (1, 1)),
        (8, 2, {}, [], (2, 4)),  # memory for two
        (8, 8, {"workers": 3}, [], (3, 1)),
        (8, 8, {"determinism": "seed"}, [], (4, 1)),  # rounding depends on the threads, so their number is fixed
        (8, 8, {"shard_size": 1000}, [], (1, 8)),
        (8, 8, {"long": True}, [(4, 2), (1, 8)], (1, 8)),
        (1, 8, {"long": True}, [], (1, 1)),
        (8, 8, {"long": True, "workers": 8}, [], (4, 1)),
        (8, 8, {"long": True, "determinism": "seed"}, [], (4, 1)),
    ],
)
def test_workers_and_threads(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch,
    processors: int, memory: int, options: dict[str, Any], measured: list[Any], expected: tuple[int, int],
) -> None:  # fmt: skip
    """Nothing is measured before a short job, or where there is no choice."""
    seen: list[Any] = []
    monkeypatch.setattr(drawing.native_threads, "number", lambda: processors)
    monkeypatch.setattr(drawing, "_number", lambda workers, each: workers or min(processors, memory))
    monkeypatch.setattr(trial, "faster", lambda folder, choices: seen.extend(choices) or choices[-1])
    if options.pop("long", False):
        monkeypatch.setattr(trial, "WORTH_S", 0.0)
        monkeypatch.setattr(drawing, "SMALL", 0)
    with pytest.raises(Started) as caught:
        draw(model, tmp_path / "a", **options)
    assert seen == measured
    assert caught.value.args == (*expected, [])


@pytest.mark.slow
def test_a_measurement(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It writes nothing, and what draws afterwards draws the same."""
    job = job_with_model(tmp_path / "a", model)
    before = files(tmp_path / "a")
    rate = trial.measure(tmp_path / "a", 2, 1)
    assert rate is not None
    assert rate > 0
    assert files(tmp_path / "a") == before
    monkeypatch.setattr(trial, "WORTH_S", 0.0)
    monkeypatch.setattr(drawing, "SMALL", 0)
    monkeypatch.setattr(trial, "WINDOW_S", 0.0)
    monkeypatch.setattr(drawing.native_threads, "number", lambda: 2)
    report = draw(model, tmp_path / "b")
    assert (report.workers, report.threads) in ((2, 1), (1, 2))
    draw(tiny(), tmp_path / "c")
    assert files(tmp_path / "b") == files(tmp_path / "c")
    assert job.finished() == set()


def test_a_measurement_that_fails_is_none(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    job_with_model(tmp_path / "a", str(tmp_path / "gone"))
    assert trial.measure(tmp_path / "a", 1, 1) is None
    assert "Traceback" not in capfd.readouterr().err


def _asleep(*arguments: Any) -> None:
    time.sleep(60)


def test_a_measurement_that_hangs_is_none(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job_with_model(tmp_path / "a", model)
    monkeypatch.setattr(trial, "_run", _asleep)
    monkeypatch.setattr(trial, "LIMIT_S", 0.2)
    began = time.monotonic()
    assert trial.measure(tmp_path / "a", 1, 1) is None
    assert time.monotonic() - began < 50


# GPUs -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("environment", "index", "expected"),
    [
        ({}, None, ["0", "1", "2"]),
        ({}, 1, ["1"]),
        ({"CUDA_VISIBLE_DEVICES": "5,GPU-9a, 7"}, None, ["5", "GPU-9a", "7"]),
        ({"CUDA_VISIBLE_DEVICES": "5,6,7"}, 2, ["7"]),
        ({"LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}, None, ["1"]),
        ({"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2"}, None, ["0", "2"]),
        ({"LOCAL_RANK": "4", "LOCAL_WORLD_SIZE": "6"}, None, ["1"]),
        ({"LOCAL_RANK": "x", "LOCAL_WORLD_SIZE": "6"}, None, ["0", "1", "2"]),
    ],
)
def test_gpus(
    monkeypatch: pytest.MonkeyPatch, environment: dict[str, str], index: int | None, expected: list[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    assert local.gpus(index, environment) == expected


def test_gpus_that_are_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert local.gpus(None, {"CUDA_VISIBLE_DEVICES": ""}) == []
    with pytest.raises(InvalidArgument, match="device=cuda:3: 0 GPUs are visible"):
        local.gpus(3, {})


@pytest.mark.usefixtures("started")
@pytest.mark.parametrize(
    ("workers", "device", "expected"),
    [(None, "cuda", (3, 1, ["0", "1", "2"])), (4, "cuda", (4, 1, ["0", "1", "2"])), (None, "cuda:2", (1, 1, ["2"]))],
)
def test_a_worker_for_each_gpu(
    tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch, workers: int | None, device: str, expected: Any
) -> None:
    """As far as that can be seen without one: the network is on the CPU, and the device is put in its place."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    of = drawing._Needs.of
    monkeypatch.setattr(
        drawing._Needs, "of", lambda *a: drawing.dataclasses.replace(of(*a), device=torch.device(device))
    )
    with pytest.raises(Started) as caught:
        draw(model, tmp_path / "a", workers=workers)
    assert caught.value.args == expected


class Board:
    """A pipe that never ends, and keeps what is sent."""

    def __init__(self) -> None:
        self.sent: list[Any] = []

    def recv(self) -> None:
        time.sleep(60)

    def send(self, message: Any) -> None:
        self.sent.append(message)


def test_a_worker_sets_its_gpu_before_it_loads_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    """Setting it in this process shows what a new process, in which CUDA has not begun, sets."""
    monkeypatch.setenv(local.GPU, "")
    monkeypatch.setattr(local, "ignore_interrupts_and_end_with", lambda pipe: None)
    monkeypatch.setattr(
        local.watching, "serve", lambda *_: ("done", os.environ[local.GPU], torch.cuda.is_initialized())
    )
    pipe = Board()
    local._run(pipe, [0, 0, 0], 0, {local.GPU: "GPU-9a"}, "folder", 0, 1, 1, 1.0)
    assert pipe.sent == [("done", "GPU-9a", False)]
