"""safetensors files: opened by the library, which checks them, and written whole or not at all.

A damaged or hostile file ends in one `UserError` line. Written files are a function of their contents alone: the same
adapter, the same bytes.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .. import device
from ..errors import UserError
from ..files import reason, remove_abandoned, replacing
from ..terminal import escaped

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""What the numbers of adapters may be stored as, by the format's names."""
ROUNDED = {torch.float32: 1e-5, torch.float64: 1e-9, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
"""What storing as a dtype, and float32 sums before it, explain of a difference, relative."""
PRECISIONS = {"float32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
WORTH_ASKING = 1 << 28
"""Bytes from which on free memory is looked up before they are allocated."""
ALIASES = {"fp32": "float32", "float16": "fp16", "bfloat16": "bf16"}


@dataclass(frozen=True)
class Entry:
    """One tensor as the file's header describes it."""

    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Index:
    """A file's header: its tensors by name, in the order of names, and its metadata."""

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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A checked file.

    Raises:
        UserError: not a readable, complete, consistent safetensors file.
    """
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder, want a .safetensors file")
        if path.exists() and not path.is_file():
            raise UserError(f"{path}: is not a regular file")
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise UserError(f"{path}: {_unsound(path, error)}") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {escaped(reason(error))}") from error


def _unsound(path: Path, error: SafetensorError) -> str:
    with path.open("rb") as file:
        head = file.read(2)
    if not head:
        return "is empty"
    if head[:1] == b"\x80" or head == b"PK":
        return "is a pickle (torch.save), which can run code when opened: only safetensors are read"
    return f"is not a safetensors file, or is damaged or cut short: {escaped(error)}"


def read_index(path: str | Path) -> Index:
    """A file's header.

    Raises:
        UserError: not a readable, complete, consistent safetensors file.
    """
    path = Path(path)
    with _opened(path) as file:
        tensors = {}
        for name in sorted(file.keys()):
            one = file.get_slice(name)
            tensors[name] = Entry(one.get_dtype(), tuple(one.get_shape()))
        return Index(path, tensors, file.metadata() or {})


def read_tensors(index: Index, names: Iterable[str] | None = None) -> dict[str, Tensor]:
    """Tensors of a file, on the CPU, in memory of their own; `names` None: all.

    Raises:
        UserError: they do not fit into memory, the file changed under us, or it holds NaN, infinities or numbers that
            adapters are not made of.
    """
    found: dict[str, Tensor] = {}
    wanted = list(index.tensors if names is None else names)
    needed = 2 * sum(8 * math.prod(index.tensors[name].shape) for name in wanted)  # with a copy in float64
    if needed > WORTH_ASKING:
        device.require(needed, "cpu", str(index.path))
    with _opened(index.path) as file:
        for name in wanted:
            dtype = index.tensors[name].dtype
            if dtype not in DTYPES:
                raise UserError(
                    f"{index.path}: tensor {escaped(name)} is stored as {escaped(dtype)}, which is not read"
                )
            tensor: Tensor = file.get_tensor(name)
            if not bool(torch.isfinite(tensor).all()):
                raise UserError(f"{index.path}: tensor {escaped(name)} holds NaN or infinity: damaged, or diverged")
            found[name] = tensor.clone()  # the library's own tensor keeps the file mapped
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
    if path.exists() and not path.is_dir() and not overwrite:
        raise UserError(f"{path}: exists already; name another file, or pass --overwrite")
    remove_abandoned(path)
    with replacing(path) as part:
        with part.open("wb") as file:
            file.writelines(serialized(tensors, metadata))
        if check is not None:
            check(part)


def order(tensors: Mapping[str, Tensor]) -> list[str]:
    """The order in the file. Wide types first: each tensor then begins at a multiple of its own width."""
    return sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))


def serialized(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> Iterator[bytes]:
    """The bytes of a file, part by part; not the library's, which puts metadata in an order that changes."""
    codes = {dtype: code for code, dtype in DTYPES.items()}
    names = order(tensors)
    header: dict[str, Any] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    end = 0
    for name in names:
        tensor = tensors[name]
        start, end = end, end + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": codes[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [start, end]}
    raw = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    raw += b" " * (-len(raw) % 8)
    yield len(raw).to_bytes(8, "little")
    yield raw
    for name in names:
        yield tensor_bytes(tensors[name])
