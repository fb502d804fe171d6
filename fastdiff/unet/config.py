"""Configuration of the U-Net, with the keys of diffusers' ``UNet2DModel`` and a few more."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping
from typing import Any, Literal

from fastdiff.checks import is_whole, number, shown, whole
from fastdiff.errors import ConfigError

log = logging.getLogger("fastdiff")

SKIP_DOWN_BLOCKS, SKIP_UP_BLOCKS = ("SkipDownBlock2D", "AttnSkipDownBlock2D"), ("SkipUpBlock2D", "AttnSkipUpBlock2D")
DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D", *SKIP_DOWN_BLOCKS)
UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D", *SKIP_UP_BLOCKS)
# Of blocks with a picture beside their maps: its channels, and the groups of the norms of their attentions.
PICTURE_CHANNELS, SKIP_NORM_GROUPS = 3, 32
CLASS_IMAGE = (None, "add", "multiply", "concat")
# The fields that all networks of a code base have in common and that differ from diffusers' defaults.
CONVENTIONS: dict[str, dict[str, Any]] = {
    "diffusers": {},
    # hojonathanho/diffusion and its ports to PyTorch (pesser, ermongroup): one head as wide as the map, GroupNorm with
    # eps 1e-6, the sinusoid [sin, cos] with its endpoint, stride-2 convolutions padded on the right and bottom only.
    "ho": {
        "attention_head_dim": None, "norm_eps": 1e-6, "downsample_padding": 0,
        "flip_sin_to_cos": False, "freq_shift": 1,
    },
    # openai/improved-diffusion and guided-diffusion: eps 1e-5, the sinusoid [cos, sin] without its endpoint, stride-2
    # convolutions padded on all sides.
    "openai": {"norm_eps": 1e-5, "flip_sin_to_cos": True, "freq_shift": 0, "downsample_padding": 1},
}  # fmt: skip
# Limits far beyond any real network, which bound the time and memory that an untrusted config.json can cost.
MAX_LEVELS, MAX_LAYERS, MAX_SIZE = 16, 16, 1 << 20
MAX_NUMBER = 1e18  # of a factor, a divisor or an epsilon: their products stay in the range of float32
OPTIONAL_SIZES = (
    "time_embedding_dim", "attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "num_class_embeds",
    "num_attention_heads", "sinusoid_dim",
)  # fmt: skip


@dataclasses.dataclass(frozen=True, slots=True)
class UNetConfig:
    """Configuration of a `UNet`.

    The names and defaults are those of diffusers' ``UNet2DModel``. The fields from ``null_label`` on are fastdiff's
    own; with their defaults, a network is one of diffusers. All sizes are from 1 to 2^20.

    Attributes:
        sample_size: Side of the images, or (height, width), with which the network was trained. It is only the default
            size of samples; None for no default.
        in_channels: Channels of the input.
        out_channels: Channels of the output; twice ``in_channels`` if the network predicts variances as well.
        center_input_sample: Whether the network maps its input from [0, 1] to [-1, 1] itself: x -> 2 x - 1.
        time_embedding_type: Embedding of timesteps: "positional", a sinusoid, or "fourier", random Fourier features of
            the logarithm of a noise level, by which the output is divided (NCSN++).
        time_embedding_dim: Width of the time embedding; None for 4 ``block_out_channels[0]``.
        freq_shift: Shift s of the sinusoid's frequencies 10000^(-i / (n - s)), i = 0 .. n - 1, with n half its width;
            0 <= s < n.
        flip_sin_to_cos: Whether the sinusoid is ordered [cos, sin], not [sin, cos].
        down_block_types: Type of the block of every level, from the highest resolution to the lowest: "DownBlock2D",
            "AttnDownBlock2D" (with attention), "ResnetDownsampleBlock2D" (a residual block halves the size), or
            "SkipDownBlock2D" and "AttnSkipDownBlock2D" (NCSN++), which need images of 3 channels.
        mid_block_type: "UNetMidBlock2D", or None for no block between the down and the up blocks.
        up_block_types: Type of the block of every level, from the lowest resolution to the highest: "UpBlock2D",
            "AttnUpBlock2D", "ResnetUpsampleBlock2D", "SkipUpBlock2D" or "AttnSkipUpBlock2D".
        block_out_channels: Channels of every level, 1 to 16 levels; multiples of ``norm_num_groups``.
        layers_per_block: Residual blocks of a down block, 1 to 16; up blocks have one more.
        mid_block_scale_factor: Divisor of the output, input + branch, of the mid block's residual blocks and attention;
            not 0.
        downsample_padding: 1 for stride-2 convolutions padded on all sides, 0 for padding on the right and bottom only.
        downsample_type: How blocks with attention halve the size: "conv", a convolution of stride 2, or "resnet", a
            residual block.
        upsample_type: How blocks with attention double the size: "conv", nearest-neighbour upsampling followed by a
            convolution, or "resnet".
        dropout: Dropout probability in residual blocks while training, 0 <= dropout < 1.
        act_fn: Activation function; "silu" and "swish" are two names of the only one supported.
        attention_head_dim: Channels of an attention head; None for one head. An attention has as many heads as fit into
            its channels, so that its projections are narrower than its input if a remainder is left, as in diffusers.
        norm_num_groups: Number of groups of all GroupNorm layers but the one that ``attn_norm_num_groups`` concerns,
            and those of blocks "...Skip...", which have a quarter of their channels, at most 32. None: as these, which
            the networks of such blocks alone can have.
        attn_norm_num_groups: Number of groups of the GroupNorm before the mid block's attention; None for
            ``norm_num_groups``, or for no norm if ``resnet_time_scale_shift`` is "scale_shift".
        norm_eps: The epsilon of all GroupNorm layers, positive.
        resnet_time_scale_shift: How the embedding enters a residual block: "default" adds it; "scale_shift" scales and
            shifts the normalised map by it (FiLM).
        add_attention: Whether the mid block has attention.
        class_embed_type: Class conditioning: None for labels (or for no classes), "timestep" for scalars embedded like
            timesteps, "identity" for vectors that are added to the time embedding.
        num_class_embeds: Number of labels, the null label included; None for a network without labels.
        num_train_timesteps: Number of timesteps of the training, in diffusers' networks that learn an embedding of
            timesteps; not used.
        null_label: The label for "no class", which must be the last, ``num_class_embeds - 1``. Training replaces
            labels by it at random, and classifier-free guidance evaluates it. None: the network cannot be guided.
        class_image: How a label enters the network: None adds its embedding to the time embedding. "add", "multiply"
            (by 1 + image) and "concat" instead combine the input with an image that an encoder network draws for the
            label; the time embedding then does not depend on the class.
        class_before_mlp: Whether the class is added to the sinusoid, before the time MLP, as a linear map of the
            one-hot label times sqrt(number of classes) (EDM's DDPM++). It requires a null label, whose vector is zero.
        num_attention_heads: Number of heads of every attention, which must divide its channels; ``attention_head_dim``
            is then ignored. None for heads of ``attention_head_dim`` channels.
        sinusoid_dim: Width of the sinusoid; None for ``block_out_channels[0]``. ADM-512 has another.
        timestep_scale: Factor on timesteps before the sinusoid, not 0; 1000 / T in improved-diffusion's networks with
            ``rescale_timesteps``.
        block_scale_factor: Divisor of the output of all other residual blocks and attentions, not 0; sqrt(2) in DDPM++.
        up_attention: Attention of an up block: "all" for one after every residual block, "last" for one after the last
            (DDPM++).
        resample_shortcut: Whether residual blocks that resample have a 1x1 convolution in their shortcut (DDPM++).
        padding_mode: Padding of the 3x3 convolutions: "zeros", or "circular" for images that can be put side by side
            without seams. The padding on the right and bottom only of ``downsample_padding=0`` is zeros in any case.
        unit_range: Whether a "fourier" network was trained on images in [0, 1], as NCSN++ was: its input, noise level
            and score are those of images in [-1, 1] all the same.

    Raises:
        ConfigError: If a value is not supported; the message names the key, the value and what is allowed.
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
    norm_num_groups: int | None = 32
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
    padding_mode: Literal["zeros", "circular"] = "zeros"
    unit_range: bool = False

    def __post_init__(self) -> None:
        for key in ("down_block_types", "up_block_types", "block_out_channels"):
            value = getattr(self, key)
            if not isinstance(value, (list, tuple)) or not 1 <= len(value) <= MAX_LEVELS:
                raise ConfigError(f"{key}={shown(value)}: a list of 1 to {MAX_LEVELS} entries is needed")
            object.__setattr__(self, key, tuple(value))
        self._check_whole_numbers()
        self._check_numbers()
        self._check_choices()
        self._check_blocks()
        self._check_skips()
        self._check_conditioning()

    def _check_whole_numbers(self) -> None:
        """Check all integers and replace NumPy's by Python's, which JSON can hold."""
        checked: dict[str, Any] = {}
        for key in ("in_channels", "out_channels", "layers_per_block", *OPTIONAL_SIZES):
            if getattr(self, key) is not None or key not in OPTIONAL_SIZES:
                checked[key] = size(key, getattr(self, key), MAX_LAYERS if key == "layers_per_block" else MAX_SIZE)
        widths = enumerate(self.block_out_channels)
        checked["block_out_channels"] = tuple(size(f"block_out_channels[{i}]", width) for i, width in widths)
        checked["sample_size"] = sample_size(self.sample_size)
        for key, value in checked.items():
            object.__setattr__(self, key, value)

    def _check_numbers(self) -> None:
        factors = ("mid_block_scale_factor", "block_scale_factor", "timestep_scale")
        for key in ("dropout", "norm_eps", "freq_shift", *factors):
            object.__setattr__(self, key, finite(key, getattr(self, key)))
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
            "time_embedding_type": ("positional", "fourier"),
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
            "padding_mode": ("zeros", "circular"),
            "unit_range": (False, True),
        }
        for key, allowed in choices.items():
            choice(key, getattr(self, key), allowed)

    def _check_blocks(self) -> None:
        n = len(self.block_out_channels)
        for key, allowed in (("down_block_types", DOWN_BLOCKS), ("up_block_types", UP_BLOCKS)):
            names = getattr(self, key)
            if len(names) != n:
                raise ConfigError(f"{key} has {len(names)} entries but block_out_channels has {n}; they must agree")
            for name in names:
                if not isinstance(name, str) or name not in allowed:
                    raise ConfigError(f"{key}: {shown(name)} is not supported; allowed: {', '.join(allowed)}")
        if self.norm_num_groups is None and not all("Skip" in k for k in self.down_block_types + self.up_block_types):
            raise ConfigError(
                "norm_num_groups=None: a number is needed, except where all blocks are of type ...Skip..."
            )
        for i, channels in enumerate(self.block_out_channels):
            if self.norm_num_groups is not None and channels % self.norm_num_groups:
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

    def _check_skips(self) -> None:
        """Check blocks with a picture beside their maps, which other blocks do not resample."""
        if self.unit_range and self.time_embedding_type != "fourier":
            raise ConfigError("unit_range=True needs time_embedding_type='fourier'")
        if self.sinusoid_dim is not None and self.time_embedding_type == "fourier":
            raise ConfigError(
                f"sinusoid_dim={self.sinusoid_dim} is for time_embedding_type='positional'; None is needed"
            )
        down, up = (["Skip" in kind for kind in kinds] for kinds in (self.down_block_types, self.up_block_types))
        if not any(down + up):
            return
        for key, value in (
            ("in_channels", PICTURE_CHANNELS), ("out_channels", PICTURE_CHANNELS), ("class_image", None),
            ("block_scale_factor", 1.0), ("up_attention", "all"), ("resample_shortcut", False),
            ("padding_mode", "zeros"),
        ):  # fmt: skip
            if getattr(self, key) != value:
                raise ConfigError(f"{key}={getattr(self, key)!r} with blocks of type ...Skip...: {value!r} is needed")
        # A picture is halved from the first level on, and doubled up to the last one.
        if sorted(down[:-1], reverse=True) != down[:-1] or sorted(up) != up:
            raise ConfigError(
                "blocks of type ...Skip... must come before others in down_block_types, and after them in "
                "up_block_types: the others do not resample the picture"
            )
        for channels, groups in self._skip_norms(down, up):
            if channels < 4 or channels % groups:
                raise ConfigError(
                    f"block_out_channels={list(self.block_out_channels)}: a norm of {groups} groups has {channels} "
                    "channels; blocks of type ...Skip... need multiples, such as multiples of 32"
                )

    def _skip_norms(self, down: list[bool], up: list[bool]) -> Iterator[tuple[int, int]]:
        """Yield the channels and the groups of the norms of blocks with a picture, and of the layers around them."""
        widths = self.block_out_channels
        last = len(widths) - 1
        if self.norm_num_groups is None:
            yield from ((c, skip_groups(c)) for c in (widths[0], widths[-1]))
        for i, skips in enumerate(down):
            if skips:
                yield from ((c, skip_groups(c)) for c in (widths[max(i - 1, 0)], widths[i]))
                if self.down_block_types[i].startswith("Attn"):
                    yield widths[i], SKIP_NORM_GROUPS
        for i, skips in enumerate(up):
            if not skips:
                continue
            attention = self.up_block_types[i].startswith("Attn")
            own, before, after = widths[last - i], widths[min(last - i + 1, last)], widths[max(last - i - 1, 0)]
            for a, skip in ((before, own), (own, own), (own, after)):
                yield a + skip, skip_groups(a + skip, of_skip=skip if attention else None)
            yield own, skip_groups(own)
            if attention:
                yield own, SKIP_NORM_GROUPS

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
                raise ConfigError(
                    f"null_label={shown(self.null_label)} needs num_class_embeds and class_embed_type=None"
                )
            last = self.num_class_embeds - 1
            if not is_whole(self.null_label) or self.null_label != last:
                raise ConfigError(
                    f"null_label={shown(self.null_label)} must be the last class, num_class_embeds - 1 = {last}"
                )
            object.__setattr__(self, "null_label", last)  # Python's int, even if NumPy's was given

    @property
    def num_classes(self) -> int | None:
        """Number of labels without the null label; None for a network without labels."""
        if self.num_class_embeds is None or self.class_embed_type is not None:
            return None
        return self.num_class_embeds - (self.null_label is not None)

    @property
    def conditional(self) -> bool:
        """Whether `UNet.forward` requires ``class_labels``."""
        return self.num_class_embeds is not None or self.class_embed_type is not None

    @property
    def stride(self) -> int:
        """Factor by which the network reduces the resolution; height and width of the input must be multiples of it."""
        return 1 << (len(self.block_out_channels) - 1)

    @property
    def sinusoid_channels(self) -> int:
        """Width of the sinusoidal embedding of timesteps, or of their Fourier features."""
        if self.time_embedding_type == "fourier":
            return 2 * self.block_out_channels[0]
        return self.sinusoid_dim or self.block_out_channels[0]

    @property
    def temb_channels(self) -> int:
        """Width of the time embedding, the output of the time MLP."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]

    def head_dim(self, channels: int) -> int:
        """Return the width of an attention head.

        Args:
            channels: Channels of the attention's input.

        Returns:
            Channels of each of its heads.
        """
        if self.num_attention_heads is not None:
            return channels // self.num_attention_heads
        return self.attention_head_dim or channels

    @property
    def diffusers_can_run(self) -> bool:
        """Whether diffusers' ``UNet2DModel`` can represent this network; it ignores ``null_label``."""
        return all(getattr(self, key) == default for key, default in OWN_FIELDS.items() if key != "null_label")

    @classmethod
    def like(cls, codebase: str, **fields: Any) -> UNetConfig:
        """Create a configuration that follows the conventions of a code base.

        Args:
            codebase: "diffusers", "ho" (the original DDPM and its ports to PyTorch) or "openai" (improved- and
                guided-diffusion). It determines norm_eps, flip_sin_to_cos, freq_shift, downsample_padding and, for
                "ho", attention_head_dim.
            **fields: All other fields; those that the code base determines can be overridden.

        Returns:
            The configuration.

        Raises:
            ConfigError: If the code base is unknown, or a field is not supported.
        """
        if not isinstance(codebase, str) or codebase not in CONVENTIONS:
            raise ConfigError(f"code base {shown(codebase)} is unknown; allowed: {', '.join(CONVENTIONS)}")
        return cls(**{**CONVENTIONS[codebase], **fields})

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Create a configuration from the contents of a diffusers ``config.json``.

        Args:
            config: The keys and values; keys that start with "_" are ignored. Other unknown keys are refused, unless
                ``_class_name`` is "UNet2DModel": diffusers ignores them with a warning, and so does this.

        Returns:
            The configuration.

        Raises:
            ConfigError: If a key is unknown or its value is not supported; the message names the key.
        """
        return cls(**known_fields(cls, config, "UNet2DModel"))

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of a diffusers ``config.json``.

        Returns:
            A dictionary that JSON can hold. fastdiff's own fields are included only if they differ from their defaults.
        """
        config = dataclasses.asdict(self)
        for key, default in OWN_FIELDS.items():
            if config[key] == default:
                del config[key]
        return {k: list(v) if isinstance(v, tuple) else v for k, v in config.items()}


