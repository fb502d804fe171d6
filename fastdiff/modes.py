"""Global settings for a part of the program: torch's defaults, whatever the caller has switched on, and `random`'s."""

from __future__ import annotations

import contextlib
import random
import threading
from collections.abc import Iterator

import torch

AUTOCAST_DEVICES = ("cpu", "cuda", "mps")
_precision_lock = threading.Lock()


@contextlib.contextmanager
def plain_modes(gradients: bool = False) -> Iterator[None]:
    """Switch off inference mode, autocast and, unless ``gradients``, the recording of gradients.

    It is a context, or the decorator of a function. Autocast would round what is computed here, and tensors made in
    inference mode could never be trained or changed in place afterwards. The modes belong to a thread, so no other
    thread is affected. A generator must not be decorated, as its caller's code would run in these modes too.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.set_grad_enabled(gradients))
        for kind in AUTOCAST_DEVICES:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@contextlib.contextmanager
def kept_random_state() -> Iterator[None]:
    """Restore the state of Python's module `random` afterwards: for imports of modules that use a number of it."""
    before = random.getstate()
    try:
        yield
    finally:
        random.setstate(before)


@contextlib.contextmanager
def exact_products() -> Iterator[None]:
    """Keep torch from rounding the operands of float32 matrix products (`torch.set_float32_matmul_precision`).

    The setting is that of the whole process: other threads' products are exact too for as long. By default there is
    nothing to change.
    """
    mkldnn = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # missing in torch's annotations
    backends = (mkldnn, torch.backends.cuda.matmul)
    if all(backend.fp32_precision in ("none", "ieee") for backend in backends):
        yield
        return
    with _precision_lock:
        before = [backend.fp32_precision for backend in backends]
        try:
            for backend in backends:
                backend.fp32_precision = "ieee"
            yield
        finally:
            for backend, precision in zip(backends, before, strict=True):
                backend.fp32_precision = precision
