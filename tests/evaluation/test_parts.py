"""Images in parts: what is there is reused, what is missing is drawn, and images of two settings never mix."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from fastdiff.data.pictures import to_uint8
from fastdiff.errors import DataError, InvalidArgument, NumericsError
from fastdiff.evaluation import image_store, metrics
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetConfig
from tests.support.unets import TINY, TINY_CLASSES, change, random_unet

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)


def tiny(config: UNetConfig = TINY_CLASSES, seed: int = 0) -> Sampler:
    torch.manual_seed(seed)
    return Sampler(random_unet(config), SCHEDULE, backend="eager")


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(image_store, "PART", 6)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_images_are_the_samplers(tmp_path: Path) -> None:
    sampler, seen = tiny(), []
    images = image_store.draw(sampler, tmp_path / "a", 15, steps=3, progress=lambda *done: seen.append(done))
    expected = sampler.sample(15, steps=3, labels=[i % 4 for i in range(15)], seed=0).images
    difference = images.permute(0, 2, 3, 1).int() - torch.from_numpy(to_uint8(expected)).int()
    assert images.shape == (15, 3, 8, 8)
    assert images.dtype == torch.uint8
    assert difference.abs().max() <= 1
    assert difference.ne(0).double().mean() < 0.01
    assert seen == [(0, 15), (6, 15), (12, 15), (15, 15)]
    assert names(tmp_path / "a") == ["000000.npz", "000006.npz", "000012.npz", "settings.json"]
    with np.load(tmp_path / "a" / "000006.npz") as file:
        assert file["images"].shape == (6, 8, 8, 3)
    torch.testing.assert_close(image_store.load(tmp_path / "a"), images, rtol=0, atol=0)


def test_gray_images_and_other_labels(tmp_path: Path) -> None:
    gray = tiny(change(TINY_CLASSES, in_channels=1, out_channels=1))
    for labels, expected in (("cycle", [0, 1]), (2, [2, 2]), (None, None)):
        folder = tmp_path / str(labels)
        images = image_store.draw(gray, folder, 2, steps=2, labels=labels)
        with np.load(folder / "000000.npz") as file:
            assert file["images"].shape == (2, 8, 8)
        wanted = torch.from_numpy(to_uint8(gray.sample(2, steps=2, labels=expected).images)).permute(0, 3, 1, 2)
        torch.testing.assert_close(images, wanted, rtol=0, atol=0)
    plain = image_store.draw(tiny(TINY), tmp_path / "plain", 2, steps=2)  # no classes: nothing to take turns
    assert plain.shape == (2, 3, 8, 8)


def test_what_is_there_is_reused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, drawn = tiny(), []
    sample = Sampler.sample

    def counted(self, n, **options):
        drawn.append((options["start_index"], n))
        return sample(self, n, **options)

    monkeypatch.setattr(Sampler, "sample", counted)
    whole = image_store.draw(sampler, tmp_path / "whole", 20, steps=2)
    assert drawn == [(0, 6), (6, 6), (12, 6), (18, 2)]
    drawn.clear()
    for n, new in ((8, [(0, 6), (6, 2)]), (5, []), (8, []), (20, [(8, 4), (12, 6), (18, 2)]), (20, [])):
        images = image_store.draw(sampler, tmp_path / "grown", n, steps=2)
        assert drawn == new
        drawn.clear()
        assert (images.int() - whole[:n].int()).abs().max() <= 1
    (tmp_path / "grown" / "000006.npz").unlink()
    image_store.draw(sampler, tmp_path / "grown", 20, steps=2, batch_size=3)  # batches change rounding alone
    assert drawn == [(6, 6)]


def test_an_interruption_costs_one_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sampler, sample, calls = tiny(), Sampler.sample, []

    def interrupted(self, n, **options):
        calls.append(n)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return sample(self, n, **options)

    monkeypatch.setattr(Sampler, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        image_store.draw(sampler, tmp_path, 20, steps=2)
    assert names(tmp_path) == ["000000.npz", "000006.npz", "settings.json"]
    before = (tmp_path / "000006.npz").stat().st_mtime_ns
    images = image_store.draw(sampler, tmp_path, 20, steps=2)
    assert len(calls) == 3 + 2
    assert (tmp_path / "000006.npz").stat().st_mtime_ns == before
    assert len(images) == 20


def test_images_of_two_models_never_mix(tmp_path: Path) -> None:
    sampler = tiny()
    image_store.draw(sampler, tmp_path, 2, steps=2)
    before = (tmp_path / "000000.npz").read_bytes()
    with torch.no_grad():
        weight = next(sampler.unet.parameters()).flatten()[:1]
        weight.copy_(torch.nextafter(weight, weight + 1))  # one bit
    with pytest.raises(DataError, match=r"other settings \(model '[0-9a-f]{64}', not '[0-9a-f]{64}'\)"):
        image_store.draw(sampler, tmp_path, 4, steps=2)
    assert (tmp_path / "000000.npz").read_bytes() == before


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"steps": 3}, "nfe 2, not 3"),
        ({"seed": 1}, "seed 0, not 1"),
        ({"labels": 3}, "labels 'cycle', not 3"),
        ({"guidance": 2.0}, "guidance 1.0, not 2.0"),
        ({"solver": "ddpm"}, "solver 'ddim', not 'ddpm'"),
        ({"eta": 0.5}, "table"),
        ({"spacing": "leading"}, "table"),
        ({"clip": None}, "table"),
        ({"size": 16}, r"shape \[3, 8, 8\], not \[3, 16, 16\]"),
    ],
    ids=str,
)
def test_other_settings_are_refused(changes: dict, word: str, tmp_path: Path) -> None:
    sampler = tiny()
    image_store.draw(sampler, tmp_path, 2, steps=2)
    with pytest.raises(DataError, match=word):
        image_store.draw(sampler, tmp_path, 2, **{"steps": 2, **changes})
    assert len(image_store.draw(sampler, tmp_path, 2, steps=2, solver="ddim", eta=0.0, spacing=None)) == 2


def test_another_dtype_or_backend_is_another_setting(tmp_path: Path) -> None:
    image_store.draw(tiny(), tmp_path, 2, steps=2)
    torch.manual_seed(0)
    half = Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend="eager", dtype="bfloat16")
    with pytest.raises(DataError, match="dtype 'float32', not 'bfloat16'"):
        image_store.draw(half, tmp_path, 2, steps=2)


def test_folders_without_usable_settings(tmp_path: Path) -> None:
    sampler = tiny()
    image_store.draw(sampler, tmp_path, 2, steps=2)
    settings = tmp_path / "settings.json"
    known = json.loads(settings.read_text())
    settings.unlink()
    with pytest.raises(DataError, match=r"no settings\.json"):
        image_store.draw(sampler, tmp_path, 2, steps=2)
    image_store.check_settings(tmp_path / "elsewhere", known)
    settings.write_text((tmp_path / "elsewhere" / "settings.json").read_text())
    assert len(image_store.draw(sampler, tmp_path, 2, steps=2)) == 2
    settings.write_text("{")
    with pytest.raises(DataError, match="not valid JSON"):
        image_store.draw(sampler, tmp_path, 2, steps=2)


def test_damaged_parts_are_drawn_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    sampler = tiny()
    images = image_store.draw(sampler, tmp_path, 8, steps=2)
    path = tmp_path / "000006.npz"
    path.write_bytes(path.read_bytes()[:50])
    with caplog.at_level(logging.WARNING, "fastdiff"):
        again = image_store.draw(sampler, tmp_path, 8, steps=2)
    assert "000006.npz" in caplog.text
    assert torch.equal(images, again)
    np.savez(path, images=np.array([{"a": 1}], dtype=object))  # a pickle: not loaded
    assert torch.equal(image_store.draw(sampler, tmp_path, 8, steps=2), images)


def test_images_that_became_nan_are_not_kept(tmp_path: Path) -> None:
    sampler = tiny()
    with torch.no_grad():
        next(sampler.unet.parameters()).fill_(math.nan)
    with pytest.raises(NumericsError):
        image_store.draw(sampler, tmp_path, 2, steps=2)
    assert names(tmp_path) == ["settings.json"]


def test_bad_arguments(tmp_path: Path) -> None:
    sampler = tiny()
    for n in (0, True, 2.0):
        with pytest.raises(InvalidArgument, match=f"n={n}"):
            image_store.draw(sampler, tmp_path, n)
    for options, word in (
        ({"noise": torch.zeros(2, 3, 8, 8)}, "noise="),
        ({"image": torch.zeros(3, 8, 8)}, "image="),
        ({"guide": lambda x, i: x.sum()}, "guide="),
        ({"start_index": 5}, "start_index="),
        ({"labels": "all"}, "labels='all'"),
        ({"colour": 1}, "no option colour"),
        ({"steps": 0}, "steps"),
    ):
        with pytest.raises(InvalidArgument, match=word):
            image_store.draw(sampler, tmp_path, 2, **options)
    with pytest.raises(InvalidArgument, match="2 channels"):
        image_store.draw(tiny(change(TINY, in_channels=2, out_channels=2)), tmp_path, 2)
    assert list(tmp_path.iterdir()) == []


def test_load_says_what_is_missing(tmp_path: Path) -> None:
    image_store.draw(tiny(), tmp_path, 14, steps=1)
    assert len(image_store.load(tmp_path, 13)) == 13
    with pytest.raises(DataError, match=r"holds 14 images.*15 are needed"):
        image_store.load(tmp_path, 15)
    (tmp_path / "000006.npz").unlink()
    assert len(image_store.load(tmp_path)) == 6  # without a gap
    with pytest.raises(DataError, match="holds 6 images"):
        image_store.load(tmp_path, 13)
    with pytest.raises(DataError, match="holds 0 images"):
        image_store.load(tmp_path / "nowhere")


def test_the_interval_of_a_distance_that_is_rounding() -> None:
    """Check that the distance of equal sets, which is rounding, has no interval of 600 orders of magnitude."""
    x = torch.randn(200, 16, generator=torch.Generator().manual_seed(0))
    for factor in (1e-3, 1.0, 1e3):
        estimate = metrics.frechet_interval(factor * x, metrics.Reference(factor * x))
        assert estimate.value == estimate.low == 0.0
        assert 0.0 < estimate.high < factor**2
    apart = metrics.frechet_interval(x, metrics.Reference(x + 0.1))
    assert 0.0 < apart.low < apart.value < apart.high < 10.0
