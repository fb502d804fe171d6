"""Folders of Stable Diffusion's pipelines: the images of diffusers from the same latents, and what is refused."""

from __future__ import annotations

import copy
import dataclasses
import json
import logging
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, PNDMScheduler, StableDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file, save_file

from fastdiff import Sampler
from fastdiff.backends import native
from fastdiff.cli import main
from fastdiff.errors import BackendError, CheckpointError, ConfigError, InvalidArgument
from fastdiff.serving import Engine
from tests.support.captioned import network_and_encoder
from tests.support.pipelines import SCHEDULE, pipeline, psnr

BACKENDS = ["eager", *(["native"] if native.extension() is not None else [])]
PROMPTS = ["a red dog", "a cat on the sea"]
KINDS = {
    "sd1": PNDMScheduler(**{k: v for k, v in SCHEDULE.items() if k != "clip_sample"}, skip_prk_steps=True),
    "sd2": DDIMScheduler(**SCHEDULE, prediction_type="v_prediction"),
}
CALLS = {"sd1": {"solver": "plms", "steps": 4}, "sd2": {"solver": "ddim", "steps": 4}}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A folder of a pipeline of each kind, saved by diffusers."""
    base = tmp_path_factory.mktemp("pipelines")
    for kind, scheduler in KINDS.items():
        pipeline(base, kind, scheduler).save_pretrained(base / kind)
    return base


@pytest.fixture(scope="module")
def loaded(folders):
    known = {}

    def load(kind, backend="eager"):
        if (kind, backend) not in known:
            known[kind, backend] = Sampler.from_pretrained(folders / kind, backend=backend, device="cpu")
        return known[kind, backend]

    return load


@pytest.fixture
def folder(folders, tmp_path):
    """A copy of a folder, to be changed."""
    shutil.copytree(folders / "sd1", tmp_path / "sd1")
    return tmp_path / "sd1"


def drawn(folder, z, **options):
    """Draw by diffusers, in [-1, 1]."""
    theirs = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    images = theirs(latents=z.clone(), output_type="pt", **options).images
    return images * 2 - 1


def latents(n=2, h=8, w=8):
    return torch.randn(n, 4, h, w, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(
    ("kind", "backend"),
    [
        pytest.param(kind, backend, marks=[pytest.mark.slow] * ((kind, backend) != ("sd1", BACKENDS[-1])))
        for kind in KINDS
        for backend in BACKENDS
    ],
)
def test_images_are_those_of_diffusers(folders, loaded, kind, backend):
    z, sampler = latents(), loaded(kind, backend)
    expected = drawn(
        folders / kind, z, prompt=PROMPTS, negative_prompt=["", "red"], guidance_scale=7.5, num_inference_steps=4
    )
    call = {**CALLS[kind], "noise": z, "compat": "diffusers", "guidance": 7.5}
    output = sampler.sample(2, prompts=PROMPTS, negative=["", "red"], **call)
    assert output.images.shape == (2, 3, 16, 16)
    assert output.prompts == tuple(PROMPTS)
    assert output.images.abs().max() <= 1
    assert psnr(output.images, expected) >= 60
    assert 0.1 < output.images.std() < 0.95  # an image, that is not black and white either
    other = sampler.sample(2, prompts=PROMPTS[::-1], negative=["", "red"], **call)
    assert psnr(other.images, output.images) < 30  # prompts matter
    plain = sampler.sample(2, prompts=PROMPTS, **call)
    assert torch.equal(plain.images[0], output.images[0])
    assert psnr(plain.images[1], output.images[1]) < 40  # and so do negative ones


@pytest.mark.slow
def test_sizes_are_in_pixels(folders, loaded):
    z, sampler = latents(1, 8, 12), loaded("sd2")
    call = {"prompt": "a dog", "guidance_scale": 1.0, "num_inference_steps": 2}
    expected = drawn(folders / "sd2", z, height=16, width=24, **call)
    output = sampler.sample(1, prompts="a dog", noise=z, steps=2, size=(16, 24), compat="diffusers")
    assert output.images.shape == (1, 3, 16, 24)
    assert psnr(output.images, expected) >= 60
    assert sampler.sample(1, prompts="a dog", steps=1, size=12).images.shape == (1, 3, 12, 12)
    for size in (10, (12, 21), 0, "12", (4, 4, 4), 12.0):
        with pytest.raises(InvalidArgument, match="size="):
            sampler.sample(1, prompts="a dog", size=size)
    with pytest.raises(InvalidArgument, match=r"multiples of 4, are needed: latents are 2 times as small"):
        sampler.sample(1, prompts="a dog", size=10)


def test_states_of_the_caller(loaded):
    sampler = loaded("sd1")
    call = {"noise": latents(), "guidance": 3.0, "steps": 2}
    expected = sampler.sample(2, prompts=PROMPTS, negative="red", **call)
    context = sampler.encode([*PROMPTS, PROMPTS[0]])
    assert context.states.shape == (3, 77, 32)
    assert context.pooled is None
    assert torch.equal(context.states[0], context.states[2])
    output = sampler.sample(2, context=context.states[:2], negative=sampler.encode("red"), **call)
    assert torch.equal(output.images, expected.images)
    assert output.prompts is None
    mixed = sampler.sample(2, context=context.states[:2], negative="red", **call)
    assert torch.equal(mixed.images, expected.images)
    for_all = sampler.sample(2, context=context.states[1], **call)
    assert torch.equal(for_all.images[1], sampler.sample(2, prompts=PROMPTS[1], **call).images[1])
    short = sampler.sample(1, context=context.states[0, :20], steps=2)  # of another length, where nothing is guided
    assert short.images.isfinite().all()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"context": torch.zeros(77, 32), "prompts": "a dog"}, "both say what to draw"),
        ({"context": torch.zeros(77, 16)}, r"states of a text \[tokens, 32\]"),
        ({"context": torch.zeros(3, 77, 32)}, "states of 3 texts; 1 or 2"),
        ({"context": torch.zeros(0, 77, 32)}, "context is"),
        ({"context": torch.full((77, 32), torch.nan)}, "finite floats"),
        ({"context": torch.zeros(77, 32, dtype=torch.int64)}, "finite floats"),
        ({"context": "a dog"}, "context is str"),
        ({"context": torch.zeros(20, 32), "guidance": 2.0}, "context has 20 tokens, the text encoder gives 77"),
        ({"context": torch.zeros(20, 32), "negative": torch.zeros(21, 32)}, "they must agree"),
        ({"prompts": "dog " * 80}, "80 pieces of words; at most 75 fit"),
        ({"prompts": b"a dog"}, "prompts"),
        ({"prompts": "a dog", "image": torch.zeros(2, 3, 16, 16)}, "image= is of pixels"),
        ({"prompts": "a dog", "condition": torch.zeros(2, 3, 16, 16)}, "condition= is of pixels"),
        ({"prompts": "a dog", "noise": torch.zeros(2, 3, 16, 16)}, "noise"),
    ],
)  # fmt: skip
def test_refused_calls(loaded, options, words):
    with pytest.raises(InvalidArgument, match=words):
        loaded("sd1").sample(2, steps=2, **options)


def test_a_pooled_vector_belongs_to_its_states():
    unet, encoder = network_and_encoder()
    sampler = Sampler(unet, text_encoder=encoder, backend="eager")
    context = sampler.encode(["a dog", "snow"])
    expected = sampler.sample(2, prompts=["a dog", "snow"], guidance=2.0, steps=2)
    output = sampler.sample(2, context=context, guidance=2.0, steps=2)
    assert torch.equal(output.images, expected.images)
    for wrong in (context.states, dataclasses.replace(context, pooled=context.pooled[:1])):
        with pytest.raises(InvalidArgument, match=r"pooled vectors \[2, 16\] too"):
            sampler.sample(2, context=wrong, steps=2)
    with pytest.raises(InvalidArgument, match="has no autoencoder"):
        sampler.decode(torch.zeros(1, 4, 8, 8))


def test_other_methods(loaded):
    sampler = loaded("sd1")
    call = {"prompts": "a dog", "steps": 2}
    events = list(sampler.stream(1, **call))
    assert events[-1].x.shape == (1, 4, 8, 8)
    output = sampler.sample(1, **call)
    assert torch.equal(sampler.decode(events[-1].x), output.images)
    with pytest.raises(InvalidArgument, match=r"floats \[n, 4, height, width\]"):
        sampler.decode(torch.zeros(1, 3, 8, 8))
    with pytest.raises(InvalidArgument, match="image= is of pixels"):
        sampler.invert(torch.zeros(1, 3, 16, 16), prompts="a dog")
    between = sampler.interpolate(3, (0, 1), **call)
    assert (between.images[0] - output.images[0]).abs().max() < 1e-4
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other.sample(1, **call).images, output.images)
    with pytest.raises(InvalidArgument, match="an Engine does not decode"):
        Engine(sampler)


def test_parts_that_do_not_fit_a_sampler():
    unet, encoder = network_and_encoder()
    with pytest.raises(InvalidArgument, match=r"a fastdiff\.unet\.latents\.LatentDecoder is needed"):
        Sampler(unet, text_encoder=encoder, autoencoder="vae")


# Files ----------------------------------------------------------------------------------------------------------------


def edit(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.mark.parametrize(
    ("file", "changes", "words"),
    [
        ("model_index.json", {"_class_name": "StableDiffusionXLPipeline"}, "has no text_encoder_2; CLIPTextModelWith"),
        ("model_index.json", {"_class_name": "StableDiffusionUpscale"}, "class 'StableDiffusionUpscale' is not"),
        ("model_index.json", {"_class_name": None}, "class None is not supported; a StableDiffusionPipeline or a"),
        ("model_index.json", {"text_encoder": ["transformers", "T5EncoderModel"]}, "'T5EncoderModel' as its text"),
        ("model_index.json", {"tokenizer": [None, None]}, "has no tokenizer; CLIPTokenizer"),
        ("model_index.json", {"vae": ["diffusers", "AutoencoderTiny"]}, "'AutoencoderTiny' as its vae"),
        ("vae/config.json", {"_class_name": "AutoencoderTiny"}, "'AutoencoderTiny' is not supported"),
        ("vae/config.json", {"latents_mean": [0, 0, 0, 0]}, "latents_mean"),
        ("vae/config.json", {"scaling_factor": 0}, "scaling_factor=0"),
        ("vae/config.json", {"use_post_quant_conv": "no"}, "use_post_quant_conv"),
        ("text_encoder/config.json", {"model_type": "bert"}, "model_type 'bert'"),
        ("text_encoder/config.json", {"num_attention_heads": 5}, "transformers cannot build"),
        ("text_encoder/config.json", {"hidden_act": "nothing"}, "transformers cannot build"),
        ("unet/config.json", {"time_cond_proj_dim": 16}, "cond_proj"),
        ("unet/config.json", {"in_channels": 9}, "in_channels|conv_in"),
    ],
)  # fmt: skip
def test_refused_configurations(folder, file, changes, words):
    edit(folder / file, **changes)
    with pytest.raises((ConfigError, CheckpointError), match=words):
        Sampler.from_pretrained(folder, device="cpu")


@pytest.mark.slow
def test_networks_with_other_inputs_are_refused_by_name(tmp_path):
    for kind, words in (("inpaint", "masked image of an inpainting model"), ("lcm", "time_cond_proj_dim")):
        pipeline(tmp_path, kind).save_pretrained(tmp_path / kind)
        with pytest.raises(ConfigError, match=words):
            Sampler.from_pretrained(tmp_path / kind, device="cpu")


def test_a_pipeline_without_a_unet_is_refused_by_name(folder):
    index = json.loads((folder / "model_index.json").read_text())
    del index["unet"]
    index |= {"_class_name": "FluxPipeline", "transformer": ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    with pytest.raises(ConfigError, match="class 'FluxPipeline' is not supported"):
        Sampler.from_pretrained(folder)


@pytest.mark.slow
def test_weights_of_the_parts(folder, loaded):
    expected = loaded("sd1").sample(1, prompts="a dog", steps=2).images

    def images(**options):
        return (
            Sampler.from_pretrained(folder, backend="eager", device="cpu", **options)
            .sample(1, prompts="a dog", steps=2)
            .images
        )

    # Half the parts have the variant, as some folders of diffusers do.
    encoder, vae, unet = folder / "text_encoder", folder / "vae", folder / "unet"
    (encoder / "model.safetensors").rename(encoder / "model.fp16.safetensors")
    weights = "diffusion_pytorch_model.safetensors"
    (unet / weights).rename(unet / "diffusion_pytorch_model.fp16.safetensors")
    assert torch.equal(images(variant="fp16"), expected)
    (unet / "diffusion_pytorch_model.fp16.safetensors").rename(unet / weights)
    with pytest.raises(CheckpointError, match=r"no model\.safetensors; a text encoder is read from"):
        images()
    # Names of other versions of transformers, and the constant that some store.
    tensors = load_file(encoder / "model.fp16.safetensors")
    prefixed = any(name.startswith("text_model.") for name in tensors)
    other = {name.removeprefix("text_model.") if prefixed else f"text_model.{name}": t for name, t in tensors.items()}
    other["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(other, encoder / "model.safetensors")
    assert torch.equal(images(), expected)
    # Names of early versions of diffusers.
    tensors = load_file(vae / weights)
    early = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    renamed = {}
    for name, tensor in tensors.items():
        for now, before in early.items():
            name = name.replace(f".{now}.", f".{before}.")
        renamed[name] = tensor
    assert renamed.keys() != tensors.keys()
    save_file(renamed, vae / weights)
    assert torch.equal(images(), expected)
    # Damage.
    del other["text_model.final_layer_norm.weight" if not prefixed else "final_layer_norm.weight"]
    save_file(other, encoder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"final_layer_norm\.weight is missing"):
        images()
    save_file(tensors | {"decoder.conv_out.bias": torch.full((3,), torch.nan)}, vae / weights)
    save_file(load_file(encoder / "model.fp16.safetensors"), encoder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"decoder, .*\n?.*decoder\.conv_out\.bias|conv_out"):
        images()


@pytest.mark.slow
def test_code_and_pickles_of_a_folder_are_not_run(folder):
    evil = "raise SystemExit('code of the folder was run')"
    (folder / "text_encoder" / "modeling.py").write_text(evil)
    (folder / "tokenizer" / "tokens.py").write_text(evil)
    edit(folder / "text_encoder" / "config.json", auto_map={"AutoModel": "modeling.Evil"})
    edit(folder / "tokenizer" / "tokenizer_config.json", auto_map={"AutoTokenizer": ["tokens.Evil", None]})
    sampler = Sampler.from_pretrained(folder, device="cpu")
    assert sampler.text_encoder.tokenize("a dog")[0] == sampler.text_encoder.tokenizer.bos_token_id


def test_a_tokenizer_that_does_not_fit(folder):
    vocabulary = folder / "tokenizer" / "vocab.json"
    for file in ("tokenizer.json",):
        (folder / "tokenizer" / file).unlink(missing_ok=True)
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises((CheckpointError, ConfigError), match="tokenizer"):
        Sampler.from_pretrained(folder, device="cpu")
    assert not vocabulary.exists()


def test_without_transformers(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(BackendError, match=r"pip install 'fastdiff\[text\]'"):
        Sampler.from_pretrained(folder, device="cpu")


def test_a_safety_checker_is_not_run_and_named(folder, caplog):
    edit(folder / "model_index.json", safety_checker=["stable_diffusion", "StableDiffusionSafetyChecker"])
    with caplog.at_level(logging.WARNING, "fastdiff"):
        Sampler.from_pretrained(folder, device="cpu")
    (message,) = [r.getMessage() for r in caplog.records]
    assert "safety_checker" in message
    assert "vae" not in message


@pytest.mark.slow
def test_outdated_schedulers(folder, caplog):
    """A pipeline of diffusers replaces two options, with a deprecation warning."""
    config = folder / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({"_class_name": "DDIMScheduler", "beta_schedule": "scaled_linear"}))
    edit(folder / "model_index.json", scheduler=["diffusers", "DDIMScheduler"])
    z = latents(1)
    expected = drawn(folder, z, prompt="a red dog", guidance_scale=5.0, num_inference_steps=3)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        sampler = Sampler.from_pretrained(folder, backend="eager", device="cpu")
    (message,) = [r.getMessage() for r in caplog.records if r.name == "fastdiff"]
    assert "clip_sample=False, steps_offset=1 as in diffusers' pipeline" in message
    output = sampler.sample(1, prompts="a red dog", noise=z, guidance=5.0, steps=3, compat="diffusers")
    assert psnr(output.images, expected) >= 60


@pytest.mark.slow
def test_multistep_solvers(folders, loaded):
    """The schedulers of diffusers from the configuration of another one, as users exchange them."""
    z, sampler = latents(1), loaded("sd2")
    theirs = StableDiffusionPipeline.from_pretrained(folders / "sd2", local_files_only=True)
    theirs.scheduler = DPMSolverMultistepScheduler.from_config(theirs.scheduler.config)
    theirs.set_progress_bar_config(disable=True)
    expected = theirs(
        "a red dog", latents=z.clone(), guidance_scale=5.0, num_inference_steps=4, output_type="pt"
    ).images
    output = sampler.sample(
        1, prompts="a red dog", noise=z, guidance=5.0, solver="dpmpp_2m", steps=4, compat="diffusers"
    )
    assert psnr(output.images, expected * 2 - 1) >= 60


# The command line -----------------------------------------------------------------------------------------------------


def run(monkeypatch, capsys, *arguments):
    monkeypatch.setattr(sys, "argv", ["fastdiff", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    captured = capsys.readouterr()
    return stop.value.code or 0, captured.out, captured.err


def test_the_command_line(folders, loaded, tmp_path, monkeypatch, capsys):
    call = ("sample", folders / "sd1", "--prompt", "a dog", "--negative", "red", "--guidance", 2, "-n", 2, "--steps", 2)
    options = ("--backend", "eager", "--device", "cpu", "--json", "--size", 24, "-o", tmp_path / "a.npz")
    code, out, err = run(monkeypatch, capsys, *call, *options, "--animate", tmp_path / "a.gif")
    assert (code, err) == (0, "")
    assert json.loads(out)["shape"] == [3, 24, 24]
    want = loaded("sd1").sample(2, prompts="a dog", negative="red", guidance=2.0, steps=2, size=24).images
    with np.load(tmp_path / "a.npz") as file:
        images = torch.from_numpy(file["images"]).permute(0, 3, 1, 2) / 127.5 - 1
    assert (images - want).abs().max() <= 1 / 127.5
    with Image.open(tmp_path / "a.gif") as animation:
        assert animation.n_frames == 2
        animation.convert("RGB").save(tmp_path / "in.png")
    code, _, err = run(monkeypatch, capsys, *call, *options, "--image", tmp_path / "in.png")
    assert code == 2
    assert "--image: the network's images are latents" in err


def test_info(folders, monkeypatch, capsys):
    code, out, err = run(monkeypatch, capsys, "info", folders / "sd2", "--json")
    assert (code, err) == (0, "")
    found = json.loads(out)
    assert found["image"] == [3, 16, 16]
    assert found["latents"] == [4, 8, 8]
    assert found["decoder_parameters"] > 0
    assert found["text_encoder_parameters"] > 0
    assert found["prediction"] == "v_prediction"
