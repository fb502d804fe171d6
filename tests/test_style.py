"""The rules of style hold in every file, and their violations are found."""

from __future__ import annotations

import textwrap

import pytest

from tests.support.paths import ROOT
from tests.support.style import (
    BODY_LINES,
    FOLDERS,
    PUBLIC,
    TEST_LINES,
    definition_problems,
    files,
    problems,
    public_problems,
    sections,
)


def test_every_file_follows_the_rules():
    found = [problem for path in files() for problem in problems(path)]
    assert not found, "\n" + "\n".join(found)


@pytest.mark.parametrize("module", PUBLIC)
def test_public_names_are_documented(module):
    found = list(public_problems(module))
    assert not found, "\n" + "\n".join(found)


# The rules themselves -------------------------------------------------------------------------------------------------


def test_files_are_found_once():
    found = files()
    assert len(found) == len(set(found))
    assert ROOT / "kernels" / "launch.py" in found
    assert not [path for path in found if path.is_relative_to(ROOT / "fastdiff" / "kernels")]
    assert {path.relative_to(ROOT).parts[0] for path in found} == set(FOLDERS)
    assert files(("fastdiff/unet/", "fastdiff/checks.py")) == [
        ROOT / "fastdiff" / "checks.py",
        *sorted((ROOT / "fastdiff" / "unet").glob("*.py")),
    ]


def check(tmp_path, source, place):
    path = tmp_path / place
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(textwrap.dedent(source), encoding="utf-8")
    return [problem.removeprefix(place) for problem in problems(path, tmp_path)]


def function(docstring, decorator=""):
    return f'{decorator}\ndef f(x):\n    """{docstring}"""\n    return x\n'


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ('"""What this is."""\n', ["1: the docstring opens with 'What'"]),
        ('class A:\n    """Of something."""\n', ["1: the docstring opens with 'Of'"]),
        (function("What it returns."), ["2: the docstring opens with 'What'"]),
        (function("The value."), ["2: the docstring of f opens with 'The'"]),
        (function("``x`` again."), ["the docstring of f opens with '``x``'"]),
        (function("Whether it is so.", "@cached_property"), []),
        (function("Return the value."), []),
        (function("\n    Every\n    value.\n"), ["the docstring of f opens with 'Every'"]),
        ('class A:\n    """The class."""\n', []),
        ('def f():\n    def g():\n        """A value."""\n', ["the docstring of g opens with 'A'"]),
        ("async def f():\n    '''Of it.'''\n", ["the docstring opens with 'Of'"]),
        ("def f():\n    return 1\n", []),
    ],
)
def test_docstrings_without_verbs_are_found(tmp_path, source, words):
    found = check(tmp_path, source, "fastdiff/a.py")
    assert len(found) == len(words)
    assert all(word in problem for word, problem in zip(words, found, strict=True))
    elsewhere = check(tmp_path, source, "tests/a.py")
    assert elsewhere == [problem for problem in found if "the docstring opens" in problem]


def test_long_functions_are_found(tmp_path):
    def source(lines, comment="", docstring='    """Do it.\n\n    At length.\n    """\n'):
        return f"def f(\n    x,\n):\n{docstring}{comment}" + "    x += 1\n" * lines

    assert check(tmp_path, source(BODY_LINES), "fastdiff/a.py") == []
    assert check(tmp_path, source(BODY_LINES, docstring=""), "kernels/a.py") == []
    (found,) = check(tmp_path, source(BODY_LINES + 1), "fastdiff/a.py")
    assert "f has 61 lines, 60 are allowed" in found
    assert len(check(tmp_path, source(BODY_LINES + 1, docstring=""), "kernels/a.py")) == 1
    assert check(tmp_path, source(BODY_LINES + 1, "    # long: one formula\n"), "fastdiff/a.py") == []
    assert check(tmp_path, source(BODY_LINES + 1, "    x += 1\n    # long: one formula\n"), "fastdiff/a.py") == []
    assert len(check(tmp_path, source(BODY_LINES + 1, "    # long:\n"), "fastdiff/a.py")) == 1
    assert check(tmp_path, source(BODY_LINES + 1), "tests/a.py") == []


