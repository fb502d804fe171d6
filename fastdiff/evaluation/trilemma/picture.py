"""The trilemma as a picture: quality and diversity against speed, both with 95 % intervals."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastdiff.files import atomic_file

# Colours by solver (Okabe and Ito 2008, distinguishable for the colour-blind), markers by guidance and spacing.
COLOURS = {"ddpm": "#D55E00", "ddim": "#0072B2", "dpmpp_2m": "#009E73", "unipc": "#AA4499", "dpmpp_3m": "#56B4E9"}
OTHERS = ("#E69F00", "#666666", "#A6761D", "#332288")
PANELS = (
    ("frechet", "Fréchet distance  (quality: lower is better)", True),
    ("recall", "recall  (diversity: higher is better)", False),
)


def drawable() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def draw_picture(result: Mapping[str, Any], path: Path) -> None:
    """Draw a result (of `run.result`) into a file; matplotlib has to be installed.

    The x axis shows images/s, with network evaluations at the top, or only evaluations if speeds were not timed.
    """
    from matplotlib.figure import Figure  # pyplot would change global state and need a display

    entries = [e for e in result["points"] if not e.get("same_as")]
    timed = all("images_per_s" in e for e in entries)
    solvers = list(dict.fromkeys(e["options"]["solver"] for e in entries))
    figure = Figure(figsize=(13.0, 6.2), dpi=150, layout="constrained")
    axes = figure.subplots(1, len(PANELS))
    for axis, (metric, title, log) in zip(axes, PANELS, strict=True):
        ends: list[tuple[float, float, str, str]] = []
        for key in dict.fromkeys(e["key"] for e in entries):
            line = sorted((e for e in entries if e["key"] == key), key=lambda e: e["nfe"])
            at = [_x(e, timed) for e in line]
            values, low, high = ([e["at_n"][metric][k] for e in line] for k in ("value", "low", "high"))
            solver, *rest = key.split("-")
            fallback = OTHERS[solvers.index(solver) % len(OTHERS)]
            colour = COLOURS.get(solver, fallback)
            guided = line[0]["options"].get("guidance", 1.0) != 1.0
            spaced = "spacing" in line[0]["options"]
            style = {
                "marker": "s" if guided else "D" if spaced else "o",
                "ls": "--" if guided else ":" if spaced else "-",
            }
            errors = [
                [v - a for v, a in zip(values, low, strict=True)],
                [b - v for v, b in zip(values, high, strict=True)],
            ]
            axis.errorbar(at, values, errors, color=colour, ms=4.5, lw=1.4, elinewidth=0.8, alpha=0.9, **style)
            ends.append((at[0], values[0], " ".join([_TITLES.get(solver, solver), *map(_part, rest)]), colour))
        ring = [e for e in entries if e["front"]]
        axis.scatter(
            [_x(e, timed) for e in ring], [e["at_n"][metric]["value"] for e in ring],
            s=110, facecolors="none", edgecolors="black", linewidths=1.4, zorder=5,
        )  # fmt: skip
        _reference(axis, result, metric)
        axis.set_xscale("log")
        if log:
            axis.set_yscale("log")
            _plain_ticks(axis.yaxis, decades=False)
        if not timed:
            axis.invert_xaxis()
        _plain_ticks(axis.xaxis)
        axis.set_xlabel("images/s" if timed else "network evaluations an image")
        axis.set_title(title, fontsize=11, loc="left")
        axis.grid(True, which="both", color="#e6e6e6", lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right"]].set_visible(False)
        _label(axis, ends, log)
    if timed:
        for axis in axes:
            _evaluations(axis, entries)
    text = (
        f"{result['model_name']}: {result['n']} images a point, 95 % intervals, features of "
        f"{result['settings']['features']};  rings: on the Pareto front of speed, quality and diversity"
    )
    figure.suptitle(text, fontsize=11.5, x=0.01, ha="left")
    with atomic_file(path) as file:
        figure.savefig(file, format="png")


_TITLES = {"ddpm": "DDPM", "ddim": "DDIM", "dpmpp_2m": "DPM++ 2M", "dpmpp_3m": "DPM++ 3M", "unipc": "UniPC"}


def _part(part: str) -> str:
    return f"guidance {part[1:]}" if part[0] == "g" and part[1:2].isdigit() else part.replace("eta", "η ")


def _x(entry: Mapping[str, Any], timed: bool) -> float:
    return entry["images_per_s"] if timed else entry["nfe"]


def _reference(axis: Any, result: Mapping[str, Any], metric: str) -> None:
    """Draw the reference's value, and a band of 10 % around its distance."""
    name = result["reference"]
    entry = next((e for e in result["points"] if e["name"] == name), None)
    if entry is None:
        return
    value = entry["at_n"][metric]["value"]
    axis.axhline(value, color=COLOURS["ddpm"], lw=0.8, ls=(0, (6, 4)), alpha=0.7, zorder=0)
    if metric == "frechet":
        axis.axhspan(value / 1.1, value * 1.1, color=COLOURS["ddpm"], alpha=0.06, lw=0, zorder=0)


def _label(axis: Any, ends: Sequence[tuple[float, float, str, str]], log: bool) -> None:
    """Write each line's name right of its fastest point, moving names apart that would overlap."""
    axis.figure.canvas.draw()  # determines the limits
    right = max(x for x, *_ in ends) if not axis.xaxis_inverted() else min(x for x, *_ in ends)
    to_pixels, to_data = axis.transData.transform, axis.transData.inverted().transform
    placed: list[float] = []
    gap = 11 * axis.figure.dpi / 72
    for x, y, text, colour in sorted(ends, key=lambda end: end[1]):
        pixel = to_pixels((x, y))[1]
        pixel = max(pixel, placed[-1] + gap) if placed else pixel
        placed.append(pixel)
        position = to_data((0, pixel))[1]
        axis.annotate(
            text, xy=(x, y), xytext=(right, position), textcoords="data", color=colour, fontsize=8.5, va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colour, "lw": 0.5, "alpha": 0.6},
        ).set_x(right * (1.18 if not axis.xaxis_inverted() else 0.85))  # fmt: skip


def _evaluations(axis: Any, entries: Sequence[Mapping[str, Any]]) -> None:
    """Add an axis of network evaluations at the top; images/s times evaluations is nearly the same for all points."""
    rates = sorted(e["images_per_s"] * e["nfe"] for e in entries)
    rate = rates[len(rates) // 2]

    def other(x: Any) -> Any:  # matplotlib also passes 0
        with np.errstate(divide="ignore"):
            return rate / np.asarray(x, dtype=float)

    top = axis.secondary_xaxis("top", functions=(other, other))
    top.set_xlabel("network evaluations an image (about)", fontsize=9)
    _plain_ticks(top.xaxis)


def _plain_ticks(axis: Any, decades: bool = True) -> None:
    """Label an axis with plain numbers at 1, 2, 5, 10, ..., or at even distances within a decade or two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

    axis.set_major_locator(LogLocator(base=10, subs=(1.0, 2.0, 5.0)) if decades else MaxNLocator(7))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())
    if not decades:
        axis.set_minor_locator(NullLocator())
