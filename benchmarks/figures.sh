#!/usr/bin/env bash
# Measures every figure of README.md and docs/ on this machine, one after another: hours, on two cores mostly the trilemma's.
# Nothing else should run meanwhile. Results lie in the folder $1 (out/figures), named as in benchmarks/results. What
# is finished is not done again, and most of what was interrupted goes on.
set -euo pipefail
cd "$(dirname "$0")/.."
out=${1:-out/figures}
bin=.venv/bin
mkdir -p "$out"

# measure FILE COMMAND...: what the command prints becomes FILE, which is there only if it has ended well.
measure() {
    local file=$out/$1
    shift
    if [ -e "$file" ]; then
        echo "$file is there"
        return
    fi
    echo "$file: $*"
    "$@" > "$file.part"
    mv "$file.part" "$file"
}

measure check.txt $bin/python recipes/check_fashion_mnist.py --out "$out/check"
measure job-cifar10.json $bin/fastdiff bench ddpm-cifar10-32 --job --json
measure bench-cifar10.txt $bin/fastdiff bench ddpm-cifar10-32 --network-only --rounds 15 \
    --save "$out/bench-cifar10.json"
measure bench-celebahq.txt $bin/fastdiff bench ddpm-celebahq-256 --batches 1 --network-only --rounds 15 \
    --save "$out/bench-celebahq.json"
measure bench-fashion-mnist.txt $bin/fastdiff bench --save "$out/bench-fashion-mnist.json"
measure engine.txt $bin/python benchmarks/engine.py --json "$out/engine.json"
measure micro.txt $bin/python -m pytest benchmarks --benchmark-json="$out/micro.json"
measure trilemma.txt $bin/fastdiff trilemma --peer --out "$out/trilemma"
cp "$out/trilemma/trilemma.json" "$out/trilemma-fashion-mnist.json"
