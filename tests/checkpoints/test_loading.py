"""Model folders to and from diffusers, hostile files, and writing that survives full disks and kills."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import pickle
import random
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.checkpoints import builtin_models, convert, load, load_weights, loading, save_folder, save_unet
from fastdiff.checkpoints.loading import WEIGHTS
from fastdiff.checkpoints.reading import read_json, read_safetensors
from fastdiff.errors import CheckpointError, ConfigError, FastdiffError
from fastdiff.files import atomic_path, write_text
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet, UNetConfig
from tests.support import oracles as oracle
from tests.support.unets import (
    TINY,
    TINY_CLASSES,
    diffusers_twin,
    random_images,
    random_unet,
    randomize_,
    relative_error,
)

needs_posix = pytest.mark.skipif(os.name != "posix", reason="limits and SIGKILL are POSIX")

X, T = random_images(TINY), torch.tensor([3.0, 700.5])
LABELS = torch.tensor([0, 3])


@torch.no_grad()
def evaluate(network, labels=None):
    out = network(X, T, class_labels=labels)
    return out if isinstance(out, torch.Tensor) else out.sample


@pytest.fixture
def folder(tmp_path):
    """A sound model folder."""
    random_unet(TINY).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def refused(path, *words, error=CheckpointError):
    """Loading ``path`` fails with an error whose message has the file's name and these words; returns the message."""
    with pytest.raises(error) as caught:
        load(path)
    assert isinstance(caught.value, FastdiffError)
    message = str(caught.value)
    for word in (Path(path).name, *words):
        assert str(word) in message
    return message


def assert_equal_weights(a, b):
    a, b = a.state_dict(), b.state_dict()
    assert a.keys() == b.keys()
    assert all(torch.equal(a[k], b[k]) for k in a)


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
    assert load(folder).schedule == NoiseSchedule()
    assert load(folder).scheduler_config == {}
    write_text(folder / "scheduler_config.json", json.dumps({"num_train_timesteps": 77}))
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
    """Old checkpoints call the projections query, key, value, proj_attn, and some hold them as 1x1 convolutions."""
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
        refused(name, "birds, flowers")


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


# Hostile weights ------------------------------------------------------------------------------------------------------


