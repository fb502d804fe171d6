"""Jobs that are cut, done twice, or run on a full disk: the files are always those of an uninterrupted job."""

from __future__ import annotations

import builtins
import contextlib
import errno
import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdiff import bulk
from fastdiff.bulk import claims as claiming
from fastdiff.bulk import job as jobs
from fastdiff.bulk import shards
from fastdiff.bulk.claims import Claims
from fastdiff.bulk.job import Job
from fastdiff.bulk.work import order, tidy, work
from fastdiff.errors import FastdiffError, JobError, WriteError
from fastdiff.sampler import Sampler
from tests.bulk.jobs import begun, draw, files, leftovers, tiny
from tests.support.checkpoints import needs_posix

FORK: Any = multiprocessing.get_context("fork" if os.name != "nt" else "spawn")
FORMATS = ("npz", "png", "webdataset", "imagefolder")


@contextlib.contextmanager
def processes(*calls: tuple[Any, ...]) -> Iterator[list[Any]]:
    """Start forked processes, each with a function and its arguments, and end them."""
    started = [FORK.Process(target=call[0], args=call[1:]) for call in calls]
    for process in started:
        process.start()
    try:
        yield started
    finally:
        for process in started:
            process.kill()
            process.join()


def job_of(folder: Path, sampler: Sampler, n: int, format: str) -> Job:
    """Write the job.json of a job with many small shards."""
    settings = jobs.settings(
        sampler, n, {"steps": 1, "seed": 0}, {"labels": [0, 1, 2, 3], "prompts": None}, format, 4, 3, 1
    )
    job = Job(folder, settings, {"model": None, "batch_size": 3, "options": {"steps": 1, "seed": 0}})
    jobs.begin(job)
    return job


# Dying processes ------------------------------------------------------------------------------------------------------


def kill_at_random(tmp_path: Path, kills: int, seed: int, n: int = 120) -> None:
    """Run jobs with three workers, of which one or all are killed again and again, until enough were."""
    rng, sampler, folder = random.Random(seed), tiny(), 0
    whole = {}
    for format in FORMATS:
        work(job_of(tmp_path / format, sampler, n, format), sampler)
        whole[format] = files(tmp_path / format)
    while kills > 0:
        format = rng.choice(FORMATS)
        out = tmp_path / f"{folder}"
        folder += 1
        job = job_of(out, sampler, n, format)
        workers: list[Any] = [None] * 3
        try:
            while len(job.finished()) < len(job.shards):
                for rank in range(3):
                    if workers[rank] is None or not workers[rank].is_alive():
                        workers[rank] = FORK.Process(target=work, args=(job, sampler, rank, 3))
                        workers[rank].start()
                if kills > 0:
                    time.sleep(rng.uniform(0, 0.3))
                    for victim in rng.choice([[0], [1], [2], [0, 1, 2]]):
                        kills -= workers[victim].is_alive()
                        workers[victim].kill()
                        workers[victim].join()
                else:
                    time.sleep(0.02)
        finally:
            for worker in workers:
                if worker is not None:
                    worker.join(60)
        tidy(job)
        assert files(out) == whole[format], format
        assert leftovers(out) == []
        assert bulk.verify(out).problems == {}


@needs_posix
def test_kills_change_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 12, seed=1, n=60)


@needs_posix
@pytest.mark.slow
def test_a_hundred_kills_change_nothing(tmp_path: Path) -> None:
    kill_at_random(tmp_path, 100, seed=2)


@needs_posix
@pytest.mark.parametrize("world", [2, 3])
def test_the_number_of_processes_changes_nothing(tmp_path: Path, world: int) -> None:
    sampler = tiny()
    work(begun(tmp_path / "one", sampler), sampler)
    job = begun(tmp_path / "many", sampler)
    with processes(*[(work, job, sampler, rank, world) for rank in range(world)]) as ranks:
        for rank in ranks:
            rank.join(120)
            assert rank.exitcode == 0
    tidy(job)
    assert files(tmp_path / "one") == files(tmp_path / "many")


