"""Measure bulk jobs: their throughput beside one sampler's loop, and a long one that is killed on the way.

    python benchmarks/bulk.py throughput fashion-mnist --n 4000 --steps 10
    python benchmarks/bulk.py soak fashion-mnist --n 50000 --steps 10 --out runs/soak

``throughput`` draws n images in turns: by one Sampler in one process of all threads, whose images are dropped, and by
`fastdiff generate`, which writes them. It prints the images/s of both, in the median of the rounds, their ratio, and
the time to the first shard. The speed of the sampler counts after a first batch, that of the job from when a tenth of
the images is drawn to the end of its last shard.

``soak`` runs `fastdiff generate` in a process group of its own and kills all of that with SIGKILL, at random moments
in equal parts of the job, and starts it again. At the end every shard is compared with its SHA-256, one image in a
hundred is drawn again, and the result is printed: times, images/s between the kills, and one SHA-256 of all records,
which a job that was not killed has too.

Nothing else should run meanwhile. Both print JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import fastdiff
from fastdiff import bulk
from fastdiff.bulk import job as jobs
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import JobError

TARGET = 0.97


def sampler_rate(model: str, n: int, options: dict[str, Any]) -> float:
    """Return the images/s of one Sampler that draws n images and drops them, after a first batch."""
    with fastdiff.Sampler.from_pretrained(model, determinism="bitwise") as sampler:
        classes = sampler.info.classes
        batch = sampler.request(n, **options).batch_size
        started = 0.0
        for first in (None, *range(0, n, batch)):
            indices = range(first or 0, min((first or 0) + batch, n))
            labels = None if classes is None else [i % classes for i in indices]
            to_uint8(sampler.sample(len(indices), start_index=indices[0], labels=labels, **options).images)
            if first is None:  # the weights are packed
                started = time.monotonic()
        return n / (time.monotonic() - started)


def job_rate(model: str, n: int, options: dict[str, Any], sharded: dict[str, int]) -> tuple[float, bulk.Report]:
    """Return the images/s of a job of n images, from when a tenth of them is drawn, and its report."""
    seen: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory() as folder:
        report = bulk.generate(
            model, n, Path(folder) / "job", progress=lambda p: seen.append((time.monotonic(), p.done)),
            **options, **sharded,
        )  # fmt: skip
    first, done = next((when, done) for when, done in seen if done >= n / 10)
    return (n - done) / max(seen[-1][0] - first, 1e-9), report


def throughput(model: str, n: int, rounds: int, options: dict[str, Any], sharded: dict[str, int]) -> dict[str, Any]:
    """Compare a job with a sampler's loop, in turns."""
    alone, job, first, reports = [], [], [], []
    for _ in range(rounds):
        alone.append(sampler_rate(model, n, options))
        rate, report = job_rate(model, n, options, sharded)
        job.append(rate)
        first.append(report.first_shard_s)
        reports.append(report)
    ratios = [b / a for a, b in zip(alone, job, strict=True)]
    return {
        "n": n,
        "workers": reports[0].workers,
        "threads": reports[0].threads,
        "shards": reports[0].shards,
        "sampler_images_per_s": statistics.median(alone),
        "job_images_per_s": statistics.median(job),
        "ratios": ratios,
        "ratio": statistics.median(ratios),
        "target": TARGET,
        "first_shard_s": statistics.median(first),
    }


def soak(model: str, n: int, out: Path, kills: int, seed: int, options: list[str], fraction: float) -> dict[str, Any]:
    """Draw a job that is killed on the way, and verify it."""
    rng = random.Random(seed)
    command = [sys.executable, "-m", "fastdiff", "generate", model, "--n", str(n), "--out", str(out), *options]
    runs = []
    for part in range(kills + 1):
        begun, before = time.monotonic(), images(out)
        share = None if part == kills else (part + rng.uniform(0.2, 1.0)) / (kills + 1)
        ended = run(command, out, None if share is None else round(share * n))
        seconds, done = time.monotonic() - begun, images(out)
        runs.append({"seconds": seconds, "images_before": before, "images_after": done, "killed": not ended,
                     "images_per_s": (done - before) / seconds})  # fmt: skip
        print(json.dumps(runs[-1]), file=sys.stderr, flush=True)
        if ended:
            break
    started = time.monotonic()
    verified = bulk.verify(out, fraction=fraction)
    digest = hashlib.sha256()
    records = [json.loads(path.read_text()) for path in sorted((out / "shards").glob("*.json"))]
    for record in records:
        digest.update(f"{record['start']} {record['sha256']} {record['pixels_sha256']}\n".encode())
    return {
        "n": n,
        "good": verified.good and not verified.problems,
        "problems": verified.problems,
        "redrawn_and_equal": verified.compared,
        "kills": sum(run["killed"] for run in runs),
        "runs": runs,
        "seconds": sum(run["seconds"] for run in runs),
        "verify_seconds": time.monotonic() - started,
        "shards": verified.shards,
        "shard_seconds": {"mean": statistics.mean(r["seconds"] for r in records),
                          "max": max(r["seconds"] for r in records)},
        "left_over": len([*out.rglob("*.tmp")]),
        "sha256": digest.hexdigest(),
    }  # fmt: skip


def images(out: Path) -> int:
    """Count the images of the finished shards; 0 before the job has begun."""
    with contextlib.suppress(JobError):
        job = jobs.read(out)
        return sum(len(job.indices(shard)) for shard in job.finished())
    return 0


def run(command: list[str], out: Path, until: int | None) -> bool:
    """Run a command; kill its whole group once so many images are there. Return whether it has ended by itself."""
    process = subprocess.Popen(command, start_new_session=True, stdout=subprocess.DEVNULL)
    try:
        while process.poll() is None:
            if until is not None and images(out) >= until:
                return False
            time.sleep(0.05)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    return True


def main() -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("throughput", "soak"))
    parser.add_argument("model", nargs="?", default="fashion-mnist")
    parser.add_argument("--n", type=int, default=50_000)
    parser.add_argument("--solver", default="ddim")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--shard-size", type=int)
    parser.add_argument("--rounds", type=int, default=3, help="of throughput")
    parser.add_argument("--kills", type=int, default=2, help="of soak")
    parser.add_argument("--seed", type=int, default=0, help="of the moments of soak's kills")
    parser.add_argument("--fraction", type=float, default=0.01, help="of soak's images that are drawn again")
    parser.add_argument("--out", type=Path, default=Path("out/soak"), help="the folder of soak's job, a new one")
    given = parser.parse_args()
    if given.what == "throughput":
        options = {"solver": given.solver, "steps": given.steps, "seed": 0}
        sharded = {} if given.shard_size is None else {"shard_size": given.shard_size}
        found = throughput(given.model, given.n, given.rounds, options, sharded)
    else:
        flags = ["--solver", given.solver, "--steps", str(given.steps)]
        flags += [] if given.shard_size is None else ["--shard-size", str(given.shard_size)]
        found = soak(given.model, given.n, given.out, given.kills, given.seed, flags, given.fraction)
    print(json.dumps(found, indent=1))
    return 0 if found.get("good", True) else 1


if __name__ == "__main__":
    sys.exit(main())
