"""Start Python processes quickly: each is a fork of a server that has imported torch and fastdiff.

``run`` and ``Process`` take what follows ``python`` in a shell: ``-m module``, ``-c code`` or a script, and arguments.
Only the imports, seconds of each process, are saved: a process has its own arguments, environment, folder and
streams, and ends as any other does. Tests of what is imported, and of how processes start, need real ones.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import types
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from tests.support.paths import ROOT


@cache
def server() -> socket.socket:
    """Start the server, which ends with this process; return the socket that takes requests."""
    mine, its = socket.socketpair()
    with its:
        subprocess.Popen([sys.executable, "-m", __name__, str(its.fileno())], pass_fds=[its.fileno()], cwd=ROOT)
    return mine


class Process:
    """A process that runs; ``returncode`` is None until ``communicate`` has returned."""

    def __init__(
        self, *arguments: Any, cwd: str | os.PathLike[str] | None = None, env: Mapping[str, str] | None = None
    ) -> None:
        self.args = [*map(str, arguments)]
        self.returncode: int | None = None
        self._streams = [tempfile.TemporaryFile() for _ in range(2)]  # noqa: SIM115  communicate() closes them
        self._status, its = os.pipe()
        with tempfile.TemporaryFile() as request:
            settings = {"argv": self.args, "cwd": str(cwd or Path.cwd()), "env": dict(env or os.environ)}
            request.write(json.dumps(settings).encode())
            request.seek(0)
            files = [request.fileno(), *(stream.fileno() for stream in self._streams), its]
            socket.send_fds(server(), [b"!"], files)
        os.close(its)
        self.pid = int(self._line(60))

    def _line(self, timeout: float) -> bytes:
        """Return the next line that the process's parent writes: the process's number, then its exit code."""
        if not select.select([self._status], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        line = os.read(self._status, 16)
        assert line, f"the server of processes failed: {self.args}"
        return line

    def send_signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def communicate(self, timeout: float = 600) -> tuple[str, str]:
        """Wait until the process ends; return its output and its standard error."""
        try:
            self.returncode = int(self._line(timeout))
        except subprocess.TimeoutExpired:
            self.send_signal(signal.SIGKILL)
            raise
        os.close(self._status)
        texts = []
        for stream in self._streams:
            with stream:
                stream.seek(0)
                texts.append(stream.read().decode())
        return texts[0], texts[1]


def run(
    *arguments: Any,
    cwd: str | os.PathLike[str] | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = 600,
) -> subprocess.CompletedProcess[str]:
    """Run a process to its end."""
    process = Process(*arguments, cwd=cwd, env=env)
    out, error = process.communicate(timeout)
    assert process.returncode is not None
    return subprocess.CompletedProcess(process.args, process.returncode, out, error)


def serve(channel: socket.socket) -> dict[str, Any] | None:
    """Fork for each request; return it in the process that shall run it, and None where there are no more."""
    while True:
        message, files, *_ = socket.recv_fds(channel, 1, 4)
        if not message:
            return None
        with contextlib.suppress(ChildProcessError):  # those that have ended leave the list of processes
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        if os.fork() == 0:
            pid = os.fork()
            request, out, error, status = files
            if pid == 0:
                with open(request) as file:
                    settings = json.load(file)
                os.dup2(out, 1)
                os.dup2(error, 2)
                for number in (out, error, status):
                    os.close(number)
                channel.close()
                return settings
            os.write(status, b"%d\n" % pid)
            code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
            os.write(status, b"%d\n" % code)
            os._exit(0)
        for number in files:
            os.close(number)


def program(request: dict[str, Any]) -> None:
    """Run what Python would run with these arguments, in a new module __main__."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a background shell ignores Ctrl-C for its children
    folders = [folder for folder in request["env"].get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:0] = [folder for folder in folders if folder not in sys.path]
    option, *rest = request["argv"]
    if option == "-m":
        sys.argv = rest
        sys.path.insert(0, request["cwd"])
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    elif option == "-c":
        code, *arguments = rest
        sys.argv = ["-c", *arguments]
        sys.path.insert(0, "")
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(code, "<string>", "exec"), main.__dict__)
    else:
        sys.argv = [option, *rest]
        sys.path.insert(0, str(Path(option).resolve().parent))
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    import torch
    import torch._dynamo  # what a first step imports

    gc.collect()
    gc.freeze()  # collections in a copy need not touch, and so copy, all the memory of these modules
    assert torch.get_num_threads() == 1, "no thread may run where a process is forked"
    while (wanted := serve(socket.socket(fileno=int(sys.argv[1])))) is not None:
        program(wanted)
        break
