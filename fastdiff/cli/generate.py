"""``fastdiff generate`` draws the images of a bulk job."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.cli.options import (
    BackendOption,
    BatchSizeOption,
    DeviceOption,
    DtypeOption,
    EtaOption,
    GuidanceOption,
    JsonOption,
    ModelArgument,
    SolverOption,
    SpacingOption,
    StepsOption,
    VarianceOption,
    read_numbers,
    read_size,
)
from fastdiff.errors import InvalidArgument, JobError, printable

if TYPE_CHECKING:
    from fastdiff.bulk import Progress, Report

OTHER_JOB = 3  # exit code where the folder is another job's: trying again does not help
EVERY_S = 5.0  # between two lines of progress


def generate(
    model: ModelArgument = "fashion-mnist",
    n: Annotated[int, typer.Option("--n", "-n", help="How many images.")] = 50_000,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the job; the same command goes on there.")] = Path(
        "out/images"
    ),
    format: Annotated[
        str, typer.Option("--format", help="Files of the shards: npz, png, webdataset or imagefolder.")
    ] = "npz",
    shard_size: Annotated[int | None, typer.Option(help="Images of a shard (default: 1000 at most).")] = None,
    labels: Annotated[
        str,
        typer.Option(
            help="cycle: all classes in turns; none; a file with a class in each line; or classes as 9 or dog,cat, "
            "numbers or names, which the images take in turns."
        ),
    ] = "cycle",
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="For a model that reads text: a file with a prompt in each line, which the images take in turns."
        ),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What --guidance leads away from (default: no text).")] = None,
    workers: Annotated[
        str,
        typer.Option(
            help="Worker processes of one thread each, or one for each GPU in turns; auto: as many as processors, "
            "memory or GPUs allow. Before long jobs auto measures whether one process of all threads is faster."
        ),
    ] = "auto",
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS",
            help="Let actors of Ray be the workers: local, auto, or the address of a cluster that shares the folder.",
        ),
    ] = None,
    ranks: Annotated[
        int | None, typer.Option(help="Completions of the indexed Kubernetes job that runs this command.")
    ] = None,
    patience: Annotated[
        float, typer.Option(help="Seconds after which a worker that has finished no batch is replaced.")
    ] = 600.0,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = 0.0,
    variance: VarianceOption = None,
    order: Annotated[
        int | None, typer.Option(help="Evaluations that a step uses: unipc and deis 1-3, lms 1-4.")
    ] = None,
    spacing: SpacingOption = None,
    compat: Annotated[str | None, typer.Option(help="diffusers, openai or ho: as that code base's loop.")] = None,
    guidance: GuidanceOption = 1.0,
    seed: Annotated[int, typer.Option(help="Image i depends only on (seed, i).")] = 0,
    size: Annotated[str | None, typer.Option(help="Height and width, as 32 or 24x40 (default: the model's).")] = None,
    quality: Annotated[
        float | None, typer.Option(help="Instead of --solver and --steps, as in `fastdiff sample`.")
    ] = None,
    batch_size: BatchSizeOption = None,
    determinism: Annotated[
        str | None, typer.Option(help="bitwise or seed (default: bitwise where the backend has it).")
    ] = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Draw many images into a folder, with as many processes and machines as there are.

    Shards are written once, each when it is complete. However the command ends, it goes on where it is run again. Run
    on several machines that share the folder, it divides the work, also under torchrun, in Slurm arrays and in indexed
    jobs of Kubernetes. A folder of other settings is refused, with exit code 3.

    Examples:

    fastdiff generate fashion-mnist --n 50000 --steps 10 -o runs/fashion

    fastdiff generate --n 1000 --labels 9 --format webdataset -o runs/boots

    torchrun --nproc-per-node 2 -m fastdiff generate -n 1000 -o runs/two
    """
    from fastdiff import bulk
    from fastdiff.sampler.options import Options

    given = locals()
    flags = {name: flag.removeprefix("--").replace("-", "_") for name, flag in Options.flags().items()}
    options = {name: given[key] for name, key in flags.items() if key in given}
    options["size"] = None if size is None else read_size(size)
    options["labels"] = _labels(labels)
    options["prompts"] = None if prompts is None else _lines("--prompts", prompts)
    count = None if workers == "auto" else _workers(workers)
    try:
        # Ray prints to standard output that a worker has died.
        with contextlib.redirect_stdout(sys.stderr):
            report = bulk.generate(
                model, n, out, format=format, shard_size=shard_size, workers=count, ray=ray, ranks=ranks,
                patience_s=patience, determinism=determinism, backend=backend, device=device, dtype=dtype,
                progress=_on_stderr(), **options,
            )  # fmt: skip
    except JobError as e:
        print(f"error: {e}", file=sys.stderr)
        raise typer.Exit(OTHER_JOB) from None
    except KeyboardInterrupt:
        print(f"interrupted: the shards in {printable(out)} are kept, and the same command goes on", file=sys.stderr)
        raise typer.Exit(130) from None
    if as_json:
        print(json.dumps({**dataclasses.asdict(report), "folder": str(report.folder)}))
        return
    print(f"{printable(out)}: {report.images} images in {report.shards} shards, {report.drawn} of them new")
    if report.drawn:
        print(f"{report.seconds:.1f} s, the first shard after {report.first_shard_s:.1f} s, {_workers_text(report)}")


def _workers_text(report: Report) -> str:
    each = "1 thread" if report.threads == 1 else f"{report.threads} threads"
    return f"{report.workers} workers of {each}" if report.workers else each


def _workers(text: str) -> int:
    try:
        return int(text)
    except ValueError as e:
        raise InvalidArgument(f"--workers {text}: auto, or a whole number, is needed") from e


def _labels(text: str) -> str | list[int | str] | None:
    """Read --labels: cycle, none, classes by numbers or names, or the name of a file with one in each line."""
    if text in ("cycle", "none"):
        return None if text == "none" else text
    path = Path(text)
    if path.suffix and path.is_file():
        parts = _lines("--labels", path)
    elif path.suffix:
        raise InvalidArgument(f"--labels {text}: there is no such file")
    else:
        parts = text.split(",")
    return [_class(part.strip()) for part in parts]


def _lines(option: str, path: Path) -> list[str]:
    """Read the lines of a file of an option."""
    try:
        lines = path.read_text(encoding="utf-8").split("\n")
    except (OSError, ValueError) as e:
        raise InvalidArgument(f"{option} {path} cannot be read as text ({e})") from e
    return lines[:-1] if not lines[-1] else lines


def _class(text: str) -> int | str:
    number = text.removeprefix("#")
    return read_numbers("--labels", number)[0] if number.isdecimal() and number.isascii() else text


def _on_stderr() -> Callable[[Progress], None]:
    """Return a function that prints a line of progress at the start, at the end and every few seconds."""
    from fastdiff.data.summary import duration

    last = -EVERY_S

    def show(p: Progress) -> None:
        nonlocal last
        now = time.monotonic()
        if p.done < p.n and now - last < EVERY_S:
            return
        last = now
        left = "" if p.seconds_left is None else f", {p.images_per_s:.4g} images/s, {duration(p.seconds_left)} left"
        print(f"{time.strftime('%H:%M:%S')} {p.done} of {p.n} images{left}", file=sys.stderr, flush=True)

    return show
