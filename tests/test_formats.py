"""Adapter files: what is saved comes back exactly, what is exported loads in stock diffusers and does the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from singlora_diffusion import adapters, formats, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import commands, exporting, header, verify_export

pytestmark = pytest.mark.numerical

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
SOME = ("to_k",)  # square, wide and tall weights, at a quarter of the layers
WIDE = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"  # (32, 48)
TALL = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"  # (64, 48)
QUERY = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"
ABOUT = {"step": 7, "identifier": "sks", "class_noun": "dog", "base_model": "tiny", "resolution": 32}

EVERY = {
    "ramp": AdapterConfig(
        rank=3, alpha=1.5, text_rank=2, targets=(*SOME, "to_out.0"), text_targets=TEXT, ramp_steps=10
    ),
    "offset": AdapterConfig(rank=3, init="offset", targets=SOME),
    "balanced": AdapterConfig(rank=3, signature="balanced", targets=SOME, text_targets=("q_proj",)),
    "magnitude": AdapterConfig(rank=3, dora=True, targets=SOME, text_targets=TEXT),
    "lora": AdapterConfig(method="lora", rank=4, alpha=2, targets=SOME, text_targets=TEXT),
    "dora": AdapterConfig(method="dora", rank=4, targets=SOME, text_targets=TEXT),
    "oft": AdapterConfig(method="oft", rank=4, targets=SOME),
    "lokr": AdapterConfig(method="lokr", rank=4, targets=SOME),
}


def trained(networks: Mapping[str, nn.Module], config: AdapterConfig, step: int = 7, seed: int = 1) -> Any:
    """An attached adapter whose every number has moved from its start."""
    adapter = adapters.attach(dict(networks), config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
    adapter.set_step(step)
    return adapter


@torch.no_grad()
def answers(networks: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """What the networks say to fixed inputs; the UNet is not told what the text encoder says."""
    generator = torch.Generator().manual_seed(5)
    x, text = torch.randn(2, 4, 8, 8, generator=generator), torch.randn(2, 6, 48, generator=generator)
    x, text = (tensor.to(next(networks["unet"].parameters())) for tensor in (x, text))
    return {
        "unet": networks["unet"](x, 400, text).sample,
        "text_encoder": networks["text_encoder"](torch.tensor([[0, 5, 6, 7, 1]])).last_hidden_state,
    }


def difference(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> float:
    return max(float((one[name] - other[name]).norm() / other[name].norm()) for name in one)


def stock(networks: Mapping[str, nn.Module], *files: Path) -> Any:
    """A stock pipeline around networks, with LoRA files loaded as adapters 0, 1, ..."""
    from diffusers import StableDiffusionPipeline

    parts = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**networks, **parts, requires_safety_checker=False)
    for i, file in enumerate(files):
        pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name=f"file_{i}")
    return pipeline


@pytest.fixture(scope="session")
def rounding(make_networks: Any) -> float:
    """How far apart the stock model's answers may be when the same numbers are added in another order: a multiple of
    what rounding, measured against float64, does to it on this processor."""
    single = answers(make_networks())
    return verify_export.ROUNDINGS * difference(single, answers(make_networks(torch.float64)))


def structure(networks: Mapping[str, nn.Module]) -> list[int]:
    return [id(module) for network in networks.values() for module in network.modules()]


# --- native -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY)
def test_a_saved_adapter_comes_back_exactly(name: str, networks: Any, make_networks: Any, tmp_path: Path) -> None:
    adapter = trained(networks, EVERY[name])
    header = formats.save(adapter, tmp_path / "adapter.safetensors", about=ABOUT)
    fresh = make_networks()
    loaded = formats.load(tmp_path, fresh)  # a run folder means the file in it
    assert loaded.config == adapter.config and loaded.u == adapter.u == (0.7 if name == "ramp" else 1.0)
    assert all(torch.equal(tensor, loaded.state_dict()[key]) for key, tensor in adapter.state_dict().items())
    assert difference(answers(fresh), answers(networks)) == 0.0
    assert formats.read_header(tmp_path) == header and header.trigger() == "sks dog"
    assert header.layers[WIDE] == (32, 48)
    formats.verify(tmp_path, adapter)


def test_names_in_the_file_are_those_the_outside_world_uses(networks: Any, tmp_path: Path) -> None:
    formats.save(trained(networks, EVERY["ramp"]), tmp_path / "a.safetensors")
    stored = load_file(tmp_path / "a.safetensors")  # stock safetensors reads what we write
    assert stored[f"{WIDE}.A"].shape == (48, 3) and stored[f"{TALL}.A"].shape == (64, 3)
    assert stored[f"{QUERY}.A"].shape == (48, 2)
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["singlora"])["config"]["ramp_steps"] == 10


def test_the_same_adapter_gives_the_same_bytes(networks: Any, tmp_path: Path) -> None:
    adapter = trained(networks, EVERY["ramp"])
    for name in ("a", "b"):
        formats.save(adapter, tmp_path / f"{name}.safetensors", about=ABOUT)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_half_precision_is_rounded_once_and_offsets_are_not_rounded(networks: Any, tmp_path: Path) -> None:
    file = tmp_path / "a.safetensors"
    adapter = trained(networks, EVERY["ramp"])
    formats.save(adapter, file, dtype="fp16")
    assert torch.equal(load_file(file)[f"{TALL}.A"], adapter.state_dict()[f"{TALL}.A"].half())
    formats.verify(file, adapter)
    adapter.detach()
    formats.save(trained(networks, EVERY["offset"]), file, dtype="fp16")
    assert {tensor.dtype for tensor in load_file(file).values()} == {torch.float32}


def test_a_file_that_is_not_the_adapter_is_noticed(networks: Any, tmp_path: Path) -> None:
    adapter = trained(networks, EVERY["lora"])
    formats.save(adapter, tmp_path / "a.safetensors")
    with torch.no_grad():
        adapter.parameters()[3][0, 0] += 1e-7
    with pytest.raises(UserError, match="differs from the adapter"):
        formats.verify(tmp_path / "a.safetensors", adapter)


def test_a_diverged_adapter_does_not_replace_a_good_file(networks: Any, tmp_path: Path) -> None:
    adapter = trained(networks, EVERY["ramp"])
    formats.save(adapter, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with torch.no_grad():
        adapter.parameters()[0][0, 0] = 70_000.0
    with pytest.raises(UserError, match="not finite"):
        formats.save(adapter, tmp_path / "a.safetensors", dtype="fp16")
    assert (tmp_path / "a.safetensors").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_what_a_recipe_holds_need_not_be_json(networks: Any, tmp_path: Path) -> None:
    recipe = {"data": Path("my dog"), "betas": (0.9, 0.999), "limit": float("inf"), "none": None}
    formats.save(trained(networks, EVERY["oft"]), tmp_path / "a.safetensors", about={"recipe": recipe})
    stored = {"data": "my dog", "betas": [0.9, 0.999], "limit": "inf", "none": None}
    assert formats.read_header(tmp_path / "a.safetensors").recipe == stored


# --- out --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "form"),
    [*(("ramp", form) for form in exporting.FORMS), ("offset", "diffusers"), ("balanced", "peft"), ("lora", "kohya")],
)
def test_stock_diffusers_does_what_the_adapter_does(
    name: str, form: str, networks: Any, make_networks: Any, tmp_path: Path, rounding: float
) -> None:
    adapter = trained(networks, EVERY[name])
    found = formats.export(adapter, form, tmp_path / "out.safetensors", about=header.Header(adapter.config))
    assert found.layers == len(adapter.layers()) and found.layer_difference < 1e-5
    assert found.output_difference <= verify_export.ROUNDINGS * found.rounding <= 2 * rounding
    base = make_networks()
    plain = answers(base)
    pipeline = stock(base, tmp_path / "out.safetensors")
    assert difference(answers(base), answers(networks)) < rounding < difference(plain, answers(networks))
    pipeline.unload_lora_weights()
    assert difference(answers(base), plain) == 0.0


def test_a_half_precision_base_does_not_blur_the_proof(make_networks: Any, tmp_path: Path) -> None:
    """diffusers rounds a file to the base's precision as it loads it; the file itself is exact."""
    adapter = trained(make_networks(torch.bfloat16), EVERY["ramp"])
    found = formats.export(adapter, "kohya", tmp_path / "out.safetensors")
    assert found.layer_difference < 1e-5 < found.output_difference < 0.08


