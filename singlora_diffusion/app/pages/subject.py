"""Subject: the images to learn from, what is odd about them, what they are called, and their captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from ... import settings
from ...data.check_command import CheckSettings
from ...data.checking import Finding
from .. import saying, subjects
from ..places import Places
from ..widgets import command, command_line, dropped, listed, told

MOST = 60
"""Images that are shown."""


@dataclass(frozen=True)
class SubjectFields:
    """What the other pages ask of the subject."""

    folder: gr.Dropdown
    identifier: gr.Textbox
    class_noun: gr.Textbox

    @property
    def all(self) -> list[Any]:
        return [self.folder, self.identifier, self.class_noun]


def build(places: Places) -> SubjectFields:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h2>Who or what is it?</h2><p>3 to 20 images of one subject, from different sides.</p>")
            name = gr.Textbox(
                elem_id="name", label="Name", placeholder="rex", info="A folder of this name is made for the images."
            )
            drop = gr.File(elem_id="drop", label="Drop the images here", file_count="multiple", height=140)
            folder = gr.Dropdown(
                listed(places, places.image_folders()),
                value=None,
                elem_id="folder",
                label="Images",
                allow_custom_value=True,
                info="A subject that is there already, or a folder.",
            )
            class_noun = gr.Textbox(
                elem_id="noun", label="What is it?", placeholder="dog", info="The class noun, as in dog or teapot."
            )
            identifier = gr.Textbox(
                "sks",
                label="Rare word",
                info="The identifier: a word that means nothing yet. In prompts it will stand for your subject, as in "
                "“a photo of sks dog in the snow”.",
            )
        with gr.Column(scale=3, min_width=300):
            summary = gr.HTML("<p>No images yet.</p>", elem_id="findings")
            shown = gr.State(None)
            _grid(shown)
            line = command_line()
    fields = SubjectFields(folder, identifier, class_noun)

    @told
    def take(named: str, uploads: list[str] | None, before: str | None, count: int) -> Any:
        target = places.new(places.subjects, named or _free(places), "Name")
        refused = subjects.take(target, [Path(upload) for upload in uploads or []])
        for one in refused:
            gr.Warning(saying.safe(one, 1000), duration=None, title="Left out")
        found = places.image_folders()
        there = str(target) if target in found else None
        again = count + (there == before)  # else the list changes, which is a reason to look
        return gr.update(choices=listed(places, found), value=there), named or target.name, again

    @told
    def look(named: str | None) -> Any:
        if not named:
            return "<p>No images yet.</p>", None, gr.update(visible=False)
        found = subjects.look(places.inside(named, "Images"))
        checked = CheckSettings(found.folder)
        return _summary(found), found, command(settings.command_line("check", checked))

    into_the_same = gr.State(0)
    dropped(drop, take, [name, drop, folder, into_the_same], [folder, name, into_the_same])
    gr.on([folder.change, into_the_same.change], look, folder, [summary, shown, line])
    return fields


def _grid(shown: gr.State) -> None:
    """The images with their captions, whenever others are to be shown."""

    @gr.render(inputs=shown)
    def draw(found: subjects.Subject | None) -> None:
        if found is None:
            return
        with gr.Row(elem_classes="grid"):
            for one in found.images[:MOST]:
                with gr.Column(min_width=150, scale=1, elem_classes="card"):
                    gr.HTML(_card(one))
                    text = gr.Textbox(
                        one.caption,
                        label=f"Caption of {saying.escaped(one.name, 40)}",
                        placeholder="none: the prompt is used",
                        lines=1,
                        max_lines=4,
                    )

                    @told
                    def keep(written: str, path: Path = one.path) -> None:
                        subjects.write_caption(path, written)

                    gr.on([text.blur, text.submit], keep, text, None, show_progress="hidden")


def _card(one: subjects.Shown) -> str:
    name = saying.safe(one.name)
    said = "".join(f"<li>{_said(finding)}</li>" for finding in one.findings)
    seen, title = (", with what its mask leaves out hatched", f"{name}, mask") if one.masked else ("", name)
    return (
        f'<figure class="{"odd" if said else "fine"}">'
        f'<img src="{one.thumbnail}" alt="{name}, as it is trained on{seen}">'
        f"<figcaption>{title}</figcaption></figure>" + (f"<ul>{said}</ul>" if said else "")
    )


def _summary(found: subjects.Subject) -> str:
    many = f"{len(found.images)} image{'s' * (len(found.images) != 1)}"
    odd = sum(1 for one in found.images if one.findings)
    lines = "".join(
        f"<li>{f'<b>{saying.safe(one.name)}</b> ' if one.name else ''}{_said(one)}</li>" for one in found.findings
    )
    if masked := sum(one.masked for one in found.images):
        have = "has a mask" if masked == 1 else "have masks"
        lines += f"<li>{masked} {have}: masked_loss, under Train, Advanced, leaves out what is hatched</li>"
    marked = f"{odd} marked below" if odd else "nothing odd about them"
    title = f"<h2>{many}, cropped as the trainer does; {marked}</h2>" if found.images else "<h2>No images</h2>"
    return title + (f"<ul>{lines}</ul>" if lines else "")


def _said(one: Finding) -> str:
    return f"{saying.safe(one.what)}; {saying.safe(one.fix)}"


def _free(places: Places) -> str:
    number = 1
    while (places.subjects / f"subject-{number}").exists():
        number += 1
    return f"subject-{number}"
