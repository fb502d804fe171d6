"""Step tables: a sampler is a table whose rows are one network evaluation and one linear update each.

All coefficients are known before the run. A row turns the state x and the network's output out = network(x, t) into
the next state:

    x0 = clip(kx x + ko out, -c, c)
    h  = hx x + ho out + h0 x0
    x' = ax x + ao out + a0 x0 + a1 m1 + a2 m2 + a3 m3 + as xs + s exp(sv v) z
    save: xs = this row's input x        push: m3, m2, m1 = m2, m1, h

m1, m2 and m3 are the last three values of h that were pushed, and xs is the last x that was saved. z ~ N(0, I); v is
the second half of the output of a network that learned its variance (elsewhere sv = 0). The operand of a coefficient
that is zero is not read. The state is variance-preserving, x = a x_0 + s z with a = sqrt(abar) and s = sqrt(1 - abar);
in a table of a flow it is that divided by a + s (`fastdiff.solvers.flow`), in one of a variance-exploding process
divided by a (`fastdiff.solvers.ve`).

With dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3) each image's x0 is divided by its own q
before the bound, x0 = clip((kx x + ko out) / q, -c, c). This q is the only number that is computed during the run.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fastdiff.checks import Error, boolean, is_number, items, number, shown, whole
from fastdiff.errors import InvalidArgument
from fastdiff.files import parse_json
from fastdiff.solvers.flow import state_scale
from fastdiff.solvers.gain import LARGEST, amplification

FORMAT = 1
MAX_ROWS = 1 << 24  # a noise counter has 24 bits for the row


class Row(NamedTuple):
    """One network evaluation and update; the module's docstring has the formula. All values are float64.

    Attributes:
        t: The network's timestep, which may be fractional; in a ``continuous`` table another function of the level.
        abar: Noise level of the row's input x.
        abar_next: Noise level of its result.
        kx: Coefficient of x in x_0.
        ko: Coefficient of the network's output in x_0.
        c: Bound of |x_0|; may be infinite.
        hx: Coefficient of x in h, which goes to the history.
        ho: Coefficient of the output in h.
        h0: Coefficient of x_0 in h.
        ax: Coefficient of x in the result.
        ao: Coefficient of the output in the result.
        a0: Coefficient of x_0 in the result.
        a1: Coefficient of m1, the last value of the history.
        a2: Coefficient of m2.
        a3: Coefficient of m3.
        as_: Coefficient of the saved xs.
        s: Scale of the noise.
        sv: Coefficient of the learned v in the logarithm of the noise's scale.
        g: Share of guidance: its weight is 1 + g (guidance - 1), so that 0 switches it off.
        save: 1 where x is saved as xs, else 0.
        push: 1 where h is pushed to the history, else 0.
        stage: 1 for a row inside a step of a multi-stage solver, else 0.
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
    """An immutable, hashable table of `Row`, which the functions of `fastdiff.solvers` build.

    ``len(table)`` is the number of rows. Every row must end at the level where the next one starts, and timesteps must
    fall from step to step; only stages may repeat a timestep.

    Attributes:
        solver: Name of the solver.
        steps: Number of steps that the caller asked for; multi-stage solvers have more rows.
        rows: The rows, first to last.
        init_scale: Scale of the initial noise.
        init_mean: Mean of the initial noise; not 0 where another code base's images have their zero elsewhere.
        ascending: Whether timesteps may rise, as in inversion and resampling.
        continuous: Whether t is a function of the noise level, so that it may be negative (EDM's ln(sigma) / 4), and
            not an index of a discrete schedule.
        threshold: (ratio, largest) of dynamic thresholding, see `fastdiff.core.update.threshold`; None for none.
        data_scale: Number by which the data is divided in x0 and the states.
        flow: Whether the states are those of flow matching, (1 - sigma) x_0 + sigma eps, with
            abar = (1 - sigma)^2 / ((1 - sigma)^2 + sigma^2).
        exploding: Whether the states are those of a variance-exploding process, x_0 + sigma eps, with
            abar = 1 / (1 + sigma^2).

    Raises:
        InvalidArgument: If a value is out of range, or rows contradict each other.
    """

    solver: str
    steps: int
    rows: tuple[Row, ...]
    init_scale: float = 1.0
    ascending: bool = False
    continuous: bool = False
    threshold: tuple[float, float] | None = None
    data_scale: float = 1.0
    flow: bool = False
    exploding: bool = False
    init_mean: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.solver, str):
            raise InvalidArgument(f"solver={shown(self.solver)}: a name is needed")
        object.__setattr__(self, "steps", whole("steps", self.steps, 1))
        for name in ("init_scale", "data_scale"):
            number(name, getattr(self, name), above=0, need="a positive number")
        object.__setattr__(self, "init_mean", number("init_mean", self.init_mean, -LARGEST, LARGEST))
        for name in ("ascending", "continuous", "flow", "exploding"):
            object.__setattr__(self, name, boolean(name, getattr(self, name)))
        if self.flow and self.exploding:
            raise InvalidArgument("flow=True, exploding=True: the states of a table are of one process")
        object.__setattr__(self, "threshold", check_threshold("threshold", self.threshold))
        object.__setattr__(self, "rows", tuple(items("rows", self.rows, MAX_ROWS, need="a list of Row")))
        if not 1 <= len(self.rows) < MAX_ROWS:
            raise InvalidArgument(f"a table of {len(self.rows)} rows: 1 to {MAX_ROWS - 1} are needed")
        for i, row in enumerate(self.rows):
            if not isinstance(row, Row):
                raise InvalidArgument(f"{self.solver} row {i}: {shown(row)} is not a Row")
            for name, value in zip(COLUMNS, row, strict=True):
                if not isinstance(value, (int, float)) or not (math.isfinite(value) or (name == "c" and value > 0)):
                    raise InvalidArgument(f"{self.solver} row {i}: {name}={shown(value)} is not a finite number")
            clean = row.abar == 1 and self.ascending  # inversion starts at the image
            levels = (0 <= row.abar < 1 or clean) and 0 < row.abar_next <= 1 and (row.abar > 0 or not self.exploding)
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
        gain = amplification(
            [_of_unit_output(row) for row in self.rows] if self.exploding else self.rows, self.init_scale
        )
        if not gain <= LARGEST:
            raise InvalidArgument(
                f"{self.solver}: this table multiplies noise by {gain:.3g}, and float32's rounding with it, so that "
                "nothing of the images remains: the noise levels of its schedule or of its steps are degenerate"
            )

    def __len__(self) -> int:
        return len(self.rows)

    def signal_and_noise(self, abar: float) -> tuple[float, float]:
        """Return the shares of the data and of the noise in a state at a level: x = signal x_0 + noise z.

        Args:
            abar: The level, 0 to 1, as in a row.

        Returns:
            The two factors; x_0 is in the data's own units.
        """
        scale = scale_of(abar, self.flow, self.exploding)
        return scale * math.sqrt(abar) / self.data_scale, scale * math.sqrt(1.0 - abar)

    @property
    def timesteps(self) -> tuple[float, ...]:
        """The network's timestep in every row."""
        return tuple(row.t for row in self.rows)

    @property
    def learned_variance(self) -> bool:
        """True if a row reads v, so that the network must have twice the image's channels."""
        return any(row.sv for row in self.rows)

    @property
    def stochastic(self) -> bool:
        """True if a row adds noise."""
        return any(row.s for row in self.rows)

    @property
    def history(self) -> int:
        """Number of earlier values of h (m1, m2, m3) that the rows read, 0 to 3."""
        return max((k for row in self.rows for k, a in ((1, row.a1), (2, row.a2), (3, row.a3)) if a), default=0)

    def nfe(self, guided: bool = False) -> int:
        """Count the network evaluations for one image.

        Args:
            guided: Whether the run is guided, so that a row with guidance counts two.

        Returns:
            The number of evaluations.
        """
        guided = boolean("guided", guided)
        return len(self.rows) + (sum(1 for row in self.rows if row.g) if guided else 0)

    def with_guidance_interval(self, start: float, end: float) -> StepTable:
        """Restrict guidance to an interval of the run (Kynkaanniemi et al. 2024, arXiv:2404.07724).

        Row i of N is guided if start <= i/N and (i+1)/N <= end, as with diffusers' control_guidance_start and _end.

        Args:
            start: Share of the run, from pure noise at 0 to the image at 1, at which guidance starts.
            end: Share of the run at which it ends.

        Returns:
            The table, with g = 0 in the other rows.

        Raises:
            InvalidArgument: If not 0 <= start <= end <= 1.
        """
        if not (is_number(start) and is_number(end) and 0.0 <= start <= end <= 1.0):
            raise InvalidArgument(f"guidance_interval=({shown(start)}, {shown(end)}): 0 <= start <= end <= 1 is needed")
        n = len(self.rows)
        inside = (start <= i / n and (i + 1) / n <= end for i in range(n))
        return dataclasses.replace(
            self, rows=tuple(r._replace(g=r.g * ok) for r, ok in zip(self.rows, inside, strict=True))
        )

    @property
    def coefficients(self) -> NDArray[np.float64]:
        """The rows as float64 [rows + 1, len(COLUMNS)]; the added last row is x' = x, for images that are finished."""
        last = self.rows[-1]
        idle = Row(t=last.t, abar=last.abar_next, abar_next=last.abar_next, kx=0.0, ko=0.0, ax=1.0, g=0.0)
        return np.array([*self.rows, idle], dtype=np.float64)

    def to_json(self) -> str:
        """Write the table as JSON, exactly; `from_json` reads it.

        Returns:
            The text; an infinite c is null.
        """
        rows = [[None if math.isinf(v) else v for v in row] for row in self.rows]
        head = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "rows"}
        for name in ("flow", "exploding", "init_mean"):  # absent, as written before there were such processes
            if not head[name]:
                del head[name]
        if self.threshold is not None:
            head["threshold"] = [None if math.isinf(v) else v for v in self.threshold]
        return json.dumps({"format": FORMAT, **head, "columns": COLUMNS, "rows": rows})

    @classmethod
    def from_json(cls, text: str) -> StepTable:
        """Read a table that `to_json` wrote.

        Args:
            text: The JSON text.

        Returns:
            The table, equal to the one that was written.

        Raises:
            InvalidArgument: If the text is no table; the message names what does not fit.
        """
        if not isinstance(text, (str, bytes)):
            raise InvalidArgument(f"a step table is read from a text, not from {shown(text)}")
        try:
            data: dict[str, Any] = parse_json(text)
            if data["format"] != FORMAT or tuple(data["columns"]) != COLUMNS:
                raise InvalidArgument(
                    f"a step table of format {shown(data['format'])} with columns {shown(data['columns'])} cannot be "
                    "read"
                )
            rows = tuple(Row(*(math.inf if v is None else v for v in row)) for row in data["rows"])
            names = [f.name for f in dataclasses.fields(cls) if f.name not in ("rows", "threshold")]
            threshold = data["threshold"]
            if threshold is not None:
                threshold = tuple(math.inf if v is None else v for v in threshold)
            data = {"flow": False, "exploding": False, "init_mean": 0.0, **data}
            return cls(rows=rows, threshold=threshold, **{name: data[name] for name in names})
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
            if isinstance(e, InvalidArgument):
                raise
            raise InvalidArgument(f"not a step table: {type(e).__name__} {str(e)[:200]}") from e

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


