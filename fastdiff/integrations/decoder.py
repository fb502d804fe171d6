"""`BackendDecoder`: the decoder of a pipeline's autoencoder, run by the native engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastdiff.backends.native import NativeDecoder, engine_reasons
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
from fastdiff.unet.tiny_decoder import TinyDecoder, TinyDecoderConfig

SUPPORTED = ("AutoencoderKL", "VQModel", "AutoencoderTiny")


class BackendDecoder:
    """The decoder of a pipeline's ``AutoencoderKL``, ``VQModel`` or ``AutoencoderTiny``.

    Its parameters are those of the diffusers module, not copies. The rest of the autoencoder, such as the 1x1
    convolution before the decoder, the codebook and tiling, remains diffusers' own code.
    """

    def __init__(self, vae: Any):
        import diffusers

        self.vae = vae
        self.kind = next((name for name in SUPPORTED if isinstance(vae, getattr(diffusers, name))), None)
        if self.kind is None:
            raise ConfigError(f"a {type(vae).__name__} is not supported; {', '.join(SUPPORTED)} are")
        self.config = dict(vae.config)
        self.module: Decoder | TinyDecoder
        with torch.device("meta"):
            if self.kind == "AutoencoderTiny":
                self.module = TinyDecoder(TinyDecoderConfig.from_dict(self.config)).eval()
            else:
                self.module = Decoder(DecoderConfig.from_dict(self.config)).eval()
        self.reference: Any = None
        self.native: NativeDecoder | None = None
        self.lock = Lock()  # as a pipeline may call its decoder from several threads

    def is_of(self, vae: Any) -> bool:
        """Return whether this was made for the autoencoder, with the configuration that it has now."""
        return vars(self.vae) is vars(vae) and self.config == vae.config  # a front has the vars of its autoencoder

    def unsupported_changes(self) -> list[str]:
        """List what the decoder does beyond its configuration; then only its own code can run it."""
        import diffusers
        from diffusers.models.autoencoders import vae

        decoder = self.vae.decoder
        kind = vae.DecoderTiny if isinstance(self.module, TinyDecoder) else vae.Decoder
        if type(decoder) is not kind:
            return [f"it is a {type(decoder).__name__}, not a {kind.__name__}"]
        found = changes.global_changes(decoder, (kind, *plain_processors()))
        if not found:
            if self.reference is None:  # not before: a reference has the changes of its classes too
                assert self.kind is not None
                with torch.device("meta"):
                    self.reference = changes.rebuilt(getattr(diffusers, self.kind), self.config).decoder
            found += changes.differences(decoder, self.reference, IGNORED)
        found += attention_changes(decoder)
        if not found:
            fits, other = give_parameters(decoder, self.module)
            if not fits:
                found.append("its parameters are not those of its configuration")
            if other:
                self.native = None
        return found

    def reasons_against(self) -> list[str]:
        """List every reason why the engine cannot run the decoder on this machine, in its present dtype and device."""
        kinds = {(p.dtype, p.device) for p in self.vae.decoder.parameters()}
        if len(kinds) > 1:
            return ["the decoder's weights are of several dtypes or on several devices"]
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

    def decode(self, z: Tensor) -> Tensor:
        """Decode latents by the engine."""
        with self.lock.held:
            if self.native is None:
                self.native = NativeDecoder(self.module)
            return self.native(z)

    def front(self, left: Callable[[str], None]) -> Any:
        """Return an object that is the autoencoder in all but its decoder, which is a front of the decoder.

        Neither module is changed, so other pipelines may use both at the same time. ``left`` is called with a
        message where a decoding fails, which is then left to diffusers.
        """
        decoder = front_of(self.vae.decoder, forward=DecoderForward(self, left))
        return front_of(self.vae, decoder=property(lambda _: decoder))


class DecoderForward:
    """A replacement of the decoder's ``forward`` that the engine runs, for the length of one call of a pipeline.

    It leaves to diffusers' own method what it cannot do in the same way: gradients and other dtypes.
    """

    def __init__(self, decoder: BackendDecoder, left: Callable[[str], None]):
        self.decoder = decoder
        self.left = left
        self.parameters = [m._parameters for m in decoder.vae.decoder.modules()]
        self.versions = versions(self.parameters)
        self.is_left = False  # whether the weights became what the engine cannot run

    def _follow_weights(self) -> None:
        """Notice weights that the pipeline has changed, or converted, in the middle of its call."""
        now = versions(self.parameters)
        if now != self.versions:
            self.versions = now
            self.is_left = bool(self.decoder.unsupported_changes() or self.decoder.reasons_against())

    def __call__(self, sample: Tensor, latent_embeds: Tensor | None = None) -> Tensor:
        module, config = self.decoder.vae.decoder, self.decoder.module.config
        learns = torch.is_grad_enabled()
        learns = learns and (sample.requires_grad or any(w.requires_grad for w in module.parameters()))
        fits = sample.ndim == 4 and sample.shape[1] == config.latent_channels and 0 not in sample.shape
        fits = fits and sample.dtype == torch.float32 and sample.device.type == "cpu" and latent_embeds is None
        self._follow_weights()
        if not self.is_left and not learns and fits:
            try:
                return self.decoder.decode(sample)
            except BackendError as e:
                self.left(f"a decoding is left to diffusers: {e}")
        forward: Callable[..., Tensor] = type(module).forward
        return forward(module, sample) if latent_embeds is None else forward(module, sample, latent_embeds)
