"""Scores and training curves as inline SVG, drawn by matplotlib; text stays text and takes the page's font."""

from __future__ import annotations

import io
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .results import Column, Loaded

INK, SOFT, FAINT, GRID = "#1c1e21", "#4a4f57", "#d8dbe0", "#eceef1"
WIDTH = 11.6  # inches, at 72 CSS pixels each on a page of that width


def scores(
    loaded: Sequence[Loaded],
    colours: Mapping[str, str],
    titles: Mapping[Column, str],
    ceilings: Mapping[Column, float | None],
) -> str | None:
    """A panel per score, a line per prompt, a dot per run; the dashed line is what real pictures score.

    Args:
        loaded: the runs, real pictures left out.
        colours: by the run's name.
        titles: the scores to show, each with the heading of its panel.

    Returns:
        None where there is nothing to see: no scores, one prompt, or too many.
    """
    prompts = list(dict.fromkeys(prompt for one in loaded for column in titles for prompt in one.per_prompt(column)))
    if not 1 < len(prompts) <= 60:
        return None
    figure, panels = _figure(len(titles), 0.9 + 0.29 * len(prompts), sharey=True)
    for panel, (column, title) in zip(panels, titles.items(), strict=True):
        means = [one.per_prompt(column) for one in loaded]
        for row, prompt in enumerate(prompts):
            here = [by_prompt[prompt] for by_prompt in means if prompt in by_prompt]
            panel.plot(here, [row] * len(here), color=FAINT, linewidth=3, solid_capstyle="round", zorder=1)
        for one, by_prompt in zip(loaded, means, strict=True):
            rows = [row for row, prompt in enumerate(prompts) if prompt in by_prompt]
            values = [by_prompt[prompts[row]] for row in rows]
            panel.plot(
                values, rows, "o", color=colours[one.run.name], markersize=6.5, markeredgecolor="white", zorder=3
            )
        if (real := ceilings[column]) is not None:
            panel.axvline(real, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
        panel.set_title(title, loc="left", fontsize=10.5, color=INK)
        panel.set_ylim(len(prompts) - 0.4, -0.6)
        panel.set_yticks(range(len(prompts)), shortened([_words(prompt, loaded) for prompt in prompts]))
        panel.grid(axis="x", color=GRID, linewidth=0.8)
    return _svg(figure, "Scores, prompt by prompt")


def curves(loaded: Sequence[Loaded], colours: Mapping[str, str]) -> str | None:
    """Loss and gradient norm over the steps: faint as logged, strong the running mean. None without a log."""
    trained = [one for one in loaded if len(one.log) > 1]
    known = {key for one in trained for row in one.log for key in row}
    shown = {key: label for key, label in (("loss", "loss"), ("grad_norm", "gradient norm")) if key in known}
    if not shown:
        return None
    figure, panels = _figure(len(shown), 3.0)
    for panel, (key, label) in zip(panels, shown.items(), strict=True):
        for one in trained:
            steps = np.array([row["step"] for row in one.log if key in row], dtype=float)
            values = np.array([row[key] for row in one.log if key in row], dtype=float)
            window = max(1, len(values) // 12)
            colour = colours[one.run.name]
            panel.plot(steps, values, color=colour, linewidth=0.6, alpha=0.22)
            panel.plot(steps, running_mean(values, window), color=colour, linewidth=1.8)
        over = f", and its mean over {window} steps" if window > 1 else ""
        panel.set_title(f"{label}{over}", loc="left", fontsize=10.5, color=INK)
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.set_xlabel("step", fontsize=9, color=SOFT)
        panel.set_yscale("log")
        panel.minorticks_off()
        ticks = round_numbers(*panel.get_ylim())
        panel.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
        panel.grid(axis="y", color=GRID, linewidth=0.8)
    return _svg(figure, "Loss and gradient norm over the steps of training")


def running_mean(values: NDArray[np.float64], window: int) -> NDArray[np.float64]:
    """Mean over the `window` values around each one, at the ends over those there are: (N,) -> (N,)."""
    kernel = np.ones(min(window, len(values)))
    return np.convolve(values, kernel, "same") / np.convolve(np.ones_like(values), kernel, "same")


def round_numbers(low: float, high: float) -> list[float]:
    """A few round numbers between two positive ones, as ticks of a logarithmic axis."""
    found: list[float] = []
    for digits in ((10,), (10, 20, 50), range(10, 100, 10), range(100, 1000, 5)):
        found = [digit * 10.0**power for power in range(-12, 9) for digit in digits]
        found = [number for number in found if low <= number <= high]
        if len(found) > 2:
            break
    return found[:: -(-len(found) // 7)] if found else []


def shortened(texts: Sequence[str], limit: int = 40) -> list[str]:
    """Without the words that all begin with, and no longer than the margin of a plot."""
    words = [text.split() for text in texts]
    shortest = min(map(len, words))
    common = next((i for i in range(shortest) if len({each[i] for each in words}) > 1), shortest - 1)
    kept = [" ".join(each[max(common, 0) :]) for each in words]
    return [text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}" for text in kept]


def _words(prompt: Hashable, loaded: Sequence[Loaded]) -> str:
    """The prompt without its identifier, as far as it is known."""
    same = (picture for one in loaded for picture in one.pictures if picture.prompt == prompt)
    return str(next(same).about.get("prompt_without_token") or prompt)


def _figure(count: int, height: float, **options: Any) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    panels = figure.subplots(1, count, squeeze=False, **options)[0]
    for panel in panels:
        panel.spines[["top", "right", "left"]].set_visible(False)
        panel.spines["bottom"].set_color(FAINT)
        panel.tick_params(length=0, labelsize=9, labelcolor=SOFT)
    return figure, panels


def _svg(figure: Any, says: str) -> str:
    import matplotlib

    stream = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": says}):
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = stream.getvalue()
    return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{says}" ', 1)
