"""Watch an image come out of noise: an animation of what the sampler holds, and of what the network believes.

Run it anywhere:  python watch_denoising.py        It writes denoising.gif.
"""

import torch

import fastdiff
from fastdiff.data import pictures as images

sampler = fastdiff.Sampler.from_pretrained("fashion-mnist")

# Five images of different classes: a T-shirt, trousers, a sandal, a bag, a boot.
labels = [0, 1, 5, 8, 9]

# stream() gives an event after every step. event.x is the image so far, still noisy; event.x0 is the network's present
# guess of the finished image, blurred at first. ddpm adds fresh noise in every step, so the guess keeps changing.
frames = []
for event in sampler.stream(len(labels), solver="ddpm", steps=60, labels=labels, guidance=1.5, seed=4, every=2):
    both = torch.cat([event.x, event.x0])
    frames.append(images.grid(both, columns=len(labels)))  # upper row x, lower row x0
    if event.row % 10 == 9:
        unsure = (event.x - event.x0).pow(2).mean().sqrt()
        print(f"step {event.row + 1:2d} of {event.rows}: x and the guess of x0 are {unsure:.2f} apart")

# Leaving the loop early would have ended the run: nothing is computed that nobody asks for.
images.animate([frame.resize((3 * frame.width, 3 * frame.height)) for frame in frames], "denoising.gif", seconds=4)
print(f"denoising.gif: {len(frames)} frames")
