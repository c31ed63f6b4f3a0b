"""Natural language inference made of toyworld's captions: is a second caption true of what the first one describes?

A stand-in for MNLI where there is no network: a premise says some of an object's class, colour, pattern and place, and
a hypothesis is entailed by it, contradicts it in one of them, or says something that the premise leaves open. Premises
that name a held-out pair of class and colour make up the test split, and the training split has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np

from singlora_diffusion.toyworld.captions import PATTERN_WORDS, PLACES, SAY_COLOUR, SAY_PATTERN, SAY_PLACE, compose
from singlora_diffusion.toyworld.identities import BACKGROUNDS, CLASSES, COLOURS, PATTERNS

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = ("train", "test")
LABELS = ("entailed", "open", "contradicted")
"""In MNLI's order."""
HELD_OUT = 5
"""One class and colour in so many is held out."""


@dataclass(frozen=True)
class Facts:
    """What captions say of an object; the class always, anything else may be left out."""

    cls: str
    colour: str | None
    pattern: str | None
    place: str | None


class Example(NamedTuple):
    """Two captions, and what the second is to the first."""

    premise: str
    hypothesis: str
    label: int  # of LABELS


VALUES = {
    "cls": CLASSES,
    "colour": COLOURS,
    "pattern": tuple(name for name in PATTERNS if name != "plain"),  # no caption says plain
    "place": BACKGROUNDS,
}
MAY_LACK = ("colour", "pattern", "place")


def held_out(cls: str, colour: str | None) -> bool:
    """Whether a class and a colour are a pair of the test split: two colours of each class."""
    return colour is not None and (CLASSES.index(cls) + COLOURS.index(colour)) % HELD_OUT == 0


def examples(split: Split, number: int, seed: int = 0) -> list[Example]:
    """So many examples, a third of each label; the first ones are the same whatever the number."""
    rng = np.random.default_rng((29, SPLITS.index(split), seed))
    return [_example(split, rng, place % len(LABELS)) for place in range(number)]


def _example(split: Split, rng: np.random.Generator, label: int) -> Example:
    while True:
        premise = _drawn(rng)
        if held_out(premise.cls, premise.colour) != (split == "test"):
            continue
        hypothesis = _hypothesis(premise, label, rng)
        if hypothesis is None or (split == "train" and held_out(hypothesis.cls, hypothesis.colour)):
            continue
        return Example(said(premise, rng), said(hypothesis, rng), label)


def _drawn(rng: np.random.Generator) -> Facts:
    """What a caption says, as often as toyworld's own say it."""
    said_ = rng.random(3) < (SAY_COLOUR, SAY_PATTERN, SAY_PLACE)
    return replace(_anything(rng), **_without(name for name, there in zip(MAY_LACK, said_, strict=True) if not there))


def _anything(rng: np.random.Generator) -> Facts:
    return Facts(**{name: options[rng.integers(len(options))] for name, options in VALUES.items()})


def _without(names: Iterable[str]) -> dict[str, Any]:
    return dict.fromkeys(names)


def _hypothesis(premise: Facts, label: int, rng: np.random.Generator) -> Facts | None:
    """A caption of that label; None where the premise has none."""
    there = [name for name in MAY_LACK if getattr(premise, name) is not None]
    absent = [name for name in MAY_LACK if name not in there]
    left_out = _without(name for name in there if rng.random() < 0.5)
    found = replace(premise, **left_out)
    if LABELS[label] == "open":
        added = [name for name in absent if rng.random() < 0.5]
        if not added:
            return None
        values: dict[str, Any] = {name: _other(name, None, rng) for name in added}
        return replace(found, **values)
    if len(left_out) == len(there):
        return None
    if LABELS[label] == "contradicted":
        sayable = ["cls", *(name for name in there if name not in left_out)]
        changed = sayable[rng.integers(len(sayable))]
        return replace(found, **{changed: _other(changed, getattr(premise, changed), rng)})
    return found


def _other(name: str, value: str | None, rng: np.random.Generator) -> str:
    options = [option for option in VALUES[name] if option != value]
    return options[rng.integers(len(options))]


def said(facts: Facts, rng: np.random.Generator) -> str:
    """A caption that says exactly this, in one of toyworld's phrasings."""
    phrasings = PATTERN_WORDS[facts.pattern or "plain"]
    before, after = phrasings[rng.integers(len(phrasings))]
    places = PLACES[facts.place] if facts.place else ("",)
    return compose(
        facts.cls,
        colour=facts.colour or "",
        before=before,
        after=after,
        place=places[rng.integers(len(places))],
        photo=bool(rng.integers(2)),
    )


def documents(number: int, seed: int = 0) -> Iterator[tuple[str, str]]:
    """What language models are pretrained on: two captions of one object in one place, nothing of it held out."""
    rng = np.random.default_rng((31, seed))
    for _ in range(number):
        whole = _anything(rng)
        first, second = (replace(whole, **_without(name for name in MAY_LACK if rng.random() < 0.4)) for _ in range(2))
        yield said(first, rng), said(second, rng)
