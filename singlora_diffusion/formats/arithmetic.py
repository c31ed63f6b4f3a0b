"""Sums of SingLoRAs, exactly: signed factors side by side are again a SingLoRA. No SVD, no loss; the ranks add up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ..errors import UserError
from ..models.network import Role, network_of
from ..terminal import escaped
from . import native, signed_factors
from .header import Header
from .signed_factors import SignedFactors


def add(
    files: Sequence[str | Path],
    output: str | Path,
    scales: Sequence[float] | None = None,
    *,
    overwrite: bool = False,
) -> Header:
    """Write the adapter whose update is sum_i scale_i dW_i, with u and alpha of each folded in: alpha = rank, u = 1.

    If all terms are of the paper's form with positive scales, so is the sum. A negative scale, or a term with
    `signature=balanced` or `init=offset`, makes it `balanced`, with zero columns where + and - do not come in pairs.

    Raises:
        UserError: a file is not one of our SingLoRAs, has magnitudes, or belongs to another base model than the first.
    """
    scales = [1.0] * len(files) if scales is None else list(scales)
    if not files or len(scales) != len(files):
        raise UserError(f"{len(files)} adapters and {len(scales)} scales: want one scale for each")
    layers: dict[str, SignedFactors] = {}
    targets: dict[str, tuple[str, ...]] = {}
    first: Header | None = None
    roles: dict[str, Role] = {}
    terms: list[dict[str, object]] = []
    for path, scale in zip(files, scales, strict=True):
        header, state = native.read(path)
        config = header.config
        if not math.isfinite(scale):
            raise UserError(f"{path}: scale {scale} is not a finite number")
        if not signed_factors.suffice(config):
            kind = "singlora with magnitudes" if config.dora else config.method
            raise UserError(f"{path}: is {kind}; only plain SingLoRAs add up exactly")
        first = first or header
        if header.base_hash != first.base_hash:
            raise UserError(f"{path}: was made for another base model than {files[0]}: their sum would mean nothing")
        for name in header.layers:
            roles[network_of(name)] = header.role(network_of(name))
            term = signed_factors.of_layer(header, state, name).scaled(scale)
            if name in layers and layers[name].shape != term.shape:
                raise UserError(f"{path}: {escaped(name)} has another shape than in {files[0]}")
            layers[name] = signed_factors.concatenated([layers[name], term]) if name in layers else term
        for role in ("denoiser", "text"):
            here = config.for_role(role)[2]
            targets[role] = tuple(dict.fromkeys((*targets.get(role, ()), *here)))
        terms.append({"file": Path(path).name, "sha256": header.sha256, "scale": scale})
    assert first is not None
    config, state = signed_factors.as_adapter(layers, targets, roles)
    about = replace(first, config=config, u=1.0, roles=roles, recipe={"sum_of": terms}, images=0, started_at=0.0)
    return native.write(
        output, state, replace(about, layers={n: c.shape for n, c in layers.items()}), overwrite=overwrite
    )
