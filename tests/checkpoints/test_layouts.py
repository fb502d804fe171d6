"""Files of the original code bases: every network is compared with an independent oracle, and converted both ways."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import shutil
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, EDMEulerScheduler, UNet2DModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.backends import Spec, native, prepare
from fastdiff.checkpoints import FORMATS, PRESETS, convert, layouts, load, originals, save_folder
from fastdiff.checkpoints.fitting import build, empty, fit
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.checkpoints.loading import read_model
from fastdiff.core.lower import lower
from fastdiff.core.state import State, TableBank
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, ddim
from fastdiff.unet.model import timestep_embedding
from tests.support import oracles as oracle
from tests.support.interpreter import Interpreter
from tests.support.paths import ROOT
from tests.support.unets import RESNET_BLOCKS, TINY, change, random_unet, randomize_, relative_error

needs_native = pytest.mark.skipif(native.extension() is None, reason="fastdiff._native is not built")

# Networks of the original code bases, as they build them, with the flags that say so and the layout of their files.
CASES = {
    "ddpm": (functools.partial(oracle.DDPM, 32, 3, (1, 2), 1, (4,), 3, 8), "--image_size 8", "ddpm"),
    "improved-diffusion": (
        functools.partial(oracle.OpenAI, 8, 32, (1, 2), 1, (1, 2), out_channels=6, num_heads=4, scale=0.25),
        "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --learn_sigma True "
        "--attention_resolutions 8,4 --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True",
        "openai",
    ),
    "improved-diffusion, no FiLM, one head": (
        functools.partial(oracle.OpenAI, 8, 32, (1, 1), 2, (2,), num_heads=1, scale_shift=False),
        "--image_size 8 --num_channels 32 --num_res_blocks 2 --channel_mult 1,1 --num_heads 1 "
        "--attention_resolutions 4 --use_scale_shift_norm False",
        "openai",
    ),
    "ADM-64": (
        functools.partial(
            oracle.OpenAI, 8, 32, (1, 2), 1, (2,), out_channels=6, num_head_channels=16, num_classes=7,
            resblock_updown=True, new_order=True,
        ),
        "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --learn_sigma True --dropout 0.1 "
        "--attention_resolutions 4 --num_head_channels 16 --class_cond True --resblock_updown True "
        "--use_new_attention_order True --use_fp16 True --noise_schedule cosine",
        "openai-new",
    ),
    "ADM-512": (
        functools.partial(
            oracle.OpenAI, 16, 64, (0.5, 1, 1), 1, (2, 4), out_channels=6, num_head_channels=32, num_classes=3,
            resblock_updown=True,
        ),
        "--image_size 16 --num_channels 64 --num_res_blocks 1 --channel_mult 0.5,1,1 --learn_sigma True "
        "--attention_resolutions 8,4 --num_head_channels 32 --class_cond True --resblock_updown True",
        "openai",
    ),
    "DDPM++": (functools.partial(oracle.SongUNet, 8, 128, (1, 2), 1, (4,)), None, "edm"),
    "DDPM++ of classes": (functools.partial(oracle.SongUNet, 8, 128, (1, 2), 1, (4,), label_dim=3), None, "edm"),
}  # fmt: skip


@functools.cache
def original(name):
    """The oracle with random weights, in float64."""
    return randomize_(CASES[name][0]()).eval().double()


def state_dict(name, dtype=torch.float32):
    return {k: v.to(dtype).clone() for k, v in original(name).state_dict().items()}


@pytest.fixture
def file(tmp_path):
    """Return a function that writes a case's file as its code base does; it returns the path and options of `load`."""

    def write(name, change=lambda state: state, suffix=".pt"):
        path = tmp_path / f"original{suffix}"
        torch.save(change(state_dict(name)), path)
        return path, {} if CASES[name][1] is None else {"flags": CASES[name][1]}

    return write


def inputs(unet, batch=3):
    config = unet.config
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(batch, config.in_channels, config.sample_size, config.sample_size, generator=generator)
    t = torch.tensor([0.0, 421.75, 999.0])[:batch]
    return x, t, torch.tensor([2, 0, 1])[:batch] if config.conditional else None


def answer(network, x, t, labels):
    if labels is not None and isinstance(network, oracle.SongUNet):
        labels = torch.eye(network.label_dim + 1, dtype=x.dtype)[labels, : network.label_dim]
    return network(x, t) if labels is None else network(x, t, labels)


