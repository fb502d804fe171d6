"""Distances between two sets of images, precision and recall, with confidence intervals.

    extract = features("fashion-mnist")                        # images [N, C, H, W] in [-1, 1] -> features [N, F]
    reference = Reference(extract(real))                       # statistics of the real images, computed once
    measure(extract(generated), reference)                     # {"frechet": Estimate(value, low, high), "kernel": ...}

All sums run over all images, in float64, block by block. The intervals describe the variation over samples of the
generator, with the same number of images and the same real images: they contain the expected distance in 95 % of draws.
They do not correct the bias of the Frechet distance, which falls like 1 / n, so compare at equal n.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from fastdiff.checkpoints.reading import TORCH_SUFFIXES
from fastdiff.errors import InvalidArgument, NumericsError
from fastdiff.evaluation import inception, random_features
from fastdiff.evaluation.classifier import Classifier
from fastdiff.evaluation.random_features import RandomFeatures
from fastdiff.modes import exact_products, plain_modes

BLOCK = 2048  # rows that are processed at a time
GROUPS = 50  # of generated images, for intervals
SUBSETS = 10  # of generated images, for the interval of recall
NEIGHBOURS = 3  # k of precision and recall, as in the paper
Z = 1.959963984540054  # P(|N(0, 1)| < Z) = 0.95
T = Z + (Z**3 + Z) / (4 * (GROUPS - 1))  # the same quantile of Student's distribution, GROUPS - 1 degrees of freedom


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number with its 95 % confidence interval.

    Attributes:
        value: The number.
        low: The lower end of the interval.
        high: The upper end of the interval.
    """

    value: float
    low: float
    high: float


class Reference:
    """Features of the real images, with the statistics that are computed from them once.

    Args:
        features: Floats [M, F], M at least 2.
    """

    def __init__(self, features: Tensor) -> None:
        self.features = _checked(features, "reference")

    @functools.cached_property
    def moments(self) -> Moments:
        """Mean and covariance, for the Frechet distance."""
        return Moments.of(self.features)

    @functools.cached_property
    def cubes(self) -> CubeSums | None:
        """Sums for the kernel distance; None if summing over pairs is cheaper."""
        m, f = self.features.shape
        return CubeSums.of(self.features) if f <= 256 and f * f < 2 * m else None

    @functools.cached_property
    def kernel_mean(self) -> float:
        """The mean of k(x, y) over all pairs x != y."""
        m, f = self.features.shape
        if self.cubes is None:
            return _pair_sums(self.features, 1).item() / (m * (m - 1))
        same = sum((x.square().sum(1) / f + 1).pow(3).sum().item() for x in _blocks(self.features))
        return (self.cubes.total() - same) / (m * (m - 1))


def measure(generated: Tensor, reference: Reference | Tensor) -> dict[str, Estimate]:
    """Measure generated images against real ones.

    Args:
        generated: Features of the generated images, floats [N, F], N at least 4.
        reference: The real images, or their features [M, F].

    Returns:
        The Frechet distance "frechet", the kernel distance "kernel", "precision" and "recall".

    Raises:
        InvalidArgument: If the features are no matrices that fit each other.
        NumericsError: If features are NaN or infinite; the message lists the images.
    """
    if not isinstance(reference, Reference):
        reference = Reference(reference)
    return {
        "frechet": frechet_interval(generated, reference),
        "kernel": kernel_interval(generated, reference),
        **dict(zip(("precision", "recall"), precision_recall_intervals(reference.features, generated), strict=True)),
    }


# Features -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Extractor:
    """A function from images, float32 [N, C, H, W] in [-1, 1], to features, float32 [N, F] on the CPU."""

    network: Classifier | inception.Inception | RandomFeatures
    device: torch.device

    @plain_modes()
    def __call__(self, images: Tensor, batch_size: int = 100) -> Tensor:
        network = self.network
        extract = network.features if isinstance(network, Classifier) else network
        return torch.cat([extract(batch.to(self.device)).float().cpu() for batch in images.split(batch_size)])


