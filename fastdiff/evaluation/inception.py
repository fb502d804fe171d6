"""Inception-v3 as FID uses it: the network of 2015 with TensorFlow's weights, which the user supplies as a file.

    network = load("weights-inception-2015-12-05-6726825d.pth")   # torch-fidelity's; pytorch-fid's pt_inception-... too
    network(images)                                               # [B, C, H, W] in [-1, 1] -> [B, 2048], "pool3"

Szegedy et al. 2016 describe the network. This one differs from torchvision's as the FID of Heusel et al. 2017 needs:
averages do not count the padding, the last block takes a maximum instead, and images are enlarged as in TensorFlow 1.
Its layers are named as in the files.
"""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastdiff.checkpoints.reading import read_torch
from fastdiff.errors import CheckpointError, InvalidArgument
from fastdiff.modes import plain_modes

log = logging.getLogger("fastdiff")

SIZE = 299
WIDTH = 2048  # F, the number of features
SHA256 = "6726825d"  # first digits for the published file
PUBLISHED = (
    f"weights-inception-2015-12-05-{SHA256}.pth (torch-fidelity) or pt_inception-2015-12-05-{SHA256}.pth (pytorch-fid)"
)

# A layer: name, output channels, kernel (one number, or height and width), stride. Stride 1 keeps the size.
Layer = tuple[str, int, int | tuple[int, int], int]
# A branch: layers in sequence; if its last item is a tuple of layers, these run side by side.
Branch = tuple[Layer | tuple[Layer, ...], ...]


def _a(pooled: int) -> tuple[Branch, ...]:
    """Return the branches of blocks 5b, 5c, 5d, at 35x35."""
    return (
        (("branch1x1", 64, 1, 1),),
        (("branch5x5_1", 48, 1, 1), ("branch5x5_2", 64, 5, 1)),
        (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 1)),
        (("branch_pool", pooled, 1, 1),),
    )


def _c(width: int) -> tuple[Branch, ...]:
    """Return the branches of blocks 6b to 6e, at 17x17."""
    return (
        (("branch1x1", 192, 1, 1),),
        (("branch7x7_1", width, 1, 1), ("branch7x7_2", width, (1, 7), 1), ("branch7x7_3", 192, (7, 1), 1)),
        (
            ("branch7x7dbl_1", width, 1, 1),
            ("branch7x7dbl_2", width, (7, 1), 1),
            ("branch7x7dbl_3", width, (1, 7), 1),
            ("branch7x7dbl_4", width, (7, 1), 1),
            ("branch7x7dbl_5", 192, (1, 7), 1),
        ),
        (("branch_pool", 192, 1, 1),),
    )


_B: tuple[Branch, ...] = (  # block 6a, to 17x17
    (("branch3x3", 384, 3, 2),),
    (("branch3x3dbl_1", 64, 1, 1), ("branch3x3dbl_2", 96, 3, 1), ("branch3x3dbl_3", 96, 3, 2)),
    (),
)
_D: tuple[Branch, ...] = (  # block 7a, to 8x8
    (("branch3x3_1", 192, 1, 1), ("branch3x3_2", 320, 3, 2)),
    (
        ("branch7x7x3_1", 192, 1, 1),
        ("branch7x7x3_2", 192, (1, 7), 1),
        ("branch7x7x3_3", 192, (7, 1), 1),
        ("branch7x7x3_4", 192, 3, 2),
    ),
    (),
)
_E: tuple[Branch, ...] = (  # blocks 7b, 7c, at 8x8
    (("branch1x1", 320, 1, 1),),
    (("branch3x3_1", 384, 1, 1), (("branch3x3_2a", 384, (1, 3), 1), ("branch3x3_2b", 384, (3, 1), 1))),
    (
        ("branch3x3dbl_1", 448, 1, 1),
        ("branch3x3dbl_2", 384, 3, 1),
        (("branch3x3dbl_3a", 384, (1, 3), 1), ("branch3x3dbl_3b", 384, (3, 1), 1)),
    ),
    (("branch_pool", 192, 1, 1),),
)


