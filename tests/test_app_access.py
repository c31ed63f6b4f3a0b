"""The page for everybody: on a phone, by keyboard, by screen reader, and with words and files that mean it ill."""

from __future__ import annotations

import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from PIL import Image, PngImagePlugin

from singlora_diffusion.sampling import gallery
from tests.app_page import PAGES, Server, drop, opened, picture, tab, until
from tests.browser import needed

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe: make app-tests has it")
pytestmark = needed
pytest_plugins = ("tests.app_page",)

EVIL = "<img src=x onerror=\"document.title='taken'\"> $(touch taken) ' --output_dir /"
FOCUSABLE = "button, input, textarea, select, a[href], [tabindex='0'], [role=tab]"


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, photos: list[Path]) -> Iterator[Server]:
    """With a subject, of which one image is odd, and an adapter after three steps."""
    runs = tmp_path_factory.mktemp("access") / "runs"
    (runs / "subjects" / "rex").mkdir(parents=True)
    for photo in photos:
        (runs / "subjects" / "rex" / photo.name).write_bytes(photo.read_bytes())
    Image.open(photos[0]).resize((40, 40)).save(runs / "subjects" / "rex" / "small.png")
    one = Server(runs)
    yield one
    one.end()


@pytest.fixture(scope="module")
def trained(browser: Browser, server: Server) -> Server:
    """The same with a run, images and their scores."""
    with opened(browser, server.url) as page:
        fill(page)
        tab(page, "Train")
        page.locator("#steps input").fill("3")
        page.locator("#start").click()
        page.get_by_text("The adapter is ready").wait_for()
    return server


def upload(name: str, content: bytes) -> Any:
    return {"name": name, "mimeType": "image/png", "buffer": content}


def fill(page: Page) -> None:
    """Choose the subject that is there."""
    page.locator("#folder input").click()
    page.get_by_role("option", name="subjects/rex").click()
    page.locator("#noun textarea, #noun input").fill("dog")
    page.get_by_text("6 images, cropped").wait_for()


def shown(page: Page) -> Iterator[str]:
    """All pages, one after the other, each with what it can show."""
    for name in PAGES:
        tab(page, name)
        if name == "Subject":
            fill(page)
        if name == "Generate":
            page.locator("#prompt textarea").fill("a photo of sks dog on the moon")
            page.locator("#seeds input, #seeds textarea").fill("0")
            page.locator("#make").click()
            page.locator("#over img").first.wait_for()
        if name == "Score":
            page.locator("#score").click()
            page.locator("table.scores").wait_for()
        if name == "Files":
            page.locator("#inspect").click()
            page.wait_for_function("document.querySelector('#said textarea').value.includes('rank')")
        page.wait_for_timeout(300)
        yield name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it(browser: Browser, trained: Server, scheme: Any) -> None:
    """390 pixels wide: nothing is scrolled sideways or cut off, and axe finds nothing serious."""
    options = {"viewport": {"width": 390, "height": 844}, "color_scheme": scheme}
    with opened(browser, trained.url, **options, is_mobile=True, has_touch=True) as page:
        for name in shown(page):
            assert page.evaluate("[innerWidth, document.documentElement.scrollWidth]") == [390, 390], name
            if name == "Generate" and scheme == "dark":
                picture(page, "phone")
            assert page.evaluate(CUT) == [], name
            assert serious(page) == [], name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_is_in_the_way_of_a_screen_reader(browser: Browser, trained: Server, scheme: Any) -> None:
    with opened(browser, trained.url, color_scheme=scheme) as page:
        for name in shown(page):
            assert serious(page) == [], name
            for fold in page.get_by_role("button", name=re.compile("Advanced")).filter(visible=True).all():
                fold.click()
                page.wait_for_timeout(500)
                assert serious(page) == [], name


CUT = """() => [...document.querySelectorAll("h1, h2, p, li, td, th, button, label, input, textarea, img, svg.losses")]
  .filter((one) => one.checkVisibility() && !one.closest(".scroll") && one.getBoundingClientRect().width > 1
    && (one.getBoundingClientRect().right > 391 || one.getBoundingClientRect().left < -1))
  .map((one) => one.outerHTML.slice(0, 200))"""
"""What reaches beyond the window, and is not in a box that can be scrolled."""


