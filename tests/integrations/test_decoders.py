"""The decoders of autoencoders: compared with diffusers and float64, and run within accelerated pipelines."""

from __future__ import annotations

import copy
import itertools
import logging
import re

import numpy as np
import pytest
import torch
from diffusers import (
    AsymmetricAutoencoderKL,
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    DiTPipeline,
    DiTTransformer2DModel,
    LDMPipeline,
    UNet2DConditionModel,
    VQModel,
)
from diffusers.models.attention_processor import AttnProcessor, FusedAttnProcessor2_0

import fastdiff
from fastdiff.backends.native import NativeCoder, extension
from fastdiff.core.lower import lower_coder
from fastdiff.core.plan import plan
from fastdiff.errors import ConfigError
from fastdiff.integrations.autoencoder import CoderForward
from fastdiff.unet.decoder import Decoder, DecoderConfig
from fastdiff.unet.tiny_decoder import TinyDecoder, TinyDecoderConfig
from tests.support.autoencoders import ALL, SMALL, STABLE_DIFFUSION, autoencoder, latents, of_layout, tiny
from tests.support.conditions import TINY as CONDITION
from tests.support.interpreter import Interpreter
from tests.support.unets import TINY, change, diffusers_twin, random_unet, randomize_, relative_error

needs_native = pytest.mark.skipif(extension() is None, reason="the native engine is not built")
ISAS = [] if extension() is None else extension().isas()


def ours(vae):
    if isinstance(vae, AutoencoderTiny):
        module = TinyDecoder(TinyDecoderConfig.from_dict(vae.config)).eval().requires_grad_(False)
    else:
        module = Decoder(DecoderConfig.from_dict(vae.config)).eval().requires_grad_(False)
    module.load_state_dict(vae.decoder.state_dict())
    return module


# The module and its program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ALL)
def test_the_module_equals_diffusers(layout):
    vae = of_layout(layout)
    z = latents(vae, 2, 7, 6)
    assert relative_error(ours(vae)(z), vae.decoder(z)) <= 1e-5


@pytest.mark.parametrize("layout", ALL)
def test_the_program_equals_the_module(layout):
    vae = of_layout(layout)
    module, z = ours(vae).double(), latents(vae, 2, 6, 5).double()
    run = Interpreter(lower_coder(module, (6, 5)), module, 2)
    assert relative_error(run.code(z), module(z)) <= 1e-12


