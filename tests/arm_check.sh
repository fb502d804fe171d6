#!/usr/bin/env bash
# Cross-compiles the engine for arm64 and runs its C++ tests in an emulator, where both are installed
# (Debian: apt install g++-aarch64-linux-gnu qemu-user).
set -euo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
for tool in aarch64-linux-gnu-g++ qemu-aarch64; do
    if ! command -v "$tool" > /dev/null; then
        echo "arm check: skipped, $tool is not installed"
        exit 0
    fi
done
cmake=$repo/.venv/bin/cmake
PATH="$repo/.venv/bin:$PATH" "$cmake" -S "$repo/csrc" -B "$repo/build/arm64" -G Ninja --log-level=NOTICE \
    -D FASTDIFF_TESTS=ON -D CMAKE_SYSTEM_NAME=Linux -D CMAKE_SYSTEM_PROCESSOR=aarch64 \
    -D CMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -D CMAKE_CXX_FLAGS=-static
"$cmake" --build "$repo/build/arm64"
qemu-aarch64 "$repo/build/arm64/fastdiff_tests"
