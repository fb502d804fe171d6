"""One list of cases, and every backend: mixed batches against float64, and reasons where a backend cannot run."""

from __future__ import annotations

import dataclasses
import functools
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff import backends, solvers
from fastdiff.backends import Spec, native
from fastdiff.core import noise
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError, InvalidArgument
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable
from fastdiff.unet import UNetConfig
from tests.support.unets import TINY, TINY_CLASSES, diffusers_twin, random_unet, relative_error

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
SHAPE = (3, 8, 8)
NULL = 4
CPU = torch.device("cpu")

needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)

# One level and no attention: what a compiler has done soonest.
MICRO_CLASSES = dataclasses.replace(
    TINY_CLASSES,
    block_out_channels=(8,),
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    add_attention=False,
)

DDIM5, DDIM3 = solvers.ddim(SCHEDULE, 5), solvers.ddim(SCHEDULE, 3, eta=0.5, clip=None)
DDPM4 = solvers.ddpm(SCHEDULE, 4)
LEARNED4 = solvers.ddpm(SCHEDULE, 4, variance="learned_range")


def multistep(table: StepTable) -> StepTable:
    """A table whose rows read what earlier rows kept: their x0 (m1, m2), and a saved x (xs)."""
    rows = []
    for i, row in enumerate(table.rows):
        row = row._replace(h0=1.0, push=1.0, save=float(i % 2 == 0))
        if i >= 2:
            row = row._replace(a0=1.5 * row.a0, a1=-0.7 * row.a0, a2=0.2 * row.a0)
        if i % 2:
            row = row._replace(ax=0.9 * row.ax, as_=0.1 * row.ax)
        rows.append(row)
    return dataclasses.replace(table, solver="multistep", rows=tuple(rows))


@dataclasses.dataclass(frozen=True)
class Case:
    """A batch: each image at ``row`` of ``tables[table]``, and how many steps it makes; ``idle`` slots hold NaN."""

    config: UNetConfig
    tables: tuple[StepTable, ...]
    table: tuple[int, ...]
    row: tuple[int, ...]
    labels: tuple[int, ...] | None = None
    guidance: tuple[float, ...] | None = None
    rescale: float = 0.0
    idle: tuple[int, ...] = ()
    steps: int = 5

    @property
    def active(self) -> list[int]:
        return [i for i in range(len(self.row)) if i not in self.idle]


CASES = {
    "one image": Case(TINY, (DDIM5,), (0,), (0,)),
    "unconditional": Case(TINY, (DDIM5,), (0, 0, 0), (0, 0, 0)),
    "stochastic": Case(TINY, (DDPM4,), (0, 0, 0), (0, 0, 0)),
    "learned variance": Case(dataclasses.replace(TINY, out_channels=6), (LEARNED4,), (0, 0), (0, 0)),
    "labels": Case(TINY_CLASSES, (DDIM5,), (0, 0, 0), (0, 0, 0), labels=(3, 0, NULL)),
    "guidance": Case(TINY_CLASSES, (DDIM5,), (0, 0, 0), (0, 0, 0), labels=(3, 0, 1), guidance=(1.0, 3.0, -0.5)),
    "rescale": Case(TINY_CLASSES, (DDIM5,), (0, 0), (0, 0), labels=(3, 0), guidance=(1.0, 4.0), rescale=0.7),
    "guidance interval": Case(
        TINY_CLASSES, (DDIM5.with_guidance_interval(0.2, 0.6), DDPM4), (0, 1), (0, 0), labels=(3, 0),
        guidance=(3.0, 1.0),
    ),
    "rows of one table": Case(TINY, (DDIM5,), (0, 0, 0, 0), (0, 4, 2, 1)),
    "rows of several tables": Case(TINY, (DDIM5, DDPM4, DDIM3), (1, 0, 2, 1, 2), (0, 2, 2, 3, 0)),
    "history": Case(TINY, (DDPM4, multistep(DDIM5)), (1, 0, 1), (0, 1, 0)),
    "idle": Case(TINY, (DDIM5, DDPM4), (0, 1, 0), (1, 0, 0), idle=(0,)),
    "everything": Case(
        dataclasses.replace(TINY_CLASSES, out_channels=6), (DDIM5, LEARNED4, multistep(DDIM3)), (0, 1, 2, 1, 0),
        (1, 0, 0, 2, 0), labels=(3, 0, 1, 2, 2), guidance=(2.0, 1.0, 0.0, 4.0, 3.0), rescale=0.3, idle=(4,),
    ),
}  # fmt: skip
MICRO = Case(
    MICRO_CLASSES, (DDIM5, DDPM4), (0, 1, 0), (0, 1, 0), labels=(3, 0, 1), guidance=(2.0, 3.0, 1.0), idle=(2,), steps=3
)


