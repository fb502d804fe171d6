"""`Stepper`: advances the images of jobs, whose steps share a batch."""

from __future__ import annotations

import dataclasses
import logging
import math
import time
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from fastdiff.core.lower import text_attentions
from fastdiff.core.slots import Slots, Text
from fastdiff.errors import InvalidArgument, OutOfMemory
from fastdiff.modes import plain_modes
from fastdiff.sampler import Event, Sampler
from fastdiff.sampler.editing import Inpainting
from fastdiff.sampler.loop import at_first_row, initial_noise
from fastdiff.sampler.request import Request
from fastdiff.serving import scheduler
from fastdiff.serving.scheduler import Curve
from fastdiff.serving.task import Task, images_by_task

log = logging.getLogger("fastdiff")

MOST_SLOTS = 64
SLOT_BYTES = 256 << 20  # of all images in flight, with the keys and values of their texts
SLOW_STEP_S = 0.2  # a step that takes longer is measured once


@dataclasses.dataclass(frozen=True)
class Step:
    """The outcome of a step: the images that it advanced, and what that took.

    Attributes:
        images: The images of each job that were advanced.
        rows: Network rows that were spent on them.
        short: Whether device memory did not suffice for all images that were to be advanced.
    """

    images: dict[Task, list[int]]
    rows: int
    short: bool = False


