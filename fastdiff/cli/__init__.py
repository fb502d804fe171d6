"""The command line, ``fastdiff sample | train | info | trilemma | convert | eval | bench``, with a module per command.

A command imports the modules that it needs when it is called, so that ``--help`` need not import torch.
"""

from __future__ import annotations

import logging
import sys
from typing import Annotated

import typer

from fastdiff import __version__
from fastdiff.cli import bench, convert, eval, info, sample, train, trilemma
from fastdiff.errors import FastdiffError

__all__ = ["app", "main"]

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Samples from diffusion U-Nets, as fast as the hardware allows.",
)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(__version__)
        raise typer.Exit


# In the order in which --help lists them.
for command in (sample.sample, train.train, info.info, trilemma.trilemma, convert.convert, eval.eval, bench.bench):
    app.command()(command)


def main() -> None:
    """Run the command line; fastdiff's own errors and those of files are one line on standard error, exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except (FastdiffError, OSError) as e:
        print(f"error: {e}", file=sys.stderr)
        sys.exit(2)
