"""--encodings_dir: encoded images and prompts out of a folder, and nothing that is learned changes."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from singlora_diffusion import files, models
from singlora_diffusion.data.encoding_cache import EncodingCache
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import command_line, loop, plan
from singlora_diffusion.training.events import Remark, Step
from singlora_diffusion.training.recipe import Recipe


@pytest.fixture
def family(tiny_model: Path) -> Any:
    return models.load(str(tiny_model))


@pytest.fixture
def captioned(recipe: Recipe, training_images: Path, tmp_path: Path) -> Recipe:
    """With flips, captions in several orders, class images, held-out images, and a folder of encodings."""
    images = shutil.copytree(training_images, tmp_path / "dog")
    (images / "0.txt").write_text("a sks dog, snow, sun")
    return replaced(
        recipe,
        instance_data_dir=images,
        encodings_dir=tmp_path / "encodings",
        random_flip=True,
        shuffle_caption=True,
        caption_dropout=0.3,
        with_prior_preservation=True,
        num_class_images=3,
        class_data_dir=training_images,
        held_out_data_dir=training_images,
        validation_steps=4,
        num_validation_images=1,
    )


def run(recipe: Recipe, family: Any, name: str, **changed: Any) -> tuple[dict[str, torch.Tensor], list[Any], list[str]]:
    """The adapter, the figures of its steps, and the remarks."""
    recipe = replaced(recipe, output_dir=recipe.output.output_dir.with_name(name), **changed)
    events = list(loop.run(recipe, family=family))
    figures = [(event.loss, event.grad_norm) for event in events if isinstance(event, Step)]
    told = [event.text for event in events if isinstance(event, Remark)]
    return load_file(recipe.output.output_dir / "adapter.safetensors"), figures, told


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_what_is_learned_is_the_same_bit_for_bit(
    captioned: Recipe, family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, figures, _ = run(captioned, family, "plain", encodings_dir=None)
    filling, filled, _ = run(captioned, family, "filling")
    kept = sorted(captioned.data.encodings_dir.iterdir())  # type: ignore[union-attr]
    # class and held-out images are alike: three mirrored pairs, three of them alone
    assert sum(path.name.startswith("latents-") for path in kept) == 6
    assert {path.suffix for path in kept} == {".safetensors"}

    small = family.encode_images(torch.zeros(1, 3, family.multiple, family.multiple))  # memory is estimated by it

    def encoded(pixels: torch.Tensor) -> Any:
        assert pixels.shape[-1] == family.multiple, "encoded once more"
        return small

    monkeypatch.setattr(family, "encode_images", encoded)
    monkeypatch.setattr(family, "encode_prompts", None)
    found, again, _ = run(captioned, family, "found", validation_steps=0)  # a preview encodes its prompt
    assert same(plain, filling) and same(plain, found)
    assert figures == filled == again
    assert sorted(captioned.data.encodings_dir.iterdir()) == kept  # type: ignore[union-attr]


def test_resuming_with_them_is_resuming_without(captioned: Recipe, family: Any) -> None:
    unbroken, *_ = run(captioned, family, "unbroken", encodings_dir=None)
    run(captioned, family, "broken", max_train_steps=2, checkpointing_steps=2, encodings_dir=None)
    resumed, *_ = run(captioned, family, "broken", resume_from_checkpoint="latest")
    assert same(unbroken, resumed)


def damaged(folder: Path) -> Iterator[Path]:
    """Each entry, damaged in its own way."""
    for number, path in enumerate(sorted(folder.iterdir())):
        content = bytearray(path.read_bytes())
        if number % 4 == 0:
            content = content[: len(content) // 2]
        elif number % 4 == 1:
            content[-1] ^= 1  # inside a tensor: the file is sound still
        elif number % 4 == 2:
            content = bytearray()
        path.write_bytes(content)
        if number % 4 == 3:
            save_file({"mean": torch.zeros(1)}, path)
        yield path


def test_damaged_entries_are_made_anew_and_named(recipe: Recipe, family: Any, tmp_path: Path) -> None:
    recipe = replaced(recipe, encodings_dir=tmp_path / "encodings", max_train_steps=1)
    first, *_ = run(recipe, family, "first")
    before = {path: path.read_bytes() for path in (tmp_path / "encodings").iterdir()}
    names = [*damaged(tmp_path / "encodings")]
    assert len(names) == 4
    second, _, told = run(recipe, family, "second")
    assert same(first, second)
    for path in names:
        assert [line for line in told if path.name in line] == [f"{path}: was damaged and has been made anew"]
        assert path.read_bytes() == before[path]
    assert not run(recipe, family, "third")[2]


def test_entries_are_known_by_what_they_are_made_of(
    recipe: Recipe, family: Any, tiny_model: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "encodings"
    recipe = replaced(recipe, encodings_dir=folder, max_train_steps=1)

    def entries(**changed: Any) -> tuple[int, int]:
        run(recipe, changed.pop("family", family), "run", overwrite=True, **changed)
        names = [path.name.partition("-")[0] for path in folder.iterdir()]
        return names.count("latents"), names.count("prompt")

    assert entries() == (3, 1)
    assert entries(instance_prompt="a photo of sks cat") == (3, 2)
    assert entries(resolution=16) == (6, 2)
    assert entries(random_flip=True) == (9, 2)
    assert entries(random_flip=True, train_text_encoder=True, instance_prompt="a toy of sks dog") == (9, 2)
    copied = shutil.copytree(tiny_model, tmp_path / "copied")
    assert entries(family=models.load(str(copied))) == (9, 2)  # another place is no other model
    vae = next((copied / "vae").glob("*.safetensors"))
    weights = load_file(vae)
    weights["encoder.conv_in.bias"] += 0.5
    save_file(weights, vae)
    assert entries(family=models.load(str(copied))) == (12, 2)
    assert entries(family=models.load(str(tiny_model), "bfloat16"), mixed_precision="bf16") == (12, 3)


def test_entries_appear_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EncodingCache(tmp_path / "new" / "folder")
    made = {"b": torch.arange(3.0), "a": torch.ones(2, dtype=torch.bfloat16)}
    assert cache.get("x", {"k": 1}, lambda: made) is made
    (path,) = (tmp_path / "new" / "folder").iterdir()
    found = cache.get("x", {"k": 1}, dict)
    assert same(found, made) and not cache.remarks()
    with safe_open(path, framework="pt") as opened:
        assert set(opened.metadata()) == {"sha256"}

    def full(*about: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(UserError, match="cannot be written: No space left on device"):
        cache.get("x", {"k": 2}, lambda: made)
    assert [*path.parent.iterdir()] == [path]
    assert not EncodingCache(None).get("x", {}, dict)


def test_planning_writes_none(recipe: Recipe, tmp_path: Path) -> None:
    planned = plan.make(replaced(recipe, encodings_dir=tmp_path / "encodings"))
    assert planned.recipe["encodings_dir"] == str(tmp_path / "encodings")
    assert not (tmp_path / "encodings").exists()


def test_a_folder_that_cannot_be(recipe: Recipe, tmp_path: Path) -> None:
    files.write_text(tmp_path / "file", "")
    with pytest.raises(UserError, match=r"--encodings_dir .*file is a file"):
        next(iter(loop.run(replaced(recipe, encodings_dir=tmp_path / "file"))))


def test_the_words_of_other_programs(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--instance_data_dir", "dog", "--instance_prompt", "sks", "--cache_latents", "--cache_latents_to_disk"]
    words += ["--cache_text_encoder_outputs_to_disk"]
    asked = command_line.parse(command_line.Training, words, "train", "")
    assert asked.recipe.data.encodings_dir is None
    said = capsys.readouterr().err
    for flag in ("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"):
        assert f"--{flag}: --encodings_dir DIR keeps what is encoded from run to run" in said
