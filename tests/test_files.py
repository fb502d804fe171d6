"""Files of untrusted folders: links, failed writes, JSON that costs too much, names that a terminal would interpret."""

from __future__ import annotations

import errno
import json
import logging
import os
import secrets
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastdiff import errors, files, memory
from fastdiff.errors import CheckpointError, FastdiffError, InvalidArgument, WriteError, printable
from fastdiff.files import atomic_file, atomic_folder, parse_json, write_text
from tests.support.checkpoints import needs_posix

# Writing --------------------------------------------------------------------------------------------------------------


@needs_posix
def test_links_are_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link at the target is replaced; one at the temporary path, which cannot be guessed, is an error."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    folder = tmp_path / "out"
    folder.mkdir()
    (folder / "a.json").symlink_to(victim)
    write_text(folder / "a.json", "new")
    assert victim.read_text() == "mine"
    assert not (folder / "a.json").is_symlink()
    assert (folder / "a.json").read_text() == "new"

    monkeypatch.setattr(secrets, "token_hex", lambda n: "0" * 2 * n)
    temporary = folder / f".fastdiff-{os.getpid()}-{'0' * 16}.tmp"
    for plant in (lambda: temporary.symlink_to(victim), lambda: temporary.symlink_to(tmp_path / "dangling"),
                  lambda: os.link(victim, temporary), lambda: os.mkfifo(temporary)):  # fmt: skip
        plant()
        with pytest.raises(WriteError, match=r"a\.json could not be written \(File exists\)"):
            write_text(folder / "a.json", "newer")
        assert os.path.lexists(temporary)  # it is not ours to delete
        temporary.unlink()
    assert victim.read_text() == "mine"
    assert not (tmp_path / "dangling").exists()
    assert (folder / "a.json").read_text() == "new"


@needs_posix
@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_the_umask_decides_who_may_read(tmp_path: Path, mask: int) -> None:
    before = os.umask(mask)
    try:
        with atomic_file(tmp_path / "a") as file:
            assert stat.S_IMODE(os.fstat(file.fileno()).st_mode) == 0o666 & ~mask
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o666 & ~mask


def test_long_names_can_be_written(tmp_path: Path) -> None:
    name = "a" * 250 + ".json"
    write_text(tmp_path / name, "{}")
    assert [p.name for p in tmp_path.iterdir()] == [name]


CODES = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)


@pytest.mark.parametrize("code", CODES, ids=[errno.errorcode[c] for c in CODES])
@pytest.mark.parametrize("call", ["open", "fdopen", "fsync", "replace", "mkdir"])
def test_each_failing_call_names_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str, code: int
) -> None:
    path = tmp_path / "folder" / "a.txt"
    write_text(path, "old")

    def fail(*_: Any, **__: Any) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patched:
        patched.setattr(os, call, fail)
        with pytest.raises(WriteError) as caught:
            write_text(path, "new") if call != "mkdir" else write_text(tmp_path / "x" / "a.txt", "new")
    assert "a.txt could not be written" in str(caught.value)
    assert os.strerror(code) in str(caught.value)
    assert caught.value.errno == code
    assert path.read_text() == "old"
    assert [p.name for p in path.parent.iterdir()] == ["a.txt"]


