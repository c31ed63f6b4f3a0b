"""Settings as frozen dataclasses: flags, ranges, command lines and JSON are all made from their fields.

A field's docstring is its help text, its annotation its range (`Annotated[int, Ge(1)]`), and a field that is itself a
dataclass is a group of flags in `--help`. Flags are flat: `recipe.adapter.rank` is `--rank`.
"""

from __future__ import annotations

import difflib
import itertools
import os
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, asdict, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

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


def parse(
    kind: type[Settings], words: Sequence[str], prog: str, description: str, given: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from a command line, every value in its range. Help and words of the wrong type exit as tyro does.

    A path may begin with `~`, which shells leave alone in `--output_dir=~/runs`.

    Args:
        given: values by their fields' names, as `read` returns them, where the command line says nothing.

    Raises:
        UserError: unknown flags, a value out of its range, or different values for a flag and its alias.
    """
    import tyro

    if lines := complaints(kind, words):
        raise UserError(*lines)
    _refuse_two_values(kind, words)
    found = tyro.cli(
        kind,
        args=words,
        prog=prog,
        description=description,
        default=_partly(kind, dict(given)) if given else None,
        use_underscores=True,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    found = _at_home(found)
    check(found)
    return found


def complaints(kind: Any, words: Sequence[str]) -> list[str]:
    """One line for each flag of a command line that does not exist, or whose value is none of its choices."""
    names, choices, lines = flags(kind), dict(_choices(kind)), list[str]()
    for name, (word, *values) in grouped(words):
        value = next(iter(values), "") if "=" not in word else word.partition("=")[2]
        if name and name not in names:
            lines.append(unknown(name, names))
        elif value and value not in choices.get(names.get(name, ""), [value]):
            lines.append(f"--{name} {escaped(value)}: must be one of {', '.join(choices[names[name]])}")
    return lines


def typed(kind: Any, values: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Values out of a file as their fields have them, and one line for each that is of another type.

    Text that says a number will do, as some programs write 1e-4; YAML's `no` is the word where a field has it.
    """
    from pydantic import TypeAdapter, ValidationError

    found, lines, kinds = dict[str, Any](), list[str](), _type_of(kind)
    for name, value in values.items():
        said = {True: "yes", False: "no"}[value] if isinstance(value, bool) and kinds[name] is not bool else value
        try:
            found[name] = TypeAdapter(kinds[name]).validate_python(said)
        except ValidationError as error:
            shown = f" {escaped(said, 40)}" if isinstance(said, str | int | float | None) else ""
            lines.append(f"--{name}{shown}: is not valid ({error.errors()[0]['msg']})")
    return found, lines


def grouped(words: Sequence[str]) -> list[tuple[str, list[str]]]:
    """A command line flag by flag: (name, the words it stands in), the name with underscores and without dashes.

    Words before the first flag come under the name "". `-h` is no name: it ends up among them, or behind a flag.
    """
    groups: list[tuple[str, list[str]]] = [("", [])]
    for word in words:
        if word.startswith("--") and word.strip("-"):
            groups.append((word[2:].partition("=")[0].replace("-", "_"), []))
        groups[-1][1].append(word)
    return groups if groups[0][1] else groups[1:]


def spellings(kind: Any) -> Mapping[str, str]:
    """Names and aliases of all fields, as in `grouped` -> the field."""
    return dict(_spellings(kind))


def flags(kind: Any) -> Mapping[str, str]:
    """What may be written as a flag, as in `grouped` -> the field: `spellings`, no_ for switches, help and the like."""
    names = spellings(kind)
    own = {name: name for name in ("help", "tyro_print_completion", "tyro_write_completion")}
    return {**own, **names, **{f"no_{name}": field for name, field in names.items() if _type_of(kind)[field] is bool}}


def unknown(name: str, names: Mapping[str, str]) -> str:
    """One line for a name that is none of the `names`, with the one that is meant, most likely."""
    near = difflib.get_close_matches(name, names, n=1)
    meant = f": do you mean --{near[0]}?" if near else ": there is no such flag; --help lists them"
    return f"--{escaped(name)}{meant}"


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
        errors = error.errors()
        numbers = {_flag(one) for one in errors if one["type"] != "literal_error"}  # or a word, where there is a choice
        found = dict.fromkeys(
            _complaint(one) for one in errors if one["type"] != "literal_error" or _flag(one) not in numbers
        )
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
            inside = {key: values.pop(key) for key in _type_of(hints[one.name]) if key in values}
            if inside or _default(one) is MISSING:
                own[one.name] = build(hints[one.name], **inside)
    return _at_home(kind(**own, **values))


def _partly(kind: Any, values: dict[str, Any]) -> Any:
    """`build`, with tyro's mark where a field without a default has no value; takes what it uses out of `values`."""
    import tyro

    hints, own = get_type_hints(kind), {}
    for one in fields(kind):
        if is_dataclass(hints[one.name]):
            own[one.name] = _partly(hints[one.name], values)
        else:
            default = _default(one)
            own[one.name] = values.pop(one.name, tyro.MISSING if default is MISSING else default)
    return kind(**own)


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
    names = flags(kind)
    given: dict[str, dict[str, list[str]]] = {}  # flag -> spelling -> values
    for name, (flag, *following) in grouped(words):
        if name in names and name != f"no_{names[name]}":
            value = flag.partition("=")[2]
            given.setdefault(names[name], {})[name] = [value] if value else following
    for spelt in given.values():
        if any(values != next(iter(spelt.values())) for values in spelt.values()):
            shown = " and ".join(f"--{name}" for name in spelt)
            raise UserError(f"{shown} are one setting: give one value")


def _spellings(kind: Any) -> Iterator[tuple[str, str]]:
    """(as it may be written, the field) for every flag and its aliases."""
    hints, whole = get_type_hints(kind), get_type_hints(kind, include_extras=True)
    for one in fields(kind):
        if is_dataclass(hints[one.name]):
            yield from _spellings(hints[one.name])
            continue
        extras = [getattr(extra, "aliases", None) or () for extra in getattr(whole[one.name], "__metadata__", ())]
        for name in (one.name, *(alias[2:].replace("-", "_") for alias in itertools.chain(*extras))):
            yield name, one.name


def _choices(kind: Any) -> Iterator[tuple[str, list[str]]]:
    """(field, what it may be) for every field that has no other values than a few words, None among them or not."""
    for name, hint in _type_of(kind).items():
        kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
        if all(get_origin(one) is Literal or one is NoneType for one in kinds):
            yield name, [str(value) for one in kinds for value in get_args(one) or (None,)]


@cache
def _type_of(kind: Any) -> Mapping[str, Any]:
    """The types of all fields, without their ranges."""
    found: dict[str, Any] = {}
    hints: dict[str, Any] = get_type_hints(kind)
    for name, hint in hints.items():
        group: Any = hint if is_dataclass(hint) else None
        found.update(_type_of(group) if group else {name: hint})
    return found


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
    kind: Any = type(settings)
    words, positional = ["singlora", command], _positional(kind)
    for name, value in sorted(changed(settings).items(), key=lambda one: one[0] not in positional):
        if name not in positional:
            words.append(f"--no_{name}" if value is False else f"--{name}")
        if not isinstance(value, bool):
            words += [str(part) for part in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


@cache
def _positional(kind: Any) -> frozenset[str]:
    """The fields of a command that are written without their names."""
    from tyro.conf import Positional

    marks = Positional[int].__metadata__  # type: ignore[attr-defined]
    hints = get_type_hints(kind, include_extras=True)
    return frozenset(name for name, hint in hints.items() if set(marks) & set(getattr(hint, "__metadata__", ())))


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


def _flag(error: Mapping[str, Any]) -> str:
    return next(str(part) for part in reversed(error["loc"]) if isinstance(part, str) and part.isidentifier())


def _complaint(error: Mapping[str, Any]) -> str:
    words, key = _BOUNDS.get(error["type"], ("", ""))
    wanted = f"must be {words} {error['ctx'][key]:g}" if words else f"is not valid ({error['msg']})"
    return f"--{_flag(error)} {escaped(error['input'], 40)}: {wanted}"
