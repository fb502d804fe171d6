"""The loop over the rows of a step table: chunks, padding, initial noise, known pixels, guides, previews."""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import logging
import math
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import ParamSpec, TypeVar

import torch
from torch import Tensor, nn

from fastdiff.backends import Runner
from fastdiff.backends.eager import EagerRunner
from fastdiff.core import noise, process, update
from fastdiff.core.state import State, TableBank
from fastdiff.core.turns import Lock, Turns, reentrant
from fastdiff.errors import (
    BackendError,
    CallbackError,
    Cancelled,
    FastdiffError,
    InvalidArgument,
    NumericsError,
    ReentrantCall,
)
from fastdiff.modes import kept_random_state, plain_modes
from fastdiff.sampler import editing
from fastdiff.sampler.editing import Inpainting
from fastdiff.sampler.options import NoiseSource
from fastdiff.sampler.output import Event, SampleOutput
from fastdiff.sampler.request import Request
from fastdiff.sampler.runners import Runners

log = logging.getLogger("fastdiff")

# Magnitudes of finished images, in units of the data: latents have values of some tens, and an untrained network
# without clipping reaches 1e5 with a cosine schedule, whose first row multiplies noise by 2e4.
MOST_LIKELY, MOST = 1e3, 1e6

P = ParamSpec("P")
R = TypeVar("R")
Rows = Generator[tuple[Event | None, Tensor | None], None, None]
"""After every row: its event, where a preview was asked for, and the images [n, C, H, W], where a chunk ends."""


class Loop:
    """Runs requests on one network; calls from several threads take turns, row by row.

    No function of the caller runs during a turn, except for the network and its forward hooks.
    """

    def __init__(self, runners: Runners):
        self._runners = runners
        self._turns = Turns()
        self._cancellations = 0
        self._closed = False

    def cancel(self) -> None:
        """End all calls that have begun, before their next row."""
        self._cancellations += 1

    def close(self) -> None:
        """End all calls and free the runners; from within a step, as soon as that ends."""
        self._closed = True
        self.cancel()
        with contextlib.suppress(ReentrantCall):
            self._turns.take(self._runners.clear)

    def run(self, r: Request, callback: Callable[[Event], None] | None, progress: bool) -> SampleOutput:
        """Run all rows and return the images. Raises what `Sampler.sample` lists, but for `InvalidArgument`."""
        result = self._turns.take(empty, r)
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
                    self._turns.take(result[done : done + len(images)].copy_, images)
                    done += len(images)
                    images = None  # so that its memory is free before the next chunk's is taken
        if done < r.n:
            raise Cancelled(f"cancelled with {done} of {r.n} images finished")
        return self._turns.take(self._output, r, result)

    def _output(self, r: Request, images: Tensor) -> SampleOutput:
        """Return the images of all chunks, and raise if they are not finite, or too large."""
        labels, texts = (r.labels, None) if r.prompts is None else (None, r.prompts.of_images)
        output = SampleOutput(images, r.seed, r.index[0], r.table, r.nfe, labels, r.class_names, r.index, texts)
        check_numbers(output, self._runners.dtype)
        return output

    def seconds_per_row(self, r: Request) -> float:
        """Run the request's first chunk, and return the seconds of its slowest row; the first one is not counted."""
        k = r.batch_size
        labels, image, mask, condition = (
            None if whole is None else whole[:k] for whole in (r.labels, r.image, r.mask, r.condition)
        )
        prompts = r.prompts and dataclasses.replace(r.prompts, label=r.prompts.label[:k], null=r.prompts.null[:k])
        first = dataclasses.replace(
            r, n=k, index=r.index[:k], seed=r.seed if isinstance(r.seed, int) else r.seed[:k], guidance=r.guidance[:k],
            noise=None, labels=labels, prompts=prompts, image=image, mask=mask, condition=condition,
        )  # fmt: skip
        ends = [time.perf_counter() for _ in self.rows(first, preview=lambda _: False)]
        if len(ends) < len(r.table):
            raise Cancelled("cancelled before the first image")
        return max(after - before for before, after in itertools.pairwise(ends))

    def rows(self, r: Request, preview: Callable[[int], bool], progress: bool = False) -> Rows:
        """Begin a call, which `cancel` ends from now on. ``preview(row)`` says whether a row's event is wanted."""
        return process.pieces(self._rows(r, self._cancellations, preview, progress))

    def _rows(self, r: Request, started: int, preview: Callable[[int], bool], progress: bool) -> Rows:
        with _bar(progress, len(r.chunks) * len(r.table)) as tick:
            for chunk in r.chunks:
                # The caller's functions run outside of turns: of the noise, of a guide, and what receives the events.
                drawn = _noise(r.noise, None, r.indices(chunk)) if callable(r.noise) else None
                state, inpainting = self._turns.take(_start, r, chunk, self._runners.device, drawn)
                draw, runner = state.noise, None
                for row in range(len(r.table)):
                    if self._cancellations != started:
                        return
                    if runner is None or runner in self._runners.interrupted:
                        runner = self._turns.take(self._prepare, r, started)
                        if runner is None:
                            return
                        # Runners look for changes of the weights when they see a new state.
                        state = dataclasses.replace(state)
                    if r.guide is not None:
                        leaf = self._turns.take(self._work, runner, _forward, runner, state, r.guide_through)
                        editing.guide(state, r.guide, r.indices(chunk), leaf, row, len(r.table))
                    if draw is not None and state.column_host("s").any():
                        state.noise = _constant(draw(row))
                    event, images = self._turns.take(
                        self._work, runner, _step, runner, state, inpainting, r, chunk, row, preview(row)
                    )
                    tick()
                    yield event, images
                    images = None
                    if event is not None:  # the caller's code has run, and may have changed the network
                        runner = None

    def _prepare(self, r: Request, started: int) -> Runner | None:
        """Return the runner of a request, with the network's present weights; None if the call was cancelled."""
        if self._cancellations != started:
            return None
        table = getattr(self._runners.unet, "class_embedding", None)
        classes = None if r.prompts is not None else r.labels
        labels = [] if classes is None else [*classes.tolist(), self._runners.info.null_label or 0]
        if isinstance(table, nn.Embedding) and labels and max(labels) >= len(table.weight):
            raise BackendError(
                f"the network's class_embedding has {len(table.weight)} rows now, fewer than label {max(labels)} "
                "needs; make another Sampler after changing the number of classes"
            )
        return self._runners.runner(r.batch_size, r.shape)

    def _work(self, runner: Runner, work: Callable[P, R], *arguments: P.args, **options: P.kwargs) -> R:
        """Do one turn's work, after which nothing is left of it but its result, even if it raised."""
        try:
            return work(*arguments, **options)
        except BaseException:
            self._runners.forget(runner)
            raise
        finally:
            self._runners.give_back()
            if self._closed:
                self._runners.clear()


