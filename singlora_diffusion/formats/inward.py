"""Adapters of other programs: their SingLoRAs become ours, their LoRAs can be generated with."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks, specs
from . import columns, container, names, native, pairs, proof, recognition
from .columns import Columns
from .container import Index, shown
from .native import Header
from .pairs import Pair
from .recognition import recognise

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

__all__ = ["Attached", "attach_files", "import_", "recognise"]

NAME = "attached"  # the name in diffusers of what is generated with


class Attached(Protocol):
    """Something in the networks that can be turned up and down, merged into the weights and taken out again."""

    def set_scale(self, scale: float) -> None: ...
    def merge(self) -> None: ...
    def detach(self) -> None: ...


def import_(
    path: str | Path,
    networks: Networks,
    *,
    alpha: float | None = None,
    ramp_steps: int = 1000,
) -> tuple[Adapter, Header]:
    """Attach a SingLoRA of another program, or a LoRA that is one in disguise, as an adapter of ours.

    PEFT-SingLoRA (SimpleTuner) and bare-A files (kyegomez/SingLoRA, Takenoko) hold `<module>.lora_A` or `<module>.A` of
    max(out, in) rows, the trainer's step perhaps, and no alpha. Where a whole projection family is not in the file, its
    layers get A = 0.

    Args:
        networks: by name, of the base it was trained on.
        alpha: None: of the file's metadata or an `adapter_config.json` beside it, else equal to the rank.
        ramp_steps: T of u = min(step / T, 1) where the file carries the step. PEFT-SingLoRA ramps over 1000
            steps whatever it was asked for. 0: u = 1.

    Returns:
        The attached adapter and a header to `native.save` it with.

    Raises:
        UserError: not such a file, or made for another model; the networks are untouched then.
    """
    found = recognise(path)
    index = found.index
    if found.kind == recognition.NATIVE:
        raise UserError(f"{index.path}: is an adapter of singlora-diffusion already")
    if found.kind == recognition.LORA:
        raise UserError(
            f"{index.path}: is an ordinary LoRA ({found.form}), not a SingLoRA: `generate` takes it as it is"
        )
    if found.kind == recognition.UNKNOWN:
        raise recognition.refuse(found)
    if found.kind == recognition.DISGUISED:
        layers = _undisguised(index, pairs.of_file(index, networks))
        step = 0
    else:
        layers, step = _single(index, networks, alpha, ramp_steps)
    roles = {name: network.role for name, network in specs(networks).items()}
    targets: dict[str, tuple[str, ...]] = {}
    for name in layers:
        role = roles[name.partition(".")[0]]
        targets[role] = tuple(dict.fromkeys((*targets.get(role, ()), names.target(name))))
    modules = names.modules(networks)
    for name, module in modules.items():  # a family of projections is adapted as a whole
        role = roles[name.partition(".")[0]]
        chosen = any(name.endswith(f".{one}") for one in targets.get(role, ()))
        if chosen and name not in layers and isinstance(module, nn.Linear):
            layers[name] = columns.none((module.out_features, module.in_features))
    config, state = columns.pack(layers, targets, roles)
    header = Header(config=config, step=step, layers={name: part.shape for name, part in layers.items()}, roles=roles)
    identifier, _, noun = index.metadata.get("modelspec.trigger_phrase", "").partition(" ")
    header = replace(header, identifier=identifier, class_noun=noun)
    return native.attach(index.path, networks, header, state), header


def _undisguised(index: Index, found: Mapping[str, Pair]) -> dict[str, Columns]:
    layers: dict[str, Columns] = {}
    for name, pair in found.items():
        part = columns.of_pair(pair.up, pair.down, columns.coarsest(index))
        if part is None:
            raise UserError(f"{index.path}: {name} is not a SingLoRA")
        layers[name] = part
    return layers


def _single(index: Index, networks: Networks, alpha: float | None, ramp_steps: int) -> tuple[dict[str, Columns], int]:
    path = index.path
    spellings, modules = names.spellings(networks), names.modules(networks)
    matrices: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    steps: set[float] = set()
    wanted = [key for key in index.tensors if (tagged := names.tag(key)) is not None and tagged.role != "base"]
    for key, tensor in container.read_tensors(index, wanted).items():
        tagged = names.tag(key)
        assert tagged is not None
        if tagged.role == "step":
            steps |= {float(value) for value in tensor.reshape(-1)[:1]}
            continue
        name = spellings.get(tagged.layer)
        if name is None or not isinstance(modules[name], nn.Linear):
            raise UserError(f"{path}: {shown(tagged.layer)} is no linear layer of this model: made for another model")
        if tagged.role == "alpha":
            if tensor.numel() != 1:
                raise UserError(f"{path}: {shown(key)} is {tensor.numel()} numbers, want one")
            alphas[name] = float(tensor.reshape(()))
        elif name in matrices:
            raise UserError(f"{path}: {shown(tagged.layer)} occurs twice")
        else:
            matrices[name] = tensor.double()
    if len(steps) > 1:
        raise UserError(f"{path}: its layers stand at different steps: {shown(sorted(steps))}")
    step = steps.pop() if steps else math.inf
    u = min(step / ramp_steps, 1.0) if ramp_steps > 0 else 1.0
    if u <= 0.0:
        raise UserError(
            f"{path}: stands at step 0 of its ramp, where it does nothing: --ramp_steps 0 uses it at full strength"
        )
    layers: dict[str, Columns] = {}
    for name, matrix in matrices.items():
        module: Any = modules[name]
        shape = (module.out_features, module.in_features)
        if matrix.ndim != 2 or len(matrix) != max(shape) or matrix.shape[1] < 1:
            raise UserError(
                f"{path}: {name}: A has shape {tuple(matrix.shape)}, want ({max(shape)}, rank) for a weight {shape}: "
                f"made for another model?"
            )
        rank = matrix.shape[1]
        strength = next(a for a in (alpha, alphas.get(name), _alpha(index), float(rank)) if a is not None) / rank
        if not math.isfinite(strength):
            raise UserError(f"{path}: its alpha is not a finite number")
        layers[name] = columns.positive(matrix, shape).scaled(strength * u)
    if not layers:
        raise UserError(f"{path}: holds no layers")
    return layers, int(step) if math.isfinite(step) else 0


def _alpha(index: Index) -> float | None:
    """alpha from the metadata or from PEFT's `adapter_config.json` beside the file."""
    beside = index.path.with_name("adapter_config.json")
    try:
        if "lora_adapter_metadata" in index.metadata:
            facts = container.parse_json(index.metadata["lora_adapter_metadata"])
            values = {float(value) for key, value in facts.items() if key.endswith("lora_alpha")}
        elif beside.is_file() and beside.stat().st_size < 1 << 20:
            values = {float(container.parse_json(beside.read_bytes())["lora_alpha"])}
        else:
            return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return values.pop() if len(values) == 1 else None


