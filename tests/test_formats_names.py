"""Names in files against the converters of diffusers and against names that other programs are known to read."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.loaders import lora_conversion_utils, single_file_utils
from diffusers.utils.state_dict_utils import convert_unet_state_dict_to_peft
from safetensors.torch import save_file
from torch import Tensor, nn

from singlora_diffusion import adapters, formats
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import exporting, header, hollow, keys, lora_pairs, original_names, safetensors_io
from singlora_diffusion.formats.lora_pairs import Pair
from singlora_diffusion.models import flux, stable_diffusion_3, stable_diffusion_xl

SDXL = {
    "sample_size": 128,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "transformer_layers_per_block": (1, 2, 10),
    "attention_head_dim": (5, 10, 20),
    "cross_attention_dim": 2048,
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}
SMALL = {"block_out_channels": (32, 32, 64), "transformer_layers_per_block": 1, "attention_head_dim": 4}
ATTENTION_FIRST = {
    "down_block_types": ("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
}
UNETS = {
    "as published": SDXL,
    "one layer": {**SDXL, **SMALL, "layers_per_block": 1},
    "three layers, attention first": {**SDXL, **SMALL, **ATTENTION_FIRST, "layers_per_block": 3},
}
MEDIUM = {"num_layers": 24, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}


def on_meta(kind: Any, **config: Any) -> Any:
    with torch.device("meta"):
        return kind(**config)


def flux_model(double: int, single: int, **config: Any) -> Any:
    return on_meta(FluxTransformer2DModel, num_layers=double, num_single_layers=single, **config)


def layers(module: nn.Module) -> dict[str, Any]:
    return {path: one for path, one in module.named_modules() if isinstance(one, nn.Linear | nn.Conv2d)}


class Checkpoint(dict[str, Tensor]):
    """What else a converter takes out of it, such as norms, is there too."""

    def pop(self, key: str, *default: Any) -> Tensor:
        return super().pop(key, torch.zeros(6, 1))


def numbered(module: nn.Module) -> tuple[Checkpoint, dict[str, Tensor]]:
    """A checkpoint in the original names whose rows are numbers, and what rows each layer of diffusers has of it."""
    places, checkpoint, rows, start = original_names.of(module), Checkpoint(), {}, 0
    for path, layer in layers(module).items():
        place, size = places[path], layer.weight.shape[0]
        rows[path] = torch.arange(start, start + size)[:, None]
        start += size
        key = f"model.diffusion_model.{place.layer}.weight"
        whole = checkpoint.setdefault(key, torch.full((place.outputs or size, 1), -1))
        at = 0
        for one in place.rows or (range(size),):
            whole[one.start : one.stop] = rows[path][at : at + len(one)]
            at += len(one)
        assert at == size
    assert not any(bool((whole < 0).any()) for whole in checkpoint.values())  # every row is somebody's
    checkpoint |= {key.replace(".weight", ".bias"): whole for key, whole in checkpoint.items()}
    return checkpoint, rows


@pytest.mark.parametrize("name", UNETS)
def test_a_unets_original_names_are_those_of_diffusers_converter(name: str) -> None:
    unet = on_meta(UNet2DConditionModel, **UNETS[name])
    checkpoint, rows = numbered(unet)
    converted = single_file_utils.convert_ldm_unet_checkpoint(checkpoint, dict(unet.config))
    assert set(rows) == set(layers(unet))
    assert all(torch.equal(converted[f"{path}.weight"], want) for path, want in rows.items())


@pytest.mark.parametrize("guidance", [True, False])
def test_flux_original_names_are_those_of_diffusers_converter(guidance: bool) -> None:
    checkpoint, rows = numbered(flux_model(19, 38, guidance_embeds=guidance))
    converted = single_file_utils.convert_flux_transformer_checkpoint_to_diffusers(checkpoint)
    assert len(rows) == 19 * 14 + 38 * 6 + (10 if guidance else 8)
    assert all(torch.equal(converted[f"{path}.weight"], want) for path, want in rows.items())


@pytest.mark.parametrize("dual", [(), tuple(range(13))])
def test_sd3_original_names_are_those_of_diffusers_converter(dual: tuple[int, ...]) -> None:
    model = on_meta(SD3Transformer2DModel, **MEDIUM, dual_attention_layers=dual)
    checkpoint, rows = numbered(model)
    converted = single_file_utils.convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
    assert all(torch.equal(converted[f"{path}.weight"], want) for path, want in rows.items())


@pytest.mark.parametrize("name", UNETS)
def test_diffusers_maps_kohyas_names_of_a_unet_back(name: str) -> None:
    unet = on_meta(UNet2DConditionModel, **UNETS[name])
    spec = stable_diffusion_xl.NETWORKS["unet"].spec("unet", unet)
    places = keys.kohya(spec)
    adapted = [path for path in layers(unet) if ".transformer_blocks." in path or ".proj_" in path]
    tensors = {}
    for i, path in enumerate(adapted):
        place = places[f"unet.{path}"]
        assert not place.rows
        tensors |= {f"{place.layer}.lora_down.weight": torch.full((1, 1), i), f"{place.layer}.alpha": torch.ones(())}
        tensors[f"{place.layer}.lora_up.weight"] = torch.full((1, 1), i)
    assert len(adapted) == {"as published": 722}.get(name, len(adapted))
    mapped = lora_conversion_utils._maybe_map_sgm_blocks_to_diffusers(tensors, unet.config)
    found, _ = lora_conversion_utils._convert_non_diffusers_lora_to_diffusers(mapped)
    found = convert_unet_state_dict_to_peft(found)
    for i, path in enumerate(adapted):
        for part in ("lora_A", "lora_B"):
            assert int(found.pop(f"unet.{path}.{part}.weight")) == i
    assert not found


# --- fused pairs


def random_pairs(spec: Any, choose: Any, rank: int) -> dict[str, Pair]:
    generator = torch.Generator().manual_seed(0)
    return {
        spec.layer(path): Pair(
            torch.randn(one.out_features, rank, generator=generator),
            torch.randn(rank, one.in_features, generator=generator),
        )
        for path, one in layers(spec.module).items()
        if choose(path)
    }


def kohya(spec: Any, pairs: dict[str, Pair], rank: int) -> dict[str, Tensor]:
    config = AdapterConfig(rank=rank, alpha=3.0)
    adapter: Any = SimpleNamespace(networks={spec.name: spec}, u=0.5)
    return exporting._kohya(pairs, header.Header(config), adapter)


def near(one: Tensor, other: Tensor) -> bool:
    return float((one - other).norm() / other.norm()) < 1e-6


@pytest.mark.parametrize(
    "parts", [("to_q", "to_k", "to_v", "add_q_proj", "add_v_proj", "proj_mlp", "proj_out"), ("to_k",)]
)
def test_diffusers_reads_fused_pairs_of_flux(parts: tuple[str, ...]) -> None:
    """At the published width, since that is built into diffusers' converter."""
    spec = flux.NETWORKS["transformer"].spec("transformer", flux_model(1, 2))
    pairs = random_pairs(spec, lambda path: "blocks." in path and path.endswith(parts), 4)
    tensors = kohya(spec, pairs, 4)
    assert all(
        float(value) == 3 / 8 * len(tensors[key.replace(".alpha", ".lora_down.weight")])
        for key, value in tensors.items()
        if key.endswith(".alpha")
    )
    found = lora_conversion_utils._convert_kohya_flux_lora_to_diffusers(dict(tensors))
    for name, pair in pairs.items():
        up, down = found.pop(f"{name}.lora_B.weight"), found.pop(f"{name}.lora_A.weight")
        x = torch.randn(down.shape[1], 2).double()
        assert near(up.double() @ (down.double() @ x), pair.up.double() @ (pair.down.double() @ x))
    assert not any(bool(value.any()) for key, value in found.items() if "lora_B" in key)


