"""`fastdiff.accelerate` keeps the object, the images and the generators' states; unsupported parts are refused."""

from __future__ import annotations

import copy
import inspect
import itertools
import json
import logging
import pickle
import re
import shutil

import diffusers
import numpy as np
import pytest
import torch
from diffusers import (
    DDIMPipeline,
    DDIMScheduler,
    DDPMPipeline,
    DDPMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    UNet2DModel,
)
from diffusers.models.attention_processor import AttnProcessor

import fastdiff
from fastdiff.backends.native import extension
from fastdiff.errors import BackendError, ConfigError, InvalidArgument
from fastdiff.integrations.condition import BackendCondition
from fastdiff.integrations.scheduler import Scheduler
from tests.support import warm
from tests.support.conditions import config as condition_config
from tests.support.conditions import diffusers_condition, random_condition
from tests.support.paths import ROOT
from tests.support.unets import TINY, VARIANTS, change, diffusers_twin, random_unet

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)
needs_native = pytest.mark.skipif(extension() is None, reason="the native engine is not built")
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]
SCHEDULERS = {
    "ddpm": DDPMScheduler(),
    "ddpm, large, trailing": DDPMScheduler(variance_type="fixed_large", timestep_spacing="trailing"),
    "ddpm, v": DDPMScheduler(prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"),
    "ddpm, thresholding": DDPMScheduler(thresholding=True, sample_max_value=1.5),
    "ddim": DDIMScheduler(),
    "ddim, zero snr": DDIMScheduler(rescale_betas_zero_snr=True, timestep_spacing="trailing", prediction_type="sample"),
    "sde": DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++"),
    "dpm": DPMSolverMultistepScheduler(),
    "lcm": diffusers.LCMScheduler(),
    "tcd": diffusers.TCDScheduler(),
    "dpm_singlestep": diffusers.DPMSolverSinglestepScheduler(),
}
CALLS = {
    "one generator": lambda: torch.Generator().manual_seed(5),
    "a generator for each": lambda: [torch.Generator().manual_seed(i) for i in range(3)],
    "a list of one": lambda: [torch.Generator().manual_seed(6)],
    "none": lambda: None,
}


def pipeline_of(cls=DDIMPipeline, scheduler=None, config=TINY, unet=None):
    unet = diffusers_twin(random_unet(config)) if unet is None else unet
    pipeline = cls(unet=unet, scheduler=DDIMScheduler() if scheduler is None else scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def call(pipeline, generator=None, **arguments):
    """Call the pipeline; return images [n, H, W, C] and the states of the generators afterwards."""
    torch.manual_seed(1)
    made = CALLS[generator]() if isinstance(generator, str) else generator
    arguments = {"batch_size": 3, "output_type": "np", "num_inference_steps": 5, **arguments}
    images = pipeline(generator=made, **arguments).images
    states = [g.get_state() for g in (made if isinstance(made, list) else [made]) if g is not None]
    return images, [*states, torch.get_rng_state()]


def psnr(a, b):
    error = float(np.mean((np.asarray(a, np.float64) - np.asarray(b, np.float64)) ** 2))
    return 10 * np.log10(1 / max(error, 1e-20))


def logged(caplog):
    return [record.message for record in caplog.records if record.name == "fastdiff"]


def assert_same(pipeline, *, backend="auto", least=80.0, **arguments):
    """Check that a call gives diffusers' images and leaves every generator in the state in which diffusers does."""
    expected, theirs = call(pipeline, **arguments)
    fastdiff.accelerate(pipeline, backend)
    images, ours = call(pipeline, **arguments)
    pipeline.unaccelerate()
    assert psnr(images, expected) >= least
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
    assert expected.std() > 0.05  # an image, not a constant


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' own


# The same images ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("scheduler", "generator"),
    [
        pytest.param(scheduler, generator, marks=[pytest.mark.slow] * ((i + j) % len(CALLS) != 0))
        for (i, scheduler), (j, generator) in itertools.product(enumerate(SCHEDULERS), enumerate(CALLS))
    ],
)
def test_ddpm_pipeline(scheduler, generator, backend):
    assert_same(pipeline_of(DDPMPipeline, SCHEDULERS[scheduler]), backend=backend, generator=generator)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "options",
    [{}, {"eta": 0.4}, {"eta": 1.0, "use_clipped_model_output": True}, {"use_clipped_model_output": False}],
    ids=str,
)
def test_ddim_pipeline(options, backend):
    pipeline = pipeline_of()
    for generator in ("one generator", "a generator for each", "none"):
        assert_same(pipeline, backend=backend, generator=generator, **options)


