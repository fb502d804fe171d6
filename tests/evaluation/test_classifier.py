"""The built-in classifier, how it is trained, and the check that judges samples with it."""

from __future__ import annotations

import functools
import gzip
import hashlib
import importlib.util
import itertools
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import fastdiff
from fastdiff.checkpoints.loading import BUILTIN
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation.classifier import CLASS_NAMES, Classifier
from tests.support.paths import ROOT

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
WEIGHTS = BUILTIN / "fashion-mnist" / "classifier.safetensors"

# of waves(3); atol 1e-4 is for other processors' sums
LOGITS = [
    [2.35241, -1.19101, 0.15765, -0.63199, -2.15015, 0.58363, -1.31880, -0.27868, 1.94473, 0.49452],
    [0.41411, -1.65252, 0.29961, 0.19844, -0.91384, 0.22921, -1.82508, -0.37495, 4.06774, -0.43860],
    [2.64066, -2.21029, 0.97284, -0.55086, -0.74443, 0.91120, -1.46971, -0.94197, 2.34519, -0.97034],
]


def recipe(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


checker, trainer = recipe("check_fashion_mnist"), recipe("train_classifier")


@pytest.fixture(scope="module")
def classifier():
    return Classifier.load("fashion-mnist")


def waves(n):
    """n images [n, 1, 32, 32] in [-1, 1], exact functions of their number."""
    y, x = torch.meshgrid(torch.arange(32.0), torch.arange(32.0), indexing="ij")
    return torch.stack([torch.cos(x * (k + 1) / 9 + y * k / 7) for k in range(n)])[:, None]


# The classifier -------------------------------------------------------------------------------------------------------


def test_recorded_accuracy(classifier):
    record = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert record["accuracy"] >= 0.93
    assert record["test_images"] == 10_000
    assert record["sha256"] == hashlib.sha256(WEIGHTS.read_bytes()).hexdigest()
    assert record["parameters"] == sum(p.numel() for p in classifier.parameters())
    assert list(record["accuracy_per_class"]) == list(CLASS_NAMES)
    assert sum(record["accuracy_per_class"].values()) / 10 == pytest.approx(record["accuracy"])
    assert WEIGHTS.stat().st_size < 2_000_000
    if FASHION_MNIST.is_dir():
        test = checker.load_split(FASHION_MNIST, "t10k")
        logits, _ = classifier.judge(test.pixels[:1000])
        accuracy = (logits.argmax(1) == test.labels[:1000]).double().mean().item()
        assert abs(accuracy - record["accuracy"]) < 3 * (0.07 * 0.93 / 1000) ** 0.5


def test_logits_are_what_they_were(classifier):
    logits = classifier(waves(3))
    torch.testing.assert_close(logits, torch.tensor(LOGITS), atol=1e-4, rtol=0)


def test_an_images_logits_depend_on_it_alone(classifier):
    assert not classifier.training
    images = waves(7)
    before = {name: tensor.clone() for name, tensor in classifier.state_dict().items()}
    logits, features = classifier.judge(images, batch_size=3)
    for i in range(7):
        torch.testing.assert_close(classifier(images[i : i + 1])[0], logits[i], atol=1e-5, rtol=1e-5)
    assert all(torch.equal(before[name], tensor) for name, tensor in classifier.state_dict().items())
    assert features.shape == (7, classifier.width)
    assert not logits.requires_grad
    torch.testing.assert_close(classifier.head(classifier.features(images)), logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 32, 32), (1, 3, 32, 32), (1, 1, 28, 28)])
def test_images_of_another_shape_are_refused(classifier, shape):
    with pytest.raises(InvalidArgument, match=r"must be \[B, 1, 32, 32\]"):
        classifier(torch.zeros(shape))


def test_save_and_load(tmp_path):
    torch.manual_seed(0)
    saved = Classifier()
    saved(waves(4))  # the norms' statistics move
    saved.save(tmp_path / "new" / "classifier.safetensors")
    for path in (tmp_path / "new", tmp_path / "new" / "classifier.safetensors", str(tmp_path / "new")):
        loaded = Classifier.load(path)
        torch.testing.assert_close(loaded(waves(2)), saved.eval()(waves(2)), atol=0, rtol=0)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["classifier.safetensors"]


