"""What the points say: the Pareto front, the nearest to the reference, the table on standard output."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

Entry = dict[str, Any]


def front(points: Sequence[tuple[float, ...]]) -> list[bool]:
    """Which points no other one dominates: is at most as large in every number, and smaller in one.

    Of the trilemma: (network evaluations, distance, - recall). Evaluations stand for speed, as solvers of equally many
    are equally fast but for the noise of timing.
    """
    kept = [False] * len(points)
    for i in sorted(range(len(points)), key=lambda i: points[i]):  # whoever dominates a point comes before it
        kept[i] = not any(
            kept[j] and points[j] != points[i] and _covers(points[j], points[i]) for j in range(len(points))
        )
    return kept


def _covers(p: tuple[float, ...], q: tuple[float, ...]) -> bool:
    return all(a <= b for a, b in zip(p, q, strict=True))


def mark_front(entries: Sequence[Entry]) -> None:
    """Set ``front`` of every entry, by the numbers that all of them have in common, ``at_n``."""
    coordinates = [(e["nfe"], e["at_n"]["frechet"]["value"], -e["at_n"]["recall"]["value"]) for e in entries]
    for entry, on_front in zip(entries, front(coordinates), strict=True):
        entry["front"] = on_front


def nearest(entries: Sequence[Entry], reference: str, most: int = 10, allowed: float = 1.1) -> Entry | None:
    """The point of at most ``most`` network evaluations that comes nearest to the reference's distance at equal n, and
    the shortest within ``allowed`` times that distance; of plain points alone, too. None without the reference.
    """
    target = next((e for e in entries if e["name"] == reference), None)
    if target is None:
        return None
    goal = target["at_n"]["frechet"]["value"]

    def of(candidates: list[Entry]) -> Entry | None:
        if not candidates:
            return None
        distances = {e["name"]: e["at_n"]["frechet"]["value"] / goal for e in candidates}
        lowest = min(distances, key=lambda name: distances[name])
        good = [e for e in candidates if distances[e["name"]] <= allowed]
        shortest = min(good, key=lambda e: (e["nfe"], distances[e["name"]]), default=None)
        return {
            "lowest": {"name": lowest, "ratio": distances[lowest]},
            "shortest_within": None
            if shortest is None
            else {"name": shortest["name"], "nfe": shortest["nfe"], "ratio": distances[shortest["name"]]},
        }

    short = [e for e in entries if e["nfe"] <= most and e["name"] != reference]
    plain = [e for e in short if e["options"].get("guidance", 1.0) == 1.0]
    return {
        "reference": reference,
        "distance": goal,
        "most_nfe": most,
        "allowed_ratio": allowed,
        "any": of(short),
        "plain": of(plain),
    }


def say_nearest(found: Entry | None) -> Iterator[str]:
    """`nearest` in words."""
    if found is None:
        yield "the reference, ddpm in all timesteps, is not among the points, so nothing is compared with it"
        return
    name, most = found["reference"], found["most_nfe"]
    for what, where in (("any", ""), ("plain", " without guidance")):
        of = found[what]
        if of is None:
            continue
        if of["shortest_within"] is not None:
            best = of["shortest_within"]
            yield f"{best['name']}{where} is at {best['ratio']:.2f} times the distance of {name}: within 10 % of it"
        else:
            best = of["lowest"]
            yield (
                f"NO setting{where} with {most} evaluations or fewer is within 10 % of the distance of {name}; the "
                f"nearest is {best['name']}, at {best['ratio']:.2f} times"
            )


def table(result: Mapping[str, Any]) -> Iterator[str]:
    """The points as lines: at the common n, sorted by network evaluations and distance."""
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
    if result["missing"]:
        yield f"missing (run the same command again to draw them): {', '.join(m['name'] for m in result['missing'])}"


def _interval(e: Mapping[str, float]) -> str:
    return f"{e['value']:.3f} [{e['low']:.3f}, {e['high']:.3f}]"


def for_model(result: Mapping[str, Any]) -> dict[str, Any]:
    """What a model's folder needs of a result: see `fastdiff.measured`."""

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
