"""The noise levels of a run, and how rows of a table are written at them: every solver starts from a `Walk`.

Notation: x_t = a x_0 + s eps with a = sqrt(abar), s = sqrt(1 - abar); sigma = s / a, lambda = -log sigma.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple, TypedDict

from fastdiff.checks import one_of, shown
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers.edm import EDMSchedule
from fastdiff.solvers.flow import PREDICTIONS as FLOW_PREDICTIONS
from fastdiff.solvers.flow import FlowSchedule
from fastdiff.solvers.prediction import check_prediction, eps_coefficients, x0_coefficients
from fastdiff.solvers.spacing import levels, nearest_timestep, timesteps
from fastdiff.solvers.table import Row, StepTable, check_clip, check_threshold, scale_of
from fastdiff.solvers.ve import PREDICTIONS as VE_PREDICTIONS
from fastdiff.solvers.ve import VESchedule

Schedule = NoiseSchedule | EDMSchedule | FlowSchedule | VESchedule
STEPS = 50  # steps of a run that gives no number, or every timestep of a schedule that has fewer


class Common(TypedDict, total=False):
    """Options that all solvers share; `Walk.of` documents them."""

    spacing: str | Sequence[float] | None
    prediction: str | None
    clip: float | None
    threshold: float | tuple[float, float] | None
    steps_offset: int
    final: str


class Level(NamedTuple):
    """Noise levels of a step: the network's timestep t, abar before the step, and abar after it."""

    t: float
    abar: float
    abar_next: float

    @property
    def a(self) -> float:
        return math.sqrt(self.abar)

    @property
    def s(self) -> float:
        return math.sqrt(1.0 - self.abar)

    @property
    def a_next(self) -> float:
        return math.sqrt(self.abar_next)

    @property
    def s_next(self) -> float:
        return math.sqrt(1.0 - self.abar_next)

    @property
    def sigma(self) -> float:
        return self.s / self.a if self.abar > 0.0 else math.inf

    @property
    def sigma_next(self) -> float:
        return self.s_next / self.a_next

    @property
    def log_sigma(self) -> float:
        return 0.5 * (math.log1p(-self.abar) - math.log(self.abar)) if self.abar > 0.0 else math.inf

    @property
    def log_sigma_next(self) -> float:
        return 0.5 * (math.log1p(-self.abar_next) - math.log(self.abar_next)) if self.abar_next < 1.0 else -math.inf


