"""The command lines of other trainers, and settings files: read into the flags that are here. Needs no torch.

`WORDS` is the one table of what diffusers' and kohya's flags mean where their name is not a flag here, or their values
differ. Flags win over a settings file. Whatever cannot be meant is answered in one line, with all of them in it.
"""

from __future__ import annotations

import difflib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

from .. import settings
from ..errors import UserError
from ..terminal import escaped, note
from .recipe import Recipe


class Alias(NamedTuple):
    """Another name of a flag, and what becomes of its value."""

    flag: str
    value: Callable[[str], str] = str


class Means(NamedTuple):
    """A switch that stands for flags with values."""

    words: tuple[str, ...]


class Ignored(NamedTuple):
    """Accepted; the remark says what happens anyway."""

    remark: str


class Refused(NamedTuple):
    """Leaving it out would change what is learned; the hint says what to do."""

    hint: str


class Unless(NamedTuple):
    """Refused unless this flag is given, which then decides, there as here."""

    flag: str
    hint: str


class Given(NamedTuple):
    """A flag as it was written, with its values; `flag` has underscores and no dashes in front."""

    flag: str
    values: tuple[str, ...]


def _one_of(**values: str) -> Callable[[str], str]:
    return lambda value: values.get(value.lower(), value)


def _side(value: str) -> str:
    """kohya writes `512,512`."""
    sides = set(value.replace("x", ",").replace(" ", "").split(","))
    return sides.pop() if len(sides) == 1 else value


_OPTIMIZER = _one_of(
    adamw="adamw", adamw8bit="adamw8bit", prodigy="prodigy", adafactor="adafactor", lion="lion",
    schedulefree="schedule_free", adamwschedulefree="schedule_free", adamw_8bit="adamw8bit",
)  # fmt: skip
_HUB = Refused("download that version once (`hf download MODEL --revision ... --local-dir DIR`) and give the folder")
_LATENTS = Ignored("latents are computed once and kept in memory")
_SQUARE = Ignored("images are cropped to a square around their centre")
_LOADER = Ignored("images are encoded once before the first step: there is no loader")
_ATTENTION = Ignored("attention is PyTorch's own scaled_dot_product_attention, as fast and as frugal")
_DATASET = Refused("put the images into a folder and give it as --instance_data_dir")
_EPOCHS = Unless("max_train_steps", "trainings are counted in steps: epochs x images / batch; give --max_train_steps")
_PREVIEWS = Ignored("previews come every --validation_steps steps")
_CAPTIONS = Refused("all images share --instance_prompt")
_SAMPLING = Ignored("previews are sampled as the base model likes it; `singlora generate` takes steps and scheduler")
_METADATA = Ignored("files carry their recipe in the header")

