"""Calls while they run: callbacks, streams, cancelling, threads; and the network, which they leave as it was."""

from __future__ import annotations

import copy
import functools
import gc
import itertools
import logging
import math
import random
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastdiff.core.state import State
from fastdiff.errors import (
    CallbackError,
    Cancelled,
    InvalidArgument,
    NumericsError,
)
from fastdiff.sampler import Event, Sampler
from fastdiff.unet import UNet
from tests.sampler.by_hand import (
    SCHEDULE,
    SHAPE,
    TINY_DROPOUT,
    Probe,
    assert_close,
    by_hand,
    initial,
    sampler_of,
    trailing,
)
from tests.support.unets import TINY, TINY_CLASSES, random_unet

# Callbacks, streams, cancelling ---------------------------------------------------------------------------------------


def test_callback_sees_every_row() -> None:
    sampler = sampler_of()
    events: list[Event] = []
    out = sampler.sample(3, steps=4, seed=6, callback=events.append)
    assert [(e.row, e.rows, e.indices) for e in events] == [(row, 4, range(3)) for row in range(4)]
    x = initial(6, range(3))
    for event in events:

        @functools.cache
        def run(dtype: torch.dtype, row: int = event.row) -> tuple[Tensor, Tensor]:
            return by_hand(sampler.unet, x, trailing(4), dtype=dtype)[row]

        assert_close(event.x, lambda dtype, run=run: run(dtype)[0])
        assert_close(event.x0, lambda dtype, run=run: run(dtype)[1])
    assert torch.equal(events[-1].x, out.images)
    assert torch.equal(out.images, sampler.sample(3, steps=4, seed=6).images)


def test_what_a_callback_writes_into_its_event_is_not_read() -> None:
    sampler = sampler_of()

    def scribble(event: Event) -> None:
        event.x.fill_(math.nan)
        event.x0.fill_(math.nan)

    clean = sampler.sample(3, steps=3, batch_size=2).images
    event_less = sampler.sample(3, steps=3, batch_size=2, callback=scribble).images
    # The last event's x is a copy too.
    assert torch.equal(clean, event_less)


def test_an_error_in_a_callback_names_the_row() -> None:
    sampler = sampler_of()

    def fail(event: Event) -> None:
        if event.row == 2:
            raise KeyError("lost")

    with pytest.raises(CallbackError, match=r"KeyError at row 2 of 4: 'lost'") as caught:
        sampler.sample(2, steps=4, callback=fail)
    assert isinstance(caught.value.__cause__, KeyError)
    assert torch.equal(sampler.sample(2, steps=4).images, sampler_of().sample(2, steps=4).images)


def test_a_callback_may_use_the_sampler() -> None:
    sampler = sampler_of()
    inner = []
    outer = sampler.sample(2, steps=2, callback=lambda _: inner.append(sampler.sample(1, steps=2, seed=5).images))
    assert torch.equal(outer.images, sampler.sample(2, steps=2).images)
    assert len(inner) == 2
    assert torch.equal(inner[0], inner[1])


def test_stream_gives_what_callbacks_get() -> None:
    sampler = sampler_of()
    events: list[Event] = []
    out = sampler.sample(5, steps=3, batch_size=2, start_index=4, callback=events.append)
    stream = list(sampler.stream(5, steps=3, batch_size=2, start_index=4))
    chunks = (range(4, 6), range(6, 8), range(8, 9))
    assert [(e.row, e.rows, e.indices) for e in stream] == [(r, 3, c) for c in chunks for r in range(3)]
    for a, b in zip(events, stream, strict=True):
        assert (a.row, a.indices) == (b.row, b.indices)
        assert torch.equal(a.x, b.x)
        assert torch.equal(a.x0, b.x0)
    assert torch.equal(torch.cat([e.x for e in stream if e.row == 2]), out.images)


