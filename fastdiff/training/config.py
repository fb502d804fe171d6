"""What a training run is told, checked before anything heavy runs."""

from __future__ import annotations

import dataclasses
import math

from fastdiff.errors import InvalidArgument
from fastdiff.noise import check_seed
from fastdiff.schedule import PREDICTIONS


@dataclasses.dataclass(frozen=True, slots=True)
class TrainConfig:
    """Settings of a `Trainer`. Batch sizes and steps are global: they do not change with the number of processes.

    prediction: what the network is trained to say, "epsilon", "sample" or "v_prediction". min_snr_gamma: None for the
    simple loss. label_dropout: share of labels replaced by the network's null label, for guidance. precision: "fp32" or "bf16"
    (autocast). lr_decay: after ``lr_warmup`` steps, "none", or "cosine" / "linear" down to 0 at ``steps``. accumulate: a
    batch is run in this many parts. Raises `InvalidArgument` naming the setting.
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
        self._need("lr", 0 < self.lr < math.inf, "a positive number")
        self._need("grad_clip", self.grad_clip > 0, "a positive number (inf: no clipping)")
        self._need("weight_decay", 0 <= self.weight_decay < math.inf, "0 or a positive number")
        for key in ("label_dropout", "beta1", "beta2", "ema_decay"):
            self._need(key, 0 <= getattr(self, key) < 1, "a number from 0 to just under 1")
        self._need(
            "min_snr_gamma",
            self.min_snr_gamma is None or 0 < self.min_snr_gamma < math.inf,
            "None or a positive number",
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
