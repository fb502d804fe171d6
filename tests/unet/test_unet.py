"""The U-Net compared with diffusers' UNet2DModel, with itself in float64, and with formulas written out here."""

from __future__ import annotations

import dataclasses
import json
import math
import shutil

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.unet import UNet
from fastdiff.unet.config import OWN_FIELDS, UNetConfig
from fastdiff.unet.model import Attention, ResnetBlock, timestep_embedding
from tests.support.unets import (
    ATTENTION_EVERYWHERE,
    NO_ATTENTION,
    OWN_VARIANTS,
    PUBLISHED,
    THREE_LEVELS,
    TINY,
    TINY_CLASSES,
    VARIANTS,
    change,
    configs,
    diffusers_twin,
    random_images,
    random_labels,
    random_unet,
    randomize_,
    relative_error,
)

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)


@torch.no_grad()
def assert_equals_diffusers(
    config: UNetConfig, size: tuple[int, int] | None = None, batch: int = 2, seed: int = 0
) -> torch.Tensor:
    """Assert that diffusers' network has an equal state dict and output; return its output."""
    unet = random_unet(config, seed)
    twin = diffusers_twin(unet)
    ours, theirs = unet.state_dict(), UNet2DModel.state_dict(twin)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    x, t, labels = random_images(config, batch, size), torch.tensor([3, 917])[:batch], random_labels(config, batch)
    expected = twin(x, t, class_labels=labels).sample
    assert relative_error(unet(x, t, labels), expected) <= 1e-5
    return expected


# Equality with diffusers ----------------------------------------------------------------------------------------------


def test_random_weights_are_nowhere_zero():
    for config in (TINY_CLASSES, change(TINY_CLASSES, class_image="concat")):
        assert all(bool((p != 0).all()) for p in random_unet(config).parameters())


def test_cifar_network():
    check_published("ddpm-cifar10-32", 328, 35_746_307, 32)


@pytest.mark.parametrize("size", [64, pytest.param(256, marks=pytest.mark.slow)])
def test_celebahq_network(size):
    check_published("ddpm-celebahq-256", 450, 113_673_219, size)


def check_published(name, tensors, parameters, size):
    with torch.device("meta"):
        empty = UNet(PUBLISHED[name])
    assert len(empty.state_dict()) == tensors
    assert sum(p.numel() for p in empty.parameters()) == parameters
    expected = assert_equals_diffusers(PUBLISHED[name], (size, size), batch=2 if size == 32 else 1)
    assert expected.std() > 1e-2


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    config = change(**VARIANTS[variant])
    if variant != "tiny":
        assert config != TINY
    assert assert_equals_diffusers(config).std() > 1e-2


@settings(max_examples=25)
@given(config=configs(), seed=st.integers(0, 1000))
def test_generated_configurations(config, seed):
    assert_equals_diffusers(config, seed=seed)


@torch.no_grad()
def test_more_than_one_downsampling_and_fractional_timesteps_agree_with_diffusers():
    unet = random_unet(change(**THREE_LEVELS))
    x, t = random_images(TINY, 3), torch.tensor([0.25, 499.5, 998.875])
    assert relative_error(unet(x, t), diffusers_twin(unet)(x, t).sample) <= 1e-5


# Float64 is the truth -------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "config",
    [TINY, change(**VARIANTS["scale-shift with classes"]), change(TINY_CLASSES, class_image="concat")],
    ids=["tiny", "scale-shift with classes", "class image"],
)
def test_float32_is_close_to_float64(config):
    unet, x = random_unet(config), random_images(config, 3)
    t, labels = torch.tensor([0.0, 4.5, 999.0]), random_labels(config, 3)
    single = unet(x, t, labels)
    double = unet.double()(x.double(), t.double(), labels)
    assert torch.equal(unet(x.double(), t, labels), double)
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert 0 < relative_error(single, double) <= 1e-5


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 0.01), (torch.bfloat16, 0.06)])
@pytest.mark.parametrize("class_image", [None, "multiply"])
def test_half_precision_networks(dtype, tolerance, class_image):
    config = change(TINY_CLASSES, class_image=class_image)
    unet, x = random_unet(config), random_images(config, 3).to(dtype)
    t, labels = torch.tensor([1, 500, 999]), random_labels(config, 3)
    expected = unet(x.float(), t, labels)
    out = unet.to(dtype)(x, t, labels)
    assert out.dtype == dtype
    assert relative_error(out, expected) <= tolerance


