"""A sampler's network as its backend runs it: in evaluation mode, converted, with runners for the last batch sizes."""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import ValuesView
from typing import Any

import torch
from torch import nn

from fastdiff import backends
from fastdiff.backends.base import refuse
from fastdiff.backends.eager import EagerRunner
from fastdiff.backends.evaluation import Conversion, Evaluation
from fastdiff.backends.native import NativeRunner
from fastdiff.checks import shown
from fastdiff.errors import BackendError, InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.sampler.options import NetworkInfo
from fastdiff.unet import changes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FAST = "bfloat16-fast"
MOST_RUNNERS = 16
MOST_MEMORY = 1.9  # of all runners but the one in use, in units of the largest one's memory


class Runners:
    """The runners of one network, which use its present weights. The arguments are as in `fastdiff.Sampler`.

    ``backend`` is the name of the backend that runs the network, never "auto"; ``fast`` whether dtype was
    "bfloat16-fast". ``prepared`` has the runners that were used last, the latest one last; a run that is under way
    keeps its own alive. ``interrupted`` has those that an error interrupted half-way, which nothing may use any more.
    """

    def __init__(
        self,
        unet: nn.Module,
        info: NetworkInfo,
        backend: str,
        device: str | torch.device | None,
        dtype: torch.dtype | str | None,
        determinism: str,
    ):
        parameter = next(unet.parameters(), torch.zeros((), dtype=torch.float32, device="cpu"))
        self.unet = unet
        self.info = info
        self.device = usable_device(device) if device is not None else parameter.device
        self.fast = isinstance(dtype, str) and dtype == FAST
        self.dtype = usable_dtype("bfloat16" if self.fast else dtype) if dtype is not None else parameter.dtype
        self.determinism = determinism
        self.prepared: dict[backends.Spec, backends.Runner] = {}
        self.interrupted: weakref.WeakSet[backends.Runner] = weakref.WeakSet()
        self._evaluation = Evaluation(unet)
        self._network_run: nn.Module | None = None
        self.config: Any = None
        self.compiled: nn.Module | None = None  # the network, without weights, when it was compiled
        self.global_changes: list[str] = []
        first = self._spec(1, (info.channels, *(info.size or (info.stride,) * 2)))
        self.backend = backend
        if info.text and backend == "compiled":
            refuse(backend, ["the network reads text, which the other backends alone feed it"])
        if info.condition:
            self.backend = "eager" if backend == "auto" else backend
            condition = f"the network reads a condition image of {info.condition} channels, which eager alone feeds it"
            refuse(backend, [condition] if backend not in ("auto", "eager") else [])
        elif backend == "auto":
            self.backend = backends.choose(unet, first)
        self.runner(first.batch, first.shape)  # raises now where the backend cannot run

    def runner(self, batch: int, shape: tuple[int, int, int]) -> backends.Runner:
        """Return the runner for ``batch`` images of ``shape`` (C, H, W), with the present weights."""
        spec = self._spec(batch, shape)
        network = self._network()
        if network is not self._network_run:
            self.prepared.clear()
            self._network_run = network
        self._follow_changes()
        runner = self.prepared.pop(spec, None)
        self._make_room()
        if runner is None:
            runner = backends.prepare(self.backend, network, spec)
        self.prepared[spec] = runner
        return runner

    def stepwise(self, capacity: int, shape: tuple[int, int, int]) -> backends.Runner:
        """Return a runner for `Slots` of ``capacity`` images, of the weights as they are now.

        `BackendError` is raised where the backend advances whole batches only.
        """
        if self.backend not in backends.STEPWISE:
            raise BackendError(
                f"backend {self.backend!r} advances whole batches only, so images cannot join and leave a batch "
                f"between its steps; {' and '.join(map(repr, backends.STEPWISE))} can"
            )
        spec = dataclasses.replace(self._spec(capacity, shape), frozen=True)
        return backends.prepare(self.backend, self._network(), spec)

    def _make_room(self) -> None:
        """Free the runners that were not used for longest, so that calls of any sizes take bounded memory."""
        sizes = {spec: _memory(runner) for spec, runner in self.prepared.items()}
        while len(sizes) >= MOST_RUNNERS or sum(sizes.values()) > MOST_MEMORY * max(sizes.values(), default=0):
            oldest = next(iter(sizes))
            del sizes[oldest], self.prepared[oldest]

    def give_back(self) -> None:
        """Set on the network's modules what their forwards have set, after a step."""
        self._evaluation.give_back()

    def forget(self, runner: backends.Runner) -> None:
        """Drop a runner whose step raised, as the error may be a signal handler's and have left it half changed."""
        if not isinstance(runner, EagerRunner):  # has nothing that could be half changed
            self.interrupted.add(runner)
            self.prepared = {spec: known for spec, known in self.prepared.items() if known is not runner}

    def values(self) -> ValuesView[backends.Runner]:
        """Return the prepared runners."""
        return self.prepared.values()

    def __len__(self) -> int:
        return len(self.prepared)

    def clear(self) -> None:
        """Free the runners and the network's twins, with their converted weights."""
        self.prepared.clear()
        self._network_run = None
        self._evaluation = Evaluation(self.unet)
        self.compiled = None

    def _follow_changes(self) -> None:
        """Drop runners of what the network was before it was changed otherwise than in its weights.

        `eager` runs the module itself, and `native` and `triton` look for changes of modules themselves, but for a new
        configuration they are prepared anew. Compiled code does not notice hooks, nor methods of classes.
        """
        config = getattr(self.unet, "config", None)
        changed = not changes.same(config, self.config)
        if self.backend == "compiled":
            present = changes.global_changes(self.unet)
            as_compiled = self.compiled is not None and not changes.differences(self.unet, self.compiled)
            changed = changed or not as_compiled or present != self.global_changes
            self.global_changes = present
        if changed:
            self.prepared.clear()
            self.config = config
            self.compiled = changes.without_weights(self.unet) if self.backend == "compiled" else None

    def _spec(self, batch: int, shape: tuple[int, int, int]) -> backends.Spec:
        return backends.Spec(batch, shape, self.dtype, self.device, self.info.null_label, self.determinism, self.fast)

    def _network(self) -> nn.Module:
        """Return the network to run, with the present weights: the module itself, or its twin (see `Evaluation`)."""
        # These two convert for themselves, and with less error: they round transformed weights.
        dtype = torch.float32 if self.backend in ("native", "triton") else self.dtype
        # On CUDA this memory layout selects kernels of its own.
        layout = torch.channels_last if self.device.type == "cuda" else None

        def fits(p: torch.Tensor) -> bool:
            laid_out = layout is None or p.ndim != 4 or p.is_contiguous(memory_format=layout)
            return p.device == self.device and p.dtype == dtype and laid_out

        with plain_modes():  # so that a copy can be written again in any mode
            if not all(map(fits, self.unet.parameters())):
                return self._evaluation.follow(Conversion(self.device, dtype, layout))
            # These run a program, in which nothing depends on a mode.
            return self.unet if self.backend in ("native", "triton") else self._evaluation.follow()


def _memory(runner: backends.Runner) -> int:
    """Return the bytes that a runner holds besides the packed weights, which all runners share."""
    parts = runner.memory() if isinstance(runner, NativeRunner) else {}
    return sum(size for name, size in parts.items() if name != "weights")


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device with its index, as the tensors on it name it ("cuda" gives "cuda:0").

    None gives CUDA where there is one, else the CPU. `InvalidArgument` says why a device cannot be used.
    """
    if not isinstance(device, (str, torch.device, type(None))):
        raise InvalidArgument(f"device={shown(device)}: a name such as cpu, a torch.device or None is needed")
    try:
        return torch.empty(
            0, dtype=torch.uint8, device=device or ("cuda" if torch.cuda.is_available() else "cpu")
        ).device
    except (RuntimeError, AssertionError, TypeError) as e:
        raise InvalidArgument(
            f"device={shown(str(device))} cannot be used here: {shown(str(e).splitlines()[0])[1:-1]}"
        ) from e


def usable_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name, or a dtype itself; `InvalidArgument` lists the ones that networks can run in."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype) or found not in DTYPES.values():
        raise InvalidArgument(f"dtype={shown(dtype)} is unknown; allowed: {', '.join(DTYPES)}, {FAST}")
    return found
