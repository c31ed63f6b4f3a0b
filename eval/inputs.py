"""What there is to score: images and what is known of each, references, the base model's images."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any, NamedTuple

from singlora_diffusion.data import masks
from singlora_diffusion.data.folders import CONTACT_SHEET, image_files, read_folder
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import reason
from singlora_diffusion.sampling.manifest import MANIFEST, prompt_of, read_manifest
from singlora_diffusion.terminal import escaped

from .metrics import METRICS, Metric, Need

WRITTEN_BY_US = (".*", MANIFEST, CONTACT_SHEET, "scores*.json", "report*.html")
"""Names of what is no image and goes without saying: what the commands put beside images, and hidden files."""


FOLDERS = (
    "images",
    "references",
    "base_images",
    "training_images",
    "prior_images",
    "base_prior_images",
    "gallery",
    "masked_images",
    "masked_references",
)
"""The fields of `Inputs` that are images, in the order in which they are embedded."""


class Masked(NamedTuple):
    """An image of which only what its mask shows counts."""

    image: Path
    mask: Path
    """White where the subject is."""


@dataclass(frozen=True)
class Folders:
    """Folders of images that some scores need."""

    training_images: Path | None = None
    """Folder of the images that the model was trained on, where the references are others."""
    prior_images: Path | None = None
    """Folder of images of the class, made with the class noun and without the identifier."""
    base_prior_images: Path | None = None
    """Folder of the base model's images, of the same names, prompts and seeds as the prior images."""
    gallery: Path | None = None
    """Folder with a folder of real images for each of several subjects, for retrieval."""
    gallery_subject: str | None = None
    """The folder of the gallery that holds the subject itself."""


@dataclass(frozen=True)
class Inputs:
    """Everything that a scoring reads, as paths and manifest lines."""

    images: list[Path]
    lines: list[dict[str, Any]]  # of the manifest, one per image; {} without a manifest
    manifest: Path | None
    left_out: dict[str, str]  # file name -> why
    references: list[Path] = field(default_factory=list)
    base_images: list[Path] = field(default_factory=list)  # one per image, or none
    training_images: list[Path] = field(default_factory=list)
    prior_images: list[Path] = field(default_factory=list)
    base_prior_images: list[Path] = field(default_factory=list)  # one per prior image, or none
    gallery: list[Path] = field(default_factory=list)
    own: list[bool] = field(default_factory=list)  # which of the gallery are of the subject
    masked_images: list[Masked] = field(default_factory=list)  # one per image, or none
    masked_references: list[Masked] = field(default_factory=list)  # one per reference, or none

    @property
    def prompts(self) -> list[Hashable]:
        """What tells the prompt of each image."""
        return [prompt_of(line) for line in self.lines]


def read(
    images: Path,
    references: Path | None = None,
    base_images: Path | None = None,
    *,
    prompt: str | None = None,
    manifest: Path | None = None,
    more: Folders | None = None,
) -> Inputs:
    """Look through the folders.

    Args:
        images: folder; with a manifest in it, the images that it lists.
        references: folder of real images.
        base_images: folder with an image of the same name for each of `images`.
        prompt: of all images, where there is no manifest.
        manifest: one that lies elsewhere.
        more: further folders.

    Raises:
        UserError: a folder without images, a manifest that cannot be read or does not fit, a prompt said twice.
    """
    report = read_folder(images, strict=True, decode=False)
    left_out = {name: why for name, why in report.skipped if not any(fnmatch(name, one) for one in WRITTEN_BY_US)}
    listing = manifest or report.folder / MANIFEST
    if manifest is None and not listing.is_file():
        known = {} if prompt is None else {"prompt_without_token": prompt}
        paths, lines, found = list(report.images), [known] * len(report.images), None
    elif prompt is not None:
        raise UserError(f"{listing}: says the prompts already; leave out --prompt")
    else:
        left_out.pop(listing.name, None)  # one of another name
        by_name, present = read_manifest(listing), {path.name: path for path in report.images}
        if missing := [name for name in by_name if name not in present]:
            raise UserError(
                f"{listing}: lists {len(missing)} images that are not in {report.folder}, such as "
                f"{escaped(missing[0])}; generate again, the missing ones are made anew"
            )
        left_out.update({name: "not in the manifest" for name in present if name not in by_name})
        paths, lines, found = [present[name] for name in by_name], list(by_name.values()), listing
    real = [] if references is None else _references(references, report.folder)
    base = [] if base_images is None else _same_names(base_images, paths)
    further = _further(more or Folders())
    return Inputs(paths, lines, found, left_out, real, base, *further, _masked(paths), _masked(real))


def _masked(images: list[Path]) -> list[Masked]:
    """Each with its mask, if all have one."""
    known = masks.beside(images).of
    return [Masked(image, known[image]) for image in images] if len(known) == len(images) else []


