"""The toyworld renderer, its captions and its split."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from singlora_diffusion.errors import UserError
from singlora_diffusion.toyworld import world
from singlora_diffusion.toyworld.identities import CONTRAST, contrast


def test_the_same_seeds_give_the_same_bytes_in_any_company() -> None:
    one, other = world.batch([3, 14, 15]), world.batch([15, 3])
    assert one["images"].dtype == np.uint8 and one["images"].shape == (3, 64, 64, 3)
    np.testing.assert_array_equal(one["images"][[2, 0]], other["images"])
    assert [one["captions"][2], one["captions"][0]] == other["captions"]
    assert len({picture.tobytes() for picture in one["images"]}) == 3


@pytest.mark.parametrize("cls", world.CLASSES)
def test_the_mask_separates_object_and_place(cls: str) -> None:
    who, where = world.identity(7, cls), world.scene(8, "snow")
    snow, mask = world.render(who, where)
    jungle, same = world.render(who, replace(where, background="jungle"))
    np.testing.assert_array_equal(mask, same)
    apart = np.abs(snow.astype(int) - jungle.astype(int)).max(axis=2)
    assert (apart[~mask] > 30).mean() > 0.95
    assert (apart[mask] <= 2).mean() > 0.8  # the rest is the edge, where both mix
    assert 0.15 < mask.mean() < 0.6
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    assert max(rows[-1] - rows[0], columns[-1] - columns[0]) + 1 >= 0.6 * 64


def test_objects_stay_inside_the_picture() -> None:
    cut = 0
    for seed in range(120):
        _, mask = world.render(world.identity(seed), world.scene(seed))
        border = np.concatenate([mask[0], mask[-1], mask[:, 0], mask[:, -1]])
        cut += bool(border.any())
    assert cut <= 3


def test_size_scales_the_picture() -> None:
    who, where = world.identity(1), world.scene(2, "mountain")
    small, _ = world.render(who, where)
    large, mask = world.render(who, where, size=128)
    assert large.shape == (128, 128, 3) and mask.shape == (128, 128)
    shrunk = np.asarray(Image.fromarray(large).reduce(2), dtype=float)
    assert np.abs(shrunk - small).mean() < 6


def test_every_name_occurs_and_colours_stand_apart() -> None:
    drawn = [world.identity(seed) for seed in range(800)]
    assert {one.cls for one in drawn} == set(world.CLASSES)
    assert {one.colour for one in drawn} == set(world.COLOURS)
    assert {one.pattern for one in drawn} == set(world.PATTERNS)
    assert {world.scene(seed).background for seed in range(300)} == set(world.BACKGROUNDS)
    assert all(contrast(one.colour, one.detail_colour) >= CONTRAST for one in drawn)
    assert all(contrast(one.colour, one.pattern_colour) >= CONTRAST for one in drawn)


def test_a_fixed_class_or_place_leaves_the_other_draws() -> None:
    assert world.identity(5, "teapot") == replace(world.identity(5), cls="teapot")
    assert world.scene(5, "water") == replace(world.scene(5), background="water")


def test_labels_index_the_names() -> None:
    who, where = world.identity(4), world.scene(4)
    read = world.labels(who, where)
    assert world.CLASSES[read["class"]] == who.cls
    assert world.BACKGROUNDS[read["background"]] == where.background
    assert world.COLOURS[read["colour"]] == who.colour
    assert world.PATTERNS[read["pattern"]] == who.pattern
    found = world.batch([4])["labels"]
    assert {name: int(values[0]) for name, values in found.items()} == read


def test_captions_keep_to_what_they_may_say() -> None:
    words = set(world.vocabulary())
    assert "sks" in words and len(words) == len(world.vocabulary())
    rng = np.random.default_rng(0)
    said, coloured, placed, opened = set(), 0, 0, 0
    for seed in range(1000):
        who, where = world.pretraining_identity(seed), world.scene(seed)
        text = world.caption(who, where, rng)
        place = next((phrase for phrase in world.PLACES[where.background] if text.endswith(phrase)), "")
        thing = text.removesuffix(place)
        colours = set(thing.split()) & set(world.PALETTE)
        assert colours <= {who.colour} and who.cls in thing.split()
        assert " a orange" not in f" {text}"
        said |= set(text.split())
        coloured, placed, opened = coloured + bool(colours), placed + bool(place), opened + ("photo" in text)
    assert said <= words - {"sks"}
    assert 760 < coloured < 840 and 810 < placed < 890 and 440 < opened < 560


def test_places_are_phrased_for_every_background() -> None:
    assert set(world.PLACES) == set(world.BACKGROUNDS)
    phrases = [phrase for phrases in world.PLACES.values() for phrase in phrases]
    assert len(phrases) == len(set(phrases))


def test_compose_chooses_the_article() -> None:
    assert world.compose("cat", colour="orange", place="in the snow") == "a photo of an orange cat in the snow"
    assert world.compose("dog", before="striped", photo=False) == "a striped dog"


def test_the_split() -> None:
    assert len(world.TUNING) == 6 and len(world.TEST) == 24
    subjects = [world.subject(name) for name in (*world.TUNING, *world.TEST)]
    assert {one.set for one in subjects[:6]} == {"tuning"} and {one.set for one in subjects[6:]} == {"test"}
    assert {one.class_noun for one in subjects[6:]} == set(world.CLASSES)
    keys = {one.identity.key for one in subjects}
    assert len(keys) == 30
    for one in subjects:
        who = one.identity
        assert who.pattern != "plain" and who.cls == one.class_noun
        assert contrast(who.colour, who.pattern_colour) >= CONTRAST
        assert contrast(who.colour, who.detail_colour) >= CONTRAST


def test_held_out_identities_are_never_drawn_for_pretraining() -> None:
    keys = {one.identity.key for one in world.SUBJECTS.values()}
    collisions = [seed for seed in range(20_000) if world.identity(seed).key in keys]
    assert collisions, "no seed collides, so the rejection is not exercised"
    for seed in collisions:
        again = world.pretraining_identity(seed)
        assert again.key not in keys and again == world.pretraining_identity(seed)
    for seed in (-1, world.PRETRAINING_SEEDS):
        with pytest.raises(ValueError, match="pretraining seeds"):
            world.pretraining_identity(seed)


def test_references_share_the_subject_and_vary_the_scene() -> None:
    one = world.subject("dog-1")
    five = world.references(one)
    places = [where.background for _, _, where in five]
    assert len(set(places)) == 5
    unused = world.unused_backgrounds(one)
    assert len(unused) >= 6 and not set(unused) & set(places)
    for picture, mask, where in five:
        again, same = world.render(one.identity, where)
        np.testing.assert_array_equal(picture, again)
        np.testing.assert_array_equal(mask, same)
    np.testing.assert_array_equal(world.references(one, 1, start=3)[0][0], five[3][0])


@pytest.mark.parametrize("name", [*world.TUNING, *world.TEST])
def test_training_references_leave_places_unused(name: str) -> None:
    one = world.subject(name)
    used = {where.background for _, _, where in world.references(one, 7)}
    assert len(world.unused_backgrounds(one)) >= 6 and not used & set(world.unused_backgrounds(one))


def test_held_out_references_go_everywhere_or_where_told() -> None:
    one = world.subject("teapot-3")
    free = world.references(one, 12, start=world.HELD_OUT)
    assert {where.background for _, _, where in free} == set(world.BACKGROUNDS)
    told = world.references(one, 3, start=world.HELD_OUT, backgrounds=["snow", "water"])
    assert [where.background for _, _, where in told] == ["snow", "water", "snow"]
    with pytest.raises(UserError, match="no background 'moon'"):
        world.references(one, 1, backgrounds=["moon"])


def test_write_subject(tmp_path) -> None:
    folder = tmp_path / "new" / "cat"
    paths = world.write_subject("cat-1", folder, n=3, masks=True)
    assert [path.name for path in paths] == ["00.png", "01.png", "02.png"]
    for k, (picture, mask, _) in enumerate(world.references(world.subject("cat-1"), 3)):
        np.testing.assert_array_equal(np.asarray(Image.open(paths[k])), picture)
        np.testing.assert_array_equal(np.asarray(Image.open(folder / "masks" / paths[k].name)) == 255, mask)
    with pytest.raises(UserError, match="already holds files"):
        world.write_subject("cat-2", folder)
    with pytest.raises(UserError, match="is a file"):
        world.write_subject("cat-2", paths[0])
    with pytest.raises(UserError, match="at least 1"):
        world.write_subject("cat-2", tmp_path / "none", n=0)
    with pytest.raises(UserError, match=r"no subject 'unicorn'.*dog-1"):
        world.write_subject("unicorn", tmp_path / "other")
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("below", ["x" * 300, "file/x", "\0"])
def test_subjects_cannot_be_written_everywhere(tmp_path, below) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError) as error:
        world.write_subject("cat-1", tmp_path / below)
    assert "\n" not in str(error.value) and [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_full_disk_leaves_no_half_subject(tmp_path, monkeypatch) -> None:
    from singlora_diffusion import files

    written = []

    def full(path, content) -> None:
        if len(written) == 3:
            raise UserError(f"{path}: cannot be written: No space left on device")
        written.append(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)

    monkeypatch.setattr("singlora_diffusion.data.png.write_bytes", full)
    with pytest.raises(UserError, match="No space left"):
        world.write_subject("cat-1", tmp_path / "new", masks=True)
    assert not [path for path in (tmp_path / "new").rglob("*") if path.is_file()]
    monkeypatch.setattr("singlora_diffusion.data.png.write_bytes", files.write_bytes)
    assert len(world.write_subject("cat-1", tmp_path / "new")) == 5  # the folder counts as empty


@pytest.mark.parametrize("count", [0, -3, 1001, 10**30])
def test_the_number_of_images_of_a_subject_has_a_range(tmp_path, count) -> None:
    from singlora_diffusion.toyworld import command

    assert command.MOST == world.HELD_OUT
    with pytest.raises(UserError, match="--images"):
        command.write(command.SubjectSettings("subject", "cat-1", tmp_path / "new", images=count))
    assert not (tmp_path / "new").exists()
