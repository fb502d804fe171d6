"""Single-step DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): groups of two or three evaluations without a history.

A group starts at level s and ends at level t. Its first evaluation steps from s to the next level, its second again
from s to the level after that, and in a group of three its third from s to t. All levels are the run's own, so that n
evaluations visit n levels, as those of the multi-step solvers do.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from fastdiff.checks import one_of
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.dpmpp import SOLVER_TYPES
from fastdiff.solvers.phi import phi
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack


@checked
def dpmpp_2s(
    schedule: Schedule, steps: int | None = None, *, solver_type: str = "midpoint", **common: Unpack[Common]
) -> StepTable:
    """Build the table of DPM-Solver++(2S), single-step, of order 2 (algorithm 1).

    A group goes from level s over level r to level t. With h = lambda_t - lambda_s, r_0 = (lambda_r - lambda_s) / h, m1
    the x_0 at s, x_0 that at r, and D_1 = (x_0 - m1) / r_0

        x_r = sigma_r / sigma_s x_s + a_r (1 - e^(lambda_s - lambda_r)) m1
        x_t = sigma_t / sigma_s x_s + a_t (1 - e^-h) (m1 + D_1 / 2)                                       midpoint
        x_t = sigma_t / sigma_s x_s + a_t (1 - e^-h) m1 + a_t ((e^-h - 1) / h + 1) D_1                    heun

    A step to zero noise, and one that is left over, is of order 1.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of evaluations; None is 50, or every timestep of a schedule that has fewer (18 with an
            `EDMSchedule`).
        solver_type: "midpoint" or "heun".
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row an evaluation.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(schedule, steps, **common)
    return singlestep_table(walk, "dpmpp_2s", orders(walk, 2), solver_type)


@checked
def dpmpp_3s(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """Build the table of DPM-Solver++(3S), single-step, of order 3 (DPM-Solver, arXiv:2206.00927, algorithm 2, in x_0).

    The third evaluation of a group, at level q, steps from s to t along the parabola through the three values of x_0.
    With h = lambda_t - lambda_s, r_1 = (lambda_r - lambda_s) / h, r_0 = (lambda_q - lambda_s) / h, m2, m1 and x_0 the
    values at s, r and q, D_10 = (m1 - m2) / r_1 and D_11 = (x_0 - m2) / r_0

        D_1 = (r_0 D_10 - r_1 D_11) / (r_0 - r_1),     D_2 = 2 (D_11 - D_10) / (r_0 - r_1)
        x_t = sigma_t / sigma_s x_s + a_t (1 - e^-h) m2 + a_t ((e^-h - 1) / h + 1) D_1
              - a_t ((e^-h - 1 + h) / h^2 - 1/2) D_2

    The evaluations before it are those of `dpmpp_2s` (heun). A step to zero noise is of order 1.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of evaluations; None is 50, or every timestep of a schedule that has fewer (18 with an
            `EDMSchedule`).
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row an evaluation.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(schedule, steps, **common)
    return singlestep_table(walk, "dpmpp_3s", orders(walk, 3), "heun")


def orders(walk: Walk, order: int) -> list[int]:
    """Return the order of every row: groups 1, 2, .. ``order``, then a shorter one, then 1 for a step to zero noise.

    Infinite sigma is a group of its own, as no step of a higher order can start there.
    """
    first = [1] if walk.levels[0].abar == 0.0 else []
    last = [1] if walk.levels[-1].abar_next == 1.0 and len(walk) > len(first) else []
    between = len(walk) - len(first) - len(last)
    return [*first, *(i % order + 1 for i in range(between)), *last]


def singlestep_table(walk: Walk, name: str, orders: Sequence[int], solver_type: str) -> StepTable:
    """Build the rows for the levels of a walk; a row of order k > 1 ends the step that row i - k + 1 started."""
    one_of("solver_type", solver_type, SOLVER_TYPES)
    rows = []
    for i, order in enumerate(orders):
        goes_on = i + 1 < len(orders) and orders[i + 1] > order
        if order == 1:
            rows.append(_first(walk, i, goes_on))
        elif order == 2:
            rows.append(_second(walk, i, solver_type, keep="x0" if goes_on and solver_type == "heun" else None))
        else:
            rows.append(_third(walk, i, solver_type))
    return walk.table(name, rows)


def _first(walk: Walk, i: int, goes_on: bool) -> Row:
    """Return row i, the first evaluation of a group; if the group goes on, its input and its x_0 are kept."""
    level = walk.levels[i]
    x = level.s_next / level.s
    keep = "x0" if goes_on else None
    return walk.row(i, x=x, x0=level.a_next - level.a * x, keep=keep, save=float(goes_on))


def _second(walk: Walk, i: int, solver_type: str, keep: str | None) -> Row:
    """Return row i, a step of order 2 from level i - 1; ``keep`` as in `Walk.row`."""
    start, level = walk.levels[i - 1], walk.levels[i]
    xs = level.s_next / start.s
    full = level.a_next - start.a * xs  # a_t (1 - e^-h)
    h, h0 = start.log_sigma - level.log_sigma_next, start.log_sigma - level.log_sigma
    d1 = 0.5 * full if solver_type == "midpoint" else level.a_next * h * phi(2, -h)
    d1 *= h / h0
    return walk.row(i, xs=xs, x0=d1, m=(full - d1,), keep=keep)


def _third(walk: Walk, i: int, solver_type: str) -> Row:
    """Return row i, a step of order 3 from level i - 2; "midpoint" is diffusers', which takes D_11 in place of D_1."""
    start, level = walk.levels[i - 2], walk.levels[i]
    xs = level.s_next / start.s
    full = level.a_next - start.a * xs
    h, h0 = start.log_sigma - level.log_sigma_next, start.log_sigma - level.log_sigma
    r0, r1 = h0 / h, (start.log_sigma - walk.levels[i - 1].log_sigma) / h
    first = level.a_next * h * phi(2, -h)
    if solver_type == "midpoint":  # the x_0 at r is not kept
        return walk.row(i, xs=xs, x0=first / r0, m=(full - first / r0,))
    second = 2.0 * level.a_next * h * phi(3, -h)
    d10, d11 = (first * r0 - second) / (r0 - r1), (second - first * r1) / (r0 - r1)
    return walk.row(i, xs=xs, x0=d11 / r0, m=(d10 / r1, full - d10 / r1 - d11 / r0))
