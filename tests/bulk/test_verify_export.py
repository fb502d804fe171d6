"""Find and mend damage with `verify`; read what is written as other programs do."""

from __future__ import annotations

import json
import os
import random
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.lib import format as npy
from PIL import Image

from fastdiff import bulk
from fastdiff.bulk import job as jobs
from fastdiff.bulk import work as working
from fastdiff.data import load_data
from fastdiff.errors import InvalidArgument, JobError
from tests.bulk.jobs import N, draw, files, leftovers, saved, tiny
from tests.support.unets import TINY, change

FORMATS = ("npz", "png", "webdataset", "imagefolder")


def flip(path: Path, rng: random.Random) -> None:
    """Flip one bit of a file, or of a file in a folder."""
    if path.is_dir():
        path = rng.choice(sorted(path.iterdir()))
    data = bytearray(path.read_bytes())
    bit = rng.randrange(8 * len(data))
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("format", FORMATS)
def test_a_flipped_bit_is_found_and_redrawn(tmp_path: Path, format: str) -> None:
    sampler, rng = tiny(), random.Random(format)
    draw(sampler, tmp_path / "a", format=format)
    whole, job = files(tmp_path / "a"), jobs.read(tmp_path / "a")
    for _ in range(6):
        shard = rng.choice(job.shards)
        flip(job.path(shard), rng)
        found = bulk.verify(tmp_path / "a")
        assert list(found.problems) == [shard]
        assert not found.good
        mended = bulk.verify(tmp_path / "a", redraw=True, sampler=sampler)
        assert (list(mended.problems), mended.redrawn, mended.good) == ([shard], (shard,), True)
        assert files(tmp_path / "a") == whole
    assert leftovers(tmp_path) == []


def test_a_flipped_bit_of_a_record_is_found(tmp_path: Path) -> None:
    """All but the bits of the seconds, of white space and of the names of keys that nobody reads."""
    sampler = tiny()
    draw(sampler, tmp_path / "a", n=3)
    path = tmp_path / "a" / "shards" / "000000.json"
    data = path.read_bytes()
    read = data.index(b', "seconds"')
    for byte in range(read):
        changed = bytearray(data)
        changed[byte] ^= 1 << byte % 7
        path.write_bytes(changed)
        if json_or_none(changed) != json.loads(data):
            assert bulk.verify(tmp_path / "a").problems, bytes(changed)
    assert bulk.verify(tmp_path / "a", redraw=True, sampler=sampler).good
    assert bulk.verify(tmp_path / "a").problems == {}


def json_or_none(data: bytes) -> Any:
    try:
        return json.loads(data)
    except ValueError:
        return None


@pytest.mark.parametrize("format", FORMATS)
def test_missing_shards_and_files_are_found(tmp_path: Path, format: str) -> None:
    sampler = tiny()
    draw(sampler, tmp_path / "a", format=format)
    whole, job = files(tmp_path / "a"), jobs.read(tmp_path / "a")
    os.rename(job.path(0), tmp_path / "moved")
    job.record_path(1).unlink()
    os.symlink(tmp_path / "moved", job.path(0))
    if job.path(2).is_dir():
        (job.path(2) / "000000009.png").unlink()
        (job.path(3) / "more.png").write_bytes(b"")
    else:
        job.path(2).write_bytes(b"")
        with job.path(3).open("ab") as file:
            file.write(b"\0" * 1_200_000)
    found = bulk.verify(tmp_path / "a")
    assert list(found.problems) == [0, 1, 2, 3]
    assert bulk.verify(tmp_path / "a", redraw=True, sampler=sampler).good
    assert files(tmp_path / "a") == whole


