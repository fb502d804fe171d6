"""Check that diffusers keeps what a network, scheduler or pipeline does beyond its configuration, by name."""

from __future__ import annotations

import logging

import diffusers
import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.models import attention_processor, embeddings, resnet
from diffusers.models.unets import unet_2d
from diffusers.pipelines.ddim import pipeline_ddim

import fastdiff
from fastdiff.backends.native import extension
from fastdiff.errors import ConfigError, ModifiedError
from fastdiff.integrations.network import BackendUNet
from fastdiff.integrations.scheduler import Scheduler
from fastdiff.solvers.compat.diffusers import SCHEDULERS
from tests.support.changed import CHANGES, GLOBAL_CHANGES, attribute, circular
from tests.support.unets import TINY, VARIANTS, change, diffusers_twin, random_unet

pytestmark = [
    pytest.mark.filterwarnings("ignore:__array:DeprecationWarning"),  # diffusers' own
    pytest.mark.skipif(extension() is None, reason="the native engine is not built"),
]
# These make a network that diffusers cannot run either.
BROKEN = {
    "child removed", "child added", "another shape", "pruning", "compiled part", "dilation", "padding",
    "forward of the whole",
    "_conv_forward of all", "function", "built-in function", "callable object", "function of torch",
}  # fmt: skip


def pipeline_of(cls=DDIMPipeline, scheduler=None):
    pipeline = cls(diffusers_twin(random_unet(TINY)), DDIMScheduler() if scheduler is None else scheduler)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def images_of(pipeline):
    generator = torch.Generator().manual_seed(3)
    return pipeline(generator=generator, num_inference_steps=2, output_type="np").images


def assert_left_to_diffusers(pipeline, words, caplog, *, images=True, least=None):
    """Check that a named backend refuses, and that otherwise diffusers' own images come, with one line of the log."""
    with pytest.raises(ModifiedError) as caught:
        fastdiff.accelerate(pipeline, "native")
    assert words in str(caught.value)
    if not images:
        return
    expected = images_of(pipeline)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        caplog.clear()
        got = [images_of(fastdiff.accelerate(pipeline)) for _ in range(2)]
        images_of(pipeline)
    pipeline.unaccelerate()
    lines = {record.message for record in caplog.records if record.name == "fastdiff"}
    (line,) = lines
    assert words in line
    for ours in got:
        if least is None:
            assert np.array_equal(ours, expected)
        else:  # fastdiff ran the network in diffusers' loop
            np.testing.assert_allclose(ours, expected, atol=least)


# The network ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (i % 3 != 0)) for i, name in enumerate(VARIANTS)]
)
def test_a_network_as_it_was_made_has_no_changes(name):
    unet = diffusers_twin(random_unet(change(**VARIANTS[name]))).train()
    network = BackendUNet(unet, "native")
    assert network.unsupported_changes() == []
    unet.enable_gradient_checkpointing()
    unet.note = "mine"
    unet.register_to_config(sample_size=64)
    unet.conv_norm_out.weight = unet.conv_norm_out.bias
    for attention in unet.modules():
        if hasattr(attention, "processor"):
            attention.set_processor(attention_processor.AttnProcessor())
    assert BackendUNet(unet, "native").unsupported_changes() == []


@pytest.mark.parametrize("name", [name for name in CHANGES if name != "circular"])
def test_changes_of_the_network(name, caplog):
    edit, words = CHANGES[name]
    pipeline = pipeline_of()
    edit(pipeline.unet)
    assert_left_to_diffusers(pipeline, words, caplog, images=name not in BROKEN)


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda u: setattr(u.mid_block.resnets[0], "output_scale_factor", 3.0), "output_scale_factor = 3.0 (not 1.0)"),
        (lambda u: setattr(u.mid_block.attentions[0], "rescale_output_factor", 2.0), "rescale_output_factor = 2.0"),
        (lambda u: setattr(u.mid_block.attentions[0], "residual_connection", False), "residual_connection = False"),
        (lambda u: setattr(u.time_proj, "flip_sin_to_cos", False), "time_proj.flip_sin_to_cos = False (not True)"),
        (lambda u: setattr(u.time_proj, "scale", 2), "time_proj.scale = 2"),
        (lambda u: setattr(u.time_embedding, "act", torch.nn.ReLU()), "time_embedding.act is a ReLU, not a SiLU"),
        (lambda u: setattr(u.mid_block.resnets[0], "nonlinearity", torch.nn.GELU()), "nonlinearity is a GELU"),
        (lambda u: setattr(u.down_blocks[0].resnets[0], "skip_time_act", True), "skip_time_act = True"),
        (lambda u: setattr(u.up_blocks[0].upsamplers[0], "interpolate", False), "interpolate = False"),
        (
            lambda u: [setattr(u.up_blocks[0], k, 0.9) for k in ("s1", "s2", "b1", "b2")],
            "up_blocks.0.s1 = 0.9 was added",
        ),
        (lambda u: setattr(u.down_blocks[0], "skip_conv", None), "down_blocks.0.skip_conv = None was added"),
        (lambda u: setattr(u.mid_block.attentions[0].processor, "scale", 2), "has another attention processor"),
    ],
)
def test_changes_of_diffusers_own_modules(edit, words):
    network = BackendUNet(diffusers_twin(random_unet(TINY)), "native")
    assert network.unsupported_changes() == []
    edit(network.unet)
    assert any(words in reason for reason in network.unsupported_changes())


