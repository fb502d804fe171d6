"""`load_data` on files of every kind, sound and damaged: the pixels that it gives are compared with those written."""

from __future__ import annotations

import contextlib
import gzip
import logging
import os
import pickle
import re
import struct
import time
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastdiff.data import arrays, pixels
from fastdiff.data.datasets import load_data
from fastdiff.data.pixels import open_image
from fastdiff.errors import DataError, InvalidArgument

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def write_png(path, width, height, depth, colour, rows):
    """Write a PNG from its raw rows, for kinds that Pillow does not write: 16-bit colour, false sizes."""

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    body = zlib.compress(b"".join(b"\0" + row for row in rows))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


def only(path, **options):
    """Return the only image of ``path`` as integers [H, W, C]."""
    data = load_data(path, **options)
    assert len(data) == 1
    images, _ = data.__getitems__([0])
    assert images.dtype == torch.uint8
    assert images.shape == (1, data.channels, *data.size)
    return images[0].permute(1, 2, 0).numpy().astype(int)


def truncate(path, keep=0.6):
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])


# Kinds of image files -------------------------------------------------------------------------------------------------


def test_gray_png(tmp_path):
    pixels = random_pixels(5, 7)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert load_data(tmp_path).channels == 1
    assert load_data(tmp_path).size == (5, 7)
    assert (only(tmp_path) == pixels[..., None]).all()
    assert (only(tmp_path, channels=3) == pixels[..., None]).all()
    assert only(tmp_path, channels=3).shape == (5, 7, 3)


def test_rgb_png(tmp_path):
    pixels = random_pixels(5, 7, 3)
    Image.fromarray(pixels).save(tmp_path / "a.PNG")
    assert load_data(tmp_path).channels == 3
    assert (only(tmp_path) == pixels).all()
    luma = pixels @ np.array([0.299, 0.587, 0.114])
    assert np.abs(only(tmp_path, channels=1)[..., 0] - luma).max() <= 0.51


