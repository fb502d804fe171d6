"""A server for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support import faulty
from tests.support.served import Served, save_model, save_text_model, until


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_text_model(tmp_path_factory.mktemp("model") / "words")


@pytest.fixture(scope="session")
def started() -> Iterator[list[Served]]:
    servers: list[Served] = []
    yield servers
    for server in servers:
        server.end()


@pytest.fixture
def server(started: list[Served], model: str, text_model: str, tmp_path: Path) -> Served:
    """The server of all tests, of two models; another one if a test has ended it.

    The caches of compiled kernels can neither be read nor made: it draws nevertheless.
    """
    if not started or started[-1].process.poll() is not None:
        damaged = tmp_path / "no folder"
        damaged.write_bytes(b"\0damaged")
        caches = dict.fromkeys(("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME"), str(damaged))
        caches[faulty.GOES_ON] = str(tmp_path / "goes on")
        limits = ("--max-queue-seconds", "1e6", "--max-body", "64KiB")
        started.append(Served(tmp_path, model, text_model, *limits, module="tests.support.faulty", environment=caches))
    until(lambda: started[-1].http.get("/health/ready").status_code == 200)
    return started[-1]
