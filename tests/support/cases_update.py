"""Cases of the update, guidance and noise."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fastdiff import NoiseSchedule, solvers
from fastdiff.core import noise
from fastdiff.core.state import TableBank
from fastdiff.kernels import guidance, update
from fastdiff.kernels import noise as kernel
from fastdiff.kernels.launch import Config, Launch, name_of
from fastdiff.solvers import COLUMNS, Row, StepTable
from tests.support.cases_norm import configured, meta, normal, poison
from tests.support.kernel_harness import DTYPES, Case

CASES: dict[str, Callable[[], Case]] = {}
SHIPPED: dict[str, Callable[[], Launch]] = {}
ONES: dict[str, Callable[[], Launch]] = {}

TERMS = ("kx", "ko", "hx", "ho", "h0", "ax", "ao", "a0", "a1", "a2", "a3", "as_", "s", "sv", "g")


def random_table(rows: int, seed: int, zeros: float) -> StepTable:
    """Build a table of coefficients in +-[0.3, 1], of which a share ``zeros`` is 0, with pushes, saves and bounds."""
    g = np.random.default_rng(seed)
    levels = np.linspace(0.1, 1.0, rows + 1)
    built = []
    for i in range(rows):
        k = {name: float(g.uniform(0.3, 1.0) * g.choice([-1, 1]) * (g.random() >= zeros)) for name in TERMS}
        k |= {"c": float(g.choice([0.5, math.inf])), "push": float(g.random() < 0.6), "save": float(g.random() < 0.4)}
        built.append(Row(t=rows - i, abar=levels[i], abar_next=levels[i + 1], **k))
    return StepTable("random", rows, tuple(built))


# Tables and the row of an image in each. The last row of a table is the identity, which changes nothing.
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
STANDS = [
    (random_table(3, 1, 0.0), 0),
    (random_table(4, 2, 0.5), 1),
    (random_table(4, 2, 0.5), 2),
    (random_table(5, 3, 0.7), 3),
    (random_table(5, 4, 0.8), 4),
    (random_table(5, 4, 0.8), 5),
    (solvers.ddim(SCHEDULE, 5), 2),
    (solvers.ddpm(SCHEDULE, 5), 3),
    (solvers.dpmpp_3m(SCHEDULE, 6), 3),
    (solvers.heun(SCHEDULE, 4), 1),
]
READERS = {
    "xs": ("as_",), "m1": ("a1",), "m2": ("a2",), "m3": ("a3",), "z": ("s",), "x": ("kx", "hx", "ax"),
    "out": ("ko", "ho", "ao"), "v": ("sv",),
}  # fmt: skip
WRITES = ("x", "xs", "m1", "m2", "m3", "row", "arrived")


def nhwc(x: Tensor, padding: int) -> Tensor:
    """Return the same [rows, C, H, W] as a slice of NHWC memory with ``padding`` more channels."""
    rows, C, H, W = x.shape
    whole = poison(rows, H, W, C + padding, dtype=x.dtype)
    whole[..., :C] = x.permute(0, 2, 3, 1)
    return whole.permute(0, 3, 1, 2)[:, :C]


def update_case(
    shape: tuple[int, int, int], dtype: torch.dtype, *, learned: bool, guided: bool, buffers: bool = True,
    philox: bool = True, scaled: bool = False, padding: int | None = None,
) -> Case:  # fmt: skip
    """Build a case with an image for each of STANDS, whose unread operands are NaN. padding None: NCHW."""
    tables, stands = zip(*STANDS, strict=True)
    if not learned:
        tables = tuple(dataclasses.replace(t, rows=tuple(r._replace(sv=0.0) for r in t.rows)) for t in tables)
    B, C = len(tables), shape[0]
    bank = TableBank(tables, torch.device("cpu"))
    held = {name: normal(B, *shape, seed=i) for i, name in enumerate(("x", "xs", "m1", "m2", "m3", "z"))}
    out = normal((1 + guided) * B, (1 + learned) * C, *shape[1:], seed=9)
    held |= {"out": out[:B, :C], "v": out[:B, C:]}
    w = torch.tensor([1.0, 1.5, 0.0, 4.0, -1.0])[torch.arange(B) % 5]
    for b, (table, stand) in enumerate(zip(tables, stands, strict=True)):
        row = dict(zip(COLUMNS, table.coefficients[stand].tolist(), strict=True))
        if not buffers:  # without buffers, rows neither save nor read them
            for name in ("a1", "a2", "a3", "as_", "hx", "ho", "h0"):
                row[name] = 0.0
        for name, readers in READERS.items():
            if not any(row[reader] for reader in readers):
                held[name][b] = math.nan
        if guided and row["g"] * (w[b] - 1) == 0:
            out[B + b] = math.nan
        if guided:
            out[B + b, C:] = math.nan  # the variance is read from the conditional row
    arguments = {
        "x": held["x"], "out": (out if padding is None else nhwc(out, padding)).to(dtype), "bank": bank.values,
        "table": torch.arange(B), "row": torch.tensor(stands), "lengths": bank.lengths,
        "seed": torch.arange(B) * 0x123456789ABCDEF - 5, "index": torch.arange(B) * 0x87654321 + 7,
        "arrived": torch.zeros(B, dtype=torch.int32), "z": None if philox else held["z"],
        "x0_scale": 1 / (1 + torch.arange(B) % 3) if scaled else None, "guidance": w if guided else None,
    }  # fmt: skip
    if buffers:
        arguments |= {name: held[name] for name in ("xs", "m1", "m2", "m3")}
    else:
        for name in ("a1", "a2", "a3", "as_"):
            bank.values[..., COLUMNS.index(name)] = 0.0
    return Case(update.update, arguments, tuple(name for name in WRITES if arguments.get(name) is not None), band=8.0)


for shape, dtype in itertools.product([(1, 1, 1), (3, 11, 13)], DTYPES):
    for learned, guided in itertools.product((False, True), repeat=2):
        name = f"update {shape} {name_of(dtype)}" + " learned" * learned + " guided" * guided
        CASES[name] = functools.partial(
            update_case, shape, dtype, learned=learned, guided=guided, padding=None if dtype == torch.float32 else 2
        )
every = functools.partial(update_case, (2, 5, 7), torch.bfloat16, learned=True, guided=True, padding=3)
CASES["update with noise given"] = functools.partial(every, philox=False)
CASES["update with x0 scaled"] = functools.partial(every, scaled=True)
CASES["update without buffers"] = functools.partial(every, buffers=False)
CASES["update of NCHW halves"] = functools.partial(every, padding=None)
for config in update.CANDIDATES:
    CASES[f"update in {config}"] = functools.partial(
        configured, functools.partial(update_case, (3, 19, 19), torch.float32, learned=True, guided=True), config
    )


def guide_case(shape: tuple[int, int, int], dtype: torch.dtype, guided: bool, padding: int | None) -> Case:
    case = update_case(shape, dtype, learned=True, guided=guided, padding=padding)
    names = ("bank", "table", "row", "guidance") if guided else ()
    net, B = case.arguments["out"], len(STANDS)
    arguments = {
        "net": net,
        "out": poison(B, *net.shape[1:]),
        "channels": shape[0],
        **{name: case.arguments[name] for name in names},
    }
    return Case(guidance.guide, arguments, ("out",))


for dtype, guided, padding in itertools.product(DTYPES, (False, True), (None, 2)):
    name = f"guide {name_of(dtype)}" + " guided" * guided + " padded" * (padding is not None)
    CASES[name] = functools.partial(guide_case, (3, 9, 5), dtype, guided, padding)
for config in guidance.CANDIDATES:
    build = functools.partial(guide_case, (3, 19, 19), torch.bfloat16, True, 2)
    CASES[f"guide in {config}"] = functools.partial(configured, build, config)


def noise_case(shape: tuple[int, ...], dtype: torch.dtype, stream: int) -> Case:
    seeds = [0, 1, 12345, (1 << 63) - 1, (1 << 63) + 7, (1 << 64) - 1]
    arguments = {
        "seed": torch.tensor([noise.as_int64(s) for s in seeds]),
        "index": torch.tensor([0, 1, 0xFFFFFFFF, 1 << 32, 0x7FFFFFFF80000000, 0x123456789ABCDEF]),
        "row": torch.tensor([0, 1, 2, 999, 0xFFFFFE, 0xFFFFFF]),
        "dst": poison(len(seeds), *shape) if dtype.is_floating_point else torch.zeros(len(seeds), *shape, dtype=dtype),
        "stream": stream,
    }
    return Case(kernel.noise, arguments, ("dst",), within=2e-6)


for shape, stream in itertools.product([(1, 1, 1), (3, 19, 19)], (noise.UPDATE, noise.MASK)):
    CASES[f"words {shape} stream {stream}"] = functools.partial(noise_case, shape, torch.int32, stream)
    CASES[f"normals {shape} stream {stream}"] = functools.partial(noise_case, shape, torch.float32, stream)
CASES["normals, many"] = functools.partial(noise_case, (3, 30, 31), torch.float32, noise.INITIAL)
for config in kernel.CANDIDATES:
    build = functools.partial(noise_case, (3, 19, 19), torch.float32, noise.UPDATE)
    CASES[f"normals in {config}"] = functools.partial(configured, build, config)


# Compiled launches: 32x32 and 256x256 images, and every configuration.


def update_launch(
    shape: tuple[int, int, int, int], dtype: torch.dtype, *, guided: bool, buffers: tuple[str, ...] = (),
    learned: bool = False, philox: bool = True, config: Config | None = None,
) -> Launch:  # fmt: skip
    B, C, H, W = shape
    rows, channels = (1 + guided) * B, (1 + learned) * C
    whole = functools.partial(meta, B, dtype=torch.int64)
    out = meta(rows, H, W, 8, dtype=dtype).permute(0, 3, 1, 2)[:, :channels]
    more = {name: meta(*shape) for name in (*buffers, *["z"] * (not philox))}
    return update.update(
        meta(*shape), out, meta(2, 51, len(COLUMNS)), whole(), whole(), whole(), whole(), whole(),
        meta(B, dtype=torch.int32), guidance=meta(B) if guided else None, config=config, **more,
    )  # fmt: skip


for config in update.CANDIDATES:
    SHIPPED[f"update {config}"] = functools.partial(
        update_launch, (4, 3, 32, 32), torch.bfloat16, guided=True, learned=True, buffers=("xs", "m1", "m2", "m3"),
        config=config,
    )  # fmt: skip
for dtype in DTYPES:
    SHIPPED[f"update {name_of(dtype)}"] = functools.partial(update_launch, (1, 3, 256, 256), dtype, guided=False)
SHIPPED["update with noise given"] = functools.partial(
    update_launch, (64, 3, 32, 32), torch.float32, guided=False, philox=False, buffers=("m1",)
)


def guide_launch(dtype: torch.dtype, guided: bool, config: Config | None = None) -> Launch:
    net = meta(8 * (1 + guided), 32, 32, 8, dtype=dtype).permute(0, 3, 1, 2)[:, :3]
    whole = functools.partial(meta, 8, dtype=torch.int64)
    more = (
        {"bank": meta(2, 51, len(COLUMNS)), "table": whole(), "row": whole(), "guidance": meta(8), "channels": 3}
        if guided
        else {}
    )
    return guidance.guide(net, meta(8, 3, 32, 32), config=config, **more)


for config in guidance.CANDIDATES:
    SHIPPED[f"guide {config}"] = functools.partial(guide_launch, torch.bfloat16, True, config)
for dtype in DTYPES:
    SHIPPED[f"guide {name_of(dtype)} unguided"] = functools.partial(guide_launch, dtype, False)


def noise_launch(dtype: torch.dtype, config: Config | None = None) -> Launch:
    whole = functools.partial(meta, 4, dtype=torch.int64)
    return kernel.noise(whole(), whole(), whole(), meta(4, 3, 32, 32, dtype=dtype), stream=1, config=config)


for config in kernel.CANDIDATES:
    SHIPPED[f"normals {config}"] = functools.partial(noise_launch, torch.float32, config)
SHIPPED["words"] = functools.partial(noise_launch, torch.int32)


for guided in (False, True):
    ONES["update" + " guided" * guided] = functools.partial(
        update_launch, (1, 1, 1, 1), torch.bfloat16, guided=guided, learned=True, buffers=("xs", "m1", "m2", "m3")
    )
ONES["guide"] = functools.partial(
    guidance.guide, meta(2, 1, 1, 1), meta(1, 1, 1, 1), bank=meta(1, 1, len(COLUMNS)), table=meta(1, dtype=torch.int64),
    row=meta(1, dtype=torch.int64), guidance=meta(1), channels=1,
)  # fmt: skip
ONES["normals"] = functools.partial(
    kernel.noise, *(meta(1, dtype=torch.int64) for _ in range(3)), meta(1, 1, 1, 1), stream=1
)
