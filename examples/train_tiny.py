"""Train a diffusion model from nothing in a few seconds: discs, squares and crosses of 12 x 12 pixels.

Run it anywhere:  python train_tiny.py        It writes samples.png and a folder run/ with the checkpoint and the log.
"""

import numpy as np
import torch

import fastdiff
from fastdiff.training import load_data

SIZE = 12


def draw(kind: int, rng: np.random.Generator) -> np.ndarray:
    """A bright shape of random place, size and brightness on black: uint8 [12, 12]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    radius = rng.uniform(2.5, 4)
    y, x = y - rng.uniform(radius, SIZE - 1 - radius), x - rng.uniform(radius, SIZE - 1 - radius)
    inside = [
        x**2 + y**2 <= radius**2,
        np.maximum(abs(x), abs(y)) <= 0.85 * radius,
        (np.minimum(abs(x), abs(y)) <= 1) & (np.maximum(abs(x), abs(y)) <= radius),
    ]
    return (inside[kind] * rng.uniform(160, 255)).astype(np.uint8)


# 1. The data: arrays named images and labels in an .npz (a folder of pictures would do as well).
rng = np.random.default_rng(0)
labels = np.arange(1500) % 3
pictures = np.stack([draw(kind, rng) for kind in labels])
np.savez("shapes.npz", images=pictures, labels=labels)
data = load_data("shapes.npz")

# 2. The network. The class embedding has a row for each class and one for "no class", the null label of guidance.
config = fastdiff.UNetConfig(
    sample_size=SIZE,
    in_channels=1,
    out_channels=1,
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=4,
    num_class_embeds=4,
    null_label=3,
)
torch.manual_seed(0)  # the network starts from random weights
unet = fastdiff.UNet(config)
schedule = fastdiff.NoiseSchedule("cosine")

# 3. Training: an image is drowned in noise, the network says what is what (v_prediction) and is corrected.
settings = fastdiff.TrainConfig(
    steps=350, batch_size=64, prediction="v_prediction", lr=4e-3, lr_warmup=20, ema_decay=0.98, sample_every=0
)
trainer = fastdiff.Trainer(unet, data, "run", settings, schedule)
trainer.fit()  # run/ now holds a checkpoint, a log, and model/, which Sampler.from_pretrained loads

# 4. Sampling, from memory: trainer.ema holds the running average of the weights, which draws better than the last ones.
sampler = fastdiff.Sampler(trainer.ema, schedule, prediction="v_prediction")
out = sampler.sample(24, steps=25, labels=[kind for kind in range(3) for _ in range(8)], guidance=2.0, seed=1)
out.save("samples.png", columns=8)
weights = sum(p.numel() for p in unet.parameters())
print(f"samples.png: discs, squares and crosses from a network of {weights:,} weights, updated {trainer.step} times")
