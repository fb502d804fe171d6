"""The choice of algorithms within a bound of memory: for networks of Stable Diffusion's size, and none smaller."""

from __future__ import annotations

import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, UNetCondition, UNetConditionConfig
from fastdiff.backends import Spec, native
from fastdiff.backends.native import METHODS, choose_method, choose_methods, methods
from fastdiff.core.lower import lower
from fastdiff.core.program import Conv, Program
from tests.support.unets import PUBLISHED, TINY, random_unet

SD15 = {
    "sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
}  # fmt: skip
XL = {
    "sample_size": 128, "cross_attention_dim": 2048, "attention_head_dim": [5, 10, 20],
    "block_out_channels": [320, 640, 1280], "transformer_layers_per_block": [1, 2, 10], "use_linear_projection": True,
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
}  # fmt: skip
LARGE = [(SD15, 64), *(pytest.param(*each, marks=pytest.mark.slow) for each in ((SD15, 32), (XL, 128)))]


def on_meta(fields: dict[str, object]) -> UNetCondition:
    with torch.device("meta"):
        return UNetCondition(UNetConditionConfig.from_dict(fields)).eval()


def convs_of(program: Program) -> dict[str, Conv]:
    return {op.dst: op for op in program.ops if isinstance(op, Conv)}


@pytest.mark.skipif(native.extension() is None, reason="the native engine is not built")
@pytest.mark.parametrize(("fields", "size"), LARGE)
def test_weights_and_packed_ones_of_a_large_network_are_bounded(fields: dict[str, object], size: int):
    unet = on_meta(fields)
    spec = Spec(1, (4, size, size), torch.float32, torch.device("cpu"))
    program = native.dry_program(unet, spec, 1)
    own = 4 * sum(methods._weights(op, program.program) for op in convs_of(program.program).values())
    most = max(7.3e9, 2.2 * own)
    assert own + program.weights.nbytes <= 1.01 * most  # channels are padded
    if fields is SD15:
        whole = 4 * sum(p.numel() for p in unet.parameters())
        assert whole + program.weights.nbytes + program.layout.size <= 7.6e9
    free = {dst: choose_method(op, program.program, program.rows) for dst, op in convs_of(program.program).items()}
    changed = {dst for dst in free if free[dst] != program.methods[dst]}
    assert 0 < len(changed) < len([dst for dst in free if free[dst] != "direct"])
    assert all(METHODS.index(program.methods[dst]) > METHODS.index(free[dst]) for dst in changed)
    # The next layer that would give way was not needed.
    growth = sum(methods._weights(convs_of(program.program)[dst], program.program) * 4 *
                 (methods.GROWTH[free[dst]] - methods.GROWTH[program.methods[dst]]) for dst in changed)  # fmt: skip
    assert own + program.weights.nbytes + growth > most
    assert own + program.weights.nbytes > 0.9 * most


def test_smaller_networks_take_what_is_fastest():
    for name in ("ddpm-cifar10-32", "ddpm-celebahq-256"):
        with torch.device("meta"):
            unet = type(random_unet(TINY))(PUBLISHED[name])
        size = unet.config.sample_size
        program = lower(unet, (size, size) if isinstance(size, int) else size)
        for rows in (1, 8, None):
            expected = {dst: choose_method(op, program, rows) for dst, op in convs_of(program).items()}
            assert choose_methods(program, rows) == expected


@pytest.mark.parametrize("copies", [1.0, 1.5, 2.0, 2.5, 3.0, 9.0])
def test_the_bound_is_kept_with_the_fewest_products(monkeypatch: pytest.MonkeyPatch, copies: float):
    monkeypatch.setattr(methods, "MOST_BYTES", 0)
    monkeypatch.setattr(methods, "MOST_COPIES", copies)
    program = lower(random_unet(TINY), (32, 32))
    convs = convs_of(program)
    chosen = choose_methods(program, 2)
    weights = {dst: methods._weights(op, program) for dst, op in convs.items()}
    held = sum(weights[dst] * (1 + methods.GROWTH[method]) for dst, method in chosen.items())
    if copies < 2:
        assert set(chosen.values()) == {"direct"}  # which is as small as can be
    else:
        assert held <= copies * sum(weights.values())
    if copies == 9.0:
        assert chosen == {dst: choose_method(op, program, 2) for dst, op in convs.items()}


@pytest.mark.skipif(native.extension() is None, reason="the native engine is not built")
@pytest.mark.parametrize("determinism", ["seed", "bitwise"])
def test_images_of_a_bounded_network(monkeypatch: pytest.MonkeyPatch, determinism: str):
    unet, schedule = random_unet(TINY), NoiseSchedule("linear", 100)
    call = {"steps": 2, "size": 32, "seed": 3}
    expected = Sampler(unet, schedule, backend="eager").sample(3, **call).images
    monkeypatch.setattr(methods, "MOST_BYTES", 0)
    monkeypatch.setattr(methods, "MOST_COPIES", 2.4)
    sampler = Sampler(unet, schedule, backend="native", determinism=determinism)
    images = sampler.sample(3, **call).images
    assert (images - expected).abs().max() <= 1e-4
    used = set(next(iter(sampler._runners.runner(3, (3, 32, 32)).programs.values())).methods.values())
    assert used >= {"direct", "winograd2"} or used >= {"direct", "winograd4"}
    if determinism == "bitwise":
        assert torch.equal(sampler.sample(1, **call, start_index=2).images[0], images[2])
