"""Weights below prefixes and in dictionaries, other files in the place of weights, and folders of trainings."""

from __future__ import annotations

import itertools
import json
import logging
import shutil

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.checkpoints import convert, load, load_weights, save_folder
from fastdiff.checkpoints.folders import TORCH_WEIGHTS, WEIGHTS
from fastdiff.checkpoints.wrappers import AVERAGED, parameter_order
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.unet import UNet
from tests.checkpoints.test_layouts import CASES, state_dict
from tests.support.checkpoints import assert_equal_weights, refused
from tests.support.unets import TINY, TINY_CLASSES, diffusers_twin, random_unet

PREFIXES = ("_orig_mod.", "module.", "module._orig_mod.", "model.", "unet.", "ema.", "a.b_c.net._orig_mod.0.", "X.")


def prefixed(prefix, state):
    return {prefix + key: tensor.clone() for key, tensor in state.items()}


def write(path, state, suffix):
    if suffix == ".safetensors":
        save_file(state, path.with_suffix(suffix))
    else:
        torch.save(state, path.with_suffix(suffix))
    return path.with_suffix(suffix)


SUFFIXES = [".safetensors", ".bin", ".ckpt"]


@pytest.mark.parametrize(
    ("prefix", "suffix"),
    [
        pytest.param(prefix, suffix, marks=[pytest.mark.slow] * ((i + j) % len(SUFFIXES) != 0))
        for (i, prefix), (j, suffix) in itertools.product(enumerate(PREFIXES), enumerate(SUFFIXES))
    ],
)
def test_any_prefix_in_any_kind_of_file(folder, prefix, suffix):
    unet = random_unet(TINY, seed=5)
    path = write(folder / "diffusion_pytorch_model", prefixed(prefix, unet.state_dict()), suffix)
    assert_equal_weights(load(path).unet, unet)
    if suffix == ".bin":
        (folder / WEIGHTS).unlink()
    if suffix != ".ckpt":
        assert_equal_weights(load(folder).unet, unet)


def test_any_prefix_in_shards(sharded):
    index = sharded / f"{WEIGHTS}.index.json"
    content = json.loads(index.read_text())
    expected = load(sharded).unet
    for shard in set(content["weight_map"].values()):
        save_file(prefixed("module.unet.", load_file(sharded / shard)), sharded / shard)
    content["weight_map"] = {f"module.unet.{k}": v for k, v in content["weight_map"].items()}
    index.write_text(json.dumps(content))
    assert_equal_weights(load(sharded).unet, expected)


def test_prefixes_of_tensors_in_memory():
    unet = random_unet(TINY, seed=5)
    other = random_unet(TINY, seed=6)
    load_weights(other, prefixed("module._orig_mod.", unet.state_dict()), "memory")
    assert_equal_weights(other, unet)


@pytest.mark.parametrize("name", CASES)
def test_prefixes_of_original_files(name, tmp_path):
    options = {} if CASES[name][1] is None else {"flags": CASES[name][1]}
    torch.save(state_dict(name), tmp_path / "a.pt")
    torch.save({"net": prefixed("module.model.", state_dict(name))}, tmp_path / "b.pt")
    assert_equal_weights(load(tmp_path / "b.pt", **options).unet, load(tmp_path / "a.pt", **options).unet)


def test_averages_are_preferred_wherever_they_are(folder):
    plain, averaged = (random_unet(TINY, seed=seed).state_dict() for seed in (1, 2))
    expected = random_unet(TINY, seed=2)
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    flat = {**prefixed("model.", plain), **prefixed("model_ema.", averaged), "betas": torch.ones(10)}
    dotless = {**prefixed("model.net.", plain), "model_ema.decay": torch.ones(())}
    dotless |= {f"model_ema.{('net.' + key).replace('.', '')}": value for key, value in averaged.items()}
    swa = {**prefixed("module.", averaged), "n_averaged": torch.tensor(3)}
    for content in (
        {"model": plain, "ema": prefixed("ema_model.", averaged), "step": 5},
        {"net": plain, "ema_shadow": averaged},
        {"net": plain, "ema": {"decay": 0.999, "shadow": averaged, "updates": 3}},
        {"trainer": {"net": plain, "average": prefixed("module.", averaged)}, "optimizer": optimizer},
        {"state_dict": flat, "epoch": 3},
        {"state_dict": dotless},
        swa,
        {"model": plain, "swa_model": swa, "optimizer": optimizer},
        {"model": plain, "ema": {"decay": 0.9, "num_updates": 3, "shadow_params": list(averaged.values()),
                                 "collected_params": None}},
    ):  # fmt: skip
        torch.save(content, folder / "w.pt")
        assert_equal_weights(load(folder / "w.pt").unet, expected)
    save_file(flat, folder / WEIGHTS)
    assert_equal_weights(load(folder).unet, expected)
    assert_equal_weights(load(folder, weights="model").unet, random_unet(TINY, seed=1))
    flat = {**prefixed("teacher.", plain), **prefixed("student.", averaged)}
    save_file(flat, folder / WEIGHTS)
    refused(folder, "which weights? Name one with weights=", "'teacher'", "'student'")
    assert_equal_weights(load(folder, weights="student").unet, expected)


