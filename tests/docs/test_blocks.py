"""Every code block of the README, of CONTRIBUTING.md and of docs/ is run, or its commands are checked.

The Python blocks of a page are run in order, in one namespace and an empty folder. A block of text right below one of
them must be what it prints. Commands of fastdiff are run, or, where that takes long, parsed by the real command line;
other commands must name targets, extras and files that exist.
"""

from __future__ import annotations

import contextlib
import io
import json
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel
from PIL import Image
from typer.testing import CliRunner

from fastdiff import NoiseSchedule, checkpoints, cli
from fastdiff.serving.requests import read_generation
from tests.docs.pages import EXAMPLES, PAGES, blocks, name, prose
from tests.support.captioned import network_and_encoder
from tests.support.paths import ROOT
from tests.support.pipelines import pipeline as text_pipeline

GROUP = typer.main.get_command(cli.app)

# Commands that are parsed only, by how they begin, and why. All others of fastdiff are run.
PARSED = {
    "fastdiff bench": "measures for minutes",
    "fastdiff convert cifar10": "needs the result of the next one",
    "fastdiff convert ddpm.ckpt": "needs a published checkpoint",
    "fastdiff eval": "needs Fashion-MNIST's files",
    "fastdiff generate fashion-mnist --n 50000 --steps 10 --ray": "needs Ray; make bulk-check has it",
    "fastdiff serve": "answers until it is ended; tests/serving has it",
    "fastdiff train": "trains for hours",
    "fastdiff trilemma": "draws and measures for minutes to hours",
}
# Replaces options of ``fastdiff sample``, so that it takes seconds: the last of two equal options counts.
SHORT = {"--n": "2", "--per-class": "1"}
STEPS = ["--steps", "2"]


def pipeline_folder(path: str) -> None:
    """Write a diffusers pipeline with a tiny U-Net of random weights."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    DDIMPipeline(unet=unet.eval(), scheduler=DDIMScheduler()).save_pretrained(path)


def photos() -> None:
    """Write a data set of two classes in the folder photos, and a gray picture."""
    rng = np.random.default_rng(0)
    for label in ("cats", "dogs"):
        Path("photos", label).mkdir(parents=True)
        for i in range(8):
            Image.fromarray(rng.integers(0, 256, (10, 12, 3), dtype=np.uint8)).save(f"photos/{label}/{i}.png")
    Image.fromarray(rng.integers(0, 256, (10, 12), dtype=np.uint8)).save("gray.png")


def captioned() -> None:
    """Write a model that reads texts in the folder runs/captions, and a pipeline of Stable Diffusion."""
    unet, encoder = network_and_encoder()
    checkpoints.save_folder("runs/captions", unet, NoiseSchedule(), text_encoder=encoder)
    text_pipeline(Path("words")).save_pretrained("path/to/sd")


# Makes the files that a page's examples read.
PREPARE: dict[str, Callable[[], None]] = {
    "docs/diffusers.md": lambda: pipeline_folder("path/to/ddim"),
    "docs/sampling.md": lambda: pipeline_folder("path/to/ddpm"),
    "docs/text.md": captioned,
    "docs/training.md": photos,
}


def commands(text: str) -> Iterator[list[str]]:
    """Yield the words of each command of a shell block; comments are dropped, continued lines are joined."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words:
            yield words


def parse(words: list[str]) -> None:
    """Parse the arguments of ``fastdiff`` by the command line itself; an option that does not exist is an error."""
    command, *options = words
    GROUP.commands[command].make_context(command, options)


def check_options(words: list[str]) -> None:
    """Check that a command of fastdiff and its options exist; values may be missing, as sentences leave them out."""
    command, *options = words
    if command.startswith("-") or command == "COMMAND":
        assert words[-1] in ("--help", "--version"), words
        return
    known = {option for p in GROUP.commands[command].params for option in (*p.opts, *p.secondary_opts)}
    assert {word for word in options if word.startswith("-")} <= known | {"--help"}, words


