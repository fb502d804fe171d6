"""Tests of Hopper's convolution without a card: its boxes, its protocol of barriers, and where it may be chosen."""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from fastdiff.core.lower import lower
from fastdiff.kernels import conv, hopper
from fastdiff.kernels.launch import Device
from fastdiff.kernels.tiles import Blocks
from fastdiff.unet import UNet
from tests.support import gluon
from tests.support.cases_conv import HOPPER_SHAPES, WITH_TMA, Shape, conv_case, harvest, layer_case
from tests.support.kernel_harness import check
from tests.support.tuned_file import GPU, tuning
from tests.support.unets import PUBLISHED

SIDES = [(1, 1), (2, 3), (5, 7), (8, 8), (4, 4), (16, 16), (12, 16), (32, 32), (64, 64), (6, 40), (256, 256)]


def pixels_of_tile(tile: int, blocks: Blocks, pixels: int) -> np.ndarray:
    """Return (row, y, x) of the pixels of a tile, as `fastdiff.kernels.tiles.pixels` numbers them."""
    i = np.arange(pixels)
    block = tile * (pixels // blocks.pixels) + i // blocks.pixels
    row = block // (blocks.strips * blocks.columns)
    y = block // blocks.columns % blocks.strips * blocks.height + i // blocks.width % blocks.height
    return np.stack([row, y, block % blocks.columns * blocks.width + i % blocks.width], axis=1)


@pytest.mark.parametrize("upsample", [False, True])
@pytest.mark.parametrize("size", SIDES)
def test_a_tile_is_a_box(size, upsample):
    """Its pixels, in the order of every other kernel's, are those that one load brings; else there is no box."""
    for pixels in (128, 256):
        blocks = Blocks.of(*size, pixels, upsample)
        shape = hopper.box(blocks, pixels)
        inside = np.array(list(itertools.product(*map(range, shape or (1, 1, 1)))))
        for tile in range(5):
            found = pixels_of_tile(tile, blocks, pixels)
            if shape is not None:
                assert np.array_equal(found, found[0] + inside), (size, pixels, tile)
    powers = all(n & (n - 1) == 0 for n in size)
    assert shape is not None or not powers, "maps whose sides are powers of two always have one"


def test_maps_that_are_no_boxes_exist():
    assert hopper.box(Blocks.of(6, 40, 128), 128) is None
    assert hopper.box(Blocks.of(12, 16, 256), 256) is None


ALL = Shape(64, (32, 32), (256,), 256)


@pytest.mark.parametrize(
    ("shape", "dtype", "capability", "number"),
    [
        (ALL, torch.bfloat16, 90, 3),
        (ALL, torch.float16, 90, 3),
        (ALL, torch.float32, 90, 0),
        (ALL, torch.bfloat16, 80, 0),
        (ALL, torch.bfloat16, 100, 0),
        (dataclasses.replace(ALL, stride=2), torch.bfloat16, 90, 0),
        (dataclasses.replace(ALL, outputs=128), torch.bfloat16, 90, 2),
        (dataclasses.replace(ALL, channels=(256, 20)), torch.bfloat16, 90, 0),
        (dataclasses.replace(ALL, channels=(256, 8)), torch.bfloat16, 90, 0),
        (dataclasses.replace(ALL, channels=(3,)), torch.bfloat16, 90, 0),
        (dataclasses.replace(ALL, upsample=True), torch.bfloat16, 90, 3),
        (dataclasses.replace(ALL, size=(48, 40)), torch.bfloat16, 90, 1),
    ],
)
def test_it_is_a_candidate_where_it_can_compute_the_layer(shape, dtype, capability, number):
    problem = dataclasses.replace(shape.problem(shape.shipped(dtype)), device=Device("", 132, capability))
    found = problem.hopper()
    assert len(found) == number
    assert set(found) <= set(problem.layer_candidates)
    assert not isinstance(problem.choose_layer(), conv.HopperConfig), "only tuning tries what never ran"


@pytest.mark.parametrize("name", ["ddpm-cifar10-32", "ddpm-celebahq-256"])
def test_the_published_networks_divide_into_boxes(name):
    """All of their layers of stride 1 but the first, of three channels, and the last, of three outputs."""
    config = PUBLISHED[name]
    with torch.device("meta"):
        shapes = list(harvest(lower(UNet(config), (config.sample_size,) * 2), rows=8))
    able = {shape for shape in shapes if shape.problem(shape.shipped(torch.bfloat16)).hopper()}
    others = [shape for shape in shapes if shape not in able and shape.stride == 1]
    assert len(able) > 15
    assert all(3 in (*shape.channels, shape.outputs) for shape in others), others


def test_a_tuned_file_chooses_it(tmp_path):
    """Its weights are packed as those of the other kernel; the epilogue, or sums for the next kernel, are as well."""
    shape = Shape(3, (8, 8), (72,), 136)
    with tuning(tmp_path) as tune:
        problem = dataclasses.replace(shape.problem(shape.operands(torch.bfloat16)), device=GPU)
        config = problem.hopper()[-1]
        tune({f"conv.layer {problem.key}": config})
        assert problem.choose_layer() == config
    for more in ("entry residual statistics", "residual then"):
        case = layer_case(shape, torch.bfloat16, more, config)
        first, *rest = case.launch().launches
        assert isinstance(first, hopper.HopperLaunch)
        assert [launch.op for launch in rest] == (["epilogue.normed"] if "then" in more else [])


def test_registers_are_shared_by_all_warps():
    for config in conv.HOPPER:
        registers = config.options["maxnreg"]
        assert registers % 8 == 0
        assert registers * 32 * (config.num_warps + 4) <= 65536
        assert config.pixels * config.channels // (32 * config.num_warps) <= 128, "sums of a thread"


# The kernel's own code, with an error in it ---------------------------------------------------------------------------

ERRORS = {
    "the first wait for a free stage is for another phase": ("& 1) ^ 1)", "& 1))"),
    "products wait for another phase": ("count // STAGES & 1)\n", "(count // STAGES + 1) & 1)\n"),
    "a stage is freed while its product reads it": ("warpgroup_mma_wait(1,", "warpgroup_mma_wait(2,"),
    "a stage is freed before anything has read it": ("pred=step > 0", "pred=True"),
    "the last stage of a tile stays taken": ("mbarrier.arrive(free.index((count + STAGES - 1) % STAGES))", "pass"),
    "fewer bytes are awaited": ("2 * (SIZE + CHANNELS) * DEPTH", "2 * SIZE * DEPTH"),
    "a source is loaded twice": ("second, more_weight, a, b", "first, weight, a, b"),
    "taps are not displaced": ("left + tap % KERNEL", "left"),
    "the taps of a row go down": ("tap // KERNEL, left + tap % KERNEL", "tap % KERNEL, left + tap // KERNEL"),
    "weights are those of the first phase": ("(phase * KERNEL * KERNEL + tap)", "tap"),
    "halves are exchanged": ("low, high =", "high, low ="),
    "phases are not interleaved": ("x = 2 * x + phase % 2", "x = 2 * x"),
    "statistics of the tile's first block alone": ("part = tile * NUMBER +", "part = tile * NUMBER + 0 *"),
}  # fmt: skip


def changed(tmp_path, before: str, after: str):
    """Return a copy of the module with an error."""
    with open(hopper.__file__, encoding="utf-8") as file:
        source = file.read()
    assert before in source, before
    path = tmp_path / "changed_hopper.py"
    path.write_text(source.replace(before, after), encoding="utf-8")
    spec = importlib.util.spec_from_file_location("changed_hopper", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["changed_hopper"] = module
    spec.loader.exec_module(module)
    return module


CHECKED = [
    ("3x3 of two", "residual"), ("upsampled", "embedding residual doubled statistics"), ("3x3", "entry statistics"),
]  # fmt: skip


def compare_all() -> None:
    for name, more in CHECKED:
        check(conv_case(HOPPER_SHAPES[name][0], torch.bfloat16, WITH_TMA, more, torch.float32))


def test_its_code_is_right(monkeypatch):
    monkeypatch.setattr(hopper.HopperLaunch, "__call__", gluon.run)
    compare_all()


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS.keys())
def test_an_error_in_its_code_is_found(monkeypatch, tmp_path, error):
    monkeypatch.setattr(hopper.HopperLaunch, "__call__", gluon.run)
    monkeypatch.setattr(hopper, "_conv", changed(tmp_path, *error)._conv)
    with pytest.raises((AssertionError, IndexError)):
        compare_all()
