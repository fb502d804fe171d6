"""The trilemma: interrupted and resumed, compared at equal n, its front; what quality= and deadline_s= make of it."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from fastdiff import checkpoints, cli, solvers
from fastdiff.checkpoints.reading import weights_digest
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import image_store
from fastdiff.evaluation.trilemma import grid, picture, report, run, speed
from fastdiff.sampler import Sampler, choice, measured
from fastdiff.sampler.choice import resolve
from fastdiff.sampler.options import Options
from fastdiff.sampler.tables import step_table
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule
from tests.support.unets import TINY_CLASSES, change, random_unet

SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
CONFIG = change(
    TINY_CLASSES, sample_size=32, in_channels=1, out_channels=1, block_out_channels=(8,), add_attention=False,
    down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), num_class_embeds=11, null_label=10,
)  # fmt: skip


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny network for gray images of 32 x 32, ten classes and the null label."""
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoints.save_folder(path, random_unet(CONFIG), SCHEDULE)
    return path


@pytest.fixture(scope="module")
def sampler(model: Path) -> Sampler:
    return Sampler.from_pretrained(model, device="cpu", backend="eager")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """--data and --held-out: noise with a bright middle, 64 and 48 images."""
    folder, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    for name, n in (("real", 64), ("held_out", 48)):
        images = rng.integers(0, 256, (n, 32, 32), dtype=np.uint8)
        images[:, 8:24, 8:24] |= 128
        np.savez(folder / f"{name}.npz", images=images)
    return ["--data", str(folder / "real.npz"), "--held-out", str(folder / "held_out.npz")]


def judge(sampler: Sampler, data: list[str]) -> run.Judge:
    return run.Judge.of(sampler, "tiny", Path(data[1]), Path(data[3]), None, "fashion-mnist")


def report_of(sampler: Sampler, out: Path, points: list[grid.Planned], data: list[str]) -> dict[str, Any]:
    j = judge(sampler, data)
    return run.result(sampler, out, points, j, lambda text: None, model="m", batch=8, timed=False, known={})


# Interruption ---------------------------------------------------------------------------------------------------------

PLAN = ["--solvers", "ddpm,ddim-eta1,unipc-g2", "--nfe", "2,40", "--n", "40", "--batch-size", "8", "--backend", "eager"]


def stop_after(command: list[str], text: str, how: signal.Signals) -> tuple[int, str]:
    """Run a command until it prints ``text`` on standard error, then send it a signal: (exit code, all it printed)."""
    process = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if text in line:
            os.kill(process.pid, how)
            break
    seen += process.stderr.read()
    return process.wait(timeout=60), seen


def numbers(out: Path) -> dict[str, Any]:
    """Return the part of a result that depends on the images, not on the machine."""
    result = json.loads((out / "trilemma.json").read_text())
    return {k: result[k] for k in ("n", "model", "points", "floor", "missing", "nearest", "settings")}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_interrupted_and_resumed(
    model: Path, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def arguments(out: str) -> list[str]:
        return ["trilemma", str(model), *PLAN, *data, "--no-time", "--out", str(tmp_path / out)]

    command = [sys.executable, "-m", "fastdiff", *arguments("stopped")]
    code, seen = stop_after(command, "ddpm-2: 40 of 40", signal.SIGINT)
    assert code == 130, seen
    assert "million network evaluations" in seen.splitlines()[0]  # told before it starts
    assert "interrupted: what is finished is kept" in seen
    first = tmp_path / "stopped" / "points" / "ddpm-2" / "000000.npz"
    written, bits = first.stat().st_mtime_ns, first.read_bytes()
    code, seen = stop_after(command, "unipc-g2-2: 40 of 40", signal.SIGKILL)
    assert code == -signal.SIGKILL, seen
    assert "ddpm-2:" not in seen

    def call(*more: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastdiff", *more])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), *capsys.readouterr()

    assert call(*arguments("stopped"))[0] == 0
    assert (first.stat().st_mtime_ns, first.read_bytes()) == (written, bits)
    code, out, err = call(*arguments("whole"), "--json")
    assert (code, json.loads(out)["n"]) == (0, 40)
    assert "40 of 40" in err
    assert numbers(tmp_path / "stopped") == numbers(tmp_path / "whole")

    found = numbers(tmp_path / "whole")
    assert [e["name"] for e in found["points"]] == [
        "ddpm-2", "ddim-eta1-2", "unipc-g2-2", "ddpm-40", "ddim-eta1-40", "unipc-g2-40",
    ]  # fmt: skip
    twin = found["points"][1]
    assert twin["same_as"] == "ddpm-2"  # DDIM with eta 1 is DDPM: neither drawn nor measured twice
    assert twin["at_n"] == found["points"][0]["at_n"]
    assert not (tmp_path / "whole" / "points" / "ddim-eta1-2").exists()
    assert found["nearest"]["reference"] == "ddpm-40"
    assert found["missing"] == []

    # Without its images, the result stands for those of its points that are whole, and only for those.
    shutil.rmtree(tmp_path / "whole" / "points")
    code, out, err = call(*arguments("whole"), "--solvers", "ddpm,ddim-eta1,unipc-g2,ddim", "--json")
    assert code == 0
    assert "2 of 8 points lack images" in err
    assert [p.name for p in (tmp_path / "whole" / "points").iterdir()] in (["ddim-2", "ddim-40"], ["ddim-40", "ddim-2"])
    assert [e for e in json.loads(out)["points"] if e["key"] != "ddim"] == found["points"]

    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "whole" / "points").rglob("*")}
    code, out, err = call(*arguments("whole"), "--no-draw")
    assert code == 0
    assert "real images" in out
    assert before == {path: path.stat().st_mtime_ns for path in before}  # nothing is drawn or measured again
    with Image.open(tmp_path / "whole" / "trilemma.png") as drawn:
        assert min(drawn.size) > 500


