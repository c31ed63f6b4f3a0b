"""progress.png: a listener that draws the losses over the steps when the run ends."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..data import png
from . import log_file, run_folder
from .events import Event, Interrupted, Saved

if TYPE_CHECKING:
    from PIL import Image

SMOOTH = 0.95
"""Share of the past in the smooth line."""


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
    """The loss of each step, thin, its running mean, and the loss on held-out images with its lowest point marked."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image

    drawn = Figure(figsize=(8, 4.5), dpi=100, layout="constrained")
    axes = drawn.add_subplot(xlabel="step", ylabel="loss")
    steps = [row["step"] for row in rows]
    losses = [row["loss"] for row in rows]
    axes.plot(steps, losses, color="0.8", linewidth=0.8)
    axes.plot(steps, smoothed(losses), color="C0", label="training, running mean")
    held_out = [(row["validation_loss"], row["step"]) for row in rows if row.get("validation_loss") is not None]
    if held_out:
        axes.plot([step for _, step in held_out], [loss for loss, _ in held_out], "o-", color="C1", label="held out")
        lowest, step = min(held_out)
        axes.plot([step], [lowest], "*", markersize=16, color="C3", label=f"best: step {step}")
    axes.legend()
    canvas = FigureCanvasAgg(drawn)
    canvas.draw()
    return Image.frombytes("RGBA", canvas.get_width_height(), bytes(canvas.buffer_rgba())).convert("RGB")


def smoothed(values: list[float]) -> list[float]:
    """The exponential running mean, without its bias towards the start."""
    mean, weight = 0.0, 0.0
    found = []
    for value in values:
        mean, weight = SMOOTH * mean + (1 - SMOOTH) * value, SMOOTH * weight + 1 - SMOOTH
        found.append(mean / weight)
    return found
