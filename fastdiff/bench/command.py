"""The command ``fastdiff bench``: from its options to the printed result and the exit code."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from fastdiff.bench import machine, report
from fastdiff.bench.engines import CONTENDERS
from fastdiff.bench.job import job_text, whole_job
from fastdiff.bench.profile import native_profile, profile_text
from fastdiff.bench.run import Settings, measure, read
from fastdiff.errors import InvalidArgument, printable

BATCHES, QUICK_BATCHES = (1, 8, 32), (1, 16)


def run(
    model: str, *, batches: Sequence[int] | None, engines: Sequence[str] | None, network_only: bool,
    guidance: float | None, device: str,
    quick: bool, rounds: int | None, save: Path | None, compare: Path | None, plot: Path | None,
    job: tuple[int, int] | None, profile: bool, as_json: bool,
) -> int:  # fmt: skip
    """Measure, print, and return the exit code: 0; 1 for a wrong output or a regression; 130 after Ctrl-C."""
    sizes = tuple(batches or (QUICK_BATCHES if quick else BATCHES))
    if job is not None or profile:
        others = (save, compare, plot, engines, network_only, guidance is not None)
        if any(others) or (job is not None and profile):
            raise InvalidArgument("--job and --profile answer other questions: use one, without --save, --compare, "
                                  "--plot, --engines, --network-only and --guidance")  # fmt: skip
        return _job(model, job, quick, as_json) if job is not None else _profile(model, sizes, as_json)
    if plot is not None:
        report.check_plot(plot)
    earlier = None if compare is None else read(compare)
    kind = device.split(":")[0]
    chosen = list(engines or (n for n, e in CONTENDERS.items() if kind in e.where and not (quick and e.slow_start)))
    if engines is None and kind == "cpu" and not machine.multiplies_bfloat16():
        for name in [n for n in chosen if CONTENDERS[n].dtype == "bfloat16"]:
            chosen.remove(name)
            _say(f"{name} is left out: this processor has no products of bfloat16 (--engines takes it anyway)")
    settings = Settings(
        model, sizes, tuple(chosen), "network" if network_only else "step", guidance, device,
        turn_s=0.2 if quick else 0.4, most_rounds=rounds if rounds is not None else 25 if quick else 40,
    )  # fmt: skip
    result = measure(settings, save, CONTENDERS, _say)
    lines, worse = ([], 0) if earlier is None else report.compare(result, earlier)
    if as_json:
        print(json.dumps(result | ({"comparison": lines, "regressions": worse} if earlier is not None else {})))
    else:
        print(printable(report.text(result), lines=True))
        if earlier is not None:
            text = "\n".join([f"\nagainst {compare}:", *(f"  {line}" for line in lines)])
            print(printable(text, lines=True))
    if plot is not None:
        report.plot(result, plot)
    if result.get("interrupted"):
        return 130
    return 1 if worse or report.red(result) else 0


def _job(model: str, job: tuple[int, int], quick: bool, as_json: bool) -> int:
    result = whole_job(model, *job, rounds=1 if quick else 2, say=_say)
    print(json.dumps(result) if as_json else job_text(result))
    return 0


def _profile(model: str, batches: Sequence[int], as_json: bool) -> int:
    parts = {batch: native_profile(model, batch) for batch in batches}
    print(json.dumps(parts) if as_json else "\n\n".join(profile_text(batch, ms) for batch, ms in parts.items()))
    return 0


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
