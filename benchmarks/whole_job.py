"""From a folder of images to a verified adapter, its images and their scores, as a user does it: three commands.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.whole_job

Every command is a process of its own, so its start-up counts. The yardstick is the optimizer steps alone: their number
times the median seconds of one, from the run's own log.jsonl. What else the log's clock saw, `between steps`, is the
first step's slowness and previews; what it did not see, `start and end`, is the rest of the training command: imports,
models, encoded images, the last preview, the adapter saved and verified.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, parse

from . import timing
from .startup import children


@dataclass(frozen=True)
class Settings:
    """Time train, generate and score on a subject of toyworld."""

    subject: str = "dog-1"
    """A held-out subject of toyworld; an unknown name lists them all."""
    steps: Count = 300
    """Optimizer steps of the training."""
    seeds: str = "0-1"
    """Images of each of toyworld's twelve prompts."""
    rounds: Count = 1
    """Whole jobs, one after the other."""
    output: Path | None = None
    """A JSON file for the figures."""


def commands(settings: Settings, folder: Path, class_noun: str) -> dict[str, list[str]]:
    """The three commands with the flags of the README, all else as it comes."""
    run = folder / "run"
    train = ["--instance_data_dir", f"{folder / 'images'}", "--instance_prompt", f"a photo of sks {class_noun}"]
    train += ["--output_dir", f"{run}", "--max_train_steps", f"{settings.steps}"]
    generate = ["--adapter", f"{run}", "--prompts", "toyworld", "--seeds", settings.seeds]
    generate += ["--output_dir", f"{run / 'samples'}"]
    score = ["--images", f"{run / 'samples'}", "--references", f"{folder / 'images'}"]
    return {"train": ["train", *train], "generate": ["generate", *generate], "score": ["score", *score]}


def spend(words: Sequence[str]) -> tuple[float, float]:
    """Wall and processor seconds of `singlora WORDS` in a process of its own.

    Raises:
        UserError: it failed; with the last line it said.
    """
    wall, cpu = timing.wall(), children()
    done = subprocess.run([sys.executable, "-m", "singlora_diffusion.cli", *words], capture_output=True, text=True)
    if done.returncode:
        raise UserError((done.stderr.strip() or f"singlora {words[0]} failed").splitlines()[-1])
    return timing.wall() - wall, children() - cpu


def steps_alone(log: Path) -> tuple[float, float]:
    """What a run's log says: the median seconds of a step, and the seconds until the last one was done.

    Raises:
        UserError: fewer than two steps.
    """
    done = [json.loads(line)["seconds"] for line in log.read_text().splitlines()]
    if len(done) < 2:
        raise UserError("--steps must be at least 2: a step is timed from the end of the one before")
    return statistics.median(after - before for before, after in pairwise(done)), done[-1]


def whole_job(settings: Settings) -> tuple[dict[str, float], dict[str, float]]:
    """Wall seconds of every row of the table, and the processor seconds of those that are commands."""
    from singlora_diffusion.toyworld.subjects import subject, write_subject

    chosen = subject(settings.subject)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_subject(chosen.name, folder / "images")
        spent = {name: spend(words) for name, words in commands(settings, folder, chosen.class_noun).items()}
        step, loop = steps_alone(folder / "run" / "log.jsonl")
    wall, cpu = ({name: both[clock] for name, both in spent.items()} for clock in (0, 1))
    alone = settings.steps * step
    parts = {"steps alone": alone, "between steps": loop - alone, "start and end": wall["train"] - loop}
    rows = {"train": wall["train"], **parts, **wall, "whole": sum(wall.values())}
    return rows, {**cpu, "whole": sum(cpu.values())}


def main() -> int:
    try:
        settings = parse(Settings, sys.argv[1:], "python -m benchmarks.whole_job", __doc__ or "")
        jobs = [whole_job(settings) for _ in range(settings.rounds)]
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wall, cpu = ({name: [job[clock][name] for job in jobs] for name in jobs[0][clock]} for clock in (0, 1))
    share = {name: timing.ratios(wall, name, "whole") for name in wall}
    to_steps = {name: timing.ratios(wall, name, "steps alone") for name in wall}
    where = f"{settings.subject}, {settings.steps} steps, seeds {settings.seeds}"
    timing.show(
        f"whole job: toyworld, {where}",
        ("part", "wall seconds", "cpu seconds", "of the whole", "/ steps alone"),
        [
            (
                name,
                str(timing.spread(wall[name])),
                str(timing.spread(cpu[name])) if name in cpu else "-",
                f"{share[name].median:.0%}",
                str(to_steps[name]),
            )
            for name in wall
        ],
    )
    if settings.output is not None:
        timing.write(
            settings.output,
            ["python", "-m", "benchmarks.whole_job", *sys.argv[1:]],
            setting=where,
            wall_seconds=wall,
            cpu_seconds=cpu,
            share_of_whole=share,
            ratio_to_steps_alone=to_steps,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
