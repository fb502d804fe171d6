"""The folder of a job: its settings, its shards, and the record of each finished one.

    DIR/job.json            settings (all that decides the files), and the call that draws them
    DIR/shards/000042.npz   the images of a fixed range; .tar for webdataset, a folder for png and imagefolder
    DIR/shards/000042.json  the record: range, SHA-256 of the file and of the pixels, seconds
    DIR/claims              a file whose bytes are locked, see `fastdiff.bulk.claims`

A shard is finished when its record is there, which is written after its images.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fastdiff.backends.native as native
from fastdiff import __version__
from fastdiff.bulk import shards
from fastdiff.checkpoints.reading import network_digest, read_json
from fastdiff.checks import Check, Error, is_whole, number, one_of, optional, shown, text, whole
from fastdiff.errors import CheckpointError, InvalidArgument, JobError
from fastdiff.files import write_text
from fastdiff.sampler import Sampler
from fastdiff.sampler.options import Options
from fastdiff.sampler.request import Request
from fastdiff.solvers import StepTable

NAME = "job.json"
MAX_JSON = 64 << 20  # the labels of a million images take a tenth of it
MAX_IMAGES = 10**9  # the names of the images have nine digits
MAX_LABELS = 1 << 22
SHARD, SHARD_BYTES = 1000, 16 << 20  # images of a shard at most, and bytes of their pixels
SHARDS = 50  # of a job at least, where its images are many enough
# Options of `Sampler.sample` that a job sets itself, that cannot be written to job.json, or whose effect depends on the
# speed of the machine.
REFUSED = {
    "start_index": "a job draws the images 0 to n - 1",
    "index": "a job draws the images 0 to n - 1",
    "indices": "a job draws the images 0 to n - 1",
    "noise": "it cannot be written to job.json",
    "image": "it cannot be written to job.json",
    "mask": "it cannot be written to job.json",
    "condition": "it cannot be written to job.json",
    "strength": "it belongs to image=, which cannot be written to job.json",
    "repaint": "it belongs to image=, which cannot be written to job.json",
    "guide": "it cannot be written to job.json",
    "deadline_s": "what it chooses depends on the machine; name a solver and steps, or quality=",
}

Asked = Mapping[str, "list[Any] | None"]
"""What the images show, in turns: "labels" has classes, "prompts" texts; None where there are none."""


@dataclasses.dataclass(frozen=True)
class Job:
    """A job in its folder.

    ``settings`` decide the bytes of every file; ``call`` says how to draw the images: the model, the batch size and the
    options of `Sampler.sample`.
    """

    folder: Path
    settings: dict[str, Any]
    call: dict[str, Any]

    @property
    def n(self) -> int:
        """Number of images."""
        return int(self.settings["n"])

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of an image."""
        c, h, w = self.settings["shape"]
        return h, w, c

    @property
    def layout(self) -> shards.Layout:
        """How a shard is written."""
        s = self.settings
        return shards.Layout(s["format"], self.shape, s["seed"], s["class_names"], s.get("prompts"))

    @property
    def shards(self) -> range:
        """The numbers of the shards."""
        return range(-(-self.n // self.settings["shard_size"]))

    def indices(self, shard: int) -> range:
        """Return the indices of the images of a shard."""
        size = self.settings["shard_size"]
        return range(shard * size, min((shard + 1) * size, self.n))

    def batches(self, shard: int) -> list[range]:
        """Return the indices of a shard in the ranges that are drawn at a time."""
        indices, k = self.indices(shard), self.call["batch_size"]
        return [indices[i : i + k] for i in range(0, len(indices), k)]

    def labels(self, indices: range) -> list[int] | None:
        """Return the classes of some images; None where they have none."""
        repeated = self.settings["labels"]
        return None if repeated is None else [repeated[i % len(repeated)] for i in indices]

    def asks(self, indices: range) -> dict[str, Any]:
        """Return the options of `Sampler.sample` that say what some images show: their classes, or their prompts."""
        repeated = self.settings.get("prompts")
        prompts = None if repeated is None else [repeated[i % len(repeated)] for i in indices]
        return {"labels": self.labels(indices), "prompts": prompts}

    def path(self, shard: int) -> Path:
        """Return the path of a shard's images, a file or a folder."""
        return self.folder / "shards" / f"{shard:06d}{shards.SUFFIXES[self.settings['format']]}"

    def record_path(self, shard: int) -> Path:
        """Return the path of a shard's record."""
        return self.folder / "shards" / f"{shard:06d}.json"

    def finished(self) -> set[int]:
        """List the shards whose record and images are there."""
        try:
            names = set(os.listdir(self.folder / "shards"))
        except FileNotFoundError:
            return set()
        except OSError as e:
            raise JobError(f"{self.folder / 'shards'} cannot be listed ({e.strerror or e})") from e
        numbers = {int(name[:-5]) for name in names if name.endswith(".json") and name[:-5].isdecimal()}
        return {i for i in numbers if i in self.shards and {self.path(i).name, self.record_path(i).name} <= names}

    def is_finished(self, shard: int) -> bool:
        """Return whether the record and the images of a shard are there."""
        return self.record_path(shard).is_file() and self.path(shard).exists()

    def sampler(self) -> Sampler:
        """Load the model; `JobError` names what would make it draw other images than those of the job."""
        call, s = self.call, self.settings
        if call["model"] is None:
            raise JobError(
                f"{self.folder}: its network was given in memory, so only generate(sampler, ...) can draw it"
            )
        sampler = Sampler.from_pretrained(
            call["model"], backend=s["backend"], device=s["device"], dtype=s["dtype"], determinism=s["determinism"]
        )
        self.check(sampler)
        return sampler

    def check(self, sampler: Sampler) -> None:
        """Raise `JobError` if a sampler, or this machine, would draw other images than those of the job."""
        s, call = self.settings, self.call
        asked = {"labels": s["labels"], "prompts": s.get("prompts")}
        here = settings(sampler, s["n"], call["options"], asked, s["format"], s["shard_size"], call["batch_size"],
                        torch.get_num_threads())  # fmt: skip
        differing(self.folder, s, here)


def options_of(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of `Sampler.sample` as JSON holds them; those that a job cannot have are refused by name."""
    for name, why in REFUSED.items():
        if options.get(name) is not None:
            raise InvalidArgument(f"{name}= is no option of a bulk job: {why}")
    given = {name: value for name, value in options.items() if value is not None or name == "clip"}
    if isinstance(given.get("solver"), StepTable):
        raise InvalidArgument("solver=StepTable is no option of a bulk job: name a solver, and give its options")
    if "guidance" in given:
        number("guidance", given["guidance"])
    Options.named("generate", given)
    try:
        return json.loads(json.dumps(given, default=_plain))
    except (TypeError, ValueError) as e:
        raise InvalidArgument(f"the options {shown(given)} cannot be written to job.json: {e}") from e


def _plain(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"a {type(value).__name__} is no value of JSON")


def repeated_labels(labels: Any, n: int, sampler: Sampler) -> list[int] | None:
    """Return the classes that the images take in turns, for labels as `generate` takes them."""
    info = sampler.info
    if isinstance(labels, str) and labels == "cycle":
        return None if info.classes is None else list(range(info.classes))
    if labels is None:
        return None
    if is_whole(labels) or isinstance(labels, str):
        labels = [labels]
    elif hasattr(labels, "tolist"):
        labels = labels.tolist()
    if not isinstance(labels, (list, tuple)) or not 1 <= len(labels) <= min(n, MAX_LABELS):
        raise InvalidArgument(
            f"labels={shown(labels)}: 'cycle', a class, None, or a list of 1 to {min(n, MAX_LABELS)} classes, which "
            "the images take in turns, is needed"
        )
    # The sampler's check replaces names by numbers; a chunk of labels takes it no memory of images.
    checked: list[int] = []
    for i in range(0, len(labels), 64):
        part = sampler.request(len(labels[i : i + 64]), labels=list(labels[i : i + 64])).labels
        checked += [] if part is None else part.tolist()
    return checked


def repeated_prompts(prompts: Any, n: int, sampler: Sampler) -> list[str] | None:
    """Return the prompts that the images take in turns, as `generate` takes them; each of them is checked."""
    if prompts is None:
        return None
    listed = [prompts] if isinstance(prompts, str) else prompts
    if not isinstance(listed, (list, tuple)) or not 1 <= len(listed) <= min(n, MAX_LABELS):
        raise InvalidArgument(
            f"prompts={shown(prompts)}: a text, or a list of 1 to {min(n, MAX_LABELS)} texts, which the images take in "
            "turns, is needed"
        )
    for i in range(0, len(listed), 64):
        sampler.request(len(listed[i : i + 64]), prompts=list(listed[i : i + 64]))
    return list(listed)


def request(sampler: Sampler, k: int, options: Mapping[str, Any], asked: Asked, batch: int | None) -> Request:
    """Check the drawing of k images."""
    repeated = {name: None if v is None else [v[i % len(v)] for i in range(k)] for name, v in asked.items()}
    return sampler.request(k, **options, **repeated, batch_size=batch)


def settings(
    sampler: Sampler,
    n: int,
    options: Mapping[str, Any],
    asked: Asked,
    format: str,
    shard_size: int | None,
    batch: int | None,
    threads: int,
) -> dict[str, Any]:
    """Collect everything that decides the files of a job, ready for JSON."""
    r = request(sampler, 1, options, asked, 1)
    c, h, w = r.shape
    if c not in (1, 3):
        raise InvalidArgument(f"images of {c} channels are no pictures, which a bulk job writes; 1 or 3 are needed")
    default = request(sampler, min(n, SHARD), options, asked, batch).batch_size
    if shard_size is None:
        most = max(1, min(SHARD, SHARD_BYTES // (c * h * w)))
        shard_size = min(most, max(default, math.ceil(n / SHARDS)))
    bitwise = sampler.determinism == "bitwise"
    module = native.extension()
    isas = module.isas() if module is not None else []
    return {
        "n": n,
        "format": format,
        "shard_size": shard_size,
        "model": _model_digest(sampler),
        "table": hashlib.sha256(r.table.to_json().encode()).hexdigest(),
        "solver": r.table.solver,
        "nfe": r.nfe,
        "seed": r.seed,
        "labels": asked["labels"],
        "prompts": asked["prompts"],
        "class_names": None if r.class_names is None else list(r.class_names),
        "guidance": float(r.guidance[0]),
        "guidance_rescale": r.guidance_rescale,
        "shape": list(r.shape),
        "backend": sampler.backend,
        "device": sampler.device.type,
        "dtype": "bfloat16-fast" if sampler.fast else str(sampler.dtype).removeprefix("torch."),
        "determinism": sampler.determinism,
        # Without "bitwise" the number of threads and the images of a batch change the rounding.
        "batch_size": None if bitwise else min(default, shard_size),
        "threads": None if bitwise else threads,
        "isa": (native.isa() or next(iter(isas), None)) if sampler.backend == "native" else None,
        "processor": _processor(sampler),
        "torch": str(torch.__version__),
        "encoder": shards.encoder(format),
        "version": __version__,
    }


def _model_digest(sampler: Sampler) -> str:
    """Compute the SHA-256 of a model, of its text encoder too where it has one."""
    if sampler.text_encoder is None:
        return network_digest(sampler.unet)
    if not isinstance(sampler.text_encoder, nn.Module):
        raise InvalidArgument(
            f"the text encoder is a {type(sampler.text_encoder).__name__}; a bulk job needs a torch module, whose "
            "weights it can compare"
        )
    both = network_digest(sampler.unet) + network_digest(sampler.text_encoder)
    return hashlib.sha256(both.encode()).hexdigest()


def _processor(sampler: Sampler) -> str:
    """Describe what PyTorch's own kernels depend on, such as those of the noise."""
    if sampler.device.type == "cuda":
        return torch.cuda.get_device_name(sampler.device)
    return str(torch.backends.cpu.get_cpu_capability())


def differing(folder: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise `JobError`, which lists every setting in which the job of a folder is another one."""
    names = [k for k in (*expected, *(found.keys() - expected.keys())) if found.get(k) != expected.get(k)]
    if not names:
        return
    listed = "".join(f"\n  {k}: {shown(found.get(k))} there, {shown(expected.get(k))} here" for k in names)
    hint = ""
    if "isa" in names:
        hint = "\nFASTDIFF_ISA, set to one that all machines have, makes their bits equal; start a new folder with it."
    raise JobError(
        f"{folder} is the folder of another job, whose images would differ; use another folder.{listed}{hint}",
        tuple(names),
    )


def begin(job: Job) -> None:
    """Write job.json, or check that the one of the folder, which another process may just have written, is the same."""
    path = job.folder / NAME
    if not path.exists():
        _check_empty(job.folder)
        document = {"settings": job.settings, "call": job.call}
        write_text(path, json.dumps(document, indent=1) + "\n", keep=True)
    differing(job.folder, read(job.folder).settings, job.settings)


def _check_empty(folder: Path) -> None:
    """Refuse a folder with files of something else; another process of this job may just have begun."""
    if not folder.exists():
        return
    try:
        others = [p.name for p in folder.iterdir() if not p.name.startswith(".")]
    except OSError as e:
        raise JobError(f"{folder} cannot be the folder of a job ({e.strerror or e}); choose another one") from e
    if others and not (folder / NAME).exists():
        raise JobError(f"{folder} has files, such as {others[0]!r}, but no {NAME}: choose a new folder")


def read(folder: str | Path) -> Job:
    """Read the job of a folder; `JobError` names what is missing or damaged."""
    folder = Path(folder)
    path = folder / NAME
    if not path.is_file():
        raise JobError(f"{folder}: there is no {NAME}, so it is no folder of `fastdiff generate`")
    try:
        document = read_json(path, MAX_JSON)
    except CheckpointError as e:
        raise JobError(str(e)) from e
    s, call = document.get("settings"), document.get("call")
    if not isinstance(s, dict) or not isinstance(call, dict):
        raise JobError(f"{path}: the objects settings and call are needed")
    checks: dict[str, tuple[Check, dict[str, Any]]] = {
        "n": (whole, {"low": 1, "high": MAX_IMAGES}),
        "format": (one_of, {"allowed": tuple(shards.SUFFIXES)}),
        "shard_size": (whole, {"low": 1, "high": MAX_IMAGES}),
        "shape": (_shape, {}),
        "seed": (whole, {"low": 0}),
        "labels": (_classes, {}),
        "prompts": (_names, {}),
        "class_names": (_names, {}),
        "backend": (text, {}), "device": (text, {}), "dtype": (text, {}), "determinism": (text, {}),
    }  # fmt: skip
    for name, (check, arguments) in checks.items():
        check(f"{path}: {name}", s.get(name), **arguments, error=JobError)
    optional(text)(f"{path}: model", call.get("model"), error=JobError)
    whole(f"{path}: batch_size", call.get("batch_size"), 1, error=JobError)
    options = call.get("options")
    if not isinstance(options, dict) or not options.keys().isdisjoint(("labels", "prompts", "batch_size")):
        raise JobError(f"{path}: the object options, without labels, prompts and batch_size, is needed")
    try:
        options_of(options)
    except InvalidArgument as e:
        raise JobError(f"{path}: {e}") from e
    return Job(folder, s, call)


def _shape(name: str, value: Any, *, error: Error) -> None:
    if (
        not isinstance(value, list)
        or len(value) != 3
        or not all(is_whole(v) and 1 <= v <= 1 << 16 for v in value)
        or value[0] not in (1, 3)
    ):
        raise error(f"{name}={shown(value)}: (channels, height, width) is needed")


def _classes(name: str, value: Any, *, error: Error) -> None:
    good = value is None or (isinstance(value, list) and value and all(is_whole(v) and v >= 0 for v in value))
    if not good:
        raise error(f"{name}={shown(value)}: a list of classes or null is needed")


def _names(name: str, value: Any, *, error: Error) -> None:
    if value is not None and not (isinstance(value, list) and all(isinstance(v, str) for v in value)):
        raise error(f"{name}={shown(value)}: a list of names or null is needed")