def test_wrong_images_are_found_by_drawing_them_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that drew wrongly has written files whose SHA-256 are right."""
    sampler = tiny()
    draw_batch = working.draw_batch

    def wrong(job: Any, sampler: Any, batch: range) -> Any:
        pixels = draw_batch(job, sampler, batch)
        if 7 in batch:
            pixels[batch.index(7), 0, 0, 0] ^= 1
        return pixels

    with monkeypatch.context() as patched:
        patched.setattr(working, "draw_batch", wrong)
        draw(sampler, tmp_path / "a")
    assert bulk.verify(tmp_path / "a").good
    found = bulk.verify(tmp_path / "a", fraction=1.0, sampler=sampler)
    assert found.compared == N
    assert list(found.problems) == [1]
    assert re.search(r"1 of \d images differ when they are drawn again: 7$", found.problems[1])
    assert bulk.verify(tmp_path / "a", fraction=1.0, redraw=True, sampler=sampler).good
    assert bulk.verify(tmp_path / "a", fraction=1.0, sampler=sampler).problems == {}
    counts = {bulk.verify(tmp_path / "a", fraction=0.01, sampler=sampler).compared for _ in range(5)}
    assert counts <= {1, 2, 3}  # one batch


def test_eager_jobs_are_drawn_again_with_their_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    eager = tiny(backend="eager", determinism="seed")
    draw(eager, tmp_path / "a", n=5)
    before = torch.get_num_threads()
    torch.set_num_threads(before + 1)
    try:
        assert bulk.verify(tmp_path / "a", fraction=1.0, sampler=eager).good
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


def test_another_model_redraws_nothing(tmp_path: Path) -> None:
    draw(tiny(), tmp_path / "a")
    whole = files(tmp_path / "a")
    with pytest.raises(JobError, match="model:"):
        bulk.verify(tmp_path / "a", redraw=True, sampler=tiny(seed=1))
    with pytest.raises(JobError, match="given in memory"):
        bulk.verify(tmp_path / "a", redraw=True)
    for fraction in (0, 1.5, -1, "1", float("nan")):
        with pytest.raises(InvalidArgument):
            bulk.verify(tmp_path / "a", fraction=fraction)
    assert files(tmp_path / "a") == whole


def test_the_jobs_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also from another working folder than that of the job."""
    saved(tmp_path / "model")
    draw(tiny(), tmp_path / "a")
    document = json.loads((tmp_path / "a" / "job.json").read_text())
    document["call"]["model"] = str(tmp_path / "model")
    (tmp_path / "a" / "job.json").write_text(json.dumps(document))
    (tmp_path / "a" / "shards" / "000001.npz").unlink()
    assert bulk.verify(tmp_path / "a", redraw=True).redrawn == (1,)
    assert bulk.verify(tmp_path / "a", fraction=1.0).good


# Readers --------------------------------------------------------------------------------------------------------------


def pixels_of(folder: Path) -> np.ndarray:
    job = jobs.read(folder)
    return np.concatenate([working.read_shard(job, shard) for shard in job.shards])


def adm_batches(path: Path, batch: int) -> Iterator[np.ndarray]:
    """Read arr_0 as the evaluator of guided-diffusion does: in batches, after a header of version 1.0."""
    with zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as file:
        assert npy.read_magic(file) == (1, 0)
        shape, fortran, dtype = npy.read_array_header_1_0(file)
        assert (len(shape), fortran, dtype, shape[3]) == (4, False, np.uint8, 3)
        for i in range(0, shape[0], batch):
            count = min(batch, shape[0] - i)
            size = count * int(np.prod(shape[1:]))
            data = file.read(size)
            assert len(data) == size
            yield np.frombuffer(data, dtype).reshape(count, *shape[1:])
        assert file.read() == b""


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("format", ["npz", "webdataset"])
def test_the_evaluator_of_adm_reads_it(tmp_path: Path, channels: int, format: str) -> None:
    config = change(in_channels=channels, out_channels=channels)
    draw(tiny(config, class_names=None), tmp_path / "plain", format=format)
    bulk.export(tmp_path / "plain", adm=tmp_path / "plain.npz")
    read = np.concatenate([*adm_batches(tmp_path / "plain.npz", 5)])
    np.testing.assert_array_equal(read, np.broadcast_to(pixels_of(tmp_path / "plain"), (N, 8, 8, 3)))
    with np.load(tmp_path / "plain.npz") as file:
        assert file.files == ["arr_0"]
    if channels == 3:
        draw(tiny(), tmp_path / "labels", labels=[3, 1], format=format)
        bulk.export(tmp_path / "labels", adm=tmp_path / "labels.npz")
        with np.load(tmp_path / "labels.npz") as file:
            np.testing.assert_array_equal(file["arr_0"], pixels_of(tmp_path / "labels"))
            assert file["arr_1"].tolist() == [3, 1] * 7


def samples(tars: list[Path]) -> Iterator[dict[str, bytes]]:
    """Read tars as WebDataset does: neighbouring files whose names agree up to the first point are a sample."""
    for path in tars:
        sample: dict[str, bytes] = {}
        with tarfile.open(path, "r|") as archive:
            for head in archive:
                key, extension = head.name.split(".", 1)
                if sample.get("__key__") != key.encode():
                    if sample:
                        yield sample
                    sample = {"__key__": key.encode()}
                assert extension not in sample
                file = archive.extractfile(head)
                assert file is not None
                sample[extension] = file.read()
        yield sample


def decoded(data: bytes | Path) -> np.ndarray:
    import io

    with Image.open(data if isinstance(data, Path) else io.BytesIO(data)) as picture:
        picture.load()
        return np.asarray(picture.convert("RGB"))


