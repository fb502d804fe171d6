"""The argument validators: the values that they accept, the bounds, and the messages of their errors."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.checks import is_number, is_whole, number, one_of, whole
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument

INTEGER_TYPES = (int, np.int8, np.uint8, np.int16, np.int32, np.int64, np.uint64)
FLOAT_TYPES = (float, np.float16, np.float32, np.float64)
NO_NUMBERS = ("1", b"1", None, [1], (1,), {}, 1j, True, False, np.True_, np.array([1]), torch.tensor(1), Decimal(1))
NOT_FINITE = (math.nan, math.inf, -math.inf, np.float32("nan"), np.float64("inf"), 10**400)

small = st.integers(0, 100)  # what every type of INTEGER_TYPES holds
bounds = st.none() | st.integers(-200, 200)


@given(value=small, kind=st.sampled_from(INTEGER_TYPES))
def test_integers_of_every_type_are_whole(value, kind):
    assert is_whole(kind(value))
    checked = whole("n", kind(value))
    assert checked == value
    assert type(checked) is int


@given(value=st.floats(-1000, 1000), kind=st.sampled_from(FLOAT_TYPES))
def test_floats_of_every_type_are_numbers(value, kind):
    assert is_number(kind(value))
    assert not is_whole(kind(value))
    checked = number("x", kind(value))
    assert checked == kind(value)
    assert type(checked) is float
    with pytest.raises(InvalidArgument, match=r"^n=.*: a whole number is needed$"):
        whole("n", kind(value))


@given(value=small, kind=st.sampled_from(INTEGER_TYPES))
def test_integers_are_numbers(value, kind):
    assert type(number("x", kind(value))) is float
    assert number("x", kind(value)) == value


def test_fractions_are_numbers():
    assert number("x", Fraction(1, 4)) == 0.25
    assert whole("n", 10**30) == 10**30


@pytest.mark.parametrize("value", NO_NUMBERS, ids=repr)
def test_other_types_are_refused(value):
    assert not is_whole(value)
    assert not is_number(value)
    with pytest.raises(InvalidArgument, match="a whole number is needed"):
        whole("n", value)
    with pytest.raises(InvalidArgument, match="a number is needed"):
        number("x", value)


@pytest.mark.parametrize("value", NOT_FINITE, ids=lambda v: repr(v)[:20])
def test_numbers_without_a_finite_float_are_refused(value):
    assert not is_number(value)
    with pytest.raises(InvalidArgument, match=r"^x=.*: a number is needed$"):
        number("x", value)


@given(value=st.integers(-300, 300), low=bounds, high=bounds)
def test_bounds_of_whole_numbers_are_inclusive(value, low, high):
    if (low is None or low <= value) and (high is None or value <= high):
        assert whole("n", value, low, high) == value
        assert whole("n", np.int64(value), low, high) == value
    else:
        with pytest.raises(InvalidArgument, match=f"^n={value}: a whole number"):
            whole("n", value, low, high)


@given(value=st.integers(-300, 300), low=bounds, high=bounds, above=bounds)
def test_bounds_of_numbers(value, low, high, above):
    value /= 2
    inside = (low is None or low <= value) and (high is None or value <= high) and (above is None or value > above)
    if inside:
        assert number("x", value, low, high, above=above) == value
    else:
        with pytest.raises(InvalidArgument, match=f"^x={value}: a number"):
            number("x", value, low, high, above=above)


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lambda: whole("steps", 0, 1), "steps=0: a whole number of at least 1 is needed"),
        (lambda: whole("steps", "5"), "steps='5': a whole number is needed"),
        (lambda: whole("steps", 9, high=8), "steps=9: a whole number of at most 8 is needed"),
        (lambda: whole("steps", 9, 1, 8), "steps=9: a whole number from 1 to 8 is needed"),
        (lambda: whole("width", 0, 1, 1 << 20), "width=0: a whole number from 1 to 1048576 is needed"),
        (lambda: whole("seed", 1.5, 0, but="None"), "seed=1.5: a whole number of at least 0, or None, is needed"),
        (lambda: number("eta", -1, 0, 1), "eta=-1: a number from 0 to 1 is needed"),
        (lambda: number("eta", 2.5, 0.25, 1.5), "eta=2.5: a number from 0.25 to 1.5 is needed"),
        (lambda: number("eta", math.nan, low=0.0), "eta=nan: a number of at least 0 is needed"),
        (lambda: number("clip", 0.0, above=0), "clip=0.0: a number above 0 is needed"),
        (lambda: one_of("solver", "dimd", ("ddim", "ddpm")), "solver='dimd' is unknown; allowed: ddim, ddpm"),
        (
            lambda: one_of("solver", 3, ("ddim", None), but="a StepTable"),
            "solver=3 is unknown; allowed: ddim, None, or a StepTable",
        ),
    ],
)
def test_messages(check, message):
    with pytest.raises(InvalidArgument) as caught:
        check()
    assert str(caught.value) == message


@given(value=st.none() | st.booleans() | st.integers(-3, 3) | st.text(max_size=2))
def test_one_of_returns_an_allowed_value_itself(value):
    assert one_of("x", value, [value]) is value
    assert one_of("x", value, {"before": 1, value: 2}) is value
    with pytest.raises(InvalidArgument, match=r"^x=.* is unknown; allowed: before$"):
        one_of("x", value, ["before"])


@pytest.mark.parametrize(
    ("value", "allowed"),
    [(True, (1, 2)), (1, (True, False)), (0.0, (False,)), (["a"], ("a",)), (np.array(["a"]), ("a",)), ({}, (None,))],
    ids=repr,
)
def test_one_of_refuses_values_of_other_types(value, allowed):
    with pytest.raises(InvalidArgument, match="is unknown"):
        one_of("x", value, allowed)


@pytest.mark.parametrize("error", [ConfigError, CheckpointError])
def test_callers_choose_the_type_of_the_error(error):
    for check in (
        lambda: whole("n", 0, 1, error=error),
        lambda: number("x", "a", error=error),
        lambda: one_of("x", "a", ("b",), error=error),
    ):
        with pytest.raises(error) as caught:
            check()
        assert type(caught.value) is error
