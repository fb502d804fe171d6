"""`BackendUNet`: a network of diffusers that a backend of fastdiff runs, its ``UNet2DModel`` in the first place."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff import backends
from fastdiff.backends import Runner, Spec
from fastdiff.backends.eager import EagerRunner
from fastdiff.core.state import State, TableBank, Texts
from fastdiff.core.turns import Lock
from fastdiff.solvers import StepTable
from fastdiff.solvers.table import Row
from fastdiff.unet import UNet, UNetConfig, changes

# The configuration is compared by itself, and attention processors by their types. Of "sample_size" nothing depends.
IGNORED = ("_internal_dict", "sample_size", "processor")


def _is_padded(m: nn.Module) -> bool:
    return isinstance(m, nn.Conv2d) and m.padding not in (0, (0, 0))


def is_circular(unet: nn.Module) -> bool:
    """Return whether the padding of all convolutions is circular, as users set it for images without seams."""
    return {m.padding_mode for m in unet.modules() if _is_padded(m)} == {"circular"}


def make_circular(reference: nn.Module, unet: nn.Module) -> None:
    """Make the padding of a reference circular; convolutions without any have the mode that they have in ``unet``."""
    modes = {name: getattr(m, "padding_mode", None) for name, m in unet.named_modules()}
    for name, m in reference.named_modules():
        if isinstance(m, nn.Conv2d) and (_is_padded(m) or modes.get(name) == "circular"):
            m.padding_mode = "circular"


def plain_processors() -> tuple[type, ...]:
    """Return the classes of attention processors whose results differ by rounding alone."""
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor

    return AttnProcessor, AttnProcessor2_0, SlicedAttnProcessor


def attention_changes(module: nn.Module) -> list[str]:
    """List attention processors other than diffusers' own, and layers of dropout that are in training."""
    found = []
    for name, m in module.named_modules():
        processor = getattr(m, "processor", None)
        if processor is not None and (
            type(processor) not in plain_processors() or not vars(processor).keys() <= {"slice_size"}
        ):
            found.append(f"{name} has another attention processor than diffusers' own ({type(processor).__name__})")
        if isinstance(m, nn.Dropout) and m.training and m.p > 0:
            found.append(f"{name} is in training, with dropout (call unet.eval())")
    return found


def give_parameters(
    theirs: nn.Module, module: nn.Module, instead: Mapping[str, nn.Parameter] | None = None
) -> tuple[bool, bool]:
    """Give fastdiff's module the parameters that a diffusers module has now, or those ``instead`` by their names.

    The result is whether they fit, and whether some are other objects than before.
    """
    given = {**dict(theirs.named_parameters(remove_duplicate=False)), **(instead or {})}
    own = dict(module.named_parameters(remove_duplicate=False))
    if given.keys() != own.keys() or any(p.shape != own[name].shape for name, p in given.items()):
        return False, False
    if all(p is own[name] for name, p in given.items()):
        return True, False
    for name, p in given.items():
        path, _, leaf = name.rpartition(".")
        module.get_submodule(path)._parameters[leaf] = p
    return True, True


def versions(parameters: list[dict[str, Any]]) -> list[tuple[int, int, torch.dtype]]:
    """Return the identity, version and dtype of all weights; edits of ``.data`` within a call do not show in them."""
    weights = [p for some in parameters for p in some.values() if p is not None]
    return [(id(p), 0 if p.is_inference() else p._version, p.dtype) for p in weights]


def front_of(module: nn.Module, **members: Any) -> Any:
    """Return an object that is the module in all but some members of its class.

    The module itself is left alone: the object is of a subclass, and its ``__dict__`` is the module's own, so that
    whatever is set on one is set on both.
    """
    kind = type(module)
    same = {name: getattr(kind, name) for name in ("__module__", "__qualname__", "__doc__")}
    same["__reduce_ex__"] = lambda _, protocol: (copy.copy, (module,))  # copies and pickles are the module's
    front: Any = object.__new__(type(kind.__name__, (kind,), {**same, **members}))
    object.__setattr__(front, "__dict__", vars(module))
    return front


