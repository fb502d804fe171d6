"""The encoders of autoencoders: compared with diffusers and float64, and run within accelerated pipelines."""

from __future__ import annotations

import copy
import functools
import logging
import random
import re

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel, VQModel
from diffusers.models.attention_processor import AttnProcessor

import fastdiff
from fastdiff.backends.native import NativeCoder, extension
from fastdiff.core.lower import lower_coder
from fastdiff.core.plan import plan
from fastdiff.errors import BackendError, ConfigError
from fastdiff.unet.encoder import Encoder, EncoderConfig
from fastdiff.unet.tiny_encoder import TinyEncoder, TinyEncoderConfig
from tests.support.autoencoders import ALL, SMALL, STABLE_DIFFUSION, autoencoder, images, of_layout, tiny
from tests.support.conditions import TINY as CONDITION
from tests.support.interpreter import Interpreter
from tests.support.unets import randomize_, relative_error

needs_native = pytest.mark.skipif(extension() is None, reason="the native engine is not built")
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # a smaller one proves the same kind
QUICK = ["codebook", "attention behind blocks", "channels and groups", "tiny, odd channels"]
ISAS = [] if extension() is None else extension().isas()
VQ = {
    "latent_channels": 3,
    "num_vq_embeddings": 16,
    "down_block_types": ("DownEncoderBlock2D", "AttnDownEncoderBlock2D"),
}


def ours(vae):
    if isinstance(vae, AutoencoderTiny):
        module = TinyEncoder(TinyEncoderConfig.from_dict(vae.config)).eval().requires_grad_(False)
    else:
        described = EncoderConfig.from_dict(vae.config, double_z=isinstance(vae, AutoencoderKL))
        module = Encoder(described).eval().requires_grad_(False)
    module.load_state_dict(vae.encoder.state_dict())
    return module


def made(layout):
    return autoencoder(VQModel, **VQ) if layout == "codebook" else of_layout(layout)


# The module and its program -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [*ALL, "codebook"])
def test_the_module_equals_diffusers(layout):
    vae = made(layout)
    module = ours(vae)
    for shape in ((2, 14, 12), (1, 13, 7)):  # odd sizes are padded on one side
        x = images(vae, *shape)
        expected = vae.encoder(x)
        assert module(x).shape == expected.shape
        assert relative_error(module(x), expected) <= 1e-5


@pytest.mark.parametrize("layout", [*ALL, "codebook"])
def test_the_program_equals_the_module(layout):
    vae = made(layout)
    module = ours(vae).double()
    for H, W in ((12, 10), (11, 5)):
        x = images(vae, 2, H, W).double()
        run = Interpreter(lower_coder(module, (H, W)), module, 2)
        assert relative_error(run.code(x), module(x)) <= 1e-12


def test_published_layouts_have_the_keys_of_diffusers():
    for changes in (STABLE_DIFFUSION, {**STABLE_DIFFUSION, "latent_channels": 16}):
        with torch.device("meta"):
            vae = AutoencoderKL(**changes)
            module = Encoder(EncoderConfig.from_dict(vae.config))
        shapes = {k: v.shape for k, v in module.state_dict().items()}
        assert shapes == {k: v.shape for k, v in vae.encoder.state_dict().items()}
        layout = plan(lower_coder(module, (512, 512)), 1)
        assert layout.size <= 1.2 * layout.bound


@pytest.mark.parametrize(
    ("kind", "changes", "words"),
    [
        (EncoderConfig, {"act_fn": "relu"}, "act_fn='relu'"),
        (EncoderConfig, {"down_block_types": ("DownBlock2D",) * 2}, "'DownBlock2D'"),
        (EncoderConfig, {"down_block_types": ("DownEncoderBlock2D",)}, "they must agree"),
        (EncoderConfig, {"down_block_types": "DownEncoderBlock2D"}, "down_block_types='DownEncoderBlock2D'"),
        (EncoderConfig, {"block_out_channels": (16, "32")}, r"block_out_channels[1]='32'"),
        (EncoderConfig, {"in_channels": 0}, "in_channels=0"),
        (EncoderConfig, {"layers_per_block": None}, "layers_per_block=None"),
        (EncoderConfig, {"mid_block_add_attention": 1}, "mid_block_add_attention=1"),
        (TinyEncoderConfig, {"act_fn": "gelu"}, "act_fn='gelu'"),
        (TinyEncoderConfig, {"num_encoder_blocks": (1, 1)}, "they must agree"),
        (TinyEncoderConfig, {"num_encoder_blocks": (1, 1, 1, 0)}, "num_encoder_blocks[3]=0"),
        (TinyEncoderConfig, {"encoder_block_out_channels": (8, 8, 8, 16)}, "as many channels"),
        (TinyEncoderConfig, {"in_channels": "3"}, "in_channels='3'"),
    ],
)
def test_configurations_that_are_refused(kind, changes, words):
    with pytest.raises(ConfigError, match=re.escape(words)):
        kind.from_dict({**(SMALL if kind is EncoderConfig else {}), **changes})


