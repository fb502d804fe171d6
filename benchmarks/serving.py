"""Measure `fastdiff serve` under load, beside services that run whole requests.

    python -m benchmarks.serving fashion-mnist --traces alike,mixed --loads 0.5,0.7,0.9 --seeds 5 --out load.json
    python -m benchmarks.serving fashion-mnist --soak 10

All systems are `fastdiff serve`, with the same processes, threads, HTTP and files of images; they differ in what the
drawing process does with the requests:

    engine     fastdiff.Engine
    lock       one request after the other, by a Sampler
    batch      up to 8 requests of the same setting that come within 5 ms, together, by a Sampler
    diffusers  the same as batch, by diffusers' UNet2DModel with the same weights

LitServe is left out: it is not among the packages of the tests, so nobody would know whether its part still works.

A trace is a list of requests with the times at which they are sent. They are sent at those times by a process of its
own, however many answers are missing, and a latency counts from there, so a system that falls behind cannot slow the
trace down. A load of 1 is as much work as `lock` does without a pause; what a request takes alone is measured on it.

The report is JSON: for each trace, load and system the percentiles of latency over all requests and over small ones,
the share that is answered within 3 times what the request takes alone and 50 ms, images per second within that time,
and the rows of the network that were spent on clients that left; means over the seeds with 95 % intervals, and
differences from ``engine`` with theirs. It also has the time that an image's admission to a slot takes, and the time
that HTTP adds. Nothing else should run meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import collections
import contextlib
import dataclasses
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import torch
from torch import Tensor, nn

import fastdiff
from fastdiff import cli
from fastdiff.bench.machine import header
from fastdiff.bench.peers import diffusers_twin, without_class_image
from fastdiff.modes import plain_modes
from fastdiff.sampler import Sampler
from fastdiff.serving import process, worker
from fastdiff.serving.engine import Engine, Task
from fastdiff.unet import UNet

ROOT = Path(__file__).resolve().parent.parent
POLICY = "FASTDIFF_SERVING_POLICY"  # in the environment of a server
TOGETHER, WINDOW_S = 8, 0.005  # of a batch of requests
SMALL = 40  # image-steps of a small request at most
PATIENCE, SLACK_S = 3.0, 0.05  # what the latency of a request may be: so many times what it takes alone, and this
T95 = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}  # Student's, by the number

# Traces ---------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Kind:
    """Requests of a trace: numbers of images and of steps, shares that are guided and that leave, burstiness."""

    n: Sequence[int]
    steps: Sequence[int]
    guided: float = 0.0
    leave: float = 0.0  # share of clients that leave after a part of the time that the request takes alone
    shape: float = 1.0  # of the Gamma distribution of the pauses; 1 is a Poisson process, less comes in bursts


MIXED = Kind((1, 4, 16), (4, 10, 20, 50, 250))
KINDS = {
    "alike": Kind((1,), (20,)),
    "mixed": MIXED,
    "guided": dataclasses.replace(MIXED, guided=0.3),
    "bursts": dataclasses.replace(MIXED, shape=0.25),
    "leaving": dataclasses.replace(MIXED, leave=0.1),
}


@dataclasses.dataclass(frozen=True)
class Call:
    """A request: when it is sent, what it asks for, and after how many seconds its client leaves."""

    at: float
    n: int
    steps: int
    guidance: float
    seed: int
    leaves_after: float | None = None

    @property
    def shape(self) -> tuple[int, int, float]:
        """The values that its cost depends on."""
        return self.n, self.steps, self.guidance

    @property
    def rows(self) -> int:
        """Rows of the network."""
        return self.n * self.steps * (1 + (self.guidance != 1.0))

    def body(self, label: int | None) -> dict[str, Any]:
        """Return the body of the request."""
        fields = {"n": self.n, "steps": self.steps, "guidance": self.guidance, "seed": self.seed, "solver": "ddim"}
        return fields if label is None else {**fields, "label": label}


def shapes(kind: Kind) -> list[tuple[int, int, float]]:
    """Return every shape that a request of a trace can have."""
    return [(n, steps, g) for n in kind.n for steps in kind.steps for g in ((1.0, 2.0) if kind.guided else (1.0,))]


def trace(kind: Kind, load: float, alone: dict[tuple[int, int, float], float], jobs: int, seed: int) -> list[Call]:
    """Return a trace whose requests need ``load`` times the time in which they come."""
    draw = random.Random(seed)
    chosen = [
        (draw.choice(kind.n), draw.choice(kind.steps), 2.0 if draw.random() < kind.guided else 1.0) for _ in range(jobs)
    ]
    pause = statistics.fmean(alone[shape] for shape in chosen) / load
    now, calls = 0.0, []
    for i, shape in enumerate(chosen):
        now += draw.gammavariate(kind.shape, pause / kind.shape)
        leaves = draw.uniform(0.0, 1.0) * alone[shape] if draw.random() < kind.leave else None
        calls.append(Call(now, *shape, seed=i, leaves_after=leaves))
    return calls


async def replay(url: str, calls: Sequence[Call], label: int | None) -> list[dict[str, Any]]:
    """Send requests at their times; return the status and the latency of each, from when it should have been sent."""
    async with httpx.AsyncClient(base_url=url, timeout=None, limits=httpx.Limits(max_connections=None)) as client:
        begin = time.monotonic() + 0.2

        async def one(call: Call) -> dict[str, Any]:
            await asyncio.sleep(begin + call.at - time.monotonic())
            late = time.monotonic() - begin - call.at
            sending = client.post("/v1/images/generations", json=call.body(label))
            try:
                answer = await asyncio.wait_for(sending, call.leaves_after)
                status: int | None = answer.status_code
            except asyncio.TimeoutError:
                status = None  # the client has left
            return {"status": status, "seconds": time.monotonic() - begin - call.at, "sent_late_s": late}

        return await asyncio.gather(*map(one, calls))


# Systems --------------------------------------------------------------------------------------------------------------


class Lock(Engine):
    """Runs one request after the other, in the order in which they came, as a Sampler behind a lock does."""

    most, window_s = 1, 0.0

    @plain_modes()
    def _step(self) -> None:
        with self._changed:
            end = time.monotonic() + self.window_s
            while sum(t.ready for t in self._tasks) < self.most and (left := end - time.monotonic()) > 0.0:
                self._changed.wait(left)
            tasks = [task for task in self._tasks if task.ready]
        alike: dict[Any, list[Task]] = collections.defaultdict(list)
        for task in tasks:
            if task.job.done():
                self._retire(task)
            elif sum(map(len, alike.values())) < self.most:
                r = task.request
                alike[id(r.table), tuple(sorted(set(r.guidance.tolist())))].append(task)
        for group in alike.values():
            self._draw_together(group)

    def _draw_together(self, tasks: list[Task]) -> None:
        """Draw all images of some requests, and finish these."""
        begin, of = time.monotonic(), [task.request for task in tasks]
        for task in tasks:
            task.job.begin()
            task.begun = task.request.n
        n = sum(r.n for r in of)
        labels = torch.cat([r.labels for r in of if r.labels is not None]) if of[0].labels is not None else None
        together = dataclasses.replace(
            of[0], n=n, seed=tuple(s for r in of for s in r.seeds(range(r.n))), batch_size=n, labels=labels,
            index=tuple(i for r in of for i in r.index), guidance=np.concatenate([r.guidance for r in of]),
        )  # fmt: skip
        images = self._sampler._loop.run(together, None, False).images
        with self._changed:
            rows = sum(task.rows for task in tasks)
            self._counts.update(steps=len(of[0].table), image_steps=n * len(of[0].table), rows=rows)
            self._counts["busy_s"] += time.monotonic() - begin
        for task, part in zip(tasks, images.split([r.n for r in of]), strict=True):
            task.result, task.rows = part, 0
            self._finish(task)


class Batch(Lock):
    """Runs up to 8 requests together that come within 5 ms and have the same setting."""

    most, window_s = TOGETHER, WINDOW_S


class Twin(nn.Module):
    """diffusers' network with the weights of ``unet``, whose configuration it shows."""

    def __init__(self, unet: UNet):
        super().__init__()
        self.config, self.encoder = unet.config, unet.class_encoder
        self.behind = diffusers_twin(without_class_image(unet))
        self.shown: tuple[Tensor, Tensor] | None = None  # the last labels and their images

    def forward(self, x: Tensor, t: Tensor, class_labels: Tensor | None = None) -> Tensor:
        if self.encoder is not None and class_labels is not None:
            if self.shown is None or not torch.equal(self.shown[0], class_labels):
                self.shown = class_labels.clone(), self.encoder(class_labels, tuple(x.shape[2:]))
            c, class_labels = self.shown[1], None
            how = self.config.class_image
            x = x + c if how == "add" else x * (1 + c) if how == "multiply" else torch.cat([x, c], 1)
        found: Tensor = self.behind(x, t, class_labels=class_labels, return_dict=False)[0]
        return found


