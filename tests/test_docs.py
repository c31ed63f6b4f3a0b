"""The tree in docs/architecture.md names every file there is, and no other."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_the_tree_names_every_module() -> None:
    tree = re.search(r"## The tree\n+```\n(.*?)```", (ROOT / "docs" / "architecture.md").read_text(), re.DOTALL)
    assert tree is not None
    named = set(re.findall(r"\b[a-z0-9_]+\.(?:py|txt)\b", tree[1]))
    files = {"train_dreambooth.py", *(path.name for path in (ROOT / "prompts").glob("*.txt"))}
    for folder in ("singlora_diffusion", "eval"):
        files |= {path.name for path in (ROOT / folder).rglob("*.py") if path.name != "__init__.py"}
    assert named == files
