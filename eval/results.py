"""What generating, scoring and training leave behind, read: images with prompts and scores, recipes, logs."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from singlora_diffusion.data.folders import read_folder
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import read_json, reason
from singlora_diffusion.sampling.manifest import MANIFEST, prompt_of, read_manifest

from .encoder_table import ROLES
from .metrics import METRICS, by_prompt, mean_over_prompts
from .score_file import REFERENCES, Result, ScoreKey, read_result


@dataclass(frozen=True)
class ImageSet:
    """A folder of images, and where to find what belongs to it."""

    name: str
    images: Path
    """Folder of the images; a manifest.jsonl in it says what each was made from."""
    scores: tuple[Path, ...] | None = None
    """Results of scoring, one per kind of references. None: every scores*.json among the images."""
    training: Path | None = None
    """Folder with recipe.json and log.jsonl. None: where the manifest says the adapter is."""
    real: bool = False
    """Real images of the subject: what to be compared with, not a competitor."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else to say about it, such as {"parameters": "45,056"}."""


@dataclass(frozen=True)
class ScoredImage:
    """One image: its line of the manifest and its scores."""

    path: Path
    about: dict[str, Any]
    scores: dict[ScoreKey, float]

    @property
    def prompt(self) -> Hashable:
        """What it shares with other images of its prompt; an image of unknown prompt is known by its name."""
        return prompt_of(self.about) or self.path.stem


@dataclass(frozen=True)
class ScoredSet:
    """An image set, read."""

    source: ImageSet
    trained: bool
    images: list[ScoredImage]
    results: list[Result]
    recipe: dict[str, Any]
    log: list[dict[str, float]]  # one row per step

    @property
    def name(self) -> str:
        return self.source.name

    def mean(self, key: ScoreKey) -> float | None:
        """The subject's score: over images, then over prompts; of a metric per set its one value."""
        if METRICS[key.metric].per == "set":
            return self.set_scores().get(key)
        known = [image for image in self.images if key in image.scores]
        if not known:
            return None
        return mean_over_prompts(np.array([image.scores[key] for image in known]), [image.prompt for image in known])

    def per_prompt(self, key: ScoreKey) -> dict[Hashable, float]:
        """Prompt -> mean over its images; empty for a metric per set."""
        known = [image for image in self.images if key in image.scores]
        groups = by_prompt([image.scores[key] for image in known], [image.prompt for image in known])
        return {prompt: float(np.mean(scores)) for prompt, scores in groups.items()}

    def set_scores(self) -> dict[ScoreKey, float]:
        """Values of the metrics per set."""
        return {
            result.key(name): summary.value
            for result in self.results
            for name, summary in result.metrics.items()
            if name in METRICS and METRICS[name].per == "set" and summary.value is not None
        }


def load(source: ImageSet) -> ScoredSet:
    """Read what there is of an image set.

    Raises:
        UserError: no images, or a manifest, result, recipe or log that cannot be read.
    """
    folder = source.images
    manifest = folder / MANIFEST
    report = read_folder(folder, strict=True, decode=False)
    lines = read_manifest(manifest) if manifest.is_file() else {}
    results = [
        read_result(path) for path in (sorted(folder.glob("scores*.json")) if source.scores is None else source.scores)
    ]
    scores = _scores(results)
    images = [
        ScoredImage(path, {**known, **lines.get(path.name, {})}, values)
        for path in report.images
        if not lines or path.name in lines
        for known, values in [scores.get(path.name, ({}, {}))]
    ]
    if not images:
        raise UserError(f"{manifest}: lists no image that is in {folder}; generate again")
    recipe, log = _training(source.training or _adapter_folder(lines.values()))
    trained = bool(recipe or log) or any(row.get("adapter") for row in lines.values())
    return ScoredSet(source, trained, images, results, recipe, log)


