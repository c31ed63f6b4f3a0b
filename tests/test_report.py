"""The page: everything in it, prompts in line, means over prompts, and a word where numbers cannot be compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from eval import plots, report
from eval.results import Column, Run, ceiling, load, scored
from singlora_diffusion.errors import UserError

ENCODERS = {
    role: {
        "architecture": f"tiny {role}",
        "files": {"model.safetensors": "0123456789abcdef"},
        "preprocessing": {"resize": 32, "crop": 32, "interpolation": "bicubic"},
        "fingerprint": f"print of {role}",
    }
    for role in ("clip", "dino")
}
PROMPTS = ("a photo of a dog in the snow", "a photo of a dog on the beach")


def pictures(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        colour = tuple(np.random.default_rng(len(name)).integers(0, 255, 3))
        Image.new("RGB", (20, 10), colour).save(folder / name)
    return folder


def scored_folder(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    """A folder of pictures with a manifest and the result of scoring it."""
    pictures(folder, [row["file"] for row in rows])
    manifest = [{key: value for key, value in row.items() if key not in ("dino", "clip_t")} for row in rows]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest))
    result = {
        "protocol": "toyworld",
        "reference_mode": "train",
        "metrics": {"dino": {"real_to_real": 0.9}, "clip_t": {"real_to_real": None}},
        "pictures": rows,
        "references": [{"file": "00.png", "sha256": "aa"}],
        "encoders": ENCODERS,
        **more,
    }
    (folder / "scores.json").write_text(json.dumps(result))
    return folder


def row(file: str, which: int, dino: float, seed: int = 0, **more: Any) -> dict[str, Any]:
    text = PROMPTS[which]
    words = {"prompt": text.replace("a dog", "a sks dog"), "prompt_without_token": text}
    return {"file": file, "seed": seed, "dino": dino, "clip_t": 0.25, **words, **more}


@pytest.fixture
def runs(tmp_path: Path) -> list[Run]:
    """Two runs of the same prompts, told apart by everything else: files, order, numbers of pictures."""
    few = [row("000-0.png", 0, 0.4), row("001-0.png", 1, 0.6)]
    many = [row("x.png", 1, 0.1), row("y.png", 0, 0.5), row("z.png", 0, 0.9, seed=1)]
    return [
        Run("first", scored_folder(tmp_path / "a", few)),
        Run("second", scored_folder(tmp_path / "b", many), facts={"parameters": "45,056"}),
    ]


class Page(HTMLParser):
    """The sheet of a page: words of each row's first cell -> file names in the other cells."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.rows: dict[str, list[list[str]]] = {}
        self.sources: list[str] = []
        self.tags: set[str] = set()
        self.cells: list[list[str]] = []
        self.words = ""
        self.in_prompt = self.in_sheet = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.sources += [str(given[key]) for key in ("src", "href") if given.get(key)]
        self.in_sheet = given.get("class") == "sheet" if tag == "table" else self.in_sheet
        if tag == "td" and self.in_sheet:
            self.in_prompt = given.get("class") == "prompt"
            if self.in_prompt:
                self.words, self.cells = "", []
            else:
                self.cells.append([])
        if tag == "img" and self.in_sheet:
            self.cells[-1].append(str(given["title"]).splitlines()[0])

    def handle_data(self, data: str) -> None:
        self.words += data if self.in_prompt else ""

    def handle_endtag(self, tag: str) -> None:
        self.in_prompt = self.in_prompt and tag != "td"
        if tag == "tr" and self.cells:
            self.rows[self.words.strip()] = self.cells
            self.cells = []


def test_same_prompts_stand_in_one_row(runs: list[Run]) -> None:
    assert Page(report.page("title", runs)).rows == {
        "a photo of a sks dog in the snow": [["000-0.png"], ["y.png", "z.png"]],
        "a photo of a sks dog on the beach": [["001-0.png"], ["x.png"]],
    }


def test_page_needs_nothing_else(runs: list[Run], tmp_path: Path) -> None:
    references = pictures(tmp_path / "real", ["1.png", "2.png", "3.jpg"])
    page = Page(report.page("title", runs, {"three real ones": references}))
    images = [source for source in page.sources if source.startswith("data:image/webp;base64,")]
    assert len(images) == 5 + 3
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not page.tags & {"script", "link", "iframe"}
    assert "svg" in page.tags


def test_the_table_averages_over_prompts(runs: list[Run]) -> None:
    second = load(runs[1])
    assert second.mean(Column("dino", "train")) == pytest.approx((0.1 + (0.5 + 0.9) / 2) / 2)
    html = report.page("title", runs)
    assert "0.400" in html and "0.500" in html and "45,056" in html


def test_the_ceiling_is_the_real_run_else_the_references_among_themselves(runs: list[Run], tmp_path: Path) -> None:
    loaded = [load(run) for run in runs]
    assert scored(loaded) == [Column("dino", "train"), Column("clip_t", None)]
    assert ceiling(loaded, Column("dino", "train")) == 0.9
    assert ceiling(loaded, Column("clip_t", None)) is None
    real = Run("real", scored_folder(tmp_path / "real", [row("r.png", 0, 0.77)]), real=True)
    assert ceiling([*loaded, load(real)], Column("dino", "train")) == pytest.approx(0.77)
    assert "0.770" in report.page("title", [*runs, real])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"encoders": {**ENCODERS, "dino": {**ENCODERS["dino"], "fingerprint": "another"}}}, "DINO scores come from 2"),
        ({"references": [{"file": "00.png", "sha256": "bb"}]}, "different real pictures"),
        ({"blank": 1}, "1 of 2 pictures is black"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, change: dict[str, Any], word: str | None) -> None:
    rows = [row("0.png", 0, 0.4), row("1.png", 1, 0.6)]
    runs = [Run("a", scored_folder(tmp_path / "a", rows)), Run("b", scored_folder(tmp_path / "b", rows, **change))]
    html = report.page("title", runs)
    assert ('<ul class="notes">' in html) == (word is not None)
    assert word is None or word in html


