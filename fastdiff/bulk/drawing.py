"""`generate`, which draws the images of a job that its folder lacks."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fastdiff import memory
from fastdiff.backends.native import cost
from fastdiff.backends.native import threads as native_threads
from fastdiff.bulk import job as jobs
from fastdiff.bulk import local, on_ray, trial
from fastdiff.bulk.job import Job
from fastdiff.bulk.ranks import share
from fastdiff.bulk.shards import SUFFIXES
from fastdiff.bulk.work import tidy, work
from fastdiff.checks import number, one_of, shown, whole
from fastdiff.core.noise import check_seed
from fastdiff.errors import BackendError, InvalidArgument
from fastdiff.sampler import Sampler

PATIENCE_S = 600.0
MAX_WORKERS = 1024
MAX_RANKS = 1 << 20
THREADS = 1  # of a worker: processes of one thread wait for nobody
SMALL = 5000  # network evaluations of a job that is worth no measurement
LIBRARIES = 512 << 20  # bytes of a process that has imported torch
LOOK_S = 1.0  # between two looks at the folder, for the progress


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a job is, over all processes and machines that work on it.

    Attributes:
        done: Images that are published, and those that the workers of this call have drawn besides.
        n: Images of the job.
        images_per_s: Images that were added in each second since this call began.
        seconds_left: Time that the rest takes at that speed; None before the first image.
    """

    done: int
    n: int
    images_per_s: float
    seconds_left: float | None


@dataclasses.dataclass(frozen=True)
class Report:
    """Result of `generate`.

    Attributes:
        folder: The folder of the job.
        images: Images of the job, all of which are there.
        drawn: Images that were missing when the call began; other machines may have drawn some of them.
        shards: Number of shards.
        workers: Worker processes of this call; 0 where it drew the images itself.
        threads: Threads of each.
        seconds: Time that the call took, loading and starting included.
        first_shard_s: Time until the first new shard was there; None if none was missing.
    """

    folder: Path
    images: int
    drawn: int
    shards: int
    workers: int
    threads: int
    seconds: float
    first_shard_s: float | None


