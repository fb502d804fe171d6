"""Values that are wrong, or nearly right, in as many ways as are known: the corpus of the fuzzers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import torch


class Hostile:
    """An object whose comparison, truth and length fail, as those of some array types do."""

    def __eq__(self, other: object) -> bool:
        raise RuntimeError("not comparable")

    __hash__ = None  # type: ignore[assignment]

    def __bool__(self) -> bool:
        raise RuntimeError("neither true nor false")

    def __len__(self) -> int:
        raise RuntimeError("no length")

    def __repr__(self) -> str:
        return "<hostile>"


class Endless:
    """An iterable that never ends."""

    def __iter__(self) -> Iterator[float]:
        while True:
            yield 1.0


# What JSON can hold; a file of a model may have any of them in place of any value.
JSON: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 50, 999, 2**31, 2**63, 2**64, -(2**63), 10**400, -(10**400), 0.0, -0.0, 0.5,
    1.0, 2.0, -1.0, 1.5, 1e-12, 1e-300, 5e-324, 1e12, 1e300, -1e300, math.nan, math.inf, -math.inf, "", "2", "0.5",
    "x", "nan", "None", "true", "linear", "leading", "sigma_min", "epsilon", "a" * 100_000, "\x1b[31m\n", "\ud800", [],
    [[]], [0], [1.0], [2, 1], [0.5, 0.25], [0.1] * 4, ["x"], [None], [True], [math.nan], [1e300], [10**400], {},
    {"a": 1}, {"": None}, [{}], [1, [2]],
]  # fmt: skip

# What a program can pass besides.
OBJECTS: list[Any] = [
    (), (0,), (1, 2), (0.5, 0.9), (2, 2), b"", b"x", 1j, Decimal("0.5"), Decimal("NaN"), Fraction(1, 2), Fraction(2),
    object(), object, len, lambda *_: None, Hostile(), Endless(), range(0), range(3, 0, -1), range(10**12), {1, 2},
    frozenset(), np.int8(2), np.uint64(2**63), np.int64(-1), np.float16(0.5), np.float32(0.5), np.float32("nan"),
    np.float64(1e300), np.bool_(True), np.str_("leading"), np.complex64(1), np.datetime64("2020"), np.array(2),
    np.array(0.5), np.array([]), np.array([2, 1]), np.array([0.5, 0.25]), np.zeros((2, 2)), np.array(["x"]),
    np.array([None]), np.zeros((0, 3)), torch.tensor(2), torch.tensor(0.5), torch.tensor([2, 1]), torch.zeros(2, 2),
    torch.zeros(0), torch.tensor(True), torch.zeros(1, 3, 8, 8), torch.full((1, 3, 8, 8), math.nan),
    torch.zeros(1, 3, 8, 8, dtype=torch.int64), torch.zeros(3, 8, 8, dtype=torch.complex64),
    torch.zeros(2, device="meta"), torch.zeros(3, 8, 8).to_sparse(), torch.float32, torch.device("cpu"),
    bytearray(b"x"), memoryview(b"x"), iter([2, 1]), Ellipsis, NotImplemented, type, Mapping,
]  # fmt: skip

VALUES = JSON + OBJECTS


def shown(value: object) -> str:
    """Describe a value in a failure's message."""
    try:
        return f"{type(value).__name__} {repr(value)[:60]!r}"
    except ValueError:  # repr of an integer of more than 4300 digits
        return type(value).__name__