def features(name: str | Path = "fashion-mnist", device: str | torch.device = "cpu") -> Extractor:
    """Load the network whose features are compared.

    Args:
        name: A built-in model's name or a classifier's file, which give F = 96 features of 1x32x32 images; or a PyTorch
            file (.pth, .pt) with the weights of Inception-v3, which gives F = 2048 features of images of any size (see
            `fastdiff.evaluation.inception`); or "random", which gives F = 224 features of gray or colour images of any
            size (see `fastdiff.evaluation.random_features`).
        device: The device to run the network on.

    Returns:
        The extractor, a function from images to features.

    Raises:
        CheckpointError: If the file cannot be used; the message says why.
    """
    if name == random_features.NAME:
        return Extractor(RandomFeatures().to(device), torch.device(device))
    network = inception.load(name) if Path(name).suffix.lower() in TORCH_SUFFIXES else Classifier.load(name)
    return Extractor(network.to(device), torch.device(device))


# Frechet distance -----------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and covariance of a set of features, the covariance as a root of it."""

    mean: Tensor  # float64 [F]
    root: Tensor  # R, float64 [min(N, F), F], with R^T R = S = sum (x - mean) (x - mean)^T / (N - 1)

    @classmethod
    def of(cls, x: Tensor) -> Moments:
        """Compute the moments of x [N, F].

        R is the triangular factor of the centred features themselves, found block by block. A root of their covariance
        would have an error of sqrt(eps) |R| where the covariance is singular, this one has an error of eps |R|.
        """
        mean = sum((b.sum(0) for b in _blocks(x)), torch.zeros((), dtype=torch.float64, device="cpu")) / len(x)
        root = torch.zeros(0, x.shape[1], dtype=torch.float64, device="cpu")
        for block in _blocks(x):
            root = torch.linalg.qr(torch.cat([root, block - mean]), mode="r").R
        return cls(mean, root / math.sqrt(len(x) - 1))


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """Compute the squared 2-Wasserstein distance of Gaussians with the sets' means and covariances.

        d = |mean_a - mean_b|^2 + tr S_a + tr S_b - 2 tr (S_a S_b)^(1/2)        Heusel et al. 2017, equation 6

    With S = R^T R, the last trace is the sum of the singular values of R_a R_b^T. So no root of a product is taken,
    which would lose half of the digits. On Inception's features this is the FID.

    Args:
        a: Features, floats [N, F]; their covariance may be singular.
        b: Features, floats [M, F].

    Returns:
        The distance, at least 0.
    """
    return _frechet(Moments.of(_checked(a, "a")), Moments.of(_checked(b, "b")))[0]


@plain_modes()
@exact_products()
def frechet_interval(generated: Tensor, reference: Reference) -> Estimate:
    """Compute `frechet_distance` and its interval.

    With W = s^(-1/2) V^T R_b, where R_a R_b^T = U s V^T, the distance's first two derivatives are, for an image x

        L(x) = 2 (mean_a - mean_b) . (x - mean_a) + |x - mean_a|^2 - |W (x - mean_a)|^2      up to a constant

    and, for changes K, K' of the covariance of W x (s itself) and m, m' of the mean,

        Q = sum_ij K_ij K'_ij / (s_i + s_j) + 2 m . m'

    Directions in which either set does not vary are left out of W.
    """
    a, other = _checked(generated, "generated"), reference.moments
    mine = Moments.of(a)
    value, s, v = _frechet(mine, other)
    kept = s > 1e-7 * s.max()
    s, w = s[kept], (v[kept] @ other.root) / s[kept].sqrt()[:, None]
    shift, weight = mine.mean - other.mean, (s[:, None] + s).rsqrt()
    linear, covariances, means = [], [], []
    groups = _groups(a)
    for group in groups:
        x = group.double() - mine.mean
        y = x @ w.T
        share = len(groups) / len(a)
        linear.append(share * (2 * (x @ shift) + x.square().sum(1) - y.square().sum(1)).sum())
        covariances.append(((share * (y.T @ y) - torch.diag(s)) * weight).flatten().float())
        means.append(share * x.sum(0))
    k, m = torch.stack(covariances), torch.stack(means)
    # The distance is a difference of such numbers, whose rounding it has: where it is no larger, it may be 0.
    rounding = 1e-13 * float(mine.root.square().sum() + other.root.square().sum() + mine.mean.square().sum())
    deviation = _deviation(torch.stack(linear), (k @ k.T).double() + 2 * m @ m.T)
    return _positive_interval(value if value > rounding else 0.0, deviation, rounding)


