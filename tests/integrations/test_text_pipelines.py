"""`fastdiff.accelerate` with pipelines of Stable Diffusion: diffusers' images, and what is left to it by name."""

from __future__ import annotations

import copy
import functools
import itertools
import logging
import pickle
import re

import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from peft import LoraConfig

import fastdiff
from fastdiff.backends import native
from fastdiff.backends.native import NativeCoder
from fastdiff.backends.native.packing import Weights
from fastdiff.backends.network import TextTables
from fastdiff.errors import BackendError, ConfigError, ModifiedError
from fastdiff.integrations.condition import BackendCondition, ConditionForward
from tests.support.conditions import VARIANTS, config, diffusers_condition, random_condition, random_inputs
from tests.support.pipelines import SCHEDULE, WIDTH, pair_parts, pipeline, psnr
from tests.support.unets import relative_error

if native.extension() is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

PNDM = {k: v for k, v in SCHEDULE.items() if k != "clip_sample"}
PROMPTS = ["a red dog", "a cat on the sea"]
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # the networks by themselves, below, take less time


@pytest.fixture
def evaluations(monkeypatch):
    """The shapes of the latents that the engine evaluates the network for."""
    seen = []
    run = ConditionForward._run

    def spied(self, x, *rest):
        seen.append(tuple(x.shape))
        return run(self, x, *rest)

    monkeypatch.setattr(ConditionForward, "_run", spied)
    return seen


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    return tmp_path_factory.mktemp("words")


def images(made, **options):
    """Call a pipeline; return images in [-1, 1]."""
    torch.manual_seed(7)
    options = {"prompt": PROMPTS, "num_inference_steps": 3, **options}
    if "generator" not in options:
        options["generator"] = torch.Generator().manual_seed(5)
    return made(output_type="pt", **options).images * 2 - 1


def logged(caplog):
    return [r.getMessage() for r in caplog.records if r.name == "fastdiff"]


def assert_same(made, evaluations, count, least=60.0, **options):
    """Check that a call gives diffusers' images, and that the engine has evaluated the network so often."""
    expected = images(made, **options)
    fastdiff.accelerate(made)
    evaluations.clear()
    got = images(made, **options)
    made.unaccelerate()
    assert len(evaluations) == count
    assert psnr(got, expected) >= least
    assert expected.std() > 0.1
    return got


# The same images ------------------------------------------------------------------------------------------------------

SCHEDULERS = {
    "ddim": lambda: DDIMScheduler(**SCHEDULE),
    "plms": lambda: PNDMScheduler(**PNDM, skip_prk_steps=True),
    "euler": lambda: EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="linspace"),
    "euler ancestral": lambda: EulerAncestralDiscreteScheduler(beta_schedule="scaled_linear"),
    "v": lambda: DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
}


@pytest.mark.parametrize(
    ("kind", "scheduler", "options", "count"),
    [
        ("sd1", "ddim", {"eta": 0.7, "negative_prompt": ["", "red"]}, 3),
        SLOW("sd1", "plms", {"num_images_per_prompt": 2, "guidance_scale": 3.0}, 4),
        SLOW("sd1", "euler", {"guidance_scale": 1.0}, 3),
        SLOW("sd1", "euler ancestral", {"prompt": "a dog", "height": 16, "width": 24}, 3),
        SLOW("sd2", "v", {"guidance_rescale": 0.7}, 3),
        SLOW("sd2", "ddim", {"clip_skip": 1, "guidance_scale": 0.0}, 3),
    ],
)
def test_images_are_those_of_diffusers(words, evaluations, kind, scheduler, options, count):
    made = pipeline(words, kind, SCHEDULERS[scheduler]())
    got = assert_same(made, evaluations, count, **options)
    other = {**options, "prompt": "the sea" if isinstance(options.get("prompt"), str) else PROMPTS[::-1]}
    assert psnr(images(made, **other), got) < 30  # prompts matter


@pytest.fixture
def coded(monkeypatch):
    """The channels of what the engine encodes, 3, and decodes, 4."""
    seen = []
    run = NativeCoder.__call__
    monkeypatch.setattr(NativeCoder, "__call__", lambda self, x: seen.append(x.shape[1]) or run(self, x))
    return seen


