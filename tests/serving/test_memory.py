"""Steps for which device memory does not suffice, by runners that raise what torch raises then."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any

import pytest
import torch

from fastdiff import Engine, NoiseSchedule, Sampler
from fastdiff.backends import native
from fastdiff.core.slots import Slots
from fastdiff.core.state import State
from fastdiff.errors import BackendError, EngineClosed, OutOfMemory
from fastdiff.serving.scheduler import Curve
from tests.support.unets import TINY_CLASSES, random_unet

SECONDS = 60
SCHEDULE = NoiseSchedule("linear", 100, beta_end=0.1)
needs_native = pytest.mark.skipif(native.extension() is None, reason="fastdiff._native is not built")
BACKENDS = ["eager", pytest.param("native", marks=[pytest.mark.slow, needs_native])]


@pytest.fixture(scope="module", params=BACKENDS)
def sampler(request: pytest.FixtureRequest) -> Sampler:
    determinism = "bitwise" if request.param == "native" else "seed"
    return Sampler(random_unet(TINY_CLASSES), SCHEDULE, backend=request.param, determinism=determinism)


@pytest.fixture
def engine(sampler: Sampler) -> Iterator[Engine]:
    with Engine(sampler, max_queue_s=1e6) as engine:
        yield engine


def shorten(engine: Engine, monkeypatch: pytest.MonkeyPatch, most: int, never: Collection[int] = ()) -> list[int]:
    """Let memory suffice for so many images, and for none of some labels; return the sizes of steps, as they come."""
    sizes: list[int] = []
    for name in ("step", "forward"):
        real = getattr(engine._stepper.runner, name)

        def tried(state: State, real: Any = real) -> None:
            assert state.taking is not None
            assert state.label is not None
            if len(state.taking) > most or set(state.label[state.taking].tolist()) & set(never):
                raise torch.OutOfMemoryError("CUDA out of memory")
            sizes.append(len(state.taking))
            real(state)

        monkeypatch.setattr(engine._stepper.runner, name, tried)
    return sizes


def check(sampler: Sampler, got: torch.Tensor, n: int, **options: Any) -> None:
    expected = sampler.sample(n, **options).images
    torch.testing.assert_close(got, expected, atol=0.0 if sampler.determinism == "bitwise" else 2e-4, rtol=0.0)


@pytest.mark.parametrize("previews", [0, 3])
def test_a_step_is_halved_and_later_ones_have_no_more(sampler, engine, monkeypatch, previews, caplog):
    sizes = shorten(engine, monkeypatch, 4)
    options: dict[str, Any] = {"steps": 5, "labels": 1, "solver": "dpmpp_2m", "seed": 3}
    job = engine.submit(8, previews=previews, **options)
    check(sampler, job.result(SECONDS).images, 8, **options)
    assert max(sizes) == 4
    assert sum(sizes) >= 8 * 5
    assert engine.stats().cap <= 4
    assert caplog.text.count("device memory does not suffice") == 1
    check(sampler, engine.submit(3, guidance=2.0, **options).result(SECONDS).images, 3, guidance=2.0, **options)


@pytest.mark.parametrize("beside", [1, 6])
def test_only_the_job_that_does_not_fit_ends(sampler, engine, monkeypatch, beside):
    shorten(engine, monkeypatch, 1000, never=(3,))  # how many images a step has depends on what steps cost here
    options: dict[str, Any] = {"steps": 6, "seed": 5}
    good = [engine.submit(2, labels=label % 3, **options) for label in range(beside)]
    bad = engine.submit(4, labels=3, **options, request_id="large")
    with pytest.raises(OutOfMemory, match="job large was ended: device memory does not suffice for"):
        bad.result(SECONDS)
    for label, job in enumerate(good):
        check(sampler, job.result(SECONDS).images, 2, labels=label % 3, **options)
    later = engine.submit(2, labels=1, **options)
    check(sampler, later.result(SECONDS).images, 2, labels=1, **options)
    assert len(engine._stepper.slots.free) == len(engine._stepper.slots.state.x)
    assert engine._curve.most is None  # it was that job


def test_a_job_that_is_more_urgent_than_the_one_that_does_not_fit_goes_on(sampler, engine, monkeypatch):
    """Both are in the half that is tried, the good one first."""
    shorten(engine, monkeypatch, 8, never=(3,))
    engine._curve = Curve(tuple((k, 0.01 + 0.001 * k) for k in (1, 2, 4, 8, 16)))
    options: dict[str, Any] = {"steps": 30, "seed": 5}
    good = engine.submit(1, labels=1, priority=100, **options)
    bad = engine.submit(7, labels=3, **options)
    check(sampler, good.result(SECONDS).images, 1, labels=1, **options)
    with pytest.raises(OutOfMemory):
        bad.result(SECONDS)


def test_memory_for_nothing_ends_every_job_but_no_engine(engine, monkeypatch):
    with monkeypatch.context() as patch:
        shorten(engine, patch, 0)
        for job in [engine.submit(2, steps=2, labels=1) for _ in range(3)]:
            with pytest.raises(OutOfMemory):
                job.result(SECONDS)
    assert engine.submit(2, steps=2, labels=1).result(SECONDS)


def test_images_that_may_be_damaged_are_given_to_nobody(sampler, engine, monkeypatch):
    """A step that eager has begun to write is not taken again."""
    if sampler.backend != "eager":
        pytest.skip("the native engine has all its memory before it writes")

    put = State.put

    def short(self: State, images: Any, part: State) -> None:
        if not torch.equal(self.row[images], part.row):  # the update, not the network's output
            raise torch.OutOfMemoryError("CUDA out of memory")
        put(self, images, part)

    monkeypatch.setattr(State, "put", short)
    with pytest.raises(BackendError, match="while an update was written"):
        engine.submit(2, steps=2, labels=1).result(SECONDS)
    with pytest.raises(EngineClosed):
        engine.submit(2, steps=2, labels=1)


def test_an_engine_measures_what_fits(sampler, monkeypatch):
    step = Slots.step

    def short(self: Slots, runner: Any, slots: Any, previewed: Any = ()) -> Any:
        if len(slots) > most:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return step(self, runner, slots, previewed)

    monkeypatch.setattr(Slots, "step", short)
    most = 4
    with Engine(sampler) as engine:
        assert engine._curve.most == 4
    most = 0
    with pytest.raises(OutOfMemory, match="a step of one image"):
        Engine(sampler)
