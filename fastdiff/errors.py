"""The errors that fastdiff raises on purpose; their messages say what was wrong, where, and what would work."""

from __future__ import annotations

from typing import Any


class FastdiffError(Exception):
    """Base of all errors that fastdiff raises on purpose."""


class InvalidArgument(FastdiffError, ValueError):
    """A value given by the caller is outside what is allowed; the message names both."""


class ConfigError(FastdiffError, ValueError):
    """A network, schedule or scheduler configuration cannot be used; the message names the key."""


class CheckpointError(FastdiffError):
    """A weights file or model folder cannot be loaded; the message names the file and every mismatch."""


class DataError(FastdiffError):
    """Training data cannot be read; the message names the file."""


class BackendError(FastdiffError, RuntimeError):
    """A backend cannot run this network here; the message lists every reason."""


class NumericsError(FastdiffError, ArithmeticError):
    """Some images became NaN or infinite.

    Attributes:
        images: Global indices of those images.
        output: The `SampleOutput` of the run, in which the other images are intact; None where there is none.
    """

    def __init__(self, message: str, images: tuple[int, ...] = (), output: Any = None):
        super().__init__(message)
        self.images = images
        self.output = output


class TrainingError(FastdiffError, RuntimeError):
    """Training stopped (NaN loss, unusable checkpoint, full disk); the last good checkpoint is kept."""


class Cancelled(FastdiffError):
    """The call was ended between two steps by `Sampler.cancel`."""


class ReentrantCall(FastdiffError, RuntimeError):
    """An object was used from within one of its own steps, which waits for that call: it would never end."""


class CallbackError(FastdiffError, RuntimeError):
    """A user's callback raised an exception, which is chained; the message names the row."""
