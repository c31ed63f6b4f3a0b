"""What a training tells of itself while it runs. Listeners are functions of an event; the loop prints nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from ..data.folders import FolderReport


@dataclass(frozen=True)
class Remark:
    """Something that the user should know, in one line."""

    text: str


@dataclass(frozen=True)
class Images:
    """A folder was read: instance images or class images, with what was left out and why."""

    report: FolderReport


@dataclass(frozen=True)
class Loaded:
    """The base model is there, with the adapter attached."""

    base_model: str
    prompts: str | None
    """The bundled prompt set that the model names for itself."""
    class_noun: str
    """What the subject is."""
    method: str
    rank: int
    layers: int
    parameters: int
    resolution: int
    dtype: str
    """What the base model computes in: float32, bfloat16 or float16."""


@dataclass(frozen=True)
class Progress:
    """A part of the work before the first step: encoding images, generating class images."""

    what: str
    done: int
    total: int


@dataclass(frozen=True)
class Encoded:
    """Images are latents now."""

    what: str
    """`instance images` or `class images`."""
    count: int


@dataclass(frozen=True)
class PutAway:
    """Files of an earlier run were moved out of the way."""

    folder: Path


@dataclass(frozen=True)
class Resumed:
    """The state of a checkpoint was restored."""

    path: Path
    step: int


@dataclass(frozen=True)
class Started:
    """The first step is next."""

    step: int
    """Steps that are done already."""
    total: int


@dataclass(frozen=True)
class Step:
    """One step of the optimizer."""

    step: int
    """From 1 on."""
    loss: float
    lr: float
    """Of the first group of parameters, with what the optimizer finds by itself."""
    u: float
    """The ramp's value."""
    grad_norm: float
    """Before clipping; infinite in a step that fp16's loss scaling skipped."""
    seconds: float
    """Since this process began its first step."""
    validation_loss: float | None = None
    """On held-out images, of the weights after the step; None: it was not asked for, or not after this step."""
    dino: float | None = None
    """Likeness of the previews after the step to held-out images, or else to those trained on: a mean cosine of DINO's
    vectors. None: as above."""
    clip_t: float | None = None
    """Agreement of the previews with their prompt, identifier left out: a mean cosine of CLIP's vectors."""
    drift: float | None = None
    """Distance of the previews from the base model's of the same prompt and seeds: 1 - mean cosine of DINO's
    vectors."""


VALIDATED = {"validation_loss": "held-out loss", "dino": "DINO", "clip_t": "CLIP-T", "drift": "drift"}
"""The figures of a `Step` that a validation adds, and what people call them."""


def in_words(figures: Mapping[str, float]) -> str:
    """A validation's figures for people."""
    return ", ".join(f"{VALIDATED[name]} {value:.4g}" for name, value in figures.items())


@dataclass(frozen=True)
class Best:
    """A validation was better than all before; the adapter was saved beside the last one."""

    path: Path
    step: int
    figures: Mapping[str, float]
    """Of that validation, by the names in `VALIDATED`."""
    rule: str
    """What is best, in words."""


@dataclass(frozen=True)
class Preview:
    """An image of what has been learned."""

    path: Path
    step: int


@dataclass(frozen=True)
class Checkpoint:
    """The state was saved."""

    path: Path
    step: int


@dataclass(frozen=True)
class Interrupted:
    """The run was asked to stop, and did after a whole step."""

    step: int
    path: Path | None
    """The checkpoint to go on from; None: another process wrote it."""


@dataclass(frozen=True)
class Exported:
    """The adapter was written once more, as an ordinary LoRA."""

    path: Path
    readers: str
    """The programs that take it."""


@dataclass(frozen=True)
class Uploaded:
    """The run folder is on the hub."""

    url: str


@dataclass(frozen=True)
class Saved:
    """The adapter was written, read back and compared with the live model. The last event."""

    path: Path
    size: int
    """Bytes."""


Event = (
    Remark
    | Images
    | Loaded
    | Progress
    | Encoded
    | PutAway
    | Resumed
    | Started
    | Step
    | Best
    | Preview
    | Checkpoint
    | Interrupted
    | Exported
    | Uploaded
    | Saved
)


class Listener(Protocol):
    """Who is told what happens."""

    def __call__(self, event: Event) -> None: ...

    def close(self) -> None:
        """Called once, however the run ended."""
        ...
