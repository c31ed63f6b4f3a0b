"""What a training makes of its images: how often, where cropped, what counts of them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth
from singlora_diffusion import cli, models
from singlora_diffusion.data import latents
from singlora_diffusion.data.crops import Cropping
from singlora_diffusion.data.folders import read_instance_folder
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import loop, material
from singlora_diffusion.training.events import Images, Loaded, Remark
from singlora_diffusion.training.recipe import Recipe

Trained = Callable[..., dict[str, Tensor]]


@pytest.fixture
def trained(recipe: Recipe, tmp_path: Path) -> Trained:
    """Trains the recipe with changes, each time into a new folder."""
    runs = iter(range(100))

    def train(**changes: Any) -> dict[str, Tensor]:
        out = changes.pop("output_dir", tmp_path / f"run{next(runs)}")
        return load_file(train_dreambooth.main(replaced(recipe, output_dir=out, **changes)))

    return train


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def plain(colour: int, size: tuple[int, int] = (40, 36)) -> Image.Image:
    return Image.new("RGB", size, (colour, 40, 200 - colour // 2))


# --- kohya's folders -------------------------------------------------------------------------------------------------


@pytest.fixture
def repeated(tmp_path: Path) -> Path:
    """Two images twice, one once."""
    folder = tmp_path / "kohya"
    for name, colours in {"2_sks dog": (0, 90), "1_sks dog": (180,)}.items():
        (folder / name).mkdir(parents=True)
        for number, colour in enumerate(colours):
            plain(colour).save(folder / name / f"{number}.png")
    return folder


def test_repeats_are_images_copied_that_often(repeated: Path, trained: Trained, tmp_path: Path) -> None:
    copied = tmp_path / "copied"
    copied.mkdir()
    for number, colour in enumerate((180, 0, 0, 90, 90)):
        plain(colour).save(copied / f"{number}.png")
    assert same(
        trained(instance_data_dir=repeated, instance_prompt=None, max_train_steps=5),
        trained(instance_data_dir=copied, instance_prompt="sks dog", max_train_steps=5),
    )


def test_the_names_of_folders_are_prompts_where_nothing_else_is_said(repeated: Path, recipe: Recipe) -> None:
    (repeated / "2_sks dog").rename(repeated / "2_zara cat, asleep")
    (repeated / "2_zara cat, asleep" / "1.txt").write_text("a caption")
    events = list(loop.run(replaced(recipe, instance_data_dir=repeated, instance_prompt=None, max_train_steps=1)))
    (images,) = (event.report for event in events if isinstance(event, Images))
    assert "  1_sks dog: 1 image, once each\n  2_zara cat, asleep: 2 images, 2 times each" in str(images)
    assert "1 of 3 images have captions" in "".join(event.text for event in events if isinstance(event, Remark))
    assert [event.class_noun for event in events if isinstance(event, Loaded)] == ["dog"]

    def said(**changes: Any) -> tuple[str, dict[str, str]]:
        reading = material.read(replaced(recipe, instance_data_dir=repeated, **changes))
        while True:
            try:
                next(reading)
            except StopIteration as end:
                return end.value.prompt, end.value.said

    cat = "2_zara cat, asleep"
    assert said(instance_prompt=None) == ("sks dog", {f"{cat}/0.png": "zara cat, asleep", f"{cat}/1.png": "a caption"})
    assert said(instance_prompt="a photo of sks dog") == ("a photo of sks dog", {f"{cat}/1.png": "a caption"})
    shutil.rmtree(repeated / "1_sks dog")
    assert said(instance_prompt=None)[0] == "zara cat, asleep"  # kohya's word order: the first one is the rare one
    (repeated / cat).rename(repeated / "2_style")
    with pytest.raises(UserError, match='"style" has no identifier'):
        said(instance_prompt=None)


def test_a_folder_with_images_of_its_own_is_that_folder(repeated: Path) -> None:
    plain(0).save(repeated / "a.png")
    report = read_instance_folder(repeated)
    assert [path.name for path in report.images] == ["a.png"] and report.repeats == (1,) and not report.repeated
    assert {name: why for name, why in report.skipped}["2_sks dog"] == "a sub-folder, not searched"
    (repeated / "a.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"a\.png: is empty"):  # and not, silently, what is below
        read_instance_folder(repeated)


def test_what_folders_of_kohyas_can_hold(repeated: Path) -> None:
    (repeated / "0_sks dog").mkdir()
    (repeated / "logs").mkdir()
    (repeated / "1_sks dog" / "broken.png").write_bytes(b"")
    report = read_instance_folder(repeated)
    assert report.repeats == (1, 2, 2) and [part.repeats for part in report.parts] == [1, 2]
    assert report.trouble[0].name == "1_sks dog/broken.png"
    assert {one.name for one in report.skipped} == {"0_sks dog", "logs"}
    with pytest.raises(UserError, match=r"1_sks dog.broken\.png: is empty"):
        read_instance_folder(repeated, strict=True)


def test_images_seen_more_often_are_another_training(repeated: Path, recipe: Recipe) -> None:
    first = replaced(recipe, instance_data_dir=repeated, checkpointing_steps=1, max_train_steps=1)
    train_dreambooth.main(first)
    (repeated / "2_sks dog").rename(repeated / "3_sks dog")
    with pytest.raises(UserError, match="more or less often"):
        train_dreambooth.main(replaced(first, max_train_steps=2, resume_from_checkpoint="latest"))


def test_check_reads_kohyas_folders(repeated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain(0).save(repeated / "1_sks dog" / "again.png")
    assert cli.run("check", [str(repeated), "--sheet", str(tmp_path / "sheet.png")]) == 0
    printed = capsys.readouterr().out
    assert "4 images in" in printed and "1_sks dog: 2 images, once each" in printed
    assert "one-colour 2_sks dog/0.png" in printed
    (repeated / "1_sks dog").rename(repeated / "1_style")
    assert cli.run("check", [str(repeated)]) == 2
    assert "no identifier" in capsys.readouterr().err


# --- random crops ----------------------------------------------------------------------------------------------------


def gradient(size: tuple[int, int]) -> Image.Image:
    """Another colour in every column."""
    return Image.linear_gradient("L").rotate(90).resize(size).convert("RGB")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """Three images, of which crops differ."""
    folder = tmp_path / "wide"
    folder.mkdir()
    for number, size in enumerate([(96, 32), (32, 96), (64, 32)]):
        gradient(size).save(folder / f"{number}.png")
    return folder


def test_random_crops_are_drawn_by_position(wide: Path, trained: Trained, recipe: Recipe, tmp_path: Path) -> None:
    """Resumed bit for bit, and the same in one batch of four as in two of two."""
    changes = {"instance_data_dir": wide, "random_crop": True, "random_flip": True}
    unbroken = trained(**changes, checkpointing_steps=2, output_dir=tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-2", tmp_path / "cut" / "checkpoint-2")
    assert same(unbroken, trained(**changes, resume_from_checkpoint="latest", output_dir=tmp_path / "cut"))
    assert not same(unbroken, trained(**{**changes, "random_crop": False}))

    family = models.load(str(recipe.model.pretrained_model_name_or_path))
    images = [latents.encode(family, path, Cropping(32, 32, random=True), flip=True) for path in sorted(wide.iterdir())]
    assert images[0].mean.shape[:2] == (8, 2) and images[0].crop[:, 0].tolist() == [
        [0, round(64 * k / 7)] for k in range(8)
    ]
    assert torch.equal(images[0].crop[:, 1, 1], images[0].crop[:, 0, 1].flip(0))  # mirrored, it begins at the other end
    stream = latents.Stream(images, [1, 1, 1])
    whole = latents.batch(stream, 3, range(40, 60), 0)
    parts = [latents.batch(stream, 3, range(start, start + 5), 0) for start in range(40, 60, 5)]
    assert all(torch.equal(one, other) for one, other in zip(whole, latents.joined(parts), strict=True))
    assert len({tuple(corner) for corner in whole.crop.tolist()}) > 6  # of 3 x 8


def test_of_squares_there_is_one_crop(trained: Trained, tmp_path: Path) -> None:
    squares = tmp_path / "squares"
    squares.mkdir()
    for number in range(3):
        gradient((40, 40)).rotate(90 * number).save(squares / f"{number}.png")
    changes = {"instance_data_dir": squares, "max_train_steps": 2}
    assert same(trained(**changes, random_crop=True), trained(**changes))
