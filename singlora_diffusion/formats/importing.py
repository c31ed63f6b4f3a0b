"""Adapters of other programs: SingLoRAs are converted to ours, LoRAs are attached for generation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from ..errors import UserError
from ..models.network import Networks, network_of, specs
from ..terminal import escaped, note
from . import diffusers_loader, file_kinds, keys, lora_pairs, native, safetensors_io, signed_factors
from .file_kinds import Recognised, recognise
from .header import Header
from .lora_pairs import Pair
from .safetensors_io import Index
from .signed_factors import SignedFactors

if TYPE_CHECKING:
    from ..adapters.registry import Adapter

__all__ = ["Attached", "attach_files", "import_", "recognise"]

NAME = "attached"  # the adapter's name in diffusers


class Attached(Protocol):
    """An adapter in networks: its strength can be set, it can be merged into the weights and taken out again."""

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
    """Attach a SingLoRA of another program, or a LoRA with tied pairs, as an adapter of ours.

    PEFT-SingLoRA (SimpleTuner) and bare-A files (kyegomez/SingLoRA, Takenoko) hold `<module>.lora_A` or `<module>.A` of
    max(out, in) rows, the trainer's step perhaps, and no alpha. Where a whole projection family is not in the file, its
    layers get A = 0.

    Args:
        networks: by name, of the base it was trained on.
        alpha: None: of the file's metadata or an `adapter_config.json` beside it, else equal to the rank, with a note.
        ramp_steps: T of u = min(step / T, 1) where the file carries the step, else u = 1, with a note. PEFT-SingLoRA
            ramps over 1000 steps whatever its setting says. 0: u = 1.

    Returns:
        The attached adapter and a header to `native.save` it with.

    Raises:
        UserError: not such a file, or made for another model; the networks are untouched then.
    """
    found = recognise(path)
    index = found.index
    if found.kind == file_kinds.NATIVE:
        raise UserError(f"{index.path}: is an adapter of singlora-diffusion already")
    if found.kind == file_kinds.UNKNOWN:
        raise file_kinds.refuse(found)
    if found.kind in (file_kinds.TIED, file_kinds.LORA):  # fused pairs show what they are only when taken apart
        layers, step = _untied(found, lora_pairs.of_file(index, networks)), 0
        if alpha is not None:
            raise UserError(f"{index.path}: its pairs have their strength in them: leave out --alpha")
    else:
        layers, step = _single(index, networks, alpha, ramp_steps)
    roles = {name: network.role for name, network in specs(networks).items()}
    targets = _complete(layers, networks, roles)
    try:
        config, state = signed_factors.as_adapter(layers, targets, roles)
    except UserError as error:
        raise UserError(f"{index.path}: {error}") from error
    header = Header(config=config, step=step, layers={name: part.shape for name, part in layers.items()}, roles=roles)
    identifier, _, noun = index.metadata.get("modelspec.trigger_phrase", "").partition(" ")
    header = replace(header, identifier=identifier, class_noun=noun)
    return native.attach(index.path, networks, header, state), header


def _complete(
    layers: dict[str, SignedFactors], networks: Networks, roles: Mapping[str, str]
) -> dict[str, tuple[str, ...]]:
    """The targets by role that pick these layers; what else they pick is added to the layers, without an update."""
    targets: dict[str, tuple[str, ...]] = {}
    for name in layers:
        role = roles[network_of(name)]
        targets[role] = tuple(dict.fromkeys((*targets.get(role, ()), keys.target(name))))
    for name, module in keys.modules(networks).items():
        chosen = any(name.endswith(f".{one}") for one in targets.get(roles[network_of(name)], ()))
        if chosen and name not in layers and isinstance(module, nn.Linear):
            layers[name] = signed_factors.zero((module.out_features, module.in_features))
    return targets


def _untied(file: Recognised, pairs: Mapping[str, Pair]) -> dict[str, SignedFactors]:
    """The SingLoRAs that the pairs of a file are.

    Raises:
        UserError: one is not.
    """
    layers: dict[str, SignedFactors] = {}
    for name, pair in pairs.items():
        tied = pair.magnitude is None and pair.up.ndim == 2
        part = signed_factors.of_tied_pair(pair.up, pair.down, signed_factors.tolerance(file.index)) if tied else None
        if part is None:
            raise UserError(
                f"{file.index.path}: is an ordinary LoRA ({file.form}), not a SingLoRA: `generate` takes it as it is"
            )
        layers[name] = part
    return layers


class _Matrices(NamedTuple):
    """What a file of one matrix per layer holds."""

    matrices: dict[str, Tensor]
    """A of each layer by our name, float64."""
    alphas: dict[str, float]
    """Of the layers that have one."""
    step: float
    """Where the trainer stood; infinity: the file does not say."""


def _matrices(index: Index, networks: Networks) -> _Matrices:
    path = index.path
    spellings, modules = keys.spellings(networks), keys.modules(networks)
    matrices: dict[str, Tensor] = {}
    alphas: dict[str, float] = {}
    steps: set[float] = set()
    wanted = [key for key in index.tensors if (tagged := keys.tag(key)) is not None and tagged.part != "base"]
    for key, tensor in safetensors_io.read_tensors(index, wanted).items():
        tagged = keys.tag(key)
        assert tagged is not None
        if tagged.part == "step":
            steps |= {float(value) for value in tensor.reshape(-1)[:1]}
            continue
        pieces = spellings.get(tagged.layer, ())
        if any(piece.rows for piece in pieces):  # such rows of A A^T are not of the form B B^T
            raise UserError(
                f"{path}: {escaped(tagged.layer)} is one matrix for several layers: it cannot be taken apart"
            )
        if not pieces or not isinstance(modules[pieces[0].name], nn.Linear):
            raise UserError(f"{path}: {escaped(tagged.layer)} is no linear layer of this model: made for another model")
        name = pieces[0].name
        if tagged.part == "alpha":
            if tensor.numel() != 1:
                raise UserError(f"{path}: {escaped(key)} is {tensor.numel()} numbers, want one")
            alphas[name] = float(tensor.reshape(()))
        elif name in matrices:
            raise UserError(f"{path}: {escaped(tagged.layer)} occurs twice")
        else:
            matrices[name] = tensor.double()
    if len(steps) > 1:
        raise UserError(f"{path}: its layers stand at different steps: {escaped(sorted(steps))}")
    return _Matrices(matrices, alphas, steps.pop() if steps else math.inf)


def _single(
    index: Index, networks: Networks, alpha: float | None, ramp_steps: int
) -> tuple[dict[str, SignedFactors], int]:
    """The layers of a file of one matrix per layer, alpha and ramp inside, and the trainer's step; 0: unknown."""
    path, modules = index.path, keys.modules(networks)
    matrices, alphas, step = _matrices(index, networks)
    u = min(step / ramp_steps, 1.0) if ramp_steps > 0 else 1.0
    if u <= 0.0:
        raise UserError(
            f"{path}: stands at step 0 of its ramp, where it does nothing: --ramp_steps 0 uses it at full strength"
        )
    stated = alpha if alpha is not None else _alpha(index)
    assumed = ["alpha = rank"] if stated is None and set(alphas) != set(matrices) else []
    assumed += ["a finished ramp, u = 1"] if step == math.inf else []
    layers: dict[str, SignedFactors] = {}
    for name, matrix in matrices.items():
        module: Any = modules[name]
        shape = (module.out_features, module.in_features)
        if matrix.ndim != 2 or len(matrix) != max(shape) or matrix.shape[1] < 1:
            raise UserError(
                f"{path}: {name}: A has shape {tuple(matrix.shape)}, want ({max(shape)}, rank) for a weight {shape}: "
                f"made for another model?"
            )
        rank = matrix.shape[1]
        strength = next(a for a in (alpha, alphas.get(name), stated, float(rank)) if a is not None) / rank
        if not math.isfinite(strength):
            raise UserError(f"{path}: its alpha is not a finite number")
        layers[name] = signed_factors.of_matrix(matrix, shape).scaled(strength * u)
    if not layers:
        raise UserError(f"{path}: holds no layers")
    if assumed:
        note(
            f"{escaped(path, 1000)} does not state everything: {' and '.join(assumed)} assumed; --alpha says otherwise"
        )
    return layers, int(step) if math.isfinite(step) else 0


