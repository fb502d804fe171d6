"""`BackendCondition`: a ``UNet2DConditionModel`` of diffusers, Stable Diffusion's network, run by the native engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.core.lower import added_vector, vector_kind, vector_width
from fastdiff.core.state import Texts
from fastdiff.errors import ConfigError
from fastdiff.integrations.lora import ATTRIBUTES, lora_layers, lora_reason, lora_state, lora_weight, without_layers
from fastdiff.integrations.network import BackendForward, BackendUNet, equal, front_of
from fastdiff.unet import UNetCondition, UNetConditionConfig

# FreeU's scales, which diffusers sets on the blocks of the upper half; off is no such attribute, or None.
FREEU = ("s1", "s2", "b1", "b2")
# Arguments of a forward that the engine has no operation for.
OTHERS = (
    "attention_mask", "encoder_attention_mask", "down_block_additional_residuals", "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)  # fmt: skip


class BackendCondition(BackendUNet):
    """A pipeline's ``UNet2DConditionModel``, run by `native`, with the parameters of the diffusers module."""

    module: UNetCondition

    def __init__(self, unet: Any, backend: str):
        if backend not in ("auto", "native"):
            raise ConfigError(
                f"a UNet2DConditionModel as its unet is run by backend 'native' alone, not by {backend!r}; leave it out"
            )
        self.layers: dict[str, Any] = {}  # with LoRA, by their names
        self.merged: dict[str, nn.Parameter] = {}  # their weights
        super().__init__(unet, backend)

    @staticmethod
    def kind() -> Any:
        """Return the class of diffusers whose objects are run."""
        from diffusers import UNet2DConditionModel

        return UNet2DConditionModel

    def _described(self) -> nn.Module:
        """Build fastdiff's module of the network's configuration."""
        return UNetCondition(UNetConditionConfig.from_dict({**self.config, "_class_name": "UNet2DConditionModel"}))

    def is_of(self, unet: Any) -> bool:
        """Return whether this was made for the network, with the configuration that it has now."""
        return vars(self.unet) is vars(unet) and self.config == unet.config

    def unsupported_changes(self) -> list[str]:
        """List what the module does beyond its configuration; then only its own code can run it."""
        self.layers = lora_layers(self.unet)
        found = [f"{name} {reason}" for name, m in self.layers.items() if (reason := lora_reason(m))]
        return found or super().unsupported_changes()

    def _plain(self) -> Any:
        """Return the module without its LoRA layers, which `_merged` adds to the weights."""
        return without_layers(self.unet, self.layers.values()) if self.layers else self.unet

    def _merged(self) -> dict[str, nn.Parameter]:
        """Return the weights of layers with LoRA, each the same object for as long as it fits; its numbers follow."""
        found = {}
        for name, layer in self.layers.items():
            key, value = f"{name}.weight", lora_weight(layer)
            known = self.merged.get(key)
            if known is None or (known.shape, known.dtype, known.device) != (value.shape, value.dtype, value.device):
                known = nn.Parameter(value, requires_grad=False)
            elif not torch.equal(known, value):
                known.data.copy_(value)
            found[key] = known
        self.merged = found
        return found

    def _ignored(self) -> tuple[str, ...]:
        """Return the attributes of modules that no result depends on, or that are looked at elsewhere."""
        blocks = getattr(self.unet, "up_blocks", ())
        is_off = all(vars(block).get(name) is None for block in blocks for name in FREEU)
        return (*super()._ignored(), *ATTRIBUTES, *(FREEU if is_off else ()))

    def front(self, left: Callable[[str], None]) -> Any:
        """Return an object that is the module in all but its forward, a `ConditionForward`."""
        return front_of(self.unet, forward=ConditionForward(self, left))


