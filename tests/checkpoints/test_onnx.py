"""Networks written as ONNX files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import checkpoints
from fastdiff.checkpoints import onnx
from fastdiff.checkpoints.convert import convert
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet
from tests.support.unets import TINY, TINY_CLASSES, random_unet


def saved(path: Path, config: Any) -> UNet:
    unet = random_unet(config)
    checkpoints.save_folder(path, unet, NoiseSchedule("cosine", 50))
    return unet


@pytest.mark.slow  # an export takes many seconds
@pytest.mark.parametrize("config", [TINY, TINY_CLASSES], ids=["plain", "classes"])
def test_onnxruntime_computes_the_network(tmp_path: Path, config: Any) -> None:
    ort = pytest.importorskip("onnxruntime", reason="the extra onnx is optional")
    unet = saved(tmp_path / "m", config)
    result = convert(tmp_path / "m", tmp_path / "m.onnx")
    assert result["format"] == "onnx"
    session = ort.InferenceSession(str(tmp_path / "m.onnx"), providers=["CPUExecutionProvider"])
    x, t = torch.randn(5, 3, 8, 8), torch.tensor([0.0, 3.5, 49.0, 7.0, 20.0])
    labels = torch.tensor([0, 1, 2, 3, 4]) if config.num_class_embeds else None
    feed = {"x": x.numpy(), "t": t.numpy()} | ({} if labels is None else {"labels": labels.numpy()})
    (out,) = session.run(["out"], feed)
    with torch.no_grad():
        expected = unet(x, t) if labels is None else unet(x, t, labels)
    assert np.abs(out - expected.numpy()).max() < 1e-4 * float(expected.abs().max())
    info = json.loads(session.get_modelmeta().custom_metadata_map["fastdiff"])
    assert info["unet"]["block_out_channels"] == list(config.block_out_channels)
    assert info["scheduler"]["beta_schedule"] == "squaredcos_cap_v2"


@pytest.mark.slow
def test_a_file_that_differs_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("onnxruntime", reason="the extra onnx is optional")
    saved(tmp_path / "m", TINY)
    monkeypatch.setattr(onnx, "CLOSE", 0.0)
    with pytest.raises(CheckpointError, match=r"onnxruntime differs from PyTorch by .*; nothing was written"):
        convert(tmp_path / "m", tmp_path / "m.onnx")
    assert not (tmp_path / "m.onnx").exists()


def test_what_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved(tmp_path / "m", TINY)
    for dst, to in (("a.onnx", "safetensors"), ("a.onnx", "diffusers"), ("a.safetensors", "onnx"), ("a", "onnx")):
        with pytest.raises(ConfigError, match=r"written as"):
            convert(tmp_path / "m", tmp_path / dst, to=to)
    monkeypatch.setattr(onnx, "PACKAGES", ("onnx", "no_such_package"))
    with pytest.raises(ConfigError, match=r"needs no_such_package, not installed here: pip install 'fastdiff\[onnx\]'"):
        convert(tmp_path / "m", tmp_path / "a.ONNX")
    monkeypatch.setattr(onnx, "MOST_BYTES", 100)
    for config, words in (
        (TINY, "an .onnx file holds less than"),
        (dataclasses.replace(TINY, sample_size=None), "no sample_size"),
        (dataclasses.replace(TINY, class_embed_type="identity"), "class_embed_type='identity' is not exported"),
    ):
        with pytest.raises(ConfigError, match=words):
            onnx.write(tmp_path / "a.onnx", random_unet(config), {})
        monkeypatch.setattr(onnx, "MOST_BYTES", 1 << 30)
    assert not list(tmp_path.glob("*.onnx"))