def test_rgba_over_white(tmp_path):
    pixels = np.array([[[10, 20, 30, 255], [10, 20, 30, 0], [10, 20, 30, 128], [0, 255, 0, 1]]], np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = [[[10, 20, 30], [255, 255, 255], [132, 137, 142], [254, 255, 254]]]
    assert only(tmp_path).tolist() == expected
    assert only(tmp_path, channels=1)[0, :2, 0].tolist() == [18, 255]


def test_gray_alpha_over_white(tmp_path):
    Image.fromarray(np.array([[[100, 255], [100, 0], [0, 51]]], np.uint8), "LA").save(tmp_path / "a.png")
    assert load_data(tmp_path).channels == 1
    assert only(tmp_path)[..., 0].tolist() == [[100, 255, 204]]


def test_16_bit_gray_is_scaled_not_clipped(tmp_path):
    values = np.array([[0, 128, 129, 257, 25700, 40000, 65279, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as image:
        assert image.mode.startswith("I")
    assert load_data(tmp_path).channels == 1
    assert only(tmp_path)[..., 0].tolist() == [[0, 0, 1, 1, 100, 156, 254, 255]]
    assert only(tmp_path, channels=3)[0, 4].tolist() == [100, 100, 100]


def test_16_bit_tiff_and_pgm(tmp_path):
    values = np.array([[0, 257, 40000, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.tiff")
    (tmp_path / "b.pgm").write_bytes(b"P5 4 1 1023\n" + np.array([0, 4, 512, 1023], ">u2").tobytes())
    images, _ = load_data(tmp_path).__getitems__([0, 1])
    assert images[:, 0, 0].tolist() == [[0, 1, 156, 255], [0, 1, 128, 255]]


def test_16_bit_colour(tmp_path):
    values = np.array([[300, 40000, 65535], [0, 65279, 25700]], ">u2")
    write_png(tmp_path / "a.png", 2, 1, 16, 2, [values.tobytes()])
    assert np.abs(only(tmp_path) - values.astype(float).reshape(1, 2, 3) / 257).max() < 1


def test_32_bit_gray_is_not_guessed(tmp_path, caplog):
    Image.fromarray(np.full((2, 2), 70000, np.int32)).save(tmp_path / "a.tiff")
    Image.fromarray(np.full((2, 2), 0.5, np.float32)).save(tmp_path / "b.tiff")
    Image.fromarray(np.full((2, 2), 9, np.uint8)).save(tmp_path / "c.tiff")
    data = load_data(tmp_path)
    assert [path.name for path in data.files] == ["c.tiff"]
    assert data.__getitems__([0])[0].unique().tolist() == [9]
    for name in ("a.tiff: 32-bit", "b.tiff: floating-point"):
        assert f"{name} pixels, whose range is unknown; value_range= declares it" in caplog.text


def test_palette(tmp_path):
    image = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), "P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    assert only(tmp_path).tolist() == [[[10, 20, 30], [40, 50, 60]], [[70, 80, 90], [40, 50, 60]]]
    image.save(tmp_path / "a.png", transparency=1)
    assert only(tmp_path).tolist() == [[[10, 20, 30], [255] * 3], [[70, 80, 90], [255] * 3]]


def test_one_bit_and_gif(tmp_path):
    bits = np.array([[0, 1, 1], [1, 0, 0]], bool)
    Image.fromarray(bits).save(tmp_path / "a.png")
    Image.fromarray(np.where(bits, 200, 7).astype(np.uint8)).save(tmp_path / "b.gif")
    images, _ = load_data(tmp_path, channels=1).__getitems__([0, 1])
    assert images[:, 0].tolist() == [(bits * 255).tolist(), np.where(bits, 200, 7).tolist()]


def test_jpeg_and_cmyk(tmp_path):
    flat = np.empty((16, 16, 3), np.uint8)
    flat[:] = (200, 30, 90)
    Image.fromarray(flat).save(tmp_path / "a.jpg", quality=100)
    Image.fromarray(flat).convert("CMYK").save(tmp_path / "b.jpeg", quality=100)
    images, _ = load_data(tmp_path).__getitems__([0, 1])
    assert (images.int() - torch.tensor([200, 30, 90]).view(3, 1, 1)).abs().max() <= 3


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff", "a.webp"])
def test_exif_orientation(tmp_path, name):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, 16:] = 250  # bright on the right; "rotate by 90 degrees to view" puts it below
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / name, exif=exif, quality=100)
    assert load_data(tmp_path).size == (32, 16)
    image = only(tmp_path)
    assert image[:14].max() < 20
    assert image[18:].min() > 230


@pytest.mark.parametrize("orientation", range(10))
def test_every_exif_orientation(tmp_path, orientation):
    pixels = random_pixels(5, 7)
    upright = {
        2: np.fliplr(pixels),
        3: np.rot90(pixels, 2),
        4: np.flipud(pixels),
        5: pixels.T,
        6: np.rot90(pixels, -1),
        7: np.rot90(pixels, 2).T,
        8: np.rot90(pixels),
    }.get(orientation, pixels)  # 0 and 9 are no orientations
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "a.png", exif=exif)
    assert load_data(tmp_path).size == upright.shape
    assert (only(tmp_path)[..., 0] == upright).all()


def test_own_channels_are_colour_where_any_image_is(tmp_path):
    Image.new("L", (4, 4), 9).save(tmp_path / "a.png")
    Image.new("RGB", (4, 4), (1, 2, 3)).save(tmp_path / "b.png")
    data = load_data(tmp_path)
    assert data.channels == 3
    assert data.__getitems__([1, 0])[0][:, :, 0, 0].tolist() == [[1, 2, 3], [9, 9, 9]]


# Fitting --------------------------------------------------------------------------------------------------------------


def test_crop_takes_the_centre_and_shrinks(tmp_path):
    pixels = random_pixels(64, 100, 3)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    expected = Image.fromarray(pixels[:, 18:82]).resize((32, 32), Image.Resampling.LANCZOS)
    assert (only(tmp_path, size=32) == np.asarray(expected)).all()
    tall = Image.fromarray(pixels[:, 34:66]).resize((24, 48), Image.Resampling.LANCZOS)
    assert (only(tmp_path, size=(48, 24)) == np.asarray(tall)).all()


def test_crop_without_shrinking_keeps_pixels(tmp_path):
    pixels = random_pixels(8, 13)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    assert (only(tmp_path, size=8)[..., 0] == pixels[:, 2:10]).all()


def test_pad_centres_in_black(tmp_path):
    pixels = random_pixels(5, 8) | 1
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = only(tmp_path, size=(8, 9), fit="pad")[..., 0]
    assert (image[1:6, 0:8] == pixels).all()
    assert image.sum() == pixels.sum()


@pytest.mark.parametrize(("fit", "kept"), [("crop", [1, 2]), ("pad", [0, 1])])
def test_wrong_sizes_are_named_and_skipped(tmp_path, caplog, fit, kept):
    for name, side in (("a", 7), ("b", 8), ("c", 9)):
        Image.new("L", (side, 8), 10 * side).save(tmp_path / f"{name}.png")
    data = load_data(tmp_path, size=8, fit=fit)
    assert [path.name for path in data.files] == [f"{'abc'[i]}.png" for i in kept]
    (name, reason) = data.skipped[0]
    assert f"skipped {name}" in caplog.text
    assert ("smaller than 8x8" if fit == "crop" else "larger than 8x8") in reason
    assert data.__getitems__([0])[0].max() == 10 * (7 + kept[0])


def test_several_sizes_need_a_size(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    Image.new("L", (5, 4)).save(tmp_path / "b.png")
    with pytest.raises(DataError, match=r"(?s)a\.png is 4x4.*b\.png is 4x5.*size="):
        load_data(tmp_path)


# Folders --------------------------------------------------------------------------------------------------------------


def make_classes(root):
    for value, name in enumerate(["zebra/x", "ant/deep/y", "ant/a", "mole/z"]):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), value + 1).save(root / f"{name}.png")


def test_sub_folders_are_classes(tmp_path):
    make_classes(tmp_path)
    (tmp_path / ".hidden").mkdir()
    Image.new("L", (9, 9)).save(tmp_path / ".hidden" / "a.png")
    (tmp_path / "ant" / "notes.txt").write_text("not an image")
    data = load_data(tmp_path)
    assert data.class_names == ("ant", "mole", "zebra")
    assert data.num_classes == 3
    images, labels = data.__getitems__([3, 0, 1, 2, 0])
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 0, 0, 1, 0]
    assert images[:, 0, 0, 0].tolist() == [1, 3, 2, 4, 3]
    image, label = data[3]
    assert image.unique().tolist() == [1]
    assert label == 2


def test_a_damaged_image_does_not_renumber_classes(tmp_path, caplog):
    make_classes(tmp_path)
    (tmp_path / "mole" / "z.png").write_text("broken")
    data = load_data(tmp_path)
    assert data.class_names == ("ant", "mole", "zebra")
    assert data.__getitems__([0, 1, 2])[1].tolist() == [0, 0, 2]
    assert "no usable image in class mole" in caplog.text


def test_no_labels_without_sub_folders(tmp_path, caplog):
    Image.new("L", (4, 4)).save(tmp_path / "loose.png")
    data = load_data(tmp_path)
    assert (data.num_classes, data.class_names, data.__getitems__([0])[1], data[0][1]) == (None, None, None, None)
    assert not caplog.records
    make_classes(tmp_path)
    assert load_data(tmp_path).num_classes is None
    assert "1 of 5 images lie in no sub-folder" in caplog.text


@pytest.mark.skipif(os.name == "nt", reason="needs symbolic links and pipes")
def test_links_and_pipes(tmp_path):
    make_classes(tmp_path / "real")
    root = tmp_path / "root"
    root.mkdir()
    (root / "ant").symlink_to(tmp_path / "real" / "ant")
    (root / "ant" / "loop").symlink_to(root)
    os.mkfifo(root / "ant" / "pipe.png")  # opening it would block for ever
    (root / "ant" / "gone.png").symlink_to(tmp_path / "nowhere.png")
    data = load_data(root)
    assert [path.name for path in data.files] == ["a.png", "y.png"]


def test_unreadable_files_are_named_and_skipped(tmp_path, caplog):
    Image.new("L", (4, 4), 77).save(tmp_path / "good.png")
    (tmp_path / "text.png").write_text("I am a text file.")
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "eps.png").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n")
    data = load_data(tmp_path)
    assert [path.name for path in data.files] == ["good.png"]
    assert sorted(path.name for path, _ in data.skipped) == ["empty.jpg", "eps.png", "text.png"]
    for name in ("text.png", "empty.jpg", "eps.png"):
        assert f"skipped {tmp_path / name}" in caplog.text
    assert all(record.name == "fastdiff" for record in caplog.records)
    (tmp_path / "good.png").unlink()
    with pytest.raises(DataError, match=r"none of 3 image files can be used.*empty\.jpg"):
        load_data(tmp_path)