@needs_native
def test_learned_variance():
    pipeline = pipeline_of(DDPMPipeline, DDPMScheduler(variance_type="learned_range"), change(out_channels=6))
    assert_same(pipeline, backend="native", generator="one generator")


@needs_native
@pytest.mark.parametrize("name", ["one head", "24x40", "scale-shift", "resnet resampling", "padding 0", "no mid block"])
def test_networks(name):
    assert_same(pipeline_of(config=change(**VARIANTS[name])), backend="native", generator="one generator")


@pytest.mark.parametrize("scheduler", ["PNDMScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler"])
def test_schedulers_that_diffusers_cannot_call_from_ddpm_pipeline(scheduler):
    """The step of these takes no generator, but fastdiff runs them as a loop that gives none does."""
    theirs = getattr(diffusers, scheduler)(**({"skip_prk_steps": True} if scheduler == "PNDMScheduler" else {}))
    pipeline = pipeline_of(DDPMPipeline, theirs)
    with pytest.raises(TypeError, match="generator"):
        call(pipeline)
    images, _ = call(fastdiff.accelerate(pipeline), "one generator")
    theirs.set_timesteps(5)
    x = torch.randn((3, 3, 8, 8), generator=CALLS["one generator"]())
    with torch.no_grad():
        for t in theirs.timesteps:
            x = theirs.step(pipeline.unet(x, t).sample, t, x).prev_sample
    assert psnr(images, (x / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()) >= 80


def test_every_form_of_the_result():
    pipeline = pipeline_of()
    expected = {kind: pipeline(2, CALLS["one generator"](), 0.0, 3, output_type=kind) for kind in ("np", "pt", "pil")}
    fastdiff.accelerate(pipeline)
    for kind, theirs in expected.items():
        ours = pipeline(2, CALLS["one generator"](), 0.0, 3, output_type=kind)  # by position, too
        assert type(ours) is type(theirs)
        assert type(ours.images) is type(theirs.images)
        scale = 255 if kind == "pil" else 1
        a, b = (np.stack([np.asarray(image) / scale for image in result.images]) for result in (ours, theirs))
        assert psnr(a, b) > 60
    (images,) = pipeline(2, CALLS["one generator"](), num_inference_steps=3, output_type="np", return_dict=False)
    assert psnr(images, expected["np"].images) > 80


@pytest.mark.parametrize("cls", [DDIMPipeline, DDPMPipeline])
def test_outputs_that_are_no_prediction_of_the_image_are_refused(cls):
    """Diffusers itself fails for them, unless PyTorch broadcasts a single channel."""
    scheduler = DDIMScheduler() if cls is DDIMPipeline else DDPMScheduler()
    pipeline = pipeline_of(cls, scheduler, change(in_channels=6))
    with pytest.raises(RuntimeError, match="must match"):
        call(pipeline)
    with pytest.raises(InvalidArgument, match="gives 3 channels for images of 6 channels; 6 are needed, or 12"):
        call(fastdiff.accelerate(pipeline))
    pipeline = pipeline_of(cls, scheduler, change(out_channels=1))
    expected = call(pipeline)[0]
    with pytest.raises(ConfigError, match="gives 1 channels for images of 3 channels"):
        call(fastdiff.accelerate(pipeline, strict=True))
    assert np.abs(call(fastdiff.accelerate(pipeline.unaccelerate(), strict=False))[0] - expected).max() < 1e-4


class SuperResolution(DDIMPipeline):
    """A pipeline that concatenates its condition, as SR3 does."""

    @torch.no_grad()
    def __call__(self, condition, steps=3):
        x = torch.ones_like(condition)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            out = self.unet(torch.cat([x, condition], dim=1), t).sample
            x = self.scheduler.step(out, t, x).prev_sample
        return x


@needs_native
def test_a_pipeline_that_concatenates_its_condition():
    pipeline = pipeline_of(SuperResolution, config=change(in_channels=6))
    condition = torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)
    expected = pipeline(condition)
    assert (fastdiff.accelerate(pipeline)(condition) - expected).abs().max() < 1e-4


