"""What `benchmarks.gpu` runs, in order of importance: each stage is a command of this repository with its flags."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, NamedTuple

Part = Literal["tests", "step", "sampling", "pretraining"]
Device = Literal["cuda", "cpu"]


class Shape(NamedTuple):
    """Of one training step."""

    model: str
    resolution: int
    batch: int

    def __str__(self) -> str:
        return f"{self.model} {self.resolution} px batch {self.batch}"


SHAPES = (
    Shape("sd15", 512, 1),
    Shape("sdxl", 1024, 1),
    Shape("sd15", 512, 4),
    Shape("sd15", 1024, 1),
    Shape("sdxl", 512, 1),
    Shape("sd15", 1024, 4),
    Shape("sdxl", 512, 4),
    Shape("sdxl", 1024, 4),
)
TINY = Shape("tiny", 64, 1)

STEPS = ("floor", "singlora", "PEFT lora", "PEFT dora", "script", "singlora+dora")
"""Lines of benchmarks.train_step's table."""
COMPILED = STEPS[:-1]
MODES = ("compiled", "captured")

SAMPLED = (("sd15", 512), ("sdxl", 1024))
"""Model and resolution."""


class Stage(NamedTuple):
    """One process: `python -m module words`."""

    name: str
    part: Part
    module: str
    words: tuple[str, ...]
    expected: float  # seconds on a fast GPU, for the time that is left; it may take `PATIENCE` times as long
    keep: str = "$^"  # lines of its output that are kept, the last of each match; the last line is always
    group: str = ""  # stages that are set against one another
    output: Path | None = None  # a JSON file that it writes

    @property
    def file(self) -> str:
        """Its name as a file's."""
        return re.sub(r"[^\w.+-]+", "-", self.name)


PATIENCE = 4


def stages(folder: Path, device: Device, *, tiny: bool) -> list[Stage]:
    """All of them; their files go below `folder`."""
    return list(_tiny(folder, device) if tiny else _full(folder, device))


def _full(folder: Path, device: Device) -> Iterator[Stage]:
    yield _tests("-q", "-rf", "--tb=short")
    for shape in SHAPES:
        for variant in STEPS:
            yield _step(folder, shape, "eager", variant, 12, "--rounds", "10")
    for model, resolution in SAMPLED:
        yield _sampling(folder, model, resolution, 30, "--rounds", "10")
    for number, shape in enumerate(SHAPES):
        for mode in MODES:
            for variant in COMPILED:
                yield _step(folder, shape, mode, variant, 90 if shape.model == "sd15" else 180, "--rounds", "10")
        if number == 0:  # the shape that matters most comes before it
            yield _pretraining(folder, device, 900, "--denoiser_steps", "20000", "--batch", "64")


def _tiny(folder: Path, device: Device) -> Iterator[Stage]:
    """The same commands at a size for a CPU; torch.compile only traces."""
    small = ("--rounds", "1", "--dtype", "float32")
    yield _tests("-q", "--collect-only")
    for variant in STEPS:
        yield _step(folder, TINY, "eager", variant, 5, *small)
    for mode in MODES:
        yield _step(folder, TINY, mode, "singlora", 15, *small, "--backend", "eager")
    yield _sampling(folder, TINY.model, TINY.resolution, 5, *small)
    sizes = ("--images", "40", "--subjects", "4", "--batch", "2", "--autoencoder_steps", "1", "--denoiser_steps", "1")
    yield _pretraining(folder, device, 10, *sizes, "--stages", "images", "autoencoder", "denoiser")


def _tests(*words: str) -> Stage:
    return Stage("tests", "tests", "pytest", (*words, "-m", "cuda", "tests/test_cuda.py"), 120, r"^(FAILED|ERROR) \S+")


def _step(folder: Path, shape: Shape, mode: str, variant: str, expected: float, *words: str) -> Stage:
    group = f"step {shape} {mode}"
    size = ("--model", shape.model, "--resolution", str(shape.resolution), "--batch", str(shape.batch))
    flags = (*size, "--mode", mode, "--only", variant, *words)
    stage = _measured(folder, f"{group} {variant}", "step", "benchmarks.train_step", flags, expected)
    return stage._replace(group=group)


def _sampling(folder: Path, model: str, resolution: int, expected: float, *words: str) -> Stage:
    flags = ("--model", model, "--resolution", str(resolution), *words)
    return _measured(folder, f"sampling {model} {resolution} px", "sampling", "benchmarks.sampling", flags, expected)


def _measured(folder: Path, name: str, part: Part, module: str, flags: tuple[str, ...], expected: float) -> Stage:
    bare = Stage(name, part, module, flags, expected)
    output = folder / "figures" / f"{bare.file}.json"
    return bare._replace(words=(*flags, "--output", str(output)), output=output)


def _pretraining(folder: Path, device: Device, expected: float, *words: str) -> Stage:
    work = folder / "toyworld"
    flags = ("--work_dir", str(work), "--output_dir", str(work / "weights"), "--device", device, *words)
    keep = r"^(autoencoder: .* dB|denoiser: step|flow: step)"
    return Stage("pretraining toyworld", "pretraining", "singlora_diffusion.toyworld.pretrain", flags, expected, keep)