def start(case: Case, dtype: torch.dtype = torch.float32, images: list[int] | None = None) -> State:
    """The batch of a case, or some of its images, at their rows. Slots that nothing may read hold NaN."""
    B = len(case.row)
    index = torch.arange(B)
    x = noise.normal(torch.full_like(index, 77), index, torch.zeros_like(index), noise.INITIAL, SHAPE)
    x[list(case.idle)] = torch.nan
    chosen = list(range(B)) if images is None else images
    state = State.create(
        x[chosen].to(dtype),
        TableBank(case.tables, CPU, dtype),
        seed=[100 + i for i in chosen],
        index=[2**40 + i for i in chosen],
        table=[case.table[i] for i in chosen],
        label=None if case.labels is None else [case.labels[i] for i in chosen],
        guidance=1.0 if case.guidance is None else [case.guidance[i] for i in chosen],
        guidance_rescale=case.rescale,
    )
    state.row_host[:] = [case.row[i] for i in chosen]
    state.row = torch.from_numpy(state.row_host.copy())
    idle = [slot for slot, i in enumerate(chosen) if i in case.idle]
    if idle:
        state.idle(idle)
    for name in ("m1", "m2", "m3", "xs"):
        if getattr(state, name) is not None:
            getattr(state, name).fill_(torch.nan)
    return state


def spec_of(state: State, dtype: torch.dtype, case: Case) -> Spec:
    null = NULL if case.labels is not None else None
    return Spec(len(state.x), SHAPE, dtype, CPU, null_label=null)


Prepare = Callable[[Any, Spec], backends.Runner]


def run(
    backend: str | Prepare,
    case: Case,
    dtype: torch.dtype = torch.float32,
    images: list[int] | None = None,
    rounded: bool = False,
) -> Tensor:
    """The states after every step, [steps, B, C, H, W]. ``rounded``: state and output are float32 between the steps."""
    unet = random_unet(case.config).to(dtype)
    state = start(case, dtype, images)
    spec = spec_of(state, dtype, case)
    runner = backends.prepare(backend, unet, spec) if isinstance(backend, str) else backend(unet, spec)
    states = []
    for _ in range(case.steps):
        if rounded:
            runner.forward(state)
            assert state.out is not None
            state.out = state.out.float().to(dtype)
            runner.update(state)
            state.x = state.x.float().to(dtype)
        else:
            runner.step(state)
        states.append(state.x.clone())
    assert (state.row_host == state.row.numpy()).all()
    return torch.stack(states)


@functools.cache
def exact(case: Case) -> Tensor:
    return run("eager", case, torch.float64)


@functools.cache
def one_by_one(case: Case, dtype: torch.dtype) -> Tensor:
    """Run every active image in a batch of its own."""
    return torch.cat([run("eager", case, dtype, [i]) for i in case.active], dim=1)


@functools.cache
def tolerance(case: Case) -> float:
    """Twice what float32 errs in batches of one and in a batch that holds every image twice, plus the rounding band:
    what rounding the state and the network's output once in a step does to a run in float64.
    """
    true = exact(case)[:, case.active]
    twice = run("eager", case, images=case.active * 2).unflatten(1, (2, -1)).transpose(0, 1)
    error = (torch.stack([one_by_one(case, torch.float32), *twice]) - true).abs().max()
    band = (run("eager", case, torch.float64, rounded=True)[:, case.active] - true).abs().max()
    return 2 * float(error + band)