@pytest.mark.parametrize(
    ("content", "word"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 4548\n", "Git LFS pointer"),
        (b"<!DOCTYPE html><html>Sign in</html>", "HTML"),
        (b"../.git/annex/objects/xx/yy", "git-annex"),
        (b"", "an empty file"),
    ],
)
def test_what_lies_in_the_place_of_data_is_named(tmp_path, content, word):
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / "a.jpg").write_bytes(content)
    with pytest.raises(DataError, match=rf"a\.jpg: {word}|a\.jpg: an? {word}"):
        load_data(photos)
    Image.new("L", (4, 4), 77).save(photos / "good.png")
    (skipped,) = load_data(photos).skipped
    assert word in skipped[1]
    for name in ("images.npz", "train-images-idx3-ubyte.gz", "a.tar", "train.parquet"):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(DataError, match=word):
            load_data(tmp_path / name)


@pytest.mark.parametrize(("width", "height"), [(100_000, 100_000), (10_000, 8_000), (1 << 30, 1)])
def test_pixel_bombs_are_refused_from_the_header(tmp_path, caplog, width, height):
    write_png(tmp_path / "bomb.png", width, height, 8, 0, [b"\0" * 10])
    with pytest.raises(DataError, match=r"bomb\.png.*pixels"):
        load_data(tmp_path, size=8)
    Image.new("L", (8, 8), 5).save(tmp_path / "good.png")
    data = load_data(tmp_path, size=8)
    assert [path.name for path in data.files] == ["good.png"]


