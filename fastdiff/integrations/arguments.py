"""The arguments of each scheduler's methods in diffusers' order, and groups of schedulers that are alike."""

from __future__ import annotations

from collections.abc import Mapping

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
