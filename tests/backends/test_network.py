"""Parts that `native` and `triton` share: the tables of embeddings, and the changes of a network that are refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import nn

from fastdiff import NoiseSchedule, solvers
from fastdiff.backends.network import EmbeddingTables, unsupported_changes
from fastdiff.core.lower import embed_classes, embed_timesteps, lower
from fastdiff.core.state import TableBank
from fastdiff.unet import UNet
from tests.support.changed import CHANGES, GLOBAL_CHANGES, Twisted, attribute, circular
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
