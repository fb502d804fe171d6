"""Captions of a folder of images: a text file beside each image, or one file of JSON lines, as image folders have."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from fastdiff.checks import shown
from fastdiff.errors import DataError, InvalidArgument, printable

BESIDE = "txt"
MOST_BYTES, MOST_TABLE = 1 << 16, 1 << 30  # of a caption's file, and of a table


def read_captions(root: Path, files: Sequence[Path], kind: str) -> tuple[str, ...]:
    """Return the caption of each image file.

    Args:
        root: The folder.
        files: The images.
        kind: "txt" for a text file beside each image, of its name with that ending; or the name of a file in the
            folder, such as "metadata.jsonl", with a JSON object in each line: {"file_name": "a/1.png", "text": ".."}.

    Returns:
        The captions, in the order of the files, without white space around them.

    Raises:
        InvalidArgument: If ``kind`` is neither.
        DataError: If a caption is missing or cannot be read; the message says how many are.
    """
    if kind == BESIDE:
        found = {path: _read(path.with_suffix(".txt"), MOST_BYTES) for path in set(files) if _has(path)}
        need = "a text file of its name, as 1.txt beside 1.png"
    elif isinstance(kind, str) and kind.endswith(".jsonl"):
        found = _table(root, root / kind)
        need = f"a line of {printable(kind)}"
    else:
        raise InvalidArgument(
            f"captions={shown(kind)}: 'txt', for a text file beside each image, or the name of a .jsonl file in the "
            "folder is needed"
        )
    missing = [path for path in files if not found.get(path, "").strip()]
    if missing:
        raise DataError(
            f"{printable(root)}: {len(missing)} of {len(files)} images have no caption, the first is "
            f"{printable(missing[0].relative_to(root))}; each needs {need}"
        )
    return tuple(found[path].strip() for path in files)


def _has(path: Path) -> bool:
    return path.with_suffix(".txt").is_file()


def _read(path: Path, most: int) -> str:
    try:
        if path.stat().st_size > most:
            raise DataError(f"{printable(path)} has more than {most} bytes, so it is no caption or table of captions")
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise DataError(f"{printable(path)} cannot be read as UTF-8 text: {e}") from e


def _table(root: Path, path: Path) -> dict[Path, str]:
    """Read a file of JSON lines: the caption of each file, by its path."""
    found = {}
    for number, line in enumerate(_read(path, MOST_TABLE).splitlines(), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
            name, text = entry["file_name"], entry["text"]
            if not isinstance(name, str) or not isinstance(text, str):
                raise TypeError("they are no texts")
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            raise DataError(
                f'{printable(path)}, line {number}: an object with "file_name" and "text" is needed ({shown(str(e))})'
            ) from e
        found[root / name] = text
    return found
