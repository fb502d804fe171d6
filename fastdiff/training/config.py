"""What a training run is told, checked before anything heavy runs."""

from __future__ import annotations

import dataclasses
import math

from fastdiff.core.noise import check_seed
from fastdiff.errors import InvalidArgument
from fastdiff.schedule import PREDICTIONS


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a `Trainer`. Batch sizes and steps are global: they do not change with the number of processes.

    prediction
        What the network is trained to say: "epsilon", "sample" or "v_prediction".
    min_snr_gamma
        None for the simple loss.
    label_dropout
        Share of labels replaced by the network's null label, for guidance.
    lr_decay
        After ``lr_warmup`` steps: "none", or "cosine" / "linear" down to 0 at ``steps``.
    accumulate
        A batch is run in this many parts.
    precision
        "fp32" or "bf16" (autocast).
    log_every, save_every, sample_every
        Steps between lines of the log, checkpoints, and sample grids (0: none); each also follows the last step.

    Raises `InvalidArgument` naming the setting, its value and what is allowed.
    """

    steps: int = 100_000
    batch_size: int = 128
    accumulate: int = 1
    prediction: str = "epsilon"
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
    seed: int = 0
    log_every: int = 50
    save_every: int = 1000
    sample_every: int = 1000

    def __post_init__(self) -> None:
        check_seed(self.seed)
        for key in ("steps", "batch_size", "accumulate", "log_every", "save_every"):
            self._need(key, _whole(getattr(self, key)) and getattr(self, key) >= 1, "a whole number of at least 1")
        for key in ("lr_warmup", "sample_every"):
            self._need(key, _whole(getattr(self, key)) and getattr(self, key) >= 0, "a whole number of at least 0")
        self._need("batch_size", self.batch_size % self.accumulate == 0, f"a multiple of accumulate={self.accumulate}")
        self._need("prediction", self.prediction in PREDICTIONS, " or ".join(map(repr, PREDICTIONS)))
        self._need("lr_decay", self.lr_decay in ("none", "cosine", "linear"), "'none', 'cosine' or 'linear'")
        self._need("precision", self.precision in ("fp32", "bf16"), "'fp32' or 'bf16'")
        for key in ("hflip", "compile"):
            self._need(key, isinstance(getattr(self, key), bool), "True or False")
        self._need("lr", _number(self.lr) and 0 < self.lr < math.inf, "a positive number")
        self._need("grad_clip", _number(self.grad_clip) and self.grad_clip > 0, "a positive number (inf: no clipping)")
        self._need("weight_decay", _number(self.weight_decay) and 0 <= self.weight_decay < math.inf, "a number from 0")
        for key in ("label_dropout", "beta1", "beta2", "ema_decay"):
            value = getattr(self, key)
            self._need(key, _number(value) and 0 <= value < 1, "a number from 0 to just under 1")
        gamma = self.min_snr_gamma
        self._need(
            "min_snr_gamma", gamma is None or (_number(gamma) and 0 < gamma < math.inf), "None or a positive number"
        )

    def _need(self, key: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise InvalidArgument(f"{key}={getattr(self, key)!r}: {allowed} is needed")

    def lr_at(self, step: int) -> float:
        """The learning rate of update ``step`` (0, 1, ..): linear warm-up, then the decay."""
        if step < self.lr_warmup:
            return self.lr * (step + 1) / self.lr_warmup
        progress = (step - self.lr_warmup) / max(self.steps - self.lr_warmup, 1)
        if self.lr_decay == "cosine":
            return self.lr * 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
        return self.lr * (1 - min(progress, 1.0)) if self.lr_decay == "linear" else self.lr

    def ema_at(self, i: int) -> float:
        """EMA decay of update i: min(ema_decay, (1 + i) / (10 + i)), so that the first weights are soon forgotten."""
        return min(self.ema_decay, (1 + i) / (10 + i))


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
