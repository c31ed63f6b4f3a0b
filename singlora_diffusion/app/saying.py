"""What the page says: errors as the one line that the command would print, and what a command prints as text."""

from __future__ import annotations

import contextlib
import html
import io
import threading
from collections.abc import Callable
from typing import Any

from ..cli import LONGEST, in_one_line
from ..terminal import escaped

ALONE = threading.Lock()
"""What is printed belongs to the one command that runs in this process."""


def line(error: Exception) -> str | None:
    """An error as the command line has it; None for what is a bug."""
    said = in_one_line(error)
    return None if said is None else escaped(said, LONGEST)


def printed(function: Callable[..., Any], *arguments: Any) -> str:
    """What a command prints, its remarks among it, without colours and not wrapped.

    Raises:
        UserError: as the command.
    """
    page = io.StringIO()
    with ALONE, contextlib.redirect_stdout(page), contextlib.redirect_stderr(page):
        function(*arguments)
    return page.getvalue().strip()


def safe(text: object, limit: int = 300) -> str:
    """Text out of a file, as text in HTML."""
    return html.escape(escaped(text, limit))


def safe_lines(text: str) -> str:
    """Several lines, as `safe` has one."""
    return "\n".join(safe(one, 500) for one in text.splitlines())


def clock(seconds: float) -> str:
    """1:02:03, or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
