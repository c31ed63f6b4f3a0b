"""Every method over random shapes, ranks, precisions and targets: what all rows of the table have in common."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel

from singlora_diffusion import adapters, formats
from singlora_diffusion.adapters import budget
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.adapters.delta import LowRankDelta
from singlora_diffusion.adapters.methods import Method, by_delta
from singlora_diffusion.errors import UserError
from singlora_diffusion.formats import safetensors_io

pytestmark = pytest.mark.numerical

ROWS = {
    "singlora": AdapterConfig(),
    "offset": AdapterConfig(init="offset"),
    "balanced": AdapterConfig(signature="balanced"),
    "magnitude": AdapterConfig(dora=True),
    "all of these": AdapterConfig(init="offset", signature="balanced", dora=True),
    **{method: AdapterConfig(method=method) for method in ("lora", "lora+", "dora", "oft", "lokr")},
}
NO_PAIR = ("oft", "lokr")
WITH_MAGNITUDE = ("magnitude", "all of these", "dora")
UNET = ("to_q", "to_k", "to_v", "to_out.0")
TEXT = ("q_proj", "k_proj", "v_proj", "out_proj")

pytestmark = pytest.mark.filterwarnings("ignore:Invalid `oft_block_size`")  # PEFT's, where the rank divides no width


@dataclass(frozen=True)
class Case:
    widths: tuple[int, int]
    context: int
    config: AdapterConfig
    dtype: torch.dtype
    step: int


@st.composite
def cases(draw: Any) -> Case:
    """Square weights, and cross-attention's narrower, wider and equal to the text; of either network, or of both."""
    even = st.integers(2, 12).map(lambda half: 2 * half)
    ranks = st.integers(2, 6)
    config = AdapterConfig(
        rank=draw(ranks),
        alpha=draw(st.none() | st.sampled_from((0.5, 3.0))),
        targets=tuple(draw(st.lists(st.sampled_from(UNET), unique=True))),
        text_rank=draw(st.none() | ranks),
        text_alpha=draw(st.none() | st.just(2.0)),
        text_targets=tuple(draw(st.lists(st.sampled_from(TEXT), unique=True))),
        ramp_steps=draw(st.sampled_from((0, 5))),
    )
    if not config.targets and not config.text_targets:
        config = replace(config, targets=("to_k",))
    dtype = draw(st.sampled_from((torch.float32, torch.bfloat16)))
    return Case((draw(even), draw(even)), draw(even), config, dtype, draw(st.integers(1, 6)))


def build(case: Case) -> dict[str, nn.Module]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        unet = UNet2DConditionModel(
            sample_size=4,
            block_out_channels=case.widths,
            down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=case.context,
            attention_head_dim=2,
            norm_num_groups=2,
        )
        text = CLIPTextConfig(
            vocab_size=11,
            hidden_size=case.context,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=8,
            eos_token_id=2,
        )
        networks: dict[str, Any] = {"unet": unet, "text_encoder": CLIPTextModel(text)}
        return {name: part.to(case.dtype).requires_grad_(False).eval() for name, part in networks.items()}


def answer(networks: Mapping[str, nn.Module]) -> Tensor:
    """What the UNet answers, told by the text encoder."""
    dtype = next(networks["unet"].parameters()).dtype
    x = torch.linspace(-2, 2, 2 * 4 * 4 * 4).reshape(2, 4, 4, 4)
    text = networks["text_encoder"](torch.tensor([[1, 5, 7, 2], [1, 9, 3, 2]])).last_hidden_state
    return networks["unet"](x.to(dtype), torch.tensor([3, 500]), text).sample


def setting(row: str, case: Case) -> AdapterConfig:
    """The case's numbers with the row's method."""
    kind = ROWS[row]
    fixed: dict[str, Any] = {"alpha": None, "text_alpha": None} if kind.method == "oft" else {}
    if "ramp_steps" not in adapters.METHODS[kind.method].options:
        fixed["ramp_steps"] = None
    named = {key: getattr(kind, key) for key in ("method", "init", "signature", "dora")}
    return replace(case.config, **named, **fixed)


