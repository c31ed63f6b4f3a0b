"""The command line of `singlora train`: the recipe's flags, other programs' flags, and a file of settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from tyro.conf import arg

from .. import settings
from ..errors import UserError
from ..terminal import note
from .other_flags import answer, in_our_words
from .recipe import Recipe


@dataclass(frozen=True)
class Training:
    """A recipe, and what to do with it."""

    recipe: Annotated[Recipe, arg(name="")]


def parse(kind: type[Training], words: Sequence[str], prog: str, description: str) -> Training:
    """`settings.parse` for somebody who knows diffusers' scripts or kohya's.

    Raises:
        UserError: one line for each flag that cannot be understood, or a value out of its range.
    """
    notes: list[str] = []
    lines: list[str] = []
    ours: list[str] = []
    groups = settings.grouped(words)
    names, given = settings.spellings(kind), {name for name, _ in groups}
    for name, group in groups:
        found = None if name in names else answer(name, _values(group), given)
        if found is not None:
            (lines if found.refused else notes).append(found.line)
        elif name:
            flag, values = in_our_words(name, _values(group))
            if flag != name and flag in given:
                lines.append(f"--{name} and --{flag} are one setting: give one of them")
            ours += [f"--{flag}={values[0]}"] if "=" in group[0] and len(values) == 1 else [f"--{flag}", *values]
        else:
            ours += group
    if lines := [*lines, *settings.complaints(kind, ours)]:
        raise UserError(*lines)
    for one in notes:
        note(one)
    return settings.parse(kind, ours, prog, description)


def _values(group: Sequence[str]) -> list[str]:
    """Of a flag with its words, as in `--rank 4` or `--rank=4`."""
    _, equals, value = group[0].partition("=")
    return [value, *group[1:]] if equals else list(group[1:])
