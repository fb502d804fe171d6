"""Settings for every test."""

from __future__ import annotations

import gc
import os

# One thread, here and in every process that a test starts, before torch counts the cores: the networks are small, and
# bits and rounding bands are compared between processes.
os.environ["OMP_NUM_THREADS"] = "1"
# Tests need no network, and must not learn whether there is one.
os.environ["HF_HUB_OFFLINE"] = "1"

from pathlib import Path

import pytest
from hypothesis import settings

# Machines that run tests are shared: a slow example is no failure.
settings.register_profile("fastdiff", deadline=None, print_blob=True)
settings.load_profile("fastdiff")


def pytest_collection_finish() -> None:
    """Leave all that was imported out of later collections of garbage, of which each would take half a second."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def mnist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with MNIST's four files, of random pictures (tests/support/mnist.py)."""
    from tests.support import mnist

    folder = tmp_path_factory.mktemp("mnist")
    mnist.write(folder)
    return folder
