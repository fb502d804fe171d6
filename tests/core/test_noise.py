"""Philox words against Random123, normals against float64, and what a sample may depend on."""

from __future__ import annotations

import math
import shutil

import numpy as np
import pytest
import torch

from fastdiff.core import noise
from fastdiff.core.noise import INITIAL, MASK, UPDATE, as_int64, check_seed, normal, philox4x32
from fastdiff.errors import InvalidArgument

# Random123's kat_vectors for philox4x32 with 10 rounds: counter, key, words.
KNOWN = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]
needs_compiler = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "c++", "clang++", "cl"))), reason="torch.compile needs a C++ compiler"
)


def exact(counter, key):
    """Compute the definition of Philox in Python's unbounded integers."""
    (c0, c1, c2, c3), (k0, k1) = counter, key
    for _ in range(10):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 % 2**32, (p0 >> 32) ^ c3 ^ k1, p0 % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return c0, c1, c2, c3


def unhex(text):
    return tuple(int(word, 16) for word in text.split())


def tensors(values):
    return tuple(torch.tensor([value], dtype=torch.int64) for value in values)


def random_words(count, seed):
    bits = np.random.default_rng(seed).integers(0, 1 << 32, (6, count), dtype=np.int64)
    bits[:, :8] = np.array([0, 1, 2, 0x7FFFFFFF, 0x80000000, 0x80000001, 0xFFFFFFFE, 0xFFFFFFFF])
    return tuple(torch.from_numpy(bits))


def draw(seed=0, index=0, row=0, stream=UPDATE, shape=(3, 16, 16), batch=1):
    """Draw noise for `batch` images with consecutive indices."""
    return normal(
        torch.full((batch,), as_int64(seed), dtype=torch.int64),
        torch.arange(index, index + batch),
        torch.full((batch,), row, dtype=torch.int64),
        stream,
        shape,
    )


def reference(seed, index, row, stream, size):
    """Compute the normals in float64 from the exact words."""
    values = []
    for k in range((size + 3) // 4):
        counter = (k, row | stream << 24, index % 2**32, index >> 32)
        u = [((w >> 9) + 0.5) / 2**23 for w in exact(counter, (seed % 2**32, seed >> 32))]
        for a, b in ((u[0], u[1]), (u[2], u[3])):
            r = math.sqrt(-2 * math.log(a))
            values += [r * math.cos(2 * math.pi * b), r * math.sin(2 * math.pi * b)]
    return np.array(values[:size])


# Words ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_published_vectors(counter, key, words):
    assert exact(unhex(counter), unhex(key)) == unhex(words)
    assert tuple(int(w) for w in philox4x32(tensors(unhex(counter)), tensors(unhex(key)))) == unhex(words)


def test_words_are_the_definitions():
    *counter, k0, k1 = random_words(500, seed=1)
    words = torch.stack(philox4x32(tuple(counter), (k0, k1)))
    expected = [exact(column[:4], column[4:]) for column in torch.stack([*counter, k0, k1]).T.tolist()]
    assert words.T.tolist() == [list(column) for column in expected]


@needs_compiler
def test_compiled_words_are_equal():
    *counter, k0, k1 = random_words(1000, seed=2)
    compiled = torch.compile(philox4x32, fullgraph=True)
    for got, want in zip(compiled(tuple(counter), (k0, k1)), philox4x32(tuple(counter), (k0, k1)), strict=True):
        assert torch.equal(got, want)


# Normals --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 12345, 1 << 32, 1 << 63, (1 << 64) - 1])
@pytest.mark.parametrize(
    ("index", "row", "stream"), [(0, 0, INITIAL), (7, 999, UPDATE), ((5 << 32) + 3, (1 << 24) - 1, MASK)]
)
@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 5, 7), (1, 1, 1)])
def test_normals_follow_the_definition(seed, index, row, stream, shape):
    got = draw(seed, index, row, stream, shape)
    assert got.shape == (1, *shape)
    assert got.dtype == torch.float32
    assert np.abs(got.double().numpy().ravel() - reference(seed, index, row, stream, math.prod(shape))).max() < 2e-6


def test_every_seed_index_and_row_of_a_batch_is_its_own():
    seeds, indices, rows = [3, (1 << 64) - 2, 3], [9, 9, 1 << 40], [0, 5, 77]
    got = normal(
        torch.tensor([as_int64(s) for s in seeds]), torch.tensor(indices), torch.tensor(rows), UPDATE, (2, 3, 3)
    )
    for image, seed, index, row in zip(got, seeds, indices, rows, strict=True):
        assert np.abs(image.double().numpy().ravel() - reference(seed, index, row, UPDATE, 18)).max() < 2e-6


def test_normals_are_accurate_over_all_words():
    """Normals are within 2e-6 of float64, with half of the radii in the tail, where the angle's error counts most."""
    g = np.random.default_rng(3)
    w = g.integers(0, 1 << 32, (2, 1 << 20))
    w[0, ::2] >>= g.integers(8, 24, (1 << 19,))
    u64 = ((w >> 9) + 0.5) / 2**23
    u = torch.from_numpy(u64).float()
    assert (u.double().numpy() == u64).all()  # exact in fp32
    z0, z1 = noise._box_muller(u[0], u[1])
    r, a = np.sqrt(-2 * np.log(u64[0])), 2 * np.pi * u64[1]
    assert r.max() > 5.7
    assert np.abs(z0.double().numpy() - r * np.cos(a)).max() < 2e-6
    assert np.abs(z1.double().numpy() - r * np.sin(a)).max() < 2e-6


