"""Configuration of the text-conditioned U-Net, with the keys of diffusers' ``UNet2DConditionModel``."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

from fastdiff.checks import Check, boolean, optional, shown, whole
from fastdiff.errors import ConfigError
from fastdiff.unet.config import MAX_LAYERS, MAX_LEVELS, MAX_SIZE, choice, finite, known_fields, sample_size, size

CROSS = "CrossAttn"  # how the types of blocks with cross-attention begin
DOWN_BLOCKS = ("DownBlock2D", "CrossAttnDownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
UP_BLOCKS = ("UpBlock2D", "CrossAttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
SIZES = 6  # numbers that Stable Diffusion XL embeds beside a text: original size, corner of the crop, target size
MID_BLOCKS = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D", None)
CLASS_TYPES = (None, "timestep", "identity", "projection", "simple_projection")
ACTIVATIONS = (None, "silu", "swish", "mish", "gelu", "relu")
# Limits far beyond any real network, which bound the time that an untrusted config.json can cost.
MAX_DEPTH, MAX_TRANSFORMERS = 64, 1024

# Values of an entry of the depths: a number, or one for each layer of the block.
Depths = int | tuple[int, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class UNetConditionConfig:
    """Configuration of a `UNetCondition`.

    The names and defaults are those of diffusers' ``UNet2DConditionModel``. Where a list is allowed, it has an entry
    for each level, from the highest resolution to the lowest, and a single value is that of all levels. All sizes are
    from 1 to 2^20.

    Attributes:
        sample_size: Side of the images or latents, or (height, width), with which the network was trained; None for no
            default.
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        center_input_sample: Whether the network maps its input from [0, 1] to [-1, 1] itself: x -> 2 x - 1.
        flip_sin_to_cos: Whether the sinusoid is ordered [cos, sin], not [sin, cos].
        freq_shift: Shift s of the sinusoid's frequencies 10000^(-i / (n - s)), i = 0 .. n - 1, with n half its width;
            0 <= s < n.
        down_block_types: Type of the block of every level: "DownBlock2D", "CrossAttnDownBlock2D" (a transformer
            behind each residual block), "AttnDownBlock2D" (self-attention there) or "ResnetDownsampleBlock2D".
        mid_block_type: "UNetMidBlock2DCrossAttn", "UNetMidBlock2D" (a single residual block), or None for no block.
        up_block_types: Type of the block of every level, from the lowest resolution to the highest: "UpBlock2D",
            "CrossAttnUpBlock2D", "AttnUpBlock2D" or "ResnetUpsampleBlock2D".
        only_cross_attention: Whether the first attention of each transformer block reads the text as well; a list is
            allowed. The mid block's never does.
        block_out_channels: Channels of every level, 1 to 16 levels; multiples of ``norm_num_groups``.
        layers_per_block: Residual blocks of a down block, 1 to 16; up blocks have one more. A list is allowed.
        downsample_padding: 1 for stride-2 convolutions padded on all sides, 0 for padding on the right and bottom only.
        mid_block_scale_factor: Divisor of the output, input + branch, of the mid block's residual blocks; not 0.
        dropout: Dropout probability in residual blocks while training, 0 <= dropout < 1.
        act_fn: Activation function of all layers; "silu" and "swish" are two names of the only one supported.
        norm_num_groups: Number of groups of all GroupNorm layers.
        norm_eps: The epsilon of all GroupNorm layers but those before a transformer, whose epsilon is 1e-6; positive.
        cross_attention_dim: Channels of a text state; a list is allowed, with None at levels that read no text.
        transformer_layers_per_block: Number of transformer blocks behind each residual block; a list is allowed, whose
            entries are numbers or lists with a number for each layer of the block. The mid block has that of the last
            level.
        reverse_transformer_layers_per_block: The same list for the up blocks, from the lowest resolution to the
            highest; None for the reverse of ``transformer_layers_per_block``, unless that has lists in it.
        encoder_hid_dim: Channels of the text states that the network is given, which it projects to
            ``cross_attention_dim``; None for no projection.
        encoder_hid_dim_type: "text_proj", or None.
        attention_head_dim: In spite of its name, which is diffusers', the number of heads in the types "CrossAttn..."
            and their mid block; channels of a head in the types "Attn...". A list is allowed, which in diffusers is
            not reversed for "AttnUpBlock2D".
        num_attention_heads: None, as in diffusers.
        dual_cross_attention: False.
        use_linear_projection: Whether a transformer's projections are linear layers, not 1x1 convolutions.
        class_embed_type: Class conditioning: None for labels (or for no classes), "timestep" for scalars embedded like
            timesteps, "identity" for vectors that are added to the time embedding, "projection" for vectors that an
            MLP maps to it, "simple_projection" for vectors that a linear layer maps to it.
        addition_embed_type: "text_time" for SDXL's vector: the pooled text and embedded sizes; None for none.
        addition_time_embed_dim: Width of the sinusoid of each of those sizes.
        num_class_embeds: Number of labels; None for a network without labels.
        upcast_attention: Whether attention is computed in float32; without effect in float32.
        resnet_time_scale_shift: How the embedding enters a residual block: "default" adds it; "scale_shift" scales and
            shifts the normalised map by it.
        resnet_skip_time_act: False in networks with blocks of type "Resnet..."; the other types do not use it.
        resnet_out_scale_factor: Divisor of the output of residual blocks in blocks of type "Resnet..."; not 0.
        time_embedding_type: "positional", a sinusoid.
        time_embedding_dim: Width of the time embedding; None for 4 ``block_out_channels[0]``.
        time_embedding_act_fn: Activation of the whole embedding, "silu", "swish", "mish", "gelu" or "relu"; None for
            none.
        timestep_post_act: Activation behind the time MLP; the same ones.
        time_cond_proj_dim: Width of the vectors that are added to the sinusoid of the timestep, before the time MLP
            (LCM's guidance embedding); None for none.
        conv_in_kernel: 3.
        conv_out_kernel: 3.
        projection_class_embeddings_input_dim: Width of the vectors of "projection", "simple_projection" and
            "text_time".
        attention_type: "default".
        class_embeddings_concat: False.
        mid_block_only_cross_attention: Without effect on the mid blocks that are supported.
        cross_attention_norm: Without effect on the blocks that are supported.
        addition_embed_type_num_heads: Without effect on the types that are supported.

    Raises:
        ConfigError: If a value is not supported; the message names the key, the value and what is allowed.
    """

    sample_size: int | tuple[int, int] | None = None
    in_channels: int = 4
    out_channels: int = 4
    center_input_sample: bool = False
    flip_sin_to_cos: bool = True
    freq_shift: int = 0
    down_block_types: tuple[str, ...] = (*["CrossAttnDownBlock2D"] * 3, "DownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    up_block_types: tuple[str, ...] = ("UpBlock2D", *["CrossAttnUpBlock2D"] * 3)
    only_cross_attention: bool | tuple[bool, ...] = False
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)
    layers_per_block: int | tuple[int, ...] = 2
    downsample_padding: int = 1
    mid_block_scale_factor: float = 1.0
    dropout: float = 0.0
    act_fn: str = "silu"
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    cross_attention_dim: int | tuple[int | None, ...] = 1280
    transformer_layers_per_block: int | tuple[Depths, ...] = 1
    reverse_transformer_layers_per_block: tuple[Depths, ...] | None = None
    encoder_hid_dim: int | None = None
    encoder_hid_dim_type: str | None = None
    attention_head_dim: int | tuple[int, ...] = 8
    num_attention_heads: None = None
    dual_cross_attention: bool = False
    use_linear_projection: bool = False
    class_embed_type: str | None = None
    addition_embed_type: str | None = None
    addition_time_embed_dim: int | None = None
    num_class_embeds: int | None = None
    upcast_attention: bool = False
    resnet_time_scale_shift: str = "default"
    resnet_skip_time_act: bool = False
    resnet_out_scale_factor: float = 1.0
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None
    time_embedding_act_fn: str | None = None
    timestep_post_act: str | None = None
    time_cond_proj_dim: int | None = None
    conv_in_kernel: int = 3
    conv_out_kernel: int = 3
    projection_class_embeddings_input_dim: int | None = None
    attention_type: str = "default"
    class_embeddings_concat: bool = False
    mid_block_only_cross_attention: bool | None = None
    cross_attention_norm: str | None = None
    addition_embed_type_num_heads: int = 64

    # What a `fastdiff.unet.model.ResnetBlock` asks of a configuration besides.
    block_scale_factor: ClassVar[float] = 1.0
    resample_shortcut: ClassVar[bool] = False

    def __post_init__(self) -> None:
        self._check_blocks()
        self._check_levels()
        self._check_sizes()
        self._check_choices()
        self._check_numbers()
        self._check_depths()
        self._check_attention()
        self._check_conditioning()

    def _set(self, key: str, value: Any) -> None:
        object.__setattr__(self, key, value)

    def _check_blocks(self) -> None:
        n = 0
        for key in ("block_out_channels", "down_block_types", "up_block_types"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_LEVELS:
                raise ConfigError(f"{key}={shown(value)}: a list of 1 to {MAX_LEVELS} entries is needed")
            n = n or len(value)
            if len(value) != n:
                raise ConfigError(f"{key} has {len(value)} entries but block_out_channels has {n}; they must agree")
            self._set(key, tuple(value))
        for key, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            for name in getattr(self, key):
                if not isinstance(name, str) or name not in allowed:
                    raise ConfigError(f"{key}: {shown(name)} is not supported; allowed: {', '.join(allowed)}")
        choice("mid_block_type", self.mid_block_type, MID_BLOCKS)
        self._set("norm_num_groups", size("norm_num_groups", self.norm_num_groups))
        widths = tuple(size(f"block_out_channels[{i}]", width) for i, width in enumerate(self.block_out_channels))
        self._set("block_out_channels", widths)
        for i, channels in enumerate(widths):
            if channels % self.norm_num_groups:
                raise ConfigError(
                    f"block_out_channels[{i}]={channels} is not divisible by norm_num_groups={self.norm_num_groups}"
                )

    def _check_levels(self) -> None:
        """Check the fields that may have an entry for each level."""
        self._each("layers_per_block", _layers)
        self._each("attention_head_dim", _size)
        self._each("only_cross_attention", boolean)
        listed = isinstance(self.cross_attention_dim, (list, tuple))
        self._each("cross_attention_dim", optional(_size) if listed else _size)

    def _each(self, key: str, check: Check) -> None:
        value, n = getattr(self, key), len(self.block_out_channels)
        if not isinstance(value, (list, tuple)):
            self._set(key, check(key, value, error=ConfigError))
            return
        if len(value) != n:
            raise ConfigError(f"{key} has {len(value)} entries but block_out_channels has {n}; they must agree")
        self._set(key, tuple(check(f"{key}[{i}]", v, error=ConfigError) for i, v in enumerate(value)))

    def _check_sizes(self) -> None:
        self._set("sample_size", sample_size(self.sample_size))
        for key in ("in_channels", "out_channels", "addition_embed_type_num_heads"):
            self._set(key, size(key, getattr(self, key)))
        for key in (
            "encoder_hid_dim", "addition_time_embed_dim", "num_class_embeds", "time_embedding_dim",
            "time_cond_proj_dim", "projection_class_embeddings_input_dim",
        ):  # fmt: skip
            self._set(key, optional(_size)(key, getattr(self, key)))

    def _check_numbers(self) -> None:
        for key in ("mid_block_scale_factor", "resnet_out_scale_factor", "dropout", "norm_eps", "freq_shift"):
            self._set(key, finite(key, getattr(self, key)))
        if not 0 <= self.dropout < 1:
            raise ConfigError(f"dropout={self.dropout!r}: 0 <= dropout < 1 is needed")
        if self.norm_eps <= 0:
            raise ConfigError(f"norm_eps={self.norm_eps!r}: a small positive number such as 1e-5 is needed")
        for key in ("mid_block_scale_factor", "resnet_out_scale_factor"):
            if getattr(self, key) == 0:
                raise ConfigError(f"{key}={getattr(self, key)!r}: any number but 0 is allowed")
        widths = {"block_out_channels[0]": self.block_out_channels[0]}
        if self.addition_embed_type == "text_time" and self.addition_time_embed_dim is not None:
            widths["addition_time_embed_dim"] = self.addition_time_embed_dim
        for name, width in widths.items():  # the sinusoids' frequencies are 10000^(-i / (half - freq_shift))
            if not 0 <= self.freq_shift < width // 2:
                raise ConfigError(
                    f"freq_shift={self.freq_shift!r}: 0 <= freq_shift < {width // 2}, half of {name}, is needed"
                )

    def _check_choices(self) -> None:
        yes_or_no = (False, True)
        choices: dict[str, tuple[Any, ...]] = {
            "num_attention_heads": (None,),
            "dual_cross_attention": (False,),
            "time_embedding_type": ("positional",),
            "conv_in_kernel": (3,),
            "conv_out_kernel": (3,),
            "attention_type": ("default",),
            "class_embeddings_concat": (False,),
            "encoder_hid_dim_type": (None, "text_proj"),
            "addition_embed_type": (None, "text_time"),
            "class_embed_type": CLASS_TYPES,
            "act_fn": ("silu", "swish"),
            "time_embedding_act_fn": ACTIVATIONS,
            "timestep_post_act": ACTIVATIONS,
            "resnet_time_scale_shift": ("default", "scale_shift"),
            "downsample_padding": (0, 1),
            "cross_attention_norm": (None, "layer_norm", "group_norm"),
            "mid_block_only_cross_attention": (None, *yes_or_no),
            "center_input_sample": yes_or_no,
            "flip_sin_to_cos": yes_or_no,
            "use_linear_projection": yes_or_no,
            "upcast_attention": yes_or_no,
            "resnet_skip_time_act": yes_or_no,
        }
        for key, allowed in choices.items():
            choice(key, getattr(self, key), allowed)
        resnets = [kind for kind in (*self.down_block_types, *self.up_block_types) if kind.startswith("Resnet")]
        if self.resnet_skip_time_act and resnets:
            raise ConfigError(f"resnet_skip_time_act=True is not supported in blocks of type {resnets[0]}")

    def _check_depths(self) -> None:
        depths = self.transformer_layers_per_block
        if isinstance(depths, (list, tuple)):
            self._set("transformer_layers_per_block", self._depth_list("transformer_layers_per_block", depths))
        else:
            self._set("transformer_layers_per_block", _depth("transformer_layers_per_block", depths))
        reverse = self.reverse_transformer_layers_per_block
        if reverse is not None:
            key = "reverse_transformer_layers_per_block"
            if not isinstance(reverse, (list, tuple)):
                raise ConfigError(f"{key}={shown(reverse)}: a list with an entry for each level is needed")
            self._set(key, self._depth_list(key, reverse))
        elif isinstance(depths, (list, tuple)) and any(isinstance(v, (list, tuple)) for v in depths):
            raise ConfigError(
                f"transformer_layers_per_block={shown(depths)} has lists in it, so that "
                "reverse_transformer_layers_per_block is needed, the list of the up blocks"
            )
        blocks = [v for i in range(len(self.block_out_channels)) for v in (*self.down_depths(i), *self.up_depths(i))]
        if sum(blocks) + self.mid_depth > MAX_TRANSFORMERS:
            raise ConfigError(
                f"transformer_layers_per_block={shown(depths)}: the network would have more than {MAX_TRANSFORMERS} "
                "transformer blocks"
            )

    def _depth_list(self, key: str, value: list[Any] | tuple[Any, ...]) -> tuple[Depths, ...]:
        n = len(self.block_out_channels)
        result: list[Depths] = []
        if len(value) != n:
            raise ConfigError(f"{key} has {len(value)} entries but block_out_channels has {n}; they must agree")
        for i, entry in enumerate(value):
            if isinstance(entry, (list, tuple)):
                if not 1 <= len(entry) <= MAX_LAYERS + 1:
                    raise ConfigError(f"{key}[{i}]={shown(entry)}: 1 to {MAX_LAYERS + 1} entries are needed")
                result.append(tuple(_depth(f"{key}[{i}][{j}]", v) for j, v in enumerate(entry)))
            else:
                result.append(_depth(f"{key}[{i}]", entry))
        return tuple(result)

    def _check_attention(self) -> None:
        for i, channels in enumerate(self.block_out_channels):
            up = len(self.block_out_channels) - 1 - i
            value, key = self.level("attention_head_dim", i), "attention_head_dim"
            if self._reads_text(i) and value > channels:
                raise ConfigError(f"{key}={value}, the number of heads, exceeds block_out_channels[{i}]={channels}")
            for kind, width in (
                (self.down_block_types[i], value),
                (self.up_block_types[up], self.level("attention_head_dim", up)),
            ):
                if kind.startswith("Attn") and width > channels:
                    raise ConfigError(f"{key}={width}, the width of a head, exceeds block_out_channels[{i}]={channels}")
        dims = {
            self.level("cross_attention_dim", i) for i in range(len(self.block_out_channels)) if self._reads_text(i)
        }
        if None in dims or len(dims) > 1:
            raise ConfigError(
                f"cross_attention_dim={shown(self.cross_attention_dim)}: the same number at all levels that read the "
                "text is needed"
            )
        if self.encoder_hid_dim_type is None and self.encoder_hid_dim is not None:
            self._set("encoder_hid_dim_type", "text_proj")  # as in diffusers
        if self.encoder_hid_dim_type is not None and self.encoder_hid_dim is None:
            raise ConfigError(f"encoder_hid_dim_type={self.encoder_hid_dim_type!r} needs encoder_hid_dim")
        if self.encoder_hid_dim is not None and not isinstance(self.cross_attention_dim, int):
            raise ConfigError(
                f"encoder_hid_dim needs a single cross_attention_dim, not {shown(self.cross_attention_dim)}"
            )

    def _check_conditioning(self) -> None:
        needs = {
            "class_embed_type": self.class_embed_type in ("projection", "simple_projection"),
            "addition_embed_type": self.addition_embed_type == "text_time",
        }
        for key, needed in needs.items():
            if needed and self.projection_class_embeddings_input_dim is None:
                raise ConfigError(f"{key}={getattr(self, key)!r} needs projection_class_embeddings_input_dim")
        if needs["addition_embed_type"] and self.addition_time_embed_dim is None:
            raise ConfigError("addition_embed_type='text_time' needs addition_time_embed_dim")

    def _reads_text(self, level: int) -> bool:
        last = len(self.block_out_channels) - 1
        kinds = (self.down_block_types[level], self.up_block_types[last - level])
        mid = level == last and self.mid_block_type == "UNetMidBlock2DCrossAttn"
        return mid or any(kind.startswith(CROSS) for kind in kinds)

    def _text_levels(self) -> list[int]:
        return [i for i in range(len(self.block_out_channels)) if self._reads_text(i)]

    def level(self, key: str, i: int) -> Any:
        """Return a field's value at a level.

        Args:
            key: The name of the field.
            i: The level, 0 for the highest resolution.

        Returns:
            The entry of its list, or its only value.
        """
        value = getattr(self, key)
        return value[i] if isinstance(value, tuple) else value

    def down_depths(self, level: int) -> tuple[int, ...]:
        """Return the number of transformer blocks behind each residual block of a down block.

        Args:
            level: The level, 0 for the highest resolution.

        Returns:
            A number for each layer, none where the block has no transformers.
        """
        if not self.down_block_types[level].startswith(CROSS):
            return ()
        entry = self.level("transformer_layers_per_block", level)
        return self._for_layers("transformer_layers_per_block", level, entry, self.level("layers_per_block", level))

    def up_depths(self, i: int) -> tuple[int, ...]:
        """Return the number of transformer blocks behind each residual block of an up block.

        Args:
            i: The up block, 0 for the lowest resolution.

        Returns:
            A number for each layer, none where the block has no transformers.
        """
        if not self.up_block_types[i].startswith(CROSS):
            return ()
        level = len(self.block_out_channels) - 1 - i
        key, layers = "reverse_transformer_layers_per_block", self.level("layers_per_block", level) + 1
        if self.reverse_transformer_layers_per_block is not None:
            return self._for_layers(key, i, self.reverse_transformer_layers_per_block[i], layers)
        return self._for_layers(key, i, self.level("transformer_layers_per_block", level), layers)

    def _for_layers(self, key: str, i: int, entry: Depths, layers: int) -> tuple[int, ...]:
        if not isinstance(entry, tuple):
            return (entry,) * layers
        if len(entry) != layers:
            raise ConfigError(f"{key}[{i}]={shown(entry)}: the block has {layers} layers, which need a number each")
        return entry

    @property
    def mid_depth(self) -> int:
        """Number of transformer blocks of the mid block."""
        if self.mid_block_type != "UNetMidBlock2DCrossAttn":
            return 0
        entry: Depths = self.level("transformer_layers_per_block", len(self.block_out_channels) - 1)
        return entry[0] if isinstance(entry, tuple) else entry

    @property
    def context_channels(self) -> int | None:
        """Channels of the text states that the network is given; None for a network that reads no text."""
        levels = self._text_levels()
        if not levels:
            return None
        dim: int = self.level("cross_attention_dim", levels[0])
        return dim if self.encoder_hid_dim is None else self.encoder_hid_dim

    @property
    def temb_channels(self) -> int:
        """Width of the time embedding, the output of the time MLP."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    @property
    def num_classes(self) -> int | None:
        """Number of labels; None for a network without labels."""
        return None if self.class_embed_type is not None else self.num_class_embeds

    @property
    def stride(self) -> int:
        """Factor by which the network reduces the resolution, rounded up at each level."""
        return 1 << (len(self.block_out_channels) - 1)

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConditionConfig:
        """Create a configuration from the contents of a diffusers ``config.json``.

        Args:
            config: The keys and values; keys that start with "_" are ignored. Other unknown keys are refused, unless
                ``_class_name`` is "UNet2DConditionModel": diffusers ignores them with a warning, and so does this.

        Returns:
            The configuration.

        Raises:
            ConfigError: If a key is unknown or its value is not supported; the message names the key.
        """
        return cls(**known_fields(cls, config, "UNet2DConditionModel"))

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a diffusers ``config.json``.

        Returns:
            A dictionary that JSON can hold.
        """
        return {k: _listed(v) for k, v in dataclasses.asdict(self).items()}


def _listed(value: Any) -> Any:
    return [_listed(v) for v in value] if isinstance(value, tuple) else value


def _size(name: str, value: Any, **_: Any) -> int:
    return size(name, value, MAX_SIZE)


def _layers(name: str, value: Any, **_: Any) -> int:
    return size(name, value, MAX_LAYERS)


def _depth(name: str, value: Any) -> int:
    return whole(name, value, 0, MAX_DEPTH, error=ConfigError)
