"""Checks of arguments: whole numbers, real numbers, and one of a list.

Each returns the value that it accepts and raises `InvalidArgument` naming the argument, the value and what would work.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

from fastdiff.errors import InvalidArgument


def is_whole(value: object) -> bool:
    """Return whether ``value`` is an integer, NumPy's included; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether ``value`` is a finite real number, NumPy's included; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(
    name: str, value: Any, low: int | None = None, high: int | None = None, *, but: str = "", of: str = ""
) -> int:
    """Return ``value`` as an int.

    Args:
        name: The argument, as the caller wrote it.
        value: What was given for it.
        low: The least value that is allowed, if there is one.
        high: The largest value that is allowed, if there is one.
        but: What is allowed besides whole numbers, for the message; as "None".
        of: What the bound ``high`` is, for the message; as "the schedule's timesteps".

    Raises:
        InvalidArgument: If the value is no whole number from ``low`` to ``high``.
    """
    if is_whole(value) and (low is None or value >= low) and (high is None or value <= high):
        return int(value)
    raise InvalidArgument(
        f"{name}={value!r}: {_needed('a whole number', low, high)}{of and f', {of},'}{but and f', or {but},'} is needed"
    )


def number(
    name: str, value: Any, low: float | None = None, high: float | None = None, *, above: float | None = None
) -> float:
    """Return ``value`` as a float.

    Args:
        name: The argument, as the caller wrote it.
        value: What was given for it.
        low: The least value that is allowed, if there is one.
        high: The largest value that is allowed, if there is one.
        above: A bound that the value must exceed, if there is one.

    Raises:
        InvalidArgument: If the value is no finite number within the bounds.
    """
    within = is_number(value) and (low is None or value >= low) and (high is None or value <= high)
    if within and (above is None or value > above):
        return float(value)
    kind = "a number" if above is None else f"a number above {above:g}"
    raise InvalidArgument(f"{name}={value!r}: {_needed(kind, low, high)} is needed")


def one_of(name: str, value: Any, allowed: Collection[Any], *, but: str = "") -> Any:
    """Return ``value``.

    Args:
        name: The argument, as the caller wrote it.
        value: What was given for it.
        allowed: The values that are allowed.
        but: What is allowed besides them, for the message; as "a StepTable".

    Raises:
        InvalidArgument: If the value is none of ``allowed``.
    """
    if isinstance(value, (str, int, float, type(None))) and value in allowed:
        return value
    also = f", or {but}" if but else ""
    raise InvalidArgument(f"{name}={value!r} is unknown; allowed: {', '.join(map(str, allowed))}{also}")


def _needed(kind: str, low: float | None, high: float | None) -> str:
    least, most = (f"{bound:g}" if isinstance(bound, float) else str(bound) for bound in (low, high))
    if low is None:
        return kind if high is None else f"{kind} of at most {most}"
    return f"{kind} of at least {least}" if high is None else f"{kind} from {least} to {most}"
