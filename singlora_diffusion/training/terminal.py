"""The terminal: a listener that says in plain lines what happens, with a bar for what takes long."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import settings
from ..data import prompts
from ..progress import bar
from ..terminal import escaped
from .events import (
    VALIDATED,
    Best,
    Event,
    Exported,
    Images,
    Interrupted,
    Loaded,
    Progress,
    PutAway,
    Remark,
    Resumed,
    Saved,
    Started,
    Step,
    Uploaded,
    in_words,
)
from .recipe import Recipe

if TYPE_CHECKING:
    from rich.console import Console


class Terminal:
    """Announcements, bars and the command to type next.

    Args:
        hint: end with the command to type next.
    """

    def __init__(self, recipe: Recipe, console: Console, *, hint: bool = True) -> None:
        self.recipe, self.console, self.hint = recipe, console, hint
        self.prompts = ""
        self.bars: Any = None
        self.task: Any = None
        self.what = self.best = ""

    def __call__(self, event: Event) -> None:
        match event:
            case Remark(text):
                self.say(f"note: {text}")
            case Images(report):
                self.say(str(report))
            case Loaded():
                self.prompts = prompts.suggested(event.prompts, event.class_noun)
                self.say(self.announcement(event))
            case PutAway(folder):
                self.say(f"what an earlier run left there was put away into {shown(folder)}")
            case Resumed(path, step):
                self.say(f"resumed from {shown(path)} at step {step}")
            case Progress(what, done, total):
                self.advance(what, done, total)
            case Started(step, total):
                self.advance("training", step, total)
            case Best(path, step, figures, rule):
                self.best = f"best: step {step}, {in_words(figures)} ({rule}), {shown(path)}"
            case Step(step):
                if figures := {name: value for name in VALIDATED if (value := getattr(event, name)) is not None}:
                    self.say(f"step {step}: {in_words(figures)}")
                self.advance("training", step)
            case Interrupted(step, path):
                self.close()
                self.say(f"stopped after step {step}" + (f", saved in {shown(path)}" if path else ""))
                self.say(f"to go on: {self.command_to_go_on()}")
            case Exported(path, readers):
                self.close()
                self.say(f"{shown(path)}: the same as an ordinary LoRA, for {readers}")
            case Uploaded(url):
                self.say(f"uploaded to {escaped(url, 1000)}")
            case Saved(path, size):
                self.close()
                self.say(f"{shown(path)}, {size / 1e6:.2f} MB, read back and verified")
                if self.best:
                    self.say(self.best)
                if self.hint:
                    self.say(f"next: {self.command_to_generate()}")
            case _:
                pass

    def say(self, text: str) -> None:
        """Lines as they stand: paths may hold what rich takes for markup."""
        self.console.print(text, markup=False)

    def announcement(self, loaded: Loaded) -> str:
        """What is about to happen, with the exact number of trained parameters."""
        optimization = self.recipe.optimization
        return (
            f"{loaded.method} rank {loaded.rank} on {loaded.layers} layers of {escaped(loaded.base_model, 1000)}: "
            f"{loaded.parameters:,} trained parameters\n"
            f"{optimization.max_train_steps} steps of {optimization.train_batch_size} images at {loaded.resolution} px"
            f", the base in {loaded.dtype}"
        )

    def command_to_go_on(self) -> str:
        """The same command line, resuming."""
        again = settings.replaced(self.recipe, resume_from_checkpoint="latest", overwrite=False)
        return settings.command_line("train", again)

    def command_to_generate(self) -> str:
        """A first look at the adapter."""
        out = self.recipe.output.output_dir
        words = ["--adapter", str(out), "--prompts", self.prompts]
        return escaped(shlex.join(["singlora", "generate", *words, "--output_dir", str(out / "samples")]), 4000)

    def advance(self, what: str, done: int, total: int | None = None) -> None:
        """Show how far a part of the work is; a bar for each part."""
        if what != self.what:
            self.close()
            self.bars, self.what = bar(self.console), what
            self.bars.start()
            self.task = self.bars.add_task(what, total=total, completed=done)
        else:
            self.bars.update(self.task, completed=done)
        if done == total:
            self.close()

    def close(self) -> None:
        """Leave the bar as it is."""
        if self.bars is not None:
            self.bars.stop()
        self.bars, self.what = None, ""


def shown(path: Path) -> str:
    return escaped(path, 1000)
