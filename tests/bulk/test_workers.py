"""Worker processes, and the command line: real runs, with processes that are killed and stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

from fastdiff import bulk, cli
from fastdiff.bulk import job as jobs
from fastdiff.bulk import local, watching
from fastdiff.errors import CheckpointError, JobError, WorkerError, WriteError
from tests.bulk.jobs import N, begun, draw, files, leftovers, saved, tiny

linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny")


def job_with_model(folder: Path, model: str) -> jobs.Job:
    job = begun(folder, tiny())
    document = json.loads((folder / "job.json").read_text())
    document["call"]["model"] = model
    (folder / "job.json").write_text(json.dumps(document))
    return job


def command(model: str, out: Path, *options: str) -> list[str]:
    return ["generate", model, "--out", str(out), "--steps", "1", "--shard-size", "4", "--batch-size", "3", *options]


@contextlib.contextmanager
def running(arguments: list[str], **environment: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", *arguments], text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment}, start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def children(pid: int) -> list[int]:
    """Return the worker processes of a process; a spawned one is of multiprocessing, as is its resource tracker."""
    found = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [int(child) for child in found if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes()]


def until(condition: Callable[[], Any], seconds: float = 120) -> Any:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        with contextlib.suppress(OSError):
            value = condition()
            if value:
                return value
        time.sleep(0.02)
    raise AssertionError("it did not happen")


@pytest.mark.slow  # three processes, which import torch; make bulk-check runs it
def test_workers_draw_what_one_process_draws(tmp_path: Path, model: str) -> None:
    draw(tiny(), tmp_path / "a")
    seen: list[bulk.Progress] = []
    report = draw(model, tmp_path / "b", workers=2, progress=seen.append)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert (report.workers, report.drawn, seen[-1].done) == (2, N, N)
    assert leftovers(tmp_path) == []
    again = draw(model, tmp_path / "b", workers=2)
    assert (again.workers, again.drawn, again.first_shard_s) == (0, 0, None)


@linux
@pytest.mark.slow
def test_dead_and_stopped_workers_are_replaced(tmp_path: Path, model: str) -> None:
    draw(tiny(), tmp_path / "a", n=1200)
    out = tmp_path / "b"
    arguments = command(model, out, "--n", "1200", "--workers", "3", "--patience", "60", "--json")
    with running(["fastdiff", *arguments]) as process:
        until(lambda: list(out.glob("shards/*.json")))
        first = children(process.pid)
        assert len(first) == 3
        os.kill(first[0], signal.SIGKILL)
        os.kill(first[1], signal.SIGSTOP)
        out_text, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "worker 0 ended with exit code -9" in err or "ended with exit code -9" in err
    assert json.loads(out_text)["images"] == 1200
    assert files(tmp_path / "a") == files(out)
    assert leftovers(out) == []


@linux
@pytest.mark.slow
def test_workers_end_with_their_killed_parent(tmp_path: Path, model: str) -> None:
    out = tmp_path / "a"
    arguments = ["fastdiff", *command(model, out, "--n", "40000", "--workers", "2")]
    with running(arguments) as process:
        until(lambda: list(out.glob("shards/*.json")))
        workers = children(process.pid)
        process.kill()
        process.wait()
        until(lambda: not any(Path(f"/proc/{worker}").exists() for worker in workers), 20)
    with running(arguments) as process:  # and goes on; Ctrl-C is a graceful end
        count = len(list(out.glob("shards/*.json")))
        until(lambda: len(list(out.glob("shards/*.json"))) > count + 1)
        workers = children(process.pid)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "the same command goes on" in err
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert leftovers(out) == []


@pytest.mark.slow
def test_torchrun_and_an_indexed_job(tmp_path: Path, model: str) -> None:
    draw(tiny(), tmp_path / "a")
    torchrun = ["torch.distributed.run", "--nproc-per-node", "2", "-m", "fastdiff"]
    with running([*torchrun, *command(model, tmp_path / "b", "-n", str(N))]) as process:  # it takes --n for its own
        _, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with contextlib.ExitStack() as stack:
        options = ("--n", str(N), "--ranks", "2", "--workers", "1")
        pods = [
            stack.enter_context(
                running(["fastdiff", *command(model, tmp_path / "c", *options)], JOB_COMPLETION_INDEX=str(index))
            )
            for index in range(2)
        ]
        for pod in pods:
            _, err = pod.communicate(timeout=300)
            assert pod.returncode == 0, err
    assert files(tmp_path / "a") == files(tmp_path / "c")


def test_a_worker_that_never_finishes_anything_is_an_error(tmp_path: Path, model: str) -> None:
    job_with_model(tmp_path / "a", model)
    with pytest.raises(WorkerError, match=r"worker 0 has drawn nothing in 0 s, the 3rd time"):
        local.run(tmp_path / "a", 1, 1, (0, 1), 0.001, lambda _: None)


def test_errors_of_workers_are_raised_here(tmp_path: Path) -> None:
    job_with_model(tmp_path / "a", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="gone"):
        local.run(tmp_path / "a", 1, 1, (0, 1), 600, lambda _: None)
    error = watching.error("WriteError", "disk", 28)
    assert isinstance(error, WriteError)
    assert error.errno == 28
    assert isinstance(watching.error("JobError", "other", None), JobError)
    for name in ("logging", "printable", "_LINE", "Nonsense", "ValueError"):
        assert isinstance(watching.error(name, "x", None), WorkerError)


# The command line -----------------------------------------------------------------------------------------------------

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Call:
    """Run ``fastdiff`` in this process: (exit code, standard output, standard error)."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out, err = capsys.readouterr()
        return int(stop.value.code or 0), out, err

    return run


