"""Processes of tests/support/warm.py behave as ones that a shell starts."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.support import warm


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("", (0, "", "")),
        ("import sys; print(sys.argv[1:]); sys.exit(3)", (3, "['a', 'b c']\n", "")),
        ("import sys; sys.exit('why')", (1, "", "why\n")),
        ("import os; os.kill(os.getpid(), 9)", (-9, "", "")),
        ("import os; print(os.getcwd(), os.environ.get('HERE'), 'HOME' in os.environ)", (0, "/ yes False\n", "")),
        ("import atexit; atexit.register(print, 'bye'); print(__name__)", (0, "__main__\nbye\n", "")),
        ("import torch; print(torch.get_num_threads())", (0, "1\n", "")),
    ],
)
def test_ends_and_settings(code: str, expected: tuple[int, str, str]) -> None:
    done = warm.run("-c", code, "a", "b c", cwd="/", env={"HERE": "yes"})
    assert (done.returncode, done.stdout, done.stderr) == expected


def test_an_exception_has_its_traceback_and_leaves_the_next_process_alone(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys, torch\ntorch.manual_seed(1)\nsys.modules['numpy'] = None\n1 / 0\n")
    done = warm.run(script)
    assert done.returncode == 1
    assert f'File "{script}", line 4' in done.stderr
    assert done.stderr.endswith("ZeroDivisionError: division by zero\n")
    assert warm.run("-c", "import numpy, torch; assert torch.initial_seed() != 1").returncode == 0
    assert warm.run("-m", "fastdiff", "--version").returncode == 0
    assert "No module named nonsense" in warm.run("-m", "nonsense").stderr


def test_signals_and_time_limits(tmp_path: Path) -> None:
    process = warm.Process("-c", "import pathlib, time; pathlib.Path('ready').touch(); time.sleep(600)", cwd=tmp_path)
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate()
    assert process.returncode == -signal.SIGINT
    assert "KeyboardInterrupt" in error
    process = warm.Process("-c", "import time; time.sleep(600)")
    with pytest.raises(subprocess.TimeoutExpired):
        process.communicate(0.1)
