"""Generating images: `pytest tests/test_generate.py`."""

from __future__ import annotations

import dataclasses
import json
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.generate import generate
from singlora_diffusion.sampling.settings import GenerateSettings, OutputSettings, parse_seeds
from singlora_diffusion.settings import parse, replaced

TEMPLATES = "# two places\na photo of a {token} {class} in the snow\n\n{class} on the beach\n"


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter that changes the tiny model's images a good deal."""
    import torch

    from singlora_diffusion import adapters, formats, models

    family = models.load(str(tiny_model), device="cpu")
    made = adapters.attach(family.networks, AdapterConfig(rank=4, alpha=8.0, text_targets=("q_proj", "v_proj")), seed=1)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.mul_(3.0)
    run = tmp_path_factory.mktemp("run")
    about = {
        "family": family.name,
        "base_model": str(tiny_model),
        "base_hash": family.fingerprint,
        "identifier": "sks",
        "class_noun": "dog",
        "recipe": {"instance_data_dir": "my dog"},
    }
    formats.save(made, run / "adapter.safetensors", about=about)
    return run


@pytest.fixture
def settings(adapter: Path, tmp_path: Path) -> GenerateSettings:
    (tmp_path / "two.txt").write_text(TEMPLATES)
    return replaced(
        GenerateSettings(OutputSettings(tmp_path / "out")),
        adapter=(adapter,),
        prompts=str(tmp_path / "two.txt"),
        seeds="3,5",
        num_inference_steps=2,
        device="cpu",
    )


def pixels(folder: Path, name: str = "000-3.png") -> np.ndarray:
    with Image.open(folder / name) as image:
        return np.asarray(image).astype(int)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    """What a user sees in the folder."""
    return sorted(path.name for path in folder.iterdir() if not path.name.startswith("."))


class NotAgain(Exception):
    pass


