"""The settings of one training, in groups by concern: flags, recipe.json and the adapter's header come from them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

from annotated_types import Interval
from tyro.conf import arg

from .. import files, settings
from ..adapters.config import AdapterConfig, check_options
from ..adapters.methods import METHODS
from ..errors import UserError
from ..models import times
from ..models.times import TimeSettings
from ..settings import Count, CountOrZero, Decay, NotNegative, Positive, Seed, Side
from ..terminal import escaped
from .optimizers import OPTIMIZERS

if TYPE_CHECKING:
    OptimizerName = str
else:
    OptimizerName = Literal[tuple(OPTIMIZERS)]
POLYNOMIAL_END = 1e-7
"""Where diffusers' polynomial schedule ends."""


class MayDiffer:
    """Marks, in a field's annotation, a setting that a run and its continuation need not share."""


@dataclass(frozen=True)
class DataSettings:
    """The subject."""

    instance_data_dir: Annotated[Path, MayDiffer]  # a checkpoint knows the images themselves
    """Folder with 3 to 20 images of the subject; or with folders named as kohya's trainers have it: an epoch has each
    image of 10_sks dog 10 times."""
    instance_prompt: str | None = None
    """What the images show: a rare word, then the class noun, as in "a photo of sks dog". None: what the names of
    kohya's folders say."""
    identifier: str | None = None
    """The rare word of the prompt. None: found in it (sks, ohwx, zwx, <name>, [v])."""
    resolution: Side | None = None
    """Side of the training images in pixels. None: the model's own."""
    random_flip: bool = False
    """Mirror images at random. Leave it off where left and right matter, as with writing."""
    random_crop: bool = False
    """Crop images at random, at one of 8 places along their longer side, instead of in the middle."""
    enable_bucket: bool = False
    """Crop images to buckets, which have about their own proportions and no more area than the square of --resolution,
    instead of to squares. No image is enlarged for it."""
    masked_loss: bool = False
    """Learn from what is white in masks beside images: dog.mask.png, or dog-masklabel.png, for dog.jpg. An image
    without a mask counts as a whole."""
    captions: Literal["auto", "none"] = "auto"
    """auto: an image with a caption beside it (dog.txt for dog.jpg, or a row of metadata.jsonl) has it as its prompt,
    the others have --instance_prompt; a folder without captions trains on that alone. none: captions are ignored."""
    caption_dropout: Annotated[float, Interval(ge=0.0, le=1.0), arg(aliases=["--caption_dropout_rate"])] = 0.0
    """Probability that an instance image is trained on without its prompt."""
    shuffle_caption: bool = False
    """Change the places of a caption's comma-separated tags at random, in 8 orders per image."""
    keep_tokens: CountOrZero = 0
    """So many tags at the beginning of a caption keep their places."""
    encodings_dir: Annotated[Path | None, MayDiffer] = None
    """Folder that keeps encoded images and prompts from run to run, known by their content. What is learned stays the
    same. None: they are encoded in each run."""
    strict: Annotated[bool, MayDiffer] = False
    """Refuse a folder with images that cannot be used, instead of leaving these out."""


@dataclass(frozen=True)
class ModelSettings:
    """The base model."""

    pretrained_model_name_or_path: str = "toyworld"
    """`toyworld` or `toyworld-flow` (they come with the package), a diffusers folder, a hub id, or a .safetensors
    checkpoint of Stable Diffusion 1, 2 or XL."""
    pretrained_vae_model_name_or_path: Annotated[str | None, arg(aliases=["--vae"])] = None
    """Another autoencoder: a diffusers folder, a hub id or a .safetensors file. Generating uses it too. None: the base
    model's own."""
    mixed_precision: Literal["no", "fp16", "bf16"] | None = None
    """What the frozen base computes in; no: float32. The adapter stays in float32. None: what suits the machine, which
    is bf16 on a GPU that has it, fp16 on an older one, no on a CPU."""
    quantize: Literal["nf4", "int8"] | None = None
    """Keep the frozen base in 4 bits (nf4, by bitsandbytes) or 8 (int8, by torchao), to fit a smaller GPU."""
    device: Annotated[str | None, MayDiffer] = None
    """A torch device. None: the GPU if there is one."""


