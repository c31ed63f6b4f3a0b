"""The library as Python imports it: lazily, and as its own docstring says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import singlora_diffusion as sd


def test_importing_it_loads_nothing_heavy() -> None:
    code = "import sys, singlora_diffusion as sd; sd.AdapterConfig(rank=2), sd.UserError, dir(sd); "
    code += "sys.exit(', '.join({'torch', 'diffusers', 'transformers', 'peft'} & set(sys.modules)) or 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")


def test_every_public_name_is_there() -> None:
    assert set(sd.__all__) <= set(dir(sd))
    for name in sd.__all__:
        assert getattr(sd, name).__doc__, name
    with pytest.raises(AttributeError, match="nonsense"):
        sd.nonsense  # noqa: B018


def test_the_example_in_the_docstring_runs(tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sd.__doc__ is not None
    example = re.findall(r"^    (.+)$", sd.__doc__, re.MULTILINE)
    assert len(example) == 9
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"sd": sd, "torch": torch}
    exec("\n".join(example).replace('"toyworld"', repr(str(tiny_model))), names)
    header = sd.formats.read_header("dog.safetensors")
    assert header.trigger() == "sks dog" and header.config == sd.AdapterConfig(
        rank=16, targets=("to_q", "to_k", "to_v", "to_out.0"), text_targets=("q_proj", "v_proj"), ramp_steps=0
    )
    with pytest.raises(sd.UserError, match="attached already"):  # the last line put it back in
        sd.attach(names["family"].networks, sd.AdapterConfig())
