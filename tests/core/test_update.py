"""The update of a batch: every column against numpy, what is not read, images that differ, finish, idle; guidance."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from diffusers.guiders.guider_utils import rescale_noise_cfg
from torch import Tensor

from fastdiff.backends import Spec
from fastdiff.backends.eager import EagerRunner
from fastdiff.core.noise import UPDATE, as_int64, normal
from fastdiff.core.state import State, TableBank
from fastdiff.core.update import History, guide, predict_x0, update, update_rows
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import COLUMNS, Row, StepTable, ddim, ddpm

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule()
SHAPE = (2, 3, 3)
BUFFERS = ("m1", "m2", "m3", "xs")
TERMS = ("kx", "ko", "hx", "ho", "h0", "ax", "ao", "a0", "a1", "a2", "a3", "as_", "s", "sv")


def random_table(rows: int, seed: int) -> StepTable:
    """Build a table that uses every column: coefficients in +-[0.3, 1], some bounds finite, random pushes and saves."""
    g = np.random.default_rng(seed)
    levels = np.linspace(0.1, 1.0, rows + 1)
    built = []
    for i in range(rows):
        k = dict(zip(TERMS, (g.uniform(0.3, 1.0, len(TERMS)) * g.choice([-1, 1], len(TERMS))).tolist(), strict=True))
        k |= {"c": [0.7, math.inf][i % 2], "push": float(g.random() < 0.7), "save": float(g.random() < 0.5)}
        built.append(Row(t=rows - i, abar=levels[i], abar_next=levels[i + 1], **k))
    return StepTable("random", rows, tuple(built))


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def random_state(tables: list[StepTable], seed: int, dtype: torch.dtype = torch.float64, **options: object) -> State:
    """Build a state with one image for each table, all buffers filled, and an output with a second half v."""
    B = len(tables)
    state = State.create(
        random_tensor(B, *SHAPE, seed=seed, dtype=dtype),
        TableBank(tables, CPU, dtype),
        table=range(B),
        **{"noise": lambda row: random_tensor(B, *SHAPE, seed=seed + 100 + row, dtype=dtype), **options},
    )
    for i, name in enumerate(BUFFERS):
        if getattr(state, name) is not None:
            setattr(state, name, random_tensor(B, *SHAPE, seed=seed + 10 + i, dtype=dtype))
    state.out = random_tensor(B, 2 * SHAPE[0], *SHAPE[1:], seed=seed + 20, dtype=dtype)
    return state


def stand_at(state: State, rows: list[int]) -> None:
    state.row, state.row_host = torch.tensor(rows), np.array(rows)


def image(state: State, b: int) -> dict[str, np.ndarray]:
    """Return the x and the buffers of image b in float64."""
    held = {name: getattr(state, name) for name in ("x", *BUFFERS)}
    return {name: None if v is None else v[b].double().numpy() for name, v in held.items()}


def expected(row: Row, before: dict[str, np.ndarray], out: np.ndarray, v: np.ndarray, z: np.ndarray) -> dict:
    """Compute the formula of `fastdiff.solvers.table` for one image in float64; zero coefficients drop out."""

    def term(k, operand):
        return k * operand if k else np.zeros(SHAPE)

    x, m1, m2, m3, xs = (before[name] for name in ("x", "m1", "m2", "m3", "xs"))
    x0 = np.clip(term(row.kx, x) + term(row.ko, out), -row.c, row.c)
    h = term(row.hx, x) + term(row.ho, out) + term(row.h0, x0)
    new = term(row.ax, x) + term(row.ao, out) + term(row.a0, x0) + term(row.as_, xs)
    new = new + term(row.a1, m1) + term(row.a2, m2) + term(row.a3, m3)
    new = new + term(row.s, np.exp(term(row.sv, v)) * z)
    m1, m2, m3 = (h, m1, m2) if row.push else (m1, m2, m3)
    return {"x": new, "m1": m1, "m2": m2, "m3": m3, "xs": x if row.save else xs, "x0": x0}


# The formula ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-5)])
def test_every_column_against_numpy(dtype, tolerance):
    """Tables of different lengths, images at different rows, over whole runs: x, the history and the saved input."""
    tables = [random_table(rows, seed=rows) for rows in (5, 9, 7, 9, 1)]
    state = random_state(tables, seed=1, dtype=dtype)
    stand_at(state, [0, 4, 2, 8, 0])
    for step in range(6):
        state.out = random_tensor(5, 4, 3, 3, seed=step, dtype=dtype)
        rows = state.row_host.copy()
        before = [image(state, b) for b in range(5)]
        x0 = predict_x0(state)
        update(state)
        for b, table in enumerate(tables):
            if rows[b] == len(table):
                assert torch.equal(state.x[b].double(), torch.from_numpy(before[b]["x"]))
                continue
            out, v = state.out[b].double().numpy().reshape(2, *SHAPE)
            z = random_tensor(5, *SHAPE, seed=101 + int(rows[b]), dtype=dtype)[b].double().numpy()
            row = table.rows[rows[b]]
            if dtype == torch.float32:  # the coefficients are rounded as well
                row = Row(*np.float32(row).astype(np.float64).tolist())
            want = expected(row, before[b], out, v, z)
            got = {**image(state, b), "x0": x0[b].double().numpy()}
            for name, value in want.items():
                scale = 1 + np.abs(value).max()
                assert np.abs(got[name] - value).max() < tolerance * scale, (step, b, name)
    assert state.done


def test_update_rows_needs_no_state_and_changes_no_argument():
    tables = [random_table(rows, seed=rows) for rows in (3, 5)]
    z = random_tensor(2, *SHAPE, seed=3)
    state = random_state(tables, seed=2, noise=lambda row: z)
    stand_at(state, [2, 1])
    history = History(state.xs, state.m1, state.m2, state.m3)
    arguments = (state.x, state.out, state.coefficients(), history, z)
    tensors = [state.x, state.out, *history, z]
    before = [t.clone() for t in tensors]
    x, kept = update_rows(*arguments)
    assert all(torch.equal(t, was) for t, was in zip(tensors, before, strict=True))
    update(state)
    assert torch.equal(x, state.x)
    assert all(torch.equal(a, b) for a, b in zip(kept, (state.xs, state.m1, state.m2, state.m3), strict=True))


@pytest.mark.parametrize("name", [*TERMS, "c", "push", "save"])
def test_every_column_shows(name):
    """Increasing a coefficient by 1 %, or flipping a flag, changes what the column is for, and nothing else."""
    reaches = {"x"}
    if name in ("hx", "ho", "h0", "push"):
        reaches = {"m1"}
    elif name in ("kx", "ko", "c"):
        reaches = {"x", "m1"}
    elif name == "save":
        reaches = {"xs"}
    table = random_table(4, seed=3)
    table = dataclasses.replace(table, rows=tuple(row._replace(push=1.0, c=0.7) for row in table.rows))
    for i, row in enumerate(table.rows):
        value = getattr(row, name)
        changed = row._replace(**{name: 1.0 - value if name in ("push", "save") else 1.01 * value})
        twin = dataclasses.replace(table, rows=(*table.rows[:i], changed, *table.rows[i + 1 :]))
        results = []
        for t in (table, twin):
            state = random_state([t], seed=5)
            stand_at(state, [i])
            update(state)
            results.append(image(state, 0))
        moved = {key for key in results[0] if np.abs(results[0][key] - results[1][key]).max() > 1e-9}
        assert moved - {"m2", "m3"} == reaches, i
        assert ("m2" in moved) == ("m3" in moved) == (name == "push")


def test_learned_range_scales_the_noise():
    """S = s exp(sv v): per element, and only where a table asks for it."""
    tables = [ddpm(SCHEDULE, 50, variance=variance) for variance in ("learned_range", "posterior")]
    for b, learned in enumerate((True, False)):
        means, states = [], []
        for noise in (torch.zeros, torch.ones):
            state = random_state(tables, seed=2, noise=lambda row, noise=noise: noise(2, *SHAPE, dtype=torch.float64))
            stand_at(state, [20, 20])
            v = state.out[:, 2:]
            update(state)
            (means if noise is torch.zeros else states).append(state.x)
        row = tables[b].rows[20]
        scale = (states[0] - means[0])[b]
        want = row.s * torch.exp(row.sv * v[b]) if learned else torch.full_like(scale, row.s)
        assert torch.allclose(scale, want, rtol=1e-12, atol=1e-14)
        # (1 + v) / 2 log beta + (1 - v) / 2 log posterior
        small, large = (ddpm(SCHEDULE, 50, variance=name).rows[20].s for name in ("posterior", "beta"))
        if learned:
            log = (1 + v[b]) / 2 * math.log(large**2) + (1 - v[b]) / 2 * math.log(small**2)
            assert torch.allclose(scale, torch.exp(log / 2), rtol=1e-9)


# What is not read -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("junk", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["x", "out", "v", "z", *BUFFERS])
def test_no_coefficient_no_reading(name, junk):
    """NaN and infinity behind zero coefficients reach nothing: neither x' nor a history that reads other operands."""
    readers = {
        "x": ("kx", "hx", "ax", "save"),
        "out": ("ko", "ho", "ao"),
        "v": ("sv",),
        "z": ("s",),
        "m1": ("a1", "push"),
        "m2": ("a2", "push"),
        "m3": ("a3",),
        "xs": ("as_",),
    }[name]
    full = random_table(3, seed=4)
    quiet = full.rows[1]._replace(**dict.fromkeys(readers, 0.0))
    # Row 0 keeps every coefficient, so that every buffer exists.
    table = dataclasses.replace(full, rows=(full.rows[0], quiet, full.rows[2]))
    results = []
    for value in (0.25, junk):
        state = random_state([table, full], seed=6)
        stand_at(state, [1, 1])
        target = {"out": state.out[:, :2], "v": state.out[:, 2:]}.get(name)
        if name == "z":
            z = state.noise(1)
            z[0] = value
            state.noise = lambda row, z=z: z
        else:
            (getattr(state, name) if target is None else target)[0] = value
        update(state)
        results.append(state)
    clean, dirty = results
    assert torch.isfinite(dirty.x).all()
    for buffer in ("x", *BUFFERS):
        # Only the junk itself may still lie in its buffer: in image 0.
        same = [getattr(s, buffer)[0 if buffer != name else 1 :] for s in (clean, dirty)]
        assert torch.equal(*same), buffer
    assert torch.equal(clean.x, dirty.x)


