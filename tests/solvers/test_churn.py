"""EDM's stochastic sampler: whole runs against its loop, and the options that say how much noise is added."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from tests.sampler.by_hand import SCHEDULE, SHAPE
from tests.support.trajectories import draw_noise, run
from tests.support.unets import TINY, random_unet

EDM = EDMSchedule()


def network(x: Tensor, t: Tensor) -> Tensor:
    """Evaluate a smooth F of EDM's preconditioning, in float64."""
    t = torch.as_tensor(t, dtype=x.dtype).reshape(-1, 1, 1, 1)
    return torch.tanh(1.3 * x) + 0.4 * torch.sin(t + x)


def denoise(x: Tensor, sigma: float) -> Tensor:
    """Compute D of Karras et al. 2022, eq. 7."""
    total = sigma**2 + EDM.sigma_data**2
    out = network(x / math.sqrt(total), torch.tensor([0.25 * math.log(sigma)], dtype=torch.float64))
    return EDM.sigma_data**2 / total * x + sigma * EDM.sigma_data / math.sqrt(total) * out


def edm_sampler(z: Tensor, steps: int, heun: bool, churn: tuple[float, float, float, float]) -> Tensor:
    """Run the loop of the authors' ``generate.py``, written from the paper's algorithm 2; z: [1 + steps, ...]."""
    s_churn, s_min, s_max, s_noise = churn
    i = np.arange(steps)
    big, small = EDM.sigma_max ** (1 / EDM.rho), EDM.sigma_min ** (1 / EDM.rho)
    levels = [*((big + i / max(steps - 1, 1) * (small - big)) ** EDM.rho).tolist(), 0.0]
    x = z[0] * levels[0]
    for k in range(steps):
        now, after = levels[k], levels[k + 1]
        gamma = min(s_churn / steps, math.sqrt(2) - 1) if s_min <= now <= s_max else 0.0
        hat = now * (1 + gamma)
        x_hat = x + math.sqrt(max(hat**2 - now**2, 0.0)) * s_noise * z[1 + k]
        d = (x_hat - denoise(x_hat, hat)) / hat
        x = x_hat + (after - hat) * d
        if heun and k < steps - 1:
            d_after = (x - denoise(x, after)) / after
            x = x_hat + (after - hat) * (0.5 * d + 0.5 * d_after)
    return x


def ours(table: StepTable, z: Tensor, heun: bool, s_noise: float) -> Tensor:
    """Run the table with the loop's noise: what is added before a step is that of the last row of the step before.

    The noise before the first step is independent of the initial noise, so that their sum is initial noise too.
    """
    steps = len(z) - 1
    last = [2 * k + 1 if heun else k for k in range(steps - 1)]
    noise = torch.zeros((1 + len(table), *z.shape[1:]), dtype=z.dtype)
    hat = EDM.sigma_data * math.sqrt((1 - table.rows[0].abar) / table.rows[0].abar)
    added = s_noise * math.sqrt(max(hat**2 - EDM.sigma_max**2, 0.0))
    noise[0] = (EDM.sigma_max * z[0] + added * z[1]) / math.hypot(EDM.sigma_max, added)
    for k, row in enumerate(last):
        noise[1 + row] = z[2 + k]
    return run([table], network, noise)[-1]


CHURNS = [(0.0, 0.0, math.inf, 1.0), (40.0, 0.05, 50.0, 1.003), (3.0, 0.0, 10.0, 0.9), (1e3, 0.5, 20.0, 1.0)]


@pytest.mark.parametrize("churn", CHURNS)
@pytest.mark.parametrize("name", ["euler", "heun"])
@pytest.mark.parametrize("steps", [2, 5, 18])
def test_whole_runs_are_edms(name: str, steps: int, churn: tuple[float, float, float, float]) -> None:
    table = getattr(solvers, name)(EDM, steps, clip=None, churn=churn)
    z = draw_noise(steps)
    expected = edm_sampler(z, steps, name == "heun", churn)
    assert expected.std() > 0.05
    assert (ours(table, z, name == "heun", churn[3]) - expected).abs().max() < 1e-9
    assert table.stochastic == (churn[0] > 0 and (steps > 2 or churn[1] == 0.0))  # two steps are at 80 and 0.002


def test_noise_before_the_first_step_is_part_of_the_initial_noise() -> None:
    churn = (40.0, 0.0, math.inf, 1.2)
    table = solvers.heun(EDM, 18, churn=churn)
    hat = EDM.sigma_max * (1 + min(40 / 18, math.sqrt(2) - 1))
    variance = EDM.sigma_max**2 + 1.44 * (hat**2 - EDM.sigma_max**2)
    assert table.init_scale == pytest.approx(math.sqrt(variance / (hat**2 + EDM.sigma_data**2)), rel=1e-12)
    assert table.rows[0].abar == pytest.approx(EDM.sigma_data**2 / (hat**2 + EDM.sigma_data**2), rel=1e-12)


def test_a_discrete_schedule_has_no_level_above_its_highest() -> None:
    schedule = NoiseSchedule("linear")
    table = solvers.heun(schedule, 10, churn=40)
    assert table.rows[0].t == 999
    assert table.init_scale == 1.0
    plain = solvers.heun(schedule, 10)
    for i, (row, before) in enumerate(zip(table.rows, plain.rows, strict=True)):
        if i and not row.stage:
            sigma, hat = (math.sqrt((1 - r.abar) / r.abar) for r in (before, row))
            assert hat == pytest.approx(sigma * math.sqrt(2), rel=1e-4)
            assert schedule.abar(row.t) == pytest.approx(row.abar, rel=1e-9)


def test_no_churn_is_the_method_without_it() -> None:
    for build in (solvers.euler, solvers.heun):
        assert build(EDM, 6, churn=0) == build(EDM, 6)
        assert build(EDM, 6, churn=(40, 200, 300, 1)) == build(EDM, 6)  # no level is in the range


@pytest.mark.parametrize(
    "churn", [-1, "40", (1, 2), (1, 2, 3, 4, 5), (1, 0, "a", 1), None, float("nan"), (1, 0, 1, -1), True]
)
def test_churn_that_is_refused(churn: Any) -> None:
    with pytest.raises(InvalidArgument, match="churn="):
        solvers.heun(EDM, 4, churn=churn)


def test_the_sampler_churns() -> None:
    sampler = Sampler(random_unet(TINY), SCHEDULE, backend="eager")
    shape = (1, *SHAPE)
    assert sampler.info.channels == shape[1] or shape[1] != TINY.in_channels
    for solver in ("euler", "heun"):
        plain, churn = (sampler.sample(2, solver=solver, steps=5, churn=c) for c in (None, [40, 0, math.inf, 1.0]))
        assert torch.isfinite(churn.images).all()
        assert not torch.equal(plain.images, churn.images)
        alone = sampler.sample(1, solver=solver, steps=5, churn=40, start_index=1).images
        torch.testing.assert_close(alone, churn.images[1:], rtol=1e-4, atol=1e-4)
    for options, words in (
        ({"solver": "ddim", "churn": 3}, "churn=3 belongs to solver 'euler' or 'heun'"),
        ({"solver": "euler", "compat": "diffusers", "churn": 3}, "has no churn"),
        ({"solver": "euler", "churn": "a lot"}, "churn="),
    ):
        with pytest.raises(InvalidArgument, match=words):
            sampler.request(1, **options)
