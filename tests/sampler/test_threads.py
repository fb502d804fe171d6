"""A sampler and its network in several threads; calls from within its own steps; memory that stays bounded."""

from __future__ import annotations

import gc
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastdiff.backends.native import NativeRunner, extension
from fastdiff.errors import BackendError, Cancelled, FastdiffError, InvalidArgument, ReentrantCall
from fastdiff.sampler import Event, Sampler
from fastdiff.schedule import NoiseSchedule
from fastdiff.unet import UNet
from tests.sampler.by_hand import SCHEDULE, SHAPE, TINY_DROPOUT, Probe, sampler_of
from tests.support.unets import TINY_CLASSES, random_unet

WAIT = 60  # seconds until a call that hangs fails
needs_native = pytest.mark.skipif(extension() is None, reason="the native engine is not built")
BACKENDS = ["eager", pytest.param("native", marks=needs_native)]


def finishes(work: Callable[[], Any]) -> Any:
    """Return the result of ``work``, which fails if it takes as long as a deadlock."""
    results: list[Any] = []

    def run() -> None:
        try:
            results.append((work(), None))
        except BaseException as e:
            results.append((None, e))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(WAIT)
    assert results, "it hangs"
    value, error = results[0]
    if error is not None:
        raise error
    return value


# Modes ----------------------------------------------------------------------------------------------------------------


class Ones(nn.Module):
    """Predicts ones, of which dropout doubles or drops each pixel; ``within`` is called before that."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)
        self.scale = nn.Parameter(torch.ones(1))
        self.within: Callable[[], object] = lambda: None

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        self.within()
        return self.drop(torch.ones_like(x)) * self.scale


def ones(net: nn.Module, **options: Any) -> Sampler:
    return Sampler(net, prediction="sample", shape=SHAPE, backend="eager", **options)


def test_two_samplers_over_one_network_in_training() -> None:
    """The second one starts within the first one's step, and ends after it."""
    net = Ones().train()
    first, second = ones(net), ones(net)
    within, second_within, first_done = threading.Event(), threading.Event(), threading.Event()

    def wait() -> None:
        if threading.current_thread() is threading.main_thread():
            if not within.is_set():
                within.set()
                assert second_within.wait(WAIT)
        else:
            second_within.set()
            assert first_done.wait(WAIT)

    net.within = wait
    with ThreadPoolExecutor(1) as pool:
        other = pool.submit(lambda: (within.wait(WAIT), second.sample(1, steps=1).images)[1])
        images = first.sample(1, steps=1).images
        first_done.set()
        assert (images == 1).all()
        assert (other.result(WAIT) == 1).all(), "dropout was on"
    assert all(m.training for m in net.modules())


def test_training_goes_on_in_another_thread() -> None:
    """A training step within a sampling step has dropout, and a change of the mode does not reach the sampler."""
    seen = []

    class Net(Ones):
        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            if not seen and not torch.is_grad_enabled():
                seen.append(None)
                with ThreadPoolExecutor(1) as pool:
                    seen.append(pool.submit(train).result(WAIT))
            return super().forward(x, t)

    def train() -> bool:
        net.train()
        out = net(torch.zeros(1, *SHAPE), torch.zeros(1))
        out.sum().backward()
        return bool(((out == 0) | (out == 2)).all())

    net = Net().eval()
    assert (ones(net).sample(1, steps=2).images == 1).all()
    assert seen == [None, True]
    assert net.training
    assert net.scale.grad is not None


@pytest.mark.parametrize("where", ["callback", "guide", "noise", "hook"])
def test_no_mode_flips_whoever_looks(where: str) -> None:
    unet = random_unet(TINY_DROPOUT).train()
    modes = [m.training for m in unet.modules()]
    sampler = Sampler(unet, SCHEDULE, backend="eager")
    seen: list[list[bool]] = []

    def look(*_: Any) -> None:
        seen.append([m.training for m in unet.modules()])

    options: dict[str, Any] = {}
    if where == "callback":
        options["callback"] = look
    elif where == "guide":
        options["guide"] = lambda x0, i: (look(), x0.flatten(1).sum(dim=1))[1]
    elif where == "noise":
        options["noise"] = lambda row, i: (look(), torch.zeros(len(i), *SHAPE))[1]
    else:
        unet.mid_block.register_forward_pre_hook(look)
    sampler.sample(1, steps=2, solver="ddpm", **options)
    assert seen
    assert all(found == modes for found in seen)


