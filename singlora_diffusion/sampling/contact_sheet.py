"""Images of any sizes on one sheet, captioned: previews, contact sheets, comparisons."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

PAPER, INK = (255, 255, 255), (40, 40, 40)
GAP = 8  # pixels between images and around the sheet
TEXT = 14  # pixels
LINE = 18
SMALLEST = 128  # smaller images are enlarged by a whole factor, so that captions fit and pixels stay pixels


def grid(
    rows: Sequence[Sequence[Image.Image]],
    row_labels: Sequence[str] = (),
    column_labels: Sequence[str] = (),
    *,
    largest: int = 384,
) -> Image.Image:
    """Rows of images on white, each row's label wrapped below it, the columns' labels above the first row.

    Args:
        rows: may differ in length and their images in size; an image stands in the middle of its cell.
        row_labels: one per row, or none. column_labels: one per column, or none. An empty label takes no room.
        largest: pixels that the longer side of a cell may have; images are reduced to fit, all by the same factor.

    Returns:
        An RGB image.
    """
    columns = max((len(row) for row in rows), default=0)
    if columns == 0:
        raise ValueError("no images for the sheet")
    if len(row_labels) not in (0, len(rows)) or len(column_labels) not in (0, columns):
        raise ValueError(
            f"{len(rows)} rows of {columns} columns, labels for {len(row_labels)} and {len(column_labels)} of them"
        )
    sizes = [image.size for row in rows for image in row]
    factor = _factor(max(max(size) for size in sizes), largest)
    cell_width, cell_height = (max(1, round(max(sides) * factor)) for sides in zip(*sizes, strict=True))

    font = ImageFont.load_default(TEXT)
    width = GAP + columns * (cell_width + GAP)
    heads = [_wrap(label, font, cell_width) for label in column_labels]
    captions = [_wrap(label, font, width - 2 * GAP) for label in row_labels] or [[] for _ in rows]
    head_height = max((len(lines) for lines in heads), default=0) * LINE
    height = GAP + head_height + sum(cell_height + len(lines) * LINE + GAP for lines in captions)

    sheet = Image.new("RGB", (width, height), PAPER)
    pen = ImageDraw.Draw(sheet)
    for j, lines in enumerate(heads):
        _write(pen, lines, GAP + j * (cell_width + GAP), GAP, font)
    top = GAP + head_height
    for row, lines in zip(rows, captions, strict=True):
        for j, image in enumerate(row):
            shown = _scaled(image, factor)
            left = GAP + j * (cell_width + GAP) + (cell_width - shown.width) // 2
            sheet.paste(shown, (left, top + (cell_height - shown.height) // 2))
        top += cell_height
        _write(pen, lines, GAP, top, font)
        top += len(lines) * LINE + GAP
    return sheet


def _factor(side: int, largest: int) -> float:
    if side > largest:
        return largest / side
    return max(1, min(-(-SMALLEST // side), largest // side))


def _scaled(image: Image.Image, factor: float) -> Image.Image:
    """RGB at the sheet's scale; what is transparent becomes paper."""
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        solid = image.convert("RGBA")
        image = Image.new("RGB", image.size, PAPER)
        image.paste(solid, mask=solid.getchannel("A"))
    image = image.convert("RGB")
    if factor == 1:
        return image
    size = (max(1, round(image.width * factor)), max(1, round(image.height * factor)))
    return image.resize(size, Image.Resampling.NEAREST if factor > 1 else Image.Resampling.LANCZOS)


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> list[str]:
    """Lines no wider than `width` pixels, broken between words, and within a word where it alone is too wide."""
    lines: list[str] = []
    line = ""
    for word in text.split():
        trial = f"{line} {word}".lstrip()
        if font.getlength(trial) <= width:
            line = trial
            continue
        if line:
            lines.append(line)
        line = ""
        for letter in word:
            if line and font.getlength(line + letter) > width:
                lines.append(line)
                line = ""
            line += letter
    return [*lines, line] if line else lines


def _write(
    pen: ImageDraw.ImageDraw, lines: list[str], left: int, top: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont
) -> None:
    for i, line in enumerate(lines):
        pen.text((left, top + i * LINE), line, fill=INK, font=font)
