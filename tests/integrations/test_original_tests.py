"""The script that runs diffusers' own tests of its schedulers with `fastdiff.Scheduler` in place of its classes."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "benchmarks" / "diffusers_scheduler_tests.py"
TESTS = """
    import unittest

    from diffusers import DDIMScheduler, EulerDiscreteScheduler


    class DDIMSchedulerTest(unittest.TestCase):
        def test_replaced(self):
            scheduler = DDIMScheduler(num_train_timesteps=20)
            assert type(scheduler).__mro__[1].__module__ == "fastdiff.integrations.scheduler"
            assert scheduler.config._class_name == "DDIMScheduler"
            assert type(EulerDiscreteScheduler.from_config(scheduler.config)).__name__ == "EulerDiscreteScheduler"
            assert EulerDiscreteScheduler.from_config(scheduler.config).config.num_train_timesteps == 20

        def test_wrong(self):
            DDIMScheduler(num_train_timesteps=0)

        def test_skipped(self):
            self.skipTest("not here")
"""


def run(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("given", ["checkout", pytest.param("tests", marks=pytest.mark.slow)])
def test_every_test_is_counted_with_its_error(tmp_path, given):
    folder = tmp_path / "checkout" / "tests" / "schedulers"
    folder.mkdir(parents=True)
    (folder / "test_scheduler_ddim.py").write_text(textwrap.dedent(TESTS), encoding="utf-8")
    done = run(tmp_path / "checkout" if given == "checkout" else folder.parent, "--files", "ddim", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["total"] == found["files"]["ddim"] == {"passed": 1, "failed": 1, "skipped": 1}
    (failed,) = (test for test in found["tests"] if test["outcome"] == "failed")
    assert failed["test"] == "test_scheduler_ddim.py::DDIMSchedulerTest::test_wrong"
    assert "fastdiff.errors.ConfigError" in failed["error"]


def test_a_folder_without_the_tests(tmp_path):
    done = run(tmp_path, "--files", "ddim")
    assert done.returncode == 1
    assert "is no checkout of diffusers" in done.stderr
