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

A run that starts in the middle has a table of its own, in which a solver with a history begins at its lowest order
(`from_config(..., start=)`). Rows have the same numbers in all tables of a run.
"""

from __future__ import annotations

import functools
import importlib
import math
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from fastdiff.checkpoints.folders import read_scheduler
from fastdiff.checks import number, whole
from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import CheckpointError, ConfigError, InvalidArgument
from fastdiff.integrations.arguments import (
    INVERSE,
    MULTISTEP,
    PLAIN,
    TWO_STAGES,
    by_place,
    check_others,
)
from fastdiff.integrations.configuration import FILE, Config, complete, configuration, save, to_json
from fastdiff.integrations.levels import run_sigmas, step_variance, trained_betas
from fastdiff.integrations.noise import Generators, draws_noise, noise_dtype, randn
from fastdiff.integrations.outputs import ALONE, SECOND, StepOutput
from fastdiff.integrations.places import Place, Search, replaces
from fastdiff.integrations.states import flat, from_state, indices_of, listed, same, to_state, x0_ratio
from fastdiff.integrations.ve import ExplodingSteps, Levels, noisy
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable, from_config
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.diffusers import (
    ETA,
    EXPLODING,
    FLOW_SCHEDULERS,
    IN_SIGMA,
    WITHOUT_SCHEDULE,
)
from fastdiff.solvers.compat.flow import trained_sigmas
from fastdiff.solvers.compat.given import TAKES_TIMESTEPS
from fastdiff.solvers.compat.sigmas import ZERO_SNR
from fastdiff.solvers.compat.source import noise_schedule
from fastdiff.solvers.flow import abar_of
from fastdiff.solvers.keys import value_of


class Scheduler(ExplodingSteps):
    """A scheduler with the interface of diffusers' schedulers, which a `StepTable` runs.

    Methods and attributes mean what they mean in diffusers. Beyond diffusers, `step` takes a tensor with a timestep for
    each image, so that the images of a batch may be at different steps, each with its own history, and gradients flow
    through `step`. docs/diffusers.md describes what is refused.

    Args:
        config: The content of a ``scheduler_config.json``, or what `from_config` takes; its ``_class_name`` must be one
            of the schedulers that docs/solvers.md lists.
        **options: Options that replace those of ``config``.

    Attributes:
        num_inference_steps: The number of steps of a run; None before `set_timesteps`.
        order: Evaluations of the network in a step: 2 for Heun, DPM2 and DPM++ SDE, else 1.
        schedule: The `NoiseSchedule`; None for EDM, consistency models, flow matching and ScoreSdeVeScheduler, which
            have none.

    Raises:
        ConfigError: If the scheduler or one of its options is not supported.
        InvalidArgument: If no scheduler has one of ``options``.
    """

    config_name: ClassVar[str] = FILE
    has_compatibles: ClassVar[bool] = True
    _deprecated_kwargs: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: Any, **options: Any):
        config = config.config if isinstance(config, Scheduler) else config
        if isinstance(config, Mapping) and "_class_name" in options:
            config = {**config, "_class_name": options["_class_name"]}
        self._use(complete(configuration(config), options))

    def _use(self, config: Config) -> None:
        self._config = config
        self._name = name = str(config["_class_name"])
        self.in_sigma = name in IN_SIGMA
        self.of_flow = name in FLOW_SCHEDULERS
        self._levels: Levels | None = None  # of ScoreSdeVeScheduler
        self.schedule: NoiseSchedule | None = None
        if name not in WITHOUT_SCHEDULE:
            self.schedule = noise_schedule(config)
        self.order = 2 if name in TWO_STAGES else 1
        self._shift: float | None = None  # by `set_shift`
        self.num_inference_steps: int | None = None
        self._asked: tuple[Mapping[str, Any], dict[str, Any]] | None = None
        self._forget()

    def _forget(self) -> None:
        """Drop the tables and the history of a run."""
        self._tables: dict[tuple[Any, ...], StepTable] = {}
        self._timesteps: Tensor | None = None
        self._sigmas: Tensor | None = None
        self._state: State | None = None
        self._next: list[Place | None] | None = None  # the place of each image after its last step
        self._begin_index: int | None = None

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Scheduler:
        """Make a scheduler from a configuration, a diffusers scheduler or another `Scheduler`.

        Args:
            config: The configuration or the scheduler to take it from. The ``config`` of a diffusers scheduler that was
                made by its constructor does not say of which class it is; its options do, where only one has them.
            **options: Options that replace those of ``config``, ``_class_name`` among them.

        Returns:
            The scheduler, with the timesteps of its training.

        Raises:
            ConfigError: If the scheduler or one of its options is not supported.
            InvalidArgument: If no scheduler has one of ``options``.
        """
        made = cls.__new__(cls)
        Scheduler.__init__(made, config, **options)
        return made

    @classmethod
    def from_pretrained(cls, path: str | Path, subfolder: str | None = None, **options: Any) -> Scheduler:
        """Make a scheduler from a folder on disk; nothing is downloaded.

        Args:
            path: The folder of a pipeline, or one with a ``scheduler_config.json``.
            subfolder: A folder within ``path`` to look in instead.
            **options: Options that replace those of the file.

        Returns:
            The scheduler, with the timesteps of its training.

        Raises:
            CheckpointError: If there is no ``scheduler_config.json``, or it cannot be read.
            ConfigError: If the scheduler or one of its options is not supported.
            InvalidArgument: If no scheduler has one of ``options``.
        """
        folder = Path(path) / (subfolder or "")
        config = read_scheduler(folder)
        if not config:
            raise CheckpointError(f"{folder}: no scheduler_config.json and no scheduler/scheduler_config.json")
        made = cls.__new__(cls)
        Scheduler.__init__(made, config, **options)
        return made

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Write ``scheduler_config.json``, which `from_pretrained` and diffusers' class of the same name read.

        Args:
            save_directory: The folder, which is made if it is missing.

        Raises:
            WriteError: If the file cannot be written.
            ConfigError: If an option cannot be written as JSON.
        """
        save(self.config, save_directory)

    save_config = save_pretrained

    def register_to_config(self, **options: Any) -> None:
        """Set options of the configuration, known ones or others; a run starts anew.

        Args:
            **options: The options.

        Raises:
            ConfigError: If the scheduler does not support a value.
        """
        self._use(Config({**self.config, **options}))

    @property
    def config(self) -> Config:
        """The configuration: every option of diffusers' scheduler, as an entry and as an attribute."""
        return self._config

    @property
    def compatibles(self) -> list[type]:
        """The schedulers of diffusers that can be made from this configuration; diffusers must be installed."""
        try:
            diffusers: Any = importlib.import_module("diffusers")
        except ImportError as e:
            raise ConfigError("compatibles are classes of diffusers, which is not installed") from e
        karras = [scheduler.name for scheduler in diffusers.schedulers.KarrasDiffusionSchedulers]
        own = getattr(getattr(diffusers.schedulers, self._name, None), "_compatibles", karras)
        classes = [getattr(diffusers, name, None) for name in sorted({self._name, *own})]
        # Where a library is missing that a class needs, diffusers has a dummy of that name.
        return [cls for cls in classes if cls is not None and type(cls).__name__ != "DummyObject"]

    def __repr__(self) -> str:
        return f"{type(self).__name__} {to_json(self.config)}"

    def __len__(self) -> int:
        """Return the number of timesteps that the network was trained with."""
        if self.schedule is not None:
            return self.schedule.timesteps
        return int(value_of(self.config, "num_train_timesteps", DEFAULTS[self._name]["num_train_timesteps"]))

    def __getattr__(self, name: str) -> Any:
        config = self.__dict__.get("_config", {})
        if name in config and not name.startswith("_"):
            warnings.warn(f"read scheduler.config.{name} instead of scheduler.{name}", FutureWarning, stacklevel=2)
            return config[name]
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    # The levels of the training ---------------------------------------------------------------------------------------

    def _trained(self) -> NoiseSchedule:
        if self.schedule is None:
            raise AttributeError(f"{self._name} has no betas, as its noise levels are not those of betas")
        return self.schedule

    @property
    def betas(self) -> Tensor:
        """The betas of the training, float32 [T], computed as diffusers does."""
        return trained_betas(self._trained())

    @property
    def alphas(self) -> Tensor:
        """1 - betas, float32 [T]."""
        return 1.0 - self.betas

    @functools.cached_property
    def alphas_cumprod(self) -> Tensor:
        """abar of every timestep, float32 [T]: the products of `alphas`."""
        abar = torch.cumprod(self.alphas, dim=0)
        infinite = self.in_sigma or self._name in MULTISTEP  # sigma would be
        if infinite and self._trained().rescale_zero_terminal_snr:
            abar[-1] = ZERO_SNR
        return abar

    @property
    def final_alpha_cumprod(self) -> Tensor:
        """abar at which the last step of DDIMScheduler and PNDMScheduler ends, float32."""
        if "set_alpha_to_one" not in DEFAULTS[self._name] or self._name in INVERSE:
            raise AttributeError(f"{self._name} has no final_alpha_cumprod")
        return (
            torch.tensor(1.0, dtype=torch.float32, device="cpu")
            if self.config["set_alpha_to_one"]
            else self.alphas_cumprod[0]
        )

    # The levels of a run ----------------------------------------------------------------------------------------------

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        *positional: Any,
        timesteps: Sequence[float] | None = None,
        sigmas: Sequence[float] | None = None,
        original_inference_steps: int | None = None,
        strength: float = 1.0,
        num_train_timesteps: int | None = None,
        mu: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        """Choose the timesteps of a run, which start anew: the history of an earlier run is dropped.

        Args:
            num_inference_steps: The number of steps, from 1 to the number of training timesteps.
            device: The device of ``timesteps``; None means the CPU.
            *positional: Arguments in the order that diffusers' scheduler has them.
            timesteps: The falling timesteps themselves, in place of a number of steps, for the schedulers that have
                this option in diffusers.
            sigmas: The falling noise levels: for EulerDiscreteScheduler with the level at which the last step ends, for
                the schedulers of flow matching without it.
            original_inference_steps: For LCMScheduler and TCDScheduler: in place of the configuration's.
            strength: For LCMScheduler and TCDScheduler: the share of the distillation's timesteps to choose from.
            num_train_timesteps: The number of training timesteps, which must be the configuration's.
            mu: The shift of flow matching, with use_dynamic_shifting.
            sampling_eps: For ScoreSdeVeScheduler: the last time, in place of the configuration's.

        Raises:
            InvalidArgument: If the number of steps is out of range, or an option is not this scheduler's.
            ConfigError: If the configuration does not support this number of steps.
        """
        if self._name in EXPLODING:
            self._set_times(num_inference_steps, device, positional, sampling_eps)
            return
        if sampling_eps is not None:
            raise InvalidArgument(f"sampling_eps is an option of {' and '.join(EXPLODING)}, not of {self._name}")
        if positional:
            by_name = by_place(self._name, "set_timesteps", positional)
            timesteps, sigmas = by_name.get("timesteps", timesteps), by_name.get("sigmas", sigmas)
            original_inference_steps = by_name.get("original_inference_steps", original_inference_steps)
            strength, mu = by_name.get("strength", strength), by_name.get("mu", mu)
            num_train_timesteps = by_name.get("num_train_timesteps", num_train_timesteps)
        given = {"num_inference_steps": num_inference_steps, "timesteps": timesteps, "sigmas": sigmas}
        named = [name for name, value in given.items() if value is not None]
        if len(named) > 1 and self._name != "FlowMatchEulerDiscreteScheduler":  # which takes lists of that many, too
            raise InvalidArgument(f"{' and '.join(named)} exclude each other: give one of them")
        if num_train_timesteps not in (None, len(self)):
            raise InvalidArgument(f"{self._name}: num_train_timesteps is {len(self)}")
        if timesteps is not None and self._name not in TAKES_TIMESTEPS:
            raise InvalidArgument(f"{self._name} takes no timesteps=, as in diffusers; {', '.join(TAKES_TIMESTEPS)} do")
        config: Mapping[str, Any] = self.config
        if self._shift is not None:
            config = {**config, "_shift": self._shift}
        if original_inference_steps is not None or strength != 1.0:
            if self._name not in ("LCMScheduler", "TCDScheduler") or timesteps is not None:
                raise InvalidArgument(
                    "original_inference_steps= and strength= are options of LCMScheduler and TCDScheduler, with a "
                    "number of steps"
                )
            changed = {} if original_inference_steps is None else {"original_inference_steps": original_inference_steps}
            config = {**config, **changed}
        asked: dict[str, Any] = {
            "steps": num_inference_steps,
            "timesteps": timesteps,
            "sigmas": sigmas,
            "strength": strength,
            "mu": mu,
        }
        table = from_config(config, **asked)
        self._forget()
        self._asked = config, asked
        self._tables[None, False, 0, None] = table
        self.num_inference_steps = table.steps if num_inference_steps is None else num_inference_steps
        self._timesteps = self._listed_times(table).to(device)

    def _set_times(self, steps: int | None, device: Any, positional: tuple[Any, ...], eps: float | None) -> None:
        """Lay out the times of ScoreSdeVeScheduler, whose arguments are (steps, sampling_eps, device) in diffusers."""
        if positional or isinstance(device, (int, float)):
            device, eps = (*positional, None)[0], device
        self._exploding("set_timesteps").set_times(whole("num_inference_steps", steps, 1), eps, device)
        self.num_inference_steps = steps

    def _listed_times(self, table: StepTable) -> Tensor:
        exact = self._name == "CMStochasticIterativeScheduler"
        dtype = torch.float64 if exact else torch.float32 if self.in_sigma or self.of_flow else torch.int64
        return torch.tensor(table.timesteps, dtype=torch.float64, device="cpu").to(dtype)

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of a run, one for each evaluation of the network; all those of the training before a run.

        An int64 tensor [N], or float32 for a scheduler in sigma space or of a flow (float64 for consistency models).
        """
        if self._name in EXPLODING:
            return self._exploding("timesteps").times
        if self._timesteps is None:
            falling = torch.arange(len(self) - 1, -1, -1, dtype=torch.int64, device="cpu")
            falling = falling.flip(0) if self._name in INVERSE else falling
            continuous = self.config.get("timestep_type") == "continuous"
            if self.of_flow:
                self._timesteps = self._trained_flow() * len(self)
            elif not self.in_sigma:
                self._timesteps = falling.float() if self._name in MULTISTEP else falling
            elif continuous and self.config["prediction_type"] == "v_prediction":
                self._timesteps = 0.25 * self.sigmas[:-1].log()
            elif self._name in PLAIN:
                self._timesteps = falling.float()
            else:
                self._timesteps = self._listed_times(self._table())
        return self._timesteps

    @timesteps.setter
    def timesteps(self, value: Tensor) -> None:
        if self._name in EXPLODING:
            self._exploding("timesteps").times = value
        self._timesteps = value

    @property
    def sigmas(self) -> Tensor:
        """The noise levels of a run, and the one at which it ends, float32 [N + 1]; those of the training before a run.

        DDPM, DDIM, PNDM, LCM and TCD have none, as in diffusers.
        """
        if self._name in EXPLODING:
            return self._exploding("sigmas").sigmas
        if not (self.in_sigma or self.of_flow or self._name in MULTISTEP):
            raise AttributeError(f"{self._name} has no sigmas; it has alphas_cumprod")
        if self._sigmas is None:
            if self._asked is None and self.of_flow:
                return self._trained_flow()
            if self._asked is None and self._name in (*MULTISTEP, *PLAIN):
                rising = ((1 - self.alphas_cumprod) / self.alphas_cumprod) ** 0.5
                return rising if self._name in MULTISTEP else torch.cat([rising.flip(0), torch.zeros_like(rising[:1])])
            sigmas = run_sigmas(self.config, self._table())
            untimed = self._name == "CMStochasticIterativeScheduler" and self._asked is None
            self._sigmas = sigmas[:-1] if untimed else sigmas
        return self._sigmas

    def _trained_flow(self) -> Tensor:
        """Return the noise levels of the training of a flow, float32 [T]."""
        return torch.tensor(trained_sigmas(self.config, np.float32).copy(), dtype=torch.float32, device="cpu")

    @property
    def sigma_min(self) -> float:
        """The lowest noise level of the training of a flow; for EDM and consistency models the configuration's."""
        return float(self._trained_flow()[-1]) if self.of_flow else self.__getattr__("sigma_min")

    @property
    def sigma_max(self) -> float:
        """The highest noise level of the training of a flow; for EDM and consistency models the configuration's."""
        return float(self._trained_flow()[0]) if self.of_flow else self.__getattr__("sigma_max")

    @property
    def shift(self) -> float:
        """The shift of the levels of FlowMatchEulerDiscreteScheduler."""
        if self._name != "FlowMatchEulerDiscreteScheduler":
            return self.__getattr__("shift")
        return float(self.config["shift"]) if self._shift is None else self._shift

    def set_shift(self, shift: float) -> None:
        """Change the shift of the runs that `set_timesteps` lays out, for FlowMatchEulerDiscreteScheduler.

        Args:
            shift: The shift, a positive number.

        Raises:
            InvalidArgument: If it is not, or the scheduler is another one.
        """
        if self._name != "FlowMatchEulerDiscreteScheduler":
            raise InvalidArgument("set_shift belongs to FlowMatchEulerDiscreteScheduler")
        self._shift = number("shift", shift, 1e-6, 1e6)

    @property
    def init_noise_sigma(self) -> float | Tensor:
        """The standard deviation of the initial noise, by which standard normals are multiplied."""
        if self._name in EXPLODING:
            return float(self.config["sigma_max"])
        if not self.in_sigma:
            return 1.0
        if self.schedule is None:
            largest = float(self.config["sigma_max"])
            return largest if self._name == "CMStochasticIterativeScheduler" else math.hypot(largest, 1.0)
        sigma = self.sigmas.max()
        return sigma if self.config["timestep_spacing"] in ("linspace", "trailing") else (sigma**2 + 1) ** 0.5

    def sigma_to_t(self, sigmas: float | np.ndarray) -> float | np.ndarray:
        """Compute the timestep of a noise level, for CMStochasticIterativeScheduler: 250 ln(sigma).

        Args:
            sigmas: The noise level, or several.

        Returns:
            The timestep, or several.
        """
        if self._name != "CMStochasticIterativeScheduler":
            raise InvalidArgument("sigma_to_t belongs to CMStochasticIterativeScheduler")
        t = 250.0 * np.log(np.asarray(sigmas, dtype=np.float64) + 1e-44)
        return t if t.ndim else float(t)

    @property
    def step_index(self) -> int | None:
        """The number of the next step; None before the first one, or where images are at different ones."""
        places = set(self._next or ())
        place = places.pop() if len(places) == 1 else None
        return None if place is None else place.row

    @property
    def begin_index(self) -> int | None:
        """The number of the step that starts a run; None unless `set_begin_index` was called."""
        return self._begin_index

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Choose the step that starts a run, as for img2img, whatever the timestep that is given to it.

        Args:
            begin_index: An index of ``timesteps``.

        Raises:
            InvalidArgument: If it is out of range.
        """
        self._begin_index = whole("begin_index", begin_index, 0, len(self.timesteps) - 1, of="timesteps")

    def index_for_timestep(self, timestep: float | Tensor, schedule_timesteps: Tensor | None = None) -> int:
        """Return the index of a timestep, of the second one where two are equal, as diffusers does.

        Args:
            timestep: The timestep.
            schedule_timesteps: The timesteps to look in; None means those of the run.

        Returns:
            The index. Multi-step schedulers have the last one for a timestep that is not there, as in diffusers.

        Raises:
            InvalidArgument: If another scheduler does not have the timestep.
        """
        times = (self.timesteps if schedule_timesteps is None else schedule_timesteps).tolist()
        t = listed(timestep, 1)[0]
        found = indices_of(t, times)
        if not found and (self._name in MULTISTEP or self._name == "EDMDPMSolverMultistepScheduler"):
            return len(times) - 1
        if not found:
            raise InvalidArgument(f"timestep {t:g} is not one of the {len(times)} timesteps")
        return found[min(1, len(found) - 1)]

    def previous_timestep(self, timestep: int | Tensor) -> int | Tensor:
        """Return the timestep after this one in a run, at less noise; -1 after the last one.

        Args:
            timestep: A timestep of the run, or any before `set_timesteps`.

        Returns:
            The timestep, as an entry of ``timesteps`` in a run.

        Raises:
            InvalidArgument: If the run does not have the timestep.
        """
        t = listed(timestep, 1)[0]
        if self._asked is None:
            return timestep - 1
        times = self.timesteps.tolist()
        found = indices_of(t, times)
        if not found:
            raise InvalidArgument(f"timestep {t:g} is not one of the {len(times)} timesteps")
        return (
            self.timesteps[found[0] + 1]
            if found[0] + 1 < len(times)
            else torch.tensor(-1, dtype=torch.int64, device="cpu")
        )

    def _get_variance(self, timestep: int, prev_timestep: int | None = None) -> Tensor:
        """Return the variance of the step of DDPMScheduler or DDIMScheduler, which loops that invert a run call."""
        if self._name not in ("DDPMScheduler", "DDIMScheduler"):
            raise AttributeError(f"{self._name} has no _get_variance")
        ddim = self._name == "DDIMScheduler"
        before = int(self.previous_timestep(timestep) if prev_timestep is None else prev_timestep)
        end = self.final_alpha_cumprod if ddim else torch.ones((), dtype=torch.float32, device="cpu")
        abar, abar_next = self.alphas_cumprod[timestep], self.alphas_cumprod[before] if before >= 0 else end
        return step_variance(abar, abar_next, None if ddim else self.config["variance_type"])

    # Steps ------------------------------------------------------------------------------------------------------------

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Scale a sample to the network's input: in sigma space by 1 / sqrt(sigma^2 + sigma_data^2), else not at all.

        The samples may be more than those of `step`, as a batch that is doubled for classifier-free guidance.

        Args:
            sample: The sample, [B, ...].
            timestep: As for `step`.

        Returns:
            The network's input, of the sample's shape.

        Raises:
            InvalidArgument: If a timestep is not one of this run.
        """
        if not self.in_sigma:
            return sample
        table, rows = self._table(), self._search().rows(timestep, len(sample))
        return sample * self._spread([to_state(table, row) for row in rows], sample)

    def step(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        *positional: Any,
        eta: float | None = None,
        use_clipped_model_output: bool | None = None,
        generator: Generators = None,
        variance_noise: Tensor | None = None,
        return_dict: bool = True,
        **others: Any,
    ) -> StepOutput | tuple[Tensor, ...]:
        """Compute the next sample from the network's output, by one row of the table for every image.

        The step is computed in float32, or in float64 for float64 samples.

        Args:
            model_output: The network's output for ``scale_model_input(sample, timestep)``, [B, C, ...], or [B, 2 C,
                ...] if the variance is learned.
            timestep: The next of ``timesteps``: a number for all images, or a tensor [B] with one for each. A timestep
                that does not follow an image's last one starts it anew there, at a solver's lowest order. -1 leaves an
                image as it is (except with EDM and consistency models, whose timesteps may be negative).
                DDIMScheduler takes any whole timestep, as in diffusers.
            sample: The present sample, [B, C, ...].
            *positional: Arguments in the order that diffusers' scheduler has them.
            eta: The share of fresh noise, 0 to 1: for DDIM (by default 0) and TCD (by default 0.3); others ignore it.
            use_clipped_model_output: For DDIM: whether the predicted noise is derived from the clipped x_0.
            generator: The source of noise: a generator, a list with one for each image, or None for torch's default.
                Noise is drawn when diffusers draws it, in the same dtype.
            variance_noise: The noise to use instead, of the sample's shape.
            return_dict: Whether the result is a `StepOutput`.
            **others: ``s_churn``, ``s_tmin``, ``s_tmax``, ``s_noise`` and ``order``, of which only the values that
                change nothing are supported.

        Returns:
            The next sample and the predicted image, as a `StepOutput` or a tuple of diffusers' length, in the sample's
            dtype.

        Raises:
            InvalidArgument: If a timestep is not one of this run or needs a history that is missing, or if shapes,
                options or generators do not fit.
        """
        if self._name in EXPLODING:
            raise InvalidArgument(f"{self._name} has step_pred and step_correct in place of step, as in diffusers")
        if positional:
            by_name = by_place(self._name, "step", positional)
            eta, generator = by_name.pop("eta", eta), by_name.pop("generator", generator)
            use_clipped_model_output = by_name.pop("use_clipped_model_output", use_clipped_model_output)
            variance_noise, return_dict = (
                by_name.pop("variance_noise", variance_noise), by_name.pop("return_dict", return_dict),
            )  # fmt: skip
            others |= by_name
        if others:
            check_others(self._name, others)
        for name, value in (("model_output", model_output), ("sample", sample)):
            if not isinstance(value, Tensor):
                raise InvalidArgument(f"{name} is a {type(value).__name__}; a tensor is needed")
        x, out = flat(sample), flat(model_output)
        if sample.ndim == 0 or out.shape[:1] + out.shape[2:] != x.shape[:1] + x.shape[2:]:
            raise InvalidArgument(
                f"sample {tuple(sample.shape)} and model_output {tuple(model_output.shape)} must be [B, C, ...] of one "
                "batch and size"
            )
        eta = eta if self._name in ETA else None
        clipped = bool(use_clipped_model_output) and self._name == "DDIMScheduler"
        places = self._search().places(timestep, len(sample))
        state = self._prepared(places, x, out, eta, clipped)
        table = state.bank.tables[0]
        moving = [place.row for place in places if place.row < len(table)]
        if any(draws_noise(self.config, table, row, eta) for row in moving):
            z = variance_noise
            if z is None:
                dtype = noise_dtype(self._name, model_output, sample)
                z = randn(tuple(sample.shape), generator, sample.device, dtype)
            elif z.shape != sample.shape:
                raise InvalidArgument(
                    f"variance_noise {tuple(z.shape)} is not of the sample's shape {tuple(sample.shape)}"
                )
            z = flat(z).to(sample.device, state.x.dtype)
            state.noise = lambda _: z
        results = self._results(state, table, places)
        self._next = [
            None if place.alone is not None else place._replace(row=int(row))
            for place, row in zip(places, state.row_host, strict=True)
        ]
        dtype = model_output.dtype if self.of_flow else sample.dtype
        results = {name: value.reshape(sample.shape).to(dtype) for name, value in results.items()}
        if return_dict:
            return StepOutput(results)
        return tuple(results.values())[: 1 if self._name in ALONE else 2]

    def _results(self, state: State, table: StepTable, places: Sequence[Place]) -> dict[str, Tensor]:
        """Run a row for every image, and return the results' entries in diffusers' order."""
        x0 = update.predict_x0(state)
        second = SECOND.get(self._name)
        before = {}
        if second is not None:  # the result without its noise, in units of the sample at that level
            parts = {"ax": state.x, "ao": update.split_output(state)[0], "a0": x0}
            mean = sum(state.column(name).view(-1, 1, 1, 1) * value for name, value in parts.items())
            ends = state.column("abar_next") if second == "denoised" else 1.0 - state.column("s") ** 2
            before = {second: mean / ends.sqrt().view(-1, 1, 1, 1)}
        update.update(state)
        state.noise = None
        x = state.x
        if self.in_sigma:
            x = x * self._spread([from_state(table, place.row) for place in places], x)
        return {"prev_sample": x, **before, "pred_original_sample": x0 * table.data_scale}

    def add_noise(self, original_samples: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Add noise to images: sqrt(abar) x_0 + sqrt(1 - abar) eps, or x_0 + sigma eps in sigma space.

        Args:
            original_samples: The images x_0, [B, ...].
            noise: Standard normals eps, of the images' shape.
            timesteps: The timestep that gives abar, of this run or a whole one of the noise schedule: a number for all
                images, or a tensor [B] with one for each. After `set_begin_index` the level is that of the next step
                whatever the timestep, as in diffusers.

        Returns:
            The noisy images, in the dtype of ``original_samples``.

        Raises:
            InvalidArgument: If a timestep is neither.
        """
        if self._name in EXPLODING:
            return noisy(self._exploding("add_noise"), original_samples, noise, timesteps)
        times = listed(timesteps, len(original_samples))
        if self._begin_index is not None and (self.in_sigma or self.of_flow or self._name in MULTISTEP):
            index = self._begin_index if self.step_index is None else self.step_index
            abar = np.array([self._table().rows[min(index, len(self._table()) - 1)].abar] * len(times))
        else:
            abar = np.array([self._abar(t) for t in times])
        a, s = np.sqrt(abar), np.sqrt(1.0 - abar)
        if self.of_flow or (self._asked is not None and self._table().flow):
            a, s = a / (a + s), s / (a + s)
        if self.in_sigma:
            scale = self._table().data_scale
            a, s = np.ones_like(a), scale * s / a
        dtype = torch.float64 if original_samples.dtype == torch.float64 else torch.float32
        x0, eps = original_samples.to(dtype), noise.to(dtype)
        return (self._spread(a, x0) * x0 + self._spread(s, x0) * eps).to(original_samples.dtype)

    def scale_noise(self, sample: Tensor, timestep: Any, noise: Tensor) -> Tensor:
        """Add noise to images by flow matching: (1 - sigma) x_0 + sigma eps.

        Args:
            sample: The images x_0, [B, ...].
            timestep: The timestep that gives sigma, of this run, or of the training before a run: a number for all
                images, or a tensor [B] with one for each.
            noise: Standard normals eps, of the images' shape.

        Returns:
            The noisy images, in the dtype of ``sample``.

        Raises:
            InvalidArgument: If the scheduler is not one of flow matching, or has not this timestep.
        """
        if not self.of_flow:
            raise InvalidArgument(f"{self._name} has add_noise; scale_noise belongs to {' and '.join(FLOW_SCHEDULERS)}")
        return self.add_noise(sample, noise, timestep)

    def get_velocity(self, sample: Tensor, noise: Tensor, timesteps: Any) -> Tensor:
        """Compute v = sqrt(abar) eps - sqrt(1 - abar) x_0, the target of v-prediction (Salimans & Ho 2022).

        diffusers' EulerDiscreteScheduler looks up abar by the number of the step; here the timestep decides.

        Args:
            sample: The images x_0, [B, ...].
            noise: Standard normals eps, of the images' shape.
            timesteps: As for `add_noise`.

        Returns:
            v, in the dtype of ``sample``.

        Raises:
            InvalidArgument: If a timestep is neither of this run nor a whole one of the noise schedule.
        """
        abar = np.array([self._abar(t) for t in listed(timesteps, len(sample))])
        dtype = torch.float64 if sample.dtype == torch.float64 else torch.float32
        x0, eps = sample.to(dtype), noise.to(dtype)
        v = self._spread(np.sqrt(abar), x0) * eps - self._spread(np.sqrt(1.0 - abar), x0) * x0
        return v.to(sample.dtype)

    # Tables and places ------------------------------------------------------------------------------------------------

    def _table(
        self, eta: float | None = None, clipped: bool = False, start: int = 0, alone: float | None = None
    ) -> StepTable:
        """Return the run's table, or one that starts at a row, or that has the one row of another timestep."""
        key = (eta, clipped, start, alone)
        if key not in self._tables:
            config, asked = self._asked or self._untimed()
            if alone is not None:
                asked = {"steps": self.num_inference_steps, "timesteps": [alone]}
            self._tables[key] = from_config(config, **asked, eta=eta, use_clipped_model_output=clipped, start=start)
        return self._tables[key]

    def _untimed(self) -> tuple[Mapping[str, Any], dict[str, Any]]:
        """Return what the tables before `set_timesteps` are made from, for the schedulers that can step without it."""
        if not self.in_sigma and self._name != "DDPMScheduler":
            raise InvalidArgument("the scheduler has no timesteps yet: call set_timesteps(num_inference_steps)")
        steps = len(self) + (1 if self._name == "EDMEulerScheduler" else 0)
        if self._name in TWO_STAGES or self.schedule is None:
            return self.config, {"steps": steps}
        plain: dict[str, Any] = {key: False for key in self.config if key.startswith("use_")}
        spacing = "leading" if self._name == "DDPMScheduler" else "linspace"
        plain |= {"timestep_spacing": spacing, "steps_offset": 0}
        if "interpolation_type" in self.config:
            plain |= {"interpolation_type": "linear", "final_sigmas_type": "zero"}
        return {**self.config, **plain}, {"steps": steps}

    def _search(self) -> Search:
        return Search(self._name, self._table, self._next, self._begin_index)

    def _prepared(self, places: Sequence[Place], x: Tensor, out: Tensor, eta: float | None, clipped: bool) -> State:
        """Return the state for a step, with this run's history if shape, device and dtype did not change."""
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        kinds = list(dict.fromkeys([(0, None), *((place.start, place.alone) for place in places)]))
        tables = tuple(self._table(eta, clipped, *kind) for kind in kinds)
        old = self._state
        if old is not None and (old.x.shape, old.x.device, old.x.dtype) != (x.shape, x.device, dtype):
            old = None
        state = old
        if old is None or old.bank.tables != tables:
            state = self._state = State.create(x.to(dtype), TableBank(tables, x.device, dtype))
            for name in ("xs", "m1", "m2", "m3"):
                kept = None if old is None else getattr(old, name)
                if kept is not None and getattr(state, name) is not None:
                    setattr(state, name, kept)
        assert state is not None
        state.table_host = np.array([kinds.index((place.start, place.alone)) for place in places])
        state.row_host = np.array([place.row for place in places])
        state.table, state.row = (torch.from_numpy(v.copy()).to(x.device) for v in (state.table_host, state.row_host))
        own, rows = None if old is None else old.x, [place.row for place in places]
        state.x = x.to(dtype)
        if self.in_sigma:
            state.x = state.x * self._spread([to_state(tables[0], row) for row in rows], state.x)
        state.out = out.to(dtype)
        replaced = [self._next is not None and replaces(self.config, tables[0], place) for place in places]
        if own is not None and any(replaced):
            # The prediction x_0 = kx x + ko out is that of the caller's sample, all else that of the state's own.
            mask = self._spread(replaced, state.x)
            ratio = self._spread([x0_ratio(tables[0], row) for row in rows], state.x)
            state.out = state.out + mask * ratio * (state.x - own)
            state.x = torch.where(mask != 0, own, state.x)
        return state

    def _abar(self, t: float) -> float:
        """Return abar at a timestep of this run, or else of the noise schedule."""
        if self._asked is not None or (self.schedule is None and not self.of_flow):
            for row in self._table().rows:
                if same(t, row.t):
                    return row.abar
        if self.of_flow and self._asked is None:
            return abar_of(float(self._trained_flow()[self.index_for_timestep(t)]))
        if self.schedule is None:
            raise InvalidArgument(f"timestep {t:g} is not one of this run's; set_timesteps lays them out")
        return self.schedule.abar(t)

    @staticmethod
    def _spread(factors: Any, x: Tensor) -> Tensor:
        """Make a tensor [B, 1, ...] of one factor for each image."""
        return torch.tensor(np.asarray(factors), dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))
