"""The methods of a comparison: rows of `singlora budget`, as they are or with settings of the adapter in brackets."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cache
from typing import Any

from singlora_diffusion import settings
from singlora_diffusion.adapters import budget
from singlora_diffusion.adapters.config import AdapterConfig, check_options
from singlora_diffusion.adapters.methods import METHODS
from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped

ELSEWHERE = {"method", "text_rank", "text_alpha", "text_targets"}
"""Settings of an adapter that a comparison gives no choice of: text encoders are not adapted."""
FORM = re.compile(r"([\w+]+)(?:\[([\w.,;=+-]+)\])?")


@dataclass(frozen=True)
class Method:
    """A row of `singlora budget`, and what of the adapter's settings is otherwise."""

    row: str
    otherwise: Mapping[str, Any]

    @property
    def config(self) -> AdapterConfig:
        """The adapter, at the rank that is given or else any."""
        return replace(budget.rows()[self.row], **self.otherwise)

    @property
    def rank(self) -> int | None:
        """The one that is given; None: the budget's."""
        return self.otherwise.get("rank")


@cache
def parsed(text: str) -> Method:
    """What `--methods` means by a word such as `singlora[targets=to_q,to_k;ramp_steps=0]`.

    Raises:
        UserError: no such method or setting, or a value that cannot be.
    """
    said = FORM.fullmatch(text)
    if said is None or said[1] not in budget.rows():
        raise UserError(f"--methods {escaped(text, 200)}: there are {', '.join(budget.rows())}, and {EXAMPLE}")
    given = dict(_settings(text, said[2] or ""))
    found, lines = settings.typed(AdapterConfig, given)
    if lines:
        raise UserError(f"--methods {text}: {lines[0].removeprefix('--')}")
    made = Method(said[1], found)
    try:
        settings.check(made.config)
        check_options(made.config)
    except UserError as error:
        raise UserError(f"--methods {text}: {str(error).removeprefix('--')}") from None
    return made


EXAMPLE = "settings of the adapter in brackets, as in singlora[targets=to_q,to_k;ramp_steps=0]"


def _settings(text: str, inside: str) -> Iterator[tuple[str, Any]]:
    known = {one.name for one in fields(AdapterConfig)} - ELSEWHERE
    for part in filter(None, inside.split(";")):
        name, equals, value = part.partition("=")
        if name not in known:
            raise UserError(f"--methods {text}: {name} is no setting of an adapter here; there are {_list(known)}")
        if not equals:
            yield name, True
        else:
            yield name, value.split(",") if name == "targets" else value


def _list(names: set[str]) -> str:
    return ", ".join(sorted(names))


def label(text: str) -> str:
    """As in "SingLoRA offset (to_q, to_k)"."""
    found = parsed(text)
    name = budget.rows()[found.row].method
    shown = METHODS[name].label
    if found.row != name:
        shown += f" {found.row.removeprefix(f'{name}+')}"
    return f"{shown} ({'; '.join(_words(found.otherwise))})" if found.otherwise else shown


def _words(otherwise: Mapping[str, Any]) -> Iterator[str]:
    for name, value in otherwise.items():
        if name == "targets":
            yield ", ".join(value)
        else:
            yield name if value is True else f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"


def folder_name(text: str) -> str:
    """The name of its folders: a plain method's is its own."""
    return re.sub(r"[\[;]", "-", text).removesuffix("]")