def scored(sets: Iterable[ScoredSet]) -> list[ScoreKey]:
    """Every score that some set has: likeness to held-out images first, the metrics without references last."""
    found: set[ScoreKey] = set()
    for one in sets:
        found.update(one.set_scores(), *(image.scores for image in one.images))
    modes: Sequence[str | None] = (*REFERENCES, None)
    metrics = ("dino", *METRICS)  # the headline of a subject's likeness first
    return sorted(found, key=lambda key: (modes.index(key.mode), metrics.index(key.metric)))


def real_score(sets: Sequence[ScoredSet], key: ScoreKey) -> float | None:
    """What real images score: those of a real set, else the references among themselves."""
    for one in sets:
        if one.source.real and (mean := one.mean(key)) is not None:
            return mean
    for result in (result for one in sets for result in one.results):
        if key.mode is not None and result.reference_mode == key.mode and key.metric in result.metrics:
            value = result.metrics[key.metric].real_to_real
            if value is not None:
                return value
    return None


def warnings(sets: Sequence[ScoredSet]) -> Iterator[str]:
    """What forbids or disturbs reading the numbers side by side."""
    generated = [one for one in sets if not one.source.real]
    results = [result for one in generated for result in one.results]
    for role, label in ROLES.items():
        encoders = {result.encoders[role].fingerprint for result in results if role in result.encoders}
        if len(encoders) > 1:
            yield f"The {label} scores come from {len(encoders)} different encoders: they cannot be compared."
    references: dict[str, set[frozenset[str]]] = {}
    for result in results:
        if result.reference_mode:
            keys = frozenset(reference.sha256 for reference in result.references)
            references.setdefault(result.reference_mode, set()).add(keys)
    if any(len(kinds) > 1 for kinds in references.values()):
        yield "The sets were scored against different real images: likeness to them cannot be compared."
    if len({frozenset(image.prompt for image in one.images) for one in generated}) > 1:
        yield "The sets do not have the same prompts: their means are over different ones."
    for one in generated:
        for key, what in (("blank", "black or of one colour"), ("copies", "pixel for pixel equal to a reference")):
            count = max((getattr(result, key) for result in one.results), default=0)
            if count:
                yield f"{one.name}: {count} of {len(one.images)} images {'is' if count == 1 else 'are'} {what}."


def _scores(results: Iterable[Result]) -> dict[str, tuple[dict[str, Any], dict[ScoreKey, float]]]:
    """File name -> what the results know of its prompt, and its scores."""
    found: dict[str, tuple[dict[str, Any], dict[ScoreKey, float]]] = {}
    for result in results:
        for row in result.images:
            about, scores = found.setdefault(row["file"], ({}, {}))
            about.update({key: value for key, value in row.items() if key not in METRICS})
            for name in METRICS:
                if (value := _finite(row.get(name))) is not None:
                    scores[result.key(name)] = value
    return found


def _adapter_folder(lines: Iterable[Mapping[str, Any]]) -> Path | None:
    """The folder of the training run that made these images."""
    adapters = {row["adapter"] for row in lines if row.get("adapter")}
    if len(adapters) != 1:
        return None
    path = Path(adapters.pop())
    return path if os.path.isdir(path) else path.parent if os.path.isfile(path) else None


def _training(folder: Path | None) -> tuple[dict[str, Any], list[dict[str, float]]]:
    if folder is None:
        return {}, []
    recipe, log = folder / "recipe.json", folder / "log.jsonl"
    return read_json(recipe) if recipe.is_file() else {}, _log(log) if log.is_file() else []


def _log(path: Path) -> list[dict[str, float]]:
    """The numbers of each step. A line that is no row of numbers, as a crash may leave, does not count."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from error
    rows = []
    for line in text.split("\n"):
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            numbers = {key: number for key, value in row.items() if (number := _finite(value)) is not None}
            if "step" in numbers:
                rows.append(numbers)
    return rows


def _finite(value: object) -> float | None:
    """A number that can be drawn; None for everything else that JSON may hold."""
    if isinstance(value, bool) or not isinstance(value, int | float) or abs(value) > 1e300:
        return None
    return float(value) if math.isfinite(value) else None
