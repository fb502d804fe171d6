"""The compiled engine `fastdiff._native`: whether it is there, its instruction sets, and what it cannot run."""

from __future__ import annotations

import os
from types import ModuleType

import torch
from torch import nn

from fastdiff.backends.base import Spec
from fastdiff.backends.network import program_reasons


def extension() -> ModuleType | None:
    """Return the compiled module, or None where it was not built."""
    try:
        from fastdiff import _native
    except ImportError:
        return None
    return _native


def isa() -> str:
    """Return the instruction set that ``FASTDIFF_ISA`` asks for; empty for the best available one."""
    return os.environ.get("FASTDIFF_ISA", "")


def multiplies_bf16(native: ModuleType) -> bool:
    """Return whether the instruction set in use has products of bfloat16."""
    return (isa() or next(iter(native.isas()), "")) in (*native.bf16_isas(), *native.emulated_isas())


def reasons_against(unet: nn.Module, spec: Spec) -> list[str]:
    """List every reason why `native` cannot run the network; empty where it can."""
    return program_reasons(unet, spec.shape) + engine_reasons(spec.dtype, spec.device)


def engine_reasons(dtype: torch.dtype, device: torch.device) -> list[str]:
    """List every reason why the engine cannot run any network in this dtype on this device; empty where it can."""
    reasons = []
    native = extension()
    if native is None:
        reasons.append("the extension fastdiff._native is not built (install with a C++ compiler present)")
    elif not native.isas():
        reasons.append("this processor has none of the instruction sets it was built for (x86-64: AVX2 and FMA)")
    elif isa() not in ("", *native.isas(), *native.emulated_isas()):
        reasons.append(f"FASTDIFF_ISA={isa()!r} is not available; available: {', '.join(native.isas())}")
    if device.type != "cpu":
        reasons.append(f"it runs on the CPU, not on {device}")
    if dtype not in (torch.float32, torch.bfloat16):
        reasons.append(f"it computes in float32 or bfloat16, not in {str(dtype).removeprefix('torch.')}")
    if dtype == torch.bfloat16 and native is not None and not multiplies_bf16(native):
        reasons.append("the processor, or FASTDIFF_ISA, has no products of bfloat16 (x86-64: AMX or AVX-512 BF16)")
    return reasons
