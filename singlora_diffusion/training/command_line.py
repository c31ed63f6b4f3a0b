"""The command line of `singlora train`: the recipe's flags, other programs' flags, and a file of settings."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from tyro.conf import arg

from .. import settings
from ..errors import UserError
from ..terminal import note
from . import config_file
from .other_flags import RENAMED, answer, in_our_words
from .recipe import Recipe


@dataclass(frozen=True)
class Training:
    """A recipe, and what to do with it."""

    recipe: Annotated[Recipe, arg(name="")]
    config: Path | None = None
    """File of settings by their flags' names: .toml, .yaml or .json, such as the recipe.json of a run. Flags win over
    it."""
    plan: bool = False
    """Say what the recipe comes to on this machine (parameters, memory, time), and stop. Nothing is written."""


def parse(kind: type[Training], words: Sequence[str], prog: str, description: str) -> Training:
    """`settings.parse` for somebody who knows diffusers' scripts or kohya's.

    Raises:
        UserError: one line for each flag that cannot be understood, or a value out of its range.
    """
    lines, ours, groups = list[str](), list[str](), settings.grouped(words)
    names, given = settings.flags(kind), {name for name, _ in groups}
    values, notes = _of_file(groups)
    for name, group in groups:
        found = None if name in names else answer(name, _values(group), {*given, *values})
        if found is not None:
            (lines if found.refused else notes).append(found.line)
        elif name:
            flag, its = in_our_words(name, _values(group))
            if flag != name and flag in given:
                lines.append(f"--{name} and --{flag} are one setting: give one of them")
            ours += [f"--{flag}={its[0]}"] if "=" in group[0] and len(its) == 1 else [f"--{flag}", *its]
        else:
            ours += group
    if lines := [*lines, *settings.complaints(kind, ours)]:
        raise UserError(*lines)
    for one in notes:
        note(one)
    return settings.parse(kind, ours, prog, description, values)


def _of_file(groups: Sequence[tuple[str, Sequence[str]]]) -> tuple[dict[str, Any], list[str]]:
    """What `config_file.read` finds in the file of --config; nothing without one."""
    named = [value for name, group in groups if RENAMED.get(name, name) == "config" for value in _values(group)[:1]]
    return config_file.read(Path(os.path.expanduser(named[-1]))) if named else ({}, [])


def _values(group: Sequence[str]) -> list[str]:
    """Of a flag with its words, as in `--rank 4` or `--rank=4`."""
    _, equals, value = group[0].partition("=")
    return [value, *group[1:]] if equals else list(group[1:])
