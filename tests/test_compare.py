"""A comparison on a tiny random model: what is run, what is not run twice, what is said of it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from encoder_folders import clip_folder, timm_folder

from eval.compare import cell as cells
from eval.compare import command, engines, estimate, grid, methods, records, robustness, subjects, tuning, verdicts
from eval.compare.grid import Cell, Plan
from eval.compare.settings import CompareSettings, check, learning_rates
from eval.compare.update_size import update_size
from eval.vector_store import VectorStore
from singlora_diffusion import adapters, formats, models
from singlora_diffusion.adapters import budget
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import build, replaced
from singlora_diffusion.training.diagnosis import NotFinite

TEST, TUNE = ("cat-1", "dog-1"), ("can-3",)
METHODS = ("singlora", "balanced")  # PEFT takes its time


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> CompareSettings:
    """Two subjects, two methods, two rates; two steps each."""
    folder = tmp_path_factory.mktemp("compare")
    prompts = folder / "prompts.txt"
    prompts.write_text("a {token} {class} in the snow\na red {token} {class}\n")
    return build(
        CompareSettings,
        subjects=TEST,
        tuning_subjects=TUNE,
        methods=METHODS,
        match="lora:2",
        rates=2,
        pretrained_model_name_or_path=str(tiny_model),
        max_train_steps=2,
        train_batch_size=1,
        prompts=str(prompts),
        image_seeds="0-1",
        prior_seeds="0",
        num_inference_steps=1,
        protocol="custom",
        clip=str(clip_folder(folder / "clip")),
        dino=str(timm_folder(folder / "dino")),
        primary=("dino",),
        noise_cells=1,
        bound=0.0,
        device="cpu",
        output_dir=folder / "out",
    )


@pytest.fixture(scope="module")
def done(settings: CompareSettings) -> CompareSettings:
    """The whole comparison, run once."""
    command.compare(settings)
    return settings


def planned(settings: CompareSettings) -> Plan:
    return grid.plan(settings, subjects.read(settings.who, settings.run.output_dir / "subjects"))


def test_every_cell_has_its_recipe_log_images_and_scores(done: CompareSettings) -> None:
    plan = planned(done)
    rates = learning_rates(done.what)
    for method in METHODS:
        for rate in rates[method]:
            folder = plan.folder(Cell("can-3", method, rate))
            recipe = json.loads((folder / "recipe.json").read_text())
            assert recipe["learning_rate"] == rate and recipe["rank"] == plan.sizes[method].rank
            assert len((folder / "log.jsonl").read_text().splitlines()) == 2
            assert len(list((folder / "samples").glob("0*.png"))) == 4
            record = json.loads((folder / "cell.json").read_text())
            assert record["diverged"] is None and record["seconds_per_step"] > 0
            assert set(record["scores"]) == set(cells.scoring.wanted(plan, Cell("can-3", method, rate)))
    base = json.loads((plan.folder(Cell("can-3", grid.BASE)) / "cell.json").read_text())
    assert base["scores"]["drift"] == pytest.approx(0, abs=1e-6) and base["parameters"] == 0


def test_recipes_at_one_rate_differ_in_method_and_size_alone(done: CompareSettings) -> None:
    both = replaced(done, methods=("lora", "singlora"))
    recipes = [
        vars_of(planned(both), Cell("can-3", method, grid[0])) for method, grid in learning_rates(both.what).items()
    ]
    differing = {key for key, value in recipes[0].items() if value != recipes[1][key]}
    assert differing == {"method", "rank"}


def test_a_method_with_settings_is_the_method_with_those_settings(done: CompareSettings) -> None:
    """The budget is that of the comparison's layers; what is solved for it is the rank on the method's own."""
    own = "singlora[targets=to_q,to_k;ramp_steps=0;rate_by_width]"
    plan = planned(replaced(done, methods=("singlora", own, "singlora[rank=3]"), match="lora:8"))
    plain, recipe = (vars_of(plan, Cell("can-3", name, 1e-3)) for name in ("singlora", own))
    differing = {key: value for key, value in recipe.items() if value != plain[key]}
    assert differing == {
        "rank": plan.sizes[own].rank,
        "targets": ["to_q", "to_k"],
        "ramp_steps": 0,
        "rate_by_width": True,
    }
    model = done.training.pretrained_model_name_or_path
    layers = budget.shapes(model, ("to_q", "to_k"))
    goal = budget.target_count("lora:8", budget.shapes(model))
    counts = {rank: rank * sum(max(shape) for shape in layers) for rank in range(1, 200)}
    assert plan.sizes[own].rank == min(counts, key=lambda rank: abs(counts[rank] - goal))
    assert plan.sizes[own].parameters == counts[plan.sizes[own].rank]
    assert plan.sizes["singlora[rank=3]"].rank == 3
    assert plan.folder(Cell("can-3", own, 1e-3)).parent.name == "singlora-targets=to_q,to_k-ramp_steps=0-rate_by_width"
    assert plan.folder(Cell("can-3", "singlora+dora", 1e-3)).parent.name == "singlora+dora"


def test_methods_with_settings_have_short_names_and_their_methods_rates() -> None:
    assert methods.label("lora[targets=to_q,to_k]") == "LoRA (to_q, to_k)"
    assert methods.label("singlora+dora[magnitude_lr_ratio=16]") == "SingLoRA dora (magnitude_lr_ratio 16)"
    assert methods.label("offset[rate_by_width]") == "SingLoRA offset (rate_by_width)"
    names = ("lora+[loraplus_ratio=4]", "singlora[rank=3]", "singlora[rank=4]")
    what = build(CompareSettings, methods=names, rates=1, centres=("singlora=2e-3", "singlora[rank=4]=3e-3")).what
    assert list(learning_rates(what).values()) == [(1.8e-4,), (2e-3,), (3e-3,)]


def vars_of(plan: Plan, cell: Cell) -> dict[str, Any]:
    about: dict[str, Any] = cells.describe(plan, cell)["recipe"]
    return about


def test_a_plan_runs_one_training_and_says_what_all_take(
    done: CompareSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(done.run.output_dir / "subjects", tmp_path / "out" / "subjects")  # drawing them takes time
    asked = replaced(done, output_dir=tmp_path / "out", plan=True, workers=4, seeds="0-1")
    command.compare(asked)
    said = capsys.readouterr().out.splitlines()[-1]
    plan, cell = planned(asked), Cell("can-3", "singlora", learning_rates(done.what)["singlora"][0])
    assert {path.parent.name for path in (tmp_path / "out").rglob("cell.json")} == {"base", cell.name}
    seconds = cells.known(plan, cell)["seconds"]
    # left: 3 of the tuning's 4 trainings, 2 x 2 x 2 of the test, one of them again, and 2 bases of 3, untrained
    hours = (12 * sum(seconds.values()) + 2 * (seconds["images"] + seconds["scores"])) / 3600
    found = estimate.estimate(plan, everything(asked, plan))
    assert found is not None and found.hours == pytest.approx(hours) and (found.cells, found.measured) == (14, 1)
    assert f"14 cells to do: about {hours:.1f} hours on" in said and f"{hours / 4:.1f} for each of 4 workers" in said
    (plan.folder(cell) / "adapter.safetensors").unlink()
    command.compare(asked)  # nothing is run to say it again
    assert capsys.readouterr().out.splitlines()[-1] == said


def everything(settings: CompareSettings, plan: Plan) -> list[Cell]:
    tuning_, test = ([plan.subjects[name] for name in names] for names in (TUNE, TEST))
    cells_ = list(grid.test_cells(settings, test, {}))
    bases = grid.base_cells([*tuning_, *test])
    return [*bases, *grid.tuning_cells(settings, tuning_), *cells_, *grid.noise_cells(settings, cells_)]


def test_nothing_is_run_twice(done: CompareSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a cell ran")

    monkeypatch.setattr(cells, "run", refuse)
    command.compare(done)


def test_it_goes_on_where_it_was_and_can_be_widened(done: CompareSettings, tmp_path: Path) -> None:
    shutil.copytree(done.run.output_dir, tmp_path / "out")
    wider = replaced(done, output_dir=tmp_path / "out", seeds="0-1", noise_cells=0, subjects=("cat-1",))
    plan = planned(wider)
    test = list(grid.test_cells(wider, [plan.subjects["cat-1"]], chosen(wider, plan)))
    lost = plan.folder(test[0])
    shutil.rmtree(lost / "samples")
    (lost / "cell.json").unlink()  # killed before its end: the adapter is there
    before = {cell for cell in test if cells.is_done(plan, cell)}
    assert {cell.seed for cell in before} == {0} and len(test) == 4
    assert list(engines.here(plan, [cell for cell in test if cell not in before])) == [test[0], *test[2:]]
    assert all(cells.is_done(plan, cell) for cell in test)


def chosen(settings: CompareSettings, plan: Plan) -> dict[str, tuning.Choice]:
    tune = list(grid.tuning_cells(settings, [plan.subjects[name] for name in TUNE]))
    return tuning.choose(settings, [cells.known(plan, cell) for cell in tune])


def test_another_grid_in_the_same_folder_is_refused(done: CompareSettings) -> None:
    with pytest.raises(UserError, match=r"other settings \(max_train_steps 2, now 3\)"):
        command.compare(replaced(done, max_train_steps=3))


def test_a_new_score_trains_nothing(done: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(done.run.output_dir, tmp_path / "out")
    plan = planned(replaced(done, output_dir=tmp_path / "out"))
    cell = Cell("can-3", "balanced", learning_rates(done.what)["balanced"][0])
    record = cells.known(plan, cell)
    del record["scores"]["rank_one"]  # as if it had been added to the table since
    (plan.folder(cell) / "cell.json").write_text(json.dumps(record))
    assert cells.lacking(plan, cell, record) == ["rank_one"] and cells.decides(plan, record)
    monkeypatch.setattr(cells, "_train", None)
    cells.run(plan, cell)
    assert cells.is_done(plan, cell)


def test_a_cell_from_before_sizes_were_kept_gets_its_own(
    done: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(done.run.output_dir, tmp_path / "out")
    plan = planned(replaced(done, output_dir=tmp_path / "out"))
    cell = Cell("can-3", "balanced", learning_rates(done.what)["balanced"][0])
    record = dict(cells.known(plan, cell))
    size = record.pop("update")
    (plan.folder(cell) / "cell.json").write_text(json.dumps(record))
    assert not cells.is_done(plan, cell)
    monkeypatch.setattr(cells, "_train", None)
    monkeypatch.setattr(cells, "_generate", None)
    monkeypatch.setattr(cells.scoring, "scores", None)
    cells.run(plan, cell)
    assert cells.known(plan, cell) == {**record, "update": size}


def test_references_are_embedded_once_by_a_worker(
    done: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a cell that is scored after others, the generated images alone are new."""
    shutil.copytree(done.run.output_dir, tmp_path / "out")
    plan = planned(replaced(done, output_dir=tmp_path / "out"))
    counts: list[int] = []
    monkeypatch.setattr(cells.worker, "_store", cache(lambda fingerprint: CountingStore(counts)))
    for rate in learning_rates(done.what)["balanced"]:
        cells.scoring.scores(plan, cell := Cell("can-3", "balanced", rate), plan.folder(cell))
    first, second = np.array(counts).reshape(2, -1).sum(axis=1)
    assert first > 2 * (4 * 30 + 12 + 5) and second <= 2 * (4 + 1)  # two encoders; gallery, references, training images