def double(function):
    return lambda *args, **options: 2 * function(*args, **options)


@pytest.mark.parametrize(
    ("owner", "name", "words"),
    [
        (resnet.ResnetBlock2D, "forward", "diffusers.models.resnet.ResnetBlock2D.forward was replaced"),
        (attention_processor.AttnProcessor2_0, "__call__", "AttnProcessor2_0.__call__ was replaced"),
        (attention_processor.Attention, "prepare_attention_mask", "Attention.prepare_attention_mask was replaced"),
        (UNet2DModel, "forward", "UNet2DModel.forward was replaced"),
        (embeddings, "get_timestep_embedding", "diffusers.models.embeddings.get_timestep_embedding was replaced"),
        (unet_2d, "get_down_block", "diffusers.models.unets.unet_2d.get_down_block was replaced"),
        (torch.nn.functional, "silu", "torch.nn.functional.silu was replaced"),
    ],
)
def test_functions_of_diffusers_that_were_replaced(owner, name, words):
    network = BackendUNet(diffusers_twin(random_unet(TINY)), "native")
    with attribute(owner, name, double(vars(owner)[name])):
        for tried in (network, BackendUNet(network.unet, "native")):
            assert any(words in reason for reason in tried.unsupported_changes())
    assert network.unsupported_changes() == []


@pytest.mark.parametrize("name", GLOBAL_CHANGES)
def test_changes_of_the_process(name, caplog):
    edit, words = GLOBAL_CHANGES[name]
    before = pipeline_of()
    with edit():
        assert_left_to_diffusers(before, words, caplog, images=name not in BROKEN)
        assert_left_to_diffusers(pipeline_of(), words, caplog, images=False)
    expected = images_of(before)
    np.testing.assert_allclose(images_of(fastdiff.accelerate(before)), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("variant", "whole"),
    [
        pytest.param(variant, whole, marks=[pytest.mark.slow] * (whole != (variant == "tiny")))
        for variant in ("tiny", "resnet blocks", "24x40")
        for whole in (True, False)
    ],
)
def test_circular_padding_runs_in_fastdiff(variant, whole, caplog):
    """All convolutions, or those with padding; set after the first call, as users switch to seamless images."""
    pipeline = pipeline_of()
    pipeline.unet = diffusers_twin(random_unet(change(**VARIANTS[variant])))
    usual = images_of(fastdiff.accelerate(pipeline, "native"))
    if whole:
        for m in pipeline.unet.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.padding_mode = "circular"
    else:
        circular(pipeline.unet)
    seamless = images_of(pipeline)
    assert np.abs(seamless - usual).max() > 1e-2
    pipeline.unaccelerate()
    np.testing.assert_allclose(seamless, images_of(pipeline), atol=1e-4)
    pipeline.unet.conv_out.padding_mode = "zeros"
    assert_left_to_diffusers(pipeline, "conv_in.padding_mode = 'circular' (not 'zeros')", caplog)


def test_changes_after_the_first_call_are_noticed():
    pipeline = fastdiff.accelerate(pipeline_of(), "native")
    expected = images_of(pipeline)
    norm = pipeline.unet.up_blocks[0].resnets[0].norm1
    norm.eps = 0.5
    with pytest.raises(ConfigError, match=r"up_blocks\.0\.resnets\.0\.norm1\.eps = 0\.5 \(not 1e-05\)"):
        images_of(pipeline)
    norm.eps = 1e-5
    assert np.array_equal(images_of(pipeline), expected)