@pytest.mark.parametrize("junk", [math.nan, math.inf])
def test_a_broken_image_leaves_its_peers_alone(junk):
    """An image full of NaN does not change the bits of the others in its batch."""
    tables = [random_table(6, seed=s) for s in range(4)]
    clean, dirty = (random_state(tables, seed=8, dtype=torch.float32) for _ in range(2))
    for state in (clean, dirty):
        stand_at(state, [0, 3, 1, 5])
    for held in (dirty.x, dirty.out, *(getattr(dirty, name) for name in BUFFERS)):
        held[2] = junk
    for _ in range(6):
        update(clean)
        update(dirty)
        for name in ("x", *BUFFERS):
            a, b = getattr(clean, name), getattr(dirty, name)
            for peer in (0, 1, 3):
                assert torch.equal(a[peer], b[peer]), name
    assert not torch.isfinite(dirty.x[2]).any()


# Images that differ ---------------------------------------------------------------------------------------------------


def network(x: Tensor, t: Tensor) -> Tensor:
    """Products and sums only: their rounding does not depend on how a batch is vectorised."""
    t = t.reshape(-1, 1, 1, 1).to(x.dtype)
    out = (0.6 * x + 0.001 * t) * (1 - 0.1 * x)
    return torch.cat([out, 0.2 * out], dim=1)