def trained(networks: dict[str, nn.Module], config: AdapterConfig, step: int) -> adapters.Adapter:
    """Attached, one step of Adam, then every number moved."""
    adapter = adapters.attach(networks, config, seed=1)
    adapter.set_step(step)
    generator = torch.Generator().manual_seed(2)
    answer(networks).float().square().mean().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    torch.optim.Adam(adapter.param_groups(1e-3)).step()
    with torch.no_grad():
        for p in adapter.parameters():
            p.grad = None
            p.add_(torch.randn(p.shape, generator=generator) * 0.05)
    return adapter


def bits(networks: Mapping[str, nn.Module]) -> list[tuple[Any, ...]]:
    found: list[tuple[Any, ...]] = []
    for network in networks.values():
        found += [(path, id(module), getattr(module, "processor", None)) for path, module in network.named_modules()]
        for key, tensor in network.state_dict(keep_vars=True).items():
            raw = tensor.detach().view(torch.int16 if tensor.dtype == torch.bfloat16 else tensor.dtype)
            found.append((key, tensor.requires_grad, tensor.dtype, raw.numpy().tobytes()))
    return found


def distance(one: Tensor, other: Tensor) -> float:
    return float((one.float() - other.float()).norm() / other.float().norm())


def stock(networks: Mapping[str, nn.Module], file: Path) -> Any:
    """A pipeline of diffusers' own around the networks, with the file loaded."""
    parts: dict[str, Any] = dict.fromkeys(("vae", "tokenizer", "scheduler", "safety_checker", "feature_extractor"))
    pipeline = StableDiffusionPipeline(**networks, **parts, requires_safety_checker=False)
    pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="stored")
    return pipeline


def test_no_method_is_left_out() -> None:
    assert {config.method for config in ROWS.values()} == set(adapters.METHODS)


@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(case=cases())
def test_forward_is_the_dense_update_and_detaching_restores_every_bit(row: str, case: Case) -> None:
    networks = build(case)
    before = bits(networks)
    adapter = trained(networks, setting(row, case), case.step)
    with torch.no_grad():
        attached = answer(networks)
        dense = {name: network.float() for name, network in build(case).items()}
        places = {name: dense[name.partition(".")[0]] for name in adapter.layers()}
        for name, change in adapter.delta_weights():
            path = name.partition(".")[2]
            inside = path if name.startswith("unet.") or _has(places[name], path) else path.removeprefix("text_model.")
            places[name].get_submodule(inside).weight.add_(change)
        single = case.dtype == torch.float32
        assert attached.dtype == case.dtype
        assert distance(attached, answer(dense)) < (2e-5 if single else 6e-2)
        adapter.merge()
        assert distance(answer(networks), answer(dense)) < (2e-5 if single else 6e-2)
        adapter.unmerge()
        assert torch.equal(answer(networks), attached)
    adapter.detach()
    assert bits(networks) == before


def _has(network: nn.Module, path: str) -> bool:
    return path in dict(network.named_modules())


@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(case=cases(), stored=st.sampled_from(("float32", "fp16", "bf16")))
def test_a_saved_adapter_is_the_same_adapter(row: str, case: Case, stored: str) -> None:
    networks = build(case)
    adapter = trained(networks, setting(row, case), case.step)
    state = {key: tensor.clone() for key, tensor in adapter.state_dict().items()}
    kind = torch.float32 if adapter.config.init == "offset" else safetensors_io.precision(stored)
    with TemporaryDirectory() as folder:
        file, again = Path(folder, "a.safetensors"), Path(folder, "b.safetensors")
        header = formats.save(adapter, file, about={"step": case.step}, dtype=stored)
        other = build(case)
        loaded = formats.load(file, other)
        formats.save(loaded, again, about={"step": case.step}, dtype=stored)
        assert again.read_bytes() == file.read_bytes()
    assert header.config == loaded.config == adapter.config and loaded.u == adapter.u
    found = loaded.state_dict()
    assert list(found) == list(state)
    assert all(torch.equal(found[key], tensor.to(kind).float()) for key, tensor in state.items())
    adapter.load_state_dict(found)
    with torch.no_grad():
        assert torch.equal(answer(other), answer(networks))


