"""Orders of convergence on a mixture of Gaussians, whose best prediction is not linear in the sample.

Without noise a run is compared with the probability flow, without the noise of its rows with the drift of the reverse
SDE, and with noise between its steps with the flow between the same noise.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable

import numpy as np
import pytest

from fastdiff import solvers
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.adams import deis_table, lms_table
from fastdiff.solvers.adaptive import dpm_table
from fastdiff.solvers.churn import churned
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
from tests.support import mixture
from tests.support.mixture import posterior_mean, rms, runge_kutta

# Levels sigma between which runs go. Near the first, x_0 hardly depends on x, so that the first steps of multi-step
# solvers, whose orders are lower, cost nothing that shows.
START, END = 400.0, 0.2
Build = Callable[[Walk], StepTable]


def level_of(t: float) -> float:
    """Return abar at a timestep of `walk`, which is 1000 sqrt(1 - abar)."""
    return 1.0 - (t / 1000.0) ** 2


def time_of(sigma: float) -> float:
    return 1000.0 * sigma / math.hypot(sigma, 1.0)


def walk(steps: int, start: float = START, end: float = END) -> Walk:
    """Equal steps of log sigma between two levels."""
    sigmas = np.exp(np.linspace(math.log(start), math.log(end), steps + 1)).tolist()
    abar = [1.0 / (1.0 + s * s) for s in sigmas]
    levels = tuple(Level(time_of(s), abar[i], abar[i + 1]) for i, s in enumerate(sigmas[:-1]))
    return Walk(
        levels, "v_prediction", math.inf, last_time=time_of(end),
        between=lambda sigma: (time_of(sigma), 1.0 / (1.0 + sigma * sigma)),
    )  # fmt: skip


def network(x: np.ndarray, abar: float) -> np.ndarray:
    """Return the exact v of the mixture."""
    a, s = math.sqrt(abar), math.sqrt(1.0 - abar)
    x0 = posterior_mean(x, a, s)
    return a * (x - a * x0) / s - s * x0


def drift(x: np.ndarray, start: float, end: float, factor: float = 1.0, fine: float = 0.1) -> np.ndarray:
    """Integrate dx/dlog sigma = factor (x - E[x_0 | x]), x = x_0 + sigma eps: the flow, or for 2 the SDE's drift."""

    def slope(x: np.ndarray, log_sigma: float) -> np.ndarray:
        return factor * (x - posterior_mean(x, 1.0, math.exp(log_sigma)))

    span = math.log(start / end)
    return runge_kutta(slope, x, math.log(start), math.log(end), n=max(2, math.ceil(abs(span) / fine)))


@functools.cache
def points(n: int = 100) -> np.ndarray:
    return np.random.default_rng(1).standard_normal(n)


@functools.cache
def exact(start: float, end: float, factor: float) -> np.ndarray:
    return drift(start * points(), start, end, factor, fine=0.01)


def check_order(errors: list[float], order: float, band: float = 0.2) -> None:
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - order).max() < band * order, (errors, slopes)


def errors_without_noise(build: Build, factor: float, start: float = START, end: float = END) -> list[float]:
    errors = []
    for n in (66, 132, 264):  # groups of dpmpp_2s and dpmpp_3s
        table = build(walk(n, start, end))
        first, last = table.rows[0].abar, table.rows[-1].abar_next
        x = mixture.run(table, lambda x, t: network(x, level_of(t)), math.sqrt(first) * start * points())
        errors.append(rms(x / math.sqrt(last) - exact(start, end, factor)))
    return errors


FLOW: dict[str, tuple[Build, int]] = {
    "ddim": (lambda w: ddim_table(w, 0.0, "clipped"), 1),
    "euler": (lambda w: euler_table(w, "euler", 0.0), 1),
    "heun": (heun_table, 2),
    "dpm2": (lambda w: dpm2_table(w, "dpm2", 0.0), 2),
    "dpmpp_2m": (lambda w: dpmpp_table(w, "dpmpp_2m", 2, lower_order_final=False), 2),
    "dpmpp_3m": (lambda w: dpmpp_table(w, "dpmpp_3m", 3, "heun", lower_order_final=False), 3),
    "dpmpp_2s": (lambda w: singlestep_table(w, "dpmpp_2s", orders(w, 2), "midpoint"), 2),
    "dpmpp_2s, heun": (lambda w: singlestep_table(w, "dpmpp_2s", orders(w, 2), "heun"), 2),
    "dpmpp_3s": (lambda w: singlestep_table(w, "dpmpp_3s", orders(w, 3), "heun"), 3),
    "dpmpp_sde, eta 0": (lambda w: dpmpp_sde_table(w, 0.0), 2),
    "dpmpp_2s_ancestral, eta 0": (lambda w: dpmpp_2s_ancestral_table(w, 0.0), 2),
    "dpm_adaptive, order 2": (lambda w: dpm_table(w, 2), 2),
    "dpm_adaptive, order 3": (lambda w: dpm_table(w, 3), 3),
    "unipc": (lambda w: unipc_table(w, 2, "bh2", lower_order_final=False), 3),
    "deis 3": (lambda w: deis_table(w, 3, False), 3),
    "lms 4": (lambda w: lms_table(w, 4), 4),
    "plms": (plms_table, 2),
}


