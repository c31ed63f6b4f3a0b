"""Adapters into networks and out again: every layer of every choice, bit for bit, on tiny networks."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel, UNet2DConditionModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn
from transformers import CLIPTextModel

from singlora_diffusion import adapters
from singlora_diffusion.adapters import inject
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.singlora import SingLoRA
from singlora_diffusion.adapters.targets import chosen
from singlora_diffusion.errors import UserError
from singlora_diffusion.models.network import NetworkSpec, bare, specs

pytestmark = pytest.mark.numerical

TOKENS = torch.tensor([[1, 5, 7, 2], [1, 9, 3, 2]])
LATENTS = torch.linspace(-2, 2, 2 * 4 * 8 * 8).reshape(2, 4, 8, 8)


def answer(unet: nn.Module, text: nn.Module, **kwargs: Any) -> Tensor:
    dtype = next(unet.parameters()).dtype
    states = text(TOKENS).last_hidden_state
    return unet(LATENTS.to(dtype), torch.tensor([3, 500]), states.to(dtype), **kwargs).sample


def projections(network: nn.Module, targets: tuple[str, ...]) -> dict[str, nn.Linear]:
    """The layers of a denoiser that these targets mean."""
    return chosen({"network": NetworkSpec("network", network, "denoiser", ())}, AdapterConfig(targets=targets))[
        "network"
    ]


def deltas_for(network: nn.Module, targets: tuple[str, ...], size: float = 0.3) -> dict[str, nn.Module]:
    generator = torch.Generator().manual_seed(1)
    deltas = {}
    for path, base in projections(network, targets).items():
        deltas[path] = SingLoRA(base, 4, 4.0, generator=generator)
        with torch.no_grad():
            deltas[path].A.normal_(0, size, generator=generator)
    return deltas


def write_into(network: nn.Module, deltas: dict[str, nn.Module]) -> None:
    for path, delta in deltas.items():
        weight = network.get_submodule(path).weight
        weight.add_(delta.delta_weight(weight).to(weight.dtype))


def assert_as_near(found: Tensor, expected: Tensor, exact: Tensor) -> None:
    """Two ways to the same answer, each off by its own rounding: that of the second is the measure of the first's."""
    far = [(answer.double() - exact).norm() for answer in (found, expected)]
    assert 0 < far[0] <= 2 * far[1]


def snapshot(network: nn.Module) -> list[tuple[Any, ...]]:
    """Everything attach must give back: modules by identity, keys, flags, bits, processors, hooks."""
    modules = [(name, id(module), type(module)) for name, module in network.named_modules()]
    tensors = [(key, id(p), p.dtype, p.requires_grad, p.detach().clone()) for key, p in network.named_parameters()]
    processors = [id(m.processor) for m in network.modules() if hasattr(m, "processor")]
    hooks = [len(network._forward_pre_hooks), len(network._forward_hooks), len(network._forward_hooks_always_called)]
    return [modules, tensors, list(network.state_dict()), processors, hooks]


def assert_same(network: nn.Module, before: list[tuple[Any, ...]]) -> None:
    modules, tensors, keys, processors, hooks = snapshot(network)
    assert modules == before[0] and keys == before[2] and processors == before[3] and hooks == before[4]
    for now, then in zip(tensors, before[1], strict=True):
        assert now[:4] == then[:4] and torch.equal(now[4], then[4])


def test_projections_by_name(networks) -> None:
    unet, text = networks["unet"], networks["text_encoder"]
    every = projections(unet, ("to_q", "to_k", "to_v", "to_out.0"))
    shapes = {(tuple(layer.weight.shape)) for layer in every.values()}
    assert shapes == {(32, 32), (64, 64), (32, 48), (64, 48)}  # square, wide and tall
    attentions = {name for name, module in unet.named_modules() if isinstance(module, Attention)}
    assert set(every) == {f"{name}.{target}" for name in attentions for target in ("to_q", "to_k", "to_v", "to_out.0")}
    order = [name for name, _ in unet.named_modules()]
    assert list(every) == sorted(every, key=order.index)
    assert list(projections(unet, ("to_out.0", "to_q"))) == [p for p in every if not p.endswith(("to_k", "to_v"))]
    assert set(projections(unet, ("attn2.to_k",))) == {p for p in every if p.endswith("attn2.to_k")}
    assert all(unet.get_submodule(path) is layer for path, layer in every.items())
    spec = bare("text_encoder", text)
    names = [spec.layer(path) for path in projections(text, ("q_proj",))]
    assert names == [f"text_encoder.text_model.encoder.layers.{i}.self_attn.q_proj" for i in range(2)]
    assert spec.layer("text_model.x.q_proj") == "text_encoder.text_model.x.q_proj"
    assert bare("unet", unet).layer("mid_block.x.to_q") == "unet.mid_block.x.to_q"


