"""Slots: images that come and go in one long-lived batch are those that a Sampler draws of each alone."""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, solvers
from fastdiff.backends import Spec, native, prepare
from fastdiff.core import noise, slots
from fastdiff.core.slots import EMPTY, SharedBank, SharedTexts, Slots, Text
from fastdiff.core.state import TableBank
from fastdiff.errors import InvalidArgument
from tests.support.captioned import network_and_encoder
from tests.support.unets import TINY, TINY_CLASSES, change, random_unet

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
NETWORKS = {
    "classes": TINY_CLASSES,
    "class images": change(TINY_CLASSES, class_image="concat"),
    "no classes": TINY,
    "texts": None,
}
CAPACITY = 4
TEXTS = ("a dog", "a car", "", "snow at night")


@functools.cache
def tables() -> list[solvers.StepTable]:
    threshold = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 2.0}
    with_threshold = Sampler(random_unet(TINY), SCHEDULE, backend="eager", scheduler_config=threshold)
    return [
        solvers.ddim(SCHEDULE, 3),
        solvers.ddim(SCHEDULE, 5, eta=1.0),
        solvers.heun(SCHEDULE, 2),
        solvers.dpmpp_3m(SCHEDULE, 4),
        solvers.ddim(SCHEDULE, 4).with_guidance_interval(0.25, 0.75),
        with_threshold.request(1, solver="ddim", steps=3).table,
    ]


@functools.cache
def sampler_of(network: str, backend: str) -> Sampler:
    determinism = "bitwise" if backend == "native" else "seed"
    if network == "texts":
        unet, encoder = network_and_encoder()
        return Sampler(unet, SCHEDULE, backend=backend, determinism=determinism, text_encoder=encoder)
    return Sampler(random_unet(NETWORKS[network]), SCHEDULE, backend=backend, determinism=determinism)


@functools.cache
def alone(network: str, backend: str, image: tuple[int, int, int, float, float]) -> Tensor:
    """Return the image that a Sampler draws: (number of the table, index, label, guidance, rescaling)."""
    table, index, label, guidance, rescale = image
    guided = {"guidance": guidance, "guidance_rescale": rescale}
    classes = {} if network == "no classes" else {"labels": label, **guided}
    sampler = sampler_of(network, backend)
    if network == "texts":
        own, null = texts_of(label, index)
        classes = {"prompts": own, "negative": null, **guided}
    return sampler.sample(1, solver=tables()[table], seed=11, start_index=index, **classes).images[0]


def texts_of(label: int, index: int) -> tuple[str, str]:
    """Return a text, and one that guidance leads away from: together more than the slots have places for."""
    return TEXTS[label] + " red" * (index % 3), TEXTS[-1 - index % 3]


class History:
    """Slots on a runner, and the images that were admitted, by their slots."""

    def __init__(self, network: str, backend: str):
        self.network, self.backend = network, backend
        self.sampler = sampler_of(network, backend)
        spec = Spec(
            CAPACITY, (3, 8, 8), torch.float32, CPU, self.sampler.info.null_label, self.sampler.determinism, frozen=True
        )
        self.runner = prepare(backend, self.sampler.unet, spec)
        text = self.encoded("") if network == "texts" else None
        labelled = network not in ("no classes", "texts")
        self.slots = Slots(CAPACITY, (3, 8, 8), CPU, labelled=labelled, text=text)
        self.images: dict[int, tuple[int, int, int, float, float]] = {}
        self.finished = 0

    def encoded(self, text: str) -> Text:
        return Text(text, *self.sampler.text_encoder.encode(text))

    def admit(self, image: tuple[int, int, int, float, float]) -> None:
        number, index, label, guidance, rescale = image
        table = tables()[number]
        at = (torch.tensor([v]) for v in (11, index, 0))
        x = noise.normal(*at, noise.INITIAL, (3, 8, 8))[0] * table.init_scale
        if self.network == "no classes":
            guidance = 1.0
        texts = None
        if self.network == "texts":
            own, null = texts_of(label, index)
            texts = self.encoded(own), self.encoded(null)
        slot = self.slots.admit(
            x, table, seed=11, index=index, label=label, guidance=guidance, rescale=rescale, texts=texts
        )  # fmt: skip
        self.images[slot] = image

    def step(self, some: set[int], previewed: bool) -> None:
        chosen = [slot for i, slot in enumerate(sorted(self.images)) if i in some]
        if chosen:
            self.slots.step(self.runner, chosen, chosen[-1:] if previewed else ())
        for slot in chosen:
            if not self.slots.rows_left(slot):
                self.retire(slot)

    def retire(self, slot: int) -> None:
        image = self.images.pop(slot)
        if not self.slots.rows_left(slot):
            expected, got = alone(self.network, self.backend, image), self.slots.state.x[slot]
            if self.backend == "native":
                assert torch.equal(got, expected), image
            else:
                torch.testing.assert_close(got, expected, atol=2e-4, rtol=0)
            self.finished += 1
        self.slots.retire(slot)