# The engine -----------------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("layout", [*QUICK, *(SLOW(layout) for layout in ALL if layout not in QUICK)])
def test_the_engine_is_as_exact_as_diffusers(monkeypatch, layout, isa):
    monkeypatch.setenv("FASTDIFF_ISA", isa)
    vae = made(layout)
    run, wide = NativeCoder(ours(vae)), copy.deepcopy(vae.encoder).double()
    for shape in ((2, 16, 16), (3, 15, 6), (1, 4, 27)):
        x = images(vae, *shape)
        exact, theirs, got = wide(x.double()), vae.encoder(x), run(x)
        assert got.dtype == torch.float32
        assert got.is_contiguous()
        assert relative_error(got, exact) <= max(2 * relative_error(theirs, exact), 5e-6)


def generated(seed):
    """Draw the configuration of an autoencoder."""
    draw = random.Random(seed)
    levels, groups = draw.randint(1, 3), draw.choice([1, 2, 3, 4])
    return {
        "block_out_channels": [groups * draw.randint(2, 8) for _ in range(levels)],
        "down_block_types": [draw.choice(["DownEncoderBlock2D", "AttnDownEncoderBlock2D"]) for _ in range(levels)],
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "layers_per_block": draw.randint(1, 3),
        "norm_num_groups": groups,
        "in_channels": draw.randint(1, 4),
        "latent_channels": draw.choice([1, 3, 4, 16]),
        "mid_block_add_attention": draw.random() < 0.7,
    }


@needs_native
@pytest.mark.parametrize("seed", [*range(3), *map(SLOW, range(3, 100))])
def test_generated_configurations(seed):
    vae = autoencoder(seed=seed, **generated(seed))
    least = 1 << (len(vae.config.block_out_channels) - 1)
    draw = random.Random(seed)
    x = images(vae, draw.randint(1, 3), least + draw.randint(0, 20), least + draw.randint(0, 20), seed=seed)
    module, expected = ours(vae), vae.encoder(x)
    assert relative_error(module(x), expected) <= 1e-5
    assert relative_error(NativeCoder(module)(x), expected) <= 1e-5


# Pipelines ------------------------------------------------------------------------------------------------------------


class Encoding(DiffusionPipeline):
    """A pipeline that encodes and decodes an image; its network is one that is left to diffusers."""

    def __init__(self, vae, unet, scheduler):
        super().__init__()
        self.register_modules(vae=vae, unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(self, x, generator=None, decode=True):
        found = self.vae.encode(x)
        z = found.latent_dist.sample(generator) if "latent_dist" in found else found.latents
        return (z, self.vae.decode(z).sample) if decode else z


@pytest.fixture(scope="module")
def network():
    return randomize_(UNet2DConditionModel(**{**CONDITION, "conv_in_kernel": 1})).eval()


@pytest.fixture
def coded(monkeypatch):
    """The shapes of what the engine encodes and decodes."""
    seen = []
    run = NativeCoder.__call__
    monkeypatch.setattr(NativeCoder, "__call__", lambda self, x: seen.append(tuple(x.shape)) or run(self, x))
    return seen


def result(pipeline, x, **options):
    generator = torch.Generator().manual_seed(3)
    return pipeline(x, generator=generator, **options), generator.get_state()


def logged(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "fastdiff" and "network" not in r.getMessage()]


@needs_native
@pytest.mark.parametrize("kind", ["KL", "codebook", SLOW("tiny")])
def test_an_encoder_in_a_pipeline(kind, network, coded, caplog):
    """With diffusers' own draws of the latents, in the same order."""
    vae = {"KL": autoencoder, "codebook": lambda: autoencoder(VQModel, **VQ), "tiny": tiny}[kind]()
    pipeline, x = Encoding(vae, network, DDIMScheduler()), images(vae, 2, 16, 18)
    (z, image), state = result(pipeline, x)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline)
        for _ in range(2):
            (got, decoded), after = result(pipeline, x)
            assert relative_error(got, z) <= 1e-5
            assert relative_error(decoded, image) <= (1e-4 if kind == "KL" else 1.0)  # a code may be the next one
            assert torch.equal(after, state)
    assert coded == [(2, 3, 16, 18), tuple(z.shape)] * 2
    assert not logged(caplog)
    assert pipeline.vae is vae
    pipeline.unaccelerate()
    assert torch.equal(result(pipeline, x)[0][0], z)
    assert len(coded) == 4


