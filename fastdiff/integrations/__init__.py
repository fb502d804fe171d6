"""Integrations with diffusers: `accelerate` for its pipelines and `Scheduler` for loops written for its schedulers."""

from fastdiff.integrations.pipelines import accelerate
from fastdiff.integrations.scheduler import Scheduler

__all__ = ["Scheduler", "accelerate"]
