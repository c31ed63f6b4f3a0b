"""Teach Stable Diffusion one subject from a folder of pictures: DreamBooth with SingLoRA, or with a baseline.

    python train_dreambooth.py --instance_data_dir my_dog --instance_prompt "a photo of sks dog" --output_dir runs/dog

The run reads from top to bottom in `main`. It leaves in OUTPUT_DIR: adapter.safetensors (read back and compared with
the live model), recipe.json, log.jsonl, logs/ for TensorBoard, previews/ and checkpoint-N/.
"""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from singlora_diffusion.data import draws, images, prompts
from singlora_diffusion.errors import UserError
from singlora_diffusion.progress import track
from singlora_diffusion.training.recipe import Recipe

if TYPE_CHECKING:
    from torch import Tensor

    from singlora_diffusion.adapters.registry import Adapter
    from singlora_diffusion.models import Family

ADAPTER = "adapter.safetensors"


def main(recipe: Recipe, *, hint: bool = True) -> Path:
    """Run the recipe; returns the adapter's path.

    Args:
        hint: end by printing the command to type next.

    Raises:
        UserError: something in the recipe or its files must be mended first. Nothing is left half-written.
    """
    # ---- check everything that can be checked before anything slow happens
    out = recipe.output_dir
    named = prompts.split_instance_prompt(recipe.instance_prompt, recipe.identifier)
    pictures = images.check(recipe.instance_data_dir).pictures
    check_recipe(recipe)

    import torch
    from accelerate import Accelerator
    from diffusers.optimization import get_scheduler
    from rich.console import Console
    from torch import nn

    from singlora_diffusion import adapters, formats, models
    from singlora_diffusion.data.latents import batch, encode_pictures
    from singlora_diffusion.training import checkpoint, objective
    from singlora_diffusion.training.run_log import RunLog

    # ---- the frozen base, and what the adapter learns from
    accelerator = Accelerator(
        mixed_precision="fp16" if recipe.mixed_precision == "fp16" else "no",
        gradient_accumulation_steps=recipe.gradient_accumulation_steps,
        cpu=recipe.device == "cpu",
    )
    console = Console(highlight=False, soft_wrap=True, quiet=not accelerator.is_main_process)
    dtype = {"no": "float32", "bf16": "bfloat16", "fp16": "float16"}[recipe.mixed_precision]
    family = models.load(recipe.pretrained_model_name_or_path, dtype, recipe.device or str(accelerator.device))
    resolution = recipe.resolution or family.resolution
    if resolution % family.multiple:
        raise UserError(f"--resolution {resolution} is no multiple of {family.multiple}, as {family.source} needs")
    class_prompt = recipe.class_prompt or " ".join(recipe.instance_prompt.replace(named.identifier, " ", 1).split())
    instance = encode_pictures(family, pictures, resolution, recipe.random_flip, console)
    prior = None
    if recipe.with_prior_preservation:
        class_pictures = class_folder(recipe, family, class_prompt, resolution, console)
        prior = encode_pictures(family, class_pictures, resolution, recipe.random_flip, console)
    texts = [recipe.instance_prompt, class_prompt]
    with torch.no_grad():
        embedded = None if recipe.train_text_encoder else family.encode_prompts(texts)

    # ---- the adapter, its optimizer and its clock
    adapter = adapters.attach(family.networks, recipe.adapter(), recipe.seed)
    out.mkdir(parents=True, exist_ok=True)
    if recipe.gradient_checkpointing:
        unwrapped: Any = next(network.module for network in family.networks.values() if network.role == "denoiser")
        unwrapped.enable_gradient_checkpointing()
        unwrapped.train()  # diffusers checkpoints in train mode only
    optimizer: torch.optim.Optimizer = torch.optim.AdamW(
        adapter.param_groups(recipe.learning_rate, recipe.text_encoder_lr),
        betas=(recipe.adam_beta1, recipe.adam_beta2),
        weight_decay=recipe.adam_weight_decay,
        eps=recipe.adam_epsilon,
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    schedule = get_scheduler(
        recipe.lr_scheduler,
        optimizer,
        num_warmup_steps=recipe.lr_warmup_steps,
        num_training_steps=recipe.max_train_steps,
    )
    rate = schedule.lr_lambdas[0]  # a function of the step, so there is no state to keep
    start = 0
    if recipe.resume_from_checkpoint:
        found = checkpoint.find(out, recipe.resume_from_checkpoint)
        start = checkpoint.restore(found, adapter, optimizer, recipe.as_json())
        console.print(f"resumed from {found} at step {start}")

    class Denoiser(nn.Module):
        """What a step calls, and what accelerate wraps: both networks, so that gradients of both are averaged."""

        def __init__(self) -> None:
            super().__init__()
            self.networks = nn.ModuleDict({name: network.module for name, network in family.networks.items()})

        def forward(self, noisy: Tensor, t: Tensor, which: list[int]) -> Tensor:
            text = family.encode_prompts(texts) if embedded is None else embedded
            return family.denoise(noisy, t, text.select(which))

    denoiser, optimizer = accelerator.prepare(Denoiser(), optimizer)
    about = dict(
        family=family.name,
        base_model=family.source,
        base_hash=family.fingerprint,
        instance_prompt=recipe.instance_prompt,
        identifier=named.identifier,
        class_noun=named.class_noun,
        resolution=resolution,
        recipe=recipe.as_json(),
    )
    if accelerator.is_main_process:
        (out / "recipe.json").write_text(json.dumps(recipe.as_json(), indent=2))
        announce(console, family, adapter, recipe, len(pictures), resolution)

    # ---- the loop
    log = RunLog(out, start, tensorboard=recipe.report_to == "tensorboard") if accelerator.is_main_process else None
    per_pass = recipe.train_batch_size * accelerator.num_processes
    for step in track(range(start, recipe.max_train_steps), "training", console, recipe.max_train_steps):
        adapter.set_step(step + 1)  # u(0) = 0 would make the first gradient exactly zero, so the clock starts at 1
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * rate(step)
        total = torch.zeros((), device=family.device)
        for micro in range(recipe.gradient_accumulation_steps):
            first = (step * recipe.gradient_accumulation_steps + micro) * per_pass
            first += accelerator.process_index * recipe.train_batch_size
            positions = range(first, first + recipe.train_batch_size)
            x0, noise, quantile = batch(instance, recipe.seed, positions, draws.INSTANCE)
            which = [0] * len(x0)
            if prior is not None:
                more = batch(prior, recipe.seed, positions, draws.PRIOR)
                x0, noise, quantile = (torch.cat(pair) for pair in zip((x0, noise, quantile), more, strict=True))
                which += [1] * (len(x0) - len(which))
            t = family.times(quantile).to(family.device)
            x0, noise = x0.to(family.device), noise.to(family.device)
            noisy, target = family.corrupt(x0, noise, t)
            weights = family.loss_weights(t, recipe.snr_gamma)
            with accelerator.accumulate(denoiser):
                loss = objective.loss(
                    denoiser(noisy, t, which),
                    target,
                    prior=0 if prior is None else recipe.train_batch_size,
                    prior_weight=recipe.prior_loss_weight,
                    weights=weights,
                )
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    norm = accelerator.clip_grad_norm_(adapter.parameters(), recipe.max_grad_norm)
                optimizer.step()
                adapter.settle()
                optimizer.zero_grad()
            total += loss.detach() / recipe.gradient_accumulation_steps
        done = step + 1
        if log is None:
            continue
        log.add(step=done, loss=total, lr=optimizer.param_groups[0]["lr"], u=adapter.u, grad_norm=norm)
        if recipe.checkpointing_steps and done % recipe.checkpointing_steps == 0:
            log.flush()
            limit = recipe.checkpoints_total_limit
            raw = getattr(optimizer, "optimizer", optimizer)
            checkpoint.save(out, done, adapter, raw, recipe.as_json(), limit=limit)
        if recipe.validation_steps and done % recipe.validation_steps == 0:
            preview(family, recipe, out / "previews" / f"step-{done:06d}.png", resolution)
    accelerator.wait_for_everyone()
    if log is None:
        return out / ADAPTER

    # ---- the result, read back and compared with the live model
    log.close()
    formats.save(adapter, out / ADAPTER, about={**about, "step": recipe.max_train_steps})
    live = probe(family)
    adapter.detach()
    read_back = formats.load(out / ADAPTER, family.networks)
    if not torch.equal(live, probe(family)):
        raise UserError(f"{out / ADAPTER} does not answer like the model it was saved from: do not use it")
    read_back.detach()
    console.print(
        f"[bold]{out / ADAPTER}[/bold], {(out / ADAPTER).stat().st_size / 1e6:.2f} MB, read back and verified"
    )
    if hint:
        shown, folder = prompts.suggested(family.prompts, named.class_noun), shlex.quote(str(out))
        console.print(f"next: singlora generate --adapter {folder} --prompts {shown} --output_dir {folder}/samples")
    return out / ADAPTER


def check_recipe(recipe: Recipe) -> None:
    """Raise a UserError for settings that cannot work, before any model is loaded."""
    positive = ("max_train_steps", "train_batch_size", "gradient_accumulation_steps", "num_class_images", "rank")
    for name in (*positive, "sample_batch_size", "num_validation_images"):
        if getattr(recipe, name) < 1:
            raise UserError(f"--{name} must be at least 1, not {getattr(recipe, name)}")
    if recipe.resolution is not None and recipe.resolution < 8:
        raise UserError(f"--resolution must be at least 8 pixels, not {recipe.resolution}")
    if recipe.output_dir.exists() and not recipe.output_dir.is_dir():
        raise UserError(f"--output_dir {recipe.output_dir} is a file: name a folder")
    old = recipe.output_dir / ADAPTER
    if old.exists() and not (recipe.overwrite or recipe.resume_from_checkpoint):
        raise UserError(f"{old} exists: choose another --output_dir, or say --overwrite to replace it")


def class_folder(recipe: Recipe, family: Family, prompt: str, resolution: int, console: Any) -> Sequence[Path]:
    """Pictures of the class, with the missing ones generated by the base model."""
    folder = recipe.class_data_dir or recipe.output_dir / "class_pictures"
    folder.mkdir(parents=True, exist_ok=True)
    present = images.check(folder).pictures if any(folder.iterdir()) else ()
    wanted = range(len(present), recipe.num_class_images)
    size = recipe.sample_batch_size
    chunks = [list(wanted[i : i + size]) for i in range(0, len(wanted), size)]
    for seeds in track(chunks, f"generating pictures of {prompt!r}", console):
        made = family.sample(
            [prompt] * len(seeds), seeds, guidance=family.guidance, height=resolution, width=resolution
        )
        for seed, picture in zip(seeds, made, strict=True):
            picture.save(folder / f"class-{recipe.seed}-{seed:05d}.png")
    return images.check(folder).pictures[: recipe.num_class_images]


def preview(family: Family, recipe: Recipe, path: Path, resolution: int) -> None:
    """A row of pictures with fixed seeds, as a PNG."""
    from singlora_diffusion.sampling import contact_sheet

    prompt = recipe.validation_prompt or recipe.instance_prompt
    seeds = range(recipe.num_validation_images)
    row = []
    for i in range(0, len(seeds), recipe.sample_batch_size):
        some = seeds[i : i + recipe.sample_batch_size]
        row += family.sample([prompt] * len(some), some, guidance=family.guidance, height=resolution, width=resolution)
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet.grid([row], [prompt], [f"seed {seed}" for seed in seeds]).save(path)


def probe(family: Family) -> Tensor:
    """The adapted networks' answers to fixed inputs."""
    import torch

    answers = []
    with torch.inference_mode():
        for network in family.networks.values():
            answers.append(network.module(**network.sample_inputs())[0].float().flatten().cpu())
    return torch.cat(answers)


def announce(console: Any, family: Family, adapter: Adapter, recipe: Recipe, pictures: int, resolution: int) -> None:
    """Say what is about to happen, with the exact number of trained parameters."""
    config = adapter.config
    console.print(
        f"{config.method} rank {config.rank} on {len(adapter.layers())} layers of {family.source}: "
        f"[bold]{adapter.num_parameters():,}[/bold] trained parameters"
    )
    console.print(
        f"{pictures} pictures at {resolution} px, {recipe.max_train_steps} steps of {recipe.train_batch_size}"
    )


if __name__ == "__main__":
    from singlora_diffusion.cli import run

    sys.exit(run("train", sys.argv[1:]))
