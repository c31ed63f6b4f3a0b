"""Settings as frozen dataclasses: flags, ranges, command lines and JSON are all made from their fields.

A field's docstring is its help text, its annotation its range (`Annotated[int, Ge(1)]`), and a field that is itself a
dataclass is a group of flags in `--help`. Flags are flat: `recipe.adapter.rank` is `--rank`.
"""

from __future__ import annotations

import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from annotated_types import Ge, Gt, Interval, Le

from .errors import UserError
from .terminal import escaped

Settings = TypeVar("Settings")

Count = Annotated[int, Interval(ge=1, le=10_000_000)]
"""How many: at least one."""
CountOrZero = Annotated[int, Interval(ge=0, le=10_000_000)]
"""How many, where 0 means none."""
Seed = Annotated[int, Interval(ge=0, lt=1 << 63)]
Positive = Annotated[float, Gt(0), Le(1e9)]
NotNegative = Annotated[float, Ge(0), Le(1e9)]
Number = Annotated[float, Interval(ge=-1e9, le=1e9)]
"""Any finite number a person means."""
Decay = Annotated[float, Interval(ge=0, lt=1)]
Side = Annotated[int, Interval(ge=8, le=16_384)]
"""Of an image, in pixels."""


def parse(kind: type[Settings], words: Sequence[str], prog: str, description: str) -> Settings:
    """Settings from a command line, every value in its range. Help and misspelt flags exit as tyro does.

    A path may begin with `~`, which shells leave alone in `--output_dir=~/runs`.

    Raises:
        UserError: a value out of its range, or different values for a flag and its alias.
    """
    import tyro

    _refuse_two_values(kind, words)
    flat = (tyro.conf.OmitArgPrefixes,)
    found = tyro.cli(kind, args=words, prog=prog, description=description, use_underscores=True, config=flat)
    found = _at_home(found)
    check(found)
    return found


def check(settings: Any) -> None:
    """Hold every field to the range its annotation declares.

    Raises:
        UserError: one line that names each flag out of its range.
    """
    from pydantic import ValidationError

    kind: Any = type(settings)
    try:
        _validator(kind).validate_python(asdict(settings))
    except ValidationError as error:
        found = dict.fromkeys(_complaint(one) for one in error.errors())
        raise UserError("; ".join(found)) from None


def build(kind: type[Settings], **values: Any) -> Settings:
    """Settings from values named as the flags are, whichever group they stand in; the rest by default.

    As in `parse`, a path may begin with `~`.

    Raises:
        TypeError: there is no such field, or one without a default is missing.
    """
    hints: dict[str, Any] = get_type_hints(kind)
    own: dict[str, Any] = {}
    for one in fields(kind):  # type: ignore[arg-type]
        if is_dataclass(hints[one.name]):
            inside = {key: values.pop(key) for key in _flags(hints[one.name]) if key in values}
            if inside or _default(one) is MISSING:
                own[one.name] = build(hints[one.name], **inside)
    return _at_home(kind(**own, **values))


def _at_home(value: Any) -> Any:
    """Settings, a tuple or a path, with `~` spelled out at the beginning of each path."""
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{one.name: _at_home(getattr(value, one.name)) for one in fields(value)})
    if isinstance(value, tuple):
        return tuple(map(_at_home, value))
    return Path(os.path.expanduser(value)) if isinstance(value, Path) else value


def _refuse_two_values(kind: Any, words: Sequence[str]) -> None:
    """Raise a UserError where a flag and its alias have different values: one would be ignored.

    Of one flag given twice the last counts, as everywhere.
    """
    names = {f"__{written}": flag for written, flag in spellings(kind).items()}
    given: dict[str, dict[str, list[str]]] = {}  # flag -> spelling -> values
    for start, word in enumerate(words):
        written, _, value = word.partition("=")
        if flag := names.get(written.replace("-", "_")):
            following = itertools.takewhile(lambda other: not other.startswith("--"), words[start + 1 :])
            given.setdefault(flag, {})[written.replace("-", "_")] = [value] if value else list(following)
    for written_as in given.values():
        if any(values != next(iter(written_as.values())) for values in written_as.values()):
            shown = " and ".join(f"--{spelling.strip('_')}" for spelling in written_as)
            raise UserError(f"{shown} are one setting: give one value")


def spellings(kind: Any) -> dict[str, str]:
    """Every flag and its aliases, without dashes and with underscores inside -> the field."""
    return {written.removeprefix("__"): flag for written, flag in _spellings(kind)}


def _spellings(kind: Any) -> Iterator[tuple[str, str]]:
    """(as it may be written, with underscores for dashes; the field) for every flag and its aliases."""
    hints = get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        if is_dataclass(hints[one.name]):
            yield from _spellings(hints[one.name])
            continue
        yield f"__{one.name}", one.name
        for extra in getattr(hints[one.name], "__metadata__", ()):
            yield from ((alias.replace("-", "_"), one.name) for alias in getattr(extra, "aliases", None) or ())


def _flags(kind: Any) -> Iterator[str]:
    hints = get_type_hints(kind)
    for one in fields(kind):
        yield from _flags(hints[one.name]) if is_dataclass(hints[one.name]) else (one.name,)


def replaced(settings: Settings, **values: Any) -> Settings:
    """A copy with other values, named as the flags are, whichever group they stand in.

    Raises:
        TypeError: there is no such field.
    """
    own = {one.name: getattr(settings, one.name) for one in fields(settings)}  # type: ignore[arg-type]
    groups = {name: value for name, value in own.items() if is_dataclass(value)}
    for group, value in groups.items():
        inside = {key: values.pop(key) for key in _names(value) if key in values}
        own[group] = replaced(value, **inside) if inside else value
    if unknown := set(values) - set(own):
        raise TypeError(f"{type(settings).__name__} has no field {sorted(unknown)}")
    return type(settings)(**{**own, **values})


def as_json(settings: Any) -> dict[str, Any]:
    """Every field by its flag's name, as JSON knows it: paths as text, tuples as lists."""
    return {one.name: _plain(value) for one, value in _flat(settings)}


def changed(settings: Any) -> dict[str, Any]:
    """The fields that are not as they are by default, by their flags' names."""
    return {one.name: value for one, value in _flat(settings) if value != _default(one)}


def command_line(command: str, settings: Any) -> str:
    """The command line that says the same as a settings dataclass."""
    words = ["singlora", command]
    for name, value in changed(settings).items():
        words.append(f"--no_{name}" if value is False else f"--{name}")
        if not isinstance(value, bool):
            words += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


def _flat(settings: Any) -> Iterator[tuple[Field[Any], Any]]:
    for one in fields(settings):
        value = getattr(settings, one.name)
        if is_dataclass(value):
            yield from _flat(value)
        else:
            yield one, value


def _names(settings: Any) -> set[str]:
    return {one.name for one, _ in _flat(settings)}


def _default(one: Field[Any]) -> Any:
    return one.default_factory() if one.default_factory is not MISSING else one.default


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


@cache
def _validator(kind: Any) -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)


_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def _complaint(error: Mapping[str, Any]) -> str:
    flag = next(str(part) for part in reversed(error["loc"]) if isinstance(part, str) and part.isidentifier())
    words, key = _BOUNDS.get(error["type"], ("", ""))
    wanted = f"must be {words} {error['ctx'][key]:g}" if words else f"is not valid ({error['msg']})"
    return f"--{flag} {escaped(error['input'], 40)}: {wanted}"