def damage_shape(tensors):
    tensors["head.weight"] = tensors["head.weight"][:9]


def damage_dtype(tensors):
    tensors["head.weight"] = tensors["head.weight"].half()


def damage_values(tensors):
    tensors["head.bias"][3] = float("nan")


def damage_names(tensors):
    tensors["tail.bias"] = tensors.pop("head.bias")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_shape, r"head.weight is torch.float32 \[9, 96\], torch.float32 \[10, 96\] is needed"),
        (damage_dtype, r"head.weight is torch.float16"),
        (damage_values, r"head.bias has NaN"),
        (damage_names, r"2 problems:\n  missing: head.bias\n  unexpected: tail.bias"),
    ],
)
def test_weights_that_do_not_fit(tmp_path, damage, message):
    tensors = load_file(WEIGHTS)
    damage(tensors)
    save_file(tensors, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message) as caught:
        Classifier.load(tmp_path / "w.safetensors")
    assert "w.safetensors" in str(caught.value)


def test_files_that_are_no_weights(tmp_path):
    (tmp_path / "cut.safetensors").write_bytes(WEIGHTS.read_bytes()[:100_000])
    (tmp_path / "text.safetensors").write_text("not weights at all")
    for path in (tmp_path / "cut.safetensors", tmp_path / "text.safetensors", tmp_path, tmp_path / "none", "no-model"):
        with pytest.raises(CheckpointError, match=Path(path).name):
            Classifier.load(path)


# Training -------------------------------------------------------------------------------------------------------------


def test_augmentation():
    torch.manual_seed(0)
    image = torch.full((1, 1, 32, 32), -1.0)
    image[..., 8, 3] = 1.0  # one lit pixel, off the centre line
    out = trainer.augment(image.expand(4000, 1, 32, 32))
    assert out.shape == (4000, 1, 32, 32)
    assert set(out.unique().tolist()) == {-1.0, 1.0}
    lit = (out == 1).nonzero()
    assert lit[:, 0].tolist() == list(range(4000))  # one in every image
    assert set(lit[:, 2].tolist()) == set(range(6, 11))  # shifted by up to 2
    assert set(lit[:, 3].tolist()) == {*range(1, 6), *range(26, 31)}  # and mirrored: 3 -> 28
    assert abs((lit[:, 3] < 16).double().mean().item() - 0.5) < 0.05


