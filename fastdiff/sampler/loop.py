"""The loop over the rows of a step table: chunks, padding, initial noise, known pixels, guides, previews."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import logging
import math
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence

import torch
from torch import Tensor, nn

from fastdiff.backends import Runner
from fastdiff.backends.eager import EagerRunner
from fastdiff.core import noise, process, update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import CallbackError, Cancelled, FastdiffError, InvalidArgument, NumericsError
from fastdiff.modes import plain_modes
from fastdiff.sampler import editing
from fastdiff.sampler.editing import Inpainting
from fastdiff.sampler.options import NoiseSource
from fastdiff.sampler.output import Event, SampleOutput
from fastdiff.sampler.request import Request

log = logging.getLogger("fastdiff")

# Magnitudes of finished images, in units of the data: latents have values of some tens, and an untrained network
# without clipping reaches 1e5 with a cosine schedule, whose first row multiplies noise by 2e4.
MOST_LIKELY, MOST = 1e3, 1e6

Rows = Generator[tuple[Event | None, Tensor | None], None, None]
"""After every row: its event, where a preview was asked for, and the images [n, C, H, W], where a chunk ends."""


class Loop:
    """Runs requests on one network; calls from several threads take turns, row by row, by ``lock``.

    The network is in evaluation mode while a row runs. ``runner(batch, shape)`` returns the runner; it is called under
    the lock at the start of every chunk. ``device`` is that of the state, ``dtype`` that of the network.
    """

    def __init__(
        self,
        unet: nn.Module,
        runner: Callable[[int, tuple[int, int, int]], Runner],
        device: torch.device,
        dtype: torch.dtype,
    ):
        self.lock = threading.Lock()
        self._unet = unet
        self._runner = runner
        self._device = device
        self._dtype = dtype
        self._cancellations = 0

    def cancel(self) -> None:
        """End all calls that have begun, before their next row."""
        self._cancellations += 1

    def run(self, r: Request, callback: Callable[[Event], None] | None, progress: bool) -> SampleOutput:
        """Run all rows and return the images. Raises what `Sampler.sample` lists, but for `InvalidArgument`."""
        result = _empty(r)
        done = 0
        rows = self.rows(r, preview=lambda _: callback is not None, progress=progress)
        with contextlib.closing(rows):  # else the traceback of an error would keep the state in memory
            for event, images in rows:
                if callback is not None and event is not None:
                    try:
                        callback(event)
                    except Exception as e:
                        raise CallbackError(
                            f"the callback raised {type(e).__name__} at row {event.row} of {event.rows}: {e}"
                        ) from e
                if images is not None:
                    result[done : done + len(images)].copy_(images)
                    done += len(images)
        if done < r.n:
            raise Cancelled(f"cancelled with {done} of {r.n} images finished")
        output = SampleOutput(result, r.seed, r.start_index, r.table, r.nfe, r.labels, r.class_names)
        _check_numbers(output, self._dtype)
        return output

    def seconds_per_row(self, r: Request) -> float:
        """Run the request's first chunk, and return the seconds of its slowest row; the first one is not counted."""
        k = r.batch_size
        labels, image, mask = (None if whole is None else whole[:k] for whole in (r.labels, r.image, r.mask))
        first = dataclasses.replace(r, n=k, guidance=r.guidance[:k], noise=None, labels=labels, image=image, mask=mask)
        ends = [time.perf_counter() for _ in self.rows(first, preview=lambda _: False)]
        if len(ends) < len(r.table):
            raise Cancelled("cancelled before the first image")
        return max(after - before for before, after in itertools.pairwise(ends))

    def rows(self, r: Request, preview: Callable[[int], bool], progress: bool = False) -> Rows:
        """Begin a call, which `cancel` ends from now on. ``preview(row)`` says whether a row's event is wanted."""
        return process.pieces(self._rows(r, self._cancellations, preview, progress))

    def _rows(self, r: Request, started: int, preview: Callable[[int], bool], progress: bool) -> Rows:
        modules = list(self._unet.modules())  # once, as it takes time
        with _bar(progress, len(r.chunks) * len(r.table)) as tick:
            for chunk in r.chunks:
                state, inpainting = _start(r, chunk, self._device)
                with self.lock:
                    if self._cancellations != started:  # nothing is prepared for a sampler that was closed
                        return
                    runner = self._runner(r.batch_size, r.shape)
                for row in range(len(r.table)):
                    if self._cancellations != started:
                        return
                    if r.guide is not None:
                        with self.lock, _evaluating(modules):
                            leaf = _forward(runner, state, r.guide_through)
                        # Without the lock, as the user's function may use the sampler.
                        editing.guide(state, r.guide, r.indices(chunk), leaf, row, len(r.table))
                    with self.lock, _evaluating(modules):
                        result = _step(runner, state, inpainting, r, chunk, row, preview(row))
                    tick()
                    yield result


def _empty(r: Request) -> Tensor:
    """Return memory for all images; the chunks are copied into it."""
    try:
        return torch.empty((r.n, *r.shape), dtype=torch.float32, device="cpu")
    except RuntimeError as e:
        raise InvalidArgument(
            f"n={r.n}: there is no memory for {r.n} images of {4 * math.prod(r.shape)} bytes; draw fewer at a time, "
            "with start_index for the next ones"
        ) from e