# The network is the original's ----------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
def test_network_is_the_original(file, name):
    """Compare the module in float32 and float64, and the lowered program in float64, with the oracle."""
    path, options = file(name)
    unet = load(path, **options).unet
    x, t, labels = inputs(unet)
    expected = answer(original(name), x.double(), t.double(), labels)
    assert expected.std() > 0.1
    assert relative_error(answer(unet, x, t, labels), expected) <= 1e-5
    double = build(unet.config, unet.state_dict(), "w").double()
    assert relative_error(answer(double, x.double(), t.double(), labels), expected) <= 1e-10
    program = Interpreter(lower(double, x.shape[2:]), double, len(x))
    assert relative_error(program(x.double(), t.double(), labels), expected) <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    "backend",
    ["eager", pytest.param("native", marks=needs_native), pytest.param("compiled", marks=pytest.mark.slow)],
)
def test_every_backend_runs_it(file, name, backend):
    if backend == "compiled" and not any(map(shutil.which, ("g++", "clang++", "c++", "cl"))):
        pytest.skip("torch.compile needs a C++ compiler")
    path, options = file(name)
    unet = load(path, **options).unet
    x, _, labels = inputs(unet)
    table = ddim(NoiseSchedule(), 4)
    spec = Spec(len(x), tuple(x.shape[1:]), torch.float32, torch.device("cpu"))
    state = State.create(
        x.clone(), TableBank([table], spec.device), seed=0, index=list(range(len(x))), label=labels,
        guidance=[1.0] * len(x), guidance_rescale=0.0, noise=None,
    )  # fmt: skip
    t = state.column("t").double()
    prepare(backend, unet, spec).forward(state)
    assert relative_error(state.out, answer(original(name), x.double(), t, labels)) <= 1e-5


SENSITIVE = {
    "ddpm": {"norm_eps": 1e-5, "downsample_padding": 1, "flip_sin_to_cos": True, "freq_shift": 0,
             "attention_head_dim": 32},
    "improved-diffusion": {"norm_eps": 1e-6, "downsample_padding": 0, "flip_sin_to_cos": False, "freq_shift": 1,
                           "num_attention_heads": 2, "timestep_scale": 1.0},
    "ADM-64": {"attention_head_dim": 32, "norm_eps": 1e-6, "flip_sin_to_cos": False},
    "ADM-512": {"attention_head_dim": 16, "freq_shift": 1},
    "DDPM++": {"block_scale_factor": 1.0, "mid_block_scale_factor": 1.0, "flip_sin_to_cos": True, "freq_shift": 0,
               "norm_eps": 1e-5},
}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize(("name", "field"), [(n, f) for n, fields in SENSITIVE.items() for f in fields])
def test_every_convention_is_heard(file, name, field):
    """A single convention of another code base makes the comparison above fail."""
    path, options = file(name)
    source = read_model(path, **options)
    config = dataclasses.replace(source.config, **{field: SENSITIVE[name][field]})
    assert config != source.config
    unet = build(config, source.tensors, path, source.layout).double()
    x, t, labels = inputs(unet)
    expected = answer(original(name), x.double(), t.double(), labels)
    assert relative_error(answer(unet, x.double(), t.double(), labels), expected) > 1e-7


@torch.no_grad()
def test_every_order_of_qkv_is_another_network(file):
    """Networks with several heads distinguish all three orders, networks with one head only that of edm."""
    for name, wrong in (("ADM-64", "openai"), ("improved-diffusion", "openai-new")):
        path, options = file(name)
        source = read_model(path, **options)
        unet = build(source.config, source.tensors, path, wrong).double()
        x, t, labels = inputs(unet)
        expected = answer(original(name), x.double(), t.double(), labels)
        assert relative_error(answer(unet, x.double(), t.double(), labels), expected) > 1e-2


@pytest.mark.parametrize(("flip", "shift"), [(False, 1), (True, 0)])
def test_frequencies_are_those_of_every_code_base(flip, shift):
    """The code bases compute them in different orders of operations in float32, so they differ by roundings."""
    half = 64
    i = torch.arange(half, dtype=torch.float32)
    theirs = {
        "pesser": torch.exp(i * -(math.log(10000) / (half - 1))),
        "openai": torch.exp(-math.log(10000) * i / half),
        "edm": (1 / 10000) ** (i / (half - 1)),
    }
    ours = timestep_embedding(
        torch.tensor([1e-3], dtype=torch.float64), 2 * half, flip_sin_to_cos=flip, freq_shift=shift
    )
    sines = ours[0, half:] if flip else ours[0, :half]
    for name in ("openai",) if flip else ("pesser", "edm"):
        assert (torch.asin(sines) / 1e-3 / theirs[name] - 1).abs().max() < 2e-6


