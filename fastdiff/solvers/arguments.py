"""Checks of the solvers' arguments, each declared once by its name, and the decorator that applies them."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ParamSpec, TypeVar

from fastdiff.checks import Check, Error, boolean, number, one_of, shown, whole
from fastdiff.errors import FastdiffError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.churn import check_churn
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.flow import FlowSchedule
from fastdiff.solvers.prediction import PREDICTIONS
from fastdiff.solvers.spacing import check_spacing
from fastdiff.solvers.table import StepTable, check_clip, check_threshold
from fastdiff.solvers.ve import VESchedule
from fastdiff.solvers.walk import Walk

P = ParamSpec("P")
T = TypeVar("T")


def instance(*kinds: type) -> Check:
    """Return the check of an argument that must be an object of one of these classes."""

    def check(name: str, value: Any, *, error: Error = InvalidArgument) -> Any:
        if isinstance(value, kinds):
            return value
        raise error(f"{name}={shown(value)}: {' or '.join(kind.__name__ for kind in kinds)} is needed")

    return check


def check_order(value: Any, highest: int, *, name: str = "order", error: Error = InvalidArgument) -> int:
    """Return the order of a solver, a whole number from 1 to ``highest``."""
    try:
        return whole(name, value, 1, highest)
    except InvalidArgument:
        allowed = f"{', '.join(map(str, range(1, highest)))} or {highest}"
        raise error(f"{name}={shown(value)}: {allowed} is needed") from None


# Arguments of the functions of `fastdiff.solvers`. The others depend on the schedule or on each other, and the function
# that knows these checks them: steps, steps_offset, variance, order, original_steps, train_steps, iterations.
ARGUMENTS: Mapping[str, Check] = {
    "schedule": instance(NoiseSchedule, EDMSchedule, FlowSchedule, VESchedule),
    "table": instance(StepTable),
    "spacing": check_spacing,
    "prediction": functools.partial(one_of, allowed=PREDICTIONS),
    "clip": check_clip,
    "threshold": check_threshold,
    "final": functools.partial(one_of, allowed=("zero", "sigma_min")),
    "eta": functools.partial(number, low=0, need="0 or a positive number"),
    "churn": check_churn,
    "eps_from": functools.partial(one_of, allowed=("clipped", "output")),
    "set_alpha_to_one": boolean,
    "lower_order_final": boolean,
    "euler_at_final": boolean,
    "corrector": boolean,
    "timestep_scaling": functools.partial(number, above=0, need="a positive number"),
    "use_clipped_model_output": boolean,
}
SHARED = inspect.signature(Walk.of).parameters  # what ``**common`` of a solver may hold


def checked(function: Callable[P, T]) -> Callable[P, T]:
    """Check the arguments of a public function of the solvers by `ARGUMENTS` before it runs.

    Arithmetic that leaves the range of float64 on the way, as with extreme noise levels, is an `InvalidArgument` too.
    """
    signature = inspect.signature(function)
    own = signature.parameters

    def usable(given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
        for name, value in given.items():
            parameter = own.get(name, SHARED.get(name))
            if parameter is None:
                known = ", ".join(n for n in own if n != "common") + ", " + ", ".join(list(SHARED)[2:])
                raise InvalidArgument(f"{function.__name__} has no option {shown(name)}; allowed: {known}")
            # An eta of 1 by default is a share, which the function bounds by 1.
            own_check = (value is None and parameter.default is None) or (name == "eta" and parameter.default == 1.0)
            yield name, value if own_check or name not in ARGUMENTS else ARGUMENTS[name](name, value)

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> T:
        bound = signature.bind(*args, **kwargs)
        shared = bound.arguments.pop("common", {})
        given = dict(usable({**bound.arguments, **shared}))
        try:
            return function(**given)  # type: ignore[call-arg]  # bound above
        except FastdiffError:
            raise
        except (ArithmeticError, ValueError) as e:
            raise InvalidArgument(
                f"{function.__name__}: noise levels this extreme leave the range of float64 ({e})"
            ) from e

    return call