def _check_numbers(output: SampleOutput, dtype: torch.dtype) -> None:
    """Raise `NumericsError` where images are NaN, infinite or too large to be any; warn where they are suspicious."""
    low, high = torch.aminmax(output.images.flatten(1), dim=1)
    size = torch.maximum(-low, high) / max(1.0, output.table.data_scale)  # NaN where a value is
    large = size > MOST_LIKELY
    if not large.any() and torch.isfinite(size).all():
        return
    for bad, what in ((~torch.isfinite(size), "became NaN or infinite"), (size > MOST, "grew beyond any image")):
        if bad.any():
            where = tuple(output.start_index + int(i) for i in torch.nonzero(bad)[:, 0])
            reach = f", to {float(size[bad].max()):.3g}" if torch.isfinite(size[bad]).all() else ""
            raise NumericsError(
                f"{len(where)} of {len(size)} images {what}{reach} in {dtype} (index "
                f"{', '.join(map(str, where[:20]))}); the others are in this error's .output. "
                "Try float32, or less guidance",
                where,
                output,
            )
    indices = [output.start_index + int(i) for i in torch.nonzero(large)[:20, 0]]
    log.warning("images %s have values up to %.3g; images of [-1, 1] need clip=", indices, float(size.max()))


@plain_modes()
def _step(
    runner: Runner, state: State, inpainting: Inpainting | None, r: Request, chunk: range, row: int, shown: bool
) -> tuple[Event | None, Tensor | None]:
    """Run one row, after `_forward` where there is a guide; the result is a copy, as runners reuse their buffers."""
    n = len(chunk)
    known = None if inpainting is None else inpainting.known(state)
    x0 = None
    if r.guide is None and not shown:
        runner.step(state)
    else:
        if r.guide is None:
            runner.forward(state)
        if shown:
            x0 = update.predict_x0(state)[:n] * r.table.data_scale
        runner.update(state)
    if inpainting is not None and known is not None:
        inpainting.put(state, known)
    event = None if x0 is None else Event(row, len(r.table), r.indices(chunk), state.x[:n].clone(), x0)
    return event, state.x[:n].clone() if row == len(r.table) - 1 else None


@plain_modes()
def _joined(parts: list[Tensor]) -> Tensor:
    return torch.cat(parts)


def _forward(runner: Runner, state: State, through: str) -> Tensor | None:
    """Evaluate the network for a guide; where it is differentiated, return the input with the graph."""
    if through == "network":
        assert isinstance(runner, EagerRunner), "checked with the request"
        return runner.forward_with_gradient(state)
    runner.forward(state)
    return None


@plain_modes()
def _start(r: Request, chunk: range, device: torch.device) -> tuple[State, Inpainting | None]:
    """Return the state of one chunk at row 0, with its initial noise, and the known pixels of its images.

    A short last chunk is padded with images that stay idle, so that no other batch size needs a runner.
    """
    indices, pad = r.indices(chunk), r.batch_size - len(chunk)
    index = [*indices, *[0] * pad]

    def padded(z: Tensor) -> Tensor:
        if not isinstance(z, Tensor) or tuple(z.shape) != (len(chunk), *r.shape):
            got = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
            raise InvalidArgument(f"noise must give a tensor {(len(chunk), *r.shape)}, got {got}")
        z = z.detach().to(device=device, dtype=torch.float32)
        return torch.cat([z, z.new_zeros(pad, *r.shape)])

    image = None if r.image is None else padded(r.image[chunk.start : chunk.stop])
    inpainting = None
    if image is not None and r.mask is not None:
        anew = r.mask[chunk.start : chunk.stop].to(device)
        inpainting = Inpainting(image, torch.cat([anew, anew.new_zeros(pad, *anew.shape[1:])]))
    source = r.noise
    if isinstance(source, Tensor):
        x = padded(source[chunk.start : chunk.stop])
    elif source is not None:
        x = padded(_noise(source, None, indices))
    else:
        i = torch.tensor(index, dtype=torch.int64, device=device)
        x = noise.normal(torch.full_like(i, noise.as_int64(r.seed)), i, torch.zeros_like(i), noise.INITIAL, r.shape)
    first = r.table.rows[0].abar
    if image is not None and r.from_image:
        x = editing.noised(image, first, r.table.data_scale, x if first < 1.0 else None)
    else:
        x = x * r.table.init_scale
    label = None
    if r.labels is not None:
        label = torch.cat([r.labels[chunk.start : chunk.stop], r.labels[:1].expand(pad)])
    state = State.create(
        x,
        TableBank([r.table], device),
        seed=r.seed,
        index=index,
        label=label,
        guidance=[*r.guidance[chunk.start : chunk.stop], *[1.0] * pad],
        guidance_rescale=r.guidance_rescale,
        noise=None
        if source is None or isinstance(source, Tensor)
        else lambda row: padded(_noise(source, row, indices)),
    )
    if pad:
        state.idle(range(len(chunk), r.batch_size))
    return state, inpainting


def _noise(source: NoiseSource, row: int | None, indices: range) -> Tensor:
    """Call the caller's source of noise; what it raises is a `CallbackError`."""
    try:
        return source(row, indices)
    except FastdiffError:
        raise
    except Exception as e:
        where = "for the initial noise" if row is None else f"at row {row}"
        raise CallbackError(f"the noise function raised {type(e).__name__} {where}: {e}") from e


@contextlib.contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    """Turn dropout off for one step, then restore every module's mode: a network in training can be sampled."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextlib.contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error; yield the function that advances it by one row."""
    if not show:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("sampling", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
