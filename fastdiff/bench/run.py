"""The measurement: every contender is made, checked against float64, and takes its turns; finished results are kept.

A result is a dictionary, written as JSON:

    {"model", "what", "guidance", "turn_s", "image", "parameters", "machine": {...}, "batches": [
        {"batch", "anchor", "engines": {name: {"dtype", "error", "first_call_s", "peak_mib", "seconds", "spread",
                                               "img_steps_per_s", "ratio": {...}, "predicted", "finished"}},
         "red": {name: reason}, "absent": {name: reason}, "rounds": [{name: seconds a step}], "shares", "noise",
         "limits": {dtype: img-steps/s}}]}
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.backends.native import cost
from fastdiff.bench import machine, networks, timing
from fastdiff.bench.engines import ANCHORS, CONTENDERS
from fastdiff.bench.inputs import Contender, Workload
from fastdiff.bench.networks import Model
from fastdiff.bench.worker import Absent, Ready, Task, Worker
from fastdiff.checkpoints.reading import read_json
from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.files import write_text

# The largest error of the network's output, relative to float64. The update is computed in float32 by all contenders.
ALLOWED_ERROR = {"float32": 1e-4, "bfloat16": 1e-1}
ALLOWED_UPDATE_ERROR = 1e-3
# The pause before a turn: thread pools of the previous contender spin for up to tens of milliseconds.
QUIET_S = 0.1

Say = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Settings:
    """The options of a measurement; see `fastdiff bench --help`."""

    model: str  # a name or path that `networks.load` takes
    batches: tuple[int, ...] = (1, 8, 32)
    engines: tuple[str, ...] = ()  # names of contenders; empty for all that run on the device
    what: str = "step"  # or "network" for the network without the update
    guidance: float | None = None  # the weight w of guided steps, which have two network rows an image
    device: str = "cpu"
    turn_s: float = 0.4  # seconds of a contender's turn
    most_rounds: int = 40

    def __post_init__(self) -> None:
        if not self.batches or min(self.batches) < 1 or len(set(self.batches)) < len(self.batches):
            raise InvalidArgument(f"batches {self.batches}: different numbers of at least 1 are needed")
        if self.most_rounds < 1:
            raise InvalidArgument(f"rounds {self.most_rounds}: at least 1 is needed")
        if self.guidance is not None and (not math.isfinite(self.guidance) or self.guidance == 1.0):
            raise InvalidArgument(f"guidance {self.guidance:g}: a number but 1, which is off, is needed")
        if self.guidance is not None and self.what != "step":
            raise InvalidArgument("guidance belongs to a step; the network alone is measured at twice the batch size")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise InvalidArgument(f"device {self.device!r}: cpu or cuda is needed")
        if self.device != "cpu" and not torch.cuda.is_available():
            raise InvalidArgument(f"device {self.device!r}: PyTorch finds no CUDA device here; use cpu")


def measure(
    settings: Settings,
    save: Path | None = None,
    contenders: Mapping[str, Contender] = CONTENDERS,
    say: Say = lambda _: None,
) -> dict[str, Any]:
    """Measure all batches; if Ctrl-C ends it early, the result has the key "interrupted".

    The file ``save`` keeps what is finished, round by round. If it holds a result of the same model, settings and
    machine, measured by the same code, that result is continued; its batches and contenders stay in it. If it holds
    another result, this raises `InvalidArgument`.
    """
    unknown = [name for name in settings.engines if name not in contenders]
    if unknown:
        raise InvalidArgument(f"no engine is named {', '.join(unknown)}; there are {', '.join(contenders)}")
    model = networks.load(settings.model)
    result = _begin(settings, model, save)

    def keep() -> None:
        if save is not None:
            write_text(save, json.dumps(result, indent=1) + "\n")

    try:
        for batch in settings.batches:
            record = next((r for r in result["batches"] if r["batch"] == batch), None)
            if record is None:
                record = {"batch": batch, "anchor": None, "engines": {}, "red": {}, "absent": {}, "rounds": [],
                          "shares": [], "noise": []}  # fmt: skip
                result["batches"].append(record)
            if settings.device == "cpu":
                record["limits"], predicted = expected(model, batch, settings.guidance)
            _measure_batch(settings, record, model, contenders, keep, say)
            for name, entry in record["engines"].items():
                if settings.device == "cpu" and name in predicted:
                    entry["predicted"] = predicted[name]
    except KeyboardInterrupt:
        result["interrupted"] = True
    for record in result["batches"]:
        summarise(record)
    keep()
    return result


def _begin(settings: Settings, model: Model, save: Path | None) -> dict[str, Any]:
    workload = Workload.of(model, 1, guidance=settings.guidance)
    result: dict[str, Any] = {
        "model": settings.model,
        "what": settings.what,
        "guidance": settings.guidance,
        "turn_s": settings.turn_s,
        "image": list(workload.x.shape[1:]),
        "parameters": sum(p.numel() for p in model.unet.parameters()),
        "machine": machine.header(settings.device),
        "batches": [],
    }
    if save is None or not save.exists():
        return result
    kept = read(save)
    keys = [key for key in result if key not in ("machine", "batches") and kept.get(key) != result[key]]
    other = [f"{key} {kept.get(key)}, now {result[key]}" for key in keys]
    other += machine.differences(result["machine"], kept["machine"])
    if kept["machine"].get("code") != result["machine"]["code"]:
        other.append("fastdiff's code has changed")
    if other:
        raise InvalidArgument(f"{save} holds another result ({'; '.join(other)}); save to another file, or remove it")
    kept.pop("interrupted", None)
    return kept


MAX_RESULT = 16 << 20  # bytes of a saved result


def read(path: Path) -> dict[str, Any]:
    """Read a result; a file that holds none raises `InvalidArgument`."""
    try:
        result = read_json(path, MAX_RESULT)
        if not {"machine", "batches", "model"} <= result.keys():
            raise ValueError("keys are missing")
        for record in result["batches"]:
            summarise(record)
    except (CheckpointError, ValueError, KeyError, TypeError, AttributeError) as e:
        raise InvalidArgument(f"{path} is no result of `fastdiff bench --save` ({e})") from e
    return result


def expected(model: Model, batch: int, guidance: float | None = None) -> tuple[dict[str, float], dict[str, float]]:
    """Compute limits and predictions for the native engine, in img-steps/s; a guided image is two network rows.

    At the limit of a dtype the multiplications alone (those of the chosen algorithms, Winograd's savings included)
    would run at the machine's peak. The speed of each native engine is predicted by `fastdiff.backends.native.cost`.
    Both results are empty if the native engine is not built.
    """
    with torch.device("meta"):
        unet = type(model.unet)(model.unet.config)  # type: ignore[arg-type]  # each has the configuration of its kind
    _, _, height, width = Workload.of(model, 1).x.shape
    guided = guidance is not None
    limits, predicted = {}, {}
    for name, dtype in (("native", "float32"), ("native-bf16", "bfloat16"), ("native-bf16-fast", "bfloat16-fast")):
        estimate = cost.estimate(unet, (height, width), batch, 1 + guided, batch, dtype, guided=guided)
        if estimate.products is None or estimate.machine is None or estimate.img_steps_per_s is None:
            continue
        kind = dtype.removesuffix("-fast")
        limits[kind] = float(f"{batch * estimate.machine.gflops[kind] * 1e9 / estimate.products:.5g}")
        predicted[name] = float(f"{estimate.img_steps_per_s:.5g}")
    return limits, predicted


# A batch --------------------------------------------------------------------------------------------------------------


def _measure_batch(
    settings: Settings, record: dict[str, Any], model: Model, contenders: Mapping[str, Contender],
    keep: Callable[[], None], say: Say,
) -> None:  # fmt: skip
    """Complete a batch's record, so that every contender asked for is finished, red (wrong) or absent."""
    kind = settings.device.split(":")[0]
    names = settings.engines or tuple(name for name, contender in contenders.items() if kind in contender.where)
    open_ = [name for name in names if not record["engines"].get(name, {}).get("finished")]
    if not open_:
        return
    batch, anchor = record["batch"], record["anchor"]
    if anchor is not None and anchor not in open_:
        open_.append(anchor)
    task = Task(settings.model, batch, settings.what, torch.get_num_threads(), settings.device, settings.guidance)
    gate = Gate(model, batch, settings.guidance)
    workers: dict[str, Worker] = {}
    try:
        for name in open_:
            contender = contenders[name]
            say(f"batch {batch}: preparing {name}")
            for table in (record["red"], record["absent"]):
                table.pop(name, None)
            worker = workers[name] = Worker(contender, task)
            ready = worker.start()
            reason = _enter(record, name, contender, ready, gate)
            say(f"batch {batch}: {name}: {reason or _described(record['engines'][name])}")
            if reason is not None:
                workers.pop(name).stop()
            keep()
        if anchor not in workers:
            anchor = record["anchor"] = next((name for name in (*ANCHORS, *open_) if name in workers), None)
        if anchor in workers:
            _rounds(settings, record, workers, keep, say)
    finally:
        for worker in workers.values():
            worker.stop()


def _enter(record: dict[str, Any], name: str, contender: Contender, ready: Ready | Absent, gate: Gate) -> str | None:
    """Record a contender that has started; return the reason if it is not to be timed."""
    if isinstance(ready, Absent):
        record["absent"][name] = ready.reason
        record["engines"].pop(name, None)
        return f"absent: {ready.reason}"
    error, wrong = gate.check(ready, contender.dtype)
    kept = record["engines"].get(name, {})
    record["engines"][name] = {
        "dtype": contender.dtype,
        "own": contender.own,
        "error": float(f"{error:.3g}"),
        "first_call_s": kept.get("first_call_s", round(ready.first_call_s, 3)),
        "peak_mib": ready.peak_mib,
        "finished": False,
    }
    if wrong is None:
        return None
    record["red"][name] = wrong
    for seconds in record["rounds"]:  # a wrong output has no speed, not even one measured earlier
        seconds.pop(name, None)
    return f"red: {wrong}"


def _described(entry: Mapping[str, Any]) -> str:
    return f"error {entry['error']:.1e}, first call {entry['first_call_s']:.1f} s"


def _rounds(
    settings: Settings, record: dict[str, Any], workers: dict[str, Worker], keep: Callable[[], None], say: Say
) -> None:
    """Run rounds until each contender's ratio to the anchor is settled or the limit of rounds is reached."""
    anchor = record["anchor"]
    active = list(workers)
    while active:
        shown = f"batch {record['batch']}: round {len(record['rounds']) + 1}"
        say(shown)
        time.sleep(QUIET_S)
        record["shares"].append(round(timing.share(torch.get_num_threads()), 4))
        seconds: dict[str, float] = {}
        order = [anchor, *(name for name in active if name != anchor)]
        # Every other round runs backwards, so that a machine that slows down does so for all alike.
        for name in order if len(record["rounds"]) % 2 == 0 else reversed(order):
            time.sleep(QUIET_S)
            answer = workers[name].turn(settings.turn_s)
            if isinstance(answer, Absent):
                record["absent"][name] = answer.reason
                record["engines"].pop(name)
                workers.pop(name).stop()
                active = [other for other in active if other != name]
                continue
            seconds[name] = float(f"{answer[0]:.6g}")
            record["engines"][name]["peak_mib"] = answer[1]
        record["rounds"].append(seconds)
        if anchor not in workers:
            say(f"batch {record['batch']}: {anchor}, which the others are measured by, failed")
            return
        ratios = pairs(record)
        for name in [name for name in active if name != anchor]:
            r = ratios[name]
            if r.settled or r.rounds >= settings.most_rounds:
                record["engines"][name]["finished"] = True
                active.remove(name)
        others = [name for name in active if name != anchor]
        alone = len(workers) == 1 and sum(anchor in s for s in record["rounds"]) >= timing.LEAST_ROUNDS
        if alone or (len(workers) > 1 and not others):
            record["engines"][anchor]["finished"] = True
            active = []
        summarise(record)
        keep()


def pairs(record: Mapping[str, Any], anchor: str | None = None) -> dict[str, timing.Ratio]:
    """Compute the ratio to the anchor of each contender that shared a round with it."""
    anchor = anchor or record["anchor"]
    found = {}
    for name in record["engines"]:
        both = [(s[anchor], s[name]) for s in record["rounds"] if anchor in s and name in s]
        if both:
            found[name] = timing.ratio(*zip(*both, strict=True))
    return found


def summarise(record: dict[str, Any]) -> None:
    """Compute medians, spreads, ratios and the verdict on noise from a batch's rounds.

    A speed is the anchor's median speed times the ratio. So all speeds refer to the same rounds, although contenders
    that settled early take no part in later rounds, in which the machine may be faster or slower.
    """
    anchor = record["anchor"]
    ratios = {} if anchor is None else pairs(record)
    for name, ratio in ratios.items():
        entry = record["engines"][name]
        seconds = statistics.median(s[anchor] for s in record["rounds"] if anchor in s) / ratio.median
        entry["seconds"] = float(f"{seconds:.6g}")
        entry["spread"] = round(timing.spread([s[name] for s in record["rounds"] if name in s]), 4)
        entry["img_steps_per_s"] = float(f"{record['batch'] / seconds:.5g}")
        entry["ratio"] = {k: round(v, 4) for k, v in dataclasses.asdict(ratio).items()}
    record["noise"] = timing.noise({n: r for n, r in ratios.items() if n != anchor}, record["shares"])


# Correctness ----------------------------------------------------------------------------------------------------------


class Gate:
    """The check of a contender's output against float64, for the first and the last image of a batch."""

    def __init__(self, model: Model, batch: int, guidance: float | None = None):
        workload = Workload.of(model, batch, guidance=guidance)
        self.x, self.table, self.guidance = workload.x[[0, -1]].double(), workload.table, guidance
        self.unet, self.label = model.unet, None if workload.label is None else workload.label[[0, -1]]
        self.null_label, self.inputs = workload.null_label, workload.inputs
        self._exact: torch.Tensor | None = None

    @torch.no_grad()
    def exact(self) -> torch.Tensor:
        """Compute the network's output at the first row, with guidance if there is any; later calls reuse it."""
        if self._exact is None:
            self._exact = self._network(self.label)
            if self.guidance is not None and self.label is not None:
                u = self._network(torch.full_like(self.label, self.null_label or 0))
                w = torch.full((2,), self.guidance, dtype=torch.float64, device="cpu")
                self._exact = update.guide(self._exact, u, w, self.x.shape[1], 0.0)
        return self._exact

    def _network(self, label: torch.Tensor | None) -> torch.Tensor:
        unet, t = self.unet.double(), torch.full((2,), self.table.rows[0].t, dtype=torch.float64, device="cpu")
        given = {k: v.double() if v.is_floating_point() else v for k, v in self.inputs(label).items()}
        return unet(self.x, t, **given)

    def check(self, ready: Ready, dtype: str) -> tuple[float, str | None]:
        """Return the network's error ||out - exact|| / ||exact||, and a description of what is wrong, or None.

        The update is judged apart from the network, from the contender's own output ``out``:
        ||x - x(out)|| / ||x(out) - x_0||, relative to the change that the step makes.
        """
        exact = self.exact()
        out, x = torch.from_numpy(ready.out).double(), torch.from_numpy(ready.x).double()
        if out.shape != exact.shape or x.shape != self.x.shape:
            return float("inf"), f"its output is {list(out.shape)}, {list(exact.shape)} is right"
        error = float((out - exact).norm() / exact.norm())
        if not error <= ALLOWED_ERROR[dtype]:
            return error, f"error {error:.1e} against float64, at most {ALLOWED_ERROR[dtype]:.0e} in {dtype}"
        state = State.create(self.x.clone(), TableBank([self.table], self.x.device, torch.float64))
        state.out = out
        update.update(state)
        moved = float((x - state.x).norm() / (state.x - self.x).norm())
        if not moved <= ALLOWED_UPDATE_ERROR:
            return error, f"error {moved:.1e} of the update, at most {ALLOWED_UPDATE_ERROR:.0e}"
        return error, None
