"""Prompt templates: a text file, an identifier and a class noun -> prompts.

A prompt file holds one template per line, with `{token}` where the identifier goes and `{class}` where the class noun
goes. Blank lines and lines that start with # are skipped.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from ..files import reason
from ..terminal import escaped

RARE_WORDS = ("sks", "ohwx", "zwx")
"""Identifiers in common use: next to no meaning to a text encoder, which is what makes them good ones."""

PUNCTUATION = ",.;:!?\"'()"
"""What may stand at either end of a word without being part of it."""

_MARKED_WORD = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]|\w*\*")  # <dog>, [v], S*
_DESCRIPTION_BEGINS = re.compile(
    "in|on|at|with|without|wearing|under|over|near|by|beside|behind|before|from|against|among|inside|outside|and|or|"
    "that|which|who|is|are|sitting|standing|lying|floating|made|holding",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Prompt:
    """One template and its place in the file it came from, counted from 0 over templates only."""

    template: str
    index: int

    def text(self, token: str, class_noun: str) -> str:
        """The prompt with the identifier: "a sks dog in the snow". White space is collapsed."""
        return " ".join(self.template.replace("{token}", token).replace("{class}", class_noun).split())

    def without_token(self, class_noun: str) -> str:
        """The prompt as CLIP-T reads it, identifier dropped and nothing else changed: "a dog in the snow"."""
        return self.text("", class_noun)


class InstancePrompt(NamedTuple):
    """What the instance prompt says: "a photo of sks dog" -> ("sks", "dog")."""

    identifier: str
    class_noun: str

    def without_identifier(self, prompt: str) -> str:
        """The prompt as it is true of the whole class: "a photo of dog"."""
        return " ".join(with_word_replaced(prompt, self.identifier, "").split())


def with_word_replaced(text: str, word: str, by: str) -> str:
    """The text with something else for a word, or for several in a row, wherever they stand as whole words."""
    pattern = r"\s+".join(re.escape(part) for part in word.split())
    edge = rf"[^\s{re.escape(PUNCTUATION)}]"
    return re.sub(rf"(?<!{edge}){pattern}(?!{edge})", lambda _: by, text)


def bundled() -> dict[str, Path]:
    """The prompt sets that come with the package, by name: object, live_subject, toyworld."""
    here = Path(__file__).parent.parent
    for folder in (here / "prompt_sets", here.parent / "prompts"):  # an installed wheel, a checkout
        if folder.is_dir():
            return {path.stem: path for path in sorted(folder.glob("*.txt"))}
    return {}


def load(source: str | Path) -> list[Prompt]:
    """The templates of a file, or of a bundled set given by its name, in file order.

    A file of that name is taken before a bundled set.

    Raises:
        UserError: no such file or set, not a text file, no template in it, or a template that cannot be filled in.
    """
    path = _locate(source)
    shown = escaped(path, 1000)
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise UserError(f"{shown}: cannot be read: {reason(error)}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{shown}: is not UTF-8 text ({error}); save it as that, a template per line") from error
    prompts: list[Prompt] = []
    for number, line in enumerate(lines, start=1):
        template = line.strip()
        if template and not template.startswith("#"):
            _check(template, f"{shown}, line {number}")
            prompts.append(Prompt(template, len(prompts)))
    if not prompts:
        raise UserError(f"{shown}: holds no prompts; write one per line, such as: a {{token}} {{class}} in the snow")
    return prompts


def split_instance_prompt(prompt: str, identifier: str | None = None) -> InstancePrompt:
    """Find the identifier and the class noun in an instance prompt.

    The identifier is the one given, or else the first word that is written as a placeholder (`<dog>`, `[v]`, `S*`) or
    is one of `RARE_WORDS`. The class noun is what follows it, up to the first punctuation mark or the first word that
    begins a description (in, on, with, wearing, ...): "a photo of sks stuffed animal on a table" -> "stuffed animal".

    Raises:
        UserError: no identifier in the prompt, or nothing after it.
    """
    words, shown = prompt.split(), escaped(prompt)
    if identifier is not None:
        sought = identifier.split()
        if not sought:
            raise UserError("the identifier is empty; name a rare word, such as --identifier sks")
        starts = [i for i in range(len(words)) if [_bare(word) for word in words[i : i + len(sought)]] == sought]
        if not starts:
            raise UserError(
                f'the instance prompt "{shown}" lacks the identifier "{escaped(identifier)}"; '
                f"write it before the class noun"
            )
        start, name = starts[0] + len(sought), " ".join(sought)
    else:
        guesses = [i for i, word in enumerate(words) if _is_identifier(_bare(word))]
        if not guesses:
            raise UserError(
                f'the instance prompt "{shown}" has no identifier: write a rare word before the class noun, as in '
                f'"a photo of sks dog", or say which word it is with --identifier'
            )
        start, name = guesses[0] + 1, _bare(words[guesses[0]])
    class_noun = _class_noun(words[start:])
    if not class_noun:
        raise UserError(
            f'the instance prompt "{shown}" has no class noun after "{name}": write what the subject is, as in '
            f'"a photo of {name} dog"'
        )
    return InstancePrompt(name, class_noun)


def split_folder_name(name: str, identifier: str | None = None) -> InstancePrompt:
    """`split_instance_prompt` of what kohya's folders are named: the first word is the identifier, if no other is."""
    words = name.split()
    if identifier is None and len(words) > 1 and not any(_is_identifier(_bare(word)) for word in words):
        identifier = _bare(words[0])
    return split_instance_prompt(name, identifier)


