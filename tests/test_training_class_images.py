"""Class images: what is there is used and never touched, what is missing is generated, and nothing is mixed up."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

import train_dreambooth
from singlora_diffusion import files
from singlora_diffusion.data import png
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import class_images, loop
from singlora_diffusion.training.events import Encoded, Images
from singlora_diffusion.training.recipe import Recipe


@pytest.fixture
def prior(recipe: Recipe, tmp_path: Path) -> Recipe:
    """One step with three class images in `tmp_path / "class"`, a folder with one of the user's own."""
    folder = tmp_path / "class"
    folder.mkdir()
    Image.new("RGB", (50, 50), (1, 2, 3)).save(folder / "class-0-00001.png")
    return replaced(recipe, with_prior_preservation=True, class_data_dir=folder, num_class_images=3, max_train_steps=1)


def names(recipe: Recipe) -> list[str]:
    return [path.name for path in class_images.images(recipe).images[: recipe.prior.num_class_images]]


def test_missing_images_get_free_names(prior: Recipe, tmp_path: Path) -> None:
    own = files.sha256(tmp_path / "class" / "class-0-00001.png")
    train_dreambooth.main(prior)
    assert names(prior) == ["class-0-00000.png", "class-0-00001.png", "class-0-00002.png"]
    assert files.sha256(tmp_path / "class" / "class-0-00001.png") == own
    made = tmp_path / "class" / "class-0-00000.png"
    assert png.texts(made)["prompt"] == "a photo of dog"


def test_a_truncated_image_is_named_and_replaced_under_another_name(prior: Recipe, tmp_path: Path) -> None:
    torn = tmp_path / "class" / "class-0-00000.png"
    torn.write_bytes((tmp_path / "class" / "class-0-00001.png").read_bytes()[:60])
    events = list(loop.run(prior))
    trouble = [event.report.trouble for event in events if isinstance(event, Images)]
    assert [one.name for remarks in trouble for one in remarks] == ["class-0-00000.png"]
    assert names(prior) == ["class-0-00001.png", "class-0-00002.png", "class-0-00003.png"]
    assert Encoded("class images", 3) in events and torn.stat().st_size == 60
    with pytest.raises(UserError, match="class-0-00000"):
        list(loop.run(replaced(prior, overwrite=True, strict=True)))


def test_where_no_image_can_be_used_all_are_generated(prior: Recipe, tmp_path: Path) -> None:
    (tmp_path / "class" / "class-0-00001.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    train_dreambooth.main(prior)
    assert names(prior) == ["class-0-00000.png", "class-0-00002.png", "class-0-00003.png"]


def test_contact_sheets_are_no_images(prior: Recipe, tmp_path: Path) -> None:
    png.write(Image.new("RGB", (60, 60)), tmp_path / "class" / "contact_sheet.png")
    train_dreambooth.main(prior)
    assert "contact_sheet.png" not in names(prior) and len(names(prior)) == 3


def test_images_of_another_prompt_are_refused(prior: Recipe, tmp_path: Path) -> None:
    train_dreambooth.main(prior)
    other = replaced(prior, class_prompt="a photo of a cat", output_dir=tmp_path / "cat")
    with pytest.raises(UserError, match="was generated for 'a photo of dog', not 'a photo of a cat'") as refused:
        train_dreambooth.main(other)
    assert "--class_data_dir" in str(refused.value) and "--overwrite" not in str(refused.value)


def test_beginning_anew_generates_anew_but_only_in_the_runs_own_folder(prior: Recipe, tmp_path: Path) -> None:
    own = replaced(prior, class_data_dir=None, num_class_images=1)
    train_dreambooth.main(own)
    (made,) = (tmp_path / "run" / "class_images").iterdir()
    with pytest.raises(UserError, match="or begin anew with --overwrite"):
        class_images.check_origin([made], "a photo of a cat", "", anew=True)
    train_dreambooth.main(replaced(own, class_prompt="a photo of a cat", overwrite=True))
    made = tmp_path / "run" / "class_images" / "class-0-00000.png"
    assert png.texts(made)["prompt"] == "a photo of a cat"
    assert png.texts(tmp_path / "run" / ".old-1" / "class_images" / "class-0-00000.png")["prompt"] == "a photo of dog"


def test_changed_class_images_are_not_gone_on_with(prior: Recipe, tmp_path: Path) -> None:
    prior = replaced(prior, max_train_steps=2, checkpointing_steps=1)
    train_dreambooth.main(prior)
    Image.new("RGB", (50, 50), (9, 9, 9)).save(tmp_path / "class" / "class-0-00001.png")
    with pytest.raises(UserError, match=r"other class images .changed: class-0-00001"):
        train_dreambooth.main(replaced(prior, resume_from_checkpoint="latest"))


def test_no_two_images_share_a_seed() -> None:
    seeds = {class_images.seed_of(seed, number) for seed in (0, 1, 2**62) for number in range(100)}
    assert len(seeds) == 300 and class_images.seed_of(0, 7) == 7 and max(seeds) < 1 << 63
