"""One training, from its recipe to the adapter's file, as a stream of events.

    for event in run(recipe):
        ...

Whoever iterates is told what happens, and decides what becomes of it: nothing is printed here. What is trained and what
it is trained on are known by their contracts only, those of `models.Family` and of an adapter.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import files
from ..errors import UserError
from ..terminal import escaped
from . import material, run_folder
from .diagnosis import NotFinite, cause
from .events import (
    Best,
    Checkpoint,
    Event,
    Exported,
    Interrupted,
    Loaded,
    Preview,
    PutAway,
    Remark,
    Saved,
    Started,
    Step,
    Uploaded,
)
from .recipe import Recipe, adapter_config, check, recorded

if TYPE_CHECKING:  # torch and what needs it are imported once the recipe's own mistakes are named
    from accelerate import Accelerator

    from ..adapters import Adapter
    from ..models import Family
    from .step import Stepper
    from .validation import Scoring, Validated, Validation


@dataclass(frozen=True)
class Job:
    """Everything that the steps need."""

    recipe: Recipe
    stepper: Stepper
    validation: Validation
    identity: dict[str, Any]
    about: dict[str, Any]
    """For the header of adapter files."""
    start: int
    """Steps that are done already."""
    repository: str | None
    """On the hub, where the result goes too."""

    @property
    def out(self) -> Path:
        return self.recipe.output.output_dir

    @property
    def writes(self) -> bool:
        """Of several processes, the first one writes."""
        return self.stepper.accelerator.is_main_process


def run(
    recipe: Recipe,
    stop: Callable[[], bool] = lambda: False,
    family: Family | None = None,
    scoring: Scoring | None = None,
) -> Iterator[Event]:
    """Train an adapter; the last event is `Saved`, or `Interrupted`.

    Args:
        stop: asked after every step; once it says yes, the state is saved and the run ends.
        family: the recipe's base model, for those who train on it many times. It is left as it was. None: it is loaded.
        scoring: as `eval.previews.PreviewScorer`, which training does not know; `--validate scores` needs it.

    Raises:
        UserError: something must be mended first, the training diverged, or a file cannot be written. Checkpoints stay.
    """
    check(recipe)
    run_folder.check(recipe.output)
    found = yield from material.read(recipe)

    from .. import adapters
    from . import identity, memory, preparation, rate_search, result
    from .step import Stepper
    from .validation import Validation

    recipe = preparation.on_this_machine(recipe)
    state = yield from preparation.checkpoint_to_resume(recipe)
    scorer = yield from preparation.scorer(recipe, found, scoring)
    accelerator, family, resolution = yield from preparation.load(recipe, family)
    recipe = preparation.for_model(recipe, family, state)
    config = adapter_config(recipe, state.config.ramp_steps if state else None)
    memory.require(family, config, recipe, resolution)
    with ExitStack() as stack:
        repository = (yield from _claim(recipe, stack)) if accelerator.is_main_process else None
        found = yield from preparation.class_images(recipe, accelerator, family, found, resolution)
        yield from preparation.cut_prompts(recipe, family, found)
        streams = yield from preparation.encoded(recipe, family, resolution, found)
        held_out = yield from preparation.held_out(recipe, family, resolution, found)
        recipe = yield from rate_search.settled(recipe, accelerator, family, streams, found.class_prompt, held_out)
        adapter = adapters.attach(family.networks, config, recipe.optimization.seed)
        stack.callback(adapter.detach)
        yield _loaded(family, adapter, resolution, found.subject.class_noun)
        stepper = Stepper(accelerator, family, adapter, recipe, streams)
        identified = identity.of(recipe, family, found)
        yield from preparation.restore(state, recipe, identified, stepper)
        stack.callback(stepper.release)
        stepper.prepare()
        about = result.about(recipe, family, found, resolution)
        validation = Validation(stepper, recipe, found.shown, resolution, held_out, scorer)
        job = Job(recipe, stepper, validation, identified, about, state.step if state else 0, repository)
        yield from _begin(job)
        if (yield from _steps(job, stop)) and job.writes:
            yield from _saved(job)


def _claim(recipe: Recipe, stack: ExitStack) -> Generator[Event, None, str | None]:
    """Lock the output folder, take out what killed runs left half-written, and put an earlier run away.

    Returns:
        The repository on the hub where the result goes too.
    """
    from . import hub

    output, out = recipe.output, recipe.output.output_dir
    stack.enter_context(files.locked(out, "a training"))
    run_folder.check(output)
    run_folder.clean(out)
    if not output.resume_from_checkpoint:
        anew = output.overwrite and recipe.prior.class_data_dir is None  # class images may be of another prompt
        yield from _put_away(out, [*run_folder.ours(out), *(run_folder.generated(out) if anew else [])])
    return hub.repository(output)


def _begin(job: Job) -> Iterator[Event]:
    job.stepper.accelerator.wait_for_everyone()  # all have read the checkpoint that they go on from
    if job.writes:
        from . import best

        later = [path for path in run_folder.checkpoints(job.out) if run_folder.step_of(path) > job.start]
        kept = best.find(job.out, best.RULES[job.recipe.validation.validate])
        if kept is None or kept.step > job.start:  # the same steps find it again
            later += run_folder.best(job.out)
        yield from _put_away(job.out, later)  # or `latest` would mean one of these, and the limit keep them
        files.write_json(job.out / run_folder.RECIPE, recorded(job.recipe))
    yield Started(job.start, job.recipe.optimization.max_train_steps)


def _put_away(out: Path, entries: Sequence[Path]) -> Iterator[Event]:
    away = run_folder.put_away(out, [entry for entry in entries if entry.exists()])
    if away is not None:
        yield PutAway(away)


def _loaded(family: Family, adapter: Adapter, resolution: int, class_noun: str) -> Loaded:
    return Loaded(
        base_model=family.source,
        prompts=family.prompt_set,
        class_noun=class_noun,
        method=adapter.config.method,
        rank=adapter.config.rank,
        layers=len(adapter.layers()),
        parameters=adapter.num_parameters(),
        resolution=resolution,
        dtype=str(family.dtype).removeprefix("torch."),
    )


def _steps(job: Job, stop: Callable[[], bool]) -> Generator[Event, None, bool]:
    """All steps that are left; returns whether they were done."""
    began, last = time.monotonic(), job.recipe.optimization.max_train_steps
    for step in range(job.start + 1, last + 1):
        try:
            figures = job.stepper.advance(step)
        except NotFinite as error:
            raise UserError(_diagnosis(job, error)) from error
        found = _validated(job, step)
        yield Step(step, *figures, seconds=time.monotonic() - began, **(found.figures if found else {}))
        if found:
            yield Preview(found.preview, step)
            yield from _keep_best(job, step, found.figures)
        if _anyone(job.stepper.accelerator, stop()) and step < last:
            yield Interrupted(step, _save_checkpoint(job, step) if job.writes else None)
            return False
        if job.writes and _is_due(step, job.recipe.output.checkpointing_steps):
            yield Checkpoint(_save_checkpoint(job, step), step)
    job.stepper.accelerator.wait_for_everyone()
    return True


def _validated(job: Job, step: int) -> Validated | None:
    """What a validation finds, where one is due: before a run stops after the step, or it would never be made."""
    due = job.writes and _is_due(step, job.recipe.validation.validation_steps)
    return job.validation.after(step) if due else None


def _keep_best(job: Job, step: int, figures: Mapping[str, float]) -> Iterator[Event]:
    from . import best

    rule = best.RULES[job.recipe.validation.validate]
    if figures and best.is_better(figures, best.find(job.out, rule), rule):
        with job.stepper.in_use():
            path = best.save(job.out, job.stepper.adapter, best.Kept(step, figures, rule.words), job.about)
        yield Best(path, step, figures, rule.words)


def _anyone(accelerator: Accelerator, asked: bool) -> bool:
    """Whether any of the processes says so: all stop after the same step, or some would wait for the others forever."""
    if accelerator.num_processes == 1:
        return asked
    import torch

    return bool(accelerator.reduce(torch.tensor(float(asked), device=accelerator.device), "sum") > 0)


def _is_due(step: int, every: int) -> bool:
    return every > 0 and step % every == 0


def _save_checkpoint(job: Job, step: int) -> Path:
    from . import checkpoint

    scaler = job.stepper.accelerator.scaler
    try:
        return checkpoint.save(
            job.out,
            step,
            job.stepper.adapter,
            job.stepper.raw_optimizer,
            recorded(job.recipe),
            about=job.about,
            identity=job.identity,
            scaler=None if scaler is None else scaler.state_dict(),
            average=job.stepper.average,
            limit=job.recipe.output.checkpoints_total_limit,
        )
    except UserError as error:
        raise UserError(f"{error}{_kept(job)}") from error


def _saved(job: Job) -> Iterator[Event]:
    """The adapter, proved by reading it back, then what others can do with it."""
    from . import hub, model_card, portable, result

    path, header = job.out / run_folder.ADAPTER, {**job.about, "step": job.recipe.optimization.max_train_steps}
    try:
        with job.stepper.in_use():
            result.save(job.stepper.family, job.stepper.adapter, path, header)
    except UserError as error:
        raise UserError(f"{error}{_kept(job)}") from error
    (job.out / run_folder.LORA).unlink(missing_ok=True)  # of fewer steps
    readers = None
    if job.recipe.output.portable:
        try:
            exported, readers = portable.write(path, job.stepper.family)
        except UserError as error:
            yield Remark(f"no {run_folder.LORA}: {error}")
        else:
            yield Exported(exported, readers)
    model_card.write(job.recipe, job.stepper.family, job.about, readers)
    if job.repository is not None:
        yield Uploaded(hub.upload(job.out, job.repository))
    yield Saved(path, path.stat().st_size)


def _diagnosis(job: Job, error: NotFinite) -> str:
    """What happened, why, most likely, and what is left; the state before the bad step is saved."""
    before = error.step - 1
    if before > job.start and job.writes and not (job.out / f"checkpoint-{before}").exists():
        with suppress(UserError):  # numbers that are not finite are not saved: the step before was bad already
            _save_checkpoint(job, before)
    return f"{error}; {cause(error, job.recipe)}{_kept(job)}"


def _kept(job: Job) -> str:
    """Where the newest checkpoint is, for messages of runs that end early."""
    kept = run_folder.checkpoints(job.out)
    return f"; what was learned by step {run_folder.step_of(kept[-1])} is in {escaped(kept[-1], 1000)}" if kept else ""
