"""Seeded mutations of files of every kind that is read: an error of fastdiff or a usable result, in bounded time.

``FASTDIFF_FUZZ_SECONDS`` is the time for each kind of file in the slow test, and ``FASTDIFF_FUZZ_SEED`` the first seed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import random
import struct
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff.checkpoints import load
from fastdiff.checkpoints.folders import WEIGHTS
from fastdiff.checkpoints.reading import weights_digest
from fastdiff.data import load_data
from fastdiff.errors import FastdiffError
from fastdiff.sampler import measured
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable, ddim
from fastdiff.training import resume
from tests.support.unets import TINY, random_unet

SECONDS = float(os.environ.get("FASTDIFF_FUZZ_SECONDS", "30"))
SEED = int(os.environ.get("FASTDIFF_FUZZ_SEED", "0"))
LONGEST = 10.0  # seconds of one file; a hang is caught by it, a busy machine is not

NUMBERS = (
    b"-1",
    b"0",
    b"1e999",
    b"NaN",
    b"-Infinity",
    b"9" * 30,
    b"1.5",
    b"null",
    b"true",
    b'""',
    b"[]",
    b"{}",
    b"[[[[",
)
TEXTS = (b'"\\u001b[2J"', b'"\\ud800"', b'"' + b"x" * 5000 + b'"', b'"../../x"', b'"a\\nb"')
WORDS = (b"\0" * 8, b"\xff" * 8, struct.pack("<Q", 1 << 62), struct.pack("<q", -1), b"PK\x01\x02", b"PK\x05\x06")


def mutated(content: bytes, rng: random.Random, head: int) -> bytes:
    """Damage a file: bytes changed, words overwritten, parts cut, copied or inserted; mostly in its first ``head``."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 20))):
        if not data:
            break
        at = rng.randrange(min(head, len(data)) if rng.random() < 0.8 else len(data))
        kind = rng.randrange(7)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.choice((0, 255, *b'{}[]",:\\0159', rng.randrange(256)))
        elif kind == 2:
            del data[at:]
        elif kind == 3:
            del data[at : at + rng.randrange(1, 64)]
        elif kind == 4:
            data[at:at] = data[at : at + rng.randrange(1, 300)]
        elif kind == 5:
            word = rng.choice(WORDS)
            data[at : at + len(word)] = word
        else:  # in JSON and in headers of JSON: another value
            end = next((i for i in range(at, min(at + 40, len(data))) if data[i] in b",]}"), at)
            data[at:end] = rng.choice(NUMBERS + TEXTS)
    return bytes(data)


@dataclasses.dataclass
class Kind:
    """A kind of file: how it is written, and how it is read."""

    write: Callable[[Path], Path]  # into a folder; returns the file to damage
    read: Callable[[Path], object]  # from that file
    head: int = 4000  # bytes in which damage is likely to matter


def model(path: Path) -> None:
    assert all(p.isfinite().all() for p in load(path).unet.parameters())


def write_model(folder: Path, name: str) -> Path:
    random_unet(TINY).save_pretrained(folder)
    (folder / "scheduler_config.json").write_text(json.dumps({
        "_class_name": "DDPMScheduler", "num_train_timesteps": 77, "beta_schedule": "linear", "beta_start": 1e-4,
        "beta_end": 0.02, "clip_sample": True, "prediction_type": "epsilon", "timestep_spacing": "trailing",
        "variance_type": "fixed_small", "thresholding": False, "lambda_min_clipped": -float("inf"),
    }))  # fmt: skip
    return folder / name


def write_torch(folder: Path, legacy: bool) -> Path:
    random_unet(TINY).save_pretrained(folder)
    state = random_unet(TINY).state_dict()
    torch.save(state, folder / "w.pt", _use_new_zipfile_serialization=not legacy)
    return folder / "w.pt"


def write_measured(folder: Path) -> Path:
    points = [
        {"options": {"solver": solver, "steps": steps, "guidance": 1.0}, "nfe": steps,
         "at_n": {"frechet": {"value": 1.0, "low": 0.9, "high": 1.1}, "recall": {"value": 0.5}}}
        for solver, steps in (("ddim", 4), ("unipc", 8), ("ddpm", 60))
    ]  # fmt: skip
    text = json.dumps({"format": 1, "model": weights_digest({}), "n": 9, "points": points})
    (folder / measured.NAME).write_text(text)
    return folder / measured.NAME


def write_checkpoint(folder: Path) -> Path:
    net = torch.nn.Linear(2, 2)
    info = {key: {} for key in ("step", "train", "unet", "scheduler", "data", "world_size")}
    resume.save(folder / "c.safetensors", net, net, torch.optim.AdamW(net.parameters()), {"kind": "training", **info})
    return folder / "c.safetensors"


def write_arrays(folder: Path, packed: bool) -> Path:
    save = np.savez_compressed if packed else np.savez
    save(folder / "a.npz", images=np.arange(3 * 8 * 8, dtype=np.uint8).reshape(3, 8, 8), labels=np.arange(3))
    return folder / "a.npz"


