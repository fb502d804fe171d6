"""Backend `triton` without a GPU: its launches' references in the buffers that the kernels would use, against float64;
some of them interpreted; the list of launches; and what is captured, by a stand-in for CUDA's graphs.

The kernels themselves are held to their references in test_kernels.py. What a card does with them remains to be seen.
"""

from __future__ import annotations

import collections
import dataclasses
import json
import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is installed on Linux x86-64 only")

from fake_cuda import FakeCuda
from test_backends import CASES, Case, check, spec_of, start
from test_program import CLASS_IMAGES, image_size
from unets import (
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
)  # fmt: skip

from fastdiff import solvers
from fastdiff.backends import Spec, triton
from fastdiff.backends.triton import TritonRunner, TritonSteps
from fastdiff.errors import BackendError
from fastdiff.kernels.launch import Launch
from fastdiff.sampler import Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.state import State, TableBank
from fastdiff.unet import UNet
from fastdiff.unet_config import UNetConfig

CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule()


def compute(launch: Launch) -> None:
    launch.reference()


class Direct:
    """Steps without graphs."""

    def __init__(self, unet: Any, spec: Spec):
        self.steps = TritonSteps(unet, spec, compute)
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

    def step(self, state: State) -> None:
        self.forward(state)
        self.update(state)


def forward(unet: UNet, x: torch.Tensor, t: float, labels: Any = None, dtype: torch.dtype = torch.float32) -> Any:
    """The network by way of launches; every buffer holds NaN before."""
    steps = TritonSteps(unet, Spec(len(x), tuple(x.shape[1:]), dtype, CPU), compute)  # type: ignore[arg-type]  # three numbers
    state = State.create(x, TableBank([solvers.ddim(SCHEDULE, spacing=[t])], CPU), label=labels)
    with torch.no_grad():
        steps.follow(state.bank, fresh=False)
        steps.network(state, guided=False)  # makes the buffers
        for b in steps.buffers.values():
            b.arena.fill_(0xFF)
            for tensor in (*b.embedding.values(), *b.space.values(), b.net):
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
    return config.class_embed_type is None


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


def test_weights_that_change_are_followed_at_their_addresses() -> None:
    unet = random_unet(TINY)
    x = random_images(TINY, 2, None)
    steps = TritonSteps(unet, Spec(2, tuple(x.shape[1:]), torch.float32, CPU), compute)  # type: ignore[arg-type]  # three numbers

    def run() -> torch.Tensor:
        state = State.create(x.clone(), TableBank([solvers.ddim(SCHEDULE, 4)], CPU))
        with torch.no_grad():
            steps.follow(state.bank, fresh=True)
            steps.evaluate(state, guided=False)
        assert state.out is not None
        return state.out

    before = run()
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
    state = State.create(torch.zeros(batch, *spec.shape), TableBank([solvers.ddim(SCHEDULE, 2)], CPU))
    with torch.no_grad():
        return TritonSteps(unet, spec, compute).network(state, guided=False)


def test_nothing_but_norms_and_products_is_launched() -> None:
    """52 convolutions of 3x3, shortcuts and attention of the CIFAR-10 network; SiLU, bias, embedding, residual and
    concatenation are parts of them, and no scheduler is left.
    """
    listed = launches(PUBLISHED["ddpm-cifar10-32"], 1)
    counts = collections.Counter(launch.op for launch in listed)
    program = TritonSteps(
        random_unet(PUBLISHED["ddpm-cifar10-32"]), Spec(1, (3, 32, 32), torch.float32, CPU), compute
    ).program
    kinds = collections.Counter(type(op).__name__ for op in program.ops)
    assert counts["input"] == 1
    assert counts["attention.attention"] == kinds["Attention"]
    assert counts["conv.conv"] + counts["conv.partial"] == kinds["Conv"]
    assert counts["conv.partial"] == counts["epilogue.finish"] > 0
    assert counts["norm.finalise"] == counts["norm.apply"] == sum(program.norm(op) is not None for op in program.ops)
    assert set(counts) <= {
        "input", "norm.finalise", "norm.apply", "conv.conv", "conv.partial", "epilogue.finish", "epilogue.combine",
        "attention.attention",
    }  # fmt: skip


# Capture --------------------------------------------------------------------------------------------------------------


def test_a_captured_network_serves_every_row_and_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Launch, "compile", lambda launch: None)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case = CASES["guidance interval"]
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


# Where it cannot run --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.cuda.is_available(), reason="about machines without a GPU")
def test_without_cuda_it_is_refused_with_every_reason() -> None:
    with pytest.raises(BackendError) as error:
        Sampler(random_unet(TINY), backend="triton", dtype="float64", determinism="bitwise")
    for reason in ("torch sees no CUDA device", "not on cpu", "not in float64", "use determinism='seed'"):
        assert reason in str(error.value)


# Interpreted ----------------------------------------------------------------------------------------------------------

CHILD = """
import json, sys
import torch
sys.path[:0] = [sys.argv[1]]
from kernel_harness import mend_interpreter
from test_backends import MICRO_CLASSES
from unets import random_unet
from fastdiff import noise, solvers
from fastdiff.backends import Spec
from fastdiff.backends.triton import TritonSteps
from fastdiff.kernels.launch import Launch
from fastdiff.schedule import NoiseSchedule
from fastdiff.state import State, TableBank
mend_interpreter()

index = torch.arange(2)
x = noise.normal(torch.full_like(index, 5), index, torch.zeros_like(index), noise.INITIAL, (3, 8, 8))
table = solvers.ddpm(NoiseSchedule(), 4)
states = []
for run in (Launch.__call__, lambda launch: launch.reference()):
    steps = TritonSteps(random_unet(MICRO_CLASSES), Spec(2, (3, 8, 8), torch.float32, x.device, null_label=4), run)
    state = State.create(x.clone(), TableBank([table], x.device), label=[3, 1], guidance=[2.0, 1.0])
    with torch.no_grad():
        steps.follow(state.bank, fresh=False)
        for _ in range(2):
            steps.evaluate(state, guided=True)
            steps.advance(state, noisy=True)
    states.append(state)
got, want = states
print(json.dumps({
    "x": float((got.x - want.x).abs().max()), "scale": float(want.x.abs().max()), "row": got.row.tolist(),
    "arrived": steps.arrived.abs().sum().item(),
}))
"""


def test_interpreted_steps_equal_the_references() -> None:
    """The kernels themselves, two steps of a guided network with noise, in an interpreter's process."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(Path(__file__).parent)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout.splitlines()[-1])
    assert told["x"] <= 2e-5 * told["scale"]
    assert told["row"] == [2, 2]
    assert told["arrived"] == 0
