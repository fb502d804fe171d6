"""The header of every result: which machine, which versions, which code."""

from __future__ import annotations

import hashlib
import importlib.metadata
import platform
from pathlib import Path
from typing import Any

import torch

import fastdiff.backends
from fastdiff.backends import native

PACKAGES = ("torch", "diffusers", "openvino", "onnxruntime", "zentorch")


def header(device: str = "cpu") -> dict[str, Any]:
    """What makes two results comparable, or not. ``code`` is a digest of this package, its extension included."""
    versions: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    extension = native.extension()
    return {
        "processor": processor(),
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else device,
        "isas": [] if extension is None else extension.isas(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "versions": versions,
        "code": code(),
    }


def processor() -> str:
    """Its name; on x86-64 under Linux with family and model, as one name may stand for several generations."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    told: dict[str, str] = {}
    for line in lines:
        key, _, value = line.partition(":")
        told.setdefault(key.strip(), value.strip())
    name = told.get("model name") or platform.processor() or platform.machine()
    if {"cpu family", "model"} <= told.keys():
        name += f" (family {told['cpu family']}, model {told['model']})"
    return name


def multiplies_bfloat16() -> bool:
    """Whether the processor does; where it does not, PyTorch makes do with float32, at a fraction of its speed.

    Of x86-64 and arm64 on Linux; elsewhere nothing is known, and True.
    """
    try:
        words = Path("/proc/cpuinfo").read_text().split()
    except OSError:
        return True
    return not {"flags", "Features"} & set(words) or bool({"avx512_bf16", "amx_bf16", "bf16"} & set(words))


def code() -> str:
    """Twelve digits of SHA-256 over the package's Python files and its extension."""
    folder = Path(fastdiff.backends.__file__).parent.parent
    digest = hashlib.sha256()
    # In a checkout fastdiff/kernels is a link, which rglob does not follow before Python 3.13.
    python = {*folder.rglob("*.py"), *(folder / "kernels").rglob("*.py")}
    for path in sorted([*python, *folder.glob("_native*.so"), *folder.glob("_native*.pyd")]):
        digest.update(path.relative_to(folder).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def differences(now: dict[str, Any], before: dict[str, Any]) -> list[str]:
    """What differs between two headers, but for the code."""
    found = []
    for key in sorted((now.keys() | before.keys()) - {"code", "versions"}):
        if now.get(key) != before.get(key):
            found.append(f"{key}: {before.get(key)}, now {now.get(key)}")
    old, new = before.get("versions", {}), now.get("versions", {})
    for name in sorted(old.keys() | new.keys()):
        if old.get(name) != new.get(name):
            found.append(f"{name} {old.get(name)}, now {new.get(name)}")
    return found