def write_idx(path, array):
    header = struct.pack(">BBBB", 0, 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(gzip.compress(header + array.tobytes(), 1))


def write_split(folder, name, images):
    """`images` as the IDX files of a split; their pixels become the nearest of 256 levels."""
    pixels = ((images.pixels[:, 0] + 1) * 127.5).round().byte()
    assert not torch.cat([pixels[:, [0, 1, 30, 31]], pixels[:, :, [0, 1, 30, 31]].mT], 1).any()
    write_idx(folder / f"{name}-images-idx3-ubyte.gz", pixels[:, 2:-2, 2:-2].numpy())
    write_idx(folder / f"{name}-labels-idx1-ubyte.gz", images.labels.byte().numpy())


@pytest.mark.slow
def test_training_learns_and_records(tmp_path, capsys):
    rng = np.random.default_rng(0)
    for name, n in (("train", 960), ("t10k", 100)):
        labels = rng.integers(0, 10, n)
        pixels = rng.integers(0, 40, (n, 32, 32), dtype=np.uint8)
        for i, label in enumerate(labels):  # class k: k + 2 bright rows
            pixels[i, 4 : 6 + 2 * label] = 230
        pixels[:, [0, 1, 30, 31]] = pixels[:, :, [0, 1, 30, 31]] = 0
        images = checker.Images(torch.from_numpy(pixels)[:, None] / 127.5 - 1, torch.from_numpy(labels))
        write_split(tmp_path, name, images)
    out = tmp_path / "c.safetensors"
    options = ["--data", str(tmp_path), "--out", str(out), "--epochs", "8", "--batch-size", "64", "--precision", "fp32"]
    threads = torch.get_num_threads()
    assert trainer.main(options) == 0
    assert torch.get_num_threads() == threads
    record = json.loads(out.with_suffix(".json").read_text())
    assert record["accuracy"] > 0.8
    assert record["command"].startswith("python recipes/train_classifier.py --data ")
    assert f"{record['accuracy']:.2%}" in capsys.readouterr().out
    test = checker.load_split(tmp_path, "t10k")
    logits, _ = Classifier.load(out).judge(test.pixels)
    assert (logits.argmax(1) == test.labels).double().mean().item() == record["accuracy"]


def test_no_training():
    with pytest.raises(InvalidArgument, match="batches of 10"):
        trainer.train(range(5), epochs=1, batch_size=10, precision="fp32")


# The check ------------------------------------------------------------------------------------------------------------


@functools.cache
def synthetic():
    """Train, test and sample images of one smooth distribution, labelled by what the classifier reads."""
    generator = torch.Generator().manual_seed(0)
    basis = torch.nn.functional.interpolate(torch.randn(12, 1, 7, 7, generator=generator), size=28, mode="bicubic")
    judge = Classifier.load("fashion-mnist")

    def images(n):
        z = torch.randn(n, 12, generator=generator) / 2
        pixels = torch.full((n, 1, 32, 32), -1.0)
        pixels[:, :, 2:-2, 2:-2] = (z @ basis.flatten(1)).view(n, 1, 28, 28).tanh()
        pixels = ((pixels + 1) * 127.5).round() / 127.5 - 1
        return checker.Images(pixels, judge.judge(pixels)[0].argmax(1))

    return images(1500), images(300), images(200)


@functools.cache
def fashion_mnist():
    """The same of real images; the samples are test images that are not in the test part."""
    train, test = checker.load_split(FASHION_MNIST, "train"), checker.load_split(FASHION_MNIST, "t10k")
    return part(train, slice(3000)), part(test, slice(400)), part(test, slice(1000, 1400))


def part(images, at):
    return checker.Images(images.pixels[at], images.labels[at])


SOURCES = [synthetic, *([fashion_mnist] if FASHION_MNIST.is_dir() else [])]
each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.__name__)


@each_source
def test_new_images_pass(classifier, source):
    train, test, samples = source()
    report, near = checker.check(samples, train, test, classifier)
    assert report["failures"] == []
    assert report["passed"] is True
    assert report["near_duplicates"]["samples"] <= 1
    recorded = 1.0 if source is synthetic else json.loads(WEIGHTS.with_suffix(".json").read_text())["accuracy"]
    assert abs(report["accuracy"]["samples"] - recorded) < 0.04
    assert near.distance.shape == (len(samples), 50)
    json.dumps(report, allow_nan=False)


@each_source
@pytest.mark.parametrize("noise", [0.0, 0.02])
def test_training_images_are_found(classifier, source, noise):
    train, test, _ = source()
    at = torch.arange(0, 1500, 15)
    samples = part(train, at)
    pixels = samples.pixels + noise * torch.randn(samples.pixels.shape, generator=torch.Generator().manual_seed(1))
    report, near = checker.check(checker.Images(pixels, samples.labels), train, test, classifier)
    assert torch.equal(near.index[:, 0], at)
    assert report["near_duplicates"]["samples"] == 100
    assert report["near_duplicates"]["list"][3]["training_image"] == 45
    exact = (pixels[3] - samples.pixels[3]).double().square().mean().sqrt().item()
    assert report["near_duplicates"]["list"][3]["distance"] == pytest.approx(exact, abs=1e-7)
    assert any("100 samples are near-duplicates" in reason for reason in report["failures"])


