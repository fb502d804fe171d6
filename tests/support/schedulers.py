"""Runs of diffusers' schedulers in float64, whose samples are converted to the states of a `StepTable`."""

from __future__ import annotations

import contextlib
import importlib
import math
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

MODULES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "PNDMScheduler": "pndm",
    "LCMScheduler": "lcm",
    "DPMSolverMultistepScheduler": "dpmsolver_multistep",
    "UniPCMultistepScheduler": "unipc_multistep",
    "DEISMultistepScheduler": "deis_multistep",
    "EulerDiscreteScheduler": "euler_discrete",
    "EulerAncestralDiscreteScheduler": "euler_ancestral_discrete",
    "HeunDiscreteScheduler": "heun_discrete",
    "LMSDiscreteScheduler": "lms_discrete",
    "EDMEulerScheduler": "edm_euler",
    "EDMDPMSolverMultistepScheduler": "edm_dpmsolver_multistep",
    "CMStochasticIterativeScheduler": "consistency_models",
}


class Widened:
    """A module whose float32 is float64, so that a scheduler that asks for float32 computes in float64."""

    def __init__(self, module: types.ModuleType):
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, "float64" if name == "float32" else name)


def _quad(f: Callable[[float], float], a: Any, b: Any, epsrel: float) -> tuple[float, float]:
    """Replace scipy.integrate.quad, which need not be installed; exact for the polynomials of LMSDiscreteScheduler."""
    nodes, weights = np.polynomial.legendre.leggauss(8)
    middle, half = (float(a) + float(b)) / 2, (float(b) - float(a)) / 2
    return half * sum(w * float(f(middle + half * x)) for x, w in zip(nodes, weights, strict=True)), 0.0


def scheduler_module(name: str) -> types.ModuleType:
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    if name == "LMSDiscreteScheduler" and not hasattr(module, "integrate"):
        module.integrate = types.SimpleNamespace(quad=_quad)  # type: ignore[attr-defined]  # a module takes any
    return module


@contextlib.contextmanager
def float64(module: types.ModuleType, draw: Callable[[], Tensor]) -> Iterator[None]:
    """Let the scheduler's module compute in float64 and take its noise from ``draw``."""
    new = {"torch": Widened(torch), "np": Widened(np), "randn_tensor": lambda *_, **__: draw()}
    old = {name: getattr(module, name) for name in new if hasattr(module, name)}
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        for name in old:
            setattr(module, name, new[name])
        yield
    finally:
        torch.set_default_dtype(before)
        for name, value in old.items():
            setattr(module, name, value)


def run_scheduler(
    config: dict[str, Any], steps: int, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, **options: Any
) -> Tensor:
    """Return the states after every row, [rows, 1, C, H, W], variance-preserving except the last, the sample itself.

    ``noise`` [1 + rows, 1, C, H, W] is the initial noise and that of each row.
    """
    module = scheduler_module(config["_class_name"])
    row = 0
    with float64(module, lambda: noise[1 + row]):
        scheduler = getattr(module, config["_class_name"])(**{k: v for k, v in config.items() if k[0] != "_"})
        scheduler.set_timesteps(steps)
        data = getattr(scheduler.config, "sigma_data", 1.0)
        in_sigma = config["_class_name"].startswith(("Euler", "Heun", "LMS", "EDM", "CM"))
        x = noise[0] * scheduler.init_noise_sigma
        states = []
        for row, t in enumerate(scheduler.timesteps):
            out = denoise(scheduler.scale_model_input(x, t), t.double().reshape(1))
            x = scheduler.step(out, t, x, **options).prev_sample
            last = row == len(scheduler.timesteps) - 1
            sigma = float(scheduler.sigmas[scheduler.step_index]) if in_sigma and not last else 0.0
            states.append(x if last or not in_sigma else x / math.hypot(sigma, data))
    return torch.stack(states)
