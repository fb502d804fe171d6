"""Backend `compiled`: torch.compile around the whole network, as one graph. Runs any network that compiles.

On CUDA network and guidance are one compiled function, the update is another, and both stand in one CUDA graph
(`fastdiff.backends.graph`): what plain PyTorch can do, so the baseline of everything that wants to be faster.
"""

from __future__ import annotations

import importlib.util
import itertools
import shutil
import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends import Runner, Spec
from fastdiff.backends.eager import EagerRunner, refuse
from fastdiff.backends.graph import GraphRunner
from fastdiff.core.state import State
from fastdiff.errors import BackendError

_count = itertools.count()


def compiled(function: Any, **options: Any) -> Callable[..., Any]:
    """torch.compile of a copy of ``function`` with code of its own, as one graph.

    Dynamo counts compilations by code object and stops at eight. A runner sees few shapes, but all runners share their
    code, and all networks of a class share that of their forward.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_count)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, **options)


class CompiledSteps:
    """What `EagerRunner` does, compiled: once for each kind of step. mode: torch.compile's."""

    def __init__(self, eager: EagerRunner, mode: str | None = None):
        self.eager = eager
        self._evaluate = compiled(EagerRunner.evaluate, mode=mode)
        self._advances: dict[tuple[bool, ...], Callable[..., None]] = {}

    def evaluate(self, state: State, guided: bool) -> None:
        self._evaluate(self.eager, state, guided)

    def advance(self, state: State, noisy: bool) -> None:
        kind = (noisy, *(held is None for held in (state.m1, state.m2, state.m3, state.xs)))
        if kind not in self._advances:
            self._advances[kind] = compiled(EagerRunner.advance)
        self._advances[kind](self.eager, state, noisy)

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        self.evaluate(state, guided)
        self.advance(state, noisy)


def prepare(unet: nn.Module, spec: Spec, mode: str | None = None) -> Runner:
    """The first step of each batch size compiles: tens of seconds on a CPU, less where Inductor's cache knows it.

    mode: torch.compile's, on CUDA.
    """
    refuse("compiled", spec)
    if spec.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise BackendError(
            "backend 'compiled' cannot run here: torch.compile on a CPU needs a C++ compiler on the PATH"
        )
    if spec.device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            raise BackendError("backend 'compiled' cannot run here: torch.compile on CUDA needs triton")
        return GraphRunner(CompiledSteps(EagerRunner(unet, spec), mode), unet, spec)

    def network(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        return unet(x, t) if class_labels is None else unet(x, t, class_labels=class_labels)

    return EagerRunner(compiled(network), spec)
