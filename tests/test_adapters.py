"""The adapter contract on a tiny Stable Diffusion: identities, bits and refusals."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
import torch
from torch import Tensor, nn
from transformers import T5Config, T5EncoderModel

from singlora_diffusion import adapters
from singlora_diffusion.adapters import METHODS
from singlora_diffusion.adapters import config as config_module
from singlora_diffusion.adapters.adapter import start_seed
from singlora_diffusion.adapters.config import AdapterConfig, from_json
from singlora_diffusion.adapters.singlora import SingLoRA
from singlora_diffusion.errors import UserError
from singlora_diffusion.models.network import NetworkSpec, bare

pytestmark = pytest.mark.numerical

TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")
CONFIG = AdapterConfig(rank=4, text_rank=3, text_targets=TEXT)
VARIANTS = {
    "paper": CONFIG,
    "offset": replace(CONFIG, init="offset"),
    "balanced": replace(CONFIG, signature="balanced"),
    "dora": replace(CONFIG, dora=True),
    "all": replace(CONFIG, init="offset", signature="balanced", dora=True, alpha=2.0),
}
TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 3, 2]])
LATENTS = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)
STEPS = torch.tensor([3, 500])

variants = pytest.mark.parametrize("config", VARIANTS.values(), ids=VARIANTS.keys())
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])


def answer(networks: dict[str, nn.Module], rows: slice = slice(None), **kwargs: Any) -> Tensor:
    dtype = next(networks["unet"].parameters()).dtype
    text = networks["text_encoder"](TOKENS[rows]).last_hidden_state
    return networks["unet"](LATENTS[rows].to(dtype), STEPS[rows], text, **kwargs).sample


def moved(adapter: adapters.Adapter, size: float = 0.1) -> adapters.Adapter:
    """After some training."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * size)
    return adapter


def bits(networks: dict[str, nn.Module]) -> dict[str, tuple[Any, ...]]:
    """The networks as keys, modules, flags and values."""
    found: dict[str, tuple[Any, ...]] = {}
    for name, network in networks.items():
        for path, module in network.named_modules():
            found[f"{name}.{path}"] = (id(module), type(module), getattr(module, "processor", None))
        for key, tensor in network.state_dict(keep_vars=True).items():
            found[f"{name}.{key}"] = (
                tensor.requires_grad,
                tensor.dtype,
                tensor.detach().numpy(force=True).tobytes()
                if tensor.dtype == torch.float32
                else tensor.detach().view(torch.int16).numpy().tobytes(),
            )
    return found


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.detach().float() - b.detach().float()).norm() / b.detach().float().norm())


def clones(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor.clone() for key, tensor in state.items()}


@dtypes
@variants
def test_attach_merge_unmerge_detach(config, dtype, make_networks) -> None:
    networks = make_networks(dtype)
    before = bits(networks)
    with torch.no_grad():
        base = answer(networks)
        adapter = moved(adapters.attach(networks, config))
        assert {p.dtype for p in adapter.parameters()} == {torch.float32}
        attached = answer(networks)
        assert attached.dtype == dtype and relative(attached, base) > 0.02

        adapter.set_scale(0.0)
        assert torch.equal(answer(networks), base)
        adapter.set_scale(1.0)
        assert torch.equal(answer(networks), attached)

        adapter.merge()
        adapter.merge()
        assert bits(networks).keys() == before.keys()
        merged = answer(networks)
        assert relative(merged, attached) < (1e-5 if dtype == torch.float32 else 5e-2)
        adapter.unmerge()
        adapter.unmerge()
        assert torch.equal(answer(networks), attached)

        adapter.merge()
        adapter.detach()
        adapter.detach()
        assert bits(networks) == before and torch.equal(answer(networks), base)


