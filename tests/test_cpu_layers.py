"""The forms a CPU is quick at answer as the stock layers do, in both directions, and leave everything else alone."""

from __future__ import annotations

import copy

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from singlora_diffusion import adapters, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.singlora import SingLoRA
from singlora_diffusion.models import cpu_layers

CONVOLUTIONS = {
    "3x3": dict(kernel_size=3, padding=1),
    "halving": dict(kernel_size=3, padding=1, stride=2),
    "1x1": dict(kernel_size=1),
    "lopsided": dict(kernel_size=(3, 1), padding=(2, 0), stride=(1, 2), dilation=(2, 1)),
    "no bias": dict(kernel_size=3, bias=False),
}


@pytest.fixture(autouse=True)
def everything_is_worth_it(monkeypatch) -> None:
    """On a CPU without matrix units, and as though every layer were large enough."""
    monkeypatch.setattr(cpu_layers, "QUICK_AT_BFLOAT16", False)
    monkeypatch.setattr(cpu_layers, "FEW", 1)
    monkeypatch.setattr(cpu_layers, "LARGE_WEIGHT", 1)
    monkeypatch.setattr(cpu_layers, "VERY_LARGE_WEIGHT", 1)
    monkeypatch.setattr(cpu_layers, "SLOW_MAP", 0)
    monkeypatch.setattr(cpu_layers, "PART", 50)  # so that weights fall into many parts


def both_ways(layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The answer to x, and the gradient in x of a loss that weighs every output differently; in float64."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).bfloat16().double()  # so that no dtype rounds them
    (dx,) = torch.autograd.grad((y.double() * weights.reshape(y.shape)).sum(), x)
    assert y.dtype == dx.dtype == x.dtype
    return [y.detach().double(), dx.double()]


def held(layer: nn.Module, x: Tensor, dtype: torch.dtype, *tolerances: float) -> None:
    """`prepare` changes no answer and no gradient by more than its tolerance of the largest one, against float64.

    A single tolerance is for both.
    """
    layer = layer.to(dtype).requires_grad_(False)
    true = both_ways(copy.deepcopy(layer).double(), x.to(dtype).double())
    found_both = both_ways(cpu_layers.prepare(layer), x.to(dtype))
    for found, expected, tolerance in zip(found_both, true, (tolerances * 2)[:2], strict=True):
        assert found.shape == expected.shape
        assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize(
    ("dtype", "tolerance"), ((torch.float64, 1e-13), (torch.float32, 2e-6), (torch.bfloat16, 5e-3))
)
@pytest.mark.parametrize("few", (1, 1e9), ids=("many positions", "few positions"))
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, batch, few, dtype, tolerance, monkeypatch) -> None:
    monkeypatch.setattr(cpu_layers, "FEW", few)
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, **CONVOLUTIONS[kind])
    layers = nn.Sequential(layer)
    # Where patches overlap, their gradients are rounded to bfloat16 (2^-8 at most), and so is their sum.
    summed = dtype == torch.bfloat16 and few > 1 and layer.kernel_size != (1, 1)
    held(layers, torch.randn(batch, 6, 7, 5), dtype, tolerance, 2**-7 if summed else tolerance)
    assert type(layers[0]) is cpu_layers.CpuConv2d


@pytest.mark.parametrize(("dtype", "tolerance"), ((torch.float32, 2e-6), (torch.bfloat16, 5e-3)))
@pytest.mark.parametrize("bias", (True, False))
def test_linear_layers(bias, dtype, tolerance) -> None:
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Linear(24, 16, bias=bias))
    held(layers, torch.randn(2, 3, 24), dtype, tolerance)
    assert (type(layers[0]) is cpu_layers.CpuLinear) == (dtype == torch.bfloat16)  # nothing to gain in float32


