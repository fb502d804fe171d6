"""Other projects' readers read what a job and its exports hold, gray and in colour, with the classes.

WebDataset is the real library. clean-fid and torch-fidelity need torchvision, and Hugging Face's datasets needs Arrow,
so functions here read as theirs do; `tests/bulk/test_verify_export.py` has that of ADM's evaluator.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from torch.utils.data import DataLoader

from fastdiff import bulk
from tests.bulk.jobs import N, draw, tiny
from tests.bulk.test_verify_export import pixels_of
from tests.support.unets import change

LABELS = [i % 4 for i in range(N)]


@pytest.fixture(scope="module", params=["gray", "colour"])
def folders(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make a job of each format with pictures, and the exports of one of arrays."""
    root = tmp_path_factory.mktemp(request.param)
    if request.param == "colour":
        sampler = tiny()
    else:
        sampler = tiny(change(in_channels=1, out_channels=1, num_class_embeds=5, null_label=4))
    for format in ("npz", "png", "webdataset", "imagefolder"):
        draw(sampler, root / format, format=format)
    bulk.export(root / "npz", folder=root / "folder", webdataset=root / "tars")
    shards = {format: root / format / "shards" for format in ("png", "webdataset", "imagefolder")}
    return {"job": root / "npz", "folder": root / "folder", "tars": root / "tars", **shards}


def rgb(folders: dict[str, Path]) -> np.ndarray:
    """Return the images as readers that convert to RGB see them, [N, H, W, 3]."""
    pixels = pixels_of(folders["job"])
    return np.repeat(pixels, 3 // pixels.shape[-1], axis=3)


@pytest.mark.parametrize("where", ["webdataset", "tars"])
def test_webdatasets_own_library(folders: dict[str, Path], where: str) -> None:
    urls = f"{folders[where]}/{{000000..000003}}.tar"
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple("__key__", "png", "cls", "json")
    keys, images, classes, facts = zip(*data, strict=True)
    assert [int(key) for key in keys] == list(range(N))
    np.testing.assert_array_equal(np.stack(images), rgb(folders))
    assert list(classes) == LABELS
    assert facts[6] == {"index": 6, "seed": 0, "label": 2, "class_name": "c"}


def test_webdataset_in_workers_of_a_loader(folders: dict[str, Path]) -> None:
    """Each worker reads its own tars, so that every image comes once; batches have arrays of labels."""
    urls = f"{folders['tars']}/{{000000..000003}}.tar"
    data = webdataset.WebDataset(urls, shardshuffle=False).decode("torchrgb8").to_tuple("png", "cls", "json").batched(3)
    seen: dict[int, tuple[np.ndarray, int]] = {}
    for images, classes, facts in DataLoader(data, batch_size=None, num_workers=2):
        for image, label, fact in zip(images, classes, facts, strict=True):
            assert fact["index"] not in seen
            seen[fact["index"]] = image.permute(1, 2, 0).numpy(), int(label)
    np.testing.assert_array_equal(np.stack([seen[i][0] for i in range(N)]), rgb(folders))
    assert [seen[i][1] for i in range(N)] == LABELS


def clean_fid(folder: Path) -> list[np.ndarray]:
    """Read as `cleanfid.fid.get_folder_features` does: files of its endings at any depth, sorted, as RGB."""
    endings = {"bmp", "jpg", "jpeg", "pgm", "png", "ppm", "tif", "tiff", "webp", "npy", "JPEG", "JPG", "PNG"}
    files = sorted(str(path) for ending in endings for path in folder.glob(f"**/*.{ending}"))
    return [np.array(Image.open(path).convert("RGB")) for path in files]


def torch_fidelity(folder: Path, deep: bool) -> list[np.ndarray]:
    """Read as `torch_fidelity.utils.glob_samples_paths` and `ImagesPathDataset` do."""
    files = []
    for place, _, names in os.walk(folder):
        if not deep and os.path.realpath(place) != os.path.realpath(folder):
            continue
        endings = [name for name in names if os.path.splitext(name)[1].lower().lstrip(".") in ("png", "jpg", "jpeg")]
        files += [os.path.realpath(os.path.join(place, name)) for name in endings]
    return [np.array(Image.open(path).convert("RGB")) for path in sorted(files)]


def edm(folder: Path) -> list[np.ndarray]:
    """Read as `training.dataset.ImageFolderDataset` of EDM does, whose `fid.py` makes three channels of a gray one."""
    Image.init()
    found = [os.path.join(place, name) for place, _, names in os.walk(folder) for name in names]
    names = sorted({os.path.relpath(path, folder) for path in found})
    images = []
    for name in (name for name in names if os.path.splitext(name)[1].lower() in Image.EXTENSION):
        with open(folder / name, "rb") as file:
            image = np.array(Image.open(file))
        images.append(np.repeat(image[:, :, None], 3, axis=2) if image.ndim == 2 else image)
    return images


@pytest.mark.parametrize("where", ["folder", "png", "imagefolder"])
@pytest.mark.parametrize("reader", [clean_fid, lambda folder: torch_fidelity(folder, True), edm])
def test_readers_of_folders(folders: dict[str, Path], where: str, reader: Any) -> None:
    np.testing.assert_array_equal(np.stack(reader(folders[where])), rgb(folders))


def test_torch_fidelity_without_its_deep_search(folders: dict[str, Path]) -> None:
    np.testing.assert_array_equal(np.stack(torch_fidelity(folders["folder"], False)), rgb(folders))
    assert torch_fidelity(folders["png"], False) == []


def imagefolder(folder: Path) -> list[dict[str, Any]]:
    """Read as datasets' imagefolder documents it: for each image, the line of the metadata that is nearest to it."""
    rows = []
    for path in sorted(folder.rglob("*.png")):
        metadata = next(p / "metadata.jsonl" for p in path.parents if (p / "metadata.jsonl").is_file())
        lines = [json.loads(line) for line in metadata.read_text(encoding="utf-8").splitlines()]
        (row,) = [line for line in lines if metadata.parent / line.pop("file_name") == path]
        assert {*map(frozenset, lines)} == {frozenset(row)}  # the columns of all images are the same
        rows.append({"image": np.array(Image.open(path).convert("RGB")), **row})
    return rows


@pytest.mark.parametrize("where", ["folder", "imagefolder"])
def test_imagefolder(folders: dict[str, Path], where: str) -> None:
    rows = imagefolder(folders[where])
    np.testing.assert_array_equal(np.stack([row["image"] for row in rows]), rgb(folders))
    assert [row["index"] for row in rows] == list(range(N))
    assert [row["label"] for row in rows] == LABELS
    assert {row["class_name"] for row in rows} == set("abcd")