def _alpha(index: Index) -> float | None:
    """alpha from the metadata or from PEFT's `adapter_config.json` beside the file."""
    try:
        if lora_pairs.METADATA in index.metadata:
            facts = safetensors_io.parse_json(index.metadata[lora_pairs.METADATA])
        else:
            facts = lora_pairs.config_beside(index) or {}
        values = {float(value) for key, value in facts.items() if key.endswith("lora_alpha")}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, OverflowError):
        return None
    return values.pop() if len(values) == 1 else None


def attach_files(paths: Sequence[str | Path], networks: Networks, scales: Sequence[float] | None = None) -> Attached:
    """Put adapters of any readable kind into networks, several at once: the updates add up, each times its scale.

    One adapter of ours is attached as it is, whatever its method. Several, and LoRA files of other programs, go in
    through diffusers as one LoRA whose pairs stand side by side.

    Raises:
        UserError: a file is unreadable, not an adapter or for another model, or has no LoRA form to add up; the
            networks are untouched then.
    """
    scales = [1.0] * len(paths) if scales is None else list(scales)
    if not paths or len(scales) != len(paths):
        raise UserError(f"{len(paths)} adapters and {len(scales)} scales: want one scale for each")
    if not all(math.isfinite(scale) for scale in scales):
        raise UserError("a scale must be a finite number")
    found = [recognise(path) for path in paths]
    if len(found) == 1 and found[0].kind in (file_kinds.NATIVE, file_kinds.SINGLORA):
        native_ = found[0].kind == file_kinds.NATIVE
        adapter = native.load(paths[0], networks) if native_ else import_(paths[0], networks)[0]
        adapter.set_scale(scales[0])
        return adapter
    parts: list[tuple[Mapping[str, Pair], float]] = []
    for one, scale in zip(found, scales, strict=True):
        path = one.index.path
        if one.kind == file_kinds.UNKNOWN:
            raise file_kinds.refuse(one)
        if one.kind in (file_kinds.LORA, file_kinds.TIED):
            parts.append((lora_pairs.of_file(one.index, networks), scale))
            continue
        adapter = native.load(path, networks) if one.kind == file_kinds.NATIVE else import_(path, networks)[0]
        try:
            parts.append((dict(lora_pairs.of_adapter(adapter)), scale))
        except UserError as error:
            raise UserError(f"{path}: cannot be combined with others: {error}") from error
        finally:
            adapter.detach()
    return _Lora(lora_pairs.as_peft(lora_pairs.total(parts), specs(networks)), networks)