# Parts that the configurations of all networks have in common ---------------------------------------------------------


def norm_groups(given: int | None, channels: int) -> int:
    """Return the groups of a norm outside of blocks "...Skip...": those given, or a quarter of its channels."""
    return skip_groups(channels) if given is None else given


def skip_groups(channels: int, of_skip: int | None = None) -> int:
    """Return the groups of a norm of a block "...Skip...": a quarter of its channels, at most 32.

    The first norms of "AttnSkipUpBlock2D" have, by the order of diffusers' operations, ``channels`` less three quarters
    of those that come from the way down (``of_skip``).
    """
    quarter = channels // 4 if of_skip is None else channels - of_skip + of_skip // 4
    return min(max(quarter, 1), SKIP_NORM_GROUPS)


def size(name: str, value: Any, most: int = MAX_SIZE) -> int:
    """Return a size as an int, or raise `ConfigError`."""
    return whole(name, value, 1, most, error=ConfigError)


def sample_size(value: Any) -> int | tuple[int, int] | None:
    """Return the side of images, or (height, width), or None as it is; raise `ConfigError` for anything else."""
    if value is None:
        return None
    sides = value if isinstance(value, (tuple, list)) else (value, value)
    if len(sides) != 2:
        raise ConfigError(f"sample_size={shown(value)}: a number or two (height, width) are allowed")
    height, width = size("sample_size height", sides[0]), size("sample_size width", sides[1])
    return (height, width) if isinstance(value, (tuple, list)) else height


