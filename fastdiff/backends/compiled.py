"""Backend `compiled`: torch.compile of the whole network, as one graph. Runs any network that compiles.

On CUDA the network with its guidance is one compiled function and the update another, both in one CUDA graph
(`fastdiff.backends.graph`). That is what plain PyTorch can reach, so it is the baseline for faster backends.
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

from fastdiff.backends.base import Runner, Spec, refuse
from fastdiff.backends.eager import EagerRunner, check_guarantees
from fastdiff.backends.graph import GraphRunner
from fastdiff.core.state import State

_count = itertools.count()


def compile_copy(function: Any, **options: Any) -> Callable[..., Any]:
    """Compile a copy of ``function`` with a code object of its own, as one graph.

    Dynamo counts compilations per code object and stops at eight. A runner sees few shapes, but without the copy all
    runners, and all networks of a class, would share one code object.
    """
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_count)}")
    own = types.FunctionType(code, function.__globals__, code.co_name, function.__defaults__, function.__closure__)
    return torch.compile(own, fullgraph=True, dynamic=False, **options)


class CompiledStep:
    """The step of an `EagerRunner`, compiled once for each kind of step (see `fastdiff.backends.graph.DeviceStep`).

    ``mode`` is the mode of torch.compile for the network.
    """

    def __init__(self, eager: EagerRunner, mode: str | None = None):
        self.eager = eager
        self._evaluate = compile_copy(EagerRunner.evaluate, mode=mode)
        self._advances: dict[tuple[bool, ...], Callable[..., None]] = {}

    def take_labels(self, state: State) -> None:
        """Do nothing: every step reads the labels."""

    def evaluate(self, state: State, guided: bool) -> None:
        """Set ``state.out``."""
        self._evaluate(self.eager, state, guided)

    def advance(self, state: State, noisy: bool) -> None:
        """Apply a row of the table and increment ``state.row``."""
        kind = (noisy, *(held is None for held in (state.m1, state.m2, state.m3, state.xs)))
        if kind not in self._advances:
            self._advances[kind] = compile_copy(EagerRunner.advance)
        self._advances[kind](self.eager, state, noisy)

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        """Do `evaluate`, then `advance`."""
        self.evaluate(state, guided)
        self.advance(state, noisy)


def prepare(unet: nn.Module, spec: Spec, mode: str | None = None) -> Runner:
    """Prepare a network that torch.compile can trace whole; ``mode`` is its mode on CUDA.

    The first step of each batch size compiles: tens of seconds on a CPU, less where Inductor's cache has the result.
    """
    check_guarantees("compiled", spec)
    if spec.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        refuse("compiled", ["torch.compile on a CPU needs a C++ compiler on the PATH"])
    if spec.device.type == "cuda":
        if importlib.util.find_spec("triton") is None:
            refuse("compiled", ["torch.compile on CUDA needs triton"])
        return GraphRunner(CompiledStep(EagerRunner(unet, spec), mode), unet, spec)

    def network(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        return unet(x, t) if class_labels is None else unet(x, t, class_labels=class_labels)

    return EagerRunner(compile_copy(network), spec)
