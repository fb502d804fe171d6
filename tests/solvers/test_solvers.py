"""Tables of DDPM and DDIM: whole runs against diffusers' schedulers, the distributions they draw, what they refuse.

Where diffusers departs from the method, a test says which rows differ and why; with that one thing corrected the whole
run must agree.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import itertools
import json
import math
import pickle
import tracemalloc

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st

from fastdiff.core.state import State, TableBank
from fastdiff.core.update import update
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers import COLUMNS, SPACINGS, Row, StepTable, ddim, ddpm, timesteps
from tests.support.trajectories import (
    SCHEDULES,
    PairedDDIM,
    T,
    alphas_cumprod,
    denoiser,
    draw_noise,
    gaussian_moments,
    run,
    run_diffusers,
    to_float64,
)

LINEAR = SCHEDULES["linear"]
STEPS = [1, 2, 7, 10, 50, 61, 103]
LONG = [501, 1000]
TOLERANCE = {torch.float64: 1e-9, torch.float32: 2e-4}
VARIANCES = {"posterior": "fixed_small", "beta": "fixed_large", "learned_range": "learned_range", "none": "fixed_small"}
DIFFUSERS_SCHEDULES = {
    "linear": {},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "zero_snr": {"rescale_betas_zero_snr": True},
}


# Timesteps ------------------------------------------------------------------------------------------------------------


def test_timesteps_are_diffusers():
    """For every number of steps, but for two faults of diffusers.

    "trailing" has one entry too many, t = -1, for 62 numbers of steps: the step of arange is inexact. One step of
    "leading" or "linspace" visits t = 0, so that the network takes pure noise for a nearly clean image.
    """
    stray = []
    for spacing in ("trailing", "leading", "linspace"):
        scheduler = DDPMScheduler(timestep_spacing=spacing)
        for n in range(1, T + 1):
            scheduler.set_timesteps(n)
            theirs = scheduler.timesteps.tolist()
            if len(theirs) > n:
                assert spacing == "trailing"
                assert len(theirs) == n + 1
                assert theirs.pop() == -1
                stray.append(n)
            if n == 1 and spacing != "trailing":
                assert theirs == [0]
                theirs = [T - 1]
            assert timesteps(LINEAR, n, spacing) == theirs, (spacing, n)
    assert len(stray) == 62
    assert stray[:4] == [61, 103, 121, 122]


def test_leading_timesteps_with_an_offset_are_diffusers():
    scheduler = DDPMScheduler(timestep_spacing="leading", steps_offset=1)
    for n in range(2, T):
        scheduler.set_timesteps(n)
        assert timesteps(LINEAR, n, "leading", 1) == scheduler.timesteps.tolist()


def test_trailing_timesteps_are_the_nearest_to_equal_parts():
    """|t + 1 - (T - i T / n)| <= 1/2, in whole numbers; halves may go either way."""
    for n in range(1, T + 1):
        t, i = np.array(timesteps(LINEAR, n, "trailing"), dtype=np.int64), np.arange(n)
        assert (2 * np.abs(n * (t + 1) - T * (n - i)) <= n).all(), n


def test_quadratic_timesteps_are_ermongroups():
    """Its ``[int(s) for s in np.linspace(0, np.sqrt(num_timesteps * 0.8), timesteps) ** 2]`` with no timestep twice."""
    repeats = []
    for n in range(2, T + 1):
        theirs = [int(s) for s in np.linspace(0, np.sqrt(T * 0.8), n) ** 2]
        if len(set(theirs)) < n:
            repeats.append(n)
            for i in range(1, n):
                theirs[i] = max(theirs[i], theirs[i - 1] + 1)
        assert timesteps(LINEAR, n, "quadratic") == theirs[::-1], n
    assert repeats[0] == 30  # 29 (sqrt(800) / 29)^2 > 1 > (sqrt(800) / 29)^2


def test_leading_far_from_noise_is_logged(caplog):
    timesteps(LINEAR, 501, "leading")
    assert "starts at t=500 of 1000" in caplog.text
    caplog.clear()
    timesteps(LINEAR, 50, "leading")
    timesteps(LINEAR, 501, "trailing")
    assert not caplog.text


# Whole runs against diffusers -----------------------------------------------------------------------------------------


def mispaired(ts, steps):
    """The rows for which diffusers' DDIM takes t_prev = t - T // steps to be what is not the next row's timestep.

    The level behind a negative t_prev is the final one, so those count as -1.
    """
    ts = np.array(ts)
    return np.flatnonzero(np.maximum(ts - T // steps, -1) != np.append(ts[1:], -1)).tolist()


def scheduler_options(schedule, prediction, clip, spacing, steps_offset=0):
    return {
        **DIFFUSERS_SCHEDULES[schedule],
        "prediction_type": prediction,
        "clip_sample": clip is not None,
        "clip_sample_range": clip or 1.0,
        "timestep_spacing": "leading" if spacing == "quadratic" else spacing,
        "steps_offset": steps_offset,
    }


def ddpm_reference(table, schedule, prediction, noise, *, variance, spacing, clip, steps_offset=0):
    """DDPMScheduler's run, corrected where it is wrong."""
    scheduler = DDPMScheduler(
        **scheduler_options(schedule, prediction, clip, spacing, steps_offset), variance_type=VARIANCES[variance]
    )
    steps = len(table)
    if spacing == "quadratic" or steps == 1:  # it has no quadratic spacing, and one step starts at the wrong end
        scheduler.set_timesteps(timesteps=[int(t) for t in table.timesteps])
    else:
        scheduler.set_timesteps(steps)
        scheduler.timesteps = scheduler.timesteps[:steps]  # "trailing": the stray t = -1
    if noise.dtype == torch.float64:
        to_float64(scheduler, schedule)
    noise = noise[: steps + 1].clone()
    if variance == "none":
        noise[1:] = 0
    elif variance in ("beta", "learned_range") and table.rows[-1].t > 0:
        noise[-1] = 0  # it adds noise to the finished image, see test_diffusers_adds_noise_to_finished_images
    return run_diffusers(scheduler, denoiser(prediction, schedule, variance == "learned_range"), noise)[:, 0]


