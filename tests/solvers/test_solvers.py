"""DDPM and DDIM: timesteps and whole runs against diffusers' schedulers, and the distributions that they draw.

Where diffusers departs from the method, a test says which rows differ and why; with that one thing corrected the whole
run must agree.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler
from hypothesis import given
from hypothesis import strategies as st

from fastdiff.core.state import State, TableBank
from fastdiff.core.update import update
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers import COLUMNS, SPACINGS, ddim, ddpm, timesteps
from tests.support.solver_cases import linear_map, runs
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


def is_slow(solver: str, steps: int, prediction: str, dtype: torch.dtype) -> bool:
    """Return whether a run is left to the slow tests: two predictions in three, alternating; most in float32, which
    differs by rounding alone.
    """
    turn = list(SOLVERS).index(solver) + STEPS.index(steps) if steps in STEPS else 0
    often = PREDICTIONS[turn % len(PREDICTIONS)] == prediction and (dtype == torch.float64 or steps in (2, 50))
    return steps in (61, 103, *LONG) or not often


@pytest.mark.parametrize(
    ("solver", "steps", "prediction", "dtype"),
    [
        pytest.param(*case, marks=[pytest.mark.slow] * is_slow(*case))
        for case in itertools.product(SOLVERS, (*STEPS, *LONG), PREDICTIONS, TOLERANCE)
    ],
)
def test_runs_equal_diffusers(solver, steps, prediction, dtype):
    compare(solver, steps, prediction, CASES[solver], dtype)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [pytest.param(n, marks=pytest.mark.slow) for n in LONG])
@pytest.mark.parametrize("solver", SOLVERS)
def test_long_runs_equal_diffusers(solver, steps, prediction):
    """Every value of every option, over the three predictions; all combinations are in the slow test above."""
    start = PREDICTIONS.index(prediction)
    compare(solver, steps, prediction, CASES[solver][start::11])


@pytest.mark.parametrize("schedule", ["cosine", "zero_snr"])
@pytest.mark.parametrize("steps", [2, 10, pytest.param(61, marks=pytest.mark.slow)])
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


PREDICTION_OF = dict(zip(SPACINGS, ["epsilon", "sample", "v_prediction", "epsilon"], strict=True))


@pytest.mark.parametrize(
    ("name", "spacing"),
    [
        pytest.param(name, spacing, marks=[pytest.mark.slow] * ((i + j) % 2))
        for (i, name), (j, spacing) in itertools.product(enumerate(CONVERGING), enumerate(SPACINGS))
    ],
)
def test_gaussians_converge_with_order_1(name, spacing):
    """With the exact score the mean is right at any number of steps and the spread's error halves as steps double."""
    prediction = PREDICTION_OF[spacing]
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
    """The helper notices 1 % in one of 100 rows: it moves the mean or the spread by far more than rounding."""
    table = ddim(FINE, 100, eta=0.5, clip=None)
    right = np.concatenate(gaussian_moments(table, MU, VAR, "epsilon"))
    for name in ("kx", "ko", "ax", "a0", "s"):
        for i in (0, 50, 98):
            row = table.rows[i]._replace(**{name: 1.01 * getattr(table.rows[i], name)})
            wrong = dataclasses.replace(table, rows=(*table.rows[:i], row, *table.rows[i + 1 :]))
            moments = np.concatenate(gaussian_moments(wrong, MU, VAR, "epsilon"))
            assert np.abs(moments - right).max() > 1e-7, (name, i)
