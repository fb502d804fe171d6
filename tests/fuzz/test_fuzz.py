"""Fuzzing of options, configurations and commands: every call succeeds with finite numbers, or says what is wrong.

FASTDIFF_FUZZ_SECONDS is the time budget of each slow test, and FASTDIFF_FUZZ_SEED its seed.
"""

from __future__ import annotations

import logging
import os
import random
import time

import pytest

from tests.fuzz import commands
from tests.fuzz.harness import Target, failure
from tests.fuzz.targets import all_targets

QUICK, QUICK_COMMANDS = 2500, 3  # calls of the quick test, and calls of each command


@pytest.fixture(autouse=True)
def quiet(tmp_path, monkeypatch):
    """Silence the log, which takes most of the time; files of names without a folder are written to a new one."""
    monkeypatch.chdir(tmp_path)
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.fixture(scope="module")
def targets() -> list[Target]:
    return all_targets()


def report(found: list[str]) -> None:
    assert not found, f"{len(found)} failures:\n" + "\n".join(found[:40])


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_single_arguments(targets):
    """Take calls from all targets evenly; the slow test makes all of them."""
    choose = random.Random(0)
    every = [(target, changed) for target in targets for changed in target.single()]
    report([f for target, changed in choose.sample(every, QUICK) if (f := failure(target, changed))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_every_single_argument(targets):
    report([f for target in targets for changed in target.single() if (f := failure(target, changed))])


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_several_arguments(targets):
    seed = int(os.environ.get("FASTDIFF_FUZZ_SEED", "0"))
    choose, found = random.Random(seed), []
    end = time.monotonic() + float(os.environ.get("FASTDIFF_FUZZ_SECONDS", "60"))
    while time.monotonic() < end:
        target = choose.choice(targets)
        problem = failure(target, target.several(choose))
        if problem is not None:
            found.append(problem)
    report(found)


def command_failures(choose: random.Random, names: list[str]) -> list[str]:
    sound = commands.commands()
    calls = [commands.changed(name, sound[name], choose) for name in names]
    return [f for call in calls if (f := commands.failure(call))]


@pytest.mark.filterwarnings("ignore")
def test_a_sample_of_command_lines():
    names = list(commands.commands())
    report(command_failures(random.Random(0), QUICK_COMMANDS * names))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_command_lines():
    choose, found = random.Random(int(os.environ.get("FASTDIFF_FUZZ_SEED", "0"))), []
    end = time.monotonic() + float(os.environ.get("FASTDIFF_FUZZ_SECONDS", "60"))
    while time.monotonic() < end:
        found += command_failures(choose, [choose.choice(list(commands.commands()))])
    report(found)


def test_commands_that_are_fuzzed_are_sound():
    """Every command reaches its work or succeeds with the arguments that the fuzzer changes."""
    assert commands.commands().keys() == commands.options().keys()
    for name, arguments in commands.commands().items():
        assert commands.ends([name, *arguments])[0] == 0, name


@pytest.mark.parametrize("error", [ValueError("raw"), KeyError("x"), RecursionError()])
def test_the_fuzzer_finds_faults_of_commands(error, monkeypatch):
    def fails(*_, **__):
        raise error

    monkeypatch.setattr("fastdiff.checkpoints.load", fails)
    arguments = ["info", commands.commands()["info"][0]]
    found = commands.failure(arguments)
    assert found is not None
    assert type(error).__name__ in found


@pytest.mark.parametrize("value", [1.0, float("nan"), object()])
def test_the_fuzzer_finds_faults(value):
    def faulty(x):
        if x is not value:
            raise ValueError("raw")

    found = failure(Target("faulty", faulty, ["x"], [1]), {"x": 1})
    assert found is not None
    assert "ValueError" in found
    assert failure(Target("faulty", faulty, ["x"], [1]), {"x": value}) is None
