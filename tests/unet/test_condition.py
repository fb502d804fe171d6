"""The text-conditioned U-Net compared with diffusers' UNet2DConditionModel, and with itself in float64."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st

import fastdiff
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.unet import UNetCondition, UNetConditionConfig
from fastdiff.unet.transformer import TextAttention
from tests.support.conditions import (
    LOGITS,
    TINY,
    VARIANTS,
    config,
    diffusers_condition,
    diffusers_output,
    random_condition,
    random_inputs,
)
from tests.support.unets import relative_error

SD15 = {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8}
SD21 = {
    **SD15, "cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True,
    "upcast_attention": True, "num_class_embeds": None, "only_cross_attention": False, "dual_cross_attention": False,
}  # fmt: skip
SDXL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "use_linear_projection": True, "transformer_layers_per_block": [1, 2, 10],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
# The networks of other published models: distilled ones, an upscaler, unCLIP, LCM, refiner.
SSD1B = {
    **SDXL, "transformer_layers_per_block": [1, [2, 2], [4, 4]],
    "reverse_transformer_layers_per_block": [[4, 4, 10], [2, 1, 1], 1], "mid_block_type": "UNetMidBlock2D",
}  # fmt: skip
SMALL_SD = {**SD15, "layers_per_block": 1, "mid_block_type": None}
UPSCALER = {
    **SD21, "in_channels": 7, "block_out_channels": [256, 512, 512, 1024], "attention_head_dim": 8,
    "num_class_embeds": 1000, "only_cross_attention": [True, True, True, False],
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 3],
    "up_block_types": [*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"],
}  # fmt: skip
UNCLIP = {**SD21, "class_embed_type": "projection", "projection_class_embeddings_input_dim": 2048}
LCM = {**SD15, "time_cond_proj_dim": 256}
REFINER = {
    **SD15, "cross_attention_dim": 1280, "block_out_channels": [384, 768, 1536, 1536],
    "attention_head_dim": [6, 12, 24, 24], "transformer_layers_per_block": 4, "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", *["CrossAttnDownBlock2D"] * 2, "DownBlock2D"],
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 2, "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2560,
}  # fmt: skip


@torch.no_grad()
def assert_equals_diffusers(described, size=(8, 8), batch=2, seed=0):
    """Assert that diffusers' network has an equal state dict and output; return its output."""
    unet = random_condition(described, seed)
    twin = diffusers_condition(unet)
    ours, theirs = unet.state_dict(), twin.state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    inputs = random_inputs(described, batch, size, seed=seed)
    expected = diffusers_output(twin, inputs)
    assert relative_error(unet(**inputs), expected) <= 1e-5
    return expected


# Equality with diffusers ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    described = config(**VARIANTS[variant])
    assert assert_equals_diffusers(described).std() > 1e-2
    assert UNetConditionConfig.from_dict(json.loads(json.dumps(described.to_dict()))) == described


def test_variants_set_every_field_that_can_be_set():
    fixed = {
        "num_attention_heads", "dual_cross_attention", "time_embedding_type", "conv_in_kernel", "conv_out_kernel",
        "attention_type", "class_embeddings_concat", "dropout", "sample_size", "addition_embed_type_num_heads",
    }  # fmt: skip
    names = {f.name for f in dataclasses.fields(UNetConditionConfig)}
    assert {*TINY, *(key for changes in VARIANTS.values() for key in changes)} | fixed == names


@pytest.mark.parametrize(
    ("variant", "size"),
    [("depth of each level", (5, 5)), ("padding 0", (9, 14)), ("reverse depth", (7, 16)), ("reverse depth", (1, 3))],
)
def test_sizes_that_are_no_multiple(variant, size):
    assert_equals_diffusers(config(**VARIANTS[variant]), size)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tiny", "only cross-attention", "text_proj", "heads of each level"])
def test_attention_is_far_from_uniform(variant):
    unet = random_condition(config(**VARIANTS[variant]))
    spreads = []

    def measure(m, inputs, _):
        q, k = (h.unflatten(2, (m.heads, -1)).transpose(1, 2) for h in (m.to_q(inputs[0]), m.to_k(inputs[1])))
        spreads.append((q @ k.transpose(2, 3) / math.sqrt(q.shape[3])).std().item())

    for m in unet.modules():
        if isinstance(m, TextAttention):
            m.register_forward_hook(measure)
    unet(**random_inputs(unet.config))
    assert len(spreads) >= 8
    assert min(spreads) > 0.4 * LOGITS
    assert 0.75 * LOGITS < sum(spreads) / len(spreads) < 1.5 * LOGITS


