"""A real ``fastdiff serve`` in processes of its own, for tests."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import torch

from fastdiff import NoiseSchedule, checkpoint
from tests.support.captioned import network_and_encoder
from tests.support.paths import ROOT
from tests.support.unets import TINY_CLASSES, random_unet

LONG = 120.0  # seconds for which a test waits for what should come soon
# Made-up measurements: solver, steps, guidance, distance. The second has no advantage.
MEASURED = (("ddim", 2, 1.0, 9.0), ("euler", 3, 1.0, 9.5), ("unipc", 4, 1.0, 5.0), ("ddim", 5, 2.0, 7.0))
NAN_CLASS = 3  # of the model: its images become NaN


def save_model(path: Path) -> str:
    """Write a tiny network of four classes; one of them has an embedding that overflows."""
    unet = random_unet(TINY_CLASSES)
    with torch.no_grad():
        unet.class_embedding.weight[NAN_CLASS] = 3e38
    checkpoint.save_folder(path, unet, NoiseSchedule("linear", 1000))
    points = [
        {"options": {"solver": solver, "steps": steps, "guidance": guidance}, "nfe": steps * (1 + (guidance != 1)),
         "at_n": {"frechet": {"value": far, "low": far, "high": far}, "recall": {"value": 0.5}}}
        for solver, steps, guidance, far in MEASURED
    ]  # fmt: skip
    measured = {"format": 1, "model": checkpoint.weights_digest(unet.state_dict()), "n": 100, "points": points}
    (path / "trilemma.json").write_text(json.dumps(measured))
    return str(path)


def save_text_model(path: Path) -> str:
    """Write a tiny network that reads text, with its encoder."""
    unet, encoder = network_and_encoder()
    checkpoint.save_folder(path, unet, NoiseSchedule("linear", 1000), text_encoder=encoder)
    return str(path)


def until(condition: Callable[[], Any]) -> Any:
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + LONG
    while not (value := condition()):
        assert time.monotonic() < end, "what a test waits for does not come"
        time.sleep(0.02)
    return value


def alive(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


class Served:
    """A server. It has a group of processes of its own, as one that is started by a terminal has.

    ``heard`` has what it has said to systemd, which this object is to it.
    """

    def __init__(
        self, folder: Path, *arguments: str, module: str = "fastdiff", environment: Mapping[str, str] | None = None
    ):
        self.heard: list[str] = []
        address = f"fastdiff-{os.getpid()}-{time.monotonic_ns()}"
        self.systemd = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self.systemd.bind(f"\0{address}")
        self.systemd.setblocking(False)
        # A quarter of the time of the watchdog is longer than any test: one message comes at the start.
        self.environment = {
            "NOTIFY_SOCKET": f"@{address}", "WATCHDOG_USEC": "4000000000", **(environment or {}),
        }  # fmt: skip
        self.log = folder / f"log-{time.monotonic_ns()}.txt"
        self.out = self.log.with_suffix(".out")
        with self.log.open("wb") as log, self.out.open("wb") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-m", module, "serve", *arguments, "--port", "0"],
                stdout=out, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True, cwd=ROOT,
                env={**os.environ, **self.environment},
            )  # fmt: skip
        until(lambda: self.process.poll() is not None or b" at http" in self.out.read_bytes())
        assert self.process.poll() is None, self.log.read_text()
        self.url = self.out.read_text().rpartition(" at ")[2].strip()
        self.http = httpx.Client(base_url=self.url, timeout=LONG)

    def says(self, message: str) -> bool:
        """Return whether the server has said this to systemd."""
        with contextlib.suppress(BlockingIOError):
            while True:
                self.heard.append(self.systemd.recv(1000).decode())
        return message in self.heard

    def engine(self) -> int:
        """Return the number of the drawing process."""
        for child in Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text().split():
            with contextlib.suppress(OSError):
                if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                    return int(child)
        return 0

    def group(self) -> list[int]:
        """Return the numbers of all processes of the server."""
        found = []
        for path in Path("/proc").glob("[0-9]*/stat"):
            with contextlib.suppress(OSError):
                state, _, group = path.read_text().rpartition(")")[2].split()[:3]
                if int(group) == self.process.pid and state != "Z":
                    found.append(int(path.parent.name))
        return found

    def draw(self, **fields: Any) -> httpx.Response:
        """Ask for images."""
        return self.http.post("/v1/images/generations", json=fields)

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels; ``name`` may have a label in braces."""
        lines = self.http.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith((f"{name} ", f"{name}{{")))

    def running(self) -> float:
        """Return the number of images in flight."""
        return self.metric("fastdiff_images_running")

    def wait(self) -> int:
        """Wait for the end of the server; return its exit code."""
        return self.process.wait(LONG)

    def end(self) -> None:
        """End all processes."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(LONG)
        self.http.close()
        self.systemd.close()