@pytest.fixture
def samples_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes sampled so far. A limit put in front of them, as a negative number, ends the run when reached."""
    from singlora_diffusion.models import stock

    counts: list[int] = []
    sample = stock.sample

    def counted(family: Any, prompts: list[str], *args: Any, **options: Any) -> list[Image.Image]:
        if counts and counts[0] == -len(counts):
            raise NotAgain
        counts.append(len(prompts))
        return sample(family, prompts, *args, **options)

    monkeypatch.setattr(stock, "sample", counted)
    return counts


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_header_says_all_that_is_needed(settings: GenerateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    lines = generate(settings)
    assert names(settings.output.output_dir) == [
        *("000-3.png", "000-5.png", "001-3.png", "001-5.png"),
        *("contact_sheet.png", "manifest.jsonl"),
    ]
    assert manifest(settings.output.output_dir) == lines
    first = lines[0]
    assert first["file"] == "000-3.png" and first["seed"] == 3 and first["prompt_index"] == 0
    assert first["prompt"] == "a photo of a sks dog in the snow"
    assert first["prompt_without_token"] == "a photo of a dog in the snow"
    assert first["template"] == "a photo of a {token} {class} in the snow"
    assert (first["identifier"], first["class_noun"]) == ("sks", "dog")
    assert first["base_model"].endswith("tiny") and (first["height"], first["width"]) == (32, 32)
    assert first["guidance_scale"] == 7.5 and first["steps"] == 2 and first["scheduler"] == "DDIMScheduler"
    with Image.open(settings.output.output_dir / "001-5.png") as image:
        assert image.size == (32, 32) and json.loads(image.info["singlora"]) == lines[3]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: singlora score --images {settings.output.output_dir} --references 'my dog'"


@pytest.mark.numerical
def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(settings: GenerateSettings, tmp_path: Path) -> None:
    """Each image has its own generator, so that a batch changes nothing but the order of sums.

    The longest sum of the tiny model has n = 1152 terms (128 channels, 3 x 3). In another order it differs by
    n^1/2 u = 2e-6 as a rule and by n u = 7e-5 at worst, where u = 2^-24. Guidance of 7.5 multiplies that by up to 14,
    and one level of 255 is 1/127.5: 0.004 of a level as a rule, which carries that share of the values over the edge
    between two levels, and 0.12 of a level at worst, so never over two edges.
    """
    three = replaced(settings, seeds="0-2", batch_size=4)
    one = replaced(three, batch_size=1, output_dir=tmp_path / "one")
    generate(three)
    generate(one)
    files = [line["file"] for line in manifest(one.output.output_dir)]
    assert manifest(three.output.output_dir) == manifest(one.output.output_dir) and len(files) == 6
    levels = np.stack([pixels(one.output.output_dir, file) - pixels(three.output.output_dir, file) for file in files])
    assert np.abs(levels).max() <= 1 and np.abs(levels).mean() <= 0.004
    again = replaced(one, seeds="2", output_dir=tmp_path / "again")
    generate(again)  # and not on the images before it
    for line in manifest(again.output.output_dir):
        assert (again.output.output_dir / line["file"]).read_bytes() == (
            one.output.output_dir / line["file"]
        ).read_bytes()


@pytest.mark.numerical
def test_strength_zero_is_the_base_model_and_merged_is_attached(settings: GenerateSettings, tmp_path: Path) -> None:
    variants = {
        "as_trained": settings,
        "zero": replaced(settings, scale=(0.0,)),
        "merged": replaced(settings, merge=True),
        "half": replaced(settings, scale=(0.5,), merge=True),
    }
    base = replaced(settings, adapter=(), identifier="sks", class_noun="dog")
    variants["base"] = replaced(base, pretrained_model_name_or_path=manifest_base(settings))
    for name, variant in variants.items():
        generate(
            replaced(variant, prompts=None, prompt=("a photo of a sks dog",), output_dir=tmp_path / name), quiet=True
        )
    found = {name: pixels(tmp_path / name) for name in variants}
    assert np.array_equal(found["zero"], found["base"])
    assert np.abs(found["as_trained"] - found["base"]).mean() > 2
    assert np.abs(found["half"] - found["as_trained"]).mean() > 1
    assert np.abs(found["merged"] - found["as_trained"]).max() <= 1  # of 255


def manifest_base(settings: GenerateSettings) -> str:
    from singlora_diffusion import formats

    return formats.read_header(settings.adapters.adapter[0]).base_model


@pytest.mark.numerical
def test_a_lora_of_another_program_gives_the_same_images(settings: GenerateSettings, tmp_path: Path) -> None:
    from singlora_diffusion import formats, models

    base = manifest_base(settings)
    exported = tmp_path / "dog.safetensors"
    formats.export(settings.adapters.adapter[0], "kohya", exported, networks=models.load(base).networks)
    own = replaced(settings, scale=(0.7,))
    generate(own, quiet=True)
    foreign = replaced(own, adapter=(exported,), output_dir=tmp_path / "foreign", identifier="sks", class_noun="dog")
    with pytest.raises(UserError, match="does not say what model it is for"):
        generate(foreign)
    foreign = replaced(foreign, pretrained_model_name_or_path=base)
    generate(foreign, quiet=True)
    assert np.abs(pixels(foreign.output.output_dir) - pixels(own.output.output_dir)).max() <= 1
    merged = replaced(foreign, merge=True, output_dir=tmp_path / "merged")
    generate(merged, quiet=True)
    assert np.abs(pixels(merged.output.output_dir) - pixels(own.output.output_dir)).max() <= 1


@pytest.mark.numerical
def test_several_adapters_add_up_each_at_its_scale(settings: GenerateSettings, tmp_path: Path) -> None:
    """dW + dW/2 - dW/2, ours and another program's, is dW; 0.75 dW + 0.75 dW is 1.5 dW."""
    from singlora_diffusion import formats, models

    exported, own = tmp_path / "dog.safetensors", settings.adapters.adapter[0]
    formats.export(own, "peft", exported, networks=models.load(manifest_base(settings)).networks)
    settings = replaced(settings, seeds="3")
    variants = {
        "alone": settings,
        "three": replaced(settings, adapter=(own, own, exported), scale=(1.0, 0.5, -0.5)),
        "more": replaced(settings, scale=(1.5,)),
        "twice": replaced(settings, adapter=(own, exported), scale=(0.75,)),
        "merged": replaced(settings, adapter=(own, exported), scale=(0.75,), merge=True),
    }
    lines = {name: generate(replaced(one, output_dir=tmp_path / name), quiet=True) for name, one in variants.items()}
    found = {name: pixels(tmp_path / name) for name in variants}
    assert np.abs(found["three"] - found["alone"]).max() <= 1  # of 255
    assert np.abs(found["twice"] - found["more"]).max() <= 1 and np.abs(found["merged"] - found["more"]).max() <= 1
    assert np.abs(found["more"] - found["alone"]).mean() > 1
    first = lines["three"][0]
    assert (first["prompt"], first["class_noun"]) == ("a photo of a sks dog in the snow", "dog")
    assert first["adapter"] == f"{own} + {own} + {exported}" and first["scale"] == "1.0 + 0.5 + -0.5"
    assert len(set(first["adapter_sha256"].split(" + "))) == 2
    assert lines["alone"][0]["adapter"] == str(own) and lines["alone"][0]["scale"] == 1.0
    with pytest.raises(UserError, match="does not say what model it is for"):
        generate(replaced(settings, adapter=(exported, own), output_dir=tmp_path / "reversed"))


