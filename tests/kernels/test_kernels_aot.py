"""Tests that compile the Triton kernels without a GPU: registers are not spilled, and shared memory suffices.

``make kernel-check`` selects the tests that compile by their targets: they are slow.
"""

from __future__ import annotations

import pytest

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

import triton

from fastdiff.kernels.launch import Launch
from tests.support.kernel_cases import CASES, ONES, SHIPPED, TENSOR_CORES
from tests.support.kernel_harness import TARGETS, compiled

SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes that a program can have (CUDA programming guide)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(path / "cache"))
        patch.setattr(triton.knobs.compilation, "always_compile", True)
        yield path


def on_target(name: str, capability: int):
    return pytest.param(name, capability, id=f"{name} sm_{capability}")


@pytest.mark.slow
@pytest.mark.parametrize(("name", "capability"), [on_target(name, target) for name in SHIPPED for target in TARGETS])
def test_compiles_without_spills(folder, name, capability):
    launch = SHIPPED[name]()
    binary = compiled(launch, capability, folder)
    assert binary.stack == 0, f"{binary.stack} bytes of stack: registers are spilled"
    assert binary.registers * 32 * launch.config.num_warps <= 65536
    assert binary.shared <= SHARED[capability]
    if launch.op in TENSOR_CORES:
        assert binary.tensor_cores(capability), f"no {capability} tensor-core instruction"


@pytest.mark.slow
@pytest.mark.parametrize("name", ONES, ids="{} sm_90".format)
def test_compiles_where_sizes_are_ones(folder, name):
    """The compiler makes arguments of 1 constants, which have no methods; interpreted kernels do not show that."""
    assert compiled(ONES[name](), 90, folder).stack == 0


def test_everything_is_both_interpreted_and_compiled():
    interpreted = {case().launch().op for case in CASES.values()}
    shipped: set[str] = {launch().op for launch in SHIPPED.values()}
    assert interpreted == shipped


def test_every_configuration_is_compiled():
    """SHIPPED has a launch of every operation in each of its candidates."""
    launches: list[Launch] = [launch() for launch in SHIPPED.values()]
    for op in {launch.op for launch in launches}:
        compiled_configs = {launch.config for launch in launches if launch.op == op}
        candidates = {c for launch in launches if launch.op == op for c in launch.candidates}
        assert candidates <= compiled_configs, op
