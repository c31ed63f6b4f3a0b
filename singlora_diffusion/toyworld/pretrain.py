"""Rebuilds toyworld's weights from nothing: `python -m singlora_diffusion.toyworld.pretrain --work_dir runs/toyworld`.

Stages: images, autoencoder, denoiser, flow, reader, clip, dino, package. Each writes its progress into the work
folder; the same command run again goes on where it was. Stages may run side by side once the images stand, but for
flow, which builds on the denoiser's text encoder: the work folder's, or the shipped one. On a CPU the denoiser takes
some 70 minutes on one core, flow 25 where the processor has bfloat16.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import tyro
from safetensors.torch import save_file

from ..models.hub import PACKAGED, WEIGHTS
from . import architecture, autoencoding, denoising, encoders, flow, world
from .fitting import console

Stage = Literal["images", "autoencoder", "denoiser", "flow", "reader", "clip", "dino", "package"]
HELD_OUT = 900_000  # image seeds from here on are never trained on
HINTS: dict[str, dict[str, Any]] = {
    "pipeline": {"guidance_scale": 3.0, "prompts": "toyworld"},
    "pipeline-flow": {"guidance_scale": 3.0, "prompts": "toyworld", "t5_length": 0, "learning_rate": 3e-3},
}
"""The pipelines by folder, and what is written beside each: `models.parts.hints`."""


@dataclass(frozen=True)
class Pretraining:
    """How long each stage learns, and where it keeps what it made."""

    work_dir: Path = Path("runs/toyworld")
    """Images, checkpoints and sheets."""
    output_dir: Path = WEIGHTS
    """Where the finished weights are put."""
    stages: tuple[Stage, ...] = get_args(Stage)
    """What to do, of: images autoencoder denoiser flow reader clip dino package."""
    images: int = 40_000
    """Rendered for the pipeline, the reader and CLIP."""
    subjects: int = 5_000
    """Rendered four times each for DINO."""
    autoencoder_steps: int = 7_600
    denoiser_steps: int = 7_200
    flow_steps: int = 6_600
    reader_steps: int = 6_000
    clip_steps: int = 1_000
    dino_steps: int = 320
    batch: int = 24
    """Of the denoiser."""
    flow_batch: int = 32
    """Of flow."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"


def main(argv: list[str] | None = None) -> None:
    """Run the stages asked for, in order."""
    settings = tyro.cli(Pretraining, args=argv, description=__doc__, use_underscores=True)
    settings.work_dir.mkdir(parents=True, exist_ok=True)
    for stage in settings.stages:
        console.rule(stage)
        STAGES[stage](settings)


def make_images(settings: Pretraining) -> None:
    """The images with captions and labels, and subjects seen four times."""
    folder, n = settings.work_dir, settings.images
    images, captions, labels = [], [], []
    if not (folder / "captions.json").exists():
        for start in range(0, n, 500):
            part = world.batch(range(start, min(start + 500, n)))
            images.append(part["images"])
            captions += part["captions"]
            labels.append(part["labels"])
            console.print(f"images: {min(start + 500, n)}/{n}")
        np.save(folder / "images.npy", np.concatenate(images))
        for name in labels[0]:
            np.save(folder / f"label-{name}.npy", np.concatenate([part[name] for part in labels]))
        (folder / "captions.json").write_text(json.dumps(captions))
    if not (folder / "subjects.npy").exists():
        seen = []
        for i in range(settings.subjects):
            who = world.pretraining_identity(500_000 + i)
            seen.append([world.render(who, world.scene(700_000 + 4 * i + k))[0] for k in range(4)])
            if i % 500 == 0:
                console.print(f"subjects: {i}/{settings.subjects}")
        np.save(folder / "subjects.npy", np.array(seen))


def read(settings: Pretraining) -> tuple[np.ndarray, list[list[str]], dict[str, np.ndarray]]:
    """Images (memory-mapped), captions, labels."""
    folder = settings.work_dir
    labels = {path.stem.removeprefix("label-"): np.load(path) for path in sorted(folder.glob("label-*.npy"))}
    return np.load(folder / "images.npy", mmap_mode="r"), json.loads((folder / "captions.json").read_text()), labels


def make_autoencoder(settings: Pretraining) -> None:
    images, _, _ = read(settings)
    vae = autoencoding.train(images, steps=settings.autoencoder_steps, folder=settings.work_dir, device=settings.device)
    autoencoding.whiten(vae, images[:2000])
    vae.save_pretrained(settings.work_dir / "vae")
    held_out = world.batch(range(HELD_OUT, HELD_OUT + 256))["images"]
    console.print(f"autoencoder: {autoencoding.psnr(vae, held_out):.2f} dB on 256 held-out images")
    save_file({"latents": autoencoding.encode(vae, images)}, settings.work_dir / "latents.safetensors")


