"""Everything that needs an NVIDIA GPU, in one command: checks, tuning and speeds. Offline, in the Python that runs it.

    python benchmarks/gpu.py                                  # make gpu
    python benchmarks/gpu.py --resume earlier/gpu.json        # goes on where an earlier call ran out of time
    python benchmarks/gpu.py --parts graphs,"cifar10 B=1" --diffusers folder/of/wheels
    python benchmarks/gpu.py --dry-run                        # on a CPU, tiny: the code, not the card

Writes gpu.json, gpu.md (the same to read) and the tuned launch configurations into --out, else $FASTDIFF_GPU_OUT, else
$OUT, else out/gpu. Each part runs in a process of its own, so that an error, even one that costs the CUDA context,
loses that part alone; its traceback is in the JSON. A call ends within --seconds; what it did not reach waits for the
next. Nothing whose check is red gets a speed. Exit code: 0 all well, 1 something failed, 3 something was not reached.

In a dry run kernels are interpreted, torch.compile is left out, and CUDA graphs are those of tests/fake_cuda.py.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import time
import traceback
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
SMALLEST_SHARE = 45.0  # seconds that a part, or a contender, needs to be worth its start


@dataclasses.dataclass
class Run:
    """What a part knows of its call."""

    out: Path
    dry: bool
    ends: float  # on time.time's clock
    diffusers: Path | None
    finished: dict[str, Any]  # earlier parts

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def cuda(self) -> Any:
        """torch.cuda, or its stand-in."""
        import torch
        from fake_cuda import FakeCuda

        return FakeCuda() if self.dry else torch.cuda

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        import torch

        return function if self.dry else torch.compile(function, **options)

    @property
    def late(self) -> bool:
        return not self.dry and time.time() > self.ends - SMALLEST_SHARE

    def synchronize(self) -> None:
        import torch

        if not self.dry:
            torch.cuda.synchronize()


class Failure(Exception):
    """A check is red; ``result`` says which, beside what went well."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


# Time -----------------------------------------------------------------------------------------------------------------


def microseconds(run: Run, function: Callable[[], Any], repeats: int = 20) -> float:
    """Median time of a call whose operands are not in the L2 cache, by CUDA events."""
    import torch

    if run.dry:
        started = time.perf_counter()
        function()
        return (time.perf_counter() - started) * 1e6
    function()
    flushed = torch.empty(4 * torch.cuda.get_device_properties(0).L2_cache_size, dtype=torch.uint8, device="cuda")
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for before, after in events:
        flushed.zero_()
        before.record()
        function()
        after.record()
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in events) * 1e3


def seconds(run: Run, jobs: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Wall time of every job in rounds in which all take turns."""
    taken: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(rounds):
        for name, job in jobs.items():
            run.synchronize()
            started = time.perf_counter()
            job()
            run.synchronize()
            taken[name].append(time.perf_counter() - started)
    return taken


# Parts ----------------------------------------------------------------------------------------------------------------


def version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def header(run: Run) -> dict[str, Any]:
    """The machine, and its two ceilings as measured: a copy's bytes and a matrix product's FLOPs each second."""
    import torch

    result: dict[str, Any] = {
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "triton", "numpy", "diffusers")},
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    n, bytes_ = (64, 1 << 12) if run.dry else (8192, 1 << 30)
    if not run.dry:
        card = torch.cuda.get_device_properties(0)
        result |= {
            "device": card.name,
            "capability": f"{card.major}.{card.minor}",
            "processors": card.multi_processor_count,
            "L2_MiB": card.L2_cache_size >> 20,
            "memory_GiB": round(card.total_memory / 2**30, 1),
        }
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            result["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    a, b = (torch.randn(n, n, device=run.device).to(torch.bfloat16) for _ in range(2))
    source, target = (torch.empty(bytes_, dtype=torch.uint8, device=run.device).fill_(i) for i in range(2))
    result["bf16_tflops"] = round(2 * n**3 / microseconds(run, lambda: a @ b) / 1e6, 2)
    result["copy_GB_per_s"] = round(2 * bytes_ / microseconds(run, lambda: target.copy_(source)) / 1e3, 2)
    return result


def small_cases(run: Run) -> dict[str, Any]:
    """The kernels' cases by name; in a dry run the first of every kind."""
    from kernel_cases import CASES

    first = {name.split()[0].rstrip(","): name for name in reversed(CASES)}
    return {name: CASES[name] for name in CASES if not run.dry or name in first.values()}


def moved(value: Any, device: Any) -> Any:
    """Tensors, and tuples of them, on the device, strides kept; those on the meta device filled with numbers."""
    import torch

    if isinstance(value, tuple):
        return tuple(moved(v, device) for v in value)
    if not isinstance(value, torch.Tensor):
        return value
    there = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=device)
    if not value.is_meta:
        return there.copy_(value)
    return there.normal_() if value.is_floating_point() else there.zero_()


