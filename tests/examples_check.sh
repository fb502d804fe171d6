#!/usr/bin/env bash
# Runs every script of examples/ as a reader would, on its own, in an empty folder; or those that are named.
# ray_data.py, which needs Ray, is run by `make bulk-check` only.
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

[ $# -gt 0 ] || set -- $(cd "$repo/examples" && ls -- *.py | grep -v '^ray_data' | sed 's/\.py$//')
for name; do
    echo "== examples/$name.py"
    mkdir "$scratch/$name"
    (cd "$scratch/$name" && time "$repo/.venv/bin/python" "$repo/examples/$name.py")
done
