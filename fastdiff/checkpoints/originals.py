"""Configurations for files of the original code bases, derived from their flags and their tensors' names and shapes.

OpenAI's files contain no configuration; their READMEs list the flags, which the user passes, or the name of a preset
with these flags. In the other layouts the tensors determine everything except the image size.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from fastdiff.checkpoints.layouts import FIXED
from fastdiff.checks import is_whole, one_of, shown
from fastdiff.errors import CheckpointError, ConfigError
from fastdiff.unet.config import MAX_LAYERS, MAX_LEVELS, UNetConfig

_ADM = "--attention_resolutions 32,16,8 --diffusion_steps 1000 --learn_sigma True --num_channels 256 "
_ADM += "--num_res_blocks 2 --resblock_updown True --use_scale_shift_norm True --noise_schedule linear "
# The default of rescale_timesteps is True in improved-diffusion and False in guided-diffusion, so presets give it.
_IMPROVED = "--num_res_blocks 3 --learn_sigma True --diffusion_steps 4000 --noise_schedule cosine "

# Flags of the published models, from the READMEs of openai/guided-diffusion and openai/improved-diffusion; those that
# do not change a sample are left out. The original DDPM: Ho et al. 2020, appendix B.
PRESETS = {
    "adm-imagenet-64": "--attention_resolutions 32,16,8 --class_cond True --diffusion_steps 1000 --dropout 0.1 "
    "--image_size 64 --learn_sigma True --noise_schedule cosine --num_channels 192 --num_head_channels 64 "
    "--num_res_blocks 3 --resblock_updown True --use_new_attention_order True --use_scale_shift_norm True",
    "adm-imagenet-128": _ADM + "--class_cond True --image_size 128 --num_heads 4",
    "adm-imagenet-256": _ADM + "--class_cond True --image_size 256 --num_head_channels 64",
    "adm-imagenet-256-uncond": _ADM + "--class_cond False --image_size 256 --num_head_channels 64",
    "adm-imagenet-512": _ADM + "--class_cond True --image_size 512 --num_head_channels 64",
    "adm-lsun-256": _ADM + "--class_cond False --image_size 256 --num_head_channels 64 --dropout 0.1",
    "improved-imagenet-64": _IMPROVED + "--image_size 64 --num_channels 128 --rescale_timesteps True",
    "improved-imagenet-64-cond": _IMPROVED
    + "--image_size 64 --num_channels 192 --class_cond True --rescale_timesteps False",
    "improved-cifar10": _IMPROVED + "--image_size 32 --num_channels 128 --dropout 0.3 --rescale_timesteps True",
    "improved-lsun-256": "--image_size 256 --num_channels 128 --num_res_blocks 2 --num_heads 1 --learn_sigma True "
    "--use_scale_shift_norm False --attention_resolutions 16 --diffusion_steps 1000 --noise_schedule linear "
    "--rescale_timesteps False",
    "ddpm-cifar10-32": "--image_size 32 --dropout 0.1",
    "ddpm-celebahq-256": "--image_size 256 --sigma_small True",
    "ddpm-lsun-256": "--image_size 256 --sigma_small True",
}

# The defaults of the flags in both of OpenAI's code bases. They differ in rescale_timesteps, which has no default here.
OPENAI_FLAGS: dict[str, Any] = {
    "image_size": 64, "num_channels": 128, "num_res_blocks": 2, "num_heads": 4, "num_heads_upsample": -1,
    "num_head_channels": -1, "attention_resolutions": "16,8", "channel_mult": "", "dropout": 0.0, "class_cond": False,
    "use_scale_shift_norm": True, "resblock_updown": False, "use_new_attention_order": False, "learn_sigma": False,
    "sigma_small": False, "diffusion_steps": 1000, "noise_schedule": "linear", "predict_xstart": False,
}  # fmt: skip
DDPM_FLAGS: dict[str, Any] = {"image_size": 0, "dropout": 0.0, "sigma_small": False}
# Flags that concern the training or the sampling, not the model.
IGNORED = ("use_fp16", "use_checkpoint", "use_kl", "rescale_learned_sigmas", "timestep_respacing")
CHANNEL_MULT = {
    512: "0.5,1,1,2,2,4,4", 256: "1,1,2,2,4,4", 128: "1,1,2,3,4", 64: "1,2,3,4", 32: "1,2,2,2",
}  # fmt: skip
# Tensors without effect on samples: edm maps the augmentation of training images, which is zero when sampling.
UNUSED = ("map_augment.weight",)


@dataclasses.dataclass(frozen=True)
class Original:
    """Description of a file of an original code base."""

    layout: str  # one of `layouts.LAYOUTS`
    config: UNetConfig
    scheduler: dict[str, Any]  # a diffusers scheduler configuration
    left_out: tuple[str, ...] = ()  # names of the file's tensors that do not affect samples


def layout_of(tensors: Mapping[str, Tensor]) -> str | None:
    """Recognise the family of layouts by the tensors' names: "ddpm", "openai", "edm", or None for any other names."""
    names = {"ddpm": "temb.dense.0.weight", "openai": "time_embed.0.weight", "edm": "map_layer0.weight"}
    return next((family for family, name in names.items() if name in tensors), None)