# Conversion -----------------------------------------------------------------------------------------------------------


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype
        assert torch.equal(a[name], b[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_there_and_back(tmp_path, name, dtype):
    """Conversion through every format back to the original changes no bit, in any dtype."""
    layout, flags = CASES[name][2], CASES[name][1]
    state = state_dict(name, dtype)
    torch.save(state, tmp_path / "a.pt")
    options = {} if flags is None else {"flags": flags}
    done = convert(tmp_path / "a.pt", tmp_path / "folder", **options)
    assert (done["format"], done["from"], done["left_out"]) == ("diffusers", layout, [])
    assert done["parameters"] == sum(p.numel() for p in original(name).parameters())
    convert(tmp_path / "folder", tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "named.safetensors", to=layout)
    convert(tmp_path / "named.safetensors", tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "back.pt", to=layout)
    assert_same_bits(torch.load(tmp_path / "back.pt", weights_only=True), state)
    assert_same_bits(load_file(tmp_path / "named.safetensors"), state)
    assert_same_bits(
        load_file(tmp_path / "again" / "unet" / WEIGHTS), load_file(tmp_path / "folder" / "unet" / WEIGHTS)
    )
    assert_same_bits(load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "folder" / "unet" / WEIGHTS))
    loaded = [load(tmp_path / p) for p in ("folder", "one.safetensors", "named.safetensors")]
    expected = load(tmp_path / "a.pt", **options)
    for model in loaded:
        assert model.unet.config == expected.unet.config
        assert model.schedule == expected.schedule
        assert model.scheduler_config == expected.scheduler_config
        assert_same_bits(model.unet.state_dict(), expected.unet.state_dict())
    assert not [p for p in tmp_path.rglob(".*")]


@pytest.mark.parametrize("name", ["ddpm", "improved-diffusion, no FiLM, one head", "ADM-64"])
@torch.no_grad()
def test_diffusers_runs_the_folder(file, name, tmp_path):
    path, options = file(name)
    convert(path, tmp_path / "folder", **options)
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "folder")
    assert isinstance(pipeline.unet, UNet2DModel)
    x, t, labels = inputs(load(tmp_path / "folder").unet)
    theirs = pipeline.unet.eval()(x, t, class_labels=labels).sample
    assert relative_error(theirs, answer(original(name), x.double(), t.double(), labels)) <= 1e-5


def test_networks_that_diffusers_lacks_are_fastdiffs_own(file, tmp_path):
    path, options = file("ADM-512")
    convert(path, tmp_path / "folder", **options)
    assert json.loads((tmp_path / "folder/unet/config.json").read_text())["_class_name"] == "fastdiff.UNet"
    assert not (tmp_path / "folder/model_index.json").exists()


def test_the_built_in_model_converts(tmp_path):
    """The conversion keeps the scheduler."""
    done = convert("fashion-mnist", tmp_path / "a.safetensors")
    assert done["format"] == "safetensors"
    convert(tmp_path / "a.safetensors", tmp_path / "b")
    before, after = load("fashion-mnist"), load(tmp_path / "b")
    assert_same_bits(after.unet.state_dict(), before.unet.state_dict())
    assert after.scheduler_config == before.scheduler_config
    assert after.unet.config == before.unet.config


def test_what_sampling_does_not_hear_is_left_out_and_said(tmp_path):
    torch.manual_seed(0)
    song = randomize_(oracle.SongUNet(8, 128, (1, 1), 1, (4,), augment_dim=9))
    wrapped = {f"model.{k}": v for k, v in song.state_dict().items()}  # EDMPrecond's state dict
    torch.save(wrapped, tmp_path / "a.pt")
    done = convert(tmp_path / "a.pt", tmp_path / "b.pt", to="edm")
    assert done["left_out"] == ["map_augment.weight"]
    back = torch.load(tmp_path / "b.pt", weights_only=True)
    assert_same_bits(back, {k: v for k, v in song.state_dict().items() if "augment" not in k})


def test_formats_that_cannot_be(file, tmp_path):
    path, options = file("ADM-64")
    for name, to, words in (
        ("x", "pdf", "format 'pdf' is unknown; allowed: diffusers, safetensors, ddpm"),
        ("x.pt", None, "Give the format, one of ddpm, openai"),
        ("x.pt", "safetensors", "written as a .safetensors file"),
        ("x.safetensors", "diffusers", "written as a folder"),
        ("x", "openai", "written as a file"),
        ("x.pt", "ddpm", "norm_eps=1e-05, 1e-06 is needed"),
        ("x.pt", "edm", "block_scale_factor=1.0, 1.414"),
    ):
        with pytest.raises(ConfigError, match=r"\.pt|\bx\b|format") as caught:
            convert(path, tmp_path / name, to=to, **options)
        assert words in str(caught.value)
        assert not (tmp_path / name).exists()
    assert FORMATS == ("diffusers", "safetensors", "ddpm", "openai", "openai-new", "edm", "onnx")


