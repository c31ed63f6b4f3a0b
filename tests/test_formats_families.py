"""Adapters of every family leave as LoRA files that diffusers loads, and come back as other programs' LoRAs."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from singlora_diffusion import adapters, formats, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import commands, exporting, forms, header, keys, lora_pairs, metadata

pytestmark = pytest.mark.numerical

PREFIXES = {
    "tiny_sdxl": {"kohya": ["lora_te1", "lora_te2", "lora_unet"], "peft": ["text_encoder", "text_encoder_2", "unet"]},
    "tiny_sd3": {"peft": ["text_encoder", "text_encoder_2", "transformer"]},
    "tiny_flux": {"peft": ["text_encoder", "transformer"]},
    "tiny_flux2": {"peft": ["transformer"]},
}


@pytest.mark.parametrize(("model", "form"), [(model, form) for model, forms in PREFIXES.items() for form in forms])
def test_export_and_back(model: str, form: str, request: Any, tmp_path: Path) -> None:
    family = models.load(str(request.getfixturevalue(model)))
    text = ("q_proj", "v_proj") if "text_encoder" in PREFIXES[model][form] or form == "kohya" else ()
    config = AdapterConfig(rank=2, targets=None, text_targets=text)
    adapter = adapters.attach(family.networks, config, seed=1)
    changes = dict(adapter.delta_weights())
    file = tmp_path / "x.safetensors"
    found = formats.export(adapter, form, file)
    assert found.layers == len(changes) and found.layer_difference < 1e-6
    starts = {key.split("_text_model")[0].split("_down")[0].split(".")[0] for key in load_file(file)}
    prefixes = {one for one in PREFIXES[model][form] if any(start.startswith(one) for start in starts)}
    assert sorted(prefixes) == PREFIXES[model][form]
    adapter.detach()
    attached = formats.attach_files([file], family.networks, [0.5])
    attached.merge()
    modules = {
        network.layer(path): module
        for network in family.networks.values()
        for path, module in network.module.named_modules()
    }
    with torch.no_grad():
        after = {name: modules[name].weight.clone() for name in changes}
        attached.detach()
        for name, change in changes.items():
            moved = after[name] - modules[name].weight
            assert float((moved - 0.5 * change).norm() / change.norm()) < 1e-4


# --- names that other programs read, as they write them

DOUBLE = ("add_q_proj", "add_k_proj", "to_add_out")
"""Of FLUX.1's double blocks: what diffusers' converter reads of single blocks is FLUX.1's width alone."""
CLIP = "text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight"
KEYS = {
    ("tiny_model", "kohya"): (
        "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q.lora_down.weight",
        "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn2_to_out_0.alpha",
        f"lora_te_{CLIP}",
    ),
    ("tiny_sdxl", "kohya"): (
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn1_to_q.lora_down.weight",
        "lora_unet_middle_block_1_transformer_blocks_0_attn2_to_k.lora_up.weight",
        "lora_unet_output_blocks_1_1_transformer_blocks_0_attn2_to_out_0.alpha",
        f"lora_te1_{CLIP}",
        f"lora_te2_{CLIP}",
    ),
    ("tiny_sd3", "peft"): (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.add_q_proj.lora_B.weight",
        "transformer.transformer_blocks.0.attn.to_add_out.lora_A.weight",
        "transformer.transformer_blocks.1.attn.to_out.0.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
        "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight",
    ),
    ("tiny_flux", "peft"): (
        "transformer.transformer_blocks.0.attn.to_q.lora_A.weight",
        "transformer.transformer_blocks.0.attn.add_q_proj.lora_B.weight",
        "transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight",
        "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight",
    ),
    ("tiny_flux", "kohya"): (
        "lora_unet_double_blocks_0_txt_attn_qkv.lora_down.weight",
        "lora_unet_double_blocks_0_txt_attn_proj.alpha",
        f"lora_te1_{CLIP}",
    ),
}
ELSEWHERE = {
    "kohya": (
        "down_blocks",
        "lora_A",
    ),
    "peft": (".alpha", "lora_down"),
}
"""What no key of these forms has in it; `down_blocks` are Stable Diffusion 1's."""