def run(words: list[str]) -> None:
    """Run ``fastdiff`` with these arguments in the current folder; samples are few, of two steps."""
    if words[0] == "generate":
        words = [*words, "--n", "4", "--steps", "1", "--workers", "1"]
    if words[0] == "sample":
        words = [*words, *STEPS, *(word for option in SHORT if option in words for word in (option, SHORT[option]))]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 0, (words, result.output, result.exception)


def targets() -> set[str]:
    return set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def check(words: list[str]) -> None:
    """Check that another program's command names targets, extras and files that exist."""
    program, *arguments = words
    if program == "make":
        asked = {word for word in arguments if "=" not in word}
        assert asked <= targets(), asked - targets()
    elif arguments[:1] == ["install"] and program == "pip":
        extras = re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
        for wanted in arguments[1:]:
            found = re.fullmatch(r"\.(\[(\w+)\])?", wanted)
            assert found, f"{wanted} is not this repository"
            assert found[2] is None or found[2] in extras, f"there is no extra {found[2]}"
    elif program in ("torchrun", "ray"):
        parse(arguments[arguments.index("fastdiff") + 1 :])
    elif program == "sbatch":
        parse(shlex.split(arguments[-1])[1:])
    elif program == "kubectl":
        manifest = (ROOT / arguments[-1]).read_text(encoding="utf-8")
        parse(json.loads(re.findall(r"command: (\[.*\])", manifest)[0])[1:])
    elif program == "curl":
        assert "/v1/images/generations" in arguments[0]
        read_generation(arguments[-1].encode())
    elif program in ("python", "pytest"):
        for word in arguments:
            assert (ROOT / word).exists() or not ("/" in word or word.endswith(".py")) or "=" in word, word
    else:
        assert (ROOT / program).is_file(), f"{program}: an unknown command; add its check here"


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=name)
def test_blocks(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a page from top to bottom."""
    monkeypatch.chdir(tmp_path)
    PREPARE.get(name(page), lambda: None)()
    namespace: dict[str, object] = {"__name__": "__main__"}
    printed, end = "", 0
    for block in blocks(page):
        where = f"{name(page)}:{block.first}"
        if block.language == "python":
            stdout = io.StringIO()
            with contextlib.redirect_stdout(stdout):
                exec(compile("\n" * block.first + block.text, where, "exec"), namespace)
            printed, end = stdout.getvalue(), block.last
        elif block.language == "sh":
            for words in commands(block.text):
                words[0] = words[0].removeprefix(".venv/bin/")
                if words[0] != "fastdiff":
                    check(words)
                elif any(shlex.join(words).startswith(prefix) for prefix in PARSED) or set(words) & set(EXAMPLES):
                    parse(words[1:])
                else:
                    run(words[1:])
        elif block.language == "text":
            if block.first == end + 2:
                assert block.text == printed, f"{where}: not what the block above prints"
        else:
            pytest.fail(f"{where}: language {block.language!r} has no test; use python, sh or text")


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_in_sentences(page: Path) -> None:
    """A sentence or a table names only commands and options of fastdiff, and targets of make, that exist."""
    for text in re.findall(r"`([^`]+)`", prose(page)):
        words = text.replace("[", "").replace("]", "").split()
        if words[0] == "fastdiff" and len(words) > 1:
            check_options(words[1:])
        elif words[0] == "make" and len(words) > 1:
            check(words)


def test_no_exception_is_stale() -> None:
    """Every entry of PREPARE and PARSED belongs to a page or a command that exists."""
    assert PREPARE.keys() <= {name(page) for page in PAGES}
    written = [shlex.join(w) for p in PAGES for b in blocks(p) if b.language == "sh" for w in commands(b.text)]
    for prefix in PARSED:
        assert any(command.startswith(prefix) for command in written), prefix
