"""``fastdiff export`` writes the images of a bulk job in other programs' forms."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fastdiff.cli.options import JsonOption
from fastdiff.errors import printable


def export(
    source: Annotated[Path, typer.Argument(metavar="DIR", help="A folder of `fastdiff generate`.")],
    adm: Annotated[
        Path | None, typer.Option(help="Write this .npz, which the evaluator of guided-diffusion (ADM) reads.")
    ] = None,
    folder: Annotated[
        Path | None,
        typer.Option(help="Write PNGs and a metadata.jsonl into this folder: clean-fid, torch-fidelity, imagefolder."),
    ] = None,
    webdataset: Annotated[Path | None, typer.Option(help="Write WebDataset's tars into this folder.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Write the images of a finished job as other programs read them; every shard is compared with its SHA-256.

    Examples:

    fastdiff export runs/fashion --adm samples.npz

    fastdiff export runs/fashion --folder pngs
    """
    import json

    from fastdiff import bulk

    bulk.export(source, adm=adm, folder=folder, webdataset=webdataset)
    written = {"adm": adm, "folder": folder, "webdataset": webdataset}
    if as_json:
        print(json.dumps({name: None if path is None else str(path) for name, path in written.items()}))
        return
    for path in written.values():
        if path is not None:
            print(printable(path))
