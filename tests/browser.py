"""A page in a real browser: Debian's chromium, headless, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape
from pathlib import Path
from typing import Any

import pytest

LOOK = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(String(event.message)), true);
addEventListener("load", () => {
  const wide = (one) => one.scrollWidth > one.clientWidth + 1;
  document.documentElement.dataset.seen = JSON.stringify({
    width: innerWidth,
    overflow: wide(document.documentElement),
    cut: [...document.querySelectorAll("section")].filter(wide).map((one) => one.innerText.slice(0, 40)),
    broken: [...document.images].filter((one) => !one.complete || one.naturalWidth === 0).length,
    images: document.images.length,
    errors,
  });
});
</script>"""


def seen(page: Path, width: int, folder: Path) -> dict[str, Any]:
    """What a browser window of so many pixels shows of a page.

    Returns:
        `overflow`: the page is wider than the window; `cut`: beginnings of sections that are wider than their boxes;
        `broken` and `images`: how many; `errors`: of scripts.
    """
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("there is no chromium")
    copy = folder / f"looked-at-{width}.html"
    copy.write_text(page.read_text().replace("<head>", f"<head>{LOOK}", 1))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'browser'}"]
    shown = subprocess.run(
        [browser, *flags, f"--window-size={width},900", "--dump-dom", copy.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    ).stdout
    match = re.search(r'data-seen="([^"]*)"', shown)
    assert match, shown[:2000]
    found: dict[str, Any] = json.loads(unescape(match[1]))
    return found
