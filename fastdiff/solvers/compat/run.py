"""Options of a call with ``compat=``, which the code bases read."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from fastdiff.checks import shown, whole
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.ddpm import VARIANCE_TYPES
from fastdiff.solvers.keys import value_of
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.walk import Schedule

FROM_MODEL = "model"  # the value of clip that takes the model's own


@dataclasses.dataclass(frozen=True)
class CompatOptions:
    """Options of a run that repeats another code base's loop."""

    code_base: str  # one of `fastdiff.solvers.compat.CODE_BASES`
    solver: str
    schedule: Schedule
    prediction: str
    config: Mapping[str, Any]  # the model's scheduler configuration
    steps: int | None = None  # None is the solver's default
    eta: float = 0.0
    variance: str | None = None  # None is the model's
    order: int | None = None  # None is the code base's
    spacing: str | Sequence[float] | None = None  # in the code base's terms; None is its default
    clip: float | str | None = FROM_MODEL  # bound of x_0; None for none

    def one_of(self, name: str, value: Any, allowed: Sequence[Any]) -> Any:
        """Return ``value`` if the code base has it."""
        if not isinstance(value, (str, int, float, type(None))) or value not in allowed:
            has = ", ".join(map(str, allowed))
            raise InvalidArgument(
                f"compat={self.code_base!r} has no {name}={shown(value)} with {self.solver}; it has {has}"
            )
        return value

    def check_solver(self) -> None:
        """Raise `InvalidArgument` if the code base does not have the solver."""
        has = [name for name, solver in SOLVERS.items() if self.code_base in solver.code_bases]
        if self.solver not in has:
            raise InvalidArgument(
                f"compat={self.code_base!r} has no solver={self.solver!r}; it has {', '.join(has)} (leave compat out)"
            )

    def discrete(self) -> NoiseSchedule:
        """Return the schedule, which must be one of discrete timesteps."""
        if not isinstance(self.schedule, NoiseSchedule):
            raise InvalidArgument(f"compat={self.code_base!r} has no EDM networks; compat='diffusers' has")
        return self.schedule

    def count(self, T: int) -> int:
        """Return the number of steps, 1 to T."""
        n = self.default_steps() if self.steps is None else self.steps
        return whole("steps", n, 1, T, of="the schedule's timesteps")

    def default_steps(self) -> int:
        """Return the number of steps of a run that gives none."""
        return SOLVERS[self.solver].default_steps(self.schedule)

    def named_variance(self, allowed: Sequence[str]) -> str:
        """Return the variance that was given, else the model's; it must be one of ``allowed``."""
        named = value_of(self.config, "variance_type", "fixed_small")
        return self.one_of("variance", self.variance or VARIANCE_TYPES.get(named, named), allowed)
