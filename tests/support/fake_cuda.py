"""Substitute on the CPU for the graphs of `torch.cuda`: it records the calls, and replays captured operations.

It has those properties of a real capture that matter to the caller:

- Python runs once, at the capture. A replay repeats the operations on the same memory, and Python's numbers at the time
  of the capture are constants.
- A capture computes nothing: the buffers that it writes keep their values.
- Memory that an operation allocates belongs to the pool and does not outlive a replay, so it is filled with NaN.
- An operation that would wait for the device ends the capture with CUDA's error message.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that wait for the device, or whose result has a shape that only the device knows.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "masked_select", "unique_dim", "_unique2",
    "unique_consecutive", "bincount", "repeat_interleave", "_pin_memory",
}  # fmt: skip
REFUSAL = "CUDA error: operation not permitted when stream is capturing"


def waits(operation: Any, args: tuple[Any, ...]) -> bool:
    """Return whether an operation reads values from the device, as indexing by a mask does."""
    name = operation.overloadpacket.__name__
    masks = name.startswith("index") and any(t.dtype in (torch.bool, torch.uint8) for t in _tensors(args[1:2]))
    return name in WAITING or masks


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _whole(t: Tensor) -> Tensor:
    """Return the whole storage of a tensor."""
    return torch.empty(0, dtype=t.dtype).set_(t.untyped_storage())


class Counter(TorchDispatchMode):
    """Records the operations that are issued while no graph captures or replays."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.append(operation.overloadpacket.__name__)
        return operation(*args, **(kwargs or {}))


class _Capture(TorchDispatchMode):
    @classmethod
    def is_infra_mode(cls) -> bool:  # else torch.compile refuses to run
        return True

    def __init__(self, graph: FakeGraph):
        super().__init__()
        self.graph = graph
        self.before: list[tuple[Tensor, Tensor]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if waits(operation, args):
            raise RuntimeError(REFUSAL)
        known = self.graph.pool | {t.untyped_storage()._cdata for t, _ in self.before}
        values = (*args, *kwargs.values())
        for argument, value in zip(operation._schema.arguments, values, strict=False):
            writes = argument.alias_info is not None and argument.alias_info.is_write
            if writes and isinstance(value, Tensor) and value.untyped_storage()._cdata not in known:
                self.before.append((_whole(value), _whole(value).clone()))
        result = operation(*args, **kwargs)
        given = {t.untyped_storage()._cdata for t in _tensors(values)}
        for t in _tensors(result):
            if t.untyped_storage()._cdata not in given:
                self.graph.pool.add(t.untyped_storage()._cdata)
        self.graph.calls.append((operation, args, kwargs, result))
        return result

    def end(self) -> None:
        for whole, values in self.before:
            whole.copy_(values)
        self.graph.poison()


class FakeGraph:
    def __init__(self, cuda: FakeCuda):
        self.cuda = cuda
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any], Any]] = []
        self.pool: set[int] = set()
        self.number = -1

    def replay(self) -> None:
        self.cuda.log.append(("replay", self.number))
        with torch.utils._python_dispatch._disable_current_modes():
            for operation, args, kwargs, result in self.calls:
                if operation.is_view:
                    continue
                for new, held in zip(_tensors(operation(*args, **kwargs)), _tensors(result), strict=True):
                    if new.untyped_storage()._cdata != held.untyped_storage()._cdata:
                        held.copy_(new)
            self.poison()

    def poison(self) -> None:
        for *_, result in self.calls:
            for t in _tensors(result):
                if t.untyped_storage()._cdata in self.pool:
                    _whole(t).fill_(torch.nan if t.is_floating_point() else 1)


class FakeStream:
    def __init__(self, cuda: FakeCuda, name: str):
        self.cuda, self.name = cuda, name

    def wait_stream(self, other: FakeStream) -> None:
        self.cuda.log.append(("wait", self.name, other.name))


class FakeCuda:
    """Substitute for `torch.cuda`.

    ``log`` has the calls in order: ("wait", stream, other), ("capture", number, pool, stream), ("replay", number).
    ``devices`` are those that were made the current one, the outermost first. A pool is gone with its last graph.
    """

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []
        self.captures = 0
        self.pools = 0
        self.streams = [FakeStream(self, "main")]
        self.made = 0
        self.devices: list[Any] = []
        self.held: dict[Any, weakref.WeakSet[FakeGraph]] = {}

    def kinds(self) -> list[str]:
        return [entry[0] for entry in self.log]

    def Stream(self) -> FakeStream:  # noqa: N802 - as in torch.cuda
        self.made += 1
        return FakeStream(self, "side" if self.made == 1 else f"side {self.made}")

    def CUDAGraph(self) -> FakeGraph:  # noqa: N802 - as in torch.cuda
        return FakeGraph(self)

    def current_stream(self, device: Any = None) -> FakeStream:
        return self.streams[-1]

    def graph_pool_handle(self) -> tuple[int, int]:
        self.pools += 1
        return (0, self.pools)

    @contextlib.contextmanager
    def device(self, device: Any) -> Iterator[None]:
        self.devices.append(device)
        try:
            yield
        finally:
            self.devices.pop()

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        self.streams.append(stream)
        try:
            yield
        finally:
            self.streams.pop()

    @contextlib.contextmanager
    def graph(self, graph: FakeGraph, *, pool: Any, stream: FakeStream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local", "other threads' work would end the capture"
        assert not any(kind == "capturing" for kind in self.kinds()[-1:]), "one capture within another"
        assert pool not in self.held or self.held[pool], "INTERNAL ASSERT FAILED: it->second->use_count > 0"
        self.held.setdefault(pool, weakref.WeakSet()).add(graph)
        graph.number = self.captures
        self.captures += 1
        self.log.append(("capture", graph.number, pool, stream.name))
        capture = _Capture(graph)
        with self.stream(stream), capture:
            yield
        capture.end()