def test_published_layouts_have_the_keys_of_diffusers():
    for changes in (STABLE_DIFFUSION, {**STABLE_DIFFUSION, "latent_channels": 16}):
        with torch.device("meta"):
            vae = AutoencoderKL(**changes)
            module = Decoder(DecoderConfig.from_dict(vae.config))
        shapes = {k: v.shape for k, v in module.state_dict().items()}
        assert shapes == {k: v.shape for k, v in vae.decoder.state_dict().items()}
        layout = plan(lower_coder(module, (64, 64)), 1)
        assert layout.size <= 1.2 * layout.bound


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"norm_type": "spatial"}, "norm_type='spatial'"),
        ({"act_fn": "relu"}, "act_fn='relu'"),
        ({"up_block_types": ("UpBlock2D",) * 2}, "'UpBlock2D'"),
        ({"up_block_types": ("UpDecoderBlock2D",)}, "they must agree"),
        ({"block_out_channels": ()}, "block_out_channels=()"),
        ({"norm_num_groups": 5}, "not divisible by norm_num_groups=5"),
        ({"latent_channels": 0}, "latent_channels=0"),
        ({"mid_block_add_attention": 1}, "mid_block_add_attention=1"),
    ],
)
def test_configurations_that_are_refused(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        DecoderConfig.from_dict({**SMALL, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"act_fn": "gelu"}, "act_fn='gelu'"),
        ({"upsample_fn": "bilinear"}, "upsample_fn='bilinear'"),
        ({"upsampling_scaling_factor": 4}, "upsampling_scaling_factor=4"),
        ({"num_decoder_blocks": (1, 1)}, "they must agree"),
        ({"num_decoder_blocks": ()}, "num_decoder_blocks=()"),
        ({"num_decoder_blocks": (1, 1, 1, 0)}, "num_decoder_blocks[3]=0"),
        ({"decoder_block_out_channels": (8, 8, 8, 16)}, "as many channels"),
        ({"latent_channels": 0}, "latent_channels=0"),
    ],
)
def test_tiny_configurations_that_are_refused(changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        TinyDecoderConfig.from_dict(changes)


# The engine -----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", ALL)
def test_the_engine_is_as_exact_as_diffusers(monkeypatch, layout, isa):
    monkeypatch.setenv("FASTDIFF_ISA", isa)
    vae = of_layout(layout)
    run, wide = NativeCoder(ours(vae)), copy.deepcopy(vae.decoder).double()
    for shape in ((2, 8, 8), (3, 7, 5), (1, 2, 13)):
        z = latents(vae, *shape)
        exact, theirs, got = wide(z.double()), vae.decoder(z), run(z)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert relative_error(got, exact) <= max(2 * relative_error(theirs, exact), 5e-6)


@needs_native
def test_large_batches_run_in_parts(monkeypatch):
    vae = autoencoder()
    z = latents(vae, 5, 8, 8)
    whole = NativeCoder(ours(vae))(z)
    rows = []
    monkeypatch.setattr("fastdiff.backends.native.coding.part_rows", lambda n, size: rows.append(n) or min(n, 2))
    parts = NativeCoder(ours(vae))(z)
    assert rows == [5]
    assert relative_error(parts, whole) <= 1e-5
    assert relative_error(parts[4:], NativeCoder(ours(vae))(z[4:])) <= 1e-5


@needs_native
def test_changed_weights_are_packed_again():
    vae = autoencoder()
    module, z = ours(vae), latents(vae, 1, 4, 4)
    run = NativeCoder(module)
    before = run(z)
    module.up_blocks[0].resnets[1].conv2.weight.data.mul_(1.5)  # which bumps no version
    after = run(z)
    assert relative_error(after, before) > 1e-3
    assert relative_error(after, module(z)) <= 1e-5


@needs_native
def test_sizes_take_turns():
    vae = autoencoder()
    module = ours(vae)
    run = NativeCoder(module)
    for H, W in itertools.product((3, 8, 5, 2), repeat=2):
        z = latents(vae, 1, H, W)
        assert relative_error(run(z), module(z)) <= 1e-5
    assert 1 <= len(run.programs) <= 8


@needs_native
def test_strided_latents():
    vae = autoencoder()
    module = ours(vae)
    z = latents(vae, 4, 6, 12).to(memory_format=torch.channels_last)[::2, :, :, ::2]
    assert relative_error(NativeCoder(module)(z), module(z)) <= 1e-5


# Pipelines ------------------------------------------------------------------------------------------------------------


class TextPipeline(DiffusionPipeline):
    """Stable Diffusion's loop for given states of a text; its real pipelines need a text encoder's package."""

    def __init__(self, vae, unet, scheduler):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, prompt_embeds, generator=None, steps=2, size=8):
        z = torch.randn((len(prompt_embeds), 4, size, size), generator=generator)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            out = self.unet(z, t, encoder_hidden_states=prompt_embeds, return_dict=False)[0]
            z = self.scheduler.step(out, t, z, return_dict=False)[0]
        return self.vae.decode(z / self.vae.config.scaling_factor, return_dict=False, generator=generator)[0]


LEFT = {**CONDITION, "conv_in_kernel": 1}  # of a network that is left to diffusers


def text_pipeline(vae=None):
    unet = randomize_(UNet2DConditionModel(**LEFT)).eval()
    return TextPipeline(autoencoder() if vae is None else vae, unet, DDIMScheduler())


def draw(pipeline, **options):
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(2, 5, 12, generator=torch.Generator().manual_seed(1))
    images = pipeline(text, generator=generator, **options)
    return images, generator.get_state()


@pytest.fixture
def decodings(monkeypatch):
    """Count the decodings that the engine runs."""
    counted = []
    run = NativeCoder.__call__

    def count(self, z):
        counted.append(tuple(z.shape))
        return run(self, z)

    monkeypatch.setattr(NativeCoder, "__call__", count)
    return counted


