"""The settings of a comparison, in groups by concern. Needs no torch: `--help` reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import Interval

from singlora_diffusion import settings
from singlora_diffusion.adapters.budget import rows, target_count
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, CountOrZero, NotNegative, Side
from singlora_diffusion.terminal import escaped

from ..metrics import METRICS
from ..score import MetricName, ProtocolName
from .methods import parsed

CENTRE = 1.8e-3
CENTRES = {"lora+": 1.8e-4}
"""Middle of a method's grid of learning rates where that is not `CENTRE`. lora+: the rate of A, its B learns 16 times
faster."""


@dataclass(frozen=True)
class SubjectSettings:
    """The subjects."""

    subjects: tuple[str, ...] = ()
    """Subjects that the methods are compared on. Empty: all that are no tuning subjects."""
    tuning_subjects: tuple[str, ...] = ()
    """Subjects that learning rates are chosen on. Empty: toyworld's own, or the first three of --subjects_dir."""
    subjects_dir: Path | None = None
    """A folder with a folder of images for each subject; a folder `heldout` in it holds images to score with. None:
    toyworld's subjects."""
    class_nouns: Path | None = None
    """A JSON file {"subject": "class noun"}. None: the folder's name without a number at its end."""
    identifier: str = "sks"
    """The rare word that stands for the subject."""


@dataclass(frozen=True)
class MethodSettings:
    """What is compared, at which sizes and learning rates."""

    methods: tuple[str, ...] = ("lora", "lora+", "dora", "oft", "singlora", "balanced", "offset", "singlora+dora")
    """The rows of `singlora budget` that are compared; the others are compared with the first. Settings of the adapter
    may follow in brackets: `singlora[targets=to_q,to_k;ramp_steps=0]`. Unless `rank` is among them, it is solved."""
    match: str = "lora:8"
    """The budget of trained parameters: METHOD:RANK, or a number. Ranks are chosen to come nearest."""
    targets: tuple[str, ...] | None = None
    """Layers that are adapted, as in `singlora train`. None: the model's default."""
    rates: Annotated[int, Interval(ge=1, le=25)] = 5
    """Learning rates that are tried of each method, on a logarithmic grid of equal width."""
    rate_step: Annotated[float, Interval(ge=1.01, le=100)] = 10**0.5
    """Factor between neighbouring rates."""
    centres: tuple[str, ...] = ()
    """Middle of a method's grid where it is not the default, as in `lora=3e-4 singlora=1e-3`. A method with settings
    in brackets has that of the method without, unless it is named itself."""


@dataclass(frozen=True)
class TrainingSettings:
    """How each adapter is trained: the same for all."""

    pretrained_model_name_or_path: str = "toyworld"
    """`toyworld`, a diffusers folder, or a hub id."""
    max_train_steps: Count = 300
    """Optimizer steps."""
    train_batch_size: Count = 4
    """Images per step."""
    resolution: Side | None = None
    """Side of the training images in pixels. None: the model's own."""
    mixed_precision: Literal["no", "bf16"] = "no"
    """What the frozen base computes in."""
    gradient_checkpointing: bool = False
    """Compute activations twice to save memory."""
    seeds: str = "0"
    """Seeds of the trainings on the test subjects: 7, or 0,5,7, or 0-3."""
    tuning_seeds: str = "0"
    """Seeds of the trainings on the tuning subjects. Two or more give a rate's spread."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""


@dataclass(frozen=True)
class ImageSettings:
    """What is generated with each adapter, and how it is scored."""

    prompts: str | None = None
    """A prompt file, or a set that comes with the package. None: what suits the model and the class noun."""
    image_seeds: str = "0-1"
    """One image per prompt and seed."""
    prior_seeds: str = "0-3"
    """Images of the class prompt, without the identifier: what became of the prior."""
    num_inference_steps: Count | None = None
    """Denoising steps. None: what suits the model."""
    sample_batch_size: Count = 8
    """Images at once."""
    protocol: ProtocolName | None = None
    """Encoders and preprocessing. None: toyworld for toyworld, else dreambooth-v1."""
    clip: str | None = None
    """Another CLIP encoder than the protocol's own."""
    dino: str | None = None
    """Another DINO encoder than the protocol's own."""


