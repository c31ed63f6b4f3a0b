"""The CPU forms answer as the stock layers do, in both directions, and leave everything else alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import peft
import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor, nn

from singlora_diffusion import adapters, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.singlora import SingLoRA
from singlora_diffusion.models import cpu_layers
from singlora_diffusion.models.cpu_layers import Forms

pytestmark = pytest.mark.numerical

PRODUCTS, WIDE, ALL = Forms(patches=1, pointwise=True), Forms(wide=1), Forms(patches=1, pointwise=True, wide=1)
ROUNDING = {dtype: torch.finfo(dtype).eps / 2 for dtype in (torch.float64, torch.float32, torch.bfloat16)}
CONVOLUTIONS = {
    "3x3": dict(kernel_size=3, padding=1),
    "halving": dict(kernel_size=3, padding=1, stride=2),
    "1x1": dict(kernel_size=1),
    "lopsided": dict(kernel_size=(3, 1), padding=(2, 0), stride=(1, 2), dilation=(2, 1)),
    "no bias": dict(kernel_size=3, bias=False),
}


@pytest.fixture(autouse=True)
def everything_is_worth_it(monkeypatch) -> None:
    """As though every layer were large enough and every map small enough."""
    monkeypatch.setattr(cpu_layers, "FEW_POSITIONS", 10**9)
    monkeypatch.setattr(cpu_layers, "LARGE_WEIGHT", 1)
    monkeypatch.setattr(cpu_layers, "SLOW_MAP", 0)
    monkeypatch.setattr(cpu_layers, "PART", 50)  # so that weights fall into many parts


def prepared(layer: nn.Module, forms: Forms = ALL) -> nn.Module:
    """What stands in the place of `layer` then."""
    owner = nn.Sequential(layer)
    cpu_layers.prepare(owner, forms)
    return owner[0]


def both_ways(layer: Callable[[Tensor], Tensor], x: Tensor) -> list[Tensor]:
    """The answer to x, and the gradient in x of a loss that weighs every output differently; in float64."""
    x = x.clone().requires_grad_()
    y = layer(x)
    weights = torch.linspace(-1, 1, y.numel()).bfloat16().double()  # so that no dtype rounds them
    (dx,) = torch.autograd.grad((y.double() * weights.reshape(y.shape)).sum(), x)
    assert y.dtype == dx.dtype == x.dtype
    return [y.detach().double(), dx.double()]


def held(layer: nn.Linear | nn.Conv2d, x: Tensor, dtype: torch.dtype, forms: Forms) -> None:
    """`prepare` changes no answer and no gradient by more than its rounding, against float64.

    A sum of n products, added in any order, is off by at most n u (|W| |x|), with u the unit of rounding, 2^-24 in
    float32; so are the gradient's sums. In bfloat16 the sums are float32's, and the result is rounded: once in the wide
    forms, and twice where a bias is added or gradients of patches that overlap are summed afterwards, each of which is
    rounded as well.
    """
    layer = layer.to(dtype).requires_grad_(False)
    exact, sizes = copy.deepcopy(layer).double(), copy.deepcopy(layer).double()
    for parameter in sizes.parameters():
        parameter.abs_()
    x = x.to(dtype)
    true, found = both_ways(exact, x.double()), both_ways(prepared(layer, forms), x)
    z = x.double().abs().requires_grad_()
    size_y = sizes(z)
    weights = torch.linspace(-1, 1, size_y.numel()).bfloat16().double().abs()
    (size_dx,) = torch.autograd.grad((size_y * weights.reshape(size_y.shape)).sum(), z)

    summed = ROUNDING[torch.promote_types(dtype, torch.float32)]
    once = ROUNDING[dtype] if dtype == torch.bfloat16 else 0.0
    y_terms, dx_terms = layer.weight[0].numel() + 1, layer.weight[:, 0].numel() + 1
    bias = 0.0 if layer.bias is None or forms.wide else once * size_y
    overlaps = once * size_dx if forms.patches and isinstance(layer, nn.Conv2d) else 0.0
    bounds = (
        (y_terms * summed * size_y + once * true[0].abs() + bias).detach(),
        dx_terms * summed * size_dx + once * true[1].abs() + overlaps,
    )
    for one, other, bound in zip(found, true, bounds, strict=True):
        assert one.shape == other.shape
        assert ((one - other).abs() <= 1.01 * bound).all()  # the 1.01: products of roundings


@pytest.mark.parametrize(
    ("dtype", "forms"),
    (
        (torch.float64, PRODUCTS),
        (torch.float32, PRODUCTS),
        (torch.bfloat16, PRODUCTS),
        (torch.bfloat16, WIDE),
        (torch.bfloat16, ALL),
    ),
    ids=str,
)
@pytest.mark.parametrize("batch", (1, 2))
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions(kind, batch, dtype, forms) -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 10, **CONVOLUTIONS[kind])
    held(layer, torch.randn(batch, 6, 7, 5), dtype, forms)
    assert type(prepared(layer, forms)) is cpu_layers.CpuConv2d


@pytest.mark.parametrize("forms", (PRODUCTS, WIDE, ALL), ids=str)
@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_convolutions_of_an_empty_batch_and_of_one_image_without_a_batch_are_stock(kind, forms) -> None:
    torch.manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16):
        layer = nn.Conv2d(6, 10, **CONVOLUTIONS[kind]).to(dtype).requires_grad_(False)
        for shape in ((0, 6, 7, 5), (6, 7, 5)):
            x = torch.randn(shape).to(dtype)
            answers = both_ways(prepared(layer, forms), x), both_ways(layer, x)
            assert all(torch.equal(one, other) for one, other in zip(*answers, strict=True))
        for shape in ((1, 6, 1, 1), (1, 5, 7, 5), (6,)):
            outcomes = []
            for form in (prepared(layer, forms), layer):
                try:
                    outcomes.append(form(torch.randn(shape).to(dtype)).shape)
                except RuntimeError as error:
                    outcomes.append(str(error))
            assert outcomes[0] == outcomes[1]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
@pytest.mark.parametrize("bias", (True, False))
def test_linear_layers(bias, dtype) -> None:
    torch.manual_seed(0)
    layer = nn.Linear(24, 16, bias=bias)
    held(layer, torch.randn(2, 3, 24), dtype, WIDE)
    stands = type(prepared(layer, WIDE)) is cpu_layers.CpuLinear
    assert stands == (dtype == torch.bfloat16)  # nothing to gain in float32
    layer.requires_grad_(False)
    for shape in ((0, 24), (24,)):
        x = torch.randn(shape).to(dtype)
        assert prepared(layer, WIDE)(x).shape == layer(x).shape


def test_bfloat16_is_rounded_once() -> None:
    """Each answer is the bfloat16 number next to the true one, but for what float32 loses on the way there."""
    torch.manual_seed(0)
    layer = nn.Linear(512, 256).bfloat16().requires_grad_(False)
    x = torch.randn(64, 512).bfloat16()
    true = nn.functional.linear(x.double(), layer.weight.double(), layer.bias.double())
    sizes = nn.functional.linear(x.double().abs(), layer.weight.double().abs(), layer.bias.double().abs())
    answer = prepared(layer)(x).double()
    assert ((answer - true).abs() <= 2**-8 * true.abs() + 513 * 2**-24 * sizes).all()


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
    undo = cpu_layers.prepare(attention, WIDE)
    assert type(attention.processor) is cpu_layers.CpuAttnProcessor
    found = both_ways(lambda x: attention(x, **words, attention_mask=mask), x)
    for one, other in zip(found, true, strict=True):  # queries, keys, values, answers and projection are rounded
        assert (one - other).abs().max() <= 5 * ROUNDING[torch.bfloat16] * other.abs().max()
    undo()
    assert type(attention.processor) is AttnProcessor2_0


def test_attention_keeps_no_wide_tensors(monkeypatch) -> None:
    """Queries, keys, values and answers wait for the backward pass as bfloat16."""
    attention = Attention(query_dim=16, heads=2, dim_head=8).bfloat16().requires_grad_(False)
    cpu_layers.prepare(attention, WIDE)
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
    base = prepared(base)
    x = torch.randn(5, 24).to(dtype)
    found, true = both_ways(lambda x: delta(base, x), x), both_ways(wanted, x.double())
    for one, other in zip(found, true, strict=True):  # sums of up to 24 + 3 terms, rounded once in bfloat16
        bound = 27 * ROUNDING[torch.float32] + (ROUNDING[dtype] if dtype == torch.bfloat16 else 0)
        assert (one - other).abs().max() <= bound * other.abs().max()


def test_what_is_not_plain_and_frozen_computes_as_before(monkeypatch) -> None:
    class Other(nn.Linear):
        pass

    network = nn.Sequential(Other(4, 4), nn.Conv2d(4, 4, 1, groups=2), nn.Conv2d(4, 4, 3, padding="same"))
    kinds = [type(layer) for layer in network]
    cpu_layers.prepare(network, ALL)
    assert [type(layer) for layer in network] == kinds

    trained = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Linear(4, 4)).bfloat16()
    cpu_layers.prepare(trained, ALL)
    assert [type(layer) for layer in trained] == [cpu_layers.CpuConv2d, cpu_layers.CpuLinear]
    trained(torch.randn(2, 4, 3, 6).bfloat16()).sum().backward()
    assert all(parameter.grad is not None for parameter in trained.parameters())

    def never(*args) -> None:
        raise AssertionError("used")

    x = torch.randn(2, 4, 3, 6)
    frozen = trained.requires_grad_(False).float()
    monkeypatch.setattr(cpu_layers, "_column_product", never)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert frozen(x).dtype == torch.bfloat16
    with pytest.raises(AssertionError):
        frozen(x)


# --- how they get in -------------------------------------------------------------------------------------------------


def shape_of(network: nn.Module) -> list[tuple[str, int, type]]:
    modules = [(path, id(module), type(module)) for path, module in network.named_modules(remove_duplicate=False)]
    parameters = [(name, id(parameter), type(parameter)) for name, parameter in network.named_parameters()]
    processors = [(path, id(p), type(p)) for path, p in getattr(network, "attn_processors", {}).items()]
    return modules + parameters + processors + [(key, 0, Tensor) for key in network.state_dict()]


def test_parameters_stay_and_the_undo_is_exact(make_networks) -> None:
    unet = make_networks(torch.bfloat16)["unet"]
    before = shape_of(unet)
    undo = cpu_layers.prepare(unet, ALL)
    after = shape_of(unet)
    kinds = {kind for _, _, kind in after}
    assert {cpu_layers.CpuLinear, cpu_layers.CpuConv2d, cpu_layers.CpuAttnProcessor} <= kinds
    assert not kinds & {nn.Linear, nn.Conv2d, AttnProcessor2_0}
    assert [row for row in after if row[2] is nn.Parameter] == [row for row in before if row[2] is nn.Parameter]
    assert [name for name, *_ in after] == [name for name, *_ in before]
    undo()
    assert shape_of(unet) == before
    undo()
    assert shape_of(unet) == before


def test_the_undo_keeps_what_happened_to_the_weights() -> None:
    owner = nn.Sequential(nn.Conv2d(3, 4, 3))
    undo = cpu_layers.prepare(owner, ALL)
    owner.load_state_dict({"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.ones(4)}, assign=True)
    owner.double()
    undo()
    assert owner[0].weight.dtype == torch.float64 and owner[0].weight.eq(1).all()


def test_a_layer_in_two_places_stays_one_layer() -> None:
    layer = nn.Linear(4, 4).bfloat16()
    network = nn.ModuleDict({"one": layer, "two": nn.Sequential(layer)})
    undo = cpu_layers.prepare(network, ALL)
    assert network["one"] is network["two"][0] and type(network["one"]) is cpu_layers.CpuLinear
    undo()
    assert network["one"] is network["two"][0] is layer


def test_a_copy_computes_with_its_own_weights(make_networks) -> None:
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(4, 2)).bfloat16().requires_grad_(False)
    cpu_layers.prepare(network, ALL)
    x = torch.randn(1, 3, 3, 3).bfloat16()
    answer = network(x)
    other = copy.deepcopy(network)
    assert torch.equal(other(x), answer)
    for parameter in other.parameters():
        parameter.zero_()
    assert not other(x).any() and torch.equal(network(x), answer)


def test_peft_and_saving_find_the_layers(make_networks, tmp_path) -> None:
    unet = make_networks()["unet"]
    state = {key: tensor.clone() for key, tensor in unet.state_dict().items()}
    unet.bfloat16()
    cpu_layers.prepare(unet, ALL)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "conv1"]))
    wrapped = [module.base_layer for module in unet.modules() if hasattr(module, "base_layer")]
    assert {type(layer) for layer in wrapped} == {cpu_layers.CpuLinear, cpu_layers.CpuConv2d}
    unet.unload_lora()
    unet.save_pretrained(tmp_path)
    loaded = type(unet).from_pretrained(tmp_path)
    assert list(loaded.state_dict()) == list(state)
    assert all(torch.equal(tensor, state[key].bfloat16().float()) for key, tensor in loaded.state_dict().items())


@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_a_loaded_model_is_prepared_and_keeps_its_names(dtype, tiny_model, monkeypatch) -> None:
    monkeypatch.setattr(cpu_layers, "PAYS", {cpu_layers.cpu_kind(): ALL})
    with monkeypatch.context() as patch:
        patch.setattr(cpu_layers, "PAYS", {})
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

    x = torch.randn(1, model.unet.config.in_channels, 8, 8, generator=torch.Generator().manual_seed(0))
    x = x.to(model.dtype)
    for family in (stock, model):  # attaching finds the same layers, and detaching leaves what was there
        before = family.unet.attn_processors
        adapter = adapters.attach(family.networks, AdapterConfig(rank=2))
        adapter.detach()
        assert family.unet.attn_processors == before
    with torch.inference_mode():
        text, t = model.encode_prompts(["a dog"])["text"], torch.tensor([500])
        exact = copy.deepcopy(stock.unet).double()(x.double(), t, text.double()).sample
        far = [(family.unet(x, t, text).sample.double() - exact).norm() for family in (stock, model)]
    assert far[1] <= 2 * far[0] and far[0] > 0  # as near to the truth as the stock model is


# --- where they pay --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("vectors", "has", "kind", "forms"),
    (
        ("AVX512", {"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_bf16": True}, "intel avx512", True),
        ("AVX512", {"cpu_name": "AMD EPYC", "avx512_bf16": True}, "amd avx512", True),
        ("AVX512", {"cpu_name": "Intel(R) Xeon(R) Processor", "amx_bf16": True}, "intel amx", False),
        ("AVX512", {}, "unknown avx512", False),
        ("AVX2", {"cpu_name": "AMD EPYC", "avx512_bf16": True}, "avx2", True),  # by ATEN_CPU_CAPABILITY
        ("DEFAULT", {"cpu_name": "Intel(R) Xeon(R) Processor"}, "default", False),
        ("SVE256", {"architecture": "aarch64"}, "sve256", False),
    ),
)
def test_forms_are_used_where_they_were_measured(vectors, has, kind, forms, monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: vectors)
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: has, raising=False)
    assert cpu_layers.cpu_kind() == kind and (kind in cpu_layers.PAYS) == forms
    network = nn.Sequential(nn.Conv2d(1300, 1300, 3, device="meta"), nn.Linear(4, 4).bfloat16())
    kinds = [type(layer) for layer in network]
    cpu_layers.prepare(network)
    assert ([type(layer) for layer in network] != kinds) == forms
    assert isinstance(network[1], cpu_layers.CpuLinear) == (kind in ("intel avx512", "avx2"))


def test_an_old_torch_that_cannot_name_the_processor(monkeypatch) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    assert cpu_layers.cpu_kind() == "unknown avx512"


def test_small_layers_are_left_to_the_library(monkeypatch) -> None:
    monkeypatch.undo()
    network = nn.Sequential(nn.Conv2d(128, 128, 3), nn.Linear(128, 128), nn.Conv2d(640, 640, 3), nn.Conv2d(320, 320, 1))
    cpu_layers.prepare(network, cpu_layers.PAYS["intel avx512"])
    wanted = [nn.Conv2d, nn.Linear, cpu_layers.CpuConv2d, cpu_layers.CpuConv2d]
    assert [type(layer) for layer in network] == wanted


@pytest.mark.parametrize("least", (1, 40, 1000))
@pytest.mark.parametrize(("count", "each"), ((1280, 11520), (640, 5760), (7, 3), (1, 10**7)))
def test_parts_are_all_there_is(count, each, least, monkeypatch) -> None:
    """Each thing once, in order; as few parts as the numbers ask for, fewer where `least` asks for more things."""
    monkeypatch.setattr(cpu_layers, "PART", 1 << 21)
    parts = cpu_layers._parts(count, each, least)
    assert [thing for part in parts for thing in range(count)[part]] == list(range(count))
    assert len(parts) <= max(1, min(-(-count * each // cpu_layers.PART), count // least))
