"""Trained parameters of a method at a rank, and the rank that meets a budget; from a model's config files alone.

How much a method trains depends only on the (out, in) shapes of the layers it adapts, by the closed forms of its row in
`METHODS`. The tests hold each row to what an attached adapter really trains.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..errors import UserError
from ..terminal import escaped
from .config import MAX_RANK, AdapterConfig
from .methods import METHODS

if TYPE_CHECKING:
    from ..models.network import Networks

TOLERANCE = 0.02
"""A rank that misses the budget by more is flagged."""
LARGEST = 10**12
"""More parameters than any model has."""

Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class BudgetSettings:
    """For each method the rank that trains as many parameters as a reference, from config files, without weights."""

    pretrained_model_name_or_path: str = "toyworld"
    """`toyworld`, `toyworld-flow`, a diffusers folder (its config files suffice), a hub id, or a .safetensors
    checkpoint."""
    match: str = "lora:8"
    """The budget: METHOD:RANK, or a plain number of parameters."""
    targets: tuple[str, ...] | None = None
    """Layers of the denoiser that are adapted, by the ends of their paths, or the name of a preset of the model. None:
    the model's default."""
    text_targets: tuple[str, ...] | None = ()
    """Layers of the text encoders, adapted at the same rank. Empty: none. None: the model's default."""


class Match(NamedTuple):
    """The rank of a method that comes nearest to a budget."""

    rank: int
    parameters: int  # trained at that rank
    deviation: float  # (parameters - budget) / budget


VARIANTS: dict[str, AdapterConfig] = {
    "offset": AdapterConfig(init="offset"),
    "balanced": AdapterConfig(signature="balanced"),
    "singlora+dora": AdapterConfig(dora=True),
}
"""Options of a method that are compared as if they were methods."""


def rows() -> dict[str, AdapterConfig]:
    """Everything that can be compared, by name: the methods, and the variants."""
    return {**{method: AdapterConfig(method=method) for method in METHODS}, **VARIANTS}


def count(row: str | AdapterConfig, rank: int, shapes: Iterable[Shape]) -> int:
    """Trained numbers of `row`, one of `rows` or another adapter, at `rank` on layers of these shapes, or a Counter."""
    config = _config(row)
    form = METHODS[config.method].count
    return sum(times * form(config, rank, *shape) for shape, times in Counter(shapes).items())


def _config(row: str | AdapterConfig) -> AdapterConfig:
    if isinstance(row, AdapterConfig):
        return row
    if row not in rows():
        raise UserError(f"unknown method {row!r}; there are {', '.join(rows())}")
    return rows()[row]


def match(budget: int, row: str | AdapterConfig, shapes: Sequence[Shape]) -> Match:
    """The rank of `row` whose count comes nearest to `budget`; of equals the smallest that every layer takes."""
    unique = Counter(shapes)
    takes = METHODS[_config(row).method].takes
    ranks = range(1, min(max(map(max, unique)), MAX_RANK) + 1)
    counts = {rank: trained for rank in ranks if (trained := count(row, rank, unique))}
    misfits = {rank: sum(not takes(rank, into) for _, into in unique) for rank in counts}
    rank = min(counts, key=lambda r: (abs(counts[r] - budget), misfits[r], r))
    return Match(rank, counts[rank], (counts[rank] - budget) / budget)


def shapes(
    model: str | Path | Networks, targets: Sequence[str] | None = None, text_targets: Sequence[str] | None = ()
) -> list[Shape]:
    """(out, in) of every adapted layer, network by network.

    Args:
        model: as `BudgetSettings.pretrained_model_name_or_path`, or networks by name.
        targets: as `AdapterConfig.targets`, and so `text_targets`.
    """
    from ..models.families import meta_networks
    from ..models.network import specs
    from .targets import chosen, resolved

    networks = specs(model) if isinstance(model, Mapping) else meta_networks(model)
    config = AdapterConfig(
        targets=None if targets is None else tuple(targets),
        text_targets=None if text_targets is None else tuple(text_targets),
    )
    adapted = chosen(networks, resolved(config, networks)).values()
    return [(layer.out_features, layer.in_features) for layers in adapted for layer in layers.values()]


def target_count(wanted: str, layers: Sequence[Shape]) -> int:
    """The budget that `--match` names: METHOD:RANK on these layers, or a plain number."""
    row, _, number = wanted.rpartition(":")
    most = MAX_RANK if row else LARGEST
    if not (number.isdecimal() and len(number) <= len(str(most)) and 1 <= int(number) <= most):
        raise UserError(
            f"--match {escaped(wanted, 80)}: give METHOD:RANK, such as lora:8 (rank 1 to {MAX_RANK}), or a number of "
            f"parameters (1 to {LARGEST:,})"
        )
    budget = count(row, int(number), layers) if row else int(number)
    if budget == 0:
        raise UserError(f"--match {wanted}: that trains nothing")
    return budget


class Comparison(NamedTuple):
    """Every method at the rank nearest to one budget."""

    budget: int
    layers: int  # how many layers are adapted
    rows: dict[str, Match]


def comparison(settings: BudgetSettings) -> Comparison:
    """What `budget` prints; the reference itself comes out at its own rank."""
    layers = shapes(settings.pretrained_model_name_or_path, settings.targets, settings.text_targets)
    goal = target_count(settings.match, layers)
    return Comparison(goal, len(layers), {row: match(goal, row, layers) for row in rows()})


def budget(settings: BudgetSettings) -> None:
    """Print for each method the rank, its trained parameters, the deviation, and whether that is over `TOLERANCE`."""
    from rich.console import Console
    from rich.table import Table

    found = comparison(settings)
    table = Table("method", title=f"{settings.match} on {found.layers} layers: {found.budget:,} trained parameters")
    for header in ("rank", "parameters", "deviation"):
        table.add_column(header, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    for method, row in found.rows.items():
        flag = f"over {TOLERANCE:.0%}" if abs(row.deviation) > TOLERANCE else ""
        table.add_row(method, str(row.rank), f"{row.parameters:,}", f"{row.deviation:+.2%}", flag)
    console = Console()
    console.print(table)
    console.print("rank of oft: its block size; of lokr: that of its second Kronecker factor", style="dim")
