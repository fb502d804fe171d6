"""A server for all tests that need one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.served import Served, save_model


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="session")
def started() -> Iterator[list[Served]]:
    servers: list[Served] = []
    yield servers
    for server in servers:
        server.end()


@pytest.fixture
def server(started: list[Served], model: str, tmp_path: Path) -> Served:
    """The server of all tests; another one if a test has ended it."""
    if not started or started[-1].process.poll() is not None:
        started.append(Served(tmp_path, model, "--max-queue-seconds", "1e6", "--max-body", "64KiB"))
    return started[-1]