class Stepper:
    """The network of an engine, and the batch in which images at any rows of any tables are.

    Only one thread at a time may call its methods, except `draw`.

    Args:
        sampler: Runs the network.

    Raises:
        InvalidArgument: If images need more than noise, a label and texts, or decoding, or their size is not known.
        BackendError: If the backend cannot advance the images of a batch separately.
    """

    def __init__(self, sampler: Sampler):
        if sampler.autoencoder is not None:
            raise InvalidArgument(
                "the network's images are latents, which an Engine does not decode yet; a Sampler does"
            )
        info = sampler.info
        if info.size is None:
            raise InvalidArgument("the network's configuration has no sample_size, so the size of images is not known")
        if info.condition:
            raise InvalidArgument(
                f"the network reads a condition image of {info.condition} channels, which an Engine does not give it "
                "yet; a Sampler does"
            )
        self.sampler = sampler
        self.shape = (info.channels, *info.size)
        self.text = texts_of(sampler.request(1, prompts="", steps=1), 0)[0] if info.text else None
        each = 24 * math.prod(self.shape) + 2 * self._text_bytes()
        capacity = max(2 * scheduler.TOGETHER, min(MOST_SLOTS, SLOT_BYTES // each))
        self.runner = sampler._runners.stepwise(capacity, self.shape)
        labelled = info.classes is not None or info.null_label is not None
        self.slots = Slots(capacity, self.shape, sampler.device, labelled, self.text)

    def _text_bytes(self) -> int:
        """Return the bytes of the keys and values of a text; 0 for a network that reads none."""
        if self.text is None:
            return 0
        widths = [2 * layer.to_k.out_features for layer in text_attentions(self.sampler.unet).values()]
        return 4 * len(self.text.states) * max(sum(widths), self.text.states.shape[1])

    @plain_modes()
    def measured(self, most: int | None) -> Curve:
        """Measure what steps cost, on empty slots: twice the rows each time, until a step takes long."""
        points: list[tuple[int, float]] = []
        rows = 1
        while rows <= min(2 * scheduler.TOGETHER, most or 2 * scheduler.TOGETHER):
            best = math.inf
            for repetition in range(4):
                begin = time.perf_counter()
                try:
                    self.slots.step(self.runner, range(rows))
                except torch.OutOfMemoryError as e:
                    if not points:
                        raise OutOfMemory("device memory does not suffice for a step of one image") from e
                    return Curve(tuple(points), most=points[-1][0])
                self.sampler._runners.give_back()
                if repetition > 0:
                    best = min(best, time.perf_counter() - begin)
                if repetition > 0 and best > SLOW_STEP_S:
                    break
            points.append((rows, best))
            rows *= 2
        return Curve(tuple(points), most=most)

    def draw(self, task: Task, images: int) -> None:
        """Make the states before the first row of some more images of a job."""
        r, device, first = task.request, self.sampler.device, len(task.x)
        chunk = range(first, min(first + images, r.n))
        if isinstance(r.noise, Tensor):
            z = r.noise[first : chunk.stop].detach().to(device=device, dtype=torch.float32)
        else:
            z = initial_noise(r.seeds(chunk), r.indices(chunk), r.shape, device)
        image = None if r.image is None else r.image[first : chunk.stop].to(device)
        task.x += at_first_row(r, z, image)

    def advance(self, by_task: dict[Task, list[int]]) -> Step:
        """Advance images by a row, those that are in no slot after they have entered one.

        Where device memory is short, half of them are advanced. If it is short for these, too, those of the first job
        are tried alone; if it is short even then, that job ends.
        """
        for task, own in by_task.items():
            for i in own:
                if i not in task.slots:
                    self._enter(task, i)
        try:
            return Step(by_task, self._advance_all(by_task))
        except torch.OutOfMemoryError as e:
            error = e.with_traceback(None)  # whose frames hold memory
        images = [(task, i) for task, own in by_task.items() for i in own]
        half = images[: max(len(images) // 2, 1)]
        first = [(task, i) for task, i in half if task is half[0][0]]
        tried = images
        for fewer in (half, first):
            if len(fewer) == len(tried):
                continue
            tried = fewer
            if self.sampler.device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                rows = self._advance_all(images_by_task(fewer))
            except torch.OutOfMemoryError as e:
                error = e.with_traceback(None)
                continue
            log.warning("device memory does not suffice for a step of %d images; steps have fewer now", len(images))
            return Step(images_by_task(fewer), rows, short=True)
        job = half[0][0].job
        out = OutOfMemory(f"job {job.id} was ended: device memory does not suffice for {len(tried)} of its images")
        out.__cause__ = error
        job.settle(error=out)
        return Step({}, 0, short=True)

    def _enter(self, task: Task, i: int) -> None:
        """Put image i of a job into a slot."""
        r = task.request
        if not task.begun:
            task.job.begin()
        seed = r.seed if isinstance(r.seed, int) else r.seed[i]
        if i >= len(task.x):
            self.draw(task, scheduler.TOGETHER)
        task.slots[i] = self.slots.admit(
            task.x[i], r.table, seed=seed, index=r.index[i],
            label=None if r.labels is None or r.prompts is not None else int(r.labels[i]),
            guidance=float(r.guidance[i]), rescale=r.guidance_rescale, coefficients=task.coefficients,
            texts=None if r.prompts is None else texts_of(r, i),
        )  # fmt: skip
        # The memory is free once no image that was drawn with it waits.
        task.x[i] = torch.empty(0, dtype=torch.float32, device="cpu")
        task.begun += 1

    def _advance_all(self, by_task: dict[Task, list[int]]) -> int:
        """Advance images by a row, show previews, and return the number of network rows."""
        slots, state = self.slots, self.slots.state
        at = [task.slots[i] for task, images in by_task.items() for i in images]
        taken: dict[Task, int] = {}  # network rows
        known: list[tuple[Task, list[int], Tensor]] = []
        shown: list[tuple[Task, list[int], int]] = []
        for task, images in by_task.items():
            taken[task] = slots.network_rows([task.slots[i] for i in images])
            task.rows -= taken[task]
            if task.request.mask is not None:
                part = state.select(np.array([task.slots[i] for i in images], np.int64))
                known.append((task, images, self._inpainting(task, images).known(part)))
            if task.shows:
                length = len(task.request.table)
                for i in images:
                    row = length - slots.rows_left(task.slots[i])
                    if row in task.shows:
                        shown.append((task, [i], row))
        previews = [task.slots[i] for task, (i,), _ in shown]
        try:
            x0 = slots.step(self.runner, at, previews)
        except torch.OutOfMemoryError:  # no image has changed
            for task, rows in taken.items():
                task.rows += rows
            raise
        for task, images, pixels in known:
            mine = torch.tensor([task.slots[i] for i in images], dtype=torch.int64, device=state.x.device)
            state.x[mine] = torch.where(self._inpainting(task, images).anew, state.x[mine], pixels)
        self.sampler._runners.give_back()
        for k, (task, (i,), row) in enumerate(shown):
            assert x0 is not None
            x = state.x[task.slots[i]][None].clone()
            task.job.show(Event(row, len(task.request.table), (task.request.index[i],), x, x0[k][None]))
        return sum(taken.values())

    def _inpainting(self, task: Task, images: Sequence[int]) -> Inpainting:
        r, device = task.request, self.sampler.device
        assert r.image is not None
        assert r.mask is not None
        return Inpainting(r.image[list(images)].to(device), r.mask[list(images)].to(device))

    def leave(self, task: Task, images: list[int]) -> None:
        """Take images that are finished out of their slots."""
        assert task.result is not None
        for i in images:
            slot = task.slots[i]
            if self.slots.rows_left(slot) == 0:
                task.result[i].copy_(self.slots.state.x[slot])
                self.slots.retire(slot)
                del task.slots[i]
                task.ended += 1

    def retire(self, task: Task) -> None:
        """Take all images of a job out of their slots."""
        for slot in task.slots.values():
            self.slots.retire(slot)
        task.slots = {}


def texts_of(r: Request, i: int) -> tuple[Text, Text]:
    """Return the text of image i of a request, and that of its unconditional half."""
    assert r.prompts is not None
    assert r.texts is not None
    numbers, states, pooled = (int(r.prompts.label[i]), int(r.prompts.null[i])), r.texts.states, r.texts.pooled
    own, null = (Text(r.prompts.texts[k], states[k], None if pooled is None else pooled[k]) for k in numbers)
    return own, null
