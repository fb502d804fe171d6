"""`StepTable` as a value: equality, JSON, printing, the tables that it refuses, and intervals of guidance."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import json
import math
import pickle

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import COLUMNS, Row, StepTable, ddim, ddpm, lcm
from fastdiff.solvers.ddpm import VARIANCES
from tests.support.solver_cases import runs
from tests.support.trajectories import SCHEDULES

LINEAR = SCHEDULES["linear"]


@st.composite
def tables(draw):
    schedule, options = draw(runs(clip=draw(st.sampled_from([None, 1.0, 0.5]))))
    if draw(st.booleans()):
        return schedule, options, ddpm(schedule, variance=draw(st.sampled_from(list(VARIANCES))), **options)
    eps_from = draw(st.sampled_from(["clipped", "output"]))
    return schedule, options, ddim(schedule, eta=draw(st.floats(0, 1)), eps_from=eps_from, **options)


@given(tables())
def test_tables_hold_together(case):
    schedule, options, table = case
    listed = options["steps"] is None
    assert len(table) == table.steps == (len(options["spacing"]) if listed else options["steps"])
    ts = table.timesteps
    assert all(a > b for a, b in itertools.pairwise(ts))
    assert ts[-1] >= 0
    last = schedule.timesteps - 1
    if listed:
        assert list(ts) == options["spacing"]
    elif table.steps == 1 or options["spacing"] in ("trailing", "linspace"):
        assert ts[0] == last
    elif options["spacing"] == "leading":
        assert ts[0] == (table.steps - 1) * (schedule.timesteps // table.steps) + options["steps_offset"]
    else:
        assert max(math.floor(0.8 * schedule.timesteps) - 1, table.steps - 1) <= ts[0] <= last
    assert table.init_scale == 1.0
    for row in table.rows:
        assert row.abar == schedule.abar(row.t)
    for row, after in itertools.pairwise(table.rows):
        assert row.abar_next == after.abar
    assert table.rows[-1].abar_next == 1.0
    assert table.rows[-1].s == 0.0
    assert table.history == 0
    assert table.nfe() == len(table)


@given(tables())
@settings(max_examples=50)
def test_tables_are_values(case):
    _, _, table = case
    twin = StepTable.from_json(table.to_json())
    for same in (twin, copy.deepcopy(table), pickle.loads(pickle.dumps(table)), dataclasses.replace(table)):
        assert same == table
        assert hash(same) == hash(table)
        assert same.rows is table.rows or same.coefficients.tobytes() == table.coefficients.tobytes()
    assert len({table, twin}) == 1
    other = dataclasses.replace(table, rows=(table.rows[0]._replace(kx=table.rows[0].kx + 1e-9), *table.rows[1:]))
    assert other != table
    first, names, *lines = str(table).splitlines()
    assert f"{table.solver}: {table.steps} steps" in first
    for i, (row, line) in enumerate(zip(table.rows, lines, strict=True)):
        shown = dict(zip(names.split(), map(float, line.split()), strict=True))
        assert shown.pop("row") == i
        for name in COLUMNS:  # a column of zeros is left out, so is one of infinite bounds
            value = getattr(row, name)
            assert shown.get(name.rstrip("_"), 0.0) == pytest.approx(value if math.isfinite(value) else 0.0, rel=1e-5)


def test_tables_cannot_be_changed():
    table = ddim(LINEAR, 5)
    with pytest.raises(AttributeError):
        table.steps = 6
    with pytest.raises(AttributeError):
        table.rows[0].kx = 1.0
    before = hash(table)
    table.coefficients[:] = 0.0
    assert hash(table) == before
    assert (table.coefficients[:-1, COLUMNS.index("a0")] != 0).all()
    assert isinstance(dataclasses.replace(table, rows=list(table.rows)).rows, tuple)


def test_the_last_row_of_coefficients_is_the_identity():
    table = ddim(LINEAR, 5)
    assert table.coefficients.shape == (6, len(COLUMNS))
    assert table.coefficients[:5].tolist() == [list(row) for row in table.rows]
    identity = dict(zip(COLUMNS, table.coefficients[-1], strict=True))
    assert {name: k for name, k in identity.items() if k} == {
        "t": table.rows[-1].t,
        "abar": 1.0,
        "abar_next": 1.0,
        "c": math.inf,
        "ax": 1.0,
    }


ROW = Row(t=10.0, abar=0.5, abar_next=0.9, kx=1.0, ko=1.0, ax=1.0)
LAST = ROW._replace(t=5.0, abar=0.9, abar_next=1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": ()}, "0 rows"),
        ({"rows": (tuple(ROW), LAST)}, "not a Row"),
        ({"rows": (ROW._replace(kx=math.nan), LAST)}, "kx=nan"),
        ({"rows": (ROW._replace(a1=math.inf), LAST)}, "a1=inf"),
        ({"rows": (ROW._replace(s="1"), LAST)}, "s='1'"),
        ({"rows": (ROW._replace(s=None), LAST)}, "s=None"),
        ({"rows": (ROW._replace(c=math.nan), LAST)}, "c=nan"),
        ({"rows": (ROW._replace(c=-math.inf), LAST)}, "c=-inf"),
        ({"rows": (ROW._replace(c=0.0), LAST)}, "c=0.0"),
        ({"rows": (ROW._replace(c=-1.0), LAST)}, "c=-1.0"),
        ({"rows": (ROW._replace(abar=1.0), LAST)}, "abar=1.0"),
        ({"rows": (ROW._replace(abar=-0.1), LAST)}, "abar=-0.1"),
        ({"rows": (ROW, LAST._replace(abar_next=1.1))}, "1.1"),
        ({"rows": (ROW, LAST._replace(t=-1.0))}, "t=-1.0"),
        ({"rows": (ROW, LAST._replace(t=10.0))}, "10.0, 10.0"),
        ({"rows": (ROW, LAST._replace(t=11.0))}, "10.0, 11.0"),
        ({"rows": (ROW, LAST._replace(abar=0.8))}, "starts at 0.8"),
        ({"rows": (ROW._replace(push=0.5), LAST)}, "push=0.5"),
        ({"rows": (ROW._replace(save=2.0), LAST)}, "save=2.0"),
        ({"solver": 3}, "solver=3"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"steps": True}, "steps=True"),
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": math.nan}, "init_scale=nan"),
        ({"init_scale": "1"}, "init_scale='1'"),
        ({"ascending": 1}, "ascending=1"),
    ],
)
def test_bad_tables_are_refused(change, said):
    good = {"solver": "x", "steps": 2, "rows": (ROW, LAST)}
    assert len(StepTable(**good)) == 2
    with pytest.raises(InvalidArgument) as caught:
        StepTable(**{**good, **change})
    assert said in str(caught.value)


def test_stages_and_ascending_tables_are_possible():
    stage = LAST._replace(t=10.0, abar=0.5, stage=1.0)
    assert len(StepTable("heun", 1, (ROW, stage))) == 2
    upward = (LAST._replace(abar_next=0.5), ROW)
    assert len(StepTable("inversion", 2, upward, ascending=True)) == 2
    with pytest.raises(InvalidArgument, match="must fall"):
        StepTable("inversion", 2, upward)


def edited(**changes):
    return json.dumps({**json.loads(StepTable("x", 2, (ROW, LAST)).to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "null",
        "{}",
        "[" * 100_000,
        edited(format=2),
        edited(columns=["t"]),
        edited(rows=[]),
        edited(rows=[[1.0, 2.0]]),
        edited(rows=[["a"] * len(COLUMNS)]),
        edited(rows=[[*ROW[:3], None, *ROW[4:5], None, *ROW[6:]]]),  # null is c's alone
        edited(rows=[[*ROW[:3], 10**400, *ROW[4:5], None, *ROW[6:]]]),
        edited(rows=5),
        edited(steps="2"),
        edited(steps=[2]),
        edited(solver=None),
        edited(init_scale=None),
        edited(ascending="no"),
    ],
    ids=range(18),
)
def test_bad_json_is_refused(text):
    with pytest.raises(InvalidArgument):
        StepTable.from_json(text)


@pytest.mark.parametrize("text", [1 << 31, range(1 << 40), None, ["{}"]], ids=str)
def test_a_table_is_read_from_texts_only(text):
    """The bytes of a whole number would be as many zeros."""
    with pytest.raises(InvalidArgument, match="a step table is read from a text"):
        StepTable.from_json(text)


def test_long_values_are_shown_short():
    with pytest.raises(InvalidArgument) as caught:
        lcm(NoiseSchedule(), 4, spacing="a" * 100_000)
    assert len(str(caught.value)) < 500


def test_json_is_exact():
    row = ROW._replace(kx=1 / 3, ko=-2e-17, s=5e-324, sv=-0.0, c=0.1 + 0.2)
    table = StepTable("x", 2, (row, LAST), init_scale=math.pi, ascending=True)
    twin = StepTable.from_json(table.to_json())
    assert twin == table
    assert twin.coefficients.tobytes() == table.coefficients.tobytes()
    assert math.isinf(twin.rows[1].c)
    json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0, 1), range(10)),
        ((0.25, 0.75), range(3, 7)),
        ((0.3, 0.7), range(3, 7)),
        ((0.0, 0.05), ()),
        ((1, 1), ()),
        ((0, 0.1), [0]),
    ],
)
def test_guidance_interval(interval, guided):
    """The rows that diffusers' pipelines guide: not i / N < start or (i + 1) / N > end."""
    table = ddim(LINEAR, 10).with_guidance_interval(*interval)
    start, end = interval
    assert [i for i, row in enumerate(table.rows) if row.g] == list(guided)
    assert list(guided) == [i for i in range(10) if not (i / 10 < start or (i + 1) / 10 > end)]
    assert {row.g for row in table.rows} <= {0.0, 1.0}
    assert table.nfe() == 10
    assert table.nfe(guided=True) == 10 + len(guided)
    plain = [row._replace(g=1.0) for row in table.rows]
    assert plain == list(ddim(LINEAR, 10).rows)


@pytest.mark.parametrize(
    "interval", [(-0.1, 1), (0, 1.1), (0.6, 0.4), (math.nan, 1), (0, math.nan), ("0", 1), (0, None), (True, 1)]
)
def test_bad_guidance_intervals(interval):
    with pytest.raises(InvalidArgument, match="0 <= start <= end <= 1") as caught:
        ddim(LINEAR, 10).with_guidance_interval(*interval)
    assert repr(interval[0]) in str(caught.value)
    assert repr(interval[1]) in str(caught.value)
