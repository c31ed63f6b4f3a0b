"""What the benchmarks time is what they say: their floors do the same work, their commands are the program's."""

from __future__ import annotations

import contextlib
import importlib
import json
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import default_recipe, gpu, gpu_stages, sampling, scoring, train_step, whole_job
from benchmarks.gpu_stages import Stage
from eval import encoders
from eval.score import ScoreSettings, score
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.settings import GenerateSettings
from singlora_diffusion.settings import parse
from singlora_diffusion.training.recipe import Recipe


def test_the_floor_of_scoring_gives_the_scores(tmp_path: Path) -> None:
    bench = scoring.prepare(scoring.Settings(encoders="toyworld", images=6), tmp_path)
    loaded = bench.encoders.load(bench.files)
    vectors = scoring.forward(loaded, scoring.decode(bench, loaded))
    assert [len(vectors[kind]) for kind in ("clip", "dino", "texts")] == [11, 11, 4]  # 6 + 5 pictures, 2 x 2 texts
    for rows in vectors.values():
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    text = dict(zip(bench.texts, vectors["texts"], strict=True))

    for number, row in enumerate(score(bench.settings)["images"]):
        for name, role in (("clip_i", "clip"), ("dino", "dino")):
            expected = (vectors[role][number] @ vectors[role][6:].T).mean()
            assert row[name] == pytest.approx(expected, abs=1e-5)
        assert row["clip_t"] == pytest.approx(vectors["clip"][number] @ text[row["prompt_without_token"]], abs=1e-5)
        assert row["clip_t_token"] == pytest.approx(vectors["clip"][number] @ text[row["prompt"]], abs=1e-5)


def test_scoring_starts_with_an_empty_or_a_full_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bench = scoring.prepare(scoring.Settings(encoders="toyworld", images=4), tmp_path)
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


def test_the_whole_job_speaks_the_commands_language() -> None:
    words = whole_job.commands(whole_job.Settings(steps=7), Path("here"), "dog")
    assert [one[0] for one in words.values()] == list(words) == ["train", "generate", "score"]
    recipe, generation, scoring_of = (
        parse(kind, one[1:], one[0], "")
        for kind, one in zip((Recipe, GenerateSettings, ScoreSettings), words.values(), strict=True)
    )
    assert recipe.optimization.max_train_steps == 7 and recipe.data.instance_prompt == "a photo of sks dog"
    assert generation.adapters.adapter == (recipe.output.output_dir,)
    assert generation.output.output_dir == scoring_of.images
    assert scoring_of.references == recipe.data.instance_data_dir


def test_a_command_that_fails_says_why() -> None:
    with pytest.raises(UserError, match="nowhere"):
        whole_job.spend(["score", "--images", "nowhere"])


def in_this_process(stage: Stage, log: Path, limit: float, device: str) -> int | None:
    """`gpu.launch` without the seconds that importing torch takes."""
    if stage.module == "pytest":
        return launch(stage, log, limit, device)
    with log.open("w") as out, contextlib.redirect_stdout(out):
        return importlib.import_module(stage.module).main(list(stage.words)) or 0


launch = gpu.launch


