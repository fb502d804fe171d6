"""Properties of every solver's table: levels, timesteps, exactness; sigma spacings, EDM, thresholds, the sampler."""

from __future__ import annotations

import ast
import copy
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import os
import pickle
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fastdiff import Sampler, solvers
from fastdiff.core.state import State, TableBank
from fastdiff.core.update import predict_x0, threshold, update
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.sampler.choice import resolve
from fastdiff.sampler.options import Options
from fastdiff.sampler.tables import step_table
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import EDMSchedule, StepTable, sigma_timesteps, timesteps
from fastdiff.solvers.adams import log_weights, sigma_weights
from fastdiff.solvers.phi import phi
from fastdiff.solvers.registry import SOLVERS as REGISTERED
from fastdiff.solvers.unipc import solve_moments
from fastdiff.solvers.walk import Schedule
from tests.core.test_update import network
from tests.support.paths import ROOT
from tests.support.solver_cases import linear_map, runs
from tests.support.trajectories import SCHEDULES, SHAPE, denoiser, draw_noise, gaussian_moments, run
from tests.support.unets import TINY, random_unet

CPU = torch.device("cpu")
LINEAR = SCHEDULES["linear"]
SOLVERS = ("auto", *REGISTERED)
BUILD = {
    "ddim": solvers.ddim,
    "ddpm": solvers.ddpm,
    "dpmpp_1": solvers.dpmpp_1,
    "dpmpp_2m": solvers.dpmpp_2m,
    "dpmpp_2m heun": functools.partial(solvers.dpmpp_2m, solver_type="heun"),
    "dpmpp_3m": solvers.dpmpp_3m,
    "dpmpp_2m_sde": solvers.dpmpp_2m_sde,
    "dpmpp_3m_sde": solvers.dpmpp_3m_sde,
    "dpmpp_2s": solvers.dpmpp_2s,
    "dpmpp_2s heun": functools.partial(solvers.dpmpp_2s, solver_type="heun"),
    "dpmpp_3s": solvers.dpmpp_3s,
    "dpmpp_sde": solvers.dpmpp_sde,
    "dpmpp_2s_ancestral": solvers.dpmpp_2s_ancestral,
    "dpm2": solvers.dpm2,
    "dpm2_ancestral": functools.partial(solvers.dpm2_ancestral, eta=0.7),
    "unipc 1": functools.partial(solvers.unipc, order=1),
    "unipc": solvers.unipc,
    "unipc 3": functools.partial(solvers.unipc, order=3, lower_order_final=False),
    "unipc 3 bh1": functools.partial(solvers.unipc, order=3, solver_type="bh1", corrector=False),
    "euler": solvers.euler,
    "euler_ancestral": solvers.euler_ancestral,
    "heun": solvers.heun,
    "lms": solvers.lms,
    "deis": solvers.deis,
    "deis 3": functools.partial(solvers.deis, order=3, lower_order_final=False),
    "plms": solvers.plms,
}
FINAL = [name for name in BUILD if not name.startswith("dd")]  # these take ``final``
STAGES = ("heun", "dpmpp_sde", "dpmpp_2s_ancestral", "dpm2", "dpm2_ancestral")  # two rows a step
NEED_FINITE = (*STAGES, "plms")


# Every table ----------------------------------------------------------------------------------------------------------


@st.composite
def tables(draw, names=tuple(BUILD)):
    """(name, schedule, table) of any solver, schedule, spacing and number of steps."""
    name = draw(st.sampled_from(names))
    schedule, options = draw(runs(clip=draw(st.sampled_from([None, 1.0]))))
    if name in NEED_FINITE and schedule.rescale_zero_terminal_snr:
        schedule = dataclasses.replace(schedule, rescale_zero_terminal_snr=False)
    if name in FINAL:
        options["final"] = draw(st.sampled_from(["zero", "sigma_min"]))
    if options["steps"] is not None and not schedule.rescale_zero_terminal_snr and draw(st.booleans()):
        options.pop("steps_offset", None)
        options["spacing"] = draw(st.sampled_from(solvers.SIGMA_SPACINGS))
    return name, schedule, options, BUILD[name](schedule, **options)


