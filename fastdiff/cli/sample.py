"""``fastdiff sample`` draws images."""

from __future__ import annotations

import json
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
    read_numbers,
    read_size,
)
from fastdiff.errors import InvalidArgument

if TYPE_CHECKING:
    from torch import Tensor


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
        str | None, typer.Option(help="A class for all images, or a comma-separated list that is repeated.")
    ] = None,
    solver: SolverOption = "ddim",
    steps: StepsOption = None,
    eta: EtaOption = 0.0,
    variance: VarianceOption = None,
    order: Annotated[int | None, typer.Option(help="Of unipc and deis (1-3) and lms (1-4).")] = None,
    spacing: SpacingOption = None,
    compat: Annotated[
        str | None,
        typer.Option(help="diffusers, openai or ho: what that code base's loop draws, --spacing in its terms."),
    ] = None,
    guidance: GuidanceOption = 1.0,
    seed: Annotated[int, typer.Option(help="Image i depends on (seed, i) only.")] = 0,
    start_index: Annotated[int, typer.Option(help="The first image's index.")] = 0,
    size: Annotated[str | None, typer.Option(help="Height and width, as 32 or 24x40 (default: the model's).")] = None,
    batch_size: BatchSizeOption = None,
    backend: BackendOption = "auto",
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    image: Annotated[
        Path | None, typer.Option(help="Start from this picture, shrunk and cropped to the size, in place of noise.")
    ] = None,
    strength: Annotated[
        float | None,
        typer.Option(help="Share of the steps that --image goes through (default: 0.8; with --mask: all)."),
    ] = None,
    mask: Annotated[Path | None, typer.Option(help="White where --image is drawn anew; what is black stays.")] = None,
    quality: Annotated[
        float | None,
        typer.Option(
            help="In place of --solver and --steps: 1.1 is the fewest network evaluations within 1.1 times the best "
            "measured distance."
        ),
    ] = None,
    deadline: Annotated[
        float | None,
        typer.Option(help="In place of --solver and --steps: the best measured setting that takes so many seconds."),
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
    """
    from fastdiff import SampleOutput, Sampler
    from fastdiff.data.pictures import PICTURES, grid
    from fastdiff.data.pictures import animate as write_animation
    from fastdiff.sampler.request import image_size

    if out.suffix.lower() not in (*PICTURES, ".npz", ""):
        raise InvalidArgument(
            f"--out {out}: unknown suffix; allowed: {', '.join((*PICTURES, '.npz'))}, or none for a folder"
        )
    if animate is not None and animate.suffix.lower() not in (".gif", ".webp"):
        raise InvalidArgument(f"--animate {animate}: a .gif or .webp file is needed")
    for path in (out, animate):  # a folder that cannot be made says so before the work
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
    height_width = None if size is None else read_size(size)
    for path in (image, mask):
        if path is not None and not path.is_file():
            raise InvalidArgument(f"{path}: no such file")
    sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
    columns = None
    chosen: list[int] | None = None
    if per_class is not None:
        classes = sampler.info.classes
        if classes is None or per_class < 1:
            raise InvalidArgument(
                f"--per-class {per_class}: a class-conditional model and a number of at least 1 are needed"
            )
        n, columns = classes * per_class, per_class
        image_size(n, height_width, sampler.info)  # too many images are refused before their labels are made
        chosen = [label for label in range(classes) for _ in range(per_class)]
    elif labels is not None:
        given = read_numbers("--labels", labels)
        image_size(n, height_width, sampler.info)
        chosen = [given[i % len(given)] for i in range(n)]
    options: dict[str, Any] = {
        "solver": solver, "steps": steps, "eta": eta, "variance": variance, "order": order, "spacing": spacing,
        "compat": compat, "guidance": guidance,
        "seed": seed, "start_index": start_index, "size": height_width,
        "batch_size": batch_size, "labels": chosen, "strength": strength,
        "quality": quality, "deadline_s": deadline,
    }  # fmt: skip
    if image is not None or mask is not None:
        shape = image_size(n, height_width, sampler.info)
        if image is not None:
            options["image"] = _picture("--image", image, sampler.info.channels, shape)
        if mask is not None:
            options["mask"] = (_picture("--mask", mask, 1, shape) > 0).float()
    show = sys.stderr.isatty() and not as_json
    started = time.perf_counter()
    if animate is None:
        output: SampleOutput = sampler.sample(n, progress=show, **options)
    else:
        frames = []

        def keep(event: Any) -> None:
            if event.indices.start == start_index:  # the first chunk is shown
                frames.append(grid(event.x, columns))

        output = sampler.sample(n, progress=show, callback=keep, **options)
        write_animation(frames, animate)
    seconds = time.perf_counter() - started
    output.save(out, columns)
    rows = len(output.table)
    result = {
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
    if as_json:
        print(json.dumps(result))
        return
    print(
        f"{out}: {n} images, {output.table.solver}, {rows} steps, {output.nfe} network evaluations each, "
        f"seed {output.seed}"
    )
    print(
        f"{seconds:.1f} s, {n * rows / seconds:.1f} img-steps/s on {result['device']} "
        f"({result['backend']}, {result['dtype']})"
    )


def _picture(option: str, path: Path, channels: int, size: tuple[int, int]) -> Tensor:
    """A picture file as floats [channels, *size] in [-1, 1], centre-cropped and shrunk where it is larger."""
    import torch

    from fastdiff.data.pixels import convert, fit_to, misfit, open_image, pixels_of, why

    if channels not in (1, 3):
        raise InvalidArgument(f"{option} {path}: this model's images have {channels} channels, so they are no pictures")
    try:
        with open_image(path) as opened:
            pixels = convert(pixels_of(opened)[None], channels)
    except Exception as e:  # decoders meet damaged files with whatever they stumble over
        raise InvalidArgument(f"{option} {path} cannot be read: {why(e).splitlines()[0]}") from e
    wrong = misfit((pixels.shape[1], pixels.shape[2]), size, "crop")
    if wrong is not None:
        raise InvalidArgument(
            f"{option} {path} is {pixels.shape[1]}x{pixels.shape[2]}, smaller than {size[0]}x{size[1]}"
        )
    fitted = torch.from_numpy(fit_to(pixels, size, "crop").copy())
    return fitted[0].permute(2, 0, 1).float() / 127.5 - 1.0
