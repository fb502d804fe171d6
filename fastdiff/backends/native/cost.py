"""What a sampling job will cost, before it runs: FLOPs, bytes, memory, and seconds on this machine.

`estimate` lowers the network, has the native engine choose its algorithms and lay out its memory (neither a weight is
packed nor an operation run), and models the time of each operation as a roofline whose roofs are the machine's own,
measured (`Ceilings`), times how near each kind of operation comes to them (`FACTORS`, fitted to profiles by
``python benchmarks/calibrate.py``):

    seconds = products / (rate of multiply-adds in the dtype * share)                     the matrix products
            + (numbers loaded * a + numbers stored * b) / rate of multiply-adds           transforms, norms, SiLU, sums
            + bytes of weights * c / bandwidth + bytes of activations * d / bandwidth     what the caches do not hold
            + a fixed time                                                                barriers

Only the native engine's time and memory are predicted: of other backends, and of other devices, nothing that this
module knows tells them, so it gives none and says why.
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

from fastdiff.backends import Spec
from fastdiff.backends.native import runner as native
from fastdiff.backends.native import threads
from fastdiff.core.lower import lower
from fastdiff.core.program import Attention, Conv, Op, Program
from fastdiff.errors import InvalidArgument
from fastdiff.unet import UNet

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bfloat16-fast": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
# Multiplications of a direct 3x3 convolution for each of Winograd's: outputs a tile, times 9, over positions.
SAVING = {"direct": 1.0, "winograd2": 9 * 4 / 16, "winograd4": 9 * 16 / 36}

# The machine ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What this machine can do at most, all ``threads`` together; measured, but for two figures that say so.

    gflops: multiplications and additions of the instruction set, by dtype: float32 as multiply-adds on registers alone;
    bfloat16 as twice that (a dot product has two a lane, and no processor issues more of those), absent where the
    instruction set has none. memory_gbs: reading a buffer of eight last-level caches; cache_gbs: one of half a cache;
    copy_gbs: bytes read and written in a copy of half of the first. cache_bytes: of the last-level cache, as the system
    says.
    """

    isa: str
    threads: int
    gflops: dict[str, float]
    memory_gbs: float
    cache_gbs: float
    copy_gbs: float
    cache_bytes: int

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def ceilings() -> Ceilings:
    """Of this machine, for the instruction set that `FASTDIFF_ISA` asks for and the number of threads that the native
    engine would run: measured at the first call (about a second), remembered for the process.
    """
    return _measured(native.isa(), threads.number())


LOOKS = 30  # at the multiply-add peak, of about 12 ms


