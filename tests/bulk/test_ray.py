"""Actors of Ray as workers. `make bulk-check` installs Ray and runs all of this; most tests need the real one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fastdiff import bulk
from fastdiff.bulk import on_ray
from fastdiff.errors import CheckpointError, InvalidArgument, WorkerError
from tests.bulk.jobs import N, draw, files, leftovers, saved, tiny
from tests.bulk.test_workers import command, job_with_model, running, until


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return saved(tmp_path_factory.mktemp("model") / "tiny")


@pytest.mark.parametrize(
    "address",
    ["", "cluster", "ray://10.0.0.1:1", "10.0.0.1", "10.0.0.1:", "a b:1", "http://x:1", 3, True, "local "],
)
def test_addresses_that_are_none(tmp_path: Path, model: str, address: Any) -> None:
    with pytest.raises(InvalidArgument, match=r"^ray=.*'local', 'auto' or an address"):
        draw(model, tmp_path / "a", ray=address)
    assert list(tmp_path.iterdir()) == []


def test_without_ray_its_extra_is_named(tmp_path: Path, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InvalidArgument, match=r"ray= needs Ray.*pip install 'fastdiff\[ray\]'"):
        draw(model, tmp_path / "a", ray="local")
    assert list(tmp_path.iterdir()) == []


def test_a_sampler_in_memory_has_no_actors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(on_ray, "check", lambda address: None)
    with pytest.raises(InvalidArgument, match="ray=local: workers load the model"):
        draw(tiny(), tmp_path / "a", ray="local")


def test_more_actors_than_free_processors_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """They would wait for ever."""

    class Ray:
        available_resources = staticmethod(lambda: {"CPU": 3.0, "GPU": 1.0})
        cluster_resources = staticmethod(lambda: {"CPU": 8.0, "GPU": 2.0})

    monkeypatch.setattr(on_ray, "_package", lambda: Ray)
    assert [on_ray.number(n, False) for n in (None, 1, 3)] == [3, 1, 3]
    assert on_ray.number(None, True) == 1
    with pytest.raises(InvalidArgument, match="workers=4: the cluster has 8 CPUs, of which 3 are free"):
        on_ray.number(4, False)
    with pytest.raises(InvalidArgument, match="workers=2: the cluster has 2 GPUs, of which 1 are free"):
        on_ray.number(2, True)
    monkeypatch.setattr(Ray, "available_resources", staticmethod(dict))
    with pytest.raises(InvalidArgument, match="of which 0 are free"):
        on_ray.number(None, False)


@pytest.mark.parametrize("address", ["127.0.0.1:9", "[::1]:9", "127.0.0.1:99999", "no-such-machine.invalid:6379"])
def test_a_cluster_that_does_not_answer_is_named(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    class Ray:
        is_initialized = staticmethod(lambda: False)

    monkeypatch.setattr(on_ray, "_package", lambda: Ray)
    on_ray.check(address)
    with (
        pytest.raises(WorkerError, match=re.escape(f"ray={address}: there is no connection (")),
        on_ray.connected(address),
    ):
        raise AssertionError("there was an answer")


# With Ray -------------------------------------------------------------------------------------------------------------

OPEN = {"RAY_AUTH_MODE": "disabled"}  # of a cluster: there is no token to be had in a file


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """Connect this process to a Ray of two processors."""
    ray = pytest.importorskip("ray", reason="the extra `ray`, a wheel of 79 MB, is not in the extras of development")
    ray.init("local", num_cpus=2, include_dashboard=False, object_store_memory=on_ray.OBJECTS, log_to_driver=False)
    yield ray
    ray.shutdown()


def actors() -> list[int]:
    """Return the processes that are actors of fastdiff; Ray gives them this name."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cmdline").read_bytes().startswith(b"ray::_Drawer"):
                found.append(int(path.name))
    return found


