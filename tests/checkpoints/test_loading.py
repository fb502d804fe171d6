"""Loading models: diffusers folders, PyTorch files, shards, variants, old schemas, and weights that do not fit."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.checkpoints import builtin_models, convert, load, load_weights, loading, save_folder, save_unet
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.files import write_text
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet
from tests.support import oracles as oracle
from tests.support.checkpoints import INDEX, LABELS, T, X, assert_equal_weights, evaluate, names, refused
from tests.support.unets import TINY, TINY_CLASSES, diffusers_twin, random_unet, randomize_, relative_error

# To and from diffusers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "config", [TINY, TINY_CLASSES, dataclasses.replace(TINY, sample_size=(8, 16))], ids=["tiny", "classes", "8x16"]
)
def test_diffusers_loads_what_we_save(tmp_path, config):
    unet = random_unet(config)
    unet.save_pretrained(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", WEIGHTS]
    theirs, info = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs"))
    labels = LABELS if config.conditional else None
    assert relative_error(evaluate(theirs.eval(), labels), evaluate(unet, labels)) <= 1e-5
    assert_equal_weights(theirs, unet)


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY_CLASSES, null_label=None)], ids=["tiny", "classes"])
def test_we_load_what_diffusers_saves(tmp_path, config):
    theirs = diffusers_twin(random_unet(config))
    theirs.save_pretrained(tmp_path)
    ours = fastdiff.UNet.from_pretrained(tmp_path)
    assert ours.config == config
    assert not ours.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in ours.parameters())
    labels = LABELS if config.conditional else None
    assert relative_error(evaluate(ours, labels), evaluate(theirs, labels)) <= 1e-5
    assert_equal_weights(ours, theirs)


@pytest.mark.parametrize(
    ("schedule", "prediction"),
    [
        (NoiseSchedule(), "epsilon"),
        (NoiseSchedule("cosine", 200), "v_prediction"),
        (NoiseSchedule("scaled_linear", 500, 1e-3, 0.01, rescale_zero_terminal_snr=True), "v_prediction"),
        (NoiseSchedule("custom", betas=(0.1, 0.2, 0.4)), "sample"),
    ],
    ids=lambda v: v if isinstance(v, str) else v.kind,
)
def test_pipeline_folders(tmp_path, schedule, prediction):
    unet = random_unet(TINY)
    save_folder(tmp_path, unet, schedule, prediction)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    assert relative_error(evaluate(pipeline.unet.eval()), evaluate(unet)) <= 1e-5
    assert pipeline.scheduler.config.prediction_type == prediction
    assert len(pipeline.scheduler) == schedule.timesteps
    difference = pipeline.scheduler.alphas_cumprod.double().numpy() - schedule.alphas_cumprod
    assert abs(difference).max() < 1e-6

    loaded = load(tmp_path)
    assert loaded.schedule == schedule
    assert loaded.scheduler_config["prediction_type"] == prediction
    assert loaded.path == tmp_path
    assert_equal_weights(loaded.unet, unet)

    again = tmp_path / "again"
    pipeline.save_pretrained(again)
    assert load(again).schedule == schedule
    assert_equal_weights(load(again).unet, unet)


def test_scheduler_beside_the_weights(folder):
    assert load(folder).schedule is None  # nothing says what it is
    assert load(folder).scheduler_config == {}
    scheduler = {"_class_name": "DDPMScheduler", "num_train_timesteps": 77}
    write_text(folder / "scheduler_config.json", json.dumps(scheduler))
    assert load(folder).schedule == NoiseSchedule(timesteps=77)


def test_class_image_networks_are_fastdiffs_own(tmp_path):
    config = dataclasses.replace(TINY_CLASSES, class_image="multiply")
    unet = random_unet(config)
    unet.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["_class_name"] == "fastdiff.UNet"
    loaded = UNet.from_pretrained(tmp_path)
    assert loaded.config == config
    assert torch.equal(evaluate(loaded, LABELS), evaluate(unet, LABELS))

    save_folder(tmp_path / "pipeline", unet, NoiseSchedule("cosine"))
    assert load(tmp_path / "pipeline").schedule == NoiseSchedule("cosine")
    assert_equal_weights(load(tmp_path / "pipeline").unet, unet)
    with pytest.raises(OSError, match=r"model_index\.json"):  # not half of it, with random weights for the rest
        DDPMPipeline.from_pretrained(tmp_path / "pipeline")


@pytest.mark.parametrize("bare", [False, True])
def test_legacy_attention(folder, bare):
    """Early diffusers named the projections query, key, value, proj_attn; some files store them as 1x1 convolutions."""
    expected = load(folder).unet
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    legacy = {}
    for name, tensor in load_file(folder / WEIGHTS).items():
        for new, old in names.items():
            if f".{new}." in name and "attentions" in name:
                name = name.replace(f".{new}.", f".{old}.")
                if tensor.ndim == 2 and not bare:
                    tensor = tensor[:, :, None, None].contiguous()
        legacy[name] = tensor
    assert sum(".proj_attn." in name for name in legacy) == 8
    save_file(legacy, folder / WEIGHTS)
    assert_equal_weights(load(folder).unet, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_float_files(folder, dtype):
    tensors = {k: v.to(dtype) for k, v in load_file(folder / WEIGHTS).items()}
    save_file(tensors, folder / WEIGHTS)
    unet = load(folder).unet
    assert all(p.dtype == torch.float32 for p in unet.parameters())
    assert all(torch.equal(v, tensors[k].float()) for k, v in unet.state_dict().items())
    half = random_unet(TINY, seed=9).to(dtype)
    half.save_pretrained(folder)
    assert all(torch.equal(v, half.state_dict()[k].float()) for k, v in load(folder).unet.state_dict().items())


def test_channels_last_weights_are_saved(tmp_path):
    unet = random_unet(TINY)
    unet.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    assert_equal_weights(load(tmp_path).unet, unet)


def test_training_checkpoints_give_their_ema_weights(tmp_path):
    unet, other = random_unet(TINY), random_unet(TINY, seed=1)
    schedule = NoiseSchedule("cosine", 100)
    tensors = {f"model.{k}": v for k, v in other.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in unet.state_dict().items()}
    info = {"unet": TINY.to_dict(), "scheduler": schedule.to_scheduler_config()}
    path = tmp_path / "state.safetensors"
    save_file(tensors, path, metadata={"fastdiff": json.dumps(info)})
    loaded = load(path)
    assert_equal_weights(loaded.unet, unet)
    assert loaded.schedule == schedule

    for bad in ("", "{", "[]", "3", '{"unet": {}}', "[" * 100_000, '{"unet": 1}'):
        save_file(tensors, path, metadata={"fastdiff": bad})
        refused(path, "metadata")
    for change in ({"unet": [1]}, {"unet": {"in_channels": 0}}, {"scheduler": "x"}, {"scheduler": {"beta_start": "a"}}):
        save_file(tensors, path, metadata={"fastdiff": json.dumps({**info, **change})})
        refused(path, error=ConfigError)
    tensors = {k: v for k, v in tensors.items() if not k.startswith("ema.conv_in")}
    save_file(tensors, path, metadata={"fastdiff": json.dumps(info)})
    refused(path, "missing: conv_in.bias", "missing: conv_in.weight", "2 problems")


def test_weights_file_with_its_configuration_beside_it(folder):
    assert_equal_weights(load(folder / WEIGHTS).unet, load(folder).unet)
    (folder / "config.json").unlink()
    refused(folder / WEIGHTS, "config.json")


def test_loading_leaves_random_state_and_file_alone(folder):
    before, content = torch.get_rng_state(), (folder / WEIGHTS).read_bytes()
    unet = load(folder).unet
    assert torch.equal(torch.get_rng_state(), before)
    expected = evaluate(unet)
    with (folder / WEIGHTS).open("r+b") as file:  # the network keeps nothing of the mapped file
        file.write(b"\0" * len(content))
    assert torch.equal(evaluate(unet), expected)


def test_loads_in_float32_whatever_the_default(folder):
    torch.set_default_dtype(torch.float64)
    try:
        unet = load(folder).unet
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(p.dtype == torch.float32 for p in unet.parameters())
    assert_equal_weights(unet, random_unet(TINY))


def test_built_in_models(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "BUILTIN", tmp_path)
    monkeypatch.chdir(tmp_path.parent)
    for name in ("flowers", "birds"):
        save_folder(tmp_path / name, random_unet(TINY), NoiseSchedule(timesteps=10))
    (tmp_path / "unfinished").mkdir()
    assert builtin_models() == ["birds", "flowers"]
    assert load("birds").schedule.timesteps == 10
    assert_equal_weights(UNet.from_pretrained("flowers"), random_unet(TINY))
    refused("bird", "birds, flowers")
    refused("unfinished", "birds, flowers")
    refused("../birds", "birds, flowers")
    for name in ("\0", "a" * 5000):  # names that the file system itself refuses
        with pytest.raises(CheckpointError, match="birds, flowers"):
            load(name)


@pytest.mark.parametrize("name", builtin_models())
def test_models_that_come_with_fastdiff(name):
    model = load(name)
    assert model.scheduler_config["_class_name"] == "DDPMScheduler"
    assert model.unet.config.sample_size is not None
    size = 8 * model.unet.config.stride
    x = torch.randn((1, model.unet.config.in_channels, size, size), generator=torch.Generator().manual_seed(0))
    labels = torch.zeros(1, dtype=torch.int64) if model.unet.config.conditional else None
    with torch.no_grad():
        assert model.unet(x, 500, labels).std() > 0.1


def test_without_built_in_models(tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "BUILTIN", tmp_path / "absent")
    assert builtin_models() == []
    refused("birds", "built in: none")


# Weights that do not fit ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        (
            {"conv_in.bias": None, "mid_block.attentions.0.to_q.weight": None,
             "class_embedding.weight": torch.ones(5, 32)},
            ("missing: conv_in.bias (8,)", "missing: mid_block.attentions.0.to_q.weight (16, 16)",
             "unexpected: class_embedding.weight (5, 32)"),
        ),
        (
            {"conv_out.weight": torch.ones(3, 8, 5, 5), "conv_in.weight": torch.ones(216),
             "mid_block.attentions.0.key.bias": torch.ones(16)},
            ("shape: conv_out.weight is (3, 8, 5, 5), (3, 8, 3, 3) is needed",
             "shape: conv_in.weight is (216,), (8, 3, 3, 3) is needed", "twice: mid_block.attentions.0.to_k.bias"),
        ),
        (
            {"conv_norm_out.weight": torch.ones(8, dtype=torch.int64), "conv_norm_out.bias": torch.ones(8) > 0,
             "time_embedding.linear_1.bias": torch.ones(32).to(torch.float8_e4m3fn)},
            ("dtype: conv_norm_out.weight is torch.int64", "dtype: conv_norm_out.bias is torch.bool",
             "dtype: time_embedding.linear_1.bias is torch.float8_e4m3fn"),
        ),
        (
            {"time_embedding.linear_2.bias": torch.full((32,), float("nan")),
             "conv_out.bias": torch.tensor([float("-inf"), 0.0, 0.0]),
             "mid_block.resnets.0.conv1.weight": torch.full((16, 16, 3, 3), 1e300, dtype=torch.float64)},
            ("value: time_embedding.linear_2.bias has NaN", "value: conv_out.bias has NaN or infinite",
             "value: mid_block.resnets.0.conv1.weight has NaN or infinite values (as torch.float32)"),
        ),
    ],
    ids=["names", "shapes", "dtypes", "values"],
)  # fmt: skip
def test_mismatches_are_listed_and_nothing_is_loaded(folder, changes, lines):
    unet = random_unet(TINY, seed=5)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    tensors = {k: v for k, v in (load_file(folder / WEIGHTS) | changes).items() if v is not None}
    with pytest.raises(CheckpointError) as caught:
        load_weights(unet, tensors, "some/file.safetensors")
    for line in ("some/file.safetensors", "3 problems", *lines):
        assert line in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())

    save_file(tensors, folder / WEIGHTS)
    message = refused(folder, WEIGHTS, *lines)
    assert message.count("\n") == 3
    assert torch.equal(evaluate(unet), evaluate(random_unet(TINY, seed=5)))


def test_one_bad_value_in_any_tensor_is_named(folder):
    unet, tensors = random_unet(TINY), load_file(folder / WEIGHTS)
    for i, name in enumerate(sorted(tensors)):
        bad = tensors[name].clone()
        bad.view(-1)[-1] = (float("nan"), float("inf"))[i % 2]
        with pytest.raises(CheckpointError, match=rf"1 problems:\n  value: {name} has NaN") as caught:
            load_weights(unet, {**tensors, name: bad}, folder / WEIGHTS)
        assert WEIGHTS in str(caught.value)


def test_weights_too_large_for_the_networks_dtype_are_refused(folder):
    tensors = load_file(folder / WEIGHTS)
    load_weights(random_unet(TINY).half(), tensors, "w")
    tensors["conv_in.bias"][0] = 70000.0
    load_weights(random_unet(TINY), tensors, "w")
    with pytest.raises(CheckpointError, match=r"value: conv_in.bias .*float16"):
        load_weights(random_unet(TINY).half(), tensors, "w")


# PyTorch files --------------------------------------------------------------------------------------------------------


def test_folders_with_pytorch_weights(folder):
    """diffusers writes such folders with safe_serialization=False. If both files exist, safetensors is read."""
    expected = load(folder).unet
    theirs = diffusers_twin(expected)
    theirs.save_pretrained(folder, safe_serialization=False)
    (folder / WEIGHTS).unlink()
    assert names(folder) == ["config.json", "diffusion_pytorch_model.bin"]
    assert_equal_weights(load(folder).unet, expected)
    save_unet(random_unet(TINY, seed=4), folder)
    assert_equal_weights(load(folder).unet, random_unet(TINY, seed=4))


def test_which_weights_of_a_pytorch_file(folder):
    """The averaged weights are read, or the only ones; otherwise the caller has to choose. "module." is removed."""
    path = folder / "w.pt"
    a, b, c = (random_unet(TINY, seed=seed) for seed in (1, 2, 3))
    plain, averaged, other = (dict(unet.state_dict()) for unet in (a, b, c))
    parallel = {f"module.{k}": v for k, v in plain.items()}
    optimizer = {"state": {0: {"exp_avg": torch.ones(3)}}, "param_groups": [{"lr": 0.1}]}
    for content, expected in (
        (plain, a),
        ({k: torch.nn.Parameter(v) for k, v in plain.items()}, a),
        (parallel, a),
        ({"state_dict": plain, "step": 7}, a),
        ({"model": plain, "ema": averaged, "optimizer": optimizer}, b),
        ({"model": parallel, "model_ema": {f"module.{k}": v for k, v in averaged.items()}}, b),
        ([parallel, optimizer, 3, 1000, averaged], b),  # ermongroup's trainer
        ([parallel, optimizer, 3, 1000], a),
    ):
        torch.save(content, path)
        assert_equal_weights(load(path).unet, expected)

    torch.save({"model": plain, "ema": averaged, "ema_fast": other, "step": 7}, path)
    refused(path, "which weights? Name one with weights=", "'model', 'ema', 'ema_fast'")
    for name, unet in (("model", a), ("ema", b), ("ema_fast", c)):
        assert_equal_weights(load(path, weights=name).unet, unet)
    with pytest.raises(CheckpointError, match=r"weights='step' is no set of weights in this file; it holds 'model'"):
        load(path, weights="step")
    torch.save([parallel, optimizer, 3, 1000, averaged], path)
    assert_equal_weights(load(path, weights="0").unet, a)
    torch.save(plain, path)
    with pytest.raises(CheckpointError, match=r"weights='ema': this file holds one set of weights only"):
        load(path, weights="ema")
    for content in ({}, [], 3, "x", {"a": 1}, [1, 2], {"a": {}}, {1: torch.ones(1)}, torch.ones(3)):
        torch.save(content, path)
        refused(path, "which weights?", "the file holds none")


def test_tensors_of_other_kinds_are_named(folder):
    state = load_file(folder / WEIGHTS)
    state["conv_in.bias"] = torch.ones(8).to_sparse()
    state["conv_out.bias"] = torch.empty(3, device="meta")
    torch.save(state, folder / "w.pt")
    refused(folder / "w.pt", "2 problems", "dtype: conv_in.bias is no plain tensor", "conv_out.bias is no plain tensor")


# Shards and variants --------------------------------------------------------------------------------------------------


def test_shards(sharded):
    assert_equal_weights(load(sharded).unet, random_unet(TINY))
    assert_equal_weights(load(sharded).unet, UNet2DModel.from_pretrained(sharded))
    convert(sharded, sharded / "whole.safetensors")
    assert_equal_weights(load(sharded / "whole.safetensors").unet, random_unet(TINY))


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
def test_variants(folder, shards):
    """A variant is read only on request, even if the folder has no other weights."""
    half = diffusers_twin(random_unet(TINY, seed=8)).half()
    half.save_pretrained(folder, variant="fp16", max_shard_size="20KB" if shards else "1GB")
    assert any("fp16" in name for name in names(folder))
    assert_equal_weights(load(folder).unet, random_unet(TINY))
    assert_equal_weights(load(folder, variant="fp16").unet, half.float())
    assert_equal_weights(UNet.from_pretrained(folder, variant="fp16"), half.float())
    assert (
        fastdiff.Sampler.from_pretrained(folder, variant="fp16", schedule=NoiseSchedule())
        .sample(1, steps=1)
        .images.isfinite()
        .all()
    )
    (folder / WEIGHTS).unlink()
    refused(folder, "another variant's name need variant=", "fp16")
    with pytest.raises(CheckpointError, match=r"no diffusion_pytorch_model\.ema\.safetensors"):
        load(folder, variant="ema")
    for variant in ("", "../x", "a.b", "a/b"):
        with pytest.raises(CheckpointError, match=r"a word such as fp16"):
            load(folder, variant=variant)


@pytest.mark.parametrize(
    "name",
    [f"diffusion_pytorch_model.safetensors.index.{'fp16'}.json", "diffusion_pytorch_model.fp16.safetensors.index.json"],
)
def test_both_names_of_a_variants_index(sharded, name):
    (sharded / INDEX).rename(sharded / name)
    assert_equal_weights(load(sharded, variant="fp16").unet, random_unet(TINY))


# Old schemas ----------------------------------------------------------------------------------------------------------

OLD_UNET = {
    "_class_name": "UNetModel", "_diffusers_version": "0.0.1", "attn_resolutions": [4], "ch": 32, "ch_mult": [1, 2],
    "dropout": 0.0, "in_channels": 3, "num_res_blocks": 1, "out_ch": 3, "resamp_with_conv": True, "resolution": 8,
}  # fmt: skip
OLD_SCHEDULER = {
    "_class_name": "GaussianDDPMScheduler", "_diffusers_version": "0.0.1", "beta_end": 0.03, "beta_schedule": "linear",
    "beta_start": 0.0002, "clip_predicted_image": False, "timesteps": 200, "variance_type": "fixed_large",
}  # fmt: skip


@pytest.fixture
def old(tmp_path):
    """Return a folder as diffusers 0.0.1 wrote it, with the original DDPM's names and arguments, and the network."""
    network = randomize_(oracle.DDPM(32, 3, (1, 2), 1, (4,), 3, 8)).eval()
    (tmp_path / "old").mkdir()
    torch.save(network.state_dict(), tmp_path / "old" / "diffusion_pytorch_model.bin")
    (tmp_path / "old" / "config.json").write_text(json.dumps(OLD_UNET))
    (tmp_path / "old" / "scheduler_config.json").write_text(json.dumps(OLD_SCHEDULER))
    return tmp_path / "old", network


