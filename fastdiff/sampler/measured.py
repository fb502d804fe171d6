"""What a model's samples were measured to be worth, and the choices that follow from it.

`fastdiff trilemma` writes ``trilemma.json``; a copy of it in a model's folder is what `Sampler.sample` goes by where it
is asked for solver="auto", quality= or deadline_s=. Of that file this module reads:

    model       the fingerprint of the state dict that drew the images (`fastdiff.checkpoints.weights_digest`)
    n           the number of images, the same for all points, of the numbers below
    points      of each setting: ``options`` of `Sampler.sample` (solver, steps, eta, spacing, guidance), ``nfe``,
                and ``at_n``: ``frechet`` {value, low, high} and ``recall`` {value, ...}

A choice is made among points of one guidance scale: how strongly to guide is for the user to say, and the distances of
guided and plain samples differ by more than any solver makes up for.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastdiff.checkpoints.reading import read_json
from fastdiff.errors import CheckpointError

NAME = "trilemma.json"
FORMAT = 1
MAX_POINTS = 10_000
# What a point may say to the sampler, and the types of it.
OPTIONS: dict[str, tuple[type, ...]] = {
    "solver": (str,), "steps": (int,), "eta": (int, float), "spacing": (str,), "guidance": (int, float),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Point:
    """A measured setting: options of `Sampler.sample`, network evaluations an image, the Frechet distance with its
    95 % interval, and recall.
    """

    solver: str
    steps: int
    nfe: int
    distance: float
    low: float
    high: float
    recall: float
    guidance: float = 1.0
    eta: float = 0.0
    spacing: str | None = None

    @property
    def rows(self) -> int:
        """Rows of its step table; a guided one evaluates the network twice."""
        return self.nfe if self.guidance == 1.0 else self.nfe // 2

    @property
    def options(self) -> dict[str, Any]:
        """What it says to the sampler, but for the guidance, which the caller said."""
        return {"solver": self.solver, "steps": self.steps, "eta": self.eta, "spacing": self.spacing}

    def __str__(self) -> str:
        eta = f", eta {self.eta:g}" if self.eta else ""
        spacing = f", {self.spacing} spacing" if self.spacing else ""
        return f"{self.solver}{eta}{spacing}, {self.steps} steps"


@dataclasses.dataclass(frozen=True)
class Measured:
    """A model's measured points; ``path`` is the file that they are of, ``model`` the network's fingerprint."""

    path: Path
    model: str
    n: int
    points: tuple[Point, ...]

    @property
    def guidances(self) -> list[float]:
        """The guidance scales that were measured."""
        return sorted({p.guidance for p in self.points})

    def at(self, guidance: float) -> list[Point]:
        """The points of one guidance scale."""
        return [p for p in self.points if p.guidance == guidance]


def best(points: Sequence[Point]) -> Point:
    """The smallest distance."""
    return min(points, key=lambda p: (p.distance, p.nfe))


def fewest(points: Sequence[Point], limit: float) -> Point:
    """The fewest network evaluations whose distance is at most ``limit``.

    Among equals the smaller distance, then the larger recall; so no other point is better in one of network
    evaluations, distance and recall without being worse in another: it is on the Pareto front of the three.
    """
    return min((p for p in points if p.distance <= limit), key=lambda p: (p.nfe, p.distance, -p.recall))


def automatic(points: Sequence[Point]) -> Point:
    """What solver="auto" means: the fewest network evaluations within the best distance's 95 % interval,

    argmin { nfe(p) : d(p) <= high(p*) },      p* = argmin d
    """
    return fewest(points, best(points).high)


def within(points: Sequence[Point], quality: float) -> Point:
    """What quality=q means: the fewest network evaluations with d(p) <= q min d, q of at least 1."""
    return fewest(points, quality * best(points).distance)


def fitting(points: Sequence[Point], rows: float) -> Point | None:
    """What a deadline means: the smallest distance of at most so many rows; None where the shortest has more."""
    fit = [p for p in points if p.rows <= rows]
    return best(fit) if fit else None


def read(path: str | Path) -> Measured:
    """The points of a ``trilemma.json``. Files are untrusted: `CheckpointError` names the file and what is wrong."""
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


def _finite(value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{value!r} is not a finite number")
    return float(value)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