def write_header(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_truncated_weights(folder):
    """Cut in the length, the header, the data, one byte short. What was loaded before still works."""
    earlier = load(folder).unet
    expected = evaluate(earlier)
    content = (folder / WEIGHTS).read_bytes()
    header = 8 + struct.unpack("<Q", content[:8])[0]
    for size in (0, 1, 7, 8, 9, header // 2, header - 1, header, header + 1, len(content) // 2, len(content) - 1):
        (folder / WEIGHTS).write_bytes(content[:size])
        refused(folder, WEIGHTS)
        refused(folder / WEIGHTS)
    (folder / WEIGHTS).write_bytes(content + b"\0")
    refused(folder, WEIGHTS)
    assert torch.equal(evaluate(earlier), expected)
    (folder / WEIGHTS).write_bytes(content)
    assert torch.equal(evaluate(load(folder).unet), expected)


HEADERS = {
    "not JSON": b"hello",
    "empty": b"",
    "a list": b"[]",
    "bad UTF-8": b'{"\xff": 1}',
    "deep": b'{"a":' * 50_000,
    "overlap": {"a": entry(0, 8), "b": entry(4, 12)},
    "hole": {"a": entry(0, 4), "b": entry(8, 16)},
    "beyond the data": {"a": entry(0, 1 << 40)},
    "backwards": {"a": entry(8, 0, [2])},
    "negative offset": {"a": entry(-8, 0, [2])},
    "negative shape": {"a": entry(0, 16, [-4])},
    "shape of another size": {"a": entry(0, 16, [3])},
    "overflowing shape": {"a": entry(0, 16, [1 << 62, 1 << 62])},
    "empty but overflowing": {"a": entry(0, 0, [0, 1 << 62, 1 << 62])},
    "unknown dtype": {"a": entry(0, 16, dtype="F33")},
    "no offsets": {"a": {"dtype": "F32", "shape": [4]}},
    "metadata of numbers": {"__metadata__": {"a": 1}, "a": entry(0, 16)},
    "equal names, equal place": b'{"a":%(e)s,"a":%(e)s}' % {b"e": json.dumps(entry(0, 16)).encode()},
    "equal names, two places": b'{"a":%s,"a":%s}'
    % (json.dumps(entry(0, 8)).encode(), json.dumps(entry(8, 16)).encode()),
    "escaped names of fields": json.dumps({"a": entry(0, 16)}).replace("data_offsets", "data_off\\u0073ets").encode(),
}


@pytest.mark.parametrize("case", HEADERS)
def test_hostile_headers(folder, case):
    write_header(folder / WEIGHTS, HEADERS[case], bytes(16))
    refused(folder, WEIGHTS)


def test_random_damage(folder):
    """Any flipped bytes give our errors or a model with finite weights, never another exception."""
    content = bytearray((folder / WEIGHTS).read_bytes())
    header = 8 + struct.unpack("<Q", content[:8])[0]
    rng, outcomes = random.Random(0), set()
    for _ in range(100):
        damaged = bytearray(content)
        for _ in range(rng.choice([1, 2, 20])):
            place = rng.randrange(8 if rng.random() < 0.1 else header)
            damaged[place] = rng.choice([*b'{}[]",:0159aF\\', 0, 255, rng.randrange(256)])
        (folder / WEIGHTS).write_bytes(damaged)
        try:
            unet = load(folder).unet
        except CheckpointError as e:
            assert WEIGHTS in str(e)  # noqa: PT017  both outcomes are right
            outcomes.add("refused")
        else:
            assert all(p.isfinite().all() for p in unet.parameters())
            outcomes.add("loaded")
    assert "refused" in outcomes


@needs_posix
def test_bounded_time_and_memory(tmp_path):
    """What files claim costs nothing: every hostile file is refused in seconds and within 96 MB of address space."""
    good = tmp_path / "good"
    random_unet(TINY).save_pretrained(good)
    hostile = {}

    def model(name, word, config=None):
        """A copy of the good model, yet to be spoilt; loading it shall fail with this word. Returns the weights."""
        (tmp_path / name).mkdir()
        config = config if config is not None else (good / "config.json").read_text()
        (tmp_path / name / "config.json").write_text(config)
        (tmp_path / name / WEIGHTS).write_bytes((good / WEIGHTS).read_bytes())
        hostile[str(tmp_path / name)] = word
        return tmp_path / name / WEIGHTS

    def sparse(path, header_length, size):
        path.write_bytes(struct.pack("<Q", header_length) + b'{"a":')
        os.truncate(path, size)

    def many(count, offsets=b"data_offsets"):
        one = b'{"dtype":"F32","shape":[0],"%s":[0,0]}' % offsets
        return b"{" + b",".join(b'"%d":%s' % (i, one) for i in range(count)) + b"}"

    sparse(model("length beyond the file", "truncated"), (1 << 64) - 1, 1 << 10)
    sparse(model("header of 300 MB", "a header of 314572800 bytes is refused"), 300 << 20, 400 << 20)
    write_header(model("100,000 tensors", "bytes is refused"), many(100_000))
    write_header(model("20,000 tensors", "20000 tensors are refused"), many(20_000))
    write_header(model("50,000 tensors, escaped", "damaged header"), many(50_000, b"d\\u0061ta_offsets"))
    config = json.loads((good / "config.json").read_text())
    huge = {
        "block_out_channels": [1 << 20] * 16,
        "norm_num_groups": 1,
        "layers_per_block": 16,
        "attention_head_dim": None,
    }
    huge |= {"down_block_types": ["AttnDownBlock2D"] * 16, "up_block_types": ["AttnUpBlock2D"] * 16}
    model("network of petabytes", "shape: conv_in.weight", json.dumps({**config, **huge}))
    model("layers", "layers_per_block=1099511627776", json.dumps({**config, "layers_per_block": 1 << 40}))
    os.truncate(model("JSON of 200 MB", "1048576").with_name("config.json"), 200 << 20)
    model("deep JSON", "not valid JSON", '{"a":' * 190_000)
    schedule = model("schedule of 10^12 steps", "timesteps=1000000000000").with_name("scheduler_config.json")
    schedule.write_text('{"num_train_timesteps": 1000000000000}')
    for name, kind in (("zip bomb.pt", zipfile.ZIP_DEFLATED), ("large pickle.pt", zipfile.ZIP_STORED)):
        hostile[str(tmp_path / name)] = "compressed archive" if kind else "a pickle of more than 16777216 bytes"
        with zipfile.ZipFile(tmp_path / name, "w", kind) as archive:
            archive.writestr("archive/data.pkl", bytes(200 << 20))
    hostile[str(tmp_path / "archive of 300,000 files.pt")] = "a directory of"
    with zipfile.ZipFile(tmp_path / "archive of 300,000 files.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    copies = 300_000
    with open(tmp_path / "archive of 300,000 files.pt", "r+b") as file:
        content = file.read()
        start = content.index(b"PK\1\2")
        entries = content[start : content.index(b"PK\5\6")] * copies
        file.seek(start)
        file.write(entries + struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 1, 1, len(entries), start, 0))
    index = model("index of 2 MB", "1048576")
    index.unlink()
    index.with_name(f"{WEIGHTS}.index.json").write_text(
        json.dumps({"weight_map": {str(i): "a" for i in range(200_000)}})
    )
    for name, legacy in (("100,000 tensors.pt", False), ("100,000 tensors, legacy.pt", True)):
        hostile[str(tmp_path / name)] = "a pickle of more than 1048576 instructions"
        bogus = {str(i): torch.ones(1) for i in range(100_000)}
        bogus = {k: bogus["0"] for k in bogus}  # of one storage: the files have a pickle and little else
        torch.save([{k: v[:] for k, v in bogus.items()}], tmp_path / name, _use_new_zipfile_serialization=not legacy)
    claims = torch.ones(1).expand(1 << 40)  # four bytes of a file that say they are four terabytes
    torch.save({"temb.dense.0.weight": claims, "conv_in.weight": claims}, tmp_path / "expanded.pt")
    hostile[str(tmp_path / "expanded.pt")] = "more numbers than the file holds"

    code = """
    import json, resource, sys, time
    from fastdiff.checkpoints import load
    from fastdiff.errors import FastdiffError
    good, *hostile = sys.argv[1:]
    load(good)
    if sys.platform == "linux":
        with open("/proc/self/statm") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + (96 << 20),) * 2)
    for path in hostile:
        start = time.process_time()
        try:
            load(path)
            error = ""
        except FastdiffError as e:
            error = str(e)[:2_000_000]
        print(json.dumps([path, time.process_time() - start, error]))
    load(good)
    """
    for line in run_python(code, good, *hostile).stdout.splitlines():
        path, seconds, error = json.loads(line)
        assert path in error
        assert hostile.pop(path) in error
        assert seconds < 5, path
    assert not hostile


def run_python(code, *arguments, check=True):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert not check or result.returncode == 0, result.stderr
    return result


def test_every_mismatch_is_listed_and_nothing_is_loaded(folder):
    unet = random_unet(TINY, seed=5)
    before = {k: v.clone() for k, v in unet.state_dict().items()}
    tensors = load_file(folder / WEIGHTS)
    del tensors["conv_in.bias"], tensors["mid_block.attentions.0.to_q.weight"]
    tensors["class_embedding.weight"] = torch.ones(5, 32)
    tensors["conv_out.weight"] = torch.ones(3, 8, 5, 5)
    tensors["conv_in.weight"] = tensors["conv_in.weight"].flatten()
    tensors["conv_norm_out.weight"] = torch.ones(8, dtype=torch.int64)
    tensors["conv_norm_out.bias"] = torch.ones(8, dtype=torch.bool)
    tensors["time_embedding.linear_1.bias"] = tensors["time_embedding.linear_1.bias"].to(torch.float8_e4m3fn)
    tensors["time_embedding.linear_2.bias"][3] = float("nan")
    tensors["conv_out.bias"][0] = float("-inf")
    tensors["mid_block.attentions.0.key.bias"] = tensors["mid_block.attentions.0.to_k.bias"]
    tensors["mid_block.resnets.0.conv1.weight"] = torch.full((16, 16, 3, 3), 1e300, dtype=torch.float64)
    lines = [
        "12 problems",
        "missing: conv_in.bias (8,)",
        "missing: mid_block.attentions.0.to_q.weight (16, 16)",
        "unexpected: class_embedding.weight (5, 32)",
        "shape: conv_out.weight is (3, 8, 5, 5), (3, 8, 3, 3) is needed",
        "shape: conv_in.weight is (216,), (8, 3, 3, 3) is needed",
        "dtype: conv_norm_out.weight is torch.int64",
        "dtype: conv_norm_out.bias is torch.bool",
        "dtype: time_embedding.linear_1.bias is torch.float8_e4m3fn",
        "value: time_embedding.linear_2.bias has NaN",
        "value: conv_out.bias has NaN or infinite",
        "twice: mid_block.attentions.0.to_k.bias",
        "value: mid_block.resnets.0.conv1.weight has NaN or infinite values (as torch.float32)",
    ]
    with pytest.raises(CheckpointError) as caught:
        load_weights(unet, tensors, "some/file.safetensors")
    for line in ("some/file.safetensors", *lines):
        assert line in str(caught.value)
    assert all(torch.equal(v, before[k]) for k, v in unet.state_dict().items())

    save_file({k: v.clone() for k, v in tensors.items()}, folder / WEIGHTS)
    message = refused(folder, WEIGHTS, *lines)
    assert message.count("\n") == 12
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


# Pickles --------------------------------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it runs code, which writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


def bombs(fuse):
    """A live bomb in every format that torch.load opens, and its bare pickle first."""
    payload = pickle.dumps(Bomb(fuse), protocol=2)
    pickle.loads(payload)
    assert fuse.exists()  # it is live
    fuse.unlink()
    yield payload
    for legacy in (False, True):
        saved = io.BytesIO()
        state = {**random_unet(TINY).state_dict(), "conv_in.bias": Bomb(fuse)}
        torch.save(state, saved, _use_new_zipfile_serialization=not legacy)
        yield saved.getvalue()


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_pickle_bombs_are_refused_and_never_run(folder, tmp_path):
    fuse = tmp_path / "exploded"
    for content in bombs(fuse):
        for suffix in (".pt", ".pth", ".ckpt", ".bin", ".PT"):
            path = tmp_path / f"model{suffix}"
            path.write_bytes(content)
            refused(path, "pickles that would run code are refused")
            with pytest.raises(CheckpointError, match="nothing in it was run"):
                convert(path, tmp_path / "out")
        for suffix in (".safetensors", "", ".npz", ".txt", ".pkl"):
            path = folder / f"disguised{suffix}"
            path.write_bytes(content)
            refused(path)
        (folder / WEIGHTS).write_bytes(content)
        refused(folder, WEIGHTS)
        (folder / WEIGHTS).unlink()
        (folder / "diffusion_pytorch_model.bin").write_bytes(content)
        refused(folder, "diffusion_pytorch_model.bin", "refused")
        (folder / "diffusion_pytorch_model.bin").unlink()
    (folder / "pytorch_model.pt").write_bytes(b"")
    refused(folder, WEIGHTS, "pytorch_model.pt")
    assert not fuse.exists()
    assert not (tmp_path / "out").exists()


def test_zip_bombs_are_never_opened(tmp_path):
    for suffix in (".pt", ".safetensors"):
        with zipfile.ZipFile(tmp_path / f"bomb{suffix}", "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("archive/data.pkl", bytes(32 << 20))
        refused(tmp_path / f"bomb{suffix}")


# PyTorch files --------------------------------------------------------------------------------------------------------


def test_folders_with_pytorch_weights(folder):
    """As diffusers writes them without safetensors; safetensors go first where both are there."""
    expected = load(folder).unet
    theirs = diffusers_twin(expected)
    theirs.save_pretrained(folder, safe_serialization=False)
    (folder / WEIGHTS).unlink()
    assert names(folder) == ["config.json", "diffusion_pytorch_model.bin"]
    assert_equal_weights(load(folder).unet, expected)
    save_unet(random_unet(TINY, seed=4), folder)
    assert_equal_weights(load(folder).unet, random_unet(TINY, seed=4))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_truncated_and_damaged_pytorch_files(folder, legacy):
    (folder / "w.pt").write_bytes(b"")
    torch.save(load_file(folder / WEIGHTS), folder / "w.pt", _use_new_zipfile_serialization=not legacy)
    content = (folder / "w.pt").read_bytes()
    assert_equal_weights(load(folder / "w.pt").unet, load(folder).unet)
    for size in (0, 1, 3, 4, 8, 100, len(content) // 2, len(content) - 100, len(content) - 22, len(content) - 1):
        (folder / "w.pt").write_bytes(content[:size])
        refused(folder / "w.pt")
    if not legacy:
        (folder / "w.pt").write_bytes(content + b"\0")
        refused(folder / "w.pt", "goes on behind its end")
    rng = random.Random(0)
    for _ in range(30):  # an error of ours, or finite weights
        damaged = bytearray(content)
        for _ in range(20):
            damaged[rng.choice((rng.randrange(len(content)), rng.randrange(2000), -rng.randrange(1, 4000)))] = (
                rng.randrange(256)
            )
        (folder / "w.pt").write_bytes(damaged)
        with contextlib.suppress(CheckpointError):
            assert all(p.isfinite().all() for p in load(folder / "w.pt").unet.parameters())


def test_which_weights_of_a_pytorch_file(folder):
    """The averaged ones, else the only ones, else the caller says; parallel training's prefix is taken off."""
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

INDEX = f"{WEIGHTS}.index.json"


@pytest.fixture
def sharded(folder):
    """The folder as diffusers writes it in shards."""
    theirs = diffusers_twin(load(folder).unet)
    (folder / WEIGHTS).unlink()
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*-of-*.safetensors"))) > 2
    return folder


def test_shards(sharded):
    assert_equal_weights(load(sharded).unet, random_unet(TINY))
    assert_equal_weights(load(sharded).unet, UNet2DModel.from_pretrained(sharded))
    convert(sharded, sharded / "whole.safetensors")
    assert_equal_weights(load(sharded / "whole.safetensors").unet, random_unet(TINY))


def test_hostile_shards(sharded, tmp_path):
    index = json.loads((sharded / INDEX).read_text())
    places = index["weight_map"]
    first = places["conv_in.bias"]
    others = sorted(set(places.values()) - {first})

    def written(**changes):
        (sharded / INDEX).write_text(json.dumps({"weight_map": {**places, **changes}}))

    secret = tmp_path / "secret.safetensors"
    shutil.copy(sharded / first, secret)
    for place in ("../secret.safetensors", str(secret), "sub/x.safetensors", "", ".", "w.pt", "w.bin", "config.json"):
        written(**{"conv_in.bias": place})
        refused(sharded, INDEX, "names of .safetensors files beside it are allowed")
    written(**{"conv_in.bias": "absent.safetensors"})
    refused(sharded, "absent.safetensors", "no regular file")
    written(**{"conv_in.bias": others[0], "ghost": first})
    refused(sharded, INDEX, "3 problems", f"missing: ghost in {first}", f"unexpected: conv_in.bias in {first}")
    for content in ("[]", "{}", '{"weight_map": []}', '{"weight_map": {"a": 1}}', '{"weight_map": {"a": null}}', "{"):
        (sharded / INDEX).write_text(content)
        refused(sharded, INDEX)
    written()
    content = (sharded / others[0]).read_bytes()
    (sharded / others[0]).write_bytes(content[:-1])
    refused(sharded, others[0], "damaged or truncated")


@pytest.mark.parametrize("shards", [False, True], ids=["whole", "shards"])
def test_variants(folder, shards):
    """fp16 files beside the plain ones; without those, the variant has to be asked for."""
    half = diffusers_twin(random_unet(TINY, seed=8)).half()
    half.save_pretrained(folder, variant="fp16", max_shard_size="20KB" if shards else "1GB")
    assert any("fp16" in name for name in names(folder))
    assert_equal_weights(load(folder).unet, random_unet(TINY))
    assert_equal_weights(load(folder, variant="fp16").unet, half.float())
    assert_equal_weights(UNet.from_pretrained(folder, variant="fp16"), half.float())
    assert fastdiff.Sampler.from_pretrained(folder, variant="fp16").sample(1, steps=1).images.isfinite().all()
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
    """A folder as diffusers 0.0.1 wrote it: the original DDPM's names, its constructor's arguments, pickled weights."""
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
    ("text", "words"),
    [
        (b"", ["not valid JSON"]),
        (b"{", ["not valid JSON"]),
        (b"{'in_channels': 3}", ["not valid JSON"]),
        (b'{"a": "\xff"}', ["not valid JSON", "UnicodeDecodeError"]),
        (b"\xff\xfe{\x00}\x00", ["not valid JSON"]),
        (b"[" * 100_000, ["not valid JSON"]),
        (b'{"a":' * 100_000 + b"1" + b"}" * 100_000, ["not valid JSON"]),
        (b'{"in_channels": ' + b"9" * 100_000 + b"}", ["not valid JSON"]),
        (b"[1]", ["object", "list"]),
        (b"null", ["object", "NoneType"]),
        (b'"x"', ["object", "str"]),
        (b" " * (1 << 20) + b"{}", ["1048576"]),
    ],
    ids=lambda v: repr(v[:24]),
)
@pytest.mark.parametrize("name", ["config.json", "scheduler_config.json"])
def test_hostile_json(folder, text, words, name):
    (folder / name).write_bytes(text)
    refused(folder, name, *words)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ch_mult": [1, 2]}, ["ch_mult", "allowed"]),
        ({"_class_name": "UNetModel"}, ["_class_name 'UNetModel'", "num_res_blocks"]),
        ({"_class_name": "UNet2DConditionModel"}, ["_class_name 'UNet2DConditionModel'", "UNet2DModel"]),
        ({"_class_name": ["UNet2DModel"]}, ["_class_name", "UNet2DModel"]),
        ({"norm_eps": float("nan")}, ["norm_eps", "nan"]),
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
        ({"trained_betas": [0.1, float("nan")]}, ["betas[1]=nan"]),
    ],
    ids=str,
)
def test_bad_schedule_names_the_file(folder, config, words):
    write_text(folder / "scheduler_config.json", json.dumps(config))
    refused(folder, "scheduler_config.json", *words, error=ConfigError)


def test_incomplete_folders(folder, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "config.json")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.fp16.safetensors")
    refused(folder, WEIGHTS, "diffusion_pytorch_model.fp16.safetensors")
    (folder / WEIGHTS).mkdir()
    refused(folder, WEIGHTS, "no regular file")


@needs_posix
def test_unreadable_files(folder):
    with contextlib.suppress(FileNotFoundError):
        (folder / WEIGHTS).unlink()
    os.mkfifo(folder / WEIGHTS)  # opening a pipe would wait for ever
    refused(folder, WEIGHTS, "no regular file")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_safetensors(folder / "absent.safetensors")
    with pytest.raises(CheckpointError, match="no regular file"):
        read_json(folder / "absent.json")


# Writing --------------------------------------------------------------------------------------------------------------


def names(folder):
    return sorted(p.name for p in folder.iterdir())


def test_atomic_path_keeps_the_old_file_when_the_writer_fails(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    write_text(path, "old")
    assert path.read_text() == "old"

    def fail(error):
        with atomic_path(path) as temporary:
            assert temporary.parent == path.parent
            assert temporary.suffix == path.suffix
            temporary.write_text("half of the new")
            assert path.read_text() == "old"
            raise error

    for error in (ValueError("no"), KeyboardInterrupt(), OSError(28, "No space left on device")):
        with pytest.raises(type(error)):
            fail(error)
        assert path.read_text() == "old"
        assert names(path.parent) == ["a.txt"]
    with pytest.raises(FileNotFoundError), atomic_path(path):
        pass  # writes nothing
    assert path.read_text() == "old"
    write_text(path, "new: Ω")
    assert path.read_bytes().decode("utf-8") == "new: Ω"
    assert names(path.parent) == ["a.txt"]


def test_files_are_synced_before_they_are_renamed(tmp_path, monkeypatch):
    """The order that a power cut cannot harm: file to disk, rename, folder to disk."""
    events = []
    fsync, replace = os.fsync, os.replace

    def record_fsync(handle):
        events.append("folder" if os.path.isdir(f"/proc/self/fd/{handle}") else "file")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", record_fsync)
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("rename"), replace(a, b)))
    write_text(tmp_path / "a", "x")
    expected = ["file", "rename", "folder"] if os.path.isdir("/proc/self/fd") else ["file", "rename", "file"]
    assert events == expected
    events.clear()
    save_unet(random_unet(TINY), tmp_path)
    assert events == expected * 2


