"""A network as an ONNX file, exported by torch.onnx and compared with PyTorch in onnxruntime before it is written."""

from __future__ import annotations

import importlib.util
import json
import logging
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.files import atomic_file
from fastdiff.unet import UNet

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
MOST_BYTES = (1 << 31) - (1 << 24)  # protobuf, the format of ONNX files, ends at 2 GiB; the graph takes some MiB of it
CLOSE = 1e-3  # largest difference from PyTorch, relative to the largest value


def check_packages(dst: Path) -> None:
    """Raise `ConfigError` where a library is missing that writes or runs ONNX files."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"{dst}: .onnx needs {', '.join(missing)}, not installed here: pip install 'fastdiff[onnx]'")


class _Positional(nn.Module):
    """The network with positional inputs alone, as exporters need it."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.unet = unet

    def forward(self, x: Tensor, t: Tensor, labels: Tensor | None = None) -> Tensor:
        return self.unet(x, t) if labels is None else self.unet(x, t, class_labels=labels)


def write(dst: Path, unet: UNet, metadata: dict[str, Any]) -> None:
    """Write a float32 network as an ONNX file of the inputs x, t and, where it has classes, labels; output: out.

    The number of images is free, height and width are those of the network's configuration.

    Raises `ConfigError` for a network that cannot be exported, and `CheckpointError` where onnxruntime computes
    something else, or the file cannot be written.
    """
    config, size = unet.config, sum(4 * p.numel() for p in unet.parameters())
    if size > MOST_BYTES:
        raise ConfigError(f"{dst}: the weights take {size >> 20} MiB, and an .onnx file holds less than 2048")
    if config.sample_size is None:
        raise ConfigError(
            f"{dst}: the network has no sample_size, which an .onnx file fixes; set it in its config.json"
        )
    if config.class_embed_type is not None:
        raise ConfigError(
            f"{dst}: class_embed_type={config.class_embed_type!r} is not exported; networks of labels are"
        )
    h, w = (config.sample_size,) * 2 if isinstance(config.sample_size, int) else config.sample_size
    generator = torch.Generator("cpu").manual_seed(0)
    names = ["x", "t", *(["labels"] if config.conditional else [])]

    def example(n: int) -> tuple[Tensor, ...]:
        x = torch.randn(n, config.in_channels, h, w, generator=generator, dtype=torch.float32, device="cpu")
        t = torch.arange(n, dtype=torch.float32, device="cpu") * 37.0 + 1.0
        return (x, t, torch.arange(n, dtype=torch.int64, device="cpu") % 2)[: len(names)]

    network = _Positional(unet.float().cpu()).eval()
    logger = logging.getLogger("torch.onnx")
    level, given = logger.level, example(2)
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")  # of the exporter, about itself
            program: Any = torch.onnx.export(
                network, given, input_names=names, output_names=["out"], dynamo=True, verbose=False,
                dynamic_shapes=tuple({0: torch.export.Dim("images")} for _ in names),
            )  # fmt: skip
            proto = program.model_proto
    except Exception as e:  # the exporter raises anything for an operation that it does not know
        raise ConfigError(f"{dst}: torch.onnx cannot export this network ({str(e).splitlines()[0][:200]})") from e
    finally:
        logger.setLevel(level)
    proto.metadata_props.add(key="fastdiff", value=json.dumps(metadata))
    content = proto.SerializeToString()
    _compare(dst, content, network, names, example(3))
    with atomic_file(dst) as file:
        file.write(content)


def _compare(dst: Path, content: bytes, network: nn.Module, names: list[str], given: tuple[Tensor, ...]) -> None:
    """Raise `CheckpointError` unless onnxruntime computes what PyTorch does, for another number of images."""
    import onnxruntime

    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {name: value.numpy() for name, value in zip(names, given, strict=True)})
    with torch.no_grad():
        expected = network(*given)
    difference = float((torch.from_numpy(found) - expected).abs().max() / expected.abs().max().clamp(min=1e-20))
    if not difference < CLOSE:
        raise CheckpointError(f"{dst}: onnxruntime differs from PyTorch by {difference:.2g}; nothing was written")