def ddim_reference(
    table, schedule, prediction, noise, *, spacing, clip, eps_from, eta, steps_offset=0, set_alpha_to_one=True
):
    """DDIMScheduler's run, corrected where it is wrong."""
    steps = len(table)
    wrong = spacing == "quadratic" or steps == 1 or mispaired(table.timesteps, steps)
    scheduler = (PairedDDIM if wrong else DDIMScheduler)(
        **scheduler_options(schedule, prediction, clip, spacing, steps_offset), set_alpha_to_one=set_alpha_to_one
    )
    scheduler.set_timesteps(steps)
    if wrong:
        scheduler.timesteps = torch.tensor([int(t) for t in table.timesteps])
    if noise.dtype == torch.float64:
        to_float64(scheduler, schedule)
    network = denoiser(prediction, schedule)
    return run_diffusers(scheduler, network, noise, eta=eta, use_clipped_model_output=eps_from == "clipped")[:, 0]


SOLVERS = {"ddpm": (ddpm, ddpm_reference), "ddim": (ddim, ddim_reference)}
CASES = {
    "ddpm": [
        {**spacing, "clip": clip, "variance": variance}
        for spacing, clip, variance in itertools.product(
            [*({"spacing": s} for s in SPACINGS), {"spacing": "leading", "steps_offset": 1}], (1.0, None), VARIANCES
        )
    ],
    "ddim": [
        {**spacing, "clip": clip, "eps_from": eps_from, "eta": eta}
        for spacing, (clip, eps_from), eta in itertools.product(
            [*({"spacing": s} for s in SPACINGS), {"spacing": "leading", "steps_offset": 1, "set_alpha_to_one": False}],
            [(1.0, "clipped"), (0.8, "output"), (None, "output")],
            (0.0, 0.5, 1.0),
        )
    ],
}


def compare(solver, steps, prediction, cases, dtype=torch.float64, schedule="linear"):
    """All cases in one batch, each against its own run of diffusers' scheduler, after every row."""
    build, reference = SOLVERS[solver]
    cases = [case for case in cases if steps < T or not case.get("steps_offset")]  # 999 + 1 is no timestep
    tables = [build(SCHEDULES[schedule], steps, prediction=prediction, **case) for case in cases]
    noise = draw_noise(steps, dtype)
    states = run(tables, denoiser(prediction, schedule, learned=True), noise)
    assert len(states) == steps
    for case, table, ours in zip(cases, tables, states.unbind(1), strict=True):
        theirs = reference(table, schedule, prediction, noise, **case)
        assert theirs.dtype == ours.dtype == dtype
        error = (ours - theirs).abs().max()
        assert error < TOLERANCE[dtype], (case, float(error))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [*STEPS, *(pytest.param(n, marks=pytest.mark.slow) for n in LONG)])
@pytest.mark.parametrize("solver", SOLVERS)
def test_runs_equal_diffusers(solver, steps, prediction, dtype):
    compare(solver, steps, prediction, CASES[solver], dtype)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", LONG)
@pytest.mark.parametrize("solver", SOLVERS)
def test_long_runs_equal_diffusers(solver, steps, prediction):
    """Every value of every option, over the three predictions; all combinations are in the slow test above."""
    start = PREDICTIONS.index(prediction)
    compare(solver, steps, prediction, CASES[solver][start::11])


@pytest.mark.parametrize("schedule", ["cosine", "zero_snr"])
@pytest.mark.parametrize("steps", [2, 10, 61])
@pytest.mark.parametrize("solver", SOLVERS)
def test_runs_of_other_schedules_equal_diffusers(solver, steps, schedule):
    for prediction in PREDICTIONS:
        cases = CASES[solver][1::2] if prediction == "v_prediction" else CASES[solver][::5]
        if schedule == "zero_snr":
            # Epsilon says nothing at zero SNR; eta = 1 takes the root of a rounding error there.
            cases = [case for case in cases if prediction != "epsilon" and case.get("eta") != 1.0]
        if cases:
            compare(solver, steps, prediction, cases, schedule=schedule)


def test_listed_timesteps_equal_diffusers():
    listed = [951, 950, 700, 33, 1]
    noise = draw_noise(len(listed))
    table = ddpm(LINEAR, spacing=listed)
    scheduler = DDPMScheduler()
    scheduler.set_timesteps(timesteps=listed)
    to_float64(scheduler)
    assert (
        run([table], denoiser("epsilon"), noise) - run_diffusers(scheduler, denoiser("epsilon"), noise)
    ).abs().max() < 1e-9


def test_ddpm_mean_is_equation_7():
    """variance="none" by the formula alone (Ho et al. 2020):

    x_p = sqrt(abar_p) beta / (1 - abar_t) x_0 + sqrt(alpha) (1 - abar_p) / (1 - abar_t) x_t
    """
    abar = alphas_cumprod("linear")
    network, noise = denoiser("sample"), draw_noise(10)
    x = noise[0]
    states = run([ddpm(LINEAR, 10, variance="none", prediction="sample")], network, noise)
    ts = list(range(999, 0, -100))
    for t, p, ours in zip(ts, [*ts[1:], None], states, strict=True):
        abar_p = torch.tensor(1.0, dtype=torch.float64) if p is None else abar[p]
        alpha = abar[t] / abar_p
        x0 = network(x, torch.tensor([float(t)])).clamp(-1, 1)
        x = (abar_p.sqrt() * (1 - alpha) * x0 + alpha.sqrt() * (1 - abar_p) * x) / (1 - abar[t])
        assert (x - ours).abs().max() < 1e-12


# Where diffusers is wrong ---------------------------------------------------------------------------------------------

