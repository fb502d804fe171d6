"""Tar files of images as data sets."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastdiff.data import load_data
from fastdiff.errors import DataError, FastdiffError, InvalidArgument

RNG = np.random.default_rng(0)


def png(pixels: np.ndarray) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def write(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def pictures(n: int, size: int = 8, channels: int = 3) -> list[np.ndarray]:
    shape = (size, size) if channels == 1 else (size, size, channels)
    return [RNG.integers(0, 256, shape, np.uint8) for _ in range(n)]


def test_images_and_classes(tmp_path: Path) -> None:
    images = pictures(3)
    files = {f"{i:03d}.png": png(p) for i, p in enumerate(images)}
    files |= {f"{i:03d}.cls": str(2 - i).encode() + b"\n" for i in range(3)} | {"000.json": b"{}", "README": b"hello"}
    data = load_data(write(tmp_path / "a.tar", files))
    found, labels = data.__getitems__([0, 1, 2])
    assert np.array_equal(found.numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert labels is not None
    assert labels.tolist() == [2, 1, 0]
    assert (data.size, data.channels, data.num_classes) == ((8, 8), 3, 3)
    assert load_data(tmp_path / "a.tar", class_depth=0).num_classes is None
    assert load_data(tmp_path / "a.tar", class_names=["a", "b", "c"]).class_names == ("a", "b", "c")


def test_a_folder_of_shards_in_their_order(tmp_path: Path) -> None:
    images = pictures(4)
    for shard in (1, 0):
        write(tmp_path / f"{shard}.tar", {f"x/{i}.png": png(images[2 * shard + i]) for i in range(2)})
    found, labels = load_data(tmp_path).__getitems__(range(4))
    assert np.array_equal(found.numpy(), np.stack(images).transpose(0, 3, 1, 2))
    assert labels is None


def test_what_generate_writes_is_read(tmp_path: Path) -> None:
    from fastdiff.bulk.shards import tar

    images = pictures(2)
    (tmp_path / "0.tar").write_bytes(tar({f"00000000{i}.png": png(p) for i, p in enumerate(images)}))
    assert len(load_data(tmp_path / "0.tar")) == 2


def test_images_are_fitted_and_converted(tmp_path: Path) -> None:
    files = {
        "large.png": png(pictures(1, 16)[0]), "gray.png": png(pictures(1, 8, 1)[0]),
        "small.png": png(pictures(1, 4)[0]), "clear.png": png(pictures(1, 8, 4)[0]),
        "torn.png": png(pictures(1)[0])[:60], "text.png": b"no image",
    }  # fmt: skip
    path = write(tmp_path / "a.tar", files)
    data = load_data(path, size=8)
    assert (len(data), data.channels) == (3, 3)
    reasons = {file.name: reason for file, reason in data.skipped}
    assert reasons.keys() == {"small", "torn", "text"}
    assert "smaller than 8x8" in reasons["small"]
    black, white = (load_data(path, size=8, alpha=alpha).__getitems__([2])[0] for alpha in ("black", "white"))
    assert (black < white).any()
    assert load_data(path, size=8, channels=1).channels == 1


@pytest.mark.parametrize(
    ("files", "options", "words"),
    [
        ({"a.txt": b"x"}, {}, "no image can be used"),
        ({"a.png": b"x"}, {}, "no image can be used (.apng"),
        ({"a.png": png(pictures(1)[0]), "a.jpg": b"x"}, {}, "the sample a has several images, a.png and a.jpg"),
        ({"a.png": png(pictures(1)[0]), "a.cls": b"cat"}, {}, "a.cls holds 'cat'; a whole number"),
        ({"a.png": png(pictures(1)[0]), "a.cls": b"1", "b.png": png(pictures(1)[0])}, {}, "1 of 2 images have no .cls"),
        ({"a.png": png(pictures(1)[0])}, {"frames": "all"}, "frames='all' is for folders"),
        ({"a.png": png(pictures(1)[0])}, {"class_depth": 2}, "class_depth=2 is for folders"),
        ({"a.png": png(pictures(1)[0])}, {"class_names": ["a"]}, "class_names= needs labels"),
        ({"a.png": png(pictures(1)[0])}, {"layout": "NHWC"}, "is a .tar file"),
    ],
)
def test_what_is_refused(tmp_path: Path, files: dict[str, bytes], options: dict[str, object], words: str) -> None:
    with pytest.raises((DataError, InvalidArgument)) as caught:
        load_data(write(tmp_path / "a.tar", files), **options)  # type: ignore[arg-type]  # wrong on purpose
    assert words in str(caught.value)


def test_damaged_archives_and_other_formats(tmp_path: Path) -> None:
    path = write(tmp_path / "a.tar", {"a.png": png(pictures(1, 64)[0]), "b.png": png(pictures(1, 64)[0])})
    whole = path.read_bytes()
    for length in (600, 5000, len(whole) // 2):
        path.write_bytes(whole[:length])
        with contextlib.suppress(FastdiffError):
            data = load_data(path)
            assert len(data) == 1
            assert data.skipped or "has no mark of its end, so that it may be cut" in data.doubts[0]
