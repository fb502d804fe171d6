"""``fastdiff serve``: the process that answers requests, from its start to its end by a signal."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import re
import signal
import socket
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import uvicorn

from fastdiff.errors import BackendError, InvalidArgument, printable
from fastdiff.serving import logs, page, systemd, wire
from fastdiff.serving.front import MOST_HEADERS, Front, Keys
from fastdiff.serving.http import App
from fastdiff.serving.metrics import Metrics
from fastdiff.serving.process import Supervisor
from fastdiff.serving.requests import Limits

log = logging.getLogger("fastdiff.serving")

GRACE_S = 5.0  # for answers that are being sent when everything else has ended
MODEL = re.compile(r"[A-Za-z0-9._-]{1,100}")


@dataclasses.dataclass(frozen=True)
class Settings:
    """Options of ``fastdiff serve``."""

    models: Sequence[str]
    host: str
    port: int
    max_rows: int | None
    max_queue_s: float
    max_n: int
    max_steps: int
    max_body: int
    keys: Path | None
    drain_s: float
    log_format: str
    page: bool
    backend: str
    determinism: str


def named(models: Sequence[str]) -> dict[str, str]:
    """Return what loads each model, by the name that requests use: a built-in name, or the last part of a path."""
    found: dict[str, str] = {}
    for model in models:
        path = Path(model)
        name = path.resolve().stem if path.is_file() else path.resolve().name
        if not MODEL.fullmatch(name):
            raise InvalidArgument(f"{model}: its name, {name!r}, has other characters than letters, digits and ._-")
        if name in found:
            raise InvalidArgument(f"{found[name]} and {model}: both would be the model {name}; rename one")
        found[name] = model
    return found


class _Uvicorn(uvicorn.Server):
    """Server that leaves signals to `serve`."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> None:
    """Serve until a signal ends it.

    Raises:
        InvalidArgument: If a setting cannot be used.
        BackendError: If the models cannot be served; the message says why.
        OSError: If the address cannot be used, or the file of keys cannot be read.
    """
    keys, models = Keys(settings.keys), named(settings.models)
    logs.configure(settings.log_format)
    with _socket(settings.host, settings.port) as listening:
        setup = wire.Setup(
            models=models, max_rows=settings.max_rows, max_queue_s=settings.max_queue_s, max_steps=settings.max_steps,
            backend=settings.backend, determinism=settings.determinism, log_format=settings.log_format,
        )  # fmt: skip
        why = asyncio.run(_serve(settings, setup, keys, listening))
    if why:
        raise BackendError(why)


def _socket(host: str, port: int) -> socket.socket:
    try:
        (family, _, _, _, address), *_ = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
        listening = socket.create_server(address, family=family, backlog=1024)
    except OSError as e:
        raise InvalidArgument(f"--host {host} --port {port}: {e}; another address is needed") from e
    # Connections inherit this. Without, the second packet of an answer waits 40 ms for the first one's receipt: asyncio
    # sets it for sockets alone whose protocol is stated, which create_server leaves to the system.
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return listening


async def _serve(settings: Settings, setup: wire.Setup, keys: Keys, listening: socket.socket) -> str:
    """Serve; return why the models cannot be served, or nothing after a signal."""
    supervisor = Supervisor(setup)
    app = App(
        supervisor,
        Metrics(supervisor),
        Limits(settings.max_n, settings.max_steps),
        page.routes() if settings.page else [],
    )
    config = uvicorn.Config(
        Front(app.asgi, keys, settings.max_body), lifespan="off", log_config=None, access_log=False, ws="none",
        http="h11", loop="asyncio", h11_max_incomplete_event_size=MOST_HEADERS, server_header=False,
        proxy_headers=False, timeout_graceful_shutdown=int(GRACE_S),
    )  # fmt: skip
    server, loop, asked = _Uvicorn(config), asyncio.get_running_loop(), asyncio.Event()

    def stop() -> None:
        if asked.is_set():  # the second signal
            if supervisor.process is not None:
                supervisor.process.kill()
            os._exit(1)
        asked.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop)
    answering = loop.create_task(server.serve(sockets=[listening]))
    supervising = loop.create_task(supervisor.run())
    host, port = listening.getsockname()[:2]
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    announcing = loop.create_task(_announce(supervisor, url))
    feeding = loop.create_task(systemd.feed_watchdog(lambda: supervisor.alive))
    waiting = loop.create_task(asked.wait())
    try:
        await asyncio.wait((answering, supervising, waiting), return_when=asyncio.FIRST_COMPLETED)
        if not supervising.done():
            await _drain(supervisor, settings.drain_s)
    finally:
        for task in (announcing, feeding, waiting):
            task.cancel()
        server.should_exit = True
        await asyncio.wait((answering,), timeout=2 * GRACE_S)
        supervisor.close()
        why = await supervising
    return why


async def _drain(supervisor: Supervisor, seconds: float) -> None:
    """Take no more jobs, let those that there are finish, and cancel those that are not finished in time."""
    supervisor.draining = True
    systemd.notify("STOPPING=1")
    loop = asyncio.get_running_loop()
    end = loop.time() + seconds
    log.info("shutting down: %d jobs have %g s to finish", len(supervisor.jobs), seconds)
    while supervisor.jobs and loop.time() < end:
        await asyncio.sleep(0.05)
    left = list(supervisor.jobs.values())
    for job in left:
        supervisor.cancel(job)
    if left:
        await asyncio.wait([job.outcome for job in left], timeout=GRACE_S)


async def _announce(supervisor: Supervisor, url: str) -> None:
    """Print the address once images can be drawn."""
    while supervisor.trouble:
        await asyncio.sleep(0.05)
    for m in supervisor.models.values():
        classes = "" if m.classes is None else f", {m.classes} classes"
        print(f"{printable(m.name)}: {m.width}x{m.height}{classes}, {m.backend}, {m.dtype}", file=sys.stderr)
    print(f"fastdiff serves {printable(', '.join(supervisor.models))} at {url}", flush=True)
    systemd.notify("READY=1")
