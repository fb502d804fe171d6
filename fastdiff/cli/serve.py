"""``fastdiff serve`` answers requests for images over HTTP."""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import BackendOption
from fastdiff.errors import BackendError, InvalidArgument

NEEDED = {
    "starlette": "starlette", "uvicorn": "uvicorn", "msgspec": "msgspec", "prometheus_client": "prometheus-client",
    "python_multipart": "python-multipart",
}  # fmt: skip
UNITS = {"": 1, "B": 1, "KIB": 1 << 10, "MIB": 1 << 20, "GIB": 1 << 30}


def serve(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[MODEL...]",
            help="Built-in names, diffusers folders or checkpoint files; requests name them by the last part of their "
            "paths (default: fashion-mnist).",
        ),
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0: all of this machine.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen at; 0: a free one.")] = 8000,
    max_rows: Annotated[str, typer.Option(help="Network rows of a step at most; auto: as many as pay off.")] = "auto",
    max_queue_seconds: Annotated[float, typer.Option(help="Work that may be queued.")] = 30.0,
    max_n: Annotated[int, typer.Option(min=1, max=1024, help="Images of a request at most.")] = 64,
    max_steps: Annotated[int, typer.Option(min=1, max=4096, help="Rows of a request's step table at most.")] = 1000,
    max_body: Annotated[str, typer.Option(help="Size of a request at most, as 512KiB or 8MiB.")] = "1MiB",
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with a key in each line; requests for images must have one of them.")
    ] = None,
    drain_seconds: Annotated[
        float, typer.Option(min=0.0, max=86400.0, help="Time that jobs have to finish after SIGTERM or Ctrl-C.")
    ] = 30.0,
    log_format: Annotated[str, typer.Option(help="text or json.")] = "text",
    no_page: Annotated[bool, typer.Option("--no-page", help="Do without the page at /.")] = False,
    backend: BackendOption = "auto",
    determinism: Annotated[
        str, typer.Option(help="bitwise: an image has the same bits at any load; seed, for other backends than native.")
    ] = "bitwise",
) -> None:
    """Answer requests for images over HTTP, in the shape of OpenAI's API.

    Requests share the network step by step, so short ones do not wait for long ones. SIGTERM and Ctrl-C let jobs
    finish; a second one ends everything at once.

    Examples:

    fastdiff serve fashion-mnist

    fastdiff serve fashion-mnist --host 0.0.0.0 --api-key-file keys.txt
    """
    if os.name != "posix":
        raise BackendError(
            "fastdiff serve needs Linux or macOS: elsewhere use fastdiff.Engine in a service of your own"
        )
    missing = [package for module, package in NEEDED.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise BackendError(f"fastdiff serve needs {', '.join(missing)}: pip install 'fastdiff[serve]'")
    from fastdiff.serving.server import Settings, serve

    if log_format not in ("text", "json"):
        raise InvalidArgument(f"--log-format {log_format}: text or json is needed")
    serve(
        Settings(
            models=models or ["fashion-mnist"],
            host=host,
            port=port,
            max_rows=_rows(max_rows),
            max_queue_s=max_queue_seconds,
            max_n=max_n,
            max_steps=max_steps,
            max_body=_size(max_body),
            keys=api_key_file,
            drain_s=drain_seconds,
            log_format=log_format,
            page=not no_page,
            backend=backend,
            determinism=determinism,
        )
    )


def _rows(text: str) -> int | None:
    if text == "auto":
        return None
    if not re.fullmatch("[0-9]+", text) or not 1 <= int(text[:10]) <= 1 << 16:
        raise InvalidArgument(f"--max-rows {text}: auto, or a whole number from 1 to {1 << 16}, is needed")
    return int(text)


def _size(text: str) -> int:
    found = re.fullmatch(r"([0-9]{1,12})\s*([A-Za-z]*)", text.strip())
    if found is None or found[2].upper() not in UNITS or not (size := int(found[1]) * UNITS[found[2].upper()]):
        raise InvalidArgument(f"--max-body {text}: a size as 512KiB or 8MiB is needed")
    return size
