"""The lowered program, interpreted in its planned arena, against the module; its figures against torch's own counts."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from fastdiff.core.lower import CHUNK, embed_timesteps, lower, projection_keys
from fastdiff.core.plan import ALIGNMENT, STATISTICS, Lifetime, plan
from fastdiff.core.program import Attention, Buffer, Conv, Embed, Input, Norm, Pool, Program
from fastdiff.errors import InvalidArgument
from fastdiff.unet import UNet
from tests.support.interpreter import Interpreter
from tests.support.unets import (
    OWN_VARIANTS,
    PUBLISHED,
    RESNET_BLOCKS,
    TINY,
    TINY_CLASSES,
    VARIANTS,
    change,
    configs,
    random_images,
    random_labels,
    random_unet,
    relative_error,
)

CLASS_IMAGES = {f"class image, {kind}": {"class_image": kind} for kind in ("add", "multiply", "concat")}


def image_size(config):
    return config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size, config.sample_size)


@torch.no_grad()
def assert_equals_module(config, size=None, seed=0, batch=3):
    """Compare in float64, where only a wrong program can make a difference."""
    unet = random_unet(config, seed).double()
    x, labels = random_images(config, batch, size).double(), random_labels(config, batch)
    if config.class_embed_type in ("identity", "timestep"):
        labels = labels.double()
    t = torch.tensor([0.0, 917.0, 4.5], dtype=torch.float64)[:batch]
    program = lower(unet, x.shape[2:])
    out = Interpreter(program, unet, batch)(x, t, labels)
    assert relative_error(out, unet(x, t, labels)) <= 1e-11
    return program


# The program equals the module ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant(variant):
    assert_equals_module(change(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", OWN_VARIANTS)
def test_own_variant(variant):
    config = change(**OWN_VARIANTS[variant])
    assert_equals_module(config)
    assert not config.diffusers_can_run


@pytest.mark.parametrize("variant", CLASS_IMAGES)
@pytest.mark.parametrize("size", [(8, 8), (10, 14)])
def test_class_images(variant, size):
    assert_equals_module(change(TINY_CLASSES, **CLASS_IMAGES[variant], center_input_sample=True), size)


@settings(max_examples=25)
@given(config=configs(), seed=st.integers(0, 1000))
def test_generated_configurations(config, seed):
    assert_equals_module(config, seed=seed)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * ("celebahq" in name)) for name in PUBLISHED]
)
def test_published_networks(name):
    config = PUBLISHED[name]
    if name == "ddpm-cifar10-32":
        assert_equals_module(config, batch=1)
    else:
        assert_equals_module(config, (64, 32), batch=1)


def test_every_operation_is_met():
    """The variants reach every kind of operation and every option of it, so the comparison above covers them all."""
    ops = []
    for changes in (*VARIANTS.values(), *CLASS_IMAGES.values()):
        config = change(TINY_CLASSES if "class_image" in changes else TINY, **changes)
        with torch.device("meta"):
            ops += lower(UNet(config), image_size(config)).ops
    assert {type(op) for op in ops} == {Input, Embed, Conv, Pool, Attention}
    convs = [op for op in ops if isinstance(op, Conv)]
    for field, values in {
        "kernel": {1, 3}, "stride": {1, 2}, "padding": {(0, 0), (0, 1), (1, 1)}, "upsample": {False, True},
    }.items():  # fmt: skip
        assert {getattr(op, field) for op in convs} == values
    assert {len(op.src) for op in convs} == {1, 2}
    assert {len(op.weights) for op in convs} >= {1, 3}
    for field in ("norm", "emb", "residual"):
        assert {getattr(op, field) is None for op in convs} == {False, True}
    assert any(op.divide != 1 for op in convs)
    assert {op.merged for op in convs} == {None, "first transposed", "in turn"}
    assert {(len(op.src), op.norm is None) for op in ops if isinstance(op, Attention)} == {
        (1, True),
        (2, False),
        (2, True),
    }
    assert {(op.norm.silu, op.norm.modulation is None) for op in convs if op.norm} == {
        (True, True), (True, False), (False, True),
    }  # fmt: skip
    assert {op.norm is None for op in ops if isinstance(op, Pool)} == {False, True}
    assert {op.class_image for op in ops if isinstance(op, Input)} == {None, "add", "multiply", "concat"}


# Rows of one batch do not hear each other -----------------------------------------------------------------------------


@torch.no_grad()
def test_nan_in_one_row_stays_there():
    unet = random_unet(change(TINY_CLASSES, **RESNET_BLOCKS))
    x, t, labels = random_images(TINY, 3), torch.tensor([1.0, 500.0, 999.0]), torch.tensor([0, 2, 4])
    interpreter = Interpreter(lower(unet, (8, 8)), unet, 3)
    clean = interpreter(x, t, labels).clone()
    x[1, 0, 3, 3] = torch.nan
    out = interpreter(x, t, labels)
    assert out[1].isnan().all()
    assert torch.equal(out[[0, 2]], clean[[0, 2]])


# Timesteps ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("config", [TINY, TINY_CLASSES], ids=["projections", "time"])
def test_embedded_timesteps_do_not_depend_on_how_many_there_are(config):
    unet = random_unet(config)
    t = torch.linspace(0, 999, 2 * CHUNK + 7)
    together = embed_timesteps(unet, t)
    heard = sum(unet.get_submodule(key).out_features for key in projection_keys(unet))
    assert together.shape == (len(t), unet.config.temb_channels if config.num_class_embeds else heard)
    for i in (0, 1, CHUNK - 1, CHUNK, 2 * CHUNK, len(t) - 1):
        assert torch.equal(embed_timesteps(unet, t[i : i + 1])[0], together[i])
    assert embed_timesteps(unet, t[:0]).shape == (0, together.shape[1])


def test_projections_are_all_blocks_in_order():
    unet = random_unet(TINY)
    keys = projection_keys(unet)
    assert keys == [k.removesuffix(".weight") for k in unet.state_dict() if k.endswith("time_emb_proj.weight")]
    program = lower(unet, (8, 8))
    used = [
        (op.emb, program.buffers[op.dst].shape[2]) for op in program.ops if isinstance(op, Conv) and op.emb is not None
    ]
    assert sorted(used) == sorted(
        zip(
            itertools.accumulate([0, *(unet.get_submodule(k).out_features for k in keys)]),
            (unet.get_submodule(k).out_features for k in keys),
            strict=False,
        )
    )


# Figures --------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("variant", ["tiny", "resnet blocks", "scale-shift", "four heads", "24x40", "class embedding"])
def test_flops_are_those_that_torch_counts(variant):
    config = change(**VARIANTS[variant])
    unet, x = random_unet(config), random_images(config, 1)
    program = lower(unet, image_size(config))
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):  # it does not count the fused one
        unet(x, torch.tensor([3]), random_labels(config, 1))
    with FlopCounterMode(display=False) as hoisted:
        embed_timesteps(unet, torch.zeros(CHUNK))
    ours = sum(program.flops(op) for op in program.ops) + hoisted.get_total_flops() // CHUNK
    assert ours == counter.get_total_flops()


def test_the_published_network_s_figures():
    """12.4 GFLOP for the CIFAR network, of which merging the projections of its attention saves 0.4."""
    with torch.device("meta"):
        unet = UNet(PUBLISHED["ddpm-cifar10-32"])
    program = lower(unet, (32, 32))
    assert sum(program.flops(op) for op in program.ops) == pytest.approx(12.1e9, rel=0.005)


def test_traffic_counts_every_buffer_once():
    op = Conv("c", ("a", "b"), ("w",), norm=Norm("n", 1, 1e-5, silu=True, modulation=0), emb=0, residual="r")
    shapes = {"a": (4, 4, 3), "b": (4, 4, 5), "r": (4, 4, 2), "c": (4, 4, 2), "projections": (1, 1, 99)}
    program = Program((op,), {name: Buffer(name, shape) for name, shape in shapes.items()})
    assert set(program.reads(op)) == {"a", "b", "r", "projections"}
    assert program.traffic(op) == 16 * (3 + 5 + 2 + 2)
    assert program.parameters(op) == 2 * (8 * 9 + 1) + 2 * 8


@pytest.mark.parametrize("size", [(9, 8), (8, 0), (-8, 8)])
def test_sizes_that_the_network_cannot_take(size):
    with pytest.raises(InvalidArgument, match=r"multiples of 2"):
        lower(random_unet(TINY), size)


# The plan -------------------------------------------------------------------------------------------------------------


def assert_sound(program, rows, itemsize=4):
    """Buffers alive at the same time do not overlap, and each is alive from its writer to its last reader."""
    p = plan(program, rows, itemsize)
    for a, b in itertools.combinations(p.offsets, 2):
        x, y = p.lifetimes[a], p.lifetimes[b]
        if x.first <= y.last and y.first <= x.last:
            assert p.offsets[a] + x.size <= p.offsets[b] or p.offsets[b] + y.size <= p.offsets[a], (a, b)
    for i, op in enumerate(program.ops):
        for name in program.reads(op):
            if not program.buffers[name].external:
                assert p.lifetimes[name].first < i <= p.lifetimes[name].last
    for name, offset in p.offsets.items():
        buffer = program.buffers[name.removesuffix(STATISTICS)]
        numbers = 2 * buffer.strips * buffer.shape[2] if name.endswith(STATISTICS) else buffer.elements
        assert p.lifetimes[name].size >= rows * numbers * itemsize
        assert offset % ALIGNMENT == 0
    assert p.bound <= p.size == max(p.offsets[name] + p.lifetimes[name].size for name in p.offsets)
    return p


@settings(max_examples=25)
@given(config=configs(), rows=st.integers(1, 70), itemsize=st.sampled_from([4, 8]))
def test_generated_plans(config, rows, itemsize):
    with torch.device("meta"):
        program = lower(UNet(config), image_size(config))
    assert_sound(program, rows, itemsize)


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("rows", [1, 8, 32])
def test_plans_of_the_published_networks_are_near_the_least(name, rows):
    with torch.device("meta"):
        program = lower(UNet(PUBLISHED[name]), image_size(PUBLISHED[name]))
    p = assert_sound(program, rows)
    assert p.size <= 1.15 * p.bound
    assert p.size <= 0.5 * sum(life.size for life in p.lifetimes.values())


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=2, max_size=2))
def test_lifetimes_meet_where_an_operation_needs_both(spans):
    a, b = (Lifetime(min(s), max(s), 64) for s in spans)
    assert a.meets(b) == b.meets(a) == bool(set(range(a.first, a.last + 1)) & set(range(b.first, b.last + 1)))


def test_a_program_is_immutable_and_says_what_it_is():
    program = lower(random_unet(TINY), (8, 8))
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.ops = ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        program.ops[0].dst = "elsewhere"