# Timesteps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dim", [2, 7, 16])
@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("shift", [0, 0.5])
def test_timestep_embedding(dim, flip, shift):
    """sin and cos of t 10000^(-i / (dim/2 - shift)), written out in Python floats."""
    for t in (0.0, 1.0, 17.25, 999.0):
        half = dim // 2
        angles = [t * 10000 ** (-i / (half - shift)) for i in range(half)]
        sines, cosines = [math.sin(a) for a in angles], [math.cos(a) for a in angles]
        expected = (cosines + sines if flip else sines + cosines) + [0.0] * (dim % 2)
        for dtype in (torch.float32, torch.float64, torch.int64) if t == int(t) else (torch.float32, torch.float64):
            got = timestep_embedding(torch.tensor([t]).to(dtype), dim, flip_sin_to_cos=flip, freq_shift=shift)
            assert got.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
            assert got.shape == (1, dim)
            assert (
                np.abs(got[0].double().numpy() - expected).max() < 2e-4
            )  # the frequencies are float32, as in diffusers


@torch.no_grad()
@pytest.mark.parametrize("class_image", [None, "add", "multiply", "concat"])
def test_every_image_has_its_own_timestep_and_label(class_image):
    config = change(TINY_CLASSES, class_image=class_image)
    unet, x = random_unet(config), random_images(config, 1).expand(5, -1, -1, -1)
    t, labels = torch.tensor([0.0, 0.0, 10.5, 999.0, 10.5]), torch.tensor([0, 3, 3, 3, 4])
    together = unet(x, t, labels)
    for b in range(5):
        alone = unet(x[b : b + 1], t[b : b + 1], labels[b : b + 1])
        assert relative_error(together[b : b + 1], alone) <= 1e-5
        for other in range(b):
            assert relative_error(together[b], together[other]) > 1e-2


@torch.no_grad()
def test_fractional_timesteps_are_not_truncated():
    unet, x = random_unet(TINY), random_images(TINY)
    at = {t: unet(x, t) for t in (10.0, 10.5, 11.0)}
    assert relative_error(at[10.5], at[10.0]) > 1e-3
    assert relative_error(at[10.5], at[11.0]) > 1e-3
    assert torch.equal(at[10.5], unet(x, torch.tensor(10.5)))
    assert torch.equal(at[10.5], unet(x, torch.tensor([10.5, 10.5])))
    assert torch.equal(at[10.0], unet(x, 10))
    assert torch.equal(at[10.0], unet(x, torch.tensor([10, 10])))


def test_embedding_is_the_vector_that_forward_uses():
    """Blocks receive time and class through `embedding` alone, so a sampler may tabulate it."""
    unet, x = random_unet(TINY_CLASSES), random_images(TINY)
    t, labels = torch.tensor([5.0, 600.5]), torch.tensor([1, 2])
    emb = unet.embedding(t, labels)
    w = {k: v.double() for k, v in unet.state_dict().items()}
    s = timestep_embedding(t, 8, flip_sin_to_cos=True, freq_shift=0).double()
    h = s @ w["time_embedding.linear_1.weight"].T + w["time_embedding.linear_1.bias"]
    h = h / (1 + torch.exp(-h))
    h = h @ w["time_embedding.linear_2.weight"].T + w["time_embedding.linear_2.bias"]
    assert relative_error(emb, h + w["class_embedding.weight"][labels]) <= 1e-5
    heard = []
    for block in unet.modules():
        if isinstance(block, ResnetBlock):
            block.register_forward_pre_hook(lambda module, args: heard.append(args[1]))
    unet(x, t, labels)
    assert len(heard) == 8
    assert all(torch.equal(e, emb) for e in heard)


