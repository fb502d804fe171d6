"""Runs the Gluon kernel of Hopper's convolution on a CPU, as Triton interprets no Gluon: its own code, on NumPy.

Pointers, boxes of TMA, stages of shared memory, barriers and asynchronous products are modelled. The partition that
loads runs to its end before the one that multiplies; what that finds in a stage is what the protocol of their barriers
says. A wrong phase, a stage that is freed before the product that reads it has ended, a load too few or too many, and a
wrong number of bytes are an AssertionError. Deadlocks, races and the hardware's swizzling do not show.
"""

from __future__ import annotations

import dataclasses
import math
import types
from typing import Any

import numpy as np
import torch

from fastdiff.kernels import hopper
from tests.support.kernel_harness import DEPTHS, multiply_as_tensor_cores

PROGRAMS = 2  # at most: so few that each has several tiles


class Pointer:
    """A pointer to an element of a tensor's memory, or an array of such."""

    def __init__(self, tensor: torch.Tensor, at: Any = 0):
        self.tensor, self.at = tensor, at
        self.dtype = types.SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset: Any) -> Pointer:
        return Pointer(self.tensor, self.at + offset)

    def memory(self) -> torch.Tensor:
        """Return everything in the tensor's storage, flat."""
        return self.tensor.new_empty(0).set_(self.tensor.untyped_storage())

    def places(self, mask: Any) -> torch.Tensor:
        at, mask = np.broadcast_arrays(self.at, mask)
        return torch.from_numpy(at[mask].astype(np.int64)) + self.tensor.storage_offset()


def array(values: torch.Tensor) -> Any:
    """Return the numbers of a tensor as float32 or int64."""
    return values.float().numpy() if values.is_floating_point() else values.numpy()


class Box:
    """A descriptor for TMA of a tensor."""

    def __init__(self, descriptor: Any):
        self.values = descriptor.base
        self.dtype, self.layout = descriptor.base.dtype, descriptor.layout
        self.block_type = types.SimpleNamespace(shape=list(descriptor.block_shape))
        assert list(descriptor.shape) == list(descriptor.base.shape)

    def at(self, start: list[int]) -> Any:
        """Return the box that begins at ``start``, with zeros outside the tensor."""
        shape = self.block_type.shape
        found = np.zeros(shape, np.float32)
        low = [max(0, -s) for s in start]
        high = [min(size, n - s) for size, n, s in zip(shape, self.values.shape, start, strict=True)]
        if all(h > lo for lo, h in zip(low, high, strict=True)):
            inner = tuple(slice(lo, h) for lo, h in zip(low, high, strict=True))
            outer = tuple(slice(s + i.start, s + i.stop) for s, i in zip(start, inner, strict=True))
            found[inner] = array(self.values[outer])
        return found


@dataclasses.dataclass(eq=False)
class Stage:
    """A stage of shared memory or of barriers: what was loaded into it, load by load, and what happened to it."""

    loads: list[Any] = dataclasses.field(default_factory=list)
    missing: list[int] = dataclasses.field(default_factory=list)  # bytes that are awaited, for each phase
    read: int = 0  # phases that were waited for
    finished: int = 0  # products that have read it
    freed: int = 0
    present: Any = None  # of shared memory: what a product reads
    peers: list[Stage] = dataclasses.field(default_factory=list)  # of a barrier: the memory that is loaded with it

    def reshape(self, shape: list[int]) -> Stage:
        return Stage(present=self.present.reshape(shape), peers=[self])


class Ring:
    """Stages of shared memory or of barriers."""

    def __init__(self, number: int):
        self.stages = [Stage() for _ in range(number)]

    def index(self, i: int) -> Stage:
        return self.stages[i]


