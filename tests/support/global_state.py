"""States of the process and thread in which a user may call fastdiff, and a record of all of them."""

from __future__ import annotations

import contextlib
import dataclasses
import decimal
import gc
import locale
import logging
import os
import random
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode


class PassingFunctions(TorchFunctionMode):
    """A mode that sees every function of torch, as profilers and loggers do, and changes none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


class PassingOperations(TorchDispatchMode):
    """A mode that sees every operation of torch, and changes none."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], object], value: Any) -> Iterator[None]:
    """Set one value of the process, and set it back."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def default_dtype(dtype: torch.dtype) -> contextlib.AbstractContextManager[None]:
    return setting(torch.get_default_dtype, torch.set_default_dtype, dtype)


def default_device(device: str) -> contextlib.AbstractContextManager[None]:
    # Setting "cpu" would leave a mode behind that passes it to every factory call.
    return setting(lambda: None, torch.set_default_device, device)


@contextlib.contextmanager
def deterministic(warn_only: bool = False) -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fills = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fills


@contextlib.contextmanager
def flush_denormal() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@contextlib.contextmanager
def strict_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def strict_decimals() -> Iterator[None]:
    with decimal.localcontext() as context:
        context.prec = 2
        context.traps[decimal.Inexact] = True
        yield


@contextlib.contextmanager
def other_locale() -> Iterator[None]:
    before = locale.setlocale(locale.LC_ALL)
    for name in ("de_DE.UTF-8", "fr_FR.UTF-8", "tr_TR.UTF-8", "C.UTF-8"):  # whichever the machine has
        with contextlib.suppress(locale.Error):
            locale.setlocale(locale.LC_ALL, name)
            break
    try:
        yield
    finally:
        locale.setlocale(locale.LC_ALL, before)


@contextlib.contextmanager
def other_random_state() -> Iterator[None]:
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    try:
        yield
    finally:
        random.setstate(before[0]), np.random.set_state(before[1]), torch.set_rng_state(before[2])


@contextlib.contextmanager
def print_options() -> Iterator[None]:
    before = np.get_printoptions()
    np.set_printoptions(precision=1, legacy="1.13")
    torch.set_printoptions(precision=1)
    try:
        yield
    finally:
        np.set_printoptions(**before)
        torch.set_printoptions(profile="default")


@contextlib.contextmanager
def precision(matmul: str | None = None, **kinds: str) -> Iterator[None]:
    """Let torch round the operands of float32 products, by its older setting or by the newer ones of each kind."""
    backends = {kind: getattr(torch.backends.mkldnn, kind) for kind in ("matmul", "conv")}
    before = {kind: backend.fp32_precision for kind, backend in backends.items()}
    older = torch.get_float32_matmul_precision()
    for kind, value in kinds.items():
        backends[kind].fp32_precision = value
    if matmul is not None:
        torch.set_float32_matmul_precision(matmul)
    try:
        yield
    finally:
        if matmul is not None:
            torch.set_float32_matmul_precision(older)
        for kind, value in before.items():
            backends[kind].fp32_precision = value


def matmul_precision() -> str:
    try:
        return torch.get_float32_matmul_precision()
    except RuntimeError as e:  # torch refuses to say where the newer settings were used
        return str(e)


@contextlib.contextmanager
def no_mkldnn() -> Iterator[None]:
    before = torch.backends.mkldnn.set_flags(False)[0]
    try:
        yield
    finally:
        torch.backends.mkldnn.set_flags(before)


FLOAT32, BFLOAT16 = 2e-3, 0.2  # differences by rounding, after random networks have amplified it


@dataclasses.dataclass(frozen=True)
class State:
    """A state; ``rounds`` is by how much, as a root mean square, results of PyTorch's own kernels may differ in it.

    ``watches`` says that PyTorch calls a function of the state for each of its operations.
    """

    enter: Callable[[], contextlib.AbstractContextManager[Any]]
    rounds: float = 0.0
    watches: bool = False


STATES = {
    "default dtype float64": State(lambda: default_dtype(torch.float64)),
    "default dtype bfloat16": State(lambda: default_dtype(torch.bfloat16)),
    "default dtype float16": State(lambda: default_dtype(torch.float16)),
    "default device meta": State(lambda: default_device("meta")),
    "torch.device(meta)": State(lambda: torch.device("meta")),
    "inference mode": State(torch.inference_mode),
    "no gradients": State(torch.no_grad),
    "no gradients, set": State(lambda: setting(torch.is_grad_enabled, torch._C._set_grad_enabled, False)),
    "autocast to bfloat16": State(lambda: torch.autocast("cpu", torch.bfloat16)),
    "autocast to float16": State(lambda: torch.autocast("cpu", torch.float16)),
    "autocast without cache": State(lambda: torch.autocast("cpu", torch.bfloat16, cache_enabled=False)),
    "deterministic": State(deterministic, rounds=FLOAT32),
    "one thread": State(lambda: setting(torch.get_num_threads, torch.set_num_threads, 1), rounds=FLOAT32),
    "two threads": State(lambda: setting(torch.get_num_threads, torch.set_num_threads, 2), rounds=FLOAT32),
    "matmul precision medium": State(lambda: precision("medium"), rounds=BFLOAT16),
    "no mkldnn": State(no_mkldnn, rounds=FLOAT32),
    "mkldnn in bfloat16": State(lambda: precision(matmul=None, conv="bf16"), rounds=BFLOAT16),
    "flush denormal": State(flush_denormal),
    "math attention": State(lambda: torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), rounds=FLOAT32),
    "function mode": State(PassingFunctions, watches=True),
    "dispatch mode": State(PassingOperations, watches=True),
    "saved tensors on the CPU": State(torch.autograd.graph.save_on_cpu),
    "NumPy raises": State(lambda: np.errstate(all="raise")),
    "warnings are errors": State(strict_warnings),
    "locale": State(other_locale),
    "decimal context": State(strict_decimals),
    "random state": State(other_random_state),
    "print options": State(print_options),
    "no garbage collection": State(
        lambda: setting(gc.isenabled, lambda on: gc.enable() if on else gc.disable(), False)
    ),
}


def together(*names: str) -> State:
    """Join states into one."""

    @contextlib.contextmanager
    def enter() -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for name in names:
                stack.enter_context(STATES[name].enter())
            yield

    states = [STATES[name] for name in names]
    return State(enter, max(s.rounds for s in states), any(s.watches for s in states))


# A few that cover all of them, for tests that must be quick.
QUICK = {name: STATES[name] for name in ("default dtype bfloat16", "inference mode", "autocast to bfloat16")} | {
    "default dtype and device": together("default dtype float64", "default device meta"),
    "modes": together("no gradients", "function mode", "dispatch mode", "saved tensors on the CPU"),
    "kernels": together("deterministic", "two threads", "matmul precision medium", "flush denormal", "math attention"),
    "no mkldnn": STATES["no mkldnn"],
    "Python and NumPy": together(
        "NumPy raises", "warnings are errors", "locale", "decimal context", "random state", "print options",
        "no garbage collection",
    ),
}  # fmt: skip


def snapshot() -> dict[str, Any]:
    """Return all global state that a library could change by mistake."""
    kinds = ("cpu", "cuda")
    return {
        "default dtype": torch.get_default_dtype(),
        "default device": torch.get_default_device(),
        "function modes": torch.overrides._get_current_function_mode_stack(),
        "dispatch modes": torch.utils._python_dispatch._get_current_dispatch_mode_stack(),
        "inference mode": torch.is_inference_mode_enabled(),
        "gradients": torch.is_grad_enabled(),
        "autocast": [(torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)) for kind in kinds],
        "autocast cache": torch.is_autocast_cache_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "deterministic, warns": torch.is_deterministic_algorithms_warn_only_enabled(),
        "fills memory": torch.utils.deterministic.fill_uninitialized_memory,
        "threads": torch.get_num_threads(),
        "interop threads": torch.get_num_interop_threads(),
        "matmul precision": matmul_precision(),
        "mkldnn": torch._C._get_mkldnn_enabled(),
        "mkldnn precision": [getattr(torch.backends.mkldnn, kind).fp32_precision for kind in ("matmul", "conv")],
        "cudnn": [getattr(torch.backends.cudnn, name) for name in ("enabled", "benchmark", "deterministic")],
        "anomalies": torch.is_anomaly_enabled(),
        "denormals": bool(torch.tensor(1e-40, device="cpu", dtype=torch.float32) * 1.0 == 0.0),
        "torch's random state": tuple(torch.get_rng_state().tolist()),
        "NumPy's random state": tuple(np.random.get_state()[1].tolist()),
        "Python's random state": random.getstate(),
        "NumPy errors": np.geterr(),
        "NumPy prints": str(np.get_printoptions()),
        "torch prints": repr(torch._tensor_str.PRINT_OPTS),
        "warnings": list(warnings.filters),
        "locale": locale.setlocale(locale.LC_ALL),
        "decimals": repr(decimal.getcontext()),
        "signals": [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)],
        "environment": dict(os.environ),
        "folder": os.getcwd(),
        "import path": list(sys.path),
        "recursion": sys.getrecursionlimit(),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook),
        "loggers": (list(logging.root.handlers), logging.root.level, logging.root.manager.disable),
        "garbage": (gc.isenabled(), gc.get_threshold()),
    }
