"""Hostile and damaged files are refused with a `CheckpointError`, in bounded time and memory, and run no code."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pickle
import random
import shutil
import struct
import zipfile

import pytest
import torch
from safetensors.torch import load_file

from fastdiff.checkpoints import convert, load
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.checkpoints.reading import read_json, read_safetensors
from fastdiff.errors import CheckpointError
from tests.support.checkpoints import INDEX, assert_equal_weights, evaluate, needs_posix, refused, run_python
from tests.support.unets import TINY, random_unet

# safetensors ----------------------------------------------------------------------------------------------------------


def write_header(path, header, data=b"", length=None):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(header) if length is None else length) + header + data)


def entry(start, end, shape=None, dtype="F32"):
    return {"dtype": dtype, "shape": [(end - start) // 4] if shape is None else shape, "data_offsets": [start, end]}


def test_truncated_weights(folder):
    """Files cut in the length, the header or the data are refused; a network loaded before still works."""
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
    """Changed bytes give a `CheckpointError` or a model with finite weights, never another exception."""
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


# PyTorch files --------------------------------------------------------------------------------------------------------


class Bomb:
    """An object whose unpickling runs code that writes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return exec, (f"open({self.path!r}, 'w').close()",)


def bombs(fuse):
    """Yield the pickle of a bomb that works, then files with the bomb in each format that torch.load opens."""
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


# JSON, pipes, and files that claim too much ---------------------------------------------------------------------------


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


@pytest.mark.slow
@needs_posix
def test_bounded_time_and_memory(tmp_path):
    """Every file that claims to be huge is refused within 5 seconds and 96 MB of address space."""
    good = tmp_path / "good"
    random_unet(TINY).save_pretrained(good)
    hostile = {}

    def model(name, word, config=None):
        """Copy the good model, note the word that its error must have; return the weights for the caller to damage."""
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
    model("network of petabytes", "shape: conv_in.bias", json.dumps({**config, **huge}))
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
        bogus = {k: bogus["0"] for k in bogus}  # one storage for all, so that the files are mostly pickle
        torch.save([{k: v[:] for k, v in bogus.items()}], tmp_path / name, _use_new_zipfile_serialization=not legacy)
    claims = torch.ones(1).expand(1 << 40)  # claims four terabytes, but the file has four bytes
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
