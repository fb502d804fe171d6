"""``fastdiff eval``: measure a model's samples, or images from elsewhere, against real images.

    report = evaluate("fashion-mnist", n=5000, options={"solver": "unipc", "steps": 10}, out="out/eval")
    print(table(report))

Everything slow is kept in ``out`` as soon as it is finished: generated images in parts
(`fastdiff.evaluation.image_store`), features under the SHA-256 of the images and of the network. So an interrupted run
goes on where it stopped, another setting costs only its own images, and nothing has to be deleted when a model changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastdiff.bulk.loading import is_job
from fastdiff.checkpoints.reading import network_digest, read_json, read_safetensors
from fastdiff.checkpoints.saving import write_safetensors
from fastdiff.data.summary import data_lines, duration, line
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import image_store, random_features
from fastdiff.evaluation.classifier import CLASS_NAMES, SIZE, Classifier
from fastdiff.evaluation.metrics import Extractor, Reference, features, measure, share_interval, thinned
from fastdiff.evaluation.reference_images import (
    DATA,
    MIN_IMAGES,
    Loaded,
    RealImages,
    Shape,
    default_fit,
    find_data,
    load_images,
)
from fastdiff.files import atomic_file, write_text
from fastdiff.modes import plain_modes
from fastdiff.sampler import Sampler
from fastdiff.sampler.runners import usable_device

log = logging.getLogger("fastdiff")

DRAWN = 5000  # images of a model, by default
CHUNK = 1000  # images whose features are stored in one file

Progress = Callable[[str, int, int], None]


def evaluate(
    model: str | Path = "fashion-mnist",
    *,
    samples: str | Path | None = None,
    n: int | None = None,
    data: str | Path | None = None,
    held_out: str | Path | None = None,
    fit: str | None = None,
    features_of: str | Path = "fashion-mnist",
    out: str | Path = "out/eval",
    backend: str = "auto",
    device: str | None = None,
    dtype: str | None = None,
    options: dict[str, Any] | None = None,
    data_options: Mapping[str, Any] | None = None,
    labels_of: str | Path | None = None,
    progress: Progress | None = None,
    announce: Callable[[dict[str, Any]], None] | None = None,
) -> dict[str, Any]:
    """Measure a model's samples, or other images, against real images.

    Finished images and features are kept in ``out``, so that an interrupted call can be repeated at little cost.

    Args:
        model: A model, as `Sampler.from_pretrained` takes it.
        samples: Images to judge in place of the model's: an .npz, a folder of pictures or of parts, an IDX file, or a
            folder of `fastdiff.bulk.generate`, finished or, with ``n``, finished up to image n - 1.
        n: The number of images, at least 20; None means 5,000, or all of ``samples``.
        data: Real images, as `fastdiff.data.load_data` takes them, a folder of `fastdiff.bulk.generate`, or a folder
            with MNIST's four files, which also has held-out images; None means the training images of the built-in
            model, if Debian's package has installed them.
        held_out: Real images that the model was not trained on, whose scores are reported beside the model's.
        fit: "crop" or "pad" real images to the size of the judged ones; None pads MNIST's files and crops others.
        features_of: The network whose features are compared, as `features` takes it.
        out: The folder for images, features and ``report.json``.
        backend: As `Sampler.from_pretrained` takes it.
        device: As `Sampler.from_pretrained` takes it.
        dtype: As `Sampler.from_pretrained` takes it.
        options: Options of `Sampler.sample`; ``labels`` may also be "cycle", the default: the classes take turns.
        data_options: Options of `fastdiff.data.load_data` for samples and real images: ``value_range``, ``frames``,
            ``alpha``, ``profile``, ``layout`` and ``channels``.
        labels_of: The same as ``features_of``, to say that images and labels which do not name their classes are of
            the classifier's data set.
        progress: Called with what is being done, how much of it is done, and how much there is.
        announce: Called before the work with a summary, ready for JSON, of what will be judged, by what and against
            what, with "warnings" and the predicted "seconds" of drawing (None where they cannot be predicted).

    Returns:
        The report, ready for JSON, as written to ``out/report.json``. Its "metrics" and "held_out" have the keys
        "frechet", "kernel", "precision" and "recall", each a dictionary of "value", "low" and "high"; "accuracy" is the
        share of images that the classifier assigns to their class, if their classes are known to be the classifier's.

    Raises:
        CheckpointError: If the model or the weights of the features cannot be read.
        JobError: If a folder of `fastdiff.bulk.generate` is unfinished or damaged.
        DataError: If images are missing or cannot be read.
        InvalidArgument: If an argument is wrong or does not fit another.
    """
    say = progress or (lambda what, done, total: None)
    out, options = Path(out), dict(options or {})
    if n is not None and n < MIN_IMAGES:
        raise InvalidArgument(f"n={n}: at least {MIN_IMAGES} images are needed")
    data = find_data(data, model if samples is None else None)
    fit = fit or default_fit(data)
    extract = features(features_of, usable_device(device))
    judge = Judge.of(extract, str(features_of), labels_of)
    summary: dict[str, Any] = {"judge": judge.described, "warnings": []}
    seconds = None
    if samples is None:
        sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
        settings = image_store.settings(sampler, **options)
        channels, height, width = settings["shape"]
        check_shape(extract, str(features_of), str(model), (channels, height, width))
        real = RealImages.load(data, held_out, (channels, height, width), fit, data_options)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        folder = out / f"{settings['solver']}-{settings['nfe']}-{digest}"
        n = n or DRAWN
        known = judge.knows(sampler.info.class_names, sampler.info.classes)
        cycle = settings["labels"] == "cycle" and sampler.info.classes == len(CLASS_NAMES) and known
        labels = torch.arange(n, dtype=torch.int64, device="cpu") % len(CLASS_NAMES) if cycle else None
        source: dict[str, Any] = {"model": str(model), "settings": settings, "images": str(folder)}
        summary |= {"model": _described(sampler, str(model), settings, n)}
        seconds = None if announce is None else image_store.expected_seconds(sampler, n, **options)
    else:
        loaded = _samples(Path(samples), None if judge.network is None else (1, SIZE, SIZE), fit, data_options, n)
        images, labels = loaded.images, loaded.labels
        if len(images) < (n or MIN_IMAGES):
            raise DataError(f"{samples} holds {len(images)} images, {n or MIN_IMAGES} are needed")
        known = judge.knows(loaded.class_names, None if labels is None else int(labels.max()) + 1)
        images, labels = images[:n], labels[:n] if labels is not None and known else None
        real = RealImages.load(data, held_out, (images.shape[1], images.shape[2], images.shape[3]), fit, data_options)
        source = {"samples": str(samples)}
        summary |= {"samples": {**loaded.described, "classes": None}}
    if judge.network is not None and not known:
        summary["warnings"].append(judge.doubt(str(model if samples is None else samples)))
    if not (known or data == DATA):
        real = dataclasses.replace(real, labels=None)
    summary |= dict(zip(("real", "held_out"), real.described, strict=False))
    for what in ("samples", "real", "held_out"):
        summary["warnings"] += [f"{summary[what]['path']}: {d}" for d in summary.get(what, {}).pop("warnings", ())]
    summary["device"] = str(extract.device)
    if announce is not None:
        announce({**summary, "seconds": seconds})
    if samples is None:
        images = image_store.draw(
            sampler, folder, n or DRAWN, progress=lambda done, total: say("images", done, total), **options
        )
    scores = _scores(extract, images, labels, real, out, say)
    report = {**source, "features": str(features_of), "data": str(data), **scores, "summary": summary}
    summary["warnings"] += _misread(scores["held_out"])
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


@dataclasses.dataclass(frozen=True)
class Judge:
    """The network whose features are compared, and whose classes an accuracy is of."""

    name: str
    network: Classifier | None  # None for Inception and random features, which have no classes of the images
    accepted: bool  # whether the caller says that images without names of classes are of its data set

    @classmethod
    def of(cls, extract: Extractor, name: str, labels_of: str | Path | None) -> Judge:
        """Check the judge; ``labels_of`` is the caller's."""
        network = extract.network if isinstance(extract.network, Classifier) else None
        if labels_of is not None and (network is None or str(labels_of) != name):
            kind = "has no classes" if network is None else "judges its own classes alone"
            raise InvalidArgument(f"labels_of={str(labels_of)!r}: features_of={name!r} {kind}")
        return cls(name, network, labels_of is not None)

    @property
    def described(self) -> dict[str, Any]:
        """A description, for JSON."""
        if self.network is None:
            random = self.name == random_features.NAME
            network = "a network of random weights, which sees textures and colours," if random else "Inception-v3,"
            return {"features": self.name, "kind": f"{network} for images of any size and colour", "classes": None}
        kind = f"a classifier of Fashion-MNIST, for gray images of {SIZE}x{SIZE}"
        return {"features": self.name, "kind": kind, "classes": list(self.network.class_names)}

    def knows(self, names: tuple[str, ...] | None, classes: int | None) -> bool:
        """Return whether classes of these names, or without names and so many, are those of the judge."""
        if self.network is None:
            return False
        if names is not None:
            return names == self.network.class_names
        return self.accepted and (classes or 0) <= len(self.network.class_names)

    def doubt(self, what: str) -> str:
        """Say that nothing shows that the judge fits the images of ``what``."""
        return (
            f"nothing says that {what} is of the judge's data set, Fashion-MNIST: there is no class accuracy, and "
            f'distances by features of clothes mean little for other images; labels_of="{self.name}" says that it is, '
            'features_of="random" fits any images, and features_of= takes the weights of Inception'
        )


