"""One cell: train, generate, score, and a cell.json that says how it went. What is there already is not done again."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from singlora_diffusion import files, settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped
from singlora_diffusion.training import log_file, run_folder
from singlora_diffusion.training.recipe import Recipe, to_be_shared

from . import measuring, scoring, worker
from .grid import BASE, Cell, Plan
from .methods import parsed
from .scoring import PRIOR, SAMPLES
from .update_size import update_size

if TYPE_CHECKING:
    from singlora_diffusion.sampling.settings import GenerateSettings

RECORD = "cell.json"
PHASES = ("training", "images", "scores")
"""The parts of a cell whose seconds its record has, where it was run in one go."""
UPDATE = "update"
"""The entry of a record that says how far the weights were moved, as `Update` does; None where nothing was learned."""


@dataclass(frozen=True)
class Training:
    """How a training went."""

    diverged: str | None
    """What the trainer said when numbers stopped being finite; None: they did not."""
    seconds_per_step: float | None
    processor_seconds_per_step: float | None
    peak_bytes: int | None
    machine: str | None


NOTHING = Training(None, None, None, None, None)
"""Of the base model."""


def run(plan: Plan, cell: Cell) -> None:
    """Bring a cell to its end.

    Raises:
        UserError: it cannot be run, or its folder is of other settings.
    """
    folder, record, seconds = plan.folder(cell), read(plan, cell), dict[str, float]()
    if record is None:
        worker.tools(plan.settings.training)  # no part of what a cell takes
        with measuring.clock(seconds, "training"):
            went = NOTHING if cell.method == BASE else _train(plan, cell)
        record = {**describe(plan, cell), **vars(went)}
        files.write_json(folder / RECORD, record)
    if UPDATE not in record:
        record = {**record, UPDATE: _moved(plan, cell, record)}
        files.write_json(folder / RECORD, record)
    if not lacking(plan, cell, record):
        return
    source = folder
    with measuring.clock(seconds, "images"):
        if record["diverged"]:  # nothing was learned: it scores what the base model scores
            source = plan.folder(Cell(cell.subject, BASE))
        else:
            _generate(plan, cell)
    with measuring.clock(seconds, "scores"):
        record = {**record, "scores": scoring.scores(plan, cell, source)}
    if set(seconds) == set(PHASES):  # all of it in one go
        record["seconds"] = seconds
    files.write_json(folder / RECORD, record)


def describe(plan: Plan, cell: Cell) -> dict[str, Any]:
    """What a cell is of."""
    about: dict[str, Any] = {
        "subject": cell.subject,
        "method": cell.method,
        "learning_rate": cell.rate,
        "seed": cell.seed,
        "other_threads": cell.other_threads,
        "parameters": 0 if cell.method == BASE else plan.sizes[cell.method].parameters,
    }
    return {**about, **{name: told for name, (told, _) in _follows_from(plan, cell).items()}}


def read(plan: Plan, cell: Cell) -> dict[str, Any] | None:
    """What is known of a cell; None: nothing yet.

    Raises:
        UserError: it was run with other settings.
    """
    folder = plan.folder(cell)
    if not (folder / RECORD).exists():
        return None
    record = files.read_json(folder / RECORD)
    for name, (new, changed) in _follows_from(plan, cell).items():
        old = record.get(name, {})
        # a setting that is newer than the record had its default value then
        for key in (key for key in new if key in old or key in changed):
            if old.get(key) != new[key]:
                raise UserError(
                    f"{escaped(folder, 1000)}: was run with other settings ({key} {escaped(old.get(key), 80)}, now "
                    f"{escaped(new[key], 80)}); name another --output_dir"
                )
    return record


def _follows_from(plan: Plan, cell: Cell) -> dict[str, tuple[dict[str, Any], set[str]]]:
    """The settings that a cell's results follow from, by name, and which of them are not as they are by default."""
    found = {name: (_told(made), set(settings.changed(made))) for name, made in generations(plan, cell).items()}
    if cell.method == BASE:
        return found
    made = recipe(plan, cell)
    steps = {"max_train_steps": made.optimization.max_train_steps}
    told = {**to_be_shared(made), **settings.as_json(made.adapter), **steps}  # not what else is written, and where
    return {"recipe": (told, set(settings.changed(made))), **found}


def lacking(plan: Plan, cell: Cell, record: Mapping[str, Any]) -> list[str]:
    """What a cell does not have yet of its scores, and the size of its update."""
    lacking = [name for name in scoring.wanted(plan, cell) if name not in record.get("scores", {})]
    return lacking if UPDATE in record else [UPDATE, *lacking]


def is_done(plan: Plan, cell: Cell) -> bool:
    """Whether there is nothing left to do."""
    record = read(plan, cell)
    return record is not None and not lacking(plan, cell, record)


def decides(plan: Plan, record: Mapping[str, Any]) -> bool:
    """Whether a record has the scores that decide."""
    return set(plan.settings.decision.primary) <= set(record.get("scores", {}))