def check(backend: str | Prepare, case: Case, rounding: float = 1.0) -> None:
    """rounding: how many times as much as a direct convolution's the backend's own algorithms round."""
    got, true = run(backend, case), exact(case)[:, case.active]
    allowed = rounding * tolerance(case)
    assert torch.isfinite(true).all()
    assert allowed < 1e-3, "a test that would pass wrong images"
    distance = (got[:, case.active] - true).abs().amax(dim=(0, 2, 3, 4))
    assert (distance <= allowed).all(), (distance, allowed)
    assert got[:, list(case.idle)].isnan().all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_an_image_does_not_depend_on_its_neighbours(case: Case) -> None:
    """In float64 an image depends on nothing of the others: rows, tables, labels, or the NaN of an idle slot."""
    together, alone = exact(case)[:, case.active], one_by_one(case, torch.float64)
    assert (together - alone).abs().max() <= 1e-11 * alone.abs().max()
    moved = (together[-1] - start(case, torch.float64).x[case.active]).abs().amax(dim=(1, 2, 3))
    assert (moved > 0.01).all()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_eager(case: Case) -> None:
    check("eager", case)


@pytest.fixture(params=native.extension().isas() if native.extension() else ["none"])
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of the native engine that this machine has."""
    if request.param == "none":
        pytest.skip("fastdiff._native is not built")
    monkeypatch.setenv("FASTDIFF_ISA", request.param)
    return request.param


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_native(case: Case, isa: str) -> None:
    check("native", case, rounding=4.0)  # Winograd's transforms: F(4x4, 3x3) rounds about four times as much


@pytest.mark.slow
@needs_compiler
def test_compiled_micro() -> None:
    check("compiled", MICRO)


@needs_compiler
@pytest.mark.slow
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_compiled(case: Case) -> None:
    check("compiled", case)


@needs_compiler
@pytest.mark.slow
def test_compiled_is_one_graph_and_follows_the_weights() -> None:
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    unet = random_unet(MICRO_CLASSES).train()
    sampler = Sampler(unet, SCHEDULE, backend="compiled")
    first = sampler.sample(2, steps=2, labels=1).images
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    again = sampler.sample(2, steps=3, labels=[0, 2], seed=1).images
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1, "compiled anew for the same batch"
    with torch.no_grad():
        unet.conv_in.weight.mul_(1.5)
    assert (sampler.sample(2, steps=2, labels=1).images - first).abs().max() > 0.01
    eager = Sampler(unet, SCHEDULE, backend="eager")
    assert (sampler.sample(2, steps=2, labels=1).images - eager.sample(2, steps=2, labels=1).images).abs().max() < 1e-4
    assert torch.isfinite(again).all()
    assert all(module.training for module in unet.modules())


class Convolution(nn.Module):
    """Return a network that compiles fast."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        out = self.conv(x) + 1e-3 * t.view(-1, 1, 1, 1)
        return out if class_labels is None else out + 0.1 * class_labels.view(-1, 1, 1, 1)


@needs_compiler
@pytest.mark.slow
def test_compiled_runs_any_number_of_batch_sizes() -> None:
    """Dynamo gives up on code that it had to compile for more than eight shapes."""
    unet = Convolution()
    compiled, eager = (Sampler(unet, SCHEDULE, backend=name, shape=SHAPE) for name in ("compiled", "eager"))
    for n in range(1, 12):
        for labels in (None, 1):
            images = [sampler.sample(n, steps=2, labels=labels).images for sampler in (compiled, eager)]
            assert (images[0] - images[1]).abs().max() < 1e-5


