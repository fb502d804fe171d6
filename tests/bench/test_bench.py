"""`fastdiff bench` catches wrong and slowed kernels, reports noise, and keeps what is finished."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastdiff import checkpoint, cli
from fastdiff.backends import native
from fastdiff.bench import command, engines, job, machine, networks, peers, profile, report, run, timing, worker
from fastdiff.bench.engines import CONTENDERS
from fastdiff.bench.inputs import Contender, Make, Workload
from fastdiff.bench.peers import GraphStepper, PeerStepper
from fastdiff.bench.worker import Absent, Ready, Task, Worker
from fastdiff.errors import BackendError, CheckpointError, InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNetConditionConfig
from tests.support import bench_engines
from tests.support.conditions import TINY as CONDITION
from tests.support.unets import TINY_CLASSES, change, random_unet, relative_error

HAS_NATIVE = native.extension() is not None


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("model") / "tiny"
    checkpoint.save_folder(path, random_unet(TINY_CLASSES), NoiseSchedule("linear", 100, beta_end=0.1))
    return str(path)


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let few rounds suffice, as the verdict on noise is not tested here."""
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 3)
    monkeypatch.setattr(timing, "share", lambda threads: 1.0)


class Here(Worker):
    """A worker in this process, as starting another and importing torch there takes seconds."""

    def __init__(self, contender: Contender, task: Task):
        self.contender, self.task = contender, task

    def start(self) -> Ready | Absent:
        try:
            self.stepper, self.memory, ready = worker._prepare(self.contender, self.task)
        except BackendError as e:
            return Absent(str(e))
        return ready

    def turn(self, seconds: float) -> tuple[float, float | None] | Absent:
        return timing.mean_seconds(self.stepper.step, seconds, 2), self.memory.peak_mib()

    def stop(self) -> None:
        pass


@pytest.fixture
def _here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "Worker", Here)


def settings(model: str, *names: str, **options: Any) -> run.Settings:
    return run.Settings(model, **{"batches": (2,), "engines": names, "turn_s": 0.02, "most_rounds": 3, **options})


# Noise ----------------------------------------------------------------------------------------------------------------


def series(n: int, seed: int, noise: float) -> np.ndarray:
    return np.exp(noise * np.random.default_rng(seed).standard_normal(n))


def verdict(anchor: np.ndarray, engine: np.ndarray, shares: list[float] | None = None) -> list[str]:
    return timing.noise({"x": timing.ratio(list(anchor), list(engine))}, shares or [1.0])


@pytest.fixture
def _whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 7)


@pytest.mark.usefixtures("_whole")
def test_a_quiet_machine_is_believed() -> None:
    r = timing.ratio(list(series(9, 0, 0.01)), list(0.5 * series(9, 1, 0.01)))
    assert r.median == pytest.approx(2.0, rel=0.02)
    assert r.low <= r.median <= r.high
    assert r.settled
    assert verdict(series(9, 0, 0.01), 0.5 * series(9, 1, 0.01)) == []


@pytest.mark.usefixtures("_whole")
def test_a_drift_that_all_share_does_no_harm() -> None:
    """The machine becomes three times as slow: each engine's spread is huge, the ratio is what it was."""
    drift = np.linspace(1, 3, 12)
    anchor, engine = drift * series(12, 0, 0.01), 0.25 * drift * series(12, 1, 0.01)
    assert timing.spread(list(engine)) > 0.3
    assert timing.ratio(list(anchor), list(engine)).median == pytest.approx(4.0, rel=0.02)
    assert verdict(anchor, engine) == []


@pytest.mark.usefixtures("_whole")
def test_a_drift_of_one_engine_is_told() -> None:
    anchor, engine = series(20, 0, 0.001), series(20, 1, 0.001)
    engine[10:] *= 1.1
    assert "x: " in " ".join(verdict(anchor, engine))