def test_long_test_files_are_found(tmp_path):
    assert check(tmp_path, "x = 1\n" * TEST_LINES, "tests/a/test_a.py") == []
    assert check(tmp_path, "x = 1\n" * (TEST_LINES + 1), "fastdiff/a.py") == []
    (found,) = check(tmp_path, "x = 1\n" * (TEST_LINES + 1), "tests/a/test_a.py")
    assert "801 lines, 800 are allowed" in found


DOCUMENTED = '''
@dataclasses.dataclass(frozen=True)
class Point:
    """A point.

    Attributes:
        x, y: Coordinates: two numbers.
        label (str): Its name.
    """

    x: float
    y: float
    label: str = ""
    _cache: int = 0

    @property
    def norm(self) -> float:
        """Distance from the origin."""

    @norm.setter
    def norm(self, value): ...

    def moved(self, *by: float, scale: float = 1.0, **options: float) -> Self:
        """Move the point.

        Args:
            *by: Distances.
            scale: Factor; see below:
                more
            **options: Ignored.
        """

    def _private(self, x): ...


class Line:
    """A line.

    Args:
        start: One end.
    """

    def __init__(self, start: Point, end: Point):
        """Make a line.

        Args:
            end: The other end.
        """


def points(n: int) -> Iterator[Point]:
    """Yield points.

    Args:
        n: Their number.

    Yields:
        Point: Another point.
    """


def nothing() -> None:
    """Do nothing."""
'''


@pytest.mark.parametrize("name", ["Point", "Line", "points", "nothing"])
def test_complete_docstrings_pass(name):
    assert list(definition_problems(DOCUMENTED, name, "m")) == []


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        (
            "Point",
            ("        x, y: Coordinates: two numbers.\n", ""),
            ["m.Point: the section Args does not name x", "y"],
        ),
        ("Point", ("        label (str): Its name.\n", "\n    label: no entry\n"), ["does not name label"]),
        ("Point", ("    label: str", "    colour: int\n    label: str"), ["does not name colour"]),
        ("Point", ('"""Distance from the origin."""', "..."), ["m.Point.norm has no docstring"]),
        ("Point", ("            scale: Factor; see below:\n", "            by scale:\n"), ["does not name scale"]),
        ("Point", ("            scale: Factor", "                scale: Factor"), ["does not name scale"]),
        ("Point", ("-> Self", "-> Point"), ["m.Point.moved: the docstring has no section Returns"]),
        ("Line", ("        start: One end.\n", ""), ["m.Line: the section Args does not name start"]),
        ("Line", ("        end: The other end.\n", ""), ["m.Line: the section Args does not name end"]),
        ("points", ("    Args:\n        n: Their number.\n", ""), ["m.points: the docstring has no section Args"]),
        ("points", ("        n: Their number.\n", ""), ["m.points: the section Args does not name n"]),
        ("points", ("    Yields:\n        Point:", "    Raises:\n        Point:"), ["has no section Returns"]),
        ("points", ("    Args:\n        n: Their number.\n", "    Raises:\n        n: No.\n"), ["no section Args"]),
        ("nothing", ("-> None", "-> int"), ["m.nothing: the docstring has no section Returns"]),
        ("nothing", ('    """Do nothing."""', "    pass"), ["m.nothing has no docstring"]),
    ],
)
def test_incomplete_docstrings_are_found(name, change, expected):
    assert DOCUMENTED.count(change[0]) >= 1
    found = list(definition_problems(DOCUMENTED.replace(*change, 1), name, "m"))
    assert len(found) == len(expected), found
    assert all(words in problem for words, problem in zip(expected, found, strict=True))


def test_sections_end_at_text_that_is_not_indented():
    text = "Summary.\n\nArgs:\n    x: One.\n\nMore text:\n    y: Two.\n\nReturns:\n    A value."
    assert sections(text) == {"Args": ["    x: One.", ""], "Returns": ["    A value."]}


def test_packages_without_public_names_are_found():
    assert list(public_problems("fastdiff.errors")) == ["fastdiff.errors has no __all__"]
