"""Messages to systemd, which starts services of ``Type=notify``: ready, stopping, alive. Elsewhere nothing is sent."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable


def notify(state: str) -> None:
    """Send a state, as "READY=1", where systemd asks for it (sd_notify(3)); a message that is lost is no error."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path[:1] in ("/", "@"):  # @ is an abstract address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as out:
            out.setblocking(False)
            out.sendto(state.encode(), path.replace("@", "\0", 1) if path[0] == "@" else path)


def watchdog_s() -> float:
    """Return the seconds after which systemd ends this process if it hears nothing; 0 where it does not watch."""
    pid, given = os.environ.get("WATCHDOG_PID", ""), os.environ.get("WATCHDOG_USEC", "")
    mine = pid in ("", str(os.getpid()))
    return int(given) / 1e6 if mine and given.isascii() and given.isdecimal() else 0.0


async def feed_watchdog(alive: Callable[[], bool]) -> None:
    """Say that the process is alive, four times in the time that systemd allows, while ``alive`` returns True."""
    pause = watchdog_s() / 4.0
    while pause:
        if alive():
            notify("WATCHDOG=1")
        await asyncio.sleep(pause)