def kernels(run: Run) -> dict[str, Any]:
    """Every kernel against its reference in float64, over the small cases of the tests."""
    from kernel_harness import check, multiply_bfloat16

    no_tf32()
    if run.dry:
        multiply_bfloat16()
    ops: dict[str, dict[str, Any]] = {}
    failed: dict[str, str] = {}
    for name, build in small_cases(run).items():
        case = build()
        case = dataclasses.replace(case, arguments={k: moved(v, run.device) for k, v in case.arguments.items()})
        op = name.split()[0]
        try:
            op = case.launch().op
            share = max(check(case).values())
            entry = ops.setdefault(op, {"cases": 0, "error_as_share_of_allowed": 0.0})
            entry["cases"] += 1
            entry["error_as_share_of_allowed"] = max(entry["error_as_share_of_allowed"], round(share, 3))
        except Exception as e:
            failed[name] = f"{op}: {type(e).__name__}: {str(e)[:500]}"
            ops.setdefault(op, {"cases": 0, "error_as_share_of_allowed": 0.0})["failed"] = True
            if "CUDA error" in str(e):  # the context is lost
                break
    result = {"ops": ops, "failed": failed}
    if failed:
        raise Failure(f"{len(failed)} cases failed: {', '.join(failed)}", result)
    return result


def launches(run: Run) -> list[Any]:
    """One launch for each operation and shape that fastdiff ships, of operations whose checks are green."""
    from kernel_cases import SHIPPED

    from fastdiff.kernels.launch import Launch

    ops = run.finished.get("kernels", {}).get("result", {}).get("ops", {})
    made = [case().launch() for case in small_cases(run).values()] if run.dry else [make() for make in SHIPPED.values()]
    # Convolutions are tuned as layers, of one launch or several: `conv_layers`.
    made = [launch for launch in made if isinstance(launch, Launch) and launch.op not in ("conv.conv", "conv.partial")]
    if not any("failed" not in op for op in ops.values()):
        raise Failure("no kernel's check is green: the part `kernels` comes first", {})
    distinct = {
        (launch.op, launch.key): launch for launch in made if not ops.get(launch.op, {"failed": True}).get("failed")
    }
    # What heuristics choose is the starting point; a dry run's cases are of shapes that those do not meet.
    return [launch.remake(None) if launch.remake and not run.dry else launch for launch in distinct.values()]


def conv_layers(run: Run) -> Iterator[tuple[str, Any, tuple[Any, ...], Callable[[Any], Callable[[], None]]]]:
    """The published networks' distinct convolutions in bfloat16, as `fastdiff.backends.launches` has them: the key,
    what heuristics choose, all configurations, and the layer in one of them.
    """
    import torch
    from cases_conv import harvest, layer_case

    from fastdiff import UNet
    from fastdiff.bench.networks import PUBLISHED
    from fastdiff.kernels import conv
    from fastdiff.lower import lower

    cifar, celebahq = PUBLISHED["ddpm-cifar10-32"], PUBLISHED["ddpm-celebahq-256"]
    for config, rows in [(tiny(), 1)] if run.dry else [(cifar, 1), (cifar, 256), (celebahq, 1)]:
        with torch.device("meta"):
            program = lower(UNet(config), (config.sample_size, config.sample_size))
        for shape, words in harvest(program, rows).items():
            case = layer_case(shape, torch.bfloat16, " ".join(sorted(words)))
            arguments = {name: moved(value, run.device) for name, value in case.arguments.items()}

            def layer(config: Any, shape: Any = shape, arguments: Any = arguments) -> Callable[[], None]:
                operands = shape.laid_out(arguments, config)
                src, weight = operands["src"], operands["weight"]
                emitted = arguments.get("statistics") is not None
                need = conv.workspace(src, weight, shape.out, stride=shape.stride, statistics=emitted, config=config)
                given = operands | {"workspace": torch.empty(need, device=run.device) if need else None}
                made = conv.layer(**given, config=config)
                return lambda: [launch() for launch in made] and None

            problem = shape.problem(arguments)
            yield f"conv.layer {problem.key}", problem.choose_layer(), problem.layer_candidates, layer