@needs_native
def test_any_other_pipeline_keeps_its_loop():
    """A user's class, guided by labels: a backend runs its network during a call, and not afterwards."""

    class Guided(DiffusionPipeline):
        def __init__(self, unet, scheduler):
            super().__init__()
            self.register_modules(unet=unet, scheduler=scheduler)

        @torch.no_grad()
        def __call__(self, labels, generator=None, steps=4, scale=2.0):
            x = torch.randn((len(labels), 3, 8, 8), generator=generator)
            self.scheduler.set_timesteps(steps)
            self.forward = self.unet.forward
            for t in self.scheduler.timesteps:
                out = self.unet(x, t, class_labels=labels).sample
                null = self.unet(x, t.expand(len(x)), torch.full_like(labels, 4), return_dict=False)[0]
                x = self.scheduler.step(null + scale * (out - null), t, x).prev_sample
            return x

    unet = diffusers_twin(random_unet(change(num_class_embeds=5)))
    pipeline = Guided(unet, DDIMScheduler())
    labels = torch.tensor([0, 3, 1])
    expected = pipeline(labels, CALLS["one generator"]())
    fastdiff.accelerate(pipeline, "native")
    got = pipeline(labels, CALLS["one generator"]())
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    assert type(pipeline.forward).__module__ == "fastdiff.integrations.network"
    assert pipeline.unet is unet
    assert "forward" not in vars(unet)
    with pytest.raises(IndexError):  # raised by diffusers for an unknown label
        pipeline(torch.tensor([0, 5, 1]), None)
    assert "forward" not in vars(unet)


@needs_native
def test_the_forward_of_a_call_does_what_diffusers_does():
    from fastdiff.integrations.network import BackendUNet

    unet = diffusers_twin(random_unet(TINY))
    network = BackendUNet(unet, "native")
    assert not network.unsupported_changes()
    assert not network.reasons_against()
    x = torch.randn(2, 3, 8, 8)
    ts = [7, 7.9, torch.tensor(7), torch.tensor([7.5]), torch.tensor([3, 800])]
    with torch.no_grad():
        expected = [unet(x, t).sample for t in ts]
    front = network.front(lambda message: None)
    with torch.no_grad():
        for t, theirs in zip(ts, expected, strict=True):
            torch.testing.assert_close(front(x, t).sample, theirs, rtol=1e-4, atol=1e-5)
            assert not torch.equal(front(x, t).sample, theirs), "diffusers' own code ran"
        with pytest.raises(RuntimeError):  # a size that the network cannot process
            front(x[..., :7], 3)
    with torch.inference_mode():
        torch.testing.assert_close(front(x, ts[-1]).sample, expected[-1], rtol=1e-4, atol=1e-5)
    out = front(x, ts[-1]).sample  # gradients are on: diffusers' own forward
    assert out.grad_fn is not None


# The same object ------------------------------------------------------------------------------------------------------


class MyDDIMPipeline(DDIMPipeline):
    """A user's subclass that does not change the loop."""


