"""Sample a grid of images, one row per class, from the model of Fashion-MNIST that comes with fastdiff.

python sample_grid.py        # writes grid.png
"""

import fastdiff

CLASSES = ["T-shirt", "trousers", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "boot"]
EACH = 6

# The name of a built-in model; the path of a diffusers folder or of a checkpoint works as well.
sampler = fastdiff.Sampler.from_pretrained("fashion-mnist")

# One label for each image: six T-shirts, six pairs of trousers, ...
labels = [label for label in range(len(CLASSES)) for _ in range(EACH)]

# The default solver, DDIM, takes 15 steps from noise to images. With guidance each step evaluates the network twice,
# with the label and without it, and moves further towards the label: images become clearer and less varied.
out = sampler.sample(len(labels), steps=15, labels=labels, guidance=1.5, seed=0)
out.save("grid.png", columns=EACH)

print(f"grid.png: from top to bottom {', '.join(CLASSES)}")
print(f"{out.table.steps} steps, {out.nfe} network evaluations for each image, seed {out.seed}")

# An image depends on the seed and its index, not on the images that are drawn with it. So the last boot can be drawn
# again by itself.
last = len(labels) - 1
alone = sampler.sample(1, steps=15, labels=9, guidance=1.5, seed=0, start_index=last)
difference = (alone.images[0] - out.images[last]).abs().max()
print(f"the last boot, drawn by itself, differs by {difference:.0e}, which is rounding")
