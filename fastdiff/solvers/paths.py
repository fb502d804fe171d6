"""Tables that start late (SDEdit), turn back (RePaint), or run upwards, from image to noise (DDIM inversion)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.prediction import eps_coefficients
from fastdiff.solvers.table import Row, StepTable, is_number
from fastdiff.solvers.walk import Level, Schedule, Walk

LINEAR = ("ax", "ao", "a0", "as_")  # a row's coefficients of what a table without history reads


def step_starts(table: StepTable) -> list[int]:
    """The rows at which a step begins: those that are no stage."""
    return [i for i, row in enumerate(table.rows) if not row.stage]


def late_start(table: StepTable, strength: float) -> int:
    """The row at which a run starts that goes only the last ``strength`` of its N steps (Meng et al. 2022, SDEdit,
    arXiv:2108.01073, algorithm 1: t_0 = strength): step N - floor(strength N), as in diffusers' img2img pipelines.

    Raises `InvalidArgument` for a strength outside (0, 1], or of less than one step.
    """
    if not is_number(strength) or not 0.0 < strength <= 1.0:
        raise InvalidArgument(f"strength={strength!r}: a number above 0, at most 1, is needed")
    starts = step_starts(table)
    steps = int(len(starts) * strength + 1e-9)  # 0.29 of 100 is 29
    if steps < 1:
        raise InvalidArgument(f"strength={strength!r} of {len(starts)} steps is less than one; give more of either")
    return starts[len(starts) - steps]


def looks_back(table: StepTable, start: int) -> bool:
    """Whether a row from ``start`` on reads what a row before it left: the history or the saved x."""
    pushed, saved = 0, False
    for row in table.rows[start:]:
        depth = max((k for k, a in enumerate((row.a1, row.a2, row.a3), start=1) if a), default=0)
        if depth > pushed or (row.as_ and not saved):
            return True
        pushed, saved = pushed + bool(row.push), saved or bool(row.save)
    return False


def starting_at(table: StepTable, start: int) -> StepTable:
    """The table's rows from ``start`` on, for a state that is noised to the level there.

    Raises `InvalidArgument` where they look back: a multi-step solver has to be built for the later timesteps.
    """
    if start == 0:
        return table
    if looks_back(table, start):
        raise InvalidArgument(
            f"this {table.solver} table cannot start at row {start}, which reads what earlier rows left; build it with "
            "spacing=table.timesteps of the later steps"
        )
    rows = table.rows[start:]
    steps = sum(not row.stage for row in rows)
    return dataclasses.replace(table, steps=steps, rows=rows, init_scale=math.sqrt(1.0 - rows[0].abar))


def repaint(table: StepTable, jump_length: int = 10, resamples: int = 10) -> StepTable:
    """A table that goes every stretch of ``jump_length`` steps ``resamples`` times (Lugmayr et al. 2022, RePaint,
    arXiv:2201.09865, algorithm 1 and appendix B), so that what is drawn anew comes to agree with what is known.

    Between two times it jumps up from level abar_p to abar_u by the forward process,

        x_u = sqrt(abar_u / abar_p) x_p + sqrt(1 - abar_u / abar_p) z                  (eq. 1 of the paper)

    which needs no network, so it is part of the row before: with r = abar_u / abar_p, that row's coefficients times
    sqrt(r), and noise of the two's joint variance, r s^2 + 1 - r. As in the authors' code no jump starts at the data
    (those of diffusers' pipeline start a step lower), and one that would pass the first level is left out. N steps
    become N + (resamples - 1) jump_length floor((N - 1) / jump_length) rows.

    Raises `InvalidArgument` for a table with history, or whose noise the network scales.
    """
    for name, value in (("jump_length", jump_length), ("resamples", resamples)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InvalidArgument(f"{name}={value!r}: a whole number of at least 1 is needed")
    starts = step_starts(table)
    if any(looks_back(table, start) for start in starts):
        raise InvalidArgument(
            f"RePaint cannot resample {table.solver}, a multi-step solver; ddpm, ddim, euler, euler_ancestral, dpmpp_1 "
            "and heun can be"
        )
    if table.learned_variance:
        raise InvalidArgument("RePaint cannot resample with variance='learned_range'; 'posterior' or 'beta' can be")
    steps = [table.rows[a:b] for a, b in zip(starts, [*starts[1:], len(table)], strict=True)]
    n, rows, at = len(steps), list[Row](), len(steps)  # at: how many steps are left
    # The level with j + 1 steps left is t = j of the paper's schedule, from which it jumps.
    jumps = {j + 1: resamples - 1 for j in range(0, n - jump_length, jump_length)}
    while at:
        rows += steps[n - at]
        at -= 1
        if jumps.get(at):
            jumps[at] -= 1
            at += jump_length
            rows[-1] = _jump(rows[-1], steps[n - at][0].abar)
    return dataclasses.replace(table, rows=tuple(rows), ascending=True)


def _jump(row: Row, abar: float) -> Row:
    """The row, and after it the forward process from its abar_next to ``abar``."""
    r = abar / row.abar_next
    s = math.sqrt(r * row.s**2 + 1.0 - r)
    return row._replace(abar_next=abar, s=s, **{name: math.sqrt(r) * getattr(row, name) for name in LINEAR})


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
    """The way up of deterministic DDIM, from an image to the noise that `ddim` with ``clip=None`` turns into it (Song
    et al. 2021, arXiv:2010.02502, section 4.3). DDIM's step down from level t (a, s) to level p (a_p, s_p) is

        x_p = a_p / a x_t + (s_p - a_p s / a) eps(x_t, t),    so
        x_t = a / a_p x_p + (s - a s_p / a_p) eps(x_t, t)

    whose eps is that of the unknown x_t: with ``iterations`` = 1 it is taken at x_p instead (as everyone does, and
    diffusers' DDIMInverseScheduler), with more the equation is solved by fixed-point iteration from there, a row each
    (Pan et al. 2023, arXiv:2309.04907). It contracts where s - a s_p / a_p times the slope of eps, at most about 1 / s
    next to the data, is less than 1: where the last levels are close together, as in spacings by sigma. The network is
    always told t.

    The other options are those of the `ddim` that shall lead back; the image stands where that one ends. The table's
    init_scale is that one's too: the noise is what comes out, divided by it. Raises `InvalidArgument`.
    """
    if isinstance(iterations, bool) or not isinstance(iterations, int) or not 1 <= iterations <= 1000:
        raise InvalidArgument(f"iterations={iterations!r}: a whole number from 1 to 1000 is needed")
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
    rows[0] = rows[0]._replace(abar=1.0)  # an image, taken as it is
    return StepTable(
        "ddim_inversion",
        len(walk),
        tuple(rows),
        init_scale=walk.init_scale,
        ascending=True,
        continuous=edm,
        data_scale=walk.data_scale,
    )


def _up(level: Level, abar: float, ex: float, eo: float, **columns: float) -> Row:
    """A row whose x is at ``abar`` and whose network is told ``level.t``; x0 = (x - s eps) / a is for previews."""
    a, s = math.sqrt(abar), math.sqrt(1.0 - abar)
    return Row(t=level.t, abar=abar, abar_next=level.abar, kx=(1.0 - s * ex) / a, ko=-s * eo / a, **columns)
