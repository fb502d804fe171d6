"""``fastdiff sample`` draws images."""

from __future__ import annotations

import json
import logging
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    read_decimals,
    read_labels,
    read_numbers,
    read_size,
)
from fastdiff.errors import InvalidArgument, printable

if TYPE_CHECKING:
    from torch import Tensor

    from fastdiff.sampler import Event, SampleOutput, Sampler

log = logging.getLogger("fastdiff")


def sample(
    model: ModelArgument = "fashion-mnist",
    n: Annotated[int, typer.Option("--n", "-n", help="How many images.")] = 16,
    out: Annotated[
        Path, typer.Option("--out", "-o", help="A picture (grid), an .npz, or a folder of PNGs (no suffix).")
    ] = Path("samples.png"),
    per_class: Annotated[
        int | None, typer.Option(help="This many images of every class, a row each; replaces --n and --labels.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(help="A class, its number or name, for all images; or a comma-separated list that is repeated."),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="What to draw, for a model that reads text; several are repeated like --labels."),
    ] = None,
    negative: Annotated[str | None, typer.Option(help="What --guidance leads away from (default: no text).")] = None,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = 0.0,
    variance: VarianceOption = None,
    order: Annotated[
        int | None, typer.Option(help="Evaluations that a step uses: unipc and deis 1-3, lms 1-4.")
    ] = None,
    churn: Annotated[
        str | None, typer.Option(help="euler, heun: S_churn of EDM's sampler, or S_churn,S_tmin,S_tmax,S_noise.")
    ] = None,
    spacing: SpacingOption = None,
    compat: Annotated[
        str | None,
        typer.Option(help="diffusers, openai or ho: draw what that code base's loop draws; --spacing is in its terms."),
    ] = None,
    guidance: GuidanceOption = 1.0,
    seed: Annotated[int, typer.Option(help="Image i depends only on (seed, i).")] = 0,
    start_index: Annotated[int, typer.Option(help="Index of the first image.")] = 0,
    index: Annotated[
        str | None, typer.Option(help="These images of the seed, as 3,17, instead of --n and --start-index.")
    ] = None,
    size: Annotated[str | None, typer.Option(help="Height and width, as 32 or 24x40 (default: the model's).")] = None,
    batch_size: BatchSizeOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    image: Annotated[
        Path | None,
        typer.Option(help="Start from this picture, shrunk and cropped to the size, instead of from noise."),
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps that --image goes through (default: 0.8; with --mask: all)."),
    ] = None,
    mask: Annotated[
        Path | None, typer.Option(help="White where --image is drawn anew, black where it is kept.")
    ] = None,
    condition: Annotated[
        Path | None,
        typer.Option(
            help="Picture that the network goes by, for all images; or a folder of pictures, in the order of their "
            "names, that is repeated."
        ),
    ] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            help="Instead of --solver and --steps: 1.1 is the fewest network evaluations within 1.1 times the best "
            "measured distance."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(
            help="Instead of --solver and --steps: the best measured setting that takes at most so many seconds."
        ),
    ] = None,
    animate: Annotated[Path | None, typer.Option(help="Also write the denoising as a .gif or .webp.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Draw images from a model.

    Examples:

    fastdiff sample fashion-mnist --per-class 8 --out out/samples.png

    fastdiff sample --n 4 --labels 9 --guidance 2 --animate boots.gif -o boots.png

    fastdiff sample --n 100 --solver ddpm --steps 100 --out samples.npz

    fastdiff sample --per-class 8 --guidance 2 --quality 1.1 --out samples.png

    fastdiff sample --n 8 --labels 9 --image in.png --strength 0.6 -o out.png

    fastdiff sample runs/colouring --n 4 --condition gray.png -o coloured.png
    """
    from fastdiff import Sampler
    from fastdiff.data.pictures import animate as write_animation
    from fastdiff.data.pictures import check_picture, grid
    from fastdiff.sampler.options import Options

    given = locals()
    options = {name: given[flag.removeprefix("--").replace("-", "_")] for name, flag in Options.flags().items()}
    _check_files(out, animate, image, mask)
    conditions = [] if condition is None else _condition_files(condition)
    options["size"] = None if size is None else read_size(size)
    options["churn"] = None if churn is None else read_decimals("--churn", churn)
    if index is not None:
        options["index"] = read_numbers("--index", index)
        n = len(options["index"])
    sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
    autoencoder = sampler.autoencoder  # of a network whose images are latents
    channels = sampler.info.channels if autoencoder is None else autoencoder.config.out_channels
    for path in (out, animate):
        if path is not None and path.suffix.lower() != ".npz":
            check_picture(channels, path)
    n, options["labels"] = _labels(sampler, n, options["size"], per_class, labels)
    options["prompts"] = None if not prompt else [prompt[i % len(prompt)] for i in range(n)]
    options |= _pictures(sampler, n, options["size"], image, mask)
    options["condition"] = _conditions(sampler, n, options["size"], conditions)
    frames = []

    def keep(event: Event) -> None:
        if event.indices[0] == (
            start_index if index is None else options["index"][0]
        ):  # the animation shows the first batch
            frames.append(grid(event.x if autoencoder is None else sampler.decode(event.x0), per_class))

    progress = sys.stderr.isatty() and not as_json
    started = time.perf_counter()
    output = sampler.sample(n, progress=progress, callback=None if animate is None else keep, **options)
    if animate is not None:
        write_animation(frames, animate)
    seconds = time.perf_counter() - started
    output.save(out, per_class)
    result = _report(sampler, output, out, seconds)
    if as_json:
        print(json.dumps(result))
        return
    counts = "{images} images, {solver}, {rows} steps, {nfe} network evaluations each, seed {seed}".format(**result)
    print(f"{printable(out)}: {counts}")
    print(
        f"{seconds:.1f} s, {n * result['rows'] / seconds:.1f} img-steps/s on {result['device']} "
        f"({result['backend']}, {result['dtype']})"
    )


def _check_files(out: Path, animate: Path | None, image: Path | None, mask: Path | None) -> None:
    """Check the files, and make the folders of the written ones, before any work is done."""
    from fastdiff.data.pictures import PICTURES
    from fastdiff.files import check_writable

    suffixes = (*PICTURES, ".npz")
    if out.suffix.lower() not in (*suffixes, ""):
        raise InvalidArgument(f"--out {out}: unknown suffix; allowed: {', '.join(suffixes)}, or none for a folder")
    if animate is not None and animate.suffix.lower() not in (".gif", ".webp"):
        raise InvalidArgument(f"--animate {animate}: a .gif or .webp file is needed")
    for path in (out, animate):
        if path is not None:
            check_writable(path)
    for path in (image, mask):
        if path is not None and not path.is_file():
            raise InvalidArgument(f"{path}: no such file")


def _labels(
    sampler: Sampler, n: int, size: int | tuple[int, int] | None, per_class: int | None, labels: str | None
) -> tuple[int, list[int] | None]:
    """Return the number of images and their labels, by --n, --per-class and --labels."""
    from fastdiff.sampler.request import image_size

    if per_class is not None:
        classes = sampler.info.classes
        if classes is None or per_class < 1:
            raise InvalidArgument(
                f"--per-class {per_class}: a class-conditional model and a number of at least 1 are needed"
            )
        n = classes * per_class
        image_size(n, size, sampler.info)  # rejects too many images before a list is made of their labels
        return n, [label for label in range(classes) for _ in range(per_class)]
    if labels is None:
        return n, None
    repeated = read_labels(labels, sampler.info)
    image_size(n, size, sampler.info)
    return n, [repeated[i % len(repeated)] for i in range(n)]


def _pictures(
    sampler: Sampler, n: int, size: int | tuple[int, int] | None, image: Path | None, mask: Path | None
) -> dict[str, Tensor]:
    """Read --image and --mask, where they are given."""
    from fastdiff.sampler.request import image_size

    if image is None and mask is None:
        return {}
    if sampler.autoencoder is not None:
        raise InvalidArgument(
            f"--{'mask' if image is None else 'image'}: the network's images are latents, and the pictures would have "
            "to be encoded to some, which a Sampler does not do"
        )
    shape = image_size(n, size, sampler.info)
    read = {} if image is None else {"image": _picture("--image", image, sampler.info.channels, shape)}
    if mask is not None:
        read["mask"] = (_picture("--mask", mask, 1, shape) > 0).float()
    return read


def _condition_files(path: Path) -> list[Path]:
    """Return the picture at --condition, or the pictures of a folder by their names."""
    from fastdiff.data.scan import SUFFIXES

    if not path.is_dir():
        if not path.is_file():
            raise InvalidArgument(f"--condition {path}: no such file or folder")
        return [path]
    found = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES and file.name[0] != ".")
    if not found:
        raise InvalidArgument(f"--condition {path}: no pictures ({' '.join(sorted(SUFFIXES))}) in this folder")
    return found


def _conditions(sampler: Sampler, n: int, size: int | tuple[int, int] | None, files: list[Path]) -> Tensor | None:
    """Read the condition images of n images, [n, K, H, W] or, of one file, [K, H, W]."""
    import torch

    from fastdiff.sampler.request import image_size

    channels = sampler.info.condition
    if not files:
        if channels:
            raise InvalidArgument(f"this network goes by an image of {channels} channels: give it with --condition")
        return None
    if not channels:
        raise InvalidArgument(
            "--condition is for networks with more channels of input than of output; this one has not"
        )
    shape = image_size(n, size, sampler.info)
    read = [_picture("--condition", file, channels, shape) for file in files[:n]]
    return read[0] if len(files) == 1 else torch.stack([read[i % len(read)] for i in range(n)])


def _report(sampler: Sampler, output: SampleOutput, out: Path, seconds: float) -> dict[str, Any]:
    """Describe the run, for --json."""
    n, rows = len(output.images), len(output.table)
    return {
        "out": str(out),
        "images": n,
        "shape": list(output.images.shape[1:]),
        "seed": output.seed,
        "solver": output.table.solver,
        "rows": rows,
        "nfe": output.nfe,
        "backend": sampler.backend,
        "device": str(sampler.device),
        "dtype": str(sampler.dtype).removeprefix("torch."),
        "seconds": round(seconds, 3),
        "img_steps_per_s": round(n * rows / seconds, 2),
    }


def _picture(option: str, path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """Read a picture as floats [channels, *size] in [-1, 1]; a larger one is shrunk and cropped at its centre."""
    import torch

    from fastdiff.data.doubts import picture_doubts
    from fastdiff.data.pictures import MODES
    from fastdiff.data.pixels import convert, fit_to, headers, misfit, open_image, scaled, values_of, why

    if channels not in MODES:
        raise InvalidArgument(f"{option} {path}: the model takes {channels} channels there, which are no pictures")
    try:
        heads = headers(path)
        if isinstance(heads, str):
            raise InvalidArgument(f"{option} {path} cannot be read: {heads}")
        with open_image(path) as opened:
            values = values_of(opened)
            pixels = convert(scaled(values)[None], channels)
    except InvalidArgument:
        raise
    except Exception as e:  # decoders raise all kinds of errors for damaged files
        raise InvalidArgument(f"{option} {path} cannot be read: {why(e).splitlines()[0]}") from e
    for doubt in picture_doubts(heads[0], values, channels):
        log.warning("%s %s: %s", option, path, doubt)
    h, w = pixels.shape[1:3]
    if misfit((h, w), size, "crop") is not None:
        raise InvalidArgument(f"{option} {path} is {h}x{w}, smaller than {size[0]}x{size[1]}")
    fitted = torch.from_numpy(fit_to(pixels, size, "crop").copy())
    return fitted[0].permute(2, 0, 1).float() / 127.5 - 1.0
