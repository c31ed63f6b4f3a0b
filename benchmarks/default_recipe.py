"""How far is the recipe that one gets without any flag from the best learning rate, on toyworld's subjects?

    python -m benchmarks.default_recipe --output_dir runs/default-recipe

Each subject is trained on with everything as it comes, and at other learning rates. The best rate is the one with the
largest product of mean DINO and mean CLIP-T over all subjects. What is done already is not done again.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from eval.compare import cell as cells
from eval.compare import engines, grid
from eval.compare import subjects as known_subjects
from eval.compare.grid import BASE, Cell, Plan
from eval.compare.settings import CompareSettings
from eval.statistics import t_interval
from singlora_diffusion import models, settings
from singlora_diffusion.adapters.config import AdapterConfig, MethodName
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import read_json
from singlora_diffusion.settings import Count, Positive, Seed
from singlora_diffusion.toyworld.subjects import SUBJECTS
from singlora_diffusion.training import loop, preparation, run_folder
from singlora_diffusion.training.events import Remark, Started
from singlora_diffusion.training.recipe import OptimizationSettings, Recipe, to_be_shared

UNSEEN = ("backpack-2", "bowl-2", "can-2", "cat-2", "clock-2", "dog-2")
"""Subjects on which nothing was ever chosen."""
SCORES = {"dino": "DINO", "clip_t": "CLIP-T"}
Scores = Mapping[str, np.ndarray]
"""A number for each subject, by the score's name."""


@dataclass(frozen=True)
class Settings:
    """Train on each subject with the default recipe and at other learning rates."""

    output_dir: Path = Path("runs/default-recipe")
    """Where everything goes; what is finished there is not done again."""
    subjects: tuple[str, ...] = UNSEEN
    """Subjects of toyworld."""
    factors: tuple[Positive, ...] = (0.316, 1.0, 3.16)
    """The learning rates, as multiples of the default one; 1 is always there."""
    method: MethodName = "singlora"
    """The method, at its default rank."""
    pretrained_model_name_or_path: str = "toyworld"
    """`toyworld` or `toyworld-flow`."""
    auto: bool = False
    """Also train each subject at the rate that `--learning_rate auto` finds for it."""
    max_train_steps: Count | None = None
    """Steps. None: as by default."""
    seed: Seed = 0
    """Of the trainings."""
    workers: Count = 1
    """Trainings at once."""


def main(chosen: Settings) -> None:
    """Run what is missing, and print what was found.

    Raises:
        UserError: settings or subjects that do not work.
    """
    plan, default = planned(chosen)

    def cell(name: str, rate: float) -> Cell:
        return Cell(name, chosen.method, rate, chosen.seed)

    rates = sorted({float(f"{default * factor:.3g}") for factor in {*chosen.factors, 1.0}})
    trained = {rate: [cell(name, rate) for name in chosen.subjects] for rate in rates}
    bases = [Cell(name, BASE) for name in chosen.subjects]
    run(plan, [*bases, *trained[default], *(one for some in trained.values() for one in some)])
    auto = [cell(name, searched(plan, cell(name, default))) for name in chosen.subjects] if chosen.auto else []
    run(plan, auto)
    found = {rate: scores(plan, some) for rate, some in trained.items()}
    print("\n".join(report(chosen.subjects, scores(plan, bases), found, default)))
    if auto:
        taken = [one.rate for one in auto]
        print("\n".join(report_of_auto(chosen.subjects, taken, scores(plan, auto), found, default)))


def run(plan: Plan, todo: Sequence[Cell]) -> None:
    """Run what is not done yet."""
    missing = list(dict.fromkeys(one for one in todo if not is_scored(plan, one)))
    for number, one in enumerate(engines.engine(plan)(plan, missing), start=1):
        print(f"{number}/{len(missing)} {one.subject} {one.name}", file=sys.stderr, flush=True)


def is_scored(plan: Plan, one: Cell) -> bool:
    """Whether a cell has the scores that decide."""
    record = cells.read(plan, one)
    return record is not None and cells.decides(plan, record)


def searched(plan: Plan, like: Cell) -> float:
    """The rate that a training like the cell's finds for itself; it is stopped before its first step."""
    out = plan.settings.run.output_dir / "auto" / like.subject
    if not (out / run_folder.RECIPE).exists():
        recipe = settings.replaced(cells.recipe(plan, like), learning_rate="auto", output_dir=out)
        for event in loop.run(recipe):
            if isinstance(event, Remark):
                print(f"{like.subject}: {event.text}", file=sys.stderr, flush=True)
            if isinstance(event, Started):
                break
    return float(read_json(out / run_folder.RECIPE)["learning_rate"])


