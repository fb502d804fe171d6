"""A description of a data set, for the beginning of a run: as a dictionary for JSON, and as lines for people."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from fastdiff.data.base import ImageData
from fastdiff.errors import printable

LISTED = 1000  # files that are skipped, of which the names are kept
SHOWN = 20  # files and classes that people see
WIDTH = 12  # of the first column


def describe(data: ImageData, path: str | Path) -> dict[str, Any]:
    """Describe a data set, ready for JSON."""
    classes = None
    if data.num_classes is not None:
        names = data.class_names or tuple(map(str, range(data.num_classes)))
        counts = [0] * len(names) if data.labels is None else torch.bincount(data.labels, minlength=len(names)).tolist()
        classes = dict(zip(names, counts, strict=False))
    return {
        "path": str(path),
        "images": len(data),
        "size": list(data.size),
        "channels": data.channels,
        "values": [] if data.look is None else data.look.ranges(),
        "classes": classes,
        "facts": list(data.facts),
        "options": dict(data.options),
        "skipped": len(data.skipped),
        "skipped_files": [{"file": str(file), "reason": reason} for file, reason in data.skipped[:LISTED]],
        "warnings": list(data.doubts),
    }


def data_lines(name: str, described: dict[str, Any]) -> list[str]:
    """Format a description for people; the first column of its first line is ``name``."""
    height, width = described["size"]
    colour = {1: "gray", 3: "colour"}.get(described["channels"], f"{described['channels']} channels")
    facts = f" ({'; '.join(described['facts'])})" if described["facts"] else ""
    lines = [
        line(name, f"{described['path']}: {described['images']} images, {height}x{width}, {colour}{facts}"),
        line("values", "; ".join(described["values"]) or "unknown"),
    ]
    classes = described["classes"]
    if classes is not None:
        some = [f"{i} {label}: {count}" for i, (label, count) in enumerate(classes.items())][:SHOWN]
        lines.append(line("classes", f"{len(classes)}: {', '.join(some)}{', ...' if len(classes) > SHOWN else ''}"))
    if described["skipped"]:
        lines.append(line("skipped", f"{described['skipped']}:"))
        lines += [line("", f"{entry['file']}: {entry['reason']}") for entry in described["skipped_files"][:SHOWN]]
        if described["skipped"] > SHOWN:
            lines.append(line("", f"and {described['skipped'] - SHOWN} more"))
    return lines


def line(name: str, text: str) -> str:
    """Return a line of two columns that is safe to print."""
    return f"{name:{WIDTH}}{printable(text)}"


def warning_lines(warnings: Iterable[str]) -> list[str]:
    """Return a line for each warning."""
    return [line("WARNING", text) for text in warnings]


def duration(seconds: float) -> str:
    """Format a time in s, min, h or days."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if minutes < 48 * 60:
        return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
    return f"{minutes / (24 * 60):.0f} days"