def test_other_prompts_are_said(tmp_path: Path) -> None:
    one = Run("a", scored_folder(tmp_path / "a", [row("0.png", 0, 0.4)]))
    two = Run("b", scored_folder(tmp_path / "b", [row("0.png", 1, 0.4)]))
    assert "do not have the same prompts" in report.page("title", [one, two])


def test_curves_and_settings_come_from_the_training_run(tmp_path: Path) -> None:
    runs = []
    for name, rank in (("a", 16), ("b", 8)):
        folder = tmp_path / f"run-{name}"
        folder.mkdir()
        (folder / "recipe.json").write_text(json.dumps({"rank": rank, "max_train_steps": 30, "dora": False}))
        log = [{"step": step, "loss": 1 / step, "grad_norm": 0.5} for step in range(1, 31)]
        (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        rows = [row("0.png", 0, 0.4, adapter=str(folder)), row("1.png", 1, 0.6, adapter=str(folder))]
        runs.append(Run(name, scored_folder(tmp_path / name, rows)))
    assert [load(run).recipe["rank"] for run in runs] == [16, 8]
    html = report.page("title", runs)
    assert "gradient norm, and its mean over 2 steps" in html
    assert re.search(r"<td>rank</td><td>16</td><td>8</td>", html)
    assert re.search(r"<td>max_train_steps</td><td>30</td>\s*</tr>", html)


def test_texts_are_texts(tmp_path: Path) -> None:
    rows = [row("0.png", 0, 0.4, template="<script>alert(1)</script>", prompt="<b>bold</b> & more")]
    html = report.page("a < b", [Run("<i>", scored_folder(tmp_path / "a", rows))], notes=["<u>"], commands=["a > b"])
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in html
    assert not Page(html).tags & {"script", "b", "u"}
    assert "a &lt; b" in html and "a &gt; b" in html


def test_pictures_alone_make_a_sheet(tmp_path: Path) -> None:
    folders = [pictures(tmp_path / name, ["1.png", "2.png", "10.png"]) for name in ("a", "b")]
    html = report.page("title", [Run(folder.name, folder) for folder in folders])
    assert list(Page(html).rows) == ["1", "2", "10"]
    assert "<h2>Scores</h2>" not in html


def test_only_so_many_pictures_are_shown(runs: list[Run]) -> None:
    html = report.page("title", runs, per_cell=1)
    assert Page(html).rows["a photo of a sks dog in the snow"] == [["000-0.png"], ["y.png"]]
    assert "The first 1 pictures" in html and "The first" not in report.page("title", runs, per_cell=2)


def test_bad_input_is_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    good = scored_folder(tmp_path / "good", [row("0.png", 0, 0.4)])
    broken = scored_folder(tmp_path / "broken", [row("0.png", 0, 0.4)])
    (broken / "manifest.jsonl").write_text('{"file": "0.png"}\n{oops\n')
    alien = scored_folder(tmp_path / "alien", [row("0.png", 0, 0.4)])
    (alien / "scores.json").write_text('{"score": 1}')
    output = tmp_path / "new" / "page.html"
    for folder, words in (
        (tmp_path / "missing", "missing"),
        (broken, "manifest.jsonl, line 2"),
        (alien, "is no result of eval.score"),
    ):
        assert report.main(["--runs", str(good), str(folder), "--output", str(output)]) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and words in said
        assert not output.exists()
    with pytest.raises(UserError, match="twice"):
        report.run(report.ReportSettings((good, good)))


def test_the_program_writes_a_page_without_torch(runs: list[Run], tmp_path: Path) -> None:
    output = tmp_path / "new" / "page.html"
    program = (
        "import sys; from eval import report; code = report.main(sys.argv[1:]); "
        "assert not {'torch', 'diffusers'} & set(sys.modules); sys.exit(code)"
    )
    folders = [str(run.images) for run in runs]
    arguments = ["--runs", *folders, "--names", "one", "two", "--title", "A title", "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    html = output.read_text()
    assert "<title>A title</title>" in html and "</html>" in html
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_running_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0, 8.0])
    np.testing.assert_allclose(plots.running_mean(values, 3), [1.5, 3, 11 / 3, 17 / 3, 5.5])
    np.testing.assert_array_equal(plots.running_mean(values, 1), values)
    np.testing.assert_allclose(plots.running_mean(np.ones(7), 100), np.ones(7))


def test_labels_lose_the_words_they_share() -> None:
    assert plots.shortened(list(PROMPTS)) == ["in the snow", "on the beach"]
    assert plots.shortened(["a dog", "a dog in the snow"]) == ["dog", "dog in the snow"]
    assert plots.shortened(["same words", "same words"]) == ["words", "words"]
    assert plots.shortened(["", "word"]) == ["", "word"]
    assert [len(text) for text in plots.shortened(["x" * 99, "y"], limit=10)] == [10, 1]


@pytest.mark.parametrize(("low", "high"), [(0.01, 1), (0.2, 0.9), (1.01, 1.3), (1e-5, 1e3)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = plots.round_numbers(low, high)
    assert 3 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
