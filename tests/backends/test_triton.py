"""Backend `triton` without a GPU: the references of its launches, in the buffers of the kernels, against float64.

Some launches are interpreted as well. The list of launches is checked, and capture with a substitute for CUDA graphs.
tests/kernels compares the kernels with their references. None of this has run on a GPU.
"""

from __future__ import annotations

import collections
import dataclasses
import gc
import itertools
import json
import logging
import os
import subprocess
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._pytree import tree_leaves

pytest.importorskip("triton", reason="the kernels need triton, which is installed on Linux x86-64 only")

import fastdiff
from fastdiff import solvers
from fastdiff.backends import BITWISE_ROWS, Spec
from fastdiff.backends import network as shared
from fastdiff.backends.graph import GraphRunner
from fastdiff.backends.triton import TritonRunner, TritonStep
from fastdiff.backends.triton import runner as triton
from fastdiff.core import noise, update
from fastdiff.core.lower import lower
from fastdiff.core.program import Attention, Conv
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.kernels import library as kernel_library
from fastdiff.kernels.launch import Launch
from fastdiff.kernels.library import LibraryLaunch
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.table import COLUMNS
from fastdiff.unet import UNet, UNetConfig
from tests.backends.test_backends import CASES, MICRO_CLASSES, Case, check, spec_of, start
from tests.core.test_program import CLASS_IMAGES, image_size
from tests.support.fake_cuda import FakeCuda
from tests.support.paths import ROOT
from tests.support.tuned_file import library_everywhere, tuning
from tests.support.unets import (  # fmt: skip
    ATTENTION_EVERYWHERE,
    OWN_VARIANTS,
    PUBLISHED,
    TINY,
    TINY_CLASSES,
    VARIANTS,
    change,
    random_images,
    random_labels,
    random_unet,
    relative_error,
)

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule()
# Rescaled guidance is a step of its own; this one is a part of the update, for learned variance and histories, too.
CASES = CASES | {"everything but rescaling": dataclasses.replace(CASES["everything"], rescale=0.0)}


def compute(launch: Launch) -> None:
    """Compute a launch without a GPU: by the library, which runs here too, or by the kernel's reference."""
    if isinstance(launch, LibraryLaunch):
        launch()
    else:
        launch.reference()


