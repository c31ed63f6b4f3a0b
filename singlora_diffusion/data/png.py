"""PNG files as this program writes them: with a text chunk `Software`, and others that a reader may look for."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo

from .. import __version__
from ..files import write_bytes

SOFTWARE = "singlora-diffusion"


def write(image: Image.Image, path: Path, **texts: str) -> None:
    """Write an image whole or not at all.

    Args:
        texts: further text chunks, by key.

    Raises:
        UserError: the file cannot be written.
    """
    about = PngInfo()
    about.add_text("Software", f"{SOFTWARE} {__version__}")
    for key, value in texts.items():
        about.add_text(key, value)
    buffer = io.BytesIO()
    image.save(buffer, "png", pnginfo=about)
    write_bytes(path, buffer.getvalue())


def texts(path: Path) -> dict[str, str]:
    """The text chunks in front of a PNG's pixels, by key; empty where there are none, or no PNG."""
    try:
        with Image.open(path) as image:
            return {str(key): value for key, value in image.info.items() if isinstance(value, str)}
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return {}


def is_ours(path: Path) -> bool:
    """Whether this program wrote a PNG."""
    return texts(path).get("Software", "").startswith(SOFTWARE)