IMAGES = st.tuples(
    st.integers(0, 5), st.integers(0, 2), st.integers(0, 3), st.sampled_from([1.0, 3.0]), st.sampled_from([0.0, 0.7])
)
ACTIONS = st.one_of(
    st.tuples(st.just("admit"), IMAGES),
    st.tuples(st.just("step"), st.sets(st.integers(0, CAPACITY - 1), min_size=1), st.booleans()),
    st.tuples(st.just("cancel"), st.integers(0, CAPACITY - 1)),
)


def play(history: History, actions: list[Any]) -> None:
    for name in ("x", "xs", "m1", "m2", "m3"):
        getattr(history.slots.state, name).fill_(torch.nan)
    for action, *arguments in actions:
        if action == "admit" and history.slots.free:
            history.admit(*arguments)
        elif action == "step":
            history.step(*arguments)
        elif action == "cancel" and history.images:
            present = sorted(history.images)
            history.retire(present[arguments[0] % len(present)])
    while history.images:
        history.step(set(range(CAPACITY)), previewed=False)
    assert len(history.slots.free) == CAPACITY
    assert history.slots.bank.used == 0
    assert history.slots.texts is None or history.slots.texts.used == 0


needs_native = pytest.mark.skipif(native.extension() is None, reason="fastdiff._native is not built")
BACKENDS = [pytest.param("native", marks=needs_native), "eager"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("network", NETWORKS)
def test_any_history_draws_the_images_of_a_sampler(network, backend):
    """One batch goes through all of them, so that slots and places of tables are used again."""
    history, examples = History(network, backend), 5 if backend == "eager" else 8 if network == "texts" else 20

    @settings(max_examples=examples, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(actions=st.lists(ACTIONS, min_size=8, max_size=20))
    def check(actions):
        play(history, actions)

    check()
    assert history.finished >= examples


@pytest.mark.slow
@needs_native
@pytest.mark.parametrize("network", NETWORKS)
def test_long_histories(network):
    history = History(network, "native")

    @settings(max_examples=300, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True)
    @given(actions=st.lists(ACTIONS, min_size=10, max_size=60))
    def check(actions):
        play(history, actions)

    check()
    assert history.finished > 300


@needs_native
@pytest.mark.parametrize("network", ["class images", "texts"])
def test_nothing_is_compiled_or_packed_after_the_first_step(network):
    history = History(network, "native")
    history.admit((0, 0, 0, 3.0, 0.0))
    history.step({0}, previewed=False)
    runner = history.runner
    assert isinstance(runner, native.NativeRunner)
    (program,), packed = runner.programs.values(), dict(runner.weights.packed)
    times, arena = runner.embeddings.times, runner.arena
    for number in range(6):
        while history.slots.free:
            history.admit((number, number, number % 4, 3.0 if number % 2 else 1.0, 0.0))
        history.step(set(range(number % CAPACITY + 1)), previewed=number == 3)
    assert list(runner.programs.values()) == [program]
    assert {key: id(value) for key, value in runner.weights.packed.items()} == {k: id(v) for k, v in packed.items()}
    assert runner.embeddings.times is times
    assert runner.arena is arena


@needs_native
def test_class_images_are_kept_for_the_last_labels(monkeypatch):
    monkeypatch.setattr("fastdiff.backends.native.runner.MAP_BYTES", 2 * 4 * 3 * 8 * 8)
    history = History("class images", "native")
    calls: list[int] = []
    encoded = history.runner._encoded
    monkeypatch.setattr(history.runner, "_encoded", lambda labels: calls.append(labels.item()) or encoded(labels))
    for label in (1, 1, 2, 2, 1, 3, 2):  # 4 is the null label, and an empty slot has 0
        history.admit((0, 0, label, 1.0, 0.0))
        history.step({0}, previewed=False)
        history.retire(next(iter(history.images)))
    assert calls == [4, 1, 0, 2, 1, 3, 2]
    assert list(history.runner.maps) == [3, 2]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_step_evaluates_the_rows_of_its_own_images(backend, monkeypatch):
    """Two of four images are paused, and one of the others is guided: three rows."""
    history = History("classes", backend)
    for index, guidance in enumerate((1.0, 3.0, 3.0, 1.0)):
        history.admit((3, index, 1, guidance, 0.0))
    assert history.slots.network_rows([0, 1, 2, 3]) == 6
    rows: list[int] = []
    if backend == "eager":
        call = history.runner._call
        monkeypatch.setattr(history.runner, "_call", lambda x, *rest: rows.append(len(x)) or call(x, *rest))
    else:
        history.slots.step(history.runner, [0])
        (program,) = history.runner.programs.values()
        engine = program.engine
        program.engine = SimpleNamespace(step=lambda **given: rows.append(len(given["net"])) or engine.step(**given))
    x = history.slots.state.x.clone()
    chosen = sorted(slot for slot, image in history.images.items() if image[1] in (1, 3))
    assert history.slots.network_rows(chosen) == 3
    history.slots.step(history.runner, chosen)
    assert rows[-1] == 3
    changed = [slot for slot in range(CAPACITY) if not torch.equal(history.slots.state.x[slot], x[slot])]
    assert changed == chosen


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_preview_is_the_x0_of_the_row(backend):
    history = History("classes", backend)
    history.admit((1, 0, 2, 3.0, 0.7))
    history.admit((3, 1, 1, 1.0, 0.0))
    sampler, options = history.sampler, {"seed": 11, "labels": 2, "guidance": 3.0, "guidance_rescale": 0.7}
    slot = next(slot for slot, image in history.images.items() if image[0] == 1)
    for event in sampler.stream(1, solver=tables()[1], **options):
        shown = history.slots.step(history.runner, [slot], [slot])
        torch.testing.assert_close(shown, event.x0, atol=0.0 if backend == "native" else 1e-4, rtol=0)
    assert history.slots.step(history.runner, [s for s in history.images if s != slot]) is None


# Tables that come and go ----------------------------------------------------------------------------------------------


def test_tables_share_a_place_until_the_last_use():
    bank = SharedBank(2, CPU)
    a, b, c = tables()[:3]
    assert [bank.add(a), bank.add(a), bank.add(b)] == [1, 1, 2]
    assert bank.used == 2
    with pytest.raises(InvalidArgument, match="all 2 places of tables are in use"):
        bank.add(c)
    bank.release(1)
    with pytest.raises(InvalidArgument, match="all 2 places"):
        bank.add(c)
    bank.release(1)
    assert bank.add(a) == 1  # it is still there
    bank.release(1)
    bank.release(2)
    assert bank.add(c) == 1  # released before the other
    assert bank.tables == (EMPTY, c, b)
    assert bank.add(b) == 2


def test_a_shared_bank_has_the_numbers_of_a_bank(monkeypatch):
    monkeypatch.setattr(slots, "ROWS", 4)
    bank = SharedBank(3, CPU, rows=4)
    given = [solvers.ddim(SCHEDULE, n) for n in (2, 9, 3)]
    assert [bank.add(table) for table in given] == [1, 2, 3]
    expected = TableBank([EMPTY, *given], CPU)
    rows = expected.host.shape[1]
    assert bank.host.shape[1] >= rows
    assert np.array_equal(bank.host[:, :rows], expected.host)
    assert torch.equal(bank.values[:, :rows], expected.values)
    assert np.array_equal(bank.lengths_host, expected.lengths_host)
    assert torch.equal(bank.lengths, expected.lengths)
    assert (bank.host[:, rows:] == bank.host[:, rows - 1 : rows]).all()


def test_thresholds_are_those_of_tables_in_use():
    bank = SharedBank(2, CPU)
    place = bank.add(tables()[5])
    assert bank.thresholds
    bank.release(place)
    bank.add(tables()[0])
    assert not bank.thresholds


def test_full_slots_refuse():
    held = Slots(1, (3, 8, 8), CPU, labelled=True)
    held.admit(torch.zeros(3, 8, 8), tables()[0], seed=2**64 - 1, index=2**63 - 1)
    with pytest.raises(InvalidArgument, match="all 1 slots are taken"):
        held.admit(torch.zeros(3, 8, 8), tables()[0], seed=0, index=0)
    assert held.bank.used == 1
    held.retire(0)
    assert held.state.done
    assert held.admit(torch.zeros(3, 8, 8), tables()[0], seed=0, index=0) == 0


# Texts that come and go -----------------------------------------------------------------------------------------------


def text(name: str, value: float) -> Text:
    return Text(name, torch.full((2, 3), value), torch.full((5,), value))


def test_texts_share_a_place_until_the_last_use():
    shared = SharedTexts(2, text("", 0.0), CPU)
    assert shared.now.names == (None, None)
    first = shared.now
    assert [shared.add(text("a", 1.0)), shared.add(text("b", 2.0))] == [0, 1]
    assert first.names == (None, None)  # who has an earlier object sees that there is a new one
    held = shared.now
    assert shared.add(text("a", 1.0)) == 0
    assert shared.now is held
    with pytest.raises(InvalidArgument, match="all 2 places of texts are in use"):
        shared.add(text("c", 3.0))
    shared.release(0)
    shared.release(1)
    assert shared.used == 1
    assert shared.add(text("c", 3.0)) == 1
    assert shared.now.names == ("a", "c")
    assert shared.now.states[:, 0, 0].tolist() == [1.0, 3.0]
    assert shared.now.pooled is not None
    assert shared.now.pooled[:, 0].tolist() == [1.0, 3.0]


@needs_native
def test_a_text_is_computed_once_while_it_has_its_place(monkeypatch):
    history = History("texts", "native")
    history.admit((0, 0, 0, 1.0, 0.0))
    history.step({0}, previewed=False)
    tables, computed = history.runner.texts, []
    compute = tables._compute
    monkeypatch.setattr(tables, "_compute", lambda texts, i, place: computed.append(i) or compute(texts, i, place))
    history.admit((1, 0, 0, 3.0, 0.0))  # the same texts
    history.step({0, 1}, previewed=False)
    assert computed == []
    history.admit((1, 1, 1, 3.0, 0.0))
    history.step({0, 1, 2}, previewed=False)
    assert len(computed) == 2


@needs_native
def test_batches_of_texts_may_take_turns_on_a_runner():
    """A text of one batch does not stay where one of another has come."""
    first, second = History("texts", "native"), History("texts", "native")
    second.runner = first.runner
    for number, history in enumerate((first, second)):
        history.admit((1, number, number, 3.0, 0.0))
        history.step({0}, previewed=False)
    while first.images or second.images:
        first.step({0}, previewed=False)
        second.step({0}, previewed=False)
    assert (first.finished, second.finished) == (1, 1)
