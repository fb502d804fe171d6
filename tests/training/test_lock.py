"""Two trainings in one folder: the second is refused; folders that cannot be written are refused at the start."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from fastdiff.errors import TrainingError
from fastdiff.training import lock
from fastdiff.training.lock import NAME, locked
from tests.support import warm
from tests.training.toys import Toys, digests, snapshot, toy_trainer

# Trains, and stops while it reads the fourth batch, after the checkpoint of step 2.
STUCK = """
import sys, time
from pathlib import Path
from tests.training.toys import Toys, toy_trainer

class Slow(Toys):
    count = 0

    def __getitems__(self, indices):
        self.count += 1
        if self.count == 4:
            Path(sys.argv[1], "stuck").touch()
            time.sleep(600)
        return super().__getitems__(indices)

toy_trainer(sys.argv[1], data=Slow(), steps=6).fit()
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_second_training_is_refused_until_the_first_is_killed(tmp_path: Path) -> None:
    out = tmp_path / "run"
    first = warm.Process("-c", STUCK, out)
    try:
        end = time.monotonic() + 300
        while not ((out / "stuck").exists() and (out / "checkpoint.safetensors").exists()) and time.monotonic() < end:
            time.sleep(0.05)
        (out / "stuck").unlink()
        leftover = out / ".checkpoint-1-01234567.tmp.safetensors"  # a file that the first one is writing
        leftover.write_bytes(b"half")
        before = snapshot(out)
        trainer = toy_trainer(out, steps=6)
        with pytest.raises(TrainingError, match=rf"run: process {first.pid} is training there; wait for its end"):
            trainer.fit()
        assert trainer.step == 0
        assert snapshot(out) == before
    finally:
        first.send_signal(signal.SIGKILL)
        first.communicate()
    leftover.unlink()
    assert (out / NAME).exists()  # the file is left behind, its lock is not
    toy_trainer(out, steps=6).fit()
    assert not (out / NAME).exists()
    toy_trainer(tmp_path / "whole", steps=6).fit()
    assert digests(out) == digests(tmp_path / "whole")


def test_two_trainers_of_one_process(tmp_path: Path) -> None:
    refused = []

    class Nested(Toys):
        def __getitems__(self, indices: Any) -> Any:
            if not refused:
                with pytest.raises(TrainingError, match=f"process {os.getpid()} is training there") as error:
                    toy_trainer(tmp_path, steps=2).fit()
                refused.append(error)
            return super().__getitems__(indices)

    toy_trainer(tmp_path, data=Nested(), steps=2).fit()
    assert refused
    assert not (tmp_path / NAME).exists()


def test_a_run_that_fails_gives_the_lock_back(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="became"):
        toy_trainer(tmp_path, lr=1e30, lr_warmup=0).fit()
    with locked(tmp_path):
        pass


def test_a_file_that_was_removed_is_not_the_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that opens the file just before the owner removes it must not lock the removed one."""
    real, removed = lock._lock, []

    def remove_first(handle: int, path: Path) -> None:
        if not removed:
            path.unlink()
            removed.append(handle)
        real(handle, path)

    monkeypatch.setattr(lock, "_lock", remove_first)
    with locked(tmp_path):
        assert (tmp_path / NAME).read_text() == str(os.getpid())
        with pytest.raises(TrainingError, match="is training there"), locked(tmp_path):
            pass


def test_a_link_in_place_of_the_lock_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("words")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / NAME).symlink_to(tmp_path / "precious")
    with pytest.raises(TrainingError, match="nothing can be written there"):
        toy_trainer(tmp_path / "run").fit()
    assert (tmp_path / "precious").read_text() == "words"


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.ENOSPC, errno.EDQUOT])
def test_disks_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """These are imitated: tests may run as root, for whom all folders can be written."""
    calls = []

    def refuse(path: Any, flags: int, mode: int = 0o777) -> int:
        calls.append(path)
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(lock.os, "open", refuse)
    trainer = toy_trainer(tmp_path / "run")
    monkeypatch.setattr(trainer, "_update", lambda *_: pytest.fail("it trained"))
    with pytest.raises(TrainingError, match=rf"run: nothing can be written there \({os.strerror(number)}\)"):
        trainer.fit()
    assert calls == [tmp_path / "run" / NAME]


def test_too_little_space_is_said_at_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    trainer = toy_trainer(tmp_path / "run", steps=1)
    need = 16 * sum(p.numel() for p in trainer.unet.parameters())
    monkeypatch.setattr(lock.shutil, "disk_usage", lambda _: usage._replace(free=need - 1))
    with pytest.raises(TrainingError, match=r"run: a checkpoint takes .* MB, .* MB are free; free some space"):
        trainer.fit()
    monkeypatch.setattr(lock.shutil, "disk_usage", lambda _: usage._replace(free=need))
    trainer.fit()
    assert (tmp_path / "run" / "checkpoint.safetensors").stat().st_size > need


@pytest.mark.skipif(os.name == "nt", reason="needs flock")
def test_a_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import fcntl

    def refuse(handle: int, how: int) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    toy_trainer(tmp_path, steps=1).fit()
    assert "training.lock cannot be locked (No locks available): do not train twice in this folder" in caplog.text
