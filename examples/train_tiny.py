"""Train a diffusion model from scratch in a few seconds, on discs, squares and crosses of 12 x 12 pixels.

python train_tiny.py        # writes samples.png, and a folder run/ with the checkpoint and the log
"""

import numpy as np
import torch

import fastdiff
from fastdiff.data import load_data

SIZE = 12


def draw(kind: int, rng: np.random.Generator) -> np.ndarray:
    """Draw a shape of random place, size and brightness on black, uint8 [12, 12]."""
    y, x = np.mgrid[:SIZE, :SIZE]
    radius = rng.uniform(2.5, 4)
    y, x = y - rng.uniform(radius, SIZE - 1 - radius), x - rng.uniform(radius, SIZE - 1 - radius)
    inside = [
        x**2 + y**2 <= radius**2,
        np.maximum(abs(x), abs(y)) <= 0.85 * radius,
        (np.minimum(abs(x), abs(y)) <= 1) & (np.maximum(abs(x), abs(y)) <= radius),
    ]
    return (inside[kind] * rng.uniform(160, 255)).astype(np.uint8)


# 1. The data: an .npz file with arrays named images and labels. A folder of image files would do as well.
rng = np.random.default_rng(0)
labels = np.arange(1500) % 3
np.savez("shapes.npz", images=np.stack([draw(kind, rng) for kind in labels]), labels=labels)
data = load_data("shapes.npz")

# 2. The network. Its class embedding has a row for each of the three classes, and one for the null label, which
# guidance needs for the prediction without a class.
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
torch.manual_seed(0)  # of the initial weights
unet = fastdiff.UNet(config)
schedule = fastdiff.NoiseSchedule("cosine")

# 3. Training. The network sees images with noise added and learns to predict v, a mixture of noise and image.
settings = fastdiff.TrainConfig(
    steps=350, batch_size=64, prediction="v_prediction", lr=4e-3, lr_warmup=20, ema_decay=0.98, sample_every=0
)
trainer = fastdiff.Trainer(unet, data, "run", settings, schedule)
trainer.fit()  # run/ now has a checkpoint, a log, and model/, which Sampler.from_pretrained loads

# 4. Sampling, here from the network in memory. trainer.ema has the moving average of the weights, which gives better
# images than the latest weights.
sampler = fastdiff.Sampler(trainer.ema, schedule, prediction="v_prediction")
out = sampler.sample(24, steps=25, labels=[kind for kind in range(3) for _ in range(8)], guidance=2.0, seed=1)
out.save("samples.png", columns=8)
weights = sum(p.numel() for p in unet.parameters())
print(f"samples.png: discs, squares and crosses from a network of {weights:,} weights after {trainer.step} updates")