@dataclasses.dataclass(frozen=True)
class Walk:
    """The level of every step of a run, first to last, and what the rows and the `StepTable` need besides."""

    levels: tuple[Level, ...]
    prediction: str  # what the network predicts, see `fastdiff.solvers.prediction`
    c: float = 1.0  # bound of |x_0|; infinite for none
    threshold: tuple[float, float] | None = None
    init_scale: float = 1.0
    data_scale: float = 1.0
    output_scale: float = 1.0  # factor of the last row where it ends at x_0 + sigma eps instead of at an image
    continuous: bool = False
    # Whether a step may end elsewhere than where the next one starts, and timesteps may repeat, as in diffusers. In the
    # table the levels join all the same, and the row of a repeated timestep is a stage.
    compat: bool = False
    ascending: bool = False  # whether the levels rise, from an image to noise
    start: int = 0  # the row at which the run starts; a multi-step formula uses no row before it
    x0_gain: float = 1.0  # factor of x_0 before it is bounded
    last_time: float = 0.0  # the network's timestep where the last step ends, if there is noise
    ends: tuple[float, ...] = ()  # the network's timestep where each step ends, if the next one starts elsewhere
    added: float = 1.0  # standard deviation of the noise between the end of a step and the start of the next one
    # The network's timestep at a sigma between two levels, and abar there, for solvers with a stage in between.
    between: Callable[[float], tuple[float, float]] | None = None
    # Whether the rows of the table are for states of a flow, or of a variance-exploding process. Those that `row`
    # writes are variance-preserving.
    flow: bool = False
    exploding: bool = False

    @classmethod
    def of(
        cls,
        schedule: Schedule,
        steps: int | None,
        *,
        spacing: str | Sequence[float] | None = None,
        prediction: str | None = None,
        clip: float | None = 1.0,
        threshold: float | tuple[float, float] | None = None,
        steps_offset: int = 0,
        final: str = "zero",
    ) -> Walk:
        """Lay out the walk that a solver's options describe.

        Args:
            schedule: Noise levels that the network was trained with.
            steps: Number of steps; None is 50, or every timestep of a schedule that has fewer (18 with an
                `EDMSchedule`, 28 with a `FlowSchedule`).
            spacing: "trailing" (the default), "leading", "linspace", "quadratic", "karras", "exponential", or a falling
                list of timesteps, with which ``steps`` may be None (`sigma_timesteps` makes one of sigmas); see
                `timesteps`. An `EDMSchedule` has "karras" (its default), "exponential" and falling lists of sigmas, and
                a `FlowSchedule` and a `VESchedule` those of their ``times``.
            prediction: What the network predicts: "epsilon" (the default), "sample", "v_prediction", "edm" (the
                default with an `EDMSchedule`), "flow_prediction" (the default with a `FlowSchedule`) or "score" (the
                default with a `VESchedule`).
            clip: Bound of |x_0|; None for none.
            threshold: Dynamic thresholding in place of ``clip``: the quantile's share, as 0.995, or (share, largest
                divisor).
            steps_offset: Added to every timestep of "leading" spacing.
            final: Where the last step ends: at "zero" noise, or at "sigma_min", the schedule's lowest level.

        Raises:
            InvalidArgument: If an option is out of range; the message names its value and what is allowed.
        """
        prediction = default_prediction(schedule) if prediction is None else prediction
        check_prediction(prediction)
        check_process(schedule, prediction)
        limit = check_threshold("threshold", threshold)
        c = 1.0 if limit is not None else check_clip("clip", clip)
        one_of("final", final, ("zero", "sigma_min"))
        if isinstance(schedule, FlowSchedule):
            ts = schedule.times(steps, "trailing" if spacing is None else spacing)
            abar = [schedule.abar(t) for t in ts]
            end = 1.0 if final == "zero" else schedule.abar(1.0)
            ends = list(zip(abar, [*abar[1:], end], strict=True))
            scale = output_scale = 1.0
            init_scale, last_time = schedule.sigma(ts[0]), 1.0
        elif isinstance(schedule, VESchedule):
            ts = schedule.times(steps, "exponential" if spacing is None else spacing)
            abar = [schedule.abar(t) for t in ts]
            end = 1.0 if final == "zero" else schedule.abar(schedule.sigma_min)
            ends = list(zip(abar, [*abar[1:], end], strict=True))
            scale = output_scale = 1.0
            init_scale, last_time = schedule.sigma(ts[0]), schedule.sigma_min
        elif isinstance(schedule, EDMSchedule):
            ts = schedule.times(steps, "karras" if spacing is None else spacing)
            abar = [schedule.abar(t) for t in ts]
            end = 1.0 if final == "zero" else schedule.abar(schedule.time(schedule.sigma_min))
            ends = list(zip(abar, [*abar[1:], end], strict=True))
            scale, init_scale = schedule.sigma_data, math.sqrt(1.0 - abar[0])
            last_time, output_scale = schedule.time(schedule.sigma_min), 1.0 / math.sqrt(end)
        else:
            spacing = "trailing" if spacing is None else spacing
            if steps is None and isinstance(spacing, str):
                steps = min(STEPS, schedule.timesteps)
            ts = timesteps(schedule, steps, spacing, steps_offset)
            ends = levels(schedule, ts, 1.0 if final == "zero" else float(schedule.alphas_cumprod[0]))
            scale = init_scale = output_scale = 1.0
            last_time = 0.0
        return cls(
            levels=tuple(Level(t, *end) for t, end in zip(ts, ends, strict=True)),
            prediction=prediction,
            c=c / scale,
            threshold=limit,
            init_scale=init_scale,
            data_scale=scale,
            output_scale=output_scale,
            continuous=isinstance(schedule, EDMSchedule),
            last_time=last_time,
            between=partial(_between, schedule),
            flow=isinstance(schedule, FlowSchedule),
            exploding=isinstance(schedule, VESchedule),
        )

    def at(self, level: Level) -> Walk:
        """Return a walk of this level alone, for a stage between the walk's own levels."""
        return dataclasses.replace(self, levels=(level,))

    def __len__(self) -> int:
        return len(self.levels)

    def scale(self, abar: float) -> float:
        """Return the factor from variance-preserving states at a level to those of the table."""
        return scale_of(abar, self.flow, self.exploding)

    def end(self, i: int) -> float:
        """Return the network's timestep where step i ends."""
        if self.ends:
            return self.ends[i]
        return self.levels[i + 1].t if i + 1 < len(self) else self.last_time

    def continued(self, i: int, row: Row) -> Row:
        """Append to the last row of step i the noise that leads to where the next step starts, if it does elsewhere."""
        if i + 1 == len(self) or self.levels[i + 1].abar == row.abar_next:
            return row
        return noised(row, self.levels[i + 1].abar, self.added)

    def order(self, i: int, most: int) -> int:
        """Return how many of rows i, i-1, ... a multi-step formula can use, at most ``most``.

        Nothing can be extrapolated from infinite sigma, so after a first row at zero SNR the order is 1 again.
        """
        if self.levels[i].abar == 0.0:
            return 1
        first = max(min(self.start, i), i - most + 1)
        usable = sum(1 for level in self.levels[first : i + 1] if level.abar > 0.0)
        return min(most, usable)

    def row(
        self,
        i: int,
        *,
        x: float = 0.0,
        x0: float = 0.0,
        eps: float = 0.0,
        out: float = 0.0,
        m: Sequence[float] = (),
        xs: float = 0.0,
        z: float = 0.0,
        keep: str | None = None,
        **columns: Any,
    ) -> Row:
        """Return row i, x' = x x + x0 x_0 + eps eps + out out + m (m1, m2, m3) + xs xs + z z: arguments are factors.

        ``keep`` names what is pushed to the history: "x0", "eps", "velocity" (eps - x_0) or "out". eps is the noise
        that goes with the bounded x_0, eps = (x - a x_0) / s, so that x = a x_0 + s eps still holds; without a bound it
        is the network's own.
        """
        level = self.levels[i]
        kx, ko = (self.x0_gain * k for k in x0_coefficients(self.prediction, level.abar))
        ex, eo, e0 = 0.0, 0.0, 0.0
        if eps != 0.0 or keep in ("eps", "velocity"):
            if math.isinf(self.c):
                ex, eo = eps_coefficients(self.prediction, level.abar)
            else:
                ex, e0 = 1.0 / level.s, -level.a / level.s
        history: dict[str, float] = {}
        if keep is not None:
            kinds = {"x0": (0.0, 0.0, 1.0), "eps": (ex, eo, e0), "velocity": (ex, eo, e0 - 1.0), "out": (0.0, 1.0, 0.0)}
            hx, ho, h0 = kinds[keep]
            history = {"hx": hx, "ho": ho, "h0": h0, "push": 1.0}
        a1, a2, a3 = (*m, 0.0, 0.0, 0.0)[:3]
        given: dict[str, float] = {
            "t": level.t, "abar": level.abar, "abar_next": level.abar_next, "kx": kx, "ko": ko, "c": self.c,
            "ax": x + eps * ex, "ao": out + eps * eo, "a0": x0 + eps * e0,
            "a1": a1, "a2": a2, "a3": a3, "as_": xs, "s": z,
        }  # fmt: skip
        return Row(**{**given, **history, **columns})

    def table(self, solver: str, rows: Sequence[Row], steps: int | None = None) -> StepTable:
        """Return the table of these rows, the last one scaled to the data's units, without history that is not read."""
        rows = list(rows)
        if self.compat:
            rows = _joined(rows)
        if self.flow or self.exploding:
            rows = _rescaled(rows, self.scale)
        scale = self.data_scale * self.output_scale
        if scale != 1.0:
            names = ("ax", "ao", "a0", "a1", "a2", "a3", "as_", "s")
            rows[-1] = rows[-1]._replace(**{name: scale * getattr(rows[-1], name) for name in names})
        last_read = max((i for i, row in enumerate(rows) if row.a1 or row.a2 or row.a3), default=0)
        rows[last_read:] = [row._replace(hx=0.0, ho=0.0, h0=0.0, push=0.0) for row in rows[last_read:]]
        return StepTable(
            solver,
            len(self) if steps is None else steps,
            tuple(rows),
            init_scale=self.init_scale,
            ascending=self.ascending,
            continuous=self.continuous,
            threshold=self.threshold,
            data_scale=self.data_scale,
            flow=self.flow,
            exploding=self.exploding,
        )


