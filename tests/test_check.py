"""`singlora check` and captions: `pytest tests/test_check.py`."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from safetensors.torch import load_file

import train_dreambooth
from singlora_diffusion import cli
from singlora_diffusion.data import captions, draws
from singlora_diffusion.data.checking import check_folder, difference_hash, sharpness
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import loop
from singlora_diffusion.training.events import Event, Remark, Step
from singlora_diffusion.training.examples import Streams
from singlora_diffusion.training.recipe import Recipe


def scene(seed: int, size: tuple[int, int] = (96, 96)) -> Image.Image:
    """Coarse blobs with fine grain: an image that a hash tells from others, and that is sharp."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    grain = rng.integers(-25, 26, (size[1], size[0], 3))
    return Image.fromarray((np.asarray(coarse).astype(int) + grain).clip(0, 255).astype(np.uint8))


def kinds(folder: Path, **options: object) -> dict[str, set[str]]:
    found = check_folder(folder, **options)  # type: ignore[arg-type]
    table: dict[str, set[str]] = {}
    for finding in found.findings:
        assert finding.what and finding.fix
        table.setdefault(finding.name, set()).add(finding.kind)
    return table


def test_every_oddity_is_found_at_its_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "odd"
    (folder / "more").mkdir(parents=True)
    for number in range(4):
        scene(number).save(folder / f"{number}.png")
    scene(0).save(folder / "a_same.png")
    scene(1).resize((80, 80)).save(folder / "b_near.jpg", quality=80)
    scene(5).save(folder / "c_named.jpg", format="PNG")
    scene(6).filter(ImageFilter.GaussianBlur(4)).save(folder / "d_blurred.png")
    scene(7, (12, 12)).save(folder / "e_tiny.png")
    scene(8, (400, 96)).save(folder / "f_long.png")
    Image.new("RGB", (96, 96), "red").save(folder / "g_red.png")
    (folder / "h_broken.png").write_bytes((folder / "1.png").read_bytes()[:500])
    (folder / "0.txt").write_text("a photo of sks dog")
    (folder / "lonely.txt").write_text("a photo of nothing")
    before = {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}

    table = kinds(folder)
    assert table["h_broken.png"] == {"unreadable"} and table["more"] == {"skipped"}
    assert "similar" in table["b_near.jpg"]
    assert "suffix" in table["c_named.jpg"] and "blurred" in table["d_blurred.png"]
    assert "tiny" in table["e_tiny.png"] and "long" in table["f_long.png"] and "one-colour" in table["g_red.png"]
    assert "duplicate" in table["a_same.png"] | table.get("0.png", set())
    assert table["lonely.txt"] == {"no-image"} and table["2.png"] == {"no-caption"} and "0.png" not in table
    assert "tiny" in kinds(folder, resolution=128)["2.png"]

    sheet = tmp_path / "sheet.png"
    for _ in range(2):  # a sheet of our own is replaced
        assert cli.run("check", [str(folder), "--sheet", str(sheet)]) == 0
    assert "h_broken.png" in capsys.readouterr().out
    assert (40, 190, 90) in {colour for _, colour in Image.open(sheet).getcolors(1 << 24)}
    assert before == {p: hashlib.sha256(p.read_bytes()).digest() for p in folder.rglob("*") if p.is_file()}
    assert cli.run("check", [str(folder), "--sheet", str(folder / "1.png")]) == 2  # never one of the user's


def test_what_makes_training_impossible_ends_with_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    scene(0).save(tmp_path / "deep" / "a.png")
    assert cli.run("check", [str(tmp_path)]) == 2
    assert "one level down" in capsys.readouterr().err
    assert cli.run("check", [str(tmp_path / "deep"), "--instance_prompt", "a dog"]) == 2
    assert cli.run("check", [str(tmp_path / "deep"), "--instance_prompt", "a sks dog"]) == 0
    assert cli.run("check", [str(tmp_path / "nowhere")]) == 2


def test_hash_and_sharpness_have_closed_forms() -> None:
    ramp = Image.fromarray(np.tile(np.arange(0, 170, dtype=np.uint8), (160, 1)))
    assert difference_hash(ramp.convert("RGB")).all() and not difference_hash(ramp.convert("RGB").rotate(180)).any()
    board = (np.indices((8, 8)).sum(0) % 2 * 255).astype(np.uint8)  # each Laplacian is +-4 * 255, half of each
    assert sharpness(Image.fromarray(board).convert("RGB")) == pytest.approx((4 * 255) ** 2)


def test_captions_belong_to_images_by_name(tmp_path: Path) -> None:
    (tmp_path / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "from the  table"}\n\n{"file_name": "b.png", "text": "also"}\n'
        '{"file_name": "gone.png", "text": "in vain"}\n'
    )
    (tmp_path / "b.txt").write_text("\ufefffrom the\nfile ", encoding="utf-8")
    found = captions.read(tmp_path, ["a.png", "b.png", "c.png"])
    assert found.texts == {"a.png": "from the table", "b.png": "from the file"}
    assert found.orphans == ("gone.png",)
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png"}\n')
    with pytest.raises(UserError, match="line 1"):
        captions.read(tmp_path, ["a.png"])


