"""Adapters of language models, and the article's tables: `pytest tests/test_language.py`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import singlora_diffusion as sd
from eval.language import counts
from singlora_diffusion.adapters import budget
from singlora_diffusion.models.linear_view import as_linear


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
