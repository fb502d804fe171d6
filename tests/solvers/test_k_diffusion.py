"""Whole runs of the solvers that come from k-diffusion against its loops, in float64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from fastdiff import solvers
from fastdiff.errors import InvalidArgument
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.walk import Walk
from tests.support import k_diffusion
from tests.support.trajectories import SCHEDULES, denoiser, draw_noise, run

LINEAR = SCHEDULES["linear"]


def sigma_of(abar: float) -> float:
    return math.sqrt((1 - abar) / abar)


def theirs(loop, table: StepTable, noise: Tensor, **options: float) -> Tensor:
    """Run k-diffusion's loop at the table's levels, with the network and the noise of `run`."""
    levels = [row for row in table.rows if not row.stage]
    sigmas = [*(sigma_of(row.abar) for row in levels), sigma_of(table.rows[-1].abar_next)]
    times = {sigma_of(row.abar): row.t for row in table.rows}
    eps = denoiser("epsilon")

    def model(x: Tensor, sigma: float) -> Tensor:
        t = min(times.items(), key=lambda entry: abs(entry[0] - sigma))[1]
        return x - sigma * eps(x / math.hypot(sigma, 1.0), torch.tensor([t], dtype=torch.float64))

    rows = itertools.count(1)
    start = noise[0] * table.init_scale * math.hypot(sigmas[0], 1.0)
    return loop(model, start, sigmas, lambda: noise[next(rows)], **options)


CASES = [
    ("dpm_2_ancestral", solvers.dpm2, {"eta": 0.0}),
    ("dpm_2_ancestral", solvers.dpm2_ancestral, {"eta": 1.0}),
    ("dpm_2_ancestral", solvers.dpm2_ancestral, {"eta": 0.4}),
    ("dpmpp_2s_ancestral", solvers.dpmpp_2s_ancestral, {"eta": 1.0}),
    ("dpmpp_2s_ancestral", solvers.dpmpp_2s_ancestral, {"eta": 0.3}),
    ("dpmpp_sde", solvers.dpmpp_sde, {"eta": 1.0}),
    ("dpmpp_sde", solvers.dpmpp_sde, {"eta": 0.5}),
    ("dpmpp_sde", solvers.dpmpp_sde, {"eta": 0.0}),
]


@pytest.mark.parametrize("spacing", ["karras", "trailing"])
@pytest.mark.parametrize("steps", [1, 2, 7, 20])
@pytest.mark.parametrize(("name", "build", "options"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_two_evaluations_a_step(name, build, options, steps, spacing):
    own = {} if build is solvers.dpm2 else options
    table = build(LINEAR, steps, spacing=spacing, clip=None, **own)
    noise = draw_noise(len(table))
    expected = theirs(getattr(k_diffusion, f"sample_{name}"), table, noise, **options)
    assert expected.std() > 0.1
    assert (run([table], denoiser("epsilon"), noise)[-1] - expected).abs().max() < 1e-8


@pytest.mark.parametrize("steps", [1, 2, 3, 8, 20])
def test_dpmpp_3m_sde(steps):
    """k-diffusion's loop takes half of the second derivative and full orders at the end."""
    walk = Walk.of(LINEAR, steps, spacing="karras", clip=None)
    table = dpmpp_table(walk, "dpmpp_3m_sde", 3, "heun", lower_order_final=False, sde=True, authors=True)
    noise = draw_noise(steps)
    expected = theirs(k_diffusion.sample_dpmpp_3m_sde, table, noise)
    assert (run([table], denoiser("epsilon"), noise)[-1] - expected).abs().max() < 1e-8
    whole = solvers.dpmpp_3m_sde(LINEAR, steps, spacing="karras", clip=None, lower_order_final=False)
    difference = (run([whole], denoiser("epsilon"), noise)[-1] - expected).abs().max()
    assert bool(difference > 1e-4) == (steps > 3)


@pytest.mark.parametrize("build", [solvers.dpm2, solvers.dpmpp_sde, solvers.dpmpp_2s_ancestral])
def test_stages_between_the_levels_of_edm(build):
    """The network reads ln(sigma) / 4 of the level between."""
    table = build(EDMSchedule(), 6)
    for first, second in itertools.pairwise(table.rows):
        if second.stage:
            sigma = 0.5 * sigma_of(second.abar)  # sigma_data = 1/2
            assert second.t == pytest.approx(0.25 * math.log(sigma), abs=1e-12)
            assert first.abar < second.abar


def test_they_need_a_finite_sigma():
    for name in ("dpm2", "dpm2_ancestral", "dpmpp_sde", "dpmpp_2s_ancestral"):
        with pytest.raises(InvalidArgument, match=f"{name} cannot start at zero SNR"):
            getattr(solvers, name)(SCHEDULES["zero_snr"], 5, prediction="v_prediction")