class _Lora:
    """LoRA pairs inside networks through diffusers."""

    def __init__(self, tensors: Mapping[str, Tensor], networks: Networks) -> None:
        layers = keys.modules(networks)
        adapted = {tagged.layer for key in tensors if (tagged := keys.tag(key)) is not None}
        self._networks = list(keys.by_network(list(adapted)))
        beyond = set(self._networks) - diffusers_loader.loadable(networks)
        if beyond:
            raise UserError(
                f"diffusers loads no LoRA into {', '.join(sorted(beyond))}: only our own adapter, alone, reaches it"
            )
        self._weights: list[Any] = [layers[name].weight for name in adapted]
        self._originals: list[Tensor] | None = None  # of these weights, while merged
        self._pipeline = diffusers_loader.pipeline({name: network.module for name, network in specs(networks).items()})
        try:
            with diffusers_loader.quiet():
                self._pipeline.load_lora_weights(dict(tensors), adapter_name=NAME)
        except Exception as error:  # diffusers has many ways to say no; nothing may stay behind
            self.detach()
            raise UserError(f"diffusers does not take the adapter: {escaped(error)}") from error

    def set_scale(self, scale: float) -> None:
        """The strength, as long as it is not merged."""
        self._pipeline.set_adapters([NAME], [float(scale)])

    def merge(self) -> None:
        """Write the update into the weights: the networks are plain ones then. `detach` brings the old weights back."""
        if self._originals is None:
            self._originals = [weight.detach().clone() for weight in self._weights]
            with diffusers_loader.quiet():
                self._pipeline.fuse_lora(components=self._networks)
                self._pipeline.unload_lora_weights()

    def detach(self) -> None:
        with diffusers_loader.quiet():
            self._pipeline.unload_lora_weights()
        for weight, original in zip(self._weights, self._originals or (), strict=False):  # none unless merged
            weight.data.copy_(original)
        self._originals = None