# How many of N rows DDIMScheduler pairs with a wrong t_prev.
MISPAIRED = {
    "trailing": {1: 0, 2: 0, 7: 6, 10: 0, 50: 0, 61: 24, 103: 73, 501: 499, 1000: 0},
    "linspace": {2: 1, 7: 6, 10: 9, 50: 19, 61: 39, 103: 81, 501: 499, 1000: 0},
    "leading": dict.fromkeys([2, 7, 10, 50, 61, 103, 501, 1000], 0),
    "leading, steps_offset=1": {2: 0, 7: 0, 10: 0, 50: 0, 61: 0, 103: 0, 501: 1},
}


def test_number_of_mispaired_rows():
    """No row of "leading" is, none of "trailing" where N divides T; "linspace" is right for 1 and T steps only."""
    for name, counts in MISPAIRED.items():
        spacing, _, offset = name.partition(", steps_offset=")
        for n, count in counts.items():
            assert len(mispaired(timesteps(LINEAR, n, spacing, int(offset or 0)), n)) == count, (name, n)
    right = {
        spacing: [n for n in range(1, T + 1) if not mispaired(timesteps(LINEAR, n, spacing), n)]
        for spacing in ("trailing", "leading", "linspace")
    }
    assert right["trailing"] == [n for n in range(1, T + 1) if T % n == 0]
    assert right["leading"] == list(range(1, T + 1))
    assert right["linspace"] == [1, T]


@pytest.mark.parametrize(("name", "steps"), [(name, n) for name in MISPAIRED for n in (7, 10, 61, 103, 501)])
def test_diffusers_ddim_leaves_the_levels_at_mispaired_rows(name, steps):
    """From x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps and the true eps, DDIM must arrive at the next row's level.

    There the network is told the next row's timestep, so x_p = sqrt(abar_p) x_0 + sqrt(1 - abar_p) eps with abar_p
    that timestep's. Every row of ours arrives (the images of one batch stand at all the rows); of diffusers' rows all
    but the mispaired ones do.
    """
    spacing, _, offset = name.partition(", steps_offset=")
    table = ddim(LINEAR, steps, spacing=spacing, steps_offset=int(offset or 0), clip=None)
    abar = alphas_cumprod("linear")[[int(t) for t in table.timesteps]].reshape(-1, 1, 1, 1)
    following = torch.cat([abar[1:], torch.ones_like(abar[:1])])
    x0, eps = draw_noise(1)
    bank = TableBank([table], torch.device("cpu"), torch.float64)
    state = State.create(abar.sqrt() * x0 + (1 - abar).sqrt() * eps, bank)
    state.row, state.row_host = torch.arange(steps), np.arange(steps)
    state.out = eps.expand_as(state.x)

    scheduler = DDIMScheduler(timestep_spacing=spacing, steps_offset=int(offset or 0), clip_sample=False)
    scheduler.set_timesteps(steps)
    to_float64(scheduler)
    theirs = [scheduler.step(eps, int(t), x[None]).prev_sample for t, x in zip(table.timesteps, state.x, strict=True)]

    update(state)
    right = following.sqrt() * x0 + (1 - following).sqrt() * eps
    assert (state.x - right).abs().max() < 1e-12
    errors = (torch.cat(theirs) - right).abs().amax(dim=(1, 2, 3))
    assert (errors > 1e-6).nonzero().flatten().tolist() == mispaired(table.timesteps, steps)
    assert errors[errors <= 1e-6].numel() == 0 or errors[errors <= 1e-6].max() < 1e-12


def test_diffusers_adds_noise_to_finished_images():
    """DDPMScheduler adds noise where t > 0, but the last row is the last whatever its t: nothing denoises after it.

    With fixed_large and "trailing" the noise left on the image has a standard deviation of 0.076 at 50 steps, of 0.32
    at 10; learned_range leaves what v asks for, fixed_small 1e-10. "leading" with an offset ends above 0 likewise.
    """
    zero = torch.zeros(1, 2, 3, 3, dtype=torch.float64)
    for variance, spacing, offset, steps, std in [
        ("fixed_large", "trailing", 0, 50, 0.07595),
        ("fixed_large", "trailing", 0, 10, 0.3209),
        ("fixed_large", "leading", 1, 50, 0.01483),
        ("learned_range", "trailing", 0, 50, 0.07595),  # v = 1: log beta
        ("fixed_small", "trailing", 0, 50, 1e-10),
        ("fixed_large", "leading", 0, 50, 0.0),
        ("fixed_large", "linspace", 0, 50, 0.0),
        ("fixed_large", "trailing", 0, 1000, 0.0),
    ]:
        scheduler = DDPMScheduler(variance_type=variance, timestep_spacing=spacing, steps_offset=offset)
        scheduler.set_timesteps(steps)
        to_float64(scheduler)
        t = int(scheduler.timesteps[-1])
        scheduler.timesteps = torch.tensor([t])
        out = torch.cat([zero, zero + 1], dim=1) if variance == "learned_range" else zero
        left = run_diffusers(scheduler, lambda x, t, out=out: out, torch.stack([zero, zero + 1]))
        assert float(left.max()) == pytest.approx(std, rel=1e-3, abs=1e-12), (variance, spacing, steps)
    for variance, spacing in itertools.product(VARIANCES, SPACINGS):
        assert ddpm(LINEAR, 50, variance=variance, spacing=spacing).rows[-1].s == 0.0


# Sensitivity ----------------------------------------------------------------------------------------------------------

MUTATED = [
    ("ddpm", "epsilon", {"spacing": "trailing", "clip": 1.0, "variance": "posterior"}),
    ("ddpm", "v_prediction", {"spacing": "linspace", "clip": 1.0, "variance": "learned_range"}),
    ("ddpm", "sample", {"spacing": "leading", "clip": None, "variance": "beta"}),
    ("ddim", "epsilon", {"spacing": "trailing", "clip": 1.0, "eps_from": "clipped", "eta": 0.5}),
    ("ddim", "v_prediction", {"spacing": "quadratic", "clip": 0.8, "eps_from": "output", "eta": 1.0}),
    ("ddim", "sample", {"spacing": "linspace", "clip": 1.0, "eps_from": "output", "eta": 0.0}),
]