def test_an_export_in_kohyas_form_at_the_published_width(tmp_path: Path) -> None:
    """Verified through diffusers, whose converter reads single blocks of that width alone."""
    networks = {"transformer": flux.NETWORKS["transformer"].spec("transformer", flux_model(1, 1))}
    hollow.fill(networks)
    adapter = adapters.attach(networks, AdapterConfig(rank=2, targets=("to_q", "to_v", "add_k_proj")), seed=1)
    found = formats.export(adapter, "kohya", tmp_path / "x.safetensors", whole=False)
    assert found.layers == 5 and found.layer_difference < 1e-6
    assert set(safetensors_io.read_index(tmp_path / "x.safetensors").tensors) == {
        f"lora_unet_{layer}.{part}"
        for layer in ("double_blocks_0_img_attn_qkv", "double_blocks_0_txt_attn_qkv", "single_blocks_0_linear1")
        for part in ("lora_down.weight", "lora_up.weight", "alpha")
    }


@pytest.mark.parametrize("family", ["flux", "sd3"])
def test_fused_pairs_come_apart_into_the_very_pairs_they_were_made_of(family: str, tmp_path: Path) -> None:
    if family == "flux":
        model = flux_model(2, 2, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=40)
        spec = flux.NETWORKS["transformer"].spec("transformer", model)
    else:
        config = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 8, "caption_projection_dim": 16}
        model = on_meta(SD3Transformer2DModel, **config, dual_attention_layers=(0,))
        spec = stable_diffusion_3.NETWORKS["transformer"].spec("transformer", model)
    pairs = random_pairs(spec, lambda path: path != "pos_embed.proj" and not path.endswith("to_k"), 3)
    tensors = kohya(spec, pairs, 3)
    save_file(tensors, tmp_path / "x.safetensors")
    index = safetensors_io.read_index(tmp_path / "x.safetensors")
    found = lora_pairs.of_file(index, {"transformer": spec})
    assert set(found) == set(pairs)
    for name, pair in found.items():
        assert pair.rank == 3 and near(pair.product(), pairs[name].product()), name
    ours = next(iter(pairs))
    tensors |= {f"{ours}.lora_A.weight": pairs[ours].down.clone(), f"{ours}.lora_B.weight": pairs[ours].up}
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="occurs twice"):
        lora_pairs.of_file(safetensors_io.read_index(tmp_path / "x.safetensors"), {"transformer": spec})


