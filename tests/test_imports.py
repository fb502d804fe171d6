"""The import order of the package, and the cost of importing it."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import fastdiff

REPOSITORY = Path(__file__).resolve().parent.parent
MODULES = 8  # the most that may lie directly in fastdiff/; others belong into a package

# A room is a module or a package in fastdiff/. It may import itself and the rooms listed above it, but none below it.
ORDER = (
    "errors",
    "files",
    "memory",
    "checks",
    "modes",
    "text",
    "schedule",
    "solvers",
    "unet",
    "checkpoints",
    "data",
    "core",
    "kernels",
    "_native",  # csrc/
    "backends",
    "sampler",
    "integrations",
    "training",
    "bulk",
    "bench",
    "evaluation",
    "serving",
    "cli",
    "__main__",
)
# The exceptions: UNet.from_pretrained and UNet.save_pretrained call checkpoints, which imports UNet.
FORWARDS = {("unet", "checkpoints")}
WHERE = "ORDER in tests/test_imports.py"


def is_type_checking(test: ast.expr) -> bool:
    return ast.unparse(test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def runtime_imports(node: ast.AST, package: str) -> Iterator[str]:
    """Yield the full names that `node` imports when it runs, within functions too; `package` resolves relative ones."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        base = importlib.util.resolve_name("." * node.level + (node.module or ""), package)
        yield from (f"{base}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.If) and is_type_checking(node.test):
        for child in node.orelse:
            yield from runtime_imports(child, package)
    else:
        for child in ast.iter_child_nodes(node):
            yield from runtime_imports(child, package)


def violations(source: str, module: str) -> Iterator[str]:
    """Yield the forbidden imports of `source`, the text of the file `module` ("fastdiff.sampler.sampler").

    The name of a package's own file is, for example, "fastdiff.training.__init__".
    """
    own = module.split(".")[1]
    if own != "__init__" and own not in ORDER:
        yield f"fastdiff.{own} has no place in the import order: add it to {WHERE}"
        return
    earlier = set(ORDER[: ORDER.index(own)]) if own in ORDER else set()
    for name in runtime_imports(ast.parse(source), package=module.rpartition(".")[0]):
        root, _, rest = name.partition(".")
        if root != "fastdiff" or rest == "__version__":
            continue
        target = fastdiff._EXPORTS.get(rest, fastdiff._MODULES.get(rest, name)).partition(".")[2].partition(".")[0]
        if target in ("", "*"):
            yield f"{module} imports all of fastdiff: name the module that it needs"
        elif target not in ORDER:
            yield f"{module} imports {name}, which has no place in the import order: add it to {WHERE}"
        elif target != own and target not in earlier and (own, target) not in FORWARDS:
            yield f"{module} imports {name}, but fastdiff.{target} comes after fastdiff.{own} in {WHERE}"


def test_modules_import_only_earlier_ones():
    found = []
    package = REPOSITORY / "fastdiff"
    # fastdiff/kernels is a link to kernels/, which rglob does not follow before Python 3.13.
    files = {*package.rglob("*.py"), *(package / "kernels").rglob("*.py")}
    assert package / "kernels" / "launch.py" in files
    for path in sorted(files):
        module = ".".join(path.relative_to(REPOSITORY).with_suffix("").parts)
        found += violations(path.read_text(encoding="utf-8"), module)
    assert not found, "\n" + "\n".join(found)


def test_few_modules_lie_outside_rooms():
    modules = [*(REPOSITORY / "fastdiff").glob("*.py")]  # the stub of the extension is no module
    assert len(modules) <= MODULES, sorted(path.name for path in modules)


@pytest.mark.parametrize("name", fastdiff._MODULES)
def test_modules_keep_their_former_names(name):
    assert getattr(fastdiff, name) is sys.modules[fastdiff._MODULES[name]]


def test_checkpoint_keeps_its_functions():
    from fastdiff import checkpoint

    functions = {"load", "Pretrained", "builtin_models", "schedule_of", "read_scheduler", "load_weights"}
    functions |= {"save_unet", "save_folder", "save_pipeline"}
    assert functions <= set(checkpoint.__all__)
    assert all(callable(getattr(checkpoint, name)) for name in functions)


@pytest.mark.parametrize(
    ("module", "source", "allowed"),
    [
        ("sampler", "from fastdiff.solvers import StepTable", True),
        ("sampler", "from fastdiff import StepTable, __version__", True),
        ("sampler", "from .solvers import StepTable", True),
        ("sampler", "import torch, fastdiff.unet", True),
        ("solvers", "from fastdiff.sampler import Sampler", False),
        ("solvers", "from fastdiff import Sampler", False),
        ("solvers", "from .sampler import Sampler", False),
        ("solvers", "import fastdiff.sampler", False),
        ("solvers", "def f():\n    from fastdiff import sampler", False),
        ("solvers", "try:\n    import fastdiff.cli\nexcept ImportError: pass", False),
        ("solvers", "if TYPE_CHECKING:\n    from fastdiff.sampler import Sampler", True),
        ("solvers", "if TYPE_CHECKING:\n    pass\nelse:\n    import fastdiff.sampler", False),
        ("training.trainer", "from fastdiff.data.datasets import load", True),
        ("training.trainer", "from .data import load", True),
        ("training.trainer", "from ..cli import main", False),
        ("training.__init__", "from .trainer import Trainer", True),
        ("__init__", "from fastdiff.errors import FastdiffError", False),
        ("cli", "import fastdiff", False),
        ("cli", "from fastdiff import *", False),
        ("cli", "from fastdiff.unheard_of import x", False),
        ("unheard_of", "", False),
    ],
)
def test_violations_are_found(module, source, allowed):
    assert (not list(violations(source, f"fastdiff.{module}"))) == allowed


def run_python(code: str) -> str:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout


NOTHING_HEAVY = """
heavy = {"torch", "numpy", "triton", "PIL", "safetensors", "diffusers"} & set(sys.modules)
assert not heavy, f"imported {sorted(heavy)}"
"""


def test_import_is_light():
    run_python("import sys, fastdiff" + NOTHING_HEAVY)


def test_help_is_light():
    code = """
import sys
from fastdiff.cli import main
sys.argv = ["fastdiff", "--help"]
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
"""
    assert "Usage" in run_python(code + NOTHING_HEAVY)


@pytest.mark.parametrize("name", fastdiff.__all__)
def test_public_names_resolve(name):
    assert getattr(fastdiff, name) is not None
    assert name in dir(fastdiff)


def test_unknown_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'sampel'"):
        fastdiff.sampel  # noqa: B018 - the access is the test


def test_works_without_triton():
    run_python(
        """
import sys
sys.modules["triton"] = None
import fastdiff, fastdiff.cli, fastdiff.kernels.launch
for name in fastdiff.__all__:
    getattr(fastdiff, name)
"""
    )
