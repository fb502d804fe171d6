"""Tables that amplify beyond any use and images beyond any size are found, and ordinary ones are not."""

from __future__ import annotations

import logging
import math

import pytest
import torch

from fastdiff import solvers
from fastdiff.errors import InvalidArgument, NumericsError
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.gain import LARGEST, amplification
from fastdiff.solvers.table import Row, StepTable
from tests.sampler.by_hand import SHAPE, sampler_of

DEGENERATE = {
    "large betas": NoiseSchedule("custom", betas=[0.9999] * 8),
    "a last level next to zero": NoiseSchedule("custom", betas=[0.1, 0.1, 1 - 1e-15, 1 - 1e-15]),
}


@pytest.mark.parametrize("schedule", DEGENERATE.values(), ids=DEGENERATE.keys())
@pytest.mark.parametrize("name", ["ddim", "ddpm", "dpmpp_2m", "euler", "unipc"])
def test_degenerate_tables_are_refused(schedule, name):
    with pytest.raises(InvalidArgument, match=r"multiplies noise by \S+, and float32's rounding with it"):
        getattr(solvers, name)(schedule, schedule.timesteps, clip=None)
    assert solvers.ddim(schedule, schedule.timesteps, clip=1.0)  # a bound of x0 keeps the images sane


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_extreme_but_usual_tables_are_built(prediction):
    for schedule in (NoiseSchedule("cosine"), NoiseSchedule("cosine", 4000)):
        for name in ("ddim", "dpmpp_3m", "unipc", "heun", "deis", "lms", "plms"):
            table = getattr(solvers, name)(schedule, 20, prediction=prediction, clip=None)
            assert 0.5 < amplification(table.rows, table.init_scale) < 1e6 < LARGEST


def test_the_amplification_is_that_of_runs():
    """Compare with the standard deviation of many runs whose outputs are white noise."""
    torch.manual_seed(0)
    for table in (solvers.ddim(NoiseSchedule(), 6, clip=None), solvers.dpmpp_2m(NoiseSchedule(), 6, clip=None)):
        x = torch.randn(200_000, dtype=torch.float64) * table.init_scale
        m1, most = torch.zeros_like(x), 1.0
        for row in table.rows:
            out = torch.randn_like(x)
            x0 = row.kx * x + row.ko * out
            h = row.hx * x + row.ho * out + row.h0 * x0
            x = row.ax * x + row.ao * out + row.a0 * x0 + row.a1 * m1
            m1 = h if row.push else m1
            most = max(most, float(x.std()))
        assert amplification(table.rows, table.init_scale) == pytest.approx(most, rel=0.02)


def growing(factor: float) -> StepTable:
    """Return a table of one row that multiplies its input."""
    return StepTable("growing", 1, (Row(t=1.0, abar=0.5, abar_next=1.0, kx=1.0, ko=0.0, ax=factor),))


def test_images_beyond_any_size_are_named():
    noise = torch.zeros(3, *SHAPE)
    noise[1, 0, 0, 0] = -5.0
    with pytest.raises(NumericsError, match=r"1 of 3 images grew beyond any image, to 5e\+06 in .*index 8") as caught:
        sampler_of().sample(3, solver=growing(1e6), noise=noise, start_index=7)
    assert caught.value.images == (8,)
    assert float(caught.value.output.images[0].abs().max()) == 0.0


def test_suspicious_images_are_a_warning(caplog):
    noise = torch.zeros(2, *SHAPE)
    noise[1, 0, 0, 0] = 5.0
    with caplog.at_level(logging.WARNING, "fastdiff"):
        sampler_of().sample(2, solver=growing(1000.0), noise=noise)
        assert "images [1] have values up to 5e+03" in caplog.text
        caplog.clear()
        sampler_of().sample(2, solver=growing(100.0), noise=noise)
        assert not caplog.records


def test_infinite_images_are_still_named():
    noise = torch.zeros(2, *SHAPE)
    noise[0] = math.inf
    with pytest.raises(NumericsError, match="1 of 2 images became NaN or infinite in"):
        sampler_of().sample(2, solver=growing(1.0), noise=noise)
