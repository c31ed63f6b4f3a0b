"""The demo from top to bottom. Every part is what a command does, and what an earlier run has finished stays."""

from __future__ import annotations

import contextlib
import io
import shlex
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.markup import escape

from .. import files, settings
from ..errors import UserError
from ..terminal import escaped
from . import plan, words, world_images
from .settings import DemoSettings

if TYPE_CHECKING:
    from ..training.recipe import Recipe

ADAPTER = "adapter.safetensors"


def demo(chosen: DemoSettings) -> Path:
    """Train, generate, score, report; returns the report's path.

    Raises:
        UserError: settings that do not work, or a folder that holds another demo.
    """
    from eval import report
    from eval.results import load
    from eval.score import score

    from .. import device
    from ..adapters import budget
    from ..sampling.generate import generate
    from ..sampling.settings import check
    from ..toyworld.subjects import subject

    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    out, references, heldout = chosen.output_dir, plan.references(chosen), plan.heldout(chosen)

    # ---- all that can be wrong, before anything is written
    target = subject(chosen.subject)
    if not chosen.methods or len(set(chosen.methods)) < len(chosen.methods):
        raise UserError("--methods: name each adapter once, such as --methods singlora lora")
    generations = plan.generations(chosen, target)
    for generation in generations.values():
        check(generation)
    device.choose(chosen.device)
    shapes = budget.shapes(chosen.pretrained_model_name_or_path, budget.BudgetSettings().targets)
    goal = budget.target_count(chosen.match, shapes)
    sizes = {method: budget.match(goal, method, shapes) for method in chosen.methods}
    recipes = {method: plan.recipe(chosen, target, method, row.rank) for method, row in sizes.items()}

    # ---- the four parts
    heading(console, 1, f"five images of {target.name}, which the model has never seen")
    world_images.write_references(target, references)
    world_images.write_heldout(target, heldout, chosen.prompts)
    say(console, f"{references}: to train on. {heldout}: to score with, in all of toyworld's places")

    heading(console, 2, f"train {words.listed(sizes)} on them, {chosen.max_train_steps} steps each")
    for method, row in sizes.items():
        say(console, words.size(method, row))
    for method, recipe in recipes.items():
        if not train(recipe, out / method):
            say(console, f"{out / method / ADAPTER} is there already")

    heading(console, 3, "the same prompts and seeds with the base model and with each adapter")
    first_seed: dict[str, list[Path]] = {}
    for name, generation in generations.items():
        with contextlib.redirect_stdout(io.StringIO()):  # its progress is on stderr; what to type next is not due yet
            lines = generate(generation)
        folder = plan.samples(chosen, name)
        first_seed[words.label(name)] = [folder / one["file"] for one in lines if one["seed"] == lines[0]["seed"]]
        say(console, f"{words.label(name)}: {len(lines)} images in {folder}")

    heading(console, 4, "likeness to the subject, agreement with the prompts")
    scorings = plan.scorings(chosen, generations)
    for scoring in scorings:
        score(scoring)

    # ---- what came of it
    columns = words.columns(chosen, sizes)
    loaded = [load(column) for column in columns]
    caveat = words.caveat(loaded)
    commands = [
        shlex.join(["singlora", "toyworld", "subject", "--name", target.name, "--output_dir", str(references)]),
        *(settings.command_line("train", recipe) for recipe in recipes.values()),
        *(settings.command_line("generate", generation) for generation in generations.values()),
        *(settings.command_line("score", scoring) for scoring in scorings),
        f"{settings.command_line('demo', chosen)}  # all of the above",
    ]
    html = report.page(
        f"{words.listed(sizes)} on five images of {target.name}",
        columns,
        {"the five training images": references},
        lead=words.lead(chosen, target, sizes),
        notes=[caveat],
        commands=commands,
    )
    page = report.write(html, out / "report.html")
    words.sheet(references, first_seed, out / "sheet.png")
    console.print()
    console.print(words.table(loaded))
    console.print(escape(caveat), style="dim")
    say(console, f"\n{out / 'sheet.png'}: at a glance. {page}: all of it ({time.monotonic() - began:.0f} s in all)")
    say(
        console,
        'next: singlora train --instance_data_dir MY_DOG --instance_prompt "a photo of sks dog" --output_dir runs/dog',
    )
    return page


def train(recipe: Recipe, folder: Path) -> bool:
    """The trainer's `main`, from its last checkpoint on, unless its result is there already; whether it ran.

    Raises:
        UserError: there is an adapter of another recipe.
    """
    import train_dreambooth

    if not (folder / ADAPTER).exists():
        if any(folder.glob("checkpoint-*")):  # an interrupted training leaves one
            recipe = settings.replaced(recipe, resume_from_checkpoint="latest")
        train_dreambooth.main(recipe, hint=False)
        return True
    before, now = files.read_json(folder / "recipe.json"), settings.as_json(recipe)
    for key, value in now.items():
        if before.get(key) != value and key != "resume_from_checkpoint":
            raise UserError(
                f"{folder}: holds an adapter of another demo ({key} {before.get(key)}, now {value}); "
                f"name another --output_dir"
            )
    return False


def heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/4[/bold] {escape(escaped(text))}")


def say(console: Console, text: str) -> None:
    """A line as it stands: paths may hold what rich takes for markup."""
    console.print(text, markup=False)
