"""The result of a scheduler's step, with the names and the tuple's length of each of diffusers' schedulers."""

from __future__ import annotations

from typing import Any

from torch import Tensor

# Schedulers whose tuple is (prev_sample,) alone, and those whose second entry is no pred_original_sample.
ALONE = (
    "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverMultistepInverseScheduler",
    "DPMSolverSinglestepScheduler", "UniPCMultistepScheduler", "DEISMultistepScheduler",
    "EDMDPMSolverMultistepScheduler", "CMStochasticIterativeScheduler", "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
)  # fmt: skip
SECOND = {"LCMScheduler": "denoised", "TCDScheduler": "pred_noised_sample"}


class StepOutput(dict[str, Tensor]):
    """Result of `Scheduler.step`: a dictionary whose entries are attributes, and have numbers, as in diffusers.

    Attributes:
        prev_sample: The next sample, of the sample's shape.
        pred_original_sample: The image x_0 that the network predicts from the present sample, of the sample's shape.
        denoised: For LCMScheduler: the consistency function's value, which noise is added to.
        pred_noised_sample: For TCDScheduler: the sample before noise is added to it.
        prev_sample_mean: For ScoreSdeVeScheduler's predictor: the next sample without its noise.
    """

    def __getattr__(self, name: str) -> Tensor:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"a step's result has no {name}; it has {', '.join(self)}") from None

    def __setattr__(self, name: str, value: Tensor) -> None:
        self[name] = value

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(key) if isinstance(key, str) else self.to_tuple()[key]

    def to_tuple(self) -> tuple[Tensor, ...]:
        """Return the entries.

        Returns:
            All of them, first ``prev_sample``.
        """
        return tuple(self.values())
