"""The tasks: pairs of texts with labels, from GLUE by `datasets`, or made of toyworld's captions."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped

from . import entailment

Name = Literal["toyworld", "mnli", "qqp", "qnli"]
SIZES = {"train": 2400, "test": 600}
"""Of toyworld's examples, of which there could be any number."""


class Pairs(NamedTuple):
    """One split: two texts and a label each; anything that is read by place and knows its length."""

    first: Sequence[str]
    second: Sequence[str]
    labels: Sequence[int]


class Task(NamedTuple):
    """What is learned, and what it is tested on."""

    train: Pairs
    test: Pairs
    classes: int


class Glue(NamedTuple):
    """A task of GLUE: its columns, and the split with labels that it is tested on."""

    first: str
    second: str
    test: str
    classes: int


GLUE = {
    "mnli": Glue("premise", "hypothesis", "validation_matched", 3),
    "qqp": Glue("question1", "question2", "validation", 2),
    "qnli": Glue("question", "sentence", "validation", 2),
}
REPOSITORY = "nyu-mll/glue"


def load(name: Name, most: int | None = None) -> Task:
    """
    Args:
        most: keep the first so many training examples.

    Raises:
        UserError: `datasets` is not installed, or a task of GLUE is neither on the network nor in its cache.
    """
    task = _glue(name) if name in GLUE else _toyworld()
    return task._replace(train=Pairs(task.train.first[:most], task.train.second[:most], task.train.labels[:most]))


def _toyworld() -> Task:
    train, test = (_pairs(split) for split in entailment.SPLITS)
    return Task(train, test, len(entailment.LABELS))


def _pairs(split: entailment.Split) -> Pairs:
    found = entailment.examples(split, SIZES[split])
    return Pairs([one.premise for one in found], [one.hypothesis for one in found], [one.label for one in found])


def _glue(name: str) -> Task:
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"--task {name} needs datasets: pip install 'singlora-diffusion[language]'") from error
    row = GLUE[name]
    try:
        found = datasets.load_dataset(REPOSITORY, name)
    except Exception as error:  # no network, a name that is gone, a full disk
        why = escaped(" ".join(str(error).split()), 160)
        raise UserError(f"--task {name}: neither on the network nor in the cache of datasets ({why})") from error
    train, test = (
        Pairs(found[split][row.first], found[split][row.second], found[split]["label"]) for split in ("train", row.test)
    )
    return Task(train, test, row.classes)
