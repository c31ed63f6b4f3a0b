"""What a safetensors file is, as far as adapters go."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import UserError
from . import columns, container, names, native
from .container import Index, shown

NATIVE, SINGLORA, DISGUISED, LORA, UNKNOWN = "native", "singlora", "disguised singlora", "lora", "unknown"


@dataclass(frozen=True)
class Recognised:
    """A file's kind, and the program family whose spelling it uses.

    kind: `native` ours; `singlora` one matrix per layer by another program; `disguised singlora` a LoRA whose pairs are
    SingLoRAs; `lora`; `unknown`. note: why unknown, else empty.
    """

    kind: str
    form: str
    index: Index
    note: str = ""


def recognise(path: str | Path) -> Recognised:
    """Say what a file or run folder is.

    Raises:
        UserError: not a sound safetensors file; NaN or infinity in the tensors of a LoRA.
    """
    index = container.read_index(native.find(path))
    if native.KEY in index.metadata:
        return Recognised(NATIVE, "singlora-diffusion", index)
    tags = {key: names.tag(key) for key in index.tensors}
    roles = {tagged.role for tagged in tags.values() if tagged is not None}
    foreign = [key for key, tagged in tags.items() if tagged is None]
    if "one" in roles and roles <= {"one", "step", "base", "alpha"} and (not foreign or "base" in roles):
        form = "PEFT-SingLoRA" if any(".lora_A" in key for key in index.tensors) else "SingLoRA (bare A)"
        return Recognised(SINGLORA, form, index)
    if {"up", "down"} <= roles <= {"up", "down", "alpha", "magnitude"} and not foreign:
        kind = DISGUISED if "magnitude" not in roles and _disguised(index) else LORA
        return Recognised(kind, _form(index), index)
    return Recognised(UNKNOWN, "", index, _reason(index, foreign))


def _form(index: Index) -> str:
    if any(key.startswith("lora_") for key in index.tensors):
        return "kohya"
    return "PEFT" if any(".lora_A." in key for key in index.tensors) else "diffusers"


def _disguised(index: Index) -> bool:
    """Whether every pair of the file agrees with itself, up to a factor per column, on its first min(out, in) rows."""
    parts: dict[str, dict[str, str]] = {}
    for key in index.tensors:
        tagged = names.tag(key)
        if tagged is not None:
            parts.setdefault(tagged.layer, {})[tagged.role] = key
    for part in parts.values():
        if not {"up", "down"} <= set(part):
            return False
        up, down = index.tensors[part["up"]].shape, index.tensors[part["down"]].shape
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or 0 in (*up, *down):
            return False
    for part in parts.values():
        tensors = container.read_tensors(index, [part["up"], part["down"]])
        if columns.of_pair(tensors[part["up"]], tensors[part["down"]], columns.coarsest(index)) is None:
            return False
    return True


def _reason(index: Index, foreign: list[str]) -> str:
    keys = list(index.tensors)
    if not keys:
        return "it holds no tensors"
    if any(".hada_" in key or ".lokr_" in key or ".oft_" in key for key in keys):
        return "it is a LyCORIS adapter (LoHa, LoKr, OFT), which has no LoRA form"
    if any(
        key.startswith(("model.diffusion_model.", "first_stage_model.", "down_blocks.", "conv_in.")) for key in keys
    ):
        return "it is a model, or a part of one, not an adapter"
    return f"its tensor {shown(foreign[0] if foreign else keys[0])} is not one of an adapter"


def refuse(found: Recognised) -> UserError:
    """The error for a file of no use here."""
    return UserError(f"{found.index.path}: is not an adapter this program reads: {found.note}")
