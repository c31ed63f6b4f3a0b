"""One training step of every method beside what the frozen base itself costs, at one budget, in one run.

    python -m benchmarks.train_step --model sd15 --resolution 256 --dtype bfloat16

Networks are built from their configs with random weights, latents and text are random: cost does not depend on them.
Every variant does a whole step: noise, forward, loss, backward, clipping, AdamW. `floor` trains one vector, added to
the output of the first layer that the others adapt, so its backward pass goes exactly as far as theirs. `script` is the
step as diffusers' train_dreambooth_lora.py performs it: picture and prompt encoded each time, LoRA in the base's
precision, the UNet under autocast, the loss read back each step. `add_adapter` variants are PEFT's as that script
attaches it. On one core that other programs use too, `--clock cpu` with OMP_NUM_THREADS=1 leaves their share out.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from singlora_diffusion.errors import UserError

from . import timing

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
LR = 1e-4


@dataclass(frozen=True)
class Settings:
    """Time a training step of each variant, interleaved."""

    model: Literal["sd15", "sdxl", "tiny"] = "sd15"
    """Whose shapes."""
    resolution: int = 256
    """Pixels per side."""
    batch: int = 1
    """Pictures per step."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of the frozen networks."""
    rounds: int = 3
    """Times each variant is measured; one more goes before, unmeasured."""
    budget: int = 8
    """The rank of LoRA whose number of trained parameters the others get as near as they can."""
    variants: tuple[str, ...] = ()
    """Some of the table in this file; empty: all of them."""
    memory: bool = True
    """Measure peak memory too, each variant in a process of its own."""
    compile: bool = False
    """torch.compile the UNet, with the adapter inside."""
    clock: Literal["wall", "cpu"] = "wall"
    """cpu: the process's own time, for one thread on a core that others use too."""
    output: Path | None = None
    """A JSON file for the figures."""
    only: str = ""
    """One variant, a few steps, and its peak memory as JSON on the last line."""


@dataclass
class Bench:
    """What all variants share."""

    settings: Settings
    unet: Any
    latents: Tensor  # (N, 4, h, w) float32, standing for cached ones
    text: Tensor  # (N, 77, D) in the compute dtype, standing for cached ones
    extra: dict[str, Any]  # further arguments of the UNet
    shapes: list[tuple[int, int]]  # (out, in) of the adapted layers
    encoders: tuple[Any, Any] | None = None  # autoencoder and text encoder, where `script` is asked for

    @property
    def device(self) -> torch.device:
        return self.latents.device

    @property
    def dtype(self) -> torch.dtype:
        return self.text.dtype


def sd15() -> nn.Module:
    from .make_stable_diffusion import unet

    return unet()


def sdxl() -> nn.Module:
    """Stable Diffusion XL's, 2.6 thousand million parameters."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=128,
        block_out_channels=(320, 640, 1280),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 2, 10),
        attention_head_dim=(5, 10, 20),
        cross_attention_dim=2048,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=256,
        projection_class_embeddings_input_dim=2816,
    )


def tiny() -> nn.Module:
    """For trying the benchmark itself."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=768,
        attention_head_dim=4,
        norm_num_groups=8,
    )


MODELS: dict[str, Callable[[], nn.Module]] = {"sd15": sd15, "sdxl": sdxl, "tiny": tiny}


def random_weights(build: Callable[[], nn.Module], dtype: torch.dtype, device: str) -> Any:
    """The network, frozen: built without memory, then filled in `dtype` at once."""
    import torch

    from .make_stable_diffusion import made_as

    with torch.device("meta"), made_as(dtype):
        network = build()
    network = network.to_empty(device=device).requires_grad_(False).eval()
    pool = torch.rand(1 << 20, generator=torch.Generator().manual_seed(0)).mul_(2).sub_(1).to(device, dtype)
    for name, parameter in network.named_parameters():
        if parameter.dim() == 1:
            parameter.data.fill_(1.0 if name.endswith("weight") else 0.0)
        else:
            bound = parameter[0].numel() ** -0.5
            for part in parameter.data.view(-1).split(len(pool)):
                torch.mul(pool[: len(part)], bound, out=part)
    return network