# Classes --------------------------------------------------------------------------------------------------------------


def resize_matrix(size: int) -> torch.Tensor:
    """Bilinear interpolation from 8 pixels: output pixel i lies at (i + 0.5) * 8 / size - 0.5, clamped to the edge."""
    matrix = torch.zeros(size, 8, dtype=torch.float64)
    for i in range(size):
        position = min(max((i + 0.5) * 8 / size - 0.5, 0.0), 7.0)
        low = min(int(position), 6)
        matrix[i, low] += 1 - (position - low)
        matrix[i, low + 1] += position - low
    return matrix


@torch.no_grad()
@pytest.mark.parametrize("size", [(8, 8), (12, 20), (4, 16)])
@pytest.mark.parametrize("class_image", ["add", "multiply", "concat"])
def test_class_image(class_image, size):
    """image = resize(W2 silu(W1 E[label] + b1) + b2); x + image, x (1 + image), [x, image] go into a plain network."""
    config = change(TINY_CLASSES, class_image=class_image)
    unet = random_unet(config).double()
    x, t, labels = random_images(config, 3, size).double(), torch.tensor([0.0, 300.0, 999.0]), torch.tensor([0, 2, 4])

    w = unet.state_dict()
    assert w["class_encoder.embedding.weight"].shape == (5, 32)
    h = w["class_encoder.embedding.weight"][labels] @ w["class_encoder.linear_1.weight"].T
    h = h + w["class_encoder.linear_1.bias"]
    h = h / (1 + torch.exp(-h))
    h = h @ w["class_encoder.linear_2.weight"].T + w["class_encoder.linear_2.bias"]
    image = resize_matrix(size[0]) @ h.reshape(3, 3, 8, 8) @ resize_matrix(size[1]).T
    assert image.std() > 0.1
    given = {"add": x + image, "multiply": x + x * image, "concat": torch.cat([x, image], 1)}[class_image]

    plain = random_unet(change(in_channels=6 if class_image == "concat" else 3)).double()
    plain.load_state_dict({k: v for k, v in w.items() if not k.startswith("class_encoder.")})
    assert relative_error(unet(x, t, labels), plain(given, t)) <= 1e-12


@torch.no_grad()
def test_centered_input_precedes_the_class_image():
    config = change(TINY_CLASSES, class_image="add", center_input_sample=True)
    unet = random_unet(config)
    centered = random_unet(change(config, center_input_sample=False))
    x, labels = random_images(config), torch.tensor([0, 1])
    assert torch.equal(unet(x, 3, labels), centered(2 * x - 1, 3, labels))


@torch.no_grad()
@pytest.mark.parametrize("class_image", [None, "add", "multiply", "concat"])
@pytest.mark.parametrize("scale_shift", ["default", "scale_shift"])
def test_every_label_changes_the_output(class_image, scale_shift):
    config = change(TINY_CLASSES, class_image=class_image, resnet_time_scale_shift=scale_shift)
    unet, x = random_unet(config), random_images(config, 1)
    outputs = [unet(x, 100, torch.tensor([label])) for label in range(5)]
    for i in range(5):
        for j in range(i):
            assert relative_error(outputs[i], outputs[j]) > 1e-2


def test_class_encoders_learn_from_the_first_step():
    for class_image in ("add", "multiply", "concat"):
        config = change(TINY_CLASSES, class_image=class_image)
        torch.manual_seed(0)
        unet = UNet(config)
        unet(random_images(config), 10, torch.tensor([0, 3])).square().mean().backward()
        assert all(p.grad is not None and p.grad.abs().max() > 0 for p in unet.class_encoder.parameters())
        used = unet.class_encoder.embedding.weight.grad.abs().amax(1) > 0
        assert used.tolist() == [True, False, False, True, False]


