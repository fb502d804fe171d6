"""Results for people: as a table, as a picture, and compared with an earlier result."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastdiff.bench import machine
from fastdiff.bench.engines import ANCHORS
from fastdiff.bench.run import pairs
from fastdiff.errors import InvalidArgument
from fastdiff.files import atomic_file

# A smaller change of a ratio is no regression, whatever the intervals say: other processes and other memory addresses
# change ratios by a few percent.
LEAST_CHANGE = 0.05
WHAT = {
    "step": "an img-step is one image through one network evaluation and one update (1 NFE)",
    "network": "an img-step is one image through one network evaluation, without the update (1 NFE)",
}

# The table ------------------------------------------------------------------------------------------------------------


def text(result: Mapping[str, Any]) -> str:
    """Format a result as a table for each batch."""
    header = result["machine"]
    image = " x ".join(map(str, result["image"]))
    lines = [
        f"{result['model']}: {result['parameters'] / 1e6:.1f} million parameters, {image}; {_what(result)}",
        f"{header['processor']}, {header['device']}, {header['threads']} threads",
    ]
    for record in result["batches"]:
        lines += ["", *_batch(record)]
    if result.get("interrupted"):
        lines += ["", "interrupted: what is above was finished or under way; the same command with --save goes on"]
    return "\n".join(lines)


def _what(result: Mapping[str, Any]) -> str:
    w = result.get("guidance")  # results of earlier versions have none
    if w is None:
        return WHAT[result["what"]]
    return f"an img-step is one image through a network evaluation guided by {w:g} and one update (2 NFE)"


def _batch(record: Mapping[str, Any]) -> list[str]:
    anchor = record["anchor"]
    head = ("engine", "dtype", "error", "first call", "peak MiB", "img-steps/s", "spread", "of limit", "predicted",
            f"x {anchor}" if anchor else "ratio")  # fmt: skip
    rows = [head]
    for name, e in record["engines"].items():
        speed = e.get("img_steps_per_s")
        red = name in record["red"]
        r, limit = e.get("ratio"), record.get("limits", {}).get(e["dtype"])
        rows.append(
            (
                name,
                e["dtype"],
                f"{e['error']:.1e}",
                f"{e['first_call_s']:.2f} s",
                "-" if e["peak_mib"] is None else f"{e['peak_mib']:.0f}",
                "RED" if red else "-" if speed is None else _speed(speed),
                "-" if red or speed is None else f"{e['spread']:.1%}",
                "-" if red or speed is None or limit is None else f"{speed / limit:.0%}",
                _speed(e["predicted"]) if "predicted" in e and not red else "-",
                "-" if red or r is None else f"{r['median']:.3f} [{r['low']:.3f}, {r['high']:.3f}]",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    limits = ", ".join(f"{dtype} {_speed(speed)}" for dtype, speed in record.get("limits", {}).items())
    lines = [f"batch {record['batch']}" + (f"; limit of the products alone, img-steps/s: {limits}" if limits else "")]
    lines += [
        "  "
        + "  ".join(
            f"{v:<{w}}" if i < 2 else f"{v:>{w}}" for i, (v, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
    for name, ratio, peer in best(record):
        lines.append(f"  {name} is {ratio:.2f} times as fast as {peer}")
    lines += [f"  RED, no speed: {name}: {reason}" for name, reason in record["red"].items()]
    lines += [f"  absent: {name}: {reason}" for name, reason in record["absent"].items()]
    if record["noise"]:
        lines.append(f"  TOO NOISY to repeat within 5 %: {'; '.join(record['noise'])}")
    elif any("ratio" in e for e in record["engines"].values()):
        lines.append(f"  {len(record['rounds'])} rounds; ratios to {anchor} are good to +-2.5 %")
    return lines


def _speed(x: float) -> str:
    """Format a speed with three digits, or with all digits before the point."""
    return f"{x:.{max(0, 2 - math.floor(math.log10(x)))}f}"


def best(record: Mapping[str, Any]) -> list[tuple[str, float, str]]:
    """Find for each native engine the fastest peer of its precision: (engine, relative speed, peer).

    native-bf16 is compared with bfloat16 peers whose error is at most 1e-2, which PyTorch's own arithmetic reaches,
    native-bf16-fast with all bfloat16 peers.
    """
    worst = {"native": 1e-4, "native-bf16": 1e-2, "native-bf16-fast": 1e-1}
    found = []
    for name, allowed in worst.items():
        mine = record["engines"].get(name, {})
        peers = {
            other: e["ratio"]["median"]
            for other, e in record["engines"].items()
            if not e["own"] and "ratio" in e and e["dtype"] == mine.get("dtype") and e["error"] <= allowed
        }
        if "ratio" in mine and peers:
            peer = max(peers, key=lambda p: peers[p])
            found.append((name, mine["ratio"]["median"] / peers[peer], peer))
    return found


def red(result: Mapping[str, Any]) -> bool:
    """Return whether any output was wrong."""
    return any(record["red"] for record in result["batches"])


# Comparison -----------------------------------------------------------------------------------------------------------


def compare(now: Mapping[str, Any], before: Mapping[str, Any]) -> tuple[list[str], int]:
    """Compare the ratios of fastdiff's engines to a peer that took part in both results; times are not compared.

    The result is lines to print, and the number of engines that are worse: whose interval lies below the earlier one
    and whose ratio fell by 5 % or more, or whose output has become wrong.
    """
    for key in ("model", "what", "guidance"):
        if now.get(key) != before.get(key):
            raise InvalidArgument(f"results of {key} {before.get(key)} and {now.get(key)} cannot be compared")
    lines = [f"note: another machine: {d}" for d in machine.differences(now["machine"], before["machine"])]
    worse = compared = 0
    earlier = {record["batch"]: record for record in before["batches"]}
    for record in now["batches"]:
        old = earlier.get(record["batch"])
        if old is None:
            lines.append(f"batch {record['batch']}: not in the earlier result")
            continue
        for name in record["red"]:
            if name in old["engines"] and name not in old["red"]:
                compared, worse = compared + 1, worse + 1
                lines.append(f"batch {record['batch']}: {name}: WORSE: {record['red'][name]}, which it passed before")
        anchor = _common_anchor(record, old)
        if anchor is None:
            lines.append(f"batch {record['batch']}: no peer ran in both results, so there is no ratio to compare")
            continue
        for side, which in ((record, "this"), (old, "the earlier")):
            if side["noise"]:
                lines.append(f"batch {record['batch']}: note: {which} result is too noisy: {'; '.join(side['noise'])}")
        new, past = pairs(record, anchor), pairs(old, anchor)
        for name in new:
            if name == anchor or name not in past or not record["engines"][name]["own"]:
                continue
            compared += 1
            change = new[name].median / past[name].median - 1.0
            fell = new[name].high < past[name].low and change <= -LEAST_CHANGE
            rose = new[name].low > past[name].high and change >= LEAST_CHANGE
            worse += fell
            verdict = "WORSE" if fell else "better" if rose else "within the noise"
            lines.append(
                f"batch {record['batch']}: {name}: {past[name].median:.3f} times {anchor} before, "
                f"{new[name].median:.3f} now, {change:+.1%}: {verdict}"
            )
    if not compared:
        lines.append("nothing could be compared: no engine of fastdiff is in both results beside the same peer")
    return lines, worse


def _common_anchor(*records: Mapping[str, Any]) -> str | None:
    """Find a contender that took part in rounds of every record, their own anchors first."""

    def ran(name: str, record: Mapping[str, Any]) -> bool:
        return any(name in seconds for seconds in record["rounds"])

    first = [record["anchor"] for record in records if record["anchor"]]
    names = dict.fromkeys([*first, *ANCHORS])
    return next((name for name in names if all(ran(name, record) for record in records)), None)


# The picture ----------------------------------------------------------------------------------------------------------


def plot(result: Mapping[str, Any], path: Path) -> None:
    """Draw a panel for each batch: bars of img-steps/s with their spread, and the limits as lines."""
    check_plot(path)
    from matplotlib.figure import Figure

    records = [r for r in result["batches"] if any(_drawn(r, name) for name in r["engines"])]
    if not records:
        raise InvalidArgument(f"--plot {path}: there is no speed to draw")
    rows = max(sum(_drawn(r, name) for name in r["engines"]) for r in records)
    figure = Figure(figsize=(4.2 * len(records) + 1, 1.6 + 0.3 * rows), layout="constrained")
    for axes, record in zip(figure.subplots(1, len(records), squeeze=False)[0], records, strict=True):
        names = [name for name in record["engines"] if _drawn(record, name)]
        entries = [record["engines"][name] for name in names]
        speeds = [e["img_steps_per_s"] for e in entries]
        colours = [_colour(e) for e in entries]
        errors = [e["img_steps_per_s"] * e["spread"] / 2 for e in entries]
        axes.barh(range(len(names)), speeds, xerr=errors, color=colours, ecolor="0.3")
        for i, e in enumerate(entries):
            axes.text(e["img_steps_per_s"], i, f"  {e['img_steps_per_s']:.4g}", va="center", fontsize=7)
        for dtype, limit in record.get("limits", {}).items():
            if any(e["dtype"] == dtype for e in entries):
                axes.axvline(limit, color=_colour({"own": False, "dtype": dtype}), linestyle="--", linewidth=1)
                axes.annotate(f" limit {dtype}", (limit, 0), xycoords=("data", "axes fraction"), fontsize=6,
                              rotation=90, va="bottom", ha="right")  # fmt: skip
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set_title(f"batch {record['batch']}" + (" (too noisy)" if record["noise"] else ""), fontsize=9)
        axes.set_xlabel("img-steps/s", fontsize=8)
    header = result["machine"]
    figure.suptitle(
        f"{result['model']}, {header['threads']} threads of {header['processor']}\nfastdiff's engines in dark colours, "
        "bfloat16 in orange", fontsize=9,
    )  # fmt: skip
    with atomic_file(path) as file:
        figure.savefig(file, dpi=120, format="png")


def check_plot(path: Path) -> None:
    """Check before the work that a picture can be written to ``path``: that it is a .png, and matplotlib is there."""
    if path.suffix.lower() != ".png":
        raise InvalidArgument(f"--plot {path}: a .png file is needed")
    try:
        import matplotlib  # noqa: F401 - only tests that it is installed
    except ImportError as e:
        raise InvalidArgument("--plot needs matplotlib: pip install 'fastdiff[bench]'") from e


def _drawn(record: Mapping[str, Any], name: str) -> bool:
    return "img_steps_per_s" in record["engines"][name] and name not in record["red"]


def _colour(entry: Mapping[str, Any]) -> str:
    light, dark = ("#9ecae1", "#2171b5") if entry["dtype"] == "float32" else ("#fdae6b", "#d94801")
    return dark if entry["own"] else light