def _described(sampler: Sampler, model: str, settings: dict[str, Any], n: int) -> dict[str, Any]:
    """Describe a model and what will be drawn from it, for JSON."""
    names = sampler.info.class_names
    return {
        "path": model,
        "parameters": sum(p.numel() for p in sampler.unet.parameters()),
        "classes": sampler.info.classes,
        "class_names": names and list(names),
        "images": n,
        "shape": settings["shape"],
        "solver": settings["solver"],
        "nfe": settings["nfe"],
        "backend": settings["backend"],
        "dtype": settings["dtype"],
        "device": str(sampler.device),
    }


def _misread(held_out: dict[str, Any] | None) -> list[str]:
    """Return a warning if the classifier reads less than half of the held-out images as their class."""
    read = None if held_out is None else held_out["accuracy"]
    if read is None or read["value"] >= 0.5:
        return []
    text = f"the judge reads {read['value']:.0%} of the held-out images as their class: they may be of another data set"
    log.warning("%s", text)
    return [text]


def summary_lines(summary: dict[str, Any]) -> list[str]:
    """Format the summary that `evaluate` announces, for people, without its warnings."""
    judge, lines = summary["judge"], []
    if "model" in summary:
        m, seconds = summary["model"], summary["seconds"]
        names = "" if m["class_names"] is None else f": {', '.join(m['class_names'][:20])}"
        classes = "no classes" if m["classes"] is None else f"{m['classes']} classes{names}"
        lines += [
            line("model", f"{m['path']}: {m['parameters']:,} parameters, {classes}"),
            line("images", f"{m['images']} of {m['shape']}, {m['solver']}, {m['nfe']} network evaluations each"),
            line("device", f"{m['device']}, {m['backend']}, {m['dtype']}; features on {summary['device']}"),
            line("time", f"{duration(seconds)} to draw" if seconds is not None else "not predicted for this backend"),
        ]
    else:
        lines += [*data_lines("samples", summary["samples"]), line("device", summary["device"])]
    lines += data_lines("real", summary["real"])
    lines += data_lines("held out", summary["held_out"]) if "held_out" in summary else []
    classes = "" if judge["classes"] is None else f": {', '.join(judge['classes'])}"
    return [*lines, line("judge", f"{judge['features']}: {judge['kind']}{classes}")]


