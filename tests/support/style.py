"""Check the rules of style that no linter has and CONTRIBUTING.md explains.

python -m tests.support.style fastdiff/sampler tests/sampler      # lists what breaks them, in these folders
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

FOLDERS = ("fastdiff", "kernels", "tests", "benchmarks", "examples", "recipes")
# Packages whose ``__all__`` is public: its functions and classes need the sections of Google's style.
PUBLIC = (
    "fastdiff", "fastdiff.solvers", "fastdiff.unet", "fastdiff.checkpoints", "fastdiff.data", "fastdiff.sampler",
    "fastdiff.backends", "fastdiff.integrations", "fastdiff.training", "fastdiff.evaluation", "fastdiff.bulk",
)  # fmt: skip
BODY_LINES = 60  # of a function without its docstring, unless a comment in it begins with LONG and says why
LONG = "# long: "
TEST_LINES = 800  # of a file in tests/
# First words of a docstring that is no sentence. The docstring of a function begins with a verb.
NO_SENTENCE = frozenset({"what", "of"})
NO_VERBS = NO_SENTENCE | {
    *("a", "an", "the", "this", "that", "these", "those", "which", "who", "whose", "whether", "where", "when", "how"),
    *("why", "as", "in", "on", "at", "by", "for", "from", "to", "with", "without", "per", "all", "every", "each"),
    *("one", "two", "both", "some", "any", "its", "it", "no", "not", "only", "other", "same", "true", "false", "none"),
}

FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
Function = ast.FunctionDef | ast.AsyncFunctionDef


def files(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """List the Python files in these folders (or files) of the repository."""
    found: set[Path] = set()
    for folder in folders:
        path = ROOT / folder
        found |= {path} if path.is_file() else set(path.rglob("*.py"))
    # fastdiff/kernels is a link to kernels/.
    return sorted(path for path in found if not path.relative_to(ROOT).as_posix().startswith("fastdiff/kernels/"))


def problems(path: Path, root: Path = ROOT) -> Iterator[str]:
    """Yield the violations in a file: docstrings without a verb, long functions, long test files."""
    place = path.relative_to(root).as_posix()
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    if place.startswith("tests/") and len(lines) > TEST_LINES:
        yield f"{place}: {len(lines)} lines, {TEST_LINES} are allowed: split it by subject"
    shipped = place.startswith(("fastdiff/", "kernels/"))
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, *FUNCTIONS)):
            continue
        where = f"{place}:{getattr(node, 'lineno', 1)}"
        is_function = isinstance(node, FUNCTIONS)
        opening = (ast.get_docstring(node) or "").partition(" ")[0].partition("\n")[0]
        first = opening.strip("`*.,:;").lower()
        if first in NO_SENTENCE:
            yield f"{where}: the docstring opens with {opening!r}; write a sentence with a verb"
        elif is_function and shipped and not is_property(node) and (first in NO_VERBS or opening.startswith("`")):
            yield f"{where}: the docstring of {node.name} opens with {opening!r}; begin with what it does, a verb"
        if is_function and shipped and body_lines(node) > BODY_LINES:
            body = lines[node.lineno : node.end_lineno]
            if not any(line.strip().startswith(LONG) for line in body):
                length = body_lines(node)
                yield f"{where}: {node.name} has {length} lines, {BODY_LINES} are allowed, or a comment '{LONG}why'"


def body_lines(node: Function) -> int:
    """Count the lines of a function's body without its docstring."""
    statements = node.body[1:] if ast.get_docstring(node) is not None else node.body
    return (node.end_lineno or 0) - statements[0].lineno + 1 if statements else 0


def is_property(node: Function) -> bool:
    """Return whether a decorator turns the function into an attribute."""
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


# Public names ---------------------------------------------------------------------------------------------------------


def public_problems(module: str) -> Iterator[str]:
    """Yield what the docstrings of the functions and classes in a module's ``__all__`` lack."""
    namespace = importlib.import_module(module)
    if not hasattr(namespace, "__all__"):
        yield f"{module} has no __all__"
        return
    for name in namespace.__all__:
        value = getattr(namespace, name)
        origin = getattr(value, "__module__", None) or ""
        if callable(value) and origin.partition(".")[0] == "fastdiff":
            source = Path(sys.modules[origin].__file__ or "").read_text(encoding="utf-8")
            yield from definition_problems(source, name, origin)


