"""The script that measures bulk jobs runs at a small size; what it finds out about speed is not asserted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastdiff import bulk
from tests.bulk.jobs import draw, files, saved
from tests.support.paths import ROOT

SCRIPT = [sys.executable, str(ROOT / "benchmarks" / "bulk.py")]


def script(*arguments: str) -> dict[str, object]:
    run = subprocess.run([*SCRIPT, *arguments], capture_output=True, text=True, timeout=550)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


@pytest.mark.slow
def test_a_soak_ends_with_what_an_uninterrupted_job_has(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    options = ("--n", "400", "--steps", "1", "--shard-size", "4", "--kills", "2", "--fraction", "0.1")
    found = script("soak", model, "--out", str(tmp_path / "a"), *options)
    assert found["good"]
    assert found["kills"] == 2
    assert (found["shards"], found["left_over"]) == (100, 0)
    assert found["redrawn_and_equal"]
    draw(model, tmp_path / "b", n=400, shard_size=4, batch_size=None, workers=1)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert bulk.verify(tmp_path / "b").good


@pytest.mark.slow
def test_throughput(tmp_path: Path) -> None:
    model = saved(tmp_path / "model")
    found = script("throughput", model, "--n", "64", "--steps", "1", "--rounds", "1", "--shard-size", "16")
    assert found["shards"] == 4
    assert found["target"] == 0.97
    assert all(isinstance(found[key], float) for key in ("job_images_per_s", "ratio", "first_shard_s"))
    assert found["sampler_images_per_s"] > 0