@functools.cache
def _measured(isa: str, number: int) -> Ceilings:
    extension = native.extension()
    gflops: dict[str, float] = {}
    if extension is not None and extension.isas():
        isa = isa or extension.isas()[0]
        with ThreadPoolExecutor(number) as pool:  # at once: cores that share units or a clock are slower together
            # A neighbour's moment is longer than one look, and would pass for the machine: 0.6 of the peak was seen.
            fma = max(sum(rates[1] for rates in pool.map(extension.rates, [isa] * number)) for _ in range(LOOKS))
        gflops["float32"] = fma
        if isa in extension.bf16_isas():
            gflops["bfloat16"] = 2 * fma
    cache = _cache_bytes()
    # Written to, or every page would be the same one of zeros.
    large, small = torch.ones(8 * cache // 4), torch.ones(cache // 2 // 4)
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
    """Seconds of the fastest of all rounds within ``limit`` seconds: a ceiling is what nothing disturbed."""
    seconds: list[float] = []
    end = time.perf_counter() + limit
    while len(seconds) < 8 or time.perf_counter() < end:
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return min(seconds)


def _cache_bytes() -> int:
    """Of the last-level cache; 32 MiB where the system does not tell."""
    for level in ("SC_LEVEL3_CACHE_SIZE", "SC_LEVEL2_CACHE_SIZE"):
        try:
            size = os.sysconf(level)
        except (AttributeError, ValueError, OSError):  # not this system's
            continue
        if size > 0:
            return size
    return native.CACHE_BYTES


# The work of an operation ---------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Work:
    """What the native engine does for one operation and all rows of a part, padding included.

    kind: as in `FACTORS`. dtype: of the products. products: multiplications and additions. loaded: numbers that are
    normalised, transformed and laid out for them. stored: numbers that are transformed back and finished. weights,
    activations: bytes, the second counted only where the last-level cache cannot hold what the operation touches.
    """

    kind: str
    dtype: str
    products: float = 0.0
    loaded: float = 0.0
    stored: float = 0.0
    weights: float = 0.0
    activations: float = 0.0

    def terms(self, machine: Ceilings) -> tuple[float, ...]:
        """Seconds that each part would take at the machine's ceiling; `FACTORS` weighs them."""
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
        weights = factors()[self.kind]
        return sum(w * t for w, t in zip(weights, self.terms(machine), strict=True))


FACTORS = Path(__file__).with_name("cost.json")


@functools.cache
def factors() -> dict[str, tuple[float, ...]]:
    """By kind of operation, what each of `Work.terms` is multiplied by: fitted, with where and how in the file."""
    return {kind: tuple(values) for kind, values in json.loads(FACTORS.read_text())["factors"].items()}


def work(compiled: native.Compiled, machine: Ceilings) -> Iterator[tuple[Op, Work]]:
    """Of each operation, for the rows of one part."""
    held = compiled.weights.nbytes + compiled.layout.size <= machine.cache_bytes
    for op in compiled.program.ops:
        found = _work(op, compiled)
        touched = 4 * compiled.rows * compiled.program.traffic(op)
        yield (
            op,
            dataclasses.replace(
                found,
                # What comes back from step to step out of the cache costs what the products' own reads do.
                weights=0.0 if held else found.weights,
                activations=touched if touched + found.weights > machine.cache_bytes else 0.0,
            ),
        )


def _work(op: Op, compiled: native.Compiled) -> Work:
    program, rows, group, panel = compiled.program, compiled.rows, compiled.native.GROUP, compiled.native.PANEL

    def padded(channels: int, to: int = group) -> int:
        return -(-channels // to) * to

    H, W, C = program.buffers[op.dst].shape
    pixels = rows * H * W
    depth = sum(padded(program.buffers[name].shape[2]) for name in op.src)
    dtype = "bfloat16" if compiled.spec.dtype == torch.bfloat16 and op.dst != "projections" else "float32"
    if isinstance(op, Attention):
        keys, heads, width = H * W, op.heads, op.head_dim
        return Work(
            f"attention {dtype}",
            dtype,
            products=4.0 * pixels * keys * heads * width,
            loaded=float(pixels * keys * heads),  # exponentials
            stored=float(3 * pixels * heads * width),
        )
    if not isinstance(op, Conv):
        return Work(
            type(op).__name__.lower(), "float32", loaded=float(pixels * depth), stored=float(pixels * padded(C))
        )
    method = compiled.methods[op.dst]
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
    """Of a step beside the network's operations: copies in and out by row, guidance and the update by image."""
    image = float(math.prod(spec.shape))
    return Work("step", "float32", loaded=rows * image, stored=spec.batch * image)


def products(program: Program, methods: dict[str, str]) -> float:
    """FLOP of a row with the algorithm that ``methods`` names for the convolution that writes a buffer."""
    return sum(program.flops(op) / (SAVING[methods[op.dst]] if isinstance(op, Conv) else 1.0) for op in program.ops)


# Bytes that packing takes for a moment, for each number of the largest layer: transformed in float64 (8), the product's
# own copy (8), padded (8), rounded and laid out in float32 (4).
PACKING = 28

# The estimate ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of ``n`` images, each after ``nfe`` evaluations of the network, in chunks of ``batch``.

    passes: of the network over a chunk, ``rows`` rows each (two an image where guided). A last chunk that is not full
    costs as much as a full one. flops: of the direct algorithms, of the n images; products: of those that the native
    engine chose, every row that it runs. weight_bytes, activation_bytes: read and written in the whole job, each weight
    once a part of a pass and each buffer once, wherever it is held. memory: bytes by what they are for. seconds:
    predicted, without loading the model and packing its weights. by_kind: the seconds of each kind of operation.
    missing: why products, memory and seconds are None.
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
        """Predicted growth of the process: the network, what the engine packs and works in, the batch, the result."""
        return None if self.memory is None else sum(self.memory.values())

    @property
    def img_steps_per_s(self) -> float | None:
        """One image through one row of the table, as `fastdiff bench` counts; a guided one counts once."""
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
        """JSON-serialisable."""
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
) -> Cost:
    """The cost of ``n`` images of ``size`` (height, width), ``nfe`` evaluations of the network each, ``batch`` a chunk.

    nfe: as a table counts them (`StepTable.nfe`); where ``guided`` they come in pairs, two rows of one pass. dtype:
    also "bfloat16-fast". machine: measured where not given, once in a process. Nothing is packed or run, so it takes
    tenths of a second. Weights may be on "meta".

    Raises `InvalidArgument` for numbers below 1, an unknown dtype, and a network or size that cannot be lowered.
    """
    for name, value in (("n", n), ("nfe", nfe), ("batch", batch)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"{name}={value!r}: a whole number of at least 1 is needed")
    number = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if number not in DTYPES.values():
        raise InvalidArgument(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}")
    assert number is not None
    if not isinstance(unet, UNet):
        raise InvalidArgument(f"the cost of a {type(unet).__name__} is not known; a fastdiff.UNet is needed")
    batch = min(batch, n)
    shape = (unet.config.in_channels, *size)
    spec = Spec(
        batch, shape, number, torch.device(device), unet.config.null_label, determinism, fast=dtype == "bfloat16-fast"
    )
    program = lower(unet, size)
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
    reasons = native.reasons_against(unet, spec) if backend == "native" else []
    if backend != "native":
        reasons = [f"backend {backend!r} runs what torch makes of the network; only the native engine's cost is known"]
    if reasons:
        return dataclasses.replace(cost, missing="; ".join(reasons))
    return _native(cost, unet, spec, machine or ceilings())


def _native(cost: Cost, unet: UNet, spec: Spec, machine: Ceilings) -> Cost:
    compiled = native.described(unet, spec, cost.rows)
    program, parts = compiled.program, math.ceil(cost.rows / compiled.rows)
    by_kind = {"step": cost.passes * outside(spec, cost.rows).seconds(machine)}
    for _, done in work(compiled, machine):
        seconds = cost.passes * parts * done.seconds(machine)
        by_kind[done.kind] = by_kind.get(done.kind, 0.0) + seconds
    image = 4 * math.prod(spec.shape)
    return dataclasses.replace(
        cost,
        products=cost.passes * cost.rows * products(program, compiled.methods),
        weight_bytes=cost.passes * parts * compiled.weights.nbytes,
        activation_bytes=cost.passes * cost.rows * 4 * sum(program.traffic(op) for op in program.ops),
        memory={
            "packing": PACKING * max((t.numel() for t in compiled.weights.packed.values()), default=0),
            "network": sum(p.nbytes for p in unet.parameters()),
            "packed": compiled.weights.nbytes,
            "arena": compiled.layout.size,
            "space": compiled.engine.space,
            "state": 8 * spec.batch * image,  # x, out, a row of the network's output and what a solver keeps
            "result": cost.n * image,
        },
        seconds=sum(by_kind.values()),
        by_kind=by_kind,
        machine=machine,
    )
