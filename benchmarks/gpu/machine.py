"""The part `header`, which describes the machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import platform
import subprocess
from typing import Any

from .run import Run
from .timing import microseconds


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(run: Run) -> dict[str, Any]:
    """Describe the machine, and measure its limits: bytes per second of a copy, and FLOPS of a matrix product."""
    import torch

    result: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "diffusers")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    n, bytes_ = (64, 1 << 12) if run.dry else (8192, 1 << 30)
    if not run.dry:
        card = torch.cuda.get_device_properties(0)
        result |= {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "L2_MiB": card.L2_cache_size >> 20,
            "memory_GiB": round(card.total_memory / 2**30, 1),
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            result["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    a, b = (torch.randn(n, n, device=run.device).to(torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(bytes_, dtype=torch.uint8, device=run.device).fill_(i) for i in range(2))
    result["bf16_tflops"] = round(2 * n**3 / microseconds(run, lambda: a @ b) / 1e6, 2)
    result["copy_GB_per_s"] = round(2 * bytes_ / microseconds(run, lambda: target.copy_(source)) / 1e3, 2)
    return result
