"""Scores one folder of images against reference images of the subject: `singlora score`.

It reads images and, where there is one, the manifest.jsonl that says which prompt each was made from, so anybody's
images can be scored. It prints a table and writes scores.json: the numbers of every image, and how to repeat them.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, make_dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import numpy as np
from typing_extensions import Doc

from singlora_diffusion import device as devices
from singlora_diffusion.errors import UserError
from singlora_diffusion.files import write_json
from singlora_diffusion.models.hub import PACKAGED
from singlora_diffusion.settings import Count, as_json, command_line

from . import inputs as reading
from . import score_table
from .embedding import Embedded, embed_images, embed_texts, keep
from .encoder_table import PROTOCOLS, ROLES
from .encoders import Encoder, encoder
from .inputs import FOLDERS, Folders, Inputs
from .metrics import METRICS, Metric, Scores, Vectors, mean_over_prompts
from .prompt_kinds import by_kind
from .retrieval import Gallery
from .vector_store import VectorStore

if TYPE_CHECKING:
    MetricName: TypeAlias = str
    ProtocolName: TypeAlias = str
    EncoderSources: TypeAlias = Any
else:  # the choices and flags are the tables' rows
    MetricName, ProtocolName = Literal[tuple(METRICS)], Literal[tuple(PROTOCOLS)]
    EncoderSources = make_dataclass(
        "EncoderSources",
        [
            (role, Annotated[str | None, Doc(f"The {label} encoder. None: the protocol's own.")], field(default=None))
            for role, label in ROLES.items()
        ],
        frozen=True,
    )
    EncoderSources.__doc__ = "Encoders other than the protocol's own: a folder, a safetensors file or a hub name."


@dataclass(frozen=True)
class ScoreSettings:
    """Score images of a subject: likeness to real ones (CLIP-I, DINO) and agreement with the prompts (CLIP-T)."""

    images: Path
    """Folder of the images to score. With a manifest.jsonl in it, the images that it lists."""
    references: Path | None = None
    """Folder of real images of the subject. Without it, likeness to the subject is not scored."""
    protocol: ProtocolName | None = None
    """Encoders and preprocessing. None: toyworld for images that toyworld made, else dreambooth-v1."""
    metrics: tuple[MetricName, ...] = ()
    """Which scores. Empty: CLIP-I, DINO and CLIP-T as far as the folders allow."""
    reference_mode: Literal["train", "heldout", "all"] = "train"
    """What the references were to the model: its training images (scores are biased up), held out, or both."""
    base_images: Path | None = None
    """Folder of the base model's images, of the same names, prompts and seeds; for drift."""
    more: Folders = field(default_factory=Folders)
    prompt: str | None = None
    """The one prompt, identifier left out, that all images were made from. For folders without a manifest."""
    prompts_from: Path | None = None
    """A manifest that lies elsewhere. None: manifest.jsonl in the folder of the images."""
    encoders: EncoderSources = field(default_factory=EncoderSources)
    output: Path | None = None
    """Where the result goes. None: scores.json in the folder of the images."""
    cache_dir: Path | None = None
    """Where vectors are kept from run to run. None: .features beside the result."""
    batch_size: Count = 32
    """Images per forward pass. Changes no score beyond rounding."""
    device: str | None = None
    """A torch device. None: the GPU if there is one."""


def score(
    settings: ScoreSettings,
    open_encoder: Callable[..., Encoder] = encoder,
    open_store: Callable[[Path, str], VectorStore] = VectorStore,
) -> dict[str, Any]:
    """Embed every image once, apply the metrics, write the result and return it.

    Args:
        open_encoder, open_store: for those who score many folders, and keep encoders and vectors from one to the next.

    Returns:
        What scores.json holds: "metrics" (per image: mean over prompts, sd over images, n, real-to-real; per set: its
        value), "kinds" (means by kind of prompt, where there are several), "images" (one row each), protocol, encoders
        with their hashes, versions and settings.

    Raises:
        UserError: folders, images, manifest or encoders that cannot be used. No result is written then.
    """
    output = _writable(settings.output or settings.images / "scores.json")
    inputs = reading.read(
        settings.images,
        settings.references,
        settings.base_images,
        prompt=settings.prompt,
        manifest=settings.prompts_from,
        more=settings.more,
    )
    chosen, skipped = reading.choose(settings.metrics, inputs)
    protocol, why = _protocol(settings, inputs)
    encoders = {
        role: open_encoder(
            protocol, role, getattr(settings.encoders, role), device=settings.device, batch_size=settings.batch_size
        )
        for role in sorted({metric.encoder for metric in chosen.values()})  # no encoder that no metric needs
    }
    cache = settings.cache_dir or output.parent / ".features"
    stores = {role: open_store(cache, made.fingerprint) for role, made in encoders.items()}
    if not any("masked_images" in metric.needs for metric in chosen.values()):
        inputs = replace(inputs, masked_images=[], masked_references=[])
    paths = [path for name in FOLDERS for path in getattr(inputs, name)]
    try:
        embedded = embed_images(paths, encoders, stores, settings.batch_size)
        given = _given(inputs, embedded, encoders, stores)
        values: dict[str, Any] = {
            name: metric.function(given["images"](metric.encoder), *(given[n](metric.encoder) for n in metric.needs))
            for name, metric in chosen.items()
        }
    finally:  # an interrupted run continues where it was
        keep(stores.values())

    per_image = {name: values[name] for name, metric in chosen.items() if metric.per == "image"}
    rows = _rows(inputs, embedded, per_image)
    result = {
        "protocol": protocol,
        "protocol_because": why,
        "protocol_about": PROTOCOLS[protocol].about,
        "reference_mode": settings.reference_mode if inputs.references else None,
        "metrics": {
            name: _summary(metric, values[name], inputs, given["references"](metric.encoder))
            for name, metric in chosen.items()
        },
        "kinds": by_kind(rows["images"], tuple(per_image)),
        "skipped": skipped,
        "left_out": inputs.left_out,
        **rows,
        **_made_with(settings, encoders),
        "output": str(output),
    }
    write_json(output, result)
    return result