@pytest.mark.parametrize(
    ("changes", "classes", "conditional"),
    [
        ({}, None, False),
        ({"num_class_embeds": 5}, 5, True),
        ({"num_class_embeds": 5, "null_label": 4}, 4, True),
        ({"num_class_embeds": 5, "null_label": 4, "class_image": "add"}, 4, True),
        ({"num_class_embeds": 1}, 1, True),
        ({"class_embed_type": "timestep"}, None, True),
        ({"class_embed_type": "identity", "num_class_embeds": 5}, None, True),
    ],
)
def test_number_of_classes(changes, classes, conditional):
    config = change(**changes)
    assert config.num_classes == classes
    assert config.conditional is conditional


@pytest.mark.parametrize("class_image", [None, "add"])
def test_labels_are_needed_and_refused(class_image):
    with pytest.raises(InvalidArgument, match="needs class_labels"):
        random_unet(change(TINY_CLASSES, class_image=class_image))(random_images(TINY), 3)
    with pytest.raises(InvalidArgument, match="takes no class_labels"):
        random_unet(TINY)(random_images(TINY), 3, torch.tensor([0, 1]))


@pytest.mark.parametrize("size", [(9, 8), (8, 7)])
def test_sizes_that_halving_does_not_restore_are_refused(size):
    with pytest.raises(InvalidArgument, match=f"multiples of 2 .*{size[0]}x{size[1]}"):
        random_unet(TINY)(random_images(TINY, size=size), 3)


@pytest.mark.parametrize("levels", [1, 2, 3])
def test_stride(levels):
    types = {"down_block_types": ("DownBlock2D",) * levels, "up_block_types": ("UpBlock2D",) * levels}
    assert change(block_out_channels=(8,) * levels, **types).stride == 2 ** (levels - 1)


# Options that diffusers does not have ---------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize(
    "variant", ["two heads at every level", "scaled timesteps", "scaled blocks", "circular padding"]
)
def test_own_options_are_heard(variant):
    """With the same weights, the option changes the output."""
    config, x, t = change(**OWN_VARIANTS[variant]), random_images(TINY), torch.tensor([3, 917])
    plain = {k: v for k, v in OWN_VARIANTS[variant].items() if k not in OWN_FIELDS}
    unet, other = random_unet(config), random_unet(change(**plain))
    other.load_state_dict(unet.state_dict())
    assert relative_error(unet(x, t), other(x, t)) > 1e-3


def test_own_options_change_the_shapes():
    wider = random_unet(change(**OWN_VARIANTS["a wider sinusoid"]))
    assert wider.time_embedding.linear_1.weight.shape == (48, 12)
    assert wider.conv_in.weight.shape[0] == 8
    last = random_unet(change(**OWN_VARIANTS["attention behind the last block"]))
    assert [len(block.attentions) for block in last.down_blocks] == [2, 2]
    assert [len(block.attentions) for block in last.up_blocks] == [1, 1]
    shortcuts = random_unet(change(**OWN_VARIANTS["shortcuts that resample"]))
    resampling = [m for m in shortcuts.modules() if isinstance(m, ResnetBlock) and m.resample]
    assert len(resampling) == 2
    assert all(m.conv_shortcut.weight.shape[:2] == m.conv1.weight.shape[:2] for m in resampling)


@torch.no_grad()
def test_scaled_timesteps_and_blocks():
    x, t = random_images(TINY), torch.tensor([40.0, 900.0])
    scaled = random_unet(change(timestep_scale=0.25))
    assert torch.equal(scaled(x, t), random_unet(TINY)(x, t / 4))
    # diffusers has this factor in all blocks, but lets the configuration set only that of the mid block.
    unet = random_unet(change(block_scale_factor=2.0, mid_block_scale_factor=2.0))
    twin = diffusers_twin(random_unet(change(mid_block_scale_factor=2.0)))
    for block in (*twin.down_blocks, *twin.up_blocks):
        for module in block.modules():
            if hasattr(module, "output_scale_factor"):
                module.output_scale_factor = 2.0
            if hasattr(module, "rescale_output_factor"):
                module.rescale_output_factor = 2.0
    assert relative_error(unet(x, t), twin(x, t).sample) <= 1e-5