def test_ranks_begin_with_their_own_and_take_what_is_left() -> None:
    for world in (1, 2, 3, 7):
        orders = [order(10, rank, world) for rank in range(world)]
        assert all(sorted(o) == list(range(10)) for o in orders)
        own = [o[: len(range(rank, 10, world))] for rank, o in enumerate(orders)]
        assert sorted(shard for shards in own for shard in shards) == list(range(10))
    assert order(7, 1, 3) == [1, 4, 6, 5, 3, 2, 0]


def hold(folder: Path, ready: Any) -> None:
    with Claims(folder) as claims, claims.claim(1) as mine:
        assert mine
        ready.set()
        time.sleep(600)


@needs_posix
def test_a_claim_ends_with_its_process(tmp_path: Path) -> None:
    ready = FORK.Event()
    with processes((hold, tmp_path, ready)) as (holder,), Claims(tmp_path) as claims:
        assert ready.wait(60)
        with claims.claim(1) as mine:
            assert not mine
        with claims.claim(2) as mine:
            assert mine
        os.kill(holder.pid, signal.SIGSTOP)
        with claims.claim(1) as mine:
            assert not mine
        holder.kill()
        holder.join()
        with claims.claim(1) as mine:
            assert mine
            with Claims(tmp_path):  # closing it frees what this process has claimed, which costs time alone
                pass


@needs_posix
def test_the_shard_of_a_hanging_process_is_drawn(tmp_path: Path) -> None:
    sampler, ready = tiny(), FORK.Event()
    job = begun(tmp_path / "a", sampler)
    with processes((hold, job.folder, ready)) as (holder,):
        assert ready.wait(60)
        os.kill(holder.pid, signal.SIGSTOP)
        waited: list[int] = []
        work(job, sampler, 0, 1, patience_s=0.4, drawn=lambda images, _: waited.append(images))
    assert 0 in waited  # a sign of life while there was nothing to draw
    work(begun(tmp_path / "b", sampler), sampler)
    assert files(tmp_path / "a") == files(tmp_path / "b")


@pytest.mark.parametrize("format", FORMATS)
def test_two_processes_that_finish_a_shard_leave_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str
) -> None:
    """Both publish at the same time, as where a file system has no locks."""
    job = begun(tmp_path / "a", tiny(), format=format)
    barrier, publish = threading.Barrier(2), shards.publish

    def together(path: Path, content: shards.Content) -> None:
        barrier.wait(60)
        publish(path, content)
        barrier.wait(60)

    monkeypatch.setattr(shards, "publish", together)
    failed: list[BaseException] = []

    def run() -> None:
        try:
            work(job, tiny())
        except BaseException as e:
            failed.append(e)
            barrier.abort()

    threads = [threading.Thread(target=run) for _ in range(2)]
    monkeypatch.setattr(Job, "is_finished", lambda self, shard: False)  # both saw that nothing was there
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(120)
    assert not failed
    monkeypatch.undo()
    work(begun(tmp_path / "b", tiny(), format=format), tiny())
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert leftovers(tmp_path) == []


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
@needs_posix
def test_file_systems_without_locks_or_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    import fcntl

    draw(tiny(), tmp_path / "a")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "lockf", fail)
    if code != errno.ENOLCK:
        monkeypatch.setattr(os, "link", fail)
    draw(tiny(), tmp_path / "b")
    assert files(tmp_path / "a") == files(tmp_path / "b")


@needs_posix
def test_only_a_process_that_is_alone_deletes_temporary_files(tmp_path: Path) -> None:
    sampler = tiny()
    job = begun(tmp_path / "a", sampler)
    other = job.folder / "shards" / ".fastdiff-1-00.tmp"
    other.mkdir(parents=True)
    ready = FORK.Event()

    def present() -> None:
        with Claims(job.folder) as claims:
            claims.alone()
            ready.set()
            time.sleep(600)

    with processes((present,)):
        assert ready.wait(60)
        tidy(job)
        assert other.exists()
    tidy(job)
    assert not other.exists()


