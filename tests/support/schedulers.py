"""Runs of diffusers' schedulers in float64, whose samples are converted to the states of a `StepTable`."""

from __future__ import annotations

import contextlib
import copy
import importlib
import math
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.solvers.compat.diffusers import FLOW_SCHEDULERS, IN_SIGMA

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
    "DPMSolverSinglestepScheduler": "dpmsolver_singlestep",
    "KDPM2DiscreteScheduler": "k_dpm_2_discrete",
    "KDPM2AncestralDiscreteScheduler": "k_dpm_2_ancestral_discrete",
    "DPMSolverSDEScheduler": "dpmsolver_sde",
    "TCDScheduler": "tcd",
    "DDIMInverseScheduler": "ddim_inverse",
    "DPMSolverMultistepInverseScheduler": "dpmsolver_multistep_inverse",
    "FlowMatchEulerDiscreteScheduler": "flow_match_euler_discrete",
    "FlowMatchHeunDiscreteScheduler": "flow_match_heun_discrete",
    "ScoreSdeVeScheduler": "sde_ve",
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
    if name == "DPMSolverSDEScheduler":  # it imports torchsde for the tree that `Brownian` replaces
        sys.modules.setdefault("torchsde", types.ModuleType("torchsde"))
    module = importlib.import_module(f"diffusers.schedulers.scheduling_{MODULES[name]}")
    if name == "LMSDiscreteScheduler" and not hasattr(module, "integrate"):
        module.integrate = types.SimpleNamespace(quad=_quad)  # type: ignore[attr-defined]  # a module takes any
    return module


class Brownian:
    """Increments of a Brownian motion in sigma, in place of the tree: a stage's, then the step's."""

    def __init__(self, draw: Callable[[], Tensor]):
        self.draw = draw
        self.stage: tuple[float, float, Tensor] | None = None  # sigma at its start and its end, and its increment

    def __call__(self, sigma: Tensor, sigma_next: Tensor) -> Tensor:
        start, end, z = float(sigma), float(sigma_next), self.draw()
        if self.stage is not None and self.stage[0] == start:
            share = (start - self.stage[1]) / (start - end)
            z, self.stage = math.sqrt(share) * self.stage[2] + math.sqrt(1.0 - share) * z, None
        else:
            self.stage = start, end, z
        return z


@contextlib.contextmanager
def float64(module: types.ModuleType, draw: Callable[[], Tensor]) -> Iterator[None]:
    """Let the scheduler's module compute in float64 and take its noise from ``draw``."""
    new = {"torch": Widened(torch), "np": Widened(np), "randn_tensor": lambda *_, **__: draw()}
    new["BrownianTreeNoiseSampler"] = lambda *_: Brownian(draw)
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


_MADE: dict[str, Any] = {}


def _made(key: str, module: types.ModuleType, config: dict[str, Any]) -> Any:
    """Return the scheduler of a configuration, made once: some compute the timesteps of all 1000 levels for it."""
    if key not in _MADE:
        options = {name: value for name, value in config.items() if name[0] != "_"}
        _MADE[key] = getattr(module, config["_class_name"])(**options)
    return _MADE[key]


def run_scheduler(
    config: dict[str, Any], steps: int, denoise: Callable[[Tensor, Tensor], Tensor], noise: Tensor, **options: Any
) -> Tensor:
    """Return the states after every row, [rows, 1, C, H, W], variance-preserving except the last, the sample itself.

    ``noise`` [1 + rows, 1, C, H, W] is the initial noise and that of each row.
    """
    module = scheduler_module(config["_class_name"])
    row = 0
    with float64(module, lambda: noise[1 + row]):
        scheduler = copy.deepcopy(_made(repr(sorted(config.items())), module, config))
        scheduler.set_timesteps(steps)
        in_sigma = config["_class_name"] in IN_SIGMA
        unscaled = config["_class_name"] in FLOW_SCHEDULERS  # these have no scaling, of noise or of the input
        x = noise[0] if unscaled else noise[0] * scheduler.init_noise_sigma
        states = []
        for row, t in enumerate(scheduler.timesteps):
            out = denoise(x if unscaled else scheduler.scale_model_input(x, t), t.double().reshape(1))
            x = scheduler.step(out, t, x, **options).prev_sample
            last = row == len(scheduler.timesteps) - 1
            # What the network reads next is variance-preserving.
            states.append(x if last or not in_sigma else scheduler.scale_model_input(x, scheduler.timesteps[row + 1]))
    return torch.stack(states)
