"""What a training run reports: ``log.jsonl`` always, a progress bar, TensorBoard where it is installed."""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdiff.files import write_text
from fastdiff.training.config import TrainConfig


class TrainingLog:
    """One line every ``log_every`` steps: step, loss (their mean), lr, images_per_s, seconds since the start.

    On a resume, lines past the checkpoint's step are dropped, so that the file tells one story.
    """

    def __init__(self, out: Path, config: TrainConfig, step: int, enabled: bool):
        self.enabled = enabled
        self.config = config
        self.path = out / "log.jsonl"
        self.losses: list[float] = []
        self.rates: list[float] = []
        self.started = time.perf_counter()
        if not enabled:
            return
        out.mkdir(parents=True, exist_ok=True)
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        write_text(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))
        self.file = self.path.open("a", encoding="utf-8")
        self.board: Any = None
        if importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step)
        self.bar = _Bar(config.steps, step)

    def step(self, step: int, *, loss: float, lr: float, images_per_s: float) -> None:
        if not self.enabled:
            return
        self.losses.append(loss)
        self.rates.append(1.0 / images_per_s)
        last = step == self.config.steps
        self.bar.update(step, f"loss {loss:.4f}  {images_per_s:.0f} images/s")
        if step % self.config.log_every and not last:
            return
        record = {
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            "lr": lr,
            "images_per_s": round(len(self.rates) / sum(self.rates), 2),
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        self.losses, self.rates = [], []
        self.file.write(json.dumps(record) + "\n")
        self.file.flush()
        if self.board is not None:
            for key in ("loss", "lr", "images_per_s"):
                self.board.add_scalar(key, record[key], step)

    def image(self, step: int, picture: Any) -> None:
        """Show a sample grid (a PIL image) in TensorBoard."""
        if self.enabled and self.board is not None:
            import numpy as np

            self.board.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if self.enabled:
            self.bar.close()
            self.file.close()
            if self.board is not None:
                self.board.close()


def _step_of(line: str) -> float:
    """The step of a log line; a line cut short by a crash is later than any."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")


class _Bar:
    """A progress bar on a terminal; elsewhere a line now and then, so that a log file stays readable."""

    def __init__(self, total: int, step: int):
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self.total = total
        self.live = sys.stderr.isatty()
        self.next_line = 0.0
        columns = (
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self.progress = Progress(*columns, console=Console(stderr=True), disable=not self.live)
        self.task = self.progress.add_task("", total=total, completed=step)
        self.progress.start()

    def update(self, step: int, text: str) -> None:
        self.progress.update(self.task, completed=step, description=text)
        now = time.monotonic()
        if not self.live and (now >= self.next_line or step == self.total):
            self.next_line = now + 30.0
            print(f"step {step}/{self.total}  {text}", file=sys.stderr, flush=True)

    def close(self) -> None:
        self.progress.stop()
