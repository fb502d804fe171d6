"""The estimate of a job against what the native engine then does: its choices, its memory, its time."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastdiff import NoiseSchedule, Sampler, UNet, solvers
from fastdiff.backends import Spec, native
from fastdiff.backends.native import cost
from fastdiff.core.lower import lower
from fastdiff.core.program import Conv
from fastdiff.core.state import State, TableBank
from fastdiff.errors import InvalidArgument
from tests.cli.test_cli import call  # noqa: F401 - a fixture
from tests.support.paths import ROOT
from tests.support.unets import (
    OWN_VARIANTS,
    PUBLISHED,
    TINY,
    TINY_CLASSES,
    VARIANTS,
    change,
    random_images,
    random_labels,
    random_unet,
)

extension = native.extension()
CPU = torch.device("cpu")
needs_native = pytest.mark.skipif(extension is None, reason="fastdiff._native is not built")
needs_bf16 = pytest.mark.skipif(not (extension and extension.bf16_isas()), reason="no products of bfloat16 here")
MACHINE = cost.Ceilings("avx512bf16", 2, {"float32": 500.0, "bfloat16": 1000.0}, 50.0, 200.0, 50.0, 32 << 20)
RESULTS = ROOT / "benchmarks" / "results"

FEW = ("tiny", "class embedding", "resnet blocks", "one head", "24x40")
NETWORKS = {name: change(**VARIANTS[name]) for name in FEW}
NETWORKS |= {"class image": change(TINY_CLASSES, class_image="concat")}


def size_of(config) -> tuple[int, int]:
    return config.sample_size if isinstance(config.sample_size, tuple) else (config.sample_size,) * 2


def meta(config) -> UNet:
    with torch.device("meta"):
        return UNet(config)


def stepped(unet: UNet, rows: int, dtype: torch.dtype = torch.float32, fast: bool = False) -> native.NativeRunner:
    """Return a runner after one step."""
    config = unet.config
    x = random_images(config, rows)
    state = State.create(x, TableBank([solvers.ddim(NoiseSchedule(), 2)], CPU), label=random_labels(config, rows))
    runner = native.prepare(unet, Spec(rows, tuple(x.shape[1:]), dtype, CPU, config.null_label, fast=fast))
    runner.step(state)
    return runner


# Counts ---------------------------------------------------------------------------------------------------------------


def test_flops_are_those_of_the_program_and_products_those_of_the_algorithms():
    unet = meta(PUBLISHED["ddpm-cifar10-32"])
    program = lower(unet, (32, 32))
    direct = sum(program.flops(op) for op in program.ops)
    known = {"direct": 1.0, "winograd2": 16 / (9 * 4), "winograd4": 36 / (9 * 16)}
    for method, share in known.items():
        methods = {
            op.dst: method if (op.kernel, op.stride) == (3, 1) else "direct"
            for op in program.ops
            if isinstance(op, Conv)
        }
        three = sum(program.flops(op) for op in program.ops if isinstance(op, Conv) and methods[op.dst] == method)
        if method == "direct":
            assert cost.products(program, methods) == direct
        else:
            assert cost.products(program, methods) == pytest.approx(direct - (1 - share) * three)
    if extension is not None:
        c = cost.estimate(unet, (32, 32), 10, 20, 1, machine=MACHINE)
        assert c.flops == 200 * direct
        assert c.products == pytest.approx(200 * 4.48e9, rel=0.001)  # results/: 236.4 GFLOP/s at 52.8 img-steps/s


@needs_native
def test_a_job_is_its_passes():
    unet = meta(TINY_CLASSES)
    one = cost.estimate(unet, (8, 8), 4, 10, 4, machine=MACHINE)
    assert (one.rows, one.passes) == (4, 10)
    more = cost.estimate(unet, (8, 8), 9, 10, 4, machine=MACHINE)  # three chunks, the last with one image
    assert more.passes == 30
    assert more.seconds == pytest.approx(3 * one.seconds)
    assert more.flops == one.flops * 9 / 4
    assert more.weight_bytes == 3 * one.weight_bytes
    guided = cost.estimate(unet, (8, 8), 4, 20, 4, guided=True, machine=MACHINE)
    assert (guided.rows, guided.passes) == (8, 10)
    assert guided.flops == 2 * one.flops
    assert guided.activation_bytes == 2 * one.activation_bytes
    assert guided.img_steps_per_s == pytest.approx(4 * 10 / guided.seconds)
    assert sum(guided.by_kind.values()) == pytest.approx(guided.seconds)
    assert cost.estimate(unet, (8, 8), 3, 10, 64, machine=MACHINE).batch == 3


@needs_native
def test_a_machine_of_half_the_speed_takes_twice_as_long():
    unet = meta(PUBLISHED["ddpm-cifar10-32"])
    slow = dataclasses.replace(
        MACHINE, gflops={k: v / 2 for k, v in MACHINE.gflops.items()}, memory_gbs=MACHINE.memory_gbs / 2
    )
    fast, half = (cost.estimate(unet, (32, 32), 8, 1, 8, machine=m).seconds for m in (MACHINE, slow))
    assert half == pytest.approx(2 * fast, rel=0.02)  # but for what is fixed
    narrow = dataclasses.replace(MACHINE, memory_gbs=MACHINE.memory_gbs / 2)
    assert fast < cost.estimate(unet, (32, 32), 8, 1, 8, machine=narrow).seconds < 2 * fast


@needs_native
def test_every_kind_of_operation_has_factors():
    factors = cost.factors()
    for config in (*NETWORKS.values(), change(**OWN_VARIANTS["shortcuts that resample"])):
        spec = Spec(2, (config.in_channels, *size_of(config)), torch.float32, CPU)
        for dtype in (torch.float32, *([torch.bfloat16] if extension.bf16_isas() else [])):
            compiled = native.dry_program(meta(config), dataclasses.replace(spec, dtype=dtype), 2)
            for op, done in cost.work(compiled, MACHINE):
                assert done.seconds(MACHINE) > 0, op
    assert all(len(values) == 6 and min(values) >= 0 for values in factors.values())


# Against the engine ---------------------------------------------------------------------------------------------------


@needs_native
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("name", NETWORKS)
def test_memory_and_algorithms_are_those_of_the_engine(name, rows):
    unet = random_unet(NETWORKS[name])
    runner = stepped(unet, rows)
    (compiled,) = runner.programs.values()
    said = cost.estimate(unet, size_of(unet.config), rows, 1, rows, machine=MACHINE).memory
    assert {"weights": said["packed"], "arena": said["arena"], "space": said["space"]} == runner.memory()
    described = native.dry_program(meta(unet.config), runner.spec, rows)
    assert described.methods == compiled.methods
    assert described.arena.is_meta
    assert all(t.is_meta for t in described.weights.packed.values())


@needs_bf16
def test_bfloat16_and_parts_are_those_of_the_engine(monkeypatch):
    for fast in (False, True):
        unet = random_unet(change(block_out_channels=(32, 48), sample_size=32))
        runner = stepped(unet, 6, torch.bfloat16, fast)
        dtype = "bfloat16-fast" if fast else "bfloat16"
        said = cost.estimate(unet, (32, 32), 6, 1, 6, dtype, machine=MACHINE).memory
        assert said["packed"] == runner.memory()["weights"]
        assert ("winograd4" in runner.programs[6].methods.values()) == fast
    monkeypatch.setattr("fastdiff.backends.native.program.CACHE_BYTES", 2 * runner.row_bytes)
    runner = stepped(unet, 6, torch.bfloat16, True)
    whole = cost.estimate(unet, (32, 32), 6, 1, 6, dtype, machine=MACHINE)
    assert whole.memory["arena"] == runner.memory()["arena"] <= 2 * runner.row_bytes
    assert whole.weight_bytes == 3 * whole.memory["packed"]


@pytest.mark.slow  # as a busy machine fails it
@pytest.mark.alone
@needs_native
def test_time_is_near_the_measured():
    """A wide band: others may compute here. benchmarks/calibrate.py prints the exact ratios."""
    sampler = Sampler.from_pretrained("fashion-mnist", device="cpu", backend="native")
    said = cost.estimate(sampler.unet, (32, 32), 8, 1, 8)
    runner = native.prepare(sampler.unet, Spec(8, (1, 32, 32), torch.float32, CPU, 10))
    state = State.create(torch.randn(8, 1, 32, 32), TableBank([solvers.ddim(NoiseSchedule(), 30)], CPU), label=[0] * 8)
    runner.step(state)
    seconds = []
    for _ in range(12):
        started = time.perf_counter()
        runner.step(state)
        seconds.append(time.perf_counter() - started)
    assert 0.25 < said.seconds / min(seconds) < 4


PEAK = r"""
import json, sys, torch
from fastdiff import NoiseSchedule, Sampler, UNet, UNetConfig
from fastdiff.backends.native import cost

