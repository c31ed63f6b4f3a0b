"""The flags of `singlora app`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from annotated_types import Interval

LOOPBACK = ("127.0.0.1", "localhost", "::1")
"""What only this machine can reach."""
PASSWORD = "SINGLORA_APP_PASSWORD"
"""The environment variable with the password."""


@dataclass(frozen=True)
class AppSettings:
    """Subject, training, images, scores and files as pages in a browser. What is made lies in OUTPUT_DIR."""

    output_dir: Path = Path("runs")
    """Folder for all that is made: runs, images, adapter files, and the subjects that are dropped into the page."""
    folders: tuple[Path, ...] = ()
    """More folders that the page may use: images, base models, adapters. Nothing outside of them is read."""
    host: str = "127.0.0.1"
    """Address to listen on. On any other than this machine's own, the page asks for a password: the one in
    SINGLORA_APP_PASSWORD, else one that is made up and printed."""
    port: Annotated[int, Interval(ge=0, le=65535)] = 7860
    """Port to listen on. 0: any that is free."""
    browser: bool = True
    """Open the page in the browser."""
