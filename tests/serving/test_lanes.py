"""Turns of several engines on one processor: a function of their credit, a lock of threads, and real engines."""

from __future__ import annotations

import itertools
import os
import random
import threading
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff import Engine, NoiseSchedule, Sampler
from fastdiff.errors import DeadlineImpossible, EngineClosed, InvalidArgument
from fastdiff.serving import Lanes
from fastdiff.serving.scheduler import QUANTUM_S, Curve, shared_s, turn
from tests.support.served import until
from tests.support.unets import TINY, TINY_CLASSES, random_unet

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
SECONDS = 60


def simulate(step_s: dict[str, float], seconds: float, spread: float = 0.0, seed: int = 0) -> dict[str, list[float]]:
    """Let lanes that always have work take turns; return when each one's steps ended."""
    draw, now, order = random.Random(seed), 0.0, [(name, QUANTUM_S) for name in step_s]
    ended: dict[str, list[float]] = {name: [] for name in step_s}
    while now < seconds:
        order = turn(order)
        name, credit = order[0]
        took = step_s[name] * draw.uniform(1.0 - spread, 1.0 + spread)
        now += took
        ended[name].append(now)
        order[0] = (name, credit - took)
    return ended


def test_the_first_keeps_its_turn_while_it_has_credit():
    assert turn([("a", 0.005), ("b", QUANTUM_S)]) == [("a", 0.005), ("b", QUANTUM_S)]
    assert turn([("a", 0.0), ("b", QUANTUM_S)]) == [("b", QUANTUM_S), ("a", QUANTUM_S)]
    assert turn([("a", -0.05), ("b", QUANTUM_S)]) == [("b", QUANTUM_S), ("a", QUANTUM_S - 0.05)]
    assert turn([("a", -0.05)])[0][1] > 0.0  # alone, it goes on
    assert turn([]) == []


@given(
    step_s=st.lists(st.floats(0.0005, 0.3), min_size=1, max_size=5),
    spread=st.sampled_from([0.0, 0.5]),
    seed=st.integers(0, 5),
)
def test_lanes_get_equal_time_whatever_their_steps_take(step_s, spread, seed):
    lanes = {f"lane {i}": s for i, s in enumerate(step_s)}
    ended = simulate(lanes, 20.0, spread, seed)
    count = len(lanes)
    longest = max(step_s) * (1.0 + spread)
    for name in lanes:
        # No lane waits longer than its debt of one step, and all others' turns meanwhile.
        moments = [0.0, *ended[name]]
        gaps = [after - before for before, after in itertools.pairwise(moments)]
        assert max(gaps, default=0.0) <= (count + 1) * (longest + QUANTUM_S) * 2
    shares = {name: len(ended[name]) * step_s[i] for i, name in enumerate(lanes)} if not spread else {}
    if shares:
        assert max(shares.values()) - min(shares.values()) <= 2 * (longest + QUANTUM_S)


def test_short_steps_do_not_wait_for_many_long_ones():
    """Taking turns step by step would give the lane of 200 ms twenty times the time of the other."""
    ended = simulate({"long": 0.2, "short": 0.01}, 10.0)
    assert 0.4 < len(ended["short"]) * 0.01 / 10.0 < 0.6


def test_when_shared_work_is_done():
    assert shared_s(2.0, []) == 2.0
    assert shared_s(2.0, [0.5, 5.0]) == 4.5


class Worker(threading.Thread):
    """Takes turns of a lane; ``inside`` counts who does at the same time."""

    def __init__(self, lanes: Lanes, turns: int, inside: list[int]):
        super().__init__(daemon=True)
        self.lane, self.turns, self.inside, self.most = lanes.join(), turns, inside, 0

    def run(self) -> None:
        for k in range(self.turns):
            self.lane.take()
            self.inside.append(1)
            self.most = max(self.most, len(self.inside))
            self.inside.pop()
            if k % 7 == 6:
                self.lane.leave()
        self.lane.leave()
        self.lane.close()


