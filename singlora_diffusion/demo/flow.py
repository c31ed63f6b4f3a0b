"""The demo from top to bottom. Every part is what a command does, and what an earlier run has finished stays."""

from __future__ import annotations

import contextlib
import io
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from .. import files, settings
from ..errors import UserError
from ..terminal import escaped
from ..training import run_folder
from ..training.recipe import to_be_shared
from . import plan, words, world_images
from .plan import Plan
from .settings import DemoSettings

if TYPE_CHECKING:
    from eval.score import ScoreSettings

    from ..training.recipe import Recipe


def demo(chosen: DemoSettings) -> Path:
    """Train, generate, score, report; returns the report's path.

    Raises:
        UserError: settings that do not work, or a folder that holds another demo.
    """
    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    planned = plan.checked(chosen)
    write_images(console, chosen, planned)
    train_all(console, chosen, planned)
    made = generate_all(console, chosen, planned)
    scorings = score_all(console, chosen, planned)
    page, sheet = chosen.output_dir / "report.html", chosen.output_dir / "sheet.png"
    words.sheet(plan.references(chosen), made, sheet)
    report_all(console, chosen, planned, scorings, page)
    say(console, f"\n{sheet}: at a glance. {page}: all of it ({time.monotonic() - began:.0f} s in all)")
    say(
        console,
        'next: singlora train --instance_data_dir MY_DOG --instance_prompt "a photo of sks dog" --output_dir runs/dog',
    )
    return page


def write_images(console: Console, chosen: DemoSettings, planned: Plan) -> None:
    """The images of the subject, to train on and to score with."""
    references, heldout = plan.references(chosen), plan.heldout(chosen)
    heading(console, 1, f"five images of {planned.subject.name}, which the model has never seen")
    world_images.write_references(planned.subject, references)
    world_images.write_heldout(planned.subject, heldout, chosen.prompts)
    say(console, f"{references}: to train on. {heldout}: to score with, in all of toyworld's places")


def train_all(console: Console, chosen: DemoSettings, planned: Plan) -> None:
    """An adapter of each method."""
    heading(console, 2, f"train {words.listed(planned.sizes)} on them, {chosen.max_train_steps} steps each")
    for method, row in planned.sizes.items():
        say(console, words.size(method, row))
    for method, recipe in planned.recipes.items():
        folder = chosen.output_dir / method
        if not train(recipe, folder):
            say(console, f"{folder / run_folder.ADAPTER} is there already")


def generate_all(console: Console, chosen: DemoSettings, planned: Plan) -> dict[str, list[Path]]:
    """Images by the base model and by each adapter; returns those of the first seed, by label."""
    from ..sampling.generate import generate

    heading(console, 3, "the same prompts and seeds with the base model and with each adapter")
    first_seed: dict[str, list[Path]] = {}
    for name, generation in planned.generations.items():
        with contextlib.redirect_stdout(io.StringIO()):  # its progress is on stderr; what to type next is not due yet
            lines = generate(generation)
        folder = plan.samples(chosen, name)
        first_seed[words.label(name)] = [folder / one["file"] for one in lines if one["seed"] == lines[0]["seed"]]
        say(console, f"{words.label(name)}: {len(lines)} images in {folder}")
    return first_seed


def score_all(console: Console, chosen: DemoSettings, planned: Plan) -> list[ScoreSettings]:
    """Scores of all images; returns what was asked of the scorer."""
    from eval.score import score

    heading(console, 4, "likeness to the subject, agreement with the prompts")
    scorings = plan.scorings(chosen, planned.generations)
    for scoring in scorings:
        score(scoring)
    return scorings


def report_all(
    console: Console, chosen: DemoSettings, planned: Plan, scorings: Sequence[ScoreSettings], page: Path
) -> None:
    """The page, and its table on the terminal."""
    from eval import report
    from eval.results import load

    references = plan.references(chosen)
    columns = words.columns(chosen, planned.sizes)
    loaded = [load(column) for column in columns]
    caveat = words.caveat(loaded)
    subject = ["singlora", "toyworld", "subject", "--name", planned.subject.name, "--output_dir", str(references)]
    commands = [
        shlex.join(subject),
        *(settings.command_line("train", recipe) for recipe in planned.recipes.values()),
        *(settings.command_line("generate", generation) for generation in planned.generations.values()),
        *(settings.command_line("score", scoring) for scoring in scorings),
        f"{settings.command_line('demo', chosen)}  # all of the above",
    ]
    html = report.page(
        f"{words.listed(planned.sizes)} on five images of {planned.subject.name}",
        columns,
        {"the five training images": references},
        lead=words.lead(chosen, planned.subject, planned.sizes),
        notes=[caveat],
        commands=commands,
    )
    report.write(html, page)
    console.print()
    console.print(words.table(loaded))
    console.print(escape(caveat), style="dim")


def train(recipe: Recipe, folder: Path) -> bool:
    """The trainer's `main`, from its last checkpoint on, unless its result is there already; whether it ran.

    Raises:
        UserError: there is an adapter of another recipe.
    """
    import train_dreambooth

    if not (folder / run_folder.ADAPTER).exists():
        if run_folder.checkpoints(folder):  # an interrupted training leaves one
            recipe = settings.replaced(recipe, resume_from_checkpoint="latest")
        train_dreambooth.main(recipe, hint=False)
        return True
    before = files.read_json(folder / run_folder.RECIPE)
    for key, value in _result_of(recipe).items():
        if before.get(key) != value:
            raise UserError(
                f"{escaped(folder, 1000)}: holds an adapter of another demo ({key} {escaped(before.get(key))}, now "
                f"{escaped(value)}); name another --output_dir"
            )
    return False


def _result_of(recipe: Recipe) -> dict[str, object]:
    """The settings that the adapter follows from; what is left to the machine, and where it is computed, is not."""
    steps = recipe.optimization.max_train_steps
    named = {**to_be_shared(recipe), **settings.as_json(recipe.adapter), "max_train_steps": steps}
    return {key: value for key, value in named.items() if key != "mixed_precision" or value is not None}


def heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/4[/bold] {escape(escaped(text))}")


def say(console: Console, text: str) -> None:
    """A line as it stands: paths may hold what rich takes for markup."""
    console.print(text, markup=False)
