"""Backend `triton` with determinism="bitwise": what decides an image's bits is the same in every batch.

In lists of launches: neither configurations nor what the compiler makes a binary of depends on the batch. Interpreted:
an image has the same bits in batches of different sizes, at any place, beside any others. What a card does is what
``make gpu`` compares.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is installed on Linux x86-64 only")

from fastdiff import solvers
from fastdiff.backends import BITWISE_ROWS, Spec
from fastdiff.backends.triton import TritonRunner, TritonStep, launches
from fastdiff.backends.triton import runner as triton
from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.kernels.launch import Launch
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet
from tests.backends.test_backends import CASES, spec_of, start
from tests.core.test_program import CLASS_IMAGES
from tests.support.fake_cuda import FakeCuda
from tests.support.paths import ROOT
from tests.support.unets import PUBLISHED, TINY_CLASSES, change, random_images, random_unet, relative_error

SCHEDULE = NoiseSchedule()
META = torch.device("meta")
NETWORKS = ("ddpm-cifar10-32", "ddpm-celebahq-256")
BATCHES = (1, 8, 64, 256)


# Lists of launches ----------------------------------------------------------------------------------------------------


@functools.cache
def network(name: str) -> tuple[UNet, launches.Weights]:
    """Build a published configuration with classes, and its weights, on the meta device."""
    config = dataclasses.replace(PUBLISHED[name], num_class_embeds=11, null_label=10)
    with META:
        unet = UNet(config)
        return unet, launches.Weights(unet, META, lambda launch: None)


@functools.cache
def step(name: str, batch: int, guided: bool, determinism: str, halves: bool = False) -> list[Launch]:
    """The launches of a whole step, or of its halves."""
    unet, weights = network(name)
    spec = Spec(batch, (3, *(unet.config.sample_size,) * 2), torch.bfloat16, META, 10, determinism)
    listed: list[Launch] = []
    with pytest.MonkeyPatch.context() as patch, META:
        patch.setattr(launches.Weights, "of", lambda *_: weights)
        steps = TritonStep(unet, spec, listed.append)
        bank = TableBank([solvers.ddim(SCHEDULE, 2)], META)
        state = State.create(torch.empty(batch, *spec.shape), bank, label=[1] * batch, guidance=1.0 + guided)
        with torch.no_grad():
            if halves:
                steps.evaluate(state, guided)
                steps.advance(state, noisy=True)
            else:
                steps.whole(state, guided, noisy=True)
    return listed


def deciding(launch: Launch) -> tuple[Any, ...]:
    """Return what a row's order of summation can depend on: configuration, and arguments that kernels specialise on."""
    special = {p.name for p in launch.kernel.params if not p.do_not_specialize}
    arguments = {
        name: (value.dtype, value.shape[1:]) if isinstance(value, torch.Tensor) else value
        for name, value in launch.arguments.items()
        if name in special
    }
    # The first dimension of sums is the number of shares, the second the rows.
    arguments |= {
        name: arguments[name] and launch.arguments[name].dtype for name in ("sums", "dst") if name in arguments
    }
    return launch.op, launch.config, arguments


@pytest.mark.parametrize("guided", [False, True], ids=["unguided", "guided"])
@pytest.mark.parametrize("name", NETWORKS)
def test_nothing_that_decides_bits_depends_on_the_batch(name: str, guided: bool) -> None:
    one = [deciding(launch) for launch in step(name, 1, guided, "bitwise")]
    for batch in BATCHES[1:]:
        assert [deciding(launch) for launch in step(name, batch, guided, "bitwise")] == one


def test_nor_does_what_a_tuned_file_is_asked_for() -> None:
    """Keys do not depend on the batch either, though heuristics may choose alike for all batches here.

    All operations whose choice may depend on rows are checked. The key of a convolution by itself has its rows, but it
    is given its configuration.
    """
    keys: dict[str, set[tuple[str, ...]]] = {}
    for batch in BATCHES:
        found: dict[str, list[str]] = {}
        for launch in step(NETWORKS[1], batch, True, "bitwise", halves=True):
            found.setdefault(launch.op, []).append(launch.key)
        for op, own in found.items():
            keys.setdefault(op, set()).add(tuple(own))
    assert {"input", "attention.attention", "norm.apply", "epilogue.normed", "guidance", "update"} <= keys.keys()
    assert {op for op, own in keys.items() if len(own) > 1} <= {"conv.conv", "conv.partial"}