def _of_unit_output(row: Row) -> Row:
    """Return a row of a variance-exploding table that reads outputs of unit size: a score is 1 / sigma as large."""
    sigma = math.sqrt((1.0 - row.abar) / row.abar)
    unit = min(1.0, sigma / abs(row.ko)) if row.ko else 1.0
    return row._replace(ao=row.ao * unit, ko=row.ko * unit, ho=row.ho * unit)


def scale_of(abar: float, flow: bool, exploding: bool) -> float:
    """Return the factor from a variance-preserving state to one of a flow, or of a variance-exploding process."""
    if exploding:
        return 1.0 / math.sqrt(abar)
    return state_scale(abar) if flow else 1.0


def check_clip(name: str, value: Any, *, error: Error = InvalidArgument) -> float:
    """Return the bound c of |x_0| as a number; None is no bound."""
    if value is None or (isinstance(value, float) and value == math.inf):
        return math.inf
    return number(name, value, above=0, need="a positive number or None", error=error)


def check_threshold(name: str, value: Any, *, error: Error = InvalidArgument) -> tuple[float, float] | None:
    """Return (ratio, largest) of dynamic thresholding; for a ratio alone, ``largest`` is infinite."""
    if value is None:
        return None
    pair = tuple(value) if isinstance(value, (tuple, list)) else (value, math.inf)
    numbers = all(is_number(v) or (isinstance(v, float) and v == math.inf) for v in pair)
    if len(pair) != 2 or not numbers or not (0.0 < pair[0] <= 1.0 and pair[1] >= 1.0):
        raise error(
            f"{name}={shown(value)}: the quantile's share in (0, 1], alone or with the largest divisor (at least 1), "
            "or None is needed"
        )
    return float(pair[0]), float(pair[1])
