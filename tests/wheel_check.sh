#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs that into a new environment, and uses it from another folder.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"$repo/.venv/bin/python" -m build --outdir "$scratch/dist" "$repo"
"$repo/.venv/bin/python" -m venv "$scratch/venv"
bin="$scratch/venv/bin"
"$bin/python" -m pip install --quiet -c "$repo/constraints.txt" "$scratch"/dist/*.whl
"$bin/python" -m pip check

mkdir "$scratch/elsewhere"
cd "$scratch/elsewhere"
"$bin/python" - "$repo" <<'PYTHON'
import importlib.metadata
import pathlib
import sys

import fastdiff

package = pathlib.Path(fastdiff.__file__).parent
assert "torch" not in sys.modules, "import fastdiff imports torch"
assert pathlib.Path(sys.argv[1]) not in package.parents, f"imported from the checkout: {package}"
assert importlib.metadata.version("fastdiff") == fastdiff.__version__
assert (package / "py.typed").is_file()
source = pathlib.Path(sys.argv[1], "fastdiff", "models")
models = {path.relative_to(source) for path in source.rglob("*") if path.is_file() and path.suffix != ".pyc"}
missing = [str(path) for path in sorted(models) if not (package / "models" / path).is_file()]
assert not missing, f"not in the wheel: {missing}"
PYTHON
"$bin/fastdiff" --help
"$bin/fastdiff" sample fashion-mnist --n 2 --steps 2 --out x.png
test -s x.png
echo "wheel check: passed"
