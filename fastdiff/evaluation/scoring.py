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
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from fastdiff.checkpoints.reading import read_json, read_safetensors
from fastdiff.errors import CheckpointError, DataError, InvalidArgument
from fastdiff.evaluation import image_store
from fastdiff.evaluation.classifier import CLASS_NAMES, SIZE, Classifier
from fastdiff.evaluation.metrics import Extractor, Reference, features, measure, share_interval, thinned
from fastdiff.evaluation.reference_images import MIN_IMAGES, RealImages, Shape, default_fit, find_data, load_images
from fastdiff.files import atomic_path, write_text
from fastdiff.modes import plain_modes
from fastdiff.sampler import Sampler
from fastdiff.sampler.runners import usable_device

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
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Measure a model's samples, or other images, against real images.

    Finished images and features are kept in ``out``, so that an interrupted call can be repeated at little cost.

    Args:
        model: A model, as `Sampler.from_pretrained` takes it.
        samples: Images to judge in place of the model's: an .npz, a folder of pictures or of parts, or an IDX file.
        n: The number of images, at least 20; None means 5,000, or all of ``samples``.
        data: Real images, as `fastdiff.data.load_data` takes them, or a folder with MNIST's four files, which also has
            held-out images; None means the training images of the built-in model, if Debian's package has installed
            them.
        held_out: Real images that the model was not trained on, whose scores are reported beside the model's.
        fit: "crop" or "pad" real images to the size of the judged ones; None pads MNIST's files and crops others.
        features_of: The network whose features are compared, as `features` takes it.
        out: The folder for images, features and ``report.json``.
        backend: As `Sampler.from_pretrained` takes it.
        device: As `Sampler.from_pretrained` takes it.
        dtype: As `Sampler.from_pretrained` takes it.
        options: Options of `Sampler.sample`; ``labels`` may also be "cycle", the default: the classes take turns.
        progress: Called with what is being done, how much of it is done, and how much there is.

    Returns:
        The report, ready for JSON, as written to ``out/report.json``. Its "metrics" and "held_out" have the keys
        "frechet", "kernel", "precision" and "recall", each a dictionary of "value", "low" and "high"; "accuracy" is the
        share of images that the classifier assigns to their class, if both are known.

    Raises:
        CheckpointError: If the model or the weights of the features cannot be read.
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
    judge = extract.network if isinstance(extract.network, Classifier) else None
    if samples is None:
        sampler = Sampler.from_pretrained(model, backend=backend, device=device, dtype=dtype)
        settings = image_store.settings(sampler, **options)
        channels, height, width = settings["shape"]
        check_shape(extract, str(features_of), str(model), (channels, height, width))
        real = RealImages.load(data, held_out, (channels, height, width), fit)
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        folder = out / f"{settings['solver']}-{settings['nfe']}-{digest}"
        n = n or 5000
        images = image_store.draw(
            sampler, folder, n, progress=lambda done, total: say("images", done, total), **options
        )
        cycle = settings["labels"] == "cycle" and sampler.info.classes == len(CLASS_NAMES)
        labels = torch.arange(n, dtype=torch.int64, device="cpu") % len(CLASS_NAMES) if cycle else None
        source: dict[str, Any] = {"model": str(model), "settings": settings, "images": str(folder)}
    else:
        images, labels = _samples(Path(samples), None if judge is None else (1, SIZE, SIZE), fit)
        if len(images) < (n or MIN_IMAGES):
            raise DataError(f"{samples} holds {len(images)} images, {n or MIN_IMAGES} are needed")
        images, labels = images[:n], None if labels is None else labels[:n]
        real = RealImages.load(data, held_out, (images.shape[1], images.shape[2], images.shape[3]), fit)
        source = {"samples": str(samples)}
    scores = _scores(extract, images, labels, real, out, say)
    report = {**source, "features": str(features_of), "data": str(data), **scores}
    write_text(out / "report.json", json.dumps(report, indent=2) + "\n")
    return report


def check_shape(extract: Extractor, features_of: str, model: str, shape: Shape) -> None:
    """Refuse images of a shape that the network of the features does not take: the classifier needs 1x32x32."""
    if isinstance(extract.network, Classifier) and shape != (1, SIZE, SIZE):
        raise InvalidArgument(
            f"{features_of} judges images of 1x{SIZE}x{SIZE}, those of {model} are {'x'.join(map(str, shape))}; "
            "give the weights of Inception as --features"
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
    network = image_store.network_digest(extract.network)
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
    except CheckpointError:  # the file is damaged and will be written again
        return None
    stored = tensors.get("features")
    fits = stored is not None and stored.dtype == torch.float32 and stored.ndim == 2 and len(stored) == n
    return stored if fits else None


def _samples(path: Path, shape: Shape | None, fit: str) -> tuple[Tensor, Tensor | None]:
    """Load images to judge and their labels, which an .npz and parts whose classes take turns have."""
    if path.is_dir() and (path / "000000.npz").is_file():
        images = image_store.load(path)
        settings = read_json(path / image_store.SETTINGS) if (path / image_store.SETTINGS).is_file() else {}
        if shape is not None and tuple(images.shape[1:]) != shape:
            raise InvalidArgument(f"{path}: images of {list(images.shape[1:])}, {list(shape)} are needed")
        cycle = settings.get("labels") == "cycle"
        return images, torch.arange(len(images), dtype=torch.int64, device="cpu") % len(CLASS_NAMES) if cycle else None
    images, labels = load_images(path, shape, fit)
    known = path.is_file() and labels is not None and int(labels.max()) < len(CLASS_NAMES)
    return images, labels if known else None  # the classifier does not know classes named by folders


def _accuracy(judge: nn.Module, features: Tensor, labels: Tensor | None) -> dict[str, float] | None:
    """Compute the share of images that the classifier assigns to their label, with its interval."""
    if not isinstance(judge, Classifier) or labels is None:
        return None
    with plain_modes():
        predicted = judge.head(features.to(judge.head.weight.device)).argmax(1).cpu()
    return dataclasses.asdict(share_interval(predicted == labels))


def _text(value: dict[str, float]) -> str:
    return f"{value['value']:.4g} [{value['low']:.4g}, {value['high']:.4g}]"