@variants
def test_delta_weights_are_what_merging_adds(config, networks) -> None:
    adapter = moved(adapters.attach(networks, config))
    w0 = {name: layer.weight.clone() for name, layer in adapter.layers().items()}
    shapes = set()
    for scale in (1.0, 0.5):
        adapter.set_scale(scale)
        deltas = dict(adapter.delta_weights())
        adapter.merge()
        for name, layer in adapter.layers().items():
            assert deltas[name].dtype == torch.float32 and deltas[name].any()
            assert torch.equal(layer.weight, w0[name] + deltas[name])
            shapes.add(tuple(layer.weight.shape))
        assert all(torch.equal(delta, deltas[name]) for name, delta in adapter.delta_weights())  # merged or not
        adapter.unmerge()
    assert shapes == {(32, 32), (64, 64), (32, 48), (64, 48), (48, 48)}


def test_changes_while_merged_take_effect(networks, make_networks) -> None:
    config = replace(CONFIG, ramp_steps=4)
    adapter = moved(adapters.attach(networks, config))
    other = moved(adapters.attach(make_networks(), config, seed=1))
    with torch.no_grad():
        adapter.set_step(4)
        adapter.merge()
        full = answer(networks)
        adapter.set_scale(0.5)
        half = answer(networks)
        adapter.set_scale(1.0)
        adapter.set_step(2)
        torch.testing.assert_close(answer(networks), half)
        adapter.set_step(4)
        assert torch.equal(answer(networks), full)
        adapter.load_state_dict(other.state_dict())
        other.set_step(4)
        twins = {name: network.module for name, network in other.networks.items()}
        torch.testing.assert_close(answer(networks), answer(twins), rtol=1e-4, atol=1e-5)
        adapter.detach()
        assert torch.equal(answer(networks), answer(make_networks()))


@pytest.mark.parametrize(
    "targets", [("to_q",), ("to_k", "to_v"), ("attn1.to_q", "attn1.to_k"), ("attn2.to_out.0",), ()]
)
def test_chosen_targets_alone_are_adapted(targets, networks) -> None:
    adapter = moved(adapters.attach(networks, replace(CONFIG, targets=targets, text_targets=("k_proj",))))
    attentions = [name for name, _ in networks["unet"].named_modules() if name.endswith(("attn1", "attn2"))]
    expected = {f"unet.{a}.{t}" for a in attentions for t in ("to_q", "to_k", "to_v", "to_out.0")}
    expected = {name for name in expected if any(name.endswith(f".{target}") for target in targets)}
    expected |= {f"text_encoder.text_model.encoder.layers.{i}.self_attn.k_proj" for i in range(2)}
    assert set(adapter.layers()) == expected
    assert set(adapter.networks) == ({"unet", "text_encoder"} if targets else {"text_encoder"})
    rows = {name: max(layer.weight.shape) for name, layer in adapter.layers().items()}
    ranks = {name: 4 if name.startswith("unet.") else 3 for name in rows}
    assert {key: tuple(t.shape) for key, t in adapter.state_dict().items()} == {
        f"{name}.A": (rows[name], ranks[name]) for name in rows
    }
    assert adapter.num_parameters() == sum(rows[name] * ranks[name] for name in rows)
    attached = answer(networks)
    adapter.merge()
    assert relative(answer(networks), attached) < 1e-5


@variants
def test_only_the_adapter_is_trained(config, networks) -> None:
    adapter = moved(adapters.attach(networks, config))
    own = {id(p) for p in adapter.parameters()}
    assert len(own) == len(adapter.parameters())
    assert {id(p) for network in networks.values() for p in network.parameters() if p.requires_grad} == own
    answer(networks).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in adapter.parameters())
    assert all(p.grad is None for network in networks.values() for p in network.parameters() if id(p) not in own)


@pytest.mark.parametrize("config", [CONFIG, VARIANTS["all"]], ids=["paper", "all"])
def test_gradient_checkpointing_gives_the_same_gradients(config, networks) -> None:
    adapter = moved(adapters.attach(networks, replace(config, ramp_steps=10)))
    adapter.set_step(5)
    for network in networks.values():
        network.train()
    answer(networks).square().mean().backward()
    plain = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    networks["unet"].enable_gradient_checkpointing()
    text = networks["text_encoder"]
    getattr(
        text, "activation_checkpointing_enable", text.gradient_checkpointing_enable
    )()  # its name since transformers 5
    calls = count_calls(adapter)
    answer(networks).square().mean().backward()
    assert calls() > 1.5 * len(adapter.layers())  # layers were indeed computed again
    assert adapter.u == 0.5
    assert all(torch.equal(p.grad, grad) for p, grad in zip(adapter.parameters(), plain, strict=True))


