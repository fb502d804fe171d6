"""``fastdiff trilemma`` measures quality, diversity and speed of a model's samples."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import (
    BackendOption,
    DeviceOption,
    DtypeOption,
    FeaturesOption,
    FitOption,
    JsonOption,
    ModelArgument,
    RealOption,
    read_numbers,
)
from fastdiff.errors import InvalidArgument, printable


def trilemma(
    model: ModelArgument = "fashion-mnist",
    out: Annotated[
        Path, typer.Option("--out", "-o", help="Folder for images, results and picture; a later run continues there.")
    ] = Path("out/trilemma"),
    n: Annotated[
        int | None,
        typer.Option(
            "--n",
            "-n",
            help="Images of a point at most (default: 5000 for main settings up to 20 evaluations, else 2000).",
        ),
    ] = None,
    nfe: Annotated[
        str | None, typer.Option(help="Network evaluations an image, as 4,10,50 (default: from 4 to 1000).")
    ] = None,
    solvers: Annotated[
        str | None,
        typer.Option(
            help="Settings: a solver, with -etaX, -gX (guidance) or -SPACING, as ddim,unipc-g2,ddim-eta1 "
            "(default: a dozen)."
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="ddpm, ddim, unipc at 4, 10 and 50, 500 images each.")] = False,
    data: RealOption = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Real images that the model never saw: a lower bound (default: MNIST's test files)."),
    ] = None,
    fit: FitOption = None,
    features: FeaturesOption = "fashion-mnist",
    batch_size: Annotated[int, typer.Option(help="Images in flight.")] = 64,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    no_draw: Annotated[bool, typer.Option("--no-draw", help="Report on the images that exist; draw none.")] = False,
    no_time: Annotated[
        bool, typer.Option("--no-time", help="Measure no speeds; those of the last run in OUT are kept.")
    ] = False,
    peer: Annotated[bool, typer.Option("--peer", help="Also time diffusers' DDPM loop (needs diffusers).")] = False,
    install: Annotated[
        bool,
        typer.Option(
            "--install", help="Write the result into MODEL's folder, for solver=auto, quality= and deadline_s=."
        ),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Measure quality, diversity and speed of a model's samples, by solver and number of network evaluations.

    Writes OUT/trilemma.json and, with matplotlib, OUT/trilemma.png. It takes hours, and prints an estimate first;
    Ctrl-C loses minutes at most, and the same command continues. Where images of a point were deleted, its numbers in
    OUT/trilemma.json are used. Speeds are measured at the end, in turns.

    Examples:

    fastdiff trilemma fashion-mnist --quick

    fastdiff trilemma --solvers ddim,unipc-g2 --nfe 4,10 --n 1000 -o out/few
    """
    from fastdiff import Sampler
    from fastdiff.evaluation.reference_images import MIN_IMAGES
    from fastdiff.evaluation.trilemma import report, run, speed
    from fastdiff.evaluation.trilemma.grid import QUICK, grid_points
    from fastdiff.evaluation.trilemma.picture import draw_picture, drawable

    if quick and (solvers, nfe, n) != (None, None, None):
        raise InvalidArgument("--quick is a plan of its own; leave out --solvers, --nfe and --n")
    if batch_size < 1 or (n is not None and n < MIN_IMAGES):
        raise InvalidArgument(f"--batch-size {batch_size}, --n {n}: 1 or more, and {MIN_IMAGES} or more, are needed")

    def say(text: str) -> None:
        print(f"{time.strftime('%H:%M:%S')} {printable(text)}", file=sys.stderr, flush=True)

    sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
    keys, nfes, most = QUICK if quick else (None, None, n)
    points = grid_points(
        sampler,
        solvers.split(",") if solvers is not None else keys,
        read_numbers("--nfe", nfe) if nfe is not None else nfes,
        most,
    )
    judge = run.Judge.of(sampler, model, data, held_out, fit, features)
    if peer:
        speed.need_diffusers()
    if not drawable():
        say("matplotlib is not installed, so there will be no picture: pip install 'fastdiff[plot]'")
    try:
        known = run.earlier(sampler, out, points, judge)
        if not no_draw:
            run.draw(sampler, out, points, batch_size, say, known)
        found = run.result(
            sampler, out, points, judge, say, model=model, batch=batch_size, timed=not no_time, peer=peer, known=known
        )
        if drawable():
            draw_picture(found, out / "trilemma.png")
        if install:
            say(f"wrote {run.install(found, sampler)}")
    except KeyboardInterrupt:
        say(f"interrupted: what is finished is kept in {out}, and the same command goes on from there")
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps(found))
        return
    for line in (*report.table(found), *report.say_nearest(found["nearest"]), *report.say_peer(found.get("peer"))):
        print(printable(line))
