"""Pipelines of diffusers that draw latents from a text: which are supported, and their text encoder and autoencoder.

Files are read by `fastdiff.checkpoints.reading`, weights from safetensors alone. The package transformers contributes
the classes of the text encoder and its tokenizer; no code of a folder is run, and nothing is downloaded.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastdiff.checkpoints.captions import check_weights
from fastdiff.checkpoints.fitting import fit
from fastdiff.checkpoints.folders import naming, read_weights
from fastdiff.checkpoints.reading import read_json, read_safetensors, read_sharded
from fastdiff.checks import boolean, number, shown
from fastdiff.errors import BackendError, CheckpointError, ConfigError
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.diffusers import scheduler_name
from fastdiff.text.clip import ClipEncoder, ClipPair
from fastdiff.unet import UNetConditionConfig
from fastdiff.unet.condition_config import SIZES
from fastdiff.unet.decoder import DecoderConfig
from fastdiff.unet.latents import LatentDecoder

INDEX = "model_index.json"
TOKENIZERS = ("CLIPTokenizer", "CLIPTokenizerFast")
# The parts that are read, and the classes that each of them may be of.
PARTS = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": TOKENIZERS,
}
PARTS_XL = {**PARTS, "text_encoder_2": ("CLIPTextModelWithProjection",), "tokenizer_2": TOKENIZERS}
PIPELINES = {
    "StableDiffusionPipeline": PARTS,
    "StableDiffusionImg2ImgPipeline": PARTS,
    "StableDiffusionXLPipeline": PARTS_XL,
}
SCALING_FACTOR = 0.18215  # of an AutoencoderKL whose configuration has none
ENCODER_WEIGHTS = "model.safetensors"


def reads_text(path: Path) -> bool:
    """Return whether a folder is that of a pipeline whose network reads a text, or which has no U-Net at all."""
    if not (path / INDEX).is_file():
        return False
    index = read_json(path / INDEX)
    if "unet" not in index:
        return "transformer" in index
    return _class_of(index, "unet") == "UNet2DConditionModel"


def _class_of(index: dict[str, Any], part: str) -> str | None:
    """Return the class of a pipeline's part; None where it has no such part."""
    entry = index.get(part)
    name = entry[-1] if isinstance(entry, list) and entry else None
    return name if isinstance(name, str) else None


