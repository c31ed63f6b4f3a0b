"""Images: prompts x seeds with adapters or the base model alone. The first adapter's header says what is needed."""

from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

from .. import device, files, models
from ..errors import UserError
from ..terminal import escaped, note
from . import gallery, memory, records, sources
from .manifest import Record
from .settings import GenerateSettings, check

if TYPE_CHECKING:
    from PIL import Image

    from ..models import Family
    from .sources import AdapterSource


def generate(settings: GenerateSettings, *, quiet: bool = False, family: Family | None = None) -> list[Record]:
    """Make what is missing of prompts x seeds, PNG by PNG, then the contact sheet.

    Args:
        quiet: print nothing but notes.
        family: the base model, for those who sample from it many times. It is left as it was. None: it is loaded.

    Returns:
        The manifest's records for these prompts and seeds, prompt by prompt.

    Raises:
        UserError: settings, adapter or base model that do not work, or other images in the folder.
    """
    check(settings)
    adapters = [sources.read_adapter(path) for path in settings.adapters.adapter]
    family = family or load(settings, adapters)
    plan = records.plan(settings, family, adapters)
    _require_memory(family, plan[0], min(settings.sampling.batch_size, len(plan)))
    records.note_cut_prompts(family, plan)
    folder = settings.output.output_dir
    with ExitStack() as stack:
        if adapters:  # one for another model leaves no folder behind
            stack.callback(sources.attach(adapters, family, settings.adapters).detach)
        stack.enter_context(files.locked(folder, "singlora generate"))
        files.remove_leftovers(folder)
        todo = gallery.missing(folder, plan, settings.output.overwrite)
        began = time.monotonic()
        for record, image in _sampled(family, todo, settings, quiet):
            gallery.add(folder, record, image)
        seconds = time.monotonic() - began
        gallery.write_contact_sheet(folder, plan)
    _note_one_colour(gallery.one_colour(folder, plan), len(plan))
    if not quiet:
        _report(settings, adapters, len(plan), len(todo), seconds)
    return plan


def load(settings: GenerateSettings, adapters: Sequence[AdapterSource]) -> Family:
    """The base model that the settings and the adapters mean, on the device and in the dtype that are asked for.

    Raises:
        UserError: there is no such model, it does not fit into memory, or it is not what the adapters are for.
    """
    import torch

    from ..models.quantized import QUANTIZATIONS

    named = settings.model.pretrained_model_name_or_path
    wanted = sources.base_model(named, adapters)
    where = device.choose(settings.model.device)
    dtype = device.compute_dtype(where, settings.model.dtype)
    slow = device.slow_bfloat16(where, dtype)
    if slow:
        note(slow)
    try:
        packed = QUANTIZATIONS[settings.model.quantize].bytes if settings.model.quantize else None
        vae = sources.autoencoder(settings.model, adapters)
        needed = memory.of_weights(models.find(wanted), packed or getattr(torch, dtype).itemsize)
        device.require(needed, where, f"{escaped(wanted)} in {dtype}")
        family = models.load(wanted, dtype, where, settings.model.quantize, vae)
    except UserError as error:
        if named is not None:
            raise
        raise UserError(
            f"the adapter's base model: {escaped(error, 1000)}; or name it with --pretrained_model_name_or_path"
        ) from None
    sources.check_base(adapters, family, asked_for=named is not None)
    return family


def _require_memory(family: Family, first: Record, batch_size: int) -> None:
    height, width = first["height"], first["width"]
    needed = memory.of_sampling(family, height, width, batch_size)
    device.require(needed, str(family.device), f"--height {height} --width {width} --batch_size {batch_size}")


def _sampled(
    family: Family, todo: Sequence[Record], settings: GenerateSettings, quiet: bool
) -> Iterator[tuple[Record, Image.Image]]:
    """The images of the records in order, with a progress bar."""
    import torch
    from rich.console import Console

    from ..progress import bar

    size = settings.sampling.batch_size
    with bar(Console(stderr=True), transient=True, disable=quiet or not todo) as progress:
        task = progress.add_task("generating", total=len(todo))
        for start in range(0, len(todo), size):
            batch = todo[start : start + size]
            first = batch[0]
            try:
                images = models.sample(
                    family,
                    [record["prompt"] for record in batch],
                    [record["seed"] for record in batch],
                    steps=first["steps"],
                    guidance=first["guidance_scale"],
                    height=first["height"],
                    width=first["width"],
                    negative_prompt=first["negative_prompt"],
                    scheduler=settings.sampling.scheduler,
                )
            except torch.OutOfMemoryError as error:
                raise UserError(
                    f"{len(batch)} images at once do not fit the GPU: --batch_size 1, or a smaller size"
                ) from error
            yield from zip(batch, images, strict=True)
            progress.advance(task, len(batch))


def _note_one_colour(names: Sequence[str], total: int) -> None:
    if names:
        listed = ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")
        note(
            f"{len(names)} of {total} images are of one colour: {listed}. The adapter may have diverged or be damaged; "
            f"a smaller --scale or --dtype float32 may help"
        )


def _report(
    settings: GenerateSettings, adapters: Sequence[AdapterSource], total: int, made: int, seconds: float
) -> None:
    folder = settings.output.output_dir
    kept = f", {total - made} were there already" if total > made else ""
    pace = f", {seconds / made:.2f} s each" if made else ""
    shown = escaped(folder, 1000)
    print(f"{shown}: {made} image{'s' * (made != 1)} made{pace}{kept}; see {shown}/{gallery.CONTACT_SHEET}")
    references = sources.references(adapters[0]) if adapters else None
    command = ["singlora", "score", "--images", str(folder), "--references", references or "REAL_IMAGES"]
    print(f"next: {escaped(shlex.join(command), 10_000)}")
