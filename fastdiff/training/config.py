"""`TrainConfig`: the settings of a training run, checked when they are made."""

from __future__ import annotations

import dataclasses
import math

from fastdiff.checks import boolean, is_number, shown, whole
from fastdiff.core.noise import check_seed
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import PREDICTIONS
from fastdiff.training.loss import FLOW_SIGMAS

DECAYS = ("none", "cosine", "linear")
TRAINED = (*PREDICTIONS, "flow_prediction")
MAX_COUNT = 1 << 62  # of steps and images, which are counted in int64


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a `Trainer`.

    Steps and batch sizes are global: they do not change with the number of processes.

    Attributes:
        steps: Updates of the weights in all, at least 1.
        batch_size: Images in each update, over all processes; at least 1 and a multiple of ``accumulate``.
        accumulate: Parts into which each process divides its share of a batch, to save memory; at least 1.
        prediction: What the network learns to predict: "epsilon" (the noise), "sample" (the image x_0),
            "v_prediction" (Salimans & Ho 2022), or with a `FlowSchedule` "flow_prediction", the velocity of flow
            matching (noise minus x_0).
        flow_sigmas: How the noise levels of flow matching are drawn: "logit_normal" (Esser et al. 2024, eq. 19, with
            m = 0 and s = 1), which favours those in the middle, or "uniform". None, the default, is "logit_normal"
            with "flow_prediction"; other predictions have none. The schedule's shift applies to both.
        min_snr_gamma: Gamma of the min-SNR weights of the loss (Hang et al. 2023), above 0; 5 is usual. None, the
            default, weighs every timestep by 1, as the simple loss of Ho et al. (2020) does. Flow matching has none.
        label_dropout: Share of labels that are replaced by the network's null label, for classifier-free guidance;
            from 0 to just under 1. It has no effect on a network without a null label.
        hflip: Whether each image is mirrored left to right with probability 1/2.
        lr: Learning rate of AdamW after the warm-up, above 0.
        lr_warmup: Updates over which the learning rate rises linearly, at least 0.
        lr_decay: Course of the learning rate after the warm-up: "none", or "cosine" or "linear" down to 0 at ``steps``.
        weight_decay: Weight decay of AdamW, at least 0.
        beta1: Decay rate of AdamW's first moment, from 0 to just under 1.
        beta2: Decay rate of AdamW's second moment, from 0 to just under 1.
        grad_clip: Largest norm of the gradient of all weights, above 0; larger gradients are scaled down to it, and
            `math.inf` switches clipping off.
        ema_decay: Decay rate of the weights' exponential moving average after its warm-up (see `ema_at`), from 0 to
            just under 1.
        precision: Precision of the network's evaluation, "fp32" or "bf16" (autocast). Weights, loss and update are
            float32 in both.
        compile: Whether the network is compiled by ``torch.compile``.
        gradient_checkpointing: Whether blocks compute their activations anew in the backward pass, which takes less
            memory and more time, and changes no result.
        seed: Seed of everything that is random, from 0 to 2^64 - 1.
        log_every: Updates between lines of the log, at least 1.
        save_every: Updates between checkpoints, at least 1.
        sample_every: Updates between grids of samples; 0, which is allowed, draws none. Log, checkpoint and grid also
            follow the last update.

    Raises:
        InvalidArgument: If a setting is out of range; the message names it, its value and what is allowed.
    """

    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    prediction: str = "epsilon"
    flow_sigmas: str | None = None
    min_snr_gamma: float | None = None
    label_dropout: float = 0.1
    hflip: bool = False
    lr: float = 2e-4
    lr_warmup: int = 500
    lr_decay: str = "cosine"
    weight_decay: float = 0.0
    beta1: float = 0.9
    beta2: float = 0.999
    grad_clip: float = 1.0
    ema_decay: float = 0.9999
    precision: str = "fp32"
    compile: bool = False
    gradient_checkpointing: bool = False
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000

    def __post_init__(self) -> None:
        # NumPy's numbers become Python's, as the settings are saved as JSON.
        object.__setattr__(self, "seed", check_seed(self.seed))
        for key in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            object.__setattr__(self, key, whole(key, getattr(self, key), 1, MAX_COUNT))
        for key in ("lr_warmup", "sample_every"):
            object.__setattr__(self, key, whole(key, getattr(self, key), 0, MAX_COUNT))
        self._need("batch_size", self.batch_size % self.accumulate == 0, f"a multiple of accumulate={self.accumulate}")
        for key, allowed in {"prediction": TRAINED, "lr_decay": DECAYS, "precision": ("fp32", "bf16")}.items():
            value = getattr(self, key)
            listed = ", ".join(map(repr, allowed[:-1])) + f" or {allowed[-1]!r}"
            self._need(key, isinstance(value, str) and value in allowed, listed)
        for key in ("hflip", "compile", "gradient_checkpointing"):
            object.__setattr__(self, key, boolean(key, getattr(self, key)))
        self._need_number("lr", "a positive number", above=True)
        if not (isinstance(self.grad_clip, float) and self.grad_clip == math.inf):
            self._need_number("grad_clip", "a positive number (inf: no clipping)", above=True)
        self._need_number("weight_decay", "a number from 0")
        for key in ("label_dropout", "beta1", "beta2", "ema_decay"):
            self._need_number(key, "a number from 0 to just under 1", below=1.0)
        if self.min_snr_gamma is not None:
            self._need_number("min_snr_gamma", "None or a positive number", above=True)
        flow = self.prediction == "flow_prediction"
        self._need("min_snr_gamma", not flow or self.min_snr_gamma is None, "None with prediction='flow_prediction'")
        if self.flow_sigmas is not None:
            known = isinstance(self.flow_sigmas, str) and self.flow_sigmas in FLOW_SIGMAS
            self._need("flow_sigmas", known, " or ".join(map(repr, FLOW_SIGMAS)))
            self._need("flow_sigmas", flow, f"None with prediction={self.prediction!r}, which is not of a flow,")

    def _need(self, key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise InvalidArgument(f"{key}={shown(getattr(self, key))}: {allowed} is needed")

    def _need_number(self, key: str, allowed: str, above: bool = False, below: float = math.inf) -> None:
        """Check a finite number from 0 (above: greater than 0) to just under ``below``, and store it as a float."""
        value = getattr(self, key)
        self._need(key, is_number(value) and 0 <= value < below and (value > 0 or not above), allowed)
        object.__setattr__(self, key, float(value))

    def lr_at(self, step: int) -> float:
        """Return the learning rate of an update: linear warm-up, then the decay.

        Args:
            step: The number of the update, 0 for the first.

        Returns:
            The learning rate.
        """
        if step < self.lr_warmup:
            return self.lr * (step + 1) / self.lr_warmup
        progress = (step - self.lr_warmup) / max(self.steps - self.lr_warmup, 1)
        if self.lr_decay == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.lr * (1 - min(progress, 1.0)) if self.lr_decay == "linear" else self.lr

    def ema_at(self, i: int) -> float:
        """Return the decay rate of the moving average in update i: d = min(ema_decay, (1 + i) / (10 + i)).

        The warm-up makes the average forget the initial weights soon.

        Args:
            i: The number of the update, 0 for the first.

        Returns:
            The decay rate d of ema <- d ema + (1 - d) weights.
        """
        return min(self.ema_decay, (1 + i) / (10 + i))
