"""``fastdiff info`` describes a model, its step tables and its cost."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from fastdiff.cli.options import SOLVER_HELP, JsonOption, ModelArgument
from fastdiff.errors import InvalidArgument, printable

if TYPE_CHECKING:
    from torch import nn

    from fastdiff.backends.native.cost import Cost
    from fastdiff.sampler import Sampler
    from fastdiff.solvers import StepTable


def info(
    model: ModelArgument = "fashion-mnist",
    solver: Annotated[str | None, typer.Option(help=f"Also print this solver's step table: {SOLVER_HELP}")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps of that solver.")] = None,
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
            "--n",
            "-n",
            help="Also print what so many images would cost: FLOPs, bytes, memory, seconds on this machine.",
        ),
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Guidance scale of the images of --n, as in `fastdiff sample`.")
    ] = 1.0,
    dtype: Annotated[
        str, typer.Option(help="dtype of the network for --n: float32, bfloat16 or bfloat16-fast.")
    ] = "float32",
    backend: Annotated[
        str, typer.Option(help="Backend for --n: native; for eager and compiled the cost lacks some numbers.")
    ] = "native",
    batch_size: Annotated[
        int | None,
        typer.Option(help="Batch that the operations of --program are for (1), and images in flight for --n."),
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
    from fastdiff.backends.native import choose_methods
    from fastdiff.core.lower import lower
    from fastdiff.core.plan import plan

    if steps is not None and solver is None and n is None:
        raise InvalidArgument(f"--steps {steps} needs --solver: it is the length of a solver's table; or --n")
    if batch_size is not None and batch_size < 1:
        raise InvalidArgument(f"--batch-size {batch_size}: at least 1 is needed")
    if backend not in BACKENDS:
        raise InvalidArgument(f"--backend {backend}: allowed: {', '.join(BACKENDS)}")
    sampler = Sampler.from_pretrained(model, device="cpu")
    size = sampler.info.size or (sampler.info.stride,) * 2
    rows = batch_size or 1
    layout = plan(lower(sampler.unet, size, _tokens(sampler)), rows)  # type: ignore[arg-type]  # UNet or UNetCondition
    methods = choose_methods(layout.program, rows)
    operations = layout.to_dict(methods)
    table = None if solver is None else _table(sampler, solver, steps)
    result = _describe(sampler, model, size, operations["flops"] / rows)
    job = None if n is None else _cost(sampler, n, solver, steps, size, guidance, batch_size, dtype, backend)
    if as_json:
        result |= {} if table is None else {"table": json.loads(table.to_json())}
        result |= {} if job is None else {"cost": job.to_dict()}
        print(json.dumps(result | ({"program": operations} if program else {})))
        return
    for key, value in result.items():
        if value is not None or key != "class_names":
            print(f"{key:22}{json.dumps(value) if isinstance(value, (dict, list)) else printable(value)}")
    for part in (table, job, layout.text(methods) if program else None):
        if part is not None:
            print(f"\n{part}")


def _describe(sampler: Sampler, model: str, size: tuple[int, int], flops: float) -> dict[str, Any]:
    """Describe the network and its schedule; ``flops`` are those of one evaluation for one image."""
    from fastdiff.schedule import NoiseSchedule

    schedule, config = sampler.schedule, cast(Any, sampler.unet.config)
    levels = schedule.to_scheduler_config() if isinstance(schedule, NoiseSchedule) else dataclasses.asdict(schedule)
    image, latents = [sampler.info.channels, *size], {}
    if sampler.autoencoder is not None:
        factor, parts = (
            sampler.autoencoder.factor,
            {"decoder": sampler.autoencoder, "text_encoder": _text_model(sampler)},
        )
        latents = {"latents": image} | {
            f"{name}_parameters": sum(p.numel() for p in part.parameters()) for name, part in parts.items()
        }
        image = [sampler.autoencoder.config.out_channels, *(factor * v for v in size)]
    return {
        "model": model,
        "parameters": sum(p.numel() for p in sampler.unet.parameters()),
        "image": image,
        **latents,
        "classes": sampler.info.classes,
        "class_names": sampler.info.class_names and list(sampler.info.class_names),
        "null_label": sampler.info.null_label,
        "gflop_per_image_step": round(flops / 1e9, 4),
        "prediction": sampler.prediction,
        "schedule": {k: v for k, v in levels.items() if v is not None},
        "unet": config.to_dict(),
    }


def _text_model(sampler: Sampler) -> nn.Module:
    """Return the module that encodes texts."""
    encoder: Any = sampler.text_encoder
    model: nn.Module = getattr(encoder, "model", encoder)
    return model


def _tokens(sampler: Sampler) -> int:
    """Return the number of tokens of each text, where the model reads texts."""
    return 0 if sampler.text_encoder is None else len(sampler.text_encoder.tokenize(""))


def _table(sampler: Sampler, solver: str, steps: int | None) -> StepTable:
    """Return a solver's step table for this model."""
    from fastdiff.sampler.choice import resolve
    from fastdiff.sampler.options import Options
    from fastdiff.sampler.tables import step_table

    chosen, _ = resolve(Options(solver=solver, steps=steps), sampler.schedule, None)
    return step_table(chosen, sampler.schedule, sampler.prediction, sampler.scheduler_config)


def _cost(
    sampler: Sampler, n: int, solver: str | None, steps: int | None, size: tuple[int, int], guidance: float,
    batch_size: int | None, dtype: str, backend: str,
) -> Cost:  # fmt: skip
    """Estimate what n images cost, on a backend that need not be the sampler's."""
    from fastdiff.backends.native import cost
    from fastdiff.sampler.choice import resolve
    from fastdiff.sampler.options import Options
    from fastdiff.sampler.request import check

    labels = None if sampler.info.classes is None else 0
    options = Options(
        solver=solver or "ddim", steps=steps, guidance=guidance, batch_size=batch_size, labels=labels, size=size
    )
    options, _ = resolve(options, sampler.schedule, None)
    r = check(n, options, sampler.info, sampler.schedule, sampler.prediction, sampler.scheduler_config, backend)
    guided = r.nfe > len(r.table)
    return cost.estimate(
        sampler.unet, size, n, r.nfe, r.batch_size, dtype, guided=guided, backend=backend, tokens=_tokens(sampler)
    )
