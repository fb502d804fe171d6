"""The noise levels of `Scheduler`: those of the training, and those that ``set_timesteps`` lays out for a run."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.checks import number, whole
from fastdiff.errors import InvalidArgument
from fastdiff.integrations.arguments import INVERSE, MULTISTEP, PLAIN, TWO_STAGES, by_place
from fastdiff.integrations.levels import run_sigmas, step_variance, trained_betas
from fastdiff.integrations.scheduler_base import SchedulerBase
from fastdiff.integrations.states import indices_of, listed, same
from fastdiff.integrations.ve import ExplodingSteps
from fastdiff.schedule import NoiseSchedule
from fastdiff.solvers import StepTable, from_config
from fastdiff.solvers.compat.defaults import DEFAULTS
from fastdiff.solvers.compat.diffusers import EXPLODING
from fastdiff.solvers.compat.flow import trained_sigmas
from fastdiff.solvers.compat.given import TAKES_TIMESTEPS
from fastdiff.solvers.compat.sigmas import ZERO_SNR
from fastdiff.solvers.flow import abar_of


class SchedulerLevels(SchedulerBase, ExplodingSteps):
    """The timesteps, noise levels and tables of a scheduler, and the place in them at which a run is."""

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

    # Tables -----------------------------------------------------------------------------------------------------------

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
