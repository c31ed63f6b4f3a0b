"""What the denoiser is asked in a step and what it should predict, by position in the stream of examples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..data import draws, latents
from ..data.captions import Texts
from ..data.latents import Size, Stream
from ..models.family import Conditioning, Family, Geometry, NoiseProcess, noise_process
from .quantiles import Quantiles
from .recipe import Recipe


class Streams(NamedTuple):
    """What is trained on: the subject, and with prior preservation its class; each has a prompt of its own.

    A last prompt without images is the class of a preservation without class images: the instance images' noisy latents
    are asked about once more with it, and the base model's own prediction is wanted.
    """

    instance: Stream
    prompts: Sequence[str]
    captions: Sequence[Texts | None] = (None, None)
    """Of the images of each stream, in place of its prompt; None: they have none."""
    held_out: Texts | None = None
    """Captions of held-out images, in place of the first prompt."""
    encoded: Conditioning | None = None
    """What the text encoders say of `texts`; None: they are trained, so nothing of it stays."""
    classes: Mapping[Size, Stream] = {}
    """Images of the class at each size that instance images are seen at, since a batch has one; nothing where there are
    none."""

    @property
    def texts(self) -> list[str]:
        """All that is to be encoded: the prompts, then the captions. `Batch.stream` holds places in it."""
        return [*self.prompts, *(text for captions in self._captions for text in captions.table)]

    def first_of(self, captions: Texts) -> int:
        """The place among `texts` at which the table of these captions begins."""
        before = itertools.takewhile(lambda other: other is not captions, self._captions)
        return len(self.prompts) + sum(len(other.table) for other in before)

    @property
    def _captions(self) -> list[Texts]:
        return [one for one in (*self.captions, self.held_out) if one is not None]


class Batch(NamedTuple):
    """Of N examples, on the family's device; those of the class come last."""

    noisy: Tensor
    """(N, C, h, w)."""
    target: Tensor
    """(N, C, h, w)."""
    times: Tensor
    """(N,)."""
    stream: Sequence[int]
    """Which of `Streams.texts` each example has."""
    geometry: Geometry
    mask: Tensor
    """(N, 1, h, w): how much each place counts in the loss."""


class Examples:
    """Batches by position. Equal positions give equal batches, whatever came before.

    Args:
        together: instance images of a step, which are all of one size.
    """

    def __init__(self, family: Family, streams: Streams, recipe: Recipe, together: int) -> None:
        self.streams, self.device, self.process = streams, family.device, process_of(family, recipe)
        self.seed, self.noise_offset = recipe.optimization.seed, recipe.optimization.noise_offset
        self.together, self.caption_dropout = together, recipe.data.caption_dropout
        self.quantiles = Quantiles(self.process, recipe.optimization)

    def at(self, positions: range) -> Batch:
        stream = self.streams.instance
        shown = draws.bucketed(self.seed, positions, stream.repeats, stream.sizes, self.together)
        parts, places = [self._part(stream, shown, positions, draws.INSTANCE)], self._texts(0, positions, shown)
        if self.streams.classes:
            classes = self.streams.classes[latents.size_of(stream.images[shown[0]])]
            others = draws.examples(self.seed, positions, classes.repeats, draws.PRIOR)
            parts.append(self._part(classes, others, positions, draws.PRIOR))
            places += self._texts(1, positions, others)
        return self.batch(latents.joined(parts), places)

    def _part(self, stream: Stream, shown: Sequence[int], positions: range, kind: int) -> latents.Examples:
        images = [stream.images[number] for number in shown]
        return latents.batch(images, self.seed, positions, kind, self.noise_offset)

    def _texts(self, number: int, positions: range, shown: Sequence[int]) -> list[int]:
        """Places of what the examples of a stream say; a caption goes with its image, whatever the step."""
        captions = self.streams.captions[number]
        if captions is None:
            return [number] * len(positions)
        first = self.streams.first_of(captions)
        return [first + place for place in captions.drawn(self.seed, positions, shown, self.caption_dropout)]

    def batch(self, examples: latents.Examples, stream: Sequence[int]) -> Batch:
        """What the denoiser is asked of examples, and what it should predict."""
        times = self.process.times(self.quantiles(examples.quantile)).to(self.device)
        clean, noise = examples.latents.to(self.device), examples.noise.to(self.device)
        noisy, target = self.process.corrupt(clean, noise, times)
        geometry = Geometry(examples.original, examples.crop, examples.size)
        return Batch(noisy, target, times, stream, geometry, examples.mask.to(self.device))


def process_of(family: Family, recipe: Recipe) -> NoiseProcess:
    """How the model is trained, as the recipe has it.

    Raises:
        UserError: the recipe asks for what is not for models of this kind.
    """
    process = noise_process(family, recipe.times, recipe.data.resolution or family.resolution)
    process.loss_weights(process.times(torch.tensor([0.5], dtype=torch.float64)), recipe.optimization.snr_gamma)
    return process


def again(batch: Batch, stream: int) -> Batch:
    """The same noisy latents with another stream's prompt; all of them counts."""
    return batch._replace(stream=[stream] * len(batch.stream), mask=torch.ones_like(batch.mask))


def joined(first: Batch, last: Batch) -> Batch:
    """Two batches as one."""
    return Batch(
        noisy=torch.cat([first.noisy, last.noisy]),
        target=torch.cat([first.target, last.target.to(first.target)]),
        times=torch.cat([first.times, last.times]),
        stream=[*first.stream, *last.stream],
        geometry=Geometry(*(torch.cat(column) for column in zip(first.geometry, last.geometry, strict=True))),
        mask=torch.cat([first.mask, last.mask]),
    )
