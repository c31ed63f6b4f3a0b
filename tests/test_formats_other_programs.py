"""What other programs find in an exported file, and what is said of files that come from them."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file

from singlora_diffusion import __version__, adapters, formats, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import commands, exporting, header, lora_pairs
from singlora_diffusion.formats import metadata as facts_of
from singlora_diffusion.models.network import specs

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
CONFIG = AdapterConfig(rank=2, targets=("to_k",), text_targets=("q_proj", "v_proj"))
LAYER = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # (64, 48)
RECIPE = {
    "instance_data_dir": "images/my dog",
    "seed": 3,
    "learning_rate": 1e-3,
    "text_encoder_lr": 5e-5,
    "max_train_steps": 400,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "adam_weight_decay": 0.01,
    "mixed_precision": "no",
    "snr_gamma": None,
}
ABOUT = {
    "step": 400,
    "identifier": "sks",
    "class_noun": "dog",
    "base_model": "somebody/tiny",
    "base_hash": "ab" * 32,
    "prediction_type": "v_prediction",
    "resolution": 512,
    "images": 5,
    "started_at": 1_800_000_000.0,
    "recipe": RECIPE,
}


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="pt") as opened:
        return opened.metadata()


def exported(networks: Any, file: Path, form: str = "kohya", config: AdapterConfig = CONFIG, **about: Any) -> Any:
    adapter = adapters.attach(networks, config, seed=1)
    formats.export(adapter, form, file, about=header.Header(adapter.config, **about))
    adapter.detach()
    return file


def test_another_optimizer_is_named(networks: Any, tmp_path: Path) -> None:
    about = {**ABOUT, "recipe": {**ABOUT["recipe"], "optimizer": "lion"}}
    assert metadata(exported(networks, tmp_path / "x.safetensors", "kohya", **about))["ss_optimizer"] == "lion"


@pytest.mark.parametrize("form", exporting.FORMS)
def test_metadata_that_other_programs_show(form: str, networks: Any, tmp_path: Path) -> None:
    facts = metadata(exported(networks, tmp_path / "my-dog.safetensors", form, **ABOUT))
    expected = {
        "ss_output_name": "my-dog",  # A1111 takes it for the file's name in prompts
        "modelspec.title": "my-dog",
        "modelspec.trigger_phrase": "sks dog",
        "modelspec.date": "2027-01-15T08:00:00+00:00",
        "modelspec.implementation_version": f"singlora-diffusion/{__version__}",
        "modelspec.prediction_type": "v",
        "ss_training_started_at": "1800000000.0",
        "ss_sd_model_name": "tiny",
        "ss_sd_model_hash": "ab" * 32,
        "ss_seed": "3",
        "ss_learning_rate": "0.001",
        "ss_unet_lr": "0.001",
        "ss_text_encoder_lr": "5e-05",
        "ss_optimizer": "torch.optim.adamw.AdamW(betas=(0.9, 0.999),eps=1e-08,weight_decay=0.01)",
        "ss_num_train_images": "5",
        "ss_mixed_precision": "no",
        "ss_clip_skip": "None",
        "ss_steps": "400",
    }
    assert {key: facts.get(key) for key in expected} == expected
    assert json.loads(facts["ss_dataset_dirs"]) == {"my dog": {"n_repeats": 1, "img_count": 5}}
    assert json.loads(facts["ss_bucket_info"]) == {"buckets": {"0": {"resolution": [512, 512], "count": 5}}}
    assert "ss_min_snr_gamma" not in facts and all(facts.values())


def test_nothing_is_made_up_where_nothing_is_known(networks: Any, tmp_path: Path) -> None:
    first, second = (exported(networks, tmp_path / name / "x.safetensors") for name in ("a", "b"))
    facts = metadata(first)
    unknown = ("modelspec.date", "modelspec.prediction_type", "ss_seed", "ss_optimizer", "ss_dataset_dirs")
    assert not set(unknown) & set(facts)
    assert first.read_bytes() == second.read_bytes()  # a function of its contents and its name alone


def test_hashes(networks: Any, tmp_path: Path, monkeypatch: Any) -> None:
    file = exported(networks, tmp_path / "x.safetensors", config=AdapterConfig(rank=128, targets=("to_k", "to_q")))
    raw, facts = file.read_bytes(), metadata(file)
    start = 8 + int.from_bytes(raw[:8], "little")
    assert facts["sshs_model_hash"] == hashlib.sha256(raw[start:]).hexdigest()
    training = {key: value for key, value in facts.items() if key.startswith("ss_")}
    plain = save(load_file(file), training)  # as kohya does it; the library's order of metadata changes no length
    assert len(plain) > 0x110000
    digest = hashlib.sha256(plain[0x100000:0x110000]).hexdigest()
    assert facts["sshs_legacy_hash"] == digest[:8]


@pytest.mark.parametrize(("width", "version"), [(768, "sd_v1"), (1024, "sd_v2"), (48, None)])
def test_the_base_is_named_in_files_with_the_text_encoder_alone(
    width: int, version: str | None, networks: Any, tmp_path: Path
) -> None:
    text = AdapterConfig(rank=2, targets=(), text_targets=TEXT)
    adapter = adapters.attach(networks, text)
    networks["text_encoder"].config.hidden_size = width
    facts = facts_of.of(tmp_path / "x", header.Header(text), adapter, dict(lora_pairs.of_adapter(adapter)))
    networks["text_encoder"].config.hidden_size = 48
    assert facts.get("ss_base_model_version") == version and facts["ss_v2"] == str(version == "sd_v2")


def test_projections_of_a_text_encoders_attention_come_together(
    networks: Any, make_networks: Any, tmp_path: Path
) -> None:
    """A1111 applies nothing to an attention of Stable Diffusion 2 that lacks one of the four."""
    tensors = load_file(exported(networks, tmp_path / "x.safetensors"))
    for layer in range(2):
        for name in TEXT:
            key = f"lora_te_text_model_encoder_layers_{layer}_self_attn_{name}"
            up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
            assert bool((up @ down).any()) == (name in CONFIG.text_targets) and up.shape == (48, 2)
    other = AdapterConfig(rank=2, targets=("to_k",), text_targets=("fc1",))
    tensors = load_file(exported(make_networks(), tmp_path / "y.safetensors", config=other))
    assert not tensors["lora_te_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight"].any()


def test_remarks(networks: Any) -> None:
    def said(form: str, config: AdapterConfig) -> str:
        layers = [f"unet.{LAYER}".replace("to_k", one) for one in config.targets or ()]
        layers += [f"text_encoder.text_model.encoder.layers.0.self_attn.{one}" for one in config.text_targets or ()]
        about = header.Header(config, layers=dict.fromkeys(layers, (48, 48)))
        return " ".join(exporting.remarks(form, about, specs(networks)))

    whole = AdapterConfig(targets=("to_k", "to_v"), text_targets=("q_proj",))
    assert said("kohya", whole) == ""
    assert "InvokeAI" in said("kohya", CONFIG) and "no to_v" in said("kohya", CONFIG)
    assert said("kohya", replace(whole, targets=())) == ""
    assert "ComfyUI applies 1 of the 3 layers" in said("peft", whole) and "A1111 applies none" in said("peft", whole)
    assert "--merge_into" in said("diffusers", replace(whole, dora=True))


def test_export_prints_both_differences_and_the_remarks(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    family = models.load(str(tiny_model))
    adapter = adapters.attach(family.networks, replace(CONFIG, init="offset", text_targets=()), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1 + 1e-4)
    formats.save(adapter, tmp_path / "a.safetensors", about={"base_model": str(tiny_model)})
    adapter.detach()
    settings = formats.ExportSettings(str(tmp_path / "a.safetensors"), str(tmp_path / "x.safetensors"), dtype="fp16")
    commands.export(settings)
    printed = capsys.readouterr()
    assert "of dW alone" in printed.out and "InvokeAI" in printed.err
    assert metadata(tmp_path / "x.safetensors")["modelspec.prediction_type"] == "epsilon"


def test_an_update_that_is_small_beside_its_terms_is_rounded_relative_to_itself(networks: Any, tmp_path: Path) -> None:
    adapter = adapters.attach(networks, replace(CONFIG, init="offset", text_targets=()), seed=1)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1 + 1e-5)
    found = formats.export(adapter, "kohya", tmp_path / "x.safetensors", dtype="fp16")
    assert 0 < found.layer_difference <= found.update_difference < 1e-2


# --- files from elsewhere


def single(networks: Any, file: Path, **extra: torch.Tensor) -> torch.Tensor:
    """A SingLoRA of another program, one matrix, and what it changes at strength 1."""
    a = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    save_file({f"unet.{LAYER}.lora_A": a, **{f"unet.{LAYER}.{key}": value for key, value in extra.items()}}, file)
    return a[:64] @ a[:48].T


def test_what_an_import_assumes_is_said(networks: Any, make_networks: Any, tmp_path: Path, capsys: Any) -> None:
    file = tmp_path / "x.safetensors"
    change = single(networks, file)
    found, _ = formats.import_(file, networks)
    assert "alpha = rank and a finished ramp, u = 1 assumed" in capsys.readouterr().err
    assert torch.allclose(dict(found.delta_weights())[f"unet.{LAYER}"], change, rtol=1e-5, atol=1e-5)
    found, _ = formats.import_(file, make_networks(), alpha=6.0)
    assert "a finished ramp, u = 1 assumed" in capsys.readouterr().err
    assert torch.allclose(dict(found.delta_weights())[f"unet.{LAYER}"], change * 1.5, rtol=1e-5, atol=1e-5)
    single(networks, file, alpha=torch.tensor(4.0), training_step_default=torch.tensor(500.0))
    formats.import_(file, make_networks())
    assert capsys.readouterr().err == ""
    tied = exported(make_networks(), tmp_path / "tied.safetensors")
    with pytest.raises(UserError, match="leave out --alpha"):
        formats.import_(tied, make_networks(), alpha=2.0)


def test_metadata_of_diffusers_is_shown_entry_by_entry(networks: Any, tmp_path: Path, capsys: Any) -> None:
    table = json.dumps({"unet.r": 2, "unet.lora_alpha": 2, "evil\x1b[31m": "\n" * 5}, indent=2)
    tensors = {f"unet.{LAYER}.lora_A.weight": torch.ones(2, 48), f"unet.{LAYER}.lora_B.weight": torch.eye(64, 2)}
    save_file(tensors, tmp_path / "x.safetensors", {"lora_adapter_metadata": table, "a\nkey": "b\nvalue"})
    formats.show(formats.inspect(tmp_path / "x.safetensors"))
    lines = capsys.readouterr().out.splitlines()
    place = lines.index("lora_adapter_metadata:")
    assert lines[place + 1 : place + 3] == ["  unet.r: 2", "  unet.lora_alpha: 2"]
    assert "a\ufffdkey: b\ufffdvalue" in lines and not any("\x1b" in line for line in lines)


def test_inspect_says_when_an_update_is_larger_than_its_weight(networks: Any, tmp_path: Path, capsys: Any) -> None:
    adapter = adapters.attach(networks, CONFIG, seed=1)
    for factor, warned in ((1.0, False), (30.0, True)):
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.mul_(factor)
        formats.save(adapter, tmp_path / "a.safetensors")
        adapter.detach()
        formats.show(formats.inspect(tmp_path / "a.safetensors", networks))
        assert ("‖dW‖ > ‖W0‖" in capsys.readouterr().out) == warned
        adapter = formats.load(tmp_path / "a.safetensors", networks)


def test_a_rank_larger_than_any_weight(networks: Any, make_networks: Any, tmp_path: Path) -> None:
    """Its factors are read; nothing of rank x rank, and no rank for other layers to be filled up to."""
    rank = 50_000
    generator = torch.Generator().manual_seed(0)
    down = torch.randn(rank, 48, generator=generator)
    up = torch.randn(64, rank, generator=generator)
    other = LAYER.replace("attn2", "attn1")
    tensors = {
        f"unet.{LAYER}.lora_A.weight": down,
        f"unet.{LAYER}.lora_B.weight": up / 1e4,
        f"unet.{other}.lora_A.weight": torch.ones(1, 64),
        f"unet.{other}.lora_B.weight": torch.ones(64, 1),
    }
    save_file(tensors, tmp_path / "x.safetensors")
    dense = float((up.double() / 1e4 @ down.double()).norm())
    rows = {row.name: row for row in formats.inspect(tmp_path / "x.safetensors").rows}
    assert rows[f"unet.{LAYER}"].update == pytest.approx(dense, rel=1e-4) and rows[f"unet.{LAYER}"].rank == rank
    before = networks["unet"].get_submodule(LAYER).weight.detach().clone()
    attached = formats.attach_files([tmp_path / "x.safetensors"], networks)
    assert sum(parameter.numel() for parameter in networks["unet"].parameters()) < 2_000_000
    attached.merge()
    assert float((networks["unet"].get_submodule(LAYER).weight - before).norm()) == pytest.approx(dense, rel=1e-4)
    a = torch.randn(64, 5000, generator=generator)
    save_file({f"unet.{LAYER}.lora_A": a}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"y\.safetensors: .*rank 5,000, and the largest is 4,096"):
        formats.import_(tmp_path / "y.safetensors", make_networks())


def test_memory_is_asked_for_first(networks: Any, tmp_path: Path, monkeypatch: Any) -> None:
    file = exported(networks, tmp_path / "x.safetensors", config=replace(CONFIG, text_targets=()))
    monkeypatch.setattr(formats.safetensors_io, "WORTH_ASKING", 0)
    monkeypatch.setattr("singlora_diffusion.device.free_memory", lambda device: 100)
    with pytest.raises(UserError, match=r"x\.safetensors.*would need about"):
        formats.attach_files([file], networks)
