"""PEFT's methods behind the adapter contract: identities on a tiny random UNet and CLIP text encoder, CPU, offline."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from diffusers import UNet2DConditionModel
from peft.optimizers import create_loraplus_optimizer
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from singlora_diffusion.adapters import peft_baselines
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.registry import Adapter, attach
from singlora_diffusion.errors import UserError

pytestmark = pytest.mark.numerical

METHODS = tuple(peft_baselines.ROWS)
CONFIG = AdapterConfig(method="lora", rank=4, text_rank=2, text_targets=("q_proj", "k_proj", "v_proj", "out_proj"))
TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 3, 2]])
LATENTS = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)


@pytest.fixture(scope="module")
def originals() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=48,
        attention_head_dim=4,
        norm_num_groups=8,
    )
    text = CLIPTextConfig(
        vocab_size=11,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=8,
        eos_token_id=2,
    )
    return {"unet": unet.eval(), "text_encoder": CLIPTextModel(text).eval()}


@pytest.fixture
def networks(originals: dict[str, nn.Module]) -> dict[str, nn.Module]:
    return copy.deepcopy(originals)


def answer(networks: dict[str, nn.Module]) -> torch.Tensor:
    dtype = next(networks["unet"].parameters()).dtype
    text = networks["text_encoder"](TOKENS).last_hidden_state
    return networks["unet"](LATENTS.to(dtype), torch.tensor([3, 500]), text).sample


def text_of(networks: dict[str, nn.Module]) -> torch.Tensor:
    return networks["text_encoder"](TOKENS).last_hidden_state


def randomize(adapter: Adapter, size: float = 0.05) -> None:
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def bits(networks: dict[str, nn.Module]) -> Iterator[tuple[str, int, bool, torch.Tensor]]:
    for name, network in networks.items():
        for key, module in network.named_modules():
            for tensor_name, tensor in module.named_parameters(recurse=False):
                yield f"{name}.{key}.{tensor_name}", id(module), tensor.requires_grad, tensor.detach().clone()


def same(a: list, b: list) -> bool:
    return len(a) == len(b) and all(x[:3] == y[:3] and torch.equal(x[3], y[3]) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
def test_attach_change_merge_unmerge_detach(method: str, dtype: torch.dtype, networks: dict[str, nn.Module]) -> None:
    for network in networks.values():
        network.to(dtype)
    before = list(bits(networks))
    with torch.no_grad():
        base = answer(networks)
        adapter = attach(networks, replace(CONFIG, method=method))
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        start = relative(answer(networks).float(), base.float())
        assert start == 0.0 if method != "dora" else start < (1e-6 if dtype == torch.float32 else 1e-2)

        randomize(adapter)
        attached, text = answer(networks), text_of(networks)
        assert attached.dtype == dtype
        assert relative(attached.float(), base.float()) > 0.02

        adapter.merge()
        assert [k for k, *_ in bits(networks)] == [k for k, *_ in before]
        assert relative(answer(networks).float(), attached.float()) < (1e-5 if dtype == torch.float32 else 5e-2)
        assert relative(text_of(networks).float(), text.float()) < (1e-5 if dtype == torch.float32 else 5e-2)
        adapter.unmerge()
        assert torch.equal(answer(networks), attached)

        adapter.set_scale(0.0)
        assert torch.equal(answer(networks), base)
        adapter.set_scale(1.0)
        assert torch.equal(answer(networks), attached)

        adapter.merge()
        adapter.detach()
    assert same(list(bits(networks)), before)
    assert all(not hasattr(network, "peft_config") for network in networks.values())


@pytest.mark.parametrize("method", METHODS)
def test_delta_weights_are_what_merging_adds(method: str, networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, method=method, alpha=None if method == "oft" else 6.0))
    randomize(adapter)
    w0 = {name: layer.weight.detach().clone() for name, layer in adapter.layers().items()}
    for scale in (1.0, 0.5):
        adapter.set_scale(scale)
        deltas = dict(adapter.delta_weights())
        x = {name: torch.randn(3, w.shape[1], generator=torch.Generator().manual_seed(1)) for name, w in w0.items()}
        paths = {adapter_path(name): name for name in w0}
        for path, name in paths.items():
            network, _, inside = path.partition(".")
            layer = networks[network].get_submodule(inside)
            bias = adapter.layers()[name].bias
            dense = nn.functional.linear(x[name], w0[name] + deltas[name], bias)
            assert relative(layer(x[name]), dense) < 1e-5, (name, scale)
        adapter.merge()
        for name, layer in adapter.layers().items():
            assert deltas[name].dtype == torch.float32 and deltas[name].norm() > 0
            assert torch.equal(layer.weight, w0[name] + deltas[name])
        assert all(torch.equal(d, deltas[name]) for name, d in adapter.delta_weights())  # the same while merged
        adapter.unmerge()


def adapter_path(name: str) -> str:
    return name.replace("text_encoder.text_model.", "text_encoder.")


@pytest.mark.parametrize("method", METHODS)
def test_state_round_trip_is_exact_and_strict(method: str, networks, originals: dict[str, nn.Module]) -> None:
    config = replace(CONFIG, method=method)
    adapter = attach(networks, config, seed=1)
    randomize(adapter)
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for key in state)
    assert not any(".default" in key or key.endswith(".weight") or "base_layer" in key for key in state)

    other = copy.deepcopy(originals)
    fresh = attach(other, config, seed=2)
    fresh.load_state_dict(state)
    assert list(fresh.state_dict()) == list(state)
    assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in state.items())
    with torch.no_grad():
        assert torch.equal(answer(other), answer(networks))

    first, *_ = state
    for wrong, name in (
        ({k: v for k, v in state.items() if k != first}, first),
        (state | {"unet.conv_in.lora_A": torch.zeros(1)}, "unet.conv_in.lora_A"),
        (state | {first: torch.zeros(3, 3, 3)}, first),
    ):
        kept = {key: tensor.clone() for key, tensor in fresh.state_dict().items()}
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            fresh.load_state_dict({key: tensor + 1 for key, tensor in wrong.items()})
        assert all(torch.equal(fresh.state_dict()[key], tensor) for key, tensor in kept.items())


@pytest.mark.parametrize("method", METHODS)
def test_gradient_reaches_the_adapter_alone(method: str, networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, method=method))
    randomize(adapter)
    answer(networks).square().mean().backward()
    own = {id(p) for p in adapter.parameters()}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    for network in networks.values():
        assert all(p.grad is None for p in network.parameters() if id(p) not in own)
    grouped = [p for group in adapter.param_groups(1e-3) for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(own)


def test_only_the_named_projections_are_adapted(networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, targets=("to_k", "to_out.0"), text_targets=("q_proj",)))
    unet, text = networks["unet"], networks["text_encoder"]
    attentions = [n for n, m in unet.named_modules() if n.endswith(("attn1", "attn2"))]
    expected = {f"unet.{n}.{t}" for n in attentions for t in ("to_k", "to_out.0")}
    expected |= {f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(2)}
    assert set(adapter.layers()) == expected
    wrapped = [m for network in (unet, text) for m in network.modules() if hasattr(m, "base_layer")]
    assert len(wrapped) == len(expected)
    assert all(adapter.layers()[f"unet.{n}.to_k"] is unet.get_submodule(f"{n}.to_k").base_layer for n in attentions)


def test_rank_and_alpha_differ_per_network(networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, alpha=8.0, text_alpha=1.0))
    state = adapter.state_dict()
    assert {t.shape[0] for key, t in state.items() if key.endswith("lora_A")} == {4, 2}
    randomize(adapter)
    deltas = dict(adapter.delta_weights())
    for name, scale in (
        ("unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k", 2.0),
        ("text_encoder.text_model.encoder.layers.1.self_attn.v_proj", 0.5),
    ):
        product = state[f"{name}.lora_B"] @ state[f"{name}.lora_A"]
        torch.testing.assert_close(deltas[name], scale * product)


@pytest.mark.parametrize("method", ["lora", "lora+"])
def test_factors_are_the_update(method: str, networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, method=method, alpha=2.0))
    randomize(adapter)
    adapter.set_scale(0.7)
    deltas = dict(adapter.delta_weights())
    for name, up, down in adapter.factors():
        assert up.shape[1] == down.shape[0] == (4 if name.startswith("unet.") else 2)
        torch.testing.assert_close(up @ down, deltas[name])


@pytest.mark.parametrize("method", ["dora", "oft", "lokr"])
def test_no_factors_where_there_is_no_pair(method: str, networks: dict[str, nn.Module]) -> None:
    with pytest.raises(UserError, match=method):
        next(attach(networks, replace(CONFIG, method=method)).factors())


def test_seed_decides_the_start_and_the_global_generator_is_left_alone(networks, originals) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = attach(networks, CONFIG, seed=5).state_dict()
    assert torch.equal(torch.rand(3), expected)
    half = {name: copy.deepcopy(network).bfloat16() for name, network in originals.items()}
    two = attach(half, CONFIG, seed=5).state_dict()
    assert all(torch.equal(one[key], two[key]) for key in one)  # whatever the global state and the base's dtype
    other = attach(copy.deepcopy(originals), CONFIG, seed=6).state_dict()
    assert not any(torch.equal(one[key], other[key]) for key in one if key.endswith("lora_A"))


def test_loraplus_groups(networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, method="lora+", loraplus_ratio=4.0))
    rate = {id(p): group["lr"] for group in adapter.param_groups(1e-3, 1e-4) for p in group["params"]}
    for key, tensor in zip(adapter.state_dict(), adapter.parameters(), strict=True):
        expected = (1e-3 if key.startswith("unet.") else 1e-4) * (4.0 if key.endswith("lora_B") else 1.0)
        assert rate[id(tensor)] == pytest.approx(expected), key
    assert len(rate) == len(adapter.parameters())
    assert all(set(group) == {"params", "lr"} for group in adapter.param_groups(1e-3))
    theirs = create_loraplus_optimizer(networks["unet"], torch.optim.SGD, lr=1e-3, loraplus_lr_ratio=4.0)
    wanted = {id(p): group["lr"] for group in theirs.param_groups for p in group["params"] if p.requires_grad}
    found = {id(p): group["lr"] for group in adapter.param_groups(1e-3) for p in group["params"]}
    assert wanted and all(found[key] == pytest.approx(lr) for key, lr in wanted.items())


def test_dora_starts_at_the_base_exactly_in_half_precision(networks: dict[str, nn.Module]) -> None:
    for network in networks.values():
        network.bfloat16()
    adapter = attach(networks, replace(CONFIG, method="dora"))
    for name, delta in adapter.delta_weights():
        assert relative(adapter.layers()[name].weight.float() + delta, adapter.layers()[name].weight.float()) < 1e-6


def test_oft_keeps_the_lengths_of_the_rows(networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, method="oft"))
    randomize(adapter, 0.01)
    for name, delta in adapter.delta_weights():
        w0 = adapter.layers()[name].weight.detach()
        torch.testing.assert_close((w0 + delta).norm(dim=1), w0.norm(dim=1), rtol=1e-4, atol=0)


def test_refusals(networks: dict[str, nn.Module]) -> None:
    before = list(bits(networks))
    for config, message in (
        (replace(CONFIG, targets=("to_nothing",)), "to_nothing"),
        (replace(CONFIG, text_targets=("to_q",)), "to_q"),  # the UNet must not be touched either
        (replace(CONFIG, targets=(), text_targets=()), "nothing to adapt"),
        (replace(CONFIG, dora=True), "singlora"),
        (replace(CONFIG, method="oft", rank=1), "block size"),
        (replace(CONFIG, method="oft", alpha=8.0), "alpha"),
    ):
        with pytest.raises(UserError, match=message):
            attach(networks, config)
        assert same(list(bits(networks)), before)
    attach(networks, CONFIG)
    with pytest.raises(UserError, match="already"):
        attach(networks, replace(CONFIG, method="oft"))


def test_the_text_encoder_alone(networks: dict[str, nn.Module]) -> None:
    adapter = attach(networks, replace(CONFIG, targets=()))
    assert list(adapter.networks) == ["text_encoder"]
    assert adapter.num_parameters() == 2 * 4 * 2 * (48 + 48)
    adapter.set_step(3)
    assert adapter.u == 1.0
