"""Files written whole or not at all, hashed, and folders used by one process at a time."""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .errors import UserError
from .terminal import escaped

PART = re.compile(r"\..+\.(part-[A-Za-z0-9_]+|\d+\.part)(\.\w+)?")
"""Names of files that are being written, the second form by version 0.1.0; one that belongs to no live writer is a
leftover."""
ABANDONED = 24 * 3600
"""Seconds after which a file that is still being written belongs to no live writer."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a new empty file beside `path`; when the block ends well it is flushed to disk and takes that name.

    However the block ends, nothing half-written stays. The parent folders are made.

    Raises:
        UserError: the file cannot be written: a full disk, a read-only folder, a name that is too long.
    """
    path = Path(path)
    part: Path | None = None
    try:
        if path.is_dir():
            raise UserError(f"{path}: is a folder; name a file")
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name[:100]}.part-", suffix=path.suffix[:20], dir=path.parent)
        part = Path(name)
        os.close(handle)
        part.chmod(0o666 & ~_umask())  # mkstemp's files are the owner's alone
        yield part
        with part.open("rb") as file:
            os.fsync(file.fileno())
        part.replace(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {reason(error)}") from error
    finally:
        if part is not None:
            part.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all; errors as `replacing`."""
    with replacing(path) as part:
        part.write_bytes(content)


def write_text(path: Path, content: str) -> None:
    """`write_bytes` of UTF-8 text."""
    write_bytes(path, content.encode())


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """`write_text` of JSON that every reader takes: NaN and infinity are a ValueError."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        UserError: no such file, not JSON in UTF-8, nested beyond reason, or another JSON value than an object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is not a JSON object")
    return content


def sha256(path: Path) -> str:
    """Of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def reason(error: OSError) -> str:
    """What an OSError says, without the path that the message around it names already."""
    return error.strerror or str(error) or type(error).__name__


@contextmanager
def locked(folder: Path, what: str) -> Iterator[None]:
    """Hold `folder` for this process, so that a second one is refused; the folder is made.

    The lock is the operating system's: it ends with the process, however that ends.

    Args:
        what: who uses the folder, as in "a training".

    Raises:
        UserError: another process holds it, or the folder cannot be written to.
    """
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock", timeout=0)
        lock.acquire()
    except Timeout as error:
        raise UserError(f"{folder}: {what} is running there already; wait for it, or name another folder") from error
    except OSError as error:
        raise UserError(f"{folder}: cannot be written to: {reason(error)}") from error
    try:
        yield
    finally:
        lock.release()


def is_locked(folder: Path) -> bool:
    """Whether a process holds a folder, as `locked` does; nothing is made."""
    if not (folder / ".lock").exists():
        return False
    try:
        with locked(folder, "a look"):
            return False
    except UserError:
        return True


def check_writable(folder: Path, what: str) -> None:
    """Find out before the work, not after it, whether a folder can be written to or made; nothing is made here.

    Args:
        what: how the message begins, as in "--output_dir".

    Raises:
        UserError: it is a file or lies below one, its name cannot be, or permissions forbid it.
    """
    shown = f"{what} {escaped(folder, 1000)}"
    try:
        if os.path.lexists(folder) and not folder.is_dir():
            raise UserError(f"{shown} is a file: name a folder")
        folder.stat()
        nearest = folder
    except FileNotFoundError:
        nearest = next(parent for parent in folder.absolute().parents if parent.exists())
    except (OSError, ValueError) as error:
        why = reason(error) if isinstance(error, OSError) else error
        raise UserError(f"{shown} cannot be used: {why}") from error
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"{shown} cannot be written to: check the permissions of {escaped(nearest, 1000)}")


def remove_abandoned(path: Path) -> None:
    """Delete files and folders beside `path` that were to become it, and that nobody has touched for a day."""
    import shutil

    for entry in path.parent.iterdir() if path.parent.is_dir() else ():
        if PART.fullmatch(entry.name) and entry.name.startswith(f".{path.name[:100]}.part-"):
            with suppress(OSError):
                if time.time() - entry.stat().st_mtime > ABANDONED:
                    shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def remove_leftovers(folder: Path, also: Callable[[str], bool] = lambda name: False) -> None:
    """Delete what killed writers left in a folder that is `locked`, so that no live writer can be in it.

    Args:
        also: further names to delete, such as half-written checkpoint folders.
    """
    import shutil

    for entry in folder.iterdir() if folder.is_dir() else ():
        if PART.fullmatch(entry.name) or also(entry.name):
            shutil.rmtree(entry, ignore_errors=True) if entry.is_dir() else entry.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
