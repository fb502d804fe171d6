"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a multi-step predictor, corrected once x_0 at its end is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.checks import one_of
from fastdiff.solvers.arguments import check_order, checked
from fastdiff.solvers.phi import phi
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVER_TYPES = ("bh1", "bh2")


@checked
def unipc(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    solver_type: str = "bh2",
    corrector: bool = True,
    lower_order_final: bool = True,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of UniPC-p with data prediction, p = ``order`` (Zhao et al. 2023, algorithms 5 and 6).

    A step from level s to level t with h = lambda_t - lambda_s uses the last p - 1 values m_k of x_0, at levels
    lambda_k. With r_k = (lambda_k - lambda_s) / h and D_k = (m_k - x_0) / r_k

        UniP   x_t  = sigma_t / sigma_s x_s + a_t (1 - e^-h) x_0 + a_t B sum_k rho_k D_k,    B = h (bh1), 1 - e^-h (bh2)
        UniC   x_tc = the same with other rho, + a_t B rho_p (x_0 at x_t - x_0)

    where rho solves sum_k rho_k r_k^(j-1) = j! h phi_{j+1}(-h) / B for j = 1 .. p - 1 (UniP), or with r_p = 1 as well
    for j = 1 .. p (UniC).

    UniC uses the network's x_0 at x_t, which the next step needs anyway, so it costs no evaluation. Both formulas start
    from the same x_s with the same factor, so the corrected state is the row's input x plus a combination of x_0, m1,
    m2 and m3. The correction of a step and the prediction of the next one are therefore one row.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        order: p, 1 to 3.
        solver_type: "bh1" or "bh2".
        corrector: Whether steps are corrected.
        lower_order_final: Whether the last steps are of orders ..., 2, 1. A step to zero noise always is of order 1.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    order = check_order(order, 3)
    walk = Walk.of(schedule, steps, **common)
    uncorrected = () if corrector else range(len(walk))
    return unipc_table(walk, order, solver_type, uncorrected, lower_order_final)


def unipc_table(
    walk: Walk, order: int, solver_type: str = "bh2", uncorrected: Collection[int] = (), lower_order_final: bool = True
) -> StepTable:
    """Build the rows of `unipc` for the levels of a walk; the steps in ``uncorrected`` are not corrected."""
    one_of("solver_type", solver_type, SOLVER_TYPES)
    n = len(walk)
    orders = []
    for i, level in enumerate(walk.levels):
        k = walk.order(i, min(order, n - i) if lower_order_final else order)
        orders.append(1 if level.abar_next == 1.0 else k)
    rows = []
    for i in range(n):
        # The corrected state is x + correction, whose entries are coefficients of row i's x_0, m1, m2 and m3.
        correction = np.zeros(4)
        if i > walk.start and i - 1 not in uncorrected and walk.levels[i - 1].abar > 0.0:
            predicted = np.append(0.0, _step(walk, i - 1, orders[i - 1], solver_type)[1][:3])
            correction = _corrected(walk, i - 1, orders[i - 1], solver_type) - predicted
        factor, prediction = _step(walk, i, orders[i], solver_type)
        x0, *m = (factor * correction + prediction).tolist()
        rows.append(walk.row(i, x=factor, x0=x0, m=m, keep="x0"))
    return walk.table(f"unipc_{order}" if order != 2 else "unipc", rows)


def _common(walk: Walk, i: int, order: int, solver_type: str) -> tuple[float, float, list[float], float, list[float]]:
    """Return for the step from level i: factor of x, coefficient of x_0, r_k, a_t B, and the right-hand sides."""
    level = walk.levels[i]
    factor = level.s_next / level.s
    full = level.a_next - level.a * factor  # a_t (1 - e^-h)
    h = level.log_sigma - level.log_sigma_next
    if h == 0.0 or math.isinf(h):
        return factor, full, [], full, [1.0 if h == 0.0 else 0.5]
    r = [(level.log_sigma - walk.levels[i - k].log_sigma) / h for k in range(1, order)]
    B = level.a_next * h if solver_type == "bh1" else full
    b = [math.factorial(j) * level.a_next * h * phi(j + 1, -h) / B for j in range(1, order + 1)]
    return factor, full, r, B, b


def solve_moments(r: Sequence[float], b: Sequence[float]) -> list[float]:
    """Solve sum_k rho_k r_k^j = b_j, j = 0 .. n - 1, for rho, with n distinct r (Björck & Pereyra 1970).

    LAPACK's last bits differ from processor to processor, and the table's would differ with them.
    """
    n, rho = len(r), list(b)
    for k in range(n - 1):
        for i in range(n - 1, k, -1):
            rho[i] -= r[k] * rho[i - 1]
    for k in range(n - 2, -1, -1):
        for i in range(k + 1, n):
            rho[i] /= r[i] - r[i - k - 1]
        for i in range(k, n - 1):
            rho[i] -= rho[i + 1]
    return rho


def _step(walk: Walk, i: int, order: int, solver_type: str) -> tuple[float, np.ndarray]:
    """Return UniP's step from level i: the factor of x, and the coefficients of x_0, m1, m2 and m3."""
    factor, full, r, B, b = _common(walk, i, order, solver_type)
    coefficients = np.array([full, 0.0, 0.0, 0.0])
    if r:
        # With one unknown the solution is 1/2 + O(h), and the paper takes 1/2.
        rho = [0.5] if order == 2 else solve_moments(r, b[:-1])
        for k, (v, share) in enumerate(zip(r, rho, strict=True), start=1):
            coefficients[k] += B * share / v
            coefficients[0] -= B * share / v
    return factor, coefficients


def _corrected(walk: Walk, i: int, order: int, solver_type: str) -> np.ndarray:
    """Return UniC's coefficients for the step from level i: of x_0 at its end, then of x_0, m1, m2 at its start."""
    _, full, r, B, b = _common(walk, i, order, solver_type)
    rho = [0.5] if order == 1 else solve_moments([*r, 1.0], b)
    coefficients = np.array([B * rho[-1], full - B * rho[-1], 0.0, 0.0])
    for k, (v, share) in enumerate(zip(r, rho[:-1], strict=True), start=1):
        coefficients[1 + k] += B * share / v
        coefficients[1] -= B * share / v
    return coefficients
