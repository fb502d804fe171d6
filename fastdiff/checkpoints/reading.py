"""Weight files, read without trusting them: safetensors, whole or sharded, and PyTorch's own without running its code.

Sizes are bounded by what the file is, not by what it claims, before anything of a claimed size is read. PyTorch files
(``.pt``, ``.pth``, ``.ckpt``, ``.bin``) go through ``torch.load(weights_only=True)`` and nothing else: its unpickler
knows how to build tensors and containers, and refuses every other object instead of calling it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from fastdiff.errors import CheckpointError

# A U-Net of 1,000 tensors (ADM's largest has 900) makes a training checkpoint of 5,000, with a header of 0.7 MB.
MAX_HEADER = 4 << 20
MAX_TENSORS = 1 << 14
MAX_JSON = 1 << 20
MAX_PICKLE = 16 << 20  # of a PyTorch archive: the names and shapes; the numbers are in records of their own
MAX_OPCODES = 64 * MAX_TENSORS  # a tensor takes about forty
MAX_DIRECTORY = 2 << 20  # of a PyTorch archive: about a hundred bytes a tensor
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file of bounded size; `CheckpointError` names the file."""
    try:
        with _open(path) as file:
            text = file.read(MAX_JSON + 1)
        if len(text) > MAX_JSON:
            raise CheckpointError(f"{path}: a configuration of more than {MAX_JSON} bytes is refused")
        value = json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{path}: not valid JSON ({type(e).__name__}: {str(e)[:200]})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: a JSON object is needed, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file (a pipe would block, a device has no end) for reading; errors name it."""
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no regular file of this name")
        with path.open("rb") as file:
            yield file
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read ({e.strerror})") from e


# safetensors ----------------------------------------------------------------------------------------------------------


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file; its header is bounded before anything of its claimed size is read."""
    path = Path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: {size} bytes; too short for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes is refused; at most {MAX_HEADER} are read")
        header = file.read(length)
    # Every tensor's entry has one "data_offsets"; counting bytes costs no memory, parsing many bogus entries would.
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise CheckpointError(f"{path}: {count} tensors are refused; at most {MAX_TENSORS} are read")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            names = file.keys()
            if len(names) != count:  # the parser keeps the last of equal names
                raise CheckpointError(f"{path}: damaged header: {count} entries for {len(names)} distinct tensors")
            return {name: file.get_tensor(name) for name in names}, dict(file.metadata() or {})
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise CheckpointError(f"{path}: damaged or truncated safetensors file ({e})") from e


