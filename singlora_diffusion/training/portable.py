"""The adapter once more as an ordinary LoRA, under the name that diffusers' scripts give it: for other programs."""

from __future__ import annotations

from pathlib import Path

from .. import formats, models
from ..adapters.methods import METHODS
from ..errors import UserError
from ..formats import exporting, forms, hollow
from ..models import Family
from . import run_folder


def write(adapter: Path, family: Family) -> tuple[Path, str]:
    """Export an adapter's file beside it, verified layer by layer; an earlier export is replaced.

    Only magnitudes need the base model's weights. Without them the export takes no more memory than the adapter.

    Returns:
        The file, and the programs that read it.

    Raises:
        UserError: the method has no LoRA form, the base model does not fit into memory once more for its magnitudes, or
            the file cannot be written.
    """
    config = formats.read_header(adapter).config
    networks, form = dict(models.meta_networks(family.source)), None
    if METHODS[config.method].has_magnitude(config):
        if not hollow.fit(networks):
            raise UserError("its magnitudes are exported with the base model in memory, which does not fit")
        networks, form = dict(family.networks), "peft"
    else:
        hollow.fill(networks)
    path = adapter.with_name(run_folder.LORA)
    exporting.export(adapter, form, path, networks=networks, whole=False, overwrite=True)
    return path, forms.of(networks)[forms.chosen(form, networks)].readers
