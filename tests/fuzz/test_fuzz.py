"""Fuzzing of options and configurations: every call succeeds with finite numbers, or says what is wrong, and soon.

FASTDIFF_FUZZ_SECONDS is the time budget of the slow test, and FASTDIFF_FUZZ_SEED its seed.
"""

from __future__ import annotations

import logging
import os
import random
import time

import pytest

from tests.fuzz.harness import Target, failure
from tests.fuzz.targets import all_targets

QUICK = 2500  # calls of the quick test


@pytest.fixture(autouse=True)
def quiet():
    """Silence the log, which takes most of the time, and the warnings about deprecated kinds of numbers."""
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


@pytest.mark.parametrize("value", [1.0, float("nan"), object()])
def test_the_fuzzer_finds_faults(value):
    def faulty(x):
        if x is not value:
            raise ValueError("raw")

    found = failure(Target("faulty", faulty, ["x"], [1]), {"x": 1})
    assert found is not None
    assert "ValueError" in found
    assert failure(Target("faulty", faulty, ["x"], [1]), {"x": value}) is None