def _locate(source: str | Path) -> Path:
    path = Path(os.path.expanduser(source))
    shown = escaped(path, 1000)
    if os.path.isfile(path):
        return path
    sets = bundled()
    if str(source) in sets:
        return sets[str(source)]
    if os.path.isdir(path):
        raise UserError(f"{shown}: is a folder, not a prompt file")
    if path.stem in sets:
        hint = f"--prompts {path.stem} takes the one that comes with the package"
    else:
        hint = f"the sets that come with the package are {', '.join(sets)}"
    raise UserError(f"{shown}: no such prompt file; {hint}")


def _check(template: str, where: str) -> None:
    fields = re.findall(r"{[^{}]*}", template)
    if unknown := [field for field in fields if field not in ("{token}", "{class}")]:
        raise UserError(
            f"{where}: unknown placeholder {escaped(unknown[0])}; only {{token}} and {{class}} are filled in"
        )
    if re.search(r"[{}]", re.sub(r"{(token|class)}", "", template)):
        raise UserError(f'{where}: a brace without its partner in "{escaped(template)}"')
    if "{class}" not in fields:
        raise UserError(f'{where}: "{escaped(template)}" has no {{class}}, the place of the class noun')


def _class_noun(words: list[str]) -> str:
    noun: list[str] = []
    for word in words:
        if _DESCRIPTION_BEGINS.fullmatch(word):
            break
        if noun or word.lower() not in ("a", "an", "the"):
            noun.append(_bare(word))
            if word.rstrip(",.;:!?") != word:
                break
    return " ".join(noun).strip()


def _is_identifier(word: str) -> bool:
    return word.lower() in RARE_WORDS or _MARKED_WORD.fullmatch(word) is not None


def _bare(word: str) -> str:
    return word.strip(PUNCTUATION)


LIVE = frozenset({"dog", "puppy", "cat", "kitten", "pet", "bird", "horse", "man", "woman", "person", "boy", "girl"})
"""Class nouns for which DreamBooth's live-subject prompts fit."""


def suggested(model_set: str | None, class_noun: str) -> str:
    """The bundled set to try first: the one a model names for itself, else DreamBooth's live subjects or objects."""
    return model_set or ("live_subject" if LIVE & set(class_noun.lower().split()) else "object")
