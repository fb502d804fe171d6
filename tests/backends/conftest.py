"""Fixtures for the tests of the backends."""

from __future__ import annotations

import sys

import pytest

import fastdiff


@pytest.fixture
def without_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make importing the compiled engine fail, as where it was not built."""
    monkeypatch.setitem(sys.modules, "fastdiff._native", None)
    monkeypatch.delattr(fastdiff, "_native", raising=False)