def test_a_configuration_that_changes_is_followed():
    pipeline = fastdiff.accelerate(pipeline_of())
    before = images_of(pipeline)
    pipeline.unet.register_to_config(center_input_sample=True)  # diffusers looks at it in every call
    after = images_of(pipeline)
    pipeline.unaccelerate()
    np.testing.assert_allclose(after, images_of(pipeline), atol=1e-4)
    assert np.abs(after - before).max() > 1e-2
    pipeline.unet.register_to_config(norm_eps=0.5)  # of which nothing depends once the modules are made
    with pytest.raises(ConfigError, match=r"norm1\.eps = 1e-05 \(not 0\.5\)"):
        fastdiff.accelerate(pipeline, "native")


class Loud(UNet2DModel):
    """Another output, by way of a method that `forward` does not name."""

    def __call__(self, *args, **options):
        out = super().__call__(*args, **options)
        out.sample.mul_(2)
        return out


class Quiet(UNet2DModel):
    """A user's class, which computes the same."""

    def parameters_in_millions(self):
        return sum(p.numel() for p in self.parameters()) / 1e6


def test_subclasses_of_the_network(caplog):
    for cls in (Loud, Quiet):
        pipeline = pipeline_of()
        pipeline.unet.__class__ = cls
        if cls is Loud:
            assert_left_to_diffusers(pipeline, "__call__ was replaced (by Loud)", caplog)
        else:
            expected = images_of(pipeline)
            np.testing.assert_allclose(images_of(fastdiff.accelerate(pipeline)), expected, atol=1e-4)


def test_weights_of_several_dtypes_are_left_to_diffusers(caplog):
    pipeline = pipeline_of()
    pipeline.unet.conv_out.double()
    with pytest.raises(RuntimeError):
        images_of(pipeline)
    with pytest.raises(RuntimeError):  # diffusers' own
        images_of(fastdiff.accelerate(pipeline))
    assert "its weights are of several dtypes" in caplog.text


# The scheduler --------------------------------------------------------------------------------------------------------


def noisier(scheduler, name):
    """Replace a method of an instance by one that returns twice as much, or as many."""
    method = getattr(scheduler, name)

    def replaced(*args, **options):
        result = method(*args, **options)
        if result is None:
            scheduler.timesteps = scheduler.timesteps.flip(0)
        elif isinstance(result, torch.Tensor):
            result = 2 * result
        else:
            result.prev_sample = 2 * result.prev_sample
        return result

    setattr(scheduler, name, replaced)


SDE = {"algorithm_type": "sde-dpmsolver++"}
METHODS = [
    (DDIMScheduler, {}, "step"),
    (DDIMScheduler, {}, "scale_model_input"),
    (DDIMScheduler, {}, "_get_variance"),
    (DDIMScheduler, {"thresholding": True}, "_threshold_sample"),
    (DDIMScheduler, {}, "set_timesteps"),
    (DDPMScheduler, {}, "_get_variance"),
    (DDPMScheduler, {}, "previous_timestep"),
    (DDPMScheduler, {}, "add_noise"),
    (diffusers.DPMSolverMultistepScheduler, SDE, "convert_model_output"),
    (diffusers.DPMSolverMultistepScheduler, SDE, "dpm_solver_first_order_update"),
]


@pytest.mark.parametrize(("cls", "options", "name"), METHODS, ids=lambda v: getattr(v, "__name__", str(v)))
def test_methods_of_a_scheduler_that_were_replaced(cls, options, name, caplog):
    scheduler = cls(**options)
    noisier(scheduler, name)
    pipeline = pipeline_of(DDPMPipeline, scheduler)
    runs = name != "previous_timestep"
    assert_left_to_diffusers(pipeline, f"{cls.__name__} is not what its configuration says: {name} was", caplog,
                             images=runs, least=1.5e-4)  # fmt: skip
    with pytest.raises(ConfigError, match=f"{name} was replaced"):
        Scheduler.from_config(scheduler)


def zero_terminal(scheduler):
    scheduler.alphas_cumprod[-1] = 0.0  # it was 4e-5


