"""An output folder: runs know their own files, and nothing of anybody else is overwritten, moved or deleted."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

import train_dreambooth
from singlora_diffusion import files, formats
from singlora_diffusion.data import png
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import as_json, replaced
from singlora_diffusion.training import checkpoint, loop, run_folder
from singlora_diffusion.training.events import Checkpoint, PutAway, Resumed
from singlora_diffusion.training.recipe import Recipe, recorded


@pytest.fixture(scope="module")
def finished(
    tiny_model: Path, training_images: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Recipe, Path, Path]:
    """A recipe, the folder of its run of four steps, a checkpoint at each, and its images: to be copied."""
    from singlora_diffusion.settings import build

    here = tmp_path_factory.mktemp("finished")
    made = build(
        Recipe,
        instance_data_dir=training_images,
        instance_prompt="a photo of sks dog",
        output_dir=here / "run",
        pretrained_model_name_or_path=str(tiny_model),
        max_train_steps=4,
        train_batch_size=2,
        rank=2,
        validation_steps=4,
        num_validation_images=1,
        checkpointing_steps=1,
        report_to="none",
        device="cpu",
    )
    train_dreambooth.main(made)
    return made, here / "run", training_images


@pytest.fixture
def run(finished: tuple[Recipe, Path, Path], tmp_path: Path) -> Recipe:
    """The recipe of a finished run, with a copy of its folder and of its images."""
    made, folder, images = finished
    shutil.copytree(folder, tmp_path / "run")
    shutil.copytree(images, tmp_path / "images")
    return replaced(made, output_dir=tmp_path / "run", instance_data_dir=tmp_path / "images")


def out(recipe: Recipe) -> Path:
    return recipe.output.output_dir


def contents(folder: Path) -> dict[str, str]:
    return {str(path.relative_to(folder)): files.sha256(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def steps(recipe: Recipe) -> list[int]:
    return [json.loads(line)["step"] for line in (out(recipe) / "log.jsonl").read_text().splitlines()]


def resume(recipe: Recipe, wanted: str = "latest", **change: Any) -> Path:
    return train_dreambooth.main(replaced(recipe, resume_from_checkpoint=wanted, **change))


def edit(path: Path, **values: Any) -> None:
    state = json.loads(path.read_text())
    path.write_text(json.dumps({**state, **values}))


# ---- whose files they are


@pytest.mark.parametrize(
    "stranger",
    ["checkpoint-2/weights.bin", "recipe.json", "log.jsonl", "previews/step-000002.png", "checkpoint-7"],
)
@pytest.mark.parametrize("flags", [{}, {"overwrite": True}, {"resume_from_checkpoint": "latest"}], ids=str)
def test_files_of_others_are_in_the_way_and_stay(recipe: Recipe, stranger: str, flags: dict[str, Any]) -> None:
    path = out(recipe) / stranger
    path.parent.mkdir(parents=True)
    path.write_text('{"precious": true}\n')
    with pytest.raises(UserError, match=f"{stranger.split('/')[0]}.* was not written by this program"):
        train_dreambooth.main(replaced(recipe, checkpointing_steps=2, **flags))
    assert path.read_text() == '{"precious": true}\n'
    assert [entry for entry in out(recipe).rglob("*") if entry.is_file()] == [path]


def test_other_files_in_the_folder_are_nobodys_business(run: Recipe) -> None:
    (out(run) / "notes.txt").write_text("precious")
    (out(run) / "previews" / "holiday.png").write_bytes(b"precious")
    (out(run) / "checkpoint-final").mkdir()
    train_dreambooth.main(replaced(run, overwrite=True))
    assert (out(run) / "notes.txt").read_text() == "precious"
    assert (out(run) / "previews" / "holiday.png").read_bytes() == b"precious"
    assert (out(run) / "checkpoint-final").is_dir()


def test_a_run_is_not_begun_anew_unasked_and_both_ways_on_are_named(run: Recipe) -> None:
    before = contents(out(run))
    with pytest.raises(UserError, match=r"adapter\.safetensors exists.*--overwrite"):
        train_dreambooth.main(run)
    assert contents(out(run)) == before
    (out(run) / "adapter.safetensors").unlink()  # as after a kill
    with pytest.raises(UserError, match=r"checkpoint-4.*--resume_from_checkpoint latest.*--overwrite"):
        train_dreambooth.main(run)


def test_overwriting_puts_the_old_run_away(run: Recipe) -> None:
    before = contents(out(run))
    events = list(loop.run(replaced(run, overwrite=True, max_train_steps=2, learning_rate=5e-4)))
    assert PutAway(out(run) / ".old-1") in events
    assert contents(out(run) / ".old-1") == {name: digest for name, digest in before.items() if name != ".lock"}
    assert [path.name for path in run_folder.checkpoints(out(run))] == ["checkpoint-1", "checkpoint-2"]
    assert not list((out(run) / "previews").glob("*"))
    list(loop.run(replaced(run, overwrite=True, max_train_steps=1)))
    assert (out(run) / ".old-2" / "checkpoint-2").is_dir()


@pytest.mark.parametrize("litter", [".DS_Store", "Thumbs.db"])
def test_what_file_managers_leave_does_not_hide_a_checkpoint(run: Recipe, litter: str) -> None:
    (out(run) / "checkpoint-4" / litter).write_bytes(b"litter")
    resume(run, max_train_steps=5)
    assert steps(run) == [1, 2, 3, 4, 5]


@pytest.mark.parametrize("named", [True, False])
def test_class_images_of_the_user_are_not_put_away(run: Recipe, named: bool) -> None:
    folder = out(run) / "class_images"
    folder.mkdir()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(folder / "mine.png")
    png.write(Image.new("RGB", (40, 40), (9, 2, 3)), folder / "class-0-00000.png")
    again = replaced(run, overwrite=True, with_prior_preservation=True, num_class_images=1, max_train_steps=1)
    events = loop.run(replaced(again, class_data_dir=folder) if named else again)
    assert PutAway(out(run) / ".old-1") in list(events)
    assert {path.name for path in folder.iterdir()} == {"mine.png", *(["class-0-00000.png"] if named else [])}
    assert (out(run) / ".old-1" / "class_images" / "class-0-00000.png").exists() != named


def test_a_shorter_run_keeps_its_own_checkpoints(run: Recipe) -> None:
    train_dreambooth.main(replaced(run, overwrite=True, max_train_steps=2, checkpoints_total_limit=1))
    assert [path.name for path in run_folder.checkpoints(out(run))] == ["checkpoint-2"]


def test_a_run_that_saved_nothing_is_begun_anew(run: Recipe) -> None:
    for path in (out(run) / "adapter.safetensors", *run_folder.checkpoints(out(run))):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_dreambooth.main(replaced(run, checkpointing_steps=0))
    assert steps(run) == [1, 2, 3, 4] and (out(run) / ".old-1" / "log.jsonl").exists()


def test_two_trainings_cannot_share_a_folder(recipe: Recipe) -> None:
    with files.locked(out(recipe), "a training"), pytest.raises(UserError, match="a training is running there already"):
        train_dreambooth.main(recipe)
    train_dreambooth.main(recipe)


def test_what_killed_writers_left_is_removed(recipe: Recipe) -> None:
    out(recipe).mkdir()
    for name in (".adapter.safetensors.part-ab12.safetensors", ".adapter.safetensors.77.part.safetensors"):
        (out(recipe) / name).write_bytes(b"half")
    (out(recipe) / ".checkpoint-3.part").mkdir()
    (out(recipe) / ".checkpoint-3.old").mkdir()
    train_dreambooth.main(recipe)
    assert sorted(path.name for path in out(recipe).iterdir()) == [
        ".lock",
        "README.md",
        "adapter.safetensors",
        "log.jsonl",
        "recipe.json",
    ]


@pytest.mark.parametrize("place", ["file/below", "x" * 300, "/proc/nowhere/run"])
def test_folders_that_cannot_be_are_named_in_one_line(recipe: Recipe, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("a file")
    with pytest.raises(UserError, match=r"--output_dir|cannot be written to"):
        train_dreambooth.main(replaced(recipe, output_dir=tmp_path / place))


def test_a_full_disk_is_one_line_and_the_last_checkpoint_stays(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    said = r"checkpoint-4.*: cannot be written: No space left on device; what was learned by step 2 is in .*-2"
    with pytest.raises(UserError, match=said):
        for event in loop.run(replaced(recipe, checkpointing_steps=2)):
            if isinstance(event, Checkpoint):
                monkeypatch.setattr(checkpoint, "save_file", full)
    assert checkpoint.read(out(recipe) / "checkpoint-2").step == 2
    assert sorted(path.name for path in out(recipe).iterdir()) == [".lock", "checkpoint-2", "recipe.json"]


# ---- resuming


def test_a_longer_run_goes_on_from_the_end_of_a_shorter_one(run: Recipe) -> None:
    resume(run, max_train_steps=6)
    assert steps(run) == [1, 2, 3, 4, 5, 6]
    with pytest.raises(UserError, match=r"checkpoint-6 has done 6 steps already: --max_train_steps 5"):
        resume(run, max_train_steps=5)


def test_a_run_killed_before_its_last_write_is_finished_without_a_step(run: Recipe) -> None:
    """The ramp stands where the last step left it."""
    adapter, last = out(run) / "adapter.safetensors", out(run) / "checkpoint-4" / "adapter.safetensors"
    adapter.unlink()
    resume(run)
    assert formats.read_header(adapter).u == formats.read_header(last).u == 1.0
    assert all(tensor.equal(load_file(last)[name]) for name, tensor in load_file(adapter).items())


def test_an_adapter_of_another_program_is_not_replaced(run: Recipe) -> None:
    save_file({"weight": load_file(out(run) / "adapter.safetensors").popitem()[1]}, out(run) / "adapter.safetensors")
    before = contents(out(run))
    with pytest.raises(UserError, match=r"adapter\.safetensors.*move it away"):
        resume(run, max_train_steps=5)
    with pytest.raises(UserError, match=r"adapter\.safetensors.*move it away"):
        train_dreambooth.main(replaced(run, overwrite=True))
    assert contents(out(run)) == before


def test_checkpoints_of_later_steps_make_way(run: Recipe) -> None:
    before = load_file(out(run) / "adapter.safetensors")
    resume(run, str(out(run) / "checkpoint-2"), checkpointing_steps=0)
    assert [path.name for path in run_folder.checkpoints(out(run))] == ["checkpoint-1", "checkpoint-2"]
    assert sorted(path.name for path in (out(run) / ".old-1").iterdir()) == ["checkpoint-3", "checkpoint-4"]
    assert all(tensor.equal(before[name]) for name, tensor in load_file(out(run) / "adapter.safetensors").items())
    assert steps(run) == [1, 2, 3, 4]


def test_another_runs_checkpoints_are_not_resumed(run: Recipe, tmp_path: Path) -> None:
    Image.new("RGB", (40, 36), (1, 2, 3)).save(tmp_path / "images" / "1.png")
    with pytest.raises(UserError, match=r"other instance images \(changed: 1.png\)"):
        resume(run)
    answers = iter([False, True])
    list(loop.run(replaced(run, overwrite=True, checkpointing_steps=0), stop=lambda: next(answers)))
    assert Resumed(out(run) / "checkpoint-2", 2) in list(loop.run(replaced(run, resume_from_checkpoint="latest")))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"learning_rate": 5e-4}, "--learning_rate 0.001 .now 0.0005"),
        ({"rank": 3}, "--rank 2, now it is 3"),
        ({"train_text_encoder": True}, "--train_text_encoder False"),
        ({"with_prior_preservation": True, "num_class_images": 1}, "--with_prior_preservation False"),
    ],
    ids=str,
)
def test_other_settings_cannot_go_on(run: Recipe, change: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resume(run, **change)


def test_images_may_move_but_not_change(run: Recipe, tmp_path: Path) -> None:
    (tmp_path / "images").rename(tmp_path / "moved")
    resume(run, instance_data_dir=tmp_path / "moved", max_train_steps=5)
    (tmp_path / "moved" / "2.png").unlink()
    with pytest.raises(UserError, match=r"missing: 2\.png"):
        resume(run, instance_data_dir=tmp_path / "moved", max_train_steps=5)


def old_state(run: Recipe, step: int = 4) -> None:
    """As checkpoints were written before there were identities."""
    for path in run_folder.checkpoints(out(run)):
        if run_folder.step_of(path) != step:
            shutil.rmtree(path)
    layers = {"targets": ["to_q", "to_k", "to_v", "to_out.0"], "text_targets": ["q_proj", "k_proj"]}
    recipe = {**as_json(run), **layers, "mixed_precision": "no", "learning_rate": 1e-3}
    (out(run) / f"checkpoint-{step}" / "state.json").write_text(json.dumps({"step": step, "recipe": recipe}))


def test_checkpoints_of_older_versions_are_resumed_with_a_remark(
    run: Recipe, capsys: pytest.CaptureFixture[str]
) -> None:
    old_state(run)
    with pytest.raises(UserError, match="--seed 0"):
        resume(run, seed=1)
    with pytest.raises(UserError, match="--instance_data_dir"):
        resume(run, instance_data_dir=out(run) / ".." / "images")
    resume(run, max_train_steps=5)
    assert "older version" in capsys.readouterr().out
    assert steps(run) == [1, 2, 3, 4, 5]


def test_the_recipe_of_a_run_is_a_config_file(run: Recipe, tmp_path: Path) -> None:
    from singlora_diffusion.training.command_line import Training, parse

    file = out(run) / run_folder.RECIPE
    words = ["--config", str(file), "--output_dir", str(out(run)), "--instance_data_dir", str(tmp_path / "images")]
    again = parse(Training, words, "train", "").recipe
    assert again == replaced(run, mixed_precision="no", learning_rate=1e-3) and recorded(again) == {
        **json.loads(file.read_text()),
        "output_dir": str(out(run)),
        "instance_data_dir": str(tmp_path / "images"),
    }


def damage_optimizer(folder: Path) -> None:
    save_file({}, folder / "optimizer.safetensors")


def damage_step(folder: Path) -> None:
    edit(folder / "state.json", step=3)


def damage_negative(folder: Path) -> None:
    edit(folder / "state.json", step=-4)


def damage_mixture(folder: Path) -> None:
    shutil.copy(folder.parent / "checkpoint-3" / "adapter.safetensors", folder)


def damage_state(folder: Path) -> None:
    (folder / "state.json").write_bytes(b"\xff{")


def damage_missing(folder: Path) -> None:
    (folder / "adapter.safetensors").unlink()


def damage_nonsense(folder: Path) -> None:
    (folder / "state.json").write_text('{"step": 4, "recipe": {}, "files": [1]}')


DAMAGES = [value for name, value in sorted(globals().items()) if name.startswith("damage_")]


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda damage: damage.__name__)
def test_damaged_checkpoints_are_named_and_the_one_before_is_taken(
    run: Recipe, damage: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(out(run) / "checkpoint-4")
    with pytest.raises(UserError, match=r"checkpoint-4 is damaged"):
        resume(run, str(out(run) / "checkpoint-4"))
    expected = load_file(out(run) / "adapter.safetensors")
    resume(run)
    said = capsys.readouterr().out
    assert "checkpoint-4 is damaged" in said and "checkpoint-3 at step 3" in said
    assert steps(run) == [1, 2, 3, 4]
    assert all(tensor.equal(expected[name]) for name, tensor in load_file(out(run) / "adapter.safetensors").items())


@pytest.mark.parametrize("kind", ["shape", "name", "empty", "step"])
def test_old_checkpoints_are_held_to_the_adapter(run: Recipe, kind: str) -> None:
    """They have no digests."""
    old_state(run)
    folder = out(run) / "checkpoint-4"
    moments = load_file(folder / "optimizer.safetensors")
    first = next(name for name, tensor in moments.items() if tensor.ndim)
    if kind == "shape":
        moments[first] = moments[first][:-1].clone()
    elif kind == "name":
        moments["unet.nowhere.A/exp_avg"] = moments.pop(first)
    elif kind == "step":
        edit(folder / "state.json", step=2)
    save_file({} if kind == "empty" else moments, folder / "optimizer.safetensors")
    with pytest.raises(UserError, match="damaged"):
        resume(run)
