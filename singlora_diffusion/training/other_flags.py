"""Flags of diffusers' DreamBooth scripts and of kohya's sd-scripts that are no flags here, and what happens with them.

A flag that means the same under another name is renamed; one that changes nothing that is learned is accepted with a
note; one that would change the result is refused with a line that says what to do instead. A flag that becomes a field
of the recipe loses its row here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

RENAMED = {
    "checkpoint_step_interval": "checkpointing_steps",
    "config_file": "config",
    "discrete_flow_shift": "timestep_shift",
    "final_validation_prompt": "validation_prompt",
    "flip_aug": "random_flip",
    "huggingface_repo_id": "hub_model_id",
    "log_with": "report_to",
    "lora_layers": "targets",
    "lr_scheduler_num_cycles": "lr_num_cycles",
    "lr_scheduler_power": "lr_power",
    "optimizer_type": "optimizer",
    "sample_every_n_steps": "validation_steps",
    "train_data_dir": "instance_data_dir",
    "use_dora": "dora",
    "validation_step_interval": "validation_steps",
}
"""Their word -> ours."""

OPTIMIZERS = {"adamwschedulefree": "schedule_free", "schedulefree": "schedule_free"}
"""Their name of an optimizer in small letters -> ours, where it is another."""

SWITCHES = {
    "use_8bit_adam": ("optimizer", "adamw8bit"),
    "use_lion_optimizer": ("optimizer", "lion"),
}
"""Their switch -> our flag and its value."""


def _by_flag(rows: Mapping[str, str]) -> dict[str, str]:
    return {flag: line for line, flags in rows.items() for flag in flags.split()}


ACCEPTED = _by_flag(
    {
        # computing
        "attention is PyTorch's own, which saves memory already": "xformers sdpa mem_eff_attn "
        "enable_xformers_memory_efficient_attention enable_npu_flash_attention",
        "images are encoded once, before the first step, and kept": "cache_latents "
        "vae_batch_size dataloader_num_workers max_data_loader_n_workers persistent_data_loader_workers",
        "prompts are encoded once, unless --train_text_encoder": "pre_compute_text_embeddings "
        "cache_text_encoder_outputs",
        "--encodings_dir DIR keeps what is encoded from run to run": "cache_latents_to_disk "
        "cache_text_encoder_outputs_to_disk",
        "images are encoded where they do not overflow, always": "no_half_vae",
        "text encoders and autoencoder leave the device while steps are done, always": "offload highvram lowram",
        "gradients are dropped after each step, always": "set_grads_to_none",
        "accelerate tells each process which one it is": "local_rank",
        # the base model
        "weights are found with a variant or without": "variant",
        "the files of the base model say what it is": "v2 v_parameterization sdxl",
        "downloads go to the hub's own cache; HF_HOME moves it": "cache_dir tokenizer_cache_dir",
        "log in once with `hf auth login`, or set HF_TOKEN; a command line is no place for a token": "hub_token "
        "huggingface_token",
        # what is learned
        "no image is enlarged for --enable_bucket, always": "bucket_no_upscale",
        "so it is with --optimizer prodigy": "prodigy_decouple prodigy_use_bias_correction prodigy_safeguard_warmup",
        "--max_train_steps alone says how long the training is": "repeats dataset_repeats",
        "images are cropped in the middle, unless --random_crop is given": "center_crop",
        "class images are generated in --mixed_precision": "prior_generation_precision",
        "text encoders are trained with --train_text_encoder only": "network_train_unet_only",
        "--method and --dora say what the layers get": "network_module",
        # previews
        "previews come every --validation_steps steps": "validation_epochs sample_every_n_epochs sample_at_first",
        "previews use the scheduler of the base model": "validation_scheduler sample_sampler",
        "--validation_steps makes the images": "skip_final_inference",
        # files and logs
        "curves are in OUTPUT_DIR/logs, figures in OUTPUT_DIR/log.jsonl": "logging_dir log_prefix log_tracker_name",
        "the recipe is written to OUTPUT_DIR/recipe.json, which --config takes back": "output_config",
        "singlora export OUTPUT_DIR --format kohya makes it": "output_kohya_format",
        "the file is OUTPUT_DIR/adapter.safetensors": "output_name",
        "files are safetensors, always": "save_model_as",
        "adapters are float32, always; singlora export can make smaller ones": "save_precision upcast_before_saving",
        "checkpoints hold the whole state, always": "save_state save_state_on_train_end",
        "the file's header says how it was trained": "training_comment no_metadata",
    }
)
"""What changes nothing that is learned -> what happens here."""

REFUSED = _by_flag(
    {
        # the base model
        "hf download ID --revision NAME --local-dir DIR, and DIR as --pretrained_model_name_or_path": "revision",
        "--quantize nf4 keeps the base in 4 bits, int8 in 8": "bnb_quantization_config_path do_fp8_training fp8_base "
        "fp8_base_unet",
        "the adapter is float32, always; --mixed_precision says what the base computes in": "full_fp16 full_bf16",
        "merge that LoRA into the base model first, and give the folder of the result": "base_weights",
        "prompts are encoded as the base model's own pipeline does": "clip_skip tokenizer_name tokenizer_max_length "
        "max_token_length max_sequence_length",
        "DeepFloyd IF is not supported": "class_labels_conditioning text_encoder_use_attention_mask validation_images",
        "the denoiser stays on its device; --quantize makes it smaller": "blocks_to_swap",
        # images and captions
        "save the images into a folder and give it as --instance_data_dir": "dataset_name dataset_config_name "
        "dataset_config image_column in_json",
        "captions are .txt files beside the images, or metadata.jsonl with file_name and text": "caption_column "
        "caption_extension caption_tag_dropout_rate caption_prefix",
        "brackets in prompts are plain text": "weighted_captions",
        "--enable_bucket finds buckets by the images, their sides are at most twice --resolution": "min_bucket_reso "
        "max_bucket_reso bucket_reso_steps aspect_ratio_buckets",
        "images are cropped in the middle, or with --random_crop at random": "face_crop_aug_range",
        "images are scaled by lanczos": "image_interpolation_mode",
        "colours are not changed": "color_aug",
        "masks lie beside the images, as dog.mask.png for dog.jpg: --masked_loss": "conditioning_data_dir alpha_mask",
        # the adapter
        "--targets, --method and --dora say which layers get what": "network_args lora_blocks block_dims",
        "--lora_dropout drops what a layer reads, as PEFT does; kohya's is between the two matrices": "network_dropout",
        "the denoiser is always trained; --train_text_encoder adds text encoders": "network_train_text_encoder_only",
        "a run goes on from its own checkpoints: --resume_from_checkpoint": "network_weights dim_from_weights",
        "weights are held small by --adam_weight_decay": "scale_weight_norms",
        "no new words are learned; --instance_prompt names the subject": "token_abstraction train_text_encoder_ti "
        "initializer_concept",
        # the optimization
        "give --max_train_steps: epochs x images / --train_batch_size": "num_train_epochs max_train_epochs",
        "give the scaled rate: --learning_rate x batch x accumulation x processes": "scale_lr",
        "--adam_beta1, --adam_beta2, --adam_weight_decay and --adam_epsilon are the options": "optimizer_args",
        "prodigy takes the square root of --adam_beta2": "prodigy_beta3",
        "--adam_weight_decay holds for all networks": "adam_weight_decay_text_encoder",
        "the loss is the mean squared error; --snr_gamma weighs it by noise": "loss_type huber_type huber_c "
        "huber_schedule debiased_estimation_loss scale_v_pred_loss_like_noise_pred",
        "give --noise_offset 0.1": "offset_noise",
        "noise is drawn as the base model's family has it, with --noise_offset": "adaptive_noise_scale "
        "multires_noise_iterations multires_noise_discount ip_noise_gamma zero_terminal_snr do_edm_style_training",
        "times are drawn as --weighting_scheme and --timestep_shift say": "timestep_sampling precondition_outputs",
        "a base model that was distilled with guidance is told 1 in training": "guidance_scale",
        "--compile takes inductor": "dynamo_backend",
        # previews, files and logs
        "--validation_prompt takes the prompt itself": "sample_prompts",
        "--checkpointing_steps says how often a checkpoint is written": "save_every_n_epochs",
        "--checkpoints_total_limit says how many checkpoints are kept": "save_last_n_epochs save_last_n_steps",
        "log in once with `wandb login`; a command line is no place for a key": "wandb_api_key",
        "the run is named as OUTPUT_DIR": "wandb_run_name",
    }
)
"""What would change the result, or what somebody waits for in vain -> what to do instead."""

FINE = {
    "bucket_reso_steps": "64",
    "guidance_scale": "1",
    "image_interpolation_mode": "lanczos",
    "loss_type": "l2",
    "network_dropout": "0",
    "precondition_outputs": "1",
    "revision": "main",
}
"""The value with which a refused flag says what happens here anyway."""

BESIDE = {"num_train_epochs": "max_train_steps"}
"""A refused flag -> the flag beside which its own script ignores it."""


class Answer(NamedTuple):
    """What is said to a flag of another program."""

    line: str
    refused: bool


def answer(flag: str, values: Sequence[str], others: Collection[str]) -> Answer | None:
    """What happens with a flag; None: neither program has it, or it is one of ours.

    Args:
        others: names of all flags that were given.
    """
    if flag in ACCEPTED:
        return Answer(f"--{flag}: {ACCEPTED[flag]}", refused=False)
    if flag not in REFUSED:
        return None
    if flag in FINE and len(values) == 1 and _same(values[0], FINE[flag]):
        return Answer(f"--{flag}: as always", refused=False)
    if BESIDE.get(flag) in others:
        return Answer(f"--{flag}: --{BESIDE[flag]} counts", refused=False)
    return Answer(f"--{flag}: {REFUSED[flag]}", refused=True)


def in_our_words(flag: str, values: Sequence[str]) -> tuple[str, list[str]]:
    """A flag and its values as ours: renamed; 512,512 as 512; lists with commas split; AdamW8bit as adamw8bit."""
    if flag in SWITCHES:
        ours, value = SWITCHES[flag]
        return ours, [value]
    ours = RENAMED.get(flag, flag)
    if ours == "resolution" and len(values) == 1:
        return ours, list(dict.fromkeys(values[0].split(",")))
    if ours == "optimizer":
        return ours, [OPTIMIZERS.get(value.casefold(), value.casefold()) for value in values]
    if flag == "lora_layers":
        return ours, [part.strip() for value in values for part in value.split(",")]
    return ours, list(values)


def _same(one: str, other: str) -> bool:
    try:
        return float(one) == float(other)
    except ValueError:
        return one.casefold() == other.casefold()
