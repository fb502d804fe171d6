"""Steps that are as long as their error allows: the accepted ones and the images are k-diffusion's."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.core import noise
from fastdiff.errors import InvalidArgument
from fastdiff.sampler import Sampler, adaptive
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable
from fastdiff.solvers.walk import Walk

SHAPE = (1, 4, 4)


class Smooth(nn.Module):
    """A network that depends smoothly on its input and timestep."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(1.1))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return torch.tanh(self.scale * x) + 0.1 * torch.sin(x + t.to(x.dtype).view(-1, 1, 1, 1) / 300)


def sampler_of(schedule: Any = None) -> Sampler:
    return Sampler(Smooth(), schedule or NoiseSchedule("linear"), backend="eager", shape=SHAPE, dtype="float64")


def their_run(sampler: Sampler, order: int, rtol: float, atol: float, n: int) -> tuple[list[float], Tensor, int]:
    """Run k-diffusion's dpm_solver_adaptive from its published arithmetic: accepted sigmas, x_0 + sigma eps, trials."""
    walk = Walk.of(sampler.schedule, 2, spacing="karras", final="sigma_min")
    scale = walk.data_scale
    start, end = -walk.levels[0].log_sigma, -walk.levels[-1].log_sigma_next
    network = sampler.unet
    between = walk.between
    assert between is not None

    def eps_of(x: Tensor, t: float) -> Tensor:
        sigma = math.exp(-t)
        time = torch.full((n,), between(sigma)[0], dtype=torch.float64)
        out = network(x / math.hypot(sigma, 1.0), time)
        if sampler.prediction == "edm":
            a, s = 1 / math.hypot(sigma, 1.0), sigma / math.hypot(sigma, 1.0)
            return s * (x / math.hypot(sigma, 1.0)) - a * out
        return out

    i = torch.arange(n)
    z = noise.normal(torch.zeros_like(i), i, torch.zeros_like(i), noise.INITIAL, SHAPE).double()
    x = z * walk.init_scale * math.hypot(math.exp(-start), 1.0)
    s, x_prev, h, sigmas, trials = start, x, 0.05, [math.exp(-start)], 0

    def sigma(t: float) -> float:
        return math.exp(-t)

    while s < end - 1e-5:
        t = min(end, s + h)
        step = t - s
        eps = eps_of(x, s)
        r1 = 0.5 if order == 2 else 1 / 3
        s1 = s + r1 * step
        eps1 = eps_of(x - sigma(s1) * math.expm1(r1 * step) * eps, s1)
        two = x - sigma(t) * math.expm1(step) * eps - sigma(t) / (2 * r1) * math.expm1(step) * (eps1 - eps)
        if order == 2:
            low, high = x - sigma(t) * math.expm1(step) * eps, two
        else:
            r2 = 2 / 3
            s2 = s + r2 * step
            u2 = x - sigma(s2) * math.expm1(r2 * step) * eps
            u2 = u2 - sigma(s2) * (r2 / r1) * (math.expm1(r2 * step) / (r2 * step) - 1) * (eps1 - eps)
            eps2 = eps_of(u2, s2)
            high = x - sigma(t) * math.expm1(step) * eps
            high = high - sigma(t) / r2 * (math.expm1(step) / step - 1) * (eps2 - eps)
            low = two
        delta = torch.maximum(torch.tensor(atol), rtol * scale * torch.maximum(low.abs(), x_prev.abs()))
        error = float(torch.linalg.norm(scale * (low - high) / delta)) / math.sqrt(x.numel())
        factor = 1 + math.atan((1 / (error + 1e-8)) ** (1 / order) - 1)
        trials += 1
        if factor >= 0.81:
            x_prev, x, s = low, high, t
            sigmas.append(sigma(t))
        h *= factor
    return sigmas, x, trials


# Next to sigma_max = 80 the error of a step is smaller than float32's rounding, in which k-diffusion runs too.
@pytest.mark.parametrize("schedule", [None, EDMSchedule(0.02, 3.0)], ids=["linear", "edm"])
@pytest.mark.parametrize(("order", "rtol"), [(2, 0.02), (3, 0.05), (3, 0.005)])
def test_steps_and_images_are_k_diffusions(order: int, rtol: float, schedule: Any) -> None:
    sampler = sampler_of(schedule)
    with torch.no_grad():
        sigmas, x, trials = their_run(sampler, order, rtol, 0.0078, 2)
    table = sampler.adapt(2, order=order, rtol=rtol, clip=None)
    levels = [math.sqrt((1 - row.abar) / row.abar) for row in table.rows if not row.stage]
    # The states between steps are float32, whose rounding depends on the processor.
    assert levels == pytest.approx(sigmas, rel=1e-4 if schedule is None else 2e-3)
    assert table.steps == len(sigmas)
    assert len(table) == order * (len(sigmas) - 1) + 1
    assert trials >= len(sigmas) - 1
    before = list(sampler.stream(2, solver=table))[-2].x
    theirs = x / math.hypot(sigmas[-1], 1.0)
    assert (before - theirs).abs().max() < 1e-3 * theirs.std()


def test_smaller_tolerances_take_more_steps_and_err_less() -> None:
    sampler = sampler_of()
    exact = sampler.sample(2, solver="dpmpp_3m", steps=400, spacing="exponential", clip=None).images
    tables = [sampler.adapt(2, rtol=rtol, atol=rtol / 10, clip=None) for rtol in (0.3, 0.03, 0.003)]
    assert [len(t) for t in tables] == sorted({len(t) for t in tables})
    errors = [float((sampler.sample(2, solver=t).images - exact).abs().max() / exact.std()) for t in tables]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.01
    assert StepTable.from_json(tables[0].to_json()) == tables[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"order": 1}, "order=1"),
        ({"rtol": 0.0}, "rtol=0.0"),
        ({"atol": math.nan}, "atol=nan"),
        ({"rtol": 1e-12, "atol": 1e-12}, "larger ones do"),
        ({"solver": "heun"}, "solver= is not for it"),
        ({"steps": 5}, "steps= is not for it"),
        ({"spacing": "karras"}, "spacing= is not for it"),
        ({"image": torch.zeros(SHAPE)}, "image= is not for it"),
        ({"n": 0}, "n=0"),
        ({"speed": 1}, "has no option speed"),
    ],
)
def test_what_is_refused(options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adaptive, "MOST_STEPS", 30)
    with pytest.raises(InvalidArgument) as caught:
        sampler_of().adapt(**options)
    assert words in str(caught.value)