@pytest.mark.parametrize("exported", [False, True])
def test_webdataset_reads_it(tmp_path: Path, exported: bool) -> None:
    draw(tiny(), tmp_path / "a", format="npz" if exported else "webdataset")
    folder = tmp_path / "a" / "shards"
    if exported:
        bulk.export(tmp_path / "a", webdataset=tmp_path / "tars")
        folder = tmp_path / "tars"
    found = list(samples(sorted(folder.glob("*.tar"))))
    assert [int(s["__key__"]) for s in found] == list(range(N))
    assert [int(s["cls"]) for s in found] == [i % 4 for i in range(N)]
    facts = [json.loads(s["json"]) for s in found]
    assert facts[6] == {"index": 6, "seed": 0, "label": 2, "class_name": "c"}
    np.testing.assert_array_equal(np.stack([decoded(s["png"]) for s in found]), pixels_of(tmp_path / "a"))


def test_exported_tars_are_those_of_a_job(tmp_path: Path) -> None:
    draw(tiny(), tmp_path / "a", format="webdataset")
    draw(tiny(), tmp_path / "b", format="npz")
    bulk.export(tmp_path / "b", webdataset=tmp_path / "tars")
    shards = tmp_path / "a" / "shards"
    for path in sorted((tmp_path / "tars").iterdir()):
        assert path.read_bytes() == (shards / path.name).read_bytes()


@pytest.mark.parametrize("format", ["exported", "png", "imagefolder"])
def test_folders_of_pictures_are_read(tmp_path: Path, format: str) -> None:
    """By a sorted recursive listing, as clean-fid's and (deep) torch-fidelity's, and by imagefolder's metadata."""
    draw(tiny(), tmp_path / "a", format="npz" if format == "exported" else format)
    folder = tmp_path / "a" / "shards"
    if format == "exported":
        bulk.export(tmp_path / "a", folder=tmp_path / "pngs")
        folder = tmp_path / "pngs"
        assert len(list(folder.glob("*.png"))) == N  # torch-fidelity's default looks into no sub-folder
    pictures = sorted(folder.rglob("*.png"))
    np.testing.assert_array_equal(np.stack([decoded(p) for p in pictures]), pixels_of(tmp_path / "a"))
    if format != "png":
        rows = []
        for metadata in sorted(folder.rglob("metadata.jsonl")):
            for line in metadata.read_text().splitlines():
                row = json.loads(line)
                assert (metadata.parent / row["file_name"]).is_file()
                rows.append(row)
        assert [row["index"] for row in rows] == list(range(N))
        assert [row["label"] for row in rows] == [i % 4 for i in range(N)]
        assert {row["class_name"] for row in rows} == set("abcd")


def test_fastdiff_reads_it(tmp_path: Path) -> None:
    draw(tiny(), tmp_path / "a")
    data = load_data(tmp_path / "a" / "shards" / "000001.npz")
    assert len(data) == 4
    assert data.class_names == tuple("abcd")


def test_exports_are_refused(tmp_path: Path) -> None:
    draw(tiny(), tmp_path / "a")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    refused: list[dict[str, Any]] = [
        {}, {"adm": tmp_path / "a.npy"}, {"adm": 3}, {"folder": tmp_path / "full"}, {"folder": tmp_path / "full" / "x"},
        {"webdataset": tmp_path / "full"}, {"webdataset": ""},
    ]  # fmt: skip
    for options in refused:
        with pytest.raises(InvalidArgument):
            bulk.export(tmp_path / "a", **options)
    assert (tmp_path / "full" / "x").read_text() == "mine"
    shard = tmp_path / "a" / "shards" / "000001.npz"
    flip(shard, random.Random(0))
    for form in ("adm", "folder", "webdataset"):
        with pytest.raises(JobError, match=r"000001.npz: .*fastdiff verify .* --redraw"):
            bulk.export(tmp_path / "a", **{form: tmp_path / "new.npz"})
    shard.unlink()
    with pytest.raises(JobError, match="1 of 4 shards are missing"):
        bulk.export(tmp_path / "a", adm=tmp_path / "new.npz")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "full"]


def test_an_export_into_an_empty_folder(tmp_path: Path) -> None:
    draw(tiny(TINY, class_names=None), tmp_path / "a")
    (tmp_path / "out").mkdir()
    seen: list[tuple[int, int]] = []
    bulk.export(tmp_path / "a", folder=tmp_path / "out", progress=lambda *done: seen.append(done))
    assert seen == [(i + 1, 4) for i in range(4)]
    assert len(list((tmp_path / "out").iterdir())) == N + 1
