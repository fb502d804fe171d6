"""The benchmark suite itself, as real processes: a wrong kernel gets no speed, a slowed one is found."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastdiff import UNet
from fastdiff.backends import native
from fastdiff.core.lower import lower
from tests.support.cases import NETWORKS, cases, config_of
from tests.support.paths import ROOT

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed")

needs_native = pytest.mark.skipif(native.extension() is None, reason="fastdiff._native is not built")

# A plugin that stands between the suite and the engine: every run of operations is followed, or repeated, by {after}.
PLUGIN = """
from fastdiff import UNet
from fastdiff.backends import native

class Altered:
    def __init__(self, compiled):
        self.compiled, self.engine = compiled, compiled.engine

    def run(self, first, last):
        self.engine.run(first, last)
        {after}

    def __getattr__(self, name):
        return getattr(self.engine, name)

class AlteredProgram(native.NativeProgram):
    def __init__(self, *args):
        super().__init__(*args)
        self.engine = Altered(self)

native.NativeProgram = AlteredProgram
"""
WRONG = "self.compiled.buffer(self.compiled.program.ops[first].dst).mul_(1.0001)"
SLOW = "for _ in range(3): self.engine.run(first, last)"
CASE = "float32-conv3-res-norm5-silu-12x12x160"


def suite(tmp_path: Path, name: str, after: str | None = None) -> tuple[subprocess.CompletedProcess[str], Path]:
    """The suite on one case in a process of its own, with the plugin where there is one; on one thread, which does not
    wait for another that others keep from running.
    """
    out = tmp_path / f"{name}.json"
    arguments = ["-p", "no:cacheprovider", "--networks", "160 channels, 12x12", "--rows", "3"]
    arguments += ["-k", CASE, f"--benchmark-json={out}"]
    if after is not None:
        (tmp_path / f"{name}.py").write_text(PLUGIN.format(after=after))
        arguments += ["-p", name]
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "benchmarks/test_operations.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return run, out


def compare(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "compare.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.alone
@needs_native
def test_wrong_and_slowed_kernels_are_caught(tmp_path):
    right, before = suite(tmp_path, "right")
    assert right.returncode == 0, right.stdout + right.stderr
    report = json.loads(before.read_text())
    (found,) = report["benchmarks"]
    assert found["extra_info"].keys() >= {"gflops", "gbs", "share", "method", "bound"}
    assert 0 < found["extra_info"]["share"] < 4
    assert report["machine_info"]["ceilings"]["gflops"]["float32"] > 0
    assert "share of this machine's ceilings" in right.stdout
    assert CASE in right.stdout

    wrong, _ = suite(tmp_path, "wrong", WRONG)
    assert wrong.returncode == 1
    assert "relative_error" in wrong.stdout
    assert "share of this machine's ceilings" not in wrong.stdout, "no speed of what is wrong"

    slow, after = suite(tmp_path, "slow", SLOW)
    assert slow.returncode == 0, slow.stdout  # it is right
    run = compare(before, after, "--tolerance", "0.5")
    assert run.returncode == 1, run.stdout
    assert "SLOWER" in run.stdout
    assert compare(before, before).returncode == 0


def written(path: Path, shares: dict[str, float | None]) -> Path:
    benchmarks = [{"name": k, "extra_info": {} if v is None else {"share": v}} for k, v in shares.items()]
    path.write_text(json.dumps({"benchmarks": benchmarks}))
    return path


@pytest.mark.parametrize(("new", "code"), [(0.45, 0), (0.42, 0), (0.41, 1), (0.25, 1), (0.9, 0)])
def test_comparison(tmp_path, new, code):
    old = written(tmp_path / "old.json", {"a": 0.5, "b": 0.7, "gone": 0.3, "help": None})
    run = compare(old, written(tmp_path / "new.json", {"a": new, "b": 0.7, "come": 0.2}), "--tolerance", "0.2")
    assert run.returncode == code, run.stdout
    assert f"{code} of 2 became slower by more than 20%" in run.stdout
    assert "gone: only in the first" in run.stdout
    assert "come: only in the second" in run.stdout


def test_comparison_of_nothing_in_common(tmp_path):
    run = compare(written(tmp_path / "old.json", {"a": 0.5}), written(tmp_path / "new.json", {"b": 0.5}))
    assert run.returncode == 2
    assert "no benchmark in common" in run.stderr


def test_cases_are_the_distinct_operations():
    """Each once, under a name of its own; nothing that a program does is left out."""
    for name in ("tiny", "scale-shift with classes", "class image, concat", "ddpm-cifar10-32"):
        config = config_of(name)
        found = cases(name)
        assert len({case.name for case in found}) == len({case.index for case in found}) == len(found)
        size = config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2
        with torch.device("meta"):
            program = lower(UNet(config), size)
        shapes = {(type(op), program.buffers[op.src[0]].shape, program.buffers[op.dst].shape) for op in program.ops}
        kept = [program.ops[case.index] for case in found]
        assert {(type(op), program.buffers[op.src[0]].shape, program.buffers[op.dst].shape) for op in kept} == shapes
    assert len(NETWORKS) > 40