def _frechet(a: Moments, b: Moments) -> tuple[float, Tensor, Tensor]:
    """Compute the distance, and the singular values s [K] and right singular vectors V^T [K, F] of R_a R_b^T."""
    if a.mean.shape != b.mean.shape:
        raise InvalidArgument(f"features of {len(a.mean)} and {len(b.mean)} numbers cannot be compared")
    _, s, v = torch.linalg.svd(a.root @ b.root.T, full_matrices=False)
    value = (a.mean - b.mean).square().sum() + a.root.square().sum() + b.root.square().sum() - 2 * s.sum()
    return max(value.item(), 0.0), s, v  # rounding alone makes it negative


# Kernel distance ------------------------------------------------------------------------------------------------------


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """Compute the unbiased squared maximum mean discrepancy with a cubic kernel.

        d = mean_{i != j} k(a_i, a_j) + mean_{i != j} k(b_i, b_j) - 2 mean_{i, j} k(a_i, b_j)
        k(x, y) = (x . y / F + 1)^3

    Binkowski et al. 2018, sections 3 and 4. On Inception's features this is the KID, taken over all pairs, not over
    random subsets. For sets that are alike it is about 0, of either sign, whatever their sizes.

    Args:
        a: Features, floats [N, F], N at least 2.
        b: Features, floats [M, F], M at least 2.

    Returns:
        The distance.
    """
    return _kernel(_checked(a, "a"), Reference(b), 1)[0]


def kernel_interval(generated: Tensor, reference: Reference) -> Estimate:
    """Compute `kernel_distance` and its interval.

    The derivatives are L(x) = 2 mean_a k(x, a) - 2 mean_b k(x, b) and Q = 2 k, see `_deviation`.
    """
    value, pairs, crosses = _kernel(_checked(generated, "generated"), reference, GROUPS)
    g = len(pairs)
    centred = pairs - pairs.mean(0) - pairs.mean(1, keepdim=True) + pairs.mean()
    half = T * _deviation(2 * pairs.sum(1) / g - 2 * crosses, 2 * centred)
    return Estimate(value, value - half, value + half)


def _kernel(a: Tensor, reference: Reference, groups: int) -> tuple[float, Tensor, Tensor]:
    """Compute the distance and, by groups of a, the means of k(a_i, a_j), i != j, [g, g] and of k(a_i, b_j) [g]."""
    b = reference.features
    if a.shape[1] != b.shape[1]:
        raise InvalidArgument(f"features of {a.shape[1]} and {b.shape[1]} numbers cannot be compared")
    n, parts = len(a), _groups(a, groups)
    crosses = torch.stack([x.sum() for x in _groups(_cross_sums(a, reference), groups)])
    sums = _pair_sums(a, groups)
    value = sums.sum() / (n * (n - 1)) + reference.kernel_mean - 2 * crosses.sum() / (n * len(b))
    size = torch.tensor([len(x) for x in parts], dtype=torch.float64, device="cpu")
    pairs = size[:, None] * size - torch.diag(size)
    means = torch.where(pairs > 0, sums / pairs.clamp(min=1.0), sums.sum() / (n * (n - 1)))
    return value.item(), means, crosses / size / len(b)


