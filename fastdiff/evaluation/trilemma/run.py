"""Drawing and measuring the points; what is finished is kept and not repeated."""

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
from fastdiff.bench import machine
from fastdiff.checkpoints.reading import network_digest, read_json, weights_digest
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import image_store
from fastdiff.evaluation.metrics import Extractor, Reference, features, measure
from fastdiff.evaluation.reference_images import RealImages, default_fit, find_data
from fastdiff.evaluation.scoring import cached_features, check_shape
from fastdiff.evaluation.trilemma import report, speed
from fastdiff.evaluation.trilemma.grid import FEW, Planned
from fastdiff.files import write_text
from fastdiff.sampler import Sampler, measured
from fastdiff.sampler.request import image_size

log = logging.getLogger("fastdiff")

Say = Callable[[str], None]
SEED = 0
MIN_REFERENCE = 500  # the least number of images for which points are compared with the reference


@dataclasses.dataclass(frozen=True)
class Judge:
    """The features and the real images that samples are measured by."""

    extract: Extractor
    name: str  # of the features, for the report
    real: RealImages
    data: str  # where the real images are from, for the report

    @classmethod
    def of(
        cls, sampler: Sampler, model: str, data: Path | None, held_out: Path | None, fit: str | None, features_of: str
    ) -> Judge:
        """Load features and real images; arguments and errors are those of `fastdiff.evaluation.evaluate`."""
        found = find_data(data, model)
        extract = features(features_of, sampler.device)
        height, width = image_size(1, None, sampler.info)
        shape = (sampler.info.channels, height, width)
        check_shape(extract, features_of, model, shape)
        real = RealImages.load(found, held_out, shape, fit or default_fit(found))
        return cls(extract, features_of, real, str(found))

    @functools.cached_property
    def digest(self) -> str:
        """The SHA-256 of the real images and the features' network, which measurements depend on."""
        images = self.real.images.numpy().tobytes()
        return hashlib.sha256(images + network_digest(self.extract.network).encode()).hexdigest()


Earlier = dict[str, dict[int, dict[str, Any]]]  # by name and n: {"frechet": {"value", "low", "high"}, ...}


def earlier(sampler: Sampler, out: Path, points: Sequence[Planned], judge: Judge) -> Earlier:
    """Read the measurements of ``points`` in OUT/trilemma.json, so that their images need not be there any more.

    Only measurements with the same network, step table, settings and judge are used. The result has them by name and by
    number of images.
    """
    path = out / "trilemma.json"
    try:
        last = read_json(path) if path.exists() else {}
        same_model = last.get("model") == weights_digest(sampler.unet.state_dict())
        if not same_model or last["settings"] != settings(sampler, judge):
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
    """Collect what all points of a report have in common besides the network."""
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
    """Return the SHA-256 of a point's step table."""
    return image_store.settings(sampler, seed=SEED, **p.options)["table"]


def images_there(out: Path, p: Planned, n: int, known: Earlier) -> int:
    """Count a point's images: those in its folder, or more if an earlier report has measured them and n of them."""
    counts = known.get(p.name, {})
    return max(drawn(out, p), *(count for count in counts if count <= p.n)) if n in counts else drawn(out, p)


def draw(sampler: Sampler, out: Path, points: Sequence[Planned], batch: int | None, say: Say, known: Earlier) -> None:
    """Draw the images that the points lack, first up to `FEW` of each, so that points can soon be compared.

    Points whose images an earlier report has measured lack nothing. ``say`` is called with the amount of work and an
    estimate of its time at the start, and after every finished part.
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

            image_store.draw(
                sampler, folder(out, p), min(p.n, most), seed=SEED, progress=progress, batch_size=batch, **p.options
            )
            done += p.nfe * (min(p.n, most) - before)


def drawn(out: Path, p: Planned) -> int:
    """Count the images in a point's folder up to the first gap."""
    try:
        return min(len(image_store.load(folder(out, p))), p.n)
    except DataError:
        return 0