def make_denoiser(settings: Pretraining) -> None:
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    _, captions, _ = read(settings)
    vae = AutoencoderKL.from_pretrained(settings.work_dir / "vae").to(settings.device).eval()
    tokenizer = architecture.tokenizer(world.vocabulary())
    model = denoising.train(
        load_file(settings.work_dir / "latents.safetensors")["latents"],
        captions,
        tokenizer,
        vae,
        steps=settings.denoiser_steps,
        batch=settings.batch,
        folder=settings.work_dir,
        device=settings.device,
    )
    denoising.pipeline(model, vae, tokenizer).save_pretrained(settings.work_dir / "pipeline")


def make_flow(settings: Pretraining) -> None:
    """The transformer, on the work folder's autoencoder and text encoder, or on the shipped ones where it has none."""
    from diffusers import StableDiffusionPipeline
    from safetensors.torch import load_file

    folder = settings.work_dir
    images, captions, _ = read(settings)
    base = folder / "pipeline" if (folder / "pipeline").exists() else PACKAGED["toyworld"]
    parts = StableDiffusionPipeline.from_pretrained(base, dtype=torch.float32, local_files_only=True)
    parts.to(settings.device)
    kept = folder / "flow-latents.safetensors"
    if not kept.exists():
        save_file({"latents": autoencoding.encode(parts.vae, images)}, kept)
    pipe = flow.pipeline(architecture.transformer(), parts.vae, parts.text_encoder, parts.tokenizer)
    flow.train(
        pipe,
        load_file(kept)["latents"],
        captions,
        steps=settings.flow_steps,
        batch=settings.flow_batch,
        folder=folder,
        device=settings.device,
    )
    pipe.save_pretrained(folder / "pipeline-flow")


def make_reader(settings: Pretraining) -> None:
    images, _, labels = read(settings)
    sizes = {name: int(values.max()) + 1 for name, values in labels.items()}
    reader = encoders.train_reader(
        images, labels, sizes, steps=settings.reader_steps, folder=settings.work_dir, device=settings.device
    )
    _write(reader, settings.work_dir / "reader", "model.safetensors", "config.json", {"sizes": sizes})


def make_clip(settings: Pretraining) -> None:
    images, captions, _ = read(settings)
    tokenizer = architecture.tokenizer(world.vocabulary())
    clip = encoders.train_clip(
        images, captions, tokenizer, steps=settings.clip_steps, folder=settings.work_dir, device=settings.device
    )
    text = {**architecture.CLIP["text_cfg"], "vocab_size": len(tokenizer), "hf_tokenizer_name": "."}
    config = {
        "model_cfg": {**architecture.CLIP, "text_cfg": text},
        "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
    }
    _write(clip, settings.work_dir / "clip", "open_clip_model.safetensors", "open_clip_config.json", config)
    tokenizer.save_pretrained(settings.work_dir / "clip")


def make_dino(settings: Pretraining) -> None:
    subjects = np.load(settings.work_dir / "subjects.npy", mmap_mode="r")
    classes = np.array([world.CLASSES.index(world.pretraining_identity(500_000 + i).cls) for i in range(len(subjects))])
    dino = encoders.train_dino(
        subjects, classes, steps=settings.dino_steps, folder=settings.work_dir, device=settings.device
    )
    config = {
        **architecture.DINO,
        "num_classes": 0,
        "num_features": dino.num_features,
        "pretrained_cfg": {
            "input_size": [3, architecture.RESOLUTION, architecture.RESOLUTION],
            "mean": [0.5] * 3,
            "std": [0.5] * 3,
            "num_classes": 0,
        },
    }
    _write(dino, settings.work_dir / "dino", "model.safetensors", "config.json", config)


def make_package(settings: Pretraining) -> None:
    """Copy what is finished to the output folder, in half precision."""
    from safetensors.torch import load_file

    out = settings.output_dir
    for name in (*HINTS, "reader", "clip", "dino"):
        for file in sorted((settings.work_dir / name).rglob("*.*")):
            copy = out / file.relative_to(settings.work_dir)
            copy.parent.mkdir(parents=True, exist_ok=True)
            if file.suffix == ".safetensors":
                save_file({k: _half(t) for k, t in load_file(file).items()}, copy, {"format": "pt"})
            else:
                copy.write_bytes(file.read_bytes())
    for name, hints in HINTS.items():
        if (out / name).exists():
            (out / name / "singlora.json").write_text(json.dumps(hints) + "\n")
    size = sum(file.stat().st_size for file in out.rglob("*.safetensors"))
    console.print(f"{out}: {size / 1e6:.1f} MB of weights")


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor


def _write(model: torch.nn.Module, folder: Path, weights: str, config_name: str, config: dict) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    state = {key: t.detach().cpu().contiguous() for key, t in model.state_dict().items()}
    save_file(state, folder / f"{weights}.new", {"format": "pt"})
    os.replace(folder / f"{weights}.new", folder / weights)
    (folder / config_name).write_text(json.dumps(config, indent=2))


STAGES: dict[Stage, Callable[[Pretraining], None]] = {
    "images": make_images,
    "autoencoder": make_autoencoder,
    "denoiser": make_denoiser,
    "flow": make_flow,
    "reader": make_reader,
    "clip": make_clip,
    "dino": make_dino,
    "package": make_package,
}


if __name__ == "__main__":
    main()
