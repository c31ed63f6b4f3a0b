"""What is in an adapter file, layer by layer."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..models.network import Networks, network_of
from ..terminal import escaped
from . import file_kinds, importing, keys, lora_pairs, native, safetensors_io, signed_factors
from .lora_pairs import Pair
from .safetensors_io import Index

SHORT = 60
"""Characters up to which JSON in the metadata stays on one line."""
MOST_ENTRIES = 40


@dataclass(frozen=True)
class Row:
    """One adapted layer; None where the file, or the file without its base model, does not say."""

    name: str
    shape: tuple[int, ...] | None
    rank: int | None
    alpha: float | None
    dtype: str
    update: float | None
    """||dW||, Frobenius, u and scale included."""
    relative: float | None = None
    """||dW|| / ||W0||."""


@dataclass(frozen=True)
class Report:
    """What `inspect` found."""

    path: Path
    kind: str
    form: str
    note: str
    rows: list[Row]
    facts: dict[str, str] = field(default_factory=dict)
    """Header or metadata, as printed; values of several lines are indented below their names."""

    @property
    def warning(self) -> str:
        """A warning if a layer's ||dW|| is larger than its ||W0||, else empty.

        Usual adapters stay at a few hundredths to a third of that.
        """
        large = [row for row in self.rows if row.relative is not None and not row.relative <= 1.0]
        if not large:
            return ""
        return (
            f"{len(large)} of {len(self.rows)} layers change by more than the weight they have (‖dW‖ > ‖W0‖): the "
            f"training diverged, or the file is for another model or another strength; expect broken images"
        )


def inspect(path: str | Path, networks: Networks | None = None) -> Report:
    """Describe a file or run folder.

    Args:
        networks: of the base model, unadapted: adds names in our spelling, ||dW|| of every method, and ||dW|| / ||W0||.

    Raises:
        UserError: damaged, or not for these networks.
    """
    found = file_kinds.recognise(path)
    index = found.index
    if found.kind == file_kinds.NATIVE:
        rows, facts = _native(index, networks)
    else:
        rows = [] if found.kind == file_kinds.UNKNOWN else _foreign(found, networks)
        facts = {key: text for key, text in sorted(index.metadata.items()) if key != "format"}
    facts = {escaped(key): _shown(text) for key, text in facts.items() if text}
    return Report(index.path, found.kind, found.form, found.note, rows, facts)


def _shown(text: str) -> str:
    """A value of the metadata: one line, or a JSON object entry by entry."""
    try:
        table = safetensors_io.parse_json(text)
    except (ValueError, RecursionError):
        table = None
    if not isinstance(table, dict) or len(text) <= SHORT:
        return escaped(text, 300)
    lines = [escaped(f"{key}: {value}", 116) for key, value in list(table.items())[:MOST_ENTRIES]]
    return "\n".join([*lines, *(["..."] if len(table) > MOST_ENTRIES else [])])


def _native(index: Index, networks: Networks | None) -> tuple[list[Row], dict[str, str]]:
    header, state = native.read(index.path)
    config = header.config
    updates: dict[str, tuple[float, float | None]] = {}
    if networks is not None:
        adapter = native.attach(index.path, networks, header, state)
        try:
            bases = adapter.layers()
            for name, change in adapter.delta_weights():
                updates[name] = _norms(change, bases[name].weight)
        finally:
            adapter.detach()
    elif signed_factors.suffice(config):
        for name in header.layers:
            updates[name] = Pair(*signed_factors.of_layer(header, state, name).pair()).norm(), None
    rows = []
    for name, shape in header.layers.items():
        rank, alpha, _ = header.for_network(network_of(name))
        dtype = next(entry.dtype for key, entry in index.tensors.items() if key.rpartition(".")[0] == name)
        rows.append(Row(name, shape, rank, alpha, dtype, *updates.get(name, (None, None))))
    method = config.method + "".join(
        f", {word}"
        for word, on in (
            (f"init={config.init}", config.init != "kaiming"),
            (f"signature={config.signature}", config.signature != "positive"),
            ("dora", config.dora),
        )
        if on
    )
    facts = {
        "method": method,
        "numbers": f"{sum(tensor.numel() for tensor in state.values()):,}",
        "u": f"{header.u:g}",
        "steps": str(header.step),
        "trigger": header.trigger(),
        "instance prompt": header.instance_prompt,
        "base model": header.base_model,
        "base hash": header.base_hash,
        "resolution": str(header.resolution or ""),
        "sha256": header.sha256,
    }
    return rows, facts


def _foreign(found: file_kinds.Recognised, networks: Networks | None) -> list[Row]:
    index = found.index
    if networks is not None:
        return _fitted(found, networks)
    parts: dict[str, dict[str, str]] = {}
    for key in index.tensors:
        tagged = keys.tag(key)
        if tagged is not None and tagged.part not in ("step", "base"):
            parts.setdefault(tagged.layer, {})[tagged.part] = key
    rows = []
    for layer, part in parts.items():
        tensors = safetensors_io.read_tensors(index, part.values())
        alpha = (
            float(tensors[part["alpha"]].reshape(-1)[0]) if "alpha" in part and tensors[part["alpha"]].numel() else None
        )
        if {"up", "down"} <= set(part):
            up, down = tensors[part["up"]], tensors[part["down"]]
            if up.ndim < 2 or down.ndim < 2 or up.shape[1] != down.shape[0] or not up.numel() or not down.numel():
                raise UserError(
                    f"{index.path}: {escaped(layer)} is no LoRA pair: {tuple(up.shape)}, {tuple(down.shape)}"
                )
            rank, shape = len(down), (up.shape[0], *down.shape[1:])
            scale = 1.0 if alpha is None else alpha / rank
            norm = None if "magnitude" in part else abs(scale) * Pair(up, down).norm()
            dtype = index.tensors[part["up"]].dtype
            rows.append(Row(escaped(layer), shape, rank, alpha, dtype, norm))
        elif "one" in part:
            entry = index.tensors[part["one"]]
            rank_ = entry.shape[1] if len(entry.shape) == 2 else None
            rows.append(Row(escaped(layer), None, rank_, alpha, entry.dtype, None))
    return rows


def _fitted(found: file_kinds.Recognised, networks: Networks) -> list[Row]:
    index = found.index
    dtype = next(iter(index.tensors.values())).dtype
    if found.kind == file_kinds.SINGLORA:
        adapter, header = importing.import_(index.path, networks)
        try:
            bases = adapter.layers()
            changes = {name: (change, bases[name].weight) for name, change in adapter.delta_weights()}
        finally:
            adapter.detach()
        return [
            Row(
                name,
                tuple(change.shape),
                header.for_network(network_of(name))[0],
                None,
                dtype,
                *_norms(change, w),
            )
            for name, (change, w) in changes.items()
        ]
    modules = keys.modules(networks)
    rows = []
    for name, pair in lora_pairs.of_file(index, networks).items():
        weight: Any = modules[name].weight
        norms: tuple[float | None, float | None] = (None, None)
        if pair.magnitude is None:
            norms = _norms(pair.product(), weight.flatten(1))
        rows.append(Row(name, tuple(weight.shape), pair.rank, None, dtype, *norms))
    return rows


def _norms(change: Tensor, weight: Tensor) -> tuple[float, float]:
    update, base = float(torch.linalg.norm(change.double())), float(torch.linalg.norm(weight.detach().double()))
    return update, update / base if base else 0.0


KINDS = {
    file_kinds.NATIVE: "an adapter of singlora-diffusion",
    file_kinds.SINGLORA: "a SingLoRA of another program ({form}); `singlora import` makes it one of ours",
    file_kinds.TIED: "a LoRA ({form}) with tied pairs, which is a SingLoRA; `singlora import` makes it one of ours",
    file_kinds.LORA: "a LoRA ({form})",
    file_kinds.UNKNOWN: "not an adapter that this program reads",
}
HEADS = ("layer", "weight", "rank", "alpha", "stored", "‖dW‖", "‖dW‖/‖W0‖")
IN_A_BLOCK = re.compile(r"(.+(?:transformer_blocks|layers)[._]\d+)[._](.+)")


def show(report: Report) -> None:
    """Print a report: what it is, then a table of its layers under the names of the blocks they stand in."""
    print(f"{escaped(report.path, 1000)}: {KINDS[report.kind].format(form=report.form)}")
    if report.note:
        print(report.note)
    for key, value in report.facts.items():
        lines = value.splitlines()
        print("\n  ".join([f"{key}:", *lines]) if len(lines) > 1 else f"{key}: {value}")
    blocks: dict[str, list[tuple[str, ...]]] = {}
    for row in report.rows:
        split = IN_A_BLOCK.fullmatch(row.name)
        block, name = split.groups() if split else ("", row.name)
        blocks.setdefault(block, []).append((f"  {name}" if block else name, *_cells(row)))
    if not blocks:
        return
    by_column = zip(*(cells for block in blocks.values() for cells in block), strict=True)
    # A column in which nothing stands gets width 0: it is left out.
    widths = [max(map(len, (head, *cells))) if any(cells) else 0 for head, cells in zip(HEADS, by_column, strict=True)]
    print(f"\n{_line(HEADS, widths)}")
    for name, block in blocks.items():
        if name:
            print(name)
        for cells in block:
            print(_line(cells, widths))
    if report.warning:
        print(f"\nwarning: {report.warning}")


def _cells(row: Row) -> tuple[str, ...]:
    shape = "" if row.shape is None else "x".join(map(str, row.shape))
    numbers = [("" if value is None else f"{value:.4g}") for value in (row.update, row.relative)]
    alpha = "" if row.alpha is None else f"{row.alpha:g}"
    return shape, str(row.rank or ""), alpha, row.dtype, *numbers


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    # Not rich's table: that folds names where a terminal is narrow, or is none.
    first, *others = zip(cells, widths, strict=True)
    return "  ".join([first[0].ljust(first[1]), *(cell.rjust(width) for cell, width in others if width)]).rstrip()
