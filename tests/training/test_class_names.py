"""Exported metadata is what was trained: names of classes and the size of samples; names are accepted as labels."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from fastdiff import checkpoints
from fastdiff.checkpoints.convert import convert
from fastdiff.cli.options import read_labels
from fastdiff.errors import ConfigError, InvalidArgument, TrainingError
from fastdiff.evaluation.classifier import CLASS_NAMES
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from tests.training.toys import Toys, rewrite, toy_trainer, toy_unet

NAMES = ("cat", "dog", "T-shirt/top")


class Named(Toys):
    class_names = NAMES

    def __init__(self, names: tuple[str, ...] | None = NAMES, **options: Any):
        super().__init__(**options)
        self.class_names = names


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("named") / "run"
    toy_trainer(out, data=Named(), steps=2).fit()
    return out


def test_names_are_saved_in_every_format(run: Path, tmp_path: Path) -> None:
    convert(run / "model", tmp_path / "one.safetensors")
    convert(tmp_path / "one.safetensors", tmp_path / "folder")
    convert(run / "checkpoint.safetensors", tmp_path / "two.safetensors")
    models = [
        run / "model", run / "model" / "unet", run / "checkpoint.safetensors",
        *(tmp_path / name for name in ("one.safetensors", "two.safetensors", "folder")),
    ]  # fmt: skip
    for model in models:
        assert checkpoints.load(model).class_names == NAMES, model
        schedule = NoiseSchedule() if model.name == "unet" else None  # the folder unet/ contains no scheduler
        assert Sampler.from_pretrained(model, device="cpu", schedule=schedule).info.class_names == NAMES


def test_diffusers_ignores_the_names(run: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The folder loads, and diffusers has nothing more to say about it than about one without names."""
    caplog.set_level(logging.INFO)
    assert UNet2DModel.from_pretrained(run / "model" / "unet").config.num_class_embeds == 4
    pipeline = DDPMPipeline.from_pretrained(run / "model")
    assert pipeline.unet.config.sample_size == 8
    assert "class_names" not in caplog.text
    assert json.loads((run / "model" / "unet" / "config.json").read_text())["_class_names"] == list(NAMES)


def test_names_are_labels(run: Path) -> None:
    sampler = Sampler.from_pretrained(run / "model", device="cpu")

    def labels(given: Any, n: int = 3) -> list[int]:
        chosen = sampler.request(n, labels=given, steps=1).labels
        assert chosen is not None
        return chosen.tolist()

    assert labels("dog") == [1, 1, 1]
    assert labels(["T-shirt/top", 0, "dog"]) == [2, 0, 1]
    assert labels(("dog", np.str_("cat"), np.int64(2))) == [1, 0, 2]
    for unknown, words in (
        ("dgo", "label 'dgo' is unknown; the model's classes are dog"),
        (["cat", "Dog", 1], "label 'Dog' is unknown; the model's classes are dog"),
        ("zebra", "label 'zebra' is unknown; the model's classes are cat, dog, T-shirt/top"),
        ("1", "label '1' is unknown"),
        ("", "label '' is unknown"),
    ):
        with pytest.raises(InvalidArgument, match=words):
            labels(unknown)
    with pytest.raises(InvalidArgument, match="labels='cat': one whole number"):
        Sampler(toy_unet()).request(1, labels="cat", steps=1)
    with pytest.raises(InvalidArgument, match="labels="):
        labels(["cat", None, 1])


def test_images_are_those_of_the_number(run: Path, tmp_path: Path) -> None:
    sampler = Sampler.from_pretrained(run / "model", device="cpu")
    named = sampler.sample(2, labels=["dog", "cat"], steps=2)
    assert torch.equal(named.images, sampler.sample(2, labels=[1, 0], steps=2).images)
    named.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert (arrays["labels"].tolist(), arrays["class_names"].tolist()) == ([1, 0], list(NAMES))
    sampler.sample(1, steps=1).save(tmp_path / "b.npz")  # of the null class, which has no name
    assert "class_names" not in np.load(tmp_path / "b.npz", allow_pickle=False)


