"""Tiny RoBERTa, GPT-2 and LLaMA, pretrained on toyworld's captions by one command, each in minutes on one core.

    python -m eval.language.tiny --output_dir runs/language/models

They are ordinary folders of transformers, one for each kind, with a tokenizer of the captions' words. A document is two
captions of the same object in the same place, each of which leaves something out: what the second one says can often be
read in the first, so that comparing them is worth learning.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from singlora_diffusion import files
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Seed, parse
from singlora_diffusion.toyworld.captions import PATTERN_WORDS, PLACES
from singlora_diffusion.toyworld.identities import CLASSES, COLOURS

from . import entailment

if TYPE_CHECKING:
    from torch import Tensor

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")
"""In RoBERTa's order, whose positions count from the padding's number."""
LENGTH = 64
"""Positions; two captions have 40 words at most."""
WIDTH, LAYERS, HEADS = 48, 2, 4
MASKED = 0.3
"""Share of the words that RoBERTa is asked for."""
BATCH = 64
PEAK, WARM_UP = 3e-3, 100


Name = Literal["roberta", "gpt2", "llama"]


@dataclass(frozen=True)
class PretrainSettings:
    """Which models, and for how long."""

    output_dir: Path = Path("runs/language/models")
    """A folder for each model goes in here; one that is complete stays as it is."""
    kinds: tuple[Name, ...] = ("roberta", "gpt2", "llama")
    """Which of them."""
    steps: Count = 3000
    """Steps of 64 documents."""
    seed: Seed = 0
    """Of weights and documents."""


class Kind(NamedTuple):
    """A kind of language model."""

    make: Callable[[int], Any]
    """A random one for so many words, with the head that it is pretrained with."""
    masked: bool
    """Whether words are left out and asked for, or each is asked for from those before it."""


def _shared(words: int) -> dict[str, Any]:
    return {"vocab_size": words, "bos_token_id": 0, "pad_token_id": 1, "eos_token_id": 2}


def _roberta(words: int) -> Any:
    from transformers import RobertaConfig, RobertaForMaskedLM

    config = RobertaConfig(
        **_shared(words),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH + 2,
        type_vocab_size=1,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return RobertaForMaskedLM(config)


def _gpt2(words: int) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        **_shared(words),
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=HEADS,
        n_inner=2 * WIDTH,
        n_positions=LENGTH,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    return GPT2LMHeadModel(config)


def _llama(words: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        **_shared(words),
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        intermediate_size=2 * WIDTH,
        max_position_embeddings=LENGTH,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


KINDS: Mapping[str, Kind] = {
    "roberta": Kind(_roberta, masked=True),
    "gpt2": Kind(_gpt2, masked=False),
    "llama": Kind(_llama, masked=False),
}


def words() -> list[str]:
    """Every word that captions can have, sorted."""
    phrases = ["a photo of an", *CLASSES, *COLOURS, *(place for places in PLACES.values() for place in places)]
    phrases += [part for pairs in PATTERN_WORDS.values() for pair in pairs for part in pair]
    return sorted({word for phrase in phrases for word in phrase.split()})


def tokenizer() -> Any:
    """Word by word: <s> first caption </s> second caption </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    table = {word: number for number, word in enumerate([*SPECIAL, *words()])}
    made = Tokenizer(models.WordLevel(table, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [(name, table[name]) for name in ("<s>", "</s>")]
    made.post_processor = processors.TemplateProcessing("<s> $A </s>", "<s> $A </s> $B </s>", special_tokens=ends)
    start, padding, end, unknown, mask = SPECIAL
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token=start,
        pad_token=padding,
        eos_token=end,
        sep_token=end,
        unk_token=unknown,
        mask_token=mask,
        model_max_length=LENGTH,
        model_input_names=["input_ids", "attention_mask"],
    )


def batches(kind: Kind, tokens: Any, steps: int, seed: int) -> Iterator[dict[str, Tensor]]:
    """Inputs and labels of a language model with its head, a batch of documents each."""
    import torch

    generator = torch.Generator().manual_seed(seed)
    documents = list(entailment.documents(steps * BATCH, seed))
    for start in range(0, len(documents), BATCH):
        first, second = zip(*documents[start : start + BATCH], strict=True)
        batch = tokens(list(first), list(second), padding=True, return_tensors="pt")
        ids, real = batch["input_ids"], batch["attention_mask"].bool()
        asked = real
        if kind.masked:
            asked = real & (ids >= len(SPECIAL)) & (torch.rand(ids.shape, generator=generator) < MASKED)
            batch["input_ids"] = ids.masked_fill(asked, tokens.mask_token_id)
        yield {**batch, "labels": ids.masked_fill(~asked, -100)}


def pretrained(name: str, settings: PretrainSettings) -> tuple[Any, Any, float]:
    """A model of this kind, its tokenizer, and its mean loss over the last tenth of the steps."""
    import torch

    kind, tokens = KINDS[name], tokenizer()
    torch.manual_seed(settings.seed)
    network = kind.make(len(tokens)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01)
    losses: list[float] = []
    for step, batch in enumerate(batches(kind, tokens, settings.steps, settings.seed)):
        for group in optimizer.param_groups:
            group["lr"] = PEAK * min((step + 1) / WARM_UP, 1 - step / settings.steps)
        optimizer.zero_grad()
        loss = network(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
    last = losses[-max(1, settings.steps // 10) :]
    return network.eval(), tokens, sum(last) / len(last)


def run(settings: PretrainSettings) -> None:
    """Pretrain each model and write its folder, whole or not at all; a line for each.

    Raises:
        UserError: the folder cannot be written to.
    """
    from singlora_diffusion.models.quiet import quiet

    files.check_writable(settings.output_dir, "--output_dir")
    for name in settings.kinds:
        folder, part = settings.output_dir / name, settings.output_dir / f".{name}.part"
        if folder.exists():
            print(f"{name}: is there already, in {folder}")
            continue
        began, process = time.monotonic(), time.process_time()
        with quiet():
            network, tokens, loss = pretrained(name, settings)
            shutil.rmtree(part, ignore_errors=True)
            network.save_pretrained(part)
            tokens.save_pretrained(part)
            part.rename(folder)
        seconds, used = time.monotonic() - began, time.process_time() - process
        numbers = sum(p.numel() for p in network.parameters())
        print(
            f"{name}: {numbers:,} parameters, loss {loss:.3f} a word after {settings.steps} steps "
            f"({seconds:.0f} s, {used:.0f} s of a core): {folder}",
            flush=True,
        )


if __name__ == "__main__":
    import sys

    try:
        run(parse(PretrainSettings, sys.argv[1:], "python -m eval.language.tiny", __doc__ or ""))
    except UserError as error:
        sys.exit(f"language.tiny: {error}")