class Diffusers(Batch):
    """Runs requests as `Batch` does, by diffusers' network."""

    def __init__(self, model: str, *, determinism: str, backend: str, **options: Any):
        own = Sampler.from_pretrained(model, backend="eager")
        twin = Sampler(Twin(own.unet), own.schedule, prediction=own.prediction, backend="eager", device=own.device,
                       scheduler_config=own.scheduler_config, class_names=own.info.class_names)  # fmt: skip
        super().__init__(twin, **options)


SYSTEMS: dict[str, type[Engine]] = {"engine": Engine, "lock": Lock, "batch": Batch, "diffusers": Diffusers}


def enter(connection: Connection, setup: bytes, parent: int) -> None:
    """Run the drawing process of a server."""
    worker.Engine = SYSTEMS[os.environ[POLICY]]
    worker.main(connection, setup, parent)


@contextlib.contextmanager
def served(system: str, model: str) -> Iterator[Server]:
    """Run a server in processes of its own."""
    with tempfile.TemporaryDirectory() as folder:
        server = Server(system, model, Path(folder))
        try:
            yield server
        finally:
            server.process.send_signal(signal.SIGTERM)
            try:
                server.process.wait(60)
            except subprocess.TimeoutExpired:
                os.killpg(server.process.pid, signal.SIGKILL)


