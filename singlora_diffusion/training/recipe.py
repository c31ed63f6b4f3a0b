"""Settings as frozen dataclasses: flags, the recipe file and the adapter's header are made from their fields."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from ..adapters.config import AdapterConfig

Method = Literal["singlora", "lora", "lora+", "dora", "oft", "lokr"]


@dataclass(frozen=True)
class Recipe:
    """One personalization run. Flags keep the names of diffusers' DreamBooth scripts; kohya's names work as aliases."""

    instance_data_dir: Path
    """Folder with 3 to 20 pictures of the subject."""
    instance_prompt: str
    """What the pictures show: a rare word, then the class noun, as in "a photo of sks dog"."""
    output_dir: Path = Path("runs/subject")
    """Where the adapter, previews, logs and checkpoints go."""
    pretrained_model_name_or_path: str = "toyworld"
    """The base model: `toyworld` (comes with the package), a diffusers folder, or a hub id."""

    identifier: str | None = None
    """The rare word of the prompt. None: found in it (sks, ohwx, zwx, <name>, [v])."""
    resolution: int | None = None
    """Side of the training pictures in pixels. None: the model's own."""
    random_flip: bool = False
    """Mirror pictures at random. Leave it off where left and right matter, as with writing."""

    with_prior_preservation: bool = False
    """Train on pictures of the class as well, so that other dogs stay other dogs."""
    class_data_dir: Annotated[Path | None, arg(aliases=["--reg_data_dir"])] = None
    """Folder with pictures of the class. What is missing is generated. None: OUTPUT_DIR/class_pictures."""
    class_prompt: str | None = None
    """What the class pictures show. None: the instance prompt without its identifier."""
    num_class_images: int = 100
    """How many class pictures there shall be."""
    prior_loss_weight: float = 1.0
    """Weight of the class pictures in the loss."""
    sample_batch_size: int = 4
    """Pictures generated at once."""

    method: Method = "singlora"
    """The adapter: singlora, or lora, lora+, dora, oft, lokr out of PEFT."""
    rank: Annotated[int, arg(aliases=["--network_dim", "--lora_rank"])] = 16
    """Rank r. SingLoRA has one matrix per layer, so it fits twice the rank of LoRA into about the same size."""
    alpha: Annotated[float | None, arg(aliases=["--network_alpha", "--lora_alpha"])] = None
    """The update is scaled by alpha / rank. None: alpha = rank."""
    targets: tuple[str, ...] = ("to_q", "to_k", "to_v", "to_out.0")
    """Attention projections of the UNet to adapt."""
    train_text_encoder: bool = False
    """Adapt the text encoder too."""
    text_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "out_proj")
    """Projections of the text encoder to adapt, with --train_text_encoder."""
    text_rank: int | None = None
    """Rank in the text encoder. None: as in the UNet."""
    text_alpha: float | None = None
    """Alpha in the text encoder. None: equal to its rank."""
    ramp_steps: int | None = None
    """SingLoRA's T: u(t) = min(t / T, 1). None: 1 % of the steps, as in the paper's appendix A.1. 0: no ramp."""
    init: Literal["kaiming", "offset"] = "kaiming"
    """SingLoRA's start. offset subtracts the initial product, so that the update starts at exactly zero."""
    signature: Literal["positive", "balanced"] = "positive"
    """SingLoRA's signs. balanced: A S A^T with S = diag(+1, -1, ...), which may also subtract."""
    dora: bool = False
    """SingLoRA with DoRA's learned magnitude on top."""
    rate_by_width: bool = False
    """SingLoRA: lower the rate of wide layers as n^-1/2."""
    loraplus_ratio: Annotated[float, arg(aliases=["--loraplus_lr_ratio"])] = 16.0
    """lora+: the rate of B over the rate of A. SingLoRA with --dora: of the magnitudes over A."""

    max_train_steps: int = 400
    """Optimizer steps."""
    train_batch_size: int = 4
    """Pictures per forward pass and process."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    learning_rate: Annotated[float, arg(aliases=["--unet_lr"])] = 1e-3
    """Peak rate of the optimizer."""
    text_encoder_lr: float | None = None
    """Peak rate in the text encoder. None: as --learning_rate."""
    lr_scheduler: Literal[
        "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"
    ] = "constant"
    """How the rate goes over the steps."""
    lr_warmup_steps: int = 0
    """Steps over which the rate rises from zero (not with `constant`)."""
    adam_beta1: float = 0.9
    """First-moment decay of AdamW."""
    adam_beta2: float = 0.999
    """Second-moment decay of AdamW."""
    adam_weight_decay: float = 1e-2
    """Decoupled weight decay of AdamW."""
    adam_epsilon: float = 1e-8
    """Epsilon of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    snr_gamma: Annotated[float | None, arg(aliases=["--min_snr_gamma"])] = None
    """Min-SNR weighting of the loss; 5 is usual. None: off."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """What the frozen base computes in. The adapter stays in float32."""
    seed: int = 0
    """All randomness follows from it."""

    validation_prompt: str | None = None
    """What the previews show. None: the instance prompt."""
    num_validation_images: int = 4
    """Pictures per preview."""
    validation_steps: int = 100
    """A preview every so many steps. 0: none."""
    checkpointing_steps: Annotated[int, arg(aliases=["--save_every_n_steps"])] = 500
    """A checkpoint every so many steps. 0: none."""
    checkpoints_total_limit: int | None = None
    """Keep only the newest so many checkpoints. None: all."""
    resume_from_checkpoint: Annotated[str | None, arg(aliases=["--resume"])] = None
    """`latest`, or the path of a checkpoint folder."""
    report_to: Literal["tensorboard", "none"] = "tensorboard"
    """Where curves go besides log.jsonl."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""
    overwrite: bool = False
    """Replace the adapter of an earlier run in --output_dir."""

    def adapter(self) -> AdapterConfig:
        """The adapter this recipe asks for."""
        one_percent = max(1, round(0.01 * self.max_train_steps))
        return AdapterConfig(
            method=self.method,
            rank=self.rank,
            alpha=self.alpha,
            targets=self.targets,
            text_rank=self.text_rank,
            text_alpha=self.text_alpha,
            text_targets=self.text_targets if self.train_text_encoder else (),
            init=self.init,
            signature=self.signature,
            dora=self.dora,
            ramp_steps=one_percent if self.ramp_steps is None else self.ramp_steps,
            loraplus_ratio=self.loraplus_ratio,
            rate_by_width=self.rate_by_width,
        )

    def as_json(self) -> dict[str, Any]:
        """Every field as JSON knows it."""
        return {key: str(value) if isinstance(value, Path) else value for key, value in asdict(self).items()}
