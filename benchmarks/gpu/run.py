"""What a part is given, and how it says that a check is red."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SMALLEST_SHARE = 45.0  # seconds that a part, or a contender, needs to be worth its start


@dataclasses.dataclass
class Run:
    """What a part knows of its call."""

    out: Path
    dry: bool
    ends: float  # on time.time's clock
    diffusers: Path | None
    finished: dict[str, Any]  # earlier parts

    @property
    def device(self) -> Any:
        import torch

        return torch.device("cpu" if self.dry else "cuda")

    @property
    def cuda(self) -> Any:
        """torch.cuda, or its stand-in."""
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
    """A check is red; ``result`` says which, beside what went well."""

    def __init__(self, message: str, result: dict[str, Any]):
        super().__init__(message)
        self.result = result
