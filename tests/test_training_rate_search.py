"""`--learning_rate auto`: which rate is taken, that nothing is left of the search, and that a resumed run has none."""

from __future__ import annotations

import gc
import itertools
import json
import math
import shutil
import weakref
from collections.abc import Callable, Generator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from singlora_diffusion.adapters import METHODS
from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import replaced
from singlora_diffusion.training import held_out, loop, plan, preparation, rate_search
from singlora_diffusion.training.events import Event, Loaded, Progress, Remark, Step
from singlora_diffusion.training.examples import Batch
from singlora_diffusion.training.rate_search import FACTOR, MOST, Cost, Trial, cheapest, climb
from singlora_diffusion.training.recipe import Recipe, check
from singlora_diffusion.training.step import Denoiser, Stepper


@pytest.fixture
def auto(recipe: Recipe, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    monkeypatch.setattr(rate_search, "AT_LEAST", 2)
    monkeypatch.setattr(rate_search, "MOST", 2)
    monkeypatch.setattr(held_out, "DRAWS", 1)
    return replaced(recipe, learning_rate="auto", max_train_steps=4, checkpointing_steps=2, validation_steps=0)


def climbed(cost: Callable[[float], float], start: float = 1e-3) -> dict[float, Cost]:
    """What is tried, in its order, where a rate costs this."""

    def trial(rate: float) -> Trial:
        yield Remark("")
        return Cost(cost(rate), 0.0)

    steps: Generator[Event, None, dict[float, Cost]] = climb(trial, start)
    while True:
        try:
            next(steps)
        except StopIteration as end:
            found: dict[float, Cost] = end.value
            return found


@pytest.mark.parametrize("place", range(-4, 5))
def test_a_single_valley_is_descended_to_its_bottom(place: int) -> None:
    best = 1e-3 * FACTOR**place
    tried = climbed(lambda rate: abs(math.log(rate / best)))
    assert cheapest(tried) == pytest.approx(best, rel=1e-2)  # rates have three digits
    assert len(tried) == 3 + abs(place) - (place > 0)  # below the start, the first one above it was tried in vain
    neighbours = {cheapest(tried) * FACTOR, cheapest(tried) / FACTOR}
    assert all(any(math.isclose(one, rate, rel_tol=1e-2) for rate in tried) for one in neighbours)


def test_a_search_ends_and_rates_that_diverge_are_too_high() -> None:
    assert len(climbed(lambda rate: -rate)) == len(climbed(lambda rate: rate)) == MOST
    only = climbed(lambda rate: math.inf if rate > 5e-4 else 1 / rate)
    assert cheapest(only) == pytest.approx(1e-3 / FACTOR, rel=1e-2)


CHANGES = [
    {
        "dora": True,
        "train_text_encoder": True,
        "ema_decay": 0.9,
        "lr_scheduler": "cosine",
        "held_out_data_dir": "images",
    },
    {"method": "lora+", "with_prior_preservation": True, "num_class_images": 0, "optimizer": "lion"},
]


@pytest.mark.numerical
@pytest.mark.parametrize("change", CHANGES, ids=str)
def test_a_run_is_the_one_at_the_rate_that_it_found_and_so_is_a_resumed_one(
    auto: Recipe, change: dict[str, object], training_images: Path, tmp_path: Path
) -> None:
    if "held_out_data_dir" in change:
        change = {**change, "held_out_data_dir": training_images, "validation_steps": 1_000_000}
    auto = replaced(auto, **change)
    events = list(loop.run(auto))
    found = json.loads((auto.output.output_dir / "recipe.json").read_text())["learning_rate"]
    judged = "held-out" if "held_out_data_dir" in change else "training"
    assert f"learning rate {found:g}: " in said(events) and f"loss on {judged} images" in said(events)
    assert trials(events) == rate_search.MOST

    given = list(loop.run(replaced(auto, learning_rate=found, output_dir=tmp_path / "given")))
    cut = replaced(auto, output_dir=tmp_path / "cut", resume_from_checkpoint="latest")
    shutil.copytree(auto.output.output_dir / "checkpoint-2", cut.output.output_dir / "checkpoint-2")
    resumed = list(loop.run(cut))
    assert trials(given) == trials(resumed) == 0
    assert figures(given) == figures(events) and figures(resumed) == figures(events)[2:]
    for other in ("given", "cut"):
        for name in ("adapter.safetensors", "checkpoint-4/optimizer.safetensors"):
            first, second = load_file(auto.output.output_dir / name), load_file(tmp_path / other / name)
            assert first.keys() == second.keys()
            assert all(torch.equal(first[key], second[key]) for key in first), (other, name)


def said(events: list[Event]) -> str:
    return " ".join(event.text for event in events if isinstance(event, Remark))


def trials(events: list[Event]) -> int:
    return len({event.what for event in events if isinstance(event, Progress) and "rate" in event.what})


def figures(events: list[Event]) -> list[tuple[float, ...]]:
    return [(one.step, one.loss, one.lr, one.u, one.grad_norm) for one in events if isinstance(one, Step)]


@pytest.mark.parametrize(
    ("model", "method"),
    [("tiny_model", "lora"), ("tiny_model", "dora"), ("tiny_model", "oft"), ("tiny_model", "lokr")]
    + [(model, "singlora") for model in ("tiny_sdxl", "tiny_sd3", "tiny_flux", "tiny_flux2")],
)
def test_every_method_and_family_is_searched_for(
    auto: Recipe, model: str, method: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rate_search, "AT_LEAST", 1)
    monkeypatch.setattr(rate_search, "MOST", 1)
    folder = str(request.getfixturevalue(model))
    steps = loop.run(replaced(auto, pretrained_model_name_or_path=folder, method=method))
    events = list(itertools.takewhile(lambda event: not isinstance(event, Loaded), steps))
    steps.close()  # type: ignore[attr-defined]
    assert trials(events) == 1 and "learning rate" in said(events)


def test_the_cost_is_the_loss_and_what_the_class_has_lost(auto: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate of almost nothing, an adapter that starts at zero has changed nothing of the class."""
    costs: list[Cost] = []
    networks: list[weakref.ref[Denoiser]] = []
    cost = rate_search._cost

    def seen(stepper: Stepper, batches: list[Batch]) -> Cost:
        costs.append(cost(stepper, batches))
        networks.append(weakref.ref(stepper.denoiser))
        assert stepper.loss_on(batches) == costs[-1].subject
        return costs[-1]

    monkeypatch.setattr(rate_search, "usual_rate", lambda recipe, family: 1e-30)
    monkeypatch.setattr(rate_search, "_cost", seen)
    events = loop.run(replaced(auto, method="lora"))
    next(event for event in events if isinstance(event, Loaded))
    assert costs[0].prior == 0.0 and costs[0].subject > 0.0
    gc.collect()
    assert len(networks) == rate_search.MOST and all(network() is None for network in networks)  # nor is anything kept
    events.close()  # type: ignore[attr-defined]


def test_a_search_that_only_diverges_is_told(auto: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_search, "_cost", lambda *given: Cost(math.inf, 0.0))
    with pytest.raises(UserError, match="at no rate: give one"):
        list(loop.run(auto))
    assert not (auto.output.output_dir / "recipe.json").exists()


def test_an_optimizer_that_finds_its_rate_is_not_searched_for(auto: Recipe) -> None:
    with pytest.raises(UserError, match="--learning_rate auto: --optimizer prodigy finds the rate itself"):
        check(replaced(auto, optimizer="prodigy"))


def test_a_plan_says_that_there_will_be_a_search(auto: Recipe, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rate_search, "MOST", 7)
    made = plan.make(auto)
    assert made.recipe["learning_rate"] == "auto"
    assert any("--learning_rate auto: 3 to 7 short trainings of 2 steps" in line for line in made.remarks)
    assert made.seconds is not None and made.seconds_per_step is not None
    assert made.seconds >= made.seconds_per_step * (4 + 3 * 2)


def test_trials_are_a_tenth_of_the_training(recipe: Recipe) -> None:
    assert [rate_search.steps(replaced(recipe, max_train_steps=steps)) for steps in (4, 150, 400)] == [10, 15, 40]


def test_the_usual_rate_follows_model_method_and_optimizer(recipe: Recipe) -> None:
    def usual(**change: object) -> float:
        return preparation.usual_rate(replaced(recipe, **change), SimpleNamespace(learning_rate=2e-3))  # type: ignore[arg-type]

    assert usual() == usual(method="lora") == usual(dora=True) == 2e-3
    assert usual(method="lora+") == pytest.approx(4e-4)
    assert usual(method="lora+", optimizer="lion") == pytest.approx(4e-5)
    assert usual(optimizer="prodigy") == usual(optimizer="prodigy", method="lora+") == 1.0


def test_the_page_of_methods_has_their_rates() -> None:
    page = (Path(__file__).parents[1] / "docs/methods.md").read_text().partition("## Learning rates")[2]
    page = page.partition("| base model")[0]
    rows = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| `")]
    told = {name.strip("`"): float(factor) for cell, factor, *_ in rows[1:] for name in cell.split(", ")}
    assert told == {name: method.rate for name, method in METHODS.items()}
