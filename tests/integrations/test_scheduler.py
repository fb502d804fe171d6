"""`fastdiff.Scheduler` against diffusers' schedulers in plain loops, step by step, from equal generators."""

from __future__ import annotations

import copy
import dataclasses
import functools
import inspect
import json
import math

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, HeunDiscreteScheduler, UniPCMultistepScheduler
from diffusers.utils.torch_utils import randn_tensor

import fastdiff
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.integrations.scheduler import Scheduler, randn
from tests.solvers.test_solver_grid import network
from tests.support.schedulers import Brownian, scheduler_module
from tests.support.solver_grid import GRID

pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own
SHAPE = (2, 3, 4, 4)


def seeded(seed=3):
    return torch.Generator().manual_seed(seed)


MADE = {}


def theirs_of(config):
    """Return a new scheduler of a configuration, a copy, as some take long to make."""
    key = repr(sorted(config.items()))
    if key not in MADE:
        scheduler = getattr(scheduler_module(config["_class_name"]), config["_class_name"])
        MADE[key] = scheduler(**{k: v for k, v in config.items() if k[0] != "_"})
    return copy.deepcopy(MADE[key])


def difference(a, b):
    return float((a.double() - b.double()).abs().max() / b.double().abs().max())


@pytest.mark.parametrize(
    "solver",
    [pytest.param(s, marks=[pytest.mark.slow] * s.name.startswith("dpm2")) for s in GRID],
    ids=lambda s: s.name,
)
def test_every_step_is_diffusers(solver):
    """Compare every step in float32, as it is used, up to diffusers' own rounding.

    tests/solvers/test_solver_grid.py compares in float64.
    """
    z = torch.randn(SHAPE, generator=seeded(0))
    for spacing in solver.spacings:
        for steps in (s for s, why in solver.runs(spacing) if not why and s in (1, 5, 10)):
            config = solver.config(solver.predictions[-1], spacing)
            denoise, theirs = network(config), theirs_of(config)
            theirs.set_timesteps(steps)
            ours = Scheduler.from_config(theirs)
            ours.set_timesteps(steps)
            assert ours.timesteps.tolist() == pytest.approx(theirs.timesteps.tolist(), rel=1e-5, abs=1e-3)
            flow = solver.scheduler.startswith("FlowMatch")  # these scale neither noise nor the network's input
            scale = 1.0 if flow else theirs.init_noise_sigma
            assert ours.init_noise_sigma == pytest.approx(float(scale), rel=1e-5)
            ours_from, theirs_from = seeded(), seeded()
            if solver.scheduler == "DPMSolverSDEScheduler":  # its tree has a seed of its own
                draw = functools.partial(randn_tensor, SHAPE, theirs_from)
                theirs.noise_sampler = Brownian(draw)
            given = {"generator": theirs_from} if "generator" in inspect.signature(theirs.step).parameters else {}
            x, y = z * scale, z * ours.init_noise_sigma
            for t, u in zip(theirs.timesteps, ours.timesteps, strict=True):
                a, b = x if flow else theirs.scale_model_input(x, t), ours.scale_model_input(y, u)
                assert difference(b, a) < 2e-3, (spacing, steps, t)
                expected = theirs.step(denoise(a, t.reshape(1)), t, x, **given)
                out = ours.step(denoise(b, u.reshape(1)), u, y, generator=ours_from)
                x, y = expected.prev_sample, out.prev_sample
                assert difference(y, x) < 2e-3, (spacing, steps, t)
                if solver.name in ("ddpm", "ddim", "euler"):
                    assert difference(out.pred_original_sample, expected.pred_original_sample) < 2e-3
            assert torch.equal(ours_from.get_state(), theirs_from.get_state())