def serious(page: Page) -> list[str]:
    """What axe-core finds serious or critical."""
    found = axe.Axe().run(page).response
    assert len(found["passes"]) > 20
    return [
        f"{one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}"
        for one in found["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def test_a_keyboard_is_enough(browser: Browser, trained: Server) -> None:
    """Everything can be reached by Tab, shows that it was, and does its work on Enter."""
    with opened(browser, trained.url) as page:
        for name in PAGES:
            tab(page, name)
            page.wait_for_timeout(300)
            page.evaluate(
                """(kinds) => { for (const one of document.querySelectorAll(kinds)) if (one.checkVisibility()
                     && !one.disabled && one.tabIndex >= 0 && one.getBoundingClientRect().width > 1
                     && !(one.type === "radio" && !one.checked)) one.dataset.unreached = 1; }""",
                FOCUSABLE,
            )
            page.locator("h1").click()  # where Tab goes on from
            for _ in range(200):
                page.keyboard.press("Tab")
                if page.evaluate("document.activeElement === document.body"):
                    break
                page.evaluate("delete document.activeElement.dataset.unreached")
            left = page.evaluate(
                "[...document.querySelectorAll('[data-unreached]')].map((one) => one.outerHTML.slice(0, 150))"
            )
            assert left == [], name
        page.get_by_role("tab", name="Generate", exact=True).focus()
        page.keyboard.press("Enter")
        page.locator("#prompt textarea").focus()
        page.keyboard.type("a photo of sks dog at night")
        page.locator("#seeds input, #seeds textarea").focus()
        page.keyboard.press("Control+A")
        page.keyboard.type("3")
        page.locator("#make").focus()
        assert page.evaluate(
            "['outlineStyle', 'boxShadow'].some((one) => getComputedStyle(document.activeElement)[one] !== 'none')"
        )
        page.keyboard.press("Enter")
        page.locator("#over img").first.wait_for()


def test_words_and_names_are_text(browser: Browser, server: Server, photos: list[Path], tmp_path: Path) -> None:
    """Names of files and subjects, captions and prompts are shown, kept and handed on as what they are."""
    name = "<img src=x onerror=document.title='taken'>.png"
    with opened(browser, server.url) as page:
        drop(page, [], "../../taken")
        page.locator("#drop input[type=file]").set_input_files([upload(name, photos[0].read_bytes())])
        page.get_by_text("take a name of letters, digits").wait_for()
        assert not [*tmp_path.glob("taken")] and not [*server.runs.parent.parent.glob("taken*")]
        page.locator("#name textarea, #name input").fill("evil")
        page.locator("#drop input[type=file]").set_input_files([upload(name, photos[0].read_bytes())])
        page.get_by_text("1 image, cropped").wait_for()
        kept = [one for one in (server.runs / "subjects" / "evil").iterdir() if one.suffix == ".png"]
        assert len(kept) == 1 and kept[0].parent.name == "evil"
        caption = page.get_by_label(re.compile("Caption of"))
        caption.fill(EVIL)
        caption.press("Enter")
        until(lambda: kept[0].with_suffix(".txt").exists())
        assert kept[0].with_suffix(".txt").read_text() == EVIL + "\n"
        page.reload()

        tab(page, "Generate")
        page.locator("#prompt textarea").fill(EVIL)
        page.locator("#seeds input, #seeds textarea").fill("0")
        page.locator("#make").click()
        page.locator("#images img").first.wait_for()
        said = page.locator("#make").page.locator(".command textarea").filter(visible=True).first.input_value()
        words = shlex.split(said.splitlines()[0])
        assert words[words.index("--prompt") + 1] == EVIL and "--output_dir" in words
        lines = [json.loads(line) for path in server.runs.rglob("manifest.jsonl") for line in path.open()]
        assert EVIL in [line.get("prompt") for line in lines]
        assert page.title() == "SingLoRA" and not page.locator("img[src=x]").count()
    assert not Path("taken").exists()


def test_bad_files_are_left_out_with_a_reason(browser: Browser, server: Server, photos: list[Path]) -> None:
    """Dropped images that are none, are broken or blow up; and a PNG whose settings are lies."""
    whole = photos[0].read_bytes()
    bomb = io.BytesIO()
    Image.new("1", (30000, 30000)).save(bomb, "png")
    bad = {"text.png": b"hello", "half.png": whole[: len(whole) // 2], "bomb.png": bomb.getvalue(), "empty.jpg": b""}
    with opened(browser, server.url) as page:
        page.locator("#folder input").wait_for()
        page.locator("#name textarea, #name input").fill("mixed")
        page.locator("#drop input[type=file]").set_input_files(
            [upload(one, content) for one, content in {**bad, "fine.png": whole}.items()]
        )
        page.get_by_text("1 image, cropped").wait_for()
        for one in bad:
            page.get_by_text(f"{one}: ").first.wait_for()
        assert [one.name for one in (server.runs / "subjects" / "mixed").iterdir()] == ["fine.png"]

        lies = PngImagePlugin.PngInfo()
        said = {"prompt": EVIL, "adapter": "../../../etc/passwd", "seed": 5, "steps": "many"}
        lies.add_text(gallery.PNG_KEY, json.dumps(said))
        forged, plain = io.BytesIO(), io.BytesIO()
        Image.open(photos[0]).save(forged, "png", pnginfo=lies)
        Image.open(photos[0]).save(plain, "png")
        tab(page, "Generate")
        page.locator("#recipe input[type=file]").set_input_files([upload("plain.png", plain.getvalue())])
        page.get_by_text("does not say how it was made").first.wait_for()
        page.locator("#recipe input[type=file]").set_input_files([upload("forged.png", forged.getvalue())])
        page.get_by_text(re.compile("does not say how|not in the folders")).nth(1).wait_for()
        assert page.title() == "SingLoRA"
