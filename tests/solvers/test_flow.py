"""Flow matching: orders on a mixture of Gaussians with exact velocities, and what `FlowSchedule` allows."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest

from fastdiff import solvers
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import FlowSchedule, StepTable, from_config
from fastdiff.solvers.flow import abar_of
from fastdiff.solvers.paths import repaint, starting_at
from fastdiff.solvers.walk import Level, Walk
from tests.support import mixture
from tests.support.mixture import posterior_mean, rms, runge_kutta
from tests.support.orders import every_order

FLOW = FlowSchedule(shift=2.0)


def network(x: np.ndarray, sigma: float, prediction: str) -> np.ndarray:
    x0 = posterior_mean(x, 1.0 - sigma, sigma)
    eps = (x - (1.0 - sigma) * x0) / sigma
    return {"flow_prediction": eps - x0, "epsilon": eps, "sample": x0}[prediction]


def run(table: StepTable, x: np.ndarray, prediction: str = "flow_prediction") -> np.ndarray:
    return mixture.run(table, lambda x, t: network(x, t / FLOW.timesteps, prediction), x)


@functools.cache
def noise() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(400)


@functools.cache
def exact(start: float = 1.0, end: float = 0.0) -> np.ndarray:
    """Integrate dx/dsigma = v from pure noise by the classical Runge-Kutta method, without any table."""
    x = noise() if start == 1.0 else exact(1.0, start)
    return runge_kutta(lambda x, sigma: network(x, max(sigma, 1e-12), "flow_prediction"), x, start, end)


@pytest.mark.parametrize(("name", "order"), [("euler", 1), ("ddim", 1), ("heun", 2), ("dpmpp_2s", 2)])
def test_order_of_whole_runs_on_a_mixture(name, order):
    """From pure noise to the image, which no multi-step solver reaches in its full order."""
    build = getattr(solvers, name)
    errors = [rms(run(build(FlowSchedule(), n, clip=None), noise()) - exact()) for n in (40, 80, 160)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - order).max() < 0.15 * order, (errors, slopes)


def walk(steps: int, start: float = 0.9, end: float = 0.1) -> Walk:
    """Equal steps of log-SNR between two levels."""
    log_sigma = np.linspace(math.log(start / (1 - start)), math.log(end / (1 - end)), steps + 1)
    sigmas = 1.0 / (1.0 + np.exp(-log_sigma))
    abar = [abar_of(s) for s in sigmas.tolist()]
    levels = tuple(Level(1000.0 * float(s), abar[i], abar[i + 1]) for i, s in enumerate(sigmas[:-1]))
    return Walk(levels, "flow_prediction", math.inf, flow=True, last_time=1000.0 * end, between=between)


def between(sigma: float) -> tuple[float, float]:
    return 1000.0 * sigma / (1.0 + sigma), 1.0 / (1.0 + sigma * sigma)


@every_order
def test_order_between_two_levels_on_a_mixture(build, order):
    """The first steps of multi-step solvers are of a lower order, which costs them as much as one of the whole."""
    errors = [rms(run(build(walk(n)), exact(1.0, 0.9)) - exact(0.9, 0.1)) for n in (80, 160, 320)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - order).max() < 0.2 * order, (errors, slopes)


def test_euler_is_the_velocity_times_the_step():
    table = solvers.euler(FLOW, 7, clip=None)
    assert [row.t for row in table.rows] == pytest.approx([1000 * FLOW.sigma(t) for t in FLOW.times(7)])
    sigmas = [*(row.t / 1000 for row in table.rows), 0.0]
    for row, sigma, after in zip(table.rows, sigmas[:-1], sigmas[1:], strict=True):
        x, out = 0.3, -0.7
        x0 = row.kx * x + row.ko * out
        assert x0 == pytest.approx(x - sigma * out, abs=1e-12)
        assert row.ax * x + row.ao * out + row.a0 * x0 == pytest.approx(x + (after - sigma) * out, abs=1e-12)
        assert table.signal_and_noise(row.abar) == pytest.approx((1.0 - sigma, sigma), abs=1e-12)


@pytest.mark.parametrize("name", ["euler", "heun", "dpmpp_2m", "dpmpp_3m", "unipc", "dpmpp_2s", "lms", "deis", "dpm2"])
def test_predictions_agree(name):
    """From a level below 1, where eps says something of x_0, all predictions draw the same."""
    sigmas = [0.95, 0.8, 0.6, 0.4, 0.2, 0.1]
    build = getattr(solvers, name)
    results = [
        run(build(FLOW, spacing=sigmas, clip=None, prediction=p), noise(), p)
        for p in ("flow_prediction", "epsilon", "sample")
    ]
    assert results[1] == pytest.approx(results[0], abs=1e-9)
    assert results[2] == pytest.approx(results[0], abs=1e-9)


def test_stochastic_solvers_keep_the_variance():
    """Noise of each level is what the flow has there: without data, x has the variance sigma^2 after every row."""
    for build in (solvers.ddpm, solvers.euler_ancestral, solvers.dpmpp_2m_sde):
        table = build(FLOW, 12, clip=None)
        variance = 1.0
        for row in table.rows:
            variance = (row.ax + row.ao / row.t * 1000) ** 2 * variance + row.s**2  # v = eps = x / sigma, x_0 = 0
            sigma = table.signal_and_noise(row.abar_next)[1]
            assert variance == pytest.approx(sigma**2, abs=1e-9)


def test_a_late_start_and_repaint_are_at_levels_of_the_flow():
    table = solvers.euler(FLOW, 8, clip=None)
    late = starting_at(table, 3)
    assert late.flow
    assert late.init_scale == pytest.approx(table.rows[3].t / 1000)
    again = repaint(table, 2, 2)
    jumps = [row for row in again.rows if row.abar_next < row.abar]
    assert jumps
    for row in jumps:  # data of zero: the noise of the level below, and what is added
        before = next(r for r in table.rows if r.t == row.t)
        sigma, after = table.signal_and_noise(before.abar_next)[1], table.signal_and_noise(row.abar_next)[1]
        signal, later = table.signal_and_noise(before.abar_next)[0], table.signal_and_noise(row.abar_next)[0]
        assert (later / signal * sigma) ** 2 + row.s**2 == pytest.approx(after**2)


def test_spacings_and_the_shift():
    assert FlowSchedule().times(4, "trailing") == pytest.approx([1000.0, 750.0, 500.0, 250.0])
    assert FlowSchedule(shift=3.0).times(4, "trailing") == pytest.approx([1000.0, 900.0, 750.0, 500.0])
    assert FlowSchedule().times(3, "linspace") == pytest.approx([1000.0, 500.5, 1.0])
    for spacing in ("karras", "exponential"):
        times = FLOW.times(9, spacing)
        assert times[0] == 1000.0
        assert times[-1] == pytest.approx(2.0 / 1.001)
        assert all(a > b for a, b in itertools.pairwise(times))
    assert len(FLOW.times(None)) == 28


def test_a_table_of_a_flow_survives_json():
    table = solvers.heun(FLOW, 5)
    assert StepTable.from_json(table.to_json()) == table
    assert '"flow"' not in solvers.heun(NoiseSchedule(), 5).to_json()


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: solvers.euler(FLOW, 5, prediction="v_prediction"), "allowed are flow_prediction, epsilon, sample"),
        (lambda: solvers.euler(NoiseSchedule(), 5, prediction="flow_prediction"), "needs a FlowSchedule"),
        (lambda: solvers.euler(solvers.EDMSchedule(), 5, prediction="flow_prediction"), "needs a FlowSchedule"),
        (lambda: solvers.euler(FLOW, 5, churn=3.0), "churn"),
        (lambda: solvers.heun(FLOW, 5, spacing="leading"), "trailing, linspace, karras, exponential"),
        (lambda: solvers.euler(FLOW, 5, prediction="epsilon"), "zero SNR"),
        (lambda: solvers.ddim_inversion(FLOW, 5), "FlowSchedule is not supported"),
        (lambda: solvers.dpmpp_inversion(FLOW, 5), "FlowSchedule is not supported"),
        (lambda: solvers.dpm2(FLOW, 5), "zero SNR"),
        (lambda: solvers.lcm(FLOW, 4), "NoiseSchedule"),
        (lambda: solvers.tcd(FLOW, 4), "NoiseSchedule"),
        (lambda: solvers.consistency(FLOW, 1), "EDMSchedule"),
        (lambda: solvers.euler(FLOW, spacing=[1.2, 0.5]), "at most at 1"),
        (lambda: solvers.euler(FLOW, spacing=[0.5, 0.5]), "must fall"),
        (lambda: solvers.euler(FLOW, 1001), "1 to 1000"),
        (lambda: FlowSchedule(shift=0.0), "shift"),
        (lambda: FlowSchedule(shift=math.nan), "shift"),
        (lambda: FlowSchedule(timesteps=0), "timesteps"),
    ],
)
def test_what_a_flow_does_not_have_is_named(call, said):
    with pytest.raises((InvalidArgument, ConfigError), match=said):
        call()


EULER, HEUN = "FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler"


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        ({"_class_name": EULER, "use_dynamic_shifting": True}, {}, "needs mu="),
        ({"_class_name": EULER, "use_karras_sigmas": True, "use_beta_sigmas": True}, {}, "one spacing by sigma"),
        ({"_class_name": EULER, "invert_sigmas": True, "stochastic_sampling": True}, {}, "invert_sigmas"),
        (
            {"_class_name": EULER, "time_shift_type": "odd", "use_dynamic_shifting": True},
            {"mu": 0.5},
            "time_shift_type",
        ),
        ({"_class_name": EULER, "shift_terminal": 1.5}, {}, "shift_terminal"),
        ({"_class_name": EULER, "shift": -1.0}, {}, "shift"),
        ({"_class_name": EULER}, {"sigmas": [1.5, 0.5]}, "at most at 1"),
        ({"_class_name": EULER}, {"sigmas": [0.9, 0.5], "timesteps": [900.0]}, "as many of both"),
        ({"_class_name": HEUN}, {"sigmas": [0.9, 0.5]}, "takes no sigmas="),
        ({"_class_name": "UniPCMultistepScheduler"}, {"sigmas": [0.9, 0.5]}, "use_flow_sigmas=True"),
        ({"_class_name": "DDIMScheduler"}, {"mu": 0.5}, "mu is an option"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, {"mu": 0.5}, "use_dynamic_shifting"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "use_karras_sigmas": True},
            {},
            "use_karras_sigmas",
        ),
        (
            {"_class_name": "UniPCMultistepScheduler", "use_flow_sigmas": True, "prediction_type": "v_prediction"},
            {},
            "prediction_type",
        ),
    ],
)
def test_what_diffusers_schedulers_of_flows_do_not_have_is_named(config, options, said):
    steps = None if {"sigmas", "timesteps"} & set(options) else 5
    with pytest.raises((InvalidArgument, ConfigError), match=said):
        from_config(config, steps, **options)


def test_two_stage_rows_read_states_of_the_flow():
    """With noise alone (x_0 = 0, v = eps) a state stays sigma times the noise, in the stages too."""
    for build in (solvers.heun, solvers.dpmpp_2s, solvers.dpm2):
        table = build(FLOW, spacing=[0.9, 0.7, 0.4, 0.15], clip=None)
        x, xs, m1 = 0.9, 0.0, 0.0
        for row in table.rows:
            assert x == pytest.approx(row.t / 1000, abs=1e-9)
            out = 1.0
            x0 = row.kx * x + row.ko * out
            h = row.hx * x + row.ho * out + row.h0 * x0
            new = row.ax * x + row.ao * out + row.a0 * x0 + row.a1 * m1 + row.as_ * xs
            xs, m1, x = (x if row.save else xs), (h if row.push else m1), new
        assert dataclasses.replace(table).flow
