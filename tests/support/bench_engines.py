"""Faulty contenders that `fastdiff bench` must catch, in a module that its processes can import."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.engines import CONTENDERS, RunnerStepper, backend
from fastdiff.bench.inputs import Stepper, Workload
from fastdiff.bench.networks import Model


def _eager(model: Model, workload: Workload) -> Stepper:
    return backend("eager", torch.float32, False, model, workload)


class Wrong:
    """A runner whose network is 1 % off in the last image."""

    def __init__(self, runner: Any):
        self.runner = runner

    def forward(self, state: Any) -> None:
        self.runner.forward(state)
        state.out = state.out.clone()
        state.out[-1] *= 1.01

    def step(self, state: Any) -> None:
        self.forward(state)
        self.runner.update(state)


class WrongUpdate(Wrong):
    """A runner whose network is right, but whose step is not."""

    def forward(self, state: Any) -> None:
        self.runner.forward(state)

    def step(self, state: Any) -> None:
        Wrong.forward(self, state)
        self.runner.update(state)


def wrong(model: Model, workload: Workload) -> Stepper:
    stepper = _eager(model, workload)
    assert isinstance(stepper, RunnerStepper)
    stepper.runner = Wrong(stepper.runner)
    return stepper


def wrong_update(model: Model, workload: Workload) -> Stepper:
    stepper = _eager(model, workload)
    assert isinstance(stepper, RunnerStepper)
    stepper.runner = WrongUpdate(stepper.runner)
    return stepper


def nan(model: Model, workload: Workload) -> Stepper:
    stepper = wrong(model, workload)
    stepper.runner.forward = lambda state: setattr(state, "out", state.x * float("nan"))  # type: ignore[attr-defined]
    return stepper


def unguided(model: Model, workload: Workload) -> Stepper:
    """A peer that leaves guidance out."""
    return CONTENDERS["diffusers"].make(model, dataclasses.replace(workload, guidance=None, null_label=None))


class Thrice:
    """A stepper with the right numbers and three times the work, as it discards two evaluations."""

    def __init__(self, stepper: Stepper):
        self.stepper = stepper

    def forward(self) -> Tensor:
        return self.stepper.forward()

    def step(self) -> Tensor:
        inner: Any = self.stepper
        for _ in range(2):
            inner.runner._call(inner.state.x, inner.state.column("t"), inner.state.label, inner.state.texts)
        return inner.step()


def slow(model: Model, workload: Workload) -> Stepper:
    return Thrice(_eager(model, workload))


def crash(model: Model, workload: Workload) -> Stepper:
    os._exit(7)


class CrashesLater(Thrice):
    """A stepper that passes the check and is killed in its first turn, as if memory had run out."""

    calls = 0

    def step(self) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.stepper.step()


def crash_later(model: Model, workload: Workload) -> Stepper:
    return CrashesLater(_eager(model, workload))


def refuse(model: Model, workload: Workload) -> Stepper:
    raise RuntimeError("no such layer\nand a page of details")


EAGER = CONTENDERS["eager"]
