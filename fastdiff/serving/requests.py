"""The bodies of requests: which fields they have, and what their values may be.

Everything that is not understood is refused with a `Refusal`, before any work. The rest, which needs the network's
schedule, is checked by `Engine.submit`.
"""

from __future__ import annotations

import io
import json
import re
import secrets
from typing import Annotated, Any, Literal, TypeVar

import msgspec
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from fastdiff.errors import printable
from fastdiff.serving.wire import Model, Picture

T = TypeVar("T")

MOST_TEXT = 1000  # characters of a prompt or another text
MOST_PREVIEWS = 100  # of an image
SEED_BITS = 48  # of seeds that the server draws: numbers that JavaScript represents
FORMATS = ("PNG", "JPEG", "WEBP")
CHUNK = "fastdiff"  # keyword of the text in a PNG
DECIDING = ("negative", "solver", "steps", "guidance", "eta", "spacing", "quality")  # fields

Text = Annotated[str, msgspec.Meta(max_length=MOST_TEXT)]
Whole = Annotated[int, msgspec.Meta(ge=0)]


class Refusal(Exception):
    """A request is answered with an error, in the shape of OpenAI's.

    Args:
        status: The status of HTTP.
        message: What was wrong, and what would work.
        code: A word for programs.
        param: The field that is wrong.
        retry_after_s: Seconds after which trying again makes sense; None where it does not.
    """

    def __init__(
        self, status: int, message: str, code: str, param: str | None = None, retry_after_s: float | None = None
    ):
        super().__init__(message)
        self.status, self.code, self.param, self.retry_after_s = status, code, param, retry_after_s

    @property
    def body(self) -> bytes:
        """The body of the response."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        kind = {401: "authentication_error", 429: "rate_limit_error"}.get(self.status, kind)
        error = {"message": printable(self), "type": kind, "param": self.param, "code": self.code}
        return msgspec.json.encode({"error": error})


def invalid(message: str, param: str | None = None) -> Refusal:
    """Return the refusal of a request that can never be answered."""
    return Refusal(400, message, "invalid_value", param)


class Limits(msgspec.Struct, frozen=True):
    """The most that a request may ask for."""

    n: int
    steps: int


class Generation(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """The body of POST /v1/images/generations: OpenAI's fields, and fastdiff's."""

    model: Text | None = None
    prompt: Text | int | None = None
    negative: Text | None = None
    n: Annotated[int, msgspec.Meta(ge=1)] = 1
    size: Text | None = None
    response_format: Literal["b64_json"] | None = None
    output_format: Literal["png", "jpeg", "webp"] | None = None
    output_compression: Annotated[int, msgspec.Meta(ge=0, le=100)] | None = None
    stream: bool | None = None
    partial_images: Annotated[int, msgspec.Meta(ge=0, le=MOST_PREVIEWS)] | None = None
    background: Literal["auto", "opaque"] | None = None
    moderation: Literal["auto", "low"] | None = None
    user: Text | None = None

    label: Text | int | list[Text | int] | None = None
    solver: Text | None = None
    steps: Annotated[int, msgspec.Meta(ge=1)] | None = None
    guidance: Annotated[float, msgspec.Meta(ge=-1000, le=1000)] | None = None
    eta: Annotated[float, msgspec.Meta(ge=0, le=1000)] | None = None
    spacing: Text | None = None
    seed: Whole | None = None
    start_index: Annotated[int, msgspec.Meta(ge=0, lt=1 << 53)] | None = None
    quality: Annotated[float, msgspec.Meta(ge=1)] | Text | None = None
    deadline_ms: Annotated[float, msgspec.Meta(gt=0, le=1e9)] | None = None
    on_deadline: Literal["fail", "degrade"] | None = None
    priority: Annotated[float, msgspec.Meta(ge=-1000, le=1000)] | None = None


class Edit(Generation):
    """The fields of POST /v1/images/edits, besides its files."""

    strength: Annotated[float, msgspec.Meta(gt=0, le=1)] | None = None
    input_fidelity: Literal["low"] | None = None


_generation = msgspec.json.Decoder(Generation)


def read_generation(body: bytes) -> Generation:
    """Return the body of a request for images; `Refusal` for anything else."""
    return _read(lambda: _generation.decode(body))


def read_edit(fields: dict[str, str]) -> Edit:
    """Return the text fields of a form; `Refusal` for anything else."""
    return _read(lambda: msgspec.convert(fields, Edit, strict=False))


def _read(decode: Any) -> Any:
    try:
        return decode()
    except msgspec.ValidationError as e:
        found = re.search(r"\$\.(\w+)", str(e)) or re.search(r"unknown field `(\w+)`", str(e))
        raise invalid(str(e), found[1] if found else None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as e:
        raise Refusal(400, f"the body is no JSON: {e}", "invalid_json") from None


def check_limits(g: Generation, limits: Limits) -> None:
    """Refuse a request for more than the server gives."""
    if g.n > limits.n:
        raise invalid(f"n={g.n}: this server draws at most {limits.n} images for a request", "n")
    if g.steps is not None and g.steps > limits.steps:
        raise invalid(f"steps={g.steps}: this server takes at most {limits.steps}", "steps")
    if g.seed is not None and g.seed >= 1 << 64:  # msgspec has no bound as large
        raise invalid(f"seed={g.seed}: a whole number from 0 to 2**64 - 1 is needed", "seed")
    if g.partial_images and not g.stream:
        raise invalid("partial_images needs stream=true", "partial_images")
    if isinstance(g.quality, str) and g.quality != "auto":
        raise invalid(f"quality={g.quality!r}: a number of at least 1, or 'auto', is needed", "quality")


def options_of(g: Generation, model: Model) -> dict[str, Any]:
    """Return the options of `Engine.submit`, without the deadline, which is counted from the request's arrival."""
    if g.size not in (None, "auto", f"{model.width}x{model.height}"):
        raise invalid(f"size={g.size!r}: {model.name} draws images of {model.width}x{model.height}", "size")
    options: dict[str, Any] = {
        "seed": secrets.randbits(SEED_BITS) if g.seed is None else g.seed,
        **subject_of(g, model),
    }
    quality = None if isinstance(g.quality, str) else g.quality
    if g.solver is None and quality is None:
        options["solver"] = "auto"
    for name in ("solver", "steps", "guidance", "eta", "spacing", "start_index", "on_deadline", "priority", "strength"):
        value = getattr(g, name, None)
        if value is not None:
            options[name] = value
    if quality is not None:
        options["quality"] = quality
    if g.stream:
        options["previews"] = g.partial_images or 0
    return options


