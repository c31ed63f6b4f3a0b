"""The scores of a cell: which, and against what."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from singlora_diffusion import settings
from singlora_diffusion.models.hub import PACKAGED

from ..encoders import encoder
from ..metrics import METRICS
from ..score import ScoreSettings, score
from . import oracle, worker
from .grid import BASE, Cell, Plan

SCORES, SAMPLES, PRIOR = "scores.json", "samples", "prior"
USUAL = (
    "dino",
    "clip_i",
    "clip_t",
    "clip_t_token",
    "direction",
    "rank_one",
    "average_precision",
    "drift",
    "prior_likeness",
    "prior_drift",
    "diversity",
)
"""Rows of `eval.metrics.METRICS`."""
OF_HELD_OUT = ("gap", "nearest", "copied")
"""Those that mean something only where the references are not the training images."""


def wanted(plan: Plan, cell: Cell) -> tuple[str, ...]:
    """The names of the scores that a cell is to have."""
    subject = plan.subjects[cell.subject]
    names = (*USUAL, *(OF_HELD_OUT if subject.held_out else ()), *plan.settings.decision.primary)
    return (*dict.fromkeys(names), *(oracle.ROWS if _of_toyworld(plan) else ()))


def check(plan: Plan) -> None:
    """Find the encoders before the work, not after it; hub weights are fetched now, once for all workers.

    Raises:
        UserError: files that are missing.
    """
    asked = request(plan, Cell(next(iter(plan.subjects)), BASE), Path())
    for role in sorted({METRICS[name].encoder for name in asked.metrics}):
        encoder(str(asked.protocol), role, getattr(asked.encoders, role))


def scores(plan: Plan, cell: Cell, source: Path) -> dict[str, float | None]:
    """Score the images in the folder of a cell, this one or the base model's; a number for each of `wanted`."""
    result = score(request(plan, cell, source), worker.open_encoder, worker.open_store)
    found: dict[str, Any] = {}
    for name, summary in result["metrics"].items():
        found[name] = summary["mean"] if "mean" in summary else summary["value"]
    if _of_toyworld(plan):
        read = oracle.scores(source / SAMPLES, cell.subject)
        found.update({name: read.get(name) for name in oracle.ROWS})
    return found


def _of_toyworld(plan: Plan) -> bool:
    """Whether images can be held to the truth: toyworld's subjects, by toyworld's own models."""
    settings = plan.settings
    return settings.who.subjects_dir is None and settings.training.pretrained_model_name_or_path in PACKAGED


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
        training_images=subject.images if subject.held_out else None,
        prior_images=source / PRIOR,
        base_prior_images=plan.folder(Cell(cell.subject, BASE)) / PRIOR,
        gallery=plan.gallery,
        gallery_subject=cell.subject,
        protocol=images.protocol or ("toyworld" if model in PACKAGED else "dreambooth-v1"),
        metrics=tuple(name for name in wanted(plan, cell) if name not in oracle.ROWS),
        clip=images.clip,
        dino=images.dino,
        output=plan.folder(cell) / SCORES,
        device=chosen.training.device,
    )