@needs_native
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_the_decoder_of_a_text_pipeline(backend, decodings, caplog):
    pipeline = text_pipeline()
    expected, state = draw(pipeline)
    vae = pipeline.vae
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert fastdiff.accelerate(pipeline, backend) is pipeline
        for _ in range(2):
            got, after = draw(pipeline)
            assert relative_error(got, expected) <= 1e-5
            assert torch.equal(after, state)
    assert decodings == [(2, 4, 8, 8)] * 2
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("the network is left to diffusers: conv_in_kernel=1")
    assert pipeline.vae is vae
    assert type(pipeline.vae) is AutoencoderKL
    assert not pipeline._fastdiff.fronts
    pipeline.unaccelerate()
    assert torch.equal(draw(pipeline)[0], expected)
    assert len(decodings) == 2


@needs_native
def test_the_decoder_of_a_tiny_autoencoder(decodings, caplog):
    pipeline = text_pipeline(tiny())
    expected, _ = draw(pipeline)
    fastdiff.accelerate(pipeline)
    assert relative_error(draw(pipeline)[0], expected) <= 1e-5
    assert decodings == [(2, 4, 8, 8)]
    pipeline.vae.decoder.layers[0].padding_mode = "circular"
    changed, _ = draw(pipeline)
    assert len(decodings) == 1
    assert relative_error(changed, expected) > 1e-3
    assert "padding_mode = 'circular'" in caplog.text


@needs_native
def test_pipelines_of_diffusers(decodings):
    unet = diffusers_twin(random_unet(change(TINY, in_channels=3)))
    vqvae = autoencoder(VQModel, latent_channels=3, num_vq_embeddings=16)
    ldm = LDMPipeline(vqvae=vqvae, unet=unet, scheduler=DDIMScheduler())
    transformer = randomize_(
        DiTTransformer2DModel(
            num_attention_heads=2, attention_head_dim=4, num_layers=1, sample_size=8, num_embeds_ada_norm=1000,
            out_channels=8,
        )
    ).eval()  # fmt: skip
    dit = DiTPipeline(transformer, autoencoder(), DDIMScheduler(), id2label={0: "cat", 1: "dog"})
    for pipeline, options in ((ldm, {"batch_size": 2}), (dit, {"class_labels": [0, 1]})):
        pipeline.set_progress_bar_config(disable=True)

        def images(pipeline=pipeline, options=options):
            generator = torch.Generator().manual_seed(4)
            return pipeline(**options, num_inference_steps=2, output_type="np", generator=generator).images

        expected = images()
        fastdiff.accelerate(pipeline)
        before = len(decodings)
        assert np.abs(images() - expected).max() <= 1e-4
        assert len(decodings) == before + 1


@needs_native
def test_slices_and_tiles_are_diffusers_own(decodings):
    vae = autoencoder(sample_size=8)
    pipeline = text_pipeline(vae)
    vae.enable_slicing()
    expected = draw(pipeline)[0]
    fastdiff.accelerate(pipeline)
    assert relative_error(draw(pipeline)[0], expected) <= 1e-5
    assert decodings == [(1, 4, 8, 8)] * 2
    vae.disable_slicing()
    vae.enable_tiling()
    decodings.clear()
    expected = draw(text_pipeline(vae))[0]
    assert relative_error(draw(pipeline)[0], expected) <= 1e-5
    assert len(decodings) > 2


@needs_native
def test_changes_between_calls(decodings):
    pipeline = fastdiff.accelerate(text_pipeline())
    draw(pipeline)
    vae = pipeline.vae
    vae.decoder.conv_in.weight.data.mul_(1.5)
    vae.decoder.mid_block.attentions[0].to_v = torch.nn.Linear(32, 32).requires_grad_(False)
    assert relative_error(draw(pipeline)[0], draw(text_pipeline(vae))[0]) <= 1e-5
    pipeline.vae = other = autoencoder(seed=5)
    assert relative_error(draw(pipeline)[0], draw(text_pipeline(other))[0]) <= 1e-5
    vae.decoder.conv_in.weight.data.mul_(0.5)  # no longer the pipeline's
    assert relative_error(draw(pipeline)[0], draw(text_pipeline(other))[0]) <= 1e-5
    assert len(decodings) == 4


