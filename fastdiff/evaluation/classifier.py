"""A small Fashion-MNIST classifier that judges generated samples: their class, and features to compare sets by.

    judge = Classifier.load("fashion-mnist")          # comes with fastdiff; recipes/train_classifier.py made it
    logits, features = judge.judge(images)            # images: float32 [N, 1, 32, 32] in [-1, 1]
    judge.class_names[logits[0].argmax()]             # "Sandal"

`features` are the inputs of the last layer; distances between them reflect the kind of clothing better than distances
between pixels.
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from fastdiff.checkpoints.loading import BUILTIN
from fastdiff.checkpoints.reading import read_safetensors
from fastdiff.checkpoints.saving import write_safetensors
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.files import atomic_file
from fastdiff.modes import plain_modes

CLASS_NAMES = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
WEIGHTS = "classifier.safetensors"
SIZE = 32  # H = W of its images: Fashion-MNIST's 28x28, zero-padded
WIDTHS = (32, 64, 96)  # channels at 16x16, 8x8 and 4x4


class Block(nn.Module):
    """A residual block, relu(x + norm(conv(relu(norm(conv(x)))))) with 3x3 convolutions; it keeps the shape."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=torch.float32)
        self.norm1 = nn.BatchNorm2d(channels, dtype=torch.float32)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False, dtype=torch.float32)
        self.norm2 = nn.BatchNorm2d(channels, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(self.conv1(x)).relu()
        return (x + self.norm2(self.conv2(h))).relu()


class Down(nn.Module):
    """A layer that computes relu(norm(conv(x))) with stride 2, [B, C, H, W] -> [B, C', H/2, W/2]."""

    def __init__(self, channels: int, out: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, out, kernel, stride=2, padding=kernel // 2, bias=False, dtype=torch.float32)
        self.norm = nn.BatchNorm2d(out, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(x)).relu()


class Classifier(nn.Module):
    """A classifier of Fashion-MNIST images, [B, 1, 32, 32] in [-1, 1] -> logits [B, 10].

    It halves the image and applies a residual block three times, then takes the mean and a linear layer. In eval mode,
    in which `load` returns it, the logits of an image depend on that image alone.

    Attributes:
        class_names: The names of the ten classes.
        width: The number F of features.
    """

    class_names = CLASS_NAMES
    width = WIDTHS[-1]  # F, the number of features

    @plain_modes()
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential()
        for channels, out in zip((1, *WIDTHS), WIDTHS, strict=False):
            self.body.append(Down(channels, out, kernel=5 if channels == 1 else 3))
            self.body.append(Block(out))
        self.head = nn.Linear(self.width, len(CLASS_NAMES), dtype=torch.float32)

    def features(self, x: Tensor) -> Tensor:
        """Compute the inputs of the last layer.

        Args:
            x: Images, float32 [B, 1, 32, 32] in [-1, 1].

        Returns:
            Features [B, F], none negative.

        Raises:
            InvalidArgument: If the images have another shape.
        """
        if x.ndim != 4 or x.shape[1:] != (1, SIZE, SIZE):
            raise InvalidArgument(f"images must be [B, 1, {SIZE}, {SIZE}], not {list(x.shape)}")
        return self.body(x).mean((2, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits.

        Args:
            x: Images, float32 [B, 1, 32, 32] in [-1, 1].

        Returns:
            Logits [B, 10].
        """
        return self.head(self.features(x))

    @plain_modes()
    def judge(self, images: Tensor, batch_size: int = 250) -> tuple[Tensor, Tensor]:
        """Compute logits and features of many images without gradients.

        Args:
            images: Images, float32 [N, 1, 32, 32] in [-1, 1].
            batch_size: The number of images to process at a time.

        Returns:
            Logits [N, 10] and features [N, F].
        """
        features = torch.cat([self.features(batch) for batch in images.split(batch_size)])
        return self.head(features), features

    @classmethod
    @plain_modes()
    def load(cls, model: str | Path = "fashion-mnist") -> Classifier:
        """Load a classifier in float32 on the CPU, in eval mode.

        Args:
            model: A ``.safetensors`` file, a folder with ``classifier.safetensors``, or a built-in model's name.

        Returns:
            The classifier.

        Raises:
            CheckpointError: If the file does not fit; the message names it and every mismatch.
        """
        path = Path(model)
        if not path.exists() and (BUILTIN / str(model) / WEIGHTS).exists():
            path = BUILTIN / str(model)
        if path.is_dir():
            path = path / WEIGHTS
        tensors, _ = read_safetensors(path)
        with torch.device("meta"):  # random weights would change torch's random state
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
        for name in classifier.state_dict().keys() - tensors.keys():  # the batch counters, which are not stored
            tensors[name] = torch.zeros((), dtype=torch.int64, device="cpu")
        classifier.to_empty(device="cpu").load_state_dict(tensors)
        return classifier.eval()

    def save(self, path: str | Path) -> None:
        """Write the weights as a ``.safetensors`` file, atomically.

        Args:
            path: The file to write.
        """
        with atomic_file(path) as file:
            write_safetensors(file, self._weights(), {"format": "pt"})

    def _weights(self) -> dict[str, Tensor]:
        """Return the tensors that are stored: all but the batch counters of the norms."""
        return {name: tensor for name, tensor in self.state_dict().items() if tensor.is_floating_point()}