def table_of(options: Options, schedule: Schedule, prediction: str = "epsilon") -> StepTable:
    """The table of a call with these options, for a model without measurements."""
    return step_table(resolve(options, schedule, None)[0], schedule, prediction, {})


def rows_of(name: str, steps: int, final: str) -> int:
    if name in STAGES:
        return 2 * steps - (final == "zero")
    return steps + (name == "plms" and steps > 1)


@given(tables())
@settings(max_examples=300)
def test_tables_hold_together(case):
    name, schedule, options, table = case
    final = options.get("final", "zero")
    assert table.steps == (len(options["spacing"]) if options["steps"] is None else options["steps"])
    assert len(table) == table.nfe() == rows_of(name, table.steps, final)
    whole = [row for row in table.rows if not row.stage]
    assert len(whole) == table.steps
    assert all(a.t > b.t for a, b in itertools.pairwise(whole))
    assert whole[-1].t >= 0
    for row in table.rows:
        assert row.abar == pytest.approx(schedule.abar(row.t), rel=1e-12, abs=1e-300)
    for row, after in itertools.pairwise(table.rows):
        if not after.stage:
            assert row.abar_next == after.abar
    assert table.rows[-1].abar_next == (1.0 if final == "zero" else schedule.alphas_cumprod[0])
    assert final != "zero" or table.rows[-1].s == 0.0
    assert table.history <= 3
    assert StepTable.from_json(table.to_json()) == table
    assert (table.init_scale, table.data_scale, table.continuous) == (1.0, 1.0, False)


@given(tables())
@settings(max_examples=300)
def test_a_known_image_is_reached_exactly(case):
    """With the true x_0 the state is N(a x_0, s^2) at every level: the mean exactly, and the noise's variance.

    The noise of a deterministic solver is carried on, x = a x_0 + s eps; what is fresh adds to the variance.
    """
    _, _, options, table = case
    prediction = options["prediction"]
    if options["clip"] is not None:
        return
    if table.stochastic and any(row.stage for row in table.rows):
        # The noise of a stage is part of the whole step's, so the moments of both rows are followed together.
        mean, variance = gaussian_moments(table, np.array([1.0, -0.5]), np.zeros(2), prediction)
        end = table.rows[-1].abar_next
        assert mean == pytest.approx(math.sqrt(end) * np.array([1.0, -0.5]), abs=1e-6)
        assert variance == pytest.approx(1.0 - end, abs=1e-6)
        return
    for x0 in (1.0, 0.0):
        first = table.rows[0].abar
        x = math.sqrt(first) * x0 + math.sqrt(1 - first) * (1 - x0)  # x0 = 1: no noise; x0 = 0: noise 1
        m, xs, fresh = [0.0, 0.0, 0.0], 0.0, 0.0
        for row, after in itertools.zip_longest(table.rows, table.rows[1:]):
            a, s = math.sqrt(row.abar), math.sqrt(1 - row.abar)
            out = {"epsilon": (x - a * x0) / s, "sample": x0, "v_prediction": (a * x - x0) / s}[prediction]
            h = row.hx * x + row.ho * out + row.h0 * x0
            new = row.ax * x + row.ao * out + row.a0 * x0 + np.dot([row.a1, row.a2, row.a3], m) + row.as_ * xs
            xs, m = (x if row.save else xs), ([h, *m[:2]] if row.push else m)
            if x0 == 0.0 and row.s and x:
                # Of one row: x had the variance of its level, and goes on with the next one's.
                fresh = (new / x) ** 2 * (1 - row.abar) + row.s**2
                assert fresh == pytest.approx(1 - row.abar_next, abs=1e-7)
                new, m = math.sqrt(1 - row.abar_next), [0.0] * 3
            x = new
            if after is None or not after.stage:
                end = math.sqrt(row.abar_next) * x0 + math.sqrt(1 - row.abar_next) * (1 - x0)
                assert x == pytest.approx(end, abs=1e-6)
                x = end  # so that errors do not add up


@given(tables())
@settings(max_examples=50)
def test_tables_are_values(case):
    table = case[-1]
    for same in (copy.deepcopy(table), pickle.loads(pickle.dumps(table)), dataclasses.replace(table)):
        assert same == table
        assert hash(same) == hash(table)
    assert f"{table.steps} steps, {len(table)} rows" in str(table)


