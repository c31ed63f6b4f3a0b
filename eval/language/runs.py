"""Fine-tunings in folders: log, checkpoints, adapter, result. What is done already is not done again."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from accelerate import PartialState

from singlora_diffusion import __version__, files, formats
from singlora_diffusion import settings as flags
from singlora_diffusion.errors import UserError
from singlora_diffusion.models.quiet import quiet
from singlora_diffusion.terminal import escaped
from singlora_diffusion.training import log_file

from . import finetuning, resuming
from .finetuning import Run, Trainer
from .settings import Cell, LanguageSettings, protocol
from .tasks import Task

ADAPTER, CLASSIFIER, PEFT, RESULT = "adapter.safetensors", "classifier.safetensors", "peft", "result.json"
ELSEWHERE = ("models", "methods", "rates", "seeds", "keep_adapters", "output_dir")
"""Settings that say which runs there are, and what is kept of them."""

Show = Callable[[Mapping[str, Any]], None]


def cells(settings: LanguageSettings) -> list[Cell]:
    """Seed by seed and model by model, all rates of all methods, so that any beginning is fair.

    Raises:
        UserError: a model that cannot be loaded, or two models under one name.
    """
    names = [label(model) for model in settings.models]
    if len(set(names)) < len(names):
        raise UserError(f"--models: two are called {max(names, key=names.count)}: rename a folder")
    usual = {} if settings.rates else {model: protocol(_kind(model)).rates for model in settings.models}
    return [
        Cell(model, method, rate, seed)
        for seed in range(settings.seeds)
        for model in settings.models
        for place in range(len(settings.rates) or 1)
        for method in settings.methods
        for rate in [settings.rates[place] if settings.rates else usual[model][method]]
    ]


def label(model: str) -> str:
    """A model's name in tables, and that of its folder."""
    return Path(model).name


def _kind(model: str) -> str:
    from transformers import AutoConfig

    try:
        found: str = AutoConfig.from_pretrained(model).model_type
    except (OSError, ValueError, KeyError) as error:
        raise finetuning.unloadable(model, error) from error
    return found


def folder(settings: LanguageSettings, cell: Cell) -> Path:
    return settings.output_dir / settings.task / label(cell.model) / cell.name


def result(settings: LanguageSettings, cell: Cell) -> dict[str, Any] | None:
    """What a run came to; None: it is not done.

    Raises:
        UserError: it was run with other settings.
    """
    path = folder(settings, cell) / RESULT
    if not path.exists():
        return None
    found = files.read_json(path)
    _check_same(found.get("settings", {}), settings, cell)
    return found


def run(settings: LanguageSettings, cell: Cell, task: Task, show: Show = lambda row: None) -> dict[str, Any]:
    """Bring a run to its end; returns what its result.json holds.

    Args:
        show: is given the row of each epoch.

    Raises:
        UserError: a model that cannot be loaded, or a folder of other settings.
    """
    if (found := result(settings, cell)) is not None:
        return found
    out, main = folder(settings, cell), PartialState().is_main_process
    with files.locked(out, "a training") if main else nullcontext(), quiet():
        made, began = finetuning.prepared(settings, cell, task), time.process_time()
        rows = _trained(made, out, show)
        best = max(row["accuracy"] for row in rows)
        found = {
            "settings": told(settings, cell),
            "accuracy": rows[-1]["accuracy"],
            "best_accuracy": best,
            "diverged": rows[-1]["loss"] is None,
            "parameters": finetuning.parameters(made),
            "processor_seconds": round(time.process_time() - began, 2),
            "version": __version__,
        }
        if main:
            if settings.keep_adapters and not found["diverged"]:
                _keep(made, out)
            files.write_json(out / RESULT, found)
        return found


def _trained(made: Run, out: Path, show: Show) -> list[dict[str, Any]]:
    """Train what is left, with a line in log.jsonl for each epoch; the rows of all epochs, earlier ones included."""
    trainer, about = Trainer(made), told(made.settings, made.cell)
    kept, main = made.settings.keep_adapters, trainer.accelerator.is_main_process
    if kept and (before := resuming.restore(trainer, out)) is not None:
        _check_same(before, made.settings, made.cell)
    rows = log_file.cut(out / log_file.NAME, trainer.step) if main else []
    seconds = rows[-1].get("seconds", 0.0) if rows else 0.0
    for row in trainer.epochs():
        rows.append({**row, "seconds": round(seconds + row["seconds"], 3)})
        if main:
            if kept:
                resuming.save(trainer, out, about)
            with (out / log_file.NAME).open("a", encoding="utf-8") as file:
                file.write(json.dumps(rows[-1]) + "\n")
            show(rows[-1])
        trainer.accelerator.wait_for_everyone()
    return rows


def _keep(made: Run, out: Path) -> None:
    """The adapter in our file and as PEFT's folder with the classifier; without an adapter, the classifier alone."""
    from safetensors.torch import save_file

    if made.adapter is not None:
        formats.save(made.adapter, out / ADAPTER, about={"base_model": made.cell.model})
        formats.export_peft(made.adapter, out / PEFT, heads=[made.head], base_model=made.cell.model, overwrite=True)
    state = made.network.get_submodule(made.head).state_dict(prefix=f"{made.head}.")
    with files.replacing(out / CLASSIFIER) as part:
        save_file({key: tensor.cpu().contiguous() for key, tensor in state.items()}, part)


def told(settings: LanguageSettings, cell: Cell) -> dict[str, Any]:
    """What makes two runs the same."""
    shared = {key: value for key, value in flags.as_json(settings).items() if key not in ELSEWHERE}
    return {**shared, **cell._asdict(), "model": label(cell.model)}


def _check_same(before: Mapping[str, Any], settings: LanguageSettings, cell: Cell) -> None:
    for key, value in told(settings, cell).items():
        if before.get(key) != value:
            raise UserError(
                f"{escaped(folder(settings, cell), 1000)}: was made with {key} {escaped(before.get(key))}, now it is "
                f"{escaped(value)}: choose another --output_dir"
            )