def job(config, n):
    with torch.device("meta"):
        unet = UNet(UNetConfig.from_dict(config))
    unet = unet.to_empty(device="cpu").eval()
    for p in unet.parameters():
        p.data.fill_(0.01)
    Sampler(unet, NoiseSchedule(), backend="native").sample(n, steps=1, batch_size=n)

small, large = json.loads(sys.argv[1])
job(small, 1)  # what every process holds
print("ready", flush=True)
sys.stdin.readline()
job(large, int(sys.argv[2]))
"""


def anonymous_bytes(pid: int) -> int:
    """Return the anonymous memory of a process, in RAM or swapped out; 0 where it has ended.

    The system may drop pages of files at any time, so the resident size (and VmHWM) of libraries says nothing.
    """
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    return 1024 * sum(map(int, re.findall(r"(?:RssAnon|VmSwap):\s*(\d+)", status)))


@pytest.mark.slow
@needs_native
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_peak_memory_is_near_a_real_process_s():
    n, config = 4, PUBLISHED["ddpm-cifar10-32"]
    configs = json.dumps([TINY.to_dict(), config.to_dict()])
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", PEAK, configs, str(n)], **pipes) as process:
        assert process.stdout.readline() == "ready\n"
        peak = before = anonymous_bytes(process.pid)
        process.stdin.write("go\n")
        process.stdin.flush()
        while process.poll() is None:
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(0.005)
    assert process.returncode == 0
    said = cost.estimate(meta(config), (32, 32), n, 1, n, machine=MACHINE).peak_bytes
    assert 0.8 < (peak - before) / said < 1.5, f"{peak - before} bytes, predicted {said}"


# The machine ----------------------------------------------------------------------------------------------------------


@needs_native
def test_ceilings_are_measured_once_and_make_sense(monkeypatch):
    found = cost.ceilings()
    assert cost.ceilings() is found
    assert found.isa == extension.isas()[0]
    assert found.gflops["float32"] > 1
    assert ("bfloat16" in found.gflops) == (found.isa in extension.bf16_isas())
    assert 0.1 < found.memory_gbs < 10_000
    assert found.cache_bytes >= 1 << 18
    assert json.loads(json.dumps(found.to_dict()))["threads"] == found.threads
    last = extension.isas()[-1]
    monkeypatch.setenv("FASTDIFF_ISA", last)
    other = cost.ceilings()
    assert other.isa == last
    if last not in extension.bf16_isas():
        assert "bfloat16" not in other.gflops


@needs_native
def test_a_neighbours_moment_is_no_ceiling(monkeypatch):
    """The peak is the best measurement of both threads together, not the first, nor each thread's best."""
    looks = itertools.chain([60.0, 50.0, 30.0, 90.0, 100.0, 10.0, 70.0, 30.0], itertools.repeat(40.0))
    measured = SimpleNamespace(isas=lambda: ["x"], rates=lambda isa: (0.0, (rate := next(looks)), 2 * rate))
    monkeypatch.setattr(cost, "extension", lambda: measured)
    monkeypatch.setattr(cost, "_best", lambda work: 1.0)
    assert cost._measured.__wrapped__("x", 2).gflops == {"float32": 120.0, "bfloat16": 240.0}


