"""Sentences about a data set: what was done with its images, and what is doubtful, with what settles it."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastdiff.data.pixels import Header, Reading
from fastdiff.data.scan import Scan
from fastdiff.errors import DataError, FastdiffError, InvalidArgument, printable

ALPHA_DOUBT = (
    'is composited over white; alpha="white" accepts that, "black" takes black, "drop" takes the colours of the file'
)
FULL = {"8-bit": 255, "uint8": 255, "16-bit": 65535, "16-bit colour": 255}  # the whole range of a kind of values


@dataclasses.dataclass
class Look:
    """The values of the images that were decoded when data were opened."""

    values: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)  # extremes, by `Header.depth`
    images: int = 0  # how many were looked at
    kinds: set[bytes] = dataclasses.field(default_factory=set)  # digests of those that differ

    def add(self, depth: str, low: float, high: float) -> None:
        """Count the extremes of an image's values."""
        least, most = self.values.get(depth, (low, high))
        self.values[depth] = (min(least, low), max(most, high))

    def add_digest(self, digest: bytes) -> None:
        """Count an image by the digest of its pixels."""
        self.images += 1
        self.kinds.add(digest)

    def ranges(self) -> list[str]:
        """Return the ranges of the values that the files hold, before they become bytes."""
        texts = []
        for depth, (low, high) in sorted(self.values.items()):
            # Of 16-bit colour the high bytes are read.
            low, high = (low * 257, high * 257) if depth == "16-bit colour" else (low, high)
            texts.append(f"{depth}: {low:g} to {high:g}")
        return texts

    def doubts(self, reading: Reading) -> list[str]:
        """Return what is doubtful about the values."""
        found = [] if reading.value_range is not None else [*self._dark()]
        if reading.value_range is not None and len(self.values) > 1:
            kinds = ", ".join(sorted(self.values))
            found.append(
                f"value_range= is applied to images of several kinds alike: {kinds}; separate them if it is not"
            )
        if self.images > 1 and len(self.kinds) <= self.images // 2:
            found.append(f"only {len(self.kinds)} of {self.images} images looked at differ; remove the copies")
        return found

    def _dark(self) -> list[str]:
        found = []
        for depth, (_, high) in sorted(self.values.items()):
            full = FULL.get(depth)
            if full is None or not 0 < high < (full // 2 + 1 if depth.startswith("16") else 32):
                continue
            bits = (1 << int(high).bit_length()) - 1
            if depth == "16-bit colour":
                found.append(
                    f"16-bit colour reaches {high * 257:.0f} of 65535 in the images looked at, so that few of "
                    "its bits are used; convert the files to 8 bits"
                )
            else:
                found.append(
                    f"{depth} values reach {high:g} of {full} in the images looked at; value_range=(0, {bits}) "
                    f"makes {bits} white, (0, {full}) accepts dark images"
                )
        return found


def digest_of(pixels: np.ndarray) -> bytes:
    """Return a digest of an image's pixels, by which copies are found."""
    return hashlib.blake2b(np.ascontiguousarray(pixels).data, digest_size=16).digest()


def options_of(reading: Reading, fit: str) -> dict[str, Any]:
    """Return the choices that change pixels, ready for JSON, without those that are left to their defaults."""
    given = {key: value for key, value in dataclasses.asdict(reading).items() if value is not None}
    return {"fit": fit, **{key: list(v) if isinstance(v, tuple) else v for key, v in given.items()}}


def header_doubts(heads: Sequence[tuple[Path, Header]], reading: Reading, channels: int | None) -> list[str]:
    """Return what is doubtful about the files of a folder, as far as their headers tell."""
    n, found = len(heads), []
    several = [(path, head) for path, head in heads if head.frames > 1]
    if several and reading.frames is None:
        path, head = several[0]
        found.append(
            f"{len(several)} of {n} files have several pages or frames (the first, {path.name}: {head.frames}), of "
            'which the first alone is used; frames="all" uses them all, frames="first" accepts that'
        )
    clear = sum(head.alpha for _, head in heads)
    if clear and reading.alpha is None:
        found.append(f"{clear} of {n} images have an alpha channel, which {ALPHA_DOUBT}")
    profiles = Counter(head.profile for _, head in heads if head.profile is not None)
    if profiles and reading.profile is None:
        names = ", ".join(f"{count} {name}" for name, count in profiles.most_common(4))
        found.append(
            f"{profiles.total()} of {n} images are CMYK or have another colour profile than sRGB ({names}), which is "
            'ignored; profile="srgb" converts by it, profile="ignore" accepts that'
        )
    colour = sum(head.channels == 3 for _, head in heads)
    if channels is None and 0 < colour < n:
        found.append(
            f"{colour} of {n} images have colour, the others are gray and are repeated in three channels; channels=3 "
            "accepts that, channels=1 makes all of them gray"
        )
    return found


def picture_doubts(head: Header, values: np.ndarray, channels: int) -> list[str]:
    """Return what happens to one picture that becomes an image of so many channels, other than its fitting."""
    found = [f"it has {head.frames} pages or frames, of which the first alone is used"] if head.frames > 1 else []
    found += ["its alpha channel is composited over white"] if head.alpha and channels in (1, 3) else []
    found += [f"its colours are {head.profile}, which is ignored"] if head.profile is not None else []
    found += ["its colours become gray"] if head.channels == 3 and channels in (1, 2) else []
    high = float(values[..., :3].max()) * (257 if head.depth == "16-bit colour" else 1)
    if head.depth.startswith("16") and 0 < high < 32768:
        found.append(f"its 16-bit values reach {high:g} of 65535 alone, so that it is dark")
    return found


def header_facts(heads: Sequence[tuple[Path, Header]], size: tuple[int, int], fit: str) -> list[str]:
    """Return what is done with the files of a folder."""
    sizes = [head.size for _, head in heads]
    (h, w), (H, W) = min(sizes, key=math.prod), max(sizes, key=math.prod)
    found = [f"files of {h}x{w}" + (f" to {H}x{W}" if (h, w) != (H, W) else "")]
    fitted = [own for own in sizes if own != size]
    if fitted:
        cut = sum(own[0] * size[1] != own[1] * size[0] for own in fitted)
        what = f"{cut} cut to the aspect of" if fit == "crop" else f"{len(fitted)} padded with black to"
        shrunk = sum(min(own[0] / size[0], own[1] / size[1]) > 1 for own in fitted)
        found += [f"{shrunk} shrunk"] if fit == "crop" and shrunk else []
        found += [f"{what} {size[0]}x{size[1]}"] if fit == "pad" or cut else []
    turned = sum(head.turned for _, head in heads)
    return found + ([f"{turned} turned upright as EXIF says"] if turned else [])


def check_names(
    names: Sequence[str] | None, error: type[FastdiffError] = InvalidArgument, what: str = "class_names"
) -> tuple[str, ...] | None:
    """Return the names of classes as a tuple; raise ``error`` unless they are strings, not empty, and all different."""
    if names is None:
        return None
    if isinstance(names, str) or not isinstance(names, Sequence) or not names:
        raise error(f"{what}={str(names)[:80]!r}: a list of strings, a name for each class, is needed")
    for name in names:
        if not isinstance(name, str) or not name or len(name) > 1000:
            raise error(f"{what}: {str(name)[:80]!r} is no name; strings that are not empty are needed")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise error(f"{what}: {twice[0]!r} is there twice")
    return tuple(names)


def gap_doubts(labels: torch.Tensor | None, classes: int | None, class_names: tuple[str, ...] | None) -> list[str]:
    """Return what is doubtful about the labels of an array: numbers that no image has."""
    if labels is None or class_names is not None or classes is None:
        return []
    missing = (torch.bincount(labels, minlength=classes) == 0).nonzero()[:, 0].tolist()
    if not missing:
        return []
    listed = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return [
        f"{len(missing)} of the labels 0 to {classes - 1} have no image ({listed}); class_names= with a name for each "
        "label accepts that, class_depth=0 ignores the labels"
    ]


def find_classes(
    root: Path, scan: Scan, files: Sequence[Path], depth: int | None, class_names: tuple[str, ...] | None
) -> tuple[tuple[str, ...] | None, torch.Tensor | None, list[str]]:
    """Return the names of the classes, the class of each of ``files``, and what is doubtful about them.

    The names come from all images of ``scan``, so that the classes keep their numbers when an image is damaged.
    """
    parts = [path.relative_to(root).parts for path in scan.images]
    n, loose = len(parts), sum(len(part) == 1 for part in parts)
    levels = (0 if loose else 1) if depth is None else depth
    short = next((path for path, part in zip(scan.images, parts, strict=True) if len(part) <= levels), None)
    if short is not None:
        raise DataError(f"{root}: class_depth={depth} needs {depth} levels of sub-folders; {short} lies higher")
    if levels == 0:
        if class_names is not None:
            raise InvalidArgument(f"class_names= needs a class for every image, but {loose or n} of {n} have none")
        mixed = depth is None and 0 < loose < n
        doubt = f"{loose} of {n} images lie in no sub-folder: no class labels; class_depth=0 accepts that"
        return None, None, [doubt] if mixed else []

    def named(path: Path) -> str:
        return "/".join(path.relative_to(root).parts[:levels])

    there = sorted({named(path) for path in scan.images})
    names = class_names or tuple(there)
    number = {name: i for i, name in enumerate(names)}
    unknown = sorted({named(path) for path in files} - number.keys())
    if unknown:
        raise DataError(f"{root}: the sub-folder {printable(unknown[0])} has images, but is not in class_names=")
    labels = torch.tensor([number[named(path)] for path in files], dtype=torch.int64, device="cpu")
    if class_names is not None:
        return names, labels, []
    counts = torch.bincount(labels, minlength=len(names)).tolist()
    unused = [name for name, count in zip(names, counts, strict=True) if count == 0]
    empty = sorted(
        {named(folder) for folder in scan.folders if len(folder.relative_to(root).parts) == levels} - {*names}
    )
    doubts = []
    if unused:
        doubts.append(f"no usable image in class {', '.join(unused)}; class_names= without it leaves it out")
    if empty:
        doubts.append(f"no image in the sub-folder {', '.join(empty)}, which is no class; class_names= makes it one")
    deeper = [path for path, part in zip(scan.images, parts, strict=True) if len(part) > levels + 1]
    if deeper and depth is None:
        doubts.append(
            f"{len(deeper)} of {n} images lie deeper than the classes, the sub-folders of the first level (one is "
            f"{deeper[0].relative_to(root)}); class_depth=1 accepts that, class_depth=2 names classes by two levels"
        )
    if len(names) == 1 and depth is None:
        doubts.append(f"all images lie in {names[0]}, one class; class_depth=0 trains without classes, 1 accepts it")
    if all(name.isdecimal() for name in names) and any(int(name) != i for i, name in enumerate(names)):
        i = next(i for i, name in enumerate(names) if int(name) != i)
        doubts.append(
            f"the sub-folders are numbers, but class {i} is named {names[i]}; class_names= sets another order"
        )
    return names, labels, doubts
