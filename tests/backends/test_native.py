"""The native engine, operation by operation and as a backend, against float64; on every instruction set here."""

from __future__ import annotations

import dataclasses
import itertools
import os
import random
import threading
import time

import pytest
import torch
from torch import Tensor

from fastdiff import NoiseSchedule, Sampler, solvers
from fastdiff.backends import Spec, native, prepare
from fastdiff.backends.native import packing, threads
from fastdiff.core import noise
from fastdiff.core.lower import lower
from fastdiff.core.program import STRIP, Conv
from fastdiff.core.state import State, TableBank
from fastdiff.errors import BackendError
from fastdiff.evaluation.classifier import Classifier
from fastdiff.unet.model import ClassEncoder
from tests.support import packing as reference
from tests.support.cases import NETWORKS, Replay
from tests.support.interpreter import strip_statistics
from tests.support.unets import (
    PUBLISHED,
    TINY,
    TINY_CLASSES,
    change,
    random_images,
    random_labels,
    random_unet,
    relative_error,
)

extension = native.extension()
if extension is None:
    pytest.skip("fastdiff._native is not built", allow_module_level=True)

ISAS = extension.isas()
CPU = torch.device("cpu")
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)


@pytest.fixture(scope="module")
def replays():
    known: dict[tuple[str, int], Replay] = {}

    def replay(name: str, rows: int) -> Replay:
        if (name, rows) not in known:
            known[name, rows] = Replay(NETWORKS.get(name) or PUBLISHED[name], rows)
        return known[name, rows]

    return replay


def force(monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    """Have every convolution that can be done by the method done by it."""

    def choose(op: Conv, *_: object) -> str:
        return method if (op.kernel, op.stride, op.padding) == (3, 1, (1, 1)) else "direct"

    monkeypatch.setattr("fastdiff.backends.native.methods.choose_method", choose)


METHODS = ["direct", "winograd2", "winograd4"]


@pytest.mark.parametrize(
    ("name", "method", "isa"),
    [
        # Of each network, every method and every instruction set once; all combinations are slow.
        pytest.param(*case, marks=[pytest.mark.slow] * (sum(turns) % len(METHODS) != 0))
        for case, turns in zip(
            itertools.product(NETWORKS, METHODS, ISAS),
            itertools.product(range(len(NETWORKS)), range(len(METHODS)), range(len(ISAS))),
            strict=True,
        )
    ],
)
def test_operations(replays, name, method, isa, monkeypatch):
    replay = replays(name, 3)
    force(monkeypatch, method)
    compiled = replay.compiled(isa)
    for i in range(len(replay.program.ops)):
        replay.check(compiled, i, 4e-6 if method == "winograd4" else 2e-6)


BF16_ISAS = [*extension.bf16_isas(), *extension.emulated_isas()]


# An emulation takes seconds for each of the larger networks.
LARGER = ("160 channels, 12x12", "resnet blocks, 24x40")


@pytest.mark.parametrize(("method", "tolerance"), [("direct", 4e-3), ("winograd2", 7e-3), ("winograd4", 2e-2)])
@pytest.mark.parametrize(
    ("name", "isa"),
    [
        pytest.param(name, isa, marks=[pytest.mark.slow] * (name in LARGER and isa not in ISAS))
        for name in ("tiny", "96 channels, 5x7", "200 channels, 7x5", "1x1", *LARGER)
        for isa in BF16_ISAS
    ],
)
def test_operations_in_bfloat16(replays, name, method, tolerance, isa, monkeypatch):
    """bfloat16 has 8 bits: 2^-9 is 2e-3, from each side of a product."""
    replay = replays(name, 3)
    force(monkeypatch, method)
    compiled = replay.compiled(isa, 2, torch.bfloat16)
    for i in range(len(replay.program.ops)):
        replay.check(compiled, i, tolerance)


@pytest.mark.skipif("amx" not in ISAS or "amx-emulated" not in BF16_ISAS, reason="no AMX here, or no emulation of it")
@pytest.mark.parametrize("method", ["direct", "winograd2"])
@pytest.mark.parametrize("name", ["tiny", "96 channels, 5x7", "200 channels, 7x5"])
def test_tiles_and_their_emulation_give_equal_bits(replays, name, method, monkeypatch):
    replay = replays(name, 3)
    force(monkeypatch, method)
    results = []
    for isa in ("amx", "amx-emulated"):
        compiled = replay.compiled(isa, 2, torch.bfloat16)
        compiled.engine.run(0, len(compiled.engine))
        results.append(compiled.out.clone())
    assert results[0].isfinite().all()
    assert results[0].any()
    assert torch.equal(*results)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    ("rows", "threads"), [(1, 2), *(pytest.param(*c, marks=pytest.mark.slow) for c in [(5, 3), (1, 3), (5, 2)])]
)
def test_operations_shared_by_threads(replays, rows, threads, isa):
    for name in ("160 channels, 12x12", "resnet blocks, 24x40", "1x1"):
        replay = replays(name, rows)
        compiled = replay.compiled(isa, threads)
        for i in range(len(replay.program.ops)):
            replay.check(compiled, i, 4e-6)


