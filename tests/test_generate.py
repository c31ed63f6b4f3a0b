"""Generating pictures: `pytest tests/test_generate.py`."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tyro
from PIL import Image

from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.generate import GenerateSettings, generate, parse_seeds

TEMPLATES = "# two places\na photo of a {token} {class} in the snow\n\n{class} on the beach\n"


@pytest.fixture(scope="session")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder with an adapter that changes the tiny model's pictures a good deal."""
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
    return GenerateSettings(
        output_dir=tmp_path / "out",
        adapter=(adapter,),
        prompts=str(tmp_path / "two.txt"),
        seeds="3,5",
        num_inference_steps=2,
        device="cpu",
    )


def pixels(folder: Path, name: str = "000-3.png") -> np.ndarray:
    with Image.open(folder / name) as picture:
        return np.asarray(picture).astype(int)


def manifest(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "manifest.jsonl").read_text().splitlines()]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


class NotAgain(Exception):
    pass


@pytest.fixture
def samples_counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The batch sizes sampled so far. A limit put in front of them, as a negative number, ends the run when reached."""
    from singlora_diffusion.models.stable_diffusion import StableDiffusion

    counts: list[int] = []
    sample = StableDiffusion.sample

    def counted(self: StableDiffusion, prompts: list[str], *args: Any, **options: Any) -> list[Image.Image]:
        if counts and counts[0] == -len(counts):
            raise NotAgain
        counts.append(len(prompts))
        return sample(self, prompts, *args, **options)

    monkeypatch.setattr(StableDiffusion, "sample", counted)
    return counts


# --- what comes out --------------------------------------------------------------------------------------------------


def test_the_header_says_all_that_is_needed(settings: GenerateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    lines = generate(settings)
    assert names(settings.output_dir) == [
        *("000-3.png", "000-5.png", "001-3.png", "001-5.png"),
        *("contact_sheet.png", "manifest.jsonl"),
    ]
    assert manifest(settings.output_dir) == lines
    first = lines[0]
    assert first["file"] == "000-3.png" and first["seed"] == 3 and first["prompt_index"] == 0
    assert first["prompt"] == "a photo of a sks dog in the snow"
    assert first["prompt_without_token"] == "a photo of a dog in the snow"
    assert first["template"] == "a photo of a {token} {class} in the snow"
    assert (first["identifier"], first["class_noun"]) == ("sks", "dog")
    assert first["base_model"].endswith("tiny") and (first["height"], first["width"]) == (32, 32)
    assert first["guidance_scale"] == 7.5 and first["steps"] == 2 and first["scheduler"] == "DDIMScheduler"
    with Image.open(settings.output_dir / "001-5.png") as picture:
        assert picture.size == (32, 32) and json.loads(picture.info["singlora"]) == lines[3]
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == f"next: singlora score --images {settings.output_dir} --references 'my dog'"


@pytest.mark.numerical
def test_an_image_depends_on_its_own_seed_and_not_on_its_batch(settings: GenerateSettings, tmp_path: Path) -> None:
    """Each image has its own generator, so that a batch changes nothing but the order of sums.

    The longest sum of the tiny model has n = 1152 terms (128 channels, 3 x 3). In another order it differs by
    n^1/2 u = 2e-6 as a rule and by n u = 7e-5 at worst, where u = 2^-24. Guidance of 7.5 multiplies that by up to 14,
    and one level of 255 is 1/127.5: 0.004 of a level as a rule, which carries that share of the values over the edge
    between two levels, and 0.12 of a level at worst, so never over two edges.
    """
    three = replace(settings, seeds="0-2", batch_size=4)
    one = replace(three, batch_size=1, output_dir=tmp_path / "one")
    generate(three)
    generate(one)
    files = [line["file"] for line in manifest(one.output_dir)]
    assert manifest(three.output_dir) == manifest(one.output_dir) and len(files) == 6
    levels = np.stack([pixels(one.output_dir, file) - pixels(three.output_dir, file) for file in files])
    assert np.abs(levels).max() <= 1 and np.abs(levels).mean() <= 0.004
    again = replace(one, seeds="2", output_dir=tmp_path / "again")
    generate(again)  # and not on the images before it
    for line in manifest(again.output_dir):
        assert (again.output_dir / line["file"]).read_bytes() == (one.output_dir / line["file"]).read_bytes()


@pytest.mark.numerical
def test_strength_zero_is_the_base_model_and_merged_is_attached(settings: GenerateSettings, tmp_path: Path) -> None:
    variants = {
        "as_trained": settings,
        "zero": replace(settings, scale=(0.0,)),
        "merged": replace(settings, merge=True),
        "half": replace(settings, scale=(0.5,), merge=True),
    }
    base = replace(settings, adapter=(), identifier="sks", class_noun="dog")
    variants["base"] = replace(base, pretrained_model_name_or_path=manifest_base(settings))
    for name, variant in variants.items():
        generate(
            replace(variant, prompts=None, prompt=("a photo of a sks dog",), output_dir=tmp_path / name), quiet=True
        )
    found = {name: pixels(tmp_path / name) for name in variants}
    assert np.array_equal(found["zero"], found["base"])
    assert np.abs(found["as_trained"] - found["base"]).mean() > 2
    assert np.abs(found["half"] - found["as_trained"]).mean() > 1
    assert np.abs(found["merged"] - found["as_trained"]).max() <= 1  # of 255


def manifest_base(settings: GenerateSettings) -> str:
    from singlora_diffusion import formats

    return formats.read_header(settings.adapter[0]).base_model


@pytest.mark.numerical
def test_a_lora_of_another_program_gives_the_same_pictures(settings: GenerateSettings, tmp_path: Path) -> None:
    from singlora_diffusion import formats, models

    base = manifest_base(settings)
    exported = tmp_path / "dog.safetensors"
    formats.export(settings.adapter[0], "kohya", exported, networks=models.load(base).networks)
    own = replace(settings, scale=(0.7,))
    generate(own, quiet=True)
    foreign = replace(own, adapter=(exported,), output_dir=tmp_path / "foreign", identifier="sks", class_noun="dog")
    with pytest.raises(UserError, match="does not say what model it is for"):
        generate(foreign)
    foreign = replace(foreign, pretrained_model_name_or_path=base)
    generate(foreign, quiet=True)
    assert np.abs(pixels(foreign.output_dir) - pixels(own.output_dir)).max() <= 1
    merged = replace(foreign, merge=True, output_dir=tmp_path / "merged")
    generate(merged, quiet=True)
    assert np.abs(pixels(merged.output_dir) - pixels(own.output_dir)).max() <= 1


@pytest.mark.numerical
def test_several_adapters_add_up_each_at_its_scale(settings: GenerateSettings, tmp_path: Path) -> None:
    """dW + dW/2 - dW/2, ours and another program's, is dW; 0.75 dW + 0.75 dW is 1.5 dW."""
    from singlora_diffusion import formats, models

    exported, own = tmp_path / "dog.safetensors", settings.adapter[0]
    formats.export(own, "peft", exported, networks=models.load(manifest_base(settings)).networks)
    settings = replace(settings, seeds="3")
    variants = {
        "alone": settings,
        "three": replace(settings, adapter=(own, own, exported), scale=(1.0, 0.5, -0.5)),
        "more": replace(settings, scale=(1.5,)),
        "twice": replace(settings, adapter=(own, exported), scale=(0.75,)),
        "merged": replace(settings, adapter=(own, exported), scale=(0.75,), merge=True),
    }
    lines = {name: generate(replace(one, output_dir=tmp_path / name), quiet=True) for name, one in variants.items()}
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
        generate(replace(settings, adapter=(exported, own), output_dir=tmp_path / "reversed"))