def test_a_fused_pair_with_one_down_for_all(tmp_path: Path) -> None:
    """As kohya's tools train it: q, k and v share a down, and a magnitude goes by rows."""
    model = flux_model(1, 1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=40)
    spec = flux.NETWORKS["transformer"].spec("transformer", model)
    up, down = torch.randn(96, 4), torch.randn(4, 32)
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    magnitude = torch.rand(96)
    tensors = {f"{name}.lora_B.weight": up, f"{name}.lora_A.weight": down, f"{name}.lora_magnitude_vector": magnitude}
    save_file(tensors, tmp_path / "x.safetensors")
    found = lora_pairs.of_file(safetensors_io.read_index(tmp_path / "x.safetensors"), {"transformer": spec})
    for i, last in enumerate(("to_q", "to_k", "to_v")):
        pair = found[f"transformer.transformer_blocks.0.attn.{last}"]
        assert torch.equal(pair.up, up[32 * i : 32 * i + 32]) and torch.equal(pair.down, down)
        assert pair.magnitude is not None and torch.equal(pair.magnitude, magnitude[32 * i : 32 * i + 32])
    save_file({f"{name}.lora_B.weight": up[:64].clone(), f"{name}.lora_A.weight": down}, tmp_path / "y.safetensors")
    with pytest.raises(UserError, match=r"weight \(96, 32\): made for another model"):
        lora_pairs.of_file(safetensors_io.read_index(tmp_path / "y.safetensors"), {"transformer": spec})


def test_pefts_own_files_have_their_scale_beside_them(tmp_path: Path) -> None:
    model = flux_model(1, 1, num_attention_heads=2, attention_head_dim=16, joint_attention_dim=40)
    spec = flux.NETWORKS["transformer"].spec("transformer", model)
    name = "base_model.model.transformer_blocks.0.attn.to_q"
    up, down = torch.randn(32, 4), torch.randn(4, 32)
    file, beside = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
    save_file({f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up}, file)

    def read() -> Tensor:
        found = lora_pairs.of_file(safetensors_io.read_index(file), {"transformer": spec})
        return found["transformer.transformer_blocks.0.attn.to_q"].product()

    assert near(read(), up.double() @ down.double())
    beside.write_text('{"r": 4, "lora_alpha": 8, "rank_pattern": {}}')
    assert near(read(), 2 * up.double() @ down.double())
    for text in ('{"r": 4, "lora_alpha": 8, "use_rslora": true}', '{"r": 0, "lora_alpha": 8}', "[]", "{"):
        beside.write_text(text)
        with pytest.raises(UserError, match=r"its adapter_config\.json cannot be used"):
            read()


# --- names that other programs read, as they write them

