"""Measures the shipped weights: `python -m singlora_diffusion.toyworld.figures` prints the model card's table.

Everything is measured on images, captions and subjects that no stage has seen, with the weights as they are shipped.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file

from .. import models
from ..models.hub import PACKAGED, WEIGHTS
from . import autoencoding, world
from .captions import PATTERN_WORDS
from .reader import Reader

UNSEEN = 900_000  # image and subject seeds from here on are never trained on


@dataclass(frozen=True)
class Figures:
    """What to measure on."""

    images: int = 1000
    """Generated and rendered images."""
    guidance_scale: float = 3.0
    """For the generated ones."""
    output: Path | None = None
    """Also write the figures as JSON."""


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    settings = tyro.cli(Figures, args=argv, description=__doc__, use_underscores=True)
    figures = {
        **autoencoder(256),
        **reader(settings.images),
        **clip(),
        **dino(),
        **{
            f"{model}, {name}": value
            for model in PACKAGED
            for name, value in prompt_following(settings.images, settings.guidance_scale, model=model).items()
        },
    }
    table = Table("figure", "value")
    for name, value in figures.items():
        table.add_row(name, f"{value:.4g}")
    Console().print(table)
    if settings.output is not None:
        settings.output.write_text(json.dumps(figures, indent=2) + "\n")


def load_reader() -> Reader:
    """The shipped attribute reader."""
    config = json.loads((WEIGHTS / "reader" / "config.json").read_text())
    model = Reader(config["sizes"])
    model.load_state_dict({k: t.float() for k, t in load_file(WEIGHTS / "reader" / "model.safetensors").items()})
    return model.eval()


def autoencoder(n: int) -> dict[str, float]:
    """PSNR in dB of n unseen images."""
    vae = models.load("toyworld").vae
    return {"autoencoder PSNR, dB": autoencoding.psnr(vae, world.batch(range(UNSEEN, UNSEEN + n))["images"])}


def reader(n: int) -> dict[str, float]:
    """Share of n unseen renders whose attributes are read right."""
    seen = world.batch(range(UNSEEN, UNSEEN + n))
    read = _read(seen["images"])
    return {f"reader on renders, {name}": float((read[name] == truth).mean()) for name, truth in seen["labels"].items()}


def prompt_following(n: int, guidance: float, seed: int = 0, model: str = "toyworld") -> dict[str, float]:
    """Share of n generated images that show the class, place and colour of their prompt; seconds per image."""
    rng = np.random.default_rng(seed)
    truth = {
        "class": rng.integers(len(world.CLASSES), size=n),
        "background": rng.integers(len(world.BACKGROUNDS), size=n),
        "colour": rng.integers(len(world.COLOURS), size=n),
    }
    prompts = [
        world.compose(
            world.CLASSES[truth["class"][i]],
            colour=world.COLOURS[truth["colour"][i]],
            place=world.PLACES[world.BACKGROUNDS[truth["background"][i]]][0],
            photo=True,
        )
        for i in range(n)
    ]
    family = models.load(model)
    images, begun = [], time.perf_counter()
    for i in range(0, n, 20):
        chunk = prompts[i : i + 20]
        images += models.sample(family, chunk, range(i, i + len(chunk)), steps=25, guidance=guidance)
    seconds = (time.perf_counter() - begun) / n
    read = _read(np.stack([np.asarray(image) for image in images]))
    right = {f"prompt following, {name}": float((read[name] == value).mean()) for name, value in truth.items()}
    return {**right, "seconds per image, 25 steps": seconds}


def clip(groups: int = 20, size: int = 50) -> dict[str, float]:
    """Share of unseen images whose full caption is found among those of `size` images."""
    from eval.encoders import encoder

    encoders = encoder("toyworld", "clip", str(WEIGHTS / "clip"))
    assert encoders.texts is not None
    hits = []
    for group in range(groups):
        first = UNSEEN + group * size
        images, captions = [], []
        for k in range(first, first + size):
            who, where = world.pretraining_identity(k), world.scene(k)
            images.append(Image.fromarray(world.render(who, where)[0]))
            before, after = PATTERN_WORDS[who.pattern][0]
            place = world.PLACES[where.background][0]
            captions.append(
                world.compose(who.cls, colour=who.colour, before=before, after=after, place=place, photo=True)
            )
        similarity = encoders.images(images) @ encoders.texts(captions).T
        # Two images may have one caption between them; either is right.
        own = similarity.diagonal()
        hits.append((own >= similarity.max(axis=1) - 1e-6).mean())
    return {f"CLIP retrieval out of {size}": float(np.mean(hits))}


def dino(subjects: int = 20, views: int = 4) -> dict[str, float]:
    """ROC AUC of the cosine: the same subject in two places against two subjects of one class."""
    from eval.encoders import encoder

    extract = encoder("toyworld", "dino", str(WEIGHTS / "dino")).images
    same, other = [], []
    for number, cls in enumerate(world.CLASSES):
        who = [world.identity(UNSEEN + 100 * number + i, cls) for i in range(subjects)]
        images = []
        for i, one in enumerate(who):
            for view in range(views):
                place = world.BACKGROUNDS[(i + view * 3) % len(world.BACKGROUNDS)]
                where = world.scene(UNSEEN + 997 * i + view, place)
                images.append(Image.fromarray(world.render(one, where)[0]))
        vectors = extract(images).reshape(subjects, views, -1)
        cosine = np.einsum("ivd,jwd->ijvw", vectors, vectors)
        pairs = ~np.eye(views, dtype=bool)
        same.append(cosine[np.arange(subjects), np.arange(subjects)][:, pairs].ravel())
        other.append(cosine[~np.eye(subjects, dtype=bool)].ravel())
    positive, negative = np.concatenate(same), np.sort(np.concatenate(other))
    below = np.searchsorted(negative, positive, side="left") + np.searchsorted(negative, positive, side="right")
    return {"DINO same against other subject, AUC": float((below / 2 / len(negative)).mean())}


@torch.inference_mode()
def _read(images: np.ndarray) -> dict[str, np.ndarray]:
    model = load_reader()
    parts = [model.read(autoencoding.tensor(images[i : i + 100])) for i in range(0, len(images), 100)]
    return {name: torch.cat([part[name] for part in parts]).numpy() for name in model.sizes}


if __name__ == "__main__":
    main()
