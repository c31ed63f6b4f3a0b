"""Pieces that every page is made of."""

from __future__ import annotations

import functools
import html
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from . import saying
from .fields import Field
from .places import Places


def told(work: Callable[..., Any]) -> Callable[..., Any]:
    """A handler whose user errors are shown as the line that the command would print, until they are closed."""

    @functools.wraps(work)
    def handler(*values: Any) -> Any:
        try:
            return work(*values)
        except Exception as error:
            said = saying.line(error)
            if said is None:
                raise
            raise gr.Error(html.escape(said), duration=None, title="Did not work", print_exception=False) from error

    return handler


def dropped(drop: gr.File, work: Callable[..., Any], inputs: Any, outputs: Any) -> None:
    """Do this with what is dropped. The field is empty again then, also after an error, for the next file."""
    drop.upload(work, inputs, outputs)
    drop.upload(lambda: None, None, drop, show_progress="hidden")


def command_line() -> gr.Textbox:
    """Where the command stands that does the same."""
    return gr.Textbox(
        label="The same on the command line",
        interactive=False,
        lines=1,
        max_lines=6,
        buttons=["copy"],
        visible=False,
        elem_classes="command",
    )


def command(text: str) -> Any:
    return gr.update(value=text, visible=True)


def listed(places: Places, paths: Sequence[Path]) -> list[tuple[str, str]]:
    """Paths as choices of a list."""
    return [(saying.escaped(places.shown(path)), str(path)) for path in paths]


def chosen(choices: Sequence[tuple[str, str]], value: str | None = None) -> Any:
    """A list with these choices, of which one stays chosen; else the first is."""
    values = [one for _, one in choices]
    return gr.update(choices=list(choices), value=value if value in values else values[0] if values else None)


def field(one: Field) -> gr.components.Component:
    """A setting as a field, with the flag's own name and help."""
    if isinstance(one.default, bool):
        return gr.Checkbox(one.default, label=one.name, info=one.help)
    if one.choices:
        choices = [("(empty)" if word == "" else word, word) for word in one.choices]
        return gr.Dropdown(choices, value=one.default, label=one.name, info=one.help)
    return gr.Textbox(one.default, label=one.name, info=one.help)


def grouped(settings: Sequence[Field]) -> dict[str, gr.components.Component]:
    """Fields in folded groups, those of the flags; by name."""
    groups: dict[str, list[Field]] = {}
    for one in settings:
        groups.setdefault(one.group, []).append(one)
    made: dict[str, gr.components.Component] = {}
    for title, members in groups.items():
        with gr.Accordion(title, open=False):
            for one in members:
                made[one.name] = field(one)
    return made
