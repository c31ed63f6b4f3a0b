"""What the demo runs, as the settings of the commands that a user would type."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..adapters.config import MethodName as Method
from ..errors import UserError
from ..settings import build
from ..training.recipe import Recipe
from .settings import RATE, RATES, DemoSettings
from .world_images import IDENTIFIER, MANIFEST

if TYPE_CHECKING:
    from eval.score import ScoreSettings

    from ..adapters.budget import Match
    from ..sampling.settings import GenerateSettings
    from ..toyworld.subjects import Subject

BASE = "base"
"""The folder of what the base model makes; each adapter's is named for its method."""


class Plan(NamedTuple):
    """What the demo does, before anything of it is done."""

    subject: Subject
    sizes: dict[Method, Match]
    """The rank of each method."""
    recipes: dict[Method, Recipe]
    generations: dict[str, GenerateSettings]
    """By folder: `BASE`, and each method."""


def checked(demo: DemoSettings) -> Plan:
    """Find out all that can be wrong, before anything is written.

    Raises:
        UserError: settings that do not work.
    """
    from .. import device
    from ..adapters import budget
    from ..sampling.settings import check
    from ..toyworld.subjects import subject

    target = subject(demo.subject)
    if not demo.methods or len(set(demo.methods)) < len(demo.methods):
        raise UserError("--methods: name each adapter once, such as --methods singlora lora")
    made = generations(demo, target)
    for generation in made.values():
        check(generation)
    device.choose(demo.device)
    shapes = budget.shapes(demo.pretrained_model_name_or_path, budget.BudgetSettings().targets)
    goal = budget.target_count(demo.match, shapes)
    sizes = {method: budget.match(goal, method, shapes) for method in demo.methods}
    recipes = {method: recipe(demo, target, method, row.rank) for method, row in sizes.items()}
    return Plan(target, sizes, recipes, made)


def references(demo: DemoSettings) -> Path:
    """The folder of the images to train on."""
    return demo.output_dir / "references"


def heldout(demo: DemoSettings) -> Path:
    """The folder of the images to score with."""
    return demo.output_dir / "heldout"


def samples(demo: DemoSettings, name: str) -> Path:
    """The folder of generated images: of `BASE`, or of a method."""
    return demo.output_dir / name / "samples"


def recipe(demo: DemoSettings, subject: Subject, method: Method, rank: int) -> Recipe:
    """A training."""
    return build(
        Recipe,
        instance_data_dir=references(demo),
        instance_prompt=f"a photo of {IDENTIFIER} {subject.class_noun}",
        output_dir=demo.output_dir / method,
        pretrained_model_name_or_path=demo.pretrained_model_name_or_path,
        method=method,
        rank=rank,
        max_train_steps=demo.max_train_steps,
        learning_rate=demo.learning_rate or RATES.get(method, RATE),
        seed=demo.seed,
        validation_steps=0,
        checkpointing_steps=0,
        report_to="none",
        device=demo.device,
    )


def generations(demo: DemoSettings, subject: Subject) -> dict[str, GenerateSettings]:
    """The same prompts and seeds by the base model and by each adapter."""
    from ..sampling.settings import GenerateSettings

    base: dict[str, Any] = {
        "pretrained_model_name_or_path": demo.pretrained_model_name_or_path,
        "identifier": IDENTIFIER,
        "class_noun": subject.class_noun,
    }
    adapted: dict[str, dict[str, Any]] = {method: {"adapter": (demo.output_dir / method,)} for method in demo.methods}
    return {
        name: build(
            GenerateSettings,
            output_dir=samples(demo, name),
            prompts=demo.prompts,
            seeds=demo.seeds,
            device=demo.device,
            **flags,
        )
        for name, flags in {BASE: base, **adapted}.items()
    }


def scorings(demo: DemoSettings, names: Iterable[str]) -> list[ScoreSettings]:
    """Generated images against training and held-out images, held-out images against training images."""
    from eval.score import ScoreSettings

    def scoring(images: Path, against: Path, output: str, **flags: Any) -> ScoreSettings:
        return build(
            ScoreSettings,
            images=images,
            references=against,
            output=images / output,
            protocol="custom" if demo.clip or demo.dino else "toyworld",
            metrics=("dino", "clip_i", "clip_t"),
            clip=demo.clip,
            dino=demo.dino,
            cache_dir=demo.output_dir / ".features",
            device=demo.device,
            **flags,
        )

    found = []
    for images in (samples(demo, name) for name in names):
        found.append(scoring(images, references(demo), "scores.json"))
        found.append(scoring(images, heldout(demo), "scores-heldout.json", reference_mode="heldout"))
    if (heldout(demo) / MANIFEST).exists():
        found.append(scoring(heldout(demo), references(demo), "scores.json"))
    return found
