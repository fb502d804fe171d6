"""A call of the sampler, checked: everything that can be wrong with it is found here, before anything heavy runs."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fastdiff import solvers
from fastdiff.core.noise import check_seed
from fastdiff.errors import BackendError, CheckpointError, ConfigError, InvalidArgument
from fastdiff.sampler import editing, measured
from fastdiff.sampler.editing import Guide
from fastdiff.sampler.measured import Measured, Point
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.run import FROM_MODEL, VARIANCES, Run
from fastdiff.solvers.paths import late_start, looks_back, repaint, starting_at
from fastdiff.solvers.walk import Schedule

log = logging.getLogger("fastdiff")

# Images are run in chunks whose activations take about this much; larger ones do not make a step faster.
CHUNK_BYTES = 2 << 30
MAX_CHUNK = 64

EDM_STEPS = 256  # the most that a deadline is spent on: Karras et al. 2022, table 2, on ImageNet-64

STRENGTH = 0.8  # of img2img where the caller gives none, as in diffusers' pipelines

NoiseSource = Callable[[int | None, range], Tensor]


@dataclasses.dataclass(frozen=True)
class NetworkInfo:
    """What a sampler must know of a network: read from a `UNetConfig` or a diffusers config, or given as a shape."""

    channels: int
    size: tuple[int, int] | None
    out_channels: int | None = None
    stride: int = 1
    width: int = 64
    classes: int | None = None
    null_label: int | None = None
    described: bool = False

    @classmethod
    def of(cls, unet: nn.Module, shape: tuple[int, int, int] | None) -> NetworkInfo:
        """Raises `InvalidArgument` where neither the network nor ``shape`` tells the input, `ConfigError` for class
        embeddings that are not fed by labels.
        """
        if shape is not None and not (
            isinstance(shape, tuple) and len(shape) == 3 and all(_whole(v) and v >= 1 for v in shape)
        ):
            raise InvalidArgument(f"shape={shape!r}: (channels, height, width), each at least 1, is needed")
        config: Any = getattr(unet, "config", None)
        if getattr(config, "in_channels", None) is None:
            if shape is None:
                raise InvalidArgument(
                    "the network has no configuration that tells its input; give shape=(channels, height, width)"
                )
            return cls(channels=shape[0], size=shape[1:])
        if getattr(config, "class_embed_type", None) is not None:
            raise ConfigError(
                f"class_embed_type={config.class_embed_type!r} is not fed by labels, so a Sampler cannot run it"
            )
        size = config.sample_size
        if size is not None and not isinstance(size, (tuple, list)):
            size = (size, size)
        null = getattr(config, "null_label", None)
        embeds = config.num_class_embeds
        return cls(
            channels=config.in_channels if shape is None else shape[0],
            size=(None if size is None else tuple(size)) if shape is None else shape[1:],
            out_channels=config.out_channels,
            stride=1 << (len(config.block_out_channels) - 1),
            width=max(config.block_out_channels[0], 1),
            classes=None if embeds is None else embeds - (null is not None),
            null_label=null,
            described=True,
        )

    def activation_bytes(self, size: tuple[int, int]) -> int:
        """A rough size of one image's activations: a dozen float32 maps of the first block's width."""
        return 12 * 4 * self.width * size[0] * size[1]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `Sampler.sample`, which describes them."""

    solver: str | StepTable = "ddim"
    steps: int | None = None
    eta: float = 0.0
    variance: str | None = None
    order: int | None = None
    spacing: str | Sequence[float] | None = None
    clip: float | str | None = FROM_MODEL
    seed: int | None = 0
    start_index: int = 0
    labels: int | Sequence[int] | Tensor | None = None
    guidance: float | Sequence[float] = 1.0
    guidance_interval: tuple[float, float] = (0.0, 1.0)
    guidance_rescale: float = 0.0
    size: int | tuple[int, int] | None = None
    noise: Tensor | NoiseSource | None = None
    batch_size: int | None = None
    image: Tensor | None = None
    strength: float | None = None
    mask: Tensor | None = None
    repaint: tuple[int, int] | None = None
    guide: Guide | None = None
    guide_through: str = "x0"
    quality: float | None = None
    deadline_s: float | None = None
    compat: str | None = None

    @property
    def late(self) -> float | None:
        """How much of the run an image goes through; None: it starts at noise alone."""
        if self.strength is None and self.image is not None and self.mask is None:
            return STRENGTH
        return self.strength


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call: n images of ``shape`` in chunks of at most ``batch_size``.

    image, mask: float32 [n, C, H, W] and bool [n, 1 or C, H, W] on the CPU, or None; from_image: the run starts at the
    noised image, not at noise alone.
    """

    n: int
    seed: int
    start_index: int
    shape: tuple[int, int, int]
    table: StepTable
    nfe: int
    labels: Tensor | None
    guidance: NDArray[np.float64]
    guidance_rescale: float
    noise: Tensor | NoiseSource | None
    batch_size: int
    image: Tensor | None = None
    from_image: bool = False
    mask: Tensor | None = None
    guide: Guide | None = None
    guide_through: str = "x0"
    compat: str | None = None

    @property
    def chunks(self) -> list[range]:
        """Positions 0 .. n-1 in runs of at most ``batch_size``."""
        return [range(i, min(i + self.batch_size, self.n)) for i in range(0, self.n, self.batch_size)]

    def indices(self, chunk: range) -> range:
        """Global image indices of a chunk."""
        return range(self.start_index + chunk.start, self.start_index + chunk.stop)


def check(
    n: int,
    o: Options,
    info: NetworkInfo,
    schedule: Schedule,
    prediction: str,
    scheduler_config: Mapping[str, Any],
    backend: str = "eager",
    known: Measured | None = None,
) -> Request:
    """The checked request. Raises `InvalidArgument` naming the value and what is allowed.

    known: the model's measurements, which "auto" and quality= go by. A deadline must be resolved (`in_time`) before.
    """
    if not _whole(n) or n < 1:
        raise InvalidArgument(f"n={n!r}: a whole number of at least 1 is needed")
    if not _whole(o.start_index) or not 0 <= o.start_index <= (1 << 63) - int(n):
        raise InvalidArgument(f"start_index={o.start_index!r}: a whole number from 0 is needed")
    if o.batch_size is not None and (not _whole(o.batch_size) or o.batch_size < 1):
        raise InvalidArgument(f"batch_size={o.batch_size!r}: a whole number of at least 1, or None, is needed")
    seed = secrets.randbits(63) if o.seed is None else check_seed(o.seed)
    image = None if o.image is None else editing.check_image(o.image, n, info.channels)
    given = o.size if image is None or o.size is not None else (image.shape[2], image.shape[3])
    size = image_size(n, given, info)
    shape = (info.channels, *size)
    if image is not None and tuple(image.shape[1:]) != shape:
        raise InvalidArgument(f"size={o.size!r}, but image is {image.shape[2]}x{image.shape[3]}")
    mask = _mask(n, o, shape)
    _check_guide(o, backend)
    table = step_table(o, schedule, prediction, scheduler_config, known)
    if image is not None:
        editing.check_range(image, min(row.c for row in table.rows) * table.data_scale)
    if table.learned_variance and info.out_channels is not None and info.out_channels != 2 * info.channels:
        raise InvalidArgument(
            f"variance='learned_range' needs a network with {2 * info.channels} output channels, "
            f"this one has {info.out_channels}"
        )
    guidance = _guidance(n, o, info)
    table = _guided_between(table, o.guidance_interval)
    if o.repaint is not None:
        table = _repainted(table, o.repaint)
    if not (o.noise is None or isinstance(o.noise, Tensor) or callable(o.noise)):
        raise InvalidArgument(
            f"noise is a {type(o.noise).__name__}; a tensor {(n, *shape)}, a function (row, indices) or None is needed"
        )
    if isinstance(o.noise, Tensor) and tuple(o.noise.shape) != (n, *shape):
        raise InvalidArgument(f"noise has shape {tuple(o.noise.shape)}, {(n, *shape)} is needed")
    default_batch = max(1, min(MAX_CHUNK, CHUNK_BYTES // info.activation_bytes(size)))
    return Request(
        n=int(n),
        seed=seed,
        start_index=int(o.start_index),
        shape=shape,
        table=table,
        nfe=table.nfe(guided=bool((guidance != 1.0).any())),
        labels=_labels(n, o.labels, info),
        guidance=guidance,
        guidance_rescale=float(o.guidance_rescale),
        noise=o.noise,
        batch_size=min(int(n), o.batch_size or default_batch),
        image=image,
        from_image=o.late is not None,
        mask=mask,
        guide=o.guide,
        guide_through=o.guide_through,
    )


def _mask(n: int, o: Options, shape: tuple[int, int, int]) -> Tensor | None:
    for name in ("strength", "mask"):
        if getattr(o, name) is not None and o.image is None:
            raise InvalidArgument(f"{name} needs image=, what it is about")
    if o.repaint is not None and o.mask is None:
        raise InvalidArgument(f"repaint={o.repaint!r} needs image= and mask=: it makes known and new pixels agree")
    return None if o.mask is None else editing.check_mask(o.mask, n, shape)


def _check_guide(o: Options, backend: str) -> None:
    if o.guide is not None and not callable(o.guide):
        raise InvalidArgument(f"guide is a {type(o.guide).__name__}; a function (x0, indices) -> log p is needed")
    if o.guide_through not in editing.THROUGH:
        raise InvalidArgument(f"guide_through={o.guide_through!r} is unknown; allowed: {', '.join(editing.THROUGH)}")
    if o.guide_through == "network":
        if o.guide is None:
            raise InvalidArgument("guide_through='network' needs guide=")
        if backend != "eager":
            raise BackendError(
                f"backend {backend!r} has no gradients, so guide_through='network' cannot run; use backend='eager', or "
                "guide_through='x0', which does without"
            )


def _repainted(table: StepTable, given: tuple[int, int]) -> StepTable:
    if not isinstance(given, (tuple, list)) or len(given) != 2:
        raise InvalidArgument(f"repaint={given!r}: (jump_length, resamples) is needed, as (10, 10)")
    return repaint(table, *given)


def step_table(
    o: Options,
    schedule: Schedule,
    prediction: str,
    scheduler_config: Mapping[str, Any],
    known: Measured | None = None,
) -> StepTable:
    """The table that the options ask for; what they leave open, the model's scheduler configuration decides, and what
    they leave to "auto" or ask for by quality=, its measurements.
    """
    config = scheduler_config
    point = None
    if o.quality is not None:
        point = _of_quality(o, known)
    elif isinstance(o.solver, str) and o.solver == "auto" and o.steps is None:
        points, _ = comparable(o, known)
        point = measured.automatic(points) if points else None
    if point is not None:
        log.info("measured: %s, %d network evaluations", point, point.nfe)
        table = step_table(dataclasses.replace(o, quality=None, **point.options), schedule, prediction, config)
        if len(table) != point.rows:
            assert known is not None
            raise CheckpointError(
                f"{known.path}: {point} is said to take {point.nfe} network evaluations, but has {len(table)} rows here"
            )
        return table
    if isinstance(o.solver, StepTable):
        given = {"eta": o.eta != 0.0, "variance": o.variance is not None, "spacing": o.spacing is not None}
        given |= {"steps": o.steps not in (None, o.solver.steps), "clip": o.clip != FROM_MODEL}
        given |= {"order": o.order is not None, "compat": o.compat is not None}
        for name in (name for name, is_given in given.items() if is_given):
            raise InvalidArgument(f"{name}={getattr(o, name)!r} cannot change a StepTable; leave it out")
        return o.solver if o.late is None else starting_at(o.solver, late_start(o.solver, o.late))
    if o.solver not in SOLVERS:
        raise InvalidArgument(f"solver={o.solver!r} is unknown; allowed: {', '.join(SOLVERS)}, or a StepTable")
    if o.solver == "auto":
        for option in ("order", "compat"):
            if getattr(o, option) is not None:
                raise InvalidArgument(f"{option}={getattr(o, option)!r} needs a solver by name; 'auto' chooses all")
        guided = not np.all(np.asarray(o.guidance) == 1.0)
        steps = o.steps if o.spacing is None or isinstance(o.spacing, str) else len(o.spacing)
        name, length, own = auto(schedule, steps, guided)
        o = dataclasses.replace(o, steps=length)
    else:
        name, own = str(o.solver), {}
    for option, (owners, is_given, instead) in OWNERS.items():
        if is_given(o) and name not in owners:
            owner = " or ".join(map(repr, owners))
            raise InvalidArgument(f"{option}={getattr(o, option)!r} belongs to solver {owner}, not {name!r}{instead}")
    if o.compat is not None:
        return _of_code_base(o, name, schedule, prediction, config)
    clip, threshold = o.clip, None
    if isinstance(clip, str):
        if clip != FROM_MODEL:
            raise InvalidArgument(f"clip={clip!r}: a positive number, None or {FROM_MODEL!r} is needed")
        clip = config.get("clip_sample_range", 1.0) if config.get("clip_sample", True) else None
        if config.get("thresholding"):
            threshold = (config.get("dynamic_thresholding_ratio", 0.995), config.get("sample_max_value", 1.0))
    spacing = o.spacing
    if spacing is None and isinstance(schedule, NoiseSchedule):
        spacing = config.get("timestep_spacing", "trailing")
    common: dict[str, Any] = {"prediction": prediction, "clip": clip, "threshold": threshold, "spacing": spacing}
    if spacing == "leading":
        common["steps_offset"] = config.get("steps_offset", 0)
    common |= own if o.order is None else {"order": o.order}
    table = TABLES[name](schedule, o, config, common)
    if o.late is None:
        return table
    start = late_start(table, o.late)
    if not looks_back(table, start):
        return starting_at(table, start)
    # A multi-step solver starts anew, at its lowest order, where the run does.
    later = [row.t for row in table.rows[start:] if not row.stage]
    spacing = later if isinstance(schedule, NoiseSchedule) else [schedule.sigma(t) for t in later]
    kept = {k: v for k, v in common.items() if k != "steps_offset"}
    return TABLES[name](schedule, dataclasses.replace(o, steps=None), config, {**kept, "spacing": spacing})


def comparable(o: Options, known: Measured | None) -> tuple[list[Point], str]:
    """The measured points that images of these options can be compared with; where there are none, why.

    They were drawn from noise, with the model's own clipping, at one guidance scale throughout.
    """
    if known is None:
        return [], "this model has no measurements; `fastdiff trilemma` makes them"
    names = ("spacing", "variance", "order", "compat", "image", "mask", "repaint", "guide")
    given = {name: getattr(o, name) is not None for name in names}
    given |= {"eta": o.eta != 0.0}
    given |= {"clip": o.clip != FROM_MODEL, "guidance_rescale": o.guidance_rescale != 0.0}
    given |= {"guidance_interval": o.guidance_interval != (0.0, 1.0)}
    for name in (name for name, is_given in given.items() if is_given):
        return [], f"the measurements were made without {name}="
    try:
        scales = np.unique(np.asarray(o.guidance, dtype=np.float64))
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"guidance={o.guidance!r}: one number, or one for each image, is needed") from e
    points = known.at(float(scales[0])) if len(scales) == 1 else []
    if not points:
        return [], f"{known.path} was measured with guidance {', '.join(f'{g:g}' for g in known.guidances)}"
    return points, ""


def _of_quality(o: Options, known: Measured | None) -> Point:
    q = o.quality
    if isinstance(q, bool) or not isinstance(q, (int, float)) or not 1.0 <= q < math.inf:
        raise InvalidArgument(
            f"quality={q!r}: a number of at least 1 is needed, as 1.1 for at most 1.1 times the best measured distance"
        )
    alone("quality", o)
    points, why = comparable(o, known)
    if not points:
        raise InvalidArgument(f"quality={q!r} cannot be promised: {why}")
    return measured.within(points, float(q))


def alone(name: str, o: Options) -> None:
    """quality= and deadline_s= choose what these options would say. solver="ddim", the default, counts as none."""
    given = {"solver": o.solver not in ("ddim", "auto") if isinstance(o.solver, str) else True}
    given |= {other: getattr(o, other) is not None for other in ("steps", "variance", "order", "compat")}
    given |= {"eta": o.eta != 0.0}
    if name == "deadline_s":  # these make the number of rows, or their cost, their own
        given |= {other: getattr(o, other) is not None for other in ("repaint", "guide")}
        given |= {"spacing": not (o.spacing is None or isinstance(o.spacing, str))}
    given |= {other: getattr(o, other) is not None for other in ("quality", "deadline_s") if other != name}
    for other in (other for other, is_given in given.items() if is_given):
        raise InvalidArgument(f"{name}= chooses the solver and its steps; leave out {other}=")


def check_deadline(o: Options) -> None:
    """Raises `InvalidArgument` where ``deadline_s`` is none, or what else is given contradicts it."""
    d = o.deadline_s
    if isinstance(d, bool) or not isinstance(d, (int, float)) or not 0.0 < d < math.inf:
        raise InvalidArgument(f"deadline_s={d!r}: a positive number of seconds is needed")
    alone("deadline_s", o)


def in_time(
    o: Options, r: Request, schedule: Schedule, known: Measured | None, seconds: float, elapsed: float
) -> Options:
    """The options with the solver and the steps that a deadline leaves time for.

        rows = (deadline - elapsed) / (chunks * seconds),      seconds: of one row of a chunk, as timed

    The best measured setting of at most so many rows; without measurements the general rule of `auto` for so many
    steps, at most as many as there are timesteps. ``r`` is the request with any table.
    """
    assert o.deadline_s is not None
    chunks = len(r.chunks)
    rows = (o.deadline_s - elapsed) / (chunks * seconds)
    points, _ = comparable(o, known)
    if points:
        shortest = min(point.rows for point in points)
        point = measured.fitting(points, rows)
        if point is not None:
            log.info("deadline of %g s: %s, at %.3g s a row and chunk", o.deadline_s, point, seconds)
            return dataclasses.replace(o, deadline_s=None, **point.options)
    else:
        shortest = 1
        if isinstance(schedule, solvers.EDMSchedule):
            steps = min(int((rows + 1) / 2), EDM_STEPS)  # of heun: two rows each, the last one
        else:
            steps = min(int(rows), schedule.timesteps)
        if steps >= 1:
            log.info("deadline of %g s: %d steps, at %.3g s a row and chunk", o.deadline_s, steps, seconds)
            return dataclasses.replace(o, deadline_s=None, solver="auto", steps=steps)
    raise InvalidArgument(
        f"deadline_s={o.deadline_s!r} cannot be kept here: the shortest setting, of {shortest} rows, takes about "
        f"{elapsed + shortest * chunks * seconds:.3g} s for {r.n} images"
    )


def _of_code_base(o: Options, name: str, schedule: Schedule, prediction: str, config: Mapping[str, Any]) -> StepTable:
    """The table of ``compat``, which may start late where that needs no other table."""
    assert o.compat is not None
    table = Run(
        o.compat, name, schedule, prediction, config,
        steps=o.steps, eta=o.eta, variance=o.variance, order=o.order, spacing=o.spacing, clip=o.clip,
    ).table()  # fmt: skip
    start = 0 if o.late is None else late_start(table, o.late)
    if looks_back(table, start):
        raise InvalidArgument(f"compat={o.compat!r}: {name}, a multi-step solver, cannot start late; leave compat out")
    return starting_at(table, start)


def auto(schedule: Schedule, steps: int | None, guided: bool) -> tuple[str, int | None, dict[str, Any]]:
    """(solver, steps, its options) that solver="auto" means. A static rule, from what the solvers' papers report:

        EDM networks        heun, 18 steps                       Karras et al. 2022, table 2
        fewer than 10       unipc, order 3, guided: order 2      Zhao et al. 2023, sections 4.1 and 4.2
        10 to 49            dpmpp_3m, guided: dpmpp_2m           Lu et al. 2022 (DPM-Solver++), sections 4.1 and 7.1
        50 to 249           dpmpp_2m_sde                         Lu et al. 2022; Karras et al. 2022, figure 4: given
                                                                 steps enough, noise mends accumulated errors
        250 and more        ddpm                                 Song et al. 2021 (DDIM), table 1

    20 steps where ``steps`` is None. Guidance makes high orders unstable, hence the lower ones.

    It is for models that were not measured (`comparable`). The measurement of the built-in one, among
    benchmarks/results/ (trilemma-fashion-mnist.json), agrees on few steps, where unipc has the smallest distance, plain
    and guided. With more, its distances tell the network's errors, which all solvers share, not the solvers': no
    ground to change the rule for others.
    """
    if isinstance(schedule, solvers.EDMSchedule):
        return "heun", steps, {}
    n = min(20, schedule.timesteps) if steps is None else steps
    if not _whole(n) or n < 10:
        return "unipc", n, {"order": 2 if guided else 3}
    if n < 50:
        return "dpmpp_2m" if guided else "dpmpp_3m", n, {}
    return ("dpmpp_2m_sde" if n < 250 else "ddpm"), n, {}


Build = Callable[[Any, Options, Mapping[str, Any], dict[str, Any]], StepTable]


def _ddim(schedule: Schedule, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    return solvers.ddim(schedule, o.steps, eta=o.eta, set_alpha_to_one=config.get("set_alpha_to_one", True), **common)


def _ddpm(schedule: Schedule, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    named = config.get("variance_type", "fixed_small")
    if o.variance is None and named not in VARIANCES:
        raise InvalidArgument(f"the model's variance_type {named!r} is not supported; give variance=")
    return solvers.ddpm(schedule, o.steps, variance=o.variance or VARIANCES[named], **common)


def _lcm(schedule: Any, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    scaling = config.get("timestep_scaling", 10.0)
    T = schedule.timesteps if isinstance(schedule, NoiseSchedule) else 1
    original = config.get("original_inference_steps", min(50, T))
    kept = {k: v for k, v in common.items() if k not in ("spacing", "steps_offset")}
    return solvers.lcm(schedule, o.steps, original_steps=original, timestep_scaling=scaling, spacing=o.spacing, **kept)


def _consistency(schedule: Any, o: Options, config: Mapping[str, Any], common: dict[str, Any]) -> StepTable:
    if o.spacing is not None:
        raise InvalidArgument(f"spacing={o.spacing!r}: consistency has its own spacing; leave it out")
    return solvers.consistency(schedule, o.steps, clip=common["clip"])


def _plain(build: Callable[..., StepTable]) -> Build:
    return lambda schedule, o, config, common: build(schedule, o.steps, **common)


TABLES: dict[str, Build] = {
    "ddim": _ddim,
    "ddpm": _ddpm,
    "dpmpp_1": _plain(solvers.dpmpp_1),
    "dpmpp_2m": _plain(solvers.dpmpp_2m),
    "dpmpp_3m": _plain(solvers.dpmpp_3m),
    "dpmpp_2m_sde": _plain(solvers.dpmpp_2m_sde),
    "unipc": _plain(solvers.unipc),
    "euler": _plain(solvers.euler),
    "euler_ancestral": _plain(solvers.euler_ancestral),
    "heun": _plain(solvers.heun),
    "lms": _plain(solvers.lms),
    "deis": _plain(solvers.deis),
    "plms": _plain(solvers.plms),
    "lcm": _lcm,
    "consistency": _consistency,
}
SOLVERS = ("auto", *TABLES)

# Options of some solvers: whose they are, whether they are given, and what another solver has instead.
OWNERS: dict[str, tuple[tuple[str, ...], Callable[[Options], bool], str]] = {
    "eta": (("ddim",), lambda o: o.eta != 0.0, "; the noise of ddpm is variance"),
    "variance": (("ddpm",), lambda o: o.variance is not None, "; the noise of ddim is eta"),
    "order": (("unipc", "deis", "lms"), lambda o: o.order is not None, "; dpmpp_1 to dpmpp_3m say theirs"),
}


def image_size(n: int, size: int | tuple[int, int] | None, info: NetworkInfo) -> tuple[int, int]:
    """Height and width of the images; `InvalidArgument` where they, or n of them, cannot be."""
    if size is None:
        if info.size is None:
            raise InvalidArgument("the network's configuration has no sample_size; give size=")
        height, width = info.size
    else:
        pair = size if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2 or not all(_whole(v) and v >= 1 for v in pair):
            raise InvalidArgument(f"size={size!r}: one whole number or (height, width), each at least 1, is needed")
        height, width = pair
    if height % info.stride or width % info.stride:
        raise InvalidArgument(f"size={height}x{width}: both must be multiples of the network's stride, {info.stride}")
    memory = _memory()
    if memory is not None:
        need, result = info.activation_bytes((height, width)), 4 * n * info.channels * height * width
        if need > memory:
            raise InvalidArgument(
                f"size={height}x{width}: one image needs about {need >> 30} GiB, this machine has {memory >> 30} GiB"
            )
        if result > memory:
            raise InvalidArgument(
                f"n={n}: the images alone need {result >> 30} GiB, this machine has {memory >> 30} GiB; draw fewer at "
                "a time, with start_index for the next ones"
            )
    return height, width


def _labels(n: int, labels: int | Sequence[int] | Tensor | None, info: NetworkInfo) -> Tensor | None:
    if labels is None:
        if info.null_label is not None:
            return torch.full((n,), info.null_label, dtype=torch.int64)
        if info.classes is not None:
            raise InvalidArgument(f"this network is class-conditional; give labels from 0 to {info.classes - 1}")
        return None
    if info.classes is None and info.described:
        raise InvalidArgument(f"labels={labels!r}: this network has no classes")
    try:
        tensor = torch.as_tensor([labels] * n if _whole(labels) else labels)
    except (TypeError, ValueError, RuntimeError) as e:
        raise InvalidArgument(f"labels={labels!r}: one whole number, or {n} of them, are needed") from e
    if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool or tuple(tensor.shape) != (n,):
        raise InvalidArgument(
            f"labels of {tensor.dtype} {tuple(tensor.shape)}: one whole number, or {n} of them, are needed"
        )
    limit = info.classes if info.classes is not None else 1 << 31
    tensor = tensor.to(device="cpu", dtype=torch.int64)
    bad = tensor[(tensor < 0) | (tensor >= limit)]
    if len(bad):
        raise InvalidArgument(f"label {int(bad[0])} is out of range: 0 to {limit - 1} are allowed")
    return tensor


def _guidance(n: int, o: Options, info: NetworkInfo) -> NDArray[np.float64]:
    try:
        scales = np.broadcast_to(np.asarray(o.guidance, dtype=np.float64), (n,))
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"guidance={o.guidance!r}: one number, or {n} of them, are needed") from e
    if not np.isfinite(scales).all():
        raise InvalidArgument(f"guidance={o.guidance!r}: finite numbers are needed")
    rescale = o.guidance_rescale
    if isinstance(rescale, bool) or not isinstance(rescale, (int, float)) or not 0.0 <= rescale <= 1.0:
        raise InvalidArgument(f"guidance_rescale={rescale!r}: a number from 0 to 1 is needed")
    if (scales != 1.0).any():
        if info.null_label is None:
            raise InvalidArgument(
                f"guidance={o.guidance!r} needs a network trained with label dropout (config null_label); 1 is off"
            )
        if o.labels is None:
            raise InvalidArgument(f"guidance={o.guidance!r} needs labels to guide towards; 1 is off")
    return scales


def _guided_between(table: StepTable, interval: tuple[float, float]) -> StepTable:
    try:
        start, end = (float(v) for v in interval)
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"guidance_interval={interval!r}: two numbers (start, end) from 0 to 1 are needed") from e
    return table if (start, end) == (0.0, 1.0) else table.with_guidance_interval(start, end)


def _whole(value: object) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _memory() -> int | None:
    """Physical memory in bytes; None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
