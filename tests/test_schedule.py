"""Noise schedules against diffusers, against extended precision, and against Bayes' rule."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import pickle

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from hypothesis import assume, given
from hypothesis import strategies as st

import fastdiff
from fastdiff.errors import ConfigError, InvalidArgument
from fastdiff.schedule import DIFFUSERS_KINDS, MAX_TIMESTEPS, NoiseSchedule, posterior

NAN, INF = float("nan"), float("inf")
CUSTOM = (0.01, 0.02, 0.3, 0.05, 0.5)
SCHEDULES = {
    "linear": NoiseSchedule(),
    "linear of 1": NoiseSchedule(timesteps=1),
    "linear of 4000": NoiseSchedule(timesteps=4000, beta_start=2.5e-5, beta_end=0.005),
    "constant": NoiseSchedule(timesteps=50, beta_start=0.03, beta_end=0.03),
    "scaled_linear": NoiseSchedule("scaled_linear", 1000, 0.00085, 0.012),
    "cosine": NoiseSchedule("cosine"),
    "cosine of 100": NoiseSchedule("cosine", 100),
    "sigmoid": NoiseSchedule("sigmoid"),
    "custom": NoiseSchedule("custom", betas=CUSTOM),
    "linear to zero SNR": NoiseSchedule(rescale_zero_terminal_snr=True),
    "scaled_linear to zero SNR": NoiseSchedule("scaled_linear", 500, 0.00085, 0.012, rescale_zero_terminal_snr=True),
    "cosine to zero SNR": NoiseSchedule("cosine", 300, rescale_zero_terminal_snr=True),
    "custom to zero SNR": NoiseSchedule("custom", betas=CUSTOM, rescale_zero_terminal_snr=True),
    "two steps to zero SNR": NoiseSchedule(timesteps=2, rescale_zero_terminal_snr=True),
}
each_schedule = pytest.mark.parametrize("schedule", SCHEDULES.values(), ids=SCHEDULES)


# Values ---------------------------------------------------------------------------------------------------------------


@each_schedule
def test_equals_diffusers(schedule):
    """diffusers computes in float32; with rescaling it takes roots, squares, quotients and products of these."""
    theirs = DDPMScheduler(**schedule.to_scheduler_config())
    assert len(theirs) == schedule.timesteps
    rescaled = schedule.rescale_zero_terminal_snr
    difference = schedule.alphas_cumprod - theirs.alphas_cumprod.double().numpy()
    assert np.abs(difference).max() <= (2e-6 if rescaled else 5e-7)
    difference = schedule.variances - theirs.betas.double().numpy()
    assert np.abs(difference).max() <= (2e-3 if rescaled else 5e-7)
    assert (schedule.alphas_cumprod[-1] == 0.0) == rescaled


def oracle(schedule: NoiseSchedule) -> np.ndarray:
    """abar by loops in extended precision (80 bits on x86), from the docstring's formulas."""
    L = np.longdouble
    T, a, b = schedule.timesteps, L(schedule.beta_start), L(schedule.beta_end)
    u = [L(i) / L(max(T - 1, 1)) for i in range(T)]
    if schedule.kind == "linear":
        betas = [a + (b - a) * x for x in u]
    elif schedule.kind == "scaled_linear":
        betas = [(np.sqrt(a) + (np.sqrt(b) - np.sqrt(a)) * x) ** 2 for x in u]
    elif schedule.kind == "sigmoid":
        betas = [a + (b - a) / (1 + np.exp(6 - 12 * x)) for x in u]
    elif schedule.kind == "cosine":
        pi = L("3.14159265358979323846264338327950288")
        f = [np.cos((L(i) / T + L("0.008")) / L("1.008") * pi / 2) ** 2 for i in range(T + 1)]
        betas = [min(1 - f[i + 1] / f[i], L("0.999")) for i in range(T)]
    else:
        betas = [L(x) for x in schedule.betas]
    abar, product = [], L(1)
    for beta in betas:
        product = product * (1 - beta)
        abar.append(product)
    if schedule.rescale_zero_terminal_snr:
        first, last = np.sqrt(abar[0]), np.sqrt(abar[-1])
        abar = [((np.sqrt(x) - last) * first / (first - last)) ** 2 for x in abar]
    return np.array(abar, dtype=np.longdouble)


