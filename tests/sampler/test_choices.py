"""Seeds and indices of each image, pictures as input and output, copies and pickles."""

from __future__ import annotations

import copy
import dataclasses
import multiprocessing
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import fastdiff
from fastdiff import cli
from fastdiff.checkpoints import save_folder
from fastdiff.errors import FastdiffError, InvalidArgument, WriteError
from fastdiff.files import check_writable
from fastdiff.sampler import Sampler
from fastdiff.sampler.editing import as_image
from tests.support.unets import TINY, TINY_CLASSES, random_unet

HUGE = (1 << 64) - 1


def sampler_of(channels: int = 3, **options: Any) -> Sampler:
    config = dataclasses.replace(TINY, in_channels=channels, out_channels=channels)
    return Sampler(random_unet(config), **options)


# Seeds and indices ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", ["ddim", "ddpm"])
@pytest.mark.parametrize("batch_size", [None, 2])
def test_seeds_and_indices_of_each_image(solver: str, batch_size: int | None) -> None:
    s = sampler_of()
    options: dict[str, Any] = {"steps": 4, "solver": solver}

    def same(a: torch.Tensor, b: torch.Tensor) -> None:
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)

    alone = [s.sample(1, seed=k, **options).images for k in (5, HUGE, 11)]
    out = s.sample(3, seed=[5, HUGE, 11], batch_size=batch_size, **options)
    same(out.images, torch.cat(alone))
    assert out.seed == (5, HUGE, 11)
    assert list(out.indices) == [0, 0, 0]
    for seeds in ((5, HUGE, 11), np.array([5, HUGE, 11], dtype=np.uint64)):
        same(s.sample(3, seed=seeds, **options).images, out.images)
    again = s.sample(20, seed=7, **options).images[[3, 17, 3]]
    for name in ("index", "indices", "start_index"):
        out = s.sample(3, seed=7, batch_size=batch_size, **{name: [3, 17, 3]}, **options)
        same(out.images, again)
        assert list(out.indices) == [3, 17, 3]
    both = s.sample(2, seed=[7, 8], index=torch.tensor([3, 17]), **options).images
    same(both[:1], again[:1])
    same(s.sample(2, seed=[7, 8], start_index=3, **options).images[:1], again[:1])
    events = list(s.stream(3, seed=7, index=[3, 17, 3], batch_size=2, **options))
    assert list(events[0].indices) == [3, 17]
    seen: list[Any] = []
    s.sample(
        2, index=[9, 4], noise=lambda row, at: (seen.append(list(at)), torch.zeros(len(at), 3, 8, 8))[1], **options
    )
    assert seen[0] == [9, 4]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": [1]}, "2 of them"),
        ({"seed": [1, 2, 3]}, "more than 2"),
        ({"seed": [1, -1]}, "from 0 to 2^64 - 1"),
        ({"seed": [1, None]}, "from 0 to 2^64 - 1"),
        ({"seed": "12"}, "seed must be an integer"),
        ({"seed": {1, 2}}, "a list is needed"),
        ({"seed": torch.ones(2)}, "seed must be an integer"),
        ({"index": [1]}, "2 of them"),
        ({"index": 3}, "a list is needed"),
        ({"index": [1, -1]}, "index=-1"),
        ({"index": [1, 1.5]}, "index=1.5"),
        ({"index": [1, 1 << 63]}, "from 0 to"),
        ({"index": [1, 2], "start_index": 5}, "index and start_index both say"),
        ({"index": [1, 2], "indices": [1, 2]}, "index and indices both say"),
        ({"start_index": [1]}, "2 of them"),
    ],
)
def test_seeds_and_indices_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        sampler_of().request(2, **options)
    assert words in str(caught.value)