class Machine:
    """One program of a launch, with what replaces the modules of Gluon for it."""

    def __init__(self, program: int, programs: int):
        self.program, self.programs = program, programs
        self.rings: list[Ring] = []
        self.begun: list[tuple[Stage, Stage]] = []  # products that have not ended
        self.loading = False

    # gl ---------------------------------------------------------------------------------------------------------------

    def language(self) -> Any:
        return types.SimpleNamespace(
            float32=np.float32, int64=np.int64, constexpr=None, program_id=lambda axis: self.program,
            num_programs=lambda axis: self.programs, cdiv=lambda a, b: -(-a // b), static_range=range,
            arange=lambda a, b, layout=None: np.arange(a, b), zeros=lambda shape, dtype, layout: np.zeros(shape, dtype),
            cast=lambda x, kind: x if isinstance(kind, torch.dtype) else np.asarray(x).astype(kind),
            convert_layout=lambda x, layout: x.copy(), expand_dims=np.expand_dims, reshape=np.reshape,
            permute=np.transpose, split=lambda x: (x[..., 0], x[..., 1]), maximum=np.maximum,
            where=lambda mask, x, other: np.where(mask, x, x.dtype.type(other)),
            sum=lambda x, axis: x.sum(axis=axis), load=load, store=store, allocate_shared_memory=self.allocate,
            warp_specialize=self.specialize, BlockedLayout=layout, SliceLayout=layout, NVMMADistributedLayout=layout,
        )  # fmt: skip

    def allocate(self, dtype: Any, shape: list[int], layout: Any) -> Ring:
        self.rings.append(Ring(shape[0]))
        return self.rings[-1]

    def specialize(self, partitions: Any, warps: list[int], registers: list[int]) -> None:
        (multiply, its), (loader, others) = partitions
        self.a, self.b, self.full, self.free = self.rings
        self.loading = True
        loader(*others)
        self.loading = False
        multiply(*its)
        assert not self.begun
        for a, b, full, free in zip(*(ring.stages for ring in self.rings), strict=True):
            assert len(a.loads) == len(b.loads) == full.read == free.freed == a.finished, "loads and products differ"

    # barriers, loads and products -------------------------------------------------------------------------------------

    def barriers(self) -> Any:
        return types.SimpleNamespace(
            MBarrierLayout=layout, init=lambda barrier, count: None, wait=self.wait, expect=self.expect,
            arrive=self.arrive,
        )  # fmt: skip

    def wait(self, barrier: Stage, phase: int) -> None:
        if self.loading:
            assert barrier in self.free.stages
            number = len(self.a.stages[self.free.stages.index(barrier)].loads)
            assert phase == (number & 1) ^ 1, "the loader waits for another phase"
            return
        i = self.full.stages.index(barrier)
        a, b = self.a.stages[i], self.b.stages[i]
        assert phase == barrier.read & 1, "the products wait for another phase"
        assert barrier.missing[barrier.read] == 0, "bytes that were not awaited, or do not come"
        assert self.free.stages[i].freed == barrier.read, "the stage was not free for this load"
        a.present, b.present = a.loads[barrier.read], b.loads[barrier.read]
        barrier.read += 1

    def expect(self, barrier: Stage, size: int) -> None:
        barrier.missing.append(size)

    def copy(self, box: Box, start: list[int], barrier: Stage, to: Stage) -> None:
        found = box.at(start)
        barrier.missing[-1] -= found.size * box.dtype.itemsize
        to.loads.append(found)

    def arrive(self, barrier: Stage, pred: Any = True) -> None:
        if pred:
            i = self.free.stages.index(barrier)
            barrier.freed += 1
            assert barrier.freed <= self.a.stages[i].finished, "freed before its product has ended"

    def multiply(self, a: Stage, b: Stage, sums: Any, is_async: bool) -> Any:
        assert is_async
        (whole,) = a.peers
        self.begun.append((whole, b))
        return multiply_as_tensor_cores(a.present, b.present, sums, DEPTHS[2])

    def ended(self, most: int, deps: list[Any]) -> Any:
        while len(self.begun) > most:
            for stage in self.begun.pop(0):
                stage.finished += 1
        return deps[0]


def layout(*shape: Any, **options: Any) -> None:
    """Stand in for a layout, which makes no difference to what is computed."""


def load(pointer: Pointer, mask: Any, other: float) -> Any:
    memory = array(pointer.memory()[pointer.places(mask)])
    shape = np.broadcast_shapes(np.shape(pointer.at), np.shape(mask))
    found = np.full(shape, other, memory.dtype)
    found[np.broadcast_to(mask, shape)] = memory
    return found


def store(pointer: Pointer, values: Any, mask: Any) -> None:
    values, mask = np.broadcast_arrays(values, mask)
    pointer.memory()[pointer.places(mask)] = torch.from_numpy(values[mask]).to(pointer.tensor.dtype)


# Running --------------------------------------------------------------------------------------------------------------


def rebuilt(kernel: Any, machine: Machine) -> Any:
    """Return a kernel as a Python function that runs on the machine."""
    names: dict[str, Any] = dict(kernel.fn.__globals__)
    for name, value in kernel.fn.__globals__.items():
        if hasattr(value, "is_gluon"):
            names[name] = types.FunctionType(value.fn.__code__, names, name)
        elif type(value).__name__ == "constexpr":
            names[name] = value.value
    names |= {
        "gl": machine.language(), "mbarrier": machine.barriers(), "warpgroup_mma": machine.multiply,
        "warpgroup_mma_wait": machine.ended,
        "tma": types.SimpleNamespace(async_copy_global_to_shared=machine.copy),
    }  # fmt: skip
    return names[kernel.fn.__name__]


def argument(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return Pointer(value)
    return Box(value) if hasattr(value, "block_shape") else value


def run(launch: hopper.HopperLaunch) -> None:
    """Run a launch by few programs, one after the other."""
    operands = {name: argument(value) for name, value in launch.operands.items()}
    programs = min(PROGRAMS, math.prod(launch.grid))
    for program in range(programs):
        rebuilt(launch.kernel, Machine(program, programs))(**operands)