@pytest.mark.parametrize("layout", layouts.LAYOUTS)
def test_networks_outside_a_layout(layout):
    def reasons(**changes):
        return "; ".join(layouts.reasons_against(empty(change(TINY, **changes)), layout))

    assert "norm_num_groups=4" in reasons() or layout == "edm"
    assert "class_image='add'" in reasons(class_image="add", num_class_embeds=3)
    assert "different levels" in reasons(up_block_types=("UpBlock2D", "UpBlock2D"))
    mixed = {**RESNET_BLOCKS, "up_block_types": ("UpBlock2D", "UpBlock2D")}
    assert "another kind" in reasons(**mixed)
    assert ("another kind" in reasons()) == (layout == "edm")
    assert ("sample_size=(8, 16)" in reasons(sample_size=(8, 16))) == (layout == "edm")
    classes = {"num_class_embeds": 5, "null_label": 4}
    assert ("behind the time MLP" in reasons(**classes)) == (layout == "edm")
    assert ("class_before_mlp=True, False" in reasons(**classes, class_before_mlp=True)) == layout.startswith("openai")


def test_pieces_cover_every_tensor_once():
    for name, (_, _, layout) in CASES.items():
        torch.manual_seed(0)
        oracle_names = original(name).state_dict().keys()
        config = _config(name)
        parts = layouts.pieces(empty(config), layout)
        assert [p.theirs for p in parts] == list(dict.fromkeys(p.theirs for p in parts))
        assert {p.theirs for p in parts} == set(oracle_names)
        ours = [n for p in parts for n in p.ours]
        assert sorted(ours) == sorted(empty(config).state_dict())


def _config(name):
    layout, flags = CASES[name][2], CASES[name][1]
    described = originals.describe(state_dict(name), name, None, flags)
    assert described.layout == layout
    return described.config


# Sampling -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["eager", pytest.param("native", marks=needs_native)])
def test_adm_samples_with_its_learned_variance(file, backend):
    """Its scheduler configuration determines the spacing and the learned variance."""
    path, options = file("ADM-64")
    sampler = fastdiff.Sampler.from_pretrained(path, backend=backend, **options)
    out = sampler.sample(2, solver="ddpm", steps=5, labels=[6, 0], seed=1)
    assert out.table.learned_variance
    assert [row.t for row in out.table.rows] == [999.0, 749.0, 500.0, 250.0, 0.0]
    assert out.images.isfinite().all()
    reference = fastdiff.Sampler.from_pretrained(path, backend="eager", dtype="float64", **options)
    expected = reference.sample(2, solver="ddpm", steps=5, labels=[6, 0], seed=1).images
    assert relative_error(out.images, expected) <= 1e-4
    out = sampler.sample(2, steps=3, labels=[6, 0], seed=1)  # ddim, which ignores the other three channels
    assert relative_error(out.images, reference.sample(2, steps=3, labels=[6, 0], seed=1).images) <= 1e-4
    with pytest.raises(InvalidArgument, match="label 7 is out of range"):
        sampler.sample(1, labels=7)


@torch.no_grad()
def karras_algorithm_1(song, z, steps, sigma_min=0.002, sigma_max=80.0, rho=7.0, sigma_data=0.5):
    """Karras et al. 2022, arXiv:2206.00364, algorithm 1, line by line, with the preconditioning of table 1."""

    def denoise(x, sigma):
        c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        c_out = sigma * sigma_data / math.sqrt(sigma**2 + sigma_data**2)
        c_in = 1 / math.sqrt(sigma**2 + sigma_data**2)
        c_noise = torch.full((len(x),), math.log(sigma) / 4, dtype=x.dtype)
        return c_skip * x + c_out * song(c_in * x, c_noise)

    ends = sigma_max ** (1 / rho), sigma_min ** (1 / rho)
    t = [(ends[0] + i / (steps - 1) * (ends[1] - ends[0])) ** rho for i in range(steps)] + [0.0]
    x = t[0] * z
    for i in range(steps):
        d = (x - denoise(x, t[i])) / t[i]
        following = x + (t[i + 1] - t[i]) * d
        if t[i + 1] != 0:
            d_prime = (following - denoise(following, t[i + 1])) / t[i + 1]
            following = x + (t[i + 1] - t[i]) * (d + d_prime) / 2
        x = following
    return x


