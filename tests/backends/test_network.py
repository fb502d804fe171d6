"""Parts that `native` and `triton` share: the checksum, the tables of embeddings, and the changes that are refused."""

from __future__ import annotations

import collections
import copy
import re
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdiff import NoiseSchedule, solvers
from fastdiff.backends import native, network
from fastdiff.backends.network import EmbeddingTables, checksum, checksums, plain_checksum, unsupported_changes
from fastdiff.core.lower import embed_classes, embed_timesteps, lower
from fastdiff.core.state import TableBank
from fastdiff.unet import UNet
from tests.support.changed import CHANGES, GLOBAL_CHANGES, Twisted, attribute, circular
from tests.support.fake_cuda import Counter
from tests.support.unets import TINY, TINY_CLASSES, VARIANTS, change, random_unet

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule(timesteps=100)


def bank_of(*spacings: list[float]) -> TableBank:
    return TableBank([solvers.ddim(SCHEDULE, spacing=ts) for ts in spacings], CPU)


def tables_of(unet: UNet, room: int, most: int) -> EmbeddingTables:
    return EmbeddingTables(unet, lower(unet, (8, 8)), CPU, room, most)


def assert_embedded(tables: EmbeddingTables, bank: TableBank, entries: torch.Tensor) -> None:
    for i, table in enumerate(bank.tables):
        t = torch.tensor([row.t for row in table.rows], dtype=torch.float32)
        assert torch.equal(tables.times[entries[i, : len(table)]], embed_timesteps(tables.unet, t))


def test_every_distinct_timestep_has_one_row():
    tables = tables_of(random_unet(TINY), room=4, most=9)
    first, second = bank_of([80.0, 40.0, 20.0], [80.0, 20.0]), bank_of([90.0, 40.0, 30.0])
    times, places = tables.times, tables.places
    held = tables.entries(first)
    assert held.shape == (2, 4)
    assert_embedded(tables, first, held)
    assert tables.times is times
    assert torch.equal(tables.entries(first), held)
    assert_embedded(tables, second, tables.entries(second))
    assert tables.times is not times  # it grew, so its address changed
    assert tables.places is places
    assert_embedded(tables, first, held)  # rows keep their timesteps
    third = bank_of([7.0, 6.0, 5.0, 4.0, 3.0])
    assert_embedded(tables, third, tables.entries(third))
    assert tables.places is not places  # more than 9 in all, so the rows are given to others
    assert_embedded(tables, first, tables.entries(first))


def test_refreshed_tables_keep_their_addresses():
    unet = random_unet(TINY_CLASSES)
    tables, bank = tables_of(unet, room=4, most=4), bank_of([80.0, 20.0])
    tables.entries(bank)
    times, classes = tables.times.data_ptr(), tables.classes.data_ptr()
    unet.load_state_dict(random_unet(TINY_CLASSES, seed=1).state_dict())
    tables.refresh()
    assert_embedded(tables, bank, tables.entries(bank))
    assert torch.equal(tables.classes, embed_classes(unet))
    assert (tables.times.data_ptr(), tables.classes.data_ptr()) == (times, classes)


# The checksum of weights ----------------------------------------------------------------------------------------------


