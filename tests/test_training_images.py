"""What a training makes of its images: how often, where cropped, what counts of them."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train_dreambooth
from singlora_diffusion import cli, models
from singlora_diffusion.data import buckets, draws, latents
from singlora_diffusion.data.crops import Cropping
from singlora_diffusion.data.folders import read_folder, read_instance_folder
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import held_out, loop, material, preparation
from singlora_diffusion.training.events import Images, Loaded, Remark
from singlora_diffusion.training.examples import Examples, Streams
from singlora_diffusion.training.recipe import Recipe
from singlora_diffusion.training.step import Stepper

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


def returned(steps: Any) -> Any:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


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
    assert [event.class_noun for event in events if isinstance(event, Loaded)] == ["cat"]

    def said(**changes: Any) -> tuple[str, dict[str, str]]:
        found = returned(material.read(replaced(recipe, instance_data_dir=repeated, **changes)))
        return found.prompt, found.said

    cat = "2_zara cat, asleep"
    others = {f"{cat}/1.png": "a caption", "1_sks dog/0.png": "sks dog"}
    assert said(instance_prompt=None) == ("zara cat, asleep", others)  # of which there are most
    assert said(instance_prompt="a photo of sks dog") == ("a photo of sks dog", {f"{cat}/1.png": "a caption"})
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
        read_instance_folder(repeated, partial(read_folder, strict=True))


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
    (repeated / "2_sks dog").rename(repeated / "2_style")
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


def test_random_crops_are_drawn_by_position(wide: Path, recipe: Recipe) -> None:
    family = models.load(str(recipe.model.pretrained_model_name_or_path))
    images = [latents.encode(family, path, Cropping(32, 32, random=True), flip=True) for path in sorted(wide.iterdir())]
    assert images[0].mean.shape[:2] == (8, 2) and images[0].crop[:, 0].tolist() == [
        [0, round(64 * k / 7)] for k in range(8)
    ]
    assert torch.equal(images[0].crop[:, 1, 1], images[0].crop[:, 0, 1].flip(0))  # mirrored, it begins at the other end
    shown = [images[number % 3] for number in range(20)]
    whole = latents.batch(shown, 3, range(40, 60), 0)
    parts = [latents.batch(shown[at : at + 5], 3, range(40 + at, 45 + at), 0) for at in range(0, 20, 5)]
    assert all(torch.equal(one, other) for one, other in zip(whole, latents.joined(parts), strict=True))
    assert len({tuple(corner) for corner in whole.crop.tolist()}) > 6  # of 3 x 8


def test_of_squares_there_is_one_crop(trained: Trained, tmp_path: Path) -> None:
    squares = tmp_path / "squares"
    squares.mkdir()
    for number in range(3):
        gradient((40, 40)).rotate(90 * number).save(squares / f"{number}.png")
    changes = {"instance_data_dir": squares, "max_train_steps": 2}
    assert same(trained(**changes, random_crop=True), trained(**changes))


# --- buckets ---------------------------------------------------------------------------------------------------------


def test_a_bucket_is_the_nearest_that_enlarges_nothing() -> None:
    sdxl = buckets.for_model(1024, 8)
    assert sdxl == (1024, 64, 2048) and buckets.for_model(512, 16).step == 64
    assert [buckets.for_model(side, 8).step for side in (32, 64, 256, 520, 1000)] == [8, 8, 32, 40, 40]
    assert buckets.for_model(1024, 16, longest=1536).longest == 1536
    rng = np.random.default_rng(0)
    for width, height in [(6000, 4000), (64, 64), (3, 5000), *rng.integers(64, 4000, (200, 2)).tolist()]:
        tall, wide = sdxl.size_of((width, height))
        assert tall % 64 == wide % 64 == 0 and tall * wide <= 1024**2 and max(tall, wide) <= 2048
        assert sdxl.size_of((height, width)) == (wide, tall)
        assert wide <= max(width, 64) and tall <= max(height, 64)
        off = abs(math.log(wide / tall * height / width))
        for other in range(64, min(2048, width) + 1, 64):  # no better one of any width, with all the room there is
            room = min(2048, height, 1024**2 // other) // 64 * 64
            assert not room or abs(math.log(other / room * height / width)) >= off
    assert [sdxl.size_of((side, side)) for side in (5000, 1024, 700, 40)] == [
        (1024,) * 2,
        (1024,) * 2,
        (640,) * 2,
        (64,) * 2,
    ]
    assert sdxl.size_of((6000, 4000)) == (832, 1216)  # as SDXL's own table has it


def test_a_step_is_of_one_bucket_and_no_image_is_seen_less() -> None:
    repeats, own = [2, 2, 4, 2], ["a", "b", "a", "b"]
    steps, together = 2 * 5, 6
    shown = draws.bucketed(3, range(steps * together), repeats, own, together)
    for step in range(steps):
        assert len({own[image] for image in shown[step * together : (step + 1) * together]}) == 1
    counts = [shown.count(image) for image in range(4)]
    assert counts == [repeat * together for repeat in repeats]  # an epoch's steps, by the common divisor
    assert len({own[image] for image in shown[::together]}) == 2
    by_position = [draws.bucketed(3, [position], repeats, own, together)[0] for position in range(60)]
    assert by_position == shown  # so any split between processes and passes sees the same
    assert draws.bucketed(3, range(60), repeats, ["a"] * 4, 7) == draws.examples(3, range(60), repeats)


def test_squares_in_buckets_are_squares(trained: Trained, tmp_path: Path) -> None:
    squares = tmp_path / "squares"
    squares.mkdir()
    for number in range(3):
        gradient((40 + number, 40 + number)).save(squares / f"{number}.png")
    changes = {"instance_data_dir": squares, "max_train_steps": 2, "random_flip": True}
    assert same(trained(**changes, enable_bucket=True), trained(**changes))


def test_two_processes_see_what_one_does(wide: Path, recipe: Recipe) -> None:
    """Batches of 2 on two processes, or in two passes, are the batch of 4 on one."""
    family = models.load(str(recipe.model.pretrained_model_name_or_path))
    changed = replaced(recipe, instance_data_dir=wide, enable_bucket=True, random_crop=True, max_train_steps=8)

    def seen(processes: int, size: int, passes: int) -> list[Tensor]:
        asked = replaced(changed, train_batch_size=size, gradient_accumulation_steps=passes)
        streams = list(returned(preparation.encoded(asked, family, 32, returned(material.read(asked)))))
        examples = Examples(family, Streams(*streams), asked, together=processes * size * passes)
        found = []
        for step in range(1, 9):
            ranges = []
            for process in range(processes):
                accelerator = SimpleNamespace(num_processes=processes, process_index=process)
                stepper: Any = SimpleNamespace(settings=asked.optimization, accelerator=accelerator)
                ranges.append(list(Stepper._positions(stepper, step)))
            in_order = [ranges[process][number] for number in range(passes) for process in range(processes)]
            found.append(torch.cat([examples.at(positions).noisy for positions in in_order]))
        return found

    alone = seen(1, 4, 1)
    assert len({one.shape for one in alone}) > 1  # of several buckets
    for other in (seen(2, 2, 1), seen(1, 2, 2), seen(2, 1, 2)):
        assert all(torch.equal(one, two) for one, two in zip(alone, other, strict=True))


def test_held_out_images_are_asked_about_by_size(wide: Path, recipe: Recipe) -> None:
    family = models.load(str(recipe.model.pretrained_model_name_or_path))
    asked = replaced(recipe, instance_data_dir=wide, held_out_data_dir=wide, validation_steps=1, enable_bucket=True)
    found = returned(material.read(asked))
    examples = Examples(family, returned(preparation.encoded(asked, family, 32, found)), asked, together=2)
    images = returned(preparation.held_out(asked, family, 32, found))
    batches = list(held_out.batches(examples, images, 3))
    assert [len(batch.stream) for batch in batches] == [3, 3, 2] * 3 and len(
        {batch.noisy.shape for batch in batches}
    ) > 3
    assert [batch.geometry.original[0].tolist() for batch in batches[::3]] == [[32, 96], [96, 32], [32, 64]]


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_flux", "tiny_sd3"])
def test_families_are_told_the_size_of_the_bucket(
    model: str, wide: Path, recipe: Recipe, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    family = models.load(str(request.getfixturevalue(model)), device="cpu")
    told, shapes, step = set(), set(), type(family).denoise

    def spy(self: Any, noisy: Tensor, times: Tensor, conditioning: Any) -> Tensor:
        told.update(map(tuple, conditioning["sizes"].tolist()) if "sizes" in conditioning.tensors else [])
        shapes.add(tuple(side * 32 // small for side in noisy.shape[2:]))
        prediction = step(self, noisy, times, conditioning)
        assert prediction.shape == noisy.shape
        return prediction

    small = family.encode_images(torch.zeros(1, 3, 32, 32)).mean.shape[2]
    monkeypatch.setattr(type(family), "denoise", spy)
    changes = {"instance_data_dir": wide, "enable_bucket": True, "resolution": 32, "max_train_steps": 6}
    list(loop.run(replaced(recipe, **changes, portable=False), family=family))
    assert shapes == {(16, 48), (48, 16), (24, 40)}
    if model == "tiny_sdxl":  # of the file, of the crop's corner in the scaled image, of the crop
        assert told == {(32, 96, 0, 0, 16, 48), (96, 32, 0, 0, 48, 16), (32, 64, 0, 4, 24, 40)}


def test_the_sheet_shows_the_crops_of_buckets(wide: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run("check", [str(wide), "--enable_bucket"]) == 2
    assert "needs --resolution" in capsys.readouterr().err
    sizes = []
    for flags in ([], ["--enable_bucket"]):
        sheet = tmp_path / "sheet.png"
        assert cli.run("check", [str(wide), "--resolution", "32", "--sheet", str(sheet), *flags]) == 0
        pixels = np.asarray(Image.open(sheet))[:232, :240]
        rows, columns = np.nonzero((pixels == (220, 60, 50)).all(axis=2) | (pixels == (40, 190, 90)).all(axis=2))
        sizes.append((np.ptp(columns) + 1, np.ptp(rows) + 1))
    assert sizes[0][0] == pytest.approx(sizes[0][1], abs=1)
    assert sizes[1][0] / sizes[1][1] == pytest.approx(96 / 32, rel=0.1)


# --- masks -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def masked(wide: Path) -> Path:
    """All white: as if there were none."""
    for number, size in enumerate([(96, 32), (32, 96), (64, 32)]):
        ending = "-masklabel" if number == 1 else ".mask"
        Image.new("L", size, "white").save(wide / f"{number}{ending}.png")
    return wide


def test_a_white_mask_is_none(masked: Path, trained: Trained) -> None:
    changes = {"instance_data_dir": masked, "max_train_steps": 2, "random_flip": True, "random_crop": True}
    assert same(trained(**changes, masked_loss=True), trained(**changes))


def test_a_mask_goes_with_its_crop(masked: Path, recipe: Recipe, trained: Trained, tmp_path: Path) -> None:
    """The left third of the first image counts: in some crops wholly, in some not at all.

    Resumed bit for bit with all of this at once: random crops and flips, buckets, captions, class images.
    """
    half = Image.new("L", (96, 32))
    half.paste("white", (0, 0, 32, 32))
    half.save(masked / "0.mask.png")
    changes = {"instance_data_dir": masked, "random_crop": True, "random_flip": True, "masked_loss": True}
    with pytest.raises(UserError, match=r"0\.mask\.png: is black in what is seen of the image"):  # in the middle
        trained(**{**changes, "random_crop": False})
    (tmp_path / "class").mkdir()
    for number in range(2):
        gradient((32, 32)).rotate(180 * number).save(tmp_path / "class" / f"{number}.png")
    (masked / "1.txt").write_text("a photo of sks dog, upright")
    changes |= {"with_prior_preservation": True, "num_class_images": 2, "class_data_dir": tmp_path / "class"}
    changes |= {"enable_bucket": True, "checkpointing_steps": 3, "max_train_steps": 5}
    unbroken = trained(**changes, output_dir=tmp_path / "unbroken")
    shutil.copytree(tmp_path / "unbroken" / "checkpoint-3", tmp_path / "cut" / "checkpoint-3")
    assert same(unbroken, trained(**changes, resume_from_checkpoint="latest", output_dir=tmp_path / "cut"))

    family = models.load(str(recipe.model.pretrained_model_name_or_path))
    image = latents.encode(family, masked / "0.png", Cropping(32, 32, True), True, masked / "0.mask.png")
    lefts = image.crop[:, 0, 1].tolist()
    assert lefts == [0, 9, 18, 27]  # of 8, the others are black
    for left, mask in zip(lefts, image.mask, strict=True):
        assert mask[0].mean().item() == pytest.approx((32 - left) / 32, abs=1 / 32)  # pixels are not divided
        assert torch.equal(mask[1], mask[0].flip(-1)) and mask[0, 0, 0, 0] == 1
    half.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(masked / "0.mask.png")
    resumed = {"resume_from_checkpoint": "latest", "output_dir": tmp_path / "cut", "max_train_steps": 6}
    with pytest.raises(UserError, match="with other masks"):
        trained(**changes | resumed)


def test_what_a_mask_cannot_be(masked: Path, recipe: Recipe, capsys: pytest.CaptureFixture[str]) -> None:
    def complaint() -> str:
        with pytest.raises(UserError) as error:
            list(material.read(replaced(recipe, instance_data_dir=masked, masked_loss=True)))
        assert "\n" not in str(error.value)
        return str(error.value)

    (masked / "._0.mask.png").write_bytes(b"of macOS")
    assert [path.name for path in read_folder(masked).images] == ["0.png", "1.png", "2.png"]
    Image.new("L", (48, 16), "white").save(masked / "0.mask.png")
    assert "0.mask.png: is 48x16 pixels, its image 96x32; save" in complaint()
    Image.new("LA", (96, 32), (255, 0)).save(masked / "0.mask.png")  # white, and transparent
    assert "0.mask.png: is black all over" in complaint()
    (masked / "0.mask.png").rename(masked / "other.mask.png")
    assert cli.run("check", [str(masked)]) == 0
    assert "other.mask.png: is a mask without an image" in capsys.readouterr().out
    for mask in list(masked.glob("*mask*")):
        mask.unlink()
    assert "--masked_loss: there are no masks" in complaint()
    Image.new("L", (9, 9)).save(masked / "2.mask.png")
    assert cli.run("check", [str(masked)]) == 0
    assert "mask       2.mask.png: is 9x9 pixels" in capsys.readouterr().out
    said = [
        event.text for event in material.read(replaced(recipe, instance_data_dir=masked)) if isinstance(event, Remark)
    ]
    assert "1 of 3 images have masks, which only --masked_loss uses" in said
