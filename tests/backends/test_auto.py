"""The backend "auto" on a GPU: the fastest one that the tuned file of its model has measured. No GPU is needed."""

from __future__ import annotations

import dataclasses
import logging
import types
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import fastdiff.kernels.launch as kernels
from fastdiff import backends
from fastdiff.backends import Spec
from fastdiff.backends.triton import runner as triton
from fastdiff.errors import BackendError
from tests.support.unets import TINY, random_unet

GPU = "Test GPU 2"
SPEC = Spec(8, (3, 32, 32), torch.bfloat16, torch.device("cuda"))


@pytest.fixture
def measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, dict[str, float]]], Path]:
    """Return a function that writes the file of a GPU, on which `triton` can run."""
    monkeypatch.setattr(kernels, "CONFIGS", tmp_path)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(name=GPU))
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    monkeypatch.setattr("fastdiff.backends.triton.reasons_against", lambda unet, spec: [])

    def write(speeds: dict[str, dict[str, float]]) -> Path:
        path = kernels.config_file(GPU)
        kernels.save_tuned(path, GPU, {}, speeds)
        return path

    yield write
    kernels._read.cache_clear()


def test_the_fastest_is_chosen(measured: Callable[..., Path], caplog: pytest.LogCaptureFixture) -> None:
    unet = random_unet(TINY)
    assert backends.choose(unet, SPEC) == "eager", "there is no file"
    measured({"bfloat16 32x32x8": {"eager": 10.0, "compiled": 20.0, "triton": 30.0}})
    with caplog.at_level(logging.INFO, "fastdiff"):
        assert backends.choose(unet, SPEC) == "triton"
    assert "backend auto: triton, the fastest in this GPU's tuned file" in caplog.text
    measured({"bfloat16 32x32x8": {"eager": 40.0, "compiled": 20.0, "triton": 30.0}})
    assert backends.choose(unet, SPEC) == "eager"
    measured({"bfloat16 32x32x8": {"compiled": 20.0}})
    assert backends.choose(unet, SPEC) == "compiled"


def test_the_most_similar_batch_of_the_same_dtype_decides(measured: Callable[..., Path]) -> None:
    unet = random_unet(TINY)
    measured({
        "bfloat16 32x32x1": {"eager": 1.0, "triton": 2.0}, "bfloat16 32x32x256": {"eager": 1.0, "compiled": 2.0},
        "float32 32x32x8": {"eager": 2.0, "triton": 1.0},
    })  # fmt: skip
    for batch, side, expected in [(1, 32, "triton"), (4, 32, "triton"), (128, 32, "compiled"), (1, 512, "compiled")]:
        assert backends.choose(unet, dataclasses.replace(SPEC, batch=batch, shape=(3, side, side))) == expected
    assert backends.choose(unet, dataclasses.replace(SPEC, dtype=torch.float32)) == "eager"
    assert backends.choose(unet, dataclasses.replace(SPEC, dtype=torch.float16)) == "eager", "not measured"


def test_what_cannot_run_is_not_chosen(measured: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    measured({"bfloat16 32x32x8": {"eager": 10.0, "compiled": 20.0, "triton": 30.0}})
    unet = random_unet(TINY)
    assert backends.choose(unet, dataclasses.replace(SPEC, determinism="bitwise")) == "triton"
    assert backends.choose(unet, dataclasses.replace(SPEC, frozen=True)) == "eager", "slots"
    assert backends.choose(unet, dataclasses.replace(SPEC, device=torch.device("cpu"))) != "triton"
    monkeypatch.setattr("fastdiff.backends.triton.reasons_against", lambda unet, spec: ["it cannot"])
    assert backends.choose(unet, SPEC) == "compiled"
    assert backends.choose(unet, dataclasses.replace(SPEC, determinism="bitwise")) == "eager", "which then refuses"
    monkeypatch.setattr("fastdiff.backends.triton.has_kernels", lambda: False)
    assert backends.choose(unet, SPEC) == "eager"


@pytest.mark.parametrize("speeds", [[], {"bfloat16": {"eager": 1}}, {"bfloat16 axb": {"eager": 1}},
                                    {"bfloat16 32x32x8": {"eager": "fast"}}, {"bfloat16 32x32x8": 3},
                                    {"bfloat16 32x0x8": {"eager": 1}}])  # fmt: skip
def test_a_file_of_something_else_is_named(measured: Callable[..., Path], speeds: object) -> None:
    import json

    path = measured({})
    path.write_text(json.dumps({"gpu": GPU, "configs": {}, "speeds": speeds}))
    kernels._read.cache_clear()
    with pytest.raises(BackendError, match=f"{path} is no file of launch configurations"):
        backends.choose(random_unet(TINY), SPEC)


def test_tuning_again_keeps_the_speeds(measured: Callable[..., Path]) -> None:
    path = measured({"bfloat16 32x32x8": {"triton": 30.0}})
    kernels.save_tuned(path, GPU, {"an op": {"num_warps": 4}})
    assert kernels.speeds(path) == {"bfloat16 32x32x8": {"triton": 30.0}}
    assert kernels.tuned(path) == {"an op": {"num_warps": 4}}
