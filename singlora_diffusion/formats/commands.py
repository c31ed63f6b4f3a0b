"""The commands that handle adapter files: settings in, files and a few printed lines out."""

from __future__ import annotations

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

from .. import models
from ..adapters.methods import METHODS
from ..errors import UserError
from ..terminal import escaped, note
from . import arithmetic, exporting, forms, hollow, importing, inspecting, merging, native
from .header import Header
from .settings import AddSettings, ExportSettings, ImportSettings, InspectSettings


def export(settings: ExportSettings) -> None:
    """`singlora export`."""
    if (settings.output is None) == (settings.merge_into is None):
        raise UserError("say where to: --output FILE.safetensors, or --merge_into DIR for a full model")
    header = native.read_header(settings.adapter)
    base = settings.pretrained_model_name_or_path
    if settings.merge_into is not None:
        family = load_base(header, base)
        adapter = native.load(settings.adapter, family.networks)
        print(f"wrote the merged pipeline {merging.merge_into(family, adapter, settings.merge_into)}")
        return
    assert settings.output is not None
    networks = models.meta_networks(_name_of_base(header, base))
    form = forms.chosen(settings.format, networks)
    about = header
    whole = hollow.fit(networks) or METHODS[header.config.method].has_magnitude(header.config)
    if whole:
        family = load_base(header, base)
        networks = dict(family.networks)
        about = replace(header, prediction_type=header.prediction_type or family.noise_process.prediction_type)
    else:
        hollow.fill(networks)
        note("the base model does not fit into memory: the file is verified layer by layer, without the base's weights")
    found = exporting.export(
        settings.adapter,
        form,
        settings.output,
        networks=networks,
        dtype=settings.dtype,
        about=about,
        whole=whole,
        overwrite=settings.overwrite,
    )
    size = Path(settings.output).stat().st_size
    print(f"wrote {settings.output} ({form}, {settings.dtype}, {size / 1e6:.2f} MB, {found.layers} layers)")
    print(f"read by {forms.of(networks)[form].readers}")
    outputs = f", outputs by {found.output_difference:.1e} (rounding alone makes {found.rounding:.1e})" if whole else ""
    print(
        f"loaded back through diffusers: layers differ by at most {found.layer_difference:.1e} of their effect "
        f"({found.update_difference:.1e} of dW alone){outputs}"
    )
    if header.u < 1.0:
        note(f"its ramp stood at u = {header.u:g}, which is folded in")
    for remark in exporting.remarks(form, header, networks):
        note(remark)


def import_(settings: ImportSettings) -> None:
    """`singlora import`."""
    if Path(settings.output).exists() and not settings.overwrite:
        raise UserError(f"{settings.output}: exists already; name another file, or pass --overwrite")
    base = settings.pretrained_model_name_or_path
    networks = models.meta_networks(base)
    about: dict[str, Any] = {"base_model": base}
    if hollow.fit(networks):
        family = models.load(base)
        networks = dict(family.networks)
        about |= {"family": family.name, "base_hash": family.fingerprint}
    else:
        hollow.fill(networks)
        note("the base model does not fit into memory: only the names and shapes of its layers are compared")
    adapter, header = importing.import_(settings.file, networks, alpha=settings.alpha, ramp_steps=settings.ramp_steps)
    about |= {
        "step": header.step,
        "identifier": header.identifier,
        "class_noun": header.class_noun,
        "recipe": {"imported_from": Path(settings.file).name},
    }
    native.save(adapter, settings.output, about=about, dtype=settings.dtype, overwrite=settings.overwrite)
    config = adapter.config
    print(f"wrote {settings.output} (singlora, rank {config.rank}, {len(adapter.layers())} layers, {config.signature})")


def inspect(settings: InspectSettings) -> None:
    """`singlora inspect`."""
    base = settings.pretrained_model_name_or_path
    networks = models.load(base).networks if base else None
    report = inspecting.inspect(settings.file, networks)
    inspecting.show(report)
    if report.rows and networks is None:
        model = report.facts.get("base model", "MODEL")
        note(f"‖dW‖/‖W0‖ needs the base model: --pretrained_model_name_or_path {shlex.quote(model)}")


def add(settings: AddSettings) -> None:
    """`singlora add`."""
    scales = settings.scale * len(settings.adapters) if len(settings.scale) == 1 else settings.scale
    header = arithmetic.add(settings.adapters, settings.output, scales, overwrite=settings.overwrite)
    print(f"wrote {settings.output} (singlora, rank {header.config.rank}, {header.config.signature})")


def load_base(header: Header, named: str | None, **options: str) -> models.Family:
    """The base model of an adapter: the one the user names, else the one the header names; says so if it is another."""
    vae = header.vae if named in (None, header.base_model) else None
    family = models.load(_name_of_base(header, named), vae=vae, **options)
    if header.family and header.family != family.name:
        raise UserError(
            f"the adapter is for {escaped(header.base_model or 'a model')}, of the family {escaped(header.family)}; "
            f"{escaped(family.source)} is of the family {family.name}"
        )
    if header.base_hash and family.fingerprint != header.base_hash:
        note(
            f"{escaped(family.source)} is not the very model this adapter was trained on ({escaped(header.base_model)})"
        )
    return family


def _name_of_base(header: Header, named: str | None) -> str:
    if not (named or header.base_model):
        raise UserError("the adapter does not say what it was trained on: --pretrained_model_name_or_path MODEL")
    return named or header.base_model
