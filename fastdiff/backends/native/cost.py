"""Prediction of what a sampling job costs: FLOPs, bytes, memory, and seconds on this machine.

`estimate` lowers the network and has the native engine choose its algorithms and lay out its memory, without packing a
weight or running an operation. The time of each operation follows a roofline model: the machine's measured ceilings
(`Ceilings`), each term weighted by how close that kind of operation comes to its ceiling (`FACTORS`, fitted to profiles
by ``python benchmarks/calibrate.py``):

    seconds = products / (rate of multiply-adds in the dtype * share)                     the matrix products
            + (numbers loaded * a + numbers stored * b) / rate of multiply-adds           transforms, norms, SiLU, sums
            + bytes of weights * c / bandwidth + bytes of activations * d / bandwidth     what the caches do not hold
            + a fixed time                                                                barriers

Time and memory are predicted for the native engine only. For other backends and devices the estimate leaves them out
and says why.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastdiff.backends.base import Spec
from fastdiff.backends.native import threads
from fastdiff.backends.native.extension import extension, isa, reasons_against
from fastdiff.backends.native.program import CACHE_BYTES, NativeProgram, dry_program
from fastdiff.backends.network import EMBEDDING_PRODUCTS
from fastdiff.checks import whole
from fastdiff.core.lower import TOKENS, lower
from fastdiff.core.program import Attention, Conv, Op, Program
from fastdiff.errors import InvalidArgument
from fastdiff.unet import UNet, UNetCondition

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-fast": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Multiplications of a direct 3x3 convolution per multiplication of Winograd's: outputs per tile * 9 / positions.
SAVING = {"direct": 1.0, "winograd2": 9 * 4 / 16, "winograd4": 9 * 16 / 36}

# The machine ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """Peak rates of this machine, all threads together."""

    isa: str
    threads: int
    # 10^9 multiplications and additions per second, by dtype, measured on registers alone. bfloat16 is absent where the
    # instruction set has no products of it.
    gflops: dict[str, float]
    memory_gbs: float  # GB/s of reading a buffer eight times as large as the last-level cache
    cache_gbs: float  # GB/s of reading a buffer half as large as the cache
    copy_gbs: float  # GB/s, read and written together, of copying one half of the first buffer to the other
    cache_bytes: int  # size of the last-level cache, as the system reports it

    def to_dict(self) -> dict[str, Any]:
        """Return the fields, JSON-serialisable."""
        return dataclasses.asdict(self)


def ceilings() -> Ceilings:
    """Measure this machine, for the instruction set of ``FASTDIFF_ISA`` and the native engine's number of threads.

    The first call takes about a second; the process keeps the result.
    """
    return _measured(isa(), threads.number())


@functools.cache
def _measured(isa: str, number: int) -> Ceilings:
    native = extension()
    gflops: dict[str, float] = {}
    if native is not None and native.isas():
        isa = isa or native.isas()[0]
        with ThreadPoolExecutor(number) as pool:  # all at once: cores that share units or a clock slow each other
            # The best of 30, each of about 12 ms: another process can slow down a single one, to 0.6 of the peak once.
            looks = [list(pool.map(native.rates, [isa] * number)) for _ in range(30)]
        for dtype, at in (("float32", 1), ("bfloat16", 2)):
            rate = max(sum(rates[at] for rates in look) for look in looks)
            gflops |= {dtype: rate} if rate else {}
    cache = _cache_bytes()
    # Ones, because pages of zeros that were never written all share one physical page.
    large, small = (torch.ones(n // 4, dtype=torch.float32, device="cpu") for n in (8 * cache, cache // 2))
    source, copied = large.chunk(2)
    return Ceilings(
        isa=isa,
        threads=number,
        gflops=gflops,
        memory_gbs=large.nbytes / _best(large.sum) / 1e9,
        cache_gbs=small.nbytes / _best(small.sum) / 1e9,
        copy_gbs=large.nbytes / _best(lambda: copied.copy_(source)) / 1e9,
        cache_bytes=cache,
    )


def _best(work: Callable[[], object], limit: float = 0.1) -> float:
    """Return the seconds of the fastest round among those within ``limit`` seconds, the least disturbed one."""
    seconds: list[float] = []
    end = time.perf_counter() + limit
    while len(seconds) < 8 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _cache_bytes() -> int:
    """Return the size of the last-level cache; 32 MiB where the system does not report it."""
    for level in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        try:
            size = os.sysconf(level)
        except (AttributeError, ValueError, OSError):  # this system does not have the name
            continue
        if size > 0:
            return size
    return CACHE_BYTES


# The work of an operation ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of the native engine for one operation and all rows of a part, padding included."""

    kind: str  # a key of `factors`
    dtype: str  # precision of the products
    products: float = 0.0  # number of multiplications and additions
    loaded: float = 0.0  # number of values that are normalised, transformed and laid out before the products
    stored: float = 0.0  # number of values that are transformed back and finished after them
    weights: float = 0.0  # bytes of weights read
    activations: float = (
        0.0  # bytes of activations read and written, if the cache cannot hold what the operation touches
    )

    def terms(self, machine: Ceilings) -> tuple[float, ...]:
        """Return the seconds that each part takes at the machine's ceiling, which `factors` weighs."""
        rate, bandwidth = machine.gflops["float32"] * 1e9, machine.memory_gbs * 1e9
        return (
            self.products / (machine.gflops[self.dtype] * 1e9),
            self.loaded / rate,
            self.stored / rate,
            self.weights / bandwidth,
            self.activations / bandwidth,
            1e-6,
        )

    def seconds(self, machine: Ceilings) -> float:
        """Return the predicted seconds."""
        weights = factors()[self.kind]
        return sum(w * t for w, t in zip(weights, self.terms(machine), strict=True))


