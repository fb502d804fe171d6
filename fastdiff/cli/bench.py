"""``fastdiff bench`` measures how fast a network runs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import JsonOption, ModelArgument, read_numbers


def bench(
    model: ModelArgument = "fashion-mnist",
    batches: Annotated[str | None, typer.Option(help="Batch sizes (default: 1,8,32; --quick: 1,16).")] = None,
    engines: Annotated[
        str | None, typer.Option(help="Engines to run, as native,openvino; an unknown name lists all (default: all).")
    ] = None,
    network_only: Annotated[bool, typer.Option(help="Time the network without the update.")] = False,
    guidance: Annotated[
        float | None, typer.Option(help="Guidance scale: steps of two network rows an image (default: unguided).")
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, or cuda (not tested yet).")] = "cpu",
    quick: Annotated[bool, typer.Option(help="Shorter and fewer rounds, without engines that compile first.")] = False,
    rounds: Annotated[
        int | None, typer.Option(help="Rounds at most; fewer if the ratios converge (default: 40; --quick: 25).")
    ] = None,
    save: Annotated[
        Path | None, typer.Option(help="Write the result here, as JSON; an unfinished result there is continued.")
    ] = None,
    compare: Annotated[
        Path | None, typer.Option(help="An earlier --save: exit code 1 if a ratio fell by more than the noise.")
    ] = None,
    plot: Annotated[Path | None, typer.Option(help="Also draw the speeds, into a .png.")] = None,
    job: Annotated[
        bool, typer.Option("--job", help="Instead, time a whole sampling job with diffusers and with fastdiff.")
    ] = False,
    n: Annotated[int, typer.Option("--n", "-n", help="Images of the job.")] = 16,
    steps: Annotated[int, typer.Option(help="DDIM steps of the job.")] = 50,
    profile: Annotated[
        bool, typer.Option("--profile", help="Instead, profile the native engine by operation.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure how fast a network runs here, with fastdiff and with the other engines that are installed.

    MODEL may also be ddpm-cifar10-32, ddpm-celebahq-256, or the network of Stable Diffusion 1.5 for 512 or 256 pixels,
    sd15 or sd15-256, with random weights.

    Engines take turns, each in its own process. Each is first compared with float64; if one is wrong, its speed is not
    measured, and the exit code is 1. Ratios are to one peer, with a 95 % interval; the last line of a batch says
    whether the machine was too noisy.

    Examples:

    fastdiff bench --quick

    fastdiff bench --batches 1,8 --save new.json --plot new.png

    fastdiff bench --batches 8 --engines native,diffusers --compare new.json

    fastdiff bench ddpm-cifar10-32 --job
    """
    from fastdiff.bench import command

    sys.exit(
        command.run(
            model, batches=None if batches is None else read_numbers("--batches", batches),
            engines=None if engines is None else [name.strip() for name in engines.split(",")],
            network_only=network_only, guidance=guidance, device=device, quick=quick, rounds=rounds, save=save,
            compare=compare, plot=plot, job=(n, steps) if job else None, profile=profile, as_json=as_json,
        )
    )  # fmt: skip
