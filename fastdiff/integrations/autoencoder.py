"""`BackendCoder`: the decoder or encoder of a pipeline's autoencoder, run by the native engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.backends.native import NativeCoder, engine_reasons
from fastdiff.core.lower import Coder
from fastdiff.core.turns import Lock
from fastdiff.errors import BackendError, ConfigError
from fastdiff.integrations.network import (
    IGNORED,
    attention_changes,
    front_of,
    give_parameters,
    plain_processors,
    versions,
)
from fastdiff.unet import changes
from fastdiff.unet.decoder import Decoder, DecoderConfig
from fastdiff.unet.encoder import Encoder, EncoderConfig
from fastdiff.unet.tiny_decoder import TinyDecoder, TinyDecoderConfig
from fastdiff.unet.tiny_encoder import TinyEncoder, TinyEncoderConfig

SUPPORTED = ("AutoencoderKL", "VQModel", "AutoencoderTiny")


def _described(kind: str, part: str, config: Mapping[str, Any]) -> Coder:
    """Build fastdiff's module of a part of an autoencoder, on "meta"."""
    with torch.device("meta"):
        if kind == "AutoencoderTiny":
            if part == "decoder":
                return TinyDecoder(TinyDecoderConfig.from_dict(config)).eval()
            return TinyEncoder(TinyEncoderConfig.from_dict(config)).eval()
        if part == "decoder":
            return Decoder(DecoderConfig.from_dict(config)).eval()
        return Encoder(EncoderConfig.from_dict(config, double_z=kind == "AutoencoderKL")).eval()


class BackendCoder:
    """The part "decoder" or "encoder" of a pipeline's ``AutoencoderKL``, ``VQModel`` or ``AutoencoderTiny``.

    Its parameters are those of the diffusers module, not copies. The rest of the autoencoder, such as the 1x1
    convolutions beside these parts, the codebook, the sampling of latents and tiling, remains diffusers' own code.
    """

    def __init__(self, vae: Any, part: str):
        import diffusers

        self.vae = vae
        self.part = part
        kind = next((name for name in SUPPORTED if isinstance(vae, getattr(diffusers, name))), None)
        if kind is None:
            raise ConfigError(f"a {type(vae).__name__} is not supported; {', '.join(SUPPORTED)} are")
        self.kind = kind
        self.config = dict(vae.config)
        self.module = _described(kind, part, self.config)
        self.reference: Any = None
        self.native: NativeCoder | None = None
        self.lock = Lock()  # as a pipeline may call its autoencoder from several threads

    def is_of(self, vae: Any) -> bool:
        """Return whether this was made for the autoencoder, with the configuration that it has now."""
        return vars(self.vae) is vars(vae) and self.config == vae.config  # a front has the vars of its autoencoder

    @property
    def theirs(self) -> Any:
        """The module of diffusers."""
        return getattr(self.vae, self.part)

    def unsupported_changes(self) -> list[str]:
        """List what the module does beyond its configuration; then only its own code can run it."""
        import diffusers
        from diffusers.models.autoencoders import vae

        theirs = self.theirs
        name = self.part.capitalize()
        kind = getattr(vae, f"{name}Tiny" if self.kind == "AutoencoderTiny" else name)
        if type(theirs) is not kind:
            return [f"it is a {type(theirs).__name__}, not a {kind.__name__}"]
        found = changes.global_changes(theirs, (kind, *plain_processors()))
        if not found:
            if self.reference is None:  # not before: a reference has the changes of its classes too
                with torch.device("meta"):
                    self.reference = getattr(changes.rebuilt(getattr(diffusers, self.kind), self.config), self.part)
            found += changes.differences(theirs, self.reference, IGNORED)
        found += attention_changes(theirs)
        if not found:
            fits, other = give_parameters(theirs, self.module)
            if not fits:
                found.append("its parameters are not those of its configuration")
            if other:
                self.native = None
        return found

    def reasons_against(self) -> list[str]:
        """List every reason why the engine cannot run the module on this machine, in its present dtype and device."""
        kinds = {(p.dtype, p.device) for p in self.theirs.parameters()}
        if len(kinds) > 1:
            return [f"the {self.part}'s weights are of several dtypes or on several devices"]
        dtype, device = next(iter(kinds))
        reasons = engine_reasons(dtype, device)
        if dtype == torch.bfloat16:
            reasons.append("weights in bfloat16 are not repacked; vae.to(torch.float32)")
        if device.type != "meta" and torch.is_autocast_enabled(device.type):
            reasons.append("autocast is on, which it would not follow")
        return reasons

    def forget_interrupted(self) -> None:
        """Free the memory of work that an error, such as a signal handler's, may have interrupted half-way."""
        self.native = None

    def run(self, x: Tensor) -> Tensor:
        """Decode latents, or encode images, by the engine."""
        with self.lock.held:
            if self.native is None:
                self.native = NativeCoder(self.module)
            return self.native(x)