def test_two_bare_text_encoders_keep_apart_in_files(make_networks) -> None:
    text = make_networks()["text_encoder"]
    alone, pair = specs({"text_encoder": text}), specs({"text_encoder": text, "text_encoder_2": text})
    assert alone["text_encoder"].prefix("kohya") == "lora_te"
    assert [one.prefix("kohya") for one in pair.values()] == ["lora_te1", "lora_te2"]


def test_an_unknown_target_is_named_with_what_there_is(networks) -> None:
    with pytest.raises(UserError, match=r"no layer 'query' in UNet2DConditionModel; it has .*to_out\.0, to_q, to_v"):
        projections(networks["unet"], ("to_q", "query"))
    with pytest.raises(UserError, match="no layer 'o_q'"):  # whole names only
        projections(networks["unet"], ("o_q",))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "targets",
    [("to_q",), ("to_k",), ("to_v",), ("to_out.0",), ("attn1.to_k", "attn2.to_v"), ("to_q", "ff.net.2", "proj")],
)
def test_each_adapted_layer_of_the_unet_gets_its_own_delta(make_networks, targets, dtype) -> None:
    """Attached equals the plain network with dW written into its weights."""
    networks = make_networks(dtype)
    unet, text = networks["unet"], networks["text_encoder"]
    deltas = deltas_for(unet, targets)
    dense, precise = copy.deepcopy(unet), copy.deepcopy(unet).double()
    with torch.no_grad():
        plain = answer(unet, text)
        write_into(dense, deltas)
        write_into(precise, deltas)
        expected, exact = answer(dense, text), answer(precise, text)
        before = snapshot(unet)
        detach = inject.attach(unet, deltas)
        found = answer(unet, text)
        detach()
        assert_same(unet, before)
        assert torch.equal(answer(unet, text), plain)
    assert found.dtype == dtype
    assert_as_near(found, expected, exact)
    assert (found.float() - plain.float()).norm() > 1e-2 * plain.float().norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("targets", [("q_proj",), ("k_proj",), ("v_proj",), ("out_proj",), ("q_proj", "v_proj", "fc1")])
def test_each_adapted_layer_of_the_text_encoder_gets_its_own_delta(make_networks, targets, dtype) -> None:
    text = make_networks(dtype)["text_encoder"]
    deltas = deltas_for(text, targets)
    dense, precise = copy.deepcopy(text), copy.deepcopy(text).double()
    with torch.no_grad():
        plain = text(TOKENS).last_hidden_state
        write_into(dense, deltas)
        write_into(precise, deltas)
        expected, exact = dense(TOKENS).last_hidden_state, precise(TOKENS).last_hidden_state
        before = snapshot(text)
        detach = inject.attach(text, deltas)
        found = text(TOKENS).last_hidden_state
        wrapped = text.get_submodule(next(iter(deltas)))
        assert torch.equal(wrapped.weight, wrapped.base.weight) and wrapped.bias is wrapped.base.bias
        detach()
        assert_same(text, before)
        assert torch.equal(text(TOKENS).last_hidden_state, plain)
    assert found.dtype == dtype
    assert_as_near(found, expected, exact)
    assert (found.float() - plain.float()).norm() > 1e-2 * plain.float().norm()


def test_the_network_holds_the_deltas_while_attached(networks) -> None:
    """So that `.to()`, DDP and the like see them."""
    unet = networks["unet"]
    deltas = deltas_for(unet, ("to_q", "ff.net.2"))
    own = {id(p) for delta in deltas.values() for p in delta.parameters()}
    detach = inject.attach(unet, deltas)
    assert {id(p) for p in unet.parameters() if p.requires_grad} == own
    detach()
    assert not own & {id(p) for p in unet.parameters()}