def planned(chosen: Settings) -> tuple[Plan, float]:
    """The cells' plan, and the default learning rate.

    Raises:
        UserError: the cells would not be trained by the default recipe.
    """
    steps = chosen.max_train_steps or OptimizationSettings().max_train_steps
    compared = settings.build(
        CompareSettings,
        output_dir=chosen.output_dir,
        subjects=chosen.subjects,
        tuning_subjects=[name for name in SUBJECTS if name not in chosen.subjects][:1],  # it is left alone
        methods=(chosen.method,),
        match=f"{chosen.method}:{AdapterConfig().rank}",
        pretrained_model_name_or_path=chosen.pretrained_model_name_or_path,
        max_train_steps=steps,
        workers=chosen.workers,
    )
    plan = grid.plan(compared, known_subjects.read(compared.who, chosen.output_dir / "subjects"))
    family = models.load(chosen.pretrained_model_name_or_path)
    name = chosen.subjects[0]
    subject = plan.subjects[name]
    plain = settings.build(
        Recipe,
        instance_data_dir=subject.images,
        instance_prompt=f"a photo of sks {subject.class_noun}",
        pretrained_model_name_or_path=chosen.pretrained_model_name_or_path,
        method=chosen.method,
        max_train_steps=steps,
    )
    default = preparation.usual_rate(plain, family)
    plain = preparation.on_this_machine(settings.replaced(plain, learning_rate=default))
    ours = cells.recipe(plan, Cell(name, chosen.method, default))
    now, wanted = ({**to_be_shared(one), **settings.as_json(one.adapter)} for one in (ours, plain))
    if other := [key for key in wanted if now[key] != wanted[key] and key != "identifier"]:
        raise UserError(f"the cells would not be trained by the default recipe: {', '.join(other)} differs")
    return plan, default


def scores(plan: Plan, some: Sequence[Cell]) -> Scores:
    """By score, a number for each cell."""
    known = [cells.known(plan, one)["scores"] for one in some]
    return {name: np.array([one[name] for one in known]) for name in SCORES}


def report(subjects: Sequence[str], base: Scores, found: Mapping[float, Scores], default: float) -> list[str]:
    """Lines: a table of the rates, a table of the subjects at the default rate, and how far it is from the best."""
    products = {rate: float(one["dino"].mean() * one["clip_t"].mean()) for rate, one in found.items()}
    best = max(products, key=lambda rate: products[rate])
    likest = max(found, key=lambda rate: float(found[rate]["dino"].mean()))
    lines = ["| rate | DINO | CLIP-T | product |", "| --- | --- | --- | --- |"]
    lines.append(f"| base model | {base['dino'].mean():.3f} | {base['clip_t'].mean():.3f} | |")
    for rate, one in found.items():
        said = f"{rate:g}" + (" (default)" if rate == default else "") + (" (best)" if rate == best else "")
        lines.append(f"| {said} | {one['dino'].mean():.3f} | {one['clip_t'].mean():.3f} | {products[rate]:.3f} |")
    at = found[default]
    lines += ["", "| subject | DINO | best rate's | CLIP-T | base model's |", "| --- | --- | --- | --- | --- |"]
    for place, name in enumerate(subjects):
        columns = (at["dino"], found[best]["dino"], at["clip_t"], base["clip_t"])
        lines.append(f"| {name} | " + " | ".join(f"{one[place]:.3f}" for one in columns) + " |")
    lines += ["", f"The default rate, {default:g}, over {len(subjects)} subjects, with 95 % t intervals:"]
    for rate, which in ((best, "best rate"), (likest, "rate of most DINO")):
        lines.append(f"- DINO minus that of the {which}, {rate:g}: {spread(at['dino'] - found[rate]['dino'])}")
    lines.append(f"- CLIP-T minus the base model's: {spread(at['clip_t'] - base['clip_t'])}")
    return lines


def report_of_auto(
    subjects: Sequence[str], taken: Sequence[float], at: Scores, found: Mapping[float, Scores], default: float
) -> list[str]:
    """Lines: the rates that were found, and how the product of the scores there compares with that of other rates."""
    products = {rate: one["dino"] * one["clip_t"] for rate, one in found.items()}
    best = max(products, key=lambda rate: float(products[rate].mean()))
    own = np.max(list(products.values()), axis=0)
    product = at["dino"] * at["clip_t"]
    said = ", ".join(f"{name} {rate:g}" for name, rate in zip(subjects, taken, strict=True))
    against = {
        f"the default rate's, {default:g}": products[default],
        f"that of the best rate for all, {best:g}": products[best],
        "that of the best of these rates for each": own,
    }
    return [
        "",
        f"--learning_rate auto: {said}; DINO {at['dino'].mean():.3f}, CLIP-T {at['clip_t'].mean():.3f}",
        *(f"- product minus {which}: {spread(product - other)}" for which, other in against.items()),
    ]


def spread(differences: np.ndarray) -> str:
    """The mean and its interval."""
    interval = t_interval(differences)
    said = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{differences.mean():+.3f}{said}"


if __name__ == "__main__":
    from singlora_diffusion.cli import quiet_libraries

    quiet_libraries()
    try:
        main(settings.parse(Settings, sys.argv[1:], "default_recipe", str(__doc__).partition("\n")[0]))
    except UserError as error:
        print(f"default_recipe: {error}", file=sys.stderr)
        sys.exit(2)
