"""Small jobs that tests of `fastdiff.bulk` draw, and what they compare of the folders."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch

from fastdiff import bulk, checkpoints
from fastdiff.bulk import job as jobs
from fastdiff.bulk.job import Job
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetConfig
from tests.support.unets import TINY_CLASSES, random_unet

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
N, SHARD = 14, 4  # four shards, the last one of two images


def tiny(config: UNetConfig = TINY_CLASSES, seed: int = 0, **options: Any) -> Sampler:
    """Make a sampler of four classes, 3 x 8 x 8, with random weights."""
    return Sampler(
        random_unet(config, seed), SCHEDULE, **{"determinism": "bitwise", "class_names": list("abcd"), **options}
    )


def draw(sampler: Sampler | str, out: Path, n: int = N, **options: Any) -> bulk.Report:
    """Draw the job of these tests, or one that differs from it."""
    return bulk.generate(sampler, n, out, **{"steps": 1, "shard_size": SHARD, "batch_size": 3, **options})


def saved(folder: Path) -> str:
    """Write the network of `tiny` to a folder."""
    checkpoints.save_folder(folder, random_unet(TINY_CLASSES), SCHEDULE, class_names=list("abcd"))
    return str(folder)


def files(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every file of a job; of a record, its contents without the seconds."""
    found = {}
    for path in sorted(p for p in folder.rglob("*") if p.is_file() and p.name != "claims"):
        data = path.read_bytes()
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and path.parent.name == "shards":
            record = json.loads(data)
            assert record.pop("seconds") >= 0
            data = json.dumps(record).encode()
        if name == jobs.NAME:
            data = json.dumps(json.loads(data)["settings"]).encode()
        found[name] = hashlib.sha256(data).hexdigest()
    return found


def begun(folder: Path, sampler: Sampler, **options: Any) -> Job:
    """Write the job.json of the job of these tests alone."""
    call, asked = {"steps": 1, "seed": 0}, {"labels": [0, 1, 2, 3], "prompts": None}
    threads = torch.get_num_threads()
    settings = jobs.settings(sampler, N, call, asked, options.get("format", "npz"), SHARD, 3, threads)
    job = Job(folder, settings, {"model": None, "batch_size": 3, "options": {"steps": 1, "seed": 0}})
    jobs.begin(job)
    return job


def leftovers(folder: Path) -> list[str]:
    """List the temporary files in a folder."""
    return [name for _, folders, names in os.walk(folder) for name in (*folders, *names) if name.endswith(".tmp")]
