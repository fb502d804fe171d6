"""Weights that change between, during and beside runs of the native engine, and a caller's autocast."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from fastdiff import NoiseSchedule, Sampler, solvers
from fastdiff.backends import Spec, native
from fastdiff.backends.native import packing
from fastdiff.core.program import Conv
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError, FastdiffError
from fastdiff.unet import UNet
from tests.support.unets import TINY, TINY_CLASSES, change, random_images, random_unet

pytest.importorskip("fastdiff._native", reason="the native extension is not built")

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
OPTIONS = {"steps": 4, "labels": [0, 1], "guidance": 3.0, "guidance_interval": (0.0, 0.5)}  # guided, then not


@pytest.fixture
def packings_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of other size needs other packings, so that a run packs weights again when its guidance ends."""

    def choose(op: Conv, program: object, rows: int | None, allowed: object = ()) -> str:
        fits = (op.kernel, op.stride, op.padding) == (3, 1, (1, 1))
        return "direct" if not fits else "winograd4" if rows == 2 else "winograd2"

    monkeypatch.setattr("fastdiff.backends.native.methods.choose_method", choose)


def exchange(unet: UNet, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Give the network other weights in place, and return those it had."""
    had = {name: t.clone() for name, t in unet.state_dict().items()}
    unet.load_state_dict(others)
    return had


def rebind(unet: UNet, others: dict[str, Tensor]) -> dict[str, Tensor]:
    """Do the same with new tensors."""
    had = unet.state_dict()
    unet.load_state_dict({name: t.clone() for name, t in others.items()}, assign=True)
    return had


@pytest.mark.usefixtures("packings_by_rows")
@pytest.mark.parametrize("swap", [exchange, rebind])
def test_weights_exchanged_and_restored_during_a_run(swap: Callable[..., dict[str, Tensor]]):
    """As a callback does that looks at averaged weights. The packings of the exchanged ones must not stay."""
    unet, others = random_unet(TINY_CLASSES), random_unet(TINY_CLASSES, seed=1).state_dict()
    expected = Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend="native").sample(2, **OPTIONS).images
    sampler, had = Sampler(unet, SCHEDULE, backend="native"), {}
    for event in sampler.stream(2, **OPTIONS):
        if event.row == 1:
            had = swap(unet, others)
        if event.row == 3:
            swap(unet, had)
    for fresh in (sampler, Sampler(unet, SCHEDULE, backend="native")):
        assert torch.equal(fresh.sample(2, **OPTIONS).images, expected)


@pytest.mark.usefixtures("packings_by_rows")
def test_other_batch_sizes_while_weights_are_exchanged():
    unet, others = random_unet(TINY_CLASSES), random_unet(TINY_CLASSES, seed=1)
    one = {"steps": 2, "labels": 1}
    expected = Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend="native").sample(1, **one).images
    averaged = Sampler(others, SCHEDULE, backend="native").sample(1, **one).images
    sampler, seen = Sampler(unet, SCHEDULE, backend="native"), []
    for _ in sampler.stream(2, **OPTIONS):
        had = exchange(unet, others.state_dict())
        seen.append(sampler.sample(1, **one).images)
        exchange(unet, had)
    assert all(torch.equal(images, averaged) for images in seen)
    assert torch.equal(sampler.sample(1, **one).images, expected)


def test_weights_that_change_while_they_are_packed(monkeypatch: pytest.MonkeyPatch):
    """Once: the new ones are packed. At every attempt: an error that says so."""
    unet, edits, pack = random_unet(TINY), [-1.0], packing.pack

    def edit(*args: object) -> Tensor:
        if edits:
            unet.conv_in.weight.data.mul_(edits.pop())
        return pack(*args)

    monkeypatch.setattr(packing, "pack", edit)
    got = Sampler(unet, SCHEDULE, backend="native").sample(1, steps=2).images
    expected = Sampler(unet, SCHEDULE, backend="eager").sample(1, steps=2).images
    assert (got - expected).abs().max() < 1e-4
    unet.conv_out.weight.data.neg_()
    edits += [1.001] * 10_000  # two edits of an attempt do not cancel
    with pytest.raises(BackendError, match="weights change while"):
        Sampler(unet, SCHEDULE, backend="native").sample(1, steps=2)
    edits.clear()
    got = Sampler(unet, SCHEDULE, backend="native").sample(1, steps=2).images
    assert (got - Sampler(unet, SCHEDULE, backend="eager").sample(1, steps=2).images).abs().max() < 1e-4


def test_an_error_while_packing_keeps_no_packing(monkeypatch: pytest.MonkeyPatch):
    unet, pack = random_unet(TINY), packing.pack
    sampler, calls = Sampler(unet, SCHEDULE, backend="native"), []

    def fail(*args: object) -> Tensor:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return pack(*args)

    monkeypatch.setattr(packing, "pack", fail)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(1, steps=1)
    assert not packing.Weights.of(unet, native.extension()).packed
    expected = Sampler(unet, SCHEDULE, backend="eager").sample(1, steps=1).images
    assert (sampler.sample(1, steps=1).images - expected).abs().max() < 1e-4


@pytest.fixture
def packed_now(monkeypatch: pytest.MonkeyPatch) -> list[tuple[object, ...]]:
    """The keys of what is packed, in order; a kernel's has five parts, of which the first one is its layers."""
    seen: list[tuple[object, ...]] = []
    once = packing.Weights._once

    def spied(self: packing.Weights, key: tuple[object, ...], make: Callable[[], Tensor]) -> Tensor:
        return once(self, key, lambda: seen.append(key) or make())

    monkeypatch.setattr(packing.Weights, "_once", spied)
    return seen


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        (["conv_in.weight"], [("conv_in",)]),
        (["down_blocks.0.resnets.0.conv1.bias"], [("down_blocks.0.resnets.0.conv1",)]),
        (["mid_block.resnets.0.norm1.weight"], []),
        (["time_embedding.linear_1.weight"], []),
        (["mid_block.attentions.0.to_q.weight"], ["mid_block.attentions.0.to_q"]),
        (["mid_block.attentions.0.to_v.bias"], ["mid_block.attentions.0.to_v"]),
        (["conv_in.weight", "conv_out.weight"], [("conv_in",), ("conv_out",)]),
        ([], []),
    ],
)
def test_only_changed_layers_are_packed_again(
    packed_now: list[tuple[object, ...]], changed: list[str], expected: list[object]
):
    """An attention's layers are packed together, where they merge. The bits are those of packing everything."""
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    sampler.sample(1, steps=1)
    everything = [key for key in packed_now if len(key) == 5]
    packed_now.clear()
    weights = dict(unet.named_parameters())
    for name in changed:
        weights[name].data.mul_(-1.5)  # which bumps no version
    images = sampler.sample(1, steps=1).images
    layers = [key[0] for key in packed_now if len(key) == 5]
    assert len(everything) > 20
    assert len(layers) == len(expected)
    assert all(found == want or want in found for found, want in zip(layers, expected, strict=True))
    norms = [key[0] for key in packed_now if len(key) == 1]
    assert norms == [name for name in changed if "norm" in name]
    fresh = copy.deepcopy(unet)
    assert torch.equal(Sampler(fresh, SCHEDULE, backend="native").sample(1, steps=1).images, images)
    whole, kept = (packing.Weights.of(each, native.extension()).packed for each in (fresh, unet))
    assert whole.keys() == kept.keys()
    assert all(torch.equal(whole[key], kept[key]) for key in whole)


