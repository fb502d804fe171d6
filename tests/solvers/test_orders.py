"""Orders of convergence: each solver's error on Gaussian data with the exact network, over part of the log-SNRs.

The probability flow takes N(a mu, V), V = a^2 var + s^2, to the same at the end, so the end's mean and spread are
known. The interval starts where x_0 hardly depends on x yet: there the first steps of multi-step solvers, whose orders
are lower, cost nothing that shows.
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastdiff.solvers import StepTable
from fastdiff.solvers.adams import deis_table, lms_table
from fastdiff.solvers.ddim import ddim_table
from fastdiff.solvers.dpm2 import dpm2_table
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.dpmpp_stages import dpmpp_2s_ancestral_table, dpmpp_sde_table
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.heun import heun_table
from fastdiff.solvers.plms import plms_table
from fastdiff.solvers.singlestep import orders, singlestep_table
from fastdiff.solvers.unipc import unipc_table
from fastdiff.solvers.walk import Level, Walk
from tests.support.solver_grid import ORDERS
from tests.support.trajectories import gaussian_moments

MU, VAR = np.array([-0.6, 0.0, 0.4, 0.9]), np.array([0.02, 1.5, 0.3, 0.05])
ALL = range(10_000)


def walk(steps: int, prediction: str = "v_prediction") -> Walk:
    """Equal steps of lambda from -6 to 1.5; abar = 1 / (1 + e^(-2 lambda))."""
    abar = (1 / (1 + np.exp(-2 * np.linspace(-6, 1.5, steps + 1)))).tolist()
    levels = tuple(Level(float(steps - i), abar[i], abar[i + 1]) for i in range(steps))
    return Walk(levels, prediction, math.inf, between=lambda sigma: (0.5, 1 / (1 + sigma * sigma)))


def multistep(order: int, **options: object):
    return lambda w: dpmpp_table(w, "dpmpp", order, lower_order_final=False, **options)


def unipc(order: int, *options: object):
    return lambda w: unipc_table(w, order, *(options or ("bh2",)), lower_order_final=False)


# (the table over a walk, the order, by how much the measured one may differ)
SOLVERS = {
    "ddim": (lambda w: ddim_table(w, 0.0, "clipped"), 1, 0.05),
    "euler": (lambda w: euler_table(w, "euler", 0.0), 1, 0.05),
    "euler_ancestral": (lambda w: euler_table(w, "euler_ancestral", 1.0), 1, 0.05),
    "dpmpp_1": (multistep(1), 1, 0.05),
    "dpmpp_2m": (multistep(2), 2, 0.1),
    "dpmpp_2m, heun": (multistep(2, solver_type="heun"), 2, 0.1),
    "dpmpp_2m_sde": (multistep(2, sde=True), 2, 0.1),
    "dpmpp_3m": (multistep(3), 3, 0.2),
    "dpmpp_3m as its authors have it": (multistep(3, authors=True), 2, 0.15),
    "dpmpp_3m_sde": (multistep(3, sde=True), 2, 0.3),
    "dpmpp_3m_sde as k-diffusion has it": (multistep(3, sde=True, authors=True), 2, 0.25),
    "dpmpp_2s": (lambda w: singlestep_table(w, "dpmpp_2s", orders(w, 2), "midpoint"), 2, 0.1),
    "dpmpp_2s, heun": (lambda w: singlestep_table(w, "dpmpp_2s", orders(w, 2), "heun"), 2, 0.1),
    "dpmpp_3s": (lambda w: singlestep_table(w, "dpmpp_3s", orders(w, 3), "heun"), 3, 0.2),
    "dpmpp_sde": (lambda w: dpmpp_sde_table(w, 1.0), 2, 0.25),
    "dpmpp_2s_ancestral": (lambda w: dpmpp_2s_ancestral_table(w, 1.0), 2, 0.1),
    "dpm2": (lambda w: dpm2_table(w, "dpm2", 0.0), 2, 0.1),
    "dpm2_ancestral": (lambda w: dpm2_table(w, "dpm2_ancestral", 1.0), 2, 0.1),
    "unipc 1": (unipc(1), 2, 0.1),
    "unipc 2": (unipc(2), 3, 0.1),
    "unipc 3": (unipc(3), 4, 0.2),
    "unipc 3, bh1": (unipc(3, "bh1"), 4, 0.2),
    "unipc 1, uncorrected": (unipc(1, "bh2", ALL), 1, 0.05),
    "unipc 2, uncorrected": (unipc(2, "bh2", ALL), 2, 0.1),
    "unipc 3, uncorrected": (unipc(3, "bh2", ALL), 3, 0.2),
    "heun": (heun_table, 2, 0.1),
    "plms": (plms_table, 2, 0.1),
    "deis 1": (lambda w: deis_table(w, 1, False), 1, 0.05),
    "deis 2": (lambda w: deis_table(w, 2, False), 2, 0.1),
    "deis 3": (lambda w: deis_table(w, 3, False), 3, 0.1),
    "lms 1": (lambda w: lms_table(w, 1), 1, 0.05),
    "lms 2": (lambda w: lms_table(w, 2), 2, 0.1),
    "lms 3": (lambda w: lms_table(w, 3), 3, 0.2),
    "lms 4": (lambda w: lms_table(w, 4), 4, 0.3),
}


def error(table: StepTable, prediction: str = "v_prediction") -> float:
    mean, var = gaussian_moments(table, MU, VAR, prediction)
    abar = table.rows[-1].abar_next
    assert np.abs(mean - math.sqrt(abar) * MU).max() < 1e-9
    return float(np.abs(np.sqrt(var) - np.sqrt(abar * VAR + 1 - abar)).max())


@pytest.mark.parametrize("name", SOLVERS)
def test_order_of_convergence(name):
    build, order, band = SOLVERS[name]
    errors = [error(build(walk(n))) for n in (66, 132, 264)]  # groups of dpmpp_2s and dpmpp_3s
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - order).max() < band, (errors, slopes)
    assert errors[-1] < 0.02


@pytest.mark.parametrize("name", SOLVERS)
def test_predictions_draw_the_same_gaussian(name):
    """All predictions give the same moments up to rounding, which epsilon and edm amplify by e^6."""
    build = SOLVERS[name][0]
    results = [gaussian_moments(build(walk(16, p)), MU, VAR, p) for p in ("sample", "v_prediction", "epsilon")]
    for mean, var in results[1:]:
        assert mean == pytest.approx(results[0][0], abs=1e-8)
        assert var == pytest.approx(results[0][1], abs=1e-8)


def test_a_wrong_coefficient_costs_the_order():
    """1 % in every weight of the newest history entry leaves an error that does not fall with the steps."""
    errors = []
    for n in (64, 128, 256):
        table = multistep(2)(walk(n))
        rows = tuple(row._replace(a1=1.01 * row.a1) for row in table.rows)
        errors.append(error_of_rows(table, rows))
    assert np.log2(errors[0] / errors[2]) < 1.0


def error_of_rows(table: StepTable, rows: tuple) -> float:
    changed = StepTable("changed", table.steps, rows)
    mean, var = gaussian_moments(changed, 0 * MU, VAR, "v_prediction")
    assert np.abs(mean).max() == 0.0
    abar = rows[-1].abar_next
    return float(np.abs(np.sqrt(var) - np.sqrt(abar * VAR + 1 - abar)).max())


def test_the_page_lists_them_all():
    listed = " ".join(ORDERS)
    for name in SOLVERS:
        assert name.split()[0].rstrip(",") in listed
