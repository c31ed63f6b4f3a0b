"""The flags of `singlora demo`, and what each method learns at unless told otherwise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..adapters.config import MethodName as Method
from ..settings import Count, Positive, Seed

RATE = 2e-3
"""The peak rate of methods for which nobody has looked for a better one."""
RATES: dict[Method, float] = {
    "singlora": 3e-3,
    "lora": 2e-3,
    "lora+": 2e-4,
}
"""Peak rates. singlora and lora: the better of 4 or 5 rates on two of toyworld's tuning subjects, a small search.
lora+: of A; B learns 16 times faster, and at lora's rate agreement with the prompts is lost (CLIP-T 0.61, here 0.75).
"""


@dataclass(frozen=True)
class DemoSettings:
    """Teach the embedded model a subject it has never seen, with SingLoRA and with LoRA of equal size, and compare."""

    subject: str = "backpack-1"
    """A held-out subject of toyworld: backpack-1, dog-1, teapot-2, ... An unknown name lists them all."""
    output_dir: Path = Path("runs/demo")
    """Where everything goes; what is finished there is not done again."""
    methods: tuple[Method, ...] = ("singlora", "lora")
    """The adapters to compare."""
    match: str = "lora:8"
    """How many parameters each may train: METHOD:RANK, or a number. Ranks are chosen to come nearest."""
    max_train_steps: Count = 300
    """Optimizer steps of each."""
    learning_rate: Positive | None = None
    """Peak rate of all. None: 3e-3 for singlora, 2e-3 for lora, from a small search on two tuning subjects;
    2e-4 for lora+ and 2e-3 for any other, not tuned."""
    seed: Seed = 0
    """Of the training, the same for each."""
    prompts: str = "toyworld"
    """What the images show: a prompt file, or a set that comes with the package."""
    seeds: str = "0-1"
    """One image per prompt and seed."""
    pretrained_model_name_or_path: str = "toyworld"
    """The base model: `toyworld`, `toyworld-flow`, a diffusers folder, or a hub id."""
    clip: str | None = None
    """The CLIP encoder of the scores. None: toyworld's own."""
    dino: str | None = None
    """The DINO encoder of the scores. None: toyworld's own."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""
