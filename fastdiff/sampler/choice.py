"""The choice of a solver and its steps: by solver="auto", by a wanted quality, or by a deadline."""

from __future__ import annotations

import dataclasses
import logging
import math
from typing import Any

import numpy as np

from fastdiff import solvers
from fastdiff.checks import is_whole
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import measured
from fastdiff.sampler.measured import Measured, Point
from fastdiff.sampler.options import Options
from fastdiff.sampler.request import Request
from fastdiff.solvers.compat.run import FROM_MODEL
from fastdiff.solvers.walk import Schedule

log = logging.getLogger("fastdiff")

EDM_STEPS = 256  # the most that a deadline is spent on: Karras et al. 2022, table 2, on ImageNet-64


def resolve(o: Options, schedule: Schedule, known: Measured | None) -> tuple[Options, Point | None]:
    """Return the options with a solver by name (or a table) where they ask for "auto" or a quality.

    Where measurements of the model chose, the measured point comes along. Raises `InvalidArgument` where a quality
    cannot be promised, or where options contradict the choice.
    """
    point = None
    if o.quality is not None:
        point = _of_quality(o, known)
    elif isinstance(o.solver, str) and o.solver == "auto" and o.steps is None:
        points, _ = comparable(o, known)
        point = measured.automatic(points) if points else None
    if point is not None:
        log.info("measured: %s, %d network evaluations", point, point.nfe)
        return dataclasses.replace(o, quality=None, **point.options), point
    if not (isinstance(o.solver, str) and o.solver == "auto"):
        return o, None
    for option in ("order", "compat"):
        if getattr(o, option) is not None:
            raise InvalidArgument(f"{option}={getattr(o, option)!r} needs a solver by name; 'auto' chooses all")
    guided = not np.all(np.asarray(o.guidance) == 1.0)
    steps = o.steps if o.spacing is None or isinstance(o.spacing, str) else len(o.spacing)
    name, length, own = auto(schedule, steps, guided)
    return dataclasses.replace(o, solver=name, steps=length, **own), None


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
    if not is_whole(n) or n < 10:
        return "unipc", n, {"order": 2 if guided else 3}
    if n < 50:
        return "dpmpp_2m" if guided else "dpmpp_3m", n, {}
    return ("dpmpp_2m_sde" if n < 250 else "ddpm"), n, {}
