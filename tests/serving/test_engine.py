"""`fastdiff.Engine`: images are a Sampler's, jobs have one outcome each, and nothing is left behind."""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import hashlib
import os
import threading
import time
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import Engine, NoiseSchedule, Sampler
from fastdiff.backends import native
from fastdiff.errors import (
    BackendError,
    Cancelled,
    DeadlineImpossible,
    DeadlineMissed,
    EngineClosed,
    FastdiffError,
    InvalidArgument,
    JobTimeout,
    NumericsError,
    QueueFull,
    ReentrantCall,
)
from fastdiff.serving import engine as serving
from fastdiff.serving.scheduler import Curve
from tests.support.unets import TINY, TINY_CLASSES, change, random_unet

if native.extension() is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
SECONDS = 20  # for which a test waits for what should come at once


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    return Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend="native", determinism="bitwise")


@pytest.fixture(scope="module")
def shared(sampler) -> Iterator[Engine]:
    with Engine(sampler, max_queue_s=1e6) as engine:
        yield engine


@pytest.fixture
def engine(sampler) -> Iterator[Engine]:
    """An engine that a test may slow down, close or break."""
    with Engine(sampler, max_queue_s=1e6) as engine:
        yield engine


class Gate:
    """Lets the steps of an engine pass one by one."""

    def __init__(self, engine: Engine, monkeypatch: pytest.MonkeyPatch):
        self.slots, self.may = engine._stepper.slots, threading.Semaphore(0)
        self.arrived = threading.Semaphore(0)
        self.taken: list[int] = []  # images of each step
        step = self.slots.step

        def wait(runner: Any, slots: Any, previewed: Any = ()) -> Any:
            self.arrived.release()
            self.may.acquire(timeout=SECONDS)
            self.taken.append(len(slots))
            return step(runner, slots, previewed)

        monkeypatch.setattr(self.slots, "step", wait)

    def reached(self) -> None:
        """Wait until the next step is about to be taken."""
        assert self.arrived.acquire(timeout=SECONDS)

    def open(self, steps: int = 10**6) -> None:
        self.may.release(steps)


# Images ---------------------------------------------------------------------------------------------------------------

CALLS: list[dict[str, Any]] = [
    {"n": 1, "steps": 4, "labels": 1, "seed": 5},
    {"n": 3, "solver": "dpmpp_2m", "steps": 6, "labels": [0, 1, 2], "guidance": [1.0, 3.0, 2.0], "seed": 6},
    {"n": 2, "solver": "ddpm", "steps": 7, "labels": 3, "guidance": 2.0, "guidance_rescale": 0.5, "start_index": 4},
    {"n": 2, "solver": "heun", "steps": 3, "labels": 2, "seed": [8, 2**64 - 1]},
    {"n": 2, "steps": 5, "eta": 1.0, "labels": 0, "guidance": 4.0, "guidance_interval": (0.2, 0.8)},
    {"n": 2, "steps": 4, "labels": 1, "noise": torch.linspace(-1, 1, 2 * 3 * 64).reshape(2, 3, 8, 8)},
    {"n": 1, "steps": 6, "labels": 1, "image": torch.full((1, 3, 8, 8), 0.5), "strength": 0.5},
    {"n": 2, "steps": 5, "labels": 2, "image": torch.full((2, 3, 8, 8), -0.2), "mask": torch.eye(8), "previews": 2},
    {"n": 2, "steps": 4, "labels": 2, "image": torch.zeros(2, 3, 8, 8), "mask": torch.eye(8), "repaint": (2, 2)},
    {"n": 70, "solver": "ddim", "steps": 2, "labels": 1, "seed": 3, "eta": 1.0},
    {"n": 20, "solver": "unipc", "steps": 3, "labels": 4 - 1, "index": [2 * i for i in range(20)]},
]


def test_images_are_those_of_a_sampler(sampler, shared):
    """All at once, twice, in an order of the scheduler."""
    jobs = [(call, shared.submit(**call)) for _ in range(2) for call in CALLS]
    for call, job in jobs:
        options = {name: value for name, value in call.items() if name not in ("n", "previews")}
        expected, got = sampler.sample(call["n"], **options), job.result(SECONDS)
        assert torch.equal(got.images, expected.images), call
        assert (got.seed, list(got.indices), got.nfe, got.table) == (
            expected.seed, list(expected.indices), expected.nfe, expected.table,
        )  # fmt: skip
        assert job.state == "finished"
        assert job.receipt["sha256"] == hashlib.sha256(expected.images.numpy().tobytes()).hexdigest()
        assert job.eta_s == 0.0
    stats = shared.stats()
    assert (stats.waiting, stats.running, stats.images, stats.queued_s) == (0, 0, 0, 0.0)
    assert stats.image_steps >= sum(len(job.result().table) * call["n"] for call, job in jobs)


