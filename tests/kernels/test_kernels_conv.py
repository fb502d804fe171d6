"""Tests of the Triton convolutions beside their kernel: packed weights, choice of configurations, precision."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch.nn import functional as F

from tests.support.unets import PUBLISHED

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from fastdiff.core.lower import lower
from fastdiff.core.program import STRIP
from fastdiff.kernels import conv, epilogue, norm
from fastdiff.kernels.launch import NO_GPU, Device
from fastdiff.kernels.tiles import Blocks
from fastdiff.unet import UNet
from tests.support.cases_conv import Shape, harvest
from tests.support.cases_norm import meta


@pytest.mark.parametrize("channels", [(5,), (5, 3)])
def test_four_convolutions_are_the_one_behind_a_doubling(channels):
    W = torch.randn(7, sum(channels), 3, 3, dtype=torch.float64)
    x = torch.randn(2, sum(channels), 3, 4, dtype=torch.float64)
    packed = conv.pack(W, channels, torch.float64, upsample=True)
    assert [part.shape for part in packed] == [(4, 4, c, 16) for c in channels]
    src = [part.permute(0, 2, 3, 1) for part in x.split(channels, dim=1)]
    got = conv.product_reference(src, packed, (2, 6, 8, 7), stride=1, padding=1)
    exact = F.conv2d(x.repeat_interleave(2, 2).repeat_interleave(2, 3), W, padding=1)
    assert (got.permute(0, 3, 1, 2) - exact).abs().max() < 1e-13


def test_packed_weights():
    """Weights are packed tap by tap for each source; columns are padded with zeros, so that every row is aligned."""
    W = torch.randn(5, 4 + 2, 3, 3)
    first, second = conv.pack(W, (4, 2), torch.float32)
    assert first.shape == (1, 9, 4, 16)
    assert second.shape == (1, 9, 2, 16)
    assert torch.equal(first[0, 5, 3, :5], W[:, 3, 1, 2])
    assert torch.equal(second[0, 6, 1, :5], W[:, 5, 2, 0])
    assert first[..., 5:].eq(0).all()
    assert torch.equal(conv.unpack((first, second), 5)[0], W)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("size", [(1, 1), (2, 3), (5, 7), (8, 8), (9, 40), (64, 24), (256, 256)])
def test_blocks_cover_every_strip_once(size, upsample):
    for pixels in (16, 64, 128):
        blocks = Blocks.of(*size, pixels, upsample)
        assert pixels % blocks.pixels == 0
        assert blocks.height * (1 + upsample) <= STRIP
        assert blocks.strips == math.ceil(size[0] * (1 + upsample) / STRIP)
        assert (blocks.columns - 1) * blocks.width < size[1] <= blocks.columns * blocks.width
        assert blocks.parts == blocks.columns * (4 if upsample else 1)


def layers(name: str, rows: int) -> list:
    with torch.device("meta"):
        unet = UNet(PUBLISHED[name])
    return list(harvest(lower(unet, (PUBLISHED[name].sample_size,) * 2), rows))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("name", "rows"), [("ddpm-cifar10-32", 1), ("ddpm-cifar10-32", 256), ("ddpm-celebahq-256", 1)])
def test_heuristics_at_the_published_layers(name, rows, dtype):
    """Every multiprocessor has a program if there is enough work, and products are not split more than is useful."""
    whole, split = conv.candidates(dtype)
    shapes = layers(name, rows)
    assert len(shapes) > 20
    for shape in shapes:
        operands = shape.shipped(dtype)
        problem = shape.problem(operands)
        config = problem.choose(splits=True)
        assert config in (*whole, *split)
        programs = problem.tiles(config) * problem.phases * config.splits
        smallest = min(whole[:-1], key=lambda c: c.pixels * c.channels)
        if shape.outputs > whole[-1].channels:
            assert programs >= min(NO_GPU.processors, problem.tiles(smallest) * problem.phases) / 2, shape
        if rows == 256:
            assert config.splits == 1, shape
        if config.splits > 1:
            assert sum(problem.steps(config)) >= 2 * config.splits
            assert conv.workspace(
                operands["src"], operands["weight"], shape.out, stride=shape.stride
            ) == config.splits * math.prod(shape.out)
    if rows == 1 and name == "ddpm-cifar10-32":
        assert any(shape.problem(shape.shipped(dtype)).choose(splits=True).splits > 1 for shape in shapes)


@pytest.mark.parametrize(
    ("rows", "pixels", "channels"),
    [(32, 128, 128), (34, 64, 64), (64, 128, 128), (256, 128, 128)],
    ids=["128 of 132 busy", "a few more than a wave", "two waves", "eight"],
)
def test_tiles_are_chosen_by_waves(rows, pixels, channels):
    """A wave of 128 programs is nearly one of 132; one program more than a wave costs another."""
    shape = Shape(rows, (16, 16), (256,), 256)
    problem = shape.problem(shape.shipped(torch.bfloat16))
    config = problem.heuristic(True)
    assert (config.pixels, config.channels) == (pixels, channels)


@pytest.mark.parametrize("name", ["ddpm-cifar10-32", "ddpm-celebahq-256"])
@pytest.mark.parametrize("rows", [1, 8, 64])
def test_no_wave_is_mostly_idle(name, rows):
    """Where a layer is split into tiles alone, they use at least half of the multiprocessors of all their waves."""
    for shape in layers(name, rows):
        problem = shape.problem(shape.shipped(torch.bfloat16))
        config = problem.heuristic(True)
        programs = problem.tiles(config) * problem.phases
        waves = math.ceil(programs / NO_GPU.processors)
        if waves > 1:
            assert programs >= 0.5 * waves * NO_GPU.processors, (shape, config)


@pytest.mark.parametrize("C", [32, 64, 96, 128, 256, 384])
def test_tiles_are_not_twice_as_wide_as_the_map(C):
    """Half of the threads of such a tile would be idle, however many of them there are."""
    launch = norm.apply(
        (meta(64, 32, 32, C, dtype=torch.bfloat16),), meta(64, 3, C), meta(64, 32, 32, C, dtype=torch.bfloat16),
        silu=True,
    )  # fmt: skip
    assert launch.config.channels < 2 * C
    finished = epilogue.finish(
        meta(4, 64, 32, 32, C), meta(C), meta(64, 32, 32, C, dtype=torch.bfloat16)
    )  # fmt: skip
    assert finished.config.channels < 2 * C


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_eight_warps_have_a_twin_and_are_for_tuning_alone(dtype):
    """Loops like theirs were miscompiled with 8 warps; tuning compares results, and a heuristic does not."""
    whole, split = conv.candidates(dtype)
    tiles = {(c.pixels, c.channels, c.depth) for c in whole if c.num_warps == 4}
    for config in whole:
        sums = config.pixels * config.channels // (32 * 4)  # registers of a thread among 4 warps
        if config.num_warps == 8 and sums <= 128:
            assert (config.pixels, config.channels, config.depth) in tiles, config
    assert all(config.num_warps <= 4 for config in split)
    for name, rows in (("ddpm-cifar10-32", 1), ("ddpm-cifar10-32", 256), ("ddpm-celebahq-256", 8)):
        for shape in layers(name, rows):
            problem = shape.problem(shape.shipped(dtype))
            assert problem.choose_layer().num_warps <= 4, shape
            assert problem.choose(splits=False).num_warps <= 4, shape


def tf32(x: torch.Tensor) -> torch.Tensor:
    """Round float32 to the 10 bits of mantissa that tensor cores read."""
    bits = x.view(torch.int32)
    return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)


def test_three_products_of_tf32_hold_what_float32_promises():
    """a b = ah bh + (ah bl + al bh), with high parts h and remainders l, is as precise as float32; ah bh is not."""
    a, b = torch.randn(64, 2304), torch.randn(2304, 64) / 48
    exact = a.double() @ b.double()
    ah, bh = tf32(a), tf32(b)
    al, bl = tf32(a - ah), tf32(b - bh)
    three = (al @ bh + ah @ bl) + ah @ bh
    plain = float((a @ b - exact).abs().max())
    rounding = 4 * 2.0**-24 * float(exact.abs().max())
    assert float((three - exact).abs().max()) <= 2 * (plain + rounding)
    assert float((ah @ bh - exact).abs().max()) > 20 * (plain + rounding)


@pytest.mark.parametrize("capability", [80, 89, 90, 100, 120])
def test_heuristics_choose_nothing_that_spills(capability):
    """They leave it to tuning, which measures whether it is fast all the same."""
    for dtype in (torch.float32, torch.bfloat16):
        for rows in (1, 256):
            for shape in layers("ddpm-cifar10-32", rows):
                problem = dataclasses.replace(
                    shape.problem(shape.shipped(dtype)), device=Device("", 132, capability)
                )  # fmt: skip
                assert not conv.spills(problem.choose_layer(), capability), shape