def test_it_is_the_same_object_and_comes_back():
    pipeline = pipeline_of(MyDDIMPipeline)
    before = dict(vars(pipeline))
    fast = fastdiff.accelerate(pipeline)
    assert fast is pipeline
    assert isinstance(pipeline, MyDDIMPipeline)
    assert type(pipeline) is not MyDDIMPipeline
    assert type(pipeline).__name__ == "MyDDIMPipeline"
    assert inspect.signature(pipeline.__call__) == inspect.signature(MyDDIMPipeline.__call__.__get__(pipeline))
    assert pipeline.components == {"unet": pipeline.unet, "scheduler": pipeline.scheduler}
    assert isinstance(pipeline.unet, UNet2DModel)
    assert type(pipeline.unet) is UNet2DModel
    assert fastdiff.accelerate(pipeline, "eager") is pipeline  # again, with other options
    assert type(pipeline).__mro__.count(MyDDIMPipeline) == 1
    assert pipeline.unaccelerate() is pipeline
    assert type(pipeline) is MyDDIMPipeline
    assert vars(pipeline) == before


def test_weights_are_shared_not_copied():
    pipeline = fastdiff.accelerate(pipeline_of())
    call(pipeline)
    ours = dict(pipeline._fastdiff.network.module.named_parameters())
    assert all(p is ours[name] for name, p in pipeline.unet.named_parameters())


def test_it_saves_as_what_it_was(tmp_path):
    pipeline = fastdiff.accelerate(pipeline_of())
    call(pipeline)
    pipeline.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["_class_name"] == "DDIMPipeline"
    loaded = DiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is DDIMPipeline
    generator = "one generator"
    assert psnr(call(loaded, generator)[0], call(pipeline, generator)[0]) > 80


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda p: pickle.loads(pickle.dumps(p))])
def test_copies_are_accelerated_too(duplicate):
    pipeline = fastdiff.accelerate(pipeline_of())
    expected, _ = call(pipeline, "one generator")
    twin = duplicate(pipeline)
    assert type(twin) is type(pipeline)
    assert twin.unet is not pipeline.unet
    with torch.no_grad():
        pipeline.unet.conv_out.weight.zero_()
    assert psnr(call(twin, "one generator")[0], expected) > 80


# What changes between calls -------------------------------------------------------------------------------------------


def replace_scheduler(pipeline):
    pipeline.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction")


def load_other_weights(pipeline):
    pipeline.unet.load_state_dict(random_unet(TINY, seed=9).state_dict())


def assign_other_weights(pipeline):
    pipeline.unet.load_state_dict(random_unet(TINY, seed=9).state_dict(), assign=True)


def edit_data(pipeline):
    pipeline.unet.conv_in.weight.data.mul_(1.5)


def replace_unet(pipeline):
    pipeline.unet = diffusers_twin(random_unet(change(norm_eps=0.1), seed=9))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "edit",
    [
        lambda p: p.scheduler.register_to_config(prediction_type="sample"),
        replace_scheduler, load_other_weights, assign_other_weights, edit_data, replace_unet,
    ],
)  # fmt: skip
def test_changes_are_noticed(edit, backend):
    pipeline = fastdiff.accelerate(pipeline_of(), backend)
    before, _ = call(pipeline, "one generator")
    edit(pipeline)
    after, _ = call(pipeline, "one generator")
    pipeline.unaccelerate()
    expected, _ = call(pipeline, "one generator")
    assert psnr(after, expected) >= 80
    assert psnr(after, before) < 40


def test_another_dtype_is_left_to_diffusers_where_the_engine_has_none(caplog):
    """In float64 the images have diffusers' bits, and the log says once that diffusers runs the pipeline."""
    pipeline = fastdiff.accelerate(pipeline_of()).to(torch.float64)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        images = [call(pipeline, "one generator")[0] for _ in range(2)]
    if extension() is not None:
        (record,) = logged(caplog)
        assert "run by diffusers; the native engine cannot: it computes in float32" in record
    pipeline.unaccelerate()
    assert np.array_equal(images[0], call(pipeline, "one generator")[0])
    pipeline.to(torch.float32)
    assert_same(pipeline, generator="one generator")