class Server:
    """A server of one system."""

    def __init__(self, system: str, model: str, folder: Path):
        out, log = folder / "out", folder / "log"
        command = [sys.executable, "-m", "benchmarks.serving", "serve", model, "--port", "0", "--max-queue-seconds",
                   "1e9", "--drain-seconds", "0", "--no-page"]  # fmt: skip
        with out.open("wb") as o, log.open("wb") as e:
            self.process = subprocess.Popen(
                command, stdout=o, stderr=e, cwd=ROOT, env={**os.environ, POLICY: system}, start_new_session=True
            )
        while b" at http" not in out.read_bytes():
            if self.process.poll() is not None:
                raise SystemExit(f"the server of {system} has ended: {log.read_text()}")
            time.sleep(0.02)
        self.url = out.read_text().rpartition(" at ")[2].strip()
        self.http = httpx.Client(base_url=self.url, timeout=None)
        facts = self.http.get("/v1/models").json()["data"][0]["fastdiff"]
        self.label = None if facts["classes"] is None else 0

    def ask(self, call: Call) -> httpx.Response:
        """Answer a request."""
        answer = self.http.post("/v1/images/generations", json=call.body(self.label))
        answer.raise_for_status()
        return answer

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        time.sleep(0.6)  # until the drawing process has reported it
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def replay(self, calls: Sequence[Call]) -> list[dict[str, Any]]:
        """Replay a trace from another process."""
        command = [sys.executable, "-m", "benchmarks.serving", "replay", self.url, json.dumps(self.label)]
        given = json.dumps([dataclasses.asdict(call) for call in calls])
        done = subprocess.run(command, input=given, capture_output=True, text=True, check=True, cwd=ROOT)
        results: list[dict[str, Any]] = json.loads(done.stdout)
        return results

    def pids(self) -> dict[str, int]:
        """Return the number of the process that answers and of the one that draws."""
        children = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split()
        drawing = [int(c) for c in children if b"spawn_main" in Path(f"/proc/{c}/cmdline").read_bytes()]
        return {"answering": self.process.pid, "drawing": drawing[0]}


