"""Choice of a solver and its steps: by solver="auto", by a quality, or by a deadline."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import numpy as np

from fastdiff import solvers
from fastdiff.checks import is_number, is_whole, shown
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import measured
from fastdiff.sampler.measured import Measured, Point
from fastdiff.sampler.options import AUTO, DEADLINE, MEASURED, QUALITY, Options, scales
from fastdiff.solvers import EDMSchedule, FlowSchedule, VESchedule
from fastdiff.solvers.compat.run import FROM_MODEL
from fastdiff.solvers.walk import Schedule

log = logging.getLogger("fastdiff")

EDM_STEPS = 256  # the most that a deadline is spent on: Karras et al. 2022, table 2, on ImageNet-64


def resolve(o: Options, schedule: Schedule, known: Measured | None) -> tuple[Options, Point | None]:
    """Return the options with a solver by name (or a table) where they ask for "auto" or a quality.

    The measured point is returned too, where one was chosen. Raises `InvalidArgument` where a quality cannot be
    promised, or where options contradict the choice.
    """
    point = None
    if o.quality is not None:
        point = _of_quality(o, known)
    elif o.automatic and o.steps is None:
        points, _ = comparable(o, known)
        short = [p for p in points if p.rows <= measured.AUTO_ROWS]
        point = measured.automatic(short) if short else None
        if known is not None and points and not short:
            log.warning(
                "%s has no setting of at most %d rows, so 'auto' goes by the general rule; quality= and deadline_s= "
                "choose longer ones", known.path, measured.AUTO_ROWS,
            )  # fmt: skip
    if known is not None and point is not None:
        known.say(point)
        return dataclasses.replace(o, quality=None, **point.options), point
    if not o.automatic:
        return o, None
    name = o.excluded_by(AUTO)
    if name is not None:
        raise InvalidArgument(f"{name}={shown(getattr(o, name))} needs a solver by name; 'auto' chooses all")
    guided = bool((scales(o.guidance, None) != 1.0).any())
    steps = o.steps if o.spacing is None or isinstance(o.spacing, str) else len(o.spacing)
    solver, steps, own = auto(schedule, steps, guided)
    return dataclasses.replace(o, solver=solver, steps=steps, **own), None


def comparable(o: Options, known: Measured | None) -> tuple[list[Point], str]:
    """Return the measured points that are valid for a call with these options; if there are none, the reason.

    The measured images were drawn from noise, with the model's own clipping, at one guidance scale.
    """
    if known is None:
        return [], "this model has no measurements; `fastdiff trilemma` makes them"
    name = o.excluded_by(MEASURED)
    if name is not None:
        return [], f"the measurements were made without {name}="
    given = np.unique(scales(o.guidance, None))
    points = known.at(float(given[0])) if len(given) == 1 else []
    if not points:
        return [], f"{known.path} was measured with guidance {', '.join(f'{g:g}' for g in known.guidances)}"
    return points, ""


def _of_quality(o: Options, known: Measured | None) -> Point:
    q: Any = o.quality
    if not is_number(q) or q < 1.0:
        raise InvalidArgument(
            f"quality={shown(q)}: a number of at least 1 is needed, as 1.1 for at most 1.1 times the best distance"
        )
    _check_conflicts(QUALITY, o)
    points, why = comparable(o, known)
    if not points:
        raise InvalidArgument(f"quality={q!r} cannot be promised: {why}")
    return measured.within(points, float(q))


def _check_conflicts(name: str, o: Options) -> None:
    """Reject options that quality= or deadline_s= chooses; solver="auto" asks for the same as they do."""
    if o.automatic:
        o = dataclasses.replace(o, solver="ddim")  # the default
    if isinstance(o.spacing, str) and name == DEADLINE:
        o = dataclasses.replace(o, spacing=None)  # only a list of timesteps has a number of rows
    other = o.excluded_by(name)
    if other is not None:
        raise InvalidArgument(f"{name}= chooses the solver and its steps; leave out {other}=")


def trial(o: Options, schedule: Schedule, prediction: str) -> Options:
    """Return options for a run of three rows, by whose time `in_time` chooses; an image goes through all of them.

    Raises `InvalidArgument` where ``deadline_s`` is not a time, or other options contradict it.
    """
    d: Any = o.deadline_s
    if not is_number(d) or d <= 0.0:
        raise InvalidArgument(f"deadline_s={shown(d)}: a positive number of seconds is needed")
    _check_conflicts(DEADLINE, o)
    table = solvers.ddim(schedule, 3, prediction=prediction)
    strength = None if o.image is None else 1.0
    return dataclasses.replace(o, solver=table, deadline_s=None, spacing=None, clip=FROM_MODEL, strength=strength)


def in_time(
    o: Options, schedule: Schedule, known: Measured | None, *, n: int, chunks: int, seconds: float, elapsed: float
) -> Options:
    """Return the options with the solver and the steps for which a deadline leaves time.

        rows = (deadline - elapsed) / (chunks * seconds)

    It is the best measured setting of at most so many rows; without measurements, that of `auto` for so many steps, but
    not more than there are timesteps. The n images are drawn in ``chunks`` batches, one row of a batch takes
    ``seconds``, and ``elapsed`` seconds of the call are over. Raises `InvalidArgument` if even the shortest setting
    takes too long.
    """
    assert o.deadline_s is not None
    rows = (o.deadline_s - elapsed) / (chunks * seconds)
    points, _ = comparable(o, known)
    if points:
        shortest = min(point.rows for point in points)
        point = measured.fitting(points, rows)
        if known is not None and point is not None:
            log.info("deadline of %g s, at %.3g s a row and chunk", o.deadline_s, seconds)
            known.say(point)
            return dataclasses.replace(o, deadline_s=None, **point.options)
    else:
        shortest = 1
        if isinstance(schedule, (EDMSchedule, VESchedule)):
            steps = min(int((rows + 1) / 2), EDM_STEPS)  # a step of heun has two rows, the last one has one
        else:
            steps = min(int(rows), schedule.timesteps)
        if steps >= 1:
            log.info("deadline of %g s: %d steps, at %.3g s a row and chunk", o.deadline_s, steps, seconds)
            return dataclasses.replace(o, deadline_s=None, solver="auto", steps=steps)
    raise InvalidArgument(
        f"deadline_s={o.deadline_s!r} cannot be kept here: the shortest setting, of {shortest} rows, takes about "
        f"{elapsed + shortest * chunks * seconds:.3g} s for {n} images"
    )


def auto(schedule: Schedule, steps: int | None, guided: bool) -> tuple[str, int | None, dict[str, Any]]:
    """Choose (solver, steps, options of that solver) by a fixed rule, from what the solvers' papers report:

        EDM networks        heun, 18 steps                       Karras et al. 2022, table 2
        VE networks         heun, 50 steps                       Karras et al. 2022, table 2 (VE: 79 evaluations)
        flow networks       euler, 28 steps                      Esser et al. 2024 (rectified flow), section 5.3
        fewer than 10       unipc, order 3, guided: order 2      Zhao et al. 2023, sections 4.1 and 4.2
        10 to 49            dpmpp_3m, guided: dpmpp_2m           Lu et al. 2022 (DPM-Solver++), sections 4.1 and 7.1
        50 to 249           dpmpp_2m_sde                         Lu et al. 2022; Karras et al. 2022, figure 4: in many
                                                                 steps, added noise corrects accumulated errors
        250 and more        ddpm                                 Song et al. 2021 (DDIM), table 1

    20 steps where ``steps`` is None. Guidance makes high orders unstable, hence the lower ones.

    The rule is for models without measurements. Those of the built-in model (benchmarks/results/,
    trilemma-fashion-mnist.json) agree with it for few steps, where unipc has the smallest distance, plain and guided.
    With more steps, its distances are dominated by the network's errors, which all solvers share; so they are no reason
    to change the rule for other models.
    """
    if isinstance(schedule, FlowSchedule):
        return "euler", steps, {}
    if isinstance(schedule, (EDMSchedule, VESchedule)):
        return "heun", steps, {}
    n = min(20, schedule.timesteps) if steps is None else steps
    if not is_whole(n) or n < 10:
        return "unipc", n, {"order": 2 if guided else 3}
    if n < 50:
        return "dpmpp_2m" if guided else "dpmpp_3m", n, {}
    return ("dpmpp_2m_sde" if n < 250 else "ddpm"), n, {}
