"""What an open page costs a training, and how fast the page answers meanwhile.

    python -m benchmarks.app --rounds 3

The same training runs in turn by itself and in the page's queue, watched by a browser. Both are taken in one run, so
that the ratio says something on a machine with other work, too. Needs what `make app-tests` needs.
"""

from __future__ import annotations

import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from singlora_diffusion import settings
from singlora_diffusion.app import jobs, progress
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count
from singlora_diffusion.toyworld import subjects
from singlora_diffusion.training.recipe import Recipe

WARM = 5
"""First steps that do not count."""


@dataclass(frozen=True)
class Settings:
    """Measure what an open page costs a training on toyworld, and how fast the page answers meanwhile."""

    rounds: Count = 3
    """Trainings of each kind, in turn."""
    steps: Count = 200
    """Of each training."""
    chromium: Path = Path("/usr/bin/chromium")
    """The browser."""


def main(chosen: Settings) -> None:
    """Print the seconds of a step with and without the page, their ratio, and how long the page's requests took."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        here = Path(folder)
        subjects.write_subject("dog-1", here / "runs" / "subjects" / "dog", 5, False)
        alone, watched, answers = list[float](), list[float](), list[float]()
        for number in range(chosen.rounds):
            alone.append(_step(here, chosen, f"alone-{number}"))
            with _server(here / "runs") as url:
                browser = playwright.chromium.launch(executable_path=chosen.chromium, args=["--no-sandbox"])
                page = browser.new_page()
                page.on("requestfinished", lambda one: answers.append(one.timing["responseStart"] / 1000))
                page.goto(url)
                page.get_by_role("tab", name="Train", exact=True).click()
                page.wait_for_timeout(5000)
                answers.clear()  # those of loading the page
                watched.append(_step(here, chosen, f"watched-{number}", page))
                browser.close()
    ratios = [with_page / without for with_page, without in zip(watched, alone, strict=True)]
    print(f"a step: {statistics.median(alone):.3f} s by itself, {statistics.median(watched):.3f} s beside a page")
    print(f"ratio of each round: {', '.join(f'{ratio:.3f}' for ratio in ratios)}")
    answers.sort()
    nearly_all = answers[int(0.95 * (len(answers) - 1))]
    print(f"{len(answers)} answers: median {statistics.median(answers):.3f} s, 95 % within {nearly_all:.3f} s")


def _step(here: Path, chosen: Settings, name: str, page: Any = None) -> float:
    """Seconds of a step of a training in the queue, the first few aside."""
    out = here / "runs" / name
    recipe = settings.build(
        Recipe,
        instance_data_dir=here / "runs" / "subjects" / "dog",
        instance_prompt="a photo of sks dog",
        output_dir=out,
        max_train_steps=chosen.steps,
        validation_steps=0,
        checkpointing_steps=0,
        report_to="none",
    )
    words = shlex.split(settings.command_line("train", recipe))[1:]
    job = jobs.add(here / "runs" / ".queue", words, out)
    while jobs.job(job.folder).open:
        page.wait_for_timeout(500) if page is not None else time.sleep(0.5)
    ended = jobs.job(job.folder)
    if ended.state != "done":
        raise UserError(f"the training ended as {ended.state}: {ended.output[-300:]}")
    rows = progress.read(out).rows
    return float(rows[-1]["seconds"] - rows[WARM]["seconds"]) / (len(rows) - 1 - WARM)


@contextmanager
def _server(runs: Path) -> Iterator[str]:
    words = ["app", "--output_dir", str(runs), "--no_browser", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "singlora_diffusion.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    try:
        yield next(found[1] for line in process.stdout if (found := re.match(r"(http://\S+): open it", line)))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(settings.parse(Settings, sys.argv[1:], "python -m benchmarks.app", (__doc__ or "").partition("\n")[0]))