@each_source
def test_a_few_copies_among_many_are_found(classifier, source):
    train, test, samples = source()
    mixed = checker.Images(
        torch.cat([samples.pixels[:190], train.pixels[:10]]), torch.cat([samples.labels[:190], train.labels[:10]])
    )
    report, near = checker.check(mixed, train, test, classifier)
    assert set(range(190, 200)) <= {entry["sample"] for entry in report["near_duplicates"]["list"]}
    assert not report["passed"]
    assert set(near.ratio.argsort()[:10].tolist()) == set(range(190, 200))


def test_a_crowded_class_is_not_mistaken_for_copies(classifier):
    train, test, samples = synthetic()

    def crowd(images):  # class 1's images differ twenty times less
        dense = images.pixels / 20
        return checker.Images(torch.cat([images.pixels, dense]), torch.cat([images.labels, images.labels * 0 + 1]))

    report, near = checker.check(crowd(samples), crowd(train), crowd(test), classifier)
    sparse, dense = near.distance[: len(samples), 0], near.distance[len(samples) :, 0]
    assert dense.max() < sparse.min()
    assert report["near_duplicates"]["samples"] <= 1


def test_wrong_classes_fail(classifier):
    train, test, samples = synthetic()
    wrong = torch.where(torch.arange(len(samples)) % 5 == 0, (samples.labels + 1) % 10, samples.labels)
    report, _ = checker.check(checker.Images(samples.pixels, wrong), train, test, classifier)
    assert report["accuracy"]["samples"] == 0.8
    assert report["failures"] == ["80.0% of the samples are read as their class, 85% are needed"]


def test_max_duplicates_replaces_the_test(classifier):
    train, test, samples = synthetic()
    one = checker.Images(torch.cat([samples.pixels, train.pixels[:1]]), torch.cat([samples.labels, train.labels[:1]]))
    lenient, _ = checker.check(one, train, test, classifier)
    strict, _ = checker.check(one, train, test, classifier, max_duplicates=0)
    assert lenient["passed"]
    assert not strict["passed"]


def test_nearest_is_exact():
    generator = torch.Generator().manual_seed(0)
    data = torch.rand(700, 1024, generator=generator) * 2 - 1
    queries = torch.cat([torch.rand(30, 1024, generator=generator) * 2 - 1, data[:3], data[5:6] + 1e-4])
    exact = torch.cdist(queries.double(), data.double(), compute_mode="donot_use_mm_for_euclid_dist") / 32
    distance, index = exact.sort(1)
    near = checker.nearest(queries, data, k=9, chunk=7)
    assert torch.equal(near.index, index[:, :9])
    torch.testing.assert_close(near.distance.double(), distance[:, :9], atol=1e-7, rtol=1e-6)
    assert near.distance[30:33, 0].tolist() == [0, 0, 0]
    assert near.ratio[30] == 0
    assert checker.nearest(queries, data[:4]).index.shape == (34, 4)
    assert checker.nearest(data[:1], data[:1].expand(60, -1)).ratio.tolist() == [0]


@pytest.mark.parametrize(("samples", "test_found", "test"), [(4, 0, 6), (5, 1, 6), (3, 2, 9), (2, 0, 3), (6, 0, 4)])
def test_duplicate_limit_by_counting(samples, test_found, test):
    def chance(found):
        f = found + test_found
        draws = list(itertools.combinations(range(samples + test), f))
        return sum(sum(i < samples for i in draw) >= found for draw in draws) / len(draws)

    limit = checker.duplicate_limit(samples, test_found, test)
    assert all(chance(found) >= 0.01 for found in range(1, limit + 1))
    assert limit == samples or chance(limit + 1) < 0.01


def test_duplicate_limits():
    assert checker.duplicate_limit(1000, 10, 10_000) == 4
    assert checker.duplicate_limit(10_000, 10, 10_000) >= 10
    assert checker.duplicate_limit(1000, 0, 10_000) == 1


# The command ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("data")
    train, test, _ = synthetic()
    write_split(path, "train", train)
    write_split(path, "t10k", test)
    return path


