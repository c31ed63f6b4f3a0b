"""The article's synthetic problem (its section 5, figure 1): which update of W_q and W_k fits attention scores better?

    python -m eval.language.synthetic --output_dir runs/language/synthetic

The loss is the mean square of X W_q W_k^T X^T - Z, where W_q and W_k are frozen 128 x 128 matrices with an update each:
LoRA's B A, or SingLoRA's A A^T with twice the rank, so that both train the same number; beside them LoRA with
SingLoRA's rank, which trains twice as much. The article has AdamW at a rate of 1e-4 for 15,000 iterations. It does not
say what X, Z and the ranks are; here X has 32 unit rows, Z is standard normal, the rank is 8, and the entries of W_q
and W_k have a variance of 1 / 128.

Every method is measured at the article's rate, and at its own best one of several, chosen on other seeds. All seeds and
rates of a method are trained at once, as one batch.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from singlora_diffusion import files
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Positive, Seed, parse

from ..plots import GRID, SOFT, on_white, panel

if TYPE_CHECKING:
    from torch import Tensor

POINTS = 60
"""Steps at which losses are kept, evenly spaced on a logarithmic axis."""
PRINTED = {"singlora": 1e-5, "lora": 1e-2}
"""Losses that the article's figure ends at, about."""


@dataclass(frozen=True)
class SyntheticSettings:
    """The problem, and how well it is measured."""

    seeds: Annotated[int, Interval(ge=2, le=100_000)] = 32
    """Random problems with their starts."""
    seed: Seed = 0
    """Of the first."""
    steps: Count = 15_000
    """Steps of the optimizer."""
    rate: Positive = 1e-4
    """The article's learning rate."""
    rates: tuple[Positive, ...] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
    """Among which each method's own is chosen: the lowest median loss in the end."""
    tuning_seeds: Annotated[int, Interval(ge=1, le=1000)] = 4
    """Other seeds, for choosing."""
    width: Count = 128
    """Rows and columns of W_q and W_k."""
    tokens: Count = 32
    """Rows of X."""
    rank: Count = 8
    """LoRA's; SingLoRA has twice of it."""
    output_dir: Path = Path("runs/language/synthetic")
    """Where the table and the plot go."""


@dataclass(frozen=True)
class Rule:
    """An update of one matrix, in a batch of problems."""

    label: str
    colour: str
    start: Callable[[Any, int, int], list[Tensor]]
    """Trained tensors from a generator, the width and LoRA's rank."""
    applied: Callable[[Sequence[Tensor], Tensor], Tensor]
    """x dW (..., tokens, width) of x (..., tokens, width)."""


def _uniform(generator: Any, *shape: int) -> Tensor:
    """Entries of variance 1 / (3 width), as Kaiming's start has them, with a width of `shape[0]`."""
    import torch

    return torch.empty(shape).uniform_(-1, 1, generator=generator) / shape[0] ** 0.5


def _pair(generator: Any, width: int, rank: int) -> list[Tensor]:
    import torch

    return [_uniform(generator, width, rank), torch.zeros(rank, width)]


RULES: Mapping[str, Rule] = {
    "singlora": Rule("SingLoRA", "#0072b2", lambda g, n, r: [_uniform(g, n, 2 * r)], lambda t, x: (x @ t[0]) @ t[0].mT),
    "lora": Rule("LoRA", "#d55e00", _pair, lambda t, x: (x @ t[0]) @ t[1]),
    "lora, rank 2r": Rule(
        "LoRA of SingLoRA's rank", "#e69f00", lambda g, n, r: _pair(g, n, 2 * r), lambda t, x: (x @ t[0]) @ t[1]
    ),
}


@dataclass(frozen=True)
class Problems:
    """Several seeds' problems: frozen x W_q and x W_k, and targets."""

    x: Tensor  # (seeds, tokens, width)
    queries: Tensor  # (seeds, tokens, width)
    keys: Tensor  # (seeds, tokens, width)
    z: Tensor  # (seeds, tokens, tokens)
    starts: list[Tensor]  # of both updates, (seeds, ...) each


def problems(settings: SyntheticSettings, rule: Rule, seeds: Sequence[int]) -> Problems:
    """Each a function of its seed alone, and the same for every rule but for the start."""
    import torch

    parts: list[list[Tensor]] = []
    for seed in seeds:
        draw = torch.Generator().manual_seed(seed)
        width, tokens = settings.width, settings.tokens
        x = torch.nn.functional.normalize(torch.randn(tokens, width, generator=draw), dim=1)
        weights = [torch.randn(width, width, generator=draw) / width**0.5 for _ in range(2)]
        z = torch.randn(tokens, tokens, generator=draw)
        starts = [tensor for _ in range(2) for tensor in rule.start(draw, width, settings.rank)]
        parts.append([x, x @ weights[0], x @ weights[1], z, *starts])
    x, queries, keys, z, *starts = (torch.stack(one) for one in zip(*parts, strict=True))
    return Problems(x, queries, keys, z, starts)


