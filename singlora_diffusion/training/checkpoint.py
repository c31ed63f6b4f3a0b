"""Resumable training state: `checkpoint-N/` with the adapter, the optimizer's state and the step. No pickle.

The loop draws all its randomness from (seed, position), so these are the whole state: a run resumed from a checkpoint
ends with the same bits as one that was never interrupted. `state.json` holds the digests of the other two files.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from .. import files, formats
from ..adapters import Adapter
from ..errors import UserError
from ..terminal import escaped
from . import averaging, optimizer_state, run_folder
from . import identity as identities
from .averaging import Average

if TYPE_CHECKING:
    from ..adapters.config import AdapterConfig

ADAPTER, OPTIMIZER, STATE = "adapter.safetensors", "optimizer.safetensors", "state.json"
VERSION = 2
LIVE = "live"
"""In the optimizer's file, the weights that are trained, where the adapter's file holds their average."""


@dataclass(frozen=True)
class State:
    """A checkpoint, read and found sound."""

    path: Path
    step: int
    recipe: Mapping[str, Any]
    config: AdapterConfig
    tensors: Mapping[str, Tensor]
    """The adapter's."""
    moments: Mapping[str, Tensor]
    identity: Mapping[str, Any] | None = None
    """None: written before there were identities."""
    scaler: Mapping[str, float] = field(default_factory=dict)
    """fp16's loss scaling; empty without."""
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """What the optimizer keeps beside tensors (`optimizer_state.of`)."""


def save(
    run: Path,
    step: int,
    adapter: Adapter,
    optimizer: torch.optim.Optimizer,
    recipe: Mapping[str, Any],
    *,
    about: Mapping[str, Any] | None = None,
    identity: Mapping[str, Any] | None = None,
    scaler: Mapping[str, float] | None = None,
    average: Average | None = None,
    limit: int | None = None,
) -> Path:
    """Write `run/checkpoint-{step}`, complete or not at all, then drop the oldest beyond `limit`.

    Args:
        about: for the adapter's header, so that a checkpoint can be used like a finished adapter.

    Raises:
        UserError: it cannot be written; earlier checkpoints are as they were.
    """
    final, part = run / f"checkpoint-{step}", run / f".checkpoint-{step}.part"
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        tensors, numbers = optimizer_state.of(adapter, optimizer)
        if average is not None:
            tensors |= {f"{name}/{LIVE}": value.cpu() for name, value in averaging.live(adapter).items()}
        with averaging.in_use(adapter, average):
            formats.save(adapter, part / ADAPTER, about={**(about or {}), "step": step})
        with files.replacing(part / OPTIMIZER) as path:
            save_file(tensors, path)
        written = {name: files.sha256(part / name) for name in (ADAPTER, OPTIMIZER)}
        state = {"version": VERSION, "step": step, "recipe": dict(recipe), "files": written, "optimizer": numbers}
        files.write_json(part / STATE, {**state, "identity": identity, "scaler": dict(scaler or {})})
        _put_in_place(part, final)
    except UserError as error:  # the user knows the name that the file would have had
        raise UserError(str(error).replace(str(part), str(final))) from error
    except (OSError, SafetensorError) as error:
        why = files.reason(error) if isinstance(error, OSError) else error
        raise UserError(f"{final}: cannot be written: {why}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    for old in run_folder.checkpoints(run)[: -limit if limit else 0]:
        shutil.rmtree(old)
    return final


def find(run: Path, wanted: str) -> tuple[State, list[str]]:
    """The checkpoint that `latest` or a path means, and remarks on damaged ones that `latest` passed over.

    Raises:
        UserError: there is none, or none that is sound; a run is never silently begun anew.
    """
    if wanted != "latest":
        folder = Path(os.path.expanduser(wanted))
        if not (folder / STATE).is_file():
            raise UserError(
                f"{escaped(wanted, 1000)} is no checkpoint: it has no {STATE}; give a checkpoint-N folder or `latest`"
            )
        return read(folder), []
    found = run_folder.checkpoints(run)
    if not found:
        raise UserError(
            f"{escaped(run, 1000)} holds no checkpoint to resume from: leave out --resume_from_checkpoint to begin anew"
        )
    remarks: list[str] = []
    for path in reversed(found):
        try:
            return read(path), remarks
        except UserError as error:
            remarks.append(str(error))
    raise UserError(f"{escaped(run, 1000)} holds no sound checkpoint: {'; '.join(remarks)}")


def read(path: Path) -> State:
    """Read a checkpoint folder and hold its files to each other.

    Raises:
        UserError: it is damaged, edited, or put together from several.
    """
    try:
        return _read(path)
    except (UserError, OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        why = str(error).replace(f"{path}/", "").replace(f"{path}: ", "")
        raise UserError(
            f"{escaped(path, 1000)} is damaged ({escaped(why, 300)}): resume from an earlier checkpoint"
        ) from error


def _read(path: Path) -> State:
    raw = files.read_json(path / STATE)
    step, recipe = raw["step"], raw["recipe"]
    if type(step) is not int or step < 0:
        raise ValueError(f"{STATE} has an impossible step")
    identity, scaler, digests = raw.get("identity"), raw.get("scaler") or {}, raw.get("files") or {}
    numbers = raw.get("optimizer") or {}
    if not all(isinstance(part, dict) for part in (recipe, scaler, digests, numbers)):
        raise ValueError(f"{STATE} has an impossible recipe, scaler, optimizer or list of files")
    if identity is not None and not identities.is_one(identity):
        raise ValueError(f"{STATE} has an impossible identity")
    for name, digest in digests.items():
        if name not in (ADAPTER, OPTIMIZER) or files.sha256(path / name) != digest:
            raise ValueError(f"{name} is not the file that {STATE} was written with")
    header, tensors = formats.native.read(path / ADAPTER)
    if header.step != step:
        raise ValueError(f"{STATE} says step {step}, {ADAPTER} was saved at step {header.step}")
    moments = load_file(path / OPTIMIZER)
    if step and not moments:
        raise ValueError(f"{OPTIMIZER} is empty")
    return State(path, step, recipe, header.config, tensors, moments, identity, scaler, numbers)


def restore(state: State, adapter: Adapter, optimizer: torch.optim.Optimizer, average: Average | None = None) -> None:
    """Put a checkpoint's state into a freshly attached adapter and its fresh optimizer.

    Raises:
        UserError: it was made with another adapter.
    """
    config = replace(state.config, ramp_steps=state.config.ramp_steps or 0)  # as `adapters.attach` understands it
    for key, before in vars(config).items():
        if before != (now := getattr(adapter.config, key)):
            raise UserError(
                f"{escaped(state.path, 1000)} was made with --{key} {escaped(before)}, now it is {escaped(now)}: "
                f"resume with the same"
            )
    live = {key.removesuffix(f"/{LIVE}"): value for key, value in state.moments.items() if key.endswith(f"/{LIVE}")}
    moments = {key: value for key, value in state.moments.items() if not key.endswith(f"/{LIVE}")}
    try:
        optimizer_state.restore(adapter, optimizer, moments, state.numbers)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{escaped(state.path, 1000)} is damaged: {escaped(error, 300)}") from error
    adapter.load_state_dict(state.tensors)
    if average is not None:
        average.restore(state.tensors)
        adapter.load_state_dict(live)
    adapter.set_step(state.step)  # there may be no step left that would


def _put_in_place(part: Path, final: Path) -> None:
    """Rename, with a checkpoint of that step out of the way first."""
    old = final.with_name(f".{final.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    os.replace(part, final)
    shutil.rmtree(old, ignore_errors=True)
