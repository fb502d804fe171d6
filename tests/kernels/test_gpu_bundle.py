"""Tests of benchmarks/gpu without a GPU: the dry run executes every part, and a part that fails stops no other."""

from __future__ import annotations

import argparse
import functools
import importlib
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from benchmarks.gpu import run as run_module
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
    from fastdiff.kernels.launch import speeds, tuned
    from tests.support.kernel_cases import CASES

    (tmp_path / "hook").mkdir()
    (tmp_path / "hook/sitecustomize.py").write_text(BLOCK.format(names=ABSENT))
    environment = {**os.environ, "FASTDIFF_GPU_OUT": str(tmp_path / "out"), "PYTHONPATH": str(tmp_path / "hook")}
    run = subprocess.run([sys.executable, PACKAGE, "--dry-run"], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert len(run.stdout.splitlines()) <= 60
    assert "summary, a dry run" in run.stdout.splitlines()[-len(call.PARTS) - 1], "the last lines"
    assert {"gpu.json", "gpu.md"} < set(files)
    parts = parts_of(tmp_path / "out")
    assert list(parts) == list(call.PARTS)
    assert {part["status"] for part in parts.values()} == {"ok"}

    ops = {build().launch().op for build in CASES.values()}
    assert set(parts["kernels"]["result"]["ops"]) == ops
    assert set(parts["graphs"]["result"]["equal_bits"].values()) == {True}
    assert all(0 < row["network_error"] < 0.1 for row in parts["parity"]["result"]["rows"])
    configs = tuned(tmp_path / "out" / "dry-run.json")
    asked = {"input", "attention.attention", "update", "conv.layer", "epilogue.normed"}
    assert asked <= {key.split()[0] for key in configs} <= ops | {"conv.layer"}, "what a network asks for"
    assert parts["tuning"]["result"]["launches"][0]["config"] in configs.values()
    assert not parts["tuning"]["result"]["red"], "every configuration is right"
    named = {key.split()[0] for key, config in configs.items() if "library" in config}
    assert named == {"conv.layer"}, "whatever is faster than an interpreter"
    measured = speeds(tmp_path / "out" / "dry-run.json")
    assert set(measured["bfloat16 8x8x1"]) == {"eager", "compiled"}
    rows = parts["profile"]["result"]["B=2, by operation"]
    assert rows[0]["launch"] == "the step"
    for name in ("cifar10 B=1", "cifar10 B=256", "tuned celebahq B=1"):
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


ITEMS = """
import sys, time
from pathlib import Path
sys.path[:0] = [sys.argv[1]]
from benchmarks.gpu.run import Run

out = Path(sys.argv[2])
run = Run(out, True, time.time() + 99, None, {}, "a part")

def compute(i):
    with (out / "computed").open("a") as file:
        file.write(f"{i}\\n")
    time.sleep(0.02)
    return [i]

for i in range(60):
    assert run.item(str(i), lambda: compute(i)) == {"result": [i]}
print("complete")
"""


def test_items_that_are_finished_outlive_their_process(tmp_path: Path) -> None:
    """The process is killed at random times, in the midst of a line too; each item is finished once."""
    rng, killed = random.Random(0), 0
    for _ in range(100):
        process = subprocess.Popen(
            [sys.executable, "-c", ITEMS, str(ROOT), str(tmp_path)], stdout=subprocess.PIPE, text=True
        )
        if killed < 4:
            before = len(run_module.read_lines(tmp_path / "items.jsonl"))
            while len(run_module.read_lines(tmp_path / "items.jsonl")) < before + rng.randrange(2, 20):
                time.sleep(0.001)
            process.kill()
            process.wait()
            killed += 1
            with (tmp_path / "items.jsonl").open("a") as file:
                file.write('{"part": "a part", "item": "torn", "sta')
            continue
        assert process.communicate()[0] == "complete\n"
        break
    lines = run_module.read_lines(tmp_path / "items.jsonl")
    done = [line["item"] for line in lines if line["state"] == "done"]
    assert sorted(done, key=int) == [str(i) for i in range(60)]
    computed = (tmp_path / "computed").read_text().split()
    assert len(computed) <= 60 + killed, "at most one item of each process was computed again"


def test_an_item_that_ends_its_process_is_given_up(call: ModuleType, tmp_path: Path) -> None:
    """A segmentation fault leaves no result; after two of them the part goes on without the item."""

    def new() -> Any:
        return call.Run(tmp_path, True, time.time() + 99, None, {}, "a part")

    for _ in range(run_module.ATTEMPTS):
        new().write("bad", state="begun")
    assert new().item("bad", lambda: pytest.fail("computed again")) == {
        "error": "the process ended while this was computed"
    }
    assert new().item("good", lambda: 1) == {"result": 1}
    assert new().item("good", lambda: pytest.fail("computed again")) == {"result": 1}
    assert "ValueError: no" in new().item("wrong", lambda: int("no", 36) and bad("no"))["error"]
    other = call.Run(tmp_path, False, time.time() + 99, None, {}, "a part")
    assert other.items() == {}, "those of a dry run are others"


def bad(why: str) -> None:
    raise ValueError(why)


def test_a_lost_context_costs_one_item(call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The part goes on in a fresh process, and what was found before is kept."""

    def part(run: Any) -> dict:
        def item(name: str) -> str:
            if name == "b":
                raise RuntimeError("CUDA error: an illegal memory access was encountered")
            return name.upper()

        return {name: run.item(name, functools.partial(item, name)) for name in "abc"}

    started = []

    def child(parts: list[str], arguments: argparse.Namespace, limit: float) -> str | None:
        started.append(parts)
        run = call.Run(tmp_path, True, time.time() + 99, None, parts_of(tmp_path))
        code = call.execute(parts, run)
        return f"exit code {code}" if code else None

    monkeypatch.setattr(call, "PARTS", {"first": part, "second": lambda run: {"us": 1.0}})
    monkeypatch.setattr(call, "child", child)
    assert call.main(["--out", str(tmp_path), "--dry-run", "--parts", "first,second"]) == 0
    found = parts_of(tmp_path)
    assert started == [["first", "second"], ["first", "second"]]
    assert found["first"]["result"]["a"] == {"result": "A"}
    assert "illegal memory access" in found["first"]["result"]["b"]["error"]
    assert found["first"]["result"]["c"] == {"result": "C"}
    assert found["second"]["status"] == "ok"


def test_a_part_that_is_stopped_leaves_its_items(
    call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def child(parts: list[str], arguments: argparse.Namespace, limit: float) -> str:
        run = call.Run(tmp_path, False, time.time() + 99, None, {}, parts[0])
        run.write("one", state="begun")
        run.write("one", state="done", result=5)
        run.write("two", state="begun")
        return "stopped after 2 s"

    monkeypatch.setattr(call, "child", child)
    assert call.main(["--out", str(tmp_path), "--parts", "tuning", "--seconds", "99"]) == 3
    part = parts_of(tmp_path)["tuning"]
    assert part["status"] == "unfinished"
    assert part["result"]["items"] == {"one": 5}


def test_the_summary_is_short_and_last(call: ModuleType) -> None:
    parts = {f"part {i}": {"status": "failed", "error": "x\n" * 50, "result": {}} for i in range(99)}
    assert len(call.summary(parts, False)) <= 30
    contenders = {"eager": {"img_steps_per_s": 10.0}, "triton": {"img_steps_per_s": 30.0}, "broken": {"error": "x"}}
    (_, line) = call.summary({"cifar10 B=1": {"status": "ok", "result": {"contenders": contenders}}}, False)
    assert line == "cifar10 B=1: ok; triton 30; eager 10"


def test_contenders_may_measure_cudnns_algorithms(
    call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eager, compiled and the baselines get the fastest algorithm for each shape: a fair comparison."""
    import torch

    from benchmarks.gpu import speeds

    seen: list[bool] = []

    def make() -> Any:
        seen.append(torch.backends.cudnn.benchmark)

        def job() -> Any:
            seen.append(torch.backends.cudnn.benchmark)
            return torch.zeros(2, 3, 8, 8)

        return job

    monkeypatch.setattr(speeds, "contenders", lambda *_: {"compiled": make})
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", False)
    run = call.Run(tmp_path, True, time.time() + 99, None, {}, "cifar10 B=1")
    with pytest.raises(call.Failure, match="images that are off"):
        call.PARTS["cifar10 B=1"](run)
    assert seen == [True, True]
    assert not torch.backends.cudnn.benchmark, "what follows is as before"


def test_red_kernels_get_no_speed(call: ModuleType, tmp_path: Path) -> None:
    from benchmarks.gpu import tuning

    ops = {"update": {"failed": True}, "attention.attention": {"cases": 1}}
    run = call.Run(tmp_path, True, time.time() + 99, None, {"kernels": {"result": {"ops": ops}}})
    assert {candidate.key.split()[0] for candidate in tuning.candidates(run)} == {"attention.attention", "conv.layer"}
    with pytest.raises(call.Failure, match="check is red"):
        call.update(run)
    run.finished.clear()
    with pytest.raises(call.Failure, match="the part `kernels` comes first"):
        tuning.candidates(run)


def test_a_configuration_that_is_wrong_is_not_measured(
    call: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference of a launch stands for its kernel here; in one configuration a number of its result is off."""
    from benchmarks.gpu import tuning

    ops = {"kernels": {"result": {"ops": {"norm.group_norm": {"cases": 1}, "epilogue.normed": {"cases": 1}}}}}
    run = call.Run(tmp_path, True, time.time() + 99, None, ops, "tuning")
    measured: list[Any] = []

    def run_launch(launch: Any) -> None:
        launch.reference()
        if launch.config == wrong:
            written = next(launch.arguments[name] for name in ("out", "dst", "sums") if name in launch.arguments)
            written.view(-1)[7] += 100.0

    monkeypatch.setattr("fastdiff.kernels.launch.Launch.__call__", run_launch)
    monkeypatch.setattr("fastdiff.kernels.library.LibraryLaunch.__call__", run_launch)
    monkeypatch.setattr(tuning, "in_graph", lambda run, launches: measured.append(launches[0].config) or 1.0)
    kinds = {"conv.layer": 3, "epilogue.normed": 2}  # how many of each are tried
    for candidate in tuning.candidates(run):
        kind = candidate.key.split()[0]
        if len(candidate.configs) < 2 or not kinds.get(kind):
            continue
        kinds[kind] -= 1
        for wrong in (candidate.configs[0], None):
            measured.clear()
            found = tuning.tune(run, candidate)
            assert list(found["red"]) == [str(c) for c in candidate.configs[:2] if c == wrong], candidate.key
            assert all("values are off" in why for why in found["red"].values())
            assert measured == [c for c in candidate.configs[:2] if c != wrong]
    assert not any(kinds.values())


def test_unknown_parts_are_refused(call: ModuleType, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        call.main(["--parts", "speed", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert "unknown part speed; there are: header, precompile, kernels" in capsys.readouterr().err