def losses(
    settings: SyntheticSettings, name: str, rates: Sequence[float], seeds: Sequence[int]
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Steps (P,), and the loss before each of them (rates, seeds, P); not finite once a run has diverged."""
    import torch

    rule = RULES[name]
    given = problems(settings, rule, seeds)
    trained = [[start.clone().requires_grad_() for start in given.starts] for _ in rates]
    optimizer = torch.optim.AdamW([{"params": p, "lr": rate} for p, rate in zip(trained, rates, strict=True)])
    wanted = np.unique(np.geomspace(1, settings.steps + 1, POINTS).round().astype(np.int64)) - 1
    kept, half = [], len(given.starts) // 2
    for step in range(settings.steps + 1):
        tensors = [torch.stack(one) for one in zip(*trained, strict=True)]  # (rates, seeds, ...)
        queries = given.queries + rule.applied(tensors[:half], given.x)
        keys = given.keys + rule.applied(tensors[half:], given.x)
        loss = (queries @ keys.mT - given.z).square().mean(dim=(-2, -1))  # (rates, seeds)
        if step in wanted:
            kept.append(loss.detach().double().numpy())
        if step < settings.steps:
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
    return wanted, np.stack(kept, axis=-1)


@dataclass(frozen=True)
class Measured:
    """A method at one rate: losses before each of `steps`, (seeds, P)."""

    name: str
    rate: float
    tuned: bool
    steps: NDArray[np.int64]
    losses: NDArray[np.float64]

    def quartiles(self) -> NDArray[np.float64]:
        """(3, P): a quarter of the seeds is below, the median, three quarters are below."""
        found: NDArray[np.float64] = np.quantile(np.nan_to_num(self.losses, nan=np.inf), (0.25, 0.5, 0.75), axis=0)
        return found


def parameters(settings: SyntheticSettings, name: str) -> int:
    """Trained numbers of a problem."""
    import torch

    return 2 * sum(t.numel() for t in RULES[name].start(torch.Generator(), settings.width, settings.rank))


def tuned(settings: SyntheticSettings, name: str) -> float:
    """The rate with the lowest median loss in the end, on seeds that nothing else is measured on."""
    first = settings.seed + settings.seeds
    _, found = losses(settings, name, settings.rates, range(first, first + settings.tuning_seeds))
    last = np.nan_to_num(found[:, :, -1], nan=np.inf)
    return settings.rates[int(np.argmin(np.median(last, axis=1)))]


def measure(settings: SyntheticSettings) -> list[Measured]:
    """Every method at the article's rate, and at its own."""
    found = []
    for name in RULES:
        own = tuned(settings, name)
        seeds = range(settings.seed, settings.seed + settings.seeds)
        steps, both = losses(settings, name, (settings.rate, own), seeds)
        found += [Measured(name, settings.rate, False, steps, both[0]), Measured(name, own, True, steps, both[1])]
    return found


def table(settings: SyntheticSettings, found: Sequence[Measured]) -> list[list[str]]:
    """A row per method and rate: the losses in the end."""
    rows = [["method", "parameters", "rate", "loss in the end: median", "quartiles", "printed"]]
    for one in found:
        low, median, high = one.quartiles()[:, -1]
        printed = f"{PRINTED[one.name]:g}" if one.name in PRINTED and not one.tuned else ""
        rate = f"{one.rate:g}" + (" (own best)" if one.tuned else "")
        numbers = f"{parameters(settings, one.name):,}"
        rows.append([RULES[one.name].label, numbers, rate, f"{median:.1e}", f"{low:.1e} to {high:.1e}", printed])
    return rows


def plot(found: Sequence[Measured]) -> str:
    """SVG: the median loss over the steps, dashed at the method's own rate; bands are the middle half of the seeds."""
    with panel("loss over the steps of the optimizer", 3.8) as (axes, finish):
        for one in found:
            low, median, high = one.quartiles()
            rule, steps = RULES[one.name], one.steps + 1
            axes.fill_between(steps, low, high, color=rule.colour, alpha=0.15, linewidth=0)
            label = f"{rule.label}, {one.rate:g}" + (", its best" if one.tuned else "")
            axes.plot(steps, median, "--" if one.tuned else "-", color=rule.colour, linewidth=1.5, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_xlabel("step", fontsize=9, color=SOFT)
        axes.legend(fontsize=7, frameon=False, loc="lower left")
        return finish("loss over the steps, for each method at the article's rate and at its own best")


def run(settings: SyntheticSettings) -> None:
    """Measure, print the table, write losses.csv and synthetic.svg."""
    from rich.console import Console
    from rich.table import Table

    files.check_writable(settings.output_dir, "--output_dir")
    found = measure(settings)
    heads, *rows = table(settings, found)
    shown = Table(*heads, title=f"mean square of X W_q W_k^T X^T - Z after {settings.steps:,} steps")
    for row in rows:
        shown.add_row(*row)
    Console(width=120).print(shown)
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    files.write_text(settings.output_dir / "losses.csv", text.getvalue())
    files.write_text(settings.output_dir / "synthetic.svg", on_white(plot(found)))


if __name__ == "__main__":
    import sys

    try:
        run(parse(SyntheticSettings, sys.argv[1:], "python -m eval.language.synthetic", __doc__ or ""))
    except UserError as error:
        sys.exit(f"language.synthetic: {error}")
