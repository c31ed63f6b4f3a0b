"""Files: what an adapter is, and the ways into other programs and back."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gradio as gr

from ... import files as written
from ... import settings
from ...errors import UserError
from ...formats import commands, file_kinds, forms
from ...formats.settings import AddSettings, ExportSettings, ImportSettings, InspectSettings
from ...training import run_folder
from .. import asking, saying
from ..places import Places
from ..widgets import chosen, command, command_line, dropped, listed, told

PRECISIONS = [("32 bits, exact", "float32"), ("16 bits, half the file", "fp16"), ("bfloat16", "bf16")]
TOOLS = sorted(
    {tool for table in forms.TABLE.values() for form in table.values() for tool in form.readers.split(", ")},
    key=str.lower,
)
"""The programs that some form is read by."""


def build(places: Places, page: gr.Blocks, tab: gr.Tab) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h2>An adapter</h2>")
            adapter = gr.Dropdown([], label="Adapter", elem_id="adapter")
            drop = gr.File(label="Drop an adapter file here", file_types=[".safetensors"], height=150)
            look = gr.Button("What is it?", elem_id="inspect")
            with gr.Accordion("Hand it to another program", open=True):
                tool = gr.Dropdown(TOOLS, value="ComfyUI", label="I use", elem_id="tool")
                precision = gr.Dropdown(PRECISIONS, value="float32", label="Precision")
                export = gr.Button("Export", variant="primary", elem_id="export")
            with gr.Accordion("Take in a SingLoRA of another program", open=False):
                base = gr.Dropdown(
                    places.models(), value="toyworld", label="It was trained on", allow_custom_value=True
                )
                take = gr.Button("Import", elem_id="import")
            with gr.Accordion("Merge", open=False):
                several = gr.Dropdown([], multiselect=True, label="SingLoRAs to add up, exactly")
                scale = gr.Textbox("1", label="Strengths", info="One for all, or one for each: 1 0.7.")
                add = gr.Button("Add up", elem_id="add")
                whole = gr.Button("Write the base model with the adapter in it", elem_id="whole")
        with gr.Column(scale=3, min_width=300):
            download = gr.File(label="Download", visible=False, interactive=False, elem_id="download")
            said = gr.Textbox(label="What the command says", interactive=False, lines=12, max_lines=40, elem_id="said")
            line = command_line()

    @told
    def receive(upload: str | None) -> Any:
        source = Path(upload or "")
        if file_kinds.recognise(source).kind == file_kinds.UNKNOWN:
            raise file_kinds.refuse(file_kinds.recognise(source))
        target = _new(places, source.stem)
        written.write_bytes(target, source.read_bytes())
        return gr.update(choices=listed(places, places.adapter_files()), value=str(target))

    @told
    def inspect(path: str | None) -> Any:
        wanted = InspectSettings(str(places.inside(path, "Adapter")))
        return (
            saying.printed(commands.inspect, wanted),
            command(settings.command_line("inspect", wanted)),
            gr.update(visible=False),
        )

    @told
    def hand_on(path: str | None, program: str, bits: str) -> Any:
        source = places.inside(path, "Adapter")
        wanted = ExportSettings(
            str(source),
            output=str(_new(places, f"{_name(source)}-{program}-{bits}")),
            format=asking.form_for(program, source),  # type: ignore[arg-type]
            dtype=bits,  # type: ignore[arg-type]
        )
        return _done(saying.printed(commands.export, wanted), "export", wanted, wanted.output)

    @told
    def take_in(path: str | None, model: str | None) -> Any:
        source = places.inside(path, "Adapter")
        wanted = ImportSettings(str(source), str(_new(places, f"{_name(source)}-imported")), places.base(model))
        return _done(saying.printed(commands.import_, wanted), "import", wanted, wanted.output)

    @told
    def add_up(paths: list[str] | None, strengths: str) -> Any:
        sources = [str(places.inside(path, "SingLoRAs")) for path in paths or []]
        if len(sources) < 2:
            raise UserError("SingLoRAs to add up: choose two or more")
        numbers, wrong = settings.typed(AddSettings, {"scale": (strengths or "1").replace(",", " ").split()})
        if wrong:
            raise UserError(*wrong)
        name = "+".join(_name(Path(one)) for one in sources)[:60].replace("+", " and ")
        wanted = AddSettings(tuple(sources), str(_new(places, name)), numbers["scale"])
        settings.check(wanted)
        return _done(saying.printed(commands.add, wanted), "add", wanted, wanted.output)

    @told
    def write_whole(path: str | None) -> Any:
        source = places.inside(path, "Adapter")
        wanted = ExportSettings(str(source), merge_into=str(_free(places.root / f"{_name(source)}-merged")))
        return (
            saying.printed(commands.export, wanted),
            command(settings.command_line("export", wanted)),
            gr.update(visible=False),
        )

    @told
    def refresh(one: str | None) -> Any:
        choices = listed(places, places.adapter_files())
        return chosen(choices, one), gr.update(choices=choices)

    told_by = [said, line, download]
    dropped(drop, receive, drop, adapter)
    alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "model"}
    look.click(inspect, adapter, told_by, **alone)
    export.click(hand_on, [adapter, tool, precision], told_by, **alone)
    take.click(take_in, [adapter, base], told_by, **alone).then(refresh, adapter, [adapter, several])
    add.click(add_up, [several, scale], told_by, **alone).then(refresh, adapter, [adapter, several])
    whole.click(write_whole, adapter, told_by, **alone)
    gr.on([page.load, tab.select], refresh, adapter, [adapter, several])


def _done(said: str, name: str, wanted: Any, output: str | None) -> Any:
    return said, command(settings.command_line(name, wanted)), gr.update(value=output, visible=True)


def _name(source: Path) -> str:
    """What a file is called for: a run by its folder, a checkpoint by the run too."""
    inner = source.name == run_folder.BEST or run_folder.CHECKPOINT.fullmatch(source.name)
    return f"{source.parent.name}-{source.name}" if inner else source.stem if source.is_file() else source.name


def _new(places: Places, name: str) -> Path:
    """A file for an adapter; nothing that is there is replaced."""
    plain = re.sub(r"[^\w .-]+", "-", name).lstrip("_ .-")[:50]  # a file may be called "rex (1)"
    return _free(places.new(places.adapters, f"{plain or 'adapter'}.safetensors", "Adapter"))


def _free(path: Path) -> Path:
    number, free = 2, path
    while free.exists():
        free = path.with_name(f"{path.stem}-{number}{path.suffix}")
        number += 1
    return free
