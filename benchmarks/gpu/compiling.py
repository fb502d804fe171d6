"""The part `precompile`, which compiles kernels in as many processes as there are processors.

Triton compiles at the first launch, one kernel after the other. Here its cache is filled before: launches of the
networks' steps are made on the meta device, as the compiler needs no operands.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from . import lists
from .run import Run

WORKER = "precompile/"


def distinct(run: Run) -> dict[str, Any]:
    """Return a launch for every binary that steps of the published networks need, by a name."""
    import torch

    from fastdiff.kernels.launch import device_of

    found: dict[str, Any] = {}
    device = None if run.dry else device_of(torch.empty(0, device=run.device))
    for network, images, guided in [("", 2, False)] if run.dry else lists.JOBS:
        for launch in lists.step(lists.network(network, guided), images, torch.bfloat16, guided, device):
            found.setdefault(binary(launch), launch)
    return found


def binary(launch: Any) -> str:
    """Return what a binary depends on, as text: the kernel, its configuration, and what it is specialised on."""
    import torch

    params = {p.name: p for p in getattr(launch.kernel, "params", ())}  # an interpreted kernel has none
    values = []
    for name, value in launch.arguments.items():
        param = params.get(name)
        if isinstance(value, torch.Tensor):
            value = str(value.dtype)
        elif param is not None and param.do_not_specialize:
            continue
        elif isinstance(value, int) and param is not None and not param.is_constexpr:
            value = 1 if value == 1 else f"int of 16: {value % 16 == 0}"
        elif isinstance(value, float):
            value = "float"
        elif isinstance(value, tuple | list):
            value = len(value)
        values.append(f"{name}={value}")
    return f"{launch.op} {launch.config} {' '.join(values)}"


def compile_share(run: Run, share: int, of: int) -> dict[str, str]:
    """Compile every ``of``-th kernel from number ``share`` on, and return what failed."""
    failed = {}
    for i, (name, launch) in enumerate(distinct(run).items()):
        if i % of != share or launch.op == "library.products" or run.late:
            continue

        def compile(launch: Any = launch) -> None:
            if not run.dry:  # interpreted kernels have nothing to compile
                launch.kernel.warmup(**launch.operands, grid=launch.grid, **launch.options)

        outcome = run.item(name, compile)
        if "error" in outcome:
            failed[name] = outcome["error"]
    return failed


def precompile(run: Run) -> dict[str, Any]:
    """Compile the kernels in processes that share them out."""
    workers = 1 if run.dry else max(1, (os.cpu_count() or 2) - 2)
    if workers == 1:
        failed = compile_share(run, 0, 1)
    else:
        here = str(Path(__file__).resolve().parent)
        command = [sys.executable, here, "--out", str(run.out), "--seconds", str(run.ends - _now())]
        children = [
            subprocess.Popen([*command, "--child", f"{WORKER}{i}/{workers}"], stderr=subprocess.DEVNULL)
            for i in range(workers)
        ]
        for process in children:
            process.wait()
        failed = {name: line["error"] for name, line in run.anew().items() if "error" in line}
    done = [name for name, line in run.anew().items() if line["state"] == "done"]
    return {"kernels": len(done), "processes": workers, "failed": failed}


def _now() -> float:
    import time

    return time.time()
