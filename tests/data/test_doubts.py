"""Data that is altered, left out or read in one of several ways is named, with the argument that settles it."""

from __future__ import annotations

import itertools
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, ImageFile

from fastdiff.data.datasets import load_data
from fastdiff.errors import DataError, InvalidArgument, printable
from tests.data.test_data import idx, random_pixels, write_png

SEEDS = itertools.count()


def pictures(folder: Path, n: int = 3, size: tuple[int, int] = (8, 8)) -> None:
    """Write colour images, no two of which are the same."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(n):
        Image.fromarray(random_pixels(*size, 3, seed=next(SEEDS))).save(folder / f"{i}.png")


def doubt(path: Path, caplog: pytest.LogCaptureFixture, *words: str, **options: Any) -> Any:
    """Open data that must be doubtful in exactly one way, which the log names with all of ``words``."""
    caplog.clear()
    data = load_data(path, **options)
    assert len(data.doubts) == 1, data.doubts
    assert all(word in data.doubts[0] for word in words), data.doubts
    assert data.doubts[0] in caplog.text
    return data


def settled(path: Path, caplog: pytest.LogCaptureFixture, **options: Any) -> Any:
    """Open data about which nothing may be doubtful."""
    caplog.clear()
    data = load_data(path, **options)
    assert data.doubts == ()
    assert not caplog.records, caplog.text
    return data


def values(data: Any, at: int = 0) -> list[int]:
    return sorted(data.__getitems__([at])[0].unique().tolist())


# Pages and frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.tif", "a.gif", "a.webp", "a.png", "a.apng"])
def test_pages_and_frames(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str) -> None:
    pages = [Image.fromarray(np.full((8, 8), 40 * (i + 1), np.uint8)) for i in range(5)]
    extra = {"lossless": True} if name == "a.webp" else {}
    form = "PNG" if name == "a.apng" else None
    pages[0].save(tmp_path / name, form, save_all=True, append_images=pages[1:], **extra)
    first = doubt(tmp_path, caplog, "1 of 1 files", f"{name}: 5", 'frames="all"', 'frames="first"', channels=1)
    assert (len(first), values(first)) == (1, [40])
    assert values(settled(tmp_path, caplog, channels=1, frames="first")) == [40]
    every = settled(tmp_path, caplog, channels=1, frames="all")
    assert [values(every, i) for i in range(len(every))] == [[40], [80], [120], [160], [200]]
    assert every.files == (tmp_path / name,) * 5


def test_pages_of_other_sizes_and_classes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "b").mkdir()
    pictures(tmp_path / "a", 1)
    pages = [Image.new("RGB", size, (200, 9, 9)) for size in ((8, 8), (6, 9), (4, 4))]
    pages[0].save(tmp_path / "b" / "stack.tif", save_all=True, append_images=pages[1:])
    with pytest.raises(DataError, match="several sizes"):
        load_data(tmp_path, frames="all")
    data = load_data(tmp_path, frames="all", size=6)
    assert data.labels.tolist() == [0, 1, 1]
    assert "it is 4x4: smaller than 6x6" in caplog.text


# Values ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "bits"), [("a.png", 12), ("a.tif", 12), ("a.png", 10), ("a.tif", 14)])
def test_fewer_bits_in_16_bit_files(tmp_path: Path, caplog: pytest.LogCaptureFixture, name: str, bits: int) -> None:
    most = 2**bits - 1
    Image.fromarray(np.array([[0, most // 2, most]], np.uint16)).save(tmp_path / name)
    doubt(tmp_path, caplog, f"16-bit values reach {most} of 65535", f"value_range=(0, {most})", "(0, 65535)")
    assert values(settled(tmp_path, caplog, value_range=(0, most))) == [0, 127, 255]
    settled(tmp_path, caplog, value_range=(0, 65535))
    with pytest.raises(DataError, match=rf"values 0 to {most} go beyond value_range=0 to {most // 2}"):
        load_data(tmp_path, value_range=(0, most // 2))


def test_the_depth_of_16_bit_colour_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_png(tmp_path / "a.png", 2, 1, 16, 2, [np.array([[300, 4000, 4095], [0, 7, 2000]], ">u2").tobytes()])
    doubt(tmp_path, caplog, "16-bit colour reaches 3855 of 65535", "convert the files to 8 bits")
    with pytest.raises(DataError, match=r"16-bit colour, .* value_range= does not apply"):
        load_data(tmp_path, value_range=(0, 4095))


def test_masks_in_8_bit_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(np.array([[0, 1, 1]], np.uint8)).save(tmp_path / "a.png")
    doubt(tmp_path, caplog, "8-bit values reach 1 of 255", "value_range=(0, 1)", "(0, 255) accepts")
    assert values(settled(tmp_path, caplog, value_range=(0, 1))) == [0, 255]
    settled(tmp_path, caplog, value_range=(0, 255))


def test_declared_ranges_of_float_and_32_bit_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(np.array([[-1.0, 0.0, 1.0]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif: floating-point pixels, whose range is unknown; value_range="):
        load_data(tmp_path)
    assert values(settled(tmp_path, caplog, value_range=(-1, 1))) == [0, 128, 255]
    with pytest.raises(DataError, match="values -1 to 1 go beyond value_range=0 to 1"):
        load_data(tmp_path, value_range=(0, 1))
    Image.fromarray(np.array([[np.nan, 0.0]], np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match="NaN or infinite values"):
        load_data(tmp_path, value_range=(0, 1))
    Image.fromarray(np.array([[-1000, 0, 1000]], np.int32)).save(tmp_path / "a.tif")
    assert values(settled(tmp_path, caplog, value_range=(-1000, 1000))) == [0, 128, 255]


def test_alpha_is_not_scaled(tmp_path: Path) -> None:
    Image.fromarray(np.array([[[1, 0, 1, 255], [1, 1, 1, 0]]], np.uint8)).save(tmp_path / "a.png")
    data = load_data(tmp_path, value_range=(0, 1), alpha="black")
    assert data.__getitems__([0])[0][0, :, 0].tolist() == [[255, 0], [0, 0], [255, 0]]


def test_a_range_for_several_kinds_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(np.array([[0, 4095]], np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(np.array([[0, 255]], np.uint8)).save(tmp_path / "b.png")
    doubt(tmp_path, caplog, "several kinds alike: 16-bit, 8-bit", value_range=(0, 4095))


@pytest.mark.parametrize(
    ("array", "value_range", "expected"),
    [
        (np.array([0.0, 0.5, 1.0], np.float32), (0, 1), [0, 128, 255]),
        (np.array([-1.0, 0.0, 1.0], np.float64), (-1, 1), [0, 128, 255]),
        (np.array([0.0, 128.0, 255.0], np.float16), (0, 255), [0, 128, 255]),
        (np.array([0, 2048, 4095], np.uint16), (0, 4095), [0, 128, 255]),
        (np.array([0, 128, 255], np.int64), (0, 255), [0, 128, 255]),
        (np.array([0, 128, 255], ">i4"), (0, 255), [0, 128, 255]),
        (np.array([0, 1, 1], np.uint8), (0, 1), [0, 255]),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else "",
)
def test_arrays_need_a_declared_range(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, array: np.ndarray, value_range: Any, expected: list[int]
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.resize(array, (1, 6, 6)).astype(array.dtype))
    if array.dtype != np.uint8:
        with pytest.raises(DataError, match=rf"images is {array.dtype}, whose range is unknown; .* value_range="):
            load_data(path)
    assert values(settled(path, caplog, value_range=value_range)) == expected
    beyond = np.resize(array, (1, 6, 6)).astype(array.dtype)
    beyond[0, 0, 0] = value_range[1] + 2
    np.savez(path, images=beyond)
    with pytest.raises(DataError, match=rf"a\.npz: its values .* to {value_range[1] + 2} go beyond value_range="):
        load_data(path, value_range=value_range)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_arrays_with_nan(tmp_path: Path, bad: float) -> None:
    images = np.zeros((2, 6, 6), np.float32)
    images[1, 2, 3] = bad
    np.savez(tmp_path / "a.npz", images=images)
    with pytest.raises(DataError, match=r"a\.npz: it has NaN or infinite values"):
        load_data(tmp_path / "a.npz", value_range=(0, 1))


@pytest.mark.parametrize("dtype", ["U4", "complex64", "bool"])
def test_arrays_of_no_numbers(tmp_path: Path, dtype: str) -> None:
    np.savez(tmp_path / "a.npz", images=np.ones((2, 6, 6), dtype))
    with pytest.raises(DataError, match=r"images is .*; images must be uint8, or other numbers"):
        load_data(tmp_path / "a.npz", value_range=(0, 1))


# Colour, alpha, profiles ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [None, "white", "black", "drop"])
def test_alpha(tmp_path: Path, caplog: pytest.LogCaptureFixture, alpha: str | None) -> None:
    folder, array = tmp_path / "files", tmp_path / "a.npz"
    folder.mkdir()
    Image.fromarray(np.array([[[10, 40, 90, 0], [10, 200, 30, 255]]], np.uint8)).save(folder / "a.png")
    np.savez(array, images=np.full((1, 5, 5, 4), [10, 40, 90, 0], np.uint8))
    clear = {None: [255] * 3, "white": [255] * 3, "black": [0] * 3, "drop": [10, 40, 90]}[alpha]
    for path in (folder, array):
        if alpha is None:
            data = doubt(path, caplog, "alpha channel", 'alpha="white"', '"black"', '"drop"')
        else:
            data = settled(path, caplog, alpha=alpha)
        assert data.__getitems__([0])[0][0, :, 0, 0].tolist() == clear


@pytest.mark.parametrize("mode", ["LA", "PA", "palette", "rgb key"])
def test_other_kinds_of_transparency(tmp_path: Path, caplog: pytest.LogCaptureFixture, mode: str) -> None:
    image = Image.fromarray(np.array([[0, 200]], np.uint8))
    if mode == "palette":
        image.convert("P").save(tmp_path / "a.png", transparency=0)
    elif mode == "rgb key":
        image.convert("RGB").save(tmp_path / "a.png", transparency=(0, 0, 0))
    else:
        image.convert(mode).save(tmp_path / "a.png" if mode == "LA" else tmp_path / "a.tif")
    doubt(tmp_path, caplog, "1 of 1 images have an alpha channel")


def test_profiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xyz = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    image = Image.new("RGB", (4, 4), (200, 100, 50))
    image.save(tmp_path / "a.png", icc_profile=srgb)
    settled(tmp_path, caplog)
    assert load_data(tmp_path, profile="srgb").__getitems__([0])[0][0, :, 0, 0].tolist() == [200, 100, 50]
    for name in ("a.png", "a.jpg", "a.tif", "a.webp"):
        folder = tmp_path / name.replace(".", "-")
        folder.mkdir()
        image.save(folder / name, icc_profile=xyz)
        doubt(folder, caplog, "another colour profile than sRGB (1 Lab", 'profile="srgb"', 'profile="ignore"')
        settled(folder, caplog, profile="ignore")
        with pytest.raises(DataError, match=rf"{name}: PyCMSError"):  # a profile for Lab does not fit RGB
            load_data(folder, profile="srgb")


def test_profiles_are_converted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A profile whose red and green are swapped, made from sRGB's: the result is sRGB's with both swapped back."""
    srgb = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    red, green = srgb.index(b"rXYZ"), srgb.index(b"gXYZ")
    srgb[red : red + 4], srgb[green : green + 4] = b"gXYZ", b"rXYZ"
    srgb = bytearray(bytes(srgb).replace("sRGB".encode("utf-16-be"), "swap".encode("utf-16-be")))
    Image.new("RGB", (4, 4), (200, 100, 50)).save(tmp_path / "a.png", icc_profile=bytes(srgb))
    doubt(tmp_path, caplog, "(1 swap built-in)")
    got = settled(tmp_path, caplog, profile="srgb").__getitems__([0])[0][0, :, 0, 0].tolist()
    assert np.abs(np.array(got) - [100, 200, 50]).max() <= 2
    assert settled(tmp_path, caplog, profile="ignore").__getitems__([0])[0][0, :, 0, 0].tolist() == [200, 100, 50]