@pytest.mark.parametrize("variant", ["norm_eps", "self-attention blocks", "mid block without a transformer"])
def test_epsilons_of_norms(variant):
    unet = random_condition(config(**VARIANTS[variant]))
    ours, theirs = (
        {name: m.eps for name, m in network.named_modules() if isinstance(m, (torch.nn.GroupNorm, torch.nn.LayerNorm))}
        for network in (unet, diffusers_condition(unet))
    )
    assert len(set(ours.values())) >= 2
    assert ours == theirs


@torch.no_grad()
def test_every_input_matters():
    for variant in ("tiny", "only cross-attention", "class labels", "text_time", "timestep_cond", "text_proj"):
        changes = VARIANTS[variant]
        unet = random_condition(config(**changes))
        inputs = random_inputs(unet.config)
        before = unet(**inputs)
        for name, value in inputs.items():
            parts = value if name == "added_cond_kwargs" else {name: value}
            for key, part in parts.items():
                changed = {**parts, key: part.flip(0)}
                other = {**inputs, **({name: changed} if name == "added_cond_kwargs" else changed)}
                assert relative_error(unet(**other), before) > 1e-3, (variant, key)


@st.composite
def configs(draw):
    """Draw a configuration of diffusers' kinds."""
    levels = draw(st.integers(1, 3))
    kinds = ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
    downs = tuple(draw(st.sampled_from(kinds)) for _ in range(levels))
    ups = tuple(draw(st.sampled_from(kinds)).replace("DownBlock", "UpBlock") for _ in range(levels))
    ups = tuple(kind.replace("Downsample", "Upsample") for kind in ups)
    groups = draw(st.integers(1, 3))
    depth = st.integers(0, 2)
    layers = tuple(draw(st.integers(1, 2)) for _ in range(levels))
    nested = draw(st.booleans())
    depths = tuple(tuple(draw(depth) for _ in range(n)) if nested else draw(depth) for n in layers)
    reverse = tuple(tuple(draw(depth) for _ in range(n + 1)) for n in layers[::-1]) if nested else None
    return UNetConditionConfig(
        block_out_channels=tuple(groups * draw(st.integers(2, 6)) * 2 for _ in range(levels)),
        down_block_types=downs,
        up_block_types=ups,
        mid_block_type=draw(st.sampled_from(["UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None])),
        layers_per_block=layers,
        transformer_layers_per_block=depths,
        reverse_transformer_layers_per_block=reverse,
        attention_head_dim=tuple(draw(st.integers(1, 4)) for _ in range(levels)),
        cross_attention_dim=draw(st.integers(1, 9)),
        norm_num_groups=groups,
        only_cross_attention=tuple(draw(st.booleans()) for _ in range(levels)),
        use_linear_projection=draw(st.booleans()),
        downsample_padding=draw(st.sampled_from([0, 1])),
        resnet_time_scale_shift=draw(st.sampled_from(["default", "scale_shift"])),
    )


@settings(max_examples=5)
@given(described=configs(), seed=st.integers(0, 1000))
def test_generated_configurations(described, seed):
    assert_equals_diffusers(described, seed=seed)


@pytest.mark.slow
@settings(max_examples=300)
@given(described=configs(), seed=st.integers(0, 1000))
def test_many_generated_configurations(described, seed):
    assert_equals_diffusers(described, seed=seed)


@pytest.mark.parametrize(
    ("published", "parameters"),
    [
        (SD15, 859_520_964),
        (SD21, 865_910_724),
        (SDXL, 2_567_463_684),
        (SSD1B, None),
        (SMALL_SD, None),
        (UPSCALER, None),
        (UNCLIP, None),
        (LCM, None),
        (REFINER, None),
    ],
    ids=["sd-1.5", "sd-2.1", "sdxl", "ssd-1b", "small-sd", "upscaler", "unclip", "lcm", "refiner"],
)
def test_published_layouts(published, parameters):
    with torch.device("meta"):
        ours, theirs = UNetCondition(UNetConditionConfig.from_dict(published)), UNet2DConditionModel(**published)
    shapes = {k: v.shape for k, v in ours.state_dict().items()}
    assert shapes == {k: v.shape for k, v in theirs.state_dict().items()}
    counted = sum(p.numel() for p in ours.parameters())
    assert counted == (parameters or sum(p.numel() for p in theirs.parameters()))


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tiny", "text_time", "only cross-attention", "depth of each layer"])
def test_float32_is_close_to_float64(variant):
    unet = random_condition(config(**VARIANTS[variant]))
    inputs = random_inputs(unet.config, 3)
    single = unet(**inputs)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    double = unet.double()(**wide)
    assert double.dtype == torch.float64
    assert 0 < relative_error(single, double) <= 1e-5


@torch.no_grad()
def test_timesteps_and_batches():
    unet = random_condition(config())
    inputs = random_inputs(unet.config, 3)
    whole = unet(**inputs)
    for i in range(3):
        alone = {k: v[i : i + 1] for k, v in inputs.items()}
        assert relative_error(unet(**alone), whole[i : i + 1]) <= 1e-5
        assert relative_error(unet(**{**alone, "t": inputs["t"][i]}), whole[i : i + 1]) <= 1e-5
        assert relative_error(unet(**{**alone, "t": float(inputs["t"][i])}), whole[i : i + 1]) <= 1e-5


@torch.no_grad()
def test_timestep_cond_may_be_left_out():
    unet = random_condition(config(time_cond_proj_dim=7))
    inputs = random_inputs(unet.config)
    del inputs["timestep_cond"]
    assert relative_error(unet(**inputs), diffusers_output(diffusers_condition(unet), inputs)) <= 1e-5


# What is refused ------------------------------------------------------------------------------------------------------

REFUSED = [
    ({"dual_cross_attention": True}, "dual_cross_attention=True"),
    ({"attention_type": "gated"}, "attention_type='gated'"),
    ({"attention_type": "gated-text-image"}, "attention_type='gated-text-image'"),
    ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier'"),
    ({"addition_embed_type": "text"}, "addition_embed_type='text'"),
    ({"addition_embed_type": "text_image"}, "addition_embed_type='text_image'"),
    ({"addition_embed_type": "image"}, "addition_embed_type='image'"),
    ({"addition_embed_type": "image_hint"}, "addition_embed_type='image_hint'"),
    ({"encoder_hid_dim": 4, "encoder_hid_dim_type": "text_image_proj"}, "encoder_hid_dim_type='text_image_proj'"),
    ({"encoder_hid_dim": 4, "encoder_hid_dim_type": "image_proj"}, "encoder_hid_dim_type='image_proj'"),
    ({"encoder_hid_dim": 4, "encoder_hid_dim_type": "ip_image_proj"}, "encoder_hid_dim_type='ip_image_proj'"),
    ({"encoder_hid_dim_type": "text_proj"}, "needs encoder_hid_dim"),
    ({"encoder_hid_dim": 4, "cross_attention_dim": (12, 12)}, "single cross_attention_dim"),
    ({"down_block_types": ("KCrossAttnDownBlock2D", "KDownBlock2D")}, "'KCrossAttnDownBlock2D'"),
    ({"down_block_types": ("SimpleCrossAttnDownBlock2D", "DownBlock2D")}, "'SimpleCrossAttnDownBlock2D'"),
    ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D")}, "'SkipUpBlock2D'"),
    ({"up_block_types": (["UpBlock2D"], "UpBlock2D")}, "up_block_types"),
    ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type='UNetMidBlock2DSimpleCrossAttn'"),
    ({"class_embeddings_concat": True, "num_class_embeds": 3}, "class_embeddings_concat=True"),
    ({"class_embed_type": "other"}, "class_embed_type='other'"),
    ({"conv_in_kernel": 1}, "conv_in_kernel=1"),
    ({"conv_out_kernel": 5}, "conv_out_kernel=5"),
    ({"norm_num_groups": None}, "norm_num_groups=None"),
    ({"norm_num_groups": 3}, "not divisible by norm_num_groups=3"),
    ({"act_fn": "gelu"}, "act_fn='gelu'"),
    ({"time_embedding_act_fn": "tanh"}, "time_embedding_act_fn='tanh'"),
    ({"num_attention_heads": 2}, "num_attention_heads=2"),
    ({"attention_head_dim": None}, "attention_head_dim=None"),
    ({"attention_head_dim": (2,)}, "attention_head_dim has 1 entries"),
    ({"attention_head_dim": 64}, "attention_head_dim=64, the number of heads"),
    ({"cross_attention_dim": (None, 12)}, "cross_attention_dim"),
    ({"cross_attention_dim": None}, "cross_attention_dim=None"),
    ({"cross_attention_dim": (12, 13)}, "the same number at all levels"),
    ({"transformer_layers_per_block": ((1,), (1,))}, "reverse_transformer_layers_per_block is needed"),
    ({"transformer_layers_per_block": (1, 1, 1)}, "has 3 entries"),
    ({"transformer_layers_per_block": -1}, "transformer_layers_per_block=-1"),
    ({"transformer_layers_per_block": 10**30}, "transformer_layers_per_block="),
    ({"transformer_layers_per_block": 64, "layers_per_block": 16}, "more than 1024"),
    (
        {"transformer_layers_per_block": ((1, 1), 1), "reverse_transformer_layers_per_block": (1, (1, 1))},
        "the block has 1 layers",
    ),
    ({"reverse_transformer_layers_per_block": 1}, "reverse_transformer_layers_per_block=1"),
    ({"layers_per_block": (1, 2, 3)}, "layers_per_block has 3 entries"),
    ({"only_cross_attention": "yes"}, "only_cross_attention='yes'"),
    ({"only_cross_attention": (True,)}, "only_cross_attention has 1 entries"),
    ({"block_out_channels": (8, 16, 24)}, "down_block_types has 2 entries"),
    ({"class_embed_type": "projection"}, "needs projection_class_embeddings_input_dim"),
    ({"addition_embed_type": "text_time", "projection_class_embeddings_input_dim": 9}, "addition_time_embed_dim"),
    ({"addition_embed_type": "text_time", "addition_time_embed_dim": 9}, "projection_class_embeddings_input_dim"),
    ({"freq_shift": 4}, "freq_shift=4"),
    ({"dropout": 1.0}, "dropout=1.0"),
    ({"sample_size": (1, 2, 3)}, "sample_size="),
    ({"mid_block_scale_factor": 0}, "mid_block_scale_factor=0"),
    ({"norm_eps": 0.0}, "norm_eps=0.0"),
    (
        {
            "down_block_types": ("ResnetDownsampleBlock2D", "DownBlock2D"),
            "resnet_skip_time_act": True,
        },
        "resnet_skip_time_act=True",
    ),
    (
        {
            "down_block_types": ("DownBlock2D",) * 2,
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (17, 1),
        },
        "the width of a head",
    ),
]


@pytest.mark.parametrize(("changes", "words"), REFUSED, ids=[words for _, words in REFUSED])
def test_refused_by_name(changes, words):
    with pytest.raises(ConfigError) as e:
        config(**changes)
    assert words in str(e.value)


def test_unknown_keys():
    with pytest.raises(ConfigError, match="unknown U-Net configuration keys: fourier_scale"):
        UNetConditionConfig.from_dict({**TINY, "fourier_scale": 2})
    named = {**TINY, "fourier_scale": 2, "_class_name": "UNet2DConditionModel"}
    assert UNetConditionConfig.from_dict(named) == config()


@pytest.mark.parametrize(
    ("variant", "changes", "words"),
    [
        ("tiny", {"encoder_hidden_states": None}, "encoder_hidden_states is NoneType"),
        ("tiny", {"encoder_hidden_states": torch.zeros(1, 7, 12)}, r"\[2, tokens, 12\]"),
        ("tiny", {"encoder_hidden_states": torch.zeros(2, 7, 13)}, r"\[2, 7, 13\]"),
        ("tiny", {"encoder_hidden_states": torch.zeros(2, 0, 12)}, r"\[2, 0, 12\]"),
        ("tiny", {"encoder_hidden_states": torch.zeros(2, 7, 12).half()}, "float16"),
        ("tiny", {"encoder_hidden_states": "a dog"}, "is str"),
        ("tiny", {"x": torch.zeros(2, 3, 8, 8)}, r"x is \[2, 3, 8, 8\]"),
        ("tiny", {"x": torch.zeros(2, 4, 8, 8).double()}, "float64"),
        ("tiny", {"t": torch.zeros(3)}, r"t is \[3\]"),
        ("tiny", {"class_labels": torch.zeros(2)}, "no class conditioning"),
        ("tiny", {"timestep_cond": torch.zeros(2, 7)}, "no time_cond_proj_dim"),
        ("tiny", {"added_cond_kwargs": {"image_embeds": torch.zeros(2, 7)}}, "takes no image_embeds"),
        ("class labels", {"class_labels": None}, "needs class_labels"),
        ("class labels", {"class_labels": torch.zeros(2)}, "class_labels is"),
        ("projection class", {"class_labels": torch.zeros(2, 9)}, r"\[2, 10\]"),
        ("timestep_cond", {"timestep_cond": torch.zeros(2, 6)}, r"\[2, 7\]"),
        ("text_time", {"added_cond_kwargs": None}, "text_embeds and time_ids"),
        ("text_time", {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 10)}}, "text_embeds and time_ids"),
        (
            "text_time",
            {"added_cond_kwargs": {"text_embeds": torch.zeros(2, 9), "time_ids": torch.zeros(2, 3)}},
            "27 in all",
        ),
        ("self-attention blocks", {"x": torch.zeros(2, 4, 6, 8)}, "multiples of 4"),
        ("resnet blocks", {"x": torch.zeros(2, 4, 8, 9)}, "ResnetUpsampleBlock2D"),
    ],
)
def test_inputs_that_do_not_fit(variant, changes, words):
    unet = random_condition(config(**VARIANTS[variant]))
    with pytest.raises(InvalidArgument, match=words):
        unet(**{**random_inputs(unet.config), **changes})


def test_a_network_without_text_takes_none():
    unet = random_condition(
        config(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, mid_block_type=None)
    )
    inputs = random_inputs(unet.config)
    assert "encoder_hidden_states" not in inputs
    unet(**inputs)
    with pytest.raises(InvalidArgument, match="reads no text"):
        unet(**inputs, encoder_hidden_states=torch.zeros(2, 7, 12))


# Folders --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", ["tiny", "text_time"])
def test_folders_of_diffusers_load(tmp_path, variant):
    unet = random_condition(config(**VARIANTS[variant]))
    twin = diffusers_condition(unet)
    twin.save_pretrained(tmp_path / "unet")
    inputs = random_inputs(unet.config)
    expected = diffusers_output(twin, inputs)
    for path in (tmp_path, str(tmp_path / "unet")):
        loaded = fastdiff.UNetCondition.from_pretrained(path)
        assert loaded.config == unet.config
        assert not loaded.training
        assert relative_error(loaded(**inputs), expected) <= 1e-5
    half = UNetCondition.from_pretrained(tmp_path, torch_dtype="float16")
    assert half.conv_in.weight.dtype == torch.float16
    assert UNetCondition.from_pretrained(tmp_path, subfolder="unet").config == unet.config


def test_folders_that_do_not_fit(tmp_path):
    diffusers_condition(random_condition(config())).save_pretrained(tmp_path / "unet")
    with pytest.raises(ConfigError, match=r"UNetCondition\.from_pretrained loads it"):
        fastdiff.UNet.from_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="no option preset"):
        UNetCondition.from_pretrained(tmp_path, preset="x")
    with pytest.raises(InvalidArgument, match="torch_dtype"):
        UNetCondition.from_pretrained(tmp_path, torch_dtype="int8")
    with pytest.raises(CheckpointError, match="no such folder"):
        UNetCondition.from_pretrained(tmp_path / "other")
    path = tmp_path / "unet" / "config.json"
    given = json.loads(path.read_text())
    path.write_text(json.dumps({**given, "cross_attention_dim": 13}))
    with pytest.raises(CheckpointError, match="with other widths"):
        UNetCondition.from_pretrained(tmp_path)
    path.write_text(json.dumps({**given, "transformer_layers_per_block": 2}))
    with pytest.raises(CheckpointError, match="more blocks or layers"):
        UNetCondition.from_pretrained(tmp_path)
    path.write_text(json.dumps({**given, "dual_cross_attention": True}))
    with pytest.raises(ConfigError, match=r"config\.json: dual_cross_attention"):
        UNetCondition.from_pretrained(tmp_path)
    path.write_text(json.dumps({**given, "_class_name": "UNet2DModel"}))
    with pytest.raises(ConfigError, match="UNet2DConditionModel is"):
        UNetCondition.from_pretrained(tmp_path)
