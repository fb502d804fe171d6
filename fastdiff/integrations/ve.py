"""The steps of diffusers' ScoreSdeVeScheduler: a predictor, which a table has too, and a corrector, which none has."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastdiff.checks import number, shown, whole
from fastdiff.errors import InvalidArgument
from fastdiff.integrations.configuration import Config
from fastdiff.integrations.noise import Generators, randn
from fastdiff.integrations.outputs import StepOutput
from fastdiff.schedule import MAX_TIMESTEPS
from fastdiff.solvers.compat.ve import NAME, discrete_sigmas, sigma_ends, ve_sigmas, ve_times


class Levels:
    """Noise levels of ScoreSdeVeScheduler, as they are in diffusers between ``set_timesteps`` and ``set_sigmas``."""

    def __init__(self, config: Config):
        self.config = config
        steps = int(config["num_train_timesteps"])
        self.times = ve_times(steps, float(config["sampling_eps"]))
        self.set_sigmas(steps, None, None)

    def set_times(self, steps: int, eps: float | None, device: Any) -> None:
        """Lay out the times of a run; the sigmas stay those of `set_sigmas`."""
        eps = self.config["sampling_eps"] if eps is None else number("sampling_eps", eps, above=0, high=1)
        self.times = ve_times(whole("num_inference_steps", steps, 1, MAX_TIMESTEPS), float(eps)).to(device)

    def set_sigmas(self, steps: int, smallest: float | None, largest: float | None) -> None:
        """Lay out the levels of the present times, and those that a step is looked up in."""
        low, high = sigma_ends(
            self.config["sigma_min"] if smallest is None else smallest,
            self.config["sigma_max"] if largest is None else largest,
            InvalidArgument,
        )
        self.sigmas = ve_sigmas(self.times.cpu(), low, high)
        self.discrete = discrete_sigmas(whole("num_inference_steps", steps, 1, MAX_TIMESTEPS), low, high)

    def around(self, timestep: Any, sample: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise levels before and after a step at a time from 0 to 1, of each image [B, 1, ...]."""
        ones = torch.ones(len(sample), dtype=torch.float32, device="cpu")
        t = torch.as_tensor(timestep, dtype=torch.float32, device="cpu") * ones
        index = (t * (len(self.times) - 1)).long()
        if not (t.isfinite().all() and (index >= 0).all() and (index < len(self.discrete)).all()):
            raise InvalidArgument(f"timestep={shown(timestep)}: a time from 0 to 1, as of timesteps, is needed")
        shape = (-1, *[1] * (sample.ndim - 1))
        before, after = self.discrete[index], self.adjacent(index, t)
        return before.to(sample.device).view(shape), after.to(sample.device).view(shape)

    def adjacent(self, index: Tensor, t: Tensor) -> Tensor:
        """Return the level below each index; 0 below the first one."""
        return torch.where(index == 0, torch.zeros_like(t), self.discrete[index.cpu() - 1].to(t.device))


