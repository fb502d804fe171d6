"""Backend `triton`: the checksum by which changed weights are noticed, and norms computed with a convolution.

On a CPU, the references of the launches are computed.
"""

from __future__ import annotations

import collections

import pytest
import torch

pytest.importorskip("triton", reason="the kernels need triton, which is installed on Linux x86-64 only")

from fastdiff import solvers
from fastdiff.backends import Spec
from fastdiff.backends import network as shared
from fastdiff.backends.triton import TritonStep
from fastdiff.core.program import Conv
from fastdiff.core.state import TableBank
from fastdiff.errors import BackendError
from fastdiff.kernels.launch import Launch
from tests.backends.test_triton import CPU, SCHEDULE, compute
from tests.support.fake_cuda import Counter
from tests.support.unets import PUBLISHED, TINY, random_unet

# Checksum of weights --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_fresh_state_asks_for_one_checksum_by_one_launch(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the checksum that many launches compute elsewhere; one copy to the host waits for the device."""
    monkeypatch.setattr("fastdiff.backends.triton.launches.BY_KERNEL", ("cpu",))
    compiled, listed = [], []
    monkeypatch.setattr(Launch, "compile", lambda launch: compiled.append(launch.op))

    def run(launch: Launch) -> None:
        listed.append(launch.op)
        compute(launch)

    unet = random_unet(TINY).to(memory_format=layout)
    steps = TritonStep(unet, Spec(2, (3, 8, 8), torch.float32, CPU), run)
    exact = shared.plain_checksum([p.detach() for p in unet.parameters()])
    assert steps.weights.made_from == exact
    assert listed == compiled == ["fingerprint"]
    bank = TableBank([solvers.ddim(SCHEDULE, 4)], CPU)
    with Counter() as plain:
        shared.plain_checksum([p.detach() for p in unet.parameters()])
    steps.follow(bank, fresh=False)
    steps.run = steps.weights.run = lambda launch: listed.append(launch.op)
    with Counter() as counter:
        steps.follow(bank, fresh=True)
    assert listed == ["fingerprint"] * 2
    assert compiled == ["fingerprint"], "once"
    views = ("detach", "permute", "view")
    before, now = ([name for name in seen.seen if name not in views] for seen in (plain, counter))
    assert len(now) <= 20 < len(before), "none for each weight"
    assert now.count("_local_scalar_dense") == 0
    steps.weights.run = compute
    with torch.no_grad():
        unet.conv_in.bias.data[-1] += 1e-3
    steps.follow(bank, fresh=True)
    assert steps.weights.version == 1
    assert steps.weights.made_from == shared.plain_checksum([p.detach() for p in unet.parameters()]) != exact


def test_a_checksum_that_cannot_be_compiled_is_pytorchs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(launch: Launch) -> None:
        raise BackendError("no compiler")

    monkeypatch.setattr("fastdiff.backends.triton.launches.BY_KERNEL", ("cpu",))
    monkeypatch.setattr(Launch, "compile", fails)
    unet = random_unet(TINY)
    steps = TritonStep(unet, Spec(2, (3, 8, 8), torch.float32, CPU), lambda launch: pytest.fail(launch.op))
    assert steps.weights.made_from == shared.checksum(unet)


# Norms that are computed with the convolution before them -------------------------------------------------------------


def test_norms_are_fused_where_sums_are_small_or_split() -> None:
    """In large batches sums in float32 cost more than a launch; large maps have norms of their own, in two launches
    where their statistics are many. Nothing that only a fused norm reads is stored.
    """
    from benchmarks.gpu import lists

    counts = {}
    for network, images in (("ddpm-cifar10-32", 1), ("ddpm-cifar10-32", 256), ("ddpm-celebahq-256", 1)):
        listed = lists.step(PUBLISHED[network], images, torch.bfloat16)
        counts[network, images] = collections.Counter(launch.op for launch in listed)
        stored = [launch.arguments["dst"] is not None for launch in listed if launch.op == "epilogue.normed"]
        assert False in stored
        assert True in stored
    one, many, large = counts.values()
    assert 0 < many["epilogue.normed"] < one["epilogue.normed"]
    assert many["norm.finalise"] == many["norm.apply"] > 0
    assert large["norm.finalise"] > 0 < large["norm.group_norm"]


def test_a_buffer_whose_statistics_are_read_is_not_fused() -> None:
    """A norm that is not computed with the convolution before it reads statistics, which a fused one does not write."""
    from fastdiff.backends.triton.launches import _measured, _read
    from fastdiff.core.program import Buffer, Norm, Program

    norm = Norm("n", 2, 1e-5, True)
    ops = (
        Conv("a", ("x",), ("a",)), Conv("b", ("a",), ("b",), norm=norm), Conv("c", ("b", "a"), ("c",), norm=norm),
        Conv("out", ("c",), ("o",), residual="b"),
    )  # fmt: skip
    program = Program(ops, {name: Buffer(name, (4, 4, 8)) for name in ("x", "a", "b", "c", "out")})
    assert _measured(program, {}) == {"a", "b"}
    assert _measured(program, {"a": (("a",), norm)}) == {"a", "b"}, "as the second source of a norm that is not fused"
    assert _measured(program, {"a": (("a",), norm), "b": (("b", "a"), norm)}) == set()
    assert _read(program, {"a": (("a",), norm), "b": (("b", "a"), norm)}) == {"x", "a", "b", "c"}
    assert _read(program, {"a": (("a",), norm)}) == {"x", "a", "b", "c"}
    assert "b" not in _read(Program(ops[:2], program.buffers), {})
