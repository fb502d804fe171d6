"""Fixtures of the tests that load and save models."""

from __future__ import annotations

import pytest

from fastdiff.checkpoints import load
from fastdiff.checkpoints.folders import WEIGHTS
from tests.support.unets import TINY, diffusers_twin, random_unet


@pytest.fixture
def folder(tmp_path):
    """Return a model folder without faults."""
    random_unet(TINY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def sharded(folder):
    """Return the model folder as diffusers writes it in shards."""
    theirs = diffusers_twin(load(folder).unet)
    (folder / WEIGHTS).unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    return folder
