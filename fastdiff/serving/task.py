"""`Task`: a job on the engine's side."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fastdiff import __version__
from fastdiff.core.slots import Slots
from fastdiff.sampler import SampleOutput, Sampler
from fastdiff.sampler.request import Request
from fastdiff.serving import scheduler
from fastdiff.serving.job import Job
from fastdiff.serving.scheduler import Load, Want


class Task:
    """A job on the engine's side."""

    def __init__(self, job: Job, r: Request, arrived: float, deadline: float | None, previews: int):
        self.job, self.request = job, r
        self.arrived = self.served = arrived
        self.deadline = deadline
        self.due = math.inf
        self.width = [1 + (g != 1.0) for g in r.guidance.tolist()]  # of most rows
        guided = sum(1 for row in r.table.rows if row.g)
        self.rows = len(r.table) * r.n + guided * sum(w - 1 for w in self.width)  # network rows that are left
        self.at_once = sum(self.width[: scheduler.TOGETHER])
        self.shows = {len(r.table) * (i + 1) // (previews + 1) - 1 for i in range(previews)} - {-1}
        self.slots: dict[int, int] = {}  # by the position of an image
        self.begun = self.ended = 0  # images
        self.x: list[Tensor] = []  # the images of so many before their first row, those that have begun as well
        self.result: Tensor | None = None
        self.coefficients: Any = None
        self.known: Load | None = None  # the load, until the job takes a step
        self.ready = False  # whether it may take one
        self.degraded = False  # whether its setting was chosen for its deadline

    def load(self, slots: Slots) -> Load:
        """Return what the scheduler sees."""
        if self.known is None:
            wants = [Want((self, i), slots.network_rows([slot]), True) for i, slot in self.slots.items()]
            more = range(self.begun, min(self.begun + scheduler.TOGETHER, self.request.n))
            wants += [Want((self, i), self.width[i], False) for i in more]
            self.known = Load(self, self.arrived, self.due, self.served, wants, self.rows)
        return self.known

    def output(self) -> SampleOutput:
        """Return the images, when all have left their slots."""
        r = self.request
        assert self.result is not None
        labels, prompts = (r.labels, None) if r.prompts is None else (None, r.prompts.of_images)
        return SampleOutput(self.result, r.seed, r.index[0], r.table, r.nfe, labels, r.class_names, r.index, prompts)

    def receipt(self, sampler: Sampler, output: SampleOutput) -> dict[str, Any]:
        """Return how the images were made, with a checksum of them."""
        r, given = self.request, self.request.prompts
        return {
            "id": self.job.id, "n": r.n, "seed": r.seed, "indices": list(r.index),
            "labels": None if output.labels is None else output.labels.tolist(),
            "prompts": None if given is None else [given.texts[i] for i in given.label.tolist()],
            "negative": None if given is None else [given.texts[i] for i in given.null.tolist()],
            "solver": r.table.solver, "rows": len(r.table), "degraded": self.degraded,
            "table_sha256": hashlib.sha256(r.table.to_json().encode()).hexdigest(), "nfe": r.nfe,
            "guidance": r.guidance.tolist(), "guidance_rescale": r.guidance_rescale, "backend": sampler.backend,
            "dtype": str(sampler.dtype).removeprefix("torch."), "determinism": sampler.determinism,
            "version": __version__, "sha256": hashlib.sha256(output.images.numpy().tobytes()).hexdigest(),
        }  # fmt: skip


def images_by_task(images: Sequence[tuple[Task, int]]) -> dict[Task, list[int]]:
    """Return the images of each job."""
    by_task: dict[Task, list[int]] = {}
    for task, i in images:
        by_task.setdefault(task, []).append(i)
    return by_task
