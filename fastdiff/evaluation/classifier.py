"""A small Fashion-MNIST classifier, the judge of generated samples: is it what was asked for, and how far is it?

    judge = Classifier.load("fashion-mnist")          # comes with fastdiff; recipes/train_classifier.py made it
    logits, features = judge.judge(images)            # images: float32 [N, 1, 32, 32] in [-1, 1]
    judge.class_names[logits[0].argmax()]             # "Sandal"

`features` are what the last layer sees: distances between them say more about what is worn than distances of pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.checkpoints.loading import BUILTIN
from fastdiff.checkpoints.reading import read_safetensors
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.files import atomic_path

CLASS_NAMES = (
    "T-shirt/top",
    "Trouser",
    "Pullover",
    "Dress",
    "Coat",
    "Sandal",
    "Shirt",
    "Sneaker",
    "Bag",
    "Ankle boot",
)
WEIGHTS = "classifier.safetensors"
SIZE = 32  # H = W of its images: Fashion-MNIST's 28x28, zero-padded
WIDTHS = (32, 64, 96)  # channels at 16x16, 8x8 and 4x4


class Block(nn.Module):
    """y = relu(x + norm(conv(relu(norm(conv(x)))))), 3x3 convolutions, [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(h))).relu()


class Down(nn.Module):
    """relu(norm(conv(x))) with stride 2, [B, C, H, W] -> [B, C', H/2, W/2]."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(out)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Classifier(nn.Module):
    """[B, 1, 32, 32] in [-1, 1] -> logits [B, 10]: three times (halve the image, one residual block), mean, linear.

    In eval mode, in which `load` returns it, an image's logits are a function of that image alone.
    """

    class_names = CLASS_NAMES
    width = WIDTHS[-1]  # F, the number of features

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for channels, out in zip((1, *WIDTHS), WIDTHS, strict=False):
            self.body.append(Down(channels, out, kernel=5 if channels == 1 else 3))
            self.body.append(Block(out))
        self.head = nn.Linear(self.width, len(CLASS_NAMES))

    def features(self, x: Tensor) -> Tensor:
        """[B, 1, 32, 32] in [-1, 1] -> [B, F], what the last layer sees; never negative."""
        if x.ndim != 4 or x.shape[1:] != (1, SIZE, SIZE):
            raise InvalidArgument(f"images must be [B, 1, {SIZE}, {SIZE}], not {list(x.shape)}")
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))

    @torch.no_grad()
    def judge(self, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
        """Logits [N, 10] and features [N, F] of many images [N, 1, 32, 32], `batch_size` at a time."""
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        return self.head(features), features

    @classmethod
    def load(cls, model: str | Path = "fashion-mnist") -> Classifier:
        """From a ``.safetensors`` file, a folder that holds ``classifier.safetensors``, or a built-in model's name.

        In float32 on the CPU, in eval mode. Raises `CheckpointError` naming the file and every mismatch.
        """
        path = Path(model)
        if not path.exists() and (BUILTIN / str(model) / WEIGHTS).exists():
            path = BUILTIN / str(model)
        if path.is_dir():
            path = path / WEIGHTS
        tensors, _ = read_safetensors(path)
        classifier = cls()
        expected = classifier._weights()
        problems = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
        problems += [f"unexpected: {name}" for name in sorted(tensors.keys() - expected.keys())]
        for name in sorted(expected.keys() & tensors.keys()):
            tensor, want = tensors[name], expected[name]
            if (tensor.shape, tensor.dtype) != (want.shape, want.dtype):
                problems.append(
                    f"{name} is {tensor.dtype} {list(tensor.shape)}, {want.dtype} {list(want.shape)} is needed"
                )
            elif not tensor.isfinite().all():
                problems.append(f"{name} has NaN or infinite values")
        if problems:
            raise CheckpointError(
                f"{path} is not a fastdiff classifier, {len(problems)} problems:\n  " + "\n  ".join(problems)
            )
        classifier.load_state_dict(tensors, strict=False)
        return classifier.eval()

    def save(self, path: str | Path) -> None:
        """Write the weights as a ``.safetensors`` file, atomically."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self._weights().items()}
        with atomic_path(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})

    def _weights(self) -> dict[str, Tensor]:
        """What a file holds: all but the batch counters of the norms, which only training could use."""
        return {name: tensor for name, tensor in self.state_dict().items() if tensor.is_floating_point()}
