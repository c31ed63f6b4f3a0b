"""Parameter counts from configs alone: Stable Diffusion 1.5's numbers, and what attached adapters really train."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from transformers import CLIPTextConfig, CLIPTextModel

from singlora_diffusion import adapters
from singlora_diffusion.adapters.budget import (
    BudgetSettings,
    budget,
    comparison,
    count,
    match,
    rows,
    shapes,
)
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import meta_networks

ALL = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
UNET_15 = {
    "_class_name": "UNet2DConditionModel",
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
TEXT_15 = {
    "model_type": "clip_text_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "vocab_size": 49408,
    "max_position_embeddings": 77,
    "projection_dim": 768,
}


@pytest.fixture(scope="module")
def sd15(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers folder of Stable Diffusion 1.5 that holds config files and no weights."""
    folder = tmp_path_factory.mktemp("stable-diffusion-v1-5")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    for part, config in (("unet", UNET_15), ("text_encoder", TEXT_15)):
        (folder / part).mkdir()
        (folder / part / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def layers(sd15: Path) -> list[tuple[int, int]]:
    return shapes(sd15, ALL)


def test_the_config_is_stable_diffusion_15_and_no_weight_exists(sd15: Path) -> None:
    networks = meta_networks(sd15)
    assert sum(p.numel() for p in networks["unet"].module.parameters()) == 859_520_964
    assert all(p.is_meta for network in networks.values() for p in network.module.parameters())


@pytest.mark.parametrize(
    ("targets", "attention", "modules", "lora8", "singlora8", "singlora16", "magnitudes"),
    [
        (("to_q", "to_k"), "attn1", 32, 399_360, 199_680, 399_360, 24_960),
        (("to_q", "to_k"), "attn2", 32, 397_824, 222_720, 445_440, 24_960),
        (("to_q", "to_k"), "", 64, 797_184, 422_400, 844_800, 49_920),
        (("to_k", "to_v"), "attn1", 32, 399_360, 199_680, 399_360, 24_960),
        (("to_k", "to_v"), "attn2", 32, 396_288, 245_760, 491_520, 24_960),
        (("to_k", "to_v"), "", 64, 795_648, 445_440, 890_880, 49_920),
        (("to_q", "to_k", "to_v"), "attn1", 48, 599_040, 299_520, 599_040, 37_440),
        (("to_q", "to_k", "to_v"), "attn2", 48, 595_968, 345_600, 691_200, 37_440),
        (("to_q", "to_k", "to_v"), "", 96, 1_195_008, 645_120, 1_290_240, 74_880),
        (ALL, "attn1", 64, 798_720, 399_360, 798_720, 49_920),
        (ALL, "attn2", 64, 795_648, 445_440, 890_880, 49_920),
        (ALL, "", 128, 1_594_368, 844_800, 1_689_600, 99_840),
    ],
)
def test_stable_diffusion_15(sd15, targets, attention, modules, lora8, singlora8, singlora16, magnitudes) -> None:
    # A target is the end of a layer's path, so `attn1.to_q` picks the self-attention's.
    found = shapes(sd15, [f"{attention}.{target}" if attention else target for target in targets])
    assert len(found) == modules
    assert count("lora", 8, found) == count("lora+", 8, found) == lora8
    assert count("singlora", 8, found) == count("offset", 8, found) == count("balanced", 8, found) == singlora8
    assert count("singlora", 16, found) == singlora16
    assert count("dora", 8, found) - lora8 == count("singlora+dora", 8, found) - singlora8 == magnitudes


def test_the_text_encoder_of_stable_diffusion_15(sd15: Path, layers: list[tuple[int, int]]) -> None:
    text = shapes(sd15, (), TEXT)
    assert len(text) == 48
    assert (count("lora", 8, text), count("singlora", 8, text)) == (589_824, 294_912)
    assert count("dora", 8, text) == 589_824 + 36_864
    assert shapes(sd15, ALL, TEXT) == layers + text


def test_equal_budgets_on_stable_diffusion_15(sd15: Path, layers: list[tuple[int, int]]) -> None:
    assert match(1_594_368, "lora", layers) == (8, 1_594_368, 0.0)
    assert match(1_594_368, "singlora", layers)[:2] == (15, 1_584_000)
    assert match(1_594_368, "singlora", layers).deviation == pytest.approx(-0.0065, abs=1e-4)
    assert match(1_594_368, "dora", layers)[:2] == (7, 1_494_912)
    query_key = shapes(sd15, ("to_q", "to_k"))
    assert count("lora", 8, query_key) == 797_184
    assert match(797_184, "singlora", query_key)[:2] == (15, 792_000)


def test_match_is_the_nearest_rank_and_the_smallest_of_equals(layers: list[tuple[int, int]]) -> None:
    for method in rows():
        found = match(1_594_368, method, layers)
        assert found.parameters == count(method, found.rank, layers)
        assert found.deviation == pytest.approx(found.parameters / 1_594_368 - 1)
        for rank in range(1, 200):
            miss = abs(count(method, rank, layers) - 1_594_368)
            nearest = abs(found.parameters - 1_594_368)
            assert miss > nearest or (miss == nearest and (rank >= found.rank or method == "oft"))
    # Of block sizes that train as much, one that divides every width: PEFT rounds 29 to 32.
    assert count("oft", 29, layers) == count("oft", 32, layers)
    assert match(1_594_368, "oft", layers).rank == 32
    # Where none divides them all, each layer has the nearest that does: 32, 28 and 32.
    uneven = [(96, 96)] * 18 + [(96, 112)] * 14 + [(128, 128)] * 24
    assert match(102_144, "oft", uneven)[:2] == (32, (18 * 96 * 31 + 14 * 112 * 27 + 24 * 128 * 31) // 2)
    assert match(1, "oft", uneven).parameters > 0  # a block of 1 learns nothing


def test_lokr_saturates_and_not_from_below(layers: list[tuple[int, int]]) -> None:
    # At 160, half of W2's 320 rows, PEFT trains W2 in full; just before, the pair of a (320, 192) W2 is the larger one.
    full = sum(16 + out * into // 16 for out, into in layers)
    assert count("lokr", 160, layers) == count("lokr", 999, layers) == full < count("lokr", 159, layers)


def networks_of(channels: tuple[int, int], context: int) -> dict[str, torch.nn.Module]:
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=channels,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=context,
        attention_head_dim=2,
        norm_num_groups=2,
    )
    text = CLIPTextConfig(
        vocab_size=11, hidden_size=context, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8,
    )  # fmt: skip
    return {"unet": unet, "text_encoder": CLIPTextModel(text)}


@pytest.fixture(scope="module", params=[((32, 64), 48), ((30, 50), 42)], ids=str)
def tiny(request: pytest.FixtureRequest) -> dict[str, torch.nn.Module]:
    return networks_of(*request.param)


@pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")  # PEFT's, where the rank divides no width
@pytest.mark.parametrize("rank", [2, 5, 8, 40])
@pytest.mark.parametrize("method", rows())
def test_closed_forms_are_what_an_attached_adapter_trains(method: str, rank: int, tiny) -> None:
    config = replace(rows()[method], rank=rank, text_targets=TEXT)
    adapter = adapters.attach(tiny, config)
    try:
        trained = sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    finally:
        adapter.detach()
    assert count(method, rank, shapes(tiny, ALL, TEXT)) == trained == adapter.num_parameters()
    form = adapters.METHODS[config.method].tensors  # what is stored, key by key
    kept = {key: tuple(tensor.shape) for key, tensor in adapter.state_dict().items()}
    assert kept == {
        f"{name}.{key}": shape
        for name, base in adapter.layers().items()
        for key, shape in form(config, rank, base.out_features, base.in_features).items()
    }


def test_printed_table(sd15: Path, capsys: pytest.CaptureFixture[str]) -> None:
    budget(BudgetSettings(str(sd15), match="lora:8"))
    lines = {line.replace("│", " ").split()[0]: line for line in capsys.readouterr().out.splitlines() if "│" in line}
    assert "1,584,000" in lines["singlora"] and "15" in lines["singlora"] and "over" not in lines["singlora"]
    assert "1,594,368" in lines["lora"] and "+0.00%" in lines["lora"]
    assert "over 2%" in lines["dora"] and "over 2%" in lines["oft"]
    assert set(rows()) <= set(lines)


def test_a_number_is_a_budget_too(sd15: Path) -> None:
    by_number = comparison(BudgetSettings(str(sd15), match="1594368"))
    assert by_number == comparison(BudgetSettings(str(sd15), match="lora:8"))
    assert (by_number.budget, by_number.layers) == (1_594_368, 128)


def test_refusals(sd15: Path, tmp_path: Path) -> None:
    good = BudgetSettings(str(sd15))
    for name, text in (("empty", None), ("broken", "{"), ("flux", '{"_class_name": "FluxTransformer2DModel"}')):
        (tmp_path / name / "unet").mkdir(parents=True)
        (tmp_path / name / "model_index.json").write_bytes((sd15 / "model_index.json").read_bytes())
        if text is not None:
            (tmp_path / name / "unet" / "config.json").write_text(text)
    for settings, message in (
        (replace(good, match="lora"), "--match lora"),
        (replace(good, match="lora:0"), "--match lora:0"),
        (replace(good, match="oft:1"), "trains nothing"),
        (replace(good, match="lara:8"), "unknown method 'lara'"),
        (replace(good, targets=("to_nothing",)), "to_nothing"),
        (replace(good, targets=()), "nothing to adapt: no targets"),
        (replace(good, targets=("to_q", "to_q")), "named twice"),
        (replace(good, match="lora:5000"), "rank 1 to 4096"),
        (replace(good, match="9" * 5000), "1 to 1,000,000,000,000"),
        (replace(good, pretrained_model_name_or_path=str(tmp_path)), "no model_index.json"),
        (replace(good, pretrained_model_name_or_path=str(tmp_path / "empty")), "unet/config.json"),
        (replace(good, pretrained_model_name_or_path=str(tmp_path / "broken")), "JSON"),
        (replace(good, pretrained_model_name_or_path=str(tmp_path / "flux")), "FluxTransformer2DModel"),
        (replace(good, pretrained_model_name_or_path=str(tmp_path / "absent")), "no model at"),
        (replace(good, pretrained_model_name_or_path="absent"), "no model at"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            comparison(settings)
        assert "\n" not in str(caught.value)


def test_settings_import_without_torch() -> None:
    code = "import sys, singlora_diffusion.adapters.budget as b; b.BudgetSettings(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_any_family_and_its_presets(tiny_flux: Path, tiny_sdxl: Path) -> None:
    """By its config files alone, layers by default, by preset and by name."""
    for folder, text_encoders in ((tiny_flux, 1), (tiny_sdxl, 2)):
        networks = meta_networks(folder)
        denoiser = next(iter(networks.values()))
        default = shapes(folder)
        assert default == shapes(folder, denoiser.targets) == shapes(folder, ("attention",))
        assert len(shapes(folder, ("attention+mlp",))) > len(default)
        every = shapes(folder, None, None)
        assert len(every) == len(default) + text_encoders * 4 * 2  # two layers of four projections each
        adapter = adapters.attach(networks, AdapterConfig(rank=3, text_targets=None))
        assert count("singlora", 3, every) == adapter.num_parameters()
        found = comparison(BudgetSettings(str(folder), targets=("attention+mlp",), text_targets=None))
        assert found.layers > len(every) and set(found.rows) == set(rows())
