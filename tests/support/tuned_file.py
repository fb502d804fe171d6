"""A made-up GPU with a file of tuned configurations, for tests of how convolutions choose among them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import torch

from fastdiff.core.program import Program
from fastdiff.kernels import conv, launch
from fastdiff.kernels.launch import Config, Device, config_file, save_tuned
from fastdiff.kernels.library import LIBRARY
from tests.support.cases_conv import harvest

GPU = Device("Test GPU 1", 132)


@contextlib.contextmanager
def tuning(folder: Path) -> Iterator[Callable[[dict[str, Config]], None]]:
    """Pretend that all operands of convolutions are on `GPU`, and yield a function that writes its file."""
    path = config_file(GPU.name, folder)
    here = mock.patch.object(conv, "device_of", return_value=GPU)
    with here, mock.patch.object(launch, "config_file", return_value=path):
        launch._read.cache_clear()
        yield lambda configs: save_tuned(path, GPU.name, configs)
    launch._read.cache_clear()


def library_everywhere(program: Program, rows: int, dtype: torch.dtype) -> dict[str, Config]:
    """Choose the library for every convolution of a network in ``dtype`` that can use it; embeddings are float32."""
    dtypes = {dtype, torch.float32}
    problems = [shape.problem(shape.shipped(d)) for shape in harvest(program, rows) for d in dtypes]
    return {f"conv.layer {problem.key}": LIBRARY for problem in problems if LIBRARY in problem.layer_candidates}
