"""Kill a training at random moments, go on, and compare what comes of it with a training that nobody killed.

    python -m benchmarks.kill_training --kills 100

Each round kills with SIGKILL and resumes until the training is finished; then the adapter's file and the optimizer's
must be the unbroken run's, byte for byte, and the log must hold the same numbers, each step once. Processes are forked
from one that has imported everything, so that most moments hit the training and not its imports.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlora_diffusion import files, settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Seed

STEPS, EVERY = 24, 3
LAST = f"checkpoint-{STEPS}"
RESULTS = ("adapter.safetensors", f"{LAST}/adapter.safetensors", f"{LAST}/optimizer.safetensors")


@dataclass(frozen=True)
class Settings:
    """Kill trainings at random moments, and compare what comes of them with an unbroken one."""

    kills: Count = 100
    """SIGKILLs in all."""
    seed: Seed = 0
    """Of the moments."""
    pretrained_model_name_or_path: str = "toyworld"
    """The base model; a small one."""


def main(chosen: Settings) -> int:
    """Returns how many rounds ended like the unbroken run.

    Raises:
        UserError: one did not, and what differs.
    """
    import torch

    from singlora_diffusion import models
    from singlora_diffusion.training import loop, preparation

    assert loop and preparation  # imported once, here, for all children
    torch.set_num_threads(1)  # a process with threads cannot be forked
    models.load(chosen.pretrained_model_name_or_path)
    moments = random.Random(chosen.seed)
    with tempfile.TemporaryDirectory() as folder:
        here = Path(folder)
        write_images(here / "images")
        began = time.monotonic()
        if (code := in_child(here / "unbroken", lambda: train(chosen, here / "images"))) != 0:
            raise UserError(f"the unbroken training ended with exit code {code}")
        span = time.monotonic() - began
        kills = rounds = 0
        while kills < chosen.kills:
            rounds += 1
            place = here / f"round-{rounds}"
            while in_child(place, lambda: train(chosen, here / "images"), moments.uniform(0, span)) == -signal.SIGKILL:
                kills += 1
                print(f"\r{kills} kills, {rounds - 1} rounds like the unbroken run", end="", flush=True)
            if words := difference(here / "unbroken" / "run", place / "run"):
                raise UserError(f"round {rounds}, after {kills} kills in all: {words}")
    print(f"\r{kills} kills, {rounds} of {rounds} rounds ended with the unbroken run's adapter, optimizer and log")
    return rounds


def train(chosen: Settings, images: Path) -> None:
    """Begin, or go on with, the training in ./run."""
    import train_dreambooth
    from singlora_diffusion.training import run_folder
    from singlora_diffusion.training.recipe import Recipe

    out = Path("run")
    recipe = settings.build(
        Recipe,
        instance_data_dir=images,
        instance_prompt="a photo of sks dog",
        output_dir=out,
        pretrained_model_name_or_path=chosen.pretrained_model_name_or_path,
        max_train_steps=STEPS,
        train_batch_size=1,
        rank=2,
        ramp_steps=10,
        lr_scheduler="cosine",
        validation_steps=0,
        checkpointing_steps=EVERY,
        resume_from_checkpoint="latest" if run_folder.checkpoints(out) else None,
        report_to="none",
        device="cpu",
    )
    if not (out / run_folder.ADAPTER).exists():  # killed after its last write
        train_dreambooth.main(recipe)


def in_child(folder: Path, work: Callable[[], Any], kill_after: float | None = None) -> int:
    """Do work in a child, and kill it after so many seconds.

    Returns:
        The exit code; minus the signal's number where a signal ended it.
    """
    child = fork(folder, work)
    if kill_after is not None:
        time.sleep(kill_after)
        os.kill(child, signal.SIGKILL)  # one that has ended is not waited for yet, so its id is still its own
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def fork(folder: Path, work: Callable[[], Any]) -> int:
    """Do work in a fork of this process that begins in `folder`, its output in `output.txt` there; returns its id."""
    folder.mkdir(exist_ok=True)
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    code: Any = 1
    try:
        os.chdir(folder)
        said = os.open("output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(said, 1)
        os.dup2(said, 2)
        work()
        code = 0
    except SystemExit as error:
        code = error.code or 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}")
    finally:
        sys.stdout.flush()
        os._exit(int(code))


def difference(expected: Path, found: Path) -> str | None:
    """What a finished run has otherwise than the unbroken one, in words; None: nothing."""
    for name in RESULTS:
        if not (found / name).exists():
            said = (found.parent / "output.txt").read_text().splitlines()[-1:]
            return f"no {name}: {''.join(said)}"
        if files.sha256(expected / name) != files.sha256(found / name):
            return f"{name} differs"
    return None if log(expected) == log(found) else "the logs differ"


def log(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log, less how long things took."""
    import json

    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if key != "seconds"} for row in rows]


def write_images(folder: Path) -> None:
    """Three plain images to train on."""
    from PIL import Image

    folder.mkdir()
    for number in range(3):
        Image.new("RGB", (40 + number, 36), (90 * number, 40, 200 - 60 * number)).save(folder / f"{number}.png")


if __name__ == "__main__":
    from singlora_diffusion.cli import quiet_libraries

    quiet_libraries()
    try:
        main(settings.parse(Settings, sys.argv[1:], "kill_training", str(__doc__).partition("\n")[0]))
    except UserError as error:
        print(f"\nkill_training: {error}", file=sys.stderr)
        sys.exit(2)
