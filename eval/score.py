"""Scores one folder of pictures against reference pictures of the subject.

    python -m eval.score --images runs/dog/samples --references my_dog

It reads pictures and, where there is one, the manifest.jsonl that says which prompt each was made from, so anybody's
pictures can be scored. It prints a table and writes scores.json: the numbers of every picture, and how to repeat them.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import shlex
import sys
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from singlora_diffusion.data.images import check, open_picture
from singlora_diffusion.errors import UserError
from singlora_diffusion.sampling.manifest import read_manifest

from .encoder_files import Role
from .encoders import Encoder, Vectors, encoder, torch_device
from .metrics import METRICS, Metric, mean_over_prompts, real_to_real
from .vector_store import VectorStore, picture_key, text_key

MetricName = Literal["clip_i", "dino", "clip_t", "clip_t_token"]


@dataclass(frozen=True)
class ScoreSettings:
    """Score pictures of a subject: likeness to real ones (CLIP-I, DINO) and agreement with the prompts (CLIP-T)."""

    images: Path
    """Folder of the pictures to score. With a manifest.jsonl in it, the pictures that it lists."""
    references: Path | None = None
    """Folder of real pictures of the subject. Without it only agreement with the prompts is scored."""
    protocol: Literal["dreambooth-v1", "toyworld", "custom"] | None = None
    """Encoders and preprocessing. None: toyworld for pictures that toyworld made, else dreambooth-v1."""
    metrics: tuple[MetricName, ...] = ()
    """Which scores. Empty: all that the folders allow."""
    reference_mode: Literal["train", "heldout", "all"] = "train"
    """What the references were to the model: its training pictures (scores are biased up), held out, or both."""
    clip: str | None = None
    """The CLIP encoder: a folder, a safetensors file or a hub name. None: the protocol's own."""
    dino: str | None = None
    """The DINO encoder: a folder, a safetensors file or a hub name. None: the protocol's own."""
    prompt: str | None = None
    """The one prompt, identifier left out, that all pictures were made from. For folders without a manifest."""
    prompts_from: Path | None = None
    """A manifest that lies elsewhere. None: manifest.jsonl in the folder of the pictures."""
    output: Path | None = None
    """Where the result goes. None: scores.json in the folder of the pictures."""
    cache_dir: Path | None = None
    """Where vectors are kept from run to run. None: .features beside the result."""
    batch_size: int = 32
    """Pictures per forward pass. Changes no score."""
    device: str = "auto"
    """cpu, cuda, ... auto: cuda where there is one."""


@dataclass(frozen=True)
class _Generated:
    """The pictures to score and what is known of each."""

    paths: list[Path]
    about: list[dict[str, Any]]  # a line of the manifest each, {} without a manifest
    manifest: Path | None
    left_out: dict[str, str]  # file -> why


@dataclass(frozen=True)
class _Embedded:
    """One row per picture."""

    keys: list[str]  # sha256 of the pixels
    blank: list[bool]  # black, or of one colour: what a safety filter or a diverged model leaves
    vectors: dict[Role, Vectors]


