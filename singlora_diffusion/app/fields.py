"""Settings as fields of a form: names, groups, help, choices and defaults are those of the flags."""

from __future__ import annotations

import ast
import inspect
import shlex
import textwrap
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from .. import settings
from ..errors import UserError

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Field:
    """A setting.

    Attributes:
        group: what its group of flags says of itself.
        choices: the words that it may be, for one that is no free text.
        default: a switch's, else the text that stands for it; empty for None.
    """

    name: str
    group: str
    help: str
    default: bool | str
    choices: tuple[str, ...] = ()
    several: bool = False
    """Words separated by spaces."""


@cache
def of(kind: Any) -> tuple[Field, ...]:
    """All settings of a dataclass that have defaults, in the order of the flags."""
    return tuple(_fields(kind, ""))


def read(kind: type[Settings], given: Mapping[str, Any], fixed: Mapping[str, Any]) -> Settings:
    """Settings from what stands in a form.

    Args:
        given: what the fields hold, by name. One that holds its default is left out.
        fixed: values of further settings.

    Raises:
        UserError: one line for each field whose text is not of its type.
    """
    table: Any = kind
    named = {one.name: one for one in of(table)}
    values: dict[str, Any] = {}
    for name, value in given.items():
        one = named[name]
        held = value if isinstance(value, bool) else str("" if value is None else value).strip()
        if held != one.default:
            values[name] = None if held == "" else _words(name, str(held)) if one.several else held
    found, lines = settings.typed(kind, values)
    if lines:
        raise UserError(*lines)
    return settings.build(kind, **found, **fixed)


def held(kind: Any, values: Mapping[str, Any]) -> dict[str, bool | str]:
    """What the fields of a form hold for these values, such as those of a recipe.json; the rest by default."""
    return {one.name: _text(values[one.name]) if one.name in values else one.default for one in of(kind)}


def _fields(kind: Any, group: str) -> list[Field]:
    hints, said = get_type_hints(kind), _docstrings(kind)
    found = []
    for one in fields(kind):
        hint = hints[one.name]
        if is_dataclass(hint):
            found += _fields(hint, " ".join((hint.__doc__ or "").split()))
            continue
        default = one.default_factory() if one.default_factory is not MISSING else one.default
        if default is not MISSING:
            empty = said.get(one.name, "").replace("None:", "Left empty:")
            several = tuple in (get_origin(one) for one in (hint, *get_args(hint)))
            found.append(Field(one.name, group, empty, _text(default), _choices(hint), several))
    return found


def _choices(hint: Any) -> tuple[str, ...]:
    kinds = get_args(hint) if isinstance(hint, UnionType) or get_origin(hint) is Union else (hint,)
    if not all(get_origin(one) is Literal or one is NoneType for one in kinds):
        return ()
    return tuple("" if one is NoneType else str(word) for one in kinds for word in get_args(one) or ("",))


def _text(value: Any) -> bool | str:
    if isinstance(value, bool):
        return value
    if isinstance(value, list | tuple):
        return shlex.join(map(str, value))
    return "" if value is None else str(value)


def _words(name: str, text: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"--{name}: a quotation mark has no partner") from error


@cache
def _docstrings(kind: Any) -> dict[str, str]:
    """What is written below each field of a class."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(kind))).body[0]
    assert isinstance(tree, ast.ClassDef)
    found = {}
    for field, following in zip(tree.body, tree.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(following, ast.Expr) and isinstance(field.target, ast.Name):
            text = ast.literal_eval(following.value) if isinstance(following.value, ast.Constant) else ""
            found[field.target.id] = " ".join(str(text).split())
    return found