@needs_native
def test_slices_and_tiles_are_diffusers_own(network, coded):
    vae = autoencoder(sample_size=8)
    pipeline, x = Encoding(vae, network, DDIMScheduler()), images(vae, 2, 20, 20)
    vae.enable_slicing()
    expected, _ = result(pipeline, x, decode=False)
    fastdiff.accelerate(pipeline)
    assert relative_error(result(pipeline, x, decode=False)[0], expected) <= 1e-5
    assert coded == [(1, 3, 20, 20)] * 2
    vae.disable_slicing()
    vae.enable_tiling()
    coded.clear()
    expected, _ = result(Encoding(vae, network, DDIMScheduler()), x, decode=False)
    assert relative_error(result(pipeline, x, decode=False)[0], expected) <= 1e-5
    assert len(coded) > 4


@needs_native
def test_changes_between_calls(network, coded):
    pipeline = fastdiff.accelerate(Encoding(autoencoder(), network, DDIMScheduler()))
    x = images(pipeline.vae, 1, 16, 16)
    before, _ = result(pipeline, x, decode=False)
    vae = pipeline.vae
    vae.encoder.conv_in.weight.data.mul_(1.5)  # which bumps no version
    vae.encoder.mid_block.attentions[0].to_v = torch.nn.Linear(32, 32).requires_grad_(False)
    got, _ = result(pipeline, x, decode=False)
    assert relative_error(got, before) > 1e-3
    assert relative_error(got, result(Encoding(vae, network, DDIMScheduler()), x, decode=False)[0]) <= 1e-5
    pipeline.vae = other = autoencoder(seed=5)
    got, _ = result(pipeline, x, decode=False)
    assert relative_error(got, result(Encoding(other, network, DDIMScheduler()), x, decode=False)[0]) <= 1e-5
    assert len(coded) == 3


def _eps(vae):
    vae.encoder.conv_norm_out.eps = 0.5


def _hook(vae):
    vae.encoder.conv_out.register_forward_hook(lambda m, a, out: out + 1)


def _forward(vae):
    vae.encoder.down_blocks[1].forward = vae.encoder.down_blocks[1].forward


def _circular(vae):
    for m in vae.encoder.modules():
        if isinstance(m, torch.nn.Conv2d):
            m.padding_mode = "circular"


def _padding(vae):
    vae.encoder.down_blocks[0].downsamplers[0].padding = 1
    vae.encoder.down_blocks[0].downsamplers[0].conv.padding = (1, 1)


def _processor(vae):
    class Own(AttnProcessor):
        pass

    vae.encoder.mid_block.attentions[0].set_processor(Own())


def _replaced(vae):
    class Other(torch.nn.Module):
        def forward(self, x):
            return torch.cat([x, x, x[:, :2]], dim=1)

    vae.encoder = Other()


def _more(vae):
    vae.encoder.down_blocks[0].resnets.append(copy.deepcopy(vae.encoder.down_blocks[0].resnets[0]))