def network_errors(config, dtypes: list[str | None], backend: str, seed: int = 0) -> list[float]:
    """Return the relative errors of one evaluation in each dtype, against float64."""
    unet = random_unet(config, seed)
    x, labels, t = random_images(config, 2), random_labels(config, 2), 40
    table = solvers.ddim(SCHEDULE, spacing=[t])
    with torch.no_grad():
        exact = random_unet(config, seed).double()(x.double(), torch.tensor([t] * 2).double(), labels)
    errors = []
    for name in dtypes:
        sampler = Sampler(unet, SCHEDULE, backend=backend, dtype=name)
        state = State.create(x.clone(), TableBank([table], CPU), label=labels)
        runner = sampler._runners.runner(2, tuple(x.shape[1:]))
        runner.forward(state)
        errors.append(relative_error(state.out, exact))
    return errors


CONDITIONINGS = {
    "added": {}, "scale-shift": {"resnet_time_scale_shift": "scale_shift"},
    "add": {"class_image": "add"}, "multiply": {"class_image": "multiply"}, "concat": {"class_image": "concat"},
}  # fmt: skip


@pytest.mark.parametrize("conditioning", CONDITIONINGS)
def test_every_conditioning_in_every_precision(conditioning):
    config = change(
        TINY_CLASSES,
        **CONDITIONINGS[conditioning],
        sample_size=24,
        block_out_channels=(32, 64),
        attention_head_dim=None,
    )
    assert network_errors(config, ["float32"], "native")[0] <= 1e-5
    if extension.bf16_isas():
        plain, fast = network_errors(config, ["bfloat16", "bfloat16-fast"], "native")
        (torchs,) = network_errors(config, ["bfloat16"], "eager")
        assert 1e-4 < plain <= torchs
        assert plain < fast <= 2.5 * torchs


@pytest.mark.slow
def test_the_published_network_in_every_precision():
    """The errors that the precisions promise."""
    config = PUBLISHED["ddpm-cifar10-32"]
    assert network_errors(config, ["float32"], "native")[0] <= 1e-5
    if extension.bf16_isas():
        plain, fast = network_errors(config, ["bfloat16", "bfloat16-fast"], "native")
        assert plain <= 1e-2
        assert fast <= 2.5e-2


@pytest.mark.slow
@pytest.mark.parametrize("isa", ISAS)
def test_operations_of_the_published_network(replays, isa):
    replay = replays("ddpm-cifar10-32", 2)
    compiled = replay.compiled(isa, 2)
    for i in range(len(replay.program.ops)):
        replay.check(compiled, i, 4e-6)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("method", METHODS)
