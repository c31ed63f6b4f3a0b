"""`singlora train` for people who know diffusers' scripts or kohya's: their flags and whole command lines."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from singlora_diffusion import settings
from singlora_diffusion.errors import UserError
from singlora_diffusion.training import other_flags
from singlora_diffusion.training.command_line import Training, parse
from singlora_diffusion.training.recipe import Recipe

NEEDED = "--instance_data_dir dog --instance_prompt 'a photo of sks dog'"

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
"""All flags of its train_dreambooth_lora.py."""
DIFFUSERS_ALSO = """
pretrained_vae_model_name_or_path dataset_name dataset_config_name cache_dir image_column caption_column repeats
random_flip text_encoder_lr snr_gamma optimizer prodigy_beta3 prodigy_decouple prodigy_use_bias_correction
prodigy_safeguard_warmup adam_weight_decay_text_encoder do_edm_style_training output_kohya_format use_dora lora_alpha
lora_layers max_sequence_length guidance_scale weighting_scheme logit_mean logit_std mode_scale cache_latents
upcast_before_saving aspect_ratio_buckets offload bnb_quantization_config_path do_fp8_training skip_final_inference
final_validation_prompt precondition_outputs validation_steps offset_noise set_grads_to_none validation_scheduler
token_abstraction train_text_encoder_ti noise_offset
"""
"""Those of its scripts for SDXL, SD 3 and FLUX, of full DreamBooth and of the advanced scripts."""
KOHYA = """
pretrained_model_name_or_path v2 v_parameterization vae tokenizer_cache_dir no_half_vae clip_skip max_token_length
train_data_dir reg_data_dir dataset_config in_json caption_extension shuffle_caption keep_tokens caption_dropout_rate
color_aug flip_aug random_crop enable_bucket min_bucket_reso max_bucket_reso bucket_reso_steps bucket_no_upscale
cache_latents cache_latents_to_disk vae_batch_size max_data_loader_n_workers persistent_data_loader_workers
dataset_repeats train_batch_size resolution network_module network_dim network_alpha network_args network_dropout
network_weights network_train_unet_only network_train_text_encoder_only scale_weight_norms optimizer_type
optimizer_args use_8bit_adam learning_rate unet_lr text_encoder_lr lr_scheduler lr_scheduler_num_cycles
lr_scheduler_power lr_warmup_steps max_grad_norm max_train_steps max_train_epochs mixed_precision full_fp16 full_bf16
fp8_base xformers sdpa mem_eff_attn lowram seed noise_offset adaptive_noise_scale multires_noise_iterations
multires_noise_discount ip_noise_gamma min_snr_gamma debiased_estimation_loss min_timestep max_timestep loss_type
huber_c zero_terminal_snr masked_loss prior_loss_weight gradient_checkpointing gradient_accumulation_steps output_dir
output_name save_precision save_model_as save_every_n_epochs save_every_n_steps save_last_n_epochs save_state resume
logging_dir log_with log_prefix sample_prompts sample_every_n_steps sample_every_n_epochs sample_sampler config_file
training_comment no_metadata huggingface_token huggingface_repo_id wandb_api_key
"""
"""Those of its train_network.py that guides for one subject use."""


def line(words: str) -> Recipe:
    return parse(Training, shlex.split(words), "singlora train", "").recipe


def refused(words: str) -> tuple[str, ...]:
    with pytest.raises(UserError) as error:
        line(words)
    return error.value.lines


@pytest.mark.parametrize("flag", sorted({*DIFFUSERS.split(), *DIFFUSERS_ALSO.split(), *KOHYA.split()}))
def test_every_flag_they_have_is_one_here_or_is_answered(flag: str) -> None:
    ours = settings.flags(Training)
    flag = other_flags.RENAMED.get(flag, flag)
    flag = other_flags.SWITCHES.get(flag, (flag,))[0]
    assert flag in ours or other_flags.answer(flag, ["x"], ())


def test_what_is_a_flag_here_has_no_answer() -> None:
    """A flag that becomes a field of the recipe loses its row, or it would never be read."""
    others = {*other_flags.RENAMED, *other_flags.SWITCHES, *other_flags.ACCEPTED, *other_flags.REFUSED}
    assert not others & settings.flags(Training).keys()
    assert not set(other_flags.ACCEPTED) & set(other_flags.REFUSED)
    assert {*other_flags.FINE, *other_flags.BESIDE} <= set(other_flags.REFUSED)


def test_answers_name_only_flags_that_there_are() -> None:
    ours = settings.flags(Training)
    for said in {*other_flags.ACCEPTED.values(), *other_flags.REFUSED.values()}:
        named = {word.strip(",.;:") for word in said.split() if word.startswith("--")}
        assert {name[2:] for name in named} - {"revision", "local-dir", "format"} <= ours.keys(), said


def test_a_command_line_of_diffusers(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = line(
        """--pretrained_model_name_or_path="runwayml/stable-diffusion-v1-5" --instance_data_dir="dog" --output_dir=out
        --instance_prompt="a photo of sks dog" --resolution=512 --train_batch_size=1 --gradient_accumulation_steps=1
        --checkpointing_steps=100 --learning_rate=1e-4 --report_to="tensorboard" --lr_scheduler="constant"
        --lr_warmup_steps=0 --max_train_steps=500 --validation_prompt="A photo of sks dog in a bucket" --seed="7"
        --validation_epochs=50 --num_train_epochs 2 --revision=main --dataloader_num_workers=4 --local_rank -1
        --enable_xformers_memory_efficient_attention --cache_latents --lora_dropout=0.1 --optimizer AdamW"""
    )
    assert recipe.data.instance_data_dir == Path("dog") and recipe.data.resolution == 512
    assert recipe.optimization.learning_rate == 1e-4 and recipe.optimization.max_train_steps == 500
    assert recipe.optimization.seed == 7 and recipe.validation.validation_prompt == "A photo of sks dog in a bucket"
    notes = capsys.readouterr().err.splitlines()
    assert recipe.adapter.lora_dropout == 0.1
    assert (
        recipe.optimization.optimizer == "adamw"
        and len(notes) == 7
        and all(one.startswith("note: --") for one in notes)
    )
    assert "note: --validation_epochs: previews come every --validation_steps steps" in notes
    assert "note: --num_train_epochs: --max_train_steps counts" in notes


def test_a_command_line_of_diffusers_for_sdxl_is_answered_flag_by_flag() -> None:
    lines = refused(
        f"""{NEEDED} --pretrained_model_name_or_path=$MODEL --pretrained_vae_model_name_or_path=$VAE --output_dir=lora
        --mixed_precision="fp16" --resolution=1024 --gradient_accumulation_steps=4 --report_to="wandb" --use_dora
        --validation_epochs=25 --optimizer=prodigy --text_encoder_lr=1.0 --num_train_epochs 3 --lora_layers=to_k,to_q"""
    )
    assert [one.partition(": ")[0] for one in lines] == ["--num_train_epochs"]
    assert all("\n" not in one and len(one) < 150 for one in lines)


def test_a_command_line_of_kohya(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = line(
        """--pretrained_model_name_or_path=model --train_data_dir="images" --instance_prompt "sks dog" --output_dir=out
        --resolution="512,512" --network_module=networks.lora --network_dim=8 --network_alpha=4 --unet_lr=1e-4
        --lr_scheduler=cosine --train_batch_size=1 --max_train_steps=600 --mixed_precision=bf16 --save_precision=fp16
        --save_model_as=safetensors --save_every_n_steps=100 --seed=42 --cache_latents --cache_latents_to_disk
        --optimizer_type=AdamW --xformers --gradient_checkpointing --prior_loss_weight=1.0 --noise_offset=0.0
        --min_snr_gamma=5 --output_name=dog --logging_dir=logs --max_data_loader_n_workers=2 --no_half_vae --flip_aug
        --sample_every_n_steps=50 --network_train_unet_only"""
    )
    assert recipe.data.instance_data_dir == Path("images") and recipe.data.resolution == 512
    assert (recipe.adapter.rank, recipe.adapter.alpha, recipe.optimization.learning_rate) == (8, 4.0, 1e-4)
    assert recipe.data.random_flip and recipe.validation.validation_steps == 50 and recipe.optimization.snr_gamma == 5
    assert len(capsys.readouterr().err.splitlines()) == 11


def test_a_command_line_of_kohya_is_answered_flag_by_flag() -> None:
    lines = refused(
        """--pretrained_model_name_or_path=m --train_data_dir=images --output_dir=o --resolution=512,768
        --max_train_epochs=10 --enable_bucket --optimizer_args "weight_decay=0.1" "betas=.9,.99" --clip_skip=2
        --caption_extension=".txt" --shuffle_caption --keep_tokens=1 --network_dmi=32 --text_encoder_lr=5e-5"""
    )
    said = "max_train_epochs optimizer_args clip_skip caption_extension"
    assert [one.partition(": ")[0][2:] for one in lines] == [*said.split(), "network_dmi"]
    assert lines[-1] == "--network_dmi: do you mean --network_dim?"


def test_lists_and_squares_as_other_programs_write_them() -> None:
    assert line(f"{NEEDED} --lora_layers 'attn.to_k, attn.to_q'").adapter.targets == ("attn.to_k", "attn.to_q")
    assert line(f"{NEEDED} --resolution 768,768").data.resolution == 768
    assert line(f"{NEEDED} --use-dora").adapter.dora
    assert line(f"{NEEDED} --use_8bit_adam").optimization.optimizer == "adamw8bit"
    assert line(f"{NEEDED} --optimizer_type AdamWScheduleFree").optimization.optimizer == "schedule_free"
    with pytest.raises(SystemExit):
        line(f"{NEEDED} --resolution=512,768")


def test_two_names_of_one_setting() -> None:
    assert refused(f"{NEEDED} --train_data_dir cat") == (
        "--train_data_dir and --instance_data_dir are one setting: give one of them",
    )
    assert refused(f"{NEEDED} --rank 2 --network_dim 3") == (
        "--rank and --network_dim are one setting: give one value",
    )


FILES = {
    "flat.toml": """
        instance_data_dir = "dog"
        instance_prompt = "a photo of sks dog"
        network_dim = 8
        learning_rate = 1e-4
        targets = ["to_q", "to_k"]
        mixed_precision = "no"
        random-flip = true
        cache_latents = true
        enable_bucket = false
        """,
    "groups.toml": """
        [data]
        instance_data_dir = "dog"
        instance_prompt = "a photo of sks dog"
        flip_aug = true
        [anything]
        rank = 8
        lora_layers = "to_q,to_k"
        learning_rate = 0.0001
        mixed_precision = "no"
        xformers = true
        """,
    "flat.yaml": """
        instance_data_dir: dog
        instance_prompt: a photo of sks dog
        lora_rank: "8"
        learning_rate: 1e-4
        targets: [to_q, to_k]
        mixed_precision: no
        random_flip: true
        sdpa: true
        """,
    "groups.JSON": """{"data": {"train_data_dir": "dog", "instance_prompt": "a photo of sks dog", "random_flip": true},
        "adapter": {"rank": 8, "targets": ["to_q", "to_k"]}, "unet_lr": 1e-4, "mixed_precision": "no", "lowram": 1}""",
}


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str, str], str]:
    """file(name, text) -> the words `--config PATH` of that file."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return shlex.join(["--config", str(tmp_path / name)])

    return write


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_settings(name: str, file: Callable[[str, str], str], capsys: pytest.CaptureFixture[str]) -> None:
    words = file(name, FILES[name])
    recipe = line(words)
    assert recipe == settings.build(
        Recipe,
        instance_data_dir=Path("dog"),
        instance_prompt="a photo of sks dog",
        rank=8,
        targets=("to_q", "to_k"),
        learning_rate=1e-4,
        mixed_precision="no",
        random_flip=True,
    )
    assert capsys.readouterr().err.count("note: --") == 1
    assert line(f"{words} --network_dim 4 --no_random_flip") == settings.replaced(recipe, rank=4, random_flip=False)
    assert line(f"--rank=4 --config_file={shlex.split(words)[1]}") == settings.replaced(recipe, rank=4)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("rnk: 3\nnever: 1", ["--rnk: do you mean --rank?", "--never: there is no such flag; --help lists them"]),
        ("rank: 3\nnetwork_dim: 4", ["--rank has two values: give it one"]),
        ("rank: true", ["--rank yes: is not valid (Input should be a valid integer, unable to parse"]),
        ("a: {rank: 1.5}\nseed: {x: 1}", ["--x: there is no such flag", "--rank 1.5: is not valid (Input should be"]),
        ("targets: to_q\nrandom_flip: 3", ["--targets to_q: is not valid", "--random_flip 3: is not valid"]),
        ("optimizer_args: a=1\nscale_lr: true", ["--optimizer_args: --adam_beta1", "--scale_lr: give the scaled"]),
        ("method: loar", ["--method loar: is not valid (Input should be 'singlora'"]),
        ("plan: true", ["--plan: there is no such flag"]),
        ("no_strict: true", ["--no_strict: do you mean --strict?"]),
    ],
)
def test_a_file_that_cannot_be_understood_is_answered_key_by_key(
    text: str, said: list[str], file: Callable[[str, str], str]
) -> None:
    lines = refused(f"{NEEDED} {file('x.yml', text)}")
    assert len(lines) == len(said)
    assert all(part in one and one.count("x.yml: ") == 1 for one, part in zip(lines, said, strict=True)), lines


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("x.toml", "rank = = 3", "x.toml: is not valid TOML"),
        ("x.yaml", "rank: [", "x.yaml: is not valid YAML"),
        ("x.yaml", "!!python/object/apply:os.system ['true']", "x.yaml: is not valid YAML"),
        ("x.yaml", "3", "x.yaml: has no keys and values"),
        ("x.json", "[3]", "x.json: is not a JSON object"),
        ("x.ini", "rank = 3", "x.ini: must end in .toml, .yaml, .yml, .json"),
        ("x.toml", "rank = 0", "--rank 0: must be at least 1"),
    ],
)
def test_a_file_that_is_none(name: str, text: str, said: str, file: Callable[[str, str], str]) -> None:
    assert said in refused(f"{NEEDED} {file(name, text)}")[0]
    assert "cannot be read: No such file" in refused(f"{NEEDED} --config nowhere.toml")[0]


def test_the_examples_of_the_page_for_newcomers_are_understood(file: Callable[[str, str], str]) -> None:
    page = (Path(__file__).parent.parent / "docs" / "coming_from.md").read_text()
    commands = re.findall(r"^singlora train ((?:.*\\\n)*.*)$", page, flags=re.MULTILINE)
    assert len(commands) == 2
    diffusers, kohya = (line(command.replace("\\\n", " ")) for command in commands)
    assert diffusers.optimization.max_train_steps == 500 and kohya.data.resolution == 512
    in_a_file = line(file("dog.toml", page.partition("```toml\n")[2].partition("```")[0]))
    assert in_a_file.adapter.alpha == 16
    named = set(re.findall(r"`--(\w+)", page))
    ours = settings.flags(Training).keys() | other_flags.RENAMED.keys() | other_flags.SWITCHES.keys()
    assert all(name in ours or other_flags.answer(name, [], ()) for name in named - {"match"}), named
