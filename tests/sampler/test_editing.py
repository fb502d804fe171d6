"""Editing: img2img, inpainting, RePaint, inversion, interpolation, guides. Closed forms, diffusers, every backend."""

from __future__ import annotations

import itertools
import math
import re
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import RePaintScheduler
from diffusers.schedulers import scheduling_repaint
from torch import Tensor, nn

import fastdiff
from fastdiff import solvers
from fastdiff.backends import native
from fastdiff.core import noise
from fastdiff.errors import BackendError, CallbackError, Cancelled, FastdiffError, InvalidArgument
from fastdiff.sampler import Sampler, editing
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.paths import late_start, looks_back
from tests.support.paths import ROOT
from tests.support.unets import TINY, TINY_CLASSES, random_unet, relative_error

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
SHAPE = (3, 8, 8)
MASK = torch.zeros(8, 8)
MASK[2:6, 1:5] = 1
BACKENDS = ["eager", pytest.param("native", marks=pytest.mark.skipif(native.extension() is None, reason="not built"))]
needs_native = BACKENDS[1].marks


def images(n: int = 3, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    return torch.rand((n, *shape), generator=torch.Generator().manual_seed(9)) * 2 - 1


def sampler_of(backend: str = "eager", **options: Any) -> Sampler:
    return Sampler(random_unet(TINY), SCHEDULE, backend=backend, **options)


def philox(n: int, seed: int, row: int, stream: int, shape: tuple[int, int, int] = SHAPE) -> Tensor:
    index = torch.arange(n)
    return noise.normal(torch.full_like(index, seed), index, torch.full_like(index, row), stream, shape)


class Gaussian(nn.Module):
    """Network with the exact epsilon for data N(mean, covariance) over the elements of one small image."""

    def __init__(self, mean: Tensor, covariance: Tensor):
        super().__init__()
        self.mean, self.covariance = mean.double(), covariance.double()
        self.abar = torch.from_numpy(SCHEDULE.alphas_cumprod.copy())

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        abar = self.abar[t.long()[0]]
        marginal = abar * self.covariance + (1 - abar) * torch.eye(len(self.mean))
        centred = x.double().flatten(1) - abar.sqrt() * self.mean
        return ((1 - abar).sqrt() * torch.linalg.solve(marginal, centred.T).T).view_as(x).to(x.dtype)


# img2img --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["ddim", "ddpm", "dpmpp_2m", "heun", "unipc", "plms"])
def test_img2img_is_the_later_part_of_a_run(backend: str, solver: str) -> None:
    """The run begins with the noised image; a multi-step solver begins there without history."""
    sampler, image = sampler_of(backend), images()
    out = sampler.sample(3, solver=solver, steps=10, image=image, strength=0.4, seed=4, clip=None)
    full = getattr(solvers, solver)(SCHEDULE, 10, clip=None)
    start = late_start(full, 0.4)
    later = [row.t for row in full.rows[start:] if not row.stage]
    assert (len(later), out.table.steps) == (4, 4)
    table = getattr(solvers, solver)(SCHEDULE, spacing=later, clip=None)
    assert out.table.rows == table.rows
    assert looks_back(full, start) == (solver in ("dpmpp_2m", "unipc", "plms"))
    if not looks_back(full, start):
        assert table.rows == full.rows[start:]
    abar = table.rows[0].abar
    x = math.sqrt(abar) * image + math.sqrt(1 - abar) * philox(3, 4, 0, noise.INITIAL)
    expected = Sampler(sampler.unet, SCHEDULE, backend="eager", dtype="float64")
    assert relative_error(out.images, expected.sample(3, solver=table, noise=x, seed=4).images) <= 2e-4


def test_img2img_of_full_strength_is_a_plain_run_from_the_noised_image() -> None:
    sampler, image = sampler_of(), images()
    out = sampler.sample(3, steps=5, image=image, strength=1.0, seed=4)
    abar = float(SCHEDULE.alphas_cumprod[-1])
    z = math.sqrt(abar) * image + math.sqrt(1 - abar) * philox(3, 4, 0, noise.INITIAL)
    assert out.table == sampler.sample(1, steps=5).table
    assert torch.allclose(out.images, sampler.sample(3, steps=5, noise=z).images, atol=1e-5)


def test_img2img_keeps_more_of_the_image_the_less_strength() -> None:
    sampler, image = sampler_of(), images()
    far = [
        float((sampler.sample(3, steps=50, image=image, strength=s).images - image).norm()) for s in (0.02, 0.2, 0.8)
    ]
    assert far == sorted(far)
    assert far[0] < 0.1 * far[2]
    default = sampler.sample(3, steps=50, image=image).images
    assert torch.equal(default, sampler.sample(3, steps=50, image=image, strength=0.8).images)


def test_img2img_of_an_edm_network() -> None:
    schedule = solvers.EDMSchedule()
    sampler, image = Sampler(random_unet(TINY), schedule, backend="eager", dtype="float64"), images()
    for solver in ("heun", "dpmpp_2m"):
        out = sampler.sample(3, solver=solver, steps=8, image=image, strength=0.5, clip=None)
        full = getattr(solvers, solver)(schedule, 8, clip=None)
        sigma = schedule.sigma([row.t for row in full.rows if not row.stage][4])
        assert out.table.rows[0].abar == pytest.approx(0.25 / (0.25 + sigma**2))
        z = (image + sigma * philox(3, 0, 0, noise.INITIAL)) / math.hypot(0.5, sigma)
        expected = sampler.sample(3, solver=out.table, noise=z / out.table.init_scale).images
        assert relative_error(out.images, expected) <= 1e-5


# Inpainting -----------------------------------------------------------------------------------------------------------


INPAINTED: list[dict[str, Any]] = [
    {}, {"solver": "ddpm"}, {"solver": "heun"}, {"solver": "dpmpp_2m"}, {"repaint": (2, 3), "solver": "ddpm"},
    {"strength": 0.5}, {"eta": 1.0, "repaint": (1, 2)}, {"solver": "heun", "repaint": (2, 2)},
]  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [pytest.param(options, marks=[pytest.mark.slow] * (i in (1, 2, 6))) for i, options in enumerate(INPAINTED)],
    ids=str,
)
def test_known_pixels_are_the_images(backend: str, options: dict[str, Any]) -> None:
    sampler, image = sampler_of(backend), images(5)
    out = sampler.sample(5, steps=6, image=image, mask=MASK, batch_size=2, **options)
    known = (MASK == 0).expand_as(image)
    assert torch.equal(out.images[known], image[known])
    assert (out.images - image)[~known].abs().mean() > 0.05
    reference = Sampler(sampler.unet, SCHEDULE, backend="eager", dtype="float64")
    expected = reference.sample(5, steps=6, image=image, mask=MASK.bool(), **options).images
    assert relative_error(out.images, expected) <= 2e-4