def count_calls(adapter: adapters.Adapter):
    calls = []
    for network in adapter.networks.values():
        for module in network.module.modules():
            if isinstance(module, SingLoRA):
                module.register_forward_hook(lambda *_: calls.append(1))
    return lambda: len(calls)


def test_accumulated_gradients_are_those_of_the_big_batch(networks) -> None:
    adapter = moved(adapters.attach(networks, replace(CONFIG, ramp_steps=3)))
    adapter.set_step(1)
    answer(networks).square().mean().backward()
    whole = [p.grad.clone() for p in adapter.parameters()]
    for p in adapter.parameters():
        p.grad = None
    for i in range(2):
        (answer(networks, slice(i, i + 1)).square().mean() / 2).backward()
    assert adapter.u == pytest.approx(1 / 3)  # forward does not count
    for parameter, grad in zip(adapter.parameters(), whole, strict=True):
        torch.testing.assert_close(parameter.grad, grad, rtol=1e-4, atol=1e-7)


@variants
def test_training_moves_the_answer_where_it_should(config, networks) -> None:
    """A few steps of Adam through both networks lower the loss; the base stays as it is."""
    before = bits(networks)
    adapter = adapters.attach(networks, replace(config, ramp_steps=2))
    target = answer(networks).detach().roll(1, 0)
    optimizer = torch.optim.Adam(adapter.param_groups(2e-2))
    losses = []
    for step in range(5):
        adapter.set_step(step + 1)
        loss = (answer(networks) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.9 * losses[0]
    adapter.detach()
    assert bits(networks) == before


@variants
def test_state_round_trip_is_exact_and_strict(config, networks, make_networks) -> None:
    adapter = moved(adapters.attach(networks, config, seed=1))
    state = clones(adapter.state_dict())
    assert all(key.startswith(("unet.", "text_encoder.text_model.encoder.layers.")) for key in state)
    assert {key.rpartition(".")[2] for key in state} <= {"A", "A0", "magnitude"}
    other = make_networks()
    fresh = adapters.attach(other, config, seed=2)
    fresh.load_state_dict(state)
    assert list(fresh.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key]) for key, tensor in fresh.state_dict().items())
    with torch.no_grad():
        assert torch.equal(answer(other), answer(networks))

    first, *_, last = state
    for wrong, name in (
        ({key: tensor for key, tensor in state.items() if key != last}, last),
        (state | {"unet.conv_in.A": torch.zeros(1)}, "unet.conv_in.A"),
        (state | {first: state[first][:, :1]}, first),
        (state | {first: state[first].T}, first),
    ):
        with pytest.raises(UserError, match=name.replace(".", r"\.")):
            fresh.load_state_dict({key: tensor + 1 for key, tensor in wrong.items()})
        assert all(torch.equal(tensor, state[key]) for key, tensor in fresh.state_dict().items())  # untouched
    half = {key: tensor.bfloat16() for key, tensor in state.items()}
    fresh.load_state_dict(half)
    assert all(t.dtype == torch.float32 and torch.equal(t, half[k].float()) for k, t in fresh.state_dict().items())


def test_seed_and_layer_name_decide_the_start(make_networks) -> None:
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    one = adapters.attach(make_networks(), CONFIG, seed=5).state_dict()
    assert torch.equal(torch.rand(3), expected)  # the global generator is left alone
    half = adapters.attach(make_networks(torch.bfloat16), CONFIG, seed=5).state_dict()
    fewer = adapters.attach(make_networks(), replace(CONFIG, targets=("to_v",)), seed=5).state_dict()
    other = adapters.attach(make_networks(), CONFIG, seed=6).state_dict()
    assert all(torch.equal(one[key], half[key]) for key in one)
    assert all(torch.equal(one[key], fewer[key]) for key in fewer)
    assert not any(torch.equal(one[key], other[key]) for key in one)
    first = [t.flatten()[:8].tolist() for t in one.values()]
    assert len({tuple(values) for values in first}) == len(first)  # no two layers alike


