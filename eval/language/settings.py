"""The settings of fine-tunings, and the article's own where it says them. Needs no torch: `--help` reads them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

from annotated_types import Interval

from singlora_diffusion.adapters.config import Rank
from singlora_diffusion.settings import Count, CountOrZero, Positive

from .tasks import Name

FROZEN = "frozen"
"""What stands for a method where the classifier alone is trained."""
Method = Literal["frozen", "singlora", "lora", "lora+", "dora"]


@dataclass(frozen=True)
class LanguageSettings:
    """Fine-tune language models for a task of two texts, with every method and seed. None: as in the article."""

    models: tuple[str, ...]
    """Folders of transformers, such as `eval.language.tiny` makes, or Hugging Face hub ids."""
    task: Name = "toyworld"
    """mnli, qqp, qnli: of GLUE, by datasets. toyworld: inference from captions, made here."""
    methods: tuple[Method, ...] = ("frozen", "singlora", "lora", "lora+", "dora")
    """frozen: the classifier alone, which the others train too."""
    rates: tuple[Positive, ...] = ()
    """Learning rates of adapter and classifier, each with every method. Empty: the article's one for each method."""
    seeds: Annotated[int, Interval(ge=1, le=1000)] = 3
    """How many: of the adapter's start, the classifier's, and the order of the examples."""
    rank: Rank = 8
    """Rank of every method."""
    alpha: Positive | None = None
    """The update is scaled by alpha / rank."""
    loraplus_ratio: Positive | None = None
    """lora+: the learning rate of B over that of A."""
    ramp_steps: CountOrZero | None = None
    """SingLoRA: T of the ramp. None: 1 % of the steps, as in appendix A.1; section 6.1 has 1000."""
    lora_dropout: Annotated[float, Interval(ge=0, lt=1)] | None = None
    """Probability that an update does not see a number of what its layer reads."""
    epochs: Count | None = None
    """Times that the training examples are gone through."""
    max_train_examples: Count | None = None
    """The first so many examples of the training split. None: all."""
    train_batch_size: Count = 32
    """Pairs of texts in a step, over all processes."""
    max_length: Annotated[int, Interval(ge=8, le=4096)] = 128
    """Tokens of a pair; what is longer is cut off."""
    mixed_precision: Literal["no", "fp16", "bf16"] = "no"
    """The article has fp16."""
    keep_adapters: bool = True
    """Keep a checkpoint after each epoch, and in the end the adapter, also as a folder of PEFT's. For many short runs:
    --no_keep_adapters."""
    output_dir: Path = Path("runs/language/runs")
    """A folder for each run goes in here. The same command again goes on where it was."""


class Cell(NamedTuple):
    """One fine-tuning."""

    model: str
    method: str
    rate: float
    seed: int

    @property
    def name(self) -> str:
        """Its folder, below the model's."""
        return f"{self.method}/lr-{self.rate:g}-seed-{self.seed}"


class Protocol(NamedTuple):
    """How the article trains a kind of model (section 6.1; of LoRA+, whose set-up it follows, appendix C)."""

    alpha: float
    epochs: int
    decays: bool
    """Whether the rate falls linearly to zero, or stays."""
    rates: Mapping[str, float]
    ratio: float
    """lora+: B's rate over A's."""
    dropout: float = 0.0


GLUE_RATES = {FROZEN: 1e-3, "singlora": 1e-3, "lora": 4e-4, "lora+": 2e-4, "dora": 5e-4}
PROTOCOLS: Mapping[str, Protocol] = {
    "roberta": Protocol(8, 3, True, GLUE_RATES, 20),
    "gpt2": Protocol(8, 3, True, GLUE_RATES, 20),
    "llama": Protocol(16, 1, False, dict.fromkeys(GLUE_RATES, 1e-4), 4, 0.1),  # rates between 5e-5 and 1e-4
}
"""By `model_type`; others are trained as RoBERTa."""


def protocol(model_type: str) -> Protocol:
    return PROTOCOLS.get(model_type, PROTOCOLS["roberta"])