@pytest.mark.parametrize("name", NETWORKS)
def test_nor_does_it_depend_on_whether_others_are_guided(name: str) -> None:
    """The network's launches; guidance then gives an image whose w is 1 what the network gave."""
    plain, guided = ([deciding(i) for i in step(name, 8, guided, "bitwise")] for guided in (False, True))
    assert plain[:-1] == guided[:-1]
    assert plain[-1][:2] == guided[-1][:2] == ("update", plain[-1][1])


@pytest.mark.parametrize("name", NETWORKS)
def test_configurations_are_those_of_so_many_rows(name: str) -> None:
    chosen = [launch.config for launch in step(name, BITWISE_ROWS, False, "seed")]
    for batch in BATCHES:
        assert [launch.config for launch in step(name, batch, False, "bitwise")] == chosen


@pytest.mark.parametrize("name", NETWORKS)
def test_otherwise_they_are_chosen_by_the_batch(name: str) -> None:
    configs = [[launch.config for launch in step(name, batch, False, "seed")] for batch in (1, 64)]
    assert configs[0] != configs[1]


def test_halves_are_chosen_for_so_many_images_too() -> None:
    """Guidance as a launch of its own, where previews or edits come between the halves."""
    for guided in (False, True):
        one, many = (step(NETWORKS[0], batch, guided, "bitwise", halves=True) for batch in (1, 64))
        assert [deciding(launch) for launch in one] == [deciding(launch) for launch in many]
        assert [launch.op for launch in one].count("guidance") == guided


# What PyTorch computes of a step --------------------------------------------------------------------------------------


def compute(launch: Launch) -> None:
    launch.reference()