@torch.no_grad()
def test_number_of_heads_and_their_width_say_the_same():
    a = random_unet(change(num_attention_heads=2))
    b = random_unet(change(attention_head_dim=8))
    assert torch.equal(a(random_images(TINY), 3), b(random_images(TINY), 3))
    blocks = random_unet(change(**ATTENTION_EVERYWHERE, num_attention_heads=2)).modules()
    assert {(m.heads, m.head_dim) for m in blocks if isinstance(m, Attention)} == {(2, 4), (2, 8)}


@pytest.mark.parametrize("codebase", ["diffusers", "ho", "openai"])
def test_conventions(codebase):
    """The quirks of a code base: eps, the sinusoid, the padding of downsampling, one head."""
    config = UNetConfig.like(codebase, block_out_channels=(32, 64, 64, 64), sample_size=16)
    assert config.sample_size == 16
    said = (config.norm_eps, config.flip_sin_to_cos, config.freq_shift, config.downsample_padding)
    assert said == {"ho": (1e-6, False, 1, 0)}.get(codebase, (1e-5, True, 0, 1))
    assert config.attention_head_dim == (None if codebase == "ho" else 8)
    assert UNetConfig.like(codebase, norm_eps=0.1).norm_eps == 0.1
    with pytest.raises(ConfigError, match="'guess' is unknown; allowed: diffusers, ho, openai"):
        UNetConfig.like("guess")


# Initial state --------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", ["tiny", "24x40", "resnet resampling", "scale-shift with classes"])
def test_zeroed_residuals(name):
    config = change(**VARIANTS[name])
    unet = random_unet(config)
    x, labels = random_images(config), random_labels(config, 2)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    blocks = [(n, m) for n, m in unet.named_modules() if isinstance(m, (ResnetBlock, Attention))]
    seen = []
    for _, block in blocks:
        block.register_forward_hook(lambda module, args, out: seen.append((module, args[0], out)))
    assert unet(x, 500, labels).abs().max() > 0
    assert not any(torch.equal(given, out) for _, given, out in seen)

    seen.clear()
    assert unet.zero_residuals_() is unet
    assert torch.equal(unet(x, 500, labels), torch.zeros(2, 3, *x.shape[2:]))
    assert len(seen) == len(blocks)
    same = [block for block, given, out in seen if out.shape == given.shape and torch.equal(given, out)]
    plain = [b for _, b in blocks if isinstance(b, Attention) or (b.conv_shortcut is None and b.resample is None)]
    assert {id(b) for b in same} == {id(b) for b in plain}
    assert len(plain) >= 4
    zeroed = {k for k, v in unet.state_dict().items() if not torch.equal(v, before[k])}
    last = [f"{n}.{'to_out.0' if isinstance(m, Attention) else 'conv2'}" for n, m in blocks]
    assert zeroed == {f"{n}.{p}" for n in [*last, "conv_out"] for p in ("weight", "bias")}


# Configuration --------------------------------------------------------------------------------------------------------