# Figures --------------------------------------------------------------------------------------------------------------


def measure_alone(server: Server, wanted: Sequence[tuple[int, int, float]]) -> dict[tuple[int, int, float], float]:
    """Return the seconds that a request of each shape takes on a server without load: the median of three."""
    found = {}
    for n, steps, guidance in wanted:
        times = []
        for seed in range(4):
            begin = time.monotonic()
            server.ask(Call(0.0, n, steps, guidance, seed))
            times.append(time.monotonic() - begin)
        found[n, steps, guidance] = statistics.median(times[1:])
    return found


def summary(
    calls: Sequence[Call], results: Sequence[dict[str, Any]], alone: dict[tuple[int, int, float], float], rows: float
) -> dict[str, float]:
    """Return the figures of one replay; ``rows`` are those that the network has computed."""
    stayed = [(c, r) for c, r in zip(calls, results, strict=True) if c.leaves_after is None]
    latency = [r["seconds"] if r["status"] == 200 else float("inf") for _, r in stayed]
    small = [s for (c, _), s in zip(stayed, latency, strict=True) if c.n * c.steps <= SMALL]
    kept = [c.n for (c, _), s in zip(stayed, latency, strict=True) if s <= PATIENCE * alone[c.shape] + SLACK_S]
    ends = max((c.at + r["seconds"] for c, r in stayed), default=0.0)
    figures = {f"{name}p{p}_s": quantile(values, p / 100.0)
               for name, values in (("", latency), ("small_", small)) for p in (50, 95, 99)}  # fmt: skip
    useful = sum(c.rows for c, r in zip(calls, results, strict=True) if r["status"] == 200)
    return {
        **figures,
        "slowdown": statistics.fmean(s / alone[c.shape] for (c, _), s in zip(stayed, latency, strict=True)),
        "slo": len(kept) / len(stayed), "goodput_images_s": sum(kept) / ends, "wasted_rows": max(rows - useful, 0.0),
        "failed": sum(r["status"] != 200 for _, r in stayed), "sent_late_s": max(r["sent_late_s"] for r in results),
    }  # fmt: skip