class CountingStore(VectorStore):
    """A store that writes down how many images and texts each call had to embed."""

    def __init__(self, counts: list[int]) -> None:
        super().__init__(None, "")
        self.counts = counts

    def vectors(self, keys: Sequence[str], things: Sequence[Any], encode: Callable[[list[Any]], Any]) -> Any:
        before = len(self._vectors)
        found = super().vectors(keys, things, encode)
        self.counts.append(len(self._vectors) - before)
        return found


def test_a_training_that_diverges_scores_what_the_base_model_scores(
    done: CompareSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from singlora_diffusion.training.step import Stepper

    shutil.copytree(done.run.output_dir, tmp_path / "out")
    plan = planned(replaced(done, output_dir=tmp_path / "out"))
    cell = Cell("can-3", "balanced", 5.0)

    def burst(self: object, step: int) -> None:
        raise NotFinite(step, float("nan"), 1.0)

    monkeypatch.setattr(Stepper, "advance", burst)
    cells.run(plan, cell)
    record = cells.known(plan, cell)
    base = cells.known(plan, Cell("can-3", grid.BASE))
    assert record["update"] is None
    assert "the loss is nan" in record["diverged"] and record["scores"] == base["scores"]
    assert cells.is_done(plan, cell)


def test_the_report_says_what_the_cells_say(done: CompareSettings) -> None:
    out = done.run.output_dir
    html, text = (out / "report.html").read_text(), (out / "report.md").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)  # it needs no network
    assert "<script" not in html and html.count("data:image/webp") == 2 * 2 * 4
    with (out / "cells.csv").open() as file:
        rows = list(csv.DictReader(file))
    plan = planned(done)
    (one,) = [row for row in rows if (row["set"], row["subject"], row["method"]) == ("test", "cat-1", "balanced")]
    known = cells.known(plan, Cell("cat-1", "balanced", float(one["learning_rate"])))["update"]
    assert float(one["update_size"]) == known["size"] > 0 and float(one["update_learned"]) == known["learned"] > 0
    mean = np.mean([float(row["dino"]) for row in rows if (row["set"], row["method"]) == ("test", "balanced")], axis=0)
    line = next(line for line in text.splitlines() if line.startswith("| SingLoRA balanced |"))  # of the first table
    assert line.split("|")[2].strip() == f"{mean:.3f}"
    assert "8 of 8 trainings are done. n = 2 subjects, 1 training seed; learning rates tuned on 1 others." in text
    assert "SingLoRA balanced is not told apart from SingLoRA" in text  # two subjects decide nothing
    assert "singlora compare --subjects cat-1 dog-1" in text