def test_several_adapters_on_the_command_line() -> None:
    words = ["--output_dir", "out", "--adapter", "runs/dog", "runs/cat", "--scale", "1.0", "-0.7", "--seeds", "3"]
    found = tyro.cli(GenerateSettings, args=words, use_underscores=True)
    assert found.adapter == (Path("runs/dog"), Path("runs/cat")) and found.scale == (1.0, -0.7)


def test_several_adapters_are_for_one_model(settings: GenerateSettings, tmp_path: Path) -> None:
    from singlora_diffusion.formats import native

    header, tensors = native.read(settings.adapter[0])
    other = tmp_path / "cat.safetensors"
    native.write(other, tensors, replace(header, base_model="another", base_hash="0" * 64))
    both = replace(settings, adapter=(*settings.adapter, other))
    with pytest.raises(UserError, match=r"cat\.safetensors was trained on another") as error:
        generate(both)
    assert str(settings.adapter[0]) in str(error.value) and not settings.output_dir.exists()


def test_literal_prompts_and_the_samplers(settings: GenerateSettings, tmp_path: Path) -> None:
    found = []
    for sampler in ("ddim", "dpm++", "euler"):
        out = tmp_path / sampler
        some = replace(
            settings, prompts=None, prompt=("sks, a dog", "sksy"), seeds="1", scheduler=sampler, output_dir=out
        )
        lines = generate(some, quiet=True)
        assert [line["prompt"] for line in lines] == ["sks, a dog", "sksy"]
        assert [line["prompt_without_token"] for line in lines] == [", a dog", "sksy"]
        found.append(pixels(out, "000-1.png"))
    assert not np.array_equal(found[0], found[1]) and not np.array_equal(found[1], found[2])


