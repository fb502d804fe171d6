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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from fastdiff.checkpoints.loading import BUILTIN, builtin_models
from fastdiff.checkpoints.reading import read_json, weights_digest
from fastdiff.checks import is_number, is_whole
from fastdiff.errors import CheckpointError
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.spacing import SIGMA_SPACINGS, SPACINGS

log = logging.getLogger("fastdiff")

NAME = "trilemma.json"
FORMAT = 1
ALL_SPACINGS = (*SPACINGS, *SIGMA_SPACINGS)
MAX_POINTS = 10_000
MAX_ROWS = 10_000
AUTO_ROWS = 250  # the most that solver="auto" takes from a file, which may come from strangers
SAID_ROWS = 50  # the steps of `Sampler.sample` by default; a warning says when a file makes it more
# The options that a point may contain, and what they must be.
OPTIONS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "solver": (f"one of {', '.join(SOLVERS)}", lambda v: isinstance(v, str) and v in SOLVERS),
    "steps": (f"a whole number from 1 to {MAX_ROWS}", lambda v: _whole(v, 1, MAX_ROWS)),
    "eta": ("a finite number of at least 0", lambda v: is_number(v) and v >= 0.0),
    "spacing": (f"one of {', '.join(ALL_SPACINGS)}", lambda v: isinstance(v, str) and v in ALL_SPACINGS),
    "guidance": ("a finite number", is_number),
}


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

    def chosen(self, options: Mapping[str, Any]) -> Point | None:
        """Return the point that sets these options of a call, if there is one."""
        points = (p for p in self.points if p.options.items() <= options.items())
        return next((p for p in points if np.all(np.asarray(options["guidance"]) == p.guidance)), None)

    def say(self, point: Point) -> None:
        """Write to the log which setting was chosen from which file; a long one is a warning, which users see."""
        level = logging.WARNING if point.rows > SAID_ROWS else logging.INFO
        log.log(level, "setting of %s: %s, %d network evaluations", self.path, point, point.nfe)

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
    """Read the measurements of a network; None, with a warning in the log, where they are of other weights.

    For the weights of a built-in model, those that come with fastdiff count, not those of a copy's folder.
    """
    found = read(path)
    if found.model == weights_digest(unet.state_dict()):
        own = (BUILTIN / name / NAME for name in builtin_models())
        known = (read(file) for file in own if file.is_file() and file != path)
        return next((builtin for builtin in known if builtin.model == found.model), found)
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
    settings = {(p.solver, p.steps, p.eta, p.spacing, p.guidance) for p in points}
    if len(settings) < len(points):
        raise wrong(f"{len(points) - len(settings)} of {len(points)} points are of settings that others are of")
    return Measured(path, model, n, tuple(points))


def _point(entry: Mapping[str, Any]) -> Point:
    options, nfe, at_n = entry["options"], entry["nfe"], entry["at_n"]
    for name, value in options.items():
        if name not in OPTIONS:
            raise ValueError(f"option {name[:40]} is unknown")
        needed, fits = OPTIONS[name]
        if not fits(value):
            raise ValueError(f"option {name}={str(value)[:40]!r}: {needed} is needed")
    if not _whole(nfe, 1, 2 * MAX_ROWS):
        raise ValueError(f"nfe {str(nfe)[:40]}: a whole number from 1 to {2 * MAX_ROWS} is needed")
    value, low, high = (_finite(at_n["frechet"][name]) for name in ("value", "low", "high"))
    recall = _finite(at_n["recall"]["value"])
    if not 0.0 <= low <= value <= high or not 0.0 <= recall <= 1.0:
        raise ValueError(f"frechet {low} <= {value} <= {high} and recall {recall} are out of range")
    numbers = {k: float(options[k]) for k in ("eta", "guidance") if k in options}
    return Point(
        options["solver"], options["steps"], nfe, value, low, high, recall, spacing=options.get("spacing"), **numbers
    )


def _finite(value: Any) -> float:
    if not is_number(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _whole(value: Any, low: int, high: int) -> bool:
    return is_whole(value) and low <= value <= high
