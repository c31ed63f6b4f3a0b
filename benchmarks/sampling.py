"""What an adapter costs while images are made: base, attached, merged, two adapters, and switching between two.

    python -m benchmarks.sampling --model sd15 --resolution 256 --dtype bfloat16

One call is one UNet forward for a prompt and its negative, as guidance asks for: an image is as many of them as it has
steps, whatever the sampler. `base` is as this package loads it, `stock base` as diffusers does. `two added` is two
adapters at once, as one whose factors are set side by side: the rank of their exact sum is the sum of their ranks.
Switching puts another adapter's tensors in the place of those attached.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Side, parse

from . import timing
from .networks import TARGETS, Bench, Model, Precision, prepare

BUDGET = 8
"""The rank of LoRA whose number of parameters the adapters have."""


@dataclass(frozen=True)
class Settings:
    """Time the UNet's forward pass with and without an adapter."""

    model: Model = "sd15"
    """Whose shapes."""
    resolution: Side = 256
    """Pixels per side."""
    dtype: Precision = "bfloat16"
    """Of the frozen networks."""
    rounds: Count = 3
    """Times each variant is measured."""
    clock: Literal["wall", "cpu"] = "wall"
    """As of benchmarks.train_step."""
    output: Path | None = None
    """A JSON file for the figures."""


def call(bench: Bench, unet: Any) -> None:
    """One forward pass."""
    import torch

    with torch.inference_mode():
        t = torch.tensor([500], device=bench.device)
        unet(bench.latents.to(bench.dtype), t, bench.text, **bench.extra)


@contextmanager
def with_adapter(bench: Bench, *, times: int = 1, merged: bool = False, **options: Any) -> Iterator[Callable[[], None]]:
    from singlora_diffusion import adapters
    from singlora_diffusion.adapters.config import AdapterConfig

    config = AdapterConfig(rank=times * bench.rank("singlora", BUDGET), targets=TARGETS, **options)
    adapter = adapters.attach({"unet": bench.prepared}, config)
    adapter.set_step(1)
    if merged:
        adapter.merge()
    yield partial(call, bench, bench.prepared)
    adapter.detach()


@contextmanager
def base(bench: Bench, unet: Any) -> Iterator[Callable[[], None]]:
    yield partial(call, bench, unet)


@contextmanager
def switching(bench: Bench) -> Iterator[Callable[[], None]]:
    """From one adapter of the budget's size to another, both in memory."""
    from singlora_diffusion import adapters
    from singlora_diffusion.adapters.config import AdapterConfig

    config = AdapterConfig(rank=bench.rank("singlora", BUDGET), targets=TARGETS)
    adapter = adapters.attach({"unet": bench.prepared}, config)
    other = {name: tensor.clone() for name, tensor in adapter.state_dict().items()}
    yield partial(adapter.load_state_dict, other)
    adapter.detach()


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    try:
        settings = parse(Settings, words, "python -m benchmarks.sampling", __doc__ or "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    bench = prepare(settings.model, settings.resolution, 2, settings.dtype)
    clock = timing.CLOCKS[settings.clock]
    variants: dict[str, timing.Job] = {
        "base": partial(base, bench, bench.prepared),
        "stock base": partial(base, bench, bench.stock),
        "attached": partial(with_adapter, bench),
        "attached, dora": partial(with_adapter, bench, dora=True),
        "merged": partial(with_adapter, bench, merged=True),
        "two added": partial(with_adapter, bench, times=2),
    }
    seconds = timing.rounds(variants, settings.rounds, clock=clock)
    switch = timing.rounds({"switch": partial(switching, bench)}, settings.rounds, repeats=5, clock=clock)["switch"]
    to_base = {name: timing.ratios(seconds, name, "base") for name in variants}
    timing.show(
        f"forward pass: {settings.model}, {settings.resolution} px, batch 2, {settings.dtype}",
        ("variant", f"{settings.clock} seconds", "/ base"),
        [(name, str(timing.spread(seconds[name])), str(to_base[name])) for name in variants],
    )
    print(f"switching adapters: {timing.spread([1000 * s for s in switch])} ms")
    if settings.output is not None:
        command = ["python", "-m", "benchmarks.sampling", *words]
        timing.write(settings.output, command, seconds=seconds, ratio_to_base=to_base, switching_seconds=switch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
