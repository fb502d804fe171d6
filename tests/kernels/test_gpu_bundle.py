"""Tests of benchmarks/gpu without a GPU: the dry run executes every part, and a part that fails stops no other."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from tests.support.paths import ROOT

PACKAGE = ROOT / "benchmarks" / "gpu"


@pytest.fixture
def call(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return importlib.import_module("benchmarks.gpu.call")


def parts_of(out: Path) -> dict:
    return json.loads((out / "gpu.json").read_text(encoding="utf-8"))["parts"]


# What fastdiff itself does not need, and a machine with a GPU may lack.
ABSENT = (
    "diffusers", "hypothesis", "pytest", "_pytest", "xdist", "torchmetrics", "transformers", "accelerate", "matplotlib",
    "tensorboard", "openvino", "onnxruntime", "onnxscript", "nanobind", "datasets", "pandas", "scipy", "torchvision",
)  # fmt: skip
BLOCK = """
from importlib.machinery import PathFinder

find = PathFinder.find_spec
PathFinder.find_spec = lambda name, *rest: None if name.partition(".")[0] in {names} else find(name, *rest)
"""


def test_the_dry_run_where_packages_are_absent(call: ModuleType, tmp_path: Path) -> None:
    from fastdiff.kernels.launch import tuned
    from tests.support.kernel_cases import CASES

    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(BLOCK.format(names=ABSENT))
    environment = {**os.environ, "FASTDIFF_GPU_OUT": str(tmp_path / "out"), "PYTHONPATH": str(tmp_path / "hook")}
    run = subprocess.run([sys.executable, PACKAGE, "--dry-run"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert {"gpu.json", "gpu.md"} < set(files)
    parts = parts_of(tmp_path / "out")
    assert list(parts) == list(call.PARTS)
    assert {part["status"] for part in parts.values()} == {"ok"}

    ops = {build().launch().op for build in CASES.values()}
    assert set(parts["kernels"]["result"]["ops"]) == ops
    assert set(parts["graphs"]["result"]["equal_bits"].values()) == {True}
    assert all(0 < row["network_error"] < 0.1 for row in parts["parity"]["result"]["rows"])
    configs = tuned(tmp_path / "out" / "dry-run.json")
    assert {key.split()[0] for key in configs} == ops - {"conv.conv", "conv.partial"} | {"conv.layer"}
    assert parts["tuning"]["result"]["launches"][0]["config"] in configs.values()
    named = {key.split()[0] for key, config in configs.items() if "library" in config}
    assert named == {"conv.layer"}, "whatever is faster than an interpreter"
    for name in ("cifar10 B=1", "cifar10 B=256", "celebahq B=1"):
        contenders = parts[name]["result"]["contenders"]
        assert {"eager", "compiled", "baseline: one graph, max-autotune"} <= set(contenders)
        assert "No module named 'diffusers'" in contenders.pop("baseline: diffusers, compiled U-Net")["absent"]
        assert all(row["img_steps_per_s"] > 0 for row in contenders.values())
        assert parts[name]["result"]["stand_in"], "what stands in for a card says so"
    text = (tmp_path / "out" / "gpu.md").read_text(encoding="utf-8")
    assert "a dry run on a CPU: no figure means anything" in text
    assert all(f"## {name}: ok" in text for name in call.PARTS)


def test_the_diffusers_baseline(call: ModuleType, tmp_path: Path) -> None:
    """Where diffusers is installed, or its wheels are in a folder."""
    pytest.importorskip("diffusers", reason="an extra")
    import torch

    from benchmarks.gpu import jobs, networks

    run = call.Run(tmp_path, True, time.time() + 99, None, {})
    unet = networks.unet_of(networks.tiny(), torch.float32, run.device)
    images = jobs.diffusers_job(run, unet, 2, 2)()
    assert images.shape == (2, 3, 8, 8)
    assert images.isfinite().all()


def test_one_part_may_fail(call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def raises(run: object) -> dict:
        raise ZeroDivisionError("at the heart of it")

    def red(run: object) -> dict:
        raise call.Failure("one of two is off", {"rows": [{"ok": False, "error": 0.5}]})

    parts = {"a": raises, "b": red, "c": lambda run: {"unfinished": ["x"]}, "d": lambda run: {"us": 1.0}}
    monkeypatch.setattr(call, "PARTS", parts)
    call.execute(list(parts), call.Run(tmp_path, True, time.time() + 9, None, {}))
    found = parts_of(tmp_path)
    assert [part["status"] for part in found.values()] == ["failed", "failed", "unfinished", "ok"]
    assert "in raises" in found["a"]["error"], "the traceback"
    assert found["b"]["result"]["rows"] == [{"ok": False, "error": 0.5}], "what is off is told"
    text = (tmp_path / "gpu.md").read_text(encoding="utf-8")
    assert "ZeroDivisionError: at the heart of it" in text
    assert "| False | 0.5 |" in text


@pytest.mark.parametrize(
    ("script", "status", "message", "code"),
    [
        ("import os; os._exit(7)", "failed", "exit code 7", 1),
        ("raise SystemExit('no driver')", "failed", "no driver", 1),
        ("import time; time.sleep(60)", "unfinished", "stopped after 2 s", 3),
    ],
)
def test_a_part_may_take_its_process_along(
    call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, status: str, message: str, code: int
) -> None:
    (tmp_path / "script.py").write_text(script)
    monkeypatch.setattr(call, "HERE", tmp_path / "script.py")
    monkeypatch.setattr(call, "SMALLEST_SHARE", 0.5)
    assert call.main(["--out", str(tmp_path), "--parts", "header", "--seconds", "2"]) == code
    part = parts_of(tmp_path)["header"]
    assert part["status"] == status
    assert message in part["error"]


def test_a_call_goes_on_where_the_last_one_ended(
    call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    earlier = {"header": {"status": "ok", "result": {"copy": 1}}, "graphs": {"status": "failed", "error": "x"}}
    (tmp_path / "earlier").mkdir()
    call.write(tmp_path / "earlier", earlier, dry=False)
    started: list[list[str]] = []

    def child(parts: list[str], arguments: argparse.Namespace, limit: float) -> None:
        started.append(parts)
        now = {**parts_of(tmp_path), **{name: {"status": "ok", "result": {}} for name in parts}}
        call.write(tmp_path, now, arguments.dry_run)

    monkeypatch.setattr(call, "child", child)
    again = ["--out", str(tmp_path), "--parts", "header,graphs,update", "--resume", str(tmp_path / "earlier/gpu.json")]
    assert call.main(again) == 0
    assert started == [["graphs"], ["update"]], "each in a process of its own, and no finished one again"
    assert parts_of(tmp_path)["header"] == earlier["header"]
    assert call.main([*again[:4], "--anew"]) == 0
    assert started[2:] == [["header"], ["graphs"], ["update"]]
    assert call.main([*again[:4], "--dry-run"]) == 0, "a real run's parts are not those of a dry run"
    assert started[5:] == [["header", "graphs", "update"]]


def test_what_time_does_not_allow_is_not_started(
    call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(call, "child", lambda *_: pytest.fail("started"))
    assert call.main(["--out", str(tmp_path), "--seconds", "5"]) == 3
    assert {part["status"] for part in parts_of(tmp_path).values()} == {"unfinished"}


def test_red_kernels_get_no_speed(call: ModuleType, tmp_path: Path) -> None:
    from benchmarks.gpu import tuning

    ops = {"update": {"failed": True}, "noise": {"cases": 1}}
    run = call.Run(tmp_path, True, time.time() + 99, None, {"kernels": {"result": {"ops": ops}}})
    assert {launch.op for launch in tuning.launches(run)} == {"noise"}
    with pytest.raises(call.Failure, match="check is red"):
        call.update(run)
    run.finished.clear()
    with pytest.raises(call.Failure, match="the part `kernels` comes first"):
        tuning.launches(run)


def test_unknown_parts_are_refused(call: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        call.main(["--parts", "speed", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "unknown part speed; there are: header, kernels" in capsys.readouterr().err