def test_from_an_image(words, evaluations, coded):
    made = pipeline(words, "sd1", cls=StableDiffusionImg2ImgPipeline)
    picture = torch.rand(1, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    got = assert_same(made, evaluations, 2, prompt="a dog", image=picture, strength=0.7)
    assert coded == [3, 4]
    other = images(made, prompt="a dog", image=1.0 - picture, strength=0.7)
    assert psnr(got, other) < 30  # the picture matters


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["inpaint", "sd1"])
def test_inpainting(words, evaluations, coded, kind):
    """With a network of nine channels, and with one that reads the latents alone."""
    made = pipeline(words, kind, cls=StableDiffusionInpaintPipeline)
    generator = torch.Generator().manual_seed(1)
    picture = torch.rand(2, 3, 16, 16, generator=generator)
    mask = torch.zeros(2, 1, 16, 16)
    mask[:, :, 4:12] = 1
    assert_same(made, evaluations, 3, image=picture, mask_image=mask, height=16, width=16, strength=1.0)
    assert {shape[1] for shape in evaluations} == {9 if kind == "inpaint" else 4}
    assert coded.count(3) >= 1
    assert coded[-1] == 4


@pytest.mark.slow
def test_latent_consistency(words, evaluations):
    made = pipeline(words, "lcm", LCMScheduler(**SCHEDULE), cls=LatentConsistencyModelPipeline)
    got = assert_same(made, evaluations, 3, guidance_scale=8.0)
    assert psnr(images(made, guidance_scale=2.0), got) < 40  # the embedding of the guidance matters


@pytest.mark.slow
def test_sdxl(words, evaluations):
    made = pipeline(words, "sdxl", cls=StableDiffusionXLPipeline, **pair_parts(words))
    size = {"height": 16, "width": 16}
    got = assert_same(made, evaluations, 3, negative_prompt=["red", ""], **size)
    moved = images(made, negative_prompt=["red", ""], crops_coords_top_left=(300, 40), **size)
    assert psnr(moved, got) < 50  # the added vector matters


@pytest.mark.slow
def test_states_of_the_caller(words, evaluations):
    made = pipeline(words)
    generator = torch.Generator().manual_seed(2)
    states = {
        "prompt": None, "prompt_embeds": torch.randn(2, 9, WIDTH, generator=generator),
        "negative_prompt_embeds": torch.randn(2, 9, WIDTH, generator=generator),
    }  # fmt: skip
    assert_same(made, evaluations, 3, **states)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["in place", "another", "guidance off"])
def test_callbacks_that_change_the_states(words, evaluations, monkeypatch, kind):
    """Identity and version are no sign of a change: they fail for tensors of inference mode."""

    def change(made, i, t, kwargs):
        states = kwargs["prompt_embeds"]
        if i == 0 and kind == "in place":
            states.data.mul_(-1.0)
        elif i == 0 and kind == "another":
            return {"prompt_embeds": states.flip(2)}
        elif i == 0:
            made._guidance_scale = 0.0
            return {"prompt_embeds": states.chunk(2)[-1]}
        return {}

    computed = []
    compute = TextTables._compute
    monkeypatch.setattr(TextTables, "_compute", lambda self, *a: computed.append(1) or compute(self, *a))
    options = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": ["prompt_embeds"]}
    made = pipeline(words)
    got = assert_same(made, evaluations, 3, **options)
    # The texts of both prompts, and the empty one; not once for every step, nor for every image. Another batch size is
    # another runner.
    assert len(computed) == (3 + 2 if kind == "guidance off" else 3 + 3)
    assert psnr(got, images(made)) < 50
    with torch.inference_mode():
        assert_same(made, evaluations, 3, **options)