@pytest.mark.parametrize("row", ROWS)
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])
@given(case=cases(), form=st.sampled_from(("kohya", "diffusers", "peft")))
def test_stock_diffusers_does_what_the_adapter_does(row: str, case: Case, form: str) -> None:
    networks = build(case)
    adapter = trained(networks, setting(row, case), case.step)
    with TemporaryDirectory() as folder:
        file = Path(folder, "a.safetensors")
        if row in NO_PAIR or (row in WITH_MAGNITUDE and form == "kohya"):
            with pytest.raises(UserError, match="--merge_into"):
                formats.export(adapter, form, file)
            assert not any(Path(folder).iterdir())
            return
        formats.export(adapter, form, file)
        theirs = {name: network.float() for name, network in build(case).items()}
        base = copy.deepcopy(theirs)
        pipeline = stock(theirs, file)
    for network in networks.values():
        network.float()  # in half precision diffusers would round the file as it loads it
    with torch.no_grad():
        assert distance(answer(theirs), answer(networks)) < 2e-5
        if row not in WITH_MAGNITUDE:
            adapter.set_scale(0.5)
            pipeline.set_adapters(["stored"], [0.5])
            assert distance(answer(theirs), answer(networks)) < 2e-5
        want = answer(networks)
        pipeline.fuse_lora()
        pipeline.unload_lora_weights()
        assert distance(answer(theirs), want) < 2e-5 < distance(answer(base), want)


class Outer(LowRankDelta):
    """W0 + s u v^T, for the test below: all that a new rule needs, and its row."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, config: AdapterConfig, generator: Any) -> None:
        super().__init__(base, rank, alpha)
        self.s = nn.Parameter(torch.ones(()))
        self.left = nn.Parameter(torch.randn(base.out_features, generator=generator) / base.out_features)
        self.right = nn.Parameter(torch.randn(base.in_features, generator=generator))

    def pair(self) -> tuple[Tensor, Tensor]:
        return (self.s * self.left)[:, None], self.right[None]


OUTER = Method("Outer", by_delta(Outer), lambda config, rank, out, into: {"s": (), "left": (out,), "right": (into,)})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_rule_is_a_delta_and_a_row(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training, files, merging, counting and exporting come with them."""
    monkeypatch.setitem(adapters.METHODS, "outer", OUTER)
    case = Case(
        (8, 12), 10, AdapterConfig(method="outer", rank=2, alpha=3.0, text_alpha=3.0, text_targets=TEXT), dtype, 2
    )
    networks = build(case)
    before = bits(networks)
    adapter = trained(networks, case.config, case.step)
    with torch.no_grad():
        attached = answer(networks)
        for name, change in adapter.delta_weights():
            s, left, right = (adapter.state_dict()[f"{name}.{key}"] for key in ("s", "left", "right"))
            torch.testing.assert_close(change, 1.5 * s * torch.outer(left, right))
        adapter.set_scale(0.0)
        assert distance(answer(networks), attached) > 1e-3
        adapter.set_scale(1.0)
        adapter.merge()
        assert distance(answer(networks), attached) < (2e-5 if dtype == torch.float32 else 6e-2)
        adapter.unmerge()

    layers = [(base.out_features, base.in_features) for base in adapter.layers().values()]
    assert budget.count("outer", 2, layers) == adapter.num_parameters() == sum(1 + sum(shape) for shape in layers)
    file, exported = tmp_path / "a.safetensors", tmp_path / "lora" / "b.safetensors"
    formats.save(adapter, file)
    other = build(case)
    loaded = formats.load(file, other)
    assert loaded.config == adapter.config and loaded.config.method == "outer"
    with torch.no_grad():
        assert torch.equal(answer(other), attached)
    exported.parent.mkdir()
    formats.export(adapter, "diffusers", exported)
    theirs = {name: network.float() for name, network in build(case).items()}
    stock(theirs, exported)
    for network in networks.values():
        network.float()
    with torch.no_grad():
        assert distance(answer(theirs), answer(networks)) < 2e-5
        for network in networks.values():
            network.to(dtype)
    adapter.detach()
    assert bits(networks) == before
    monkeypatch.undo()
    with pytest.raises(UserError, match="unknown method outer"):
        formats.load(file, build(case))
