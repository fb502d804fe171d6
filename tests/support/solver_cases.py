"""Hypothesis strategies for schedules and options of the solvers, and the linear map that a row of a table is."""

from __future__ import annotations

import numpy as np
from hypothesis import strategies as st

from fastdiff.schedule import PREDICTIONS, NoiseSchedule
from fastdiff.solvers import SPACINGS


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