def test_a_folder_that_cannot_be_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file is there then; file systems that cannot sync folders at all say EINVAL, which is no failure."""
    real = os.fsync

    def failing(code: int) -> Any:
        def fsync(handle: int) -> None:
            if stat.S_ISDIR(os.fstat(handle).st_mode):
                raise OSError(code, os.strerror(code))
            real(handle)

        return fsync

    monkeypatch.setattr(os, "fsync", failing(errno.EIO))
    with pytest.raises(WriteError, match=r"a was written, but may be lost"):
        write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "new"
    monkeypatch.setattr(os, "fsync", failing(errno.EINVAL))
    write_text(tmp_path / "a", "newer")


@pytest.mark.parametrize("code", [None, errno.EPERM, errno.ENOSYS])
def test_the_first_file_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int | None) -> None:
    """Also where the file system has no links."""

    def link(*_: Any) -> None:
        raise OSError(code, os.strerror(code or 0))

    if code is not None:
        monkeypatch.setattr(os, "link", link)
    write_text(tmp_path / "a", "first", keep=True)
    with atomic_file(tmp_path / "b", keep=True) as late:
        late.write(b"late")
        write_text(tmp_path / "b", "early", keep=True)
    write_text(tmp_path / "a", "second", keep=True)
    assert ((tmp_path / "a").read_text(), (tmp_path / "b").read_text()) == ("first", "early")
    write_text(tmp_path / "a", "third")
    assert (tmp_path / "a").read_text() == "third"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "b"]


@needs_posix
def test_the_first_folder_is_kept(tmp_path: Path) -> None:
    def write(name: str, text: str) -> None:
        with atomic_folder(tmp_path / name) as folder:
            assert not (tmp_path / name / "x").exists() or text == "second"
            (folder / "x").write_text(text)

    (tmp_path / "empty").mkdir()
    for name in ("new", "empty", "deep/er"):
        write(name, "first")
        write(name, "second")
        assert (tmp_path / name / "x").read_text() == "first"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(WriteError, match="file could not be written"):
        write("file", "first")
    with pytest.raises(WriteError, match="failed could not"), atomic_folder(tmp_path / "failed") as folder:
        folder.read_bytes()
    assert sorted(p.name for p in tmp_path.iterdir()) == ["deep", "empty", "file", "new"]


# JSON -----------------------------------------------------------------------------------------------------------------

HOSTILE = {
    "deep lists": ("[" * 100_000, "deep"),
    "deep objects": ('{"a":' * 100_000 + "1" + "}" * 100_000, "deep"),
    "just too deep": ("[" * 65 + "]" * 65, "deep"),
    "brackets behind strings": ('["\\\\", "\\"[", ' + "[" * 64 + "]" * 65, "deep"),
    "a long number": (f"[{'9' * 100_000}]", "100000 digits"),
    "a long negative number": (f"[-{'9' * 200}]", "digits"),
    "equal keys": ('{"a": 1, "b": {"c": 1, "c": 2}}', "'c' is there twice"),
    "NaN": ('{"a": NaN}', "NaN"),
    "an escape in a key": ('{"\\u001b[31mred": 1}', r"'\\x1b[31mred' has characters"),
    "a bidirectional override in a key": ('{"a\\u202eb": 1}', "cannot be printed"),
    "a surrogate in a key": ('{"\\udc80": 1}', "cannot be printed"),
    "a line break in a key": ('{"a\\nerror: none": 1}', "cannot be printed"),
    "an open string of quotes": ('"' + '\\"' * 400_000, ""),
    "an open string of backslashes": ('"' + "\\" * 800_001, ""),
    "nothing": ("", ""),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_json_is_refused_in_bounded_time(case: str) -> None:
    text, word = HOSTILE[case]
    started = time.process_time()
    with pytest.raises(ValueError) as caught:  # noqa: PT011  its message is checked below
        parse_json(text)
    assert word.replace("\\\\", "\\") in str(caught.value)
    assert time.process_time() - started < 2


def test_deep_json_is_refused_whatever_the_recursion_limit_is() -> None:
    """Python's parser would overflow the stack of C, and end the process."""
    code = "import sys; sys.setrecursionlimit(10**6); from fastdiff.files import parse_json\n"
    code += "try: parse_json('[' * 900_000)\nexcept ValueError as e: print(e)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert "nested more than 64 deep" in result.stdout, result


def test_usual_json_is_read() -> None:
    value = {"a": [1, -2.5, True, None, '[[[\\"{{\x7f'], "b": {"c": -float("inf")}, "é": "\x1b", "n": 2**64}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False)) == value
    assert parse_json("[" * 64 + "]" * 64) is not None


# Messages -------------------------------------------------------------------------------------------------------------

NASTY = "a\x1b[2J\x07\r\x9b31m\u202e\u2066\u200b\udc80\x00\n\x85\u2028z"