class ConditionForward(BackendForward):
    """A replacement of ``UNet2DConditionModel.forward`` that the engine runs, for the length of one call of a pipeline.

    The keys and values of a text are computed once, for as long as the numbers of the given states stay the same. What
    the engine cannot do in the same way is left to diffusers' own method.
    """

    network: BackendCondition

    def __init__(self, network: BackendCondition, left: Callable[[str], None]):
        super().__init__(network)
        self.left = left
        self.texts: Texts | None = None
        self.numbers: Tensor | None = None
        self.parts = self._parts()

    def _parts(self) -> list[Any]:
        """Return all modules with the kinds of their attention processors, the scales of FreeU and those of LoRA."""
        unet = self.network.unet
        parts: list[Any] = [(m, type(vars(m).get("processor"))) for m in unet.modules()]
        parts += [vars(block).get(name) for block in unet.up_blocks for name in FREEU]
        return parts + [lora_state(layer) for layer in lora_layers(unet).values()]

    def _follow_weights(self) -> None:
        """Notice what a callback of the pipeline has changed in the middle of the call: weights, LoRA layers, FreeU."""
        parts = self._parts()
        if parts != self.parts:
            self.parts, self.versions = parts, []
            self.parameters = [m._parameters for m in self.network.unet.modules()]
        super()._follow_weights()

    def __call__(  # type: ignore[override]  # the arguments are those of another network
        self,
        sample: Tensor,
        timestep: Any,
        encoder_hidden_states: Any,
        class_labels: Tensor | None = None,
        timestep_cond: Tensor | None = None,
        attention_mask: Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        added_cond_kwargs: dict[str, Any] | None = None,
        down_block_additional_residuals: Any = None,
        mid_block_additional_residual: Any = None,
        down_intrablock_additional_residuals: Any = None,
        encoder_attention_mask: Tensor | None = None,
        return_dict: bool = True,
    ) -> Any:
        from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

        given = {
            "class_labels": class_labels, "timestep_cond": timestep_cond, "attention_mask": attention_mask,
            "cross_attention_kwargs": cross_attention_kwargs, "added_cond_kwargs": added_cond_kwargs,
            "down_block_additional_residuals": down_block_additional_residuals,
            "mid_block_additional_residual": mid_block_additional_residual,
            "down_intrablock_additional_residuals": down_intrablock_additional_residuals,
            "encoder_attention_mask": encoder_attention_mask,
        }  # fmt: skip
        network = self.network
        self._follow_weights()
        is_left = self.is_left or not self._fits(sample)
        reason = None if is_left else self._reason(sample, encoder_hidden_states, given)
        if reason is not None:
            self.left(f"evaluations of the network {reason} are left to diffusers")
        if is_left or reason is not None:
            forward = network.kind().forward
            return forward(network.unet, sample, timestep, encoder_hidden_states, **given, return_dict=return_dict)
        # As in diffusers, numbers keep their fraction.
        t = timestep if isinstance(timestep, Tensor) else torch.tensor([timestep], dtype=torch.float64, device="cpu")
        with network.lock.held:
            texts = self._texts(encoder_hidden_states, self._vector(given))
            out = self._run(sample, t.flatten().expand(len(sample)).tolist(), self.numbers, texts).to(sample.dtype)
        return UNet2DConditionOutput(sample=out) if return_dict else (out,)

    def _reason(self, sample: Tensor, states: Any, given: Mapping[str, Any]) -> str | None:
        """Say with which of its inputs the engine cannot evaluate the network; None where it can."""
        unet, stride = self.network.module, self.network.module.config.stride
        for name in OTHERS:
            if given[name] is not None:
                return f"with {name}"
        others = dict(given["cross_attention_kwargs"] or {})
        if not self.network.layers or others.get("scale") in (None, 1.0):  # without LoRA layers it has no effect
            others.pop("scale", None)
        if others:
            return f"with cross_attention_kwargs {', '.join(sorted(map(str, others)))}"
        if sample.shape[2] % stride or sample.shape[3] % stride:
            return f"for latents whose height or width is no multiple of {stride}"
        width, B, like = unet.config.context_channels, len(sample), (sample.dtype, sample.device)
        fits = isinstance(states, Tensor) and states.ndim == 3 and len(states) == B and 0 not in states.shape
        if not fits or states.shape[2] != width or (states.dtype, states.device) != like:
            return f"with encoder_hidden_states that are no states [{B}, tokens, {width}] of a text"
        if states.requires_grad and torch.is_grad_enabled():
            return "with gradients"
        return self._vector_reason(B, like, given)

    def _vector_reason(self, B: int, like: tuple[Any, Any], given: Mapping[str, Any]) -> str | None:
        """Say which vector for the time embedding the engine cannot take; None where it can take all that are given."""
        unet = self.network.module
        kind, width = vector_kind(unet), vector_width(unet)
        added = given["added_cond_kwargs"] or {}
        needed = {"text_embeds", "time_ids"} if kind == "added" else set()
        if set(added) != needed or not all(
            isinstance(v, Tensor) and v.ndim == 2 and len(v) == B for v in added.values()
        ):
            return f"with added_cond_kwargs {', '.join(sorted(map(str, added))) or 'missing'}"
        found = {"class": given["class_labels"], "condition": given["timestep_cond"]}
        for name, vector in found.items():
            if vector is None and (name == "condition" or kind != "class"):
                continue
            argument = "class_labels" if name == "class" else "timestep_cond"
            fits = isinstance(vector, Tensor) and tuple(vector.shape) == (B, width) and kind == name
            if not fits or (vector.dtype, vector.device) != like:
                return f"with {argument} of this kind"
        if kind == "added":
            assert unet.config.addition_time_embed_dim is not None
            text, ids = added["text_embeds"], added["time_ids"]
            if text.shape[1] + ids.shape[1] * unet.config.addition_time_embed_dim != width:
                return "with added_cond_kwargs of these sizes"
        return None

    def _vector(self, given: Mapping[str, Any]) -> Tensor | None:
        """Return the vector that enters the time embedding, [B, D]; None where the network takes none."""
        kind = vector_kind(self.network.module)
        if kind == "added":
            added = given["added_cond_kwargs"]
            return added_vector(self.network.module, added["text_embeds"], added["time_ids"])
        vector: Tensor | None = given["class_labels"] if kind == "class" else given["timestep_cond"]
        return vector

    def _texts(self, states: Tensor, vector: Tensor | None) -> Texts:
        """Return the texts of the images: those of the last evaluation, unless the numbers have changed."""
        known = self.texts
        if known is None or not equal(known.states, states) or not equal(known.pooled, vector):
            with torch.inference_mode(False), torch.no_grad():
                pooled = None if vector is None else vector.detach().clone()
                known = self.texts = Texts(states.detach().clone(), pooled)
                self.numbers = torch.arange(len(states), dtype=torch.int64, device="cpu")
        return known
