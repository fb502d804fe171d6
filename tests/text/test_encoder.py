"""The encoder of captions."""

from __future__ import annotations

import pytest
import torch

from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.text import CaptionEncoder, CaptionEncoderConfig
from fastdiff.text.encoder import words
from tests.support.captioned import TEXT, network_and_encoder


def test_the_table_knows_which_words_are_alike():
    """Vectors of words of one meaning are nearer to each other than those of different things."""
    pieces, table, scale = words()

    def vector(word: str) -> torch.Tensor:
        (number,) = pieces.encode(word, 3)[1:2]
        return torch.nn.functional.normalize(table[number].float() * scale, dim=0)

    for word, near, far in (("dog", "puppy", "car"), ("crimson", "purple", "seven"), ("bike", "bicycle", "snow")):
        assert vector(word) @ vector(near) > vector(word) @ vector(far) + 0.2


def test_states_are_the_formula():
    """The states are those of torch's own transformer layers over the projected vectors and positions, in float64."""
    _, encoder = network_and_encoder()
    tokens = torch.tensor([encoder.tokenize("a big dog"), encoder.tokenize("")])
    states, pooled = encoder(tokens)
    twin = CaptionEncoder(TEXT).double()
    twin.load_state_dict(encoder.state_dict())
    _, table, scale = words()
    h = (table[tokens].double() * scale.double()) @ twin.project.weight.T + twin.project.bias + twin.position.weight
    (layer,) = twin.layers
    x = torch.nn.functional.layer_norm(h, (16,), layer.norm1.weight, layer.norm1.bias)
    q, k, v = (x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (2, 8)).transpose(1, 2) for t in (q, k, v))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    h = h + (weights @ v).transpose(1, 2).flatten(2) @ layer.self_attn.out_proj.weight.T + layer.self_attn.out_proj.bias
    x = torch.nn.functional.layer_norm(h, (16,), layer.norm2.weight, layer.norm2.bias)
    x = torch.nn.functional.gelu(x @ layer.linear1.weight.T + layer.linear1.bias)
    h = h + x @ layer.linear2.weight.T + layer.linear2.bias
    want = torch.nn.functional.layer_norm(h, (16,), twin.norm.weight, twin.norm.bias)
    assert states.shape == (2, 8, 16)
    assert (states.double() - want).abs().max() < 1e-5
    assert torch.equal(pooled, states[:, 0])
    assert (states[0] - states[1]).abs().max() > 0.1


def test_one_text_is_encoded_as_among_others():
    _, encoder = network_and_encoder()
    states, pooled = encoder.encode("A BIG dog")
    again, _ = encoder.encode("a big dog")
    assert torch.equal(states, again)
    both = encoder(torch.tensor([encoder.tokenize("a car"), encoder.tokenize("a big dog")]))
    assert (both[0][1] - states).abs().max() < 1e-6
    assert (both[1][1] - pooled).abs().max() < 1e-6


def test_texts_that_cannot_be_encoded():
    _, encoder = network_and_encoder()
    with pytest.raises(InvalidArgument, match="the text has 10000 pieces of words; at most 6 fit"):
        encoder.tokenize("dog " * 10_000)
    with pytest.raises(InvalidArgument):
        encoder.tokenize(b"dog")
    assert len(encoder.tokenize("a \N{DOG FACE} in the snow")) == 8  # an unknown piece


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"channels": 10, "heads": 4}, "channels=10 is not divisible by heads=4"),
        ({"tokens": 1}, "tokens=1"),
        ({"layers": 0}, "layers=0"),
        ({"layers": 2.5}, "layers=2.5"),
        ({"channels": 1 << 30}, "channels"),
        ({"width": 3}, "unknown keys"),
    ],
)
def test_configurations_are_checked(fields, message):
    with pytest.raises(ConfigError, match=message):
        CaptionEncoderConfig.from_dict(fields)


def test_configurations_come_back():
    assert CaptionEncoderConfig.from_dict({"_class_name": "x", **TEXT.to_dict()}) == TEXT
    with pytest.raises(ConfigError, match="an object with keys"):
        CaptionEncoderConfig.from_dict([])  # type: ignore[arg-type]