def folder(out: Path, p: Planned) -> Path:
    return out / "points" / p.name


def rate(sampler: Sampler, batch: int | None) -> float:
    """Estimate network evaluations per second from one short call after another that warms up."""
    n = batch or 16
    labels = None if sampler.info.classes is None else 0
    for _ in range(2):
        started = time.perf_counter()
        sampler.sample(n, steps=2, labels=labels, batch_size=n)
    return 2 * n / (time.perf_counter() - started)


def duration(seconds: float) -> str:
    """Format a time in s, min or h."""
    minutes = round(seconds / 60)
    return f"{seconds:.0f} s" if seconds < 90 else f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"


class Measurer:
    """Measures points and keeps the results beside their images, where they are valid for the same judge.

    ``known`` is the result of `earlier`.
    """

    def __init__(self, judge: Judge, out: Path, say: Say, known: Earlier) -> None:
        self.judge, self.out, self.say, self.known = judge, out, say, known

    @functools.cached_property
    def reference(self) -> Reference:
        """The features of the real images, computed when the first point is measured, as this may take a minute."""
        return Reference(self.features(self.judge.real.images))

    def features(self, images: Tensor) -> Tensor:
        """Compute the features of uint8 images, or read them from OUT/features."""

        def progress(done: int, total: int) -> None:
            if done and not done % 10_000:
                self.say(f"features of {done} of {total} images")

        return cached_features(self.judge.extract, images, self.out / "features", progress)

    def point(self, p: Planned, n: int) -> dict[str, Any]:
        """Measure a point's first n images: {"frechet": {"value", "low", "high"}, ...}."""
        if n in self.known.get(p.name, {}):
            return self.known[p.name][n]
        return self._once(folder(self.out, p) / "measured.json", n, lambda: image_store.load(folder(self.out, p), n))

    def floor(self, n: int) -> dict[str, Any] | None:
        """Measure the first n held-out images, which have the distance of perfect samples; None if there are fewer."""
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
    """Make the report of the points that are there and write it to OUT/trilemma.json.

    Distances are compared at n images, the number of the plan's smallest points. A point that neither has n images nor
    is ``known`` at n (see `earlier`) is listed as missing. ``timed`` times the settings in calls of ``batch`` images,
    ``peer`` diffusers' loop; speeds that are not timed are those of the last report, if the machine is the same.
    """
    measurer = Measurer(judge, out, say, known)
    n = min(p.n for p in points)
    counts = {p.name: images_there(out, p, n, known) for p in points}
    counts |= {p.name: counts[p.same_as] for p in points if p.same_as is not None}
    for p in points:
        if p.same_as is None and drawn(out, p):
            image_store.check_settings(folder(out, p), image_store.settings(sampler, seed=SEED, **p.options))
    there = [p for p in points if counts[p.name] >= n]
    if not there:
        raise DataError(f"{out}: no point has its {n} images yet")
    entries = [_entry(measurer, sampler, p, points, n, counts[p.name]) for p in there]
    report.mark_front(entries)
    whole = _reference(points)
    found: dict[str, Any] = {
        "format": measured.FORMAT,
        "made_by": f"fastdiff {__version__}, fastdiff trilemma",
        "model_name": model,
        "model": weights_digest(sampler.unet.state_dict()),
        "n": n,
        "settings": settings(sampler, judge),
        "reference": None if whole is None else whole.name,
        "machine": machine.header(str(sampler.device), ("fastdiff", "torch")),
        "floor": measurer.floor(n),
        "points": entries,
        "missing": [{"name": p.name, "images": counts[p.name], "of": p.n} for p in points if counts[p.name] < p.n],
        "nearest": _nearest(measurer, entries, there, whole, counts, n),
    }
    lines, other = _kept_speeds(out / "trilemma.json", found["machine"])
    if timed:
        say("timing the settings in turn; nothing else should run now")
        lines = speed.speeds(sampler, [p for p in there if p.same_as is None], batch)
    _add_speeds(found, there, lines, say)
    if peer:
        say("timing diffusers' loop")
        other = speed.peer(sampler)
    if other is not None:
        found["peer"] = against(other, entries, found["nearest"])
    write_text(out / "trilemma.json", json.dumps(found, indent=1) + "\n")
    return found


