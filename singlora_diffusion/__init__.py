"""SingLoRA for Stable Diffusion: train a subject adapter, generate with it, score it.

The command is `singlora`. From Python, with `import singlora_diffusion as sd`:

    family = sd.models.load("toyworld")  # or "toyworld-flow", a diffusers folder, or a hub id
    adapter = sd.attach(family.networks, sd.AdapterConfig(rank=16, text_targets=("q_proj", "v_proj")))
    optimizer = torch.optim.AdamW(adapter.param_groups(lr=1e-3))
    for step in range(400):
        adapter.set_step(step + 1)  # before the forward pass, from 1 on: a ramp has u(0) = 0
        ...  # loss, backward, optimizer.step()
    sd.save(adapter, "dog.safetensors", about={"identifier": "sks", "class_noun": "dog"})
    adapter.detach()  # bit for bit the networks that were loaded
    sd.load("dog.safetensors", family.networks).set_scale(0.8)  # sd.models.sample(family, ...) follows it

To save a whole pipeline, first write the adapter into its weights with `adapter.merge()`, or take it out with
`adapter.detach()`; then `family.pipeline().save_pretrained(folder)`.

Any network of transformers will do as well, as in `sd.attach({"model": network}, config)`.

`sd.formats` has the rest of the adapter files: export, export_peft, import_, inspect, add, merge_into. Nothing heavy is
imported before it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import formats, models
    from .adapters.config import AdapterConfig
    from .adapters.registry import Adapter, attach
    from .errors import UserError
    from .formats import load, save

__all__ = ["Adapter", "AdapterConfig", "UserError", "attach", "formats", "load", "models", "save"]

_HOMES = {
    "Adapter": "adapters",
    "AdapterConfig": "adapters.config",
    "UserError": "errors",
    "attach": "adapters",
    "load": "formats",
    "save": "formats",
}


def __getattr__(name: str) -> Any:
    if name in ("models", "formats"):
        return import_module(f".{name}", __name__)
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
