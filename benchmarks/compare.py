"""Compare two runs of the benchmarks, and exit with code 1 if anything became slower.

    python benchmarks/compare.py old.json new.json --tolerance 0.2

The runs may come from a fast and a slow hour of a machine, or from two machines. So each benchmark is compared by its
share of the ceilings that were measured in the same run.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path


def shares(path: Path) -> dict[str, float]:
    """Read the shares by benchmark; benchmarks that report no share are left out."""
    report = json.loads(path.read_text())
    return {b["name"]: b["extra_info"]["share"] for b in report["benchmarks"] if b["extra_info"].get("share")}


def compare(old: dict[str, float], new: dict[str, float], tolerance: float) -> tuple[list[str], list[str]]:
    """Return lines to print, and the names of benchmarks slower by more than ``tolerance`` (0.2: below 1 / 1.2)."""
    lines, slower = [], []
    for name in sorted(old.keys() & new.keys(), key=lambda name: new[name] / old[name]):
        ratio = new[name] / old[name]
        wrong = ratio < 1 / (1 + tolerance)
        if wrong:
            slower.append(name)
        lines.append(f"{ratio:6.2f} x  share {old[name]:.3f} -> {new[name]:.3f}  {name}{'  SLOWER' * wrong}")
    lines += [f"{name}: only in the first" for name in sorted(old.keys() - new.keys())]
    lines += [f"{name}: only in the second" for name in sorted(new.keys() - old.keys())]
    return lines, slower


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    parser.add_argument("--tolerance", type=float, default=0.2)
    arguments = parser.parse_args()
    old, new = shares(arguments.old), shares(arguments.new)
    if not old.keys() & new.keys():
        print("the two have no benchmark in common that reports a share of its ceiling", file=sys.stderr)
        return 2
    lines, slower = compare(old, new, arguments.tolerance)
    print("\n".join(lines))
    print(f"{len(slower)} of {len(old.keys() & new.keys())} became slower by more than {arguments.tolerance:.0%}")
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main())
