"""A sampler's network as its backend runs it: converted to a device and dtype, with a runner for each batch size."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from fastdiff import backends
from fastdiff.errors import InvalidArgument
from fastdiff.sampler.options import NetworkInfo
from fastdiff.unet import changes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float64": torch.float64}
FAST = "bfloat16-fast"


class Runners:
    """The runners of one network, which use its present weights. The arguments are as in `fastdiff.Sampler`.

    ``backend`` is the name of the backend that runs the network, never "auto"; ``fast`` whether dtype was
    "bfloat16-fast"; ``converted`` a copy of the network in another dtype, layout or on another device, if one is
    needed.
    """

    def __init__(
        self,
        unet: nn.Module,
        info: NetworkInfo,
        backend: str,
        device: str | torch.device | None,
        dtype: torch.dtype | str | None,
        determinism: str,
    ):
        parameter = next(unet.parameters(), torch.zeros(()))
        self.unet = unet
        self.info = info
        self.device = usable_device(device) if device is not None else parameter.device
        self.fast = dtype == FAST
        self.dtype = usable_dtype("bfloat16" if self.fast else dtype) if dtype is not None else parameter.dtype
        self.determinism = determinism
        self.prepared: dict[backends.Spec, backends.Runner] = {}
        self.converted: nn.Module | None = None
        self.config: Any = None
        self.compiled: nn.Module | None = None  # the network, without weights, when it was compiled
        self.global_changes: list[str] = []
        first = self._spec(1, (info.channels, *(info.size or (info.stride,) * 2)))
        self.backend = backend
        if backend == "auto":
            self.backend = backends.choose(unet, first)
        self.runner(first.batch, first.shape)  # raises now where the backend cannot run

    def runner(self, batch: int, shape: tuple[int, int, int]) -> backends.Runner:
        """Return the runner for ``batch`` images of ``shape`` (C, H, W), with the present weights."""
        spec = self._spec(batch, shape)
        network = self._network()
        self._follow_changes(network)
        if spec not in self.prepared:
            self.prepared[spec] = backends.prepare(self.backend, network, spec)
        return self.prepared[spec]

    def clear(self) -> None:
        """Free the runners and the converted copy."""
        self.prepared.clear()
        self.converted = self.compiled = None

    def _follow_changes(self, network: nn.Module) -> None:
        """Drop runners of what the network was before it was changed otherwise than in its weights.

        `eager` runs the module itself, and `native` and `triton` look for changes of modules themselves, but for a new
        configuration they are prepared anew. Compiled code does not notice hooks, nor methods of classes.
        """
        config = getattr(network, "config", None)
        changed = not changes.same(config, self.config)
        if self.backend == "compiled":
            present = changes.global_changes(network)
            as_compiled = self.compiled is not None and not changes.differences(network, self.compiled)
            changed = changed or not as_compiled or present != self.global_changes
            self.global_changes = present
        if changed:
            self.prepared.clear()
            self.config = config
            self.compiled = changes.without_weights(network) if self.backend == "compiled" else None

    def _spec(self, batch: int, shape: tuple[int, int, int]) -> backends.Spec:
        return backends.Spec(batch, shape, self.dtype, self.device, self.info.null_label, self.determinism, self.fast)

    def _network(self) -> nn.Module:
        """Return the module itself where it fits, else its one converted copy, with the present weights.

        The weights are copied at every call: fused optimizers and edits of ``.data`` change them without a trace.
        """
        # These two convert for themselves, and with less error: they round transformed weights.
        dtype = torch.float32 if self.backend in ("native", "triton") else self.dtype
        # On CUDA this memory layout selects kernels of its own.
        layout = torch.channels_last if self.device.type == "cuda" else None

        def fits(p: torch.Tensor) -> bool:
            laid_out = layout is None or p.ndim != 4 or p.is_contiguous(memory_format=layout)
            return p.device == self.device and p.dtype == dtype and laid_out

        if all(map(fits, self.unet.parameters())):
            if self.converted is not None:  # the module itself was converted since the last call
                self.clear()
            return self.unet
        present = [*self.unet.parameters(), *self.unet.buffers()]
        with torch.inference_mode(False), torch.no_grad():  # so that the copy can be written again in any mode
            mine = [] if self.converted is None else [*self.converted.parameters(), *self.converted.buffers()]
            shaped = [t.shape for t in mine] == [t.shape for t in present]
            if self.converted is None or not shaped or changes.differences(self.unet, self.converted):
                self.converted = copy.deepcopy(self.unet).to(device=self.device, dtype=dtype).eval()
                if layout is not None:
                    self.converted.to(memory_format=layout)  # type: ignore[call-overload]  # missing in torch's annotations
                self.prepared.clear()
            else:
                for into, now in zip(mine, present, strict=True):
                    into.copy_(now)
        return self.converted


def usable_device(device: str | torch.device | None) -> torch.device:
    """Return the device with its index, as the tensors on it name it ("cuda" gives "cuda:0").

    None gives CUDA where there is one, else the CPU. `InvalidArgument` says why a device cannot be used.
    """
    try:
        return torch.empty(0, device=device or ("cuda" if torch.cuda.is_available() else "cpu")).device
    except (RuntimeError, AssertionError, TypeError) as e:
        raise InvalidArgument(f"device={str(device)!r} cannot be used here: {str(e).splitlines()[0]}") from e


def usable_dtype(dtype: torch.dtype | str) -> torch.dtype:
    """Return the dtype of a name, or a dtype itself; `InvalidArgument` lists the ones that networks can run in."""
    found = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if found not in DTYPES.values():
        raise InvalidArgument(f"dtype={dtype!r} is unknown; allowed: {', '.join(DTYPES)}, {FAST}")
    return found  # type: ignore[return-value]  # one of DTYPES, as just checked
