"""Writes and reads the results of the parts, gpu.json and gpu.md."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any


def write(out: Path, parts: dict[str, Any], dry: bool) -> None:
    text = json.dumps({"dry_run": dry, "commit": commit(), "parts": parts}, indent=1)
    (out / "gpu.json.new").write_text(text + "\n", encoding="utf-8")
    (out / "gpu.json.new").replace(out / "gpu.json")
    (out / "gpu.md").write_text(readable(parts, dry), encoding="utf-8")


def read(path: Path, dry: bool) -> dict[str, Any]:
    """Read the parts of an earlier call, unless only one of the two calls is a dry run."""
    if not path.is_file():
        return {}
    data = json.loads(path.read_text(encoding="utf-8"))
    return dict(data["parts"]) if data["dry_run"] == dry else {}


def commit() -> str | None:
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    return None


def readable(parts: dict[str, Any], dry: bool) -> str:
    """Format the results as Markdown, with lists of rows as tables."""
    lines = ["# fastdiff on a GPU" + ", a dry run on a CPU: no figure means anything" * dry, ""]
    for name, part in parts.items():
        lines += [f"## {name}: {part['status']}, {part.get('seconds', 0)} s", ""]
        if "error" in part:
            lines += ["```", part["error"].strip(), "```", ""]
        for key, value in part.get("result", {}).items():
            if isinstance(value, dict) and value and all(isinstance(v, dict) for v in value.values()):
                value = [{key: k, **v} for k, v in value.items()]
            if isinstance(value, list) and value and isinstance(value[0], dict):
                columns = list(dict.fromkeys(column for row in value for column in row))
                lines += ["", "| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
                lines += ["| " + " | ".join(cell(row.get(column)) for column in columns) + " |" for row in value]
                lines += [""]
            elif value not in ({}, [], None):
                lines += [f"- {key}: {cell(value)}"]
        lines += [""]
    return "\n".join(lines)


def cell(value: Any) -> str:
    text = f"{value:.4g}" if isinstance(value, float) and abs(value) < 0.01 else str("" if value is None else value)
    return text.strip().splitlines()[-1].replace("|", "/") if text.strip() else ""


MOST_LINES = 30


def summary(parts: dict[str, Any], dry: bool) -> list[str]:
    """Return at most `MOST_LINES` lines with what matters most: they are printed last, as the output may be cut."""
    lines = ["summary" + ", a dry run on a CPU: no figure means anything" * dry]
    for name, part in parts.items():
        result = part.get("result", {})
        words = [f"{name}: {part['status']}"]
        if part["status"] != "ok" and part.get("error"):
            words.append(cell(part["error"])[:120])
        if "contenders" in result:
            speeds = {k: row["img_steps_per_s"] for k, row in result["contenders"].items() if "img_steps_per_s" in row}
            words += [f"{k} {v:.4g}" for k, v in sorted(speeds.items(), key=lambda pair: -pair[1])]
        words += [f"{key} {cell(result[key])}" for key in ("device", "bf16_tflops", "copy_GB_per_s") if key in result]
        for key in ("failed", "red", "unfinished"):
            words += [f"{len(result[key])} {key}"] if result.get(key) else []
        for key, rows in result.items():
            if key.endswith("by operation"):
                words += [f"{key.split(',')[0]} {rows[0]['predicted_us']} us predicted"]
                words += [f"{rows[0]['measured_us']} us measured"] if "measured_us" in rows[0] else []
        lines.append("; ".join(words)[:400])
    return lines[:MOST_LINES]