@pytest.mark.parametrize(("eta", "clipped"), [(0.0, True), (0.6, False), (1.0, True)])
def test_options_of_ddim(eta, clipped):
    theirs = DDIMScheduler()
    ours = Scheduler.from_config(theirs)
    theirs.set_timesteps(7)
    ours.set_timesteps(7)
    x, options = torch.randn(SHAPE, generator=seeded(0)), {"eta": eta, "use_clipped_model_output": clipped}
    first, second, y = seeded(), seeded(), x
    for t in ours.timesteps:
        out = torch.sin(3 * x)
        x = theirs.step(out, t, x, generator=first, **options).prev_sample
        y = ours.step(out, t, y, generator=second, **options, return_dict=False)[0]
    assert difference(y, x) < 1e-5
    assert torch.equal(first.get_state(), second.get_state())


def run(scheduler, x, ts, denoise, generator):
    for t in ts:
        model_input = scheduler.scale_model_input(x, t)
        x = scheduler.step(denoise(model_input, t), t, x, generator=generator).prev_sample
    return x


def like(solver, x, t):
    """Evaluate a network whose output depends on each image's timestep."""
    return torch.sin(2 * x + t.double().reshape(-1, 1, 1, 1).to(x.dtype) / 300)


@pytest.mark.parametrize("name", ["ddpm", "ddim", "dpmpp_3m", "unipc", "plms", "heun", "euler_ancestral", "lms"])
def test_images_at_timesteps_of_their_own(name):
    """Two images, one of them three rows behind the other, become what each becomes alone."""
    solver = next(s for s in GRID if s.name == name)
    config = solver.config("epsilon", "linspace")
    z = torch.randn(SHAPE, generator=seeded(0), dtype=torch.float64)
    noise = torch.randn((40, *SHAPE), generator=seeded(1), dtype=torch.float64)

    def scheduler():
        made = Scheduler(config)
        made.set_timesteps(6)
        return made

    def step(made, x, t, rows):
        out = like(name, made.scale_model_input(x, t), t)
        z = torch.stack([noise[row, i] for i, row in enumerate(rows)])[: len(x)]
        return made.step(out, t, x, variance_noise=z).prev_sample

    alone = []
    for i in range(2):
        made = scheduler()
        x = z[i : i + 1] * made.init_noise_sigma
        for row, t in enumerate(made.timesteps):
            out = like(name, made.scale_model_input(x, t), t)
            x = made.step(out, t, x, variance_noise=noise[row, i : i + 1]).prev_sample
        alone.append(x)

    made = scheduler()
    ts, x = made.timesteps, z * made.init_noise_sigma
    n, behind, waiting = len(ts), 3, -torch.ones((), dtype=ts.dtype)
    for row in range(n + behind):
        rows = [row, row - behind]
        t = torch.stack([ts[r] if 0 <= r < n else waiting for r in rows])
        before = x
        x = step(made, x, t, [max(r, 0) for r in rows])
        assert all(torch.equal(x[i], before[i]) for i, r in enumerate(rows) if not 0 <= r < n)
    torch.testing.assert_close(x, torch.cat(alone), rtol=1e-9, atol=1e-9)


def test_an_image_can_start_anew_while_others_go_on():
    """In continuous batching slot 0 finishes and takes another image, which the old history must not affect."""
    made = Scheduler.from_config(UniPCMultistepScheduler())
    made.set_timesteps(4)
    z = torch.randn(SHAPE, generator=seeded(0), dtype=torch.float64)
    fresh = Scheduler.from_config(made)
    fresh.set_timesteps(4)
    expected = run(fresh, z[:1], made.timesteps, lambda x, t: like("", x, t), None)
    x = run(made, z + 1.0, made.timesteps[:4], lambda x, t: like("", x, t), None)
    x = torch.cat([z[:1], x[1:]])
    for t in made.timesteps:
        both = torch.stack([t, torch.tensor(-1)])
        x = made.step(like("", x, both), both, x).prev_sample
    torch.testing.assert_close(x[:1], expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "name", ["DDIMScheduler", "DDPMScheduler", "EulerDiscreteScheduler", "UniPCMultistepScheduler"]
)
def test_noise_and_velocity(name):
    theirs = theirs_of({"_class_name": name})
    ours = Scheduler.from_config(theirs)
    theirs.set_timesteps(10)
    ours.set_timesteps(10)
    x0, z = torch.randn((2, *SHAPE), generator=seeded(0))
    t = theirs.timesteps[[2, 7]]
    torch.testing.assert_close(ours.add_noise(x0, z, t), theirs.add_noise(x0, z, t), rtol=1e-5, atol=1e-5)
    if name.startswith("DD"):  # diffusers' Euler takes abar of the step's number, UniPC has none
        torch.testing.assert_close(ours.get_velocity(x0, z, t), theirs.get_velocity(x0, z, t), rtol=1e-4, atol=1e-4)