def test_scores_by_kind_are_means_over_the_images_of_those_prompts(done: CompareSettings) -> None:
    """Two prompts: one puts the subject into the snow, one paints it red."""
    lines = (done.run.output_dir / "report.md").read_text().splitlines()
    plan = planned(done)
    choice = chosen(done, plan)["balanced"].rate
    for what, template in (("somewhere", "a {token} {class} in the snow"), ("changed", "a red {token} {class}")):
        means = []
        for subject in TEST:
            scores = json.loads((plan.folder(Cell(subject, "balanced", choice)) / "scores.json").read_text())
            means.append(np.mean([row["dino"] for row in scores["images"] if row["template"] == template]))
        (line,) = [line for line in lines if line.startswith("| the subject " + what) and "| DINO |" in line]
        assert line.split("|")[4].strip().startswith(f"{np.mean(means):.3f}<br>")


@browser.needed
def test_the_page_in_a_browser(done: CompareSettings, tmp_path: Path) -> None:
    found = browser.seen((done.run.output_dir / "report.html").read_text(), (390, 1200), tmp_path)
    whole = {"cut": [], "images": 2 * 2 * 4, "broken": 0, "errors": []}
    assert found == [{"width": width, **whole} for width in (390, 1200)]


def test_processes_run_the_same_cells(done: CompareSettings, tmp_path: Path) -> None:
    """Without its base model loaded anew this would take no time: one cell, already done."""
    shutil.copytree(done.run.output_dir, tmp_path / "out")
    plan = planned(replaced(done, output_dir=tmp_path / "out", workers=2))
    assert engines.engine(plan) is engines.processes
    cell = Cell("can-3", grid.BASE)
    assert list(engines.processes(plan, [cell])) == [cell]


