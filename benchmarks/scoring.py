"""What scoring costs beyond the encoders' own work: images a second, the first time and when the vectors are stored.

    OMP_NUM_THREADS=1 taskset -c 0 python -m benchmarks.scoring --clock cpu

The yardstick is `bare`: the libraries' forward passes alone, encoders in memory, images preprocessed, each text once
and tokenised. Scoring can undercut it, for dreambooth-v1 leaves out the texts' padding, which the libraries compute.
`bare + decode` opens and preprocesses the images as well. `script` also loads the encoders by the libraries' own
calls, which is all that a plain script does. `scored` is `eval.score.score` on an empty store, `scored again` on a full
one. `full` encoders have the architectures and files of protocol dreambooth-v1 with random weights: their scores mean
nothing, their cost is real.
"""

from __future__ import annotations

import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from . import timing

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from PIL import Image
    from torch import Tensor

    from eval.preprocessing import Preprocessing
    from eval.score import ScoreSettings

SEEDS = 4  # images per prompt, as in DreamBooth's evaluation
REFERENCES = 5
CLIP, DINO = "ViT-B-32-quickgelu", "vit_small_patch16_224.dino"


@dataclass(frozen=True)
class Settings:
    """Time the scoring of a folder against the encoders' forward passes."""

    encoders: Literal["full", "toyworld"] = "full"
    """full: CLIP ViT-B/32 and DINO ViT-S/16. toyworld: the small ones that come with the package."""
    images: int = 64
    """To score, besides 5 references. 4 share a prompt."""
    rounds: int = 3
    """Times each variant is measured."""
    clock: Literal["wall", "cpu"] = "wall"
    """As of benchmarks.train_step."""
    output: Path | None = None
    """A JSON file for the figures."""


@dataclass(frozen=True)
class Loaded:
    """Both encoders in memory, as their libraries give them."""

    clip_images: Callable[[Tensor], Tensor]  # (N, 3, H, W) -> (N, D)
    clip_texts: Callable[[Tensor], Tensor]  # (N, L) token ids -> (N, D)
    tokenize: Callable[[list[str]], Tensor]
    dino_images: Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Encoders:
    """A row of `ENCODERS`."""

    protocol: Literal["dreambooth-v1", "toyworld"]
    side: int  # pixels of the images that it is for
    make: Callable[[Path], dict[str, Path]]  # puts the files into a folder where they are not at hand; says where
    load: Callable[[dict[str, Path]], Loaded]


def make_full(folder: Path) -> dict[str, Path]:
    """Files as the hub has them, of random weights: 690 MB."""
    import open_clip
    import timm
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    logging.getLogger().setLevel(logging.ERROR)  # open_clip warns of random weights, which are wanted here
    files = {"clip": folder / "open_clip_model.safetensors", "dino": folder / "model.safetensors"}
    save_file({k: v.contiguous() for k, v in open_clip.create_model(CLIP).state_dict().items()}, files["clip"])
    save_file(timm.create_model(DINO, pretrained=False, num_classes=0).state_dict(), files["dino"])
    return files


def load_full(files: dict[str, Path]) -> Loaded:
    import open_clip
    import timm
    from safetensors.torch import load_file

    clip = open_clip.create_model(CLIP, pretrained=str(files["clip"])).eval()
    dino = timm.create_model(DINO, pretrained=False, num_classes=0).eval()
    dino.load_state_dict(load_file(files["dino"]))
    return Loaded(clip.encode_image, clip.encode_text, open_clip.get_tokenizer(CLIP), dino)


def find_toyworld(folder: Path) -> dict[str, Path]:
    from singlora_diffusion.models.hub import WEIGHTS

    return {role: WEIGHTS / role for role in ("clip", "dino")}


def load_toyworld(folders: dict[str, Path]) -> Loaded:
    import open_clip
    import timm

    name = f"local-dir:{folders['clip']}"
    clip = open_clip.create_model(name).eval()
    dino = timm.create_model(f"local-dir:{folders['dino']}", pretrained=True, num_classes=0).eval()
    return Loaded(clip.encode_image, clip.encode_text, open_clip.get_tokenizer(name), dino)


ENCODERS = {
    "full": Encoders("dreambooth-v1", 512, make_full, load_full),
    "toyworld": Encoders("toyworld", 64, find_toyworld, load_toyworld),
}


@dataclass(frozen=True)
class Bench:
    """What all variants share."""

    encoders: Encoders
    files: dict[str, Path]
    settings: ScoreSettings
    paths: list[Path]  # the images, then the references
    texts: list[str]  # each once
    preprocess: dict[str, Preprocessing]