AVERAGES = ("ema", "model_ema", "emaModel", "netEMA", "LitEma", "g_ema", "swa_model", "EMA1", "my_shadow")
OTHERS = ("semantic_net", "swap", "schema", "cinema", "thematic", "SCHEMA", "remainder", "swarm")


def test_names_of_averages():
    assert all(AVERAGED.search(name) for name in AVERAGES)
    assert not any(AVERAGED.search(name) for name in OTHERS)


@pytest.mark.parametrize(("average", "other"), [("netEMA", "semantic_net"), ("g_ema", "schema")])
def test_averages_are_known_by_words_of_their_names(folder, average, other):
    plain, averaged = (random_unet(TINY, seed=seed).state_dict() for seed in (1, 2))
    torch.save({other: plain, average: averaged}, folder / "w.pt")
    assert_equal_weights(load(folder / "w.pt").unet, random_unet(TINY, seed=2))
    torch.save({other: plain, "net": averaged}, folder / "w.pt")
    refused(folder / "w.pt", "which weights?", repr(other), "'net'")


def test_what_is_left_out_is_named(folder, caplog):
    state = random_unet(TINY).state_dict()
    torch.save({**prefixed("net.", state), "loss.weight": torch.ones(2)}, folder / "w.pt")
    with caplog.at_level(logging.WARNING, "fastdiff"):
        load(folder / "w.pt")
    assert "1 tensors outside of the network are left out: 'loss.weight'" in caplog.text
    torch.save({**state, "loss.weight": torch.ones(2)}, folder / "w.pt")
    refused(folder / "w.pt", "unexpected: loss.weight")


@pytest.mark.parametrize("config", [TINY, TINY_CLASSES])
def test_averages_without_names(tmp_path, config):
    """diffusers' and torch_ema's averages are lists, in the order of the module's parameters."""
    theirs = diffusers_twin(random_unet(config, seed=3))
    theirs.save_config(tmp_path)
    assert parameter_order(n for n, _ in UNet(config).named_parameters()) == [n for n, _ in theirs.named_parameters()]
    torch.save(EMAModel(theirs.parameters()).state_dict(), tmp_path / "ema.pt")
    assert_equal_weights(load(tmp_path / "ema.pt").unet, theirs)
    torch.save([p.detach() for p in theirs.parameters()], tmp_path / "list.pt")
    assert_equal_weights(load(tmp_path / "list.pt").unet, theirs)
    torch.save([p.detach() for p in theirs.parameters()][1:], tmp_path / "short.pt")
    message = refused(tmp_path / "short.pt", "likely cause: a list of")
    assert len(message.splitlines()) <= 7


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 454867325\n", "Git LFS"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML"),
        (b"\n  <html lang=en><head>", "HTML"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>", "XML"),
        (b"../.git/annex/objects/xx/yy", "git-annex"),
        (b"", "an empty file"),  # and no JSON
    ],
)
@pytest.mark.parametrize("name", [WEIGHTS, TORCH_WEIGHTS, "w.ckpt", "config.json"])
def test_other_files_in_the_place_of_weights(folder, content, word, name):
    (folder / WEIGHTS).unlink()
    (folder / name).write_bytes(content)
    word = "not valid JSON" if name == "config.json" and not content else word
    message = refused(folder / name if name.endswith(".ckpt") else folder, name, word)
    assert len(message.splitlines()) == 1


def test_states_of_a_training_are_named(folder):
    unet = random_unet(TINY)
    optimizer = torch.optim.AdamW(unet.parameters())
    unet(torch.zeros(1, 3, 8, 8), torch.tensor([1])).mean().backward()
    optimizer.step()
    torch.save(optimizer.state_dict(), folder / "optimizer.bin")
    refused(folder / "optimizer.bin", "the state of an optimizer")
    schedule = torch.optim.lr_scheduler.ConstantLR(optimizer)
    torch.save(schedule.state_dict(), folder / "scheduler.bin")
    refused(folder / "scheduler.bin", "the state of a learning-rate schedule")
    save_file({f"exp_avg.{k}": v for k, v in unet.state_dict().items() if "time" not in k}, folder / WEIGHTS)
    refused(folder, "likely cause: the state of an optimizer")
    torch.save(unet.state_dict(), folder / WEIGHTS)
    refused(folder, "a file that torch.save wrote")


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        (
            lambda s: {k.replace("conv", "kernel").replace("linear", "dense"): v for k, v in s.items()},
            "another network",
        ),
        (lambda s: {f"x{k}": v for k, v in s.items()}, "another kind of network"),
        (lambda s: {k: v for k, v in s.items() if "mid_block" not in k}, "the file is incomplete"),
        (lambda s: {**s, **{f"down_blocks.7.{i}": torch.ones(1) for i in range(9)}}, "fewer blocks or layers"),
        (lambda s: {k: torch.cat([v, v]) for k, v in s.items()}, "other widths"),
        (lambda s: {f"unet.{k}.lora_A.weight": v for k, v in s.items()}, "LoRA"),
        (lambda s: {f"encoder.{k}": v for k, v in s.items() if "time" not in k}, "autoencoder"),
    ],
)
def test_a_mismatch_is_short_and_has_a_cause(folder, change, cause):
    save_file({k: v.clone() for k, v in change(random_unet(TINY).state_dict()).items()}, folder / WEIGHTS)
    message = refused(folder, "does not fit this U-Net", "problems", "likely cause: ", cause, " more")
    assert len(message.splitlines()) == 6


