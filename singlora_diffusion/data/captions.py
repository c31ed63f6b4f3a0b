"""Captions beside images: text files of their names, as kohya's trainers have it, or imagefolder's `metadata.jsonl`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from ..files import reason
from ..terminal import escaped
from .folders import FolderReport
from .images import IMAGE_SUFFIX

ORDERS = 8
"""In how many orders a caption with shuffled tags is learnt: few enough to be encoded before the first step."""

METADATA = "metadata.jsonl"
"""What Hugging Face's imagefolder calls its table: one JSON object a line, with `file_name` and `text`."""


class Captions(NamedTuple):
    """What a folder says of its images."""

    texts: dict[str, str]
    """Name of an image -> its caption, white space collapsed."""
    sources: dict[str, str]
    """Name of an image -> the file that holds its caption."""
    orphans: tuple[str, ...]
    """Captions that belong to no image: names of text files, and of images that the table lists in vain."""


def read(folder: Path, images: Sequence[str]) -> Captions:
    """The captions of these images of a folder. A text file beside an image goes before the table.

    A text file counts as a caption if an image has its name, or if other text files are captions: notes.txt in a folder
    without captions is just a file.

    Raises:
        UserError: a caption or the table cannot be read.
    """
    table = _table(folder / METADATA)
    texts = {name: text for name, text in table.items() if name in images}
    sources = dict.fromkeys(texts, METADATA)
    beside = {path.stem: path for path in sorted(folder.glob("*.txt")) if not path.name.startswith(".")}
    stems = {Path(name).stem for name in images}
    for name in images:
        if (path := beside.get(Path(name).stem)) is not None and (text := _line(path)):
            texts[name], sources[name] = text, path.name
    lonely = [path.name for stem, path in beside.items() if stem not in stems]
    captioned = any(stem in stems for stem in beside)
    return Captions(texts, sources, (*(lonely if captioned else ()), *(name for name in table if name not in images)))


def of_report(report: FolderReport) -> Captions:
    """The captions of all images of a report, by the names that it gives them.

    Raises:
        UserError: a caption or a table cannot be read.
    """
    texts, sources, orphans = dict[str, str](), dict[str, str](), list[str]()
    for part in report.parts:
        found = read(part.folder, [path.name for path in part.images])
        texts |= {report.name_of(part.folder / name): text for name, text in found.texts.items()}
        sources |= {report.name_of(part.folder / name): source for name, source in found.sources.items()}
        orphans += [report.name_of(part.folder / name) for name in found.orphans]
    return Captions(texts, sources, tuple(orphans))


class Texts(NamedTuple):
    """What the images of a stream say, as places in a table of distinct texts, which are encoded once."""

    table: tuple[str, ...]
    of_image: tuple[tuple[int, ...], ...]
    """Of each image: places of its caption in the table, one for each order of its tags."""
    empty: int | None
    """Place of the empty text, where captions are dropped at random."""

    def drawn(self, seed: int, positions: Sequence[int], images: Sequence[int], dropout: float) -> list[int]:
        """Places of the texts of the examples at these positions of the stream.

        Args:
            images: which image stands at each position, from `draws.examples`.
            dropout: probability that a text is the empty one.
        """
        from . import draws  # needs torch, which reading captions does not

        found = []
        for position, image in zip(positions, images, strict=True):
            dropped, order = draws.caption(seed, position)
            own = self.of_image[image]
            found.append(self.empty if self.empty is not None and dropped < dropout else own[int(order * len(own))])
        return found


def texts(
    names: Sequence[str],
    captions: Mapping[str, str],
    otherwise: str,
    *,
    seed: int,
    shuffle: bool = False,
    keep_tokens: int = 0,
    dropout: float = 0.0,
) -> Texts:
    """The texts of these images, in order.

    Args:
        otherwise: of images without a caption.
        shuffle: the comma-separated tags of a caption change places, but for the first `keep_tokens`.
    """
    table: dict[str, int] = {}
    of_image = []
    for number, name in enumerate(names):
        caption = captions.get(name, otherwise)
        forms = [caption] if not shuffle else _orders(caption, keep_tokens, np.random.default_rng((seed, number, 1)))
        of_image.append(tuple(table.setdefault(form, len(table)) for form in forms))
    empty = table.setdefault("", len(table)) if dropout else None
    return Texts(tuple(table), tuple(of_image), empty)


def _orders(caption: str, keep: int, rng: np.random.Generator) -> list[str]:
    tags = [tag.strip() for tag in caption.split(",") if tag.strip()]
    if len(tags) - keep < 2:
        return [caption]
    kept, free = tags[:keep], tags[keep:]
    return [", ".join([*kept, *(free[place] for place in rng.permutation(len(free)))]) for _ in range(ORDERS)]


def _line(path: Path) -> str:
    return " ".join(read_text(path).split())


def read_text(path: Path) -> str:
    """A text file.

    Raises:
        UserError: it cannot be read, or is not UTF-8.
    """
    shown = escaped(path, 1000)
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise UserError(f"{shown}: cannot be read ({reason(error)}); check its permissions") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: is not UTF-8 text ({error}); save it as that") from error


def _table(path: Path) -> dict[str, str]:
    if not path.is_file():
        return {}
    shown, rows = escaped(path, 1000), {}
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError):
            name = text = None
        if not isinstance(name, str) or not isinstance(text, str):
            raise UserError(
                f"{shown}, line {number}: is no caption; write "
                f'{{"file_name": "dog.jpg", "text": "a photo of sks dog"}}, one image a line'
            )
        rows[name.removeprefix("./")] = " ".join(text.split())
    return {name: text for name, text in rows.items() if text and IMAGE_SUFFIX.fullmatch(Path(name).suffix)}
