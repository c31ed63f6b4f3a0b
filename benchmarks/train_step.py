"""One training step of every method beside what the frozen base itself costs, at one budget, in one run.

    python -m benchmarks.train_step --model sd15 --resolution 256 --dtype bfloat16

Networks are built from their configs with random weights, latents and text are random: cost does not depend on them.
Every variant does a whole step: noise, forward, loss, backward, clipping, AdamW.

`floor` is the frozen base: it trains one vector, added to the output of the first layer that the others adapt, so its
backward pass goes exactly as far as theirs. Ours run on the base as this package loads it, which on a CPU is quicker
than as diffusers does; `floor, prepared` and `singlora, stock base` take the two effects apart. `PEFT ...` are attached
by diffusers' `add_adapter` to the stock base. `script` is the step as diffusers' train_dreambooth_lora.py performs it:
image and prompt encoded each time, PEFT's LoRA in the base's precision, the UNet under autocast, the loss read back.
For SDXL it is train_dreambooth_lora_sdxl.py's: the image is encoded each time, in float32, the prompt once.

On one core that other programs use too, `--clock cpu` with OMP_NUM_THREADS=1 leaves their share out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, Side, parse

from . import timing
from .networks import TARGETS, Bench, Model, Precision, prepare

if TYPE_CHECKING:
    import torch
    from torch import Tensor

LR = 1e-4


@dataclass(frozen=True)
class Settings:
    """Time a training step of each variant, interleaved."""

    model: Model = "sd15"
    """Whose shapes."""
    resolution: Side = 256
    """Pixels per side."""
    batch: Count = 1
    """Images per step."""
    dtype: Precision = "bfloat16"
    """Of the frozen networks."""
    rounds: Count = 3
    """Times each variant is measured; one more goes before, unmeasured."""
    budget: Count = 8
    """The rank of LoRA whose number of trained parameters the others get as near as they can."""
    variants: tuple[str, ...] = ()
    """Some of the table in this file; empty: all of them."""
    memory: bool = True
    """Measure peak memory too, each variant in a process of its own."""
    mode: Literal["eager", "compiled", "captured"] = "eager"
    """How the UNet runs with the adapter inside: torch.compile, or that with its passes captured in CUDA graphs."""
    backend: Literal["inductor", "aot_eager", "eager"] = "inductor"
    """What torch.compile makes of the traced UNet; all but inductor only try the tracing."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the process's own time, for one thread on a core that others use too."""
    output: Path | None = None
    """A JSON file for the figures."""
    only: str = ""
    """One variant in this process: some untimed steps, then the rounds; figures and peak memory as JSON at the end.
    It compiles once, where the interleaved rounds compile in each: the way to time --mode compiled and captured."""


Attached = Iterator[tuple[list[Any], list[Any]]]
"""While an adapter is attached: its parameters, and as the optimizer's groups."""