def test_bfloat16_is_rounded_once() -> None:
    """Each answer is the bfloat16 number next to the true one."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 256).bfloat16().requires_grad_(False)
    x = torch.randn(64, 512).bfloat16()
    true = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    answer = cpu_layers.prepare(nn.Sequential(layer))(x).double()
    assert ((answer - true).abs() <= 2**-8 * true.abs() + 1e-5).all()


@pytest.mark.parametrize("text", (None, 32))
def test_attention(text) -> None:
    torch.manual_seed(0)
    attention = Attention(query_dim=16, cross_attention_dim=text, heads=2, dim_head=8)
    attention = attention.bfloat16().requires_grad_(False)
    stock = copy.deepcopy(attention).double()
    x = torch.randn(2, 9, 16).bfloat16()
    words = {} if text is None else {"encoder_hidden_states": torch.randn(2, 5, text).bfloat16()}
    mask = torch.zeros(2, 1, 5 if text else 9).bfloat16()
    mask[..., -1] = -10_000
    more = {name: value.double() for name, value in words.items()}
    true = both_ways(lambda x: stock(x, **more, attention_mask=mask.double()), x.double())
    cpu_layers.prepare(attention)
    assert type(attention.processor) is cpu_layers.CpuAttnProcessor
    found = both_ways(lambda x: attention(x, **words, attention_mask=mask), x)
    for one, other in zip(found, true, strict=True):
        assert (one - other).abs().max() <= 0.02 * other.abs().max()


def test_attention_keeps_no_wide_tensors(monkeypatch) -> None:
    """Queries, keys, values and answers wait for the backward pass as bfloat16."""
    attention = cpu_layers.prepare(Attention(query_dim=16, heads=2, dim_head=8).bfloat16().requires_grad_(False))
    hooks, kept = torch.autograd.graph.saved_tensors_hooks, []

    def watched(pack, unpack):
        def look(tensor: Tensor) -> object:
            packed = pack(tensor)
            kept.append((tensor, packed[0]))
            return packed

        return hooks(look, unpack)

    monkeypatch.setattr(torch.autograd.graph, "saved_tensors_hooks", watched)
    attention(torch.randn(2, 9, 16).bfloat16().requires_grad_())
    by_heads = [(given.dtype, packed.dtype) for given, packed in kept if given.shape == (2, 2, 9, 8)]
    assert by_heads == [(torch.float32, torch.bfloat16)] * 4


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_an_adapted_layer_computes_as_its_base_does(dtype) -> None:
    torch.manual_seed(0)
    base = nn.Linear(24, 16).to(dtype).requires_grad_(False)
    delta = SingLoRA(base, 3, 3.0)
    wanted = copy.deepcopy(base).double()
    wanted.weight += delta.delta_weight(wanted.weight)
    cpu_layers.prepare(nn.Sequential(base))
    x = torch.randn(5, 24).to(dtype)
    found, true = both_ways(lambda x: delta(base, x), x), both_ways(wanted, x.double())
    for one, other in zip(found, true, strict=True):
        assert (one - other).abs().max() <= (1e-6 if dtype == torch.float32 else 5e-3) * other.abs().max()


def test_what_is_not_plain_and_frozen_computes_as_before(monkeypatch) -> None:
    class Other(nn.Linear):
        pass

    network = nn.Sequential(Other(4, 4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, padding="same"))
    kinds = [type(layer) for layer in network]
    assert [type(layer) for layer in cpu_layers.prepare(network)] == kinds

    trained = cpu_layers.prepare(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)).bfloat16())
    assert [type(layer) for layer in trained] == [cpu_layers.CpuConv2d, cpu_layers.CpuLinear]
    trained(torch.randn(2, 4, 3, 6).bfloat16()).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())

    def never(*args) -> None:
        raise AssertionError("used")

    x = torch.randn(2, 4, 3, 6)
    frozen = trained.requires_grad_(False).float()
    monkeypatch.setattr(cpu_layers, "_is_pointwise", never)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    with pytest.raises(AssertionError):
        frozen(x)


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_loaded_model_is_prepared_and_keeps_its_names(dtype, tiny_model, monkeypatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(cpu_layers, "prepare", lambda network: network)
        stock = models.load(str(tiny_model), dtype, "cpu")
    model = models.load(str(tiny_model), dtype, "cpu")
    linear, processor = (nn.Linear, AttnProcessor2_0)
    if dtype == "bfloat16":
        linear, processor = (cpu_layers.CpuLinear, cpu_layers.CpuAttnProcessor)
    layers = [layer for layer in model.unet.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    assert {type(layer) for layer in layers} == {linear, cpu_layers.CpuConv2d}
    assert {type(p) for p in model.unet.attn_processors.values()} == {processor}
    for name, tensor in stock.unet.state_dict().items():
        assert torch.equal(model.unet.state_dict()[name], tensor)

    x = torch.randn(1, model.unet.config.in_channels, 8, 8)
    for family in (stock, model):  # attaching finds the same layers, and detaching leaves what was there
        before = family.unet.attn_processors
        adapter = adapters.attach(family.networks, AdapterConfig(rank=2))
        adapter.detach()
        assert family.unet.attn_processors == before
    with torch.inference_mode():
        text = model.encode_prompts(["a dog"])
        answers = [family.predict(x, torch.tensor([500]), text).float() for family in (stock, model)]
    tolerance = 1e-4 if dtype == "float32" else 0.05
    torch.testing.assert_close(*answers, rtol=tolerance, atol=tolerance)


def test_small_layers_are_left_to_the_library(monkeypatch) -> None:
    monkeypatch.undo()
    layers = [nn.Conv2d(128, 128, 3), nn.Linear(128, 128), nn.Conv2d(640, 640, 3)]
    cpu_layers.prepare(nn.Sequential(*layers))
    assert [type(layer) for layer in layers] == [nn.Conv2d, nn.Linear, cpu_layers.CpuConv2d]


@pytest.mark.parametrize("least", (1, 40, 1000))
@pytest.mark.parametrize(("count", "each"), ((1280, 11520), (640, 5760), (7, 3), (1, 10**7)))
def test_parts_are_all_there_is(count, each, least, monkeypatch) -> None:
    """Each thing once, in order; as few parts as the numbers ask for, fewer where `least` asks for more things."""
    monkeypatch.setattr(cpu_layers, "PART", 1 << 21)
    parts = cpu_layers._parts(count, each, least)
    assert [thing for part in parts for thing in range(count)[part]] == list(range(count))
    assert len(parts) <= max(1, min(-(-count * each // cpu_layers.PART), count // least))