def run(settings: ScoreSettings) -> None:
    """Score and print: what `singlora score` does."""
    score_table.show(score(settings))


def _protocol(settings: ScoreSettings, inputs: Inputs) -> tuple[str, str]:
    """Its name, and why it was taken."""
    if settings.protocol is not None:
        return settings.protocol, "as asked for"
    if inputs.manifest is not None and all(line.get("base_model") in PACKAGED for line in inputs.lines):
        return "toyworld", "the images were made by toyworld"
    return "dreambooth-v1", "the default"


def _given(
    inputs: Inputs, embedded: Embedded, encoders: Mapping[str, Encoder], stores: Mapping[str, VectorStore]
) -> dict[str, Callable[[str], Any]]:
    """By what a metric needs: what it is given, of the encoder with a role."""

    def images(name: str) -> Callable[[str], Vectors]:
        start = sum(len(getattr(inputs, before)) for before in FOLDERS[: FOLDERS.index(name)])
        return lambda role: embedded.vectors[role][start : start + len(getattr(inputs, name))]

    def texts(read: Callable[[dict[str, Any]], str]) -> Callable[[str], Vectors]:
        return lambda role: embed_texts([read(line) for line in inputs.lines], encoders[role], stores[role])

    vectors: dict[str, Callable[[str], Any]] = {name: images(name) for name in FOLDERS}
    return {
        **vectors,
        "prompt": texts(lambda line: line["prompt"]),
        "prompt_without_token": texts(lambda line: line["prompt_without_token"]),
        "class_prompt": texts(lambda line: f"a photo of a {line['class_noun']}"),
        "prompt_groups": lambda role: inputs.prompts,
        "gallery": lambda role: Gallery(vectors["gallery"](role), np.array(inputs.own)),
    }


def _rows(inputs: Inputs, embedded: Embedded, scores: Mapping[str, Scores]) -> dict[str, Any]:
    """The result's rows, one per image and per reference, and how many images are odd."""
    kept = ("prompt", "prompt_without_token", "template", "prompt_index", "seed")
    # the embedded rows of references and base images come after those of the images
    references = embedded.keys[len(inputs.images) :][: len(inputs.references)]
    rows = [
        {
            "file": path.name,
            **{name: line[name] for name in kept if name in line},
            "sha256": key,
            "blank": blank,
            "copy": key in references,
            **{name: float(values[place]) for name, values in scores.items()},
        }
        for place, (path, line, key, blank) in enumerate(
            zip(inputs.images, inputs.lines, embedded.keys, embedded.blank, strict=False)
        )
    ]
    return {
        "count": len(rows),
        "blank": sum(row["blank"] for row in rows),
        "copies": sum(row["copy"] for row in rows),
        "images": rows,
        "references": [
            {"file": path.name, "sha256": key} for path, key in zip(inputs.references, references, strict=True)
        ],
    }


def _made_with(settings: ScoreSettings, encoders: Mapping[str, Encoder]) -> dict[str, Any]:
    """What the result says of encoders, machine and settings: enough to repeat it."""
    return {
        "encoders": {
            role: {**made.about, "fingerprint": made.fingerprint, "source": made.source}
            for role, made in encoders.items()
        },
        "dtype": "float32",
        "device": devices.choose(settings.device) if "torch" in sys.modules else "none, all vectors were stored",
        "versions": versions(),
        "settings": as_json(settings),
        "command": command_line("score", settings),
    }


def _summary(metric: Metric, found: Any, inputs: Inputs, references: Vectors) -> dict[str, Any]:
    """A metric's entry in the result."""
    prompts = inputs.prompts
    if metric.per == "image":
        sd = float(found.std(ddof=1)) if len(found) > 1 else None
        numbers = {"mean": mean_over_prompts(found, prompts), "sd": sd}
    else:
        numbers = {"value": None if found is None else float(found)}
    return {
        **numbers,
        "n": len(prompts),
        "prompts": len(set(prompts)),
        "real_to_real": metric.of_references(references) if metric.of_references and len(references) else None,
        "label": metric.label,
        "unit": metric.unit,
        "higher_is_better": metric.higher_is_better,
        "about": metric.description,
    }


def _writable(output: Path) -> Path:
    """Found out before the work, not after it."""
    if output.suffix != ".json" or os.path.isdir(output):
        raise UserError(f"{output}: is no name for the result; name a .json file with --output")
    nearest = next((parent for parent in output.absolute().parents if os.path.exists(parent)), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{output}: cannot be written there; name another place with --output")
    return output


def versions() -> dict[str, str]:
    """Of what scores follow from."""
    found = {"python": platform.python_version()}
    for name in ("singlora-diffusion", "torch", "open_clip_torch", "timm", "transformers", "pillow", "numpy"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


if __name__ == "__main__":
    from singlora_diffusion.cli import run as run_command

    sys.exit(run_command("score", sys.argv[1:]))
