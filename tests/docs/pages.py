"""The pages of the documentation, and their code blocks."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from tests.support.paths import ROOT

# Names that the guides of docs/ add as an example; files and solvers called so do not exist.
EXAMPLES = ("toy_euler", "kernels/scale.")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclasses.dataclass(frozen=True)
class Block:
    """A fenced code block: its language, its text, and the first and last line of the page that it occupies."""

    language: str
    text: str
    first: int
    last: int


def name(page: Path) -> str:
    """Return a page's path in the repository; the tests' id."""
    return page.relative_to(ROOT).as_posix()


def blocks(page: Path) -> list[Block]:
    """Return every fenced code block of a page, those that are indented in a list included."""
    found: list[Block] = []
    opened: tuple[str, str, int] | None = None
    lines: list[str] = []
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        fence = re.fullmatch(r"( *)```(.*)", line)
        if fence is None:
            lines.append(line)
        elif opened is None:
            opened, lines = (fence[1], fence[2].strip(), number), []
        else:
            indent, language, first = opened
            text = "\n".join(line.removeprefix(indent) for line in lines)
            found.append(Block(language, f"{text}\n", first, number))
            opened = None
    assert opened is None, f"{name(page)}:{opened and opened[2]}: the code block is not closed"
    return found


def prose(page: Path) -> str:
    """Return a page without its fenced code blocks."""
    return re.sub(r"^ *```.*?^ *```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