def describe(
    tensors: Mapping[str, Tensor], where: object, preset: str | None, flags: str | Mapping[str, Any] | None
) -> Original:
    """Derive the network and the scheduler from names and shapes of tensors, and from a preset or flags (see `load`).

    Raises `ConfigError` for flags that are unknown or out of range, and `CheckpointError` if flags are missing or the
    tensors are of no known network.
    """
    if preset is not None and flags is not None:
        raise ConfigError("preset and flags both say what the network is; give one")
    if preset is not None:
        flags = PRESETS[one_of("preset", preset, PRESETS, error=ConfigError)]
    family = layout_of(tensors)
    if family == "openai":
        if flags is None:
            raise CheckpointError(
                f"{where}: OpenAI's files carry no configuration; give flags= (of the README or the training run, "
                f"'--image_size 64 --num_channels 128 ...') or preset=, one of {', '.join(PRESETS)} "
                "(`fastdiff convert` takes both)"
            )
        return _openai(tensors, parse_flags(flags, {**OPENAI_FLAGS, "rescale_timesteps": None}))
    if family == "ddpm":
        return _ddpm(tensors, where, parse_flags(flags or "", DDPM_FLAGS))
    if family == "edm":
        parse_flags(flags or "", {})
        return _edm(tensors, where)
    names = ", ".join(sorted(tensors)[:5])
    raise CheckpointError(
        f"{where} holds no configuration, and its tensors ({names}, ...) are not those of DDPM, OpenAI's or EDM's "
        "code base; put the U-Net's config.json beside it"
    )


def parse_flags(flags: str | Mapping[str, Any], defaults: Mapping[str, Any]) -> dict[str, Any]:
    """Merge flags, a command line or a mapping, into ``defaults``, each converted to its default's type.

    A default of None stands for a flag that is True or False and has no default.
    """
    if isinstance(flags, str):
        words = flags.replace("=", " ").split()
        if len(words) % 2 or not all(word.startswith("--") for word in words[::2]):
            raise ConfigError(f"flags={shown(flags)}: '--name value --name value ...' is needed")
        flags = {name[2:]: value for name, value in zip(words[::2], words[1::2], strict=True)}
    result = dict(defaults)
    for name, value in flags.items():
        if name in IGNORED and "image_size" in defaults:
            continue
        if name not in defaults:
            raise ConfigError(f"flag {shown(name)} is unknown for this file; allowed: {', '.join(defaults) or 'none'}")
        result[name] = _flag(name, value, defaults[name])
    return result


