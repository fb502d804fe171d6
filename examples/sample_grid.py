"""Ten kinds of clothing: a grid of images from the model that comes with fastdiff, one row per class.

Run it anywhere:  python sample_grid.py        It writes grid.png.
"""

import fastdiff

CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
EACH = 6

# A small U-Net that was trained on Fashion-MNIST. A diffusers folder or your own checkpoint works as well.
sampler = fastdiff.Sampler.from_pretrained("fashion-mnist")

# One label per image: six T-shirts, six pairs of trousers, ...
labels = [label for label in range(len(CLASSES)) for _ in range(EACH)]

# DDIM walks from pure noise to an image in a few steps. Guidance evaluates the network twice in every step, with the
# label and without it, and goes further in the direction of the label: images become clearer and less varied.
out = sampler.sample(len(labels), steps=15, labels=labels, guidance=1.5, seed=0)
out.save("grid.png", columns=EACH)

print(f"grid.png: from top to bottom {', '.join(CLASSES)}")
print(f"{out.table.steps} steps, {out.nfe} network evaluations for each image, seed {out.seed}")

# An image depends on its seed and its place in the sequence, not on what is drawn beside it: the last boot, alone.
last = len(labels) - 1
alone = sampler.sample(1, steps=15, labels=9, guidance=1.5, seed=0, start_index=last)
difference = (alone.images[0] - out.images[last]).abs().max()
print(f"the last boot drawn alone differs by {difference:.0e}, which is rounding")
