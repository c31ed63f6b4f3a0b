"""A page in a real browser: Debian's chromium, headless, without a network."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from html import unescape
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

needed = pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")

LISTEN = (
    """<script>errors = []; addEventListener("error", (event) => errors.push(String(event.message)), true)</script>"""
)
LOOK = """<pre></pre><script>
const wide = (one) => one.scrollWidth > one.clientWidth;
onload = () => document.querySelector("pre").textContent = JSON.stringify(
  [...document.querySelectorAll("iframe")].map((frame) => ({
    width: frame.contentDocument.documentElement.scrollWidth,
    cut: [...frame.contentDocument.querySelectorAll("section")].filter(wide).map((one) => one.innerText.slice(0, 40)),
    images: frame.contentDocument.images.length,
    broken: [...frame.contentDocument.images].filter((one) => !one.complete || one.naturalWidth === 0).length,
    errors: frame.contentWindow.errors,
  })))</script>"""


def seen(html: str, widths: Sequence[int], folder: Path) -> list[dict[str, Any]]:
    """What windows of so many pixels show of a page.

    Returns:
        For each: `width`, that of the page, more than the window's if it must be scrolled sideways; `cut`, beginnings
        of sections that are wider than their boxes; `images`, and how many are `broken`; `errors` of scripts.
    """
    (folder / "page.html").write_text(html.replace("<head>", f"<head>{LISTEN}", 1))
    frames = "".join(f'<iframe src="page.html" style="width:{w}px;height:900px;border:0"></iframe>' for w in widths)
    (folder / "frames.html").write_text(frames + LOOK)
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--allow-file-access-from-files"]
    command = [
        str(CHROMIUM),
        *flags,
        "--dump-dom",
        f"--user-data-dir={folder / 'profile'}",
        str(folder / "frames.html"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"<pre>(.*)</pre>", done.stdout, re.DOTALL)
    assert found is not None, done.stderr[-2000:]
    shown: list[dict[str, Any]] = json.loads(unescape(found[1]))
    return shown
