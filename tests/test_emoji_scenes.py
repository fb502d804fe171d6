"""The scenes and captions of the recipe of emoji scenes, with sprites of plain shapes in place of the emoji."""

from __future__ import annotations

import collections
import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn

from fastdiff import NoiseSchedule, Sampler, TrainConfig, Trainer, UNetCondition
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig
from recipes.emoji_scenes import judge as recipe
from recipes.emoji_scenes import scenes, words
from recipes.emoji_scenes import train as training
from recipes.emoji_scenes.sprites import NOUNS, SETS, SIDE
from tests.support.captioned import network_and_encoder


@pytest.fixture(scope="module")
def composer(tmp_path_factory):
    """Return a composer whose sprites are discs that are darker further down."""
    y, x = np.mgrid[:SIDE, :SIDE]
    disc = (x - SIDE / 2) ** 2 + (y - SIDE / 2) ** 2 < (SIDE / 2) ** 2
    sprite = np.zeros((SIDE, SIDE, 4), np.uint8)
    sprite[..., :3] = (160 - y)[..., None]
    sprite[..., 3] = np.where(disc, 255, 0)
    path = tmp_path_factory.mktemp("emoji") / "sprites.npz"
    numbers = np.tile(np.arange(len(NOUNS)), len(SETS))
    np.savez(path, sprites=np.stack([sprite] * len(numbers)), nouns=numbers, names=NOUNS)
    return scenes.Composer(path)


@pytest.mark.parametrize("part", ["train", "seen", "held-out"])
def test_scenes_are_functions_of_seed_and_index(composer, part):
    for i in range(20):
        picture = scenes.picture_of(composer, 3, i, part)
        assert np.array_equal(picture, scenes.picture_of(composer, 3, i, part))
        assert scenes.caption_of(3, i, part) == scenes.caption_of(3, i, part)
        assert scenes.scene_of(3, i, part) == scenes.scene_of(3, i, part)
        assert picture.shape == (32, 32, 3)
        assert picture.dtype == np.uint8
    assert len({scenes.caption_of(3, i, part) for i in range(20)}) > 15


def test_held_out_pairs_are_never_trained(composer):
    """15 % of the pairs are held out, among them the documentation's example, and scenes of both parts keep to it."""
    pairs = [("colour", colour, noun) for colour in scenes.COLOURS for noun in NOUNS]
    pairs += [("ground", noun, ground) for noun in NOUNS for ground in scenes.GROUNDS]
    share = np.mean([scenes.held_out(*pair) for pair in pairs])
    assert 0.12 < share < 0.18
    assert scenes.held_out("colour", "white", "dog")
    assert scenes.held_out("ground", "dog", "grass")
    for i in range(200):
        for part in ("train", "seen", "held-out"):
            scene = scenes.scene_of(0, i, part)
            kept = (bool(scene.colour) and scenes.held_out("colour", scene.colour, scene.noun)) or scenes.held_out(
                "ground", scene.noun, scene.ground
            )
            assert kept == (part == "held-out")
            assert scene.colour or part == "train"


def test_captions_say_what_a_scene_shows(composer):
    said = collections.Counter()
    for i in range(500):
        text, scene = scenes.caption_of(1, i), scenes.scene_of(1, i)
        text = text.lower()
        assert scene.noun in text
        colour = (scene.colour, *scenes.COLOUR_WORDS[scene.colour]) if scene.colour else ()
        phrases = scenes.PHRASES[scene.ground]
        said["colour"] += any(word in text for word in colour)
        said["ground"] += any(text.endswith(phrase) for phrase in phrases)
        if scene.size:
            said["size"] += any(word in text for word in scenes.SIZE_WORDS[scene.size])
        wrong = [p for g, ps in scenes.PHRASES.items() if g != scene.ground for p in ps if text.endswith(" " + p)]
        assert not wrong
    assert said["colour"] > 300
    assert said["ground"] > 430
    assert said["size"] > 130


@pytest.mark.parametrize("colour", scenes.COLOURS)
def test_a_recoloured_sprite_has_the_colour(composer, colour):
    """The one of the ten colours that is nearest to the median of the sprite is the one asked for."""
    sprite = composer.sprites["dog"][0]
    result = scenes.recoloured(sprite, scenes.COLOURS[colour])
    assert np.array_equal(result[..., 3], sprite[..., 3])
    inside = result[sprite[..., 3] > 0][:, :3].astype(float)
    distances = {
        name: np.abs(np.median(inside, axis=0) - np.array(value)).sum() for name, value in scenes.COLOURS.items()
    }
    assert min(distances, key=lambda name: distances[name]) == colour


def test_sprites_lie_within_the_scene(composer):
    """The sprite of every place and size changes pixels of the ground, as many as its disc has."""
    for i in range(100):
        choose = np.random.default_rng(i)
        scene = scenes.draw_scene(choose)
        with_sprite = composer.picture(scene, np.random.default_rng(i))
        alone = np.clip(np.rint(scenes.ground(scene.ground, np.random.default_rng(i))), 0, 255)
        changed = (np.abs(with_sprite - alone) > 0).any(-1).sum()
        low, high = scenes.SIZES[scene.size]
        assert 0.6 * np.pi / 4 * low**2 <= changed <= np.pi / 4 * (high + 1.5) ** 2


def test_sprites_of_other_nouns_are_refused(tmp_path):
    np.savez(tmp_path / "s.npz", sprites=np.zeros((1, 2, 2, 4), np.uint8), nouns=np.zeros(1, int), names=("stone",))
    with pytest.raises(SystemExit, match="run it again"):
        scenes.Composer(tmp_path / "s.npz")


