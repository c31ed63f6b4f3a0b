"""Adapters of language models, and the article's tables: `pytest tests/test_language.py`."""

from __future__ import annotations

import csv
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

import singlora_diffusion as sd
from eval.language import counts, entailment, finetuning, runs, stability, synthetic, tasks, tiny
from eval.language.__main__ import main
from eval.language.settings import LanguageSettings
from singlora_diffusion.adapters import budget
from singlora_diffusion.models.linear_view import as_linear
from singlora_diffusion.toyworld.captions import PATTERN_WORDS, PLACES
from singlora_diffusion.toyworld.identities import CLASSES, COLOURS


def _roberta() -> nn.Module:
    from transformers import RobertaConfig, RobertaForSequenceClassification

    return RobertaForSequenceClassification(
        RobertaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=24,
            max_position_embeddings=20,
        )
    )


def _gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2ForSequenceClassification

    config = GPT2Config(
        vocab_size=60, n_embd=16, n_layer=2, n_head=2, n_positions=20, bos_token_id=0, eos_token_id=0, pad_token_id=1
    )
    return GPT2ForSequenceClassification(config)


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForSequenceClassification

    return LlamaForSequenceClassification(
        LlamaConfig(
            vocab_size=60,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=24,
            pad_token_id=1,
        )
    )


NETWORKS = {"roberta": (_roberta, "classifier"), "gpt2": (_gpt2, "score"), "llama": (_llama, "score")}
CONFIGS = [
    sd.AdapterConfig(rank=4),
    sd.AdapterConfig(rank=4, init="offset", dora=True),
    sd.AdapterConfig(rank=4, method="lora"),
    sd.AdapterConfig(rank=4, method="dora"),
]


def _made(make: Callable[[], nn.Module]) -> tuple[nn.Module, Callable[[], Any]]:
    """A frozen network of random weights, larger than usual so that all of it counts, and its outputs."""
    torch.manual_seed(0)
    network = make().requires_grad_(False).eval()
    for parameter in network.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.randint(2, 60, (3, 9))
    return network, lambda: network(input_ids=ids)[0].detach()


def _moved(adapter: sd.Adapter) -> None:
    for parameter in adapter.parameters():
        parameter.data.add_(torch.randn_like(parameter), alpha=0.2)


# --- adapters on any network


@pytest.mark.numerical
@pytest.mark.parametrize("config", CONFIGS, ids=lambda c: f"{c.method}{'+dora' * c.dora}")
@pytest.mark.parametrize("kind", NETWORKS)
def test_the_contract_on_a_language_model(kind: str, config: sd.AdapterConfig, tmp_path: Path) -> None:
    """In, saved, out, in again, exported: the same outputs, and the network's own bits in between."""
    from peft import PeftModel

    make, head = NETWORKS[kind]
    network, outputs = _made(make)
    before, weights = outputs(), {key: tensor.clone() for key, tensor in network.state_dict().items()}
    adapter = sd.attach({"model": network}, config)
    layers = [tuple(base.weight.shape) for base in adapter.layers().values()]
    assert adapter.num_parameters() == budget.count(
        "singlora+dora" if config.dora else config.method, config.rank, layers
    )
    _moved(adapter)
    adapted = outputs()
    assert not torch.allclose(adapted, before, atol=1e-3)
    assert {key: tensor.tolist() for key, tensor in network.state_dict().items()} == {
        key: tensor.tolist() for key, tensor in weights.items()
    }
    adapter.merge()
    torch.testing.assert_close(outputs(), adapted)
    adapter.unmerge()
    sd.save(adapter, tmp_path / "adapter.safetensors")
    sd.formats.export_peft(adapter, tmp_path / "peft", heads=[head])
    adapter.detach()
    assert all(torch.equal(tensor, weights[key]) for key, tensor in network.state_dict().items())
    assert torch.equal(outputs(), before)
    again = sd.load(tmp_path / "adapter.safetensors", {"model": network})
    assert torch.equal(outputs(), adapted)
    again.detach()
    nn.init.zeros_(next(network.get_submodule(head).parameters()))  # PEFT brings the head's own
    network = PeftModel.from_pretrained(network, str(tmp_path / "peft")).eval()
    ids = torch.randint(2, 60, (3, 9), generator=torch.Generator().manual_seed(3))
    fresh, _ = _made(make)
    sd.load(tmp_path / "adapter.safetensors", {"model": fresh})
    torch.testing.assert_close(network(input_ids=ids)[0], fresh(input_ids=ids)[0])


