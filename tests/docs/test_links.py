"""The links, paths and names in the README, in CONTRIBUTING.md and in docs/ exist."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

from tests.docs.pages import EXAMPLES, PAGES, blocks, name, prose
from tests.support.paths import ROOT

NAV = ROOT / "mkdocs.yml"
README_LINES = 120
TOP = {"fastdiff", "kernels", "csrc", "tests", "benchmarks", "recipes", "examples", "docs", ".ci"}


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them."""
    titles = re.findall(r"^#+ (.+)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_links(page: Path) -> None:
    """Relative links and their anchors exist; pages of docs/ link only to docs/, as the site has nothing else."""
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name(page)}: {link}"
        if page.is_relative_to(ROOT / "docs"):
            assert target.is_relative_to(ROOT / "docs"), f"{name(page)}: {link} is not on the site"
        if anchor:
            assert anchor in anchors(target), f"{name(page)}: {link}"


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_paths(page: Path) -> None:
    """A path of the repository in a sentence or a table exists, unless it is an example that a guide adds."""
    for path in re.findall(r"`(\.?\w[\w.-]*/[\w./-]*)`", prose(page)):
        if path.split("/")[0] in TOP and not any(example in path for example in EXAMPLES):
            assert (ROOT / path).exists(), f"{name(page)}: {path}"


def resolve(dotted: str) -> object:
    """Return the object of a dotted name: an attribute of the longest prefix that is a module."""
    module, *attributes = dotted.split(".")
    found: object = importlib.import_module(module)
    while attributes:
        try:
            found = importlib.import_module(f"{module}.{attributes[0]}")
        except ModuleNotFoundError:
            break
        module = f"{module}.{attributes.pop(0)}"
    for attribute in attributes:
        found = getattr(found, attribute)
    return found


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_names(page: Path) -> None:
    """Dotted names of fastdiff in a sentence, a table, a reference or a directive of the API pages exist."""
    text = prose(page)
    pattern = r"`(fastdiff(?:\.[a-zA-Z_]\w*)+)(?:\([^`]*\))?`|\]\[(fastdiff[\w.]+)\]|^::: (fastdiff[\w.]+)$"
    for match in re.finditer(pattern, text, re.MULTILINE):
        resolve(next(filter(None, match.groups())))


def test_every_page_is_in_the_navigation() -> None:
    """mkdocs builds every page of docs/, and every page that its navigation lists is there."""
    listed = set(re.findall(r"[\w/-]+\.md", NAV.read_text(encoding="utf-8")))
    assert listed == {
        page.relative_to(ROOT / "docs").as_posix() for page in PAGES if page.is_relative_to(ROOT / "docs")
    }


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= README_LINES


def test_blocks_are_found() -> None:
    """The parser finds a block for each pair of fences."""
    for page in PAGES:
        assert 2 * len(blocks(page)) == len(re.findall(r"^ *```", page.read_text(encoding="utf-8"), re.MULTILINE))
    assert sum(len(blocks(page)) for page in PAGES) > 30