def test_clocks_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The time of day jumps at every look, and files are from the future and from the past."""
    draw(tiny(), tmp_path / "a", n=8, format="webdataset")
    now = [0.0]

    def jumping() -> float:
        now[0] = 4e9 - now[0]
        return now[0]

    monkeypatch.setattr(time, "time", jumping)
    job = tmp_path / "b"
    draw(tiny(), job, n=8, format="webdataset")
    (job / "shards" / "000001.json").unlink()
    for path in [*job.rglob("*")]:
        os.utime(path, (4e9, 4e9) if path.suffix == ".json" else (1, 1))
    draw(tiny(), job, n=8, format="webdataset")
    assert files(tmp_path / "a") == files(job)


# Failing writes -------------------------------------------------------------------------------------------------------

CALLS = ("open", "fsync", "link", "replace", "rename", "mkdir", "unlink")


class FailingFile:
    """A file that writes half of what it is given when its turn to fail comes."""

    def __init__(self, file: Any, turn: Callable[[], OSError | None]):
        self._file, self._turn = file, turn

    def __enter__(self) -> FailingFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self._file.close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)

    def write(self, data: Any) -> int:
        error = self._turn()
        if error is not None:
            self._file.write(bytes(data)[: len(data) // 2])
            raise error
        return int(self._file.write(data))


@contextlib.contextmanager
def failing(monkeypatch: pytest.MonkeyPatch, folder: Path, number: int, code: int) -> Iterator[list[str]]:
    """Let the call of this number that changes a file in the folder fail; yield the list of the calls."""
    calls: list[str] = []

    def turn(name: str) -> OSError | None:
        calls.append(name)
        return OSError(code, os.strerror(code)) if len(calls) == number + 1 else None

    def patched(name: str, real: Any) -> Any:
        def call(first: Any, *arguments: Any, **options: Any) -> Any:
            if isinstance(first, int) or str(first).startswith(str(folder)):
                error = turn(name)
                if error is not None:
                    raise error
            return real(first, *arguments, **options)

        return call

    def opening(real: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            return FailingFile(real(*arguments, **options), lambda: turn("write"))

        return call

    with monkeypatch.context() as p:
        for name in CALLS:
            p.setattr(os, name, patched(name, getattr(os, name)))
        p.setattr(os, "fdopen", opening(os.fdopen))
        p.setattr(shards, "open", opening(builtins.open), raising=False)
        yield calls


@needs_posix
@pytest.mark.parametrize(
    ("format", "code"),
    [
        ("imagefolder", errno.EIO),
        *[pytest.param(f, c, marks=pytest.mark.slow) for f in FORMATS for c in (errno.ENOSPC, errno.EIO, errno.EDQUOT)],
    ],
)
def test_every_write_may_fail(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, format: str, code: int) -> None:
    sampler = tiny()
    options: dict[str, Any] = {"n": 2, "shard_size": 1, "format": format}
    draw(sampler, tmp_path / "whole", **options)
    whole = files(tmp_path / "whole")
    failed = 0
    for number in range(1000):
        out = tmp_path / f"{number}"
        error = None
        with failing(monkeypatch, out, number, code) as calls:
            try:
                draw(sampler, out, **options)
            except FastdiffError as e:
                error = e
        if len(calls) <= number:
            break
        failed += error is not None
        if error is not None:
            assert isinstance(error, WriteError | JobError), calls
            assert str(out) in str(error), calls
            assert os.strerror(code) in str(error), calls
        draw(sampler, out, **options)
        assert files(out) == whole, calls
        assert leftovers(out) == [], calls
    assert failed > 10
    assert {"write", "fsync", "open"} <= set(calls)


@needs_posix
@pytest.mark.parametrize("form", ["adm", "folder", "webdataset"])
def test_a_failed_export_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    draw(tiny(), tmp_path / "job", n=3, shard_size=2)
    for number in (0, 1, 2, 3, 5):
        out = tmp_path / "out" / "a.npz"
        full = failing(monkeypatch, tmp_path / "out", number, errno.ENOSPC)
        with full as calls, pytest.raises(WriteError, match="No space left"):
            bulk.export(tmp_path / "job", **{form: out})
        assert len(calls) > number
        assert not out.exists()
        assert leftovers(tmp_path) == [] or "unlink" in calls
    bulk.export(tmp_path / "job", **{form: out})


def test_no_lock_module_is_needed_to_read(tmp_path: Path) -> None:
    """A file that cannot be opened for claims is an error that names it."""
    (tmp_path / claiming.NAME).mkdir()
    with pytest.raises(WriteError, match="claims could not be opened"):
        Claims(tmp_path)
