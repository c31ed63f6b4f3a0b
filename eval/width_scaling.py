"""How much does a step change a layer, the wider it is? SingLoRA, LoRA and LoRA+ measured in a minute on a CPU.

    python -m eval.width_scaling --output_dir runs/width_scaling

The paper's analysis (arXiv 2507.05566, section 4) asks for a learning rate proportional to some power of the width n at
which every step changes the features by Theta(1): neither vanishing nor growing with n. Here that is measured. One
layer, f(x) = A A^T x or B A x, is fitted to a target y by the squared error sum (f(x) - y)^2 / 2, with x and y standard
normal; printed is the slope of log RMS(f after step t - f after step t-1) over log n. At a slope of 0 one constant
serves all widths.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
from annotated_types import Interval
from numpy.typing import NDArray

from singlora_diffusion import files
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Seed

from .plots import GRID, SOFT, on_white, panel

if TYPE_CHECKING:
    from torch import Tensor

SHOWN = (1, 2, 5, 20)
"""Steps."""


@dataclass(frozen=True)
class WidthSettings:
    """Which widths, and how well they are measured."""

    widths: tuple[Annotated[int, Interval(ge=8, le=65_536)], ...] = (64, 256, 1024, 4096)
    """Widths n of the square layer."""
    rank: Count = 4
    """Rank of the update."""
    seeds: Annotated[int, Interval(ge=2, le=10_000)] = 24
    """Random starts, inputs and targets."""
    seed: Seed = 0
    """Of the first."""
    output_dir: Path = Path("runs/width_scaling")
    """Where the table and the plot go."""


@dataclass(frozen=True)
class Rule:
    """A row of `RULES`: what is trained, by which optimizer, at which rates."""

    label: str
    start: Callable[[Any, int, int, int], dict[str, Tensor]]
    """Parameters from a generator: (generator, seeds, n, rank)."""
    forward: Callable[[dict[str, Tensor], Tensor], Tensor]
    """Features (seeds, n) of inputs (seeds, n)."""
    optimizer: str
    """Of torch.optim."""
    rate: Callable[[int], dict[str, float]]
    """Learning rate of each parameter at width n."""


def _square(generator: Any, seeds: int, n: int, rank: int) -> dict[str, Tensor]:
    import torch

    return {"A": torch.randn(seeds, n, rank, generator=generator) / n**0.5}


def _pair(generator: Any, seeds: int, n: int, rank: int) -> dict[str, Tensor]:
    import torch

    return {
        "A": torch.randn(seeds, rank, n, generator=generator) / n**0.5,
        "B": torch.zeros(seeds, n, rank),
    }


def _of_square(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    a = parameters["A"]
    return (a @ (a.mT @ x.unsqueeze(-1))).squeeze(-1)


def _of_pair(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return (parameters["B"] @ (parameters["A"] @ x.unsqueeze(-1))).squeeze(-1)


def _same(constant: float, power: float) -> Callable[[int], dict[str, float]]:
    return lambda n: {"A": constant * n**power, "B": constant * n**power}


SINGLORA, LORA = (_square, _of_square), (_pair, _of_pair)

RULES: dict[str, Rule] = {
    "singlora adam -1/2": Rule("SingLoRA, Adam, rate ~ n^-1/2", *SINGLORA, "Adam", _same(0.1, -0.5)),
    "singlora adam 0": Rule("SingLoRA, Adam, constant rate", *SINGLORA, "Adam", _same(1e-3, 0)),
    "singlora adam -1": Rule("SingLoRA, Adam, rate ~ n^-1", *SINGLORA, "Adam", _same(0.1, -1)),
    "singlora sgd -1/2": Rule("SingLoRA, SGD, rate ~ n^-1/2", *SINGLORA, "SGD", _same(0.1, -0.5)),
    "singlora sgd -1": Rule("SingLoRA, SGD, rate ~ n^-1", *SINGLORA, "SGD", _same(0.1, -1)),
    "lora adam -1/2": Rule("LoRA, Adam, rate ~ n^-1/2", *LORA, "Adam", _same(0.1, -0.5)),
    "lora adam 0": Rule("LoRA, Adam, constant rate", *LORA, "Adam", _same(1e-3, 0)),
    "lora adam -1": Rule("LoRA, Adam, rate ~ n^-1", *LORA, "Adam", _same(0.1, -1)),
    "lora sgd -1": Rule("LoRA, SGD, rate ~ n^-1", *LORA, "SGD", _same(0.1, -1)),
    "lora+ adam": Rule("LoRA+, Adam, A ~ n^-1, B constant", *LORA, "Adam", lambda n: {"A": 0.1 / n, "B": 0.1}),
}


def changes(rule: Rule, n: int, rank: int, seeds: int, seed: int, steps: int = max(SHOWN)) -> NDArray[np.float64]:
    """RMS over the features of what each step changes: (seeds, steps); not finite once a run has diverged."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    x, y = (torch.randn(seeds, n, generator=generator) for _ in range(2))
    parameters = {name: tensor.requires_grad_() for name, tensor in rule.start(generator, seeds, n, rank).items()}
    rates = rule.rate(n)
    groups = [{"params": [tensor], "lr": rates[name]} for name, tensor in parameters.items()]
    optimizer = getattr(torch.optim, rule.optimizer)(groups)
    found = np.empty((seeds, steps))
    features = rule.forward(parameters, x)
    for step in range(steps):
        optimizer.zero_grad()
        ((features - y).square().sum() / 2).backward()
        optimizer.step()
        after = rule.forward(parameters, x)
        found[:, step] = (after - features).detach().double().square().mean(dim=1).sqrt().numpy()
        features = after
    return found


