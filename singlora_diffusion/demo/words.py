"""What the demo says about its results: labels, the table, the lead and the caveat of the page, the sheet."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..adapters.config import MethodName as Method
from ..adapters.methods import METHODS
from ..training import log_file
from . import plan
from .settings import DemoSettings
from .world_images import MANIFEST

if TYPE_CHECKING:
    from eval.results import ImageSet, ScoredSet

    from ..adapters.budget import Match
    from ..toyworld.subjects import Subject

REAL = "real images"
SHOWN = 8
"""Images in a row of the sheet."""


def label(name: str) -> str:
    """Of the base model, or of a method."""
    return "base model" if name == plan.BASE else METHODS[name].label


def listed(methods: Iterable[Method]) -> str:
    """ "SingLoRA and LoRA"."""
    return " and ".join(map(label, methods))


def size(method: Method, row: Match) -> str:
    """Rank and number of trained parameters, in a line."""
    return f"{label(method):<9}rank {row.rank:<3} trains {row.parameters:,} parameters ({row.deviation:+.1%})"


def lead(demo: DemoSettings, subject: Subject, sizes: Mapping[Method, Match]) -> str:
    """How the page begins."""
    ranks = ", ".join(f"{label(method)} rank {row.rank} ({row.parameters:,})" for method, row in sizes.items())
    model, noun = demo.pretrained_model_name_or_path, subject.class_noun
    return (
        f"{model} knows what a {noun} is and has never seen {subject.name}. "
        f"It learns it from five images in {demo.max_train_steps} steps; trained parameters: {ranks}. "
        f"The first column shows what is asked for, with images that no model has seen."
    )


def columns(demo: DemoSettings, sizes: Mapping[Method, Match]) -> list[ImageSet]:
    """The columns of the page: real images, the base model, each adapter."""
    from eval.results import ImageSet

    heldout = plan.heldout(demo)
    found = [ImageSet(REAL, heldout, real=True)] if (heldout / MANIFEST).exists() else []
    found.append(ImageSet(label(plan.BASE), plan.samples(demo, plan.BASE)))
    for method, row in sizes.items():
        training = demo.output_dir / method
        log = (training / log_file.NAME).read_text(encoding="utf-8").splitlines()
        facts = {"parameters": f"{row.parameters:,}", "training, s": f"{json.loads(log[-1])['seconds']:.0f}"}
        found.append(ImageSet(label(method), plan.samples(demo, method), training=training, facts=facts))
    return found


def table(loaded: Sequence[ScoredSet]) -> Any:
    """Rows: base model, adapters, real images; columns: scores, size, time."""
    from rich.table import Table

    from eval.results import REFERENCES, real_score, scored

    shown = [column for column in scored(loaded) if column.mode in ("heldout", None)]
    against = REFERENCES["heldout"]
    title = f"likeness (DINO, CLIP-I) to {against}, agreement with the prompt (CLIP-T)"
    made = Table(title=title, title_justify="left")
    made.add_column("")
    for column in shown:
        made.add_column(column.label, justify="right")
    facts = list(dict.fromkeys(name for one in loaded for name in one.source.facts))
    for name in facts:
        made.add_column(name, justify="right")
    for one in sorted(loaded, key=lambda each: each.source.real):
        values = [real_score(loaded, column) if one.source.real else one.mean(column) for column in shown]
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        made.add_row(one.name, *numbers, *(one.source.facts.get(name, "") for name in facts))
    return made


def caveat(loaded: Sequence[ScoredSet]) -> str:
    """What the scores of one demo are worth, with the first two adapters' difference set against its spread."""
    import numpy as np

    from eval.results import scored

    text = "One subject, one training seed, a toy model."
    trained = [one for one in loaded if one.trained]
    if len(trained) < 2:
        return text
    first, second = trained[:2]
    column = scored(loaded)[0]
    a, b = first.per_prompt(column), second.per_prompt(column)
    differences = np.array([a[prompt] - b[prompt] for prompt in a if prompt in b])
    if len(differences) < 2:
        return text
    mean, sd = float(differences.mean()), float(differences.std(ddof=1))
    text += f" {first.name} minus {second.name}: DINO {mean:+.3f}, standard deviation over prompts {sd:.3f}. "
    if abs(mean) <= 2 * sd / len(differences) ** 0.5:
        return text + "Differences of this size are within noise."
    return (
        text + "That is beyond the noise of the prompts, not beyond that of subjects and seeds: no claim rests on it."
    )


def sheet(references: Path, made: Mapping[str, Sequence[Path]], path: Path) -> None:
    """One image: the training images, then the first prompts by the base model and by each adapter."""
    from ..data.folders import image_files
    from ..data.images import open_image
    from ..sampling import contact_sheet

    rows = {"the training images": image_files(references), **made}
    opened = [[open_image(image) for image in row[:SHOWN]] for row in rows.values()]
    with files.replacing(path) as part:
        contact_sheet.grid(opened, list(rows)).save(part)