def tuning(run: Run) -> dict[str, Any]:
    """The time of every configuration of every launch and convolution, out of the L2 cache; the best become a file."""
    import torch

    from fastdiff.kernels.launch import config_file, save_tuned

    rows: list[dict[str, Any]] = []
    best: dict[str, Any] = {}
    unfinished: list[str] = []
    refused: list[str] = []
    gpu = "dry run" if run.dry else torch.cuda.get_device_properties(0).name
    for launch in launches(run):
        key = f"{launch.op} {launch.key}"
        if run.late:
            unfinished.append(key)
            continue
        arguments = {name: moved(value, run.device) for name, value in launch.arguments.items()}
        tensors = [v for value in arguments.values() for v in (value if isinstance(value, tuple) else (value,))]
        moves = sum(t.numel() * t.element_size() for t in tensors if isinstance(t, torch.Tensor))
        times: dict[Any, float] = {}
        for config in launch.candidates[: 2 if run.dry else None]:
            other = launch.remake(config)
            own = {
                k: arguments[k] if torch.is_tensor(v) or isinstance(v, tuple) else v for k, v in other.arguments.items()
            }
            try:
                times[config] = microseconds(run, dataclasses.replace(other, arguments=own))
            except Exception as e:
                if "CUDA error" in str(e):  # the context is lost
                    raise
                refused.append(f"{key} {config}: {e}")  # too large for this card
        if not times:
            continue
        best[key] = min(times, key=times.__getitem__)
        rows.append(
            {
                "launch": key,
                "us": round(times[best[key]], 2),
                "heuristic_us": round(times[launch.config], 2) if launch.config in times else None,
                "config": dataclasses.asdict(best[key]),
                "GB_per_s_of_all_operands": round(moves / times[best[key]] / 1e3, 2),
            }
        )
        save_tuned(config_file(gpu, run.out), gpu, best)
    for key, chosen, configs, layer in conv_layers(run):
        if run.late:
            unfinished.append(key)
            continue
        times = {}
        for config in configs[: 2 if run.dry else None]:
            try:
                times[config] = microseconds(run, layer(config))
            except Exception as e:
                if "CUDA error" in str(e):  # the context is lost
                    raise
                refused.append(f"{key} {config}: {e}")
        if times:
            best[key] = min(times, key=times.__getitem__)
            row = {"launch": key, "us": round(times[best[key]], 2)}
            row |= {"heuristic_us": round(times[chosen], 2) if chosen in times else None}
            rows.append(row | {"config": dataclasses.asdict(best[key])})
    save_tuned(config_file(gpu, run.out), gpu, best)
    return {"launches": rows, "refused": refused, "unfinished": unfinished}


def unet_of(config: Any, dtype: Any, device: Any) -> Any:
    import torch

    from fastdiff.bench.networks import random_unet

    return random_unet(config).to(device=device, dtype=dtype).to(memory_format=torch.channels_last)


def tiny(**changes: Any) -> Any:
    from fastdiff import UNetConfig

    options: dict[str, Any] = {
        "sample_size": 8, "block_out_channels": (8, 16), "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D"), "layers_per_block": 1, "attention_head_dim": 8,
        "norm_num_groups": 4,
    }  # fmt: skip
    return UNetConfig(**options | changes)


CLASSES = {"num_class_embeds": 11, "null_label": 10}


def no_tf32() -> None:
    """TensorFloat-32 would be the largest error of what is called float32."""
    import torch

    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False


def runner_of(run: Run, backend: str, unet: Any, spec: Any, mode: str | None = None) -> Any:
    """The backend's runner; in a dry run `compiled` is a graph of eager steps, on the stand-in.

    `triton` has none there: tests/test_triton.py runs its launches.
    """
    from fastdiff import backends
    from fastdiff.backends import compiled
    from fastdiff.backends.eager import EagerRunner
    from fastdiff.backends.graph import GraphRunner

    if backend == "compiled" and run.dry:
        return GraphRunner(EagerRunner(unet, spec), unet, spec, cuda=run.cuda)
    return compiled.prepare(unet, spec, mode) if backend == "compiled" else backends.prepare(backend, unet, spec)


def on_gpu(run: Run) -> list[str]:
    from fastdiff.backends import BACKENDS

    return [name for name in BACKENDS if name != "native" and not (name == "triton" and run.dry)]


