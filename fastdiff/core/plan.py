"""Memory planning: from the lifetimes of a program's buffers to offsets in one arena."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastdiff.core.program import Conv, Program

ALIGNMENT = 64  # bytes: a cache line, and the widest vector
STATISTICS = ".statistics"


@dataclasses.dataclass(frozen=True)
class Lifetime:
    """Lifetime of ``size`` bytes, from the operation that writes them to the last one that reads them, by index."""

    first: int
    last: int
    size: int

    def meets(self, other: Lifetime) -> bool:
        """Return whether some operation needs both."""
        return self.first <= other.last and other.first <= self.last


@dataclasses.dataclass(frozen=True)
class Plan:
    """Placement of a program's buffers in an arena.

    ``lifetimes`` and ``offsets`` (in bytes) have an entry for each buffer [rows, H, W, C], and one for its statistics
    [rows, strips, 2, C], named ``<name>.statistics``, which are float32 or wider. C is padded to the group of `plan`.
    """

    program: Program
    rows: int
    itemsize: int  # bytes of an activation
    lifetimes: dict[str, Lifetime]
    offsets: dict[str, int]

    @property
    def size(self) -> int:
        """Size of the arena in bytes."""
        return max((offset + self.lifetimes[name].size for name, offset in self.offsets.items()), default=0)

    @property
    def bound(self) -> int:
        """Largest number of bytes alive at one operation; no plan can be smaller."""
        alive = [0] * len(self.program.ops)
        for life in self.lifetimes.values():
            for i in range(life.first, life.last + 1):
                alive[i] += life.size
        return max(alive, default=0)

    def to_dict(self, methods: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Describe every operation with its shapes, cost and offset, and the sums over all rows, as JSON can hold them.

        ``methods`` gives a backend's algorithm for an operation by the buffer that it writes.
        """
        program = self.program
        ops = []
        for op in program.ops:
            norm = program.norm(op)
            extras = (
                []
                if norm is None
                else ["norm" if norm.groups else "layer norm", *["scale-shift"] * (norm.modulation is not None)]
            )
            extras += ["silu"] if norm is not None and norm.silu else []
            if isinstance(op, Conv):
                extras += ["up"] * op.upsample + ["emb"] * (op.emb is not None)
                extras += ["residual"] * (op.residual is not None) + ["geglu"] * op.geglu
            kind = type(op).__name__.lower()
            ops.append(
                {
                    "op": f"{kind} {op.kernel}x{op.kernel}/{op.stride}" if isinstance(op, Conv) else kind,
                    "src": [list(program.buffers[name].shape) for name in op.src],
                    "dst": list(program.buffers[op.dst].shape),
                    "with": extras,
                    "flops": self.rows * program.flops(op),
                    "weights": program.parameters(op),
                    "bytes": self.rows * self.itemsize * program.traffic(op),
                    "offset": self.offsets.get(op.dst),
                    "name": op.dst,
                }
            )
            if methods is not None:
                ops[-1]["method"] = methods.get(op.dst)
        return {
            "rows": self.rows,
            "flops": sum(op["flops"] for op in ops),
            "weights": sum(op["weights"] for op in ops),
            "bytes": sum(op["bytes"] for op in ops),
            "arena": self.size,
            "arena_bound": self.bound,
            "ops": ops,
        }

    def __str__(self) -> str:
        return self.text()

    def text(self, methods: Mapping[str, str] | None = None) -> str:
        """Format `to_dict` as a table."""
        report = self.to_dict(methods)
        lines = [f"{'op':12}{'from':22}{'to':13}{'MFLOP':>9}{'weights':>9}{'KiB':>8}{'at KiB':>8}  name"]
        for op in report["ops"]:
            source, target = (" + ".join("x".join(map(str, s)) for s in shapes) for shapes in (op["src"], [op["dst"]]))
            at = "-" if op["offset"] is None else f"{op['offset'] / 1024:.0f}"
            extras = f" ({', '.join(op['with'])})" if op["with"] else ""
            extras += f" [{op['method']}]" if op.get("method") else ""
            lines.append(
                f"{op['op']:12}{source:22}{target:13}{op['flops'] / 1e6:9.2f}{op['weights']:9}{op['bytes'] / 1024:8.0f}"
                f"{at:>8}  {op['name']}{extras}"
            )
        lines.append(
            f"{report['rows']} rows: {report['flops'] / 1e9:.3f} GFLOP, {report['weights']} weights, activations of "
            f"{report['bytes'] / 2**20:.1f} MiB read and written, arena {report['arena'] / 2**20:.1f} MiB "
            f"(at least {report['arena_bound'] / 2**20:.1f} MiB)"
        )
        return "\n".join(lines)


def lifetimes(program: Program, rows: int, itemsize: int = 4, group: int = 1) -> dict[str, Lifetime]:
    """Compute the lifetimes of the arena's buffers, in creation order; the arguments are those of `plan`."""
    last = {name: i for i, op in enumerate(program.ops) for name in (*program.reads(op), op.dst)}
    result = {}
    for first, op in enumerate(program.ops):
        buffer = program.buffers[op.dst]
        if buffer.external:
            continue
        H, W, C = buffer.shape
        channels = _multiple(C, group)
        result[op.dst] = Lifetime(first, last[op.dst], _multiple(rows * H * W * channels * itemsize, ALIGNMENT))
        if buffer.statistics:
            size = _multiple(rows * buffer.strips * 2 * channels * max(itemsize, 4), ALIGNMENT)
            result[op.dst + STATISTICS] = Lifetime(first, last[op.dst], size)
    return result


def plan(program: Program, rows: int, itemsize: int = 4, group: int = 1) -> Plan:
    """Place the buffers of a program in an arena, at multiples of `ALIGNMENT`.

    The largest buffers come first, each at the lowest offset that is free during its lifetime (greedy by size:
    Pisarchyk & Lee 2020, arXiv:2001.03288, section 5). Channels are padded to a multiple of ``group``.
    """
    lives = lifetimes(program, rows, itemsize, group)
    placed: list[tuple[int, Lifetime]] = []
    offsets = {}
    for name, life in sorted(lives.items(), key=lambda item: (-item[1].size, item[1].first)):
        offset = 0
        for start, other in sorted((p for p in placed if p[1].meets(life)), key=lambda p: p[0]):
            if offset + life.size <= start:
                break
            offset = max(offset, start + other.size)
        offsets[name] = offset
        placed.append((offset, life))
    return Plan(program, rows, itemsize, lives, offsets)


def _multiple(size: int, of: int) -> int:
    return -(-size // of) * of
