"""Folders of pictures and odd picture files, dealt with here once.

Training and scoring see the same pixels: upright, in sRGB, on white where they were transparent, 8 bits per channel.
Needs Pillow and NumPy only.
"""

from __future__ import annotations

import importlib
import io
import os
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import UserError

_PICTURE_SUFFIX = re.compile(r"\.(jpe?g|jpe|jfif|mpo|a?png|webp|bmp|dib|gif|tiff?|hei[cf]|hif|avif)", re.IGNORECASE)
# Raw files begin like TIFF, and what Pillow finds in them is a thumbnail of a few hundred pixels.
_RAW_SUFFIX = re.compile(r"\.(dng|nef|nrw|cr[23]|arw|orf|rw2|raf|pef|srw|3fr|iiq)", re.IGNORECASE)
_BMP_HEADER_SIZES = (12, 40, 52, 56, 64, 108, 124)
_HEIF_BRANDS = frozenset((b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"mif1", b"msf1"))
_SIXTEEN_BIT_GREY = ("I;16", "I;16L", "I;16B", "I;16N")


@dataclass(frozen=True)
class FolderReport:
    """What a folder holds: the pictures in natural order, and what was left out and why."""

    folder: Path
    pictures: tuple[Path, ...]
    skipped: tuple[tuple[str, str], ...]  # (name, reason)

    def __str__(self) -> str:
        count = f"{len(self.pictures)} picture{'s' * (len(self.pictures) != 1)} in {self.folder}"
        return count + "".join(f"\n  skipped {name}: {reason}" for name, reason in self.skipped)


def pictures(folder: str | Path) -> list[Path]:
    """The picture files directly in a folder, sorted naturally (2.png before 10.png), known by content, not by name.

    Raises:
        UserError: no such folder, no picture in it, or a file that is named as a picture and is none.
    """
    return list(check(folder, decode=False).pictures)


def check(folder: str | Path, decode: bool = True) -> FolderReport:
    """Looks through a folder: pictures, and everything else with the reason why it is left out.

    Args:
        folder: searched flat, sub-folders are not entered.
        decode: also decode every picture, so that a damaged one is found now.

    Raises:
        UserError: as `pictures`, and with `decode` for the first picture that cannot be read.
    """
    folder = Path(folder).expanduser()
    if os.path.isfile(folder):  # unlike Path.is_file, False for a name that is too long
        raise UserError(f"{folder}: is a file; name the folder that holds the pictures")
    if not os.path.isdir(folder):
        raise UserError(f"{folder}: no such folder; name one that holds pictures")
    try:
        entries = sorted(folder.iterdir(), key=_natural_key)
    except OSError as error:
        raise UserError(f"{folder}: cannot be listed ({error.strerror}); check its permissions") from error

    found: list[Path] = []
    skipped: list[tuple[str, str]] = []
    for entry in entries:
        if reason := _reason_to_skip(entry):
            skipped.append((entry.name, reason))
        else:
            found.append(entry)
    if not found:
        raise UserError(_no_pictures(folder, entries, skipped))
    if decode:
        for path in found:
            open_picture(path)
    return FolderReport(folder, tuple(found), tuple(skipped))


def open_picture(path: str | Path) -> Image.Image:
    """One picture as 8-bit sRGB, mode "RGB", upright.

    EXIF orientation is applied, an embedded colour profile converted to sRGB, transparency composited on white, 16-bit
    grey scaled to 8 bits; of several frames (GIF, MPO, animated WebP) the first is taken.

    Raises:
        UserError: the file is missing, damaged, too large or in a format that is not read; it says which.
    """
    path = Path(path)
    kind = _kind(path)
    if kind is None:
        raise UserError(f"{path}: {_why_no_picture(path)}")
    if kind == "HEIF":
        _register_heif(path)
    try:
        with Image.open(path) as opened:
            opened.load()  # open() reads the header only: a truncated file fails here
            profile = opened.info.get("icc_profile")
            picture = _upright(opened)
        return _to_rgb(picture, profile, kind)
    except Image.DecompressionBombError as error:
        raise UserError(f"{path}: has too many pixels to be decoded safely; scale it down first") from error
    except MemoryError as error:
        raise UserError(f"{path}: does not fit into memory; scale it down first") from error
    except Exception as error:  # decoders raise nearly anything on a damaged file
        detail = " ".join(str(error).replace(str(path), "").split()) or type(error).__name__
        raise UserError(f"{path}: cannot be decoded as {kind} ({detail}); save it again or remove it") from error


def _upright(picture: Image.Image) -> Image.Image:
    try:
        return ImageOps.exif_transpose(picture)
    except Exception:  # a damaged EXIF block: the picture itself is still sound
        return picture.copy()


