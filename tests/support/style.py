"""Rules of style that no linter has, which CONTRIBUTING.md explains.

python -m tests.support.style fastdiff/sampler tests/sampler      # lists what breaks them, in these folders
"""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.paths import ROOT

BODY_LINES = 60  # of a function, its docstring not counted, unless a comment in it begins with LONG and says why
LONG = "# long:"
TEST_LINES = 800  # of a test file
# First words of a summary that is no sentence: a function's docstring begins with its verb.
NO_VERBS = frozenset(
    {
        *("a", "an", "the", "this", "that", "these", "those", "what", "which", "who", "whose", "whether", "where"),
        *("when", "how", "why", "as", "of", "in", "on", "at", "by", "for", "from", "to", "with", "without", "per"),
        *("all", "every", "each", "one", "two", "both", "some", "any", "its", "it", "no", "not", "only", "other"),
        *("same", "true", "false", "none"),
    }
)
FOLDERS = ("fastdiff", "kernels", "tests", "benchmarks", "examples", "recipes")

Definition = ast.FunctionDef | ast.AsyncFunctionDef


def files(folders: tuple[str, ...] = FOLDERS) -> list[Path]:
    """List the Python files of these folders, kernels/ once."""
    found = {path for folder in folders for path in (ROOT / folder).rglob("*.py")}
    return sorted(path for path in found if "fastdiff/kernels" not in path.as_posix())


def problems(path: Path) -> Iterator[str]:
    """Yield what is wrong with a file, each with its place."""
    text = path.read_text(encoding="utf-8")
    lines = text.splitlines()
    place = path.relative_to(ROOT).as_posix()
    ours = place.startswith(("fastdiff/", "kernels/"))
    if place.startswith("tests/") and len(lines) > TEST_LINES:
        yield f"{place}: {len(lines)} lines, {TEST_LINES} are allowed: split it by subject"
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, (ast.Module, ast.ClassDef, *Definition.__args__)):
            continue
        where = f"{place}:{getattr(node, 'lineno', 1)}"
        words = (ast.get_docstring(node) or "").split()
        first = words[0].strip("`*.,:;").lower() if words else ""
        if first in ("what", "of"):
            yield f"{where}: the docstring opens with {words[0]!r}; write a sentence with a verb"
        elif isinstance(node, Definition) and ours and not is_property(node) and first in NO_VERBS:
            yield f"{where}: the docstring of {node.name} opens with {words[0]!r}; begin with what it does, a verb"
        if isinstance(node, Definition) and ours:
            start = node.body[1].lineno if words and len(node.body) > 1 else node.body[0].lineno
            length = (node.end_lineno or start) - start + 1
            if length > BODY_LINES and not any(
                line.strip().startswith(LONG) for line in lines[node.lineno - 1 : start]
            ):
                yield f"{where}: {node.name} has {length} lines, {BODY_LINES} are allowed, or a comment '{LONG} why'"


def is_property(node: Definition) -> bool:
    """Return whether a decorator makes an attribute of the function."""
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


def public_problems(module: str) -> Iterator[str]:
    """Yield what the docstrings of a module's ``__all__`` lack: the sections Args and Returns of Google's style."""
    namespace = importlib.import_module(module)
    for name in namespace.__all__:
        value = getattr(namespace, name)
        origin = getattr(value, "__module__", None)
        if origin is None or not origin.startswith("fastdiff") or not callable(value):
            continue
        path = ROOT / (origin.replace(".", "/") + ".py")
        if not path.exists():
            path = ROOT / origin.replace(".", "/") / "__init__.py"
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, Definition) and node.name == name:
                yield from section_problems(f"{module}.{name}", node)
            elif isinstance(node, ast.ClassDef) and node.name == name:
                methods = [m for m in node.body if isinstance(m, Definition)]
                if not ast.get_docstring(node):
                    yield f"{module}.{name} has no docstring"
                for method in methods:
                    if not method.name.startswith("_"):
                        yield from section_problems(f"{module}.{name}.{method.name}", method)
                    elif method.name == "__init__" and parameters(method):
                        documented = f"{ast.get_docstring(node)}\n{ast.get_docstring(method) or ''}"
                        yield from missing(f"{module}.{name}", documented, parameters(method))


def section_problems(name: str, node: Definition) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text is None:
        yield f"{name} has no docstring"
        return
    if not is_property(node):
        yield from missing(name, text, parameters(node))
    returns = None if node.returns is None else ast.unparse(node.returns)
    if (
        returns not in (None, "None", "Self")
        and not is_property(node)
        and not ("Returns:" in text or "Yields:" in text)
    ):
        yield f"{name}: the docstring has no section Returns (or Yields)"


def parameters(node: Definition) -> list[str]:
    a = node.args
    names = [x.arg for x in (*a.posonlyargs, *a.args, *a.kwonlyargs)]
    return [n for n in names if n not in ("self", "cls")]


def missing(name: str, text: str, names: list[str]) -> Iterator[str]:
    if names and "Args:" not in text:
        yield f"{name}: the docstring has no section Args"
        return
    section = text.partition("Args:")[2]
    for parameter in names:
        if not any(
            line.strip().startswith((f"{parameter}:", f"{parameter} (", f"{parameter}, "))
            or f", {parameter}:" in line
            or f", {parameter}," in line
            for line in section.splitlines()
        ):
            yield f"{name}: the section Args does not name {parameter}"


PUBLIC = (
    "fastdiff", "fastdiff.solvers", "fastdiff.unet", "fastdiff.checkpoints", "fastdiff.data", "fastdiff.sampler",
    "fastdiff.backends", "fastdiff.integrations", "fastdiff.training", "fastdiff.evaluation",
)  # fmt: skip


def main(folders: list[str]) -> int:
    """Print every problem of these folders; the exit code is 1 where there is one."""
    found = [p for path in files(tuple(folders) or FOLDERS) for p in problems(path)]
    for module in PUBLIC:
        folder = module.replace(".", "/")
        if module == "fastdiff" or (folders and folder not in folders):
            continue
        if hasattr(importlib.import_module(module), "__all__"):
            found += public_problems(module)
        else:
            found.append(f"{module} has no __all__")
    print("\n".join(found))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