def slope(widths: Sequence[int], sizes: NDArray[np.float64]) -> tuple[float, float]:
    """Of log size over log n by least squares, and its standard error over seeds; NaN where a run diverged.

    Args:
        sizes: (widths, seeds).
    """
    if not (np.isfinite(sizes).all() and (sizes > 0).all()):
        return float("nan"), float("nan")
    places = np.log(widths) - np.mean(np.log(widths))
    each = places @ np.log(sizes) / (places @ places)  # a slope per seed
    return float(each.mean()), float(each.std(ddof=1) / len(each) ** 0.5)


def measure(settings: WidthSettings) -> dict[str, NDArray[np.float64]]:
    """By rule: (widths, seeds, steps)."""
    return {
        name: np.stack([changes(rule, n, settings.rank, settings.seeds, settings.seed) for n in settings.widths])
        for name, rule in RULES.items()
    }


def table(settings: WidthSettings, found: dict[str, NDArray[np.float64]]) -> list[list[str]]:
    """Label, optimizer and rate; then the slope at each of `SHOWN` steps."""
    rows = [["rule", *(f"step {step}" for step in SHOWN)]]
    for name, sizes in found.items():
        cells = []
        for step in SHOWN:
            mean, error = slope(settings.widths, sizes[:, :, step - 1])
            cells.append("diverges" if np.isnan(mean) else f"{mean:+.2f} ± {error:.2f}")
        rows.append([RULES[name].label, *cells])
    return rows


def plot(settings: WidthSettings, found: dict[str, NDArray[np.float64]]) -> str:
    """SVG: the change in the fifth step over the width, both axes logarithmic."""
    with panel("RMS change of the features in step 5", 5.2) as (axes, finish):
        for place, (name, sizes) in enumerate(found.items()):
            median = np.median(sizes[:, :, 4], axis=1)
            shown = np.isfinite(median) & (median < 1e3)
            line = "-" if RULES[name].optimizer == "Adam" else "--"
            axes.plot(
                np.array(settings.widths)[shown],
                median[shown],
                marker="o",
                markersize=3.5,
                linestyle=line,
                color=f"C{place}",
                label=RULES[name].label,
            )
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.minorticks_off()
        axes.set_xticks(settings.widths, [str(n) for n in settings.widths])
        low, high = axes.get_ylim()
        powers = [10.0**power for power in range(-6, 4) if low <= 10.0**power <= high]
        axes.set_yticks(powers, [f"{power:g}" for power in powers])
        axes.grid(color=GRID, linewidth=0.8)
        axes.set_xlabel("width n", fontsize=9, color=SOFT)
        axes.legend(fontsize=7, frameon=False, loc="upper center", bbox_to_anchor=(0.45, -0.14))
        return finish("change of the features in the fifth step over the width, for each rule")


def run(settings: WidthSettings) -> None:
    """Measure, print the slopes, write slopes.csv and width_scaling.svg."""
    from rich.console import Console
    from rich.table import Table

    if len(set(settings.widths)) < 2:
        raise UserError("--widths: a slope takes two widths or more")
    files.check_writable(settings.output_dir, "--output_dir")
    found = measure(settings)
    heads, *rows = table(settings, found)
    shown = Table(*heads, title="slope of log RMS(change of the features) over log n: 0 is the same at every width")
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([heads, *rows])
    for row in rows:
        shown.add_row(*row)
    Console().print(shown)
    files.write_text(settings.output_dir / "slopes.csv", text.getvalue())
    files.write_text(settings.output_dir / "width_scaling.svg", on_white(plot(settings, found)))


if __name__ == "__main__":
    import sys

    from singlora_diffusion.settings import parse

    try:
        run(parse(WidthSettings, sys.argv[1:], "python -m eval.width_scaling", __doc__ or ""))
    except UserError as error:
        sys.exit(f"width_scaling: {error}")
