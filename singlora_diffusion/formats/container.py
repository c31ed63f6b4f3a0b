"""safetensors files, read with suspicion and written whole or not at all.

Layout: 8 bytes little-endian header length; a JSON header {name: {dtype, shape, data_offsets}, "__metadata__": {...}};
the tensors' bytes without holes. The header is checked before a byte of it is trusted: a damaged or hostile file ends
in one `UserError` line. Written files are a function of their contents alone: the same adapter, the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import stat
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError

MAX_HEADER = 16 << 20  # bytes; a full SDXL checkpoint has 0.3 MB, chatty metadata a few MB

DTYPES: dict[str, tuple[int, torch.dtype | None]] = {  # bytes per number, torch's name where adapters may use it
    "F64": (8, torch.float64),
    "F32": (4, torch.float32),
    "F16": (2, torch.float16),
    "BF16": (2, torch.bfloat16),
    "I64": (8, torch.int64),
    "I32": (4, torch.int32),
    "I16": (2, torch.int16),
    "I8": (1, torch.int8),
    "U8": (1, torch.uint8),
    "BOOL": (1, torch.bool),
    "U64": (8, None),
    "U32": (4, None),
    "U16": (2, None),
    "F8_E4M3": (1, None),
    "F8_E5M2": (1, None),
}
PRECISIONS = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
ALIASES = {"fp32": "float32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Entry:
    """One tensor as the header describes it; `start` and `stop` count from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Index:
    """A file's header, checked."""

    path: Path
    tensors: dict[str, Entry]
    metadata: dict[str, str]


def precision(dtype: str | torch.dtype) -> torch.dtype:
    """torch's dtype for a name users write: float32, fp16, bf16 (and their synonyms)."""
    if isinstance(dtype, torch.dtype) and dtype in PRECISIONS.values():
        return dtype
    name = ALIASES.get(str(dtype), str(dtype))
    if name not in PRECISIONS:
        raise UserError(f"cannot store numbers as {dtype}: choose {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def shown(text: object, limit: int = 120) -> str:
    """Text out of a file, fit to be printed in a one-line message: no control characters, not endless."""
    clean = "".join(c if c.isprintable() else "?" for c in str(text))
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}…"


