"""Conversion of a model from one format to another: tensors are renamed, reshaped and reordered, never computed with.

Conversion to another format and back therefore gives the same bits.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints import layouts, onnx
from fastdiff.checkpoints.fitting import empty, fit
from fastdiff.checkpoints.loading import METADATA_KEY, check_path, read_model
from fastdiff.checkpoints.reading import TORCH_SUFFIXES
from fastdiff.checkpoints.saving import plain, save_pipeline, write_safetensors, writing
from fastdiff.checks import optional, shown, text
from fastdiff.errors import ConfigError
from fastdiff.files import atomic_file
from fastdiff.modes import plain_modes

# Endings that promise a file of another kind; a folder of such a name would surprise. Names of folders may have dots.
OTHER_ENDINGS = (
    ".engine", ".plan", ".trt", ".pb", ".tflite", ".h5", ".hdf5", ".keras", ".mlmodel", ".mlpackage", ".gguf",
    ".ggml", ".npz", ".npy", ".pkl", ".pickle", ".json", ".yaml", ".yml", ".zip", ".tar", ".gz", ".msgpack", ".pt2",
    ".ptl", ".torchscript", ".xml", ".jit", ".so", ".txt", ".png", ".jpg",
)  # fmt: skip
FORMATS = ("diffusers", "safetensors", *layouts.LAYOUTS, "onnx")


@plain_modes()
def convert(
    src: str | Path,
    dst: str | Path,
    *,
    to: str | None = None,
    preset: str | None = None,
    flags: str | Mapping[str, Any] | None = None,
    variant: str | None = None,
    weights: str | None = None,
) -> dict[str, Any]:
    """Write a model in another format, bit for bit. Every file is written atomically.

    The source is read and checked completely before anything is written.

    Args:
        src: The model, as in `load`.
        dst: The folder or file to write.
        to: The format, one of `FORMATS`. "diffusers" is a pipeline folder, which diffusers can load if it has such a
            network. "safetensors" is one file with the configuration in its metadata. "ddpm", "openai", "openai-new"
            and "edm" are one file with the tensors that the original code loads: a ``.safetensors`` file, with the
            configuration in its metadata, or a ``.pt`` file, without. "onnx" is one file in float32, computed by
            torch.onnx and checked with onnxruntime (the extra ``onnx``), which is not converted back. None chooses
            "safetensors" or "onnx" if ``dst`` ends so, else "diffusers".
        preset: As in `load`.
        flags: As in `load`.
        variant: As in `load`.
        weights: As in `load`.

    Returns:
        A summary that JSON can hold: ``src``, ``dst``, ``format``, ``from`` (the layout of the source), the numbers of
        ``tensors`` and ``parameters``, and ``left_out``, the names of tensors that sampling does not need.

    Raises:
        CheckpointError: If the source cannot be read or does not fit its network, or the destination cannot be written.
        ConfigError: If a configuration or option is not supported, or the format cannot represent the network.
    """
    dst = Path(check_path("dst", dst))
    to = _format(dst, to)
    stored = read_model(src, preset=preset, flags=flags, variant=variant, weights=weights)
    unet = empty(stored.config)
    state = fit(unet, stored.tensors, stored.weights_path, stored.layout, dtype=None)
    info: dict[str, Any] = {"unet": stored.config.to_dict(), "scheduler": stored.scheduler}
    names = {} if stored.class_names is None else {"class_names": list(stored.class_names)}
    if to == "onnx":
        unet.load_state_dict(state, assign=True)
        with writing(dst):
            onnx.write(dst, unet, info | names)
    elif to == "diffusers":
        save_pipeline(dst, stored.config, state, stored.scheduler, stored.class_names)
    else:
        if to in layouts.LAYOUTS:
            reasons = layouts.reasons_against(unet, to)
            if reasons:
                raise ConfigError(f"{stored.path} cannot be written as {to!r}: " + "; ".join(reasons))
            state = layouts.to_theirs(layouts.pieces(unet, to), state)
        layout = to if to in layouts.LAYOUTS else "diffusers"
        info |= {"layout": layout} | names
        with writing(dst), atomic_file(dst) as file:
            if dst.suffix.lower() == ".safetensors":
                write_safetensors(file, state, {METADATA_KEY: json.dumps(info)})
            else:
                torch.save(plain(state), file)
    return {
        "src": str(src),
        "dst": str(dst),
        "format": to,
        "from": stored.layout or "diffusers",
        "tensors": len(state),
        "parameters": sum(p.numel() for p in unet.parameters()),
        "left_out": list(stored.left_out),
    }


def _format(dst: Path, to: str | None) -> str:
    """Return the format ``to``, or the one that the name of ``dst`` implies; raise `ConfigError` if they conflict."""
    suffix = dst.suffix.lower()
    is_file = suffix in (".safetensors", ".onnx", *TORCH_SUFFIXES)
    if suffix in OTHER_ENDINGS:
        raise ConfigError(
            f"{dst}: {suffix} files are not written; a file ends in .safetensors, .onnx, .pt, .ckpt or .bin, and "
            "another name is a folder's"
        )
    if to is None and suffix in TORCH_SUFFIXES:
        raise ConfigError(f"{dst}: which tensors? Give the format, one of {', '.join(layouts.LAYOUTS)}")
    to = optional(text)("to", to, error=ConfigError) or (
        "onnx" if suffix == ".onnx" else "safetensors" if is_file else "diffusers"
    )
    if to not in FORMATS:
        raise ConfigError(f"format {shown(to)} is unknown; allowed: {', '.join(FORMATS)}")
    if is_file == (to == "diffusers"):
        raise ConfigError(
            f"{dst}: format {to!r} is written as {'a folder' if is_file else 'a file, .safetensors or .pt'}"
        )
    if to == "safetensors" and suffix != ".safetensors":
        raise ConfigError(f"{dst}: format 'safetensors' is written as a .safetensors file")
    if (to == "onnx") != (suffix == ".onnx"):
        raise ConfigError(f"{dst}: format 'onnx', and no other, is written as an .onnx file")
    if to == "onnx":
        onnx.check_packages(dst)
    return to
