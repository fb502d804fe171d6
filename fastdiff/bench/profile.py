"""Profile of the native engine: its time by kind of operation."""

from __future__ import annotations

from typing import Any

import torch

from fastdiff.backends import Spec, native
from fastdiff.bench import networks
from fastdiff.bench.inputs import Workload
from fastdiff.core.program import Conv
from fastdiff.core.state import State, TableBank


@torch.no_grad()
def native_profile(model: str, batch: int, rounds: int = 7) -> dict[str, float]:
    """Measure the milliseconds of the native engine in float32 by kind of operation and height of its result.

    They are medians over rounds, the largest first. If the engine runs the batch in parts, they are those of one part.
    """
    loaded = networks.load(model)
    workload = Workload.of(loaded, batch)
    spec = Spec(batch, tuple(workload.x.shape[1:]), torch.float32, workload.x.device)  # type: ignore[arg-type]  # three numbers
    runner = native.prepare(loaded.unet, spec)
    state = State.create(workload.x, TableBank([workload.table], workload.x.device), label=workload.label)
    state.texts = workload.texts
    runner.forward(state)
    (compiled,) = runner.programs.values()
    engine, ops = compiled.engine, compiled.program.ops
    times = (
        torch.tensor([engine.profile(0, len(engine)) for _ in range(rounds)], dtype=torch.float32, device="cpu")
        .median(dim=0)
        .values
    )
    total: dict[str, float] = {}
    for op, nanoseconds in zip(ops, times.tolist(), strict=True):
        kind = type(op).__name__.lower()
        if isinstance(op, Conv):
            kind += f" {op.kernel}x{op.kernel}/{op.stride} {compiled.methods[op.dst]}" + " up" * op.upsample
        key = f"{kind}, {compiled.program.buffers[op.dst].shape[0]} high"
        total[key] = total.get(key, 0.0) + nanoseconds / 1e6
    return {key: round(ms, 3) for key, ms in sorted(total.items(), key=lambda item: -item[1])}


def profile_text(batch: int, parts: dict[str, Any]) -> str:
    """Format a profile as lines, with each kind's share of the total."""
    whole = sum(parts.values())
    lines = [f"batch {batch}: {whole:.2f} ms"]
    return "\n".join([*lines, *(f"  {key:44}{ms:9.3f} ms  {ms / whole:5.1%}" for key, ms in parts.items())])
