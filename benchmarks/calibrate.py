"""Fit the factors of `fastdiff.backends.native.cost` to profiles of the native engine on this machine.

    python benchmarks/calibrate.py profile p1.json --networks ddpm-cifar10-32    # minutes; nothing else may compute
    python benchmarks/calibrate.py fit p1.json p2.json                           # writes fastdiff/cost.json

profile  measures the fastest of several runs of every operation within its network, so that caches are as cold as in
         use, for the networks, batches and dtypes below; and the time of whole steps
fit      finds for each kind of operation the non-negative factors with the least sum of squared relative errors,
         weighted by the operations' share of the network's time, then one factor for all from whole steps.
         It prints predicted over measured times by network.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff import NoiseSchedule, Sampler, UNet, solvers
from fastdiff.backends import Spec, native
from fastdiff.backends.native import cost
from fastdiff.bench import machine
from fastdiff.bench.networks import PUBLISHED, random_unet
from fastdiff.bench.timing import mean_seconds
from fastdiff.core.state import State, TableBank
from fastdiff.unet import UNetConfig

DTYPES = ("float32", "bfloat16", "bfloat16-fast")
# A network with pools, embedded classes and several heads, which the others lack.
BLOCKS = UNetConfig(
    sample_size=32,
    block_out_channels=(64, 128, 192),
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"),
    downsample_type="resnet",
    upsample_type="resnet",
    layers_per_block=1,
    attention_head_dim=32,
    num_class_embeds=10,
)
BATCHES = {
    "blocks": (1, 4, 16),
    "ddpm-cifar10-32": (1, 2, 4, 8, 16, 32),
    "ddpm-celebahq-256": (1,),
    "fashion-mnist": (1, 2, 4, 8, 16, 32, 64),
}
ROUNDS = 15


def network(name: str) -> UNet:
    if name in PUBLISHED or name == "blocks":
        return random_unet(PUBLISHED.get(name, BLOCKS))
    unet = Sampler.from_pretrained(name, device="cpu").unet
    assert isinstance(unet, UNet)
    return unet


def spec_of(unet: UNet, batch: int, dtype: str) -> Spec:
    side = unet.config.sample_size
    assert isinstance(side, int)
    return Spec(
        batch, (unet.config.in_channels, side, side), cost.DTYPES[dtype], torch.device("cpu"),
        unet.config.null_label, fast=dtype == "bfloat16-fast",
    )  # fmt: skip


@torch.no_grad()
def profile(unet: UNet, batch: int, dtype: str, rounds: int) -> dict[str, Any]:
    """Measure the seconds of each operation, of all operations of a step, and of a step."""
    spec = spec_of(unet, batch, dtype)
    classes = unet.config.num_classes
    bank = TableBank([solvers.ddim(NoiseSchedule(), 1000)], spec.device)
    label = [i % classes for i in range(batch)] if classes else None
    state = State.create(torch.randn(batch, *spec.shape), bank, label=label)
    runner = native.prepare(unet, spec)
    runner.step(state)
    (compiled,) = runner.programs.values()
    engine = compiled.engine
    ops = np.array([engine.profile(0, len(engine)) for _ in range(rounds)]).min(axis=0) / 1e9
    steps, runs = [], []
    for _ in range(rounds):
        runs.append(mean_seconds(lambda: engine.run(0, len(engine))))
        steps.append(mean_seconds(lambda: runner.step(state)))
    return {"ops": ops.tolist(), "run": min(runs), "step": float(np.median(steps))}


def profiles(names: list[str], rounds: int) -> Iterator[dict[str, Any]]:
    for name in names:
        unet = network(name)
        for dtype in DTYPES:
            for batch in BATCHES[name]:
                found = profile(unet, batch, dtype, rounds if name != "ddpm-celebahq-256" else 3)
                yield {"network": name, "dtype": dtype, "batch": batch, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("profile")
    one.add_argument("out", type=Path)
    one.add_argument("--networks", default=",".join(BATCHES))
    one.add_argument("--rounds", type=int, default=ROUNDS)
    two = commands.add_parser("fit")
    two.add_argument("profiles", type=Path, nargs="+")
    two.add_argument("--dry", action="store_true", help="only print")
    arguments = parser.parse_args()
    if arguments.command == "profile":
        report: dict[str, Any] = {"machine": machine.header(), "ceilings": cost.ceilings().to_dict(), "profiles": []}
        print(json.dumps(report["ceilings"]), flush=True)
        for found in profiles(arguments.networks.split(","), arguments.rounds):
            report["profiles"].append(found)
            times = ", ".join(f"{k} {1e3 * v:.2f}" for k, v in found.items() if isinstance(v, float))
            ops = 1e3 * sum(found["ops"])
            print(f"{found['network']} {found['dtype']} {found['batch']}, ms: ops {ops:.2f}, {times}", flush=True)
            arguments.out.write_text(json.dumps(report) + "\n")
        return
    fit(arguments.profiles, arguments.dry)


def nonnegative(A: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Solve argmin |A x - b| over x >= 0 by trying every choice of the entries that may be positive."""
    best, least = np.zeros(A.shape[1]), np.linalg.norm(b)
    for chosen in itertools.product((False, True), repeat=A.shape[1]):
        x = np.zeros(A.shape[1])
        x[list(chosen)] = np.linalg.lstsq(A[:, chosen], b, rcond=None)[0]
        distance = np.linalg.norm(A @ x - b)
        if (x >= 0).all() and distance < least:
            best, least = x, distance
    return best


