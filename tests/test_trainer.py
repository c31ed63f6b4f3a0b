"""The training run as a whole, on a tiny model: exact resume, equal batches, every method, honest files."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import train_dreambooth
from singlora_diffusion import formats, models
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import checkpoint, loop, preparation, resting, run_folder
from singlora_diffusion.training.events import Remark
from singlora_diffusion.training.recipe import Recipe


def rows(run: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]


def needs(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"{package} is not installed")


PRIOR = {"with_prior_preservation": True}


@pytest.mark.numerical
@pytest.mark.parametrize(
    "change",
    [
        {"lr_scheduler": "cosine"},
        {
            **PRIOR,
            "num_class_images": 2,
            "random_flip": True,
            "random_crop": True,
            "caption_dropout": 0.3,
            "snr_gamma": 5.0,
        },
        {"ema_decay": 0.9, "noise_offset": 0.1, "dora": True, "lora_dropout": 0.2},
        {"method": "dora", "lora_dropout": 0.2, "gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {
            **PRIOR,
            "num_class_images": 0,
            "min_timestep": 100,
            "max_timestep": 700,
            "timestep_bias_strategy": "earlier",
            "timestep_bias_multiplier": 3.0,
        },
        {"optimizer": "adafactor", "lr_scheduler": "cosine_with_restarts", "lr_num_cycles": 2},
        {"optimizer": "lion", "lr_scheduler": "polynomial", "lr_power": 2.0},
        pytest.param({"optimizer": "prodigy", "learning_rate": 1.0}, marks=needs("prodigyopt")),
        pytest.param({"optimizer": "schedule_free"}, marks=needs("schedulefree")),
        pytest.param({"optimizer": "adamw8bit", "rank": 48}, marks=needs("bitsandbytes")),  # small tensors keep 32 bits
    ],
    ids=str,
)
def test_a_resumed_run_equals_an_unbroken_one_bit_for_bit(
    recipe: Recipe, change: dict[str, object], tmp_path: Path
) -> None:
    recipe = replaced(recipe, max_train_steps=6, checkpointing_steps=3, train_text_encoder=True, **change)
    unbroken = load_file(train_dreambooth.main(recipe))
    cut = replaced(recipe, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    shutil.copytree(recipe.output.output_dir / "checkpoint-3", cut.output.output_dir / "checkpoint-3")
    (cut.output.output_dir / ".checkpoint-6.part").mkdir()  # what a crash in the middle of saving leaves
    resumed = load_file(train_dreambooth.main(cut))
    assert unbroken.keys() == resumed.keys() and len(unbroken) > 0
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    last = [
        load_file(out / "checkpoint-6" / "optimizer.safetensors")
        for out in (recipe.output.output_dir, cut.output.output_dir)
    ]
    assert last[0].keys() == last[1].keys() and all(torch.equal(last[0][key], last[1][key]) for key in last[0])
    losses = [row["loss"] for row in rows(recipe.output.output_dir)]
    assert [row["loss"] for row in rows(cut.output.output_dir)] == losses[3:]


@pytest.mark.numerical
@pytest.mark.parametrize(
    "change", [{}, {"lora_dropout": 0.2, "train_text_encoder": True, **PRIOR, "num_class_images": 0}]
)
def test_accumulated_batches_equal_one_big_batch(recipe: Recipe, change: dict[str, object], tmp_path: Path) -> None:
    recipe = replaced(recipe, **change)
    big = load_file(train_dreambooth.main(replaced(recipe, train_batch_size=4)))
    small = replaced(recipe, train_batch_size=2, gradient_accumulation_steps=2, output_dir=tmp_path / "small")
    for key, tensor in load_file(train_dreambooth.main(small)).items():
        torch.testing.assert_close(tensor, big[key], atol=2e-5, rtol=1e-3)


@pytest.mark.numerical
@pytest.mark.parametrize("change", [{}, {"lora_dropout": 0.2, "method": "lora"}], ids=str)
def test_gradient_checkpointing_trains_the_same_weights(
    recipe: Recipe, change: dict[str, object], tmp_path: Path
) -> None:
    recipe = replaced(recipe, **change)
    plain = load_file(train_dreambooth.main(recipe))
    less = replaced(recipe, gradient_checkpointing=True, output_dir=tmp_path / "less")
    for key, tensor in load_file(train_dreambooth.main(less)).items():
        torch.testing.assert_close(tensor, plain[key], atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize(
    "change",
    [
        {"init": "offset"},
        {"signature": "balanced"},
        {"dora": True},
        {"method": "lora"},
        {"method": "lora+"},
        {"method": "dora"},
        {"method": "oft"},
        {"method": "lokr"},
        {"mixed_precision": "bf16"},
        {"targets": ("to_q", "to_k"), "snr_gamma": 5.0, "random_flip": True},
    ],
    ids=str,
)
def test_every_method_trains_both_networks_and_its_file_reads_back(recipe: Recipe, change: dict[str, object]) -> None:
    path = train_dreambooth.main(replaced(recipe, train_text_encoder=True, max_train_steps=2, **change))
    state = load_file(path)
    assert {key.split(".")[0] for key in state} == {"unet", "text_encoder"}
    assert formats.read_header(path).step == 2
    assert all(row["grad_norm"] > 0 for row in rows(recipe.output.output_dir)[1:])


@pytest.mark.numerical
def test_training_lowers_the_loss(recipe: Recipe) -> None:
    train_dreambooth.main(replaced(recipe, max_train_steps=60, rank=8, learning_rate=2e-2, train_batch_size=4))
    losses = [row["loss"] for row in rows(recipe.output.output_dir)]
    assert sum(losses[-15:]) < 0.97 * sum(losses[:15])


def test_the_clock_follows_the_optimizer_steps(recipe: Recipe) -> None:
    path = train_dreambooth.main(
        replaced(recipe, ramp_steps=8, gradient_accumulation_steps=2, gradient_checkpointing=True)
    )
    assert [row["u"] for row in rows(recipe.output.output_dir)] == [0.125, 0.25, 0.375, 0.5]
    assert formats.read_header(path).u == 0.5


def test_prior_preservation_makes_the_missing_class_pictures(recipe: Recipe, tmp_path: Path) -> None:
    mine = tmp_path / "class"
    mine.mkdir()
    Image.new("RGB", (50, 50), (1, 2, 3)).save(mine / "own.png")
    with_prior = replaced(
        recipe, with_prior_preservation=True, class_data_dir=mine, num_class_images=3, sample_batch_size=2
    )
    path = train_dreambooth.main(with_prior)
    assert len(list(mine.glob("*.png"))) == 3 and Image.open(mine / "own.png").getpixel((0, 0)) == (1, 2, 3)
    without = load_file(train_dreambooth.main(replaced(recipe, output_dir=tmp_path / "without")))
    assert any(not torch.equal(tensor, without[key]) for key, tensor in load_file(path).items())


def test_the_polynomial_schedule_ends_where_diffusers_says(recipe: Recipe) -> None:
    train_dreambooth.main(replaced(recipe, lr_scheduler="polynomial", learning_rate=1e-4))
    expected = [1e-7 + (1e-4 - 1e-7) * (1 - step / 4) for step in range(4)]
    assert [row["lr"] for row in rows(recipe.output.output_dir)] == pytest.approx(expected)


def test_the_header_counts_the_images_and_names_what_is_predicted(recipe: Recipe) -> None:
    header = formats.read_header(train_dreambooth.main(replaced(recipe, max_train_steps=1)))
    assert (header.images, header.prediction_type, header.started_at) == (3, "epsilon", 0.0)


def test_a_prompt_that_the_model_cuts_is_remarked_on(recipe: Recipe) -> None:
    long = f"a photo of sks dog {'with a very red ball ' * 20}"
    remarks = [event.text for event in loop.run(replaced(recipe, instance_prompt=long)) if isinstance(event, Remark)]
    assert len(remarks) == 1 and "is too long for" in remarks[0] and "is cut by" in remarks[0]


@pytest.mark.parametrize(("named", "placed"), [("cuda", "cuda:1"), ("cuda:0", "cuda:0")])
def test_each_of_several_processes_takes_its_own_gpu(recipe: Recipe, named: str, placed: str, monkeypatch) -> None:
    class Accelerator(SimpleNamespace):
        num_processes, device = 2, torch.device("cuda:1")

    def load(name: str, dtype: str, where: str, *others: str | None) -> None:
        raise UserError(where)

    monkeypatch.setattr(preparation, "Accelerator", Accelerator)
    monkeypatch.setattr(preparation.device, "choose", lambda name: name)
    monkeypatch.setattr(preparation.device, "compute_dtype", lambda where, dtype: dtype)
    monkeypatch.setattr(preparation.models, "load", load)
    with pytest.raises(UserError, match=f"^{placed}$"):
        list(preparation.load(replaced(recipe, device=named)))


def test_previews_and_curves_are_on_disk(recipe: Recipe) -> None:
    train_dreambooth.main(replaced(recipe, validation_steps=2, num_validation_images=2, report_to="tensorboard"))
    previews = sorted((recipe.output.output_dir / "previews").iterdir())
    assert [path.name for path in previews] == ["step-000002.png", "step-000004.png"]
    assert Image.open(previews[0]).size[0] > 64
    assert list((recipe.output.output_dir / "logs").glob("events.*"))
    assert [row["step"] for row in rows(recipe.output.output_dir)] == [1, 2, 3, 4]


def test_checkpoints_are_limited_and_a_run_is_not_begun_anew_by_mistake(recipe: Recipe) -> None:
    recipe = replaced(recipe, checkpointing_steps=1, checkpoints_total_limit=2)
    train_dreambooth.main(recipe)
    assert [path.name for path in run_folder.checkpoints(recipe.output.output_dir)] == ["checkpoint-3", "checkpoint-4"]
    with pytest.raises(UserError, match="exists"):
        train_dreambooth.main(recipe)
    with pytest.raises(UserError, match="--rank 2"):
        train_dreambooth.main(replaced(recipe, rank=3, resume_from_checkpoint="latest"))
    with pytest.raises(UserError, match="no checkpoint"):
        checkpoint.find(recipe.output.output_dir / "previews", "latest")
    (recipe.output.output_dir / "checkpoint-4" / "optimizer.safetensors").write_bytes(b"torn")
    damaged = recipe.output.output_dir / "checkpoint-4"
    with pytest.raises(UserError, match="damaged"):
        train_dreambooth.main(replaced(recipe, resume_from_checkpoint=str(damaged)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"instance_prompt": "a photo of my dog"}, "identifier"),
        ({"instance_data_dir": Path("nowhere")}, "nowhere"),
        ({"max_train_steps": 0}, "max_train_steps"),
        ({"resolution": 30}, "multiple of 8"),
        ({"targets": ("to_z",)}, "to_z"),
        ({"rank": 0}, "rank"),
    ],
    ids=str,
)
def test_mistakes_are_named_before_anything_is_written(recipe: Recipe, change: dict[str, object], words: str) -> None:
    with pytest.raises(UserError, match=words):
        train_dreambooth.main(replaced(recipe, **change))
    assert not recipe.output.output_dir.exists()


def test_two_processes_train_the_same_weights_as_one(recipe: Recipe, tmp_path: Path) -> None:
    one = load_file(train_dreambooth.main(replaced(recipe, train_batch_size=4, lora_dropout=0.2)))
    flags = {
        "lora_dropout": 0.2,
        "instance_data_dir": recipe.data.instance_data_dir,
        "instance_prompt": recipe.data.instance_prompt,
        "output_dir": tmp_path / "two",
        "pretrained_model_name_or_path": recipe.model.pretrained_model_name_or_path,
        "max_train_steps": 4,
        "train_batch_size": 2,
        "rank": 2,
        "validation_steps": 0,
        "checkpointing_steps": 0,
        "report_to": "none",
        "device": "cpu",
    }
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command += [train_dreambooth.__file__, *(str(part) for key, value in flags.items() for part in (f"--{key}", value))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    two = load_file(tmp_path / "two" / "adapter.safetensors")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=2e-5, rtol=1e-3)


@pytest.mark.parametrize("tiny", ["tiny_sd3", "tiny_flux2"])
def test_encoders_leave_the_device_before_the_first_step(
    recipe: Recipe, tiny: str, tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On torch's meta device nothing computes: training does without them, and to the same bits."""
    base = str(request.getfixturevalue(tiny))
    recipe = replaced(recipe, pretrained_model_name_or_path=base, max_train_steps=2)
    kept = load_file(train_dreambooth.main(recipe))
    monkeypatch.setattr(resting, "ASIDE", "meta")
    monkeypatch.setattr(resting.Resting, "end", lambda self: None)  # weights do not come back from there
    released = load_file(train_dreambooth.main(replaced(recipe, output_dir=tmp_path / "released")))
    assert kept.keys() == released.keys() and all(torch.equal(kept[key], released[key]) for key in kept)


def test_encoders_come_back_for_previews_and_for_the_next_training(recipe: Recipe) -> None:
    family = models.load(recipe.model.pretrained_model_name_or_path)
    moves: list[str] = []
    place = family.text_encoder.to
    family.text_encoder.to = lambda where: moves.append(str(where)) or place(where)
    for event in loop.run(replaced(recipe, validation_steps=3, num_validation_images=1), family=family):
        moves.append(type(event).__name__)
    told = [move for move in moves if move in ("cpu", "Started", "Step", "Preview", "Saved")]
    assert told == ["cpu", "Started", "Step", "Step", "cpu", "cpu", "Step", "Preview", "Step", "Saved", "cpu"]
