"""What stands behind the pages, without a browser and without Gradio."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import shlex
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file

from singlora_diffusion import files, settings
from singlora_diffusion.adapters import budget
from singlora_diffusion.app import asking, drawing, fields, making, presets, saying, subjects
from singlora_diffusion.app.places import Places
from singlora_diffusion.data import captions, png
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling import gallery
from singlora_diffusion.sampling.settings import GenerateSettings
from singlora_diffusion.training import command_line, run_folder
from singlora_diffusion.training.recipe import Recipe

FORM = {one.name: one.default for one in fields.of(Recipe)}
ADVANCED = [one.name for one in fields.of(Recipe) if one.name not in asking.OWN]
DEFAULTS = [one.default for one in fields.of(Recipe) if one.name not in asking.OWN]


@pytest.fixture
def places(tmp_path: Path) -> Places:
    root, other = tmp_path / "runs", tmp_path / "photos"
    root.mkdir()
    other.mkdir()
    return Places(root, (other,))


def noise(path: Path, seed: int = 0, size: tuple[int, int] = (80, 60)) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    levels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8)
    Image.fromarray(levels).save(path)
    return path


def test_a_form_has_every_flag_with_its_help_and_choices() -> None:
    own = {"instance_data_dir"}
    form = {one.name: one for one in fields.of(Recipe)}
    assert set(form) == set(settings.spellings(Recipe).values()) - own
    assert all(one.help for one in form.values())
    assert form["lr_scheduler"].choices[:2] == ("constant", "constant_with_warmup")
    assert form["mixed_precision"].choices == ("no", "fp16", "bf16", "")
    assert form["targets"].several and not form["rank"].several and form["random_flip"].default is False


def test_a_form_and_the_command_line_mean_the_same() -> None:
    """Whatever stands in the form, the command line made of it gives the same recipe."""
    held = {one.name: one.default for one in fields.of(Recipe)}
    held |= {"learning_rate": " 3e-4 ", "targets": "to_q attn2.to_k", "random_flip": True, "rank": "8"}
    held |= {"mixed_precision": "no", "validation_prompt": "it's a dog", "portable": False, "output_dir": "a b"}
    held |= {"instance_prompt": "a photo of sks dog"}
    recipe = fields.read(Recipe, held, {"instance_data_dir": Path("x")})
    assert recipe.optimization.learning_rate == 3e-4 and recipe.adapter.targets == ("to_q", "attn2.to_k")
    words = shlex.split(settings.command_line("train", recipe))[2:]
    assert command_line.parse(command_line.Training, words, "", "").recipe == recipe
    again = fields.held(Recipe, json.loads(json.dumps(settings.as_json(recipe))))
    assert again == {**held, "learning_rate": "0.0003"}


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [("rank", "many", "--rank many: is not valid"), ("targets", "'to_q", "--targets: a quotation mark")],
)
def test_a_field_that_cannot_be_read_is_named(name: str, text: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        fields.read(Recipe, {name: text}, {"instance_data_dir": Path("x")})


def test_the_training_page_asks_for_a_recipe(places: Places) -> None:
    folder = noise(places.subjects / "rex" / "1.png").parent
    main = ["", "toyworld", "lora", 8, 1_000_000, ""]
    recipe = asking.training(places, ADVANCED, [str(folder), "sks", "dog", *main, *DEFAULTS])
    assert settings.changed(recipe) == {
        "instance_data_dir": folder,
        "instance_prompt": "a photo of sks dog",
        "output_dir": places.root / "rex",
        "method": "lora",
        "rank": 8,
        "max_train_steps": 1_000_000,
    }
    unusual = asking.training(places, ADVANCED, [str(folder), "qqq", "dog", *main, *DEFAULTS])
    assert unusual.data.identifier == "qqq"


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (0, "/etc", "lies outside of the folders"),
        (0, "", "name one"),
        (1, " ", "write the rare word"),
        (3, "../../x", "take a name of letters"),
        (3, "images", "take another name"),
        (4, "/etc", "lies outside of the folders"),
        (7, 0, "--max_train_steps 0: must be at least 1"),
    ],
)
def test_what_the_training_page_refuses(places: Places, place: int, value: object, said: str) -> None:
    folder = noise(places.subjects / "rex" / "1.png").parent
    given = [str(folder), "sks", "dog", "", "toyworld", "singlora", 8, 120, "", *DEFAULTS]
    given[place] = value  # type: ignore[call-overload]
    with pytest.raises(UserError, match=said):
        asking.training(places, ADVANCED, given)


@pytest.mark.parametrize("name", ["held_out_data_dir", "pretrained_vae_model_name_or_path"])
def test_paths_among_the_advanced_settings_stay_inside(places: Places, name: str) -> None:
    folder = noise(places.subjects / "rex" / "1.png").parent
    held = dict(zip(ADVANCED, DEFAULTS, strict=True)) | {name: "/etc"}
    given = [str(folder), "sks", "dog", "", "toyworld", "singlora", 8, 120, "", *held.values()]
    with pytest.raises(UserError, match=f"--{name} /etc: lies outside"):
        asking.training(places, list(held), given)


def test_folders_of_images_are_known_by_what_they_hold(places: Places) -> None:
    other = places.others[0]
    noise(other / "a" / "1.png").rename(other / "a" / "photo.JFIF")
    noise(other / "kohya" / "10_sks dog" / "1.png")
    (other / "text").mkdir()
    (other / "text" / "1.png").write_text("no image")
    mask(other / "masks" / "dog.mask.png", (8, 8), (0, 0, 8, 8))
    assert places.image_folders() == [other / "a", other / "kohya"]


def test_runs_are_listed_the_youngest_first_wherever_they_lie(places: Places) -> None:
    runs = [places.root / "old", places.others[0] / "middle", places.root / "young"]
    for number, run in enumerate(runs):
        run.mkdir()
        (run / run_folder.RECIPE).write_text("{}")
        os.utime(run, (number, number))
    (places.root / "no-run").mkdir()
    assert places.runs() == runs[::-1]


@pytest.mark.parametrize(
    ("fixture", "family"),
    [
        ("tiny_model", "stable_diffusion"),
        ("tiny_sdxl", "stable_diffusion_xl"),
        ("tiny_sd3", "stable_diffusion_3"),
        ("tiny_flux", "flux"),
        ("tiny_flux2", "flux_2"),
        (None, "toyworld"),
        (None, "toyworld-flow"),
    ],
)
def test_every_preset_is_a_recipe_for_its_base_model(
    fixture: str | None, family: str, request: pytest.FixtureRequest, places: Places
) -> None:
    """What it fills in is read back as its values, its layers are there, and it says where it comes from."""
    base = family if fixture is None else str(request.getfixturevalue(fixture))
    offered = presets.offered(base)
    assert offered == tuple(preset for preset in presets.PRESETS if preset.of == family) != ()
    folder = noise(places.subjects / "rex" / "1.png").parent
    for preset in offered:
        assert "easured here" in preset.source and presets.chosen(base, preset.key) is preset
        held = dict(zip(ADVANCED, DEFAULTS, strict=True)) | presets.held(preset)
        main = [held.pop(name) for name in ("method", "rank", "max_train_steps", "learning_rate")]
        main[1:3] = map(int, main[1:3])
        recipe = asking.training(
            Places(places.root, (Path(base).parent,)),
            list(held),
            [str(folder), "sks", "dog", "", base, *main, *held.values()],
        )
        flat = settings.as_json(recipe)
        assert {name: flat[name] for name in preset.values} == preset.values
        changed = {"instance_data_dir", "instance_prompt", "output_dir", "pretrained_model_name_or_path"}
        assert set(settings.changed(recipe)) <= {*changed, *preset.values}
        assert budget.shapes(base, recipe.adapter.targets)
    assert presets.held(None) == {name: held for name, held in FORM.items() if name in presets.TOUCHED}
    assert presets.chosen(base, "") is None


@pytest.mark.parametrize(
    "preset", [one for one in presets.PRESETS if "docs/families/" in one.source], ids=lambda one: one.of
)
def test_a_preset_is_the_example_that_it_names(preset: presets.Preset) -> None:
    page = re.search(r"docs/families/\S+\.md", preset.source)
    assert page is not None
    text = (Path(__file__).parent.parent / page[0]).read_text().replace("\\\n", " ")
    words = shlex.split(text.split("    singlora train ")[1].split("\n")[0])
    recipe = command_line.parse(command_line.Training, words, "", "").recipe
    own = {"instance_data_dir", "instance_prompt", "output_dir", "pretrained_model_name_or_path"}
    given = {name: value for name, value in settings.changed(recipe).items() if name not in own}
    assert given | {"method": "singlora"} == preset.values


def test_a_packaged_model_is_known_beside_a_folder_of_its_name(
    places: Places, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toyworld").mkdir()
    assert places.base("toyworld") == "toyworld"


def test_a_link_out_of_the_folders_is_outside(places: Places, tmp_path: Path) -> None:
    (tmp_path / "secret").mkdir()
    (places.root / "link").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match="lies outside"):
        places.inside(places.root / "link")
    with pytest.raises(UserError, match="lies outside"):
        places.inside(places.root / ".." / "secret")
    assert places.inside(places.others[0]) == places.others[0]


def test_a_run_goes_on_from_its_last_checkpoint_or_from_its_beginning(places: Places, recipe: Recipe) -> None:
    run = places.root / "rex"
    run.mkdir()
    (run / run_folder.RECIPE).write_text(json.dumps(settings.as_json(recipe)))
    began = asking.continuation(places, run)
    assert began == settings.replaced(recipe, output_dir=run)
    (run / "checkpoint-3").mkdir()
    (run / "checkpoint-3" / "state.json").write_text("{}")
    assert asking.continuation(places, run) == settings.replaced(began, resume_from_checkpoint="latest")


def test_what_is_dropped_is_kept_and_nothing_is_replaced(tmp_path: Path) -> None:
    drop, folder = tmp_path / "drop", tmp_path / "subject"
    first, other = noise(drop / "a" / "dog.png"), noise(drop / "b" / "dog.png", seed=1)
    (drop / "dog.txt").write_text("a dog")
    (drop / "note.txt").write_bytes(b"\xff\xfe\xff")
    (drop / "page.png").write_text("<script>alert(1)</script>")
    hidden = noise(drop / ".hidden.png", seed=2)
    refused = subjects.take(folder, [first, other, drop / "dog.txt", drop / "note.txt", drop / "page.png", hidden])
    assert sorted(path.name for path in folder.iterdir()) == ["dog-2.png", "dog.png", "dog.txt", "hidden.png"]
    assert (folder / "dog.png").read_bytes() == first.read_bytes()
    assert (folder / "dog-2.png").read_bytes() == other.read_bytes()
    assert [one.partition(":")[0] for one in refused] == ["page.png", "note.txt"]
    assert subjects.take(folder, [first, other]) == [] and len(list(folder.iterdir())) == 4  # the same once more


def test_a_subject_is_shown_as_it_is_trained_on(tmp_path: Path) -> None:
    """A thumbnail is the trainer's crop, findings stand with the image they are about, captions are read back."""
    noise(tmp_path / "1.png", size=(300, 90))
    noise(tmp_path / "2.png", seed=1)
    Image.new("RGB", (64, 64), "red").save(tmp_path / "3.png")
    (tmp_path / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    found = subjects.look(tmp_path)
    kinds = {one.name: [finding.kind for finding in one.findings] for one in found.images}
    assert kinds == {"1.png": ["long"], "2.png": [], "3.png": ["one-colour"]}
    assert [(one.name, one.kind) for one in found.findings] == [("broken.png", "unreadable")]
    subjects.write_caption(tmp_path / "2.png", "  a dog\n on <b>grass</b> ")
    assert captions.read(tmp_path, ["2.png"]).texts == {"2.png": "a dog on <b>grass</b>"}
    assert [one.caption for one in subjects.look(tmp_path).images] == ["", "a dog on <b>grass</b>", ""]
    subjects.write_caption(tmp_path / "2.png", "")
    assert captions.read(tmp_path, ["2.png"]).texts == {}
    with pytest.raises(UserError, match="a caption has up to"):
        subjects.write_caption(tmp_path / "2.png", "x" * 3000)


def mask(path: Path, size: tuple[int, int], white: tuple[int, int, int, int]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    painted = Image.new("L", size)
    painted.paste(255, white)
    painted.save(path)
    return path


def test_a_mask_is_shown_in_the_crop_of_its_image(tmp_path: Path) -> None:
    """What it leaves out of the loss is dark in the thumbnail; one that cannot be used is a finding, as in `check`."""
    for name in ("1", "2", "3"):
        Image.new("RGB", (300, 150), (200, 160, 120)).save(tmp_path / f"{name}.png")
    mask(tmp_path / "1.mask.png", (300, 150), (0, 0, 150, 150))  # the left half: also of the square in the middle
    mask(tmp_path / "2-masklabel.png", (30, 15), (0, 0, 15, 15))
    found = subjects.look(tmp_path)
    assert [(one.name, one.masked) for one in found.images] == [("1.png", True), ("2.png", False), ("3.png", False)]
    assert [(one.name, one.kind) for one in found.findings if one.kind == "mask"] == [("2-masklabel.png", "mask")]
    masked, plain, _ = (pixels(one.thumbnail) for one in found.images)
    half = subjects.SIDE // 2
    np.testing.assert_allclose(masked[:, : half - 8], plain[:, : half - 8], atol=8)  # webp loses a little
    assert masked[:, half + 8 :].mean() < 0.5 * plain[:, half + 8 :].mean()
    mask(tmp_path / "1.mask.png", (300, 150), (0, 0, 300, 150))
    os.utime(tmp_path / "1.mask.png", ns=(1, 1))
    np.testing.assert_allclose(pixels(subjects.look(tmp_path).images[0].thumbnail), plain, atol=8)  # seen anew


def pixels(uri: str) -> NDArray[np.float32]:
    image = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    return np.asarray(image.convert("RGB"), dtype=np.float32)


def test_masks_are_dropped_with_their_images(tmp_path: Path) -> None:
    drop, folder = tmp_path / "drop", tmp_path / "subject"
    noise(folder / "dog.png", seed=1)
    own = mask(drop / "a" / "dog.mask.png", (80, 60), (0, 0, 40, 60))
    small = mask(drop / "b" / "cat.mask.png", (8, 6), (0, 0, 8, 6))
    alone = mask(drop / "nobody-masklabel.png", (80, 60), (0, 0, 40, 60))
    hidden = mask(drop / ".black.mask.png", (80, 60), (0, 0, 0, 0))
    (drop / "dog.txt").write_text("the dropped dog")
    dogs = [own, drop / "dog.txt", noise(drop / "c" / "dog.png")]
    cats = [hidden, small, noise(drop / "cat.jpg"), alone, noise(drop / "black.png")]
    refused = subjects.take(folder, [*dogs, *cats])
    # the dropped dog is another one than the dog that is there: its mask and its caption go with it
    assert {path.name for path in folder.iterdir()} == {
        "dog.png", "dog-2.png", "dog-2.mask.png", "dog-2.txt", "cat.jpg", "black.png"
    }  # fmt: skip
    assert (folder / "dog-2.mask.png").read_bytes() == own.read_bytes()
    assert refused == [
        "black.mask.png: is black all over; paint white what is to be learned",
        "cat.mask.png: is 8x6 pixels, its image 80x60; save the mask at that size",
        "nobody-masklabel.png: is a mask without an image; name it after its image",
    ]
    assert subjects.take(folder, [own]) == []  # later, for an image that is there
    assert (folder / "dog.mask.png").read_bytes() == own.read_bytes()
    other = mask(drop / "d" / "dog-masklabel.png", (80, 60), (0, 0, 80, 60))
    assert subjects.take(folder, [other]) == ["dog-masklabel.png: dog.png has another mask; remove that one first"]


def test_an_image_says_how_it_was_made(tmp_path: Path) -> None:
    record = {"file": "000-7.png", "prompt": "a <b>dog</b>", "seed": 7, "adapter": "runs/a + runs/b"}
    record |= {"scale": "1.0 + 0.5", "steps": 25, "guidance_scale": 7.5, "base_model": "toyworld"}
    record |= {"scheduler": "DDIMScheduler", "width": 48, "height": 64}
    png.write(Image.new("RGB", (8, 8)), tmp_path / "made.png", **{gallery.PNG_KEY: json.dumps(record)})
    assert making.restored(tmp_path / "made.png") == {
        "adapter": ("runs/a", "runs/b"),
        "adapter_sha256": (),
        "scale": (1.0, 0.5),
        "pretrained_model_name_or_path": "toyworld",
        "prompt": "a <b>dog</b>",
        "negative_prompt": "",
        "seeds": "7",
        "num_inference_steps": 25,
        "guidance_scale": 7.5,
        "scheduler": None,
        "width": 48,
        "height": 64,
    }
    for text in ("", "{", "[" * 100_000, json.dumps({"file": "../x"}), json.dumps({**record, "seed": "7"})):
        png.write(Image.new("RGB", (8, 8)), tmp_path / "other.png", **{gallery.PNG_KEY: text})
        with pytest.raises(UserError, match=r"other\.png: does not say how it was made"):
            making.restored(tmp_path / "other.png")


def test_an_image_brings_its_settings_back(places: Places, tmp_path: Path) -> None:
    """What the command made is asked for once more, and what is not there any more, or is another, is named."""
    run = places.root / "rex"
    for folder in (run, places.others[0] / "rex", run / "best"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / run_folder.RECIPE).write_text("{}")
        save_file({"up": torch.zeros(1)}, folder / run_folder.ADAPTER)
    record = {"file": "000-7.png", "prompt": "a dog", "negative_prompt": "fog", "seed": 7, "base_model": "toyworld"}
    record |= {"steps": 12, "guidance_scale": 2.5, "scheduler": "dpm++", "width": 48, "height": 64}
    record |= {"adapter": f"{run} + elsewhere/cat + /other/rex/best", "scale": "1.0 + 0.5 + 0.25"}
    record |= {"adapter_sha256": f"{files.sha256(run / run_folder.ADAPTER)} + 0 + 1"}
    made = tmp_path / "made.png"
    png.write(Image.new("RGB", (8, 8)), made, **{gallery.PNG_KEY: json.dumps(record)})
    values, lines = asking.restored(places, made)
    assert values == [
        *("a dog", str(run), None, str(run / "best"), 1.0, 0.5, 0.25, None),
        *("7", "", "fog", "12", "2.5", "48", "64", "dpm++"),
    ]
    assert lines == [
        "elsewhere/cat: not in the folders of this page; the rest is restored",
        "rex/best: has been trained anew, or is another of that name",
    ]
    values[7] = asking.NOTHING
    again, _ = asking.images(places, values)
    sampling = again.sampling
    assert (sampling.seeds, sampling.num_inference_steps, sampling.guidance_scale) == ("7", 12, 2.5)
    assert (sampling.scheduler, sampling.width, sampling.height) == ("dpm++", 48, 64)
    assert again.prompting.negative_prompt == "fog" and again.adapters.scale == (1.0, 0.25)
    # where no adapter is left, the base model is named; the last part of a checkpoint's path alone says nothing
    png.write(Image.new("RGB", (8, 8)), made, **{gallery.PNG_KEY: json.dumps({**record, "adapter": "x/cat/best"})})
    values, lines = asking.restored(places, made)
    assert values[1:4] == [None] * 3 and values[9] == "toyworld" and len(lines) == 1


def test_equal_images_meet_in_a_folder_and_others_do_not(tmp_path: Path) -> None:
    def out(**given: object) -> Path:
        return making.wanted(
            tmp_path, {"prompt": ("a dog",), "pretrained_model_name_or_path": "toyworld", **given}
        ).output.output_dir

    assert out(seeds="0") == out(seeds="0-3", scheduler="", negative_prompt=None)
    assert len({out(), out(prompt=("a cat",)), out(guidance_scale=3.0), out(scheduler="ddim")}) == 4


def test_the_generate_page_asks_for_two_sets(places: Places) -> None:
    held = ["a dog", None, None, None, 1, 1, 1, asking.BASE, "0-1", "toyworld", "", "", "", "", "", ""]
    one, other = asking.images(places, held)
    assert isinstance(one, GenerateSettings) and other is not None
    assert one.prompting.prompt == ("a dog",) and one.sampling.seeds == "0-1" and one.adapters.adapter == ()
    held[11] = "few"
    with pytest.raises(UserError, match="--num_inference_steps few"):
        asking.images(places, held)
    held[11], held[1] = "", "/etc/passwd"
    with pytest.raises(UserError, match="lies outside"):
        asking.images(places, held)


def test_losses_are_drawn_within_their_frame() -> None:
    rows = [
        {"step": n, "loss": 1.0 / n, "validation_loss": 0.5 if n == 700 else 0.6 if n % 100 == 0 else None}
        for n in range(1, 1001)
    ]
    drawn = ET.fromstring(drawing.losses(rows, 2000))
    line = next(one for one in drawn.iter() if one.tag.endswith("polyline"))
    points = [tuple(map(float, one.split(","))) for one in line.attrib["points"].split()]
    assert 100 <= len(points) <= drawing.MOST
    assert all(0 <= x <= drawing.WIDTH and 0 <= y <= drawing.HEIGHT for x, y in points)
    assert [y for _, y in points] == sorted(y for _, y in points)  # it falls: further down on the page
    dots = [one for one in drawn.iter() if one.tag.endswith("circle")]
    assert [("best" in one.attrib["class"]) for one in dots] == [n == 700 for n in range(100, 1001, 100)]
    assert "lowest at step 700" in drawn.attrib["aria-label"]
    assert drawing.losses([], 10) == "" and drawing.losses([{"step": 1, "loss": None}], 10) == ""
    ET.fromstring(drawing.losses([{"step": 1, "loss": 0.0}], 10))


def test_scores_are_drawn_with_the_best_step_filled() -> None:
    """By the rule of the trainer: the largest product."""
    rows = [{"step": n, "loss": 1.0} for n in range(1, 5)]
    figures = {1: (0.2, 0.9), 2: (0.6, 0.8), 4: (0.7, 0.5)}
    rows = [row | dict(zip(("dino", "clip_t"), figures.get(int(row["step"]), ()), strict=False)) for row in rows]
    drawn = ET.fromstring(drawing.scores(rows))
    dots = [one for one in drawn.iter() if one.tag.endswith("circle")]
    assert ["best" in one.attrib["class"] for one in dots] == [False, True, False]
    right, left = float(dots[0].attrib["cx"]), float(dots[2].attrib["cx"])
    assert left < float(dots[1].attrib["cx"]) < right <= drawing.WIDTH
    assert float(dots[2].attrib["cy"]) < float(dots[1].attrib["cy"]) < float(dots[0].attrib["cy"]) < drawing.HEIGHT
    assert drawing.scores([{"step": 1, "loss": 1.0}]) == "" != drawing.scores(rows[:1])


def test_what_is_shown_is_text() -> None:
    assert (
        saying.safe("<img src=x onerror=alert(1)>\x1b[31m")
        == "&lt;img src=x onerror=alert(1)&gt;\N{REPLACEMENT CHARACTER}[31m"
    )
    assert saying.line(UserError("a", "b")) == "a; b"
    assert saying.line(FileNotFoundError(2, "No such file or directory", "x")) == "x: No such file or directory"
    assert saying.line(RuntimeError("a bug")) is None
    assert [saying.clock(seconds) for seconds in (5, 125, 3723)] == ["0:05", "2:05", "1:02:03"]