@needs_native
@pytest.mark.parametrize("when", [SLOW("before"), "after"])
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_eps, "conv_norm_out.eps = 0.5"),
        SLOW(_hook, "conv_out has forward hooks"),
        SLOW(_forward, "down_blocks.1.forward was replaced"),
        SLOW(_circular, "padding_mode = 'circular'"),
        (_padding, "downsamplers.0.padding = 1"),
        SLOW(_processor, "(Own)"),
        SLOW(_replaced, "it is a Other, not a Encoder"),
        SLOW(_more, "down_blocks.0.resnets.1 was added"),
        (lambda vae: vae.encoder.bfloat16(), "bfloat16 are not repacked"),
        SLOW(lambda vae: vae.encoder.double(), "not in float64"),
    ],
)
def test_an_encoder_that_was_changed_is_left_to_diffusers(network, when, change, words, coded, caplog):
    vae = autoencoder()
    pipeline, x = Encoding(vae, network, DDIMScheduler()), images(vae, 1, 16, 16)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline)
        if when == "after":
            pipeline(x, decode=False)
        change(vae)
        vae.quant_conv.to(next(vae.encoder.parameters(), x).dtype)
        x = x.to(vae.quant_conv.weight.dtype)
        for _ in range(2):
            got, _ = result(pipeline, x, decode=False)
    expected, _ = result(Encoding(vae, network, DDIMScheduler()), x, decode=False)
    assert torch.equal(got, expected)
    assert len(coded) == (when == "after")
    (message,) = logged(caplog)
    assert message.startswith("the encoder of Encoding.vae is left to diffusers")
    assert words in message


@needs_native
@pytest.mark.parametrize(
    ("vae", "words"),
    [
        (lambda: autoencoder(act_fn="relu"), "act_fn='relu'"),
        (lambda: tiny(encoder_block_out_channels=(8,), num_encoder_blocks=(0,)), "num_encoder_blocks[0]=0"),
    ],
)
def test_encoders_that_are_not_supported_are_named_when_they_are_called(vae, words, network, coded, caplog):
    vae = vae()
    pipeline, x = Encoding(vae, network, DDIMScheduler()), images(vae, 1, 16, 16)
    expected, _ = result(pipeline, x, decode=False)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(pipeline, strict=False)
        assert not [m for m in logged(caplog) if "encoder of" in m]
        assert torch.equal(result(pipeline, x, decode=False)[0], expected)
        assert torch.equal(result(pipeline, x, decode=False)[0], expected)
    (message,) = [m for m in logged(caplog) if "encoder of" in m]
    assert words in message
    assert not coded


@needs_native
def test_what_the_engine_cannot_do_in_the_same_way(network, monkeypatch, coded, caplog):
    vae = autoencoder()

    class Plain(Encoding):
        def __call__(self, x, change=lambda vae: None):
            change(self.vae)
            return self.vae.encode(x).latent_dist.parameters

    pipeline = fastdiff.accelerate(Plain(vae, network, DDIMScheduler()))
    x = images(vae, 1, 8, 8)
    leaf = x.clone().requires_grad_()
    pipeline(leaf).sum().backward()
    assert leaf.grad is not None
    assert not coded
    with torch.no_grad():
        expected = vae.encode(leaf).latent_dist.parameters
        assert relative_error(pipeline(leaf), expected) <= 1e-5
        assert len(coded) == 1

        def twice(vae):  # a change between two encodings of one call
            vae.encode(x)
            vae.encoder.conv_out.bias = torch.nn.Parameter(vae.encoder.conv_out.bias + 1.0, requires_grad=False)

        changed = pipeline(x, twice)
        assert relative_error(changed, vae.encode(x).latent_dist.parameters) <= 1e-5
        assert relative_error(changed, expected) > 1e-2
        assert len(coded) == 3
        with pytest.raises(RuntimeError):  # diffusers' own error, for an image that is too small
            pipeline(images(vae, 1, 1, 8))

        def fail(self, x):
            raise BackendError("no memory")

        monkeypatch.setattr(NativeCoder, "__call__", fail)
        with caplog.at_level(logging.WARNING, "fastdiff"):
            assert torch.equal(pipeline(x), vae.encode(x).latent_dist.parameters)
    assert "an encoding is left to diffusers: no memory" in logged(caplog)


@needs_native
def test_an_autoencoder_without_an_encoder(network, coded):
    """As users drop it, who only decode."""
    vae = autoencoder()
    vae.encoder = None

    class Decoding(Encoding):
        def __call__(self, z):
            return self.vae.decode(z).sample

    pipeline, z = Decoding(vae, network, DDIMScheduler()), torch.ones(1, 4, 8, 8)
    expected = pipeline(z)
    assert relative_error(fastdiff.accelerate(pipeline)(z), expected) <= 1e-5
    assert coded == [(1, 4, 8, 8)]
