"""Reading untrusted weight files: safetensors, in one file or in shards, and PyTorch files, without running their code.

A size that a file claims is compared with the real size of the file, and with fixed limits, before memory is allocated
for it. Files are read into memory, not mapped, so that a program that cuts or rewrites one meanwhile causes an error,
not a crash. PyTorch files (``.pt``, ``.pth``, ``.ckpt``, ``.bin``) are opened by ``torch.load(weights_only=True)``
alone, whose unpickler builds tensors and containers and refuses every other object instead of calling it.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import io
import json
import math
import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, BinaryIO

import torch
from torch import Tensor, nn

from fastdiff.checkpoints import wrappers
from fastdiff.checks import is_whole
from fastdiff.errors import CheckpointError
from fastdiff.files import other_kind, parse_json

# A U-Net of 1,000 tensors (ADM's largest has 900) makes a training checkpoint of 5,000, with a header of 0.7 MB.
MAX_HEADER = 4 << 20
MAX_TENSORS = wrappers.MOST_TENSORS
MAX_JSON = 1 << 20
# A PyTorch archive has a pickle with names and shapes (about 40 opcodes a tensor), a record with the numbers of each
# tensor, and a zip directory (about 100 bytes a tensor).
MAX_PICKLE = 16 << 20
MAX_OPCODES = 64 * MAX_TENSORS
MAX_DIRECTORY = 2 << 20
MAX_DIMENSIONS = 64  # of a tensor, as in torch
DTYPES = {  # in the order of the safetensors library, which writes the last ones first
    "BOOL": torch.bool, "U8": torch.uint8, "I8": torch.int8, "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3": torch.float8_e4m3fn, "I16": torch.int16, "U16": torch.uint16, "F16": torch.float16,
    "BF16": torch.bfloat16, "I32": torch.int32, "U32": torch.uint32, "F32": torch.float32, "F64": torch.float64,
    "I64": torch.int64, "U64": torch.uint64,
}  # fmt: skip
ZIP = b"PK\x03\x04"  # begins the files that torch.save writes
TORCH_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")


def read_json(path: Path, limit: int = MAX_JSON) -> dict[str, Any]:
    """Read a JSON object from a file of at most ``limit`` bytes; a `CheckpointError` names the file."""
    with _open(path) as file:
        text = file.read(limit + 1)
        _refuse_other_kind(path, text[:512], len(text) or 1)  # an empty text is no JSON
    if len(text) > limit:
        raise CheckpointError(f"{path}: JSON of more than {limit} bytes is refused")
    return json_object(path, text)


def json_object(where: str | Path, text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object as `fastdiff.files.parse_json` does; a `CheckpointError` begins with ``where``."""
    try:
        value = parse_json(text)
    except ValueError as e:
        raise CheckpointError(f"{where}: not valid JSON ({type(e).__name__}: {str(e)[:200]})") from e
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: a JSON object is needed, not {type(value).__name__}")
    return value


@contextlib.contextmanager
def _open(path: Path) -> Iterator[BinaryIO]:
    """Open a regular file for reading (a pipe would block, a device has no end); errors name the file.

    A file that changes before the block ends raises `CheckpointError`: what was read could be parts of two files.
    """
    try:
        if not path.is_file():
            raise CheckpointError(f"{path}: there is no regular file of this name")
        with path.open("rb") as file:
            before = os.fstat(file.fileno())
            yield file
            after = os.fstat(file.fileno())
    except (OSError, ValueError) as e:  # ValueError: a name with a null character
        reason = e.strerror if isinstance(e, OSError) else e
        raise CheckpointError(f"{path}: cannot be read ({reason})") from e
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns):
        raise CheckpointError(f"{path}: changed while it was read; load it again when nothing writes to it")


def _refuse_other_kind(path: Path, head: bytes, size: int) -> None:
    """Name what lies in the place of weights, or of a configuration; ``head`` and ``size`` as for `other_kind`."""
    found = other_kind(head, size)
    if found is not None:
        raise CheckpointError(f"{path}: {found}")