@needs_posix
def test_full_disk_keeps_the_old_model(tmp_path):
    """RLIMIT_FSIZE makes every write beyond 4 kB fail for real, as a full disk does, in the middle of the file."""
    save_folder(tmp_path / "model", random_unet(TINY), NoiseSchedule())
    before = {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()}
    assert max(map(len, before.values())) > 8192
    code = """
    import resource, sys, torch
    from pathlib import Path
    from fastdiff.checkpoints import convert, load, save_folder
    from fastdiff.errors import CheckpointError
    from fastdiff.files import write_text
    model = load(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    with torch.no_grad():
        for p in model.unet.parameters():
            p.add_(1)
    for folder in (sys.argv[1], sys.argv[1] + "/unet", sys.argv[1] + "/a.safetensors", sys.argv[1] + "/a.pt"):
        try:
            if "/a." in folder:
                convert(sys.argv[2], folder, to="ddpm")
            elif folder == sys.argv[1]:
                save_folder(folder, model.unet, model.schedule)
            else:
                model.unet.save_pretrained(folder)
            sys.exit("it was saved")
        except CheckpointError as e:
            assert sys.argv[1] in str(e) and "could not be written" in str(e), e
    try:
        write_text(Path(sys.argv[1]) / "model_index.json", "x" * 5000)
        sys.exit("it was written")
    except OSError as e:
        assert e.errno == 27, e
    """
    (tmp_path / "ddpm").mkdir()
    torch.save(randomize_(oracle.DDPM(32, 3, (1, 1), 1, (), 3, 8)).state_dict(), tmp_path / "ddpm" / "a.pt")
    before |= {tmp_path / "ddpm" / "a.pt": (tmp_path / "ddpm" / "a.pt").read_bytes()}
    run_python(code, tmp_path / "model", tmp_path / "ddpm" / "a.pt")
    assert {p: p.read_bytes() for p in sorted(tmp_path.rglob("*")) if p.is_file()} == before
    assert_equal_weights(load(tmp_path / "model").unet, random_unet(TINY))


