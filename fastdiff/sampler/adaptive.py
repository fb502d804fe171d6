"""A table whose steps suit a model: they are tried on a few images, and each is as long as its error allows.

This is k-diffusion's sample_dpm_adaptive as a policy of the host. The levels that it accepts are a table like any
other, so that images drawn with it depend on their seed and index alone.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastdiff.checks import number, one_of, shown
from fastdiff.core import noise
from fastdiff.errors import InvalidArgument, NumericsError
from fastdiff.modes import plain_modes
from fastdiff.sampler.options import TABLE, Options
from fastdiff.sampler.tables import shared_options
from fastdiff.solvers import FlowSchedule, StepTable, VESchedule
from fastdiff.solvers.adaptive import StepSize, dpm_table
from fastdiff.solvers.registry import SOLVERS
from fastdiff.solvers.walk import Level, Walk

if TYPE_CHECKING:
    from fastdiff.sampler.sampler import Sampler

MOST_STEPS = 1000  # trials, after which the tolerances are called too small
FIRST = 0.05  # h of the first trial
OTHERS = ("image", "mask", "strength", "repaint", "guide", "noise")  # options that a search has no use for


def find(sampler: Sampler, n: int, order: int, rtol: float, atol: float, options: dict[str, Any]) -> StepTable:
    """Return the table for `Sampler.adapt`, which describes the arguments."""
    o = Options.named("adapt", options)
    given = dataclasses.replace(o, clip=Options().clip).excluded_by(TABLE) or next(
        (name for name in OTHERS if getattr(o, name) is not None), None
    )
    if given is not None or o.solver != Options().solver:
        raise InvalidArgument(f"adapt chooses the solver and its steps, so {given or 'solver'}= is not for it")
    order = one_of("order", order, (2, 3))
    rtol, atol = number("rtol", rtol, above=0), number("atol", atol, above=0)
    if isinstance(sampler.schedule, (FlowSchedule, VESchedule)):
        kind = type(sampler.schedule).__name__
        raise InvalidArgument(f"adapt is not supported with a {kind}; choose a solver and a number of steps")
    options = {name: value for name, value in options.items() if name != "clip"}  # which the tables contain
    shared = shared_options(o, SOLVERS["heun"], sampler.schedule, sampler.prediction, sampler.scheduler_config)
    common = {name: shared[name] for name in ("prediction", "clip", "threshold")}
    whole = Walk.of(sampler.schedule, 2, spacing="karras", final="sigma_min", **common)
    assert whole.between is not None
    start, end = whole.levels[0].log_sigma, whole.levels[-1].log_sigma_next
    # Trials read and give states as they are: neither scaled to the data, nor to a sample of less noise.
    trial = dataclasses.replace(whole, init_scale=1.0, data_scale=1.0, output_scale=1.0)
    x = _initial(sampler, n, options, dpm_table(dataclasses.replace(trial, levels=whole.levels[:1]), order))
    x = x * whole.init_scale
    before, at, size, found = x, start, StepSize(FIRST, order), [start]
    for _ in range(MOST_STEPS):
        if at <= end + 1e-5:
            return _finished(whole, found, order)
        to = max(end, at - size.h)
        walk = dataclasses.replace(trial, levels=(_level(whole, at, to),))
        low, high = _tried(sampler, walk, x, order, options)
        scale = walk.data_scale * math.hypot(math.exp(to), 1.0) * whole.data_scale  # to the units of x_0 + sigma eps
        last = before * math.hypot(math.exp(at), 1.0) * whole.data_scale
        delta = (rtol * torch.maximum((low * scale).abs(), last.abs())).clamp(min=atol)
        error = float((((low - high) * scale) / delta).square().mean().sqrt())
        if not math.isfinite(error):
            raise NumericsError(f"the images of a step from sigma {math.exp(at):.3g} are not finite")
        if size.accepts(error):
            before, x, at = low, high, to
            found.append(to)
    raise InvalidArgument(
        f"rtol={shown(rtol)}, atol={shown(atol)}: {MOST_STEPS} trials did not reach the image; larger ones do"
    )


def _initial(sampler: Sampler, n: int, options: dict[str, Any], table: StepTable) -> Tensor:
    """Return the initial noise of the images, [n, C, H, W] of unit variance; ``table`` stands for a run's."""
    r = sampler.request(n, **{**options, "solver": table})
    seeds = [noise.as_int64(seed) for seed in r.seeds(range(r.n))]
    with plain_modes():
        s = torch.tensor(seeds, dtype=torch.int64, device="cpu")
        i = torch.tensor(list(r.index), dtype=torch.int64, device="cpu")
        return noise.normal(s, i, torch.zeros_like(i), noise.INITIAL, r.shape)


def _level(walk: Walk, log_sigma: float, log_sigma_next: float) -> Level:
    """Return the level of a step between two noise levels."""
    assert walk.between is not None
    t, abar = walk.between(math.exp(log_sigma))
    return Level(t, abar, walk.between(math.exp(log_sigma_next))[1])


def _finished(walk: Walk, found: Sequence[float], order: int) -> StepTable:
    """Return the table of the accepted levels, with a last step to zero noise."""
    levels = [_level(walk, a, b) for a, b in itertools.pairwise(found)]
    last = _level(walk, found[-1], found[-1])
    return dpm_table(dataclasses.replace(walk, levels=(*levels, last._replace(abar_next=1.0)), output_scale=1.0), order)


def _tried(sampler: Sampler, walk: Walk, x: Tensor, order: int, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Run one step for all images; return its result of one order less, and of ``order``, as states."""
    table = dpm_table(walk, order)
    rows = table.rows
    level, after = walk.levels[0], rows[-1].abar_next
    inputs, eps = [x], []
    run = {**options, "solver": table, "noise": x, "batch_size": len(x)}
    with plain_modes():
        for event in sampler.stream(len(x), **run):
            a, s = math.sqrt(rows[event.row].abar), math.sqrt(1.0 - rows[event.row].abar)
            eps.append((inputs[-1] - a * event.x0.cpu()) / s)
            inputs.append(event.x.cpu())
    a, sigma, sigma_s = math.sqrt(after), math.sqrt((1.0 - after) / after), level.sigma
    low = inputs[0] * (a / level.a) + a * (sigma - sigma_s) * eps[0]
    if order == 3:  # order 2 with the second evaluation at a third
        h = math.log(sigma_s / sigma)
        low = low - a * sigma * 1.5 * math.expm1(h) * (eps[1] - eps[0])
    return low, inputs[-1]