@pytest.mark.usefixtures("_whole")
@pytest.mark.parametrize("share", [0.4, 0.5])
def test_bursts_are_told(share: float) -> None:
    """So many of the rounds have something else in the middle of one engine's turn."""
    for seed in range(5):
        anchor, engine = series(15, seed, 0.01), series(15, seed + 100, 0.01)
        hit = np.random.default_rng(seed).permutation(15)[: round(share * 15)]
        engine[hit] *= 1.6
        assert verdict(anchor, engine), seed


@pytest.mark.usefixtures("_whole")
def test_a_rare_burst_does_not_matter() -> None:
    anchor, engine = series(15, 0, 0.01), series(15, 1, 0.01)
    engine[[3, 9]] *= 2
    assert verdict(anchor, engine) == []
    assert timing.ratio(list(anchor), list(engine)).median == pytest.approx(1.0, rel=0.02)


@pytest.mark.usefixtures("_whole")
def test_two_runs_that_are_believed_agree() -> None:
    """Compare 40 pairs of synthetic runs that settled: all but one in twenty agree within 5 %."""

    def settle(seed: int) -> float:
        for n in range(7, 200):
            r = timing.ratio(list(series(n, seed, 0.03)), list(series(n, seed + 1000, 0.03)))
            if r.settled:
                return r.median
        raise AssertionError("never settled")

    apart = [abs(settle(2 * i) / settle(2 * i + 1) - 1) for i in range(40)]
    assert sum(a > 0.05 for a in apart) <= 2


@pytest.mark.usefixtures("_whole")
def test_a_constant_neighbour_is_told() -> None:
    """It widens no interval; only the processors' time shows it."""
    quiet = series(9, 0, 0.005)
    assert verdict(quiet, quiet, [0.7] * 9) == ["other processes took 30% of the processors' time"]
    assert verdict(quiet, quiet, [0.99] * 8 + [0.5]) == []


@pytest.mark.usefixtures("_whole")
def test_few_rounds_are_no_verdict() -> None:
    assert verdict(series(3, 0, 0.0), series(3, 0, 0.0)) == ["x: 3 rounds only, at least 7 are needed"]


def test_share_is_of_the_processors_time() -> None:
    shares = timing_share(1)
    assert 0.05 < shares <= 1.02


timing_share = timing.share  # as it is: the fixture replaces it