def score(settings: ScoreSettings) -> dict[str, Any]:
    """Embeds every picture once, applies the metrics, writes the result and returns it.

    Returns:
        What scores.json holds: "metrics" (mean over prompts, sd over pictures, n, real-to-real), "pictures" (one row
        each), protocol, encoders with their hashes, versions and settings. Scores are raw cosines.

    Raises:
        UserError: folders, pictures, manifest or encoders that cannot be used. No result is written then.
    """
    output = _writable(settings.output or settings.images / "scores.json")
    generated = _generated(settings)
    references = _references(settings)
    chosen, skipped = _choose(settings, generated)
    protocol, why = _protocol(settings, generated)

    roles: list[Role] = sorted({metric.encoder for metric in chosen.values()})  # no encoder that no metric needs
    sources = {"clip": settings.clip, "dino": settings.dino}
    options: dict[str, Any] = {"device": settings.device, "batch_size": settings.batch_size}
    encoders = {role: encoder(protocol, role, sources[role], **options) for role in roles}
    cache = settings.cache_dir or output.parent / ".features"
    stores = {role: VectorStore(cache, encoders[role].fingerprint) for role in roles}
    try:
        embedded = _embed([*generated.paths, *references], encoders, stores, settings.batch_size)
        counterparts = {
            name: embedded.vectors[metric.encoder][len(generated.paths) :]
            if metric.against == "references"
            else _embed_texts([row[metric.against] for row in generated.about], encoders["clip"], stores["clip"])
            for name, metric in chosen.items()
        }
    finally:  # an interrupted run continues where it was
        _keep(stores.values())

    count = len(generated.paths)
    prompts = [tuple(row.get(name) for name in ("prompt_index", "prompt")) for row in generated.about]
    reference_keys = embedded.keys[count:]
    rows = [
        {
            "file": path.name,
            **{
                name: about[name]
                for name in ("prompt", "prompt_without_token", "prompt_index", "seed")
                if name in about
            },
            "sha256": key,
            "blank": blank,
            "copy": key in reference_keys,
        }
        for path, about, key, blank in zip(
            generated.paths, generated.about, embedded.keys[:count], embedded.blank[:count], strict=True
        )
    ]
    summary: dict[str, dict[str, Any]] = {}
    for name, metric in chosen.items():
        vectors = embedded.vectors[metric.encoder]
        values = metric.function(vectors[:count], counterparts[name])
        for row, value in zip(rows, values, strict=True):
            row[name] = float(value)
        summary[name] = {
            **_summary(values, prompts),
            "real_to_real": real_to_real(vectors[count:]) if metric.against == "references" else None,
            "higher_is_better": metric.higher_is_better,
            "about": metric.about,
        }
    result = {
        "protocol": protocol,
        "protocol_because": why,
        "reference_mode": settings.reference_mode if references else None,
        "metrics": summary,
        "skipped": skipped,
        "count": count,
        "blank": sum(embedded.blank[:count]),
        "copies": sum(key in reference_keys for key in embedded.keys[:count]),
        "left_out": generated.left_out,
        "pictures": rows,
        "references": [
            {"file": path.name, "sha256": key} for path, key in zip(references, reference_keys, strict=True)
        ],
        "encoders": {
            role: {**made.about, "fingerprint": made.fingerprint, "source": made.source}
            for role, made in encoders.items()
        },
        "dtype": "float32",
        "device": torch_device(settings.device) if "torch" in sys.modules else "none, all vectors were in the cache",
        "versions": _versions(),
        "settings": {name: _plain(value) for name, value in asdict(settings).items()},
        "command": _command(settings),
        "output": str(output),
    }
    _write(output, result)
    return result


