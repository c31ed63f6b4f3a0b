"""progress.png: a listener that draws losses and the path of the scores when the run ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..data import png
from . import log_file, run_folder
from .events import Event, Interrupted, Saved

if TYPE_CHECKING:
    from PIL import Image

SMOOTH = 0.95
"""Share of the past in the smooth line."""
LABELS = 20
"""So many dots at the most are labelled."""


class ProgressFigure:
    """Reads the log, so that a resumed run's figure has all of its steps."""

    def __init__(self, out: Path) -> None:
        self.out = out

    def __call__(self, event: Event) -> None:
        if isinstance(event, Saved | Interrupted):
            rows = log_file.rows(self.out / log_file.NAME)
            if rows:
                png.write(figure(rows), self.out / run_folder.PROGRESS)

    def close(self) -> None:
        pass


def figure(rows: list[dict[str, float]]) -> Image.Image:
    """The losses over the steps; where previews were scored, the path that the scores took beside them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    scored = [row for row in rows if None not in (row.get("dino"), row.get("clip_t"))]
    drawn = Figure(figsize=(14 if scored else 8, 4.5), dpi=100, layout="constrained")
    panels = drawn.subplots(1, 2 if scored else 1, squeeze=False)[0]
    _losses(panels[0], rows)
    if scored:
        _path(panels[1], scored)
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def _losses(axes: Any, rows: list[dict[str, float]]) -> None:
    """The loss of each step, thin, its running mean, and the loss on held-out images with its lowest point marked."""
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    axes.set(xlabel="step", ylabel="loss")
    axes.plot(steps, losses, color="0.8", linewidth=0.8)
    axes.plot(steps, smoothed(losses), color="C0", label="training, running mean")
    held_out = [(row["validation_loss"], row["step"]) for row in rows if row.get("validation_loss") is not None]
    if held_out:
        axes.plot([step for _, step in held_out], [loss for loss, _ in held_out], "o-", color="C1", label="held out")
        lowest, step = min(held_out)
        axes.plot([step], [lowest], "*", markersize=16, color="C3", label=f"lowest: step {step}")
    axes.legend()


def _path(axes: Any, rows: list[dict[str, float]]) -> None:
    """Likeness against agreement with the prompt: a dot for each validation, labelled by its step, the best marked."""
    from .best import RULES

    prompt, likeness = [row["clip_t"] for row in rows], [row["dino"] for row in rows]
    axes.set(xlabel="agreement with the prompt (CLIP-T)", ylabel="likeness to the subject (DINO)")
    axes.plot(prompt, likeness, "-", color="0.8")
    axes.scatter(prompt, likeness, c=[row["step"] for row in rows], cmap="viridis_r", zorder=2)
    best = max(rows, key=RULES["scores"].value)  # of equal ones the first
    axes.plot([best["clip_t"]], [best["dino"]], "*", markersize=16, color="C3", label=f"best: step {best['step']}")
    every = -(-len(rows) // LABELS)
    for number, row in enumerate(rows, start=1):
        if number % every == 0 or row is best:
            axes.annotate(
                str(row["step"]), (row["clip_t"], row["dino"]), xytext=(5, 5), textcoords="offset points", fontsize=8
            )
    axes.legend()


def smoothed(values: list[float]) -> list[float]:
    """The exponential running mean, without its bias towards the start."""
    mean, weight = 0.0, 0.0
    found = []
    for value in values:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
        found.append(mean / weight)
    return found
