"""The page: everything in it, prompts in line, means over prompts, and a word where numbers cannot be compared."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import browser
import numpy as np
import pytest
from PIL import Image

from eval import plots, report
from eval.results import ImageSet, ScoreKey, load, real_score, scored
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import parse

ENCODERS = {
    role: {
        "architecture": f"tiny {role}",
        "files": {"model.safetensors": "0123456789abcdef"},
        "preprocessing": {"resize": 32, "crop": 32, "interpolation": "bicubic"},
        "fingerprint": f"print of {role}",
    }
    for role in ("clip", "dino")
}
WIDTHS = (390, 1200)  # pixels of a phone and of a laptop
PROMPTS = ("a photo of a dog in the snow", "a photo of a dog on the beach")


def painted(folder: Path, names: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        colour = tuple(np.random.default_rng(len(name)).integers(0, 255, 3))
        Image.new("RGB", (20, 10), colour).save(folder / name)
    return folder


def scored_folder(folder: Path, rows: list[dict[str, Any]], **more: Any) -> Path:
    """A folder of images with a manifest and the result of scoring it."""
    painted(folder, [row["file"] for row in rows])
    manifest = [{key: value for key, value in row.items() if key not in ("dino", "clip_t")} for row in rows]
    (folder / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in manifest))
    result = {
        "protocol": "toyworld",
        "reference_mode": "train",
        "metrics": {"dino": {"real_to_real": 0.9}, "clip_t": {"real_to_real": None}},
        "images": rows,
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
def runs(tmp_path: Path) -> list[ImageSet]:
    """Two runs of the same prompts, told apart by everything else: files, order, numbers of images."""
    few = [row("000-0.png", 0, 0.4), row("001-0.png", 1, 0.6)]
    many = [row("x.png", 1, 0.1), row("y.png", 0, 0.5), row("z.png", 0, 0.9, seed=1)]
    return [
        ImageSet("first", scored_folder(tmp_path / "a", few)),
        ImageSet("second", scored_folder(tmp_path / "b", many), facts={"parameters": "45,056"}),
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


def program(*words: str) -> None:
    """`singlora report`, without the process."""
    report.run(parse(report.ReportSettings, words, "singlora report", "Write a page."))


def test_same_prompts_stand_in_one_row(runs: list[ImageSet]) -> None:
    assert Page(report.page("title", runs)).rows == {
        "a photo of a sks dog in the snow": [["000-0.png"], ["y.png", "z.png"]],
        "a photo of a sks dog on the beach": [["001-0.png"], ["x.png"]],
    }


def test_page_needs_nothing_else(runs: list[ImageSet], tmp_path: Path) -> None:
    references = painted(tmp_path / "real", ["1.png", "2.png", "3.jpg"])
    page = Page(report.page("title", runs, {"three real ones": references}))
    images = [source for source in page.sources if source.startswith("data:image/webp;base64,")]
    assert len(images) == 5 + 3
    assert all(source.startswith(("data:", "#")) for source in page.sources)
    assert not page.tags & {"script", "link", "iframe"}
    assert "svg" in page.tags


def test_the_table_averages_over_prompts(runs: list[ImageSet]) -> None:
    second = load(runs[1])
    assert second.mean(ScoreKey("dino", "train")) == pytest.approx((0.1 + (0.5 + 0.9) / 2) / 2)
    html = report.page("title", runs)
    assert "0.400" in html and "0.500" in html and "45,056" in html


def test_real_images_score_as_the_real_set_else_the_references_among_themselves(
    runs: list[ImageSet], tmp_path: Path
) -> None:
    loaded = [load(run) for run in runs]
    assert scored(loaded) == [ScoreKey("dino", "train"), ScoreKey("clip_t", None)]
    assert real_score(loaded, ScoreKey("dino", "train")) == 0.9
    assert real_score(loaded, ScoreKey("clip_t", None)) is None
    real = ImageSet("real", scored_folder(tmp_path / "real", [row("r.png", 0, 0.77)]), real=True)
    assert real_score([*loaded, load(real)], ScoreKey("dino", "train")) == pytest.approx(0.77)
    assert "0.770" in report.page("title", [*runs, real])


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({}, None),
        ({"encoders": {**ENCODERS, "dino": {**ENCODERS["dino"], "fingerprint": "another"}}}, "DINO scores come from 2"),
        ({"references": [{"file": "00.png", "sha256": "bb"}]}, "different real images"),
        ({"blank": 1}, "1 of 2 images is black"),
    ],
)
def test_what_cannot_be_compared_is_said(tmp_path: Path, change: dict[str, Any], word: str | None) -> None:
    rows = [row("0.png", 0, 0.4), row("1.png", 1, 0.6)]
    runs = [
        ImageSet("a", scored_folder(tmp_path / "a", rows)),
        ImageSet("b", scored_folder(tmp_path / "b", rows, **change)),
    ]
    html = report.page("title", runs)
    assert ('<ul class="notes">' in html) == (word is not None)
    assert word is None or word in html


def test_other_prompts_are_said(tmp_path: Path) -> None:
    one = ImageSet("a", scored_folder(tmp_path / "a", [row("0.png", 0, 0.4)]))
    two = ImageSet("b", scored_folder(tmp_path / "b", [row("0.png", 1, 0.4)]))
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
        runs.append(ImageSet(name, scored_folder(tmp_path / name, rows)))
    assert [load(run).recipe["rank"] for run in runs] == [16, 8]
    html = report.page("title", runs)
    assert "gradient norm, and its mean over 2 steps" in html
    assert re.search(r"<td>rank</td><td[^>]*>16</td><td[^>]*>8</td>", html)
    assert re.search(r"<td>max_train_steps</td><td>30</td>\s*</tr>", html)


def test_texts_are_texts(tmp_path: Path) -> None:
    rows = [row("0.png", 0, 0.4, template="<script>alert(1)</script>", prompt="<b>bold</b> & more")]
    html = report.page(
        "a < b", [ImageSet("<i>", scored_folder(tmp_path / "a", rows))], notes=["<u>"], commands=["a > b"]
    )
    assert "&lt;b&gt;bold&lt;/b&gt; &amp; more" in html
    assert not Page(html).tags & {"script", "b", "u"}
    assert "a &lt; b" in html and "a &gt; b" in html


def test_images_alone_make_a_sheet(tmp_path: Path) -> None:
    folders = [painted(tmp_path / name, ["1.png", "2.png", "10.png"]) for name in ("a", "b")]
    html = report.page("title", [ImageSet(folder.name, folder) for folder in folders])
    assert list(Page(html).rows) == ["1", "2", "10"]
    assert "<h2>Scores</h2>" not in html


def test_only_so_many_images_are_shown(runs: list[ImageSet]) -> None:
    html = report.page("title", runs, images_per_prompt=1)
    assert Page(html).rows["a photo of a sks dog in the snow"] == [["000-0.png"], ["y.png"]]
    assert "The first 1 images" in html and "The first" not in report.page("title", runs, images_per_prompt=2)


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    good = scored_folder(tmp_path / "good", [row("0.png", 0, 0.4)])
    broken = scored_folder(tmp_path / "broken", [row("0.png", 0, 0.4)])
    (broken / "manifest.jsonl").write_text('{"file": "0.png"}\n{oops\n')
    alien = scored_folder(tmp_path / "alien", [row("0.png", 0, 0.4)])
    (alien / "scores.json").write_text('{"score": 1}')
    output = tmp_path / "new" / "page.html"
    for folder, words in (
        (tmp_path / "missing", "missing"),
        (broken, "manifest.jsonl, line 2"),
        (alien, "is not a result of scoring"),
    ):
        with pytest.raises(UserError) as caught:
            program("--runs", str(good), str(folder), "--output", str(output))
        assert "\n" not in str(caught.value) and words in str(caught.value)
        assert not output.exists()
    with pytest.raises(UserError, match="twice"):
        report.run(report.ReportSettings((good, good)))


def test_the_program_writes_a_page_without_torch(runs: list[ImageSet], tmp_path: Path) -> None:
    output = tmp_path / "new" / "page.html"
    code = (
        "import sys; from eval import report; from singlora_diffusion.settings import parse; "
        "report.run(parse(report.ReportSettings, sys.argv[1:], 'singlora report', '')); "
        "assert not {'torch', 'diffusers'} & set(sys.modules)"
    )
    folders = [str(run.images) for run in runs]
    arguments = ["--runs", *folders, "--names", "one", "two", "--title", "A title", "--output", str(output)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    html = output.read_text()
    assert "<title>A title</title>" in html and "</html>" in html
    assert [path.name for path in output.parent.iterdir()] == ["page.html"]


def test_results_of_the_first_version_are_read(runs: list[ImageSet]) -> None:
    """They say "pictures", and know no metric per set."""
    before = load(runs[0])
    path = runs[0].images / "scores.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps({"pictures": content.pop("images"), **content}))
    after = load(runs[0])
    assert [image.scores for image in after.images] == [image.scores for image in before.images]
    assert after.mean(ScoreKey("dino", "train")) == pytest.approx(0.5)


@pytest.mark.parametrize(
    "change",
    [
        {"images": {"a": 1}},
        {"images": [{"dino": 0.3}]},
        {"images": [{"file": "../x.png"}]},
        {"images": [{"file": "0.png", "seed": []}]},
        {"metrics": []},
        {"metrics": {"dino": {"real_to_real": "much"}}},
        {"reference_mode": "some"},
        {"references": [{}]},
        {"encoders": {"dino": {}}},
        {"encoders": {"dino": {**ENCODERS["dino"], "preprocessing": 3}}},
        {"blank": None},
        {"protocol": "\ud800", "references": 1},
    ],
)
def test_results_of_wrong_types_are_one_line(tmp_path: Path, change: dict[str, Any]) -> None:
    folder = scored_folder(tmp_path / "a", [row("0.png", 0, 0.4)])
    content = json.loads((folder / "scores.json").read_text())
    (folder / "scores.json").write_text(json.dumps({**content, **change}))
    with pytest.raises(UserError, match=r"scores\.json: is not a result of scoring") as caught:
        report.page("title", [ImageSet("a", folder)])
    assert str(caught.value).isprintable()


def test_scores_that_are_no_numbers_do_not_count(tmp_path: Path) -> None:
    rows = [row("0.png", 0, 0.4), row("1.png", 0, 0.2), row("2.png", 1, 0.6)]
    rows[0]["dino"], rows[1]["dino"], rows[1]["clip_t"] = None, "high", 10**400  # type: ignore[assignment]
    loaded = load(ImageSet("a", scored_folder(tmp_path / "a", rows)))
    assert loaded.mean(ScoreKey("dino", "train")) == pytest.approx(0.6)
    assert loaded.mean(ScoreKey("clip_t", None)) == pytest.approx(0.25)


def test_logs_and_recipes_that_are_odd(tmp_path: Path) -> None:
    training = tmp_path / "training"
    training.mkdir()
    lines = [b'{"step": 1, "loss": 0.5, "note": "x"}', b'{"step": 2, "loss": NaN}', b"\xff\xfe", b"[" * 100_000]
    lines += [
        b'{"step": 3, "loss": "low"}',
        b'{"step": 4, "loss": 0.25, "grad_norm": 0}',
        b"[3]",
        b'{"step": 1' + b"0" * 400,
    ]
    (training / "log.jsonl").write_bytes(b"\n".join([*lines, b'{"step": 5, "loss": 0.2']))
    (training / "recipe.json").write_text(json.dumps({"rank": {"a": [1, None]}, "note": "[/b]\x1b"}))
    one = ImageSet("a", scored_folder(tmp_path / "a", [row("0.png", 0, 0.4), row("1.png", 1, 0.6)]), training=training)
    assert load(one).log == [
        {"step": 1, "loss": 0.5},
        {"step": 2},
        {"step": 3},
        {"step": 4, "loss": 0.25, "grad_norm": 0},
    ]
    assert "loss over the steps" in report.page("title", [one])
    for content, words in (
        (b"\xff", "is not valid JSON"),
        (b"[" * 100_000, "is not valid JSON"),
        (b"[]", "not a JSON object"),
    ):
        (training / "recipe.json").write_bytes(content)
        with pytest.raises(UserError, match=words):
            report.page("title", [one])


def test_words_are_drawn_as_they_stand(tmp_path: Path) -> None:
    """Neither LaTeX nor markup nor anything a terminal obeys."""
    words = [r"a $\bad{ dog", "a dog [/b] <i>\x1b[31m \x00 犬"]
    rows = [
        row(f"{i}.png", i, 0.4, prompt=text, prompt_without_token=text, template=text) for i, text in enumerate(words)
    ]
    html = report.page("[/b]", [ImageSet("<x> $\\frac{", scored_folder(tmp_path / "a", rows))])
    assert "$\\bad{ dog" in html and "[/b] &lt;i&gt;" in html and "<i>\x1b" not in html


@pytest.mark.parametrize("place", ["/proc/nothing/page.html", f"{'x' * 300}.html", "."])
def test_a_page_that_cannot_be_written_is_one_line(
    runs: list[ImageSet], place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"cannot be written|is a folder"):
        program("--runs", str(runs[0].images), "--output", place)


@pytest.mark.parametrize("flag", ["--runs", "--references"])
def test_a_name_that_is_too_long_is_one_line(runs: list[ImageSet], flag: str, tmp_path: Path) -> None:
    first = [] if flag == "--runs" else ["--runs", str(runs[0].images)]
    with pytest.raises(UserError, match="no such folder"):
        program(*first, flag, "x" * 5000, "--output", str(tmp_path / "page.html"))


def rich_page(folder: Path, columns: int = 5) -> str:
    """A page with all that one can hold, in names and words that do not break easily."""
    sets = []
    for number in range(columns):
        training = folder / f"training-{number}"
        training.mkdir(parents=True)
        (training / "recipe.json").write_text(json.dumps({"rank": number, "where": "/a/long/path/without/spaces" * 5}))
        log = [{"step": step, "loss": 1 / step, "grad_norm": 0.5} for step in range(1, 31)]
        (training / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
        about = {"base_model": "/another/long/path/without/spaces" * 3, "adapter": str(training)}
        rows = [
            row(f"{i}-{s}.png", i, 0.1 * s, s, clip_i=0.5, clip_t_token=0.2, **about) for i in (0, 1) for s in range(4)
        ]
        made = scored_folder(folder / f"set-{number}", rows, blank=1)
        (made / "scores-heldout.json").write_text((made / "scores.json").read_text().replace('"train"', '"heldout"'))
        facts = {"parameters": "45,056", "training, s": "100"}
        sets.append(ImageSet(f"a-method-of-a-long-name-{number}", made, training=training, facts=facts))
    real = painted(folder / "real", [f"{number}.png" for number in range(7)])
    commands = ["singlora train --instance_data_dir " + "/long/path" * 30]
    return report.page("A_title_without_spaces_" * 3, sets, {"real images": real}, commands=commands, lead="word " * 40)


@browser.needed
def test_the_page_fits_a_phone_and_a_large_screen(tmp_path: Path) -> None:
    """Frames as wide as the screens measure it: the page, and each of its sections, has nothing to scroll sideways."""
    found = browser.seen(rich_page(tmp_path), WIDTHS, tmp_path)
    assert [(one["width"], one["cut"]) for one in found] == [(width, []) for width in WIDTHS]
    assert not any(one["broken"] or one["errors"] for one in found)


def test_running_mean() -> None:
    values = np.array([1.0, 2.0, 6.0, 3.0, 8.0])
    np.testing.assert_allclose(plots.running_mean(values, 3), [1.5, 3, 11 / 3, 17 / 3, 5.5])
    np.testing.assert_array_equal(plots.running_mean(values, 1), values)
    np.testing.assert_allclose(plots.running_mean(np.ones(7), 100), np.ones(7))


def test_labels_lose_the_words_they_share() -> None:
    assert plots.shortened(list(PROMPTS), 40) == ["in the snow", "on the beach"]
    assert plots.shortened(["a dog", "a dog in the snow"], 40) == ["dog", "dog in the snow"]
    assert plots.shortened(["same words", "same words"], 40) == ["words", "words"]
    assert plots.shortened(["", "word"], 40) == ["", "word"]
    assert [len(text) for text in plots.shortened(["x" * 99, "y"], limit=10)] == [10, 1]


@pytest.mark.parametrize(("low", "high"), [(0.01, 1), (0.2, 0.9), (1.01, 1.3), (1e-5, 1e3)])
def test_ticks_are_few_and_within(low: float, high: float) -> None:
    ticks = plots.round_numbers(low, high)
    assert 3 <= len(ticks) <= 7 and low <= ticks[0] and ticks[-1] <= high
