"""Argument validators: whole numbers, real numbers, and one of a list of values.

Each validator returns the value that it accepts. Otherwise it raises an error that names the argument, the value and
what is allowed.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Collection
from typing import Any

from fastdiff.errors import FastdiffError, InvalidArgument

Bound = float | None
Error = type[FastdiffError]


def is_whole(value: object) -> bool:
    """Return whether ``value`` is an integer. NumPy's integers are; True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value: object) -> bool:
    """Return whether ``value`` is a real number that is finite as a float. NumPy's are; True and False are not."""
    if not isinstance(value, numbers.Real) or isinstance(value, bool):
        return False
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond the range of float
        return False


def whole(
    name: str,
    value: Any,
    low: int | None = None,
    high: int | None = None,
    *,
    but: str = "",
    of: str = "",
    error: Error = InvalidArgument,
) -> int:
    """Return ``value`` as an int, or raise ``error`` if it is no integer from ``low`` to ``high``.

    For the message, ``but`` describes what the caller accepts besides integers, such as "None", and ``of`` what the
    bound ``high`` is, such as "the timesteps of the schedule".
    """
    if is_whole(value) and (low is None or value >= low) and (high is None or value <= high):
        return int(value)
    needed = _needed("a whole number", low, high) + (of and f", {of},") + (but and f", or {but},")
    raise error(f"{name}={value!r}: {needed} is needed")


def number(
    name: str, value: Any, low: Bound = None, high: Bound = None, *, above: Bound = None, error: Error = InvalidArgument
) -> float:
    """Return ``value`` as a float, or raise ``error`` if it is not finite, from ``low`` to ``high`` and > ``above``."""
    within = is_number(value) and (low is None or value >= low) and (high is None or value <= high)
    if within and (above is None or value > above):
        return float(value)
    kind = "a number" if above is None else f"a number above {_text(above)}"
    raise error(f"{name}={value!r}: {_needed(kind, low, high)} is needed")


def one_of(name: str, value: Any, allowed: Collection[Any], *, but: str = "", error: Error = InvalidArgument) -> Any:
    """Return ``value``, or raise ``error`` if it is none of the allowed strings, numbers, booleans or None.

    True and 1 are different values, as are False and 0. For the message, ``but`` describes what the caller accepts
    besides them, for example "a StepTable".
    """
    if isinstance(value, (str, int, float, type(None))):
        same_kind = (a for a in allowed if isinstance(a, bool) == isinstance(value, bool))
        if value in same_kind:
            return value
    also = f", or {but}" if but else ""
    raise error(f"{name}={value!r} is unknown; allowed: {', '.join(map(str, allowed))}{also}")


def _needed(kind: str, low: float | None, high: float | None) -> str:
    if low is None:
        return kind if high is None else f"{kind} of at most {_text(high)}"
    return f"{kind} of at least {_text(low)}" if high is None else f"{kind} from {_text(low)} to {_text(high)}"


def _text(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"  # :g would write the integer 1048576 as 1.04858e+06
