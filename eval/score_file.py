"""A scores.json, read and checked."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from singlora_diffusion.errors import UserError
from singlora_diffusion.files import read_json
from singlora_diffusion.sampling.manifest import check_line
from singlora_diffusion.terminal import escaped

from .metrics import METRICS

ReferenceMode = Literal["train", "heldout", "all"]

REFERENCES = {"heldout": "held-out images", "all": "all real images", "train": "training images"}
"""Label of each kind of references, the most telling one first."""


class ScoreKey(NamedTuple):
    """Which score: a metric, and what it compares with."""

    metric: str  # a row of METRICS
    mode: str | None  # a row of REFERENCES; None for scores that need none

    @property
    def label(self) -> str:
        """As in "CLIP-I"."""
        return METRICS[self.metric].label

    @property
    def against(self) -> str:
        """What the images are compared with, as in "held-out images"; empty where that goes without saying."""
        if self.mode is not None:
            return REFERENCES[self.mode]
        return "the prompt" if {"prompt", "prompt_without_token"} & set(METRICS[self.metric].needs) else ""


@dataclass(frozen=True)
class EncoderRecord:
    """What a result says of an encoder."""

    architecture: str
    fingerprint: str
    files: dict[str, str]  # name -> sha256
    preprocessing: dict[str, Any]


@dataclass(frozen=True)
class Reference:
    """What a result says of a real image."""

    sha256: str


@dataclass(frozen=True)
class Summary:
    """What a result says of a metric, as far as it is read here."""

    value: float | None = None  # of a metric per set
    real_to_real: float | None = None


@dataclass(frozen=True)
class Result:
    """A scores.json, checked. Results of the first version say "pictures" for "images"."""

    protocol: str
    reference_mode: ReferenceMode | None
    metrics: dict[str, Summary]
    images: list[dict[str, Any]]
    references: list[Reference]
    encoders: dict[str, EncoderRecord]
    blank: int = 0
    copies: int = 0

    def key(self, metric: str) -> ScoreKey:
        """The score of a metric in this result."""
        against_references = {"references", "masked_references"} & set(METRICS[metric].needs)
        return ScoreKey(metric, self.reference_mode if against_references else None)


def read_result(path: Path) -> Result:
    """A scores.json.

    Raises:
        UserError: it is none.
    """
    from pydantic import ValidationError

    content = read_json(path)
    if "pictures" in content:
        content = {"images": content["pictures"], **content}
    try:
        result: Result = _validator().validate_python(content)
        for row in result.images:
            check_line(row)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(
            f"{path}: is not a result of scoring ({escaped(where)}: {escaped(first['msg'])}); score again"
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path}: is not a result of scoring (images: {escaped(error)}); score again") from None
    return result


@cache
def _validator() -> Any:
    from pydantic import TypeAdapter

    return TypeAdapter(Result)
