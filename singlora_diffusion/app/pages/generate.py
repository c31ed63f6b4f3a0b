"""Generate: images with adapters of any strength, and the same prompt and seed without them, one over the other."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from ... import settings
from .. import asking, making, saying
from ..asking import BASE, NOTHING, SLOTS
from ..places import Places
from ..widgets import command, command_line, dropped, listed, told

SAMPLERS = [("the model's own", ""), *making.SCHEDULERS]
NO_ADAPTER = [("nothing", NOTHING), ("the base model alone", BASE)]
"""What images are compared with besides an adapter."""


def build(places: Places, page: gr.Blocks, tab: gr.Tab, maker: making.Maker) -> None:
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            gr.HTML("<h2>What should the images show?</h2>")
            prompt = gr.Textbox(elem_id="prompt", label="Prompt", placeholder="a photo of sks dog in the snow", lines=2)
            adapters, strengths = [], []
            for number in range(SLOTS):
                with gr.Accordion(f"Adapter {number + 1}", open=number == 0):
                    adapters.append(
                        gr.Dropdown(
                            [],
                            value=None,
                            label=f"Adapter {number + 1}",
                            info="A run, its best step, a checkpoint, or a file." if number == 0 else "Several add up.",
                        )
                    )
                    strengths.append(
                        gr.Slider(0, 2, value=1, step=0.05, label=f"Strength {number + 1}", info="1 as it was trained.")
                    )
            beside = gr.Dropdown(
                NO_ADAPTER,
                value=BASE,
                label="Compare with",
                info="The same prompt and seeds once more, with another adapter or with none.",
            )
            seeds = gr.Textbox("0-3", elem_id="seeds", label="Seeds", info="One image for each: 7, or 0,5,7, or 0-3.")
            with gr.Accordion("Advanced", open=False):
                base = gr.Textbox("", label="Base model", info="Empty: what the first adapter was trained on.")
                negative = gr.Textbox("", label="Negative prompt", info="What the images are steered away from.")
                steps = gr.Textbox("", label="Denoising steps", info="Empty: what suits the model.")
                guidance = gr.Textbox("", label="Guidance", info="Strength of the prompt. Empty: what suits the model.")
                width = gr.Textbox("", label="Width", info="In pixels. Empty: the model's own.")
                height = gr.Textbox("", label="Height", info="In pixels. Empty: the model's own.")
                sampler = gr.Dropdown(SAMPLERS, value="", label="Sampler")
            make = gr.Button("Generate", variant="primary", elem_id="make")
            drop = gr.File(elem_id="recipe", label="Settings of an image made here", height=150)
        with gr.Column(scale=3, min_width=300):
            over = gr.ImageSlider(
                label="Drag the line", visible=False, interactive=False, elem_id="over", max_height=560
            )
            first = gr.Gallery(
                label="Images", columns=4, height="auto", visible=False, elem_id="images", buttons=["download"]
            )
            second = gr.Gallery(
                label="Compared with", columns=4, height="auto", visible=False, elem_id="others", buttons=["download"]
            )
            line = command_line()
    made = gr.State(([], []))
    given = [prompt, *adapters, *strengths, beside, seeds, base, negative, steps, guidance, width, height, sampler]

    @told
    def generate(*held: Any) -> Any:
        one, other = asking.images(places, held)
        others = maker.make(other) if other is not None else []
        images = maker.make(one)
        commands = [settings.command_line("generate", each) for each in (one, other) if each is not None]
        return (
            _pair(images, others, 0),
            gr.update(value=_captioned(images), visible=True, selected_index=None),
            gr.update(value=_captioned(others), visible=bool(others), selected_index=None),
            command("\n".join(commands)),
            (list(map(str, images)), list(map(str, others))),
        )

    @told
    def choose(held: tuple[list[str], list[str]], event: gr.SelectData) -> Any:
        images, others = ([Path(one) for one in each] for each in held)
        return _pair(images, others, int(event.index))

    @told
    def restore(upload: str | None) -> Any:
        if upload is None:
            return [gr.skip()] * len(given)
        values, lines = asking.restored(places, Path(upload))
        for one in lines:
            gr.Warning(saying.safe(one, 2000), duration=None, title="The adapter may differ")
        return [gr.skip() if one is beside else value for one, value in zip(given, values, strict=True)]

    @told
    def refresh(*held: str | None) -> Any:
        """Lists of what there is by now; the youngest run is chosen where nothing was."""
        choices = listed(places, places.adapter_files())
        there = {value for _, value in choices}
        newest = choices[0][1] if choices else None
        lists = [
            gr.update(choices=choices, value=one if one in there else newest if number == 0 else None)
            for number, one in enumerate(held)
        ]
        return [*lists, gr.update(choices=[*NO_ADAPTER, *choices])]

    make.click(generate, given, [over, first, second, line, made], concurrency_limit=1, concurrency_id="model")
    first.select(choose, made, over, show_progress="hidden")
    second.select(choose, made, over, show_progress="hidden")
    dropped(drop, restore, drop, given)
    gr.on([page.load, tab.select], refresh, adapters, [*adapters, beside], show_progress="hidden")


def _pair(images: Sequence[Path], others: Sequence[Path], number: int) -> Any:
    """One image over the other, where there are two."""
    if number >= min(len(images), len(others)):
        return gr.update(value=None, visible=False)
    seed = images[number].stem.partition("-")[2]
    value = (str(others[number]), str(images[number]))
    label = f"Seed {seed}: the image on the right, what it is compared with on the left"
    return gr.update(value=value, visible=True, label=label)


def _captioned(images: Sequence[Path]) -> list[tuple[str, str]]:
    return [(str(image), f"seed {image.stem.partition('-')[2]}") for image in images]
