"""``fastdiff info`` describes a model, its step tables and its cost."""

from __future__ import annotations

import dataclasses
import json
from typing import Annotated, Any

import typer

from fastdiff.cli.options import SOLVER_HELP, JsonOption, ModelArgument
from fastdiff.errors import InvalidArgument


def info(
    model: ModelArgument = "fashion-mnist",
    solver: Annotated[str | None, typer.Option(help=f"Also print this solver's step table: {SOLVER_HELP}")] = None,
    steps: Annotated[int | None, typer.Option(help="Rows of that table.")] = None,
    program: Annotated[
        bool,
        typer.Option(
            "--program",
            help="Also print the network's fused operations, their memory, and the native engine's algorithms.",
        ),
    ] = False,
    n: Annotated[
        int | None,
        typer.Option(
            "--n", "-n", help="Also what this many images would cost: FLOPs, bytes, memory, seconds on this machine."
        ),
    ] = None,
    guidance: Annotated[float, typer.Option(help="Of the images of --n, as in `fastdiff sample`.")] = 1.0,
    dtype: Annotated[str, typer.Option(help="Of the network for --n: float32, bfloat16 or bfloat16-fast.")] = "float32",
    backend: Annotated[str, typer.Option(help="For --n: native; of eager and compiled less is known.")] = "native",
    batch_size: Annotated[
        int | None, typer.Option(help="Rows that the operations are counted for (1), and images in flight for --n.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Describe a model: its network, schedule and cost, and a solver's step table.

    Examples:

    fastdiff info fashion-mnist

    fastdiff info fashion-mnist --solver ddim --steps 10

    fastdiff info fashion-mnist --program --batch-size 8

    fastdiff info fashion-mnist --n 50000 --steps 50 --dtype bfloat16
    """
    from fastdiff import Sampler
    from fastdiff.backends import BACKENDS
    from fastdiff.backends.native import choose_method, cost
    from fastdiff.core.lower import lower
    from fastdiff.core.plan import plan
    from fastdiff.core.program import Conv
    from fastdiff.sampler.choice import resolve
    from fastdiff.sampler.options import Options
    from fastdiff.sampler.request import check
    from fastdiff.sampler.tables import step_table
    from fastdiff.schedule import NoiseSchedule

    if steps is not None and solver is None and n is None:
        raise InvalidArgument(f"--steps {steps} needs --solver: it is the length of a solver's table; or --n")
    if batch_size is not None and batch_size < 1:
        raise InvalidArgument(f"--batch-size {batch_size}: at least 1 is needed")
    if backend not in BACKENDS:
        raise InvalidArgument(f"--backend {backend}: allowed: {', '.join(BACKENDS)}")
    sampler = Sampler.from_pretrained(model, device="cpu")
    height, width = sampler.info.size or (sampler.info.stride,) * 2
    rows = batch_size or 1
    layout = plan(lower(sampler.unet, (height, width)), rows)  # type: ignore[arg-type]  # from_pretrained: a UNet
    methods = {op.dst: choose_method(op, layout.program, rows) for op in layout.program.ops if isinstance(op, Conv)}
    operations = layout.to_dict(methods)
    table = None
    if solver is not None:
        chosen, _ = resolve(Options(solver=solver, steps=steps), sampler.schedule, None)
        table = step_table(chosen, sampler.schedule, sampler.prediction, sampler.scheduler_config)
    config: Any = sampler.unet.config
    schedule = sampler.schedule
    levels = schedule.to_scheduler_config() if isinstance(schedule, NoiseSchedule) else dataclasses.asdict(schedule)
    result: dict[str, Any] = {
        "model": model,
        "parameters": sum(p.numel() for p in sampler.unet.parameters()),
        "image": [sampler.info.channels, height, width],
        "classes": sampler.info.classes,
        "null_label": sampler.info.null_label,
        "gflop_per_image_step": round(operations["flops"] / rows / 1e9, 4),
        "prediction": sampler.prediction,
        "schedule": {k: v for k, v in levels.items() if v is not None},
        "unet": config.to_dict(),
    }
    job = None
    if n is not None:
        options = Options(
            solver=solver or "ddim", steps=steps, guidance=guidance, batch_size=batch_size,
            labels=None if sampler.info.classes is None else 0, size=(height, width),
        )  # fmt: skip
        options, _ = resolve(options, sampler.schedule, None)
        request = check(
            n, options, sampler.info, sampler.schedule, sampler.prediction, sampler.scheduler_config, backend
        )
        job = cost.estimate(
            sampler.unet, (height, width), n, request.nfe, request.batch_size, dtype,
            guided=request.nfe > len(request.table), backend=backend,
        )  # fmt: skip
    if as_json:
        result |= {} if table is None else {"table": json.loads(table.to_json())}
        result |= {} if job is None else {"cost": job.to_dict()}
        print(json.dumps(result | ({"program": operations} if program else {})))
        return
    for key, value in result.items():
        print(f"{key:22}{json.dumps(value) if isinstance(value, (dict, list)) else value}")
    if table is not None:
        print(f"\n{table}")
    if job is not None:
        print(f"\n{job}")
    if program:
        print(f"\n{layout.text(methods)}")