@pytest.mark.parametrize(("model", "form"), KEYS)
def test_keys_of_a_form_and_the_way_back_to_the_very_adapter(
    model: str, form: str, request: Any, tmp_path: Path
) -> None:
    """Exported, verified through diffusers, imported: the same updates, as SingLoRAs again."""
    family = models.load(str(request.getfixturevalue(model)))
    targets = DOUBLE if (model, form) == ("tiny_flux", "kohya") else None
    config = AdapterConfig(rank=2, alpha=3.0, targets=targets, text_targets=("q_proj", "out_proj"), ramp_steps=4)
    adapter = adapters.attach(family.networks, config, seed=1)
    adapter.set_step(3)
    changes = dict(adapter.delta_weights())
    file = tmp_path / "x.safetensors"
    formats.export(adapter, form, file, about=header.Header(adapter.config, family=family.name))
    adapter.detach()
    written = load_file(file)
    assert set(KEYS[model, form]) <= set(written)
    elsewhere = [part for part in ELSEWHERE[form] if (model, part) != ("tiny_model", "down_blocks")]
    assert not [key for key in written for part in elsewhere if part in key]
    back, _ = formats.import_(file, family.networks)
    found = dict(back.delta_weights())
    back.detach()
    for name, change in changes.items():
        assert float((found.pop(name) - change).norm() / change.norm()) < 1e-6, name
    assert not any(bool(change.any()) for change in found.values())


def test_default_forms(tiny_model: Path, tiny_sdxl: Path, tiny_sd3: Path, tiny_flux: Path) -> None:
    wanted = {tiny_model: "kohya", tiny_sdxl: "kohya", tiny_sd3: "peft", tiny_flux: "peft"}
    for model, form in wanted.items():
        networks = models.meta_networks(model)
        assert forms.chosen(None, networks) == form
        with pytest.raises(UserError, match="not for this base model, choose"):
            forms.chosen("other", networks)
    with pytest.raises(UserError, match="--format kohya: not for this base model, choose peft"):
        forms.chosen("kohya", models.meta_networks(tiny_sd3))


def test_the_commands_choose_the_form(tiny_flux: Path, tmp_path: Path, capsys: Any) -> None:
    family = models.load(str(tiny_flux))
    adapter = adapters.attach(family.networks, AdapterConfig(rank=2, targets=("to_q",)))
    formats.save(adapter, tmp_path / "a.safetensors", about={"base_model": str(tiny_flux), "family": "flux"})
    out = tmp_path / "x.safetensors"
    commands.export(formats.ExportSettings(str(tmp_path / "a.safetensors"), str(out)))
    printed = capsys.readouterr()
    assert "(peft, float32" in printed.out and "read by ComfyUI, Forge, InvokeAI" in printed.out
    assert "InvokeAI does not recognise a file without" in printed.err and "no add_q_proj" in printed.err
    home = str(tmp_path / "home.safetensors")
    commands.import_(formats.ImportSettings(file=str(out), output=home, pretrained_model_name_or_path=str(tiny_flux)))
    assert formats.read_header(home).family == "flux"


