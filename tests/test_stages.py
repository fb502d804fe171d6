"""Every test that is not slow is run by a stage of ``.ci/run``: ``make test`` leaves some to other targets."""

from __future__ import annotations

import itertools
import os
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.support.paths import ROOT

pytestmark = pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
MARKERS = re.findall(r'^    "(\w+): ', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)


def runs() -> list[list[str]]:
    """Return the arguments of each pytest that ``.ci/run`` starts, as make prints them without starting one."""
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8").replace("\\\n", " ")
    targets = re.findall(r"^ *make (.*)$", script, re.MULTILINE)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}
    found = []
    for target in targets:
        printed = subprocess.run(
            ["make", "--dry-run", "--always-make", *shlex.split(target)],
            cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
        ).stdout.replace("\\\n", " ")  # fmt: skip
        found += [shlex.split(line.partition("-m pytest")[2]) for line in printed.splitlines() if "-m pytest" in line]
    assert len(found) > 5
    return found


def selects(arguments: list[str], test: Path, marks: set[str]) -> bool:
    """Return whether pytest with these arguments runs a test of this file with these marks."""
    if "-k" in arguments:
        return False  # it chooses by names
    paths = [word for word in arguments if word.startswith("tests/") and "=" not in word] or ["tests"]
    ignored = [word.removeprefix("--ignore=") for word in arguments if word.startswith("--ignore=")]
    if not any(test.is_relative_to(path) for path in paths) or any(test.is_relative_to(path) for path in ignored):
        return False
    if "-m" not in arguments:
        return True
    expression = arguments[arguments.index("-m") + 1]  # of marks, with Python's operators
    return bool(eval(expression, {"__builtins__": {}}, {name: name in marks for name in MARKERS}))


def marks_of(text: str) -> set[str]:
    return {name for name in MARKERS if re.search(rf"mark\.{name}\b", text)} - {"slow"}


def test_every_quick_test_is_run() -> None:
    """Whichever of a file's marks it has, each test belongs to at least one stage, and no two marks are forgotten."""
    stages = runs()
    left = []
    for file in sorted((ROOT / "tests").rglob("test_*.py")):
        path, marks = file.relative_to(ROOT), sorted(marks_of(file.read_text(encoding="utf-8")))
        for number in range(len(marks) + 1):
            for some in itertools.combinations(marks, number):
                if not any(selects(stage, path, set(some)) for stage in stages):
                    left.append((str(path), some))
    assert not left


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("tests/docs -m 'not slow'", [False, False, True]),
        ("-n 2 --ignore=tests/docs -m 'not slow and not alone'", [True, False, False]),
        ("tests/bench/test_bench.py -m 'not slow and alone'", [False, True, False]),
        ("tests/docs -k blocks", [False, False, False]),
        ("", [True, True, True]),
    ],
)
def test_what_a_command_selects(arguments: str, expected: list[bool]) -> None:
    tests = [("tests/bench/test_bench.py", set()), ("tests/bench/test_bench.py", {"alone"}), ("tests/docs/a.py", set())]
    assert [selects(shlex.split(arguments), Path(path), marks) for path, marks in tests] == expected