@dataclass(frozen=True)
class DecisionSettings:
    """What counts as a difference: named before looking."""

    primary: tuple[MetricName, ...] = ("dino", "clip_t")
    """Scores that decide: their product chooses the learning rates, verdicts and adjusted p are of these alone."""
    bound: NotNegative = 0.01
    """The largest difference of a score that does not matter."""
    noise_cells: CountOrZero = 0
    """Test cells that are run again with another number of threads: numerical noise."""


@dataclass(frozen=True)
class RunSettings:
    """Where results go and who does the work."""

    output_dir: Path = Path("runs/compare")
    """Where everything goes; what is finished there is not done again."""
    engine: Literal["processes", "ray"] = "processes"
    """processes: of this machine. ray: a Ray cluster, one cell a task (pip install singlora-diffusion[ray])."""
    workers: Annotated[int, Interval(ge=1, le=4096)] = 1
    """Cells at once. 1 with `processes`: in this process."""
    gpus_per_cell: NotNegative = 0.0
    """ray: GPUs that a cell asks for; fractions share one."""
    plan: bool = False
    """Run one training with its images and scores, as far as none is done, and say how long the comparison takes."""
    report_only: bool = False
    """Run nothing and report on what is there, also while another process runs cells."""


@dataclass(frozen=True)
class CompareSettings:
    """Compare adapters of equal size, each at a learning rate tuned on other subjects."""

    who: SubjectSettings = field(default_factory=SubjectSettings)
    what: MethodSettings = field(default_factory=MethodSettings)
    training: TrainingSettings = field(default_factory=TrainingSettings)
    images: ImageSettings = field(default_factory=ImageSettings)
    decision: DecisionSettings = field(default_factory=DecisionSettings)
    run: RunSettings = field(default_factory=RunSettings)


def check(chosen: CompareSettings) -> None:
    """Hold the settings to their ranges and to each other.

    Raises:
        UserError: what cannot work, before anything is read or loaded.
    """
    settings.check(chosen)
    if chosen.run.plan and chosen.run.report_only:
        raise UserError("--plan: runs a cell, which --report_only does not: leave one of them out")
    methods = chosen.what.methods
    if not methods or len(set(methods)) < len(methods):
        raise UserError("--methods: name each method once, such as --methods lora singlora")
    for name in methods:
        parsed(name)
    if "/" in chosen.who.identifier or not chosen.who.identifier.strip():
        raise UserError("--identifier: give one word, such as sks")
    if both := set(chosen.who.subjects) & set(chosen.who.tuning_subjects):
        raise UserError(f"--tuning_subjects {escaped(min(both))}: is one of --subjects; tune on others")
    for name in chosen.decision.primary:
        if not METRICS[name].higher_is_better:
            raise UserError(f"--primary {name}: lower is better there, and rates are chosen by a product of scores")
    if not chosen.decision.primary:
        raise UserError("--primary: name at least one score")
    centres(chosen.what)
    rank = chosen.what.match.rpartition(":")[0]
    if rank and rank not in rows():
        raise UserError(f"--match {escaped(chosen.what.match)}: there are {', '.join(rows())}")
    if not rank:
        target_count(chosen.what.match, ())


def centres(what: MethodSettings) -> dict[str, float]:
    """The middle of each method's grid.

    Raises:
        UserError: one of `--centres` says nothing that can be used.
    """
    given: dict[str, float] = {}
    rows_of = {name: parsed(name).row for name in what.methods}
    known = {*rows_of, *rows_of.values()}
    for text in what.centres:
        name, _, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = 0.0
        if name not in known or not 0 < value < 1e9:
            raise UserError(f"--centres {escaped(text)}: give METHOD=RATE, METHOD one of {', '.join(what.methods)}")
        given[name] = value
    return {name: given.get(name, given.get(row, CENTRES.get(row, CENTRE))) for name, row in rows_of.items()}


def learning_rates(what: MethodSettings) -> dict[str, tuple[float, ...]]:
    """The grid of each method, from low to high, symmetric about its centre, to three digits."""
    places = [place - (what.rates - 1) / 2 for place in range(what.rates)]
    return {
        method: tuple(float(f"{centre * what.rate_step**place:.3g}") for place in places)
        for method, centre in centres(what).items()
    }