@pytest.mark.parametrize("cls", [DDIMPipeline, DDPMPipeline])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_eager_in_another_dtype_gives_diffusers_kind_of_images(dtype, cls):
    """The images are close, as diffusers rounds the state to half precision too, where eager keeps float32.

    NumPy has no bfloat16, so diffusers gives no array of such images, and eager gives one of float32.
    """
    pipeline = pipeline_of(cls, SCHEDULERS["ddim"]).to(dtype)
    theirs, _ = call(pipeline, "one generator", output_type="pt")
    images = None if dtype == torch.bfloat16 else call(pipeline, "one generator")[0]
    fastdiff.accelerate(pipeline, "eager")
    ours, _ = call(pipeline, "one generator", output_type="pt")
    assert ours.dtype == theirs.dtype == dtype
    assert psnr(ours.double(), theirs.double()) >= {torch.float64: 100, torch.float16: 45, torch.bfloat16: 30}[dtype]
    drawn, _ = call(pipeline, "one generator")
    assert drawn.dtype == (np.float32 if images is None else images.dtype)
    assert np.array_equal(drawn, ours.permute(0, 2, 3, 1).to(torch.float64).numpy().astype(drawn.dtype))
    pictures, _ = call(pipeline, "one generator", output_type="pil")
    assert pictures[0].size == (8, 8)