ATTRIBUTES = [
    (DDIMScheduler, "alphas_cumprod", zero_terminal),
    (DDIMScheduler, "betas", lambda s: setattr(s, "betas", s.betas * 2)),
    (DDIMScheduler, "final_alpha_cumprod", lambda s: setattr(s, "final_alpha_cumprod", torch.tensor(0.9))),
    (DDIMScheduler, "final_alpha_cumprod", lambda s: s.register_to_config(set_alpha_to_one=False)),
    (DDIMScheduler, "betas", lambda s: s.register_to_config(beta_end=0.03)),
    (DDIMScheduler, "init_noise_sigma", lambda s: setattr(s, "init_noise_sigma", 2.0)),
    (DDPMScheduler, "one", lambda s: setattr(s, "one", torch.tensor(0.5))),
    (diffusers.UniPCMultistepScheduler, "predict_x0", lambda s: setattr(s, "predict_x0", False)),
    (diffusers.UniPCMultistepScheduler, "disable_corrector", lambda s: setattr(s, "disable_corrector", [0])),
    (diffusers.DPMSolverMultistepScheduler, "lambda_t", lambda s: s.lambda_t.mul_(2)),
    (diffusers.EulerDiscreteScheduler, "use_karras_sigmas", lambda s: setattr(s, "use_karras_sigmas", True)),
]


@pytest.mark.parametrize(("cls", "name", "edit"), ATTRIBUTES)
def test_attributes_of_a_scheduler_that_were_changed(cls, name, edit):
    scheduler = cls()
    Scheduler.from_config(scheduler)
    edit(scheduler)
    with pytest.raises(ConfigError, match=rf"scheduler {cls.__name__} is not what its configuration says: {name} was"):
        Scheduler.from_config(scheduler)
    if cls is not diffusers.EulerDiscreteScheduler:
        with pytest.raises(ConfigError, match=rf"{name} was changed.*strict=False leaves the scheduler to diffusers"):
            fastdiff.accelerate(pipeline_of(DDPMPipeline, scheduler), "native")


def test_what_a_run_leaves_in_a_scheduler_is_no_change():
    for name in SCHEDULERS:
        if name in ("LMSDiscreteScheduler", "DPMSolverSDEScheduler"):  # they need SciPy and torchsde
            continue
        scheduler = getattr(diffusers, name)(**({"skip_prk_steps": True} if name == "PNDMScheduler" else {}))
        scheduler.set_timesteps(5)
        x = torch.randn(1, 3, 4, 4)
        for t in scheduler.timesteps:
            read = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
            x = scheduler.step(read, t, x).prev_sample
        assert len(Scheduler.from_config(scheduler).config) > 3


def test_classes_of_schedulers_that_are_not_diffusers_own(caplog):
    other = type("DDIMScheduler", (DDIMScheduler,), {"_get_variance": lambda *_: 0.0})
    with pytest.raises(ConfigError, match=r"it is a class of tests\.integrations\.test_changed, not diffusers' own"):
        Scheduler.from_config(other())
    pipeline = pipeline_of()
    with attribute(DDIMScheduler, "step", lambda *args, **options: _step(*args, **{**options, "eta": 1.0})):
        assert_left_to_diffusers(pipeline, "DDIMScheduler.step was replaced", caplog, least=1e-4)


_step = DDIMScheduler.step


# The pipeline ---------------------------------------------------------------------------------------------------------


def test_a_call_that_was_replaced_in_diffusers_own_class():
    pipeline = fastdiff.accelerate(pipeline_of())
    assert pipeline._fastdiff.whole_loop
    with attribute(DDIMPipeline, "__call__", lambda self, **_: "mine"):
        assert pipeline_of()() == "mine"
        assert fastdiff.accelerate(pipeline_of())() == "mine"
    with attribute(pipeline_ddim, "randn_tensor", double(pipeline_ddim.randn_tensor)):
        assert not pipeline._fastdiff.whole_loop
        got = images_of(pipeline)
        np.testing.assert_allclose(got, images_of(pipeline.unaccelerate()), atol=1e-4)


def test_a_progress_bar_that_gives_other_timesteps_is_refused():
    pipeline = fastdiff.accelerate(pipeline_of())
    for order in (lambda ts: ts.flip(0), lambda ts: ts[1:], lambda ts: [*ts, ts[-1]]):
        pipeline.progress_bar = order
        with pytest.raises(ConfigError, match="progress_bar gives other timesteps"):
            images_of(pipeline)
