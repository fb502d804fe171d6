"""Use of fastdiff from diffusers: `accelerate` for its pipelines, `Scheduler` for loops written for its schedulers."""

from fastdiff.integrations.pipelines import accelerate
from fastdiff.integrations.scheduler import Scheduler

__all__ = ["Scheduler", "accelerate"]