# The gate -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(
    ("make", "said"),
    [
        (bench_engines.wrong, "against float64"),
        (bench_engines.wrong_update, "of the update"),
        (bench_engines.nan, "against float64"),
    ],
)
def test_a_wrong_kernel_gets_no_speed(
    make: Make, said: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its output, or what a step makes of that, is 1 % off in one image: the command prints no speed of it, exit 1."""
    table = {"native": Contender("float32", make, own=True), "eager": CONTENDERS["eager"]}
    monkeypatch.setattr(command, "CONTENDERS", table)
    monkeypatch.setattr(sys, "argv", ["fastdiff", "bench", model, "--quick", "--batches", "2"])
    monkeypatch.setattr(command, "Settings", quickly(command.Settings))
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 1
    out = capsys.readouterr().out
    (line,) = [line for line in out.splitlines() if line.strip().startswith("native ")]
    assert re.search(r" RED +- +- +- +-$", line), line  # speed, spread, share of the limit, prediction, ratio
    assert said in out
    assert "eager" in out


@pytest.mark.usefixtures("_here")
@pytest.mark.parametrize(("processor", "expected"), [(True, {"eager", "half"}), (False, {"eager"})])
def test_bfloat16_is_left_out_where_it_would_be_emulated(
    processor: bool, expected: set[str], model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.machine, "multiplies_bfloat16", lambda: processor)
    half = dataclasses.replace(CONTENDERS["eager"], dtype="bfloat16")  # float32 by another name
    monkeypatch.setattr(command, "CONTENDERS", {"eager": CONTENDERS["eager"], "half": half})
    monkeypatch.setattr(command, "Settings", quickly(command.Settings))
    for more, names in (([], expected), (["--engines", "half"], {"half"})):
        monkeypatch.setattr(sys, "argv", ["fastdiff", "bench", model, "--quick", "--batches", "2", "--json", *more])
        with pytest.raises(SystemExit):
            cli.main()
        out, err = capsys.readouterr()
        assert set(json.loads(out)["batches"][0]["engines"]) == names
        assert ("half is left out" in err) == ("half" not in names)


def quickly(made: Any) -> Any:
    """Settings as the command makes them, but for time."""

    def make(*arguments: Any, **options: Any) -> run.Settings:
        return dataclasses.replace(made(*arguments, **options), turn_s=0.02, most_rounds=3)

    return make


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_here")
def test_guided_steps(model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The command measures them, says so in the table and in JSON, and a peer that leaves guidance out has no speed."""
    table = {"eager": CONTENDERS["eager"], "diffusers": CONTENDERS["diffusers"]}
    table["unguided"] = Contender("float32", bench_engines.unguided)
    monkeypatch.setattr(command, "CONTENDERS", table)
    monkeypatch.setattr(command, "Settings", quickly(command.Settings))
    arguments = ["fastdiff", "bench", model, "--quick", "--batches", "2", "--guidance", "2.5"]
    for options in ([], ["--json"]):
        monkeypatch.setattr(sys, "argv", arguments + options)
        with pytest.raises(SystemExit) as stop:
            cli.main()
        assert stop.value.code == 1
        out = capsys.readouterr().out
        if not options:
            assert "guided by 2.5 and one update (2 NFE)" in out
            continue
        printed = json.loads(out)
        assert printed["guidance"] == 2.5
        (record,) = printed["batches"]
        assert list(record["red"]) == ["unguided"]
        assert "against float64" in record["red"]["unguided"]
        for name in ("eager", "diffusers"):
            entry = record["engines"][name]
            assert entry["error"] < 1e-5
            assert entry["img_steps_per_s"] == pytest.approx(2 / entry["seconds"], rel=1e-3)  # of images, not of rows


@pytest.mark.skipif(not HAS_NATIVE, reason="the native engine is not built")
def test_a_guided_image_is_expected_to_cost_two_rows(model: str) -> None:
    """Half of what four images a batch do; the update is of two only, so a little more is predicted."""
    loaded = networks.load(model)
    limits, predicted = run.expected(loaded, 2, 2.5)
    limits_of_4, predicted_of_4 = run.expected(loaded, 4)
    for dtype, limit in limits.items():
        assert limit == pytest.approx(limits_of_4[dtype] / 2, rel=1e-3)
    for name, speed in predicted.items():
        assert 0.999 <= speed / (predicted_of_4[name] / 2) < 1.2  # both are rounded to five digits
    assert limits
    assert predicted


def test_guidance_needs_a_null_label(tmp_path: Path) -> None:
    for config in (change(), change(num_class_embeds=5)):
        checkpoint.save_folder(tmp_path / "m", random_unet(config), NoiseSchedule("linear", 100, beta_end=0.1))
        with pytest.raises(InvalidArgument, match="guidance 2 needs a network trained with label dropout"):
            run.measure(settings(str(tmp_path / "m"), "eager", guidance=2.0))


# Regressions ----------------------------------------------------------------------------------------------------------


@pytest.mark.alone
@pytest.mark.usefixtures("_here")
def test_a_slowed_kernel_is_a_regression(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same numbers with three evaluations in place of one: right, and told beside the saved result."""
    monkeypatch.setattr(command, "Settings", quickly(command.Settings))
    monkeypatch.setattr(timing, "LEAST_ROUNDS", 5)
    monkeypatch.setattr(timing, "SETTLED", 0.2)
    before = str(tmp_path / "before.json")

    def bench(make: Make, *options: str) -> tuple[int, str]:
        table = {"mine": Contender("float32", make, own=True), "diffusers": CONTENDERS["diffusers"]}
        monkeypatch.setattr(command, "CONTENDERS", table)
        monkeypatch.setattr(sys, "argv", ["fastdiff", "bench", model, "--batches", "2", *options])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        return int(stop.value.code or 0), capsys.readouterr().out

    same = bench_engines.EAGER.make
    assert bench(same, "--save", before)[0] == 0
    code, out = bench(bench_engines.slow, "--compare", before)
    assert code == 1
    assert "mine" in out
    assert ": WORSE" in out
    assert "RED" not in out


def result(ratio: float, noise: float = 0.002, anchor: str = "diffusers", seed: int = 0, **changes: Any) -> dict:
    """A result of two engines, ``mine`` so many times as fast as the anchor."""
    rounds = [
        {anchor: float(a), "mine": float(a / ratio * b)}
        for a, b in zip(series(9, seed, 0.2), series(9, seed + 1, noise), strict=True)
    ]
    entry = {"dtype": "float32", "error": 1e-6, "first_call_s": 1.0, "peak_mib": None, "finished": True}
    record = {
        "batch": 2, "anchor": anchor, "red": {}, "absent": {}, "rounds": rounds, "shares": [1.0],
        "engines": {anchor: {**entry, "own": False}, "mine": {**entry, "own": True}},
    }  # fmt: skip
    run.summarise(record)
    header = {"processor": "p", "threads": 2, "code": "x", "versions": {"torch": "2.13"}}
    return {"model": "m", "what": "step", "machine": header, "image": [1, 8, 8], "parameters": 9, "turn_s": 0.1,
            "batches": [record], **changes}  # fmt: skip


@pytest.mark.parametrize(
    ("now", "worse", "said"),
    [
        (2.0, 0, "within the noise"),
        (1.93, 0, "within the noise"),  # less than 5 %, however narrow the intervals
        (1.8, 1, "WORSE"),
        (2.3, 0, "better"),
    ],
)
def test_ratios_are_compared(now: float, worse: int, said: str) -> None:
    """The machine is 20 % up and down in the rounds; the ratio is not."""
    lines, count = report.compare(result(now, seed=3), result(2.0))
    assert count == worse
    assert said in lines[-1]


def test_a_change_within_the_noise_is_none() -> None:
    lines, count = report.compare(result(1.8, noise=0.3, seed=5), result(2.0, noise=0.3))
    assert count == 0
    assert "too noisy" in " ".join(lines)


def test_absolute_times_are_not_compared() -> None:
    now, before = result(2.0), result(2.0)
    for seconds in now["batches"][0]["rounds"]:
        for name in seconds:
            seconds[name] *= 10
    assert report.compare(now, before)[1] == 0


def test_a_gate_that_became_red_is_a_regression() -> None:
    now = result(2.0)
    now["batches"][0]["red"]["mine"] = "error 1e-2"
    assert report.compare(now, result(2.0))[1] == 1


def test_other_machines_are_told_and_other_models_refused() -> None:
    now = result(2.0)
    now["machine"] = {**now["machine"], "processor": "q", "versions": {"torch": "2.14"}}
    lines, _ = report.compare(now, result(2.0))
    assert "note: another machine: processor: p, now q" in lines
    assert "note: another machine: torch 2.13, now 2.14" in lines
    with pytest.raises(InvalidArgument, match="of model m and n cannot"):
        report.compare(result(2.0, model="n"), result(2.0))
    with pytest.raises(InvalidArgument, match=r"of guidance None and 2\.0 cannot"):
        report.compare(result(2.0, guidance=2.0), result(2.0))
    assert report.compare(result(2.0, guidance=2.0), result(2.0, guidance=2.0))[1] == 0


def test_without_a_common_peer_nothing_is_compared() -> None:
    lines, count = report.compare(result(2.0, anchor="diffusers"), result(2.0, anchor="openvino"))
    assert count == 0
    assert "nothing could be compared" in lines[-1]


# Keeping and going on -------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("_here")
def test_finished_engines_are_kept(model: str, tmp_path: Path) -> None:
    """A second call makes only what is missing, and the anchor that it is measured by; a third makes nothing."""
    save = tmp_path / "save.json"
    said: list[str] = []
    run.measure(settings(model, "eager"), save, say=said.append)
    first = json.loads(save.read_text())["batches"][0]
    assert first["engines"]["eager"]["finished"]
    said.clear()
    both = run.measure(settings(model, "eager", "eager-bf16"), save, say=said.append)["batches"][0]
    assert [line for line in said if "preparing" in line] == [
        "batch 2: preparing eager-bf16", "batch 2: preparing eager"
    ]  # fmt: skip
    assert both["rounds"][: len(first["rounds"])] == first["rounds"]
    assert both["engines"]["eager-bf16"]["finished"]
    said.clear()
    run.measure(settings(model, "eager-bf16"), save, say=said.append)
    assert said == []


@pytest.mark.usefixtures("_here")
def test_another_result_is_not_overwritten(model: str, tmp_path: Path) -> None:
    save = tmp_path / "save.json"
    run.measure(settings(model, "eager"), save)
    before = save.read_text()
    with pytest.raises(InvalidArgument, match=r"holds another result \(what step, now network"):
        run.measure(settings(model, "eager", what="network"), save)
    with pytest.raises(InvalidArgument, match=r"holds another result \(guidance None, now 2\.0"):
        run.measure(settings(model, "eager", guidance=2.0), save)
    changed = json.loads(before)
    changed["machine"]["code"] = "0"
    save.write_text(json.dumps(changed))
    with pytest.raises(InvalidArgument, match="code has changed"):
        run.measure(settings(model, "eager"), save)
    save.write_text("{}")
    with pytest.raises(InvalidArgument, match="no result of"):
        run.measure(settings(model, "eager"), save)


@pytest.mark.slow
@pytest.mark.usefixtures("_here")
def test_interrupted_it_prints_and_goes_on(model: str, tmp_path: Path) -> None:
    """Ctrl-C in a real process, in a round: exit code 130, the table so far, rounds kept; then the rest."""
    save = tmp_path / "save.json"
    arguments = [sys.executable, "-m", "fastdiff", "bench", model, "--engines", "eager,diffusers", "--batches", "2",
                 "--save", str(save), "--quick"]  # fmt: skip
    process = subprocess.Popen(
        arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stderr is not None
    for line in process.stderr:
        if "batch 2: round 2" in line:
            break
    os.killpg(process.pid, signal.SIGINT)  # as a terminal sends it: to the engines too
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "interrupted" in out
    assert "Traceback" not in err
    kept = json.loads(save.read_text())
    assert kept["interrupted"]
    assert len(kept["batches"][0]["rounds"]) >= 1
    after = run.measure(settings(model, "eager", "diffusers", batches=(2,), turn_s=0.2), save)
    assert after["batches"][0]["rounds"][0] == kept["batches"][0]["rounds"][0]
    assert after["batches"][0]["engines"]["eager"]["finished"]
    assert "interrupted" not in after


def test_a_worker_ends_with_its_pipe(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where what it answered last is never read, as Ctrl-C in a turn has it: no traceback, exit code 0."""
    monkeypatch.setattr(worker, "PATIENCE_S", 300.0)
    w = Worker(CONTENDERS["eager"], Task(model, 2, "step", 1, "cpu", None))
    assert isinstance(w.start(), Ready)
    w.pipe.send(0.01)
    assert w.pipe.poll(300)
    w.stop()
    assert w.process.exitcode == 0


def test_speeds_have_three_digits() -> None:
    told = {0.3417: "0.342", 1.624: "1.62", 33.397: "33.4", 99.96: "100.0", 105.54: "106", 1234.5: "1234"}
    assert {x: report._speed(x) for x in told} == told


def test_the_processor_is_told_by_generation(monkeypatch: pytest.MonkeyPatch) -> None:
    """One name stands for several; where the system does not tell, Python's word is taken."""
    lines = "processor\t: 0\ncpu family\t: 25\nmodel\t\t: 17\nmodel name\t: AMD EPYC\n\n"
    monkeypatch.setattr(Path, "read_text", lambda self: lines + lines.replace("17", "18"))
    assert machine.processor() == "AMD EPYC (family 25, model 17)"
    monkeypatch.setattr(Path, "read_text", lambda self: "processor\t: 0\nCPU part\t: 0xd0c\n")
    monkeypatch.setattr("platform.processor", lambda: "aarch64")
    assert machine.processor() == "aarch64"


# Engines --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_engines_that_fail_are_named_and_the_others_go_on(model: str) -> None:
    table = {
        "eager": CONTENDERS["eager"],
        "crash": Contender("float32", bench_engines.crash),
        "later": Contender("float32", bench_engines.crash_later),
        "refuse": Contender("float32", bench_engines.refuse),
        "missing": Contender("float32", bench_engines.refuse, needs=("a_module_that_is_not_there",)),
    }
    record = run.measure(settings(model, *table), contenders=table)["batches"][0]
    assert record["absent"] == {
        "crash": "its process ended with exit code 7",
        "later": "its process ended with exit code -9, as where memory runs out: fewer --engines at a time, and "
        "--save, which the next run adds to",
        "refuse": "RuntimeError: no such layer",
        "missing": "a_module_that_is_not_there cannot be imported (No module named 'a_module_that_is_not_there')",
    }
    assert list(record["engines"]) == ["eager"]
    assert record["engines"]["eager"]["img_steps_per_s"] > 0


NETWORKS: dict[str, tuple[Any, float | None]] = {
    "classes": (TINY_CLASSES, None),
    "guided": (TINY_CLASSES, 2.5),
    "class image": (change(TINY_CLASSES, class_image="concat"), None),
    "class image, guided": (change(TINY_CLASSES, class_image="concat"), 2.5),
    "variances, guided": (change(TINY_CLASSES, out_channels=6), 0.0),  # and guidance that is no false value
    "text": (UNetConditionConfig(**CONDITION), None),
    "text and a pooled vector, guided": (
        UNetConditionConfig(**CONDITION, class_embed_type="simple_projection", projection_class_embeddings_input_dim=6),
        2.5,
    ),
}


def model_of(config: Any) -> networks.Model:
    unet = networks.random_condition(config) if isinstance(config, UNetConditionConfig) else random_unet(config)
    return networks.Model(unet, NoiseSchedule("linear", 8), "epsilon", {}, Path("m"))


@pytest.mark.parametrize(
    ("name", "config", "guidance"),
    [
        # OpenVINO takes ten seconds to compile each network; of the others each has every second network.
        pytest.param(name, *NETWORKS[case], id=f"{name}, {case}", marks=[pytest.mark.slow] * slow)
        for i, name in enumerate(("native", "eager", "diffusers", "diffusers-last", "openvino"))
        for j, case in enumerate(NETWORKS)
        for slow in (name == "openvino" or (i + j) % 2 == 1,)
    ],
)
def test_engines_take_the_same_steps(name: str, config: Any, guidance: float | None) -> None:
    """Against float64, over the end of the table: the network's output, and x after each step."""
    if name == "native" and not HAS_NATIVE:
        pytest.skip("the native engine is not built")
    for module in CONTENDERS[name].needs:
        pytest.importorskip(module)
    warnings.simplefilter("ignore")  # the exporters' own, as in a worker

    model = model_of(config)
    workload = Workload.of(model, 3, guidance=guidance)
    assert len(workload.table) == 4
    exact = engines.backend(
        "eager", torch.float64, False, model_of(config), dataclasses.replace(workload, x=workload.x.double())
    )
    steps = CONTENDERS[name].make(model_of(config), workload)
    assert relative_error(steps.forward(), exact.forward()) < 1e-5
    for _ in range(6):
        assert relative_error(steps.step(), exact.step()) < 1e-5


@pytest.mark.slow
def test_openvino_runs_the_built_in_model() -> None:
    """In a process of its own, as its compiler crashes over a scale-shift network that is given as it is."""
    pytest.importorskip("openvino")
    process = Worker(CONTENDERS["openvino"], Task("fashion-mnist", 2, "step", 1, "cpu"))
    try:
        ready = process.start()
    finally:
        process.stop()
    assert not isinstance(ready, Absent), ready
    error, wrong = run.Gate(networks.load("fashion-mnist"), 2).check(ready, "float32")
    assert wrong is None
    assert error < 1e-5


def test_one_in_the_bias_is_the_same_network() -> None:
    """And the network that it was made of is what it was; one without scale-shift is itself, so its export is too."""
    unet = random_unet(change(TINY_CLASSES, resnet_time_scale_shift="scale_shift"))
    before = {key: value.clone() for key, value in unet.state_dict().items()}
    folded = peers.one_in_bias(unet)
    x, t, label = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 700.0]), torch.tensor([1, 4])
    assert relative_error(folded(x, t, class_labels=label), unet(x, t, class_labels=label)) < 1e-6
    assert all(torch.equal(unet.state_dict()[key], value) for key, value in before.items())
    biases = [k for k, v in folded.state_dict().items() if v.data_ptr() != unet.state_dict()[k].data_ptr()]
    assert biases == [key for key in before if key.endswith("time_emb_proj.bias")]
    plain = random_unet(TINY_CLASSES)
    assert peers.one_in_bias(plain) is plain