@pytest.mark.parametrize("name", FLOW)
def test_order_of_the_flow(name):
    build, order = FLOW[name]
    check_order(errors_without_noise(build, 1.0), order)


SDE: dict[str, tuple[Build, int]] = {
    "dpmpp_sde": (lambda w: dpmpp_sde_table(w, 1.0), 2),
    "dpmpp_2m_sde": (lambda w: dpmpp_table(w, "sde", 2, lower_order_final=False, sde=True), 2),
    "dpmpp_2m_sde, heun": (lambda w: dpmpp_table(w, "sde", 2, "heun", lower_order_final=False, sde=True), 2),
    "dpmpp_3m_sde": (lambda w: dpmpp_table(w, "sde", 3, "heun", lower_order_final=False, sde=True), 3),
    "dpmpp_3m_sde as k-diffusion has it": (
        lambda w: dpmpp_table(w, "sde", 3, "heun", lower_order_final=False, sde=True, authors=True),
        2,
    ),
}


@pytest.mark.parametrize("name", SDE)
def test_order_of_the_drift_of_the_reverse_sde(name):
    """Without the noise of their rows these solve dx/dlog sigma = 2 (x - x_0), in the order of their formulas."""
    build, order = SDE[name]
    check_order(errors_without_noise(build, 2.0, 9.0, 0.1), order)


def beside_the_flow(table: StepTable, level: Callable[[float], float]) -> float:
    """Return the distance of a run from one whose steps are the flow's, with the same noise after each step.

    A step that adds noise S z leads by the flow to the level with the variance 1 - abar - S^2.
    """
    draws = np.random.default_rng(2)
    sigma = [math.sqrt((1.0 - row.abar) / row.abar) for row in table.rows]
    x = sigma[0] * points() * math.sqrt(table.rows[0].abar)
    y, begin = x / math.sqrt(table.rows[0].abar), 0
    for i, row in enumerate(table.rows):
        if i + 1 < len(table) and table.rows[i + 1].stage:
            assert row.s == 0.0
            continue
        part = StepTable("step", 1, table.rows[begin : i + 1], ascending=True, continuous=True)
        x = mixture.run(part, lambda x, t: network(x, level(t)), x)
        a, z = math.sqrt(row.abar_next), draws.standard_normal(100)
        down = math.sqrt(max(0.0, 1.0 - row.abar_next - row.s**2)) / a
        y = drift(y, sigma[begin], max(down, 1e-3), fine=0.2) + row.s / a * z
        x, begin = x + row.s * z, i + 1
    return rms(x / math.sqrt(table.rows[-1].abar_next) - y)


BETWEEN_NOISE: dict[str, tuple[Build, int]] = {
    "euler_ancestral": (lambda w: euler_table(w, "euler_ancestral", 1.0), 1),
    "dpm2_ancestral": (lambda w: dpm2_table(w, "dpm2_ancestral", 1.0), 2),
    "dpm2_ancestral, eta 0.4": (lambda w: dpm2_table(w, "dpm2_ancestral", 0.4), 2),
    "dpmpp_2s_ancestral": (lambda w: dpmpp_2s_ancestral_table(w, 1.0), 2),
    "dpmpp_2s_ancestral, eta 0.4": (lambda w: dpmpp_2s_ancestral_table(w, 0.4), 2),
    "euler, churn": (lambda w: euler_table(churned(w, 3.0), "euler", 0.0), 1),
    "heun, churn": (lambda w: heun_table(churned(w, 3.0)), 2),
}


@pytest.mark.parametrize("name", BETWEEN_NOISE)
def test_order_between_the_noise_of_steps(name):
    """Steps that end with fresh noise are those of the flow to less noise, in the order of their formulas."""
    build, order = BETWEEN_NOISE[name]
    tables = [build(walk(n)) for n in (40, 80, 160)]
    assert all(table.stochastic for table in tables)
    check_order([beside_the_flow(table, level_of) for table in tables], order)


