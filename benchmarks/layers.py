"""Each kind of convolution and linear layer of a UNet by itself: stock, in each of the CPU forms, and with an adapter.

    OMP_NUM_THREADS=1 python -m benchmarks.layers --model sd15 --resolution 256 --dtype float32 --clock cpu

Forward and backward to the input, weights frozen, milliseconds per layer. `products`: convolutions as products of
patches. `wide`: bfloat16 computed in float32. `all`: both. `adapted`: the stock layer with an adapter of rank 15, the
gradient of A included. The numbers in cpu_layers.py come from here. One kind of layer is timed again and again, so its
weight may lie in a cache where that of a whole network would not: the step's own benchmark has the last word.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from . import timing
from .networks import MODELS, Model, Precision

if TYPE_CHECKING:
    import torch
    from torch import nn


FORMS: dict[str, dict[str, Any]] = {  # the fields of cpu_layers.Forms, from one number or row on
    "stock": {},
    "products": {"patches": 1, "pointwise": True},
    "wide": {"wide": 1},
    "all": {"patches": 1, "pointwise": True, "wide": 1},
    "adapted": {},
}


@dataclass(frozen=True)
class Settings:
    """Time the layers of a UNet one by one."""

    model: Model = "sd15"
    """Whose shapes."""
    resolution: int = 256
    """Pixels per side."""
    batch: int = 1
    """Images per step."""
    dtype: Precision = "float32"
    """Of the frozen layers."""
    rounds: int = 3
    """Times each is measured."""
    clock: Literal["wall", "cpu"] = "wall"
    """As of benchmarks.train_step."""
    output: Path | None = None
    """A JSON file for the figures."""


class Kind(NamedTuple):
    """What decides how long a layer takes."""

    ins: int
    outs: int
    kernel: int  # 0: a linear layer
    stride: int
    shape: tuple[int, ...]  # of the input

    def __str__(self) -> str:
        name = f"conv {self.kernel}x{self.kernel}{'' if self.stride == 1 else ' halving'}" if self.kernel else "linear"
        rows = "x".join(str(size) for size in (self.shape[2:] if self.kernel else self.shape[1:-1]))
        return f"{name} {self.ins} to {self.outs} on {rows or '1'}"

    def layer(self, dtype: torch.dtype) -> nn.Module:
        from torch import nn

        convolution = partial(nn.Conv2d, kernel_size=self.kernel, stride=self.stride, padding=self.kernel // 2)
        layer = (convolution if self.kernel else nn.Linear)(self.ins, self.outs)
        return layer.to(dtype).requires_grad_(False)


def kinds(settings: Settings) -> Counter[Kind]:
    """The kinds of layers of a UNet and how many there are of each, found by a pass without data."""
    import torch
    from torch import nn

    found: Counter[Kind] = Counter()

    def note(module: Any, inputs: tuple[Any, ...], output: Any) -> None:
        shape = tuple(inputs[0].shape)
        if isinstance(module, nn.Conv2d):
            found[Kind(module.in_channels, module.out_channels, module.kernel_size[0], module.stride[0], shape)] += 1
        else:
            found[Kind(module.in_features, module.out_features, 0, 1, shape)] += 1

    side, batch = settings.resolution // 8, settings.batch
    with torch.device("meta"):
        unet: Any = MODELS[settings.model]()
        for module in unet.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                module.register_forward_hook(note)
        extra = dict(text_embeds=torch.empty(batch, 1280), time_ids=torch.empty(batch, 6))
        unet(
            torch.empty(batch, 4, side, side),
            torch.empty(batch),
            torch.empty(batch, 77, unet.config.cross_attention_dim),
            added_cond_kwargs=extra,
        )
    return found


@contextmanager
def both_ways(kind: Kind, form: str, dtype: torch.dtype) -> Iterator[Callable[[], None]]:
    """Forward and backward of one layer in a form."""
    import torch
    from torch import nn

    from singlora_diffusion.adapters.singlora import SingLoRA
    from singlora_diffusion.models import cpu_layers

    owner: Any = nn.Sequential(kind.layer(dtype))
    cpu_layers.prepare(owner, cpu_layers.Forms(**FORMS[form]))
    call: Any = owner[0]
    wanted = [torch.randn(kind.shape).to(dtype).requires_grad_()]
    if form == "adapted":
        delta = SingLoRA(owner[0], 15, 15.0)
        call, wanted = partial(delta, owner[0]), [*wanted, delta.A]
    weights = torch.ones_like(call(wanted[0]))

    def run() -> None:
        torch.autograd.grad(call(wanted[0]), wanted, weights)

    yield run


def differing(kind: Kind, dtype: torch.dtype) -> list[str]:
    """The forms that change anything about a layer of this kind and dtype."""
    narrow = str(dtype) == "torch.bfloat16"
    if kind.kernel:
        return ["stock", "products", "wide", "all"] if narrow else ["stock", "products"]
    return ["stock", "wide", "adapted"] if narrow else ["stock", "adapted"]


def main() -> int:
    import torch
    import tyro

    from singlora_diffusion.models import cpu_layers

    settings = tyro.cli(Settings, description=__doc__)
    dtype, clock = getattr(torch, settings.dtype), timing.CLOCKS[settings.clock]
    figures: dict[str, dict[str, Any]] = {}
    for kind, count in kinds(settings).items():
        jobs: dict[str, timing.Job] = {form: partial(both_ways, kind, form, dtype) for form in differing(kind, dtype)}
        seconds = timing.rounds(jobs, settings.rounds, clock=clock)
        figures[str(kind)] = {"count": count, **{form: timing.spread(seconds[form]).median for form in jobs}}
    where = f"{settings.model}, {settings.resolution} px, batch {settings.batch}, {settings.dtype}"
    here = f"{timing.machine()['threads']} threads, {cpu_layers.cpu_kind()}"
    timing.show(
        f"layers, forward and backward, ms (ratio to stock): {where}, {here}",
        ("layer", "count", *FORMS),
        [
            (
                name,
                str(row["count"]),
                *(f"{1000 * row[form]:.2f} ({row[form] / row['stock']:.2f})" if form in row else "-" for form in FORMS),
            )
            for name, row in sorted(figures.items(), key=lambda item: -item[1]["count"] * item[1]["stock"])
        ],
    )
    for form in FORMS:
        print(f"{form}: {sum(row['count'] * row.get(form, row['stock']) for row in figures.values()):.3f} s together")
    if settings.output is not None:
        command = ["python", "-m", "benchmarks.layers", *sys.argv[1:]]
        timing.write(settings.output, command, cpu=cpu_layers.cpu_kind(), seconds=figures)
    return 0


if __name__ == "__main__":
    sys.exit(main())