@pytest.mark.parametrize(("name", "form"), [("magnitude", "peft"), ("dora", "diffusers")])
def test_magnitudes_travel_in_the_forms_that_keep_them(
    name: str, form: str, networks: Any, make_networks: Any, tmp_path: Path, rounding: float
) -> None:
    formats.export(trained(networks, EVERY[name]), form, tmp_path / "out.safetensors")
    fresh = make_networks()
    stock(fresh, tmp_path / "out.safetensors")
    assert difference(answers(fresh), answers(networks)) < rounding


def test_keys_and_scale_of_the_three_forms(networks: Any, tmp_path: Path) -> None:
    adapter = trained(networks, EVERY["ramp"])  # alpha 1.5, rank 3, u 0.7; text alpha 2, rank 2
    a = adapter.state_dict()
    about = header.Header(adapter.config, identifier="sks", class_noun="dog", resolution=256, base_model="x/tiny")
    for form in exporting.FORMS:
        formats.export(adapter, form, tmp_path / f"{form}.safetensors", about=about)
    kohya, diffusers, peft = (load_file(tmp_path / f"{form}.safetensors") for form in exporting.FORMS)
    wide, query = WIDE.replace("unet.", "lora_unet_").replace(".", "_"), QUERY.replace("text_encoder.", "lora_te_")
    query = query.replace(".", "_")
    assert torch.allclose(kohya[f"{wide}.lora_up.weight"], a[f"{WIDE}.A"][:32])
    assert torch.equal(kohya[f"{wide}.lora_down.weight"], a[f"{WIDE}.A"].T)
    assert float(kohya[f"{wide}.alpha"]) == pytest.approx(1.5 * 0.7) and kohya[f"{wide}.alpha"].ndim == 0
    assert float(kohya[f"{query}.alpha"]) == pytest.approx(2 * 0.7)
    assert torch.allclose(diffusers[f"{WIDE}.lora.up.weight"], 0.35 * a[f"{WIDE}.A"][:32])
    assert torch.allclose(diffusers[f"{QUERY}.lora_linear_layer.up.weight"], 0.7 * a[f"{QUERY}.A"])
    assert torch.allclose(peft[f"{QUERY}.lora_B.weight"], 0.7 * a[f"{QUERY}.A"])
    assert torch.equal(peft[f"{QUERY}.lora_A.weight"], a[f"{QUERY}.A"].T)
    with safe_open(tmp_path / "kohya.safetensors", framework="pt") as file:
        facts = file.metadata()
    assert facts["modelspec.trigger_phrase"] == "sks dog" and facts["ss_sd_model_name"] == "tiny"
    assert facts["ss_network_dim"] == "Dynamic" and facts["modelspec.resolution"] == "256x256"
    assert len(facts["sshs_model_hash"]) == 64
    with safe_open(tmp_path / "peft.safetensors", framework="pt") as file:
        ranks = json.loads(file.metadata()["lora_adapter_metadata"])
    assert ranks["unet.r"] == ranks["unet.lora_alpha"] == 3 and ranks["text_encoder.r"] == 2