@dataclasses.dataclass(frozen=True)
class CubeSums:
    """Sums of x, x x and x x x (tensor products) over a set, from which sums of k over the set follow.

        (x . y / F + 1)^3 = 1 + 3 x . y / F + 3 (x . y)^2 / F^2 + (x . y)^3 / F^3,    (x . y)^p = (x ... x) . (y ... y)

    As x x is symmetric, only x_i x_j with i <= j are kept, those with i < j times sqrt 2.
    """

    count: int  # the size of the set
    first: Tensor  # the sum of x, float64 [F]
    second: Tensor  # of x x, float64 [F (F + 1) / 2]
    third: Tensor  # of x x x, float64 [F (F + 1) / 2, F]

    @classmethod
    def of(cls, features: Tensor) -> CubeSums:
        """Compute the sums over features [N, F]."""
        first, second, third = (torch.zeros((), dtype=torch.float64, device="cpu") for _ in range(3))
        for x in _blocks(features, 512):
            squares = _products(x)
            first, second, third = first + x.sum(0), second + squares.sum(0), third + squares.T @ x
        return cls(len(features), first, second, third)

    def total(self) -> float:
        """Sum k over all pairs of the set, including each element with itself."""
        f = len(self.first)
        squares = [t.square().sum().item() for t in (self.first, self.second, self.third)]
        return self.count**2 + 3 * squares[0] / f + 3 * squares[1] / f**2 + squares[2] / f**3

    def at(self, x: Tensor) -> Tensor:
        """Sum k(x_i, y) over all y of the set: float64 [n, F] -> [n]."""
        f, squares = len(self.first), _products(x)
        cubes = ((squares @ self.third) * x).sum(1)
        return self.count + 3 * (x @ self.first) / f + 3 * (squares @ self.second) / f**2 + cubes / f**3


def _products(x: Tensor) -> Tensor:
    """Compute x_i x_j for i <= j, times sqrt 2 for i < j: [n, F] -> [n, F (F + 1) / 2]."""
    i, j = torch.triu_indices(x.shape[1], x.shape[1], dtype=torch.int64, device="cpu")
    return x[:, i] * x[:, j] * torch.where(i < j, 2.0, 1.0).double().sqrt()


def _cubes(x: Tensor, y: Tensor) -> Tensor:
    """Compute k(x_i, y_j), [n, m]."""
    t = (x @ y.T).div_(x.shape[1]).add_(1.0)
    return t * t * t


def _cross_sums(x: Tensor, reference: Reference) -> Tensor:
    """Sum k(x_i, y) over all y of the reference, [n]."""
    if reference.cubes is not None:
        return torch.cat([reference.cubes.at(block) for block in _blocks(x, 512)])
    sums = [sum(_cubes(a, b).sum(1) for b in _blocks(reference.features)) for a in _blocks(x)]
    return torch.cat(sums)  # type: ignore[arg-type]  # there is at least one block, so these are Tensors


def _pair_sums(x: Tensor, groups: int) -> Tensor:
    """Sum k(x_i, x_j), i != j, by the groups of i and j, [g, g]."""
    sizes = torch.tensor([len(group) for group in _groups(x, groups)], dtype=torch.int64, device="cpu")
    member = torch.nn.functional.one_hot(
        torch.arange(len(sizes), dtype=torch.int64, device="cpu").repeat_interleave(sizes)
    ).double()
    blocks = list(zip(x.split(BLOCK), member.split(BLOCK), strict=True))
    sums = torch.zeros(len(sizes), len(sizes), dtype=torch.float64, device="cpu")
    for i, (a, of_a) in enumerate(blocks):
        left = a.double()
        sums += of_a.T @ _cubes(left, left).fill_diagonal_(0.0) @ of_a
        for b, of_b in blocks[i + 1 :]:
            between = of_a.T @ _cubes(left, b.double()) @ of_b
            sums += between + between.T
    return sums


# Precision and recall -------------------------------------------------------------------------------------------------