@needs_compiler
@pytest.mark.slow
def test_compiled():
    """With a real compiler."""
    micro = {"block_out_channels": (8,), "down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    pipeline = pipeline_of(scheduler=DDPMScheduler(), config=change(**micro, add_attention=False))
    assert_same(pipeline, backend="compiled", generator="one generator")
    fastdiff.accelerate(pipeline, "compiled")
    before, _ = call(pipeline, "one generator")
    with torch.no_grad():
        pipeline.unet.conv_in.weight.mul_(1.5)
    after, _ = call(pipeline, "one generator")
    assert psnr(after, before) < 60, "the change of the weights had no effect"
    pipeline.unaccelerate()
    assert psnr(after, call(pipeline, "one generator")[0]) >= 80


def test_autocast_is_left_to_diffusers():
    pipeline = pipeline_of()
    with torch.autocast("cpu", torch.bfloat16):
        expected, _ = call(pipeline, "one generator")
        images, _ = call(fastdiff.accelerate(pipeline), "one generator")
    assert np.array_equal(images, expected)
    assert psnr(call(pipeline, "one generator")[0], expected) < 80  # outside of autocast it runs in float32


@needs_native
def test_compiled_networks_are_refused():
    pipeline = pipeline_of()
    pipeline.unet.compile()
    with pytest.raises(ConfigError, match="it was compiled"):
        fastdiff.accelerate(pipeline, "native")


@needs_native
def test_a_call_within_a_call():
    """A progress bar that calls the same pipeline: neither call disturbs the other."""
    pipeline = pipeline_of()
    expected, _ = call(pipeline, "one generator")
    fastdiff.accelerate(pipeline)
    bar = pipeline.progress_bar

    def nested(iterable):
        pipeline.progress_bar = bar
        assert psnr(call(pipeline, "one generator")[0], expected) > 80
        return iterable

    pipeline.progress_bar = nested
    generator = CALLS["one generator"]()
    images = pipeline(3, generator, num_inference_steps=5, output_type="np").images
    assert psnr(images, expected) > 80


def test_the_state_of_the_network_is_left_alone():
    pipeline = pipeline_of()
    pipeline.unet.train()  # without dropout it makes no difference
    assert_same(pipeline, generator="one generator")
    assert all(m.training for m in pipeline.unet.modules())
    assert all(p.grad is None and p.requires_grad for p in pipeline.unet.parameters())


def test_errors_leave_nothing_behind():
    """After an interrupt in the middle of the loop, the next call gives the same images as before."""
    pipeline = fastdiff.accelerate(pipeline_of())
    expected, _ = call(pipeline, "one generator")
    bar = pipeline.progress_bar

    def interrupted(iterable):
        yield from iterable[:2]
        raise KeyboardInterrupt

    pipeline.progress_bar = interrupted
    with pytest.raises(KeyboardInterrupt):
        call(pipeline)
    pipeline.progress_bar = bar
    assert np.array_equal(call(pipeline, "one generator")[0], expected)


# What is refused ------------------------------------------------------------------------------------------------------


class MyScheduler(DDIMScheduler):
    def step(self, *args, **kwargs):
        return super().step(*args, **kwargs)


class MyUNet(UNet2DModel):
    def forward(self, *args, **kwargs):
        return super().forward(*args, **kwargs)


class MyProcessor(AttnProcessor):
    pass


def hooked(pipeline):
    pipeline.unet.conv_in.register_forward_hook(lambda *_: None)


def with_another_layer(pipeline):
    pipeline.unet.conv_in = torch.nn.Sequential(pipeline.unet.conv_in)


def with_another_activation(pipeline):
    pipeline.unet.conv_act = torch.nn.ReLU()


def with_dropout(pipeline):
    pipeline.unet = diffusers_twin(random_unet(change(dropout=0.1))).train()


def with_my_unet(pipeline):
    unet = MyUNet(**TINY.to_dict())
    unet.load_state_dict(pipeline.unet.state_dict())
    pipeline.unet = unet


def with_processors(pipeline):
    pipeline.unet.down_blocks[1].attentions[0].set_processor(MyProcessor())


def with_learned_times(pipeline):
    options = {"time_embedding_type": "learned", "num_train_timesteps": 1000}
    pipeline.unet = UNet2DModel(**{**TINY.to_dict(), **options})


def with_euler(pipeline):
    pipeline.scheduler = diffusers.EulerDiscreteScheduler()


def with_my_scheduler(pipeline):
    pipeline.scheduler = MyScheduler()


def with_parallel(pipeline):
    pipeline.scheduler = diffusers.DDPMParallelScheduler()


def with_other_betas(pipeline):
    pipeline.scheduler.alphas_cumprod = pipeline.scheduler.alphas_cumprod * 0.99


REFUSED = [
    (hooked, "network", "conv_in has forward hooks"),
    (with_another_layer, "network", "conv_in is a Sequential, not a Conv2d"),
    (with_another_activation, "network", "conv_act is a ReLU, not a SiLU"),
    (with_dropout, "network", "dropout is in training, with dropout (call unet.eval())"),
    (with_my_unet, "network", "forward was replaced (by MyUNet)"),
    (with_processors, "network", "another attention processor than diffusers' own (MyProcessor)"),
    (with_learned_times, "network", "time_embedding_type='learned' is not supported"),
    (with_euler, "scheduler", "scheduler EulerDiscreteScheduler needs its input scaled, which"),
    (with_my_scheduler, "scheduler", "'MyScheduler' (_class_name) is not supported; supported: DDPMScheduler"),
    (with_parallel, "scheduler", "'DDPMParallelScheduler' (_class_name) is not supported"),
    (with_other_betas, "scheduler", "DDIMScheduler is not what its configuration says: alphas_cumprod was changed"),
]


@needs_native
@pytest.mark.parametrize(("edit", "part", "words"), REFUSED, ids=lambda v: getattr(v, "__name__", ""))
def test_what_is_not_supported(edit, part, words, caplog):
    """It raises, in `accelerate` or in the next call; with strict=False diffusers runs that part, and a log says so."""
    pipeline = fastdiff.accelerate(pipeline_of(DDPMPipeline), "native")
    edit(pipeline)
    for attempt in (lambda: call(pipeline), lambda: fastdiff.accelerate(pipeline, "native")):
        with pytest.raises(ConfigError) as caught:
            attempt()
        assert words in str(caught.value)
        assert f"strict=False leaves the {part} to diffusers" in str(caught.value)
    pipeline.unaccelerate()
    expected, _ = call(pipeline, "one generator")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline, strict=False)
        images, _ = call(pipeline, "one generator")
    (record,) = logged(caplog)
    assert record.startswith(f"the {part} is left to diffusers: ")
    assert words in record
    if part == "network":
        assert np.array_equal(images, expected)
    else:
        assert psnr(images, expected) > 60