def test_attaching_twice_is_refused(networks) -> None:
    for network, target in (
        (networks["unet"], "to_q"),
        (networks["unet"], "ff.net.2"),
        (networks["text_encoder"], "fc1"),
    ):
        detach = inject.attach(network, deltas_for(network, (target,)))
        with pytest.raises(UserError, match="already"):
            projections(network, ("to_k",))
        detach()
        projections(network, (target,))


def test_other_processors_keep_doing_the_attention(networks) -> None:
    unet, text = networks["unet"], networks["text_encoder"]
    with torch.no_grad():
        unet.set_attn_processor(AttnProcessor2_0())
        detach = inject.attach(unet, deltas_for(unet, ("to_q", "to_k", "to_v", "to_out.0")))
        fast = answer(unet, text)
        detach()
        kept = AttnProcessor()
        unet.set_attn_processor(kept)
        detach = inject.attach(unet, deltas_for(unet, ("to_q", "to_k", "to_v", "to_out.0")))
        torch.testing.assert_close(answer(unet, text), fast, rtol=1e-4, atol=1e-5)
        detach()
    assert all(processor is kept for processor in unet.attn_processors.values())


def test_lost_processors_are_noticed(networks) -> None:
    unet, text = networks["unet"], networks["text_encoder"]
    detach = inject.attach(unet, deltas_for(unet, ("to_q",)))
    unet.set_attention_slice("auto")
    with pytest.raises(UserError, match="processors were replaced"):
        answer(unet, text)
    detach()
    answer(unet, text)


def test_fused_projections_are_refused(networks) -> None:
    unet = networks["unet"]
    deltas = deltas_for(unet, ("ff.net.2", "to_q"))
    before = snapshot(unet)
    attention = unet.mid_block.attentions[0].transformer_blocks[0].attn1
    attention.fused_projections = True
    with pytest.raises(UserError, match=r"mid_block.*attn1 has fused projections"):
        inject.attach(unet, deltas)
    assert_same(unet, before)


def test_the_processor_takes_what_diffusers_passes(networks, caplog, monkeypatch) -> None:
    """Attention.forward reads the signature of the processor's call, and drops with a warning what is not in it."""
    wanted = list(inspect.signature(AttnProcessor2_0().__call__).parameters)
    found = list(inspect.signature(inject.adapted_processor(AttnProcessor2_0(), {}).__call__).parameters)
    assert found == wanted
    unet, text = networks["unet"], networks["text_encoder"]
    inject.attach(unet, deltas_for(unet, ("to_q",)))
    with diffusers_log(caplog, monkeypatch):
        answer(unet, text, cross_attention_kwargs={"scale": 0.5})
        answer(unet, text)
        assert not caplog.records
        answer(unet, text, cross_attention_kwargs={"unknown": 1})
        assert "unknown" in caplog.text  # the log is indeed read


@contextmanager
def diffusers_log(caplog, monkeypatch) -> Iterator[None]:
    from diffusers.utils import logging

    monkeypatch.setattr(logging.get_logger("diffusers"), "propagate", True)
    with caplog.at_level("WARNING"):
        yield


@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), ("to_q", "ff.net.2"), ("ff.net.2",)])
def test_scale_of_one_call(targets, networks) -> None:
    unet, text = networks["unet"], networks["text_encoder"]
    deltas = deltas_for(unet, targets)
    with torch.no_grad():
        base = answer(unet, text)
        inject.attach(unet, deltas)
        full = answer(unet, text)
        given = {"scale": 0.5}
        half = answer(unet, text, cross_attention_kwargs=given)
        assert given == {"scale": 0.5}  # the caller's own dictionary
        assert torch.equal(answer(unet, text), full)  # over with the call
        assert torch.equal(answer(unet, text, cross_attention_kwargs={"scale": 0.0}), base)
        assert torch.equal(answer(unet, text, cross_attention_kwargs={}), full)
        for delta in deltas.values():
            delta.set_scale(0.5)
        assert torch.equal(answer(unet, text), half)
        assert torch.equal(answer(unet, text, cross_attention_kwargs={"scale": 2.0}), full)  # both multiply
        assert torch.equal(answer(unet, text), half)
    assert not torch.equal(half, full)


