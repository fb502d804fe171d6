"""The grid of points: settings of the sampler, numbers of network evaluations, and numbers of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.solvers import SIGMA_SPACINGS, SPACINGS, StepTable
from fastdiff.solvers.registry import SOLVERS

NFES = (4, 5, 8, 10, 15, 20, 50, 100, 250, 1000)
# Network evaluations of each setting. Only the ancestral solver gains by long runs.
PLAN: dict[str, tuple[int, ...]] = {
    "ddpm": NFES,
    "ddim-eta1": NFES[:-1],
    "ddim": NFES[:8],
    "dpmpp_2m": NFES[:8],
    "unipc": NFES[:8],
    "ddpm-g2": (4, 8, 10, 20),
    "ddim-g2": (4, 8, 10, 20),
    "dpmpp_2m-g2": (4, 8, 10, 20),
    "unipc-g2": (4, 8, 10, 20),
    "dpmpp_3m": (5, 10, 20),
    "unipc-karras": (5, 10, 20),
    "dpmpp_2m-karras": (5, 10, 20),
}
FEW = 2000  # images of a point with more than 20 evaluations, and of the settings in ASIDE
ASIDE = ("ddpm-g2", "ddim-g2", "dpmpp_2m-g2", "unipc-g2", "dpmpp_3m", "unipc-karras", "dpmpp_2m-karras")
MANY = 5000
SHORT = 20
QUICK = (("ddpm", "ddim", "unipc"), (4, 10, 50), 500)


@dataclasses.dataclass(frozen=True)
class Planned:
    """A point of the grid."""

    key: str  # the name of its setting, as "unipc-g2"
    options: dict[str, Any]  # options of `Sampler.sample`
    nfe: int  # network evaluations for an image
    n: int  # the number of images
    same_as: str | None = None  # the name of an earlier point with the same step table, which has the same images

    @property
    def name(self) -> str:
        return f"{self.key}-{self.nfe}"

    @property
    def guided(self) -> bool:
        return self.options.get("guidance", 1.0) != 1.0


def options_of(key: str) -> dict[str, Any]:
    """Parse a setting's name: SOLVER, then any of -etaX, -gX (guidance) and -SPACING, as "ddim-eta1" or "unipc-g2"."""
    solver, *parts = key.split("-")
    options: dict[str, Any] = {"solver": solver}
    if solver not in SOLVERS:
        raise InvalidArgument(f"setting {key!r}: solver {solver!r} is unknown; allowed: {', '.join(SOLVERS)}")
    value: str | float | None
    for part in parts:
        name, value = "spacing", None
        if part in (*SPACINGS, *SIGMA_SPACINGS):
            value = part
        else:
            name, digits = ("eta", part[3:]) if part.startswith("eta") else ("guidance", part[1:])
            try:
                value = float(digits) if part[0] in "eg" else None
            except (ValueError, IndexError):
                value = None
        if value is None or name in options:
            raise InvalidArgument(
                f"setting {key!r}: {part!r} is unknown or said twice; a solver may be followed by -etaX, -gX and a "
                f"spacing ({', '.join((*SPACINGS, *SIGMA_SPACINGS))}), as ddim-eta1, unipc-g2 or dpmpp_2m-karras"
            )
        options[name] = value
    return options


def grid_points(
    sampler: Sampler, settings: Sequence[str] | None = None, nfes: Sequence[int] | None = None, n: int | None = None
) -> list[Planned]:
    """List the points for a model, sorted by network evaluations.

    ``settings`` and ``nfes`` replace those of `PLAN`. With both, every combination is made, and one that does not exist
    raises `InvalidArgument`; with ``nfes`` alone, only combinations up to the longest of a setting in `PLAN` are made.
    ``n`` is the largest number of images of a point. If the model has fewer timesteps than ddpm's longest run, that run
    takes all of them. Guided settings of `PLAN` are left out for models without a null label.
    """
    asked = settings is not None and nfes is not None
    points: list[Planned] = []
    tables: dict[str, StepTable] = {}
    for key in settings or PLAN:
        options = options_of(key)
        if settings is None and "guidance" in options and sampler.info.null_label is None:
            continue
        for nfe in sorted(set(_lengths(sampler, key, nfes, asked))):
            found = _steps(sampler, options, nfe)
            if found is None:
                if asked:
                    raise InvalidArgument(f"setting {key!r} has no number of steps with {nfe} network evaluations here")
                continue
            most = MANY if nfe <= SHORT and key not in ASIDE else FEW
            steps, table = found
            point = Planned(key, {**options, "steps": steps}, nfe, min(most, n or most))
            twin = next((p for p in points if p.same_as is None and _same(p, tables[p.name], point, table)), None)
            tables[point.name] = table
            points.append(point if twin is None else dataclasses.replace(point, n=twin.n, same_as=twin.name))
    if not points:
        raise InvalidArgument("there is nothing to draw: no setting has any of these numbers of network evaluations")
    return sorted(points, key=lambda p: p.nfe)


def _lengths(sampler: Sampler, key: str, nfes: Sequence[int] | None, asked: bool) -> Iterator[int]:
    """Yield the network evaluations of a setting's points."""
    planned = PLAN.get(key, NFES[:8])
    timesteps = getattr(sampler.schedule, "timesteps", NFES[-1])
    for nfe in nfes or planned:
        if asked or nfe <= max(planned):
            yield min(nfe, timesteps) if key == "ddpm" and not asked else nfe


def _steps(sampler: Sampler, options: dict[str, Any], nfe: int) -> tuple[int, StepTable] | None:
    """Find the steps with which a solver takes ``nfe`` network evaluations, and their table; None if there are none."""
    guided = options.get("guidance", 1.0) != 1.0
    rows = nfe // 2 if guided else nfe
    for steps in (rows, (rows + 1) // 2, rows - 1):  # a step of heun has two rows, and plms has one row more
        if not 1 <= steps <= getattr(sampler.schedule, "timesteps", steps):
            continue
        labels = None if sampler.info.classes is None else 0
        request = sampler.request(1, **{**options, "steps": steps, "labels": labels})
        if request.nfe == nfe:
            return steps, request.table
    return None


def _same(p: Planned, mine: StepTable, q: Planned, other: StepTable) -> bool:
    """Return whether two points have the same table up to rounding.

    An example is DDIM with eta 1, which is DDPM with the variance of its posterior (Song et al. 2021, section 4.1).
    """
    if len(mine) != len(other) or p.options.get("guidance") != q.options.get("guidance") or p.n < q.n:
        return False
    a, b = mine.coefficients, other.coefficients
    return mine.init_scale == other.init_scale and bool(np.allclose(a, b, rtol=0.0, atol=1e-12))
