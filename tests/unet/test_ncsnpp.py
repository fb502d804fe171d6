"""NCSN++: blocks with a picture beside their maps, and Fourier features of noise levels, compared with diffusers."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import UNet2DModel
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff import NoiseSchedule, Sampler
from fastdiff.backends import Spec, prepare
from fastdiff.checkpoints import convert
from fastdiff.core.lower import lower
from fastdiff.errors import BackendError, ConfigError, FastdiffError, InvalidArgument
from fastdiff.training import TrainConfig, Trainer
from fastdiff.unet import UNet, UNetConfig
from fastdiff.unet.model import fir_down, fir_up
from tests.support.unets import TINY, diffusers_twin, random_images, random_labels, random_unet, relative_error
from tests.training.toys import Toys

# As google/ncsnpp-celebahq-256 has it, with fewer and narrower levels.
NCSNPP = UNetConfig(
    sample_size=16,
    time_embedding_type="fourier",
    block_out_channels=(32, 32, 64),
    down_block_types=("SkipDownBlock2D", "AttnSkipDownBlock2D", "SkipDownBlock2D"),
    up_block_types=("SkipUpBlock2D", "AttnSkipUpBlock2D", "SkipUpBlock2D"),
    layers_per_block=2,
    attention_head_dim=None,
    norm_num_groups=None,
    norm_eps=1e-6,
    mid_block_scale_factor=math.sqrt(2),
)
LEVELS = torch.tensor([0.0123, 37.5, 1348.0])


def ncsnpp(**changes) -> UNetConfig:
    return dataclasses.replace(NCSNPP, **changes)


@torch.no_grad()
def assert_equals_diffusers(config: UNetConfig, seed: int = 0) -> None:
    unet = random_unet(config, seed)
    twin = diffusers_twin(unet)
    ours, theirs = unet.state_dict(), UNet2DModel.state_dict(twin)
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    x, labels = random_images(config, 3), random_labels(config, 3)
    expected = twin(x, LEVELS, class_labels=labels).sample
    # The output is divided by the level, so that images are compared one by one.
    for mine, other in zip(unet(x, LEVELS, labels), expected, strict=True):
        assert relative_error(mine, other) <= 1e-5


VARIANTS = {
    "ncsnpp": {},
    "two levels": {
        "block_out_channels": (32, 64), "down_block_types": ("AttnSkipDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("SkipUpBlock2D", "AttnSkipUpBlock2D"), "sample_size": (8, 24), "layers_per_block": 1,
    },
    "one level": {
        "block_out_channels": (32,), "down_block_types": ("AttnSkipDownBlock2D",),
        "up_block_types": ("AttnSkipUpBlock2D",), "sample_size": 6,
    },
    "positional": {"time_embedding_type": "positional"},
    "narrow": {
        "block_out_channels": (4, 12, 20), "down_block_types": ("SkipDownBlock2D",) * 3,
        "up_block_types": ("SkipUpBlock2D",) * 3, "add_attention": False,
    },
    "groups": {"norm_num_groups": 8, "attention_head_dim": 8},
    "scale-shift": {"resnet_time_scale_shift": "scale_shift", "norm_num_groups": 16, "num_class_embeds": 4},
    "down alone": {"up_block_types": ("UpBlock2D",) * 3, "norm_num_groups": 8},
    "up alone": {"down_block_types": ("DownBlock2D",) * 3, "norm_num_groups": 8},
    "first down, last up": {
        "down_block_types": ("SkipDownBlock2D", "AttnDownBlock2D", "SkipDownBlock2D"),
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "SkipUpBlock2D"), "norm_num_groups": 8,
    },
    "fourier of plain blocks": {
        "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), "norm_num_groups": 8,
        "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), "in_channels": 1, "out_channels": 2,
    },
    "fourier of scalars": {"class_embed_type": "timestep"},
    "centered": {"center_input_sample": True, "time_embedding_dim": 24, "mid_block_type": None},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    assert_equals_diffusers(ncsnpp(**VARIANTS[variant]))


@settings(max_examples=4)
@given(data=st.data(), seed=st.integers(0, 1000))
def test_generated_configurations(data, seed):
    levels = data.draw(st.integers(1, 3))
    widths = tuple(32 * data.draw(st.integers(1, 2)) for _ in range(levels))
    kinds = [data.draw(st.sampled_from(("", "Attn"))) for _ in range(2 * levels)]
    assert_equals_diffusers(
        ncsnpp(
            block_out_channels=widths,
            down_block_types=tuple(f"{kind}SkipDownBlock2D" for kind in kinds[:levels]),
            up_block_types=tuple(f"{kind}SkipUpBlock2D" for kind in kinds[levels:]),
            layers_per_block=data.draw(st.integers(1, 2)),
            sample_size=8,
            attention_head_dim=data.draw(st.sampled_from((None, 8, 32))),
            add_attention=data.draw(st.booleans()),
        ),
        seed,
    )


def test_the_filter_is_separable_and_keeps_the_mean():
    """Written out with NumPy: zeros around the map, [1, 3, 3, 1] / 8 in each direction, every second value."""
    x = torch.randn(2, 3, 6, 8, dtype=torch.float64)
    taps = np.array([1.0, 3.0, 3.0, 1.0]) / 8.0

    def along(values: np.ndarray, axis: int) -> np.ndarray:
        padded = np.pad(values, [(1, 1) if i == axis else (0, 0) for i in range(4)])
        rows = [np.take(padded, np.arange(k, k + values.shape[axis] - 1, 2), axis) for k in range(4)]
        return sum(t * row for t, row in zip(taps, rows, strict=True))

    assert fir_down(x).numpy() == pytest.approx(along(along(x.numpy(), 2), 3), abs=1e-12)
    flat = torch.ones(1, 1, 6, 6, dtype=torch.float64)
    assert fir_down(flat)[..., 1:-1, 1:-1].numpy() == pytest.approx(1.0)
    assert fir_up(flat)[..., 1:-1, 1:-1].numpy() == pytest.approx(1.0)
    assert fir_up(x).shape == (2, 3, 12, 16)
    # Each is the other's transpose, but for the factor of the area.
    y = torch.randn(2, 3, 3, 4, dtype=torch.float64)
    assert float((fir_up(y) * x).sum()) == pytest.approx(4.0 * float((y * fir_down(x)).sum()))


@torch.no_grad()
def test_networks_of_the_unit_range_are_those_of_signed_images():
    """The score of y = 2 x - 1 at the level 2 sigma is half of that of x at sigma."""
    unet = random_unet(NCSNPP)
    signed = random_unet(ncsnpp(unit_range=True))
    signed.load_state_dict(unet.state_dict())
    x = torch.rand(3, 3, 16, 16)
    assert torch.allclose(signed(2 * x - 1, 2 * LEVELS), 0.5 * unet(x, LEVELS), rtol=1e-4, atol=1e-7)
    assert not signed.config.diffusers_can_run
    assert UNetConfig.from_dict(signed.config.to_dict()) == signed.config


@torch.no_grad()
def test_files_keep_the_network(tmp_path: Path):
    unet = random_unet(NCSNPP)
    x = random_images(NCSNPP, 3)
    unet.save_pretrained(tmp_path / "ours")
    assert relative_error(UNet2DModel.from_pretrained(tmp_path / "ours")(x, LEVELS).sample, unet(x, LEVELS)) <= 1e-5
    diffusers_twin(unet).save_pretrained(tmp_path / "theirs")
    for name in ("ours", "theirs"):
        assert torch.equal(UNet.from_pretrained(tmp_path / name)(x, LEVELS), unet(x, LEVELS))
    with pytest.raises(FastdiffError, match=r"time_embedding_type='fourier'.*Skip"):
        convert(tmp_path / "ours", tmp_path / "openai.pt", to="openai")


@torch.no_grad()
def test_gradients_and_other_precisions():
    unet = random_unet(ncsnpp(layers_per_block=1))
    x = random_images(NCSNPP, 3)
    single = unet(x, LEVELS)
    double = unet.double()(x.double(), LEVELS.double())
    assert relative_error(single, double) < 1e-4  # of angles of 2 pi 16 log sigma in float32
    unet.float()
    with torch.enable_grad(), unet.gradient_checkpointing():
        unet.train()(x, LEVELS).square().sum().backward()
    missing = [name for name, p in unet.named_parameters() if p.requires_grad and p.grad is None]
    assert not missing
    assert unet.time_proj.weight.grad is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"in_channels": 1}, "in_channels=1 with blocks of type ...Skip...: 3 is needed"),
        ({"out_channels": 6}, "out_channels=6"),
        ({"padding_mode": "circular"}, "padding_mode='circular'"),
        ({"block_scale_factor": 2.0}, "block_scale_factor=2.0"),
        ({"block_out_channels": (32, 48, 64)}, "a norm of 32 groups has 48 channels"),
        ({"block_out_channels": (32, 32, 34)}, "34 channels"),
        (
            {"down_block_types": ("DownBlock2D", "SkipDownBlock2D", "SkipDownBlock2D"), "norm_num_groups": 8},
            "before others",
        ),
        ({"up_block_types": ("SkipUpBlock2D", "UpBlock2D", "SkipUpBlock2D"), "norm_num_groups": 8}, "after them"),
        ({"down_block_types": ("DownBlock2D",) * 3}, "norm_num_groups=None: a number is needed"),
        ({"sinusoid_dim": 12}, "sinusoid_dim=12"),
        ({"time_embedding_type": "positional", "unit_range": True}, "unit_range=True needs"),
        ({"time_embedding_type": "learned"}, "time_embedding_type='learned' is not supported"),
        ({"unit_range": 1}, "unit_range=1"),
    ],
)
def test_what_cannot_be_built_is_named(changes, said):
    with pytest.raises(ConfigError) as refusal:
        ncsnpp(**changes)
    assert said in str(refusal.value)


def test_other_backends_and_training_refuse_it_by_name(tmp_path: Path):
    unet = random_unet(ncsnpp(layers_per_block=1))
    assert Sampler(unet, NoiseSchedule()).backend == "eager"
    spec = Spec(1, (3, 16, 16), torch.float32, torch.device("cpu"))
    for backend in ("native", "triton"):
        with pytest.raises(BackendError, match=r"no time_embedding_type 'fourier'.*no AttnSkipDownBlock2D"):
            prepare(backend, unet, spec)
    with pytest.raises(InvalidArgument, match=r"cannot be lowered.*SkipUpBlock2D"):
        lower(unet, (16, 16))
    with pytest.raises(InvalidArgument, match="sampled, not trained"):
        Trainer(unet, Toys(size=(16, 16), channels=3), tmp_path, TrainConfig(), device="cpu")
    assert dataclasses.replace(TINY).norm_num_groups == 4