def test_a_network_that_cannot_be_evaluated_is_refused_by_name() -> None:
    net = torch.compile(Ones().train(), backend="eager")
    with pytest.raises(BackendError, match=r"torch.compile has compiled it.*; call .eval\(\)"):
        ones(net)
    net.eval()
    assert (ones(net).sample(1, steps=1).images == 1).all()


@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="needs a C++ compiler")
def test_a_compiled_network_in_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """It runs in evaluation mode, is compiled once, and follows its weights."""
    monkeypatch.setattr(torch._dynamo.config, "error_on_recompile", True)
    net = Ones().train()
    sampler = Sampler(net, prediction="sample", shape=SHAPE, backend="compiled")
    assert (sampler.sample(1, steps=2).images == 1).all()
    with torch.no_grad():
        net.scale.mul_(0.5)
    for _ in range(2):
        assert (sampler.sample(1, steps=2, callback=lambda _: None).images == 0.5).all()
    assert all(m.training for m in net.modules())


def test_what_a_network_counts_is_counted() -> None:
    class Counting(Ones):
        calls = 0

        def forward(self, x: Tensor, t: Tensor) -> Tensor:
            self.calls += 1
            return super().forward(x, t)

    net = Counting()
    sampler = ones(net)
    counts = []
    sampler.sample(2, steps=3, batch_size=1, callback=lambda _: counts.append(net.calls))
    assert counts == [1, 2, 3, 4, 5, 6]
    net.calls = 0
    ones(net).sample(1, steps=3)
    assert net.calls == 3


# Calls from within a step ---------------------------------------------------------------------------------------------


def test_a_noise_function_may_use_the_sampler() -> None:
    sampler = sampler_of()
    inner: list[Tensor] = []

    def noise(row: int | None, indices: range) -> Tensor:
        inner.append(sampler.sample(1, steps=2, seed=5).images)
        generator = torch.Generator().manual_seed(0 if row is None else row + 1)
        return torch.randn(len(indices), *SHAPE, generator=generator)

    out = finishes(lambda: sampler.sample(2, steps=3, solver="ddpm", noise=noise).images)
    assert len(inner) == 3  # the initial noise, and that of two rows: the last one adds none
    assert all(torch.equal(images, sampler.sample(1, steps=2, seed=5).images) for images in inner)
    assert torch.equal(out, sampler.sample(2, steps=3, solver="ddpm", noise=noise).images)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("at", [None, 0, 1])
@pytest.mark.parametrize("end", ["close", "cancel"])
def test_a_noise_function_may_end_the_call(backend: str, at: int | None, end: str) -> None:
    sampler = sampler_of(backend=backend)

    def noise(row: int | None, indices: range) -> Tensor:
        if row == at:
            getattr(sampler, end)()
        return torch.zeros(len(indices), *SHAPE)

    with pytest.raises(Cancelled, match="0 of 1"):
        finishes(lambda: sampler.sample(1, steps=3, solver="ddpm", noise=noise))
    if end == "close":
        assert not sampler._runners.prepared
    else:
        assert len(sampler.sample(1, steps=2).images) == 1


def hooked(sampler: Sampler, call: Callable[[], object]) -> None:
    """Make ``call`` in the network's first evaluation."""

    def once(*_: Any) -> None:
        handle.remove()
        call()

    handle = sampler.unet.mid_block.register_forward_pre_hook(once)


