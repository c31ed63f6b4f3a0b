"""Adapters of every family leave as LoRA files that diffusers loads, and come back as other programs' LoRAs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from singlora_diffusion import adapters, formats, models
from singlora_diffusion.adapters.config import AdapterConfig

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