def test_noise_in_half_precision_is_added_all_the_same():
    """diffusers rounds abar to half precision first, so that the first timesteps get no noise; fastdiff does not."""
    ours = Scheduler.from_config(DDIMScheduler())
    x0, z = torch.full(SHAPE, 0.125).half(), torch.ones(SHAPE).half()
    noisy = ours.add_noise(x0, z, torch.tensor([0, 1]))
    assert noisy.dtype == torch.float16
    assert float((noisy - x0)[0].abs().max()) == pytest.approx(math.sqrt(1e-4), rel=0.05)


def test_start_in_the_middle():
    """For img2img, solvers without a history, and Heun between steps, start anywhere."""
    for theirs in (DDIMScheduler(), HeunDiscreteScheduler(), EulerDiscreteScheduler()):
        ours = Scheduler.from_config(theirs)
        theirs.set_timesteps(8)
        ours.set_timesteps(8)
        first = 6 if theirs.order == 2 else 4
        x0, z = torch.randn((2, *SHAPE), generator=seeded(0))
        x = theirs.add_noise(x0, z, theirs.timesteps[first : first + 1].expand(2))
        y = ours.add_noise(x0, z, ours.timesteps[first])
        for t in theirs.timesteps[first:]:
            x = theirs.step(like("", theirs.scale_model_input(x, t), t), t, x).prev_sample
            y = ours.step(like("", ours.scale_model_input(y, t), t), t, y).prev_sample
        assert difference(y, x) < 1e-3


