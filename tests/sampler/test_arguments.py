"""Arguments that are refused before anything runs, by messages that name what is allowed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastdiff import solvers
from fastdiff.core import noise
from fastdiff.errors import (
    BackendError,
    ConfigError,
    FastdiffError,
    InvalidArgument,
)
from fastdiff.sampler import Sampler
from fastdiff.solvers import StepTable
from tests.sampler.by_hand import (
    SCHEDULE,
    SHAPE,
    Probe,
    sampler_of,
)
from tests.support.conditions import config as condition_config
from tests.support.conditions import diffusers_condition, random_condition
from tests.support.unets import TINY, TINY_CLASSES, random_unet


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> Callable[[Sampler], Sampler]:
    """Return a function that makes the network of a sampler fail when it is called; drawing noise fails too."""

    def heavy(*_: Any, **__: Any) -> None:
        raise AssertionError("something heavy ran before the arguments were checked")

    def forbid(sampler: Sampler) -> Sampler:
        sampler.unet.register_forward_pre_hook(heavy)
        return sampler

    monkeypatch.setattr(noise, "normal", heavy)
    return forbid


def refused(call: Callable[..., object], options: dict[str, Any], needles: tuple[str, ...]) -> None:
    options = dict(options)
    with pytest.raises(FastdiffError) as caught:
        call(options.pop("n", 3), **options)
    message = str(caught.value)
    assert all(needle in message for needle in needles), message
    assert "\n" not in message
    assert len(message) < 350


NAN = math.nan
BAD: list[tuple[dict[str, Any], tuple[str, ...]]] = [
    *[({"n": n}, (f"n={n!r}", "at least 1")) for n in (0, -1, 1.5, True, "4", None, NAN)],
    ({"n": 10**15}, ("1000000000000000", "GiB", "fewer")),
    *[
        ({"size": size}, (f"size={size!r}", "at least 1"))
        for size in (0, -32, (8, -8), "x", (8, 8, 8), 8.0, True, (8,))
    ],
    ({"size": 33}, ("33x33", "multiples of the network's stride, 2")),
    ({"size": (8, 33)}, ("8x33", "multiples")),
    ({"size": (100000, 10000)}, ("100000x10000", "GiB")),
    *[({"seed": seed}, (str(seed), "2^64 - 1")) for seed in (-1, 2**64, 1.5, "1", True)],
    *[({"start_index": i}, (f"start_index={i!r}", "from 0")) for i in (-1, 1.5, True, "0", 2**63)],
    *[({"batch_size": b}, (f"batch_size={b!r}", "at least 1")) for b in (0, -1, 1.5, True, "8")],
    *[({"steps": s}, (f"steps={s!r}", "from 1 to 100")) for s in (0, -1, 101, 2.5, True, "5")],
    *[({"solver": s}, (f"solver={s!r}", "ddim, ddpm")) for s in ("euler9", None, 7, "DDIM")],
    *[({"eta": e}, (f"eta={e!r}", "0 or a positive number")) for e in (-1, NAN, "x", True, None)],
    ({"eta": 9.0, "steps": 5}, ("eta=9.0", "eta=1 is always possible")),
    ({"eta": 0.5, "solver": "ddpm"}, ("eta=0.5", "ddim")),
    ({"variance": "beta"}, ("variance='beta'", "ddpm")),
    ({"variance": "large", "solver": "ddpm"}, ("variance='large'", "posterior, beta, none, learned_range")),
    ({"variance": "learned_range", "solver": "ddpm"}, ("learned_range", "6 output channels", "has 3")),
    ({"spacing": "log"}, ("spacing='log'", "trailing, leading, linspace, quadratic")),
    *[({"spacing": s}, ("fall",)) for s in ([5, 5], [1, 2])],
    ({"spacing": [500, 2]}, ("500", "99")),
    ({"spacing": [9, 2], "steps": 3}, ("3", "2")),
    *[({"clip": c}, (f"clip={c!r}", "positive number")) for c in (0, -1.0, NAN, "x", True)],
    *[({"guidance": g}, (f"guidance={g!r}", "finite")) for g in (NAN, math.inf, None)],
    *[({"guidance": g}, (f"guidance={g!r}", "one number, or 3")) for g in ("x", [1.0, 2.0], [[1.0]] * 3)],
    ({"guidance": 2.0}, ("guidance=2.0", "null_label")),
    *[
        ({"guidance_interval": i}, (f"guidance_interval={i!r}", "from 0 to 1"))
        for i in ((0.5,), "ab", None, 3, (0, 0.5, 1), ("a", 1))
    ],
    *[
        ({"guidance_interval": i}, ("guidance_interval", str(i[0]), str(i[1]), "0 <= start <= end <= 1"))
        for i in ((0.9, 0.1), (-1.0, 1.0), (0.5, 2.0), (NAN, 1.0), (0.5, NAN))
    ],
    *[({"guidance_rescale": r}, (f"guidance_rescale={r!r}", "0 to 1")) for r in (-0.1, 1.1, NAN, True, "x", None)],
    ({"noise": torch.zeros(2, *SHAPE)}, ("(2, 3, 8, 8)", "(3, 3, 8, 8)")),
    ({"noise": torch.zeros(3, 3, 8, 4)}, ("(3, 3, 8, 4)", "(3, 3, 8, 8)")),
    ({"noise": np.zeros((3, *SHAPE))}, ("ndarray", "(3, 3, 8, 8)")),
    ({"noise": 7}, ("int", "(3, 3, 8, 8)")),
    *[({"labels": label}, ("no classes",)) for label in (0, [0, 0, 0])],
]
TABLE = solvers.ddim(SCHEDULE, 4)
BAD += [
    ({"solver": TABLE, name: value}, (f"{name}={value!r}", "StepTable"))
    for name, value in {"steps": 5, "eta": 0.5, "variance": "beta", "spacing": "leading", "clip": None}.items()
]


@pytest.mark.parametrize(("options", "needles"), BAD, ids=lambda value: str(value)[:60])
def test_bad_arguments(
    nothing_runs: Callable[[Sampler], Sampler], options: dict[str, Any], needles: tuple[str, ...]
) -> None:
    sampler = nothing_runs(sampler_of())
    refused(sampler.sample, options, needles)
    refused(sampler.stream, options, needles)


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        *[({"labels": label}, (f"label {label} ", "0 to 3")) for label in (-1, 4, 99, 2**40)],
        ({"labels": [0, 1, 7]}, ("label 7 ", "0 to 3")),
        ({"labels": [0, 1]}, ("(2,)", "3 of them")),
        ({"labels": [[0, 1, 2]]}, ("(1, 3)", "3 of them")),
        ({"labels": []}, ("(0,)", "3 of them")),
        *[({"labels": label}, ("float", "whole number")) for label in ([0.5, 1, 2], torch.zeros(3))],
        *[({"labels": label}, ("bool", "whole number")) for label in (True, [True, False, True])],
        *[({"labels": label}, (f"labels={label!r}", "whole number")) for label in ("x", ["a"] * 3, {}, [None] * 3)],
        ({"labels": [1j, 1, 1]}, ("complex", "whole number")),
        ({"labels": 2**70}, (f"labels={2**70}", "whole number")),
        ({"guidance": 2.0}, ("guidance=2.0", "labels")),
        ({"guidance": [1.0, 1.0, 2.0]}, ("labels",)),
        ({"guidance": [2.0, NAN, 1.0], "labels": 1}, ("finite",)),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_labels(
    nothing_runs: Callable[[Sampler], Sampler], options: dict[str, Any], needles: tuple[str, ...]
) -> None:
    sampler = nothing_runs(sampler_of(TINY_CLASSES))
    refused(sampler.sample, options, needles)
    refused(sampler.stream, options, needles)


def test_labels_are_needed_where_no_class_is_null(nothing_runs: Callable[[Sampler], Sampler]) -> None:
    sampler = nothing_runs(sampler_of(dataclasses.replace(TINY, num_class_embeds=5)))
    refused(sampler.sample, {}, ("class-conditional", "0 to 4"))
    refused(sampler.sample, {"labels": 5}, ("label 5 ", "0 to 4"))
    refused(sampler.sample, {"labels": 1, "guidance": 2.0}, ("null_label",))


def test_a_table_of_learned_variance_needs_the_network(nothing_runs: Callable[[Sampler], Sampler]) -> None:
    table = solvers.ddpm(SCHEDULE, 4, variance="learned_range")
    refused(nothing_runs(sampler_of()).sample, {"solver": table}, ("learned_range", "6 output channels"))


def test_a_network_without_a_size_needs_one(nothing_runs: Callable[[Sampler], Sampler]) -> None:
    config = dataclasses.replace(TINY, sample_size=None)
    refused(nothing_runs(sampler_of(config)).sample, {}, ("sample_size", "size="))


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        *[({"every": every}, (f"every={every!r}", "at least 1")) for every in (0, -1, 1.5, True, None)],
        ({"callback": print}, ("callback", "allowed: batch_size, churn, clip")),
        ({"stepz": 4}, ("stepz", "steps")),
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_stream_options(options: dict[str, Any], needles: tuple[str, ...]) -> None:
    refused(sampler_of().stream, options, needles)  # at the call, before the first event is asked for


@pytest.mark.parametrize(
    ("options", "needles"),
    [
        ({"prediction": "noise"}, ("prediction='noise'", "epsilon, sample, v_prediction")),
        ({"backend": "tensorrt"}, ("backend='tensorrt'", "auto, eager, compiled")),
        ({"determinism": "yes"}, ("determinism='yes'", "seed, bitwise")),
        ({"dtype": "float8"}, ("dtype='float8'", "float32, bfloat16, float16, float64")),
        ({"dtype": torch.int64}, ("torch.int64", "float32")),
        ({"device": "toaster"}, ("device='toaster'",)),
        ({"schedule": "cosine"}, ("schedule='cosine'", "NoiseSchedule")),
        ({"unet": "fashion-mnist"}, ("unet='fashion-mnist'", "from_pretrained")),
        *[
            ({"unet": Probe(), "shape": shape}, (f"shape={shape!r}", "(channels, height, width)"))
            for shape in ((3, 8), (0, 8, 8), [3, 8, 8], (3, 8, 8.0), (3, True, 8), 8)
        ],
        ({"unet": Probe()}, ("shape=(channels, height, width)",)),
        *[
            ({"backend": backend, "determinism": "bitwise"}, (repr(backend), "bitwise", "'seed'"))
            for backend in ("eager", "compiled")
        ],
    ],
    ids=lambda value: str(value)[:60],
)
def test_bad_samplers(options: dict[str, Any], needles: tuple[str, ...]) -> None:
    options = {"unet": random_unet(TINY), "schedule": SCHEDULE} | options
    refused(lambda _, **options: Sampler(options.pop("unet"), options.pop("schedule"), **options), options, needles)


def test_bitwise_is_refused_by_what_cannot_promise_it() -> None:
    with pytest.raises(BackendError, match="depend on the batch"):
        Sampler(Probe(), SCHEDULE, shape=SHAPE, determinism="bitwise")


@pytest.mark.skipif(torch.cuda.is_available(), reason="has the device")
def test_a_device_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="device='cuda'"):
        sampler_of(device="cuda")
    random_unet(TINY).save_pretrained(tmp_path)
    with pytest.raises(InvalidArgument, match="device='cuda'"):
        Sampler.from_pretrained(tmp_path, device="cuda")


def test_class_embeddings_that_no_label_feeds_are_refused() -> None:
    config = dataclasses.replace(TINY, class_embed_type="timestep")
    with pytest.raises(ConfigError, match="class_embed_type='timestep'"):
        sampler_of(config)


def test_a_sampler_works_after_bad_input() -> None:
    sampler = sampler_of()
    with pytest.raises(InvalidArgument):
        sampler.sample(0)
    with pytest.raises(InvalidArgument):
        sampler.sample(1, steps=2, noise=lambda row, indices: None)
    assert torch.equal(sampler.sample(2, steps=2).images, sampler_of().sample(2, steps=2).images)


def test_a_table_as_solver() -> None:
    sampler = sampler_of()
    out = sampler.sample(2, solver=TABLE, seed=3)
    assert out.table is TABLE
    assert isinstance(out.table, StepTable)
    assert torch.equal(out.images, sampler.sample(2, steps=4, seed=3).images)
    assert torch.equal(out.images, sampler.sample(2, solver=TABLE, steps=4, seed=3).images)


@pytest.mark.parametrize("diffusers", [False, True])
def test_networks_that_read_text_are_refused(diffusers):
    """They are also refused before they are called; a module that gives them their text is a network like any other."""
    unet = random_condition(condition_config(), 0)
    with pytest.raises(ConfigError, match=r"cross_attention_dim=\d+: the network reads text"):
        Sampler(diffusers_condition(unet) if diffusers else unet)

    class WithText(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.config = unet, unet.config

        def forward(self, x, t):
            text = torch.ones(len(x), 3, unet.config.cross_attention_dim)
            return self.inner(x, t, text)

    images = Sampler(WithText(), shape=(unet.config.in_channels, 8, 8)).sample(1, steps=2).images
    assert images.isfinite().all()