@pytest.mark.slow
def test_modes_and_repeated_calls(words, evaluations):
    made = pipeline(words)
    expected = images(made)
    fastdiff.accelerate(made)
    assert psnr(images(made), expected) >= 60
    with torch.inference_mode():
        assert psnr(images(made), expected) >= 60
    assert psnr(images(made, prompt=PROMPTS[::-1]), expected) < 30
    assert psnr(images(made), expected) >= 60
    assert isinstance(made.unet, UNet2DConditionModel)
    assert type(made.unet) is UNet2DConditionModel  # outside of calls, the module itself
    made.enable_attention_slicing()
    evaluations.clear()
    assert psnr(images(made), expected) >= 60
    made.unet.set_attn_processor(AttnProcessor())
    assert psnr(images(made), expected) >= 60
    assert len(evaluations) == 6
    copied = pickle.loads(pickle.dumps(made.unet))
    assert type(copied) is UNet2DConditionModel


# Left to diffusers, by name -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def small_network():
    return diffusers_condition(random_condition(config(mid_block_type=None)))


def front(unet):
    """Return an accelerated network by itself, and what it says about evaluations that are left."""
    said = []
    network = BackendCondition(unet, "auto")
    assert not network.unsupported_changes()
    assert not network.reasons_against()
    return network.front(said.append), said


@torch.no_grad()
@pytest.mark.parametrize(
    "variant",
    [
        "projection class",
        "text_time",
        "timestep_cond",
        *map(SLOW, ("tiny", "identity class", "text_proj", "activations")),
    ],
)
def test_networks_by_themselves(variant, evaluations):
    unet = diffusers_condition(random_condition(config(**VARIANTS[variant])))
    shown, said = front(unet)
    inputs = random_inputs(random_condition(config(**VARIANTS[variant])).config)
    x, t, states = inputs.pop("x"), inputs.pop("t"), inputs.pop("encoder_hidden_states")
    if variant == "activations":
        inputs = {}
    times = (t, t[:1], 40, 40.5)
    for time in times:
        expected = unet(x, time, states, **inputs).sample
        assert relative_error(shown(x, time, states, **inputs).sample, expected) <= 1e-5
    assert len(evaluations) == len(times)
    assert relative_error(shown(x, 40, encoder_hidden_states=states, return_dict=False, **inputs)[0],
                          unet(x, 40, states, **inputs).sample) <= 1e-5  # fmt: skip
    if variant == "timestep_cond":
        inputs["timestep_cond"] = inputs["timestep_cond"] + 1.0
        assert relative_error(shown(x, 40, states, **inputs).sample, unet(x, 40, states, **inputs).sample) <= 1e-5
        assert relative_error(shown(x, 40, states).sample, unet(x, 40, states).sample) <= 1e-5
    assert not said


@torch.no_grad()
@pytest.mark.parametrize("inference", [SLOW(False), True])
def test_keys_and_values_are_computed_once_for_equal_states(monkeypatch, inference):
    """Identity and version are no sign of a change: both fail for tensors of inference mode."""
    computed = []
    compute = TextTables._compute
    monkeypatch.setattr(TextTables, "_compute", lambda self, *a: computed.append(1) or compute(self, *a))
    unet = diffusers_condition(random_condition(config()))
    shown, said = front(unet)
    inputs = random_inputs(config())
    x, given = inputs["x"], inputs["encoder_hidden_states"]
    with torch.inference_mode(inference), torch.no_grad():  # inference_mode(False) alone switches gradients on
        states = given.clone()

        def count():
            computed.clear()
            assert relative_error(shown(x, 40, states).sample, unet(x, 40, states).sample) <= 1e-5
            return len(computed)

        assert [count(), count()] == [2, 0]
        states = states.clone()
        assert count() == 0
        states.data.mul_(-1.0)
        assert count() == 2
        states = states[:1].expand(2, -1, -1)
        assert count() == 0  # both are the first one, which is known
        states = states[:, :3] + 1.0
        assert count() == 1
    assert not said


def test_changes_of_a_network_are_found_by_name():
    unet = diffusers_condition(random_condition(config()))
    network = BackendCondition(unet, "auto")
    assert not network.unsupported_changes()
    unet.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    assert "up_blocks.0.s1 = 0.9 was added" in network.unsupported_changes()
    unet.disable_freeu()
    unet.set_attention_slice("auto")
    assert not network.unsupported_changes()
    attention = unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2
    attention.heads = 4
    assert "attn2.heads = 4" in network.unsupported_changes()[0]
    attention.heads = 2
    add_lora(unet, "one", 1)
    assert not network.unsupported_changes()
    assert len(network.layers) == 24
    add_lora(unet, "two", 1, use_dora=True)
    assert "has LoRA with use_dora" in network.unsupported_changes()[0]
    unet.unload_lora()
    assert not network.unsupported_changes()
    unet.fuse_qkv_projections()
    assert "FusedAttnProcessor2_0" in "; ".join(network.unsupported_changes())