@needs_compiler
def test_compiled_edits() -> None:
    """With a real compiler: a mask, an image to start from and a guide act between its `forward` and `update`."""
    unet = Convolution()
    compiled, eager = (Sampler(unet, SCHEDULE, backend=name, shape=SHAPE) for name in ("compiled", "eager"))
    image = torch.rand(2, *SHAPE, generator=torch.Generator().manual_seed(1)) * 2 - 1
    mask = torch.zeros(8, 8)
    mask[2:6, 1:5] = 1
    for options in (
        {"mask": mask},
        {"mask": mask, "solver": "ddpm", "repaint": (2, 2)},
        {"strength": 0.5, "guide": lambda x0, _: -(x0**2).flatten(1).sum(1)},
    ):
        drawn = [s.sample(2, steps=4, image=image, **options).images for s in (compiled, eager)]
        assert (drawn[0] - drawn[1]).abs().max() < 1e-5
        assert (drawn[0] - image).abs().amax(dim=(1, 2, 3)).min() > 0.05
        if "mask" in options:
            known = (mask == 0).expand_as(image)
            assert torch.equal(drawn[0][known], image[known])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_checkpoints_in_half_precision_run_in_float32(tmp_path: Path, dtype: torch.dtype, backend: str) -> None:
    """A folder's dtype says how its weights are kept; they are run in float32 unless the caller asks for another."""
    if backend == "native":
        pytest.importorskip("fastdiff._native")
    twin = diffusers_twin(random_unet(TINY)).to(dtype)
    twin.save_pretrained(tmp_path / "unet")
    sampler = Sampler.from_pretrained(tmp_path, backend=backend, device="cpu", schedule=NoiseSchedule())
    assert sampler.dtype == torch.float32
    exact = random_unet(TINY).to(dtype).double()
    expected = Sampler(exact, backend="eager").sample(3, steps=5).images
    rounded = relative_error(expected, Sampler(random_unet(TINY), backend="eager").sample(3, steps=5).images)
    assert rounded > 1e-4, "the weights' rounding is heard"
    assert relative_error(sampler.sample(3, steps=5).images, expected) < 1e-5


def test_networks_in_bfloat16_run_natively(tmp_path: Path) -> None:
    """From memory, where the dtype is the network's own, and from a folder where the caller asks for it."""
    module = native.extension()
    if module is None or not native.multiplies_bf16(module):
        pytest.skip("no products of bfloat16 here")
    unet = random_unet(TINY).bfloat16()
    expected = Sampler(random_unet(TINY).bfloat16().double(), SCHEDULE, backend="eager").sample(3, steps=5).images
    sampler = Sampler(unet, SCHEDULE, backend="native")
    assert sampler.dtype == torch.bfloat16
    drawn = sampler.sample(3, steps=5).images
    assert 1e-5 < relative_error(drawn, expected) < 3e-2
    assert {p.dtype for p in unet.parameters()} == {torch.bfloat16}, "the network is not changed"
    diffusers_twin(unet).save_pretrained(tmp_path / "unet")
    options = {"device": "cpu", "dtype": "bfloat16", "schedule": SCHEDULE}
    asked = Sampler.from_pretrained(tmp_path, backend="native", **options)
    again = Sampler(asked.unet, SCHEDULE, backend="native", dtype="bfloat16").sample(3, steps=5).images
    assert torch.equal(again, drawn)


def test_forward_and_update_are_a_step() -> None:
    case = CASES["everything"]
    unet = random_unet(case.config)
    whole, halves = start(case), start(case)
    runner = backends.prepare("eager", unet, spec_of(whole, torch.float32, case))
    for _ in range(3):
        before = halves.x.clone()
        rows = halves.row_host.copy()
        runner.forward(halves)
        assert torch.equal(halves.x.nan_to_num(), before.nan_to_num())
        assert (halves.row_host == rows).all()
        assert halves.out is not None
        runner.update(halves)
        runner.step(whole)
        assert torch.equal(whole.x.nan_to_num(), halves.x.nan_to_num())
        assert (whole.row_host == halves.row_host).all()


def test_finished_images_idle_bit_for_bit() -> None:
    case = Case(TINY, (DDPM4, DDIM3), (0, 1), (2, 2))
    unet = random_unet(case.config)
    state = start(case)
    state.x[0, 0, 0, 0] = -0.0
    state.idle([0])
    kept = state.x[0].clone()
    runner = backends.prepare("eager", unet, spec_of(state, torch.float32, case))
    assert not state.done
    runner.step(state)
    assert state.done
    finished = state.x.clone()
    for _ in range(3):
        runner.step(state)
    assert state.done
    assert torch.equal(state.x.view(torch.int32), finished.view(torch.int32))
    assert torch.equal(state.x[0].view(torch.int32), kept.view(torch.int32)), "even the sign of a zero"
    assert state.row.tolist() == state.row_host.tolist() == [4, 3]