MIXED = [
    ddim(SCHEDULE, 10),
    ddim(SCHEDULE, 4, eta=1.0, prediction="v_prediction", eps_from="output"),
    ddpm(SCHEDULE, 7, variance="learned_range"),
    random_table(9, seed=1),
    ddpm(SCHEDULE, 12, variance="beta", prediction="sample", clip=None),
]


@pytest.mark.parametrize("philox", [True, False])
def test_a_mixed_batch_equals_each_image_alone(philox):
    """Results are equal bit for bit, with different tables, seeds, indices; finished images do not change."""
    seeds, indices = [3, 5, (1 << 64) - 1, 5, 8], [0, 7, 1, 2, 1 << 40]
    x = random_tensor(5, *SHAPE, seed=9, dtype=torch.float32)
    z = random_tensor(13, 5, *SHAPE, seed=10, dtype=torch.float32)

    def start(images):
        noise = None if philox else (lambda row: z[row, images])
        bank = TableBank([MIXED[b] for b in images], CPU)
        seed, index = [seeds[b] for b in images], [indices[b] for b in images]
        return State.create(x[images], bank, table=range(len(images)), seed=seed, index=index, noise=noise)

    def finish(state):
        while not state.done:
            state.out = network(state.x, state.column("t"))
            update(state)
        return state

    together = finish(start([0, 1, 2, 3, 4]))
    for b in range(5):
        alone = finish(start([b]))
        assert torch.equal(alone.x[0], together.x[b]), b
    backwards = finish(start([4, 3, 2, 1, 0]))
    assert torch.equal(backwards.x.flip(0), together.x)


