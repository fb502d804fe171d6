"""``fastdiff eval``: how good are a model's samples, or images from elsewhere, against real images?

    report = evaluate("fashion-mnist", n=5000, options={"solver": "unipc", "steps": 10}, out="out/eval")
    print(table(report))

Everything slow is kept in ``out`` as it is finished and found again by content, so an interrupted run goes on where it
stopped, and another setting pays for its own images only: generated images in parts
(`fastdiff.evaluation.image_store`), features by the SHA-256 of the images and of the network that made them. Nothing
there has to be deleted when a model changes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fastdiff.checkpoints.reading import read_json, read_safetensors
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import image_store as parts
from fastdiff.evaluation.classifier import CLASS_NAMES, SIZE, Classifier
from fastdiff.evaluation.metrics import Estimate, Extractor, Reference, features, measure, share_interval, thinned
from fastdiff.evaluation.reference_images import MIN_IMAGES, Real, Shape, default_fit, find_data, load_images
from fastdiff.files import atomic_path, write_text
from fastdiff.sampler import Sampler
from fastdiff.sampler.sampler import usable_device

CHUNK = 1000  # images whose features are kept together

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """The report, JSON-ready; it is also written to ``out/report.json``.

    model, backend, device, dtype, options: as `Sampler.from_pretrained` and `parts.draw` take them. samples: images to
    judge in the model's place: an .npz, a folder of pictures or of parts, or an IDX file. n: how many (5,000, or all).
    data, held_out: real images, as `load_data` takes them, or a folder with MNIST's four files, which has both; None:
    the data that the built-in model was trained on, where Debian's package has installed them. fit: "crop" or "pad"
    (None: pad MNIST's files, else crop) to the size of what is judged. features_of: see `quality.features`.
    progress: called with (what, done, of all).

    Raises `DataError`, `CheckpointError` and `InvalidArgument` for what is missing or does not fit, before anything
    heavy runs.
    """
    say = progress or (lambda what, done, total: None)
    out, options = Path(out), dict(options or {})
    if n is not None and n < MIN_IMAGES:
        raise InvalidArgument(f"n={n}: at least {MIN_IMAGES} images are needed")
    data = find_data(data, model if samples is None else None)
    fit = fit or default_fit(data)
    extract = features(features_of, usable_device(device))
    judge = extract.network if isinstance(extract.network, Classifier) else None
    shape = None if judge is None else (1, SIZE, SIZE)

    labels = None
    if samples is None:
        sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
        settings = parts.settings(sampler, **options)
        channels, height, width = settings["shape"]
        own = (channels, height, width)
        if shape not in (None, own):
            raise InvalidArgument(
                f"{features_of} judges images of 1x{SIZE}x{SIZE}, those of {model} are "
                f"{'x'.join(map(str, own))}; give the weights of Inception as --features"
            )
        n = n or 5000
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        folder = out / f"{settings['solver']}-{settings['nfe']}-{digest}"
        real = Real.load(data, held_out, own, fit)
        images = parts.draw(sampler, folder, n, progress=lambda done, total: say("images", done, total), **options)
        if judge is not None and settings["labels"] == "cycle" and sampler.info.classes == len(CLASS_NAMES):
            labels = torch.arange(n) % len(CLASS_NAMES)
        source: dict[str, Any] = {"model": str(model), "settings": settings, "images": str(folder)}
    else:
        images, labels = _samples(Path(samples), shape, fit)
        if len(images) < (n or MIN_IMAGES):
            raise DataError(f"{samples} holds {len(images)} images, {n or MIN_IMAGES} are needed")
        images, labels = images[:n], None if labels is None or judge is None else labels[:n]
        real = Real.load(data, held_out, (images.shape[1], images.shape[2], images.shape[3]), fit)
        source = {"samples": str(samples)}

    def extracted(what: str, images: Tensor) -> Tensor:
        return cached_features(extract, images, out / "features", lambda done, total: say(what, done, total))

    reference = Reference(extracted("features of the real images", real.images))
    generated = extracted("features of the images", images)
    say("distances", 0, 1)
    report: dict[str, Any] = {
        **source,
        "features": str(features_of),
        "data": str(data),
        "real_images": len(real.images),
        "n": len(images),
        "metrics": _as_dicts(measure(generated, reference)),
        "accuracy": _accuracy(judge, generated, labels),
        "held_out": None,
    }
    if real.held_out is not None:
        other = extracted("features of the held-out images", real.held_out)
        fair = thinned(other, len(images))
        classes = None if real.labels is None else thinned(real.labels, len(images))
        report["held_out"] = {
            "n": len(fair),
            "metrics": _as_dicts(measure(fair, reference)),
            "accuracy": _accuracy(judge, fair, classes),
        }
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def table(report: dict[str, Any]) -> str:
    """The report for people: a line per number, beside that of held-out real images."""
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
    """Lines on standard error: one as a thing begins and ends, and one in every so many seconds."""
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
    """Features [N, F] of uint8 [N, C, H, W], `CHUNK` images a file named by the SHA-256 of images and network."""
    network = parts.fingerprint(extract.network)
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
            with atomic_path(path) as temporary:
                save_file({"features": stored}, temporary)
        found.append(stored)
        progress(min(start + CHUNK, len(images)), len(images))
    return torch.cat(found)


def _stored_features(path: Path, n: int) -> Tensor | None:
    if not path.exists():
        return None
    try:
        tensors, _ = read_safetensors(path)
    except CheckpointError:  # damaged: it is written anew
        return None
    stored = tensors.get("features")
    fits = stored is not None and stored.dtype == torch.float32 and stored.ndim == 2 and len(stored) == n
    return stored if fits else None


def _samples(path: Path, shape: Shape | None, fit: str) -> tuple[Tensor, Tensor | None]:
    """Images to judge and, from an .npz or parts whose classes take turns, their labels."""
    if path.is_dir() and (path / "000000.npz").is_file():
        images = parts.load(path)
        settings = read_json(path / parts.SETTINGS) if (path / parts.SETTINGS).is_file() else {}
        if shape is not None and tuple(images.shape[1:]) != shape:
            raise InvalidArgument(f"{path}: images of {list(images.shape[1:])}, {list(shape)} are needed")
        cycle = settings.get("labels") == "cycle"
        return images, torch.arange(len(images)) % len(CLASS_NAMES) if cycle else None
    images, labels = load_images(path, shape, fit)
    known = path.is_file() and labels is not None and int(labels.max()) < len(CLASS_NAMES)
    return images, labels if known else None  # the names of folders are no classes that a judge knows


def _accuracy(judge: Classifier | None, features: Tensor, labels: Tensor | None) -> dict[str, float] | None:
    """The share of images that the classifier reads as their label, and its interval."""
    if judge is None or labels is None:
        return None
    with torch.no_grad():
        read = judge.head(features.to(judge.head.weight.device)).argmax(1).cpu()
    return dataclasses.asdict(share_interval(read == labels))


def _as_dicts(estimates: dict[str, Estimate]) -> dict[str, dict[str, float]]:
    return {name: dataclasses.asdict(estimate) for name, estimate in estimates.items()}


def _text(value: dict[str, float]) -> str:
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
