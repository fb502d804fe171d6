"""Helpers of the tests that load and save models."""

from __future__ import annotations

import os
import textwrap
from pathlib import Path

import pytest
import torch

from fastdiff.checkpoints import load
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.errors import CheckpointError, FastdiffError
from tests.support import warm
from tests.support.unets import TINY, random_images

needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits and SIGKILL are POSIX")

X, T = random_images(TINY), torch.tensor([3.0, 700.5])
LABELS = torch.tensor([0, 3])
INDEX = f"{WEIGHTS}.index.json"


@torch.no_grad()
def evaluate(network, labels=None):
    out = network(X, T, class_labels=labels)
    return out if isinstance(out, torch.Tensor) else out.sample


def refused(path, *words, error=CheckpointError):
    """Assert that loading ``path`` fails with an error that has the file's name and these words; return its message."""
    with pytest.raises(error) as caught:
        load(path)
    assert isinstance(caught.value, FastdiffError)
    message = str(caught.value)
    for word in (Path(path).name, *words):
        assert str(word) in message
    return message


def assert_equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def run_python(code, *arguments, check=True):
    result = warm.run("-c", textwrap.dedent(code), *arguments)
    assert not check or result.returncode == 0, result.stderr
    return result