def save_samples(path, pixels, labels):
    np.savez(path, images=pixels, labels=labels)
    return str(path)


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "uint8"])
def test_command(folder, tmp_path, capsys, dtype):
    train, _, samples = synthetic()
    pixels = samples.pixels.numpy()
    if dtype == "uint8":
        pixels = ((pixels + 1) * 127.5).round().astype(np.uint8)
    good = save_samples(tmp_path / "good.npz", pixels, samples.labels.numpy())
    assert checker.main(["--samples", good, "--data", str(folder), "--out", str(tmp_path / "good")]) == 0
    assert "read as their class: 100.00%" in capsys.readouterr().out
    report = json.loads((tmp_path / "good" / "report.json").read_text())
    assert report["passed"]
    assert report["source"] == {"file": "good.npz"}
    with Image.open(tmp_path / "good" / "grid.png") as grid:
        assert grid.size == (8 * 64, 10 * 64)

    bad = save_samples(tmp_path / "bad.npz", train.pixels[:50].numpy(), train.labels[:50].numpy())
    assert checker.main(["--samples", bad, "--data", str(folder), "--out", str(tmp_path / "bad")]) == 1
    assert "FAILED: 50 samples are near-duplicates" in capsys.readouterr().out
    with Image.open(tmp_path / "bad" / "closest.png") as image:
        sheet = np.asarray(image)
    assert np.array_equal(sheet[8:104, 8:104], sheet[8:104, 104:200])  # a copy beside its original
    assert len(np.unique(sheet[8:104, 8:104])) > 10


def test_command_draws_from_the_model(folder, tmp_path, monkeypatch):
    _, _, samples = synthetic()
    calls = []

    class Sampler:
        @classmethod
        def from_pretrained(cls, model):
            calls.append(model)
            return cls()

        def __enter__(self):
            return self

        def __exit__(self, *_):
            calls.append("closed")

        def sample(self, n, **options):
            calls.append((n, options))
            return SimpleNamespace(images=samples.pixels[:n])

    monkeypatch.setitem(vars(fastdiff), "Sampler", Sampler)
    options = ["--per-class", "2", "--steps", "7", "--guidance", "1.5", "--seed", "3", "--data", str(folder)]
    assert checker.main([*options, "--model", "mine", "--out", str(tmp_path)]) == 1  # these labels are not theirs
    labels = [k for k in range(10) for _ in range(2)]
    expected = {"solver": "ddim", "steps": 7, "labels": labels, "guidance": 1.5, "seed": 3}
    assert calls == ["mine", (20, expected), "closed"]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["source"] == {"model": "mine", "steps": 7, "guidance": 1.5, "seed": 3}
    assert report["samples"] == 20


def test_samples_that_cannot_be_read(folder, tmp_path, capsys):
    good, labels = waves(3).numpy(), np.arange(3)
    for pixels, classes, message in (
        (good[:, 0], labels, r"images must be \[N, 1, 32, 32\]"),
        (good[:0], labels[:0], r"images must be \[N, 1, 32, 32\]"),
        (good.astype(np.int64), labels, "floats in .* or uint8, not int64"),
        (good * 2, labels, r"in \[-1, 1\], not -2"),
        (good * np.nan, labels, r"in \[-1, 1\], not nan"),
        (good, labels[:2], "labels must be 3 integers"),
        (good, labels / 2, "labels must be 3 integers"),
        (good, labels + 8, "labels must be 0 to 9, not 8 to 10"),
        (np.array([None]), labels, "images and labels is needed"),
    ):
        path = save_samples(tmp_path / "samples.npz", pixels, classes)
        with pytest.raises(DataError, match=message):
            checker.read_samples(Path(path))
    assert checker.main(["--samples", path, "--data", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "error: " in capsys.readouterr().err
    np.savez(tmp_path / "samples.npz", images=good)
    (tmp_path / "text.npz").write_text("no archive")
    for name in ("samples.npz", "text.npz", "absent.npz"):
        with pytest.raises(DataError, match=name):
            checker.read_samples(tmp_path / name)
    assert not (tmp_path / "out").exists()