def test_identities():
    """Euler in sigma, DPM-Solver++(1) and DDIM are one; so are the ancestral step, eta = 1 and DDPM's posterior."""
    for clip, prediction in itertools.product((None, 1.0), ("epsilon", "v_prediction")):
        options = {"clip": clip, "prediction": prediction}
        for others, one in [
            (("euler", "dpmpp_1"), solvers.ddim(LINEAR, 20, **options)),
            (("euler_ancestral",), solvers.ddpm(LINEAR, 20, **options)),
        ]:
            for name in others:
                for a, b in zip(BUILD[name](LINEAR, 20, **options).rows, one.rows, strict=True):
                    assert linear_map(a) == pytest.approx(linear_map(b), rel=1e-9, abs=1e-12)
    assert solvers.deis(LINEAR, 9, order=1).rows == solvers.euler(LINEAR, 9).rows
    assert solvers.lms(LINEAR, 9, order=1).rows == solvers.euler(LINEAR, 9).rows


@pytest.mark.parametrize("name", BUILD)
def test_zero_snr(name):
    """A run starts at abar = 0 by a step of order 1, or is refused by name; nothing infinite comes of it."""
    zero = SCHEDULES["zero_snr"]
    with pytest.raises(InvalidArgument, match="zero SNR"):
        BUILD[name](zero, 10)
    if name in NEED_FINITE:
        with pytest.raises(InvalidArgument, match=f"{name} cannot start at zero SNR"):
            BUILD[name](zero, 10, prediction="v_prediction")
        return
    table = BUILD[name](zero, 10, prediction="v_prediction")
    assert table.rows[0].abar == 0.0
    finite = BUILD[name](LINEAR, 10, prediction="v_prediction")
    ends = [
        run([t], denoiser("v_prediction", s), draw_noise(10))[-1] for t, s in ((table, "zero_snr"), (finite, "linear"))
    ]
    assert ends[0].isfinite().all()
    with pytest.raises(InvalidArgument, match="infinite sigma"):
        BUILD[name](zero, 10, prediction="v_prediction", spacing="karras")


BAD = [
    (solvers.dpmpp_2m, {"solver_type": "euler"}, "solver_type='euler' is unknown; allowed: midpoint, heun"),
    (solvers.unipc, {"solver_type": "heun"}, "solver_type='heun' is unknown; allowed: bh1, bh2"),
    *[(solvers.unipc, {"order": o}, f"order={o!r}: 1, 2 or 3") for o in (0, 4, True, "2")],
    *[(solvers.lms, {"order": o}, f"order={o!r}: 1, 2, 3 or 4") for o in (0, 5, True)],
    *[(solvers.deis, {"order": o}, f"order={o!r}: 1, 2 or 3") for o in (0, 4, True)],
    *[(solvers.euler_ancestral, {"eta": e}, f"eta={e!r}: a number from 0 to 1") for e in (-0.1, 1.1, math.nan, "1")],
    (solvers.euler, {"final": "last"}, "final='last' is unknown; allowed: zero, sigma_min"),
    *[(solvers.euler, {"threshold": v}, f"threshold={v!r}") for v in (0.0, 1.5, (0.9, 0.5), (1,) * 3, "x", True)],
    (solvers.euler, {"clip": -1}, "clip=-1"),
    (solvers.euler, {"steps": 0}, "steps=0"),
    (solvers.lcm, {"steps": 51}, "steps=51: a whole number from 1 to 50"),
    (solvers.lcm, {"original_steps": 1001}, "original_steps=1001"),
    (solvers.lcm, {"spacing": "karras"}, "lcm has its own spacing"),
    (solvers.lcm, {"timestep_scaling": 0}, "timestep_scaling=0"),
]


@pytest.mark.parametrize(("build", "options", "said"), BAD)
def test_bad_options(build, options, said):
    with pytest.raises(InvalidArgument) as caught:
        build(LINEAR, **options)
    assert said in str(caught.value)