WRITTEN = {
    "sdxl": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q":
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.down_blocks.2.attentions.1.transformer_blocks.9.ff.net.0.proj":
            "lora_unet_input_blocks_8_1_transformer_blocks_9_ff_net_0_proj",
        "unet.down_blocks.1.downsamplers.0.conv": "lora_unet_input_blocks_6_0_op",
        "unet.mid_block.attentions.0.transformer_blocks.3.attn2.to_out.0":
            "lora_unet_middle_block_1_transformer_blocks_3_attn2_to_out_0",
        "unet.up_blocks.1.attentions.2.proj_in": "lora_unet_output_blocks_5_1_proj_in",
        "unet.up_blocks.0.upsamplers.0.conv": "lora_unet_output_blocks_2_2_conv",
        "unet.add_embedding.linear_1": "lora_unet_label_emb_0_0",
    },
    "flux": {
        "transformer.transformer_blocks.0.attn.to_k": "lora_unet_double_blocks_0_img_attn_qkv",
        "transformer.transformer_blocks.18.attn.add_q_proj": "lora_unet_double_blocks_18_txt_attn_qkv",
        "transformer.transformer_blocks.3.attn.to_add_out": "lora_unet_double_blocks_3_txt_attn_proj",
        "transformer.transformer_blocks.3.ff_context.net.2": "lora_unet_double_blocks_3_txt_mlp_2",
        "transformer.single_transformer_blocks.37.attn.to_v": "lora_unet_single_blocks_37_linear1",
        "transformer.single_transformer_blocks.37.proj_mlp": "lora_unet_single_blocks_37_linear1",
        "transformer.single_transformer_blocks.0.proj_out": "lora_unet_single_blocks_0_linear2",
        "transformer.single_transformer_blocks.0.norm.linear": "lora_unet_single_blocks_0_modulation_lin",
    },
}  # fmt: skip
READ = {
    "sdxl": {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.processor.to_q",
            "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
            "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q",
            "lycoris_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q",
        ),
    },
    "flux": {
        "transformer.transformer_blocks.0.attn.to_q": (
            "transformer.transformer_blocks.0.attn.to_q",
            "diffusion_model.transformer_blocks.0.attn.to_q",
            "lora_transformer_transformer_blocks_0_attn_to_q",
            "lora_unet_double_blocks_0_img_attn_qkv",
            "diffusion_model.double_blocks.0.img_attn.qkv",
            "double_blocks.0.img_attn.qkv",
        ),
    },
    "sd3": {
        "transformer.transformer_blocks.1.attn2.to_q": (
            "transformer.transformer_blocks.1.attn2.to_q",
            "lora_transformer_transformer_blocks_1_attn2_to_q",
            "lora_unet_joint_blocks_1_x_block_attn2_qkv",
            "diffusion_model.joint_blocks.1.x_block.attn2.qkv",
        ),
        "transformer.transformer_blocks.23.norm1_context.linear": (
            "lora_unet_joint_blocks_23_context_block_adaLN_modulation_1",
        ),
    },
}


@pytest.fixture(scope="module")
def full_size() -> dict[str, Any]:
    unet = on_meta(UNet2DConditionModel, **SDXL)
    sd3 = on_meta(SD3Transformer2DModel, **MEDIUM, dual_attention_layers=tuple(range(13)))
    return {
        "sdxl": stable_diffusion_xl.NETWORKS["unet"].spec("unet", unet),
        "flux": flux.NETWORKS["transformer"].spec("transformer", flux_model(19, 38, guidance_embeds=True)),
        "sd3": stable_diffusion_3.NETWORKS["transformer"].spec("transformer", sd3),
    }


@pytest.mark.parametrize("family", WRITTEN)
def test_kohyas_names(family: str, full_size: Any) -> None:
    places = keys.kohya(full_size[family])
    assert {name: places[name].layer for name in WRITTEN[family]} == WRITTEN[family]


@pytest.mark.parametrize("family", READ)
def test_spellings_that_are_read(family: str, full_size: Any) -> None:
    spellings = keys.spellings({full_size[family].name: full_size[family]})
    for name, spelled in READ[family].items():
        for one in spelled:
            assert name in [piece.name for piece in spellings.get(one, ())], one
    qkv = spellings.get("lora_unet_double_blocks_0_img_attn_qkv", ())
    assert [piece.rows[0].start for piece in qkv] == ([0, 3072, 6144] if family == "flux" else [])


@pytest.mark.parametrize(("ending", "part"), [
    (".lora_down.weight", "down"), (".lora_A.weight", "down"), (".lora.down.weight", "down"),
    ("_lora.down.weight", "down"), (".lora_linear_layer.down.weight", "down"), (".lora_A.default.weight", "down"),
])  # fmt: skip
def test_endings_that_are_read(ending: str, part: str) -> None:
    assert keys.tag(f"base_model.model.a.b{ending}") == ("a.b", part)
