"""The files of a folder of images: which are images by their name, and which are left out."""

from __future__ import annotations

import dataclasses
import os
from collections import Counter
from pathlib import Path

from fastdiff.data.pixels import why

# The suffix decides whether a file is opened; the format is then read from its content.
SUFFIXES = frozenset(
    {
        ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff",
        ".ppm", ".pgm", ".pbm", ".pnm",
    }
)  # fmt: skip


@dataclasses.dataclass
class Scan:
    """The contents of a folder, searched recursively; links are followed, each folder once."""

    root: Path
    images: list[Path] = dataclasses.field(default_factory=list)  # files with the suffix of an image, sorted
    folders: list[Path] = dataclasses.field(default_factory=list)  # all sub-folders that were searched
    skipped: list[tuple[Path, str]] = dataclasses.field(default_factory=list)
    others: Counter[str] = dataclasses.field(default_factory=Counter)  # files of other suffixes, by suffix
    hidden: int = 0  # hidden files and folders

    @classmethod
    def of(cls, root: Path) -> Scan:
        """Search a folder."""
        scan = cls(root)
        seen: dict[tuple[int, int], Path] = {}

        def failed(error: OSError) -> None:
            scan.skipped.append((Path(error.filename), why(error)))

        for folder, subfolders, names in os.walk(root, followlinks=True, onerror=failed):
            here = Path(folder)
            try:
                info = os.stat(folder)
            except OSError as error:
                failed(error)
                subfolders.clear()
                continue
            key = (info.st_dev, info.st_ino)
            if os.name != "nt" and key in seen:  # a link back to a parent would never end
                scan.skipped.append((here, f"a link to {seen[key]}, whose images are there already"))
                subfolders.clear()
                continue
            seen[key] = here
            scan.folders.append(here)
            scan.hidden += sum(name.startswith(".") for name in (*subfolders, *names))
            subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
            for name in names:
                if not name.startswith("."):
                    scan._add(here / name)
        scan.images.sort(key=lambda path: path.relative_to(root).parts)
        if scan.others:
            scan.skipped.append((root, f"{scan.other_files()}: files whose names do not end as those of images do"))
        return scan

    def _add(self, path: Path) -> None:
        if path.suffix.lower() not in SUFFIXES:
            self.others[path.suffix.lower()] += 1
            return
        try:
            regular, link = path.is_file(), path.is_symlink()
        except OSError as error:
            self.skipped.append((path, why(error)))
            return
        if regular:
            self.images.append(path)
        else:
            self.skipped.append((path, "a link to nothing, or to no regular file" if link else "not a regular file"))

    def facts(self) -> list[str]:
        """Return sentences about the files that are not named one by one."""
        return [f"{self.hidden} hidden files or folders were not searched"] if self.hidden else []

    def other_files(self) -> str:
        """List the numbers of files by suffix, the most frequent first."""
        order = sorted(self.others.items(), key=lambda entry: (-entry[1], entry[0]))
        return ", ".join(f"{n} {suffix or 'without suffix'}" for suffix, n in order[:8])

    def instead(self) -> str:
        """Say what a folder without images contains instead."""
        return f"; it holds {self.other_files()}" if self.others else ""
