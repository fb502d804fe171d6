"""A sampler is a table: one row is one network evaluation and one linear update, all coefficients known beforehand.

A row turns the state x and the network's output out = network(x, t) into the next state:

    x0 = clip(kx x + ko out, -c, c)
    h  = hx x + ho out + h0 x0
    x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
    save: xs = this row's input x        push: m3, m2, m1 = m2, m1, h

z ~ N(0, I); v is the second half of the output of a network that learned its variance (elsewhere sv = 0). A
coefficient of zero means that its operand is not read. The state is variance-preserving: x has the variance of
sqrt(abar) x_0 + sqrt(1 - abar) z.

A table with dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3) divides each image's x0 by its
own q before the bound, x0 = clip((kx x + ko out) / q, -c, c): the one number of a row that is known only when it runs.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import numbers
from typing import Any, NamedTuple, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fastdiff.errors import InvalidArgument

FORMAT = 1
MAX_ROWS = 1 << 24  # the row is 24 bits of a noise counter


class Row(NamedTuple):
    """One network evaluation; see the module's docstring for the formula. Everything is float64.

    t is what the network is told of the noise level: a timestep (may be fractional), or another function of it in a
    table that is ``continuous``. abar and abar_next are the noise levels before and after the row. The weight of
    guidance is w = 1 + g (guidance - 1), so g = 0 switches it off. save, push and stage are 0 or 1; a stage is
    a row inside a step of a multi-stage solver.
    """

    t: float
    abar: float
    abar_next: float
    kx: float
    ko: float
    c: float = math.inf
    hx: float = 0.0
    ho: float = 0.0
    h0: float = 0.0
    ax: float = 0.0
    ao: float = 0.0
    a0: float = 0.0
    a1: float = 0.0
    a2: float = 0.0
    a3: float = 0.0
    as_: float = 0.0
    s: float = 0.0
    sv: float = 0.0
    g: float = 1.0
    save: float = 0.0
    push: float = 0.0
    stage: float = 0.0


COLUMNS = Row._fields


@dataclasses.dataclass(frozen=True)
class StepTable:
    """An immutable, hashable table of `Row`; built by the functions in `fastdiff.solvers`.

    steps: what the user asked for; len(table): rows, one network evaluation each; init_scale: the scale of the initial
    noise; ascending: timesteps may rise (inversion, resampling); continuous: t is a function of the noise level, not an
    index of a discrete schedule, so it may be negative (EDM's ln(sigma) / 4); threshold: (ratio, largest) of dynamic
    thresholding, see `fastdiff.core.update.threshold`; data_scale: x0 within the table is the data divided by it.
    Raises `InvalidArgument` for values out of range and when a row contradicts its neighbours: levels join, and t falls
    from step to step, with no t twice but in rows marked as stages.
    """

    solver: str
    steps: int
    rows: tuple[Row, ...]
    init_scale: float = 1.0
    ascending: bool = False
    continuous: bool = False
    threshold: tuple[float, float] | None = None
    data_scale: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.solver, str):
            raise InvalidArgument(f"solver={self.solver!r}: a name is needed")
        if isinstance(self.steps, bool) or not isinstance(self.steps, int) or self.steps < 1:
            raise InvalidArgument(f"steps={self.steps!r}: a whole number of at least 1 is needed")
        if not is_number(self.init_scale) or not 0.0 < self.init_scale < math.inf:
            raise InvalidArgument(f"init_scale={self.init_scale!r}: a positive number is needed")
        if not is_number(self.data_scale) or not 0.0 < self.data_scale < math.inf:
            raise InvalidArgument(f"data_scale={self.data_scale!r}: a positive number is needed")
        for name in ("ascending", "continuous"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name}={getattr(self, name)!r}: True or False is needed")
        object.__setattr__(self, "threshold", check_threshold(self.threshold))
        object.__setattr__(self, "rows", tuple(self.rows))
        if not 1 <= len(self.rows) < MAX_ROWS:
            raise InvalidArgument(f"a table of {len(self.rows)} rows: 1 to {MAX_ROWS - 1} are needed")
        for i, row in enumerate(self.rows):
            if not isinstance(row, Row):
                raise InvalidArgument(f"{self.solver} row {i}: {row!r} is not a Row")
            for name, value in zip(COLUMNS, row, strict=True):
                if not isinstance(value, (int, float)) or not (math.isfinite(value) or (name == "c" and value > 0)):
                    raise InvalidArgument(f"{self.solver} row {i}: {name}={value!r} is not a finite number")
            clean = row.abar == 1 and self.ascending  # inversion starts at the image
            levels = (0 <= row.abar < 1 or clean) and 0 < row.abar_next <= 1
            if (row.t < 0 and not self.continuous) or row.c <= 0 or not levels:
                raise InvalidArgument(
                    f"{self.solver} row {i}: t={row.t}, c={row.c}, abar={row.abar} -> {row.abar_next} is out of range"
                )
            if not {row.save, row.push, row.stage} <= {0.0, 1.0}:
                raise InvalidArgument(
                    f"{self.solver} row {i}: save={row.save}, push={row.push}, stage={row.stage} must be 0 or 1"
                )
            if self.threshold is not None and math.isinf(row.c):
                raise InvalidArgument(f"{self.solver} row {i}: dynamic thresholding needs a finite c")
        for i, (row, after) in enumerate(itertools.pairwise(self.rows)):
            if not after.stage and row.abar_next != after.abar:
                raise InvalidArgument(
                    f"{self.solver} row {i} ends at abar={row.abar_next}, row {i + 1} starts at {after.abar}"
                )
        steps = [(i, row.t) for i, row in enumerate(self.rows) if not row.stage]
        for (i, t), (j, t_after) in itertools.pairwise(steps):
            if not (self.ascending or t > t_after):
                raise InvalidArgument(f"{self.solver} rows {i}, {j}: timesteps must fall, got {t}, {t_after}")

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The network's timestep of every row."""
        return tuple(row.t for row in self.rows)

    @property
    def learned_variance(self) -> bool:
        """Whether some row reads v, so that the network must have twice the image's channels."""
        return any(row.sv for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """Whether some row adds noise."""
        return any(row.s for row in self.rows)

    @property
    def history(self) -> int:
        """How many earlier h (m1, m2, m3) the rows read: 0 to 3."""
        return max((k for row in self.rows for k, a in ((1, row.a1), (2, row.a2), (3, row.a3)) if a), default=0)

    def nfe(self, guided: bool = False) -> int:
        """Network evaluations for one image; a guided row counts two."""
        return len(self.rows) + (sum(1 for row in self.rows if row.g) if guided else 0)

    def with_guidance_interval(self, start: float, end: float) -> StepTable:
        """Guide only the rows between two shares of the run (Kynkaanniemi et al. 2024, arXiv:2404.07724).

        Row i of N is guided when start <= i/N and (i+1)/N <= end (0: pure noise, 1: the image), as for diffusers'
        control_guidance_start and _end.
        """
        if not (is_number(start) and is_number(end) and 0.0 <= start <= end <= 1.0):
            raise InvalidArgument(f"guidance_interval=({start!r}, {end!r}): 0 <= start <= end <= 1 is needed")
        n = len(self.rows)
        inside = (start <= i / n and (i + 1) / n <= end for i in range(n))
        return dataclasses.replace(
            self, rows=tuple(r._replace(g=r.g * ok) for r, ok in zip(self.rows, inside, strict=True))
        )

    @property
    def coefficients(self) -> NDArray[np.float64]:
        """float64 [rows + 1, len(COLUMNS)]. The last row is the identity, x' = x, where a finished image idles."""
        last = self.rows[-1]
        idle = Row(t=last.t, abar=last.abar_next, abar_next=last.abar_next, kx=0.0, ko=0.0, ax=1.0, g=0.0)
        return np.array([*self.rows, idle], dtype=np.float64)

    def to_json(self) -> str:
        """The table as JSON, exact; an infinite c is null. Inverse of `from_json`."""
        rows = [[None if math.isinf(v) else v for v in row] for row in self.rows]
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        if self.threshold is not None:
            head["threshold"] = [None if math.isinf(v) else v for v in self.threshold]
        return json.dumps({"format": FORMAT, **head, "columns": COLUMNS, "rows": rows})

    @classmethod
    def from_json(cls, text: str) -> StepTable:
        """Read what `to_json` wrote; `InvalidArgument` names what does not fit."""
        try:
            data: dict[str, Any] = json.loads(text)
            if data["format"] != FORMAT or tuple(data["columns"]) != COLUMNS:
                raise InvalidArgument(
                    f"a step table of format {data['format']!r} with columns {data['columns']!r} cannot be read"
                )
            rows = tuple(Row(*(math.inf if v is None else v for v in row)) for row in data["rows"])
            names = [f.name for f in dataclasses.fields(cls) if f.name not in ("rows", "threshold")]
            threshold = data["threshold"]
            if threshold is not None:
                threshold = tuple(math.inf if v is None else v for v in threshold)
            return cls(rows=rows, threshold=threshold, **{name: data[name] for name in names})
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
            if isinstance(e, InvalidArgument):
                raise
            raise InvalidArgument(f"not a step table: {type(e).__name__} {e}") from e

    def __str__(self) -> str:
        used = [name for name in COLUMNS if any(getattr(row, name) not in (0.0, math.inf) for row in self.rows)]
        head = f"{self.solver}: {self.steps} steps, {len(self.rows)} rows, initial noise x {self.init_scale:g}"
        if self.threshold is not None:
            head += f", x0 divided by its {self.threshold[0]:g} quantile, 1 to {self.threshold[1]:g}"
        lines = ["  ".join(f"{name.rstrip('_'):>10}" for name in ("row", *used))]
        lines += [
            "  ".join(f"{v:>10.6g}" for v in (i, *(getattr(row, name) for name in used)))
            for i, row in enumerate(self.rows)
        ]
        return "\n".join([head, *lines])


def is_number(value: object) -> TypeGuard[float]:
    """Whether it is a real number; True and False are not."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_clip(clip: float | None) -> float:
    """The bound c of x0 as a number; None is no bound."""
    if clip is None:
        return math.inf
    if not is_number(clip) or not clip > 0:
        raise InvalidArgument(f"clip={clip!r}: a positive number or None is needed")
    return float(clip)


def check_threshold(threshold: float | tuple[float, float] | None) -> tuple[float, float] | None:
    """(ratio, largest) of dynamic thresholding; a ratio alone has no largest."""
    if threshold is None:
        return None
    pair = tuple(threshold) if isinstance(threshold, (tuple, list)) else (threshold, math.inf)
    if len(pair) != 2 or not all(is_number(v) for v in pair) or not (0.0 < pair[0] <= 1.0 and pair[1] >= 1.0):
        raise InvalidArgument(
            f"threshold={threshold!r}: the quantile's share in (0, 1], alone or with the largest divisor (at least 1), "
            "or None is needed"
        )
    return float(pair[0]), float(pair[1])