def prepare(settings: Settings) -> Bench:
    """Build the networks and inputs that the asked variants need."""
    import torch

    from singlora_diffusion import budget

    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = getattr(torch, settings.dtype)
    unet = random_weights(MODELS[settings.model], dtype, device)
    side = settings.resolution // 8
    width = unet.config.cross_attention_dim
    extra: dict[str, Any] = {}
    if settings.model == "sdxl":
        pooled = torch.randn(settings.batch, 1280).to(device, dtype)
        size = torch.tensor([[settings.resolution] * 2 + [0, 0] + [settings.resolution] * 2] * settings.batch)
        extra["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size.to(device)}
    encoders = None
    if "script" in (settings.only, *chosen(settings)) and settings.model != "sdxl":
        from . import make_stable_diffusion as full

        words = full.tokenizer()
        text_encoder = full.text_encoder(words).to(device, dtype).requires_grad_(False).eval()
        encoders = random_weights(full.vae, dtype, device), text_encoder
    return Bench(
        settings,
        unet,
        torch.randn(settings.batch, 4, side, side).to(device),
        torch.randn(settings.batch, 77, width).to(device, dtype),
        extra,
        budget.shapes({"unet": unet}, TARGETS),
        encoders,
    )


def predict(bench: Bench, latents: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """The UNet's answer and what it should have been."""
    import torch

    noise = torch.randn_like(latents)
    t = torch.randint(1000, (len(latents),), device=latents.device)
    level = (t / 1000)[:, None, None, None]
    noisy = ((1 - level).sqrt() * latents + level.sqrt() * noise).to(bench.dtype)
    return bench.unet(noisy, t, text, **bench.extra).sample, noise


def finish(loss: Tensor, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """Backward, clip, step: the same for every variant."""
    import torch

    loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad()


def cached_step(bench: Bench, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """A step on latents and text that were encoded before."""
    answer, noise = predict(bench, bench.latents, bench.text)
    finish((answer.float() - noise).square().mean(), parameters, optimizer)


def script_step(bench: Bench, parameters: list[Any], optimizer: torch.optim.Optimizer) -> None:
    """A step as the script performs it."""
    import torch

    assert bench.encoders is not None
    vae, text_encoder = bench.encoders
    side = bench.settings.resolution
    pixels = torch.rand(bench.settings.batch, 3, side, side).to(bench.device, bench.dtype) * 2 - 1
    ids = torch.randint(1000, (bench.settings.batch, 77), device=bench.device)
    with torch.no_grad():
        latents = vae.encode(pixels).latent_dist.sample() * vae.config.scaling_factor
        text = text_encoder(ids)[0]
    mixed = bench.dtype != torch.float32
    with torch.autocast(bench.device.type, dtype=bench.dtype) if mixed else nullcontext():
        answer, noise = predict(bench, latents, text)
    loss = torch.nn.functional.mse_loss(answer.float(), noise.float())
    finish(loss, parameters, optimizer)
    loss.item()


@contextmanager
def floor(bench: Bench) -> Iterator[tuple[list[Any], list[Any]]]:
    """Trains one vector behind the first adapted layer."""
    import torch

    from singlora_diffusion.inject import projections

    first = next(iter(projections(bench.unet, TARGETS).values()))
    vector = torch.nn.Parameter(torch.zeros(first.out_features, device=bench.device))
    hook = first.register_forward_hook(lambda module, args, output: output + vector.to(output.dtype))
    yield [vector], [vector]
    hook.remove()


@contextmanager
def ours(bench: Bench, method: str, row: str, **options: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """An adapter as users of this package attach it; `row` names its line in budget.PER_LAYER."""
    from singlora_diffusion import adapters
    from singlora_diffusion.recipe import AdapterConfig

    config = AdapterConfig(method=method, rank=rank(bench, row), targets=TARGETS, **options)
    adapter = adapters.attach({"unet": bench.unet}, config)
    adapter.set_step(1)
    yield adapter.parameters(), adapter.param_groups(LR)
    adapter.detach()


@contextmanager
def stock(bench: Bench, row: str, **options: Any) -> Iterator[tuple[list[Any], list[Any]]]:
    """PEFT's LoRA through diffusers' `add_adapter`."""
    from peft import LoraConfig

    size = rank(bench, row)
    bench.unet.add_adapter(LoraConfig(r=size, lora_alpha=size, target_modules=list(TARGETS), **options))
    trained = [p for p in bench.unet.parameters() if p.requires_grad]
    yield trained, trained
    bench.unet.unload_lora()


def rank(bench: Bench, row: str) -> int:
    """The rank at which a method trains as many parameters as LoRA does at the budget's."""
    from singlora_diffusion import budget

    wanted = budget.count("lora", bench.settings.budget, bench.shapes)
    return budget.match(wanted, row, bench.shapes).rank


Attach = Callable[[Bench], Any]
Step = Callable[..., None]

VARIANTS: dict[str, tuple[Attach, Step]] = {
    "floor": (floor, cached_step),
    "singlora": (partial(ours, method="singlora", row="singlora"), cached_step),
    "offset": (partial(ours, method="singlora", row="offset", init="offset"), cached_step),
    "balanced": (partial(ours, method="singlora", row="balanced", signature="balanced"), cached_step),
    "singlora+dora": (partial(ours, method="singlora", row="singlora+dora", dora=True), cached_step),
    "lora": (partial(ours, method="lora", row="lora"), cached_step),
    "lora+": (partial(ours, method="lora+", row="lora+"), cached_step),
    "dora": (partial(ours, method="dora", row="dora"), cached_step),
    "oft": (partial(ours, method="oft", row="oft"), cached_step),
    "add_adapter lora": (partial(stock, row="lora"), cached_step),
    "add_adapter dora": (partial(stock, row="dora", use_dora=True), cached_step),
    "script": (partial(stock, row="lora"), script_step),
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
    if settings.model == "sdxl" and "script" in names:
        names.remove("script")
    return ["floor", *(name for name in names if name != "floor")]


@contextmanager
def job(bench: Bench, name: str) -> Iterator[Callable[[], None]]:
    """A variant, attached, as something to call once per step."""
    import torch

    attach, step = VARIANTS[name]
    with attach(bench) as (parameters, groups):
        optimizer = torch.optim.AdamW(groups, lr=LR, weight_decay=1e-2)
        for parameter in parameters:  # its state is made in the first step of a run, which is not what is measured
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        optimizer.zero_grad()
        if bench.settings.compile:
            torch.compiler.reset()
            bench.unet.compile()
        yield partial(step, bench, parameters, optimizer)
    bench.unet._compiled_call_impl = None  # what Module.compile() set


def trained(bench: Bench, name: str) -> int:
    with VARIANTS[name][0](bench) as (parameters, _):
        return sum(p.numel() for p in parameters)


def one(settings: Settings) -> None:
    """One step of one variant in this process; prints its peak memory."""
    bench = prepare(settings)
    if bench.device.type == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
    with job(bench, settings.only) as step:
        step()
    print(json.dumps({"peak_bytes": timing.peak_memory()}))


def main() -> int:
    import tyro

    settings = tyro.cli(Settings, description=__doc__)
    try:
        names = chosen(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if settings.only:
        one(settings)
        return 0
    peaks: dict[str, int] = {}
    if settings.memory:
        same = ["--model", settings.model, "--resolution", str(settings.resolution), "--batch", str(settings.batch)]
        same += ["--dtype", settings.dtype, "--budget", str(settings.budget)]
        peaks = {name: timing.apart("benchmarks.train_step", *same, "--only", name)["peak_bytes"] for name in names}
    bench = prepare(settings)
    counts = {name: trained(bench, name) for name in names}
    jobs: dict[str, timing.Job] = {name: partial(job, bench, name) for name in names}
    seconds = timing.rounds(jobs, settings.rounds, clock=timing.CLOCKS[settings.clock])
    to_floor = {name: timing.ratios(seconds, name, "floor") for name in names}
    where = f"{settings.model}, {settings.resolution} px, batch {settings.batch}, {settings.dtype}"
    timing.show(
        f"training step: {where}, {settings.rounds} rounds, {timing.machine()['threads']} threads",
        ("variant", f"{settings.clock} seconds", "/ floor", "peak GB", "trained"),
        [
            (
                name,
                str(timing.spread(seconds[name])),
                str(to_floor[name]),
                f"{peaks[name] / 1e9:.3f}" if peaks else "-",
                f"{counts[name]:,}",
            )
            for name in names
        ],
    )
    if settings.output is not None:
        timing.write(
            settings.output,
            ["python", "-m", "benchmarks.train_step", *sys.argv[1:]],
            setting=where,
            clock=settings.clock,
            trained=counts,
            seconds=seconds,
            ratio_to_floor=to_floor,
            peak_bytes=peaks,
            peak_is="allocator's peak" if bench.device.type == "cuda" else "peak resident set of a process of its own",
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
