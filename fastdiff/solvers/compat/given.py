"""Timesteps and noise levels that a caller gives in place of a spacing, and the schedulers that take them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastdiff import checks
from fastdiff.errors import InvalidArgument

# Schedulers whose set_timesteps takes timesteps, and those that take noise levels.
ANY_TIMESTEP = ("DDIMScheduler", "DDIMInverseScheduler")  # whose steps have a length, whatever timestep they start at
TAKES_TIMESTEPS = (
    "DDPMScheduler", "LCMScheduler", "TCDScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler",
    "EulerDiscreteScheduler", "HeunDiscreteScheduler", "CMStochasticIterativeScheduler",
    "FlowMatchEulerDiscreteScheduler",
)  # fmt: skip
# These take noise levels of a flow, without the end of the run.
TAKES_FLOW_SIGMAS = ("FlowMatchEulerDiscreteScheduler", "UniPCMultistepScheduler")
TAKES_SIGMAS = ("EulerDiscreteScheduler", *TAKES_FLOW_SIGMAS)


def given_levels(
    name: str, config: Mapping[str, Any], timesteps: Any, sigmas: Any
) -> tuple[NDArray[np.float64] | None, NDArray[np.float64] | None]:
    """Check the timesteps or the noise levels of a run that were given in place of a spacing."""
    both = timesteps is not None and sigmas is not None
    if both and name != "FlowMatchEulerDiscreteScheduler":
        raise InvalidArgument("timesteps and sigmas exclude each other: give one of them")
    times = levels = None
    if timesteps is not None:
        if name not in (*TAKES_TIMESTEPS, *ANY_TIMESTEP):
            raise InvalidArgument(f"{name} takes no timesteps=, as in diffusers; {', '.join(TAKES_TIMESTEPS)} do")
        spaced = [key for key in config if key.startswith("use_") and key.endswith(("_sigmas", "_lambdas"))]
        spaced = [] if name == "FlowMatchEulerDiscreteScheduler" else spaced
        if any(config[key] for key in spaced) or (
            config.get("timestep_type") == "continuous" and config.get("prediction_type") == "v_prediction"
        ):
            raise InvalidArgument(
                f"timesteps= does not go with {', '.join(k for k in spaced if config[k]) or 'timestep_type=continuous'}"
                f" of {name}, which lays out noise levels"
            )
        times = _falling("timesteps", timesteps, 0.0)
    if sigmas is not None:
        if name not in TAKES_SIGMAS:
            raise InvalidArgument(f"{name} takes no sigmas=, as in diffusers; {', '.join(TAKES_SIGMAS)} do")
        if name in TAKES_FLOW_SIGMAS:
            return times, _flow_sigmas(name, config, times, sigmas)
        listed = checks.items("sigmas", sigmas, 1 << 20, need="a list of falling numbers")
        # A last step may end at the level where it starts, as diffusers' own lists do.
        ends = listed[-1:] if len(listed) > 1 and listed[-1] == listed[-2] else []
        falling = [*_falling("sigmas", listed[: len(listed) - len(ends)], 0.0), *ends]
        levels = np.array(falling, dtype=np.float32).astype(np.float64)
        if len(levels) < 2 or levels[-2] <= 0.0:
            raise InvalidArgument("sigmas: at least one positive noise level and the run's end, as 0, are needed")
    return times, levels


def _flow_sigmas(
    name: str, config: Mapping[str, Any], times: NDArray[np.float64] | None, sigmas: Any
) -> NDArray[np.float64]:
    """Check the noise levels of a flow that were given in place of a spacing."""
    if name != "FlowMatchEulerDiscreteScheduler" and not config.get("use_flow_sigmas"):
        raise InvalidArgument(f"{name} takes sigmas= with use_flow_sigmas=True alone, as in diffusers")
    levels = _falling("sigmas", sigmas, 0.0)
    if levels[0] > 1.0 or levels[-1] <= 0.0:
        raise InvalidArgument(f"sigmas {levels[0]:g} .. {levels[-1]:g}: those of a flow lie above 0, at most at 1")
    if times is not None and len(times) != len(levels):
        raise InvalidArgument(f"{len(times)} timesteps and {len(levels)} sigmas: as many of both are needed")
    return levels


def _falling(name: str, values: Any, low: float) -> NDArray[np.float64]:
    """Return a list of falling numbers, at least ``low``, as an array."""
    listed = checks.items(name, values, 1 << 20, need="a list of falling numbers")
    numbers = [checks.number(f"{name}[{i}]", v, low) for i, v in enumerate(listed)]
    if not numbers:
        raise InvalidArgument(f"{name} is empty; at least one number is needed")
    for a, b in itertools.pairwise(numbers):
        if a <= b:
            raise InvalidArgument(f"{name} must fall, in descending order, got {a:g} before {b:g}")
    return np.array(numbers, dtype=np.float64)
