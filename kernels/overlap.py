"""Programmatic dependent launch: a kernel starts while the one before it ends, and waits before it touches memory.

Its programs take free places on multiprocessors and compute their indices while others finish. A kernel that calls
`wait` before its first load or store is marked by `overlaps`, and `fastdiff.kernels.launch.Launch` launches those so on
GPUs that have it (Hopper and later). What a kernel waits for is the end of the one before, which waited itself: the
order of memory accesses is that of kernels one after the other.
"""

from __future__ import annotations

from typing import Any, TypeVar

import triton.language as tl

K = TypeVar("K")
CAPABILITY = 90  # the least compute capability whose compiler has the instructions


def overlaps(kernel: K) -> K:
    """Mark a kernel that calls `wait` before it reads or writes memory."""
    kernel.overlaps = True  # type: ignore[attr-defined]
    return kernel


def wait(_semantic: Any = None) -> None:
    """Let the next kernel start, and wait until those before this one have ended; nothing on GPUs without it.

    Triton's compiler calls this with ``_semantic``, and its interpreter without, whose kernels run one by one.
    """
    options = None if _semantic is None else _semantic.builder.options
    if options is None or options.backend_name != "cuda" or int(options.arch.removeprefix("sm")) < CAPABILITY:
        return
    tl.inline_asm_elementwise(
        "griddepcontrol.launch_dependents; griddepcontrol.wait; // $0", "=r", [], dtype=tl.int32, is_pure=False,
        pack=1, _semantic=_semantic,
    )  # fmt: skip


wait.__triton_builtin__ = True  # type: ignore[attr-defined]  # the compiler runs it, instead of compiling it