@pytest.mark.numerical
def test_the_layer_of_gpt2_is_a_linear_one_the_other_way_round() -> None:
    """y = x W + b with W (in, out); its view shares the memory, and SingLoRA's dW is (out, in) there."""
    network, _ = _made(_gpt2)
    layer: Any = network.get_submodule("transformer.h.0.attn.c_attn")
    view = as_linear(layer)
    assert view is not None and (view.out_features, view.in_features) == (48, 16)
    x = torch.randn(5, 16)
    torch.testing.assert_close(view(x), nn.functional.linear(x, view.weight, view.bias))
    assert view.weight.data_ptr() == layer.weight.data_ptr()
    adapter = sd.attach({"model": network}, sd.AdapterConfig(rank=3, targets=("c_attn",)))
    changes = dict(adapter.delta_weights())
    a = adapter.state_dict()["model.transformer.h.0.attn.c_attn.A"]
    assert a.shape == (48, 3)  # a row for each output of queries, keys and values; the queries' also stand for inputs
    torch.testing.assert_close(changes["model.transformer.h.0.attn.c_attn"], a @ a[:16].T)
    assert as_linear(nn.LayerNorm(3)) is None


def test_what_cannot_be_adapted_is_said_in_one_line() -> None:
    network, _ = _made(_gpt2)
    with pytest.raises(sd.UserError, match=r"'q_proj' in GPT2.*: queries, keys and values are one layer.* c_attn"):
        sd.attach({"model": network}, sd.AdapterConfig(targets=("q_proj",)))
    with pytest.raises(sd.UserError, match="no layer 'to_q' in Sequential; it has "):
        sd.attach({"model": nn.Sequential(nn.Linear(2, 2))}, sd.AdapterConfig())
    with pytest.raises(sd.UserError, match="export_peft"):
        sd.formats.export(sd.attach({"model": network}, sd.AdapterConfig()), None, "lora.safetensors")


def test_a_peft_folder_is_not_overwritten(tmp_path: Path) -> None:
    network, _ = _made(_roberta)
    adapter = sd.attach({"model": network}, sd.AdapterConfig(method="lora"))
    (tmp_path / "adapter_config.json").write_text("mine")
    with pytest.raises(sd.UserError, match="holds a PEFT adapter already"):
        sd.formats.export_peft(adapter, tmp_path)
    assert (tmp_path / "adapter_config.json").read_text() == "mine"


def test_parameters_of_the_articles_models() -> None:
    """r (out + in) and r max(out, in), written out; 12 blocks of 768, 32 of 4096 and 11008."""
    found = {name: counts.count(model) for name, model in counts.MODELS.items()}
    assert found["roberta"]["lora"] == 8 * 12 * 2 * (768 + 768) == 294_912
    assert found["roberta"]["singlora"] == 8 * 12 * 2 * 768 == 147_456
    shapes = [(2304, 768), (768, 768), (3072, 768), (768, 3072)]
    assert found["gpt2"]["lora"] == 8 * 12 * sum(out + into for out, into in shapes) == 1_179_648
    assert found["gpt2"]["singlora"] == 8 * 12 * sum(map(max, shapes)) == 884_736
    shapes = [(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)]
    assert found["llama"]["lora"] == 8 * 32 * sum(out + into for out, into in shapes) == 19_988_480
    assert found["llama"]["singlora"] == 8 * 32 * sum(map(max, shapes)) == 12_648_448
    assert found["llama"]["dora"] == 19_988_480 + 32 * sum(out for out, _ in shapes)


# --- captions that follow from each other, and models pretrained on captions


def _read(caption: str) -> dict[str, str]:
    """What a caption says, read off its words."""
    said = {"cls": next(word for word in caption.split() if word in CLASSES)}
    before = caption.split()[: caption.split().index(said["cls"])]
    if colours := [word for word in before if word in COLOURS]:
        (said["colour"],) = colours
    for pattern, phrasings in PATTERN_WORDS.items():
        if any(word in before if word else end and end in caption for word, end in phrasings):
            said["pattern"] = pattern
    for place, phrasings in PLACES.items():
        if any(caption.endswith(f" {phrase}") for phrase in phrasings):
            said["place"] = place
    return said


