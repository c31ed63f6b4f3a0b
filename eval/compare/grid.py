"""What is to be run: a cell for each subject, method, rate and seed, in an order in which any beginning is fair."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from singlora_diffusion.adapters import budget
from singlora_diffusion.adapters.budget import Match
from singlora_diffusion.sampling.settings import parse_seeds

from .methods import folder_name, parsed
from .settings import CompareSettings, learning_rates
from .subjects import Subject, Subjects
from .tuning import Choice

BASE = "base"
"""What stands for a method where nothing is trained."""


@dataclass(frozen=True)
class Cell:
    """One training with its images and scores, or the base model's images of a subject."""

    subject: str
    method: str  # a word of `--methods`, or BASE
    rate: float = 0.0
    seed: int = 0
    other_threads: bool = False
    """The same again with another number of threads."""

    @property
    def name(self) -> str:
        """Its folder's name."""
        if self.method == BASE:
            return BASE
        return f"lr-{self.rate:g}-seed-{self.seed}" + ("-other-threads" if self.other_threads else "")


@dataclass(frozen=True)
class Plan:
    """All that a cell needs beside itself; goes to the workers as it is."""

    settings: CompareSettings
    subjects: Mapping[str, Subject]
    gallery: Path
    """A folder with a folder of real images for each subject."""
    sizes: Mapping[str, Match]
    """Rank and trained parameters of each method."""

    def folder(self, cell: Cell) -> Path:
        """Where a cell's recipe, log, images and scores are."""
        parts = (
            (cell.subject, cell.name) if cell.method == BASE else (cell.subject, folder_name(cell.method), cell.name)
        )
        return self.settings.run.output_dir.joinpath("cells", *parts)


def plan(settings: CompareSettings, subjects: Subjects) -> Plan:
    """Solve the ranks.

    Raises:
        UserError: a base model or targets that are not there, or a budget of nothing.
    """
    model, targets = settings.training.pretrained_model_name_or_path, settings.what.targets
    goal = budget.target_count(settings.what.match, budget.shapes(model, targets))
    sizes = {name: _size(name, goal, model, targets) for name in settings.what.methods}
    return Plan(settings, subjects.by_name, subjects.gallery, sizes)


def _size(name: str, goal: int, model: str, targets: tuple[str, ...] | None) -> Match:
    """The budget is that of the comparison's targets, whatever layers the method adapts itself."""
    chosen = parsed(name)
    config = chosen.config
    layers = budget.shapes(model, targets if config.targets is None else config.targets)
    if chosen.rank is None:
        return budget.match(goal, config, layers)
    count = budget.count(config, chosen.rank, layers)
    return Match(chosen.rank, count, (count - goal) / goal)


def base_cells(subjects: Sequence[Subject]) -> Iterator[Cell]:
    """The base model's images of each subject's prompts."""
    return (Cell(subject.name, BASE) for subject in subjects)


def tuning_cells(settings: CompareSettings, subjects: Sequence[Subject]) -> Iterator[Cell]:
    """Seed by seed and subject by subject, all rates of all methods."""
    rates = learning_rates(settings.what)
    for seed in parse_seeds(settings.training.tuning_seeds):
        for subject in subjects:
            for place in range(settings.what.rates):
                yield from (Cell(subject.name, method, grid[place], seed) for method, grid in rates.items())


def test_cells(settings: CompareSettings, subjects: Sequence[Subject], choices: Mapping[str, Choice]) -> Iterator[Cell]:
    """Seed by seed and subject by subject, each method at its chosen rate; at none as long as none is chosen."""
    for seed in parse_seeds(settings.training.seeds):
        for subject in subjects:
            for method in settings.what.methods:
                rate = choices[method].rate if method in choices else 0.0
                yield Cell(subject.name, method, rate, seed)


def noise_cells(settings: CompareSettings, test: Sequence[Cell]) -> Iterator[Cell]:
    """The first cells of the test again, with another number of threads."""
    for cell in test[: settings.decision.noise_cells]:
        yield Cell(cell.subject, cell.method, cell.rate, cell.seed, other_threads=True)