def fit(paths: list[Path], dry: bool) -> None:
    reports = [json.loads(path.read_text()) for path in paths]
    samples: dict[str, list[tuple[tuple[float, ...], float, float]]] = {}  # terms, seconds, share of the network's time
    steps = []
    unets: dict[str, UNet] = {}
    # On a shared machine the memory bandwidth changes by the minute, more than the time of an operation does.
    bandwidth = float(np.exp(np.mean([np.log(report["ceilings"]["memory_gbs"]) for report in reports])))
    for report in reports:
        found = cost.Ceilings(**{**report["ceilings"], "memory_gbs": bandwidth})
        for p in report["profiles"]:
            unet = unets.setdefault(p["network"], network(p["network"]))
            spec = spec_of(unet, p["batch"], p["dtype"])
            compiled = native.dry_program(unet, spec, p["batch"])
            did = [w for _, w in cost.work(compiled, found)]
            for w, seconds in zip(did, p["ops"], strict=True):
                samples.setdefault(w.kind, []).append((w.terms(found), seconds, seconds / sum(p["ops"])))
            parts, outside = p["batch"] / compiled.rows, cost.outside(spec, p["batch"])
            left = max(p["step"] - p["run"] * parts, 1e-6)
            samples.setdefault("step", []).append((outside.terms(found), left, left / p["step"]))
            steps.append((p, [(parts, w.kind, w.terms(found)) for w in did] + [(1.0, "step", outside.terms(found))]))
    factors = {}
    for kind, known in sorted(samples.items()):
        terms, seconds, share = (np.array(column) for column in zip(*known, strict=True))
        scale = np.sqrt(share) / seconds
        factors[kind] = [float(f"{v:.3g}") for v in nonnegative(terms * scale[:, None], seconds * scale)]
        error = np.average(np.abs(terms @ factors[kind] / seconds - 1), weights=share)
        print(f"{kind:22} {factors[kind]}, mean error {error:.2f} over {len(known)}")

    def seconds_of(did: list[tuple[float, str, tuple[float, ...]]]) -> float:
        return sum(parts * float(np.dot(factors[kind], terms)) for parts, kind, terms in did)

    # The fastest run of an operation is faster than usual, so all factors are scaled up to match whole steps.
    usual = float(np.median([p["step"] / seconds_of(did) for p, did in steps]))
    factors = {kind: [float(f"{v * usual:.3g}") for v in values] for kind, values in factors.items()}
    print(f"all factors times {usual:.3f}")
    for p, did in steps:
        predicted, took = 1e3 * seconds_of(did), 1e3 * p["step"]
        which = f"{p['network']:18} {p['dtype']:14} batch {p['batch']:2}"
        print(f"{which}: predicted {predicted:7.2f} ms, measured {took:7.2f} ms, ratio {predicted / took:.2f}")
    if not dry:
        cost.FACTORS.write_text(
            json.dumps(
                {
                    "source": "python benchmarks/calibrate.py (profile, then fit)",
                    "machine": reports[0]["machine"],
                    "ceilings": {**reports[0]["ceilings"], "memory_gbs": round(bandwidth, 1)},
                    "terms": ["products", "loaded", "stored", "weights", "activations", "microseconds"],
                    "factors": factors,
                },
                indent=1,
            )
            + "\n"
        )


if __name__ == "__main__":
    main()