def mutants(table, rows):
    """(what, table) with one used coefficient of one row 1 % larger. abar, abar_next are labels, g is guidance's."""
    for i, name in itertools.product(rows, COLUMNS):
        value = getattr(table.rows[i], name)
        if value not in (0.0, math.inf) and name not in ("abar", "abar_next", "g"):
            row = table.rows[i]._replace(**{name: 1.01 * value})
            # "ascending" lifts the check that timesteps fall, and nothing else.
            yield (
                f"{name} of row {i}",
                dataclasses.replace(table, rows=(*table.rows[:i], row, *table.rows[i + 1 :]), ascending=True),
            )
    yield "init_scale", dataclasses.replace(table, init_scale=1.01)


@pytest.mark.parametrize(("solver", "prediction", "options"), MUTATED)
def test_one_percent_of_any_coefficient_shows(solver, prediction, options):
    """The comparison above turns red for every used coefficient of 10 rows, and of early, middle, late rows of 103."""
    build, reference = SOLVERS[solver]
    for steps, rows in ((10, range(10)), (103, (0, 1, 51, 101, 102))):
        table = build(LINEAR, steps, prediction=prediction, **options)
        noise = draw_noise(steps)
        theirs = reference(table, "linear", prediction, noise, **options)
        names, tables = zip(("none", table), *mutants(table, rows), strict=True)
        states = run(tables, denoiser(prediction, learned=True), noise)
        errors = (states - theirs[:, None]).abs().amax(dim=(0, 2, 3, 4)).tolist()
        assert errors[0] < 1e-9
        unseen = [name for name, error in zip(names[1:], errors[1:], strict=True) if not error > 1e-9]
        assert not unseen
        used = {name.split()[0] for name in names}
        assert {"t", "kx" if prediction != "sample" else "ko", "ko", "ax", "a0", "init_scale"} <= used
        assert ("s" in used) == table.stochastic
        assert ("sv" in used) == table.learned_variance
        assert ("c" in used) == (options["clip"] is not None)


def test_levels_that_contradict_are_refused():
    """The labels abar, abar_next are not read by the update; they hold the rows together instead."""
    table = ddim(LINEAR, 10)
    for i, name in itertools.product((0, 5, 9), ("abar", "abar_next")):
        if (i, name) in {(0, "abar"), (9, "abar_next")}:
            continue
        row = table.rows[i]._replace(**{name: 1.01 * getattr(table.rows[i], name)})
        with pytest.raises(InvalidArgument, match="starts at"):
            dataclasses.replace(table, rows=(*table.rows[:i], row, *table.rows[i + 1 :]))


# The posterior --------------------------------------------------------------------------------------------------------


@st.composite
def schedules(draw):
    kind = draw(st.sampled_from(["linear", "scaled_linear", "cosine", "sigmoid", "custom"]))
    zero_snr = draw(st.booleans())
    if kind == "custom":
        betas = draw(st.lists(st.floats(1e-4, 0.3), min_size=1 + zero_snr, max_size=60))
        return NoiseSchedule(kind, betas=betas, rescale_zero_terminal_snr=zero_snr)
    return NoiseSchedule(kind, draw(st.integers(1 + zero_snr, 300)), rescale_zero_terminal_snr=zero_snr)


