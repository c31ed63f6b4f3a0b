"""`singlora app` in a process of its own, and Debian's chromium, driven by Playwright, in front of it.

With SCREENSHOTS=docs the images of docs/app.md are written.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from singlora_diffusion.app import jobs
from singlora_diffusion.toyworld import subjects
from tests.browser import CHROMIUM

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make app-tests has it")
pytest.importorskip("gradio", reason="needs Gradio, the extra [app]: make app-tests has it")
expect = sync_api.expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parent.parent
PATIENCE = 300.0
"""Seconds for what takes a few on an idle machine."""
PAGES = ("Subject", "Train", "Generate", "Score", "Files")
PICTURES = os.environ.get("SCREENSHOTS")
HIDDEN = ".command, #said { display: none !important }"
"""What names folders of this run."""
expect.set_options(timeout=PATIENCE * 1000)


class Server:
    """The server, ended with the trainings that would outlive it."""

    def __init__(self, runs: Path, *words: str, port: int = 0, **environment: str) -> None:
        self.runs = runs
        path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
        command = [sys.executable, "-m", "singlora_diffusion.cli", "app", "--output_dir", str(runs), "--no_browser"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *words],
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )
        assert self.process.stdout is not None
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if found := re.match(r"(http://\S+?)/?: open it", line):
                self.url = found[1]
                return
        raise AssertionError(f"it did not start: {self.said}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def end(self) -> None:
        self.process.terminate()
        self.process.wait(PATIENCE)
        for job in jobs.jobs(self.runs / ".queue"):
            jobs.stop(job)
        until(lambda: not any(job.open for job in jobs.jobs(self.runs / ".queue")))


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Five images of a toyworld subject."""
    return subjects.write_subject("dog-1", tmp_path_factory.mktemp("photos") / "dog", 5, False)


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page in a profile of its own. That it asks nobody else for anything, and has no errors, is found out."""
    context = browser.new_context(**{"viewport": {"width": 1180, "height": 900}, **options})
    context.set_default_timeout(PATIENCE * 1000)
    asked: list[str] = []
    errors: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    yield page
    context.close()
    elsewhere = [one for one in asked if not one.startswith((url, "data:", f"blob:{url}"))]
    assert asked and not elsewhere and not errors


def tab(page: Page, name: str) -> None:
    """Go to one of the pages, once all of them are there."""
    page.locator("#folder input").wait_for(state="attached")
    page.get_by_role("tab", name=name, exact=True).click()
    page.get_by_role("tabpanel").filter(visible=True).first.wait_for()


def drop(page: Page, files: Sequence[Path], name: str, noun: str = "dog") -> None:
    """Give the page a subject's images."""
    page.locator("#folder input").wait_for()
    page.locator("#name textarea, #name input").fill(name)
    page.locator("#noun textarea, #noun input").fill(noun)
    page.locator("#drop input[type=file]").set_input_files(files)


def until(true: Callable[[], object]) -> None:
    began = time.monotonic()
    while not true():
        assert time.monotonic() - began < PATIENCE
        time.sleep(0.1)


def picture(page: Page, name: str) -> None:
    """For docs/app.md."""
    if PICTURES:
        page.wait_for_timeout(1000)
        page.screenshot(path=Path(PICTURES) / f"app-{name}.jpg", type="jpeg", quality=75, full_page=True, style=HIDDEN)
