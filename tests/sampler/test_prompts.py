"""Sampling from prompts: the same images alone and in a batch, guidance, files, and what is refused."""

from __future__ import annotations

import copy
import json
import pickle
import sys

import numpy as np
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, UNet, UNetConfig, checkpoints
from fastdiff.backends import native
from fastdiff.cli import main
from fastdiff.errors import BackendError, CheckpointError, ConfigError, InvalidArgument
from fastdiff.sampler.loop import initial_noise
from tests.support.captioned import network_and_encoder

CALL = {"steps": 3, "solver": "dpmpp_2m"}


BACKENDS = ["eager", *(["native"] if native.extension() is not None else [])]


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request):
    unet, encoder = network_and_encoder()
    schedule = NoiseSchedule("cosine")
    return Sampler(unet, schedule, prediction="v_prediction", text_encoder=encoder, backend=request.param)


def test_a_run_is_a_loop_by_hand(sampler):
    """Two prompts, guidance and a negative text, as a loop over the table that calls the network itself."""
    prompts, negative = ["a white dog", "a car at night"], ["", "a dog"]
    output = sampler.sample(2, prompts=prompts, negative=negative, guidance=[2.0, 4.0], solver="ddim", steps=4, seed=3)
    unet, encoder, schedule = sampler.unet, sampler.text_encoder, sampler.schedule
    x = initial_noise([3, 3], [0, 1], (3, 8, 8), torch.device("cpu"))
    states = {text: encoder.encode(text) for text in (*prompts, *negative)}
    abar = torch.tensor(schedule.alphas_cumprod)
    timesteps = [int(row.t) for row in output.table.rows]
    with torch.no_grad():
        for i, t in enumerate(timesteps):
            found = []
            for texts in (prompts, negative):
                context, pooled = (torch.stack([states[text][k] for text in texts]) for k in (0, 1))
                found.append(unet(x, torch.tensor([t, t]), context, class_labels=pooled))
            v = found[1] + torch.tensor([2.0, 4.0])[:, None, None, None] * (found[0] - found[1])
            a, s = abar[t].sqrt(), (1 - abar[t]).sqrt()
            x0 = (a * x.double() - s * v.double()).clamp(-1, 1)
            eps = (x.double() - a * x0) / s
            after = abar[timesteps[i + 1]] if i + 1 < len(timesteps) else torch.tensor(1.0, dtype=torch.float64)
            x = (after.sqrt() * x0 + (1 - after).sqrt() * eps).float()
    assert (output.images - x).abs().max() < 1e-4


def test_prompts_matter_and_order_does_not(sampler):
    prompts = ["a white dog", "a car at night", "", "a dog"]
    together = sampler.sample(4, prompts=prompts, guidance=3.0, **CALL)
    assert together.prompts == tuple(prompts)
    assert together.labels is None
    assert (together.images[0] - together.images[3]).abs().max() > 1e-3
    for i in range(4):
        alone = sampler.sample(1, prompts=prompts[i], guidance=3.0, start_index=i, **CALL)
        assert (alone.images[0] - together.images[i]).abs().max() < 1e-5
    turned = sampler.sample(4, prompts=prompts[::-1], guidance=3.0, index=[3, 2, 1, 0], **CALL)
    assert (turned.images.flip(0) - together.images).abs().max() < 1e-5
    parts = sampler.sample(4, prompts=prompts, guidance=3.0, batch_size=3, **CALL)  # the last batch is padded
    assert (parts.images - together.images).abs().max() < 1e-5


def test_a_negative_text_is_what_guidance_leaves(sampler):
    plain = sampler.sample(1, prompts="a dog", guidance=3.0, **CALL).images
    assert torch.equal(plain, sampler.sample(1, prompts="a dog", negative="", guidance=3.0, **CALL).images)
    assert not torch.equal(plain, sampler.sample(1, prompts="a dog", negative="snow", guidance=3.0, **CALL).images)
    same = sampler.sample(1, prompts="a dog", negative="a dog", guidance=3.0, **CALL).images
    assert (same - sampler.sample(1, prompts="a dog", **CALL).images).abs().max() < 1e-4


def test_other_methods_take_prompts(sampler):
    image = sampler.sample(1, prompts="a dog", steps=20).images
    noise = sampler.invert(image, steps=50, prompts="a dog")
    back = sampler.sample(1, noise=noise, steps=50, prompts="a dog", clip=None).images
    other = sampler.sample(1, noise=noise, steps=50, prompts="snow on a car", clip=None).images
    assert (back - image).abs().mean() < (other - image).abs().mean()
    events = list(sampler.stream(1, prompts="a dog", **CALL))
    assert torch.equal(events[-1].x, sampler.sample(1, prompts="a dog", **CALL).images)
    table = sampler.adapt(2, prompts="a dog", rtol=1.0, atol=1.0)
    assert sampler.sample(2, prompts="a dog", solver=table).images.shape == (2, 3, 8, 8)
    known = torch.zeros(1, 3, 8, 8)
    edited = sampler.sample(1, prompts="a dog", image=known, strength=0.5, **CALL)
    assert edited.images.shape == (1, 3, 8, 8)


