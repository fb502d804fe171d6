"""``fastdiff verify`` checks the images of a bulk job."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import JsonOption
from fastdiff.errors import printable


def verify(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of `fastdiff generate`.")],
    fraction: Annotated[
        float | None, typer.Option(help="Also draw this share of the images again, as 0.01, and compare them.")
    ] = None,
    redraw: Annotated[bool, typer.Option("--redraw", help="Draw missing and damaged shards anew.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Compare every shard of a job with its SHA-256; exit code 1 if one is missing or damaged and was not redrawn.

    Examples:

    fastdiff verify runs/fashion

    fastdiff verify runs/fashion --fraction 0.01 --redraw
    """
    from fastdiff import bulk

    result = bulk.verify(folder, fraction=fraction, redraw=redraw)
    if as_json:
        problems = {f"{shard:06d}": text for shard, text in result.problems.items()}
        shown = {"folder": str(folder), "images": result.images, "shards": result.shards, "problems": problems,
                 "redrawn": [f"{shard:06d}" for shard in result.redrawn], "compared": result.compared,
                 "good": result.good}  # fmt: skip
        print(json.dumps(shown))
    else:
        for shard, text in result.problems.items():
            mended = "; drawn anew" if shard in result.redrawn else ""
            print(printable(f"shard {shard:06d}: {text}{mended}"))
        again = f", {result.compared} images drawn again" if result.compared else ""
        state = "all good" if result.good else f"{len(result.problems)} shards are not good (--redraw mends them)"
        print(f"{printable(folder)}: {result.images} images in {result.shards} shards{again}: {state}")
    sys.exit(0 if result.good else 1)