# --- what is run -----------------------------------------------------------------------------------------------------


def test_grids_are_of_equal_width_about_each_methods_own_centre() -> None:
    what = build(CompareSettings, methods=("lora", "singlora", "lora+"), rates=4, centres=("lora=1e-2",)).what
    rates = learning_rates(what)
    assert rates["lora"] == (0.00178, 0.00562, 0.0178, 0.0562)
    widths = {method: np.log10(grid[-1] / grid[0]) for method, grid in rates.items()}
    assert {len(grid) for grid in rates.values()} == {4} and np.allclose(list(widths.values()), 1.5, atol=5e-3)


def test_any_beginning_of_the_test_has_all_methods_on_almost_the_same_subjects() -> None:
    settings = build(CompareSettings, seeds="0-2")
    known = [subjects.Subject(name, "dog", Path("a"), Path("b")) for name in "abcd"]
    todo = list(grid.test_cells(settings, known, {}))
    counts = [[sum(cell.method == m for cell in todo[:n]) for m in settings.what.methods] for n in range(len(todo))]
    assert max(max(row) - min(row) for row in counts) == 1
    assert [cell.seed for cell in todo] == sorted(cell.seed for cell in todo)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"methods": ("lora", "lora")}, "name each method once"),
        ({"methods": ("lora", "nothing")}, "--methods nothing"),
        ({"methods": ("lora", "lora[rank=8")}, r"--methods lora\[rank=8: there are"),
        ({"methods": ("lora[ramp_steps=0]", "lora[ramp_steps=5]")}, "ramp_steps is an option of singlora"),
        ({"methods": ("lora[rank=0]",)}, r"--methods lora\[rank=0\]: rank 0: must be at least 1"),
        ({"methods": ("lora[rank=many]",)}, "rank many: is not valid"),
        ({"methods": ("lora[text_targets=q_proj]",)}, "text_targets is no setting of an adapter here"),
        ({"subjects": ("can-3",), "tuning_subjects": ("can-3",)}, "tune on others"),
        ({"centres": ("lora=x",)}, "give METHOD=RATE"),
        ({"centres": ("nothing=1e-3",)}, "give METHOD=RATE"),
        ({"primary": ("drift",)}, "lower is better"),
        ({"primary": ()}, "at least one score"),
        ({"match": "nothing:8"}, "--match"),
        ({"match": "0"}, "--match"),
        ({"plan": True, "report_only": True}, "leave one of them out"),
        ({"rates": 0}, "--rates 0: must be at least 1"),
        ({"rate_step": float("nan")}, "--rate_step"),
    ],
)
def test_settings_that_cannot_work(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        check(build(CompareSettings, **flags))


def test_folders_of_real_images(tmp_path: Path, training_images: Path) -> None:
    for name in ("dog6", "red_cat", "vase", "1"):
        shutil.copytree(training_images, tmp_path / "all" / name)
    shutil.copytree(training_images, tmp_path / "all" / "vase" / "heldout")
    nouns = tmp_path / "nouns.json"
    nouns.write_text('{"1": "toy"}')
    who = build(CompareSettings, subjects_dir=tmp_path / "all", class_nouns=nouns, tuning_subjects=("dog6",)).who
    found = subjects.read(who, tmp_path / "written")
    assert {one.name: one.class_noun for one in (*found.tuning, *found.test)} == {
        "dog6": "dog",
        "red_cat": "red cat",
        "vase": "vase",
        "1": "toy",
    }
    assert [one.name for one in found.test if one.held_out] == ["vase"]
    with pytest.raises(UserError, match="class noun"):
        subjects.read(replace(who, class_nouns=None), tmp_path / "written")
    with pytest.raises(UserError, match="no subject cow"):
        subjects.read(replace(who, subjects=("cow",)), tmp_path / "written")


# --- what is said ----------------------------------------------------------------------------------------------------


def found(scores: dict[str, Sequence[Sequence[float]]], rate: float = 1.0) -> list[records.Done]:
    """Cells by method: (subjects, seeds) of one score."""
    return [
        records.Done(Cell(f"s{s}", method, rate, seed), {"scores": {"dino": value}})
        for method, table in scores.items()
        for s, row in enumerate(table)
        for seed, value in enumerate(row)
    ]


def test_only_what_all_methods_have_is_compared() -> None:
    cells_ = found({"lora": [[0.1, 0.2], [0.3, 0.4], [0.5]], "oft": [[0.2, 0.3], [0.4, 0.5], [0.6]]})
    tables = records.tables(("lora", "oft"), cells_)
    assert tables.subjects == ("s0", "s1", "s2") and tables.seeds == (0,)
    assert tables.scores["dino"]["oft"].tolist() == [[0.2], [0.4], [0.6]]
    tables = records.tables(("lora", "oft"), cells_[:-1])  # oft lacks the third subject
    assert tables.subjects == ("s0", "s1") and tables.seeds == (0, 1)
    assert records.tables(("lora", "dora"), cells_).subjects == ()


def test_a_clear_difference_and_its_words() -> None:
    ones = [[0.5 + 0.01 * s] for s in range(8)]
    more = [[value[0] + 0.1 + 0.001 * s] for s, value in enumerate(ones)]
    tables = records.tables(("lora", "oft", "dora"), found({"lora": ones, "oft": more, "dora": ones}))
    rows = {row.method: row for row in verdicts.rows(tables, 0.01, ("dino",))}
    assert rows["lora"].difference is None and rows["dora"].difference is not None
    assert rows["oft"].difference is not None and rows["oft"].difference.verdict == "better"
    assert rows["oft"].adjusted == 2 * 2 / 2**8  # exact, and Holm over two methods
    assert rows["dora"].difference.verdict == "tie"
    said = verdicts.sentence(rows["oft"], str.upper, "lora")
    assert said.startswith("DINO: OFT is better than LORA (+0.103; 95 % interval +0.101")


def test_lower_is_better_turns_the_sign() -> None:
    cells_ = found({"lora": [[0.5], [0.6]], "oft": [[0.4], [0.4]]})
    turned = [records.Done(one.cell, {"scores": {"drift": one.scores["dino"]}}) for one in cells_]
    (row,) = [row for row in verdicts.rows(records.tables(("lora", "oft"), turned), 0.01, ("dino",)) if row.difference]
    assert row.difference is not None and row.difference.mean == pytest.approx(0.15) and row.adjusted is None


def test_noise_is_what_one_cell_repeated_shows() -> None:
    first = found({"lora": [[0.5], [0.7]]})
    again = [
        records.Done(replace(one.cell, other_threads=True), {"scores": {"dino": one.scores["dino"] + shift}})
        for one, shift in zip(first, (0.02, -0.02), strict=True)
    ]
    assert verdicts.noise(first, again) == {"dino": pytest.approx(0.02 / 2**0.5)}
    assert verdicts.noise(first, []) == {}


def test_width_of_a_curve_in_closed_form() -> None:
    rates = (1e-4, 1e-3, 1e-2, 1e-1)
    assert robustness.width(rates, np.array([1.0, 1.0, 1.0, 1.0])) == pytest.approx(3)
    assert robustness.width(rates, np.array([0.0, 1.0, 0.0, 1.0])) == pytest.approx(0.04)  # its own peak alone
    assert robustness.width(rates, np.array([0.5, 0.99, 1.0, 0.96])) == pytest.approx(1 + 0.01 / 0.49 + 0.02 / 0.04)


def test_noise_of_seeds_alone_is_no_spread_between_rates() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(size=(200, 3, 4))
    error = (1 / 3) * (2 / (3 * 200)) ** 0.5  # of the estimated variance, 3 degrees of freedom in each of 200 subjects
    assert (robustness.between_rates(noise) or 0) ** 2 < 4 * error
    steep = np.array([0.0, 2, 4, 6])
    assert robustness.between_rates(noise + steep) == pytest.approx(steep.std(ddof=1), rel=0.05)
    assert robustness.between_rates(noise[:, :1]) is None


def runs(method: str, sizes: Sequence[float], score: Callable[[float, int, int], float]) -> list[records.Done]:
    """Tuning cells of three subjects, two seeds and the rates 1e-4, 1e-3, 1e-2: (size, subject, seed) -> score."""
    return [
        records.Done(
            Cell(f"s{s}", method, rate, seed),
            {"scores": {"dino": score(size, s, seed)}, "update": {"size": 9.0, "learned": size * (1.1 if s else 1.0)}},
        )
        for s in range(3)
        for seed in range(2)
        for rate, size in zip((1e-4, 1e-3, 1e-2), sizes, strict=True)
    ]


def test_what_differs_at_one_rate_may_be_the_same_at_one_size() -> None:
    """Two methods with one score of the size of the update, one of which moves five times as far at any rate."""
    grids = {"lora": (1e-4, 1e-3, 1e-2), "singlora": (1e-4, 1e-3, 1e-2)}

    def falls(size: float, subject: int, seed: int) -> float:
        return 0.5 + 0.1 * subject + 0.01 * seed - 0.1 * float(np.log10(size))

    done = [*runs("lora", (0.01, 0.1, 1), falls), *runs("singlora", (0.05, 0.5, 5), falls)]
    lora, singlora = robustness.curves(grids, ("dino",), done)
    assert np.allclose(lora.means - singlora.means, 0.1 * np.log10(5))
    own = robustness.over_size(grids, ("dino",), done)
    mean = 1.1 ** (2 / 3)  # geometric, over subjects
    assert np.allclose(own[1].rates, np.array((0.05, 0.5, 5)) * mean)
    first, second = robustness.at_equal_sizes(own, ("lora", "singlora"), 4)
    assert first.rates == second.rates and np.allclose(first.rates, np.geomspace(0.05, 1, 4) * mean)
    assert np.allclose(first.scores, second.scores) and first.scores.shape == (3, 2, 4)
    assert second.scores[1, 1] == pytest.approx([falls(size / mean, 1, 1) for size in second.rates])
    far = [*runs("lora", (0.01, 0.1, 1), falls), *runs("singlora", (2, 20, 200), falls)]
    assert robustness.at_equal_sizes(robustness.over_size(grids, ("dino",), far), ("lora", "singlora"), 4) == []


def test_no_size_where_trainings_diverge_or_go_back() -> None:
    grids = {"lora": (1e-4, 1e-3, 1e-2)}
    done = runs("lora", (0.1, 0.4, 0.2), lambda size, subject, seed: size)
    (curve,) = robustness.over_size(grids, ("dino",), done)
    assert len(curve.rates) == 2 and np.allclose(curve.means, (0.1, 0.4))  # the last rate moved them less
    done[0] = records.Done(done[0].cell, {**done[0].record, "update": None})
    assert robustness.over_size(grids, ("dino",), done) == [] and len(robustness.curves(grids, ("dino",), done)) == 1


def test_a_seed_that_has_begun_costs_no_curve() -> None:
    grids = {"lora": (1e-4, 1e-3, 1e-2)}
    done = runs("lora", (0.1, 0.2, 0.3), lambda size, subject, seed: size + seed)
    (curve,) = robustness.curves(grids, ("dino",), [one for one in done if one.cell.seed == 0 or one.cell.rate < 1e-2])
    assert curve.scores.shape == (3, 1, 3) and np.allclose(curve.means, (0.1, 0.2, 0.3))


def test_rates_that_are_good_by_all_scores() -> None:
    """The likeness is best at the highest rate, the agreement with the prompt at the lowest."""
    grids = {"lora": (1e-4, 1e-3, 1e-2)}

    def both(dino: Sequence[float], clip_t: Sequence[float]) -> robustness.Together:
        done = runs("lora", (1, 2, 3), lambda size, subject, seed: 0.0)
        rated = [
            records.Done(one.cell, {**one.record, "scores": {"dino": dino[place], "clip_t": clip_t[place]}})
            for one in done
            for place in [grids["lora"].index(one.cell.rate)]
        ]
        (found,) = robustness.together(robustness.curves(grids, ("dino", "clip_t"), rated))
        return found

    apart = both((0.1, 0.5, 1.0), (0.8, 0.7, 0.4))
    assert apart.all_near == 0 and apart.product == pytest.approx(0.02 * 0.4 / 0.05)  # of 0.08, 0.35 and 0.40
    found = both((0.5, 1.0, 1.0), (0.8, 0.8, 0.4))
    assert found.all_near == pytest.approx(0.02 / 0.5 + 0.016 / 0.4)  # either side of the middle rate
    assert found.all_near_interval == pytest.approx((found.all_near, found.all_near))  # all subjects are alike


def test_the_size_of_an_update_in_closed_form(tiny_model: Path, tmp_path: Path) -> None:
    import torch

    networks = models.load(str(tiny_model), "float32", "cpu").networks
    config = AdapterConfig(rank=2, alpha=3.0, targets=("to_q",), ramp_steps=4)
    adapter = adapters.attach(networks, config, seed=5)
    weights = {name: base.weight.detach().clone() for name, base in adapter.layers().items()}
    start = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1.5)
    adapter.set_ramp(0.5)
    formats.save(adapter, tmp_path / "adapter.safetensors")
    adapter.detach()
    found = update_size(tmp_path / "adapter.safetensors", networks, seed=5)
    sizes, learned = [], []
    for name, weight in weights.items():
        out, into = weight.shape
        product = 1.5 * start[f"{name}.A"][:out] @ start[f"{name}.A"][:into].T  # alpha / rank
        sizes.append(float((0.5 * 1.5**2 * product).norm() / weight.norm()))
        learned.append(float(((0.5 * 1.5**2 - 1) * product).norm() / weight.norm()))
    assert (found.size, found.learned) == pytest.approx((np.median(sizes), np.median(learned)), rel=1e-4)
    other = update_size(tmp_path / "adapter.safetensors", networks, seed=6)
    assert other.size == found.size and other.learned > 2 * found.learned


