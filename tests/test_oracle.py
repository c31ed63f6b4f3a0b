"""Toyworld's reader as a judge: on renders of the subject, in the places of their prompts, it is mostly right."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from eval.compare import oracle
from singlora_diffusion.toyworld import world


def test_renders_are_right_and_other_subjects_wrong(tmp_path: Path) -> None:
    cat, lines = world.subject("cat-1"), []
    for number, (pixels, _, scene) in enumerate(world.references(cat, 12, start=world.HELD_OUT)):
        Image.fromarray(pixels).resize((96, 96)).save(tmp_path / f"{number}.png")
        place = world.PLACES[scene.background][0]
        lines.append({"file": f"{number}.png", "prompt": f"a sks cat {place}"})
    manifest = tmp_path / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = oracle.scores(tmp_path, "cat-1")
    assert list(found) == list(oracle.ROWS) and min(found.values()) > 0.9
    other = oracle.scores(tmp_path, "bowl-2")  # another class, colour and pattern
    assert max(other["right_class"], other["right_colour"], other["right_pattern"]) < 0.1
    assert other["right_place"] == found["right_place"]
    manifest.write_text("".join(json.dumps({**line, "prompt": "a sks cat"}) + "\n" for line in lines))
    assert "right_place" not in oracle.scores(tmp_path, "cat-1")


def test_a_place_is_known_by_its_longest_wording() -> None:
    assert oracle._place("a cat with a tree and autumn leaves in the background", world.PLACES) == "autumn leaves"
    assert oracle._place("a cat floating on top of water", world.PLACES) == "water"
    assert oracle._place("a red cat", world.PLACES) is None


def test_the_reader_is_loaded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert oracle._reader() is oracle._reader()