def prepare(settings: Settings, folder: Path) -> Bench:
    """Write encoders, images and references, and the manifest that gives each image its prompts."""
    from eval.encoders import encoder
    from eval.score import EncoderSources, ScoreSettings
    from singlora_diffusion.data import prompts

    encoders = ENCODERS[settings.encoders]
    files = encoders.make(folder)
    templates = prompts.load("object")
    images, references = folder / "samples", folder / "references"
    lines: list[dict[str, str]] = []
    for number in range(settings.images):
        prompt = templates[number // SEEDS % len(templates)]
        line = {"file": f"{number:04d}.png", "prompt": prompt.text("sks", "dog")}
        lines.append({**line, "prompt_without_token": prompt.without_token("dog")})
    paths = [images / line["file"] for line in lines] + [references / f"{number}.png" for number in range(REFERENCES)]
    for number, path in enumerate(paths):
        path.parent.mkdir(exist_ok=True)
        painted(number, encoders.side).save(path)
    (images / "manifest.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return Bench(
        encoders,
        files,
        ScoreSettings(
            images,
            references,
            encoders.protocol,
            encoders=EncoderSources(**{role: str(path) for role, path in files.items()}),
            cache_dir=folder / "stored",
        ),
        paths,
        list(dict.fromkeys(line[kind] for kind in ("prompt_without_token", "prompt") for line in lines)),
        {role: encoder(encoders.protocol, role, str(files[role])).preprocessing for role in ("clip", "dino")},
    )


def painted(seed: int, side: int) -> Image.Image:
    """Smooth random colours: a PNG of 0.17 MB at 512 pixels, for a photograph has more detail and a drawing less."""
    import numpy as np
    from PIL import Image

    coarse = np.random.default_rng(seed).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC)


Inputs = dict[str, Any]  # clip, dino: (N, 3, H, W) per batch; texts: (N, L) per batch


def decode(bench: Bench, loaded: Loaded) -> Inputs:
    """Every image as each encoder wants it, and the tokens, in batches of the size that scoring has."""
    import numpy as np
    import torch
    from PIL import Image

    size = bench.settings.batch_size
    inputs: Inputs = {"clip": [], "dino": [], "texts": [loaded.tokenize(texts) for texts in batches(bench.texts, size)]}
    for paths in batches(bench.paths, size):
        opened = [Image.open(path).convert("RGB") for path in paths]
        for role, preprocess in bench.preprocess.items():
            inputs[role].append(torch.from_numpy(np.stack([preprocess(one) for one in opened])))
    return inputs


def forward(loaded: Loaded, inputs: Inputs) -> dict[str, NDArray[np.float32]]:
    """Vectors as the encoders give them, not yet of unit length."""
    import torch

    encode = {"clip": loaded.clip_images, "dino": loaded.dino_images, "texts": loaded.clip_texts}
    with torch.inference_mode():
        return {kind: torch.cat([encode[kind](batch) for batch in inputs[kind]]).numpy() for kind in encode}


def batches(items: Sequence[Any], size: int) -> Iterator[Any]:
    for start in range(0, len(items), size):
        yield items[start : start + size]


@contextmanager
def bare(bench: Bench) -> Iterator[Callable[[], object]]:
    loaded = bench.encoders.load(bench.files)
    yield partial(forward, loaded, decode(bench, loaded))


@contextmanager
def bare_decoding(bench: Bench) -> Iterator[Callable[[], object]]:
    loaded = bench.encoders.load(bench.files)
    yield lambda: forward(loaded, decode(bench, loaded))


@contextmanager
def script(bench: Bench) -> Iterator[Callable[[], object]]:
    def whole() -> None:
        loaded = bench.encoders.load(bench.files)
        forward(loaded, decode(bench, loaded))

    yield whole


@contextmanager
def scored(bench: Bench, *, stored: bool) -> Iterator[Callable[[], object]]:
    """With every vector in the store, or none."""
    import shutil

    from eval.score import score

    cache = bench.settings.cache_dir
    assert cache is not None
    if not stored:
        shutil.rmtree(cache, ignore_errors=True)
    elif not cache.exists():
        score(bench.settings)
    yield partial(score, bench.settings)


def main() -> int:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    with tempfile.TemporaryDirectory() as folder:
        bench = prepare(settings, Path(folder))
        variants: dict[str, timing.Job] = {
            "bare": partial(bare, bench),
            "bare + decode": partial(bare_decoding, bench),
            "script": partial(script, bench),
            "scored": partial(scored, bench, stored=False),
            "scored again": partial(scored, bench, stored=True),
        }
        seconds = timing.rounds(variants, settings.rounds, clock=timing.CLOCKS[settings.clock])
    number = len(bench.paths)
    rates = {name: timing.spread([number / s for s in seconds[name]]) for name in variants}
    to_bare = {name: timing.ratios(seconds, name, "bare") for name in variants}
    again = timing.ratios(seconds, "scored again", "scored")
    where = f"{settings.encoders} encoders, {number} images of {bench.encoders.side} px, {len(bench.texts)} texts"
    timing.show(
        f"scoring: {where}",
        ("variant", f"{settings.clock} seconds", "images a second", "/ bare"),
        [(name, str(timing.spread(seconds[name])), str(rates[name]), str(to_bare[name])) for name in variants],
    )
    print(f"scored again / scored: {again}")
    if settings.output is not None:
        timing.write(
            settings.output,
            ["python", "-m", "benchmarks.scoring", *sys.argv[1:]],
            setting=where,
            clock=settings.clock,
            seconds=seconds,
            images_per_second=rates,
            ratio_to_bare=to_bare,
            again_to_scored=again,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