def test_bomb_that_grew_after_the_scan(tmp_path):
    Image.new("L", (8, 8), 5).save(tmp_path / "a.png")
    Image.new("L", (8, 8), 6).save(tmp_path / "b.png")
    data = load_data(tmp_path, size=8)
    write_png(tmp_path / "a.png", 10_000, 8_000, 8, 0, [b"\0" * 10])
    assert data.__getitems__([0])[0].unique().tolist() == [6]


def test_truncated_files_are_left_out_when_data_are_opened(tmp_path, caplog):
    """No image stands for others that are known to be damaged."""
    for i in range(20):
        Image.fromarray(random_pixels(32, 32, seed=i)).save(tmp_path / f"{i:02}.png")
    good = load_data(tmp_path).__getitems__([7, 11])[0]
    for i in set(range(20)) - {7, 11}:
        truncate(tmp_path / f"{i:02}.png")
    data = load_data(tmp_path)
    assert [path.stem for path in data.files] == ["07", "11"]
    assert torch.equal(data.__getitems__([0, 1])[0], good)
    assert len(data.skipped) == caplog.text.count("image file is truncated") == 18
    truncate(data.files[0])
    truncate(data.files[1])
    with pytest.raises(DataError, match=r"none of 20 image files can be used; the first, .*00\.png: OSError"):
        load_data(tmp_path)


def test_files_truncated_later_are_replaced_by_the_next(tmp_path, caplog):
    for i in range(240):
        (tmp_path / f"class{i % 3}").mkdir(exist_ok=True)
        Image.fromarray(random_pixels(16, 16, seed=i)).save(tmp_path / f"class{i % 3}" / f"{i:03}.png")
    data = load_data(tmp_path)
    good = data.__getitems__(range(240))[0]
    for at in (79, 239):
        truncate(data.files[at])
    for order in ([78, 79, 80, 239, 0], [239, 79, 79]):
        images, labels = data.__getitems__(order)
        stands_in = [{79: 80, 239: 0}.get(i, i) for i in order]
        assert torch.equal(images, good[stands_in])
        assert torch.equal(labels, data.labels[stands_in])
    for at in (79, 239):
        assert caplog.text.count(f"unreadable {data.files[at]}") == 1
    truncate(data.files[3])
    with pytest.raises(DataError, match=r"3 of 240 images cannot be decoded, too many .*; remove or repair them"):
        data.__getitems__([3])


@pytest.mark.parametrize("index", [2, -1])
def test_index_out_of_range(tmp_path, index):
    for i in range(2):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    np.savez(tmp_path / "data.npz", images=random_pixels(2, 4, 4))
    for path in (tmp_path, tmp_path / "data.npz"):
        with pytest.raises(IndexError):
            load_data(path).__getitems__([0, index])


def test_pickled_and_in_loader_workers(tmp_path):
    make_classes(tmp_path)
    data = load_data(tmp_path)
    images, labels = data.__getitems__([0, 1, 2, 3])  # the pool of threads exists when the worker is forked
    copy = pickle.loads(pickle.dumps(data))
    assert torch.equal(copy.__getitems__([0, 1, 2, 3])[0], images)
    batches = list(DataLoader(data, batch_size=2, num_workers=1, collate_fn=lambda batch: batch))
    assert torch.equal(torch.cat([batch[0] for batch in batches]), images)
    assert torch.equal(torch.cat([batch[1] for batch in batches]), labels)


