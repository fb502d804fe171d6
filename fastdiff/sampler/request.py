"""Checks of a call of the sampler, which find everything that is wrong with it before anything heavy runs."""

from __future__ import annotations

import dataclasses
import difflib
import secrets
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastdiff import memory
from fastdiff.checks import is_whole, items, one_of, shown, whole
from fastdiff.core.noise import check_seed
from fastdiff.core.state import Texts
from fastdiff.errors import BackendError, InvalidArgument
from fastdiff.modes import plain_modes
from fastdiff.sampler import editing, prompts
from fastdiff.sampler.editing import Guide, check_dense
from fastdiff.sampler.options import NetworkInfo, NoiseSource, Options, scales
from fastdiff.sampler.prompts import Prompts, TextEncoder
from fastdiff.sampler.tables import step_table
from fastdiff.solvers import StepTable
from fastdiff.solvers.paths import repaint
from fastdiff.solvers.walk import Schedule

# Images are drawn in chunks whose activations take about this much; larger ones do not make a step faster.
CHUNK_BYTES = 2 << 30
MAX_CHUNK = 64
SMALL = 64 << 20  # bytes of a call that are not compared with the free memory
MAX_IMAGES, MAX_SIDE = 1 << 60, 1 << 20


@dataclasses.dataclass(frozen=True)
class Request:
    """A checked call of `Sampler.sample`. Tensors are on the CPU."""

    n: int  # number of images
    seed: int | tuple[int, ...]  # of all images, or of each one
    index: Sequence[int]  # global index of each image; a range unless the caller chose them
    shape: tuple[int, int, int]  # (C, H, W) of an image
    table: StepTable
    nfe: int  # network evaluations per image
    labels: Tensor | None  # int64 [n]: classes, or numbers of the prompts
    class_names: tuple[str, ...] | None
    prompts: Prompts | None  # of a network that reads text
    guidance: NDArray[np.float64]  # scale of classifier-free guidance for each image, [n]
    guidance_rescale: float  # from 0 (off) to 1
    noise: Tensor | NoiseSource | None  # as given
    batch_size: int  # the images are drawn in chunks of at most so many
    image: Tensor | None = None  # float32 [n, C, H, W]
    from_image: bool = False  # whether the run starts at the noised image, not at noise alone
    condition: Tensor | None = None  # float32 [n, K, H, W], which the network reads besides
    texts: Texts | None = None  # the encoded prompts
    mask: Tensor | None = None  # bool [n, 1 or C, H, W], True where the image is drawn anew
    guide: Guide | None = None
    guide_through: str = "x0"

    @property
    def chunks(self) -> list[range]:
        """The positions 0 to n - 1, in ranges of at most ``batch_size``."""
        return [range(i, min(i + self.batch_size, self.n)) for i in range(0, self.n, self.batch_size)]

    def indices(self, chunk: range) -> Sequence[int]:
        """Return the global image indices of a chunk, a range unless the caller chose them."""
        return self.index[chunk.start : chunk.stop]

    def seeds(self, chunk: range) -> list[int]:
        """Return the seeds of a chunk's images."""
        return [self.seed] * len(chunk) if isinstance(self.seed, int) else list(self.seed[chunk.start : chunk.stop])


