"""Trained parameters of the article's language models, exactly, from their configurations: no weights, no network.

    python -m eval.language.counts

A layer of (out, in) trains r (out + in) numbers with LoRA, r max(out, in) with SingLoRA, and with DoRA another number
for each output; classifiers are trained as a whole beside them and not counted, there as here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from singlora_diffusion.adapters import budget

RANK = 8
SHOWN = ("lora", "lora+", "dora", "singlora")


@dataclass(frozen=True)
class Model:
    """A model of the article's tables 1 to 3."""

    label: str
    make: Callable[[], Any]
    """The network, on the meta device."""
    printed: Mapping[str, str]
    """Millions as the article has them."""
    remark: str
    """How they differ from the exact ones."""


def _roberta() -> Any:
    from transformers import RobertaConfig, RobertaModel

    return RobertaModel(RobertaConfig(vocab_size=50265, max_position_embeddings=514, type_vocab_size=1))


def _gpt2() -> Any:
    from transformers import GPT2Config, GPT2Model

    return GPT2Model(GPT2Config())  # 12 layers of 768


def _llama() -> Any:
    from transformers import LlamaConfig, LlamaModel

    return LlamaModel(LlamaConfig(hidden_size=4096, intermediate_size=11008, num_hidden_layers=32))


MODELS: Mapping[str, Model] = {
    "roberta": Model(
        "RoBERTa-base",
        _roberta,
        {"lora": ".15", "lora+": ".15", "dora": ".16", "singlora": ".075"},
        "half of what query and value hold at rank 8: rank 4, or one of the two, gives its figures",
    ),
    "gpt2": Model(
        "GPT-2",
        _gpt2,
        {"lora": "1.78", "lora+": "1.78", "dora": "1.78", "singlora": ".89"},
        "SingLoRA is right; LoRA's is twice SingLoRA's, as if every weight were square",
    ),
    "llama": Model(
        "LLaMA-7B",
        _llama,
        {"lora": "20", "lora+": "20", "dora": "21", "singlora": "12"},
        "right, SingLoRA's cut off and not rounded",
    ),
}


def count(model: Model) -> dict[str, int]:
    """Trained parameters by method at `RANK`, of the layers that the article adapts."""
    import torch

    with torch.device("meta"):
        layers = budget.shapes({"model": model.make()})
    return {method: budget.count(method, RANK, layers) for method in SHOWN}


def main() -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table("model", title=f"trained parameters at rank {RANK}: exact (as printed, in millions)")
    for method in SHOWN:
        table.add_column(method, justify="right", no_wrap=True)
    table.add_column("the printed ones")
    for model in MODELS.values():
        found = count(model)
        table.add_row(
            model.label, *(f"{number:,} ({model.printed[method]})" for method, number in found.items()), model.remark
        )
    Console(width=160).print(table)


if __name__ == "__main__":
    main()