def random_bert():
    """Return BERT's weights by their names, and the same layers of torch."""
    torch.manual_seed(0)
    weights = {
        "embeddings.word_embeddings.weight": torch.randn(9, words.WIDTH),
        "embeddings.position_embeddings.weight": torch.randn(5, words.WIDTH),
        "embeddings.token_type_embeddings.weight": torch.randn(2, words.WIDTH),
        "embeddings.LayerNorm.weight": torch.ones(words.WIDTH),
        "embeddings.LayerNorm.bias": torch.zeros(words.WIDTH),
    }
    layers = []
    for i in range(words.LAYERS):
        layer = nn.TransformerEncoderLayer(
            words.WIDTH, words.HEADS, 1536, 0.0, "gelu", layer_norm_eps=1e-12, batch_first=True
        )
        layers.append(layer)
        own = {
            "attention.output.dense": layer.self_attn.out_proj, "attention.output.LayerNorm": layer.norm1,
            "intermediate.dense": layer.linear1, "output.dense": layer.linear2, "output.LayerNorm": layer.norm2,
        }  # fmt: skip
        for kind in ("weight", "bias"):
            qkv = getattr(layer.self_attn, f"in_proj_{kind}").chunk(3)
            for name, part in zip(("query", "key", "value"), qkv, strict=True):
                weights[f"encoder.layer.{i}.attention.self.{name}.{kind}"] = part
            weights |= {f"encoder.layer.{i}.{name}.{kind}": getattr(module, kind) for name, module in own.items()}
    return weights, layers


@torch.no_grad()
def test_the_encoder_of_words_is_bert():
    weights, layers = random_bert()
    ids = torch.tensor([[2, 5, 3, 8], [2, 7, 7, 3]])
    x = weights["embeddings.word_embeddings.weight"][ids] + weights["embeddings.position_embeddings.weight"][:4]
    x = F.layer_norm(x + weights["embeddings.token_type_embeddings.weight"][0], (words.WIDTH,), eps=1e-12)
    for layer in layers:
        x = layer.train()(x)  # without the shortcuts of evaluation
    torch.testing.assert_close(words.encode(weights, ids), x, rtol=1e-4, atol=1e-5)


def test_the_table_of_words_keeps_what_is_alike():
    """Vectors of 200 numbers that 100 numbers describe keep their order of likeness as bytes."""
    generator = torch.Generator().manual_seed(0)
    vectors = torch.randn(500, 100, generator=generator) @ torch.randn(100, 200, generator=generator)
    table, scale = words.reduced(vectors)
    assert (table.dtype, tuple(table.shape), tuple(scale.shape)) == (torch.int8, (500, 128), (128,))
    found = F.normalize(table.float() * scale, dim=-1)
    nearest = found @ F.normalize(found[:50] + 0.1 * torch.randn(50, 128, generator=generator), dim=-1).T
    assert nearest.argmax(0).tolist() == list(range(50))
    kept = torch.corrcoef(
        torch.stack(
            [
                (found @ found.T).flatten(),
                F.cosine_similarity(
                    vectors[:, None] - vectors.mean(0), vectors[None] - vectors.mean(0), dim=-1
                ).flatten(),
            ]
        )
    )[0, 1]
    assert kept > 0.8


@pytest.mark.slow
def test_the_judge_and_its_measurement(composer, tmp_path, capsys):
    """A judge learns grounds and colours in a few steps, and measures a model that draws noise as one."""
    judge = recipe.train(composer, steps=60, batch=16)
    x, want = recipe.real(composer, recipe.TEST_SEED, range(200))
    found = recipe.right(judge, x, want)
    assert found["ground"].double().mean() > 0.6
    assert found["colour"].double().mean() > 0.3
    assert torch.equal(found["all"], found["noun"] & found["colour"] & found["ground"])
    unet, encoder = network_and_encoder(sample_size=32)
    encoder = CaptionEncoder(CaptionEncoderConfig(channels=16, layers=1, heads=2))
    sampler = Sampler(unet, NoiseSchedule("cosine"), text_encoder=encoder)
    recipe.measure(sampler, judge, composer, 64, 1, 2.0, tmp_path)
    report = json.loads((tmp_path / "adherence.json").read_text())
    assert report["judge on real scenes"]["ground"]["share"] > 0.5
    assert report["held-out"]["all"]["share"] < 0.2
    assert set(report) >= {"seen", "held-out, shuffled prompts", "other words for nouns", "judge on real scenes, seen"}
    assert Image.open(tmp_path / "held-out.png").size == (3 * 274, 3 * 274)
    lines = (tmp_path / "held-out.txt").read_text().splitlines()
    assert len(lines) == 64
    assert all(line.startswith(("a ", "an ")) for line in lines)


def test_scenes_are_a_data_set_for_training(composer, tmp_path, monkeypatch):
    """The recipe's data set gives the pictures and captions of its scenes, and its networks fit each other."""
    monkeypatch.setattr(training, "Composer", lambda path: composer)
    data = training.Scenes(tmp_path)
    images, labels = data.__getitems__([5, 2])
    assert labels is None
    assert np.array_equal(images[1].permute(1, 2, 0), scenes.picture_of(composer, training.SEED, 2))
    assert data.captions[2:4] == [scenes.caption_of(training.SEED, i) for i in (2, 3)]
    with pytest.raises(IndexError):
        data.captions[len(data)]
    unet, encoder = UNetCondition(training.NETWORK), CaptionEncoder(training.TEXT)
    settings = TrainConfig(steps=1, batch_size=2, sample_every=0)
    trainer = Trainer(unet.zero_residuals_(), data, tmp_path / "run", settings, text_encoder=encoder)
    trainer.fit()
    for text in data.captions[:300]:
        encoder.tokenize(text)  # which refuses texts that are too long
    assert sum(p.numel() for p in (*unet.parameters(), *encoder.parameters())) < 5_000_000
