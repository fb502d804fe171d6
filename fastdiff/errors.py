"""The errors that fastdiff raises on purpose; their messages say what was wrong, where, and what would work."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

LONGEST = 1 << 20  # characters that are shown of one text

_MESSAGE = re.compile(r"\n(?!  )|[^\n -~]")  # lists in messages are lines that begin with two spaces
_LINE = re.compile(r"[^ -~]")


def printable(text: object, lines: bool = False) -> str:
    """Return a text that no terminal interprets, for names that come from files, arguments and other libraries.

    Args:
        text: Any object; its ``str`` is shown.
        lines: Whether line breaks stay: all of them in a text that fastdiff has laid out.

    Returns:
        The text, in which control characters, invisible and bidirectional formatting characters and surrogates are
        replaced by escapes such as ``\\x1b``. Of a text of more than `LONGEST` characters only the beginning is kept.
    """
    shown = str(text)
    if lines:
        return "\n".join(map(printable, shown.split("\n")))
    return _shown(shown, _LINE)


def _shown(text: str, suspect: re.Pattern[str]) -> str:
    if len(text) > LONGEST:
        text = f"{text[:LONGEST]}... ({len(text) - LONGEST} more characters)"
    return suspect.sub(lambda c: c[0] if c[0].isprintable() else c[0].encode("unicode_escape").decode(), text)


def _escape_record(record: logging.LogRecord) -> bool:
    """Make the text of a log record printable."""
    if isinstance(record.args, tuple):
        record.args = tuple(
            printable(a) if isinstance(a, (str, os.PathLike, BaseException)) else a for a in record.args
        )
    record.msg = _shown(str(record.msg), _MESSAGE)
    return True


# Whatever logs imports this module.
logging.getLogger("fastdiff").addFilter(_escape_record)


class FastdiffError(Exception):
    """Base of all errors that fastdiff raises on purpose; ``str`` of one is safe to print, see `printable`."""

    def __str__(self) -> str:
        return _shown(super().__str__(), _MESSAGE)


class WriteError(FastdiffError, OSError):
    """A file cannot be written, as on a full or read-only disk; the message names the file.

    Attributes:
        errno: The number of the system's error, such as ``errno.ENOSPC``; None where the system gave none.
    """

    def __init__(self, message: str, number: int | None = None):
        super().__init__(message)
        self.errno = number


class InvalidArgument(FastdiffError, ValueError):
    """A value given by the caller is outside what is allowed; the message names both."""


class ConfigError(FastdiffError, ValueError):
    """A network, schedule or scheduler configuration cannot be used; the message names the key."""


class ModifiedError(ConfigError):
    """A network or scheduler was modified, so its configuration does not describe it; the message names the changes."""


class CheckpointError(FastdiffError):
    """A weights file or model folder cannot be loaded; the message names the file and every mismatch."""


class DataError(FastdiffError):
    """Training data cannot be read; the message names the file."""


class BackendError(FastdiffError, RuntimeError):
    """A backend cannot run this network here; the message lists every reason."""


class OutOfMemory(BackendError):
    """Device memory does not suffice for a job of an `Engine`, which ends; other jobs go on."""


class JobError(FastdiffError):
    """A folder of `fastdiff.bulk` belongs to another job, or is unfinished or damaged; the message names every reason.

    Attributes:
        reasons: The reasons, such as the names of the settings that differ.
    """

    def __init__(self, message: str, reasons: tuple[str, ...] = ()):
        super().__init__(message)
        self.reasons = reasons


class WorkerError(FastdiffError, RuntimeError):
    """A worker process of a bulk job ended again and again; the message says how, and at which shard."""


class NumericsError(FastdiffError, ArithmeticError):
    """Some images became NaN, infinite, or larger than any image is.

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
    """The call was ended between two steps by `Sampler.cancel`, or the job by `Job.cancel` or the end of its engine."""


class EngineClosed(FastdiffError, RuntimeError):
    """An engine takes no jobs any more: it was closed, is draining, or a step failed; the message says which."""


class QueueFull(FastdiffError, RuntimeError):
    """An engine has more queued work than it may have.

    Attributes:
        retry_after_s: Seconds after which there is room, as far as it can be foreseen.
    """

    def __init__(self, message: str, retry_after_s: float = 0.0):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeadlineImpossible(FastdiffError, TimeoutError):
    """A job cannot be finished before its deadline, and was refused at once; the message says when it could be."""


class DeadlineMissed(FastdiffError, TimeoutError):
    """A job that was accepted was not finished before its deadline, and was ended there."""


class JobTimeout(FastdiffError, TimeoutError):
    """The time for which a caller waited for a job is over; the job goes on."""


class ReentrantCall(FastdiffError, RuntimeError):
    """An object was used from within one of its own steps, which waits for that call: it would never end."""


class CallbackError(FastdiffError, RuntimeError):
    """A user's callback raised an exception, which is chained; the message names the row."""
