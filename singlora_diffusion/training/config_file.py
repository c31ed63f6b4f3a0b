"""`--config`: a file of settings by their flags' names. A run's recipe.json is one."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from .. import files, settings
from ..errors import UserError
from ..terminal import escaped
from .other_flags import answer, in_our_words
from .recipe import Recipe


def read(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Values by the recipe's fields, and notes on words of other programs.

    Keys may stand in groups of any name, as in TOML's tables; they may be other programs' words.

    Raises:
        UserError: one line for each key that cannot be understood, and for each value of another type.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--config {escaped(path, 1000)}: must end in {', '.join(READERS)}")
    names, found = settings.spellings(Recipe), dict[str, Any]()
    lines, notes, items = list[str](), list[str](), list(_flat(reader(path)))
    for key, value in items:
        name = key.replace("-", "_").removeprefix("__")
        said = None if name in names else answer(name, [str(value)], {other for other, _ in items})
        if said is not None:
            if value is not False and value is not None:  # a switch that is off asks for nothing
                (lines if said.refused else notes).append(said.line)
            continue
        field, value = _in_our_words(name, value)
        field = names.get(field, field)
        if field not in names:
            lines.append(settings.unknown(name, names))
        elif field in found and found[field] != value:
            lines.append(f"--{field} has two values: give it one")
        else:
            found[field] = value
    found, wrong = settings.typed(Recipe, found)
    if lines := [*lines, *wrong]:
        raise UserError(*(f"{escaped(path, 1000)}: {line}" for line in lines))
    return found, notes


def _in_our_words(name: str, value: Any) -> tuple[str, Any]:
    """As the command line has it; only text can be written in other words."""
    if not isinstance(value, str):
        return in_our_words(name, [])[0], value
    field, words = in_our_words(name, [value])
    return field, words if words != [value] and len(words) > 1 else words[0]


def _flat(content: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in content.items():
        if isinstance(value, Mapping):
            yield from ((str(inner), one) for inner, one in value.items())
        else:
            yield str(key), value


def _toml(path: Path) -> dict[str, Any]:
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return _parsed(path, tomllib.loads, tomllib.TOMLDecodeError, "TOML")


def _yaml(path: Path) -> dict[str, Any]:
    import yaml

    content = _parsed(path, yaml.safe_load, yaml.YAMLError, "YAML")
    if not isinstance(content, dict):
        raise UserError(f"{escaped(path, 1000)}: has no keys and values")
    return content


def _parsed(path: Path, parse: Callable[[str], Any], error: type[Exception], kind: str) -> Any:
    try:
        return parse(path.read_text(encoding="utf-8"))
    except OSError as problem:
        raise UserError(f"{escaped(path, 1000)}: cannot be read: {files.reason(problem)}") from problem
    except (error, ValueError, RecursionError) as problem:
        why = " ".join(str(problem).split())
        raise UserError(f"{escaped(path, 1000)}: is not valid {kind} ({escaped(why, 300)})") from problem


READERS: dict[str, Callable[[Path], dict[str, Any]]] = {
    ".toml": _toml,
    ".yaml": _yaml,
    ".yml": _yaml,
    ".json": files.read_json,
}