def test_one_thread_at_a_time_has_the_turn():
    lanes, inside = Lanes(), []
    workers = [Worker(lanes, 200, inside) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(SECONDS)
    assert not any(worker.is_alive() for worker in workers)
    assert max(worker.most for worker in workers) == 1
    assert lanes._members == []
    assert lanes._round == []


def test_debts_are_forgotten_when_nobody_waits():
    lanes = Lanes()
    lane = lanes.join()
    lane.take()
    lane._since -= 100.0
    lane.leave()
    assert lane._debt == 0.0
    other = lanes.join()
    lane.take()
    lane._since -= 0.5
    waiting = threading.Thread(target=other.take, daemon=True)
    waiting.start()
    until(lambda: len(lanes._round) == 2)
    lane.leave()
    waiting.join(SECONDS)
    assert lane._debt < -0.4
    assert lanes._holder is other
    other.leave()
    assert lane._debt == 0.0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")
def test_lanes_of_another_process_are_refused():
    lanes = Lanes()
    lanes._process += 1
    with pytest.raises(EngineClosed, match="made in another process"):
        lanes.join()


@pytest.fixture(scope="module")
def samplers() -> list[Sampler]:
    return [Sampler(random_unet(config), SCHEDULE, backend="eager") for config in (TINY_CLASSES, TINY)]


@pytest.fixture
def engines(samplers: list[Sampler]) -> Iterator[list[Engine]]:
    lanes = Lanes()
    made = [Engine(sampler, max_queue_s=1e6, lanes=lanes) for sampler in samplers]
    yield made
    for engine in made:
        engine.close()


def test_engines_take_turns(samplers, engines):
    """No two steps run at the same time, and all images are right."""
    inside: list[int] = []
    most: list[int] = []
    for engine in engines:
        step = engine._stepper.slots.step

        def counted(*arguments, step=step):
            inside.append(1)
            most.append(len(inside))
            found = step(*arguments)
            inside.pop()
            return found

        engine._stepper.slots.step = counted
    calls = [{"labels": 1}, {}]
    jobs = [
        (sampler, call, seed, engine.submit(2, steps=6, seed=seed, **call))
        for seed in range(3)
        for sampler, engine, call in zip(samplers, engines, calls, strict=True)
    ]
    for sampler, call, seed, job in jobs:
        alone = sampler.sample(2, steps=6, seed=seed, **call)
        torch.testing.assert_close(job.result(SECONDS).images, alone.images, atol=2e-4, rtol=0)
    assert max(most) == 1
    assert len(most) >= 2 * 6


def test_an_engine_that_ends_gives_its_turn_up(engines):
    first, second = engines
    job = first.submit(1, solver="ddpm", steps=100, labels=1)
    other = second.submit(1, steps=5)
    first.close()
    assert other.result(SECONDS)
    assert job.state == "cancelled"
    monkey = second._stepper.slots
    monkey.retire = lambda slot: 1 / 0  # the step that ends the next job fails
    third = Engine(second.sampler, lanes=second._lane._lanes)
    failed = second.submit(1, steps=2)
    failed.add_done_callback(lambda job: None)
    with pytest.raises(Exception, match="ZeroDivisionError"):
        second.submit(1, steps=5).result(SECONDS)
    assert third.submit(1, steps=2).result(SECONDS)
    third.close()


def test_deadlines_count_the_turns_of_others(engines):
    first, second = engines
    for engine in engines:
        engine._curve = Curve(((1, 0.1),))
    second._lane.queued_s = 1e9  # as if there were so much work
    with pytest.raises(DeadlineImpossible, match="after about 2 s"):
        first.submit(1, steps=10, labels=1, deadline_s=1.5)
    second._lane.queued_s = 0.0
    assert first.submit(1, steps=10, labels=1, deadline_s=50.0).result(SECONDS)
    with pytest.raises(InvalidArgument, match=r"lanes=3: fastdiff\.serving\.Lanes, or None, is needed"):
        Engine(first.sampler, lanes=3)