def test_scale_of_one_call_ends_with_an_error_too(networks, monkeypatch) -> None:
    unet, text = networks["unet"], networks["text_encoder"]
    deltas = deltas_for(unet, ("to_q",))
    inject.attach(unet, deltas)

    def fail(*args: Any, **kwargs: Any) -> None:
        assert {delta.scale for delta in deltas.values()} == {0.25}
        raise RuntimeError("on purpose")

    monkeypatch.setattr(unet.conv_out, "forward", fail)
    with pytest.raises(RuntimeError, match="on purpose"):
        answer(unet, text, cross_attention_kwargs={"scale": 0.25})
    assert {delta.scale for delta in deltas.values()} == {1.0}


def test_scale_of_one_call_leaves_gradients_right(networks) -> None:
    unet, text = networks["unet"], networks["text_encoder"]
    deltas = deltas_for(unet, ("to_q", "to_v"))
    inject.attach(unet, deltas)
    answer(unet, text, cross_attention_kwargs={"scale": 0.5}).square().mean().backward()
    found = [delta.A.grad.clone() for delta in deltas.values()]
    for delta in deltas.values():
        delta.A.grad = None
        delta.set_scale(0.5)
    answer(unet, text).square().mean().backward()
    assert all(torch.equal(delta.A.grad, grad) for delta, grad in zip(deltas.values(), found, strict=True))