def test_rows_of_one_batch_may_differ():
    """An image that joins later is not affected by the others' rows, and each takes the noise of its own row."""
    z = random_tensor(13, 1, *SHAPE, seed=11, dtype=torch.float32)
    x = random_tensor(2, *SHAPE, seed=12, dtype=torch.float32)
    table = ddpm(SCHEDULE, 12, variance="beta")

    def state(images):
        return State.create(x[images], TableBank([table], CPU), noise=lambda row: z[row].expand(len(images), *SHAPE))

    alone = [state([0]), state([1])]
    both = state([0, 1])
    for _ in range(5):
        alone[0].out = network(alone[0].x, alone[0].column("t"))[:, :2]
        update(alone[0])
    both.x[0] = alone[0].x[0]
    stand_at(both, [5, 0])
    for _ in range(12):
        for s in (*alone, both):
            s.out = network(s.x, s.column("t"))[:, :2]
            update(s)
    for b in (0, 1):
        assert torch.equal(both.x[b], alone[b].x[0])


def test_noise_is_asked_for_once_for_each_row_that_adds_some():
    asked = []

    def noise(row):
        asked.append(row)
        return random_tensor(3, *SHAPE, seed=row)

    tables = [ddpm(SCHEDULE, 4), ddim(SCHEDULE, 4), ddim(SCHEDULE, 6, eta=1.0)]
    state = random_state(tables, seed=1, noise=noise)
    stand_at(state, [1, 2, 1])
    update(state)
    assert asked == [1]
    stand_at(state, [2, 2, 4])
    update(state)
    assert asked == [1, 2, 4]
    stand_at(state, [3, 3, 5])  # last rows
    update(state)
    update(state)
    assert asked == [1, 2, 4]


def test_philox_noise_is_the_rows():
    """z of image b is Philox of its seed, index and row, in stream UPDATE."""
    table = ddpm(SCHEDULE, 10)
    seeds, indices = [1, (1 << 64) - 3], [4, 1 << 33]
    moved = []
    for s in (0.0, 1.0):
        rows = tuple(row._replace(s=row.s * s) for row in table.rows)
        bank = TableBank([dataclasses.replace(table, rows=rows)], CPU, torch.float64)
        state = State.create(random_tensor(2, *SHAPE, seed=1), bank, seed=seeds, index=indices)
        stand_at(state, [0, 6])
        state.out = random_tensor(2, *SHAPE, seed=2)
        update(state)
        moved.append(state.x)
    z = normal(torch.tensor([as_int64(s) for s in seeds]), torch.tensor(indices), torch.tensor([0, 6]), UPDATE, SHAPE)
    s = torch.tensor([table.rows[0].s, table.rows[6].s], dtype=torch.float64).reshape(-1, 1, 1, 1)
    assert torch.allclose(moved[1] - moved[0], s * z.double(), rtol=0, atol=1e-14)


# Finished images ------------------------------------------------------------------------------------------------------


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32)


@pytest.mark.parametrize("junk", [0.0, math.nan, math.inf])
def test_finished_images_idle(junk):
    """No bit of x changes, whatever the network's output; zeros keep their signs."""
    tables = [ddpm(SCHEDULE, 2, variance="learned_range"), random_table(8, seed=2)]
    state = random_state(tables, seed=3, dtype=torch.float32)
    for _ in range(2):
        update(state)
    assert state.row_host.tolist() == [2, 2]
    assert not state.done
    state.x[0, 0, 0] = torch.tensor([0.0, -0.0, math.inf])
    before = state.x[0].clone()
    for step in range(6):
        state.out[0] = junk
        for name in BUFFERS:
            getattr(state, name)[0] = junk
        assert not state.done, step
        update(state)
        assert torch.equal(bits(state.x[0]), bits(before))
        assert state.row_host.tolist() == state.row.tolist() == [2, 3 + step]
    assert state.done
    update(state)
    assert state.row_host.tolist() == state.row.tolist() == [2, 8]
    assert state.done


