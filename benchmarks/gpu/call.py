"""The command: runs parts, each in a process of its own, until the time is up."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import __doc__ as usage
from .checks import graphs, kernels, parity
from .machine import header
from .report import read, write
from .run import SMALLEST_SHARE, Failure, Run
from .speeds import update, whole_job
from .tuning import tuning

HERE = Path(__file__).resolve().parent

PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "header": header,
    "kernels": kernels,
    "graphs": graphs,
    "parity": parity,
    "tuning": tuning,
    "update": update,
    "cifar10 B=1": whole_job("cifar10-32", 1),
    "cifar10 B=256": whole_job("cifar10-32", 256),
    "celebahq B=1": whole_job("celebahq-256", 1),
}


def execute(parts: list[str], run: Run) -> None:
    """Run parts one after the other, and write each result at once; this runs in a child process."""
    for name in parts:
        started = time.time()
        try:
            result = PARTS[name](run)
            entry: dict[str, Any] = {"status": "unfinished" if result.get("unfinished") else "ok", "result": result}
        except Failure as e:
            entry = {"status": "failed", "result": e.result, "error": str(e)}
        except Exception:
            entry = {"status": "failed", "error": traceback.format_exc()}
        run.finished[name] = {**entry, "seconds": round(time.time() - started, 1)}
        write(run.out, run.finished, run.dry)


def child(parts: list[str], arguments: argparse.Namespace, limit: float) -> str | None:
    """Run parts in a process of their own, and return the error of the process, or None."""
    command = [sys.executable, str(HERE), "--out", str(arguments.out), "--child", ",".join(parts)]
    command += ["--seconds", str(limit)] + ["--dry-run"] * arguments.dry_run
    command += ["--diffusers", str(arguments.diffusers)] if arguments.diffusers else []
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if arguments.dry_run else {})
    try:
        done = subprocess.run(command, env=environment, timeout=limit, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return None if done.returncode == 0 else f"exit code {done.returncode}\n{(done.stderr or '')[-2000:]}"


def main(argv: list[str] | None = None) -> int:
    """Run the parts that the arguments name, and return the exit code."""
    parser = argparse.ArgumentParser(
        "python benchmarks/gpu", description=usage, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = os.environ.get("FASTDIFF_GPU_OUT") or os.environ.get("OUT") or "out/gpu"
    parser.add_argument("--out", type=Path, default=Path(default))
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--resume", type=Path, help="an earlier gpu.json, else the one in --out; ok parts are kept")
    parser.add_argument("--anew", action="store_true", help="do parts again that are ok")
    parser.add_argument("--seconds", type=float, default=520.0, help="the call ends by then")
    parser.add_argument("--diffusers", type=Path, help="a folder with diffusers, unpacked or as wheels")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ends, out, dry = time.time() + arguments.seconds, arguments.out, arguments.dry_run
    out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        execute(arguments.child.split(","), Run(out, dry, ends, arguments.diffusers, read(out / "gpu.json", dry)))
        return 0
    asked = [name.strip() for name in arguments.parts.split(",")]
    if not set(asked) <= set(PARTS):
        parser.error(f"unknown part {', '.join(set(asked) - set(PARTS))}; there are: {', '.join(PARTS)}")
    parts = read(arguments.resume or out / "gpu.json", dry)
    write(out, parts, dry)
    todo = [name for name in asked if arguments.anew or parts.get(name, {}).get("status") != "ok"]
    for group in [todo] if dry and todo else [[name] for name in todo]:
        left = ends - time.time()
        write(out, {name: part for name, part in parts.items() if name not in group}, dry)
        problem = child(group, arguments, left) if left > SMALLEST_SHARE or dry else "no time was left"
        parts = read(out / "gpu.json", dry)
        for name in group:
            if name not in parts:
                late = problem is not None and problem.startswith(("no time", "stopped"))
                parts[name] = {"status": "unfinished" if late else "failed", "error": problem or "it left no result"}
        write(out, parts, dry)
        for name in group:
            print(
                f"{name:16} {parts[name]['status']:11} {parts[name].get('error', '').strip().splitlines()[-1:]}",
                flush=True,
            )
    print((out / "gpu.md").read_text(encoding="utf-8"))
    status = {parts[name]["status"] for name in asked}
    return 1 if "failed" in status else 3 if "unfinished" in status else 0
