"""Tests of convolutions whose products a library computes: PyTorch on a CPU, and the calls of cuDNN on a GPU.

test_kernels.py interprets the epilogue kernel that follows (cases "by the library"), and tests/backends/test_triton.py
runs whole networks in which the library computes all products.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fastdiff.errors import BackendError
from fastdiff.kernels import conv, library
from fastdiff.kernels.conv import Problem
from fastdiff.kernels.launch import Config, config_file
from fastdiff.kernels.library import LIBRARY, LibraryLaunch
from tests.kernels.test_kernels_conv import layers
from tests.support.cases_conv import SHAPES, Shape, layer_case
from tests.support.cases_norm import poison
from tests.support.kernel_harness import DTYPES, Case, check, rounding
from tests.support.tuned_file import GPU, tuning

SERVED = {name: shape for name, shape in SHAPES.items() if not shape.upsample}


def products(shape: Shape, dtype: torch.dtype) -> Case:
    operands = shape.laid_out(shape.operands(dtype), LIBRARY)
    sums = poison(len(shape.channels), *shape.out, dtype=dtype)
    return Case(library.products, operands | {"sums": sums}, ("sums",))


# Products -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_products(name: str, dtype: torch.dtype) -> None:
    """Products in poisoned memory between guard bands equal the reference, a sum over taps."""
    check(products(SERVED[name], dtype))


@pytest.mark.parametrize("name", SERVED)
def test_their_sum_is_the_convolution(name: str) -> None:
    """The sum over sources equals the reference of `conv`, which pads and concatenates in another way."""
    shape = SERVED[name]
    operands = {
        key: tuple(t.double() for t in value) if isinstance(value, tuple) else value
        for key, value in shape.operands(torch.float32).items()
    }
    exact = conv.product_reference(operands["src"], operands["weight"], shape.out, shape.stride, shape.padding)
    sums = poison(len(shape.channels), *shape.out, dtype=torch.float64)
    library.products(**shape.laid_out(operands, LIBRARY), sums=sums)()
    assert (sums.sum(dim=0) - exact).abs().max() <= 1e-13 * exact.abs().max()


def test_weights_are_laid_out_as_the_library_reads_them() -> None:
    W = torch.randn(5, 4 + 2, 3, 3)
    first, second = library.pack(W, (4, 2), torch.float32)
    assert (first.shape, second.shape) == ((1, 9, 4, 5), (1, 9, 2, 5))
    assert torch.equal(first[0, 5, 3], W[:, 3, 1, 2])
    assert torch.equal(second[0, 6, 1], W[:, 5, 2, 0])
    assert first.squeeze(0).permute(2, 0, 1).is_contiguous(), "[N, taps, C]"
    (behind,) = library.pack(W, (6,), torch.float32, (0, 1))
    taps = behind[0].unflatten(0, (4, 4))
    assert torch.equal(taps[1:, 1:].permute(3, 2, 0, 1), W)
    assert taps[0].eq(0).all()
    assert taps[:, 0].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", ["3x3", "1x1 of two", "strided, padded behind"])
def test_a_half_product_is_rounded_once_more(name: str, dtype: torch.dtype) -> None:
    """dst = (sum_i fl(P_i) + rest) / divide, rounded: with u the dtype's rounding and P_i each source's product,

        |dst - exact| <= u (sum_i |P_i| / divide + |dst|)

    apart from errors of float32, and of numbers too small for the dtype.
    """
    case = layer_case(SERVED[name], dtype, "entry residual", LIBRARY)
    made = conv.layer(**case.arguments, config=LIBRARY)
    made[0]()
    made[1].reference()  # float32, but for what it rounds; test_kernels.py compares the kernel with it
    got = case.arguments["dst"].double()

    exact = case.to(torch.float64)
    conv_launches = conv.layer(**exact.arguments, config=LIBRARY)
    for each in conv_launches:
        each.reference()
    best = exact.arguments["dst"]
    terms = conv_launches[0].arguments["sums"].abs().sum(dim=0) / exact.arguments["divide"]
    u, tiny = rounding(dtype), torch.finfo(dtype).tiny
    allowed = u * (1 + u) * (terms + best.abs()) + 2.0**-20 * (terms.max() + best.abs().max()) + u * tiny
    assert ((got - best).abs() <= allowed).all()
    assert ((got - best).abs() > u * 1.01 * best.abs() + 2.0**-20 * best.abs().max()).any(), "it is a rounding more"


# The calls of cuDNN --------------------------------------------------------------------------------------------------


class Recorder(TorchDispatchMode):
    """Records all operations except views, and does not run convolutions, as there is no GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if operation.namespace == "aten" and not operation.is_view:
            self.calls.append((operation, args, kwargs))
            return kwargs["out"]
        return operation(*args, **kwargs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", SERVED)
def test_on_a_gpu_it_is_one_call_for_each_source_and_nothing_else(name: str, dtype: torch.dtype) -> None:
    """There is no copy, allocation or wait: operands are views in channels_last, and the result is written in place.

    TF32 is off in float32, whatever the global setting is; algorithms are deterministic and not benchmarked.
    """
    arguments = products(SERVED[name], dtype).arguments
    with FakeTensorMode():

        def there(value: Any) -> Any:
            if isinstance(value, tuple):
                return tuple(map(there, value))
            if not isinstance(value, torch.Tensor):
                return value
            return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="cuda")

        made = library.products(**{key: there(value) for key, value in arguments.items()})
        with Recorder() as recorder:
            made()
    assert len(recorder.calls) == len(SERVED[name].channels)
    for (operation, args, kwargs), source in zip(recorder.calls, SERVED[name].channels, strict=True):
        assert operation is torch.ops.aten.cudnn_convolution.out
        image, kernel, padding, stride, dilation, groups, benchmark, deterministic, allow_tf32 = args
        rows, H, W, N = SERVED[name].out
        assert image.shape == (rows, source, *SERVED[name].size)
        assert kernel.shape[:2] == (N, source)
        assert kwargs["out"].shape == (rows, N, H, W)
        for tensor in (image, kernel, kwargs["out"]):
            assert tensor.is_cuda
            assert tensor.is_contiguous(memory_format=torch.channels_last)
        assert (padding, stride) == ([arguments["padding"]] * 2, [arguments["stride"]] * 2)
        assert (dilation, groups) == ([1, 1], 1)
        assert (benchmark, deterministic, allow_tf32) == (False, True, False)