def default_prediction(schedule: Schedule) -> str:
    """Return what the networks of a schedule usually predict."""
    if isinstance(schedule, FlowSchedule):
        return "flow_prediction"
    if isinstance(schedule, VESchedule):
        return "score"
    return "edm" if isinstance(schedule, EDMSchedule) else "epsilon"


def check_process(schedule: Schedule, prediction: str) -> None:
    """Raise `InvalidArgument` if a prediction has no meaning in the schedule's forward process."""
    for kind, allowed in ((FlowSchedule, FLOW_PREDICTIONS), (VESchedule, VE_PREDICTIONS)):
        if isinstance(schedule, kind) and prediction not in allowed:
            listed = ", ".join(allowed)
            raise InvalidArgument(f"prediction={shown(prediction)} with a {kind.__name__}: allowed are {listed}")
    if prediction == "flow_prediction" and not isinstance(schedule, FlowSchedule):
        raise InvalidArgument("prediction='flow_prediction' is of flow matching and needs a FlowSchedule")
    if prediction == "score" and not isinstance(schedule, VESchedule):
        raise InvalidArgument("prediction='score' is of the variance-exploding process and needs a VESchedule")


LINEAR = ("ax", "ao", "a0", "a1", "a2", "a3", "as_")  # coefficients of a row's result, but for the noise