@each_schedule
def test_equals_extended_precision(schedule):
    expected = oracle(schedule)
    assert schedule.alphas_cumprod.dtype == np.float64
    assert schedule.alphas_cumprod.shape == (schedule.timesteps,)
    assert np.abs(schedule.alphas_cumprod - expected).max() <= 1e-14
    previous = np.concatenate([[np.longdouble(1)], expected[:-1]])
    assert np.abs(schedule.alphas - expected / previous).max() <= 1e-12
    assert np.abs(schedule.variances - (1 - expected / previous)).max() <= 1e-12
    snr = expected / (1 - expected)
    assert (np.abs(schedule.snr - snr) <= 1e-9 * snr).all()
    assert (np.diff(np.concatenate([[1.0], schedule.alphas_cumprod])) < 0).all()


def test_known_values():
    """Ho et al.'s schedule: the first steps by hand, the end as published (abar_T about 4.04e-5)."""
    s = NoiseSchedule()
    step = (0.02 - 1e-4) / 999
    assert s.alphas_cumprod[0] == 1 - 1e-4
    assert s.alphas_cumprod[1] == pytest.approx((1 - 1e-4) * (1 - 1e-4 - step), rel=1e-15)
    assert s.alphas_cumprod[-1] == pytest.approx(4.0358e-5, rel=1e-4)
    assert s.snr[0] == pytest.approx(9999.0, rel=1e-10)
    assert fastdiff.NoiseSchedule is NoiseSchedule
    assert NoiseSchedule("cosine").variances.max() == pytest.approx(0.999, abs=1e-12)
    assert NoiseSchedule(timesteps=1).alphas_cumprod.tolist() == [1 - 1e-4]


@each_schedule
def test_configuration_round_trip(schedule):
    config = json.loads(json.dumps(schedule.to_scheduler_config()))
    assert NoiseSchedule.from_scheduler_config(config) == schedule
    theirs = json.loads(DDPMScheduler(**config).to_json_string())
    assert NoiseSchedule.from_scheduler_config(theirs) == schedule


def test_missing_scheduler_keys_have_diffusers_defaults():
    assert NoiseSchedule.from_scheduler_config({}) == NoiseSchedule()
    assert NoiseSchedule.from_scheduler_config({"trained_betas": None, "clip_sample": True}) == NoiseSchedule()
    config = {k: v for k, v in DDPMScheduler().config.items() if not k.startswith("_")}
    assert NoiseSchedule.from_scheduler_config(config) == NoiseSchedule()
    assert config.items() >= NoiseSchedule().to_scheduler_config().items()


def test_trained_betas_win():
    config = {"trained_betas": list(CUSTOM), "beta_schedule": "linear", "num_train_timesteps": 1000}
    schedule = NoiseSchedule.from_scheduler_config(config)
    assert schedule.kind == "custom"
    assert schedule.timesteps == 5
    assert schedule.betas == CUSTOM
    assert np.abs(schedule.variances - CUSTOM).max() < 1e-15


@each_schedule
def test_from_alphas_cumprod(schedule):
    if schedule.rescale_zero_terminal_snr:
        with pytest.raises(ConfigError, match=rf"alphas_cumprod\[{schedule.timesteps - 1}\]=0.0: .*above 0"):
            NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod)
        return
    again = NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod)
    assert again.kind == "custom"
    assert again.timesteps == schedule.timesteps
    assert np.abs(again.alphas_cumprod - schedule.alphas_cumprod).max() < 1e-14
    assert np.abs(again.alphas_cumprod / schedule.alphas_cumprod - 1).max() < 1e-12
    assert NoiseSchedule.from_alphas_cumprod(schedule.alphas_cumprod.tolist()) == again


@pytest.mark.parametrize(
    ("abar", "index", "value"),
    [
        ([1.0, 0.5], 0, 1.0),
        ([0.9, 0.9], 1, 0.9),
        ([0.5, 0.6, 0.2], 1, 0.6),
        ([0.5, 0.0, 0.0], 1, 0.0),
        ([0.5, -0.1], 1, -0.1),
        ([NAN, 0.5], 0, NAN),
        ([0.5, NAN, 0.2], 1, NAN),
        ([INF], 0, INF),
        (["0.5"], 0, "0.5"),
        (np.array([[0.5, 0.2]]), 0, "0.5"),
    ],
    ids=str,
)
def test_bad_alphas_cumprod(abar, index, value):
    with pytest.raises(ConfigError) as caught:
        NoiseSchedule.from_alphas_cumprod(abar)
    assert f"alphas_cumprod[{index}]=" in str(caught.value)
    assert str(value) in str(caught.value)