def test_a_kohya_file_without_an_output_projection_still_loads(
    networks: Any, make_networks: Any, tmp_path: Path, rounding: float
) -> None:
    """diffusers tells this form of text encoder by `out_proj` and raises without one."""
    adapter = trained(networks, EVERY["balanced"])
    formats.export(adapter, "kohya", tmp_path / "out.safetensors")
    extra = "lora_te_text_model_encoder_layers_0_self_attn_out_proj.lora_up.weight"
    assert not load_file(tmp_path / "out.safetensors")[extra].any()
    fresh = make_networks()
    stock(fresh, tmp_path / "out.safetensors")
    assert difference(answers(fresh), answers(networks)) < rounding


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_strength_fusing_and_several_adapters_behave(
    networks: Any, make_networks: Any, tmp_path: Path, rounding: float
) -> None:
    files = [tmp_path / "one.safetensors", tmp_path / "two.safetensors"]
    updates = []
    for file, name in zip(files, ("ramp", "balanced"), strict=True):
        adapter = trained(networks, EVERY[name])
        formats.export(adapter, "kohya", file)
        updates.append(dict(adapter.delta_weights()))
        adapter.detach()
    pipeline = stock(networks, *files)
    pipeline.set_adapters(["file_0", "file_1"], [0.5, -0.25])
    want = make_networks()
    for name, factor in ((0, 0.5), (1, -0.25)):
        for layer, update in updates[name].items():
            network, path = layer.replace("text_model.", "").split(".", 1)
            want[network].get_submodule(path).weight.data += factor * update
    assert difference(answers(networks), answers(want)) < rounding
    pipeline.fuse_lora()
    pipeline.unload_lora_weights()
    assert difference(answers(networks), answers(want)) < rounding


