"""Teach an image model one subject from a folder of images: DreamBooth with SingLoRA, or with a baseline.

    python train_dreambooth.py --instance_data_dir my_dog --instance_prompt "a photo of sks dog" --output_dir runs/dog

Flags make a recipe, singlora_diffusion/training/loop.py runs it, and listeners are told what happens. A run leaves in
OUTPUT_DIR: adapter.safetensors (read back and compared with the live model), pytorch_lora_weights.safetensors (the same
for other programs), README.md (a model card), recipe.json, log.jsonl, progress.png, logs/ for TensorBoard, previews/
and checkpoint-N/. Ctrl-C ends it after the step, with a checkpoint to go on from.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path

from singlora_diffusion import terminal
from singlora_diffusion.training.command_line import Training
from singlora_diffusion.training.events import Interrupted, Listener
from singlora_diffusion.training.recipe import Recipe

ECHO = 5.0
"""Seconds in which launchers of several processes pass on a signal that the terminal has sent to all of them."""


def train(asked: Training) -> None:
    """What `singlora train` does: the training, or with --plan only what it would come to."""
    if not asked.plan:
        main(asked.recipe)
        return
    from singlora_diffusion.training import plan

    planned = plan.make(asked.recipe)
    for remark in planned.remarks:
        terminal.note(remark)
    if terminal.speaks():
        print(planned)


def main(recipe: Recipe, *, hint: bool = True) -> Path:
    """Run the recipe; returns the adapter's path.

    Args:
        hint: end by printing the command to type next.

    Raises:
        UserError: something in the recipe or its files must be mended first. Nothing is left half-written.
        SystemExit: a signal stopped the run, with the exit code that belongs to it: 130, 143 or 129.
    """
    from eval.previews import PreviewScorer
    from singlora_diffusion.training import interrupts, loop, run_folder

    scoring = partial(PreviewScorer, sources={"clip": recipe.validation.clip, "dino": recipe.validation.dino})
    alone = os.environ.get("WORLD_SIZE", "1") == "1"
    signals = interrupts.Interrupts(echo=0.0 if alone else ECHO)
    told = [signals, *(listeners(recipe, hint) if terminal.speaks() else [])]
    try:
        for event in loop.run(recipe, stop=signals.asked, scoring=scoring):
            for listener in told:
                listener(event)
            if isinstance(event, Interrupted):
                sys.exit(128 + (signals.received or 0))
    finally:
        for listener in told:
            listener.close()
    return recipe.output.output_dir / run_folder.ADAPTER


def listeners(recipe: Recipe, hint: bool) -> list[Listener]:
    """The terminal, the log file and, unless it is not wanted, a tracker and a figure of the losses."""
    from rich.console import Console

    from singlora_diffusion.training import log_file, progress_figure, terminal, tracking

    out = recipe.output.output_dir
    console = Console(highlight=False, soft_wrap=True)
    told: list[Listener] = [log_file.LogFile(out / log_file.NAME), terminal.Terminal(recipe, console, hint=hint)]
    if recipe.output.report_to != "none":
        told += [tracking.Tracker(recipe), progress_figure.ProgressFigure(out)]
    return told


if __name__ == "__main__":
    from singlora_diffusion.cli import run

    sys.exit(run("train", sys.argv[1:]))