CALLS: dict[str, Callable[[Sampler], object]] = {
    "sample": lambda sampler: sampler.sample(1, steps=1),
    "stream": lambda sampler: next(sampler.stream(1, steps=1)),
    "invert": lambda sampler: sampler.invert(torch.zeros(1, *SHAPE), steps=1),
    "deadline": lambda sampler: sampler.request(1, deadline_s=10.0),
}


@pytest.mark.parametrize("call", CALLS)
def test_a_call_from_a_hook_is_refused_at_once(call: str) -> None:
    sampler = sampler_of()
    expected = sampler.sample(1, steps=2).images
    hooked(sampler, lambda: CALLS[call](sampler))
    with pytest.raises(ReentrantCall, match="the sampler was used from within one of its own steps"):
        finishes(lambda: sampler.sample(1, steps=2))
    assert torch.equal(finishes(lambda: sampler.sample(1, steps=2).images), expected)
    assert issubclass(ReentrantCall, FastdiffError)


@pytest.mark.parametrize("steps", [1, 3])
def test_close_from_a_hook(steps: int) -> None:
    """The running call ends before its next row; the runners are freed when the step ends."""
    sampler = sampler_of(dtype="float64")
    handle = sampler.unet.mid_block.register_forward_pre_hook(lambda *_: sampler.close())
    if steps == 1:
        assert len(finishes(lambda: sampler.sample(1, steps=1)).images) == 1
    else:
        with pytest.raises(Cancelled):
            finishes(lambda: sampler.sample(1, steps=steps))
    handle.remove()
    assert not sampler._runners.prepared
    assert sampler._runners._network_run is None


def test_another_sampler_in_a_hook() -> None:
    sampler, other = sampler_of(), sampler_of()
    inner = []
    hooked(sampler, lambda: inner.append(other.sample(1, steps=2).images))
    images = finishes(lambda: sampler.sample(1, steps=2).images)
    assert torch.equal(images, inner[0])


@pytest.mark.parametrize("call", ["next", "close"])
def test_a_stream_within_its_own_step(call: str) -> None:
    sampler = sampler_of()
    stream: Iterator[Event] = sampler.stream(1, steps=3)
    hooked(sampler, lambda: next(stream) if call == "next" else stream.close())
    with pytest.raises(ReentrantCall, match="the stream was used from within"):
        finishes(lambda: list(stream))
    assert torch.equal(list(sampler.stream(1, steps=3))[-1].x, sampler.sample(1, steps=3).images)


def test_a_stream_in_several_threads() -> None:
    sampler = sampler_of()
    stream = sampler.stream(8, steps=4, batch_size=1)
    with ThreadPoolExecutor(4) as pool:
        parts = [future.result(WAIT) for future in [pool.submit(list, stream) for _ in range(4)]]
    events = sorted((e.indices.start, e.row) for part in parts for e in part)
    assert events == [(image, row) for image in range(8) for row in range(4)]


# Attributes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("unet", Probe()),
        ("schedule", NoiseSchedule()),
        ("prediction", "sample"),
        ("backend", "native"),
        ("device", torch.device("meta")),
        ("dtype", torch.float64),
        ("determinism", "bitwise"),
        ("fast", True),
        ("info", None),
        ("scheduler_config", {"clip_sample": False}),
        ("measurements_file", "trilemma.json"),
    ],
)
def test_attributes_whose_change_would_be_ignored_cannot_be_set(name: str, value: object) -> None:
    sampler = sampler_of()
    before = getattr(sampler, name)
    with pytest.raises(InvalidArgument, match=rf"sampler\.{name} cannot be changed.*make another Sampler"):
        setattr(sampler, name, value)
    assert getattr(sampler, name) is before
    sampler.note = 1  # type: ignore[attr-defined]  # a user's own
    sampler.note = 2  # type: ignore[attr-defined]
    assert len(sampler.sample(1, steps=1).images) == 1


# Weights that change between rows -------------------------------------------------------------------------------------


@torch.no_grad()
def in_place(unet: UNet) -> None:
    unet.conv_out.weight.mul_(-1.5)


def through_data(unet: UNet) -> None:
    unet.conv_out.weight.data.mul_(-1.5)


