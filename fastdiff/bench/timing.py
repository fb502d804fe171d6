"""Timing in turns, ratios of the times with confidence intervals, and a check that the machine was quiet enough.

Absolute times drift with everything that shares a machine, so only ratios are judged. Contenders take turns, and in
every round k the anchor's time is divided by the contender's:

    r_k = seconds of the anchor / seconds of the contender, in round k         how many times as fast as the anchor
    ratio = median r_k,   [low, high] = the middle 95 % of the medians of 1000 resampled series

Series are resampled in blocks of neighbouring rounds (moving blocks: Künsch 1989, Annals of Statistics 17), because a
disturbance of one round often lasts into the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

K = TypeVar("K")

SETTLED = 0.025  # half width of the interval below which two runs agree within 5 %
LEAST_ROUNDS = 7
RESAMPLED = 1000
LEAST_SHARE = 0.95  # of a processor's time that a busy thread gets on a quiet machine


def mean_seconds(
    run: Callable[[], Any], seconds: float = 0.0, calls: int = 1, *, wait: Callable[[], Any] | None = None
) -> float:
    """Return the mean seconds of a call of ``run``, over at least ``calls`` calls that take at least ``seconds``.

    ``wait`` is called once, after the last call, to wait until a device has done its work.
    """
    started = time.perf_counter()
    done = 0
    while done < calls or time.perf_counter() - started < seconds:
        run()
        done += 1
    if wait is not None:
        wait()
    return (time.perf_counter() - started) / done


def in_turn(
    ways: Mapping[K, Callable[[], Any]], rounds: int, turn: Callable[[Callable[[], Any]], float] = mean_seconds
) -> dict[K, list[float]]:
    """Time several functions in rounds in which all take turns, after one call of each that is not timed.

    ``turn`` times one turn of a function, by default a single call. The result has the seconds of each in every round.
    """
    for run in ways.values():
        run()
    seconds: dict[K, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            seconds[name].append(turn(run))
    return seconds


@dataclasses.dataclass(frozen=True)
class Ratio:
    """Speed of a contender relative to the anchor, with a 95 % interval; 2.0 means twice as fast as the anchor."""

    median: float
    low: float
    high: float
    moved: float  # the median of the later half of the rounds over that of the earlier half
    rounds: int

    @property
    def uncertainty(self) -> float:
        """Half the relative width of the interval: 0.01 is +-1 %."""
        return math.sqrt(self.high / self.low) - 1.0

    @property
    def settled(self) -> bool:
        """Whether these rounds suggest that another run would agree within 5 %."""
        steady = abs(math.log(self.moved)) <= 2 * SETTLED
        return self.rounds >= LEAST_ROUNDS and self.uncertainty <= SETTLED and steady


def ratio(anchor: Sequence[float], contender: Sequence[float]) -> Ratio:
    """Compute the ratio of two series of seconds from at least one round."""
    r = np.log(np.asarray(anchor, dtype=np.float64) / np.asarray(contender, dtype=np.float64))
    n = len(r)
    length = max(1, round(n ** (1 / 3)))
    # 1000 series of n rounds, made of blocks that begin anywhere and wrap around at the end.
    begin = np.random.default_rng(0).integers(n, size=(RESAMPLED, -(-n // length), 1))
    picked = r[(begin + np.arange(length)) % n].reshape(RESAMPLED, -1)[:, :n]
    low, high = np.quantile(np.median(picked, axis=1), [0.025, 0.975])
    half = n // 2
    moved = np.median(r[half:]) - np.median(r[:half]) if half else 0.0
    median = float(np.median(r))
    value, least, most, factor = (float(np.exp(v)) for v in (median, min(low, median), max(high, median), moved))
    return Ratio(value, least, most, factor, n)


def spread(seconds: Sequence[float]) -> float:
    """Compute the interquartile range relative to the median."""
    if len(seconds) < 2:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return (third - first) / statistics.median(seconds)


def noise(ratios: dict[str, Ratio], shares: Sequence[float]) -> list[str]:
    """List the reasons not to trust the ratios (without the anchor's); none if the machine was quiet enough.

    ``shares`` are the values of `share` before each round: a process that takes a constant part of the machine widens
    no interval, but it slows contenders unequally (most those that wait at barriers), so it is checked apart.
    """
    reasons = []
    if shares and statistics.median(shares) < LEAST_SHARE:
        taken = 1.0 - statistics.median(shares)
        reasons.append(f"other processes took {taken:.0%} of the processors' time")
    for name, r in ratios.items():
        if r.rounds < LEAST_ROUNDS:
            reasons.append(f"{name}: {r.rounds} rounds only, at least {LEAST_ROUNDS} are needed")
        elif r.uncertainty > SETTLED:
            reasons.append(f"{name}: +-{r.uncertainty:.1%} after {r.rounds} rounds")
        elif not r.settled:
            reasons.append(f"{name}: the later rounds' ratio is {r.moved:.2f} times the earlier ones'")
    return reasons


def share(threads: int, seconds: float = 0.03) -> float:
    """Measure the share of processor time that this many busy threads get, 1.0 on an idle machine."""
    block = bytes(1 << 20)
    shares: list[float] = []

    def busy() -> None:
        started, used = time.perf_counter(), time.thread_time()
        while time.perf_counter() - started < seconds:
            hashlib.sha256(block)  # releases the interpreter's lock
        shares.append((time.thread_time() - used) / (time.perf_counter() - started))

    team = [threading.Thread(target=busy) for _ in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return statistics.mean(shares)
