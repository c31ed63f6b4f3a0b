"""Losses and scores of a training as inline SVG, which follows the page's colours and takes no time to draw."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..training.best import RULES
from ..training.progress_figure import smoothed

WIDTH, HEIGHT, LEFT, BOTTOM, TOP = 640, 200, 48, 24, 12
MOST = 300
"""Points of a line."""


def losses(rows: Sequence[dict[str, Any]], total: int) -> str:
    """The running mean of the loss over the steps, and the loss on held-out images as dots, the lowest one filled.

    Args:
        rows: of the log.
        total: steps that the axis is for.
    """
    steps = [row["step"] for row in rows if row["loss"] is not None]
    means = smoothed([row["loss"] for row in rows if row["loss"] is not None])
    held_out = [(row["step"], row["validation_loss"]) for row in rows if row.get("validation_loss") is not None]
    if not steps:
        return ""
    every = -(-len(steps) // MOST)
    line = list(zip(steps, means, strict=True))[:: every or 1]
    values = [value for _, value in (*line, *held_out)]
    low, high = min(values), max(values)
    high += (high == low) * (abs(high) or 1.0) * 0.1

    def place(step: float, value: float) -> tuple[float, float]:
        x = LEFT + (WIDTH - LEFT - 8) * step / max(total, steps[-1])
        return round(x, 1), round(TOP + (HEIGHT - TOP - BOTTOM) * (high - value) / (high - low), 1)

    points = " ".join(f"{x},{y}" for x, y in (place(*one) for one in line))
    lowest = min(held_out, key=lambda one: (one[1], one[0]), default=None)
    dots = "".join(
        f'<circle class="held-out{" best" * (one == lowest)}" cx="{x}" cy="{y}" r="4">'
        f"<title>step {one[0]}: {one[1]:.4g} on held-out images</title></circle>"
        for one, (x, y) in ((one, place(*one)) for one in held_out)
    )
    said = f"Loss over {steps[-1]} steps, from {means[0]:.3g} to {means[-1]:.3g}"
    if lowest is not None:
        said += f"; on held-out images lowest at step {lowest[0]}, {lowest[1]:.3g}"
    floor = HEIGHT - BOTTOM
    return (
        f'<svg class="losses" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f'<path class="axis" d="M{LEFT} {TOP}V{floor}H{WIDTH - 8}"/>'
        f'<text x="{LEFT - 6}" y="{TOP + 4}" text-anchor="end">{high:.3g}</text>'
        f'<text x="{LEFT - 6}" y="{floor}" text-anchor="end">{low:.3g}</text>'
        f'<text x="{LEFT}" y="{HEIGHT - 6}">loss, running mean</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">step {max(total, steps[-1])}</text>'
        f'<polyline class="mean" points="{points}"/>{dots}</svg>'
    )


def scores(rows: Sequence[dict[str, Any]]) -> str:
    """Likeness to the subject against agreement with the prompt, a dot for each scored step, the best one filled."""
    scored = [row for row in rows if row.get("dino") is not None and row.get("clip_t") is not None]
    if not scored:
        return ""
    best = max(scored, key=RULES["scores"].value)
    spans = [
        (low - (high == low) * 0.01, high + (high == low) * 0.01)
        for low, high in ((min(values), max(values)) for values in zip(*map(_figures, scored), strict=True))
    ]
    (left, right), (bottom, top) = spans
    places = [
        (
            round(LEFT + 8 + (WIDTH - LEFT - 64) * (x - left) / (right - left), 1),
            round(TOP + 8 + (HEIGHT - TOP - BOTTOM - 16) * (top - y) / (top - bottom), 1),
        )
        for x, y in map(_figures, scored)
    ]
    dots = "".join(
        f'<circle class="{"held-out best" if row is best else "held-out"}" cx="{x}" cy="{y}" r="4">'
        f"<title>step {row['step']}: likeness {row['dino']:.3f}, prompt {row['clip_t']:.3f}</title></circle>"
        f'<text x="{x + 7}" y="{y + 4}">{row["step"]}</text>'
        for row, (x, y) in zip(scored, places, strict=True)
    )
    said = f"Likeness against agreement with the prompt at {len(scored)} steps; best at step {best['step']}"
    return (
        f'<svg class="losses" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{said}">'
        f'<path class="axis" d="M{LEFT} {TOP}V{HEIGHT - BOTTOM}H{WIDTH - 8}"/>'
        f'<polyline class="path" points="{" ".join(f"{x},{y}" for x, y in places)}"/>{dots}'
        f'<text x="{LEFT}" y="{TOP - 2}">likeness {bottom:.3f} to {top:.3f}</text>'
        f'<text x="{WIDTH - 8}" y="{HEIGHT - 6}" text-anchor="end">agreement with the prompt {left:.3f} to {right:.3f}'
        f"</text></svg>"
    )


def _figures(row: dict[str, Any]) -> tuple[float, float]:
    return row["clip_t"], row["dino"]