@pytest.mark.parametrize("source", [pytest.param("file", marks=pytest.mark.slow), "folder"])
def test_edm_networks_run_as_the_paper_does(file, tmp_path, source):
    """Sample NVlabs/edm's file, and the folder that it is converted to, whose scheduler diffusers can read."""
    path, _ = file("DDPM++")
    if source == "folder":
        convert(path, tmp_path / "folder")
        path = tmp_path / "folder"
        config = json.loads((path / "scheduler" / "scheduler_config.json").read_text())
        theirs = EDMEulerScheduler.from_config(config)
        assert (theirs.config.sigma_max, theirs.config.sigma_data, theirs.config.rho) == (80.0, 0.5, 7.0)
    z = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(5))
    expected = karras_algorithm_1(original("DDPM++"), z.double(), 6)
    assert expected.std() > 0.1
    assert expected.abs().max() > 1.2, "nothing would be clipped"
    for options, tolerance in (({"backend": "eager", "dtype": "float64"}, 2e-6), ({}, 1e-4)):
        sampler = fastdiff.Sampler.from_pretrained(path, **options)
        assert (sampler.schedule, sampler.prediction) == (EDMSchedule(), "edm")
        out = sampler.sample(2, solver="heun", steps=6, noise=z)
        assert out.nfe == 11
        assert relative_error(out.images, expected) <= tolerance
    assert sampler.sample(1, solver="auto").table.solver == "heun"


CLASSED = "DDPM++ of classes"
EDM_NOISE = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(6))


@functools.cache
def classed_reference(labels, w):
    """Run Karras et al.'s algorithm with guidance; label 3 stands for class_labels=None of EDMPrecond, zeros."""
    eye = torch.eye(4, dtype=torch.float64)[:, :3]

    def guided(x, t):
        conditional = original(CLASSED)(x, t, eye[list(labels)])
        return conditional if w == 1 else (1 - w) * original(CLASSED)(x, t, eye[[3, 3]]) + w * conditional

    return karras_algorithm_1(guided, EDM_NOISE.double(), 4)


@pytest.mark.parametrize(
    "backend", [pytest.param("eager", marks=pytest.mark.slow), pytest.param("native", marks=needs_native)]
)
def test_edm_networks_of_classes_run_as_the_paper_does(file, backend):
    """Sampling agrees with the paper's algorithm for labels, the null label, and guidance."""
    sampler = fastdiff.Sampler.from_pretrained(file(CLASSED)[0], backend=backend)
    assert (sampler.info.classes, sampler.info.null_label) == (3, 3)
    for labels, w in (((2, 0), 1.0), (None, 1.0), ((2, 0), 2.5)):
        out = sampler.sample(2, solver="heun", steps=4, noise=EDM_NOISE, labels=labels, guidance=w)
        assert relative_error(out.images, classed_reference(labels or (3, 3), w)) <= 1e-4
    plain = classed_reference((2, 0), 1.0)
    assert relative_error(classed_reference((3, 3), 1.0), plain) > 0.05, "labels are not heard"
    assert relative_error(classed_reference((2, 0), 2.5), plain) > 0.05
    with pytest.raises(InvalidArgument, match="label 3 is out of range"):
        sampler.sample(1, labels=3)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"_class_name": "DDPMScheduler", "prediction_type": "edm"}, "'edm' needs one of the schedulers EDMEuler"),
        ({"prediction_type": "sample"}, "prediction_type='sample'"),
        ({"sigma_max": -1}, "sigma_max=-1"),
    ],
)
def test_edm_networks_are_not_run_as_something_else(file, tmp_path, change, words):
    convert(file("DDPM++")[0], tmp_path / "folder")
    path = tmp_path / "folder" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ConfigError, match=words):
        fastdiff.Sampler.from_pretrained(tmp_path / "folder")


# Presets and flags ----------------------------------------------------------------------------------------------------

PARAMETERS = {  # Dhariwal & Nichol 2021, tables 9 and 10; Nichol & Dhariwal 2021: in millions
    "adm-imagenet-64": 296, "adm-imagenet-128": 422, "adm-imagenet-256": 554, "adm-imagenet-256-uncond": 553,
    "adm-imagenet-512": 559, "adm-lsun-256": 553, "improved-imagenet-64": 121, "improved-imagenet-64-cond": 273,
    "improved-cifar10": 53, "improved-lsun-256": 114,
}  # fmt: skip


