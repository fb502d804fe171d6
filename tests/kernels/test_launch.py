"""Tests of launches as values and of the choice of their configurations; they need neither triton nor a GPU."""

from __future__ import annotations

import dataclasses
import json
import types

import pytest
import torch
from torch import Tensor

from fastdiff.errors import BackendError
from fastdiff.kernels import launch as module
from fastdiff.kernels.launch import (
    CONFIGS,
    NO_GPU,
    Config,
    Device,
    Launch,
    choose,
    config_file,
    fill,
    operation,
    power_of_two,
    save_tuned,
    tuned,
)


@dataclasses.dataclass(frozen=True)
class Tile(Config):
    size: int


CANDIDATES = (Tile(8, 1, size=64), Tile(4, 1, size=32), Tile(1, 1, size=8))
GPU = Device("NVIDIA H100 80GB HBM3", 132)


class Kernel:
    """Stands in for a kernel of `triton.jit`: it doubles x, or fails as the compiler does."""

    def __init__(self, error: Exception | None = None, load_error: Exception | None = None):
        self.error, self.load_error, self.runs, self.compiled, self.loads = error, load_error, [], [], 0
        self.options = []

    def __getitem__(self, grid):
        def run(x, y, SIZE, num_warps, num_stages, **options):  # noqa: N803
            if self.error is not None:
                raise self.error
            self.runs.append((grid, SIZE, num_warps, num_stages))
            self.options.append(options)
            y.copy_(2 * x)

        return run

    def warmup(self, x, y, SIZE, grid, num_warps, num_stages, **options):  # noqa: N803
        if self.error is not None:
            raise self.error
        self.options.append(options)
        self.compiled.append((grid, SIZE, num_warps, num_stages))
        return types.SimpleNamespace(_init_handles=self.load)

    def load(self):
        if self.load_error is not None:
            raise self.load_error
        self.loads += 1