def known(plan: Plan, cell: Cell) -> dict[str, Any]:
    """What is known of a cell that is done."""
    record = read(plan, cell)
    assert record is not None, cell
    return record


def recipe(plan: Plan, cell: Cell) -> Recipe:
    """The training."""
    chosen, subject = plan.settings, plan.subjects[cell.subject]
    training, adapter = chosen.training, parsed(cell.method).config
    targets = chosen.what.targets if adapter.targets is None else adapter.targets
    return settings.build(
        Recipe,
        **{
            **vars(replace(adapter, rank=plan.sizes[cell.method].rank, targets=targets)),
            "instance_data_dir": subject.images,
            "instance_prompt": f"a photo of {chosen.who.identifier} {subject.class_noun}",
            "identifier": chosen.who.identifier,
            "resolution": training.resolution,
            "pretrained_model_name_or_path": training.pretrained_model_name_or_path,
            "mixed_precision": training.mixed_precision,
            "gradient_checkpointing": training.gradient_checkpointing,
            "max_train_steps": training.max_train_steps,
            "train_batch_size": training.train_batch_size,
            "learning_rate": cell.rate,
            "seed": cell.seed,
            "validation_steps": 0,
            "checkpointing_steps": 0,
            "report_to": "none",
            "portable": False,
            "output_dir": plan.folder(cell),
            "device": training.device,
        },
    )


def generations(plan: Plan, cell: Cell) -> dict[str, GenerateSettings]:
    """The images: of the subject's prompts, and of the class prompt alone."""
    from singlora_diffusion.sampling.settings import GenerateSettings

    chosen, subject, folder = plan.settings, plan.subjects[cell.subject], plan.folder(cell)
    images = chosen.images
    shared: dict[str, Any] = {
        "pretrained_model_name_or_path": chosen.training.pretrained_model_name_or_path,
        "adapter": () if cell.method == BASE else (folder,),
        "identifier": chosen.who.identifier,
        "class_noun": subject.class_noun,
        "num_inference_steps": images.num_inference_steps,
        "batch_size": images.sample_batch_size,
        "device": chosen.training.device,
    }
    return {
        SAMPLES: settings.build(
            GenerateSettings,
            **shared,
            output_dir=folder / SAMPLES,
            overwrite=True,  # a training that was killed and begun again has made another adapter
            prompts=images.prompts,
            seeds=images.image_seeds,
        ),
        PRIOR: settings.build(
            GenerateSettings,
            **shared,
            output_dir=folder / PRIOR,
            overwrite=True,
            prompt=("a photo of a {class}",),
            seeds=images.prior_seeds,
        ),
    }


def _train(plan: Plan, cell: Cell) -> Training:
    from singlora_diffusion.training import loop
    from singlora_diffusion.training.diagnosis import NotFinite
    from singlora_diffusion.training.events import Step

    made, tools = recipe(plan, cell), worker.tools(plan.settings.training)
    out = made.output.output_dir
    anew = any((out / name).exists() for name in (run_folder.RECIPE, run_folder.ADAPTER))
    made = settings.replaced(made, overwrite=anew)  # a killed worker leaves half of a run
    log, steps, seconds, diverged = log_file.LogFile(out / log_file.NAME), 0, 0.0, None
    began = time.process_time()
    measuring.forget_peak(tools.device)
    try:
        with measuring.threads(cell.other_threads):
            for event in loop.run(made, family=tools.family):
                log(event)
                if isinstance(event, Step):
                    if not steps:
                        began = time.process_time()
                    steps, seconds = steps + 1, event.seconds
    except UserError as error:
        if not isinstance(error.__cause__, NotFinite):
            raise
        diverged = str(error)
    finally:
        log.close()
    timed = steps - 1
    return Training(
        diverged=diverged,
        seconds_per_step=seconds / steps if steps else None,
        processor_seconds_per_step=(time.process_time() - began) / timed if timed > 0 else None,
        peak_bytes=measuring.peak(tools.device),
        machine=measuring.machine(tools.device),
    )


def _moved(plan: Plan, cell: Cell, record: Mapping[str, Any]) -> dict[str, float] | None:
    if cell.method == BASE or record["diverged"]:
        return None
    family = worker.tools(plan.settings.training).family
    return vars(update_size(plan.folder(cell), family.networks, cell.seed))


def _generate(plan: Plan, cell: Cell) -> None:
    from singlora_diffusion.sampling.generate import generate

    family = worker.tools(plan.settings.training).family
    for made in generations(plan, cell).values():
        generate(made, quiet=True, family=family)


def _told(made: Any) -> dict[str, Any]:
    """Settings as JSON. Where folders lie and how many images are made at once does not change a result."""
    places = ("output_dir", "instance_data_dir", "adapter", "class_data_dir", "device", "batch_size", "overwrite")
    return {key: value for key, value in settings.as_json(made).items() if key not in places}
