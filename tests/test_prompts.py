"""Prompt files and instance prompts: `pytest tests/test_prompts.py`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from singlora_diffusion.data import prompts
from singlora_diffusion.data.prompts import Prompt, split_instance_prompt
from singlora_diffusion.errors import UserError


def test_a_prompt_with_and_without_its_identifier() -> None:
    prompt = Prompt("a {token} {class} in the snow", 0)
    assert prompt.text("sks", "dog") == "a sks dog in the snow"
    assert prompt.without_token("dog") == "a dog in the snow"
    assert Prompt("a red {token} {class}", 0).without_token("stuffed animal") == "a red stuffed animal"
    assert Prompt("{class} of {token}", 0).without_token("portrait") == "portrait of"


@pytest.mark.parametrize(
    ("prompt", "identifier", "expected"),
    [
        ("a photo of to dog", "to", "a photo of dog"),
        ('a "sks", dog in sks-land', "sks", 'a "", dog in sks-land'),
        ("a photo of <sks> dog, S* and all", "S*", "a photo of <sks> dog, and all"),
        ("a photo of my  own dog", "my own", "a photo of dog"),
        ("a [v] dog", "[v]", "a dog"),
        (r"a \1 dog", r"\1", "a dog"),
    ],
)
def test_an_identifier_is_left_out_as_a_whole_word(prompt: str, identifier: str, expected: str) -> None:
    assert prompts.InstancePrompt(identifier, "dog").without_identifier(prompt) == expected
    assert prompts.with_word_replaced("sks sksy", "sks", r"\1") == r"\1 sksy"


@pytest.mark.parametrize(("name", "count"), [("object", 25), ("live_subject", 25), ("toyworld", 12)])
def test_bundled_sets(name: str, count: int) -> None:
    templates = [prompt.template for prompt in prompts.load(name)]
    assert len(set(templates)) == count
    assert all("{token} {class}" in template for template in templates)


def test_object_and_live_prompts_share_fifteen() -> None:
    objects, live = ({prompt.template for prompt in prompts.load(name)} for name in ("object", "live_subject"))
    assert len(objects & live) == 15


def test_file_order_comments_and_blank_lines(tmp_path: Path) -> None:
    path = tmp_path / "mine.txt"
    path.write_bytes(b"\xef\xbb\xbf# first\r\n\r\n  a {token} {class}  \r\n\ta {class} on a mat\r\n")  # BOM and CRLF
    assert prompts.load(path) == [Prompt("a {token} {class}", 0), Prompt("a {class} on a mat", 1)]


def test_a_file_is_taken_before_a_set_of_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("object").write_text("a {class}\n")
    assert [prompt.template for prompt in prompts.load("object")] == ["a {class}"]


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "holds no prompts"),
        (b"# only a comment\n", "holds no prompts"),
        (b"a {token} {class}\na {tokn} {class}\n", r"line 2: unknown placeholder \{tokn\}"),
        (b"a {0} {1}\n", "unknown placeholder"),
        (b"a {token} dog\n", r"has no \{class\}"),
        (b"a {token {class}\n", "brace"),
        (b"\xff\xfe\x00", "UTF-8"),
        (b"a {\x1b[31m} {class}\n", r"unknown placeholder \{\N{REPLACEMENT CHARACTER}\[31m\}"),
        (b"\x1b[31m a dog\n", r'"\N{REPLACEMENT CHARACTER}\[31m a dog" has no'),
    ],
)
def test_bad_files(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "bad.txt"
    path.write_bytes(content)
    with pytest.raises(UserError, match=complaint) as error:
        prompts.load(path)
    assert "bad.txt" in str(error.value) and "\n" not in str(error.value)


def test_missing_files_are_pointed_to_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="object, toyworld"):
        prompts.load(tmp_path / "none.txt")
    with pytest.raises(UserError, match="--prompts live_subject"):
        prompts.load(tmp_path / "prompts" / "live_subject.txt")
    with pytest.raises(UserError, match="is a folder"):
        prompts.load(tmp_path)
    for name in ("x" * 300, "nobody\0here", "~nobody-of-this-name/x"):
        with pytest.raises(UserError, match="no such prompt file"):
            prompts.load(name)


def test_the_set_to_try_first() -> None:
    assert prompts.suggested(None, "fluffy Dog") == "live_subject"
    assert prompts.suggested(None, "catalogue") == prompts.suggested(None, "teapot") == "object"
    assert prompts.suggested("toyworld", "dog") == "toyworld"


@pytest.mark.parametrize(
    ("prompt", "identifier", "expected"),
    [
        ("a photo of sks dog", None, ("sks", "dog")),
        ("a photo of a sks stuffed animal on a table", None, ("sks", "stuffed animal")),
        ("photo of <my-dog> dog, high quality", None, ("<my-dog>", "dog")),
        ("a [v] teapot.", None, ("[v]", "teapot")),
        ("S* cat wearing a hat", None, ("S*", "cat")),
        ("a photo of zebulon dog", "zebulon", ("zebulon", "dog")),
        ("a photo of my rex one dog", "rex one", ("rex one", "dog")),
        ("a dog called ohwx, the dog", None, ("ohwx", "dog")),
        ("a photo of sks zwx dog", "zwx", ("zwx", "dog")),
    ],
)
def test_splitting_an_instance_prompt(prompt: str, identifier: str | None, expected: tuple[str, str]) -> None:
    assert split_instance_prompt(prompt, identifier) == expected


@pytest.mark.parametrize(
    ("prompt", "identifier", "complaint"),
    [
        ("a photo of a dog", None, "--identifier"),
        ("a photo of sks", None, "no class noun"),
        ("a photo of sks in the snow", None, "no class noun"),
        ("a photo of sks dog", "zwx", 'lacks the identifier "zwx"'),
        ("a photo of sksy dog", "sks", "lacks the identifier"),  # part of a word is not the word
        ("a photo of sks dog", " ", "identifier is empty"),
        ("", None, "--identifier"),
    ],
)
def test_instance_prompts_that_cannot_be_split(prompt: str, identifier: str | None, complaint: str) -> None:
    with pytest.raises(UserError, match=complaint):
        split_instance_prompt(prompt, identifier)


def test_torch_is_not_imported() -> None:
    program = "import sys, singlora_diffusion.data.prompts; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
