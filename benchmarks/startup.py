"""How long a user waits before anything happens: help, import, and the load of an adapter onto a model.

    python -m benchmarks.startup

Each is measured in processes of its own; the interpreter's own start is part of help and import.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from singlora_diffusion.errors import UserError
from singlora_diffusion.settings import Count, parse

from . import timing

HELP = "import sys; sys.argv = ['singlora', '--help']; from singlora_diffusion.cli import main; main()"
IMPORT = "import singlora_diffusion"
TORCH = """
import contextlib, io, sys
from singlora_diffusion.cli import main
sys.argv = ["singlora", "--help"]
with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
    main()
print("torch" in sys.modules)
"""
LOAD = """
import json, pathlib, sys, time
import torch
from benchmarks.networks import TARGETS, prepare
from singlora_diffusion import adapters, formats
from singlora_diffusion.adapters.config import AdapterConfig
networks = {"unet": prepare(sys.argv[1], 256, 1, "bfloat16").prepared}
path = pathlib.Path(sys.argv[2]) / "adapter.safetensors"
adapter = adapters.attach(networks, AdapterConfig(rank=15, targets=TARGETS))
about = dict(step=1, family="stable_diffusion", base_model="random", base_hash="", instance_prompt="", identifier="",
             class_noun="", resolution=256, recipe={})
formats.save(adapter, path, about=about)
adapter.detach()
wall, cpu = time.perf_counter(), time.process_time()
formats.load(path, networks)
print(json.dumps({"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}))
"""


@dataclass(frozen=True)
class Settings:
    """Time the start of the command, of the package and of an adapter."""

    rounds: Count = 5
    """Processes per figure."""
    model: str = "sd15"
    """As of benchmarks.train_step: what the adapter is loaded onto."""
    output: Path | None = None
    """A JSON file for the figures."""


def run(code: str, *arguments: str) -> str:
    """The output of a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=True)
    return done.stdout


def children() -> float:
    """Seconds of processor time that finished child processes took."""
    import resource

    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> int:
    try:
        settings = parse(Settings, sys.argv[1:], "python -m benchmarks.startup", __doc__ or "")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    figures: dict[str, dict[str, list[float]]] = {}
    for name, code in {"interpreter alone": "", "singlora --help": HELP, "import singlora_diffusion": IMPORT}.items():
        kinds: dict[str, list[float]] = {"wall": [], "cpu": []}
        run(code)  # files into the cache
        for _ in range(settings.rounds):
            wall, cpu = timing.wall(), children()
            run(code)
            kinds["wall"].append(timing.wall() - wall)
            kinds["cpu"].append(children() - cpu)
        figures[name] = kinds
    with tempfile.TemporaryDirectory() as folder:
        loads = json.loads(run(LOAD, settings.model, folder).splitlines()[-1])
    figures["load of an adapter"] = {kind: [seconds] for kind, seconds in loads.items()}
    heavy = run(TORCH).strip().splitlines()[-1] == "True"
    timing.show(
        "start",
        ("what", "wall seconds", "cpu seconds"),
        [
            (name, str(timing.spread(kinds["wall"])), str(timing.spread(kinds["cpu"])))
            for name, kinds in figures.items()
        ],
    )
    print(f"singlora --help imports torch: {'yes' if heavy else 'no'}")
    if settings.output is not None:
        command = ["python", "-m", "benchmarks.startup", *sys.argv[1:]]
        timing.write(settings.output, command, seconds=figures, help_imports_torch=heavy)
    return 0


if __name__ == "__main__":
    sys.exit(main())
