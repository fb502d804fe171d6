"""Options of a call of the sampler, each declared once, and the facts about a network that their checks need."""

# ruff: noqa: RUF009  # option() returns a dataclasses.field

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdiff.checks import Check, Error, is_number, is_whole, items, number, one_of, optional, shown, whole
from fastdiff.core.state import Texts
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.sampler.editing import Guide
from fastdiff.solvers import StepTable
from fastdiff.solvers.arguments import ARGUMENTS
from fastdiff.solvers.churn import check_churn
from fastdiff.solvers.compat.run import FROM_MODEL
from fastdiff.solvers.ddpm import VARIANCES
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.spacing import check_spacing
from fastdiff.solvers.table import check_clip
from fastdiff.unet import UNet, UNetCondition
from fastdiff.unet.condition_config import SIZES

MAX_SCALES = 1 << 20
STRENGTH = 0.8  # of img2img where the caller gives none, as in diffusers' pipelines

NoiseSource = Callable[[int | None, Sequence[int]], Tensor]
"""Function (row, indices) -> noise [len(indices), C, H, W]; row is None for the initial noise."""

# What can exclude an option:
TABLE = "StepTable"  # solver=StepTable: its rows contain the option already
AUTO = "auto"  # solver="auto": it belongs to one solver, which is not known
QUALITY = "quality"  # quality= chooses it
DEADLINE = "deadline_s"  # deadline_s= chooses it, or could not foresee its cost
MEASURED = "measurements"  # images were measured without it, so the measurements say nothing about a call with it


def option(default: Any, flag: str | None = None, *excluded_by: str, check: Check | None = None) -> Any:
    """Declare an option by its default, its flag in ``fastdiff sample`` (if it has one) and what excludes it.

    ``check`` checks what can be known about a value alone; without it `fastdiff.sampler.request` checks everything.
    """
    return dataclasses.field(default=default, metadata={"flag": flag, "excluded_by": excluded_by, "check": check})


def _solver(name: str, value: Any, *, error: Error = InvalidArgument) -> Any:
    return value if isinstance(value, StepTable) else one_of(name, value, ("auto", *SOLVERS), but="a StepTable")


def _clip(name: str, value: Any, *, error: Error = InvalidArgument) -> Any:
    if isinstance(value, str):
        if value != FROM_MODEL:
            raise error(f"{name}={shown(value)}: a positive number, None or {FROM_MODEL!r} is needed")
        return value
    check_clip(name, value, error=error)
    return value


def _churn(name: str, value: Any, *, error: Error = InvalidArgument) -> Any:
    check_churn(name, value, error=error)
    return value


def _interval(name: str, value: Any, *, error: Error = InvalidArgument) -> tuple[float, float]:
    needed = f"{name}={shown(value)}: two numbers (start, end) from 0 to 1 are needed"
    try:
        start, end = (number(name, v) if is_number(v) else v for v in items(name, value, 2))
    except (InvalidArgument, ValueError) as e:
        raise error(needed) from e
    if not all(isinstance(v, float) for v in (start, end)):  # NaN is, and is refused with the range
        raise error(needed)
    return start, end


def scales(value: Any, n: int | None) -> NDArray[np.float64]:
    """Return the guidance scale of each of n images; if n is None, the one or the ones that are listed."""
    alone = value is None or _real(value)
    try:
        listed = [value] if alone else items("guidance", value, MAX_SCALES if n is None else n)
    except InvalidArgument:
        listed = []
    fits = bool(listed) and (alone or n is None or len(listed) == n)
    if not fits or not all(v is None or _real(v) for v in listed):
        many = "one for each image, is" if n is None else f"{n} of them, one for each image, are"
        raise InvalidArgument(
            f"guidance={shown(value)}: one number, or {many} needed; a weight for each step is the column g of a table "
            "given as solver="
        )
    if not all(map(is_number, listed)):
        raise InvalidArgument(f"guidance={shown(value)}: finite numbers are needed")
    array = np.array([float(v) for v in listed])
    return array if n is None else np.broadcast_to(array, (n,))