@needs_compiler
@pytest.mark.slow
def test_compiled_normals():
    seed, index, row = torch.tensor([1, -1]), torch.tensor([0, 1 << 35]), torch.tensor([2, 3])
    compiled = torch.compile(normal, fullgraph=True)(seed, index, row, UPDATE, (3, 5, 7))
    assert (compiled - normal(seed, index, row, UPDATE, (3, 5, 7))).abs().max() < 2e-6


def test_distribution():
    z = np.sort(draw(seed=2024, shape=(4, 256, 256), batch=4).double().numpy().ravel())
    n = z.size
    for power, moment, variance in [(1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)]:
        assert abs((z**power).mean() - moment) < 4 * math.sqrt(variance / n), f"moment {power}"
    # Kolmogorov-Smirnov: sqrt(n) D exceeds 1.95 once in a thousand.
    cdf = (0.5 * (1 + torch.erf(torch.from_numpy(z) / math.sqrt(2)))).numpy()
    steps = np.arange(n + 1) / n
    assert max((steps[1:] - cdf).max(), (cdf - steps[:-1]).max()) * math.sqrt(n) < 1.95
    for limit in (2, 3, 4):
        for count in ((z > limit).sum(), (z < -limit).sum()):
            expected = n * 0.5 * math.erfc(limit / math.sqrt(2))
            assert abs(count - expected) < 4 * math.sqrt(expected), f"tail beyond {limit}"
    assert np.abs(z).max() <= math.sqrt(-2 * math.log(2.0**-24))


# What it depends on ---------------------------------------------------------------------------------------------------

VARIANTS = [
    {"seed": 1},
    {"seed": 1 << 32},
    {"seed": 1 << 63},
    {"seed": (1 << 64) - 1},
    {"index": 1},
    {"index": 1 << 32},
    {"row": 1},
    {"row": 1 << 8},
    {"row": (1 << 24) - 1},
    {"stream": INITIAL},
    {"stream": MASK},
]


@pytest.mark.parametrize("change", VARIANTS, ids=str)
def test_one_argument_changes_everything(change):
    a, b = draw(shape=(4, 64, 64)).flatten(), draw(**change, shape=(4, 64, 64)).flatten()
    assert (a == b).float().mean() < 1e-3
    assert abs(torch.corrcoef(torch.stack([a, b]))[0, 1]) < 4 / math.sqrt(a.numel())


def test_no_counter_is_used_twice():
    fields = [draw(batch=4), *(draw(**change, batch=1) for change in VARIANTS if change != {"index": 1})]
    groups = torch.cat([field.reshape(-1, 4) for field in fields]).numpy()
    assert len(np.unique(groups, axis=0)) == len(groups)


def test_neighbouring_elements_are_uncorrelated():
    z = draw(seed=5, shape=(1, 256, 256)).flatten()
    for lag in (1, 2, 3, 4, 256):
        assert abs((z[:-lag] * z[lag:]).mean()) < 4 / math.sqrt(z.numel()), lag


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 28, 28), (3, 5, 7)])
def test_bits_do_not_depend_on_the_batch(shape):
    g = torch.Generator().manual_seed(0)
    seed, index, row = (torch.randint(-(2**62), 2**62, (64,), generator=g) for _ in range(3))
    row = row % 1000
    together = normal(seed, index, row, UPDATE, shape)
    for b in range(64):
        assert torch.equal(normal(seed[b : b + 1], index[b : b + 1], row[b : b + 1], UPDATE, shape)[0], together[b])
    slots = torch.randperm(64, generator=g)
    for part in (slots, slots[:33], slots[:2]):
        assert torch.equal(normal(seed[part], index[part], row[part], UPDATE, shape), together[part])


def test_bits_do_not_depend_on_chunking(monkeypatch):
    seed, index, row = torch.arange(7) - 3, torch.arange(7) << 30, torch.arange(7) * 11
    whole = normal(seed, index, row, MASK, (3, 16, 16))
    for images in (0, 2, 3):
        monkeypatch.setattr(noise, "_CHUNK", images * 3 * 16 * 16)
        assert torch.equal(normal(seed, index, row, MASK, (3, 16, 16)), whole)


def test_torch_generator_is_untouched():
    before = torch.get_rng_state()
    draw()
    assert torch.equal(torch.get_rng_state(), before)


# Arguments ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, 1, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, np.int32(5), np.uint64((1 << 64) - 1)])
def test_seeds(seed):
    value = check_seed(seed)
    assert type(value) is int
    assert value == seed
    stored = torch.tensor(as_int64(value), dtype=torch.int64)
    assert int(stored) % (1 << 64) == value


@pytest.mark.parametrize(
    "seed",
    [-1, 1 << 64, True, np.True_, 1.0, np.float64(3), "7", None, float("nan"), [1], torch.tensor(3), np.int64(-1)],
)
def test_bad_seeds(seed):
    with pytest.raises(InvalidArgument, match="seed must be") as caught:
        check_seed(seed)
    assert str(seed) in str(caught.value)


def test_bad_arguments():
    one, two = torch.zeros(1, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    with pytest.raises(InvalidArgument, match="stream"):
        normal(one, one, one, 256, (1, 2, 2))
    with pytest.raises(InvalidArgument, match="one value per image"):
        normal(one, two, two, UPDATE, (1, 2, 2))
