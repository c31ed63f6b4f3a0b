"""The recipe: ranges, settings that contradict each other, flags old and new, and what a continuation must share."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from singlora_diffusion import settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import build, replaced
from singlora_diffusion.training.recipe import Recipe, adapter_config, check, recorded, to_be_shared

NAN = float("nan")
PLAIN = build(Recipe, instance_data_dir=Path("images"), instance_prompt="a photo of sks dog")

FLAGS = """
--instance_data_dir d --instance_prompt p --output_dir o --pretrained_model_name_or_path m --identifier i
--resolution 64 --random_flip --with_prior_preservation --class_data_dir c --class_prompt p --num_class_images 3
--prior_loss_weight 0.5 --sample_batch_size 2 --method lora --rank 4 --alpha 2 --targets to_q to_k --train_text_encoder
--text_targets q_proj --text_rank 2 --text_alpha 1 --ramp_steps 3 --init offset --signature balanced --dora
--rate_by_width --loraplus_ratio 4 --max_train_steps 5 --train_batch_size 2 --gradient_accumulation_steps 2
--gradient_checkpointing --learning_rate 1e-4 --text_encoder_lr 1e-5 --lr_scheduler cosine --lr_warmup_steps 1
--adam_beta1 0.8 --adam_beta2 0.9 --adam_weight_decay 0 --adam_epsilon 1e-6 --max_grad_norm 2 --snr_gamma 5
--mixed_precision bf16 --seed 7 --validation_prompt v --num_validation_images 2 --validation_steps 9
--checkpointing_steps 9 --checkpoints_total_limit 2 --resume_from_checkpoint latest --report_to none --device cpu
--overwrite
"""
ALIASES = """
--instance_data_dir d --instance_prompt p --reg_data_dir c --network_dim 4 --network_alpha 2 --loraplus_lr_ratio 4
--unet_lr 1e-4 --min_snr_gamma 5 --save_every_n_steps 9 --resume latest
"""
AS_ALIASES = (
    "class_data_dir rank alpha loraplus_ratio learning_rate snr_gamma checkpointing_steps resume_from_checkpoint"
)


def test_every_flag_there_ever_was_sets_its_field() -> None:
    recipe = settings.as_json(settings.parse(Recipe, FLAGS.split(), "train", ""))
    default = settings.as_json(PLAIN)
    words = {word[2:] for word in FLAGS.split() if word.startswith("--")}
    assert words <= recipe.keys() and all(recipe[name] != default[name] for name in words)


def test_other_programs_names_set_the_same_fields() -> None:
    recipe, alias = (settings.as_json(settings.parse(Recipe, words.split(), "", "")) for words in (FLAGS, ALIASES))
    assert all(recipe[name] == alias[name] for name in AS_ALIASES.split())
    assert settings.parse(Recipe, [*ALIASES.replace("--network_dim", "--lora_rank").split()], "", "").adapter.rank == 4


@pytest.mark.parametrize(
    "change",
    [
        *[{"learning_rate": value} for value in (-1.0, 0.0, NAN, float("inf"))],
        *[{"snr_gamma": value} for value in (-5.0, 0.0, NAN)],
        *[{"alpha": value} for value in (0.0, -8.0, NAN)],
        *[{name: -1} for name in ("ramp_steps", "lr_warmup_steps", "checkpointing_steps", "validation_steps", "seed")],
        *[{name: NAN} for name in ("loraplus_ratio", "prior_loss_weight", "adam_weight_decay", "max_grad_norm")],
        *[{"max_grad_norm": -1.0}, {"prior_loss_weight": -1.0}, {"text_encoder_lr": -1.0, "train_text_encoder": True}],
        *[{"checkpoints_total_limit": value} for value in (-2, 0)],
        *[{"adam_beta1": 1.5}, {"adam_beta2": -1.0}, {"adam_epsilon": -1.0}, {"adam_epsilon": 0.0}],
        *[{name: 0} for name in ("max_train_steps", "train_batch_size", "gradient_accumulation_steps")],
        *[{name: 0} for name in ("sample_batch_size", "num_validation_images", "rank")],
        {"num_class_images": -1},
        *[{"rank": 10**9}, {"seed": 10**22}, {"max_train_steps": 10**20}, {"resolution": 100_000}, {"resolution": 4}],
    ],
    ids=str,
)
def test_values_out_of_range_are_named(change: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"--{next(iter(change))} "):
        check(replaced(PLAIN, **change))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"text_encoder_lr": 1e-4}, "text_encoder_lr.*train_text_encoder"),
        ({"text_rank": 4, "text_targets": ("q_proj",)}, "text_rank, --text_targets.*train_text_encoder"),
        ({"text_targets": None}, "--text_targets: only with --train_text_encoder"),
        ({"class_data_dir": Path("c")}, "--class_data_dir: only with --with_prior_preservation"),
        ({"class_prompt": "a dog", "num_class_images": 3}, "class_prompt, --num_class_images: only with"),
        ({"prior_loss_weight": 0.5}, "--prior_loss_weight: only with --with_prior_preservation"),
        ({"method": "lora", "ramp_steps": 20}, "ramp_steps is an option of singlora, not of lora"),
        ({"lr_scheduler": "polynomial", "learning_rate": 1e-7}, "learning_rate 1e-07: .* must begin above"),
        ({"lr_warmup_steps": 10}, "constant_with_warmup"),
        ({"lr_warmup_steps": 10, "lr_scheduler": "linear", "max_train_steps": 9}, "more than --max_train_steps 9"),
        ({"overwrite": True, "resume_from_checkpoint": "latest"}, "one of them"),
        ({"instance_prompt": "a photo of \udcff dog"}, "instance_prompt .* not valid text"),
        ({"targets": ("to_q", "\0")}, "targets .* not valid text"),
    ],
    ids=str,
)
def test_settings_that_contradict_each_other_are_named(change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(replaced(PLAIN, **change))


def test_what_a_continuation_must_share() -> None:
    check(PLAIN)
    before = settings.as_json(PLAIN)
    adapter = settings.as_json(PLAIN.adapter)
    free = """
        instance_data_dir encodings_dir strict device class_data_dir sample_batch_size max_train_steps validation_prompt
        num_validation_images validation_steps output_dir checkpointing_steps checkpoints_total_limit
        validate clip dino held_out_data_dir
        resume_from_checkpoint overwrite report_to portable push_to_hub hub_model_id
    """
    assert before.keys() - to_be_shared(PLAIN).keys() == {*free.split(), *adapter}
    assert recorded(replaced(PLAIN, overwrite=True)) == before == recorded(replaced(PLAIN, resume_from_checkpoint="x"))


def test_the_ramp_is_one_percent_of_the_steps_and_stays_when_a_run_goes_on_for_longer() -> None:
    assert adapter_config(replaced(PLAIN, max_train_steps=400)).ramp_steps == 4
    assert adapter_config(replaced(PLAIN, max_train_steps=20)).ramp_steps == 1
    assert adapter_config(replaced(PLAIN, max_train_steps=800), 4).ramp_steps == 4
    assert adapter_config(replaced(PLAIN, ramp_steps=0), 4).ramp_steps == 0
    assert adapter_config(replaced(PLAIN, method="lora")).ramp_steps is None
    assert adapter_config(replaced(PLAIN, train_text_encoder=True)).text_targets is None
    assert adapter_config(PLAIN).text_targets == ()


@pytest.mark.parametrize(("suits", "precision"), [("float32", "no"), ("bfloat16", "bf16"), ("float16", "fp16")])
def test_a_precision_that_is_not_named_is_the_machines(
    suits: str, precision: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from singlora_diffusion import device
    from singlora_diffusion.training.preparation import on_this_machine

    monkeypatch.setattr(device, "compute_dtype", lambda *_: suits)
    here = replaced(PLAIN, device="cpu")
    assert on_this_machine(here) == replaced(here, mixed_precision=precision)
    assert on_this_machine(replaced(here, mixed_precision="bf16")).model.mixed_precision == "bf16"