def generate(
    model: str | Path | Sampler,
    n: int,
    out: str | Path,
    *,
    format: str = "npz",
    shard_size: int | None = None,
    labels: int | str | Sequence[int | str] | None = "cycle",
    prompts: str | Sequence[str] | None = None,
    seed: int = 0,
    workers: int | None = None,
    ray: str | None = None,
    ranks: int | None = None,
    patience_s: float = PATIENCE_S,
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    determinism: str | None = None,
    batch_size: int | None = None,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> Report:
    """Draw images 0 to n - 1 of a setting into a folder, and return when all are there.

    A call that was interrupted, in whatever way, is continued by the same call. Several calls, on one machine or on
    many that share the folder, divide the work. Shards have the same bytes however it was divided.

    Args:
        model: A built-in name, a diffusers folder or a checkpoint file, which each worker loads; or a sampler, with
            which this process draws the images itself.
        n: Number of images, at least 1.
        out: Folder of the job, a new one or one of the same job.
        format: Files of the shards: "npz" (arrays images, indices, labels), "webdataset" (a tar of .png, .cls and
            .json), "png" (a folder of PNGs), or "imagefolder" (the same with a metadata.jsonl).
        shard_size: Images of a shard, at least 1; None: at most 1000, fewer where there are few or large ones.
        labels: Class of the images, as numbers or names: "cycle" for all classes in turns, one class for all, a list
            whose entries the images take in turns, or None. Networks without classes have no labels.
        prompts: For a network that reads text: a text for all images, or a list whose entries they take in turns.
        seed: Seed of the noise, from 0 to 2^64 - 1.
        workers: Worker processes, each of one thread, or one for each GPU in turns. None: for each processor, as far as
            the memory suffices, or for each GPU. Where it takes long and the images do not depend on the number of
            threads, it is measured whether one process of all threads is faster.
        ray: Where actors of Ray are the workers: "local" for a Ray of this machine, "auto" for the cluster that this
            machine belongs to, or a cluster's address, as "10.0.0.1:6379". All machines share the folder and the
            model's files. None: processes of this machine are the workers.
        ranks: Number of completions, in an indexed job of Kubernetes; torchrun and Slurm arrays need none.
        patience_s: Seconds after which a worker that has drawn no batch is replaced.
        backend: As for `Sampler`, as are device, dtype and determinism.
        device: Device of the network.
        dtype: dtype of the network.
        determinism: None: "bitwise" where the backend has it, else "seed".
        batch_size: Images that a worker draws at a time; None: as many as suit the network's size.
        progress: Function that is called with a `Progress` about once a second.
        **options: Other options of `Sampler.sample` that can be written as JSON, as solver, steps and guidance.

    Returns:
        What was done.

    Raises:
        InvalidArgument: If an argument is not allowed, before anything heavy runs.
        JobError: If the folder belongs to another job, or has other files; every setting that differs is named.
        WriteError: If a file cannot be written, as on a full disk; what is finished is kept.
        WorkerError: If workers end again and again without finishing anything, or there is no connection to Ray.
        CheckpointError: If the model cannot be loaded; ``Sampler`` lists its other errors.
        NumericsError: If images became NaN or infinite; their shard is not written.
    """
    local.check_guarded()
    started = time.monotonic()
    _check(n, out, format, seed, patience_s, progress)
    if ray is not None:
        on_ray.check(ray)
    for name, value, most in (("shard_size", shard_size, jobs.MAX_IMAGES), ("workers", workers, MAX_WORKERS),
                              ("ranks", ranks, MAX_RANKS), ("batch_size", batch_size, None)):  # fmt: skip
        if value is not None:
            whole(name, value, 1, most, but="None")
    options = {**jobs.options_of(options), "seed": int(seed)}
    rank, world = share(ranks)
    if isinstance(model, Sampler):
        if workers is not None or ray is not None:
            given = f"workers={workers}" if ray is None else f"ray={ray}"
            raise InvalidArgument(f"{given}: workers load the model from its files; give its path, not a Sampler")
        asked = _asked(model, n, labels, prompts)
        job = _job(model, None, n, out, format, shard_size, asked, batch_size, options, torch.get_num_threads())
        jobs.begin(job)
        watch, used = _Watch(job, started, progress), (0, torch.get_num_threads())
        try:
            work(job, model, rank, world, patience_s, watch.add)
        finally:
            tidy(job)
    else:
        with _sampler(model, backend, device, dtype, determinism) as sampler:
            asked = _asked(sampler, n, labels, prompts)
            job = _job(sampler, model, n, out, format, shard_size, asked, batch_size, options, THREADS)
            needs = _Needs.of(sampler, job)
        del sampler  # each worker has its own
        jobs.begin(job)
        watch = _Watch(job, started, progress)
        try:
            used = _run(job, needs, workers, ray, (rank, world), patience_s, watch)
        finally:
            tidy(job)
    return watch.report(*used)


def _run(
    job: Job, needs: _Needs, workers: int | None, ray: str | None, share: tuple[int, int], patience_s: float,
    watch: _Watch,
) -> tuple[int, int]:  # fmt: skip
    """Run workers until the job is finished; return how many there were, and the threads of each."""
    most = len(watch.missing)
    if not most:
        return 0, THREADS
    folder = job.folder.resolve()
    if ray is not None:
        with on_ray.connected(ray):
            count = min(on_ray.number(workers, needs.device.type == "cuda"), most)
            on_ray.run(folder, count, needs.device.type == "cuda", THREADS, share, patience_s, watch.look)
        return count, THREADS
    gpus: list[str] = []
    threads = THREADS
    if needs.device.type == "cpu":
        count = min(_number(workers, needs.bytes_each), most)
        if workers is None and job.settings["threads"] is None:
            count, threads = _choice(job, count, needs.seconds * most / len(job.shards))
    else:
        gpus = local.gpus(needs.device.index) if needs.device.type == "cuda" else []
        count = min(workers or len(gpus) or 1, most)
    local.run(folder, count, threads, share, patience_s, watch.look, gpus)
    return count, threads


def _choice(job: Job, workers: int, seconds: float) -> trial.Workers:
    """Choose between so many processes, which share the processors, and one; a measurement is for long jobs."""
    processors = native_threads.number()
    many, one = (workers, max(1, processors // workers)), (1, processors)
    return trial.faster(job.folder, [many, one]) if many != one and seconds > trial.WORTH_S else many


def _check(n: Any, out: Any, format: Any, seed: Any, patience_s: Any, progress: Any) -> None:
    """Check the arguments that depend on no model."""
    whole("n", n, 1, jobs.MAX_IMAGES)
    one_of("format", format, tuple(SUFFIXES))
    check_seed(seed)
    number("patience_s", patience_s, above=0)
    if not isinstance(out, (str, os.PathLike)) or not os.fspath(out) or "\0" in str(out):
        raise InvalidArgument(f"out={shown(out)}: the path of a folder is needed")
    if progress is not None and not callable(progress):
        raise InvalidArgument(f"progress={shown(progress)}: a function (Progress) or None is needed")


def _sampler(
    model: str | Path, backend: str, device: str | None, dtype: str | None, determinism: str | None
) -> Sampler:
    """Load the model; without a determinism, with the strictest that its backend has."""
    if determinism is None:
        try:
            return Sampler.from_pretrained(model, backend, device, dtype, "bitwise")
        except BackendError:
            determinism = "seed"
    return Sampler.from_pretrained(model, backend, device, dtype, determinism)


def _asked(sampler: Sampler, n: int, labels: Any, prompts: Any) -> jobs.Asked:
    """Return what the images show, of arguments of `generate`."""
    return {
        "labels": jobs.repeated_labels(labels, n, sampler),
        "prompts": jobs.repeated_prompts(prompts, n, sampler),
    }


def _job(
    sampler: Sampler, model: str | Path | None, n: int, out: str | Path, format: str, shard_size: int | None,
    asked: jobs.Asked, batch_size: int | None, options: dict[str, Any], threads: int,
) -> Job:  # fmt: skip
    """Return the job that the arguments describe."""
    settings = jobs.settings(sampler, n, options, asked, format, shard_size, batch_size, threads)
    if model is not None and Path(model).exists():
        model = Path(model).resolve()
    batch = jobs.request(sampler, min(n, settings["shard_size"]), options, asked, batch_size).batch_size
    call = {"model": None if model is None else str(model), "batch_size": batch, "options": options}
    return Job(Path(out), settings, call)


@dataclasses.dataclass(frozen=True)
class _Needs:
    """Needs of the workers of a job: a device, memory, and time."""

    device: torch.device
    bytes_each: int  # libraries, weights (read, and packed), a batch's activations, a shard
    seconds: float  # of the whole job on all processors; 0 where the number of threads is fixed or nothing is predicted

    @classmethod
    def of(cls, sampler: Sampler, job: Job) -> _Needs:
        """Estimate them."""
        weights = sum(p.numel() * 4 for p in sampler.unet.parameters())
        h, w, c = job.shape
        batch = job.call["batch_size"]
        activations, shard = batch * sampler.info.activation_bytes((h, w)), 8 * len(job.indices(0)) * h * w * c
        seconds = 0.0
        r = jobs.request(sampler, 1, job.call["options"], job.asks(range(1)), 1)
        # The first prediction of a process takes a second.
        if job.settings["threads"] is None and sampler.backend == "native" and job.n * r.nfe >= SMALL:
            found = cost.estimate(
                sampler.unet, (h, w), job.n, r.nfe, batch, job.settings["dtype"], guided=r.nfe > len(r.table)
            )
            seconds = found.seconds or 0.0
        return cls(sampler.device, LIBRARIES + 3 * weights + activations + shard, seconds)


def _number(workers: int | None, bytes_each: int) -> int:
    """Return the number of workers: as given, or as many as the processors and the free memory allow."""
    if workers is not None:
        return workers
    free = memory.free()
    most = native_threads.number()
    return max(1, most if free is None else min(most, free // bytes_each))


class _Watch:
    """The progress of a job, seen from this process."""

    def __init__(self, job: Job, started: float, progress: Callable[[Progress], None] | None):
        self._job, self._progress = job, progress
        self._started, self._began = started, time.monotonic()
        there = job.finished()
        self.missing = [shard for shard in job.shards if shard not in there]
        self._before = self._published(there)
        self._first: float | None = None
        self._last = -LOOK_S
        self._flying, self._shown = 0, -1
        self._show(0)

    def add(self, images: int, published: bool) -> None:
        """Count images that this process has drawn, or published."""
        self._flying += -images if published else images
        self.look(self._flying)

    def look(self, flying: int) -> None:
        """Look at the folder, at most once a second; ``flying`` images are drawn, but not yet published."""
        if time.monotonic() - self._last >= LOOK_S:
            self._last = time.monotonic()
            self._show(flying)

    def report(self, workers: int, threads: int) -> Report:
        """Return the report of the finished job."""
        self._show(0)
        job = self._job
        return Report(
            folder=job.folder,
            images=job.n,
            drawn=job.n - self._before,
            shards=len(job.shards),
            workers=workers,
            threads=threads,
            seconds=time.monotonic() - self._started,
            first_shard_s=self._first,
        )

    def _show(self, flying: int) -> None:
        n = self._job.n
        published = self._published(self._job.finished())
        now = time.monotonic()
        if published > self._before and self._first is None:
            self._first = now - self._started
        done = min(published + max(flying, 0), n)
        if self._progress is None or (done == n == self._shown):
            return
        self._shown = done
        rate = (done - self._before) / max(now - self._began, 1e-9)
        self._progress(Progress(done, n, rate, (n - done) / rate if rate > 0 else None))

    def _published(self, there: set[int]) -> int:
        return sum(len(self._job.indices(shard)) for shard in there)
