"""The page in a real browser, Debian's chromium, driven by Playwright. Needs the extra [app] and a few more packages.

With SCREENSHOTS=docs the images of docs/app.md are written.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from singlora_diffusion import formats
from singlora_diffusion.app import jobs, progress
from singlora_diffusion.toyworld import subjects
from tests.browser import CHROMIUM, needed

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright: make app-tests has it")
pytest.importorskip("gradio", reason="needs Gradio, the extra [app]: make app-tests has it")
pytestmark = needed
expect = sync_api.expect

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

ROOT = Path(__file__).parent.parent
PATIENCE = 300.0
"""Seconds for what takes a few on an idle machine."""
NEWCOMER = 180.0
"""Seconds from dropped images to an exported file, where nobody else wants the processors."""
expect.set_options(timeout=PATIENCE * 1000)
PICTURES = os.environ.get("SCREENSHOTS")
HIDDEN = ".command { display: none !important }"
"""Command lines, which name folders of this run."""


class Server:
    """`singlora app` in a process of its own."""

    def __init__(self, runs: Path, *words: str, port: int = 0) -> None:
        self.runs = runs
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
        command = [sys.executable, "-m", "singlora_diffusion.cli", "app", "--output_dir", str(runs), "--no_browser"]
        self.process = subprocess.Popen(
            [*command, "--port", str(port), *words], stdout=subprocess.PIPE, text=True, env=environment
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
        """The server, and the trainings that would outlive it."""
        self.process.terminate()
        self.process.wait(PATIENCE)
        for job in jobs.jobs(self.runs / ".queue"):
            jobs.stop(job)
        until(lambda: not any(job.open for job in jobs.jobs(self.runs / ".queue")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return subjects.write_subject("dog-1", tmp_path_factory.mktemp("photos") / "dog", 5, False)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("app") / "runs")
    yield one
    one.end()


@contextmanager
def opened(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """A page in a profile of its own. That it asks nobody else for anything, and has no errors, is found out."""
    context = browser.new_context(viewport={"width": 1180, "height": 900}, **options)
    context.set_default_timeout(PATIENCE * 1000)
    asked: list[str] = []
    errors: list[str] = []
    context.on("request", lambda request: asked.append(request.url))
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(url)
    page.locator("#folder input").wait_for()
    yield page
    context.close()
    elsewhere = [one for one in asked if not one.startswith((url, "data:", f"blob:{url}"))]
    assert asked and not elsewhere and not errors


def tab(page: Page, name: str) -> None:
    page.get_by_role("tab", name=name, exact=True).click()
    page.get_by_role("tabpanel").filter(visible=True).first.wait_for()


def drop(page: Page, photos: list[Path], name: str, noun: str = "dog") -> None:
    page.locator("#name textarea, #name input").fill(name)
    page.locator("#noun textarea, #noun input").fill(noun)
    page.locator("#drop input[type=file]").set_input_files(photos)


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


def test_a_newcomer_s_path(browser: Browser, server: Server, photos: list[Path], tmp_path: Path) -> None:
    """From dropped images to an exported file, which is the adapter that was trained."""
    with opened(browser, server.url) as page:
        began = time.monotonic()
        drop(page, photos, "rex")
        page.get_by_text("5 images, cropped as the trainer does").wait_for()
        expect(page.locator(".card img")).to_have_count(5)
        page.get_by_label("Caption of 00.png").fill("a photo of sks dog, sitting")
        page.get_by_label("Caption of 00.png").press("Enter")
        until(lambda: (server.runs / "subjects" / "rex" / "00.txt").exists())
        picture(page, "subject")

        tab(page, "Train")
        page.locator("#steps input").fill("30")
        page.get_by_text("103,936").first.wait_for()  # parameters of rank 16, as `singlora budget` has them
        page.locator("#start").click()
        page.get_by_text("The adapter is ready").wait_for()
        picture(page, "train")

        tab(page, "Generate")
        page.locator("#prompt textarea").fill("a photo of sks dog on the moon")
        page.locator("#seeds input, #seeds textarea").fill("0-1")
        page.locator("#make").click()
        page.locator("#over img").first.wait_for()
        expect(page.locator("#images img")).to_have_count(2)
        picture(page, "generate")

        tab(page, "Score")
        page.locator("#score").click()
        page.locator("table.scores").wait_for()
        assert {"CLIP-I", "DINO", "CLIP-T"} <= set(page.locator("table.scores th[scope=row]").all_inner_texts())
        picture(page, "score")

        tab(page, "Files")
        page.locator("#export").click()
        with page.expect_download() as download:
            page.locator("#download a").first.click()
        download.value.save_as(tmp_path / "rex.safetensors")
        others = max(1.0, os.getloadavg()[0] / (os.cpu_count() or 1))
        assert time.monotonic() - began < NEWCOMER * others
        picture(page, "files")
    recognised = formats.recognise(tmp_path / "rex.safetensors")
    assert (recognised.kind, recognised.form) == ("tied lora", "kohya")
    assert formats.read_header(server.runs / "rex").recipe["max_train_steps"] == 30
    made = sorted((server.runs / "images").glob("rex-*/*.png"))
    assert [one.name for one in made] == ["000-0.png", "000-1.png", "contact_sheet.png"]

    with opened(browser, server.url) as page:  # an image brings its settings back
        tab(page, "Generate")
        page.locator("#recipe input[type=file]").set_input_files(made[1])
        page.wait_for_function("document.querySelector('#prompt textarea').value.includes('moon')")
        assert page.locator("#seeds input, #seeds textarea").input_value() == "1"


def test_a_reload_and_a_killed_server_lose_nothing(browser: Browser, photos: list[Path], tmp_path: Path) -> None:
    first = Server(tmp_path / "runs")
    port = int(first.url.rpartition(":")[2])
    run = tmp_path / "runs" / "rex"
    with opened(browser, first.url) as page:
        drop(page, photos, "rex")
        page.get_by_text("5 images, cropped").wait_for()
        tab(page, "Train")
        page.locator("#steps input").fill("100000")
        page.locator("#start").click()
        page.locator("#status").get_by_text(re.compile(r"step \d+ of 100000")).wait_for()
        page.reload()
        tab(page, "Train")
        page.locator("#status").get_by_text(re.compile(r"step \d+ of 100000")).wait_for()
    before = progress.read(run).step
    first.kill()
    until(lambda: progress.read(run).step > before + 2)

    second = Server(tmp_path / "runs", port=port)
    try:
        with opened(browser, second.url) as page:
            tab(page, "Train")
            page.locator("#status").get_by_text("rex: training").wait_for()
            page.locator("#stop:not([disabled])").click()
            page.locator("#go-on:not([disabled])").wait_for()
            stopped = progress.read(run)
            assert stopped.checkpoints[-1] == stopped.step and stopped.adapter is None
            page.locator("#go-on").click()
            page.locator("#stop:not([disabled])").wait_for()
            until(lambda: progress.read(run).step > stopped.step)
            page.locator("#stop:not([disabled])").click()
            page.locator("#status").get_by_text("rex: stopped").wait_for()
        assert [job.state for job in jobs.jobs(tmp_path / "runs" / ".queue")] == ["stopped", "stopped"]
        assert [row["step"] for row in progress.read(run).rows] == [*range(1, progress.read(run).step + 1)]
    finally:
        second.end()


def status(request: urllib.request.Request | str) -> int:
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


def test_nothing_else_is_served(server: Server, tmp_path: Path) -> None:
    """Neither other files nor other names for this machine; each answer carries the policy."""
    (tmp_path / "secret").write_text("x")
    (server.runs / "fine.txt").write_text("x")
    (server.runs / "link.txt").symlink_to(tmp_path / "secret")
    files = f"{server.url}/gradio_api/file="
    assert status(f"{files}{server.runs / 'fine.txt'}") == 200
    assert status(f"{files}{tmp_path / 'secret'}") == 403
    assert status(f"{files}{server.runs}/../../../../../../../../etc/passwd") in (403, 404)
    assert status(f"{files}{server.runs / 'link.txt'}") == 403
    assert status(urllib.request.Request(server.url, headers={"Host": "elsewhere.example"})) == 400
    with urllib.request.urlopen(server.url) as answer:
        assert "connect-src 'self'" in answer.headers["content-security-policy"]