ONE_LEVEL = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
NAN, INF = float("nan"), float("inf")
BAD = [
    # (changes, and three things that the message must contain: the key, the value and what is allowed)
    *[({k: v}, k, v, "1 to") for k in ("in_channels", "out_channels", "norm_num_groups") for v in (0, -1, 2.0, True)],
    *[({"layers_per_block": v}, "layers_per_block", v, "1 to 16") for v in (0, 17, 1 << 40, "2", None, False)],
    ({"in_channels": None}, "in_channels", None, "a whole number"),
    ({"in_channels": 1 << 21}, "in_channels", 1 << 21, "1048576"),
    *[({k: 0}, k, 0, "1 to") for k in ("time_embedding_dim", "attention_head_dim", "attn_norm_num_groups")],
    ({"num_class_embeds": 0}, "num_class_embeds", 0, "1 to"),
    ({"num_class_embeds": "5"}, "num_class_embeds", "5", "a whole number"),
    ({"sample_size": 0}, "sample_size height", 0, "1 to"),
    ({"sample_size": (8, -8)}, "sample_size width", -8, "1 to"),
    ({"sample_size": (8, 8, 8)}, "sample_size", (8, 8, 8), "a number or two (height, width)"),
    ({"sample_size": "8"}, "sample_size height", "8", "a whole number"),
    ({"block_out_channels": ()}, "block_out_channels", (), "1 to 16 entries"),
    ({"block_out_channels": 8}, "block_out_channels", 8, "1 to 16 entries"),
    ({"block_out_channels": "88"}, "block_out_channels", "88", "1 to 16 entries"),
    ({"block_out_channels": (8,) * 17}, "block_out_channels", "(8, 8, 8", "1 to 16 entries"),
    ({"block_out_channels": (8, 0)}, "block_out_channels[1]", 0, "1 to"),
    ({"block_out_channels": (8, 16.0)}, "block_out_channels[1]", 16.0, "a whole number"),
    ({"block_out_channels": (8, 18)}, "block_out_channels[1]", 18, "norm_num_groups=4"),
    ({"block_out_channels": (8, 16, 16)}, "down_block_types", 2, "3"),
    ({"down_block_types": ("DownBlock2D",)}, "down_block_types", 1, "2"),
    ({"up_block_types": ("UpBlock2D",) * 3}, "up_block_types", 3, "2"),
    ({"down_block_types": None}, "down_block_types", None, "a list"),
    (
        {"down_block_types": ("DownBlock2D", "KDownBlock2D")},
        "down_block_types",
        "KDownBlock2D",
        "AttnDownBlock2D",
    ),
    ({"up_block_types": ("UpBlock2D", "DownBlock2D")}, "up_block_types", "DownBlock2D", "ResnetUpsampleBlock2D"),
    ({"up_block_types": ("UpBlock2D", None)}, "up_block_types", None, "ResnetUpsampleBlock2D"),
    ({"attention_head_dim": 17}, "attention_head_dim", 17, "block_out_channels[1]=16"),
    ({"attn_norm_num_groups": 3}, "attn_norm_num_groups", 3, "block_out_channels[1]=16"),
    *[({"dropout": v}, "dropout", v, "0 <= dropout < 1") for v in (-0.1, 1.0, 1)],
    *[({"dropout": v}, "dropout", v, "a finite number") for v in (NAN, "0.1", None, True)],
    *[({"norm_eps": v}, "norm_eps", v, "positive") for v in (0, 0.0, -1e-5)],
    *[({"norm_eps": v}, "norm_eps", v, "a finite number") for v in (NAN, INF, "1e-5", None)],
    *[({"mid_block_scale_factor": v}, "mid_block_scale_factor", v, "but 0") for v in (0, 0.0)],
    *[({"mid_block_scale_factor": v}, "mid_block_scale_factor", v, "finite") for v in (NAN, -INF, "1", None)],
    *[({"freq_shift": v}, "freq_shift", v, "freq_shift < 4") for v in (4, 5, -1)],
    *[({"freq_shift": v}, "freq_shift", v, "a finite number") for v in (NAN, None, "1")],
    ({"block_out_channels": (1,), "norm_num_groups": 1, **ONE_LEVEL}, "freq_shift", 0, "half of block_out_channels[0]"),
    ({"time_embedding_type": "learned"}, "time_embedding_type", "learned", "'positional'"),
    (
        {"mid_block_type": "UNetMidBlock2DCrossAttn"},
        "mid_block_type",
        "UNetMidBlock2DCrossAttn",
        "'UNetMidBlock2D', None",
    ),
    *[({"downsample_padding": v}, "downsample_padding", v, "0, 1") for v in (2, -1, None, True, 1.0, [1])],
    ({"downsample_type": "pool"}, "downsample_type", "pool", "'conv', 'resnet'"),
    ({"upsample_type": None}, "upsample_type", None, "'conv', 'resnet'"),
    ({"act_fn": "relu"}, "act_fn", "relu", "'silu', 'swish'"),
    ({"act_fn": "gelu"}, "act_fn", "gelu", "'silu', 'swish'"),
    ({"act_fn": "mish"}, "act_fn", "mish", "'silu', 'swish'"),
    ({"time_embedding_type": "learned"}, "time_embedding_type", "learned", "'positional'"),
    ({"resnet_time_scale_shift": "ada_group"}, "resnet_time_scale_shift", "ada_group", "'default', 'scale_shift'"),
    ({"class_embed_type": "projection"}, "class_embed_type", "projection", "None, 'timestep', 'identity'"),
    ({"class_image": "mul", "num_class_embeds": 3}, "class_image", "mul", "None, 'add', 'multiply', 'concat'"),
    *[({k: "false"}, k, "false", "False, True") for k in ("center_input_sample", "flip_sin_to_cos", "add_attention")],
    *[({k: 1}, k, 1, "False, True") for k in ("center_input_sample", "flip_sin_to_cos", "add_attention")],
    ({"class_image": "add"}, "class_image", "add", "needs num_class_embeds"),
    (
        {"class_image": "add", "num_class_embeds": 3, "class_embed_type": "timestep"},
        "class_image",
        "add",
        "class_embed_type=None",
    ),
    ({"null_label": 3}, "null_label", 3, "needs num_class_embeds"),
    (
        {"null_label": 3, "num_class_embeds": 4, "class_embed_type": "identity"},
        "null_label",
        3,
        "class_embed_type=None",
    ),
    *[({"null_label": v, "num_class_embeds": 5}, "null_label", v, "num_class_embeds - 1 = 4") for v in (0, 5, -1, 4.0)],
    *[({k: 0}, k, 0, "1 to") for k in ("num_attention_heads", "sinusoid_dim")],
    ({"num_attention_heads": 3}, "num_attention_heads", 3, "block_out_channels[1]=16"),
    ({"sinusoid_dim": 2, "freq_shift": 1}, "freq_shift", 1, "half of sinusoid_dim"),
    *[({k: 0.0}, k, 0.0, "but 0") for k in ("timestep_scale", "block_scale_factor")],
    *[({k: NAN}, k, NAN, "finite") for k in ("timestep_scale", "block_scale_factor")],
    ({"up_attention": "first"}, "up_attention", "first", "'all', 'last'"),
    ({"resample_shortcut": 1}, "resample_shortcut", 1, "False, True"),
    ({"class_before_mlp": True, "num_class_embeds": 5}, "class_before_mlp", True, "needs num_class_embeds, null_label"),
    (
        {"class_before_mlp": True, "num_class_embeds": 5, "null_label": 4, "class_image": "add"},
        "class_before_mlp",
        True,
        "class_image=None",
    ),
    (
        {"class_before_mlp": True, "num_class_embeds": 1, "null_label": 0},
        "class_before_mlp",
        True,
        "a class besides the null label",
    ),
    ({"class_before_mlp": 1}, "class_before_mlp", 1, "False, True"),
    ({"null_label": True, "num_class_embeds": 2}, "null_label", True, "num_class_embeds - 1 = 1"),
]


