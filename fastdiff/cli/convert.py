"""``fastdiff convert`` writes a model in another format."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import JsonOption


def convert(
    src: Annotated[
        str,
        typer.Argument(metavar="SRC", help="A model: a folder, a file, or a built-in name."),
    ],
    dst: Annotated[
        Path, typer.Argument(metavar="DST", help="A folder (diffusers), or a file: .safetensors, .pt, .ckpt.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            "--format",
            help="diffusers (a folder), safetensors (one file), or the tensors of an original code base: ddpm, openai, "
            "openai-new, edm (default: by DST).",
        ),
    ] = None,
    preset: Annotated[
        str | None, typer.Option(help="Of SRC: a published model, as adm-imagenet-64; an unknown one lists all.")
    ] = None,
    flags: Annotated[
        str | None, typer.Option(help="Of SRC, instead: its README's flags, as '--image_size 64 ...'.")
    ] = None,
    variant: Annotated[str | None, typer.Option(help="Of a folder's weights, as fp16.")] = None,
    weights: Annotated[
        str | None, typer.Option(help="Which of a .pt's sets of weights (default: the averaged ones).")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Write a model in another format; not one bit of a tensor changes, so there and back gives what was there.

    PyTorch files are read without running code in them.

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
    print(f"{dst}: {result['format']}, {result['tensors']} tensors, {result['parameters']} parameters")
    if result["left_out"]:
        print(f"left out, as sampling does not need them: {', '.join(result['left_out'])}")
