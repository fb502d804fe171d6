"""Sample quality: Frechet and kernel distances, precision and recall, each with a confidence interval.

`evaluate` is the whole of ``fastdiff eval``: it draws images, compares them with real ones and keeps what it has
computed. `features` and `measure` are its parts, for images in memory. The sub-package `trilemma` compares quality,
diversity and speed over many settings of the sampler.
"""

from fastdiff.evaluation.classifier import Classifier
from fastdiff.evaluation.metrics import (
    Estimate,
    Reference,
    features,
    frechet_distance,
    kernel_distance,
    measure,
    precision_recall,
)
from fastdiff.evaluation.scoring import evaluate, table

__all__ = [
    "Classifier",
    "Estimate",
    "Reference",
    "evaluate",
    "features",
    "frechet_distance",
    "kernel_distance",
    "measure",
    "precision_recall",
    "table",
]