def _entry(
    measurer: Measurer, sampler: Sampler, p: Planned, points: Sequence[Planned], n: int, own: int
) -> dict[str, Any]:
    """Measure a point at n images and at its own number of images."""
    source = p if p.same_as is None else next(q for q in points if q.name == p.same_as)
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
    measurer.say(f"{p.name}: Frechet {entry['at_n']['frechet']['value']:.3f} at {n} images")
    return entry


def _reference(points: Sequence[Planned]) -> Planned | None:
    """Return the longest run of ddpm, which takes all timesteps if the plan is the usual one; None without ddpm."""
    longest = max((p for p in points if p.key == "ddpm"), key=lambda p: p.nfe, default=None)
    if longest is None or longest.same_as is None:
        return longest
    return next(p for p in points if p.name == longest.same_as)


def _add_speeds(found: dict[str, Any], there: Sequence[Planned], lines: dict[str, speed.Speed], say: Say) -> None:
    """Add the speeds of the settings, and the images/s of every point, to a report."""
    keys = {p.name: p.key for p in there}
    for p, entry in zip(there, found["points"], strict=True):
        line = lines.get(p.key if p.same_as is None else keys[p.same_as])
        if line is not None:
            entry["images_per_s"] = line.images_per_s(p.nfe // 2 if p.guided else p.nfe)
    if lines:
        found["speed"] = {key: dataclasses.asdict(line) for key, line in lines.items()}
        spread = max(line.spread for line in lines.values())
        found["too_noisy"] = spread > speed.NOISE
        if found["too_noisy"]:
            say(f"the machine was too noisy to time: the rounds of a setting spread by up to {spread:.0%}")


def _kept_speeds(path: Path, header: dict[str, Any]) -> tuple[dict[str, speed.Speed], dict[str, Any] | None]:
    """Read the speeds and the peer of the last report if they are of this machine and these versions."""
    try:
        last = read_json(path) if path.exists() else {}
        if not last.get("machine") or machine.differences(header, last["machine"]):
            return {}, None
        return {key: speed.Speed(**line) for key, line in last.get("speed", {}).items()}, last.get("peer")
    except (CheckpointError, AttributeError, TypeError):
        return {}, None  # the file is damaged and will be written again


def _nearest(
    measurer: Measurer,
    entries: Sequence[dict[str, Any]],
    there: Sequence[Planned],
    whole: Planned | None,
    counts: dict[str, int],
    n: int,
) -> dict[str, Any] | None:
    """Apply `report.nearest` at n images, or at the reference's number of images if that is smaller."""
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
    """Add to the peer the ratios of images/s of the shortest points within 10 % of the reference's distance."""
    ratios = {}
    for what in ("any", "plain"):
        chosen = nearest and nearest[what] and nearest[what]["shortest_within"]
        if chosen:
            entry = next(e for e in entries if e["name"] == chosen["name"])
            if "images_per_s" in entry:
                ratios[chosen["name"]] = entry["images_per_s"] / other["images_per_s"]
    return {**other, "ratios": ratios}


def install(found: dict[str, Any], sampler: Sampler) -> Path:
    """Write the measurements that `Sampler.sample` uses into the model's folder, and return the file."""
    path = sampler.measurements_file
    if path is None:
        raise InvalidArgument("--install: the model is no folder, so measurements cannot be kept with it")
    brief = report.for_model(found)
    points = ",\n  ".join(json.dumps(point) for point in brief.pop("points"))  # one line for each point
    head = json.dumps(brief, indent=1).rstrip("\n}")
    write_text(path, f'{head},\n "points": [\n  {points}\n ]\n}}\n')
    return path
