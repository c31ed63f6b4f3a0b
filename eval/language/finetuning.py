"""One fine-tuning: an adapter inside a frozen language model, and a classifier on top, trained on pairs of texts.

Examples are drawn by (seed, position), so a run that goes on from a checkpoint ends with the bits of an unbroken one.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from singlora_diffusion import adapters
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.data import draws
from singlora_diffusion.errors import UserError
from singlora_diffusion.terminal import escaped

from .settings import FROZEN, Cell, LanguageSettings, Protocol, protocol
from .tasks import Pairs, Task

if TYPE_CHECKING:
    from singlora_diffusion.adapters.registry import Adapter

HEADS = {"roberta": "classifier"}
"""The classifier's name in transformers by `model_type`; `score` in all that read from left to right."""
BETAS, WEIGHT_DECAY, CLIP = (0.9, 0.99), 0.0, 1.0
EVALUATION_BATCH = 128


@dataclass(frozen=True)
class Run:
    """What is trained, and on what."""

    settings: LanguageSettings
    cell: Cell
    protocol: Protocol
    task: Task
    tokens: Any
    network: nn.Module
    adapter: Adapter | None
    """None: the classifier alone is trained."""
    head: str
    """The classifier's name in the network."""

    @property
    def steps(self) -> int:
        """Of an epoch."""
        return math.ceil(len(self.task.train.labels) / self.settings.train_batch_size)

    @property
    def epochs(self) -> int:
        return self.settings.epochs or self.protocol.epochs

    def factor(self, step: int) -> float:
        """Of the peak rate in a step, the first being 1: linear decay without warm-up, or constant."""
        return 1 - (step - 1) / (self.steps * self.epochs) if self.protocol.decays else 1.0


def prepared(settings: LanguageSettings, cell: Cell, task: Task) -> Run:
    """Load the model and attach what the cell is of.

    Raises:
        UserError: a model that cannot be loaded, or has none of the layers to adapt.
    """
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    try:
        torch.manual_seed(cell.seed)  # of the classifier's start
        tokens = AutoTokenizer.from_pretrained(cell.model)
        network = AutoModelForSequenceClassification.from_pretrained(
            cell.model, num_labels=task.classes, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError, KeyError) as error:
        raise unloadable(cell.model, error) from error
    if tokens.pad_token is None:  # GPT-2 and LLaMA have none
        tokens.pad_token = tokens.eos_token
    network.config.pad_token_id = tokens.pad_token_id
    network.requires_grad_(False)
    kind = network.config.model_type
    run = Run(settings, cell, protocol(kind), task, tokens, network, None, HEADS.get(kind, "score"))
    if cell.method != FROZEN:
        adapter = adapters.attach({"model": network}, _config(run), cell.seed)
        run = Run(settings, cell, run.protocol, task, tokens, network, adapter, run.head)
    network.get_submodule(run.head).requires_grad_(True)
    return run


def unloadable(model: str, error: Exception) -> UserError:
    """One line for a model that transformers does not load."""
    why = escaped(" ".join(str(error).split()), 160)
    return UserError(f"{escaped(model, 200)}: no model that can be loaded: {why}")


def _config(run: Run) -> AdapterConfig:
    """The adapter that the settings name, with the defaults of the model's kind."""
    chosen, method = run.settings, run.cell.method
    given: dict[str, Any] = {"method": method, "rank": chosen.rank, "alpha": chosen.alpha or run.protocol.alpha}
    given["lora_dropout"] = run.protocol.dropout if chosen.lora_dropout is None else chosen.lora_dropout
    if method == "singlora":
        percent = max(1, round(run.steps * run.epochs / 100))
        given["ramp_steps"] = percent if chosen.ramp_steps is None else chosen.ramp_steps
    if method == "lora+":
        given["loraplus_ratio"] = chosen.loraplus_ratio or run.protocol.ratio
    return AdapterConfig(**given)