def test_weights_that_two_layers_share_are_noticed_in_both(packed_now: list[tuple[object, ...]]):
    unet = random_unet(TINY)
    shared = unet.mid_block.resnets[0].conv1.weight
    unet.mid_block.resnets[1].conv1.weight = shared
    sampler = Sampler(unet, SCHEDULE, backend="native")
    sampler.sample(1, steps=1)
    packed_now.clear()
    shared.data.neg_()
    images = sampler.sample(1, steps=1).images
    layers = {key[0] for key in packed_now if len(key) == 5}
    assert layers == {(f"mid_block.resnets.{i}.conv1",) for i in range(2)}
    assert (images - Sampler(unet, SCHEDULE, backend="eager").sample(1, steps=1).images).abs().max() < 1e-4


def test_new_timesteps_after_the_embedding_changed():
    """A state whose tables are replaced, as by a pipeline that asks for one timestep at a time."""
    unet, spec = random_unet(TINY), Spec(1, (3, 8, 8), torch.float32, CPU)
    runner, x = native.prepare(unet, spec), random_images(TINY, 1)
    state = State.create(x.clone(), TableBank([solvers.ddim(SCHEDULE, spacing=[80.0])], CPU))
    runner.forward(state)
    unet.time_embedding.linear_1.weight.data.neg_()
    unet.conv_in.weight.data.neg_()
    state.bank = TableBank([solvers.ddim(SCHEDULE, spacing=[40.0])], CPU)
    runner.forward(state)
    fresh = State.create(x.clone(), state.bank)
    native.prepare(unet, spec).forward(fresh)
    assert torch.equal(state.out, fresh.out)


