"""Tests of the Triton kernels, interpreted in a process of their own, against their references in float64."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from tests.support.kernel_cases import CASES
from tests.support.kernel_harness import (
    PER_ACCUMULATION,
    Case,
    Guarded,
    accumulations,
    check,
    compare,
    product,
    tf32,
)
from tests.support.paths import ROOT


def is_slow(name: str) -> bool:
    """Return whether a case differs from quick ones by float16, the stream of noise or small tiles alone."""
    return any(part in name for part in ("fp16", "stream 2", "elements=128)", "(3, 11, 13) bf16 "))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> dict[str, dict]:
    chosen = [item.callspec.params["name"] for item in request.session.items if hasattr(item, "callspec")
              and item.originalname == "test_kernel_is_its_reference"]  # fmt: skip
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
    run = subprocess.run(
        [sys.executable, "-m", "tests.support.kernel_harness", *chosen],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert run.returncode == 0, run.stderr
    return {result["name"]: result for result in map(json.loads, run.stdout.splitlines())}


@pytest.mark.xdist_group("interpreted")  # a single worker of pytest-xdist interprets them, once
@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.slow] * is_slow(n)) for n in CASES])
def test_kernel_is_its_reference(results, name):
    assert name in results, "the case was not run"
    assert "error" not in results[name], results[name]["error"]
    assert results[name]["shares"], "nothing was compared"


# The harness itself ---------------------------------------------------------------------------------------------------


class Fake:
    """A launch whose kernel is the reference, followed by ``spoil``."""

    def __init__(self, x, y, spoil):
        self.x, self.y, self.spoil = x, y, spoil

    def __call__(self):
        self.reference()
        self.spoil(self.x, self.y)

    def reference(self):
        self.y.copy_(2 * self.x)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x, y: None, None),
        (lambda x, y: y[1].mul_(1 + 1e-5), "y: .* of 12 values are off"),
        (lambda x, y: y[1, 1].fill_(torch.nan), "y: NaN in 1 places"),
        (lambda x, y: x[1].mul_(2), "x was written to"),
        (lambda x, y: y.as_strided((13,), (1,), y.storage_offset()).fill_(0), "y: written out of bounds"),
        (lambda x, y: y.as_strided((1,), (1,), y.storage_offset() - 1).fill_(0), "y: written out of bounds"),
    ],
)
def test_harness_finds(spoil, message):
    arguments = {"x": torch.arange(1.0, 13).view(3, 4), "y": torch.full((3, 4), torch.nan)}
    case = Case(lambda x, y, config: Fake(x, y, spoil), arguments, ("y",))
    if message is None:
        assert check(case)["y"] == 0
    else:
        with pytest.raises(AssertionError, match=message):
            check(case)


CONVOLUTIONS = [name for name in CASES if name.startswith("conv ") and CASES[name]().accumulations]


class Wrong:
    """A convolution with an error, computed by its reference."""

    def __init__(self, case: Case, weight=lambda w: w, src=lambda x: x):
        self.case = case
        operands = {
            "src": tuple(src(t) for t in case.arguments["src"]),
            "weight": tuple(weight(t) for t in case.arguments["weight"]),
        }
        self.wrong = case.op(**case.arguments | operands, config=case.config)

    def __call__(self):
        self.wrong.reference()

    def reference(self):
        self.case.op(**self.case.arguments, config=self.case.config).reference()


def without_a_tap(w):
    w = w.clone()
    w[:, w.shape[1] // 2] = 0
    return w


def swapped_taps(w):
    return w[:, [1, 0, *range(2, w.shape[1])]] if w.shape[1] > 1 else w.roll(1, 2)


def plain_tf32(t):
    return torch.from_numpy(tf32(t.numpy())) if t.dtype == torch.float32 else t


@pytest.mark.parametrize(
    "error", [{"weight": without_a_tap}, {"weight": swapped_taps}, {"weight": plain_tf32, "src": plain_tf32}]
)
def test_planted_errors_of_convolutions_are_found(error):
    """The band for what tensor cores cut off hides no missing or exchanged tap, and no plain TF32."""
    checked = 0
    for name in CONVOLUTIONS:
        case = CASES[name]()
        src = case.arguments["src"][0]
        if src.shape[1:3] == (1, 1) or "large mean" in name:
            continue  # all taps but one are outside; or float32 keeps fewer digits of the products than TF32
        if plain_tf32 in error.values() and src.dtype != torch.float32:
            continue

        def op(case=case, config=None, **arguments):
            return Wrong(dataclasses.replace(case, arguments=arguments), **error)

        with pytest.raises(AssertionError, match="values are off"):
            check(dataclasses.replace(case, op=op))
        checked += 1
    assert checked >= 10


@pytest.mark.parametrize(
    ("dtype", "size", "precision"),
    [
        (torch.float32, 4, "TF32x3"),
        (torch.float32, 4, "TF32"),
        (torch.bfloat16, 2, "IEEE"),
        (torch.float16, 2, "IEEE"),
    ],
)
def test_what_tensor_cores_cut_off_is_within_the_band(dtype, size, precision):
    """Sums of many products, all of one sign too, where each is cut off in the same direction; plain TF32 is not."""
    rng = torch.Generator().manual_seed(0)
    for K, positive in ((64, True), (1152, False), (1152, True), (4608, True)):
        a, b = (torch.randn(shape, generator=rng).to(dtype).float() for shape in ((16, K), (K, 16)))
        a, b = (a.abs(), b.abs()) if positive else (a, b)
        exact = a.double() @ b.double()
        got = torch.from_numpy(product(a.numpy(), b.numpy(), torch.zeros(16, 16).numpy(), size, precision))
        band = 4.0 + PER_ACCUMULATION * accumulations(dtype, K)
        if precision == "TF32":
            with pytest.raises(AssertionError, match="values are off"):
                compare("sums", got, exact, a @ b, None, band)
        else:
            assert compare("sums", got, exact, a @ b, None, band) <= 1.0
            if positive:
                assert (got.double() <= exact + 2.0**-24 * exact.abs()).all(), "toward zero"


def test_the_former_band_called_correct_kernels_wrong():
    """Tensor cores that cut off the sums of a large convolution of positive numbers."""
    a, b = torch.rand(16, 4608).bfloat16().float(), torch.rand(4608, 16).bfloat16().float()
    got = torch.from_numpy(product(a.numpy(), b.numpy(), torch.zeros(16, 16).numpy(), 2, "IEEE"))
    with pytest.raises(AssertionError, match="values are off"):
        compare("sums", got, a.double() @ b.double(), a @ b, None, 4.0)


def test_gaps_of_a_strided_tensor_are_guarded():
    held = Guarded(torch.zeros(3, 4).as_strided((3, 2), (4, 1)))
    held.tensor.fill_(1.0)
    held.check("x", written=True)
    held.tensor.as_strided((3,), (4,), held.tensor.storage_offset() + 2)[:2] = 1.0
    with pytest.raises(AssertionError, match="out of bounds"):
        held.check("x", written=True)
