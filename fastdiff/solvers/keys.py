"""The keys of diffusers' scheduler configurations, each declared once with the check of its value."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import Any

from fastdiff.checks import Check, Error, boolean, check_all, items, number, optional, shown, text, whole
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import MAX_TIMESTEPS

_count = functools.partial(whole, low=1, high=MAX_TIMESTEPS)
_positive = functools.partial(number, above=0, need="a positive number")


def _lowest(name: str, value: Any, *, error: Error = InvalidArgument) -> float:
    return value if isinstance(value, float) and value == -math.inf else number(name, value, error=error)


def _steps(name: str, value: Any, *, error: Error = InvalidArgument) -> list[int]:
    return [whole(name, v, 0, error=error) for v in items(name, value, MAX_TIMESTEPS, error=error)]


# Whether a value is one that is supported is the business of the functions that read it. `NoiseSchedule` and
# `EDMSchedule` check the keys of the noise levels.
KEYS: Mapping[str, Check] = {
    "num_train_timesteps": _count,
    "prediction_type": text,
    "variance_type": text,
    "clip_sample": boolean,
    "clip_sample_range": _positive,
    "thresholding": boolean,
    "dynamic_thresholding_ratio": functools.partial(number, low=0, high=1),
    "sample_max_value": _positive,
    "timestep_spacing": text,
    "steps_offset": functools.partial(whole, low=0, high=MAX_TIMESTEPS),
    "rescale_betas_zero_snr": boolean,
    "set_alpha_to_one": boolean,
    "skip_prk_steps": boolean,
    "original_inference_steps": _count,
    "timestep_scaling": _positive,
    "solver_order": functools.partial(whole, low=1),
    "algorithm_type": text,
    "solver_type": text,
    "lower_order_final": boolean,
    "euler_at_final": boolean,
    "final_sigmas_type": text,
    "lambda_min_clipped": _lowest,
    "use_karras_sigmas": boolean,
    "use_exponential_sigmas": boolean,
    "use_beta_sigmas": boolean,
    "use_lu_lambdas": boolean,
    "use_flow_sigmas": boolean,
    "flow_shift": functools.partial(number, above=0, low=1e-6, high=1e6),
    "use_dynamic_shifting": boolean,
    "time_shift_type": text,
    "shift_terminal": number,
    "shift": functools.partial(number, above=0, low=1e-6, high=1e6),
    "base_shift": number,
    "max_shift": number,
    "base_image_seq_len": _count,
    "max_image_seq_len": _count,
    "invert_sigmas": boolean,
    "stochastic_sampling": boolean,
    "predict_x0": boolean,
    "disable_corrector": _steps,
    "interpolation_type": text,
    "timestep_type": text,
    "sigma_min": _positive,
    "sigma_max": _positive,
    "sigma_data": _positive,
    "sigma_schedule": text,
    "rho": _positive,
    "s_noise": number,
    "clip_denoised": boolean,
    "noise_sampler_seed": functools.partial(whole, low=0),
    "snr": functools.partial(number, low=0),
    "sampling_eps": functools.partial(number, above=0, low=1e-12, high=1),
    "correct_steps": functools.partial(whole, low=0, high=MAX_TIMESTEPS),
}
# Those that are checked where they are read.
OTHERS = ("beta_start", "beta_end", "beta_schedule", "trained_betas", "solver_p")


def check_config(config: Any) -> dict[str, Any]:
    """Return a scheduler configuration, or raise `ConfigError` if a value is of a wrong type or magnitude.

    A value of None counts as absent, as in diffusers.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"a scheduler configuration is an object with keys, not {type(config).__name__}")
    odd = [key for key in config if not isinstance(key, str)]
    if odd:
        raise ConfigError(f"the keys of a scheduler configuration are texts, not {shown(odd[0])}")
    name = config.get("_class_name")
    if name is not None and not isinstance(name, str):
        raise ConfigError(f"scheduler {shown(name)} (_class_name) is not supported; a name is needed")
    return {**config, **check_all(config, {key: optional(check) for key, check in KEYS.items()}, ConfigError)}


def unknown_keys(config: Mapping[str, Any]) -> list[str]:
    """List the keys that no supported scheduler has; diffusers ignores them, with a warning."""
    return sorted(key for key in config if key not in KEYS and key not in OTHERS and not key.startswith("_"))


# Schedulers that bound x0 where ``clip_sample`` is absent, and those that do not; the others have no such key.
CLIPS = {"DDPMScheduler": True, "DDIMScheduler": True, "DDIMInverseScheduler": True, "LCMScheduler": False,
         "HeunDiscreteScheduler": False}  # fmt: skip


def clips(config: Mapping[str, Any]) -> bool:
    """Return whether a configuration's scheduler bounds x0; one that names no scheduler does."""
    name = config.get("_class_name")
    return bool(value_of(config, "clip_sample", name is None or CLIPS.get(name, False)))


def value_of(config: Mapping[str, Any], key: str, default: Any) -> Any:
    """Return a key's value; None counts as absent."""
    value = config.get(key)
    return default if value is None else value