def read_sharded(index: Path) -> dict[str, Tensor]:
    """The tensors that a ``*.safetensors.index.json`` spreads over files of its own folder.

    Raises `CheckpointError` where a shard is missing, is not a plain file name, or does not hold exactly its tensors.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: its weight_map must be an object from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for shard in sorted(set(places.values())):
        # The index is untrusted: what it names must be a file beside it, by a name without any path.
        if shard != os.path.basename(shard) or not shard.endswith(".safetensors"):
            raise CheckpointError(
                f"{index}: shard {shard[:200]!r} is refused; names of .safetensors files beside it are allowed"
            )
        given, _ = read_safetensors(index.parent / shard)
        listed = {name for name, place in places.items() if place == shard}
        problems += [f"missing: {name} in {shard}" for name in sorted(listed - given.keys())]
        problems += [f"unexpected: {name} in {shard}" for name in sorted(given.keys() - listed)]
        tensors.update(given)
    if problems:
        raise CheckpointError(
            f"{index} does not describe its shards, {len(problems)} problems:\n  " + "\n  ".join(problems)
        )
    return tensors


# PyTorch's files ------------------------------------------------------------------------------------------------------


def read_torch(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """A state dict from a file that ``torch.save`` wrote. Code in it is refused, and never run.

    A file may hold several: a dict of state dicts ("model", "ema", ...), or the list that ermongroup's trainer saves
    (model, optimizer, epoch, step, EMA). ``entry`` names one, by its key or position; None takes the averaged weights
    where there is exactly one such entry, or the only entry. The prefix "module." of parallel training is taken off.

    Raises `CheckpointError` that says what the file holds.
    """
    try:
        with _open(path) as file:
            size = os.fstat(file.fileno()).st_size
            if file.read(4) == b"PK\x03\x04":
                _check_archive(path, file, size)
            else:  # torch.save before 1.6: a magic number, a version, the system, the value, the names of the numbers
                file.seek(0)
                _check_pickles(path, file, 5)
        value = torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as e:  # a damaged pickle can raise anything
        reason = str(e).strip().splitlines()[-1][:300] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{path}: damaged, or more than tensors in dicts and lists; pickles that would run code are refused, and "
            f"nothing in it was run ({reason})"
        ) from e
    state = _entry(path, value, entry)
    # Views may repeat what they are of, so that a few bytes say that they are terabytes.
    larger = [k for k, v in state.items() if v.layout == torch.strided and v.nbytes > v.untyped_storage().nbytes()]
    if larger:
        raise CheckpointError(f"{path}: {', '.join(larger[:20])}: more numbers than the file holds; it is refused")
    return state


def _check_archive(path: Path, file: BinaryIO, size: int) -> None:
    """Hold a zip archive to what torch.save writes: few records, not compressed, no more of them than the file has."""
    directory = _directory_bytes(file, size)
    if directory is None:
        raise CheckpointError(f"{path}: truncated archive, or one that goes on behind its end")
    if directory > MAX_DIRECTORY:
        raise CheckpointError(f"{path}: an archive with a directory of {directory} bytes is refused")
    archive = zipfile.ZipFile(file)
    records = archive.infolist()
    if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records) or (
        sum(r.file_size for r in records) > size
    ):
        raise CheckpointError(
            f"{path}: a compressed archive, or one that claims more than its {size} bytes; it is refused"
        )
    for record in records:
        if record.filename.endswith(".pkl"):
            if record.file_size > MAX_PICKLE:
                raise CheckpointError(f"{path}: a pickle of more than {MAX_PICKLE} bytes in the archive is refused")
            with archive.open(record) as pickled:
                _check_pickles(path, pickled, 1)


def _check_pickles(path: Path, file: IO[bytes], count: int) -> None:
    """Count the instructions of ``count`` pickles that follow one another, without following them."""
    left = MAX_OPCODES
    for _ in range(count):
        for _ in pickletools.genops(file):
            left -= 1
            if left == 0:
                raise CheckpointError(f"{path}: a pickle of more than {MAX_OPCODES} instructions is refused")


def _directory_bytes(file: BinaryIO, size: int) -> int | None:
    """Size of a zip archive's directory, from the records that end it (APPNOTE 4.3.14-16); None where there are none.

    Python's zipfile makes an object of every entry in it, however many the end record counts.
    """
    length = min(size, 22 + 20 + 65535)
    file.seek(size - length)
    tail = file.read(length)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end != 22:  # with anything behind it, torch and zipfile could see two archives
        return None
    (directory,) = struct.unpack("<L", tail[end + 12 : end + 16])
    locator = tail[max(end - 20, 0) : end]
    if locator[:4] == b"PK\x06\x07" and len(locator) == 20:  # zip64
        (offset,) = struct.unpack("<Q", locator[8:16])
        file.seek(min(offset, size))
        record = file.read(56)
        if record[:4] != b"PK\x06\x06" or len(record) < 56:
            return None
        (directory,) = struct.unpack("<Q", record[40:48])
    return directory


def _entry(path: Path, value: Any, entry: str | None) -> dict[str, Tensor]:
    if _is_state_dict(value):
        if entry is not None:
            raise CheckpointError(f"{path}: weights={entry!r}: this file holds one set of weights only; leave it out")
        return _unwrapped(value)
    pairs = (
        value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, (list, tuple)) else ()
    )
    found = {str(k): v for k, v in pairs if _is_state_dict(v)}
    known = ", ".join(repr(k[:80]) for k in list(found)[:20]) or "none"
    if entry is not None:
        if entry not in found:
            raise CheckpointError(f"{path}: weights={entry!r} is no set of weights in this file; it holds {known}")
        return _unwrapped(found[entry])
    averaged = [k for k in found if "ema" in k.lower()]
    if isinstance(value, (list, tuple)) and len(found) == 2:
        averaged = [list(found)[1]]  # ermongroup: model first, its average last
    chosen = averaged if averaged else list(found)
    if len(chosen) != 1:
        raise CheckpointError(f"{path}: which weights? Name one with weights=; the file holds {known}")
    return _unwrapped(found[chosen[0]])


def _is_state_dict(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and 0 < len(value) <= MAX_TENSORS
        and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in value.items())
    )


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    prefix = "module." if all(k.startswith("module.") for k in state) else ""
    return {k.removeprefix(prefix): v.detach() for k, v in state.items()}


def fingerprint(tensors: Mapping[str, Tensor]) -> str:
    """SHA-256 of tensors: their names, types, shapes and bytes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