class BackendUNet:
    """A pipeline's ``UNet2DModel``, run by a backend; "auto" means `native`.

    `eager` runs the module itself. `native` and `compiled` run fastdiff's own U-Net, whose parameters are those of the
    diffusers module, not copies.
    """

    def __init__(self, unet: Any, backend: str):
        self.unet = unet
        self.config = dict(unet.config)
        self.backend = "native" if backend == "auto" else backend
        self.module: nn.Module = unet
        self.reference: nn.Module | None = None
        self.runners: dict[Spec, Runner] = {}
        self.lock = Lock()  # of the runners, as a pipeline may call its network from several threads
        self.circular = is_circular(unet)
        self.conditional = unet.config.class_embed_type is not None or unet.config.num_class_embeds is not None
        if self.backend != "eager":
            with torch.device("meta"):
                self.module = self._described().eval()

    @staticmethod
    def kind() -> Any:
        """Return the class of diffusers whose objects are run."""
        from diffusers import UNet2DModel

        return UNet2DModel

    def _described(self) -> nn.Module:
        """Build fastdiff's module of the network's configuration."""
        config = UNetConfig.from_dict(self.config)
        if self.circular:
            config = dataclasses.replace(config, padding_mode="circular")
        return UNet(config)

    def is_of(self, unet: Any) -> bool:
        """Return whether this was made for the network, with the configuration and padding that it has now."""
        same = vars(self.unet) is vars(unet) and self.config == unet.config  # a front has the vars of its network
        return same and self.circular == is_circular(unet)

    def unsupported_changes(self) -> list[str]:
        """List what the module does beyond its configuration; then only its own code can run it."""
        if self.backend == "eager":
            return []
        unet = self._plain()
        found = changes.global_changes(unet, (self.kind(), *plain_processors()))
        if not found:
            if self.reference is None:  # not before: a reference has the changes of its classes too
                with torch.device("meta"):
                    self.reference = changes.rebuilt(self.kind(), self.config)
                if self.circular:
                    make_circular(self.reference, unet)
            found += changes.overridden(unet, self.kind())
            found += changes.differences(unet, self.reference, self._ignored())
        found += attention_changes(unet)
        if not found:
            fits, other = give_parameters(unet, self.module, self._merged())
            if not fits:
                found.append("its parameters are not those of its configuration")
            if other:
                self.runners.clear()
        return found

    def _plain(self) -> Any:
        """Return the module to compare with one of the configuration."""
        return self.unet

    def _merged(self) -> dict[str, nn.Parameter]:
        """Return the parameters that take the place of the module's own."""
        return {}

    def _ignored(self) -> tuple[str, ...]:
        """Return the attributes of modules that no result depends on, or that are looked at elsewhere."""
        return IGNORED

    def reasons_against(self) -> list[str]:
        """List every reason why the backend cannot run the network on this machine, in its present dtype and device."""
        p = next(self.unet.parameters())
        if self.backend == "native":
            from fastdiff.backends.native import reasons_against

            stride = 1 << (len(self.unet.config.block_out_channels) - 1)
            reasons = reasons_against(self.module, self._spec(1, stride, stride))
            if len({(p.dtype, p.device) for p in self.unet.parameters()}) > 1:
                reasons.append("its weights are of several dtypes or on several devices")
            if any(p.dtype != torch.float32 for p in self.unet.parameters()) and p.dtype == torch.bfloat16:
                reasons.append("weights in bfloat16 are not repacked; pipeline.to(torch.float32)")
        else:
            reasons = [] if p.device.type != "meta" else ["its weights are on the meta device"]
        if p.device.type != "meta" and torch.is_autocast_enabled(p.device.type):
            reasons.append("autocast is on, which it would not follow")
        return reasons

    def _spec(self, batch: int, height: int, width: int) -> Spec:
        p = next(self.unet.parameters())
        return Spec(batch, (self.unet.config.in_channels, height, width), p.dtype, p.device)

    def accepts(self, labels: Tensor | None, size: Any) -> bool:
        """Return whether a backend can run images of this size (one number or two) with these labels."""
        config = self.unet.config
        height, width = (size, size) if isinstance(size, int) else size
        stride = 1 << (len(config.block_out_channels) - 1)
        if height % stride or width % stride or (labels is not None) != self.conditional:
            return False
        if labels is None:
            return True
        if config.class_embed_type is not None or labels.ndim != 1 or labels.is_floating_point():
            return False
        return bool(((labels >= 0) & (labels < config.num_class_embeds)).all())

    def runner(self, shape: torch.Size) -> Runner:
        """Return the runner for batches of this shape, prepared at the first call; those of other shapes are freed."""
        B, _, H, W = shape
        spec = self._spec(B, H, W)
        if spec not in self.runners:
            self.runners.clear()
            self.runners[spec] = backends.prepare(self.backend, self.module, spec)
        return self.runners[spec]

    def forget_interrupted(self) -> None:
        """Free the runners whose work an error, such as a signal handler's, may have interrupted half-way."""
        self.runners = {spec: runner for spec, runner in self.runners.items() if isinstance(runner, EagerRunner)}

    def front(self, left: Callable[[str], None]) -> Any:
        """Return an object that is the module in all but its forward, a `BackendForward`.

        The module itself is left alone, so other pipelines may use it at the same time: the front is an object of a
        subclass, and its ``__dict__`` is the module's own, so that whatever is set on one is set on both. ``left`` is
        called with a message where an evaluation that a user would expect of the backend is left to diffusers.
        """
        return front_of(self.unet, forward=BackendForward(self))