@pytest.mark.parametrize("preset", PARAMETERS)
def test_presets_are_the_published_networks(preset):
    described = originals.describe({"time_embed.0.weight": torch.empty(0)}, "w", preset, None)
    unet = empty(described.config)
    assert round(sum(p.numel() for p in unet.parameters()) / 1e6) == PARAMETERS[preset]
    assert not layouts.reasons_against(unet, described.layout)
    assert (described.layout == "openai-new") == (preset == "adm-imagenet-64")
    assert described.scheduler["variance_type"] == "learned_range"
    lower(unet, (described.config.sample_size,) * 2)
    config = described.config
    if preset == "adm-imagenet-512":
        assert (config.block_out_channels[0], config.sinusoid_channels, config.temb_channels) == (128, 256, 1024)
    assert config.timestep_scale == (0.25 if preset in ("improved-imagenet-64", "improved-cifar10") else 1.0)


def test_presets_of_the_original_ddpm(file, tmp_path):
    path, _ = file("ddpm", suffix=".ckpt")
    assert load(path).unet.config.sample_size is None
    model = load(path, preset="ddpm-cifar10-32")
    assert model.unet.config.sample_size == 32
    assert model.scheduler_config["variance_type"] == "fixed_large"
    assert load(path, preset="ddpm-celebahq-256").scheduler_config["variance_type"] == "fixed_small"
    assert model.schedule == NoiseSchedule()
    assert set(PRESETS) == {*PARAMETERS, "ddpm-cifar10-32", "ddpm-celebahq-256", "ddpm-lsun-256"}


def test_the_schedules_of_openai(file):
    """Linear betas have the same sum for every number of steps."""
    path, options = file("improved-diffusion, no FiLM, one head")
    more = options["flags"] + " --diffusion_steps 4000 --rescale_timesteps False --sigma_small True"
    model = load(path, flags=more)
    assert model.schedule == NoiseSchedule("linear", 4000, 0.25e-4, 0.005)
    assert model.scheduler_config["variance_type"] == "fixed_small"
    assert model.unet.config.timestep_scale == 1.0
    assert load(path, flags=more.replace("_timesteps False", "_timesteps True")).unet.config.timestep_scale == 0.25
    assert load(path, flags=more + " --noise_schedule cosine").schedule == NoiseSchedule("cosine", 4000, 0.25e-4, 0.005)
    assert load(path, flags=more + " --predict_xstart True").scheduler_config["prediction_type"] == "sample"


BAD_FLAGS = [
    ({"flags": "--image_sise 8"}, "flag 'image_sise' is unknown for this file; allowed: image_size"),
    ({"flags": "--image_size"}, "'--name value --name value ...' is needed"),
    ({"flags": "image_size 8"}, "'--name value --name value ...' is needed"),
    ({"flags": "--image_size eight"}, "flag image_size='eight': a value like 64"),
    ({"flags": "--learn_sigma maybe"}, "flag learn_sigma='maybe': True or False"),
    ({"flags": "--image_size 48"}, "image_size=48: no channel_mult is known"),
    ({"flags": "--channel_mult 1,x"}, "channel_mult='1,x': numbers"),
    ({"flags": "--channel_mult 0,1"}, "channel_mult='0,1': at most 16 positive numbers"),
    ({"flags": "--channel_mult " + ",".join("1" * 17)}, "at most 16 positive numbers"),
    ({"flags": "--attention_resolutions 0"}, "attention_resolutions='0'"),
    ({"flags": "--num_head_channels 48"}, "num_head_channels=48 does not divide the"),
    ({"flags": "--num_heads 0"}, "num_heads=0 does not divide"),
    ({"flags": "--num_heads_upsample 2"}, "num_heads_upsample=2"),
    ({"flags": "--diffusion_steps 4000"}, "needs the flag rescale_timesteps"),
    ({"flags": "--diffusion_steps 0"}, "diffusion_steps=0: at least 1"),
    ({"flags": "--noise_schedule sigmoid"}, "noise_schedule='sigmoid' is unknown; allowed: linear, cosine"),
    ({"flags": "--num_channels 36"}, "block_out_channels[0]=36"),
    ({"flags": {"num_channels": None}}, "flag num_channels=None"),
    ({"preset": "adm-1024"}, "preset='adm-1024' is unknown; allowed: adm-imagenet-64"),
    ({"preset": "adm-imagenet-64", "flags": ""}, "give one"),
]


