"""Whole jobs, from noise to images on the host: backends, and baselines in plain PyTorch and diffusers."""

from __future__ import annotations

import contextlib
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from .networks import runner_of, start
from .run import Run


def one_graph(run: Run, unet: Any, table: Any, n: int) -> Callable[[], Any]:
    """Build the baseline in plain PyTorch: network and DDIM step, compiled with max-autotune, as one CUDA graph."""
    import torch

    from fastdiff.solvers import COLUMNS

    config = unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    first = start(n, shape, table, run.device, torch.float32).x
    k = torch.from_numpy(table.coefficients).to(run.device, torch.float32)
    t, kx, ko, ax, ao, a0 = (k[:, COLUMNS.index(name)] for name in ("t", "kx", "ko", "ax", "ao", "a0"))
    x, i = first.clone(), torch.zeros(1, dtype=torch.int64, device=run.device)
    dtype = next(unet.parameters()).dtype

    def step(x: Any, i: Any) -> tuple[Any, Any]:
        image = x.to(dtype).contiguous(memory_format=torch.channels_last)
        out = unet(image, t[i].expand(n)).float()
        x0 = (kx[i] * x + ko[i] * out).clamp(-1.0, 1.0)
        return ax[i] * x + ao[i] * out + a0[i] * x0, torch.clamp(i + 1, max=len(table))

    fast = run.compile(step, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    cuda = run.cuda
    side, graph = cuda.Stream(), cuda.CUDAGraph()
    side.wait_stream(cuda.current_stream())
    with torch.no_grad():
        with cuda.stream(side):
            for _ in range(3):
                fast(x, i)
        cuda.current_stream().wait_stream(side)
        with cuda.graph(graph, pool=cuda.graph_pool_handle(), stream=side, capture_error_mode="thread_local"):
            new, after = fast(x, i)
            x.copy_(new)
            i.copy_(after)

    def job() -> Any:
        x.copy_(first)
        i.zero_()
        with torch.no_grad():
            for _ in range(len(table)):
                graph.replay()
        return x.cpu()

    return job


def backend_job(run: Run, backend: str, unet: Any, table: Any, n: int, mode: str | None = None) -> Callable[[], Any]:
    """Build the job of a backend. mode: of torch.compile, for `compiled`."""
    import torch

    from fastdiff.backends import Spec

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    runner = runner_of(run, backend, unet, Spec(n, shape, next(unet.parameters()).dtype, run.device), mode)

    def job() -> Any:
        state = start(n, shape, table, run.device, torch.float32)
        for _ in range(len(table)):
            runner.step(state)
        return state.x.cpu()

    return job


@contextlib.contextmanager
def diffusers_from(folder: Path | None) -> Iterator[None]:
    """Make diffusers importable from wheels or unpacked packages in ``folder``, if it is not installed."""
    with tempfile.TemporaryDirectory() as place:
        if folder is not None:
            for wheel in folder.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(place)
            sys.path += [place, str(folder)]
        yield


def diffusers_job(run: Run, unet: Any, steps: int, n: int) -> Callable[[], Any]:
    """Build the job of diffusers' DDIM pipeline with the same weights, compiled and in channels_last."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with torch.device("meta"):
        twin = UNet2DModel(**unet.config.to_dict())
    twin.load_state_dict(unet.state_dict(), assign=True)
    pipeline = DDIMPipeline(unet=twin.eval(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = run.compile(pipeline.unet, mode="max-autotune", fullgraph=True)

    def job() -> Any:
        generator = torch.Generator(run.device).manual_seed(0)
        return pipeline(n, generator, num_inference_steps=steps, output_type="pt").images.cpu()

    return job
