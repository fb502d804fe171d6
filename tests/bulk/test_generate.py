"""A job's folder: what is in it, how it goes on, what it refuses, how much memory it takes."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import fastdiff
from fastdiff import bulk
from fastdiff.bulk import drawing
from fastdiff.bulk import job as jobs
from fastdiff.bulk import work as working
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import CheckpointError, InvalidArgument, JobError, NumericsError
from tests.bulk.jobs import N, draw, files, leftovers, tiny
from tests.support import warm
from tests.support.unets import TINY, change

FORMATS = ("npz", "png", "webdataset", "imagefolder")


def images(folder: Path) -> np.ndarray:
    job = jobs.read(folder)
    return np.concatenate([working.read_shard(job, shard) for shard in job.shards])


@pytest.mark.parametrize("format", FORMATS)
def test_images_are_the_samplers(tmp_path: Path, format: str) -> None:
    sampler, seen = tiny(), []
    report = draw(sampler, tmp_path / "a", format=format, seed=7, progress=seen.append)
    expected = to_uint8(sampler.sample(N, steps=1, seed=7, labels=[i % 4 for i in range(N)]).images)
    np.testing.assert_array_equal(images(tmp_path / "a"), expected)
    assert (report.images, report.drawn, report.shards, report.workers) == (N, N, 4, 0)
    assert 0 < report.first_shard_s <= report.seconds
    assert (seen[0].done, seen[0].seconds_left) == (0, None)
    assert (seen[-1].done, seen[-1].n, seen[-1].seconds_left) == (N, N, 0.0)
    assert bulk.verify(tmp_path / "a").good
    assert leftovers(tmp_path) == []


def test_the_package_has_it() -> None:
    assert fastdiff.bulk is bulk


@pytest.mark.parametrize("format", FORMATS)
def test_equal_calls_write_equal_bytes(tmp_path: Path, format: str) -> None:
    draw(tiny(), tmp_path / "a", format=format)
    draw(tiny(), tmp_path / "b", format=format)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_bitwise_images_do_not_depend_on_batches_or_threads(tmp_path: Path) -> None:
    native = tiny()
    draw(native, tmp_path / "a")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        draw(native, tmp_path / "b", batch_size=2)
        draw(native, tmp_path / "b", batch_size=4)  # and a job goes on with another batch size
    finally:
        torch.set_num_threads(before)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_what_is_there_is_not_drawn_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler = tiny()
    draw(sampler, tmp_path / "a")
    whole = files(tmp_path / "a")
    for missing in ("000002.npz", "000002.json", "000003.json"):
        (tmp_path / "a" / "shards" / missing).unlink()
    starts = []
    sample = type(sampler).sample
    monkeypatch.setattr(
        type(sampler), "sample", lambda self, n, **o: starts.append(o["start_index"]) or sample(self, n, **o)
    )
    report = draw(sampler, tmp_path / "a")
    assert sorted(starts) == [8, 11, 12]
    assert report.drawn == 6
    assert files(tmp_path / "a") == whole
    assert draw(sampler, tmp_path / "a").drawn == 0


def test_a_file_without_a_record_is_compared(tmp_path: Path) -> None:
    """One that was cut or changed is replaced."""
    draw(tiny(), tmp_path / "a", format="imagefolder")
    whole = files(tmp_path / "a")
    shards = tmp_path / "a" / "shards"
    (shards / "000001.json").unlink()
    picture = shards / "000001" / "000000005.png"
    picture.write_bytes(picture.read_bytes()[:-9])
    (shards / "000002.json").unlink()
    record = (shards / "000002" / "metadata.jsonl").read_text()
    (shards / "000002" / "metadata.jsonl").write_text(record + "\n")
    draw(tiny(), tmp_path / "a", format="imagefolder")
    assert files(tmp_path / "a") == whole
    assert bulk.verify(tmp_path / "a").good
    assert leftovers(tmp_path) == []


OTHERS: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "n": ({"n": N + 1}, ("n",)),
    "format": ({"format": "png"}, ("format", "encoder")),
    "shards": ({"shard_size": 5}, ("shard_size",)),
    "steps": ({"steps": 3}, ("table", "nfe")),
    "solver": ({"solver": "euler"}, ("table", "solver")),
    "eta": ({"eta": 1.0}, ("table",)),
    "clip": ({"clip": None}, ("table",)),
    "seed": ({"seed": 1}, ("seed",)),
    "labels": ({"labels": 2}, ("labels",)),
    "guidance": ({"guidance": 2.0}, ("nfe", "guidance")),
    "size": ({"size": 16}, ("shape",)),
}


@pytest.mark.parametrize("other", OTHERS)
def test_other_settings_are_refused_by_name(tmp_path: Path, other: str) -> None:
    draw(tiny(), tmp_path / "a", n=4, steps=2)
    whole = files(tmp_path / "a")
    options, names = OTHERS[other]
    with pytest.raises(JobError, match="another job") as caught:
        draw(tiny(), tmp_path / "a", **{"n": 4, "steps": 2, **options})
    assert caught.value.reasons == names
    assert all(f"\n  {name}: " in str(caught.value) for name in names)
    assert files(tmp_path / "a") == whole


class Torch:
    """The module torch, of another version."""

    __version__ = "2.99"

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


def test_other_weights_versions_and_machines_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    draw(tiny(), tmp_path / "a")
    with pytest.raises(JobError) as caught:
        draw(tiny(seed=1), tmp_path / "a")
    assert caught.value.reasons == ("model",)
    for attribute, value, name in (("__version__", "0.0.9", "version"), ("_processor", lambda _: "AVX9", "processor"),
                                   ("torch", Torch(), "torch")):  # fmt: skip
        with monkeypatch.context() as patched:
            patched.setattr(jobs, attribute, value)
            with pytest.raises(JobError) as caught:
                draw(tiny(), tmp_path / "a")
        assert caught.value.reasons == (name,)
    eager = tiny(backend="eager", determinism="seed")
    draw(eager, tmp_path / "c")
    with pytest.raises(JobError) as caught:
        draw(eager, tmp_path / "c", batch_size=2)
    assert caught.value.reasons == ("batch_size",)
    draw(tiny(), tmp_path / "b")
    monkeypatch.setenv("FASTDIFF_ISA", "avx9")
    monkeypatch.setattr(jobs.native, "isa", lambda: "avx9")
    with pytest.raises(JobError, match="FASTDIFF_ISA, set to one") as caught:
        jobs.read(tmp_path / "b").check(tiny(backend="eager", determinism="seed"))
    assert {"backend", "isa", "determinism"} <= set(caught.value.reasons)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"settings": {}, "call": {}}', "NaN", '{"settings": 1}'])
def test_a_damaged_job_is_refused(tmp_path: Path, content: str) -> None:
    draw(tiny(), tmp_path / "a", n=4)
    (tmp_path / "a" / "job.json").write_text(content)
    for call in (lambda: draw(tiny(), tmp_path / "a", n=4), lambda: bulk.verify(tmp_path / "a")):
        with pytest.raises(JobError, match=r"job\.json"):
            call()


BAD_VALUES = {
    "n": [0, -1, "5", None, 10**12, 2.5],
    "shard_size": [0, "4", 1.5],
    "shape": [None, [3, 8], [2, 8, 8], [3, 0, 8], [3, 1 << 40, 8], ["3", 8, 8]],
    "format": ["jpg", None, 3],
    "labels": [[], [-1], ["a"], {}, 3],
    "class_names": ["ab", [1], {}],
    "seed": [-1, None, "0"],
    "backend": [None, 3],
}


@pytest.mark.parametrize("name", BAD_VALUES)
def test_values_of_an_untrusted_job_are_checked(tmp_path: Path, name: str) -> None:
    draw(tiny(), tmp_path / "a", n=4)
    path = tmp_path / "a" / "job.json"
    document = json.loads(path.read_text())
    for value in BAD_VALUES[name]:
        document["settings"][name] = value
        path.write_text(json.dumps(document))
        with pytest.raises(JobError, match=name):
            bulk.verify(tmp_path / "a")


@pytest.mark.parametrize(
    "call",
    [
        {"options": {"start_index": 3}}, {"options": {"labels": [0]}}, {"options": {"batch_size": 4}}, {"options": []},
        {"options": {"stepps": 3}},
        {"options": {"noise": [1.0]}}, {"batch_size": 0}, {"batch_size": None}, {"model": 3},
    ],
)  # fmt: skip
def test_the_call_of_an_untrusted_job_is_checked(tmp_path: Path, call: dict[str, Any]) -> None:
    draw(tiny(), tmp_path / "a", n=4)
    path = tmp_path / "a" / "job.json"
    document = json.loads(path.read_text())
    document["call"] |= call
    path.write_text(json.dumps(document))
    with pytest.raises(JobError, match=r"job\.json"):
        bulk.verify(tmp_path / "a", redraw=True, sampler=tiny())


def test_folders_of_something_else_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("x")
    for name in ("file", "mine"):
        with pytest.raises(JobError, match=name):
            draw(tiny(), tmp_path / name)
    assert [p.name for p in (tmp_path / "mine").iterdir()] == ["thesis.tex"]
    with pytest.raises(JobError, match="no folder of `fastdiff generate`"):
        bulk.verify(tmp_path / "mine")


REFUSED: dict[str, dict[str, Any]] = {
    "n": {"n": 0}, "n of text": {"n": "9"}, "format": {"format": "jpg"}, "out": {"out": 3}, "shard": {"shard_size": 0},
    "workers in memory": {"workers": 2}, "ranks": {"ranks": 4}, "patience": {"patience_s": 0}, "seed": {"seed": None},
    "labels": {"labels": [9]}, "names": {"labels": "e"}, "many labels": {"labels": [0] * (N + 1)},
    "no labels": {"labels": []}, "half a label": {"labels": 1.5}, "noise": {"noise": torch.zeros(N, 3, 8, 8)},
    "image": {"image": torch.zeros(3, 8, 8)}, "guide": {"guide": print}, "start": {"start_index": 1},
    "deadline": {"deadline_s": 3.0}, "unknown": {"stepps": 3}, "steps": {"steps": 0}, "batch": {"batch_size": 0},
    "table": {"solver": fastdiff.solvers.ddim(fastdiff.NoiseSchedule(), 3)}, "guidances": {"guidance": [1.0, 2.0]},
    "progress": {"progress": 3}, "spacing": {"spacing": [object()]}, "prompts": {"prompts": ["a dog"]},
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_arguments_are_refused_before_anything_is_written(tmp_path: Path, case: str) -> None:
    options = dict(REFUSED[case])
    out = options.pop("out", tmp_path / "a")
    with pytest.raises(InvalidArgument):
        draw(tiny(), out, **options)
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError):
        bulk.generate(str(tmp_path / "none"), 4, tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_labels(tmp_path: Path) -> None:
    for labels, expected in (
        ("cycle", [0, 1, 2, 3, 0, 1]), ("c", [2] * 6), (3, [3] * 6), ([0, "b"], [0, 1] * 3),
        (np.array([2, 3, 3]), [2, 3, 3] * 2), (None, None),
    ):  # fmt: skip
        folder = tmp_path / str(labels)
        draw(tiny(), folder, n=6, labels=labels)
        with np.load(folder / "shards" / "000001.npz") as file:
            if expected is None:
                assert "labels" not in file
            else:
                assert file["labels"].tolist() == expected[4:]
                assert file["class_names"].tolist() == list("abcd")
            assert file["indices"].tolist() == [4, 5]
    draw(tiny(TINY, class_names=None), tmp_path / "plain", n=6)  # no classes: nothing to take turns
    assert jobs.read(tmp_path / "plain").settings["labels"] is None


def test_gray_images(tmp_path: Path) -> None:
    gray = tiny(change(in_channels=1, out_channels=1), class_names=None)
    for format in FORMATS:
        draw(gray, tmp_path / format, n=5, format=format)
        assert bulk.verify(tmp_path / format).good
        assert images(tmp_path / format).shape == (5, 8, 8, 1)
    with np.load(tmp_path / "npz" / "shards" / "000000.npz") as file:
        assert file["images"].shape == (4, 8, 8)
    latents = tiny(change(in_channels=4, out_channels=4), class_names=None)
    with pytest.raises(InvalidArgument, match="4 channels"):
        draw(latents, tmp_path / "latents")


def test_images_that_are_no_numbers_are_not_kept(tmp_path: Path) -> None:
    sampler = tiny()
    with torch.no_grad():
        sampler.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericsError):
        draw(sampler, tmp_path / "a")
    assert not list((tmp_path / "a").glob("shards/*"))


@pytest.mark.parametrize(
    ("n", "size", "expected"),
    [(50_000, 32, 1000), (10_000, 32, 200), (20, 32, 20), (500, 32, 64), (50_000, 256, 85), (50_000, 1024, 5)],
)
def test_shards_have_a_sensible_size(n: int, size: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "request", _without_memory(jobs.request))
    found = jobs.settings(
        tiny(), n, {"steps": 2, "size": size, "seed": 0}, {"labels": [0], "prompts": None}, "npz", None, None, 1
    )
    assert found["shard_size"] == expected


def _without_memory(request: Any) -> Any:
    def small(sampler: Any, k: int, *arguments: Any) -> Any:
        return request(sampler, min(k, 64), *arguments)

    return small


def test_workers_fit_the_processors_and_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(drawing.native_threads, "number", lambda: 8)
    for free, given, expected in ((None, None, 8), (10 << 30, None, 8), (3 << 30, None, 3), (0, None, 1), (0, 5, 5)):
        monkeypatch.setattr(drawing.memory, "free", lambda free=free: free)
        assert drawing._number(given, 1 << 30) == expected


PEAK = """
import ctypes, resource, sys
import torch
from fastdiff import Sampler, bulk

