"""Engines that `fastdiff bench` must catch, in a module that its processes can import."""

from __future__ import annotations

import dataclasses
import os
import signal
from typing import Any

import torch
from torch import Tensor

from fastdiff.bench.peers import ENGINES, Inputs, RunnerSteps, Steps, backend
from fastdiff.checkpoints.loading import Pretrained


def _eager(model: Pretrained, inputs: Inputs) -> Steps:
    return backend("eager", torch.float32, False, model, inputs)


class Wrong:
    """A kernel that is 1 % off in one image, the last."""

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
    """The network is right, what a step makes of it is not."""

    def forward(self, state: Any) -> None:
        self.runner.forward(state)

    def step(self, state: Any) -> None:
        Wrong.forward(self, state)
        self.runner.update(state)


def wrong(model: Pretrained, inputs: Inputs) -> Steps:
    steps = _eager(model, inputs)
    assert isinstance(steps, RunnerSteps)
    steps.runner = Wrong(steps.runner)
    return steps


def wrong_update(model: Pretrained, inputs: Inputs) -> Steps:
    steps = _eager(model, inputs)
    assert isinstance(steps, RunnerSteps)
    steps.runner = WrongUpdate(steps.runner)
    return steps


def nan(model: Pretrained, inputs: Inputs) -> Steps:
    steps = wrong(model, inputs)
    steps.runner.forward = lambda state: setattr(state, "out", state.x * float("nan"))  # type: ignore[attr-defined]
    return steps


def unguided(model: Pretrained, inputs: Inputs) -> Steps:
    """A peer that leaves guidance out."""
    return ENGINES["diffusers"].make(model, dataclasses.replace(inputs, guidance=None, null_label=None))


class Thrice:
    """What gives the same numbers with three times the work: two evaluations are for nothing."""

    def __init__(self, steps: Steps):
        self.steps = steps

    def forward(self) -> Tensor:
        return self.steps.forward()

    def step(self) -> Tensor:
        inner: Any = self.steps
        for _ in range(2):
            inner.runner._call(inner.state.x, inner.state.column("t"), inner.state.label)
        return inner.step()


def slow(model: Pretrained, inputs: Inputs) -> Steps:
    return Thrice(_eager(model, inputs))


def crash(model: Pretrained, inputs: Inputs) -> Steps:
    os._exit(7)


class CrashesLater(Thrice):
    """Runs while it is checked, and is killed in its first turn, as by a system without memory."""

    calls = 0

    def step(self) -> Tensor:
        self.calls += 1
        if self.calls > 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.steps.step()


def crash_later(model: Pretrained, inputs: Inputs) -> Steps:
    return CrashesLater(_eager(model, inputs))


def refuse(model: Pretrained, inputs: Inputs) -> Steps:
    raise RuntimeError("no such layer\nand a page of details")


EAGER = ENGINES["eager"]
