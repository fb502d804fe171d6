"""The figures of the README and docs/: one script measures them all, by commands that exist."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
from pathlib import Path

import pytest
import typer

from fastdiff import cli

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "figures.sh"
RESULTS = sorted((ROOT / "benchmarks" / "results").rglob("*.json"))


def commands() -> list[list[str]]:
    """The words behind ``measure FILE``."""
    text = SCRIPT.read_text().replace("\\\n", " ")
    return [shlex.split(line)[2:] for line in text.splitlines() if line.startswith("measure ")]


def measured() -> set[str]:
    return set(re.findall(r"[\w-]+\.json", SCRIPT.read_text()))


def test_every_result_that_the_documentation_names_is_measured() -> None:
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]
    named = {n for page in pages for n in re.findall(r"`benchmarks/results/(\w+/[\w-]+\.json)`", page.read_text())}
    assert len(named) > 5
    assert named == {path.relative_to(ROOT / "benchmarks" / "results").as_posix() for path in RESULTS}
    for name in named:
        assert (ROOT / "benchmarks" / "results" / name).is_file()
        assert Path(name).name in measured()


def test_no_result_is_of_an_unknown_command() -> None:
    assert {path.name for path in (ROOT / "benchmarks" / "results").rglob("*.*")} <= measured()


def test_every_command_exists() -> None:
    group = typer.main.get_command(cli.app)
    fastdiff = 0
    for program, *arguments in commands():
        if program == "$bin/fastdiff":
            name, *options = arguments
            group.commands[name].make_context(name, options)  # raises for an option that there is not
            fastdiff += 1
        else:
            assert program == "$bin/python"
            assert arguments[:2] == ["-m", "pytest"] or (ROOT / arguments[0]).is_file(), arguments
    assert fastdiff >= 5


@pytest.mark.skipif(shutil.which("bash") is None, reason="the script needs bash")
def test_finished_parts_are_not_measured_again(tmp_path: Path) -> None:
    """With every part there, the script names them and runs nothing."""
    for line in SCRIPT.read_text().splitlines():
        if line.startswith("measure "):
            (tmp_path / line.split()[1]).touch()
    (tmp_path / "trilemma").mkdir()
    (tmp_path / "trilemma" / "trilemma.json").write_text("{}")
    done = subprocess.run([SCRIPT, tmp_path], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout.count("is there") == len(commands())
    assert (tmp_path / "trilemma-fashion-mnist.json").read_text() == "{}"
