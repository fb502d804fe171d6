"""Run a diffusers pipeline by fastdiff: the same images in less time. Needs diffusers.

python accelerate_diffusers.py        # writes accelerated.png
"""

import time

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import fastdiff
from fastdiff.data import grid

# Your own pipeline comes from DDIMPipeline.from_pretrained("path/to/ddim"). This one has random weights.
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=32,
    block_out_channels=(64, 128, 128),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
pipeline = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)


def sample() -> np.ndarray:
    """Draw eight images [8, H, W, C] in [0, 1], and print how long it took."""
    started = time.perf_counter()
    images = pipeline(8, torch.Generator("cpu").manual_seed(0), num_inference_steps=10, output_type="np").images
    print(f"{time.perf_counter() - started:.2f} s")
    return images


before = sample()
fastdiff.accelerate(pipeline)  # the same object; its sampling loop is now run by fastdiff
sample()  # the first call also prepares the weights
after = sample()

print(f"PSNR between diffusers' images and fastdiff's: {-10 * np.log10(np.mean((after - before) ** 2)):.0f} dB")
images = torch.from_numpy(after).permute(0, 3, 1, 2) * 2 - 1  # [8, C, H, W] in [-1, 1]
grid(images, columns=4).save("accelerated.png")
print("accelerated.png: 8 images")
