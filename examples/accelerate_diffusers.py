"""A diffusers pipeline, and the same pipeline run by fastdiff: the same images in less time. Needs diffusers.

Run it anywhere:  python accelerate_diffusers.py        It writes accelerated.png.
"""

import time

import numpy as np
import torch
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

import fastdiff
from fastdiff.data import pictures as images

# A pipeline of your own comes from DDIMPipeline.from_pretrained("path/to/ddim"). This one has random weights.
torch.manual_seed(0)
unet = UNet2DModel(
    sample_size=32,
    block_out_channels=(64, 128, 128),
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
)
pipeline = DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler())
pipeline.set_progress_bar_config(disable=True)


def draw() -> np.ndarray:
    started = time.perf_counter()
    drawn = pipeline(8, torch.Generator().manual_seed(0), num_inference_steps=10, output_type="np").images
    print(f"{time.perf_counter() - started:.2f} s")
    return drawn


before = draw()
fastdiff.accelerate(pipeline)  # the same object: from here on its loop is fastdiff's
draw()  # the first call packs the weights
after = draw()

print(f"PSNR of the two: {-10 * np.log10(np.mean((after - before) ** 2)):.0f} dB")
images.grid(torch.from_numpy(after).permute(0, 3, 1, 2) * 2 - 1, columns=4).save("accelerated.png")
print("accelerated.png: 8 images")
