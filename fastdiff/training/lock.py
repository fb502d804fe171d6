"""The lock of a training's folder: one process at a time writes there, and a killed one leaves no lock behind."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from fastdiff.errors import TrainingError

log = logging.getLogger("fastdiff")

NAME = "training.lock"
BUSY = (errno.EACCES, errno.EAGAIN, errno.EWOULDBLOCK, errno.EDEADLK)


@contextlib.contextmanager
def locked(out: Path, need: int = 0) -> Iterator[None]:
    """Lock a folder, which is made if need be, and check that it can be written and has ``need`` bytes of free space.

    The system frees the lock when the process ends, however it ends; the file, which has the number of the process, is
    removed at the end where that is possible. Raises `TrainingError` if another training has the lock, or the folder
    cannot be written.
    """
    path = out / NAME
    try:
        out.mkdir(parents=True, exist_ok=True)
        handle = _open_locked(path)
        free = shutil.disk_usage(out).free
    except OSError as e:
        raise TrainingError(f"{out}: nothing can be written there ({e.strerror or e}); choose another folder") from e
    try:
        if free < need:
            raise TrainingError(
                f"{out}: a checkpoint takes {need / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; free some space, or "
                "choose another folder"
            )
        yield
    finally:
        # While the lock is there, no other process can have locked this file; one that has opened it sees it removed.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(handle)


def _open_locked(path: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o666)
        try:
            _lock(handle, path)
            if _same(handle, path):  # else an ending process has removed the file after it was opened
                with contextlib.suppress(OSError):  # the number helps people alone
                    os.ftruncate(handle, 0)
                    os.write(handle, str(os.getpid()).encode())
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _lock(handle: int, path: Path) -> None:
    try:
        if os.name == "nt":
            import msvcrt

            os.lseek(handle, 1 << 20, os.SEEK_SET)  # beyond the number, which others may read
            msvcrt.locking(handle, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
            os.lseek(handle, 0, os.SEEK_SET)
        else:
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as e:
        if e.errno not in BUSY:  # some network file systems have no locks
            log.warning("%s cannot be locked (%s): do not train twice in this folder", path, e.strerror)
            return
        number = os.read(handle, 20).decode("ascii", "replace")
        who = f"process {number}" if number.isdigit() else "another process"
        raise TrainingError(
            f"{path.parent}: {who} is training there; wait for its end, or choose another folder"
        ) from e


def _same(handle: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(handle), os.stat(path))
    except FileNotFoundError:
        return False