if hasattr(ctypes.CDLL(None), "mallopt"):  # the C library gives memory back at once, so that the peak is what is used
    for option, value in ((-1, 0), (-3, 1 << 16)):  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD
        ctypes.CDLL(None).mallopt(option, value)

class Zero(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.one = torch.nn.Parameter(torch.ones(()))
    def forward(self, x, t):
        return x * 0

sampler = Sampler(Zero(), shape=(3, 32, 32), backend="eager")
bulk.generate(sampler, 500, sys.argv[1] + "/warm", steps=1, shard_size=500, format=sys.argv[2])
peaks = []
for n in (500, 5000):
    bulk.generate(sampler, n, f"{sys.argv[1]}/{n}", steps=1, shard_size=500, format=sys.argv[2])
    bulk.verify(f"{sys.argv[1]}/{n}")
    bulk.export(f"{sys.argv[1]}/{n}", adm=f"{sys.argv[1]}/{n}.npz")
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(*peaks)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the peak has another unit elsewhere")
def test_memory_is_flat_in_n(tmp_path: Path) -> None:
    """5,000 images are 15 MB of pixels, and would be 61 MB as floats; 2 MiB more than for 500 are allowed."""
    run = warm.run("-c", PEAK, tmp_path, "npz")
    assert run.returncode == 0, run.stderr
    few, many = map(int, run.stdout.split())
    assert many - few < 2 << 10, (few, many)
