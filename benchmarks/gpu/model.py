"""Predicts the time of every launch of a step from its sizes and the rates of a GPU, before anything is measured.

    python -m benchmarks.gpu.model                              # the sums of published networks, by operation
    python -m benchmarks.gpu.model --network cifar10-32 --images 1 --launches
    python -m benchmarks.gpu.model --processors 108 --clock 1.41 --l2 20 --memory 1.9

A launch takes a fixed time, in which a graph starts it and its first loads arrive, and the time of its waves of
programs. A program takes the longer one of its products, at the rate of tensor cores, and of its bytes, at the rate at
which a multiprocessor reads the L2 cache. What does not fit into that cache takes the time of a copy. Products of the
library are taken to reach a fixed share of the peak. The model is meant for comparisons: a launch that is far off its
prediction, when the others are not, deserves a look.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import math
from typing import Any

BATCHES = {"cifar10-32": (1, 8, 64, 256), "celebahq-256": (1, 8), "sd15": (1, 8)}


@dataclasses.dataclass(frozen=True)
class Rates:
    """Rates of a GPU; the defaults are an H200's.

    Attributes:
        processors: multiprocessors.
        clock: GHz.
        l2: bytes that a multiprocessor reads or writes in a clock.
        memory: bytes of a copy in 10^12 per second.
        cache: bytes of the L2 cache in 10^6.
        products: multiplications of two-byte numbers that a multiprocessor adds in a clock.
        launch: microseconds of a node of a graph, with the latency of its first loads.
        library: share of the peak that products of the library reach.
    """

    processors: int = 132
    clock: float = 1.83
    l2: float = 29.0
    memory: float = 4.3
    cache: float = 50.0
    products: float = 2048.0
    launch: float = 1.9
    library: float = 0.65


@dataclasses.dataclass(frozen=True)
class Work:
    """Work of a launch: its programs, and the products and bytes of each."""

    programs: int
    products: float
    bytes: float
    whole: float  # bytes of all operands, each counted once
    by_library: bool = False


def tensors(value: Any) -> list[Any]:
    import torch

    if isinstance(value, tuple | list):
        return [t for v in value for t in tensors(v)]
    return [value] if isinstance(value, torch.Tensor) else []


def work(launch: Any) -> Work:
    """Return the work of a launch, from its shapes and configuration."""
    a = launch.arguments
    operands = {name: sum(t.numel() * t.element_size() for t in tensors(value)) for name, value in a.items()}
    for table in ("table", "norm_table", "bank", "entries", "time", "classes"):  # a row of these is read
        operands.pop(table, None)
    whole, programs = sum(operands.values()), math.prod(launch.grid) if launch.grid else 1
    if launch.op in ("conv.conv", "conv.partial"):
        size = a["weight"].element_size()
        steps = -(-(a["STEPS0"] + a["STEPS1"]) // a.get("SPLITS", 1))
        programs = getattr(launch, "units", programs)  # where a program has several tiles, one is finished as it ends
        depth = a["DEPTH"] * (a["SIZE"] + a["CHANNELS"]) * size
        # Three products of TF32 numbers, at half of the rate.
        products = a["SIZE"] * a["CHANNELS"] * a["DEPTH"] * steps * (6 if size == 4 else 1)
        written = operands["dst"] + operands["residual"]
        return Work(programs, products, depth * steps + written / programs, whole)
    if launch.op == "library.products":
        products = sum(a["sums"].shape[1:4].numel() * w.numel() for w in a["weight"])
        return Work(programs, products * (6 if a["sums"].element_size() == 4 else 1), whole, whole, by_library=True)
    if launch.op == "attention.attention":
        rows = a["dst"].shape[0]
        products = 2 * rows * a["tokens"] * a["keys"] * a["dst"].shape[3]
        # Every program reads all keys and values of its head.
        read = a["keys"] * a["head_dim"] * a["k"].element_size() * (1 if a["SHARED"] else 2)
        return Work(programs, products / programs, read + (operands["q"] + operands["dst"]) / programs, whole)
    if launch.op == "geglu":
        size = a["weight"].element_size()
        read = a["C"] * (a["PIXELS"] + 2 * a["CHANNELS"]) * size
        products = 2 * a["PIXELS"] * a["CHANNELS"] * a["C"] * (6 if size == 4 else 1)
        return Work(programs, products, read + operands["dst"] / programs, whole)
    if launch.op == "norm.group_norm":
        held = sum(operands[name] for name in ("statistics0", "statistics1") if name in operands)
        blocks = launch.grid[0]  # of pixels, whose programs read the same statistics
        return Work(programs, 0.0, (whole + held * (blocks - 1)) / programs, whole)
    return Work(programs, 0.0, whole / programs, whole)


def microseconds(launch: Any, rates: Rates) -> float:
    """Predict the time of a launch."""
    w = work(launch)
    if w.by_library:
        clocks = w.products / (rates.products * rates.processors * rates.library)
    else:
        clocks = -(-w.programs // rates.processors) * max(w.products / rates.products, w.bytes / rates.l2)
    memory = w.whole / rates.memory / 1e6 if w.whole > rates.cache * 1e6 else 0.0
    return rates.launch + max(clocks / rates.clock / 1e3, memory)


def predicted(launches: list[Any], rates: Rates, measured: list[float] | None = None) -> list[dict[str, Any]]:
    """Return a row for each launch: its operation, key, configuration and predicted time, beside the measured one."""
    rows = []
    for i, launch in enumerate(launches):
        row = {"launch": launch.op, "key": launch.key, "config": str(launch.config)}
        row["predicted_us"] = round(microseconds(launch, rates), 2)
        if measured is not None:
            row |= {"measured_us": round(measured[i], 2), "times": round(measured[i] / row["predicted_us"], 2)}
        rows.append(row)
    return rows


def summary(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sums of `predicted` by operation, the longest one first, and of the whole step."""
    sums: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for row in rows:
        for op in (row["launch"], "the step"):
            sums[op].update({"launches": 1, **{k: v for k, v in row.items() if k in ("predicted_us", "measured_us")}})
    found = [{"launch": op, **{k: round(v, 1) for k, v in values.items()}} for op, values in sums.items()]
    return sorted(found, key=lambda row: -float(row["predicted_us"]))


def main(argv: list[str] | None = None) -> int:
    import torch

    from fastdiff.bench.networks import PUBLISHED, READING_TEXT

    from . import lists

    parser = argparse.ArgumentParser(
        "python -m benchmarks.gpu.model", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=list(BATCHES), action="append", help="all without")
    parser.add_argument("--images", type=int, action="append", help="batch sizes")
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--launches", action="store_true", help="print every launch")
    for field in dataclasses.fields(Rates):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    arguments = parser.parse_args(argv)
    rates = Rates(**{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Rates)})
    for network in arguments.network or BATCHES:
        for images in arguments.images or BATCHES[network]:
            config = READING_TEXT.get(network) or PUBLISHED[f"ddpm-{network}"]
            rows = predicted(lists.step(config, images, getattr(torch, arguments.dtype)), rates)
            print(f"\n{network}, {images} images, {arguments.dtype}")
            for row in [*(rows if arguments.launches else []), *summary(rows)]:
                print("  ".join(f"{value:>9.2f}" if isinstance(value, float) else f"{value!s:<16}"
                                for value in row.values()))  # fmt: skip
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
