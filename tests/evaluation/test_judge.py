"""`evaluate` says what judges what, and refuses what does not fit: colour as gray, labels of another data set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import checkpoints
from fastdiff.errors import DataError, InvalidArgument
from fastdiff.evaluation import evaluate, inception
from fastdiff.evaluation.classifier import CLASS_NAMES
from fastdiff.schedule import NoiseSchedule
from tests.evaluation.test_eval import shell
from tests.support.mnist import pictures
from tests.support.unets import TINY_CLASSES, change, random_unet

COLOUR = np.random.default_rng(0).integers(0, 256, (30, 32, 32, 3), dtype=np.uint8)


def judged(path: Path, mnist: Path, **options: Any) -> dict[str, Any]:
    return evaluate(samples=path, data=mnist, out=path.parent / "out", **options)


def model(path: Path, names: Any) -> Path:
    torch.manual_seed(0)
    config = change(TINY_CLASSES, sample_size=32, in_channels=1, out_channels=1, num_class_embeds=11, null_label=10)
    checkpoints.save_folder(path, random_unet(config), NoiseSchedule("linear", 100, beta_end=0.1), class_names=names)
    return path


def test_colour_is_not_judged_as_gray(tmp_path: Path, mnist: Path) -> None:
    np.savez(tmp_path / "a.npz", images=COLOUR)
    (tmp_path / "b").mkdir()
    for i, image in enumerate(COLOUR):
        Image.fromarray(image).save(tmp_path / "b" / f"{i}.png")
    for name in ("a.npz", "b"):
        with pytest.raises(DataError, match=rf"{name} holds colour images, and gray ones are compared; .*channels=1"):
            judged(tmp_path / name, mnist)
        assert not (tmp_path / "out").exists()
    assert judged(tmp_path / "a.npz", mnist, data_options={"channels": 1})["n"] == 30


def test_colour_data_for_a_gray_model(tmp_path: Path) -> None:
    np.savez(tmp_path / "real.npz", images=COLOUR)
    for options in ({"data": tmp_path / "real.npz"}, {"held_out": tmp_path / "real.npz"}):
        np.savez(tmp_path / "gray.npz", images=COLOUR[..., 0])
        with pytest.raises(DataError, match=r"real\.npz holds colour images, and gray ones are compared"):
            evaluate("fashion-mnist", n=20, out=tmp_path / "out", **{"data": tmp_path / "gray.npz", **options})


def test_gray_data_for_colour_samples(tmp_path: Path, mnist: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inception, "SIZE", 75)
    torch.manual_seed(0)
    torch.save(inception.Inception().state_dict(), tmp_path / "weights.pth")
    np.savez(tmp_path / "made.npz", images=COLOUR[:20])
    with pytest.raises(DataError, match=r"holds gray images, and colour ones are compared; .*channels=3"):
        judged(tmp_path / "made.npz", mnist, features_of=tmp_path / "weights.pth")
    with pytest.raises(InvalidArgument, match=r"labels_of='fashion-mnist': .* has no classes"):
        judged(tmp_path / "made.npz", mnist, features_of=tmp_path / "weights.pth", labels_of="fashion-mnist")


def test_gray_that_is_stored_as_colour_is_gray(tmp_path: Path, mnist: Path) -> None:
    gray = np.pad(pictures(30, 2), ((0, 0), (2, 2), (2, 2)))
    np.savez(tmp_path / "a.npz", images=gray)
    np.savez(tmp_path / "b.npz", images=np.repeat(gray[..., None], 3, axis=3))
    assert judged(tmp_path / "a.npz", mnist)["metrics"] == judged(tmp_path / "b.npz", mnist)["metrics"]


@pytest.mark.parametrize("names", [None, [str(i) for i in range(10)], list(reversed(CLASS_NAMES))], ids=str)
def test_labels_of_another_data_set_have_no_accuracy(tmp_path: Path, mnist: Path, names: Any) -> None:
    extra = {} if names is None else {"class_names": names}
    np.savez(tmp_path / "a.npz", images=pictures(30, 2), labels=np.arange(30) % 10, **extra)
    report = judged(tmp_path / "a.npz", mnist)
    assert (report["accuracy"], report["held_out"]["accuracy"]) == (None, None)
    assert len(report["summary"]["warnings"]) == 1
    for words in ("a.npz is of the judge's data set, Fashion-MNIST: there is no", 'labels_of="fashion-mnist"'):
        assert words in report["summary"]["warnings"][0]
    accepted = judged(tmp_path / "a.npz", mnist, labels_of="fashion-mnist")
    assert (accepted["accuracy"] is None) == (names is not None)  # names count more than what the caller says
    with pytest.raises(InvalidArgument, match=r"labels_of='cifar': .* judges its own classes alone"):
        judged(tmp_path / "a.npz", mnist, labels_of="cifar")


def test_more_classes_than_the_judge_has(tmp_path: Path, mnist: Path) -> None:
    np.savez(tmp_path / "a.npz", images=pictures(30, 2), labels=np.arange(30) % 12)
    assert judged(tmp_path / "a.npz", mnist, labels_of="fashion-mnist")["accuracy"] is None


def test_a_model_of_other_classes_has_no_accuracy(tmp_path: Path, mnist: Path) -> None:
    options: dict[str, Any] = {"n": 20, "data": mnist, "out": tmp_path / "out", "options": {"steps": 1}}
    digits = evaluate(model(tmp_path / "digits", [str(i) for i in range(10)]), **options)
    unnamed = evaluate(model(tmp_path / "unnamed", None), **options)
    clothes = evaluate(model(tmp_path / "clothes", CLASS_NAMES), **options)
    accepted = evaluate(tmp_path / "unnamed", labels_of="fashion-mnist", **options)
    assert [r["accuracy"] is None for r in (digits, unnamed, clothes, accepted)] == [True, True, False, False]
    assert digits["metrics"] == clothes["metrics"]
    assert "digits is of the judge's data set" in digits["summary"]["warnings"][0]
    (misread,) = clothes["summary"]["warnings"]  # the images are noise
    assert "of the held-out images as their class: they may be of another data set" in misread


@pytest.mark.slow
def test_the_summary_in_a_shell(tmp_path: Path, mnist: Path) -> None:
    network = model(tmp_path / "digits", [str(i) for i in range(10)])
    result = shell(tmp_path, network, "--n", 20, "--steps", 1, "--data", mnist, "--json")
    assert result.returncode == 0, result.stderr
    report = json.loads(result.stdout)
    first = result.stderr.split("images: 0 of 20")[0]
    for words in (
        "parameters, 10 classes: 0, 1, 2,", "20 of [1, 32, 32], ddim, 1 network evaluations each", "cpu, native",
        "train-images-idx3-ubyte.gz: 40 images, 32x32, gray (28x28, fitted by pad)", "t10k-images-idx3-ubyte.gz: 30",
        "uint8: 0 to 25", "judge       fashion-mnist: a classifier of Fashion-MNIST, for gray images of 32x32: T-shirt",
        "WARNING     nothing says that", "--labels-of fashion-mnist", "--features takes", "to draw",
    ):  # fmt: skip
        assert words in first, (words, first)
    assert report["summary"]["judge"]["classes"] == list(CLASS_NAMES)
    assert report["summary"]["real"]["images"] == 40
    np.savez(tmp_path / "a.npz", images=COLOUR)
    refused = shell(tmp_path, "--samples", "a.npz", "--data", mnist)
    assert refused.returncode == 2
    assert (
        "error: a.npz holds colour images, and gray ones are compared; give others, or --image-channels 1"
        in refused.stderr
    )


def test_damaged_files_do_not_stand_for_others(tmp_path: Path, mnist: Path) -> None:
    (tmp_path / "made").mkdir()
    for i, image in enumerate(pictures(30, 2)):
        Image.fromarray(image).save(tmp_path / "made" / f"{i:02}.png")
    torn = tmp_path / "made" / "07.png"
    torn.write_bytes(torn.read_bytes()[:-30])
    report = judged(tmp_path / "made", mnist)
    assert report["n"] == 29
    assert report["summary"]["samples"]["skipped_files"][0]["file"] == str(torn)


def test_doubtful_samples_are_in_the_summary(tmp_path: Path, mnist: Path) -> None:
    (tmp_path / "made").mkdir()
    for i, image in enumerate(pictures(30, 2)):
        Image.fromarray(image.astype(np.uint16) * 16).save(tmp_path / "made" / f"{i:02}.png")
    report = judged(tmp_path / "made", mnist)
    assert any(
        "16-bit values reach 40" in text and "value_range=(0, 4095)" in text for text in report["summary"]["warnings"]
    )
    scaled = judged(tmp_path / "made", mnist, data_options={"value_range": (0, 4095)})
    assert scaled["metrics"] != report["metrics"]
    with pytest.raises(InvalidArgument, match="data_options: 'size' is unknown"):
        judged(tmp_path / "made", mnist, data_options={"size": 3})
