"""The tool that measures the server under load: its traces, its figures, the systems that it compares, a tiny run."""

from __future__ import annotations

import asyncio
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import serving
from benchmarks.serving import KINDS, Call, interval, over_seeds, quantile, replay, shapes, summary, trace
from fastdiff.backends import native
from fastdiff.sampler import Sampler
from fastdiff.serving import Engine
from tests.support.paths import ROOT
from tests.support.served import Served

if native.extension() is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
pytestmark = pytest.mark.xdist_group("server")
SECONDS = 60


def alone_of(kind: str) -> dict[tuple[int, int, float], float]:
    return {(n, steps, g): 0.001 * n * steps * g for n, steps, g in shapes(KINDS[kind])}


@pytest.mark.parametrize("kind", KINDS)
def test_traces_have_their_load(kind: str) -> None:
    alone = alone_of(kind)
    calls = trace(KINDS[kind], 0.7, alone, 2000, 1)
    assert calls == trace(KINDS[kind], 0.7, alone, 2000, 1)
    assert calls != trace(KINDS[kind], 0.7, alone, 2000, 2)
    work = sum(alone[call.shape] for call in calls)
    assert work / calls[-1].at == pytest.approx(0.7, rel=0.15)
    assert {(c.n, c.steps) for c in calls} == {(n, steps) for n, steps, _ in alone}
    assert sum(c.guidance != 1.0 for c in calls) / 2000 == pytest.approx(KINDS[kind].guided, abs=0.04)
    assert sum(c.leaves_after is not None for c in calls) / 2000 == pytest.approx(KINDS[kind].leave, abs=0.03)
    pauses = [b.at - a.at for a, b in itertools.pairwise(calls)]
    spread = statistics.stdev(pauses) / statistics.fmean(pauses)
    assert spread == pytest.approx(KINDS[kind].shape ** -0.5, rel=0.2)  # of Gamma's distribution
    assert all(call.at > 0.0 for call in calls)


def test_the_figures_of_a_replay() -> None:
    calls = [
        Call(0.0, 1, 4, 1.0, 0),
        Call(1.0, 4, 10, 2.0, 1),
        Call(2.0, 16, 250, 1.0, 2),
        Call(3.0, 1, 4, 1.0, 3, 0.1),
    ]
    alone = {(1, 4, 1.0): 0.1, (4, 10, 2.0): 0.5, (16, 250, 1.0): 10.0}
    results: list[dict[str, Any]] = [
        {"status": 200, "seconds": 0.2, "sent_late_s": 0.0},
        {"status": 200, "seconds": 2.0, "sent_late_s": 0.01},
        {"status": 200, "seconds": 20.0, "sent_late_s": 0.0},
        {"status": None, "seconds": 0.1, "sent_late_s": 0.0},
    ]
    figures = summary(calls, results, alone, rows=4 + 80 + 4000 + 3.0)
    assert (figures["p50_s"], figures["p99_s"], figures["small_p99_s"]) == (2.0, 20.0, 2.0)
    assert figures["slo"] == pytest.approx(2 / 3)
    assert figures["goodput_images_s"] == pytest.approx(17 / 22.0)
    assert figures["slowdown"] == pytest.approx((2.0 + 4.0 + 2.0) / 3)
    assert (figures["wasted_rows"], figures["failed"], figures["sent_late_s"]) == (3.0, 0, 0.01)
    results[0]["status"] = 429
    assert summary(calls, results, alone, rows=0.0)["failed"] == 1
    assert summary(calls, results, alone, rows=0.0)["p99_s"] == math.inf


def test_quantiles_and_intervals() -> None:
    assert [quantile([3.0, 1.0, 2.0, 4.0], q) for q in (0.25, 0.5, 0.75, 0.99)] == [1.0, 2.0, 3.0, 4.0]
    found = interval([1.0, 2.0, 3.0])
    assert found == {"mean": 2.0, "half_interval": pytest.approx(4.30 / 3**0.5)}
    assert math.isnan(interval([1.0])["half_interval"])
    report = over_seeds({"engine": [{"a": 1.0}, {"a": 3.0}], "lock": [{"a": 2.0}, {"a": 4.0}]})
    assert report["lock"]["minus_engine"]["a"] == {"mean": 1.0, "half_interval": 0.0}


