"""The published models at full size, from their configurations alone: parameters, adapted layers, trained numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import published
from singlora_diffusion import models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.targets import chosen, resolved

ADAPTED = [  # targets; layers, LoRA's and SingLoRA's trained parameters at rank 8, all in the denoiser
    ("sd15", None, 128, 1_594_368, 844_800),
    ("sdxl", None, 560, 11_612_160, 6_287_360),
    ("sd35-medium", None, 191, 4_694_016, 2_347_008),
    ("sd35-medium", ("attention+attn2",), 243, 5_971_968, 2_985_984),
    ("flux-dev", ("to_q", "to_k", "to_v", "to_out.0"), 190, 9_338_880, 4_669_440),
    ("flux-dev", ("attention+mlp",), 342, 22_413_312, 14_008_320),  # the targets of diffusers' script
    ("klein-4b", None, 60, 8_355_840, 6_881_280),
    ("klein-9b", None, 80, 13_893_632, 11_272_192),
]


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    found = {}
    for name, model in published.MODELS.items():
        folder = Path(tmp_path_factory.mktemp(name))
        (folder / "model_index.json").write_text(json.dumps({"_class_name": model.pipeline}))
        for part, config in model.parts.items():
            (folder / part).mkdir()
            (folder / part / "config.json").write_text(json.dumps(config))
        found[name] = models.meta_networks(folder)
    return found


@pytest.mark.parametrize("name", published.MODELS)
def test_parameters(name: str, networks: dict[str, Any]) -> None:
    denoiser = next(iter(networks[name].values()))
    assert sum(p.numel() for p in denoiser.module.parameters()) == published.MODELS[name].parameters


@pytest.mark.parametrize(("name", "targets", "count", "lora", "singlora"), ADAPTED)
def test_adapted_layers(
    name: str,
    targets: tuple[str, ...] | None,
    count: int,
    lora: int,
    singlora: int,
    networks: dict[str, Any],
) -> None:
    config = resolved(AdapterConfig(targets=targets), networks[name])
    (layers,) = chosen(networks[name], config).values()
    shapes = [(layer.out_features, layer.in_features) for layer in layers.values()]
    assert (len(shapes), 8 * sum(map(sum, shapes)), 8 * sum(map(max, shapes))) == (count, lora, singlora)


@pytest.mark.parametrize("name", published.MODELS)
def test_text_encoders(name: str, networks: dict[str, Any]) -> None:
    """`text_targets` None: every CLIP, neither T5 nor Qwen3."""
    adapted = chosen(networks[name], resolved(AdapterConfig(text_targets=None), networks[name]))
    text = {part: len(layers) for part, layers in adapted.items() if part.startswith("text")}
    expected = {"text_encoder": 48, "text_encoder_2": 128}
    few = {"sd15": 1, "flux-dev": 1, "klein-4b": 0, "klein-9b": 0}.get(name, 2)
    assert text == dict(list(expected.items())[:few])
