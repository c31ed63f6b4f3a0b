"""Proves an exported file by loading it as its readers do: through diffusers, into clean copies of the networks."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import ConfigMixin, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..errors import UserError

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

NAME = "exported"  # the adapter's name in diffusers while it is tried
STORED = {
    torch.float32: 1e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}  # what a file's precision explains, relative
COMPUTED = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}  # what the networks' own rounding explains


@dataclass(frozen=True)
class Proof:
    """How far a file as diffusers loads it is from the adapter it was made of."""

    layers: int
    layer_difference: float
    """Largest over the layers: ||(loaded - live) x|| / ||live x|| for random x, computed in float64, on dW (on W' where
    there is a magnitude)."""
    output_difference: float
    """Largest over the networks: ||loaded(x) - live(x)|| / ||live(x)|| for random inputs, as the networks compute."""


def prove(path: Path, adapter: Adapter, stored: torch.dtype, *, additive: bool) -> Proof:
    """Load `path` into copies of the adapter's networks through diffusers and compare.

    Args:
        stored: the precision of the file, which says how large a difference may be.
        additive: compare the updates by themselves; False: W0 with them, for magnitudes.

    Raises:
        UserError: diffusers does not load the file, or it is further from the adapter than the precision explains.
    """
    twins = {name: twin(network.module, name, adapter) for name, network in adapter.networks.items()}
    load(path, twins)
    output = max(_output_difference(network.module, twins[name]) for name, network in adapter.networks.items())
    places = {name: (kind, inside) for kind in twins for name, inside in paths(adapter, kind).items()}
    bases = adapter.layers()
    factors = {name: (up, down) for name, up, down in adapter.factors()} if additive else {}
    worst, found = 0.0, 0
    for name, update in adapter.delta_weights():
        kind, inside = places[name]
        layer = twins[kind].get_submodule(inside)
        if not hasattr(layer, "base_layer"):
            raise UserError(f"not written: diffusers leaves {name} without an adapter")
        difference = _layer_difference(layer, bases[name], update, factors.get(name))
        worst, found = max(worst, difference), found + 1
        if not difference <= STORED[stored]:  # also catches NaN
            raise UserError(
                f"not written: {name}, loaded through diffusers, differs by {difference:.1e} of its effect from the "
                f"adapter, more than {stored} explains" + ("" if stored == torch.float32 else ": use --dtype float32")
            )
    computed = next(p.dtype for network in adapter.networks.values() for p in network.module.parameters())
    if not output <= max(STORED[stored], COMPUTED[computed]):
        raise UserError(f"not written: loaded through diffusers, the networks' outputs differ by {output:.1e}")
    return Proof(found, worst, output)


def twin(network: nn.Module, name: str, adapter: Adapter) -> nn.Module:
    """The network as it was before the adapter came, in float32: a new module around the same base tensors.

    Nothing is copied where they are float32 already. In half precision diffusers would round the file as it loads it.
    """
    config: Any = network.config
    with torch.device("meta"):
        kind: Any = type(network)
        clean: nn.Module = kind.from_config(config) if isinstance(network, ConfigMixin) else kind(config)
    state, bases = dict(network.state_dict()), adapter.layers()
    for outside, path in paths(adapter, name).items():
        base = bases[outside]
        state[f"{path}.weight"] = base.weight.detach()
        if base.bias is not None:
            state[f"{path}.bias"] = base.bias.detach()
    clean.load_state_dict({key: _single(state[key]) for key in clean.state_dict()}, assign=True)
    for key, buffer in network.named_buffers():  # those that are not saved are still without data
        owner, _, last = key.rpartition(".")
        if key in dict(clean.named_buffers()) and clean.get_buffer(key).is_meta:
            clean.get_submodule(owner)._buffers[last] = buffer
    return clean.train(network.training).requires_grad_(False)


def _single(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.is_floating_point() else tensor


def paths(adapter: Adapter, network: str) -> dict[str, str]:
    """The adapter's layers in one network: path inside it by name."""
    spec = adapter.networks[network]
    here = {spec.layer(path): path for path, _ in spec.module.named_modules()}
    return {name: here[name] for name in adapter.layers() if name.startswith(f"{network}.")}