CONDITIONINGS = {
    "without classes": TINY,
    "classes": TINY_CLASSES,
    "class images": change(TINY_CLASSES, class_image="add"),
    "classes before the MLP": change(TINY_CLASSES, class_before_mlp=True),
}


@pytest.mark.parametrize("name", CONDITIONINGS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_nothing(name: str, dtype: torch.dtype):
    config = CONDITIONINGS[name]
    labels = {} if config.num_class_embeds is None else {"labels": [0, 1]}
    expected = Sampler(random_unet(config), SCHEDULE, backend="native").sample(2, steps=2, **labels).images
    sampler = Sampler(random_unet(config), SCHEDULE, backend="native")
    with torch.autocast("cpu", dtype=dtype):
        assert torch.equal(sampler.sample(2, steps=2, **labels).images, expected)
    assert torch.equal(sampler.sample(2, steps=2, **labels).images, expected)


SHRINK = {
    "data": lambda unet: setattr(unet.class_embedding.weight, "data", unet.class_embedding.weight.data[:2].clone()),
    "module": lambda unet: setattr(unet, "class_embedding", nn.Embedding(2, unet.config.temb_channels)),
}


@pytest.mark.parametrize("shrink", SHRINK.values(), ids=SHRINK)
def test_a_class_table_that_shrinks_during_a_run(shrink: Callable[[UNet], None]):
    """The next row of a stream uses the present weights, so it is refused by name, and so is another call."""
    unet, options = random_unet(TINY_CLASSES), {"steps": 4, "labels": [3, 2], "guidance": 3.0}
    sampler = Sampler(unet, SCHEDULE, backend="native")
    events = sampler.stream(2, **options)
    assert [next(events).row for _ in range(2)] == [0, 1]
    shrink(unet)
    with pytest.raises(FastdiffError):
        sampler.sample(1, steps=1, labels=3)
    with pytest.raises(BackendError, match="class_embedding has 2 rows now, fewer than label 4 needs"):
        next(events)


@pytest.mark.usefixtures("packings_by_rows")
@pytest.mark.parametrize("shrink", SHRINK.values(), ids=SHRINK)
def test_a_class_table_that_shrinks_before_weights_are_packed(shrink: Callable[[UNet], None]):
    unet = random_unet(TINY_CLASSES)
    events = Sampler(unet, SCHEDULE, backend="native").stream(2, **OPTIONS)
    assert [next(events).row for _ in range(2)] == [0, 1]
    shrink(unet)
    with pytest.raises(BackendError, match="network"):
        list(events)


def test_a_label_beyond_the_class_table_is_an_error():
    unet, spec = random_unet(TINY_CLASSES), Spec(1, (3, 8, 8), torch.float32, CPU)
    runner = native.prepare(unet, spec)
    for label in (5, -1, 2**40):
        state = State.create(random_images(TINY, 1), TableBank([solvers.ddim(SCHEDULE, 2)], CPU), label=[label])
        with pytest.raises(BackendError, match=f"label {label} of a table of 5"):
            runner.step(state)


def test_one_packing_for_threads_that_change_weights():
    """A thread that trains between the calls of another: every image is of one set of weights."""
    unet, stop = random_unet(TINY), threading.Event()
    sampler, problems = Sampler(unet, SCHEDULE, backend="native"), []

    def draw() -> None:
        while not stop.is_set():
            try:
                problems.extend([] if sampler.sample(1, steps=1).images.isfinite().all() else ["not finite"])
            except BackendError as e:
                problems.extend([] if "weights change while" in str(e) else [str(e)])

    thread = threading.Thread(target=draw)
    thread.start()
    for _ in range(30):
        unet.conv_in.weight.data.neg_()
    stop.set()
    thread.join()
    assert not problems
    expected = Sampler(unet, SCHEDULE, backend="eager").sample(1, steps=1).images
    assert (sampler.sample(1, steps=1).images - expected).abs().max() < 1e-4