def test_masked_replacement_by_hand() -> None:
    """After every row, x is the solver's where the mask is 1, and q(x_p | image) with noise of stream 2 elsewhere."""
    sampler, image, mask = sampler_of(), images(2), (images(2)[:, :1] > 0)
    events = list(sampler.stream(2, solver="ddpm", steps=4, image=image, mask=mask, seed=6))
    table = sampler.sample(1, solver="ddpm", steps=4).table
    assert len(events) == 4
    for row, event in zip(table.rows, events, strict=True):
        a, s = math.sqrt(row.abar_next), math.sqrt(1 - row.abar_next)
        known = a * image + s * philox(2, 6, event.row, noise.MASK)
        where = (~mask).expand_as(image)
        assert torch.allclose(event.x[where], known[where], atol=1e-6)
        assert (event.x - known)[~where].abs().mean() > 0.05
    whole = sampler.sample(2, solver="ddpm", steps=4, image=image, mask=torch.ones(2, 3, 8, 8), seed=6)
    assert torch.equal(whole.images, sampler.sample(2, solver="ddpm", steps=4, seed=6).images)


@pytest.mark.parametrize(("steps", "jump", "times"), [(10, 2, 3), (7, 3, 2), (5, 1, 2), (4, 5, 4), (25, 10, 10)])
def test_repaint_goes_the_way_of_the_paper(steps: int, jump: int, times: int) -> None:
    """Compare timesteps with RePaintScheduler's pairs; here a jump of several steps up is part of the row before."""
    theirs = RePaintScheduler(num_train_timesteps=100)
    theirs.set_timesteps(steps, jump_length=jump, jump_n_sample=times)
    t = [*theirs.timesteps.tolist(), -1]
    down = [a for a, b in itertools.pairwise(t) if b < a]  # where the network is evaluated
    table = solvers.repaint(solvers.ddpm(SCHEDULE, steps, spacing="leading"), jump, times)
    assert list(table.timesteps) == down
    assert len(table) == steps + (times - 1) * jump * ((steps - 1) // jump)
    assert solvers.StepTable.from_json(table.to_json()) == table
    assert solvers.repaint(table_of := solvers.ddim(SCHEDULE, steps), jump, 1).rows == table_of.rows


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_repaint_is_diffusers(monkeypatch: pytest.MonkeyPatch, eta: float) -> None:
    """Compare a run with RePaintScheduler's step and undo_step, in the paper's order (time pairs): diffusers' pipeline
    starts every jump a step lower, and undo_step takes the right betas only where every timestep is a step.

    Jumps add one noise here and one per timestep there, so the noise is zero: their variance is held to the forward
    process below.
    """
    schedule = NoiseSchedule("linear", 10, beta_end=0.5)
    theirs = RePaintScheduler(num_train_timesteps=10, beta_start=1e-4, beta_end=0.5, eta=eta)
    theirs.set_timesteps(10, jump_length=3, jump_n_sample=2)
    monkeypatch.setattr(scheduling_repaint, "randn_tensor", lambda shape, **_: torch.zeros(shape))
    unet, image = random_unet(TINY), images(2)
    x = z = philox(2, 0, 0, noise.INITIAL)
    with torch.no_grad():
        for t, after in itertools.pairwise([*theirs.timesteps.tolist(), -1]):
            if after < t:
                out = unet(x, torch.full((2,), float(t)))
                x = theirs.step(out, t, x, image, (1 - MASK).expand_as(x)).prev_sample
            else:
                x = theirs.undo_step(x, t + 1)
                # What is known is replaced at every level of a jump too, or rather after it: its mean there.
                x = torch.where(MASK == 1, x, theirs.alphas_cumprod[after] ** 0.5 * image)
    table = solvers.ddim(schedule, 10, eta=eta, eps_from="output")
    monkeypatch.setattr(noise, "normal", lambda seed, *_: torch.zeros(len(seed), *SHAPE))
    ours = Sampler(unet, schedule, backend="eager").sample(
        2, solver=table, image=image, mask=MASK, repaint=(3, 2), noise=lambda row, _: z * (row is None)
    )
    assert relative_error(ours.images, x) <= 2e-5


def test_a_jump_keeps_the_marginal() -> None:
    """A row after a jump still ends at N(a x_0, s^2 I), with a and s of the level that the jump leads to."""
    table = solvers.ddpm(SCHEDULE, 10, clip=None)
    jumped = solvers.repaint(table, 2, 2)
    i = next(i for i, row in enumerate(jumped.rows) if row.abar_next < row.abar)
    plain, row = table.rows[i], jumped.rows[i]
    r = row.abar_next / plain.abar_next
    assert row.s**2 == pytest.approx(r * plain.s**2 + 1 - r)
    assert row.a0 == pytest.approx(math.sqrt(r) * plain.a0)
    assert 1 - row.abar_next == pytest.approx(r * (1 - plain.abar_next) + 1 - r)


@pytest.mark.slow
def test_repaint_comes_near_the_conditional() -> None:
    """Two Gaussian pixels of correlation rho, one known: the other has mean m + rho (k - m), variance 1 - rho^2.

    Replacement alone is biased towards the prior, which is why RePaint exists; its own bias (0.08 with 50 steps, 0.03
    with 100) goes as steps and resamples grow.
    """
    rho, mean, value, n = 0.9, torch.tensor([0.1, -0.2]), 0.9, 3000
    unet = Gaussian(mean, 0.25 * torch.tensor([[1.0, rho], [rho, 1.0]]))
    sampler = Sampler(unet, SCHEDULE, backend="eager", shape=(1, 1, 2))
    image, mask = torch.tensor([[[value, 0.0]]]), torch.tensor([[0, 1]])
    options: dict[str, Any] = {"solver": "ddpm", "steps": 100, "clip": None, "image": image, "mask": mask}
    expected = -0.2 + rho * (value - 0.1), 0.5 * math.sqrt(1 - rho**2)

    def moments(**more: Any) -> tuple[float, float]:
        x = sampler.sample(n, **options, **more, batch_size=n).images[:, 0, 0, 1]
        return float(x.mean()), float(x.std())

    got, plain = moments(repaint=(5, 10)), moments()
    assert abs(got[0] - expected[0]) <= 0.045  # of which 0.016 is chance
    assert got[1] == pytest.approx(expected[1], rel=0.12)
    assert abs(plain[0] - expected[0]) > 0.2


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "lms", "deis", "plms"])
def test_multi_step_solvers_are_not_resampled(solver: str) -> None:
    with pytest.raises(InvalidArgument, match=f"cannot resample {solver}, a multi-step solver; ddpm, ddim"):
        sampler_of().sample(1, solver=solver, steps=6, image=images(1), mask=MASK, repaint=(2, 2))