@dataclass(frozen=True)
class PriorSettings:
    """Prior preservation: training on images of the class as well."""

    with_prior_preservation: bool = False
    """Train on class images as well, so that other dogs stay other dogs."""
    class_data_dir: Annotated[Path | None, MayDiffer, arg(aliases=["--reg_data_dir"])] = None
    """Folder with class images. What is missing is generated. None: OUTPUT_DIR/class_images."""
    class_prompt: str | None = None
    """What the class images show. None: the instance prompt without its identifier."""
    num_class_images: Annotated[int, Interval(ge=0, le=100_000)] = 100
    """How many class images there are to be. 0: none; what the base model predicts for the instance images with the
    class prompt is preserved."""
    prior_loss_weight: NotNegative = 1.0
    """Weight of the class images in the loss."""
    sample_batch_size: Annotated[Count, MayDiffer] = 4
    """Images generated at once, for class images and previews."""


@dataclass(frozen=True)
class OptimizationSettings:
    """The optimization of a denoising loss."""

    max_train_steps: Annotated[Count, MayDiffer] = 400
    """Optimizer steps."""
    train_batch_size: Count = 4
    """Images per forward pass and process."""
    gradient_accumulation_steps: Count = 1
    """Forward passes per optimizer step."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    learning_rate: Annotated[Positive | Literal["auto"] | None, arg(aliases=["--unet_lr"])] = None
    """Peak learning rate. None: what is usual for the base model (docs/families.md), the method (docs/methods.md) and
    the optimizer. auto: the best of a few in short trainings before the first step."""
    train_text_encoder: bool = False
    """Adapt the text encoders too."""
    text_encoder_lr: Positive | None = None
    """Peak learning rate in the text encoders. None: as --learning_rate."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """How the learning rate goes over the steps."""
    lr_warmup_steps: CountOrZero = 0
    """Steps over which the learning rate rises from zero; not with `constant`."""
    lr_num_cycles: Count = 1
    """cosine_with_restarts: how often the rate falls."""
    lr_power: Positive = 1.0
    """polynomial: the power."""
    optimizer: OptimizerName = "adamw"
    """adamw8bit needs the extra `bitsandbytes`, prodigy and schedule_free the extras `prodigyopt` and
    `schedulefree`. prodigy finds the rate itself: give --learning_rate 1."""
    adam_beta1: Decay = 0.9
    """First-moment decay of AdamW and its kin."""
    adam_beta2: Decay = 0.999
    """Second-moment decay of AdamW and its kin."""
    adam_weight_decay: NotNegative = 1e-2
    """Decoupled weight decay."""
    adam_epsilon: Positive = 1e-8
    """Epsilon of AdamW and its kin."""
    ema_decay: Annotated[float, Interval(gt=0, lt=1)] | None = None
    """Use the moving average of the adapter with this decay, as 0.99, in files and previews. None: no average."""
    max_grad_norm: Positive = 1.0
    """Gradients are clipped to this norm."""
    snr_gamma: Annotated[Positive | None, arg(aliases=["--min_snr_gamma"])] = None
    """Min-SNR weighting of the loss; 5 is usual. None: off."""
    noise_offset: Annotated[float, Interval(ge=0, le=1)] = 0.0
    """Offset noise: so much noise is the same all over a channel, for darker and brighter images; 0.05 is usual."""
    min_timestep: Annotated[int, Interval(ge=0, le=999)] = 0
    """Train on no less noise than at this of 1000 timesteps."""
    max_timestep: Annotated[int, Interval(ge=1, le=1000)] = 1000
    """Train on less noise than at this of 1000 timesteps."""
    timestep_bias_strategy: Literal["none", "earlier", "later", "range"] = "none"
    """Draw some timesteps more often, or less: earlier, those of little noise; later, those of much; range, from
    --timestep_bias_begin to before --timestep_bias_end."""
    timestep_bias_multiplier: Positive = 1.0
    """How many times as often."""
    timestep_bias_portion: Annotated[float, Interval(gt=0, lt=1)] = 0.25
    """earlier and later: the share of all timesteps."""
    timestep_bias_begin: Annotated[int, Interval(ge=0, le=999)] = 0
    """range: the first of 1000 timesteps."""
    timestep_bias_end: Annotated[int, Interval(ge=1, le=1000)] = 1000
    """range: the first of 1000 timesteps after it."""
    compile: Annotated[bool, arg(aliases=["--torch_compile"])] = False
    """Compile the denoiser's blocks: the first steps take long, all others less. On GPUs."""
    allow_tf32: bool = False
    """Multiply float32 matrices in TF32: faster on newer GPUs, and less exact."""
    seed: Seed = 0
    """All randomness follows from it."""


