"""Networks that are checked and measured, their initial images, and their runners."""

from __future__ import annotations

from typing import Any

from .run import Run


def unet_of(config: Any, dtype: Any, device: Any) -> Any:
    """Build a network with random weights in channels_last."""
    import torch

    from fastdiff.bench.networks import random_unet

    return random_unet(config).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def tiny(**changes: Any) -> Any:
    """Return the configuration of a tiny network."""
    from fastdiff import UNetConfig

    options: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "attention_head_dim": 8,
        "norm_num_groups": 4,
    }  # fmt: skip
    return UNetConfig(**options | changes)


CLASSES = {"num_class_embeds": 11, "null_label": 10}


def no_tf32() -> None:
    """Switch TensorFloat-32 off, whose error is much larger than that of float32."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def runner_of(run: Run, backend: str, unet: Any, spec: Any, mode: str | None = None) -> Any:
    """Build the runner of a backend. In a dry run `compiled` is a graph of eager steps on the fake CUDA.

    `triton` has no runner in a dry run; tests/backends/test_triton.py runs its launches.
    """
    from fastdiff import backends
    from fastdiff.backends import compiled
    from fastdiff.backends.eager import EagerRunner
    from fastdiff.backends.graph import GraphRunner

    if backend == "compiled" and run.dry:
        return GraphRunner(EagerRunner(unet, spec), unet, spec, cuda=run.cuda)
    return compiled.prepare(unet, spec, mode) if backend == "compiled" else backends.prepare(backend, unet, spec)


def on_gpu(run: Run) -> list[str]:
    """List the backends that run on a GPU and, in a dry run, on a CPU."""
    from fastdiff.backends import BACKENDS

    return [name for name in BACKENDS if name != "native" and not (name == "triton" and run.dry)]


def start(n: int, shape: tuple[int, ...], table: Any, device: Any, dtype: Any, first: int = 0, **options: Any) -> Any:
    """Return the state of images ``first`` to first + n - 1 of seed 0 at row 0."""
    import torch

    from fastdiff.core import noise
    from fastdiff.core.state import State, TableBank

    i = torch.arange(first, first + n, device=device)
    x = noise.normal(torch.zeros_like(i), i, torch.zeros_like(i), noise.INITIAL, shape).to(dtype)
    return State.create(x, TableBank([table], device, dtype), index=i.tolist(), **options)


def relative(a: Any, b: Any) -> float:
    """Return |a - b| / |b| in float64."""
    return float((a.double() - b.double()).norm() / b.double().norm())