class Trainer:
    """The optimizer of adapter and classifier, on the device that accelerate chooses."""

    def __init__(self, run: Run) -> None:
        self.run, self.step = run, 0
        self.accelerator = Accelerator(mixed_precision=run.settings.mixed_precision)
        if run.settings.mixed_precision == "fp16" and self.accelerator.device.type == "cpu":
            raise UserError("--mixed_precision fp16 takes a GPU: use bf16 or no")
        run.network.to(self.accelerator.device)
        self.head = {f"{run.head}.{name}": p for name, p in run.network.get_submodule(run.head).named_parameters()}
        groups = [] if run.adapter is None else run.adapter.param_groups(run.cell.rate)
        groups = [*groups, {"params": list(self.head.values()), "lr": run.cell.rate}]
        self.weights = [p for group in groups for p in group["params"]]
        self.peaks = [group["lr"] for group in groups]
        self.optimizer = adamw(groups)
        self.model, self.prepared = self.accelerator.prepare(run.network, self.optimizer)

    def epochs(self) -> Iterator[dict[str, Any]]:
        """Train what is left; yields a row for each epoch once it is done.

        A run whose loss stops being finite ends there, with the accuracy of always naming the most frequent class.
        """
        run, began = self.run, time.monotonic()
        for epoch in range(self.step // run.steps, run.epochs):
            loss = self._epoch(epoch)
            diverged = not math.isfinite(loss)
            accuracy = majority(run.task.test) if diverged else self.accuracy()
            yield {
                "step": self.step,
                "epoch": epoch + 1,
                "loss": None if diverged else loss,
                "accuracy": accuracy,
                "learning_rate": run.cell.rate * run.factor(self.step),
                "seconds": time.monotonic() - began,
            }
            if diverged:
                return

    def _epoch(self, epoch: int) -> float:
        """One pass over the training examples; their mean loss."""
        run, total = self.run, 0.0
        order = _order(len(run.task.train.labels), run.cell.seed, epoch)
        self.model.train()
        for start in range(0, len(order), run.settings.train_batch_size):
            self.step += 1
            torch.manual_seed(run.cell.seed * 1_000_003 + self.step)  # of the network's own dropout
            if run.adapter is not None:
                run.adapter.set_step(self.step)
            for group, peak in zip(self.prepared.param_groups, self.peaks, strict=True):
                group["lr"] = peak * run.factor(self.step)
            batch = order[start : start + run.settings.train_batch_size]
            self.prepared.zero_grad()
            with self._dropping(range(start, start + len(batch))):
                loss = self.model(**self._inputs(run.task.train, self._mine(batch))).loss
                self.accelerator.backward(loss)
            self.accelerator.clip_grad_norm_(self.weights, CLIP)
            self.prepared.step()
            if run.adapter is not None:
                run.adapter.settle()
            total += float(loss.detach()) * len(batch)
            if not math.isfinite(total):
                break
        return total / len(order)

    def _dropping(self, places: Sequence[int]) -> AbstractContextManager[None]:
        """The adapter's dropout for examples at these places of an epoch, with other masks in each."""
        adapter, seed = self.run.adapter, self.run.cell.seed
        if adapter is None or not adapter.config.lora_dropout:
            return nullcontext()
        first = (self.step - 1) // self.run.steps * len(self.run.task.train.labels)
        return adapter.dropping({"denoiser": [draws.mask(seed, first + place, 0) for place in self._mine(places)]})

    def accuracy(self) -> float:
        """Share of the test split that the model labels as it should be; each process looks at its part."""
        test = self.run.task.test
        right = torch.zeros((), device=self.accelerator.device)
        self.model.eval()
        with torch.no_grad():
            for start in range(0, len(test.labels), EVALUATION_BATCH):
                if places := self._share(range(start, min(start + EVALUATION_BATCH, len(test.labels)))):
                    inputs = self._inputs(test, places)
                    labels = inputs.pop("labels")
                    right += (self.model(**inputs).logits.argmax(dim=-1) == labels).sum()
        total: Any = self.accelerator.reduce(right, "sum")
        return float(total) / len(test.labels)

    def _inputs(self, split: Pairs, places: Sequence[int]) -> dict[str, Tensor]:
        """The collator: pairs by place -> token ids, padded to the longest of them, with labels."""
        first, second = [split.first[place] for place in places], [split.second[place] for place in places]
        batch = self.run.tokens(
            first,
            second,
            truncation=True,
            max_length=self.run.settings.max_length,
            padding=True,
            return_tensors="pt",
        )
        batch["labels"] = torch.tensor([split.labels[place] for place in places])
        return {key: tensor.to(self.accelerator.device) for key, tensor in batch.items()}

    def _mine(self, places: Sequence[int]) -> Sequence[int]:
        """As `_share`, but never nothing: the processes wait for each other's gradients."""
        return self._share(places) or places[:1]

    def _share(self, places: Sequence[int]) -> Sequence[int]:
        """This process's part of a batch."""
        return places[self.accelerator.process_index :: self.accelerator.num_processes]


def adamw(groups: list[dict[str, Any]]) -> torch.optim.Optimizer:
    """The article's optimizer."""
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=WEIGHT_DECAY)


def majority(split: Pairs) -> float:
    """The accuracy of always naming the most frequent class."""
    return max(Counter(split.labels).values()) / len(split.labels)


def parameters(run: Run) -> Mapping[str, int]:
    """Trained numbers of the adapter and of the classifier."""
    head = sum(p.numel() for p in run.network.get_submodule(run.head).parameters())
    return {"adapter": run.adapter.num_parameters() if run.adapter else 0, "classifier": head}


def _order(number: int, seed: int, epoch: int) -> list[int]:
    found: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed * 10_007 + epoch)).tolist()
    return found