def test_a_note_is_no_caption(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("bought in 2019")
    assert captions.read(tmp_path, ["a.png"]) == ({}, {}, ())


# --- captions in training --------------------------------------------------------------------------------------------


def test_a_caption_follows_its_image_wherever_it_stands() -> None:
    names = ["a.png", "b.png", "c.png"]
    texts = captions.texts(names, {"a.png": "first", "c.png": "third"}, "otherwise", seed=3)
    positions = range(50)
    images = draws.examples(3, positions, [1] * 3)
    said = [texts.table[place] for place in texts.drawn(3, positions, images, 0.0)]
    assert said == [["first", "otherwise", "third"][image] for image in images]


def test_tags_are_shuffled_but_for_the_kept_and_dropped_at_their_rate() -> None:
    texts = captions.texts(
        ["a"], {"a": "sks dog, grass, sun, sky"}, "", seed=0, shuffle=True, keep_tokens=1, dropout=0.3
    )
    drawn = texts.drawn(0, range(2000), [0] * 2000, 0.3)
    assert drawn[700:900] == texts.drawn(0, range(700, 900), [0] * 200, 0.3)  # by position alone
    forms = [texts.table[place] for place in drawn]
    assert abs(forms.count("") - 600) < 5 * (2000 * 0.3 * 0.7) ** 0.5  # five standard deviations
    assert {tuple(sorted(form.split(", "))) for form in forms if form} == {("grass", "sks dog", "sky", "sun")}
    assert all(form.startswith("sks dog, ") for form in forms if form) and len(set(forms)) > 3


def test_captions_of_class_images_and_held_out_images_are_their_prompts(recipe: Recipe, tmp_path: Path) -> None:
    folders = {}
    for kind in ("class", "held"):
        folders[kind] = tmp_path / kind
        shutil.copytree(recipe.data.instance_data_dir, folders[kind])
    recipe = replaced(
        recipe,
        with_prior_preservation=True,
        class_data_dir=folders["class"],
        num_class_images=3,
        held_out_data_dir=folders["held"],
        validation_steps=1,
        num_validation_images=1,
        max_train_steps=2,
        checkpointing_steps=1,
    )
    (folders["class"] / "1.txt").write_text("a dog in the grass")
    (folders["held"] / "metadata.jsonl").write_text('{"file_name": "2.png", "text": "a sks dog at night"}')

    def ran(name: str, **change: object) -> list[Event]:
        return list(loop.run(replaced(recipe, output_dir=tmp_path / name, **change)))

    said, silent = ran("said"), ran("silent", captions="none")
    remarks = [event.text for event in said if isinstance(event, Remark)]
    assert [line.split(" have ")[0] for line in remarks] == ["1 of 3 held-out images", "1 of 3 class images"]
    steps = [[event for event in run if isinstance(event, Step)] for run in (said, silent)]
    assert steps[0][0].validation_loss != steps[1][0].validation_loss
    weights = [load_file(tmp_path / name / "adapter.safetensors") for name in ("said", "silent")]
    assert any(not torch.equal(tensor, weights[1][key]) for key, tensor in weights[0].items())

    cut = tmp_path / "cut"
    shutil.copytree(tmp_path / "said" / "checkpoint-1", cut / "checkpoint-1")
    resumed = [event for event in ran("cut", resume_from_checkpoint="latest") if isinstance(event, Step)]
    assert [(one.loss, one.validation_loss) for one in resumed] == [(steps[0][1].loss, steps[0][1].validation_loss)]
    (folders["class"] / "1.txt").write_text("something else")
    with pytest.raises(UserError, match="other captions of class images"):
        ran("cut", resume_from_checkpoint="latest", max_train_steps=3)


def test_what_an_example_says_follows_its_image_in_every_stream() -> None:
    own = captions.texts(["a", "b"], {"a": "first"}, "sks dog", seed=0)
    classes = captions.texts(["c", "d", "e"], {"d": "a dog, sitting"}, "dog", seed=0)
    unseen = captions.texts(["f"], {"f": "not seen"}, "sks dog", seed=0)
    streams = Streams([], ["sks dog", "dog"], (own, classes), unseen)
    assert streams.texts == ["sks dog", "dog", "first", "sks dog", "dog", "a dog, sitting", "not seen"]
    assert [streams.first_of(one) for one in (own, classes, unseen)] == [2, 4, 6]


def test_training_with_captions_resumes_bit_for_bit(recipe: Recipe, tmp_path: Path) -> None:
    folder = tmp_path / "images"
    shutil.copytree(recipe.data.instance_data_dir, folder)
    for number in range(2):
        (folder / f"{number}.txt").write_text(f"a photo of sks dog, grass, {number}")
    plain = load_file(train_dreambooth.main(recipe))
    recipe = replaced(
        recipe,
        instance_data_dir=folder,
        shuffle_caption=True,
        keep_tokens=1,
        caption_dropout=0.2,
        checkpointing_steps=2,
    )
    recipe = replaced(recipe, output_dir=tmp_path / "captioned")
    unbroken = load_file(train_dreambooth.main(recipe))
    assert any(not torch.equal(unbroken[key], plain[key]) for key in plain)
    cut = replaced(recipe, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    shutil.copytree(recipe.output.output_dir / "checkpoint-2", cut.output.output_dir / "checkpoint-2")
    resumed = load_file(train_dreambooth.main(cut))
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)
    (folder / "1.txt").write_text("something else")
    with pytest.raises(UserError, match="other captions"):
        train_dreambooth.main(replaced(cut, max_train_steps=5))