def _flag(name: str, value: Any, default: Any) -> Any:
    if default is None or isinstance(default, bool):
        words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
        if str(value).lower() not in words:
            raise ConfigError(f"flag {name}={shown(value)}: True or False is needed")
        return words[str(value).lower()]
    try:
        return type(default)(value)
    except (TypeError, ValueError, OverflowError) as e:
        raise ConfigError(f"flag {name}={shown(value)}: a value like {default!r} is needed") from e


def _blocks(attention: list[bool], *, resnet: bool) -> dict[str, Any]:
    """Return the fields of `UNetConfig` for blocks with and without attention, resampled by residual blocks or not.

    ``attention`` is given per level, from the highest resolution to the lowest.
    """
    down, up = ("ResnetDownsampleBlock2D", "ResnetUpsampleBlock2D") if resnet else ("DownBlock2D", "UpBlock2D")
    return {
        "down_block_types": tuple("AttnDownBlock2D" if a else down for a in attention),
        "up_block_types": tuple("AttnUpBlock2D" if a else up for a in reversed(attention)),
        "downsample_type": "resnet" if resnet else "conv",
        "upsample_type": "resnet" if resnet else "conv",
    }


# OpenAI ---------------------------------------------------------------------------------------------------------------


def _openai(tensors: Mapping[str, Tensor], flags: Mapping[str, Any]) -> Original:
    """Follow ``script_util.create_model_and_diffusion`` of improved- and guided-diffusion."""
    size, channels = flags["image_size"], flags["num_channels"]
    if flags["channel_mult"] == "" and size not in CHANNEL_MULT:
        raise ConfigError(f"image_size={size}: no channel_mult is known for it; give the flag")
    factors = _numbers("channel_mult", flags["channel_mult"] or CHANNEL_MULT[size], float)
    widths = tuple(int(channels * factor) for factor in factors)
    resolutions = _numbers("attention_resolutions", flags["attention_resolutions"], int)
    if min(resolutions) < 1:
        raise ConfigError(f"attention_resolutions={flags['attention_resolutions']}: numbers from 1 on are needed")
    factors_down = {size // resolution for resolution in resolutions}
    attention = [2**level in factors_down for level in range(len(widths))]
    attended = {width for width, has in zip(widths, [*attention[:-1], True], strict=True) if has}
    labels = tensors.get("label_emb.weight")
    classes = 1000 if labels is None or labels.ndim != 2 else labels.shape[0]
    config = UNetConfig(
        **{**FIXED["openai"], **_heads(flags, attended), **_blocks(attention, resnet=flags["resblock_updown"])},
        sample_size=size,
        out_channels=6 if flags["learn_sigma"] else 3,
        block_out_channels=widths,
        layers_per_block=flags["num_res_blocks"],
        dropout=flags["dropout"],
        resnet_time_scale_shift="scale_shift" if flags["use_scale_shift_norm"] else "default",
        attn_norm_num_groups=32 if flags["use_scale_shift_norm"] else None,
        num_class_embeds=classes if flags["class_cond"] else None,
        # The widths of the sinusoid and its MLP derive from num_channels; the first block of ADM-512 has half of it.
        sinusoid_dim=None if widths[0] == channels else channels,
        time_embedding_dim=None if widths[0] == channels else 4 * channels,
        timestep_scale=_timestep_scale(flags),
    )
    layout = "openai-new" if flags["use_new_attention_order"] else "openai"
    return Original(layout, config, _openai_scheduler(flags))


def _heads(flags: Mapping[str, Any], widths: set[int]) -> dict[str, Any]:
    """Return the fields of `UNetConfig` for the heads of attentions on maps of these widths.

    The channels per head are preferred, because diffusers knows no number of heads.
    """
    heads, channels = flags["num_heads"], flags["num_head_channels"]
    if channels == -1 and flags["num_heads_upsample"] not in (-1, heads):
        raise ConfigError(
            f"num_heads_upsample={flags['num_heads_upsample']}: another number of heads in the up blocks is not "
            "supported; -1 is"
        )
    name = "num_heads" if channels == -1 else "num_head_channels"
    for width in sorted(widths):
        if flags[name] < 1 or width % flags[name]:
            raise ConfigError(f"{name}={flags[name]} does not divide the {width} channels of an attention")
    if channels != -1:
        return {"attention_head_dim": channels}
    if heads == 1:
        return {"attention_head_dim": None}
    if len(widths) == 1:
        return {"attention_head_dim": min(widths) // heads}
    return {"num_attention_heads": heads}


def _timestep_scale(flags: Mapping[str, Any]) -> float:
    """Return the factor on timesteps: 1000 / T if the network was trained with rescale_timesteps, else 1."""
    T = flags["diffusion_steps"]
    if T < 1:
        raise ConfigError(f"diffusion_steps={T}: at least 1 is needed")
    if T == 1000:
        return 1.0
    if flags["rescale_timesteps"] is None:
        raise ConfigError(
            f"diffusion_steps={T} needs the flag rescale_timesteps: improved-diffusion's default is True, "
            "guided-diffusion's is False"
        )
    return 1000.0 / T if flags["rescale_timesteps"] else 1.0


def _openai_scheduler(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Follow ``gaussian_diffusion.get_named_beta_schedule``; its linear betas have the same sum for every T."""
    kinds = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
    kind = kinds[one_of("noise_schedule", flags["noise_schedule"], kinds, error=ConfigError)]
    scale = 1000 / flags["diffusion_steps"]
    variance = "learned_range" if flags["learn_sigma"] else "fixed_small" if flags["sigma_small"] else "fixed_large"
    return {
        **_DDPM_SCHEDULER,
        "num_train_timesteps": flags["diffusion_steps"],
        "beta_schedule": kind,
        "beta_start": scale * 1e-4,
        "beta_end": scale * 0.02,
        "variance_type": variance,
        "prediction_type": "sample" if flags["predict_xstart"] else "epsilon",
        "timestep_spacing": "linspace",
    }


_DDPM_SCHEDULER = {
    "_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_schedule": "linear", "beta_start": 1e-4,
    "beta_end": 0.02, "prediction_type": "epsilon", "clip_sample": True, "clip_sample_range": 1.0,
}  # fmt: skip


def _numbers(name: str, text: str, kind: type[int] | type[float]) -> list[Any]:
    try:
        values = [kind(part) for part in text.split(",")]
    except ValueError as e:
        raise ConfigError(f"{name}={text!r}: numbers separated by commas are needed") from e
    if len(values) > MAX_LEVELS or any(not 0 < v < 1 << 20 for v in values):
        raise ConfigError(f"{name}={text!r}: at most {MAX_LEVELS} positive numbers are needed")
    return values


# The original DDPM ----------------------------------------------------------------------------------------------------


def _ddpm(tensors: Mapping[str, Tensor], where: object, flags: Mapping[str, Any]) -> Original:
    """Derive the arguments of pesser's and ermongroup's ``Model(ch, out_ch, ch_mult, num_res_blocks, ...)``."""
    levels = _count(tensors, "down.{}.block.0.conv1.weight", MAX_LEVELS)
    widths = tuple(_side(tensors, where, f"down.{i}.block.0.conv1.weight", 0) for i in range(levels))
    first = _side(tensors, where, "conv_in.weight", 0)
    if not widths or widths[0] != first:
        raise CheckpointError(
            f"{where}: conv_in makes {first} channels and the first block {widths[:1]}: ch_mult must begin with 1"
        )
    attention = [f"down.{i}.attn.0.q.weight" in tensors for i in range(levels)]
    scheduler = {**_DDPM_SCHEDULER, "variance_type": "fixed_small" if flags["sigma_small"] else "fixed_large"}
    config = UNetConfig(
        **FIXED["ddpm"],
        **_blocks(attention, resnet=False),
        sample_size=flags["image_size"] or None,
        in_channels=_side(tensors, where, "conv_in.weight", 1),
        out_channels=_side(tensors, where, "conv_out.weight", 0),
        block_out_channels=widths,
        layers_per_block=_count(tensors, "down.0.block.{}.conv1.weight", MAX_LAYERS),
        dropout=flags["dropout"],
    )
    return Original("ddpm", config, scheduler)


def _count(tensors: Mapping[str, Tensor], name: str, most: int) -> int:
    """Count the consecutive tensors called ``name`` with 0, 1, ... inserted, up to ``most + 1``."""
    return next((i for i in range(most + 1) if name.format(i) not in tensors), most + 1)


def _side(tensors: Mapping[str, Tensor], where: object, name: str, axis: int) -> int:
    """Return the size of a tensor along an axis; raise `CheckpointError` if there is no such tensor or axis."""
    if name not in tensors:
        raise CheckpointError(f"{where}: missing: {name}, which tells the network's shape")
    if tensors[name].ndim <= axis:
        raise CheckpointError(f"{where}: shape: {name} is {tuple(tensors[name].shape)}, which tells no width")
    return tensors[name].shape[axis]


# EDM's DDPM++ ---------------------------------------------------------------------------------------------------------


def _edm(tensors: Mapping[str, Tensor], where: object) -> Original:
    """Derive the arguments of NVlabs/edm's ``SongUNet`` with the options of DDPM++; NCSN++ is refused."""
    if "map_noise.freqs" in tensors:
        raise CheckpointError(f"{where}: NCSN++ (map_noise.freqs) is not supported; EDM's DDPM++ is")
    if any("_aux_" in name and not re.match(r"dec\.\d+x\d+_aux_(norm|conv)\.", name) for name in tensors):
        raise CheckpointError(f"{where}: NCSN++ (tensors named aux) is not supported; EDM's DDPM++ is")
    inputs = [m for name in tensors if (m := re.fullmatch(r"enc\.(\d{1,5})x\1_conv\.weight", name))]
    if len(inputs) != 1:
        raise CheckpointError(f"{where}: one tensor enc.<size>x<size>_conv.weight is needed, it has {len(inputs)}")
    size, conv_in = int(inputs[0][1]), inputs[0][0]
    levels = 0
    while f"enc.{size >> levels}x{size >> levels}_block0.conv1.weight" in tensors and levels <= MAX_LEVELS:
        levels += 1
    sides = [size >> level for level in range(levels)]
    widths = tuple(_side(tensors, where, f"enc.{side}x{side}_block0.conv1.weight", 0) for side in sides)
    first, sinusoid = _side(tensors, where, conv_in, 0), _side(tensors, where, "map_layer0.weight", 1)
    if not widths or widths[0] != first:
        raise CheckpointError(
            f"{where}: the first convolution makes {first} channels and the first block {widths[:1]}: channel_mult must"
            " begin with 1"
        )
    groups = {min(32, width // 4) for width in widths}
    if len(groups) != 1:
        raise CheckpointError(f"{where}: {sorted(groups)} groups of GroupNorm at different levels are not supported")
    attention = [f"enc.{side}x{side}_block0.qkv.weight" in tensors for side in sides]
    features = _side(tensors, where, "map_layer0.weight", 0)
    classes = _side(tensors, where, "map_label.weight", 1) if "map_label.weight" in tensors else None
    config = UNetConfig(
        **FIXED["edm"],
        **_blocks(attention, resnet=True),
        # Their label vector is zero for an image without a class; here that is one more label, the null label.
        num_class_embeds=None if classes is None else classes + 1,
        null_label=classes,
        class_before_mlp=classes is not None,
        sample_size=size,
        in_channels=_side(tensors, where, conv_in, 1),
        out_channels=_side(tensors, where, f"dec.{size}x{size}_aux_conv.weight", 0),
        block_out_channels=widths,
        layers_per_block=_count(tensors, f"enc.{size}x{size}_block{{}}.conv1.weight", MAX_LAYERS),
        norm_num_groups=groups.pop(),
        sinusoid_dim=None if sinusoid == first else sinusoid,
        time_embedding_dim=None if features == 4 * first else features,
    )
    # The network computes the F of EDM's preconditioning, which diffusers' EDM schedulers call "epsilon"; the noise
    # levels are those of Karras et al. 2022, table 1.
    scheduler = {
        "_class_name": "EDMEulerScheduler", "prediction_type": "epsilon",
        "sigma_min": 0.002, "sigma_max": 80.0, "sigma_data": 0.5, "rho": 7.0,
    }  # fmt: skip
    return Original("edm", config, scheduler, tuple(name for name in UNUSED if name in tensors))


# Early diffusers ------------------------------------------------------------------------------------------------------


def old_unet_config(config: Mapping[str, Any]) -> UNetConfig:
    """Convert the configuration of a ``UNetModel`` of diffusers 0.0.x: the original DDPM's constructor arguments."""
    names = ("ch", "out_ch", "ch_mult", "num_res_blocks", "attn_resolutions", "in_channels", "resolution")
    allowed = (*names, "dropout", "resamp_with_conv")
    unknown = sorted(k for k in config if k not in allowed and not k.startswith("_"))
    missing = [k for k in names if k not in config]
    if unknown or missing:
        raise ConfigError(
            f"_class_name 'UNetModel' with {', '.join(unknown) or 'no'} unknown keys and without "
            f"{', '.join(missing) or 'none of its own'}; only the schema {', '.join(allowed)} is supported"
        )
    if config.get("resamp_with_conv", True) is not True:
        raise ConfigError(f"resamp_with_conv={config['resamp_with_conv']!r} is not supported; True is")
    for key in names:
        values = config[key] if key in ("ch_mult", "attn_resolutions") else [config[key]]
        if not isinstance(values, list) or not all(is_whole(v) and 0 < v < 1 << 20 for v in values):
            raise ConfigError(f"{key}={config[key]!r}: positive whole numbers are needed")
    if not 1 <= len(config["ch_mult"]) <= MAX_LEVELS or config["ch_mult"][0] != 1:
        raise ConfigError(
            f"ch_mult={config['ch_mult']!r}: a list of 1 to {MAX_LEVELS} numbers that begins with 1 is needed"
        )
    levels = range(len(config["ch_mult"]))
    attention = [config["resolution"] >> level in config["attn_resolutions"] for level in levels]
    return UNetConfig(
        **FIXED["ddpm"],
        **_blocks(attention, resnet=False),
        sample_size=config["resolution"],
        in_channels=config["in_channels"],
        out_channels=config["out_ch"],
        block_out_channels=tuple(config["ch"] * factor for factor in config["ch_mult"]),
        layers_per_block=config["num_res_blocks"],
        dropout=config.get("dropout", 0.0),
    )


def modern_scheduler(config: Mapping[str, Any]) -> dict[str, Any]:
    """Replace the keys of a diffusers 0.0.x scheduler configuration, such as ``timesteps``, by today's."""
    result = dict(config)
    if config.get("_class_name") == "GaussianDDPMScheduler":
        allowed = ("timesteps", "beta_start", "beta_end", "beta_schedule", "variance_type", "clip_predicted_image")
        unknown = sorted(k for k in config if k not in allowed and not k.startswith("_"))
        if unknown:
            raise ConfigError(
                f"GaussianDDPMScheduler with {', '.join(unknown)} is not supported; allowed: {', '.join(allowed)}"
            )
        result["_class_name"] = "DDPMScheduler"
        result["clip_sample"] = result.pop("clip_predicted_image", True)
    if "timesteps" in result:
        steps = result.pop("timesteps")
        if result.setdefault("num_train_timesteps", steps) != steps:
            raise ConfigError(f"timesteps={steps!r} and num_train_timesteps={result['num_train_timesteps']!r} differ")
    return result