def test_cmyk(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("CMYK", (8, 8), (10, 20, 30, 40)).save(tmp_path / "a.jpg", quality=100)
    doubt(tmp_path, caplog, "1 of 1 images are CMYK", "(1 CMYK)", 'profile="ignore"')
    settled(tmp_path, caplog, profile="ignore")


def test_gray_mixed_with_colour(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path, 3)
    Image.fromarray(random_pixels(8, 8)).save(tmp_path / "gray.png")
    assert doubt(tmp_path, caplog, "3 of 4 images have colour", "channels=3", "channels=1").channels == 3
    assert settled(tmp_path, caplog, channels=3).channels == 3
    assert settled(tmp_path, caplog, channels=1).channels == 1


def test_what_was_done_is_said(tmp_path: Path) -> None:
    pictures(tmp_path / "a", 2)
    pictures(tmp_path / "b", 1, (16, 32))
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(random_pixels(8, 10, 3)).save(tmp_path / "b" / "turned.png", exif=exif)
    data = load_data(tmp_path, size=8)
    assert data.facts == [
        "files of 8x8 to 16x32",
        "1 shrunk",
        "2 cut to the aspect of 8x8",
        "1 turned upright as EXIF says",
    ]
    assert load_data(tmp_path, size=32, fit="pad").facts[1] == "4 padded with black to 32x32"


def test_copies(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for i in range(6):
        Image.fromarray(random_pixels(8, 8)).save(tmp_path / f"{i}.png")
    doubt(tmp_path, caplog, "only 1 of 6 images looked at differ")
    np.savez(tmp_path / "a.npz", images=np.repeat(random_pixels(2, 6, 6), 4, axis=0))
    doubt(tmp_path / "a.npz", caplog, "only 2 of 8 images looked at differ")
    settled_path = tmp_path / "b.npz"
    np.savez(settled_path, images=random_pixels(8, 6, 6))
    settled(settled_path, caplog)


# Files that are left out ----------------------------------------------------------------------------------------------


def test_every_file_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path, 2)
    for name in ("a.heic", "b.HEIC", "c.avif", "notes.txt", "LICENSE", ".DS_Store", "._a.png"):
        (tmp_path / name).write_bytes(b"x")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (tmp_path / "sub").mkdir()
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    data = load_data(tmp_path)
    assert "2 .heic, 1 without suffix, 1 .avif, 1 .txt: files whose names" in caplog.text
    assert "2 hidden files or folders were not searched" in data.facts
    reasons = {path.name: reason for path, reason in data.skipped}
    assert "a link to nothing" in reasons["gone.png"]
    assert "whose images are there already" in reasons["sub"] + reasons.get("again", "")
    (tmp_path / "sub" / "a.heic").touch()
    with pytest.raises(DataError, match=r"no image files \(.*\); it holds 1 \.heic"):
        load_data(tmp_path / "sub")


def test_files_that_the_system_refuses_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """This is imitated: tests may run as root, who may read every folder."""
    pictures(tmp_path, 2)
    pictures(tmp_path / "closed", 1)
    real = os.stat

    def stat(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("1.png") or Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, **options)

    monkeypatch.setattr(os, "stat", stat)
    data = load_data(tmp_path, class_depth=0)
    monkeypatch.undo()
    assert [path.name for path in data.files] == ["0.png"]
    assert sorted(path.name for path, reason in data.skipped if "PermissionError" in reason) == ["1.png", "closed"]


def test_truncated_images_never_look_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pictures(tmp_path, 2)
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    with pytest.raises(DataError, match="LOAD_TRUNCATED_IMAGES is set, which makes damaged images look whole"):
        load_data(tmp_path)


def test_other_data_have_another_digest(tmp_path: Path) -> None:
    pictures(tmp_path / "a" / "x", 2)
    pictures(tmp_path / "b" / "x", 2)
    pictures(tmp_path / "b" / "y", 1)
    a, b = load_data(tmp_path / "a").digest, load_data(tmp_path / "b").digest
    (tmp_path / "a").rename(tmp_path / "moved")
    assert load_data(tmp_path / "moved").digest == a != b
    digests = set()
    for labels, seed in (([0, 1, 0], 0), ([1, 0, 0], 0), ([0, 1, 0], 1)):
        np.savez(tmp_path / "a.npz", images=random_pixels(3, 6, 6, seed=seed), labels=labels)
        digests.add(load_data(tmp_path / "a.npz").digest)
    assert len(digests) == 3


@pytest.mark.parametrize("name", ["a.jfif", "a.JPE", "a.pbm", "a.apng"])
def test_odd_suffixes_of_images(tmp_path: Path, name: str) -> None:
    form = {"a.pbm": "PPM", "a.apng": "PNG"}.get(name, "JPEG")
    Image.new("1" if form == "PPM" else "L", (8, 8), 1).save(tmp_path / name, form)
    assert [path.name for path in load_data(tmp_path).files] == [name]


def test_a_jpeg_with_the_name_of_a_png(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Image.new("RGB", (8, 8), (200, 30, 90)).save(tmp_path / "a.png", "JPEG", quality=100)
    assert (settled(tmp_path, caplog).__getitems__([0])[0][0, :, 0, 0] - torch.tensor([200, 30, 90])).abs().max() <= 3


def test_names_cannot_control_a_terminal(tmp_path: Path) -> None:
    assert printable("a\x1b[31m\nb\udc80é") == "a\\x1b[31m\\nb\\udc80é"


# Classes --------------------------------------------------------------------------------------------------------------


def test_classes_of_the_second_level(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for folder in ("train/cat", "train/dog", "test/cat"):
        pictures(tmp_path / folder, 2)
    data = doubt(tmp_path, caplog, "6 of 6 images lie deeper", "test/cat/0.png", "class_depth=1", "class_depth=2")
    assert data.class_names == ("test", "train")
    assert settled(tmp_path, caplog, class_depth=1).class_names == ("test", "train")
    assert settled(tmp_path, caplog, class_depth=2).class_names == ("test/cat", "train/cat", "train/dog")
    assert settled(tmp_path, caplog, class_depth=0).class_names is None
    with pytest.raises(DataError, match="class_depth=3 needs 3 levels"):
        load_data(tmp_path, class_depth=3)


def test_loose_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "cat", 2)
    pictures(tmp_path, 1)
    doubt(tmp_path, caplog, "1 of 3 images lie in no sub-folder", "class_depth=0")
    assert settled(tmp_path, caplog, class_depth=0).num_classes is None


def test_one_class(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "all", 2)
    assert doubt(tmp_path, caplog, "all images lie in all, one class", "class_depth=0").num_classes == 1
    assert settled(tmp_path, caplog, class_depth=0).num_classes is None


def test_empty_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    pictures(tmp_path / "cat", 2)
    pictures(tmp_path / "dog", 2)
    (tmp_path / "bird").mkdir()
    doubt(tmp_path, caplog, "no image in the sub-folder bird", "class_names=")
    data = settled(tmp_path, caplog, class_names=["dog", "bird", "cat"])
    assert (data.class_names, data.num_classes, data.labels.tolist()) == (("dog", "bird", "cat"), 3, [2, 2, 0, 0])
    with pytest.raises(DataError, match="the sub-folder cat has images, but is not in class_names="):
        load_data(tmp_path, class_names=["dog", "bird"])


def test_numbers_as_names_of_folders(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("1", "2", "10"):
        pictures(tmp_path / name, 1)
    doubt(tmp_path, caplog, "class 0 is named 1", "class_names=")
    assert settled(tmp_path, caplog, class_names=["1", "2", "10"]).labels.tolist() == [0, 2, 1]
    (tmp_path / "1").rename(tmp_path / "0")
    (tmp_path / "2").rename(tmp_path / "1")
    (tmp_path / "10").rename(tmp_path / "2")
    settled(tmp_path, caplog)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 3], ("1 of the labels 0 to 3 have no image (2)",)),
        ([1, 2, 3], ("1 of the labels 0 to 3 have no image (0)",)),
        ([0, 1, 99], ("97 of the labels 0 to 99 have no image (2, 3, 4, 5, 6, 7, 8, 9, ...)",)),
    ],
)
def test_gaps_of_labels(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, labels: list[int], words: tuple[str, ...]
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=random_pixels(3, 6, 6), labels=labels)
    doubt(path, caplog, *words, "class_names=", "class_depth=0")
    names = [f"c{i}" for i in range(max(labels) + 1)]
    assert settled(path, caplog, class_names=names).class_names == tuple(names)
    assert settled(path, caplog, class_depth=0).labels is None
    with pytest.raises(DataError, match=rf"label {max(labels)} has no name; there are 1 names"):
        load_data(path, class_names=["only"])


