"""Measurements of a model's samples, and the choices of a setting that are made by them.

``fastdiff trilemma`` writes ``trilemma.json``; a copy of it in a model's folder is the basis of solver="auto", quality=
and deadline_s= in `Sampler.sample`. This module reads from that file:

    model       the fingerprint of the state dict that drew the images (`fastdiff.checkpoints.weights_digest`)
    n           the number of images, the same for all points, of the numbers below
    points      for each setting: ``options`` of `Sampler.sample` (solver, steps, eta, spacing, guidance), ``nfe``,
                and ``at_n``: ``frechet`` {value, low, high} and ``recall`` {value, ...}

A setting is chosen among points of one guidance scale: how strong the guidance is, is the user's choice, and the
distances of guided and plain samples differ by more than any solver can make up for.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from fastdiff.checkpoints.reading import read_json, weights_digest
from fastdiff.checks import is_number, is_whole
from fastdiff.errors import CheckpointError

log = logging.getLogger("fastdiff")

NAME = "trilemma.json"
FORMAT = 1
MAX_POINTS = 10_000
# The options that a point may contain, and their types.
OPTIONS: dict[str, tuple[type, ...]] = {
    "solver": (str,), "steps": (int,), "eta": (int, float), "spacing": (str,), "guidance": (int, float),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured setting: options of `Sampler.sample`, and what images drawn with them are like."""

    solver: str
    steps: int
    nfe: int  # network evaluations per image
    distance: float  # Frechet distance to real images
    low: float  # lower end of its 95 % interval
    high: float  # upper end of its 95 % interval
    recall: float  # share of real images that lie among the drawn ones, from 0 to 1
    guidance: float = 1.0
    eta: float = 0.0
    spacing: str | None = None  # None: the model's

    @property
    def rows(self) -> int:
        """Number of rows of its step table; a guided row evaluates the network twice."""
        return self.nfe if self.guidance == 1.0 else self.nfe // 2

    @property
    def options(self) -> dict[str, Any]:
        """The options of `Sampler.sample` that it sets: all but the guidance, which the caller has given."""
        return {"solver": self.solver, "steps": self.steps, "eta": self.eta, "spacing": self.spacing}

    def __str__(self) -> str:
        eta = f", eta {self.eta:g}" if self.eta else ""
        spacing = f", {self.spacing} spacing" if self.spacing else ""
        return f"{self.solver}{eta}{spacing}, {self.steps} steps"


@dataclasses.dataclass(frozen=True)
class Measured:
    """The measured points of a model."""

    path: Path  # file that they were read from
    model: str  # fingerprint of the network's state dict
    n: int  # number of images that each point was measured with
    points: tuple[Point, ...]

    @property
    def guidances(self) -> list[float]:
        """Guidance scales that were measured, in increasing order."""
        return sorted({p.guidance for p in self.points})

    def at(self, guidance: float) -> list[Point]:
        """Return the points of one guidance scale."""
        return [p for p in self.points if p.guidance == guidance]

    def check_rows(self, point: Point, rows: int) -> None:
        """Raise `CheckpointError` where the step table of a point has another number of rows than the file says."""
        if rows != point.rows:
            raise CheckpointError(
                f"{self.path}: {point} is said to take {point.nfe} network evaluations, but has {rows} rows here"
            )


def best(points: Sequence[Point]) -> Point:
    """Return the point with the smallest distance."""
    return min(points, key=lambda p: (p.distance, p.nfe))


def fewest(points: Sequence[Point], limit: float) -> Point:
    """Return the point with the fewest network evaluations whose distance is at most ``limit``.

    Among equals it has the smaller distance, then the larger recall; so it is on the Pareto front of the three: no
    other point is better in one of them without being worse in another.
    """
    return min((p for p in points if p.distance <= limit), key=lambda p: (p.nfe, p.distance, -p.recall))


def automatic(points: Sequence[Point]) -> Point:
    """Choose for solver="auto": the fewest network evaluations within the 95 % interval of the smallest distance.

    argmin { nfe(p) : d(p) <= high(p*) },      p* = argmin d
    """
    return fewest(points, best(points).high)


def within(points: Sequence[Point], quality: float) -> Point:
    """Choose for quality=q, at least 1: the fewest network evaluations with d(p) <= q min d."""
    return fewest(points, quality * best(points).distance)


def fitting(points: Sequence[Point], rows: float) -> Point | None:
    """Choose for a deadline: the smallest distance in at most so many rows; None where every point has more."""
    fit = [p for p in points if p.rows <= rows]
    return best(fit) if fit else None


def read_for(unet: nn.Module, path: Path) -> Measured | None:
    """Read the measurements of a network; None, with a warning in the log, where they are of other weights."""
    found = read(path)
    if found.model == weights_digest(unet.state_dict()):
        return found
    log.warning("%s was measured with other weights, and is left aside", path)
    return None


def read(path: str | Path) -> Measured:
    """Read a ``trilemma.json``. The file is not trusted: `CheckpointError` says what is wrong with it."""
    path = Path(path)
    data = read_json(path)

    def wrong(what: str) -> CheckpointError:
        return CheckpointError(
            f"{path}: not the measurements of a model ({what}); `fastdiff trilemma` makes them, and without the file "
            "sampling goes by the general rule"
        )

    if data.get("format") != FORMAT:
        raise wrong(f"format {str(data.get('format'))[:40]!r}, not {FORMAT}")
    model, n, listed = data.get("model"), data.get("n"), data.get("points")
    if not isinstance(model, str) or not isinstance(n, int) or not _whole(n, 2, 1 << 40):
        raise wrong("model must be a fingerprint, n a number of images")
    if not isinstance(listed, list) or not 1 <= len(listed) <= MAX_POINTS:
        raise wrong(f"points must be a list of 1 to {MAX_POINTS}")
    points = []
    for i, entry in enumerate(listed):
        try:
            points.append(_point(entry))
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as e:
            raise wrong(f"point {i}: {type(e).__name__} {str(e)[:200]}") from e
    return Measured(path, model, n, tuple(points))


def _point(entry: Mapping[str, Any]) -> Point:
    options, nfe, at_n = entry["options"], entry["nfe"], entry["at_n"]
    for name, value in options.items():
        if name not in OPTIONS or not isinstance(value, OPTIONS[name]) or isinstance(value, bool):
            raise ValueError(f"option {name}={value!r} is unknown or of another type")
    if not _whole(nfe, 1, 1 << 24) or not _whole(options["steps"], 1, 1 << 24):
        raise ValueError(f"nfe {nfe!r} and steps {options['steps']!r} must be numbers from 1")
    value, low, high = (_finite(at_n["frechet"][name]) for name in ("value", "low", "high"))
    recall = _finite(at_n["recall"]["value"])
    if not 0.0 <= low <= value <= high or not 0.0 <= recall <= 1.0:
        raise ValueError(f"frechet {low} <= {value} <= {high} and recall {recall} are out of range")
    numbers = {k: float(options[k]) for k in ("eta", "guidance") if k in options}
    if not all(math.isfinite(v) for v in numbers.values()):
        raise ValueError(f"{numbers} must be finite")
    return Point(
        options["solver"], options["steps"], nfe, value, low, high, recall, spacing=options.get("spacing"), **numbers
    )


def _finite(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _whole(value: Any, low: int, high: int) -> bool:
    return is_whole(value) and low <= value <= high