@pytest.mark.parametrize("model", ["tiny_sdxl", "tiny_flux"])
def test_a_base_that_does_not_fit_into_memory_is_not_needed(
    model: str, request: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """The same bytes, from names and shapes alone."""
    base = str(request.getfixturevalue(model))
    family = models.load(base)
    adapter = adapters.attach(family.networks, AdapterConfig(rank=2, text_targets=("q_proj",)), seed=1)
    about = {"base_model": base, "family": family.name, "base_hash": family.fingerprint}
    about["prediction_type"] = family.noise_process.prediction_type
    formats.save(adapter, tmp_path / "a.safetensors", about=about)
    out = tmp_path / "x.safetensors"
    settings = formats.ExportSettings(str(tmp_path / "a.safetensors"), str(out), overwrite=True)
    commands.export(settings)
    whole = out.read_bytes()
    assert "outputs by" in capsys.readouterr().out
    monkeypatch.setattr("singlora_diffusion.device.free_memory", lambda device: 100)
    monkeypatch.setattr(models.families, "load", None)
    commands.export(settings)
    printed = capsys.readouterr()
    assert "does not fit into memory" in printed.err and "outputs by" not in printed.out
    assert out.read_bytes() == whole
    home = tmp_path / "home.safetensors"
    commands.import_(formats.ImportSettings(file=str(out), output=str(home), pretrained_model_name_or_path=base))
    assert formats.read_header(home).base_model == base
    write = exporting.FORMS["kohya" if model in ("tiny_model", "tiny_sdxl") else "peft"]

    def wrong(*arguments: Any) -> Any:
        tensors = dict(write(*arguments))
        first = next(key for key in tensors if not key.endswith(".alpha"))
        return {**tensors, first: tensors[first] * 1.01}

    monkeypatch.setattr(exporting, "FORMS", dict.fromkeys(exporting.FORMS, wrong))
    with pytest.raises(UserError, match="differs by"):
        commands.export(settings)


def test_diffusers_knows_kohyas_single_blocks_at_one_width_only(tiny_flux: Path, tmp_path: Path) -> None:
    """Of any other, nothing is written; the file would be right, as the way back shows."""
    family = models.load(str(tiny_flux))
    adapter = adapters.attach(family.networks, AdapterConfig(rank=3, targets=("to_q", "to_v", "proj_mlp", "proj_out")))
    with pytest.raises(UserError, match="diffusers does not load it"):
        formats.export(adapter, "kohya", tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())
    changes, pairs = dict(adapter.delta_weights()), dict(lora_pairs.of_adapter(adapter))
    tensors = exporting._kohya(pairs, header.Header(adapter.config), adapter)
    adapter.detach()
    assert tensors["lora_unet_single_blocks_0_linear1.lora_up.weight"].shape == (3 * 32 + 128, 3 * 3)
    save_file({key: value.contiguous().clone() for key, value in tensors.items()}, tmp_path / "x.safetensors")
    assert formats.recognise(tmp_path / "x.safetensors").kind == "tied lora"
    back, _ = formats.import_(tmp_path / "x.safetensors", family.networks)
    found = dict(back.delta_weights())
    assert all(torch.allclose(found[name], change, rtol=1e-5, atol=1e-6) for name, change in changes.items())


def test_spellings_of_text_encoders_that_are_read(tiny_sdxl: Path, tiny_flux: Path) -> None:
    clip, t5 = "encoder.layers.0.self_attn.q_proj", "encoder.block.0.layer.0.SelfAttention.q"
    flux, sdxl = (keys.spellings(models.meta_networks(model)) for model in (tiny_flux, tiny_sdxl))
    for spellings, name, spelled in (
        (flux, f"text_encoder.text_model.{clip}", [
            "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te_text_model_encoder_layers_0_self_attn_q_proj",
            "lora_te1_encoder_layers_0_self_attn_q_proj",
            f"text_encoder.{clip}",
            "text_encoder.text_model.encoder.layers.0.self_attn.to_q",
            f"text_encoders.clip_l.transformer.text_model.{clip}",
        ]),
        (flux, f"text_encoder_2.{t5}", [
            "lora_te3_encoder_block_0_layer_0_SelfAttention_q",
            "lora_te2_encoder_block_0_layer_0_SelfAttention_q",
            f"text_encoders.t5xxl.transformer.{t5}",
        ]),
        (sdxl, f"text_encoder_2.text_model.{clip}", [
            "lora_te2_text_model_encoder_layers_0_self_attn_q_proj",
            f"text_encoders.clip_g.transformer.text_model.{clip}",
        ]),
    ):  # fmt: skip
        for one in (name, *spelled):
            assert [piece.name for piece in spellings[one]] == [name], one


@pytest.mark.parametrize("targets", [("q_proj",), ("t5_attention",)])
@pytest.mark.parametrize("model", ["tiny_sd3", "tiny_flux"])
def test_adapters_of_text_encoders_alone(model: str, targets: tuple[str, ...], request: Any, tmp_path: Path) -> None:
    family = models.load(str(request.getfixturevalue(model)))
    adapter = adapters.attach(family.networks, AdapterConfig(rank=2, targets=(), text_targets=targets))
    formats.save(adapter, tmp_path / "a.safetensors")
    adapter.detach()
    found = formats.export(tmp_path / "a.safetensors", None, tmp_path / "x.safetensors", networks=family.networks)
    assert found.layers == len(adapter.layers())
    assert all(key.startswith("text_encoder") for key in load_file(tmp_path / "x.safetensors"))


@pytest.mark.parametrize("form", ["kohya", "peft"])
def test_t5_which_diffusers_leaves_out_is_read_back_by_ourselves(
    form: str, tiny_flux: Path, tmp_path: Path, monkeypatch: Any
) -> None:
    family = models.load(str(tiny_flux))
    config = AdapterConfig(rank=2, targets=DOUBLE, text_targets=("t5_attention",))
    adapter = adapters.attach(family.networks, config, seed=1)
    file = tmp_path / "x.safetensors"
    found = formats.export(adapter, form, file)
    assert found.layers == len(adapter.layers()) and found.layer_difference < 1e-6
    name = {"kohya": "lora_te3_encoder_block_0_layer_0_SelfAttention_q.lora_down.weight",
            "peft": "text_encoder_2.encoder.block.0.layer.0.SelfAttention.q.lora_A.weight"}[form]  # fmt: skip
    assert name in load_file(file)
    about = header.Header(adapter.config, layers=dict.fromkeys(adapter.layers(), (1, 1)))
    assert any("no LoRA into text_encoder_2" in one for one in exporting.remarks(form, about, family.networks))
    write = exporting.FORMS[form]

    def wrong(*arguments: Any) -> Any:
        tensors = dict(write(*arguments))
        return {**tensors, name: tensors[name] * 1.01}

    monkeypatch.setitem(exporting.FORMS, form, wrong)
    with pytest.raises(UserError, match=r"SelfAttention\.q.* differs by 1\.0e-02"):
        formats.export(adapter, form, tmp_path / "y.safetensors")
    adapter.detach()
    with pytest.raises(UserError, match="no LoRA into text_encoder_2"):
        formats.attach_files([file], family.networks)


@pytest.mark.parametrize(("model", "form", "version", "architecture", "module"), [
    ("tiny_sdxl", "kohya", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora", "networks.lora"),
    ("tiny_sd3", "peft", "sd3", "stable-diffusion-3.5-medium/lora", "networks.lora_sd3"),
    ("tiny_flux", "peft", "flux1", "flux-1-dev/lora", "networks.lora_flux"),
])  # fmt: skip
def test_metadata_by_family(
    model: str, form: str, version: str, architecture: str, module: str, request: Any, tmp_path: Path
) -> None:
    family = models.load(str(request.getfixturevalue(model)))
    adapter = adapters.attach(family.networks, AdapterConfig(rank=2, alpha=3.0))
    about = header.Header(adapter.config, family=family.name, identifier="sks", class_noun="dog")
    formats.export(adapter, form, tmp_path / "dog.safetensors", about=about)
    with safe_open(tmp_path / "dog.safetensors", framework="pt") as file:
        facts = file.metadata()
    wanted = {
        "ss_base_model_version": version,
        "modelspec.architecture": architecture,
        "modelspec.title": "dog",
        "modelspec.resolution": "1024x1024",
        "modelspec.trigger_phrase": "sks dog",
        "ss_network_module": module,
        "ss_network_dim": "2",
        "ss_network_alpha": "3.0" if form == "kohya" else "2.0",  # the scale is in the matrices
        "ss_v2": "False",
    }
    assert {key: facts.get(key) for key in wanted} == wanted
    assert facts["modelspec.hash_sha256"] == f"0x{facts['sshs_model_hash']}"
    if model != "tiny_sdxl":  # a UNet tells its family by its width, which is not a real one here
        unnamed = metadata.of(
            tmp_path / "dog", replace(about, family=""), adapter, dict(lora_pairs.of_adapter(adapter))
        )
        assert unnamed["modelspec.architecture"] == architecture


def test_an_adapter_of_another_family_is_refused_with_both_named(tiny_flux: Path, tiny_sd3: Path) -> None:
    about = header.Header(AdapterConfig(), family="flux", base_model=str(tiny_flux))
    with pytest.raises(
        UserError, match=r"tiny-flux, of the family flux; .*tiny-sd3 is of the family stable_diffusion_3"
    ):
        commands.load_base(about, str(tiny_sd3))


@pytest.mark.parametrize(("family", "config", "architecture"), [
    ("flux", {"guidance_embeds": True}, "flux-1-dev"),
    ("flux", {"guidance_embeds": False}, "flux-1-schnell"),
    ("stable_diffusion_3", {"qk_norm": None, "dual_attention_layers": ()}, "stable-diffusion-3-medium"),
    ("stable_diffusion_3", {"qk_norm": "rms_norm", "dual_attention_layers": ()}, "stable-diffusion-3.5-large"),
    ("stable_diffusion_3", {"qk_norm": "rms_norm", "dual_attention_layers": (0, 1)}, "stable-diffusion-3.5-medium"),
])  # fmt: skip
def test_variants_are_told_by_the_denoisers_config(family: str, config: dict[str, Any], architecture: str) -> None:
    assert metadata.FAMILIES[family](SimpleNamespace(**config)).architecture == architecture
    assert metadata.FAMILIES[family](None).architecture in architecture
