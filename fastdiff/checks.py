"""Argument validators: numbers, booleans, one of a list of values, lists; and tables of them by name.

Each validator returns the value that it accepts. Otherwise it raises an error that names the argument, the value and
what is allowed.
"""

from __future__ import annotations

import itertools
import math
import numbers
import os
import reprlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from fastdiff.errors import FastdiffError, InvalidArgument

T = TypeVar("T")
Bound = float | None
Error = type[FastdiffError]
Check = Callable[..., Any]
"""Function (name, value, error=...) -> the value to use, which raises ``error`` if the value cannot be used."""

_SHORT = reprlib.Repr()
_SHORT.maxstring = _SHORT.maxother = _SHORT.maxlong = 160
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = _SHORT.maxset = _SHORT.maxfrozenset = 12


def shown(value: object) -> str:
    """Return ``repr(value)`` for a message: in one line, shortened, with its control characters escaped."""
    try:
        return " ".join(_SHORT.repr(value).split("\n"))
    except Exception:  # such as that of an integer with more than 4300 digits
        return f"<{type(value).__name__}>"


def check_all(values: Mapping[str, Any], table: Mapping[str, Check], error: Error = InvalidArgument) -> dict[str, Any]:
    """Return the values, each as its check in ``table`` returns it; names that are not in the table are left out."""
    return {name: table[name](name, value, error=error) for name, value in values.items() if name in table}


def optional(check: Check) -> Check:
    """Return a check that accepts None besides what ``check`` accepts."""

    def accept(name: str, value: Any, **options: Any) -> Any:
        return None if value is None else check(name, value, **options)

    return accept


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
    raise error(f"{name}={shown(value)}: {needed} is needed")


def number(
    name: str,
    value: Any,
    low: Bound = None,
    high: Bound = None,
    *,
    above: Bound = None,
    need: str = "",
    error: Error = InvalidArgument,
) -> float:
    """Return ``value`` as a float, or raise ``error`` if it is not finite, from ``low`` to ``high`` and > ``above``.

    ``need`` replaces the description of what is needed in the message.
    """
    within = is_number(value) and (low is None or value >= low) and (high is None or value <= high)
    if within and (above is None or value > above):
        return float(value)
    kind = "a number" if above is None else f"a number above {_text(above)}"
    raise error(f"{name}={shown(value)}: {need or _needed(kind, low, high)} is needed")


def boolean(name: str, value: Any, *, error: Error = InvalidArgument) -> bool:
    """Return ``value`` as a bool, or raise ``error`` if it is neither True nor False. NumPy's booleans are accepted."""
    if isinstance(value, bool) or (type(value).__module__ == "numpy" and type(value).__name__ in ("bool", "bool_")):
        return bool(value)
    raise error(f"{name}={shown(value)}: True or False is needed")


def text(name: str, value: Any, *, error: Error = InvalidArgument) -> str:
    """Return ``value``, or raise ``error`` if it is no string."""
    if isinstance(value, str):
        return value
    raise error(f"{name}={shown(value)}: a text is needed")


def instance(name: str, value: Any, of: type[T], hint: str = "", *, error: Error = InvalidArgument) -> T:
    """Return ``value``, or raise ``error`` if it is no instance of the class; ``hint`` says how to get one."""
    if isinstance(value, of):
        return value
    raise error(f"{name}={shown(value)}: a fastdiff.{of.__name__} is needed" + (f"; {hint}" if hint else ""))


def from_environment(name: str, default: int | None = None, environment: Mapping[str, str] = os.environ) -> int:
    """Return the whole number that a launcher put into the environment, or raise `InvalidArgument`."""
    value = environment.get(name)
    if value is None and default is not None:
        return default
    if value is None:
        raise InvalidArgument(f"{name} is not set in the environment, but its companion is; the launcher sets both")
    if not value.isdecimal() or len(value) > 9:
        raise InvalidArgument(f"{name}={shown(value)} in the environment: a whole number is needed")
    return int(value)


def items(name: str, value: Any, most: int, *, need: str = "a list", error: Error = InvalidArgument) -> list[Any]:
    """Return the entries of a list, tuple, array, tensor or other iterable as a list of at most ``most``.

    Texts, bytes, sets and mappings are refused, as they are no lists; ``need`` describes what is needed.
    """
    given = value
    if hasattr(value, "tolist") and hasattr(value, "ndim"):  # an array or a tensor, whose entries become Python's
        given = _entries(value, most)
    if given is None or isinstance(given, (str, bytes, bytearray, memoryview, Mapping, set, frozenset, type)):
        raise error(f"{name}={shown(value)}: {need} is needed")
    try:
        taken = list(itertools.islice(given, most + 1)) if isinstance(given, Iterable) else None
    except Exception:  # whatever the caller's iterator raises
        taken = None
    if taken is None:
        raise error(f"{name}={shown(value)}: {need} is needed")
    if len(taken) > most:
        raise error(f"{name} has more than {most} entries; {need} of at most {most} is needed")
    return taken


def _entries(array: Any, most: int) -> Any:
    """Return the entries of an array or a tensor as a list; None without a dimension, or data that can be read."""
    try:
        return array[: most + 1].tolist() if array.ndim else None
    except Exception:  # tensors on the device "meta", sparse ones
        return None


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
    raise error(f"{name}={shown(value)} is unknown; allowed: {', '.join(map(str, allowed))}{also}")


def _needed(kind: str, low: float | None, high: float | None) -> str:
    if low is None:
        return kind if high is None else f"{kind} of at most {_text(high)}"
    return f"{kind} of at least {_text(low)}" if high is None else f"{kind} from {_text(low)} to {_text(high)}"


def _text(bound: float) -> str:
    if isinstance(bound, int):
        power = bound.bit_length() - 1
        return f"2**{power}" if power > 53 and bound == 1 << power else str(bound)
    return f"{bound:g}"  # which would write the integer 1048576 as 1.04858e+06