@dataclass(frozen=True)
class ValidationSettings:
    """Previews while the training runs, and the choice of its best step."""

    validation_prompt: Annotated[str | None, MayDiffer] = None
    """What the previews show. None: the instance prompt."""
    num_validation_images: Annotated[int, Interval(ge=1, le=1000), MayDiffer] = 4
    """Images per preview. Scores of few images tell little: with --validate scores, 8 or more."""
    validation_steps: Annotated[CountOrZero, MayDiffer] = 100
    """A preview every so many steps, and with held-out images a validation. 0: none."""
    validate: Annotated[Literal["loss", "scores"], MayDiffer] = "loss"
    """What the best step is chosen by; its adapter is kept in OUTPUT_DIR/best. loss: the lowest loss on held-out
    images, where there are any. scores: previews are scored by DINO (likeness to held-out images, or else to those
    trained on), CLIP-T (agreement with the prompt) and drift (distance from the base model's images), and the largest
    product of DINO and CLIP-T is best."""
    clip: Annotated[Path | None, MayDiffer] = None
    """CLIP for the scores, a file or a folder. None: as in `singlora score`."""
    dino: Annotated[Path | None, MayDiffer] = None
    """DINO for the scores, a file or a folder. None: as in `singlora score`."""
    held_out_data_dir: Annotated[Path | None, MayDiffer] = None
    """Folder with images of the subject that are not trained on. The loss on them is measured with fixed noise at fixed
    times."""


@dataclass(frozen=True)
class OutputSettings:
    """What is written, and going on with an earlier run."""

    output_dir: Annotated[Path, MayDiffer] = Path("runs/subject")
    """Where the adapter, previews, logs and checkpoints go."""
    checkpointing_steps: Annotated[CountOrZero, MayDiffer, arg(aliases=["--save_every_n_steps"])] = 100
    """A checkpoint every so many steps. 0: only when the run is interrupted."""
    checkpoints_total_limit: Annotated[Count | None, MayDiffer] = None
    """Keep only the newest so many checkpoints. None: all."""
    resume_from_checkpoint: Annotated[str | None, MayDiffer, arg(aliases=["--resume"])] = None
    """Go on from `latest`, or from a checkpoint folder."""
    overwrite: Annotated[bool, MayDiffer] = False
    """Begin anew where there is a run already. Its files are put away into OUTPUT_DIR/.old-1, .old-2, ..."""
    report_to: Annotated[Literal["tensorboard", "wandb", "none"], MayDiffer] = "tensorboard"
    """Where curves and previews go besides log.jsonl; wandb has to be installed. none: nor is progress.png drawn."""
    portable: Annotated[bool, MayDiffer] = True
    """Also write pytorch_lora_weights.safetensors, an ordinary LoRA for diffusers, ComfyUI, A1111 and others."""
    push_to_hub: Annotated[bool, MayDiffer] = False
    """Upload adapter, model card and previews to the Hugging Face hub, into a private repository if there is none
    yet."""
    hub_model_id: Annotated[str | None, MayDiffer] = None
    """The repository on the hub, as owner/name. None: the last part of OUTPUT_DIR, yours."""


