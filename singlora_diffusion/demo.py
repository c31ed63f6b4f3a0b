"""All three jobs on a toyworld subject: SingLoRA and LoRA of equal size, pictures of both, scores, a report.

Every part calls what the verbs call, and what an earlier run has finished is not done again.
"""

from __future__ import annotations

import contextlib
import io
import json
import shlex
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import UserError
from .settings import command_line, replaced
from .training.recipe import Method, Recipe

if TYPE_CHECKING:
    import numpy as np
    from rich.console import Console

    from eval.results import Loaded, Run

    from .adapters.budget import Match
    from .sampling.settings import GenerateSettings
    from .toyworld.subjects import Subject

LABELS = {"singlora": "SingLoRA", "lora": "LoRA", "lora+": "LoRA+", "dora": "DoRA", "oft": "OFT", "lokr": "LoKr"}
BASE, REAL = "base model", "real pictures"
IDENTIFIER = "sks"
RATE = 2e-3
RATES: dict[Method, float] = {"singlora": 3e-3}
"""Where a method did better on the tuning subjects at another rate than `RATE`."""


@dataclass(frozen=True)
class DemoSettings:
    """Teach the embedded model a subject it has never seen, with SingLoRA and with LoRA of equal size, and compare."""

    subject: str = "backpack-1"
    """A held-out subject of toyworld: backpack-1, dog-1, teapot-2, ... An unknown name lists them all."""
    output_dir: Path = Path("runs/demo")
    """Where everything goes; what is finished there is not done again."""
    methods: tuple[Method, ...] = ("singlora", "lora")
    """The adapters to compare."""
    match: str = "lora:8"
    """How many parameters each may train: METHOD:RANK, or a number. Ranks are chosen to come nearest."""
    max_train_steps: int = 300
    """Optimizer steps of each."""
    learning_rate: float | None = None
    """Peak rate of each. None: each method's own, tuned on other subjects of toyworld."""
    seed: int = 0
    """Of the training, the same for each."""
    prompts: str = "toyworld"
    """What the pictures show: a prompt file, or a set that comes with the package."""
    seeds: str = "0-1"
    """One picture per prompt and seed."""
    pretrained_model_name_or_path: str = "toyworld"
    """The base model: `toyworld`, a diffusers folder, or a hub id."""
    clip: str | None = None
    """The CLIP encoder of the scores. None: toyworld's own."""
    dino: str | None = None
    """The DINO encoder of the scores. None: toyworld's own."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""


def demo(settings: DemoSettings) -> Path:
    """Train, generate, score, report; returns the report's path.

    Raises:
        UserError: settings that do not work, or a folder that holds another demo.
    """
    from rich.console import Console

    from eval.results import load

    from .adapters import budget
    from .toyworld.subjects import subject

    began, console = time.monotonic(), Console(highlight=False, soft_wrap=True)
    out, chosen = settings.output_dir, subject(settings.subject)
    if not settings.methods or len(set(settings.methods)) < len(settings.methods):
        raise UserError("--methods: name each adapter once, such as --methods singlora lora")

    _heading(console, 1, f"five pictures of {chosen.name}, which the model has never seen")
    references, heldout = write_references(chosen, out), write_heldout(chosen, out, settings.prompts)
    console.print(f"{references}: to train on. {heldout}: to score with, in all of toyworld's places")

    shapes = budget.shapes(settings.pretrained_model_name_or_path, _recipe(settings, chosen, "singlora", 1).targets)
    goal = budget.target_count(settings.match, shapes)
    ranks = {method: budget.match(goal, method, shapes) for method in settings.methods}
    _heading(
        console,
        2,
        f"train {' and '.join(LABELS[method] for method in ranks)} on them, {settings.max_train_steps} steps each",
    )
    for method, row in ranks.items():
        console.print(
            f"{LABELS[method]:<9}rank {row.rank:<3} trains {row.parameters:,} parameters ({row.deviation:+.1%})"
        )
    recipes = {method: _recipe(settings, chosen, method, row.rank) for method, row in ranks.items()}
    for recipe in recipes.values():
        train(recipe, console)

    _heading(console, 3, "the same prompts and seeds with the base model and with each adapter")
    from .sampling.generate import generate

    generations = _generations(settings, chosen)
    made: dict[str, list[Path]] = {}  # of the first seed
    for name, generation in generations.items():
        with contextlib.redirect_stdout(io.StringIO()):  # its progress is on stderr; what to type next is not due yet
            lines = generate(generation)
        made[name] = [generation.output.output_dir / line["file"] for line in lines if line["seed"] == lines[0]["seed"]]
        console.print(f"{name}: {len(lines)} pictures in {generation.output.output_dir}")

    _heading(console, 4, "likeness to the subject, agreement with the prompts")
    from eval.score import score

    scorings = _scorings(settings, list(generations.values()))
    for scoring in scorings:
        score(scoring)
    runs = _runs(out, generations, ranks)

    from eval import report

    commands = [
        f"singlora toyworld subject --name {chosen.name} --output_dir {shlex.quote(str(references))}",
        *(command_line("train", recipe) for recipe in recipes.values()),
        *(command_line("generate", generation) for generation in generations.values()),
        *(command_line("score", scoring) for scoring in scorings),
        f"{command_line('demo', settings)}  # all of the above",
    ]
    loaded = [load(run) for run in runs]
    notes = [caveat(loaded)]
    html = report.page(
        f"{' and '.join(LABELS[method] for method in ranks)} on five pictures of {chosen.name}",
        runs,
        {"the five training pictures": references},
        lead=_lead(settings, chosen, ranks),
        notes=notes,
        commands=commands,
    )
    page = report.write(html, out / "report.html")
    look(references, made, out / "sheet.png")
    console.print()
    console.print(_table(loaded))
    for note in notes:
        console.print(note, style="dim")
    console.print(
        f"\n{out / 'sheet.png'}: at a glance. [bold]{page}[/bold]: all of it ({time.monotonic() - began:.0f} s in all)"
    )
    console.print(
        'next: singlora train --instance_data_dir MY_DOG --instance_prompt "a photo of sks dog" --output_dir runs/dog',
        markup=False,
    )
    return page


def write_references(subject: Subject, out: Path) -> Path:
    """The training pictures, written or found as they should be.

    Raises:
        UserError: the folder holds something else.
    """
    from .toyworld.subjects import references, write_subject

    folder = out / "references"
    if not folder.is_dir() or not any(folder.iterdir()):
        write_subject(subject.name, folder)
    _verify(folder, {f"{k:02d}.png": picture for k, (picture, _, _) in enumerate(references(subject))})
    return folder


def write_heldout(subject: Subject, out: Path, prompts_from: str) -> Path:
    """A picture of the subject in every place, none of which is trained on, each with the prompt that describes it.

    Raises:
        UserError: the folder holds something else.
    """
    from PIL import Image

    from .data import prompts
    from .toyworld.captions import PLACES
    from .toyworld.subjects import HELD_OUT, references

    folder = out / "heldout"
    folder.mkdir(parents=True, exist_ok=True)
    supply = references(subject, len(PLACES), start=HELD_OUT)
    pictures = {f"{scene.background.replace(' ', '-')}.png": picture for picture, _, scene in supply}
    for name, picture in pictures.items():
        if not (folder / name).exists():
            Image.fromarray(picture).save(folder / name)
    _verify(folder, pictures)

    templates = prompts.load(prompts_from)
    lines = []
    for (name, _), (_, _, scene) in zip(pictures.items(), supply, strict=True):
        said = [one for one in templates if any(one.template.endswith(words) for words in PLACES[scene.background])]
        lines += [
            {
                "file": name,
                "prompt": one.text(IDENTIFIER, subject.class_noun),
                "prompt_without_token": one.without_token(subject.class_noun),
                "template": one.template,
                "prompt_index": one.index,
            }
            for one in said[:1]
        ]
    manifest = folder / "manifest.jsonl"
    manifest.unlink(missing_ok=True)
    if lines:
        manifest.write_text("".join(f"{json.dumps(line)}\n" for line in lines), encoding="utf-8")
    return folder


def train(recipe: Recipe, console: Console) -> Path:
    """The trainer's `main`, unless its result is there already; returns the run's folder.

    Raises:
        UserError: there is an adapter of another recipe.
    """
    import train_dreambooth

    out = recipe.output_dir
    if not (out / train_dreambooth.ADAPTER).exists():
        train_dreambooth.main(recipe, hint=False)
        return out
    try:
        old = json.loads((out / "recipe.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{out}: has an adapter but no readable recipe.json; name another --output_dir") from error
    new = json.loads(json.dumps(recipe.as_json()))
    differing = [key for key in new if old.get(key) != new[key]]
    if differing:
        key = differing[0]
        raise UserError(
            f"{out}: holds an adapter of another demo ({key} {old.get(key)}, now {new[key]}); name another --output_dir"
        )
    console.print(f"{out / train_dreambooth.ADAPTER} is there already")
    return out


def caveat(loaded: Sequence[Loaded]) -> str:
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
    text += f" {first.run.name} minus {second.run.name}: DINO {mean:+.3f}, standard deviation over prompts {sd:.3f}. "
    if abs(mean) <= 2 * sd / len(differences) ** 0.5:
        return text + "Differences of this size are within noise."
    return (
        text + "That is beyond the noise of the prompts, not beyond that of subjects and seeds: no claim rests on it."
    )


def look(references: Path, made: Mapping[str, Sequence[Path]], path: Path, width: int = 8) -> None:
    """One sheet: the training pictures, then the first prompts by the base model and by each adapter."""
    from .data.folders import image_files
    from .data.images import open_image
    from .sampling import contact_sheet

    folders = {"the training pictures": image_files(references), **made}
    rows = [[open_image(picture) for picture in row[:width]] for row in folders.values()]
    contact_sheet.grid(rows, list(folders)).save(path)


def _recipe(settings: DemoSettings, subject: Subject, method: Method, rank: int) -> Recipe:
    return Recipe(
        instance_data_dir=settings.output_dir / "references",
        instance_prompt=f"a photo of {IDENTIFIER} {subject.class_noun}",
        output_dir=settings.output_dir / method,
        pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
        method=method,
        rank=rank,
        max_train_steps=settings.max_train_steps,
        learning_rate=settings.learning_rate or RATES.get(method, RATE),
        seed=settings.seed,
        validation_steps=0,
        checkpointing_steps=0,
        report_to="none",
        device=settings.device,
    )


def _generations(settings: DemoSettings, subject: Subject) -> dict[str, GenerateSettings]:
    """By the name of the column: the base model, then each adapter."""
    from .sampling.settings import GenerateSettings, OutputSettings

    def generation(name: str, **flags: Any) -> GenerateSettings:
        made = GenerateSettings(OutputSettings(settings.output_dir / name / "samples"))
        return replaced(made, prompts=settings.prompts, seeds=settings.seeds, device=settings.device, **flags)

    base = generation(
        "base",
        pretrained_model_name_or_path=settings.pretrained_model_name_or_path,
        identifier=IDENTIFIER,
        class_noun=subject.class_noun,
    )
    adapted = {
        LABELS[method]: generation(method, adapter=(settings.output_dir / method,)) for method in settings.methods
    }
    return {BASE: base, **adapted}


def _scorings(settings: DemoSettings, generations: Sequence[GenerateSettings]) -> list[Any]:
    """Generated pictures against training and held-out pictures, held-out pictures against training pictures."""
    from eval.score import ScoreSettings

    out = settings.output_dir
    common: dict[str, Any] = {
        "protocol": "custom" if settings.clip or settings.dino else "toyworld",
        "metrics": ("dino", "clip_i", "clip_t"),
        "clip": settings.clip,
        "dino": settings.dino,
        "cache_dir": out / ".features",
        "device": settings.device or "auto",
    }
    scorings = []
    for images in (generation.output.output_dir for generation in generations):
        scorings += [
            ScoreSettings(images, out / "references", output=images / "scores.json", **common),
            ScoreSettings(
                images,
                out / "heldout",
                reference_mode="heldout",
                output=images / "scores-heldout.json",
                **common,
            ),
        ]
    if (out / "heldout" / "manifest.jsonl").exists():
        real = out / "heldout"
        scorings.append(ScoreSettings(real, out / "references", output=real / "scores.json", **common))
    return scorings


def _runs(out: Path, generations: dict[str, GenerateSettings], ranks: dict[Method, Match]) -> list[Run]:
    """The columns of the report."""
    from eval.results import Run

    runs = [Run(REAL, out / "heldout", real=True)] if (out / "heldout" / "manifest.jsonl").exists() else []
    runs.append(Run(BASE, generations[BASE].output.output_dir))
    for method, row in ranks.items():
        log = (out / method / "log.jsonl").read_text(encoding="utf-8").splitlines()
        seconds = json.loads(log[-1])["seconds"]
        facts = {"parameters": f"{row.parameters:,}", "training, s": f"{seconds:.0f}"}
        runs.append(
            Run(LABELS[method], generations[LABELS[method]].output.output_dir, training=out / method, facts=facts)
        )
    return runs


def _table(loaded: Sequence[Loaded]) -> Any:
    """Rows: base model, adapters, real pictures; columns: scores, size, time."""
    from rich.table import Table

    from eval.report import METRIC_LABELS, MODE_LABELS
    from eval.results import ceiling, scored

    columns = [column for column in scored(loaded) if column.mode in ("heldout", None)]
    against = MODE_LABELS["heldout"]
    table = Table(
        title=f"likeness (DINO, CLIP-I) to {against}, agreement with the prompt (CLIP-T)", title_justify="left"
    )
    table.add_column("")
    for column in columns:
        table.add_column(METRIC_LABELS[column.metric], justify="right")
    facts = list(dict.fromkeys(name for one in loaded for name in one.run.facts))
    for name in facts:
        table.add_column(name, justify="right")
    for one in sorted(loaded, key=lambda each: each.run.real):
        values = [ceiling(loaded, column) if one.run.real else one.mean(column) for column in columns]
        numbers = ["" if value is None else f"{value:.3f}" for value in values]
        table.add_row(one.run.name, *numbers, *(one.run.facts.get(name, "") for name in facts))
    return table


def _lead(settings: DemoSettings, subject: Subject, ranks: dict[Method, Match]) -> str:
    sizes = ", ".join(f"{LABELS[method]} rank {row.rank} ({row.parameters:,})" for method, row in ranks.items())
    model, noun = settings.pretrained_model_name_or_path, subject.class_noun
    return (
        f"{model} knows what a {noun} is and has never seen {subject.name}. "
        f"It learns it from five pictures in {settings.max_train_steps} steps; trained parameters: {sizes}. "
        f"The first column shows what is asked for, with pictures that no model has seen."
    )


def _heading(console: Console, number: int, text: str) -> None:
    console.print(f"\n[bold]{number}/4[/bold] {text}")


def _verify(folder: Path, pictures: dict[str, np.ndarray]) -> None:
    """Raise a UserError unless the folder holds these pictures."""
    import numpy as np

    from .data.images import open_image
    from .data.images import pictures as found

    names = {path.name for path in found(folder)}
    if names != set(pictures) or any(
        not np.array_equal(np.asarray(open_image(folder / name)), picture) for name, picture in pictures.items()
    ):
        raise UserError(f"{folder}: holds other pictures than this demo's; name another folder with --output_dir")