def _further(more: Folders) -> tuple[list[Path], list[Path], list[Path], list[Path], list[bool]]:
    training = [] if more.training_images is None else image_files(more.training_images)
    prior = [] if more.prior_images is None else image_files(more.prior_images)
    base = [] if more.base_prior_images is None else _same_names(more.base_prior_images, prior)
    if more.gallery is None:
        return training, prior, base, [], []
    subjects = sorted(entry for entry in _listed(more.gallery) if entry.is_dir() and not entry.name.startswith("."))
    if len(subjects) < 2 or more.gallery_subject not in {subject.name for subject in subjects}:
        raise UserError(
            f"--gallery {escaped(more.gallery, 1000)}: needs a folder for each of two subjects or more; name the one "
            f"of this subject with --gallery_subject"
        )
    pairs = [(path, subject.name == more.gallery_subject) for subject in subjects for path in image_files(subject)]
    return training, prior, base, [path for path, _ in pairs], [own for _, own in pairs]


def _listed(folder: Path) -> list[Path]:
    try:
        return list(folder.iterdir())
    except OSError as error:
        raise UserError(f"{escaped(folder, 1000)}: cannot be listed: {reason(error)}") from error


def _references(folder: Path, images: Path) -> list[Path]:
    report = read_folder(folder, strict=True, decode=False)
    if report.folder.resolve() == images.resolve():
        raise UserError(
            f"{report.folder}: is named both as images and as references; an image is no reference of itself"
        )
    return list(report.images)


def _same_names(folder: Path, images: list[Path]) -> list[Path]:
    present = {path.name: path for path in read_folder(folder, strict=True, decode=False).images}
    if missing := [path.name for path in images if path.name not in present]:
        raise UserError(
            f"{folder}: lacks {len(missing)} of {len(images)} images, such as {escaped(missing[0])}; generate them "
            f"with the base model, the same prompts and seeds"
        )
    return [present[path.name] for path in images]


# --- which metrics it allows -----------------------------------------------------------------------------------------


def _no_references(inputs: Inputs) -> str | None:
    return None if inputs.references else "needs real images of the subject (--references)"


def _no_base_images(inputs: Inputs) -> str | None:
    return None if inputs.base_images else "needs the base model's images of the same prompts and seeds (--base_images)"


def _no_folder(name: str, what: str) -> Callable[[Inputs], str | None]:
    return lambda inputs: None if getattr(inputs, name) else f"needs {what} (--{name})"


def _no_class_noun(inputs: Inputs) -> str | None:
    if all(line.get("class_noun") for line in inputs.lines):
        return None
    return "the class noun is not known: the manifest lacks class_noun"


def _no_text(name: str) -> Callable[[Inputs], str | None]:
    def missing(inputs: Inputs) -> str | None:
        if all(line.get(name) is not None for line in inputs.lines):
            return None
        if inputs.manifest is None and any(inputs.lines):
            return "--prompt is taken to have no identifier"
        where = f"{inputs.manifest} lacks {name}" if inputs.manifest else f"there is no {MANIFEST}"
        return f"the prompts are not known: {where}; --prompt names one for all images"

    return missing


def _no_masks(name: str, what: str) -> Callable[[Inputs], str | None]:
    return lambda inputs: (
        None if getattr(inputs, name) else f"needs a mask beside each {what}: dog.mask.png for dog.png"
    )


MISSING: dict[Need, Callable[[Inputs], str | None]] = {
    "references": _no_references,
    "base_images": _no_base_images,
    "prompt": _no_text("prompt"),
    "prompt_without_token": _no_text("prompt_without_token"),
    "prompt_groups": lambda inputs: None,
    "class_prompt": _no_class_noun,
    "training_images": _no_folder("training_images", "the images that were trained on"),
    "prior_images": _no_folder("prior_images", "images of the class, made without the identifier"),
    "base_prior_images": _no_folder("base_prior_images", "the base model's images of the class prompts"),
    "gallery": _no_folder("gallery", "real images of several subjects"),
    "masked_images": _no_masks("masked_images", "image"),
    "masked_references": _no_masks("masked_references", "reference"),
}
"""Why a need of a metric cannot be met, and what to do; None: it can."""


def choose(names: tuple[str, ...], inputs: Inputs) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics to compute, and why the others cannot be.

    Args:
        names: rows of `METRICS`; empty: all that need not be asked for.

    Raises:
        UserError: one that is named cannot be computed, or none can.
    """
    chosen: dict[str, Metric] = {}
    skipped: dict[str, str] = {}
    for name in names or [name for name, metric in METRICS.items() if not metric.on_request]:
        metric = METRICS[name]
        reasons = [why for need in metric.needs if (why := MISSING[need](inputs)) is not None]
        if not reasons:
            chosen[name] = metric
        elif names:
            raise UserError(f"{name} cannot be computed: {reasons[0]}")
        else:
            skipped[name] = reasons[0]
    if not chosen:
        raise UserError(f"{inputs.images[0].parent}: nothing can be scored; name real images with --references")
    return chosen, skipped