def check_pipeline(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Raise `ConfigError` unless a pipeline is one that a Sampler draws.

    The result is the contents of its index, and the list of its parts that a Sampler does not run.
    """
    index = read_json(path / INDEX)
    kind = index.get("_class_name")
    if not isinstance(kind, str) or kind not in PIPELINES:
        known = [name for name in PIPELINES if "Img2Img" not in name]
        raise ConfigError(
            f"{path}: a pipeline of class {shown(kind)} is not supported; a {' or a '.join(known)} is, and so are "
            "pipelines of a UNet2DModel. fastdiff.accelerate(pipeline) runs the U-Nets of diffusers' own pipelines"
        )
    needed = PIPELINES[kind]
    for part, allowed in needed.items():
        found = _class_of(index, part)
        if found not in allowed:
            has = f"has no {part}" if found is None else f"has {shown(found)} as its {part}"
            hint = "; Sampler(unet, text_encoder=T5Encoder(...)) takes one" if found == "T5EncoderModel" else ""
            raise ConfigError(f"{path / INDEX}: the {kind} {has}; {' or '.join(allowed)} is needed{hint}")
    parts = {key for key, entry in index.items() if not key.startswith("_") and isinstance(entry, list) and any(entry)}
    return index, sorted(parts - {*needed, "scheduler", "feature_extractor"})


def outdated_options(scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of a scheduler that Stable Diffusion's pipelines replace, with the values in their place."""
    defaults = DEFAULTS[scheduler_name(scheduler)]
    wanted = {"clip_sample": False, "steps_offset": 1}
    return {k: v for k, v in wanted.items() if k in defaults and scheduler.get(k, defaults[k]) != v}


def check_network(
    path: Path, config: UNetConditionConfig, autoencoder: LatentDecoder, encoder: ClipEncoder | ClipPair
) -> None:
    """Raise `ConfigError` for networks that need more than latents and a text, or texts of other encoders."""
    latents = autoencoder.config.latent_channels
    if config.in_channels != latents or config.out_channels != latents:
        raise ConfigError(
            f"{path}: the network takes {config.in_channels} channels and gives {config.out_channels}, the latents of "
            f"the autoencoder have {latents}: a Sampler has nothing for the others, such as the masked image of an "
            "inpainting model. fastdiff.accelerate(pipeline) runs it in diffusers' own pipeline"
        )
    if encoder.channels != config.context_channels:
        raise ConfigError(
            f"{path}: the text encoder gives states of {encoder.channels} channels, the network reads "
            f"{config.context_channels}"
        )
    pair, added = isinstance(encoder, ClipPair), config.addition_embed_type
    if pair != (added == "text_time"):
        raise ConfigError(
            f"{path}: addition_embed_type={added!r} of the network does not suit the pipeline, which has "
            f"{'two text encoders' if pair else 'one text encoder'}"
        )
    if isinstance(encoder, ClipPair):
        assert config.addition_time_embed_dim is not None  # UNetConditionConfig ensures this
        width = encoder.pooled_channels + SIZES * config.addition_time_embed_dim
        if width != config.projection_class_embeddings_input_dim:
            raise ConfigError(
                f"{path}: the second text encoder's vector has {encoder.pooled_channels} numbers, which gives {width} "
                f"with {SIZES} sizes; the network takes {config.projection_class_embeddings_input_dim}"
            )
    if config.time_cond_proj_dim is not None:
        raise ConfigError(
            f"{path}: the network takes an embedding of the guidance (time_cond_proj_dim), which a Sampler does not "
            "give it; fastdiff.accelerate(pipeline) runs it in diffusers' own pipeline"
        )


def read_text_encoder(path: Path, variant: str | None, index: Mapping[str, Any]) -> ClipEncoder | ClipPair:
    """Read the text encoder of a pipeline's folder, or both of Stable Diffusion XL, in float32, on the CPU."""
    try:
        from transformers import CLIPTextModel, CLIPTextModelWithProjection
    except ImportError as e:
        raise BackendError(
            f"{path}: its text encoder needs the package transformers, which is not installed: "
            "pip install 'fastdiff[text]'"
        ) from e
    first = _read_clip(path, variant, "", CLIPTextModel)
    if "text_encoder_2" not in PIPELINES[index["_class_name"]]:
        return first
    key = "force_zeros_for_empty_prompt"
    with naming(path / INDEX):
        zeros = boolean(key, index.get(key, True), error=ConfigError)
    second = _read_clip(path, variant, "_2", CLIPTextModelWithProjection)
    with naming(path / "text_encoder_2"):
        return ClipPair(first, second, zeros)


def _read_clip(path: Path, variant: str | None, end: str, kind: Any) -> ClipEncoder:
    """Read the encoder and the tokenizer in the folders whose names have this end, by a class of transformers."""
    from transformers import CLIPTextConfig, CLIPTokenizer

    folder, words = path / f"text_encoder{end}", path / f"tokenizer{end}"
    described = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        if described.get("model_type") not in ("clip_text_model", "clip"):
            raise ConfigError(f"model_type {shown(described.get('model_type'))} is not supported; clip_text_model is")
        try:
            known = {k: v for k, v in described.items() if k not in ("auto_map", "torch_dtype", "dtype")}
            with torch.device("meta"):
                model: Any = kind(CLIPTextConfig(**known)).float()
        except Exception as e:  # transformers raises errors of all kinds for values that it does not know
            raise ConfigError(f"transformers cannot build this text encoder: {type(e).__name__}: {e}") from e
    _load(model, folder, variant)
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(words), local_files_only=True)
    except Exception as e:
        raise CheckpointError(f"{words}: no tokenizer of CLIP: {type(e).__name__}: {e}") from e
    with naming(words):
        return ClipEncoder(model, tokenizer)