@pytest.mark.parametrize(
    "kind", [k for k in vars(errors).values() if isinstance(k, type) and issubclass(k, FastdiffError)]
)
def test_messages_are_printable(kind: type[FastdiffError]) -> None:
    message = str(kind(f"{NASTY} is wrong:\n  first\n  second"))
    assert all(line.isprintable() for line in message.split("\n"))
    assert message.count("\n") == 2  # the list stays; the name cannot begin a line
    assert message.startswith(r"a\x1b[2J\x07\r\x9b31m\u202e\u2066\u200b\udc80\x00\n\x85\u2028z is wrong:")
    message.encode("utf-8")
    assert kind("plain: é 日本, 'quoted'").__str__() == "plain: é 日本, 'quoted'"


def test_texts_are_bounded() -> None:
    assert len(str(CheckpointError("x" * (1 << 21)))) < (1 << 20) + 100
    assert printable("x" * (1 << 21)).endswith("(1048576 more characters)")
    assert printable(f"a\n{NASTY}\nb", lines=True).count("\n") == 3
    assert printable(Path("a\x1b")) == r"a\x1b"


def test_log_records_are_printable(caplog: pytest.LogCaptureFixture) -> None:
    log = logging.getLogger("fastdiff")
    with caplog.at_level("INFO", logger="fastdiff"):
        log.warning("skipped %s: %s, %d", Path(NASTY.replace("\0", "")), InvalidArgument(NASTY), 3)
        log.info(f"read {NASTY}")
        log.info("all %s", [NASTY])
    assert len(caplog.messages) == 3
    assert all(message.isprintable() for message in caplog.messages)
    assert caplog.messages[0].endswith(", 3")


# Memory ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("own", "tree", "expected"),
    [
        ("0::/a/b\n", {"a/b/memory.max": "max", "a/memory.max": "1000", "a/memory.current": "400"}, [600]),
        (
            "0::/a/b\n",
            {
                "a/b/memory.max": "900", "a/b/memory.current": "500", "a/b/memory.stat": "anon 1\ninactive_file 100\n",
                "a/memory.max": "1000", "a/memory.current": "400", "memory.max": "70", "memory.current": "60",
            },
            [500, 600, 10],
        ),
        (
            "5:cpu:/x\n4:memory:/y/z\n",
            {
                "memory/y/z/memory.limit_in_bytes": "900", "memory/y/z/memory.usage_in_bytes": "800",
                "memory/y/z/memory.stat": "cache 9\ntotal_inactive_file 50\n",
                "memory/memory.limit_in_bytes": "2000", "memory/memory.usage_in_bytes": "100",
                "cpu/x/memory.limit_in_bytes": "1", "cpu/x/memory.usage_in_bytes": "0",
            },
            [150, 1900],
        ),
        ("0::/../..\n", {"memory.max": "500", "memory.current": "1"}, [499]),
        ("0::/\n", {"memory.max": "no number", "memory.current": "1"}, []),
        ("0::/\n", {"memory.max": "500"}, []),
    ],
)  # fmt: skip
def test_memory_of_control_groups(tmp_path: Path, own: str, tree: dict[str, str], expected: list[int]) -> None:
    mounted = tmp_path / "cgroup"
    mounted.mkdir()
    for name, text in tree.items():
        (mounted / name).parent.mkdir(parents=True, exist_ok=True)
        (mounted / name).write_text(text)
    (tmp_path / "own").write_text(own)
    found = list(memory.group_limits(mounted, tmp_path / "own"))
    assert found[: len(expected)] == expected
    assert len(found) - len(expected) <= (own == "0::/../..\n")  # the same group, by another path
    assert list(memory.group_limits(mounted, tmp_path / "none")) == []


def test_the_least_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "group_limits", lambda: [5000, 300])
    assert memory.free() == 300
    monkeypatch.setattr(memory, "group_limits", lambda: [-20])
    assert memory.free() == 0


def test_leftovers_are_recognised(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "a.bin"):
        assert [p.name for p in tmp_path.glob(files.LEFTOVER)] == [p.name for p in tmp_path.iterdir()]
