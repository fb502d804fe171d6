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

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdiff.core import update
from fastdiff.core.state import State, TableBank
from fastdiff.errors import InvalidArgument
from fastdiff.integrations.arguments import MULTISTEP, by_place, check_others
from fastdiff.integrations.noise import Generators, draws_noise, noise_dtype, randn
from fastdiff.integrations.outputs import ALONE, SECOND, StepOutput
from fastdiff.integrations.places import Place, Search, replaces
from fastdiff.integrations.scheduler_levels import SchedulerLevels
from fastdiff.integrations.states import flat, from_state, listed, to_state, x0_ratio
from fastdiff.integrations.ve import noisy
from fastdiff.solvers import StepTable
from fastdiff.solvers.compat.diffusers import ETA, EXPLODING, FLOW_SCHEDULERS


class Scheduler(SchedulerLevels):
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
                DDIMScheduler and DDIMInverseScheduler take any whole timestep, as in diffusers.
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

    # The state of a step ----------------------------------------------------------------------------------------------

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

    @staticmethod
    def _spread(factors: Any, x: Tensor) -> Tensor:
        """Make a tensor [B, 1, ...] of one factor for each image."""
        return torch.tensor(np.asarray(factors), dtype=x.dtype, device=x.device).view(-1, *[1] * (x.ndim - 1))
