"""`Scheduler`: the interface of diffusers' schedulers over a `StepTable`, for sampling loops of one's own.

    scheduler = fastdiff.Scheduler.from_config(pipeline.scheduler)      # or a scheduler_config.json, read
    scheduler.set_timesteps(50)
    x = torch.randn(shape) * scheduler.init_noise_sigma
    for t in scheduler.timesteps:
        out = network(scheduler.scale_model_input(x, t), t)
        x = scheduler.step(out, t, x, generator=generator).prev_sample

The samples of schedulers that diffusers runs in sigma space (Euler, Heun, DPM2, DPM++ SDE, LMS, EDM, consistency
models) are in sigma space here as well: the sample is x_0 + sigma eps. The table's state, which is
variance-preserving, is then sample * sqrt(abar) / sigma_data.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.loading import read_scheduler
from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument, ModifiedError
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable, from_config
from fastdiff.solvers.compat.diffusers import ETA, IN_SIGMA, WITHOUT_SCHEDULE, noise_schedule, scheduler_name
from fastdiff.solvers.paths import looks_back
from fastdiff.unet import changes

Generators = torch.Generator | Sequence[torch.Generator] | None


@dataclasses.dataclass
class StepOutput:
    """Result of `Scheduler.step`.

    Attributes:
        prev_sample: The next sample, [B, C, H, W].
        pred_original_sample: The image x_0 that the network predicts from the present sample, [B, C, H, W].
    """

    prev_sample: Tensor
    pred_original_sample: Tensor


def randn(shape: tuple[int, ...], generator: Generators, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Draw normals as diffusers' ``randn_tensor`` does, from one generator or from a list with one for each image.

    A CPU generator draws on the CPU, and the normals are moved, so that they are the same on every device.
    """
    if isinstance(generator, (list, tuple)) and len(generator) == 1:
        generator = generator[0]
    if isinstance(generator, (list, tuple)):
        if len(generator) != shape[0]:
            raise InvalidArgument(f"{len(generator)} generators for {shape[0]} images: one, or one for each, is needed")
        return torch.cat([randn((1, *shape[1:]), one, device, dtype) for one in generator])
    if not (generator is None or isinstance(generator, torch.Generator)):
        raise InvalidArgument(
            f"generator is a {type(generator).__name__}; a torch.Generator, a list of them or None is needed"
        )
    where = device
    if generator is not None and generator.device.type != device.type:
        if generator.device.type != "cpu":
            raise InvalidArgument(
                f"a generator of {generator.device} cannot draw noise for {device}; use one of the CPU"
            )
        where = generator.device
    return torch.randn(shape, generator=generator, device=where, dtype=dtype).to(device)


def draws_noise(config: Mapping[str, Any], table: StepTable, row: int, eta: float | None = None) -> bool:
    """Return whether diffusers' scheduler draws noise in this row.

    Noise that is then multiplied by zero counts, as drawing it advances the generator.
    """
    name = config["_class_name"]
    if name == "DDPMScheduler":
        return table.rows[row].t > 0
    if name in ETA:
        eta = ETA[name] if eta is None else eta
        return eta > 0 and (name == "DDIMScheduler" or row < len(table) - 1)
    if name == "LCMScheduler":
        return row < len(table) - 1
    if name == "CMStochasticIterativeScheduler":
        return len(table) > 1
    if name in ("DPMSolverMultistepScheduler", "EDMDPMSolverMultistepScheduler"):
        return str(config.get("algorithm_type")).startswith("sde")
    if name in ("KDPM2AncestralDiscreteScheduler", "DPMSolverSDEScheduler"):
        return table.rows[row].s > 0.0
    return name == "EulerAncestralDiscreteScheduler"


