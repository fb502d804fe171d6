"""Pipelines that share a network or a scheduler, in threads: each gives its own images, whatever the others do."""

from __future__ import annotations

import copy
import gc
import pickle
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DiffusionPipeline, UNet2DModel

import fastdiff
from fastdiff.backends.native import extension
from fastdiff.errors import ConfigError
from tests.support.unets import TINY, diffusers_twin, random_unet

pytestmark = pytest.mark.skipif(extension() is None, reason="the native engine is not built")
WAIT = 60  # seconds until a thread that waits for another one fails


class Mine(DiffusionPipeline):
    """A pipeline with a loop of its own, which calls ``between`` after every row."""

    def __init__(self, unet, scheduler):
        super().__init__()
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, seed, between=lambda: None):
        x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(seed))
        self.scheduler.set_timesteps(4)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t).sample, t, x).prev_sample
            between()
        return x


def network():
    return diffusers_twin(random_unet(TINY))


def at_once(*works):
    """Run the works in threads of their own and return their results; an error of one is raised."""
    with ThreadPoolExecutor(len(works)) as pool:
        return [future.result(WAIT) for future in [pool.submit(work) for work in works]]


def together():
    """Return a function in which two threads wait for each other."""
    barrier = threading.Barrier(2)
    return lambda: barrier.wait(WAIT)