@pytest.mark.parametrize("guidance", [None, 2.5])
def test_what_a_cuda_graph_holds_takes_the_same_steps(guidance: float | None) -> None:
    """On a CPU, without the graph: coefficients by a row index on the device."""
    model = model_of(TINY_CLASSES)
    workload = Workload.of(model, 3, guidance=guidance)
    network = peers.plain(model.unet, torch.float32, workload)
    plain, graph = PeerStepper(network, model, workload), GraphStepper(network, model, workload)
    for _ in range(4):
        graph.device_step()
        assert relative_error(graph.x, plain.step()) < 1e-5
    assert int(graph.index) == 0


@pytest.mark.slow
def test_memory_is_the_engines_own(model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is none of the libraries', and a few thousand parameters need little."""
    monkeypatch.setattr(worker, "PATIENCE_S", 300.0)
    process = Worker(CONTENDERS["eager"], Task(model, 2, "step", 1, "cpu"))
    try:
        ready = process.start()
        assert not isinstance(ready, Absent)
        if sys.platform == "linux":
            assert ready.peak_mib is not None
            assert 0 <= ready.peak_mib < 100
        assert ready.first_call_s > 0
        assert not isinstance(process.turn(0.01), Absent)
    finally:
        process.stop()
    assert process.process.exitcode == 0  # of itself: its pipe was closed, as if its parent had ended


# The command ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command_in_a_process_of_its_own(model: str, tmp_path: Path) -> None:
    """JSON on standard output and nothing else, progress on standard error, a file that reads the same, a picture."""
    names = ["eager", "diffusers", *(["native"] if HAS_NATIVE else [])]
    done = subprocess.run(
        [sys.executable, "-m", "fastdiff", "bench", model, "--quick", "--rounds", "3", "--batches", "2",
         "--engines", ",".join(names),
         "--json", "--save", "a.json", "--plot", "a.png"],
        cwd=tmp_path, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = json.loads(done.stdout)
    assert printed == json.loads((tmp_path / "a.json").read_text())
    (record,) = printed["batches"]
    assert set(record["engines"]) == set(names)
    assert record["anchor"] == "diffusers"
    for name in names:
        entry = record["engines"][name]
        assert entry["error"] < 1e-5
        assert entry["img_steps_per_s"] == pytest.approx(2 / entry["seconds"], rel=1e-3)
    if HAS_NATIVE:
        assert record["limits"]["float32"] > record["engines"]["native"]["img_steps_per_s"]
        assert record["engines"]["native"]["predicted"] > 0
    assert "batch 2: preparing diffusers" in done.stderr
    with Image.open(tmp_path / "a.png") as picture:
        colours = len(picture.convert("RGB").getcolors(1 << 24))
    assert colours > 10


@pytest.mark.example
@pytest.mark.usefixtures("_here")
def test_examples(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In their order, as one compares with the one before; a tiny network, fewer engines and rounds."""
    unconditional = tmp_path / "plain"
    checkpoint.save_folder(unconditional, random_unet(change()), NoiseSchedule("linear", 100, beta_end=0.1))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "Settings", quickly(command.Settings))
    monkeypatch.setattr(command, "CONTENDERS", {name: CONTENDERS[name] for name in ("native", "eager", "diffusers")})
    found = re.findall(r"^ +(fastdiff bench.*)$", cli.bench.bench.__doc__ or "", re.MULTILINE)
    assert len(found) == 4
    for example in found:
        arguments = shlex.split(example)[1:]
        if "ddpm-cifar10-32" in arguments:
            arguments = ["bench", str(unconditional), *arguments[2:], "--n", "2", "--steps", "2"]
        else:
            arguments.insert(1, model)
        monkeypatch.setattr(sys, "argv", ["fastdiff", *arguments])
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr().out
        assert stop.value.code in ((0, 1) if "--compare" in arguments else (0,)), example  # rounds are few
        assert ("against new.json" in out) == ("--compare" in arguments)
    assert Path("new.png").stat().st_size > 0


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--engines", "nativ"], "no engine is named nativ; there are native, "),
        (["--batches", "0"], "at least 1"),
        (["--rounds", "0"], "at least 1"),
        (["--plot", "a.jpg"], "a .png file"),
        (["--device", "tpu"], "cpu or cuda"),
        (["--compare", "none.json"], "no result of"),
        (["--job", "--profile"], "other questions"),
        (["--job", "--save", "a.json"], "other questions"),
        (["--job", "--guidance", "2"], "other questions"),
        (["--guidance", "1"], "guidance 1: a number but 1"),
        (["--guidance", "nan"], "guidance nan: a number but 1"),
        (["--guidance", "2", "--network-only"], "guidance belongs to a step"),
    ],
)
def test_bad_options_are_refused_before_the_work(
    options: list[str], said: str, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["fastdiff", "bench", model, *options])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 2
    assert said in capsys.readouterr().err


def test_unknown_models_name_the_published_ones() -> None:
    with pytest.raises(CheckpointError, match="ddpm-cifar10-32, ddpm-celebahq-256"):
        networks.load("ddpm-cifar")


@pytest.mark.parametrize("config", [change(), TINY_CLASSES], ids=["pipeline", "loop with labels"])
def test_a_whole_job(config: Any, tmp_path: Path) -> None:
    folder = str(tmp_path / "m")
    checkpoint.save_folder(tmp_path / "m", random_unet(config), NoiseSchedule("linear", 100, beta_end=0.1))
    found = job.whole_job(folder, 2, 3, 1)["job"]
    assert {"diffusers", "diffusers, channels_last", "ratio"} <= found.keys()
    if config is not TINY_CLASSES:
        assert found["psnr"] > 60
        assert found["first"] > 0


@pytest.mark.skipif(not HAS_NATIVE, reason="the native engine is not built")
def test_a_profile_names_every_kind_of_operation(model: str) -> None:
    parts = profile.native_profile(model, 2, 3)
    assert list(parts.values()) == sorted(parts.values(), reverse=True)
    for kind in ("conv 3x3/1", "conv 3x3/2", "conv 1x1/1", "attention", "input"):
        assert any(key.startswith(kind) for key in parts), kind


def test_foreign_options_are_no_peers() -> None:
    with pytest.raises(BackendError, match="has no resample_shortcut"):
        peers.diffusers_twin(random_unet(change(resample_shortcut=True)))
