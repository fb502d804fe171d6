"""``fastdiff eval``, as a shell runs it: its numbers are those of the library, and what is missing is named."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from fastdiff import checkpoints, cli
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import evaluate, image_store, inception, metrics, reference_images, table
from fastdiff.evaluation.classifier import CLASS_NAMES, Classifier
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from tests.support import warm
from tests.support.mnist import TEST, TRAIN, idx, pictures
from tests.support.unets import TINY_CLASSES, change, random_unet

NUMBERS = ("frechet", "kernel", "precision", "recall")


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network of ten classes, 1 x 32 x 32."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = change(TINY_CLASSES, sample_size=32, in_channels=1, out_channels=1, num_class_embeds=11, null_label=10)
    checkpoints.save_folder(path, random_unet(config), NoiseSchedule("linear", 100, beta_end=0.1))
    return path


def shell(folder: Path, *arguments: Any) -> subprocess.CompletedProcess[str]:
    return warm.run("-m", "fastdiff", "eval", *arguments, cwd=folder)


def refused(folder: Path, *arguments: Any) -> str:
    """The one line that a command says before it ends with 2; ``out`` is not made."""
    result = shell(folder, *arguments)
    assert result.returncode == 2, result.stderr
    assert result.stdout == ""
    assert "Traceback" not in result.stderr
    assert not (folder / "out").exists()
    return result.stderr


def padded(array: np.ndarray) -> torch.Tensor:
    return torch.nn.functional.pad(torch.from_numpy(array)[:, None], (2, 2, 2, 2)).float() / 127.5 - 1


def test_the_built_in_model_in_a_shell(mnist: Path, tmp_path: Path) -> None:
    """Every number is what the library computes from the same images."""
    result = shell(tmp_path, "--n", 20, "--steps", 2, "--guidance", 2, "--seed", 3, "--data", mnist, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    assert report == json.loads((tmp_path / "out" / "eval" / "report.json").read_text())
    assert (report["n"], report["real_images"], report["held_out"]["n"]) == (20, TRAIN, 20)
    assert report["model"] == "fashion-mnist"
    assert {k: report["settings"][k] for k in ("solver", "nfe", "seed", "guidance", "labels")} == {
        "solver": "ddim", "nfe": 4, "seed": 3, "guidance": 2.0, "labels": "cycle",
    }  # fmt: skip
    judge = Classifier.load()
    kept = image_store.load(tmp_path / report["images"])
    drawn = Sampler.from_pretrained("fashion-mnist", device="cpu").sample(
        20, steps=2, guidance=2.0, seed=3, labels=[i % 10 for i in range(20)]
    )
    assert (kept.float() / 127.5 - 1 - drawn.images.clamp(-1, 1)).abs().max() < 0.02
    logits, features = judge.judge(kept.float() / 127.5 - 1)
    reference = judge.judge(padded(pictures(TRAIN, 0)))[1]
    expected = metrics.measure(features, reference)
    test_logits, test_features = (metrics.thinned(t, 20) for t in judge.judge(padded(pictures(TEST, 1))))
    floor = metrics.measure(test_features, reference)
    assert report["metrics"].keys() == expected.keys() == set(NUMBERS)
    for name in NUMBERS:
        for found, wanted in ((report, expected), (report["held_out"], floor)):
            values = found["metrics"][name]
            assert values["low"] <= values["value"] <= values["high"]
            assert values["value"] == pytest.approx(wanted[name].value, rel=1e-4, abs=1e-7)
            assert values["high"] == pytest.approx(wanted[name].high, rel=1e-3, abs=1e-6)
    read = (logits.argmax(1) == torch.arange(20) % 10).double().mean().item()
    assert report["accuracy"]["value"] == pytest.approx(read)
    test_read = test_logits.argmax(1) == metrics.thinned(torch.arange(TEST) % 10, 20)
    assert report["held_out"]["accuracy"]["value"] == pytest.approx(test_read.double().mean().item())
    for word in ("images: 20 of 20", f"features of the real images: {TRAIN} of {TRAIN}", "distances"):
        assert word in result.stderr


@pytest.mark.example
@pytest.mark.parametrize("example", re.findall(r"^\s*(fastdiff .*)$", cli.eval.eval.__doc__ or "", re.MULTILINE))
def test_examples(example: str, mnist: Path, tmp_path: Path) -> None:
    """As they stand but for time and data: 20 images, two steps, small files."""
    arguments = shlex.split(re.sub(r"--steps \d+", "--steps 2", re.sub(r"--n \d+", "--n 20", example)))[2:]
    named = {"labels": np.arange(30) % 10, "class_names": CLASS_NAMES}
    np.savez(tmp_path / "samples.npz", images=pictures(30, 2), **named)
    result = shell(tmp_path, *arguments, "--data", mnist)
    assert result.returncode == 0, result.stderr
    lines = result.stdout.splitlines()
    assert [line.split("  ")[0] for line in lines[1:6]] == [
        "Frechet distance", "kernel distance", "precision", "recall", "class accuracy",
    ]  # fmt: skip
    assert ("n = 30" if "samples.npz" in example else "n = 20") in lines[0]
    assert all(re.search(r"\S+ \[\S+, \S+\]  +\S+ \[\S+, \S+\]$", line) for line in lines[1:6])


@pytest.mark.slow  # half a minute, of processes; test_image_store.py interrupts a run within one
def test_a_killed_run_goes_on(model: Path, mnist: Path, tmp_path: Path) -> None:
    """SIGKILL after the first part: that part stays, the rest is drawn, and the report is that of a whole run."""
    arguments = ["--n", 1100, "--steps", 10, "--data", mnist, "--backend", "eager", "--batch-size", 50]
    process = subprocess.Popen(
        [sys.executable, "-m", "fastdiff", "eval", str(model), *map(str, arguments)], cwd=tmp_path,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        for _ in range(3000):
            first = list((tmp_path / "out" / "eval").glob("ddim-*/000000.npz"))
            if first or process.poll() is not None:
                break
            time.sleep(0.05)
    finally:
        process.kill()
        process.wait()
    assert process.returncode == -9, "it was done before it was killed"
    folder = first[0].parent
    assert not (folder / "001000.npz").exists()
    stamp = first[0].stat().st_mtime_ns
    result = shell(tmp_path, model, *arguments, "--json")
    assert result.returncode == 0, result.stderr
    assert re.search(r"images: (500|1000) of 1100", result.stderr)
    assert first[0].stat().st_mtime_ns == stamp
    assert sorted(path.name for path in folder.glob("0*.npz")) == ["000000.npz", "000500.npz", "001000.npz"]
    seconds = time.monotonic()
    again = shell(tmp_path, model, *arguments, "--json")
    assert time.monotonic() - seconds < 60
    assert again.stdout == result.stdout


def test_another_model_gets_another_folder(model: Path, mnist: Path, tmp_path: Path) -> None:
    def run(path: Path, **options: Any) -> dict[str, Any]:
        return evaluate(path, n=20, data=mnist, out=tmp_path / "out", options={"steps": 2, **options})

    first = run(model)
    changed = checkpoints.load(model)
    with torch.no_grad():
        next(changed.unet.parameters()).mul_(1.5)
    checkpoints.save_folder(tmp_path / "changed", changed.unet, changed.schedule)
    reports = [first, run(tmp_path / "changed"), run(model, seed=1), run(model, eta=1.0)]
    assert len({report["images"] for report in reports}) == 4
    images = [image_store.load(report["images"]) for report in reports]
    assert not any(torch.equal(images[0], other) for other in images[1:])
    assert run(model) == first


def test_given_images(mnist: Path, model: Path, tmp_path: Path) -> None:
    """An .npz, a folder of pictures, an IDX file and a folder of parts of the same images give the same numbers."""
    images = pictures(30, 2)
    np.savez(tmp_path / "a.npz", images=images, labels=np.arange(30) % 10, class_names=CLASS_NAMES)
    idx(tmp_path / "b.gz", images)
    for i, image in enumerate(images):
        (tmp_path / "c" / "class").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(tmp_path / "c" / "class" / f"{i:03d}.png")
    (tmp_path / "d").mkdir()
    np.savez(tmp_path / "d" / "000000.npz", images=np.pad(images, ((0, 0), (2, 2), (2, 2))))
    (tmp_path / "d" / "settings.json").write_text('{"labels": "cycle"}')
    reports = [
        evaluate(samples=tmp_path / name, data=mnist, out=tmp_path / "out", labels_of=labels_of)
        for name, labels_of in (("a.npz", None), ("b.gz", None), ("c", None), ("d", "fashion-mnist"))
    ]
    for report in reports:
        assert report["metrics"] == reports[0]["metrics"]
        assert report["n"] == 30
    assert [report["accuracy"] is None for report in reports] == [False, True, True, False]
    assert reports[0]["accuracy"] == reports[3]["accuracy"]
    fewer = evaluate(samples=tmp_path / "a.npz", n=20, data=mnist, out=tmp_path / "out")
    assert fewer["n"] == 20
    with pytest.raises(DataError, match="holds 30 images, 40 are needed"):
        evaluate(samples=tmp_path / "a.npz", n=40, data=mnist, out=tmp_path / "out")


def test_copies_of_the_data_have_no_distance(mnist: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pictures(TRAIN, 0))
    report = evaluate(samples=tmp_path / "a.npz", data=mnist, out=tmp_path / "out")
    found = report["metrics"]
    assert found["frechet"]["value"] < 1e-9 < report["held_out"]["metrics"]["frechet"]["value"]
    assert found["precision"]["value"] == found["recall"]["value"] == 1.0


def test_folders_of_pictures_and_held_out_ones(tmp_path: Path) -> None:
    for name, seed in (("real", 0), ("other", 1)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(pictures(25, seed)):
            Image.fromarray(image).resize((40, 36)).save(tmp_path / name / f"{i}.png")
    np.savez(tmp_path / "a.npz", images=np.pad(pictures(25, 2), ((0, 0), (2, 2), (2, 2))))
    report = evaluate(
        samples=tmp_path / "a.npz", data=tmp_path / "real", held_out=tmp_path / "other", out=tmp_path / "out"
    )
    assert report["held_out"]["n"] == 25
    assert report["held_out"]["accuracy"] is None
    alone = evaluate(samples=tmp_path / "a.npz", data=tmp_path / "real", out=tmp_path / "out")
    assert alone["held_out"] is None
    assert alone["metrics"] == report["metrics"]
    assert "held-out" not in table(alone)


def test_inceptions_features_of_colour_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the weights of a file on disk, whatever they are worth; images of their own size and colours."""
    monkeypatch.setattr(inception, "SIZE", 75)  # the smallest that the network takes, for time
    torch.manual_seed(0)
    torch.save(inception.Inception().state_dict(), tmp_path / "weights.pth")
    rng = np.random.default_rng(0)
    np.savez(tmp_path / "real.npz", images=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    np.savez(tmp_path / "made.npz", images=rng.integers(0, 256, (20, 8, 8, 3), dtype=np.uint8))
    report = evaluate(
        samples=tmp_path / "made.npz", data=tmp_path / "real.npz", features_of=tmp_path / "weights.pth",
        out=tmp_path / "out",
    )  # fmt: skip
    stored = next((tmp_path / "out" / "features").glob("*.safetensors"))
    assert load_file(stored)["features"].shape == (20, 2048)
    assert all(np.isfinite(report["metrics"][name]["value"]) for name in NUMBERS)
    assert report["accuracy"] is None


def test_features_are_kept_and_damaged_ones_made_again(mnist: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pictures(30, 2))
    calls = []

    def run() -> dict[str, Any]:
        return evaluate(samples=tmp_path / "a.npz", data=mnist, out=tmp_path / "out")

    first = run()
    files = sorted((tmp_path / "out" / "features").iterdir())
    assert len(files) == 3  # real, made, held-out
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(metrics.Extractor, "__call__", lambda self, x: calls.append(len(x)))
        assert run() == first
    assert calls == []
    files[0].write_bytes(files[0].read_bytes()[:100])
    assert run() == first


def test_what_is_missing_or_does_not_fit_is_named(mnist: Path, model: Path, tmp_path: Path) -> None:
    colour = tmp_path / "colour"
    checkpoints.save_folder(colour, random_unet(TINY_CLASSES), NoiseSchedule("linear", 100, beta_end=0.1))
    np.savez(tmp_path / "few.npz", images=pictures(5, 0))
    (tmp_path / "none").mkdir()

    def run(error: type[Exception], match: str, model: Path | str = model, **options: Any) -> None:
        with pytest.raises(error, match=match):
            evaluate(model, **{"data": mnist, "n": 20, "out": tmp_path / "out", **options})

    run(DataError, f"those that {model} was trained on: give --data", data=None)
    run(DataError, "nowhere", data=tmp_path / "nowhere")
    run(DataError, "few.npz holds 5 images, at least 20", data=tmp_path / "few.npz", fit="pad")
    run(DataError, "few.npz holds 5 images, at least 20", held_out=tmp_path / "few.npz")
    run(DataError, "few.npz holds 5 images, 20 are needed", samples=tmp_path / "few.npz")
    run(DataError, "no image files", samples=tmp_path / "none")
    run(InvalidArgument, "n=19: at least 20", n=19)
    run(InvalidArgument, "fit='stretch' is unknown; allowed: crop, pad", fit="stretch")
    run(InvalidArgument, "steps=0", options={"steps": 0})
    run(InvalidArgument, "judges images of 1x32x32, those of .* are 3x8x8; give the weights of Inception", model=colour)
    run(CheckpointError, r"inception\.pth: no such file; Inception's weights", features_of="inception.pth")
    run(CheckpointError, "no-judge", features_of="no-judge")
    run(CheckpointError, "no-model", model="no-model")
    run(InvalidArgument, "device='nowhere'", device="nowhere")
    assert not (tmp_path / "out").exists()


def test_missing_fashion_mnist_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_images, "DATA", tmp_path / "datasets" / "fashion-mnist")
    with pytest.raises(DataError, match=r"datasets/fashion-mnist is not there.*dataset-fashion-mnist.*--data"):
        evaluate(out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_refusals_in_a_shell(tmp_path: Path) -> None:
    assert "nowhere" in refused(tmp_path, "--data", "nowhere", "--n", 20)
    assert "no such file; Inception's weights" in refused(tmp_path, "--features", "w.pth", "--data", tmp_path)
