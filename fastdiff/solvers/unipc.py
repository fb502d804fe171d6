"""UniPC (Zhao et al. 2023, arXiv:2302.04867): a multi-step predictor, corrected once x_0 at its end is known."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.phi import phi
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVER_TYPES = ("bh1", "bh2")


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
    """UniPC-p with data prediction, p = ``order`` 1 to 3 (algorithms 5, 6). From level s to t, h = lambda_t - lambda_s,
    with D_k = (m_k - x_0) / r_k, r_k = (lambda_k - lambda_s) / h over the p - 1 values before:

        UniP   x_t  = sigma_t / sigma_s x_s + a_t (1 - e^-h) x_0 + a_t B sum_k rho_k D_k,    B = h (bh1), 1 - e^-h (bh2)
        UniC   x_tc = the same with other rho, + a_t B rho_p (x_0 at x_t - x_0)

    rho solves sum_k rho_k r_k^(j-1) = j! h phi_{j+1}(-h) / B for j = 1 .. p - 1 (UniP), or with r_p = 1 too for j = 1
    .. p (UniC).

    UniC reuses the network's x_0 at x_t, so it costs no evaluation; and as both start from the same x_s with the same
    factor, the corrected state is the row's input x plus a combination of x_0, m1, m2, m3. Correction of the last step
    and prediction of the next one are one row.

    lower_order_final
        The last steps are of orders ..., 2, 1 (a step to zero noise always is of order 1).

    Other options: `Walk.of`.
    """
    if isinstance(order, bool) or order not in (1, 2, 3):
        raise InvalidArgument(f"order={order!r}: 1, 2 or 3 is needed")
    walk = Walk.of(schedule, steps, **common)
    uncorrected = () if corrector else range(len(walk))
    return unipc_table(walk, order, solver_type, uncorrected, lower_order_final)


def unipc_table(
    walk: Walk, order: int, solver_type: str = "bh2", uncorrected: Collection[int] = (), lower_order_final: bool = True
) -> StepTable:
    """The table over a walk; the results of the steps in ``uncorrected`` stay as predicted."""
    if solver_type not in SOLVER_TYPES:
        raise InvalidArgument(f"solver_type={solver_type!r} is unknown; allowed: {', '.join(SOLVER_TYPES)}")
    n = len(walk)
    orders = []
    for i, level in enumerate(walk.levels):
        k = walk.order(i, min(order, n - i) if lower_order_final else order)
        orders.append(1 if level.abar_next == 1.0 else k)
    rows = []
    for i in range(n):
        # The corrected state is x + correction; entries belong to x_0, m1, m2, m3 of row i.
        correction = np.zeros(4)
        if i > 0 and i - 1 not in uncorrected and walk.levels[i - 1].abar > 0.0:
            predicted = np.append(0.0, _step(walk, i - 1, orders[i - 1], solver_type)[1][:3])
            correction = _corrected(walk, i - 1, orders[i - 1], solver_type) - predicted
        factor, prediction = _step(walk, i, orders[i], solver_type)
        x0, *m = (factor * correction + prediction).tolist()
        rows.append(_row(walk, i, factor, x0, m))
    return walk.table(f"unipc_{order}" if order != 2 else "unipc", rows)


def _row(walk: Walk, i: int, factor: float, x0: float, m: list[float]) -> Row:
    return walk.row(i, x=factor, x0=x0, m=m, keep="x0")


def _common(walk: Walk, i: int, order: int, solver_type: str) -> tuple[float, float, list[float], float, list[float]]:
    """(factor of x, coefficient of x_0, r_k, a_t B, right-hand sides) of the step from level i."""
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
    """rho with sum_k rho_k r_k^j = b_j, j = 0 .. n - 1, for n distinct r (Björck & Pereyra 1970).

    Not by LAPACK, whose last bits differ from processor to processor, and with them a table's.
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
    """UniP from level i: the factor of x, and the coefficients of x_0, m1, m2, m3."""
    factor, full, r, B, b = _common(walk, i, order, solver_type)
    coefficients = np.array([full, 0.0, 0.0, 0.0])
    if r:
        # For one unknown the equation's solution is 1/2 up to O(h), and the paper takes 1/2.
        rho = [0.5] if order == 2 else solve_moments(r, b[:-1])
        for k, (v, share) in enumerate(zip(r, rho, strict=True), start=1):
            coefficients[k] += B * share / v
            coefficients[0] -= B * share / v
    return factor, coefficients


def _corrected(walk: Walk, i: int, order: int, solver_type: str) -> np.ndarray:
    """UniC of the step from level i, without its x: coefficients of x_0 at the end, and of x_0, m1, m2 at the start."""
    _, full, r, B, b = _common(walk, i, order, solver_type)
    rho = [0.5] if order == 1 else solve_moments([*r, 1.0], b)
    coefficients = np.array([B * rho[-1], full - B * rho[-1], 0.0, 0.0])
    for k, (v, share) in enumerate(zip(r, rho[:-1], strict=True), start=1):
        coefficients[1 + k] += B * share / v
        coefficients[1] -= B * share / v
    return coefficients