# npz ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", ["images", "x", "arr_0"])
@pytest.mark.parametrize("layout", ["NHWC", "NCHW", "NHWC fortran"])
def test_npz_layouts(tmp_path, key, layout):
    pixels = random_pixels(4, 6, 5, 3)
    stored = {"NHWC": pixels, "NCHW": pixels.transpose(0, 3, 1, 2), "NHWC fortran": np.asfortranarray(pixels)}[layout]
    label_key = {"images": "labels", "x": "y", "arr_0": "arr_1"}[key]
    np.savez_compressed(tmp_path / "data.npz", **{key: stored, label_key: np.array([3, 0, 2, 0])})
    data = load_data(tmp_path / "data.npz")
    assert (data.channels, data.size, data.num_classes, data.class_names, len(data)) == (3, (6, 5), 4, None, 4)
    images, labels = data.__getitems__([2, 0])
    assert images.dtype == torch.uint8
    assert (images.permute(0, 2, 3, 1).numpy() == pixels[[2, 0]]).all()
    assert labels.dtype == torch.int64
    assert labels.tolist() == [2, 3]


def test_npz_gray_rgba_and_conversion(tmp_path):
    gray, rgba = random_pixels(3, 6, 5), random_pixels(3, 6, 5, 4)
    np.savez(tmp_path / "gray.npz", images=gray)
    np.savez(tmp_path / "rgba.npz", images=rgba, labels=np.array([[1], [0], [1]], np.uint8))
    data = load_data(tmp_path / "gray.npz")
    assert data.channels == 1
    assert data.__getitems__([1])[1] is None
    assert (data.images[:, 0].numpy() == gray).all()
    assert (load_data(tmp_path / "gray.npz", channels=3).images.numpy() == gray[:, None]).all()
    data = load_data(tmp_path / "rgba.npz")
    alpha = rgba[..., 3:] / 255
    assert np.abs(data.images.permute(0, 2, 3, 1).numpy() - (rgba[..., :3] * alpha + 255 * (1 - alpha))).max() <= 0.51
    assert data.labels.tolist() == [1, 0, 1]


def test_npz_is_fitted_like_files(tmp_path):
    pixels = random_pixels(5, 40, 52, 3)
    np.savez(tmp_path / "data.npz", images=pixels)
    (tmp_path / "files").mkdir()
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(tmp_path / "files" / f"{i}.png")
    for options in ({"size": 16}, {"size": (20, 16), "channels": 1}, {"size": (41, 60), "fit": "pad"}):
        array, folder = load_data(tmp_path / "data.npz", **options), load_data(tmp_path / "files", **options)
        assert array.size == folder.size
        assert torch.equal(array.images, folder.__getitems__(range(5))[0])
    with pytest.raises(DataError, match=r"data\.npz.*40x52.*smaller"):
        load_data(tmp_path / "data.npz", size=41)


