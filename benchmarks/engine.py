"""Measure properties of the native engine besides its speed relative to peers, which ``fastdiff bench`` measures.

    python benchmarks/engine.py --json out.json                 # everything; some minutes
    python benchmarks/engine.py threads bitwise                 # these alone

threads    speed with k threads on k cores over k times one thread's, batch 8
bitwise    the cost of determinism="bitwise", by batch
timesteps  speed with different timesteps in a batch over speed with equal ones, batch 8
shipped    the built-in model against torch.compile, by batch
prepare    seconds from a network in memory to its first step at batch 8; bytes in memory
accuracy   whole runs of the built-in model: PSNR (peak 2) to float64, 50 DDIM steps and 1000 DDPM steps; the share of
           300 guided samples that its classifier assigns to their class

Unless another is named, the network is the CIFAR-10 U-Net with random weights. Speeds are in img-steps/s, medians over
rounds in which the compared ways take turns.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, UNet, solvers
from fastdiff.backends import Runner, Spec, compiled, native
from fastdiff.bench import machine
from fastdiff.bench.networks import PUBLISHED, random_unet
from fastdiff.bench.timing import in_turn, mean_seconds
from fastdiff.core.state import State, TableBank
from fastdiff.evaluation import Classifier

K = TypeVar("K")
CPU = torch.device("cpu")
CIFAR = PUBLISHED["ddpm-cifar10-32"]
DTYPES = ("float32", "bfloat16", "bfloat16-fast")


@functools.cache
def cifar_unet() -> UNet:
    return random_unet(CIFAR)


def interleaved(ways: dict[K, Callable[[], Any]], rounds: int) -> dict[K, float]:
    """Return the median seconds of a call of each, over rounds in which all take turns of 0.4 s."""

    def turn(run: Callable[[], Any]) -> float:
        run()  # the turns of the others have emptied the caches
        return mean_seconds(run, 0.4, 2)

    return {name: statistics.median(seconds) for name, seconds in in_turn(ways, rounds, turn).items()}


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


def forward(runner: Runner, batch: int, shape: tuple[int, int, int], timesteps: list[float], classes: int = 0) -> Any:
    """Return a call of the network alone on ``batch`` images, whose timesteps are ``timesteps`` in turn."""
    bank = TableBank([solvers.ddim(NoiseSchedule(), spacing=[t]) for t in timesteps], CPU)
    state = State.create(
        torch.randn(batch, *shape),
        bank,
        table=[i % len(timesteps) for i in range(batch)],
        label=[i % classes for i in range(batch)] if classes else None,
    )
    return lambda: runner.forward(state)


def cifar(batch: int, timesteps: list[float], **options: Any) -> Callable[[], None]:
    spec = Spec(batch, (3, 32, 32), torch.float32, CPU, **options)
    run: Callable[[], None] = forward(native.prepare(cifar_unet(), spec), batch, spec.shape, timesteps)
    return run


def threads() -> dict[str, Any]:
    most = torch.get_num_threads()
    ways = {}
    for k in (1, most):
        torch.set_num_threads(k)
        ways[k] = cifar(8, [500.0])
        ways[k]()  # a runner keeps the number of threads of its first step
    torch.set_num_threads(most)
    seconds = interleaved(ways, 7)
    return {"threads": most, "ratio": round(seconds[1] / seconds[most] / most, 3)}


def bitwise() -> dict[str, Any]:
    result = {}
    for batch in (1, 8, 32):
        ways = {d: cifar(batch, [500.0], determinism=d) for d in ("seed", "bitwise")}
        seconds = interleaved(ways, 7)
        result[f"batch {batch}"] = round(seconds["bitwise"] / seconds["seed"] - 1.0, 3)
    return result


def timesteps() -> dict[str, Any]:
    seconds = interleaved({"one": cifar(8, [500.0]), "eight": cifar(8, [100.0 * i + 50.0 for i in range(8)])}, 7)
    return {"ratio": round(seconds["one"] / seconds["eight"], 3)}


def shipped() -> dict[str, Any]:
    sampler = Sampler.from_pretrained("fashion-mnist", device="cpu")
    result = {}
    for batch in (1, 16, 64):
        spec = Spec(batch, (1, 32, 32), torch.float32, CPU, null_label=10)
        ways = {
            name: forward(prepare(sampler.unet, spec), batch, spec.shape, [500.0], classes=10)
            for name, prepare in (("native", native.prepare), ("compile", compiled.prepare))
        }
        speeds = {name: round(batch / s, 1) for name, s in interleaved(ways, 5).items()}
        result[f"batch {batch}"] = {**speeds, "ratio": round(speeds["native"] / speeds["compile"], 2)}
    return result


def prepare() -> dict[str, Any]:
    unet = random_unet(CIFAR)
    started = time.perf_counter()
    runner = native.prepare(unet, Spec(8, (3, 32, 32), torch.float32, CPU))
    forward(runner, 8, (3, 32, 32), [500.0])()
    seconds = time.perf_counter() - started
    raw = sum(4 * p.numel() for p in unet.parameters())
    return {"first_step_s": round(seconds, 2), "bytes": {"raw": raw, **runner.memory()}}


def psnr(got: Tensor, exact: Tensor) -> float:
    return round(10 * math.log10(4.0 / float((got.double() - exact.double()).square().mean())), 1)


def accuracy() -> dict[str, Any]:
    samplers = {d: Sampler.from_pretrained("fashion-mnist", device="cpu", dtype=d, backend="native") for d in DTYPES}
    exact = Sampler.from_pretrained("fashion-mnist", device="cpu", dtype="float64", backend="eager")
    classifier = Classifier.load()
    labels = [i % 10 for i in range(300)]
    runs: dict[str, dict[str, Any]] = {
        "ddim 50": {"solver": "ddim", "steps": 50, "labels": list(range(10)), "guidance": 2.0},
        "ddpm 1000": {"solver": "ddpm", "steps": 1000, "labels": [1, 7]},
    }
    truth = {name: exact.sample(len(o["labels"]), **o).images for name, o in runs.items()}
    result: dict[str, Any] = {}
    for dtype, sampler in samplers.items():
        found: dict[str, Any] = {
            f"psnr {name}": psnr(sampler.sample(len(o["labels"]), **o).images, truth[name]) for name, o in runs.items()
        }
        images = sampler.sample(300, steps=50, labels=labels, guidance=2.0).images
        predicted = classifier.judge(images)[0].argmax(1)
        found["read as their class"] = round(float((predicted == torch.tensor(labels)).double().mean()), 3)
        result[dtype] = found
    return result


MEASUREMENTS = {f.__name__: f for f in (threads, bitwise, timesteps, shipped, prepare, accuracy)}


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="name", help=f"of {', '.join(MEASUREMENTS)}")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    unknown = set(arguments.names) - MEASUREMENTS.keys()
    if unknown:
        parser.error(f"no measurement is named {', '.join(sorted(unknown))}; there are {', '.join(MEASUREMENTS)}")
    report: dict[str, Any] = {"machine": machine.header()}
    print(json.dumps(report["machine"]), flush=True)
    for name in arguments.names or MEASUREMENTS:
        report[name] = MEASUREMENTS[name]()
        print(f"{name}: {json.dumps(report[name])}", flush=True)
        write(report, arguments.json)


if __name__ == "__main__":
    main()