@pytest.mark.parametrize(("changes", "key", "value", "allowed"), BAD, ids=lambda v: str(v)[:40])
def test_bad_configurations(changes, key, value, allowed):
    with pytest.raises(ConfigError) as caught:
        change(**changes)
    message = str(caught.value)
    assert key in message
    assert str(value) in message
    assert allowed in message
    with pytest.raises(ConfigError) as caught:
        UNetConfig.from_dict({**TINY.to_dict(), **changes})
    assert str(caught.value) == message


def test_unneeded_limits_are_not_held():
    """A field that no block of the network reads may have any value that diffusers accepts."""
    assert_equals_diffusers(change(attention_head_dim=17, **NO_ATTENTION, add_attention=False))
    assert_equals_diffusers(change(attn_norm_num_groups=3, add_attention=False))
    assert_equals_diffusers(change(attn_norm_num_groups=3, mid_block_type=None))


@pytest.mark.parametrize("variant", [*VARIANTS, *OWN_VARIANTS])
def test_configuration_round_trip(variant):
    config = change(**{**VARIANTS, **OWN_VARIANTS}[variant])
    again = UNetConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert again == config
    assert hash(again) == hash(config)


def test_fastdiff_keys_round_trip_and_are_absent_when_unset():
    config = change(TINY_CLASSES, class_image="concat")
    assert UNetConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict()["null_label"] == 4
    assert {"null_label", "class_image"}.isdisjoint(TINY.to_dict())


