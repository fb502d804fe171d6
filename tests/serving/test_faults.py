"""Faults that are provoked on a real server: memory, errors of a device, a loop that hangs, races, starvation."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import fastdiff
from fastdiff.backends import native
from tests.serving.test_server import ENDLESS, background, decoded, idle
from tests.support import faulty
from tests.support.paths import ROOT
from tests.support.served import LONG, Served, alive, until

if native.extension() is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="reads /proc"),
    pytest.mark.xdist_group("server"),
]


def ready(server: Served) -> bool:
    return server.http.get("/health/ready").status_code == 200


def digests(server: Served, **fields: Any) -> list[str]:
    answer = server.draw(**fields)
    assert answer.status_code == 200, answer.text
    return answer.json()["fastdiff"]["pixels_sha256"]


def test_the_same_request_has_the_same_bits_at_any_load(server: Served) -> None:
    until(lambda: ready(server))
    requests: list[dict[str, Any]] = [
        {"label": 2, "n": 3, "solver": "dpmpp_2m", "steps": 8, "guidance": 2.0, "seed": 7, "start_index": 4},
        {"model": "words", "prompt": "a dog", "negative": "snow", "n": 2, "steps": 6, "guidance": 3.0, "seed": 8},
    ]
    alone = [digests(server, **fields) for fields in requests]
    with contextlib.ExitStack() as stack:
        for k in range(4):  # other jobs, of which some begin while these run
            others = {**ENDLESS, "seed": k, "guidance": 1.0 + k % 2, "n": 1 + 5 * k}
            stack.enter_context(background(server, **others))
        stack.enter_context(background(server, model="words", prompt="a car", steps=1000, solver="ddpm", n=30))
        until(server.running)
        for _ in range(3):
            with concurrent.futures.ThreadPoolExecutor() as pool:
                assert list(pool.map(lambda fields: digests(server, **fields), requests)) == alone
    idle(server)


def test_cancelling_races_with_finishing(server: Served) -> None:
    """Each job has one outcome, which its answer and its record agree on, and the server goes on."""
    draw = random.Random(0)
    outcomes: list[str] = []

    def race(i: int) -> None:
        name, pause = f"race-{time.monotonic_ns()}-{i}", draw.choice((0.0, 0.002, 0.005, 0.02))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            body = {"label": 1, "steps": 1 + i % 3, "seed": i}
            answer = pool.submit(server.http.post, "/v1/images/generations", json=body, headers={"x-request-id": name})
            time.sleep(pause)
            ended = server.http.delete(f"/v1/jobs/{name}")
            status = answer.result().status_code
        record = server.http.get(f"/v1/jobs/{name}").json()["status"]
        assert (status, record) in ((200, "finished"), (409, "cancelled"))
        assert ended.status_code in (404, 503) or ended.json()["status"] == record  # 503: no answer within seconds
        outcomes.append(record)

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(race, range(60)))
    assert "finished" in outcomes
    idle(server)
    assert server.draw(label=1, steps=1).status_code == 200


def test_a_job_that_is_never_urgent_is_served(server: Served) -> None:
    """Jobs that are more urgent take all the time there is; it takes a step within the ageing bound nevertheless."""
    with contextlib.ExitStack() as stack:
        urgent = [stack.enter_context(background(server, **ENDLESS, priority=900, seed=k)) for k in range(3)]
        until(server.running)
        assert server.draw(label=1, steps=1, priority=-1000).status_code == 200
        assert not any(job.done() for job in urgent)
    idle(server)


def test_less_memory_than_a_step_takes(server: Served, model: str) -> None:
    """A step is halved once, and then only the job that does not fit ends; no process does."""
    restarts = server.metric("fastdiff_engine_restarts_total")
    fields = {"label": 1, "n": 4, "solver": "unipc", "steps": 4}
    answer = server.draw(**fields, seed=faulty.SMALL_MEMORY)
    assert answer.status_code == 200, answer.text
    sampler = fastdiff.Sampler.from_pretrained(model, determinism="bitwise")
    alone = sampler.sample(4, labels=1, solver="unipc", steps=4, seed=faulty.SMALL_MEMORY)
    for entry, picture in zip(answer.json()["data"], alone.to_pil(), strict=True):
        assert (np.asarray(decoded(entry["b64_json"])) == np.asarray(picture)).all()
    with background(server, **{**fields, "steps": 500}, seed=1) as beside:
        answer = server.draw(**fields, seed=faulty.NO_MEMORY)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "out_of_memory")
        assert "device memory does not suffice" in answer.json()["error"]["message"]
        assert beside.result().status_code == 200
    assert server.metric("fastdiff_engine_restarts_total") == restarts


def test_an_error_that_a_device_does_not_recover_from(server: Served) -> None:
    """The process is replaced: nothing more is drawn on that device's context."""
    engine, restarts = server.engine(), server.metric("fastdiff_engine_restarts_total")
    with background(server, **ENDLESS) as beside:
        until(server.running)
        answer = server.draw(label=1, steps=2, seed=faulty.STICKY)
        # The process ends as soon as the first of the two is told why.
        codes = {a.json()["error"]["code"] for a in (answer, beside.result()) if a.status_code == 503}
        assert "engine_failed" in codes
        assert codes <= {"engine_failed", "engine_lost"}
        assert answer.status_code == beside.result().status_code == 503
        assert "an illegal memory access" in server.log.read_text()
    until(lambda: ready(server))
    assert server.metric("fastdiff_engine_restarts_total") == restarts + 1
    assert not alive(engine)
    assert server.draw(label=1, steps=1).status_code == 200


