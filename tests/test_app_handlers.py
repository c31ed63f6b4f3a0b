"""What the pages do with what stands in their fields: Gradio's handlers, without a browser. Needs the extra [app]."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from singlora_diffusion import files
from singlora_diffusion.adapters import budget
from singlora_diffusion.app import jobs, presets
from singlora_diffusion.app.places import Places
from singlora_diffusion.data import png
from singlora_diffusion.sampling import gallery
from singlora_diffusion.training import run_folder

pytest.importorskip("gradio", reason="needs Gradio, the extra [app]: make app-tests has it")

if TYPE_CHECKING:
    import gradio as gr


@pytest.fixture
def page(tmp_path: Path) -> gr.Blocks:
    from singlora_diffusion.app import server

    (tmp_path / "runs").mkdir()
    return server.build(Places(tmp_path / "runs"))


def handler(page: gr.Blocks, name: str) -> Callable[..., dict[str, Any]]:
    """A handler by its function's name; it answers by the labels of the fields that it fills."""
    (found,) = (one for one in page.fns.values() if one.name == name)
    labels = [one.label or one.elem_id for one in found.outputs]
    return lambda *given: dict(zip(labels, found.fn(*given), strict=True))


def test_a_preset_fills_the_fields_and_says_where_it_comes_from(page: gr.Blocks) -> None:
    (preset,) = presets.offered("toyworld")
    filled = handler(page, "fill")("toyworld", preset.key)
    assert filled["source"] == f"<p>{preset.source}</p>"
    assert (filled["Method"], filled["Size (rank)"], filled["Steps"]) == ("singlora", 16, 400)
    assert (filled["Learning rate"], filled["train_batch_size"], filled["resolution"]) == ("0.001", "4", "")
    none = handler(page, "fill")("toyworld", "")
    assert none == {**filled, "source": "", "Learning rate": ""}


def test_the_sizes_are_those_of_the_chosen_layers(page: gr.Blocks) -> None:
    (show,) = {one.fn for one in page.fns.values() if one.name == "show_sizes"}
    for text, targets in (("", None), ("to_q to_k", ["to_q", "to_k"])):
        parameters = budget.count("singlora", 16, budget.shapes("toyworld", targets))
        assert f"<td>16</td><td>{parameters:,}</td>" in show("toyworld", "singlora", 16, text)


def test_a_run_that_failed_at_once_is_shown_after_a_reload(page: gr.Blocks, tmp_path: Path) -> None:
    """It has written no recipe."""
    run = tmp_path / "runs" / "rex"
    jobs.add(tmp_path / "runs" / ".queue", ["train", "--no_such_flag"], run)
    began = time.monotonic()
    while jobs.jobs(tmp_path / "runs" / ".queue")[0].open:
        assert time.monotonic() - began < 300
        time.sleep(0.1)
    (find,) = (one for one in page.fns.values() if one.name == "find")
    found = find.fn()
    assert found["value"] == str(run) in [value for _, value in found["choices"]]


def test_a_training_in_a_terminal_is_seen(page: gr.Blocks, tmp_path: Path) -> None:
    """It is not offered to go on with; it is, once whoever trained is gone."""
    from singlora_diffusion.app.pages import train

    places, run = Places(tmp_path / "runs"), tmp_path / "runs" / "dog"
    run.mkdir()
    files.write_json(run / run_folder.RECIPE, {"max_train_steps": 9})
    with files.locked(run, "a training"):
        seen = train._look(places, str(run))
    assert "begun in a terminal" in seen["status"] and not seen["go_on"]
    seen = train._look(places, str(run))
    assert "not finished" in seen["status"] and seen["go_on"]


def test_a_dropped_image_brings_its_settings_back(page: gr.Blocks, tmp_path: Path) -> None:
    record = {"file": "000-7.png", "prompt": "a dog", "seed": 7, "base_model": "toyworld", "steps": 12}
    record |= {"negative_prompt": "fog", "guidance_scale": 2.5, "scheduler": "ddim", "width": 48, "height": 64}
    png.write(Image.new("RGB", (8, 8)), tmp_path / "made.png", **{gallery.PNG_KEY: json.dumps(record)})
    fields = handler(page, "restore")(str(tmp_path / "made.png"))
    assert fields.pop("Compare with") == {"__type__": "update"}
    assert {label: value for label, value in fields.items() if value not in (None, 1.0)} == {
        **{"Prompt": "a dog", "Seeds": "7", "Base model": "toyworld", "Negative prompt": "fog"},
        **{"Denoising steps": "12", "Guidance": "2.5", "Sampler": "ddim", "Width": "48", "Height": "64"},
    }


@pytest.mark.parametrize(
    ("dropped", "kept"), [("rex (1)", "rex -1-"), ("_rex", "rex"), ("[x]", "x-"), ("(", "adapter")]
)
def test_an_adapter_of_any_name_is_taken(page: gr.Blocks, tmp_path: Path, dropped: str, kept: str) -> None:
    lora = {"unet.a.lora_A.weight": torch.ones(2, 4), "unet.a.lora_B.weight": torch.ones(4, 2)}
    save_file(lora, tmp_path / f"{dropped}.safetensors")
    (receive,) = (one for one in page.fns.values() if one.name == "receive")
    receive.fn(str(tmp_path / f"{dropped}.safetensors"))
    assert [one.stem for one in (tmp_path / "runs" / "adapters").iterdir()] == [kept]


def test_another_base_model_has_other_presets(page: gr.Blocks) -> None:
    """What one has filled in does not stay where it is not for the base model."""
    (preset,) = presets.offered("toyworld")
    offer = handler(page, "offer")
    stays = offer("toyworld", preset.key)
    assert "value" not in stays["Preset"] and stays["Learning rate"] == {"__type__": "update"}
    other = offer("toyworld-flow", preset.key)
    assert other["Preset"]["value"] == "" and other["source"] == "" and other["Learning rate"] == ""
    assert [key for _, key in other["Preset"]["choices"]] == [
        "",
        *(one.key for one in presets.offered("toyworld-flow")),
    ]
    unknown = offer("/nowhere", "")
    assert unknown["Preset"]["choices"] == [("none", "")]
