"""Messages to systemd, on sockets as it makes them."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
import time

import pytest

from fastdiff.serving import systemd, wire
from fastdiff.serving.process import Supervisor

pytestmark = pytest.mark.skipif(os.name != "posix", reason="sockets of the system")


@pytest.fixture(params=["path", *(["abstract"] if sys.platform == "linux" else [])])
def hears(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> socket.socket:
    """A socket as systemd's, whose address the environment has."""
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as ears:
        name = f"{folder}/notify" if request.param == "path" else f"@fastdiff-{os.getpid()}-{time.monotonic_ns()}"
        ears.bind(name.replace("@", "\0", 1))
        ears.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        yield ears


def test_a_state_is_one_datagram(hears: socket.socket) -> None:
    systemd.notify("READY=1")
    systemd.notify("STOPPING=1")
    assert [hears.recv(100), hears.recv(100)] == [b"READY=1", b"STOPPING=1"]


@pytest.mark.parametrize("address", [None, "", "vsock:2:1234", "/no/such/socket", "@", "/" + "x" * 200])
def test_nothing_is_sent_where_nobody_listens(address: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    if address is None:
        monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    else:
        monkeypatch.setenv("NOTIFY_SOCKET", address)
    systemd.notify("READY=1")


def test_a_full_socket_holds_nobody_up(hears: socket.socket) -> None:
    for _ in range(1000):
        systemd.notify("WATCHDOG=1")
    assert hears.recv(100) == b"WATCHDOG=1"


@pytest.mark.parametrize(
    ("environment", "seconds"),
    [
        ({}, 0.0), ({"WATCHDOG_USEC": "3000000"}, 3.0), ({"WATCHDOG_USEC": "x"}, 0.0), ({"WATCHDOG_USEC": "-1"}, 0.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "own"}, 3.0),
        ({"WATCHDOG_USEC": "3000000", "WATCHDOG_PID": "1"}, 0.0), ({"WATCHDOG_USEC": "٣"}, 0.0),
    ],
    ids=str,
)  # fmt: skip
def test_the_time_of_the_watchdog(environment: dict[str, str], seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WATCHDOG_USEC", "WATCHDOG_PID"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, str(os.getpid()) if value == "own" else value)
    assert systemd.watchdog_s() == seconds


def test_the_watchdog_is_fed_while_steps_are_taken(hears: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven looks, of which the third and the fourth find that no step is taken."""
    monkeypatch.setenv("WATCHDOG_USEC", "4000")
    monkeypatch.delenv("WATCHDOG_PID", raising=False)
    looks = iter([True, True, False, False, True, True, True])
    fed: list[bool] = []

    def alive() -> bool:
        fed.append(next(looks))  # after the last one, the task ends with an error
        return fed[-1]

    with pytest.raises(RuntimeError, match="StopIteration"):
        asyncio.run(systemd.feed_watchdog(alive))
    assert [hears.recv(100) for _ in range(5)] == [b"WATCHDOG=1"] * 5
    hears.setblocking(False)
    with pytest.raises(BlockingIOError):
        hears.recv(100)


def test_a_server_is_alive_while_it_steps_or_loads() -> None:
    supervisor = Supervisor(wire.Setup({}, None, 1.0, 10, "auto", "bitwise", "text"))
    assert supervisor.alive  # its models are being loaded
    supervisor.pulse.ready = True
    now = time.monotonic()
    supervisor.pulse.beat({"m": {"steps": 1, "waiting": 0, "running": 1, "longest_s": 0.01}}, now)
    supervisor.pulse.heard = now + 1e6  # signs of life come
    assert supervisor.alive
    supervisor.pulse.moved["m"] = (1, now - 100.0)
    assert not supervisor.alive
    assert "took no step" in supervisor.trouble
