"""`Sampler`, which draws images with a U-Net and a noise schedule, and the images and events that it returns."""

from fastdiff.sampler.output import Event, SampleOutput
from fastdiff.sampler.sampler import Sampler

__all__ = ["Event", "SampleOutput", "Sampler"]