def test_the_rate_with_the_best_product_and_where_it_lies() -> None:
    settings = build(CompareSettings, methods=("lora",), rates=3, rate_step=10.0, primary=("dino", "clip_t"))
    low, middle, high = learning_rates(settings.what)["lora"]
    scores = {low: (0.2, 0.8), middle: (0.6, 0.7), high: (0.9, 0.1)}
    cells_ = [
        {"method": "lora", "learning_rate": rate, "scores": {"dino": dino, "clip_t": clip_t}}
        for rate, (dino, clip_t) in scores.items()
    ]
    assert tuning.choose(settings, cells_) == {"lora": tuning.Choice(middle, False)}
    cells_[2]["scores"] = {"dino": 0.9, "clip_t": 0.7}
    assert tuning.choose(settings, cells_) == {"lora": tuning.Choice(high, True)}


def test_encoders_that_are_missing_are_missed_before_the_work(settings: CompareSettings, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no dino encoder of its own"):
        command.compare(replaced(settings, dino=None, output_dir=tmp_path / "out"))
    assert not (tmp_path / "out" / "cells").exists()


def test_the_base_model_is_loaded_once_and_left_as_it_was(done: CompareSettings) -> None:
    import torch

    from singlora_diffusion import models

    family = cells.worker.tools(done.training).family
    assert family is cells.worker.tools(done.training).family
    fresh = models.load(done.training.pretrained_model_name_or_path, "float32", "cpu")
    for name, network in fresh.networks.items():
        before, after = network.module.state_dict(), family.networks[name].module.state_dict()
        assert list(before) == list(after)
        assert all(torch.equal(tensor, after[key]) for key, tensor in before.items())