def test_quadratures_and_phi():
    """Against closed forms, where those do not cancel; sums of the weights are the integrals of 1."""
    assert phi(1, -2.0) == pytest.approx((math.exp(-2) - 1) / -2, rel=1e-14)
    assert phi(2, 0.9999) == pytest.approx(phi(2, 1.0001), rel=1e-4)
    assert phi(3, -1e-8) == pytest.approx(1 / 6, rel=1e-7)
    assert phi(3, -math.inf) == 0.0
    assert sum(log_weights([1.0, 2.0, 3.5], 0.3)) == pytest.approx(math.exp(-0.7) - 1, rel=1e-13)
    assert sum(log_weights([1.0, 2.0], -math.inf)) == pytest.approx(-1.0, rel=1e-13)
    nodes = [2.0, 3.0, 5.0, 9.0]
    for power in range(4):
        exact = (1.0 - 2.0 ** (power + 1)) / (power + 1)
        assert np.dot(sigma_weights(nodes, 1.0), np.power(nodes, power)) == pytest.approx(exact, rel=1e-12)


@settings(max_examples=200)
@given(st.lists(st.integers(-40, 8), min_size=1, max_size=3, unique=True), st.lists(st.integers(-9, 9), min_size=3))
def test_moments_are_solved(r, b):
    """Against rational arithmetic: sum_k rho_k r_k^j is b_j, up to what rounding r and rho costs."""
    r = [Fraction(v, 8) for v in r]
    rho = [Fraction(v) for v in solve_moments([float(v) for v in r], [float(v) for v in b[: len(r)]])]
    for j in range(len(r)):
        terms = [share * v**j for share, v in zip(rho, r, strict=True)]
        assert abs(sum(terms) - b[j]) <= 1e-13 * (max(map(abs, terms)) + 1)


@pytest.mark.slow
def test_a_table_does_not_depend_on_the_linear_algebra_of_the_processor():
    """To the last bit, by which a run that is gone on with elsewhere is known: linear algebra made for another one."""
    code = "import tests.solvers.test_solver_tables as t; print(t.digests())"
    environment = {**os.environ, "OPENBLAS_CORETYPE": "Nehalem", "PYTHONPATH": os.pathsep.join(sys.path)}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert ast.literal_eval(run.stdout) == digests()


def digests() -> dict[str, str]:
    tables = {f"{name}, {n}": BUILD[name](LINEAR, n) for name in BUILD for n in (7, 25)}
    return {name: hashlib.sha256(table.to_json().encode()).hexdigest() for name, table in tables.items()}


# Sigma spacings -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", [LINEAR, SCHEDULES["cosine"], NoiseSchedule("scaled_linear", 50)])
def test_sigma_spacings_are_their_formulas(schedule):
    sigma = np.sqrt(1 / schedule.alphas_cumprod - 1)
    for n in (1, 2, 7, 30):
        i = np.arange(n) / max(n - 1, 1)
        karras = (sigma[-1] ** (1 / 7) + i * (sigma[0] ** (1 / 7) - sigma[-1] ** (1 / 7))) ** 7
        exponential = sigma[-1] * (sigma[0] / sigma[-1]) ** i
        for name, wanted in (("karras", karras), ("exponential", exponential)):
            ts = timesteps(schedule, n, name)
            assert [math.sqrt(1 / schedule.abar(t) - 1) for t in ts] == pytest.approx(wanted.tolist(), rel=1e-9)
            assert ts[0] == schedule.timesteps - 1


def test_listed_sigmas():
    ts = sigma_timesteps(LINEAR, [80.0, 20.0, 3.0, 0.2])
    table = solvers.dpmpp_2m(LINEAR, spacing=ts)
    assert [math.sqrt(1 / row.abar - 1) for row in table.rows] == pytest.approx([80.0, 20.0, 3.0, 0.2], rel=1e-9)
    for bad in ([1e9], [1e-9], [math.nan], ["x"]):
        with pytest.raises(InvalidArgument, match=r"is not a number from 0\.01"):
            sigma_timesteps(LINEAR, bad)
    assert sigma_timesteps(SCHEDULES["zero_snr"], [10.0])[0] < 999
    with pytest.raises(InvalidArgument, match=r"from 0\.01"):
        sigma_timesteps(SCHEDULES["zero_snr"], [1e9])