def test_a_loop_that_hangs_is_not_ready(server: Served) -> None:
    """The process gives signs of life meanwhile; once steps are taken again, it is ready."""
    engine, goes_on = server.engine(), Path(server.environment[faulty.GOES_ON])
    try:
        with background(server, label=1, steps=2, seed=faulty.HANGS) as hangs:
            answer = until(lambda: "took no step" in (r := server.http.get("/health/ready")).text and r)
            assert answer.status_code == 503
            assert server.metric("fastdiff_ready") == 0
            assert server.http.get("/health/live").status_code == 200
            goes_on.touch()
            assert hangs.result().status_code == 200
    finally:
        goes_on.touch()
    until(lambda: ready(server))
    assert server.engine() == engine
    goes_on.unlink()


@pytest.mark.slow
def test_a_model_that_is_damaged_before_its_process_is_replaced(server: Served, model: str) -> None:
    """The new process cannot load the file, which the log names, until it is mended."""
    (weights,) = Path(model).rglob("*.safetensors")
    whole = weights.read_bytes()
    try:
        weights.write_bytes(whole[: len(whole) // 2])
        os.kill(server.engine(), signal.SIGKILL)
        until(lambda: "cannot be loaded again" in server.http.get("/health/ready").text)
        assert server.draw(label=1).status_code == 503
        until(lambda: str(weights) in server.log.read_text())  # by name, in the log alone
        assert str(weights) not in server.http.get("/health/ready").text
    finally:
        weights.write_bytes(whole)
    until(lambda: ready(server))
    assert server.draw(label=1, steps=1).status_code == 200


def test_a_model_whose_file_is_cut_goes_on(server: Served, model: str) -> None:
    """The weights in memory are those of the whole file."""
    (weights,) = Path(model).rglob("*.safetensors")
    whole = weights.read_bytes()
    before = digests(server, label=1, n=2, steps=3, seed=5)
    try:
        os.truncate(weights, 100)
        assert digests(server, label=1, n=2, steps=3, seed=5) == before
    finally:
        weights.write_bytes(whole)


def test_a_cache_of_kernels_that_cannot_be_used_is_not_needed(server: Served) -> None:
    """The fixture's server has one that is a file: every test shows that it draws."""
    assert "the folder of compiled kernels cannot be used, and is not needed" in server.log.read_text()
    assert server.draw(label=1, steps=1).status_code == 200


def test_systemd_hears_of_the_start(server: Served) -> None:
    until(lambda: server.says("READY=1"))
    until(lambda: server.says("WATCHDOG=1"))
    assert not server.says("STOPPING=1")


@pytest.mark.slow
def test_a_server_of_a_damaged_model_does_not_start(model: str, tmp_path: Path) -> None:
    """The error names the file, whatever other models there are."""
    damaged = tmp_path / "damaged"
    shutil.copytree(model, damaged)
    (weights,) = damaged.rglob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)
    command = [sys.executable, "-m", "fastdiff", "serve", model, str(damaged), "--port", "0"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=LONG, cwd=ROOT)
    assert ended.returncode not in (0, -signal.SIGSEGV, -signal.SIGBUS)
    assert str(weights) in ended.stderr
    assert "Traceback" not in ended.stderr


@pytest.mark.slow
def test_a_process_that_hangs_for_a_minute_is_replaced(model: str, tmp_path: Path) -> None:
    server = Served(tmp_path, model, module="tests.support.faulty")
    try:
        engine = server.engine()
        answer = server.draw(label=1, steps=2, seed=faulty.HANGS)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "engine_lost")
        until(lambda: ready(server))
        assert server.engine() not in (0, engine)
        assert "hangs" in server.log.read_text()
    finally:
        server.end()