class ExplodingSteps:
    """The methods that ScoreSdeVeScheduler has beyond those of the other schedulers."""

    _name: str
    _config: Config
    _levels: Levels | None

    def _exploding(self, method: str) -> Levels:
        if self._name != NAME:
            raise AttributeError(f"{self._name} has no {method}; {NAME} has")
        if self._levels is None:
            self._levels = Levels(self._config)
        return self._levels

    @property
    def discrete_sigmas(self) -> Tensor:
        """The levels that the steps of ScoreSdeVeScheduler are looked up in, rising, float32 [N]."""
        return self._exploding("discrete_sigmas").discrete

    def set_sigmas(
        self,
        num_inference_steps: int,
        sigma_min: float | None = None,
        sigma_max: float | None = None,
        sampling_eps: float | None = None,
    ) -> None:
        """Lay out the noise levels of a run of ScoreSdeVeScheduler, after `Scheduler.set_timesteps`.

        Args:
            num_inference_steps: The number of steps.
            sigma_min: The lowest level in place of the configuration's.
            sigma_max: The highest level in place of the configuration's.
            sampling_eps: Without effect, as in diffusers where `Scheduler.set_timesteps` has laid out the times.

        Raises:
            InvalidArgument: If a value is out of range.
        """
        self._exploding("set_sigmas").set_sigmas(num_inference_steps, sigma_min, sigma_max)

    def get_adjacent_sigma(self, timesteps: Tensor, t: Tensor) -> Tensor:
        """Return the noise level after a step of ScoreSdeVeScheduler.

        Args:
            timesteps: Indices of `discrete_sigmas`, int64 [B].
            t: The times of the images, [B].

        Returns:
            The level below each index, and 0 for the first one.
        """
        return self._exploding("get_adjacent_sigma").adjacent(timesteps, t)

    def step_pred(
        self,
        model_output: Tensor,
        timestep: Any,
        sample: Tensor,
        generator: Generators = None,
        return_dict: bool = True,
    ) -> StepOutput | tuple[Tensor, ...]:
        """Compute the next sample by the predictor of ScoreSdeVeScheduler (Song et al. 2021, eq. 46).

        Args:
            model_output: The score of the sample, which the network predicts at the timestep ``sigmas[i]``.
            timestep: The time ``timesteps[i]``, from 0 to 1.
            sample: The present sample, [B, C, ...].
            generator: The source of noise, as for `Scheduler.step`.
            return_dict: Whether the result is a `StepOutput`.

        Returns:
            ``prev_sample`` and, without its noise, ``prev_sample_mean``.

        Raises:
            InvalidArgument: If the timestep, a shape or the generator does not fit.
        """
        levels = self._exploding("step_pred")
        _check(model_output, sample)
        before, after = levels.around(timestep, sample)
        diffusion = (before**2 - after**2) ** 0.5
        mean = sample + diffusion**2 * model_output
        noise = randn(tuple(sample.shape), generator, sample.device, sample.dtype)
        result = StepOutput({"prev_sample": mean + diffusion * noise, "prev_sample_mean": mean})
        return result if return_dict else result.to_tuple()

    def step_correct(
        self, model_output: Tensor, sample: Tensor, generator: Generators = None, return_dict: bool = True
    ) -> StepOutput | tuple[Tensor, ...]:
        """Correct a sample by a step of Langevin dynamics, of ScoreSdeVeScheduler (Song et al. 2021, algorithm 4).

        The step's length is that of the whole batch, as in diffusers: a sample depends on the others.

        Args:
            model_output: The score of the sample.
            sample: The present sample, [B, C, ...].
            generator: The source of noise, as for `Scheduler.step`.
            return_dict: Whether the result is a `StepOutput`.

        Returns:
            ``prev_sample``, at the same noise level.

        Raises:
            InvalidArgument: If a shape or the generator does not fit.
        """
        self._exploding("step_correct")
        _check(model_output, sample)
        noise = randn(tuple(sample.shape), generator, sample.device, torch.float32)
        score_norm, noise_norm = (v.reshape(len(v), -1).norm(dim=-1).mean() for v in (model_output, noise))
        length = (self._config["snr"] * noise_norm / score_norm) ** 2 * 2
        result = StepOutput({"prev_sample": sample + length * model_output + (length * 2) ** 0.5 * noise})
        return result if return_dict else result.to_tuple()


def _check(model_output: Any, sample: Any) -> None:
    for name, value in (("model_output", model_output), ("sample", sample)):
        if not isinstance(value, Tensor) or value.ndim == 0:
            raise InvalidArgument(f"{name} is {shown(value)}; a tensor [B, C, ...] is needed")
    if model_output.shape != sample.shape:
        raise InvalidArgument(
            f"sample {tuple(sample.shape)} and model_output {tuple(model_output.shape)} must be of one shape"
        )


def noisy(levels: Levels, x0: Tensor, noise: Tensor, indices: Any) -> Tensor:
    """Return x_0 + sigma eps at indices of the discrete levels, as ScoreSdeVeScheduler's ``add_noise`` does."""
    index = torch.as_tensor(indices, dtype=torch.int64, device="cpu").reshape(-1)
    if not ((index >= 0).all() and (index < len(levels.discrete)).all()) or len(index) not in (1, len(x0)):
        raise InvalidArgument(f"timesteps={shown(indices)}: an index of discrete_sigmas for each image is needed")
    return noise * levels.discrete[index].to(x0).view(-1, *[1] * (x0.ndim - 1)) + x0