@dataclass(frozen=True)
class Recipe:
    """One personalization run. Flags keep the names of diffusers' DreamBooth scripts; kohya's names work as aliases."""

    data: DataSettings
    model: ModelSettings = field(default_factory=ModelSettings)
    prior: PriorSettings = field(default_factory=PriorSettings)
    adapter: AdapterConfig = field(default_factory=AdapterConfig)
    optimization: OptimizationSettings = field(default_factory=OptimizationSettings)
    times: TimeSettings = field(default_factory=TimeSettings)
    validation: ValidationSettings = field(default_factory=ValidationSettings)
    output: OutputSettings = field(default_factory=OutputSettings)


BIAS = {
    "timestep_bias_multiplier": ("earlier", "later", "range"),
    "timestep_bias_portion": ("earlier", "later"),
    "timestep_bias_begin": ("range",),
    "timestep_bias_end": ("range",),
}
"""An option of the timestep bias -> the strategies that it belongs to."""
NEEDED = {
    "train_text_encoder": ("text_encoder_lr", "text_rank", "text_alpha", "text_targets"),
    "shuffle_caption": ("keep_tokens",),
    "push_to_hub": ("hub_model_id",),
    "validate": ("clip", "dino"),
    "with_prior_preservation": ("class_data_dir", "class_prompt", "num_class_images", "prior_loss_weight"),
}
"""A setting -> those that mean nothing without it."""


def check(recipe: Recipe) -> None:
    """Hold every setting to its range, and the settings to each other.

    Raises:
        UserError: what cannot work, before anything is read or loaded.
    """
    settings.check(recipe)
    check_options(recipe.adapter)
    times.check(recipe.times)
    _check_optimization(recipe.optimization)
    output, changed = recipe.output, settings.changed(recipe)
    for needed, names in NEEDED.items():
        if needed not in changed and (given := [f"--{name}" for name in names if name in changed]):
            raise UserError(f"{', '.join(given)}: only with --{needed}")
    if recipe.validation.validate == "scores" and not recipe.validation.validation_steps:
        raise UserError("--validate scores: with --validation_steps 0 there are no previews to score")
    if recipe.prior.class_data_dir is not None and not recipe.prior.num_class_images:
        raise UserError("--class_data_dir: with --num_class_images 0 there are no class images: use one of them")
    if output.overwrite and output.resume_from_checkpoint:
        raise UserError("--overwrite begins anew and --resume_from_checkpoint goes on: use one of them")
    for name, value in settings.as_json(recipe).items():
        _check_text(name, value)
    if recipe.data.encodings_dir is not None:
        files.check_writable(recipe.data.encodings_dir, "--encodings_dir")


def _check_optimization(optimization: OptimizationSettings) -> None:
    """Raises a UserError for settings that cannot work together."""
    changed = settings.changed(optimization)
    if optimization.lr_warmup_steps and optimization.lr_scheduler == "constant":
        raise UserError("--lr_warmup_steps: not with --lr_scheduler constant; constant_with_warmup has one")
    if optimization.lr_warmup_steps > optimization.max_train_steps:
        raise UserError(
            f"--lr_warmup_steps {optimization.lr_warmup_steps}: is more than --max_train_steps "
            f"{optimization.max_train_steps}"
        )
    rate = 1.0 if optimization.learning_rate in (None, "auto") else float(optimization.learning_rate)
    if optimization.lr_scheduler == "polynomial" and rate <= POLYNOMIAL_END:
        raise UserError(
            f"--learning_rate {rate:g}: --lr_scheduler polynomial ends at {POLYNOMIAL_END:g}, so "
            f"it must begin above that"
        )
    for name, scheduler in {"lr_num_cycles": "cosine_with_restarts", "lr_power": "polynomial"}.items():
        if name in changed and optimization.lr_scheduler != scheduler:
            raise UserError(f"--{name}: only with --lr_scheduler {scheduler}")
    optimizer = OPTIMIZERS[optimization.optimizer]
    if optimizer.finds_rate and (rate < 0.1 or optimization.learning_rate == "auto"):
        raise UserError(
            f"--learning_rate {escaped(optimization.learning_rate)}: --optimizer {optimization.optimizer} finds the "
            f"rate itself, this is a factor of it: give --learning_rate 1"
        )
    if optimizer.averages and not optimization.lr_scheduler.startswith("constant"):
        raise UserError(
            f"--lr_scheduler {optimization.lr_scheduler}: --optimizer {optimization.optimizer} needs none: take "
            f"constant or constant_with_warmup"
        )
    if optimizer.averages and optimization.ema_decay is not None:
        raise UserError(f"--ema_decay: --optimizer {optimization.optimizer} averages already: leave it out")
    _check_times(optimization, changed)


