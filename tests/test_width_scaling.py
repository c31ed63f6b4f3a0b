"""The change of a layer's features over its width, against closed forms: `pytest tests/test_width_scaling.py`."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pytest
import torch

from eval.width_scaling import RULES, SHOWN, WidthSettings, changes, run, slope
from singlora_diffusion.errors import UserError

WIDTHS = (32, 128, 512)


def test_the_first_step_of_sgd_in_closed_form() -> None:
    """d/dA of |A A^T x - y|^2 / 2 is g (A^T x)^T + x (A^T g)^T with g = A A^T x - y."""
    n, rank, rate = 24, 3, 0.1 / 24
    found = changes(RULES["singlora sgd -1"], n, rank, seeds=2, seed=5, steps=1)
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(2, n, generator=generator).double().numpy() for _ in range(2))
    a = (torch.randn(2, n, rank, generator=generator) / n**0.5).double().numpy()
    for k in range(2):
        g = a[k] @ a[k].T @ x[k] - y[k]
        moved = a[k] - rate * (np.outer(g, a[k].T @ x[k]) + np.outer(x[k], a[k].T @ g))
        change = moved @ moved.T @ x[k] - a[k] @ a[k].T @ x[k]
        assert found[k, 0] == pytest.approx(np.sqrt(np.mean(change**2)), rel=1e-5)


def test_lora_moves_by_b_alone_at_first() -> None:
    n, rank = 24, 3
    (found,) = changes(RULES["lora+ adam"], n, rank, seeds=1, seed=5, steps=1)
    generator = torch.Generator().manual_seed(5)
    x, _ = (torch.randn(1, n, generator=generator) for _ in range(2))
    z = (torch.randn(1, rank, n, generator=generator) / n**0.5 @ x[0]).flatten().numpy()
    # Adam's first step is the sign of the gradient g z^T, times the rate 0.1; A's own change meets B = 0
    change = 0.1 * np.abs(z).sum()
    assert found[0] == pytest.approx(change, rel=0.01)


def test_slopes_of_powers() -> None:
    sizes = np.stack([np.full(4, 3.0 * n**0.5) for n in WIDTHS])
    assert slope(WIDTHS, sizes) == (pytest.approx(0.5), pytest.approx(0.0, abs=1e-12))
    sizes[1, 2] = np.inf
    assert np.isnan(slope(WIDTHS, sizes)[0])


def test_what_the_analysis_says_of_adam() -> None:
    """One exponent serves SingLoRA from the first step on, LoRA from the second; a constant rate serves neither."""

    def slopes(rule: str) -> list[float]:
        sizes = np.stack([changes(RULES[rule], n, 4, 48, 0, 5) for n in WIDTHS])
        return [slope(WIDTHS, sizes[:, :, step])[0] for step in (0, 4)]

    assert slopes("singlora adam -1/2") == [pytest.approx(0, abs=0.15)] * 2
    assert slopes("lora adam -1/2") == [pytest.approx(-0.5, abs=0.15), pytest.approx(0, abs=0.15)]
    assert slopes("singlora adam 0")[0] > 0.3


def test_the_program_writes_its_table_and_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(WidthSettings(widths=(8, 16), seeds=2, output_dir=tmp_path / "out"))
    with (tmp_path / "out" / "slopes.csv").open() as file:
        heads, *rows = csv.reader(file)
    assert len(rows) == len(RULES) and len(heads) == 1 + len(SHOWN)
    assert (tmp_path / "out" / "width_scaling.svg").read_text().startswith("<svg")
    assert "SingLoRA, Adam" in capsys.readouterr().out
    with pytest.raises(UserError, match="two widths"):
        run(WidthSettings(widths=(8, 8), output_dir=tmp_path / "out"))