class Payload:
    """An object that creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("key", ["images", "labels"])
def test_pickled_npz_never_runs(tmp_path, key):
    arrays = {"images": random_pixels(1, 4, 4), "labels": np.array([0])}
    arrays[key] = np.array([Payload(tmp_path / "owned")], dtype=object)
    np.savez(tmp_path / "evil.npz", **arrays)
    with pytest.raises(DataError, match=rf"evil\.npz: {key} .*(objects|object)"):
        load_data(tmp_path / "evil.npz")
    assert not (tmp_path / "owned").exists()
    pickle.loads(pickle.dumps(Payload(tmp_path / "owned"))).close()
    assert (tmp_path / "owned").exists()  # so the payload would have worked


def npy_header(shape, descr="|u1"):
    text = f"{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def write_npz(path, body, key="images", method=zipfile.ZIP_DEFLATED):
    with zipfile.ZipFile(path, "w", method) as archive, archive.open(f"{key}.npy", "w", force_zip64=True) as file:
        for part in body:
            file.write(part)


@pytest.fixture
def nothing_is_read(monkeypatch):
    def fail(*_):
        pytest.fail("the data were read")

    monkeypatch.setattr(arrays, "_read_exactly", fail)


@pytest.mark.usefixtures("nothing_is_read")
def test_zip_bombs_are_refused_before_decompression(tmp_path, monkeypatch):
    path = tmp_path / "bomb.npz"
    write_npz(path, [npy_header((128, 1024, 1024)), *[bytes(1 << 20)] * 128])
    assert path.stat().st_size < 1 << 20
    with pytest.raises(DataError, match=r"bomb\.npz: images.*bomb"):
        load_data(path)
    write_npz(path, [npy_header((1 << 30, 1024, 1024)), bytes(100)])
    with pytest.raises(DataError, match=r"bomb\.npz: images declares"):
        load_data(path)
    write_npz(path, [npy_header((1, 1 << 20, 1 << 20)), bytes(100)])
    with pytest.raises(DataError, match=r"bomb\.npz: images .*pixels"):
        load_data(path)
    monkeypatch.setattr(arrays, "MAX_BYTES", 1000)
    np.savez(path, images=random_pixels(10, 10, 11))
    with pytest.raises(DataError, match=r"bomb\.npz.*1100 bytes, more than the 1000"):
        load_data(path)


def test_fitted_size_is_limited(tmp_path, monkeypatch):
    np.savez(tmp_path / "data.npz", images=random_pixels(10, 10, 10))
    monkeypatch.setattr(arrays, "MAX_BYTES", 2000)
    assert len(load_data(tmp_path / "data.npz")) == 10
    with pytest.raises(DataError, match="fitted to 20x20 would take 4000 bytes"):
        load_data(tmp_path / "data.npz", size=20, fit="pad")


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": random_pixels(2, 4, 4)}, "no array named images, x or arr_0.*pictures"),
        ({"images": random_pixels(2, 4, 4).astype(np.float32)}, "float32.*uint8"),
        ({"images": random_pixels(2, 4)}, "shape"),
        ({"images": random_pixels(2, 5, 4, 2)}, "shape"),
        ({"images": random_pixels(0, 4, 4)}, "empty"),
        ({"images": random_pixels(2, 0, 4)}, "empty"),
        ({"images": random_pixels(2, 4, 4), "labels": np.array([1])}, "1 labels.*2 images"),
        ({"images": random_pixels(2, 4, 4), "labels": np.array([1, -1])}, "labels range from -1 to 1"),
        ({"images": random_pixels(2, 4, 4), "labels": np.array([1, 1 << 63], np.uint64)}, "labels range"),
        ({"images": random_pixels(2, 4, 4), "labels": np.array([1.0, 0.0])}, "integers"),
        ({"images": random_pixels(2, 4, 4), "labels": np.eye(2, dtype=int)}, "integers"),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value),
)
def test_unusable_npz(tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(DataError, match=rf"data\.npz.*{message}"):
        load_data(tmp_path / "data.npz")


def test_damaged_npz(tmp_path):
    path = tmp_path / "data.npz"
    np.savez(path, images=random_pixels(2, 40, 40))
    content = path.read_bytes()
    at = content.index(random_pixels(2, 40, 40).tobytes()[:64])
    for damaged in (content[:-30], content[:40], content[: at + 9] + bytes([content[at + 9] ^ 1]) + content[at + 10 :]):
        path.write_bytes(damaged)  # the last has one flipped bit, which the archive's checksum finds
        with pytest.raises(DataError, match=r"data\.npz"):
            load_data(path)
    write_npz(path, [b"\x93NUMPY\x01\x00" + struct.pack("<H", 8000) + b"(" * 8000])
    with pytest.raises(DataError, match=r"data\.npz: images has no usable \.npy header"):
        load_data(path)
    write_npz(path, [npy_header((1, 4, 4)), bytes(16)], method=zipfile.ZIP_LZMA)
    with pytest.raises(DataError, match=r"data\.npz: images is packed by method 14"):
        load_data(path)


# IDX ------------------------------------------------------------------------------------------------------------------


def idx(array, declared=None):
    shape = declared or array.shape
    return bytes((0, 0, 8, len(shape))) + struct.pack(f">{len(shape)}I", *shape) + array.tobytes()


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_idx(tmp_path, pack):
    pixels, classes = random_pixels(5, 28, 28), np.array([4, 0, 9, 9, 1], np.uint8)
    images, labels = tmp_path / "train-images-idx3-ubyte", tmp_path / "labels"
    images.write_bytes(pack(idx(pixels)))
    labels.write_bytes(pack(idx(classes)))
    data = load_data(images, labels=labels, size=32, fit="pad")
    assert (data.channels, data.size, data.num_classes, data.class_names, len(data)) == (1, (32, 32), 10, None, 5)
    got, got_labels = data.__getitems__([3, 1])
    assert (got[:, 0, 2:30, 2:30].numpy() == pixels[[3, 1]]).all()
    assert got.sum(dtype=torch.int64) == pixels[[3, 1]].sum(dtype=np.int64)
    assert got_labels.tolist() == [9, 0]
    assert load_data(images).num_classes is None


@pytest.mark.parametrize("pack", [bytes, gzip.compress], ids=["plain", "gz"])
def test_damaged_idx(tmp_path, pack):
    path, labels = tmp_path / "images", tmp_path / "labels"
    pixels = random_pixels(5, 8, 8)

    def refused(content, message, packed=True):
        path.write_bytes(pack(content) if packed else content)
        with pytest.raises(DataError, match=f"(?s){re.escape(str(path))}.*({message})"):
            load_data(path)

    refused(idx(pixels)[:-1], "cannot hold|end after 319 of 320")
    refused(idx(pixels)[:11], "not an IDX file")
    refused(idx(pixels) + b"\0", "more than the 320 bytes")
    refused(idx(pixels, declared=(2**32 - 1, 2**31, 8)), "pixels|cannot hold")
    refused(idx(pixels, declared=(2**32 - 1, 28, 28)), "cannot hold")
    refused(idx(pixels[:0]), "empty")
    refused(idx(np.array([1, 2], np.uint8)), "not an IDX file of uint8 images")
    refused(b"\0\0\x0d\x03" + idx(pixels)[4:], "not an IDX file")  # float32
    refused(pack(idx(pixels))[:-20], "cannot hold|ended|end after", packed=False)
    path.write_bytes(pack(idx(pixels)))
    labels.write_bytes(pack(idx(np.zeros(4, np.uint8))))
    with pytest.raises(DataError, match=r"4 labels.*5 images"):
        load_data(path, labels=labels)


def test_gzip_bombs(tmp_path, monkeypatch):
    path = tmp_path / "bomb.gz"
    path.write_bytes(gzip.compress(idx(np.zeros((128, 1024, 1024), np.uint8)), 1))
    assert path.stat().st_size < 1 << 20
    with monkeypatch.context() as patch:
        patch.setattr(arrays, "_read_exactly", lambda *_: pytest.fail("the data were read"))
        with pytest.raises(DataError, match=r"bomb\.gz.*bomb"):
            load_data(path)
    # A small image file with much behind it: reading stops one byte after the declared end.
    path.write_bytes(gzip.compress(idx(np.zeros((1, 8, 8), np.uint8)) + bytes(64 << 20), 1))
    reads = []
    read = gzip.GzipFile.read
    monkeypatch.setattr(gzip.GzipFile, "read", lambda file, size=-1: reads.append(size) or read(file, size))
    with pytest.raises(DataError, match="more than the 64 bytes"):
        load_data(path)
    assert reads == [16, 64, 1]


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="needs the Fashion-MNIST files")
def test_fashion_mnist():
    images, labels = FASHION_MNIST / "t10k-images-idx3-ubyte.gz", FASHION_MNIST / "t10k-labels-idx1-ubyte.gz"
    raw = np.frombuffer(gzip.decompress(images.read_bytes()), np.uint8, offset=16).reshape(-1, 28, 28)
    data = load_data(images, labels=labels, size=32, fit="pad")
    assert (data.images[:, 0, 2:30, 2:30].numpy() == raw).all()
    assert data.images.sum(dtype=torch.int64) == raw.sum(dtype=np.int64)
    assert data.labels[:10].tolist() == [9, 2, 1, 1, 6, 1, 4, 6, 5, 7]
    assert data.labels.bincount().tolist() == [1000] * 10


# Anything -------------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::UserWarning:PIL", "ignore::PIL.Image.DecompressionBombWarning")
def test_random_damage_is_a_data_error(tmp_path, caplog):
    """A file with changed bytes loads, or a DataError names it."""
    caplog.set_level(logging.CRITICAL, "fastdiff")
    g = np.random.default_rng(0)
    pixels = random_pixels(3, 12, 12, 3)
    np.savez_compressed(tmp_path / "a.npz", images=pixels, labels=np.arange(3))
    (tmp_path / "a.idx").write_bytes(idx(pixels[..., 0]))
    (tmp_path / "a.gz").write_bytes(gzip.compress(idx(pixels[..., 0])))
    for name in ("a.png", "a.jpg", "a.gif", "a.tiff", "a.webp", "a.bmp"):
        (tmp_path / name[2:]).mkdir()
        Image.fromarray(pixels[0]).save(tmp_path / name[2:] / name)
    outcomes = set()
    for path in [*tmp_path.glob("a.*"), *tmp_path.glob("*/a.*")]:
        sound = path.read_bytes()
        for _ in range(40):
            damaged = bytearray(sound)
            for at in g.integers(0, len(sound), 3):
                damaged[at] = g.integers(256)
            path.write_bytes(damaged[: g.integers(len(sound) // 2, len(sound) + 1)] if g.random() < 0.3 else damaged)
            try:
                load_data(path if path.parent == tmp_path else path.parent, size=8).__getitems__([0])
                outcomes.add("loaded")
            except DataError as error:
                outcomes.add("refused" if str(tmp_path) in str(error) else f"does not name the file: {error}")
    assert outcomes == {"loaded", "refused"}


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        *({"size": size} for size in (0, -1, 2.5, True, "32", (32,), (1, 2, 3), (8, 0), 100_000)),
        *({"channels": channels} for channels in (0, 2, 4, True, "3")),
        {"fit": "stretch"},
        {"labels": "labels.idx"},
    ],
    ids=str,
)
def test_bad_arguments(tmp_path, options):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(InvalidArgument, match=next(iter(options))):
        load_data(tmp_path, **options)


def test_what_is_no_data(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "empty").mkdir()
    for path, message in [
        (tmp_path / "nowhere", "cannot open"),
        (tmp_path / "a.png", "neither a folder"),
        (tmp_path / "empty", "no image files"),
    ]:
        with pytest.raises(DataError, match=message) as caught:
            load_data(path)
        assert str(path) in str(caught.value)


def test_decoded_images_are_kept(tmp_path, monkeypatch):
    """A file is decoded once, while there is room, also by threads and in what is pickled."""
    for i in range(6):
        Image.new("RGB", (40, 30), (i * 40, 1, 2)).save(tmp_path / f"{i}.png")
    data = load_data(tmp_path, size=8)
    decoded = []
    inner = type(data)._decode_file
    monkeypatch.setattr(type(data), "_decode_file", lambda self, at: (decoded.append(at), inner(self, at))[1])
    first = data.__getitems__([0, 1, 2, 3, 4, 5])[0]
    assert torch.equal(data.__getitems__([5, 4, 3, 2, 1, 0])[0].flip(0), first)
    assert sorted(decoded) == [0, 1, 2, 3, 4, 5]
    data._room = 2
    data._decoded.clear()
    for _ in range(2):
        assert torch.equal(data.__getitems__([0, 1, 2, 3, 4, 5])[0], first)
    assert len(data._decoded) == 2
    assert torch.equal(pickle.loads(pickle.dumps(data)).__getitems__([0, 1])[0], first[:2])


@pytest.mark.parametrize("pages", [1, 2])
def test_threads_share_a_bound_of_decoded_pixels(tmp_path, monkeypatch, pages):
    """Eight threads that read images of 64 to 4096 pixels never have more than 5000 open, and one at a time may."""
    sizes = [8 * (i % 8 + 1) for i in range(64)]
    for i, side in enumerate(sizes):
        page = Image.fromarray(np.full((side, side), i, np.uint8))
        first = page if pages == 1 else Image.fromarray(np.full((8, 8), 255, np.uint8))
        first.save(tmp_path / f"{i:02}.tif", save_all=True, append_images=[page] * (pages - 1))
    monkeypatch.setattr(pixels, "PIXELS_IN_FLIGHT", 5000)
    seen, opened = [], []
    share = pixels._in_flight.share

    @contextlib.contextmanager
    def watched(count):
        with share(count):
            seen.append(pixels._in_flight._pixels)
            opened.append(count)
            time.sleep(1e-3)
            yield

    monkeypatch.setattr(pixels._in_flight, "share", watched)

    def read(i):
        with open_image(tmp_path / f"{i:02}.tif", pages - 1) as image:
            return int(np.asarray(image)[0, 0])

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(read, range(64))) == list(range(64))
    assert max(seen) <= 5000
    assert max(opened) == 64 * 64
    assert len({n for n in seen if n not in opened}) > 0  # several were open at once
    assert pixels._in_flight._pixels == 0


def test_an_image_beyond_the_bound_is_read_alone(tmp_path, monkeypatch):
    Image.fromarray(np.zeros((100, 100), np.uint8)).save(tmp_path / "large.png")
    monkeypatch.setattr(pixels, "PIXELS_IN_FLIGHT", 5000)
    with open_image(tmp_path / "large.png") as image:
        assert pixels._in_flight._pixels == 100 * 100
        assert np.asarray(image).shape == (100, 100)
