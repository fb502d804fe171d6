"""The arguments of a part, and the exception with which it reports a failed check."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALLEST_SHARE = 45.0  # seconds; a part or contender is not started with less time left


@dataclasses.dataclass
class Run:
    """Arguments of a part.

    Attributes:
        out: folder of the results.
        dry: whether this is a dry run.
        ends: time at which the call ends, as of time.time.
        diffusers: folder with diffusers.
        finished: results of earlier parts.
    """

    out: Path
    dry: bool
    ends: float
    diffusers: Path | None
    finished: dict[str, Any]

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
        import torch

        if not self.dry:
            torch.cuda.synchronize()


class Failure(Exception):
    """Raised if a check fails. ``result`` holds the results of all checks of the part."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result