def quantile(values: Sequence[float], q: float) -> float:
    """Return the smallest value that a share q of the values does not exceed."""
    ordered = sorted(values)
    return ordered[max(-int(-q * len(ordered) // 1) - 1, 0)] if ordered else float("nan")


def interval(values: Sequence[float]) -> dict[str, float]:
    """Return the mean of values over seeds, and half of its 95 % interval."""
    half = T95[len(values)] * statistics.stdev(values) / len(values) ** 0.5 if len(values) in T95 else float("nan")
    return {"mean": statistics.fmean(values), "half_interval": half}


def over_seeds(runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the figures of each system over the seeds, and how far the others' are from the engine's."""
    report: dict[str, Any] = {}
    for system, figures in runs.items():
        report[system] = {name: interval([f[name] for f in figures]) for name in figures[0]}
        if system != "engine" and "engine" in runs:
            report[system]["minus_engine"] = {
                name: interval([f[name] - e[name] for f, e in zip(figures, runs["engine"], strict=True)])
                for name in figures[0]
            }
    return report


def study(
    model: str, kinds: Sequence[str], loads: Sequence[float], seeds: int, jobs: int, systems: Sequence[str]
) -> dict[str, Any]:
    """Replay traces on every system, in turns."""
    wanted = list(dict.fromkeys(shape for kind in kinds for shape in shapes(KINDS[kind])))
    with served("lock", model) as server:
        alone = measure_alone(server, wanted)
    runs: dict[str, dict[str, list[dict[str, float]]]] = {}
    for seed in range(seeds):
        for system in systems:
            with served(system, model) as server:
                server.ask(Call(0.0, 1, 1, 1.0, 0))
                for kind in kinds:
                    for load in loads:
                        calls = trace(KINDS[kind], load, alone, jobs, seed)
                        before = server.metric("fastdiff_step_rows_sum")
                        results = server.replay(calls)
                        rows = server.metric("fastdiff_step_rows_sum") - before
                        figures = summary(calls, results, alone, rows)
                        runs.setdefault(f"{kind} at load {load:g}", {}).setdefault(system, []).append(figures)
                        print(f"{kind} {load:g} seed {seed} {system}: {figures}", file=sys.stderr)
    return {
        "alone_s": {f"n={n}, steps={steps}, guidance={g:g}": s for (n, steps, g), s in alone.items()},
        "traces": {name: over_seeds(by_system) for name, by_system in runs.items()},
        "left_out": {"litserve": "not among the packages of the tests"},
    }


def admission(model: str, repetitions: int) -> tuple[float, float]:
    """Return the median milliseconds of an image's admission to a slot, and of a call of `Engine.submit`."""
    admitted, submitted = [], []
    with Engine(model, max_queue_s=1e9) as engine:
        labels = None if engine.info.classes is None else 0
        table, slots = engine.sampler.request(1, steps=20, labels=labels).table, engine._stepper.slots
        coefficients, x = table.coefficients, torch.zeros(slots.state.x.shape[1:], dtype=torch.float32, device="cpu")
        for i in range(repetitions):
            begin = time.perf_counter()
            slot = slots.admit(x, table, seed=i, index=i, label=labels, guidance=2.0, coefficients=coefficients)
            admitted.append(time.perf_counter() - begin)
            slots.retire(slot)
        for i in range(repetitions):
            begin = time.perf_counter()
            job = engine.submit(1, steps=4, labels=labels, seed=i)
            submitted.append(time.perf_counter() - begin)
            job.result()
    return 1e3 * statistics.median(admitted), 1e3 * statistics.median(submitted)


def overheads(model: str, repetitions: int) -> dict[str, float]:
    """Return the times of `admission`, and what HTTP, the processes and files add to a small job, in the median."""
    admitted, submitted = admission(model, repetitions)
    added = []
    with served("engine", model) as server:
        for i in range(repetitions):
            begin = time.perf_counter()
            answer = server.ask(Call(0.0, 1, 4, 1.0, i))
            drawn = float(answer.headers["x-queue-ms"]) + float(answer.headers["x-run-ms"])
            added.append(1e3 * (time.perf_counter() - begin) - drawn)
    return {
        "admission_p50_ms": admitted, "submit_p50_ms": submitted, "http_adds_p50_ms": statistics.median(added)
    }  # fmt: skip


# Soak -----------------------------------------------------------------------------------------------------------------


def usage(pid: int) -> dict[str, int]:
    """Return a process's memory in KiB, its open files and its threads."""
    status = Path(f"/proc/{pid}/status").read_text()
    memory, threads = (int(status.partition(f"{name}:")[2].split()[0]) for name in ("VmRSS", "Threads"))
    return {"memory_kib": memory, "files": len(os.listdir(f"/proc/{pid}/fd")), "threads": threads}


def soak(server: Server, minutes: float) -> dict[str, Any]:
    """Send requests, streams and clients that leave, eight at a time; return what the processes hold over time.

    The first sixth of the time is not counted: caches fill.
    """
    asked: collections.Counter[str] = collections.Counter()

    def one(i: int) -> None:
        call = Call(0.0, 1 + i % 4, 1 + i % 20, 1.0, i)
        body = call.body(None if server.label is None else i % 3)
        if i % 5 == 0:
            asked["left"] += 1
            with contextlib.suppress(httpx.TimeoutException):
                large = {**body, "n": 64, "steps": 1000, "stream": i % 2 == 0}
                with server.http.stream("POST", "/v1/images/generations", json=large, timeout=0.05):
                    pass  # leaves as soon as the answer begins
        elif i % 5 == 1:
            asked["streams"] += 1
            many = {**body, "stream": True, "partial_images": 3}
            with server.http.stream("POST", "/v1/images/generations", json=many) as response:
                kinds = [line for line in response.iter_lines() if line.startswith("event:")]
                assert sum(kind.endswith(".completed") for kind in kinds) == call.n
        else:
            asked["answers"] += 1
            server.http.post("/v1/images/generations", json=body).raise_for_status()

    begin, i, samples = time.monotonic(), 0, []
    with ThreadPoolExecutor(8) as pool:
        while (now := time.monotonic() - begin) < 60.0 * minutes or len(samples) < 2:
            list(pool.map(one, range(i, i + 40)))
            i += 40
            if now >= 10.0 * minutes:
                samples.append({"seconds": now, **{name: usage(pid) for name, pid in server.pids().items()}})
    grown = {
        name: {key: samples[-1][name][key] - samples[0][name][key] for key in samples[0][name]}
        for name in ("answering", "drawing")
    }
    every = max(1, len(samples) // 100)
    return {"minutes": minutes, "asked": dict(asked), "grown": grown, "samples": samples[::every]}


def main() -> None:
    """Run a study, or one of the processes that it starts."""
    if sys.argv[1:2] == ["serve"]:
        from benchmarks import serving

        process.enter = serving.enter  # by a name that the new process can import
        process.HUNG_S = 1e9  # a whole request is one step of the other systems
        cli.main()
    if sys.argv[1:2] == ["replay"]:
        calls = [Call(**call) for call in json.load(sys.stdin)]
        print(json.dumps(asyncio.run(replay(sys.argv[2], calls, json.loads(sys.argv[3])))))
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--traces", default=",".join(KINDS), help=f"of {', '.join(KINDS)}")
    parser.add_argument("--loads", default="0.5,0.7,0.9,1.1")
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=200, help="requests of a trace")
    parser.add_argument("--systems", default=",".join(SYSTEMS), help=f"of {', '.join(SYSTEMS)}")
    parser.add_argument("--repetitions", type=int, default=100, help="of the measurement of overheads")
    parser.add_argument("--soak", type=float, metavar="MINUTES", help="run for so long, and watch what processes hold")
    parser.add_argument("--out", type=Path, help="file of the report; without, it is printed")
    a = parser.parse_args()
    report: dict[str, Any] = {"machine": header(), "fastdiff": fastdiff.__version__, "model": a.model}
    if a.soak is not None:
        with served("engine", a.model) as server:
            report["soak"] = soak(server, a.soak)
    else:
        kinds, systems = a.traces.split(","), a.systems.split(",")
        if unknown := {*kinds} - KINDS.keys() | ({*systems} - SYSTEMS.keys()):
            parser.error(f"unknown: {', '.join(sorted(unknown))}")
        report["overheads"] = overheads(a.model, a.repetitions)
        report |= study(a.model, kinds, [float(x) for x in a.loads.split(",")], a.seeds, a.jobs, systems)
    text = json.dumps(report, indent=1)
    if a.out is None:
        print(text)
    else:
        a.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