def attach_files(paths: Sequence[str | Path], networks: Networks, scales: Sequence[float] | None = None) -> Attached:
    """Put adapters of any readable kind into networks, several at once: the updates add up, each times its scale.

    One adapter of ours is attached as it is, whatever its method. Several, and LoRA files of other programs, go in
    through diffusers as one LoRA whose pairs stand side by side.

    Raises:
        UserError: a file is unreadable, of no use or for another model, or has no LoRA form to add up; the networks are
            untouched then.
    """
    scales = [1.0] * len(paths) if scales is None else list(scales)
    if not paths or len(scales) != len(paths):
        raise UserError(f"{len(paths)} adapters and {len(scales)} scales: want one scale for each")
    if not all(math.isfinite(scale) for scale in scales):
        raise UserError("a scale must be a finite number")
    found = [recognise(path) for path in paths]
    if len(found) == 1 and found[0].kind in (recognition.NATIVE, recognition.SINGLORA):
        native_ = found[0].kind == recognition.NATIVE
        adapter = native.load(paths[0], networks) if native_ else import_(paths[0], networks)[0]
        adapter.set_scale(scales[0])
        return adapter
    parts: list[tuple[Mapping[str, Pair], float]] = []
    for one, scale in zip(found, scales, strict=True):
        path = one.index.path
        if one.kind == recognition.UNKNOWN:
            raise recognition.refuse(one)
        if one.kind in (recognition.LORA, recognition.DISGUISED):
            parts.append((pairs.of_file(one.index, networks), scale))
            continue
        adapter = native.load(path, networks) if one.kind == recognition.NATIVE else import_(path, networks)[0]
        try:
            parts.append((dict(pairs.of_adapter(adapter)), scale))
        except UserError as error:
            raise UserError(f"{path}: cannot be combined with others: {error}") from error
        finally:
            adapter.detach()
    return _Lora(pairs.as_peft(pairs.total(parts)), networks)


class _Lora:
    """LoRA pairs inside networks through diffusers."""

    def __init__(self, tensors: Mapping[str, Tensor], networks: Networks) -> None:
        layers = names.modules(networks)
        adapted = {tagged.layer for key in tensors if (tagged := names.tag(key)) is not None}
        self._weights: list[Any] = [layers[name].weight for name in adapted]
        self._originals: list[Tensor] | None = None  # of these weights, while merged
        self._pipeline = proof.pipeline({name: network.module for name, network in specs(networks).items()})
        try:
            with proof.quiet():
                self._pipeline.load_lora_weights(dict(tensors), adapter_name=NAME)
        except Exception as error:  # diffusers has many ways to say no; nothing may stay behind
            self.detach()
            raise UserError(f"diffusers does not take the adapter: {shown(error)}") from error

    def set_scale(self, scale: float) -> None:
        """The strength, as long as it is not merged."""
        self._pipeline.set_adapters([NAME], [float(scale)])

    def merge(self) -> None:
        """Write the update into the weights: the networks are plain ones then. `detach` brings the old weights back."""
        if self._originals is None:
            self._originals = [weight.detach().clone() for weight in self._weights]
            with proof.quiet():
                self._pipeline.fuse_lora()
                self._pipeline.unload_lora_weights()

    def detach(self) -> None:
        with proof.quiet():
            self._pipeline.unload_lora_weights()
        for weight, original in zip(self._weights, self._originals or (), strict=False):  # none unless merged
            weight.data.copy_(original)
        self._originals = None
