"""What a person at the terminal reads of a training."""

from __future__ import annotations

import io
import shlex
from pathlib import Path

import pytest
from rich.console import Console

from singlora_diffusion.settings import build, parse, replaced
from singlora_diffusion.training.events import (
    Checkpoint,
    Event,
    Interrupted,
    Loaded,
    Progress,
    Remark,
    Resumed,
    Saved,
    Started,
    Step,
)
from singlora_diffusion.training.recipe import Recipe
from singlora_diffusion.training.terminal import Terminal

HOSTILE = Path("run[/b]x \x1b[31m")


def said(*events: Event, out: Path = HOSTILE) -> tuple[str, Recipe]:
    recipe = build(
        Recipe,
        instance_data_dir=Path("my [v] dog"),
        instance_prompt="a photo of [v] dog",
        output_dir=out,
        overwrite=True,
    )
    screen = io.StringIO()
    terminal = Terminal(recipe, Console(file=screen, highlight=False, soft_wrap=True, width=100))
    for event in events:
        terminal(event)
    terminal.close()
    return screen.getvalue(), recipe


def test_markup_and_escapes_in_names_are_only_text() -> None:
    text, _ = said(
        Remark("'[v]' is bold"), Resumed(HOSTILE, 3), Saved(HOSTILE / "adapter.safetensors", 2_000_000), out=HOSTILE
    )
    assert "'[v]' is bold" in text and "run[/b]x" in text and "\x1b" not in text
    assert "2.00 MB, read back and verified" in text


def test_markup_in_what_a_bar_shows_is_only_text() -> None:
    text, _ = said(
        Progress("generating images of 'a [/b] dog'", 0, 1), Progress("generating images of 'a [/b] dog'", 1, 1)
    )
    assert "'a [/b] dog'" in text


@pytest.mark.parametrize("out", ["run", "run[/b]x", "my run's"])
def test_the_command_to_go_on_is_the_recipe_resumed(out: str) -> None:
    text, recipe = said(Interrupted(7, Path(out) / "checkpoint-7"), out=Path(out))
    line = next(line for line in text.splitlines() if line.startswith("to go on: "))
    words = shlex.split(line.removeprefix("to go on: "))
    assert words[:2] == ["singlora", "train"]
    assert parse(Recipe, words[2:], "", "") == replaced(recipe, overwrite=False, resume_from_checkpoint="latest")


def test_a_training_from_its_beginning_to_its_end() -> None:
    steps = [Step(number, 0.5, 1e-3, 1.0, 0.1, 1.0) for number in (3, 4)]
    text, _ = said(
        Progress("encoding instance images", 0, 3),
        Progress("encoding instance images", 3, 3),
        Loaded("toyworld", None, "dog", "singlora", 4, 56, 11_648, 64, "float32"),
        Started(2, 4),
        *steps,
        Checkpoint(Path("checkpoint-4"), 4),
        Saved(Path("run/adapter.safetensors"), 1000),
        out=Path("run"),
    )
    assert "singlora rank 4 on 56 layers of toyworld: 11,648 trained parameters" in text
    assert "400 steps of 4 images at 64 px, the base in float32" in text
    assert "3/3" in text and "4/4" in text
    assert text.splitlines()[-1].startswith("next: singlora generate --adapter run --prompts ")
