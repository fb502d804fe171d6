"""Backend `eager`: the module as it is and the reference update. Runs any network, anywhere torch runs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends import Spec
from fastdiff.core import update
from fastdiff.core.state import State
from fastdiff.errors import BackendError


class EagerRunner:
    """``network(x, t[, class_labels=...])`` in ``spec.dtype``; everything else in the state's float32.

    The result may be a tensor or an object with ``.sample``, as diffusers' networks return.
    """

    def __init__(self, network: Callable[..., Any], spec: Spec):
        self.network = network
        self.spec = spec

    def _call(self, x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        x = x.to(self.spec.dtype).contiguous(memory_format=torch.channels_last)
        out = self.network(x, t) if label is None else self.network(x, t, class_labels=label)
        return out if isinstance(out, Tensor) else out.sample

    @torch.no_grad()
    def forward(self, state: State) -> None:
        self.evaluate(state, bool(state.guided_host.any()))

    def forward_with_gradient(self, state: State) -> Tensor:
        """Run `forward` and return the x by which ``state.out`` can be differentiated; ``state.x`` has no graph."""
        x = state.x
        with torch.inference_mode(False), torch.enable_grad():
            leaf = x.detach().clone().requires_grad_()
            state.x = leaf
            try:
                self.evaluate(state, bool(state.guided_host.any()))
            finally:
                state.x = x
        return leaf

    def evaluate(self, state: State, guided: bool) -> None:
        """Sets ``state.out``; ``guided``: the network sees every image twice. Nothing here asks the device."""
        t = state.column("t")
        if not guided:
            state.out = self._call(state.x, t, state.label).to(state.x.dtype)
            return
        assert state.label is not None, "guidance needs labels"
        null = torch.full_like(state.label, self.spec.null_label or 0)
        both = self._call(torch.cat([state.x, state.x]), torch.cat([t, t]), torch.cat([state.label, null])).to(
            state.x.dtype
        )
        w = 1.0 + state.column("g") * (state.guidance - 1.0)
        conditional, unconditional = both.chunk(2)
        state.out = update.guide(conditional, unconditional, w, state.x.shape[1], state.guidance_rescale)

    @torch.no_grad()
    def update(self, state: State) -> None:
        update.update(state)

    def advance(self, state: State, noisy: bool) -> None:
        """`update` but for the host's part; ``noisy``: some row of a table adds noise. Nothing here asks the device."""
        assert state.out is not None, "evaluate comes before advance"
        C = state.x.shape[1]
        out, v = state.out[:, :C], state.out[:, C:]
        update.apply(state, out, v if v.shape[1] else None, update.philox(state) if noisy else None)
        state.advance_device()

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        self.evaluate(state, guided)
        self.advance(state, noisy)

    def step(self, state: State) -> None:
        self.forward(state)
        self.update(state)


def refuse(name: str, spec: Spec) -> None:
    """What wrappers of PyTorch cannot give: equal bits, as it chooses kernels by batch size and thread count; and a
    faster bfloat16.
    """
    if spec.determinism == "bitwise":
        raise BackendError(
            f"backend {name!r} cannot give determinism='bitwise': PyTorch's kernels depend on the batch; use 'seed', "
            "or backend 'native' (on a CPU) or 'triton' (on CUDA)"
        )
    if spec.fast:
        raise BackendError(f"backend {name!r} has one kind of bfloat16 only; use dtype='bfloat16'")


def prepare(unet: nn.Module, spec: Spec) -> EagerRunner:
    refuse("eager", spec)
    return EagerRunner(unet, spec)
