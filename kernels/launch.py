"""A kernel's launch as a value: what runs, on which tensors, how it is configured, and what computes the same.

Needs no triton: a kernel is whatever ``triton.jit`` made.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.errors import BackendError

CONFIGS = Path(__file__).parent / "configs"


@dataclasses.dataclass(frozen=True)
class Config:
    """How a kernel is launched; operations add their block sizes."""

    num_warps: int
    num_stages: int


C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One run of ``kernel`` over ``grid``.

    op: the operation, "module.function". key: shapes and dtypes that a configuration may depend on.
    arguments: the kernel's, by name, constexprs included. reference: the same result in the same tensors, in torch.
    candidates: every configuration that may be chosen for the operation. remake: the same launch in another one; for
    tuning and tests.
    """

    op: str
    key: str
    kernel: Any
    grid: tuple[int, ...]
    arguments: dict[str, Any]
    config: Config
    candidates: tuple[Config, ...]
    reference: Callable[[], None]
    remake: Callable[[Any], Launch] | None = None

    def __call__(self) -> None:
        """Run it on the current stream."""
        self.kernel[self.grid](**self.arguments, num_warps=self.config.num_warps, num_stages=self.config.num_stages)

    def compile(self) -> None:
        """Compile and load the kernel without running it.

        Raises `BackendError` where the compiler fails or its cache cannot be used; ``reference`` still works then.
        """
        try:
            self.kernel.warmup(
                **self.arguments, grid=self.grid, num_warps=self.config.num_warps, num_stages=self.config.num_stages
            )
        except Exception as e:  # whatever compiler, driver or file system raise
            raise BackendError(f"kernel {self.op} ({self.key}, {self.config}) cannot be compiled: {e}") from e


def operation(function: Callable[..., Launch]) -> Callable[..., Launch]:
    """Marks a function that returns a `Launch` and takes ``config``: its launches can be remade with another one.

    Where none is given, one is chosen for the operands' shapes. Where a choice depends on how many rows (or images)
    there are, the function takes ``chosen_for``, too: so many rows are chosen for then, whatever the batch. A row's
    results have the same bits in every batch of one configuration: its sums are taken in an order that neither its
    place nor the others change, and numbers of rows are arguments that the compiler does not specialise a binary on.
    """

    @functools.wraps(function)
    def build(*args: Any, config: Config | None = None, **kwargs: Any) -> Launch:
        launch = function(*args, config=config, **kwargs)
        return dataclasses.replace(launch, remake=lambda other: build(*args, config=other, **kwargs))

    return build


# Configurations -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """What heuristics know of a GPU."""

    name: str
    processors: int  # streaming multiprocessors


NO_GPU = Device("", 132)  # tensors on the CPU or the meta device: the interpreter, compilation ahead of time


def device_of(tensor: Tensor) -> Device:
    return _cuda_device(tensor.device) if tensor.is_cuda else NO_GPU


@functools.cache
def _cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, properties.multi_processor_count)


def config_file(name: str, folder: Path = CONFIGS) -> Path:
    """Where the tuned configurations of the GPU ``name`` are: "NVIDIA H100 PCIe" -> nvidia-h100-pcie.json."""
    return folder / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@functools.cache
def tuned(path: Path) -> dict[str, dict[str, int]]:
    """The configurations of a file, by "op key"; none where there is no such file.

    Raises `BackendError` for a file that is not one of `save_tuned`.
    """
    if not path.is_file():
        return {}
    try:
        configs = json.loads(path.read_text(encoding="utf-8"))["configs"]
        return {key: {name: int(value) for name, value in fields.items()} for key, fields in configs.items()}
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise BackendError(f"{path} is no file of launch configurations ({type(e).__name__}: {e}); delete it") from e


def save_tuned(path: Path, gpu: str, configs: dict[str, Config]) -> None:
    """Write configurations by "op key", as `choose` reads them."""
    path.parent.mkdir(exist_ok=True)
    fields = {key: dataclasses.asdict(config) for key, config in sorted(configs.items())}
    path.write_text(json.dumps({"gpu": gpu, "configs": fields}, indent=1) + "\n", encoding="utf-8")
    tuned.cache_clear()


def choose(op: str, key: str, device: Device, candidates: tuple[C, ...], heuristic: Callable[[], C]) -> C:
    """The tuned configuration of an operation at a shape, else the heuristic's.

    Raises `BackendError` where the file names one that is no candidate.
    """
    path = config_file(device.name)
    fields = tuned(path).get(f"{op} {key}") if device.name else None
    if fields is None:
        return heuristic()
    for candidate in candidates:
        if dataclasses.asdict(candidate) == fields:
            return candidate
    raise BackendError(f"{path}: {op} {key}: {fields} is no candidate any more; tune again")


def fill(candidates: tuple[C, ...], programs: Callable[[C], int], device: Device) -> C:
    """The first candidate that gives every processor two programs, else the one with the most; largest tiles first."""
    for candidate in candidates:
        if programs(candidate) >= 2 * device.processors:
            return candidate
    return max(candidates, key=programs)


# Shapes ---------------------------------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least that is not below n."""
    return 1 << max(0, math.ceil(n) - 1).bit_length()


def name_of(dtype: torch.dtype) -> str:
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def row_vectors(table: Tensor, entry: Tensor | None, offset: int = 0) -> Tensor:
    """[rows, width - offset]: each row's vector of ``table`` [entries, width]; entry None: row i's is entry i."""
    return (table if entry is None else table[entry])[:, offset:]


def wide(x: Tensor) -> Tensor:
    """At least float32: what references compute in."""
    return x if x.dtype == torch.float64 else x.float()