@operation
def double(x: Tensor, y: Tensor, kernel: Kernel, *, config: Tile | None = None) -> Launch:
    config = config or choose("double", str(len(x)), NO_GPU, CANDIDATES, lambda: CANDIDATES[1])
    return Launch(
        op="double",
        key=str(len(x)),
        kernel=kernel,
        grid=(-(-len(x) // config.size),),
        arguments={"x": x, "y": y, "SIZE": config.size},
        config=config,
        candidates=CANDIDATES,
        reference=lambda: y.copy_(2 * x),
    )


def test_a_launch_runs_compiles_and_is_remade():
    x, y, kernel = torch.arange(40.0), torch.empty(40), Kernel()
    launch = double(x, y, kernel)
    launch.compile()
    assert not kernel.runs
    assert kernel.compiled == [((2,), 32, 4, 1)]
    assert kernel.loads == 1
    launch()
    assert kernel.runs == [((2,), 32, 4, 1)]
    assert torch.equal(y, 2 * x)
    other = launch.remake(CANDIDATES[2])
    other()
    assert kernel.runs[1:] == [((5,), 8, 1, 1)]
    assert other.remake(CANDIDATES[1]).grid == launch.grid


@pytest.mark.parametrize(
    ("cuda", "capability", "waits", "overlaps"),
    [
        ("13.0", (9, 0), True, True),
        ("13.0", (12, 0), True, True),
        ("13.0", (9, 0), False, False),
        ("13.0", (8, 9), True, False),
        (None, (9, 4), True, False),
    ],
    ids=["Hopper", "Blackwell", "a kernel that does not wait", "Ada", "AMD"],
)
def test_kernels_overlap_where_they_wait_and_the_gpu_can(monkeypatch, cuda, capability, waits, overlaps):
    """The same binary is compiled and launched, so both have the option or neither."""
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    kernel = Kernel()
    if waits:
        kernel.overlaps = True
    launch = double(torch.arange(4.0), torch.empty(4), kernel)
    launch.compile()
    launch()
    assert kernel.options == 2 * [{"launch_pdl": True} if overlaps else {}]
    monkeypatch.setattr(module, "OVERLAP", False)
    launch()
    assert kernel.options[2] == {}


@pytest.mark.parametrize("error", [RuntimeError("ptxas"), PermissionError(13, "read-only cache"), ValueError("json")])
def test_what_cannot_be_compiled_says_so_and_has_a_reference(error):
    """After the error, a backend continues with the reference."""
    x, y = torch.arange(4.0), torch.full((4,), torch.nan)
    launch = double(x, y, Kernel(error))
    with pytest.raises(BackendError, match=r"kernel double \(4, Tile\(.*cannot be compiled: .*") as caught:
        launch.compile()
    assert caught.value.__cause__ is error
    launch.reference()
    assert torch.equal(y, 2 * x)


class OutOfResources(Exception):
    """As Triton's, which has no common base with its other errors."""


def test_what_cannot_be_loaded_says_so_before_it_is_run():
    """Triton loads a kernel at its first run, which for a graph would be in the midst of a capture."""
    error = OutOfResources("out of resource: shared memory, Required: 262144, Hardware limit: 232448")
    kernel = Kernel(load_error=error)
    with pytest.raises(BackendError, match="cannot be compiled: out of resource: shared memory") as caught:
        double(torch.arange(4.0), torch.empty(4), kernel).compile()
    assert caught.value.__cause__ is error
    assert not kernel.runs


@pytest.mark.parametrize("grid", [(1 << 31,), (1, 65536), (1, 1, 65536)])
def test_grids_beyond_the_limits_of_cuda_are_refused(grid):
    """A launch would fail with an error of the driver that names nothing."""
    launch = double(torch.arange(4.0), torch.empty(4), Kernel())
    assert dataclasses.replace(launch, grid=tuple(n - 1 for n in grid) + (1,) * (len(grid) == 1)).op == "double"
    with pytest.raises(BackendError, match=r"kernel double \(4\): a grid of .* smaller batch_size"):
        dataclasses.replace(launch, grid=grid)


# Configurations -------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "config_file", lambda name: config_file(name, tmp_path))
    module._read.cache_clear()
    yield tmp_path
    module._read.cache_clear()


def test_tuned_configurations_come_before_heuristics(folder):
    assert choose("double", "40", GPU, CANDIDATES, lambda: CANDIDATES[1]) == CANDIDATES[1]
    path = folder / "nvidia-h100-80gb-hbm3.json"
    save_tuned(path, GPU.name, {"double 40": CANDIDATES[2]})
    assert choose("double", "40", GPU, CANDIDATES, lambda: CANDIDATES[1]) == CANDIDATES[2]
    assert choose("double", "41", GPU, CANDIDATES, lambda: CANDIDATES[1]) == CANDIDATES[1]
    assert choose("double", "40", Device("other", 1), CANDIDATES, lambda: CANDIDATES[1]) == CANDIDATES[1]
    with pytest.raises(BackendError, match=r"double 40: .* is no candidate any more; tune again"):
        choose("double", "40", GPU, CANDIDATES[:2], lambda: CANDIDATES[1])


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"configs": {"a": 1}}', '{"configs": {"a": {"b": "c"}}}'])
def test_a_file_of_something_else_is_named(folder, text):
    path = config_file(GPU.name, folder)
    path.write_text(text)
    with pytest.raises(BackendError, match=f"{path} is no file of launch configurations"):
        choose("double", "40", GPU, CANDIDATES, lambda: CANDIDATES[1])


def test_shipped_files_can_be_read():
    for path in CONFIGS.glob("*.json"):
        assert tuned(path)
        assert config_file(json.loads(path.read_text())["gpu"]) == path


def test_tiles_shrink_until_they_fill_the_processors():
    def programs(config: Tile) -> int:
        return 6400 // config.size

    assert fill(CANDIDATES, programs, Device("", 50)) == CANDIDATES[0]
    assert fill(CANDIDATES, programs, Device("", 51)) == CANDIDATES[1]
    assert fill(CANDIDATES, programs, Device("", 10000)) == CANDIDATES[2]
    assert fill(CANDIDATES, lambda config: 1, Device("", 10000)) == CANDIDATES[0]


def test_powers_of_two():
    assert [power_of_two(n) for n in (1, 2, 3, 4, 5, 31, 32, 33)] == [1, 2, 4, 4, 8, 32, 32, 64]
