"""Device and dtype: what is chosen on machines other than this one."""

from __future__ import annotations

import pytest
import torch

from singlora_diffusion import device
from singlora_diffusion.errors import UserError


@pytest.mark.parametrize(
    ("cuda", "mps", "chosen"),
    ((True, False, "cuda"), (False, True, "mps"), (True, True, "cuda"), (False, False, "cpu")),
)
def test_the_fastest_device_there_is(cuda, mps, chosen, monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert device.choose(None) == chosen


def test_a_device_that_is_not_here() -> None:
    assert device.choose("cpu") == "cpu"
    for name in ("xpu:7", "warp"):
        with pytest.raises(UserError, match=f"--device {name} is not available here"):
            device.choose(name)


@pytest.mark.parametrize(
    ("name", "capability", "dtype"),
    (
        ("cuda", (9, 0), "bfloat16"),
        ("cuda:1", (8, 0), "bfloat16"),
        ("cuda", (7, 5), "float16"),  # torch only emulates bfloat16 there
        ("cuda:0", (6, 1), "float16"),
        ("cpu", None, "float32"),
        ("mps", None, "float32"),
        ("xpu", None, "float32"),
    ),
)
def test_the_dtype_that_suits_a_device(name, capability, dtype, monkeypatch, capsys) -> None:
    asked = []
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: asked.append(device) or capability)
    assert device.compute_dtype(name, None) == dtype
    assert asked == ([name] if capability else [])
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("wanted", ("float32", "bfloat16", "float16"))
@pytest.mark.parametrize("name", ("cpu", "cpu:0", "cuda", "mps"))
@pytest.mark.parametrize("fast", (True, False))
def test_a_wish_is_granted_and_bfloat16_on_a_slow_cpu_remarked_upon(wanted, name, fast, monkeypatch, capsys) -> None:
    monkeypatch.setattr(device, "_has_bfloat16", lambda: fast)
    assert device.compute_dtype(name, wanted) == wanted
    slow = name.startswith("cpu") and wanted == "bfloat16" and not fast
    remark = device.slow_bfloat16(name, wanted)
    assert (remark is not None) == slow and "float32 is faster" in (remark or "float32 is faster")
    assert capsys.readouterr().err == ""


class _Operators:
    """torch.ops.mkldnn of other builds."""

    def __init__(self, answer: object) -> None:
        self.answer = answer

    def _is_mkldnn_bf16_supported(self) -> object:
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer


@pytest.mark.parametrize(
    ("operators", "known"),
    ((_Operators(True), True), (_Operators(False), False), (_Operators(RuntimeError("no oneDNN")), True), (None, True)),
)
def test_bfloat16_on_a_cpu_is_what_onednn_says(operators, known, monkeypatch) -> None:
    monkeypatch.setattr(torch.ops, "mkldnn", operators)
    assert device._has_bfloat16() is known