def _to_rgb(picture: Image.Image, profile: bytes | None, kind: str) -> Image.Image:
    if picture.mode in (*_SIXTEEN_BIT_GREY, "I", "F"):
        return _eight_bits(picture, kind).convert("RGB")
    if picture.mode == "LAB":
        lab, srgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        return _converted(picture, lab, srgb)
    if picture.mode in ("P", "PA", "1", "RGBX", "HSV", "YCbCr"):
        picture = picture.convert("RGBA" if picture.has_transparency_data else "RGB")
    elif picture.has_transparency_data:  # also one colour declared transparent
        picture = (picture.convert("LA") if picture.mode == "La" else picture).convert("RGBA")

    alpha = picture.getchannel("A") if picture.mode == "RGBA" else None
    if alpha is not None:
        picture = picture.convert("RGB")
    colours = _to_srgb(picture, profile)
    if alpha is None:
        return colours
    white = Image.new("RGB", colours.size, "white")
    white.paste(colours, mask=alpha)
    return white


def _to_srgb(picture: Image.Image, profile: bytes | None) -> Image.Image:
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
            if "srgb" not in ImageCms.getProfileDescription(source).lower():
                return _converted(picture, source, ImageCms.createProfile("sRGB"))
        except (ImageCms.PyCMSError, OSError):
            pass  # a damaged profile, or one for another colour model: the picture itself is still sound
    return picture.convert("RGB")


def _converted(picture: Image.Image, source: object, target: object) -> Image.Image:
    converted = ImageCms.profileToProfile(picture, source, target, outputMode="RGB")  # type: ignore[arg-type]
    assert converted is not None  # it is None only when converting in place
    return converted


def _eight_bits(picture: Image.Image, kind: str) -> Image.Image:
    """Grey of more than 8 bits to mode "L". Pillow's own convert("RGB") clips at 255 and gives a white picture."""
    values = np.nan_to_num(np.asarray(picture, dtype=np.float64), nan=0.0, posinf=0.0, neginf=0.0)
    if picture.mode in _SIXTEEN_BIT_GREY or kind == "PNG":
        white = 65535.0
    else:  # 32-bit integers and floats declare no range: take the smallest usual one that holds all values
        white = next((limit for limit in (1.0, 255.0, 65535.0) if values.max() <= limit), float(values.max()))
    if picture.mode == "I" and white == 1.0:
        white = 255.0
    return Image.fromarray(np.rint(values.clip(0.0, white) * (255.0 / white)).astype(np.uint8))


def _kind(path: Path) -> str | None:
    """The picture format by its first bytes, None when it is none that is read.

    Raises:
        UserError: the file cannot be opened.
    """
    try:
        with path.open("rb") as file:
            head = file.read(32)
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be opened ({error.strerror}); check its permissions") from error
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


def _reason_to_skip(entry: Path) -> str | None:
    """Why an entry of a folder is no picture to use, None when it is one.

    Raises:
        UserError: it is named as a picture and its content is none.
    """
    if entry.is_dir():
        return "a sub-folder, not searched"
    if entry.name.startswith("."):  # .DS_Store, and ._photo.jpg: notes of macOS that are named as pictures
        return "a hidden file"
    if _RAW_SUFFIX.fullmatch(entry.suffix):
        return "a camera's raw file; convert it to JPEG or PNG to use it"
    if not entry.is_file():
        return "a link to nothing, or no ordinary file"
    if _kind(entry) is not None:
        return None
    if _PICTURE_SUFFIX.fullmatch(entry.suffix):
        raise UserError(f"{entry}: {_why_no_picture(entry)}")
    return "not a picture"


def _why_no_picture(path: Path) -> str:
    if path.is_dir():
        return "is a folder, not a picture"
    if path.stat().st_size == 0:
        return "is empty (0 bytes); save it again or remove it"
    named = " although its name says so" if _PICTURE_SUFFIX.fullmatch(path.suffix) else ""
    return f"is no picture{named} (JPEG, PNG, WebP, BMP, GIF, TIFF, HEIC or AVIF); save it again or remove it"


def _no_pictures(folder: Path, entries: list[Path], skipped: list[tuple[str, str]]) -> str:
    if not entries:
        return f"{folder}: is empty; put the pictures into it"
    below = {entry.name: count for entry in entries if entry.is_dir() and (count := _count_pictures(entry))}
    if below:
        listed = ", ".join(f"{name} ({count})" for name, count in list(below.items())[:5])
        more = f" and {len(below) - 5} more" if len(below) > 5 else ""
        first = folder / next(iter(below))
        return f"{folder}: its pictures are one level down, in {listed}{more}; name one of these, such as {first}"
    listed = ", ".join(f"{name} ({reason})" for name, reason in skipped[:3])
    more = f" and {len(skipped) - 3} more" if len(skipped) > 3 else ""
    return f"{folder}: has no pictures, only {listed}{more}; put JPEG, PNG or WebP files into it"


def _count_pictures(folder: Path) -> int:
    try:
        names = [entry for entry in folder.iterdir() if not entry.name.startswith(".")]
        return sum(_PICTURE_SUFFIX.fullmatch(entry.suffix) is not None for entry in names)
    except OSError:
        return 0


def _register_heif(path: Path) -> None:
    try:
        heif = importlib.import_module("pillow_heif")
    except ImportError as error:
        raise UserError(
            f"{path}: is a HEIC picture, which needs one more package: pip install pillow-heif, or save it as JPEG"
        ) from error
    heif.register_heif_opener()


def _natural_key(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    parts = re.split(r"(\d+)", path.name.lower())
    return [(0, int(part), "") if part.isdecimal() else (1, 0, part) for part in parts if part], path.name