@pytest.mark.parametrize(
    ("scheduler", "words"),
    [
        (diffusers.PNDMScheduler(), "skip_prk_steps=False is not supported"),
        (DDPMScheduler(variance_type="fixed_large_log"), "variance_type='fixed_large_log' is not supported"),
    ],
)
def test_options_that_no_table_has_are_refused_at_once(scheduler, words):
    with pytest.raises(ConfigError) as caught:
        fastdiff.accelerate(pipeline_of(DDPMPipeline, scheduler))
    assert words in str(caught.value)


@needs_native
def test_left_to_diffusers_is_logged_once(caplog):
    pipeline = pipeline_of(DDPMPipeline, MyScheduler())
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline, strict=False)
        for _ in range(3):
            call(pipeline)
    (record,) = logged(caplog)
    assert record.startswith("the scheduler is left to diffusers: scheduler 'MyScheduler'")


def test_steps_at_which_diffusers_itself_fails():
    pipeline = fastdiff.accelerate(pipeline_of(scheduler=DDIMScheduler(timestep_spacing="trailing")))
    with pytest.raises(ConfigError, match=r"'trailing' timesteps for 61 steps end in a stray t = -1"):
        call(pipeline, num_inference_steps=61)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_inference_steps": 0}, "steps=0"),
        ({"num_inference_steps": 1001}, "steps=1001"),
        ({"eta": float("nan")}, "eta=nan"),
        ({"eta": -0.5}, "eta=-0.5"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"generator": [torch.Generator()] * 2}, "2 generators for batch_size=3"),
        ({"generator": 7}, "generator is a int"),
    ],
)
def test_mistakes_in_a_call(arguments, words):
    pipeline = fastdiff.accelerate(pipeline_of())
    with pytest.raises(InvalidArgument) as caught:
        call(pipeline, **arguments)
    assert words in str(caught.value)
    with pytest.raises(TypeError, match="guidance_scale"):
        call(pipeline, guidance_scale=3.0)


def test_what_is_no_pipeline():
    for wrong in (diffusers_twin(random_unet(TINY)), None, "google/ddpm-cifar10-32"):
        with pytest.raises(InvalidArgument, match="a diffusers pipeline is needed"):
            fastdiff.accelerate(wrong)
    with pytest.raises(InvalidArgument, match=r"backend='fast' is unknown; allowed: auto, eager"):
        fastdiff.accelerate(pipeline_of(), "fast")

    class Bare(DiffusionPipeline):
        def __call__(self):
            return "its own"

    with pytest.raises(ConfigError, match=r"Bare has no unet; a UNet2DModel or a UNet2DConditionModel is"):
        fastdiff.accelerate(Bare())
    assert fastdiff.accelerate(Bare(), strict=False)() == "its own"


def test_an_explicit_backend_does_not_fall_back():
    pipeline = pipeline_of().to(torch.float64)
    for strict in (True, False):
        with pytest.raises(BackendError, match=r"backend 'native' cannot run here: .*float64"):
            fastdiff.accelerate(pipeline, "native", strict)
    assert type(pipeline) is DDIMPipeline


def test_without_diffusers():
    code = """
import sys
sys.modules["diffusers"] = None
import fastdiff
try:
    fastdiff.accelerate(object())
except fastdiff.FastdiffError as e:
    assert "pip install diffusers" in str(e), e
else:
    raise SystemExit("no error")
"""
    result = warm.run("-c", code)
    assert result.returncode == 0, result.stderr


# The documentation ----------------------------------------------------------------------------------------------------


def test_every_line_of_the_documentation(tmp_path, monkeypatch):
    """Run the lines of docs/diffusers.md unchanged, and every line of its table of what is supported."""
    text = (ROOT / "docs" / "diffusers.md").read_text(encoding="utf-8")
    section = text.split("## Accelerate a pipeline")[1].split("\n## ")[0]
    (drop_in,) = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len([line for line in drop_in.splitlines() if line.strip()]) == 3
    monkeypatch.chdir(tmp_path)
    plain = pipeline_of()
    plain.save_pretrained("path/to/ddim")
    names: dict[str, object] = {"fastdiff": fastdiff, "DDIMPipeline": DDIMPipeline, "torch": torch}
    exec(drop_in, names)
    assert len(names["images"]) == 16
    lines = re.findall(r"^\| ([^|]+) \| ([^|]+) \|$", section, re.MULTILINE)[1:]
    run = {name.replace("`", ""): how for name, how in lines}
    assert set(run) == set(LINES), "the table and its tests differ"
    for name, how in run.items():
        LINES[name](how)


