"""Run a pipeline of Stable Diffusion by fastdiff: the same images in less time. Needs diffusers and transformers.

python accelerate_stable_diffusion.py        # writes stable_diffusion.png
"""

import time

import numpy as np
import torch
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel

import fastdiff
from fastdiff.data import grid

# Your own pipeline comes from StableDiffusionPipeline.from_pretrained("path/to/sd"). This one is small, has random
# weights, and reads random states in the place of prompts, so it needs no text encoder.
torch.manual_seed(0)
unet = UNet2DConditionModel(
    sample_size=16,
    block_out_channels=(64, 128),
    down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    cross_attention_dim=64,
)
vae = AutoencoderKL(
    block_out_channels=(32, 64),
    down_block_types=("DownEncoderBlock2D",) * 2,
    up_block_types=("UpDecoderBlock2D",) * 2,
)
pipeline = StableDiffusionPipeline(
    vae=vae.eval(), unet=unet.eval(), scheduler=DDIMScheduler(clip_sample=False, steps_offset=1), text_encoder=None,
    tokenizer=None, safety_checker=None, feature_extractor=None, requires_safety_checker=False,
)  # fmt: skip
pipeline.set_progress_bar_config(disable=True)
states = torch.randn(4, 77, 64, dtype=torch.float32, device="cpu")


def sample() -> np.ndarray:
    """Draw four images [4, H, W, C] in [0, 1], and print how long it took."""
    started = time.perf_counter()
    images = pipeline(
        prompt_embeds=states, negative_prompt_embeds=torch.zeros_like(states), num_inference_steps=5,
        guidance_scale=7.5, generator=torch.Generator("cpu").manual_seed(0), output_type="np",
    ).images  # fmt: skip
    print(f"{time.perf_counter() - started:.2f} s")
    return images


before = sample()
fastdiff.accelerate(pipeline)  # the same object; the native engine now runs its network and its decoder
sample()  # the first call also prepares the weights
after = sample()

print(f"PSNR between diffusers' images and fastdiff's: {-10 * np.log10(np.mean((after - before) ** 2)):.0f} dB")
images = torch.from_numpy(after).permute(0, 3, 1, 2) * 2 - 1  # [4, C, H, W] in [-1, 1]
grid(images, columns=2).save("stable_diffusion.png")
print("stable_diffusion.png: 4 images")
