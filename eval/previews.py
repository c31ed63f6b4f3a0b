"""Scores of previews while a training runs: what `singlora score` says of the same images, without files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from singlora_diffusion.data.images import open_image
from singlora_diffusion.models.hub import PACKAGED

from .encoders import encoder
from .metrics import METRICS, Vectors
from .vector_store import VectorStore, image_key

SCORES = ("dino", "clip_t", "drift")
"""Rows of `METRICS`."""


class PreviewScorer:
    """A function of previews, for `training.loop.run`.

    Encoders are loaded once, and compute on the CPU: a few images are no work, and a GPU's memory is the training's.
    They are those of `singlora score`: toyworld's own for a packaged base model, else dreambooth-v1's.

    Args:
        references: files of real images of the subject.
        prompt: of the previews, identifier left out.
        base_model: what the user calls it.
        sources: by role, files or folders of encoders other than those.

    Raises:
        UserError: files of encoders that are missing or damaged, or an image that cannot be read.
    """

    def __init__(
        self, references: Sequence[Path], prompt: str, base_model: str, sources: Mapping[str, Path | None] | None = None
    ) -> None:
        protocol, sources = "toyworld" if base_model in PACKAGED else "dreambooth-v1", sources or {}
        roles = sorted({METRICS[name].encoder for name in SCORES})
        named = {role: str(source) for role, source in sources.items() if source is not None}
        self.encoders = {role: encoder(protocol, role, named.get(role)) for role in roles}
        self.stores = {role: VectorStore(None, made.fingerprint) for role, made in self.encoders.items()}
        self.references = self._of_images("dino", [open_image(path) for path in references])
        reads = self.encoders["clip"].texts
        assert reads is not None
        self.prompt: Vectors = reads([prompt])

    def __call__(self, images: Sequence[Image.Image], base_images: Sequence[Image.Image]) -> dict[str, float]:
        """The mean over the images of each of `SCORES`.

        Args:
            images: previews.
            base_images: the base model's images of the same prompt and seeds, in the same order.
        """
        given = {
            "references": lambda role: self.references,
            "prompt_without_token": lambda role: np.repeat(self.prompt, len(images), axis=0),
            "base_images": lambda role: self._of_images(role, base_images),
        }
        found = {}
        for name in SCORES:
            row = METRICS[name]
            scores: Any = row.function(
                self._of_images(row.encoder, images), *(given[need](row.encoder) for need in row.needs)
            )
            found[name] = float(np.mean(scores, dtype=np.float64))
        return found

    def _of_images(self, role: str, images: Sequence[Image.Image]) -> Vectors:
        """(N, D); the base model's are computed once, since the store knows them by their pixels."""
        shown = [image.convert("RGB") for image in images]
        return self.stores[role].vectors([image_key(one) for one in shown], shown, self.encoders[role].images)
