"""Evaluation of the points: the Pareto front, the points nearest to the reference, and the printed table."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Any

Entry = dict[str, Any]

MOST = 10  # the largest number of network evaluations of points that are compared with the reference
ALLOWED = 1.1  # the largest ratio to the reference's distance that counts as near


def front(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Find the points that no other point dominates, that is, is at most as large in every number and smaller in one.

    The trilemma's numbers are (network evaluations, distance, -recall). Evaluations represent speed, as solvers with
    equally many differ in speed only by the noise of timing.
    """
    kept = [False] * len(points)
    for i in sorted(range(len(points)), key=lambda i: points[i]):  # a point that dominates another one comes before it
        kept[i] = not any(
            kept[j] and p != points[i] and all(a <= b for a, b in zip(p, points[i], strict=True))
            for j, p in enumerate(points)
        )
    return kept


def mark_front(entries: Sequence[Entry]) -> None:
    """Set ``front`` of every entry, by the numbers that all of them have in common, ``at_n``."""
    coordinates = [(e["nfe"], e["at_n"]["frechet"]["value"], -e["at_n"]["recall"]["value"]) for e in entries]
    for entry, on_front in zip(entries, front(coordinates), strict=True):
        entry["front"] = on_front


def nearest(
    goal: Mapping[str, float],
    distances: Mapping[str, Mapping[str, float]],
    nfes: Mapping[str, int],
    plain: Collection[str],
) -> Entry:
    """Compare points of at most `MOST` network evaluations with the reference, all at equal n.

    ``goal`` is the reference's distance, {"value", "low", "high"}; ``plain`` are the names of unguided points. The
    result has for "any" points and for "plain" ones the point with the "lowest" distance, and the one with the fewest
    evaluations within `ALLOWED` times the reference's distance, "shortest_within".
    """

    def of(names: list[str]) -> Entry | None:
        if not names:
            return None
        ratio = {name: distances[name]["value"] / goal["value"] for name in names}
        lowest = min(names, key=lambda name: ratio[name])
        shortest = min(
            (m for m in names if ratio[m] <= ALLOWED), key=lambda name: (nfes[name], ratio[name]), default=None
        )
        return {
            key: None if name is None else {"name": name, "nfe": nfes[name], "ratio": ratio[name]}
            for key, name in (("lowest", lowest), ("shortest_within", shortest))
        }

    return {
        "distance": dict(goal),
        "most_nfe": MOST,
        "allowed_ratio": ALLOWED,
        "any": of(list(distances)),
        "plain": of([name for name in distances if name in plain]),
    }


def say_nearest(found: Entry | None) -> Iterator[str]:
    """Yield the result of `nearest` in words."""
    if found is None:
        yield "the reference, the longest run of ddpm, is not there yet, so nothing is compared with it"
        return
    name = f"the distance of {found['reference']} at n={found['n']}"
    for of, where in ((found["any"], "any guidance"), (found["plain"], "no guidance")):
        if of is None:
            continue
        best, lowest = of["shortest_within"], of["lowest"]
        if best is not None:
            yield (
                f"{where}: {best['name']} is at {best['ratio']:.2f} times {name}, within 10 %; the lowest of at most "
                f"{MOST} evaluations is {lowest['name']}, at {lowest['ratio']:.2f} times"
            )
        else:
            yield (
                f"{where}: NO setting of at most {MOST} evaluations is within 10 % of {name}; the nearest is "
                f"{lowest['name']}, at {lowest['ratio']:.2f} times"
            )


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """Yield the points as lines, at the common n, sorted by network evaluations and distance."""
    n = result["n"]
    yield (
        f"{'':1} {'setting':18}{'NFE':>5}{'images/s':>10}   {f'Frechet at n={n}':28}{'kernel x 1000':>14}"
        f"{'precision':>11}{'recall':>8}   {'Frechet at its own n':24}"
    )
    for e in sorted(result["points"], key=lambda e: (e["nfe"], e["at_n"]["frechet"]["value"])):
        speed = e.get("images_per_s")
        own = f"{_interval(e['at_own_n']['frechet'])} at {e['n']}" if e["n"] > n else ""
        same = f"= {e['same_as']}" if e.get("same_as") else own
        shown = "" if speed is None else f"{speed:.4g}"
        yield (
            f"{'*' if e['front'] else '':1} {e['key']:18}{e['nfe']:>5}{shown:>10}   "
            f"{_interval(e['at_n']['frechet']):28}{1000 * e['at_n']['kernel']['value']:>14.3f}"
            f"{e['at_n']['precision']['value']:>11.3f}{e['at_n']['recall']['value']:>8.3f}   {same}"
        )
    floor = result.get("floor")
    if floor is not None:
        yield (
            f"  {'real images':18}{'':15}   {_interval(floor['frechet']):28}{1000 * floor['kernel']['value']:>14.3f}"
            f"{floor['precision']['value']:>11.3f}{floor['recall']['value']:>8.3f}"
        )
    yield "* on the Pareto front of network evaluations, Frechet distance and recall; 95 % intervals in brackets"
    absent = [f"{m['name']} ({m['images']} of {m['of']})" for m in result["missing"] if m["images"] < n]
    fewer = sum(m["images"] >= n for m in result["missing"])
    if absent:
        yield f"not there yet, the same command draws them: {', '.join(absent)}"
    if fewer:
        yield f"{fewer} points have fewer images than planned, but the {n} that are compared"


def _interval(e: Mapping[str, float]) -> str:
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def say_peer(peer: Entry | None) -> Iterator[str]:
    """Yield the speed of the peer, and the ratios to it, in words."""
    if peer is None:
        return
    yield (
        f"{peer['loop']}: {peer['images_per_s']:.3g} images/s, from {peer['timed_steps']} timed steps of "
        f"{peer['seconds_per_step']:.3g} s (batch {peer['batch']}, {peer['memory_format']})"
    )
    for name, ratio in peer["ratios"].items():
        yield f"{name}: {ratio:.0f} times as many images/s"


def for_model(result: Mapping[str, Any]) -> dict[str, Any]:
    """Extract the part of a result that is kept in a model's folder, see `fastdiff.sampler.measured`."""

    def brief(value: float) -> float:
        return float(f"{value:.6g}")

    return {
        "format": result["format"],
        "made_by": "fastdiff trilemma --install",
        "model": result["model"],
        "n": result["n"],
        "features": result["settings"]["features"],
        "points": [
            {
                "options": e["options"],
                "nfe": e["nfe"],
                "at_n": {
                    "frechet": {k: brief(v) for k, v in e["at_n"]["frechet"].items()},
                    "recall": {"value": brief(e["at_n"]["recall"]["value"])},
                },
            }
            for e in result["points"]
            if not e.get("same_as")
        ],
    }