def test_gradients_go_through_a_step():
    ours = Scheduler.from_config(DDIMScheduler(clip_sample=False))
    ours.set_timesteps(5)
    x = torch.randn(SHAPE, generator=seeded(0), requires_grad=True)
    out = ours.step(0.5 * x, ours.timesteps[0], x)
    out.pred_original_sample.sum().backward()
    assert x.grad is not None
    assert float(x.grad.abs().min()) > 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_samples_keep_their_dtype(dtype):
    ours, exact = Scheduler.from_config(DDIMScheduler()), Scheduler.from_config(DDIMScheduler())
    ours.set_timesteps(5)
    exact.set_timesteps(5)
    x = torch.randn(SHAPE, generator=seeded(0)).to(dtype)
    got = ours.step(x.sin(), ours.timesteps[0], x)
    expected = exact.step(x.sin().double(), ours.timesteps[0], x.double()).prev_sample
    assert got.prev_sample.dtype == got.pred_original_sample.dtype == dtype
    torch.testing.assert_close(got.prev_sample, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_randn_is_diffusers():
    for make in (seeded, lambda: [seeded(i) for i in range(2)], lambda: [seeded()]):
        ours, theirs = make(), make()
        a = randn(SHAPE, ours, torch.device("cpu"), torch.float32)
        assert torch.equal(a, randn_tensor(SHAPE, generator=theirs, device=torch.device("cpu"), dtype=torch.float32))
    torch.manual_seed(4)
    a = randn(SHAPE, None, torch.device("cpu"), torch.float32)
    torch.manual_seed(4)
    assert torch.equal(a, randn_tensor(SHAPE, device=torch.device("cpu"), dtype=torch.float32))


def test_folders(tmp_path):
    DDIMScheduler(beta_schedule="scaled_linear").save_pretrained(tmp_path / "scheduler")
    for args in ((tmp_path,), (tmp_path / "scheduler",), (str(tmp_path), "scheduler")):
        made = Scheduler.from_pretrained(*args)
        assert made.schedule == fastdiff.NoiseSchedule("scaled_linear")
        assert len(made) == 1000
    with pytest.raises(CheckpointError, match=r"no scheduler_config\.json"):
        Scheduler.from_pretrained(tmp_path / "nowhere")
    (tmp_path / "scheduler" / "scheduler_config.json").write_text(json.dumps({"_class_name": "IPNDMScheduler"}))
    with pytest.raises(ConfigError, match=r"'IPNDMScheduler' .* is not supported; supported: DDPMScheduler, "):
        Scheduler.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda s, x: Scheduler(s.config).step(x, 900, x), "call set_timesteps"),
        (lambda s, x: s.set_timesteps(0), "steps=0: a whole number of at least 1"),
        (lambda s, x: s.set_timesteps(1001), "steps=1001"),
        (lambda s, x: s.step(x, 1000, x), "timesteps[0]=1000: the schedule's timesteps end at 999"),
        (lambda s, x: s.step(x, 900.5, x), "timestep 900.5 is not one of this run's 10, 900 .. 0"),
        (lambda s, x: s.step(x, torch.tensor([900, 900, 900]), x), "one for each of 2 images"),
        (lambda s, x: s.step(x, "900", x), "a number, or one for each"),
        (lambda s, x: s.step(x, math.nan, x), "timestep nan is not one"),
        (lambda s, x: s.step(x[:1], 900, x), "of one batch and size"),
        (lambda s, x: s.step(torch.cat([x, x[:, :2]], 1), 900, x), "the network gave 5 channels; 3 are needed"),
        (lambda s, x: s.step(x, 900, x, eta=math.nan), "eta=nan"),
        (lambda s, x: s.step(x, 900, x, eta=1.0, generator=7), "generator is a int"),
        (lambda s, x: s.step(x, 900, x, eta=1.0, generator=[seeded()] * 3), "3 generators for 2 images"),
        (lambda s, x: s.step(x, 900, x, eta=1.0, variance_noise=x[:1]), "variance_noise (1, 3, 4, 4)"),
        (lambda s, x: s.add_noise(x, x, 1000), "timestep 1000.0 is outside 0 .. 999"),
    ],
)
def test_mistakes(call, words):
    scheduler = Scheduler.from_config(DDIMScheduler())
    scheduler.set_timesteps(10)
    with pytest.raises(InvalidArgument) as caught:
        call(scheduler, torch.zeros(SHAPE))
    assert words in str(caught.value)


def test_a_history_keeps_its_batch():
    scheduler = Scheduler.from_config(UniPCMultistepScheduler())
    scheduler.set_timesteps(5)
    x = torch.randn(SHAPE, generator=seeded())
    scheduler.step(x, scheduler.timesteps[0], x)
    with pytest.raises(InvalidArgument, match=r"1 images, but the history is of 2"):
        scheduler.step(x[:1], scheduler.timesteps[1], x[:1])
    one = scheduler.step(x[:1], scheduler.timesteps[0], x[:1]).prev_sample  # a new run
    assert one.shape == (1, *SHAPE[1:])


def test_the_table_is_what_steps():
    """A coefficient that is changed by 1 % changes the sample, so the table really computes it."""
    scheduler = Scheduler.from_config(DDIMScheduler())
    scheduler.set_timesteps(5)
    x = torch.randn(SHAPE, generator=seeded())
    before = scheduler.step(x, scheduler.timesteps[0], x).prev_sample
    (key, table), *_ = scheduler._tables.items()
    rows = (table.rows[0]._replace(a0=1.01 * table.rows[0].a0), *table.rows[1:])
    scheduler._tables[key] = dataclasses.replace(table, rows=rows)
    assert difference(scheduler.step(x, scheduler.timesteps[0], x).prev_sample, before) > 1e-5