def start(n: int, shape: tuple[int, ...], table: Any, device: Any, dtype: Any, first: int = 0, **options: Any) -> Any:
    """Images ``first`` to first + n - 1 of seed 0, at row 0."""
    import torch

    from fastdiff import noise
    from fastdiff.state import State, TableBank

    i = torch.arange(first, first + n, device=device)
    x = noise.normal(torch.zeros_like(i), i, torch.zeros_like(i), noise.INITIAL, shape).to(dtype)
    return State.create(x, TableBank([table], device, dtype), index=i.tolist(), **options)


def relative(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def parity(run: Run) -> dict[str, Any]:
    """Whole networks (one evaluation) and whole runs against float64, with eager's own error in the same precision."""
    import torch

    from fastdiff import NoiseSchedule, UNet, solvers
    from fastdiff.backends import Spec
    from fastdiff.backends.eager import EagerRunner
    from fastdiff.bench.networks import PUBLISHED

    no_tf32()
    schedule, steps = NoiseSchedule(), 2 if run.dry else 10
    tables = [solver(schedule, steps) for solver in (solvers.ddim, solvers.ddpm, solvers.dpmpp_2m)]
    guided = {"label": [3, 9], "guidance": [2.0, 1.0]}
    if run.dry:
        plain, classes = (unet_of(tiny(**more), torch.float32, run.device) for more in ({}, CLASSES))
    else:
        plain = unet_of(PUBLISHED["ddpm-cifar10-32"], torch.float32, run.device)
        classes = UNet.from_pretrained("fashion-mnist").to(run.device)
    rows: list[dict[str, Any]] = []
    unfinished: list[str] = []

    def outcomes(unet: Any, backend: str, dtype: Any, options: dict[str, Any]) -> list[tuple[Any, Any]]:
        """For every table: the first evaluation's output, and the last x."""
        unet = copy.deepcopy(unet).to(dtype).to(memory_format=torch.channels_last)
        side = unet.config.sample_size
        shape = (unet.config.in_channels, side, side)
        spec = Spec(2, shape, dtype, run.device, null_label=unet.config.null_label)
        runner = EagerRunner(unet, spec) if backend == "eager" else runner_of(run, backend, unet, spec)
        wide, found = torch.float64 if dtype == torch.float64 else torch.float32, []
        for table in tables:
            state = start(2, shape, table, run.device, wide, **options)
            runner.forward(state)
            out = state.out.clone()
            while not state.done:
                runner.step(state)
            found.append((out, state.x.clone()))
        return found

    for name, unet, options in (("cifar10", plain, {}), ("fashion-mnist, guided", classes, guided)):
        exact = outcomes(unet, "eager", torch.float64, options)
        for dtype in (torch.float32, torch.bfloat16):
            eager: list[list[float]] = []
            for backend in on_gpu(run):  # eager is the first
                if run.late:
                    unfinished.append(f"{name}, {dtype}, {backend}")
                    continue
                got = outcomes(unet, backend, dtype, options)
                errors = [
                    [relative(*pair) for pair in zip(*both, strict=True)] for both in zip(got, exact, strict=True)
                ]
                eager = eager or errors
                for table, own, plain_own in zip(tables, errors, eager, strict=True):
                    row = {"network": name, "solver": table.solver, "dtype": str(dtype), "backend": backend}
                    row |= {"network_error": own[0], "run_error": own[1]}
                    row["ok"] = all(e <= 2 * other + 1e-6 for e, other in zip(own, plain_own, strict=True))
                    rows.append(row)
    result = {"rows": rows, "unfinished": unfinished}
    red = [row for row in rows if not row["ok"]]
    if red:
        raise Failure(f"{len(red)} of {len(rows)} comparisons are off by more than twice eager's error", result)
    return result


def graphs(run: Run) -> dict[str, Any]:
    """Replays of captured eager steps have the bits of eager steps; batch sizes share one pool. With determinism
    "bitwise" an image has the same bits in batches of 1 and 5: of `triton`, and in a dry run of `native`.
    """
    import torch

    from fastdiff import NoiseSchedule, solvers
    from fastdiff.backends import Spec, graph, native
    from fastdiff.backends.eager import EagerRunner

    no_tf32()
    schedule, shape = NoiseSchedule(), (3, 8, 8)
    cuda = run.cuda
    plain = unet_of(tiny(), torch.float32, run.device)
    classes = unet_of(tiny(**CLASSES), torch.float32, run.device)
    learned = unet_of(tiny(out_channels=6), torch.float32, run.device)
    guided = {"label": [1, 2, 3], "guidance": [3.0, 1.0, 0.5]}
    cases: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "ddim": (plain, solvers.ddim(schedule, 6), {}),
        "ddpm": (plain, solvers.ddpm(schedule, 6), {}),
        "history": (plain, solvers.dpmpp_3m(schedule, 6), {}),
        "saved input": (plain, solvers.heun(schedule, 4), {}),
        "learned range": (learned, solvers.ddpm(schedule, 6, variance="learned_range"), {}),
        "guided": (classes, solvers.ddim(schedule, 6).with_guidance_interval(0.3, 0.7), guided),
        "rescaled": (classes, solvers.ddim(schedule, 6), {**guided, "guidance_rescale": 0.7}),
    }
    same: dict[str, bool] = {}

    def compare(name: str, a: Any, b: Any) -> None:
        pairs = [(getattr(a, field), getattr(b, field)) for field in ("x", "row", "m1", "m2", "m3", "xs")]
        same[name] = same.get(name, True) and all(one is other or torch.equal(one, other) for one, other in pairs)

    for name, (unet, table, options) in cases.items():
        spec = Spec(3, shape, torch.float32, run.device, null_label=10)
        eager = EagerRunner(unet, spec)
        runner = graph.GraphRunner(eager, unet, spec, cuda=cuda)
        a, b = (start(3, shape, table, run.device, torch.float32, **options) for _ in range(2))
        while not a.done:
            eager.step(a)
            runner.step(b)
            compare(name, a, b)
    runners: dict[Any, Any] = {}
    before = 0 if run.dry else torch.cuda.memory_reserved()
    for n in (1, 16, 4):
        spec = Spec(n, shape, torch.float32, run.device)
        runner = graph.GraphRunner(EagerRunner(plain, spec), plain, spec, cuda=cuda)
        runners[runner] = start(n, shape, cases["ddim"][1], run.device, torch.float32)
    graph.capture(runners)
    pooled = 0 if run.dry else torch.cuda.memory_reserved() - before
    for _ in range(6):  # in turns
        for runner, state in runners.items():
            runner.step(state)
    for state in runners.values():
        twin = start(len(state.x), shape, cases["ddim"][1], run.device, torch.float32)
        eager = EagerRunner(plain, Spec(len(state.x), shape, torch.float32, run.device))
        while not twin.done:
            eager.step(twin)
        compare("batch sizes in turns", twin, state)

    def bitwise(n: int, first: int) -> Any:
        who = slice(first, first + n)
        labels, w = [1, 2, 3, 0, 9][who], [3.0, 1.0, 1.0, 0.5, 2.0][who]
        table = solvers.ddpm(schedule, 6).with_guidance_interval(0.3, 0.7)
        state = start(n, shape, table, run.device, torch.float32, first, label=labels, guidance=w)
        runner = runner_of(
            run, "native" if run.dry else "triton", classes,
            Spec(n, shape, torch.float32, run.device, null_label=10, determinism="bitwise"),
        )  # fmt: skip
        while not state.done:
            runner.step(state)
        return state.x

    if not run.dry or native.extension() is not None:
        same["bitwise"] = torch.equal(bitwise(5, 0), torch.cat([bitwise(1, i) for i in range(5)]))
    result = {"equal_bits": same, "pool_MiB": pooled >> 20, "stand_in": run.dry}
    if not all(same.values()):
        raise Failure(f"bits differ: {[name for name, equal in same.items() if not equal]}", result)
    return result


