"""Score: how much images look like the subject and show what was asked for; several sets side by side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from eval import report, score

from ... import settings
from ...errors import UserError
from .. import saying
from ..places import REPORT, Places
from ..widgets import chosen, command, command_line, listed, told


def build(places: Places, page: gr.Blocks, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h2>How good are they?</h2>")
            images = gr.Dropdown([], label="Generated images", elem_id="scored")
            references = gr.Dropdown(
                [], label="Real images", info="Of the subject. Without them only the prompts are checked."
            )
            go = gr.Button("Score", variant="primary", elem_id="score")
            gr.HTML("<h2>Side by side</h2>")
            several = gr.Dropdown(
                [], multiselect=True, label="Sets of images", info="One column each; score them first."
            )
            side = gr.Button("Put them on one page", elem_id="side")
            found = gr.Dropdown([], label="Pages that are there", info="Of `singlora report` and `singlora compare`.")
        with gr.Column(scale=3, min_width=300):
            table = gr.HTML("<p>Nothing has been scored yet.</p>", elem_id="scores")
            shown = gr.HTML(elem_id="report")
            line = command_line()

    @told
    def rate(folder: str | None, against: str | None) -> Any:
        wanted = settings.build(
            score.ScoreSettings,
            images=places.inside(folder, "Generated images"),
            references=places.inside(against, "Real images") if against else None,
        )
        return _table(score.score(wanted)), command(settings.command_line("score", wanted))

    @told
    def compare(folders: list[str] | None, against: str | None) -> Any:
        if not folders:
            raise UserError("Sets of images: choose at least one")
        wanted = report.ReportSettings(
            runs=tuple(places.inside(folder, "Sets of images") for folder in folders),
            references=places.inside(against, "Real images") if against else None,
            output=places.galleries / REPORT,
        )
        saying.printed(report.run, wanted)
        return _framed(wanted.output), command(settings.command_line("report", wanted))

    @told
    def show(path: str | None) -> str:
        return _framed(places.inside(path, "Pages")) if path else ""

    @told
    def refresh(one: str | None, other: str | None) -> Any:
        sets = listed(places, places.generated())
        return (
            chosen(sets, one),
            chosen(listed(places, places.image_folders()), other),
            gr.update(choices=sets),
            gr.update(choices=listed(places, places.reports()), value=None),
        )

    go.click(rate, [images, references], [table, line], concurrency_limit=1, concurrency_id="model")
    side.click(compare, [several, references], [shown, line])
    found.input(show, found, shown)
    gr.on([page.load, tab.select], refresh, [images, references], [images, references, several, found])


def _table(result: dict[str, Any]) -> str:
    """Every score with what it means, and what is to be known about them."""
    rows = ""
    for metric in result["metrics"].values():
        value = metric["mean"] if "mean" in metric else metric["value"]
        numbers = [f"<td>{'' if one is None else format(one, '.3f')}</td>" for one in (value, metric["real_to_real"])]
        turn = "" if metric["higher_is_better"] else " Lower is better."
        label, about = saying.safe(metric["label"]), saying.safe(metric["about"], 1000)
        rows += f'<tr><th scope="row">{label}</th>{"".join(numbers)}<td class="text">{about}.{turn}</td></tr>'
    remarks = [f"protocol {result['protocol']}: {result['protocol_because']}"]
    if result["reference_mode"] == "train":
        remarks.append("the real images were trained on, so likeness is flattered")
    remarks += [f"no {name}: {why}" for name, why in result["skipped"].items()]
    remarks += [
        f"{result[name]} {what}" for name, what in (("blank", "of one colour"), ("copies", "copies")) if result[name]
    ]
    head = "".join(f'<th scope="col">{word}</th>' for word in ("score", "these", "real images", "what it says"))
    said = "".join(f"<li>{saying.safe(one, 1000)}</li>" for one in remarks)
    return (
        f"<h2>{result['count']} images</h2>"
        f'<div class="scroll" tabindex="0"><table class="scores"><tr>{head}</tr>{rows}</table></div><ul>{said}</ul>'
    )


def _framed(path: Path) -> str:
    """A page of this program inside the page: it may run no scripts and ask for nothing."""
    html = saying.html.escape(path.read_text(encoding="utf-8", errors="replace"))
    return f'<iframe class="report" title="Report" sandbox srcdoc="{html}"></iframe>'
