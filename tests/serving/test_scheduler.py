"""The choice of the images that take a step, and what follows from it over many steps of made-up time."""

from __future__ import annotations

import dataclasses
import random
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.serving.scheduler import AGEING_S, TOGETHER, Curve, Load, Want, due, pick

FLAT = Curve(((1, 0.010), (2, 0.020), (4, 0.040), (8, 0.080)))  # batching gains nothing
STEEP = Curve(((1, 0.010), (2, 0.012), (4, 0.014), (8, 0.016), (16, 0.031)))


def load(key: str, images: int = 1, *, due: float = 1.0, served: float = 0.0, width: int = 1, begun: int = 0) -> Load:
    wants = [Want(f"{key}{i}", width, i < begun) for i in range(images)]
    return Load(key, 0.0, due, served, wants, images * width)


@pytest.mark.parametrize(
    ("curve", "cap", "together"),
    [
        (FLAT, 1, TOGETHER),
        (STEEP, 8, 8),
        (dataclasses.replace(STEEP, most=3), 3, 3),
        (dataclasses.replace(FLAT, most=2), 1, 2),
        (Curve(((1, 0.1),)), 1, TOGETHER),
        (dataclasses.replace(STEEP, scale=7.0), 8, 8),
    ],
)
def test_rows_are_added_while_they_pay_off(curve, cap, together):
    assert (curve.cap, curve.together) == (cap, together)


def test_the_curve_between_and_beyond_its_points():
    assert [FLAT.seconds(k) for k in (1, 3, 8)] == pytest.approx([0.010, 0.030, 0.080])
    assert STEEP.seconds(32) == pytest.approx(0.031 + 16 * (0.031 - 0.016) / 8)
    assert dataclasses.replace(STEEP, scale=2.0).seconds(3) == pytest.approx(0.026)
    assert Curve(((1, 0.1),)).seconds(5) == pytest.approx(0.5)
    assert FLAT.run_s(100, 4) == pytest.approx(1.0)


def test_the_job_that_is_due_first_goes_first():
    a, b, c = load("a", due=3.0), load("b", due=1.0), load("c", due=2.0)
    assert pick(0.0, [a, b, c], FLAT) == ["b0"]
    assert pick(0.0, [a, b, c], STEEP) == ["b0", "c0", "a0"]


def test_the_images_of_one_job_advance_together():
    assert pick(0.0, [load("a", 20), load("b", 1, due=2.0)], FLAT) == [f"a{i}" for i in range(TOGETHER)]
    assert pick(0.0, [load("a", 3), load("b", 20, due=2.0)], FLAT) == ["a0", "a1", "a2"]
    assert len(pick(0.0, [load("a", 3), load("b", 20, due=2.0)], STEEP)) == 8