def update(run: Run) -> dict[str, Any]:
    """The fused update beside a copy that moves as many bytes, both out of the L2 cache."""
    import torch

    from fastdiff import NoiseSchedule, solvers
    from fastdiff.kernels.update import update as fused

    ops = run.finished.get("kernels", {}).get("result", {}).get("ops", {})
    if ops.get("update", {"failed": True}).get("failed"):
        raise Failure("the kernel's check is red or was not run, so it gets no speed", {})
    rows = []
    for n, side in [(2, 4)] if run.dry else [(256, 32), (4096, 32), (1, 256), (64, 256)]:
        for table in (solvers.ddim(NoiseSchedule(), 1000), solvers.ddpm(NoiseSchedule(), 1000)):
            s = start(n, (3, side, side), table, run.device, torch.float32)
            out = torch.randn(n, 3, side, side, device=run.device).to(torch.bfloat16)
            arrived = torch.zeros(n, dtype=torch.int32, device=run.device)
            tensors = (s.x, out, s.bank.values, s.table, s.row, s.bank.lengths, s.seed, s.index, arrived)
            moves = s.x.numel() * (4 + 4 + 2)
            source = torch.zeros(moves // 2, dtype=torch.uint8, device=run.device)
            target = torch.empty_like(source)
            us = microseconds(run, fused(*tensors))
            copy = microseconds(run, lambda: target.copy_(source))  # noqa: B023 - it is called in this turn of the loop
            rows.append(
                {"images": n, "side": side, "solver": table.solver, "us": round(us, 2), "copy_us": round(copy, 2),
                 "times_a_copy": round(us / copy, 2)}
            )  # fmt: skip
    return {"rows": rows}


# Whole jobs -----------------------------------------------------------------------------------------------------------


def one_graph(run: Run, unet: Any, table: Any, n: int) -> Callable[[], Any]:
    """The baseline of plain PyTorch: network and DDIM step as one function, compiled by max-autotune, in one graph."""
    import torch

    from fastdiff.solvers import COLUMNS

    config = unet.config
    shape = (config.in_channels, config.sample_size, config.sample_size)
    first = start(n, shape, table, run.device, torch.float32).x
    k = torch.from_numpy(table.coefficients).to(run.device, torch.float32)
    t, kx, ko, ax, ao, a0 = (k[:, COLUMNS.index(name)] for name in ("t", "kx", "ko", "ax", "ao", "a0"))
    x, i = first.clone(), torch.zeros(1, dtype=torch.int64, device=run.device)
    dtype = next(unet.parameters()).dtype

    def step(x: Any, i: Any) -> tuple[Any, Any]:
        image = x.to(dtype).contiguous(memory_format=torch.channels_last)
        out = unet(image, t[i].expand(n)).float()
        x0 = (kx[i] * x + ko[i] * out).clamp(-1.0, 1.0)
        return ax[i] * x + ao[i] * out + a0[i] * x0, torch.clamp(i + 1, max=len(table))

    fast = run.compile(step, mode="max-autotune-no-cudagraphs", fullgraph=True, dynamic=False)
    cuda = run.cuda
    side, graph = cuda.Stream(), cuda.CUDAGraph()
    side.wait_stream(cuda.current_stream())
    with torch.no_grad():
        with cuda.stream(side):
            for _ in range(3):
                fast(x, i)
        cuda.current_stream().wait_stream(side)
        with cuda.graph(graph, pool=cuda.graph_pool_handle(), stream=side, capture_error_mode="thread_local"):
            new, after = fast(x, i)
            x.copy_(new)
            i.copy_(after)

    def job() -> Any:
        x.copy_(first)
        i.zero_()
        with torch.no_grad():
            for _ in range(len(table)):
                graph.replay()
        return x.cpu()

    return job


def backend_job(run: Run, backend: str, unet: Any, table: Any, n: int, mode: str | None = None) -> Callable[[], Any]:
    import torch

    from fastdiff.backends import Spec

    shape = (unet.config.in_channels, unet.config.sample_size, unet.config.sample_size)
    runner = runner_of(run, backend, unet, Spec(n, shape, next(unet.parameters()).dtype, run.device), mode)

    def job() -> Any:
        state = start(n, shape, table, run.device, torch.float32)
        for _ in range(len(table)):
            runner.step(state)
        return state.x.cpu()

    return job


@contextlib.contextmanager
def diffusers_from(folder: Path | None) -> Iterator[None]:
    """diffusers importable, from wheels or unpacked packages in ``folder`` where it is not installed."""
    import tempfile

    with tempfile.TemporaryDirectory() as place:
        if folder is not None:
            for wheel in folder.glob("*.whl"):
                zipfile.ZipFile(wheel).extractall(place)
            sys.path += [place, str(folder)]
        yield


def diffusers_job(run: Run, unet: Any, steps: int, n: int) -> Callable[[], Any]:
    """The stock pipeline with its U-Net compiled, in channels_last, with the same weights."""
    import torch
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    with torch.device("meta"):
        twin = UNet2DModel(**unet.config.to_dict())
    twin.load_state_dict(unet.state_dict(), assign=True)
    pipeline = DDIMPipeline(unet=twin.eval(), scheduler=DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    pipeline.unet = run.compile(pipeline.unet, mode="max-autotune", fullgraph=True)

    def job() -> Any:
        generator = torch.Generator(run.device).manual_seed(0)
        return pipeline(n, generator, num_inference_steps=steps, output_type="pt").images.cpu()

    return job


def whole_job(network: str, n: int) -> Callable[[Run], dict[str, Any]]:
    """img-steps/s of n images in 50 DDIM steps, noise to images on the host, in bfloat16; all contenders in turns."""

    def measure(run: Run) -> dict[str, Any]:
        import torch

        from fastdiff import NoiseSchedule, solvers
        from fastdiff.bench.networks import PUBLISHED

        torch.backends.cudnn.benchmark = True  # for all alike
        steps, images, rounds = (3, min(n, 2), 1) if run.dry else (50, n, 7)
        config = tiny() if run.dry else PUBLISHED[f"ddpm-{network}"]
        table = solvers.ddim(NoiseSchedule(), steps)
        unet = unet_of(config, torch.bfloat16, run.device)
        exact = backend_job(run, "eager", unet_of(config, torch.float32, run.device), table, images)()
        makes: dict[str, Callable[[], Callable[[], Any]]] = {
            name: lambda name=name: backend_job(run, name, unet, table, images)  # type: ignore[misc]  # mypy infers no default's type
            for name in on_gpu(run)
        }
        makes["baseline: one graph, max-autotune"] = lambda: one_graph(run, unet, table, images)
        makes["baseline: diffusers, compiled U-Net"] = lambda: diffusers_job(run, unet, steps, images)
        makes["compiled, max-autotune"] = lambda: backend_job(
            run, "compiled", unet, table, images, "max-autotune-no-cudagraphs"
        )
        rows: dict[str, dict[str, Any]] = {}
        jobs: dict[str, Callable[[], Any]] = {}
        failed, unfinished = [], []
        with diffusers_from(run.diffusers):
            for name, make in makes.items():
                if run.late:
                    unfinished.append(name)
                    continue
                started = time.perf_counter()
                try:
                    if not run.dry:
                        torch.cuda.reset_peak_memory_stats()
                    job = make()
                    result = job()
                    row = rows[name] = {"first_call_s": round(time.perf_counter() - started, 1)}
                    if not run.dry:
                        row["peak_MiB"] = torch.cuda.max_memory_allocated() >> 20
                except ImportError as e:
                    rows[name] = {"absent": str(e)}
                    continue
                except Exception:
                    rows[name] = {"error": traceback.format_exc()}
                    failed.append(name)
                    continue
                if "diffusers" in name:  # it draws its own noise
                    red = not bool(torch.isfinite(result).all())
                else:
                    row["error"] = relative(result, exact)
                    red = not row["error"] <= 2 * rows["eager"].get("error", 0.0) + 1e-3
                if red:
                    failed.append(name)
                else:
                    jobs[name] = job
            taken = seconds(run, jobs, rounds)
        for name, times in taken.items():
            rows[name]["img_steps_per_s"] = round(images * steps / statistics.median(times), 2)
            rows[name]["spread"] = round((max(times) - min(times)) / statistics.median(times), 3)
        result = {"images": images, "steps": steps, "contenders": rows, "unfinished": unfinished, "stand_in": run.dry}
        if failed:
            raise Failure(f"no speed of {', '.join(failed)}: an error, or images that are off", result)
        return result

    return measure


PARTS: dict[str, Callable[[Run], dict[str, Any]]] = {
    "header": header,
    "kernels": kernels,
    "graphs": graphs,
    "parity": parity,
    "tuning": tuning,
    "update": update,
    "cifar10 B=1": whole_job("cifar10-32", 1),
    "cifar10 B=256": whole_job("cifar10-32", 256),
    "celebahq B=1": whole_job("celebahq-256", 1),
}


# The call -------------------------------------------------------------------------------------------------------------


def execute(parts: list[str], run: Run) -> None:
    """In a child process: one part after the other, each result written as soon as it is there."""
    for name in parts:
        started = time.time()
        try:
            result = PARTS[name](run)
            entry: dict[str, Any] = {"status": "unfinished" if result.get("unfinished") else "ok", "result": result}
        except Failure as e:
            entry = {"status": "failed", "result": e.result, "error": str(e)}
        except Exception:
            entry = {"status": "failed", "error": traceback.format_exc()}
        run.finished[name] = {**entry, "seconds": round(time.time() - started, 1)}
        write(run.out, run.finished, run.dry)


def write(out: Path, parts: dict[str, Any], dry: bool) -> None:
    text = json.dumps({"dry_run": dry, "commit": commit(), "parts": parts}, indent=1)
    (out / "gpu.json.new").write_text(text + "\n", encoding="utf-8")
    (out / "gpu.json.new").replace(out / "gpu.json")
    (out / "gpu.md").write_text(readable(parts, dry), encoding="utf-8")


def commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(HERE), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def readable(parts: dict[str, Any], dry: bool) -> str:
    """The results as markdown: lists of rows become tables."""
    lines = ["# fastdiff on a GPU" + ", a dry run on a CPU: no figure means anything" * dry, ""]
    for name, part in parts.items():
        lines += [f"## {name}: {part['status']}, {part.get('seconds', 0)} s", ""]
        if "error" in part:
            lines += ["```", part["error"].strip(), "```", ""]
        for key, value in part.get("result", {}).items():
            if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
                value = [{key: k, **v} for k, v in value.items()]
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(dict.fromkeys(column for row in value for column in row))
                lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
                lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in value]
                lines += [""]
            elif value not in ({}, [], None):
                lines += [f"- {key}: {cell(value)}"]
        lines += [""]
    return "\n".join(lines)


def cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) and abs(value) < 0.01 else str("" if value is None else value)
    return text.strip().splitlines()[-1].replace("|", "/") if text.strip() else ""


