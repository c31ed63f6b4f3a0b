"""What a safetensors file is, as far as adapters go."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..errors import UserError
from ..terminal import escaped
from . import keys, native, safetensors_io, signed_factors
from .header import KEY
from .safetensors_io import Index

NATIVE, SINGLORA, TIED, LORA, UNKNOWN = "native", "singlora", "tied lora", "lora", "unknown"


@dataclass(frozen=True)
class Recognised:
    """A file's kind, and whose names its tensors have.

    kind: `native` ours; `singlora` one matrix per layer by another program; `tied lora` a LoRA whose pairs are
    SingLoRAs; `lora`; `unknown`. note: why unknown, else empty.
    """

    kind: str
    form: str
    index: Index
    note: str = ""


def recognise(path: str | Path) -> Recognised:
    """What a file or run folder is.

    Raises:
        UserError: not a sound safetensors file; NaN or infinity in the tensors of a LoRA.
    """
    index = safetensors_io.read_index(native.find(path))
    if KEY in index.metadata:
        return Recognised(NATIVE, "singlora-diffusion", index)
    tags = {key: keys.tag(key) for key in index.tensors}
    parts = {tagged.part for tagged in tags.values() if tagged is not None}
    foreign = [key for key, tagged in tags.items() if tagged is None]
    if "one" in parts and parts <= {"one", "step", "base", "alpha"} and (not foreign or "base" in parts):
        form = "PEFT-SingLoRA" if any(".lora_A" in key for key in index.tensors) else "SingLoRA (bare A)"
        return Recognised(SINGLORA, form, index)
    if {"up", "down"} <= parts <= {"up", "down", "alpha", "magnitude"} and not foreign:
        kind = TIED if "magnitude" not in parts and _tied(index) else LORA
        return Recognised(kind, _form(index), index)
    return Recognised(UNKNOWN, "", index, _reason(index, foreign))


def _form(index: Index) -> str:
    if any(key.startswith("lora_") for key in index.tensors):
        return "kohya"
    return "PEFT" if any(".lora_A." in key for key in index.tensors) else "diffusers"


def _tied(index: Index) -> bool:
    """Whether every pair of the file is a SingLoRA's, or made of several, block by block, for a fused layer."""
    parts: dict[str, dict[str, str]] = {}
    for key in index.tensors:
        tagged = keys.tag(key)
        if tagged is not None:
            parts.setdefault(tagged.layer, {})[tagged.part] = key
    for part in parts.values():
        if not {"up", "down"} <= set(part):
            return False
        up, down = index.tensors[part["up"]].shape, index.tensors[part["down"]].shape
        if len(up) != 2 or len(down) != 2 or up[1] != down[0] or 0 in (*up, *down):
            return False
    for part in parts.values():
        tensors = safetensors_io.read_tensors(index, [part["up"], part["down"]])
        for up_, down_ in _blocks(tensors[part["up"]], tensors[part["down"]]):
            if signed_factors.of_tied_pair(up_, down_, signed_factors.tolerance(index)) is None:
                return False
    return True


def _blocks(up: Tensor, down: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """The columns of a pair by the block of rows that they begin in; each is as high as the layer has inputs."""
    height = down.shape[1]
    starts = (up != 0).int().argmax(dim=0) // height * height
    for start in starts.unique().tolist():
        yield up[start:, starts == start], down[starts == start]


def _reason(index: Index, foreign: list[str]) -> str:
    names = list(index.tensors)
    if not names:
        return "it holds no tensors"
    if any(".hada_" in key or ".lokr_" in key or ".oft_" in key for key in names):
        return "it is a LyCORIS adapter (LoHa, LoKr, OFT), which has no LoRA form"
    if any(
        key.startswith(("model.diffusion_model.", "first_stage_model.", "down_blocks.", "conv_in.")) for key in names
    ):
        return "it is a model, or a part of one, not an adapter"
    return f"its tensor {escaped(foreign[0] if foreign else names[0])} is not one of an adapter"


def refuse(found: Recognised) -> UserError:
    """The error for a file that is not an adapter."""
    return UserError(f"{found.index.path}: is not an adapter this program reads: {found.note}")
