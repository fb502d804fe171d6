"""Tests that compile the Triton kernels without a GPU: no loop spills registers, and shared memory suffices.

``make kernel-check`` runs the tests that compile: they are slow.
"""

from __future__ import annotations

import inspect
import re

import pytest

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

import torch
import triton

from fastdiff.kernels import conv, epilogue, hopper, overlap
from fastdiff.kernels.launch import Launch
from tests.support.cases_conv import Shape, finish_launch
from tests.support.kernel_cases import CASES, ONES, SHIPPED, TENSOR_CORES
from tests.support.kernel_harness import TARGETS, compiled, compiled_for_amd, instructions, spills_in_loops, waits_first

# Bytes that a program can have (CUDA programming guide).
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("triton")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(triton.knobs.cache, "dir", str(path / "cache"))
        patch.setattr(triton.knobs.compilation, "always_compile", True)
        yield path


def on_target(name: str, capability: int):
    return pytest.param(name, capability, id=f"{name} sm_{capability}")


def kernels_once() -> list[str]:
    """Return a launch of every kernel for operands of two bytes and, where there is one, of four."""
    first: dict[tuple[str, bool], str] = {}
    for name, build in SHIPPED.items():
        first.setdefault((build().op, is_single(build())), name)
    return list(first.values())


def is_single(launch: Launch) -> bool:
    """Return whether a launch multiplies float32 numbers, as three products of TF32 numbers."""
    return launch.arguments.get("PRECISION") == "tf32x3"


ONCE = kernels_once()
CONVOLUTIONS = [name for name in SHIPPED if name.startswith("conv ")]
# Everything for Hopper; all convolutions for the two other architectures with tensor cores of their own; each kernel
# for the rest.
NAMES = {90: list(SHIPPED), 80: [*ONCE, *CONVOLUTIONS], 100: [*ONCE, *CONVOLUTIONS], 89: ONCE, 120: ONCE}
assert NAMES.keys() == set(TARGETS)
# The loops of these spill on GPUs of such a compute capability too: of an operation, and of a case.
SPILLS = {("attention.attention", 120), ("conv two sources", 80), ("conv bf16 64x64x64/4 w4 s3", 100)}


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize(
    ("name", "capability"), [on_target(name, target) for target in TARGETS for name in dict.fromkeys(NAMES[target])]
)
def test_compiles_without_spills_in_loops(folder, name, capability):
    launch = SHIPPED[name]()
    binary = compiled(launch, capability, folder)
    listed = isinstance(launch.config, conv.ConvConfig) and conv.spills(launch.config, capability)
    if not listed and not SPILLS & {(launch.op, capability), (name, capability)}:
        assert binary.spills_in_loops == 0, f"{binary.stack} bytes of stack: registers are spilled in a loop"
    if launch.op not in TENSOR_CORES:
        assert binary.stack <= 16, f"{binary.stack} bytes of stack: registers are spilled"
    assert binary.registers * 32 * binary.warps <= 65536
    assert binary.shared <= SHARED[capability]
    if launch.op in TENSOR_CORES:
        assert binary.tensor_cores(capability), f"no {capability} tensor-core instruction"
    if capability < overlap.CAPABILITY:
        assert "griddepcontrol" not in binary.text
    elif getattr(launch.kernel, "overlaps", False):
        assert waits_first(binary.text)
    if isinstance(launch, hopper.HopperLaunch):
        assert binary.stack == 0, f"{binary.stack} bytes of stack: registers are spilled"
        assert {"UTMALDG", "HGMMA", "USETMAXREG", "ACQBULK"} <= set(re.findall(r"[A-Z]{5,}", binary.sass))


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", ONCE, ids="{} gfx942".format)
def test_compiles_for_amd(folder, name):
    """Products of float32 do not: AMD's compiler has no products of three TF32 numbers."""
    launch = SHIPPED[name]()
    if is_single(launch):
        with pytest.raises(triton.CompilationError) as caught:
            compiled_for_amd(launch, "gfx942")
        causes: list[BaseException] = [caught.value]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        assert any("input_precision" in str(cause) for cause in causes)
        return
    binary = compiled_for_amd(launch, "gfx942")
    assert binary.stack == 0, "registers are spilled"
    if launch.op in TENSOR_CORES:
        assert "v_mfma" in binary.text


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("name", ONES, ids="{} sm_90".format)
def test_compiles_where_sizes_are_ones(folder, name):
    """The compiler makes arguments of 1 constants, which have no methods; interpreted kernels do not show that."""
    assert compiled(ONES[name](), 90, folder).stack == 0