class Counter(nn.Module):
    """A network that notes the sizes of its batches and their dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(0.5))
        self.seen: list[tuple[int, torch.dtype]] = []

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        self.seen.append((len(x), x.dtype))
        return self.scale * x


@pytest.mark.parametrize(
    ("guidance", "idle", "row", "size"),
    [
        ((1.0, 1.0), (), (0, 0), 2),
        ((1.0, 2.0), (), (0, 0), 4),
        ((1.0, 2.0), (1,), (0, 0), 2),  # who idles asks for nothing
        ((1.0, 2.0), (), (0, 4), 2),  # past the guided rows
        ((2.0, 2.0), (), (4, 2), 4),
    ],
)
def test_unguided_steps_evaluate_the_network_once(
    guidance: tuple[float, ...], idle: tuple[int, ...], row: tuple[int, ...], size: int
) -> None:
    table = DDIM5.with_guidance_interval(0.0, 0.6)
    case = Case(TINY_CLASSES, (table,), (0, 0), row, labels=(0, 1), guidance=guidance, idle=idle)
    counter = Counter()
    state = start(case)
    backends.prepare("eager", counter, spec_of(state, torch.float32, case)).forward(state)
    assert counter.seen == [(size, torch.float32)]


def test_the_network_runs_in_the_dtype_that_was_asked_for() -> None:
    counter = Counter().to(torch.bfloat16)
    case = CASES["unconditional"]
    state = start(case)
    backends.prepare("eager", counter, spec_of(state, torch.bfloat16, case)).step(state)
    assert counter.seen == [(3, torch.bfloat16)]
    assert state.out.dtype == state.x.dtype == torch.float32


# Backends that cannot run ---------------------------------------------------------------------------------------------


def test_unknown_backends_are_refused() -> None:
    with pytest.raises(InvalidArgument, match=r"backend='cuda' is unknown; allowed: auto, eager, compiled, native"):
        backends.prepare("cuda", random_unet(TINY), Spec(1, SHAPE, torch.float32, CPU))


@pytest.mark.parametrize("backend", ["eager", "compiled"])
def test_bitwise_is_refused_with_the_reason(backend: str) -> None:
    spec = Spec(1, SHAPE, torch.float32, CPU, determinism="bitwise")
    with pytest.raises(
        BackendError, match=f"'{backend}' cannot give determinism='bitwise': .*depend on the batch.*'triton'"
    ):
        backends.prepare(backend, random_unet(TINY), spec)


def test_compiled_without_a_compiler_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("an explicit backend fell back")

    monkeypatch.setattr(shutil, "which", lambda *_, **__: None)
    monkeypatch.setattr(torch, "compile", never)
    with pytest.raises(BackendError, match=r"'compiled' cannot run here: .*C\+\+ compiler on the PATH"):
        backends.prepare("compiled", random_unet(TINY), Spec(1, SHAPE, torch.float32, CPU))
    with pytest.raises(BackendError, match="compiler"):
        Sampler(random_unet(TINY), SCHEDULE, backend="compiled")


def test_auto_logs_its_choice_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="fastdiff"):
        sampler = Sampler(random_unet(TINY), SCHEDULE)
        sampler.sample(2, steps=1)
        sampler.sample(1, steps=1)
    choice = "native" if native.extension() is not None else "eager"
    (record,) = caplog.records
    why = "" if choice == "native" else "; native cannot: the extension fastdiff._native is not built"
    assert record.getMessage().startswith(f"backend auto: {choice}{why}")
    assert sampler.backend == choice
    assert Sampler(random_unet(TINY), SCHEDULE, dtype="float16").backend == "eager"
    caplog.clear()
    with caplog.at_level(logging.INFO, logger="fastdiff"):
        Sampler(random_unet(TINY), SCHEDULE, backend="eager").sample(1, steps=1)
    assert not caplog.records
