"""What helps to choose: the loss on held-out images, the adapter of the best step, figures and trackers."""

from __future__ import annotations

import json
import math
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth
from eval import previews, score
from singlora_diffusion import formats
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import best, loop, progress_figure, run_folder, tracking, validation
from singlora_diffusion.training.events import VALIDATED, Best, Interrupted, Step
from singlora_diffusion.training.recipe import Recipe


def blank(family: object, recipe: Recipe, prompt: str, resolution: int) -> list[Image.Image]:
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


class Scoring:
    """Scores that follow from pixels, so that previews of other weights have others."""

    asked: ClassVar[list[tuple[Any, ...]]] = []

    def __init__(self, references: Sequence[Path], prompt: str, base_model: str, sources: object = None) -> None:
        self.asked.append(([path.name for path in references], prompt, base_model))

    def __call__(self, images: Sequence[Image.Image], base: Sequence[Image.Image]) -> dict[str, float]:
        self.asked.append((len(images), len(base)))
        ours, theirs = (np.stack([np.asarray(image, dtype=np.float64) for image in row]) for row in (images, base))
        dino = float(ours.std() / 255)
        return {"dino": dino, "clip_t": float(ours.mean() / 255), "drift": float(np.abs(ours - theirs).mean() / 255)}


@pytest.mark.numerical
def test_scored_previews_choose_the_best_step_also_across_a_stop(
    held: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()  # true previews
    monkeypatch.setattr(previews, "PreviewScorer", Scoring)
    monkeypatch.setattr(Scoring, "asked", [])
    scored = replaced(held, validate="scores", validation_steps=1, validation_prompt="a sks dog in the snow")
    scored = replaced(scored, max_train_steps=3, checkpointing_steps=0, report_to="tensorboard")
    out = scored.output.output_dir
    train_dreambooth.main(scored)
    asked = [(["0.png", "1.png"], "a dog in the snow", held.model.pretrained_model_name_or_path), *[(1, 1)] * 3]
    assert Scoring.asked == asked
    figures = [{name: row[name] for name in VALIDATED} for row in rows(out)]
    assert figures[0]["drift"] > 0 and len({tuple(row.values()) for row in figures}) == 3
    products = [row["dino"] * row["clip_t"] for row in figures]
    kept = best.find(out, best.RULES["scores"])
    assert kept is not None and kept.step == products.index(max(products)) + 1
    assert kept.figures == pytest.approx(figures[kept.step - 1], rel=1e-7)
    assert f"Best in validation: step {kept.step} of 3, held-out loss " in (out / "README.md").read_text()

    cut = replaced(scored, output_dir=tmp_path / "cut", resume_from_checkpoint=None)
    told = train_dreambooth.listeners(cut, hint=False)
    answers = iter([False, True])
    for event in loop.run(cut, stop=lambda: next(answers), scoring=Scoring):
        for listener in told:
            listener(event)
    for listener in told:
        listener.close()
    train_dreambooth.main(replaced(cut, resume_from_checkpoint="latest"))
    ours, theirs = ([{**row, "seconds": 0} for row in rows(run)] for run in (out, tmp_path / "cut"))
    assert ours == theirs
    assert best.find(tmp_path / "cut", best.RULES["scores"]) == kept
    ends = [load_file(run / "best" / "adapter.safetensors") for run in (out, tmp_path / "cut")]
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())
    for name in ("progress.png", *(f"previews/step-00000{step}.png" for step in (1, 2, 3))):
        with Image.open(out / name) as one, Image.open(tmp_path / "cut" / name) as other:
            assert one.size == other.size and one.tobytes() == other.tobytes(), name


def test_encoders_that_are_missing_are_named_before_anything_is_trained(held: Recipe) -> None:
    scored = replaced(held, validate="scores", clip=Path("nowhere.safetensors"))
    with pytest.raises(UserError, match=r"^nowhere.safetensors: no such file; get .* for --clip$"):
        train_dreambooth.main(scored)
    assert not held.output.output_dir.exists()
    with pytest.raises(ValueError, match="nothing was given that scores"):
        list(loop.run(scored))
    with pytest.raises(UserError, match="--clip: only with --validate"):
        list(loop.run(replaced(scored, validate="loss")))
    with pytest.raises(UserError, match="--validate scores: with --validation_steps 0"):
        list(loop.run(replaced(scored, validation_steps=0)))


def test_a_preview_has_the_scores_that_the_score_command_gives_it(tmp_path: Path) -> None:
    """To rounding: encoders are given the images one by one here, together there."""
    noise = np.random.default_rng(1).integers(0, 256, (6, 64, 64, 3), dtype=np.uint8)
    made = [Image.fromarray(pixels) for pixels in noise]
    folders = {name: tmp_path / name for name in ("images", "references", "base")}
    for place, folder in enumerate(folders.values()):
        folder.mkdir()
        for number in range(2):
            made[2 * place + number].save(folder / f"{number}.png")
    result = score.score(
        score.ScoreSettings(
            folders["images"],
            folders["references"],
            base_images=folders["base"],
            prompt="a red dog in the snow",
            protocol="toyworld",
            metrics=previews.SCORES,
            batch_size=1,
            device="cpu",
        )
    )
    scorer = previews.PreviewScorer(sorted(folders["references"].iterdir()), "a red dog in the snow", "toyworld")
    found = scorer(made[:2], made[4:])
    assert scorer(made[:2], made[4:]) == found
    expected = {name: summary["mean"] for name, summary in result["metrics"].items()}
    assert found == pytest.approx(expected, abs=1e-5)  # unit vectors in float32


def test_the_best_by_another_rule_is_put_away_and_ties_go_to_the_first() -> None:
    rule = best.RULES["scores"]
    first = best.Kept(1, {"dino": 0.5, "clip_t": 0.5}, rule.words)
    assert not best.is_better({"dino": 0.25, "clip_t": 1.0}, first, rule)
    assert best.is_better({"dino": 0.5, "clip_t": 0.6}, first, rule)
    assert not best.is_better({"dino": -0.9, "clip_t": -0.9}, first, rule)  # no product of two wrongs
    assert not best.is_better({"dino": math.nan, "clip_t": 0.5}, None, rule)


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
    train_dreambooth.main(replaced(held, max_train_steps=2, report_to="wandb", checkpointing_steps=2))
    begun, first, second, preview, ended = told
    assert (begun["name"], begun["config"]["rank"], ended) == ("run", 2, "finished")
    assert first[0] == 1 and first[1].keys() == {"loss", "lr", "u", "grad_norm"}
    assert second[0] == 2 and math.isfinite(second[1]["validation_loss"])
    assert preview[0] == 2 and len(preview[1]["preview"]) == 1

    told.clear()  # a resumed training goes on in the run of that id, another one has another
    more = replaced(held, max_train_steps=3, report_to="wandb", resume_from_checkpoint="latest")
    train_dreambooth.main(more)
    assert (told[0]["id"], told[0]["resume"]) == (begun["id"], "allow") and told[1][0] == 3
    assert told[0]["allow_val_change"] and told[0]["config"]["max_train_steps"] == 3
    told.clear()
    train_dreambooth.main(replaced(held, max_train_steps=1, report_to="wandb", overwrite=True))
    assert told[0]["id"] != begun["id"]
    assert (held.output.output_dir / "wandb" / "run_id").read_text() == told[0]["id"]

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