def test_statistics_at_a_large_mean(replays, method, isa, monkeypatch):
    """The variance is that of the deviations: E[x^2] - E[x]^2 would lose every digit at a mean of 10^4 deviations."""
    force(monkeypatch, method)
    replay = Replay(NETWORKS["96 channels, 5x7"], 3)
    i = next(i for i, op in enumerate(replay.program.ops) if op.dst.endswith("resnets.0.conv1"))
    source = replay.program.ops[i].src[0]
    large = torch.randn_like(replay.held[source]) + 1e4
    replay.put(source, large)
    replay.exact[replay.program.ops[i].dst] = replay.compute(replay.program.ops[i])
    # The sources themselves are rounded to 2^-11 of a deviation there.
    replay.check(replay.compiled(isa), i, 2e-3)

    bias = f"{source}.bias"
    replay.weights[bias] += 1e4
    with torch.no_grad():
        replay.single.get_parameter(bias).copy_(replay.weights[bias])
    j = next(j for j, op in enumerate(replay.program.ops) if op.dst == source)
    replay.exact[source] = replay.compute(replay.program.ops[j])
    compiled = replay.compiled(isa)
    compiled.arena.fill_(0xFF)
    for name in replay.program.reads(replay.program.ops[j]):
        replay.fill(compiled.buffer(name), replay.held[name])
    compiled.engine.run(j, j + 1)
    got, exact = compiled.statistics(source)[..., :96], strip_statistics(replay.exact[source])
    assert relative_error(got[:, :, 0], exact[:, :, 0]) <= 1e-6
    assert relative_error(got[:, :, 1], exact[:, :, 1]) <= 2e-3


# The choice of algorithms and weights ---------------------------------------------------------------------------------


