"""Adams-Bashforth methods for dx/dsigma = eps, x = x_0 + sigma eps: LMS (k-diffusion) and DEIS (Zhang & Chen 2023).

    x_t = x_s + sum_k eps_k integral from sigma_s to sigma_t of L_k dsigma

eps_k are the last values of eps and L_k their Lagrange polynomials: in sigma for LMS, in log sigma for DEIS.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from fastdiff.solvers.arguments import check_order, checked
from fastdiff.solvers.table import StepTable
from fastdiff.solvers.walk import Common, Schedule, Walk

if TYPE_CHECKING:
    from typing_extensions import Unpack

FEW = 15  # a run of fewer steps ends with lower orders
NODES, WEIGHTS = np.polynomial.legendre.leggauss(20)


@checked
def lms(schedule: Schedule, steps: int | None = None, *, order: int = 4, **common: Unpack[Common]) -> StepTable:
    """Build the table of k-diffusion's linear multi-step method, Adams-Bashforth with polynomials in sigma.

        x_t = x_s + sum_k eps_k integral from sigma_s to sigma_t of L_k(sigma) dsigma

    where eps_k are the last ``order`` values of eps and L_k their Lagrange polynomials. It starts with lower orders;
    a step to zero noise is of order 1; k-diffusion takes that step with the full order, which nearly doubles the error
    of 20 steps on a mixture of Gaussians (tests/solvers/test_last_steps.py).

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        order: Number of values of eps in a step, 1 to 4.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    return lms_table(Walk.of(schedule, steps, **common), check_order(order, 4))


def lms_table(walk: Walk, order: int) -> StepTable:
    """Build the rows of `lms` for the levels of a walk."""
    whole = dataclasses.replace(walk, start=0)
    orders = [whole.order(i, order) for i in range(len(walk))]
    if walk.levels[-1].abar_next == 1.0 and not walk.compat:
        orders[-1] = 1
    return _table(walk, "lms", orders, by_log=False)


@checked
def deis(
    schedule: Schedule,
    steps: int | None = None,
    *,
    order: int = 2,
    lower_order_final: bool = True,
    **common: Unpack[Common],
) -> StepTable:
    """Build the table of DEIS, its variant log rho AB (Zhang & Chen 2023, arXiv:2204.13902, table 2).

        x_t = x_s + sum_k eps_k integral from sigma_s to sigma_t of L_k(log sigma) dsigma

    where eps_k are the last ``order`` values of eps and L_k their Lagrange polynomials in log sigma.

    Args:
        schedule: Noise levels that the network was trained with.
        steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an `EDMSchedule`).
        order: Number of values of eps in a step, 1 to 3.
        lower_order_final: Whether a run of fewer than 15 steps ends with orders 2 and 1. A step to zero noise always
            is of order 1.
        **common: Options that all solvers share: spacing, prediction, clip, threshold, steps_offset and final, as in
            `Walk.of`.

    Returns:
        A table of one row a step.

    Raises:
        InvalidArgument: If an option is out of range; the message names its value and what is allowed.
    """
    return deis_table(Walk.of(schedule, steps, **common), check_order(order, 3), lower_order_final)


def deis_table(walk: Walk, order: int, lower_order_final: bool = True) -> StepTable:
    """Build the rows of `deis` for the levels of a walk."""
    n = len(walk)
    lower = lower_order_final and n < FEW
    orders = [walk.order(i, min(order, n - i) if lower else order) for i in range(n)]
    if walk.levels[-1].abar_next == 1.0:
        # log sigma is unbounded in a step to zero noise, where a polynomial through close nodes has huge weights.
        orders[-1] = 1
    return _table(walk, "deis", orders, by_log=True)


def _table(walk: Walk, name: str, orders: Sequence[int], by_log: bool) -> StepTable:
    """Build the rows, each of its own order; ``by_log``: polynomials in log sigma."""
    rows = []
    for i, (level, order) in enumerate(zip(walk.levels, orders, strict=True)):
        if order == 1:  # Euler's step, which is also defined at infinite sigma
            rows.append(walk.row(i, x0=level.a_next, eps=level.s_next, keep="eps"))
            continue
        before = walk.levels[i - order + 1 : i + 1][::-1]
        if by_log:
            weights = log_weights([b.log_sigma for b in before], level.log_sigma_next)
            weights = [level.sigma * w for w in weights]
        else:
            weights = sigma_weights([b.sigma for b in before], level.sigma_next)
        # LMS of a run that starts in the middle has the weights of the whole run for fewer values, as in diffusers.
        eps, *m = (level.a_next * w for w in weights[: max(1, i - walk.start + 1)])
        rows.append(walk.row(i, x=level.a_next / level.a, eps=eps, m=m, keep="eps"))
    return walk.table(name, rows)


def sigma_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Return the integrals from the first node to ``end`` of the Lagrange polynomials of at most 4 nodes, exactly."""
    at = nodes[0] + (end - nodes[0]) * (NODES + 1.0) / 2.0
    half = 0.5 * (end - nodes[0])
    return [float(half * (WEIGHTS * _lagrange(nodes, k, at)).sum()) for k in range(len(nodes))]


def log_weights(nodes: Sequence[float], end: float) -> list[float]:
    """Return the weights of polynomials in u = log sigma, for integrals over sigma in units of the first node's sigma.

        integral from 0 to U of L_k(u) e^u du,     u = log sigma - log sigma_s,  U <= 0

    U is -infinity in a step to zero noise; -60 stands for it, as e^-60 is nothing beside 1. The interval is divided
    into parts so short that the quadrature is exact up to rounding.
    """
    shifted = [node - nodes[0] for node in nodes]
    total = max(end - nodes[0], -60.0)
    edges = np.linspace(0.0, total, max(1, math.ceil(abs(total))) + 1)
    weights = [0.0] * len(nodes)
    for start, stop in itertools.pairwise(edges.tolist()):
        at = start + (stop - start) * (NODES + 1.0) / 2.0
        for k in range(len(nodes)):
            weights[k] += float(0.5 * (stop - start) * (WEIGHTS * _lagrange(shifted, k, at) * np.exp(at)).sum())
    return weights


def _lagrange(nodes: Sequence[float], k: int, at: np.ndarray) -> np.ndarray:
    """Return the values of L_k, which is 1 at nodes[k] and 0 at the other nodes."""
    value = np.ones_like(at)
    for j, node in enumerate(nodes):
        if j != k:
            value = value * (at - node) / (nodes[k] - node)
    return value
