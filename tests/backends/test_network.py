"""Parts that `native` and `triton` share: the tables of embeddings."""

from __future__ import annotations

import torch

from fastdiff import NoiseSchedule, solvers
from fastdiff.backends.network import EmbeddingTables
from fastdiff.core.lower import embed_classes, embed_timesteps, lower
from fastdiff.core.state import TableBank
from fastdiff.unet import UNet
from tests.support.unets import TINY, TINY_CLASSES, random_unet

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
