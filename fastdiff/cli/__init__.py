"""The command line, ``fastdiff sample | train | generate | ...``, with a module per command.

A command imports the modules that it needs when it is called, so that ``--help`` need not import torch.
"""

from __future__ import annotations

import contextlib
import logging
import sys
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from fastdiff import __version__
from fastdiff.cli import bench, convert, eval, export, generate, info, sample, serve, train, trilemma, verify
from fastdiff.errors import FastdiffError, printable

__all__ = ["app", "main"]


class _Commands(TyperGroup):
    """Commands whose errors about arguments are printable, whatever the arguments are."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        with _printable_errors():
            return super().parse_args(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        with _printable_errors():
            return super().invoke(ctx)


@contextlib.contextmanager
def _printable_errors() -> Iterator[None]:
    try:
        yield
    except Exception as e:  # typer's errors about arguments, whose class depends on its version, have a message
        if isinstance(getattr(e, "message", None), str):
            e.message = printable(e.message)  # type: ignore[attr-defined]  # the line above looked
        raise


app = typer.Typer(
    cls=_Commands,
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
for command in (
    sample.sample, generate.generate, verify.verify, export.export, train.train, info.info, trilemma.trilemma,
    convert.convert, eval.eval, bench.bench, serve.serve,
):  # fmt: skip
    app.command()(command)


def main() -> None:
    """Run the command line; fastdiff's own errors and those of files are one line on standard error, exit code 2."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        app()
    except (FastdiffError, OSError) as e:
        print(f"error: {e if isinstance(e, FastdiffError) else printable(e)}", file=sys.stderr)
        sys.exit(2)