def test_a_kernel_is_marked_where_it_begins_with_a_wait():
    """A launch starts marked kernels before those in front of them have ended: without a wait they would be wrong."""
    marked = 0
    for launch in {launch().kernel: launch() for launch in SHIPPED.values()}.values():
        body = inspect.getsource(launch.kernel.fn).rpartition('"""')[2]
        code = [line.strip() for line in body.splitlines() if line.strip() and not line.strip().startswith("#")]
        assert getattr(launch.kernel, "overlaps", False) == (code[0] == "overlap.wait()"), launch.op
        assert "overlap.wait()" not in code[1:], launch.op
        marked += code[0] == "overlap.wait()"
    assert marked >= 15


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


# Assembly -------------------------------------------------------------------------------------------------------------

SASS = """
        /*0000*/                   LDC R1, c[0x0][0x28] ;                     /* 0x00000a00ff017b82 */
                                                                              /* 0x000fe20000000800 */
        /*0010*/                   STL [R1+0x4], R7 ;                         /* 0x0000040701007387 */
        /*0020*/                   HMMA.16816.F32.BF16 R4, R8, R2, R4 ;       /* 0x0000000208047223 */
        /*0030*/              {where} LDL R7, [R1+0x4] ;                      /* 0x0000040001077983 */
        /*0040*/              @!P0 BRA 0x20 ;                                 /* 0xffffff0000008947 */
        /*0050*/                   LDL R7, [R1+0x4] ;                         /* 0x0000040001077983 */
        /*0060*/                   EXIT ;                                     /* 0x000000000000794d */
        /*0070*/                   BRA 0x70;                                  /* 0xfffffffc00fc7947 */
"""


@pytest.mark.parametrize(
    ("ptx", "waits"),
    [
        ("griddepcontrol.wait; ld.global.v4.b32", True),
        ("griddepcontrol.wait; mov.u32; @%p1 cp.async.cg.shared.global", True),
        ("mbarrier.init.shared::cta.b64; griddepcontrol.wait; st.relaxed.gpu.global.b32", True),
        ("ld.global.b32 griddepcontrol.wait; st.global.b32", False),
        ("@%p1 atom.acq_rel.gpu.global.add.u32 griddepcontrol.wait; ld.global.b32", False),
        ("cp.async.bulk.tensor.2d.shared::cta.global; griddepcontrol.wait;", False),
        ("ld.global.b32; st.global.b32", False),
    ],
)
def test_memory_before_the_wait_is_found(ptx, waits):
    assert waits_first(ptx) == waits


def test_spills_are_counted_in_loops_alone():
    assert spills_in_loops(SASS.format(where="")) == 1
    assert spills_in_loops(SASS.format(where="").replace("LDL R7, [R1+0x4] ;     ", "LDS R7, [R1+0x4] ;     ", 1)) == 0
    assert len(instructions(SASS.format(where=""))) == 8


@pytest.mark.slow
@pytest.mark.compiles
@pytest.mark.parametrize("config", epilogue.FINISH_CANDIDATES[1:], ids="{} sm_90".format)
def test_shares_are_loaded_before_they_are_added(folder, config):
    """At least 16 loads of 16 bytes are on their way before the first sum, in the tiles that small maps take."""
    launch = finish_launch(Shape(1, (16, 16), (256,), 256), 16, torch.bfloat16, config)
    lines = [text for _, text in instructions(compiled(launch, 90, folder).sass)]
    first = next(i for i, text in enumerate(lines) if "FADD" in text)
    assert sum("LDG" in text and ".128" in text for text in lines[:first]) >= 16