def test_prompts_that_the_model_cuts_are_named(settings: GenerateSettings, capsys: pytest.CaptureFixture[str]) -> None:
    long = "a photo of a dog " * 10
    generate(replace(settings, prompts=None, prompt=(long, "a dog"), seeds="0"))
    assert "1 of 2 prompts exceed the 24 tokens" in capsys.readouterr().err


# --- what is there already -------------------------------------------------------------------------------------------


def test_nothing_is_made_twice_and_new_seeds_join(settings: GenerateSettings, samples_counted: list[int]) -> None:
    generate(settings)
    before = {path.name: path.stat().st_mtime_ns for path in settings.output_dir.glob("0*.png")}
    assert len(generate(settings)) == 4 and samples_counted == [4]
    assert len(generate(replace(settings, seeds="3-5"))) == 6 and samples_counted == [4, 2]
    assert {name: (settings.output_dir / name).stat().st_mtime_ns for name in before} == before
    assert sorted(line["file"] for line in manifest(settings.output_dir)) == [
        f"{prompt:03d}-{seed}.png" for prompt in (0, 1) for seed in (3, 4, 5)
    ]
    (settings.output_dir / "000-5.png").unlink()
    (settings.output_dir / "000-4.png").unlink()
    generate(settings)
    assert samples_counted == [4, 2, 1]  # 000-5 again; 000-4 was not asked for, and its line is gone
    assert len(manifest(settings.output_dir)) == 5


def test_a_crash_loses_at_most_the_batch_in_work(settings: GenerateSettings, samples_counted: list[int]) -> None:
    samples_counted.append(-2)
    with pytest.raises(NotAgain):
        generate(replace(settings, batch_size=3))
    path = settings.output_dir / "manifest.jsonl"
    done = manifest(settings.output_dir)
    assert [line["file"] for line in done] == ["000-3.png", "000-5.png", "001-3.png"]
    path.write_text(path.read_text()[:-20])  # cut within the last line
    samples_counted[0] = 0
    assert manifest_after(settings) == generate(settings) and samples_counted == [0, 3, 1]
    assert [line["file"] for line in manifest(settings.output_dir)] == [*(line["file"] for line in done), "001-5.png"]


