"""Features of random weights: what they tell apart, for images of any size and colour."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from fastdiff.evaluation import evaluate, metrics

N = 1000


def textures(n: int, seed: int, kinds: int = 4) -> Tensor:
    """Draw coloured random fields [n, 3, 32, 32] in [-1, 1], of ``kinds`` sizes of their spots."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, 3, 32, 32, generator=generator)
    f = torch.fft.fftfreq(32)
    radius = (f[:, None] ** 2 + f[None, :] ** 2).sqrt()
    scale = 0.06 * 1.6 ** (torch.arange(n) % kinds)
    spectrum = torch.exp(-0.5 * (radius / scale.view(-1, 1, 1, 1)) ** 2)
    fields = torch.fft.ifft2(torch.fft.fft2(z) * spectrum).real
    fields = fields / fields.std(dim=(1, 2, 3), keepdim=True)
    mix = torch.tensor([[0.8, 0.3, 0.1], [0.1, 0.7, 0.2], [0.0, 0.2, 0.5]])
    return torch.einsum("ij,njhw->nihw", mix, fields).mul(0.35).clamp(-1, 1)


def blurred(x: Tensor) -> Tensor:
    kernel = torch.tensor([1.0, 2.0, 1.0]) / 4
    weight = (kernel[:, None] * kernel[None, :]).expand(3, 1, 3, 3)
    return F.conv2d(F.pad(x, (1, 1, 1, 1), mode="circular"), weight, groups=3)


CHANGES = {
    "noise": lambda x: (x + 0.1 * torch.randn(x.shape, generator=torch.Generator().manual_seed(9))).clamp(-1, 1),
    "blur": blurred,
    "contrast": lambda x: 0.9 * x,
    "colours": lambda x: x.flip(1),
}


def test_what_they_tell_apart() -> None:
    """Each change of the documentation is at more than 5 times the distance of other real images."""
    extract = metrics.features("random")
    real = extract(textures(N, 0))
    assert real.shape == (N, 224)
    floor = metrics.frechet_distance(extract(textures(N, 1)), real)
    found = {name: metrics.frechet_distance(extract(change(textures(N, 1))), real) for name, change in CHANGES.items()}
    found["half missing"] = metrics.frechet_distance(extract(textures(N, 1, kinds=2)), real)
    ratios = {name: distance / floor for name, distance in found.items()}
    assert all(ratio > 5 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 8, 8), (3, 64, 48), (1, 5, 7)])
def test_images_of_any_size_and_colour(shape: tuple[int, int, int]) -> None:
    x = torch.rand(3, *shape) * 2 - 1
    extract = metrics.features("random")
    found = extract(x)
    assert found.shape == (3, 224)
    assert torch.isfinite(found).all()
    assert (extract(x, batch_size=1) - found).abs().max() < 1e-5
    if shape[0] == 1:
        torch.testing.assert_close(extract(x.repeat(1, 3, 1, 1)), found)


def test_the_weights_are_the_same_everywhere() -> None:
    first, second = (metrics.features("random").network.state_dict() for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert float(first["weight_0"].sum()) == pytest.approx(4.28977, abs=1e-4)


def test_colour_images_are_judged(tmp_path: Path) -> None:
    for name, seed in (("made", 1), ("real", 0)):
        pixels = ((textures(40, seed) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
        np.savez(tmp_path / f"{name}.npz", images=pixels)
    report = evaluate(
        samples=tmp_path / "made.npz", data=tmp_path / "real.npz", features_of="random", out=tmp_path / "out"
    )
    assert report["accuracy"] is None
    assert report["metrics"]["frechet"]["value"] > 0
    assert "a network of random weights" in report["summary"]["judge"]["kind"]
    assert not any("data set, Fashion-MNIST" in text for text in report["summary"]["warnings"])