def test_several_adapters_on_the_command_line() -> None:
    words = ["--output_dir", "out", "--adapter", "runs/dog", "runs/cat", "--scale", "1.0", "-0.7", "--seeds", "3"]
    found = parse(GenerateSettings, words, "generate", "").adapters
    assert found.adapter == (Path("runs/dog"), Path("runs/cat")) and found.scale == (1.0, -0.7)


def test_several_adapters_are_for_one_model(settings: GenerateSettings, tmp_path: Path) -> None:
    from singlora_diffusion.formats import native

    header, tensors = native.read(settings.adapters.adapter[0])
    other = tmp_path / "cat.safetensors"
    native.write(other, tensors, dataclasses.replace(header, base_model="another", base_hash="0" * 64))
    both = replaced(settings, adapter=(*settings.adapters.adapter, other))
    with pytest.raises(UserError, match=r"cat\.safetensors was trained on another") as error:
        generate(both)
    assert str(settings.adapters.adapter[0]) in str(error.value) and not settings.output.output_dir.exists()


def test_literal_prompts_and_the_schedulers(settings: GenerateSettings, tmp_path: Path) -> None:
    found = []
    for scheduler in ("ddim", "dpm++", "euler"):
        out = tmp_path / scheduler
        some = replaced(
            settings, prompts=None, prompt=("sks, a dog", "sksy"), seeds="1", scheduler=scheduler, output_dir=out
        )
        lines = generate(some, quiet=True)
        assert [line["prompt"] for line in lines] == ["sks, a dog", "sksy"]
        assert [line["prompt_without_token"] for line in lines] == [", a dog", "sksy"]
        found.append(pixels(out, "000-1.png"))
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