def front(
    vae: Any, decoder: BackendCoder | None, encoder: Callable[[], BackendCoder | None], left: Callable[[str], None]
) -> Any:
    """Return an object that is the autoencoder in all but its decoder and encoder; None where the engine runs neither.

    No module is changed, so other pipelines may use them at the same time. A ``decoder`` of None is left to diffusers;
    so is the encoder where ``encoder()`` is None, which is asked for at its first call, as most pipelines have none.
    ``left`` is called with a message where a decoding or encoding fails, which is then left to diffusers.
    """
    forwards = {}
    if decoder is not None:
        forwards["decoder"] = CoderForward(vae.decoder, left, decoder)
    if isinstance(getattr(vae, "encoder", None), nn.Module):
        forwards["encoder"] = CoderForward(vae.encoder, left, find=encoder)
    members = {}
    for part, forward in forwards.items():
        shown = front_of(getattr(vae, part), forward=forward)
        members[part] = _always(shown)
    return front_of(vae, **members) if members else None


def _always(value: Any) -> property:
    """Return a property that has the value for every object."""
    return property(lambda _: value)


class CoderForward:
    """A replacement of a decoder's or encoder's ``forward`` that the engine runs, for one call of a pipeline.

    It leaves to diffusers' own method what it cannot do in the same way: gradients and other dtypes. Without a
    ``coder``, the one that ``find()`` returns is taken at the first call.
    """

    def __init__(
        self, module: Any, left: Callable[[str], None], coder: BackendCoder | None = None,
        find: Callable[[], BackendCoder | None] | None = None,
    ):  # fmt: skip
        self.module = module
        self.left = left
        self.coder = coder
        self.find = find
        self.parameters = [m._parameters for m in module.modules()]
        self.versions = versions(self.parameters)
        self.is_left = False  # whether the weights became what the engine cannot run

    def _follow(self) -> None:
        """Look for the coder at the first call, and for weights that the pipeline has changed, or converted."""
        now = versions(self.parameters)
        if self.find is not None:
            self.coder, self.find = self.find(), None
        elif now != self.versions and self.coder is not None:
            self.is_left = bool(self.coder.unsupported_changes() or self.coder.reasons_against())
        self.versions = now

    def __call__(self, *given: Any, **named: Any) -> Tensor:
        inputs, module = [*given, *named.values()], self.module
        self._follow()
        if self.coder is not None and not self.is_left and self._fits(self.coder.module, inputs):
            try:
                return self.coder.run(inputs[0])
            except BackendError as e:
                what = "a decoding" if self.coder.part == "decoder" else "an encoding"
                self.left(f"{what} is left to diffusers: {e}")
        forward: Callable[..., Tensor] = type(module).forward
        return forward(module, *given, **named)

    def _fits(self, ours: Coder, inputs: list[Any]) -> bool:
        """Return whether the engine can take the inputs: images in float32 on the CPU alone, without gradients."""
        x = inputs[0] if inputs else None
        if not isinstance(x, Tensor) or x.ndim != 4 or len(x) == 0 or any(v is not None for v in inputs[1:]):
            return False
        learns = x.requires_grad or any(w.requires_grad for w in self.module.parameters())
        fits = x.shape[1] == ours.in_channels and min(x.shape[2:]) >= ours.least
        return fits and (x.dtype, x.device.type) == (torch.float32, "cpu") and not (learns and torch.is_grad_enabled())
