"""`Sampler`, the public object that draws images from a U-Net and a noise schedule."""

from fastdiff.sampler.output import Event, SampleOutput
from fastdiff.sampler.sampler import Sampler

__all__ = ["Event", "SampleOutput", "Sampler"]
