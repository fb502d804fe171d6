"""The command: runs parts, each in a process of its own, until the time is up."""

from __future__ import annotations

import argparse
import dataclasses
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
from .compiling import WORKER, compile_share, precompile
from .machine import header
from .profiling import profile
from .report import read, summary, write
from .run import JOURNAL, SMALLEST_SHARE, ContextLost, Failure, Run, forget
from .speeds import update, whole_job
from .tuning import tuning

HERE = Path(__file__).resolve().parent

PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "header": header,
    "precompile": precompile,
    "kernels": kernels,
    "graphs": graphs,
    "parity": parity,
    "cifar10 B=1": whole_job("cifar10-32", 1),
    "cifar10 B=256": whole_job("cifar10-32", 256),
    "profile": profile,
    "tuning": tuning,
    "tuned cifar10 B=1": whole_job("cifar10-32", 1, tuned=True),
    "tuned cifar10 B=8": whole_job("cifar10-32", 8, tuned=True),
    "tuned cifar10 B=64": whole_job("cifar10-32", 64, tuned=True),
    "tuned cifar10 B=256": whole_job("cifar10-32", 256, tuned=True),
    "tuned celebahq B=1": whole_job("celebahq-256", 1, tuned=True),
    "tuned celebahq B=8": whole_job("celebahq-256", 8, tuned=True),
    "update": update,
}
LOST = 17  # exit code of a process whose CUDA context is lost
MOST_RESTARTS = 20  # of a part, each of which has one item more that failed


def execute(parts: list[str], run: Run) -> int:
    """Run parts one after the other, and write each result at once; this runs in a child process.

    A lost context ends the process, with `LOST` as its exit code: the part goes on in another one, without the item.
    """
    for name in parts:
        started = time.time()
        run = dataclasses.replace(run, part=name)
        try:
            result = PARTS[name](run)
            entry: dict[str, Any] = {"status": "unfinished" if result.get("unfinished") else "ok", "result": result}
        except ContextLost as e:
            print(f"{name}: the CUDA context is lost: {e}", file=sys.stderr)
            return LOST
        except Failure as e:
            entry = {"status": "failed", "result": e.result, "error": str(e)}
        except Exception:
            entry = {"status": "failed", "error": traceback.format_exc()}
        run.finished[name] = {**entry, "seconds": round(time.time() - started, 1)}
        write(run.out, run.finished, run.dry)
    return 0


def child(parts: list[str], arguments: argparse.Namespace, limit: float) -> str | None:
    """Run parts in a process of their own, and return the error of the process, or None."""
    command = [sys.executable, str(HERE), "--out", str(arguments.out), "--child", ",".join(parts)]
    command += ["--seconds", str(limit)] + ["--dry-run"] * arguments.dry_run
    command += ["--diffusers", str(arguments.diffusers)] if arguments.diffusers else []
    environment = os.environ | {"PYTHONFAULTHANDLER": "1"}
    environment |= {"TRITON_INTERPRET": "1"} if arguments.dry_run else {}
    try:
        done = subprocess.run(command, env=environment, timeout=limit, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return None if done.returncode == 0 else f"exit code {done.returncode}\n{(done.stderr or '')[-2000:]}"


def go_on(group: list[str], arguments: argparse.Namespace, ends: float) -> None:
    """Run parts of a group until each has a result, in other processes where one ends before."""
    out, dry, problem = arguments.out, arguments.dry_run, "no time was left"
    for _ in range(MOST_RESTARTS):
        left = ends - time.time()
        todo = [name for name in group if name not in read(out / "gpu.json", dry)]
        if not todo or not (left > SMALLEST_SHARE or dry):
            break
        before = (out / JOURNAL).stat().st_size if (out / JOURNAL).is_file() else 0
        problem = child(todo, arguments, left) or "it left no result"
        stopped = problem.startswith("stopped")
        if stopped or not (out / JOURNAL).is_file() or (out / JOURNAL).stat().st_size == before:
            break  # another process would end in the same way
    parts = read(out / "gpu.json", dry)
    for name in group:
        if name not in parts:
            late = problem.startswith(("no time", "stopped"))
            parts[name] = {"status": "unfinished" if late else "failed", "error": problem}
            found = dataclasses.replace(Run(out, dry, ends, None, {}), part=name).items()
            done = {
                item: line.get("result", line.get("error")) for item, line in found.items() if line["state"] == "done"
            }
            if done:
                parts[name]["result"] = {"items": done}
    write(out, parts, dry)


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
        run = Run(out, dry, ends, arguments.diffusers, read(out / "gpu.json", dry))
        if arguments.child.startswith(WORKER):
            compile_share(dataclasses.replace(run, part="precompile"), *map(int, arguments.child.split("/")[1:]))
            return 0
        return execute(arguments.child.split(","), run)
    asked = [name.strip() for name in arguments.parts.split(",")]
    if not set(asked) <= set(PARTS):
        parser.error(f"unknown part {', '.join(set(asked) - set(PARTS))}; there are: {', '.join(PARTS)}")
    parts = read(arguments.resume or out / "gpu.json", dry)
    write(out, parts, dry)
    todo = [name for name in asked if arguments.anew or parts.get(name, {}).get("status") != "ok"]
    for group in [todo] if dry and todo else [[name] for name in todo]:
        write(out, {name: part for name, part in read(out / "gpu.json", dry).items() if name not in group}, dry)
        if arguments.anew:
            forget(out / JOURNAL, group, dry)
        go_on(group, arguments, ends)
        parts = read(out / "gpu.json", dry)
        for name in group:
            print(
                f"{name:16} {parts[name]['status']:11} {parts[name].get('error', '').strip().splitlines()[-1:]}",
                flush=True,
            )
    parts = read(out / "gpu.json", dry)
    print("\n".join(summary(parts, dry)), flush=True)
    status = {parts[name]["status"] for name in asked}
    return 1 if "failed" in status else 3 if "unfinished" in status else 0
