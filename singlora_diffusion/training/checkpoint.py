"""Resumable training state: `checkpoint-N/` with the adapter, the optimizer's moments and the step. Atomic, no pickle.

The loop draws all its randomness from (seed, position), so these three are the whole state: a run resumed from a
checkpoint ends with the same bits as one that was never interrupted.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .. import formats
from ..adapters.registry import Adapter
from ..errors import UserError

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
FREE = {"output_dir", "max_train_steps", "resume_from_checkpoint", "overwrite", "device", "report_to"} | {
    "validation_prompt",
    "num_validation_images",
    "validation_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "sample_batch_size",
}
"""Settings that may differ between a run and its continuation."""


def save(
    run: Path,
    step: int,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    recipe: Mapping[str, Any],
    *,
    limit: int | None,
) -> Path:
    """Write `run/checkpoint-{step}`, complete or not at all, then drop the oldest beyond `limit`."""
    final, part = run / f"checkpoint-{step}", run / f".checkpoint-{step}.part"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    formats.save(adapter, part / ADAPTER, about={"step": step})
    names = _names(adapter)
    moments = {
        f"{names[p.data_ptr()]}/{key}": torch.as_tensor(value).detach().cpu().contiguous()
        for p, state in optimizer.state.items()
        for key, value in state.items()
    }
    save_file(moments, part / OPTIMIZER)
    (part / STATE).write_text(json.dumps({"step": step, "recipe": dict(recipe)}, indent=2))
    if final.exists():
        shutil.rmtree(final)
    os.replace(part, final)
    for old in existing(run)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return final


def existing(run: Path) -> list[Path]:
    """Complete checkpoints of a run, oldest first."""
    found = [
        (int(m[1]), path) for path in run.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))
    ]
    return [path for _, path in sorted(found) if (path / STATE).is_file()]


def find(run: Path, wanted: str) -> Path:
    """The checkpoint folder that `latest` or a path means.

    Raises:
        UserError: there is none; a run is never silently begun anew.
    """
    if wanted == "latest":
        if not existing(run):
            raise UserError(
                f"{run} holds no checkpoint to resume from: leave out --resume_from_checkpoint to begin anew"
            )
        return existing(run)[-1]
    path = Path(wanted)
    if not (path / STATE).is_file():
        raise UserError(f"{path} is no checkpoint: it has no {STATE}; give a checkpoint-N folder or `latest`")
    return path


def restore(path: Path, adapter: Adapter, optimizer: torch.optim.Optimizer, recipe: Mapping[str, Any]) -> int:
    """Load a checkpoint into a freshly attached adapter and its fresh optimizer; returns the step to go on from.

    Raises:
        UserError: damaged, or made with settings that make an exact continuation impossible.
    """
    try:
        saved = json.loads((path / STATE).read_text())
        step, before = int(saved["step"]), dict(saved["recipe"])
        moments = load_file(path / OPTIMIZER)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise UserError(f"{path} is damaged ({error}): resume from an earlier checkpoint") from error
    now = json.loads(json.dumps(dict(recipe)))
    for key in sorted(set(before) - FREE):
        if before[key] != now.get(key):
            raise UserError(
                f"{path} was made with --{key} {before[key]}, now it is {now.get(key)}: resume with the same"
            )
    _, state = formats.native.read(path / ADAPTER)
    adapter.load_state_dict(state)
    names = _names(adapter)
    for group in optimizer.param_groups:
        for p in group["params"]:
            prefix = f"{names[p.data_ptr()]}/"
            own = {key.removeprefix(prefix): value for key, value in moments.items() if key.startswith(prefix)}
            # AdamW keeps its step count on the CPU; the moments live beside the parameter.
            optimizer.state[p] = {key: value if value.ndim == 0 else value.to(p.device) for key, value in own.items()}
    return step


def _names(adapter: Adapter) -> dict[int, str]:
    """Each parameter's name in files by its address: found by identity, never by order."""
    return {tensor.data_ptr(): name for name, tensor in adapter.state_dict().items()}