def predict(bench: Bench, unet: Any, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The UNet's answer and what it should have been."""
    import torch

    noise = torch.randn_like(latents)
    t = torch.randint(1000, (len(latents),), device=latents.device)
    level = (t / 1000)[:, None, None, None]
    noisy = ((1 - level).sqrt() * latents + level.sqrt() * noise).to(bench.dtype)
    return unet(noisy, t, text, **bench.extra).sample, noise


def finish(loss: Tensor, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """Backward, clip, step: the same for every variant."""
    import torch

    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def cached_step(bench: Bench, unet: Any, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """A step on latents and text that were encoded before."""
    answer, noise = predict(bench, unet, bench.latents, bench.text)
    finish((answer.float() - noise).square().mean(), parameters, optimizer)


def script_step(bench: Bench, unet: Any, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """A step as the script performs it."""
    import torch

    assert bench.encoders is not None
    vae, text_encoder = bench.encoders
    count, _, height, width = bench.latents.shape
    pixels = torch.rand(count, 3, 8 * height, 8 * width).to(bench.device, bench.dtype) * 2 - 1
    ids = torch.randint(1000, (count, 77), device=bench.device)
    with torch.no_grad():
        latents = vae.encode(pixels.to(vae.dtype)).latent_dist.sample() * vae.config.scaling_factor
        text = bench.text if text_encoder is None else text_encoder(ids)[0]
    mixed = bench.dtype != torch.float32
    with torch.autocast(bench.device.type, dtype=bench.dtype) if mixed else nullcontext():
        answer, noise = predict(bench, unet, latents, text)
    loss = torch.nn.functional.mse_loss(answer.float(), noise.float())
    finish(loss, parameters, optimizer)
    loss.item()


@contextmanager
def floor(bench: Bench, unet: Any, budget: int) -> Attached:
    """Trains one vector behind the first adapted layer."""
    import torch

    from singlora_diffusion.adapters.config import AdapterConfig
    from singlora_diffusion.adapters.targets import chosen
    from singlora_diffusion.models.network import bare

    layers = chosen({"unet": bare("unet", unet)}, AdapterConfig(targets=TARGETS))["unet"]
    first = next(iter(layers.values()))
    vector = torch.nn.Parameter(torch.zeros(first.out_features, device=bench.device))
    hook = first.register_forward_hook(lambda module, args, output: output + vector.to(output.dtype))
    yield [vector], [vector]
    hook.remove()


@contextmanager
def ours(bench: Bench, unet: Any, budget: int, method: str, row: str = "", **options: Any) -> Attached:
    """An adapter as users of this package attach it; `row` is its line in budget.rows if not the method's."""
    from singlora_diffusion import adapters
    from singlora_diffusion.adapters.config import AdapterConfig

    config = AdapterConfig(method=method, rank=bench.rank(row or method, budget), targets=TARGETS, **options)
    adapter = adapters.attach({"unet": unet}, config)
    adapter.set_step(1)
    yield adapter.parameters(), adapter.param_groups(LR)
    adapter.detach()


@contextmanager
def peft(bench: Bench, unet: Any, budget: int, method: str) -> Attached:
    """PEFT's through diffusers' `add_adapter`; LoRA+ is LoRA with a higher rate for the matrices B."""
    from peft import LoraConfig, OFTConfig

    size = bench.rank(method, budget)
    targets = list(TARGETS)
    config = LoraConfig(r=size, lora_alpha=size, target_modules=targets, use_dora=method == "dora")
    unet.add_adapter(OFTConfig(oft_block_size=size, target_modules=targets) if method == "oft" else config)
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    fast = [parameter for name, parameter in trained.items() if method == "lora+" and "lora_B" in name]
    slow = [parameter for parameter in trained.values() if not any(parameter is other for other in fast)]
    yield list(trained.values()), [{"params": slow}, {"params": fast, "lr": 16 * LR}] if fast else slow
    unet.unload_lora()


class Variant(NamedTuple):
    """A line of the table: what is attached to which base, and what a step is."""

    attach: Callable[[Bench, Any, int], AbstractContextManager[tuple[list[Any], list[Any]]]]
    base: Literal["stock", "prepared"] = "prepared"
    step: Callable[[Bench, Any, list[Any], Any], None] = cached_step


VARIANTS: dict[str, Variant] = {
    "floor": Variant(floor, "stock"),
    "floor, prepared": Variant(floor),
    "singlora": Variant(partial(ours, method="singlora")),
    "offset": Variant(partial(ours, method="singlora", row="offset", init="offset")),
    "balanced": Variant(partial(ours, method="singlora", row="balanced", signature="balanced")),
    "singlora+dora": Variant(partial(ours, method="singlora", row="singlora+dora", dora=True)),
    "singlora, stock base": Variant(partial(ours, method="singlora"), "stock"),
    "lora, prepared": Variant(partial(ours, method="lora")),
    "dora, prepared": Variant(partial(ours, method="dora")),
    "PEFT lora": Variant(partial(peft, method="lora"), "stock"),
    "PEFT lora+": Variant(partial(peft, method="lora+"), "stock"),
    "PEFT dora": Variant(partial(peft, method="dora"), "stock"),
    "PEFT oft": Variant(partial(peft, method="oft"), "stock"),
    "script": Variant(partial(peft, method="lora"), "stock", script_step),
}


def chosen(settings: Settings) -> list[str]:
    """The names of the variants to time, floor first.

    Raises:
        UserError: a name that is not in the table.
    """
    for name in (*settings.variants, *filter(None, [settings.only])):
        if name not in VARIANTS:
            raise UserError(f"unknown variant {name!r}; there are {', '.join(VARIANTS)}")
    names = [name for name in VARIANTS if name in settings.variants or not settings.variants]
    return ["floor", *(name for name in names if name != "floor")]


def networks(settings: Settings, names: list[str]) -> Bench:
    return prepare(settings.model, settings.resolution, settings.batch, settings.dtype, encoders="script" in names)


@contextmanager
def job(bench: Bench, settings: Settings, name: str) -> Iterator[Callable[[], None]]:
    """A variant, attached, as something to call once per step."""
    import torch

    variant = VARIANTS[name]
    unet = getattr(bench, variant.base)
    with variant.attach(bench, unet, settings.budget) as (parameters, groups):
        optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=1e-2)
        for parameter in parameters:  # its state is made in the first step of a run, which is not what is measured
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        if settings.mode != "eager":
            torch.compiler.reset()
            captured = settings.mode == "captured" and settings.backend == "inductor"
            unet.compile(backend=settings.backend, mode="reduce-overhead" if captured else None)
        yield partial(variant.step, bench, unet, parameters, optimizer)
    unet._compiled_call_impl = None  # what Module.compile() set


def trained(bench: Bench, settings: Settings, name: str) -> int:
    variant = VARIANTS[name]
    with variant.attach(bench, getattr(bench, variant.base), settings.budget) as (parameters, _):
        return sum(p.numel() for p in parameters)


def one(settings: Settings, words: Sequence[str]) -> None:
    """One variant in this process: seconds of each round and peak memory, printed as JSON and written to `output`.

    The steps before the timed ones are as many as compiling and capturing take: memory takes its shape in them too.
    """
    bench = networks(settings, [settings.only])
    count = trained(bench, settings, settings.only)
    if bench.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    clock = timing.CLOCKS[settings.clock]
    seconds = []
    with job(bench, settings, settings.only) as step:
        for _ in range(2 if settings.mode == "eager" else 4):
            step()
        for _ in range(settings.rounds):
            began = clock()
            step()
            seconds.append(clock() - began)
    figures = {"peak_bytes": timing.peak_memory(), "seconds": seconds, "trained": count}
    if settings.output is not None:
        timing.write(settings.output, ["python", "-m", "benchmarks.train_step", *words], **figures)
    print(json.dumps(figures))


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else words
    try:
        settings = parse(Settings, words, "python -m benchmarks.train_step", __doc__ or "")
        names = chosen(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.only:
        one(settings, words)
        return 0
    peaks: dict[str, int] = {}
    if settings.memory:
        same = ["--model", settings.model, "--resolution", str(settings.resolution), "--batch", str(settings.batch)]
        same += ["--dtype", settings.dtype, "--budget", str(settings.budget)]
        peaks = {name: timing.apart("benchmarks.train_step", *same, "--only", name)["peak_bytes"] for name in names}
    bench = networks(settings, names)
    counts = {name: trained(bench, settings, name) for name in names}
    jobs: dict[str, timing.Job] = {name: partial(job, bench, settings, name) for name in names}
    # A training is the same step again and again: one goes before, in which memory takes the shape this variant needs.
    seconds = timing.rounds(jobs, settings.rounds, settle=1, clock=timing.CLOCKS[settings.clock])
    to = {
        other: {name: timing.ratios(seconds, name, other) for name in names}
        for other in ("floor", "PEFT lora")
        if other in names
    }
    where = f"{settings.model}, {settings.resolution} px, batch {settings.batch}, {settings.dtype}"
    timing.show(
        f"training step: {where}, {settings.rounds} rounds, {timing.machine()['threads']} threads",
        ("variant", f"{settings.clock} seconds", *(f"/ {other}" for other in to), "peak GB", "trained"),
        [
            (
                name,
                str(timing.spread(seconds[name])),
                *(str(ratio[name]) for ratio in to.values()),
                f"{peaks[name] / 1e9:.3f}" if peaks else "-",
                f"{counts[name]:,}",
            )
            for name in names
        ],
    )
    if settings.output is not None:
        timing.write(
            settings.output,
            ["python", "-m", "benchmarks.train_step", *words],
            setting=where,
            clock=settings.clock,
            trained=counts,
            seconds=seconds,
            ratios=to,
            peak_bytes=peaks,
            peak_is="allocator's peak" if bench.device.type == "cuda" else "peak resident set of a process of its own",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