def load(path: Path, networks: Mapping[str, nn.Module]) -> None:
    """Load a LoRA file into networks with `StableDiffusionPipeline.load_lora_weights`.

    Raises:
        UserError: diffusers refuses the file.
    """
    try:
        with quiet():
            pipeline(networks).load_lora_weights(
                str(path.parent), weight_name=path.name, adapter_name=NAME, local_files_only=True
            )
    except Exception as error:  # diffusers has many ways to say no
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"not written: diffusers does not load it: {type(error).__name__}: {reason}") from error


def pipeline(networks: Mapping[str, nn.Module]) -> StableDiffusionPipeline:
    """A pipeline around nothing but the networks: enough to load and unload LoRA weights."""
    with quiet():
        # load_lora_weights asks the UNet even where the file is about the text encoder alone.
        unet = networks["unet"] if "unet" in networks else _smallest_unet()
        return StableDiffusionPipeline(
            vae=None,
            text_encoder=networks.get("text_encoder"),
            tokenizer=None,
            unet=unet,
            scheduler=None,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )


def _smallest_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        block_out_channels=(2,),
        down_block_types=("DownBlock2D",),
        mid_block_type=None,
        up_block_types=("UpBlock2D",),
        layers_per_block=1,
        norm_num_groups=1,
    )


def _layer_difference(layer: nn.Module, base: nn.Linear, update: Tensor, pair: tuple[Tensor, Tensor] | None) -> float:
    """Relative difference on random inputs; `pair`: the live factors of an update that is compared by itself."""
    layer.double()  # the twin's own tensors; what it shares with the live network stays as it is
    weight = base.weight.detach().double()
    x = torch.randn(8, base.in_features, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = x.to(weight.device)
    with torch.no_grad():
        got = layer(x) - (0 if base.bias is None else base.bias.double())
        before, change = x @ weight.T, x @ update.double().T
        error = (got - before - change).norm()
        if pair is None:
            size = (before + change).norm()
        else:
            # the live update itself is known to float32 rounding only: of its terms, where they all but cancel
            up, down = (factor.double().abs() for factor in pair)
            size = torch.stack([change.norm(), 1e-2 * (x @ (up @ down).T).norm(), 1e-6 * before.norm()]).max()
    return 0.0 if error == 0 else float(error / size)


def _output_difference(live: nn.Module, loaded: nn.Module) -> float:
    config: Any = live.config
    weight = next(live.parameters())
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(weight)

    inputs: dict[str, Any]
    if hasattr(config, "cross_attention_dim"):
        side = 2 ** len(config.down_block_types)
        x, text = random(2, config.in_channels, side, side), random(2, 5, config.cross_attention_dim)
        inputs = {"sample": x, "timestep": torch.tensor(500, device=weight.device), "encoder_hidden_states": text}
    else:
        length = min(8, config.max_position_embeddings)
        inputs = {"input_ids": torch.randint(config.vocab_size, (2, length), generator=generator).to(weight.device)}
    with torch.no_grad(), torch.backends.cudnn.flags(enabled=torch.backends.cudnn.enabled, allow_tf32=False):
        want = live(**inputs)[0].float()
        got = loaded(**{key: _single(value) for key, value in inputs.items()})[0]
    return float((got - want).norm() / want.norm())


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no advice from the libraries while a file is tried."""
    levels = diffusers_logging.get_verbosity(), transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    diffusers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        diffusers_logging.set_verbosity(levels[0])
        transformers_logging.set_verbosity(levels[1])
        if bars:
            transformers_logging.enable_progress_bar()