@pytest.mark.parametrize("system", ["lock", "batch", "diffusers"])
def test_other_systems_draw_the_same_images(system: str, model: str) -> None:
    sampler = Sampler.from_pretrained(model, determinism="bitwise")
    options = {"determinism": "bitwise", "backend": "auto", "max_queue_s": 1e6}
    with serving.SYSTEMS[system](model, **options) as other:
        calls: list[dict[str, Any]] = [
            {"n": n, "steps": 3, "labels": 1, "seed": seed, "start_index": seed, "guidance": g}
            for seed, (n, g) in enumerate([(1, 1.0), (2, 1.0), (1, 2.0), (1, 1.0), (3, 2.0)])
        ]
        jobs = [other.submit(**call) for call in calls]
        assert jobs[3].cancel() or jobs[3].done()
        for call, job in zip(calls, jobs, strict=True):
            if job is jobs[3]:
                continue
            got, alone = job.result(SECONDS), sampler.sample(**call)
            if system == "diffusers":
                torch.testing.assert_close(got.images, alone.images, atol=1e-3, rtol=0)
            else:
                assert torch.equal(got.images, alone.images)
            assert (got.seed, list(got.indices), job.receipt["n"]) == (alone.seed, list(alone.indices), call["n"])
        assert other.drain(SECONDS)
        assert other.stats().rows >= sum(c["n"] * 3 * (1 + (c["guidance"] != 1.0)) for c in calls) - 3


def test_a_batch_takes_what_comes_together(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    together = serving.Batch._draw_together

    def counted(self: serving.Batch, tasks: list[Any]) -> None:
        sizes.append(len(tasks))
        together(self, tasks)

    monkeypatch.setattr(serving.Batch, "_draw_together", counted)
    monkeypatch.setattr(serving.Batch, "window_s", 60.0)  # until there are eight
    with serving.Batch(model, max_queue_s=1e6) as batch:
        jobs = [batch.submit(1, steps=2, labels=1, seed=seed) for seed in range(16)]
        for job in jobs:
            job.result(SECONDS)
    assert sizes == [8, 8]


@linux
def test_a_trace_is_replayed_at_its_times(server: Served) -> None:
    calls = [Call(0.02 * i, 1 + i % 2, 2, 1.0, i, 0.0001 if i == 3 else None) for i in range(6)]
    results = asyncio.run(replay(server.url, calls, 1))
    assert [r["status"] for r in results] == [200, 200, 200, None, 200, 200]
    assert all(r["seconds"] >= r["sent_late_s"] >= 0.0 for r in results)


def test_overheads_of_an_engine(model: str) -> None:
    admitted, submitted = serving.admission(model, 5)
    assert 0.0 < admitted < 1e3 * SECONDS
    assert 0.0 < submitted < 1e3 * SECONDS


@pytest.mark.slow
@linux
def test_a_study_of_a_few_requests(model: str, tmp_path: Path) -> None:
    out = tmp_path / "load.json"
    options = "--traces alike,leaving --loads 0.7 --seeds 2 --jobs 6 --repetitions 5 --systems engine,batch --out"
    command = [sys.executable, "-m", "benchmarks.serving", model, *options.split(), str(out)]
    subprocess.run(command, check=True, cwd=ROOT)
    report = json.loads(out.read_text())
    assert report["machine"]["threads"] >= 1
    assert set(report["traces"]) == {"alike at load 0.7", "leaving at load 0.7"}
    for by_system in report["traces"].values():
        assert set(by_system) == {"engine", "batch"}
        for figures in by_system.values():
            assert figures["failed"]["mean"] == 0.0
            assert 0.0 <= figures["slo"]["mean"] <= 1.0
            assert figures["p99_s"]["mean"] >= figures["p50_s"]["mean"] > 0.0
    assert set(report["overheads"]) == {"admission_p50_ms", "submit_p50_ms", "http_adds_p50_ms"}
    assert "litserve" in report["left_out"]


@pytest.mark.slow
@linux
def test_a_soak_leaks_nothing(model: str) -> None:
    """Memory, files and threads stay flat for FASTDIFF_SOAK_SECONDS of requests, streams and clients that leave."""
    minutes = float(os.environ.get("FASTDIFF_SOAK_SECONDS", "600")) / 60.0
    with serving.served("engine", model) as server:
        report = serving.soak(server, minutes)
    assert min(report["asked"].values()) > 0
    for name, grown in report["grown"].items():
        held = report["samples"][0][name]
        assert grown["memory_kib"] < 0.1 * held["memory_kib"] + (10 << 10), report
        assert grown["files"] <= 10, report
        assert grown["threads"] <= 2, report


def test_all_systems_are_engines() -> None:
    assert serving.SYSTEMS["engine"] is Engine
    assert all(issubclass(system, Engine) for system in serving.SYSTEMS.values())
