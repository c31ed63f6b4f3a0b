"""manifest.jsonl: what is read, what is refused, and what a stopped run may leave."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.manifest import read_manifest


def manifest(folder: Path, content: str | bytes) -> Path:
    path = folder / "manifest.jsonl"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_lines_by_file_name_and_the_later_of_two_holds(tmp_path: Path) -> None:
    rows = [{"file": "a.png", "seed": 1}, {"file": "b.png", "prompt": "x\u2028y", "more": [1]}, {"file": "a.png"}]
    text = "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows)
    assert read_manifest(manifest(tmp_path, text)) == {"a.png": rows[2], "b.png": rows[1]}
    assert read_manifest(manifest(tmp_path, "\ufeff" + text.replace("\n", "\r\n") + "\r\n"))["b.png"] == rows[1]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("not json", "Expecting value"),
        ("[1]", "it has type list"),
        ("{}", "it has no file name"),
        ('{"file": 3}', "its file name has type int"),
        ("[" * 100_000, "nested too deep"),
        ('{"file": "a.png", "more": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"file": "a.png", "prompt": ["a dog"]}', "prompt has type list, not str"),
        ('{"file": "a.png", "seed": true}', "seed has type bool, not int"),
        ('{"file": "a.png", "prompt_index": {}}', "prompt_index has type dict"),
        ('{"file": "a.png", "base_model": 1}', "base_model has type int"),
        ('{"file": "a.png", "guidance_scale": NaN}', "not JSON compliant"),
        ('{"file": "a.png", "prompt": "\\ud800"}', "surrogates not allowed"),
        ('{"file": "a.png", "seed": ' + "9" * 5000 + "}", "digits"),
        *((json.dumps({"file": name}), "is not a file name") for name in ("", ".", "..", "../a.png", "/etc/passwd")),
        *((json.dumps({"file": name}), "is not a file name") for name in ("b/a.png", "b\\a.png", "a\0b", "x" * 256)),
        ('{"file": "\\u001b[31m/"}', "is not a file name"),
    ],
)
def test_a_line_that_is_refused_is_named(tmp_path: Path, line: str, why: str) -> None:
    path = manifest(tmp_path, '{"file": "good.png"}\n' + line + "\n")
    for interrupted in (False, True):  # a whole line is no leftover of a stopped run
        with pytest.raises(UserError, match=r"manifest\.jsonl, line 2: ") as caught:
            read_manifest(path, interrupted=interrupted)
        assert why in str(caught.value) and str(caught.value).isprintable() and len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("content", "why"), [("", "lists no images"), (" \n\n", "lists no images"), (b"\xff\xfe{", "not UTF-8")]
)
def test_a_file_that_is_refused(tmp_path: Path, content: Any, why: str) -> None:
    with pytest.raises(UserError, match=why):
        read_manifest(manifest(tmp_path, content))
    with pytest.raises(UserError, match="no such file"):
        read_manifest(tmp_path / "none.jsonl")
    with pytest.raises(UserError, match="cannot be read"):
        read_manifest(tmp_path)


def test_what_a_stopped_run_leaves(tmp_path: Path) -> None:
    whole = json.dumps({"file": "a.png", "prompt": "a dög"}, ensure_ascii=False) + "\n"
    last = json.dumps({"file": "b.png", "seed": 12})
    for length in range(len(last)):
        path = manifest(tmp_path, whole + last[:length])
        assert list(read_manifest(path, interrupted=True)) == ["a.png"]
    assert list(read_manifest(manifest(tmp_path, whole + last), interrupted=True)) == ["a.png", "b.png"]
    with pytest.raises(UserError, match="line 2"):
        read_manifest(manifest(tmp_path, whole + last[:9]))
    assert read_manifest(tmp_path / "none.jsonl", interrupted=True) == {}
    assert read_manifest(manifest(tmp_path, ""), interrupted=True) == {}
