"""Adapters on a quantized base model: exactly those on a base whose weights are the unpacked ones."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import nn

from singlora_diffusion import adapters, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import quantized
from singlora_diffusion.sampling.generate import generate
from singlora_diffusion.sampling.settings import GenerateSettings
from singlora_diffusion.settings import build
from singlora_diffusion.training.loop import run
from singlora_diffusion.training.recipe import Recipe

pytest.importorskip("bitsandbytes", reason='pip install "singlora-diffusion[quantize]"')
pytest.importorskip("torchao", reason='pip install "singlora-diffusion[quantize]"')
pytestmark = pytest.mark.numerical
NAMES = list(quantized.QUANTIZATIONS)


def unpacked(network: nn.Module) -> nn.Module:
    """A copy with ordinary layers of the weights that the packed ones multiply by."""
    plain = copy.deepcopy(network)
    for path, layer in network.named_modules():
        if isinstance(layer, nn.Linear) and quantized.is_quantized(layer):
            one = nn.Linear(layer.in_features, layer.out_features, bias=layer.bias is not None)
            one.weight.data = quantized.dequantized(layer).clone()
            if layer.bias is not None:
                one.bias.data = layer.bias.data.clone()
            owner, _, name = path.rpartition(".")
            setattr(plain.get_submodule(owner), name, one.requires_grad_(False))
    return plain


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("folder", ["tiny_model", "tiny_flux", "tiny_flux2"])
def test_an_adapter_on_a_packed_base_is_one_on_the_unpacked_base(name: str, folder: str, request: Any) -> None:
    family: Any = models.load(str(request.getfixturevalue(folder)), quantization=name)
    assert family.dtype == torch.float32
    spec = next(iter(family.networks.values()))
    packed = [layer for layer in spec.module.modules() if isinstance(layer, nn.Linear)]
    assert packed and all(map(quantized.is_quantized, packed))
    networks = {"packed": spec.module, "plain": unpacked(spec.module)}
    for config in (
        AdapterConfig(rank=4, targets=spec.presets["attention+mlp"]),
        AdapterConfig(rank=4, dora=True, init="offset"),
    ):
        found: dict[str, Any] = {}
        for which, network in networks.items():
            adapter = adapters.attach({spec.name: replace(spec, module=network)}, config, seed=1)
            adapter.set_ramp(1.0)
            inputs = spec.sample_inputs()
            with torch.random.fork_rng():
                output = network(**inputs)[0]
            output.square().mean().backward()
            found[which] = output.detach(), [p.grad for p in adapter.parameters()], dict(adapter.delta_weights())
            if which == "packed":
                with pytest.raises(UserError, match="load it without --quantize"):
                    adapter.merge()
            adapter.detach()
        # The same products; torchao scales rows after the product, which rounds in another place.
        torch.testing.assert_close(found["packed"], found["plain"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_text_encoders(name: str, tiny_flux: Path, tiny_flux2: Path) -> None:
    """T5 and Qwen3 are packed, but for what the libraries keep; CLIP is not."""
    family: Any = models.load(str(tiny_flux), "bfloat16", quantization=name)
    assert not any(quantized.is_quantized(one) for one in family.text_encoder.modules() if isinstance(one, nn.Linear))
    for path, layer in family.text_encoder_2.named_modules():
        if isinstance(layer, nn.Linear):
            assert quantized.is_quantized(layer) is not path.endswith(".wo"), path
    assert family.encode_prompts(["a dog"])["text"].isfinite().all()
    klein: Any = models.load(str(tiny_flux2), quantization=name)
    assert quantized.is_quantized(klein.text_encoder.model.layers[0].self_attn.q_proj)
    assert len(models.sample(klein, ["a dog"], [0], steps=1)) == 1


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch, tiny_model: Path) -> None:
    monkeypatch.setitem(quantized.QUANTIZATIONS, "nf4", quantized.Quantization("no_such_library", 1, lambda *_: None))
    with pytest.raises(
        UserError, match=r"--quantize nf4 needs no_such_library.*singlora-diffusion\[quantize\]"
    ) as told:
        models.load(str(tiny_model), quantization="nf4")
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", NAMES)
def test_the_commands(name: str, tiny_flux: Path, tmp_path: Path) -> None:
    """Trained on a packed base, the adapter is one of the base itself."""
    Image.new("RGB", (32, 32), "red").save(tmp_path / "one.png")
    recipe = build(
        Recipe,
        instance_data_dir=tmp_path,
        instance_prompt="a photo of sks dog",
        pretrained_model_name_or_path=str(tiny_flux),
        quantize=name,
        max_train_steps=2,
        train_batch_size=1,
        validation_steps=0,
        device="cpu",
        report_to="none",
        output_dir=tmp_path / "run",
    )
    (*_, saved) = run(recipe)
    for other in (None, name):
        lines = generate(
            build(
                GenerateSettings,
                adapter=(saved.path,),
                prompt=("a dog",),
                seeds="0",
                quantize=other,
                num_inference_steps=1,
                device="cpu",
                output_dir=tmp_path / f"images-{other}",
            )
        )
        assert len(lines) == 1