def test_winograd_matrices_are_exact():
    """A^T [(G g) . (B^T d)] is the convolution, for the B^T and A^T that follow from the points."""
    for points, outputs in ((reference.POINTS["winograd2"], 2), (reference.POINTS["winograd4"], 4)):
        n = len(points) + 1
        bt = torch.zeros(n, n, dtype=torch.float64)
        everything = torch.tensor([1.0], dtype=torch.float64)  # coefficients, lowest power first

        def times(p: Tensor, root: float) -> Tensor:
            return torch.cat([p.new_zeros(1), p]) - root * torch.cat([p, p.new_zeros(1)])

        for j, point in enumerate(points):
            others = torch.tensor([1.0], dtype=torch.float64)
            for k, other in enumerate(points):
                if k != j:
                    others = times(others, other)
            bt[j, : len(others)] = others
            everything = times(everything, point)
        bt[-1] = everything
        at = torch.tensor(
            [[p**i for p in points] + [float(i == outputs - 1)] for i in range(outputs)], dtype=torch.float64
        )
        d, g = torch.randn(n, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
        y = at @ ((reference.winograd_g(points) @ g) * (bt @ d))
        assert (y - d.unfold(0, 3, 1) @ g).abs().max() < 1e-12


def test_packed_weights_of_a_concatenation():
    """Each source is padded by itself; a panel holds 64 outputs."""
    W = torch.randn(70, 5 + 3, 3, 3)
    packed = packing.pack(extension, W, (5, 3), "direct")
    assert packed.shape == (2, 1, 64 // packed.shape[4], 9 * 32, packed.shape[4])
    packed = packed.transpose(2, 3).flatten(3)
    taps = packed.permute(2, 0, 3, 1).reshape(9, 32, 128)
    assert torch.equal(taps[:, :5, :70], W[:, :5].permute(2, 3, 1, 0).flatten(0, 1))
    assert torch.equal(taps[:, 16:19, :70], W[:, 5:].permute(2, 3, 1, 0).flatten(0, 1))
    assert packed.count_nonzero() == W.numel()
    one = torch.zeros(1, 1, 3, 3)
    one[0, 0, 1, 1] = 1.0
    G = reference.winograd_g(reference.POINTS["winograd4"])[:, 1]
    expected = torch.outer(G, G).flatten()
    assert (packing.pack(extension, one, (1,), "winograd4")[0, :, 0, 0, 0] - expected).abs().max() < 1e-7


@pytest.mark.parametrize("isa", [*ISAS, *extension.emulated_isas()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ["direct", "winograd2", "winograd4"])
def test_packings_are_those_of_plain_operations(method, dtype, isa):
    for shape, channels in (((70, 8, 3, 3), (5, 3)), ((130, 33, 3, 3), (33,)), ((64, 40, 1, 1), (8, 32))):
        if shape[2] == 1 and method != "direct":
            continue
        W = torch.randn(shape)
        W[0, 0, 0, 0], W[1, 1, 0, 0] = 1e-39, -0.0  # a denormal number
        packed = packing.pack(extension, W, channels, method, dtype, isa)
        together = extension.slice(isa, dtype == torch.bfloat16)
        exact = reference.pack(W, channels, method, extension.GROUP, extension.PANEL, together)
        if dtype == torch.bfloat16:
            exact = exact.unflatten(3, (-1, 2)).transpose(4, 5)
        assert packed.dtype == dtype
        assert packed.shape == packing.pack(extension, W.to("meta"), channels, method, dtype, isa).shape == exact.shape
        most = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23  # half of a unit in the last place, and one
        assert ((packed.float() - exact).abs() <= 1.01 * most * exact.abs() + 1e-38).all()


def test_one_packing_for_all_batch_sizes():
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    for n in (1, 2, 3):
        sampler.sample(n, steps=1, batch_size=n)
    weights = packing.Weights.of(unet, extension)
    assert all(runner.weights is weights for runner in sampler._runners.prepared.values())
    kernels = [key for key, packed in weights.packed.items() if packed.ndim > 1]
    convolutions = sum(isinstance(op, Conv) for op in lower(unet, (8, 8)).ops)
    assert convolutions <= len(kernels) <= 3 * convolutions


@pytest.mark.slow
def test_packed_weights_take_at_most_four_times_the_raw_ones():
    """float32, for the batch sizes 1, 8 and 32, whose algorithms differ."""
    unet = random_unet(PUBLISHED["ddpm-cifar10-32"])
    raw = 4 * sum(p.numel() for p in unet.parameters())
    sizes = []
    for n in (1, 8, 32):
        sampler = Sampler(unet, SCHEDULE, backend="native")
        sampler.sample(n, steps=1, batch_size=n)
        memory = sampler._runners.runner(n, (3, 32, 32)).memory()
        sizes.append(memory["weights"])
        assert min(memory.values()) > 0
    assert raw < sizes[0] < sizes[1] <= sizes[2] <= 4 * raw


def test_the_choice_depends_on_the_shape_alone_where_bits_matter():
    program = lower(random_unet(PUBLISHED["ddpm-cifar10-32"]), (32, 32))
    convs = [op for op in program.ops if isinstance(op, Conv)]
    assert {native.choose_method(op, program, 1) for op in convs} == {"direct", "winograd2", "winograd4"}
    many = {op.dst for op in convs if native.choose_method(op, program, 32) == "winograd4"}
    few = {op.dst for op in convs if native.choose_method(op, program, 1) == "winograd4"}
    assert few < many
    assert all(native.choose_method(op, program, 1) == "direct" for op in convs if (op.kernel, op.stride) != (3, 1))


# As a backend ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "name",
    [pytest.param("ddpm-cifar10-32", marks=pytest.mark.slow), "class image, concat", "scale-shift with classes"],
)
def test_sampler_is_close_to_eager_in_float64(name, isa, monkeypatch):
    monkeypatch.setenv("FASTDIFF_ISA", isa)
    unet = random_unet(NETWORKS.get(name) or PUBLISHED[name])
    options = {"steps": 2, "seed": 3}
    if unet.config.num_classes:
        options |= {"labels": [0, 1]}
    if unet.config.null_label is not None:
        options |= {"guidance": [1.0, 2.5]}
    got = Sampler(unet, SCHEDULE, backend="native").sample(2, **options).images
    exact = Sampler(unet, SCHEDULE, backend="eager", dtype="float64").sample(2, **options).images
    assert relative_error(got, exact) <= 2e-5


@torch.no_grad()
def test_large_batches_run_in_equal_parts(monkeypatch):
    unet = random_unet(TINY_CLASSES)
    options = {"steps": 2, "labels": [0, 1, 2, 3, 0, 1, 2], "guidance": [1.0, 2.0, 3.0, 1.0, 4.0, 1.0, 0.0]}
    expected = Sampler(unet, SCHEDULE, determinism="bitwise").sample(7, **options).images
    sampler = Sampler(unet, SCHEDULE, determinism="bitwise")
    runner = sampler._runners.runner(7, (3, 8, 8))
    for bytes_, rows in ((1, 1), (5 * runner.row_bytes, 5)):
        monkeypatch.setattr("fastdiff.backends.native.program.CACHE_BYTES", bytes_)
        assert torch.equal(sampler.sample(7, **options).images, expected)
        assert set(runner.programs) == {native.part_rows(14, runner.row_bytes)} == {rows}
        runner.programs.clear()


def test_runs_that_take_turns_are_followed_once(monkeypatch):
    unet = random_unet(TINY_CLASSES)
    spec = Spec(2, (3, 8, 8), torch.float32, CPU, null_label=4)
    tables = [solvers.ddim(SCHEDULE, 5), solvers.ddim(SCHEDULE, 5, spacing="leading")]

    def start(i):
        x = random_images(TINY_CLASSES, 2)
        return State.create(x, TableBank([tables[i]], CPU), label=[i, 3 - i], guidance=[1.0, 2.0])

    runner = native.prepare(unet, spec)
    expected = []
    for i in range(2):
        state = start(i)
        while not state.done:
            runner.step(state)
        expected.append(state.x)
    checked = []
    of = packing.Weights.of
    monkeypatch.setattr(packing.Weights, "of", lambda *a: checked.append(1) or of(*a))
    states = [start(0), start(1)]
    embedded = dict(runner.embeddings.places)
    for _ in range(5):
        for state in states:
            runner.step(state)
    assert all(torch.equal(state.x, x) for state, x in zip(states, expected, strict=True))
    assert len(checked) == 2  # at the start of each, not at every turn
    assert runner.embeddings.places == embedded
    del state
    states.pop()
    assert list(runner.states) == states  # a run that ended is not kept alive


def test_embeddings_of_timesteps_do_not_pile_up(monkeypatch):
    monkeypatch.setattr("fastdiff.backends.native.runner.MOST_TIMES", 9)
    unet = random_unet(TINY)
    runner = native.prepare(unet, Spec(1, (3, 8, 8), torch.float32, CPU))
    eager = Sampler(unet, SCHEDULE, backend="eager")
    x = random_images(TINY, 1)
    states = []
    for i in range(4):
        first = [80.0, 65.0, 50.0, 35.0, 20.0, 5.0]
        table = solvers.ddim(SCHEDULE, spacing=first if i == 0 else [99.0 - i, 90.0 - i, 3.5 - i])
        states.append((table, State.create(x.clone(), TableBank([table], CPU))))
        for _, state in states:  # the earlier ones go on, whatever the new one pushed out
            runner.step(state)
        assert len(runner.embeddings.places) <= 9
    table, state = states[0]
    while not state.done:
        runner.step(state)
    expected = eager.sample(1, solver=table, noise=x).images
    assert (state.x - expected).abs().max() < 1e-4


def test_nan_in_one_image_leaves_the_others_bit_unchanged():
    unet = random_unet(TINY)
    x = Sampler(unet, SCHEDULE, backend="native")
    noise = random_images(TINY, 3)
    clean = x.sample(3, steps=3, noise=noise, clip=None).images
    noise[1, 0, 3, 3] = torch.nan
    with pytest.raises(Exception, match="NaN") as error:
        x.sample(3, steps=3, noise=noise, clip=None)
    assert torch.equal(error.value.output.images[[0, 2]], clean[[0, 2]])


TABLES = (
    solvers.ddim(SCHEDULE, 5).with_guidance_interval(0.0, 0.6),
    solvers.ddpm(SCHEDULE, 4),
    solvers.ddim(SCHEDULE, 3, eta=0.7),
)


def images_of(batch: int, probe: int, threads: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """A batch of random images with one that never changes in slot ``probe``: that image, and all."""
    draw = random.Random(batch)
    slots = range(batch)
    table, index = [draw.randrange(3) for _ in slots], [draw.randrange(2**40) for _ in slots]
    label, guidance = [draw.randrange(5) for _ in slots], [draw.choice([1.0, 3.0]) for _ in slots]
    table[probe], index[probe], label[probe], guidance[probe] = 0, 7, 3, 2.5
    i = torch.tensor(index)
    x = noise.normal(torch.full_like(i, 11), i, torch.zeros_like(i), noise.INITIAL, (3, 8, 8))
    state = State.create(
        x, TableBank(TABLES, CPU), seed=11, index=index, table=table, label=label, guidance=guidance,
    )  # fmt: skip
    spec = Spec(batch, (3, 8, 8), dtype, CPU, TINY_CLASSES.null_label, "bitwise")
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        runner = prepare("native", random_unet(TINY_CLASSES), spec)
    finally:
        torch.set_num_threads(before)
    for step in range(5):
        if step == 2 and batch > 1:
            state.idle([(probe + 1) % batch])  # cancelled
        runner.step(state)
    return state.x[probe].clone(), state.x.clone()


@pytest.mark.parametrize(
    ("batch", "threads"),
    [
        pytest.param(batch, threads, marks=[pytest.mark.slow] * ((i + threads) % 2))
        for i, batch in enumerate((1, 2, 3, 5, 8, 16, 64))
        for threads in (1, 2)
    ],
)
def test_bits_do_not_depend_on_the_batch(batch, threads):
    alone, _ = images_of(1, 0, 1)
    for probe in {0, batch // 2, batch - 1}:
        image, others = images_of(batch, probe, threads)
        assert torch.equal(image.view(torch.int32), alone.view(torch.int32))
        assert others.isfinite().all()


@pytest.mark.parametrize("determinism", ["seed", "bitwise"])
def test_class_images_do_not_depend_on_what_else_is_drawn(determinism, monkeypatch):
    """Labels go through the class encoder, which is PyTorch's, one by one."""
    unet = random_unet(change(TINY_CLASSES, class_image="add"))
    seen, forward = [], ClassEncoder.forward
    # The runner would refuse a network of which a method was replaced.
    monkeypatch.setattr("fastdiff.backends.native.runner.reasons_against", lambda *_: [])
    monkeypatch.setattr(ClassEncoder, "forward", lambda self, n, size: seen.append(len(n)) or forward(self, n, size))
    spec = Spec(3, (3, 8, 8), torch.float32, CPU, TINY_CLASSES.null_label, determinism)
    state = State.create(torch.randn(3, 3, 8, 8), TableBank(TABLES, CPU), label=[2, 0, 2], guidance=2.0)
    native.NativeRunner(unet, spec).forward(state)
    assert seen == ([1, 1, 1] if determinism == "bitwise" else [3])  # two classes and the null label


@pytest.mark.parametrize("isa", BF16_ISAS)
def test_bits_in_bfloat16_do_not_depend_on_the_batch(isa, monkeypatch):
    monkeypatch.setenv("FASTDIFF_ISA", isa)
    alone, _ = images_of(1, 0, 1, torch.bfloat16)
    image, others = images_of(7, 4, 2, torch.bfloat16)
    assert torch.equal(image.view(torch.int32), alone.view(torch.int32))
    assert others.isfinite().all()
    monkeypatch.delenv("FASTDIFF_ISA")
    exact, _ = images_of(1, 0, 1)
    assert 1e-4 < relative_error(alone, exact) < 3e-2


def test_bitwise_samples_in_any_chunks():
    sampler = Sampler(random_unet(TINY_CLASSES), SCHEDULE, determinism="bitwise")
    assert sampler.backend == "native"
    labels = [i % 4 for i in range(17)]
    options = {"solver": "ddpm", "steps": 3, "guidance": [1.0, 2.0] * 8 + [3.0]}
    expected = sampler.sample(17, labels=labels, batch_size=17, **options).images
    for size in (1, 2, 5, 16):
        assert torch.equal(sampler.sample(17, labels=labels, batch_size=size, **options).images, expected)
    part = sampler.sample(1, labels=labels[9], solver="ddpm", steps=3, guidance=2.0, start_index=9).images
    assert torch.equal(part[0], expected[9])


def test_more_memory_than_there_is():
    with pytest.raises(BackendError, match=r"needs 1125899906842624 bytes \(1048576.0 GiB\) .*smaller batch_size"):
        native.aligned(1 << 50)


def psnr(got: Tensor, exact: Tensor) -> float:
    """In dB, for images in [-1, 1]."""
    return float(10 * torch.log10(4 / ((got.double() - exact.double()) ** 2).mean()))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "options"),
    [(10, {"solver": "ddim", "steps": 50, "guidance": 3.0}), (2, {"solver": "ddpm", "steps": 1000})],
    ids=["ddim 50", "ddpm 1000"],
)
def test_whole_runs_of_the_built_in_model(n, options):
    """Errors do not grow over a run: against float64, the same noise."""
    options = {**options, "labels": list(range(n)), "seed": 5}
    exact = Sampler.from_pretrained("fashion-mnist", backend="eager", device="cpu", dtype="float64")
    images = exact.sample(n, **options).images
    least = {"float32": 60} | ({"bfloat16": 30, "bfloat16-fast": 25} if extension.bf16_isas() else {})
    for dtype, db in least.items():
        sampler = Sampler.from_pretrained("fashion-mnist", backend="native", device="cpu", dtype=dtype)
        assert psnr(sampler.sample(n, **options).images, images) >= db, dtype


@pytest.mark.slow
def test_bfloat16_draws_what_float32_draws():
    """The classifier reads as many guided samples as their class in every precision, but for what chance moves."""
    classifier = Classifier.load()
    labels = torch.arange(200) % 10
    right = {}
    for dtype in ["float32", *(["bfloat16", "bfloat16-fast"] if extension.bf16_isas() else [])]:
        sampler = Sampler.from_pretrained("fashion-mnist", backend="native", device="cpu", dtype=dtype)
        images = sampler.sample(200, steps=20, labels=labels, guidance=2.0).images
        right[dtype] = int((classifier.judge(images)[0].argmax(1) == labels).sum())
    assert right["float32"] >= 160
    assert all(abs(n - right["float32"]) <= 6 for n in right.values()), right


@pytest.mark.slow
def test_a_whole_run_of_the_published_network():
    unet = random_unet(PUBLISHED["ddpm-cifar10-32"])
    got = Sampler(unet, backend="native").sample(1, steps=50).images
    exact = Sampler(unet, backend="eager", dtype="float64").sample(1, steps=50).images
    assert psnr(got, exact) >= 60


def test_weights_that_change_are_noticed():
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    before = sampler.sample(1, steps=2).images
    for edit in (lambda w: w.data.mul_(1.5), lambda w: w.data.copy_(w.flip(0)), lambda w: w.data.copy_(w.flip(3))):
        edit(unet.mid_block.resnets[0].conv1.weight)
        after = sampler.sample(1, steps=2).images
        assert (after - before).abs().max() > 1e-3
        expected = Sampler(unet, SCHEDULE, backend="eager").sample(1, steps=2).images
        assert (after - expected).abs().max() < 1e-4
        before = after


def test_modules_that_change_are_refused():
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE, backend="native")
    hook = unet.conv_in.register_forward_hook(lambda *_: None)
    with pytest.raises(BackendError, match="forward hooks"):
        sampler.sample(1, steps=1)
    hook.remove()
    sampler.sample(1, steps=1)
    wider = torch.nn.Conv2d(3, 64, 3, padding=1)  # of the same type: its weights would not fit their place
    for name, module, words in (
        ("conv_in", wider, "parameter conv_in.weight has shape"),
        ("conv_out", torch.nn.Sequential(unet.conv_out), "conv_out is a Sequential, not a Conv2d"),
    ):
        kept = getattr(unet, name)
        setattr(unet, name, module)
        with pytest.raises(BackendError, match=words):
            sampler.sample(1, steps=1)
        setattr(unet, name, kept)
    sampler.sample(1, steps=1)


def test_every_reason_is_told():
    class Other(torch.nn.Module):
        pass

    spec = Spec(1, (3, 8, 8), torch.float16, torch.device("meta"))
    with pytest.raises(BackendError, match=r"fastdiff.UNet only, not Other; .*not on meta; .*not in float16"):
        prepare("native", Other(), spec)
    spec = dataclasses.replace(spec, dtype=torch.float32, device=CPU)
    assert native.reasons_against(random_unet(TINY), spec) == []
    assert native.reasons_against(random_unet(change(class_embed_type="timestep")), spec) == [
        "it has no class_embed_type 'timestep'"
    ]


def test_without_the_extension(without_extension):
    with pytest.raises(BackendError, match=r"_native is not built .*C\+\+ compiler"):
        Sampler(random_unet(TINY), SCHEDULE, backend="native")
    assert Sampler(random_unet(TINY), SCHEDULE).backend == "eager"


def test_bfloat16_needs_an_instruction_set_that_multiplies_it(monkeypatch):
    monkeypatch.setenv("FASTDIFF_ISA", ISAS[-1])
    with pytest.raises(BackendError, match="no products of bfloat16"):
        Sampler(random_unet(TINY), SCHEDULE, backend="native", dtype="bfloat16")
    assert Sampler(random_unet(TINY), SCHEDULE, dtype="bfloat16").backend == "eager"
    with pytest.raises(BackendError, match=r"'eager' has one kind of bfloat16"):
        Sampler(random_unet(TINY), SCHEDULE, dtype="bfloat16-fast")


def test_an_unknown_instruction_set_is_refused(monkeypatch):
    monkeypatch.setenv("FASTDIFF_ISA", "sse9")
    with pytest.raises(BackendError, match=r"FASTDIFF_ISA='sse9' .*available: "):
        Sampler(random_unet(TINY), SCHEDULE, backend="native")


def test_two_samplers_in_two_threads():
    unets = [random_unet(TINY, seed) for seed in (0, 1)]
    expected = [Sampler(u, SCHEDULE, backend="native").sample(2, steps=20).images for u in unets]
    samplers = [Sampler(u, SCHEDULE, backend="native") for u in unets]
    got: dict[int, Tensor] = {}

    def work(i: int) -> None:
        got[i] = samplers[i].sample(2, steps=20).images

    threads = [threading.Thread(target=work, args=(i,)) for i in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(got[i], expected[i]) for i in (0, 1))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_fork_after_use():
    """The child has none of the parent's threads; it makes its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        sampler = Sampler(random_unet(TINY), SCHEDULE, backend="native")
        expected = sampler.sample(1, steps=2).images
        child = os.fork()
        if child == 0:
            try:
                os._exit(int(not torch.equal(sampler.sample(1, steps=2).images, expected)))
            finally:
                os._exit(2)
        _, status = os.waitpid(child, 0)
        assert os.waitstatus_to_exitcode(status) == 0
        assert torch.equal(sampler.sample(1, steps=2).images, expected)
    finally:
        torch.set_num_threads(before)


def test_more_threads_than_processors(monkeypatch):
    expected = Sampler(random_unet(TINY), SCHEDULE, backend="native").sample(3, steps=3).images
    monkeypatch.setattr(threads, "number", lambda: 4 * (os.cpu_count() or 1))
    got = Sampler(random_unet(TINY), SCHEDULE, backend="native").sample(3, steps=3).images
    assert torch.equal(got, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_the_inner_kernel_stays_in_registers(isa):
    """A compiler that spills its accumulators halves its speed. A ratio within one run, the best of many short ones:
    of as many as it takes, as what else runs on the same core costs the products more than it costs their peak.
    """
    best = 0.0
    for _ in range(60):
        product, peak, _ = extension.rates(isa)
        best = max(best, product / peak)
        if best > 0.7:
            return
        time.sleep(0.2)
    pytest.fail(f"the products of {isa} run at {best:.2f} of the peak, at best")


def test_strips_are_the_engines():
    assert extension.STRIP == STRIP