def configuration(source: Any) -> dict[str, Any]:
    """Return the configuration of a diffusers scheduler, or a given one, as a dictionary with ``_class_name``.

    A scheduler that is not supported, or that does not do what its configuration says, raises `ConfigError`.
    """
    if isinstance(source, Mapping):
        config = dict(source)
    elif isinstance(getattr(source, "config", None), Mapping):
        config = {**source.config, "_class_name": type(source).__name__}
    else:
        raise ConfigError(f"a {type(source).__name__} is neither a scheduler nor the configuration of one")
    name = scheduler_name(config)
    if not isinstance(source, Mapping):
        found = unsupported_changes(source)
        if found:
            raise ModifiedError(f"scheduler {name} is not what its configuration says: {changes.in_words(found)}")
        # DDPMScheduler.step reads this attribute instead of the configuration.
        config |= {key: value for key, value in vars(source).items() if key == "variance_type"}
    return config


# Attributes that a run changes, and that `set_timesteps` or the first step sets anew.
OF_A_RUN = {
    "num_inference_steps", "timesteps", "_timesteps", "prk_timesteps", "plms_timesteps", "sigmas", "custom_timesteps",
    "_step_index", "_begin_index", "counter", "ets", "cur_model_output", "cur_sample", "model_outputs",
    "timestep_list", "lower_order_nums", "last_sample", "is_scale_input_called", "prev_derivative", "dt", "sample",
    "order_list", "log_sigmas", "sigmas_interpol", "sigmas_up", "sigmas_down", "mid_point_sigma", "noise_sampler",
}  # fmt: skip


def unsupported_changes(scheduler: Any) -> list[str]:
    """List what a scheduler of diffusers does, or has, beyond its configuration."""
    cls = type(scheduler)
    if changes.origin(cls) != "diffusers":
        return [f"it is a class of {cls.__module__}, not diffusers' own"]
    found = changes.replaced_functions([cls])
    if found:
        return found
    with torch.device("cpu"):  # a default device of the caller's must not be that of the new scheduler's tensors
        ours, theirs = vars(scheduler), vars(changes.rebuilt(cls, scheduler.config))
    found = [f"{name} was replaced" for name in ours if name not in theirs and hasattr(cls, name)]
    ignored = OF_A_RUN | {"_internal_dict", "variance_type"}
    other = [n for n, v in theirs.items() if n not in ignored and not changes.same(ours.get(n, found), v)]
    return found + [f"{name} was changed" for name in other]


