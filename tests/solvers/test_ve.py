"""The variance-exploding process: orders on a mixture of Gaussians, its predictors, and diffusers' scheduler."""

from __future__ import annotations

import functools
import math

import numpy as np
import pytest
import torch

from fastdiff import solvers
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable, VESchedule, from_config
from fastdiff.solvers.compat import sigmas as compat
from fastdiff.solvers.paths import repaint, starting_at
from fastdiff.solvers.walk import Level, Walk
from tests.support import mixture
from tests.support.mixture import posterior_mean, rms, runge_kutta
from tests.support.orders import every_order
from tests.support.schedulers import float64, scheduler_module

VE = VESchedule(0.02, 20.0)


def network(x: np.ndarray, sigma: float, prediction: str = "score") -> np.ndarray:
    x0 = posterior_mean(x, 1.0, sigma)
    eps = (x - x0) / sigma
    return {"score": -eps / sigma, "epsilon": eps, "sample": x0}[prediction]


@functools.cache
def noise() -> np.ndarray:
    return np.random.default_rng(1).standard_normal(400)


@functools.cache
def exact(start: float, end: float) -> np.ndarray:
    """Integrate dx/dlog sigma = sigma eps from noise at the level ``start``, without any table."""

    def slope(x: np.ndarray, log_sigma: float) -> np.ndarray:
        return x - posterior_mean(x, 1.0, math.exp(log_sigma))

    return runge_kutta(slope, start * noise(), math.log(start), math.log(end))


def walk(steps: int, start: float = 9.0, end: float = 0.1) -> Walk:
    """Equal steps of log sigma between two levels."""
    sigmas = np.exp(np.linspace(math.log(start), math.log(end), steps + 1)).tolist()
    abar = [VE.abar(s) for s in sigmas]
    levels = tuple(Level(s, abar[i], abar[i + 1]) for i, s in enumerate(sigmas[:-1]))
    return Walk(
        levels, "score", math.inf, exploding=True, last_time=end, init_scale=start, between=lambda s: (s, VE.abar(s))
    )


@every_order
def test_order_between_two_levels_on_a_mixture(build, order):
    errors = [rms(mixture.run(build(walk(n)), network, 9.0 * noise()) - exact(9.0, 0.1)) for n in (80, 160, 320)]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - order).max() < 0.2 * order, (errors, slopes)


@pytest.mark.parametrize("name", ["euler", "heun", "ddim", "dpmpp_2m", "unipc", "dpmpp_2s", "dpm2", "lms", "deis"])
def test_whole_runs_end_at_the_data(name):
    """Run 60 steps, from noise of the highest level to an image; predictions of all kinds draw the same."""
    build = getattr(solvers, name)
    drawn = [
        mixture.run(build(VE, 60, clip=None, prediction=p), lambda x, t, p=p: network(x, t, p), 20.0 * noise())
        for p in ("score", "epsilon", "sample")
    ]
    assert rms(drawn[0] - exact(20.0, 1e-3)) < 0.03
    assert drawn[1] == pytest.approx(drawn[0], abs=1e-8)
    assert drawn[2] == pytest.approx(drawn[0], abs=1e-8)


@pytest.mark.parametrize(("variance", "equation"), [("beta", 46), ("posterior", 47)])
def test_predictors_of_the_paper(variance, equation):
    """Song et al. 2021: x' = x + (s_i^2 - s_j^2) score + noise; its variance is that of equation 46 or 47."""
    table = solvers.ddpm(VE, 12, variance=variance, clip=None)
    sigmas = [*table.timesteps, 0.0]
    assert sigmas[0] == pytest.approx(20.0)
    assert sigmas[11] == pytest.approx(0.02)
    assert table.init_scale == pytest.approx(20.0)
    for row, before, after in zip(table.rows, sigmas[:-1], sigmas[1:], strict=True):
        change = before**2 - after**2
        assert row.ax + row.a0 * row.kx == pytest.approx(1.0, abs=1e-9)
        assert row.ao + row.a0 * row.ko == pytest.approx(change, rel=1e-9)
        wanted = change if equation == 46 else after**2 * change / before**2
        assert row.s**2 == pytest.approx(wanted if after else 0.0, rel=1e-9)


