"""DPM-Solver++ (Lu et al. 2022, arXiv:2211.01095): multi-step solvers of the ODE and the SDE in x_0 and log-SNR."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastdiff.checks import one_of
from fastdiff.solvers.arguments import checked
from fastdiff.solvers.phi import phi
from fastdiff.solvers.table import Row, StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

SOLVER_TYPES = ("midpoint", "heun")
FEW = 15  # a run of fewer steps ends with lower orders, as in the authors' code


@checked
def dpmpp_1(schedule: Schedule, steps: int | None = None, **common: Unpack[Common]) -> StepTable:
    """Build the table of DPM-Solver++ of order 1, which is DDIM with eta = 0.

    A step from level s to level t with h = lambda_t - lambda_s is (eq. 9 with k = 1)

        x_t = sigma_t / sigma_s x + a_t (1 - e^-h) x_0

    where sigma = sqrt(1 - abar) is the noise's share and lambda = log(a / sigma).

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    return dpmpp_table(Walk.of(schedule, steps, **common), "dpmpp_1", order=1)


@checked
def dpmpp_2m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of DPM-Solver++(2M), which extrapolates x_0 through its last two values (algorithm 2).

    With h = lambda_t - lambda_s, the step before it h_0, m1 the x_0 of the row before, r = h_0 / h and
    D_1 = (x_0 - m1) / r

        midpoint   x_t = sigma_t / sigma_s x + a_t (1 - e^-h) (x_0 + D_1 / 2)
        heun       x_t = sigma_t / sigma_s x + a_t (1 - e^-h) x_0 + a_t ((e^-h - 1) / h + 1) D_1

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        solver_type: "midpoint" or "heun".
        lower_order_final: Whether the last step of a run of fewer than 15 steps is of order 1. A step to zero noise
            always is.
        euler_at_final: Whether the last step is of order 1 whatever the number of steps.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_2m", 2, solver_type, lower_order_final, euler_at_final)


@checked
def dpmpp_3m(
    schedule: Schedule,
    steps: int | None = None,
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of DPM-Solver++(3M), which extrapolates x_0 by the parabola through its last three values.

    With h the step, h_0 and h_1 the steps before it, r_0 = h_0 / h, r_1 = h_1 / h, and m1, m2 the values of x_0 before

        D_10 = (x_0 - m1) / r_0,  D_11 = (m1 - m2) / r_1
        D_1 = D_10 + r_0 / (r_0 + r_1) (D_10 - D_11),  D_2 = 2 (D_10 - D_11) / (r_0 + r_1)
        x_t = sigma_t / sigma_s x + a_t (1 - e^-h) x_0 + a_t ((e^-h - 1) / h + 1) D_1
              - a_t ((e^-h - 1 + h) / h^2 - 1/2) D_2

    so that D_1 and D_2 are h and h^2 times the parabola's derivatives. The authors' code, and with it diffusers, lacks
    the factor 2 of D_2, which costs an order: its errors fall with h^2, and with the factor with h^3
    (tests/solvers/test_orders.py measures both). The first two steps are of orders 1 and 2 (heun).

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        lower_order_final: Whether the last step of a run of fewer than 15 steps is of order 1, and the one
            before it of order 2. A step to zero noise always is of order 1.
        euler_at_final: Whether the last step is of order 1 whatever the number of steps.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_3m", 3, "heun", lower_order_final, euler_at_final)


@checked
def dpmpp_2m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of SDE-DPM-Solver++(2M), which solves the reverse SDE in place of the ODE.

    With D_1 as in `dpmpp_2m` (paper's appendix, "SDE-DPM-Solver++")

        midpoint   x_t = sigma_t / sigma_s e^-h x + a_t (1 - e^-2h) (x_0 + D_1 / 2) + sigma_t sqrt(1 - e^-2h) z
        heun       x_t = sigma_t / sigma_s e^-h x + a_t (1 - e^-2h) x_0 + a_t ((1 - e^-2h) / (-2h) + 1) D_1
                         + sigma_t sqrt(1 - e^-2h) z

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        solver_type: "midpoint" or "heun".
        lower_order_final: Whether the last step of a run of fewer than 15 steps is of order 1. A step to zero noise
            always is.
        euler_at_final: Whether the last step is of order 1 whatever the number of steps.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_2m_sde", 2, solver_type, lower_order_final, euler_at_final, sde=True)


@checked
def dpmpp_3m_sde(
    schedule: Schedule,
    steps: int | None = None,
    *,
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of SDE-DPM-Solver++(3M), k-diffusion's sample_dpmpp_3m_sde with eta = 1.

    With D_1 and D_2 as in `dpmpp_3m` and g = 2 h

        x_t = sigma_t / sigma_s e^-h x + a_t (1 - e^-g) x_0 + a_t ((e^-g - 1) / g + 1) D_1
              - a_t ((e^-g - 1 + g) / g^2 - 1/2) D_2 + sigma_t sqrt(1 - e^-g) z

    k-diffusion takes half of D_2, as the authors of `dpmpp_3m` do.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        lower_order_final: Whether the last step of a run of fewer than 15 steps is of order 1, and the one
            before it of order 2. A step to zero noise always is of order 1.
        euler_at_final: Whether the last step is of order 1 whatever the number of steps.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    walk = Walk.of(schedule, steps, **common)
    return dpmpp_table(walk, "dpmpp_3m_sde", 3, "heun", lower_order_final, euler_at_final, sde=True)


def dpmpp_table(
    walk: Walk,
    name: str,
    order: int,
    solver_type: str = "midpoint",
    lower_order_final: bool = True,
    euler_at_final: bool = False,
    sde: bool = False,
    authors: bool = False,
    sign: bool = False,
) -> StepTable:
    """Build the rows of any DPM-Solver++ for the levels of a walk; the options are those of the public functions.

    With ``authors``, order 3 has half of D_2; with ``sign``, diffusers' wrong sign in its coefficient for the SDE too.
    """
    one_of("solver_type", solver_type, SOLVER_TYPES)
    n = len(walk)
    rows = []
    for i, level in enumerate(walk.levels):
        k = walk.order(i, order)
        if i == n - 1 and (level.abar_next == 1.0 or euler_at_final or (lower_order_final and n < FEW)):
            k = 1
        elif i == n - 2 and lower_order_final and n < FEW:
            k = min(k, 2)
        rows.append(_row(walk, i, k, solver_type, sde, authors, sign))
    return walk.table(name, rows)


def _row(walk: Walk, i: int, order: int, solver_type: str, sde: bool, authors: bool, sign: bool) -> Row:
    """Return row i, a step of the given order: the formulas are those of the public functions above."""
    level = walk.levels[i]
    # e^-h = (s_t / a_t) / (s_s / a_s), computed without h, which is infinite in a step to zero noise.
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
    if h == 0.0:  # both levels are the same, as a quirk of diffusers can make them
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
        second = 0.5 * second - (level.a_next if sde and sign else 0.0)
    # first D_1 + second D_2 / 2 as d10 D_10 + d11 D_11
    d10 = first * (1.0 + r0 / (r0 + r1)) + second / (r0 + r1)
    d11 = -first * r0 / (r0 + r1) - second / (r0 + r1)
    m = (-d10 / r0 + d11 / r1, -d11 / r1)
    return walk.row(i, x=x, x0=full + d10 / r0, m=m, z=z, keep="x0")
