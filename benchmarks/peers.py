"""The native engine beside other ways to run a U-Net on this CPU, interleaved in one run.

    python benchmarks/peers.py                                     # the CIFAR-10 U-Net at batches 1, 8 and 32
    python benchmarks/peers.py --network ddpm-celebahq-256 --batches 1 --json out.json

Prints img-steps/s (one image through the network once): the median over rounds in which every engine takes its turn,
and its ratio to each peer. Weights are random; every engine's error against float64 comes first, and one whose error is
above 1e-4 gets no speed. A peer that is not installed is left out and named. `limit` is the speed at which the products
of the native program alone, Winograd's savings included, would run at this machine's peak of multiply-adds.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastdiff import NoiseSchedule, UNet, solvers
from fastdiff.backends import Spec, native
from fastdiff.lower import lower
from fastdiff.program import Conv
from fastdiff.state import State, TableBank

sys.path.append(str(Path(__file__).resolve().parent.parent / "tests"))
from unets import PUBLISHED, random_unet

Network = Callable[[], Tensor]
ALLOWED_ERROR = 1e-4


def fastdiff_native(unet: UNet, x: Tensor, t: Tensor) -> Network:
    spec = Spec(len(x), tuple(x.shape[1:]), torch.float32, x.device)  # type: ignore[arg-type]
    runner = native.prepare(unet, spec)
    state = State.create(x, TableBank([solvers.ddim(NoiseSchedule(), spacing=[float(t[0])])], x.device))

    def run() -> Tensor:
        runner.forward(state)
        assert state.out is not None
        return state.out

    return run


def torch_eager(unet: UNet, x: Tensor, t: Tensor) -> Network:
    unet, x = unet.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return lambda: unet(x, t)


def torch_compile(unet: UNet, x: Tensor, t: Tensor) -> Network:
    import torch._inductor.config as inductor

    inductor.freezing = True
    compiled = torch.compile(torch_eager(unet, x, t), fullgraph=True, dynamic=False)
    compiled()
    return compiled


def openvino(unet: UNet, x: Tensor, t: Tensor) -> Network:
    import openvino as ov

    class Exported(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.unet = unet

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            return self.unet(x, t)

    core = ov.Core()
    model = ov.convert_model(Exported(), example_input=(x, t), input=[tuple(x.shape), tuple(t.shape)])
    options = {
        "INFERENCE_PRECISION_HINT": "f32",
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
    }
    request = core.compile_model(model, "CPU", options).create_infer_request()
    inputs = {0: ov.Tensor(x.numpy()), 1: ov.Tensor(t.numpy())}
    return lambda: torch.from_numpy(request.infer(inputs, share_outputs=True)[0])


ENGINES = {"native": fastdiff_native, "eager": torch_eager, "compile": torch_compile, "openvino": openvino}


def products(unet: UNet, size: tuple[int, int], rows: int) -> float:
    """FLOP of an image in the native program, with each convolution's algorithm as chosen for this many rows."""
    program = lower(unet, size)
    total = 0.0
    for op in program.ops:
        saving = 1.0
        if isinstance(op, Conv):
            saving = {"direct": 1.0, "winograd2": 9 * 4 / 16, "winograd4": 9 * 16 / 36}[
                native.choose_method(op, program, rows)
            ]
        total += program.flops(op) / saving
    return total


def machine() -> dict[str, Any]:
    model = platform.processor()
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next(line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line)
    versions = {}
    for name in ("torch", "openvino"):
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
def measure(unet: UNet, size: tuple[int, int], batch: int, names: list[str], rounds: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(batch)
    x, t = torch.randn(batch, unet.config.in_channels, *size, generator=generator), torch.full((batch,), 500.0)
    exact = random_unet(unet.config).double()(x[:1].double(), t[:1].double())
    engines: dict[str, Network] = {}
    result: dict[str, Any] = {"batch": batch, "engines": {}, "absent": {}}
    for name in names:
        try:
            started = time.perf_counter()
            engine = ENGINES[name](random_unet(unet.config), x, t)
            error = float((engine()[:1].double() - exact).norm() / exact.norm())
        except ImportError as e:
            result["absent"][name] = str(e)
            continue
        result["engines"][name] = {"error": error, "first_call_s": round(time.perf_counter() - started, 2)}
        if error <= ALLOWED_ERROR:
            engines[name] = engine
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for _ in range(rounds):
        for name, engine in engines.items():
            engine()
            started = time.perf_counter()
            calls = 0
            while calls < 2 or time.perf_counter() - started < 0.4:
                engine()
                calls += 1
            seconds[name].append((time.perf_counter() - started) / calls)
    for name, values in seconds.items():
        result["engines"][name]["img_steps_per_s"] = round(batch / statistics.median(values), 2)
    ours = result["engines"]["native"]["img_steps_per_s"]
    for name in seconds:
        result["engines"][name]["native_is"] = round(ours / result["engines"][name]["img_steps_per_s"], 2)
    result["gflop_per_image"] = round(products(unet, size, batch) / 1e9, 2)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=PUBLISHED, default="ddpm-cifar10-32")
    parser.add_argument("--batches", default="1,8,32")
    parser.add_argument("--engines", default=",".join(ENGINES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    with torch.device("meta"):
        unet = UNet(PUBLISHED[arguments.network])
    side = unet.config.sample_size
    assert isinstance(side, int)
    report: dict[str, Any] = {"network": arguments.network, "machine": machine(), "batches": []}
    print(json.dumps(report["machine"]))
    for batch in map(int, arguments.batches.split(",")):
        result = measure(unet, (side, side), batch, arguments.engines.split(","), arguments.rounds)
        limit = report["machine"]["fma_gflops"] / result["gflop_per_image"]
        result["limit"] = round(limit, 1)
        report["batches"].append(result)
        print(f"\nbatch {batch}: {result['gflop_per_image']} GFLOP an image in products, limit {limit:.1f} img-steps/s")
        for name, row in result["engines"].items():
            speed = row.get("img_steps_per_s")
            told = f"{speed:8.1f} img-steps/s   native is {row['native_is']:.2f} x" if speed else "  error too large"
            print(f"  {name:10} error {row['error']:.1e}  first call {row['first_call_s']:6.1f} s  {told}", flush=True)
        for name, reason in result["absent"].items():
            print(f"  {name:10} absent: {reason}")
        if arguments.json is not None:
            arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