def check_shape(extract: Extractor, features_of: str, model: str, shape: Shape) -> None:
    """Refuse images of a shape that the network of the features does not take: the classifier needs 1x32x32."""
    if isinstance(extract.network, Classifier) and shape != (1, SIZE, SIZE):
        raise InvalidArgument(
            f"{features_of} judges images of 1x{SIZE}x{SIZE}, those of {model} are {'x'.join(map(str, shape))}; "
            "give the weights of Inception as --features, or --features random"
        )


def _scores(
    extract: Extractor, images: Tensor, labels: Tensor | None, real: RealImages, out: Path, say: Progress
) -> dict[str, Any]:
    """Measure images, and held-out images in the same number if there are any."""

    def extracted(what: str, images: Tensor) -> Tensor:
        return cached_features(extract, images, out / "features", lambda done, total: say(what, done, total))

    def scores(features: Tensor, labels: Tensor | None) -> dict[str, Any]:
        return {
            "n": len(features),
            "metrics": {name: dataclasses.asdict(estimate) for name, estimate in measure(features, reference).items()},
            "accuracy": _accuracy(extract.network, features, labels),
        }

    reference = Reference(extracted("features of the real images", real.images))
    generated = extracted("features of the images", images)
    say("distances", 0, 1)
    found = {"real_images": len(real.images), **scores(generated, labels), "held_out": None}
    if real.held_out is not None:
        other = extracted("features of the held-out images", real.held_out)
        classes = None if real.labels is None else thinned(real.labels, len(images))
        found["held_out"] = scores(thinned(other, len(images)), classes)
    return found


