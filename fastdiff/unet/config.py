"""What decides a U-Net's shape: diffusers' ``UNet2DModel`` configuration keys, checked."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from fastdiff.errors import ConfigError

DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
CLASS_IMAGE = (None, "add", "multiply", "concat")
# What the networks of a code base have in common, where that differs from diffusers' defaults.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "diffusers": {},
    # hojonathanho/diffusion and its ports to PyTorch (pesser, ermongroup): one head as wide as the map, GroupNorm with
    # eps 1e-6, the sinusoid [sin, cos] with its endpoint, stride-2 convolutions padded on the right and bottom only.
    "ho": {
        "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
        "flip_sin_to_cos": False, "freq_shift": 1,
    },
    # openai/improved-diffusion and guided-diffusion: eps 1e-5, [cos, sin] without it, padding on both sides.
    "openai": {"norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1},
}  # fmt: skip
MAX_LEVELS, MAX_LAYERS = 16, 16  # far more than any network has; they bound what an untrusted config.json can cost


@dataclasses.dataclass(frozen=True, slots=True)
class UNetConfig:
    """Everything that decides the network's shape. Names and defaults are diffusers' ``UNet2DModel``'s.

    Fields beyond diffusers':

    ``null_label``
        The label that means "no class" (the last row of a class embedding with ``num_class_embeds`` rows); training
        drops labels to it and guidance evaluates it. None: the network cannot be guided.
    ``class_image``
        None: the class embedding is added to the time embedding (with ``resnet_time_scale_shift="scale_shift"`` it then
        scales and shifts every block, FiLM). "add", "multiply", "concat": an encoder network turns the label into an
        image that is added to, multiplied with (as 1 + image), or concatenated to the input; the time embedding stays
        class-free.
    ``class_before_mlp``
        The class joins the sinusoid, before the time MLP, as a linear map of the one-hot label times
        sqrt(number of classes); the null label, which it needs, is a vector of zeros (EDM's DDPM++).
    ``num_attention_heads``
        The number of heads at every level (then ``attention_head_dim`` is not read); None: as many as
        ``attention_head_dim`` fits. OpenAI's networks name the one or the other.
    ``sinusoid_dim``
        Width of the sinusoid, where it is not that of the first block (ADM-512; None: it is).
    ``timestep_scale``
        The sinusoid is of ``timestep_scale * t``: 1000 / T for improved-diffusion's ``rescale_timesteps``.
    ``block_scale_factor``
        What every residual block and attention outside the mid block divides its sum by (sqrt(2) in DDPM++).
    ``up_attention``
        "all": behind every residual block of an up block with attention; "last": behind its last one only (DDPM++).
    ``resample_shortcut``
        Whether residual blocks that resample have a 1x1 convolution in their shortcut (DDPM++).

    Raises `ConfigError` naming the key, its value and what is allowed.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str = "conv"
    upsample_type: str = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True
    class_embed_type: str | None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    null_label: int | None = None
    class_image: str | None = None
    class_before_mlp: bool = False
    num_attention_heads: int | None = None
    sinusoid_dim: int | None = None
    timestep_scale: float = 1.0
    block_scale_factor: float = 1.0
    up_attention: str = "all"
    resample_shortcut: bool = False

    def __post_init__(self) -> None:
        for key in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_LEVELS:
                raise ConfigError(f"{key}={value!r}: a list of 1 to {MAX_LEVELS} entries is needed")
            object.__setattr__(self, key, tuple(value))
        if isinstance(self.sample_size, list):
            object.__setattr__(self, "sample_size", tuple(self.sample_size))
        self._check_numbers()
        self._check_choices()
        self._check_blocks()
        self._check_conditioning()

    def _check_numbers(self) -> None:
        needed = ("in_channels", "out_channels", "layers_per_block", "norm_num_groups")
        optional = (
            "time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds",
            "num_attention_heads", "sinusoid_dim",
        )  # fmt: skip
        whole = {k: getattr(self, k) for k in (*needed, *optional)}
        whole = {k: v for k, v in whole.items() if k in needed or v is not None}
        whole |= {f"block_out_channels[{i}]": c for i, c in enumerate(self.block_out_channels)}
        if self.sample_size is not None:
            size = self.sample_size if isinstance(self.sample_size, tuple) else (self.sample_size, self.sample_size)
            if len(size) != 2:
                raise ConfigError(f"sample_size={self.sample_size!r}: one number or two (height, width) are allowed")
            whole |= {"sample_size height": size[0], "sample_size width": size[1]}
        for key, value in whole.items():
            most = MAX_LAYERS if key == "layers_per_block" else 1 << 20
            if type(value) is not int or not 1 <= value <= most:
                raise ConfigError(f"{key}={value!r}: a whole number from 1 to {most} is needed")
        factors = ("mid_block_scale_factor", "block_scale_factor", "timestep_scale")
        for key in ("dropout", "norm_eps", "freq_shift", *factors):
            value = getattr(self, key)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise ConfigError(f"{key}={value!r}: a finite number is needed")
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r}: 0 <= dropout < 1 is needed")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps={self.norm_eps!r}: a small positive number such as 1e-5 is needed")
        for key in factors:
            if getattr(self, key) == 0:
                raise ConfigError(f"{key}={getattr(self, key)!r}: any number but 0 is allowed")
        half = self.sinusoid_channels // 2  # the sinusoid's frequencies are 10000^(-i / (half - freq_shift))
        if not 0 <= self.freq_shift < half:
            width = "block_out_channels[0]" if self.sinusoid_dim is None else "sinusoid_dim"
            raise ConfigError(f"freq_shift={self.freq_shift!r}: 0 <= freq_shift < {half}, half of {width}, is needed")

    def _check_choices(self) -> None:
        choices: dict[str, tuple[Any, ...]] = {
            "time_embedding_type": ("positional",),
            "mid_block_type": ("UNetMidBlock2D", None),
            "downsample_padding": (0, 1),
            "downsample_type": ("conv", "resnet"),
            "upsample_type": ("conv", "resnet"),
            "act_fn": ("silu", "swish"),
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "class_embed_type": (None, "timestep", "identity"),
            "class_image": CLASS_IMAGE,
            "center_input_sample": (False, True),
            "flip_sin_to_cos": (False, True),
            "add_attention": (False, True),
            "up_attention": ("all", "last"),
            "resample_shortcut": (False, True),
            "class_before_mlp": (False, True),
        }
        for key, allowed in choices.items():
            value = getattr(self, key)
            if not any(
                value == a and type(value) is type(a) for a in allowed
            ):  # True == 1 == 1.0, but they are not the same
                raise ConfigError(f"{key}={value!r} is not supported; allowed: {', '.join(map(repr, allowed))}")

    def _check_blocks(self) -> None:
        n = len(self.block_out_channels)
        for key, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            names = getattr(self, key)
            if len(names) != n:
                raise ConfigError(f"{key} has {len(names)} entries but block_out_channels has {n}; they must agree")
            for name in names:
                if name not in allowed:
                    raise ConfigError(f"{key}: {name!r} is not supported; allowed: {', '.join(allowed)}")
        for i, channels in enumerate(self.block_out_channels):
            if channels % self.norm_num_groups:
                raise ConfigError(
                    f"block_out_channels[{i}]={channels} is not divisible by norm_num_groups={self.norm_num_groups}"
                )
            if n - 1 == i and self._mid_attention and channels % (self.attn_norm_num_groups or 1):
                raise ConfigError(
                    f"block_out_channels[{i}]={channels} is not divisible by "
                    f"attn_norm_num_groups={self.attn_norm_num_groups}"
                )
            if not self._has_attention(i):
                continue
            heads = self.num_attention_heads
            if heads is not None and channels % heads:
                raise ConfigError(f"block_out_channels[{i}]={channels} is not divisible by num_attention_heads={heads}")
            if heads is None and self.attention_head_dim is not None and self.attention_head_dim > channels:
                raise ConfigError(
                    f"attention_head_dim={self.attention_head_dim} exceeds block_out_channels[{i}]={channels}"
                )

    def _has_attention(self, level: int) -> bool:
        last = len(self.block_out_channels) - 1
        kinds = (self.down_block_types[level], self.up_block_types[last - level])
        return (level == last and self._mid_attention) or any(kind.startswith("Attn") for kind in kinds)

    @property
    def _mid_attention(self) -> bool:
        return self.mid_block_type is not None and self.add_attention

    def _check_conditioning(self) -> None:
        if self.class_image is not None and (self.num_class_embeds is None or self.class_embed_type is not None):
            raise ConfigError(f"class_image={self.class_image!r} needs num_class_embeds and class_embed_type=None")
        if self.class_before_mlp and (self.null_label is None or self.class_image is not None):
            raise ConfigError(
                "class_before_mlp=True needs num_class_embeds, null_label (the last one, whose vector is zero) and "
                "class_image=None"
            )
        if self.class_before_mlp and self.num_class_embeds == 1:
            raise ConfigError("class_before_mlp=True, num_class_embeds=1: a class besides the null label is needed")
        if self.null_label is not None:
            if self.num_class_embeds is None or self.class_embed_type is not None:
                raise ConfigError(f"null_label={self.null_label!r} needs num_class_embeds and class_embed_type=None")
            last = self.num_class_embeds - 1
            if type(self.null_label) is not int or self.null_label != last:
                raise ConfigError(
                    f"null_label={self.null_label!r} must be the last class, num_class_embeds - 1 = {last}"
                )

    @property
    def num_classes(self) -> int | None:
        """How many labels a user may ask for (the null label excluded); None for a network without embedded labels."""
        if self.num_class_embeds is None or self.class_embed_type is not None:
            return None
        return self.num_class_embeds - (self.null_label is not None)

    @property
    def conditional(self) -> bool:
        """Whether `UNet.forward` needs ``class_labels``."""
        return self.num_class_embeds is not None or self.class_embed_type is not None

    @property
    def stride(self) -> int:
        """Height and width of the input must be multiples of this."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def sinusoid_channels(self) -> int:
        """Width of the sinusoid."""
        return self.sinusoid_dim or self.block_out_channels[0]

    @property
    def temb_channels(self) -> int:
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def head_dim(self, channels: int) -> int:
        """Channels of an attention head on a map of ``channels``."""
        if self.num_attention_heads is not None:
            return channels // self.num_attention_heads
        return self.attention_head_dim or channels

    @property
    def diffusers_can_run(self) -> bool:
        """Whether diffusers' ``UNet2DModel`` can be this network; the null label is a note that it does not hear."""
        return all(getattr(self, key) == default for key, default in OWN_FIELDS.items() if key != "null_label")

    @classmethod
    def like(cls, codebase: str, **fields: Any) -> UNetConfig:
        """A configuration with these fields and the conventions of "diffusers", "ho" (original DDPM) or "openai"."""
        if codebase not in CONVENTIONS:
            raise ConfigError(f"code base {codebase!r} is unknown; allowed: {', '.join(CONVENTIONS)}")
        return cls(**{**CONVENTIONS[codebase], **fields})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Read a diffusers ``config.json``. Keys that start with "_" are notes; other unknown keys are refused."""
        if not isinstance(config, Mapping):
            raise ConfigError(f"a U-Net configuration is an object with keys, not {type(config).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        unknown = sorted(k for k in config if k not in known and not k.startswith("_"))
        if unknown:
            raise ConfigError(
                f"unknown U-Net configuration keys: {', '.join(unknown)}; allowed: {', '.join(sorted(known))}"
            )
        return cls(**{k: v for k, v in config.items() if k in known})

    def to_dict(self) -> dict[str, Any]:
        """The configuration as JSON-serialisable diffusers keys; fastdiff's own keys appear only when they are set."""
        config = dataclasses.asdict(self)
        for key, default in OWN_FIELDS.items():
            if config[key] == default:
                del config[key]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


# Fields that diffusers does not have, with the values at which a network is one of diffusers'.
OWN_FIELDS: dict[str, Any] = {
    f.name: f.default
    for f in dataclasses.fields(UNetConfig)
    if f.name
    in (
        "null_label", "class_image", "num_attention_heads", "sinusoid_dim", "timestep_scale", "block_scale_factor",
        "up_attention", "resample_shortcut", "class_before_mlp",
    )
}  # fmt: skip
