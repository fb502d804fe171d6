"""Drawing and measuring the points, so that nothing finished is done twice."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from fastdiff import __version__
from fastdiff.checkpoints.reading import fingerprint, read_json
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import scoring as evaluation
from fastdiff.evaluation import image_store as parts
from fastdiff.evaluation.classifier import SIZE, Classifier
from fastdiff.evaluation.metrics import Extractor, Reference, features, measure
from fastdiff.evaluation.reference_images import Real, default_fit, find_data
from fastdiff.evaluation.trilemma import report, speed
from fastdiff.evaluation.trilemma.grid import FEW, Planned
from fastdiff.files import write_text
from fastdiff.sampler import Sampler, measured, request

log = logging.getLogger("fastdiff")

Say = Callable[[str], None]
SEED = 0
MIN_REFERENCE = 500  # images of the reference below which nothing is compared with it


@dataclasses.dataclass(frozen=True)
class Judge:
    """What samples are measured by: a network's features, real images, and held-out ones like those, or None.

    images: uint8 [N, C, H, W]. name, data: what the features and the images are, in words.
    """

    extract: Extractor
    name: str
    real: Real
    data: str

    @classmethod
    def of(
        cls, sampler: Sampler, model: str, data: Path | None, held_out: Path | None, fit: str | None, features_of: str
    ) -> Judge:
        """As `evaluation.evaluate` takes them; what is missing or does not fit is named by the same errors."""
        found = find_data(data, model)
        extract = features(features_of, sampler.device)
        height, width = request.image_size(1, None, sampler.info)
        shape = (sampler.info.channels, height, width)
        if isinstance(extract.network, Classifier) and shape != (1, SIZE, SIZE):
            raise InvalidArgument(
                f"{features_of} judges images of 1x{SIZE}x{SIZE}, those of {model} are {shape[0]}x{height}x{width}; "
                "give the weights of Inception as --features"
            )
        real = Real.load(found, held_out, shape, fit or default_fit(found))
        return cls(extract, features_of, real, str(found))

    @functools.cached_property
    def digest(self) -> str:
        """SHA-256 of what decides a measurement besides the samples."""
        images = self.real.images.numpy().tobytes()
        return hashlib.sha256(images + parts.fingerprint(self.extract.network).encode()).hexdigest()


Earlier = dict[str, dict[int, dict[str, Any]]]


def earlier(sampler: Sampler, out: Path, points: Sequence[Planned], judge: Judge) -> Earlier:
    """What OUT/trilemma.json says of ``points``: by name and by number of images, {"frechet": {"value", ...}, ...}.

    It stands in for images that are not there: those of a point that is whole may be deleted, or lie on the machine
    that drew them. Only what is of the same network, step table, settings and judge holds; nothing else is used.
    """
    path = out / "trilemma.json"
    try:
        last = read_json(path) if path.exists() else {}
        if last.get("model") != fingerprint(sampler.unet.state_dict()) or last["settings"] != settings(sampler, judge):
            return {}
        tables = {p.name: table_digest(sampler, p) for p in points}
        return {
            e["name"]: {last["n"]: e["at_n"], e["n"]: e["at_own_n"]}
            for e in last["points"]
            if e["table"] == tables.get(e["name"])
        }
    except (CheckpointError, AttributeError, KeyError, TypeError) as e:
        log.warning("%s holds no result that can be gone on with (%s: %s)", path, type(e).__name__, e)
        return {}


def settings(sampler: Sampler, judge: Judge) -> dict[str, Any]:
    """What all points of a report have in common, besides the network."""
    return {
        "seed": SEED,
        "labels": None if sampler.info.classes is None else "image i is of class i mod classes",
        "backend": sampler.backend,
        "dtype": "bfloat16-fast" if sampler.fast else str(sampler.dtype).removeprefix("torch."),
        "features": judge.name,
        "real_images": judge.data,
        "judge": judge.digest,
    }


def table_digest(sampler: Sampler, p: Planned) -> str:
    """SHA-256 of the coefficients that a point's images come from."""
    return parts.settings(sampler, seed=SEED, **p.options)["table"]


def images_there(out: Path, p: Planned, n: int, known: Earlier) -> int:
    """How many images of a point count: those in the folder, or more that an earlier report measured, and n of them."""
    counts = known.get(p.name, {})
    return max(drawn(out, p), *(count for count in counts if count <= p.n)) if n in counts else drawn(out, p)