def by_numpy(tensors: list[Tensor]) -> int:
    """The definition, word by word of unsigned integers."""
    raw = b"".join(bytes(t.flatten().view(torch.uint8).tolist()) + b"\0" * (-t.nbytes % 8) for t in tensors)
    x = np.frombuffer(raw, "<u8") ^ (np.arange(1, len(raw) // 8 + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15))
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return int((x ^ (x >> np.uint64(31))).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_every_checksum_is_the_definitions(dtype, monkeypatch):
    shapes = [(), (0,), (1,), (3,), (5, 7), (1001,), (64, 33, 3, 3)]
    tensors = [torch.randn(shape, dtype=torch.float32).to(dtype) for shape in shapes]
    expected = by_numpy(tensors)
    assert plain_checksum(tensors) == expected
    with monkeypatch.context() as patch:
        patch.setattr(network, "WORDS_BYTES", 64)  # a tensor in many parts
        assert plain_checksum(tensors) == expected
    engine = native.extension()
    for isa in engine.isas() if engine is not None else ():
        for threads in (1, 2, 7):
            assert sum(engine.checksums(tensors, threads=threads, isa=isa)) % (1 << 64) == expected
    if engine is not None:
        large = [torch.randn(3_000_000), torch.randn(5)]  # as many parts as threads share
        assert {sum(engine.checksums(large, threads=n)) % (1 << 64) for n in (1, 2, 3)} == {plain_checksum(large)}


EDITS = {
    "flip signs": lambda w, draw: flip_signs(w, draw),
    "flip a bit": lambda w, draw: w.view(torch.int32).bitwise_xor_(one_at(w, draw, 1 << draw(st.integers(0, 30)))),
    "flip one bit of all": lambda w, draw: w.view(torch.int32).bitwise_xor_(1 << draw(st.integers(0, 30))),
    "negate": lambda w, draw: w.neg_(),
    "swap": lambda w, draw: swap(w, draw),
    "permute": lambda w, draw: w.copy_(w.flatten()[torch.randperm(w.numel())].view(w.shape)),
    "roll": lambda w, draw: w.copy_(w.roll(draw(st.integers(1, 9)))),
    "scale": lambda w, draw: w.mul_(2.0 ** draw(st.integers(-3, 3))),
    "move": lambda w, draw: w.add_(one_at(w, draw, 1)).sub_(one_at(w, draw, 1)),
}


def one_at(w: Tensor, draw, value: int) -> Tensor:
    """A tensor of zeros with a value at one place."""
    zeros = torch.zeros(w.numel(), dtype=torch.int32)
    zeros[draw(st.integers(0, w.numel() - 1))] = value
    return zeros.view(w.shape)


def flip_signs(w: Tensor, draw) -> None:
    """At places a fixed distance apart, where they cancelled before, or anywhere."""
    flat, count = w.view(-1), draw(st.integers(1, 8))
    first, distance = draw(st.integers(0, 15)), draw(st.sampled_from([1, 2, 4, 8, 16]))
    places = torch.arange(first, first + count * distance, distance) % flat.numel()
    flat[torch.randperm(flat.numel())[:count] if draw(st.booleans()) else places.unique()] *= -1


def swap(w: Tensor, draw) -> None:
    flat = w.view(-1)
    i, j = (draw(st.integers(0, flat.numel() - 1)) for _ in range(2))
    flat[i], flat[j] = flat[j].clone(), flat[i].clone()


def test_a_checksum_of_a_network_asks_the_device_once():
    """A fresh state of the backend `triton` computes it: reads of values cost most, then copies and operations."""
    module = random_unet(change(**VARIANTS["layers"]))
    for kind in (torch.contiguous_format, torch.channels_last):
        weights = [p.detach() for p in module.to(memory_format=kind).parameters()]
        with Counter() as counter:
            plain_checksum(weights)
        counts = collections.Counter(counter.seen)
        assert counts["_local_scalar_dense"] == 1
        assert not {"clone", "copy_", "_to_copy"} & counts.keys()
        assert counts["cat"] <= 1 + sum(w.nbytes for w in weights) // network.WORDS_BYTES
        assert counts.total() <= 4 * len(weights) + 20 * counts["cat"]


def test_the_layout_of_weights_is_a_part_of_them():
    """The same memory read by other strides, or in channels_last, where the order of memory is another."""
    square = torch.randn(8, 8)
    assert plain_checksum([square.T]) != plain_checksum([square])
    image = torch.randn(4, 8, 3, 3).to(memory_format=torch.channels_last)
    flat = image.permute(0, 2, 3, 1)
    assert flat.is_contiguous()
    seen = {plain_checksum([t]) for t in (image, flat, image.contiguous(), image.view(2, 2, 8, 3, 3), flat.flatten())}
    assert len(seen) == 4, "the memory of two is one, as is their layout"
    for edit in (lambda w: w[1, 2, 0, 1].neg_(), lambda w: w.copy_(w.flip(1)), lambda w: w.copy_(w.mT.clone())):
        edited = image.clone()
        edit(edited)
        assert edited.is_contiguous(memory_format=torch.channels_last)
        assert plain_checksum([edited]) != plain_checksum([image])
    gaps, overlaps = torch.randn(8, 8)[:, ::2], torch.randn(1, 8).expand(8, 8)
    for strided in (gaps, overlaps):
        before = plain_checksum([strided])
        assert before == plain_checksum([strided])
        strided[0, 3].neg_()
        assert plain_checksum([strided]) != before


MODULE = nn.Sequential(nn.Conv2d(3, 16, 3), nn.Linear(5, 7), nn.GroupNorm(2, 6))


@settings(max_examples=200)
@given(data=st.data())
def test_every_edit_of_weights_changes_the_checksum(data):
    module = copy.deepcopy(MODULE)
    for _ in range(data.draw(st.integers(1, 3))):
        parameter = data.draw(st.sampled_from([p.data for p in module.parameters()]))
        EDITS[data.draw(st.sampled_from(sorted(EDITS)))](parameter, data.draw)
    had, has = ([p.detach() for p in m.parameters()] for m in (MODULE, module))
    same = all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(had, has, strict=True))
    assert (checksum(module) == checksum(MODULE)) == same
    assert (plain_checksum(has) == plain_checksum(had)) == same


def test_sign_flips_that_cancelled_are_noticed():
    """Two signs in the upper halves of words, which a sum modulo 2^64 of the words and their neighbours loses."""
    for places in ([1, 3], [1, 3, 5, 7], [0, 2], [0, 1, 2, 3]):
        edited = copy.deepcopy(MODULE)
        edited[0].weight.data.view(-1)[places] *= -1
        assert checksum(edited) != checksum(MODULE)


def test_no_weight_is_copied_for_its_checksum(monkeypatch):
    """Not even in channels_last, as a Sampler has the networks that it loads."""
    engine = native.extension()
    if engine is None:
        pytest.skip("the native engine is not built")
    seen = []

    class Spied:
        isas = engine.isas

        @staticmethod
        def checksums(arrays, **options):
            seen.extend(a.data_ptr() for a in arrays)
            return engine.checksums(arrays, **options)

    monkeypatch.setattr(sys.modules["fastdiff.backends.native.extension"], "extension", lambda: Spied)
    module = copy.deepcopy(MODULE).to(memory_format=torch.channels_last)
    weights = list(module.parameters())
    assert not weights[0].is_contiguous()
    assert checksum(module) == plain_checksum([p.detach() for p in weights]) != checksum(MODULE)
    before = checksums(module)
    assert set(seen) == {p.data_ptr() for p in (*weights, *MODULE.parameters())}
    assert checksums(MODULE).keys() == before.keys() == dict(module.named_parameters()).keys()
    for name, p in module.named_parameters():
        p.data.view(-1)[:1].neg_() if p.is_contiguous() else p.data[0, 0, 0, 0].neg_()
        now = checksums(module)
        assert [key for key in now if now[key] != before[key]] == [name]
        before = now
    square = nn.Linear(8, 8)
    had = checksums(square)
    square.weight.data = square.weight.data.T  # the same memory in another order
    assert checksums(square)["weight"] != had["weight"]


def test_a_tensor_without_memory_is_refused():
    engine = native.extension()
    if engine is None:
        pytest.skip("fastdiff._native is not built")
    freed = torch.zeros(8)
    freed.untyped_storage().resize_(0)
    with pytest.raises((ValueError, TypeError, RuntimeError)):
        engine.checksums([freed])


# Changes that the configuration does not describe ---------------------------------------------------------------------


@pytest.mark.parametrize("name", VARIANTS)
def test_a_network_as_it_was_made_has_no_changes(name):
    """In training, in another dtype, with gradients or tied weights or a note on it, it still is what it was."""
    unet = random_unet(change(**VARIANTS[name])).train()
    assert unsupported_changes(unet) == []
    unet.note = "mine"
    unet.conv_in.weight.requires_grad_(False)
    unet.down_blocks[0].resnets[0].dropout.p = 0.5  # the share has no effect in evaluation
    unet.up_blocks[0].resnets[1].norm2.weight = unet.up_blocks[0].resnets[1].norm2.bias
    assert unsupported_changes(unet.double()) == []


@pytest.mark.parametrize("name", CHANGES)
def test_changes_are_refused_by_name(name):
    unet = random_unet(TINY)
    assert unsupported_changes(unet) == []
    edit, words = CHANGES[name]
    edit(unet)
    (reason,) = unsupported_changes(unet)
    assert reason.startswith("the network is not what its configuration says: ")
    assert words in reason


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (lambda u: setattr(u.mid_block.resnets[0], "scale_factor", 3.0), "mid_block.resnets.0.scale_factor = 3.0"),
        (lambda u: setattr(u.mid_block.resnets[0], "scale_shift", True), "mid_block.resnets.0.scale_shift = True"),
        (lambda u: setattr(u.down_blocks[0].downsamplers[0], "padding", 0), "downsamplers.0.padding = 0 (not 1)"),
        (lambda u: setattr(u, "sinusoid", lambda t: t), "sinusoid was replaced"),
        (lambda u: setattr(u.mid_block.resnets[1], "second_norm", lambda h, e: h), "resnets.1.second_norm was"),
        (lambda u: setattr(u, "config", TINY.to_dict()), "its config is a dict, not a UNetConfig"),
        (lambda u: setattr(u, "config", change(norm_eps=0.5)), "norm1.eps = 1e-05 (not 0.5)"),
    ],
)
def test_changes_of_our_own_modules(edit, words):
    unet = random_unet(TINY)
    edit(unet)
    (reason,) = unsupported_changes(unet)
    assert words in reason


@pytest.mark.parametrize("name", GLOBAL_CHANGES)
def test_changes_of_the_process_are_refused_by_name(name):
    """A reference that is made under them would have them too."""
    made_before = random_unet(TINY)
    edit, words = GLOBAL_CHANGES[name]
    with edit():
        for unet in (made_before, random_unet(TINY)):
            (reason,) = unsupported_changes(unet)
            assert words in reason
    assert unsupported_changes(made_before) == []


def test_a_class_of_its_own_in_the_place_of_that_of_torch():
    with attribute(nn, "Conv2d", Twisted):
        unet = random_unet(TINY)
        (reason,) = unsupported_changes(unet)
        assert "conv_in is a Twisted of tests.support.changed" in reason
    (reason,) = unsupported_changes(unet)
    assert "Twisted" in reason


def test_a_long_list_of_changes_is_counted():
    unet = random_unet(TINY)
    circular(unet)
    (reason,) = unsupported_changes(unet)
    convolutions = sum(isinstance(m, nn.Conv2d) and m.padding == (1, 1) for m in unet.modules())
    assert re.search(rf"; and {2 * convolutions - 4} more$|; and {convolutions - 4} more$", reason)