def show(result: dict[str, Any]) -> None:
    """Prints a result as a table, what to know about it, and the next command."""
    console = Console()
    table = Table()
    for heading in ("score", "mean", "sd", "n", "real to real", ""):
        table.add_column(heading, justify="left" if heading in ("score", "") else "right")
    for name, row in result["metrics"].items():
        numbers = [_rounded(row["mean"]), _rounded(row["sd"]), str(row["n"]), _rounded(row["real_to_real"])]
        table.add_row(name, *numbers, row["about"])
    prompts = max(row["prompts"] for row in result["metrics"].values())

    def say(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    say(f"{result['settings']['images']}: {_count(result['count'], 'picture')} of {_count(prompts, 'prompt')}")
    console.print(table)
    say(f"protocol {result['protocol']}: {result['protocol_because']}")
    for role, made in result["encoders"].items():
        picture = made["preprocessing"]
        way = f"{picture['interpolation']} to {picture['resize']}, centre {picture['crop']} x {picture['crop']} pixels"
        say(f"  {role}: {made['architecture']}, {way}; {made['source']}")
    if result["references"]:
        place, number = result["settings"]["references"], _count(len(result["references"]), "picture")
        say(f"references: {place}, {number}, mode {result['reference_mode']}")
    for name, reason in result["skipped"].items():
        say(f"no {name}: {reason}")
    for count, what in (
        (result["blank"], "black or of one colour, and counted like the others"),
        (result["copies"], "pixel for pixel equal to a reference"),
    ):
        if count:
            say(f"{_count(count, 'picture')} of {result['count']} {what}")
    if result["left_out"]:
        say("left out: " + ", ".join(f"{name} ({reason})" for name, reason in result["left_out"].items()))
    say(f"written: {result['output']}")
    say(f"next: {_next(result)}")


def run(settings: ScoreSettings) -> None:
    """Scores and prints: the verb as the command line knows it."""
    show(score(settings))


def main(argv: Sequence[str] | None = None) -> int:
    """The program: flags to settings, exit code 2 with one line for what the user can mend."""
    import tyro

    settings = tyro.cli(ScoreSettings, args=argv, prog="python -m eval.score", use_underscores=True)
    try:
        run(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


# --- what there is to score ------------------------------------------------------------------------------------------


def _generated(settings: ScoreSettings) -> _Generated:
    report = check(settings.images, decode=False)
    left_out = dict(report.skipped)
    manifest = settings.prompts_from or report.folder / "manifest.jsonl"
    if settings.prompts_from is None and not manifest.is_file():
        about = {} if settings.prompt is None else {"prompt_without_token": settings.prompt}
        return _Generated(list(report.pictures), [about] * len(report.pictures), None, left_out)
    if settings.prompt is not None:
        raise UserError(f"{manifest}: says the prompts already; leave out --prompt")

    left_out.pop(manifest.name, None)
    lines = read_manifest(manifest)
    present = {path.name: path for path in report.pictures}
    if missing := [name for name in lines if name not in present]:
        raise UserError(
            f"{manifest}: lists {len(missing)} pictures that are not in {report.folder}, such as {missing[0]}; "
            f"generate again, the missing ones are made anew"
        )
    left_out.update({name: "not in the manifest" for name in present if name not in lines})
    return _Generated([present[name] for name in lines], list(lines.values()), manifest, left_out)


def _references(settings: ScoreSettings) -> list[Path]:
    if settings.references is None:
        return []
    report = check(settings.references, decode=False)
    if report.folder.resolve() == settings.images.expanduser().resolve():
        raise UserError(
            f"{report.folder}: is named both as images and as references; a picture is no reference of itself"
        )
    return list(report.pictures)


def _choose(settings: ScoreSettings, generated: _Generated) -> tuple[dict[str, Metric], dict[str, str]]:
    """The metrics to compute, and why the others cannot be."""

    def obstacle(metric: Metric) -> str | None:
        if metric.against == "references":
            return None if settings.references is not None else "needs real pictures of the subject (--references)"
        if all(metric.against in row for row in generated.about):
            return None
        if settings.prompt is not None:
            return "--prompt is taken to have no identifier"
        where = f"{generated.manifest} lacks {metric.against}" if generated.manifest else "there is no manifest.jsonl"
        return f"the prompts are not known: {where}; --prompt names one for all pictures"

    chosen: dict[str, Metric] = {}
    skipped: dict[str, str] = {}
    for name in settings.metrics or METRICS:
        reason = obstacle(METRICS[name])
        if reason is None:
            chosen[name] = METRICS[name]
        elif settings.metrics:
            raise UserError(f"{name} cannot be computed: {reason}")
        else:
            skipped[name] = reason
    if not chosen:
        raise UserError(f"{settings.images}: nothing can be scored; name real pictures with --references")
    return chosen, skipped


def _protocol(settings: ScoreSettings, generated: _Generated) -> tuple[str, str]:
    """Its name, and why it was taken."""
    if settings.protocol is not None:
        return settings.protocol, "as asked for"
    bases = {str(row.get("base_model")) for row in generated.about}
    if generated.manifest is not None and bases == {"toyworld"}:
        return "toyworld", "the pictures were made by toyworld"
    return "dreambooth-v1", "the default"


# --- vectors ---------------------------------------------------------------------------------------------------------


def _embed(
    paths: list[Path], encoders: dict[Role, Encoder], stores: dict[Role, VectorStore], batch_size: int
) -> _Embedded:
    """Each picture is read once for all encoders, one batch ahead of them."""
    keys: list[str] = []
    blank: list[bool] = []
    vectors: dict[Role, list[Vectors]] = {role: [] for role in encoders}
    columns = (TextColumn("embedding pictures"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    screen = Console(stderr=True)
    bar = Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal)
    with bar, ThreadPoolExecutor(os.cpu_count()) as pool:
        task = bar.add_task("", total=len(paths))
        ahead = [pool.submit(_read, path) for path in paths[:batch_size]]
        for start in range(0, len(paths), batch_size):
            batch = [future.result() for future in ahead]
            ahead = [pool.submit(_read, path) for path in paths[start + batch_size : start + 2 * batch_size]]
            pictures, batch_keys, batch_blank = zip(*batch, strict=True)
            keys += batch_keys
            blank += batch_blank
            for role, made in encoders.items():
                vectors[role].append(stores[role].vectors(batch_keys, pictures, made.images))
            bar.advance(task, len(batch))
    return _Embedded(keys, blank, {role: np.concatenate(parts) for role, parts in vectors.items()})


def _read(path: Path) -> tuple[Image.Image, str, bool]:
    picture = open_picture(path)
    low, high = np.array(picture.getextrema()).T  # of each channel
    blank = bool((low == high).all() or (high <= 2).all())
    return picture, picture_key(picture), blank


def _embed_texts(texts: list[str], clip: Encoder, store: VectorStore) -> Vectors:
    assert clip.texts is not None
    return store.vectors([text_key(text) for text in texts], texts, clip.texts)


def _keep(stores: Iterable[VectorStore]) -> None:
    for store in stores:
        try:
            store.save()
        except OSError as error:
            print(f"vectors are not kept for next time: {error}", file=sys.stderr)


def _summary(values: NDArray[np.float64], prompts: list[Any]) -> dict[str, Any]:
    return {
        "mean": mean_over_prompts(values, prompts),
        "sd": float(values.std(ddof=1)) if len(values) > 1 else None,
        "n": len(values),
        "prompts": len(set(prompts)),
    }


# --- the result ------------------------------------------------------------------------------------------------------


def _writable(output: Path) -> Path:
    """Found out before the work, not after it."""
    if output.suffix != ".json" or output.is_dir():
        raise UserError(f"{output}: is no name for the result; name a .json file with --output")
    nearest = next((parent for parent in output.absolute().parents if parent.exists()), Path("/"))
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"{output}: cannot be written there; name another place with --output")
    return output


def _write(output: Path, result: dict[str, Any]) -> None:
    part = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", encoding="utf-8")
        part.replace(output)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); name another place with --output") from error
    finally:
        part.unlink(missing_ok=True)


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("singlora-diffusion", "torch", "open_clip_torch", "timm", "transformers", "pillow", "numpy"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions


def _command(settings: ScoreSettings) -> str:
    """What to type to get the same result."""
    words = ["python", "-m", "eval.score"]
    for field in fields(settings):
        value = getattr(settings, field.name)
        if value != field.default:
            words += [f"--{field.name}", *(value if isinstance(value, tuple) else (str(value),))]
    return shlex.join(words)


def _next(result: dict[str, Any]) -> str:
    """The page that shows the pictures with their scores; it looks for the result beside the pictures."""
    images, output = result["settings"]["images"], Path(result["output"])
    if output.parent != Path(images):
        return shlex.join(["python", "-m", "json.tool", str(output)])
    words = ["python", "-m", "eval.report", "--runs", images]
    if result["references"]:
        words += ["--references", result["settings"]["references"]]
    return shlex.join([*words, "--output", str(output.with_name("report.html"))])


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _rounded(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    sys.exit(main())