def manifest_after(settings: GenerateSettings) -> list[dict[str, Any]]:
    generate(settings)
    return manifest(settings.output_dir)


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
def test_pictures_of_other_settings_are_not_touched(
    settings: GenerateSettings, tmp_path: Path, adapter: Path, change: dict[str, Any], said: str
) -> None:
    once = replace(settings, seeds="3")
    generate(once, quiet=True)
    before = {path.name: path.read_bytes() for path in once.output_dir.iterdir()}
    changed = replace(once, **change)
    with pytest.raises(UserError) as error:
        generate(changed)
    assert said in str(error.value) and "--overwrite" in str(error.value)
    assert {path.name: path.read_bytes() for path in once.output_dir.iterdir()} == before
    lines = generate(replace(changed, overwrite=True), quiet=True)
    assert manifest(once.output_dir) == lines  # what was made under other settings is no longer listed
    assert names(once.output_dir) == sorted({*before, *(line["file"] for line in lines)})  # but nothing is deleted


@pytest.mark.parametrize("name", ["000-3.png", "contact_sheet.png", "manifest.jsonl"])
def test_files_of_the_user_are_not_touched(settings: GenerateSettings, name: str) -> None:
    settings.output_dir.mkdir()
    (settings.output_dir / name).write_text("mine\n")
    with pytest.raises(UserError, match=name):
        generate(settings)
    assert names(settings.output_dir) == [name] and (settings.output_dir / name).read_text() == "mine\n"


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
    native.write(moved, tensors, replace(header, base_model=str(other)))
    with pytest.raises(UserError, match="is another model by now") as error:
        generate(replace(settings, adapter=(moved,)))
    assert header.base_hash[:12] in str(error.value) and not settings.output_dir.exists()
    generate(replace(settings, adapter=(moved,), pretrained_model_name_or_path=str(other), seeds="0"))
    assert "it is used on" in capsys.readouterr().err


@pytest.mark.parametrize(
    "change, said",
    [
        ({"adapter": ()}, "--pretrained_model_name_or_path"),
        ({"adapter": (Path("nowhere"),)}, "nowhere: no such file"),
        ({"prompt": ("a dog",)}, "use one of them"),
        ({"prompts": "nowhere.txt"}, "no such prompt file"),
        ({"seeds": "a"}, "--seeds"),
        ({"num_inference_steps": 0}, "--num_inference_steps must be at least 1"),
        ({"batch_size": 0}, "--batch_size must be at least 1"),
        ({"height": 100}, "multiple of 8"),
        ({"scale": (float("nan"),)}, "--scale"),
        ({"scale": (1.0, 0.5)}, "2 numbers for --scale and 1 for --adapter"),
        ({"adapter": (), "pretrained_model_name_or_path": "toyworld", "scale": (0.5,)}, "name it with --adapter"),
        ({"device": "nonsense"}, "--device nonsense"),
        ({"output_dir": Path(__file__)}, "is a file"),
        ({"pretrained_model_name_or_path": "nowhere"}, "no model at nowhere"),
    ],
)
def test_mistakes_are_one_line_and_leave_nothing(settings: GenerateSettings, change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        generate(replace(settings, **change))
    assert said in str(error.value) and "\n" not in str(error.value)
    assert not settings.output_dir.exists()


def test_the_base_model_alone_needs_words_for_templates_only(settings: GenerateSettings) -> None:
    base = replace(settings, adapter=(), pretrained_model_name_or_path=manifest_base(settings), seeds="0")
    with pytest.raises(UserError, match="--identifier"):
        generate(base)
    with pytest.raises(UserError, match="--class_noun"):
        generate(replace(base, identifier=""))
    assert generate(replace(base, identifier="", class_noun="cat"))[0]["prompt"] == "a photo of a cat in the snow"
    with pytest.raises(UserError, match="what shall the pictures show"):
        generate(replace(base, prompts=None))


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
        "import sys, singlora_diffusion.sampling.generate; assert not {'torch', 'diffusers', 'PIL'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
