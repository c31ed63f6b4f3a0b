"""What helps to choose: the loss on held-out images, the adapter of the best step, figures and trackers."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth
from singlora_diffusion import formats
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import best, loop, progress_figure, run_folder, tracking, validation
from singlora_diffusion.training.events import Best, Interrupted, Step
from singlora_diffusion.training.recipe import Recipe


def blank(family: object, recipe: Recipe, resolution: int) -> list[Image.Image]:
    """Previews, at once."""
    return [Image.new("RGB", (8, 8))]


@pytest.fixture
def held(recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """With two images that are not trained on."""
    monkeypatch.setattr(validation, "previews", blank)
    folder = tmp_path / "held"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 40, 3), dtype=np.uint8)
    for number, pixels in enumerate(noise):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    return replaced(
        recipe,
        held_out_data_dir=folder,
        validation_steps=2,
        num_validation_images=1,
        checkpointing_steps=2,
        max_train_steps=4,
        learning_rate=2e-2,
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    return {row["step"]: row["validation_loss"] for row in rows(run) if "validation_loss" in row}


@pytest.mark.numerical
def test_the_best_step_is_kept_and_found_again_by_a_resumed_run(held: Recipe, tmp_path: Path) -> None:
    out = held.output.output_dir
    train_dreambooth.main(held)
    found = losses(out)
    assert list(found) == [2, 4] and len(rows(out)) == 4
    kept = best.find(out, best.RULES["loss"])
    assert kept is not None and kept.step == min(found, key=lambda step: found[step])
    assert float(f"{kept.figures['validation_loss']:.8g}") == found[kept.step]
    ours, theirs = (load_file(out / name / "adapter.safetensors") for name in ("best", f"checkpoint-{kept.step}"))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)
    assert formats.read_header(out / "best").step == kept.step

    cut = replaced(held, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    shutil.copytree(out / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    shutil.copytree(out / "best", tmp_path / "cut" / "best")
    shutil.copy(out / "recipe.json", tmp_path / "cut")
    train_dreambooth.main(cut)
    assert losses(tmp_path / "cut") == {step: loss for step, loss in found.items() if step > 2}
    assert kept.step == 2 or best.find(tmp_path / "cut", best.RULES["loss"]) == kept


def test_validation_changes_nothing_that_is_learned_and_its_noise_is_fixed(held: Recipe, tmp_path: Path) -> None:
    """A LoRA begins as no change, and stays that with a rate of almost nothing, whatever the training's seed."""
    still = replaced(held, method="lora", learning_rate=1e-30, max_train_steps=2, checkpointing_steps=0)
    seen = []
    for seed in (0, 1):
        one = replaced(still, output_dir=tmp_path / str(seed), seed=seed)
        seen += [event.validation_loss for event in loop.run(one) if isinstance(event, Step) and event.step % 2 == 0]
    assert seen[0] is not None and len(set(seen)) == 1
    ours = load_file(train_dreambooth.main(held))
    without = replaced(held, held_out_data_dir=None, validation_steps=0, output_dir=tmp_path / "without")
    assert all(torch.equal(tensor, ours[key]) for key, tensor in load_file(train_dreambooth.main(without)).items())


def test_the_best_of_later_steps_is_put_away_with_their_checkpoints(held: Recipe) -> None:
    out = held.output.output_dir
    list(loop.run(replaced(held, max_train_steps=2)))
    saved = json.loads((out / "best" / "validation.json").read_text())
    (out / "best" / "validation.json").write_text(json.dumps({**saved, "step": 4}))  # torn apart
    assert best.find(out, best.RULES["loss"]) is None
    events = list(loop.run(replaced(held, max_train_steps=4, resume_from_checkpoint="latest")))
    assert (out / ".old-1" / "best" / "adapter.safetensors").is_file()
    assert [event.step for event in events if isinstance(event, Best)] == [4]
    (out / "best" / "validation.json").write_text("mine")
    with pytest.raises(UserError, match="best"):
        run_folder.check(replaced(held, overwrite=True).output)


def test_the_figures_running_mean_has_no_bias() -> None:
    assert progress_figure.smoothed([2.0, 2.0, 2.0]) == pytest.approx([2.0, 2.0, 2.0])
    assert progress_figure.smoothed([0.0, 1.0])[1] == pytest.approx(1 / (1 + progress_figure.SMOOTH))


def test_tensorboard_gets_curves_and_previews_and_the_losses_are_drawn(
    held: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # a true preview
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = held.output.output_dir
    train_dreambooth.main(replaced(held, max_train_steps=2, report_to="tensorboard"))
    found = EventAccumulator(str(out / "logs"))
    found.Reload()
    assert [event.step for event in found.Scalars("loss")] == [1, 2]
    assert [event.value for event in found.Scalars("validation_loss")] == pytest.approx([losses(out)[2]])
    (shown,) = found.Images("preview")
    with Image.open(out / "previews" / "step-000002.png") as image:
        assert (shown.step, shown.width, shown.height) == (2, *image.size)
    with Image.open(out / "progress.png") as image:
        assert image.size == (800, 450) and len(image.convert("RGB").getcolors(1 << 20)) > 3


def test_wandb_gets_the_recipe_curves_and_previews(held: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(tracking, "find_spec", lambda name: None)
        with pytest.raises(UserError, match=r"--report_to wandb needs wandb: pip install wandb"):
            train_dreambooth.listeners(replaced(held, report_to="wandb"), hint=False)

    told: list[Any] = []
    run = SimpleNamespace(log=lambda values, step: told.append((step, values)), finish=lambda: told.append("finished"))
    fake: Any = ModuleType("wandb")
    fake.__spec__ = SimpleNamespace()
    fake.init, fake.Image = lambda **options: told.append(options) or run, lambda pixels: pixels.shape
    monkeypatch.setitem(sys.modules, "wandb", fake)
    train_dreambooth.main(replaced(held, max_train_steps=2, report_to="wandb"))
    begun, first, second, preview, ended = told
    assert (begun["name"], begun["config"]["rank"], ended) == ("run", 2, "finished")
    assert first[0] == 1 and first[1].keys() == {"loss", "lr", "u", "grad_norm"}
    assert second[0] == 2 and math.isfinite(second[1]["validation_loss"])
    assert preview[0] == 2 and len(preview[1]["preview"]) == 1

    def refuse(**options: Any) -> None:
        raise RuntimeError("no\nkey")

    fake.init = refuse
    again = replaced(held, report_to="wandb", overwrite=True)
    with pytest.raises(UserError, match=r"--report_to wandb: no.*key; --report_to none does without"):
        train_dreambooth.main(again)


def test_an_interrupted_run_has_its_figure(held: Recipe) -> None:
    listener = progress_figure.ProgressFigure(held.output.output_dir)
    for event in loop.run(held, stop=lambda: True):
        assert not isinstance(event, Interrupted) or event.step == 1
    (held.output.output_dir / "log.jsonl").write_text('{"step": 1, "loss": 0.5}\n')
    listener(Interrupted(1, None))
    assert (held.output.output_dir / "progress.png").is_file()