def line_whole(how):
    for cls in (DDPMPipeline, DDIMPipeline):
        pipeline = fastdiff.accelerate(pipeline_of(cls, SCHEDULERS["ddim"]))
        assert pipeline._fastdiff.whole_loop
        assert call(pipeline)[0].shape == (3, 8, 8, 3)


def line_schedulers(how):
    names = re.findall(r"`(\w+)`", how)
    assert len(names) == 9
    for name in names:
        options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}
        pipeline = pipeline_of(DDPMPipeline, getattr(diffusers, name)(**options))
        fastdiff.accelerate(pipeline)
        assert np.isfinite(call(pipeline)[0]).all()


def line_others(how):
    class Other(DDIMPipeline):
        def __call__(self, n):
            return self.unet(torch.zeros(n, 3, 8, 8), 5).sample

    pipeline = pipeline_of(Other)
    with torch.no_grad():
        expected = pipeline(2)
        torch.testing.assert_close(fastdiff.accelerate(pipeline)(2), expected, rtol=1e-4, atol=1e-5)


def line_decoder(how):
    class Decoding(DiffusionPipeline):
        def __init__(self, vae):
            super().__init__()
            self.register_modules(vae=vae)

        def __call__(self, z):
            return self.vae.decode(z).sample

    if extension() is None:
        return
    pipeline = Decoding(diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4).eval())
    with torch.no_grad():
        expected = pipeline(torch.ones(2, 4, 6, 6))
        torch.testing.assert_close(fastdiff.accelerate(pipeline)(torch.ones(2, 4, 6, 6)), expected)
    assert pipeline._fastdiff.coders.keys() == {("vae", "decoder")}


def line_text(how):
    network = BackendCondition(diffusers_condition(random_condition(condition_config())), "auto")
    assert network.unsupported_changes() == []


def line_own_loop(how):
    scheduler = Scheduler.from_config(diffusers.HeunDiscreteScheduler())
    scheduler.set_timesteps(3)
    x = torch.randn(2, 3, 8, 8) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        x = scheduler.step(scheduler.scale_model_input(x, t), t, x).prev_sample
    assert torch.isfinite(x).all()


def line_modified(how):
    for part in ("unet", "scheduler"):
        pipeline = fastdiff.accelerate(pipeline_of())
        if part == "unet":
            pipeline.unet.conv_norm_out.eps = 0.5
        else:
            with_other_betas(pipeline)
        images, _ = call(pipeline, "one generator")
        pipeline.unaccelerate()
        assert psnr(images, call(pipeline, "one generator")[0]) > 80


def line_unsupported(how):
    pipeline = pipeline_of(scheduler=MyScheduler())
    pipeline.scheduler = MyScheduler()
    with pytest.raises(ConfigError, match="MyScheduler"):
        fastdiff.accelerate(pipeline)
    call(fastdiff.accelerate(pipeline, strict=False))


def line_back(how):
    pipeline = pipeline_of()
    fastdiff.accelerate(pipeline)
    pipeline.unaccelerate()
    assert type(pipeline) is DDIMPipeline


LINES = {
    "DDPMPipeline, DDIMPipeline, subclasses": line_whole,
    "their schedulers": line_schedulers,
    "any other pipeline with a UNet2DModel": line_others,
    "any pipeline with a UNet2DConditionModel": line_text,
    "any pipeline whose vae or vqvae is an AutoencoderKL, VQModel or AutoencoderTiny (TAESD)": line_decoder,
    "a loop of your own": line_own_loop,
    "a network or scheduler that was modified": line_modified,
    "anything else": line_unsupported,
    "back again": line_back,
}