def finite(name: str, value: Any) -> float:
    """Return a number that float32 holds with its square and inverse, or raise `ConfigError`."""
    checked = number(name, value, need="a finite number", error=ConfigError)
    if abs(checked) > MAX_NUMBER or 0.0 < abs(checked) < 1.0 / MAX_NUMBER:
        raise ConfigError(f"{name}={shown(value)}: it is beyond what float32 holds with its squares")
    return value if type(value) in (int, float) else checked


def choice(name: str, value: Any, allowed: tuple[Any, ...]) -> None:
    """Raise `ConfigError` if a value is none of those allowed; True, 1 and 1.0 are different."""
    if not any(type(value) is type(a) and value == a for a in allowed):
        raise ConfigError(f"{name}={shown(value)} is not supported; allowed: {', '.join(map(repr, allowed))}")


def known_fields(cls: type[Any], config: Mapping[str, Any], class_name: str) -> dict[str, Any]:
    """Return the fields of a configuration's class that the contents of a ``config.json`` have.

    Keys that start with "_" are ignored. Other unknown keys are refused, unless ``_class_name`` is ``class_name``, a
    network of diffusers, which ignores them with a warning.
    """
    if not isinstance(config, Mapping):
        raise ConfigError(f"a U-Net configuration is an object with keys, not {type(config).__name__}")
    known = {f.name for f in dataclasses.fields(cls)}
    if not all(isinstance(key, str) for key in config):
        raise ConfigError(f"the keys of a U-Net configuration are texts: {shown(list(config))}")
    unknown = sorted(k for k in config if k not in known and not k.startswith("_"))
    if unknown and config.get("_class_name") == class_name:
        log.warning("unknown keys of a %s are ignored, as in diffusers: %s", class_name, ", ".join(map(shown, unknown)))
    elif unknown:
        names = ", ".join(shown(key)[1:-1] for key in unknown[:20])
        raise ConfigError(f"unknown U-Net configuration keys: {names}; allowed: {', '.join(sorted(known))}")
    return {k: v for k, v in config.items() if k in known}


# The fields that diffusers does not have, with their defaults, which describe a network of diffusers.
OWN_FIELDS: dict[str, Any] = {
    f.name: f.default
    for f in dataclasses.fields(UNetConfig)
    if f.name
    in (
        "null_label", "class_image", "num_attention_heads", "sinusoid_dim", "timestep_scale", "block_scale_factor",
        "up_attention", "resample_shortcut", "class_before_mlp", "padding_mode", "unit_range",
    )
}  # fmt: skip
