"""Backends: ways to run the network and the update.

A backend prepares a network for a `Spec` and returns a `Runner`. `eager` and `compiled` wrap the module itself;
`native` and `triton` run the program that `fastdiff.core.lower` emits for it.
An explicit backend never falls back: where it cannot run, `prepare` raises one `BackendError` that lists every reason.
"""

from __future__ import annotations

import importlib
import logging
import math

import torch
from torch import nn

from fastdiff.backends.base import BACKENDS, BITWISE_ROWS, STEPWISE, Runner, Spec
from fastdiff.errors import InvalidArgument
from fastdiff.unet import UNet, UNetCondition

__all__ = ["BACKENDS", "BITWISE_ROWS", "STEPWISE", "Runner", "Spec", "choose", "prepare"]

log = logging.getLogger("fastdiff")


def choose(unet: nn.Module, spec: Spec) -> str:
    """Choose the backend that "auto" stands for, and log the choice.

    It is `native` where that can run. On CUDA it is the one that the tuned file of the GPU's model has measured to be
    fastest, of those that can run. Elsewhere it is `eager`.

    Args:
        unet: The network.
        spec: What the runner would be prepared for.

    Returns:
        The backend's name.
    """
    from fastdiff.backends import native
    from fastdiff.backends.network import unsupported_changes

    measured = _measured_fastest(unet, spec) if spec.device.type == "cuda" else None
    if measured is not None:
        log.info("backend auto: %s, the fastest in this GPU's tuned file", measured)
        return measured
    reasons = native.reasons_against(unet, spec)
    if not reasons:
        log.info("backend auto: native")
        return "native"
    # A network that was changed looks as if native ran it, so this is worth more than a note.
    changed = isinstance(unet, UNet | UNetCondition) and bool(unsupported_changes(unet))
    log.log(logging.WARNING if changed else logging.INFO, "backend auto: eager; native cannot: %s", "; ".join(reasons))
    return "eager"


def _measured_fastest(unet: nn.Module, spec: Spec) -> str | None:
    """Return the fastest backend that can run, by the measurement of the most similar batch; None without a file.

    Batches of the same dtype are compared by their numbers of pixels.
    """
    from fastdiff.backends import triton

    if spec.frozen or not triton.has_kernels():  # slots are run by `eager` alone
        return None
    from fastdiff.kernels.launch import config_file, speeds

    path = config_file(torch.cuda.get_device_properties(spec.device).name)
    dtype, pixels = str(spec.dtype).removeprefix("torch."), math.prod((spec.batch, *spec.shape[1:]))
    rows = [(key.partition(" "), found) for key, found in speeds(path).items()]
    similar = [
        (abs(math.log(pixels / math.prod(map(int, size.split("x"))))), size, found)
        for (kind, _, size), found in rows
        if kind == dtype
    ]
    if not similar:
        return None
    _, _, found = min(similar, key=lambda row: row[:2])
    for backend in sorted(found, key=lambda name: -found[name]):
        able = backend in ("eager", "compiled") or not triton.reasons_against(unet, spec)
        if able and (spec.determinism != "bitwise" or backend == "triton"):
            return backend
    return None


def prepare(backend: str, unet: nn.Module, spec: Spec) -> Runner:
    """Prepare a network to run on a backend.

    Args:
        backend: One of `BACKENDS`; "auto" is for `choose`.
        unet: The network: `fastdiff.UNet` or `fastdiff.UNetCondition` for `native` and `triton`, any module for the
            others.
        spec: What to prepare for.

    Returns:
        The backend's runner.

    Raises:
        InvalidArgument: If there is no backend of this name.
        BackendError: If it cannot run here; the message lists every reason.
    """
    if backend not in BACKENDS:
        raise InvalidArgument(f"backend={backend!r} is unknown; allowed: auto, {', '.join(BACKENDS)}")
    # Imported when asked for: each backend has dependencies of its own.
    runner: Runner = importlib.import_module(f"fastdiff.backends.{backend}").prepare(unet, spec)
    return runner