def test_empty_alphas_cumprod():
    with pytest.raises(ConfigError, match="timesteps=0"):
        NoiseSchedule.from_alphas_cumprod([])


# Between the timesteps ------------------------------------------------------------------------------------------------


@each_schedule
def test_abar_at_any_time(schedule):
    table, last = schedule.alphas_cumprod, schedule.timesteps - 1
    assert schedule.abar(-1) == 1.0
    for t in {0, last // 2, last}:
        assert schedule.abar(t) == table[t]
        assert schedule.abar(float(t)) == table[t]
        assert schedule.abar(np.int64(t)) == table[t]
    for t in {0, last // 2, last - 1} - {-1, last}:
        for w in (0.25, 0.5, 0.999):
            got = schedule.abar(t + w)
            if table[t + 1] > 0:
                assert math.log(got) == pytest.approx(
                    (1 - w) * math.log(table[t]) + w * math.log(table[t + 1]), rel=1e-9
                )
            else:
                assert got == 0.0
    for t in (-0.5, -2, last + 0.001, last + 1, NAN, INF, -INF):
        with pytest.raises(InvalidArgument, match=rf"{t} .*0 .. {last}"):
            schedule.abar(t)


# The forward process --------------------------------------------------------------------------------------------------


def images(shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x0 = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
    return x0, torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("shape", [(4,), (4, 7), (4, 3, 5, 6), (4, 2, 3, 2, 3)], ids=str)
@each_schedule
def test_add_noise_is_the_formula(schedule, shape):
    x0, noise = images(shape)
    last = schedule.timesteps - 1
    t = torch.tensor([0, last // 3, last, last // 2])
    abar = schedule.alphas_cumprod[t.numpy()].reshape(-1, *[1] * (len(shape) - 1))
    expected = np.sqrt(abar) * x0.numpy() + np.sqrt(1 - abar) * noise.numpy()
    got = schedule.add_noise(x0, noise, t)
    assert got.dtype == torch.float64
    assert np.abs(got.numpy() - expected).max() <= 1e-15
    single = schedule.add_noise(x0.float(), noise.float(), t.int())
    assert single.dtype == torch.float32
    assert np.abs(single.double().numpy() - expected).max() <= 1e-6


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_add_noise_on_cuda():
    (x0, noise), t = images((3, 2, 4, 4)), torch.tensor([0, 500, 999])
    expected = NoiseSchedule().add_noise(x0, noise, t)
    for index in (t, t.cuda()):
        got = NoiseSchedule().add_noise(x0.cuda(), noise.cuda(), index)
        assert got.device.type == "cuda"
        assert (got.cpu() - expected).abs().max() < 1e-14


def test_add_noise_equals_diffusers():
    x0, noise = images((5, 3, 8, 8))
    t = torch.tensor([0, 1, 300, 998, 999])
    expected = DDPMScheduler().add_noise(x0.float(), noise.float(), t)
    assert (NoiseSchedule().add_noise(x0.float(), noise.float(), t) - expected).abs().max() < 1e-5


@pytest.mark.parametrize(
    ("dtype", "silent"), [(torch.float16, [0, 1]), (torch.bfloat16, [0, 1, 5, 9])], ids=["float16", "bfloat16"]
)
def test_half_precision_gets_its_noise(dtype, silent):
    """Where abar_t rounds to 1 in half precision, the formula evaluated in it adds nothing; ours is right to the
    rounding of its result."""
    schedule = NoiseSchedule()
    shape = (1, 1, 512, 512)
    x0, noise = images(shape)
    x0, noise = (x0 * 0.01).to(dtype), noise.to(dtype)  # small images: rounding them hides no noise
    for t in [*silent, 30, 500, 999]:
        index = torch.tensor([t])
        truth = schedule.add_noise(x0.double(), noise.double(), index)
        got = schedule.add_noise(x0, noise, index)
        assert got.dtype == dtype
        error = (got.double() - truth).abs()
        assert (error <= torch.finfo(dtype).eps / 2 * truth.abs() + 1e-6).all()
        added = got.double() - math.sqrt(schedule.abar(t)) * x0.double()
        variance, n = 1 - schedule.abar(t), x0.numel()
        assert added.var() == pytest.approx(variance, rel=5 * math.sqrt(2 / n) + 1e-3)
        assert abs(added.mean()) < 5 * math.sqrt(variance / n)

        abar = torch.tensor(schedule.alphas_cumprod).to(dtype)[index]
        naive = abar.sqrt() * x0 + (1 - abar).sqrt() * noise
        if t in silent:
            assert torch.equal(naive, x0)


@pytest.mark.parametrize("t", [-1, 1000, -1000, 1 << 40])
def test_timesteps_out_of_range(t):
    x0, noise = images((2, 3))
    with pytest.raises(InvalidArgument, match=f"timestep {t} .*0 .. 999"):
        NoiseSchedule().add_noise(x0, noise, torch.tensor([5, t]))


@pytest.mark.parametrize(
    "t",
    [
        torch.tensor([0.0, 1.0]),
        torch.tensor([True, False]),
        torch.tensor([0, 1], dtype=torch.uint8),  # torch would take these two for masks
        torch.tensor([0, 1, 2]),
        torch.tensor([0]),
        torch.tensor(0),
        torch.tensor([[0], [1]]),
    ],
    ids=str,
)
def test_bad_timestep_tensors(t):
    x0, noise = images((2, 3))
    with pytest.raises(InvalidArgument) as caught:
        NoiseSchedule().add_noise(x0, noise, t)
    assert str(tuple(t.shape)) in str(caught.value)


def test_images_and_noise_must_agree():
    x0, noise = images((2, 3, 4, 4))
    t = torch.tensor([0, 1])
    for a, b in (
        (x0, noise[:1]),
        (x0, noise[:, :1]),
        (x0[:1], noise),
        (x0, noise.float()),
        (x0.half(), noise.bfloat16()),
        ((x0 * 127).to(torch.uint8), noise),
        (x0.int(), noise.int()),
    ):
        with pytest.raises(InvalidArgument) as caught:
            NoiseSchedule().add_noise(a, b, t)
        assert str(tuple(a.shape)) in str(caught.value)
        assert str(b.dtype) in str(caught.value)


def test_signal_and_noise():
    t = torch.tensor([0, 700, 999])
    a, s = NoiseSchedule().signal_and_noise(t, 4, torch.float64)
    assert a.shape == s.shape == (3, 1, 1, 1)
    assert (a**2 + s**2 - 1).abs().max() < 1e-15
    assert np.abs(a.flatten().numpy() - np.sqrt(NoiseSchedule().alphas_cumprod[t])).max() < 1e-15
    assert NoiseSchedule().signal_and_noise(t, 2, torch.float32)[0].dtype == torch.float32


# The posterior --------------------------------------------------------------------------------------------------------


@given(data=st.data(), name=st.sampled_from(sorted(SCHEDULES)))
def test_posterior_is_bayes_rule(data, name):
    """q(x_s | x_t, x_0) q(x_t | x_0) = q(x_t | x_s) q(x_s | x_0): equal means, variances, covariance of (x_s, x_t)."""
    schedule = SCHEDULES[name]
    t = data.draw(st.integers(0, schedule.timesteps - 1) | st.floats(0, schedule.timesteps - 1))
    s = data.draw(st.integers(-1, math.ceil(t) - 1) | st.floats(0, t, exclude_max=True) if t > 0 else st.just(-1))
    abar_t, abar_s = schedule.abar(t), schedule.abar(s)
    assume(abar_s - abar_t > 1e-9)
    c0, ct, var = schedule.posterior(t, s)
    assert (c0, ct, var) == posterior(abar_t, abar_s)

    alpha = abar_t / abar_s  # q(x_t | x_s) = N(sqrt(alpha) x_s, (1 - alpha) I)
    assert c0 + ct * math.sqrt(abar_t) == pytest.approx(math.sqrt(abar_s), rel=1e-7)  # E x_s, for x_0 = 1
    assert var + ct**2 * (1 - abar_t) == pytest.approx(1 - abar_s, rel=1e-7, abs=1e-15)  # Var x_s
    assert ct * (1 - abar_t) == pytest.approx(math.sqrt(alpha) * (1 - abar_s), rel=1e-7, abs=1e-15)  # Cov(x_s, x_t)
    assert 0 <= var <= 1 - abar_s


@given(
    abar_s=st.floats(1e-6, 1 - 1e-6),
    ratio=st.floats(1e-6, 1 - 1e-6),
    x0=st.floats(-3, 3),
    xt=st.floats(-3, 3),
    xs=st.floats(-3, 3),
)
def test_posterior_density(abar_s, ratio, x0, xt, xs):
    """The log densities themselves: log q(x_s|x_t,x_0) = log q(x_t|x_s) + log q(x_s|x_0) - log q(x_t|x_0)."""
    abar_t = abar_s * ratio

    def log_normal(x, mean, variance):
        return -((x - mean) ** 2) / (2 * variance) - math.log(2 * math.pi * variance) / 2

    c0, ct, var = posterior(abar_t, abar_s)
    terms = (
        log_normal(xt, math.sqrt(ratio) * xs, 1 - ratio),
        log_normal(xs, math.sqrt(abar_s) * x0, 1 - abar_s),
        -log_normal(xt, math.sqrt(abar_t) * x0, 1 - abar_t),
    )
    assert log_normal(xs, c0 * x0 + ct * xt, var) == pytest.approx(sum(terms), abs=1e-7 * (1 + sum(map(abs, terms))))


@each_schedule
def test_posterior_of_neighbours_is_that_of_ho_et_al(schedule):
    """Eq. 7 in beta_t, and diffusers' variance."""
    theirs = DDPMScheduler(**schedule.to_scheduler_config())
    theirs.set_timesteps(schedule.timesteps)
    beta, abar = schedule.variances, schedule.alphas_cumprod
    for t in {0, 1, schedule.timesteps // 2, schedule.timesteps - 1} & set(range(schedule.timesteps)):
        previous = abar[t - 1] if t else 1.0
        c0, ct, var = schedule.posterior(t, t - 1)
        assert c0 == pytest.approx(math.sqrt(previous) * beta[t] / (1 - abar[t]), rel=1e-9)
        assert ct == pytest.approx(math.sqrt(1 - beta[t]) * (1 - previous) / (1 - abar[t]), rel=1e-9)
        assert var == pytest.approx((1 - previous) / (1 - abar[t]) * beta[t], rel=1e-9)
        if t:
            assert var == pytest.approx(float(theirs._get_variance(t, None)), rel=2e-3)


def test_posterior_of_the_data():
    schedule = NoiseSchedule()
    for t in (0, 3.5, 999):
        assert schedule.posterior(t, -1) == (1.0, 0.0, 0.0)
    for t, s in ((5, 5), (5, 6), (5, -2), (5, NAN), (NAN, 5), (-1, -1), (5, -1.5)):
        with pytest.raises(InvalidArgument, match=rf"t_prev={s} .*t={t}"):
            schedule.posterior(t, s)
    for t, s in ((1000, 5), (5, -0.5)):
        with pytest.raises(InvalidArgument, match=r"0 \.\. 999"):
            schedule.posterior(t, s)


# The object -----------------------------------------------------------------------------------------------------------


def test_immutable():
    schedule = NoiseSchedule("custom", betas=CUSTOM)
    with pytest.raises(dataclasses.FrozenInstanceError):
        schedule.timesteps = 5
    for same in (schedule, copy.deepcopy(schedule), copy.copy(schedule), pickle.loads(pickle.dumps(schedule))):
        assert same == schedule
        assert same.alphas_cumprod.tolist() == schedule.alphas_cumprod.tolist()
        with pytest.raises(ValueError, match="read-only"):
            same.alphas_cumprod[0] = 0.5
    schedule.variances[0] = 0.5  # computed afresh
    assert schedule.variances[0] == pytest.approx(0.01)
    betas = [0.1, 0.2]
    mine = NoiseSchedule("custom", betas=betas)
    betas[0] = 0.9
    assert mine.betas == (0.1, 0.2)


def test_equality_and_hash():
    assert NoiseSchedule() == NoiseSchedule("linear", 1000, 1e-4, 0.02)
    assert hash(NoiseSchedule()) == hash(NoiseSchedule("linear", np.int64(1000), np.float64(1e-4), 0.02))
    assert type(NoiseSchedule(timesteps=np.int32(7)).timesteps) is int
    custom = NoiseSchedule("custom", betas=np.array(CUSTOM))
    assert custom == NoiseSchedule("custom", betas=list(CUSTOM))
    assert hash(custom) == hash(NoiseSchedule("custom", betas=CUSTOM))
    assert len(set(SCHEDULES.values())) == len(SCHEDULES)
    assert NoiseSchedule() != NoiseSchedule(rescale_zero_terminal_snr=True)
    json.dumps(NoiseSchedule("linear", np.int64(10), np.float32(0.01), np.float32(0.02)).to_scheduler_config())


BAD = [
    *[
        ({"timesteps": v}, f"timesteps={v!r}", f"1 to {MAX_TIMESTEPS}")
        for v in (0, -1, 10**9, 1.5, 1000.0, True, "10", None)
    ],
    ({"timesteps": NAN}, "timesteps=nan", "a whole number"),
    ({"kind": "laplace"}, "'laplace'", "linear, scaled_linear, cosine, sigmoid, custom"),
    ({"kind": None}, "None", "linear, scaled_linear"),
    ({"kind": ["linear"]}, "['linear']", "linear, scaled_linear"),
    ({"kind": "custom"}, "betas=None", "kind='custom'"),
    ({"betas": (0.1,)}, "kind='linear'", "kind='custom'"),
    *[
        ({"kind": "custom", "betas": (0.1, v)}, f"betas[1]={v!r}", "(0, 1)")
        for v in (0.0, 1.0, -0.1, 1.5, NAN, INF, -INF)
    ],
    *[({"kind": "custom", "betas": (0.1, v)}, f"betas[1]={v!r}", "a number") for v in ("0.1", None, True, 1j, [0.1])],
    ({"kind": "custom", "betas": "0.1"}, "betas='0.1'", "a list"),
    ({"kind": "custom", "betas": 0.1}, "betas=0.1", "a list"),
    ({"kind": "custom", "betas": ()}, "timesteps=0", "1 to"),
    ({"kind": "custom", "betas": (1e-20,)}, "goes from 1.0", "too small"),
    ({"kind": "custom", "betas": (1e-20, 1e-20), "rescale_zero_terminal_snr": True}, "goes from 1.0", "too small"),
    ({"kind": "custom", "betas": (0.1, 1e-17)}, "goes from 0.9", "fall strictly"),
    ({"kind": "custom", "betas": (0.999,) * 200}, "to 0.0", "too large"),
    ({"kind": "custom", "betas": (0.999,) * 108}, "to 0.0", "too large"),
    ({"beta_start": 0.5, "beta_end": 0.9}, "linear schedule of 1000", "too large"),
    *[({"beta_start": v}, f"beta_start={v!r}", "0 < beta_start <= beta_end < 1") for v in (0.0, -1e-4, 0.03, NAN, INF)],
    *[({"beta_end": v}, f"beta_end={v!r}", "0 < beta_start <= beta_end < 1") for v in (0.0, 1.0, 2.0, NAN, INF)],
    *[({k: v}, f"{k}={v!r}", "a number") for k in ("beta_start", "beta_end") for v in ("1e-4", None, True, 1j)],
    *[
        ({"rescale_zero_terminal_snr": v}, f"rescale_zero_terminal_snr={v!r}", "True or False")
        for v in ("false", 1, None)
    ],
    ({"rescale_zero_terminal_snr": True, "timesteps": 1}, "rescale_zero_terminal_snr=True", "at least 2"),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("arguments", "value", "allowed"), BAD, ids=lambda v: str(v)[:40])
def test_bad_schedules(arguments, value, allowed):
    with pytest.raises(ConfigError) as caught:
        NoiseSchedule(**arguments)
    assert value in str(caught.value)
    assert allowed in str(caught.value)


@pytest.mark.parametrize(
    ("config", "value", "allowed"),
    [
        *[
            ({"beta_schedule": v}, f"beta_schedule={v!r}", ", ".join(DIFFUSERS_KINDS))
            for v in ("cosine", None, ["linear"])
        ],
        ({"num_train_timesteps": None}, "timesteps=None", "1 to"),
        ({"num_train_timesteps": "1000"}, "timesteps='1000'", "1 to"),
        ({"beta_start": None}, "beta_start=None", "a number"),
        ({"rescale_betas_zero_snr": "false"}, "rescale_zero_terminal_snr='false'", "True or False"),
        ({"trained_betas": [0.1, 2]}, "betas[1]=2.0", "(0, 1)"),
        ({"trained_betas": 0.1}, "betas=0.1", "a list"),
        ([("beta_start", 1)], "list", "object with keys"),
    ],
    ids=str,
)
def test_bad_scheduler_configurations(config, value, allowed):
    with pytest.raises(ConfigError) as caught:
        NoiseSchedule.from_scheduler_config(config)
    assert value in str(caught.value)
    assert allowed in str(caught.value)


def test_the_longest_schedule():
    schedule = NoiseSchedule(timesteps=MAX_TIMESTEPS, beta_start=1e-7, beta_end=2e-5)
    assert schedule.alphas_cumprod[-1] == pytest.approx(4.3e-5, rel=0.02)
