"""Train: what is learned, how much of it, what that comes to; then how far it is."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import gradio as gr

from ... import files, settings
from ...adapters import AdapterConfig, budget
from ...adapters.methods import METHODS
from ...errors import UserError
from ...training import log_file, run_folder
from ...training.recipe import Recipe
from .. import asking, drawing, fields, jobs, presets, progress, saying
from ..places import Places
from ..widgets import command, command_line, grouped, listed, told
from .subject import SubjectFields

LOOK = 5.0
"""Seconds between two looks at what runs."""
NO_PRESET = ("none", "")
LABELS = {
    "waiting": "waits for its turn",
    "running": "training",
    "paused": "paused",
    "stopping": "stops after this step",
    "done": "done",
    "stopped": "stopped",
    "failed": "failed",
    "lost": "broken off",
    "withdrawn": "taken out of the queue",
}


def build(places: Places, subject: SubjectFields, page: gr.Blocks) -> gr.Dropdown:
    advanced_fields = [one for one in fields.of(Recipe) if one.name not in asking.OWN]
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h2>What is to be learned, and how?</h2>")
            name = gr.Textbox(elem_id="run-name", label="Name of the run", info="Empty: the subject's name.")
            base = gr.Dropdown(
                places.models(),
                value="toyworld",
                elem_id="base",
                label="Base model",
                allow_custom_value=True,
                info="A folder, or an id of the Hugging Face hub. toyworld comes with the package.",
            )
            preset = gr.Dropdown(
                _presets("toyworld"),
                value="",
                elem_id="preset",
                label="Preset",
                info="Fills in the settings that somebody has published or measured for this base model.",
            )
            source = gr.HTML(elem_id="source")
            method = gr.Radio(
                [(row.label, key) for key, row in METHODS.items()],
                value="singlora",
                label="Method",
                info="SingLoRA trains one matrix per layer; the others are there to compare with.",
            )
            rank = gr.Slider(
                1, 128, value=16, step=1, label="Size (rank)", info="How much can be learned. More takes more images."
            )
            sizes = gr.HTML()
            steps = gr.Number(400, elem_id="steps", precision=0, label="Steps", info="How long it learns.")
            rate = gr.Textbox(
                "",
                label="Learning rate",
                info="Empty: what is usual for the base model and the method. auto: found in short trainings first.",
                placeholder="1e-3",
            )
            with gr.Accordion("Advanced: all other settings", open=False):
                advanced = grouped(advanced_fields)
            with gr.Row():
                plan = gr.Button("Plan", elem_id="plan")
                start = gr.Button("Start", variant="primary", elem_id="start")
            planned = gr.HTML()
            line = command_line()
        with gr.Column(scale=3, min_width=300):
            run = gr.Dropdown(listed(places, places.runs()), value=None, label="Run", elem_id="run")
            status = gr.HTML("<p>Nothing has been trained yet.</p>", elem_id="status")
            with gr.Row():
                pause = gr.Button("Pause", elem_id="pause", interactive=False)
                stop = gr.Button("Stop, with a checkpoint", elem_id="stop", interactive=False)
                go_on = gr.Button("Go on", elem_id="go-on", interactive=False)
            preview = gr.Image(label="Preview", interactive=False, visible=False, buttons=["fullscreen"])
            queue = gr.HTML(elem_id="queue")
    named = {"method": method, "rank": rank, "max_train_steps": steps, "learning_rate": rate, **advanced}
    filled = [named[one] for one in presets.TOUCHED]
    targets = advanced["targets"]
    assert isinstance(targets, gr.Textbox)
    main = [name, base, method, rank, steps, rate]
    form = [*subject.all, *main, *advanced.values()]

    def recipe(given: Sequence[Any]) -> Recipe:
        return asking.training(places, list(advanced), given)

    @told
    def show_sizes(model: str, chosen: str, size: float | None, targets: str) -> str:
        layers = fields.read(AdapterConfig, {"targets": targets}, {}).targets
        return _sizes(places.base(model), chosen, int(size or 1), layers)

    @told
    def offer(model: str, key: str) -> Any:
        """The presets of another base model. What is filled in by one that is not for it is taken back."""
        try:
            choices = _presets(places.base(model))
        except UserError:  # which is said for the sizes
            choices = [NO_PRESET]
        if key in dict(choices).values():
            return [gr.update(choices=choices), gr.skip(), *[gr.skip()] * len(filled)]
        return [gr.update(choices=choices, value=""), "", *_filled(None)]

    @told
    def fill(model: str, key: str) -> Any:
        chosen = presets.chosen(places.base(model), key)
        return [f"<p>{saying.safe(chosen.source, 1000)}</p>" if chosen else "", *_filled(chosen)]

    @told
    def show_plan(*given: Any) -> Any:
        wanted = recipe(given)
        words = settings.command_line("train", wanted)
        return _plan(wanted), command(words)

    @told
    def begin(*given: Any) -> Any:
        wanted = recipe(given)
        run_folder.check(wanted.output)
        words = settings.command_line("train", wanted)
        job = jobs.add(places.queue, shlex.split(words)[1:], wanted.output.output_dir)
        return command(words), gr.update(choices=_runs(places), value=str(job.run))

    @told
    def hold(shown: str | None) -> None:
        if (job := jobs.latest(places.queue, places.inside(shown, "Run"))) is not None:
            jobs.pause(job)

    @told
    def end(shown: str | None) -> None:
        if (job := jobs.latest(places.queue, places.inside(shown, "Run"))) is not None:
            jobs.stop(job)

    @told
    def continue_(shown: str | None) -> Any:
        """A paused training goes on; of one that was stopped, another job is the rest."""
        run = places.inside(shown, "Run")
        job = jobs.latest(places.queue, run)
        if job is not None and job.open:
            jobs.go_on(job)
            return gr.skip()
        wanted = asking.continuation(places, run)
        words = settings.command_line("train", wanted)
        jobs.add(places.queue, shlex.split(words)[1:], wanted.output.output_dir)
        return command(words)

    seen = gr.State({})

    @told
    def look(shown: str | None, before: dict[str, Any]) -> Any:
        """What has changed since the last look; nothing else is sent."""
        jobs.tend(places.queue)
        now = _look(places, shown)
        keys = ("status", "pause", "stop", "go_on", "preview", "queue")
        changes = [gr.skip() if before.get(key) == now[key] else _update(key, now[key]) for key in keys]
        return [*changes, now if now != before else gr.skip()]

    @told
    def find() -> Any:
        """The run that goes on, or else the last one of the queue, or the youngest: what a reload shows."""
        there = jobs.jobs(places.queue)
        begun = (one for one in there if one.open and one.state != "waiting")
        going = next(begun, there[-1] if there else None)
        choices = _runs(places)
        youngest = choices[0][1] if choices else None
        return gr.update(choices=choices, value=str(going.run) if going else youngest)

    offered = base.change(offer, [base, preset], [preset, source, *filled], show_progress="hidden")
    preset_filled = preset.input(fill, [base, preset], [source, *filled], show_progress="hidden")
    sized_by = [base, method, rank, targets]
    gr.on(
        [method.change, rank.change, targets.blur, targets.submit], show_sizes, sized_by, sizes, show_progress="hidden"
    )
    for changed in (offered, preset_filled):
        changed.then(show_sizes, sized_by, sizes, show_progress="hidden")
    plan.click(show_plan, form, [planned, line])
    start.click(begin, form, [line, run])
    begun = [pause.click(hold, run, None), stop.click(end, run, None), go_on.click(continue_, run, line)]
    watched = [status, pause, stop, go_on, preview, queue, seen]
    gr.Timer(LOOK).tick(look, [run, seen], watched, show_progress="hidden", queue=False)
    run.change(look, [run, seen], watched, show_progress="hidden")
    for asked in begun:
        asked.then(look, [run, seen], watched, show_progress="hidden")
    page.load(find, None, run, show_progress="hidden")
    page.load(show_sizes, sized_by, sizes, show_progress="hidden")
    return run


def _presets(base: str) -> list[tuple[str, str]]:
    """Choices for a base model.

    Raises:
        UserError: it cannot be found out what it is.
    """
    return [NO_PRESET, *((one.name, one.key) for one in presets.offered(base))]


def _filled(chosen: presets.Preset | None) -> list[Any]:
    """What the fields show, in the order of `presets.TOUCHED`."""
    kept = presets.held(chosen)
    return [int(value) if name in ("rank", "max_train_steps") else value for name, value in kept.items()]


@lru_cache(maxsize=8)
def _shapes(base: str, targets: tuple[str, ...] | None) -> tuple[budget.Shape, ...]:
    return tuple(budget.shapes(base, targets))


@lru_cache(maxsize=256)
def _matches(base: str, method: str, rank: int, targets: tuple[str, ...] | None) -> dict[str, budget.Match]:
    layers = _shapes(base, targets)
    goal = budget.count(method, rank, layers)
    return {row: budget.match(goal, row, layers) for row in METHODS}


def _sizes(base: str, method: str, rank: int, targets: tuple[str, ...] | None) -> str:
    """Exact numbers of trained parameters in the denoiser and sizes of files: of what is chosen, and of the others."""
    goal = budget.count(method, rank, _shapes(base, targets))
    rows = "".join(
        f'<tr{" class=chosen" * (row == method)}><th scope="row">{METHODS[row].label}</th>'
        f"<td>{rank if row == method else one.rank}</td><td>{goal if row == method else one.parameters:,}</td>"
        f"<td>{4 * (goal if row == method else one.parameters) / 1e6:.2f} MB</td></tr>"
        for row, one in _matches(base, method, rank, targets).items()
    )
    caption = "About the same size in each method, without text encoders"
    head = (
        '<th scope="col">method</th><th scope="col">rank</th><th scope="col">parameters</th><th scope="col">file</th>'
    )
    return (
        f'<div class="scroll" tabindex="0"><table class="sizes"><caption>{caption}</caption>'
        f"<tr>{head}</tr>{rows}</table></div>"
    )


def _plan(wanted: Recipe) -> str:
    """What `--plan` says, asked of a process of its own, which gives its memory back."""
    words = [*shlex.split(settings.command_line("train", wanted))[1:], "--plan"]
    done = subprocess.run(
        [sys.executable, "-m", "singlora_diffusion.cli", *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise UserError(*(done.stderr.strip().splitlines()[-1:] or ["the plan was broken off"]))
    figures = [line.removeprefix("# ") for line in done.stdout.splitlines() if line.startswith("# ")]
    notes = [one for one in done.stderr.splitlines() if one.startswith("note: ")]
    return f"<ul>{''.join(f'<li>{saying.safe(one)}</li>' for one in (*figures, *notes))}</ul>"


def _runs(places: Places) -> list[tuple[str, str]]:
    """Choices: those of the queue, its last one also where it failed before it wrote anything; then those on disk."""
    there = jobs.jobs(places.queue)
    queued = [one.run for one in there if one.open or one is there[-1]]
    return listed(places, list(dict.fromkeys([*reversed(queued), *places.runs()])))


_LOGS: dict[Path, progress.Log] = {}


def _look(places: Places, shown: str | None) -> dict[str, Any]:
    there = jobs.jobs(places.queue)
    queue = "".join(f"<li>{saying.safe(places.shown(one.run))}: {LABELS[one.state]}</li>" for one in there if one.open)
    found: dict[str, Any] = {
        "status": "<p>Nothing has been trained yet.</p>",
        "pause": False,
        "stop": False,
        "go_on": False,
    }
    found |= {"preview": None, "queue": f"<h2>Queue</h2><ol>{queue}</ol>" if queue else ""}
    if not shown:
        return found
    run = places.inside(shown, "Run")
    job = jobs.of(there, run)
    log = _LOGS.setdefault(run, progress.Log(run / log_file.NAME))
    now = progress.read(run, log)
    finished = now.adapter is not None and now.step >= now.total
    state = job.state if job is not None else None
    elsewhere = state not in jobs.OPEN and files.is_locked(run)
    found["status"] = _status(places, run, job, now, finished, elsewhere)
    found["pause"] = state == "running"
    found["stop"] = state in ("waiting", "running", "paused")
    found["go_on"] = state == "paused" or (
        bool(now.recipe) and state not in jobs.OPEN and not finished and not elsewhere
    )
    found["preview"] = str(now.previews[-1]) if now.previews else None
    return found


def _update(key: str, value: Any) -> Any:
    if key == "preview":
        label = f"Preview, {Path(value).stem.replace('step-', 'step ').replace(' 0', ' ').strip()}" if value else None
        return gr.update(value=value, visible=bool(value), label=label)
    return gr.update(interactive=value) if isinstance(value, bool) else value


def _status(
    places: Places, run: Path, job: jobs.Job | None, now: progress.Progress, finished: bool, elsewhere: bool
) -> str:
    state = LABELS[job.state] if job is not None else "done" if finished else "not finished"
    if elsewhere:
        state = "training, begun in a terminal: stop it there with Ctrl-C"
    if job is not None and job.state == "running" and not now.rows:
        state = "loading"
    step = f"step {now.step} of {now.total}" if now.total else ""
    left = f"{saying.clock(now.left)} left" if now.left and (elsewhere or (job is not None and job.open)) else ""
    took = f"{saying.clock(now.seconds)} so far" if now.rows and not finished else ""
    lines = [f"<h2>{saying.safe(places.shown(run))}: {state}</h2>"]
    if now.total:
        lines.append(f'<progress max="{now.total}" value="{now.step}" aria-label="steps done"></progress>')
    said = ", ".join(filter(None, (step, left, took)))
    lines.append(f"<p>{said}</p>" if said else "")
    lines += [drawing.losses(now.rows, now.total), drawing.scores(now.rows)]
    if now.best is not None:
        figures = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in now.best.figures.items())
        lines.append(f"<p>Best so far: step {now.best.step}, {saying.safe(figures)}.</p>")
    if now.checkpoints:
        lines.append(f"<p>Checkpoints: {', '.join(map(str, now.checkpoints))}.</p>")
    if job is not None and job.state in ("failed", "lost") and not finished:
        end = "\n".join(job.output.strip().splitlines()[-6:])
        lines.append(f'<pre role="alert">{saying.safe_lines(end)}</pre>')
    if finished:
        lines.append("<p>The adapter is ready: go to <b>Generate</b>, or hand it on under <b>Files</b>.</p>")
    return "".join(lines)
