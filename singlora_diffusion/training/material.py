"""What a training learns from, as files and words: images, captions, prompts. Needs no torch."""

from __future__ import annotations

from collections.abc import Generator, Sequence
from pathlib import Path
from typing import NamedTuple

from ..data import captions, prompts
from ..data.captions import Captions
from ..data.folders import read_folder
from ..data.prompts import InstancePrompt
from ..terminal import escaped
from .events import Event, Images, Remark
from .recipe import Recipe


class Material(NamedTuple):
    """Of one recipe."""

    subject: InstancePrompt
    class_prompt: str
    instance: Sequence[Path]
    """Images of the subject."""
    captions: Captions
    """Of the instance images; nothing where captions are not wanted."""
    held_out: Sequence[Path]
    """Images of the subject that are not trained on; none where nothing asks for them."""
    classes: Sequence[Path] = ()
    """Images of the class, once there are all that are wanted."""

    @property
    def references(self) -> Sequence[Path]:
        """What previews are held to."""
        return self.held_out or self.instance


def read(recipe: Recipe) -> Generator[Event, None, Material]:
    """Look through the folders that a recipe names.

    Raises:
        UserError: no identifier in the prompt, no images that can be used, or captions that cannot be read.
    """
    data, validation = recipe.data, recipe.validation
    subject = prompts.split_instance_prompt(data.instance_prompt, data.identifier)
    class_prompt = recipe.prior.class_prompt or subject.without_identifier(data.instance_prompt)
    instance = read_folder(data.instance_data_dir, strict=data.strict, resolution=data.resolution)
    yield Images(instance)
    found = yield from _captions(recipe, instance.images)
    held_out: Sequence[Path] = ()
    if validation.held_out_data_dir is not None and validation.validation_steps:
        report = read_folder(validation.held_out_data_dir, strict=data.strict, resolution=data.resolution)
        yield Images(report)
        held_out = report.images
    return Material(subject, class_prompt, instance.images, found, held_out)


def _captions(recipe: Recipe, instance: Sequence[Path]) -> Generator[Event, None, Captions]:
    """What the instance folder says of its images."""
    if recipe.data.captions == "none":
        found = Captions({}, {}, ())
    else:
        found = captions.read(recipe.data.instance_data_dir, [path.name for path in instance])
    if found.texts:
        yield Remark(
            f"{len(found.texts)} of {len(instance)} images have captions, which are their prompts; --captions none "
            f"ignores them"
        )
    elif recipe.data.shuffle_caption:
        yield Remark("--shuffle_caption: there are no captions; the tags of --instance_prompt are shuffled")
    if found.orphans:
        shown = ", ".join(escaped(name) for name in found.orphans[:3])
        yield Remark(f"{len(found.orphans)} captions have no image and are left out: {shown}")
    return found
