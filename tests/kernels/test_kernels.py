"""Tests of the Triton kernels, interpreted in a process of their own, against their references in float64."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from tests.support.kernel_cases import CASES
from tests.support.kernel_harness import Case, Guarded, check
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


def test_gaps_of_a_strided_tensor_are_guarded():
    held = Guarded(torch.zeros(3, 4).as_strided((3, 2), (4, 1)))
    held.tensor.fill_(1.0)
    held.check("x", written=True)
    held.tensor.as_strided((3,), (4,), held.tensor.storage_offset() + 2)[:2] = 1.0
    with pytest.raises(AssertionError, match="out of bounds"):
        held.check("x", written=True)
