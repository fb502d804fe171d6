"""Common parts of the benchmarks: the choice of cases, the machine's ceilings in the report, and a table at the end.

pytest benchmarks/ --benchmark-json=new.json                      # the CIFAR-10 U-Net at 8 rows; whole steps
pytest benchmarks/ --rows 1,8,32 --networks all                   # the full list: every case that the tests check
pytest benchmarks/test_operations.py -k conv3 --networks ddpm-cifar10-32
python benchmarks/compare.py old.json new.json                    # exit code 1 if something became slower
"""

from __future__ import annotations

from typing import Any

import pytest

from fastdiff.backends import native
from fastdiff.backends.native import cost
from tests.support.cases import NETWORKS, cases
from tests.support.unets import PUBLISHED

DEFAULT = "ddpm-cifar10-32"


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastdiff")
    group.addoption("--networks", default=DEFAULT, help="whose operations are measured, separated by ;")
    group.addoption("--rows", default="8", help="rows of a pass, comma-separated")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" not in metafunc.fixturenames:
        return
    extension = native.extension()
    chosen = metafunc.config.getoption("--networks")
    known = [*PUBLISHED, *NETWORKS]
    names = known if chosen == "all" else chosen.split(";")
    unknown = sorted(set(names) - set(known))
    if unknown:
        raise pytest.UsageError(f"--networks {unknown[0]}: allowed: all, {', '.join(known)}")
    rows = [int(r) for r in metafunc.config.getoption("--rows").split(",")]
    dtypes = ["float32"] + ["bfloat16"] * bool(extension is not None and extension.bf16_isas())
    found = [(case, r, dtype) for name in names for r in rows for dtype in dtypes for case in cases(name)]
    metafunc.parametrize(
        ("case", "rows", "dtype"), found, ids=[f"{c.network}-{r}-{dtype}-{c.name}" for c, r, dtype in found]
    )


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["ceilings"] = cost.ceilings().to_dict()


def pytest_benchmark_update_json(config: pytest.Config, benchmarks: list[Any], output_json: dict[str, Any]) -> None:
    trim(output_json)


def trim(report: dict[str, Any]) -> None:
    """Remove what is neither printed, compared nor kept in results/, such as every round and the machine's name."""
    machine = report["machine_info"]
    report["machine_info"] = {
        "cpu": machine.get("cpu", {}).get("brand_raw"),
        "system": machine["system"],
        "python": machine["python_version"],
        "ceilings": machine["ceilings"],
    }
    for key in ("commit_info", "datetime"):
        report.pop(key, None)
    kept = ("min", "median", "iqr", "rounds")
    report["benchmarks"] = [
        {
            "name": b["name"],
            "seconds": {k: float(f"{b['stats'][k]:.4g}") for k in kept},
            "extra_info": b["extra_info"],
        }
        for b in report["benchmarks"]
    ]


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print a line for each benchmark that reports a share of its ceiling, the lowest first."""
    session = getattr(config, "_benchmarksession", None)
    lines = []
    for b in [] if session is None else session.benchmarks:
        if b and "share" in b.extra_info:
            lines.append((b.extra_info["share"], b.name, b.stats.min, b.extra_info))
    if not lines:
        return
    m = cost.ceilings()
    terminalreporter.section("share of this machine's ceilings, the lowest first")
    rates = ", ".join(f"{dtype} {rate:.0f} GFLOP/s" for dtype, rate in m.gflops.items())
    terminalreporter.write_line(f"{m.isa}, {m.threads} threads: {rates}; memory {m.memory_gbs:.0f} GB/s")
    terminalreporter.write_line(f"{'share':>6} {'ms':>9} {'GFLOP/s':>8} {'GB/s':>7} {'img-steps/s':>11}")
    for share, name, least, extra in sorted(lines, key=lambda line: line[0]):
        columns = (extra.get(key) for key in ("gflops", "gbs", "img_steps_per_s"))
        shown = [f"{'' if v is None else f'{v:.1f}':>{width}}" for v, width in zip(columns, (8, 7, 11), strict=True)]
        terminalreporter.write_line(f"{share:6.2f} {1e3 * least:9.3f} {' '.join(shown)}  {name}")
