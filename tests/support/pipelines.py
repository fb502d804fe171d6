"""Small pipelines of Stable Diffusion with random weights, whose images depend strongly on the prompt."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from fastdiff.unet import UNetCondition
from tests.support.conditions import config, diffusers_condition, random_condition
from tests.support.unets import randomize_

WIDTH = 32  # of a text's states
WORDS = ("dog", "cat", "red", "sea", "a")
SCHEDULE: dict[str, Any] = {
    "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1,
    "set_alpha_to_one": False, "clip_sample": False,
}  # fmt: skip
VAE: dict[str, Any] = {
    "block_out_channels": (16, 32),
    "down_block_types": ("DownEncoderBlock2D",) * 2,
    "up_block_types": ("UpDecoderBlock2D",) * 2,
    "norm_num_groups": 4,
    "sample_size": 16,
}
# The changes of `tests.support.conditions.TINY` for each kind of network.
NETWORKS: dict[str, dict[str, Any]] = {
    "sd1": {"cross_attention_dim": WIDTH},
    "sd2": {"cross_attention_dim": WIDTH, "attention_head_dim": (1, 2), "use_linear_projection": True},
    "inpaint": {"cross_attention_dim": WIDTH, "in_channels": 9},
    "lcm": {"cross_attention_dim": WIDTH, "time_cond_proj_dim": 16},
    "sdxl": {
        "cross_attention_dim": 2 * WIDTH, "attention_head_dim": (1, 2), "use_linear_projection": True,
        "transformer_layers_per_block": (1, 2), "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
        "projection_class_embeddings_input_dim": 8 * 6 + WIDTH,
    },
}  # fmt: skip


def write_tokenizer(folder: Path, pad: str = "<|endoftext|>") -> None:
    """Write the files of a CLIP tokenizer whose pieces are letters and a few words."""
    merges = []
    for word in WORDS:
        parts = [*word[:-1], f"{word[-1]}</w>"]
        while len(parts) > 1:
            merges.append(f"{parts[0]} {parts[1]}")
            parts = [parts[0] + parts[1], *parts[2:]]
    letters = [*string.ascii_lowercase, *string.digits, *"!,.-"]
    pieces = [*letters, *(f"{c}</w>" for c in letters), *("".join(m.split()) for m in merges)]
    pieces = list(dict.fromkeys([*pieces, "<|startoftext|>", "<|endoftext|>"]))
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    described = {
        "tokenizer_class": "CLIPTokenizer", "model_max_length": 77, "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "pad_token": pad, "do_lower_case": True,
    }  # fmt: skip
    (folder / "tokenizer_config.json").write_text(json.dumps(described))


def text_parts(folder: Path, act: str = "quick_gelu", pad: str = "<|endoftext|>") -> tuple[Any, Any]:
    """Return a tokenizer, whose files are written into a folder, and a text encoder of five layers."""
    if not folder.exists():
        write_tokenizer(folder, pad)
    tokenizer = CLIPTokenizer.from_pretrained(str(folder))
    described = CLIPTextConfig(
        vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=37, num_hidden_layers=5, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=WIDTH, hidden_act=act, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = CLIPTextModel(described).eval()
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "embedding" in name:
                p *= 20.0  # so that words matter as much as places
    return tokenizer, model


def pair_parts(folder: Path) -> dict[str, Any]:
    """Return the tokenizers and text encoders of Stable Diffusion XL, which pads in two ways."""
    tokenizer, encoder = text_parts(folder / "words-gelu", "gelu", "!")
    first_tokenizer, first = text_parts(folder / "words-quick_gelu")
    described = CLIPTextConfig.from_dict({**encoder.config.to_dict(), "projection_dim": WIDTH})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        second = CLIPTextModelWithProjection(described).eval()
    with torch.no_grad():
        for name, p in second.named_parameters():
            if "embedding" in name:
                p *= 20.0
    return {
        "tokenizer": first_tokenizer, "text_encoder": first, "tokenizer_2": tokenizer, "text_encoder_2": second,
        "add_watermarker": False,
    }  # fmt: skip


def network(kind: str = "sd1", seed: int = 0) -> UNetCondition:
    """Return a network, whose attention to the text is far from uniform."""
    return random_condition(config(**NETWORKS[kind]), seed)


def autoencoder(seed: int = 0) -> Any:
    """Return an autoencoder whose images are twice as large as its latents."""
    return randomize_(AutoencoderKL(**VAE), seed).eval().requires_grad_(False)


def pipeline(
    folder: Path, kind: str = "sd1", scheduler: Any = None, cls: Any = StableDiffusionPipeline, **parts: Any
) -> Any:
    """Return a pipeline of Stable Diffusion; a tokenizer's files are written into the folder."""
    act, pad = ("gelu", "!") if kind == "sd2" else ("quick_gelu", "<|endoftext|>")
    if "tokenizer" not in parts:
        parts["tokenizer"], parts["text_encoder"] = text_parts(folder / f"words-{act}", act, pad)
    others = (
        {}
        if "XL" in cls.__name__
        else {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    )
    made = cls(
        vae=autoencoder(), unet=diffusers_condition(network(kind)).requires_grad_(False),
        scheduler=DDIMScheduler(**SCHEDULE) if scheduler is None else scheduler, **others, **parts,
    )  # fmt: skip
    made.set_progress_bar_config(disable=True)
    return made


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Return the peak signal-to-noise ratio of images in [-1, 1]."""
    error = float((a.double() - b.double()).square().mean())
    return 10 * torch.tensor(4 / max(error, 1e-20)).log10().item()