@pytest.mark.slow  # 8 s; `make bulk-check` runs it
def test_commands(tmp_path: Path, model: str, call: Call) -> None:
    """The four commands one after another, with the errors that a job's folder can have."""
    (tmp_path / "labels.txt").write_text("3\n1\n#2\n", encoding="utf-8")
    arguments = command(model, Path("job"), "--n", "6", "--labels", "labels.txt", "--workers", "1")
    code, out, err = call(*arguments)
    assert code == 0, err
    assert "job: 6 images in 2 shards, 6 of them new" in out
    assert re.search(r"s, the first shard after [\d.]+ s, 1 workers of 1 thread", out)
    assert "0 of 6 images\n" in err
    assert "6 of 6 images, " in err
    code, out, _ = call(*arguments, "--json")
    assert code == 0
    assert json.loads(out)["drawn"] == 0
    code, out, err = call(*arguments, "--seed", "1")
    assert (code, out) == (3, "")
    assert "\n  seed: 0 there, 1 here" in err

    code, out, _ = call("verify", "job")
    assert (code, out) == (0, "job: 6 images in 2 shards: all good\n")
    code, _, _ = call("export", "job", "--adm", "s.npz", "--folder", "pngs", "--webdataset", "tars")
    assert code == 0
    with np.load("s.npz") as file:
        assert file["arr_1"].tolist() == [3, 1, 2, 3, 1, 2]
    assert len(list(Path("pngs").glob("*.png"))) == 6
    code, out, err = call("export", "job")
    assert code == 2
    assert err.startswith("error: ")

    Path("job/shards/000001.npz").unlink()
    code, out, _ = call("verify", "job", "--json")
    assert code == 1
    assert json.loads(out)["problems"].keys() == {"000001"}
    code, out, _ = call("verify", "job")
    assert code == 1
    assert "1 shards are not good" in out
    code, out, _ = call("verify", "job", "--redraw", "--fraction", "0.5")
    assert code == 0
    assert "drawn anew" in out
    code, _, err = call("verify", ".")
    assert code == 2
    assert "no job.json" in err


@pytest.mark.parametrize("name", ["generate", "verify", "export"])
def test_examples_of_the_help_are_commands(name: str) -> None:
    group = typer.main.get_command(cli.app)
    command = group.commands[name]  # type: ignore[attr-defined]
    lines = re.findall(r"^\s*(?:fastdiff|torchrun .* -m fastdiff) (.*)$", command.callback.__doc__, re.MULTILINE)
    assert len(lines) >= 2
    for line in lines:
        command.make_context(name, line.split()[1:])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--workers", "many"), "--workers many: auto"),
        (("--workers", "0"), "workers=0"),
        (("--labels", "none.txt"), "no such file"),
        (("--labels", "x"), "'x'"),
        (("--labels", ""), "label"),
        (("--format", "jpg"), "format='jpg'"),
        (("--n", "0"), "n=0"),
        (("--size", "a"), "--size a"),
        (("--ranks", "3"), "JOB_COMPLETION_INDEX"),
    ],
)
def test_bad_options(options: tuple[str, str], words: str, model: str, call: Call) -> None:
    code, out, err = call(*command(model, Path("job"), "--n", "4", *options))
    assert (code, out) == (2, "")
    assert words in err
    assert not Path("job").exists()