def parse_json(text: str | bytes) -> Any:
    """JSON in UTF-8 without duplicate names, NaN or lone surrogates. Raises ValueError or RecursionError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not a number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) != len(items):
            raise ValueError("a name occurs twice")
        for key, value in items:
            (key + value if isinstance(value, str) else key).encode()  # an escaped lone surrogate ends here
        return found

    decoded = text.decode() if isinstance(text, bytes) else text
    return json.loads(decoded, parse_constant=refuse, object_pairs_hook=pairs)


def read_index(path: str | Path) -> Index:
    """Read and check a file's header.

    Raises:
        UserError: not a readable, complete, consistent safetensors file.
    """
    path = Path(path)
    try:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            raise UserError(f"{path}: is a folder, want a .safetensors file")
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{path}: is not a regular file")
        with path.open("rb") as file:
            head = file.read(8)
            length = int.from_bytes(head, "little")
            _check_head(path, head, length, status.st_size)
            raw = file.read(length)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        header = parse_json(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: its header is not valid JSON: {shown(error)}") from error
    if not isinstance(header, dict):
        raise UserError(f"{path}: its header is not a table of tensors")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise UserError(f"{path}: its metadata is not a table of texts")
    tensors = {name: _entry(path, name, value, 8 + length) for name, value in header.items()}
    end = 8 + length
    for name, entry in sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != end:
            raise UserError(f"{path}: tensor {shown(name)} does not begin where the one before it ends: damaged")
        end = entry.stop
    if end != status.st_size:
        reason = "is cut short" if end > status.st_size else "has bytes that belong to no tensor"
        raise UserError(f"{path}: {reason}: {status.st_size} bytes, its header speaks of {end}")
    return Index(path, tensors, metadata)


def _check_head(path: Path, head: bytes, length: int, size: int) -> None:
    if size == 0:
        raise UserError(f"{path}: is empty")
    if size >= 10 and length <= min(MAX_HEADER, size - 8):
        return
    if head[:1] == b"\x80" or head[:2] == b"PK":
        raise UserError(f"{path}: is a pickle (torch.save), which can run code when opened: only safetensors are read")
    raise UserError(f"{path}: is not a safetensors file, or is cut short: {size} bytes, its header would take {length}")


def _entry(path: Path, name: str, value: Any, data: int) -> Entry:
    def natural(numbers: object) -> bool:
        return isinstance(numbers, list) and all(type(n) is int and 0 <= n < 1 << 48 for n in numbers)

    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise UserError(f"{path}: tensor {shown(name)} is not described by dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise UserError(f"{path}: tensor {shown(name)} has the unknown type {shown(dtype)}")
    if not natural(shape) or len(shape) > 8 or not natural(offsets) or len(offsets) != 2:
        raise UserError(f"{path}: tensor {shown(name)} has an impossible shape or place in the file")
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype][0]:
        raise UserError(f"{path}: tensor {shown(name)} has a shape that does not match its length in the file")
    return Entry(dtype, tuple(shape), data + offsets[0], data + offsets[1])


def read_tensors(index: Index, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of a checked file, on the CPU; `names` None: all.

    Raises:
        UserError: the file changed under us, or holds NaN, infinities or numbers that adapters are not made of.
    """
    found: dict[str, Tensor] = {}
    try:
        with index.path.open("rb") as file:
            for name in index.tensors if names is None else names:
                entry = index.tensors[name]
                dtype = DTYPES[entry.dtype][1]
                if dtype is None:
                    raise UserError(f"{index.path}: tensor {shown(name)} is stored as {entry.dtype}, which is not read")
                file.seek(entry.start)
                raw = bytearray(file.read(entry.stop - entry.start))
                if len(raw) != entry.stop - entry.start:
                    raise UserError(f"{index.path}: is cut short at tensor {shown(name)}")
                flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)
                found[name] = flat.reshape(entry.shape)
                if dtype.is_floating_point and not bool(torch.isfinite(flat).all()):
                    raise UserError(f"{index.path}: tensor {shown(name)} holds NaN or infinity: damaged, or diverged")
    except OSError as error:
        raise UserError(f"{index.path}: cannot be read: {error.strerror}") from error
    return found


def tensor_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over names, types, shapes and bytes, in the order of names."""
    total = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        total.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        total.update(tensor_bytes(tensor))
    return total.hexdigest()


def write(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    *,
    check: Callable[[Path], None] | None = None,
    overwrite: bool = True,
) -> None:
    """Write a file atomically: under another name first, then `check`ed there, then renamed into place.

    Args:
        check: reads the finished file back and raises if it is not what it should be; nothing is put in place then.
        overwrite: False refuses a path that exists.

    Raises:
        UserError: the path exists, or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder, name the file to write")
    if path.exists() and not overwrite:
        raise UserError(f"{path}: exists already; name another file, or pass --overwrite")
    part = path.with_name(f".{path.name}.{os.getpid()}.part.safetensors")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.writelines(_serialise(tensors, metadata))
            file.flush()
            os.fsync(file.fileno())
        if check is not None:
            check(part)
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            part.unlink()


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The order in the file. Wide types first: each tensor then begins at a multiple of its own width."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def _serialise(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterable[bytes]:
    codes = {dtype: (code, size) for code, (size, dtype) in DTYPES.items() if dtype is not None}
    names = order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        code, size = codes[tensors[name].dtype]
        start, end = end, end + tensors[name].numel() * size
        header[name] = {"dtype": code, "shape": list(tensors[name].shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little")
    yield raw
    for name in names:
        yield tensor_bytes(tensors[name])
