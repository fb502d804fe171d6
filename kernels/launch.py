"""Launches of kernels as values, and the choice of their configurations.

This module does not import triton: it treats kernels as opaque objects.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff.errors import BackendError
from fastdiff.files import parse_json, write_text

CONFIGS = Path(__file__).parent / "configs"
OVERLAP = True  # False: no kernel starts before the one in front of it has ended, for comparison
LIMITS = ((1 << 31) - 1, 65535, 65535)  # of programs along each axis of a grid (CUDA programming guide)


@dataclasses.dataclass(frozen=True)
class Config:
    """Configuration of a launch; each operation has a subclass, which adds its tile sizes."""

    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Options of the compiler."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}


C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True, eq=False)
class Launch:
    """One run of a kernel on given tensors."""

    op: str  # name of the operation, "module.function"
    key: str  # shapes and dtypes on which the configuration may depend
    kernel: Any  # the function decorated with ``triton.jit``
    grid: tuple[int, ...]  # number of programs along each axis
    arguments: dict[str, Any]  # arguments of the kernel by name, including constexprs
    config: Config
    candidates: tuple[Config, ...]  # all configurations that may be chosen for the operation
    reference: Callable[[], None]  # computes the same result into the same tensors in torch
    # Builds the launch with another configuration and, by a function that replaces its operands, on other tensors; for
    # tuning and tests.
    remake: Callable[..., Launch] | None = None

    def __post_init__(self) -> None:
        if any(n > most for n, most in zip(self.grid, LIMITS, strict=False)):
            raise BackendError(
                f"kernel {self.op} ({self.key}): a grid of {self.grid} programs is beyond CUDA's {LIMITS}; "
                "use a smaller batch_size, or smaller images"
            )

    @property
    def operands(self) -> dict[str, Any]:
        """Arguments with which the kernel is called."""
        return self.arguments

    @property
    def options(self) -> dict[str, Any]:
        """Options of the compiler and the launch: kernels that wait for those before them start before these end."""
        early = getattr(self.kernel, "overlaps", False) and can_overlap()
        return self.config.options | ({"launch_pdl": True} if early else {})

    def __call__(self) -> None:
        """Run the kernel on the current stream."""
        self.kernel[self.grid](**self.operands, **self.options)

    def compile(self) -> None:
        """Compile and load the kernel without running it.

        Raises `BackendError` if the compiler fails, its cache cannot be used, or the GPU lacks the memory or registers
        that the kernel needs. ``reference`` still works then.
        """
        try:
            compiled = self.kernel.warmup(**self.operands, grid=self.grid, **self.options)
            compiled._init_handles()  # loads it; a launch would do so at the first run, in the midst of a capture
        except Exception as e:  # the compiler, the driver and the file system raise many types
            raise BackendError(f"kernel {self.op} ({self.key}, {self.config}) cannot be compiled: {e}") from e


def operation(function: Callable[..., Launch]) -> Callable[..., Launch]:
    """Decorate a function that returns a `Launch` and takes ``config``, so that its launches can be remade.

    Without a ``config`` the function chooses one for the shapes of its operands. If that depends on the number of rows
    (or images), the function also takes ``chosen_for``: a number of rows to choose for, instead of that of the batch.

    With the same configuration, a row has the same bits in every batch: the order of its sums depends neither on its
    position nor on other rows, and the compiler does not specialise kernels on numbers of rows.
    """

    @functools.wraps(function)
    def build(*args: Any, config: Config | None = None, **kwargs: Any) -> Launch:
        launch = function(*args, config=config, **kwargs)

        def remake(other: Any, replace: Callable[[Any], Any] = lambda operand: operand) -> Launch:
            return build(*map(replace, args), config=other, **{name: replace(value) for name, value in kwargs.items()})

        return dataclasses.replace(launch, remake=remake)

    return build


# Configurations -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Device:
    """Properties of a GPU on which heuristics depend."""

    name: str
    processors: int  # streaming multiprocessors
    capability: int = 90  # compute capability: 90 for Hopper


NO_GPU = Device("", 132)  # for tensors on the CPU or the meta device: interpretation and compilation ahead of time


def device_of(tensor: Tensor) -> Device:
    """Return the properties of the GPU that holds the tensor, or `NO_GPU`."""
    return _cuda_device(tensor.device) if tensor.is_cuda else NO_GPU


@functools.cache
def _cuda_device(device: torch.device) -> Device:
    properties = torch.cuda.get_device_properties(device)
    return Device(properties.name, properties.multi_processor_count, 10 * properties.major + properties.minor)


def can_overlap() -> bool:
    """Return whether the current GPU can start a kernel while the one before ends (see `fastdiff.kernels.overlap`)."""
    nvidia = torch.version.cuda is not None and torch.cuda.is_available()
    return OVERLAP and nvidia and torch.cuda.get_device_capability() >= (9, 0)


def config_file(name: str, folder: Path | None = None) -> Path:
    """Return the path of the tuned configurations of a GPU: "NVIDIA H100 PCIe" -> nvidia-h100-pcie.json."""
    return (folder or CONFIGS) / (re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") + ".json")


@functools.cache
def _read(path: Path) -> tuple[dict[str, dict[str, int]], dict[str, dict[str, float]]]:
    """Read the configurations and the speeds of a file; one that does not exist has none."""
    if not path.is_file():
        return {}, {}
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
        configs = {key: {name: int(v) for name, v in fields.items()} for key, fields in data["configs"].items()}
        speeds = {key: {name: float(v) for name, v in of.items()} for key, of in data.get("speeds", {}).items()}
        if not all(re.fullmatch(r"[a-z0-9]+ [1-9]\d*x[1-9]\d*x[1-9]\d*", key) for key in speeds):
            raise ValueError(f"speeds of {', '.join(speeds)}")
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as e:
        raise BackendError(f"{path} is no file of launch configurations ({type(e).__name__}: {e}); delete it") from e
    return configs, speeds


def tuned(path: Path) -> dict[str, dict[str, int]]:
    """Return the configurations of a file by "op key"; a file that does not exist has none."""
    return _read(path)[0]


def speeds(path: Path) -> dict[str, dict[str, float]]:
    """Return the img-steps/s of backends, by dtype and size of a batch: {"bfloat16 32x32x8": {"eager": 1e4, ...}}."""
    return _read(path)[1]


def save_tuned(
    path: Path, gpu: str, configs: Mapping[str, Config | Mapping[str, int]],
    measured: Mapping[str, Mapping[str, float]] | None = None,
) -> None:  # fmt: skip
    """Write configurations, or their fields, by "op key" to a file that `choose` reads, and speeds that `speeds` reads.

    measured None: those of the file remain.
    """
    fields = {
        key: dataclasses.asdict(config) if isinstance(config, Config) else dict(config)
        for key, config in sorted(configs.items())
    }
    data = {"gpu": gpu, "configs": fields, "speeds": dict(speeds(path) if measured is None else measured)}
    write_text(path, json.dumps(data, indent=1) + "\n")
    _read.cache_clear()


def choose(op: str, key: str, device: Device, candidates: tuple[C, ...], heuristic: Callable[[], C]) -> C:
    """Return the tuned configuration of an operation for a shape, or that of the heuristic if there is none."""
    path = config_file(device.name)
    fields = tuned(path).get(f"{op} {key}") if device.name else None
    if fields is None:
        return heuristic()
    for candidate in candidates:
        if dataclasses.asdict(candidate) == fields:
            return candidate
    raise BackendError(f"{path}: {op} {key}: {fields} is no candidate any more; tune again")


def choose_filling(
    op: str, key: str, tensor: Tensor, candidates: tuple[C, ...], programs: Callable[[C], int],
    fits: Callable[[C], bool] = lambda config: True,
) -> C:  # fmt: skip
    """Choose as `choose` does for the GPU that holds ``tensor``, with `fill` as the heuristic, among those that fit.

    A tile that is twice as wide as its map does not fit, as half of its threads would be idle. The last candidate does.
    """
    device = device_of(tensor)
    fitting = tuple(filter(fits, candidates)) or candidates[-1:]
    return choose(op, key, device, candidates, lambda: fill(fitting, programs, device))


def fill(candidates: tuple[C, ...], programs: Callable[[C], int], device: Device) -> C:
    """Return the first candidate with at least two programs per processor, or else the one with the most programs.

    Candidates are ordered by the size of their tiles, the largest first.
    """
    for candidate in candidates:
        if programs(candidate) >= 2 * device.processors:
            return candidate
    return max(candidates, key=programs)


# Shapes ---------------------------------------------------------------------------------------------------------------


def cdiv(a: int, b: int) -> int:
    """Return a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """Return the smallest power of two that is at least n."""
    return 1 << max(0, math.ceil(n) - 1).bit_length()


def name_of(dtype: torch.dtype) -> str:
    """Return the short name of a dtype, as in the keys of configurations."""
    return {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}[dtype]


def row_vectors(table: Tensor, entry: Tensor | None, offset: int = 0) -> Tensor:
    """Return each row's vector of ``table`` [entries, width], from ``offset`` on; entry None: row i's is entry i."""
    return (table if entry is None else table[entry])[:, offset:]


def wide(x: Tensor) -> Tensor:
    """Convert to float32, in which references compute; float64 remains as it is."""
    return x if x.dtype == torch.float64 else x.float()