def test_cancelled_images_idle():
    tables = [random_table(8, seed=s) for s in range(3)]
    cancelled, other = (random_state(tables, seed=4, dtype=torch.float32) for _ in range(2))
    for state in (cancelled, other):
        update(state)
        update(state)
    before = cancelled.x[1].clone()
    cancelled.idle([1])
    assert cancelled.row_host.tolist() == cancelled.row.tolist() == [2, 8, 2]
    cancelled.out[1] = math.nan
    while not other.done:
        update(cancelled)
        update(other)
    assert torch.equal(bits(cancelled.x[1]), bits(before))
    for b in (0, 2):
        assert torch.equal(cancelled.x[b], other.x[b])
    assert cancelled.done
    cancelled.idle(range(3))
    assert cancelled.row.tolist() == [8, 8, 8]


def test_mirrors_follow_the_device():
    """Host and device have the same rows and coefficients for tables of different lengths, padding included."""
    state = random_state(MIXED, seed=5)
    stand_at(state, [8, 0, 6, 2, 0])
    while not state.done:
        assert state.row.tolist() == state.row_host.tolist()
        assert state.table.tolist() == state.table_host.tolist()
        for name in COLUMNS:
            device = state.column(name)
            assert device.tolist() == state.column_host(name).tolist()
            for b, table in enumerate(MIXED):
                row = int(state.row[b])
                want = getattr(table.rows[row], name) if row < len(table) else {"ax": 1.0, "c": math.inf}.get(name, 0.0)
                if row < len(table) or name not in ("t", "abar", "abar_next"):
                    assert float(device[b]) == want, (name, b)
        update(state)
    assert state.row.tolist() == [len(table) for table in MIXED]


def test_buffers_exist_where_a_table_reads_them():
    def depth(*tables):
        state = State.create(torch.zeros(1, *SHAPE), TableBank(tables, CPU))
        return [name for name in BUFFERS if getattr(state, name) is not None]

    plain = ddim(SCHEDULE, 3)
    two = dataclasses.replace(
        plain, rows=(plain.rows[0]._replace(push=1.0), plain.rows[1]._replace(a2=0.1), plain.rows[2])
    )
    saving = dataclasses.replace(plain, rows=(plain.rows[0]._replace(save=1.0), *plain.rows[1:]))
    assert two.history == 2
    assert depth(plain) == []
    assert depth(two, plain) == ["m1", "m2"]
    assert depth(plain, saving) == ["xs"]
    assert depth(random_table(3, seed=0)) == list(BUFFERS)


# Outputs that do not fit ----------------------------------------------------------------------------------------------


def test_channels_of_the_output():
    state = random_state([ddpm(SCHEDULE, 3, variance="learned_range")], seed=1)
    for channels in (1, 2, 3, 5):
        state.out = torch.zeros(1, channels, 3, 3, dtype=torch.float64)
        with pytest.raises(InvalidArgument, match=rf"gave {channels} channels; 2 are needed, or 4"):
            update(state)
    plain = random_state([ddpm(SCHEDULE, 3)], seed=1)
    wide, narrow = plain.out, plain.out[:, :2].clone()
    update(plain)
    twin = random_state([ddpm(SCHEDULE, 3)], seed=1)
    twin.out = narrow
    update(twin)
    assert wide.shape[1] == 4
    assert torch.equal(plain.x, twin.x)


# Guidance -------------------------------------------------------------------------------------------------------------


def halves(channels: int = 2, B: int = 4) -> tuple[Tensor, Tensor]:
    return tuple(random_tensor(B, channels, 3, 3, seed=s, dtype=torch.float32) for s in (1, 2))