@torch.no_grad()
def test_old_schemas(old, tmp_path):
    folder, network = old
    model = load(folder)
    assert relative_error(evaluate(model.unet), network(X, T)) <= 1e-5
    assert model.schedule == NoiseSchedule("linear", 200, 0.0002, 0.03)
    said = {
        k: model.scheduler_config[k] for k in ("_class_name", "clip_sample", "variance_type", "num_train_timesteps")
    }
    assert said == {**said, "_class_name": "DDPMScheduler", "clip_sample": False, "variance_type": "fixed_large"}
    assert said["num_train_timesteps"] == 200
    convert(folder, tmp_path / "new")
    pipeline = DDPMPipeline.from_pretrained(tmp_path / "new")
    assert relative_error(evaluate(pipeline.unet.eval()), network(X, T)) <= 1e-5
    convert(tmp_path / "new", tmp_path / "back.pt", to="ddpm")
    back = torch.load(tmp_path / "back.pt", weights_only=True)
    assert all(torch.equal(v, back[k]) for k, v in network.state_dict().items())


@pytest.mark.parametrize(
    ("file", "change", "words"),
    [
        ("config.json", {"resnet_eps": 1e-6}, "'UNetModel' with resnet_eps"),
        ("config.json", {"ch": None}, "ch=None"),
        ("config.json", {"ch_mult": 2}, "ch_mult=2"),
        ("config.json", {"ch_mult": [2, 2]}, "begins with 1"),
        ("config.json", {"ch_mult": []}, "begins with 1"),
        ("config.json", {"ch_mult": [1] * 17}, "1 to 16"),
        ("config.json", {"attn_resolutions": "16"}, "attn_resolutions='16'"),
        ("config.json", {"resamp_with_conv": False}, "resamp_with_conv=False is not supported"),
        ("config.json", {"num_res_blocks": 17}, "layers_per_block=17"),
        ("config.json", {"_class_name": "UNetUnconditionalModel"}, "'UNetUnconditionalModel' is not supported"),
        ("scheduler_config.json", {"timestep_values": [1]}, "GaussianDDPMScheduler with timestep_values"),
        ("scheduler_config.json", {"timesteps": 0}, "timesteps=0"),
        ("scheduler_config.json", {"_class_name": "DDPMScheduler", "num_train_timesteps": 9}, "timesteps=200 and num"),
    ],
    ids=str,
)
def test_old_schemas_that_are_not_known_exactly(old, file, change, words):
    folder, _ = old
    config = json.loads((folder / file).read_text())
    (folder / file).write_text(json.dumps({**config, **change}))
    refused(folder, file, words, error=ConfigError)