def subject_of(g: Generation, model: Model) -> dict[str, Any]:
    """Return the options that say what to draw: a text for a model that reads texts, else classes."""
    if not model.text:
        if g.negative is not None:
            raise invalid(f"negative: {model.name} reads no text; leave it out", "negative")
        return {"labels": labels_of(g, model)}
    if g.label is not None:
        raise invalid(f"label: {model.name} has no classes; write what to draw as prompt", "label")
    if g.prompt is None:
        raise invalid(f"prompt is needed: {model.name} draws what a text says; '' asks for nothing", "prompt")
    return {"prompts": str(g.prompt), **({} if g.negative is None else {"negative": g.negative})}


def labels_of(g: Generation, model: Model) -> int | list[int] | None:
    """Return the classes that a request's label or prompt names; None for none."""
    prompt = None if g.prompt == "" else g.prompt
    if prompt is not None and g.label is not None:
        raise invalid("prompt and label both say what to draw; give one of them, and prompt='' with label", "prompt")
    name, given = ("prompt", prompt) if g.label is None else ("label", g.label)
    if given is None:
        return None
    if model.classes is None:
        raise invalid(f"{name}: {model.name} has no classes and reads no text; leave {name} out, or empty", name)
    if not isinstance(given, list):
        return _class(given, model, name)
    if len(given) != g.n:
        raise invalid(f"label lists {len(given)} classes for n={g.n} images; {g.n} are needed", "label")
    return [_class(label, model, name) for label in given]