def test_ramp_runs_by_the_loops_clock(networks) -> None:
    adapter = moved(adapters.attach(networks, replace(CONFIG, ramp_steps=4)))
    assert adapter.u == 0.0
    with torch.no_grad():
        base = answer(networks)
        adapter.set_scale(0.0)
        assert torch.equal(answer(networks), base)
        adapter.set_scale(1.0)
        seen = []
        for step in (1, 2, 4, 9):
            adapter.set_step(step)
            seen.append(adapter.u)
            answer(networks)
            assert adapter.u == seen[-1]
    assert seen == [0.25, 0.5, 1.0, 1.0]
    quarter = dict(adapter.delta_weights())
    adapter.set_step(1)
    for name, delta in adapter.delta_weights():
        torch.testing.assert_close(delta, quarter[name] / 4)
    assert adapters.attach(copy.deepcopy(networks_without(networks, adapter)), CONFIG).u == 1.0


def networks_without(networks: dict[str, nn.Module], adapter: adapters.Adapter) -> dict[str, nn.Module]:
    adapter.detach()
    return networks


def test_rates(networks) -> None:
    config = replace(VARIANTS["dora"], magnitude_lr_ratio=5.0, rate_by_width=True)
    adapter = adapters.attach(networks, config)
    rates = {id(p): group["lr"] for group in adapter.param_groups(1e-3, 1e-4) for p in group["params"]}
    assert sum(len(group["params"]) for group in adapter.param_groups(1e-3)) == len(rates) == len(adapter.parameters())
    for key, p in zip(adapter.state_dict(), adapter.parameters(), strict=True):
        lr = 1e-3 if key.startswith("unet.") else 1e-4
        wanted = 5 * lr if key.endswith("magnitude") else lr * math.sqrt(32 / p.shape[0])  # 32: the narrowest layer
        assert rates[id(p)] == pytest.approx(wanted), key
    adapter.detach()
    plain = adapters.attach(networks, CONFIG)
    assert [group["lr"] for group in plain.param_groups(1e-3)] == [1e-3, 1e-3]
    assert [group["lr"] for group in plain.param_groups(1e-3, 1e-4)] == [1e-3, 1e-4]


@pytest.mark.parametrize("name", ["paper", "offset", "balanced"])
def test_factors_are_the_update(name, networks) -> None:
    adapter = moved(adapters.attach(networks, replace(VARIANTS[name], alpha=3.0, ramp_steps=4)))
    adapter.set_step(3)
    adapter.set_scale(0.7)
    deltas = dict(adapter.delta_weights())
    for layer, up, down in adapter.factors():
        rank = (4 if layer.startswith("unet.") else 3) * (2 if name == "offset" else 1)
        assert up.shape[1] == down.shape[0] == rank
        torch.testing.assert_close(up @ down, deltas.pop(layer), rtol=1e-5, atol=1e-7)
    assert not deltas


def test_no_factors_with_magnitudes(networks) -> None:
    with pytest.raises(UserError, match="magnitude"):
        next(adapters.attach(networks, VARIANTS["dora"]).factors())


def test_the_scale_of_a_call_reaches_every_form(networks) -> None:
    with torch.no_grad():
        base = answer(networks)
        for config in (replace(CONFIG, text_targets=()), replace(VARIANTS["all"], text_targets=())):
            adapter = moved(adapters.attach(networks, config))
            full = answer(networks)
            adapter.set_scale(0.5)
            half = answer(networks)
            adapter.set_scale(1.0)
            assert torch.equal(answer(networks, cross_attention_kwargs={"scale": 0.5}), half)
            assert torch.equal(answer(networks, cross_attention_kwargs={"scale": 0.0}), base)
            assert torch.equal(answer(networks), full)
            adapter.detach()


