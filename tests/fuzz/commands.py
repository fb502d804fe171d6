"""Run commands of the command line in this process, with texts of a corpus in place of their arguments and options."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import io
import json
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import typer

from fastdiff import cli
from tests.fuzz.harness import MOST_SECONDS, deadline
from tests.support.unets import TINY, random_unet

TEXTS = [
    "", " ", "0", "1", "-1", "2", "3", "999", "2147483648", "18446744073709551616", "1" * 5000, "0.5", "-0.5", "1e300",
    "1e-300", "nan", "inf", "-inf", "true", "None", "auto", "x", "x,y", "1,2", "1,,2", ",", "0,0", "2x2", "8x8", "0x10",
    "1_000", "\u0663", "\u00b2", "+1", "a" * 5000, "\x1b[31m\n", "\udc80", "caf\u00e9", "/dev/null", "/dev/full",
    "absent", "absent.npz", "a/b/c.png", "x.json", "x.gif", "x.safetensors", "x.onnx", "~", "*", "linear", "native",
    "eager", "cpu", "cuda", "cuda:7", "mps", "float16", "float64", "npz", "png", "cycle", "none", "ddpm", "lcm",
    "learned_range", "leading", "karras", "diffusers", "first", "srgb", "drop", "crop", "NCHW", "v_prediction", "fp32",
    "concat", "cosine", "#0", "#9", "#",
]  # fmt: skip


class Reached(Exception):
    """Marks that all arguments of a command were accepted, in place of what takes long."""


def _reached(*_: Any, **__: Any) -> None:
    raise Reached


def _fit(trainer: Any, on_start: Any = None, accept_changes: bool = False) -> None:
    if on_start is not None:
        on_start()
    raise Reached


LONG = {  # functions that take minutes where the arguments are sound
    "fastdiff.bench.run._measure_batch": _reached,
    "fastdiff.bench.command.whole_job": _reached,
    "fastdiff.bench.command.native_profile": _reached,
    "fastdiff.bulk.local.run": _reached,
    "fastdiff.evaluation.trilemma.run.draw": _reached,
    "fastdiff.serving.server._serve": _reached,
    "fastdiff.training.trainer.Trainer.fit": _fit,
}


@functools.cache
def model() -> Path:
    """Return a small model's folder, beside images and a finished job; they are there as long as the process."""
    import fastdiff
    from fastdiff import bulk
    from fastdiff.checkpoints import save_folder

    kept = tempfile.TemporaryDirectory()
    model.kept = kept  # type: ignore[attr-defined]
    path = Path(kept.name)
    config = dataclasses.replace(TINY, in_channels=1, out_channels=1, sample_size=32)  # as fashion-mnist's judge needs
    save_folder(path / "model", random_unet(config), fastdiff.NoiseSchedule("linear"))
    np.savez(path / "images.npz", np.random.default_rng(0).integers(0, 256, (256, 32, 32, 1), dtype=np.uint8))
    bulk.generate(path / "model", 3, path / "job", steps=1, shard_size=2, workers=1)
    return path / "model"


def commands() -> dict[str, list[str]]:
    """Return, for each command, arguments that it accepts."""
    at, out = str(model()), str(model().parent)
    images = f"{out}/images.npz"
    return {
        "sample": [at, "--n", "1", "--steps", "2", "--backend", "eager", "--out", f"{out}/x.png"],
        "generate": [at, "--n", "2", "--steps", "2", "--out", f"{out}/new-job"],
        "verify": [f"{out}/job"],
        "export": [f"{out}/job", "--adm", f"{out}/adm-{time.time_ns()}.npz"],
        "train": [images, "--out", f"{out}/run", "--channels", "8,8", "--groups", "4", "--steps", "2"],
        "info": [at],
        "trilemma": [at, "--out", f"{out}/trilemma", "--data", images, "--quick"],
        "convert": [at, f"{out}/converted.safetensors"],
        "eval": [at, "--data", images, "--n", "32", "--steps", "2"],
        "bench": [at, "--quick", "--batches", "1"],
        "serve": [at, "--port", "0"],
    }


@functools.cache
def options() -> dict[str, list[tuple[str, bool]]]:
    """Return the options of each command, as the command line itself lists them, and whether each is a flag."""
    found: Any = typer.main.get_command(cli.app)
    return {
        name: [(p.opts[0], p.is_flag) for p in command.params if p.opts[0].startswith("-") and p.opts[0] != "--compile"]
        for name, command in found.commands.items()
    }


def changed(command: str, arguments: Sequence[str], choose: random.Random) -> list[str]:
    """Return arguments of which one to three are replaced, or to which options are added."""
    found = list(arguments)
    for _ in range(choose.randint(1, 3)):
        name, flag = choose.choice(options()[command])
        if choose.random() < 0.1:
            found[choose.randrange(len(found))] = choose.choice(TEXTS)
        elif flag:
            found.append(name)
        else:
            found += [name, choose.choice(TEXTS)]  # the last one counts
    return [command, *found]


@contextlib.contextmanager
def _cut() -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name, replacement in LONG.items():
            stack.enter_context(mock.patch(name, replacement))
        yield


def ends(arguments: Sequence[str]) -> tuple[int, str, str]:
    """Run the command line up to what takes long; return its exit code and what it wrote to the two streams."""
    out, err, code = io.StringIO(), io.StringIO(), 0
    try:
        with (
            deadline(MOST_SECONDS),
            mock.patch.object(sys, "argv", ["fastdiff", *arguments]),
            contextlib.redirect_stdout(out),
            contextlib.redirect_stderr(err),
            _cut(),
        ):
            cli.main()
    except Reached:
        pass
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 0 if e.code is None else 1
    return code, out.getvalue(), err.getvalue()


def failure(arguments: Sequence[str]) -> str | None:
    """Run the command line; return what is wrong with how it ended, or None."""
    problem = None
    try:
        code, out, err = ends(arguments)
    except BaseException as e:
        where = traceback.extract_tb(e.__traceback__)[-1]
        problem = f"{type(e).__name__} ({Path(where.filename).name}:{where.lineno}): {str(e)[:120]!r}"
    else:
        problem = _problem(code, out, err, "--json" in arguments)
    return None if problem is None else f"{[a[:60] for a in arguments]}: {problem}"


def _problem(code: int, out: str, err: str, as_json: bool) -> str | None:
    if code not in (0, 1, 2, 3):
        return f"exit code {code}"
    if code in (2, 3) and not err.strip():
        return f"exit code {code} without a word"
    if any(ord(c) < 32 and c not in "\r\n\t" for c in out + err):
        return "control characters in the output"
    if code == 2 and len(out + err) > 9000:  # typer repeats a value in full, in a frame
        return f"an error of {len(out + err)} characters"
    return _not_json(out) if code == 0 and as_json and out else None


def _not_json(text: str) -> str | None:
    def constant(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        json.loads(text, parse_constant=constant)
    except ValueError as e:
        return f"the output is not one JSON object: {e}"
    return None