def _class(given: str | int, model: Model, param: str) -> int:
    """Return the number of a class of which the name, the number, or "#" and the number is given."""
    names = model.class_names or []
    assert model.classes is not None
    digits = given.removeprefix("#") if isinstance(given, str) else str(given)
    number = int(digits) if re.fullmatch(r"[0-9]{1,9}", digits) else None
    if isinstance(given, str) and given in names:
        if number not in (None, names.index(given)):
            raise invalid(
                f"{param}={given!r} is the name of class #{names.index(given)}; write #{number} for the other one",
                param,
            )
        return names.index(given)
    if number is not None and number < model.classes:
        return number
    known = f", or one of {', '.join(names[:100])}" if names else ""
    reads = f"{model.name} reads no text: " if number is None else ""
    raise invalid(f"{param}={given!r}: {reads}a class is needed, a number from 0 to {model.classes - 1}{known}", param)


def request_for(g: Generation, model: Model, seed: int, index: int, label: int | None) -> dict[str, Any]:
    """Return the body of a request that draws one image of a job again."""
    what = {"prompt": str(g.prompt)} if model.text else {} if label is None else {"label": label}
    fields = {name: value for name in DECIDING if (value := getattr(g, name)) is not None}
    return {"model": model.name, **what, **fields, "seed": seed, "start_index": index}


def read_picture(name: str, body: bytes, model: Model) -> Picture:
    """Decode an image or a mask of a form, of the model's size, which its header says before anything is decoded."""
    try:
        picture = Image.open(io.BytesIO(body), formats=FORMATS)
        size, frames = picture.size, getattr(picture, "n_frames", 1)
    except Exception as e:  # decoders raise anything
        raise invalid(f"{name} is no picture in the format PNG, JPEG or WebP, or too large: {e}", name) from None
    if size != (model.width, model.height) or frames != 1:
        got = f"{frames} frames of {size[0]}x{size[1]}"
        raise invalid(f"{name} has {got}; {model.name} takes one of {model.width}x{model.height}", name)
    try:
        alpha = picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info
        if name != "mask":
            plain = picture.convert("RGBA" if alpha else "RGB" if model.channels > 1 else "L")
        elif alpha:  # OpenAI's masks are transparent where the image is drawn anew; without transparency, light is
            plain = Image.eval(picture.convert("RGBA").getchannel("A"), lambda a: 255 - a)
        else:
            plain = picture.convert("L")
        return Picture(plain.mode, *plain.size, plain.tobytes())
    except Exception as e:
        raise invalid(f"{name} is a damaged picture: {e}", name) from None


def encode_picture(
    pixels: bytes, model: Model, format: str, compression: int | None, facts: dict[str, Any] | None = None
) -> bytes:
    """Encode an image's pixels as a file of PNG, JPEG or WebP; a PNG has ``facts`` in its text chunk ``fastdiff``."""
    mode = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}[model.channels]
    picture = Image.frombytes(mode, (model.width, model.height), pixels)
    if format == "jpeg":
        picture = picture.convert("L" if model.channels < 3 else "RGB")  # which has no alpha
    options: dict[str, Any] = {"quality": 95 if compression is None else compression}
    if format == "png":
        options = {"pnginfo": PngInfo()}
        if facts is not None:
            options["pnginfo"].add_text(CHUNK, json.dumps(facts))
    if format == "webp" and compression is None:
        options = {"lossless": True}
    file = io.BytesIO()
    picture.save(file, format.upper(), **options)
    return file.getvalue()