def test_weights_of_another_layout_are_no_copy_at_every_call() -> None:
    arguments = products(SERVED["3x3"], torch.float32).arguments
    weight = tuple(part.contiguous() for part in arguments["weight"])
    with pytest.raises(AssertionError):
        library.products(**arguments | {"weight": weight})()


def test_a_build_without_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is the one of kernels that cannot be compiled, after which the backend uses PyTorch."""
    monkeypatch.setattr(torch.backends.cudnn, "is_available", lambda: False)
    made = library.products(**products(SERVED["3x3"], torch.float32).arguments)
    made.compile()
    with FakeTensorMode():
        made.arguments["sums"] = torch.empty(1, device="cuda")
    with pytest.raises(BackendError, match=r"library.products \(2x5x7x20->24 3x3/1 fp32\): .* has no cuDNN"):
        made.compile()


# Who chooses it -------------------------------------------------------------------------------------------------------


@pytest.fixture
def tune(tmp_path: Path) -> Iterator[Callable[[dict[str, Config]], None]]:
    with tuning(tmp_path) as tune:
        yield tune


def problem_of(shape: Shape) -> Problem:
    return shape.problem(shape.operands(torch.bfloat16))


def test_a_file_names_it_and_it_is_read_back(tune: Callable[..., None], tmp_path: Path) -> None:
    problem = problem_of(SHAPES["3x3"])
    heuristic = problem.choose_layer()
    assert heuristic != LIBRARY
    tune({f"conv.layer {problem.key}": LIBRARY})
    (fields,) = json.loads(config_file(GPU.name, tmp_path).read_text())["configs"].values()
    assert fields == {"num_warps": 0, "num_stages": 0, "library": 1}
    assert problem.choose_layer() is LIBRARY
    assert problem.choose(splits=True) == heuristic, "whose weights are packed, or who wants no library"
    assert problem.choose(splits=False) in conv.HALF
    assert problem_of(dataclasses.replace(SHAPES["3x3"], rows=3)).choose_layer() != LIBRARY
    other = conv.HALF_SPLIT[1]
    tune({f"conv.layer {problem.key}": other})
    assert problem.choose_layer() == problem.choose(splits=True) == other


def test_it_is_offered_but_behind_a_doubling(tune: Callable[..., None]) -> None:
    for shape in SHAPES.values():
        assert (LIBRARY in problem_of(shape).layer_candidates) == (not shape.upsample)
    problem = problem_of(SHAPES["upsampled"])
    tune({f"conv.layer {problem.key}": LIBRARY})
    with pytest.raises(BackendError, match="is no candidate any more"):
        problem.choose_layer()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "rows"), [("ddpm-cifar10-32", 1), ("ddpm-cifar10-32", 256), ("ddpm-celebahq-256", 1)])
def test_no_heuristic_chooses_it(name: str, rows: int, dtype: torch.dtype) -> None:
    for shape in layers(name, rows):
        assert shape.problem(shape.shipped(dtype)).choose_layer() != LIBRARY, shape


def test_the_workspace_is_its_sums_in_their_dtype() -> None:
    shape = SHAPES["1x1 of two"]
    for dtype, numbers in ((torch.float32, 2 * 2 * 4 * 5 * 24), (torch.bfloat16, 2 * 4 * 5 * 24)):
        operands = shape.laid_out(shape.operands(dtype), LIBRARY)
        assert conv.workspace(operands["src"], operands["weight"], shape.out, config=LIBRARY) == numbers
    made = conv.layer(**layer_case(shape, torch.bfloat16, "", LIBRARY).arguments, config=LIBRARY)
    assert [each.op for each in made] == ["library.products", "epilogue.finish"]
    assert isinstance(made[0], LibraryLaunch)
    assert isinstance(made[0].remake(LIBRARY), LibraryLaunch)
    assert made[0].candidates == (LIBRARY,)
