"""Run diffusers' own tests of its schedulers with `fastdiff.Scheduler` in place of its classes.

    git clone --depth 1 https://github.com/huggingface/diffusers
    python benchmarks/diffusers_scheduler_tests.py diffusers            # a table of passed and failed tests by file
    python benchmarks/diffusers_scheduler_tests.py diffusers --json     # the same, with every failure

The argument is a checkout of diffusers or its folder ``tests``; a version near the installed one fits best. Each class
of diffusers is replaced by a subclass of `fastdiff.Scheduler` that only fixes the name of the scheduler: nothing fills
in attributes or translates arguments. docs/solvers.md lists the tests that fail, each with its reason.

This file is also the pytest plugin that does it: pytest loads it in a process of its own, before diffusers' tests.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

# The files of tests/schedulers/ whose schedulers fastdiff has, and the class that each one tests.
FILES = {
    "consistency_model": "CMStochasticIterativeScheduler",
    "ddim": "DDIMScheduler",
    "ddpm": "DDPMScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm_multi": "DPMSolverMultistepScheduler",
    "edm_dpmsolver_multistep": "EDMDPMSolverMultistepScheduler",
    "edm_euler": "EDMEulerScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler_ancestral": "EulerAncestralDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "pndm": "PNDMScheduler",
    "unipc": "UniPCMultistepScheduler",
}
# Schedulers that fastdiff got later. Their files are run with --more, and counted apart.
MORE = {
    "dpm_sde": "DPMSolverSDEScheduler",
    "dpm_single": "DPMSolverSinglestepScheduler",
    "kdpm2_ancestral": "KDPM2AncestralDiscreteScheduler",
    "kdpm2_discrete": "KDPM2DiscreteScheduler",
    "score_sde_ve": "ScoreSdeVeScheduler",
    "tcd": "TCDScheduler",
}
RESULTS = "FASTDIFF_SCHEDULER_TESTS"  # the environment variable with the path of the file of results


def replacement(name: str) -> type:
    """Return the subclass of `fastdiff.Scheduler` that is always the scheduler ``name``."""
    from fastdiff import Scheduler

    def init(self: Any, **options: Any) -> None:
        Scheduler.__init__(self, {"_class_name": name, **options})

    def from_config(cls: Any, config: Any, **options: Any) -> Any:
        whole = Scheduler.from_config.__func__  # that of a class method, as the class is cls here
        return whole(cls, config, **{**options, "_class_name": name})

    return type(name, (Scheduler,), {"__init__": init, "from_config": classmethod(from_config)})


def pytest_configure() -> None:
    """Replace the classes before diffusers' tests import them.

    Schedulers need neither peft nor transformers, whose modules load what they need, such as torchvision, when a test
    looks at all modules for warnings: where that is missing, such a test fails. Here both are as if they were not
    installed.
    """
    for name in ("transformers", "peft"):  # which imports it
        sys.modules[name] = None  # importing it is then an error
    import diffusers

    for name in (*FILES.values(), *MORE.values()):
        setattr(diffusers, name, replacement(name))


def pytest_runtest_logreport(report: Any) -> None:
    """Append the outcome of a test to the file of results."""
    if report.when == "call" or report.outcome != "passed":
        line = {"test": report.nodeid.split("schedulers/")[-1], "outcome": report.outcome}
        if report.outcome == "failed":
            crash = getattr(report.longrepr, "reprcrash", None)
            line["error"] = str(crash.message if crash else report.longrepr).splitlines()[0]
        with Path(os.environ[RESULTS]).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def run(folder: Path, names: list[str]) -> list[dict[str, str]]:
    """Run files of diffusers' scheduler tests, and return a dictionary for each test."""
    tests = folder if (folder / "schedulers").is_dir() else folder / "tests"
    paths = [tests / "schedulers" / f"test_scheduler_{name}.py" for name in names]
    missing = [path for path in paths if not path.is_file()]
    if missing:
        raise SystemExit(f"{folder} is no checkout of diffusers: {missing[0]} is missing")
    with tempfile.TemporaryDirectory() as scratch:
        results = Path(scratch) / "results"
        results.touch()
        here, package = str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parent.parent)
        environment = {
            **os.environ,
            RESULTS: str(results),
            "PYTHONPATH": os.pathsep.join([str(tests.resolve().parent), here, package]),
            "HF_HUB_OFFLINE": "1",
        }
        command = [sys.executable, "-m", "pytest", "-p", "diffusers_scheduler_tests", "-q", "--no-header", "--tb=short"]
        command += ["-c", os.devnull, "--noconftest", "--rootdir", str(tests.parent), "-p", "no:cacheprovider"]
        done = subprocess.run(
            [*command, *map(str, paths)], env=environment, cwd=scratch, capture_output=True, text=True, check=False
        )
        found = [json.loads(line) for line in results.read_text(encoding="utf-8").splitlines()]
    if done.returncode not in (0, 1) or not found:
        raise SystemExit(f"pytest failed with code {done.returncode}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    # The base class of the tests has no scheduler; every file imports it, and pytest runs it as if it were a test.
    return [test for test in found if "::SchedulerCommonTest::" not in test["test"]]


def main() -> None:
    """Parse the command line, run the tests and print the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a checkout of diffusers, or its folder tests")
    parser.add_argument("--files", nargs="*", choices=[*FILES, *MORE], help="run only these files")
    parser.add_argument("--more", action="store_true", help="run also the files of the schedulers that came later")
    parser.add_argument("--json", action="store_true", help="print JSON")
    given = parser.parse_args()
    if importlib.util.find_spec("diffusers") is None:
        raise SystemExit("diffusers is not installed: pip install '.[diffusers]'")
    names = given.files or [*FILES, *(MORE if given.more else ())]
    tests = run(given.folder, names)
    counts = {
        name: Counter(t["outcome"] for t in tests if f"test_scheduler_{name}.py::" in t["test"]) for name in names
    }
    total = sum(counts.values(), Counter())
    if given.json:
        print(json.dumps({"files": counts, "total": total, "tests": tests}, indent=1))
        return
    print(f"{'file':<28}{'passed':>8}{'failed':>8}{'skipped':>8}")
    for name, count in [*counts.items(), ("all", total)]:
        print(f"{name:<28}{count['passed']:>8}{count['failed']:>8}{count['skipped']:>8}")
    for test in tests:
        if test["outcome"] == "failed":
            print(f"{test['test']}\n    {test['error'][:200]}")


if __name__ == "__main__":
    main()
