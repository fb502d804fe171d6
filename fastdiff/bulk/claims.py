"""Claims of shards: which process draws which one, so that two of them seldom draw the same.

A claim is a lock of one byte of the file ``claims``, which the system takes back when its process ends, however it
ends; no clock takes part. Locks of ranges work on network file systems too. Where there are none, nothing is lost but
time: two processes may then draw the same shard, of which the first file stays.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType

from fastdiff.errors import WriteError

NAME = "claims"
BUSY = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)
PRESENCE = 1 << 40  # a byte beyond those of the shards, which every process locks together with others


class Claims:
    """The claims of one process in the folder of a job."""

    def __init__(self, folder: Path):
        path = folder / NAME
        try:
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        except OSError as e:
            raise WriteError(f"{path} could not be opened ({e.strerror or e})", e.errno) from e

    @contextlib.contextmanager
    def claim(self, shard: int) -> Iterator[bool]:
        """Claim a shard for the block; yield whether that was possible, that is, no other process has it."""
        mine = _lock(self._file, shard)
        try:
            yield mine
        finally:
            if mine:
                _unlock(self._file, shard)

    def alone(self) -> bool:
        """Announce this process, and return whether no other one has announced itself and still runs."""
        if os.name == "nt":  # it has no locks that several processes hold together
            return False
        import fcntl

        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, PRESENCE)
            found = True
        except OSError:
            found = False
        with contextlib.suppress(OSError):
            fcntl.lockf(self._file, fcntl.LOCK_SH | fcntl.LOCK_NB, 1, PRESENCE)
        return found

    def close(self) -> None:
        """Give back all claims."""
        os.close(self._file)

    def __enter__(self) -> Claims:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self.close()


def _lock(file: int, byte: int) -> bool:
    """Lock a byte; False if another process has. True also where the file system has no locks."""
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(file, byte, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]  # Windows only
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except OSError as e:
        return e.errno not in BUSY
    return True


def _unlock(file: int, byte: int) -> None:
    with contextlib.suppress(OSError):
        if os.name == "nt":
            import msvcrt

            os.lseek(file, byte, os.SEEK_SET)
            msvcrt.locking(file, msvcrt.LK_UNLCK, 1)  # type: ignore[attr-defined]  # Windows only
        else:
            import fcntl

            fcntl.lockf(file, fcntl.LOCK_UN, 1, byte)