def test_the_day_at_the_gpu_at_a_tiny_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every command that it runs; then once more, where nothing is left to do."""
    import torch._dynamo

    monkeypatch.setattr(gpu, "launch", in_this_process)
    words = ["--device", "cpu", "--tiny", "--output_dir", str(tmp_path)]
    with torch._dynamo.config.patch(disable=True):  # monkeypatch would leave the setting unreadable
        code = gpu.main(words)
    report = json.loads((tmp_path / "gpu.json").read_text())
    assert {one["stage"]: one.get("reason") for one in report["stages"] if one["status"] != "done"} == {}
    assert code == 0 and report["not_reached"] == []
    assert report["machine"]["device"] == "CPU" and report["machine"]["torch"]
    assert {one["part"] for one in report["stages"]} == {"tests", "step", "sampling", "pretraining"}
    table = (tmp_path / "gpu.md").read_text()
    for variant in gpu_stages.STEPS:
        (row,) = [line for line in table.splitlines() if f"eager {variant} |" in line]
        assert all(float(cell.split()[0]) > 0 for cell in row.split("|")[2:7])
    (row,) = [line for line in table.splitlines() if "eager PEFT lora |" in line]
    assert [row.split("|")[place].strip() for place in (4, 6)] == ["1.000", "1.000"]
    assert "autoencoder: " in table and "denoiser: step 1/1" in table

    monkeypatch.setattr(gpu, "launch", None)
    assert gpu.main(words) == 0
    assert json.loads((tmp_path / "gpu.json").read_text())["stages"] == report["stages"]
    with pytest.raises(UserError, match="another --output_dir"):
        gpu.same_machine(tmp_path / "machine.json", {"device": "a GPU", "size": "full", "torch": "2"})


def test_the_day_at_the_gpu_passes_flags_that_there_are(tmp_path: Path) -> None:
    from singlora_diffusion.toyworld import pretrain

    plan = gpu_stages.stages(tmp_path, "cuda", tiny=False)
    assert len({stage.file for stage in plan}) == len(plan)
    kinds = {"train_step": train_step.Settings, "sampling": sampling.Settings, "pretrain": pretrain.Pretraining}
    for stage in plan:
        if kind := kinds.get(stage.module.rpartition(".")[2]):
            settings = parse(kind, stage.words, "", "")
            assert stage.output == getattr(settings, "output", None)
            if isinstance(settings, train_step.Settings):
                assert train_step.chosen(settings)
    assert {stage.module.rpartition(".")[2] for stage in plan} == {*kinds, "pytest"}


def test_a_stage_that_fails_takes_nothing_else_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fails(stage: Stage, log: Path, limit: float, device: str) -> int | None:
        asked.append(stage.name)
        log.write_text("Traceback\n  line 3\ntorch.OutOfMemoryError: \x1b[31mout of memory\n")
        if stage.output is not None:
            stage.output.write_text('{"seconds": [1.0], "peak_bytes": 5, "trained": 1}')
        return None if stage.part == "pretraining" else 1 if "PEFT" in stage.name or stage.part == "sampling" else 0

    monkeypatch.setattr(gpu, "launch", fails)
    words = ["--device", "cpu", "--tiny", "--output_dir", str(tmp_path)]
    assert gpu.main(words) == 1
    report = json.loads((tmp_path / "gpu.json").read_text())
    failed = {one["stage"]: one["reason"] for one in report["stages"] if one["status"] == "failed"}
    assert len(report["stages"]) == len(asked) and len(failed) == 4
    assert failed["pretraining toyworld"].startswith("not finished after")
    assert "OutOfMemoryError" in failed["step tiny 64 px batch 1 eager PEFT dora"]
    assert "\x1b" not in (tmp_path / "gpu.md").read_text()
    asked.clear()
    gpu.main(words)  # those that failed are tried again
    assert set(asked) == set(failed)


def test_a_stage_that_hangs_is_ended(tmp_path: Path) -> None:
    began = time.monotonic()
    words = ("-n", "1", "-r", "1", "print(1, flush=True); import time; time.sleep(60)")
    assert gpu.launch(Stage("sleep", "tests", "timeit", words, 1), tmp_path / "log.txt", 0.3, "cpu") is None
    assert time.monotonic() - began < 30


def test_full_size_needs_a_gpu(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert gpu.main(["--device", "cpu", "--output_dir", str(tmp_path / "out")]) == 2
    assert "--tiny" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_default_recipe_is_held_to_the_best_rate_and_to_the_base_model() -> None:
    base = {"dino": np.zeros(3), "clip_t": np.array([0.8, 0.8, 0.8])}
    found = {
        1e-3: {"dino": np.array([0.6, 0.7, 0.8]), "clip_t": np.array([0.75, 0.76, 0.77])},  # product 0.532
        3e-3: {"dino": np.array([0.7, 0.7, 0.8]), "clip_t": np.array([0.75, 0.76, 0.77])},  # 0.557
        9e-3: {"dino": np.array([0.9, 0.9, 0.9]), "clip_t": np.array([0.3, 0.3, 0.3])},  # 0.27
    }
    said = "\n".join(default_recipe.report(["one", "two", "three"], base, found, 1e-3))
    half = 4.302653 / 3**0.5  # Student's t with two degrees of freedom
    missed, kept = (-0.1 / 3, 0.1 / 3**0.5 * half), (-0.04, 0.01 * half)
    assert f"best rate, 0.003: {missed[0]:+.3f} ({missed[0] - missed[1]:+.3f} to {missed[0] + missed[1]:+.3f})" in said
    assert f"base model's: {kept[0]:+.3f} ({kept[0] - kept[1]:+.3f} to {kept[0] + kept[1]:+.3f})" in said
    assert "rate of most DINO, 0.009: -0.200" in said and "| 0.001 (default) | 0.700 | 0.760 | 0.532 |" in said

    at = {name: np.where([True, False, False], found[3e-3][name], found[1e-3][name]) for name in ("dino", "clip_t")}
    auto = "\n".join(default_recipe.report_of_auto(["one", "two", "three"], [3e-3, 1e-3, 1e-3], at, found, 1e-3))
    assert "one 0.003, two 0.001, three 0.001" in auto
    assert f"the default rate's, 0.001: {0.1 * 0.75 / 3:+.3f}" in auto and "for each: +0.000 (+0.000 to +0.000)" in auto


def test_the_default_recipe_is_trained_in_its_cells(tmp_path: Path) -> None:
    plan, default = default_recipe.planned(default_recipe.Settings(output_dir=tmp_path, method="lora+"))
    assert default == pytest.approx(2e-4) and plan.sizes["lora+"].rank == 16
