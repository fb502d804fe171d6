"""A fuzzer: calls with one or several arguments replaced by values of the corpus must succeed or say what is wrong."""

from __future__ import annotations

import dataclasses
import random
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch

from fastdiff.errors import FastdiffError
from fastdiff.solvers import StepTable
from tests.fuzz.corpus import shown

MOST_SECONDS = 20  # of one call; the slowest that are accepted build tables of a thousand rows
PACKAGE = Path(__file__).resolve().parents[2] / "fastdiff"


@dataclasses.dataclass(frozen=True)
class Target:
    """A function of the public interface, the arguments that are varied, and the others."""

    name: str
    call: Callable[..., Any]  # with keyword arguments
    varied: Sequence[str]
    values: Sequence[Any]
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def single(self) -> Iterator[dict[str, Any]]:
        """Yield the arguments that replace one argument by one value, for all of them."""
        for name in self.varied:
            for value in self.values:
                yield {name: value}

    def several(self, choose: random.Random) -> dict[str, Any]:
        """Return arguments that replace two to four of them by values of the corpus."""
        names = choose.sample(list(self.varied), min(len(self.varied), choose.randint(2, 4)))
        return {name: choose.choice(self.values) for name in names}


def failure(target: Target, changed: Mapping[str, Any]) -> str | None:
    """Call a target; return what is wrong with its answer, or None."""
    started = time.perf_counter()
    try:
        with deadline(MOST_SECONDS):
            problem = unsound(target.call(**{**target.base, **changed}))
    except FastdiffError as e:
        problem = None
        if len(str(e)) > 4000 or any(ord(c) < 32 and c not in "\n\t" for c in str(e)):
            problem = f"a message of {len(str(e))} characters, or with control characters"
    except BaseException as e:
        frames = [f for f in traceback.extract_tb(e.__traceback__) if str(PACKAGE) in f.filename]
        where = f"{Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else "outside"
        problem = f"{type(e).__name__} ({where}): {str(e)[:120]}"
    if problem is None:
        return None
    arguments = ", ".join(f"{name}={shown(value)}" for name, value in changed.items())
    return f"{target.name}({arguments}): {problem} [{time.perf_counter() - started:.1f} s]"


def unsound(result: Any) -> str | None:
    """Return why a result is not what a call may answer: NaN, infinity or huge numbers."""
    if isinstance(result, StepTable):
        return None if np.isfinite(np.nan_to_num(result.coefficients, posinf=0.0)).all() else "a table with NaN"
    if isinstance(result, torch.Tensor) and result.is_floating_point() and not torch.isfinite(result).all():
        return "NaN or infinite values"
    return None


class deadline:  # noqa: N801  # used as a function
    """A limit of time for the statements of a with block."""

    def __init__(self, seconds: int):
        self.seconds = seconds

    def __enter__(self) -> None:
        def late(_: int, __: FrameType | None) -> None:
            raise TimeoutError(f"took more than {self.seconds} s")

        self.before = signal.signal(signal.SIGALRM, late)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, self.before)