@pytest.mark.parametrize(("options", "words"), BAD_FLAGS, ids=lambda v: str(v)[:40])
def test_bad_flags(file, options, words):
    path, _ = file("improved-diffusion")
    with pytest.raises(ConfigError) as caught:
        load(path, **options)
    assert words in str(caught.value)
    assert path.name in str(caught.value)


def test_files_that_do_not_say_what_they_are(file, tmp_path):
    path, _ = file("ADM-64")
    with pytest.raises(CheckpointError, match=r"original\.pt: OpenAI's files carry no configuration.*adm-imagenet-64"):
        load(path)
    torch.save({"some.weight": torch.ones(3)}, tmp_path / "other.pt")
    with pytest.raises(CheckpointError, match=r"other\.pt holds no configuration, and its tensors \(some\.weight"):
        load(tmp_path / "other.pt")
    with pytest.raises(ConfigError, match=r"flag 'image_size' is unknown for this file; allowed: none"):
        load(file("DDPM++")[0], flags="--image_size 8")


def test_options_that_do_not_apply(tmp_path):
    save_folder(tmp_path / "m", random_unet(TINY), NoiseSchedule())
    for option in ({"preset": "adm-imagenet-64"}, {"flags": ""}):
        with pytest.raises(CheckpointError, match=r"does not apply to a folder; leave it out"):
            load(tmp_path / "m", **option)
    for option in ({"variant": "fp16"}, {"subfolder": "unet"}):
        with pytest.raises(CheckpointError, match=r"does not apply to a file of this kind"):
            load(tmp_path / "m" / "unet" / WEIGHTS, **option)
    for path in (tmp_path / "m", tmp_path / "m" / "unet" / WEIGHTS):
        with pytest.raises(CheckpointError, match=r"weights='ema': this file holds one set of weights only"):
            load(path, weights="ema")


# The documentation's table --------------------------------------------------------------------------------------------


@torch.no_grad()
def test_every_line_of_the_documentation(tmp_path, monkeypatch):
    """Run each call of docs/checkpoints.md on files made here; the presets and flags are those of small networks."""
    text = (ROOT / "docs" / "checkpoints.md").read_text(encoding="utf-8")
    lines = re.findall(r"^\|.*\| `(UNet\.from_pretrained\(.*\))` \|$", text, re.MULTILINE)
    improved, adm, adm512 = (CASES[name][1] for name in ("improved-diffusion", "ADM-64", "ADM-512"))
    monkeypatch.setitem(PRESETS, "adm-imagenet-64", adm)
    monkeypatch.setitem(PRESETS, "adm-imagenet-512", adm512)
    monkeypatch.chdir(tmp_path)

    tiny = random_unet(TINY)
    save_folder("folder", tiny, NoiseSchedule())
    half = {k: v.half() for k, v in tiny.state_dict().items()}
    save_file(half, "folder/unet/diffusion_pytorch_model.fp16.safetensors")
    info = {"unet": TINY.to_dict(), "scheduler": {}}
    save_file(
        {f"ema.{k}": v for k, v in tiny.state_dict().items()}, "state.safetensors", {"fastdiff": json.dumps(info)}
    )
    Path("old").mkdir()
    old = {"_class_name": "UNetModel", "ch": 32, "ch_mult": [1, 2], "num_res_blocks": 1, "attn_resolutions": [4],
           "resolution": 8, "in_channels": 3, "out_ch": 3}  # fmt: skip
    Path("old/config.json").write_text(json.dumps(old))
    files = {
        "old/diffusion_pytorch_model.bin": "ddpm", "ddpm.ckpt": "ddpm", "improved.pt": "improved-diffusion",
        "adm.pt": "ADM-64", "adm512.pt": "ADM-512", "edm.pt": "DDPM++", "edm-cond.pt": "DDPM++ of classes",
    }  # fmt: skip
    for path, name in files.items():
        torch.save(state_dict(name), path)

    run = set()
    for line in lines:
        call = re.sub(r'flags="[^"]*"', f'flags="{improved}"', line)
        unet = eval(call, {"UNet": fastdiff.UNet})
        path = re.search(r'"(.*?)"', line)[1]
        name = files.get(path) or files.get(f"{path}/diffusion_pytorch_model.bin")
        size = 16 if name == "ADM-512" else 8
        x, t = torch.randn(2, 3, size, size, dtype=torch.float64), torch.tensor([5.0, 700.0], dtype=torch.float64)
        labels = torch.tensor([1, 0]) if unet.config.conditional else None
        expected = answer(original(name) if name else random_unet(TINY).double(), x, t, labels)
        tolerance = 2e-3 if "variant" in line else 1e-10
        assert relative_error(answer(unet.double(), x, t, labels), expected) <= tolerance, line
        run.add(path)
    assert run == {"folder", "state.safetensors", "old", *list(files)[1:]}
    assert len(lines) == 10


