"""The header of every result: the machine, the versions and the code that it was measured with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import fastdiff.backends
from fastdiff.backends.native import extension

PACKAGES = ("fastdiff", "torch", "diffusers", "openvino", "onnxruntime", "zentorch")


def header(device: str = "cpu", packages: Sequence[str] = PACKAGES) -> dict[str, Any]:
    """Describe what a result was measured on and with, so that `differences` can say whether two are comparable.

    "cores" are the processors that this process may use; "code" is a digest of this package and its extension. The
    version of a package that is not installed is None.
    """
    versions: dict[str, str | None] = {}
    for name in packages:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    native = extension()
    return {
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "isas": [] if native is None else native.isas(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),
        "system": platform.platform(terse=True),
        "python": platform.python_version(),
        "versions": versions,
        "code": code(),
    }


def processor() -> str:
    """Return the processor's name, on Linux and x86-64 with family and model, as generations may share a name."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    info: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        info.setdefault(key.strip(), value.strip())
    name = info.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= info.keys():
        name += f" (family {info['cpu family']}, model {info['model']})"
    return name


def multiplies_bfloat16() -> bool:
    """Return whether the processor multiplies bfloat16; otherwise PyTorch emulates it at a fraction of float32's speed.

    This is known on Linux for x86-64 and arm64; elsewhere the answer is True.
    """
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return not {"flags", "Features"} & set(words) or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))


def code() -> str:
    """Return twelve digits of the SHA-256 over the package's Python files and its extension."""
    folder = Path(fastdiff.backends.__file__).parent.parent
    digest = hashlib.sha256()
    # In a checkout fastdiff/kernels is a link, which rglob does not follow before Python 3.13.
    python = {*folder.rglob("*.py"), *(folder / "kernels").rglob("*.py")}
    for path in sorted([*python, *folder.glob("_native*.so"), *folder.glob("_native*.pyd")]):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """List what differs between two headers apart from the code; entries that only one has are not compared."""
    found = []
    for key in sorted((now.keys() & before.keys()) - {"code", "versions"}):
        if now[key] != before[key]:
            found.append(f"{key}: {before[key]}, now {now[key]}")
    old, new = before.get("versions", {}), now.get("versions", {})
    for name in sorted(old.keys() & new.keys()):
        if old[name] != new[name]:
            found.append(f"{name} {old[name]}, now {new[name]}")
    return found