def _replace_forward(vae):
    vae.decoder.up_blocks[1].forward = vae.decoder.up_blocks[1].forward


def _change_eps(vae):
    vae.decoder.conv_norm_out.eps = 0.5


def _hook(vae):
    vae.decoder.conv_out.register_forward_hook(lambda m, a, out: out + 1)


def _circular(vae):
    for m in vae.decoder.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.padding_mode = "circular"


def _fused(vae):
    vae.decoder.mid_block.attentions[0].fuse_projections()
    vae.decoder.mid_block.attentions[0].set_processor(FusedAttnProcessor2_0())


def _processor(vae):
    class Own(AttnProcessor):
        pass

    vae.decoder.mid_block.attentions[0].set_processor(Own())


def _replaced(vae):
    class Other(torch.nn.Module):
        def forward(self, z):
            return torch.nn.functional.interpolate(z[:, :3], scale_factor=2.0)

    vae.decoder = Other()


def _more(vae):
    vae.decoder.up_blocks[0].resnets.append(copy.deepcopy(vae.decoder.up_blocks[0].resnets[0]))


@needs_native
@pytest.mark.parametrize(
    ("when", "change_it", "words"),
    [
        ("before", _change_eps, "conv_norm_out.eps = 0.5"),
        ("before", _replaced, "it is a Other, not a Decoder"),
        ("before", lambda vae: vae.double(), "not in float64"),
        ("after", _replace_forward, "up_blocks.1.forward was replaced"),
        ("after", _change_eps, "conv_norm_out.eps = 0.5"),
        ("after", _hook, "conv_out has forward hooks"),
        ("after", _circular, "padding_mode = 'circular'"),
        ("after", _fused, "FusedAttnProcessor2_0"),
        ("after", _processor, "(Own)"),
        ("after", _replaced, "it is a Other, not a Decoder"),
        ("after", _more, "up_blocks.0.resnets.2 was added"),
        ("after", lambda vae: vae.double(), "not in float64"),
        ("after", lambda vae: vae.bfloat16(), "bfloat16 are not repacked"),
    ],
)
def test_a_decoder_that_was_changed_is_left_to_diffusers(when, change_it, words, decodings, caplog):
    pipeline = text_pipeline()
    pipeline.unet = diffusers_twin(random_unet(change(TINY, in_channels=4, out_channels=4)))

    def images(pipeline):
        z = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(2)).to(pipeline.vae.dtype)
        return pipeline.vae.decode(z).sample

    class Decoding(TextPipeline):
        __call__ = torch.no_grad()(images)

    pipeline = Decoding(pipeline.vae, pipeline.unet, pipeline.scheduler)
    if when == "before":
        change_it(pipeline.vae)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline)
        if when == "after":
            pipeline()
            change_it(pipeline.vae)
        for _ in range(2):
            got = pipeline()
    assert torch.equal(got, images(pipeline))
    assert len(decodings) == (when == "after")
    (message,) = [r.getMessage() for r in caplog.records]
    assert message.startswith("the decoder of Decoding.vae is left to diffusers")
    assert words in message


