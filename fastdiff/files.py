"""Files of untrusted folders: atomic writing, so that no reader sees an incomplete file, and JSON of bounded cost.

A temporary file is written and synced, then renamed, and the folder is synced. Nothing is written through a symbolic
link that lies at the path of either file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from fastdiff.errors import FastdiffError, WriteError

LEFTOVER = ".fastdiff-*.tmp"  # names of temporary files, which a killed process leaves behind
_NEW = os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
_NEW |= getattr(os, "O_CLOEXEC", 0)

NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)  # of a file system without links

MAX_DEPTH = 64  # of JSON; Python's parser recurses
MAX_DIGITS = 100  # of a whole number in JSON; Python takes quadratic time for more
_BRACKETS = re.compile(r'"[^"]*"?|[\[{]|[\]}]')  # and strings, in which they mean nothing


@contextlib.contextmanager
def atomic_file(path: str | Path, keep: bool = False) -> Iterator[BinaryIO]:
    """Yield a new binary file, which takes the place of ``path`` if the block succeeds, and is else deleted.

    With ``keep`` it does not: a file that lies at ``path`` by then stays, so that of several writers one is the first.
    Missing folders are created. A failure of the operating system raises `WriteError`, which names ``path``.
    """
    path = Path(path)
    with _naming(path, "could not be written", "what was there is unchanged"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".fastdiff-{os.getpid()}-{secrets.token_hex(8)}.tmp")
        handle = os.open(temporary, _NEW, 0o666)  # the umask takes away what it does of other files
        try:
            with os.fdopen(handle, "w+b") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            if keep:
                _link(temporary, path)
            else:
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
    with _naming(path, "was written, but may be lost if the machine stops now", "its folder could not be synced"):
        _sync_folder(path.parent)


def check_writable(path: str | Path) -> None:
    """Check that a file, or a folder if the name has no suffix, can be written; missing folders are created.

    A small file is written beside it, as permissions alone do not say. Raises `WriteError`.
    """
    path = Path(path)
    with _naming(path, "cannot be written", "nothing was done"):
        if path.suffix and path.is_dir():
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR))
        folder = path.parent if path.suffix else path
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".fastdiff-{os.getpid()}-{secrets.token_hex(8)}.tmp"
        try:
            os.close(os.open(temporary, _NEW, 0o666))
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink()


def write_text(path: str | Path, text: str, keep: bool = False) -> None:
    """Write text to a file as `atomic_file` does, in UTF-8."""
    with atomic_file(path, keep) as file:
        file.write(text.encode())


@contextlib.contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """Yield a new folder, which becomes ``path`` if the block succeeds and no folder with files lies there by then.

    Else it is deleted; so is it if a folder with files was there, which is no error. Its files are synced before.
    """
    with _naming(path, "could not be written", "what was there is unchanged"):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".fastdiff-{os.getpid()}-{secrets.token_hex(8)}.tmp")
        temporary.mkdir()
        try:
            yield temporary
            _sync_folder(temporary)
            try:
                os.rename(temporary, path)
            except OSError as e:
                if e.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not path.is_dir():
                    raise
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    with _naming(path, "was written, but may be lost if the machine stops now", "its folder could not be synced"):
        _sync_folder(path.parent)


def _link(temporary: Path, path: Path) -> None:
    """Give a file its name, unless there is a file of that name."""
    try:
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as e:
        if e.errno not in NO_LINKS:
            raise
        if not path.exists():
            os.replace(temporary, path)
            return
    os.unlink(temporary)


@contextlib.contextmanager
def _naming(path: Path, failure: str, state: str) -> Iterator[None]:
    """Turn an error of the operating system into a `WriteError` that names the path."""
    try:
        yield
    except FastdiffError:
        raise
    except OSError as e:
        raise WriteError(f"{path} {failure} ({e.strerror or e}); {state}", e.errno) from e


def _sync_folder(folder: Path) -> None:
    if os.name == "nt":  # Windows cannot sync a folder
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as e:
        if e.errno != errno.EINVAL:  # some network file systems cannot either
            raise
    finally:
        os.close(handle)


def other_kind(head: bytes, size: int) -> str | None:
    """Say what lies in the place of a file where a download went wrong; None where it may be the file itself.

    ``head`` is the beginning, as 512 bytes, of the file of ``size`` bytes.
    """
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if size == 0:
        return "an empty file; download or copy it again"
    if text.startswith((b"version https://git-lfs", b"version https://hawser")):
        named = re.search(rb"size (\d{1,15})", head)
        real = f", which has {int(named[1])} bytes" if named else ""
        return (
            f"a Git LFS pointer of {size} bytes, not the file itself{real}; `git lfs pull` in its repository "
            "downloads it"
        )
    if text.startswith((b"/annex/", b"../.git/annex", b".git/annex")):
        return "a git-annex pointer, not the file itself; `git annex get` downloads it"
    if re.match(rb"(<!doctype html|<html|<head|<\?xml|<!--)", text):
        return (
            f"an HTML or XML page of {size} bytes, such as one that asks to sign in or reports an error, not the file "
            "itself; download it again, and look at the address"
        )
    return None


def parse_json(text: str | bytes) -> Any:
    """Parse JSON of an untrusted file, whose length the caller has bounded.

    Nesting of more than `MAX_DEPTH`, whole numbers of more than `MAX_DIGITS`, keys that an object has twice or that a
    terminal could interpret, and NaN are refused by a ValueError. Infinity, which diffusers writes, is a number.
    """
    text = text if isinstance(text, str) else bytes(text).decode()
    depth = 0
    for found in _BRACKETS.finditer(text.replace("\\\\", "").replace('\\"', "")):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(found[0], 0)
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
    return json.loads(text, object_pairs_hook=_object, parse_int=_whole, parse_constant=_constant)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {twice[:80]!r} is there twice")
    for key in result:
        if not key.isprintable():
            raise ValueError(f"the key {key[:80]!r} has characters that cannot be printed")
    return result


def _whole(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError(f"a whole number of {len(digits)} digits")
    return int(digits)


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is no number")
    return float(name)