def table(report: dict[str, Any]) -> str:
    """Format a report for people.

    Args:
        report: The result of `evaluate`.

    Returns:
        A line for each score, beside that of held-out real images if there are any.
    """
    held_out = report["held_out"]
    lines = [f"{'':20}{'n = ' + str(report['n']):>38}"]
    if held_out:
        lines[0] += f"{'held-out real, n = ' + str(held_out['n']):>38}"
    for name, title in (
        ("frechet", "Frechet distance"),
        ("kernel", "kernel distance"),
        ("precision", "precision"),
        ("recall", "recall"),
        ("accuracy", "class accuracy"),
    ):
        line = f"{title:20}"
        for column in [report, *([held_out] if held_out else [])]:
            value = column["accuracy"] if name == "accuracy" else column["metrics"][name]
            line += f"{'-' if value is None else _text(value):>38}"
        if name != "accuracy" or report["accuracy"] is not None:
            lines.append(line)
    lines += [
        "",
        f"against {report['real_images']} real images of {report['data']}, by the features of {report['features']};",
        "in brackets 95 % intervals, of other images in the same number. Compare Frechet distances at equal n only.",
    ]
    return "\n".join(lines)


def progress_on_stderr(seconds: float = 5.0) -> Progress:
    """Return a progress function that prints a line at the start and the end of a task and every few seconds."""
    last = 0.0

    def show(what: str, done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if done in (0, total) or now - last >= seconds:
            last = now
            count = f": {done} of {total}" if total > 1 else ""
            print(f"{time.strftime('%H:%M:%S')} {what}{count}", file=sys.stderr, flush=True)

    return show


def cached_features(extract: Extractor, images: Tensor, folder: Path, progress: Callable[[int, int], None]) -> Tensor:
    """Return features [N, F] of images, uint8 [N, C, H, W], from files named by the SHA-256 of images and network.

    Features that are in no file are computed and stored.
    """
    network = network_digest(extract.network)
    found: list[Tensor] = []
    progress(0, len(images))
    for start in range(0, len(images), CHUNK):
        chunk = images[start : start + CHUNK].contiguous()
        digest = hashlib.sha256(f"{network} {list(chunk.shape)}\n".encode())
        digest.update(chunk.numpy().data)
        path = folder / f"{digest.hexdigest()}.safetensors"
        stored = _stored_features(path, len(chunk))
        if stored is None:
            stored = extract(chunk.float() / 127.5 - 1.0)
            with atomic_file(path) as file:
                write_safetensors(file, {"features": stored}, {})
        found.append(stored)
        progress(min(start + CHUNK, len(images)), len(images))
    return torch.cat(found)


def _stored_features(path: Path, n: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        tensors, _ = read_safetensors(path)
    except CheckpointError:  # the file is damaged and will be written again
        return None
    stored = tensors.get("features")
    fits = stored is not None and stored.dtype == torch.float32 and stored.ndim == 2 and len(stored) == n
    return stored if fits else None


def _samples(
    path: Path, shape: Shape | None, fit: str, options: Mapping[str, Any] | None, n: int | None = None
) -> Loaded:
    """Load images to judge and their labels, which an .npz and parts whose classes take turns have."""
    if not is_job(path) and (path / "000000.npz").is_file():
        images = image_store.load(path)
        settings = read_json(path / image_store.SETTINGS) if (path / image_store.SETTINGS).is_file() else {}
        if shape is not None and tuple(images.shape[1:]) != shape:
            raise InvalidArgument(f"{path}: images of {list(images.shape[1:])}, {list(shape)} are needed")
        n, channels, height, width = images.shape
        described = {"path": str(path), "images": n, "size": [height, width], "channels": channels, "values": [],
                     "facts": [], "skipped": 0, "skipped_files": []}  # fmt: skip
        cycle = settings.get("labels") == "cycle"
        labels = torch.arange(n, dtype=torch.int64, device="cpu") % len(CLASS_NAMES) if cycle else None
        return Loaded(images, labels, None, described)
    return load_images(path, shape, fit, options=options, labelled=True, n=n)


def _accuracy(judge: nn.Module, features: Tensor, labels: Tensor | None) -> dict[str, float] | None:
    """Compute the share of images that the classifier assigns to their label, with its interval."""
    if not isinstance(judge, Classifier) or labels is None:
        return None
    with plain_modes():
        predicted = judge.head(features.to(judge.head.weight.device)).argmax(1).cpu()
    return dataclasses.asdict(share_interval(predicted == labels))


def _text(value: dict[str, float]) -> str:
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