# safetensors ----------------------------------------------------------------------------------------------------------


def read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the metadata of a safetensors file, after its header has been checked."""
    path = Path(path)
    with _open(path) as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        _refuse_other_kind(path, head, size)
        if head.startswith(ZIP):
            raise CheckpointError(
                f"{path}: a file that torch.save wrote, or another zip archive, under the name of a safetensors file; "
                f"rename it to end in one of {', '.join(TORCH_SUFFIXES)}"
            )
        start = head[:8]
        file.seek(8)
        if len(start) < 8:
            raise CheckpointError(f"{path}: {size} bytes; too short for a safetensors file")
        (length,) = struct.unpack("<Q", start)
        if length > size - 8:
            raise CheckpointError(
                f"{path}: truncated or not safetensors: its header claims {length} bytes, the file has {size}"
            )
        if length > MAX_HEADER:
            raise CheckpointError(f"{path}: a header of {length} bytes is refused; at most {MAX_HEADER} are read")
        try:
            places, metadata = _places(file.read(length), size - 8 - length)
        except (CheckpointError, ValueError) as e:
            raise CheckpointError(f"{path}: damaged or truncated safetensors file ({e})") from e
        tensors = {}
        for name, (dtype, shape) in places.items():
            try:
                tensors[name] = torch.empty(shape, dtype=dtype, device="cpu")
            except RuntimeError as e:
                raise CheckpointError(f"{path}: no memory for {name}, {dtype} {shape}, of {size} bytes in all") from e
            _fill(path, file, tensors[name])
    return tensors, metadata


def _places(header: bytes, size: int) -> tuple[dict[str, tuple[torch.dtype, list[int]]], dict[str, str]]:
    """Return the dtype and shape of each tensor, in the order of their bytes, and the metadata of a safetensors header.

    The tensors must fill the ``size`` bytes behind the header without overlap or gap. Raises ValueError, or
    `CheckpointError`, where the header is another one.
    """
    # The entry of every tensor has one "data_offsets". Counting them takes no memory; parsing bogus entries would.
    count = header.count(b'"data_offsets"')
    if count > MAX_TENSORS:
        raise ValueError(f"{count} tensors are refused; at most {MAX_TENSORS} are read")
    if header.count(b"{") + header.count(b"[") > 8 * MAX_TENSORS:  # the metadata's text may have some, too
        raise ValueError(f"damaged header: more brackets than {MAX_TENSORS} tensors need")
    entries = json_object("header", header)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("damaged header: metadata other than strings")
    if len(entries) != count:
        raise ValueError(f"damaged header: {count} entries for {len(entries)} distinct tensors")
    found = sorted((*_place(name, entry), name) for name, entry in entries.items())
    end = 0
    for first, last, _, _, name in found:
        if first != end:
            raise ValueError(f"the bytes of {name} begin at {first}, not at {end}")
        end = last
    if end != size:
        raise ValueError(f"{end} bytes of tensors are described, there are {size}")
    return {name: (DTYPES[kind], shape) for _, _, kind, shape, name in found}, metadata


def _place(name: str, entry: Any) -> tuple[int, int, str, list[int]]:
    """Return (first byte, end, dtype, shape) of a header's entry; raise ValueError where they contradict each other."""
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the entry of {name} needs dtype, shape and data_offsets")
    kind, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{name} has dtype {str(kind)[:40]!r}; known: {', '.join(DTYPES)}")
    for numbers in (shape, offsets):
        if not isinstance(numbers, list) or not all(is_whole(v) and 0 <= v < 1 << 62 for v in numbers):
            raise ValueError(f"the shape and offsets of {name} must be lists of whole numbers")
    if len(shape) > MAX_DIMENSIONS or len(offsets) != 2:
        raise ValueError(f"{name} has {len(shape)} dimensions and {len(offsets)} offsets")
    # Without zeros, so that a size that torch could not count is refused for empty tensors too.
    if math.prod(v for v in shape if v) >= 1 << 62:
        raise ValueError(f"the shape {shape} of {name} is too large")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{name} has {offsets[1] - offsets[0]} bytes, but {kind} {shape}")
    return offsets[0], offsets[1], kind, shape