def test_labels_of_the_command_line() -> None:
    def read(text: str, *names: str) -> list[int]:
        info = Sampler(toy_unet(), class_names=names or None).info
        return read_labels(text, info)

    assert read("dog, 2,cat,T-shirt/top", *NAMES) == [1, 2, 0, 2]
    assert read("2,#1") == [2, 1]
    assert read("0,2", "0", "1", "2") == [0, 2]
    assert read("#1,#0", "1", "10", "2") == [1, 0]
    for text, place in (("1", 0), ("10", 1), ("2", 2)):
        if int(text) == place:
            assert read(text, "1", "10", "2") == [place]
            continue
        with pytest.raises(
            InvalidArgument, match=rf"--labels {text}: is it the class named {text}, #{place}, or .* #{text}"
        ):
            read(text, "1", "10", "2")
    with pytest.raises(InvalidArgument, match="--labels cat: whole numbers"):
        read("cat")


@pytest.mark.parametrize("names", ["cat", 3, [1], (None,), b"ab"])
def test_names_that_are_no_strings(names: Any) -> None:
    with pytest.raises(InvalidArgument, match="class_names="):
        Sampler(toy_unet(), class_names=names)


@pytest.mark.parametrize("names", ["cat", {"0": "cat"}, [1, 2], ["a", "a"], [""], ["a", "b", "c", "d"], ["x" * 2000]])
def test_damaged_names_are_refused(run: Path, tmp_path: Path, names: Any) -> None:
    convert(run / "model", tmp_path / "model")
    path = tmp_path / "model" / "unet" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"_class_names": names}))
    with pytest.raises(ConfigError, match=r"config\.json: .*names"):
        checkpoints.load(tmp_path / "model")
    convert(run / "model", tmp_path / "a.safetensors")
    rewrite(tmp_path / "a.safetensors", lambda tensors, info: info.update(class_names=names))
    with pytest.raises(ConfigError, match=r"a\.safetensors: .*names"):
        checkpoints.load(tmp_path / "a.safetensors")


def test_other_names_or_options_are_no_resumed_run(tmp_path: Path) -> None:
    toy_trainer(tmp_path, data=Named(), steps=2).fit()
    for names in (("dog", "cat", "T-shirt/top"), None):
        with pytest.raises(TrainingError, match=r"written with other settings \(class_names\)"):
            toy_trainer(tmp_path, data=Named(names), steps=4).fit()
    other = Named()
    other.options = {"fit": "crop", "value_range": [0.0, 4095.0]}
    with pytest.raises(TrainingError, match=r"written with other settings \(data\)"):
        toy_trainer(tmp_path, data=other, steps=4).fit()

    def older(tensors: Any, info: dict[str, Any]) -> None:
        info.pop("class_names")
        info["data"].pop("options")
        info["unet"]["sample_size"] = None

    rewrite(tmp_path / "checkpoint.safetensors", older)  # as the first version wrote it
    toy_trainer(tmp_path, data=other, steps=3).fit()


def test_networks_without_classes_have_no_names(tmp_path: Path) -> None:
    unet = toy_unet(num_class_embeds=None, null_label=None)
    toy_trainer(tmp_path, unet=unet, data=Named(), steps=1).fit()
    assert checkpoints.load(tmp_path / "model").class_names is None


@pytest.mark.parametrize(("size", "made_for", "exported"), [((8, 8), 64, 8), ((8, 6), 8, (8, 6)), ((6, 6), None, 6)])
def test_the_size_is_that_of_the_images(tmp_path: Path, size: tuple[int, int], made_for: Any, exported: Any) -> None:
    toy_trainer(tmp_path, unet=toy_unet(sample_size=made_for), data=Toys(size=size), steps=1).fit()
    for model in ("model", "checkpoint.safetensors"):
        assert checkpoints.load(tmp_path / model).unet.config.sample_size == exported
    assert Sampler.from_pretrained(tmp_path / "model", device="cpu").sample(1, steps=1).images.shape[2:] == size


def test_the_built_in_model_has_names() -> None:
    sampler = Sampler.from_pretrained("fashion-mnist", device="cpu")
    assert sampler.info.class_names == CLASS_NAMES
    chosen = sampler.request(2, labels=["Ankle boot", "Bag"], steps=1).labels
    assert chosen is not None
    assert chosen.tolist() == [9, 8]
    assert sampler.measurements() is not None  # its fingerprint does not depend on the names
