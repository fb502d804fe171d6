#!/usr/bin/env bash
# Runs every script of examples/ as a reader would: on its own, in an empty folder.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

for example in "$repo"/examples/*.py; do
    name=$(basename "$example" .py)
    echo "== examples/$name.py"
    mkdir "$scratch/$name"
    (cd "$scratch/$name" && time "$repo/.venv/bin/python" "$example")
done
