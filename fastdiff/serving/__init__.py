"""One network for many callers: `Engine`, whose jobs' images join and leave a batch between its steps."""

from fastdiff.serving.engine import Engine, Stats
from fastdiff.serving.job import Job

__all__ = ["Engine", "Job", "Stats"]