@plain_modes()
def check(
    n: int,
    o: Options,
    info: NetworkInfo,
    schedule: Schedule,
    prediction: str,
    scheduler_config: Mapping[str, Any],
    backend: str = "eager",
    encoder: TextEncoder | None = None,
) -> Request:
    """Return the checked request. Raises `InvalidArgument` naming the value and what is allowed.

    `fastdiff.sampler.choice` must have resolved "auto", a quality and a deadline before.
    """
    n = whole("n", n, 1)
    if n > MAX_IMAGES:
        raise InvalidArgument(f"n={shown(n)}: the images alone need more GiB than there are; draw fewer at a time")
    index = _index(n, o)
    batch_size = None if o.batch_size is None else whole("batch_size", o.batch_size, 1, but="None")
    seed = _seed(n, o.seed)
    image = None if o.image is None else editing.check_image(editing.as_image(o.image, info.channels), n, info.channels)
    condition = _condition(n, o, info)
    sized = condition if image is None else image
    given = o.size if sized is None or o.size is not None else (sized.shape[2], sized.shape[3])
    size = image_size(n, given, info)
    shape = (info.channels, *size)
    if image is not None and tuple(image.shape[1:]) != shape:
        raise InvalidArgument(f"size={shown(o.size)}, but image is {image.shape[2]}x{image.shape[3]}")
    if condition is not None and tuple(condition.shape[2:]) != size:
        raise InvalidArgument(
            f"images of {size[0]}x{size[1]}, but condition is {condition.shape[2]}x{condition.shape[3]}"
        )
    mask = _mask(n, o, shape)
    _check_guide(o, backend)
    table = step_table(o, schedule, prediction, scheduler_config)
    if image is not None:
        editing.check_range(image, min(row.c for row in table.rows) * table.data_scale)
    _check_output(info, table)
    given_prompts = prompts.check(n, o, info, encoder)
    guidance = _guidance(n, o, info)
    table = _guided_between(table, o.guidance_interval)
    if o.repaint is not None:
        table = _repainted(table, o.repaint)
    _check_noise(o.noise, (n, *shape))
    default_batch = max(1, min(MAX_CHUNK, CHUNK_BYTES // info.activation_bytes(size)))
    return Request(
        n=n,
        seed=seed,
        index=index,
        shape=shape,
        table=table,
        nfe=table.nfe(guided=bool((guidance != 1.0).any())),
        labels=_labels(n, o.labels, info) if given_prompts is None else given_prompts.label,
        class_names=info.class_names,
        prompts=given_prompts,
        guidance=guidance,
        guidance_rescale=o.guidance_rescale,
        noise=o.noise,
        batch_size=min(n, batch_size or default_batch),
        image=image,
        from_image=o.late is not None,
        condition=condition,
        mask=mask,
        guide=o.guide,
        guide_through=o.guide_through,
    )


def _check_output(info: NetworkInfo, table: StepTable) -> None:
    """Refuse networks whose output has other channels than the run needs."""
    if info.out_channels is not None and info.out_channels not in (info.channels, 2 * info.channels):
        C = info.channels
        raise InvalidArgument(
            f"the network gives {info.out_channels} channels for images of {C} channels; {C} are needed, or {2 * C} "
            "where the variance is learned"
        )
    if table.learned_variance and info.out_channels is not None and info.out_channels != 2 * info.channels:
        raise InvalidArgument(
            f"variance='learned_range' needs a network with {2 * info.channels} output channels, "
            f"this one has {info.out_channels}"
        )


def _condition(n: int, o: Options, info: NetworkInfo) -> Tensor | None:
    """Return the condition images, which the network needs or does not take."""
    if o.condition is None and info.condition:
        raise InvalidArgument(
            f"the network takes {info.channels + info.condition} channels and gives {info.channels}, so it needs "
            f"condition= with {info.condition} channels: an image to go by for each image, as [n, C, H, W] in [-1, 1]"
        )
    if o.condition is None:
        return None
    if not info.condition:
        raise InvalidArgument("condition= is for networks with more channels of input than of output; this one has not")
    condition = editing.as_image(o.condition, info.condition, "condition")
    return editing.check_image(condition, n, info.condition, "condition")


def _seed(n: int, seed: Any) -> int | tuple[int, ...]:
    """Return the seed, or the seed of each image where they are a list."""
    if seed is None:
        return secrets.randbits(63)
    if not _is_list(seed):
        return check_seed(seed)
    listed = items("seed", seed, n)
    if len(listed) != n:
        raise InvalidArgument(f"seed={shown(seed)}: one seed, or {n} of them, one for each image, are needed")
    return tuple(map(check_seed, listed))


def _index(n: int, o: Options) -> Sequence[int]:
    """Return the global index of each image: from ``start_index`` on, or as chosen."""
    chosen = {name: getattr(o, name) for name in ("index", "indices") if getattr(o, name) is not None}
    if _is_list(o.start_index) or (chosen and not (is_whole(o.start_index) and o.start_index == 0)):
        chosen["start_index"] = o.start_index
    if not chosen:
        start = whole("start_index", o.start_index, 0, (1 << 63) - n)
        return range(start, start + n) if not _is_list(o.seed) else (start,) * n
    if len(chosen) > 1:
        raise InvalidArgument(f"{' and '.join(chosen)} both say which images of the seed are drawn; give one of them")
    ((name, value),) = chosen.items()
    listed = items(name, value, n)
    if len(listed) != n:
        raise InvalidArgument(f"{name}={shown(value)}: {n} of them, one for each image, are needed")
    return tuple(whole(name, i, 0, (1 << 63) - 1) for i in listed)


def _is_list(value: Any) -> bool:
    if isinstance(value, (Tensor, np.ndarray)):
        return value.ndim > 0
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _check_noise(noise: object, shape: tuple[int, ...]) -> None:
    """Raise `InvalidArgument` unless ``noise`` is None, a function or a tensor of floats of the given shape."""
    if noise is None or (callable(noise) and not isinstance(noise, Tensor)):
        return
    if not isinstance(noise, Tensor):
        raise InvalidArgument(
            f"noise is a {type(noise).__name__}; a tensor {shape}, a function (row, indices) or None is needed"
        )
    check_dense("noise", noise)
    if not noise.is_floating_point():
        raise InvalidArgument(f"noise is a tensor of {noise.dtype}; floats are needed")
    if tuple(noise.shape) != shape:
        raise InvalidArgument(f"noise has shape {tuple(noise.shape)}, {shape} is needed")


def _mask(n: int, o: Options, shape: tuple[int, int, int]) -> Tensor | None:
    for name in ("strength", "mask"):
        if getattr(o, name) is not None and o.image is None:
            raise InvalidArgument(f"{name} needs image=, to which it applies")
    if o.repaint is not None and o.mask is None:
        raise InvalidArgument(f"repaint={shown(o.repaint)} needs image= and mask=: it makes known and new pixels agree")
    return None if o.mask is None else editing.check_mask(editing.as_mask(o.mask), n, shape)


def _check_guide(o: Options, backend: str) -> None:
    if o.guide is not None and not callable(o.guide):
        raise InvalidArgument(f"guide is a {type(o.guide).__name__}; a function (x0, indices) -> log p is needed")
    one_of("guide_through", o.guide_through, editing.THROUGH)
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
        raise InvalidArgument(f"repaint={shown(given)}: (jump_length, resamples) is needed, as (10, 10)")
    return repaint(table, *given)


def image_size(n: int, size: int | tuple[int, int] | None, info: NetworkInfo) -> tuple[int, int]:
    """Return the height and width of the images; `InvalidArgument` if the network or the memory excludes them."""
    if size is None:
        if info.size is None:
            raise InvalidArgument("the network's configuration has no sample_size; give size=")
        height, width = info.size
    else:
        pair = size if isinstance(size, (tuple, list)) else (size, size)
        if len(pair) != 2 or not all(is_whole(v) and v >= 1 for v in pair):
            raise InvalidArgument(f"size={shown(size)}: a whole number or (height, width), each at least 1, is needed")
        height, width = (int(v) for v in pair)
        if max(height, width) > MAX_SIDE:
            raise InvalidArgument(f"size={shown(size)}: height and width of at most {MAX_SIDE} are possible")
    if height % info.stride or width % info.stride:
        raise InvalidArgument(f"size={height}x{width}: both must be multiples of the network's stride, {info.stride}")
    _check_memory(n, (height, width), info)
    return height, width


def _check_memory(n: int, size: tuple[int, int], info: NetworkInfo) -> None:
    """Raise `InvalidArgument` where the network's work on one image, or the n images, need more memory than is free."""
    # Besides the result, a chunk of at least one image has its state and the network's activations.
    work, result = info.activation_bytes(size), 4 * n * info.channels * size[0] * size[1]
    left = memory.free() if work + result > SMALL else None  # asking takes time, and little is always free
    if left is None:
        return
    if work > left:
        raise InvalidArgument(
            f"size={size[0]}x{size[1]}: one image needs about {_gib(work)}, this process can take {_gib(left)} more"
        )
    if work + result > left:
        raise InvalidArgument(
            f"n={n}: the images need {_gib(result)} and the work on one about {_gib(work)}, this process can take "
            f"{_gib(left)} more; draw fewer at a time, with start_index for the next ones"
        )


def _gib(size: int) -> str:
    return f"{size >> 30} GiB" if size >= 10 << 30 else f"{size >> 20} MiB"


def class_of(name: str, info: NetworkInfo) -> int:
    """Return the number of the class of this name; `InvalidArgument` lists the names that are like it."""
    names = info.class_names or ()
    if name in names:
        return names.index(name)
    close = difflib.get_close_matches(name, names, 5) or [*names[:10], *(["..."] if len(names) > 10 else [])]
    raise InvalidArgument(f"label {shown(name)} is unknown; the model's classes are {', '.join(close)}")


def _labels(n: int, labels: int | str | Sequence[int | str] | Tensor | None, info: NetworkInfo) -> Tensor | None:
    if info.class_names is None:
        pass  # a name is refused below, like everything that is no whole number
    elif isinstance(labels, str):
        labels = class_of(labels, info)
    elif isinstance(labels, (list, tuple)) and any(isinstance(label, str) for label in labels):
        labels = [class_of(label, info) if isinstance(label, str) else label for label in labels]
    if labels is None:
        if info.null_label is not None:
            return torch.full((n,), info.null_label, dtype=torch.int64, device="cpu")
        if info.classes is not None:
            raise InvalidArgument(f"this network is class-conditional; give labels from 0 to {info.classes - 1}")
        return None
    if info.classes is None and info.described:
        raise InvalidArgument(f"labels={shown(labels)}: this network has no classes")
    try:
        if isinstance(labels, Tensor):
            check_dense("labels", labels)
        tensor = torch.as_tensor([labels] * n if is_whole(labels) else _plain(labels, n), dtype=None, device="cpu")
    except (TypeError, ValueError, RuntimeError, OverflowError) as e:
        raise InvalidArgument(f"labels={shown(labels)}: one whole number, or {n} of them, are needed") from e
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


def _plain(labels: Any, n: int) -> Any:
    """Return labels that are a tensor, an array or a list themselves, others as a list that is hardly longer than n."""
    whole_or_list = (Tensor, np.ndarray, list, bool, float, complex)
    return labels if isinstance(labels, whole_or_list) else items("labels", labels, n + 1)


def _guidance(n: int, o: Options, info: NetworkInfo) -> NDArray[np.float64]:
    given = scales(o.guidance, n)
    if (given != 1.0).any():
        if info.text:
            return given
        if info.null_label is None:
            raise InvalidArgument(
                f"guidance={shown(o.guidance)} needs a network trained with label dropout (config null_label); 1 is off"
            )
        if o.labels is None:
            raise InvalidArgument(f"guidance={shown(o.guidance)} needs labels to guide towards; 1 is off")
    return given


def _guided_between(table: StepTable, interval: tuple[float, float]) -> StepTable:
    return table if interval == (0.0, 1.0) else table.with_guidance_interval(*interval)
