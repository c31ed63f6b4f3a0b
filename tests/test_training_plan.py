"""`--plan`: what a recipe comes to, before it is run."""

from __future__ import annotations

import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

import train_dreambooth
from singlora_diffusion import cli, device, formats
from singlora_diffusion.settings import as_json, command_line, replaced
from singlora_diffusion.training import plan, preparation
from singlora_diffusion.training.command_line import Training
from singlora_diffusion.training.recipe import Recipe


def test_a_plan_says_what_the_training_then_is(recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = replaced(recipe, train_text_encoder=True, dora=True, max_train_steps=3, gradient_accumulation_steps=2)
    planned = plan.make(recipe)
    assert not recipe.output.output_dir.exists()
    assert (planned.steps, planned.images, planned.images_seen) == (3, 3, 3 * 2 * 2)
    assert (planned.dtype, planned.device, planned.resolution) == ("float32", "cpu", 32)
    assert planned.fits and 0 < planned.memory < planned.free
    assert planned.seconds_per_step and planned.seconds and planned.seconds > 3 * planned.seconds_per_step

    path = train_dreambooth.main(recipe)
    assert f"on {planned.layers} layers" in (said := capsys.readouterr().out)
    assert f"{planned.parameters:,} trained parameters" in said
    _, state = formats.native.read(path)
    assert planned.file_size == sum(tensor.nbytes for tensor in state.values())


def test_a_plan_at_the_terminal_is_a_config_file(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(command_line("train", recipe))[2:]
    assert cli.run("train", [*words, "--plan"]) == 0
    said = capsys.readouterr().out
    (tmp_path / "plan.yaml").write_text(said)
    resolved = preparation.on_this_machine(replaced(recipe, learning_rate=1e-3))
    assert yaml.safe_load(said) == as_json(resolved)
    lines = [line for line in said.splitlines() if line.startswith("# ")]
    assert [line[2:].partition(":")[0] for line in lines] == ["base model", "trained", "steps", "memory", "time"]
    assert "4, that is 8 images at 32 px, each of the 3 seen 2.67 times on average" in said

    assert cli.run("train", ["--config", str(tmp_path / "plan.yaml"), "--plan"]) == 0
    assert yaml.safe_load(capsys.readouterr().out) == yaml.safe_load(said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["plan.yaml"]


def test_of_several_processes_one_says_the_plan(
    recipe: Recipe, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Recipe] = []
    monkeypatch.setattr(plan, "make", lambda asked: made.append(asked) or SimpleNamespace(remarks=["a remark"]))
    said = []
    for rank in ("0", "1"):
        monkeypatch.setenv("RANK", rank)
        train_dreambooth.train(Training(recipe, plan=True))
        found = capsys.readouterr()
        said.append(found.out + found.err)
    assert len(made) == 2 and "a remark" in said[0] and said[1] == ""  # all of them do the step


@pytest.mark.parametrize("count", [0, 2])
def test_class_images_are_planned_for_and_not_made(recipe: Recipe, count: int) -> None:
    planned = plan.make(replaced(recipe, with_prior_preservation=True, num_class_images=count, ema_decay=0.9))
    assert planned.seconds_per_step and not recipe.output.output_dir.exists()


def test_what_does_not_fit_is_not_tried(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "free_memory", lambda _: 1000)
    planned = plan.make(recipe)
    assert not planned.fits and planned.seconds is None
    assert any("--rank 2: would need about" in remark for remark in planned.remarks)
    assert "does not fit" in str(planned)


def test_a_plan_says_that_the_folder_is_taken(recipe: Recipe) -> None:
    out = recipe.output.output_dir
    out.mkdir()
    (out / "adapter.safetensors").write_bytes(b"precious")
    assert any("would be refused" in remark and "exists" in remark for remark in plan.make(recipe).remarks)
    assert [path.name for path in out.iterdir()] == ["adapter.safetensors"]