def test_old_schemas_lack_nothing(old):
    folder, _ = old
    for key in ("ch", "resolution", "ch_mult"):
        (folder / "config.json").write_text(json.dumps({k: v for k, v in OLD_UNET.items() if k != key}))
        refused(folder, "config.json", f"without {key}", error=ConfigError)


# Configuration files --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ch_mult": [1, 2]}, ["ch_mult", "allowed"]),
        ({"_class_name": "UNetModel"}, ["_class_name 'UNetModel'", "num_res_blocks"]),
        ({"_class_name": "UNet2DConditionModel"}, ["_class_name 'UNet2DConditionModel'", "UNet2DModel"]),
        ({"_class_name": ["UNet2DModel"]}, ["_class_name", "UNet2DModel"]),
        ({"sample_size": 10**40}, ["sample_size", "1048576"]),
        ({"down_block_types": [["DownBlock2D"], {}]}, ["down_block_types", "AttnDownBlock2D"]),
    ],
    ids=str,
)
def test_bad_network_configuration_names_the_file(folder, change, words):
    write_text(folder / "config.json", json.dumps({**TINY.to_dict(), **change}))
    refused(folder, "config.json", *words, error=ConfigError)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"beta_schedule": "laplace"}, ["beta_schedule='laplace'", "squaredcos_cap_v2"]),
        ({"num_train_timesteps": 0}, ["timesteps=0"]),
        ({"beta_start": "x"}, ["beta_start='x'"]),
    ],
    ids=str,
)
def test_bad_schedule_names_the_file(folder, config, words):
    write_text(folder / "scheduler_config.json", json.dumps(config))
    refused(folder, "scheduler_config.json", *words, error=ConfigError)


@pytest.mark.parametrize(
    ("name", "change"),
    [("config.json", {"norm_eps": math.nan}), ("scheduler_config.json", {"trained_betas": [math.nan]})],
)
def test_numbers_that_are_not_json_are_refused(folder, name, change):
    write_text(folder / name, json.dumps({**TINY.to_dict(), **change} if name == "config.json" else change))
    refused(folder, name, "NaN is no number", error=CheckpointError)


def test_incomplete_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    refused(folder, WEIGHTS, "diffusion_pytorch_model.fp16.safetensors")
    (folder / WEIGHTS).mkdir()
    refused(folder, WEIGHTS, "no regular file")
