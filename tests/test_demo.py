"""The demo on a tiny random model: equal budgets, the commands' own results, nothing twice, nothing overwritten."""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from encoder_folders import clip_folder, timm_folder

from eval.results import ImageSet, ScoredImage, ScoredSet, ScoreKey
from singlora_diffusion.adapters import METHODS
from singlora_diffusion.data.folders import image_files
from singlora_diffusion.data.images import open_image
from singlora_diffusion.demo import flow, plan, words
from singlora_diffusion.demo.settings import RATES, DemoSettings
from singlora_diffusion.demo.world_images import write_references
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import as_json, command_line, parse, replaced
from singlora_diffusion.toyworld import command as toyworld_command
from singlora_diffusion.toyworld.captions import PLACES
from singlora_diffusion.toyworld.subjects import HELD_OUT, references, subject
from singlora_diffusion.training.recipe import Recipe


@pytest.fixture(scope="module")
def settings(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> DemoSettings:
    """A demo of two steps and two prompts."""
    folder = tmp_path_factory.mktemp("demo")
    prompts = folder / "prompts.txt"
    prompts.write_text("a {token} {class} in the snow\na red {token} {class}\n")
    return DemoSettings(
        subject="cat-1",
        output_dir=folder / "out [v]",
        match="lora:4",
        max_train_steps=2,
        prompts=str(prompts),
        seeds="3",
        pretrained_model_name_or_path=str(tiny_model),
        clip=str(clip_folder(folder / "clip")),
        dino=str(timm_folder(folder / "dino")),
    )


@pytest.fixture(scope="module")
def done(settings: DemoSettings) -> SimpleNamespace:
    """The demo, run once: its folder and what it printed."""
    import contextlib
    import io

    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        page = flow.demo(settings)
    return SimpleNamespace(out=settings.output_dir, page=page, said=said.getvalue())


def contents(folder: Path) -> dict[str, bytes]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_adapters_of_equal_size_on_the_same_terms(done: SimpleNamespace) -> None:
    from singlora_diffusion import formats

    headers = {
        method: formats.read_header(done.out / method / "adapter.safetensors") for method in ("singlora", "lora")
    }
    assert headers["lora"].config.rank == 4
    sizes = {}
    for method, header in headers.items():
        ends = {"singlora": lambda r, shape: r * max(shape), "lora": lambda r, shape: r * sum(shape)}[method]
        sizes[method] = sum(ends(header.config.rank, shape) for shape in header.layers.values())
        assert f"trains {sizes[method]:,} parameters" in done.said
    assert sizes["singlora"] == pytest.approx(sizes["lora"], rel=0.06)  # the nearest whole rank
    differing = {key for key, value in headers["lora"].recipe.items() if value != headers["singlora"].recipe[key]}
    assert differing == {"method", "rank", "output_dir", "learning_rate"}
    rates = {method: header.recipe["learning_rate"] for method, header in headers.items()}
    assert rates == {"singlora": RATES["singlora"], "lora": RATES["lora"]}  # each at its own


def test_same_prompts_and_seeds_for_every_column(done: SimpleNamespace) -> None:
    manifests = {}
    for name in ("base", "singlora", "lora"):
        lines = (done.out / name / "samples" / "manifest.jsonl").read_text().splitlines()
        rows = [json.loads(line) for line in lines]
        manifests[name] = [(row["prompt"], row["seed"], row["guidance_scale"], row["height"]) for row in rows]
        assert all((row["adapter"] is None) == (name == "base") for row in rows)
    assert manifests["base"] == manifests["singlora"] == manifests["lora"]
    assert [row[:2] for row in manifests["base"]] == [("a sks cat in the snow", 3), ("a red sks cat", 3)]


def test_the_table_says_what_the_scores_say(done: SimpleNamespace) -> None:
    for name, label in (("base", "base model"), ("singlora", "SingLoRA"), ("lora", "LoRA")):
        result = json.loads((done.out / name / "samples" / "scores-heldout.json").read_text())
        assert result["reference_mode"] == "heldout" and len(result["references"]) == len(PLACES)
        (line,) = [line for line in done.said.splitlines() if line.startswith(f"│ {label} ")]
        numbers = [f"{result['metrics'][metric]['mean']:.3f}" for metric in ("dino", "clip_i", "clip_t")]
        assert [cell.strip() for cell in line.split("│")[2:5]] == numbers
        train = json.loads((done.out / name / "samples" / "scores.json").read_text())
        assert train["reference_mode"] == "train" and len(train["references"]) == 5
    assert "One subject, one training seed, a toy model." in done.said


def test_the_page_shows_all_of_it(done: SimpleNamespace) -> None:
    html = done.page.read_text()
    assert done.page == done.out / "report.html"
    assert html.count("data:image/webp") == 5 + 3 * 2 + 1  # references, generated, and the real cat in the snow
    for command in ("singlora toyworld subject --name cat-1", "singlora train", "singlora generate", "singlora score"):
        assert command in html


def test_held_out_images_are_none_of_the_training_ones(done: SimpleNamespace) -> None:
    held_out = {path.stem: np.asarray(open_image(path)) for path in image_files(done.out / "heldout")}
    training = [np.asarray(open_image(path)) for path in image_files(done.out / "references")]
    assert len(held_out) == len(PLACES)
    assert not any(np.array_equal(one, other) for one in held_out.values() for other in training)
    for image, _, scene in references(subject("cat-1"), len(PLACES), start=HELD_OUT):
        assert np.array_equal(held_out[scene.background.replace(" ", "-")], image)
    (line,) = (done.out / "heldout" / "manifest.jsonl").read_text().splitlines()
    assert json.loads(line)["file"] == "snow.png"
    assert json.loads(line)["prompt_without_token"] == "a cat in the snow"


def test_nothing_is_done_twice(
    done: SimpleNamespace, settings: DemoSettings, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_dreambooth
    from singlora_diffusion.models import stock

    def never(*_: Any, **__: Any) -> None:
        raise AssertionError("done again")

    before = contents(done.out)
    monkeypatch.setattr(train_dreambooth, "main", never)
    monkeypatch.setattr(stock, "sample", never)
    flow.demo(settings)
    after = contents(done.out)
    assert before.keys() == after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed <= {"report.html"} | {name for name in before if Path(name).name.startswith("scores")}
    table = [line for line in done.said.splitlines() if line.startswith("│")]
    assert [line for line in capsys.readouterr().out.splitlines() if line.startswith("│")] == table


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"subject": "cat-2"}, "references: holds other images"),
        ({"max_train_steps": 3}, "max_train_steps 2, now 3"),
        ({"match": "lora:2"}, "rank"),
        ({"subject": "cat-99"}, "no subject 'cat-99'"),
        ({"methods": ("lora", "lora")}, "--methods"),
    ],
)
def test_another_demo_is_not_overwritten(
    done: SimpleNamespace, settings: DemoSettings, change: dict[str, Any], said: str
) -> None:
    before = contents(done.out)
    with pytest.raises(UserError, match=said) as caught:
        flow.demo(replace(settings, **change))
    assert "\n" not in str(caught.value)
    assert contents(done.out) == before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"seeds": "7-3"}, "--seeds"),
        ({"prompts": "nowhere.txt"}, "nowhere.txt"),
        ({"match": "lora:none"}, "lora:none"),
        ({"device": "abacus"}, "--device abacus"),
        ({"pretrained_model_name_or_path": "./nowhere"}, "nowhere"),
    ],
)
def test_what_cannot_work_ends_before_anything_is_written(
    settings: DemoSettings, tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(UserError, match=said):
        flow.demo(replace(settings, output_dir=tmp_path / "out", **change))
    assert not (tmp_path / "out").exists()


def test_an_interrupted_training_goes_on(
    settings: DemoSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_dreambooth

    recipe = plan.recipe(replace(settings, output_dir=tmp_path), subject("cat-1"), "lora", 4)
    asked: list[Any] = []
    monkeypatch.setattr(train_dreambooth, "main", lambda recipe, hint: asked.append(as_json(recipe)))
    assert flow.train(recipe, tmp_path / "lora")
    (tmp_path / "lora" / "checkpoint-1").mkdir(parents=True)
    (tmp_path / "lora" / "checkpoint-1" / "state.json").touch()
    assert flow.train(recipe, tmp_path / "lora")
    assert [one["resume_from_checkpoint"] for one in asked] == [None, "latest"]
    (tmp_path / "lora" / "adapter.safetensors").touch()
    (tmp_path / "lora" / "recipe.json").write_text(json.dumps(asked[-1]))
    assert not flow.train(recipe, tmp_path / "lora") and len(asked) == 2


def test_images_are_completed_after_an_interruption(tmp_path: Path) -> None:
    write_references(subject("cat-1"), tmp_path)
    whole = contents(tmp_path)
    (tmp_path / "03.png").unlink()
    write_references(subject("cat-1"), tmp_path)
    assert contents(tmp_path) == whole and len(whole) == 5


def test_commands_say_the_same_as_the_settings(settings: DemoSettings) -> None:
    chosen = subject("cat-1")
    for name, wanted in [
        ("train", plan.recipe(settings, chosen, "singlora", 7)),
        *(("generate", one) for one in plan.generations(settings, chosen).values()),
        *(("score", one) for one in plan.scorings(settings, ("base", "lora"))),
        ("demo", settings),
    ]:
        typed = shlex.split(command_line(name, wanted))
        assert typed[:2] == ["singlora", name]
        assert parse(type(wanted), typed[2:], name, "") == wanted


def test_a_new_method_has_a_rate_and_a_label(settings: DemoSettings, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "new", replace(METHODS["lora"], label="New"))
    assert [words.label(name) for name in (plan.BASE, "lora+", "new")] == ["base model", "LoRA+", "New"]
    for method in METHODS:
        rate = plan.recipe(settings, subject("cat-1"), method, 4).optimization.learning_rate
        assert rate == RATES.get(method, 2e-3)


def test_where_it_is_computed_makes_no_other_demo(done: SimpleNamespace, settings: DemoSettings) -> None:
    recipe = plan.recipe(settings, subject("cat-1"), "lora", 4)
    moved = replaced(recipe, device="cuda:1", instance_data_dir=Path("elsewhere"), sample_batch_size=1)
    assert not flow.train(moved, done.out / "lora")
    with pytest.raises(UserError, match="seed 0, now 1"):
        flow.train(replaced(moved, seed=1), done.out / "lora")


@pytest.mark.parametrize(
    ("differences", "said"), [([0.1, -0.1, 0.06], "within noise"), ([0.1, 0.11, 0.12], "no claim rests on it")]
)
def test_the_caveat_weighs_the_difference(differences: list[float], said: str) -> None:
    column = ScoreKey("dino", "heldout")

    def run(name: str, scores: list[float]) -> ScoredSet:
        shown = [ScoredImage(Path(f"{i}.png"), {"prompt": f"p{i}"}, {column: score}) for i, score in enumerate(scores)]
        return ScoredSet(ImageSet(name, Path()), True, shown, [], {}, [])

    text = words.caveat([run("A", [0.5 + each for each in differences]), run("B", [0.5] * 3)])
    assert said in text and f"A minus B: DINO {np.mean(differences):+.3f}" in text
    assert f"{np.std(differences, ddof=1):.3f}" in text


def test_toyworld_subject_writes_a_folder_to_train_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "my dog"
    toyworld_command.write(toyworld_command.SubjectSettings("subject", "dog-2", folder, images=2, masks=True))
    assert [path.name for path in image_files(folder)] == ["00.png", "01.png"]
    assert len(image_files(folder / "masks")) == 2
    last = capsys.readouterr().out.splitlines()[-1]
    recipe = parse(Recipe, shlex.split(last.removeprefix("next: singlora train ")), "train", "")
    assert (recipe.data.instance_data_dir, recipe.data.instance_prompt) == (folder, "a photo of sks dog")