def test_copies_and_pickles_keep_the_encoder(sampler):
    want = sampler.sample(1, prompts="a dog", **CALL).images
    for other in (copy.deepcopy(sampler), pickle.loads(pickle.dumps(sampler))):
        assert torch.equal(other.sample(1, prompts="a dog", **CALL).images, want)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prompts= is needed"),
        ({"prompts": ["a", "b", "c"]}, "prompts has more than 2 entries"),
        ({"prompts": ["a"]}, "one text, or 2 of them"),
        ({"prompts": 7}, "prompts"),
        ({"prompts": b"a dog"}, "prompts"),
        ({"prompts": ["a dog", 3]}, r"prompts\[1\]=3"),
        ({"prompts": "dog " * 10_000}, "10000 pieces of words; at most 6 fit"),
        ({"prompts": "a dog", "labels": 3}, "labels=3: this network reads text"),
        ({"prompts": "a dog", "negative": ["", "x", ""]}, "negative"),
    ],
)
def test_refused_calls(sampler, options, message):
    with pytest.raises(InvalidArgument, match=message):
        sampler.sample(2, steps=2, **options)


def test_prompts_for_networks_that_read_none():
    config = UNetConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",), layers_per_block=1, norm_num_groups=4,
    )  # fmt: skip
    plain = Sampler(UNet(config), backend="eager")
    with pytest.raises(InvalidArgument, match="prompts='a dog': this network has no text conditioning"):
        plain.sample(1, prompts="a dog")
    with pytest.raises(InvalidArgument, match=r"prompts='a dog': this network has classes; labels="):
        Sampler.from_pretrained("fashion-mnist").sample(1, prompts="a dog")
    _, encoder = network_and_encoder()
    with pytest.raises(InvalidArgument, match=r"text_encoder= is for a fastdiff\.UNetCondition"):
        Sampler(UNet(config), text_encoder=encoder)


def test_networks_that_need_more_than_a_text():
    unet, encoder = network_and_encoder()
    with pytest.raises(ConfigError, match="class_embed_type"):
        Sampler(unet)
    plain, _ = network_and_encoder(class_embed_type=None)
    with pytest.raises(ConfigError, match="the network reads text, which text_encoder= encodes"):
        Sampler(plain)
    with pytest.raises(InvalidArgument, match=r"tokenize\(text\) and encode\(text\) are needed"):
        Sampler(plain, text_encoder="clip")  # type: ignore[arg-type]
    timestep, _ = network_and_encoder(class_embed_type="timestep")
    with pytest.raises(ConfigError, match="class_embed_type='timestep'"):
        Sampler(timestep, text_encoder=encoder)
    with pytest.raises(BackendError, match="reads text"):
        Sampler(unet, text_encoder=encoder, backend="compiled")


def test_a_network_without_pooled_vector():
    unet, encoder = network_and_encoder(class_embed_type=None)
    sampler = Sampler(unet, text_encoder=encoder)
    images = sampler.sample(2, prompts=["a dog", "a car"], guidance=2.0, **CALL).images
    assert images.isfinite().all()


def test_a_folder_and_the_command_line(sampler, tmp_path, capsys, monkeypatch):
    """A saved model draws the same images, by `from_pretrained` and by ``fastdiff sample --prompt``."""
    folder = tmp_path / "model"
    checkpoints.save_folder(
        folder, sampler.unet, sampler.schedule, prediction="v_prediction", text_encoder=sampler.text_encoder
    )
    want = sampler.sample(4, prompts=["a dog", "a car"] * 2, negative="snow", guidance=2.0, steps=3)
    loaded = Sampler.from_pretrained(folder, backend=sampler.backend)
    again = loaded.sample(4, prompts=["a dog", "a car"] * 2, negative="snow", guidance=2.0, steps=3)
    assert torch.equal(again.images, want.images)
    arguments = ["sample", str(folder), "--prompt", "a dog", "--prompt", "a car", "--negative", "snow", "--guidance"]
    out = tmp_path / "drawn.npz"
    monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments, "2", "-n", "4", "--steps", "3", "-o", str(out), "--json"])
    with pytest.raises(SystemExit) as stop:
        main()
    assert not stop.value.code
    assert json.loads(capsys.readouterr().out)["images"] == 4
    with np.load(out) as file:
        assert file["prompts"].tolist() == ["a dog", "a car"] * 2
        assert np.abs(file["images"].astype(int) - _bytes(want.images)).max() <= 1


def _bytes(images: torch.Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().permute(0, 2, 3, 1).numpy().astype(int)


def test_damaged_encoders_are_refused_by_name(sampler, tmp_path):
    folder = tmp_path / "model"
    checkpoints.save_folder(folder, sampler.unet, sampler.schedule, text_encoder=sampler.text_encoder)
    config = folder / "text_encoder" / "config.json"
    text = config.read_text()
    config.write_text(text.replace('"layers": 1', '"layers": 2'))
    with pytest.raises(CheckpointError, match=r"does not fit this text encoder: layers\.1\..* is missing"):
        Sampler.from_pretrained(folder)
    config.write_text(text.replace('"tokens": 8', '"tokens": 9'))
    with pytest.raises(CheckpointError, match=r"position\.weight is \(8, 16\), \(9, 16\) is needed"):
        Sampler.from_pretrained(folder)
    config.write_text(text.replace('"tokens"', '"token"'))
    with pytest.raises(ConfigError, match=r"config\.json: unknown keys"):
        Sampler.from_pretrained(folder)
    with pytest.raises(CheckpointError, match="preset='x' does not apply"):
        Sampler.from_pretrained(folder, preset="x")
    with pytest.raises(InvalidArgument, match=r"a fastdiff\.UNet alone"):
        checkpoints.save_folder(tmp_path / "other", sampler.unet, sampler.schedule)
