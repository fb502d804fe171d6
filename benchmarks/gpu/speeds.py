"""The parts that measure speed: the update compared with a copy, and whole jobs compared with baselines."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable
from typing import Any

from .jobs import backend_job, diffusers_from, diffusers_job, one_graph
from .networks import on_gpu, relative, start, tiny, unet_of
from .run import Failure, Run
from .timing import microseconds, seconds


def update(run: Run) -> dict[str, Any]:
    """Measure the fused update and a copy that moves as many bytes, neither with operands in the L2 cache."""
    from fastdiff import NoiseSchedule, solvers

    ops = run.finished.get("kernels", {}).get("result", {}).get("ops", {})
    if ops.get("update", {"failed": True}).get("failed"):
        raise Failure("the kernel's check is red or was not run, so it gets no speed", {})
    rows, failed = [], {}
    for n, side in [(2, 4)] if run.dry else [(256, 32), (4096, 32), (1, 256), (64, 256)]:
        for table in (solvers.ddim(NoiseSchedule(), 1000), solvers.ddpm(NoiseSchedule(), 1000)):
            name = f"{n}x{side}x{side} {table.solver}"
            outcome = run.item(name, functools.partial(update_row, run, n, side, table))
            if "error" in outcome:
                failed[name] = outcome["error"]
            else:
                rows.append(outcome["result"])
    if failed:
        raise Failure(f"{', '.join(failed)} failed", {"rows": rows, "failed": failed})
    return {"rows": rows}


def update_row(run: Run, n: int, side: int, table: Any) -> dict[str, Any]:
    """Measure the update of n images, and a copy of as many bytes as it moves."""
    import torch

    from fastdiff.kernels.update import update as fused

    s = start(n, (3, side, side), table, run.device, torch.float32)
    out = torch.randn(n, 3, side, side, device=run.device).to(torch.bfloat16)
    arrived = torch.zeros(n, dtype=torch.int32, device=run.device)
    tensors = (s.x, out, s.bank.values, s.table, s.row, s.bank.lengths, s.seed, s.index, arrived)
    moves = s.x.numel() * (4 + 4 + 2)
    source = torch.zeros(moves // 2, dtype=torch.uint8, device=run.device)
    target = torch.empty_like(source)
    us = microseconds(run, fused(*tensors))
    copy = microseconds(run, lambda: target.copy_(source))
    return {
        "images": n, "side": side, "solver": table.solver, "us": round(us, 2), "copy_us": round(copy, 2),
        "times_a_copy": round(us / copy, 2),
    }  # fmt: skip


def contenders(run: Run, unet: Any, table: Any, images: int) -> dict[str, Callable[[], Callable[[], Any]]]:
    """Return functions that build the jobs that are compared, `eager` first."""
    found: dict[str, Callable[[], Callable[[], Any]]] = {
        name: functools.partial(backend_job, run, name, unet, table, images) for name in on_gpu(run)
    }
    found["baseline: one graph, max-autotune"] = lambda: one_graph(run, unet, table, images)
    found["baseline: diffusers, compiled U-Net"] = lambda: diffusers_job(run, unet, len(table), images)
    found["compiled, max-autotune"] = lambda: backend_job(
        run, "compiled", unet, table, images, "max-autotune-no-cudagraphs"
    )
    return found


def whole_job(network: str, n: int, tuned: bool = False) -> Callable[[Run], dict[str, Any]]:
    """Return a part that measures img-steps/s of n images in 50 DDIM steps in bfloat16.

    A contender takes turns with `eager`, so that each is an item of its own. tuned: launches are configured by the file
    of the part `tuning`, which also gets the speeds, by which "auto" chooses.
    """

    def measure(run: Run) -> dict[str, Any]:
        import torch

        from fastdiff import NoiseSchedule, solvers
        from fastdiff.bench.networks import PUBLISHED
        from fastdiff.kernels import launch

        steps, images = (3, min(n, 2)) if run.dry else (50, n)
        config = tiny() if run.dry else PUBLISHED[f"ddpm-{network}"]
        table = solvers.ddim(NoiseSchedule(), steps)
        unet = unet_of(config, torch.bfloat16, run.device)
        rows: dict[str, dict[str, Any]] = {}
        failed, unfinished = [], []
        former, fixed = launch.CONFIGS, torch.backends.cudnn.benchmark
        torch.backends.cudnn.benchmark = True  # cuDNN measures its algorithms: for eager, compiled and the baselines
        if tuned:
            launch.CONFIGS = run.out
        reference = Reference(run, config, unet, table, images)
        try:
            with diffusers_from(run.diffusers):
                for name, make in contenders(run, unet, table, images).items():
                    if run.late:
                        unfinished.append(name)
                        continue
                    outcome = run.item(name, functools.partial(reference.measured, name, make))
                    rows[name] = outcome.get("result", {"error": outcome.get("error")})
                    if "img_steps_per_s" not in rows[name] and "absent" not in rows[name]:
                        failed.append(name)
                    if tuned and "img_steps_per_s" in rows[name] and name in on_gpu(run):
                        remember(run, config, images, name, rows[name]["img_steps_per_s"])
        finally:
            launch.CONFIGS, torch.backends.cudnn.benchmark = former, fixed
        result = {"images": images, "steps": steps, "contenders": rows, "unfinished": unfinished, "stand_in": run.dry}
        if failed:
            raise Failure(f"no speed of {', '.join(failed)}: an error, or images that are off", result)
        return result

    return measure


class Reference:
    """The job of `eager`, in bfloat16 to take turns with and in float32 to compare images with; built when needed.

    If it fails itself, contenders are measured alone, and their images compared with nothing but that they are finite.
    """

    def __init__(self, run: Run, config: Any, unet: Any, table: Any, images: int):
        self.run, self.config, self.unet, self.table, self.images = run, config, unet, table, images
        self.job: Callable[[], Any] | None = None
        self.exact: Any = None
        self.error = 0.0
        self.problem: str | None = None

    def build(self) -> None:
        if self.job is not None or self.problem is not None:
            return
        import torch

        try:
            whole = unet_of(self.config, torch.float32, self.run.device)
            self.exact = backend_job(self.run, "eager", whole, self.table, self.images)()
            self.job = backend_job(self.run, "eager", self.unet, self.table, self.images)
            self.error = relative(self.job(), self.exact)
        except Exception as e:
            if "CUDA error" in str(e):
                raise
            self.problem, self.job, self.exact = f"{type(e).__name__}: {str(e)[:300]}", None, None

    def measured(self, name: str, make: Callable[[], Callable[[], Any]]) -> dict[str, Any]:
        """Build a job, compare its images, and measure it in turns with `eager`."""
        import torch

        run = self.run
        self.build()
        started = time.perf_counter()
        if not run.dry:
            torch.cuda.reset_peak_memory_stats()
        try:
            job = make()
            result = job()
        except ImportError as e:
            return {"absent": str(e)}
        row: dict[str, Any] = {"first_call_s": round(time.perf_counter() - started, 1)}
        if not run.dry:
            row["peak_MiB"] = torch.cuda.max_memory_allocated() >> 20
        red = not bool(torch.isfinite(result).all())
        if self.exact is None:
            row["no_reference"] = self.problem
        elif "diffusers" not in name:  # whose images differ, as it draws its own noise
            row["error"] = relative(result, self.exact)
            red = red or not row["error"] <= 2 * self.error + 1e-3
        if red:
            return row | {"red": "images are off"}
        jobs = {name: job} | ({"eager": self.job} if self.job is not None and name != "eager" else {})
        taken = seconds(run, jobs, 1 if run.dry else 7)
        middle = {key: statistics.median(times) for key, times in taken.items()}
        work = self.images * len(self.table)
        row["img_steps_per_s"] = round(work / middle[name], 2)
        row["spread"] = round((max(taken[name]) - min(taken[name])) / middle[name], 3)
        if name != "eager" and "eager" in middle:
            row["times_eager"] = round(middle["eager"] / middle[name], 3)
        return row


def remember(run: Run, config: Any, images: int, backend: str, speed: float) -> None:
    """Write a backend's speed to the tuned file, by which "auto" chooses."""
    import torch

    from fastdiff.kernels.launch import config_file, save_tuned, speeds, tuned

    gpu = "dry run" if run.dry else torch.cuda.get_device_properties(0).name
    path = config_file(gpu, run.out)
    key = f"bfloat16 {config.sample_size}x{config.sample_size}x{images}"
    known = speeds(path)
    save_tuned(path, gpu, tuned(path), {**known, key: {**known.get(key, {}), backend: speed}})
