"""One resumable training loop for all of toyworld's models: AdamW, warm-up, long plateau, linear decay, EMA."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

console = Console(highlight=False)


def rate(step: int, steps: int, warmup: int = 150, decay: float = 0.3) -> float:
    """Share of the peak rate: linear warm-up, plateau, linear decay to zero over the last `decay` of the steps.

    The plateau does not depend on the end: a run can be cut short or prolonged by asking for another number of steps.
    """
    return max(0.0, min((step + 1) / warmup, 1.0, (steps - step) / (decay * steps)))


def fit(
    name: str,
    module: nn.Module,
    loss: Callable[[int], tuple[Tensor, dict[str, float]]],
    *,
    steps: int,
    lr: float,
    folder: Path,
    ema: float = 0.999,
    weight_decay: float = 0.01,
    preview: Callable[[nn.Module, int], None] | None = None,
    preview_every: int = 1000,
    keep_every: float = 120.0,
) -> None:
    """Train `module` in place and leave it with the averaged weights, in eval mode.

    Args:
        loss: the loss at a step, a function of the step and of `module`'s weights alone (draws its randomness from the
            step number), with figures to log. Run again with the same `folder`, the training goes on where it was.
        lr: peak rate.
        ema: decay of the weight average.
        preview: called now and then with the module (averaged weights inside) and the step.
        keep_every: seconds between checkpoints.
    """
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = folder / f"{name}.state.safetensors"
    parameters = dict(module.named_parameters())
    optimizer = torch.optim.AdamW(parameters.values(), lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
    average = {key: p.detach().clone() for key, p in parameters.items()}
    start = _restore(checkpoint, module, optimizer, average)
    module.train()
    begun, shown, kept = time.monotonic(), 0.0, time.monotonic()
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * rate(step, steps)
        value, figures = loss(step)
        value.backward()
        nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        decay = min(ema, (1 + step) / (10 + step))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), [p.detach() for p in parameters.values()], 1 - decay)
        now = time.monotonic()
        if now - shown > 20 or step + 1 == steps:
            eta = (now - begun) / (step + 1 - start) * (steps - step - 1)
            shown = now
            text = "  ".join(f"{key} {number:.4g}" for key, number in {"loss": value.item(), **figures}.items())
            console.print(f"{name}: step {step + 1}/{steps}  {text}  ETA {eta / 60:.1f} min")
        if now - kept > keep_every or step + 1 == steps:
            _keep(checkpoint, module, optimizer, average, step + 1)
            kept = now
        if preview is not None and (step + 1) % preview_every == 0:
            with _averaged(parameters, average):
                preview(module.eval(), step + 1)
            module.train()
    with torch.no_grad():
        for key, p in parameters.items():
            p.copy_(average[key])
    module.eval()


def sheet(images: Sequence[Image.Image], path: Path) -> None:
    """Save images in rows of eight, twice as large as they are at 64 pixels."""
    rows = -(-len(images) // 8)
    whole = Image.new("RGB", (8 * 128, rows * 128))
    for i, one in enumerate(images):
        whole.paste(one.resize((128, 128), Image.Resampling.NEAREST), (i % 8 * 128, i // 8 * 128))
    whole.save(path)


class _averaged:
    """Within the block the parameters hold their averages."""

    def __init__(self, parameters: dict[str, nn.Parameter], average: dict[str, Tensor]) -> None:
        self.parameters, self.average = parameters, average

    @torch.no_grad()
    def __enter__(self) -> None:
        self.own = {key: p.detach().clone() for key, p in self.parameters.items()}
        for key, p in self.parameters.items():
            p.copy_(self.average[key])

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for key, p in self.parameters.items():
            p.copy_(self.own[key])


def _keep(
    path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor], step: int
) -> None:
    tensors = {f"model.{key}": t.contiguous() for key, t in module.state_dict().items()}
    tensors |= {f"average.{key}": t for key, t in average.items()}
    names = dict(zip((id(p) for p in module.parameters()), (key for key, _ in module.named_parameters()), strict=True))
    for p, state in optimizer.state.items():
        tensors |= {f"optimizer.{names[id(p)]}.{key}": t.contiguous() for key, t in state.items()}
    new = path.with_suffix(".new")
    save_file({key: t.clone() for key, t in tensors.items()}, new, metadata={"step": json.dumps(step)})
    os.replace(new, path)


def _restore(path: Path, module: nn.Module, optimizer: torch.optim.Optimizer, average: dict[str, Tensor]) -> int:
    if not path.exists():
        return 0
    from safetensors import safe_open

    tensors = load_file(path)
    module.load_state_dict({k.removeprefix("model."): t for k, t in tensors.items() if k.startswith("model.")})
    for key, p in module.named_parameters():
        average[key] = tensors[f"average.{key}"].to(p.device)
        prefix = f"optimizer.{key}."
        state = {k.removeprefix(prefix): t for k, t in tensors.items() if k.startswith(prefix)}
        optimizer.state[p] = {k: t.to(p.device) for k, t in state.items()}  # fused AdamW counts steps there too
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["step"])
