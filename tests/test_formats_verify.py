"""A right file is written on every processor, a wrong one on none."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from singlora_diffusion import adapters, formats
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import exporting, verify_export
from singlora_diffusion.models.network import specs

pytestmark = pytest.mark.numerical

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
CONFIG = AdapterConfig(rank=4, alpha=8.0, targets=("to_q", "to_k"), text_targets=TEXT)
LAYER = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
QUERY = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def enlarged(networks: Mapping[str, nn.Module], factor: float, seed: int = 1) -> Any:
    adapter = adapters.attach(dict(networks), CONFIG, seed=seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.mul_(factor)
    return adapter


@pytest.mark.parametrize("factor", [1.0, 3.0, 10.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_right_file_is_written_however_much_rounding_does(
    factor: float, seed: int, networks: Any, tmp_path: Path
) -> None:
    """Beside strong updates attention saturates, and the outputs differ a hundred times as much as for weak ones."""
    found = formats.export(enlarged(networks, factor, seed), "kohya", tmp_path / "x.safetensors")
    assert found.layer_difference < 1e-6


def scale_one(tensors: dict[str, Tensor]) -> None:
    tensors[f"{LAYER}.lora_B.weight"] *= 1.01


def leave_out(tensors: dict[str, Tensor]) -> None:
    del tensors[f"{QUERY}.lora_A.weight"], tensors[f"{QUERY}.lora_B.weight"]


def swap(tensors: dict[str, Tensor]) -> None:
    other = QUERY.replace("layers.0", "layers.1")
    for key in ("lora_A.weight", "lora_B.weight"):
        tensors[f"{QUERY}.{key}"], tensors[f"{other}.{key}"] = tensors[f"{other}.{key}"], tensors[f"{QUERY}.{key}"]


def add_one(tensors: dict[str, Tensor]) -> None:
    for key in ("lora_A.weight", "lora_B.weight"):
        one = tensors[f"{LAYER}.{key}"]
        tensors[f"{LAYER}.{key}".replace("to_k", "to_v")] = one * 1e-3


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (scale_one, r"attn2\.to_k.* differs by 1\.0e-02"),
        (leave_out, "layers.0.self_attn.q_proj without an adapter"),
        (swap, "differs by"),
        (add_one, r"changes unet\..*attn2\.to_v too"),
    ],
)
def test_a_wrong_file_is_not_written(
    change: Callable[[dict[str, Tensor]], None], reason: str, networks: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    def wrong(*arguments: Any) -> Any:
        tensors = dict(exporting._peft(*arguments))
        change(tensors)
        return tensors

    monkeypatch.setitem(exporting.FORMS, "peft", wrong)
    with pytest.raises(UserError, match=reason):
        formats.export(enlarged(networks, 1.0), "peft", tmp_path / "x.safetensors")
    assert not any(tmp_path.iterdir())


def test_outputs_alone_tell_a_factor_that_is_off_by_a_hundredth(networks: Any, tmp_path: Path) -> None:
    """The layers are compared first; what they cannot show, the outputs do."""
    adapter = enlarged(networks, 1.0)
    formats.export(adapter, "peft", tmp_path / "x.safetensors")
    twins = {name: verify_export.twin(network.module, name, adapter) for name, network in adapter.networks.items()}
    verify_export.load(tmp_path / "x.safetensors", twins)
    for path in list(verify_export.paths(adapter, "unet").values())[::8]:
        layer: Any = twins["unet"].get_submodule(path)
        weight = layer.lora_B[verify_export.NAME].weight
        before = weight.data
        weight.data = before * 1.01
        with pytest.raises(UserError, match="outputs of unet differ"):
            verify_export.compare_outputs(adapter.networks["unet"], twins["unet"], 0.0)
        weight.data = before
    assert verify_export.compare_outputs(adapter.networks["unet"], twins["unet"], 0.0)


def test_computing_in_float64_leaves_no_trace(networks: Any) -> None:
    for spec in specs(networks).values():
        inputs = spec.sample_inputs()
        single = spec.module(**inputs)[0]
        with verify_export.in_float64(spec.module):
            exact = spec.module(**inputs)[0]
        assert exact.dtype == torch.float64 and torch.equal(spec.module(**inputs)[0], single)
        assert {tensor.dtype for tensor in spec.module.parameters()} == {torch.float32}
        doubled = spec.module.double()(
            **{key: value.double() if value.is_floating_point() else value for key, value in inputs.items()}
        )[0]
        assert float((exact - doubled).norm() / doubled.norm()) < 1e-6  # the timestep's embedding is float32 there