@pytest.mark.parametrize("variance", ["beta", "posterior"])
def test_order_of_the_predictors(variance):
    """Without their noise they solve the drift of the reverse SDE, dx/dlog sigma = 2 (x - E[x_0 | x]), in order 1."""

    def slope(x: np.ndarray, log_sigma: float) -> np.ndarray:
        return 2.0 * (x - posterior_mean(x, 1.0, math.exp(log_sigma)))

    wanted = runge_kutta(slope, 20.0 * noise(), math.log(20.0), math.log(1e-3))
    tables = [solvers.ddpm(VE, n, variance=variance, clip=None) for n in (80, 160, 320)]
    errors = [rms(mixture.run(table, network, 20.0 * noise()) - wanted) for table in tables]
    slopes = np.log2(np.array(errors[:-1]) / errors[1:])
    assert np.abs(slopes - 1.0).max() < 0.2, (errors, slopes)


def test_stochastic_solvers_keep_the_variance():
    """Without data, x = sigma eps, the variance after every row is that of its level."""
    for table in (
        solvers.ddpm(VE, 12, clip=None), solvers.euler_ancestral(VE, 12, clip=None),
        solvers.dpmpp_2m_sde(VE, 12, clip=None), solvers.euler(VE, 12, clip=None, churn=4.0),
    ):  # fmt: skip
        variance = table.init_scale**2
        for row in table.rows:
            assert variance == pytest.approx(row.t**2, rel=1e-9)
            variance = (row.ax - row.ao / row.t**2) ** 2 * variance + row.s**2  # x_0 = 0, score = -x / sigma^2
        assert variance == pytest.approx(0.0, abs=1e-12)


def test_a_late_start_repaint_and_json():
    table = solvers.euler(VE, 8, clip=None)
    late = starting_at(table, 3)
    assert late.exploding
    assert late.init_scale == pytest.approx(table.rows[3].t)
    assert table.signal_and_noise(table.rows[3].abar) == pytest.approx((1.0, table.rows[3].t))
    jumps = [row for row in repaint(table, 2, 2).rows if row.abar_next < row.abar]
    assert jumps
    for row in jumps:  # the data keeps its scale, and the noise has the variance of the higher level
        low = next(r for r in table.rows if r.t == row.t)
        (_, before), (_, after) = table.signal_and_noise(low.abar_next), table.signal_and_noise(row.abar_next)
        assert row.s**2 == pytest.approx(after**2 - before**2)
    assert StepTable.from_json(table.to_json()) == table
    assert '"exploding"' not in solvers.euler(NoiseSchedule(), 8).to_json()


def test_levels():
    assert VE.times(4) == pytest.approx([20.0, 2.0, 0.2, 0.02])
    assert VE.times(None)[-1] == pytest.approx(0.02)
    assert len(VE.times(None)) == 50
    karras = VE.times(9, "karras")
    assert (karras[0], karras[-1]) == pytest.approx((20.0, 0.02))
    assert VE.times(None, [3.0, 1.0]) == [3.0, 1.0]
    assert VE.time(VE.sigma(3.0)) == 3.0


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda: solvers.euler(VE, 5, prediction="v_prediction"), "allowed are score, epsilon, sample"),
        (lambda: solvers.euler(NoiseSchedule(), 5, prediction="score"), "needs a VESchedule"),
        (lambda: solvers.euler(EDMSchedule(), 5, prediction="score"), "needs a VESchedule"),
        (lambda: solvers.heun(VE, 5, spacing="trailing"), "a VESchedule has karras, exponential"),
        (lambda: solvers.heun(VE, spacing=[1.0, -1.0]), "is not in"),
        (lambda: solvers.heun(VE, spacing=[1.0, 1.0]), "must fall"),
        (lambda: solvers.heun(VE, 1001), "1 to 1000"),
        (lambda: solvers.ddim_inversion(VE, 5), "VESchedule is not supported"),
        (lambda: solvers.dpmpp_inversion(VE, 5), "VESchedule is not supported"),
        (lambda: solvers.lcm(VE, 4), "NoiseSchedule"),
        (lambda: solvers.consistency(VE, 1), "EDMSchedule"),
        (lambda: VESchedule(2.0, 1.0), "must be less than sigma_max"),
        (lambda: VESchedule(0.0), "sigma_min"),
        (lambda: VESchedule(sigma_max=math.inf), "sigma_max"),
        (lambda: VESchedule(timesteps=0), "timesteps"),
        (lambda: VE.sigma(-1.0), "time"),
    ],
)
def test_what_the_process_does_not_have_is_named(call, said):
    with pytest.raises((InvalidArgument, ConfigError), match=said):
        call()


