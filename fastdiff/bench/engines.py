"""fastdiff's own backends as contenders, and the list of all contenders."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends import Spec, prepare
from fastdiff.bench import peers
from fastdiff.bench.inputs import Contender, Stepper, Workload
from fastdiff.bench.networks import Model
from fastdiff.core.state import State, TableBank


class RunnerStepper:
    """A backend's runner, timed by `Runner.step`."""

    def __init__(self, runner: Any, workload: Workload):
        self.runner, self.start = runner, workload.x
        self.state = State.create(
            workload.x.clone(),
            TableBank([workload.table], workload.x.device),
            label=workload.label,
            guidance=1.0 if workload.guidance is None else workload.guidance,
        )
        if workload.texts is not None:
            self.state.texts = workload.texts
            self.state.null = torch.full_like(self.state.index, len(workload.texts) - 1)

    def _rewind(self) -> None:
        self.state.x = self.start.clone()
        self.state.row.zero_()
        self.state.row_host[:] = 0

    def forward(self) -> Tensor:
        if self.state.row_host.any():
            self._rewind()
        self.runner.forward(self.state)
        assert self.state.out is not None
        return self.state.out

    def step(self) -> Tensor:
        if self.state.done:
            self._rewind()
        self.runner.step(self.state)
        return self.state.x


def backend(name: str, dtype: torch.dtype, fast: bool, model: Model, workload: Workload) -> Stepper:
    """Prepare a backend of fastdiff for a workload."""
    device = workload.x.device
    unet = model.unet.to(memory_format=torch.channels_last).to(device)  # type: ignore[call-overload]  # missing in torch's annotations
    if name != "native":
        unet = unet.to(dtype)
    shape: Any = tuple(workload.x.shape[1:])
    spec = Spec(len(workload.x), shape, dtype, device, workload.null_label, fast=fast)
    return RunnerStepper(prepare(name, unet, spec), workload)


def _own(name: str, dtype: torch.dtype, fast: bool = False, **options: Any) -> Contender:
    make = functools.partial(backend, name, dtype, fast)
    return Contender(str(dtype).removeprefix("torch."), make, own=True, **options)


def _peer(
    make: Callable[..., Stepper], *arguments: Any, dtype: torch.dtype = torch.float32, **options: Any
) -> Contender:
    return Contender(str(dtype).removeprefix("torch."), functools.partial(make, *arguments), **options)


F32, BF16 = torch.float32, torch.bfloat16
ANYWHERE = ("cpu", "cuda")

# In the order of the table.
CONTENDERS: dict[str, Contender] = {
    "native": _own("native", F32),
    "native-bf16": _own("native", BF16),
    "native-bf16-fast": _own("native", BF16, fast=True),
    "eager": _own("eager", F32, where=ANYWHERE),
    "eager-bf16": _own("eager", BF16, where=ANYWHERE),
    "compiled": _own("compiled", F32, slow_start=True, where=ANYWHERE),
    "compiled-bf16": _own("compiled", BF16, slow_start=True, where=ANYWHERE),
    "diffusers": _peer(peers.diffusers, F32, False, needs=("diffusers",), where=ANYWHERE),
    "diffusers-last": _peer(peers.diffusers, F32, True, needs=("diffusers",), where=ANYWHERE),
    "diffusers-last-bf16": _peer(peers.diffusers, BF16, True, dtype=BF16, needs=("diffusers",), where=ANYWHERE),
    "compile": _peer(peers.compiled, "inductor", F32, slow_start=True),
    "compile-bf16": _peer(peers.compiled, "inductor", BF16, dtype=BF16, slow_start=True),
    "zentorch": _peer(peers.compiled, "zentorch", F32, needs=("zentorch",), slow_start=True),
    "zentorch-bf16": _peer(peers.compiled, "zentorch", BF16, dtype=BF16, needs=("zentorch",), slow_start=True),
    "openvino": _peer(peers.openvino, "f32", needs=("openvino",)),
    "openvino-bf16": _peer(peers.openvino, "bf16", dtype=BF16, needs=("openvino",)),
    "onnxruntime": _peer(peers.onnxruntime, needs=("onnxruntime", "onnxscript")),
    "cuda-graph-bf16": _peer(peers.cuda_graph, BF16, dtype=BF16, slow_start=True, where=("cuda",)),
}
# A batch's speeds are given as ratios to its anchor: the first of these that runs.
ANCHORS = ("diffusers-last", "diffusers", "openvino", "onnxruntime", "compile", "eager")