@torch.no_grad()
def test_lora_of_a_network(evaluations):
    unet = diffusers_condition(random_condition(config()))
    inputs = random_inputs(config())
    x, states = inputs["x"], inputs["encoder_hidden_states"]
    plain = unet(x, 40, states).sample
    add_lora(unet, "one", 1)
    add_lora(unet, "two", 2)
    shown, said = front(unet)
    found = []
    for change in (
        lambda: unet.set_adapters(["one"], [0.5]),
        lambda: unet.set_adapters(["one", "two"], [0.5, 0.8]),
        unet.disable_adapters,
        unet.enable_adapters,
        unet.fuse_lora,
        unet.unfuse_lora,
    ):  # each after the front was made, as a callback would
        change()
        found.append(unet(x, 40, states).sample)
        assert relative_error(shown(x, 40, states).sample, found[-1]) <= 1e-5
    assert len(evaluations) == 6
    assert relative_error(found[2], plain) <= 1e-6
    assert relative_error(found[1], found[0]) > 1e-2
    scaled = unet(x, 40, states, cross_attention_kwargs={"scale": 0.3}).sample
    assert torch.equal(shown(x, 40, states, cross_attention_kwargs={"scale": 0.3}).sample, scaled)
    assert "cross_attention_kwargs scale" in said[0]


@torch.no_grad()
def test_a_change_of_adapters_packs_their_layers_alone(monkeypatch):
    packed, once = [], Weights._once
    monkeypatch.setattr(Weights, "_once", lambda self, key, make: once(self, key, lambda: packed.append(key) or make()))
    unet = diffusers_condition(random_condition(config())).requires_grad_(False)
    x, states = (random_inputs(config())[name] for name in ("x", "encoder_hidden_states"))
    add_lora(unet, "one", 1)
    add_lora(unet, "two", 2, ["conv1"])
    shown, said = front(unet)

    def layers(change):
        """Return the layers whose kernels a change makes anew, of those that are packed together all."""
        packed.clear()
        change()
        expected = unet(x, 40, states).sample
        assert relative_error(shown(x, 40, states).sample, expected) <= 1e-5
        return {name for key in packed if len(key) == 5 for name in key[0]}

    everything = layers(lambda: unet.set_adapters(["one", "two"], [0.5, 0.8]))
    adapted = {name for name, m in unet.named_modules() if hasattr(m, "lora_A")}
    convolutions = {name for name in adapted if name.endswith("conv1")}
    assert 0 < len(convolutions) < len(adapted) < len(everything) / 2
    beside = {f"{name[:-1]}{kind}" for name in adapted if name.endswith("attn1.to_q") for kind in "kv"}
    assert layers(lambda: unet.set_adapters(["one", "two"], [0.7, 0.8])) == adapted | beside
    assert layers(lambda: unet.set_adapters(["one", "two"], [0.7, -0.3])) == convolutions
    assert layers(lambda: unet.set_adapters(["one", "two"], [0.7, -0.3])) == set()
    other, _ = front(copy.deepcopy(unet))
    assert torch.equal(shown(x, 40, states).sample, other(x, 40, states).sample)  # the bits of packing everything
    assert layers(unet.disable_adapters) == adapted | beside
    assert not said


def residuals(unet, x, states):
    down = [torch.full_like(h, 0.3) for h in down_samples(unet, x, states)]
    return {"down_block_additional_residuals": down, "mid_block_additional_residual": torch.tensor(0.5)}


def down_samples(unet, x, states):
    h = unet.conv_in(x)
    found, emb = [h], unet.time_embedding(unet.get_time_embed(x, 40))
    for block in unet.down_blocks:
        extra = {"encoder_hidden_states": states} if hasattr(block, "attentions") else {}
        h, more = block(hidden_states=h, temb=emb, **extra)
        found += more
    return found