@needs_posix
def test_others_may_read_what_they_may_read_elsewhere(folder):
    (folder / "plain").write_text("")
    expected = (folder / "plain").stat().st_mode
    assert {n: (folder / n).stat().st_mode for n in names(folder)} == dict.fromkeys(names(folder), expected)


def test_paths_that_cannot_be_folders(tmp_path):
    (tmp_path / "file").write_text("mine")
    for save in (save_unet, lambda unet, path: save_folder(path, unet, NoiseSchedule())):
        with pytest.raises(CheckpointError, match=r"file.*could not be written"):
            save(random_unet(TINY), tmp_path / "file")
    assert (tmp_path / "file").read_text() == "mine"


@needs_posix
def test_kills_never_leave_a_broken_file(tmp_path):
    """A child saves one of two models over and over and is killed at random moments; the folder always loads as one."""
    models = [random_unet(TINY, seed=s) for s in (1, 2)]
    save_unet(models[0], tmp_path / "model")
    # Children of a fresh process are forked before it has threads, and so need no import each.
    code = """
    import os, random, signal, sys, time, torch
    from fastdiff.checkpoints import load, save_unet
    torch.set_num_threads(1)
    folder = sys.argv[1]
    a = load(folder).unet
    b = load(sys.argv[2]).unet
    rng = random.Random(0)
    for _ in range(int(sys.argv[3])):
        pid = os.fork()
        if not pid:
            while True:
                save_unet(b, folder)
                save_unet(a, folder)
        time.sleep(rng.uniform(0.005, 0.06))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        tensors = load(folder).unet.state_dict()
        for model in (a, b):
            if all(torch.equal(v, tensors[k]) for k, v in model.state_dict().items()):
                break
        else:
            sys.exit("a mixture")
    """
    save_unet(models[1], tmp_path / "other")
    run_python(code, tmp_path / "model", tmp_path / "other", 20)
    leftovers = [n for n in names(tmp_path / "model") if n not in ("config.json", WEIGHTS)]
    assert all(n.startswith(".") for n in leftovers)
    assert leftovers  # some kill hit a file half written


@needs_posix
def test_kills_of_plain_writes(tmp_path):
    path = tmp_path / "a.bin"
    code = """
    import sys
    from pathlib import Path
    from fastdiff.files import atomic_path
    while True:
        for letter in (b"a", b"b"):
            with atomic_path(sys.argv[1]) as temporary:
                temporary.write_bytes(letter * (4 << 20))
    """
    rng = random.Random(1)
    for _ in range(10):
        process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code), str(path)])
        try:
            deadline = time.monotonic() + 30
            while not path.exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 0.2))
        finally:
            process.send_signal(signal.SIGKILL)
            process.wait()
        content = path.read_bytes()
        assert content in (b"a" * (4 << 20), b"b" * (4 << 20))
        for leftover in tmp_path.iterdir():
            assert leftover == path or leftover.name.startswith(".")


def test_configuration_is_readable_json(folder):
    text = (folder / "config.json").read_text()
    assert text.count("\n") > 20
    config = json.loads(text)
    assert config["_class_name"] == "UNet2DModel"
    assert UNetConfig.from_dict(config) == TINY