def test_defaults_are_those_of_diffusers():
    with torch.device("meta"):
        theirs = dict(UNet2DModel().config)
    ours = UNetConfig().to_dict()
    theirs = {k: list(v) if isinstance(v, tuple) else v for k, v in theirs.items() if not k.startswith("_")}
    assert ours == theirs
    assert UNetConfig.from_dict(theirs) == UNetConfig()


@torch.no_grad()
@pytest.mark.parametrize("name", ["24x40", "scale-shift with classes", "identity class", "no mid block"])
def test_diffusers_configuration_files(name, tmp_path):
    """diffusers reads our configuration, and we read the file that it writes."""
    config = change(**VARIANTS[name])
    twin = UNet2DModel.from_config(config.to_dict())
    twin.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["_class_name"] == "UNet2DModel"
    assert UNetConfig.from_dict(written) == config
    randomize_(twin, 3).eval()
    unet = UNet(UNetConfig.from_dict(written)).eval()
    unet.load_state_dict(twin.state_dict())
    x, labels = random_images(config), random_labels(config, 2)
    t = torch.tensor([1, 700])
    assert relative_error(unet(x, t, labels), twin(x, t, class_labels=labels).sample) <= 1e-5


def test_unknown_keys_are_named():
    with pytest.raises(ConfigError, match=r"ch_mult, resnet_eps.*allowed: .*block_out_channels"):
        UNetConfig.from_dict({"resnet_eps": 1e-6, "ch_mult": [1, 2], "_class_name": "UNetModel", "in_channels": 3})


def test_integers_of_numpy_become_pythons():
    sizes = {"in_channels": 3, "norm_num_groups": 4, "num_class_embeds": 5, "null_label": 4, "attention_head_dim": 8}
    config = change(
        **{key: np.int64(value) for key, value in sizes.items()},
        block_out_channels=tuple(np.array([8, 16])),
        sample_size=(np.int32(8), np.uint8(16)),
    )
    assert config == change(**sizes, sample_size=(8, 16))
    assert json.loads(json.dumps(config.to_dict())) == change(**sizes, sample_size=(8, 16)).to_dict()


@pytest.mark.parametrize("value", [None, [], "UNet2DModel", 3])
def test_configurations_are_mappings(value):
    with pytest.raises(ConfigError, match=type(value).__name__):
        UNetConfig.from_dict(value)


def test_configuration_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TINY.in_channels = 4
    config = UNetConfig.from_dict(TINY.to_dict())
    assert isinstance(config.block_out_channels, tuple)
    assert {config: 1}[TINY] == 1
    assert config != change(norm_eps=1e-4)


# Compilation ----------------------------------------------------------------------------------------------------------

COMPILED = {
    "tiny": {},
    "classes, scale-shift, resnet blocks": VARIANTS["scale-shift with classes"],
    "class image": {"num_class_embeds": 5, "null_label": 4, "class_image": "concat"},
}


def check_compiled(config, backend):
    unet, x, t, labels = random_unet(config), random_images(config), torch.tensor([3.5, 800]), random_labels(config, 2)
    torch.compiler.reset()
    with torch.no_grad():
        assert (
            relative_error(torch.compile(unet, fullgraph=True, backend=backend)(x, t, labels), unet(x, t, labels))
            <= 1e-5
        )


def test_is_one_graph():
    check_compiled(change(**COMPILED["class image"]), "eager")


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("name", COMPILED)
def test_compiles(name):
    check_compiled(change(**COMPILED[name]), "inductor")