def test_many_threads_submit_at_once(sampler, shared):
    expected = {seed: sampler.sample(1, steps=3, labels=1, seed=seed).images for seed in range(12)}
    got: dict[int, Tensor] = {}

    def work(seed: int) -> None:
        got[seed] = shared.submit(1, steps=3, labels=1, seed=seed).result(SECONDS).images

    threads = [threading.Thread(target=work, args=(seed,)) for seed in expected]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[seed], images) for seed, images in expected.items())


def test_a_copy_of_the_weights_is_drawn_with():
    unet = random_unet(TINY_CLASSES)
    sampler = Sampler(unet, SCHEDULE, backend="native", determinism="bitwise")
    expected = sampler.sample(1, steps=2, labels=0).images
    with Engine(sampler) as engine:
        with torch.no_grad():
            for p in unet.parameters():
                p.add_(1.0)
        assert torch.equal(engine.submit(1, steps=2, labels=0).result(SECONDS).images, expected)
        assert not torch.equal(sampler.sample(1, steps=2, labels=0).images, expected)


def test_eager_runs_any_network():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3, padding=1)

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.conv(x) * t.view(-1, 1, 1, 1) / 100

    sampler = Sampler(Net(), SCHEDULE, shape=(1, 8, 8))
    with Engine(sampler) as engine:
        jobs = [engine.submit(2, steps=steps, seed=steps) for steps in (3, 5)]
        for steps, job in zip((3, 5), jobs, strict=True):
            expected = sampler.sample(2, steps=steps, seed=steps).images
            torch.testing.assert_close(job.result(SECONDS).images, expected, atol=1e-4, rtol=0)


# Scheduling -----------------------------------------------------------------------------------------------------------


