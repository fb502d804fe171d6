"""Folders of Stable Diffusion XL: two text encoders, their pooled vector and the sizes, as in diffusers' pipeline."""

from __future__ import annotations

import functools
import json
import shutil
import sys

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline

from fastdiff import NoiseSchedule, Sampler, UNetCondition, UNetConditionConfig
from fastdiff.backends import native
from fastdiff.bench.inputs import Workload
from fastdiff.bench.networks import load
from fastdiff.cli import main
from fastdiff.core.state import Texts
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.text import ClipEncoder, ClipPair
from tests.support.captioned import network_and_encoder
from tests.support.pipelines import NETWORKS, SCHEDULE, pair_parts, pipeline, psnr, text_parts

BACKENDS = ["eager", *(["native"] if native.extension() is not None else [])]
PROMPTS = ["a red dog", "a cat on the sea"]
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)  # the others prove the same kind
EULER = EulerDiscreteScheduler(
    beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="leading", steps_offset=1
)
CALL = {"solver": "euler", "steps": 3, "compat": "diffusers"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    base = tmp_path_factory.mktemp("xl")
    made = pipeline(base, "sdxl", EULER, StableDiffusionXLPipeline, **pair_parts(base))
    made.save_pretrained(base / "xl")
    return base / "xl"


@pytest.fixture(scope="module")
def loaded(folder):
    known = {}

    def load(backend=BACKENDS[-1]):
        if backend not in known:
            known[backend] = Sampler.from_pretrained(folder, backend=backend, device="cpu")
        return known[backend]

    return load


@pytest.fixture(scope="module")
def theirs(folder):
    made = StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    return made


def drawn(made, z, **options):
    """Draw by diffusers, in [-1, 1]."""
    options = {"num_inference_steps": 3, "height": 16, "width": 16, **options}
    return made(latents=z.clone(), output_type="pt", **options).images * 2 - 1


def latents(n=2, h=8, w=8):
    return torch.randn(n, 4, h, w, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("backend", [SLOW("eager"), *BACKENDS[1:]])
def test_images_are_those_of_diffusers(loaded, theirs, backend):
    z, sampler = latents(), loaded(backend)
    call = {**CALL, "noise": z, "guidance": 5.0, "prompts": PROMPTS}
    expected = drawn(theirs, z, prompt=PROMPTS, negative_prompt=["", "red"], guidance_scale=5.0)
    output = sampler.sample(2, negative=["", "red"], **call)
    assert psnr(output.images, expected) >= 60
    assert output.prompts == tuple(PROMPTS)
    assert 0.1 < output.images.std() < 0.95
    # No negative prompt is zeros, and not the text "".
    plain = sampler.sample(2, **call)
    assert psnr(plain.images, drawn(theirs, z, prompt=PROMPTS, guidance_scale=5.0)) >= 60
    assert psnr(plain.images[:1], output.images[:1]) < 50
    swapped = sampler.sample(2, negative=["", "red"], **{**call, "prompts": PROMPTS[::-1]})
    assert psnr(swapped.images, output.images) < 30  # prompts matter


def test_sizes_are_a_part_of_the_condition(loaded, theirs):
    z = latents(1, 8, 12)
    expected = drawn(theirs, z, prompt="a dog", guidance_scale=1.0, height=16, width=24)
    output = loaded().sample(1, prompts="a dog", noise=z, size=(16, 24), **CALL)
    assert psnr(output.images, expected) >= 60
    other = drawn(theirs, z, prompt="a dog", guidance_scale=1.0, height=16, width=24, original_size=(500, 9))
    assert psnr(other, expected) < 50


@pytest.mark.slow
def test_no_negative_prompt_is_a_text_where_the_pipeline_says_so(folder, tmp_path, theirs):
    shutil.copytree(folder, tmp_path / "xl")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "force_zeros_for_empty_prompt": False}))
    sampler = Sampler.from_pretrained(tmp_path / "xl", device="cpu")
    z = latents(1)
    call = {**CALL, "noise": z, "guidance": 5.0, "prompts": "a dog"}
    expected = drawn(theirs, z, prompt="a dog", negative_prompt="", guidance_scale=5.0)
    assert psnr(sampler.sample(1, **call).images, expected) >= 60


def test_states_of_the_caller(loaded):
    sampler = loaded()
    call = {"noise": latents(), "guidance": 3.0, "steps": 2}
    context = sampler.encode(PROMPTS)
    assert context.states.shape == (2, 77, 64)
    assert context.pooled.shape == (2, 32)
    for negative in (None, "red"):
        expected = sampler.sample(2, prompts=PROMPTS, negative=negative, **call).images
        assert torch.equal(sampler.sample(2, context=context, negative=negative, **call).images, expected)
    zeros = Texts(torch.zeros(1, 77, 64), torch.zeros(1, 32))
    expected = sampler.sample(2, prompts=PROMPTS, **call).images
    assert torch.equal(sampler.sample(2, context=context, negative=zeros, **call).images, expected)
    short = Texts(context.states[:, :20], context.pooled)  # zeros are as long as the texts
    assert sampler.sample(2, context=short, **call).images.isfinite().all()
    with pytest.raises(InvalidArgument, match=r"pooled vectors \[2, 32\] too"):
        sampler.sample(2, context=context.states, **call)
    with pytest.raises(InvalidArgument, match="80 pieces of words; at most 75 fit"):
        sampler.sample(1, prompts="dog " * 80)


