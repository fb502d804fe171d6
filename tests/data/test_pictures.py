"""Pictures from tensors: rounding, places in a grid, animations, and files that are written whole or not at all."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import solvers
from fastdiff.data import pictures
from fastdiff.errors import InvalidArgument, WriteError
from fastdiff.sampler.output import SampleOutput
from fastdiff.schedule import NoiseSchedule


def levels(*values: int, channels: int = 1, size: tuple[int, int] = (2, 3)) -> torch.Tensor:
    """Make images [n, C, H, W], each filled with one gray level."""
    x = torch.tensor(values, dtype=torch.float32) / 127.5 - 1.0
    return x.view(-1, 1, 1, 1).expand(-1, channels, *size)


def test_every_gray_level_is_met() -> None:
    k = torch.arange(256, dtype=torch.float64)
    exact = (k / 127.5 - 1.0).float().view(1, 1, 16, 16)
    assert pictures.to_uint8(exact).reshape(-1).tolist() == list(range(256))
    # Values just above the middle between two levels become the upper level, and those just below it the lower.
    middle = (k[:-1] + 0.5) / 127.5 - 1.0
    above, below = ((middle + side).float().view(1, 1, 1, 255) for side in (1e-5, -1e-5))
    assert pictures.to_uint8(above).reshape(-1).tolist() == list(range(1, 256))
    assert pictures.to_uint8(below).reshape(-1).tolist() == list(range(255))


def test_values_out_of_range() -> None:
    x = torch.tensor([-math.inf, -7.0, -1.0, -0.0, 0.0, 1.0, 1.001, math.inf, math.nan]).view(1, 1, 1, 9)
    assert pictures.to_uint8(x).reshape(-1).tolist() == [0, 0, 0, 128, 128, 255, 255, 255, 0]


def test_layout_and_dtypes() -> None:
    x = torch.rand((2, 3, 4, 5), generator=torch.Generator().manual_seed(0)) * 2 - 1
    array = pictures.to_uint8(x.clone().requires_grad_())
    assert (array.dtype, array.shape) == (np.uint8, (2, 4, 5, 3))
    for b, c, y, z in np.ndindex(2, 3, 4, 5):
        assert array[b, y, z, c] == round((float(x[b, c, y, z]) + 1.0) * 127.5)
    assert np.array_equal(pictures.to_uint8(x.double()), array)
    half = x.bfloat16()
    assert np.array_equal(pictures.to_uint8(half), pictures.to_uint8(half.float()))
    strided = x.to(memory_format=torch.channels_last)
    assert np.array_equal(pictures.to_uint8(strided), array)


def test_pil() -> None:
    gray, color = pictures.to_pil(levels(7, 250)), pictures.to_pil(levels(9, channels=3))
    assert [(p.mode, p.size) for p in gray + color] == [("L", (3, 2)), ("L", (3, 2)), ("RGB", (3, 2))]
    assert gray[1].getpixel((2, 1)) == 250
    x = torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1)
    assert pictures.to_pil(x)[0].getpixel((0, 0)) == (255, 0, 128)


@pytest.mark.parametrize("channels", [5, 6])
def test_other_channel_counts_are_no_pictures(channels: int) -> None:
    x = torch.zeros(2, channels, 4, 4)
    for make in (pictures.to_pil, pictures.grid):
        with pytest.raises(InvalidArgument, match=rf"{channels} channels .* 1 \(gray\) or 3 \(RGB\)"):
            make(x)


@pytest.mark.parametrize(
    ("n", "columns", "padding", "places", "size"),
    [
        (5, None, 2, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1)], (2, 3)),
        (4, None, 2, [(0, 0), (0, 1), (1, 0), (1, 1)], (2, 2)),
        (1, None, 2, [(0, 0)], (1, 1)),
        (3, 1, 1, [(0, 0), (1, 0), (2, 0)], (3, 1)),
        (3, 5, 0, [(0, 0), (0, 1), (0, 2)], (1, 5)),
        (7, 3, 4, [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2), (2, 0)], (3, 3)),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_grid(
    n: int, columns: int | None, padding: int, places: list[tuple[int, int]], size: tuple[int, int], channels: int
) -> None:
    H, W = 2, 3
    picture = pictures.grid(levels(*range(10, 10 + n), channels=channels), columns, padding)
    assert picture.mode == ("L" if channels == 1 else "RGB")
    expected = np.full((size[0] * (H + padding) + padding, size[1] * (W + padding) + padding), 255)
    for i, (row, column) in enumerate(places):
        y, x = padding + row * (H + padding), padding + column * (W + padding)
        expected[y : y + H, x : x + W] = 10 + i
    got = np.asarray(picture)
    assert np.array_equal(got if channels == 1 else got[..., 0], expected)
    if channels == 3:
        assert (got == got[..., :1]).all()


@pytest.mark.parametrize(("columns", "padding"), [(0, 2), (-1, 2), (2, -1)])
def test_impossible_grids(columns: int, padding: int) -> None:
    with pytest.raises(InvalidArgument, match=f"columns={columns}, padding={padding}"):
        pictures.grid(levels(1, 2), columns, padding)


def test_no_images_make_no_grid() -> None:
    with pytest.raises(InvalidArgument, match="at least 1"):
        pictures.grid(torch.zeros(0, 1, 2, 2))


def test_nan_is_black() -> None:
    x = levels(200, 200).clone()
    x[1, 0, 1, 1] = math.nan
    first, second = pictures.to_pil(x)
    assert first.getextrema() == (200, 200)
    assert second.getpixel((1, 1)) == 0
    assert second.getpixel((0, 1)) == 200


# Animations -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".GIF"])
@pytest.mark.parametrize("channels", [1, 3])
def test_animation(tmp_path: Path, suffix: str, channels: int) -> None:
    grays = list(range(0, 240, 40))
    path = tmp_path / "deep" / f"film{suffix}"
    pictures.animate(pictures.to_pil(levels(*grays, channels=channels, size=(16, 24))), path, seconds=1.2)
    with Image.open(path) as film:
        assert film.n_frames == len(grays)
        assert film.size == (24, 16)
        assert film.info["loop"] == 0, "it repeats for ever"
        durations = []
        for i, gray in enumerate(grays):
            film.seek(i)
            film.load()
            durations.append(film.info["duration"])
            tolerance = 0 if suffix.lower() == ".gif" else 3  # WebP is lossy
            assert np.abs(np.asarray(film.convert("L")).astype(int) - gray).max() <= tolerance
    assert durations == [200] * 5 + [1400]
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_an_animation_of_one_frame(tmp_path: Path) -> None:
    pictures.animate(pictures.to_pil(levels(77)), tmp_path / "one.gif")
    with Image.open(tmp_path / "one.gif") as film:
        assert film.n_frames == 1
        assert film.convert("L").getpixel((0, 0)) == 77


def test_animations_that_cannot_be(tmp_path: Path) -> None:
    frames = pictures.to_pil(levels(1, 2))
    with pytest.raises(InvalidArgument, match=r"film\.mp4: an animation is a \.gif or \.webp"):
        pictures.animate(frames, tmp_path / "film.mp4")
    with pytest.raises(InvalidArgument, match="at least one frame"):
        pictures.animate([], tmp_path / "film.gif")
    assert not list(tmp_path.iterdir())


# Files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", pictures.PICTURES)
def test_save_picture(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / "a" / "b" / f"p{suffix}"
    pictures.save_picture(pictures.to_pil(levels(128, size=(16, 16)))[0], path)
    with Image.open(path) as picture:
        assert picture.size == (16, 16)
        assert abs(int(np.asarray(picture.convert("L"))[3, 5]) - 128) <= 2
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_unknown_picture_suffixes(tmp_path: Path) -> None:
    for name in ("p.xyz", "p", "p.npz"):
        with pytest.raises(InvalidArgument, match=rf"{name}: unknown picture suffix; allowed: \.png, \.jpg"):
            pictures.save_picture(pictures.to_pil(levels(1))[0], tmp_path / name)
    assert not list(tmp_path.iterdir())


def output(n: int = 3) -> SampleOutput:
    table = solvers.ddim(NoiseSchedule(), 1)
    return SampleOutput(levels(*range(n), channels=3), 1, 0, table, 1, None)


def write_picture(path: Path) -> None:
    pictures.save_picture(pictures.to_pil(levels(200))[0], path)


def write_animation(path: Path) -> None:
    pictures.animate(pictures.to_pil(levels(1, 2)), path)


def write_output(path: Path) -> None:
    output().save(path)


@pytest.mark.parametrize(
    ("write", "name"),
    [
        (write_picture, "a.png"),
        (write_picture, "a.jpg"),
        (write_animation, "a.gif"),
        (write_output, "a.png"),
        (write_output, "a.npz"),
    ],
)
def test_a_failed_write_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, write: Any, name: str
) -> None:
    path = tmp_path / name
    write(path)
    whole = path.read_bytes()

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(WriteError, match=rf"{name} could not be written \(No space left"):
        write(path)
    assert path.read_bytes() == whole
    assert [p.name for p in tmp_path.iterdir()] == [name]
    with pytest.raises(WriteError, match=rf"new{path.suffix} could not be written \(No space left"):
        write(tmp_path / f"new{path.suffix}")
    assert [p.name for p in tmp_path.iterdir()] == [name]


def test_images_without_a_picture_are_saved_as_arrays(tmp_path: Path) -> None:
    out = SampleOutput(torch.zeros(2, 5, 2, 2), 1, 0, solvers.ddim(NoiseSchedule(), 1), 1, None)
    with pytest.raises(InvalidArgument, match="5 channels"):
        out.save(tmp_path / "a.png")
    out.save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz", allow_pickle=False) as arrays:
        assert arrays["images"].shape == (2, 2, 2, 5)