class Stream(Iterator[Event]):
    """The events of a call. Several threads may share it; `close` ends the call, as does leaving it to be freed."""

    def __init__(self, rows: Rows):
        self._rows = rows
        self._lock = Lock()

    def __next__(self) -> Event:
        with self._lock.held:
            if inspect.getgeneratorstate(self._rows) == inspect.GEN_RUNNING:
                raise reentrant("the stream")
            for event, _ in self._rows:
                if event is not None:
                    return event
        raise StopIteration

    def close(self) -> None:
        """End the call and free its memory."""
        with self._lock.held:
            if inspect.getgeneratorstate(self._rows) == inspect.GEN_RUNNING:
                raise reentrant("the stream")
            self._rows.close()


@plain_modes()
def empty(r: Request) -> Tensor:
    """Return memory for all images; the chunks are copied into it."""
    try:
        return torch.empty((r.n, *r.shape), dtype=torch.float32, device="cpu")
    except RuntimeError as e:
        raise InvalidArgument(
            f"n={r.n}: there is no memory for {r.n} images of {4 * math.prod(r.shape)} bytes; draw fewer at a time, "
            "with start_index for the next ones"
        ) from e


def check_numbers(output: SampleOutput, dtype: torch.dtype) -> None:
    """Raise `NumericsError` where images are NaN, infinite or too large to be any; warn where they are suspicious."""
    low, high = torch.aminmax(output.images.flatten(1), dim=1)
    size = torch.maximum(-low, high) / max(1.0, output.table.data_scale)  # NaN where a value is
    large = size > MOST_LIKELY
    if not large.any() and torch.isfinite(size).all():
        return
    for bad, what in ((~torch.isfinite(size), "became NaN or infinite"), (size > MOST, "grew beyond any image")):
        if bad.any():
            where = tuple(output.indices[int(i)] for i in torch.nonzero(bad)[:, 0])
            reach = f", to {float(size[bad].max()):.3g}" if torch.isfinite(size[bad]).all() else ""
            raise NumericsError(
                f"{len(where)} of {len(size)} images {what}{reach} in {dtype} (index "
                f"{', '.join(map(str, where[:20]))}); the others are in this error's .output. "
                "Try float32, or less guidance",
                where,
                output,
            )
    indices = [output.indices[int(i)] for i in torch.nonzero(large)[:20, 0]]
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
    return event, state.x[:n].clone().float().cpu() if row == len(r.table) - 1 else None