def test_names_in_an_npz(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=random_pixels(3, 6, 6), labels=[0, 1, 0], class_names=["cat", "dog", "owl"])
    data = settled(path, caplog)
    assert (data.class_names, data.num_classes) == (("cat", "dog", "owl"), 3)
    for names, words in (([1, 2], "strings of shape"), ([["a"]], "strings of shape"), (["a", "a"], "twice")):
        np.savez(path, images=random_pixels(3, 6, 6), labels=[0, 1, 0], class_names=names)
        with pytest.raises(DataError, match=words):
            load_data(path)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (np.array(["cat", "dog", "cat"]), "class_names"),
        (np.eye(3), r"argmax\(1\)"),
        (np.array([0.0, 1.0, 2.0]), "integers"),
    ],
)
def test_labels_that_are_no_numbers(tmp_path: Path, labels: np.ndarray, words: str) -> None:
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 6, 6), labels=labels)
    with pytest.raises(DataError, match=rf"labels must be integers of shape \[N\].*{words}|{words}"):
        load_data(tmp_path / "a.npz")


def test_arrays_that_are_not_used(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=random_pixels(3, 6, 6), targets=[0, 1, 2])
    doubt(path, caplog, "the arrays targets are not used")
    settled(path, caplog, class_depth=0)


def test_labels_beside_an_idx_file(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "train-labels-idx1-ubyte"
    images.write_bytes(idx(random_pixels(3, 6, 6)))
    labels.write_bytes(idx(np.array([0, 1, 2], np.uint8)))
    doubt(images, caplog, "no labels, although train-labels-idx1-ubyte is there", "labels=", "class_depth=0")
    settled(images, caplog, class_depth=0)
    assert settled(images, caplog, labels=labels).num_classes == 3


# Layouts --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 3, 32, 3), (5, 1, 28, 1), (5, 3, 3, 3), (2, 4, 4, 3)])
def test_ambiguous_layouts(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path, pixels = tmp_path / "a.npz", random_pixels(*shape)
    np.savez(path, images=pixels)
    with pytest.raises(DataError, match=r'may be NHWC or NCHW; layout="NHWC" or "NCHW"'):
        load_data(path)
    last, first = (load_data(path, layout=layout, alpha="drop") for layout in ("NHWC", "NCHW"))
    assert (last.channels, last.size) == (shape[3], shape[1:3])
    assert (last.images.permute(0, 2, 3, 1).numpy() == pixels).all()
    assert first.size == shape[2:]
    assert (first.images.numpy() == pixels[:, :3]).all()


@pytest.mark.parametrize("shape", [(32, 30, 3), (28, 26, 1), (16, 12, 4)])
def test_one_image_is_no_stack(tmp_path: Path, shape: tuple[int, ...]) -> None:
    np.savez(tmp_path / "a.npz", images=random_pixels(*shape))
    with pytest.raises(DataError, match=r'one image \[H,W,C\].*layout="NHW"'):
        load_data(tmp_path / "a.npz")
    assert load_data(tmp_path / "a.npz", layout="NHW").size == shape[1:]
    with pytest.raises(DataError, match=r"not \[N,H,W,C\]"):
        load_data(tmp_path / "a.npz", layout="NHWC")


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"value_range": v} for v in ((1, 0), (0, 0), (0,), 5, "0,1", (0, np.nan), (0, np.inf), (None, 1), (0, True))),
        *({"frames": v} for v in ("last", 1, True)),
        *({"alpha": v} for v in ("gray", 0)),
        {"profile": "p3"},
        *({"layout": v} for v in ("HWC", 3, "NHWC")),
        *({"class_depth": v} for v in (-1, 1.5, True, "1", 99)),
        *({"class_names": v} for v in ("cat", [], [""], [1], ["a", "a"], 3)),
    ],
    ids=str,
)
def test_bad_arguments(tmp_path: Path, options: dict[str, Any]) -> None:
    pictures(tmp_path / "cat", 1)
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        load_data(tmp_path, **options)


@pytest.mark.parametrize(
    "options", [{"frames": "all"}, {"profile": "srgb"}, {"class_depth": 2}, {"class_names": ["a"]}]
)
def test_arguments_for_other_kinds_of_data(tmp_path: Path, options: dict[str, Any]) -> None:
    np.savez(tmp_path / "a.npz", images=random_pixels(3, 6, 6))
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        load_data(tmp_path / "a.npz", **options)


def test_wrong_counts_of_an_idx_file(tmp_path: Path) -> None:
    path = tmp_path / "images"
    path.write_bytes(bytes((0, 0, 8, 3)) + struct.pack(">3I", 10, 6, 6) + bytes(9 * 36))
    with pytest.raises(DataError, match=r"declares shape \(10, 6, 6\), 360 bytes"):
        load_data(path)
