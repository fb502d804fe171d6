"""The native engine beside other ways to run a U-Net on this CPU, interleaved in one run.

    python benchmarks/peers.py                                     # the CIFAR-10 U-Net at batches 1, 8 and 32
    python benchmarks/peers.py --network ddpm-celebahq-256 --batches 1 --json out.json
    python benchmarks/peers.py --engines native,openvino           # float32 alone, without waiting for torch.compile

Prints img-steps/s (one image through the network once): the median over rounds in which every engine takes its turn,
after every engine's error against float64 (weights are random). An error above 1e-4, or 1e-1 in bfloat16, gets no
speed. Then the ratios: float32 to the best peer in float32, bfloat16 to the best with an error of at most 1e-2,
bfloat16-fast to the best in bfloat16 whatever its error. A peer that is not installed is left out and named. The limit
is the speed at which the products of the native program alone, Winograd's savings included, would run at this machine's
peak of multiply-adds.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, UNet, accelerate, cost, solvers
from fastdiff.backends import Spec, native
from fastdiff.errors import BackendError
from fastdiff.lower import lower
from fastdiff.program import Conv
from fastdiff.state import State, TableBank

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from unets import PUBLISHED, diffusers_twin, random_unet

K = TypeVar("K")
Network = Callable[[], Tensor]
Make = Callable[[UNet, Tensor, Tensor], Network]
ALLOWED_ERROR = {"float32": 1e-4, "bfloat16": 1e-1}


def native_engine(dtype: torch.dtype, fast: bool = False) -> Make:
    def make(unet: UNet, x: Tensor, t: Tensor) -> Network:
        B, C, H, W = x.shape
        runner = native.prepare(unet, Spec(B, (C, H, W), dtype, x.device, fast=fast))
        state = State.create(x, TableBank([solvers.ddim(NoiseSchedule(), spacing=[float(t[0])])], x.device))

        def run() -> Tensor:
            runner.forward(state)
            assert state.out is not None
            return state.out

        return run

    return make


def torch_eager(dtype: torch.dtype) -> Make:
    def make(unet: UNet, x: Tensor, t: Tensor) -> Network:
        unet = unet.to(dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # missing in torch's annotations
        x = x.to(dtype).contiguous(memory_format=torch.channels_last)
        return lambda: unet(x, t)

    return make


def torch_compile(dtype: torch.dtype, backend: str = "inductor") -> Make:
    def make(unet: UNet, x: Tensor, t: Tensor) -> Network:
        import torch._inductor.config as inductor

        if backend != "inductor":
            importlib.import_module(backend)
        inductor.freezing = True
        torch._dynamo.reset()
        return torch.compile(torch_eager(dtype)(unet, x, t), backend=backend, fullgraph=True, dynamic=False)

    return make


def openvino(precision: str) -> Make:
    def make(unet: UNet, x: Tensor, t: Tensor) -> Network:
        import openvino as ov

        class Exported(torch.nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.unet = unet

            def forward(self, x: Tensor, t: Tensor) -> Tensor:
                return self.unet(x, t)

        model = ov.convert_model(Exported(), example_input=(x, t), input=[tuple(x.shape), tuple(t.shape)])
        options = {
            "INFERENCE_PRECISION_HINT": precision,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        }
        request = ov.Core().compile_model(model, "CPU", options).create_infer_request()
        inputs = {0: ov.Tensor(x.numpy()), 1: ov.Tensor(t.numpy())}
        return lambda: torch.from_numpy(request.infer(inputs, share_outputs=True)[0])

    return make


# Name: precision, and how to make it.
ENGINES: dict[str, tuple[str, Make]] = {
    "native": ("float32", native_engine(torch.float32)),
    "eager": ("float32", torch_eager(torch.float32)),
    "compile": ("float32", torch_compile(torch.float32)),
    "zentorch": ("float32", torch_compile(torch.float32, "zentorch")),
    "openvino": ("float32", openvino("f32")),
    "native-bf16": ("bfloat16", native_engine(torch.bfloat16)),
    "native-bf16-fast": ("bfloat16", native_engine(torch.bfloat16, fast=True)),
    "eager-bf16": ("bfloat16", torch_eager(torch.bfloat16)),
    "compile-bf16": ("bfloat16", torch_compile(torch.bfloat16)),
    "zentorch-bf16": ("bfloat16", torch_compile(torch.bfloat16, "zentorch")),
    "openvino-bf16": ("bfloat16", openvino("bf16")),
}


def ratios(engines: dict[str, Any]) -> dict[str, float]:
    """The native engine's speed over the best peer's, in each precision."""

    def best(precision: str, error: float) -> float:
        speeds = [
            row["img_steps_per_s"]
            for name, row in engines.items()
            if not name.startswith("native") and ENGINES[name][0] == precision and row["error"] <= error
            if "img_steps_per_s" in row
        ]
        return max(speeds, default=0.0)

    against = {
        "native": best("float32", ALLOWED_ERROR["float32"]),
        "native-bf16": best("bfloat16", 1e-2),
        "native-bf16-fast": best("bfloat16", ALLOWED_ERROR["bfloat16"]),
    }
    return {
        name: round(engines[name]["img_steps_per_s"] / peer, 2)
        for name, peer in against.items()
        if peer and "img_steps_per_s" in engines.get(name, {})
    }


def products(unet: UNet, size: tuple[int, int], rows: int) -> float:
    """FLOP of an image in the native program, with each convolution's algorithm as chosen for this many rows."""
    program = lower(unet, size)
    return cost.products(
        program, {op.dst: native.choose_method(op, program, rows) for op in program.ops if isinstance(op, Conv)}
    )


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    versions = {}
    for name in ("torch", "openvino", "zentorch"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    extension = native.extension()
    assert extension is not None
    return {
        "processor": model,
        "isas": extension.isas(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "fma_gflops": round(extension.rates()[1] * torch.get_num_threads()),
    }


@torch.no_grad()
def profile(unet: UNet, size: tuple[int, int], batch: int) -> dict[str, float]:
    """Milliseconds of the native engine in float32 by kind of operation and height of its result, the largest first."""
    x = torch.randn(batch, unet.config.in_channels, *size)
    runner = native.prepare(random_unet(unet.config), Spec(batch, tuple(x.shape[1:]), torch.float32, x.device))  # type: ignore[arg-type]  # three numbers
    runner.forward(State.create(x, TableBank([solvers.ddim(NoiseSchedule(), 1)], x.device)))
    (compiled,) = runner.compiled.values()
    engine, ops = compiled.engine, compiled.program.ops
    times = torch.tensor([engine.profile(0, len(engine)) for _ in range(7)]).median(dim=0).values
    total: dict[str, float] = {}
    for op, nanoseconds in zip(ops, times.tolist(), strict=True):
        kind = type(op).__name__.lower()
        if isinstance(op, Conv):
            kind += f" {op.kernel}x{op.kernel}/{op.stride} {compiled.methods[op.dst]}" + " up" * op.upsample
        key = f"{kind}, {compiled.program.buffers[op.dst].shape[0]} high"
        total[key] = total.get(key, 0.0) + nanoseconds / 1e6
    return {key: round(ms, 2) for key, ms in sorted(total.items(), key=lambda item: -item[1])}


def whole_job(name: str, rounds: int) -> dict[str, Any]:
    """Seconds of 16 images in 50 DDIM steps, medians: `Sampler.sample`, an accelerated pipeline, and diffusers' own, as
    it is and in channels_last. first: the accelerated one's first call, `accelerate` included.
    """
    from diffusers import DDIMPipeline, DDIMScheduler

    unet = random_unet(PUBLISHED[name])
    sampler = Sampler(unet, NoiseSchedule(), backend="native")

    def pipeline(memory_format: torch.memory_format = torch.contiguous_format) -> Any:
        twin = diffusers_twin(random_unet(PUBLISHED[name])).to(memory_format=memory_format)  # type: ignore[call-overload]  # missing in torch's annotations
        made = DDIMPipeline(unet=twin, scheduler=DDIMScheduler())
        made.set_progress_bar_config(disable=True)
        return made

    def draw(made: Any) -> Any:
        return made(16, torch.Generator().manual_seed(0), num_inference_steps=50, output_type="np").images

    plain, last, fast = pipeline(), pipeline(torch.channels_last), pipeline()
    started = time.perf_counter()
    images = draw(accelerate(fast))
    first = time.perf_counter() - started
    jobs: dict[str, Callable[[], Any]] = {
        "native": lambda: sampler.sample(16, steps=50, batch_size=16),
        "accelerated": lambda: draw(fast),
        "diffusers": lambda: draw(plain),
        "diffusers, channels_last": lambda: draw(last),
    }
    seconds: dict[str, list[float]] = {job: [] for job in jobs}
    for _ in range(rounds):
        for job, run in jobs.items():
            started = time.perf_counter()
            result = run()
            seconds[job].append(time.perf_counter() - started)
            if job == "diffusers":
                error = float(((result - images) ** 2).mean())
    medians = {job: round(statistics.median(values), 2) for job, values in seconds.items()}
    untouched = medians["diffusers"]
    return {
        **medians,
        "first": round(first, 2),
        "ratio": round(untouched / medians["accelerated"], 2),
        "ratio, first call": round(untouched / first, 2),
        "psnr": round(-10 * math.log10(max(error, 1e-20)), 1),
    }


def interleaved(ways: dict[K, Callable[[], Any]], rounds: int) -> dict[K, float]:
    """Seconds of a call of each: the median over rounds in which all take turns, each for 0.4 s."""
    seconds: dict[K, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, run in ways.items():
            run()
            started = time.perf_counter()
            calls = 0
            while calls < 2 or time.perf_counter() - started < 0.4:
                run()
                calls += 1
            seconds[name].append((time.perf_counter() - started) / calls)
    return {name: statistics.median(values) for name, values in seconds.items()}


@torch.no_grad()
def measure(unet: UNet, size: tuple[int, int], batch: int, names: list[str], rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    x, t = torch.randn(batch, unet.config.in_channels, *size, generator=generator), torch.full((batch,), 500.0)
    exact = random_unet(unet.config).double()(x[:1].double(), t[:1].double())
    engines: dict[str, Network] = {}
    result: dict[str, Any] = {"batch": batch, "engines": {}, "absent": {}}
    for name in names:
        precision, make = ENGINES[name]
        try:
            started = time.perf_counter()
            engine = make(random_unet(unet.config), x, t)
            error = float((engine()[:1].double() - exact).norm() / exact.norm())
        except (ImportError, BackendError) as e:
            result["absent"][name] = str(e)
            continue
        result["engines"][name] = {"error": error, "first_call_s": round(time.perf_counter() - started, 2)}
        if error <= ALLOWED_ERROR[precision]:
            engines[name] = engine
    for name, seconds in interleaved(engines, rounds).items():
        result["engines"][name]["img_steps_per_s"] = round(batch / seconds, 2)
    result["ratios"] = ratios(result["engines"])
    result["gflop_per_image"] = round(products(unet, size, batch) / 1e9, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=PUBLISHED, default="ddpm-cifar10-32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--job", action="store_true", help="a whole sampling job, accelerated and not; --batches '' for it alone"
    )
    parser.add_argument("--profile", action="store_true", help="only where the native engine's time goes, by batch")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with torch.device("meta"):
        unet = UNet(PUBLISHED[arguments.network])
    side = unet.config.sample_size
    assert isinstance(side, int)
    if arguments.profile:
        for batch in map(int, arguments.batches.split(",")):
            print(json.dumps({"batch": batch, "ms": profile(unet, (side, side), batch)}, indent=1))
        return
    report: dict[str, Any] = {"network": arguments.network, "machine": machine(), "batches": []}
    print(json.dumps(report["machine"]))
    for batch in map(int, filter(None, arguments.batches.split(","))):
        result = measure(unet, (side, side), batch, arguments.engines.split(","), arguments.rounds)
        limit = report["machine"]["fma_gflops"] / result["gflop_per_image"]
        result["limit"] = round(limit, 1)
        report["batches"].append(result)
        print(f"\nbatch {batch}: {result['gflop_per_image']} GFLOP an image in products, limit {limit:.1f} img-steps/s")
        for name, row in result["engines"].items():
            speed = row.get("img_steps_per_s")
            told = f"{speed:8.2f} img-steps/s" if speed else "  error too large"
            print(f"  {name:17} error {row['error']:.1e}  first call {row['first_call_s']:6.1f} s  {told}", flush=True)
        for name, ratio in result["ratios"].items():
            print(f"  {name} is {ratio:.2f} times the best peer of its precision")
        for name, reason in result["absent"].items():
            print(f"  {name:17} absent: {reason}")
        write(report, arguments.json)
    if arguments.job:
        report["job"] = whole_job(arguments.network, 2)
        print(f"\n16 images, 50 DDIM steps, seconds: {report['job']}")
        write(report, arguments.json)


def write(report: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