# EDM ------------------------------------------------------------------------------------------------------------------


def test_edm_is_algorithm_1():
    """Karras et al. 2022, algorithms 1 and table 1, in their own variables and without fastdiff's."""
    schedule = EDMSchedule()
    data, noise = 0.5, draw_noise(1)[0]

    def F(x: Tensor, t: Tensor) -> Tensor:
        return 1.2 * torch.tanh(0.7 * x + 0.3 * t.reshape(-1, 1, 1, 1).to(x.dtype))

    def D(x: Tensor, sigma: float) -> Tensor:
        skip, out = data**2 / (sigma**2 + data**2), sigma * data / math.sqrt(sigma**2 + data**2)
        c_in, c_noise = 1 / math.sqrt(sigma**2 + data**2), math.log(sigma) / 4
        return skip * x + out * F(c_in * x, torch.tensor([c_noise], dtype=torch.float64))

    n = 18
    i = np.arange(n) / (n - 1)
    sigmas = [*((80 ** (1 / 7) + i * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7).tolist(), 0.0]
    x = noise * sigmas[0]
    for sigma, after in itertools.pairwise(sigmas):
        d = (x - D(x, sigma)) / sigma
        new = x + (after - sigma) * d
        if after:
            new = x + (after - sigma) * (d + (new - D(new, after)) / after) / 2
        x = new
    table = solvers.heun(schedule, n, clip=None)
    assert table.nfe() == 35
    ours = run([table], F, torch.stack([noise]))[-1]
    assert (ours - x).abs().max() < 1e-10
    assert min(table.timesteps) < 0
    assert table.continuous
    assert solvers.heun(schedule) == solvers.heun(schedule, 18)


def test_edm_options_are_checked():
    for options in ({"sigma_min": 0}, {"sigma_max": math.inf}, {"sigma_data": "x"}, {"sigma_min": 81.0}):
        with pytest.raises(ConfigError):
            EDMSchedule(**options)
    for options in (
        {"spacing": "trailing"},
        {"steps": 0},
        {"steps": 2.5},
        {"spacing": [1.0, 2.0]},
        {"spacing": []},
        {"spacing": [2.0, -1.0]},
        {"spacing": [2.0], "steps": 2},
    ):
        with pytest.raises(InvalidArgument):
            solvers.euler(EDMSchedule(), **options)
    listed = solvers.dpmpp_3m(EDMSchedule(), spacing=[80.0, 5.0, 0.1], final="sigma_min")
    assert listed.timesteps == tuple(math.log(s) / 4 for s in (80.0, 5.0, 0.1))
    with pytest.raises(InvalidArgument, match="lcm needs a discrete"):
        solvers.lcm(EDMSchedule())
    with pytest.raises(InvalidArgument, match="consistency needs an EDMSchedule"):
        solvers.consistency(LINEAR)
    with pytest.raises(InvalidArgument, match="steps=41"):
        solvers.consistency(steps=41)


def test_discrete_tables_stay_above_zero():
    row = solvers.ddim(LINEAR, 1).rows[0]._replace(t=-0.5)
    with pytest.raises(InvalidArgument, match="out of range"):
        StepTable("x", 1, (row,))
    assert StepTable("x", 1, (row,), continuous=True).timesteps == (-0.5,)
    for changes in ({"continuous": 1}, {"data_scale": 0.0}, {"data_scale": "1"}):
        with pytest.raises(InvalidArgument, match=next(iter(changes))):
            StepTable("x", 1, (row._replace(t=1.0),), **changes)


# Dynamic thresholding -------------------------------------------------------------------------------------------------


def state_of(table: list[StepTable], dtype: torch.dtype = torch.float64, scale: float = 3.0) -> State:
    B = len(table)
    x = scale * draw_noise(B, dtype)[:B, 0]
    state = State.create(x, TableBank(table, CPU, dtype), table=range(B), noise=lambda row: torch.zeros_like(x))
    state.out = draw_noise(B, dtype, seed=1)[:B, 0]
    return state


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
@pytest.mark.parametrize(("ratio", "largest"), [(0.995, 1.5), (0.5, math.inf), (1.0, math.inf), (0.8, 1.0)])
def test_thresholds_are_diffusers(prediction, ratio, largest):
    table = solvers.dpmpp_2m(LINEAR, 10, spacing="karras", prediction=prediction, threshold=(ratio, largest))
    state = state_of([table] * 3)
    state.row, state.row_host = torch.tensor([8, 8, 2]), np.array([8, 8, 2])
    scheduler = DDPMScheduler(dynamic_thresholding_ratio=ratio, sample_max_value=largest)
    plain = dataclasses.replace(
        state, bank=TableBank([dataclasses.replace(table, threshold=None)] * 3, CPU, torch.float64)
    )
    for name in ("kx", "ko"):
        assert (state.column(name) == plain.column(name)).all()
    unbound = state.column("kx").view(-1, 1, 1, 1) * state.x + state.column("ko").view(-1, 1, 1, 1) * state.out
    assert (predict_x0(state) - scheduler._threshold_sample(unbound)).abs().max() < 1e-14
    assert predict_x0(plain).equal(unbound.clamp(-1, 1))


def test_thresholds_are_each_images_own():
    """Tables with and without, images that are finished, and the same image alone."""
    dynamic = solvers.ddim(LINEAR, 5, threshold=0.9, prediction="sample")
    still = solvers.ddim(LINEAR, 5, prediction="sample")
    assert dynamic.threshold == (0.9, math.inf)
    state = state_of([dynamic, still, dynamic, dynamic])
    state.out = 3 * state.out
    state.idle([3])
    threshold(state)
    scale = state.x0_scale
    assert scale[1] == scale[3] == 1.0
    assert (scale[[0, 2]] < 0.5).all()
    alone = state_of([dynamic])
    alone.out = state.out[:1].clone()
    alone.x = state.x[:1].clone()
    update(state)
    update(alone)
    assert state.x[:1].equal(alone.x)
    plain = state_of([still])
    threshold(plain)
    assert plain.x0_scale is None


def test_threshold_tables_are_values():
    for limit in (0.9, (0.995, 2.5)):
        table = solvers.heun(LINEAR, 4, threshold=limit)
        twin = StepTable.from_json(table.to_json())
        json.loads(table.to_json(), parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
        assert twin == table
        assert twin.threshold == table.threshold
        assert "quantile" in str(table)
        assert table != dataclasses.replace(table, threshold=None)
    with pytest.raises(InvalidArgument, match="finite c"):
        dataclasses.replace(solvers.ddim(LINEAR, 4, clip=None), threshold=(0.9, 2.0))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_thresholds_keep_within_the_bound(dtype):
    table = solvers.dpmpp_2m(LINEAR, 10, threshold=0.7)
    states = run([table], denoiser("epsilon"), draw_noise(10, getattr(torch, dtype)))
    assert states[-1].abs().max() <= 1.0 + 1e-6
    free = run([solvers.dpmpp_2m(LINEAR, 10, clip=None)], denoiser("epsilon"), draw_noise(10, getattr(torch, dtype)))
    assert free[-1].abs().max() > 1.05


# Networks that learned their variance ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [name for name in BUILD if name != "ddpm"])
def test_a_learned_variance_is_ignored_by_the_others(name):
    """A network of twice the channels gives the run of its first half; v may be NaN."""
    table = BUILD[name](LINEAR, 5)
    noise = draw_noise(len(table))
    half = denoiser("epsilon")

    def double(x: Tensor, t: Tensor) -> Tensor:
        out = half(x, t)
        return torch.cat([out, torch.full_like(out, math.nan)], dim=1)

    assert not table.learned_variance
    assert run([table], double, noise).equal(run([table], half, noise))


# The native update ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, (0.8, 1.5)], ids=["clip", "threshold"])
def test_the_native_update_runs_every_table(limit):
    """All solvers in one batch, each to its end; every step from where the reference stands."""
    native = pytest.importorskip("tests.backends.test_native_update")
    bound = {"threshold": limit} if limit else {}
    every = [build(LINEAR, 6, **bound) for build in BUILD.values()]
    every += [solvers.lcm(LINEAR, **bound), solvers.heun(EDMSchedule(), 4, **bound), solvers.consistency(steps=3)]
    B = len(every)
    state = State.create(
        draw_noise(B, torch.float32, seed=3)[:B, 0],
        TableBank(every, CPU),
        table=range(B),
        seed=range(B),
        index=range(100, 100 + B),
    )
    for isa in native.native.isas():
        at = native.copy_state(state)
        while not at.done:
            at.out = network(at.x, at.column("t"))
            native.assert_like_reference(at, isa)
            update(at)


# The sampler ----------------------------------------------------------------------------------------------------------


class Toy(nn.Module):
    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        return denoiser("epsilon")(x, t)


def toy(**options: object) -> Sampler:
    return Sampler(Toy(), NoiseSchedule(), shape=SHAPE, backend="eager", **options)


@pytest.mark.parametrize("name", [n for n in REGISTERED if n not in ("ddim", "ddpm", "lcm", "tcd", "consistency")])
def test_the_sampler_runs_every_solver(name):
    sampler = toy()
    z = draw_noise(1, torch.float32)[0]
    out = sampler.sample(1, solver=name, steps=6, noise=z, seed=5, clip=0.9)
    assert out.table == getattr(solvers, name)(LINEAR, 6, clip=0.9)
    assert out.nfe == len(out.table)
    assert out.images.isfinite().all()
    by_table = sampler.sample(1, solver=out.table, noise=z, seed=5)
    assert out.images.equal(by_table.images)
    if not out.table.stochastic:
        best = run([out.table], denoiser("epsilon"), torch.stack([z.double()]))[-1]
        assert (out.images - best).abs().max() < 1e-3
    assert len(sampler.sample(1, solver=name).table.rows) >= 50
    spaced = sampler.sample(1, solver=name, steps=6, spacing="karras").table
    assert spaced.timesteps[1] != int(spaced.timesteps[1])


def test_few_step_solvers():
    assert toy().sample(1, solver="lcm").table == solvers.lcm(LINEAR, 4, clip=1.0)
    assert toy().sample(1, solver="tcd").table == solvers.tcd(LINEAR, 4, clip=1.0)
    edm = Sampler(Toy(), EDMSchedule(time_scale=1000.0), shape=SHAPE, backend="eager")
    assert edm.prediction == "edm"
    # The toy network knows timesteps only, so its t is bounded here.
    edm.unet.forward = lambda x, t: torch.tanh(x)
    assert edm.sample(1, solver="consistency", steps=2).table == solvers.consistency(steps=2)
    for name in ("dpmpp_2m", "heun", "unipc", "auto"):
        out = edm.sample(2, solver=name, steps=5)
        assert out.images.isfinite().all()
        assert out.table.data_scale == 0.5
    with pytest.raises(InvalidArgument, match="consistency needs an EDMSchedule"):
        toy().sample(1, solver="consistency")
    with pytest.raises(InvalidArgument, match="own spacing"):
        edm.sample(1, solver="consistency", spacing="karras")
    events = list(edm.stream(1, solver="euler", steps=3))
    assert events[-1].x0.equal(events[-1].x)  # previews are in the data's units


@pytest.mark.parametrize(
    ("steps", "guided", "name", "order"),
    [
        (5, False, "unipc_3", 3),
        (9, True, "unipc", 2),
        (10, False, "dpmpp_3m", None),
        (None, True, "dpmpp_2m", None),
        (49, True, "dpmpp_2m", None),
        (50, True, "dpmpp_2m_sde", None),
        (249, False, "dpmpp_2m_sde", None),
        (250, False, "ddpm", None),
        (1000, True, "ddpm", None),
    ],
)
def test_the_rule_of_auto(steps, guided, name, order):
    options = Options(solver="auto", steps=steps, guidance=2.0 if guided else 1.0)
    table = table_of(options, LINEAR)
    assert table.solver == name
    assert table.steps == (20 if steps is None else steps)
    if order:
        assert table == solvers.unipc(LINEAR, steps, order=order)


def test_auto_elsewhere():
    edm = table_of(Options(solver="auto"), EDMSchedule(), "edm")
    assert (edm.solver, edm.steps) == ("heun", 18)
    listed = step_table(
        resolve(Options(solver="auto", spacing=[900, 500, 100]), LINEAR, None)[0], LINEAR, "epsilon", {}
    )
    assert (listed.solver, listed.timesteps) == ("unipc_3", (900.0, 500.0, 100.0))
    with pytest.raises(InvalidArgument, match="steps=0"):
        table_of(Options(solver="auto", steps=0), LINEAR)


@pytest.mark.parametrize("name", [n for n in SOLVERS if n not in ("ddim", "auto")])
def test_options_have_owners(name):
    with pytest.raises(InvalidArgument, match=r"eta=0\.5 belongs to solver 'ddim'"):
        toy().sample(1, solver=name, eta=0.5, steps=4)
    if name != "ddpm":
        with pytest.raises(InvalidArgument, match="variance='beta' belongs to solver 'ddpm'"):
            toy().sample(1, solver=name, variance="beta", steps=4)
    if name not in ("unipc", "deis", "lms"):
        with pytest.raises(InvalidArgument, match="order=2 belongs to solver 'unipc' or 'deis' or 'lms', not"):
            toy().sample(1, solver=name, order=2, steps=4)


@pytest.mark.parametrize(("name", "most", "default"), [("unipc", 3, 2), ("deis", 3, 2), ("lms", 4, 4)])
def test_orders_are_options_of_a_call(name, most, default):
    solver = getattr(solvers, name)
    for order in range(1, most + 1):
        table = toy().sample(1, solver=name, order=order, steps=6).table
        assert table == solver(LINEAR, 6, order=order)
        assert (table == toy().sample(1, solver=name, steps=6).table) == (order == default)
    for order in (0, most + 1, 2.5, True, "2"):
        with pytest.raises(InvalidArgument, match="order="):
            toy().sample(1, solver=name, order=order, steps=6)
    # A late start is a new run of the same order over the later timesteps.
    late = Options(solver=name, order=1, steps=6, image=torch.zeros(1, 3, 8, 8), strength=0.5)
    later = solver(LINEAR, 6).timesteps[3:]
    assert table_of(late, LINEAR).rows == solver(LINEAR, order=1, spacing=later).rows


def test_orders_that_nobody_takes():
    with pytest.raises(InvalidArgument, match="order=2 needs a solver by name"):
        toy().sample(1, solver="auto", order=2)
    with pytest.raises(InvalidArgument, match="order=2 cannot change a StepTable"):
        toy().sample(1, solver=solvers.unipc(LINEAR, 4), order=2)


def test_a_models_thresholding_is_kept():
    config = {"thresholding": True, "dynamic_thresholding_ratio": 0.9, "sample_max_value": 1.7}
    sampler = toy(scheduler_config=config)
    assert sampler.sample(1, steps=4).table.threshold == (0.9, 1.7)
    assert sampler.sample(1, steps=4, clip=1.0).table.threshold is None


def test_the_documentation_names_them_all():
    text = (ROOT / "docs" / "sampling.md").read_text(encoding="utf-8")
    for name in (*SOLVERS, *solvers.SPACINGS, *solvers.SIGMA_SPACINGS):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("name", ["heun", "unipc", "dpmpp_2m_sde", "lms", "plms"])
@pytest.mark.parametrize("limit", [None, (0.8, 1.5)], ids=["clip", "threshold"])
def test_the_native_engine_draws_what_eager_draws(name, limit):
    """Whole runs, steps in one call or (with a threshold) in two; fractional timesteps."""
    pytest.importorskip("fastdiff._native")
    unet = random_unet(TINY)
    table = getattr(solvers, name)(LINEAR, 5, spacing="karras", **({"threshold": limit} if limit else {}))
    images = [Sampler(unet, LINEAR, backend=b).sample(3, solver=table, seed=2).images for b in ("native", "eager")]
    assert images[0].isfinite().all()
    assert (images[0] - images[1]).abs().max() < 1e-3


def test_negative_times_reach_the_native_engine():
    pytest.importorskip("fastdiff._native")
    unet = random_unet(TINY)
    images = [
        Sampler(unet, EDMSchedule(), backend=b).sample(2, solver="auto", steps=4).images for b in ("native", "eager")
    ]
    assert (images[0] - images[1]).abs().max() < 1e-3
