"""What the benchmarks time is what they say: their floors do the same work, their commands are the program's."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from benchmarks import scoring, whole_job
from eval import encoders
from eval.score import ScoreSettings, score
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.settings import GenerateSettings
from singlora_diffusion.settings import parse
from singlora_diffusion.training.recipe import Recipe


def test_the_floor_of_scoring_gives_the_scores(tmp_path: Path) -> None:
    bench = scoring.prepare(scoring.Settings(encoders="toyworld", pictures=6), tmp_path)
    loaded = bench.encoders.load(bench.files)
    vectors = scoring.forward(loaded, scoring.decode(bench, loaded))
    assert [len(vectors[kind]) for kind in ("clip", "dino", "texts")] == [11, 11, 4]  # 6 + 5 pictures, 2 x 2 texts
    for rows in vectors.values():
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    text = dict(zip(bench.texts, vectors["texts"], strict=True))

    for number, row in enumerate(score(bench.settings)["pictures"]):
        for name, role in (("clip_i", "clip"), ("dino", "dino")):
            expected = (vectors[role][number] @ vectors[role][6:].T).mean()
            assert row[name] == pytest.approx(expected, abs=1e-5)
        assert row["clip_t"] == pytest.approx(vectors["clip"][number] @ text[row["prompt_without_token"]], abs=1e-5)
        assert row["clip_t_token"] == pytest.approx(vectors["clip"][number] @ text[row["prompt"]], abs=1e-5)


def test_scoring_starts_with_an_empty_or_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scoring.prepare(scoring.Settings(encoders="toyworld", pictures=4), tmp_path)
    with scoring.scored(bench, stored=True):
        pass

    def refuse(*_: object) -> None:
        raise UserError("an encoder ran")

    monkeypatch.setattr(encoders, "_unit_vectors", refuse)
    with scoring.scored(bench, stored=True) as again:
        again()
    with scoring.scored(bench, stored=False) as anew, pytest.raises(UserError, match="an encoder ran"):
        anew()


def test_steps_alone_is_the_median_between_the_ends_of_steps(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text("".join(json.dumps({"step": n, "seconds": s}) + "\n" for n, s in enumerate([5.0, 6.0, 7.0, 27.0])))
    assert whole_job.steps_alone(log) == (1.0, 27.0)
    log.write_text('{"step": 1, "seconds": 5.0}\n')
    with pytest.raises(UserError, match="--steps"):
        whole_job.steps_alone(log)


def test_the_whole_job_speaks_the_verbs_language() -> None:
    words = whole_job.commands(whole_job.Settings(steps=7), Path("here"), "dog")
    assert [verb[0] for verb in words.values()] == list(words) == ["train", "generate", "score"]
    recipe, generation, scoring_of = (
        parse(kind, verb[1:], verb[0], "")
        for kind, verb in zip((Recipe, GenerateSettings, ScoreSettings), words.values(), strict=True)
    )
    assert recipe.max_train_steps == 7 and recipe.instance_prompt == "a photo of sks dog"
    assert generation.adapters.adapter == (recipe.output_dir,)
    assert generation.output.output_dir == scoring_of.images
    assert scoring_of.references == recipe.instance_data_dir


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(UserError, match="nowhere"):
        whole_job.spend(["score", "--images", "nowhere"])