@pytest.mark.parametrize(
    ("name", "form"), [("dora", "kohya"), ("magnitude", "kohya"), ("oft", "peft"), ("lokr", "kohya")]
)
def test_what_would_be_lost_is_refused_with_the_way_out(name: str, form: str, networks: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--merge_into"):
        formats.export(trained(networks, EVERY[name]), form, tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_a_wrong_export_is_not_written(networks: Any, tmp_path: Path, monkeypatch: Any) -> None:
    def wrong(pairs: Any, header: Any, adapter: Any) -> Any:
        tensors = exporting._peft(pairs, header, adapter)
        return {**tensors, f"{TALL}.lora_B.weight": tensors[f"{TALL}.lora_B.weight"] * 1.001}

    monkeypatch.setitem(exporting.FORMS, "peft", wrong)
    with pytest.raises(UserError, match=r"mid_block.* differs by 1\.0e-03"):
        formats.export(trained(networks, EVERY["ramp"]), "peft", tmp_path / "out.safetensors")
    assert not any(tmp_path.iterdir())


def test_an_offset_adapter_that_has_hardly_moved_survives_rounding(networks: Any, tmp_path: Path) -> None:
    """A A^T - A0 A0^T as stored columns would drown in float16; the steady form does not."""
    adapter = adapters.attach(networks, EVERY["offset"])
    assert formats.export(adapter, "kohya", tmp_path / "zero.safetensors").layer_difference < 1e-5
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(1 + 1e-4)
    assert formats.export(adapter, "kohya", tmp_path / "small.safetensors").layer_difference < 1e-5
    assert formats.export(adapter, "kohya", tmp_path / "half.safetensors", dtype="fp16").layer_difference < 5e-3


def test_exporting_a_file_leaves_the_networks_as_they_were(networks: Any, tmp_path: Path) -> None:
    before, modules = answers(networks), structure(networks)
    adapter = trained(networks, EVERY["ramp"])
    formats.save(adapter, tmp_path / "a.safetensors", about=ABOUT)
    adapter.detach()
    formats.export(tmp_path / "a.safetensors", "kohya", tmp_path / "out.safetensors", networks=networks)
    assert structure(networks) == modules and difference(answers(networks), before) == 0.0
    with pytest.raises(UserError, match="exists already"):
        formats.export(tmp_path / "a.safetensors", "kohya", tmp_path / "out.safetensors", networks=networks)


@pytest.mark.parametrize("name", ["magnitude", "oft"])
def test_a_merged_pipeline_needs_nothing_of_ours(name: str, tiny_model: Path, tmp_path: Path, rounding: float) -> None:
    from diffusers import StableDiffusionPipeline

    family = models.load(str(tiny_model))
    networks = {name: network.module for name, network in family.networks.items()}
    adapter = trained(networks, EVERY[name])
    want = answers(networks)
    formats.merge_into(family, adapter, tmp_path / "merged")
    assert difference(answers(networks), want) == 0.0
    pipeline = StableDiffusionPipeline.from_pretrained(tmp_path / "merged", local_files_only=True)
    merged = {"unet": pipeline.unet, "text_encoder": pipeline.text_encoder}
    assert difference(answers(merged), want) < rounding
    with pytest.raises(UserError, match="not empty"):
        formats.merge_into(family, adapter, tmp_path / "merged")
    assert [path.name for path in tmp_path.iterdir()] == ["merged"]


def test_the_same_picture_through_stock_diffusers(tiny_model: Path, tmp_path: Path) -> None:
    from PIL import ImageChops

    family = models.load(str(tiny_model))
    networks = {name: network.module for name, network in family.networks.items()}
    adapter = trained(networks, EVERY["ramp"])
    settings: dict[str, Any] = {"steps": 3, "guidance": 4.0}
    ours = models.sample(family, ["a photo of sks dog"], [3], **settings)[0]
    formats.export(adapter, "kohya", tmp_path / "out.safetensors")
    adapter.detach()
    plain = models.sample(family, ["a photo of sks dog"], [3], **settings)[0]
    stock(networks, tmp_path / "out.safetensors")
    theirs = models.sample(family, ["a photo of sks dog"], [3], **settings)[0]
    assert max(high for _, high in ImageChops.difference(ours, theirs).getextrema()) <= 1  # of 255
    assert max(high for _, high in ImageChops.difference(ours, plain).getextrema()) > 1


# --- in ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "form"), [("ramp", "kohya"), ("balanced", "kohya"), ("ramp", "diffusers")])
def test_a_tied_lora_comes_home(name: str, form: str, networks: Any, make_networks: Any, tmp_path: Path) -> None:
    adapter = trained(networks, EVERY[name])
    about = header.Header(adapter.config, identifier="sks", class_noun="dog")
    formats.export(adapter, form, tmp_path / "out.safetensors", about=about)
    assert formats.recognise(tmp_path / "out.safetensors").kind == "tied lora"
    home, about = formats.import_(tmp_path / "out.safetensors", make_networks())
    assert about.trigger() == "sks dog" and home.config.signature == adapter.config.signature
    updates = dict(home.delta_weights())
    for layer, update in adapter.delta_weights():
        assert float((updates.pop(layer) - update).norm() / update.norm()) < 1e-6
    assert not any(update.any() for update in updates.values())


def other_programs(networks: Any, ending: str, **extra: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """A SingLoRA as other programs write it, and its update per layer at full strength."""
    tensors: dict[str, Tensor] = {}
    updates: dict[str, Tensor] = {}
    for path, layer in networks["unet"].named_modules():
        if path.endswith((".to_q", ".to_k")):
            out, in_ = layer.weight.shape
            a = torch.randn(max(out, in_), 4, generator=torch.Generator().manual_seed(len(path)))
            tensors[f"unet.{path}{ending}"] = a
            updates[f"unet.{path}"] = a[:out] @ a[:in_].T
            tensors |= {f"unet.{path}.{key}": value.clone() for key, value in extra.items()}
    return tensors, updates


def test_simpletuners_file_is_read_with_its_clock_and_alpha(networks: Any, make_networks: Any, tmp_path: Path) -> None:
    tensors, updates = other_programs(networks, ".lora_A", training_step_default=torch.tensor(250.0))
    save_file(tensors, tmp_path / "x.safetensors")
    assert formats.recognise(tmp_path / "x.safetensors").form == "PEFT-SingLoRA"
    found = dict(formats.import_(tmp_path / "x.safetensors", networks)[0].delta_weights())
    assert set(found) == set(updates)
    assert all(torch.allclose(found[name], 0.25 * updates[name], atol=1e-5) for name in updates)
    (tmp_path / "adapter_config.json").write_text('{"lora_alpha": 8}')
    adapter, _ = formats.import_(tmp_path / "x.safetensors", make_networks(), ramp_steps=0)
    assert all(torch.allclose(change, 2 * updates[name], atol=1e-4) for name, change in adapter.delta_weights())
    save_file({**tensors, **dict.fromkeys([next(iter(tensors))], torch.zeros(5, 4))}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="another model"):
        formats.import_(tmp_path / "y.safetensors", make_networks())


def test_a_whole_state_dict_with_bare_a_is_read(networks: Any, make_networks: Any, tmp_path: Path) -> None:
    step = torch.tensor(0.0)
    tensors, updates = other_programs(networks, ".A", training_step=step, **{"original_layer.weight": torch.ones(2)})
    tensors = {name.removeprefix("unet."): tensor.clone() for name, tensor in tensors.items()}
    save_file({**tensors, "conv_in.weight": torch.ones(2)}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="step 0 of its ramp"):
        formats.import_(tmp_path / "x.safetensors", networks)
    adapter, _ = formats.import_(tmp_path / "x.safetensors", networks, ramp_steps=0, alpha=1.0)
    assert all(torch.allclose(change, updates[name] / 4, atol=1e-5) for name, change in adapter.delta_weights())
    formats.save(adapter, tmp_path / "ours.safetensors")
    loaded = formats.load(tmp_path / "ours.safetensors", make_networks())
    assert set(loaded.config.targets) == {"to_q", "to_k"}


def test_ordinary_lora_files_are_taken_as_stock_diffusers_takes_them(
    networks: Any, make_networks: Any, tmp_path: Path, rounding: float
) -> None:
    adapter = trained(networks, EVERY["lora"])
    files = [tmp_path / f"{form}.safetensors" for form in ("kohya", "diffusers", "peft")]
    for file in files:
        formats.export(adapter, file.stem, file)
        assert formats.recognise(file).kind == "lora"
    adapter.detach()
    before, modules = answers(networks), structure(networks)
    theirs = make_networks()
    stock(theirs, files[0])
    for file in files:
        ours = formats.attach_files([file], networks)
        assert difference(answers(networks), answers(theirs)) < rounding
        ours.set_scale(0.0)
        assert difference(answers(networks), before) < rounding
        ours.set_scale(0.5)
        half = answers(networks)
        ours.merge()
        ours.merge()
        assert structure(networks) == modules and difference(answers(networks), half) < rounding
        ours.detach()
        ours.detach()
        assert structure(networks) == modules and difference(answers(networks), before) == 0.0
    with pytest.raises(UserError, match="ordinary LoRA"):
        formats.import_(files[0], networks)


def test_several_adapters_of_any_kind_add_up(
    networks: Any, make_networks: Any, tmp_path: Path, rounding: float
) -> None:
    want = make_networks()
    files = [tmp_path / "a.safetensors", tmp_path / "b.safetensors", tmp_path / "c.safetensors"]
    scales = [0.5, 2.0, -1.0]
    for file, name, scale in zip(files, ("offset", "lora", "ramp"), scales, strict=True):
        adapter = trained(networks, EVERY[name])
        if name == "lora":
            formats.export(adapter, "kohya", file)
        else:
            formats.save(adapter, file)
        for layer, update in adapter.delta_weights():
            network, path = layer.replace("text_model.", "").split(".", 1)
            want[network].get_submodule(path).weight.data += scale * update
        adapter.detach()
    attached = formats.attach_files(files, networks, scales)
    assert difference(answers(networks), answers(want)) < rounding
    attached.detach()
    dora = trained(networks, EVERY["dora"])
    formats.save(dora, tmp_path / "dora.safetensors")
    dora.detach()
    modules = structure(networks)
    with pytest.raises(UserError, match="magnitudes"):
        formats.attach_files([files[0], tmp_path / "dora.safetensors"], networks)
    assert structure(networks) == modules


# --- arithmetic, inspection, commands ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("names", "scales", "signature"), [
    (("ramp", "ramp"), (1.0, 0.5), "positive"),
    (("ramp", "ramp"), (1.0, -0.5), "balanced"),
    (("ramp", "offset", "balanced"), (0.5, 1.0, -2.0), "balanced"),
])  # fmt: skip
def test_sums_of_singloras_are_exact(
    names: tuple[str, ...], scales: tuple[float, ...], signature: str, networks: Any, tmp_path: Path
) -> None:
    want: dict[str, Tensor] = {}
    files = []
    for i, (name, scale) in enumerate(zip(names, scales, strict=True)):
        adapter = trained(networks, EVERY[name], seed=i)
        files.append(tmp_path / f"{i}.safetensors")
        formats.save(adapter, files[-1], about=ABOUT)
        for layer, update in adapter.delta_weights():
            want[layer] = want.get(layer, torch.zeros(())) + scale * update
        adapter.detach()
    header = formats.add(files, tmp_path / "sum.safetensors", scales)
    assert header.config.signature == signature and header.trigger() == "sks dog"
    total = formats.load(tmp_path / "sum.safetensors", networks)
    found = dict(total.delta_weights())
    assert all(float((found[layer] - want[layer]).abs().max()) < 1e-6 for layer in want)


def test_only_plain_singloras_of_one_base_add_up(networks: Any, tmp_path: Path) -> None:
    for name, base in (("ramp", "x"), ("offset", "y"), ("dora", "x"), ("magnitude", "x")):
        adapter = trained(networks, EVERY[name])
        formats.save(adapter, tmp_path / f"{name}.safetensors", about={"base_hash": base})
        adapter.detach()
    for name, reason in (("offset", "another base"), ("dora", "is dora"), ("magnitude", "with magnitudes")):
        with pytest.raises(UserError, match=reason):
            formats.add([tmp_path / "ramp.safetensors", tmp_path / f"{name}.safetensors"], tmp_path / "sum.safetensors")


def test_inspection_gives_the_norms_of_the_dense_updates(networks: Any, tmp_path: Path, capsys: Any) -> None:
    weight = networks["unet"].get_submodule(TALL.removeprefix("unet.")).weight.detach().clone()
    for name in ("ramp", "dora"):
        adapter = trained(networks, EVERY[name])
        formats.save(adapter, tmp_path / f"{name}.safetensors", about={**ABOUT, "class_noun": "[red]do\x1bg"})
        norm = {layer: float(update.norm()) for layer, update in adapter.delta_weights()}[TALL]
        if name == "ramp":
            formats.export(adapter, "kohya", tmp_path / "kohya.safetensors")
            total = sum(float(update.norm()) for _, update in adapter.delta_weights())
        adapter.detach()
        rows = {row.name: row for row in formats.inspect(tmp_path / f"{name}.safetensors", networks).rows}
        assert rows[TALL].update == pytest.approx(norm, rel=1e-5)
        assert rows[TALL].relative == pytest.approx(norm / float(weight.norm()), rel=1e-5)
        bare = {row.name: row for row in formats.inspect(tmp_path / f"{name}.safetensors").rows}[TALL]
        assert bare.shape == (64, 48) and (
            bare.update is None if name == "dora" else bare.update == pytest.approx(norm)
        )
    kohya = formats.inspect(tmp_path / "kohya.safetensors")
    assert kohya.kind == "tied lora"
    assert sum(row.update or 0.0 for row in kohya.rows) == pytest.approx(total, rel=1e-5)
    formats.show(formats.inspect(tmp_path / "ramp.safetensors"))
    printed = capsys.readouterr().out
    assert "sks [red]do\ufffdg" in printed and "\x1b" not in printed and "0.7" in printed


@pytest.mark.parametrize("form", ["native", "kohya", "peft"])
def test_the_table_of_layers_is_not_folded(
    form: str, networks: Any, tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Eighty columns, or a pipe: one line per layer, under the whole name of its block."""
    monkeypatch.setenv("COLUMNS", "80")
    adapter = trained(networks, EVERY["ramp"])
    file = tmp_path / "a.safetensors"
    if form == "native":
        formats.save(adapter, file)
    else:
        formats.export(adapter, form, file)
    formats.show(formats.inspect(file))
    lines = capsys.readouterr().out.splitlines()
    dot, ours = ("_", "lora_unet_") if form == "kohya" else (".", "unet.")
    block = ours + "mid_block.attentions.0.transformer_blocks.0".replace(".", dot)
    found = lines.index(block)
    layer = next(line for line in lines[found:] if line.startswith(f"  attn2{dot}to_k "))
    assert "64x48" in layer and all(len(line) <= 80 for line in lines if line.startswith(("  ", "layer", ours)))
    head = next(i for i, line in enumerate(lines) if line.startswith("layer "))
    names = [line for line in lines[head:] if line.startswith("  ")]
    assert len(names) == len(adapter.layers()) and not any("W0" in line for line in lines)


def test_the_commands(tiny_model: Path, tmp_path: Path, capsys: Any) -> None:
    family = models.load(str(tiny_model))
    about = {**ABOUT, "base_model": str(tiny_model), "base_hash": family.fingerprint}
    formats.save(trained(family.networks, EVERY["ramp"]), tmp_path / "adapter.safetensors", about=about)
    out = str(tmp_path / "out.safetensors")
    commands.export(formats.ExportSettings(adapter=str(tmp_path), output=out, dtype="fp16"))
    assert "loaded back through diffusers" in capsys.readouterr().out
    home = str(tmp_path / "home.safetensors")
    commands.import_(formats.ImportSettings(file=out, output=home, pretrained_model_name_or_path=str(tiny_model)))
    header = formats.read_header(home)
    assert header.base_hash == family.fingerprint and header.trigger() == "sks dog"
    commands.inspect(formats.InspectSettings(file=home))
    assert f"needs the base model: --pretrained_model_name_or_path {tiny_model}" in capsys.readouterr().err
    commands.add(formats.AddSettings(adapters=(home, str(tmp_path)), output=str(tmp_path / "sum.safetensors")))
    assert formats.read_header(tmp_path / "sum.safetensors").config.rank == 6
    commands.export(formats.ExportSettings(adapter=home, merge_into=str(tmp_path / "merged")))
    assert (tmp_path / "merged" / "model_index.json").is_file()
    with pytest.raises(UserError, match="--output"):
        commands.export(formats.ExportSettings(adapter=home))


def test_settings_come_without_torch() -> None:
    code = "import sys, singlora_diffusion.formats as f; f.ExportSettings; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