class BackendForward:
    """A replacement of ``UNet2DModel.forward`` that a backend runs, for the length of one call of a pipeline.

    It leaves to diffusers' own method what it cannot do in the same way: gradients, unusual labels and other dtypes.
    """

    def __init__(self, network: BackendUNet):
        self.network = network
        self.state: State | None = None
        self.parameters = [m._parameters for m in network.unet.modules()]
        self.versions = versions(self.parameters)
        self.is_left = False  # whether the weights became what no backend can run

    def _follow_weights(self) -> None:
        """Notice weights that the pipeline has changed in the middle of its call."""
        now = versions(self.parameters)
        if now != self.versions:
            self.versions, self.state = now, None  # backends look at the weights when they see a new state
            self.is_left = bool(self.network.unsupported_changes())

    def _fits(self, sample: Tensor) -> bool:
        """Return whether a backend can evaluate images of this kind, and no gradient is asked for."""
        network = self.network
        p = next(network.unet.parameters())
        learns = torch.is_grad_enabled()
        learns = learns and (sample.requires_grad or any(w.requires_grad for w in network.unet.parameters()))
        fits = sample.ndim == 4 and sample.shape[1] == network.unet.config.in_channels and len(sample) > 0
        return fits and sample.dtype == p.dtype and sample.device == p.device and not learns

    def __call__(
        self, sample: Tensor, timestep: Any, class_labels: Tensor | None = None, return_dict: bool = True
    ) -> Any:
        from diffusers.models.unets.unet_2d import UNet2DOutput

        network = self.network
        self._follow_weights()
        if self.is_left or not self._fits(sample) or not network.accepts(class_labels, sample.shape[2:]):
            return network.kind().forward(network.unet, sample, timestep, class_labels, return_dict)
        # As in diffusers, a number is rounded down to a whole one, while a tensor keeps its fraction.
        t = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], dtype=torch.int64, device="cpu")
        with network.lock.held:
            out = self._run(sample, t.flatten().expand(len(sample)).tolist(), class_labels).to(sample.dtype)
        return UNet2DOutput(sample=out) if return_dict else (out,)

    def _run(self, x: Tensor, t: list[float], labels: Tensor | None, texts: Texts | None = None) -> Tensor:
        """Evaluate the network once: the timestep of each image comes from a table of one row.

        With ``texts``, the labels are their numbers.
        """
        distinct = sorted(set(t))
        # Only t has an effect, as no update follows.
        rows = [Row(t=float(v), abar=0.5, abar_next=1.0, kx=0.0, ko=1.0, a0=1.0) for v in distinct]
        tables = [StepTable("forward", 1, (row,), continuous=True) for row in rows]
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        bank = TableBank(tables, x.device, dtype)
        table = [distinct.index(v) for v in t]
        state = self.state
        if state is None or state.x.shape != x.shape or not equal(state.label, labels):
            state = self.state = State.create(x.to(dtype), bank, table=table, label=labels)
        state.x, state.bank, state.texts = x.to(dtype), bank, texts
        state.table = torch.tensor(table, dtype=torch.int64, device=x.device)
        state.table_host = state.table.cpu().numpy()
        self.network.runner(x.shape).forward(state)
        assert state.out is not None
        return state.out.clone()  # the next call may overwrite its memory


def equal(a: Tensor | None, b: Tensor | None) -> bool:
    """Return whether two tensors have the same shape and numbers."""
    return a is b or (a is not None and b is not None and torch.equal(a, b))
