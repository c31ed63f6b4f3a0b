"""What generating, scoring and training leave behind, read: pictures with prompts and scores, recipes, logs."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from singlora_diffusion.data.images import check
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.manifest import read_manifest

from .metrics import METRICS, mean_over_prompts


@dataclass(frozen=True)
class Run:
    """A folder of pictures, and where to find what belongs to it."""

    name: str
    images: Path
    """Folder of the pictures; a manifest.jsonl in it says what each was made from."""
    scores: tuple[Path, ...] | None = None
    """Results of eval.score, one per kind of references. None: every scores*.json among the pictures."""
    training: Path | None = None
    """Folder with recipe.json and log.jsonl. None: where the manifest says the adapter is."""
    real: bool = False
    """Real pictures of the subject: a ceiling, not a competitor."""
    facts: Mapping[str, str] = field(default_factory=dict)
    """What else to say about it, such as {"parameters": "45,056"}."""


@dataclass(frozen=True)
class Column:
    """One score."""

    metric: str  # a row of METRICS
    mode: str | None  # what the references were: train, heldout, all; None for scores that need none


@dataclass(frozen=True)
class Picture:
    """One generated picture: its line of the manifest and its scores."""

    path: Path
    about: dict[str, Any]
    scores: dict[Column, float]

    @property
    def prompt(self) -> Hashable:
        """What it shares with other pictures of its prompt; a picture of unknown prompt is known by its name."""
        for name in ("template", "prompt_without_token", "prompt"):
            if self.about.get(name):
                return str(self.about[name])
        return self.path.stem


@dataclass(frozen=True)
class Loaded:
    """A run, read."""

    run: Run
    trained: bool
    pictures: list[Picture]
    results: list[dict[str, Any]]  # of eval.score
    recipe: dict[str, Any]
    log: list[dict[str, Any]]  # one row per step

    def mean(self, column: Column) -> float | None:
        """The subject's score: over pictures, then over prompts."""
        known = [picture for picture in self.pictures if column in picture.scores]
        if not known:
            return None
        scores = np.array([picture.scores[column] for picture in known])
        return mean_over_prompts(scores, [picture.prompt for picture in known])

    def per_prompt(self, column: Column) -> dict[Hashable, float]:
        """Prompt -> mean over its pictures."""
        groups: dict[Hashable, list[float]] = {}
        for picture in self.pictures:
            if column in picture.scores:
                groups.setdefault(picture.prompt, []).append(picture.scores[column])
        return {prompt: float(np.mean(scores)) for prompt, scores in groups.items()}


def load(run: Run) -> Loaded:
    """Read what there is of a run.

    Raises:
        UserError: no pictures, or a manifest, result, recipe or log that cannot be read.
    """
    folder = run.images.expanduser()
    manifest = folder / "manifest.jsonl"
    lines = read_manifest(manifest) if manifest.is_file() else {}
    results = [_result(path) for path in (sorted(folder.glob("scores*.json")) if run.scores is None else run.scores)]
    scores = _scores(results)
    pictures = [
        Picture(path, {**known, **lines.get(path.name, {})}, values)
        for path in check(folder, decode=False).pictures
        if not lines or path.name in lines
        for known, values in [scores.get(path.name, ({}, {}))]
    ]
    if not pictures:
        raise UserError(f"{manifest}: lists no picture that is in {folder}; generate again")
    recipe, log = _training(run.training or _adapter_folder(lines.values()))
    trained = bool(recipe or log) or any(row.get("adapter") for row in lines.values())
    return Loaded(run, trained, pictures, results, recipe, log)


def scored(loaded: Iterable[Loaded]) -> list[Column]:
    """Every score that some run has: likeness to held-out pictures first, agreement with the prompt last."""
    found = {column for one in loaded for picture in one.pictures for column in picture.scores}
    modes: Sequence[str | None] = ("heldout", "all", "train", None)
    metrics = ("dino", "clip_i", *METRICS)
    return sorted(found, key=lambda column: (modes.index(column.mode), metrics.index(column.metric)))


def ceiling(loaded: Sequence[Loaded], column: Column) -> float | None:
    """What real pictures score: those of a real run, else the references among themselves."""
    for one in loaded:
        if one.run.real and (mean := one.mean(column)) is not None:
            return mean
    for result in (result for one in loaded for result in one.results):
        if column.mode is not None and result["reference_mode"] == column.mode:
            value = result["metrics"].get(column.metric, {}).get("real_to_real")
            if value is not None:
                return float(value)
    return None


def warnings(loaded: Sequence[Loaded]) -> Iterator[str]:
    """What forbids or disturbs reading the numbers side by side."""
    generated = [one for one in loaded if not one.run.real]
    results = [result for one in generated for result in one.results]
    for role in ("clip", "dino"):
        encoders = {result["encoders"][role]["fingerprint"] for result in results if role in result["encoders"]}
        if len(encoders) > 1:
            yield f"The {role.upper()} scores come from {len(encoders)} different encoders: they cannot be compared."
    references: dict[str, set[frozenset[str]]] = {}
    for result in results:
        if result["reference_mode"]:
            keys = frozenset(reference["sha256"] for reference in result["references"])
            references.setdefault(result["reference_mode"], set()).add(keys)
    if any(len(kinds) > 1 for kinds in references.values()):
        yield "The runs were scored against different real pictures: likeness to them cannot be compared."
    if len({frozenset(picture.prompt for picture in one.pictures) for one in generated}) > 1:
        yield "The runs do not have the same prompts: their means are over different ones."
    for one in generated:
        for key, what in (("blank", "black or of one colour"), ("copies", "pixel for pixel equal to a reference")):
            count = max((int(result.get(key, 0)) for result in one.results), default=0)
            if count:
                yield f"{one.run.name}: {count} of {len(one.pictures)} pictures {'is' if count == 1 else 'are'} {what}."


def _scores(results: Iterable[dict[str, Any]]) -> dict[str, tuple[dict[str, Any], dict[Column, float]]]:
    """File name -> what the results know of its prompt, and its scores."""
    found: dict[str, tuple[dict[str, Any], dict[Column, float]]] = {}
    for result in results:
        for row in result["pictures"]:
            about, scores = found.setdefault(row["file"], ({}, {}))
            about.update({key: value for key, value in row.items() if key not in METRICS})
            for name, metric in METRICS.items():
                if name in row:
                    mode = result["reference_mode"] if metric.against == "references" else None
                    scores[Column(name, mode)] = row[name]
    return found


def _result(path: Path) -> dict[str, Any]:
    content = _json(path)
    needed = {"pictures", "metrics", "reference_mode", "references", "encoders", "protocol"}
    if not needed <= content.keys():
        raise UserError(f"{path}: is no result of eval.score (it lacks {min(needed - content.keys())}); score again")
    return content


def _adapter_folder(lines: Iterable[Mapping[str, Any]]) -> Path | None:
    """The folder of the training run that made these pictures."""
    adapters = {row["adapter"] for row in lines if isinstance(row.get("adapter"), str)}
    if len(adapters) != 1:
        return None
    path = Path(adapters.pop())
    return path if path.is_dir() else path.parent if path.is_file() else None


def _training(folder: Path | None) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    if folder is None:
        return {}, []
    recipe, log = folder / "recipe.json", folder / "log.jsonl"
    return _json(recipe) if recipe.is_file() else {}, _log(log) if log.is_file() else []


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); make it again") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: is no JSON object; make it again")
    return content


def _log(path: Path) -> list[dict[str, Any]]:
    """Its rows; what a crash left of the last line does not count."""
    rows = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and "step" in row:
            rows.append(row)
    return rows
