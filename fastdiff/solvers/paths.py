"""Tables for image editing: late starts (SDEdit, img2img), resampling (RePaint) and inversion."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from functools import partial

from fastdiff.checks import is_number, shown, whole
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.arguments import check_order, checked
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import Row, StepTable, scale_of
from fastdiff.solvers.walk import Level, Schedule, Walk, noised

MAX_REPEATED = 1_000_000  # steps that RePaint adds at most


def step_starts(table: StepTable) -> list[int]:
    """List the rows at which a step begins, which are those that are no stage."""
    return [i for i, row in enumerate(table.rows) if not row.stage]


def late_start(table: StepTable, strength: float) -> int:
    """Return the row at which a run starts that goes through only the last ``strength`` of its N steps.

    As in SDEdit (Meng et al. 2022, arXiv:2108.01073, algorithm 1, t_0 = strength) and diffusers' img2img pipelines this
    is the first row of step N - floor(strength N).
    """
    if not is_number(strength) or not 0.0 < strength <= 1.0:
        raise InvalidArgument(f"strength={shown(strength)}: a number above 0, at most 1, is needed")
    starts = step_starts(table)
    steps = int(len(starts) * strength + 1e-9)  # 0.29 * 100 is 28.999999999999996, and 29 steps are meant
    if steps < 1:
        raise InvalidArgument(f"strength={strength!r} of {len(starts)} steps is less than one; give more of either")
    return starts[len(starts) - steps]


def looks_back(table: StepTable, start: int) -> bool:
    """Return whether a row from ``start`` on reads the history or the saved x of a row before ``start``."""
    pushed, saved = 0, False
    for row in table.rows[start:]:
        depth = max((k for k, a in enumerate((row.a1, row.a2, row.a3), start=1) if a), default=0)
        if depth > pushed or (row.as_ and not saved):
            return True
        pushed, saved = pushed + bool(row.push), saved or bool(row.save)
    return False


@checked
def starting_at(table: StepTable, start: int) -> StepTable:
    """Return the table that runs only the rows from ``start`` on.

    Args:
        table: The whole table.
        start: Its first row that is run.

    Returns:
        The table, for a state that is noised to the level of that row.

    Raises:
        InvalidArgument: If a row from ``start`` on reads what an earlier one leaves. A multi-step solver has to be
            built anew, for the later timesteps.
    """
    whole("start", start, 0, len(table) - 1, of="the rows of the table")
    if start == 0:
        return table
    if looks_back(table, start):
        raise InvalidArgument(
            f"this {table.solver} table cannot start at row {start}, which reads what earlier rows left; build it with "
            "spacing=table.timesteps of the later steps"
        )
    rows = table.rows[start:]
    steps = sum(not row.stage for row in rows)
    return dataclasses.replace(table, steps=steps, rows=rows, init_scale=table.signal_and_noise(rows[0].abar)[1])


@checked
def repaint(table: StepTable, jump_length: int = 10, resamples: int = 10) -> StepTable:
    """Return a table that repeats every stretch of steps, so that regions that are drawn come to agree with known ones.

    This is RePaint's resampling (Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1 and appendix B). Between two
    repetitions the run jumps up from level abar_p to abar_u by the forward process,

        x_u = sqrt(abar_u / abar_p) x_p + sqrt(1 - abar_u / abar_p) z                  (eq. 1 of the paper)

    which needs no network, so it is part of the row before: with r = abar_u / abar_p, that row's coefficients times
    sqrt(r), and noise of the joint variance r s^2 + 1 - r. As in the authors' code no jump starts at the data (those of
    diffusers' pipeline start a step lower), and a jump that would pass the first level is left out.

    Args:
        table: A table without history.
        jump_length: Number of steps of a stretch.
        resamples: Number of times that a stretch is run.

    Returns:
        A table that for N steps has N + (resamples - 1) jump_length floor((N - 1) / jump_length) rows.

    Raises:
        InvalidArgument: If the table has a history, or noise whose scale the network predicts.
    """
    jump_length, resamples = whole("jump_length", jump_length, 1), whole("resamples", resamples, 1)
    starts = step_starts(table)
    repeated = (resamples - 1) * jump_length * ((len(starts) - 1) // jump_length)
    if repeated > MAX_REPEATED:
        raise InvalidArgument(f"jump_length={jump_length}, resamples={shown(resamples)}: {shown(repeated)} steps more")
    if any(looks_back(table, start) for start in starts):
        raise InvalidArgument(
            f"RePaint cannot resample {table.solver}, a multi-step solver; ddpm, ddim, euler, euler_ancestral, dpmpp_1 "
            "and heun can be"
        )
    if table.learned_variance:
        raise InvalidArgument("RePaint cannot resample with variance='learned_range'; 'posterior' or 'beta' can be")
    steps = [table.rows[a:b] for a, b in zip(starts, [*starts[1:], len(table)], strict=True)]
    n, rows, at = len(steps), list[Row](), len(steps)  # at: number of steps that are left
    # The level with j + 1 steps left is t = j of the paper's schedule.
    jumps = {j + 1: resamples - 1 for j in range(0, n - jump_length, jump_length)}
    while at:
        rows += steps[n - at]
        at -= 1
        if jumps.get(at):
            jumps[at] -= 1
            at += jump_length
            scale = partial(scale_of, flow=table.flow, exploding=table.exploding)
            rows[-1] = noised(rows[-1], steps[n - at][0].abar, scale=scale)
    return dataclasses.replace(table, rows=tuple(rows), ascending=True)


@checked
def ddim_inversion(
    schedule: Schedule,
    steps: int | None = None,
    *,
    iterations: int = 1,
    spacing: str | Sequence[float] | None = None,
    prediction: str | None = None,
    steps_offset: int = 0,
    set_alpha_to_one: bool = True,
) -> StepTable:
    """Build the table of DDIM inversion, from an image to the noise that `ddim` with ``clip=None`` turns into it.

    It is deterministic DDIM backwards (Song et al. 2021, arXiv:2010.02502, section 4.3). DDIM's step down from level t
    (a, s) to level p (a_p, s_p) is

        x_p = a_p / a x_t + (s_p - a_p s / a) eps(x_t, t),    so
        x_t = a / a_p x_p + (s - a s_p / a_p) eps(x_t, t)

    whose eps is that of the unknown x_t. With ``iterations`` = 1 it is taken at x_p instead, as in diffusers'
    DDIMInverseScheduler; with more the equation is solved by fixed-point iteration from there, a row for each (Pan et
    al. 2023, arXiv:2309.04907). The iteration contracts if s - a s_p / a_p times the slope of eps, which is at most
    about 1 / s next to the data, is less than 1: if the last levels are close together, as in spacings by sigma.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps, as in the `ddim` that leads back.
        iterations: Network evaluations for each step, 1 to 1000.
        spacing: As in the `ddim` that leads back.
        prediction: What the network predicts, see `Walk.of`.
        steps_offset: As in the `ddim` that leads back.
        set_alpha_to_one: As in the `ddim` that leads back: the image is at the level where that one ends.

    Returns:
        A table of ``iterations`` rows a step. Its result divided by the table's init_scale is the noise.

    Raises:
        InvalidArgument: If an option is out of range, or the schedule has zero SNR, from which nothing leads back.
    """
    whole("iterations", iterations, 1, 1000)
    _check_invertible(schedule)
    edm = isinstance(schedule, EDMSchedule)
    walk = Walk.of(
        schedule, steps, spacing=spacing, prediction=prediction, clip=None, steps_offset=steps_offset,
        final="zero" if set_alpha_to_one or edm else "sigma_min",
    )  # fmt: skip
    if walk.levels[0].abar == 0.0:
        raise InvalidArgument("nothing leads back from zero SNR (abar = 0); a schedule without it is needed")
    rows: list[Row] = []
    for level in reversed(walk.levels):
        ratio = level.a / level.a_next
        direction = level.s - ratio * level.s_next
        ex, eo = eps_coefficients(walk.prediction, level.abar)
        rows.append(_up(level, level.abar_next, ex, eo, ax=ratio + direction * ex, ao=direction * eo, save=1.0))
        for _ in range(iterations - 1):
            again = {"ax": direction * ex, "ao": direction * eo, "as_": ratio, "stage": 1.0}
            rows.append(_up(level, level.abar, ex, eo, **again))
    if iterations == 1:
        rows = [row._replace(save=0.0) for row in rows]
    rows[0] = rows[0]._replace(abar=1.0)  # the first row reads the image itself
    return StepTable(
        "ddim_inversion", len(walk), tuple(rows),
        init_scale=walk.init_scale, ascending=True, continuous=edm, data_scale=walk.data_scale,
    )  # fmt: skip


@checked
def dpmpp_inversion(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    spacing: str | Sequence[float] | None = None,
    prediction: str | None = None,
    steps_offset: int = 0,
) -> StepTable:
    """Build the table of DPM-Solver++ from an image to the noise that the solver with ``clip=None`` turns into it.

    The multi-step formulas of `dpmpp_2m` and `dpmpp_3m` hold for steps in either direction; here lambda falls, so that
    h is negative. diffusers' DPMSolverMultistepInverseScheduler is the same with its own levels. The image is taken to
    have the schedule's lowest noise level, at which lambda is finite.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps, as in the solver that leads back.
        order: 1 for `dpmpp_1`, 2 for `dpmpp_2m`, 3 for `dpmpp_3m`.
        spacing: As in the solver that leads back.
        prediction: What the network predicts, see `Walk.of`.
        steps_offset: As in the solver that leads back.

    Returns:
        A table of one row a step; one less where the run back ends at the lowest level itself, as "leading" and
        "linspace" do. Its result divided by the table's init_scale is the noise.

    Raises:
        InvalidArgument: If an option is out of range, there is one level alone, or the schedule has zero SNR, from
            which nothing leads back.
    """
    check_order(order, 3)
    _check_invertible(schedule)
    down = Walk.of(
        schedule, steps, spacing=spacing, prediction=prediction, clip=None, steps_offset=steps_offset, final="sigma_min"
    )
    if down.levels[0].abar == 0.0:
        raise InvalidArgument("nothing leads back from zero SNR (abar = 0); a schedule without it is needed")
    times = [*(level.t for level in down.levels[1:]), down.last_time]
    up = tuple(
        Level(t, level.abar_next, level.abar)
        for level, t in zip(down.levels, times, strict=True)
        if level.abar_next > level.abar
    )[::-1]
    if not up:
        raise InvalidArgument("one step at the lowest noise level leads nowhere; more steps are needed")
    walk = dataclasses.replace(down, levels=up, ascending=True, output_scale=1.0, data_scale=1.0)
    table = dpmpp_table(walk, "dpmpp_inversion", order, "heun" if order == 3 else "midpoint")
    first = table.rows[0]._replace(abar=1.0)  # the first row reads the image itself
    return dataclasses.replace(
        table, steps=len(down), rows=(first, *table.rows[1:]), data_scale=down.data_scale
    )  # fmt: skip


def _check_invertible(schedule: Schedule) -> None:
    if not isinstance(schedule, (NoiseSchedule, EDMSchedule)):
        kind = type(schedule).__name__
        raise InvalidArgument(f"inversion needs a NoiseSchedule or an EDMSchedule; a {kind} is not supported")


def _up(level: Level, abar: float, ex: float, eo: float, **columns: float) -> Row:
    """Return a row that reads x at level ``abar``; the network is evaluated at timestep ``level.t``.

    x0 = (x - s eps) / a is there for previews.
    """
    a, s = math.sqrt(abar), math.sqrt(1.0 - abar)
    return Row(t=level.t, abar=abar, abar_next=level.abar, kx=(1.0 - s * ex) / a, ko=-s * eo / a, **columns)
