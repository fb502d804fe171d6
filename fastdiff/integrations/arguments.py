"""The arguments of each scheduler's methods in diffusers' order, and groups of schedulers that are alike."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fastdiff.checks import shown
from fastdiff.errors import InvalidArgument

# The arguments of each scheduler's step after (model_output, timestep, sample), in diffusers' order.
NOISY = ("generator", "return_dict")
CHURN = ("s_churn", "s_tmin", "s_tmax", "s_noise", *NOISY)
STEP_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    "DDIMScheduler": ("eta", "use_clipped_model_output", "generator", "variance_noise", "return_dict"),
    "TCDScheduler": ("eta", *NOISY),
    **dict.fromkeys(
        ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler"),
        ("generator", "variance_noise", "return_dict"),
    ),
    "EulerDiscreteScheduler": CHURN,
    "EDMEulerScheduler": CHURN,
    "FlowMatchEulerDiscreteScheduler": (*CHURN[:-1], "per_token_timesteps", "return_dict"),
    "FlowMatchHeunDiscreteScheduler": CHURN,
    "LMSDiscreteScheduler": ("order", "return_dict"),
    "DPMSolverSDEScheduler": ("return_dict", "s_noise"),
    **dict.fromkeys(
        ("PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler",
         "KDPM2DiscreteScheduler", "DDIMInverseScheduler"), ("return_dict",),
    ),
}  # fmt: skip
# The arguments of each scheduler's set_timesteps after (num_inference_steps, device).
SET_ARGUMENTS: Mapping[str, tuple[str, ...]] = {
    **dict.fromkeys(("DDPMScheduler", "CMStochasticIterativeScheduler"), ("timesteps",)),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), ("original_inference_steps", "timesteps", "strength")),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"), ("mu", "timesteps")),
    "UniPCMultistepScheduler": ("sigmas", "mu"),
    "DEISMultistepScheduler": ("mu",),
    "EulerDiscreteScheduler": ("timesteps", "sigmas"),
    "EDMEulerScheduler": ("sigmas",),
    "FlowMatchEulerDiscreteScheduler": ("sigmas", "mu", "timesteps"),
    "HeunDiscreteScheduler": ("num_train_timesteps", "timesteps"),
    **dict.fromkeys(
        ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"), ("num_train_timesteps",)
    ),
}
# Options of step that only some schedulers have, and the value that changes nothing.
ONLY = {"s_churn": 0.0, "s_tmin": None, "s_tmax": None, "s_noise": None, "order": 4, "per_token_timesteps": None}
# Schedulers of two evaluations a step.
TWO_STAGES = ("HeunDiscreteScheduler", "KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
              "DPMSolverSDEScheduler", "FlowMatchHeunDiscreteScheduler")  # fmt: skip
# Schedulers in sigma that have the timesteps of the training before a run, one for each level.
PLAIN = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
# Schedulers of a multi-step solver whose samples are variance-preserving.
MULTISTEP = ("DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler", "DPMSolverSinglestepScheduler",
             "UniPCMultistepScheduler", "DEISMultistepScheduler")  # fmt: skip
# Schedulers that lead from an image to noise.
INVERSE = ("DDIMInverseScheduler", "DPMSolverMultistepInverseScheduler")


def by_place(scheduler: str, method: str, values: Sequence[Any]) -> dict[str, Any]:
    """Return positional arguments of step or set_timesteps by the names that diffusers gives to their places."""
    names = SET_ARGUMENTS.get(scheduler, ()) if method == "set_timesteps" else STEP_ARGUMENTS.get(scheduler, NOISY)
    if len(values) > len(names):
        takes = ", ".join(names) or "nothing"
        raise InvalidArgument(f"{scheduler}.{method} takes {takes} in these places, not {len(values)} arguments")
    return dict(zip(names, values, strict=False))


def check_others(scheduler: str, others: Mapping[str, Any]) -> None:
    """Refuse options of step that do not exist, or whose values would change the result."""
    for name, value in others.items():
        if name not in ONLY:
            raise InvalidArgument(f"{scheduler}.step has no option {shown(name)}")
        if name == "per_token_timesteps":
            if value is not None:
                raise InvalidArgument("per_token_timesteps= is not supported: images have one noise level each")
            continue
        if name == "s_churn" and scheduler == "FlowMatchEulerDiscreteScheduler":  # ignores it, as in diffusers
            continue
        neutral = ONLY[name] if scheduler != "DPMSolverSDEScheduler" or name != "s_noise" else 1.0
        if neutral is not None and value != neutral:
            raise InvalidArgument(f"{name}={shown(value)} is not supported; only {neutral} is")
