"""Animate sampling: the noisy images after each step, and the network's predictions of the finished images.

python watch_denoising.py        # writes denoising.gif
"""

import torch

import fastdiff
from fastdiff.data import animate, grid

sampler = fastdiff.Sampler.from_pretrained("fashion-mnist")

labels = [0, 1, 5, 8, 9]  # a T-shirt, trousers, a sandal, a bag and a boot

# stream() yields an event after every second step. event.x has the images so far, still noisy; event.x0 has the
# network's predictions of the finished images, which are blurred at first. DDPM adds fresh noise in each step, so that
# the predictions keep changing.
frames = []
for event in sampler.stream(len(labels), solver="ddpm", steps=60, labels=labels, guidance=1.5, seed=4, every=2):
    both = torch.cat([event.x, event.x0])
    frames.append(grid(both, columns=len(labels)))  # x in the upper row, x0 in the lower one
    if event.row % 10 == 9:
        distance = (event.x - event.x0).pow(2).mean().sqrt()
        print(f"step {event.row + 1:2d} of {event.rows}: x and the prediction of x0 are {distance:.2f} apart")

# Each step is computed when the loop asks for its event, so leaving the loop early would have ended the run.
animate([frame.resize((3 * frame.width, 3 * frame.height)) for frame in frames], "denoising.gif", seconds=4)
print(f"denoising.gif: {len(frames)} frames")