def test_images_of_other_settings_are_refused(sampler: Sampler, data: list[str], tmp_path: Path) -> None:
    points = grid.grid_points(sampler, ["ddim"], [2], 20)
    run.draw(sampler, tmp_path, points, 8, lambda text: None, {})
    other = Sampler.from_pretrained(checkpoint_of(tmp_path / "other", seed=1), device="cpu", backend="eager")
    with pytest.raises(DataError, match="images of other settings"):
        run.draw(other, tmp_path, grid.grid_points(other, ["ddim"], [2], 40), 8, lambda text: None, {})
    with pytest.raises(DataError, match="images of other settings"):
        report_of(other, tmp_path, points, data)
    with pytest.raises(DataError, match="no point has its 20 images yet"):
        report_of(sampler, tmp_path / "empty", points, data)


def test_a_report_of_something_else_stands_for_nothing(
    sampler: Sampler, data: list[str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Another network, other real images, another seed, another step table, or damage: its points are drawn anew."""
    points = grid.grid_points(sampler, ["ddim"], [2], 20)
    run.draw(sampler, tmp_path, points, 8, lambda text: None, {})
    found = report_of(sampler, tmp_path, points, data)
    j, path = judge(sampler, data), tmp_path / "trilemma.json"
    assert run.earlier(sampler, tmp_path, points, j) == {"ddim-2": {20: found["points"][0]["at_n"]}}
    other = Sampler.from_pretrained(checkpoint_of(tmp_path / "other", seed=1), device="cpu", backend="eager")
    assert run.earlier(other, tmp_path, points, j) == {}
    swapped = judge(sampler, ["--data", data[3], "--held-out", data[1]])
    assert run.earlier(sampler, tmp_path, points, dataclasses.replace(swapped, data=j.data)) == {}
    path.write_text(json.dumps({**found, "settings": {**found["settings"], "seed": 1}}))
    assert run.earlier(sampler, tmp_path, points, j) == {}
    path.write_text(json.dumps({**found, "points": [{**found["points"][0], "table": "another"}]}))
    assert run.earlier(sampler, tmp_path, points, j) == {}
    assert not caplog.records
    path.write_text("{")
    assert run.earlier(sampler, tmp_path, points, j) == {}
    assert "holds no result that can be gone on with" in caplog.text


def checkpoint_of(path: Path, seed: int) -> Path:
    checkpoints.save_folder(path, random_unet(CONFIG, seed=seed), SCHEDULE)
    return path


@pytest.mark.example
@pytest.mark.parametrize(
    "example", re.findall(r"^\s*(fastdiff trilemma .*)$", str(cli.trilemma.trilemma.__doc__), re.MULTILINE)
)
def test_examples(
    example: str, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As they stand but for time: 20 images a point, of 10 evaluations at most, little data, and no timing."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(picture, "drawable", lambda: False)
    monkeypatch.setattr(grid, "QUICK", (grid.QUICK[0], grid.QUICK[1][:2], 20))
    example = re.sub(r"--n \d+", "--n 20", example)
    monkeypatch.setattr(sys, "argv", [*shlex.split(example), *data, "--no-time", "--device", "cpu"])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    out, err = capsys.readouterr()
    assert not stop.value.code, err
    assert "matplotlib is not installed, so there will be no picture" in err
    (written,) = tmp_path.rglob("trilemma.json")
    found = json.loads(written.read_text())
    assert found["missing"] == []
    assert {e["n"] for e in found["points"]} == {20}
    assert all(f"{e['key']:18}{e['nfe']:>5}" in out for e in found["points"])
    assert not written.with_suffix(".png").exists()


def test_missing_data_and_bad_arguments_are_named(
    model: Path, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for arguments, said in (
        ([str(model), "--no-draw"], "give --data"),
        ([str(model), "--data", "nowhere.npz"], "nowhere.npz"),
        ([str(model), *data, "--features", "nowhere.pth"], "nowhere.pth"),
        (["--quick", "--n", "100"], "--quick is a plan of its own"),
        (["--n", "3"], "20 or more"),
        (["--nfe", "4,x"], "--nfe 4,x"),
        (["--solvers", "ddim,magic"], "'magic' is unknown"),
    ):
        monkeypatch.setattr(sys, "argv", ["fastdiff", "trilemma", *arguments, "--device", "cpu"])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 2
        assert said in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


# Equal n --------------------------------------------------------------------------------------------------------------


def test_distances_are_compared_at_equal_n(
    sampler: Sampler, data: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Short points have more images than long ones; and the reference, where it has fewer, is compared at its own n."""
    for module in (grid, run):
        monkeypatch.setattr(module, "FEW", 24)
    monkeypatch.setattr(grid, "MANY", 40)
    monkeypatch.setattr(grid, "SHORT", 4)
    points = grid.grid_points(sampler, ["ddim", "ddpm"], [2, 8])
    assert {p.name: p.n for p in points} == {"ddim-2": 40, "ddpm-2": 40, "ddim-8": 24, "ddpm-8": 24}
    drawn = [p for p in points if p.name != "ddpm-8"]
    run.draw(sampler, tmp_path, drawn, 8, lambda text: None, {})
    image_store.draw(sampler, tmp_path / "points" / "ddpm-8", 21, seed=0, **points[-1].options)
    monkeypatch.setattr(run, "MIN_REFERENCE", 20)
    j = judge(sampler, data)
    found = report_of(sampler, tmp_path, points, data)
    assert found["n"] == 24
    assert found["missing"] == [{"name": "ddpm-8", "images": 21, "of": 24}]
    measurer = run.Measurer(j, tmp_path, lambda text: None, {})
    for entry in found["points"]:
        images = image_store.load(tmp_path / "points" / entry["name"])
        for key, n in (("at_n", 24), ("at_own_n", entry["n"])):
            expected = run.measure(measurer.features(images[:n]), measurer.reference)
            assert entry[key]["frechet"]["value"] == pytest.approx(expected["frechet"].value, rel=1e-9)
            assert entry[key]["recall"] == dataclasses.asdict(expected["recall"])
    assert found["points"][0]["at_n"] != found["points"][0]["at_own_n"]
    near = found["nearest"]
    assert (near["reference"], near["n"]) == ("ddpm-8", 21)
    goal = measurer.point(points[-1], 21)["frechet"]["value"]
    lowest = min(("ddim-2", "ddpm-2", "ddim-8"), key=lambda name: frechet(measurer, points, name, 21))
    assert near["any"]["lowest"]["name"] == lowest
    assert near["any"]["lowest"]["ratio"] == pytest.approx(frechet(measurer, points, lowest, 21) / goal)


def frechet(measurer: run.Measurer, points: list[grid.Planned], name: str, n: int) -> float:
    return measurer.point(next(p for p in points if p.name == name), n)["frechet"]["value"]


# The plan -------------------------------------------------------------------------------------------------------------


def test_the_plan_for_a_model(sampler: Sampler) -> None:
    points = grid.grid_points(sampler)
    for p in points:
        r = sampler.request(1, **p.options, labels=0)
        assert r.nfe == p.nfe
        assert p.n == (5000 if p.nfe <= 20 and p.key not in grid.ASIDE else 2000)
    assert max(p.nfe for p in points) == 100  # all timesteps, in place of 250 and 1000
    assert {p.key for p in points} == set(grid.PLAN)
    assert all(p.same_as == p.name.replace("ddim-eta1", "ddpm") for p in points if p.key == "ddim-eta1")
    # In two rows a multi-step solver has only one to look back from, and the last step is of first order.
    twins = {p.name: p.same_as for p in points if p.same_as is not None and p.key != "ddim-eta1"}
    assert twins == {"dpmpp_2m-g2-4": "ddim-g2-4", "unipc-g2-4": "ddim-g2-4"}
    few = grid.grid_points(sampler, ["heun", "plms"], [5], 7)
    assert [(p.name, p.options["steps"], p.n) for p in few] == [("heun-5", 3, 7), ("plms-5", 4, 7)]
    with pytest.raises(InvalidArgument, match=r"'ddim-g2' has no number of steps with 5"):
        grid.grid_points(sampler, ["ddim-g2"], [5])
    for key, said in (("dim", "'dim' is unknown"), ("ddim-eta", "'eta'"), ("ddim-x", "'x'"), ("ddim-g2-g3", "twice")):
        with pytest.raises(InvalidArgument, match=said):
            grid.options_of(key)
    assert grid.options_of("unipc-g1.5-karras") == {"solver": "unipc", "guidance": 1.5, "spacing": "karras"}


# The front ------------------------------------------------------------------------------------------------------------


@given(st.lists(st.tuples(*[st.integers(0, 4).map(float)] * 3), max_size=12))
def test_the_front_is_what_nothing_dominates(points: list[tuple[float, ...]]) -> None:
    def dominated(p: tuple[float, ...]) -> bool:
        return any(q != p and all(a <= b for a, b in zip(q, p, strict=True)) for q in points)

    assert report.front(points) == [not dominated(p) for p in points]


def test_the_nearest_in_words() -> None:
    goal = {"value": 1.0, "low": 0.9, "high": 1.1}
    distances = {"a-4": {"value": 1.3}, "b-8": {"value": 1.09}, "c-10": {"value": 1.05}, "d-g2-4": {"value": 0.5}}
    nfes = {"a-4": 4, "b-8": 8, "c-10": 10, "d-g2-4": 4}
    found = report.nearest(goal, distances, nfes, {"a-4", "b-8", "c-10"})
    assert found["plain"]["shortest_within"]["name"] == "b-8"
    assert found["plain"]["lowest"]["name"] == "c-10"
    assert found["any"]["shortest_within"]["name"] == "d-g2-4"
    none = report.nearest(goal, {"a-4": distances["a-4"]}, nfes, {"a-4"})
    text = "\n".join(report.say_nearest({"reference": "ddpm-1000", "n": 2000, **none}))
    assert "NO setting of at most 10 evaluations" in text
    assert "a-4, at 1.30 times" in text


# Speed ----------------------------------------------------------------------------------------------------------------


def test_speeds_and_the_peer(sampler: Sampler, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "ROUNDS", 1)
    points = grid.grid_points(sampler, ["ddim", "ddim-g2"], [4, 20])
    lines = speed.speeds(sampler, points, batch=8)
    assert lines.keys() == {"ddim", "ddim-g2"}
    assert lines["ddim"].images_per_s(4) > lines["ddim"].images_per_s(20) > 0
    with monkeypatch.context() as m:  # a call takes 0.5 s and 0.1 s a row; heun's steps have two, the last one
        m.setattr(speed, "in_turn", lambda ways, rounds: {(k, n): [0.5 + 0.1 * (2 * n - 1)] * 3 for k, n in ways})
        heun = speed.speeds(sampler, grid.grid_points(sampler, ["heun"], [5]), batch=8)["heun"]
    assert (heun.a, heun.b) == (pytest.approx(0.5), pytest.approx(0.1))
    line = speed.Speed(64, 0.5, 0.1, 0.0)
    assert line.images_per_s(5) == pytest.approx(64.0)
    other = speed.peer(sampler, batches=(2,), steps=1)
    assert other["images_per_s"] == pytest.approx(2 / (100 * other["seconds_per_step"]))
    assert "null_label" in other["left_out_of_its_network"]
    entries = [{"name": "ddim-4", "images_per_s": 300.0 * other["images_per_s"]}]
    near = {"any": {"shortest_within": {"name": "ddim-4"}}, "plain": None}
    assert run.against(other, entries, near)["ratios"] == {"ddim-4": pytest.approx(300.0)}


# The measured rule ----------------------------------------------------------------------------------------------------


def point(solver: str, nfe: int, distance: float, spread: float = 0.1, **options: Any) -> dict[str, Any]:
    steps = nfe // 2 if options.get("guidance", 1.0) != 1.0 else nfe
    return {
        "options": {"solver": solver, "steps": steps, **options},
        "nfe": nfe,
        "at_n": {
            "frechet": {"value": distance, "low": distance - spread, "high": distance + spread},
            "recall": {"value": 0.5},
        },
    }


POINTS = [
    point("unipc", 4, 1.45),
    point("ddim", 8, 1.3, eta=0.5),
    point("unipc", 10, 1.05, spacing="karras"),
    point("ddpm", 60, 1.0),
    point("dpmpp_2m", 8, 0.7, guidance=2.0),
    point("dpmpp_2m", 20, 0.5, guidance=2.0),
]


def written(folder: Path, tmp_path: Path, points: list[dict[str, Any]] = POINTS, **changes: Any) -> Path:
    """A copy of a model with measurements."""
    path = tmp_path / "measured"
    loaded = checkpoints.load(folder)
    checkpoints.save_folder(path, loaded.unet, SCHEDULE)
    content = {"format": 1, "model": weights_digest(loaded.unet.state_dict()), "n": 2000, "points": points, **changes}
    (path / measured.NAME).write_text(json.dumps(content))
    return path


def test_auto_quality_and_deadline_go_by_the_measurements(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    s = Sampler.from_pretrained(written(model, tmp_path), device="cpu", backend="eager")

    def table(**options: Any) -> solvers.StepTable:
        return s.sample(2, labels=3, **options).table

    def explicit(**options: Any) -> solvers.StepTable:
        return step_table(resolve(Options(**options), SCHEDULE, None)[0], SCHEDULE, "epsilon", s.scheduler_config)

    # d(p*) = 1.0, its interval ends at 1.1: 10 evaluations are the fewest within.
    with caplog.at_level("INFO", logger="fastdiff"):
        assert table(solver="auto") == explicit(solver="unipc", steps=10, spacing="karras")
    file = tmp_path / "measured" / measured.NAME
    said = [f"setting of {file}: unipc, karras spacing, 10 steps, 10 network evaluations"]
    assert [r.message for r in caplog.records] == said
    with caplog.at_level("WARNING", logger="fastdiff"):  # which users see
        assert table(quality=1) == explicit(solver="ddpm", steps=60)
    said.append(f"setting of {file}: ddpm, 60 steps, 60 network evaluations")
    assert [r.message for r in caplog.records] == said
    assert table(quality=1.1) == explicit(solver="unipc", steps=10, spacing="karras")
    assert table(quality=1.3) == explicit(solver="ddim", steps=8, eta=0.5)
    assert table(quality=2.0, solver="auto") == explicit(solver="unipc", steps=4)
    out = s.sample(2, labels=3, guidance=2.0, solver="auto")
    assert (out.table.solver, out.table.steps, out.nfe) == ("dpmpp_2m", 10, 20)
    assert s.sample(2, labels=3, guidance=2.0, quality=1.5).nfe == 8
    assert table(deadline_s=600) == explicit(solver="ddpm", steps=60)
    images = s.sample(2, labels=3, quality=1.1).images
    assert torch.equal(images, s.sample(2, labels=3, solver="unipc", steps=10, spacing="karras").images)
    assert len(list(s.stream(1, labels=3, quality=2.0))) == 4

    # What the measurements are not of goes by the general rule.
    assert table(solver="auto", steps=12).solver == "dpmpp_3m"
    assert table(solver="auto", guidance=1.7).steps == 20
    assert table(solver="auto", clip=None).steps == 20
    for options, why in (
        ({"quality": 0.9}, "at least 1"),
        ({"quality": math.nan}, "at least 1"),
        ({"quality": 1.1, "steps": 4}, "leave out steps="),
        ({"quality": 1.1, "solver": "unipc"}, "leave out solver="),
        ({"quality": 1.1, "deadline_s": 3}, "leave out quality="),
        ({"quality": 1.1, "guidance": 1.7}, "guidance 1, 2"),
        ({"quality": 1.1, "image": torch.zeros(1, 32, 32)}, "without image="),
        ({"deadline_s": 0}, "positive number of seconds"),
        ({"deadline_s": True}, "positive number of seconds"),
        ({"deadline_s": 5, "eta": 0.5}, "leave out eta="),
        ({"solver": "auto", "eta": 0.5}, "belongs to solver 'ddim'"),
        ({"solver": "auto", "order": 2}, "order=2"),
        ({"quality": 1.1, "compat": "diffusers"}, "leave out compat="),
        ({"deadline_s": 1e-9}, "the shortest setting, of 4 rows, takes about"),
    ):
        with pytest.raises(InvalidArgument, match=why):
            table(**options)


def test_what_fits_a_deadline(sampler: Sampler, model: Path, tmp_path: Path) -> None:
    """(deadline - elapsed) / (chunks * seconds) rows."""
    known = measured.read(written(model, tmp_path) / measured.NAME)
    chunks = len(sampler.request(20, labels=0, batch_size=8).chunks)
    assert chunks == 3

    def chosen(deadline: float, guidance: float = 1.0, known: measured.Measured | None = known) -> tuple[str, int]:
        options = Options(deadline_s=deadline, guidance=guidance, labels=0)
        got = choice.in_time(options, SCHEDULE, known, n=20, chunks=chunks, seconds=0.1, elapsed=1.0)
        assert got.deadline_s is None
        return str(got.solver), got.steps or 0

    assert chosen(1.0 + 3 * 0.1 * 59.9) == ("unipc", 10)
    assert chosen(1.0 + 3 * 0.1 * 60.1) == ("ddpm", 60)
    assert chosen(1.0 + 3 * 0.1 * 4.1) == ("unipc", 4)
    assert chosen(1.0 + 3 * 0.1 * 4.1, guidance=2.0) == ("dpmpp_2m", 4)  # 8 evaluations are 4 rows
    assert chosen(1.0 + 3 * 0.1 * 12.5, known=None) == ("auto", 12)
    assert chosen(1000.0, known=None) == ("auto", 100)
    with pytest.raises(InvalidArgument, match=r"of 4 rows, takes about 2\.2 s for 20 images"):
        chosen(1.0 + 3 * 0.1 * 3.9)
    edm = choice.in_time(Options(deadline_s=2.0), EDMSchedule(), None, n=20, chunks=chunks, seconds=0.1, elapsed=0.05)
    assert edm.steps == 3  # heun: 5 rows of the 6.5 that fit


def test_models_without_measurements(sampler: Sampler) -> None:
    with pytest.raises(InvalidArgument, match=r"no measurements; `fastdiff trilemma` makes them"):
        sampler.sample(1, labels=0, quality=1.1)
    assert sampler.measurements() is None
    out = sampler.sample(2, labels=0, deadline_s=120)
    assert (out.table.solver, out.nfe) == ("dpmpp_2m_sde", 100)  # all timesteps fit


def test_measurements_of_other_weights_are_left_aside(
    model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    s = Sampler.from_pretrained(written(model, tmp_path, model="0" * 64), device="cpu", backend="eager")
    for _ in range(2):
        assert s.sample(1, labels=0, solver="auto").table.steps == 20
    assert [r.message for r in caplog.records if "other weights" in r.message] == [
        f"{tmp_path / 'measured' / measured.NAME} was measured with other weights, and is left aside"
    ]
    assert s.measurements() is None
    assert s.measurements_file == tmp_path / "measured" / measured.NAME  # where new ones will be kept


def bad(**changes: Any) -> dict[str, Any]:
    return {**point("ddim", 4, 1.0), **changes}


@pytest.mark.parametrize(
    ("text", "needle"),
    [
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[]", "a JSON object"),
        ({"format": 2}, "format '2'"),
        ({"points": []}, "points must be a list"),
        ({"points": [bad()] * 10_001}, "points must be a list|refused"),
        ({"points": [3]}, "point 0"),
        ({"points": [bad(nfe=True)]}, "nfe True"),
        ({"points": [bad(nfe=-4)]}, "nfe -4"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "callback": "x"})]}, "option callback"),
        ({"points": [bad(options={"solver": ["ddim"], "steps": 4})]}, "option solver"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "eta": math.inf})]}, "finite"),
        ({"points": [bad(at_n={"frechet": {"value": math.nan, "low": 0, "high": 1}})]}, "NaN is no number"),
        ({"points": [bad(at_n={"frechet": {"value": 2, "low": 0, "high": 1}, "recall": {"value": 0}})]}, "of range"),
        ({"points": [bad(at_n={"frechet": {"value": 1, "low": 0, "high": 1}, "recall": {"value": 7}})]}, "of range"),
        ({"points": [bad(at_n={"frechet": {"value": math.inf, "low": 0, "high": 1}})]}, "finite"),
        ({"points": [bad(options={"solver": "magic", "steps": 4})]}, "option solver='magic': one of"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4.0})]}, "option steps"),
        ({"points": [bad(options={"solver": "ddim", "steps": 10**6})]}, "option steps"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "eta": -1})]}, "option eta"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "eta": 10**400})]}, "digits"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "spacing": "\x1b[2J"})]}, "option spacing"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "\x1b[2J": 1})]}, "cannot be printed"),
        ({"points": [bad(options={"solver": "ddim", "steps": 4, "guidance": "2"})]}, "option guidance"),
        ({"points": [bad(), bad(nfe=3)]}, "1 of 2 points are of settings that others are of"),
        ({"points": [bad(nfe=10**6)]}, "nfe 1000000"),
        ({"n": "many"}, "n a number"),
        ({"model": 7}, "model must be"),
    ],
    ids=str,
)  # fmt: skip
def test_damaged_and_hostile_measurements(model: Path, tmp_path: Path, text: Any, needle: str) -> None:
    path = written(model, tmp_path, **(text if isinstance(text, dict) else {}))
    if isinstance(text, str):
        (path / measured.NAME).write_text(text)
    with pytest.raises(CheckpointError, match=needle) as e:
        measured.read(path / measured.NAME)
    assert str(path / measured.NAME) in str(e.value)
    assert len(str(e.value)) < 2000


