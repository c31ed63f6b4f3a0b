"""The loop as whoever listens to it sees it: a stream of events, and nothing else."""

from __future__ import annotations

import ast
from itertools import groupby
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import train_dreambooth
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import loop
from singlora_diffusion.training.events import Event, Interrupted, Saved, Step
from singlora_diffusion.training.recipe import Recipe

ROOT = Path(__file__).parent.parent
ROOM = [*(ROOT / "singlora_diffusion" / "training").glob("*.py"), ROOT / "train_dreambooth.py"]


def kinds(events: list[Event]) -> list[str]:
    return [kind for kind, _ in groupby(type(event).__name__ for event in events)]


def test_a_run_is_a_stream_of_events(recipe: Recipe, capfd: pytest.CaptureFixture[str]) -> None:
    events = list(loop.run(replaced(recipe, checkpointing_steps=2, validation_steps=4, num_validation_images=1)))
    begin = ["Images", "Progress", "Encoded", "Loaded", "Started"]
    assert kinds(events) == [*begin, "Step", "Checkpoint", "Step", "Preview", "Checkpoint", "Saved"]
    assert [event.step for event in events if isinstance(event, Step)] == [1, 2, 3, 4]
    last = events[-1]
    assert isinstance(last, Saved) and last.size == last.path.stat().st_size
    assert not (recipe.output.output_dir / "log.jsonl").exists()  # that is a listener's
    assert capfd.readouterr().out == ""


def test_a_run_stops_when_it_is_asked_and_goes_on_from_there(recipe: Recipe, tmp_path: Path) -> None:
    recipe = replaced(recipe, train_text_encoder=True)
    answers = iter([False, True])
    events = list(loop.run(recipe, stop=lambda: next(answers)))
    saved = recipe.output.output_dir / "checkpoint-2"
    assert events[-1] == Interrupted(2, saved) and not (recipe.output.output_dir / "adapter.safetensors").exists()
    resumed = list(loop.run(replaced(recipe, resume_from_checkpoint="latest")))
    assert kinds(resumed) == ["Images", "Progress", "Encoded", "Loaded", "Resumed", "Started", "Step", "Saved"]
    unbroken = list(loop.run(replaced(recipe, output_dir=tmp_path / "unbroken")))
    losses = [[event.loss for event in run if isinstance(event, Step)] for run in (events, resumed, unbroken)]
    assert losses[0] + losses[1] == losses[2]
    one, other = (load_file(run[-1].path) for run in (resumed, unbroken) if isinstance(run[-1], Saved))
    assert all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_asked_to_stop_after_the_last_step_a_run_is_finished(recipe: Recipe) -> None:
    events = list(loop.run(replaced(recipe, max_train_steps=1), stop=lambda: True))
    assert isinstance(events[-1], Saved)


def test_the_class_prompt_is_encoded_for_prior_preservation_only(
    recipe: Recipe, monkeypatch: pytest.MonkeyPatch
) -> None:
    from singlora_diffusion.models.stable_diffusion import StableDiffusion

    asked: list[list[str]] = []
    encode = StableDiffusion.encode_prompts
    monkeypatch.setattr(
        StableDiffusion, "encode_prompts", lambda self, texts: asked.append(list(texts)) or encode(self, texts)
    )
    list(loop.run(replaced(recipe, max_train_steps=1, train_text_encoder=True)))
    assert asked == [["a photo of sks dog"]]


def test_the_loop_names_no_model() -> None:
    """It asks a family, whatever its networks are called and however it corrupts."""
    for path in ROOM:
        names = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
        assert not names & {"unet", "transformer", "text_encoder", "tokenizer", "noise_schedule", "scheduler"}, path


def test_no_function_is_longer_than_a_screen() -> None:
    for path in ROOM:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef) and node.end_lineno is not None:
                assert node.end_lineno - node.lineno <= 52, f"{path.name}: {node.name}"
                assert not any(isinstance(part, ast.ClassDef) for part in ast.walk(node)), f"{path.name}: {node.name}"


def test_a_diverged_training_stops_and_keeps_the_step_before(recipe: Recipe) -> None:
    out = recipe.output.output_dir
    with pytest.raises(UserError, match=r"step (\d+): the .* (nan|inf).*--learning_rate .*checkpoint-\d+"):
        train_dreambooth.main(replaced(recipe, learning_rate=1e8, max_train_steps=50, max_grad_norm=1e9))
    kept = sorted(out.glob("checkpoint-*"))
    lines = (out / "log.jsonl").read_text().splitlines()
    assert [path.name for path in kept] == [f"checkpoint-{len(lines)}"]
    assert not (out / "adapter.safetensors").exists()
    assert all(bool(tensor.isfinite().all()) for tensor in load_file(kept[0] / "adapter.safetensors").values())


def test_what_does_not_fit_is_refused_before_it_is_allocated(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    from singlora_diffusion import device

    sampling = {"sample_batch_size": 1000, "num_validation_images": 1000, "validation_steps": 1, "resolution": 512}
    refused: list[tuple[dict[str, Any], int, str]] = [
        ({"resolution": 16_384}, 10**9, "--resolution 16384"),
        ({"train_batch_size": 1_000_000}, 10**9, "--train_batch_size 1000000"),
        (sampling, 10**9, "--sample_batch_size 1000"),
        ({"train_batch_size": 1_000_000, "gradient_checkpointing": True}, 10**9, "--train_batch_size 1000000"),
        ({"rank": 4096}, 10**6, "--rank 4096"),
    ]
    for change, free, words in refused:
        monkeypatch.setattr(device, "free_memory", lambda where, free=free: free)
        with pytest.raises(UserError, match=f"{words}.*: would need about"):
            list(loop.run(replaced(recipe, **change)))
    assert not recipe.output.output_dir.exists()


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_what_a_step_keeps_is_known_before_it(tiny_model: Path, dropout: float) -> None:
    """Counted at another size and batch than it is asked for: what does not grow with the area is in both."""
    from singlora_diffusion import adapters, models
    from singlora_diffusion.adapters import AdapterConfig
    from singlora_diffusion.training import memory

    family = models.load(str(tiny_model))
    adapter = adapters.attach(family.networks, AdapterConfig(rank=4, lora_dropout=dropout))
    adapter.set_step(1)
    own = {parameter.data_ptr() for parameter in family.networks["unet"].module.parameters()}
    kept: dict[int, torch.Tensor] = {}
    conditioning = family.encode_prompts(["a dog"] * 3)
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage().data_ptr(), t), id)
    with hooks, adapter.dropping({"denoiser": range(3)}):
        family.denoise(torch.randn(3, 4, 16, 16), torch.tensor([5, 5, 5]), conditioning)
    counted = sum(tensor.untyped_storage().nbytes() for place, tensor in kept.items() if place not in own)
    with adapter.dropping({"denoiser": memory.SAMPLES}):
        assert memory.of_step(family, 64, 3) == pytest.approx(counted, rel=0.1)