def _fill(path: Path, file: BinaryIO, tensor: Tensor) -> None:
    """Read the bytes of a tensor."""
    if tensor.numel():
        data = memoryview(tensor.view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        if file.readinto(data) < len(data):  # type: ignore[attr-defined]  # files have it
            raise CheckpointError(f"{path}: was cut while it was read")


def read_sharded(index: Path) -> dict[str, Tensor]:
    """Read the tensors of a sharded model from its ``*.safetensors.index.json``.

    Raises `CheckpointError` if a shard is missing, lies in another folder, or does not hold exactly the tensors that
    the index lists for it.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(v, str) for v in places.values()):
        raise CheckpointError(f"{index}: its weight_map must be an object from tensor names to file names")
    tensors: dict[str, Tensor] = {}
    problems: list[str] = []
    for shard in sorted(set(places.values())):
        # The index is untrusted: a shard must be a file of the same folder, named without a path.
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
        raise CheckpointError(f"{index} does not describe its shards, {listed_problems(problems)}")
    return tensors


def listed_problems(problems: list[str], cause: str = "") -> str:
    """Format problems for a message: how many of each kind, the likely cause, and three examples, or one of each kind.

    Every problem begins with its kind and a colon.
    """
    kinds = collections.Counter(problem.partition(":")[0] for problem in problems)
    first = {problem.partition(":")[0]: problem for problem in reversed(problems)}
    examples = [*(first[kind] for kind in kinds), *(p for p in problems if p not in first.values())]
    examples = examples[: max(3, len(first))]
    left = len(problems) - len(examples)
    counts = f" ({', '.join(f'{count} {kind}' for kind, count in kinds.items())})" if left else ""
    lines = [f"likely cause: {cause}"] * bool(cause) + examples + [f"and {left} more"] * bool(left)
    return f"{len(problems)} problems{counts}:\n  " + "\n  ".join(lines)


# PyTorch's files ------------------------------------------------------------------------------------------------------


def read_torch(path: Path, entry: str | None = None) -> dict[str, Tensor]:
    """Read a state dict from a file that ``torch.save`` wrote. Code in the file is refused and never run.

    A file may hold several sets of weights, in dictionaries, lists, or below prefixes; ``entry`` chooses one, as
    `fastdiff.checkpoints.wrappers.choose` says.

    Raises `CheckpointError` if the file is damaged, or if the choice is ambiguous; the message lists the entries.
    """
    try:
        with _open(path) as file:
            head = file.read(512)
            _refuse_other_kind(path, head, os.fstat(file.fileno()).st_size)
            zipped = head.startswith(ZIP)
            if zipped:  # before memory is taken for the file
                _records(path, file, os.fstat(file.fileno()).st_size)
            file.seek(0)
            content = io.BytesIO(file.read())
        if zipped:
            _check_archive(path, content)
        else:  # the format before torch 1.6: pickles of a magic number, version, system, value and storage keys
            _check_pickles(path, content, 5)
        content.seek(0)
        value = torch.load(content, map_location="cpu", weights_only=True, mmap=False)
    except CheckpointError:
        raise
    except Exception as e:  # a damaged pickle can raise anything
        reason = str(e).strip().splitlines()[-1][:300] if str(e).strip() else type(e).__name__
        raise CheckpointError(
            f"{path}: damaged, or more than tensors in dicts and lists; pickles that would run code are refused, and "
            f"nothing in it was run ({reason})"
        ) from e
    state = wrappers.choose(path, value, entry)
    # An expanded view (stride 0) of a few bytes can have a shape of terabytes.
    larger = [k for k, v in state.items() if v.layout == torch.strided and v.nbytes > v.untyped_storage().nbytes()]
    if larger:
        raise CheckpointError(f"{path}: {', '.join(larger[:20])}: more numbers than the file holds; it is refused")
    return state


def _check_archive(path: Path, content: io.BytesIO) -> None:
    """Refuse a zip archive that torch.save would not write, by its directory and its pickles."""
    archive = zipfile.ZipFile(content)
    for record in _records(path, content, content.getbuffer().nbytes):
        if record.filename.endswith(".pkl"):
            with archive.open(record) as pickled:
                _check_pickles(path, pickled, 1)


def _records(path: Path, file: BinaryIO, size: int) -> list[zipfile.ZipInfo]:
    """List an archive's records; refuse one that is compressed, larger than its file, or read in two ways.

    torch finds records by their names in lower case, and takes other bytes than Python for the directory if an archive
    does not begin at the file's first byte.
    """
    directory = _directory_bytes(file, size)
    if directory is None:
        raise CheckpointError(f"{path}: truncated archive, or one that goes on behind its end")
    if directory > MAX_DIRECTORY:
        raise CheckpointError(f"{path}: an archive with a directory of {directory} bytes is refused")
    records = zipfile.ZipFile(file).infolist()
    if any(r.compress_type != zipfile.ZIP_STORED or r.file_size != r.compress_size for r in records) or (
        sum(r.file_size for r in records) > size
    ):
        raise CheckpointError(
            f"{path}: a compressed archive, or one that claims more than its {size} bytes; it is refused"
        )
    if any(r.filename.endswith(".pkl") and r.file_size > MAX_PICKLE for r in records):
        raise CheckpointError(f"{path}: a pickle of more than {MAX_PICKLE} bytes in the archive is refused")
    if len({r.orig_filename.lower() for r in records}) < len(records) or any("\0" in r.orig_filename for r in records):
        raise CheckpointError(f"{path}: an archive with two records of one name; it is refused")
    return records


def _check_pickles(path: Path, file: IO[bytes], count: int) -> None:
    """Refuse ``count`` consecutive pickles with too many opcodes in all. The opcodes are counted, not executed."""
    left = MAX_OPCODES
    for _ in range(count):
        for _ in pickletools.genops(file):
            left -= 1
            if left == 0:
                raise CheckpointError(f"{path}: a pickle of more than {MAX_OPCODES} instructions is refused")


def _directory_bytes(file: BinaryIO, size: int) -> int | None:
    """Return the size of a zip archive's central directory from its end records (APPNOTE 4.3.14-16).

    None without them, and where the directory does not end where they begin. Python's zipfile creates an object for
    every entry of the directory, whatever number the end record states.
    """
    length = min(size, 22 + 20 + 65535)
    file.seek(size - length)
    tail = file.read(length)
    end = tail.rfind(b"PK\x05\x06")
    if end < 0 or len(tail) - end != 22:  # with bytes after it, torch and zipfile could read two different archives
        return None
    directory, offset = struct.unpack("<2L", tail[end + 12 : end + 20])
    begin = size - 22
    locator = tail[max(end - 20, 0) : end]
    if locator[:4] == b"PK\x06\x07" and len(locator) == 20:  # zip64
        (begin,) = struct.unpack("<Q", locator[8:16])
        if begin != size - 22 - 20 - 56:
            return None
        file.seek(begin)
        record = file.read(56)
        if record[:4] != b"PK\x06\x06" or len(record) < 56:
            return None
        directory, offset = struct.unpack("<2Q", record[40:56])
    return directory if offset + directory == begin else None


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """Compute a SHA-256 digest that identifies weights exactly.

    ``trilemma.json`` stores it, so that measurements are used only with the weights for which they were made.

    Args:
        tensors: A state dict; its order does not matter.

    Returns:
        The digest of the names, dtypes, shapes and bytes, as 64 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def network_digest(unet: nn.Module) -> str:
    """Compute the SHA-256 of a network: of its class, its configuration, and its tensors with their names.

    Folders of images have it in their settings.
    """
    digest = hashlib.sha256()
    config = getattr(unet, "config", None)
    to_dict = getattr(config, "to_dict", None)
    described = to_dict() if callable(to_dict) else dict(config) if isinstance(config, dict) else None
    digest.update(json.dumps([type(unet).__qualname__, described], sort_keys=True, default=str).encode())
    for name, tensor in sorted(unet.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