LEFT = {
    "residuals": (residuals, "with down_block_additional_residuals"),
    "mask": (
        lambda u, x, s: {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0, 0, 0]] * 2)},
        "encoder_attention_mask",
    ),
    "image mask": (lambda u, x, s: {"attention_mask": torch.ones(2, 64)}, "attention_mask"),
    "adapter": (
        lambda u, x, s: {"down_intrablock_additional_residuals": [torch.ones(2, 8, 1, 1)]},
        "down_intrablock_additional_residuals",
    ),
    "processors": (lambda u, x, s: {"cross_attention_kwargs": {"unknown": 1}}, "cross_attention_kwargs unknown"),
    "images": (lambda u, x, s: {"added_cond_kwargs": {"image_embeds": torch.ones(2, 3)}}, "added_cond_kwargs image_em"),
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("kind", LEFT)
def test_inputs_that_the_engine_does_not_take(small_network, kind, evaluations):
    unet = small_network
    shown, said = front(unet)
    inputs = random_inputs(config())
    x, states = inputs["x"], inputs["encoder_hidden_states"]
    make, words = LEFT[kind]
    expected = unet(x, 40, states, **make(unet, x, states)).sample
    plain = unet(x, 40, states).sample
    got = shown(x, 40, states, **make(unet, x, states)).sample
    assert torch.equal(got, expected)
    assert (relative_error(expected, plain) > 1e-3) == (kind in ("residuals", "mask", "adapter"))
    assert not evaluations
    assert words in said[0]
    assert relative_error(shown(x, 40, states, cross_attention_kwargs={"scale": 0.5}).sample, plain) <= 1e-5
    assert len(evaluations) == 1


@torch.no_grad()
def test_sizes_dtypes_and_gradients_that_the_engine_does_not_take(evaluations):
    unet = diffusers_condition(random_condition(config()))
    shown, said = front(unet)
    inputs = random_inputs(config(), size=(7, 9))
    x, states = inputs["x"], inputs["encoder_hidden_states"]
    assert torch.equal(shown(x, 40, states).sample, unet(x, 40, states).sample)
    assert said == [
        "evaluations of the network for latents whose height or width is no multiple of 2 are left to diffusers"
    ]
    with torch.enable_grad():
        leaf = random_inputs(config())["x"].requires_grad_()
        shown(leaf, 40, states).sample.sum().backward()
        assert leaf.grad is not None
        leaf = states.clone().requires_grad_()
        unet.requires_grad_(False)
        shown(random_inputs(config())["x"], 40, leaf).sample.sum().backward()
        assert leaf.grad is not None
    assert not evaluations
    unet.double()
    assert shown(x.double(), 40, states.double()).sample.dtype == torch.float64
    assert not evaluations


@pytest.mark.slow
def test_odd_latents_in_a_pipeline(words, evaluations, caplog):
    made = pipeline(words)
    size = {"height": 24, "width": 8 * 2 + 8, "latents": torch.randn(2, 4, 12, 12)}
    assert_same(made, evaluations, 3, **size)
    odd = {"latents": torch.randn(2, 4, 9, 8)}
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert_same(made, evaluations, 0, least=90, **odd)
    assert len([m for m in logged(caplog) if "no multiple of 2" in m]) == 1


def _freeu(made):
    made.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def _fused(made):
    made.fuse_qkv_projections(vae=False)


def _heads(made):
    made.unet.down_blocks[0].attentions[0].transformer_blocks[0].attn2.heads = 4


def _replaced(made):
    made.unet.forward = made.unet.forward


def _processor(made):
    class Own(AttnProcessor):
        pass

    made.unet.set_attn_processor(Own())