@pytest.mark.parametrize(("every", "rows"), [(1, [0, 1, 2, 3, 4]), (2, [1, 3, 4]), (5, [4]), (100, [4])])
def test_stream_every(every: int, rows: list[int]) -> None:
    sampler = sampler_of()
    events = list(sampler.stream(1, steps=5, every=every))
    assert [e.row for e in events] == rows
    assert torch.equal(events[-1].x, sampler.sample(1, steps=5).images)


@pytest.fixture
def states(monkeypatch: pytest.MonkeyPatch) -> list[weakref.ref[State]]:
    """Collect weak references to the states of all runs."""
    references = []
    init = State.__init__

    def recorded(self: State, *arguments: Any, **options: Any) -> None:
        init(self, *arguments, **options)
        references.append(weakref.ref(self))

    monkeypatch.setattr(State, "__init__", recorded)
    return references


def alive(states: list[weakref.ref[State]]) -> int:
    assert states
    return sum(reference() is not None for reference in states)


def test_leaving_a_stream_frees_everything(states: list[weakref.ref[State]]) -> None:
    sampler = sampler_of()
    for event in sampler.stream(2, steps=4):
        assert alive(states) == 1
        if event.row == 1:
            break
    assert alive(states) == 0
    stream = sampler.stream(2, steps=4)
    next(stream)
    assert alive(states) == 1
    stream.close()
    assert alive(states) == 0
    assert list(stream) == []
    assert torch.equal(sampler.sample(2, steps=4).images, sampler_of().sample(2, steps=4).images)


def test_an_error_frees_everything(states: list[weakref.ref[State]]) -> None:
    sampler = sampler_of()

    def fail(event: Event) -> None:
        assert alive(states) == 1
        raise OSError

    with pytest.raises(CallbackError, match="OSError") as caught:
        sampler.sample(2, steps=4, callback=fail)
    assert caught.value.__traceback__ is not None  # alive, with all its frames
    assert alive(states) == 0


def test_nothing_of_a_run_stays(states: list[weakref.ref[State]]) -> None:
    sampler = sampler_of()
    sampler.sample(3, steps=2, batch_size=2)
    assert len(states) >= 2
    assert alive(states) == 0


def test_cancel_from_another_thread() -> None:
    sampler = sampler_of()

    def cancel(event: Event) -> None:
        if event.row == 1 and event.indices.start == 2:
            thread = threading.Thread(target=sampler.cancel)
            thread.start()
            thread.join()

    with pytest.raises(Cancelled, match="2 of 6"):
        sampler.sample(6, steps=4, batch_size=2, callback=cancel)
    rows = []
    for event in sampler.stream(6, steps=4, batch_size=2):
        rows.append((event.indices.start, event.row))
        cancel(event)
    assert rows == [(0, 0), (0, 1), (0, 2), (0, 3), (2, 0), (2, 1)]
    assert torch.equal(sampler.sample(2, steps=4).images, sampler_of().sample(2, steps=4).images)


def test_cancel_without_a_run_does_nothing() -> None:
    sampler = sampler_of()
    sampler.cancel()
    assert len(sampler.sample(1, steps=1).images) == 1


def run_in_thread(work: Callable[[], object]) -> tuple[threading.Thread, list[object]]:
    """Start ``work``; the list gets its result, or the exception it raised."""
    results: list[object] = []

    def target() -> None:
        try:
            results.append(work())
        except BaseException as e:
            results.append(e)

    thread = threading.Thread(target=target, daemon=True)
    thread.start()
    return thread, results


def test_close_ends_running_calls() -> None:
    probe = Probe()
    sampler = Sampler(probe, SCHEDULE, shape=SHAPE)
    running = threading.Event()

    def slowly(event: Event) -> None:
        running.set()
        time.sleep(0.005)

    thread, results = run_in_thread(lambda: sampler.sample(1, steps=100, callback=slowly))
    assert running.wait(60)
    sampler.close()
    thread.join(60)
    assert isinstance(results[0], Cancelled)
    assert len(probe.calls) < 100
    for call in (sampler.sample, sampler.stream):
        with pytest.raises(InvalidArgument, match="closed"):
            call(1)
    sampler.close()


