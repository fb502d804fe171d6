"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): multi-step solvers of the ODE and the SDE in x_0 and log-SNR."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastdiff.errors import InvalidArgument
from fastdiff.solvers.phi import phi
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVER_TYPES = ("midpoint", "heun")
FEW = 15  # fewer steps than this end with lower orders, as in the authors' code


def dpmpp_1(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """DPM-Solver++(1), which is DDIM with eta = 0. With h = lambda_t - lambda_s from level s to t:

        x_t = sigma_t / sigma_s x + a_t (1 - e^-h) x_0                                    (eq. 9 with k = 1)

    (sigma here the noise's share sqrt(1 - abar).) Options: `Walk.of`.
    """
    return dpmpp_table(Walk.of(schedule, steps, **common), "dpmpp_1", order=1)


def dpmpp_2m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """DPM-Solver++(2M): x_0 is extrapolated along lambda through its last two values (algorithm 2). With h_0 the step
    before, r = h_0 / h and D_1 = (x_0 - m1) / r:

        midpoint   x_t = sigma_t / sigma_s x + a_t (1 - e^-h) (x_0 + D_1 / 2)
        heun       x_t = sigma_t / sigma_s x + a_t (1 - e^-h) x_0 + a_t ((e^-h - 1) / h + 1) D_1

    lower_order_final
        With fewer than 15 steps the last one is of order 1 (a step to zero noise always is).
    euler_at_final
        The last step is of order 1 whatever the number of steps.

    Other options: `Walk.of`.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_2m", 2, solver_type, lower_order_final, euler_at_final)


def dpmpp_3m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """DPM-Solver++(3M): the parabola through the last three values of x_0. With r_0 = h_0 / h, r_1 = h_1 / h:

        D_10 = (x_0 - m1) / r_0,  D_11 = (m1 - m2) / r_1
        D_1 = D_10 + r_0 / (r_0 + r_1) (D_10 - D_11),  D_2 = 2 (D_10 - D_11) / (r_0 + r_1)
        x_t = sigma_t / sigma_s x + a_t (1 - e^-h) x_0 + a_t ((e^-h - 1) / h + 1) D_1
              - a_t ((e^-h - 1 + h) / h^2 - 1/2) D_2

    so that D_1 and D_2 are h and h^2 times the parabola's derivatives. The authors' code, and with it diffusers, leaves
    out the 2, which costs an order: errors then fall with h^2, with the 2 as h^3
    (tests/solvers/test_orders.py measures both).
    It starts with orders 1 and 2 (heun). Options are those of `dpmpp_2m`.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_3m", 3, "heun", lower_order_final, euler_at_final)


def dpmpp_2m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """SDE-DPM-Solver++(2M): the same for the reverse SDE, which forgets x twice as fast (appendix, "SDE-DPM-Solver++"):

        midpoint   x_t = sigma_t / sigma_s e^-h x + a_t (1 - e^-2h) (x_0 + D_1 / 2) + sigma_t sqrt(1 - e^-2h) z
        heun       ... + a_t (1 - e^-2h) x_0 + a_t ((1 - e^-2h) / (-2h) + 1) D_1 + ...

    Options are those of `dpmpp_2m`.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_2m_sde", 2, solver_type, lower_order_final, euler_at_final, sde=True)


def dpmpp_table(
    walk: Walk,
    name: str,
    order: int,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    sde: bool = False,
    authors: bool = False,
) -> StepTable:
    """The table over a walk: every DPM-Solver++ is this with other numbers.

    authors: order 3 with half of D_2, and for the SDE with diffusers' wrong sign in its coefficient.
    """
    if solver_type not in SOLVER_TYPES:
        raise InvalidArgument(f"solver_type={solver_type!r} is unknown; allowed: {', '.join(SOLVER_TYPES)}")
    n = len(walk)
    rows = []
    for i, level in enumerate(walk.levels):
        k = walk.order(i, order)
        if i == n - 1 and (level.abar_next == 1.0 or euler_at_final or (lower_order_final and n < FEW)):
            k = 1
        elif i == n - 2 and lower_order_final and n < FEW:
            k = min(k, 2)
        rows.append(_row(walk, i, k, solver_type, sde, authors))
    return walk.table(name, rows)


def _row(walk: Walk, i: int, order: int, solver_type: str, sde: bool, authors: bool) -> Row:
    level = walk.levels[i]
    # e^-h = sigma_t / sigma_s of the ratios sigma = s / a, so that infinite h needs no limit.
    decay = level.a * level.s_next / (level.a_next * level.s)
    x, z = level.s_next / level.s, 0.0
    full = level.a_next - level.a * x  # a_t (1 - e^-h)
    if sde:
        x *= decay
        full = level.a_next * (1.0 - decay * decay)
        z = level.s_next * math.sqrt(1.0 - decay * decay)
    if order == 1:
        return walk.row(i, x=x, x0=full, z=z, keep="x0")
    h, h0 = level.log_sigma - level.log_sigma_next, walk.levels[i - 1].log_sigma - level.log_sigma
    if h == 0.0:  # a walk that repeats its last level goes nowhere
        return walk.row(i, x=1.0, keep="x0")
    g = 2.0 * h if sde else h
    # ((e^-g - 1) / g + 1) = g phi_2(-g);  -((e^-g - 1 + g) / g^2 - 1/2) = g phi_3(-g)
    first = level.a_next * g * phi(2, -g)
    if order == 2:
        d1 = (0.5 * full if solver_type == "midpoint" else first) / (h0 / h)
        return walk.row(i, x=x, x0=full + d1, m=(-d1,), z=z, keep="x0")
    h1 = walk.levels[i - 2].log_sigma - walk.levels[i - 1].log_sigma
    r0, r1 = h0 / h, h1 / h
    second = 2.0 * level.a_next * g * phi(3, -g)
    if authors:
        second = 0.5 * second - (level.a_next if sde else 0.0)
    # D_1 and D_2 in D_10 and D_11
    d10 = first * (1.0 + r0 / (r0 + r1)) + second / (r0 + r1)
    d11 = -first * r0 / (r0 + r1) - second / (r0 + r1)
    m = (-d10 / r0 + d11 / r1, -d11 / r1)
    return walk.row(i, x=x, x0=full + d10 / r0, m=m, z=z, keep="x0")