def test_nested_and_endless_files(folder):
    value = {}
    value["a"] = [value, value]
    torch.save(value, folder / "w.pt")
    refused(folder / "w.pt", "which weights?", "the file holds none")
    many = {f"{i}.time_embedding.linear_1.weight": torch.ones(1) for i in range(3000)}
    torch.save(many, folder / "w.pt")
    message = refused(folder / "w.pt", "which weights?")
    assert len(message) < 3000


# Folders --------------------------------------------------------------------------------------------------------------


def test_checkpoint_folders_of_diffusers_scripts(tmp_path, caplog):
    plain, averaged = (random_unet(TINY, seed=seed) for seed in (1, 2))
    checkpoint = tmp_path / "checkpoint-500"
    diffusers_twin(plain).save_pretrained(checkpoint / "unet")
    theirs = diffusers_twin(averaged)
    EMAModel(theirs.parameters(), model_cls=UNet2DModel, model_config=theirs.config).save_pretrained(
        checkpoint / "unet_ema"
    )
    with caplog.at_level(logging.WARNING, "fastdiff"):
        assert_equal_weights(load(checkpoint).unet, averaged)
    assert "reads the weights in unet_ema; weights='unet' reads the others" in caplog.text
    assert_equal_weights(load(checkpoint, weights="unet").unet, plain)
    assert_equal_weights(load(checkpoint, subfolder="unet").unet, plain)
    assert_equal_weights(UNet.from_pretrained(checkpoint / "unet_ema"), averaged)
    refused(tmp_path, "the last checkpoint of a training in it is checkpoint-500")
    shutil.rmtree(checkpoint / "unet")
    assert_equal_weights(load(checkpoint).unet, averaged)


def test_subfolder_and_dtype_as_in_diffusers(tmp_path):
    unet = random_unet(TINY)
    save_folder(tmp_path / "m", unet, fastdiff.NoiseSchedule("cosine", 200))
    assert_equal_weights(UNet.from_pretrained(tmp_path / "m", subfolder="unet"), unet)
    half = UNet.from_pretrained(tmp_path / "m", subfolder="unet", torch_dtype=torch.float16)
    assert {p.dtype for p in half.parameters()} == {torch.float16}
    sampler = fastdiff.Sampler.from_pretrained(tmp_path / "m", subfolder="unet", torch_dtype=torch.bfloat16)
    assert sampler.dtype == torch.bfloat16
    assert sampler.schedule == fastdiff.NoiseSchedule("cosine", 200)
    for subfolder in ("vae", "../m", "/tmp", "unet/config.json", "a\0b"):
        with pytest.raises(CheckpointError, match=r"subfolder=.* is no folder in it \(found: .*unet"):
            load(tmp_path / "m", subfolder=subfolder)
    with pytest.raises(CheckpointError, match=r"subfolder='x' does not apply to a file"):
        load(tmp_path / "m" / "unet" / WEIGHTS, subfolder="x")
    with pytest.raises(InvalidArgument, match=r"dtype=.* and torch_dtype=.*: give one"):
        fastdiff.Sampler.from_pretrained(tmp_path / "m", dtype="float32", torch_dtype=torch.float16)
    for bad in ("float99", 3, torch.int8):
        with pytest.raises(InvalidArgument, match=r"torch_dtype=.* is unknown; allowed: float32"):
            UNet.from_pretrained(tmp_path / "m", torch_dtype=bad)
    with pytest.raises(InvalidArgument, match=r"no option low_cpu; allowed besides: .*subfolder"):
        UNet.from_pretrained(tmp_path / "m", low_cpu=True)


@pytest.mark.parametrize("name", ["m.engine", "m.npz", "m.json", "m.zip"])
def test_endings_that_are_not_written(folder, name):
    with pytest.raises(ConfigError, match=r"files are not written; a file ends in \.safetensors"):
        convert(folder, folder.parent / name)
    assert not (folder.parent / name).exists()
    convert(folder, folder.parent / "v1.5")  # a folder's name may have dots
    assert (folder.parent / "v1.5").is_dir()