class Conv(nn.Module):
    """A layer that computes relu(norm(conv(x)))."""

    def __init__(
        self, channels: int, out: int, kernel: int | tuple[int, int], stride: int = 1, padding: bool = True
    ) -> None:
        super().__init__()
        height, width = (kernel, kernel) if isinstance(kernel, int) else kernel
        pad = (height // 2, width // 2) if padding and stride == 1 else (0, 0)
        self.conv = nn.Conv2d(channels, out, (height, width), stride, pad, bias=False, dtype=torch.float32)
        self.bn = nn.BatchNorm2d(out, eps=0.001, dtype=torch.float32)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu_()


class Mixed(nn.Module):
    """A block of branches side by side; the last one starts with a 3x3 pooling, "average", "maximum" or "halve"."""

    def __init__(self, channels: int, branches: tuple[Branch, ...], pool: str) -> None:
        super().__init__()
        self.branches, self.pool, self.out = branches, pool, 0
        for branch in branches:
            width = channels
            for item in branch:
                layers = item if isinstance(item[0], tuple) else (item,)
                for name, out, kernel, stride in layers:
                    self.add_module(name, Conv(width, out, kernel, stride))
                width = sum(layer[1] for layer in layers)
            self.out += width

    def forward(self, x: Tensor) -> Tensor:
        if self.pool == "average":
            pooled = F.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        else:
            pooled = F.max_pool2d(x, 3, 2) if self.pool == "halve" else F.max_pool2d(x, 3, 1, 1)
        outputs = []
        for branch in self.branches:
            y = pooled if branch is self.branches[-1] else x
            for item in branch:
                layers = item if isinstance(item[0], tuple) else (item,)
                y = torch.cat([self.get_submodule(layer[0])(y) for layer in layers], 1)
            outputs.append(y)
        return torch.cat(outputs, 1)


class Inception(nn.Module):
    """The network: images [B, C, H, W] in [-1, 1], C = 1 or 3, of any size -> features [B, 2048]."""

    def __init__(self) -> None:
        super().__init__()
        self.Conv2d_1a_3x3 = Conv(3, 32, 3, 2)
        self.Conv2d_2a_3x3 = Conv(32, 32, 3, padding=False)
        self.Conv2d_2b_3x3 = Conv(32, 64, 3)
        self.Conv2d_3b_1x1 = Conv(64, 80, 1)
        self.Conv2d_4a_3x3 = Conv(80, 192, 3, padding=False)
        channels = 192
        self.blocks = []
        for name, branches, pool in (
            ("5b", _a(32), "average"), ("5c", _a(64), "average"), ("5d", _a(64), "average"), ("6a", _B, "halve"),
            ("6b", _c(128), "average"), ("6c", _c(160), "average"), ("6d", _c(160), "average"),
            ("6e", _c(192), "average"), ("7a", _D, "halve"), ("7b", _E, "average"), ("7c", _E, "maximum"),
        ):  # fmt: skip
            block = Mixed(channels, branches, pool)
            self.add_module(f"Mixed_{name}", block)
            self.blocks.append(f"Mixed_{name}")
            channels = block.out

    def forward(self, x: Tensor) -> Tensor:
        if x.ndim != 4 or x.shape[1] not in (1, 3):
            raise InvalidArgument(f"images must be [B, 1 or 3, H, W], not {list(x.shape)}")
        # TensorFlow's graph has inputs from 0 to 255 and computes (x - 128) / 128.
        x = (enlarge((x + 1.0) * 127.5) - 128.0) / 128.0
        x = self.Conv2d_2b_3x3(self.Conv2d_2a_3x3(self.Conv2d_1a_3x3(x.expand(-1, 3, -1, -1))))
        x = self.Conv2d_4a_3x3(self.Conv2d_3b_1x1(F.max_pool2d(x, 3, 2)))
        x = F.max_pool2d(x, 3, 2)
        for name in self.blocks:
            x = self.get_submodule(name)(x)
        return x.mean((2, 3))


def enlarge(x: Tensor) -> Tensor:
    """Resize images bilinearly as TensorFlow 1's resize_bilinear does, [B, C, H, W] -> [B, C, 299, 299].

    Pixel i has the value at s = i H / 299, interpolated between the pixels floor(s) and floor(s) + 1, or the last one:
    positions refer to the corners of pixels, not to their centres.
    """
    rows, columns = (_lines(n, x) for n in x.shape[2:])
    return rows @ x @ columns.T


def _lines(n: int, like: Tensor) -> Tensor:
    """Return the weights of n pixels in 299, [299, n]."""
    at = torch.arange(SIZE, dtype=torch.float64, device="cpu") * n / SIZE
    low = at.floor().long()
    weights = torch.zeros(SIZE, n, dtype=torch.float64, device="cpu")
    rows = torch.arange(SIZE, dtype=torch.int64, device="cpu")
    weights.index_put_((rows, low), low + 1 - at, accumulate=True)
    weights.index_put_((rows, (low + 1).clamp(max=n - 1)), at - low, accumulate=True)
    return weights.to(like)


@plain_modes()
def load(path: str | Path) -> Inception:
    """Load the network from a PyTorch file, without running code in it; the result is in eval mode, on the CPU.

    A file other than the published one is logged, as its distances cannot be compared with published ones. A file that
    does not fit raises `CheckpointError`, which lists tensors that are missing, unexpected or misshapen.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file; Inception's weights are needed, {PUBLISHED}")
    tensors = read_torch(path)
    with torch.device("meta"):  # random weights would change torch's random state
        network = Inception()
    expected = {k: v for k, v in network.state_dict().items() if v.is_floating_point()}
    # The classifier's head and the counters of the norms are not used.
    given = {k: v for k, v in tensors.items() if not k.endswith("num_batches_tracked") and not k.startswith("fc.")}
    problems = [f"missing: {name}" for name in sorted(expected.keys() - given.keys())]
    problems += [f"unexpected: {name}" for name in sorted(given.keys() - expected.keys())]
    for name in sorted(expected.keys() & given.keys()):
        if given[name].shape != expected[name].shape:
            problems.append(f"{name} is {list(given[name].shape)}, {list(expected[name].shape)} is needed")
        elif not given[name].is_floating_point() or not given[name].isfinite().all():
            problems.append(f"{name} must be finite floats")
    if problems:
        shown = "\n  ".join([*problems[:20], *(["..."] if len(problems) > 20 else [])])
        raise CheckpointError(f"{path} is not {PUBLISHED}, {len(problems)} problems:\n  {shown}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    if not digest.startswith(SHA256):
        log.warning(
            "%s is not the published file (SHA-256 %s..., not %s...): its distances compare with each other only",
            path, digest[:8], SHA256,
        )  # fmt: skip
    for name in network.state_dict().keys() - given.keys():  # the batch counters
        given[name] = torch.zeros((), dtype=torch.int64, device="cpu")
    network.to_empty(device="cpu").load_state_dict(given)
    return network.eval()
