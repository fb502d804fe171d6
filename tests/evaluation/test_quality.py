"""Distances between sets of images: closed forms, other implementations, and intervals that hold what they promise."""

from __future__ import annotations

import logging
import math
import os
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.kid import KernelInceptionDistance

from fastdiff.errors import CheckpointError, InvalidArgument, NumericsError
from fastdiff.evaluation import (
    Classifier,
    Reference,
    frechet_distance,
    inception,
    kernel_distance,
    metrics,
    precision_recall,
)


def normal(n: int, f: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(n, f, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def standard(n: int, f: int, seed: int = 0) -> Tensor:
    """[n, f] whose mean is 0 and whose covariance is 1, to rounding."""
    x = normal(n, f, seed)
    return torch.linalg.qr(x - x.mean(0))[0] * math.sqrt(n - 1)


class Same(torch.nn.Module):
    """For torchmetrics: images that are their own features."""

    num_features = 6

    def forward(self, x: Tensor) -> Tensor:
        return x


# Frechet distance -----------------------------------------------------------------------------------------------------


@given(
    st.integers(1, 6),
    st.lists(st.floats(0, 5), min_size=12, max_size=12),
    st.lists(st.floats(-1e3, 1e3), min_size=6, max_size=6),
    st.integers(0, 9),
)
# A root of the covariances, in place of the features' own, is off by 3e-6 here.
@example(6, [4.1, 4.5, 4.1, 0.0, 4.9, 0.0, 0.0, 4.9, 0.0, 4.9, 0.0, 5.0], [0.0] * 6, 7)
def test_frechet_of_commuting_covariances(f: int, scales: list[float], shift: list[float], seed: int) -> None:
    """|shift|^2 + sum (s_a - s_b)^2, in any rotation; standard deviations may be 0."""
    a, b, c = torch.tensor(scales[:f]).double(), torch.tensor(scales[6 : 6 + f]).double(), torch.tensor(shift[:f])
    q = torch.linalg.qr(normal(f, f, seed))[0]
    x, y = (standard(50, f, seed) * a) @ q, (standard(40, f, seed + 1) * b + c) @ q
    expected = (c.double().square().sum() + (a - b).square().sum()).item()
    assert frechet_distance(x, y) == pytest.approx(expected, rel=1e-9, abs=1e-6)
    assert frechet_distance(y, x) == pytest.approx(frechet_distance(x, y), rel=1e-9, abs=1e-6)


def test_frechet_of_covariances_that_do_not_commute() -> None:
    """Against the eigenvalues of the plain product S_a S_b, whose roots sum to the last trace."""
    a, b = normal(200, 7) @ normal(7, 7, 1), normal(150, 7, 2) @ normal(7, 7, 3) + 0.3
    product = torch.linalg.eigvals(torch.cov(a.T) @ torch.cov(b.T)).real.sqrt().sum()
    trace = torch.cov(a.T).trace() + torch.cov(b.T).trace() - 2 * product
    expected = ((a.mean(0) - b.mean(0)).square().sum() + trace).item()
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-10)


def test_frechet_is_what_torchmetrics_says() -> None:
    a, b = normal(80, 6, 0, torch.float32).abs(), 2 * normal(90, 6, 1, torch.float32).abs()
    metric = FrechetInceptionDistance(Same(), input_img_size=(6,))
    metric.set_dtype(torch.float64)
    metric.update(a.double(), real=True)
    metric.update(b.double(), real=False)
    assert frechet_distance(a, b) == pytest.approx(metric.compute().item(), rel=1e-6)


@given(st.integers(2, 30), st.integers(1, 40), st.integers(0, 99), st.sampled_from([1e-3, 1.0, 1e4]))
def test_frechet_is_finite_and_not_negative(n: int, f: int, seed: int, mean: float) -> None:
    """Fewer images than features, constant features, means far above the deviations."""
    a, b = normal(n, f, seed).float() + mean, normal(n + 3, f, seed + 1).float() * 0.1 + mean
    a[:, 0] = mean
    assert 0 <= frechet_distance(a, b) < math.inf
    assert frechet_distance(a, a) <= 1e-9 * f * max(1.0, mean)
    value = metrics.frechet_interval(a, Reference(b))
    assert 0 <= value.low <= value.value <= value.high or n < 3
    assert not math.isnan(value.high)


def test_means_far_above_deviations_cost_no_digits() -> None:
    a, b = normal(500, 5), normal(400, 5, 1) * 1.5
    assert frechet_distance(a + 1e5, b + 1e5) == pytest.approx(frechet_distance(a, b), rel=1e-8)


# Kernel distance ------------------------------------------------------------------------------------------------------


def brute_force_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def k(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, m = len(x), len(y)
    kxx, kyy = k(x, x), k(y, y)
    return (
        (kxx.sum() - np.trace(kxx)) / (n * (n - 1)) + (kyy.sum() - np.trace(kyy)) / (m * (m - 1)) - 2 * k(x, y).mean()
    )


@given(st.integers(2, 90), st.integers(2, 200), st.integers(1, 12), st.integers(0, 99))
def test_kernel_is_the_sum_over_pairs(n: int, m: int, f: int, seed: int) -> None:
    a, b = normal(n, f, seed), 1.2 * normal(m, f, seed + 1) + 0.2
    expected = brute_force_mmd(a.numpy(), b.numpy())
    assert kernel_distance(a, b) == pytest.approx(expected, rel=1e-9, abs=1e-10)
    assert metrics.kernel_interval(a, Reference(b)).value == pytest.approx(expected, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize(("m", "closed"), [(40, False), (3000, True)])
def test_kernel_by_pairs_and_in_closed_form(m: int, closed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "BLOCK", 700)
    a, b = normal(150, 9).abs(), normal(m, 9, 1).abs()
    reference = Reference(b)
    assert (reference.cubes is not None) is closed
    assert kernel_distance(a, b) == pytest.approx(brute_force_mmd(a.numpy(), b.numpy()), rel=1e-9, abs=1e-12)
    assert reference.kernel_mean == pytest.approx(metrics._pair_sums(b, 1).item() / (m * (m - 1)), rel=1e-12)


def test_kernel_is_what_torchmetrics_says() -> None:
    a, b = normal(60, 6).abs(), 1.5 * normal(60, 6, 1).abs()
    metric = KernelInceptionDistance(Same(), subsets=1, subset_size=60)
    metric.update(a, real=True)
    metric.update(b, real=False)
    assert kernel_distance(a, b) == pytest.approx(metric.compute()[0].item(), rel=1e-5)


# Precision and recall -------------------------------------------------------------------------------------------------


def brute_force_precision_recall(real: np.ndarray, fake: np.ndarray, k: int) -> tuple[float, float]:
    def among(x: np.ndarray, y: np.ndarray) -> float:
        own = np.linalg.norm(y[:, None] - y, axis=2)
        radius = np.sort(own, axis=1)[:, k]  # the first is y itself
        return float((np.linalg.norm(x[:, None] - y, axis=2) <= radius).any(1).mean())

    return among(fake, real), among(real, fake)


@given(st.integers(2, 40), st.integers(1, 4), st.integers(1, 6), st.integers(0, 999), st.floats(0, 3))
def test_precision_recall_by_definition(n: int, k: int, f: int, seed: int, shift: float) -> None:
    n = max(n, k + 1)
    real, fake = normal(n, f, seed), 0.7 * normal(n, f, seed + 1) + shift
    assert precision_recall(real, fake, k) == brute_force_precision_recall(real.numpy(), fake.numpy(), k)


def test_precision_recall_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_rows", lambda x: x.split(13))
    real, fake = normal(100, 4), normal(100, 4, 1) + 0.5
    assert precision_recall(real, fake) == brute_force_precision_recall(real.numpy(), fake.numpy(), 3)


def test_precision_recall_of_known_sets() -> None:
    x = torch.cat([normal(100, 8), normal(100, 8, 1) + 100])  # two modes
    assert precision_recall(x, x) == (1.0, 1.0)
    assert precision_recall(x + 1e6, x + 1e6) == (1.0, 1.0)
    assert precision_recall(x, x + 1000) == (0.0, 0.0)
    one = normal(200, 8, 2)
    precision, recall = precision_recall(x, one)  # one mode only: good images, half of the variety
    assert precision > 0.8
    assert 0.3 < recall <= 0.5
    assert precision_recall(one, x)[::-1] == (precision, recall)  # each is the other's twin
    copies = normal(5, 8).repeat(10, 1)  # radii of 0
    assert precision_recall(copies, copies[:7]) == (1.0, 1.0)


def test_unequal_numbers_are_thinned() -> None:
    real, fake = normal(900, 5), normal(300, 5, 1) + 0.3
    thinned = metrics.thinned(real, 300)
    assert precision_recall(real, fake) == precision_recall(thinned, fake)
    assert precision_recall(fake, real) == precision_recall(fake, thinned)
    at = [int((real == row).all(1).nonzero()[0, 0]) for row in thinned]
    assert at == sorted(set(at))
    assert min(at) < 20 < 880 < max(at), "some of everywhere: folders are sorted by class"
    assert metrics.thinned(real, 900) is real


# Intervals ------------------------------------------------------------------------------------------------------------


def covered(n: int, f: int, shift: float, scale: float, classes: int, runs: int, names: tuple[str, ...]) -> dict:
    """How often each metric's interval holds its mean over all runs, and the bias of its width."""
    torch.manual_seed(7)
    mixing = torch.randn(f, f, dtype=torch.float64) / f**0.5 + torch.eye(f, dtype=torch.float64)
    centres = torch.randn(max(classes, 1), f, dtype=torch.float64) * (2.0 if classes else 0.0)

    def draw(k: int, move: float, spread: float) -> Tensor:
        z = torch.randn(k, f, dtype=torch.float64) * spread + move
        return (z + centres[torch.arange(k) % len(centres)]) @ mixing

    reference = Reference(draw(4000, 0.0, 1.0))
    functions = {
        "frechet": lambda x: [metrics.frechet_interval(x, reference)],
        "kernel": lambda x: [metrics.kernel_interval(x, reference)],
        "precision recall": lambda x: metrics.precision_recall_intervals(reference.features, x),
    }
    found: dict[str, list] = {}
    for _ in range(runs):
        x = draw(n, shift, scale)
        for name in names:
            for word, estimate in zip(name.split(), functions[name](x), strict=True):
                found.setdefault(word, []).append(estimate)
    result = {}
    for word, estimates in found.items():
        mean = np.mean([e.value for e in estimates])
        hits = np.mean([e.low <= mean <= e.high for e in estimates])
        width = np.mean([e.high - e.low for e in estimates]) / (2 * 1.96 * np.std([e.value for e in estimates]))
        result[word] = (float(hits), float(width))
    return result


@pytest.mark.parametrize(
    ("n", "f", "shift", "scale", "classes"),
    [
        pytest.param(300, 6, 0.0, 1.0, 0, marks=pytest.mark.slow),
        (300, 6, 0.25, 1.0, 0),
        pytest.param(300, 6, 0.0, 0.8, 0, marks=pytest.mark.slow),
        pytest.param(500, 16, 0.1, 1.1, 10, marks=pytest.mark.slow),
    ],
    ids=["alike", "moved", "narrower", "classes"],
)
def test_distances_lie_in_their_intervals(n: int, f: int, shift: float, scale: float, classes: int) -> None:
    """95 % nominal; also where the sets are alike, so that a distance is all bias, and where classes take turns."""
    for name, (hits, width) in covered(n, f, shift, scale, classes, 250, ("frechet", "kernel")).items():
        assert 0.90 <= hits <= 0.99, (name, hits)
        assert 0.85 < width < 1.25, (name, width)


@pytest.mark.parametrize(("shift", "scale"), [pytest.param(0.0, 1.0, marks=pytest.mark.slow), (0.2, 0.9)])
def test_precision_and_recall_lie_in_their_intervals(shift: float, scale: float) -> None:
    for name, (hits, width) in covered(300, 6, shift, scale, 0, 150, ("precision recall",)).items():
        assert 0.89 <= hits <= 0.995, (name, hits)
        assert 0.8 < width < 1.4, (name, width)


def test_intervals_narrow_with_n_and_of_few_images_are_wide() -> None:
    reference = Reference(normal(3000, 6) + 0.3)
    few, many = (metrics.measure(normal(n, 6, 5), reference) for n in (200, 3200))
    for name in ("frechet", "kernel", "precision", "recall"):
        ratio = (few[name].high - few[name].low) / (many[name].high - many[name].low)
        assert 2.5 < ratio < 6.5, (name, ratio)  # sqrt 16 = 4
    two = metrics.frechet_interval(normal(2, 6), reference)
    assert (two.low, two.high) == (0.0, math.inf)
    tiny = metrics.precision_recall_intervals(reference.features, normal(10, 6))[1]
    assert (tiny.low, tiny.high) == (0.0, 1.0)


def test_share_interval_is_wilsons() -> None:
    hits = torch.arange(1000) % 10 < 3  # 100 of 1000 in every group alike: no variance, so that of independent ones
    estimate = metrics.share_interval(hits)
    z, n, p = metrics.Z, 1000, 0.3
    centre, spread = p + z * z / 2 / n, z * math.sqrt(p * (1 - p) / n + z * z / 4 / n / n)
    assert estimate.value == pytest.approx(0.3)
    assert estimate.low == pytest.approx((centre - spread) / (1 + z * z / n))
    assert estimate.high == pytest.approx((centre + spread) / (1 + z * z / n))
    everything = metrics.share_interval(torch.ones(100, dtype=torch.bool))
    assert (everything.value, everything.high) == (1.0, 1.0)
    assert everything.low == pytest.approx(1 / (1 + z * z / 100))  # 100 hits of 100 do not make it certain


# What cannot be measured ----------------------------------------------------------------------------------------------


def test_bad_features_are_named() -> None:
    good = normal(30, 4)
    for function in (frechet_distance, kernel_distance, precision_recall):
        with pytest.raises(InvalidArgument, match="4 and 3 numbers"):
            function(good, normal(30, 3))
        for bad in (good[:1], good[0], good.long(), "features"):
            with pytest.raises(InvalidArgument, match=r"floats \[N, F\]"):
                function(bad, good)
        spoilt = good.clone()
        spoilt[3, 1], spoilt[17, 0] = math.nan, math.inf
        with pytest.raises(NumericsError, match="2 images are NaN or infinite: 3, 17") as caught:
            function(good, spoilt)
        assert caught.value.images == (3, 17)
    for k in (0, 30):
        with pytest.raises(InvalidArgument, match=f"k={k} of 30 images"):
            precision_recall(good, good, k)


# Features -------------------------------------------------------------------------------------------------------------


def test_the_classifiers_features() -> None:
    images = torch.rand(7, 1, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    torch.testing.assert_close(metrics.features()(images, batch_size=3), Classifier.load().judge(images)[1])
    with pytest.raises(InvalidArgument, match=r"\[B, 1, 32, 32\], not \[7, 3, 32, 32\]"):
        metrics.features()(images.expand(-1, 3, -1, -1))
    with pytest.raises(CheckpointError, match="nowhere"):
        metrics.features("nowhere")


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Inception's tensors, of a fixed pseudo-random kind."""
    tensors = {}
    for name, like in inception.Inception().state_dict().items():
        if not name.endswith("num_batches_tracked"):
            z = torch.randn(like.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
            if name.endswith("conv.weight"):
                tensors[name] = z * (1.5 / like[0].numel()) ** 0.5
            else:
                tensors[name] = 1 + 0.3 * z.tanh() if name.endswith(("weight", "running_var")) else 0.1 * z
    return {**tensors, "fc.weight": torch.zeros(1008, 2048), "fc.bias": torch.zeros(1008)}


@pytest.fixture(scope="module")
def weights_file(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    torch.save(weights, path)
    return path


def test_inception_is_torch_fidelitys(
    weights: dict[str, Tensor], weights_file: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Compare with torch-fidelity's FeatureExtractorInceptionV3 in float64, which reads the same file strictly."""
    assert (len(weights), sum(t.numel() for t in weights.values())) == (472, 23_885_392)
    with caplog.at_level(logging.WARNING, "fastdiff"):
        extract = metrics.features(weights_file)
    assert "not the published file" in caplog.text
    pixels = (torch.arange(2 * 3 * 32 * 32).reshape(2, 3, 32, 32) * 37 % 251).byte()
    features = extract(pixels.float() / 127.5 - 1)
    assert features.shape == (2, 2048)
    assert features[0, :5].tolist() == pytest.approx([0.53475, 2.5e-05, 0.02187, 0.0, 0.415026], abs=2e-6)
    assert features[1, 2043:].tolist() == pytest.approx([0.0, 0.038935, 0.06226, 0.0, 0.0], abs=2e-6)
    assert features.mean().item() == pytest.approx(0.13721934824555992, abs=1e-6)
    assert features.std().item() == pytest.approx(0.19847048601125947, abs=1e-6)


def test_gray_images_are_repeated(weights_file: Path) -> None:
    network = inception.load(weights_file)
    gray = torch.rand(1, 1, 20, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        torch.testing.assert_close(network(gray), network(gray.repeat(1, 3, 1, 1)))
        with pytest.raises(InvalidArgument, match=r"\[1, 2, 20, 24\]"):
            network(gray.repeat(1, 2, 1, 1))


@pytest.mark.parametrize("size", [(5, 8), (32, 32), (299, 299), (400, 310)])
def test_images_are_enlarged_as_in_tensorflow_1(size: tuple[int, int]) -> None:
    image = normal(size[0], size[1])
    enlarged = inception.enlarge(image[None, None])[0, 0]
    for row, column in ((0, 0), (1, 298), (57, 123), (298, 298), (200, 1)):
        y, x = row * size[0] / 299, column * size[1] / 299
        top, left = int(y), int(x)
        bottom, right = min(top + 1, size[0] - 1), min(left + 1, size[1] - 1)
        upper = image[top, left] + (x - left) * (image[top, right] - image[top, left])
        lower = image[bottom, left] + (x - left) * (image[bottom, right] - image[bottom, left])
        assert enlarged[row, column].item() == pytest.approx((upper + (y - top) * (lower - upper)).item(), abs=1e-12)


def test_weights_that_are_not_inceptions(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "w.pth"
    with pytest.raises(CheckpointError, match=r"w\.pth: no such file; .*weights-inception-2015-12-05-6726825d\.pth"):
        metrics.features(path)
    conv = "Mixed_5b.branch1x1.conv.weight"
    nan = weights["Conv2d_1a_3x3.bn.bias"].clone()
    nan[0] = math.nan
    for change, needle in (
        ({conv: None}, f"missing: {conv}"),
        ({"Mixed_9.conv.weight": torch.zeros(1)}, "unexpected: Mixed_9.conv.weight"),
        ({conv: torch.zeros(64, 191, 1, 1)}, rf"{conv} is \[64, 191, 1, 1\], \[64, 192, 1, 1\] is needed"),
        ({"Conv2d_1a_3x3.bn.bias": nan}, "Conv2d_1a_3x3.bn.bias must be finite floats"),
    ):
        torch.save({k: v for k, v in {**weights, **change}.items() if v is not None}, path)
        with pytest.raises(CheckpointError, match=needle):
            metrics.features(path)


def test_code_in_weights_is_not_run(tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"Conv2d_1a_3x3.conv.weight": Hostile()}, tmp_path / "w.pth")
    with pytest.raises(CheckpointError, match="nothing in it was run"):
        metrics.features(tmp_path / "w.pth")
    assert not (tmp_path / "ran").exists()
