"""What a training learns from, as files and words: images, captions, prompts. Needs no torch."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from ..data import captions, masks, prompts
from ..data.captions import Captions
from ..data.folders import FolderReport, read_folder, read_instance_folder
from ..data.images import open_image
from ..data.prompts import InstancePrompt
from ..errors import UserError
from ..terminal import escaped
from .events import Event, Images, Remark
from .recipe import DataSettings, Recipe


class Material(NamedTuple):
    """Of one recipe."""

    report: FolderReport
    """Of the instance images."""
    prompt: str
    """The instance prompt: what an image shows of which nothing is `said`."""
    subject: InstancePrompt
    class_prompt: str
    said: dict[str, str]
    """Name of an instance image, as the report has it -> its caption, or what its folder is named."""
    shown: str
    """What previews show."""
    held_out: Sequence[Path]
    """Images of the subject that are not trained on; none where nothing asks for them."""
    said_held_out: dict[str, str]
    """Name of a held-out image -> its caption; the others show what the instance prompt says."""
    masks: Mapping[Path, Path]
    """Instance image or held-out image -> its mask; nothing where masks are not wanted."""
    classes: Sequence[Path] = ()
    """Images of the class, once there are all that are wanted."""
    said_classes: Mapping[str, str] = {}
    """Name of an image of the class -> its caption; the others show what the class prompt says."""

    @property
    def instance(self) -> tuple[Path, ...]:
        """Images of the subject."""
        return self.report.images

    @property
    def references(self) -> Sequence[Path]:
        """What previews are held to."""
        return self.held_out or self.instance

    def sample(self, prior: bool) -> Material:
        """The same with one image, which stands in for all others.

        Args:
            prior: it is one of the class, too.
        """
        part = self.report.parts[0]._replace(images=self.instance[:1])
        one = replace(self.report, parts=(part,))
        return self._replace(report=one, classes=part.images if prior else ())


def read(recipe: Recipe) -> Generator[Event, None, Material]:
    """Look through the folders that a recipe names.

    Raises:
        UserError: no identifier in the prompt, no images that can be used, or captions that cannot be read.
    """
    data, validation = recipe.data, recipe.validation
    reading = partial(read_folder, strict=data.strict, resolution=data.resolution, buckets=data.enable_bucket)
    report = read_instance_folder(data.instance_data_dir, reading)
    yield Images(report)
    prompt, subject = _prompt(data, report)
    class_prompt = recipe.prior.class_prompt or subject.without_identifier(prompt)
    said = yield from captions_of(data, report, "images")
    if data.shuffle_caption and not said:
        yield Remark("--shuffle_caption: there are no captions; the tags of --instance_prompt are shuffled")
    if data.instance_prompt is None:
        for part in report.repeated:
            if part.prompt is not None and part.prompt != prompt:
                for path in part.images:
                    said.setdefault(report.name_of(path), part.prompt)
    shown, held_out, said_held_out = validation.validation_prompt or prompt, tuple[Path, ...](), dict[str, str]()
    if validation.held_out_data_dir is not None and validation.validation_steps:
        held = reading(validation.held_out_data_dir)
        yield Images(held)
        held_out = held.images
        said_held_out = yield from captions_of(data, held, "held-out images")
    painted = yield from _masks(data, report, held_out)
    return Material(report, prompt, subject, class_prompt, said, shown, held_out, said_held_out, painted)


def _prompt(data: DataSettings, report: FolderReport) -> tuple[str, InstancePrompt]:
    """The prompt that is given, or that of the folder, with the identifier and the class noun in it."""
    if data.instance_prompt is not None:
        return data.instance_prompt, prompts.split_instance_prompt(data.instance_prompt, data.identifier)
    if report.prompt is None:
        raise UserError('--instance_prompt: is missing; say what the images show, as in "a photo of sks dog"')
    return report.prompt, prompts.split_folder_name(report.prompt, data.identifier)


def _masks(
    data: DataSettings, report: FolderReport, held_out: Sequence[Path]
) -> Generator[Event, None, Mapping[Path, Path]]:
    """The masks that are wanted, each of which can be used."""
    found, orphans = masks.beside((*report.images, *held_out))
    count = sum(path in found for path in report.images)
    if orphans:
        shown = ", ".join(escaped(mask.name) for mask in orphans[:3])
        yield Remark(f"{len(orphans)} masks have no image and are left out: {shown}")
    if not data.masked_loss:
        if count:
            yield Remark(f"{count} of {len(report.images)} images have masks, which only --masked_loss uses")
        return {}
    if not count:
        folder = escaped(report.folder, 1000)
        raise UserError(f"--masked_loss: there are no masks in {folder}; put dog.mask.png beside dog.jpg")
    for image, mask in found.items():
        masks.open_mask(mask, open_image(image).size)
    yield Remark(f"{count} of {len(report.images)} images have masks, by which their loss counts")
    return found


def captions_of(data: DataSettings, report: FolderReport, what: str) -> Generator[Event, None, dict[str, str]]:
    """What a folder says of its images, by the names that the report gives them.

    Raises:
        UserError: a caption cannot be read.
    """
    found = captions.of_report(report) if data.captions != "none" else Captions({}, {}, ())
    if found.texts:
        yield Remark(
            f"{len(found.texts)} of {len(report.images)} {what} have captions, which are their prompts; "
            f"--captions none ignores them"
        )
    if found.orphans:
        shown = ", ".join(escaped(name) for name in found.orphans[:3])
        yield Remark(f"{len(found.orphans)} captions have no image and are left out: {shown}")
    return found.texts