@pytest.mark.slow
def test_a_scheduler_is_taken_as_it_is(folder, tmp_path):
    """The pipeline of XL does not replace outdated options, unlike those of Stable Diffusion 1 and 2."""
    shutil.copytree(folder, tmp_path / "xl")
    DDIMScheduler(**{**SCHEDULE, "clip_sample": True, "steps_offset": 0}).save_pretrained(tmp_path / "xl" / "scheduler")
    index = tmp_path / "xl" / "model_index.json"
    index.write_text(json.dumps({**json.loads(index.read_text()), "scheduler": ["diffusers", "DDIMScheduler"]}))
    made = StableDiffusionXLPipeline.from_pretrained(tmp_path / "xl", local_files_only=True, add_watermarker=False)
    made.set_progress_bar_config(disable=True)
    z = latents(1)
    expected = drawn(made, z, prompt="a dog", guidance_scale=5.0)
    sampler = Sampler.from_pretrained(tmp_path / "xl", device="cpu")
    call = {**CALL, "solver": "ddim", "noise": z, "guidance": 5.0, "prompts": "a dog"}
    assert psnr(sampler.sample(1, **call).images, expected) >= 60
    assert psnr(sampler.sample(1, clip=None, **call).images, expected) < 50  # clipping matters


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        SLOW("model_index.json", {"_class_name": "StableDiffusionXLImg2ImgPipeline"}, "ImgPipeline' is not"),
        ("model_index.json", {"text_encoder": [None, None]}, "has no text_encoder; CLIPTextModel"),  # the refiner's
        SLOW("model_index.json", {"tokenizer_2": None}, "has no tokenizer_2"),
        SLOW("model_index.json", {"text_encoder_2": ["transformers", "CLIPTextModel"]}, "TextModelWithProjection is"),
        ("model_index.json", {"force_zeros_for_empty_prompt": "no"}, "force_zeros_for_empty_prompt='no'"),
        ("model_index.json", {"_class_name": "StableDiffusionPipeline"}, "'text_time' of the|reads 64"),
        SLOW("text_encoder_2/config.json", {"model_type": "t5"}, "model_type 't5'"),
        SLOW("text_encoder_2/config.json", {"projection_dim": 16}, "text_projection"),
        SLOW("text_encoder/config.json", {"hidden_size": 64}, "does not fit this text encoder"),
        ("unet/config.json", {"addition_time_embed_dim": 6}, "gives 68 with 6 sizes; the network takes 80"),
        SLOW("unet/config.json", {"time_cond_proj_dim": 16}, "cond_proj"),
        SLOW("unet/config.json", {"addition_embed_type": None}, "add_embedding|does not suit the pipeline"),
        SLOW("tokenizer_2/tokenizer_config.json", {"pad_token": None}, "token for padding|pad_token"),
    ],
)  # fmt: skip
def test_refused_configurations(folder, tmp_path, file, changes, words):
    shutil.copytree(folder, tmp_path / "xl")
    edit(tmp_path / "xl" / file, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        Sampler.from_pretrained(tmp_path / "xl", device="cpu")


def test_encoders_that_do_not_fit_each_other(tmp_path):
    parts = pair_parts(tmp_path)
    first = ClipEncoder(parts["text_encoder"], parts["tokenizer"])
    with pytest.raises(ConfigError, match="CLIPTextModelWithProjection is needed"):
        ClipPair(first, first)
    second = ClipEncoder(parts["text_encoder_2"], parts["tokenizer_2"])
    first.tokens = 20
    with pytest.raises(ConfigError, match="take 20 and 77 tokens"):
        ClipPair(first, second)


def test_networks_of_pixels_that_take_sizes():
    """Without an autoencoder, and with an encoder of the caller."""
    fields = {**NETWORKS["sdxl"], "cross_attention_dim": 16, "projection_class_embeddings_input_dim": 8 * 6 + 16}
    base, encoder = network_and_encoder(class_embed_type=None, projection_class_embeddings_input_dim=None)
    config = UNetConditionConfig.from_dict({**base.config.to_dict(), **fields, "norm_num_groups": 4})
    torch.manual_seed(0)
    unet = UNetCondition(config).eval()
    found = [
        Sampler(unet, NoiseSchedule(), text_encoder=encoder, backend=backend).sample(
            2, prompts=["a dog", "snow"], guidance=2.0, steps=2
        ).images
        for backend in BACKENDS
    ]  # fmt: skip
    assert all((images - found[0]).abs().max() <= 1e-4 for images in found)
    narrow = UNetConditionConfig.from_dict({**config.to_dict(), "projection_class_embeddings_input_dim": 8 * 6 + 9})
    with pytest.raises(InvalidArgument, match="vectors of 16 numbers, the network takes 9"):
        Sampler(UNetCondition(narrow), text_encoder=encoder).sample(1, prompts="a dog", steps=1)
    none = UNetConditionConfig.from_dict({**config.to_dict(), "projection_class_embeddings_input_dim": 8 * 3})
    with pytest.raises(ConfigError, match="6 sizes, embedded in 8 numbers each"):
        Sampler(UNetCondition(none), text_encoder=encoder)


@pytest.mark.slow
def test_a_comparison_of_engines_refuses_it_by_name(folder):
    with pytest.raises(ConfigError, match="addition_embed_type='text_time'"):
        Workload.of(load(str(folder)), 1)


def test_info(folder, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fastdiff", "info", str(folder), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    found = json.loads(capsys.readouterr().out)
    assert found["image"] == [3, 16, 16]
    one = sum(p.numel() for p in text_parts(folder.parent / "words-gelu", "gelu", "!")[1].parameters())
    assert found["text_encoder_parameters"] == 2 * one + 32 * 32
