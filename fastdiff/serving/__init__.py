"""One network for many callers: `Engine`, whose jobs' images join and leave a batch between its steps.

``fastdiff serve`` offers engines over HTTP. Its modules, and the process that answers requests, do not import torch, so
the names of this package are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {"Engine": "engine", "Job": "job", "Lanes": "lanes", "Stats": "engine"}

if TYPE_CHECKING:
    from fastdiff.serving.engine import Engine as Engine
    from fastdiff.serving.engine import Stats as Stats
    from fastdiff.serving.job import Job as Job
    from fastdiff.serving.lanes import Lanes as Lanes

__all__ = ["Engine", "Job", "Lanes", "Stats"]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value