@pytest.mark.parametrize("scheduler", [None, "ddim", "dpm++", "euler"])
def test_schedulers_can_take_all_the_steps_that_are_allowed(
    settings: GenerateSettings, samples_counted: list[int], scheduler: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from diffusers import UNet2DConditionModel

    monkeypatch.setattr(UNet2DConditionModel, "forward", lambda self, x, *_, **__: (x * 0.1,))
    for steps in (1, 999):
        one = replaced(settings, seeds="1", prompts=None, prompt=("a dog",), guidance_scale=1.0, scheduler=scheduler)
        generate(replaced(one, num_inference_steps=steps, overwrite=True), quiet=True)
    assert samples_counted == [1, 1]


def test_prompts_that_the_model_cuts_are_named(settings: GenerateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a photo of a dog " * 10
    generate(replaced(settings, prompts=None, prompt=(long, "a dog"), seeds="0"))
    assert "1 of 2 prompts are too long" in capsys.readouterr().err


# --- what is there already -------------------------------------------------------------------------------------------


def test_nothing_is_made_twice_and_new_seeds_join(settings: GenerateSettings, samples_counted: list[int]) -> None:
    generate(settings)
    before = {path.name: path.stat().st_mtime_ns for path in settings.output.output_dir.glob("0*.png")}
    assert len(generate(settings)) == 4 and samples_counted == [4]
    assert len(generate(replaced(settings, seeds="3-5"))) == 6 and samples_counted == [4, 2]
    assert {name: (settings.output.output_dir / name).stat().st_mtime_ns for name in before} == before
    assert sorted(line["file"] for line in manifest(settings.output.output_dir)) == [
        f"{prompt:03d}-{seed}.png" for prompt in (0, 1) for seed in (3, 4, 5)
    ]
    (settings.output.output_dir / "000-5.png").unlink()
    (settings.output.output_dir / "000-4.png").unlink()
    generate(settings)
    assert samples_counted == [4, 2, 1]  # 000-5 again; 000-4 was not asked for, and its line is gone
    assert len(manifest(settings.output.output_dir)) == 5


def test_a_crash_loses_at_most_the_batch_in_work(settings: GenerateSettings, samples_counted: list[int]) -> None:
    samples_counted.append(-2)
    with pytest.raises(NotAgain):
        generate(replaced(settings, batch_size=3))
    path = settings.output.output_dir / "manifest.jsonl"
    done = manifest(settings.output.output_dir)
    assert [line["file"] for line in done] == ["000-3.png", "000-5.png", "001-3.png"]
    path.write_text(path.read_text()[:-20])  # cut within the last line
    samples_counted[0] = 0
    assert manifest_after(settings) == generate(settings) and samples_counted == [0, 3, 1]
    assert [line["file"] for line in manifest(settings.output.output_dir)] == [
        *(line["file"] for line in done),
        "001-5.png",
    ]


def manifest_after(settings: GenerateSettings) -> list[dict[str, Any]]:
    generate(settings)
    return manifest(settings.output.output_dir)


@pytest.mark.parametrize(
    "change, said",
    [
        ({"scale": (0.5,)}, "scale 1.0 instead of 0.5"),
        (
            {"class_noun": "cat"},
            'prompt "a photo of a sks dog in the snow" instead of "a photo of a sks cat in the snow"',
        ),
        ({"seeds": "8", "negative_prompt": "snow"}, 'negative_prompt "" instead of "snow"'),
    ],
)
def test_images_of_other_settings_are_not_touched(
    settings: GenerateSettings, tmp_path: Path, adapter: Path, change: dict[str, Any], said: str
) -> None:
    once = replaced(settings, seeds="3")
    generate(once, quiet=True)
    before = {path.name: path.read_bytes() for path in once.output.output_dir.glob("[!.]*")}
    changed = replaced(once, **change)
    with pytest.raises(UserError) as error:
        generate(changed)
    assert said in str(error.value) and "--overwrite" in str(error.value)
    assert {path.name: path.read_bytes() for path in once.output.output_dir.glob("[!.]*")} == before
    lines = generate(replaced(changed, overwrite=True), quiet=True)
    assert manifest(once.output.output_dir) == lines  # what was made under other settings is no longer listed
    assert names(once.output.output_dir) == sorted(
        {*before, *(line["file"] for line in lines)}
    )  # but nothing is deleted


@pytest.mark.parametrize("name", ["000-3.png", "contact_sheet.png", "manifest.jsonl"])
def test_files_of_the_user_are_not_touched(settings: GenerateSettings, name: str) -> None:
    settings.output.output_dir.mkdir()
    (settings.output.output_dir / name).write_text("mine\n")
    with pytest.raises(UserError, match=name):
        generate(settings)
    assert names(settings.output.output_dir) == [name] and (settings.output.output_dir / name).read_text() == "mine\n"


# --- what does not work ----------------------------------------------------------------------------------------------


def test_an_adapter_of_another_model_is_refused_unless_asked_for(
    adapter: Path, tiny_model: Path, settings: GenerateSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    from singlora_diffusion.formats import native

    other = tmp_path / "other"
    shutil.copytree(tiny_model, other)
    weights = other / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    save_file({name: tensor * 1.01 for name, tensor in state.items()}, weights, {"format": "pt"})
    header, tensors = native.read(adapter)
    moved = tmp_path / "moved.safetensors"
    native.write(moved, tensors, dataclasses.replace(header, base_model=str(other)))
    with pytest.raises(UserError, match="is another model by now") as error:
        generate(replaced(settings, adapter=(moved,)))
    assert header.base_hash[:12] in str(error.value) and not settings.output.output_dir.exists()
    generate(replaced(settings, adapter=(moved,), pretrained_model_name_or_path=str(other), seeds="0"))
    assert "it is used on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"adapter": ()}, "--pretrained_model_name_or_path"),
        ({"adapter": (Path("nowhere"),)}, "nowhere: no such file"),
        ({"prompt": ("a dog",)}, "use one of them"),
        ({"prompts": "nowhere.txt"}, "no such prompt file"),
        ({"seeds": "a"}, "--seeds"),
        ({"num_inference_steps": 0}, "--num_inference_steps 0: must be at least 1"),
        ({"batch_size": 0}, "--batch_size 0: must be at least 1"),
        ({"height": 100}, "--height 100: must be a multiple of 8 pixels"),
        ({"scale": (float("nan"),)}, "--scale"),
        ({"scale": (1.0, 0.5)}, "2 numbers for --scale and 1 for --adapter"),
        ({"adapter": (), "pretrained_model_name_or_path": "toyworld", "scale": (0.5,)}, "name it with --adapter"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"output_dir": Path(__file__)}, "is a file"),
        ({"pretrained_model_name_or_path": "nowhere"}, "no model at nowhere"),
        ({"num_inference_steps": 1000}, "can take at most 999 steps"),
        ({"num_inference_steps": 10**30}, "--num_inference_steps"),
        ({"guidance_scale": float("inf")}, "--guidance_scale inf"),
        ({"guidance_scale": -1.0}, "--guidance_scale -1.0: must be at least 0"),
        ({"scheduler": "magic"}, "can take ddim, dpm++, euler"),
        ({"height": -32}, "--height -32: must be at least 8"),
        ({"width": 10**30}, "--width"),
        ({"height": 16384, "width": 16384}, "--height 16384 --width 16384 --batch_size 4: would need about"),
        ({"seeds": "0-9", "prompts": None, "prompt": ("a dog",) * 10_001}, "more than 100,000 images"),
        ({"output_dir": Path("x" * 300)}, "cannot be used: File name too long"),
        ({"output_dir": Path(__file__) / "out"}, "cannot be used: Not a directory"),
        ({"output_dir": Path("a\0b")}, "cannot be used: "),
        ({"adapter": (Path("x" * 300),)}, "cannot be read: File name too long"),
        ({"prompts": None, "prompt": ("a \udcff dog",)}, "is not valid text"),
        ({"negative_prompt": "\udcff"}, "is not valid text"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(settings: GenerateSettings, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        generate(replaced(settings, **change))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not settings.output.output_dir.exists()


def test_a_request_that_does_not_fit_is_refused(
    settings: GenerateSettings, tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from singlora_diffusion import device, models
    from singlora_diffusion.sampling import memory

    free = [10_000]
    monkeypatch.setattr(device, "free_memory", lambda _: free[0])
    with pytest.raises(UserError, match="tiny in float32: would need about"):
        generate(settings)
    free[0] = memory.of_weights(
        models.find(str(tiny_model)), 4
    )  # the weights are counted before they are loaded, what sampling takes after it
    with pytest.raises(UserError, match="--height 1024 --width 64 --batch_size 4: would need about"):
        generate(replaced(settings, height=1024, width=64))
    assert not settings.output.output_dir.exists()


def test_the_estimates_are_those_of_the_formula(tiny_model: Path) -> None:
    from singlora_diffusion import models
    from singlora_diffusion.sampling import memory

    family = models.load(str(tiny_model), device="cpu")
    parts = family.pipeline().components
    numbers = sum(p.numel() for name in ("unet", "vae", "text_encoder") for p in parts[name].parameters())
    assert memory.of_weights(models.find(str(tiny_model)), 4) == 4 * numbers
    vae = sum(p.numel() for p in parts["vae"].parameters())
    assert memory.of_weights(models.find(str(tiny_model)), 2) == 2 * (numbers - vae) + 4 * vae
    one, four = (memory.of_sampling(family, 64, 32, batch) for batch in (1, 4))
    assert one == 64 * 32 * (48 * 32 * 4 * 2 // 16 + 32) and four == 4 * one  # 32 channels at a quarter of each side
    assert memory.of_sampling(family, 128, 64, 1) == 4 * one


def test_two_runs_in_one_folder(settings: GenerateSettings) -> None:
    from singlora_diffusion import files

    with (
        files.locked(settings.output.output_dir, "singlora generate"),
        pytest.raises(UserError, match="singlora generate is running there already"),
    ):
        generate(settings)
    assert names(settings.output.output_dir) == []


def test_what_killed_writers_left_is_removed(settings: GenerateSettings) -> None:
    generate(replaced(settings, seeds="3"), quiet=True)
    left = settings.output.output_dir / ".000-3.png.part-a1b2c3.png"
    left.write_bytes(b"half")
    generate(replaced(settings, seeds="3"), quiet=True)
    assert not left.exists()


def test_images_of_one_colour_are_named(
    settings: GenerateSettings, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.torch import load_file, save_file

    generate(settings)
    assert "one colour" not in capsys.readouterr().err
    shutil.copytree(tiny_model, tmp_path / "damaged")
    weights = tmp_path / "damaged" / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(weights)
    state["conv_out.bias"] *= float("nan")
    save_file(state, weights, {"format": "pt"})
    damaged = replaced(
        settings, pretrained_model_name_or_path=str(tmp_path / "damaged"), output_dir=tmp_path / "of damaged"
    )
    for _ in range(2):  # also when they were there already
        generate(damaged)
        assert "4 of 4 images are of one colour: 000-3.png, 000-5.png, 001-3.png" in capsys.readouterr().err


def test_what_a_header_says_cannot_command_the_terminal(
    settings: GenerateSettings, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from singlora_diffusion.formats import native

    header, tensors = native.read(settings.adapters.adapter[0])
    evil = tmp_path / "evil.safetensors"
    recipe = {"instance_data_dir": "dogs'; \x1b[31mrm -rf ~\n[/b]"}
    native.write(evil, tensors, dataclasses.replace(header, recipe=recipe))
    generate(replaced(settings, adapter=(evil,), seeds="0"))
    said = capsys.readouterr().out
    *_, flag, value = shlex.split(said.splitlines()[-1])
    assert flag == "--references" and value == "dogs'; \ufffd[31mrm -rf ~\ufffd[/b]" and "\x1b" not in said
    native.write(evil, tensors, dataclasses.replace(header, base_model="\x1b[31mnowhere\n"))
    with pytest.raises(UserError, match="the adapter's base model") as error:
        generate(replaced(settings, adapter=(evil,), seeds="0"))
    assert "\x1b" not in str(error.value) and "\n" not in str(error.value)


def test_square_brackets_are_only_brackets(settings: GenerateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    out = settings.output.output_dir.parent / "run[/b]x"
    generate(replaced(settings, output_dir=out, seeds="0", identifier="[v]"))
    said = capsys.readouterr().out.splitlines()
    assert said[0].startswith(f"{out}: 2 images made") and f"--images '{out}'" in said[-1]
    assert manifest(out)[0]["prompt"] == "a photo of a [v] dog in the snow"


def test_a_disk_that_is_full_leaves_whole_files_and_lines(settings: GenerateSettings) -> None:
    import resource

    from singlora_diffusion.sampling import gallery

    folder = settings.output.output_dir
    (first, *_) = generate(replaced(settings, seeds="3"), quiet=True)
    before = {name: (folder / name).read_bytes() for name in names(folder)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    with Image.open(folder / first["file"]) as image:
        for size, left in ((100, set()), (len(before["manifest.jsonl"]) + 100, {"009-9.png"})):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))  # no image fits; then half a line does
            try:
                with pytest.raises(UserError, match="cannot be written: File too large") as error:
                    gallery.add(folder, {**first, "file": "009-9.png"}, image.resize((8, 8)))
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert "\n" not in str(error.value) and set(names(folder)) == {*before, *left}
            assert (
                not [*folder.glob(".*part*")] and (folder / "manifest.jsonl").read_bytes() == before["manifest.jsonl"]
            )


def test_seeds_that_differ_in_their_upper_half(settings: GenerateSettings) -> None:
    generate(replaced(settings, prompt=("a dog",), prompts=None, seeds=f"0,{2**32}"), quiet=True)
    folder = settings.output.output_dir
    assert np.abs(pixels(folder, "000-0.png") - pixels(folder, f"000-{2**32}.png")).mean() > 2


def test_the_base_model_alone_needs_words_for_templates_only(settings: GenerateSettings) -> None:
    base = replaced(settings, adapter=(), pretrained_model_name_or_path=manifest_base(settings), seeds="0")
    with pytest.raises(UserError, match="--identifier"):
        generate(base)
    with pytest.raises(UserError, match="--class_noun"):
        generate(replaced(base, identifier=""))
    assert generate(replaced(base, identifier="", class_noun="cat"))[0]["prompt"] == "a photo of a cat in the snow"
    with pytest.raises(UserError, match="no prompts: give --prompt"):
        generate(replaced(base, prompts=None))


@pytest.mark.parametrize(
    "text, seeds", [("7", [7]), ("0-3", [0, 1, 2, 3]), ("0,5,7", [0, 5, 7]), (" 4 , 0 - 1", [4, 0, 1]), ("2-2", [2])]
)
def test_seeds(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text", ["", "a", "1,", "-1", "3-1", "1,1", "0-2,1", "1.5", "0-99999999999", "9" * 30])
def test_seeds_that_are_none(text: str) -> None:
    with pytest.raises(UserError, match="--seeds"):
        parse_seeds(text)


def test_help_needs_no_torch() -> None:
    code = (
        "import sys, singlora_diffusion.sampling.settings; assert not {'torch', 'diffusers', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