@pytest.mark.parametrize("rescale", [0.0, 0.3, 0.7, 1.0])
def test_guidance_is_the_formula(rescale):
    c, u = halves()
    w = torch.tensor([1.0, 3.0, 0.0, -1.5])
    got = guide(c, u, w, 2, rescale).double().numpy()
    a, b = c.double().numpy(), u.double().numpy()
    for i, scale in enumerate(w.tolist()):
        out = b[i] + scale * (a[i] - b[i])
        if scale != 1.0:
            out = rescale * out * a[i].std(ddof=1) / out.std(ddof=1) + (1 - rescale) * out
        assert np.abs(got[i] - out).max() < 2e-6


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_is_diffusers(rescale):
    c, u = halves()
    w = torch.tensor([7.5, 3.0, 1.5, 2.0])
    theirs = u + w.reshape(-1, 1, 1, 1) * (c - u)
    if rescale:
        theirs = rescale_noise_cfg(theirs, c, rescale)
    assert (guide(c, u, w, 2, rescale) - theirs).abs().max() < 2e-6


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_guidance_of_1_is_off(rescale):
    """An image with w = 1 keeps its conditional output bit for bit, and the other images are not affected."""
    c, u = halves()
    w = torch.tensor([1.0, 3.0, 1.0, 2.0])
    clean = guide(c, u, w, 2, rescale)
    u[0] = math.nan
    got = guide(c, u, w, 2, rescale)
    assert torch.equal(bits(got[::2]), bits(c[::2]))
    assert torch.equal(got[1::2], clean[1::2])
    assert not torch.equal(got[1::2], c[1::2])


@pytest.mark.parametrize("rescale", [0.0, 0.7])
def test_learned_variance_comes_from_the_conditional_half(rescale):
    c, u = halves(channels=4)
    w = torch.tensor([1.0, 3.0, 0.0, 2.0])
    got = guide(c, u, w, 2, rescale)
    assert got.shape == c.shape
    assert torch.equal(got[:, 2:], c[:, 2:])
    assert torch.equal(got[:, :2], guide(c[:, :2], u[:, :2], w, 2, rescale))


class Classes:
    """A network whose output tells its label: out = (label + 1) x."""

    def __init__(self) -> None:
        self.images: list[int] = []

    def __call__(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.images.append(len(x))
        return (class_labels + 1).reshape(-1, 1, 1, 1).to(x.dtype) * x


def guided_run(table: StepTable, guidance: list[float]) -> tuple[list[Tensor], Classes]:
    """The outputs of every row: with label 2 (out = 3 x) and the null label 0 (out = x), out = (1 + 2 w) x."""
    network = Classes()
    B = len(guidance)
    spec = Spec(batch=B, shape=SHAPE, dtype=torch.float32, device=CPU, null_label=0)
    runner = EagerRunner(network, spec)
    x = random_tensor(B, *SHAPE, seed=1, dtype=torch.float32)
    state = State.create(x, TableBank([table], CPU), label=[2] * B, guidance=guidance)
    ratios = []
    while not state.done:
        x = state.x
        runner.forward(state)
        ratios.append((state.out / x).mean(dim=(1, 2, 3)))
        runner.update(state)
    return ratios, network


def test_guided_rows_of_a_run():
    """w = 1 + g (guidance - 1): rows inside the interval are guided, each image by its own weight, others are not."""
    table = ddim(SCHEDULE, 10).with_guidance_interval(0.3, 0.7)
    ratios, network = guided_run(table, [1.0, 2.0, 4.0])
    for i, ratio in enumerate(ratios):
        weights = [1.0, 2.0, 4.0] if 3 <= i < 7 else [1.0, 1.0, 1.0]
        assert ratio.tolist() == pytest.approx([1 + 2 * w for w in weights], rel=1e-5)
    assert network.images == [3] * 3 + [6] * 4 + [3] * 3
    assert sum(network.images) == 3 * table.nfe(guided=True)
    _, network = guided_run(table, [1.0, 1.0, 1.0])
    assert sum(network.images) == 3 * table.nfe(guided=False)


def test_one_percent_of_g_shows():
    table = ddim(SCHEDULE, 4)
    changed = dataclasses.replace(table, rows=(table.rows[0]._replace(g=1.01), *table.rows[1:]))
    one, other = guided_run(table, [3.0])[0], guided_run(changed, [3.0])[0]
    assert float(other[0] - one[0]) == pytest.approx(2 * 0.01 * 2.0, rel=1e-3)
