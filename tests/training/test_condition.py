"""Networks that go by a condition image: super-resolution, inpainting, colouring."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from fastdiff import checkpoints, cli
from fastdiff.data import ArrayData, ConditionedData, load_data
from fastdiff.data.pairs import open_pairs
from fastdiff.data.pictures import to_uint8
from fastdiff.errors import BackendError, DataError, InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.training.loss import target
from fastdiff.unet import UNet
from tests.support.unets import TINY, random_unet
from tests.training.toys import TOY, Toys, digests, log_of, toy_trainer

PAIRED = dataclasses.replace(TOY, in_channels=4, out_channels=1, num_class_embeds=None, null_label=None)
SCHEDULE = NoiseSchedule("cosine", 20)


def pairs(n: int = 10) -> ConditionedData:
    return ConditionedData(Toys(n, classes=None), Toys(n, channels=3, classes=None))


def unet_of(**changes: Any) -> UNet:
    torch.manual_seed(1)
    return UNet(dataclasses.replace(PAIRED, **changes))


def test_the_loss_is_of_the_image_alone(tmp_path: Path) -> None:
    """Noise is added to the first channels; the network reads the others as they are."""
    unet = unet_of()
    trainer = toy_trainer(tmp_path, unet=unet, data=pairs())
    images, _ = trainer.data.__getitems__([0, 1, 2])
    x0, noise, t, _ = trainer._batch(images, None, range(3))
    assert noise.shape == (3, 1, 8, 8)
    loss = trainer._loss(trainer.unet, x0, noise, t, None)
    a, s = trainer.schedule.signal_and_noise(t, 4, torch.float32)
    image, condition = (images.float() / 127.5 - 1.0).split([1, 3], dim=1)
    out = unet(torch.cat([a * image + s * noise, condition], dim=1), t)
    assert torch.allclose(loss, ((out - target("epsilon", image, noise, a, s)) ** 2).mean(), rtol=1e-5)


@pytest.mark.slow
def test_it_learns_to_copy_the_condition(tmp_path: Path) -> None:
    """Where the condition is the image itself, the network that is trained with it draws what it is given."""
    data = Toys(64, classes=None)
    trainer = toy_trainer(
        tmp_path, unet=unet_of(in_channels=2, block_out_channels=(16,)), data=ConditionedData(data, data), steps=300,
        batch_size=32, lr=5e-3, ema_decay=0.9, prediction="sample", log_every=100, save_every=300,
    )  # fmt: skip
    trainer.fit()
    images = data.__getitems__(range(4))[0].float() / 127.5 - 1.0
    sampler = Sampler.from_pretrained(tmp_path / "model", device="cpu")
    assert sampler.backend == "eager"
    drawn = sampler.sample(4, steps=10, condition=images).images
    assert (drawn - images).abs().mean() < 0.25
    assert (drawn - images.roll(1, 0)).abs().mean() > 0.5


def test_a_run_resumes_and_draws_grids(tmp_path: Path) -> None:
    for out, steps in (("a", (3, 6)), ("b", (6,))):
        for k in steps:
            toy_trainer(tmp_path / out, unet=unet_of(), data=pairs(), steps=k, sample_every=3, hflip=True).fit()
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    assert [line["step"] for line in log_of(tmp_path / "a")][-1] == 6
    with Image.open(tmp_path / "a" / "samples" / "step-0000006.png") as grid:
        assert grid.size == (8 * 10 + 2, 8 * 10 + 2)


def test_images_do_not_depend_on_their_batch() -> None:
    sampler = Sampler(unet_of(), SCHEDULE, shape=None)
    condition = torch.rand(5, 3, 8, 8) * 2 - 1
    whole = sampler.sample(5, steps=4, condition=condition).images
    parts = sampler.sample(5, steps=4, condition=condition, batch_size=2).images
    torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
    alone = sampler.sample(1, steps=4, condition=condition[3], start_index=3).images
    torch.testing.assert_close(alone, whole[3:4], rtol=1e-4, atol=1e-4)
    other = sampler.sample(1, steps=4, condition=condition[2], start_index=3).images
    assert (other - alone).abs().max() > 1e-3
    pixels = ((condition + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    read = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1.0
    expected = sampler.sample(5, steps=4, condition=read).images
    for given in (pixels, [Image.fromarray(p) for p in pixels]):
        assert torch.equal(sampler.sample(5, steps=4, condition=given).images, expected)
    seconds = sampler.request(2, condition=condition[:2], solver="unipc", steps=3)
    assert seconds.shape == (1, 8, 8)


def test_guidance_with_a_condition() -> None:
    config = dataclasses.replace(PAIRED, num_class_embeds=4, null_label=3)
    unet = random_unet(config)
    sampler = Sampler(unet, SCHEDULE)
    condition = torch.rand(2, 3, 8, 8) * 2 - 1
    drawn = sampler.sample(2, steps=1, labels=1, guidance=2.0, condition=condition, clip=None)
    x, t = sampler.request(2, steps=1, labels=1, condition=condition).table.rows[0], drawn.table.rows[0].t
    assert x.t == t
    plain = sampler.sample(2, steps=1, labels=1, condition=condition, clip=None).images
    null = sampler.sample(2, steps=1, condition=condition, clip=None).images
    torch.testing.assert_close(drawn.images, null + 2.0 * (plain - null), rtol=1e-3, atol=1e-3)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    sampler = Sampler(unet_of(), SCHEDULE)
    good = torch.zeros(3, 8, 8)
    for options, words in (
        ({}, "it needs condition= with 3 channels"),
        ({"condition": torch.zeros(1, 8, 8)}, "condition has shape (1, 8, 8)"),
        ({"condition": torch.full((3, 8, 8), float("nan"))}, "condition has NaN"),
        ({"condition": torch.zeros(3, 16, 16), "size": 8}, "condition is 16x16"),
        ({"condition": "a.png"}, "condition is a str"),
        ({"condition": good, "image": torch.zeros(1, 16, 16)}, "condition is 8x8"),
    ):
        with pytest.raises(InvalidArgument) as caught:
            sampler.request(2, **options)
        assert words in str(caught.value), caught.value
    with pytest.raises(InvalidArgument, match="condition= is for networks"):
        Sampler(random_unet(TINY), SCHEDULE).request(1, condition=torch.zeros(3, 8, 8))
    for backend in ("native", "triton", "compiled"):
        with pytest.raises(BackendError, match="condition image of 3 channels, which eager alone"):
            Sampler(unet_of(), SCHEDULE, backend=backend)
    with pytest.raises(DataError, match="10 images of 8x8, but 9 condition images"):
        ConditionedData(Toys(10), Toys(9))
    with pytest.raises(InvalidArgument, match="the images have 2 channels, the U-Net takes 4"):
        toy_trainer(tmp_path, unet=unet_of(), data=ConditionedData(Toys(), Toys()))
    with pytest.raises(InvalidArgument, match="or fewer with a condition image"):
        toy_trainer(tmp_path, unet=unet_of(in_channels=1, out_channels=2), data=Toys())


def test_a_saved_network_keeps_its_channels(tmp_path: Path) -> None:
    checkpoints.save_folder(tmp_path / "m", unet_of(), SCHEDULE)
    sampler = Sampler.from_pretrained(tmp_path / "m", device="cpu")
    assert (sampler.info.channels, sampler.info.condition) == (1, 3)
    rng = np.random.default_rng(0)
    data = ConditionedData(
        ArrayData(Path("a"), rng.integers(0, 256, (2, 8, 8, 1), np.uint8), None, None, 1, "crop"),
        ArrayData(Path("b"), rng.integers(0, 256, (2, 8, 8, 3), np.uint8), None, None, 3, "crop"),
    )
    images, labels = data.__getitems__([1, 0])
    assert images.shape == (2, 4, 8, 8)
    assert labels is None
    assert data.digest != ConditionedData(data.condition, data.images).digest


# The command line -----------------------------------------------------------------------------------------------------


def save_pairs(folder: Path, names: list[str]) -> None:
    """Write colour pictures to ``colour``, of a quarter of 16x16, and their gray shades to ``gray``."""
    rng = np.random.default_rng(0)
    for name in names:
        pixels = np.repeat(np.repeat(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8), 2, 0), 2, 1)
        for kind, mode in (("colour", "RGB"), ("gray", "L")):
            file = folder / kind / f"{name}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).convert(mode).save(file)


def command(*arguments: object) -> Any:
    return CliRunner().invoke(cli.app, [str(a) for a in arguments])


TRAIN = ("--size", "8", "--channels", "8", "--groups", "4", "--layers", "1", "--attention", "", "--timesteps", "20",
         "--steps", "2", "--batch-size", "2", "--log-every", "1", "--sample-every", "2", "--device", "cpu")  # fmt: skip


def test_training_and_sampling_with_pictures_in_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    save_pairs(tmp_path, ["cats/b", "cats/a", "dogs/c", "dogs/d"])
    (tmp_path / "gray" / "dogs" / "d.png").rename(tmp_path / "gray" / "dogs" / "e.png")
    result = command("train", "colour", "--condition", "gray", "-o", "run", *TRAIN)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert (summary["data"]["images"], summary["data"]["channels"], summary["network"]["classes"]) == (3, 4, 2)
    assert {Path(entry["file"]).name for entry in summary["data"]["skipped_files"]} == {"d.png", "e.png"}
    sampler = Sampler.from_pretrained("run/model", backend="eager", device="cpu")
    assert (sampler.info.channels, sampler.info.condition) == (3, 1)

    shown = ("sample", "run/model", "--n", "3", "--labels", "0", "--steps", "2", "--device", "cpu")
    gray = [Image.open(f"gray/cats/{name}.png") for name in "ab"]
    for given, expected in (("gray/cats", [gray[0], gray[1], gray[0]]), ("gray/cats/b.png", gray[1])):
        result = command(*shown, "--condition", given, "-o", "drawn.npz")
        assert result.exit_code == 0, result.output
        condition = expected if isinstance(expected, list) else [expected] * 3
        own = sampler.sample(3, labels=0, steps=2, condition=condition)
        with np.load("drawn.npz", allow_pickle=False) as drawn:
            assert np.array_equal(drawn["images"], to_uint8(own.images))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--condition", "none"), "no such file or folder"),
        (("--condition", "empty"), "no pictures"),
        (("--condition", "text.png"), "cannot be read"),
        (("--condition", "small.png"), "smaller than 8x8"),
        ((), "give it with --condition"),
    ],
)
def test_what_is_no_condition_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.save_folder(tmp_path / "model", unet_of(), SCHEDULE)
    (tmp_path / "empty").mkdir()
    (tmp_path / "text.png").write_text("no image")
    Image.new("L", (4, 4)).save("small.png")
    Image.new("RGB", (8, 8)).save("gray.png")
    result = command("sample", "model", "-n", "2", "--steps", "2", "--device", "cpu", *arguments)
    assert result.exit_code != 0
    assert isinstance(result.exception, InvalidArgument)
    assert said in str(result.exception)


def test_a_network_without_a_condition_takes_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoints.save_folder(tmp_path / "model", random_unet(TINY), SCHEDULE)
    Image.new("L", (8, 8)).save("gray.png")
    result = command("sample", "model", "--device", "cpu", "--condition", "gray.png")
    assert "this one has not" in str(result.exception)


def test_folders_without_pairs_are_refused(tmp_path: Path) -> None:
    save_pairs(tmp_path, ["a", "b"])
    images, grays = (load_data(tmp_path / kind) for kind in ("colour", "gray"))
    with pytest.raises(InvalidArgument, match="two folders"):
        open_pairs(images, Toys(2))
    for file in (tmp_path / "gray").iterdir():
        file.rename(file.with_stem(f"x{file.stem}"))
    with pytest.raises(DataError, match=r"no file of .* has the name"):
        open_pairs(images, load_data(tmp_path / "gray"))
    Image.new("L", (8, 8)).save(tmp_path / "gray" / "xa.jpg")
    with pytest.raises(DataError, match="have one name, xa"):
        open_pairs(images, load_data(tmp_path / "gray"))
    assert len(grays) == 2


def test_a_damaged_image_is_replaced_by_the_next_pair(tmp_path: Path) -> None:
    """Neither an image nor a condition image is ever joined with another one's."""
    names = [f"{i:03d}" for i in range(8)]
    save_pairs(tmp_path, names)
    images, grays = (load_data(tmp_path / kind) for kind in ("colour", "gray"))
    expected = open_pairs(images, grays).__getitems__([4, 3, 4, 7])[0]
    damaged = open_pairs(load_data(tmp_path / "colour"), load_data(tmp_path / "gray"))
    (tmp_path / "colour" / "002.png").write_bytes(b"torn")
    (tmp_path / "gray" / "003.png").write_bytes(b"torn")
    Image.new("L", (8, 8)).save(tmp_path / "gray" / "extra.png")
    found = damaged.__getitems__([2, 4, 3, 7])[0]
    assert torch.equal(found[1], expected[0])
    assert torch.equal(found[0], expected[0])  # the image of 2 is torn, and the condition of 3
    assert torch.equal(found[2], expected[0])
    assert torch.equal(found[3], expected[3])
