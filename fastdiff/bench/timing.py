"""Turns of several engines as ratios with an interval, and whether the machine was quiet enough to believe them.

Absolute times drift with everything that shares a machine, so nothing here judges one. Engines take turns; in every
round each engine's time is divided by the anchor's of the same round, and what holds for the ratio is what the rounds
agree on:

    r_k = seconds of the anchor / seconds of the engine, in round k            how many times as fast as the anchor
    ratio = median r_k,   [low, high] = the middle 95 % of the medians of 1000 resampled series

Series are resampled in blocks of neighbouring rounds (moving blocks: Künsch 1989, Annals of Statistics 17), as what
disturbs one round often disturbs the next.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
import statistics
import threading
import time
from collections.abc import Sequence

import numpy as np

SETTLED = 0.025  # the interval's half width below which two runs agree within 5 %
LEAST_ROUNDS = 7
RESAMPLED = 1000
LEAST_SHARE = 0.95  # of a processor's time that a busy thread gets on a quiet machine


@dataclasses.dataclass(frozen=True)
class Ratio:
    """How many times as fast as the anchor: the median over rounds, its 95 % interval, and how far it moved.

    moved: the later half's median over the earlier half's.
    """

    median: float
    low: float
    high: float
    moved: float
    rounds: int

    @property
    def uncertainty(self) -> float:
        """Half the interval's width: 0.01 is +-1 %."""
        return math.sqrt(self.high / self.low) - 1.0

    @property
    def settled(self) -> bool:
        """Whether another run would give the same within 5 %, as far as these rounds tell."""
        steady = abs(math.log(self.moved)) <= 2 * SETTLED
        return self.rounds >= LEAST_ROUNDS and self.uncertainty <= SETTLED and steady


def ratio(anchor: Sequence[float], engine: Sequence[float]) -> Ratio:
    """The ratio of two series of seconds, round by round; at least one round."""
    r = np.log(np.asarray(anchor, dtype=np.float64) / np.asarray(engine, dtype=np.float64))
    n = len(r)
    length = max(1, round(n ** (1 / 3)))
    # 1000 series, each of blocks that begin anywhere and go on in a circle, cut to n rounds.
    begin = np.random.default_rng(0).integers(n, size=(RESAMPLED, -(-n // length), 1))
    picked = r[(begin + np.arange(length)) % n].reshape(RESAMPLED, -1)[:, :n]
    low, high = np.quantile(np.median(picked, axis=1), [0.025, 0.975])
    half = n // 2
    moved = np.median(r[half:]) - np.median(r[:half]) if half else 0.0
    median = float(np.median(r))
    value, least, most, factor = (float(np.exp(v)) for v in (median, min(low, median), max(high, median), moved))
    return Ratio(value, least, most, factor, n)


def spread(seconds: Sequence[float]) -> float:
    """The interquartile range over the median."""
    if len(seconds) < 2:
        return 0.0
    first, _, third = statistics.quantiles(seconds, n=4, method="inclusive")
    return (third - first) / statistics.median(seconds)


def noise(ratios: dict[str, Ratio], shares: Sequence[float]) -> list[str]:
    """Every reason not to believe the ratios; empty on a machine that was quiet enough.

    shares: what `share` found before each round. A process that takes a constant part of the machine widens no
    interval, but it slows engines unequally (those that wait at barriers most), so it is looked for by itself.
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
    """The processor time that so many busy threads get over the time that they are busy: 1.0 on an idle machine."""
    block = bytes(1 << 20)
    shares: list[float] = []

    def busy() -> None:
        started, used = time.perf_counter(), time.thread_time()
        while time.perf_counter() - started < seconds:
            hashlib.sha256(block)  # without the interpreter's lock
        shares.append((time.thread_time() - used) / (time.perf_counter() - started))

    team = [threading.Thread(target=busy) for _ in range(threads)]
    for thread in team:
        thread.start()
    for thread in team:
        thread.join()
    return statistics.mean(shares)