def test_refusals_leave_the_networks_alone(networks) -> None:
    before = bits(networks)
    for config, message in (
        (replace(CONFIG, method="qlora"), "unknown method 'qlora'; there are singlora, lora"),
        (replace(CONFIG, targets=("to_nothing",)), "to_nothing"),
        (replace(CONFIG, text_targets=("to_q",)), "to_q"),  # although the UNet has it
        (replace(CONFIG, targets=(), text_targets=()), "nothing to adapt"),
        (replace(CONFIG, rank=0), "--rank 0: must be at least 1"),
        (replace(CONFIG, text_rank=0), "--text_rank 0: must be at least 1"),
        (replace(CONFIG, init="zeros"), "zeros"),
        (replace(CONFIG, signature="negative"), "negative"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.attach(networks, config)
        assert bits(networks) == before
    adapter = adapters.attach(networks, replace(CONFIG, targets=()))
    for method in ("singlora", "lora"):
        with pytest.raises(UserError, match="already"):
            adapters.attach(networks, replace(CONFIG, method=method))
    adapter.detach()
    assert bits(networks) == before


@pytest.mark.parametrize("method", adapters.METHODS)
def test_every_method_obeys_the_contract(method, networks) -> None:
    """What the trainer and the generator lean on, for each row of the table."""
    before = bits(networks)
    with torch.no_grad():
        base = answer(networks)
        adapter = moved(adapters.attach(networks, replace(CONFIG, method=method, text_rank=None)))
        attached = answer(networks)
        assert relative(attached, base) > 0.01
        adapter.merge()
        assert relative(answer(networks), attached) < 1e-4
        adapter.unmerge()
        assert set(dict(adapter.delta_weights())) == set(adapter.layers())
        adapter.set_step(1)
        assert adapter.u == 1.0
        assert sum(p.numel() for p in adapter.parameters()) == adapter.num_parameters()
        adapter.detach()
    assert bits(networks) == before


def test_settings_are_read_back_from_a_header() -> None:
    for config in (AdapterConfig(), *VARIANTS.values(), AdapterConfig("lora+", loraplus_ratio=4, targets=("to_q",))):
        assert from_json(json.loads(json.dumps(asdict(config)))) == config
    for wrong, reason in (
        ([], "lacks its configuration"),
        ({"evil\n": 1}, "unknown entry evil"),
        ({"method": "magic"}, "unknown method magic"),
        ({"method": ["lora"]}, "unknown method"),
        ({"rank": 0}, "value 0 for rank"),
        ({"rank": 5000}, "value 5000 for rank"),
        ({"rank": True}, "value True for rank"),
        ({"alpha": 0.0}, "value 0.0 for alpha"),
        ({"alpha": float("nan")}, "value nan for alpha"),
        ({"targets": "to_q"}, "value to_q for targets"),
        ({"targets": [1]}, "value 1 for targets"),
        ({"init": "zeros"}, "value zeros for init"),
        ({"ramp_steps": -1}, "value -1 for ramp_steps"),
        ({"dora": 1}, "value 1 for dora"),
    ):
        with pytest.raises(ValueError, match=reason) as error:
            from_json(wrong)
        assert "\n" not in str(error.value)


def test_a_header_of_before_means_what_it_meant(networks) -> None:
    """Magnitudes learned at `loraplus_ratio`, and what a method does not take was ignored."""
    old = {"method": "singlora", "rank": 4, "targets": ["to_q"], "ramp_steps": 7, "loraplus_ratio": 5.0}
    dora = from_json({**old, "dora": True})
    assert (dora.magnitude_lr_ratio, dora.loraplus_ratio, dora.ramp_steps) == (5.0, 16.0, 7)
    assert from_json(old) == AdapterConfig(rank=4, targets=("to_q",), ramp_steps=7)
    lora = from_json({**old, "method": "lora", "rate_by_width": True, "alpha": None})
    assert lora == AdapterConfig("lora", rank=4, targets=("to_q",))
    assert from_json({**old, "method": "lora+"}).loraplus_ratio == 5.0
    for config in (dora, lora):
        adapters.attach(networks, config).detach()


def test_magnitudes_stay_norms_in_training(networks) -> None:
    """Far above any sensible rate; without `settle` hundreds of them would be negative."""
    config = replace(VARIANTS["dora"], magnitude_lr_ratio=500.0)
    adapter = moved(adapters.attach(networks, config))
    optimizer = torch.optim.Adam(adapter.param_groups(1e-3))
    below = 0
    for _ in range(4):
        optimizer.zero_grad()
        (answer(networks) * torch.linspace(-9, 9, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)).sum().backward()
        optimizer.step()
        below += sum(int((pair.magnitude < 0).sum()) for _, pair in adapter.pairs())
        adapter.settle()
        assert all(bool((pair.magnitude >= 0).all()) for _, pair in adapter.pairs())
    assert below > 0
    assert answer(networks).isfinite().all()


def test_stored_magnitudes_below_zero_still_mean_what_they_meant(networks, make_networks) -> None:
    adapter = moved(adapters.attach(networks, VARIANTS["dora"]), size=0.02)
    state = clones(adapter.state_dict())
    flipped = {key: -tensor if key.endswith("magnitude") else tensor for key, tensor in state.items()}
    straight = dict(adapter.delta_weights())
    adapter.load_state_dict(flipped)
    adapter.set_step(3)
    for name, change in adapter.delta_weights():
        w0 = adapter.layers()[name].weight
        torch.testing.assert_close(w0 + change, -(w0 + straight[name]))


@pytest.mark.parametrize("name", ["dora", "all", "peft"])
def test_pairs_with_their_magnitudes_are_the_change(name, networks) -> None:
    """W' = m (W0 + up down) / ||W0 + up down||, at scale 1 whatever the scale is."""
    config = replace(CONFIG, method="dora", alpha=3.0) if name == "peft" else replace(VARIANTS[name], alpha=3.0)
    adapter = moved(adapters.attach(networks, config), size=0.05)
    changes = dict(adapter.delta_weights())
    adapter.set_scale(0.5)
    for layer, (up, down, magnitude) in adapter.pairs():
        w0 = adapter.layers()[layer].weight
        direction = w0 + up @ down
        whole = magnitude[:, None] * direction / direction.norm(dim=1, keepdim=True)
        torch.testing.assert_close(whole - w0, changes.pop(layer), rtol=1e-4, atol=1e-6)
    assert not changes
    adapter.detach()
    assert all(pair.magnitude is None for _, pair in adapters.attach(networks, CONFIG).pairs())


def encoders(networks: dict[str, nn.Module]) -> dict[str, NetworkSpec]:
    """Like SDXL or FLUX: a denoiser with presets, one CLIP and another text encoder with names of its own."""
    config = T5Config(vocab_size=11, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    second = T5EncoderModel(config).requires_grad_(False).eval()
    unet = bare("unet", networks["unet"])
    presets = {"attention": ("to_q", "to_k"), "attention+mlp": ("to_q", "to_k", "ff.net.2")}
    return {
        "unet": replace(unet, presets=presets),
        "text_encoder": bare("text_encoder", networks["text_encoder"]),
        "text_encoder_2": NetworkSpec("text_encoder_2", second, "text", ("q", "v"), presets={"values": ("v",)}),
    }


def test_targets_by_default_by_preset_and_by_name(networks) -> None:
    specs = encoders(networks)

    def resolved(**names: Any) -> tuple[Any, ...]:
        adapter = adapters.attach(specs, AdapterConfig(rank=1, **names))
        adapter.detach()
        adapted = {name.rpartition(".")[2] for name in adapter.layers()}
        return adapter.config.targets, adapter.config.text_targets, set(adapter.networks), adapted

    attention, four = ("to_q", "to_k", "to_v", "to_out.0"), ("q_proj", "k_proj", "v_proj", "out_proj")
    assert resolved() == (attention, (), {"unet"}, {"to_q", "to_k", "to_v", "0"})
    assert resolved(targets=(), text_targets=None) == (
        (),
        (*four, "q", "v"),
        {"text_encoder", "text_encoder_2"},
        {*four, "q", "v"},
    )
    mixed = resolved(targets=("attention+mlp", "attn2.to_v"), text_targets=("values",))
    assert mixed[:3] == (("to_q", "to_k", "ff.net.2", "attn2.to_v"), ("v",), {"unet", "text_encoder_2"})
    for wrong, message in (
        ({"targets": ("to_q", "to_q")}, "'to_q' is named twice"),
        ({"targets": ("attention", "to_k")}, "'to_k' is named twice"),
        ({"targets": ("attention", "attention+mlp")}, "'to_q' is named twice"),
        ({"targets": ("",)}, "no layer ''"),
        ({"targets": ("attentions",)}, r"no layer 'attentions' in UNet.*; it has attention, attention\+mlp, "),
        ({"text_targets": ("q", "w")}, "no layer 'w' in CLIPTextModel and T5EncoderModel"),
    ):
        with pytest.raises(UserError, match=message):
            resolved(**wrong)


def test_all_of_a_long_seed_counts() -> None:
    starts = [start_seed(seed, "unet.to_q") for seed in (0, 1, 1 << 32, 1 << 33, (1 << 32) + 1, (1 << 63) - 1)]
    assert len(set(starts)) == len(starts) and all(0 <= start < 1 << 32 for start in starts)


def test_options_go_with_the_method_that_takes_them(networks) -> None:
    for config, message in (
        (replace(CONFIG, method="lora", rate_by_width=True), "rate_by_width is an option of singlora, not of lora"),
        (replace(CONFIG, loraplus_ratio=2.0), r"loraplus_ratio is an option of lora\+, not of singlora"),
        (replace(CONFIG, magnitude_lr_ratio=2.0), "no magnitudes without dora"),
        (replace(CONFIG, alpha=-1.0), "--alpha -1.0: must be greater than 0"),
        (replace(CONFIG, rank=5000), "--rank 5000: must be at most 4096"),
    ):
        with pytest.raises(UserError, match=message):
            adapters.attach(networks, config)


def test_the_choices_of_the_flag_are_the_table() -> None:
    assert get_args(config_module.MethodName) == tuple(adapters.METHODS)
    labels = {name: method.label for name, method in adapters.METHODS.items()}
    assert labels["singlora"] == "SingLoRA" and len(set(labels.values())) == len(labels)
    with_magnitude = [name for name, method in adapters.METHODS.items() if method.has_magnitude(VARIANTS["dora"])]
    assert with_magnitude == ["singlora", "dora"] and not adapters.METHODS["singlora"].has_magnitude(CONFIG)


def test_a_merged_adapter_stays_merged_when_a_change_is_refused(networks) -> None:
    adapter = moved(adapters.attach(networks, CONFIG))
    adapter.merge()
    merged = {name: base.weight.clone() for name, base in adapter.layers().items()}
    with pytest.raises(TypeError):
        adapter.set_scale(None)
    adapter.set_scale(1.0)
    assert all(torch.equal(base.weight, merged[name]) for name, base in adapter.layers().items())
    with pytest.raises(RuntimeError), adapter._unmerged():
        raise RuntimeError
    assert all(torch.equal(base.weight, merged[name]) for name, base in adapter.layers().items())
    adapter.detach()


@pytest.mark.parametrize("method", [name for name, row in METHODS.items() if "ramp_steps" not in row.options])
def test_a_ramp_of_another_method_is_refused(method, networks) -> None:
    with pytest.raises(UserError, match="ramp_steps is an option of singlora, not of"):
        adapters.attach(networks, replace(CONFIG, method=method, ramp_steps=20))
    adapters.attach(networks, replace(CONFIG, method=method, ramp_steps=0)).detach()  # as files say it
