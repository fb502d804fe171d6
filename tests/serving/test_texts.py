"""An engine of a network that reads text: prompts join the batch between steps, and each image is a Sampler's."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastdiff import Engine, NoiseSchedule, Sampler
from fastdiff.backends import native
from fastdiff.errors import InvalidArgument
from tests.support.captioned import network_and_encoder

SECONDS = 60
SCHEDULE = NoiseSchedule("cosine")
needs_native = pytest.mark.skipif(native.extension() is None, reason="fastdiff._native is not built")
# tests/backends/test_slots.py has both among the quick tests.
BACKENDS = [pytest.param("native", marks=needs_native), pytest.param("eager", marks=pytest.mark.slow)]
CALLS: list[dict[str, Any]] = [
    {"n": 1, "prompts": "a dog", "steps": 4, "seed": 5},
    {"n": 3, "prompts": ["a dog", "a red car", ""], "negative": ["", "snow", "a dog"], "guidance": [1.0, 3.0, 2.0],
     "solver": "dpmpp_2m", "steps": 6, "seed": 6},
    {"n": 2, "prompts": "a car at night", "negative": "a dog", "guidance": 4.0, "guidance_rescale": 0.5, "steps": 5},
    {"n": 2, "prompts": "snow", "steps": 5, "eta": 1.0, "guidance": 2.0, "guidance_interval": (0.2, 0.8)},
    {"n": 1, "prompts": "a dog", "image": torch.full((1, 3, 8, 8), 0.5), "strength": 0.5, "steps": 6},
    {"n": 70, "prompts": [" ".join(["dog"] * (i % 6)) + "s" * (i % 2) for i in range(70)], "guidance": 2.0, "steps": 2},
]  # fmt: skip


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    unet, encoder = network_and_encoder()
    determinism = "bitwise" if request.param == "native" else "seed"
    return Sampler(unet, SCHEDULE, prediction="v_prediction", text_encoder=encoder, backend=request.param,
                   determinism=determinism)  # fmt: skip


@pytest.fixture(scope="module")
def engine(sampler: Sampler) -> Iterator[Engine]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fastdiff.serving.stepper.MOST_SLOTS", 1)  # as few as there can be
        engine = Engine(sampler, max_queue_s=1e6)
    with engine:
        yield engine


def same(a: Tensor, b: Tensor, sampler: Sampler) -> bool:
    return torch.equal(a, b) if sampler.determinism == "bitwise" else bool((a - b).abs().max() < 1e-4)


def test_images_are_those_of_a_sampler(sampler, engine):
    jobs = [(call, engine.submit(**call)) for call in CALLS]
    for call, job in jobs:
        options = {name: value for name, value in call.items() if name != "n"}
        expected, got = sampler.sample(call["n"], **options), job.result(SECONDS)
        assert same(got.images, expected.images, sampler), call
        assert (got.prompts, got.labels) == (expected.prompts, None)
        assert job.receipt["prompts"] == list(expected.prompts)
        assert job.receipt["labels"] is None
        if sampler.determinism == "bitwise":
            assert job.receipt["sha256"] == hashlib.sha256(expected.images.numpy().tobytes()).hexdigest()
    assert jobs[1][1].receipt["negative"] == ["", "snow", "a dog"]
    assert engine._stepper.slots.texts.used == 0


def test_prompts_join_a_batch_that_runs(sampler, engine):
    """Long jobs of other prompts are in flight at different steps; more prompts come than there are places for."""
    long = [engine.submit(2, prompts=["a dog", "a car"], steps=40, guidance=2.0, seed=seed) for seed in range(3)]
    places = len(engine._stepper.slots.texts.now.states)
    for i in range(places + 5):
        prompt = " ".join(("dog", "car", "snow", "red", "night", "house")[(i >> k) % 6] for k in range(4))
        job = engine.submit(1, prompts=prompt, negative="snow", guidance=3.0, steps=2, seed=i)
        if i % 10 == 0:
            alone = sampler.sample(1, prompts=prompt, negative="snow", guidance=3.0, steps=2, seed=i)
            assert same(job.result(SECONDS).images, alone.images, sampler)
    for seed, job in enumerate(long):
        alone = sampler.sample(2, prompts=["a dog", "a car"], steps=40, guidance=2.0, seed=seed)
        assert same(job.result(SECONDS).images, alone.images, sampler)


def test_the_encoder_is_a_copy(sampler):
    unet, encoder = network_and_encoder()
    own = copy.deepcopy(encoder)
    given = Sampler(unet, SCHEDULE, prediction="v_prediction", text_encoder=own, backend=sampler.backend,
                    determinism=sampler.determinism)  # fmt: skip
    expected = given.sample(1, prompts="a dog", steps=2).images
    with Engine(given) as engine:
        with torch.no_grad():
            own.position.weight.copy_(
                torch.linspace(-9.0, 9.0, own.position.weight.numel()).view_as(own.position.weight)
            )
        assert same(engine.submit(1, prompts="a dog", steps=2).result(SECONDS).images, expected, sampler)
        assert not same(given.sample(1, prompts="a dog", steps=2).images, expected, sampler)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "prompts= is needed"),
        ({"prompts": ["a dog"]}, "one text, or 2 of them"),
        ({"prompts": "dog " * 100}, r"prompts\[0\]=.*100 pieces of words; at most 6 fit"),
        ({"prompts": "a dog", "negative": 3}, "negative"),
        ({"prompts": "a dog", "labels": 1}, "labels=1: this network reads text"),
        ({"prompts": b"a dog"}, "prompts"),
        ({"prompts": "a dog", "on_deadline": "degrade", "deadline_s": 9.0}, "needs measurements"),
    ],
)
def test_what_is_not_possible_is_refused_by_name(engine, options, message):
    with pytest.raises(InvalidArgument, match=message):
        engine.submit(2, steps=2, **options)


class Uneven:
    """An encoder whose states are longer for longer texts, which the interface rules out."""

    def __init__(self, encoder: Any):
        self.encoder = encoder

    def tokenize(self, text: str) -> list[int]:
        return self.encoder.tokenize(text)

    def encode(self, text: str) -> tuple[Tensor, Tensor]:
        states, pooled = self.encoder.encode(text)
        return states[: 2 + len(text)], pooled

    def to(self, device: Any) -> Uneven:
        return self


def test_encoded_texts_are_refused(sampler, engine):
    with pytest.raises(InvalidArgument, match="encodes prompts= itself"):
        engine.submit(1, context=sampler.encode(["a dog"]), steps=1)


def test_an_encoder_with_states_of_several_lengths_ends_no_engine(sampler):
    unet, encoder = network_and_encoder()
    uneven = Sampler(unet, SCHEDULE, text_encoder=Uneven(encoder), backend=sampler.backend)
    with Engine(uneven) as engine:
        with pytest.raises(InvalidArgument, match=r"states \[4, 16\], and \[2, 16\] for an empty text"):
            engine.submit(1, prompts="ab", negative="cd", steps=1)
        assert engine.submit(1, prompts="", steps=1).result(SECONDS)


def test_a_network_without_pooled_vector(sampler):
    unet, encoder = network_and_encoder(class_embed_type=None)
    plain = Sampler(unet, SCHEDULE, text_encoder=encoder, backend=sampler.backend, determinism=sampler.determinism)
    with Engine(plain) as engine:
        got = engine.submit(2, prompts=["a dog", "a car"], guidance=2.0, steps=3).result(SECONDS)
        assert same(got.images, plain.sample(2, prompts=["a dog", "a car"], guidance=2.0, steps=3).images, plain)
