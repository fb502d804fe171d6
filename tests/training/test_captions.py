"""Training from captions."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, TrainConfig, Trainer
from fastdiff.errors import DataError, InvalidArgument, TrainingError
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig
from fastdiff.training import ArrayData
from tests.support.captioned import TEXT, network_and_encoder
from tests.training.toys import SHORT, toy_unet

COLOURS = {"red": (220, 20, 20), "green": (20, 200, 20), "blue": (20, 20, 220)}


class Captioned(ArrayData):
    """Plain pictures of three colours, with captions that name them."""

    def __init__(self, n: int = 12, captions: Sequence[str] | None = None):
        names = [list(COLOURS)[i % 3] for i in range(n)]
        pixels = np.array([COLOURS[name] for name in names], np.uint8)[:, None, None].repeat(8, 1).repeat(8, 2)
        super().__init__(Path("colours"), pixels, None, None, 3, "crop")
        self.captions = captions or [f"a {name} picture" for name in names]


def trainer(out: Path, data: ArrayData | None = None, config: dict[str, Any] | None = None, **changes: Any) -> Trainer:
    unet, encoder = network_and_encoder(**changes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Trainer(
            unet.zero_residuals_(), data or Captioned(), out, TrainConfig(**{**SHORT, **(config or {})}),
            NoiseSchedule("cosine"), text_encoder=encoder,
        )  # fmt: skip


def test_gradients_reach_the_encoder_and_captions_are_dropped(tmp_path):
    t = trainer(tmp_path, config={"label_dropout": 0.5, "batch_size": 8})
    images, tokens = t._read(range(8))
    assert tokens is not None
    assert tokens.tolist() == [t.text_encoder.tokenize(t.data.captions[i]) for i in t._indices(range(8))]
    *_, dropped = t._batch(images, tokens, range(8))
    null = torch.tensor(t.text_encoder.tokenize(""))
    empty = (dropped == null).all(dim=1)
    assert 0 < int(empty.sum()) < 8
    assert torch.equal(dropped[~empty], tokens[~empty])
    before = {name: p.clone() for name, p in t.text_encoder.named_parameters()}
    t.fit()
    assert all(not torch.equal(p, before[name]) for name, p in t.text_encoder.named_parameters())
    assert (tmp_path / "model" / "text_encoder" / "config.json").exists()


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.fit()
    trainer(tmp_path / "parts", config={"steps": 3}).fit()
    parts = trainer(tmp_path / "parts")
    parts.fit()
    for a, b in ((whole.unet, parts.unet), (whole.text_encoder, parts.text_encoder), (whole.ema, parts.ema)):
        for (name, p), q in zip(a.state_dict().items(), b.state_dict().values(), strict=True):
            assert torch.equal(p, q), name


def test_checkpoint_run_folder_and_model_draw_the_same(tmp_path):
    t = trainer(tmp_path, config={"sample_every": 3})
    t.fit()
    assert (tmp_path / "samples" / "step-0000006.png").exists()
    want = Sampler(t.ema, t.schedule, text_encoder=t.ema_text_encoder).sample(2, prompts="a red picture", steps=2)
    for path in (tmp_path / "model", tmp_path, tmp_path / "checkpoint.safetensors"):
        images = Sampler.from_pretrained(path).sample(2, prompts="a red picture", steps=2).images
        assert torch.equal(images, want.images)
    present = Sampler.from_pretrained(tmp_path / "checkpoint.safetensors", weights="model")
    assert not torch.equal(present.sample(2, prompts="a red picture", steps=2).images, want.images)


def test_a_run_with_another_encoder_is_not_resumed(tmp_path):
    trainer(tmp_path, config={"steps": 2}).fit()
    unet, _ = network_and_encoder()
    encoder = CaptionEncoder(CaptionEncoderConfig.from_dict({**TEXT.to_dict(), "tokens": 9}))
    other = Trainer(unet, Captioned(), tmp_path, TrainConfig(**SHORT), NoiseSchedule("cosine"), text_encoder=encoder)
    with pytest.raises(TrainingError, match="text_encoder: tokens 8 then, 9 now"):
        other.fit()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"cross_attention_dim": 24}, "set cross_attention_dim=16"),
        ({"class_embed_type": "timestep"}, "class_embed_type='timestep'"),
        ({"projection_class_embeddings_input_dim": 24}, "it must be the channels of the text encoder, 16"),
        ({"class_embed_type": None, "num_class_embeds": 3}, "and no classes"),
        ({"time_cond_proj_dim": 8}, "time_cond_proj_dim=8"),
    ],
)
def test_networks_that_do_not_fit(tmp_path, changes, message):
    with pytest.raises(InvalidArgument, match=message):
        trainer(tmp_path, **changes)


def test_data_that_do_not_fit(tmp_path):
    plain = Captioned()
    plain.captions = None
    with pytest.raises(InvalidArgument, match="the data has no captions"):
        trainer(tmp_path, plain)
    with pytest.raises(InvalidArgument, match="3 captions for 12 images"):
        trainer(tmp_path, Captioned(captions=["a", "b", "c"]))
    bad = trainer(tmp_path, Captioned(captions=["a dog"] * 11 + ["dog " * 50]))
    with pytest.raises(DataError, match="caption of image 11: the text has 50 pieces of words; at most 6 fit"):
        bad.fit()
    with pytest.raises(DataError, match="caption of image"):
        trainer(tmp_path, Captioned(captions=[7] * 12)).fit()  # type: ignore[list-item]
    unet, encoder = network_and_encoder()
    with pytest.raises(InvalidArgument, match="unet"):
        Trainer(toy_unet(), Captioned(), tmp_path, text_encoder=encoder)
    with pytest.raises(InvalidArgument, match="unet"):
        Trainer(unet, Captioned(), tmp_path)
    with pytest.raises(InvalidArgument, match="gradient_checkpointing=True"):
        trainer(tmp_path, config={"gradient_checkpointing": True})


@pytest.mark.slow
def test_it_learns_what_captions_say(tmp_path):
    """After a short training the colour of an image is that of its prompt."""
    t = trainer(tmp_path, config={"steps": 120, "batch_size": 12, "lr": 1e-2, "lr_warmup": 20, "prediction": "sample"})
    t.fit()
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < log[0]["loss"] / 3
    sampler = Sampler.from_pretrained(tmp_path)
    for i, name in enumerate(COLOURS):
        mean = sampler.sample(4, prompts=f"a {name} picture", steps=8, guidance=2.0).images.mean(dim=(0, 2, 3))
        assert int(mean.argmax()) == i