@pytest.mark.parametrize("split", entailment.SPLITS)
def test_labels_follow_from_what_the_captions_say(split: entailment.Split) -> None:
    examples = entailment.examples(split, 300)
    assert examples[:30] == entailment.examples(split, 30)
    for one in examples:
        premise, hypothesis = _read(one.premise), _read(one.hypothesis)
        if any(premise.get(name, value) != value for name, value in hypothesis.items()):
            assert entailment.LABELS[one.label] == "contradicted"
        else:
            assert entailment.LABELS[one.label] == ("entailed" if set(hypothesis) <= set(premise) else "open")
        assert entailment.held_out(premise["cls"], premise.get("colour")) == (split == "test")
        if split == "train":
            assert not entailment.held_out(hypothesis["cls"], hypothesis.get("colour"))


def test_two_captions_of_a_document_are_of_one_object() -> None:
    for first, second in entailment.documents(100):
        one, other = _read(first), _read(second)
        assert all(other.get(name, value) == value for name, value in one.items())


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of the three kinds, pretrained for two steps."""
    folder = tmp_path_factory.mktemp("language")
    tiny.run(tiny.PretrainSettings(output_dir=folder, steps=2))
    return folder


def test_pretraining_makes_folders_of_transformers(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(models / "gpt2")
    ids = tokens("a red cat", "in the snow")["input_ids"]
    assert tokens.decode(ids) == "<s> a red cat </s> in the snow </s>"
    (batch,) = tiny.batches(tiny.KINDS["gpt2"], tokens, 1, 0)
    real = batch["attention_mask"].bool()
    assert torch.equal(batch["labels"][real], batch["input_ids"][real]) and bool((batch["labels"][~real] == -100).all())
    (batch,) = tiny.batches(tiny.KINDS["roberta"], tokens, 1, 0)
    asked = batch["labels"] != -100
    assert torch.equal(asked, batch["input_ids"] == tokens.mask_token_id)
    assert 0.2 < float(asked.sum() / (batch["labels"].new_ones(()) * real.sum())) < 0.3  # 3 in 10 of the words
    assert tokens.unk_token_id not in batch["labels"]
    tiny.run(tiny.PretrainSettings(output_dir=models, steps=2))
    assert capsys.readouterr().out.count("is there already") == 3


# --- fine-tuning


def _settings(folders: Path, out: Path, **changed: Any) -> LanguageSettings:
    given = {"models": (str(folders / "roberta"),), "methods": ("singlora",), "rates": (1e-2,), "seeds": 1, "epochs": 2}
    return LanguageSettings(**{**given, "max_train_examples": 70, "output_dir": out, **changed})


@pytest.fixture(scope="session")
def task() -> tasks.Task:
    train, test = tasks.load("toyworld", 70)[:2]
    return tasks.Task(train, tasks.Pairs(test.first[:60], test.second[:60], test.labels[:60]), 3)


def test_a_run_that_was_killed_goes_on_to_the_same_bits(models: Path, task: tasks.Task, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    def kill(row: Any) -> None:
        raise Killed

    whole, parts = (_settings(models, tmp_path / name, lora_dropout=0.1) for name in ("whole", "parts"))
    (cell,) = runs.cells(whole)
    expected = runs.run(whole, cell, task)
    with pytest.raises(Killed):
        runs.run(parts, cell, task, kill)
    shown: list[Any] = []
    assert runs.result(parts, cell) is None
    found = runs.run(parts, cell, task, shown.append)
    assert [row["epoch"] for row in shown] == [2] and shown[0]["step"] == 6
    assert found["accuracy"] == expected["accuracy"]
    one, other = (runs.folder(settings, cell) for settings in (whole, parts))
    for name in (runs.ADAPTER, runs.CLASSIFIER, f"{runs.PEFT}/adapter_model.safetensors"):
        assert (one / name).read_bytes() == (other / name).read_bytes()
    lines = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
    assert [(line["step"], line["epoch"]) for line in lines] == [(3, 1), (6, 2)]
    assert sorted(path.name for path in other.glob("c*-*")) == ["checkpoint-6", "classifier-6.safetensors"]
    with pytest.raises(sd.UserError, match=r"was made with rank 8, now it is 4"):
        runs.run(dataclasses.replace(parts, rank=4), cell, task)


@pytest.mark.parametrize(("kind", "alpha", "decays"), [("roberta", 8, True), ("gpt2", 8, True), ("llama", 16, False)])
def test_a_model_is_trained_as_in_the_article(
    kind: str, alpha: float, decays: bool, models: Path, task: tasks.Task, tmp_path: Path
) -> None:
    settings = _settings(models, tmp_path, models=(str(models / kind),), rates=(), epochs=None)
    (cell,) = runs.cells(settings)
    made = finetuning.prepared(settings, cell, task)
    assert made.adapter is not None and made.adapter.config.alpha == alpha and made.adapter.config.rank == 8
    assert made.adapter.config.lora_dropout == (0 if decays else 0.1)
    assert made.epochs == (3 if decays else 1) and cell.rate == (1e-3 if decays else 1e-4)
    assert [made.factor(step) for step in (1, 2)] == ([1, 8 / 9] if decays else [1, 1])
    trained = {name for name, p in made.network.named_parameters() if p.requires_grad}
    assert all("delta" in name or name.startswith(made.head) for name in trained)
    assert sum(finetuning.parameters(made).values()) == sum(
        p.numel() for p in made.network.parameters() if p.requires_grad
    )


def test_a_run_that_diverges_scores_what_the_most_frequent_class_does(
    models: Path, task: tasks.Task, tmp_path: Path
) -> None:
    settings = _settings(models, tmp_path, rates=(1e9,), models=(str(models / "llama"),), keep_adapters=False)
    (cell,) = runs.cells(settings)
    found = runs.run(settings, cell, task)
    assert found["diverged"] and found["accuracy"] == finetuning.majority(task.test) == 20 / 60
    assert json.loads((runs.folder(settings, cell) / "log.jsonl").read_text())["loss"] is None


def test_the_command_prints_tables_and_plots(
    models: Path, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tasks, "load", lambda name, most: task)
    words = ["--models", str(models / "roberta"), "--methods", "singlora", "lora+", "frozen", "--seeds", "2"]
    words += ["--rates", "1e-3", "1e-2", "--epochs", "1", "--no_keep_adapters", "--output_dir", str(tmp_path)]
    main(words)
    printed = capsys.readouterr().out
    assert printed.count("epoch 1, loss") == 12 and "SingLoRA's window within 1 % of the best against LoRA+" in printed
    heads, *rows = csv.reader((tmp_path / "runs.csv").read_text().splitlines())
    assert len(rows) == 12 and all(0 <= float(row[heads.index("accuracy")]) <= 1 for row in rows)
    assert (tmp_path / "roberta.svg").read_text().startswith("<svg")
    assert len((tmp_path / "verdict.txt").read_text().splitlines()) == 2
    main(words)
    assert "epoch" not in capsys.readouterr().out  # all is done already


def test_bad_input_is_one_line(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(sd.UserError, match=r"--task mnli needs datasets: pip install 'singlora-diffusion\[language\]'"):
        tasks.load("mnli")

    def refuse(*args: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=refuse))
    with pytest.raises(sd.UserError, match=r"--task qqp: neither on the network nor in the cache of datasets \(no ro"):
        tasks.load("qqp")
    with pytest.raises(sd.UserError, match="nowhere: no model that can be loaded"):
        runs.cells(_settings(tmp_path, tmp_path, models=("nowhere",), rates=()))
    with pytest.raises(sd.UserError, match="two are called roberta"):
        runs.cells(_settings(models, tmp_path, models=(str(models / "roberta"), "roberta")))


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has fp16")
def test_fp16_takes_a_gpu(models: Path, task: tasks.Task, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(AcceleratorState, "_shared_state", {})  # as in a program of its own
    settings = _settings(models, tmp_path, mixed_precision="fp16")
    with pytest.raises(sd.UserError, match="--mixed_precision fp16 takes a GPU"):
        runs.run(settings, runs.cells(settings)[0], task)


def test_a_task_of_glue_is_read_by_its_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = {"question1": ["a", "b"], "question2": ["c", "d"], "label": [0, 1]}
    given = {"train": rows, "validation": {**rows, "question1": ["e", "f"]}}
    asked: list[Any] = []
    stand_in = SimpleNamespace(load_dataset=lambda *names: asked.append(names) or given)
    monkeypatch.setitem(sys.modules, "datasets", stand_in)
    found = tasks.load("qqp", 1)
    assert asked == [("nyu-mll/glue", "qqp")]
    assert found == tasks.Task(tasks.Pairs(["a"], ["c"], [0]), tasks.Pairs(["e", "f"], ["c", "d"], [0, 1]), 2)


# --- statistics over rates, and the synthetic problem


def test_stability_of_known_curves() -> None:
    rates = [1e-3 * 2**place for place in range(8)]
    flat = dict.fromkeys(rates, 0.8)
    peaked = {rate: 0.8 - 0.1 * abs(place - 3) for place, rate in enumerate(rates)}
    noise = (-0.002, 0.0, 0.002)
    found = stability.curves(
        {
            (model, method, rate): [mean + one for one in noise]
            for model in ("a", "b", "c")
            for method, means in (("singlora", flat), ("lora", peaked))
            for rate, mean in means.items()
        }
    )
    one, other = found[0], found[1]
    assert one.window == pytest.approx(np.log10(2**7)) and one.factor_of_two == pytest.approx(0)
    assert other.window == pytest.approx(2 * 0.08 * np.log10(2))  # 0.008 of 0.1 on either side
    assert other.factor_of_two == pytest.approx(0.1) and other.rates[other.best] == 8e-3 and not other.at_the_edge
    assert one.between == 0  # the seeds' own variation is taken out
    assert other.between == pytest.approx(np.std(list(peaked.values()), ddof=1), rel=1e-3)
    words = [verdict.words for verdict in stability.verdicts(found)]
    assert words[0].startswith("window within 1 % of the best against LoRA: wider, +2.06")
    assert words[1].startswith("range of accuracies against LoRA: smaller, -40.00 (-40.00 to -40.00) points")
    assert stability.plot("a", found).startswith("<svg")


def test_stability_is_of_the_seeds_that_all_rates_have() -> None:
    (one,) = stability.curves({("a", "lora", 1e-3): [0.5, 0.6], ("a", "lora", 2e-3): [0.7]})
    assert one.accuracies.tolist() == [[0.5, 0.7]]


PROBLEM = synthetic.SyntheticSettings(seeds=3, steps=2, width=12, tokens=5, rank=2, tuning_seeds=1)


@pytest.mark.numerical
@pytest.mark.parametrize("name", synthetic.RULES)
def test_the_synthetic_loss_and_its_first_steps(name: str) -> None:
    """Against the problem written out with whole matrices and torch's autograd, seed by seed."""
    steps, found = synthetic.losses(PROBLEM, name, (1e-2, 1e-3), range(3))
    assert steps.tolist() == [0, 1, 2]
    for seed in range(3):
        draw = torch.Generator().manual_seed(seed)
        x = nn.functional.normalize(torch.randn(5, 12, generator=draw))
        weights = [torch.randn(12, 12, generator=draw) / 12**0.5 for _ in range(2)]
        z = torch.randn(5, 5, generator=draw)
        rank = 2 if name == "lora" else 4
        trained = []
        for _ in range(2):
            a = torch.empty(12, rank).uniform_(-1, 1, generator=draw) / 12**0.5
            trained += [a] if name == "singlora" else [a, torch.zeros(rank, 12)]
        optimizer = torch.optim.AdamW([p.requires_grad_() for p in trained], lr=1e-2)
        for step in range(3):
            ups, downs = (trained, [a.T for a in trained]) if name == "singlora" else (trained[::2], trained[1::2])
            pairs = [up @ down for up, down in zip(ups, downs, strict=True)]
            q, k = (weight + pair for weight, pair in zip(weights, pairs, strict=True))
            loss = (x @ q @ k.T @ x.T - z).square().mean()
            assert found[0, seed, step] == pytest.approx(float(loss.detach()), rel=1e-4)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()


def test_the_synthetic_problem_is_measured_at_one_budget(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    equal = synthetic.parameters(PROBLEM, "singlora")
    assert equal == synthetic.parameters(PROBLEM, "lora") == synthetic.parameters(PROBLEM, "lora, rank 2r") / 2 == 96
    assert synthetic.tuned(PROBLEM, "lora") == 1e-2  # two steps: the largest gets furthest
    synthetic.run(dataclasses.replace(PROBLEM, output_dir=tmp_path))
    heads, *rows = csv.reader((tmp_path / "losses.csv").read_text().splitlines())
    assert len(rows) == 6 and (tmp_path / "synthetic.svg").read_text().startswith("<svg")
    assert "1e-05" in rows[0] and "own best" in rows[1][heads.index("rate")]
