"""The page in a real browser: what a newcomer does, what outlives what, and what nobody gets."""

from __future__ import annotations

import os
import re
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from PIL import Image

from singlora_diffusion import formats
from singlora_diffusion.app import jobs, progress
from tests.app_page import PATIENCE, PICTURES, Server, drop, expect, opened, picture, tab, until
from tests.browser import needed

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = needed
pytest_plugins = ("tests.app_page",)
NEWCOMER = 180.0
"""Seconds from dropped images to an exported file, where nobody else wants the processors."""


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    one = Server(tmp_path_factory.mktemp("app") / "runs")
    yield one
    one.end()


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
        if PICTURES:
            page.locator("#status").get_by_text("rex: done").wait_for()
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
            page.locator("#pause:not([disabled])").click()
            page.locator("#status").get_by_text("rex: paused").wait_for()
            paused = progress.read(run).step
            page.wait_for_timeout(3000)
            assert progress.read(run).step == paused
            page.locator("#go-on:not([disabled])").click()
            until(lambda: progress.read(run).step > paused)
            page.locator("#stop:not([disabled])").click()
            page.locator("#status").get_by_text("rex: stopped").wait_for()
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


def test_masks_and_presets(browser: Browser, server: Server, photos: list[Path], tmp_path: Path) -> None:
    """A mask is taken with its image and seen; a preset fills in what it says, and the command has it."""
    left = Image.new("L", Image.open(photos[0]).size)
    left.paste(255, (0, 0, left.width // 2, left.height))
    left.save(tmp_path / f"{photos[0].stem}.mask.png")
    with opened(browser, server.url) as page:
        drop(page, [*photos[:3], tmp_path / f"{photos[0].stem}.mask.png"], "masked")
        page.get_by_text("3 images, cropped").wait_for()
        page.get_by_text("1 has a mask").wait_for()
        expect(page.locator("figcaption", has_text="mask")).to_have_count(1)

        tab(page, "Train")
        page.locator("#preset input").click()
        page.get_by_role("option", name="SingLoRA, the default recipe").click()
        page.locator("#source").get_by_text("Measured here on six subjects").wait_for()
        page.locator("#plan").click()
        command = page.locator(".command textarea").filter(visible=True).first
        command.wait_for()
        assert "--learning_rate 0.001" in command.input_value()


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


def test_two_pages_cannot_spoil_a_run(browser: Browser, photos: list[Path], tmp_path: Path) -> None:
    """One of two that begin the same run is told so; each sees what the other has put into the queue."""
    server = Server(tmp_path / "runs")
    queue = tmp_path / "runs" / ".queue"
    try:
        with opened(browser, server.url) as one, opened(browser, server.url) as other:
            for page in (one, other):
                drop(page, photos, "rex")
                page.get_by_text("5 images, cropped").wait_for()
                tab(page, "Train")
                page.locator("#steps input").fill("100000")
            for page in (one, other):
                page.locator("#start").click(no_wait_after=True)
            refused = [page.get_by_text("a training waits or runs there already") for page in (one, other)]
            until(lambda: sum(each.count() for each in refused))
            assert [job.run.name for job in jobs.jobs(queue) if job.open] == ["rex"]

            other.locator("#run-name textarea, #run-name input").fill("rex again")
            other.locator("#start").click()
            for page in (one, other):
                page.locator("#queue").get_by_text("rex again: waits for its turn").wait_for()
            other.locator("#status").get_by_text("rex again: waits for its turn").wait_for()
            other.locator("#stop").click()
            expect(one.locator("#queue")).not_to_contain_text("rex again")
            until(lambda: progress.read(tmp_path / "runs" / "rex").step > 2)
            tab(one, "Train")
            for page in (one, other):
                page.reload()
                tab(page, "Train")
                page.locator("#stop:not([disabled])").wait_for()
            for page in (one, other):  # both stop it
                page.locator("#stop").click(no_wait_after=True)
            one.locator("#status").get_by_text("rex: stopped").wait_for()
        assert [job.state for job in jobs.jobs(queue) if job.state != "withdrawn"] == ["stopped"]
        run = progress.read(tmp_path / "runs" / "rex")
        assert [row["step"] for row in run.rows] == [*range(1, run.step + 1)] and run.checkpoints[-1] == run.step
    finally:
        server.end()


def test_others_need_the_password(browser: Browser, tmp_path: Path) -> None:
    """On an address that others reach; without the password neither the page nor a file is given away."""
    server = Server(tmp_path / "runs", "--host", "0.0.0.0", SINGLORA_APP_PASSWORD="correct horse")
    try:
        url = server.url.replace("0.0.0.0", "127.0.0.1")
        (server.runs / "fine.txt").write_text("x")
        assert status(f"{url}/config") == status(f"{url}/gradio_api/file={server.runs / 'fine.txt'}") == 401
        with opened(browser, url) as page:
            for password in ("wrong", "correct horse"):
                page.get_by_label("username").fill("anybody")
                page.get_by_label("password").fill(password)
                page.get_by_role("button", name="Login").click()
                if password == "wrong":
                    page.get_by_text("Incorrect").wait_for()
            page.locator("#folder input").wait_for()
        assert "correct horse" not in "".join(server.said)
    finally:
        server.end()