# Files that do not fit ------------------------------------------------------------------------------------------------


def without(name):
    return lambda state: {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("half", [0, 1])
def test_mismatches_are_listed_under_their_own_names(file, name, half):
    victims = [k for k, v in state_dict(name).items() if v.ndim == 1 and v.numel() > 4][-5:]

    def spoil(state):
        if half:
            state[victims[2]] = state[victims[2]].to(torch.int32)
            state[victims[3]][1] = math.nan
            state[victims[4]][1] = math.inf
        else:
            del state[victims[0]]
            state["extra.weight"] = torch.ones(2)
            state[victims[1]] = torch.ones(3)
        return state

    path, options = file(name, spoil)
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    message = str(caught.value)
    lines = (
        (f"missing: {victims[0]}", "unexpected: extra.weight", f"shape: {victims[1]} is (3,)"),
        (f"dtype: {victims[2]} is torch.int32", f"value: {victims[3]} has NaN", f"value: {victims[4]} has NaN"),
    )
    for line in (path.name, "3 problems", *lines[half]):
        assert line in message
    assert message.count("\n") == 3


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ddpm", without("conv_in.weight"), "missing: conv_in.weight, which tells the network's shape"),
        ("ddpm", lambda s: {**s, "conv_in.weight": torch.ones(())}, "conv_in.weight is (), which tells no width"),
        ("ddpm", lambda s: {**s, "conv_in.weight": torch.ones(64, 3, 3, 3)}, "ch_mult must begin with 1"),
        ("ddpm", lambda s: {"temb.dense.0.weight": torch.ones(3)}, "conv_in.weight"),
        ("DDPM++", without("enc.8x8_conv.weight"), "one tensor enc.<size>x<size>_conv.weight is needed, it has 0"),
        ("DDPM++", lambda s: {**s, "map_label.weight": torch.ones(3, 3)}, "map_label.weight is (3, 3)"),
        ("DDPM++ of classes", without("map_label.bias"), "missing: map_label.bias (128,)"),
        ("DDPM++ of classes", lambda s: {**s, "map_label.weight": torch.ones(3)}, "map_label.weight is (3,)"),
        ("DDPM++", lambda s: {**s, "map_noise.freqs": torch.ones(3)}, "NCSN++ (map_noise.freqs)"),
        ("DDPM++", lambda s: {**s, "enc.4x4_aux_residual.weight": torch.ones(3)}, "NCSN++ (tensors named aux)"),
        (
            "DDPM++",
            lambda s: {**s, "enc.4x4_down.conv0.resample_filter": torch.tensor([[[[1.0, 3], [3, 1]]]]) / 8},
            "value: enc.4x4_down.conv0.resample_filter is not 0.25 everywhere",
        ),
        ("DDPM++", lambda s: {**s, "map_layer0.weight": torch.ones(512)}, "map_layer0.weight is (512,)"),
    ],
)  # fmt: skip
def test_networks_of_another_kind(file, name, change, words):
    path, options = file(name, change)
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    assert words in str(caught.value)
    assert path.name in str(caught.value)


def test_nothing_is_written_where_the_source_is_damaged(file, tmp_path):
    path, options = file("ddpm", without("conv_out.bias"))
    with pytest.raises(CheckpointError, match=r"missing: conv_out\.bias"):
        convert(path, tmp_path / "folder", **options)
    assert not (tmp_path / "folder").exists()


def test_own_files_with_damaged_metadata(tmp_path):
    convert("fashion-mnist", tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as f:
        info = json.loads(f.metadata()["fastdiff"])
    tensors = load_file(tmp_path / "a.safetensors")
    assert info["layout"] == "diffusers"
    for layout in ("edm2", 3, None, ["ddpm"]):
        save_file(tensors, tmp_path / "a.safetensors", metadata={"fastdiff": json.dumps({**info, "layout": layout})})
        with pytest.raises(CheckpointError, match=r"a\.safetensors: its fastdiff metadata names layout"):
            load(tmp_path / "a.safetensors")


def test_fit_keeps_dtypes_and_takes_no_part():
    """`convert` relies on `fit` to keep the dtype of every tensor if none is given."""
    unet = random_unet(TINY)
    half = {k: v.bfloat16() for k, v in unet.state_dict().items()}
    assert_same_bits(fit(empty(TINY), half, "w", None, None), half)