def test_a_short_job_overtakes_a_long_one(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    long = engine.submit(1, solver="ddpm", steps=100, labels=1)
    gate.reached()
    short = engine.submit(1, steps=2, labels=1)
    assert (long.state, short.state) == ("running", "waiting")
    assert 0.0 < short.eta_s < long.eta_s
    gate.open(30)
    short.result(SECONDS)
    assert not long.done()
    gate.open()
    assert long.result(SECONDS).nfe == 100


def test_priority_comes_first(engine, monkeypatch):
    gate, ended = Gate(engine, monkeypatch), []
    engine._curve = Curve(((1, 0.01), (2, 0.02)))  # one row at a time
    first = engine.submit(1, steps=2, labels=1)
    gate.reached()
    for name, priority in (("low", -5), ("high", 5)):
        job = engine.submit(1, steps=5, labels=1, priority=priority, request_id=name)
        job.add_done_callback(lambda job: ended.append(job.id))
    gate.open()
    first.result(SECONDS)
    assert engine.drain(SECONDS)
    assert ended == ["high", "low"]


def test_max_rows_bounds_a_step(sampler, monkeypatch):
    with Engine(sampler, max_rows=3, max_queue_s=1e6) as engine:
        gate = Gate(engine, monkeypatch)
        gate.open()
        engine.submit(10, steps=2, labels=1).result(SECONDS)
        engine.submit(5, steps=2, labels=1, guidance=2.0).result(SECONDS)
        assert max(gate.taken) == 3
        assert gate.taken[-1] == 1  # a guided image has two rows
        assert engine.stats().step_rows == 2


def test_a_full_queue_refuses(sampler, monkeypatch):
    with Engine(sampler, max_queue_s=2.0) as engine:
        gate = Gate(engine, monkeypatch)
        engine._curve = Curve(((1, 0.1),))
        first = engine.submit(1, steps=50, labels=1)  # longer than the limit, but nothing waits
        gate.reached()  # its first step counts as taken
        with pytest.raises(QueueFull, match=r"4\.9 s of work are queued, and 0\.5 s more would exceed 2 s") as refused:
            engine.submit(1, steps=5, labels=1)
        assert refused.value.retry_after_s == pytest.approx(3.4)
        assert engine.stats().refused == 1
        assert first.cancel()
        gate.open()


def test_deadlines(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    engine._curve = Curve(((1, 0.1),))
    with pytest.raises(DeadlineImpossible, match=r"deadline_s=1 cannot be kept: .* after about 2 s, 0 s of which"):
        engine.submit(1, steps=20, labels=1, deadline_s=1.0)
    kept = engine.submit(1, steps=8, labels=1, deadline_s=50.0)
    gate.reached()
    with pytest.raises(DeadlineImpossible):
        engine.submit(1, steps=2, labels=1, deadline_s=0.1)
    missed = engine.submit(1, steps=2, labels=1, deadline_s=0.5)
    time.sleep(0.6)
    gate.open()
    with pytest.raises(DeadlineMissed, match="not finished before its deadline"):
        missed.result(SECONDS)
    assert missed.state == "failed"
    kept.result(SECONDS)
    assert engine.stats().refused == 2


def test_degrading_needs_measurements(shared):
    with pytest.raises(InvalidArgument, match="on_deadline='degrade' needs measurements of this model"):
        shared.submit(1, labels=1, deadline_s=9.0, on_deadline="degrade")


def test_degrading_takes_the_best_setting_that_fits(monkeypatch):
    sampler = Sampler.from_pretrained("fashion-mnist", determinism="bitwise")
    with Engine(sampler, max_queue_s=1e6) as engine:
        engine._curve = Curve(((1, 1.0),))
        kept = engine.submit(1, solver="ddpm", steps=60, labels=9, deadline_s=600.0, on_deadline="degrade")
        assert kept.eta_s > 0.0
        assert kept.cancel()
        end = time.monotonic() + SECONDS
        while engine.stats().waiting + engine.stats().running and time.monotonic() < end:
            time.sleep(0.01)
        engine._curve = Curve(((1, 1.0),))
        job = engine.submit(1, solver="ddpm", steps=1000, labels=9, deadline_s=30.0, on_deadline="degrade")
        rows = len(job.result(SECONDS).table)
        assert rows in [p.rows for p in sampler.measurements().at(1.0) if p.rows <= 30]
        with pytest.raises(DeadlineImpossible, match="the shortest measured setting takes too long"):
            engine.submit(16, labels=9, steps=500, deadline_s=0.9, on_deadline="degrade")


# Outcomes -------------------------------------------------------------------------------------------------------------


def test_a_cancelled_job_costs_nothing_at_once(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    job = engine.submit(4, steps=50, labels=1)
    gate.reached()
    assert engine.stats().queued_s > 0.0
    job.cancel()
    assert engine.stats().queued_s == 0.0
    gate.open()


def test_cancelled_images_leave_before_the_next_step(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    job = engine.submit(4, steps=50, labels=1)
    gate.reached()
    other = engine.submit(1, steps=3, labels=1)
    assert engine.stats().images == 4
    assert job.cancel()
    assert not job.cancel()
    with pytest.raises(Cancelled, match=f"job {job.id} was cancelled"):
        job.result(0)
    gate.open(1)  # the step that was about to be taken
    gate.reached()
    assert engine.stats().images == 1
    gate.open()
    other.result(SECONDS)
    assert gate.taken == [4, 1, 1, 1]
    assert not other.cancel()
    assert (engine.stats().cancelled, engine.stats().finished) == (1, 1)
    assert len(engine._stepper.slots.free) == len(engine._stepper.slots.state.x)


def race(engine: Engine, times: int) -> None:
    """Cancel jobs about when they are finished: each has one outcome, which everyone sees."""
    outcomes: dict[str, int] = {"finished": 0, "cancelled": 0}
    for i in range(times):
        seen: list[str] = []
        job = engine.submit(1, steps=1, labels=1, seed=i)
        job.add_done_callback(lambda job, seen=seen: seen.append(job.state))
        if i % 3 == 0:
            job._changed.acquire()
            job._changed.wait_for(lambda job=job: job._running or job._done, SECONDS)
            job._changed.release()
        elif i % 3 == 1:
            time.sleep(0.0005 * (i % 7))
        cancelled = job.cancel()
        try:
            assert job.result(SECONDS).images.shape == (1, 3, 8, 8)
            outcome = "finished"
        except Cancelled:
            outcome = "cancelled"
        assert cancelled == (outcome == "cancelled")
        assert job.state == outcome
        job.add_done_callback(lambda job, seen=seen: seen.append(job.state))
        end = time.monotonic() + SECONDS  # the first function is called right after the outcome can be seen
        while len(seen) < 2 and time.monotonic() < end:
            time.sleep(0.0001)
        assert seen == [outcome] * 2
        outcomes[outcome] += 1
    end = time.monotonic() + SECONDS
    while engine.stats().waiting + engine.stats().running and time.monotonic() < end:
        time.sleep(0.01)
    assert len(engine._stepper.slots.free) == len(engine._stepper.slots.state.x)
    assert min(outcomes.values()) > times // 100, outcomes
    assert (engine.stats().finished, engine.stats().cancelled) == (outcomes["finished"], outcomes["cancelled"])


def test_races_of_cancel_and_completion(engine):
    race(engine, 500)


@pytest.mark.slow
def test_ten_thousand_races_of_cancel_and_completion(engine):
    race(engine, 10_000)


def test_jobs_that_no_step_could_run_are_refused(sampler):
    """A number that a step cannot use ends its own job only, before it is taken."""
    with Engine(sampler, max_steps=5) as engine:
        for guidance in (1e39, 1e300, -1e300, [1.0, 1e300]):
            with pytest.raises(InvalidArgument, match=r"guidance=.*fits float32"):
                engine.submit(2, steps=2, labels=1, guidance=guidance)
        with pytest.raises(InvalidArgument, match="6 rows of ddim: this Engine runs at most 5"):
            engine.submit(1, steps=6, labels=1)
        job = engine.submit(1, steps=5, labels=1)
        job.result(SECONDS)
        stats = engine.stats()
        assert (stats.rows, stats.steps) == (5, 5)
        assert 0.0 < stats.busy_s < SECONDS
        waited, ran = job.waited_s, job.ran_s
        assert waited >= 0.0
        assert ran > 0.0
        assert (job.waited_s, job.ran_s) == (waited, ran)
    with pytest.raises(InvalidArgument, match="max_steps=0"):
        Engine(sampler, max_steps=0)


def test_nan_in_one_image_ends_its_job_alone(sampler, shared):
    noise = torch.zeros(2, 3, 8, 8)
    noise[1] = torch.nan
    bad = shared.submit(2, steps=4, labels=1, noise=noise)
    good = shared.submit(2, steps=4, labels=1)
    with pytest.raises(NumericsError, match="1 of 2 images became NaN") as failed:
        bad.result(SECONDS)
    assert failed.value.images == (1,)
    assert torch.equal(good.result(SECONDS).images, sampler.sample(2, steps=4, labels=1).images)
    assert torch.equal(shared.submit(2, steps=4, labels=1).result(SECONDS).images, good.result().images)


def test_an_error_of_a_step_ends_all_jobs_by_name(sampler, monkeypatch, caplog):
    with Engine(sampler) as engine:
        gate = Gate(engine, monkeypatch)
        jobs = [engine.submit(1, steps=5, labels=1, request_id=name) for name in "ab"]
        gate.reached()
        thread = engine._thread
        monkeypatch.setattr(engine._stepper.slots, "retire", lambda slot: 1 / 0)
        monkeypatch.setattr(engine._stepper.slots, "rows_left", lambda slot: 0)
        gate.open()
        for job in jobs:
            with pytest.raises(BackendError, match=f"job {job.id} was ended, .* a step raised ZeroDivisionError"):
                job.result(SECONDS)
            assert job.state == "failed"
        thread.join(SECONDS)
        assert not thread.is_alive()
        with pytest.raises(EngineClosed, match="failed: a step raised ZeroDivisionError"):
            engine.submit(1, labels=1)
        assert engine.stats().failed == 2
        assert "a step of the engine failed" in caplog.text


def test_results_that_are_not_there_in_time(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    job = engine.submit(1, steps=2, labels=1, request_id="mine")
    with pytest.raises(JobTimeout, match=r"job mine was not finished within 0\.05 s; it goes on"):
        job.result(0.05)
    gate.open()
    assert job.result(SECONDS).images.shape == (1, 3, 8, 8)
    assert repr(job) == "Job(mine, finished)"


def test_functions_that_the_engine_calls_may_use_it_but_not_wait(engine, monkeypatch):
    gate, got = Gate(engine, monkeypatch), []

    def more(job: Any) -> None:
        other = engine.submit(1, steps=2, labels=1)
        for wait in (other.result, engine.drain):
            try:
                wait()
            except FastdiffError as e:
                got.append(e)
        assert job.result().nfe == 1
        got.append(other)

    job = engine.submit(1, steps=1, labels=1)
    job.add_done_callback(more)
    gate.open()
    job.result(SECONDS)
    end = time.monotonic() + SECONDS
    while len(got) < 3 and time.monotonic() < end:
        time.sleep(0.01)
    assert [type(e) for e in got[:2]] == [ReentrantCall] * 2
    assert got[2].result(SECONDS).nfe == 2


def test_an_engine_may_be_closed_by_a_function_that_it_calls(sampler):
    engine = Engine(sampler)
    job, other = engine.submit(1, steps=1, labels=1), engine.submit(1, steps=90, solver="ddpm", labels=1)
    job.add_done_callback(lambda job: engine.close())
    job.result(SECONDS)
    with pytest.raises(Cancelled):
        other.result(SECONDS)
    engine.close()


def test_callbacks_that_raise_are_logged(shared, caplog):
    job = shared.submit(1, steps=1, labels=1)
    job.result(SECONDS)
    job.add_done_callback(lambda job: 1 / 0)
    assert "ZeroDivisionError" in caplog.text
    assert shared.submit(1, steps=1, labels=1).result(SECONDS)


# The end --------------------------------------------------------------------------------------------------------------


def test_closing_cancels_jobs_and_leaves_no_thread(sampler, monkeypatch):
    before = set(threading.enumerate())
    engine = Engine(sampler)
    gate = Gate(engine, monkeypatch)
    jobs = [engine.submit(2, steps=50, labels=1) for _ in range(3)]
    gate.reached()
    gate.open(1)
    gate.open(1)
    engine.close()
    for job in jobs:
        with pytest.raises(Cancelled, match="its engine was closed"):
            job.result(0)
    assert set(threading.enumerate()) <= before
    with pytest.raises(EngineClosed, match="is closed"):
        engine.submit(1, labels=1)
    engine.close()
    assert engine.stats().cancelled == 3


def test_draining_finishes_what_there_is(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    job = engine.submit(1, steps=3, labels=1)
    gate.reached()
    assert not engine.drain(0.05)
    with pytest.raises(EngineClosed, match="is draining"):
        engine.submit(1, labels=1)
    gate.open()
    assert engine.drain(SECONDS)
    assert job.state == "finished"


def test_an_idle_engine_has_no_thread(sampler, monkeypatch):
    monkeypatch.setattr(serving, "LINGER_S", 0.05)
    with Engine(sampler) as engine:
        for _ in range(2):
            engine.submit(1, steps=1, labels=1).result(SECONDS)
            end = time.monotonic() + SECONDS
            while engine._thread is not None and time.monotonic() < end:
                time.sleep(0.01)
            assert not any(
                thread.name == "fastdiff engine" and thread.is_alive() for thread in [engine._thread] if thread
            )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_a_forked_child_is_refused(shared):
    shared.submit(1, steps=1, labels=1).result(SECONDS)
    child = os.fork()
    if child == 0:
        code = 1
        try:
            shared.submit(1, steps=1, labels=1)
        except EngineClosed:
            shared.close()
            code = 0
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert shared.submit(1, steps=1, labels=1).result(SECONDS)


def test_a_job_that_ended_holds_no_memory_of_the_engine(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)
    job = engine.submit(1, steps=1, labels=1)
    gate.reached()
    task = weakref.ref(next(iter(engine._tasks)))
    gate.open()
    job.result(SECONDS)
    engine.close()
    gc.collect()
    assert task() is None


# asyncio --------------------------------------------------------------------------------------------------------------


def test_tasks_wait_for_jobs(sampler, shared):
    async def work() -> list[Any]:
        return await asyncio.gather(*(shared.generate(2, steps=3, labels=1, seed=seed) for seed in range(4)))

    for seed, output in enumerate(asyncio.run(work())):
        assert torch.equal(output.images, sampler.sample(2, steps=3, labels=1, seed=seed).images)


def test_cancelling_a_task_cancels_its_job(engine, monkeypatch):
    gate = Gate(engine, monkeypatch)

    async def work() -> None:
        task = asyncio.create_task(engine.generate(1, steps=50, labels=1))
        await asyncio.to_thread(gate.reached)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        waiting = engine.submit(1, steps=2, labels=1)
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(waiting, 0.05)
        assert waiting.state == "waiting"  # several may wait for it
        gate.open()
        assert (await waiting).nfe == 2

    asyncio.run(work())
    assert engine.stats().cancelled == 1


def test_previews_come_with_each_row(sampler, shared):
    options: dict[str, Any] = {"steps": 6, "labels": 1, "guidance": 2.0}
    events = {event.row: event for event in sampler.stream(1, **options)}

    async def work() -> None:
        job = shared.submit(1, previews=2, **options)
        seen = [event async for event in job]
        assert [event.row for event in seen] == [1, 3]
        for event in seen:
            assert (event.rows, list(event.indices)) == (6, [0])
            assert torch.equal(event.x0, events[event.row].x0)
            assert torch.equal(event.x, events[event.row].x)
        assert (await job).nfe == 12

    asyncio.run(work())


def test_a_reader_who_is_slow_stops_nothing(shared, monkeypatch):
    monkeypatch.setattr("fastdiff.serving.job.MOST_EVENTS", 3)
    job = shared.submit(1, steps=10, labels=1, previews=9)
    job.result(SECONDS)
    assert job.previews_dropped == 6

    async def work() -> list[int]:
        return [event.row async for event in job]

    assert asyncio.run(work()) == [6, 7, 8]


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"deadline_s": 0}, "deadline_s=0: a positive number of seconds"),
        ({"deadline_s": float("nan")}, "deadline_s=nan"),
        ({"on_deadline": "late"}, "on_deadline='late'"),
        ({"priority": float("inf")}, "priority=inf"),
        ({"priority": "high"}, "priority='high'"),
        ({"previews": -1}, "previews=-1"),
        ({"previews": 1.5}, "previews=1.5"),
        ({"request_id": ""}, "request_id=''"),
        ({"request_id": "x" * 201}, "from 1 to 200 characters"),
        ({"request_id": 7}, "request_id=7"),
        ({"guide": lambda x0, i: x0.sum((1, 2, 3))}, "guide= cannot be given to an Engine: it would run"),
        ({"noise": lambda row, i: torch.zeros(1, 3, 8, 8)}, "noise= as a function cannot be given"),
        ({"batch_size": 4}, "batch_size= cannot be given to an Engine"),
        ({"callback": print}, "callback= cannot be given to an Engine"),
        ({"progress": True}, "progress= cannot be given"),
        ({"noise": torch.zeros(1, 3, 8, 4)}, "noise has shape"),
        (
            {"image": torch.zeros(1, 3, 8, 8), "mask": torch.eye(8), "steps": 90, "repaint": (1, 60)},
            "runs at most 4096",
        ),
        ({"size": 16}, "size=16x16: an Engine draws images of the network's own size, 8x8"),
        ({"labels": 9}, "label 9 is out of range"),
        ({"stepps": 3}, "has no option stepps"),
        ({"steps": 0}, "steps"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(shared, options, message):
    with pytest.raises(InvalidArgument, match=message):
        shared.submit(**{"labels": 1, **options})
    assert shared.stats().waiting == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_rows": 0}, "max_rows=0"),
        ({"max_queue_s": -1}, "max_queue_s=-1"),
        ({"backend": "eager"}, "backend='eager': a Sampler has its own"),
        ({"determinism": "seed"}, "determinism='seed': a Sampler has its own"),
        ({"variant": "ema"}, "variant='ema': a Sampler has its own"),
    ],
)
def test_engines_that_cannot_be_made(sampler, options, message):
    with pytest.raises(InvalidArgument, match=message):
        Engine(sampler, **options)


def test_backends_that_advance_whole_batches_are_refused():
    with pytest.raises(BackendError, match="backend 'compiled' advances whole batches only"):
        Engine(Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend="compiled"))
    with pytest.raises(FastdiffError):
        Engine("no such model")


def test_networks_without_a_size_are_refused():
    unet = random_unet(change(TINY_CLASSES, sample_size=None))
    with pytest.raises(InvalidArgument, match="no sample_size"):
        Engine(Sampler(unet, SCHEDULE, backend="native", determinism="bitwise"))


def test_public_names():
    assert fastdiff.Engine is Engine
    assert dataclasses.is_dataclass(serving.Stats)


def test_networks_with_a_condition_image_are_refused():
    unet = random_unet(change(TINY, in_channels=6, out_channels=3))
    with pytest.raises(InvalidArgument, match="a condition image of 3 channels, which an Engine does not give it yet"):
        Engine(Sampler(unet, backend="eager"))