def _real(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Options of `Sampler.sample`, whose docstring describes them.

    This is their one declaration: the conflicts between options and the options of ``fastdiff sample`` are read from
    it, and tests/sampler/test_options.py compares the signature and the docstring of `Sampler.sample` with it.
    """

    solver: str | StepTable = option("ddim", "--solver", QUALITY, DEADLINE, check=_solver)
    steps: int | None = option(None, "--steps", TABLE, QUALITY, DEADLINE)
    eta: float = option(0.0, "--eta", TABLE, QUALITY, DEADLINE, MEASURED, check=ARGUMENTS["eta"])
    variance: str | None = option(
        None, "--variance", TABLE, QUALITY, DEADLINE, MEASURED, check=optional(partial(one_of, allowed=VARIANCES))
    )
    order: int | None = option(
        None, "--order", TABLE, AUTO, QUALITY, DEADLINE, MEASURED, check=optional(partial(whole, low=1))
    )
    churn: float | Sequence[float] | None = option(
        None, "--churn", TABLE, AUTO, QUALITY, DEADLINE, MEASURED, check=optional(_churn)
    )
    spacing: str | Sequence[float] | None = option(
        None, "--spacing", TABLE, DEADLINE, MEASURED, check=optional(check_spacing)
    )
    clip: float | str | None = option(FROM_MODEL, None, TABLE, MEASURED, check=_clip)
    seed: int | Sequence[int] | None = option(0, "--seed")
    start_index: int | Sequence[int] = option(0, "--start-index")
    index: Sequence[int] | None = option(None, "--index")
    indices: Sequence[int] | None = option(None)
    labels: int | str | Sequence[int | str] | Tensor | None = option(None, "--labels")
    prompts: str | Sequence[str] | None = option(None, "--prompt")
    negative: str | Sequence[str] | Tensor | Texts | None = option(None, "--negative")
    context: Tensor | Texts | None = option(None)
    guidance: float | Sequence[float] = option(1.0, "--guidance")
    guidance_interval: tuple[float, float] = option((0.0, 1.0), None, MEASURED, check=_interval)
    guidance_rescale: float = option(0.0, None, MEASURED, check=partial(number, low=0, high=1))
    size: int | tuple[int, int] | None = option(None, "--size")
    noise: Tensor | NoiseSource | None = option(None)
    batch_size: int | None = option(None, "--batch-size")
    image: Any = option(None, "--image", MEASURED)
    strength: float | None = option(
        None, "--strength", check=optional(partial(number, above=0, high=1, need="a number above 0, at most 1,"))
    )
    mask: Any = option(None, "--mask", MEASURED)
    condition: Any = option(None, "--condition", DEADLINE)
    repaint: tuple[int, int] | None = option(None, None, DEADLINE, MEASURED)
    guide: Guide | None = option(None, None, DEADLINE, MEASURED)
    guide_through: str = option("x0")
    quality: float | None = option(None, "--quality", DEADLINE)
    deadline_s: float | None = option(None, "--deadline", QUALITY)
    compat: str | None = option(None, "--compat", TABLE, AUTO, QUALITY, DEADLINE, MEASURED)

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check, value = field.metadata["check"], getattr(self, field.name)
            if check is not None and value is not field.default:
                object.__setattr__(self, field.name, check(field.name, value))

    @classmethod
    def named(cls, method: str, options: Mapping[str, Any]) -> Options:
        """Make options of keyword arguments; `InvalidArgument` names the method and the ones that do not exist."""
        names = {field.name for field in dataclasses.fields(cls)}
        if not options.keys() <= names:
            unknown = ", ".join(sorted(options.keys() - names))
            allowed = ", ".join(sorted(names - {"indices"}))  # which is another name of index
            raise InvalidArgument(f"{method} has no option {unknown}; allowed: {allowed}")
        return cls(**options)

    @classmethod
    def among(cls, names: Mapping[str, Any]) -> dict[str, Any]:
        """Return the entries of ``names``, the local variables of a method, that are options."""
        return {field.name: names[field.name] for field in dataclasses.fields(cls) if field.name in names}

    @classmethod
    def flags(cls) -> dict[str, str]:
        """Return the flags of the command line by the names of their options."""
        return {field.name: field.metadata["flag"] for field in dataclasses.fields(cls) if field.metadata["flag"]}

    def excluded_by(self, other: str) -> str | None:
        """Return the first option that is given, that is, not its default, and that ``other`` excludes."""
        for field in dataclasses.fields(self):
            if other not in field.metadata["excluded_by"]:
                continue
            value = getattr(self, field.name)
            if value is not None if field.default is None else value != field.default:
                return field.name
        return None

    @property
    def automatic(self) -> bool:
        """Whether the solver is to be chosen here: solver="auto"."""
        return isinstance(self.solver, str) and self.solver == "auto"

    @property
    def late(self) -> float | None:
        """Share of the run that an image goes through; None where the run starts at noise alone."""
        if self.strength is None and self.image is not None and self.mask is None:
            return STRENGTH
        return self.strength


@dataclasses.dataclass(frozen=True)
class NetworkInfo:
    """Facts about a network, read from a `UNetConfig` or a diffusers config, or given as a shape."""

    channels: int  # of its images
    size: tuple[int, int] | None  # height and width that it was trained for; None where its configuration has none
    out_channels: int | None = None  # None where they are unknown
    stride: int = 1  # height and width must be multiples of it
    width: int = 64  # channels of the first block, from which memory is estimated
    classes: int | None = None  # number of classes without the null class; None where it has none, or they are unknown
    null_label: int | None = None  # None where it has no null class, so that it cannot be guided
    text: bool = False  # whether it reads the texts that prompts= gives
    pooled: bool = False  # whether it takes a pooled vector of each text besides
    text_channels: int | None = None  # channels of a text's states; None where it reads none
    pooled_channels: int | None = None  # of that vector
    sized: bool = False  # whether it takes the size of the image in pixels besides
    condition: int = 0  # channels of the condition image that it reads after those of the image
    described: bool = False  # whether it has a configuration; without one any label is passed on to it
    class_names: tuple[str, ...] | None = None  # of the classes from 0 on; None where they have no names

    @classmethod
    def of(cls, unet: nn.Module, shape: tuple[int, int, int] | None, text: bool = False) -> NetworkInfo:
        """Read the facts about a network; ``shape``, the (C, H, W) of its images, counts more than its configuration.

        ``text`` is whether there is a text encoder, whose states the network reads.

        Raises `InvalidArgument` where neither gives the shape of the input, and `ConfigError` for class embeddings
        whose input is not a label.
        """
        if shape is not None and not (
            isinstance(shape, tuple) and len(shape) == 3 and all(is_whole(v) and v >= 1 for v in shape)
        ):
            raise InvalidArgument(f"shape={shown(shape)}: (channels, height, width), each at least 1, is needed")
        config: Any = getattr(unet, "config", None)
        if getattr(config, "in_channels", None) is None:
            if shape is None:
                raise InvalidArgument(
                    "the network has no configuration that tells its input; give shape=(channels, height, width)"
                )
            return cls(channels=shape[0], size=shape[1:])
        sized = text and getattr(config, "addition_embed_type", None) == "text_time"
        pooled = text and getattr(config, "class_embed_type", None) in ("projection", "simple_projection")
        if getattr(config, "class_embed_type", None) is not None and not pooled:
            raise ConfigError(
                f"class_embed_type={config.class_embed_type!r} is not fed by labels, so a Sampler cannot run it"
            )
        own = type(unet) in (UNet, UNetCondition) or type(unet).__module__.partition(".")[0] == "diffusers"
        if own and getattr(config, "cross_attention_dim", None) is not None and not text:
            raise ConfigError(
                f"cross_attention_dim={shown(config.cross_attention_dim)}: the network reads text, which "
                "text_encoder= encodes; without one use a loop with fastdiff.Scheduler, or a module that holds the text"
            )
        if text:
            _check_reads_text(unet)
        # A network with fewer channels of output than of input reads a condition image after the image.
        condition = max(config.in_channels - config.out_channels, 0) if shape is None else 0
        fits = shape is None or shape[0] == config.in_channels
        if not fits and own:
            raise InvalidArgument(
                f"shape={shown(shape)} has {shape[0] if shape else 0} channels; the network takes {config.in_channels}"
            )
        size = config.sample_size
        if size is not None and not isinstance(size, (tuple, list)):
            size = (size, size)
        null = getattr(config, "null_label", None)
        embeds = config.num_class_embeds
        return cls(
            channels=config.in_channels - condition if shape is None else shape[0],
            size=(None if size is None else tuple(size)) if shape is None else shape[1:],
            out_channels=config.out_channels if fits else None,  # a wrapper's configuration may be that of its inside
            stride=1 << (len(config.block_out_channels) - 1),
            width=max(config.block_out_channels[0], 1),
            classes=None if embeds is None else embeds - (null is not None),
            null_label=null,
            text=text,
            pooled=pooled or sized,
            text_channels=config.context_channels if text else None,
            pooled_channels=_pooled_channels(config, sized) if pooled or sized else None,
            sized=sized,
            condition=condition,
            described=True,
        )

    def activation_bytes(self, size: tuple[int, int]) -> int:
        """Estimate the memory of one image's activations: a dozen float32 maps of the first block's width."""
        return 12 * 4 * self.width * size[0] * size[1]


def _check_reads_text(unet: nn.Module) -> None:
    """Raise `InvalidArgument` or `ConfigError` unless a text and its pooled vector are all that a network needs."""
    if not isinstance(unet, UNetCondition) or unet.config.context_channels is None:
        raise InvalidArgument(
            f"text_encoder= is for a fastdiff.UNetCondition that reads text, not for this {type(unet).__name__}"
        )
    config = unet.config
    beside = config.class_embed_type is not None and config.addition_embed_type is not None
    for key in ("num_class_embeds", *(["addition_embed_type"] if beside else [])):
        if getattr(config, key) is not None:
            raise ConfigError(f"{key}={getattr(config, key)!r}: a Sampler gives the network a text only")


def _pooled_channels(config: Any, sized: bool) -> int:
    """Return the channels of the vector of a text; `ConfigError` where there is no room for it beside the sizes."""
    whole_width: int = config.projection_class_embeddings_input_dim
    left = whole_width - (SIZES * config.addition_time_embed_dim if sized else 0)
    if left < 1:
        raise ConfigError(
            f"projection_class_embeddings_input_dim={whole_width}: a Sampler gives the network {SIZES} sizes, embedded "
            f"in {config.addition_time_embed_dim} numbers each, and the vector of a text"
        )
    return left
