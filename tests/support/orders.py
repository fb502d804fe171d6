"""The orders that solvers have between two levels of any process, whose walks the tests give."""

from __future__ import annotations

import pytest

from fastdiff.solvers.adams import deis_table
from fastdiff.solvers.dpm2 import dpm2_table
from fastdiff.solvers.dpmpp import dpmpp_table
from fastdiff.solvers.euler import euler_table
from fastdiff.solvers.heun import heun_table
from fastdiff.solvers.unipc import unipc_table

every_order = pytest.mark.parametrize(
    ("build", "order"),
    [
        (lambda w: euler_table(w, "euler", 0.0), 1),
        (heun_table, 2),
        (lambda w: dpmpp_table(w, "dpmpp_2m", 2, lower_order_final=False), 2),
        (lambda w: unipc_table(w, 2, "bh2", lower_order_final=False), 3),
        (lambda w: deis_table(w, 2, False), 2),
        (lambda w: dpm2_table(w, "dpm2", 0.0), 2),
    ],
    ids=["euler", "heun", "dpmpp_2m", "unipc 2", "deis 2", "dpm2"],
)
