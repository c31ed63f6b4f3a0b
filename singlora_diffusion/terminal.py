"""What reaches the terminal: text out of files is escaped here, and only here."""

from __future__ import annotations

import os
import sys


def escaped(text: object, limit: int = 120) -> str:
    """Text out of a file or a folder, fit for one line of a terminal: no control characters, not endless."""
    clean = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in str(text))
    return clean if len(clean) <= limit else f"{clean[: limit - 1]}\N{HORIZONTAL ELLIPSIS}"


def note(text: str) -> None:
    """Print a remark to stderr, beside the program's answer on stdout."""
    if speaks():
        print(f"note: {text}", file=sys.stderr)


def speaks() -> bool:
    """Whether this process says what all have to say: of several that a launcher started, the first one does."""
    return os.environ.get("RANK", "0") == "0"
