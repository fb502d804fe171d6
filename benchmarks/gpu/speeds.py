"""The parts that measure speed: the update compared with a copy, and whole jobs compared with baselines."""

from __future__ import annotations

import statistics
import time
import traceback
from collections.abc import Callable
from typing import Any

from .jobs import backend_job, diffusers_from, diffusers_job, one_graph
from .networks import on_gpu, relative, start, tiny, unet_of
from .run import Failure, Run
from .timing import microseconds, seconds


def update(run: Run) -> dict[str, Any]:
    """Measure the fused update and a copy that moves as many bytes, neither with operands in the L2 cache."""
    import torch

    from fastdiff import NoiseSchedule, solvers
    from fastdiff.kernels.update import update as fused

    ops = run.finished.get("kernels", {}).get("result", {}).get("ops", {})
    if ops.get("update", {"failed": True}).get("failed"):
        raise Failure("the kernel's check is red or was not run, so it gets no speed", {})
    rows = []
    for n, side in [(2, 4)] if run.dry else [(256, 32), (4096, 32), (1, 256), (64, 256)]:
        for table in (solvers.ddim(NoiseSchedule(), 1000), solvers.ddpm(NoiseSchedule(), 1000)):
            s = start(n, (3, side, side), table, run.device, torch.float32)
            out = torch.randn(n, 3, side, side, device=run.device).to(torch.bfloat16)
            arrived = torch.zeros(n, dtype=torch.int32, device=run.device)
            tensors = (s.x, out, s.bank.values, s.table, s.row, s.bank.lengths, s.seed, s.index, arrived)
            moves = s.x.numel() * (4 + 4 + 2)
            source = torch.zeros(moves // 2, dtype=torch.uint8, device=run.device)
            target = torch.empty_like(source)
            us = microseconds(run, fused(*tensors))
            copy = microseconds(run, lambda: target.copy_(source))  # noqa: B023 - called before the next iteration
            rows.append(
                {"images": n, "side": side, "solver": table.solver, "us": round(us, 2), "copy_us": round(copy, 2),
                 "times_a_copy": round(us / copy, 2)}
            )  # fmt: skip
    return {"rows": rows}


def whole_job(network: str, n: int) -> Callable[[Run], dict[str, Any]]:
    """Return a part that measures img-steps/s of n images in 50 DDIM steps in bfloat16; contenders take turns."""

    def measure(run: Run) -> dict[str, Any]:
        import torch

        from fastdiff import NoiseSchedule, solvers
        from fastdiff.bench.networks import PUBLISHED

        torch.backends.cudnn.benchmark = True  # for all contenders
        steps, images, rounds = (3, min(n, 2), 1) if run.dry else (50, n, 7)
        config = tiny() if run.dry else PUBLISHED[f"ddpm-{network}"]
        table = solvers.ddim(NoiseSchedule(), steps)
        unet = unet_of(config, torch.bfloat16, run.device)
        exact = backend_job(run, "eager", unet_of(config, torch.float32, run.device), table, images)()
        makes: dict[str, Callable[[], Callable[[], Any]]] = {
            name: lambda name=name: backend_job(run, name, unet, table, images)  # type: ignore[misc]  # mypy infers no default's type
            for name in on_gpu(run)
        }
        makes["baseline: one graph, max-autotune"] = lambda: one_graph(run, unet, table, images)
        makes["baseline: diffusers, compiled U-Net"] = lambda: diffusers_job(run, unet, steps, images)
        makes["compiled, max-autotune"] = lambda: backend_job(
            run, "compiled", unet, table, images, "max-autotune-no-cudagraphs"
        )
        rows: dict[str, dict[str, Any]] = {}
        jobs: dict[str, Callable[[], Any]] = {}
        failed, unfinished = [], []
        with diffusers_from(run.diffusers):
            for name, make in makes.items():
                if run.late:
                    unfinished.append(name)
                    continue
                started = time.perf_counter()
                try:
                    if not run.dry:
                        torch.cuda.reset_peak_memory_stats()
                    job = make()
                    result = job()
                    row = rows[name] = {"first_call_s": round(time.perf_counter() - started, 1)}
                    if not run.dry:
                        row["peak_MiB"] = torch.cuda.max_memory_allocated() >> 20
                except ImportError as e:
                    rows[name] = {"absent": str(e)}
                    continue
                except Exception:
                    rows[name] = {"error": traceback.format_exc()}
                    failed.append(name)
                    continue
                if "diffusers" in name:  # its images differ, as it draws its own noise
                    red = not bool(torch.isfinite(result).all())
                else:
                    row["error"] = relative(result, exact)
                    red = not row["error"] <= 2 * rows["eager"].get("error", 0.0) + 1e-3
                if red:
                    failed.append(name)
                else:
                    jobs[name] = job
            taken = seconds(run, jobs, rounds)
        for name, times in taken.items():
            rows[name]["img_steps_per_s"] = round(images * steps / statistics.median(times), 2)
            rows[name]["spread"] = round((max(times) - min(times)) / statistics.median(times), 3)
        result = {"images": images, "steps": steps, "contenders": rows, "unfinished": unfinished, "stand_in": run.dry}
        if failed:
            raise Failure(f"no speed of {', '.join(failed)}: an error, or images that are off", result)
        return result

    return measure
