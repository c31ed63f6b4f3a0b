"""The scores of a cell: which, and against what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from singlora_diffusion import settings

from ..score import ScoreSettings, score
from . import worker
from .grid import BASE, Cell, Plan

SCORES, SAMPLES = "scores.json", "samples"
METRICS = ("dino", "clip_i", "clip_t", "drift", "diversity")
"""Rows of `eval.metrics.METRICS`."""


def wanted(plan: Plan, cell: Cell) -> tuple[str, ...]:
    """The names of the scores that a cell is to have."""
    return (*METRICS, *(name for name in plan.settings.decision.primary if name not in METRICS))


def scores(plan: Plan, cell: Cell, source: Path) -> dict[str, float]:
    """Score the images in the folder of a cell, this one or the base model's; a number for each of `wanted`."""
    result = score(request(plan, cell, source), worker.open_encoder, worker.open_store)
    found: dict[str, Any] = {}
    for name, summary in result["metrics"].items():
        found[name] = summary["mean"] if "mean" in summary else summary["value"]
    return found


def request(plan: Plan, cell: Cell, source: Path) -> ScoreSettings:
    """What is asked of the scorer."""
    chosen, subject = plan.settings, plan.subjects[cell.subject]
    images, model = chosen.images, chosen.training.pretrained_model_name_or_path
    return settings.build(
        ScoreSettings,
        images=source / SAMPLES,
        references=subject.references,
        reference_mode="heldout" if subject.held_out else "train",
        base_images=plan.folder(Cell(cell.subject, BASE)) / SAMPLES,
        protocol=images.protocol or ("toyworld" if model == "toyworld" else "dreambooth-v1"),
        metrics=wanted(plan, cell),
        clip=images.clip,
        dino=images.dino,
        output=plan.folder(cell) / SCORES,
        device=chosen.training.device,
    )
