"""Scoring folders of pictures, as a function and as a program: `pytest tests/test_score.py`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoder_folders import clip_folder, timm_folder
from PIL import Image

from eval import encoders as encoders_module
from eval.encoders import encoder
from eval.score import ScoreSettings, main, score
from singlora_diffusion.errors import UserError

PROMPTS = ("a {}dog in the snow", "a {}dog on the beach")


@pytest.fixture(scope="module")
def encoders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Flags that name a tiny CLIP and a tiny vision transformer of random weights."""
    root = tmp_path_factory.mktemp("encoders")
    return {"clip": str(clip_folder(root / "clip")), "dino": str(timm_folder(root / "dino"))}


def paint(path: Path, seed: int) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    picture = Image.fromarray(pixels).resize((40, 48), Image.Resampling.BICUBIC)
    picture.save(path)
    return picture


@pytest.fixture
def folders(tmp_path: Path) -> tuple[Path, Path]:
    """Five generated pictures of two prompts (three and two seeds) with a manifest, and three references."""
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
    defaults: dict[str, Any] = {"images": folders[0], "references": folders[1], "device": "cpu", **encoders}
    return ScoreSettings(**{**defaults, **changes})


def test_scores_are_those_of_the_definition(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    result = score(settings(folders, encoders))
    images, references = folders
    assert result["protocol"] == "toyworld" and result["reference_mode"] == "train"
    assert list(result["metrics"]) == ["clip_i", "dino", "clip_t", "clip_t_token"]
    assert result["left_out"] == {"contact_sheet.png": "not in the manifest"}

    def vectors(role: str, folder: Path, pattern: str) -> np.ndarray:
        pictures = [Image.open(path).convert("RGB") for path in sorted(folder.glob(pattern))]
        return encoder("custom", role, encoders[role]).images(pictures).astype(np.float64)

    for name, role in (("clip_i", "clip"), ("dino", "dino")):
        generated, real = vectors(role, images, "0*.png"), vectors(role, references, "*.png")
        per_picture = (generated @ real.T).mean(axis=1)
        assert np.allclose([row[name] for row in result["pictures"]], per_picture, atol=1e-6)
        found = result["metrics"][name]
        assert found["mean"] == pytest.approx((per_picture[:3].mean() + per_picture[3:].mean()) / 2, abs=1e-6)
        assert found["sd"] == pytest.approx(per_picture.std(ddof=1), abs=1e-6)
        assert found["real_to_real"] == pytest.approx((real @ real.T)[~np.eye(3, dtype=bool)].mean(), abs=1e-6)
        assert (found["n"], found["prompts"]) == (5, 2)

    clip = encoder("custom", "clip", encoders["clip"])
    assert clip.texts is not None
    for name, token in (("clip_t", ""), ("clip_t_token", "sks ")):
        texts = clip.texts([prompt.format(token) for prompt in PROMPTS])[[0, 0, 0, 1, 1]]
        expected = (vectors("clip", images, "0*.png") * texts).sum(axis=1)
        assert np.allclose([row[name] for row in result["pictures"]], expected, atol=1e-6)
        assert result["metrics"][name]["real_to_real"] is None
    assert result["metrics"]["clip_t"]["mean"] != result["metrics"]["clip_t_token"]["mean"]


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
    assert again["pictures"] == first["pictures"] and again["metrics"] == first["metrics"]
    paint(folders[0] / "001-1.png", 77)  # other pixels under the same name
    with pytest.raises(AssertionError, match="an encoder ran"):
        score(settings(folders, encoders))


def test_prompts_of_two_files_do_not_mix(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    manifest = folders[0] / "manifest.jsonl"
    manifest.write_text(manifest.read_text().replace('"prompt_index": 1', '"prompt_index": 0'))
    result = score(settings(folders, encoders, metrics=("dino",)))
    assert result["metrics"]["dino"]["prompts"] == 2


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
    # Of two lines for one picture the later holds; a reader's own lines may lack what we write.
    rows = [json.loads(line) for line in [lines[0], *lines]]
    rows[0]["prompt_without_token"] = "overruled"
    rows = [{key: row[key] for key in ("file", "prompt_without_token")} for row in rows]
    (tmp_path / "other.jsonl").write_text("\n".join(map(json.dumps, rows)))
    result = score(settings(folders, encoders, protocol="custom", prompts_from=tmp_path / "other.jsonl"))
    assert list(result["metrics"]) == ["clip_i", "dino", "clip_t"] and result["count"] == 5
    assert "lacks prompt" in result["skipped"]["clip_t_token"]
    assert result["pictures"][0]["prompt_without_token"] == PROMPTS[0].format("")


def test_blank_pictures_and_copies_count_and_are_reported(folders: tuple[Path, Path], encoders: dict[str, str]) -> None:
    images, references = folders
    Image.new("RGB", (40, 48)).save(images / "000-0.png")
    Image.new("RGB", (40, 48), (90, 90, 90)).save(images / "000-1.png")
    Image.open(references / "1.png").save(images / "001-0.png")
    result = score(settings(folders, encoders))
    assert (result["count"], result["blank"], result["copies"]) == (5, 2, 1)
    assert [row["blank"] for row in result["pictures"]] == [True, True, False, False, False]
    assert all(row["clip_i"] is not None for row in result["pictures"])


def test_protocol_is_dreambooth_v1_unless_toyworld_made_the_pictures(
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
        ('{"file": "gone.png"}', "lists 1 pictures that are not in"),
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
        ({"references": None, "metrics": ("dino",)}, "dino cannot be computed: needs real pictures"),
        ({"prompt": "a dog"}, "says the prompts already"),
        ({"prompts_from": tmp_path / "none.jsonl"}, "cannot be read"),
        ({"output": folders[0] / "000-0.png"}, "is no name for the result"),
        ({"output": folders[0] / "000-0.png" / "scores.json"}, "cannot be written there"),
        ({"device": "nonsense"}, "device nonsense"),
        ({"clip": str(tmp_path)}, "no open_clip_config.json there"),
    ):
        with pytest.raises(UserError, match=complaint) as error:
            score(settings(folders, encoders, **changes))
        assert "\n" not in str(error.value)
    assert not (folders[0] / "scores.json").exists()


def test_a_damaged_picture_stops_it_and_what_was_done_is_kept(
    folders: tuple[Path, Path], encoders: dict[str, str]
) -> None:
    path = folders[0] / "001-1.png"
    path.write_bytes(path.read_bytes()[:300])
    with pytest.raises(UserError, match=r"001-1\.png: cannot be decoded"):
        score(settings(folders, encoders, batch_size=1))
    assert not (folders[0] / "scores.json").exists()
    assert len(list((folders[0] / ".features").glob("*.safetensors"))) == 2


# --- the program -----------------------------------------------------------------------------------------------------


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": root, "HF_HUB_OFFLINE": "1", "COLUMNS": "160"}
    program = [sys.executable, "-m", "eval.score", *words]
    return subprocess.run(program, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def test_the_program_prints_a_table_and_the_next_command(
    folders: tuple[Path, Path], encoders: dict[str, str], tmp_path: Path
) -> None:
    images, references = folders
    flags = ["--clip", encoders["clip"], "--dino", encoders["dino"], "--device", "cpu", "--batch_size", "4"]
    finished = run("--images", images.name, "--references", references.name, *flags, cwd=tmp_path)
    assert finished.returncode == 0, finished.stderr
    result = json.loads((images / "scores.json").read_text())
    for name in ("clip_i", "dino", "clip_t", "clip_t_token"):
        assert name in finished.stdout and f"{result['metrics'][name]['mean']:.4f}" in finished.stdout
    assert "protocol toyworld: the pictures were made by toyworld" in finished.stdout
    assert "bicubic to 36, centre 32 x 32" in finished.stdout
    assert "left out: contact_sheet.png" in finished.stdout
    assert "samples: 5 pictures of 2 prompts" in finished.stdout
    report = "python -m eval.report --runs samples --references 'my dog' --output samples/report.html"
    assert finished.stdout.strip().splitlines()[-1] == f"next: {report}"


def test_the_program_ends_with_one_line_and_code_2(tmp_path: Path) -> None:
    finished = run("--images", "none", "--references", "none", cwd=tmp_path)
    assert finished.returncode == 2 and finished.stdout == ""
    assert finished.stderr == "error: none: no such folder; name one that holds pictures\n"
    assert run("--images", "none", "--metrics", "fid", cwd=tmp_path).returncode == 2
    assert list(tmp_path.iterdir()) == []


def test_help_names_every_flag_and_imports_no_torch(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
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
    ):
        assert flag in text
    names = "('torch', 'scipy', 'diffusers')"
    program = f"import sys, eval.score; sys.exit(any(name in sys.modules for name in {names}))"
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0
