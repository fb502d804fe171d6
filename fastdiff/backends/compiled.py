"""Backend `compiled`: torch.compile around the whole network, as one graph. Runs any network that compiles."""

from __future__ import annotations

import itertools
import shutil
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends import Spec
from fastdiff.backends.eager import EagerRunner, refuse
from fastdiff.errors import BackendError

_count = itertools.count()


def prepare(unet: nn.Module, spec: Spec) -> EagerRunner:
    """The first step of each batch size compiles: tens of seconds on a CPU, less where Inductor's cache knows it."""
    refuse("compiled", spec)
    if spec.device.type == "cpu" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        raise BackendError(
            "backend 'compiled' cannot run here: torch.compile on a CPU needs a C++ compiler on the PATH"
        )

    def network(x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Any:
        return unet(x, t) if class_labels is None else unet(x, t, class_labels=class_labels)

    # Dynamo counts compilations by code object and stops at eight. A runner sees two shapes at most (guided or not),
    # but all networks of a class share the code of their forward, so each runner brings code of its own.
    network.__code__ = network.__code__.replace(co_name=f"network_{next(_count)}")
    return EagerRunner(torch.compile(network, fullgraph=True, dynamic=False), spec)
