"""The messages between the process that answers requests and the one that draws: msgpack, never pickles.

Pixels are bytes of unsigned 8-bit numbers, image by image, row by row, channels last.
"""

from __future__ import annotations

from typing import Any

import msgspec


class Setup(msgspec.Struct, tag=True):
    """Start of the drawing process; ``models`` are what loads each, by the names that callers use."""

    models: dict[str, str]
    max_rows: int | None
    max_queue_s: float
    max_steps: int
    backend: str
    determinism: str
    log_format: str


class Picture(msgspec.Struct):
    """A decoded picture, in the modes of PIL."""

    mode: str
    width: int
    height: int
    pixels: bytes


class Submit(msgspec.Struct, tag=True):
    """A job; ``options`` are those of `Engine.submit`."""

    id: str
    model: str
    n: int
    options: dict[str, Any]
    image: Picture | None = None
    mask: Picture | None = None


class Cancel(msgspec.Struct, tag=True):
    id: str


class Look(msgspec.Struct, tag=True):
    """Ask for the state of a job."""

    id: str


class Setting(msgspec.Struct):
    """A measured setting: network evaluations of an image, Frechet distance to real images, and recall."""

    solver: str
    steps: int
    guidance: float
    nfe: int
    distance: float
    recall: float


class Model(msgspec.Struct):
    """Facts about a model that requests are checked with."""

    name: str
    width: int
    height: int
    channels: int
    classes: int | None
    class_names: list[str] | None
    backend: str
    determinism: str
    dtype: str
    solvers: list[str]
    measured: list[Setting] = []
    text: bool = False  # whether it reads prompts


class Ready(msgspec.Struct, tag=True):
    """Every model has drawn an image."""

    models: list[Model]


class Broken(msgspec.Struct, tag=True):
    """The models cannot be served: `FastdiffError`'s message."""

    message: str


class Accepted(msgspec.Struct, tag=True):
    id: str
    eta_s: float


class Preview(msgspec.Struct, tag=True):
    id: str
    image: int
    row: int
    rows: int
    pixels: bytes


class Done(msgspec.Struct, tag=True):
    id: str
    pixels: bytes
    receipt: dict[str, Any]
    queue_s: float
    run_s: float


class Failed(msgspec.Struct, tag=True):
    """A job has no images; ``error`` is the name of the error's class, ``ran`` whether a step had begun."""

    id: str
    error: str
    message: str
    retry_after_s: float | None = None
    ran: bool = False


class Looked(msgspec.Struct, tag=True):
    id: str
    state: str
    eta_s: float


class Beat(msgspec.Struct, tag=True):
    """A sign of life, with the numbers of `Stats` of each model and the previews that were never sent."""

    stats: dict[str, dict[str, float]]
    dropped: int


ToWorker = Submit | Cancel | Look
FromWorker = Ready | Broken | Accepted | Preview | Done | Failed | Looked | Beat

encode = msgspec.msgpack.Encoder().encode
decode_setup = msgspec.msgpack.Decoder(Setup).decode
decode_to_worker = msgspec.msgpack.Decoder(ToWorker).decode
decode_from_worker = msgspec.msgpack.Decoder(FromWorker).decode