class Scheduler:
    """A scheduler with the interface of diffusers' schedulers, which a `StepTable` runs.

    Methods and attributes mean what they mean in diffusers. Beyond diffusers, `step` takes a tensor with a timestep for
    each image, so that the images of a batch may be at different steps, each with its own history, and gradients flow
    through `step`.

    Args:
        config: The content of a ``scheduler_config.json``; its ``_class_name`` must be one of the schedulers that
            docs/solvers.md lists.

    Attributes:
        config: The configuration, a dictionary.
        timesteps: The timesteps of a run after `set_timesteps`, one for each evaluation of the network: an int64 tensor
            [N], or float32 for a scheduler in sigma space.
        num_inference_steps: The number of steps of a run; None before `set_timesteps`.
        order: Evaluations of the network in a step: 2 for Heun, DPM2 and DPM++ SDE, else 1.
        schedule: The `NoiseSchedule`; None for EDM and consistency models, which have none.

    Raises:
        ConfigError: If the scheduler or one of its options is not supported.
    """

    def __init__(self, config: Mapping[str, Any]):
        self.config = configuration(config)
        name = str(self.config["_class_name"])
        self.in_sigma = name in IN_SIGMA
        self.schedule: NoiseSchedule | None = None
        if name not in WITHOUT_SCHEDULE:
            self.schedule = noise_schedule(self.config)
        self.order = 2 if name.startswith(("Heun", "KDPM2", "DPMSolverSDE")) else 1
        self.num_inference_steps: int | None = None
        self.timesteps = torch.empty(0, dtype=torch.int64, device="cpu")
        self._tables: dict[tuple[float | None, bool], StepTable] = {}
        self._state: State | None = None

    @classmethod
    def from_config(cls, config: Any) -> Scheduler:
        """Make a scheduler from a configuration, a diffusers scheduler or another `Scheduler`.

        Args:
            config: The configuration or the scheduler to take it from.

        Returns:
            The scheduler, without timesteps yet.

        Raises:
            ConfigError: If the scheduler or one of its options is not supported.
        """
        return cls(configuration(config.config if isinstance(config, Scheduler) else config))

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None) -> Scheduler:
        """Make a scheduler from a folder on disk; nothing is downloaded.

        Args:
            path: The folder of a pipeline, or one with a ``scheduler_config.json``.
            subfolder: A folder within ``path`` to look in instead.

        Returns:
            The scheduler, without timesteps yet.

        Raises:
            CheckpointError: If there is no ``scheduler_config.json``, or it cannot be read.
            ConfigError: If the scheduler or one of its options is not supported.
        """
        folder = Path(path) / (subfolder or "")
        config = read_scheduler(folder)
        if not config:
            raise CheckpointError(f"{folder}: no scheduler_config.json and no scheduler/scheduler_config.json")
        return cls(config)

    def __len__(self) -> int:
        """Return the number of timesteps that the network was trained with."""
        return int(self.config.get("num_train_timesteps", 1000)) if self.schedule is None else self.schedule.timesteps

    def set_timesteps(self, num_inference_steps: int, device: str | torch.device | None = None) -> None:
        """Choose the timesteps of a run, which start anew: the history of an earlier run is dropped.

        Args:
            num_inference_steps: The number of steps, from 1 to the number of training timesteps.
            device: The device of ``timesteps``; None means the CPU.

        Raises:
            InvalidArgument: If the number of steps is out of range.
            ConfigError: If the configuration does not support this number of steps.
        """
        self._tables = {}
        self._state = None
        table = from_config(self.config, num_inference_steps)
        self._tables[None, False] = table
        self.num_inference_steps = num_inference_steps
        dtype = torch.float32 if self.in_sigma else torch.int64
        self.timesteps = torch.tensor([row.t for row in table.rows], dtype=torch.float64, device="cpu").to(
            device, dtype
        )

    @property
    def init_noise_sigma(self) -> float:
        """The standard deviation of the initial noise, by which standard normals are multiplied."""
        if not self.in_sigma:
            return 1.0
        table = self._table()
        return table.init_scale * table.data_scale / math.sqrt(table.rows[0].abar)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Scale a sample to the network's input: in sigma space by 1 / sqrt(sigma^2 + sigma_data^2), else not at all.

        Args:
            sample: The sample, [B, C, H, W].
            timestep: As for `step`.

        Returns:
            The network's input, of the sample's shape.

        Raises:
            InvalidArgument: If a timestep is not one of this run, or needs a history that is missing.
        """
        if not self.in_sigma:
            return sample
        table = self._table()
        rows = self._rows(table, timestep, sample)
        return sample * self._spread([_to_state(table, row) for row in rows], sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, Tensor]:
        """Compute the next sample from the network's output, by one row of the table for every image.

        The step is computed in float32, or in float64 for float64 samples.

        Args:
            model_output: The network's output for ``scale_model_input(sample, timestep)``, [B, C, H, W], or
                [B, 2 C, H, W] if the variance is learned.
            timestep: The next of ``timesteps``: a number for all images, or a tensor [B] with one for each. The first
                of ``timesteps`` starts an image anew; a solver without a history can start at any of them. -1 leaves
                an image as it is (except with EDM and consistency models, whose timesteps may be negative).
            sample: The present sample, [B, C, H, W].
            eta: The share of fresh noise, 0 to 1: for DDIM (by default 0) and TCD (by default 0.3).
            use_clipped_model_output: For DDIM: whether the predicted noise is derived from the clipped x_0.
            generator: The source of noise: a generator, a list with one for each image, or None for torch's default.
                Noise is drawn when diffusers draws it.
            variance_noise: The noise to use instead, [B, C, H, W].
            return_dict: Whether the result is a `StepOutput`.

        Returns:
            The next sample and the predicted image, as a `StepOutput` or a tuple, in the sample's dtype.

        Raises:
            InvalidArgument: If a timestep is not one of this run or needs a history that is missing, or if shapes,
                options or generators do not fit.
        """
        table = self._table(eta, bool(use_clipped_model_output))
        if sample.ndim != 4 or model_output.shape[:1] + model_output.shape[2:] != sample.shape[:1] + sample.shape[2:]:
            raise InvalidArgument(
                f"sample {tuple(sample.shape)} and model_output {tuple(model_output.shape)} must be [B, C, H, W] of "
                "one batch and size"
            )
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        rows = self._rows(table, timestep, sample)
        state = self._state_for(table, sample, dtype)
        state.row_host = np.array(rows)
        state.row = torch.from_numpy(state.row_host.copy()).to(sample.device)
        state.x = sample.to(dtype) * self._spread(
            [_to_state(table, row) if self.in_sigma else 1.0 for row in rows], state.x
        )
        state.out = model_output.to(dtype)
        moving = [row for row in rows if row < len(table)]
        if any(draws_noise(self.config, table, row, eta) for row in moving):
            z = variance_noise
            if z is None:
                z = randn(tuple(sample.shape), generator, sample.device, model_output.dtype)
            elif z.shape != sample.shape:
                raise InvalidArgument(
                    f"variance_noise {tuple(z.shape)} is not of the sample's shape {tuple(sample.shape)}"
                )
            z = z.to(sample.device, dtype)
            state.noise = lambda _: z
        x0 = update.predict_x0(state) * table.data_scale
        update.update(state)
        state.noise = None
        x = state.x
        if self.in_sigma:
            x = x * self._spread([_from_state(table, row) for row in rows], x)
        output = StepOutput(x.to(sample.dtype), x0.to(sample.dtype))
        return output if return_dict else (output.prev_sample, output.pred_original_sample)

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Add noise to images: sqrt(abar) x_0 + sqrt(1 - abar) eps, or x_0 + sigma eps in sigma space.

        Args:
            original_samples: The images x_0, [B, C, H, W].
            noise: Standard normals eps, of the images' shape.
            timesteps: The timestep that gives abar, of this run or a whole one of the noise schedule: a number for all
                images, or a tensor [B] with one for each.

        Returns:
            The noisy images, in the dtype of ``original_samples``.

        Raises:
            InvalidArgument: If a timestep is neither.
        """
        abar = np.array([self._abar(t) for t in _listed(timesteps, len(original_samples))])
        a, s = np.sqrt(abar), np.sqrt(1.0 - abar)
        if self.in_sigma:
            scale = self._table().data_scale if self._tables else 1.0
            a, s = np.ones_like(a), scale * s / a
        dtype = torch.float64 if original_samples.dtype == torch.float64 else torch.float32
        x0, eps = original_samples.to(dtype), noise.to(dtype)
        return (self._spread(a, x0) * x0 + self._spread(s, x0) * eps).to(original_samples.dtype)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Compute v = sqrt(abar) eps - sqrt(1 - abar) x_0, the target of v-prediction (Salimans & Ho 2022).

        diffusers' EulerDiscreteScheduler looks up abar by the number of the step; here the timestep decides.

        Args:
            sample: The images x_0, [B, C, H, W].
            noise: Standard normals eps, of the images' shape.
            timesteps: As for `add_noise`.

        Returns:
            v, in the dtype of ``sample``.

        Raises:
            InvalidArgument: If a timestep is neither of this run nor a whole one of the noise schedule.
        """
        abar = np.array([self._abar(t) for t in _listed(timesteps, len(sample))])
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x0, eps = sample.to(dtype), noise.to(dtype)
        v = self._spread(np.sqrt(abar), x0) * eps - self._spread(np.sqrt(1.0 - abar), x0) * x0
        return v.to(sample.dtype)

    def _table(self, eta: float | None = None, clipped: bool = False) -> StepTable:
        if self.num_inference_steps is None:
            raise InvalidArgument("the scheduler has no timesteps yet: call set_timesteps(num_inference_steps)")
        key = (eta, clipped)
        if key not in self._tables:
            self._tables[key] = from_config(
                self.config, self.num_inference_steps, eta=eta, use_clipped_model_output=clipped
            )
        return self._tables[key]

    def _rows(self, table: StepTable, timestep: Any, sample: Tensor) -> list[int]:
        """Find each image's row: the next one if it has the image's timestep, else one at which a run can start."""
        ts = _listed(timestep, len(sample))
        state = self._state
        following = [-1] * len(ts)
        if state is not None and len(state.x) == len(ts):
            following = state.row_host.tolist()
        elif (
            state is not None
            and (table.history > 0 or any(row.as_ for row in table.rows))  # some row reads what an earlier one kept
            and not all(_same(t, table.rows[0].t) for t in ts)
        ):
            raise InvalidArgument(
                f"{len(ts)} images, but the history is of {len(state.x)}: a run of {table.solver} keeps its batch"
            )
        return [self._row(table, t, after) for t, after in zip(ts, following, strict=True)]

    @staticmethod
    def _row(table: StepTable, t: float, following: int) -> int:
        if t == -1 and not table.continuous:
            return len(table)
        if 0 <= following < len(table) and _same(t, table.rows[following].t):
            return following
        known = [i for i, row in enumerate(table.rows) if not row.stage and _same(t, row.t)]
        if not known:
            raise InvalidArgument(
                f"timestep {t:g} is not one of this run's {len(table)}, {table.rows[0].t:g} .. {table.rows[-1].t:g}"
            )
        if looks_back(table, known[0]):
            raise InvalidArgument(
                f"timestep {t:g} (row {known[0]}) needs the rows before it, as {table.solver} keeps a history; start "
                f"with timesteps[0], or call the timesteps in turn"
            )
        return known[0]

    def _state_for(self, table: StepTable, sample: Tensor, dtype: torch.dtype) -> State:
        """Return the state with this run's history, or a new one if the table, shape, device or dtype changed."""
        state = self._state
        if (
            state is None
            or state.bank.tables != (table,)
            or state.x.shape != sample.shape
            or (state.x.device, state.x.dtype) != (sample.device, dtype)
        ):
            state = self._state = State.create(sample.to(dtype), TableBank([table], sample.device, dtype))
        return state

    def _abar(self, t: float) -> float:
        """Return abar at a timestep of this run, or else of the noise schedule."""
        if self._tables:
            for row in self._table().rows:
                if _same(t, row.t):
                    return row.abar
        if self.schedule is None:
            raise InvalidArgument(f"timestep {t:g} is not one of this run's; set_timesteps lays them out")
        return self.schedule.abar(t)

    @staticmethod
    def _spread(factors: Any, x: Tensor) -> Tensor:
        """Make a tensor [B, 1, 1, 1] of one factor for each image."""
        return torch.tensor(np.asarray(factors), dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))


def _to_state(table: StepTable, row: int) -> float:
    """Return the factor from sigma space to the row's state, sqrt(abar) / sigma_data; 1 for a finished image."""
    return math.sqrt(table.rows[row].abar) / table.data_scale if row < len(table) else 1.0


def _from_state(table: StepTable, row: int) -> float:
    """Return the factor from the state after a row to sigma space; the last row ends in the data's units itself."""
    return 1.0 / _to_state(table, row + 1) if row < len(table) else 1.0


def _listed(timestep: Any, B: int) -> list[float]:
    """List a timestep for each of B images, from a number or a tensor of one or of B."""
    values = timestep.detach().flatten().tolist() if isinstance(timestep, Tensor) else np.ravel(timestep).tolist()
    if len(values) not in (1, B) or any(isinstance(v, (bool, str)) or v is None for v in values):
        raise InvalidArgument(f"timestep={timestep!r}: a number, or one for each of {B} images, is needed")
    return [float(v) for v in values] * (B if len(values) == 1 else 1)


def _same(a: float, b: float) -> bool:
    """Return whether two timesteps are equal up to rounding: callers have them in float32, tables in float64."""
    return abs(a - b) <= 1e-6 * max(1.0, abs(b))