def test_order_of_tcd():
    """With an exact network a trajectory consistency function is a step of DDIM, of order 1.

    With eta above 0 steps go down to (1 - eta) p, so that more steps are not shorter ones.
    """
    schedule = NoiseSchedule()
    tables = [solvers.tcd(schedule, n, eta=0.0, original_steps=1000, prediction="v_prediction") for n in (20, 40, 80)]
    check_order([beside_the_flow(table, schedule.abar) for table in tables], 1, 0.3)


NOISY: dict[str, Build] = {name: build for name, (build, _) in {**SDE, **BETWEEN_NOISE}.items()}


@pytest.mark.slow
@pytest.mark.parametrize("name", NOISY)
def test_noise_leads_to_the_mixture(name):
    """Samples of the mixture at a high level become samples of it at a low one, by their characteristic functions."""
    draws = np.random.default_rng(3)
    table, n = NOISY[name](walk(120)), 10_000
    first, last = table.rows[0].abar, table.rows[-1].abar_next
    chosen = draws.choice(3, n, p=mixture.WEIGHT)
    data = mixture.MEAN[chosen] + mixture.DEVIATION[chosen] * draws.standard_normal(n)
    x = math.sqrt(first) * data + math.sqrt(1.0 - first) * draws.standard_normal(n)
    x = mixture.run(table, lambda x, t: network(x, level_of(t)), x, draws)
    for k in (1.0, 2.0, 4.0):
        wave = np.exp(1j * k * mixture.MEAN - 0.5 * k * k * (mixture.DEVIATION**2 + (1.0 - last) / last))
        assert abs(np.exp(1j * k * x / math.sqrt(last)).mean() - (mixture.WEIGHT * wave).sum()) < 0.03, k


# Inversion: from an image to noise. -----------------------------------------------------------------------------------


def edm(sigma_min: float) -> EDMSchedule:
    return EDMSchedule(sigma_min, 20.0, sigma_data=1.0)


def edm_level(t: float) -> float:
    return 1.0 / (1.0 + math.exp(8.0 * t))  # sigma = e^(4 t)


def inverted(table: StepTable, x: np.ndarray) -> np.ndarray:
    state = mixture.run(table, lambda x, t: network(x, edm_level(t)), x)
    return state / math.sqrt(table.rows[-1].abar_next)


def test_order_of_the_inversion_of_ddim():
    image = 0.8 * points()
    wanted = drift(image, 1e-3, 20.0, fine=0.01)
    tables = [solvers.ddim_inversion(edm(1e-3), n, prediction="v_prediction") for n in (40, 80, 160)]
    check_order([rms(inverted(table, image) - wanted) for table in tables], 1)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_order_of_the_inversion_of_dpmpp(order):
    image = 0.8 * points()
    wanted = drift(image, 0.002, 20.0, fine=0.02)
    errors = []
    for n in (80, 160, 320):
        table = solvers.dpmpp_inversion(edm(0.002), n, order=order, prediction="v_prediction", spacing="exponential")
        errors.append(rms(inverted(table, image * math.sqrt(edm_level(table.rows[0].t))) - wanted))
    check_order(errors, order)


# Spacings ------------------------------------------------------------------------------------------------------------


def errors_of_spacing(spacing: str, order: int) -> list[float]:
    """Return the errors of DPM-Solver++ with a spacing of diffusers, whose network is evaluated at a row's own level.

    diffusers rounds the timesteps to whole numbers.
    """
    config = {
        "_class_name": "DPMSolverMultistepScheduler", spacing: True, "final_sigmas_type": "sigma_min",
        "prediction_type": "v_prediction", "lower_order_final": False, "solver_order": order,
    }  # fmt: skip
    errors = []
    for n in (30, 60, 120):
        table = solvers.from_config(config, n)
        first, last = (math.sqrt((1.0 - abar) / abar) for abar in (table.rows[0].abar, table.rows[-1].abar_next))
        x = mixture.run(table, network, first * points() * math.sqrt(table.rows[0].abar), at="abar")
        errors.append(rms(x / math.sqrt(table.rows[-1].abar_next) - drift(first * points(), first, last)))
    return errors


@pytest.mark.parametrize("spacing", ["use_lu_lambdas", "use_karras_sigmas", "use_exponential_sigmas"])
def test_order_with_spacings_by_sigma(spacing):
    check_order(errors_of_spacing(spacing, 2), 2)


@pytest.mark.parametrize("spacing", ["use_lu_lambdas", "use_beta_sigmas"])
def test_order_1_with_newer_spacings(spacing):
    """The last step of use_beta_sigmas is several times as long as the one before, which suits no higher order."""
    check_order(errors_of_spacing(spacing, 1), 1, 0.3)