def copies(kind: type[nn.Module]) -> int:
    gc.collect()
    return sum(type(thing) is kind for thing in gc.get_objects())


def test_close_frees_what_was_prepared() -> None:
    class Mine(Probe):
        pass

    unet = Mine()
    with Sampler(unet, SCHEDULE, shape=SHAPE, dtype="float64") as sampler:
        for n in (1, 2, 3):
            sampler.sample(n, steps=1)
        assert copies(Mine) == 2  # one copy in float64, whatever the batch sizes
        stream = sampler.stream(2, steps=3)
        next(stream)
    assert list(stream) == []
    del stream
    assert copies(Mine) == 1
    assert not sampler._runners.prepared


def test_a_closed_sampler_prepares_nothing() -> None:
    sampler = Sampler(Probe(), SCHEDULE, shape=SHAPE, dtype="float64")
    late = sampler.stream(1, steps=1)
    with pytest.raises(Cancelled, match="1 of 2"):
        sampler.sample(2, steps=1, batch_size=1, callback=lambda _: sampler.close())
    assert list(late) == []
    assert not sampler._runners.prepared
    assert sampler._runners._network_run is None


def test_several_threads_share_a_sampler() -> None:
    sampler = sampler_of(TINY_CLASSES)
    jobs = [
        {"seed": 1, "steps": 6},
        {"seed": 2, "steps": 5, "labels": 1, "guidance": 2.0},
        {"seed": 3, "steps": 4, "solver": "ddpm", "labels": [0, 1, 2], "batch_size": 2},
        {"seed": 4, "steps": 7, "labels": [3, 2, 1], "guidance": [1.0, 3.0, 2.0]},
    ]
    alone = [sampler.sample(3, **job).images for job in jobs]
    barrier = threading.Barrier(len(jobs))
    turns = []

    def work(i: int) -> Tensor:
        barrier.wait(60)
        return sampler.sample(3, **jobs[i], callback=lambda _: turns.append(i)).images

    threads = [run_in_thread(functools.partial(work, i)) for i in range(len(jobs))]
    for thread, _ in threads:
        thread.join(120)
    for (_, results), expected in zip(threads, alone, strict=True):
        assert torch.equal(results[0], expected)
    changes = sum(a != b for a, b in itertools.pairwise(turns))
    assert changes >= len(jobs), "the runs did not interleave"


