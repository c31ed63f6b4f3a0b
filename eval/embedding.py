"""Images and texts to vectors: each image is read once for all encoders, and nothing is computed twice."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from singlora_diffusion.data.images import is_one_colour, open_image
from singlora_diffusion.errors import UserError
from singlora_diffusion.progress import bar
from singlora_diffusion.terminal import escaped, note

from .encoders import Encoder, Vectors
from .inputs import Masked
from .vector_store import VectorStore, image_key, text_key


@dataclass(frozen=True)
class Embedded:
    """One row per image."""

    keys: list[str]  # sha256 of the pixels
    blank: list[bool]  # of one colour: what a safety filter or a diverged model leaves
    vectors: dict[str, Vectors]  # by role of the encoder


GREY = (124, 116, 104)
"""What stands for what a mask hides: ImageNet's mean, which DINO's preprocessing makes about 0."""


def embed_images(
    paths: Sequence[Path | Masked], encoders: Mapping[str, Encoder], stores: Mapping[str, VectorStore], batch_size: int
) -> Embedded:
    """Read the files one batch ahead of the encoders.

    Raises:
        UserError: an image that cannot be decoded, or a mask of another size.
    """
    from rich.console import Console

    keys: list[str] = []
    blank: list[bool] = []
    vectors: dict[str, list[Vectors]] = {role: [] for role in encoders}
    screen = Console(stderr=True)
    progress = bar(screen, transient=True, disable=not screen.is_terminal)
    with progress, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = progress.add_task("embedding images", total=len(paths))
        ahead = [pool.submit(_read, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            batch = [future.result() for future in ahead]
            ahead = [pool.submit(_read, path) for path in paths[start + batch_size : start + 2 * batch_size]]
            images, batch_keys, batch_blank = zip(*batch, strict=True)
            keys += batch_keys
            blank += batch_blank
            for role, made in encoders.items():
                vectors[role].append(stores[role].vectors(batch_keys, images, made.images))
            progress.advance(task, len(batch))
    return Embedded(keys, blank, {role: np.concatenate(parts) for role, parts in vectors.items()})


def embed_texts(texts: Sequence[str], encoder: Encoder, store: VectorStore) -> Vectors:
    """One row per text, by an encoder that reads texts."""
    assert encoder.texts is not None
    return store.vectors([text_key(text) for text in texts], texts, encoder.texts)


def keep(stores: Iterable[VectorStore]) -> None:
    """Save what the stores have learnt; a store that cannot be written is no reason to stop."""
    for store in stores:
        try:
            store.save()
        except UserError as error:
            note(f"vectors are not kept for next time: {error}")


def _read(path: Path | Masked) -> tuple[Image.Image, str, bool]:
    image = _subject(path) if isinstance(path, Masked) else open_image(path)
    return image, image_key(image), is_one_colour(image)


def _subject(masked: Masked) -> Image.Image:
    """An image with grey for what its mask hides. A mask that hides all leaves nothing but grey, and that is scored."""
    image, mask = open_image(masked.image), open_image(masked.mask, background="black").convert("L")
    if mask.size != image.size:
        is_of, its = ("x".join(map(str, one.size)) for one in (mask, image))
        raise UserError(f"{escaped(masked.mask, 1000)}: is {is_of} pixels, its image {its}; save the mask at that size")
    return Image.composite(image, Image.new("RGB", image.size, GREY), mask)