@st.composite
def runs(draw, clip=None):
    """(schedule, what `ddim` and `ddpm` both take) for any steps that the schedule has."""
    schedule = draw(schedules())
    steps = draw(st.integers(1, schedule.timesteps))
    options = {"spacing": draw(st.sampled_from(SPACINGS)), "steps": steps, "clip": clip}
    options["prediction"] = draw(
        st.sampled_from(PREDICTIONS[1:] if schedule.rescale_zero_terminal_snr else PREDICTIONS)
    )
    if draw(st.booleans()):  # any subset, with a fractional timestep
        subset = draw(st.sets(st.integers(0, schedule.timesteps - 1), min_size=1, max_size=20))
        options |= {"spacing": sorted(subset, reverse=True), "steps": None}
        if len(subset) > 1 and 0 in subset and 1 not in subset:
            options["spacing"][-1] = 0.5
    elif options["spacing"] == "leading":
        room = schedule.timesteps - 1 - (steps - 1) * (schedule.timesteps // steps)
        options["steps_offset"] = draw(st.integers(0, room))
    return schedule, options


def linear_map(row):
    """(coefficient of x, of out, of z) of a row that does not clip."""
    return np.array([row.ax + row.a0 * row.kx, row.ao + row.a0 * row.ko, row.s])


@given(runs())
def test_ddpm_rows_are_the_posterior(case):
    """q(x_p | x_t, x_0), here the product of the Gaussians q(x_p | x_0) q(x_t | x_p) over x_p, not equation 7."""
    schedule, options = case
    for row in ddpm(schedule, **options).rows:
        abar, abar_p = row.abar, row.abar_next
        if abar_p == 1.0:
            assert (row.ax, row.a0, row.s) == (0.0, pytest.approx(1.0), 0.0)
            continue
        alpha = abar / abar_p
        precision = 1 / (1 - abar_p) + alpha / (1 - alpha)
        assert row.s**2 == pytest.approx(1 / precision, rel=1e-9)
        assert row.a0 == pytest.approx(math.sqrt(abar_p) / (1 - abar_p) / precision, rel=1e-9)
        assert row.ax == pytest.approx(math.sqrt(alpha) / (1 - alpha) / precision, rel=1e-9, abs=1e-15)


@given(runs(), st.floats(0, 1), st.sampled_from(["clipped", "output"]))
def test_rows_keep_the_marginal(case, eta, eps_from):
    """x_t ~ q(x_t | x_0) and the true x_0 give x_p ~ q(x_p | x_0): for DDPM's posterior and for DDIM with any eta.

    The larger variance "beta" exceeds it by beta - posterior.
    """
    schedule, options = case
    tables = {
        "posterior": ddpm(schedule, **options),
        "beta": ddpm(schedule, variance="beta", **options),
        "ddim": ddim(schedule, eta=eta, eps_from=eps_from, **options),
    }
    for name, table in tables.items():
        for row in table.rows:
            a, s = math.sqrt(row.abar), math.sqrt(1 - row.abar)
            # out = p x + q x_0 of a network that knows x_0
            p, q = {"epsilon": (1 / s, -a / s), "sample": (0.0, 1.0), "v_prediction": (a / s, -1 / s)}[
                options["prediction"]
            ]
            x, out, z = linear_map(row)
            x, x0 = x + out * p, out * q
            assert x0 + x * a == pytest.approx(math.sqrt(row.abar_next), abs=1e-9), name
            beta = 1 - row.abar / row.abar_next
            excess = beta - beta * (1 - row.abar_next) / (1 - row.abar) if name == "beta" and z else 0.0
            assert x * x * s * s + z * z == pytest.approx(1 - row.abar_next + excess, abs=1e-9), name


@given(runs(), st.sampled_from(["clipped", "output"]))
def test_ddim_with_eta_1_is_ddpm(case, eps_from):
    schedule, options = case
    one, other = ddim(schedule, eta=1.0, eps_from=eps_from, **options), ddpm(schedule, **options)
    assert len(one) == len(other)
    for a, b in zip(one.rows, other.rows, strict=True):
        assert a[:3] == b[:3]
        assert linear_map(a) == pytest.approx(linear_map(b), rel=1e-7, abs=1e-9)


def test_ddim_with_eta_1_over_all_steps_is_ddpm():
    for a, b in zip(ddim(LINEAR, T, eta=1.0, clip=None).rows, ddpm(LINEAR, clip=None).rows, strict=True):
        assert linear_map(a) == pytest.approx(linear_map(b), rel=1e-8, abs=1e-12)


def test_learned_variance_lies_between_posterior_and_beta():
    """v = -1 is the posterior variance, v = 1 beta, and v between is the geometric mean that v weighs."""
    tables = [ddpm(LINEAR, 50, variance=variance) for variance in ("learned_range", "posterior", "beta")]
    for row, small, large in list(zip(*(table.rows for table in tables), strict=True))[:-1]:
        for v in (-1.0, -0.3, 0.0, 1.0, 1.5):
            expected = small.s ** ((1 - v) / 2) * large.s ** ((1 + v) / 2)
            assert row.s * math.exp(row.sv * v) == pytest.approx(expected, rel=1e-12)
        assert row[:13] == small[:13]


# Gaussian targets -----------------------------------------------------------------------------------------------------

MU, VAR = np.array([-0.6, 0.0, 0.4, 0.9]), np.array([0.02, 1.0, 0.3, 0.05])
FINE = NoiseSchedule("linear", 10_000, beta_start=1e-5, beta_end=2e-3)  # close to continuous time

CONVERGING = {
    "ddim, eta=0": functools.partial(ddim, eta=0.0),
    "ddim, eta=0.5": functools.partial(ddim, eta=0.5),
    "ddim, eta=0.5, eps from output": functools.partial(ddim, eta=0.5, eps_from="output"),
    "ddim, eta=1": functools.partial(ddim, eta=1.0),
    "ddpm, posterior": functools.partial(ddpm, variance="posterior"),
    "ddpm, beta": functools.partial(ddpm, variance="beta"),
    "ddpm, learned range": functools.partial(ddpm, variance="learned_range"),
}


def spread_error(table, prediction):
    mean, var = gaussian_moments(table, MU, VAR, prediction)
    assert np.abs(mean - MU).max() < 1e-9
    return np.abs(np.sqrt(var) - np.sqrt(VAR)).max()


@pytest.mark.parametrize(
    ("spacing", "prediction"), list(zip(SPACINGS, ["epsilon", "sample", "v_prediction", "epsilon"], strict=True))
)
@pytest.mark.parametrize("name", CONVERGING)
def test_gaussians_converge_with_order_1(name, spacing, prediction):
    """With the exact score the mean is right at any number of steps and the spread's error halves as steps double."""
    errors = [
        spread_error(CONVERGING[name](FINE, n, spacing=spacing, prediction=prediction, clip=None), prediction)
        for n in (100, 200, 400, 800)
    ]
    assert errors[-1] < 0.007
    orders = np.log2(np.array(errors[:-1]) / errors[1:])
    assert (orders > 0.6).all()
    assert 0.85 < orders[-1] < 1.15


def test_predictions_draw_the_same_gaussian():
    for eps_from in ("clipped", "output"):
        results = [
            gaussian_moments(ddim(LINEAR, 20, eta=0.5, prediction=p, clip=None, eps_from=eps_from), MU, VAR, p)
            for p in PREDICTIONS
        ]
        for mean, var in results:
            assert mean == pytest.approx(results[0][0], abs=1e-9)
            assert var == pytest.approx(results[0][1], rel=1e-9)


def test_the_mean_alone_is_no_sampler():
    """variance="none" finds the mean and loses the spread, however many steps it takes."""
    for n in (100, 800):
        mean, var = gaussian_moments(ddpm(FINE, n, variance="none", clip=None), MU, VAR, "epsilon")
        assert np.abs(mean - MU).max() < 1e-9
        assert (var < 0.01 * VAR).all()


def test_a_wrong_coefficient_misses_the_gaussian():
    """What the helper is worth: 1 % in one of 100 rows moves the mean or the spread by far more than rounding."""
    table = ddim(FINE, 100, eta=0.5, clip=None)
    right = np.concatenate(gaussian_moments(table, MU, VAR, "epsilon"))
    for name in ("kx", "ko", "ax", "a0", "s"):
        for i in (0, 50, 98):
            row = table.rows[i]._replace(**{name: 1.01 * getattr(table.rows[i], name)})
            wrong = dataclasses.replace(table, rows=(*table.rows[:i], row, *table.rows[i + 1 :]))
            moments = np.concatenate(gaussian_moments(wrong, MU, VAR, "epsilon"))
            assert np.abs(moments - right).max() > 1e-7, (name, i)


# Tables ---------------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw):
    schedule, options = draw(runs(clip=draw(st.sampled_from([None, 1.0, 0.5]))))
    if draw(st.booleans()):
        return schedule, options, ddpm(schedule, variance=draw(st.sampled_from(list(VARIANCES))), **options)
    eps_from = draw(st.sampled_from(["clipped", "output"]))
    return schedule, options, ddim(schedule, eta=draw(st.floats(0, 1)), eps_from=eps_from, **options)


@given(tables())
def test_tables_hold_together(case):
    schedule, options, table = case
    listed = options["steps"] is None
    assert len(table) == table.steps == (len(options["spacing"]) if listed else options["steps"])
    ts = table.timesteps
    assert all(a > b for a, b in itertools.pairwise(ts))
    assert ts[-1] >= 0
    last = schedule.timesteps - 1
    if listed:
        assert list(ts) == options["spacing"]
    elif table.steps == 1 or options["spacing"] in ("trailing", "linspace"):
        assert ts[0] == last
    elif options["spacing"] == "leading":
        assert ts[0] == (table.steps - 1) * (schedule.timesteps // table.steps) + options["steps_offset"]
    else:
        assert max(math.floor(0.8 * schedule.timesteps) - 1, table.steps - 1) <= ts[0] <= last
    assert table.init_scale == 1.0
    for row in table.rows:
        assert row.abar == schedule.abar(row.t)
    for row, after in itertools.pairwise(table.rows):
        assert row.abar_next == after.abar
    assert table.rows[-1].abar_next == 1.0
    assert table.rows[-1].s == 0.0
    assert table.history == 0
    assert table.nfe() == len(table)


@given(tables())
@settings(max_examples=50)
def test_tables_are_values(case):
    _, _, table = case
    twin = StepTable.from_json(table.to_json())
    for same in (twin, copy.deepcopy(table), pickle.loads(pickle.dumps(table)), dataclasses.replace(table)):
        assert same == table
        assert hash(same) == hash(table)
        assert same.rows is table.rows or same.coefficients.tobytes() == table.coefficients.tobytes()
    assert len({table, twin}) == 1
    other = dataclasses.replace(table, rows=(table.rows[0]._replace(kx=table.rows[0].kx + 1e-9), *table.rows[1:]))
    assert other != table
    first, names, *lines = str(table).splitlines()
    assert f"{table.solver}: {table.steps} steps" in first
    for i, (row, line) in enumerate(zip(table.rows, lines, strict=True)):
        shown = dict(zip(names.split(), map(float, line.split()), strict=True))
        assert shown.pop("row") == i
        for name in COLUMNS:  # a column of zeros is left out, so is one of infinite bounds
            value = getattr(row, name)
            assert shown.get(name.rstrip("_"), 0.0) == pytest.approx(value if math.isfinite(value) else 0.0, rel=1e-5)


def test_tables_cannot_be_changed():
    table = ddim(LINEAR, 5)
    with pytest.raises(AttributeError):
        table.steps = 6
    with pytest.raises(AttributeError):
        table.rows[0].kx = 1.0
    before = hash(table)
    table.coefficients[:] = 0.0
    assert hash(table) == before
    assert (table.coefficients[:-1, COLUMNS.index("a0")] != 0).all()
    assert isinstance(dataclasses.replace(table, rows=list(table.rows)).rows, tuple)


def test_the_last_row_of_coefficients_is_the_identity():
    table = ddim(LINEAR, 5)
    assert table.coefficients.shape == (6, len(COLUMNS))
    assert table.coefficients[:5].tolist() == [list(row) for row in table.rows]
    identity = dict(zip(COLUMNS, table.coefficients[-1], strict=True))
    assert {name: k for name, k in identity.items() if k} == {
        "t": table.rows[-1].t,
        "abar": 1.0,
        "abar_next": 1.0,
        "c": math.inf,
        "ax": 1.0,
    }


ROW = Row(t=10.0, abar=0.5, abar_next=0.9, kx=1.0, ko=1.0, ax=1.0)
LAST = ROW._replace(t=5.0, abar=0.9, abar_next=1.0)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"rows": ()}, "0 rows"),
        ({"rows": (tuple(ROW), LAST)}, "not a Row"),
        ({"rows": (ROW._replace(kx=math.nan), LAST)}, "kx=nan"),
        ({"rows": (ROW._replace(a1=math.inf), LAST)}, "a1=inf"),
        ({"rows": (ROW._replace(s="1"), LAST)}, "s='1'"),
        ({"rows": (ROW._replace(s=None), LAST)}, "s=None"),
        ({"rows": (ROW._replace(c=math.nan), LAST)}, "c=nan"),
        ({"rows": (ROW._replace(c=-math.inf), LAST)}, "c=-inf"),
        ({"rows": (ROW._replace(c=0.0), LAST)}, "c=0.0"),
        ({"rows": (ROW._replace(c=-1.0), LAST)}, "c=-1.0"),
        ({"rows": (ROW._replace(abar=1.0), LAST)}, "abar=1.0"),
        ({"rows": (ROW._replace(abar=-0.1), LAST)}, "abar=-0.1"),
        ({"rows": (ROW, LAST._replace(abar_next=1.1))}, "1.1"),
        ({"rows": (ROW, LAST._replace(t=-1.0))}, "t=-1.0"),
        ({"rows": (ROW, LAST._replace(t=10.0))}, "10.0, 10.0"),
        ({"rows": (ROW, LAST._replace(t=11.0))}, "10.0, 11.0"),
        ({"rows": (ROW, LAST._replace(abar=0.8))}, "starts at 0.8"),
        ({"rows": (ROW._replace(push=0.5), LAST)}, "push=0.5"),
        ({"rows": (ROW._replace(save=2.0), LAST)}, "save=2.0"),
        ({"solver": 3}, "solver=3"),
        ({"steps": 0}, "steps=0"),
        ({"steps": 2.0}, "steps=2.0"),
        ({"steps": True}, "steps=True"),
        ({"init_scale": 0.0}, "init_scale=0.0"),
        ({"init_scale": math.nan}, "init_scale=nan"),
        ({"init_scale": "1"}, "init_scale='1'"),
        ({"ascending": 1}, "ascending=1"),
    ],
)
def test_bad_tables_are_refused(change, said):
    good = {"solver": "x", "steps": 2, "rows": (ROW, LAST)}
    assert len(StepTable(**good)) == 2
    with pytest.raises(InvalidArgument) as caught:
        StepTable(**{**good, **change})
    assert said in str(caught.value)


