"""Other trainers' command lines and settings files: every word of theirs is understood, or answered in one line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from singlora_diffusion import cli, settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import build
from singlora_diffusion.training import familiar
from singlora_diffusion.training.recipe import Recipe, recorded

DIFFUSERS = """
pretrained_model_name_or_path revision variant tokenizer_name instance_data_dir class_data_dir instance_prompt
class_prompt validation_prompt num_validation_images validation_epochs with_prior_preservation prior_loss_weight
num_class_images output_dir seed resolution center_crop train_text_encoder train_batch_size sample_batch_size
num_train_epochs max_train_steps checkpointing_steps checkpoints_total_limit resume_from_checkpoint
gradient_accumulation_steps gradient_checkpointing learning_rate scale_lr lr_scheduler lr_warmup_steps lr_num_cycles
lr_power dataloader_num_workers use_8bit_adam adam_beta1 adam_beta2 adam_weight_decay adam_epsilon max_grad_norm
push_to_hub hub_token hub_model_id logging_dir allow_tf32 report_to mixed_precision prior_generation_precision
local_rank enable_xformers_memory_efficient_attention pre_compute_text_embeddings tokenizer_max_length
text_encoder_use_attention_mask validation_images class_labels_conditioning rank lora_dropout image_interpolation_mode
"""
README_OF_DIFFUSERS = """
--pretrained_model_name_or_path runwayml/stable-diffusion-v1-5 --instance_data_dir dog --output_dir lora-trained
--instance_prompt "a photo of sks dog" --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1
--checkpointing_steps=100 --learning_rate=1e-4 --report_to="tensorboard" --lr_scheduler="constant" --lr_warmup_steps=0
--max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket" --validation_epochs=50 --seed="0"
--enable_xformers_memory_efficient_attention --mixed_precision=fp16 --center_crop --local_rank -1 --rank 8
"""
README_OF_KOHYA = """
--pretrained_model_name_or_path=model --train_data_dir=images --output_dir=out --output_name=dog --instance_prompt=p
--save_model_as=safetensors --prior_loss_weight=1.0 --max_train_steps=400 --learning_rate=1e-4 --resolution=512,512
--xformers --mixed_precision=fp16 --cache_latents --gradient_checkpointing --save_every_n_epochs=1
--network_module=networks.lora --network_dim=8 --network_alpha=4 --enable_bucket --caption_extension=".txt" --flip_aug
"""


def words(line: str) -> list[str]:
    import shlex

    return shlex.split(line)


def parsed(line: str) -> Recipe:
    return settings.parse(Recipe, familiar.read(words(line)), "train", "")


def test_every_flag_of_diffusers_script_is_known_here() -> None:
    here = settings.spellings(Recipe)
    assert len(DIFFUSERS.split()) == 59
    assert [flag for flag in DIFFUSERS.split() if flag not in here and flag not in familiar.WORDS] == []
    means_something = [one.flag for one in familiar.WORDS.values() if isinstance(one, familiar.Alias | familiar.Unless)]
    assert [flag for flag in means_something if flag not in here] == []


def test_diffusers_published_command_line_is_a_recipe(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = parsed(README_OF_DIFFUSERS)
    assert (recipe.model.mixed_precision, recipe.data.resolution, recipe.adapter.rank) == ("fp16", 512, 8)
    assert recipe.validation.validation_prompt == "A photo of sks dog in a bucket"
    notes = capsys.readouterr().err.splitlines()
    ignored = ("validation_epochs", "enable_xformers_memory_efficient_attention", "center_crop", "local_rank")
    assert [line.split(":")[1].strip() for line in notes] == [f"--{flag}" for flag in ignored]


def test_kohyas_command_line_is_answered_flag_by_flag(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError) as refused:
        parsed(README_OF_KOHYA)
    assert str(refused.value).startswith("--caption_extension: ") and "\n" not in str(refused.value)
    line = README_OF_KOHYA.replace('--caption_extension=".txt"', "").replace("--prior_loss_weight=1.0", "")
    recipe = parsed(line)
    assert (recipe.data.instance_data_dir, recipe.data.resolution, recipe.data.random_flip) == (
        Path("images"),
        512,
        True,
    )
    assert (recipe.adapter.rank, recipe.adapter.alpha) == (8, 4.0)
    notes = capsys.readouterr().err.splitlines()
    assert len(notes) == 7 and all(line.startswith("note: --") for line in notes)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("--max_train_step 3", "--max_train_steps is near"),
        ("--zzzz 1 --hub_token x", "--zzzz: there is no such flag; --help lists them; --hub_token: log in"),
        ("--num_train_epochs 4", "--max_train_steps"),
        ("--config nowhere.toml", "nowhere.toml"),
        ("--config recipe.txt", "must end in .toml"),
        ("dog --rank 3", "dog: flags begin with --"),
    ],
)
def test_what_is_not_here_is_answered_in_one_line(line: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        familiar.read(words(line))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_the_program_says_so_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("train", ["--instance_data_dri", "x"]) == 2
    assert capsys.readouterr().err == (
        "singlora train: --instance_data_dri: there is no such flag; --instance_data_dir is near\n"
    )


def test_epochs_give_way_to_steps_as_in_diffusers() -> None:
    assert "--num_train_epochs" not in familiar.read(words("--num_train_epochs 4 --max_train_steps 5"))


CONTENT = {
    "toml": 'instance_prompt = "p"\nrank = 5\ndora = true\nrandom_flip = false\n[files]\ntrain_data_dir = "d"\n',
    "yaml": "instance_prompt: p\nrank: 5\ndora: true\nrandom_flip: false\nfiles:\n  train_data_dir: d\n",
    "json": '{"instance_prompt": "p", "rank": 5, "dora": true, "random_flip": false, "files": {"train_data_dir": "d"}}',
}


@pytest.mark.parametrize("kind", CONTENT)
def test_flags_win_over_a_settings_file(tmp_path: Path, kind: str) -> None:
    file = tmp_path / f"mine.{kind}"
    file.write_text(CONTENT[kind])
    recipe = parsed(f"--config {file} --network_dim 6 --no_dora --random_flip")
    assert recipe.adapter.rank == 6 and not recipe.adapter.dora and recipe.data.random_flip
    assert (recipe.data.instance_data_dir, recipe.data.instance_prompt) == (Path("d"), "p")
    assert parsed(f"--config={file}").adapter.dora


@pytest.mark.parametrize("content", ["{", "[1]", '{"rank": {"a": 1}}', '{"rank": [[1]], "x": 2}', '{"strict": [{}]}'])
def test_a_settings_file_that_cannot_be_meant_is_one_line(tmp_path: Path, content: str) -> None:
    (tmp_path / "mine.json").write_text(content)
    with pytest.raises((UserError, SystemExit)) as error:
        parsed(f"--config {tmp_path / 'mine.json'} --instance_data_dir d --instance_prompt p")
    assert "\n" not in str(error.value)


def test_the_recipe_of_a_run_is_a_settings_file(tmp_path: Path) -> None:
    recipe = build(
        Recipe,
        instance_data_dir=Path("d"),
        instance_prompt="--a photo of sks dog",
        targets=("to_q", "to_k"),
        train_text_encoder=True,
        text_targets=None,
        alpha=3.5,
    )
    (tmp_path / "recipe.json").write_text(json.dumps(recorded(recipe)))
    again = parsed(f"--config {tmp_path / 'recipe.json'}")
    assert recorded(again) == recorded(recipe)