@pytest.fixture
def by_library(tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Yield a function that tunes a network to the library, for every convolution that the library can do."""
    with tuning(tmp_path) as tune:

        def everywhere(config: UNetConfig, *rows: int, dtype: torch.dtype = torch.float32) -> None:
            with torch.device("meta"):
                program = lower(UNet(config), image_size(config))
            tune({key: value for n in rows for key, value in library_everywhere(program, n, dtype).items()})

        yield everywhere


def compute_on_device(launch: Launch) -> None:
    """Do as `compute`, but without the update's reference, which reads rows from the device and cannot be captured."""
    if launch.op != "update":
        return compute(launch)
    a = launch.arguments
    out, coefficients = a["out"], a["bank"][a["table"], a["row"]]
    if a["guidance"] is not None:
        w = 1.0 + coefficients[:, COLUMNS.index("g")] * (a["guidance"] - 1.0)
        out = update.guide(*out.chunk(2), w, a["x"].shape[1], 0.0)
    z = noise.normal(a["seed"], a["index"], a["row"], noise.UPDATE, a["x"].shape[1:])
    history = update.History(a["xs"], a["m1"], a["m2"], a["m3"])
    x, kept = update.update_rows(a["x"], out, coefficients, history, z)
    row = torch.minimum(a["row"] + 1, a["lengths"][a["table"]])
    for held, new in zip((a["x"], *history, a["row"]), (x, *kept, row), strict=True):
        if held is not None:
            held.copy_(new)


class Direct:
    """Runner without graphs."""

    def __init__(self, unet: Any, spec: Spec):
        self.steps = TritonStep(unet, spec, compute)
        self.fresh = True

    @torch.no_grad()
    def forward(self, state: State) -> None:
        self.steps.follow(state.bank, self.fresh)
        self.fresh = False
        self.steps.evaluate(state, bool(state.guided_host.any()))

    @torch.no_grad()
    def update(self, state: State) -> None:
        self.steps.advance(state, noisy=True)
        state.advance_host()

    @torch.no_grad()
    def step(self, state: State) -> None:
        self.steps.follow(state.bank, self.fresh)
        self.fresh = False
        self.steps.whole(state, bool(state.guided_host.any()), noisy=True)
        state.advance_host()


class Halves(Direct):
    def step(self, state: State) -> None:
        self.forward(state)
        self.update(state)


def forward(unet: UNet, x: torch.Tensor, t: float, labels: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The network by way of launches; every buffer holds NaN before."""
    steps = TritonStep(unet, Spec(len(x), tuple(x.shape[1:]), dtype, CPU), compute)  # type: ignore[arg-type]  # three numbers
    state = State.create(x, TableBank([solvers.ddim(SCHEDULE, spacing=[t])], CPU), label=labels)
    with torch.no_grad():
        steps.follow(state.bank, fresh=False)
        steps.network(state, guided=False)  # makes the buffers
        for b in steps.buffers.values():
            b.arena.fill_(0xFF)
            for tensor in (*b.embedding.values(), *b.space.values(), *b.parts.values(), b.net):
                tensor.fill_(torch.nan)
        steps.evaluate(state, guided=False)
    return state.out


def assert_equals_module(config: UNetConfig, size: Any = None, bound: float = 2e-5, **options: Any) -> None:
    unet = random_unet(config)
    x, labels = random_images(config, 2, size), random_labels(config, 2)
    with torch.no_grad():
        exact = random_unet(config).double()(x.double(), torch.full((2,), 917.0).double(), labels)
    assert relative_error(forward(unet, x, 917.0, labels, **options), exact) <= bound


# The launches are the network -----------------------------------------------------------------------------------------


def runnable(config: UNetConfig) -> bool:
    return config.class_embed_type is None and config.padding_mode == "zeros"


@pytest.mark.parametrize("variant", [name for name in VARIANTS if runnable(change(**VARIANTS[name]))])
def test_variant(variant: str) -> None:
    assert_equals_module(change(**VARIANTS[variant]))


@pytest.mark.parametrize("variant", [name for name in OWN_VARIANTS if runnable(change(**OWN_VARIANTS[name]))])
def test_own_variant(variant: str) -> None:
    assert_equals_module(change(**OWN_VARIANTS[variant]))


@pytest.mark.parametrize("variant", CLASS_IMAGES)
def test_class_images(variant: str) -> None:
    assert_equals_module(change(TINY_CLASSES, **CLASS_IMAGES[variant], center_input_sample=True), (10, 14))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision(dtype: torch.dtype) -> None:
    assert_equals_module(TINY_CLASSES, bound=2e-2 if dtype == torch.bfloat16 else 3e-3, dtype=dtype)


def test_networks_in_half_precision() -> None:
    """Their weights are rounded already; embeddings are computed in float32 from those."""
    unet = random_unet(TINY_CLASSES).bfloat16()
    x, labels = random_images(TINY_CLASSES, 2, None), random_labels(TINY_CLASSES, 2)
    with torch.no_grad():
        exact = random_unet(TINY_CLASSES).bfloat16().double()(x.double(), torch.full((2,), 917.0).double(), labels)
    assert relative_error(forward(unet, x, 917.0, labels, torch.bfloat16), exact) <= 2e-2


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_mixed_batches(case: Case) -> None:
    check(Direct, case)


@pytest.mark.parametrize(
    ("config", "dtype", "bound"),
    [
        (change(TINY_CLASSES, **VARIANTS["padding 0"]), torch.float32, 2e-5),
        (change(TINY_CLASSES, **VARIANTS["padding 0"]), torch.bfloat16, 2e-2),
        (change(TINY_CLASSES, **VARIANTS["padding 0"]), torch.float16, 3e-3),
        (change(**VARIANTS["odd groups across the concatenation"]), torch.float32, 2e-5),
        (change(**VARIANTS["scale-shift with classes"]), torch.float32, 2e-5),
    ],
    ids=["fp32", "bf16", "fp16", "odd groups", "scale-shift"],
)
def test_products_by_the_library(
    by_library: Callable[..., None], config: UNetConfig, dtype: torch.dtype, bound: float
) -> None:
    """Everywhere but behind a doubling, of one and of two sources."""
    by_library(config, 2, dtype=dtype)
    listed = launches(config, 2, dtype)
    own = {launch.arguments["PHASES"] for launch in listed if launch.op in ("conv.conv", "conv.partial")}
    assert own <= {4}
    assert {len(launch.arguments["src"]) for launch in listed if launch.op == "library.products"} == {1, 2}
    assert_equals_module(config, bound=bound, dtype=dtype)


def test_bitwise_has_nothing_made_by_the_library(by_library: Callable[..., None]) -> None:
    """Its algorithms may be others in another batch."""
    by_library(TINY, 2, BITWISE_ROWS)
    ops = {}
    for determinism in ("seed", "bitwise"):
        x = random_images(TINY, 2, None)
        spec = Spec(2, tuple(x.shape[1:]), torch.float32, CPU, determinism=determinism)  # type: ignore[arg-type]  # three numbers
        steps = TritonStep(random_unet(TINY), spec, compute)
        state = State.create(x, TableBank([solvers.ddim(NoiseSchedule(), 2)], CPU))
        steps.follow(state.bank, fresh=False)
        with torch.no_grad():
            ops[determinism] = {launch.op for launch in steps.network(state, guided=False)}
    assert "library.products" in ops["seed"]
    assert "library.products" not in ops["bitwise"]


@pytest.mark.parametrize("name", ["guidance", "guidance interval", "rescale", "everything but rescaling"])
def test_mixed_batches_in_halves(name: str) -> None:
    check(Halves, CASES[name])


@pytest.mark.parametrize("library", [False, True], ids=["own kernels", "the library"])
def test_weights_that_change_are_followed_at_their_addresses(by_library: Callable[..., None], library: bool) -> None:
    if library:
        by_library(TINY, 2)
    unet = random_unet(TINY)
    x = random_images(TINY, 2, None)
    steps = TritonStep(unet, Spec(2, tuple(x.shape[1:]), torch.float32, CPU), compute)  # type: ignore[arg-type]  # three numbers

    def run() -> torch.Tensor:
        state = State.create(x.clone(), TableBank([solvers.ddim(SCHEDULE, 4)], CPU))
        with torch.no_grad():
            steps.follow(state.bank, fresh=True)
            steps.evaluate(state, guided=False)
        assert state.out is not None
        return state.out

    before = run()
    packed = [tensors for key, (_, tensors) in steps.weights.made.items() if key[-1] is library]
    assert len(packed) > 10, "each convolution's, once"
    held = [tensor.data_ptr() for _, tensors in steps.weights.made.values() for tensor in tensors]
    with torch.no_grad():
        unet.time_embedding.linear_1.weight.data.mul_(1.5)
        unet.conv_in.weight.data.mul_(0.5)
    after = run()
    assert held == [tensor.data_ptr() for _, tensors in steps.weights.made.values() for tensor in tensors]
    assert relative_error(before, after) > 0.01
    with torch.no_grad():
        exact = unet(x, torch.full((2,), float(solvers.ddim(SCHEDULE, 4).rows[0].t)))
    assert relative_error(after, exact) <= 2e-5


# The list of launches -------------------------------------------------------------------------------------------------


def launches(config: UNetConfig, batch: int, dtype: torch.dtype = torch.bfloat16) -> list[Launch]:
    unet = random_unet(config)
    H, W = image_size(config)
    spec = Spec(batch, (config.in_channels, H, W), dtype, CPU)
    bank, labels = TableBank([solvers.ddim(SCHEDULE, 2)], CPU), random_labels(config, batch)
    state = State.create(torch.zeros(batch, *spec.shape), bank, label=labels)
    with torch.no_grad():
        return TritonStep(unet, spec, compute).network(state, guided=False)


@pytest.mark.parametrize("library", [False, True], ids=["own kernels", "the library"])
def test_nothing_but_norms_and_products_is_launched(by_library: Callable[..., None], library: bool) -> None:
    """52 convolutions of 3x3, shortcuts and attention of the CIFAR-10 network; SiLU, bias, embedding, residual and
    concatenation are parts of them, and no scheduler is left.
    """
    if library:
        by_library(PUBLISHED["ddpm-cifar10-32"], 1, dtype=torch.bfloat16)
    listed = launches(PUBLISHED["ddpm-cifar10-32"], 1)
    counts = collections.Counter(launch.op for launch in listed)
    program = TritonStep(
        random_unet(PUBLISHED["ddpm-cifar10-32"]), Spec(1, (3, 32, 32), torch.float32, CPU), compute
    ).program
    kinds = collections.Counter(type(op).__name__ for op in program.ops)
    assert counts["input"] == 1
    assert counts["attention.attention"] == kinds["Attention"]
    assert counts["library.products"] + counts["conv.conv"] + counts["conv.partial"] == kinds["Conv"]
    summed = counts["epilogue.finish"] + counts["epilogue.normed"] + counts["epilogue.gather"]
    assert counts["library.products"] + counts["conv.partial"] == summed > 0
    assert counts["epilogue.gather"] == (not library), "of the last convolution's columns"
    doubled = sum(isinstance(op, Conv) and op.upsample for op in program.ops)
    assert counts["library.products"] == (kinds["Conv"] - doubled if library else 0)
    # A merged attention and the product before it read one norm of one map, which is computed once.
    norms = {(op.src[isinstance(op, Attention) :], program.norm(op)) for op in program.ops if program.norm(op)}
    assert counts["epilogue.normed"] + counts["norm.group_norm"] == len(norms)
    assert len(norms) == sum(program.norm(op) is not None for op in program.ops) - kinds["Attention"]
    small = sum(program.buffers[src[0]].shape[0] <= 16 for src, _ in norms)
    assert counts["epilogue.normed"] == small == 40, "a norm of a map of at most 16x16 pixels has no launch of its own"
    assert set(counts) <= {
        "input", "norm.group_norm", "conv.conv", "conv.partial", "library.products", "epilogue.finish",
        "epilogue.normed", "epilogue.gather", "attention.attention",
    }  # fmt: skip
    assert library or len(listed) + 1 <= 170, "with the update"


def test_every_kind_of_launch_is_run_as_it_says() -> None:
    spec = Spec(1, (3, 8, 8), torch.float32, CPU)
    x, W = torch.randn(1, 2, 2, 3), torch.randn(4, 3, 1, 1)
    for steps in (TritonStep(random_unet(TINY), spec), TritonRunner(random_unet(TINY), spec, FakeCuda()).device_step):
        sums = torch.full((1, 1, 2, 2, 4), torch.nan)
        steps.run(kernel_library.products((x,), kernel_library.pack(W, (3,), torch.float32), sums))
        assert (sums[0] - x @ W[:, :, 0, 0].T).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["unconditional", "guidance", "rescale"])
def test_a_whole_step_is_the_network_and_one_update(name: str) -> None:
    """Guidance is a part of the update; rescaled, it is PyTorch's."""
    case, listed = CASES[name], []
    state = start(case)
    steps = TritonStep(random_unet(case.config), spec_of(state, torch.float32, case), listed.append)
    guided = bool(state.guided_host.any())
    with torch.no_grad():
        steps.whole(state, guided, noisy=True)
        network = [launch.op for launch in steps.network(state, guided)]
    assert [launch.op for launch in listed] == [*network, "update"]
    assert guided == (name != "unconditional")
    fused = name == "guidance"
    assert (listed[-1].arguments["guidance"] is not None) == fused
    assert len(listed[-1].arguments["out"]) == len(state.x) * (1 + fused)


def test_a_norm_that_two_operations_read_is_launched_once() -> None:
    """Nothing else may use its memory in between, so it is only remembered until the next norm."""
    for config in (change(attention_head_dim=None), change(**ATTENTION_EVERYWHERE, attention_head_dim=None)):
        listed = launches(config, 2)
        norms = {"norm.apply": "dst", "norm.group_norm": "dst", "epilogue.normed": "out"}
        applied = [launch for launch in listed if launch.op in norms]
        read = [launch.arguments["gamma"].data_ptr() for launch in applied if launch.op != "norm.apply"]
        assert all(one != other for one, other in itertools.pairwise(read)), "no norm twice in a row"
        attentions = [launch for launch in listed if launch.op == "attention.attention"]
        assert attentions
        for attention in attentions:
            keys = attention.arguments["k"].data_ptr()
            before = [launch for launch in listed[: listed.index(attention)] if launch in applied]
            assert before[-1].arguments[norms[before[-1].op]].data_ptr() == keys, "its keys are the last norm"


def test_batch_sizes_share_packed_weights() -> None:
    """And those of one network are freed with it; weights that change in a run are those of all that it computes."""
    unet, table = random_unet(MICRO_CLASSES), solvers.ddim(SCHEDULE, 4)
    runners = {n: Direct(unet, Spec(n, (3, 8, 8), torch.float32, CPU, null_label=4)) for n in (1, 2)}
    states = {n: State.create(random_images(TINY, n), TableBank([table], CPU), label=[1] * n) for n in runners}
    for n, runner in runners.items():
        runner.step(states[n])
    one, two = (runner.steps.weights for runner in runners.values())
    assert one is two
    assert TritonStep(random_unet(MICRO_CLASSES), runners[1].steps.spec, compute).weights is not one
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.data.mul_(1.1)
    before = dataclasses.replace(states[2], x=states[2].x.clone(), row=states[2].row.clone(), out=None)
    runners[1].fresh = True  # another sample, which finds the change
    runners[1].step(State.create(random_images(TINY, 1), TableBank([table], CPU), label=[1]))
    runners[2].step(states[2])  # in the midst of its run
    new = random_unet(MICRO_CLASSES)
    new.load_state_dict(unet.state_dict())
    Direct(new, runners[2].steps.spec).step(before)
    assert torch.equal(states[2].x, before.x)
    held = weakref.ref(unet)
    del unet, runners, runner
    gc.collect()
    assert held() is None


def test_batches_beyond_a_grid_are_refused() -> None:
    for batch, refused in ((32767, False), (32768, True)):
        reasons = triton.reasons_against(random_unet(MICRO_CLASSES), Spec(batch, (3, 8, 8), torch.float32, CPU))
        assert any("at most 32767 images at a time" in reason for reason in reasons) == refused


# Turns ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Runners are made without a GPU, and compile nothing."""
    monkeypatch.setattr(Launch, "compile", lambda launch: None)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])


