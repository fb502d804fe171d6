"""Backend `eager`: the module itself and the reference update. Runs any network, on any device of torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdiff.backends.base import Spec
from fastdiff.core import update
from fastdiff.core.state import State, Texts
from fastdiff.errors import BackendError
from fastdiff.modes import plain_modes


class EagerRunner:
    """Runner that calls the network in ``spec.dtype`` and computes everything else in the state's float32.

    It calls ``network(x, t)`` or ``network(x, t, class_labels=label)``, or with the states of a text after t, which
    returns a tensor, or an object with ``.sample`` as diffusers' networks do.
    """

    def __init__(self, network: Callable[..., Any], spec: Spec):
        self.network = network
        self.spec = spec

    def _call(self, x: Tensor, t: Tensor, label: Tensor | None, texts: Texts | None) -> Tensor:
        x = x.to(self.spec.dtype).contiguous(memory_format=torch.channels_last)
        if label is None:
            out = self.network(x, t)
        elif texts is None:
            out = self.network(x, t, class_labels=label)
        else:
            vector: dict[str, Any] = {}
            if texts.pooled is not None:
                pooled = texts.pooled[label].to(self.spec.dtype)
                vector = {"class_labels": pooled}
                if getattr(self.network, "add_embedding", None) is not None:
                    # The embedded sizes are a part of the vector already.
                    vector = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": pooled.new_zeros(len(x), 0)}}
            out = self.network(x, t, texts.states[label].to(self.spec.dtype), **vector)
        return out if isinstance(out, Tensor) else out.sample

    @plain_modes()
    def forward(self, state: State) -> None:
        """Evaluate the network, with guidance, and set ``state.out``."""
        if state.taking is None:
            self.evaluate(state, bool(state.guided_host.any()))
        else:
            part = state.select(state.taking)
            self._evaluate_some(part, np.flatnonzero(part.guided_host))
            state.put(state.taking, part)

    def forward_with_gradient(self, state: State) -> Tensor:
        """Run `forward` and return the x by which ``state.out`` can be differentiated; ``state.x`` has no graph."""
        if isinstance(self.network, nn.Module) and any(p.is_inference() for p in self.network.parameters()):
            raise BackendError(
                "the network's weights were made or moved in torch.inference_mode(), so nothing can be differentiated "
                "through it; make it outside of that mode, or use guide_through='x0'"
            )
        x = state.x
        with plain_modes(gradients=True):
            leaf = x.detach().clone().requires_grad_()
            state.x = leaf
            try:
                self.evaluate(state, bool(state.guided_host.any()))
            finally:
                state.x = x
        return leaf

    def _both(self, state: State, guided: Tensor | None = None) -> Tensor:
        """Return the labels of all images, and behind them the null labels of those that are ``guided``, or of all."""
        assert state.label is not None, "guidance needs labels"
        null = torch.full_like(state.label, self.spec.null_label or 0) if state.null is None else state.null
        return torch.cat([state.label, null if guided is None else null[guided]])

    def take_labels(self, state: State) -> None:
        """Do nothing: every step reads the labels."""

    def evaluate(self, state: State, guided: bool) -> None:
        """Set ``state.out``, from two network rows per image if ``guided``. Reads no values from the device."""
        t = state.column("t")
        x = state.x if state.condition is None else torch.cat([state.x, state.condition], dim=1)
        if not guided:
            state.out = self._call(x, t, state.label, state.texts).to(state.x.dtype)
            return
        label = self._both(state)
        both = self._call(torch.cat([x, x]), torch.cat([t, t]), label, state.texts).to(state.x.dtype)
        w = 1.0 + state.column("g") * (state.guidance - 1.0)
        conditional, unconditional = both.chunk(2)
        state.out = update.guide(conditional, unconditional, w, state.x.shape[1], state.guidance_rescale)

    def _evaluate_some(self, state: State, guided: np.ndarray) -> None:
        """Set ``state.out``, from two network rows for each of the images ``guided`` and one for each other."""
        if not 0 < len(guided) < len(state.x):
            self.evaluate(state, bool(len(guided)))
            return
        t, i = state.column("t"), torch.from_numpy(guided).to(state.x.device)
        x = torch.cat([state.x, state.x[i]])
        net = self._call(x, torch.cat([t, t[i]]), self._both(state, i), state.texts).to(state.x.dtype)
        w, rescale, k = 1.0 + state.column("g") * (state.guidance - 1.0), state.guidance_rescale, len(state.x)
        if isinstance(rescale, Tensor) and rescale.ndim == 2:
            rescale = rescale[i]
        state.out = net[:k].clone()
        state.out[i] = update.guide(net[i], net[k:], w[i], state.x.shape[1], rescale)

    @plain_modes()
    def update(self, state: State) -> None:
        """Apply one row of the table to every image, and increment its row."""
        if state.taking is None:
            update.update(state)
        else:
            part = state.select(state.taking)
            update.update(part)
            try:
                state.put(state.taking, part)
            except torch.OutOfMemoryError as e:  # anywhere before, the step can be taken again
                raise BackendError("device memory ran out while an update was written, so images may be damaged") from e

    def advance(self, state: State, noisy: bool) -> None:
        """Do the device's part of `update`, with noise if ``noisy``. Reads no values from the device."""
        assert state.out is not None, "evaluate comes before advance"
        update.apply(state, update.philox(state) if noisy else None)
        state.advance_device()

    def whole(self, state: State, guided: bool, noisy: bool) -> None:
        """Do `evaluate`, then `advance`."""
        self.evaluate(state, guided)
        self.advance(state, noisy)

    def step(self, state: State) -> None:
        """Do `forward`, then `update`."""
        self.forward(state)
        self.update(state)


def check_guarantees(name: str, spec: Spec) -> None:
    """Refuse what backends on PyTorch's kernels cannot give: bitwise determinism and a faster bfloat16.

    PyTorch chooses kernels by batch size and number of threads.
    """
    if spec.determinism == "bitwise":
        raise BackendError(
            f"backend {name!r} cannot give determinism='bitwise': PyTorch's kernels depend on the batch; use 'seed', "
            "or backend 'native' (on a CPU) or 'triton' (on CUDA)"
        )
    if spec.fast:
        raise BackendError(f"backend {name!r} has one kind of bfloat16 only; use dtype='bfloat16'")


def prepare(unet: nn.Module, spec: Spec) -> EagerRunner:
    """Prepare any network that `EagerRunner` can call."""
    check_guarantees("eager", spec)
    return EagerRunner(unet, spec)
