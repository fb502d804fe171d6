"""Runs Triton kernels without a GPU: interprets cases and compares them with references, or compiles launches.

``TRITON_INTERPRET=1 python -m tests.support.kernel_harness [text]`` interprets all cases of `kernel_cases` whose names
contain the text, and prints a line of JSON for each. It is a process of its own because triton reads the variable when
a kernel's module is imported.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff.kernels.launch import Config, Launch

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TARGETS = (80, 89, 90, 100, 120)

# Cases ----------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Case:
    """An operation and its arguments. Tensors, and tuples of tensors, get guard bands.

    Attributes:
        op: the operation.
        arguments: its arguments by name.
        writes: names of the arguments that it writes. They hold NaN where they must not be read. Floats are compared
            with the reference in float64, others must be equal.
        apart: for a written argument, the dimension along which errors are of different kinds (mean, squares) and are
            compared separately.
        band: error allowed in addition to the reference's, in float32 roundings of the largest value; for fast
            exponentials and sums in another order.
        accumulations: number of times that tensor cores add to a sum, `accumulations`. They cut sums off, toward zero,
            where the reference rounds them, so each may cost a rounding more.
        config: None: the operation chooses.
        within: largest absolute error, if that is specified.
        scratch: names of arguments that may hold anything afterwards.
    """

    op: Callable[..., Launch]
    arguments: dict[str, Any]
    writes: tuple[str, ...]
    apart: dict[str, int] = dataclasses.field(default_factory=dict)
    band: float = 4.0
    accumulations: float = 0.0
    config: Config | None = None
    within: float | None = None
    scratch: tuple[str, ...] = ()

    def launch(self) -> Launch:
        return self.op(**self.arguments, config=self.config)

    def to(self, dtype: torch.dtype | None, which: Callable[[str], bool] = lambda name: True) -> Case:
        """Copy the case, with floating-point tensors whose name satisfies ``which`` in ``dtype`` (None: unchanged)."""

        def convert(name: str, value: Any) -> Any:
            if isinstance(value, Tensor):
                kind = dtype if dtype and which(name) and value.is_floating_point() else value.dtype
                return torch.empty_like(value, dtype=kind).copy_(value)
            return tuple(convert(name, v) for v in value) if isinstance(value, tuple) else value

        return dataclasses.replace(self, arguments={name: convert(name, v) for name, v in self.arguments.items()})


GUARD, BYTE = 64, 0xFD  # bytes on both sides of a tensor, and their value, which is NaN in every floating-point dtype


class Guarded:
    """A copy of a tensor with its strides, between two guard bands. They and gaps inside must not be written."""

    def __init__(self, values: Tensor):
        self.values = values
        extent = (
            1 + sum((n - 1) * s for n, s in zip(values.shape, values.stride(), strict=True)) if values.numel() else 0
        )
        size = extent * values.element_size()
        self.whole = torch.full((2 * GUARD + size,), BYTE, dtype=torch.uint8, device=values.device)
        inner = self.whole[GUARD : GUARD + size].view(values.dtype)
        self.tensor = inner.as_strided(values.shape, values.stride(), inner.storage_offset())
        self.tensor.copy_(values)
        self.owned = torch.zeros_like(self.whole, dtype=torch.bool)
        mask = self.owned[GUARD : GUARD + size].view(extent, values.element_size())
        mask.as_strided(
            (*values.shape, values.element_size()),
            (*(s * values.element_size() for s in values.stride()), 1), mask.storage_offset(),
        ).fill_(True)  # fmt: skip

    def check(self, name: str, written: bool) -> None:
        assert self.whole[~self.owned].eq(BYTE).all(), f"{name}: written out of bounds"
        if not written:
            now, then = (v.flatten().clone().view(torch.uint8) for v in (self.tensor, self.values))
            assert torch.equal(now, then), f"{name} was written to"


def guard(value: Any, guards: list[Guarded]) -> Any:
    if isinstance(value, tuple):
        return tuple(guard(v, guards) for v in value)
    if isinstance(value, Tensor):
        guards.append(Guarded(value))
        return guards[-1].tensor
    return value


def rounding(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def check(case: Case) -> dict[str, float]:
    """Run the launch and compare what it wrote with the reference in float64.

    Return the largest error of each written argument as a share of the allowed one, which is twice the sum of the
    reference's error in float32 and the rounding of the result. Raise AssertionError if it is larger.
    """
    guards: dict[str, list[Guarded]] = {name: [] for name in case.arguments}
    arguments = {name: guard(value, guards[name]) for name, value in case.arguments.items()}
    dataclasses.replace(case, arguments=arguments).launch()()
    for name, held in guards.items():
        for g in held:
            g.check(name, name in (*case.writes, *case.scratch))
    exact = case.to(torch.float64)
    exact.launch().reference()
    single = case.to(torch.float32, lambda name: name in case.writes)  # its results are not rounded to a half
    single.launch().reference()
    shares = {}
    for name in case.writes:
        got, best, plain = (arguments[name], exact.arguments[name], single.arguments[name])
        if not got.is_floating_point():
            assert torch.equal(got, plain), f"{name}: {got} is not {plain}"
            shares[name] = 0.0
            continue
        band = case.band + PER_ACCUMULATION * case.accumulations
        shares[name] = compare(name, got, best, plain, case.apart.get(name), band)
        if case.within is not None:
            assert (got - best).abs().max() <= case.within, f"{name}: off by more than {case.within}"
    return shares


def compare(name: str, got: Tensor, exact: Tensor, plain: Tensor, apart: int | None, band: float) -> float:
    """Compare ``got`` with the reference in float64, ``exact``, given the reference in float32, ``plain``."""
    dtype, got = got.dtype, got.double()
    assert torch.equal(got.isnan(), exact.isnan()), f"{name}: NaN in {int((got.isnan() != exact.isnan()).sum())} places"
    over = [i for i in range(got.ndim) if i != apart]
    reference = torch.nan_to_num(plain.double() - exact, posinf=0.0, neginf=0.0).abs().amax(dim=over, keepdim=True)
    finite = torch.where(exact.isfinite(), exact, 0.0).abs()
    own = rounding(dtype) * finite + torch.finfo(dtype).tiny * rounding(dtype)
    allowed = 2 * (reference + own + band * 2.0**-24 * finite.amax(dim=over, keepdim=True))
    wrong = (got - exact).abs()
    wrong[(got == exact) | exact.isnan()] = 0.0
    share = wrong / allowed
    worst = share.nan_to_num(nan=math.inf).amax() if share.numel() else torch.zeros(())
    assert worst <= 1.0, (
        f"{name}: {(share > 1).sum()} of {share.numel()} values are off, by up to {worst:.3g} x allowed"
    )
    return float(worst)


# Tensor cores ---------------------------------------------------------------------------------------------------------

# They compute sums of ``DEPTHS`` products and a float32 at a time, and cut off what does not fit into a float32 (Fasi,
# Higham, Mikaitis & Pranesh 2021: Numerical behavior of NVIDIA tensor cores). With halves that is one addition to the
# sum of a tile for every 16 products; with float32 as three products of TF32 numbers it is three for every 8.
DEPTHS = {2: 16, 4: 8}  # by the size of an operand in bytes: MMA's k of bfloat16 and float16, and of TF32
# A sum is cut off by half a rounding unit of float32 on average, 2^-24 of it, and always toward zero.
PER_ACCUMULATION = 0.5


def accumulations(dtype: torch.dtype, products: int) -> float:
    """Return how many times tensor cores add to a sum of so many products."""
    return products / DEPTHS[dtype.itemsize] * (3 if dtype == torch.float32 else 1)


def cut_off(x: Any) -> Any:
    """Round float64 toward zero to float32."""
    import numpy as np

    nearest = x.astype(np.float32)
    over = np.abs(nearest) > np.abs(x)
    nearest.view(np.int32)[over] -= 1  # the next number toward zero
    return nearest


def tf32(x: Any) -> Any:
    """Keep the bits of a float32 that tensor cores read: 10 of its mantissa."""
    import numpy as np

    return (x.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.float32)


def multiply_as_tensor_cores(a: Any, b: Any, sums: Any, depth: int) -> Any:
    """Return sums + a b, float32, as tensor cores add the products of float32 [..., M, K] and [..., K, N]."""
    import numpy as np

    for k in range(0, a.shape[-1], depth):
        part = a[..., k : k + depth].astype(np.float64) @ b[..., k : k + depth, :].astype(np.float64)
        sums = cut_off(sums.astype(np.float64) + part)
    return sums


def product(a: Any, b: Any, sums: Any, size: int, precision: str) -> Any:
    """Return sums + a b as Triton has tensor cores compute it, from operands of ``size`` bytes given as float32."""
    import numpy as np

    if size == 2:
        return multiply_as_tensor_cores(a, b, sums, DEPTHS[2])
    if precision == "TF32":
        return multiply_as_tensor_cores(tf32(a), tf32(b), sums, DEPTHS[4])
    assert precision == "TF32x3"
    # What is cut off from the products of remainders is too small to matter, so these are added at once.
    ah, bh = tf32(a), tf32(b)
    total = multiply_as_tensor_cores(tf32(a - ah), bh, np.zeros_like(sums), a.shape[-1])
    total = multiply_as_tensor_cores(ah, tf32(b - bh), total, a.shape[-1])
    return multiply_as_tensor_cores(ah, bh, total, DEPTHS[4]) + sums


def mend_interpreter() -> None:
    """Let Triton's interpreter multiply matrices as tensor cores do, correct a fault of it, and run Gluon's kernel.

    It would round each sum to nearest, and it stores bfloat16 as integers, which it multiplies. And it passes bounds of
    loops, which are arrays of one number, to ``int``, which NumPy 2.4 refuses.
    """
    import numpy as np
    from triton import language as tl
    from triton.runtime import interpreter

    from fastdiff.kernels import hopper
    from tests.support import gluon

    patch = interpreter._patch_lang_tensor

    def as_float32(x: Any) -> Any:
        if x.dtype.scalar != tl.bfloat16:
            return x.data.astype(np.float32)
        return (x.data.astype(np.uint32) << 16).view(np.float32)

    def create_dot(self: Any, a: Any, b: Any, sums: Any, precision: Any, *_: Any) -> Any:
        size = a.dtype.scalar.primitive_bitwidth // 8
        result = product(as_float32(a), as_float32(b), sums.data, size, precision.name)
        return interpreter.TensorHandle(result, sums.dtype.scalar)

    def patch_tensor(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter.InterpreterBuilder.create_dot = create_dot
    interpreter._patch_lang_tensor = patch_tensor
    hopper.HopperLaunch.__call__ = gluon.run


def interpret(cases: dict[str, Callable[[], Case]]) -> None:
    """Run every case, and print a line of JSON for each."""
    mend_interpreter()
    for name, build in cases.items():
        try:
            case = build()
            result: dict[str, Any] = {"name": name, "shares": check(case)}
        except Exception:
            result = {"name": name, "error": traceback.format_exc()}
        print(json.dumps(result), flush=True)


# Compilation ahead of time --------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Binary:
    """A compiled kernel.

    ``stack`` and ``registers`` are those of a thread, ``shared`` the bytes of shared memory of a program and ``warps``
    its warps. ``text`` is the code before the last compiler (PTX, or AMD's assembly), ``file`` the result.
    """

    registers: int
    stack: int  # bytes; spills are there
    shared: int
    warps: int
    text: str
    file: Path | None = None

    def tensor_cores(self, capability: int) -> bool:
        """Return whether it uses the target's tensor cores: those of warps, Hopper's of warp groups, or Blackwell's."""
        return {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync") in self.text

    @functools.cached_property
    def sass(self) -> str:
        """The assembly. The disassembler takes most of a second to start, so ask for it only where it is needed."""
        import triton

        tool = triton.knobs.nvidia.cuobjdump.path
        return subprocess.run([tool, "-sass", self.file], check=True, capture_output=True, text=True).stdout

    @property
    def spills_in_loops(self) -> int:
        """Number of instructions within loops that move registers to or from the stack."""
        return spills_in_loops(self.sass) if self.stack else 0


def instructions(sass: str) -> list[tuple[int, str]]:
    """Return the address and text of every instruction of an assembly by cuobjdump."""
    found = re.findall(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);", sass, re.MULTILINE)
    return [(int(address, 16), text) for address, text in found]


def spills_in_loops(sass: str) -> int:
    """Count loads and stores of the stack between the target of a branch backwards and the branch."""
    lines = instructions(sass)
    loops = []
    for at, text in lines:
        target = re.search(r"\bBRA\b.*?0x([0-9a-f]+)", text)
        if target and int(target[1], 16) < at:  # a branch to itself is the end of a program
            loops.append((int(target[1], 16), at))
    spills = [at for at, text in lines if re.search(r"\b(LDL|STL)\b", text)]
    return sum(any(first <= at <= last for first, last in loops) for at in spills)


GLOBAL = re.compile(r"\b(ld|st|atom|red)\.(\w+\.)*global\b|\bcp\.async\b|\bcp\.reduce\b")  # PTX that touches it


def waits_first(ptx: str) -> bool:
    """Return whether a kernel's PTX waits for the kernels before ahead of all that touches global memory."""
    wait, touches = ptx.find("griddepcontrol.wait"), GLOBAL.search(ptx)
    return wait >= 0 and touches is not None and wait < touches.start()


POINTERS = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int64: "*i64", torch.int32: "*i32",
    torch.uint8: "*u8",
}  # fmt: skip


def source_of(launch: Launch) -> Any:
    """Return the source of a launch's kernel, specialised as the launch would do; tensors may be on the meta device."""
    from triton.compiler import ASTSource
    from triton.experimental.gluon._runtime import GluonASTSource
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    kernel, operands = launch.kernel, launch.operands
    signature: dict[str, str] = {}
    constants: dict[tuple[int, ...], Any] = {}
    attributes: dict[tuple[int, ...], Any] = {}
    assert set(operands) == set(kernel.arg_names), set(operands) ^ set(kernel.arg_names)
    for i, name in enumerate(kernel.arg_names):
        value = operands[name]
        kind = "constexpr"
        special = not kernel.params[i].do_not_specialize
        if kernel.params[i].is_constexpr or value is None or (special and isinstance(value, int) and value == 1):
            constants[(i,)] = value
        elif isinstance(value, Tensor):
            kind, attributes[(i,)] = POINTERS[value.dtype], [["tt.divisibility", 16]]
        elif isinstance(value, TensorDescriptor):
            kind = f"tensordesc<{POINTERS[value.base.dtype][1:]}{value.block_shape},{value.layout!r}>"
        elif isinstance(value, int):
            kind = "i32" if abs(value) < 1 << 31 else "i64"
            if special and value % 16 == 0:
                attributes[(i,)] = [["tt.divisibility", 16]]
        else:
            assert isinstance(value, float), (name, value)
            kind = "fp32"
        signature[name] = kind
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    return source(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def compiled_for_amd(launch: Launch, architecture: str) -> Binary:
    """Compile the kernel of a launch for a GPU of AMD, "gfx942" for instance. Scratch memory stands for spills."""
    import triton
    from triton.backends.compiler import GPUTarget

    result = triton.compile(source_of(launch), target=GPUTarget("hip", architecture, 64), options=launch.config.options)
    text = result.asm["amdgcn"]

    def number(name: str) -> int:
        found = re.search(rf"\.{name}:\s+(\d+)", text)
        assert found, name
        return int(found[1])

    shared, warps = result.metadata.shared, result.metadata.num_warps
    return Binary(number("vgpr_count"), number("vgpr_spill_count"), shared, warps, text)


def compiled(launch: Launch, capability: int, folder: Path) -> Binary:
    """Compile the kernel of a launch for a GPU of ``capability`` (90: Hopper), as a launch would do.

    This needs neither a GPU nor a driver. folder: for the compiler's files.
    """
    import triton
    from triton.backends.compiler import GPUTarget

    target = GPUTarget("cuda", capability, 32)
    result = triton.compile(source_of(launch), target=target, options=launch.config.options)
    file = folder / f"{result.metadata.name}.cubin"
    file.write_bytes(result.asm["cubin"])

    tool = triton.knobs.nvidia.cuobjdump.path
    usage = subprocess.run([tool, "-res-usage", file], check=True, capture_output=True, text=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, _, local = map(int, found.groups())
    shared, warps = result.metadata.shared, result.metadata.num_warps
    return Binary(registers, stack + local, shared, warps, result.asm["ptx"], file)


if __name__ == "__main__":
    from tests.support.kernel_cases import CASES

    wanted = sys.argv[1:]  # parts of names; all cases without
    interpret({name: build for name, build in CASES.items() if not wanted or any(part in name for part in wanted)})