# What is not known, and what is wrong ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"backend": "eager"}, "only the native engine's cost is known"),
        ({"device": "meta"}, "on the CPU, not on meta"),
        ({"dtype": "float16"}, "not in float16"),
    ],
)
def test_no_prediction_rather_than_a_guess(options, reason):
    c = cost.estimate(meta(TINY), (8, 8), 4, 10, 2, **options)
    assert c.flops > 0
    assert c.weight_bytes > 0
    assert (c.products, c.memory, c.seconds, c.peak_bytes, c.img_steps_per_s) == (None,) * 5
    assert reason in c.missing
    assert reason in str(c)


def test_without_the_extension(without_extension):
    c = cost.estimate(meta(TINY), (8, 8), 4, 10, 2)
    assert c.seconds is None
    assert "_native is not built" in c.missing


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"n": 0}, "n=0"),
        ({"nfe": True}, "nfe=True"),
        ({"batch": -1}, "batch=-1"),
        ({"dtype": "int8"}, "dtype='int8'"),
        ({"size": (9, 8)}, "multiples of 2"),
        ({"unet": torch.nn.Identity()}, "Identity"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    arguments = {"unet": meta(TINY), "size": (8, 8), "n": 1, "nfe": 1, "batch": 1, **changes}
    with pytest.raises(InvalidArgument, match=message):
        cost.estimate(**arguments)


# The command ----------------------------------------------------------------------------------------------------------


@needs_native
def test_info_tells_the_cost(call):  # noqa: F811 - the fixture
    code, out, _ = call("info", "fashion-mnist", "--n", "200", "--steps", "10", "--guidance", "2", "--json")
    said = json.loads(out)["cost"]
    assert code == 0
    assert (said["n"], said["nfe"], said["batch"], said["rows"]) == (200, 20, 64, 128)
    assert said["passes"] == 40
    assert said["seconds"] > 0
    assert said["peak_bytes"] == sum(said["memory"].values())
    assert math.isclose(said["img_steps_per_s"], 200 * 10 / said["seconds"])
    code, out, _ = call("info", "fashion-mnist", "--n", "200", "--steps", "10", "--batch-size", "8")
    assert "200 images of 10 network evaluations, 8 at a time, 8 rows a pass" in out
    assert "img-steps/s" in out
    code, _, err = call("info", "fashion-mnist", "--n", "0")
    assert code == 2
    assert "n=0" in err