def test_a_file_that_lies_about_its_rows_is_refused(model: Path, tmp_path: Path) -> None:
    path = written(model, tmp_path, [bad(nfe=3)])
    s = Sampler.from_pretrained(path, device="cpu", backend="eager")
    with pytest.raises(CheckpointError, match="3 network evaluations, but has 4 rows"):
        s.sample(1, labels=0, solver="auto")
    (path / measured.NAME).write_text("{")
    s = Sampler.from_pretrained(path, device="cpu", backend="eager")
    with pytest.raises(CheckpointError, match="not valid JSON"):
        s.sample(1, labels=0, quality=1.5)
    assert s.sample(1, labels=0, steps=2).nfe == 2  # which asks nothing of the file


def test_a_file_that_lies_is_found_out_before_a_deadline_too(model: Path, tmp_path: Path) -> None:
    path = written(model, tmp_path, [bad(options={"solver": "ddim", "steps": 90}, nfe=1)])
    s = Sampler.from_pretrained(path, device="cpu", backend="eager")
    for guidance in (1.0, [1.0]):
        with pytest.raises(CheckpointError, match="1 network evaluations, but has 90 rows"):
            s.sample(1, labels=0, deadline_s=600, guidance=guidance)


def test_auto_takes_no_long_setting_from_a_file(model: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file with the right fingerprint can come from anyone."""
    s = Sampler.from_pretrained(written(model, tmp_path, [point("ddpm", 1000, 0.1)]), device="cpu", backend="eager")
    assert s.request(1, labels=0, solver="auto").table.steps == 20
    assert [r.levelname for r in caplog.records] == ["WARNING"]
    assert f"{tmp_path / 'measured' / measured.NAME} has no setting of at most 250 rows" in caplog.text
    points = [point("ddpm", 1000, 0.1), point("ddim", 100, 0.5), point("unipc", 10, 2.0)]
    caplog.clear()
    s = Sampler.from_pretrained(written(model, tmp_path, points), device="cpu", backend="eager")
    assert s.request(1, labels=0, solver="auto").table.steps == 100
    assert [r.levelname for r in caplog.records] == ["WARNING"]  # as it is more than the default
    assert measured.NAME in caplog.text


def test_measurements_of_the_built_in_model_cannot_be_replaced(tmp_path: Path) -> None:
    shutil.copytree(checkpoints.loading.BUILTIN / "fashion-mnist", tmp_path / "copy")
    own = json.loads((tmp_path / "copy" / measured.NAME).read_text())
    own["points"] = [point("ddpm", 200, 0.0, spread=0.0)]
    (tmp_path / "copy" / measured.NAME).write_text(json.dumps(own))
    s = Sampler.from_pretrained(tmp_path / "copy", device="cpu", backend="eager")
    known, builtin = s.measurements(), checkpoints.loading.BUILTIN / "fashion-mnist" / measured.NAME
    assert known == measured.read(builtin)
    assert known is not None
    assert known.path == builtin


@given(st.lists(st.tuples(st.integers(1, 6), st.integers(1, 20), st.integers(0, 5)), min_size=1, max_size=12),
       st.integers(10, 40), st.integers(0, 8))  # fmt: skip
def test_choices_are_on_the_front(raw: list[tuple[int, int, int]], quality: int, rows: int) -> None:
    points = [measured.Point("ddim", nfe, nfe, d / 10, d / 20, d / 8, r / 5) for nfe, d, r in raw]
    coordinates = [(p.nfe, p.distance, -p.recall) for p in points]
    on_front = report.front([(float(nfe), d, r) for nfe, d, r in coordinates])
    front = [c for c, kept in zip(coordinates, on_front, strict=True) if kept]
    smallest = min(p.distance for p in points)
    for chosen, limit in (
        (measured.within(points, quality / 10), quality / 10 * smallest),
        (measured.automatic(points), measured.best(points).high),
    ):
        assert chosen.nfe == min(p.nfe for p in points if p.distance <= limit)
        assert (chosen.nfe, chosen.distance, -chosen.recall) in front
    fit = measured.fitting(points, rows)
    possible = [p.distance for p in points if p.nfe <= rows]
    assert (fit is None) == (not possible)
    assert fit is None or (fit.distance == min(possible) and fit.nfe <= rows)


def test_the_built_in_measurements() -> None:
    """They are of the weights that come with fastdiff, and each setting has the evaluations it was measured at."""
    s = Sampler.from_pretrained("fashion-mnist", device="cpu", backend="eager")
    known = s.measurements()
    assert known is not None
    assert {1.0, 2.0} <= set(known.guidances)
    for p in known.points:
        r = s.request(1, **{**p.options, "guidance": p.guidance, "labels": 0})
        assert (r.nfe, len(r.table)) == (p.nfe, p.rows)
    for guidance in (1.0, 2.0):
        points = known.at(guidance)
        out = s.sample(1, labels=3, guidance=guidance, solver="auto")
        assert out.nfe == measured.automatic(points).nfe
        assert s.sample(1, labels=3, guidance=guidance, quality=100).nfe == min(p.nfe for p in points)


def test_install_and_picture(sampler: Sampler, model: Path, data: list[str], tmp_path: Path) -> None:
    """A result, kept with the model, is what auto goes by; the picture is drawn of speeds, too."""
    s = Sampler.from_pretrained(checkpoint_of(tmp_path / "m", seed=3), device="cpu", backend="eager")
    points = grid.grid_points(s, ["ddim", "ddpm-g2"], [2, 4], 24)
    run.draw(s, tmp_path, points, 8, lambda text: None, {})
    found = report_of(s, tmp_path, points, data)
    assert "speed" not in found
    kept = {**found, "speed": {"ddim": {"batch": 8, "a": 0.5, "b": 0.1, "spread": 0.0}}}
    (tmp_path / "trilemma.json").write_text(json.dumps(kept))
    again = report_of(s, tmp_path, points, data)
    speeds = {e["name"]: e.get("images_per_s") for e in again["points"]}  # those of the last result stay
    assert speeds == {"ddim-2": pytest.approx(8 / 0.7), "ddpm-g2-2": None, "ddim-4": pytest.approx(8 / 0.9),
                      "ddpm-g2-4": None}  # fmt: skip
    (tmp_path / "trilemma.json").write_text(json.dumps({**kept, "machine": {"processor": "another"}}))
    assert "speed" not in report_of(s, tmp_path, points, data)
    run.install(found, s)
    known = s.measurements()
    assert known is not None
    assert sorted((p.nfe, p.guidance) for p in known.points) == [(2, 1.0), (2, 2.0), (4, 1.0), (4, 2.0)]
    assert s.sample(1, labels=0, quality=50.0).nfe == 2
    for entry in found["points"]:
        entry["images_per_s"] = 500 / entry["nfe"]
    picture.draw_picture(found, tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        colours = len(np.unique(np.asarray(drawn.convert("RGB")).reshape(-1, 3), axis=0))
    assert colours > 20
    lines = list(report.table(found))
    assert len(lines) == 2 + len(points) + 1
    loose = Sampler(random_unet(CONFIG), SCHEDULE, backend="eager")
    with pytest.raises(InvalidArgument, match="no folder"):
        run.install(found, loose)
