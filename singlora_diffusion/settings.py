"""Settings as frozen dataclasses: flags, ranges, command lines and JSON are all made from their fields.

A field's docstring is its help text, its annotation its range (`Annotated[int, Ge(1)]`), and a field that is itself a
dataclass is a group of flags in `--help`. Flags are flat: `recipe.adapter.rank` is `--rank`.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
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

    Raises:
        UserError: a value out of its range, or two values for one setting.
    """
    import tyro

    _refuse_two_values(kind, words)
    flat = (tyro.conf.OmitArgPrefixes,)
    found = tyro.cli(kind, args=words, prog=prog, description=description, use_underscores=True, config=flat)
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
    return kind(**own, **values)


def _refuse_two_values(kind: Any, words: Sequence[str]) -> None:
    """Raise a UserError where a flag, or a flag and its alias, have different values: one would be ignored."""
    names = dict(_spellings(kind))
    given: dict[str, tuple[str, list[str]]] = {}  # flag -> as it was written first, with its values
    for start, word in enumerate(words):
        written, _, value = word.partition("=")
        flag = names.get(written.replace("-", "_"))
        if flag is None:
            continue
        values = [value] if value else []
        for other in words[start + 1 :]:
            if other.startswith("--"):
                break
            values.append(other)
        before, other_values = given.setdefault(flag, (written, values))
        if other_values != values:
            same = f"{before} and {written} are one setting" if before != written else f"{written} is given twice"
            raise UserError(f"{same}: give one value")


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


def command_line(command: str, settings: Any) -> str:
    """The command line that says the same as a settings dataclass."""
    words = ["singlora", command]
    for one, value in _flat(settings):
        if value == _default(one):
            continue
        words.append(f"--no_{one.name}" if value is False else f"--{one.name}")
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
