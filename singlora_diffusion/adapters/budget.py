"""Trained parameters of a method at a rank, and the rank that meets a budget; from a model's config files alone.

How much a method trains depends only on the (out, in) shapes of the layers it adapts, so every row of `PER_LAYER` is a
closed form in them. The tests hold each row to what an attached adapter really trains.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..errors import UserError

if TYPE_CHECKING:
    from torch import nn

TOLERANCE = 0.02
"""A rank that misses the budget by more is flagged."""

Shape = tuple[int, int]  # (out_features, in_features)


@dataclass(frozen=True)
class BudgetSettings:
    """For each method the rank that trains as many parameters as a reference, from config files, without weights."""

    pretrained_model_name_or_path: str = "toyworld"
    """A local diffusers folder (its config files suffice), `toyworld`, or a Hugging Face hub id."""
    match: str = "lora:8"
    """The budget: METHOD:RANK, or a plain number of parameters."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Attention projections of the UNet that are adapted."""
    text_targets: tuple[str, ...] = ()
    """Projections of the text encoder, adapted at the same rank: q_proj k_proj v_proj out_proj. Empty: none."""


class Match(NamedTuple):
    """The rank of a method that comes nearest to a budget."""

    rank: int
    parameters: int  # trained at that rank
    deviation: float  # (parameters - budget) / budget


def _one_matrix(rank: int, out: int, into: int) -> int:
    return rank * max(out, into)


def _two_matrices(rank: int, out: int, into: int) -> int:
    return rank * (out + into)


def _with_magnitude(form: Callable[[int, int, int], int]) -> Callable[[int, int, int], int]:
    return lambda rank, out, into: form(rank, out, into) + out


def _rotation(rank: int, out: int, into: int) -> int:
    """PEFT's OFT: in / b skew-symmetric blocks, b the divisor of `in` nearest to `rank`, the smaller one of two."""
    block = min(_divisors(into), key=lambda b: (abs(b - rank), b))
    return into // block * (block * (block - 1) // 2)


@cache
def _divisors(size: int) -> tuple[int, ...]:
    return tuple(d for d in range(1, size + 1) if size % d == 0)


def _kronecker(rank: int, out: int, into: int) -> int:
    """PEFT's LoKr: W1 in full, W2 as a pair of rank `rank` or, once that is half its larger side, in full too."""
    (out1, out2), (in1, in2) = _split(out), _split(into)
    return out1 * in1 + (rank * (out2 + in2) if 2 * rank < max(out2, in2) else out2 * in2)


def _split(size: int) -> Shape:
    from .peft_baselines import LOKR_FACTOR

    if size % LOKR_FACTOR == 0:
        return LOKR_FACTOR, size // LOKR_FACTOR
    first = max(d for d in _divisors(size) if d < LOKR_FACTOR and d * d <= size)
    return first, size // first


PER_LAYER: dict[str, Callable[[int, int, int], int]] = {  # (rank, out, in) -> trained parameters of one layer
    "singlora": _one_matrix,
    "offset": _one_matrix,  # singlora with init=offset: A0 is stored, not trained
    "balanced": _one_matrix,  # singlora with signature=balanced
    "singlora+dora": _with_magnitude(_one_matrix),
    "lora": _two_matrices,
    "lora+": _two_matrices,
    "dora": _with_magnitude(_two_matrices),
    "oft": _rotation,
    "lokr": _kronecker,
}


RANKS: dict[str, Callable[[int, Iterable[Shape]], bool]] = {  # ranks a method takes as they are; others: all
    "oft": lambda rank, shapes: rank > 1 and all(into % rank == 0 for _, into in shapes),
}


def count(method: str, rank: int, shapes: Iterable[Shape]) -> int:
    """Trained numbers of `method`, a row of `PER_LAYER`, at `rank` on layers of these shapes, or a Counter of them."""
    if method not in PER_LAYER:
        raise UserError(f"unknown method {method!r}; there are {', '.join(PER_LAYER)}")
    return sum(times * PER_LAYER[method](rank, *shape) for shape, times in Counter(shapes).items())


def match(budget: int, method: str, shapes: Sequence[Shape]) -> Match:
    """The rank of `method` whose count comes nearest to `budget`; of equals the smallest."""
    unique = Counter(shapes)
    ranks: Sequence[int] = range(1, max(map(max, unique)) + 1)
    if method in RANKS:
        ranks = [rank for rank in ranks if RANKS[method](rank, unique)] or ranks
    counts = {rank: count(method, rank, unique) for rank in ranks}
    rank = min(counts, key=lambda r: (abs(counts[r] - budget), r))
    return Match(rank, counts[rank], (counts[rank] - budget) / budget)


def shapes(
    model: str | Path | Mapping[str, nn.Module], targets: Sequence[str], text_targets: Sequence[str] = ()
) -> list[Shape]:
    """(out, in) of every adapted layer, UNet first.

    Args:
        model: as `BudgetSettings.pretrained_model_name_or_path`, or networks by name: `unet`, `text_encoder`.
    """
    from .inject import projections

    wanted = {name: names for name, names in (("unet", targets), ("text_encoder", text_targets)) if names}
    if not wanted:
        raise UserError("no targets: nothing would be trained")
    networks = model if isinstance(model, Mapping) else meta_networks(model, wanted)
    return [
        (layer.out_features, layer.in_features)
        for name, names in wanted.items()
        for layer in projections(networks[name], names).values()
    ]


def meta_networks(source: str | Path, names: Iterable[str]) -> dict[str, nn.Module]:
    """Networks without weights, on torch's meta device, from the config files of a diffusers pipeline."""
    import torch

    built: dict[str, nn.Module] = {}
    for name in names:
        config = _config(source, name)
        with torch.device("meta"):
            try:
                built[name] = NETWORKS[name](config)
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
    method, _, rank = wanted.rpartition(":")
    if not rank.isdecimal() or int(rank) == 0:
        raise UserError(f"--match {wanted}: give METHOD:RANK, such as lora:8, or a number of parameters")
    budget = count(method, int(rank), layers) if method else int(rank)
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
    return Comparison(goal, len(layers), {method: match(goal, method, layers) for method in PER_LAYER})


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
