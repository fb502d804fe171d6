"""The arguments of a part, its journal of finished items, and the exceptions that end a part."""

from __future__ import annotations

import dataclasses
import json
import os
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALLEST_SHARE = 45.0  # seconds; a part or contender is not started with less time left
JOURNAL = "items.jsonl"
ATTEMPTS = 2  # of an item whose process ended without a word


class Failure(Exception):
    """Raised if a check fails. ``result`` holds the results of all checks of the part."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result


class ContextLost(Exception):
    """Raised when CUDA's context is lost, with which this process can do nothing more."""


@dataclasses.dataclass
class Run:
    """Arguments of a part.

    Attributes:
        out: folder of the results.
        dry: whether this is a dry run.
        ends: time at which the call ends, as of time.time.
        diffusers: folder with diffusers.
        finished: results of earlier parts.
        part: name of the part.
    """

    out: Path
    dry: bool
    ends: float
    diffusers: Path | None
    finished: dict[str, Any]
    part: str = ""
    _items: dict[str, dict[str, Any]] | None = dataclasses.field(default=None, init=False, repr=False)

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def cuda(self) -> Any:
        """torch.cuda, or a fake of it in a dry run."""
        import torch

        from tests.support.fake_cuda import FakeCuda

        return FakeCuda() if self.dry else torch.cuda

    def compile(self, function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
        import torch

        return function if self.dry else torch.compile(function, **options)

    @property
    def late(self) -> bool:
        return not self.dry and time.time() > self.ends - SMALLEST_SHARE

    def synchronize(self) -> None:
        if not self.dry:
            import torch

            torch.cuda.synchronize()

    # Items ------------------------------------------------------------------------------------------------------------

    @property
    def journal(self) -> Path:
        return self.out / JOURNAL

    def write(self, item: str, **values: Any) -> None:
        """Append a line to the journal, and wait until it is on the disk."""
        entry = {"dry": self.dry, "part": self.part, "item": item, **values}
        line = f"\n{json.dumps(entry)}\n"  # the line before it may have no end
        file = os.open(self.journal, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(file, line.encode())  # a single call, as processes may append at the same time
            os.fsync(file)
        finally:
            os.close(file)
        self._note(entry)

    def items(self) -> dict[str, dict[str, Any]]:
        """Return the last line of every item of this part, with the number of attempts since its last result."""
        if self._items is None:
            self._items = {}
            for line in read_lines(self.journal):
                self._note(line)
        return self._items

    def anew(self) -> dict[str, dict[str, Any]]:
        """Return `items` with those that other processes have written since."""
        self._items = None
        return self.items()

    def _note(self, line: dict[str, Any]) -> None:
        if self._items is not None and (line["part"], line["dry"]) == (self.part, self.dry):
            attempts = self._items.get(line["item"], {}).get("attempts", 0)
            self._items[line["item"]] = line | {"attempts": attempts + 1 if line["state"] == "begun" else 0}

    def item(self, name: str, compute: Callable[[], Any]) -> dict[str, Any]:
        """Return {"result": ...} or {"error": ...} of an item, which is computed unless the journal has it.

        It is in the journal before this returns, so whatever ends the process later takes nothing with it. An item
        whose process has ended `ATTEMPTS` times without a result has failed.
        """
        known = self.items().get(name)
        if known is not None and known["state"] == "done":
            return {key: known[key] for key in ("result", "error") if key in known}
        if known is not None and known["attempts"] >= ATTEMPTS:
            self.write(name, state="done", error="the process ended while this was computed")
            return {"error": "the process ended while this was computed"}
        self.write(name, state="begun")
        try:
            outcome: dict[str, Any] = {"result": compute()}
            self.synchronize()
        except Exception as e:
            lost = "CUDA error" in str(e) or "illegal memory access" in str(e)
            outcome = {"error": f"{type(e).__name__}: {str(e)[:1000]}", "traceback": traceback.format_exc()[-3000:]}
            self.write(name, state="done", **outcome)
            if lost:
                raise ContextLost(f"{name}: {e}") from e
            return {"error": outcome["error"]}
        self.write(name, state="done", **outcome)
        return outcome


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Read the lines of a journal, without a last one that was not written to its end."""
    found = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else ():
        try:
            found.append(json.loads(line))
        except ValueError:
            continue
    return [line for line in found if isinstance(line, dict) and {"part", "item", "state", "dry"} <= line.keys()]


def forget(path: Path, parts: list[str], dry: bool) -> None:
    """Drop the items of some parts from a journal."""
    kept = [line for line in read_lines(path) if line["part"] not in parts or line["dry"] != dry]
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
    new.replace(path)
