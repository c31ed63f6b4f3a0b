"""The shipped weights can do what the model card says, with a margin: a broken file does not pass."""

from __future__ import annotations

from pathlib import Path

import pytest

from singlora_diffusion.toyworld import figures


def test_all_weights_together_are_small() -> None:
    flow = figures.PACKAGED["toyworld-flow"]  # tests/test_toyworld_flow.py
    files = [file for file in figures.WEIGHTS.rglob("*.safetensors") if flow not in file.parents]
    assert {file.parent.name for file in files} == {"unet", "vae", "text_encoder", "clip", "dino", "reader"}
    assert sum(file.stat().st_size for file in files) < 20e6


def test_nothing_needs_unpickling() -> None:
    kinds = {path.suffix for path in Path(figures.WEIGHTS).rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".txt"}


def test_the_autoencoder_keeps_pictures() -> None:
    assert figures.autoencoder(48)["autoencoder PSNR, dB"] > 29


def test_the_reader_reads_renders() -> None:
    found = figures.reader(240)
    assert found["reader on renders, class"] > 0.96
    assert found["reader on renders, background"] > 0.97
    assert found["reader on renders, colour"] > 0.95


def test_prompts_are_followed() -> None:
    found = figures.prompt_following(60, guidance=3.0, seed=1)
    assert found["prompt following, class"] > 0.9
    assert found["prompt following, background"] > 0.95
    assert found["prompt following, colour"] > 0.85


def test_the_encoders_tell_things_apart() -> None:
    assert figures.clip(groups=4)["CLIP retrieval out of 50"] > 0.85
    assert figures.dino(subjects=6)["DINO same against other subject, AUC"] > 0.95


@pytest.mark.parametrize("figure", ["clip", "dino"])
def test_figures_are_a_function_of_the_weights_alone(figure: str) -> None:
    measure = {"clip": lambda: figures.clip(groups=1), "dino": lambda: figures.dino(subjects=2)}[figure]
    assert measure() == measure()