def test_stages_and_ascending_tables_are_possible():
    stage = LAST._replace(t=10.0, abar=0.5, stage=1.0)
    assert len(StepTable("heun", 1, (ROW, stage))) == 2
    upward = (LAST._replace(abar_next=0.5), ROW)
    assert len(StepTable("inversion", 2, upward, ascending=True)) == 2
    with pytest.raises(InvalidArgument, match="must fall"):
        StepTable("inversion", 2, upward)


def edited(**changes):
    return json.dumps({**json.loads(StepTable("x", 2, (ROW, LAST)).to_json()), **changes})


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[1, 2]",
        "null",
        "{}",
        "[" * 100_000,
        edited(format=2),
        edited(columns=["t"]),
        edited(rows=[]),
        edited(rows=[[1.0, 2.0]]),
        edited(rows=[["a"] * len(COLUMNS)]),
        edited(rows=[[*ROW[:3], None, *ROW[4:5], None, *ROW[6:]]]),  # null is c's alone
        edited(rows=[[*ROW[:3], 10**400, *ROW[4:5], None, *ROW[6:]]]),
        edited(rows=5),
        edited(steps="2"),
        edited(steps=[2]),
        edited(solver=None),
        edited(init_scale=None),
        edited(ascending="no"),
    ],
    ids=range(18),
)
def test_bad_json_is_refused(text):
    with pytest.raises(InvalidArgument):
        StepTable.from_json(text)