@pytest.mark.usefixtures("anywhere")
def test_samples_that_take_turns_embed_their_timesteps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where both tables together have more timesteps than one table may have."""
    embedded: list[int] = []
    embed = shared.embed_timesteps
    monkeypatch.setattr(shared, "embed_timesteps", lambda unet, t: embedded.append(len(t)) or embed(unet, t))
    unet = random_unet(MICRO_CLASSES)
    spec = Spec(2, (3, 8, 8), torch.float32, CPU, null_label=4, rows=6)
    runner = TritonRunner(unet, spec, FakeCuda(), compute_on_device)
    tables = [solvers.ddim(SCHEDULE, 6), solvers.ddim(SCHEDULE, spacing=[950.0, 750.0, 550.0, 350.0, 150.0])]
    states, alone = (
        [State.create(random_images(TINY, 2), TableBank([table], CPU), label=[1, 2]) for table in tables]
        for _ in range(2)
    )
    looked_up: list[TableBank] = []
    entries = runner.device_step.embeddings.entries
    monkeypatch.setattr(
        runner.device_step.embeddings, "entries", lambda bank: looked_up.append(bank) or entries(bank)
    )  # fmt: skip
    for _ in range(4):
        for state in states:
            runner.step(state)
    assert sum(embedded) == 11
    assert looked_up == [state.bank for state in states]
    for state in alone:
        plain = Direct(unet, spec)
        for _ in range(4):
            plain.step(state)
    assert all(torch.equal(a.x, b.x) for a, b in zip(states, alone, strict=True))


@pytest.mark.usefixtures("anywhere")
@pytest.mark.parametrize("guidance", [1.0, 3.0], ids=["unguided", "guided"])
def test_class_images_are_computed_when_a_state_moves_in(guidance: float) -> None:
    config = change(MICRO_CLASSES, **CLASS_IMAGES["class image, add"])
    unet, spec = random_unet(config), Spec(2, (3, 8, 8), torch.float32, CPU, null_label=4)
    table = solvers.ddim(SCHEDULE, 8).with_guidance_interval(0.3, 0.6)

    def states() -> list[State]:
        return [
            State.create(random_images(config, 2), TableBank([table], CPU), label=labels, guidance=guidance)
            for labels in ([1, 2], [3, 0])
        ]

    taking_turns, alone = states(), states()
    for state in alone:
        plain = Direct(unet, spec)
        for _ in range(8):
            plain.step(state)
    runner = TritonRunner(unet, spec, FakeCuda(), compute_on_device)
    for _ in range(4):
        for state in taking_turns:
            runner.step(state)
            runner.step(state)
    assert unet.class_encoder is not None
    weights = {p.untyped_storage()._cdata for p in unet.class_encoder.parameters()}
    read = {
        leaf.untyped_storage()._cdata
        for captured in runner.graphs.graphs.values()
        for _, args, kwargs, _ in captured.calls
        for leaf in tree_leaves((args, kwargs))
        if isinstance(leaf, torch.Tensor)
    }
    assert len(read) > 10
    assert not weights & read, "no step computes them"
    for a, b in zip(taking_turns, alone, strict=True):
        assert torch.equal(a.x, b.x)


# Capture --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("library", [False, True], ids=["own kernels", "the library"])
def test_a_captured_network_serves_every_row_and_table(
    monkeypatch: pytest.MonkeyPatch, by_library: Callable[..., None], library: bool
) -> None:
    monkeypatch.setattr(Launch, "compile", lambda launch: None)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case = CASES["guidance interval"]
    if library:
        by_library(case.config, len(start(case).x), 2 * len(start(case).x))
    unet, cuda = random_unet(case.config), FakeCuda()
    state = start(case)
    runner = TritonRunner(unet, spec_of(state, torch.float32, case), cuda, compute)
    plain, other = Direct(unet, spec_of(state, torch.float32, case)), start(case)
    for _ in range(5):
        runner.forward(state)
        plain.forward(other)
        assert state.out is not None
        assert other.out is not None
        assert torch.equal(state.out, other.out)
        for s in (state, other):
            plain.update(s)
    assert len(runner.graphs.graphs) == 2  # guided and not
    assert any(key[-1] is True for key in runner.device_step.weights.made) == library


@pytest.mark.parametrize(
    "name",
    [
        "guidance interval",
        pytest.param("rescale", marks=pytest.mark.slow),
        "everything",
        pytest.param("everything but rescaling", marks=pytest.mark.slow),
    ],
)
def test_captured_steps_are_the_halves(name: str) -> None:
    """Whole steps, and halves between them, as for previews: where guidance happens is not seen in the images."""
    case = CASES[name]
    unet, state, other = random_unet(case.config), start(case), start(case)
    spec = spec_of(state, torch.float32, case)
    steps = TritonStep(unet, spec, compute_on_device)
    graphs = GraphRunner(steps, unet, spec, FakeCuda())
    steps.follow(state.bank, fresh=False)
    plain = Halves(unet, spec)
    for i in range(case.steps):
        if i == 2:
            graphs.forward(state)
            plain.forward(other)
            assert torch.equal(update.predict_x0(state)[case.active], update.predict_x0(other)[case.active])
            graphs.update(state)
            plain.update(other)
        else:
            graphs.step(state)
            plain.step(other)
        assert torch.equal(state.x[case.active], other.x[case.active])


def test_kernels_that_cannot_be_compiled_leave_the_network_to_pytorch(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(launch: Launch) -> None:
        raise BackendError(f"kernel {launch.op} cannot be compiled: [Errno 30] Read-only file system")

    monkeypatch.setattr(Launch, "compile", fail)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case = CASES["guidance"]
    unet, state, other = random_unet(case.config), start(case), start(case)
    spec = spec_of(state, torch.float32, case)
    runner = TritonRunner(unet, dataclasses.replace(spec, dtype=torch.bfloat16), FakeCuda(), compute)
    plain = Direct(unet, spec)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        for _ in range(3):
            runner.step(state)
            plain.step(other)
    assert [r.message for r in caplog.records if "Read-only file system" in r.message] == [caplog.records[0].message]
    assert relative_error(state.x, other.x) <= 1e-5


@pytest.mark.parametrize("op", ["epilogue.normed", "guidance", "update"])
def test_kernels_that_cannot_be_loaded_leave_the_network_to_pytorch(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """A tuned file may name configurations that need too much memory; all are loaded before a capture."""

    class TooLarge:
        @staticmethod
        def _init_handles() -> None:
            raise ValueError("out of resource: shared memory")

    def compile_all(launch: Launch) -> None:
        if launch.op == op:
            fails = types.SimpleNamespace(warmup=lambda **_: TooLarge)
            plain_compile(dataclasses.replace(launch, kernel=fails))

    plain_compile = Launch.compile
    monkeypatch.setattr(Launch, "compile", compile_all)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case = CASES["guidance"]
    state = start(case)
    runner = TritonRunner(random_unet(case.config), spec_of(state, torch.float32, case), FakeCuda(), compute_on_device)
    runner.step(state)
    assert runner.instead is not None
    bitwise = dataclasses.replace(runner.spec, determinism="bitwise")
    with pytest.raises(BackendError, match=f"kernel {op} .*out of resource"):
        TritonRunner(random_unet(case.config), bitwise, FakeCuda(), compute_on_device).step(start(case))


def test_every_kernel_of_a_step_is_compiled_before_it_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take whole steps and halves, guided and not, with and without a history."""
    compiled: set[Any] = set()

    def binary(launch: Launch) -> Any:
        values = {k: v.dtype if isinstance(v, torch.Tensor) else v for k, v in launch.arguments.items()}
        special = {p.name for p in launch.kernel.params if not p.do_not_specialize}
        return launch.op, launch.config, tuple((k, v) for k, v in values.items() if k in special)

    def run(launch: Launch) -> None:
        assert binary(launch) in compiled, f"{launch.op} is compiled while it is captured"

    monkeypatch.setattr(Launch, "compile", lambda launch: compiled.add(binary(launch)))
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    for name in ("unconditional", "guidance interval", "rescale", "everything", "everything but rescaling"):
        case = CASES[name]
        compiled.clear()
        state = start(case)
        runner = TritonRunner(random_unet(case.config), spec_of(state, torch.float32, case), FakeCuda(), run)
        for _ in range(3):
            runner.step(state)
        runner.forward(state)
        runner.update(state)