def forward(abar: float, abar_next: float, noise: float = 1.0) -> tuple[float, float]:
    """Return the factors of x and of z in the forward process from one level to one of more noise.

        x_u = sqrt(r) x_p + noise sqrt(1 - r) z,    r = abar_u / abar_p          (Ho et al. 2020, eq. 2)

    In sigma space this is x_u = x_p + noise sqrt(sigma_u^2 - sigma_p^2) z.
    """
    r = abar_next / abar
    return math.sqrt(r), noise * math.sqrt(1.0 - r)


def noised(row: Row, abar: float, noise: float = 1.0, scale: Callable[[float], float] = lambda _: 1.0) -> Row:
    """Append to a row the forward process from its abar_next to ``abar``, which needs no network.

    ``scale`` is the factor from variance-preserving states to those of the row, by abar.
    """
    x, z = forward(row.abar_next, abar, noise)
    x, z = x * scale(abar) / scale(row.abar_next), z * scale(abar)
    scaled = {name: x * getattr(row, name) for name in LINEAR}
    return row._replace(abar_next=abar, s=math.hypot(x * row.s, z), **scaled)


def _between(schedule: Schedule, sigma: float) -> tuple[float, float]:
    """Return the network's timestep at a sigma of a walk, and abar there."""
    if isinstance(schedule, EDMSchedule):
        t = schedule.time(sigma * schedule.sigma_data)
    elif isinstance(schedule, FlowSchedule):  # this sigma is s / a
        t = schedule.time(sigma / (1.0 + sigma))
    elif isinstance(schedule, VESchedule):
        t = schedule.time(sigma)
    else:
        t = nearest_timestep(schedule, sigma)
    return t, schedule.abar(t)


def _rescaled(rows: Sequence[Row], scale_at: Callable[[float], float]) -> list[Row]:
    """Rewrite rows for the states of another process, which are the variance-preserving ones times a level's scale."""
    scales = [scale_at(row.abar) for row in rows]
    written, saved = [], 1.0
    for row, scale, after in zip(rows, scales, [*scales[1:], scale_at(rows[-1].abar_next)], strict=True):
        new = {name: after * getattr(row, name) for name in (*LINEAR, "s")}
        new |= {"ax": new["ax"] / scale, "kx": row.kx / scale, "hx": row.hx / scale, "as_": new["as_"] / saved}
        written.append(row._replace(**new))
        saved = scale if row.save else saved
    return written


def _joined(rows: Sequence[Row]) -> list[Row]:
    """Make every row end at the level of the next one, and rows of repeated timesteps stages, as `StepTable` needs."""
    ends = [after.abar for after in rows[1:]] + [rows[-1].abar_next]
    joined, t = [], math.inf
    for row, end in zip(rows, ends, strict=True):
        repeats = row.t == t
        joined.append(row._replace(abar_next=end, stage=1.0 if repeats else row.stage))
        if not row.stage:
            t = row.t
    return joined
