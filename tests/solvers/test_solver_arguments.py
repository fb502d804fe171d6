"""The options of `ddpm` and `ddim` that are refused, with their messages, and those that are accepted."""

from __future__ import annotations

import math
import tracemalloc

import numpy as np
import pytest
import torch

from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import ddim, ddpm
from tests.support.solver_cases import linear_map
from tests.support.trajectories import SCHEDULES

LINEAR = SCHEDULES["linear"]

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
