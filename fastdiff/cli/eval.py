"""``fastdiff eval`` measures how good samples are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fastdiff.cli.options import (
    AlphaOption,
    BackendOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    EtaOption,
    FeaturesOption,
    FitOption,
    FramesOption,
    GuidanceOption,
    ImageChannelsOption,
    JsonOption,
    LayoutOption,
    ModelArgument,
    ProfileOption,
    RealOption,
    SolverOption,
    SpacingOption,
    StepsOption,
    ValueRangeOption,
    VarianceOption,
    flags_in_errors,
    in_flags,
    read_range,
)
from fastdiff.errors import printable


def eval(
    model: ModelArgument = "fashion-mnist",
    n: Annotated[
        int | None, typer.Option("--n", "-n", help="How many images (default: 5000; with --samples: all).")
    ] = None,
    data: RealOption = None,
    held_out: Annotated[
        Path | None,
        typer.Option(help="Real images that the model never saw, to compare with (default: MNIST's test files)."),
    ] = None,
    fit: FitOption = None,
    samples: Annotated[
        Path | None,
        typer.Option(
            help="Judge these images instead of MODEL's: an .npz, a folder of pictures, or one of `fastdiff generate`."
        ),
    ] = None,
    features: FeaturesOption = "fashion-mnist",
    labels_of: Annotated[
        str | None,
        typer.Option(help="The same as --features: images and labels without names of classes are of its data set."),
    ] = None,
    value_range: ValueRangeOption = None,
    frames: FramesOption = None,
    alpha: AlphaOption = None,
    profile: ProfileOption = None,
    layout: LayoutOption = None,
    image_channels: ImageChannelsOption = None,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = 0.0,
    variance: VarianceOption = None,
    spacing: SpacingOption = None,
    guidance: GuidanceOption = 1.0,
    seed: Annotated[
        int, typer.Option(help="Image i depends only on (seed, i); its class is i mod the number of classes.")
    ] = 0,
    batch_size: BatchSizeOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    out: Annotated[
        Path,
        typer.Option("--out", "-o", help="Folder for images, features and report.json; a later run continues there."),
    ] = Path("out/eval"),
    as_json: JsonOption = False,
) -> None:
    """Measure how good a model's samples are: Frechet and kernel distance, precision, recall.

    Each has a 95 % interval, and is printed beside the same number for held-out real images.

    Examples:

    fastdiff eval fashion-mnist --n 2000 --solver unipc --steps 10

    fastdiff eval --samples samples.npz --out out/judged
    """
    from fastdiff.data.summary import warning_lines
    from fastdiff.evaluation import evaluate, table
    from fastdiff.evaluation.scoring import progress_on_stderr, summary_lines

    def announce(summary: dict[str, Any]) -> None:
        warnings = warning_lines(in_flags(text) for text in summary["warnings"])
        print("\n".join([*map(in_flags, summary_lines(summary)), *warnings]), file=sys.stderr, flush=True)

    reading = {"value_range": read_range(value_range), "frames": frames, "alpha": alpha, "profile": profile,
               "layout": layout, "channels": image_channels}  # fmt: skip
    if samples is None:
        sampled = {"batch_size": batch_size, "eta": eta, "guidance": guidance, "seed": seed, "solver": solver,
                   "spacing": spacing, "steps": steps, "variance": variance}  # fmt: skip
    else:
        sampled = {}
    with flags_in_errors():
        report = evaluate(
            model, samples=samples, n=n, data=data, held_out=held_out, fit=fit, features_of=features, out=out,
            backend=backend, device=device, dtype=dtype, options=sampled, data_options=reading, labels_of=labels_of,
            progress=progress_on_stderr(), announce=announce,
        )  # fmt: skip
    print(json.dumps(report) if as_json else printable(table(report), lines=True))
