"""Scores and training curves as inline SVG, drawn by matplotlib; text stays text and takes the page's font."""

from __future__ import annotations

import io
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from typing import Any
from warnings import catch_warnings, simplefilter

import numpy as np
from numpy.typing import NDArray

from singlora_diffusion.terminal import escaped

from .results import ScoredSet
from .score_file import ScoreKey

INK, SOFT, FAINT, GRID = "#1c1e21", "#4a4f57", "#d8dbe0", "#eceef1"
WIDTH = 4.2  # inches, at 96 CSS pixels each: three panels side by side on a page, one on a phone


def scores(
    sets: Sequence[ScoredSet],
    colours: Mapping[str, str],
    titles: Mapping[ScoreKey, str],
    real_scores: Mapping[ScoreKey, float | None],
) -> list[str]:
    """A panel per score, a line per prompt, a dot per set; the dashed line is what real images score.

    Args:
        sets: real images left out.
        colours: by the set's name.
        titles: the scores to show, each with the heading of its axes.

    Returns:
        SVG, one per score; none where there is nothing to see: no scores, one prompt, or too many.
    """
    prompts = list(dict.fromkeys(prompt for one in sets for key in titles for prompt in one.per_prompt(key)))
    if not 1 < len(prompts) <= 60:
        return []
    labels = shortened([_words(prompt, sets) for prompt in prompts], limit=28)
    drawn = []
    for key, title in titles.items():
        with panel(title, 0.9 + 0.29 * len(prompts)) as (axes, finish):
            means = [one.per_prompt(key) for one in sets]
            for row, prompt in enumerate(prompts):
                here = [by_prompt[prompt] for by_prompt in means if prompt in by_prompt]
                axes.plot(here, [row] * len(here), color=FAINT, linewidth=3, solid_capstyle="round", zorder=1)
            for one, by_prompt in zip(sets, means, strict=True):
                rows = [row for row, prompt in enumerate(prompts) if prompt in by_prompt]
                values = [by_prompt[prompts[row]] for row in rows]
                axes.plot(values, rows, "o", color=colours[one.name], markersize=6.5, markeredgecolor="white", zorder=3)
            if (real := real_scores[key]) is not None:
                axes.axvline(real, color=INK, linewidth=1, linestyle=(0, (4, 3)), zorder=2)
            axes.set_ylim(len(prompts) - 0.4, -0.6)
            axes.set_yticks(range(len(prompts)), labels)
            axes.grid(axis="x", color=GRID, linewidth=0.8)
            drawn.append(finish(f"{title}, prompt by prompt"))
    return drawn


def curves(sets: Sequence[ScoredSet], colours: Mapping[str, str]) -> list[str]:
    """Loss and gradient norm over the steps: faint as logged, strong the running mean. None without a log."""
    trained = [one for one in sets if len(one.log) > 1]
    known = {key for one in trained for row in one.log for key in row}
    drawn = []
    for key, label in (("loss", "loss"), ("grad_norm", "gradient norm")):
        if key not in known:
            continue
        window = max(max(1, sum(key in row for row in one.log) // 12) for one in trained)
        title = f"{label}, and its mean over {window} steps" if window > 1 else label
        with panel(title, 3.0) as (axes, finish):
            for one in trained:
                rows = [row for row in one.log if key in row]
                steps, values = np.array([[row["step"], row[key]] for row in rows], dtype=float).reshape(-1, 2).T
                axes.plot(steps, values, color=colours[one.name], linewidth=0.6, alpha=0.22)
                axes.plot(steps, running_mean(values, window), color=colours[one.name], linewidth=1.8)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.set_xlabel("step", fontsize=9, color=SOFT)
            axes.set_yscale("log")
            axes.minorticks_off()
            ticks = round_numbers(*axes.get_ylim())
            axes.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
            axes.grid(axis="y", color=GRID, linewidth=0.8)
            drawn.append(finish(f"{label} over the steps of training"))
    return drawn


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


def shortened(texts: Sequence[str], limit: int) -> list[str]:
    """Without the words that all begin with, and no longer than the margin of a plot."""
    words = [text.split() for text in texts]
    shortest = min(map(len, words))
    common = next((i for i in range(shortest) if len({each[i] for each in words}) > 1), shortest - 1)
    kept = [" ".join(each[max(common, 0) :]) for each in words]
    return [text if len(text) <= limit else text[: limit - 1] + "\N{HORIZONTAL ELLIPSIS}" for text in kept]


def _words(prompt: Hashable, sets: Sequence[ScoredSet]) -> str:
    """The prompt without its identifier, as far as it is known."""
    same = (image for one in sets for image in one.images if image.prompt == prompt)
    return escaped(" ".join(str(next(same).about.get("prompt_without_token") or prompt).split()), 400)


def on_white(svg: str) -> str:
    """For a file of its own, which may be shown on any ground."""
    return svg.replace("<svg ", '<svg style="background: white" ', 1)


@contextmanager
def panel(title: str, height: float) -> Iterator[tuple[Any, Callable[[str], str]]]:
    """Axes to draw on, and what makes an SVG of them, given the words for those who cannot see it."""
    import matplotlib
    from matplotlib.figure import Figure

    # Text is text, not LaTeX; a salt of its own, for the ids of all panels share a page.
    settings: Any = {"svg.fonttype": "none", "svg.hashsalt": title, "text.parse_math": False}
    with matplotlib.rc_context(settings), catch_warnings():
        simplefilter("ignore")  # of glyphs that only matplotlib's own font lacks
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        axes = figure.subplots()
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(FAINT)
        axes.tick_params(length=0, labelsize=9, labelcolor=SOFT)
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)

        def finish(says: str) -> str:
            stream = io.StringIO()
            figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
            text = stream.getvalue()
            return text[text.index("<svg") :].replace("<svg ", f'<svg role="img" aria-label="{escape(says)}" ', 1)

        yield axes, finish