def test_json_is_exact():
    row = ROW._replace(kx=1 / 3, ko=-2e-17, s=5e-324, sv=-0.0, c=0.1 + 0.2)
    table = StepTable("x", 2, (row, LAST), init_scale=math.pi, ascending=True)
    twin = StepTable.from_json(table.to_json())
    assert twin == table
    assert twin.coefficients.tobytes() == table.coefficients.tobytes()
    assert math.isinf(twin.rows[1].c)
    json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


# Guidance -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("interval", "guided"),
    [
        ((0, 1), range(10)),
        ((0.25, 0.75), range(3, 7)),
        ((0.3, 0.7), range(3, 7)),
        ((0.0, 0.05), ()),
        ((1, 1), ()),
        ((0, 0.1), [0]),
    ],
)
def test_guidance_interval(interval, guided):
    """The rows that diffusers' pipelines guide: not i / N < start or (i + 1) / N > end."""
    table = ddim(LINEAR, 10).with_guidance_interval(*interval)
    start, end = interval
    assert [i for i, row in enumerate(table.rows) if row.g] == list(guided)
    assert list(guided) == [i for i in range(10) if not (i / 10 < start or (i + 1) / 10 > end)]
    assert {row.g for row in table.rows} <= {0.0, 1.0}
    assert table.nfe() == 10
    assert table.nfe(guided=True) == 10 + len(guided)
    plain = [row._replace(g=1.0) for row in table.rows]
    assert plain == list(ddim(LINEAR, 10).rows)


@pytest.mark.parametrize(
    "interval", [(-0.1, 1), (0, 1.1), (0.6, 0.4), (math.nan, 1), (0, math.nan), ("0", 1), (0, None), (True, 1)]
)
def test_bad_guidance_intervals(interval):
    with pytest.raises(InvalidArgument, match="0 <= start <= end <= 1") as caught:
        ddim(LINEAR, 10).with_guidance_interval(*interval)
    assert repr(interval[0]) in str(caught.value)
    assert repr(interval[1]) in str(caught.value)


# Bad input ------------------------------------------------------------------------------------------------------------

