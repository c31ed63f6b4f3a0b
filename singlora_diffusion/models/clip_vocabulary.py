"""CLIP's tokenizer as a folder, from the vocabulary that open_clip carries: the same for every Stable Diffusion."""

from __future__ import annotations

import gzip
import json
from importlib.util import find_spec
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
SIZE = 49408
"""Tokens: 256 bytes, each alone and at the end of a word, what is merged out of these, and two marks."""


def write(folder: Path, length: int, padding: str) -> None:
    """Write the files that `CLIPTokenizer.from_pretrained` reads.

    Args:
        length: tokens of a prompt, with both marks.
        padding: the token that short prompts are filled up with.
    """
    from tokenizers.pre_tokenizers import ByteLevel

    package = find_spec("open_clip")  # not imported: it takes seconds, and only its file is wanted
    assert package is not None and package.origin is not None
    packed = Path(package.origin).with_name("bpe_simple_vocab_16e6.txt.gz").read_bytes()
    letters = sorted(ByteLevel.alphabet())
    count = SIZE - 2 * len(letters) - 2
    merges = gzip.decompress(packed).decode("utf-8").splitlines()[1 : count + 1]
    tokens = [*letters, *(f"{letter}</w>" for letter in letters), *("".join(merge.split()) for merge in merges)]
    vocabulary = {token: number for number, token in enumerate([*tokens, START, END])}
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": START,
        "eos_token": END,
        "unk_token": END,
        "pad_token": padding,
    }
    folder.mkdir(parents=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