def child(parts: list[str], arguments: argparse.Namespace, limit: float) -> str | None:
    """Run parts in a process of their own; what went wrong with it as a whole, None where nothing did."""
    command = [sys.executable, str(Path(__file__).resolve()), "--out", str(arguments.out), "--child", ",".join(parts)]
    command += ["--seconds", str(limit)] + ["--dry-run"] * arguments.dry_run
    command += ["--diffusers", str(arguments.diffusers)] if arguments.diffusers else []
    environment = dict(os.environ)
    paths = [str(HERE.parent), str(HERE.parent / "tests"), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if arguments.dry_run:
        environment["TRITON_INTERPRET"] = "1"
    try:
        done = subprocess.run(command, env=environment, timeout=limit, stderr=subprocess.PIPE, text=True)
    except subprocess.TimeoutExpired:
        return f"stopped after {limit:.0f} s"
    return None if done.returncode == 0 else f"exit code {done.returncode}\n{(done.stderr or '')[-2000:]}"


def read(path: Path, dry: bool) -> dict[str, Any]:
    """The parts of an earlier call; those of a dry run are no start for a real one."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return dict(data["parts"]) if data["dry_run"] == dry else {}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    default = os.environ.get("FASTDIFF_GPU_OUT") or os.environ.get("OUT") or "out/gpu"
    parser.add_argument("--out", type=Path, default=Path(default))
    parser.add_argument("--parts", default=",".join(PARTS), help=f"of: {', '.join(PARTS)}")
    parser.add_argument("--resume", type=Path, help="an earlier gpu.json, else the one in --out; ok parts are kept")
    parser.add_argument("--anew", action="store_true", help="do parts again that are ok")
    parser.add_argument("--seconds", type=float, default=520.0, help="the call ends by then")
    parser.add_argument("--diffusers", type=Path, help="a folder with diffusers, unpacked or as wheels")
    parser.add_argument("--dry-run", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    ends, out, dry = time.time() + arguments.seconds, arguments.out, arguments.dry_run
    out.mkdir(parents=True, exist_ok=True)
    if arguments.child:
        execute(arguments.child.split(","), Run(out, dry, ends, arguments.diffusers, read(out / "gpu.json", dry)))
        return 0
    asked = [name.strip() for name in arguments.parts.split(",")]
    if not set(asked) <= set(PARTS):
        parser.error(f"unknown part {', '.join(set(asked) - set(PARTS))}; there are: {', '.join(PARTS)}")
    parts = read(arguments.resume or out / "gpu.json", dry)
    write(out, parts, dry)
    todo = [name for name in asked if arguments.anew or parts.get(name, {}).get("status") != "ok"]
    for group in [todo] if dry and todo else [[name] for name in todo]:
        left = ends - time.time()
        write(out, {name: part for name, part in parts.items() if name not in group}, dry)
        problem = child(group, arguments, left) if left > SMALLEST_SHARE or dry else "no time was left"
        parts = read(out / "gpu.json", dry)
        for name in group:
            if name not in parts:
                late = problem is not None and problem.startswith(("no time", "stopped"))
                parts[name] = {"status": "unfinished" if late else "failed", "error": problem or "it left no result"}
        write(out, parts, dry)
        for name in group:
            print(
                f"{name:16} {parts[name]['status']:11} {parts[name].get('error', '').strip().splitlines()[-1:]}",
                flush=True,
            )
    print((out / "gpu.md").read_text(encoding="utf-8"))
    status = {parts[name]["status"] for name in asked}
    return 1 if "failed" in status else 3 if "unfinished" in status else 0


if __name__ == "__main__":
    sys.exit(main())