def test_files_of_chosen_images(tmp_path: Path) -> None:
    s = sampler_of()
    s.sample(2, steps=1, index=[3, 17]).save(tmp_path / "a")
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == ["000003.png", "000017.png"]
    s.sample(2, steps=1, seed=[5, 6]).save(tmp_path / "b")
    assert sorted(p.name for p in (tmp_path / "b").iterdir()) == ["5-000000.png", "6-000000.png"]
    s.sample(2, steps=1, index=[3, 3]).save(tmp_path / "c")
    assert sorted(p.name for p in (tmp_path / "c").iterdir()) == ["000000.png", "000001.png"]
    s.sample(2, steps=1, seed=[5, HUGE], index=[3, 4]).save(tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz") as file:
        assert file["seed"].tolist() == [5, HUGE]
        assert file["indices"].tolist() == [3, 4]


# Pictures -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "LA"), (3, "RGB"), (4, "RGBA")])
def test_channels_that_pictures_have(tmp_path: Path, channels: int, mode: str) -> None:
    out = sampler_of(channels).sample(2, steps=1)
    assert [picture.mode for picture in out.to_pil()] == [mode, mode]
    out.save(tmp_path / "a.png")
    out.save(tmp_path / "folder")
    out.save(tmp_path / "a.webp")
    out.save(tmp_path / "a.gif")
    with Image.open(tmp_path / "a.png") as picture, Image.open(tmp_path / "folder" / "000001.png") as one:
        assert (picture.mode, one.mode) == (mode, mode)
        assert np.array_equal(np.array(one), np.array(out.to_pil()[1]))
    if channels in (2, 4):
        with pytest.raises(InvalidArgument, match=r"JPEG file has no alpha"):
            out.save(tmp_path / "a.jpg")
    shown = out._repr_png_()
    assert shown is not None
    assert shown.startswith(b"\x89PNG")


def test_what_an_output_says() -> None:
    out = sampler_of(5).sample(2, steps=1, seed=9)
    assert out._repr_png_() is None
    with pytest.raises(InvalidArgument, match=r"images of 5 channels are not pictures.*\.npz"):
        out.save("a.png")
    assert repr(out) == ("SampleOutput(2 images 5x8x8, seed 9, index 0 to 1, ddim, 1 rows, 1 network evaluations each)")
    s = sampler_of()
    many = s.sample(12, steps=1, seed=list(range(12)))
    assert "seeds 0, 1, 2, 3, 4, 5, 6, 7, ..., index 0" in repr(many)
    (event,) = s.stream(2, steps=1)
    for value in (many, event):
        assert "\n" not in repr(value)
        assert len(repr(value)) < 200


@pytest.mark.parametrize(("channels", "name", "word"), [
    (5, "a.png", "5 channels"), (5, "folder", "5 channels"), (4, "a.jpg", "alpha"), (2, "a.jpeg", "alpha"),
])  # fmt: skip
def test_the_command_refuses_before_it_draws(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, channels: int, name: str, word: str
) -> None:
    config = dataclasses.replace(TINY, in_channels=channels, out_channels=channels)
    save_folder(tmp_path / "m", random_unet(config), fastdiff.NoiseSchedule())
    monkeypatch.setattr(Sampler, "sample", lambda *a, **k: pytest.fail("it draws"))
    monkeypatch.setattr("sys.argv", ["fastdiff", "sample", str(tmp_path / "m"), "--out", str(tmp_path / name)])
    errors: list[Any] = []
    monkeypatch.setattr("builtins.print", lambda *a, **k: errors.append(a))
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 2
    assert word in str(errors)


def test_outputs_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "dir.png").mkdir()
    for path in ("file", "file/a.png", "dir.png", "file/folder"):
        with pytest.raises(WriteError, match="cannot be written"):
            check_writable(tmp_path / path)
    check_writable(tmp_path / "new" / "a.png")
    check_writable(tmp_path / "folder")
    assert list((tmp_path / "new").iterdir()) == []


def test_pictures_and_arrays_as_input() -> None:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (2, 8, 8, 3), dtype=np.uint8)
    tensor = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    pictures = [Image.fromarray(p) for p in pixels]
    s = sampler_of()

    def draw(image: Any, mask: Any = None) -> torch.Tensor:
        return s.sample(2, image=image, mask=mask, steps=3).images

    expected = draw(tensor)
    for image in (pictures, pixels, [p for p in pixels], tensor.numpy(), tuple(pictures)):
        assert torch.equal(draw(image), expected)
    assert torch.equal(draw(pictures[0]), draw(tensor[0]))
    assert torch.equal(draw(pictures[0].convert("L")), draw(np.array(pictures[0].convert("L"))))
    known = torch.zeros(8, 8)
    known[:, 4:] = 1
    expected = draw(tensor, known)
    array = known.numpy()
    for mask in (array, array > 0, (array * 255).astype(np.uint8), array.astype(np.uint8),
                 Image.fromarray((array * 255).astype(np.uint8)), Image.fromarray(array > 0)):  # fmt: skip
        assert torch.equal(draw(tensor, mask), expected)
    gray = sampler_of(1)
    assert torch.isfinite(gray.sample(1, image=pictures[0], steps=2).images).all()
    clear = sampler_of(4)
    assert torch.isfinite(clear.sample(1, image=pictures[0].convert("RGBA"), steps=2).images).all()
    assert s.invert(pictures[0], steps=2).shape == (1, 3, 8, 8)


@pytest.mark.parametrize(
    "image",
    [
        [Image.new("RGB", (8, 8)), Image.new("RGB", (16, 8))],
        np.zeros((8, 8, 5), np.uint8),
        np.zeros((8, 8, 3), np.float64),
        np.array(["a"]),
        "photo.png",
        [],
        [1, 2],
        np.zeros((0, 8, 8, 3), np.uint8),
        np.zeros((8,), np.uint8),
        np.full((3, 8, 8), np.nan),
    ],
)
def test_images_that_are_refused(image: Any) -> None:
    with pytest.raises(InvalidArgument, match="image"):
        sampler_of().request(2, image=image)


@pytest.mark.parametrize("mask", [np.array(["a"]), "m.png", np.full((8, 8), 0.5), Image.new("L", (4, 4), 255), [1]])
def test_masks_that_are_refused(mask: Any) -> None:
    with pytest.raises(InvalidArgument, match="mask"):
        sampler_of().request(2, image=torch.zeros(3, 8, 8), mask=mask)