WORDS: dict[str, Alias | Means | Ignored | Refused | Unless] = {
    # names that are flags here, with values that are not
    "mixed_precision": Alias("mixed_precision", _one_of(fp32="no", float32="no", float16="fp16", bfloat16="bf16")),
    "resolution": Alias("resolution", _side),
    "report_to": Alias("report_to", _one_of(all="tensorboard")),
    # diffusers
    "revision": _HUB,
    "variant": _HUB,
    "tokenizer_name": Refused("the base model's own tokenizer is used: leave it out"),
    "center_crop": _SQUARE,
    "image_interpolation_mode": Ignored("images are scaled with Lanczos' filter"),
    "dataloader_num_workers": _LOADER,
    "prior_generation_precision": Ignored("class images are generated in --mixed_precision"),
    "num_train_epochs": _EPOCHS,
    "lora_dropout": Refused("no method here has dropout: leave it out"),
    "use_8bit_adam": Means(("--optimizer", "adamw8bit")),
    "optimizer": Alias("optimizer", _OPTIMIZER),
    "prodigy_beta3": Refused("Prodigy's own default, the square root of --adam_beta2, is used: leave it out"),
    "prodigy_decouple": Ignored("so it is"),
    "prodigy_use_bias_correction": Ignored("so it is"),
    "prodigy_safeguard_warmup": Ignored("so it is"),
    "offset_noise": Means(("--noise_offset", "0.1")),
    "allow_tf32": Refused("float32 is float32: leave it out, or take --mixed_precision bf16"),
    "validation_images": Refused("previews need none: leave it out"),
    "push_to_hub": Refused("upload OUTPUT_DIR with `hf upload`"),
    "hub_model_id": Refused("upload OUTPUT_DIR with `hf upload`"),
    "scale_lr": Refused("give the product itself as --learning_rate"),
    "enable_xformers_memory_efficient_attention": _ATTENTION,
    "pre_compute_text_embeddings": Ignored("prompts are encoded once, unless --train_text_encoder"),
    "tokenizer_max_length": Ignored("the base model's own length is used"),
    "max_sequence_length": Ignored("the base model's own length is used"),
    "text_encoder_use_attention_mask": Refused("only DeepFloyd IF's encoder needs it, and IF is not supported"),
    "class_labels_conditioning": Refused("only DeepFloyd IF's upscaler needs it, and IF is not supported"),
    "local_rank": Ignored("torchrun and accelerate say it by the environment"),
    "validation_epochs": _PREVIEWS,
    "validation_scheduler": _SAMPLING,
    "logging_dir": Ignored("curves are in OUTPUT_DIR/logs"),
    "hub_token": Refused("log in with `hf auth login`: a token on a command line stays in the shell's history"),
    "cache_dir": Refused("set the environment variable HF_HUB_CACHE"),
    "dataset_name": _DATASET,
    "dataset_config_name": _DATASET,
    "image_column": _DATASET,
    "caption_column": _CAPTIONS,
    "repeats": Ignored("images are drawn anew in every epoch, however few: --max_train_steps says how long"),
    "lora_layers": Alias("targets"),
    "use_dora": Means(("--dora",)),
    "output_kohya_format": Ignored("`singlora export RUN/adapter.safetensors` writes any tool's form, kohya's too"),
    "do_edm_style_training": Refused("the base model's own noise schedule is used: leave it out"),
    "guidance_scale": Ignored("the base model's own guidance is used"),
    "cache_latents": _LATENTS,
    "upcast_before_saving": Ignored("adapters are trained and saved in float32"),
    "set_grads_to_none": Ignored("gradients are"),
    "skip_final_inference": Ignored("there is none; the last preview is --validation_steps' matter"),
    "do_fp8_training": Refused("--quantize int8 or nf4 keeps the base model in few bits"),
    "bnb_quantization_config_path": Refused("--quantize nf4 is bitsandbytes' 4 bits"),
    "offload": Ignored("nothing is offloaded: --quantize and --gradient_checkpointing save memory"),
    "aspect_ratio_buckets": _SQUARE,
    "train_text_encoder_ti": Refused("textual inversion is not here: --train_text_encoder adapts the encoders"),
    "token_abstraction": Refused("textual inversion is not here: --instance_prompt names the identifier"),
    # kohya
    "pretrained_model_name": Alias("pretrained_model_name_or_path"),
    "train_data_dir": Alias("instance_data_dir"),
    "output_name": Ignored("the adapter is OUTPUT_DIR/adapter.safetensors"),
    "config_file": Alias("config"),
    "network_module": Ignored("--method chooses the adapter: singlora, lora, lora+, dora, oft, lokr"),
    "network_args": Refused("each option is a flag of its own, as --loraplus_ratio"),
    "network_train_unet_only": Ignored("so it is without --train_text_encoder"),
    "network_weights": Refused("--resume_from_checkpoint goes on with a run"),
    "max_train_epochs": Refused("trainings are counted in steps: epochs x images / batch; give --max_train_steps"),
    "sdpa": _ATTENTION,
    "xformers": _ATTENTION,
    "mem_eff_attn": _ATTENTION,
    "lowram": Ignored("memory is taken as it is needed"),
    "highvram": Ignored("memory is taken as it is needed"),
    "cache_latents_to_disk": _LATENTS,
    "vae_batch_size": Ignored("images are encoded one by one"),
    "cache_text_encoder_outputs": Ignored("prompts are encoded once, unless --train_text_encoder"),
    "cache_text_encoder_outputs_to_disk": Ignored("prompts are encoded once, unless --train_text_encoder"),
    "enable_bucket": _SQUARE,
    "min_bucket_reso": _SQUARE,
    "max_bucket_reso": _SQUARE,
    "bucket_reso_steps": _SQUARE,
    "bucket_no_upscale": _SQUARE,
    "max_data_loader_n_workers": _LOADER,
    "persistent_data_loader_workers": _LOADER,
    "flip_aug": Means(("--random_flip",)),
    "color_aug": Refused("colours are left as they are: a subject is known by them"),
    "caption_extension": _CAPTIONS,
    "shuffle_caption": _CAPTIONS,
    "keep_tokens": _CAPTIONS,
    "caption_dropout_rate": _CAPTIONS,
    "save_model_as": Ignored("adapters are safetensors; `singlora export` writes other forms"),
    "save_precision": Ignored("adapters are saved in float32, as they are trained; `singlora export` takes --dtype"),
    "save_every_n_epochs": Ignored("checkpoints come every --checkpointing_steps steps"),
    "save_last_n_steps": Refused("--checkpoints_total_limit keeps the newest so many checkpoints"),
    "max_step_saves_to_keep": Alias("checkpoints_total_limit"),
    "save_state": Ignored("every checkpoint holds the whole state"),
    "sample_prompts": Refused("--validation_prompt is the prompt itself"),
    "sample_every_n_steps": Alias("validation_steps"),
    "sample_every_n_epochs": _PREVIEWS,
    "sample_sampler": _SAMPLING,
    "log_with": Alias("report_to", _one_of(all="tensorboard")),
    "log_prefix": Ignored("curves are in OUTPUT_DIR/logs"),
    "optimizer_type": Alias("optimizer", _OPTIMIZER),
    "optimizer_args": Refused("each option is a flag of its own, as --adam_weight_decay"),
    "diff_output_preservation": Means(("--with_prior_preservation", "--num_class_images", "0")),
    "clip_skip": Refused("the base model's own layer of the text encoder is used: leave it out"),
    "no_half_vae": Ignored("the autoencoder is kept in a dtype that it can compute in"),
    "fp8_base": Refused("--quantize int8 or nf4 keeps the base model in few bits"),
    "full_fp16": Refused("adapters are trained in float32: --mixed_precision fp16 is the base model's"),
    "full_bf16": Refused("adapters are trained in float32: --mixed_precision bf16 is the base model's"),
    "v2": Ignored("the base model says itself what it is"),
    "v_parameterization": Ignored("the base model says itself what it predicts"),
    "training_comment": _METADATA,
    "metadata_title": _METADATA,
    "metadata_author": _METADATA,
    "console_log_simple": Ignored("the terminal's lines are simple"),
    # ai-toolkit, OneTrainer, SimpleTuner
    "linear": Alias("rank"),
    "linear_alpha": Alias("alpha"),
    "lr": Alias("learning_rate"),
    "steps": Alias("max_train_steps"),
    "batch_size": Alias("train_batch_size"),
    "gradient_accumulation": Alias("gradient_accumulation_steps"),
    "trigger_word": Alias("identifier"),
    "sample_every": Alias("validation_steps"),
    "save_every": Alias("checkpointing_steps"),
    "model_type": Ignored("the base model says itself what it is"),
}
"""Other trainers' flag, or one of ours with other trainers' values -> what is meant here."""