def definition_problems(source: str, name: str, module: str) -> Iterator[str]:
    """Yield what the docstring of one function or class in ``source`` lacks, and those of a class's public methods."""
    for node in ast.parse(source).body:
        if isinstance(node, FUNCTIONS) and node.name == name:
            yield from function_problems(f"{module}.{name}", node)
        elif isinstance(node, ast.ClassDef) and node.name == name:
            yield from class_problems(f"{module}.{name}", node)


def class_problems(name: str, node: ast.ClassDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text is None:
        yield f"{name} has no docstring"
        return
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        yield from undocumented(name, text, public_fields(node))
    for method in node.body:
        if not isinstance(method, FUNCTIONS) or is_variant(method):
            continue
        if method.name == "__init__":
            yield from undocumented(name, f"{text}\n\n{ast.get_docstring(method) or ''}", parameters(method))
        elif not method.name.startswith("_"):
            yield from function_problems(f"{name}.{method.name}", method)


def function_problems(name: str, node: Function) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text is None:
        yield f"{name} has no docstring"
    elif not is_property(node):
        yield from undocumented(name, text, parameters(node))
        returns = None if node.returns is None else ast.unparse(node.returns)
        if returns not in (None, "None", "NoReturn", "Self") and not {"Returns", "Yields"} & sections(text).keys():
            yield f"{name}: the docstring has no section Returns (or Yields)"


def is_variant(node: Function) -> bool:
    """Return whether a function only adds to another of its name: a property's setter, or an overload."""
    decorators = [ast.unparse(decorator) for decorator in node.decorator_list]
    return any(d.endswith((".setter", ".deleter", "overload")) for d in decorators)


def parameters(node: Function) -> list[str]:
    """List the parameters of a function without self, cls, ``*args`` and ``**kwargs``."""
    a = node.args
    return [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs) if x.arg not in ("self", "cls")]


def public_fields(node: ast.ClassDef) -> list[str]:
    """List the fields of a dataclass whose names do not begin with "_"."""
    fields = [x for x in node.body if isinstance(x, ast.AnnAssign) and isinstance(x.target, ast.Name)]
    names = [x.target.id for x in fields if isinstance(x.target, ast.Name) and "ClassVar" not in ast.unparse(x)]
    return [name for name in names if not name.startswith("_")]


def undocumented(name: str, text: str, names: list[str]) -> Iterator[str]:
    """Yield a problem for every one of ``names`` that the sections Args and Attributes of a docstring lack."""
    found = sections(text)
    entries = [*found.get("Args", []), *found.get("Attributes", [])]
    if names and not entries:
        yield f"{name}: the docstring has no section Args"
        return
    # An entry is "name: text", "name (type): text", or "one, other: text", indented once.
    heads = [m[1] for line in entries if (m := re.match(r" {4}(\*{0,2}\w[^:(]*?)(?: \(.*?\))?:", line))]
    documented = {word.strip("*` ") for head in heads for word in head.split(",")}
    for missing in names:
        if missing not in documented:
            yield f"{name}: the section Args does not name {missing}"


def sections(text: str) -> dict[str, list[str]]:
    """Split a docstring into its sections: the lines under each heading such as "Args:"."""
    found: dict[str, list[str]] = {}
    current: list[str] = []
    for line in text.splitlines():
        if re.fullmatch(r"[A-Z][a-z]+:", line):
            current = found.setdefault(line[:-1], [])
        elif line and not line.startswith(" "):
            current = []
        else:
            current.append(line)
    return found


def main(folders: list[str]) -> int:
    """Print every violation in these folders, or in all; return 1 if there is one, else 0."""
    chosen = [Path(folder) for folder in folders or FOLDERS]
    found = [p for path in files(tuple(map(str, chosen))) for p in problems(path)]
    for module in PUBLIC:
        folder = Path(*module.split("."))
        if any(folder.is_relative_to(c) for c in chosen):
            found += public_problems(module)
    for problem in dict.fromkeys(found):  # a name may be public in two packages
        print(problem)
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
