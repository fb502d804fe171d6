"""The options of diffusers' schedulers, with the defaults of their constructors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

Options = dict[str, Any]
BETAS: Options = {
    "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "trained_betas": None,
    "prediction_type": "epsilon",
}  # fmt: skip
LATENT_BETAS: Options = {**BETAS, "beta_start": 0.00085, "beta_end": 0.012}
THRESHOLD: Options = {"thresholding": False, "dynamic_thresholding_ratio": 0.995, "sample_max_value": 1.0}
CLIP: Options = {"clip_sample": True, "clip_sample_range": 1.0}
SPACING: Options = {"timestep_spacing": "linspace", "steps_offset": 0}
LEADING: Options = {"timestep_spacing": "leading", "steps_offset": 0}
BY_SIGMA: Options = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
FLOW: Options = {
    "use_flow_sigmas": False, "flow_shift": 1.0, "use_dynamic_shifting": False, "time_shift_type": "exponential",
}  # fmt: skip
ZERO_SNR: Options = {"rescale_betas_zero_snr": False}
DPM: Options = {"solver_order": 2, "algorithm_type": "dpmsolver++", "solver_type": "midpoint"}
LOW: Options = {"final_sigmas_type": "zero"}
EDM: Options = {
    "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "sigma_schedule": "karras", "num_train_timesteps": 1000,
    "prediction_type": "epsilon", "rho": 7.0,
}  # fmt: skip
DISTILLED: Options = {
    **LATENT_BETAS, **CLIP, **THRESHOLD, **LEADING, **ZERO_SNR, "beta_schedule": "scaled_linear", "clip_sample": False,
    "original_inference_steps": 50, "set_alpha_to_one": True, "timestep_scaling": 10.0,
}  # fmt: skip
TWO_STAGES: Options = {**LATENT_BETAS, **BY_SIGMA, **SPACING}

DEFAULTS: Mapping[str, Options] = {
    "DDPMScheduler": {**BETAS, **CLIP, **THRESHOLD, **LEADING, **ZERO_SNR, "variance_type": "fixed_small"},
    "DDIMScheduler": {**BETAS, **CLIP, **THRESHOLD, **LEADING, **ZERO_SNR, "set_alpha_to_one": True},
    "DDIMInverseScheduler": {**BETAS, **CLIP, **LEADING, **ZERO_SNR, "set_alpha_to_one": True},
    "PNDMScheduler": {**BETAS, **LEADING, "skip_prk_steps": False, "set_alpha_to_one": False},
    "LCMScheduler": DISTILLED,
    "TCDScheduler": DISTILLED,
    "DPMSolverMultistepScheduler": {
        **BETAS, **DPM, **THRESHOLD, **BY_SIGMA, **FLOW, **LOW, **SPACING, **ZERO_SNR, "lower_order_final": True,
        "euler_at_final": False, "use_lu_lambdas": False, "lambda_min_clipped": -math.inf, "variance_type": None,
    },
    "DPMSolverMultistepInverseScheduler": {
        **BETAS, **DPM, **THRESHOLD, **BY_SIGMA, **SPACING, "use_flow_sigmas": False, "flow_shift": 1.0,
        "lower_order_final": True, "euler_at_final": False, "lambda_min_clipped": -math.inf, "variance_type": None,
    },
    "DPMSolverSinglestepScheduler": {
        **BETAS, **DPM, **THRESHOLD, **BY_SIGMA, **FLOW, **LOW, "lower_order_final": False,
        "lambda_min_clipped": -math.inf, "variance_type": None,
    },
    "UniPCMultistepScheduler": {
        **BETAS, **THRESHOLD, **BY_SIGMA, **FLOW, **LOW, **SPACING, **ZERO_SNR, "solver_order": 2, "predict_x0": True,
        "solver_type": "bh2", "lower_order_final": True, "disable_corrector": [], "solver_p": None, "sigma_min": None,
        "sigma_max": None, "shift_terminal": None,
    },
    "DEISMultistepScheduler": {
        **BETAS, **DPM, **THRESHOLD, **BY_SIGMA, **FLOW, **SPACING, "algorithm_type": "deis", "solver_type": "logrho",
        "lower_order_final": True,
    },
    "EulerDiscreteScheduler": {
        **BETAS, **BY_SIGMA, **SPACING, **ZERO_SNR, **LOW, "interpolation_type": "linear", "timestep_type": "discrete",
        "sigma_min": None, "sigma_max": None,
    },
    "EulerAncestralDiscreteScheduler": {**BETAS, **SPACING, **ZERO_SNR},
    "HeunDiscreteScheduler": {**TWO_STAGES, **CLIP, "clip_sample": False},
    "LMSDiscreteScheduler": {**BETAS, **BY_SIGMA, **SPACING},
    "KDPM2DiscreteScheduler": TWO_STAGES,
    "KDPM2AncestralDiscreteScheduler": TWO_STAGES,
    "DPMSolverSDEScheduler": {**TWO_STAGES, "noise_sampler_seed": None},
    "EDMEulerScheduler": {**EDM, **LOW},
    "EDMDPMSolverMultistepScheduler": {
        **EDM, **DPM, **THRESHOLD, **LOW, "lower_order_final": True, "euler_at_final": False,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000, "shift": 1.0, "use_dynamic_shifting": False, "base_shift": 0.5, "max_shift": 1.15,
        "base_image_seq_len": 256, "max_image_seq_len": 4096, "invert_sigmas": False, "shift_terminal": None,
        **BY_SIGMA, "time_shift_type": "exponential", "stochastic_sampling": False,
    },
    "FlowMatchHeunDiscreteScheduler": {"num_train_timesteps": 1000, "shift": 1.0},
    "ScoreSdeVeScheduler": {
        "num_train_timesteps": 2000, "snr": 0.15, "sigma_min": 0.01, "sigma_max": 1348.0, "sampling_eps": 1e-5,
        "correct_steps": 1,
    },
    "CMStochasticIterativeScheduler": {
        "num_train_timesteps": 40, "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "s_noise": 1.0, "rho": 7.0,
        "clip_denoised": True,
    },
}  # fmt: skip
