"""What an open page costs a training, and how fast the page answers meanwhile.

    python -m benchmarks.app --pairs 12

One training runs in the page's queue. In turn, for some seconds each, the server and a browser that watches it are
suspended and go on, so that what else happens on the machine meets both. Needs what `make app-tests` needs.
"""

from __future__ import annotations

import math
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from eval.statistics import t_interval
from singlora_diffusion import settings
from singlora_diffusion.app import jobs, progress
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Positive
from singlora_diffusion.toyworld import subjects
from singlora_diffusion.training.recipe import Recipe

WARM = 20
"""First steps that do not count."""
SETTLED = 2.0
"""Seconds after each turn that do not count."""


@dataclass(frozen=True)
class Settings:
    """Measure what an open page costs a training on toyworld, and how fast the page answers meanwhile."""

    pairs: Count = 12
    """Turns without and with the page."""
    seconds: Positive = 8.0
    """Of each turn."""
    chromium: Path = Path("/usr/bin/chromium")
    """The browser."""


def main(chosen: Settings) -> None:
    """Print the seconds of a step with and without the page, their ratio, and how long the page's requests took."""
    from playwright.sync_api import sync_playwright

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, _training(Path(folder) / "runs") as run:
        alone, watched, answers = list[float](), list[float](), list[float]()
        with _server(run.parent) as (server, url), sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=chosen.chromium, args=["--no-sandbox"])
            page = browser.new_page()
            page.on("requestfinished", lambda one: answers.append(one.timing["responseStart"] / 1000))
            page.goto(url)
            page.get_by_role("tab", name="Train", exact=True).click()
            page.wait_for_timeout(5000)
            answers.clear()  # those of loading the page
            costs = [one for process in _costs(server) for one in (process, *process.children(recursive=True))]
            for _ in range(chosen.pairs):
                for process in costs:
                    process.suspend()
                try:
                    alone.append(_pace(run, chosen.seconds, time.sleep))
                finally:  # suspended, they could not be ended
                    for process in costs:
                        process.resume()
                watched.append(_pace(run, chosen.seconds, lambda seconds: page.wait_for_timeout(1000 * seconds)))
            browser.close()
    ratios = [math.log(beside / by_itself) for beside, by_itself in zip(watched, alone, strict=True)]
    print(f"a step: {statistics.median(alone):.3f} s by itself, {statistics.median(watched):.3f} s beside a page")
    low, high = map(math.exp, t_interval(ratios) or (math.nan, math.nan))
    print(f"ratio: {math.exp(statistics.mean(ratios)):.3f} ({low:.3f} to {high:.3f}), {len(ratios)} pairs")
    answers.sort()
    nearly_all = answers[int(0.95 * (len(answers) - 1))]
    print(f"{len(answers)} answers: median {statistics.median(answers):.3f} s, 95 % within {nearly_all:.3f} s")


def _pace(run: Path, seconds: float, wait: Callable[[float], object]) -> float:
    """Seconds of a step, over so many seconds."""
    wait(SETTLED)
    first = progress.read(run).rows[-1]
    wait(seconds)
    last = progress.read(run).rows[-1]
    return float(last["seconds"] - first["seconds"]) / (last["step"] - first["step"])


def _costs(server: subprocess.Popen[str]) -> list[psutil.Process]:
    """The server, and the browser, which Playwright's driver has started."""
    browsers = [one for one in psutil.Process().children(recursive=True) if "chrom" in one.name()]
    return [psutil.Process(server.pid), *browsers]


@contextmanager
def _training(runs: Path) -> Iterator[Path]:
    """The run folder of a training that goes on until the end, past its first steps."""
    subjects.write_subject("dog-1", runs / "subjects" / "dog", 5, False)
    recipe = settings.build(
        Recipe,
        instance_data_dir=runs / "subjects" / "dog",
        instance_prompt="a photo of sks dog",
        output_dir=runs / "dog",
        max_train_steps=1_000_000,
        validation_steps=0,
        checkpointing_steps=0,
        report_to="none",
    )
    job = jobs.add(runs / ".queue", shlex.split(settings.command_line("train", recipe))[1:], runs / "dog")
    try:
        while progress.read(runs / "dog").step < WARM:
            if not jobs.job(job.folder).open:
                raise UserError(f"the training ended: {jobs.job(job.folder).output[-300:]}")
            time.sleep(0.5)
        yield runs / "dog"
    finally:
        jobs.stop(job)
        while jobs.job(job.folder).open:
            time.sleep(0.5)


@contextmanager
def _server(runs: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    words = ["app", "--output_dir", str(runs), "--no_browser", "--port", "0"]
    process = subprocess.Popen(
        [sys.executable, "-m", "singlora_diffusion.cli", *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    assert process.stdout is not None
    try:
        yield process, next(found[1] for line in process.stdout if (found := re.match(r"(http://\S+): open it", line)))
    finally:
        process.terminate()
        process.wait()


if __name__ == "__main__":
    main(settings.parse(Settings, sys.argv[1:], "python -m benchmarks.app", (__doc__ or "").partition("\n")[0]))