def draw(sampler: Sampler, out: Path, points: Sequence[Planned], batch: int | None, say: Say, known: Earlier) -> None:
    """Draw what the points lack: the first `FEW` images of each, then the others, so that points can soon be compared.

    Those that an earlier report has whole lack nothing. What is to be drawn, and about how long it takes, is said
    before; every finished part after.
    """
    n = min(p.n for p in points)
    todo = [p for p in points if p.same_as is None and images_there(out, p, n, known) < p.n]
    lacking = {p.name: p.n - drawn(out, p) for p in todo}
    evaluations = sum(p.nfe * max(lacking[p.name], 0) for p in todo)
    if not evaluations:
        say(f"nothing is to be drawn for {len(points)} points")
        return
    say(
        f"{len(todo)} of {len(points)} points lack images: {evaluations / 1e6:.3g} million network evaluations, about "
        f"{duration(evaluations / rate(sampler, batch))} here"
    )
    done, started = 0, time.monotonic()
    for most in sorted({min(p.n, FEW) for p in todo} | {p.n for p in todo}):
        for p in todo:
            if min(p.n, most) <= drawn(out, p) or (most > FEW and p.n <= FEW):
                continue
            before = drawn(out, p)

            def progress(there: int, of: int, p: Planned = p, before: int = before, done: int = done) -> None:
                if there <= before:
                    return
                share = (done + p.nfe * (there - before)) / evaluations
                left = (time.monotonic() - started) * (1 - share) / share
                say(f"{p.name}: {there} of {of} images; {share:.0%} of all, {duration(left)} left")

            parts.draw(
                sampler, folder(out, p), min(p.n, most), seed=SEED, progress=progress, batch_size=batch, **p.options
            )
            done += p.nfe * (min(p.n, most) - before)


def drawn(out: Path, p: Planned) -> int:
    """How many images of a point are there, without a gap."""
    try:
        return min(len(parts.load(folder(out, p))), p.n)
    except DataError:
        return 0


def folder(out: Path, p: Planned) -> Path:
    return out / "points" / p.name


def rate(sampler: Sampler, batch: int | None) -> float:
    """Network evaluations a second, roughly: of one short call after another that warms up."""
    n = batch or 16
    labels = None if sampler.info.classes is None else 0
    for _ in range(2):
        started = time.perf_counter()
        sampler.sample(n, steps=2, labels=labels, batch_size=n)
    return 2 * n / (time.perf_counter() - started)


def duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Measurer:
    """Measures points once: results lie beside the images, and hold for the same judge only. known: of `earlier`."""

    def __init__(self, judge: Judge, out: Path, say: Say, known: Earlier) -> None:
        self.judge, self.out, self.say, self.known = judge, out, say, known

    @functools.cached_property
    def reference(self) -> Reference:
        """The real images' features; it takes a minute, and only points that are not measured yet ask for it."""
        return Reference(self.features(self.judge.real.images))

    def features(self, images: Tensor) -> Tensor:
        """Features of uint8 images, kept in OUT/features."""

        def progress(done: int, total: int) -> None:
            if done and not done % 10_000:
                self.say(f"features of {done} of {total} images")

        return evaluation.cached_features(self.judge.extract, images, self.out / "features", progress)

    def point(self, p: Planned, n: int) -> dict[str, Any]:
        """The measurements of a point's first n images: {"frechet": {"value", "low", "high"}, ...}."""
        if n in self.known.get(p.name, {}):
            return self.known[p.name][n]
        return self._once(folder(self.out, p) / "measured.json", n, lambda: parts.load(folder(self.out, p), n))

    def floor(self, n: int) -> dict[str, Any] | None:
        """The same of the first n held-out images: as near as images get, in this number."""
        held_out = self.judge.real.held_out
        if held_out is None or len(held_out) < n:
            return None
        return self._once(self.out / "floor.json", n, lambda: held_out[:n])

    def _once(self, path: Path, n: int, images: Callable[[], Tensor]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        if path.exists():
            try:
                kept = read_json(path)
            except CheckpointError as e:
                log.warning("%s; it is measured anew", e)
        if kept.get("of") != self.judge.digest:
            kept = {"of": self.judge.digest, "n": {}}
        if str(n) not in kept["n"]:
            estimates = measure(self.features(images()), self.reference)
            kept["n"][str(n)] = {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}
            write_text(path, json.dumps(kept, indent=1) + "\n")
        return kept["n"][str(n)]


def result(
    sampler: Sampler,
    out: Path,
    points: Sequence[Planned],
    judge: Judge,
    say: Say,
    *,
    model: str,
    batch: int,
    timed: bool = True,
    peer: bool = False,
    known: Earlier,
) -> dict[str, Any]:
    """The report of the points that are there, written to OUT/trilemma.json.

    Distances are compared at n images, those of the plan's smallest points. A point that neither has n images nor is
    ``known`` at n is missing. timed, peer: whether speeds are timed now; else those of the last result here are kept,
    if this is the same machine. `DataError` where no point is there.
    """
    measurer = Measurer(judge, out, say, known)
    n = min(p.n for p in points)
    counts = {p.name: images_there(out, p, n, known) for p in points}
    counts |= {p.name: counts[p.same_as] for p in points if p.same_as is not None}
    for p in points:
        if p.same_as is None and drawn(out, p):
            parts.check_settings(folder(out, p), parts.settings(sampler, seed=SEED, **p.options))
    there = [p for p in points if counts[p.name] >= n]
    if not there:
        raise DataError(f"{out}: no point has its {n} images yet")
    entries = []
    for p in there:
        source = p if p.same_as is None else next(q for q in points if q.name == p.same_as)
        own = counts[p.name]
        entry: dict[str, Any] = {
            "name": p.name,
            "key": p.key,
            "options": p.options,
            "table": table_digest(sampler, p),
            "nfe": p.nfe,
            "n": own,
            "at_n": measurer.point(source, n),
            "at_own_n": measurer.point(source, own),
            **({} if p.same_as is None else {"same_as": p.same_as}),
        }
        say(f"{p.name}: Frechet {entry['at_n']['frechet']['value']:.3f} at {n} images")
        entries.append(entry)
    report.mark_front(entries)
    # The longest run of ddpm: of all timesteps, where the plan has it.
    whole = max((p for p in points if p.key == "ddpm"), key=lambda p: p.nfe, default=None)
    if whole is not None and whole.same_as is not None:
        whole = next(p for p in points if p.name == whole.same_as)
    found: dict[str, Any] = {
        "format": measured.FORMAT,
        "made_by": f"fastdiff {__version__}, fastdiff trilemma",
        "model_name": model,
        "model": fingerprint(sampler.unet.state_dict()),
        "n": n,
        "settings": settings(sampler, judge),
        "reference": None if whole is None else whole.name,
        "machine": speed.machine(),
        "floor": measurer.floor(n),
        "points": entries,
        "missing": [{"name": p.name, "images": counts[p.name], "of": p.n} for p in points if counts[p.name] < p.n],
        "nearest": _nearest(measurer, entries, there, whole, counts, n),
    }
    lines, other = _kept_speeds(out / "trilemma.json", found["machine"])
    if timed:
        say("timing the settings in turn; nothing else should run now")
        lines = speed.speeds(sampler, [p for p in there if p.same_as is None], batch)
    keys = {p.name: p.key for p in there}
    for p, entry in zip(there, entries, strict=True):
        line = lines.get(p.key if p.same_as is None else keys[p.same_as])
        if line is not None:
            entry["images_per_s"] = line.images_per_s(p.nfe // 2 if p.guided else p.nfe)
    if lines:
        found["speed"] = {key: dataclasses.asdict(line) for key, line in lines.items()}
        spread = max(line.spread for line in lines.values())
        found["too_noisy"] = spread > speed.NOISE
        if found["too_noisy"]:
            say(f"the machine was too noisy to time: the rounds of a setting spread by up to {spread:.0%}")
    if peer:
        say("timing diffusers' loop")
        other = speed.peer(sampler)
    if other is not None:
        found["peer"] = against(other, entries, found["nearest"])
    write_text(out / "trilemma.json", json.dumps(found, indent=1) + "\n")
    return found


def _kept_speeds(path: Path, machine: dict[str, Any]) -> tuple[dict[str, speed.Speed], dict[str, Any] | None]:
    """The speeds and the peer of the last result, if they are of this machine and these versions."""
    try:
        last = read_json(path) if path.exists() else {}
        if last.get("machine") != machine:
            return {}, None
        return {key: speed.Speed(**line) for key, line in last.get("speed", {}).items()}, last.get("peer")
    except (CheckpointError, AttributeError, TypeError):
        return {}, None  # damaged: it is written anew


def _nearest(
    measurer: Measurer,
    entries: Sequence[dict[str, Any]],
    there: Sequence[Planned],
    whole: Planned | None,
    counts: dict[str, int],
    n: int,
) -> dict[str, Any] | None:
    """`report.nearest`, at as many images as the reference has, if those are fewer than n."""
    if whole is None or counts[whole.name] < min(n, MIN_REFERENCE):
        return None
    n = min(n, counts[whole.name])
    goal = measurer.point(whole, n)["frechet"]
    distances = {
        p.name: measurer.point(p, n)["frechet"]
        for p in there
        if p.nfe <= report.MOST and p.same_as is None and p.name != whole.name
    }
    plain = {p.name for p in there if not p.guided}
    nfes = {e["name"]: e["nfe"] for e in entries}
    return {"reference": whole.name, "n": n, **report.nearest(goal, distances, nfes, plain)}


def against(other: dict[str, Any], entries: Sequence[dict[str, Any]], nearest: dict[str, Any] | None) -> dict[str, Any]:
    """The peer with the ratios: images/s of the shortest points within 10 % of the reference's distance, over its."""
    ratios = {}
    for what in ("any", "plain"):
        chosen = nearest and nearest[what] and nearest[what]["shortest_within"]
        if chosen:
            entry = next(e for e in entries if e["name"] == chosen["name"])
            if "images_per_s" in entry:
                ratios[chosen["name"]] = entry["images_per_s"] / other["images_per_s"]
    return {**other, "ratios": ratios}


def install(found: dict[str, Any], sampler: Sampler) -> Path:
    """Write what `Sampler.sample` goes by into the sampler's model folder; `InvalidArgument` where it has none."""
    path = sampler.measurements_file
    if path is None:
        raise InvalidArgument("--install: the model is no folder, so measurements cannot be kept with it")
    brief = report.for_model(found)
    points = ",\n  ".join(json.dumps(point) for point in brief.pop("points"))  # a line each
    head = json.dumps(brief, indent=1).rstrip("\n}")
    write_text(path, f'{head},\n "points": [\n  {points}\n ]\n}}\n')
    return path