# One image, whatever the batch ----------------------------------------------------------------------------------------

EDITS: list[dict[str, Any]] = [
    {"strength": 0.5},
    {"mask": MASK, "solver": "ddpm"},
    {"mask": MASK, "solver": "ddpm", "repaint": (2, 2)},
    {"strength": 0.7, "guide": lambda x0, _: -(x0**2).flatten(1).sum(1)},
]


@pytest.mark.skipif(native.extension() is None, reason="not built")
@pytest.mark.parametrize("options", EDITS, ids="-".join)
def test_edits_are_bitwise_the_same_in_any_batch(options: dict[str, Any]) -> None:
    sampler, image = sampler_of("native", determinism="bitwise"), images(7)
    run = {"steps": 6, "seed": 3, **options}
    whole = sampler.sample(7, image=image, **run).images
    assert torch.equal(sampler.sample(7, image=image, batch_size=3, **run).images, whole)
    assert torch.equal(sampler.sample(2, image=image[4:6], start_index=4, **run).images, whole[4:6])


@pytest.mark.parametrize("options", EDITS, ids="-".join)
def test_compiled_and_eager_agree(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the compiled backend with a torch.compile that changes nothing: edits do not depend on the runner."""
    monkeypatch.setattr(torch, "compile", lambda network, **_: network)
    run = {"steps": 4, "image": images(), **options}
    assert torch.equal(sampler_of("compiled").sample(3, **run).images, sampler_of().sample(3, **run).images)


def test_events_cancel_and_errors_while_editing() -> None:
    sampler = sampler_of()
    run: dict[str, Any] = {"steps": 4, "solver": "ddpm", "image": images(3), "mask": MASK, "repaint": (1, 2)}
    expected = sampler.sample(3, **run)
    events = list(sampler.stream(3, batch_size=2, **run))
    assert [e.row for e in events] == [*range(len(expected.table))] * 2
    assert torch.equal(torch.cat([e.x for e in events if e.row == e.rows - 1]), expected.images)

    def fail(event: Any) -> None:
        raise ZeroDivisionError

    with pytest.raises(CallbackError, match="at row 0 of 7"):
        sampler.sample(3, callback=fail, **run)
    with pytest.raises(Cancelled):
        sampler.sample(3, callback=lambda _: sampler.cancel(), **run)
    assert torch.equal(sampler.sample(3, **run).images, expected.images)


# Inversion and interpolation ------------------------------------------------------------------------------------------


def test_inversion_is_ddim_upwards() -> None:
    """With Gaussian data the exact network scales x in every row, and iterations converge to the inverse of a step."""
    unet = Gaussian(torch.zeros(2), 0.25 * torch.eye(2))
    sampler = Sampler(unet, SCHEDULE, backend="eager", shape=(1, 1, 2))
    x = torch.tensor([[[[0.7, -0.4]]]])
    errors = []
    for iterations in (1, 2, 4, 30):
        z = sampler.invert(x, steps=10, iterations=iterations)
        errors.append(float((sampler.sample(1, steps=10, noise=z, clip=None).images - x).abs().max()))
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.01
    assert errors[-1] <= 1e-5
    by_steps = []
    for steps in (10, 20, 40):
        z = sampler.invert(x, steps=steps)
        by_steps.append(float((sampler.sample(1, steps=steps, noise=z, clip=None).images - x).abs().max()))
    assert by_steps[2] < 0.5 * by_steps[0]


@pytest.mark.parametrize(
    ("solver", "least", "largest"), [("dpmpp_1", 0.8, 0.1), ("dpmpp_2m", 1.7, 0.02), ("dpmpp_3m", 0.8, 1e-3)]
)
def test_inversion_by_dpm_solver_converges(solver: str, least: float, largest: float) -> None:
    """The run there and back by a solver of order p misses the image by steps to the power -p.

    With order 3 the rest is that the image is taken to have the lowest noise level.
    """
    sampler = Sampler(
        Gaussian(torch.zeros(2), 0.25 * torch.eye(2)), SCHEDULE, backend="eager", shape=(1, 1, 2), dtype="float64"
    )
    x = torch.tensor([[[[0.7, -0.4]]]])
    errors = []
    for steps in (16, 32):
        z = sampler.invert(x, steps=steps, solver=solver, spacing="exponential")
        back = sampler.sample(1, steps=steps, solver=solver, spacing="exponential", noise=z, clip=None).images
        errors.append(float((back - x).abs().max()))
    assert math.log2(errors[0] / errors[1]) >= least, errors
    assert errors[1] < largest


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction", "edm"])
def test_inversion_rows_undo_ddims(prediction: str) -> None:
    """For any output of the network, the inverse row leads from the x_p that ddim makes of x_t back to x_t."""
    schedule = solvers.EDMSchedule() if prediction == "edm" else SCHEDULE
    down = solvers.ddim(schedule, 8, prediction=prediction, clip=None)
    up = solvers.ddim_inversion(schedule, 8, prediction=prediction, iterations=2)
    assert [row.t for row in up.rows[::2]] == [row.t for row in reversed(down.rows)]
    assert up.init_scale == down.init_scale
    for row, first, again in zip(reversed(down.rows), up.rows[::2], up.rows[1::2], strict=True):
        x, out = 0.3, -0.8
        x0 = row.kx * x + row.ko * out
        scale = down.data_scale if row is down.rows[-1] else 1.0
        below = (row.ax * x + row.ao * out + row.a0 * x0) / scale
        assert again.as_ * below + again.ax * x + again.ao * out == pytest.approx(x, abs=1e-9)
        assert first.ax * below + first.ao * out == pytest.approx(again.as_ * below + again.ax * below + again.ao * out)
        assert again.kx * x + again.ko * out == pytest.approx(x0)


@pytest.mark.parametrize("config", [{"set_alpha_to_one": False}, {"timestep_spacing": "leading", "steps_offset": 1}])
def test_inversion_follows_the_models_scheduler(config: dict[str, Any]) -> None:
    sampler = Sampler(random_unet(TINY), SCHEDULE, backend="eager", dtype="float64", scheduler_config=config)
    image = images(1)
    z = sampler.invert(image, steps=50, iterations=3)
    back = sampler.sample(1, steps=50, noise=z, clip=None).images
    once = sampler.sample(1, steps=50, noise=sampler.invert(image, steps=50), clip=None).images
    assert relative_error(back, image) <= 0.3 * relative_error(once, image) or relative_error(back, image) < 1e-3


def test_inversion_of_the_built_in_model_and_back() -> None:
    """The PSNR of the round trip in 50 steps is above 45 dB with three evaluations per step, below 30 dB with one."""
    sampler = fastdiff.Sampler.from_pretrained("fashion-mnist", device="cpu")
    labels = [0, 9]
    image = sampler.sample(2, steps=20, labels=labels, guidance=1.5).images
    psnr = {}
    for iterations in (1, 3):
        z = sampler.invert(image, steps=50, iterations=iterations, spacing="exponential", labels=labels)
        back = sampler.sample(2, steps=50, spacing="exponential", noise=z, labels=labels, clip=None).images
        psnr[iterations] = 10 * math.log10(4 / float((back - image).square().mean()))
        assert 0.5 < z.std() < 1.1
    assert psnr[3] >= 45, psnr
    assert 20 <= psnr[1] < 30, psnr


@pytest.mark.parametrize("backend", BACKENDS)
def test_interpolation(backend: str) -> None:
    """The bound allows for rounding by another batch size, multiplied by 1 / sqrt(abar_t) = 13 in the first step."""
    sampler = sampler_of(backend)
    bound = 3e-5
    out = sampler.interpolate(5, (3, 8), steps=4, start_index=2)
    for i, seed in ((0, 3), (-1, 8)):
        assert torch.allclose(out.images[i], sampler.sample(1, steps=4, seed=seed, start_index=2).images[0], atol=bound)
    z = philox(2, 0, 0, noise.INITIAL)
    again = sampler.interpolate(5, (z[0], z[1]), steps=4)
    a, b = z.double()
    theta = math.acos(float((a * b).sum() / (a.norm() * b.norm())))
    way = [(math.sin((1 - w) * theta) * a + math.sin(w * theta) * b) / math.sin(theta) for w in np.linspace(0, 1, 5)]
    expected = sampler.sample(5, steps=4, noise=torch.stack(way).float()).images
    assert torch.allclose(again.images, expected, atol=bound)
    lengths = torch.stack(way).flatten(1).norm(dim=1)
    assert lengths.min() > 0.95 * min(lengths[0], lengths[-1])


def test_slerp_at_its_ends() -> None:
    z = philox(2, 0, 0, noise.INITIAL)
    way = editing.slerp(z[0], z[1], 3)
    assert torch.equal(way[0], z[0])
    assert torch.equal(way[2], z[1])
    assert torch.allclose(editing.slerp(z[0], z[0], 3), z[:1].expand(3, *SHAPE))
    assert editing.slerp(z[0], torch.zeros(SHAPE), 3).isfinite().all()


# Classifier guidance --------------------------------------------------------------------------------------------------


def test_guides_by_hand() -> None:
    """x0 becomes x0 + s^2 / a g, with g through the network or with dx0/dx_t = a, for every kind of prediction."""
    target = images(2)

    def log_p(x0: Tensor, indices: range) -> Tensor:
        return -3 * (x0 - target[indices.start : indices.stop]).square().flatten(1).sum(1)

    for prediction in ("epsilon", "sample", "v_prediction"):
        sampler = Sampler(random_unet(TINY), SCHEDULE, backend="eager", dtype="float64", prediction=prediction)
        for through in ("x0", "network"):
            run = {"steps": 3, "clip": None, "guide": log_p, "guide_through": through}
            event = next(iter(sampler.stream(2, batch_size=1, **run)))
            table = sampler.sample(1, steps=3, clip=None).table
            row = table.rows[0]
            x = philox(2, 0, 0, noise.INITIAL)[:1].requires_grad_()
            x0 = row.kx * x + row.ko * sampler.unet.double()(x.double(), torch.tensor([row.t]))
            if through == "network":
                (g,) = torch.autograd.grad(log_p(x0, range(1)).sum(), x)
                shift = (1 - row.abar) / math.sqrt(row.abar) * g
            else:
                shift = (1 - row.abar) * -6 * (x0 - target[:1])
            assert relative_error(event.x0, (x0 + shift)) <= 1e-5
            sampler.unet.float()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_guide_leads_every_backend(backend: str) -> None:
    sampler = sampler_of(backend)

    def bright(x0: Tensor, indices: range) -> Tensor:
        return 2.0 * x0.flatten(1).sum(1)

    plain, led = sampler.sample(3, steps=10).images, sampler.sample(3, steps=10, guide=bright, batch_size=2).images
    assert led.mean() > plain.mean() + 0.2
    with torch.inference_mode():
        assert torch.allclose(sampler.sample(3, steps=10, guide=bright).images, led, atol=1e-4)
    if backend == "eager":
        through = {"guide": bright, "guide_through": "network"}
        assert sampler.sample(3, steps=10, **through).images.mean() > plain.mean() + 0.1
        with torch.inference_mode():
            sampler.sample(1, steps=2, **through)


def test_a_guide_with_gaussian_data_gives_the_posterior() -> None:
    """Data N(0, I), y = x0 + noise of variance 1: the posterior is N(y/2, 1/2), and dx0/dx = a is exact.

    The guide log p(y | x0) at the mean alone leaves out x0's own variance, which shrinks as the run ends; the exact
    likelihood of y given x_t has variance 1 + s^2. With that, the mean is y/2.
    """
    unet = Gaussian(torch.zeros(1), torch.eye(1))
    sampler = Sampler(unet, SCHEDULE, backend="eager", shape=(1, 1, 1))
    y, n, rows = 1.5, 4000, iter(solvers.ddpm(SCHEDULE, 100, clip=None).rows)

    def log_p(x0: Tensor, indices: range) -> Tensor:
        return (-0.5 * (y - x0) ** 2 / (2.0 - next(rows).abar)).flatten(1).sum(1)

    x = sampler.sample(n, solver="ddpm", steps=100, clip=None, guide=log_p, batch_size=n).images
    assert float(x.mean()) == pytest.approx(y / 2, abs=0.06)
    assert float(x.var()) == pytest.approx(0.5, abs=0.06)


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_gradients_through_the_network_are_eagers(backend: str) -> None:
    with pytest.raises(BackendError, match=r"backend 'native' has no gradients.*backend='eager'.*'x0'"):
        sampler_of(backend).sample(1, guide=lambda x0, _: x0.sum((1, 2, 3)), guide_through="network")


def raises(x0: Tensor, indices: range) -> Tensor:
    raise ZeroDivisionError("by hand")


@pytest.mark.parametrize(
    ("guide", "error", "words"),
    [
        (raises, CallbackError, "the guide raised ZeroDivisionError at row 0 of 4: by hand"),
        (lambda x0, _: x0.sum(), InvalidArgument, r"a tensor \(\) at row 0 of 4; log p of each image is needed"),
        (lambda x0, _: 3.0, InvalidArgument, "gave a float at row 0 of 4"),
        (lambda x0, _: x0.detach().sum((1, 2, 3)), InvalidArgument, "does not depend on x0, or was detached"),
        (lambda x0, _: torch.zeros(3, requires_grad=True), InvalidArgument, "does not depend on x0"),
    ],
)
def test_bad_guides(guide: Any, error: type[FastdiffError], words: str) -> None:
    sampler = sampler_of()
    for through in ("x0", "network"):
        with pytest.raises(error, match=words):
            sampler.sample(3, steps=4, guide=guide, guide_through=through)
    assert sampler.sample(3, steps=2).images.isfinite().all()


def test_a_guide_may_use_the_sampler() -> None:
    sampler = sampler_of()

    def likes(x0: Tensor, indices: range) -> Tensor:
        return -(x0 - sampler.sample(1, steps=1).images).square().flatten(1).sum(1)

    assert sampler.sample(2, steps=2, guide=likes).images.isfinite().all()


@pytest.mark.parametrize("solver", ["dpmpp_2m", "unipc", "heun", "euler", "lms", "deis", "plms", "dpmpp_3m"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_classifier_free_guidance_with_every_solver(backend: str, solver: str) -> None:
    """Scale, interval and rescale agree with the eager backend in float64, and have an effect."""
    unet = random_unet(TINY_CLASSES)
    run: dict[str, Any] = {"solver": solver, "steps": 6, "labels": [0, 1, 3]}
    guided = {"guidance": [2.0, 1.0, 3.0], "guidance_interval": (0.2, 0.9), "guidance_rescale": 0.7}
    sampler = Sampler(unet, SCHEDULE, backend=backend)
    out = sampler.sample(3, **run, **guided)
    exact = Sampler(unet, SCHEDULE, backend="eager", dtype="float64").sample(3, **run, **guided)
    assert relative_error(out.images, exact.images) <= 5e-4
    assert (out.images - sampler.sample(3, **run).images)[[0, 2]].abs().amax((1, 2, 3)).min() > 1e-2
    assert len(out.table) < out.nfe < 2 * len(out.table)


@pytest.mark.slow
def test_the_examples_of_the_documentation() -> None:
    """Run the blocks of docs/editing.md after the first, on a sampler that notes what each call returned."""
    text = (ROOT / "docs" / "editing.md").read_text(encoding="utf-8")
    _, *examples = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    code = "\n".join(examples)
    sampler = fastdiff.Sampler.from_pretrained("fashion-mnist", device="cpu")
    given = []

    class Noting:
        def __getattr__(self, name: str) -> Any:
            if name in ("unet", "schedule"):
                return getattr(sampler, name)

            def call(*args: Any, **options: Any) -> Any:
                given.append(getattr(sampler, name)(*args, **options))
                return given[-1]

            return call

    out = sampler.sample(1, steps=20, labels=9)
    exec(code, {"sampler": Noting(), "out": out, "torch": torch, "fastdiff": fastdiff})
    img2img, inpainted, latents, back, way, led = given
    assert len(img2img.table) == 30
    assert torch.equal(inpainted.images[:, :, 16:], out.images[:, :, 16:].expand(4, -1, -1, -1))
    assert latents.shape == out.images.shape
    assert 10 * math.log10(4 / float((back.images - out.images).square().mean())) > 38
    assert len(way.images) == 8
    assert led.images.mean() > sampler.sample(4, labels=9).images.mean()


# Bad input ------------------------------------------------------------------------------------------------------------

X = images(3)
BAD: list[tuple[dict[str, Any], str]] = [
    ({"image": "a.png"}, "image is a str"),
    ({"image": (X * 127).to(torch.uint8)}, r"torch.uint8; a tensor of floats.*x / 127.5 - 1"),
    ({"image": X[:2]}, r"\(2, 3, 8, 8\); \(3, 3, H, W\)"),
    ({"image": X[:, :1]}, r"\(3, 1, 8, 8\)"),
    ({"image": X[0, 0]}, r"image has shape \(8, 8\)"),
    ({"image": X[:, :, :0]}, "image has shape"),
    ({"image": X[:, :, :7]}, "size=7x8: both must be multiples"),
    ({"image": X, "size": 16}, "size=16, but image is 8x8"),
    ({"image": X * math.nan}, "NaN"),
    ({"image": X * 255}, "x0 is bounded to 1 here"),
    *[({"image": X, "strength": s}, r"strength=.*above 0, at most 1") for s in (0, -0.5, 1.1, math.nan, "x", True)],
    ({"image": X, "strength": 0.05, "steps": 10}, r"strength=0.05 of 10 steps is less than one"),
    ({"strength": 0.5}, "strength needs image="),
    ({"mask": MASK}, "mask needs image="),
    ({"image": X, "mask": "a.png"}, "mask is a str"),
    ({"image": X, "mask": MASK[:4]}, r"mask has shape \(4, 8\); \(8, 8\), or \(3, 1 or 3, 8, 8\)"),
    ({"image": X, "mask": torch.ones(2, 1, 8, 8)}, "mask has shape"),
    ({"image": X, "mask": torch.ones(1, 1, 1, 8, 8)}, "mask has shape"),
    ({"image": X, "mask": 0.5 * MASK}, "other than 0"),
    ({"image": X, "mask": MASK * math.nan}, "other than 0"),
    ({"image": X, "mask": 0 * MASK}, "0 everywhere"),
    ({"repaint": (2, 2)}, "needs image= and mask="),
    ({"image": X, "repaint": (2, 2)}, "needs image= and mask="),
    *[({"image": X, "mask": MASK, "repaint": r}, r"repaint=.*\(jump_length, resamples\)") for r in (3, (1,), "ab1")],
    ({"image": X, "mask": MASK, "repaint": (0, 2)}, "jump_length=0"),
    ({"image": X, "mask": MASK, "repaint": (2, 1.5)}, "resamples=1.5"),
    ({"guide": 3}, "guide is a int"),
    ({"guide": raises, "guide_through": "eyes"}, "guide_through='eyes' is unknown; allowed: x0, network"),
    ({"guide_through": "network"}, "needs guide="),
    (
        {"image": X, "strength": 0.5, "solver": solvers.dpmpp_2m(SCHEDULE, 6)},
        "this dpmpp_2m table cannot start at row 3",
    ),
]


@pytest.mark.parametrize(
    ("options", "words"), BAD, ids=lambda value: value if isinstance(value, str) else "-".join(value)
)
def test_bad_edits(options: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = sampler_of()

    def heavy(*_: Any) -> None:
        raise AssertionError("something ran before the arguments were checked")

    sampler.unet.register_forward_pre_hook(heavy)
    for call in (sampler.sample, sampler.stream):
        with pytest.raises(InvalidArgument, match=words) as caught:
            call(3, **options)
        assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s: s.invert("a.png"), "image is a str"),
        (lambda s: s.invert(X, iterations=0), "iterations=0"),
        (lambda s: s.invert(X, solver="unipc"), "solver='unipc' is unknown; allowed: ddim, dpmpp_1, dpmpp_2m, dpm"),
        (lambda s: s.invert(X, solver="dpmpp_2m", iterations=2), "takes one evaluation a step"),
        (lambda s: s.invert(X, solver="dpmpp_2m", steps=1, spacing=[0]), "leads nowhere"),
        (lambda s: s.invert(X, steps=101), "steps=101"),
        (lambda s: s.invert(X[:0]), "image has shape"),
        (lambda s: s.interpolate(3, (1,)), "two ends"),
        (lambda s: s.interpolate(3, 5), "two ends"),
        (lambda s: s.interpolate(3, (1, -1)), "seed must be"),
        (lambda s: s.interpolate(3, (1, "x")), "seed must be"),
        (lambda s: s.interpolate(3, (1, X)), r"between: noise of torch.float32 \(3, 3, 8, 8\)"),
        (lambda s: s.interpolate(3, (1, X[0] * math.inf)), "between: noise"),
        (lambda s: s.interpolate(0, (1, 2)), "n=0"),
        (lambda s: s.interpolate(3, (1, 2), noise=X), "noise cannot be given"),
        (lambda s: s.interpolate(3, (1, 2), stepz=1), "interpolate has no option stepz"),
        (lambda s: solvers.ddim_inversion(NoiseSchedule(rescale_zero_terminal_snr=True), 4, prediction="v_prediction"),
         "zero SNR"),
        (lambda s: solvers.repaint(solvers.ddpm(SCHEDULE, 4, variance="learned_range"), 1, 2), "learned_range"),
    ],
)  # fmt: skip
def test_bad_inversions_and_interpolations(call: Any, words: str) -> None:
    with pytest.raises(InvalidArgument, match=words):
        call(sampler_of())