def test_a_guided_image_counts_two_rows():
    assert pick(0.0, [load("a", 20, width=2)], FLAT) == [f"a{i}" for i in range(TOGETHER // 2)]
    assert pick(0.0, [load("a", 20, width=2)], dataclasses.replace(FLAT, most=1)) == ["a0"]  # one image at least
    assert pick(0.0, [load("a", 7), load("b", 1, due=2.0, width=2)], STEEP) == [f"a{i}" for i in range(7)]


def test_images_begin_only_where_there_is_room():
    jobs = [load("a", 4, begun=1), load("b", 2, due=2.0, begun=2), load("c", due=3.0)]
    assert pick(0.0, jobs, STEEP, free=0) == ["a0", "b0", "b1"]
    assert pick(0.0, jobs, STEEP, free=1) == ["a0", "a1", "b0", "b1"]
    assert pick(0.0, [load("a"), load("b", due=2.0, begun=1)], FLAT, free=0) == ["b0"]
    assert pick(0.0, [], FLAT) == []


def test_a_job_that_waits_for_long_goes_before_all_others():
    late = load("late", due=1e9, served=10.0)
    urgent = load("urgent", due=10.1, served=10.0 + AGEING_S)
    assert pick(10.0 + AGEING_S - 0.001, [late, urgent], FLAT) == ["urgent0"]
    assert pick(10.0 + AGEING_S, [late, urgent], FLAT) == ["late0"]


def test_when_jobs_are_due():
    assert due(5.0, 1.0, None, 0.0) == pytest.approx(8.05)
    assert due(5.0, 1.0, 6.0, 0.0) == 6.0
    assert due(5.0, 1.0, 6.0, 2.0) == 4.0
    assert due(5.0, 0.1, None, 0.0) < due(5.0, 1.0, None, 0.0) < due(5.0, 1.0, None, -1.0)


@given(
    jobs=st.lists(
        st.tuples(st.integers(1, 12), st.floats(0, 9), st.floats(0, 9), st.integers(1, 2), st.integers(0, 12)),
        max_size=6,
    ),
    curve=st.sampled_from([FLAT, STEEP, dataclasses.replace(STEEP, most=3), dataclasses.replace(FLAT, most=1)]),
    free=st.none() | st.integers(0, 9),
    now=st.floats(0, 20),
)
def test_what_holds_for_every_choice(jobs, curve, free, now):
    loads = [
        load(str(i), n, due=when, served=served, width=width, begun=min(begun, n))
        for i, (n, when, served, width, begun) in enumerate(jobs)
    ]
    chosen = pick(now, loads, curve, free)
    wants = {want.image: want for job in loads for want in job.images}
    assert len(set(chosen)) == len(chosen)
    assert sum(wants[image].rows for image in chosen[1:]) + 1 <= max(curve.together, 1)
    assert free is None or sum(not wants[image].begun for image in chosen) <= free
    possible = [want for want in wants.values() if want.begun or free != 0]
    assert bool(chosen) == bool(possible)


# Simulation -----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Simulated:
    """A job of a trace: ``left`` rows of each of its images."""

    key: int
    arrived: float
    steps: int
    n: int
    width: int
    left: list[int] = dataclasses.field(default_factory=list)
    served: float = 0.0
    ended: float = 0.0
    longest_wait: float = 0.0


def simulate(jobs: list[Simulated], curve: Curve, first_come: bool = False) -> None:
    """Run a trace with `pick`, or one job after the other."""
    now, present, coming = 0.0, [], sorted(jobs, key=lambda j: j.arrived)
    while present or coming:
        while coming and coming[0].arrived <= now:
            job = coming.pop(0)
            job.left, job.served = [job.steps] * job.n, job.arrived
            present.append(job)
        if not present:
            now = coming[0].arrived
            continue
        loads = []
        for job in present[:1] if first_come else present:
            run_s = curve.run_s(job.steps * job.n * job.width, job.n * job.width)
            wants = [Want((job.key, i), job.width, left < job.steps) for i, left in enumerate(job.left) if left]
            wants.sort(key=lambda want: not want.begun)
            loads.append(
                Load(job.key, job.arrived, due(job.arrived, run_s, None, 0.0), job.served, wants, sum(job.left))
            )
        chosen = pick(now, loads, curve)
        by_key = {job.key: job for job in present}
        now += curve.seconds(sum(by_key[key].width for key, _ in chosen))
        for key in {key for key, _ in chosen}:
            job = by_key[key]
            job.longest_wait, job.served = max(job.longest_wait, now - job.served), now
        for key, i in chosen:
            by_key[key].left[i] -= 1
        for job in [job for job in present if not any(job.left)]:
            job.ended = now
            present.remove(job)


def trace(seed: int, load_of: float, curve: Curve, jobs: int = 80) -> list[Simulated]:
    """Return a mixed trace: n of 1, 4, 16, steps of 1 to 60, 30 % guided; at ``load_of`` the curve's throughput."""
    draw = random.Random(seed)
    made = [
        Simulated(i, 0.0, draw.choice((1, 3, 5, 12, 60)), draw.choice((1, 4, 16)), 2 if draw.random() < 0.3 else 1)
        for i in range(jobs)
    ]
    work = statistics.mean(j.steps * j.n * j.width * curve.row_s for j in made)
    now = 0.0
    for job in made:
        now += draw.expovariate(load_of / work)
        job.arrived = now
    return made


@pytest.mark.parametrize("curve", [FLAT, STEEP], ids=["flat", "steep"])
def test_small_jobs_do_not_wait_for_long_ones(curve):
    ratios = []
    for seed in range(3):
        worst = []
        for first_come in (False, True):
            jobs = trace(seed, 0.7, curve)
            simulate(jobs, curve, first_come)
            small = sorted(job.ended - job.arrived for job in jobs if job.steps * job.n <= 12)
            worst.append(small[int(0.99 * len(small))])
        ratios.append(worst[0] / worst[1])
    assert statistics.median(ratios) < 0.2, ratios


def test_every_job_takes_a_step_within_the_ageing_bound():
    """A long job competes with short ones that take all the time there is."""
    long = Simulated(0, 0.0, 250, 4, 1)
    short = [Simulated(i, 0.1 * i, 5, 1, 2) for i in range(1, 200)]  # each takes 0.1 s
    simulate([long, *short], FLAT)
    assert AGEING_S / 2 < long.longest_wait <= AGEING_S + 0.2
    assert statistics.median(job.ended - job.arrived for job in short[:100]) < 1.0