def _load(model: Any, folder: Path, variant: str | None) -> None:
    """Give a text encoder, which is on "meta", the weights in its folder."""
    name = _with_variant(folder, ENCODER_WEIGHTS, variant)
    index = folder / f"{name}.index.json"
    if not (folder / name).exists() and not index.exists():
        found = ", ".join(sorted(p.name for p in folder.iterdir())[:20])
        raise CheckpointError(f"{folder}: no {name}; a text encoder is read from safetensors only (found: {found})")
    where = index if index.exists() else folder / name
    tensors = read_sharded(index) if index.exists() else read_safetensors(folder / name)[0]
    names = set(model.state_dict())
    # Versions of transformers differ in this prefix, and in whether the constant positions are stored.
    prefix = "text_model."
    prefixed = any(name.startswith(prefix) for name in names)

    def name_of(key: str) -> str:
        bare = key.removeprefix(prefix)
        return f"{prefix}{bare}" if prefixed and bare not in names else bare

    tensors = {name_of(k): tensor for k, tensor in tensors.items() if not k.endswith("position_ids")}
    check_weights(model, tensors, where)
    model.to_empty(device="cpu")
    for name, buffer in model.named_buffers():
        if not name.endswith("position_ids"):
            raise ConfigError(f"{where}: the text encoder of this version of transformers has {name}, which is unknown")
        buffer.copy_(torch.arange(buffer.shape[-1], dtype=buffer.dtype, device="cpu").expand_as(buffer))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()}, strict=False)
    model.requires_grad_(False)


def _with_variant(folder: Path, name: str, variant: str | None) -> str:
    """Return the name of the variant's file; as in diffusers, parts that do not have the variant have their own."""
    if variant is None or re.fullmatch(r"[\w-]{1,60}", variant) is None:
        return name
    head, _, tail = name.rpartition(".")
    named = f"{head}.{variant}.{tail}"
    return named if any((folder / f"{named}{end}").exists() for end in ("", ".index.json")) else name


def read_autoencoder(path: Path, variant: str | None) -> LatentDecoder:
    """Read the decoder in ``vae/`` of a pipeline's folder, in float32, on the CPU, in evaluation mode."""
    folder = path / "vae"
    config = read_json(folder / "config.json")
    with naming(folder / "config.json"):
        name = config.get("_class_name", "AutoencoderKL")
        if name != "AutoencoderKL":
            raise ConfigError(f"_class_name {shown(name)} is not supported; AutoencoderKL is")
        for key in ("shift_factor", "latents_mean", "latents_std"):
            if config.get(key) is not None:
                raise ConfigError(f"{key}={shown(config[key])}: Stable Diffusion's latents are only scaled")
        scale = number("scaling_factor", config.get("scaling_factor", SCALING_FACTOR), above=0, error=ConfigError)
        quantised = boolean("use_post_quant_conv", config.get("use_post_quant_conv", True), error=ConfigError)
        described = DecoderConfig.from_dict(config)
        with torch.device("meta"):
            autoencoder = LatentDecoder(described, scale, quantised)
    own = "diffusion_pytorch_model.safetensors"
    has_variant = _with_variant(folder, own, variant) != own
    tensors, where = read_weights(folder, variant if has_variant else None, None)
    ours = {k: v for k, v in tensors.items() if k.startswith(("decoder.", "post_quant_conv."))}
    fitted = fit(autoencoder, ours, where, None, torch.float32, "decoder")
    autoencoder.to_empty(device="cpu").load_state_dict(fitted)
    return autoencoder.eval().requires_grad_(False)
