"""Every call of the system that writes fails in turn: the error names the file, and each file is the old or the new."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.checkpoints import run_python

# Counts the calls of this process that create, write, sync or rename files, and lets one of them fail.
SHIM = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static long left = -1, seen = 0;
static int failure = 0;

void arm(long at, int code) { left = at; failure = code; seen = 0; }
long disarm(void) { left = -1; return seen; }

static int fails(void) {
    if (left < 0) return 0;
    seen++;
    if (left > 0 && --left == 0) { left = 0; errno = failure; return 1; }
    return 0;
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
ssize_t write(int f, const void *b, size_t n) { return fails() ? -1 : REAL(write)(f, b, n); }
int fsync(int f) { return fails() ? -1 : REAL(fsync)(f); }
int rename(const char *a, const char *b) { return fails() ? -1 : REAL(rename)(a, b); }
int mkdir(const char *a, mode_t m) { return fails() ? -1 : REAL(mkdir)(a, m); }
int open(const char *a, int flags, ...) {
    va_list rest; va_start(rest, flags); int mode = (flags & O_CREAT) ? va_arg(rest, int) : 0; va_end(rest);
    return (flags & O_CREAT) && fails() ? -1 : REAL(open)(a, flags, mode);
}
int open64(const char *a, int flags, ...) {
    va_list rest; va_start(rest, flags); int mode = (flags & O_CREAT) ? va_arg(rest, int) : 0; va_end(rest);
    return (flags & O_CREAT) && fails() ? -1 : REAL(open64)(a, flags, mode);
}
"""

CHILD = """
import ctypes, errno, json, sys
from pathlib import Path
import numpy, torch
import fastdiff
from fastdiff.checkpoints import convert, save_folder
from fastdiff.data.pictures import animate, to_pil
from fastdiff.errors import FastdiffError
from fastdiff.files import write_text
from fastdiff.sampler.output import SampleOutput
from fastdiff.schedule import NoiseSchedule
from fastdiff.training import resume
from tests.support.unets import TINY, random_unet

shim = ctypes.CDLL(sys.argv[1])
root = Path(sys.argv[2])
unets = [random_unet(TINY, seed=s) for s in (1, 2)]
moments = torch.nn.Linear(2, 2)
optimizer = torch.optim.AdamW(moments.parameters())
outputs = [SampleOutput(torch.full((2, 3, 40, 40), v), 0, 0, None, 1, None) for v in (0.0, 0.5)]
save_folder(root / "source", unets[0], NoiseSchedule())

def checkpoint(i, folder):
    torch.nn.init.constant_(moments.weight, i)
    resume.save(folder / "checkpoint.safetensors", moments, moments, optimizer, {"step": i})

operations = {
    "grid": lambda i, folder: outputs[i].save(folder / "a.png"),
    "arrays": lambda i, folder: outputs[i].save(folder / "a.npz"),
    "folder of pictures": lambda i, folder: outputs[i].save(folder / "images"),
    "animation": lambda i, folder: animate(to_pil(outputs[i].images), folder / "a.gif"),
    "model": lambda i, folder: save_folder(folder / "model", unets[i], NoiseSchedule()),
    "training checkpoint": checkpoint,
    "JSON of a result": lambda i, folder: write_text(folder / "trilemma.json", json.dumps([i] * 5000)),
}

def files(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}

counts = {}
for name, operation in operations.items():
    states = []
    for i in (0, 1):
        folder = root / f"{name} {i}"
        folder.mkdir()
        shim.arm(0, 0)
        operation(i, folder)
        counts[name] = shim.disarm()
        states.append(files(folder))
    folder = root / f"{name} 0"
    for at in range(1, counts[name] + 1):
        for code in (errno.ENOSPC, errno.EIO) if at % 3 == 0 else (errno.ENOSPC,):
            operation(0, folder)
            assert files(folder) == states[0], (name, at)
            shim.arm(at, code)
            try:
                operation(1, folder)
                error = None
            except FastdiffError as e:
                error = str(e)
            finally:
                shim.disarm()
            found = files(folder)
            assert found.keys() == states[0].keys(), (name, at, found.keys())
            for key, content in found.items():
                assert content in (states[0][key], states[1][key]), (name, at, key)
            if error is None:  # as where a folder that is there already cannot be made
                assert found == states[1], (name, at)
            else:
                reason = {errno.ENOSPC: "No space left", errno.EIO: "Input/output error"}[code]
                assert str(folder) in error and "written" in error and reason in error, (name, at, error)
print(json.dumps(counts))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or shutil.which("cc") is None, reason="needs Linux and a C compiler")
def test_every_call_that_writes_fails_in_turn(tmp_path: Path) -> None:
    (tmp_path / "shim.c").write_text(SHIM)
    shim = tmp_path / "shim.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", str(shim), str(tmp_path / "shim.c"), "-ldl"], check=True)
    (tmp_path / "out").mkdir()
    code = f"import os, sys\nif 'LD_PRELOAD' not in os.environ:\n    os.environ['LD_PRELOAD'] = {str(shim)!r}\n"
    code += "    os.execv(sys.executable, [sys.executable, '-c', *sys.argv[3:], *sys.argv[1:3]])\n"
    counts = json.loads(run_python(code, shim, tmp_path / "out", CHILD).stdout)
    assert all(count >= 4 for count in counts.values()), counts  # each opens, writes, syncs and renames
