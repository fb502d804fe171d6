"""Arguments and options that several commands share, and functions that parse their values."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fastdiff.errors import DataError, InvalidArgument

if TYPE_CHECKING:
    from fastdiff.sampler.options import NetworkInfo

# --help imports neither NumPy nor torch, so these repeat the names in fastdiff.solvers, which a test compares.
SOLVER_HELP = (
    "auto, ddim, ddpm, dpmpp_1, dpmpp_2m, dpmpp_3m, dpmpp_2m_sde, dpmpp_3m_sde, dpmpp_2s, dpmpp_3s, dpmpp_sde, "
    "dpmpp_2s_ancestral, unipc, euler, euler_ancestral, heun, dpm2, dpm2_ancestral, deis, lms, plms, lcm, tcd or "
    "consistency."
)
SPACING_HELP = "trailing, leading, linspace, quadratic, karras or exponential (default: the model's)."

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="A built-in name (fashion-mnist), a diffusers folder, or a checkpoint file."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output, for machines.")]

# How images are drawn.
SolverOption = Annotated[str, typer.Option(help=SOLVER_HELP)]
StepsOption = Annotated[
    int | None, typer.Option(help="Steps of the solver (default: 50; ddpm: all timesteps; auto: 20; lcm: 4).")
]
EtaOption = Annotated[float, typer.Option(help="Noise of ddim: 0 none, 1 as much as ddpm.")]
VarianceOption = Annotated[str | None, typer.Option(help="Noise of ddpm: posterior, beta, none, learned_range.")]
SpacingOption = Annotated[str | None, typer.Option(help=SPACING_HELP)]
GuidanceOption = Annotated[float, typer.Option(help="Classifier-free guidance scale; 1 is off.")]
BatchSizeOption = Annotated[int | None, typer.Option(help="Images in flight (default: by the network's size).")]

# Backend, device and dtype of the network.
BackendOption = Annotated[str, typer.Option(help="auto, native, eager, compiled or triton.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, mps (default: cuda where there is one).")]
DtypeOption = Annotated[
    str | None, typer.Option(help="float32, bfloat16, bfloat16-fast (native) or float16 (default: the model's).")
]

# Real images and features that samples are compared by.
RealOption = Annotated[
    Path | None,
    typer.Option(
        help="Real images: a folder, an .npz, an IDX file, or a folder with MNIST's four files "
        "(default: Fashion-MNIST, where it is installed)."
    ),
]
FitOption = Annotated[
    str | None, typer.Option(help="crop or pad real images to the size (default: pad MNIST's files, else crop).")
]
FeaturesOption = Annotated[
    str,
    typer.Option(
        help="Network that computes features: fashion-mnist, a classifier's file, a .pth of Inception's weights, or "
        "random, for any images."
    ),
]


# Options about data that `fastdiff train` and `fastdiff eval` share.
ValueRangeOption = Annotated[
    str | None,
    typer.Option(help="Values of the data that are black and white, as 0,4095 (default: those of 8 or 16 bits)."),
]
FramesOption = Annotated[str | None, typer.Option(help="Pages or frames of a file: first or all (default: first).")]
AlphaOption = Annotated[
    str | None, typer.Option(help="Behind transparent pixels: white, black, or drop alpha (default: white).")
]
ProfileOption = Annotated[
    str | None, typer.Option(help="Colour profiles: ignore, or srgb to convert by them (default: ignore).")
]
LayoutOption = Annotated[str | None, typer.Option(help="Layout of an .npz's images: NHWC, NCHW or NHW.")]
ImageChannelsOption = Annotated[
    int | None, typer.Option(help="Make all images gray (1) or colour (3) (default: as they are).")
]

# The arguments of `fastdiff.data.load_data`, in its messages, and their options.
DATA_FLAGS = {"channels": "--image-channels", "features_of": "--features", **{
    name: f"--{name.replace('_', '-')}"
    for name in ("value_range", "frames", "alpha", "profile", "layout", "class_depth", "class_names", "labels",
                 "labels_of", "size", "fit")
}}  # fmt: skip
_ARGUMENT = re.compile(rf"\b({'|'.join(DATA_FLAGS)})=(?:\"([\w-]+)\"|\((-?[\d.]+), (-?[\d.]+)\)|(\d+(?:x\d+)?)\b)?")


def in_flags(text: str) -> str:
    """Replace the arguments of Python in a message about data by the options of the command line."""

    def flag(found: re.Match[str]) -> str:
        name, word, low, high, number = found.groups()
        value = word or number or (f"{low},{high}" if low else "")
        return f"{DATA_FLAGS[name]} {value}".strip()

    return _ARGUMENT.sub(flag, text)


@contextlib.contextmanager
def flags_in_errors() -> Iterator[None]:
    """Name options of the command line in the messages of `DataError` and `InvalidArgument`."""
    try:
        yield
    except (DataError, InvalidArgument) as e:
        raise type(e)(in_flags(str(e))) from e


def read_range(text: str | None) -> tuple[float, float] | None:
    """Parse the value of --value-range, as "0,4095" or "-1,1"."""
    if text is None:
        return None
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError as e:
        raise InvalidArgument(f"--value-range {text}: two numbers, black and white, as 0,4095, are needed") from e
    return low, high


def read_numbers(option: str, text: str) -> list[int]:
    """Parse a comma-separated list of whole numbers, as "4,10"; `InvalidArgument` names the option."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as e:
        raise InvalidArgument(f"{option} {text}: whole numbers separated by commas are needed") from e


def read_decimals(option: str, text: str) -> list[float]:
    """Parse a comma-separated list of numbers, as "40,0.05,50,1.003"; `InvalidArgument` names the option."""
    try:
        return [float(part) for part in text.split(",")]
    except ValueError as e:
        raise InvalidArgument(f"{option} {text}: numbers separated by commas are needed") from e


def read_labels(text: str, info: NetworkInfo) -> list[int]:
    """Parse the value of --labels, as "4,10" or "dog,cat" or, where classes are named by numbers, "#4"."""
    from fastdiff.sampler.request import class_of

    names, found = info.class_names or (), []
    for part in (part.strip() for part in text.split(",")):
        number = int(part.removeprefix("#")) if part.removeprefix("#").isdecimal() else None
        if part in names and number not in (None, names.index(part)):
            raise InvalidArgument(
                f"--labels {part}: is it the class named {part}, #{names.index(part)}, or the class of this number, "
                f"#{number}? Write one of them with its #"
            )
        if number is not None:
            found.append(number)
        else:
            found += [class_of(part, info)] if names else read_numbers("--labels", part)
    return found


def read_size(text: str) -> int | tuple[int, int]:
    """Parse the value of --size: "32" gives 32, "24x40" gives (24, 40); anything else is an `InvalidArgument`."""
    try:
        height, *width = (int(part) for part in text.lower().split("x"))
        if len(width) > 1:
            raise ValueError
    except ValueError as e:
        raise InvalidArgument(f"--size {text}: a number, or height x width as in 24x40, is needed") from e
    return (height, width[0]) if width else height