def read(words: Sequence[str]) -> list[str]:
    """The words of a command line as the flags here, those of its --config in front. Remarks go to stderr.

    Raises:
        UserError: flags that are not here, each with the one to use instead; or the settings file cannot be read.
    """
    here = settings.spellings(Recipe)
    flags, remarks = _understood(_given(words), here)
    files = [one.values[0] for one in flags if one.flag == "config" and one.values]
    if files:
        others, more = _understood(_of_file(Path(files[-1]).expanduser()), here)
        decided = {here.get(one.flag.removeprefix("no_"), here.get(one.flag)) for one in flags}
        flags = [one for one in others if here.get(one.flag, one.flag.removeprefix("no_")) not in decided] + flags
        remarks |= more
    for flag, remark in remarks.items():
        note(f"--{escaped(flag, 60)}: {remark}")
    return [word for one in flags for word in _spelled(one)]


def _spelled(given: Given) -> Sequence[str]:
    """As the parser takes it: what begins with a dash is no value to it unless `=` says so."""
    if len(given.values) == 1 and given.values[0].startswith("-"):
        return (f"--{given.flag}={given.values[0]}",)
    return (f"--{given.flag}", *given.values)


def _understood(given: Sequence[Given], here: Mapping[str, str]) -> tuple[list[Given], dict[str, str]]:
    """What is meant, by flags that are here, and remarks by what was written.

    Raises:
        UserError: each flag that is not here, with a hint.
    """
    meant: list[Given] = []
    remarks: dict[str, str] = {}
    refused: dict[str, str] = {}
    written = {one.flag for one in given}
    for one in given:
        off = one.flag.startswith("no_") and one.flag not in WORDS
        name = one.flag.removeprefix("no_") if off else one.flag
        match WORDS.get(name):
            case Alias(flag, value):
                meant.append(Given(f"no_{flag}" if off else flag, tuple(map(value, one.values))))
            case Means(words):
                meant += [] if off else _given(words)
            case Ignored(remark) if not off:
                remarks[name] = remark
            case Unless(flag, _) if flag in written:
                remarks[name] = f"--{flag} decides"
            case Refused(hint) | Unless(_, hint) if not off:
                refused[name] = hint
            case None if name in here or one.flag in here or name in ("help", "h"):
                meant.append(one)
            case None:
                near = difflib.get_close_matches(name, [*here, *WORDS], 1, cutoff=0.7)
                refused[name] = f"there is no such flag; {f'--{near[0]} is near' if near else '--help lists them'}"
    if refused:
        raise UserError("; ".join(f"--{escaped(flag, 60)}: {hint}" for flag, hint in refused.items()))
    return meant, remarks