@pytest.mark.slow
def test_actors_draw_what_one_process_draws(tmp_path: Path, model: str, cluster: Any) -> None:
    draw(tiny(), tmp_path / "a")
    seen: list[bulk.Progress] = []
    report = draw(model, tmp_path / "b", ray="local", workers=2, progress=seen.append)
    assert (report.workers, report.threads, report.drawn, seen[-1].done) == (2, 1, N, N)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    assert leftovers(tmp_path) == []
    assert draw(model, tmp_path / "b", ray="local").workers == 0
    assert cluster.is_initialized()  # the connection was this process's, and stays
    until(lambda: not actors())
    with pytest.raises(InvalidArgument, match="workers=3: the cluster has 2 CPUs"):
        draw(model, tmp_path / "c", ray="local", workers=3)


@pytest.mark.slow
def test_errors_of_actors_are_raised_here(tmp_path: Path, cluster: Any) -> None:
    job_with_model(tmp_path / "a", str(tmp_path / "gone"))
    with pytest.raises(CheckpointError, match="gone"):
        on_ray.run(tmp_path / "a", 1, False, 1, (0, 1), 600, lambda _: None)


@pytest.mark.slow
def test_an_actor_that_never_finishes_anything_is_an_error(tmp_path: Path, model: str, cluster: Any) -> None:
    job_with_model(tmp_path / "a", model)
    with pytest.raises(WorkerError, match="has drawn nothing in 0 s, the 3rd time"):
        on_ray.run(tmp_path / "a", 1, False, 1, (0, 1), 0.001, lambda _: None)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_dead_and_stopped_actors_are_replaced(tmp_path: Path, model: str) -> None:
    pytest.importorskip("ray", reason="the extra `ray` is not in the extras of development")
    draw(tiny(), tmp_path / "a", n=600)
    out = tmp_path / "b"
    options = ("--n", "600", "--ray", "local", "--workers", "2", "--patience", "30", "--json")
    # Two actors need two processors; the tests' one thread is taken for one.
    with running(["fastdiff", *command(model, out, *options)], OMP_NUM_THREADS="2") as process:
        others = set(actors())
        until(lambda: len(list(out.glob("shards/*.json"))) > 2)
        first = sorted(set(actors()) - others)
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        os.kill(first[1], signal.SIGSTOP)
        until(lambda: len(list(out.glob("shards/*.json"))) > 100)  # the dead one's successor works meanwhile
        text, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    assert "another one takes its place" in err
    assert json.loads(text)["images"] == 600
    assert files(tmp_path / "a") == files(out)
    assert leftovers(out) == []
    until(lambda: not set(actors()) - others, 30)


@pytest.mark.slow
def test_a_cluster_by_its_address(tmp_path: Path, model: str) -> None:
    """And, once it has gone, an address where there is none."""
    pytest.importorskip("ray", reason="the extra `ray` is not in the extras of development")
    draw(tiny(), tmp_path / "a")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    start = ["start", "--head", "--block", "--port", str(port), "--num-cpus", "2", "--include-dashboard", "false"]
    generate = ["fastdiff", *command(model, tmp_path / "b", "--n", str(N), "--ray", f"127.0.0.1:{port}")]
    with running(["ray.scripts.scripts", *start], **OPEN) as head:
        until(lambda: not socket.socket().connect_ex(("127.0.0.1", port)))
        with running(generate, **OPEN) as process:
            text, err = process.communicate(timeout=300)
        assert process.returncode == 0, err
        assert "2 workers of 1 thread" in text
        head.terminate()
        head.communicate(timeout=60)
    assert files(tmp_path / "a") == files(tmp_path / "b")
    generate = ["fastdiff", *command(model, tmp_path / "c", "--n", str(N), "--ray", f"127.0.0.1:{port}")]
    with running(generate, **OPEN) as process:
        _, err = process.communicate(timeout=300)
    assert process.returncode == 2
    assert f"error: ray=127.0.0.1:{port}: there is no connection" in err
    assert "Traceback" not in err
