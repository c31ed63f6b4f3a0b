"""What a finished run leaves for other programs and for the hub: an ordinary LoRA, a model card, an upload."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from safetensors import safe_open

import train_dreambooth
from singlora_diffusion import formats
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import native
from singlora_diffusion.formats.header import to_publish
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import model_card, run_folder
from singlora_diffusion.training.recipe import Recipe, recorded


class Hub:
    """In place of the hub: what it was asked for."""

    def __init__(self) -> None:
        self.made: list[tuple[str, bool]] = []
        self.contents: dict[str, bytes] = {}
        self.fails = False

    def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> Any:
        self.made.append((name, private))
        return SimpleNamespace(repo_id=f"me/{name}")

    def upload_folder(self, *, repo_id: str, folder_path: Path, allow_patterns: list[str]) -> None:
        if self.fails:
            raise OSError("the line is dead\nand more")
        found = {path for pattern in allow_patterns for path in Path(folder_path).glob(pattern)}
        self.contents = {str(path.relative_to(folder_path)): path.read_bytes() for path in found}


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Hub:
    fake = Hub()
    monkeypatch.setattr(huggingface_hub, "create_repo", fake.create_repo)
    monkeypatch.setattr(huggingface_hub, "upload_folder", fake.upload_folder)
    return fake


@pytest.fixture
def whole(recipe: Recipe) -> Recipe:
    """Two steps with all outputs."""
    return replaced(recipe, portable=True, max_train_steps=2, validation_steps=1, checkpointing_steps=1)


def test_a_run_folder_as_other_programs_know_it(whole: Recipe, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    from diffusers import StableDiffusionPipeline

    out = whole.output.output_dir
    whole = replaced(whole, push_to_hub=True, validation_prompt="a [sks] dog | `here`")
    train_dreambooth.main(whole)
    said = capsys.readouterr().out
    assert f"{out / run_folder.LORA}: the same as an ordinary LoRA, for ComfyUI" in said
    assert "uploaded to https://huggingface.co/me/run" in said
    assert hub.made == [("run", True)]
    previews = ["previews/step-000001.png", "previews/step-000002.png"]
    assert sorted(hub.contents) == ["README.md", "adapter.safetensors", *previews, "pytorch_lora_weights.safetensors"]

    pipeline = StableDiffusionPipeline.from_pretrained(whole.model.pretrained_model_name_or_path, safety_checker=None)
    pipeline.load_lora_weights(str(out))  # by its usual name
    assert pipeline.get_list_adapters()["unet"]

    _, head, body = (out / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(head)
    assert facts["base_model"] == Path(whole.model.pretrained_model_name_or_path).name
    assert facts["instance_prompt"] == "a photo of sks dog" and "lora" in facts["tags"]
    assert "Trigger words: `sks dog`" in body and "![a  sks  dog    here ](previews/step-000002.png)" in body
    assert "| seed | 0 |" in body and "In ComfyUI" in body
    assert "| max_train_steps | 2 |" in body and "| rank | 2 |" in body
    assert 'weight_name="pytorch_lora_weights.safetensors"' in body
    compile(body.partition("```python\n")[2].partition("```")[0], "card", "exec")

    resumed = replaced(whole, resume_from_checkpoint="latest", max_train_steps=3, portable=False, push_to_hub=False)
    train_dreambooth.main(resumed)
    assert not (out / run_folder.LORA).exists()  # it was that of two steps
    assert "load_lora_weights" not in (card := (out / "README.md").read_text()) and "| max_train_steps | 3 |" in card

    (out / "README.md").write_text("# My own words\n")
    with pytest.raises(UserError, match=r"README\.md would be overwritten and was not written by this program"):
        train_dreambooth.main(replaced(whole, overwrite=True))


def test_no_folder_of_this_machine_goes_to_the_hub(
    whole: Recipe, hub: Hub, tmp_path: Path, training_images: Path
) -> None:
    out, base = whole.output.output_dir, Path(whole.model.pretrained_model_name_or_path)
    named = {"held_out_data_dir": training_images, "encodings_dir": tmp_path / "encodings"}
    train_dreambooth.main(
        replaced(whole, push_to_hub=True, pretrained_vae_model_name_or_path=str(base), max_train_steps=1, **named)
    )
    for name, content in hub.contents.items():
        for folder in (tmp_path, base.parent, training_images.parent):
            assert str(folder).encode() not in content, name
    # what stays here names the base model's folder, which generating needs, and no other
    header = formats.read_header(out)
    assert (header.base_model, header.vae) == (str(base), str(base))
    paths = {name: value for name, value in header.recipe.items() if isinstance(value, str) and "/" in value}
    assert paths.keys() == {"pretrained_model_name_or_path", "pretrained_vae_model_name_or_path"}
    assert header.recipe["instance_data_dir"] == training_images.name
    whole_recipe = json.loads((out / "recipe.json").read_text())
    assert whole_recipe["instance_data_dir"] == str(training_images) and whole_recipe["output_dir"] == str(out)
    (tmp_path / "adapter.safetensors").write_bytes(hub.contents["adapter.safetensors"])
    (there, published), (_, here) = native.read(tmp_path / "adapter.safetensors"), native.read(out)
    assert there.base_model == there.vae == base.name and there.base_hash == header.base_hash
    assert all(torch.equal(published[name], tensor) for name, tensor in here.items())
    assert to_publish(replace(header, base_model="owner/name")).base_model == "owner/name"
    assert to_publish(replace(header, base_model="toyworld")).base_model == "toyworld"


def test_the_card_of_a_single_file(whole: Recipe, hub: Hub, tmp_path: Path) -> None:
    family: Any = SimpleNamespace(source=str(tmp_path / "model.safetensors"), name="stable_diffusion")
    (tmp_path / "model.safetensors").write_bytes(b"")
    family.pipeline = lambda: SimpleNamespace()
    about = {"instance_prompt": "a photo of sks dog", "identifier": "sks", "class_noun": "dog", "images": 3}
    about |= {"resolution": 32, "recipe": recorded(replaced(whole, learning_rate=1e-3))}
    card = model_card.write(whole, family, about, "ComfyUI").read_text()
    assert str(tmp_path) not in card
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == "model.safetensors"
    code = card.partition("```python\n")[2].partition("```")[0]
    assert 'SimpleNamespace.from_single_file("model.safetensors"' in code
    compile(code, "card", "exec")


def test_magnitudes_and_what_has_no_lora_form(whole: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    out = whole.output.output_dir
    plain = replaced(whole, validation_steps=0, checkpointing_steps=0)
    train_dreambooth.main(replaced(plain, dora=True))
    with safe_open(out / run_folder.LORA, "pt") as file:
        assert any("magnitude" in key for key in file.keys())  # noqa: SIM118

    train_dreambooth.main(replaced(plain, method="oft", overwrite=True))
    assert f"note: no {run_folder.LORA}: no LoRA file can hold oft" in capsys.readouterr().out
    assert not (out / run_folder.LORA).exists() and (out / ".old-1" / run_folder.LORA).exists()
    assert "lora" not in yaml.safe_load((out / "README.md").read_text().split("---\n")[1])["tags"]
    assert formats.read_header(out / "adapter.safetensors").step == 2


def test_what_stands_in_the_way_of_the_outputs_is_named(whole: Recipe) -> None:
    out = whole.output.output_dir
    out.mkdir()
    (out / run_folder.LORA).write_bytes(b"precious")
    with pytest.raises(UserError, match=r"pytorch_lora_weights\.safetensors would be overwritten"):
        train_dreambooth.main(whole)
    assert (out / run_folder.LORA).read_bytes() == b"precious"


def test_a_hub_that_does_not_work(whole: Recipe, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    out = whole.output.output_dir
    plain = replaced(whole, validation_steps=0, push_to_hub=True, hub_model_id="you/dog")
    hub.fails = True
    with pytest.raises(UserError) as error:
        train_dreambooth.main(plain)
    said, again = str(error.value).split("hf upload me/you/dog ")
    assert said == f"the adapter is in {out}, but uploading it failed (the line is dead); later: "
    assert sorted(path.name for path in Path(again).iterdir()) == ["README.md", "adapter.safetensors", run_folder.LORA]
    shutil.rmtree(again)
    assert (out / "adapter.safetensors").exists() and (out / "README.md").exists()

    def refuses(*_: Any, **__: Any) -> None:
        raise ValueError("log in first")

    monkeypatch.setattr(huggingface_hub, "create_repo", refuses)
    with pytest.raises(UserError, match="--push_to_hub: you/dog cannot be used: log in first"):
        train_dreambooth.main(replaced(plain, output_dir=out / "other"))
    assert not list((out / "other").glob("*.safetensors"))