@pytest.mark.parametrize("accelerated", ["both", "one", "none"])
def test_two_pipelines_over_one_network(accelerated):
    unet = network()
    a, b = (Mine(unet, DDIMScheduler()) for _ in range(2))
    right = [a(0), b(1)]
    for pipeline in {"both": [a, b], "one": [a], "none": []}[accelerated]:
        fastdiff.accelerate(pipeline, "native")
    for _ in range(3):
        row = together()
        images = at_once(lambda row=row: a(0, row), lambda row=row: b(1, row))
        for ours, theirs in zip(images, right, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
        if accelerated == "one":
            assert torch.equal(images[1], right[1]), "the plain pipeline did not run diffusers' own code"
            assert not torch.equal(images[0], right[0]), "the accelerated one did"


def test_nothing_is_put_into_the_network_during_a_call():
    unet = network()
    pipeline = fastdiff.accelerate(Mine(unet, DDIMScheduler()), "native")
    before, modes = dict(vars(unet)), [m.training for m in unet.modules()]
    seen = []

    def look():
        assert pipeline.unet is not unet
        assert isinstance(pipeline.unet, UNet2DModel)
        seen.append((dict(vars(unet)) == before, [m.training for m in unet.modules()] == modes, type(unet)))
        (elsewhere,) = at_once(lambda: pipeline.unet)
        assert elsewhere is unet, "another thread sees the front"

    pipeline(0, look)
    assert seen == [(True, True, UNet2DModel)] * 4
    assert pipeline.unet is unet


def test_what_a_call_does_to_its_network_is_done_to_the_module():
    unet = network()
    pipeline = fastdiff.accelerate(Mine(unet, DDIMScheduler()), "native")
    copies, shallow = [], []

    def change():
        pipeline.unet.note = "kept"
        pipeline.unet = pipeline.unet  # registers the module, not its front
        pipeline.unet.train()
        copies.extend([copy.deepcopy(pipeline.unet), pickle.loads(pickle.dumps(pipeline.unet))])
        shallow.append(copy.copy(pipeline.unet))

    pipeline(0, change)
    assert unet.note == "kept"
    assert unet.training
    assert unet.conv_in.training
    assert vars(pipeline)["unet"] is unet
    x = torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        unet.conv_out.weight.zero_()
        unet.conv_out.bias.zero_()
        assert not unet(x, 3).sample.any()
        assert not shallow[0](x, 3).sample.any()
        assert all(other(x, 3).sample.any() for other in copies), "a deep copy runs the first network's weights"
    assert all(type(other) is UNet2DModel and other is not unet for other in (*copies, *shallow))


def test_another_network_in_the_middle_of_a_call():
    one, other = network(), diffusers_twin(random_unet(TINY, seed=5))
    pipeline = Mine(one, DDIMScheduler())

    def replace():
        pipeline.unet = other

    expected = pipeline(0, replace)
    pipeline.unet = one
    fastdiff.accelerate(pipeline, "native")
    torch.testing.assert_close(pipeline(0, replace), expected, rtol=1e-4, atol=1e-4)
    assert pipeline.unet is other


@torch.no_grad()
def in_place(unet):
    unet.conv_out.weight.mul_(-1.5)


def another_tensor(unet):
    unet.conv_out.weight = torch.nn.Parameter(unet.conv_out.weight.detach() * -1.5)


def another_shape(unet):
    """A 5x5 kernel, zero at its edge, and another bias: its configuration does not describe it any more."""
    unet.conv_out.bias = torch.nn.Parameter(torch.full((3,), 0.5))
    unet.conv_in.weight = torch.nn.Parameter(torch.nn.functional.pad(unet.conv_in.weight.detach(), (1, 1, 1, 1)))
    unet.conv_in.padding = (2, 2)


@pytest.mark.parametrize("change", [in_place, another_tensor, another_shape])
def test_weights_that_a_pipeline_changes_in_its_loop(change):
    def draw(backend):
        pipeline, rows = Mine(network(), DDIMScheduler()), []
        if backend:
            fastdiff.accelerate(pipeline, backend)

        def once():
            rows.append(None)
            if len(rows) == 2:
                change(pipeline.unet)

        return pipeline(0, once)

    expected = draw(None)
    assert (expected - Mine(network(), DDIMScheduler())(0)).abs().max() > 0.05
    torch.testing.assert_close(draw("native"), expected, rtol=1e-3, atol=1e-3)


def test_a_pipeline_that_runs_its_network_in_threads():
    class Spread(DiffusionPipeline):
        def __init__(self, unet):
            super().__init__()
            self.register_modules(unet=unet)

        def __call__(self, xs):
            unet = self.unet
            with ThreadPoolExecutor(4) as pool:
                return list(pool.map(torch.no_grad()(lambda x: unet(x, 10).sample), xs))

    pipeline = Spread(network())
    xs = [torch.randn(n % 3 + 1, 3, 8, 8) for n in range(24)]
    expected = pipeline(xs)
    fastdiff.accelerate(pipeline, "native")
    for ours, theirs in zip(pipeline(xs), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)


def quiet(unet, scheduler):
    pipeline = DDIMPipeline(unet=unet, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def draw(pipeline, seed, steps):
    generator = torch.Generator().manual_seed(seed)
    return pipeline(2, generator, num_inference_steps=steps, output_type="np").images


def test_one_scheduler_of_two_pipelines():
    """The other pipeline sets the scheduler's timesteps between the start of a call and its loop, and ends first."""
    scheduler, unet = DDIMScheduler(), network()
    a, b = (quiet(unet, scheduler) for _ in range(2))
    expected = [draw(a, 0, 6), draw(b, 1, 3)]
    fastdiff.accelerate(a, "native")
    fastdiff.accelerate(b, "native")
    bar, others = a.progress_bar, []

    def interrupted(timesteps):
        others.extend(at_once(lambda: draw(b, 1, 3)))
        return bar(timesteps)

    a.progress_bar = interrupted
    assert np.abs(draw(a, 0, 6) - expected[0]).max() < 1e-4
    assert np.abs(others[0] - expected[1]).max() < 1e-4
    a.progress_bar = bar
    for _ in range(5):
        start = together()
        images = at_once(lambda s=start: (s(), draw(a, 0, 6))[1], lambda s=start: (s(), draw(b, 1, 3))[1])
        for ours, theirs in zip(images, expected, strict=True):
            assert np.abs(ours - theirs).max() < 1e-4


def test_one_pipeline_in_several_threads():
    pipeline = fastdiff.accelerate(quiet(network(), DDIMScheduler()), "native")
    expected = [draw(pipeline, seed, seed + 2) for seed in range(4)]
    for images in at_once(*[lambda: [draw(pipeline, seed, seed + 2) for seed in range(4)]] * 3):
        assert all(np.array_equal(ours, alone) for ours, alone in zip(images, expected, strict=True))


@pytest.mark.parametrize("change", ["undone", "again", "again, eager"])
def test_accelerate_while_a_call_runs(change):
    unet = network()
    pipeline = Mine(unet, DDIMScheduler())
    right = pipeline(0)
    fastdiff.accelerate(pipeline, "native")
    lock = pipeline._fastdiff.lock

    def undo():
        if change != "undone":
            fastdiff.accelerate(pipeline, "eager" if "eager" in change else "native")
            assert pipeline._fastdiff.lock is lock, "another call would not wait for the one that runs"
        elif "_fastdiff" in vars(pipeline):
            pipeline.unaccelerate()

    torch.testing.assert_close(pipeline(0, lambda: at_once(undo)), right, rtol=1e-4, atol=1e-4)
    assert pipeline.unet is unet
    torch.testing.assert_close(pipeline(0), right, rtol=1e-4, atol=1e-4)


def test_a_pipeline_that_is_freed_leaves_the_others_as_they_are():
    unet = network()
    a, b = (fastdiff.accelerate(Mine(unet, DDIMScheduler()), "native") for _ in range(2))
    right = b(1)
    held = [a]
    del a

    def free():
        held.clear()
        gc.collect()

    assert torch.equal(b(1, free), right)
    assert torch.equal(b(1), right)


def test_an_interrupted_call_leaves_the_pipeline_usable():
    pipeline = fastdiff.accelerate(Mine(network(), DDIMScheduler()), "native")
    right = pipeline(0)

    def stop():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(0, stop)
    assert not pipeline._fastdiff.fronts
    assert not pipeline._fastdiff.network.runners, "a runner that was interrupted is kept"
    assert torch.equal(pipeline(0), right)


def test_a_network_that_is_defined_in_the_class_is_refused():
    class Fixed(DiffusionPipeline):
        unet = property(lambda self: None)

    with pytest.raises(ConfigError, match="has no unet"):
        fastdiff.accelerate(Fixed())