CHANGED = {
    "freeu": (_freeu, "s1 = 0.9"),
    "fused": (_fused, "FusedAttnProcessor2_0|was replaced|to_qkv"),
    "heads": (_heads, "heads = 4"),
    "hook": (lambda made: made.unet.conv_in.register_forward_hook(lambda m, a, out: 1.1 * out), "forward hooks"),
    "forward": (_replaced, "forward was replaced"),
    "processor": (_processor, r"\(Own\)"),
    "half": (lambda made: made.unet.bfloat16(), "bfloat16"),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", CHANGED)
def test_changes_after_acceleration_are_noticed(words, evaluations, caplog, kind):
    change, reason = CHANGED[kind]
    made = fastdiff.accelerate(pipeline(words))
    before = images(made)
    assert len(evaluations) == 3
    change(made)
    if kind == "half":
        made.to(torch.bfloat16)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        got = [images(made) for _ in range(2)]
    assert len(evaluations) == 3
    messages = [m for m in logged(caplog) if "decoder" not in m]
    assert len(messages) == 1
    assert re.search(reason, messages[0])
    made.unaccelerate()
    assert psnr(got[1].float(), images(made).float()) >= 60
    if kind not in ("forward", "processor", "fused"):
        assert psnr(got[1].float(), before) < 60


@pytest.mark.slow
def test_freeu_is_switched_off(words, evaluations):
    made = fastdiff.accelerate(pipeline(words))
    expected = images(made)
    _freeu(made)
    images(made)
    made.disable_freeu()
    evaluations.clear()
    assert psnr(images(made), expected) >= 60
    assert len(evaluations) == 3


@pytest.mark.slow
def test_a_change_in_the_middle_of_a_call(words, evaluations):
    def change(made, i, t, kwargs):
        if i == 0:
            _freeu(made)
        return {}

    def weights(made, i, t, kwargs):
        with torch.no_grad():
            made.unet.mid_block.resnets[0].conv1.weight.mul_(1.5 if i == 0 else 1.0)
        return {}

    made = pipeline(words)
    expected = images(made, callback_on_step_end=change)
    made.disable_freeu()
    fastdiff.accelerate(made)
    assert psnr(images(made, callback_on_step_end=change), expected) >= 60
    assert len(evaluations) == 1
    for each in (made, plain := pipeline(words)):
        each.disable_freeu()
    expected = images(plain, callback_on_step_end=weights)
    evaluations.clear()
    assert psnr(images(made, callback_on_step_end=weights), expected) >= 60
    assert len(evaluations) == 3


@pytest.mark.slow
def test_weights_between_calls(words, evaluations):
    made = fastdiff.accelerate(pipeline(words))
    images(made)
    attention = made.unet.mid_block.attentions[0].transformer_blocks[0].attn2
    attention.to_k.weight.data.mul_(-1.0)  # which bumps no version
    made.unet.conv_out = copy.deepcopy(made.unet.conv_out)
    made.unet.conv_out.weight.data.mul_(1.2)
    got = images(made)
    assert len(evaluations) == 6
    made.unaccelerate()
    assert psnr(got, images(made)) >= 60
    fastdiff.accelerate(made)
    made.unet = diffusers_condition(random_condition(config(cross_attention_dim=WIDTH), 9)).requires_grad_(False)
    got = images(made)
    assert len(evaluations) == 9
    made.unaccelerate()
    assert psnr(got, images(made)) >= 60


def test_a_named_backend(words):
    made = pipeline(words)
    for backend in ("eager", "compiled", "triton"):
        with pytest.raises(ConfigError, match=f"backend 'native' alone, not by '{backend}'"):
            fastdiff.accelerate(made, backend)
    fastdiff.accelerate(made, "native")
    _freeu(made)
    with pytest.raises(ModifiedError, match=r"s1 = 0\.9"):
        images(made)
    made.disable_freeu()
    made.unet.double()
    with pytest.raises(BackendError, match="not in float64"):
        images(made)


@pytest.mark.parametrize(
    ("changes", "words_"),
    [
        SLOW({"dual_cross_attention": True, "use_linear_projection": False}, "dual_cross_attention"),
        ({"attention_type": "gated"}, "attention_type"),
        SLOW({"num_class_embeds": 5}, "no labels beside a text"),
    ],
)
def test_networks_that_are_left_to_diffusers(words, evaluations, caplog, changes, words_):
    made = pipeline(words)
    kept = {k: v for k, v in made.unet.config.items() if not k.startswith("_")}
    made.unet = UNet2DConditionModel(**{**kept, **changes}).requires_grad_(False)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        fastdiff.accelerate(made)
    assert any(words_ in m for m in logged(caplog))
    assert made._fastdiff.coders
    if "attention_type" in changes:
        assert images(made).shape == (2, 3, 16, 16)
    assert not evaluations


# LoRA -----------------------------------------------------------------------------------------------------------------


def add_lora(unet, name, seed, targets=("to_q", "to_out.0", "conv1"), **options):
    torch.manual_seed(seed)
    described = LoraConfig(r=2, lora_alpha=4, target_modules=list(targets), **options)
    unet.add_adapter(described, adapter_name=name)
    with torch.no_grad():
        for key, p in unet.named_parameters():
            if "lora_" in key and f".{name}." in key:
                p.copy_(torch.randn(p.shape) * 0.2)


@pytest.mark.slow
def test_lora(words, evaluations, caplog):
    """Adapters, their scales, fusing and unfusing, each noticed by the next call."""
    made, plain = fastdiff.accelerate(pipeline(words)), pipeline(words)
    found = {"none": images(made)}

    def compare(label, change, count=3, **options):
        for each in (made, plain):
            change(each.unet)
        evaluations.clear()
        found[label], expected = images(made, **options), images(plain, **options)
        assert psnr(found[label], expected) >= 60, label
        assert len(evaluations) == count, label

    with caplog.at_level(logging.WARNING, "fastdiff"):
        compare("one", lambda unet: add_lora(unet, "one", 1))
        compare("two", lambda unet: add_lora(unet, "two", 2))
        compare("one, half", lambda unet: unet.set_adapters(["one"], [0.5]))
        compare("both", lambda unet: unet.set_adapters(["one", "two"], [0.5, 0.8]))
        compare("off", lambda unet: unet.disable_adapters())
        compare("on", lambda unet: unet.enable_adapters())
        compare("fused", lambda unet: unet.fuse_lora())
        compare("unfused", lambda unet: unet.unfuse_lora())
        compare("weights", lambda unet: [p.data.mul_(1.3) for key, p in unet.named_parameters() if "lora_A" in key])
        assert not logged(caplog)
        compare("scale", lambda unet: None, 0, cross_attention_kwargs={"scale": 0.3})
        compare("scale of 1", lambda unet: None, cross_attention_kwargs={"scale": 1.0})
        assert "cross_attention_kwargs scale" in logged(caplog)[0]
        compare("fused again", lambda unet: unet.fuse_lora())
        compare("unloaded", lambda unet: unet.unload_lora())
    assert psnr(found["off"], found["none"]) >= 60
    assert psnr(found["on"], found["both"]) >= 60
    assert psnr(found["fused"], found["both"]) >= 60
    assert psnr(found["unloaded"], found["weights"]) >= 60
    different = ["none", "one", "one, half", "both", "weights", "scale"]
    assert all(psnr(found[a], found[b]) < 50 for a, b in itertools.pairwise(different))
    assert made.unet.conv_in is vars(made)["unet"].conv_in


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"use_dora": True}, "LoRA with use_dora"),
        ({"lora_dropout": 0.5}, "dropout"),
        ({"lora_bias": True}, "lora_bias"),
    ],
)
def test_adapters_that_cannot_be_merged(words, evaluations, caplog, options, reason):
    made = fastdiff.accelerate(pipeline(words))
    if "lora_bias" in options:
        options = {**options, "bias": "none"}
    add_lora(made.unet, "one", 1, **options)
    made.unet.train("lora_dropout" in options)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        got = images(made)
    assert not evaluations
    assert reason in logged(caplog)[0]
    made.unaccelerate()
    assert psnr(got, images(made)) >= 60 or "lora_dropout" in options


@pytest.mark.slow
def test_adapters_that_a_callback_changes(words, evaluations):
    def change(made, i, t, kwargs):
        if i == 0:
            add_lora(made.unet, "one", 1)
        if i == 1:
            made.unet.set_adapters(["one"], [-0.5])
        return {}

    made, plain = fastdiff.accelerate(pipeline(words)), pipeline(words)
    got, expected = (images(each, callback_on_step_end=change, num_inference_steps=4) for each in (made, plain))
    assert psnr(got, expected) >= 60
    assert len(evaluations) == 4
    assert psnr(got, images(pipeline(words), num_inference_steps=4)) < 50
