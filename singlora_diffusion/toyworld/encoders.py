"""Stage 4: the encoders that score images (CLIP, DINO) and the attribute reader, trained apart from the pipeline."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPTokenizer

from . import architecture
from .autoencoding import tensor
from .denoising import tokenize
from .fitting import fit
from .reader import Reader


def jitter(pixels: Tensor, draw: torch.Generator) -> Tensor:
    """Small brightness changes, blur and noise, so that an encoder does not live off the renderer's exactness."""
    n = len(pixels)
    pixels = pixels * (1 + 0.1 * torch.randn(n, 1, 1, 1, generator=draw)) + 0.05 * torch.randn(
        n, 1, 1, 1, generator=draw
    )
    blurred = F.avg_pool2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    share = torch.rand(n, 1, 1, 1, generator=draw)
    pixels = torch.lerp(pixels, blurred, share)
    return (pixels + 0.05 * torch.rand(n, 1, 1, 1, generator=draw) * torch.randn(pixels.shape, generator=draw)).clamp(
        -1, 1
    )


def train_reader(
    images: np.ndarray, labels: dict[str, np.ndarray], sizes: dict[str, int], *, steps: int, folder: Path, device: str
) -> Reader:
    """Cross-entropy on every attribute."""
    torch.manual_seed(1)
    reader = Reader(sizes).to(device)
    truth = {name: torch.from_numpy(values).long() for name, values in labels.items()}

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(images), (64,), generator=draw)
        logits = reader(jitter(tensor(images[chosen.numpy()]), draw).to(device))
        losses = {name: F.cross_entropy(logits[name], truth[name][chosen].to(device)) for name in sizes}
        return torch.stack(list(losses.values())).sum(), {name: value.item() for name, value in losses.items()}

    fit("reader", reader, loss, steps=steps, lr=2e-3, folder=folder, ema=0.998)
    return reader


def train_clip(
    images: np.ndarray,
    captions: list[list[str]],
    tokenizer: CLIPTokenizer,
    *,
    steps: int,
    folder: Path,
    device: str,
) -> nn.Module:
    """CLIP's symmetric cross-entropy over a batch (Radford et al. 2021, arXiv 2103.00020)."""
    torch.manual_seed(2)
    clip = architecture.clip(len(tokenizer)).to(device)
    tokens = torch.stack([tokenize(tokenizer, list(column)) for column in zip(*captions, strict=True)], dim=1)
    batch = 96

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw = torch.Generator().manual_seed(step)
        chosen = torch.randint(len(images), (batch,), generator=draw)
        which = torch.randint(tokens.shape[1], (batch,), generator=draw)
        encoded, texts, scale = clip(
            jitter(tensor(images[chosen.numpy()]), draw).to(device), tokens[chosen, which].to(device)
        )
        logits = scale.clamp(max=50) * encoded @ texts.T
        same = torch.arange(batch, device=device)
        hits = (logits.argmax(dim=1) == same).float().mean().item()
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2, {"right": hits}

    fit("clip", clip, loss, steps=steps, lr=1e-3, folder=folder, ema=0.998)
    return clip


def train_dino(images: np.ndarray, classes: np.ndarray, *, steps: int, folder: Path, device: str) -> nn.Module:
    """A timm vision transformer that tells subjects apart whatever the place.

    Departs from DINO (Caron et al. 2021, arXiv 2104.14294), which compares crops of one image: here the two views are
    two renders of one subject in different places, and the others in the batch, all of its class, are the negatives.

    Args:
        images: (subjects, views, 64, 64, 3) uint8.
        classes: (subjects,) class index.
    """
    torch.manual_seed(3)
    dino = architecture.dino().to(device)
    members = [np.flatnonzero(classes == index) for index in np.unique(classes)]
    half = min(32, *(len(one) for one in members))

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        draw, rng = torch.Generator().manual_seed(step), np.random.default_rng((3, step))
        groups = rng.choice(len(members), 2, replace=False)
        subjects = np.concatenate([rng.choice(members[g], half, replace=False) for g in groups])
        views = np.stack([rng.permutation(images.shape[1])[:2] for _ in subjects])  # (2 half, 2)
        pixels = tensor(images[subjects[:, None], views].reshape(-1, *images.shape[2:]))
        vectors = F.normalize(dino(jitter(pixels, draw).to(device)), dim=1).reshape(2 * half, 2, -1)
        logits = 12.0 * vectors[:, 0] @ vectors[:, 1].T
        same = torch.arange(2 * half, device=device)
        hits = (logits.argmax(dim=1) == same).float().mean().item()
        return (F.cross_entropy(logits, same) + F.cross_entropy(logits.T, same)) / 2, {"right": hits}

    fit("dino", dino, loss, steps=steps, lr=1e-3, folder=folder, ema=0.998, weight_decay=0.04)
    return dino