BOTH = [
    ({"steps": 0}, "steps=0: a whole number from 1 to 1000"),
    ({"steps": -1}, "steps=-1: a whole number from 1 to 1000"),
    ({"steps": 1001}, "steps=1001: a whole number from 1 to 1000"),
    ({"steps": 10**9}, "steps=1000000000: a whole number from 1 to 1000"),
    ({"steps": 1e9}, "steps=1000000000.0: a whole number"),
    ({"steps": 2.5}, "steps=2.5: a whole number"),
    ({"steps": True}, "steps=True: a whole number"),
    ({"steps": "50"}, "steps='50': a whole number"),
    ({"steps": math.nan}, "steps=nan: a whole number"),
    ({"clip": 0}, "clip=0: a positive number or None"),
    ({"clip": -1.0}, "clip=-1.0: a positive number or None"),
    ({"clip": math.nan}, "clip=nan: a positive number or None"),
    ({"clip": "x"}, "clip='x': a positive number or None"),
    ({"clip": True}, "clip=True: a positive number or None"),
    ({"spacing": "sine"}, "spacing='sine' is unknown; allowed: trailing, leading, linspace, quadratic, karras, expo"),
    ({"spacing": 5}, "spacing=5: allowed are trailing"),
    ({"spacing": []}, "no timesteps; at least one"),
    ({"spacing": [0, 500]}, "must fall, got 0 before 500"),
    ({"spacing": [500, 500]}, "must fall, got 500 before 500"),
    ({"spacing": [1000, 0]}, "timestep 1000 is not a number from 0 to 999"),
    ({"spacing": [999, -1]}, "timestep -1 is not a number from 0 to 999"),
    ({"spacing": [999, math.nan]}, "timestep nan is not a number from 0 to 999"),
    ({"spacing": [math.inf]}, "timestep inf is not a number from 0 to 999"),
    ({"spacing": ["999"]}, "timestep '999' is not a number"),
    ({"spacing": [True]}, "timestep True is not a number"),
    ({"spacing": [[999]]}, "timestep [999] is not a number"),
    ({"spacing": [999, 0], "steps": 3}, "steps=3, but spacing lists 2"),
    ({"spacing": [999], "steps": True}, "steps=True, but spacing lists 1"),
    ({"spacing": np.zeros((2, 2))}, "timestep [0.0, 0.0] is not a number"),
    ({"spacing": [999, 0], "steps_offset": 1}, "steps_offset=1 goes with spacing='leading'"),
    ({"spacing": "trailing", "steps_offset": 1}, "steps_offset=1 goes with spacing='leading', not 'trailing'"),
    ({"spacing": "leading", "steps_offset": 20, "steps": 50}, "steps_offset=20: 0 to 19 is possible with 50 steps"),
    ({"spacing": "leading", "steps_offset": -1, "steps": 50}, "steps_offset=-1: 0 to 19"),
    ({"spacing": "leading", "steps_offset": 0.5, "steps": 50}, "steps_offset=0.5: 0 to 19"),
    ({"spacing": "leading", "steps_offset": True, "steps": 50}, "steps_offset=True: 0 to 19"),
    ({"spacing": "leading", "steps_offset": 1000, "steps": 1}, "steps_offset=1000: 0 to 999"),
    ({"prediction": "eps"}, "prediction='eps' is unknown; allowed: epsilon, sample, v_prediction, edm"),
]
DDIM_ONLY = [
    ({"eta": math.nan}, "eta=nan: 0 or a positive number"),
    ({"eta": -1}, "eta=-1: 0 or a positive number"),
    ({"eta": -1e-9}, "eta=-1e-09: 0 or a positive number"),
    ({"eta": math.inf}, "eta=inf: 0 or a positive number"),
    ({"eta": True}, "eta=True: 0 or a positive number"),
    ({"eta": "1"}, "eta='1': 0 or a positive number"),
    ({"eta": None}, "eta=None: 0 or a positive number"),
    ({"eta": 5.0}, "eta=5.0: more noise than the level"),
    ({"eps_from": "x0"}, "eps_from='x0' is unknown; allowed: clipped, output"),
]
DDPM_ONLY = [
    ({"variance": "fixed_small"}, "variance='fixed_small' is unknown; allowed: posterior, beta, none, learned_range"),
    ({"variance": None}, "variance=None is unknown; allowed: posterior"),
]


@pytest.mark.parametrize(
    ("solver", "options", "said"),
    [(solver, *case) for solver in (ddim, ddpm) for case in BOTH]
    + [(ddim, *case) for case in DDIM_ONLY]
    + [(ddpm, *case) for case in DDPM_ONLY],
)
def test_bad_input(solver, options, said):
    """Refused with the value and what is allowed, before anything is built for it."""
    tracemalloc.start()
    try:
        with pytest.raises(InvalidArgument) as caught:
            solver(LINEAR, **options)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert said in str(caught.value)
    assert peak < 1 << 20


def test_zero_snr_refuses_epsilon_and_repeated_levels():
    zero = SCHEDULES["zero_snr"]
    for solver in (ddim, ddpm):
        with pytest.raises(InvalidArgument, match=r"prediction='epsilon'.*'v_prediction'"):
            solver(zero, 10)
        # Between T-2 and T-1 every level is 0.
        with pytest.raises(InvalidArgument, match=r"999\.0 and 998\.5 have the same noise level"):
            solver(zero, spacing=[999, 998.5], prediction="v_prediction")
        assert solver(zero, spacing=[998, 5]).rows[0].abar > 0


def test_what_is_accepted():
    """Numbers of every kind, lists of every kind, defaults."""
    assert ddim(LINEAR, np.int64(7), eta=np.float32(0.5), clip=np.float32(2)) == ddim(LINEAR, 7, eta=0.5, clip=2.0)
    listed = ddim(LINEAR, spacing=[999, 500.5, 0])
    assert listed.timesteps == (999.0, 500.5, 0.0)
    for spacing in ((999, 500.5, 0), np.array([999, 500.5, 0]), torch.tensor([999, 500.5, 0])):
        assert ddim(LINEAR, spacing=spacing) == ddim(LINEAR, 3, spacing=spacing) == listed
    assert ddim(LINEAR) == ddim(LINEAR, 50)
    assert ddim(NoiseSchedule(timesteps=20)) == ddim(NoiseSchedule(timesteps=20), 20)
    assert ddpm(LINEAR) == ddpm(LINEAR, 1000)
    assert len(ddpm(LINEAR, spacing=[999, 0])) == 2
    assert ddim(LINEAR, 50, clip=math.inf) == ddim(LINEAR, 50, clip=None)
    assert ddim(LINEAR, 1, spacing="leading", steps_offset=1).timesteps == (999.0,)
    # abar_0 is where latent models end: a row at t = 0 then has nothing left to do but to clip.
    last = ddim(LINEAR, 10, spacing="leading", set_alpha_to_one=False, clip=None).rows[-1]
    assert last.abar == last.abar_next == LINEAR.alphas_cumprod[0]
    assert linear_map(last) == pytest.approx([1.0, 0.0, 0.0], abs=1e-12)
