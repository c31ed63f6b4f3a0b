"""One image file of any odd kind as pixels, dealt with here once.

Training and scoring see the same pixels: upright, in sRGB, on white where they were transparent, 8 bits per channel.
Needs Pillow and NumPy only.
"""

from __future__ import annotations

import importlib
import io
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import UserError
from ..files import reason
from ..terminal import escaped

if TYPE_CHECKING:
    pass

IMAGE_SUFFIX = re.compile(r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|bmp|dib|gif|tiff?|hei[cf]|hif|avif)", re.IGNORECASE)
# Raw files begin like TIFF, and what Pillow finds in them is a thumbnail of a few hundred pixels.
RAW_SUFFIX = re.compile(r"\.(dng|nef|nrw|cr[23]|arw|orf|rw2|raf|pef|srw|3fr|iiq)", re.IGNORECASE)
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


class Unusable(Exception):
    """Why a file is not an image that can be used; the message does not name it."""


def open_image(path: str | Path, background: str = "white") -> Image.Image:
    """One image as 8-bit sRGB, mode "RGB", upright.

    EXIF orientation is applied, an embedded colour profile converted to sRGB, transparency composited on white, 16-bit
    grey scaled to 8 bits; of several frames (GIF, MPO, animated WebP) the first is taken.

    Args:
        background: colour to composite on, in place of white.

    Raises:
        UserError: the file is missing, damaged, too large or in a format that is not read; it says which.
    """
    try:
        return decoded(Path(path), background)
    except Unusable as error:
        raise UserError(f"{escaped(path, 1000)}: {error}") from error.__cause__


def is_one_colour(image: Image.Image) -> bool:
    """Whether an RGB image shows nothing: all its pixels agree within two of 255 levels."""
    low, high = np.array(image.getextrema()).T  # of each channel
    return bool((high - low <= 2).all())


def decoded(path: Path, background: str = "white") -> Image.Image:
    """`open_image`, with an error that does not name the file.

    Raises:
        Unusable: it cannot be used.
    """
    kind = kind_of(path)
    if kind is None:
        raise Unusable(why_no_image(path))
    if kind == "HEIF":
        _register_heif()
    try:
        with Image.open(path) as opened:
            opened.load()  # open() reads the header only: a truncated file fails here
            profile = opened.info.get("icc_profile")
            image = _upright(opened)
        return _to_rgb(image, profile, kind, background)
    except Image.DecompressionBombError as error:
        raise Unusable("has too many pixels to be decoded safely; scale it down first") from error
    except MemoryError as error:
        raise Unusable("does not fit into memory; scale it down first") from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        detail = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise Unusable(f"cannot be decoded as {kind} ({escaped(detail)}); save it again or remove it") from error


def _upright(image: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # a damaged EXIF block: the image itself is still sound
        return image.copy()


def _to_rgb(image: Image.Image, profile: bytes | None, kind: str, background: str) -> Image.Image:
    if image.mode in (*_SIXTEEN_BIT_GREY, "I", "F"):
        return _eight_bits(image, kind).convert("RGB")
    if image.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _converted(image, lab, srgb)
    if image.mode in ("P", "PA", "1", "RGBX", "HSV", "YCbCr"):
        image = image.convert("RGBA" if image.has_transparency_data else "RGB")
    elif image.has_transparency_data:  # also one colour declared transparent
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")

    alpha = image.getchannel("A") if image.mode == "RGBA" else None
    if alpha is not None:
        image = image.convert("RGB")
    colours = _to_srgb(image, profile)
    if alpha is None:
        return colours
    below = Image.new("RGB", colours.size, background)
    below.paste(colours, mask=alpha)
    return below


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                return _converted(image, source, ImageCms.createProfile("sRGB"))
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile, or one for another colour model: the image itself is still sound
    return image.convert("RGB")


def _converted(image: Image.Image, source: object, target: object) -> Image.Image:
    converted = ImageCms.profileToProfile(image, source, target, outputMode="RGB")  # type: ignore[arg-type]
    assert converted is not None  # it is None only when converting in place
    return converted


def _eight_bits(image: Image.Image, kind: str) -> Image.Image:
    """Grey of more than 8 bits to mode "L". Pillow's own convert("RGB") clips at 255 and gives a white image."""
    values = np.nan_to_num(np.asarray(image, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if image.mode in _SIXTEEN_BIT_GREY or kind == "PNG":
        white = 65535.0
    else:  # 32-bit integers and floats declare no range: take the smallest usual one that holds all values
        white = next((limit for limit in (1.0, 255.0, 65535.0) if values.max() <= limit), float(values.max()))
    if image.mode == "I" and white == 1.0:
        white = 255.0
    return Image.fromarray(np.rint(values.clip(0.0, white) * (255.0 / white)).astype(np.uint8))


def kind_of(path: Path) -> str | None:
    """The image format by its first bytes, None when it is none that is read.

    Raises:
        Unusable: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError as error:
        raise Unusable("no such file") from error
    except IsADirectoryError as error:
        raise Unusable("is a folder, not an image") from error
    except OSError as error:
        raise Unusable(f"cannot be opened ({reason(error)}); check its permissions") from error
    if head.startswith(b"\xff\xd8\xff"):
        return "JPEG"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "PNG"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "GIF"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "WebP"
    if head.startswith((b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")):
        return "TIFF"
    if head.startswith(b"BM") and int.from_bytes(head[14:18], "little") in _BMP_HEADER_SIZES:
        return "BMP"
    if head[4:8] == b"ftyp":
        if head[8:12] in (b"avif", b"avis") or b"avif" in head[16:]:
            return "AVIF"
        if head[8:12] in _HEIF_BRANDS:
            return "HEIF"
    return None


def why_no_image(path: Path) -> str:
    if path.stat().st_size == 0:
        return "is empty (0 bytes); save it again or remove it"
    named = " although its name says so" if IMAGE_SUFFIX.fullmatch(path.suffix) else ""
    return f"is not an image{named} (JPEG, PNG, WebP, BMP, GIF, TIFF, HEIC or AVIF); save it again or remove it"


def _register_heif() -> None:
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise Unusable(
            "is a HEIC image, which needs one more package: pip install pillow-heif (the extra [heic] of this one has "
            "it), or save it as JPEG"
        ) from error
    heif.register_heif_opener()