def test_inference_mode_around_any_part_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors that are made in it cannot be written outside of it, where a runner is used by another caller."""
    monkeypatch.setattr(Launch, "compile", lambda launch: None)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])

    def write(launch: Launch) -> None:
        if launch.op == "update":
            return compute_on_device(launch)
        for name in ("dst", "out", "sums", "norm", "statistics", "timestep"):
            if launch.arguments.get(name) is not None:
                launch.arguments[name].fill_(0)

    def images(config: UNetConfig, made: str) -> list[torch.Tensor]:
        def made_in(part: str) -> Any:
            return torch.inference_mode(made in (part, "all"))

        options = {} if config.num_class_embeds is None else {"label": [1, 3], "guidance": [2.0, 1.0]}
        with made_in("network"):
            unet = random_unet(config)
        with made_in("runner"):
            spec = Spec(2, (3, 8, 8), torch.float32, CPU, null_label=4)
            runner = TritonRunner(unet, spec, FakeCuda(), write)
        found = []
        for edited in (False, True):
            if edited:
                with made_in("edit"):
                    unet.conv_in.weight.data.mul_(1.25)
            for table in (solvers.ddim(SCHEDULE, 4), solvers.ddpm(SCHEDULE, 4, threshold=(0.9, 2.0))):
                with made_in("state"):
                    state = State.create(random_images(config, 2), TableBank([table], CPU), **options)
                with made_in("steps"):
                    runner.step(state)
                runner.forward(state)
                runner.update(state)
                found.append(state.x.clone())
        return found

    without = change(MICRO_CLASSES, num_class_embeds=None, null_label=None)
    for config, parts in ((MICRO_CLASSES, ("network", "runner", "state", "steps", "edit", "all")), (without, ("all",))):
        expected = images(config, "")
        for made in parts:
            assert all(torch.equal(a, b) for a, b in zip(images(config, made), expected, strict=True)), made


def test_the_device_of_a_runner_is_the_current_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton compiles and launches for the current device, which need not be the one that the network is on."""
    seen: list[tuple[str, Any]] = []
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case, cuda = CASES["guidance"], FakeCuda()

    def note(kind: str) -> None:
        seen.append((kind, cuda.devices[-1] if cuda.devices else "another"))

    monkeypatch.setattr(Launch, "compile", lambda launch: note("compile"))
    state = start(case)
    spec = spec_of(state, torch.float32, case)
    runner = TritonRunner(
        random_unet(case.config), spec, cuda, lambda launch: note("launch")
    )  # fmt: skip
    follow = runner.device_step.follow
    monkeypatch.setattr(runner.device_step, "follow", lambda *a: note("tables") or follow(*a))
    runner.step(state)
    runner.forward(state)
    runner.update(state)
    assert {kind for kind, _ in seen} == {"compile", "launch", "tables"}
    assert {device for _, device in seen} == {spec.device}
    assert not cuda.devices