# Copies ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda s: pickle.loads(pickle.dumps(s))])
def test_copies_draw_the_same(copied: Any) -> None:
    schedule = fastdiff.NoiseSchedule("cosine", 100)
    for options in (
        {},
        {"dtype": "bfloat16", "backend": "eager"},
        {"determinism": "bitwise", "backend": "native"},
    ):
        first = Sampler(
            random_unet(TINY_CLASSES), schedule, prediction="v_prediction", class_names=list("abcde"),
            scheduler_config={"clip_sample": False}, **options,
        )  # fmt: skip
        out = first.sample(2, steps=2, labels="b").images
        second = copied(first)
        assert torch.equal(second.sample(2, steps=2, labels="b").images, out)
        for name in ("schedule", "prediction", "backend", "device", "dtype", "fast", "determinism", "scheduler_config",
                     "info"):  # fmt: skip
            assert getattr(second, name) == getattr(first, name), name
        second.close()
        assert torch.equal(first.sample(2, steps=2, labels="b").images, out)
        with pytest.raises(FastdiffError, match="closed"):
            copied(second)


def test_copies_of_samplers_of_other_modules() -> None:
    network = torch.nn.Conv2d(3, 3, 3, padding=1)

    first = Sampler(Wrapped(network), shape=(3, 8, 8))
    assert torch.equal(copy.deepcopy(first).sample(1, steps=2).images, first.sample(1, steps=2).images)
    assert copy.copy(first).unet is first.unet
    assert copy.deepcopy(first).unet is not first.unet


def test_guidance_of_each_step() -> None:
    """The column g of a table is a row's share of guidance: its scale is 1 + g (guidance - 1)."""
    s = Sampler(random_unet(TINY_CLASSES))
    options: dict[str, Any] = {"labels": 1, "seed": 3}
    table = s.request(1, steps=4, labels=1).table

    def with_shares(*shares: float) -> fastdiff.StepTable:
        rows = tuple(row._replace(g=g) for row, g in zip(table.rows, shares, strict=True))
        return dataclasses.replace(table, rows=rows)

    two = s.sample(1, solver=table, guidance=2.0, **options).images
    half = s.sample(1, solver=with_shares(0.5, 0.5, 0.5, 0.5), guidance=3.0, **options).images
    torch.testing.assert_close(half, two, rtol=1e-4, atol=1e-4)
    late = s.sample(1, solver=with_shares(0.0, 0.0, 1.0, 1.0), guidance=3.0, **options).images
    interval = s.sample(1, solver=table, guidance=3.0, guidance_interval=(0.5, 1.0), **options).images
    torch.testing.assert_close(late, interval, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(late, two, atol=1e-3)
    refused: tuple[Any, ...] = ([1.0, 2.0, 3.0, 4.0], lambda i: 2.0, "late")
    for guidance in refused:
        with pytest.raises(InvalidArgument, match="the column g of a table"):
            s.sample(2, steps=4, labels=1, guidance=guidance)


class Wrapped(torch.nn.Module):
    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.inner(x)


class Drawn(torch.utils.data.Dataset[torch.Tensor]):
    """A data set whose images are drawn in the worker."""

    def __init__(self, sampler: Sampler) -> None:
        self.sampler = sampler

    def __len__(self) -> int:
        return 2

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.sampler.sample(1, steps=2, start_index=index).images[0]


@pytest.mark.filterwarnings("ignore")
def test_spawned_workers() -> None:
    s = sampler_of()
    expected = s.sample(2, steps=2).images
    loader = torch.utils.data.DataLoader(
        Drawn(s), batch_size=2, num_workers=1, multiprocessing_context=multiprocessing.get_context("spawn")
    )
    (images,) = list(loader)
    torch.testing.assert_close(images, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_a_picture_of_any_kind_for_a_network_of_any_kind(channels: int) -> None:
    """Alpha is kept where the network's images have it, opaque where the picture has none, or composited over white."""
    clear = np.array([[[200, 100, 50, 128]]], np.uint8)
    over = ((clear[..., :3].astype(int) * 128 + 255 * 127 + 127) // 255).astype(np.uint8)
    luma = lambda rgb: np.array(Image.fromarray(rgb).convert("L"))[..., None]  # noqa: E731
    opaque = np.full((1, 1, 1), 255, np.uint8)
    rgb = clear[..., :3]
    expected = {
        1: (luma(over), luma(rgb)),
        2: (np.concatenate([luma(rgb), clear[..., 3:]], 2), np.concatenate([luma(rgb), opaque], 2)),
        3: (over, rgb),
        4: (clear, np.concatenate([rgb, opaque], 2)),
    }[channels]
    for given, want in zip((Image.fromarray(clear), Image.fromarray(rgb)), expected, strict=True):
        read = as_image(given.resize((8, 8), Image.Resampling.NEAREST), channels)
        assert read.shape == (1, channels, 8, 8)
        assert torch.equal(read[0, :, 3, 3], torch.from_numpy(want[0, 0]).float() / 127.5 - 1.0)
    assert torch.equal(
        as_image(np.tile(rgb, (8, 8, 1)), channels), as_image(Image.fromarray(np.tile(rgb, (8, 8, 1))), channels)
    )
