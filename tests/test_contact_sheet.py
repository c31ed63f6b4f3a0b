"""Contact sheets: `pytest tests/test_contact_sheet.py`."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image, ImageFont

from singlora_diffusion.sampling.contact_sheet import GAP, INK, LINE, PAPER, SMALLEST, TEXT, _wrap, grid

RED, GREEN, BLUE, GOLD = (200, 0, 0), (0, 200, 0), (0, 0, 200), (200, 200, 0)


def plain(colour: tuple[int, int, int], width: int = 150, height: int = 150) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def area(sheet: Image.Image, colour: tuple[int, int, int]) -> tuple[int, int, int, int]:
    """Left, top, width, height of everything of one colour; it must fill that rectangle."""
    ys, xs = np.nonzero((np.asarray(sheet) == colour).all(-1))
    width, height = int(xs.max() - xs.min() + 1), int(ys.max() - ys.min() + 1)
    assert len(xs) == width * height
    return int(xs.min()), int(ys.min()), width, height


def test_each_image_stands_in_its_row_and_column() -> None:
    sheet = grid([[plain(RED), plain(GREEN)], [plain(BLUE), plain(GOLD)]], ["one", "two"], ["seed 0", "seed 1"])
    assert sheet.size == (GAP + 2 * (150 + GAP), GAP + LINE + 2 * (150 + LINE + GAP))
    first, second = GAP, GAP + 150 + GAP
    upper, lower = GAP + LINE, GAP + LINE + 150 + LINE + GAP
    assert area(sheet, RED) == (first, upper, 150, 150)
    assert area(sheet, GREEN) == (second, upper, 150, 150)
    assert area(sheet, BLUE) == (first, lower, 150, 150)
    assert area(sheet, GOLD) == (second, lower, 150, 150)


def test_labels_are_written_where_they_belong() -> None:
    images = [[plain(RED)], [plain(BLUE)]]
    unlabelled, labelled = grid(images), grid(images, ["", "a dog"], ["seed 7"])
    assert (np.asarray(unlabelled) == INK).all(-1).sum() == 0
    assert labelled.height == unlabelled.height + 2 * LINE  # an empty label takes no room
    dark = np.nonzero((np.asarray(labelled).astype(int).sum(-1) < 300) & (np.asarray(labelled).max(-1) < 150))[0]
    _, red_top, _, _ = area(labelled, RED)
    _, blue_top, _, blue_height = area(labelled, BLUE)
    assert dark.min() < red_top and dark.max() >= blue_top + blue_height
    assert not ((dark >= red_top) & (dark < blue_top)).any()


def test_images_of_unequal_sizes_and_rows_of_unequal_lengths() -> None:
    sheet = grid([[plain(RED, 200, 100), plain(GREEN, 50, 160)], [plain(BLUE, 20, 30)]])
    assert sheet.size == (GAP + 2 * (200 + GAP), GAP + 2 * (160 + GAP))
    assert area(sheet, RED) == (GAP, GAP + 30, 200, 100)
    assert area(sheet, GREEN) == (GAP + 200 + GAP + 75, GAP, 50, 160)
    assert area(sheet, BLUE) == (GAP + 90, GAP + 160 + GAP + 65, 20, 30)


def test_large_images_are_reduced_by_one_factor_and_small_ones_enlarged_by_a_whole_one() -> None:
    sheet = grid([[plain(RED, 1000, 500), plain(BLUE, 200, 200)]], largest=250)
    assert area(sheet, RED)[2:] == (250, 125) and area(sheet, BLUE)[2:] == (50, 50)
    checker = Image.fromarray((np.indices((64, 64)).sum(0) % 2 * 255).astype(np.uint8))
    sheet = grid([[checker]])
    assert np.array_equal(
        np.asarray(sheet)[GAP : GAP + SMALLEST, GAP : GAP + SMALLEST, 0], np.kron(np.asarray(checker), np.ones((2, 2)))
    )


def test_what_is_transparent_is_paper() -> None:
    sheet = grid([[Image.new("RGBA", (150, 150), (*RED, 0))]])
    assert np.unique(np.asarray(sheet)).tolist() == [PAPER[0]]


def test_long_captions_are_wrapped_and_lose_nothing() -> None:
    font = ImageFont.load_default(TEXT)
    text = "a photo of a sks dog " + "in the snow " * 20 + "x" * 300
    lines = _wrap(text, font, 140)
    assert all(font.getlength(line) <= 140 for line in lines)
    assert "".join(lines).replace(" ", "") == text.replace(" ", "")
    sheet = grid([[plain(RED)]], [text])
    assert sheet.height == GAP + 150 + len(_wrap(text, font, 150)) * LINE + GAP


@pytest.mark.parametrize("rows, labels, heads", [([], [], []), ([[]], [], []), ([[plain(RED)]], ["a", "b"], [])])
def test_nothing_to_show_or_labels_that_do_not_fit(rows: list, labels: list, heads: list) -> None:
    with pytest.raises(ValueError):
        grid(rows, labels, heads)