def _check_times(optimization: OptimizationSettings, changed: Collection[str]) -> None:
    """Raises a UserError for settings of times that mean nothing together."""
    for first, last in (("min_timestep", "max_timestep"), ("timestep_bias_begin", "timestep_bias_end")):
        low, high = getattr(optimization, first), getattr(optimization, last)
        if low >= high:
            raise UserError(f"--{first} {low}: must be less than --{last} {high}")
    strategy = optimization.timestep_bias_strategy
    for name, strategies in BIAS.items():
        if name in changed and strategy not in strategies:
            raise UserError(f"--{name}: only with --timestep_bias_strategy {' or '.join(strategies)}")
    if strategy != "none" and optimization.timestep_bias_multiplier == 1:
        raise UserError(f"--timestep_bias_strategy {strategy}: changes nothing without --timestep_bias_multiplier")


def adapter_config(recipe: Recipe, ramp_steps: int | None = None) -> AdapterConfig:
    """The adapter that the recipe asks for.

    Args:
        ramp_steps: what a ramp without a length gets; None: 1 % of the steps (arXiv 2507.05566, appendix A.1).
    """
    chosen = recipe.adapter
    if chosen.ramp_steps is None and "ramp_steps" in METHODS[chosen.method].options:
        one_percent = max(1, round(0.01 * recipe.optimization.max_train_steps))
        chosen = replace(chosen, ramp_steps=one_percent if ramp_steps is None else ramp_steps)
    if recipe.optimization.train_text_encoder and not chosen.text_targets:
        chosen = replace(chosen, text_targets=None)
    return chosen


def recorded(recipe: Recipe) -> dict[str, Any]:
    """The recipe as files keep it, flat: how one would run it from its beginning, however often it was resumed."""
    return settings.as_json(settings.replaced(recipe, resume_from_checkpoint=None, overwrite=False))


def without_folders(recipe: Recipe) -> dict[str, Any]:
    """`recorded` for files that leave this machine: of each folder and file only its name."""
    groups = (getattr(recipe, one.name) for one in fields(recipe))
    values = {one.name: getattr(group, one.name) for group in groups for one in fields(group)}
    paths = {name for name, value in values.items() if isinstance(value, Path)}
    return {name: Path(value).name if name in paths else value for name, value in recorded(recipe).items()}


def to_be_shared(recipe: Recipe) -> dict[str, Any]:
    """The settings, flat, that a continuation must share with its run; the adapter's own are checked by its file."""
    shared = _shared(Recipe)
    return {key: value for key, value in settings.as_json(recipe).items() if key in shared}


def _shared(kind: Any) -> set[str]:
    """Names of the fields that are not marked `MayDiffer`, those of the adapter aside."""
    hints = get_type_hints(kind, include_extras=True)
    names: set[str] = set()
    for one in fields(kind):
        hint = hints[one.name]
        if hint is AdapterConfig:
            continue
        if is_dataclass(hint):
            names |= _shared(hint)
        elif MayDiffer not in getattr(hint, "__metadata__", ()):
            names.add(one.name)
    return names


def _check_text(name: str, value: Any) -> None:
    """Raises a UserError for bytes that the terminal sent and that are no UTF-8, and for NUL characters."""
    for text in value if isinstance(value, list) else [value]:
        if isinstance(text, str) and ("\0" in text or any("\ud800" <= character <= "\udfff" for character in text)):
            raise UserError(f"--{name} {escaped(text)}: is not valid text")
