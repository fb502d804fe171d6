"""Tests of the lists of launches on the meta device, and of the predictions of their times."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

pytest.importorskip("triton", reason="triton is not installed: its wheels are for Linux")

from benchmarks.gpu import compiling, lists, model, profiling, tuning
from benchmarks.gpu.networks import tiny
from benchmarks.gpu.run import Run
from fastdiff.bench.networks import PUBLISHED, READING_TEXT
from fastdiff.kernels import attention, conv, epilogue, norm
from fastdiff.kernels import launch as kernel_launch
from fastdiff.kernels.library import LIBRARY

RATES = model.Rates()
# What the part "kernels" leaves where the checks of all operations are green.
OPS = """attention.attention conv.conv conv.partial embed epilogue.finish epilogue.gather epilogue.normed guidance input
norm.apply norm.finalise norm.group_norm pool update"""
GREEN = {"kernels": {"result": {"ops": {op: {"cases": 1} for op in OPS.split()}}}}


@pytest.fixture(scope="module")
def cifar():
    return lists.step(PUBLISHED["ddpm-cifar10-32"], 1, torch.bfloat16)


def test_nothing_is_computed(cifar):
    assert all(t.is_meta for launch in cifar for t in model.tensors(list(launch.arguments.values())))
    assert [cifar[0].op, cifar[-1].op] == ["input", "update"]
    assert len(cifar) <= 170


def test_the_launches_of_a_network_that_reads_texts():
    """Stable Diffusion 1.5: 16 transformers of one block. The keys and values of texts are no launches of a step."""
    listed = lists.step(READING_TEXT["sd15"], 1, torch.bfloat16, guided=True)
    assert all(t.is_meta for launch in listed for t in model.tensors(list(launch.arguments.values())))
    counts = collections.Counter(launch.op for launch in listed)
    assert (counts["geglu"], counts["layer_norm"], counts["attention.attention"]) == (16, 3 * 16, 2 * 16)
    keys = [launch.arguments["keys"] for launch in listed if launch.arguments.get("entry") is not None
            and launch.op == "attention.attention"]  # fmt: skip
    assert keys == [77] * 16
    products = sum(w.programs * w.products for launch in listed if launch.op == "geglu" for w in [model.work(launch)])
    assert 2 * products == pytest.approx(2 * 102e9, rel=0.02), "two rows of 102 GFLOP"
    assert model.summary(model.predicted(listed, RATES))[0]["launches"] == len(listed) <= 420


def test_products_take_the_longer_of_arithmetic_and_reading():
    """By hand: one tile of 128x128 of a 1x1 convolution of 64 channels; a step multiplies 2^20 numbers."""
    x, w = torch.empty(1, 16, 8, 64, dtype=torch.bfloat16, device="meta"), None
    w = torch.empty(1, 1, 64, 128, dtype=torch.bfloat16, device="meta")
    launch = conv.partial((x,), (w,), torch.empty(1, 1, 16, 8, 128, device="meta"), config=conv.HALF[3])
    found = model.work(launch)
    assert found.programs == 1
    assert found.products == 128 * 128 * 64
    assert found.bytes == (128 + 128) * 64 * 2 + 128 * 128 * 4
    clocks = max(found.products / 2048, found.bytes / 29)
    assert model.microseconds(launch, RATES) == pytest.approx(RATES.launch + clocks / 1830)
    assert model.microseconds(launch, dataclasses.replace(RATES, l2=1e9)) == pytest.approx(RATES.launch + 512 / 1830)


def test_programs_beyond_the_multiprocessors_take_another_wave():
    x = torch.empty(133, 8, 16, 64, dtype=torch.bfloat16, device="meta")
    w = torch.empty(1, 1, 64, 128, dtype=torch.bfloat16, device="meta")
    times = [
        model.microseconds(conv.partial((x[:n],), (w,), torch.empty(1, n, 8, 16, 128, device="meta"),
                                        config=conv.HALF[3]), RATES) - RATES.launch for n in (1, 132, 133)
    ]  # fmt: skip
    assert times[1] == pytest.approx(times[0])
    assert times[2] == pytest.approx(2 * times[0])


def test_larger_batches_and_faster_gpus(cifar):
    def total(launches, rates=RATES):
        return model.summary(model.predicted(launches, rates))[0]["predicted_us"]

    many = lists.step(PUBLISHED["ddpm-cifar10-32"], 64, torch.bfloat16)
    assert total(cifar) < total(many) < 64 * total(cifar)
    faster = dataclasses.replace(RATES, l2=2 * RATES.l2, products=2 * RATES.products)
    assert total(many, faster) < 0.8 * total(many)


def test_measured_times_are_beside_predictions(cifar):
    measured = [2 * model.microseconds(launch, RATES) for launch in cifar]
    rows = model.predicted(cifar, RATES, measured)
    assert all(row["times"] == pytest.approx(2.0, abs=0.02) for row in rows)
    whole = model.summary(rows)[0]
    assert (whole["launch"], whole["launches"]) == ("the step", len(cifar))
    assert whole["measured_us"] == pytest.approx(sum(measured), rel=1e-2)


def test_the_script(capsys):
    assert model.main(["--network", "cifar10-32", "--images", "1", "--launches", "--clock", "1.0"]) == 0
    text = capsys.readouterr().out
    assert "cifar10-32, 1 images, bfloat16" in text
    assert text.count("conv.partial") > 20
    assert "the step" in text


def test_layers_can_be_built_in_each_of_their_configurations():
    """With operands in the layout that it needs; what a layer of the network computes is what its references do."""
    generator = torch.Generator().manual_seed(0)
    for layer in lists.layers(tiny(), 1, torch.float32):
        plain = bool(layer.arguments["nchw"])
        made: dict[int, torch.Tensor] = {}

        def real(value, made=made):
            if dataclasses.is_dataclass(value):
                fields = {f.name: real(getattr(value, f.name)) for f in dataclasses.fields(value)}
                return dataclasses.replace(value, **fields)
            if isinstance(value, tuple | list):
                return type(value)(map(real, value))
            if not isinstance(value, torch.Tensor):
                return value
            if id(value) not in made:
                there = torch.zeros(value.shape, dtype=value.dtype)
                made[id(value)] = there.normal_(generator=generator) if value.is_floating_point() else there
            return made[id(value)].clone()

        results = []
        configs = (*(layer.problem.columns() if plain else ()), *layer.problem.layer_candidates)
        assert (LIBRARY in configs) == (layer.problem.phases == 1)
        for config in configs:
            launches = layer.replaced(real).launches(config)
            for launch in launches:
                launch.reference()
            written = launches[-1].arguments
            results.append(written["out"] if "out" in written else written["dst"])
        for got in results[1:]:
            assert (got - results[0]).abs().max() <= 1e-4 * results[0].abs().max(), layer.key


@pytest.mark.parametrize(("images", "guided"), [(1, False), (2, True)])
def test_what_is_tuned_is_what_networks_ask_for(monkeypatch, tmp_path, images, guided):
    """Guided sampling evaluates twice as many rows, for which a file has keys of their own."""
    run = Run(tmp_path, True, 0.0, None, GREEN)
    monkeypatch.setattr(tuning, "DRY_JOBS", [("", images, guided)])
    asked = set()
    with pytest.MonkeyPatch.context() as patch:
        for module in (attention, conv, epilogue, kernel_launch, norm):
            plain = module.choose

            def choose(op, key, *rest, plain=plain):
                asked.add(f"{op} {key}")
                return plain(op, key, *rest)

            patch.setattr(module, "choose", choose)
        lists.step(lists.network("", guided), images, torch.bfloat16, guided)
    tuned = {candidate.key: candidate for candidate in tuning.candidates(run)}
    layers = {key for key in asked if key.startswith("conv.layer")}
    assert len(layers) >= 5
    assert all(key.startswith(f"conv.layer {images * (1 + guided)}x") for key in layers)
    assert asked - {key for key in asked if key.startswith("conv.conv")} <= tuned.keys()


def test_guided_batches_are_tuned_last(monkeypatch, tmp_path):
    run = Run(tmp_path, True, 0.0, None, GREEN)
    monkeypatch.setattr(tuning, "DRY_JOBS", [("", 1, False), ("", 4, True)])
    rows = [int(c.key.split()[1].split("x")[0]) for c in tuning.candidates(run) if c.key.startswith("conv.layer")]
    assert rows == sorted(rows)
    assert set(rows) == {1, 8}
    assert {(name, guided) for name, _, guided in lists.JOBS} >= {("cifar10-32", True), ("celebahq-256", False)}


def test_a_kernel_that_waits_is_measured_from_the_end_of_the_one_before():
    assert profiling.times([(0.0, 10.0), (2.0, 15.0), (18.0, 20.0)]) == [10.0, 5.0, 2.0]


def test_keys_of_layers_are_those_that_networks_ask_for(cifar):
    """A tuned file helps only if its keys are asked for."""
    asked = {layer.key for layer in lists.layers(PUBLISHED["ddpm-cifar10-32"], 1, torch.bfloat16)}
    chosen = set()
    with pytest.MonkeyPatch.context() as patch:
        plain = conv.choose

        def choose(op, key, *rest):
            chosen.add(f"{op} {key}")
            return plain(op, key, *rest)

        patch.setattr(conv, "choose", choose)
        lists.step(PUBLISHED["ddpm-cifar10-32"], 1, torch.bfloat16)
    assert {key for key in chosen if key.startswith("conv.layer")} == asked


def test_a_binary_is_named_by_what_the_compiler_sees(cifar):
    """Launches that differ in numbers of rows or in multiples of 16 alone share one."""
    names = {compiling.binary(launch) for launch in cifar}
    assert 20 < len(names) < len(cifar)
    (first,) = [launch for launch in cifar if launch.op == "update"]
    assert compiling.binary(first) in names
    other = dataclasses.replace(first, config=first.candidates[-1] if first.candidates[-1] != first.config else None)
    assert compiling.binary(other) not in names
