"""Files of the original code bases: each network against an independent oracle, and every conversion there and back."""

from __future__ import annotations

import math

import originals as oracle
import pytest
import torch
from safetensors.torch import load_file, save_file
from unets import randomize_, relative_error

import fastdiff
from fastdiff.backends import Spec, native, prepare
from fastdiff.checkpoint import load
from fastdiff.convert import convert
from fastdiff.lower import lower
from fastdiff.noise import normal  # noqa: F401
from interpreter import Interpreter

CASES = {
    "ddpm": (
        lambda: oracle.DDPM(32, 3, (1, 2), 1, (4,), 3, 8), {"flags": "--image_size 8"}, "ddpm",
    ),
    "improved": (
        lambda: oracle.OpenAI(8, 32, (1, 2), 1, (1, 2), out_channels=6, num_heads=4, scale=0.25),
        {
            "flags": "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --learn_sigma True "
            "--attention_resolutions 8,4 --diffusion_steps 4000 --noise_schedule cosine --rescale_timesteps True"
        },
        "openai",
    ),
    "improved, no FiLM, one head": (
        lambda: oracle.OpenAI(8, 32, (1, 1), 2, (2,), num_heads=1, scale_shift=False),
        {
            "flags": "--image_size 8 --num_channels 32 --num_res_blocks 2 --channel_mult 1,1 --num_heads 1 "
            "--attention_resolutions 4 --use_scale_shift_norm False"
        },
        "openai",
    ),
    "ADM-64": (
        lambda: oracle.OpenAI(
            8, 32, (1, 2), 1, (2,), out_channels=6, num_head_channels=16, num_classes=7, resblock_updown=True,
            new_order=True,
        ),
        {
            "flags": "--image_size 8 --num_channels 32 --num_res_blocks 1 --channel_mult 1,2 --learn_sigma True "
            "--attention_resolutions 4 --num_head_channels 16 --class_cond True --resblock_updown True "
            "--use_new_attention_order True --use_fp16 True --noise_schedule cosine"
        },
        "openai-new",
    ),
    "ADM-512": (
        lambda: oracle.OpenAI(
            16, 64, (0.5, 1, 1), 1, (2, 4), out_channels=6, num_head_channels=32, num_classes=3, resblock_updown=True,
        ),
        {
            "flags": "--image_size 16 --num_channels 64 --num_res_blocks 1 --channel_mult 0.5,1,1 --learn_sigma True "
            "--attention_resolutions 8,4 --num_head_channels 32 --class_cond True --resblock_updown True"
        },
        "openai",
    ),
    "DDPM++": (lambda: oracle.SongUNet(8, 128, (1, 2), 1, (4,), augment_dim=9), {}, "edm"),
}  # fmt: skip