def draws(*shapes: tuple[int, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randn(shape, generator=generator) for shape in shapes]


def flux() -> tuple[nn.Module, dict[str, Any]]:
    """A transformer of double and single blocks, and what it is called with."""
    network = FluxTransformer2DModel(
        patch_size=1,
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=(4, 4, 8),
        guidance_embeds=True,
    )
    latents, text, pooled = draws((2, 6, 4), (2, 5, 32), (2, 32))
    return network, {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": torch.tensor([0.3, 0.8]),
        "guidance": torch.tensor([1.0, 3.5]),
        "img_ids": torch.arange(18.0).reshape(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


def sd3() -> tuple[nn.Module, dict[str, Any]]:
    """A transformer with joint attention, the second of its two layers without an output for the text."""
    network = SD3Transformer2DModel(
        sample_size=8,
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=64,
        pos_embed_max_size=8,
    )
    latents, text, pooled = draws((2, 4, 8, 8), (2, 5, 32), (2, 64))
    return network, {
        "hidden_states": latents,
        "encoder_hidden_states": text,
        "pooled_projections": pooled,
        "timestep": torch.tensor([300.0, 800.0]),
    }


JOINT = ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")
TRANSFORMERS = {"flux": flux, "sd3": sd3}


@pytest.fixture(scope="module", params=TRANSFORMERS)
def transformer(request: pytest.FixtureRequest) -> tuple[nn.Module, dict[str, Any]]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network, inputs = TRANSFORMERS[request.param]()
    return network.requires_grad_(False).eval(), inputs


@pytest.mark.parametrize(
    "targets",
    [
        JOINT,
        ("to_out.0",),
        ("add_k_proj",),
        ("to_add_out", "attn.to_q"),
        ("ff.net.2", "ff_context.net.2"),
        (*JOINT, "ff.net.2"),
    ],
)
def test_each_adapted_layer_of_a_transformer_gets_its_own_delta(transformer, targets) -> None:
    """Attached equals the plain network with dW written into its weights."""
    network, inputs = copy.deepcopy(transformer)
    deltas = deltas_for(network, targets)
    dense = copy.deepcopy(network)
    with torch.no_grad():
        plain = network(**inputs).sample
        for path, delta in deltas.items():
            weight = dense.get_submodule(path).weight
            weight.add_(delta.delta_weight(weight))
        expected = dense(**inputs).sample
        before = snapshot(network)
        detach = inject.attach(network, deltas)
        processors = [p for p in network.attn_processors.values() if isinstance(p, inject.AdaptedAttnProcessor)]
        assert bool(processors) == any(not target.startswith("ff") for target in targets)
        found = network(**inputs).sample
        off = network(**inputs, joint_attention_kwargs={"scale": 0.0}).sample
        detach()
        assert_same(network, before)
        assert torch.equal(network(**inputs).sample, plain) and torch.equal(off, plain)
    assert (found - expected).norm() < 1e-5 * expected.norm()
    assert (found - plain).norm() > 1e-3 * plain.norm()  # the text moves the answer of these few layers little


@pytest.mark.parametrize("method", adapters.METHODS)
def test_every_method_trains_a_transformer(method, transformer) -> None:
    network, inputs = copy.deepcopy(transformer)
    spec = NetworkSpec("transformer", network, "denoiser", JOINT)
    before = snapshot(network)
    adapter = adapters.attach({"transformer": spec}, AdapterConfig(method=method, rank=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.05)
    answer = network(**inputs).sample
    answer.square().mean().backward()
    # The last layer's text has no way to the answer: its query and output move nothing.
    assert sum(p.grad is not None and bool(p.grad.any()) for p in adapter.parameters()) > len(adapter.parameters()) / 2
    with torch.no_grad():
        adapter.merge()
        merged = network(**inputs).sample
        assert (merged - answer).norm() < 1e-5 * answer.norm()
    adapter.detach()
    assert_same(network, before)


def test_the_backend_of_attention_can_be_chosen_while_attached(transformer) -> None:
    network, inputs = copy.deepcopy(transformer)
    detach = inject.attach(network, deltas_for(network, ("to_q",)))
    for attention in (m for m in network.modules() if hasattr(m, "processor")):
        if hasattr(attention.processor.inner, "_attention_backend"):
            attention.processor._attention_backend = "native"
            assert attention.processor.inner._attention_backend == "native"
        else:
            assert not hasattr(attention.processor, "_attention_backend")
    network(**inputs)
    detach()


def test_a_processor_takes_its_own_arguments(networks) -> None:
    """An attention passes on what the processor's signature names, and nothing else."""

    class Listening:
        heard: Any = None

        def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, mood=None):
            self.heard = mood
            return AttnProcessor2_0()(attn, hidden_states, encoder_hidden_states, attention_mask)

    unet, text = networks["unet"], networks["text_encoder"]
    listening = Listening()
    unet.set_attn_processor(listening)
    inject.attach(unet, deltas_for(unet, ("to_q",)))
    answer(unet, text, cross_attention_kwargs={"mood": "calm"})
    assert listening.heard == "calm"


@pytest.mark.parametrize("method", ["singlora", "lora", "dora"])
def test_a_network_saved_while_adapted_is_the_base(method, networks, tmp_path: Path) -> None:
    """Under the base's own keys, so that the stock libraries load all of it."""
    before = {name: {k: t.clone() for k, t in network.state_dict().items()} for name, network in networks.items()}
    targets = {"targets": ("to_q", "to_out.0", "ff.net.2"), "text_targets": ("q_proj", "fc1")}
    adapter = adapters.attach(networks, AdapterConfig(method=method, rank=2, **targets))
    for name, kind in (("unet", UNet2DConditionModel), ("text_encoder", CLIPTextModel)):
        saved: Any = networks[name]
        assert list(saved.state_dict()) == list(before[name])
        saved.save_pretrained(tmp_path / name)
        loaded, report = kind.from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
        assert all(torch.equal(tensor, before[name][key]) for key, tensor in loaded.state_dict().items())
    # Inside another module, as a trainer holds it, and back in.
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    holder = nn.ModuleDict(networks)
    assert {key for key in holder.state_dict()} == {f"{n}.{key}" for n in before for key in before[n]}
    doubled = {key: tensor * 2 if tensor.is_floating_point() else tensor for key, tensor in holder.state_dict().items()}
    assert not any(holder.load_state_dict(doubled))
    for name, base in adapter.layers().items():
        network, _, path = name.replace("text_model.", "").partition(".")
        assert torch.equal(base.weight, 2 * before[network][f"{path}.weight"])
    assert all(torch.equal(tensor, state[key]) for key, tensor in adapter.state_dict().items())
    adapter.detach()
    assert list(networks["unet"].state_dict()) == list(before["unet"])
    assert not networks["unet"]._state_dict_hooks and not networks["unet"]._load_state_dict_pre_hooks