def write_image(folder: Path, name: str, options: dict[str, object]) -> Path:
    noise = np.random.default_rng(0).integers(0, 256, (24, 24, 3), dtype=np.uint8)
    Image.fromarray(noise).save(folder / name, **options)
    return folder / name


def image(path: Path) -> None:
    data = load_data(path.parent, size=16)
    for _ in range(2):
        data.__getitems__([0])


KINDS = {
    "safetensors": Kind(lambda f: write_model(f, WEIGHTS), lambda p: model(p.parent), 3000),
    "config": Kind(lambda f: write_model(f, "config.json"), lambda p: model(p.parent)),
    "scheduler": Kind(lambda f: write_model(f, "scheduler_config.json"), lambda p: model(p.parent)),
    "torch": Kind(lambda f: write_torch(f, False), model, 9000),
    "legacy torch": Kind(lambda f: write_torch(f, True), model, 9000),
    "measurements": Kind(write_measured, measured.read),
    "training checkpoint": Kind(write_checkpoint, resume.load),
    "arrays": Kind(lambda f: write_arrays(f, False), lambda p: load_data(p).__getitems__([0])),
    "packed arrays": Kind(lambda f: write_arrays(f, True), lambda p: load_data(p).__getitems__([0])),
    "step table": Kind(
        lambda f: Path(f / "t.json").write_text(ddim(NoiseSchedule(), 3).to_json()) and f / "t.json",
        lambda p: StepTable.from_json(p.read_text(encoding="utf-8", errors="surrogateescape")),
    ),
    "PNG": Kind(lambda f: write_image(f, "a.png", {}), image),
    "TIFF": Kind(lambda f: write_image(f, "a.tif", {}), image),
    "packed TIFF": Kind(lambda f: write_image(f, "a.tif", {"compression": "tiff_adobe_deflate"}), image),
    "JPEG": Kind(lambda f: write_image(f, "a.jpg", {}), image, 700),
    "GIF": Kind(lambda f: write_image(f, "a.gif", {}), image),
    "WebP": Kind(lambda f: write_image(f, "a.webp", {"lossless": True}), image),
    "BMP": Kind(lambda f: write_image(f, "a.bmp", {}), image),
}


def fuzz(kind: Kind, folder: Path, seconds: float, seed: int) -> int:
    """Damage a file again and again; return how many of the damaged files were refused."""
    path = kind.write(folder)
    content = path.read_bytes()
    kind.read(path)
    refused = 0
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        path.write_bytes(mutated(content, random.Random(seed), kind.head))
        started = time.process_time()
        try:
            kind.read(path)
        except FastdiffError as e:
            refused += 1
            assert all(line.isprintable() for line in str(e).split("\n")), seed  # noqa: PT017
        except Exception as e:
            raise AssertionError(f"seed {seed}: {type(e).__name__} {e}") from e
        assert time.process_time() - started < LONGEST, seed
        seed += 1
    return refused


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_damaged_files(tmp_path: Path, name: str) -> None:
    assert fuzz(KINDS[name], tmp_path, 0.3, 0) > 0


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", KINDS)
def test_many_damaged_files(tmp_path: Path, name: str) -> None:
    assert fuzz(KINDS[name], tmp_path, SECONDS, SEED) > 0


def test_records_smaller_than_their_storage(tmp_path: Path) -> None:
    """Each record of an archive is cut in turn, with a directory that agrees; the pickle still declares the whole."""
    path = write_torch(tmp_path, False)
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    for name in [n for n in parts if "/data/" in n][:5]:
        for size in (0, 1, len(parts[name]) - 4):
            cut = io.BytesIO()
            with zipfile.ZipFile(cut, "w") as archive:
                for other, content in parts.items():
                    archive.writestr(other, content[:size] if other == name else content)
            path.write_bytes(cut.getvalue())
            with pytest.raises(FastdiffError, match=r"w\.pt"):
                load(path)


def test_archives_that_two_readers_read_differently(tmp_path: Path) -> None:
    """torch and Python's zipfile disagree about names that differ in case, and about where an archive begins."""
    path = write_torch(tmp_path, False)
    content = path.read_bytes()
    with zipfile.ZipFile(path) as archive:
        parts = {info.filename: archive.read(info) for info in archive.infolist()}
    first = next(iter(parts)).partition("/")[0]
    twice = io.BytesIO()
    with zipfile.ZipFile(twice, "w") as archive:
        for name, part in parts.items():
            archive.writestr(name, part)
        archive.writestr(f"{first}/DATA.PKL", b"other")
    path.write_bytes(twice.getvalue())
    with pytest.raises(FastdiffError, match="two records of one name"):
        load(path)
    path.write_bytes(b"PK\x03\x04" + b"junk" * 50 + content)
    with pytest.raises(FastdiffError, match=r"w\.pt: truncated archive"):
        load(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
