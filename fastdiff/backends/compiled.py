"""Backend `compiled`: torch.compile around the whole network, as one graph. Runs any network that compiles."""

from __future__ import annotations

import shutil

import torch
from torch import nn

from fastdiff.backends import Spec
from fastdiff.backends.eager import EagerRunner, refuse_bitwise
from fastdiff.errors import BackendError


def prepare(unet: nn.Module, spec: Spec) -> EagerRunner:
    """The first step of each batch size compiles: tens of seconds on a CPU, less where Inductor's cache knows it."""
    refuse_bitwise("compiled", spec)
    if spec.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise BackendError(
            "backend 'compiled' cannot run here: torch.compile on a CPU needs a C++ compiler on the PATH"
        )
    return EagerRunner(torch.compile(unet, fullgraph=True, dynamic=False), spec)