def test_tables_and_weights_are_written_after_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs that replay on another stream may still read them."""
    monkeypatch.setattr(Launch, "compile", lambda launch: None)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case, cuda = CASES["guidance"], FakeCuda()
    state = start(case)
    runner = TritonRunner(random_unet(case.config), spec_of(state, torch.float32, case), cuda, compute_on_device)
    runner.step(state)
    cuda.log.clear()
    follow = runner.device_step.follow
    monkeypatch.setattr(runner.device_step, "follow", lambda *a: cuda.log.append(("follow",)) or follow(*a))
    with cuda.stream(cuda.Stream()):
        runner.step(start(case))
    assert cuda.log[:2] == [("wait", "side 2", "main"), ("follow",)]


# Where it cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_cuda_it_is_refused_with_every_reason() -> None:
    with pytest.raises(BackendError) as error:
        Sampler(random_unet(TINY), backend="triton", dtype="float64", determinism="bitwise")
    for reason in ("torch sees no CUDA device", "not on cpu", "not in float64"):
        assert reason in str(error.value)
    assert "bitwise" not in str(error.value), "which it can give"


# Interpreted ----------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
sys.path[:0] = [sys.argv[1]]
from tests.support.kernel_harness import mend_interpreter
from tests.backends.test_backends import MICRO_CLASSES
from tests.support.unets import random_unet
from fastdiff import solvers
from fastdiff.core import noise
from fastdiff.backends import Spec
from fastdiff.backends.triton import TritonStep
from fastdiff.schedule import NoiseSchedule
from fastdiff.core.state import State, TableBank
mend_interpreter()

index = torch.arange(2)
x = noise.normal(torch.full_like(index, 5), index, torch.zeros_like(index), noise.INITIAL, (3, 8, 8))
table, arrived = solvers.ddpm(NoiseSchedule(), 4), []
states = []
for run, whole in ((lambda launch: launch(), True), (lambda launch: launch(), False),
                   (lambda launch: launch.reference(), False)):
    steps = TritonStep(random_unet(MICRO_CLASSES), Spec(2, (3, 8, 8), torch.float32, x.device, null_label=4), run)
    state = State.create(x.clone(), TableBank([table], x.device), label=[3, 1], guidance=[2.0, 1.0])
    with torch.no_grad():
        steps.follow(state.bank, fresh=False)
        for _ in range(2):
            if whole:
                steps.whole(state, guided=True, noisy=True)
            else:
                steps.evaluate(state, guided=True)
                steps.advance(state, noisy=True)
    states.append(state)
    arrived.append(steps.arrived.abs().sum().item())
whole, halves, want = states
print(json.dumps({
    "x": [float((got.x - want.x).abs().max()) for got in (whole, halves)], "scale": float(want.x.abs().max()),
    "equal": torch.equal(whole.x, halves.x), "row": whole.row.tolist(), "arrived": arrived,
}))
"""


@pytest.mark.slow
def test_interpreted_steps_equal_the_references() -> None:
    """The kernels themselves, two guided steps with noise, whole and in halves, in an interpreter's process."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert max(told["x"]) <= 2e-5 * told["scale"]
    assert told["equal"], "guidance has the same bits in the update and on its own"
    assert told["row"] == [2, 2]
    assert told["arrived"] == [0, 0, 0]


def test_a_checkout_without_symbolic_links_is_a_reason(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Where git makes no links, fastdiff/kernels is a text file, and no submodule of it can be imported."""
    package = tmp_path / "fastdiff"
    package.mkdir()
    (package / "kernels").write_text("../kernels")
    for name in [name for name in sys.modules if name.startswith("fastdiff.kernels")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(fastdiff, "__path__", [str(package)])
    reasons = triton.reasons_against(random_unet(TINY), Spec(2, (3, 8, 8), torch.float32, torch.device("cpu")))
    assert any("no fastdiff/kernels, a symbolic link" in reason for reason in reasons), reasons