def _forward(runner: Runner, state: State, through: str) -> Tensor | None:
    """Evaluate the network for a guide; where it is differentiated, return the input with the graph."""
    if through == "network":
        assert isinstance(runner, EagerRunner), "checked with the request"
        return runner.forward_with_gradient(state)
    runner.forward(state)
    return None


@plain_modes()
def _start(r: Request, chunk: range, device: torch.device, drawn: object) -> tuple[State, Inpainting | None]:
    """Return the state of one chunk at row 0, with its initial noise, and the known pixels of its images.

    ``drawn`` is the initial noise of a function of the caller, which is checked here.
    A short last chunk is padded with images that stay idle, so that no other batch size needs a runner.
    """
    indices, pad = r.indices(chunk), r.batch_size - len(chunk)
    index, seeds = [*indices, *[0] * pad], [*r.seeds(chunk), *[0] * pad]

    def padded(z: object) -> Tensor:
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
        z = padded(source[chunk.start : chunk.stop])
    elif source is not None:
        z = padded(drawn)
    else:
        z = initial_noise(seeds, index, r.shape, device)
    x = at_first_row(r, z, image)
    label = None
    if r.labels is not None:
        label = torch.cat([r.labels[chunk.start : chunk.stop], r.labels[:1].expand(pad)])
    state = State.create(
        x,
        TableBank([r.table], device),
        seed=seeds,
        index=index,
        label=label,
        guidance=[*r.guidance[chunk.start : chunk.stop], *[1.0] * pad],
        guidance_rescale=r.guidance_rescale,
        noise=None
        if source is None or isinstance(source, Tensor)
        else lambda row: padded(_noise(source, row, indices)),
    )
    if r.prompts is not None and r.texts is not None:
        null = r.prompts.null[chunk.start : chunk.stop]
        state.texts, state.null = r.texts.to(device), torch.cat([null, null[:1].expand(pad)]).to(device)
    if r.condition is not None:
        condition = r.condition[chunk.start : chunk.stop].to(device)
        state.condition = torch.cat([condition, condition.new_zeros(pad, *condition.shape[1:])])
    if pad:
        state.idle(range(len(chunk), r.batch_size))
    return state, inpainting


def initial_noise(
    seeds: Sequence[int], index: Sequence[int], shape: tuple[int, int, int], device: torch.device
) -> Tensor:
    """Draw the initial noise of images, of unit variance, [images, C, H, W]."""
    i = torch.tensor(index, dtype=torch.int64, device=device)
    s = torch.tensor([noise.as_int64(seed) for seed in seeds], dtype=torch.int64, device=device)
    return noise.normal(s, i, torch.zeros_like(i), noise.INITIAL, shape)


def at_first_row(r: Request, z: Tensor, image: Tensor | None) -> Tensor:
    """Return the states of images before the first row, from their initial noise z and the image they start from."""
    first = r.table.rows[0].abar
    if image is not None and r.from_image:
        return editing.noised(image, *r.table.signal_and_noise(first), z)
    x = z * r.table.init_scale
    return x + r.table.init_mean if r.table.init_mean else x


def _noise(source: NoiseSource, row: int | None, indices: Sequence[int]) -> Tensor:
    """Call the caller's source of noise; what it raises is a `CallbackError`."""
    try:
        return source(row, indices)
    except FastdiffError:
        raise
    except Exception as e:
        where = "for the initial noise" if row is None else f"at row {row}"
        raise CallbackError(f"the noise function raised {type(e).__name__} {where}: {e}") from e


def _constant(z: Tensor) -> Callable[[int], Tensor]:
    """Make a source of noise that gives z."""
    return lambda row: z


@contextlib.contextmanager
def _bar(show: bool, total: int) -> Iterator[Callable[[], None]]:
    """Show a progress bar on standard error; yield the function that advances it by one row."""
    if not show:
        yield lambda: None
        return
    with kept_random_state():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

    columns = ("sampling", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task("", total=total)
        yield lambda: bar.advance(task)
