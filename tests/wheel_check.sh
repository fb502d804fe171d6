#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs that into a new environment, and uses it from another folder.
# A native engine that cannot be built is an error here, unless FASTDIFF_NATIVE=OFF leaves it out.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
export FASTDIFF_NATIVE=${FASTDIFF_NATIVE:-ON}

"$repo/.venv/bin/python" -m build --outdir "$scratch/dist" "$repo"
"$repo/.venv/bin/python" - "$scratch"/dist/*.tar.gz "$scratch"/dist/*.whl "$repo" <<'PYTHON'
import os
import pathlib
import sys
import tarfile
import zipfile

sdist = {name.partition("/")[2] for name in tarfile.open(sys.argv[1]).getnames()}
wheel = set(zipfile.ZipFile(sys.argv[2]).namelist())
# The Triton kernels are in kernels/; the wheel, which is built from the sdist, has them in fastdiff/kernels/.
kernels = {path.name for path in pathlib.Path(sys.argv[3], "kernels").glob("*.py")}
assert {"launch.py", "update.py"} <= kernels
missing = sorted({f"kernels/{name}" for name in kernels} - sdist)
assert not missing, f"kernels missing from the sdist: {missing}"
missing = sorted({f"fastdiff/kernels/{name}" for name in kernels} - wheel)
assert not missing, f"kernels missing from the wheel: {missing}"
page = {f"fastdiff/serving/page/{name}" for name in ("index.html", "style.css", "app.js", "api.js", "grid.js", "icon.svg")}
assert page <= wheel, f"of the server's page, missing from the wheel: {sorted(page - wheel)}"
assert {"csrc/CMakeLists.txt", "csrc/inplace/CMakeLists.txt", "csrc/engine.cpp", "csrc/module.cpp"} <= sdist
built = [name for name in sorted(sdist) if name.endswith((".so", ".a", ".o", ".pyd", "CMakeCache.txt"))]
assert not built, f"build products in the sdist: {built}"
others = [name for name in sorted(wheel) if not name.startswith(("fastdiff/", "fastdiff-"))]
assert not others, f"not of the package, but in the wheel: {others}"
native = [name for name in sorted(wheel) if name.startswith("fastdiff/_native.") and not name.endswith(".pyi")]
assert len(native) == (os.environ["FASTDIFF_NATIVE"] == "ON"), f"native modules in the wheel: {native}"
compiled = [name for name in sorted(wheel) if name.endswith((".so", ".a", ".o", ".pyd", ".dylib", ".dll"))]
assert compiled == native, f"compiled files in the wheel: {compiled}"
PYTHON
"$repo/.venv/bin/python" -m venv "$scratch/venv"
bin="$scratch/venv/bin"
"$bin/python" -m pip install --quiet -c "$repo/constraints.txt" "$scratch"/dist/*.whl
"$bin/python" -m pip check

mkdir "$scratch/elsewhere"
cd "$scratch/elsewhere"
"$bin/python" - "$repo" <<'PYTHON'
import importlib.metadata
import os
import pathlib
import sys

import fastdiff

package = pathlib.Path(fastdiff.__file__).parent
assert "torch" not in sys.modules, "import fastdiff imports torch"
assert pathlib.Path(sys.argv[1]) not in package.parents, f"imported from the checkout: {package}"
assert importlib.metadata.version("fastdiff") == fastdiff.__version__
assert (package / "py.typed").is_file()
import fastdiff.kernels.launch

if os.environ["FASTDIFF_NATIVE"] == "ON":
    from fastdiff import _native

    assert pathlib.Path(_native.__file__).parent == package
source = pathlib.Path(sys.argv[1], "fastdiff", "models")
models = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
missing = [str(path) for path in sorted(models) if not (package / "models" / path).is_file()]
assert not missing, f"not in the wheel: {missing}"
PYTHON
"$bin/fastdiff" --help
"$bin/fastdiff" sample fashion-mnist --n 2 --steps 2 --out x.png
test -s x.png
echo "wheel check: passed"
