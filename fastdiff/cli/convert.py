"""``fastdiff convert`` writes a model in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import JsonOption
from fastdiff.errors import printable


def convert(
    src: Annotated[str, typer.Argument(metavar="SRC", help="A model: a folder, a file, or a built-in name.")],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder (diffusers), or a file: .safetensors, .pt, .ckpt, .onnx.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="diffusers (a folder), safetensors or onnx (one file), or the tensors of an original code base: ddpm, "
            "openai, openai-new, edm (default: by DST).",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Published model that SRC is, as adm-imagenet-64; an unknown name lists all.")
    ] = None,
    flags: Annotated[
        str | None, typer.Option(help="Instead of --preset: the flags in the README of SRC, as '--image_size 64 ...'.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Variant of a folder's weights, as fp16.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Name of a set of weights in a .pt (default: the averaged ones).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in another format. No bit of a tensor changes, so converting back restores the original.

    PyTorch files are read without running the code in them. ONNX files (pip install 'fastdiff[onnx]') are for other
    programs, and are not converted back.

    Examples:

    fastdiff convert fashion-mnist fashion.safetensors

    fastdiff convert cifar10.ckpt cifar10 --preset ddpm-cifar10-32

    fastdiff convert cifar10 back.ckpt --format ddpm
    """
    from fastdiff.checkpoints.convert import convert as run

    result = run(src, dst, to=to, preset=preset, flags=flags, variant=variant, weights=weights)
    if as_json:
        print(json.dumps(result))
        return
    print(f"{printable(dst)}: {result['format']}, {result['tensors']} tensors, {result['parameters']} parameters")
    if result["left_out"]:
        print(f"left out, as sampling does not need them: {printable(', '.join(result['left_out']))}")