@needs_native
@pytest.mark.parametrize(
    ("vae", "words"),
    [
        (lambda: tiny(act_fn="gelu"), "act_fn='gelu'"),
        (
            lambda: AsymmetricAutoencoderKL(
                down_block_types=("DownEncoderBlock2D",), down_block_out_channels=(32,),
                up_block_types=("UpDecoderBlock2D",), up_block_out_channels=(32,),
            ),
            "a AsymmetricAutoencoderKL is not supported",
        ),
        (
            lambda: autoencoder(VQModel, norm_type="spatial", latent_channels=4, block_out_channels=(32, 32)),
            "norm_type='spatial'",
        ),
        (lambda: autoencoder(act_fn="relu"), "act_fn='relu'"),
    ],
    ids=["tiny", "asymmetric", "spatial", "relu"],
)  # fmt: skip
def test_other_decoders_are_left_to_diffusers(vae, words, caplog):
    unet = diffusers_twin(random_unet(change(TINY, in_channels=4, out_channels=4)))
    pipeline = TextPipeline(vae(), unet, DDIMScheduler())
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline)
        fastdiff.accelerate(pipeline)
    messages = [r.getMessage() for r in caplog.records]
    assert words in messages[0]
    assert "TextPipeline.vae is left to diffusers" in messages[0]
    pipeline.unet = UNet2DConditionModel(**LEFT)
    with pytest.raises(ConfigError, match="conv_in_kernel=1"):
        fastdiff.accelerate(pipeline)


@needs_native
def test_a_decoder_that_is_exchanged_for_another_kind(decodings, caplog):
    pipeline = fastdiff.accelerate(text_pipeline())
    draw(pipeline)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        changed = autoencoder()
        changed.decoder.conv_norm_out.eps = 1e-3
        for other in (tiny(act_fn="gelu"), changed):
            pipeline.vae = other
            plain = TextPipeline(other, pipeline.unet, pipeline.scheduler)
            assert torch.equal(draw(pipeline)[0], draw(plain)[0])
    assert len(decodings) == 1
    messages = [r.getMessage() for r in caplog.records]
    assert len(messages) == 3
    assert "conv_in_kernel" in messages[0]
    assert "act_fn" in messages[1]
    assert "conv_norm_out.eps" in messages[2]
    del pipeline.vae
    assert "vae" not in vars(pipeline)


@needs_native
def test_what_the_engine_cannot_do_in_the_same_way(decodings):
    vae = autoencoder()
    pipeline = fastdiff.accelerate(text_pipeline(vae))
    forward = CoderForward(vae.decoder, lambda reason: None, pipeline._fastdiff.coders["vae", "decoder"])
    z = latents(vae, 1, 4, 4)
    expected = vae.decoder(z)
    assert relative_error(forward(z), expected) <= 1e-5
    assert len(decodings) == 1
    leaf = z.clone().requires_grad_()
    forward(leaf).sum().backward()
    assert leaf.grad is not None
    with torch.no_grad():
        assert relative_error(forward(leaf), expected) <= 1e-5
    assert len(decodings) == 2
    vae.decoder.double()  # as a pipeline that converts its autoencoder before decoding
    assert forward(z.double()).dtype == torch.float64
    vae.decoder.float()
    assert relative_error(forward(z), expected) <= 1e-5
    assert len(decodings) == 3


@needs_native
def test_a_decoding_that_fails_is_left_to_diffusers(monkeypatch, caplog):
    pipeline = text_pipeline()
    expected, _ = draw(pipeline)
    fastdiff.accelerate(pipeline)

    def fail(self, z):
        raise fastdiff.errors.BackendError("no memory")

    monkeypatch.setattr(NativeCoder, "__call__", fail)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert torch.equal(draw(pipeline)[0], expected)
        draw(pipeline)
    assert [r.getMessage() for r in caplog.records].count("a decoding is left to diffusers: no memory") == 1


@needs_native
def test_backends_that_run_no_decoder(decodings):
    for backend in ("eager", "compiled"):
        with pytest.raises(ConfigError, match="UNet2DConditionModel"):
            fastdiff.accelerate(text_pipeline(), backend)
    pipeline = text_pipeline()
    pipeline.unet = diffusers_twin(random_unet(change(TINY, in_channels=4, out_channels=4)))
    fastdiff.accelerate(pipeline, "eager")
    assert not pipeline._fastdiff.coders
    assert not decodings


def test_copies_and_missing_parts():
    pipeline = text_pipeline()
    if extension() is not None:
        fastdiff.accelerate(pipeline)
    copied = copy.copy(pipeline)
    assert copied.vae is pipeline.vae
    assert not hasattr(pipeline, "vqvae")
    assert pipeline.components.keys() == {"vae", "unet", "scheduler"}
