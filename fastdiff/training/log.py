"""The log of a training run: ``log.jsonl``, a progress bar, and TensorBoard where it is installed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

from fastdiff.files import parse_json, write_text
from fastdiff.modes import kept_random_state
from fastdiff.training.config import TrainConfig
from fastdiff.training.resume import writing

# A link that has taken the log's place is not followed: the text would go into another file.
APPEND = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)


class TrainingLog:
    """A log with a line every ``log_every`` steps: step, mean loss since the last line, lr, images_per_s, seconds.

    images_per_s counts the time of waiting for data, but not that of checkpoints and samples; seconds count from the
    start of training. A resumed run continues the log of the interrupted one: lines beyond the checkpoint's step are
    removed, and the losses since the last line are taken from the checkpoint.

    ``step`` is that of the checkpoint from which the run resumes, 0 for a new run. ``losses``, those of the steps since
    the last line, is kept up to date, as checkpoints save it. ``enabled`` is False in all processes but one.
    """

    def __init__(self, out: Path, config: TrainConfig, step: int, losses: list[float], enabled: bool):
        self.config, self.losses, self.enabled = config, losses, enabled
        self.path = out / "log.jsonl"
        self.busy: list[float] = []
        self.board: Any = None
        self._open = contextlib.ExitStack()
        if not enabled:
            return
        with writing(self.path):
            text = self.path.read_text(encoding="utf-8", errors="replace") if self.path.exists() else ""
            records = list(_records(text, step))
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in records))
            self.started = time.perf_counter() - (records[-1].get("seconds", 0.0) if records else 0.0)
            self.file = self._open.enter_context(os.fdopen(os.open(self.path, APPEND, 0o666), "a", encoding="utf-8"))
            with contextlib.suppress(ImportError):
                from torch.utils.tensorboard import SummaryWriter

                # TensorBoard hides the events of an earlier part of the run from purge_step on.
                self.board = SummaryWriter(str(out / "tensorboard"), purge_step=step + 1)
                self._open.callback(self.board.close)
        self.bar = _Bar(config.steps, step)
        self._open.callback(self.bar.close)

    def step(self, step: int, *, loss: float, lr: float, seconds: float) -> None:
        """Report an update, which took ``seconds``, and write a line if it is time for one."""
        if not self.enabled:
            return
        self.losses.append(loss)
        self.busy.append(seconds)
        last = step == self.config.steps
        rate = self.config.batch_size / seconds
        self.bar.update(step, f"loss {loss:.4f}  {rate:.{0 if rate >= 10 else 2}f} images/s")
        if step % self.config.log_every and not last:
            return
        record = {
            "step": step,
            "loss": sum(self.losses) / len(self.losses),
            "lr": lr,
            "images_per_s": round(self.config.batch_size * len(self.busy) / sum(self.busy), 2),
            "seconds": round(time.perf_counter() - self.started, 1),
        }
        self.losses.clear()
        self.busy.clear()
        with writing(self.path):
            self.file.write(json.dumps(record) + "\n")
            self.file.flush()
            if self.board is not None:
                for key in ("loss", "lr", "images_per_s"):
                    self.board.add_scalar(key, record[key], step)

    def drawing(self, row: int, rows: int) -> None:
        """Show how far a sample grid is; row counts from 0, and several parts of a grid each have all rows."""
        self.bar.note(f"drawing samples: row {row + 1} of {rows}")

    def image(self, step: int, picture: Any) -> None:
        """Show a sample grid (a PIL image) in TensorBoard."""
        if self.board is not None:
            import numpy as np

            with writing(self.path.parent / "tensorboard"):
                self.board.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")

    def __enter__(self) -> TrainingLog:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        # The error that ended the run must not be hidden by one of closing the log, as on a full disk.
        with writing(self.path) if error is None else contextlib.suppress(OSError):
            self._open.close()


def _records(text: str, step: int) -> Iterator[dict[str, Any]]:
    """Yield the log's lines up to ``step``, except damaged ones, such as a last line that a crash cut short."""
    for line in text.splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            record = parse_json(line)
            if record["step"] <= step:
                yield record


class _Bar:
    """A progress bar on a terminal; elsewhere a line every 30 seconds, so that a file of the output stays short."""

    def __init__(self, total: int, step: int):
        with kept_random_state():
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
        self._line(f"step {step}/{self.total}  {text}", step == self.total)

    def note(self, text: str) -> None:
        self.progress.update(self.task, description=text)
        self._line(text)

    def _line(self, text: str, always: bool = False) -> None:
        now = time.monotonic()
        if not self.live and (now >= self.next_line or always):
            self.next_line = now + 30.0
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        self.progress.stop()
