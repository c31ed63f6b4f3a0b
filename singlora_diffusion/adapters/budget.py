"""Trained parameters of a method at a rank, and the rank that meets a budget; from a model's config files alone.

How much a method trains depends only on the (out, in) shapes of the layers it adapts, by the closed forms of its row in
`METHODS`. The tests hold each row to what an attached adapter really trains.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError
from ..terminal import escaped
from .config import MAX_RANK, AdapterConfig
from .methods import METHODS

if TYPE_CHECKING:
    from torch import nn

    from ..models.network import Networks, NetworkSpec

TOLERANCE = 0.02
"""A rank that misses the budget by more is flagged."""
LARGEST = 10**12
"""More parameters than any model has."""

Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class BudgetSettings:
    """For each method the rank that trains as many parameters as a reference, from config files, without weights."""

    pretrained_model_name_or_path: str = "toyworld"
    """A local diffusers folder (its config files suffice), `toyworld`, or a Hugging Face hub id."""
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


def count(row: str, rank: int, shapes: Iterable[Shape]) -> int:
    """Trained numbers of `row`, one of `rows`, at `rank` on layers of these shapes, or a Counter of them."""
    if row not in rows():
        raise UserError(f"unknown method {row!r}; there are {', '.join(rows())}")
    config = rows()[row]
    form = METHODS[config.method].count
    return sum(times * form(config, rank, *shape) for shape, times in Counter(shapes).items())


def match(budget: int, row: str, shapes: Sequence[Shape]) -> Match:
    """The rank of `row` whose count comes nearest to `budget`; of equals the smallest."""
    unique = Counter(shapes)
    takes = METHODS[rows()[row].method].takes
    ranks: Sequence[int] = range(1, min(max(map(max, unique)), MAX_RANK) + 1)
    ranks = [rank for rank in ranks if all(takes(rank, into) for _, into in unique)] or ranks
    counts = {rank: count(row, rank, unique) for rank in ranks}
    rank = min(counts, key=lambda r: (abs(counts[r] - budget), r))
    return Match(rank, counts[rank], (counts[rank] - budget) / budget)


def shapes(
    model: str | Path | Networks, targets: Sequence[str] | None = None, text_targets: Sequence[str] | None = ()
) -> list[Shape]:
    """(out, in) of every adapted layer, network by network.

    Args:
        model: as `BudgetSettings.pretrained_model_name_or_path`, or networks by name.
        targets: as `AdapterConfig.targets`, and so `text_targets`.
    """
    from ..models.network import specs
    from .targets import chosen, resolved

    networks = specs(model) if isinstance(model, Mapping) else meta_networks(model)
    config = AdapterConfig(
        targets=None if targets is None else tuple(targets),
        text_targets=None if text_targets is None else tuple(text_targets),
    )
    adapted = chosen(networks, resolved(config, networks)).values()
    return [(layer.out_features, layer.in_features) for layers in adapted for layer in layers.values()]


def meta_networks(source: str | Path) -> dict[str, NetworkSpec]:
    """Networks without weights, on torch's meta device, from the config files of a diffusers pipeline."""
    import torch

    from ..models.network import bare

    built: dict[str, NetworkSpec] = {}
    for name, build in NETWORKS.items():
        config = _config(source, name)
        with torch.device("meta"):
            try:
                built[name] = bare(name, build(config))
            except (TypeError, ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{source}: {name}/config.json describes no {name} known here ({error})") from error
    return built


def _unet(config: dict[str, Any]) -> nn.Module:
    from diffusers import UNet2DConditionModel

    if config.get("_class_name") != UNet2DConditionModel.__name__:
        raise ValueError(f"a {config.get('_class_name')}, not a {UNet2DConditionModel.__name__}")
    return UNet2DConditionModel.from_config(config)


def _text_encoder(config: dict[str, Any]) -> nn.Module:
    from transformers import CLIPTextConfig, CLIPTextModel

    if config.get("model_type") != CLIPTextConfig.model_type:
        raise ValueError(f"a {config.get('model_type')}, not a {CLIPTextConfig.model_type}")
    return CLIPTextModel(CLIPTextConfig.from_dict(config))


NETWORKS: dict[str, Callable[[dict[str, Any]], nn.Module]] = {"unet": _unet, "text_encoder": _text_encoder}


def _config(source: str | Path, part: str) -> dict[str, Any]:
    """`part`/config.json of a pipeline: in a folder, in the package, or, for a name that is none, on the hub."""
    packaged = Path(__file__).parent.parent / "toyworld" / "weights" / "pipeline"
    folder = packaged if source == "toyworld" else Path(source).expanduser()
    file = folder / part / "config.json"
    if not folder.is_dir():
        file = _fetch(str(source), f"{part}/config.json")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{folder} has no {part}/config.json: it is not a Stable Diffusion pipeline folder") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): save the model again") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} is not a JSON object: save the model again")
    return content


def _fetch(hub_id: str, file: str) -> Path:
    from huggingface_hub import hf_hub_download

    if hub_id.count("/") != 1 or hub_id.startswith((".", "/", "~")):
        raise UserError(f"{hub_id}: no such folder, and not a hub id of the form owner/name")
    try:
        return Path(hf_hub_download(hub_id, file))
    except (OSError, ValueError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"{hub_id}: no such folder, and the hub did not give {file} ({reason})") from error


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