def another_tensor(unet: UNet) -> None:
    unet.conv_out.weight = nn.Parameter(unet.conv_out.weight.detach() * -1.5)


def swapped_and_restored(unet: UNet) -> None:
    """Change the weights for one event, and back for the next."""
    unet.conv_out.weight.data.mul_(-1.0)


CHANGES = [in_place, through_data, another_tensor, swapped_and_restored]


def changed_midway(sampler: Sampler, change: Callable[[UNet], None]) -> Tensor:
    """Change the weights after the first row of four, and after the second one again if they are to be restored."""
    for event in sampler.stream(2, steps=4):
        if event.row == 0 or (event.row == 1 and change is swapped_and_restored):
            change(sampler.unet)
    return event.x


@needs_native
@pytest.mark.parametrize("dtype", [None, "float64"])
@pytest.mark.parametrize("change", CHANGES)
def test_weights_changed_between_rows_are_used(change: Callable[[UNet], None], dtype: str | None) -> None:
    expected = changed_midway(sampler_of(backend="eager"), change)
    got = changed_midway(sampler_of(backend="eager" if dtype else "native", dtype=dtype), change)
    unchanged = sampler_of().sample(2, steps=4).images
    assert (expected - unchanged).abs().max() > 0.05
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-3)


@needs_native
def test_weights_restored_leave_right_packings() -> None:
    """Batches of another size are packed while other weights are there, and drawn after they were restored."""
    sampler = sampler_of(backend="native")
    expected = {n: sampler_of(backend="eager").sample(n, steps=2).images for n in (1, 5)}
    for event in sampler.stream(1, steps=2):
        if event.row == 0:
            swapped_and_restored(sampler.unet)
            sampler.sample(5, steps=1)
            swapped_and_restored(sampler.unet)
    for n, images in expected.items():
        torch.testing.assert_close(sampler.sample(n, steps=2).images, images, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_changed_in_a_callback_are_used(backend: str) -> None:
    def change(event: Event) -> None:
        if event.row == 0:
            in_place(sampler.unet)

    sampler = sampler_of(backend=backend)
    got = sampler.sample(2, steps=4, callback=change).images
    torch.testing.assert_close(got, changed_midway(sampler_of(backend=backend), in_place), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("guidance", [1.0, 2.0])
@pytest.mark.parametrize("rows", [1, 4])
def test_a_class_table_that_shrinks_between_rows_is_refused(backend: str, guidance: float, rows: int) -> None:
    """It has too few rows for the label 3, or for the null label 4."""
    unet = random_unet(TINY_CLASSES)
    sampler = Sampler(unet, SCHEDULE, backend=backend)
    stream = sampler.stream(2, steps=4, labels=3, guidance=guidance)
    next(stream)
    table = unet.class_embedding
    assert isinstance(table, nn.Embedding)
    table.weight = nn.Parameter(table.weight.detach()[:rows].clone())
    for call in (lambda: next(stream), lambda: sampler.sample(2, steps=2, labels=3)):
        with pytest.raises(BackendError, match=rf"class_embedding has {rows} rows now.*another Sampler"):
            call()


@needs_native
def test_a_class_table_that_grows_is_refused_by_native() -> None:
    """Its configuration does not describe it any more, so a program cannot be made of it."""
    sampler = Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend="native")
    stream = sampler.stream(2, steps=4, labels=3)
    next(stream)
    table = sampler.unet.class_embedding
    table.weight = nn.Parameter(torch.cat([table.weight.detach()] * 2))
    with pytest.raises(BackendError, match=r"class_embedding.weight has shape \(10, 32\), not \(5, 32\)"):
        next(stream)


# Memory ---------------------------------------------------------------------------------------------------------------


def held(sampler: Sampler) -> int:
    runners = [runner for runner in sampler._runners.values() if isinstance(runner, NativeRunner)]
    return sum(sum(r.memory().values()) - r.memory()["weights"] for r in runners)


@needs_native
@pytest.mark.parametrize("sizes", [range(1, 25), [*range(24, 0, -1)], [1, 24] * 6, [8, 16, 24] * 4])
def test_memory_is_that_of_the_largest_batch(sizes: list[int]) -> None:
    sampler = sampler_of(backend="native")
    sampler.sample(24, steps=1, batch_size=24)
    most = held(sampler)
    assert most > 0
    for n in sizes:
        sampler.sample(n, steps=1, batch_size=n)
        assert held(sampler) < 3 * most
        assert len(sampler._runners) <= 16


@needs_native
def test_the_last_used_runners_are_kept() -> None:
    sampler = sampler_of(backend="native")
    runners = [sampler._runners.runner(n, SHAPE) for n in (4, 1, 4, 1, 4)]
    assert runners[0] is runners[2] is runners[4]
    assert runners[1] is runners[3]
    assert list(sampler._runners.values())[-1] is runners[4]


@pytest.mark.parametrize("backend", BACKENDS)
def test_runners_are_bounded_by_number_too(backend: str) -> None:
    sampler = sampler_of(backend=backend)
    for n in range(1, 40):
        sampler._runners.runner(n, SHAPE)
    assert len(sampler._runners) <= 16
    assert [runner.spec.batch for runner in sampler._runners.values()][-1] == 39  # type: ignore[attr-defined]


@needs_native
def test_a_stream_keeps_its_runner_while_others_take_its_place() -> None:
    sampler = sampler_of(backend="native")
    expected = [event.x for event in sampler.stream(2, steps=4)]
    got = []
    for event in sampler.stream(2, steps=4):
        got.append(event.x)
        for n in range(3, 23):
            sampler.sample(n, steps=1)
        assert 2 not in [runner.spec.batch for runner in sampler._runners.values()]  # type: ignore[attr-defined]
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@needs_native
def test_abandoned_streams_free_their_runners() -> None:
    sampler = sampler_of(backend="native")

    def alive() -> int:
        gc.collect()
        return sum(isinstance(thing, NativeRunner) for thing in gc.get_objects())

    before = alive()
    streams = [sampler.stream(n, steps=4) for n in range(1, 40)]
    for stream in streams:
        next(stream)
    del stream, streams
    assert alive() - before <= 16
    sampler.close()
    assert alive() - before <= 0


def resident() -> float:
    """Return the resident memory of this process in MB."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("VmRSS"))


def soak(calls: int) -> list[float]:
    """Call a sampler with random batch sizes and sizes; return the resident memory after each tenth of the calls."""
    sampler, choose = sampler_of(backend="native"), random.Random(0)
    found = []
    for i in range(calls):
        size = (8 * choose.randint(1, 6), 8 * choose.randint(1, 6))
        sampler.sample(choose.randint(1, 12), steps=1, size=size)
        if (i + 1) % (calls // 10) == 0:
            gc.collect()
            found.append(resident())
    return found


@needs_native
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("calls", [60, pytest.param(400, marks=pytest.mark.slow)])
def test_memory_does_not_grow_with_the_number_of_calls(calls: int) -> None:
    found = soak(calls)
    assert found[-1] - found[4] < 40, f"resident memory grew: {found}"


# Errors leave the sampler usable --------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_runner_that_was_interrupted_is_not_used_again(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another call of the same size, which had begun before, goes on with a new one."""
    sampler = sampler_of(backend=backend)
    expected = list(sampler.stream(2, steps=4))
    other = sampler.stream(2, steps=4)
    got = [next(other)]
    runner = sampler._runners.runner(2, SHAPE)

    def interrupted(state: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sampler.sample(2, steps=4)
    monkeypatch.undo()
    if backend == "native":
        monkeypatch.setattr(runner, "forward", interrupted)
        assert runner not in sampler._runners.values()
    got += list(other)
    assert all(torch.equal(a.x, b.x) for a, b in zip(got, expected, strict=True))
    assert torch.equal(sampler.sample(2, steps=4).images, expected[-1].x)