def test_progress_is_a_bar_on_standard_error(capsys: pytest.CaptureFixture[str]) -> None:
    sampler = sampler_of()
    quiet = sampler.sample(3, steps=2, batch_size=2)
    assert capsys.readouterr() == ("", "")
    shown = sampler.sample(3, steps=2, batch_size=2, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "4/4" in err
    assert torch.equal(quiet.images, shown.images)
    with pytest.raises(CallbackError):
        sampler.sample(1, steps=2, progress=True, callback=lambda _: 1 // 0)
    for event in sampler.stream(1, steps=2, progress=True):
        assert event.row == 0
        break


# The network is the caller's ------------------------------------------------------------------------------------------


def test_the_network_is_not_changed() -> None:
    unet = random_unet(TINY_DROPOUT).train()
    unet.mid_block.resnets[0].eval()
    unet.conv_in.weight.requires_grad_(False)
    modes = {name: module.training for name, module in unet.named_modules()}
    gradients = {name: (p.requires_grad, p.grad) for name, p in unet.named_parameters()}
    weights = {name: w.clone() for name, w in unet.state_dict().items()}
    seen = []
    hook = unet.register_forward_pre_hook(lambda module, _: seen.append(any(m.training for m in module.modules())))
    for dtype in (None, "float64"):
        sampler = Sampler(unet, SCHEDULE, backend="eager", dtype=dtype)
        out = sampler.sample(2, solver="ddpm", steps=3, callback=lambda _: None)
        next(sampler.stream(2, steps=3))
        assert {name: module.training for name, module in unet.named_modules()} == modes
        evaluating = Sampler(copy.deepcopy(unet).eval(), SCHEDULE, backend="eager", dtype=dtype)
        assert torch.equal(out.images, evaluating.sample(2, solver="ddpm", steps=3).images)
    hook.remove()
    assert not any(seen), "dropout was on"
    assert {name: (p.requires_grad, p.grad) for name, p in unet.named_parameters()} == gradients
    assert all(torch.equal(w, weights[name]) for name, w in unet.state_dict().items())
    assert not unet._forward_hooks
    assert not unet._forward_pre_hooks


def test_an_error_in_the_network_leaves_it_as_it_was() -> None:
    unet = random_unet(TINY).train()
    sampler = Sampler(unet, SCHEDULE, backend="eager")

    def fail(*_: Any) -> None:
        raise RuntimeError("no")

    hook = unet.mid_block.register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no"):
        sampler.sample(1, steps=2)
    hook.remove()
    assert all(module.training for module in unet.modules())
    assert len(sampler.sample(1, steps=2).images) == 1


def adamw(fused: bool) -> Callable[[UNet], None]:
    def change(unet: UNet) -> None:
        optimizer = torch.optim.AdamW(unet.parameters(), lr=0.05, fused=fused)
        for p in unet.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()
        optimizer.zero_grad()

    return change


@torch.no_grad()
def in_place(unet: UNet) -> None:
    unet.conv_in.weight.mul_(1.5)


def through_data(unet: UNet) -> None:
    unet.conv_in.weight.data.mul_(1.5)


def another_tensor(unet: UNet) -> None:
    unet.conv_in.weight = nn.Parameter(unet.conv_in.weight.detach() * 1.5)


def loaded(unet: UNet) -> None:
    unet.load_state_dict(random_unet(TINY, seed=5).state_dict())


def another_module(unet: UNet) -> None:
    unet.conv_out = nn.Sequential(unet.conv_out, nn.Conv2d(3, 3, 1))


@pytest.mark.parametrize("dtype", [None, "bfloat16", "float16", "float64"])
@pytest.mark.parametrize(
    "change", [in_place, through_data, another_tensor, loaded, another_module, adamw(False), adamw(True)],
    ids=["in place", "data", "another tensor", "loaded", "another module", "adamw", "fused adamw"],
)  # fmt: skip
def test_present_weights_are_used(dtype: str | None, change: Callable[[UNet], None]) -> None:
    unet = random_unet(TINY).train()
    sampler = Sampler(unet, SCHEDULE, backend="eager", dtype=dtype)
    before = sampler.sample(1, steps=2).images
    change(unet)
    after = sampler.sample(1, steps=2).images
    assert (after - before).abs().max() > 0.01
    fresh = Sampler(copy.deepcopy(unet).eval(), SCHEDULE, backend="eager", dtype=dtype)
    assert torch.equal(after, fresh.sample(1, steps=2).images)


def test_a_network_converted_later() -> None:
    unet = random_unet(TINY)
    sampler = Sampler(unet, SCHEDULE)
    expected = sampler.sample(1, steps=2).images
    unet.double()
    assert torch.equal(sampler.sample(1, steps=2).images, expected)  # float32, as when the sampler was made
    unet.float()
    in_place(unet)
    assert torch.equal(sampler.sample(1, steps=2).images, Sampler(unet, SCHEDULE).sample(1, steps=2).images)


def test_inference_mode() -> None:
    sampler = sampler_of(dtype="float64")
    with torch.inference_mode():
        inside = sampler.sample(1, steps=2).images
    in_place(sampler.unet)
    outside = sampler.sample(1, steps=2).images
    with torch.inference_mode():
        again = sampler.sample(1, steps=2).images
    assert not torch.equal(inside, outside)
    assert torch.equal(outside, again)


@pytest.mark.parametrize(("dtype", "error"), [("bfloat16", 0.1), (torch.float16, 0.01), ("float64", 1e-5)])
def test_dtypes(dtype: str | torch.dtype, error: float) -> None:
    sampler = sampler_of(dtype=dtype)
    x = initial(0, range(2))
    exact = by_hand(sampler.unet, x, trailing(4))[-1][0]
    images = sampler.sample(2, steps=4).images
    assert images.dtype == torch.float32
    distance = float((images - exact).pow(2).mean().sqrt())
    assert distance <= error
    assert distance > 0
    assert next(sampler.unet.parameters()).dtype == torch.float32


def global_state() -> dict[str, Any]:
    return {
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
        "dtype": torch.get_default_dtype(),
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "grad": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "precision": torch.get_float32_matmul_precision(),
        "filters": list(warnings.filters),
        "logging": (logging.root.level, list(logging.root.handlers), logging.getLogger("fastdiff").level),
    }


def fails(*_: Any) -> Any:
    raise OSError("no")


def poisoned(x0: Tensor, indices: range) -> Tensor:
    return x0.flatten(1).sum(dim=1) * math.nan


ENDS: dict[str, tuple[type[Exception], dict[str, Any]]] = {
    "callback": (CallbackError, {"callback": fails}),
    "guide": (CallbackError, {"guide": fails}),
    "a guide without a gradient": (InvalidArgument, {"guide": lambda x0, i: torch.zeros(len(i))}),
    "noise": (CallbackError, {"noise": fails}),
    "noise of another shape": (InvalidArgument, {"noise": lambda row, i: torch.zeros(1)}),
    "option": (InvalidArgument, {"eta": -1.0}),
    "not finite": (NumericsError, {"guide": poisoned, "clip": None}),
    "hook": (OSError, {}),
}


@pytest.mark.parametrize("end", ENDS)
@pytest.mark.parametrize("through", ["x0", "network"])
def test_no_global_state_is_changed_by_a_call_that_raises(end: str, through: str) -> None:
    error, options = ENDS[end]
    sampler = sampler_of()
    if "guide" in options:
        options = {**options, "guide_through": through}
    if end == "hook":
        sampler.unet.mid_block.register_forward_hook(fails)
    global_state()
    before = global_state()
    for grad in (torch.enable_grad, torch.no_grad, torch.inference_mode):
        with grad():
            within = global_state()
            with pytest.raises(error):
                sampler.sample(2, solver="ddpm", steps=3, **options)
            assert global_state() == within
            stream = sampler_of().stream(2, steps=3)
            next(stream)
            assert global_state() == within
            stream.close()
            assert global_state() == within
    assert global_state() == before


def test_a_call_does_not_change_the_state_of_another_thread() -> None:
    """The modes of gradients belong to a thread, and other threads of one process have their own random numbers too."""
    seen = []
    sampler = sampler_of()
    before = global_state()

    def look(*_: Any) -> None:
        thread, results = run_in_thread(global_state)
        thread.join(60)
        seen.append(results[0])

    sampler.unet.mid_block.register_forward_pre_hook(look)
    sampler.sample(1, steps=2, solver="ddpm")
    assert seen == [before, before]


def test_no_global_state_is_changed(tmp_path: Path) -> None:
    global_state()
    before = global_state()
    unet = random_unet(TINY_CLASSES)
    with Sampler(unet, SCHEDULE, dtype="bfloat16") as sampler:
        out = sampler.sample(2, solver="ddpm", steps=2, seed=None, labels=1, guidance=2.0, progress=True)
        for _ in sampler.stream(2, steps=2):
            assert global_state() == before
        out.save(tmp_path / "a.png")
        with pytest.raises(InvalidArgument):
            sampler.sample(0)
    assert global_state() == before
    with torch.no_grad():
        list(sampler_of().stream(1, steps=2))
        assert not torch.is_grad_enabled()