FACTORS = Path(__file__).with_name("cost.json")


@functools.cache
def factors() -> dict[str, tuple[float, ...]]:
    """Return the fitted weights of `Work.terms`, by kind of operation; the file says where and how they were fitted."""
    return {kind: tuple(values) for kind, values in json.loads(FACTORS.read_text())["factors"].items()}


def work(lowered: NativeProgram, machine: Ceilings) -> Iterator[tuple[Op, Work]]:
    """Yield each operation of a program and its work."""
    held = lowered.weights.nbytes + lowered.layout.size <= machine.cache_bytes
    for op in lowered.program.ops:
        found = _work(op, lowered)
        touched = 4 * lowered.rows * lowered.program.traffic(op)
        yield (
            op,
            dataclasses.replace(
                found,
                # Weights that stay in the cache between steps cost no more than the reads that products include.
                weights=0.0 if held else found.weights,
                activations=touched if touched + found.weights > machine.cache_bytes else 0.0,
            ),
        )


def _work(op: Op, lowered: NativeProgram) -> Work:
    program, rows, group, panel = lowered.program, lowered.rows, lowered.native.GROUP, lowered.native.PANEL

    def padded(channels: int, to: int = group) -> int:
        return -(-channels // to) * to

    H, W, C = program.buffers[op.dst].shape
    C *= 1 + (isinstance(op, Conv) and op.geglu)
    pixels = rows * H * W
    depth = sum(padded(program.buffers[name].shape[2]) for name in op.src)
    dtype = "bfloat16" if lowered.spec.dtype == torch.bfloat16 and op.dst not in EMBEDDING_PRODUCTS else "float32"
    if isinstance(op, Attention):
        keys, heads, width = program.keys(op), op.heads, op.head_dim
        return Work(
            f"attention {dtype}",
            dtype,
            products=4.0 * pixels * keys * heads * width,
            loaded=float(pixels * keys * heads),  # exponentials
            stored=float((pixels + 2 * rows * keys) * heads * width),
        )
    if not isinstance(op, Conv):
        return Work(
            type(op).__name__.lower(), "float32", loaded=float(pixels * depth), stored=float(pixels * padded(C))
        )
    method = lowered.methods[op.dst]
    tile, positions = {"direct": (1, 1), "winograd2": (2, 16), "winograd4": (4, 36)}[method]
    items = rows * math.ceil(H / tile) * math.ceil(W / tile)
    kind = method if method != "direct" else f"conv {op.kernel}x{op.kernel}"
    if method == "direct":
        depth *= op.kernel**2
    itemsize = 2 if dtype == "bfloat16" else 4
    return Work(
        f"{kind} {dtype}",
        dtype,
        products=2.0 * items * positions * depth * padded(C),
        loaded=float(items * positions * depth),
        stored=float(items * positions * padded(C)),
        weights=float(itemsize * positions * depth * padded(C, panel)),
    )


def outside(spec: Spec, rows: int) -> Work:
    """Return the work of a step besides the network: copies for each row, guidance and the update for each image."""
    image = float(math.prod(spec.shape))
    return Work("step", "float32", loaded=rows * image, stored=spec.batch * image)


def products(program: Program, methods: dict[str, str]) -> float:
    """Return the FLOP of a row, given the algorithm of each convolution by the buffer that it writes."""
    return sum(program.flops(op) / (SAVING[methods[op.dst]] if isinstance(op, Conv) else 1.0) for op in program.ops)


# Temporary bytes of packing per number of the largest layer: transformed in float64 (8), the copy that the product
# makes (8), padded (8), rounded and laid out in float32 (4).
PACKING = 28

# The estimate ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """Predicted cost of a job.

    Attributes:
        n: Number of images.
        nfe: Network evaluations per image.
        batch: Images per chunk. A last chunk that is not full costs as much as a full one.
        rows: Network rows per pass: two per image where guided.
        passes: Passes of the network over a chunk.
        flops: FLOP of the direct algorithms for the n images.
        weight_bytes: Bytes of weights read in the whole job, each weight once per part of a pass.
        activation_bytes: Bytes of activations read and written in the whole job, wherever they are held.
        products: FLOP of the algorithms that the native engine chose, for every row that it runs.
        memory: Bytes by purpose.
        seconds: Predicted time, without loading the model and packing its weights.
        by_kind: The seconds of each kind of operation.
        machine: The ceilings behind the prediction.
        missing: Why products, memory and seconds are None.
    """

    n: int
    nfe: int
    batch: int
    rows: int
    passes: float
    flops: float
    weight_bytes: float
    activation_bytes: float
    products: float | None = None
    memory: dict[str, int] | None = None
    seconds: float | None = None
    by_kind: dict[str, float] | None = None
    machine: Ceilings | None = None
    missing: str | None = None

    @property
    def peak_bytes(self) -> int | None:
        """Predicted growth of the process: network, packed weights, working space, batch and result."""
        return None if self.memory is None else sum(self.memory.values())

    @property
    def img_steps_per_s(self) -> float | None:
        """Images advanced by one row of the table per second, as `fastdiff bench` counts; a guided one counts once."""
        return None if self.seconds is None else self.n * self.nfe * self.batch / (self.rows * self.seconds)

    def __str__(self) -> str:
        lines = [
            f"{self.n} images of {self.nfe} network evaluations, {self.batch} at a time, {self.rows} rows a pass:",
            f"  products     {self.flops / 1e12:.4g} TFLOP"
            + ("" if self.products is None else f"; {self.products / 1e12:.4g} as the native engine does them"),
            f"  bytes        {self.weight_bytes / 1e9:.4g} GB of weights, {self.activation_bytes / 1e9:.4g} GB of "
            "activations read and written",
        ]
        if self.memory is not None and self.peak_bytes is not None:
            parts = ", ".join(f"{name} {size / 2**20:.0f}" for name, size in self.memory.items())
            lines.append(f"  peak memory  {self.peak_bytes / 2**20:.0f} MiB ({parts})")
        if self.seconds is not None and self.img_steps_per_s is not None and self.machine is not None:
            m = self.machine
            lines.append(
                f"  time         {self.seconds:.4g} s, {self.img_steps_per_s:.4g} img-steps/s on {m.threads} threads "
                f"of {m.gflops['float32']:.0f} GFLOP/s (float32) and {m.memory_gbs:.0f} GB/s together"
            )
        if self.missing is not None:
            lines.append(f"  memory, time not predicted: {self.missing}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields and properties, JSON-serialisable."""
        return dataclasses.asdict(self) | {"peak_bytes": self.peak_bytes, "img_steps_per_s": self.img_steps_per_s}


def estimate(
    unet: nn.Module,
    size: tuple[int, int],
    n: int,
    nfe: int,
    batch: int,
    dtype: torch.dtype | str = "float32",
    *,
    guided: bool = False,
    backend: str = "native",
    device: str | torch.device = "cpu",
    determinism: str = "seed",
    machine: Ceilings | None = None,
    tokens: int = TOKENS,
) -> Cost:
    """Predict the cost of a job. Nothing is packed or run, so it takes tenths of a second.

    Args:
        unet: The network; its weights may be on "meta".
        size: Height and width of the images.
        n: Number of images.
        nfe: Network evaluations per image, as `StepTable.nfe` counts them: a guided step has two, in one pass.
        batch: Images per chunk.
        dtype: Precision; also "bfloat16-fast".
        guided: Whether guidance is on.
        backend: Backend; time and memory are known for "native".
        device: Device of the backend.
        determinism: "seed" or "bitwise".
        machine: The machine's ceilings; measured if not given, once in a process.
        tokens: Number of tokens of each text that a `UNetCondition` reads.

    Returns:
        The cost.

    Raises:
        InvalidArgument: If a number is below 1, the dtype unknown, or the network or size cannot be lowered.
    """
    n, nfe, batch = whole("n", n, 1), whole("nfe", nfe, 1), whole("batch", batch, 1)
    number = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if number not in DTYPES.values():
        raise InvalidArgument(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    assert number is not None
    if not isinstance(unet, UNet | UNetCondition):
        raise InvalidArgument(
            f"the cost of a {type(unet).__name__} is not known; a fastdiff.UNet or UNetCondition is needed"
        )
    batch = min(batch, n)
    shape = (unet.config.in_channels, *size)
    null_label = unet.config.null_label if isinstance(unet, UNet) else None
    spec = Spec(batch, shape, number, torch.device(device), null_label, determinism, fast=dtype == "bfloat16-fast")
    program = lower(unet, size, tokens)
    rows = batch * (1 + guided)
    passes = math.ceil(n / batch) * nfe / (1 + guided)
    itemsize = number.itemsize
    cost = Cost(
        n=n,
        nfe=nfe,
        batch=batch,
        rows=rows,
        passes=passes,
        flops=float(n * nfe * sum(program.flops(op) for op in program.ops)),
        weight_bytes=passes * itemsize * sum(program.parameters(op) for op in program.ops),
        activation_bytes=passes * itemsize * rows * sum(program.traffic(op) for op in program.ops),
    )
    reasons = reasons_against(unet, spec) if backend == "native" else []
    if backend != "native":
        reasons = [f"backend {backend!r} runs what torch makes of the network; only the native engine's cost is known"]
    if reasons:
        return dataclasses.replace(cost, missing="; ".join(reasons))
    return _native(cost, dry_program(unet, spec, rows, tokens), unet, spec, machine or ceilings())


def _native(cost: Cost, lowered: NativeProgram, unet: nn.Module, spec: Spec, machine: Ceilings) -> Cost:
    program, parts = lowered.program, math.ceil(cost.rows / lowered.rows)
    by_kind = {"step": cost.passes * outside(spec, cost.rows).seconds(machine)}
    for _, done in work(lowered, machine):
        seconds = cost.passes * parts * done.seconds(machine)
        by_kind[done.kind] = by_kind.get(done.kind, 0.0) + seconds
    image = 4 * math.prod(spec.shape)
    return dataclasses.replace(
        cost,
        products=cost.passes * cost.rows * products(program, lowered.methods),
        weight_bytes=cost.passes * parts * lowered.weights.nbytes,
        activation_bytes=cost.passes * cost.rows * 4 * sum(program.traffic(op) for op in program.ops),
        memory={
            "packing": PACKING * max((t.numel() for t in lowered.weights.packed.values()), default=0),
            "network": sum(p.nbytes for p in unet.parameters()),
            "packed": lowered.weights.nbytes,
            "arena": lowered.layout.size,
            "space": lowered.engine.space,
            "state": 8 * spec.batch * image,  # x, out, the network's rows and a solver's history
            "result": cost.n * image,
        },
        seconds=sum(by_kind.values()),
        by_kind=by_kind,
        machine=machine,
    )