@pytest.mark.parametrize("determinism", ["seed", "bitwise"])
def test_pytorch_sees_an_image_at_a_time(determinism: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernels share out a linear layer's and a deviation's sums by how many rows there are."""
    config = change(TINY_CLASSES, **CLASS_IMAGES["class image, add"])
    unet = random_unet(config)
    seen: list[tuple[str, int]] = []
    guide = update.guide
    monkeypatch.setattr(update, "guide", lambda c, *rest: seen.append(("guide", len(c))) or guide(c, *rest))
    assert unet.class_encoder is not None
    unet.class_encoder.register_forward_pre_hook(lambda _, arguments: seen.append(("classes", len(arguments[0]))))
    spec = Spec(3, (3, 8, 8), torch.float32, torch.device("cpu"), config.null_label, determinism)
    steps = TritonStep(unet, spec, compute)
    x = random_images(config, 3)
    state = State.create(
        x, TableBank([solvers.ddim(SCHEDULE, 2)], x.device), label=[3, 0, 1], guidance=[1.0, 3.0, 2.0],
        guidance_rescale=0.7,
    )  # fmt: skip
    exact = dataclasses.replace(state, x=x.clone(), row=state.row.clone())
    with torch.no_grad():
        steps.follow(state.bank, fresh=False)
        steps.whole(state, guided=True, noisy=False)
    expected = [("classes", 1)] * 6 + [("guide", 1)] * 3 if determinism == "bitwise" else [("classes", 6), ("guide", 3)]
    assert seen == expected
    from fastdiff.backends.eager import EagerRunner

    with torch.no_grad():
        EagerRunner(unet, dataclasses.replace(spec, determinism="seed")).whole(exact, guided=True, noisy=False)
    assert relative_error(state.x, exact.x) <= 1e-5


def test_kernels_that_cannot_be_compiled_are_refused(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PyTorch would run the network, with other bits in every batch. The next step is refused as well."""

    def fail(launch: Launch) -> None:
        raise BackendError(f"kernel {launch.op} cannot be compiled: [Errno 30] Read-only file system")

    monkeypatch.setattr(Launch, "compile", fail)
    monkeypatch.setattr(triton, "reasons_against", lambda unet, spec: [])
    case = CASES["guidance"]
    state = start(case)
    spec = dataclasses.replace(spec_of(state, torch.float32, case), determinism="bitwise")
    runner = TritonRunner(random_unet(case.config), spec, FakeCuda(), compute)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        for _ in range(2):
            with pytest.raises(BackendError, match=r"Read-only file system; with determinism='seed' PyTorch runs"):
                runner.step(state)
    assert not caplog.records
    assert state.row.tolist() == [0, 0, 0]


# Interpreted ----------------------------------------------------------------------------------------------------------

CHILD = """
import json, random, sys
import torch
sys.path[:0] = [sys.argv[1]]
from tests.support.unets import TINY_CLASSES, change, random_unet
from fastdiff import solvers
from fastdiff.core import noise
from fastdiff.backends import Spec
from fastdiff.backends.triton import TritonStep
from fastdiff.kernels import launch
from fastdiff.schedule import NoiseSchedule
from fastdiff.core.state import State, TableBank
from triton.runtime import interpreter

def create_dot(self, a, b, d, *_):
    "Every row's sums in one order, as tensor cores take them: BLAS sums by where in its tile a row stands."
    return interpreter.TensorHandle((a.data[:, :, None] * b.data[None]).sum(axis=1) + d.data, d.dtype.scalar)

interpreter.InterpreterBuilder.create_dot = create_dot
launch.NO_GPU = launch.Device("", 4)  # so small that batches of 1 and 5 rows fill it differently
# Of 4 x 4 pixels, so that four images share a tile; an interpreter takes a second for each.
config = change(
    TINY_CLASSES, sample_size=4, block_out_channels=(32,), down_block_types=("AttnDownBlock2D",),
    up_block_types=("AttnUpBlock2D",), attention_head_dim=32, norm_num_groups=2, mid_block_type=None,
)
unet, schedule = random_unet(config), NoiseSchedule()
# Without clipping, which would hide the rounding of the first steps.
tables = (
    solvers.ddim(schedule, 4, eta=0.5, clip=None).with_guidance_interval(0.0, 0.3), solvers.ddpm(schedule, 5),
    solvers.ddim(schedule, 3),
)

def probed(batch, probe, determinism, number=2):
    "Image 7 of seed 11 at place `probe` of a batch of others, behind each of its first steps: one guided, one not."
    draw = random.Random(10 * batch + probe)
    table, index = ([draw.randrange(n) for _ in range(batch)] for n in (3, 2**40))
    label, guidance = [draw.randrange(5) for _ in range(batch)], [draw.choice([1.0, 3.0]) for _ in range(batch)]
    table[probe], index[probe], label[probe], guidance[probe] = 0, 7, 3, 2.5
    i = torch.tensor(index)
    x = noise.normal(torch.full_like(i, 11), i, torch.zeros_like(i), noise.INITIAL, (3, 4, 4))
    bank = TableBank(tables, x.device)
    state = State.create(x, bank, seed=11, index=index, table=table, label=label, guidance=guidance)
    for b in set(range(batch)) - {probe}:
        state.row_host[b] = draw.randrange(2)
    state.row = torch.from_numpy(state.row_host.copy())
    steps = TritonStep(unet, Spec(batch, (3, 4, 4), torch.float32, x.device, 4, determinism))
    bits, guided = [], []
    with torch.no_grad():
        steps.follow(state.bank, fresh=False)
        for _ in range(number):
            guided.append((bool(state.guided_host[probe]), bool(state.guided_host.any())))
            steps.whole(state, guided[-1][1], noisy=True)
            state.advance_host()
            bits.append(state.x[probe].flatten().view(torch.int32).tolist())
    return {"bits": bits, "guided": guided}

print(json.dumps({
    "bitwise": [probed(batch, probe, "bitwise") for batch, probe in ((1, 0), (5, 1))],
    "seed": [probed(batch, 0, "seed", 1) for batch in (1, 5)],
}))
"""


@pytest.mark.slow
def test_interpreted_images_have_the_same_bits_in_every_batch() -> None:
    """One image alone and in a batch of 5 images, which stand at other rows of other tables, guided or not."""
    result = subprocess.run(
        [sys.executable, "-c", CHILD, str(ROOT)],
        env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    told = json.loads(result.stdout.splitlines()[-1])
    alone, *others = told["bitwise"]
    assert [own for own, _ in alone["guided"]] == [True, False], "its first step is guided, its second is not"
    assert any(all(anyone for _, anyone in other["guided"]) for other in others), "but others' is, beside it"
    assert all(other["bits"] == alone["bits"] for other in others)
    first, last = told["seed"]
    assert first["bits"] != last["bits"], "these batches would not tell one configuration from another"
