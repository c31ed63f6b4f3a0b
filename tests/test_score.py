"""Scoring folders of images, as a function and as a program: `pytest tests/test_score.py`."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_folders import clip_folder, timm_folder
from PIL import Image

from eval import encoders as encoders_module
from eval import results
from eval.encoder_table import ROLES
from eval.encoders import encoder
from eval.metrics import METRICS, Metric
from eval.prompt_kinds import kind
from eval.score import EncoderSources, ScoreSettings, run, score
from singlora_diffusion.data import png, prompts
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import parse

PROMPTS = ("a {}dog in the snow", "a {}dog on the beach")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """By role: a tiny CLIP and a tiny vision transformer of random weights."""
    root = tmp_path_factory.mktemp("encoders")
    return {"clip": str(clip_folder(root / "clip")), "dino": str(timm_folder(root / "dino"))}


def paint(path: Path, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).resize((40, 48), Image.Resampling.BICUBIC)
    image.save(path)
    return image


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five generated images of two prompts (three and two seeds) with a manifest, and three references."""
    images, references = tmp_path / "samples", tmp_path / "my dog"
    images.mkdir()
    references.mkdir()
    lines = []
    for index, seed in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        name = f"{index:03d}-{seed}.png"
        paint(images / name, 10 * index + seed)
        about = {"file": name, "prompt": PROMPTS[index].format("sks "), "prompt_index": index, "seed": seed}
        lines.append({**about, "prompt_without_token": PROMPTS[index].format(""), "base_model": "toyworld"})
    (images / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    paint(images / "contact_sheet.png", 99)
    for number in range(3):
        paint(references / f"{number}.png", 100 + number)
    return images, references


def settings(folders: tuple[Path, Path], encoders: dict[str, str], **changes: Any) -> ScoreSettings:
    sources = {**encoders, **{role: changes.pop(role) for role in ("clip", "dino", "dinov2") if role in changes}}
    defaults: dict[str, Any] = {"images": folders[0], "references": folders[1], "device": "cpu"}
    return ScoreSettings(**{**defaults, **changes}, encoders=EncoderSources(**sources))


@pytest.mark.numerical
def test_scores_are_those_of_the_definition(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    result = score(settings(folders, encoders))
    images, references = folders
    assert result["protocol"] == "toyworld" and result["reference_mode"] == "train"
    assert list(result["metrics"]) == ["clip_i", "dino", "clip_t", "clip_t_token"]
    assert result["left_out"] == {"contact_sheet.png": "not in the manifest"}

    def vectors(role: str, folder: Path, pattern: str) -> np.ndarray:
        images = [Image.open(path).convert("RGB") for path in sorted(folder.glob(pattern))]
        return encoder("custom", role, encoders[role]).images(images).astype(np.float64)

    for name, role in (("clip_i", "clip"), ("dino", "dino")):
        generated, real = vectors(role, images, "0*.png"), vectors(role, references, "*.png")
        per_image = (generated @ real.T).mean(axis=1)
        assert np.allclose([row[name] for row in result["images"]], per_image, atol=1e-6)
        found = result["metrics"][name]
        assert found["mean"] == pytest.approx((per_image[:3].mean() + per_image[3:].mean()) / 2, abs=1e-6)
        assert found["sd"] == pytest.approx(per_image.std(ddof=1), abs=1e-6)
        assert found["real_to_real"] == pytest.approx((real @ real.T)[~np.eye(3, dtype=bool)].mean(), abs=1e-6)
        assert (found["n"], found["prompts"]) == (5, 2)

    clip = encoder("custom", "clip", encoders["clip"])
    assert clip.texts is not None
    for name, token in (("clip_t", ""), ("clip_t_token", "sks ")):
        texts = clip.texts([prompt.format(token) for prompt in PROMPTS])[[0, 0, 0, 1, 1]]
        expected = (vectors("clip", images, "0*.png") * texts).sum(axis=1)
        assert np.allclose([row[name] for row in result["images"]], expected, atol=1e-6)
        assert result["metrics"][name]["real_to_real"] is None
    assert result["metrics"]["clip_t"]["mean"] != result["metrics"]["clip_t_token"]["mean"]


def test_masked_scores_are_of_the_subject_alone(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    """Other pixels where a mask is black change DINO, and not a bit of its masked form."""
    asked = settings(folders, encoders, metrics=("dino", "masked_dino"))
    with pytest.raises(UserError, match="masked_dino cannot be computed: needs a mask beside each image"):
        score(asked)
    for folder in folders:
        for path in folder.glob("*.png"):
            mask = np.zeros((48, 40), dtype=np.uint8)
            mask[8:40, 5:30] = 255
            Image.fromarray(mask).save(path.with_suffix(".mask.png"))
    before = score(asked)
    for path in folders[0].glob("0*[0-9].png"):
        pixels = np.asarray(Image.open(path)).copy()
        pixels[:8], pixels[40:], pixels[:, :5], pixels[:, 30:] = 255, 0, 9, 90
        Image.fromarray(pixels).save(path)
    after = score(asked)
    assert [row["masked_dino"] for row in after["images"]] == [row["masked_dino"] for row in before["images"]]
    assert all(a["dino"] != b["dino"] for a, b in zip(after["images"], before["images"], strict=True))
    assert "contact_sheet.png" in after["left_out"] and len(after["images"]) == 5
    Image.new("L", (40, 48)).save(folders[0] / "000-0.mask.png")  # nothing of the subject was found
    missed = score(asked)["images"]
    assert missed[0]["masked_dino"] != after["images"][0]["masked_dino"] and len(missed) == 5
    Image.new("L", (40, 40), 255).save(folders[0] / "000-0.mask.png")
    with pytest.raises(UserError, match=r"000-0\.mask\.png: is 40x40 pixels, its image 40x48"):
        score(asked)


def test_dreambooths_prompts_by_kind() -> None:
    """Its authors: the last five change the subject, ten of the live subjects' are accessories, the rest are places."""
    for name, expected in (("object", "place " * 20), ("live_subject", "place " * 10 + "accessory " * 10)):
        kinds = [kind(prompt.template) for prompt in prompts.load(prompts.bundled()[name])]
        assert kinds == [*expected.split(), *["property"] * 5]
    assert {kind(prompt.template) for prompt in prompts.load("toyworld")} == {"place"}
    assert kind("A photo of the {token} {class}") == "place" and kind("a {token} wooden {class}") == "property"


def test_scores_by_kind_of_prompt(
    folders: tuple[Path, Path], encoders: dict[str, str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert score(settings(folders, encoders))["kinds"] == {}  # templates are not known
    manifest = folders[0] / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    templates = ("a {token} {class} in the snow", "a red {token} {class}")
    texts = [json.dumps({**line, "template": templates[line["prompt_index"]]}) + "\n" for line in lines]
    manifest.write_text("".join(texts))
    run(settings(folders, encoders))
    result = json.loads((folders[0] / "scores.json").read_text())
    assert list(result["kinds"]) == ["place", "property"]
    for name, rows in (("place", result["images"][:3]), ("property", result["images"][3:])):
        for metric in ("dino", "clip_t"):
            assert result["kinds"][name][metric] == pytest.approx(np.mean([row[metric] for row in rows]), abs=1e-12)
    assert "the subject changed" in " ".join(capsys.readouterr().out.split())


def test_the_file_says_how_to_repeat_it(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    result = score(settings(folders, encoders, reference_mode="heldout"))
    written = json.loads((folders[0] / "scores.json").read_text())
    assert written == json.loads(json.dumps(result))
    assert written["reference_mode"] == "heldout" and written["dtype"] == "float32"
    assert set(written["encoders"]) == {"clip", "dino"}
    assert len(written["encoders"]["clip"]["files"]["weights"]) == 64
    assert written["encoders"]["dino"]["preprocessing"]["resize"] == 36
    assert {"torch", "open_clip_torch", "timm", "python"} <= set(written["versions"])
    assert f"--references '{folders[1]}'" in written["command"] and "--reference_mode heldout" in written["command"]
    assert written["settings"]["batch_size"] == 32
    assert [row["file"] for row in written["references"]] == ["0.png", "1.png", "2.png"]
    assert not list(folders[0].glob("*.part"))


@pytest.mark.numerical
def test_batch_size_changes_no_score(folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path) -> None:
    one, four = (score(settings(folders, encoders, batch_size=size, cache_dir=tmp_path / str(size))) for size in (1, 4))
    for name, found in one["metrics"].items():
        assert four["metrics"][name]["mean"] == pytest.approx(found["mean"], abs=1e-6)


def test_the_second_time_no_encoder_is_loaded(
    folders: tuple[Path, Path], encoders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = score(settings(folders, encoders))
    assert (folders[0] / ".features").is_dir()

    def refuse(*_: object) -> None:
        raise AssertionError("an encoder ran")

    monkeypatch.setattr(encoders_module, "_unit_vectors", refuse)
    again = score(settings(folders, encoders))
    assert again["images"] == first["images"] and again["metrics"] == first["metrics"]
    paint(folders[0] / "001-1.png", 77)  # other pixels under the same name
    with pytest.raises(AssertionError, match="an encoder ran"):
        score(settings(folders, encoders))


def test_prompts_of_two_files_do_not_mix(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    manifest = folders[0] / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"prompt_index": 1', '"prompt_index": 0'))
    result = score(settings(folders, encoders, metrics=("dino",)))
    assert result["metrics"]["dino"]["prompts"] == 2


def test_a_prompt_listed_twice_is_one_prompt_in_score_and_report(
    folders: tuple[Path, Path], encoders: dict[str, str]
) -> None:
    """Else the same folder would have two means."""
    manifest = folders[0] / "manifest.jsonl"
    lines = [json.loads(row) for row in manifest.read_text().splitlines()]
    about = {**lines[-1], "prompt_index": 2}
    for seed in (5, 6, 7):
        paint(folders[0] / f"002-{seed}.png", 200 + seed)
        lines.append({**about, "file": f"002-{seed}.png", "seed": seed})
    templates = {prompt.format("sks "): prompt.format("{identifier} ") for prompt in PROMPTS}
    for templated in (False, True):
        known = [{**line, "template": templates[line["prompt"]]} if templated else line for line in lines]
        manifest.write_text("".join(json.dumps(line) + "\n" for line in known))
        result = score(settings(folders, encoders, metrics=("dino", "diversity")))
        rows = np.array([row["dino"] for row in result["images"]])
        assert result["metrics"]["dino"]["prompts"] == 2
        assert result["metrics"]["dino"]["mean"] == pytest.approx((rows[:3].mean() + rows[3:].mean()) / 2)
        for elsewhere in (False, True):  # the report knows the manifest, or the rows of the result alone
            if elsewhere:
                manifest.unlink()
            loaded = results.load(results.ImageSet("dog", folders[0]))
            shared = results.ScoreKey("dino", "train")
            assert len(loaded.per_prompt(shared)) == 2
            assert loaded.mean(shared) == pytest.approx(result["metrics"]["dino"]["mean"])


def test_what_the_commands_put_beside_images_is_not_reported(
    folders: tuple[Path, Path], encoders: dict[str, str]
) -> None:
    images = folders[0]
    (images / "contact_sheet.png").unlink()
    png.write(Image.new("RGB", (9, 9)), images / "contact_sheet.png", prompt="")
    (images / ".lock").touch()
    (images / "report.html").touch()
    (images / "notes.txt").write_text("mine")
    for _ in range(2):  # the second time scores.json and .features are there too
        result = score(settings(folders, encoders, metrics=("dino",)))
        assert result["left_out"] == {"notes.txt": "not an image"}


def test_only_the_encoders_that_are_needed(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    result = score(settings(folders, encoders, metrics=("dino",), clip="/nowhere"))
    assert list(result["metrics"]) == ["dino"] and list(result["encoders"]) == ["dino"]
    result = score(settings(folders, encoders, metrics=("clip_t",), dino="/nowhere"))
    assert list(result["encoders"]) == ["clip"]


def test_a_plain_folder(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    (folders[0] / "manifest.jsonl").unlink()
    result = score(settings(folders, encoders, protocol="custom"))
    assert list(result["metrics"]) == ["clip_i", "dino"] and result["count"] == 6
    assert "no manifest.jsonl; --prompt" in result["skipped"]["clip_t"].replace("there is ", "")
    result = score(settings(folders, encoders, protocol="custom", prompt="a dog"))
    assert list(result["metrics"]) == ["clip_i", "dino", "clip_t"]
    assert "no identifier" in result["skipped"]["clip_t_token"]
    result = score(settings(folders, encoders, protocol="custom", prompt="a dog", references=None))
    assert list(result["metrics"]) == ["clip_t"] and result["reference_mode"] is None
    with pytest.raises(UserError, match="nothing can be scored"):
        score(settings(folders, encoders, protocol="custom", references=None))


def test_a_manifest_from_elsewhere(folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path) -> None:
    lines = (folders[0] / "manifest.jsonl").read_text().splitlines()
    (folders[0] / "manifest.jsonl").unlink()
    # Of two lines for one image the later holds; a reader's own lines may lack what we write.
    rows = [json.loads(line) for line in [lines[0], *lines]]
    rows[0]["prompt_without_token"] = "overruled"
    rows = [{key: row[key] for key in ("file", "prompt_without_token")} for row in rows]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = score(settings(folders, encoders, protocol="custom", prompts_from=tmp_path / "other.jsonl"))
    assert list(result["metrics"]) == ["clip_i", "dino", "clip_t"] and result["count"] == 5
    assert "lacks prompt" in result["skipped"]["clip_t_token"]
    assert result["images"][0]["prompt_without_token"] == PROMPTS[0].format("")


def test_blank_images_and_copies_count_and_are_reported(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    images, references = folders
    Image.new("RGB", (40, 48)).save(images / "000-0.png")
    Image.new("RGB", (40, 48), (90, 90, 90)).save(images / "000-1.png")
    Image.open(references / "1.png").save(images / "001-0.png")
    result = score(settings(folders, encoders))
    assert (result["count"], result["blank"], result["copies"]) == (5, 2, 1)
    assert [row["blank"] for row in result["images"]] == [True, True, False, False, False]
    assert all(row["clip_i"] is not None for row in result["images"])


def test_protocol_is_dreambooth_v1_unless_toyworld_made_the_images(
    folders: tuple[Path, Path], encoders: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = folders[0] / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"toyworld"', '"some/model"', 1))
    weights = Path(encoders["dino"]) / "model.safetensors"
    with pytest.raises(UserError, match=r"cannot be loaded as vit_small_patch16_224\.dino"):
        score(settings(folders, encoders, dino=str(weights), metrics=("dino",)))
    assert not (folders[0] / "scores.json").exists()


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("", "lists no images"),
        ("{}\n", "line 1: is not a JSON object with the name of an image"),
        ('{"file": "000-0.png"}\n[1]\n', "line 2"),
        ("not json", "line 1"),
        ('{"file": "gone.png"}', "lists 1 images that are not in"),
    ],
)
def test_bad_manifests(folders: tuple[Path, Path], encoders: dict[str, str], content: str, complaint: str) -> None:
    (folders[0] / "manifest.jsonl").write_text(content)
    with pytest.raises(UserError, match=complaint):
        score(settings(folders, encoders))


def test_what_cannot_be_scored(folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path) -> None:
    for changes, complaint in (
        ({"images": tmp_path / "none"}, "no such folder"),
        ({"references": tmp_path / "none"}, "no such folder"),
        ({"references": folders[0]}, "both as images and as references"),
        ({"references": None, "metrics": ("dino",)}, "dino cannot be computed: needs real images"),
        ({"prompt": "a dog"}, "says the prompts already"),
        ({"prompts_from": tmp_path / "none.jsonl"}, "none.jsonl: no such file"),
        ({"output": folders[0] / "000-0.png"}, "is no name for the result"),
        ({"output": folders[0] / "000-0.png" / "scores.json"}, "cannot be written there"),
        ({"device": "nonsense"}, "--device nonsense is not available"),
        ({"clip": str(tmp_path)}, "no open_clip_config.json there"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            score(settings(folders, encoders, **changes))
        assert "\n" not in str(error.value)
    assert not (folders[0] / "scores.json").exists()


def test_a_damaged_image_stops_it_and_what_was_done_is_kept(
    folders: tuple[Path, Path], encoders: dict[str, str]
) -> None:
    path = folders[0] / "001-1.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"001-1\.png: cannot be decoded"):
        score(settings(folders, encoders, batch_size=1))
    assert not (folders[0] / "scores.json").exists()
    assert len(list((folders[0] / ".features").glob("*.safetensors"))) == 2


# --- more metrics ----------------------------------------------------------------------------------------------------


def test_dinov2_is_scored_when_it_is_asked_for(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    assert "dinov2" not in score(settings(folders, encoders))["metrics"]
    asked = settings(folders, encoders, metrics=("dinov2", "dino"), dinov2=encoders["dino"])
    result = score(asked)
    assert list(result["metrics"]) == ["dinov2", "dino"] and set(result["encoders"]) == {"dino", "dinov2"}
    assert result["metrics"]["dinov2"]["mean"] == result["metrics"]["dino"]["mean"]  # the same encoder by another role
    with pytest.raises(UserError, match="name one with --dinov2"):
        score(replace(asked, encoders=EncoderSources(dino=encoders["dino"])))


def test_drift_is_the_distance_from_the_base_models_images(
    folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path
) -> None:
    base = tmp_path / "base"
    base.mkdir()
    paths = sorted(folders[0].glob("0*.png"))
    for number, path in enumerate(paths):
        (base / path.name).write_bytes(path.read_bytes()) if number else paint(base / path.name, 500)
    result = score(settings(folders, encoders, metrics=("drift", "dino"), base_images=base))
    drift = [row["drift"] for row in result["images"]]
    assert drift[1:] == pytest.approx([0] * 4, abs=1e-6) and drift[0] > 1e-3
    encode = encoder("custom", "dino", encoders["dino"]).images
    one, other = encode([Image.open(paths[0]), Image.open(base / paths[0].name)])
    assert drift[0] == pytest.approx(1 - one @ other, abs=1e-6)
    assert result["metrics"]["drift"]["real_to_real"] is None and not result["metrics"]["drift"]["higher_is_better"]
    plain = score(settings(folders, encoders, metrics=("dino",)))
    assert result["metrics"]["dino"] == plain["metrics"]["dino"]  # the base model's images are no references
    (base / paths[2].name).unlink()
    with pytest.raises(UserError, match=r"lacks 1 of 5 images, such as 000-2\.png"):
        score(settings(folders, encoders, metrics=("drift",), base_images=base))
    with pytest.raises(UserError, match="--base_images"):
        score(settings(folders, encoders, metrics=("drift",)))


def extremes(images: np.ndarray, references: np.ndarray) -> np.ndarray:
    return (images @ references.T).max(axis=1).astype(np.float64)


def spread(images: np.ndarray, prompts: list[Any]) -> float:
    return float(len(set(prompts)) + np.abs(images - images.mean(axis=0)).max())


def test_a_metric_is_a_function_and_a_row(
    folders: tuple[Path, Path],
    encoders: dict[str, str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Of each kind: scored, summarised, printed, and on the page with its plot."""
    from eval import report, score_table
    from eval.results import ImageSet, ScoreKey, load, scored

    rows = {
        "nearest": Metric("Nearest", "likeness to the nearest", "dino", ("references",), "image", extremes),
        "spread": Metric("Spread", "how far they lie apart", "clip", ("prompt_groups",), "set", spread, unit="lengths"),
    }
    for name, row in rows.items():
        monkeypatch.setitem(METRICS, name, row)
    result = score(settings(folders, encoders))
    nearest = [row["nearest"] for row in result["images"]]
    found = result["metrics"]["nearest"]
    assert found["mean"] == pytest.approx((np.mean(nearest[:3]) + np.mean(nearest[3:])) / 2)
    assert (found["n"], found["real_to_real"]) == (5, None)
    value = result["metrics"]["spread"]["value"]
    assert 2 < value < 3 and "mean" not in result["metrics"]["spread"] and "spread" not in result["images"][0]

    score_table.show(result)
    said = " ".join(capsys.readouterr().out.split())
    assert f"{found['mean']:.4f}" in said and f"{value:.4f}" in said and "Spread: how far" in said

    loaded = load(ImageSet("run", folders[0]))
    assert {ScoreKey("nearest", "train"), ScoreKey("spread", None)} <= set(scored([loaded]))
    assert loaded.mean(ScoreKey("nearest", "train")) == pytest.approx(found["mean"])
    assert loaded.mean(ScoreKey("spread", None)) == value and loaded.per_prompt(ScoreKey("spread", None)) == {}
    html = report.page("title", [ImageSet("run", folders[0])])
    assert f"{found['mean']:.3f}" in html and f"{value:.3f}" in html
    assert "Spread: how far they lie apart (lengths, higher is better)" in html
    assert "Nearest, training images, prompt by prompt" in html and "Spread, prompt by prompt" not in html


# --- what a folder may hold ------------------------------------------------------------------------------------------


def test_texts_out_of_files_are_shown_and_never_obeyed(
    folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = folders[0].rename(tmp_path / "run[bold]x")
    rows = [json.loads(line) for line in (images / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row.update(prompt="[/b] $\\bad{ \x1b[31m", base_model="[/b]\x1b]0;title\x07", template="\x1b[2J{token} {class}")
    (images / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (images / "note\x1b[31m[b].txt").write_text("x")
    run(settings((images, folders[1]), encoders, protocol="custom"))
    said = capsys.readouterr().out
    assert "run[bold]x: 5 images" in said and "\x1b" not in said and "[31m[b].txt" in said


@pytest.mark.parametrize(
    "place", [lambda root: Path("/proc/nothing/scores.json"), lambda root: root / f"{'x' * 300}.json"]
)
def test_a_result_that_cannot_be_written_is_one_line(
    folders: tuple[Path, Path], encoders: dict[str, str], place: Callable[[Path], Path]
) -> None:
    with pytest.raises(UserError, match="cannot be written") as caught:
        score(settings(folders, encoders, metrics=("dino",), output=place(folders[0])))
    assert "\n" not in str(caught.value) and not list(folders[0].glob("*.part*"))


def test_vectors_that_cannot_be_kept_are_no_reason_to_stop(
    folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache").write_text("a file")
    result = score(settings(folders, encoders, metrics=("dino",), cache_dir=tmp_path / "cache"))
    assert result["count"] == 5 and "note: vectors are not kept" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["images", "references", "base_images", "prompts_from", "output", "cache_dir"])
def test_a_name_that_is_too_long_is_one_line(folders: tuple[Path, Path], encoders: dict[str, str], flag: str) -> None:
    long = Path("x" * 5000)
    changed = settings(
        folders, encoders, metrics=("dino",), **{flag: long / "scores.json" if flag == "output" else long}
    )
    try:
        score(changed)
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert flag == "cache_dir"


# --- the program -----------------------------------------------------------------------------------------------------


def program(*words: str) -> None:
    """`singlora score`, without the process."""
    run(parse(ScoreSettings, words, "singlora score", "Score images."))


def test_the_program_prints_a_table_and_the_next_command(
    folders: tuple[Path, Path],
    encoders: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    images, references = folders
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "160")
    flags = ["--clip", encoders["clip"], "--dino", encoders["dino"], "--device", "cpu", "--batch_size", "4"]
    program("--images", images.name, "--references", references.name, *flags)
    said = capsys.readouterr().out
    result = json.loads((images / "scores.json").read_text())
    for name in ("clip_i", "dino", "clip_t", "clip_t_token"):
        assert name in said and f"{result['metrics'][name]['mean']:.4f}" in said
    assert "protocol toyworld: the images were made by toyworld" in said
    assert "bicubic to 36, centre 32 x 32" in said
    assert "left out: contact_sheet.png" in said
    assert "samples: 5 images of 2 prompts" in said
    command = "singlora report --runs samples --references 'my dog' --output samples/report.html"
    assert said.strip().splitlines()[-1] == f"next: {command}"
    again = shlex.split(result["command"])
    assert again[:2] == ["singlora", "score"] and again[2:6] == ["--images", "samples", "--references", "my dog"]
    assert parse(ScoreSettings, again[2:], "singlora score", "") == parse(
        ScoreSettings, ["--images", images.name, "--references", references.name, *flags], "singlora score", ""
    )


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (["--images", "none", "--references", "none"], "none: no such folder"),
        (["--images", "none", "--batch_size", "0"], "--batch_size 0: must be at least 1"),
        (["--images", "none", "--batch_size", "99999999999999999999999"], "--batch_size"),
    ],
)
def test_what_the_program_refuses_is_one_line(words: list[str], complaint: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=complaint) as caught:
        program(*words)
    assert "\n" not in str(caught.value)


def test_a_metric_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        program("--images", "none", "--metrics", "fid")
    assert caught.value.code == 2 and "dinov2" in " ".join(capsys.readouterr().err.split())


def test_help_names_every_flag_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        program("--help")
    assert exit_.value.code == 0
    text = capsys.readouterr().out
    for flag in (
        "--images",
        "--references",
        "--protocol",
        "--metrics",
        "--batch_size",
        "--reference_mode",
        "--cache_dir",
        *(f"--{role}" for role in ROLES),
        *METRICS,
    ):
        assert flag in text
    names = "('torch', 'scipy', 'diffusers')"
    code = f"import sys, eval.score, eval.report; sys.exit(any(name in sys.modules for name in {names}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