# diffusers' scheduler -------------------------------------------------------------------------------------------------

CONFIG = {"_class_name": "ScoreSdeVeScheduler", "sigma_max": 50.0, "correct_steps": 0}


def smooth(x: torch.Tensor, sigma: float) -> torch.Tensor:
    return -torch.tanh(x / (1.0 + sigma)) / (sigma + 0.3)


def theirs(config: dict, steps: int, x: torch.Tensor, draws: list[torch.Tensor]) -> list[torch.Tensor]:
    """Run the predictor of diffusers' scheduler in float64; return the samples, of the last step the mean."""
    module, left = scheduler_module("ScoreSdeVeScheduler"), list(draws)
    with float64(module, lambda: left.pop(0)):
        scheduler = module.ScoreSdeVeScheduler(**{k: v for k, v in config.items() if k[0] != "_"})
        scheduler.set_timesteps(steps)
        scheduler.set_sigmas(steps)
        samples = []
        for i, t in enumerate(scheduler.timesteps):
            output = scheduler.step_pred(smooth(x, float(scheduler.sigmas[i])), t, x)
            samples.append(output.prev_sample)
            x = output.prev_sample
        return [*samples[:-1], output.prev_sample_mean]


@pytest.mark.parametrize("steps", [1, 2, 5, 20, 50])
@pytest.mark.parametrize("more", [{}, {"sigma_min": 0.1, "sampling_eps": 1e-3}], ids=["", "other levels"])
def test_the_predictor_is_diffusers(steps, more, monkeypatch):
    monkeypatch.setattr(compat, "PRECISION", "float64")
    generator = torch.Generator().manual_seed(0)
    z, *draws = torch.randn(steps + 1, 2, 3, 4, 4, generator=generator, dtype=torch.float64)
    table = from_config({**CONFIG, **more}, steps)
    assert table.init_scale == 50.0
    x = z * table.init_scale
    for row, noise, expected in zip(table.rows, draws, theirs({**CONFIG, **more}, steps, x, draws), strict=True):
        x = row.ax * x + row.ao * smooth(x, row.t) + row.s * noise
        assert (x - expected).abs().max() < 1e-8 * max(1.0, float(expected.abs().max()))


def test_levels_that_are_looked_up_elsewhere():
    """The last steps of a long run are those of a level above the network's timestep, as in diffusers."""
    from diffusers import ScoreSdeVeScheduler

    scheduler = ScoreSdeVeScheduler(sampling_eps=2e-3)
    scheduler.set_timesteps(1000)
    scheduler.set_sigmas(1000)
    index = (scheduler.timesteps * 999).long()
    assert not torch.equal(index, torch.arange(999, -1, -1))
    levels = scheduler.discrete_sigmas.double()
    change = levels[index] ** 2 - torch.where(index == 0, 0.0, levels[index - 1] ** 2)
    table = from_config({"_class_name": "ScoreSdeVeScheduler", "sampling_eps": 2e-3, "correct_steps": 0}, 1000)
    assert [row.ao for row in table.rows] == pytest.approx(change.tolist(), rel=1e-12)
    assert list(table.timesteps) == pytest.approx(scheduler.sigmas.tolist(), rel=1e-12)


@pytest.mark.parametrize(
    ("config", "said"),
    [
        ({"correct_steps": 1}, "Langevin corrector.*0 is the predictor alone"),
        ({"correct_steps": None}, "Langevin corrector"),  # diffusers' default is one
        ({"sigma_min": 60.0}, "sigma_min"),
        ({"sampling_eps": 2.0}, "sampling_eps"),
        ({"correct_steps": -1}, "correct_steps"),
    ],
)
def test_configurations_that_no_table_has(config, said):
    with pytest.raises(ConfigError, match=said):
        from_config({**CONFIG, **config}, 5)
