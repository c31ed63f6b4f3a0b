"""A fine-tuning's state between epochs: the adapter's part as every training keeps it, the classifier's beside it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from singlora_diffusion import files
from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped
from singlora_diffusion.training import checkpoint, run_folder

from .finetuning import Trainer, adamw


def save(trainer: Trainer, folder: Path, about: Mapping[str, Any]) -> None:
    """Keep the state after the trainer's last step, in place of an earlier one; of a classifier alone, nothing.

    Args:
        about: what makes two runs the same.
    """
    if trainer.run.adapter is None:
        return
    tensors: dict[str, Tensor] = {}
    for name, p in trainer.head.items():
        tensors[name] = p.detach()
        tensors |= {f"{name}/{key}": value for key, value in trainer.optimizer.state[p].items()}
    with files.replacing(_classifier(folder, trainer.step)) as part:
        save_file({name: tensor.cpu().contiguous().clone() for name, tensor in tensors.items()}, part)
    scaler = trainer.accelerator.scaler
    checkpoint.save(
        folder,
        trainer.step,
        trainer.run.adapter,
        _of_adapter(trainer),
        about,
        scaler=None if scaler is None else scaler.state_dict(),
        limit=1,
    )
    for old in folder.glob("classifier-*.safetensors"):
        if old != _classifier(folder, trainer.step):
            old.unlink()


def restore(trainer: Trainer, folder: Path) -> Mapping[str, Any] | None:
    """Put the state of the last checkpoint in place; returns what was said about it, None where there is none.

    Raises:
        UserError: it is damaged.
    """
    if trainer.run.adapter is None or not run_folder.checkpoints(folder):
        return None
    found, _ = checkpoint.find(folder, "latest")
    of_adapter = _of_adapter(trainer)
    checkpoint.restore(found, trainer.run.adapter, of_adapter)
    trainer.optimizer.state.update(of_adapter.state)
    path = _classifier(folder, found.step)
    try:
        tensors = load_file(path)
        for name, p in trainer.head.items():
            p.data.copy_(tensors.pop(name))
        for name, value in tensors.items():
            name, _, key = name.rpartition("/")
            p = trainer.head[name]
            trainer.optimizer.state[p][key] = value if key == "step" else value.to(p.device)
    except (OSError, SafetensorError, KeyError, RuntimeError) as error:
        raise UserError(f"{escaped(path, 1000)}: damaged ({escaped(error, 200)}): begin anew elsewhere") from error
    if found.scaler and trainer.accelerator.scaler is not None:
        trainer.accelerator.scaler.load_state_dict(dict(found.scaler))
    trainer.step = found.step
    return found.recipe


def _classifier(folder: Path, step: int) -> Path:
    return folder / f"classifier-{step}.safetensors"


def _of_adapter(trainer: Trainer) -> torch.optim.Optimizer:
    """The optimizer as it would be without the classifier."""
    assert trainer.run.adapter is not None
    part = adamw(trainer.run.adapter.param_groups(trainer.run.cell.rate))
    for p in trainer.run.adapter.parameters():
        if p in trainer.optimizer.state:
            part.state[p] = trainer.optimizer.state[p]
    return part