def precision_recall(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[float, float]:
    """Compute the share of the fakes that lie among the reals, and of the reals that lie among the fakes.

        x is among Y:  |x - y| <= r(y) for some y in Y,     r(y) = the distance of y to the k-th nearest other one of Y

    Kynkaanniemi et al. 2019, equations 1 and 2. Precision measures quality, recall diversity. Both depend on the
    numbers of images, so the larger set is thinned to the size of the smaller, by a fixed random choice.

    Args:
        real: Features of the real images, floats [M, F].
        fake: Features of the generated images, floats [N, F].
        k: The neighbour whose distance is the radius, from 1 to min(M, N) - 1.

    Returns:
        Precision and recall, both from 0 to 1.
    """
    precision, recall = precision_recall_intervals(real, fake, k)
    return precision.value, recall.value


def precision_recall_intervals(real: Tensor, fake: Tensor, k: int = NEIGHBOURS) -> tuple[Estimate, Estimate]:
    """Compute `precision_recall` with intervals.

    Precision is a mean over the fakes, so its interval is that of a share. Recall is no such mean. Its variation with
    the fakes is estimated from `SUBSETS` disjoint subsets of them, each compared with subsets of the reals of the same
    size. (A jackknife overestimates it up to twice, as several fakes together decide whether a real is covered.)
    """
    real, fake = _checked(real, "real"), _checked(fake, "fake")
    if real.shape[1] != fake.shape[1]:
        raise InvalidArgument(f"features of {real.shape[1]} and {fake.shape[1]} numbers cannot be compared")
    n = min(len(real), len(fake))
    if not 1 <= k < n:
        raise InvalidArgument(f"k={k} of {n} images: precision and recall need k of at least 1 and more images than k")
    real, fake = thinned(real, n).double(), thinned(fake, n).double()
    centre = real.mean(0)  # |x - y|^2 = x^2 + y^2 - 2 x y loses the fewest digits near 0
    real, fake = real - centre, fake - centre
    slack = 1e-13 * max(real.square().sum(1).max().item(), fake.square().sum(1).max().item())

    radius, real_radius = _radii(fake, k) + slack, _radii(real, k) + slack
    among, covered = torch.zeros(n, dtype=torch.bool, device="cpu"), 0
    for block, r in zip(_rows(real), _rows(real_radius), strict=True):
        squares = _squares(block, fake)
        among |= (squares <= r[:, None]).any(0)
        covered += int((squares <= radius).any(1).sum())

    subsets = min(SUBSETS, n // (4 * k))
    deviation = math.inf
    if subsets > 1:
        columns = real[_permutation(n, 1)].tensor_split(subsets)
        recalls = torch.empty(subsets, subsets, dtype=torch.float64, device="cpu")
        for i, some in enumerate(fake.tensor_split(subsets)):
            r = _radii(some, k) + slack
            for j, column in enumerate(columns):
                recalls[i, j] = (_squares(column, some) <= r).any(1).double().mean()
        deviation = (recalls.var(0).mean() / subsets).sqrt().item()
    return share_interval(among), _share(covered / n, deviation, n)


def thinned(x: Tensor, n: int) -> Tensor:
    """Choose n of the rows of x at random, always the same ones, in their order; all rows if there are no more."""
    if len(x) <= n:
        return x
    return x[_permutation(len(x), 0)[:n].sort().values]


def _permutation(n: int, seed: int) -> Tensor:
    """Permute the numbers below n at random, always in the same way for a seed."""
    generator = torch.Generator("cpu").manual_seed(seed)
    return torch.randperm(n, generator=generator, dtype=torch.int64, device="cpu")


def _radii(x: Tensor, k: int) -> Tensor:
    """Compute for each row of x [n, F] the squared distance to the k-th nearest other row, [n]."""
    found, start = [], 0
    for block in _rows(x):
        squares, rows = _squares(block, x), torch.arange(len(block), dtype=torch.int64, device="cpu")
        squares[rows, rows + start] = math.inf
        found.append(squares.topk(k, largest=False).values[:, -1])
        start += len(block)
    return torch.cat(found)


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """Compute |x_i - y_j|^2, [n, m]."""
    return (x.square().sum(1)[:, None] + y.square().sum(1) - 2 * x @ y.T).clamp_(min=0.0)


def _rows(x: Tensor) -> tuple[Tensor, ...]:
    """Split x into blocks of rows for which a matrix [rows, len(x)] has at most 128 MiB."""
    return x.split(max(1, (1 << 24) // len(x)))


# Intervals ------------------------------------------------------------------------------------------------------------


def share_interval(hits: Tensor) -> Estimate:
    """Compute the share of true values of bool [n], with its interval."""
    groups = _groups(hits.double())
    sums = torch.stack([group.sum() for group in groups]) * len(groups) / len(hits)
    deviation = (sums.var() / len(groups)).sqrt().item() if len(groups) > 1 else 0.0
    return _share(hits.double().mean().item(), deviation, len(hits))


def _share(p: float, deviation: float, n: int) -> Estimate:
    """Compute Wilson's interval of a share (1927) for the number n of independent images with the given deviation.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n),      n = p (1 - p) / deviation^2
    """
    if math.isinf(deviation):
        return Estimate(p, 0.0, 1.0)
    m = p * (1 - p) / deviation**2 if deviation > 0 and 0 < p < 1 else n
    spread = Z * math.sqrt(p * (1 - p) / m + (Z / (2 * m)) ** 2)
    centre, scale = p + Z**2 / (2 * m), 1 + Z**2 / m
    return Estimate(p, min(max((centre - spread) / scale, 0.0), p), max(min((centre + spread) / scale, 1.0), p))


def _deviation(linear: Tensor, pairs: Tensor) -> float:
    """Estimate the standard deviation of a distance d from its derivatives L [g] and Q [g, g] by g groups of images.

        d = d_0 + mean_i L_i + mean_ij Q_ij / 2:      var d = var(L) / g - mean_{i != j} (Q_ij - mean Q)^2 / 2 g^2

    L is taken at the images that were drawn, not at their distribution. So its variance counts that of Q's term twice
    (Efron and Stein 1981, section 4), which matters if the sets are nearly alike and d is nearly quadratic. Groups are
    runs of neighbours: if the classes take turns, d varies less than with random classes, and so do the groups.
    """
    g = len(linear)
    if g < 3:
        return math.inf
    first = linear.var() / g
    off = pairs[~torch.eye(g, dtype=torch.bool, device="cpu")]
    second = (off - off.mean()).square().mean() / (2 * g * g)
    return torch.maximum(first - second, first / 2).sqrt().item()


def _positive_interval(value: float, deviation: float, rounding: float) -> Estimate:
    """Compute value exp(+- T deviation / value), for a distance that is never negative and skewed near 0."""
    if value <= 0.0 or math.isinf(deviation):
        return Estimate(value, 0.0, max(T * deviation, rounding))
    factor = math.exp(min(T * deviation / value, 700.0))
    return Estimate(value, value / factor, value * factor)


# Rows -----------------------------------------------------------------------------------------------------------------


def _checked(x: Tensor, name: str) -> Tensor:
    """Check that features are a matrix of finite floats of at least 2 images, and return them on the CPU."""
    if not isinstance(x, Tensor) or x.ndim != 2 or len(x) < 2 or x.shape[1] < 1 or not x.is_floating_point():
        got = f"{x.dtype} {list(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise InvalidArgument(f"{name}: features must be floats [N, F] of at least 2 images, not {got}")
    bad = torch.nonzero(~x.isfinite().all(1))[:, 0].tolist()
    if bad:
        listed = ", ".join(map(str, bad[:20]))
        raise NumericsError(f"{name}: features of {len(bad)} images are NaN or infinite: {listed}", tuple(bad))
    return x.detach().cpu()


def _blocks(x: Tensor, rows: int = BLOCK) -> Iterator[Tensor]:
    """Yield x in float64, some rows at a time."""
    return (block.double() for block in x.split(rows))


def _groups(x: Tensor, groups: int = GROUPS) -> tuple[Tensor, ...]:
    """Split x into at most ``groups`` runs of neighbouring rows."""
    return x.tensor_split(min(groups, len(x)))