def _given(words: Sequence[str]) -> list[Given]:
    """A command line, flag by flag; what stands before the first flag is left for the parser to refuse."""
    found: list[Given] = []
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word[2:].partition("=")
            found.append(Given(flag.replace("-", "_"), (value,) if equals else ()))
        elif word == "-h":
            found.append(Given("help", ()))
        elif found:
            found[-1] = Given(found[-1].flag, (*found[-1].values, word))
        else:
            raise UserError(f"{escaped(word)}: flags begin with --")
    return found


def _of_file(path: Path) -> list[Given]:
    """A settings file as a command line would say it. Tables, as kohya's files have them, only group.

    Raises:
        UserError: it cannot be read.
    """
    return [given for key, value in _flat(_parsed(path)) for given in _said(path, key, value)]


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield from _flat(value)
        else:
            yield str(key).replace("-", "_"), value


def _said(path: Path, key: str, value: Any) -> Iterator[Given]:
    if isinstance(value, bool):
        yield Given(key if value else f"no_{key}", ())
    elif isinstance(value, list):
        yield Given(key, tuple(map(str, value)))
    elif value is None or isinstance(value, int | float | str):
        yield Given(key, (str(value),))
    else:
        raise UserError(
            f"{escaped(path, 1000)}: {escaped(key, 60)} must be a number, a text, a switch or a list of them"
        )


def _parsed(path: Path) -> Mapping[str, Any]:
    """
    Raises:
        UserError: it is not there, not of a known kind, or not what its ending says.
    """
    reader = READERS.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"--config {escaped(path, 1000)}: must end in {', '.join(READERS)}")
    try:
        found = reader(path.read_text(encoding="utf-8"))
    except OSError as error:
        from ..files import reason

        raise UserError(f"--config {escaped(path, 1000)}: {reason(error)}") from error
    except Exception as error:  # each library has an error of its own for a file that is torn
        said = " ".join(str(error).split())
        raise UserError(f"--config {escaped(path, 1000)}: cannot be read: {escaped(said, 200)}") from error
    if not isinstance(found, Mapping):
        raise UserError(f"--config {escaped(path, 1000)}: must be a table of settings")
    return found


def _toml(text: str) -> Any:
    name = "tomllib" if sys.version_info >= (3, 11) else "tomli"
    return import_module(name).loads(text)


def _yaml(text: str) -> Any:
    import yaml

    return yaml.safe_load(text)


READERS: dict[str, Callable[[str], Any]] = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": json.loads}
"""By the ending of a settings file."""
