"""All that is to be measured on a GPU, in one command that can be stopped and goes on where it was.

    python -m benchmarks.gpu                        # on the GPU, at most 40 minutes
    python -m benchmarks.gpu --device cpu --tiny    # the same commands at a tiny size, to try them out

The tests marked `cuda`; a training step of SingLoRA beside the floor, PEFT's LoRA and DoRA and the diffusers script's,
eager, compiled and captured, with its peak memory; sampling; a longer pretraining of toyworld. Every stage is a process
of its own, so its memory is its own and what fails takes nothing else along: it is recorded with its reason. Results
are kept by stage; the same command goes on with those that are missing and then tries the failed ones once more. Stages
run one after another, not in turn: on a GPU nobody else uses, that changes a ratio by a percent or two.

OUTPUT_DIR gets gpu.json, gpu.md (the table) and logs/.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from singlora_diffusion import files, settings, terminal
from singlora_diffusion.errors import UserError
from singlora_diffusion.progress import bar
from singlora_diffusion.settings import Count

from . import gpu_report
from .gpu_stages import PATIENCE, Device, Stage, stages

ROOT = Path(__file__).parent.parent
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft", "safetensors")


@dataclass(frozen=True)
class Settings:
    """Measure everything that needs a GPU."""

    output_dir: Path = Path("runs/gpu")
    """Where results, logs and the table go; what is finished there is not done again."""
    minutes: Count = 40
    """No more than this, in all; what is not reached is left to the next run."""
    device: Device = "cuda"
    """cpu: together with --tiny."""
    tiny: bool = False
    """Tiny networks, one round each: tries all commands out."""


def main(words: Sequence[str] | None = None) -> int:
    """The program; exit code 2 with one line for what the user can mend, 1 when a stage failed."""
    words = sys.argv[1:] if words is None else words
    try:
        chosen = settings.parse(Settings, words, "python -m benchmarks.gpu", __doc__ or "")
        report = measure(chosen, ["python", "-m", "benchmarks.gpu", *words])
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 1 if any(result["status"] == "failed" for result in report["stages"]) else 0


def measure(chosen: Settings, command: Sequence[str]) -> dict[str, Any]:
    """Run what is missing and write gpu.json and gpu.md, also when it is interrupted; returns what gpu.json holds.

    Raises:
        UserError: no GPU, or a folder with another machine's results.
    """
    from rich.console import Console

    if chosen.device == "cpu" and not chosen.tiny:
        raise UserError("--device cpu: full-size networks take days there; add --tiny")
    console = Console(highlight=False, soft_wrap=True)
    folder = chosen.output_dir.resolve()
    here = machine(chosen.device)
    until = time.monotonic() + 60 * chosen.minutes
    with files.locked(folder, "a measurement"):
        same_machine(folder / "machine.json", {**here, "size": "tiny" if chosen.tiny else "full"})
        plan = stages(folder, chosen.device, tiny=chosen.tiny)
        try:
            run(plan, folder, chosen.device, until, console)
        finally:
            report = write(plan, folder, here, command)
    counts = {status: sum(one["status"] == status for one in report["stages"]) for status in ("done", "failed")}
    console.print(
        f"{counts['done']} done, {counts['failed']} failed, {len(report['not_reached'])} not reached: "
        f"{folder / 'gpu.md'}",
        markup=False,
    )
    return report


def run(plan: Sequence[Stage], folder: Path, device: Device, until: float, console: Any) -> None:
    """The stages without a result, then those that failed, as long as there is time."""
    status = {stage.name: (result(folder, stage) or {}).get("status") for stage in plan}
    todo = [stage for stage in plan if status[stage.name] is None]
    todo += [stage for stage in plan if status[stage.name] == "failed"]
    with bar(console) as shown:
        task = shown.add_task("stages", total=sum(stage.expected for stage in todo))
        for stage in todo:
            left = until - time.monotonic()
            if left < min(stage.expected, 60):
                continue  # a shorter one may still fit
            shown.update(task, description=terminal.escaped(stage.name))
            found = attempt(stage, folder, device, min(left, PATIENCE * stage.expected + 60))
            files.write_json(_kept(folder, stage), found)
            shown.advance(task, stage.expected)
            console.print(
                f"{found['status']:<7}{stage.name}: {found['spent']:.0f} s {found.get('reason', '')}", markup=False
            )


def attempt(stage: Stage, folder: Path, device: Device, limit: float) -> dict[str, Any]:
    """Run one stage: its status, seconds, what it said, and its figures or the reason for their absence."""
    log = folder / "logs" / f"{stage.file}.txt"
    log.parent.mkdir(parents=True, exist_ok=True)
    if stage.output is not None:
        stage.output.parent.mkdir(parents=True, exist_ok=True)
        stage.output.unlink(missing_ok=True)
    began = time.monotonic()
    code = launch(stage, log, limit, device)
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    kept = {match[0]: line for line in lines if (match := re.search(stage.keep, line))}
    said = [terminal.escaped(line, 300) for line in dict.fromkeys([*kept.values(), *lines[-1:]])]
    found = {
        "stage": stage.name,
        "part": stage.part,
        "group": stage.group,
        "command": " ".join(["python", "-m", stage.module, *stage.words]),
        "spent": round(time.monotonic() - began, 1),
        "said": said,
    }
    if code is None:
        return {**found, "status": "failed", "reason": f"not finished after {limit:.0f} s"}
    if code or (stage.output is not None and not stage.output.exists()):
        return {**found, "status": "failed", "reason": "; ".join(said) or f"exit code {code}"}
    return {**found, "status": "done", "figures": {} if stage.output is None else files.read_json(stage.output)}


def launch(stage: Stage, log: Path, limit: float, device: Device) -> int | None:
    """Exit code of the stage's process, all of whose output goes to `log`; None if it ran past `limit` seconds."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT)}
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    with log.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, "-m", stage.module, *stage.words],
            stdout=out,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env=environment,
            start_new_session=True,  # so that what it starts ends with it
        )
        try:
            return process.wait(limit)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def write(plan: Sequence[Stage], folder: Path, here: dict[str, Any], command: Sequence[str]) -> dict[str, Any]:
    """gpu.json and gpu.md from the results that there are."""
    found = {stage.name: result(folder, stage) for stage in plan}
    report = {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": " ".join(command),
        "machine": here,
        "stages": [one for one in found.values() if one is not None],
        "not_reached": [name for name, one in found.items() if one is None],
    }
    files.write_json(folder / "gpu.json", report)
    files.write_text(folder / "gpu.md", gpu_report.markdown(report))
    return report


def result(folder: Path, stage: Stage) -> dict[str, Any] | None:
    """What an earlier run has kept of a stage."""
    path = _kept(folder, stage)
    return files.read_json(path) if path.exists() else None


def _kept(folder: Path, stage: Stage) -> Path:
    return folder / "stages" / f"{stage.file}.json"


def machine(device: Device) -> dict[str, Any]:
    """Device, driver and versions.

    Raises:
        UserError: there is no GPU.
    """
    import torch

    versions = {name: importlib.metadata.version(name) for name in LIBRARIES}
    system = {"python": platform.python_version(), "system": platform.platform(), **versions}
    if device == "cpu":
        return {"device": "CPU", **system}
    if not torch.cuda.is_available():
        raise UserError("there is no GPU that torch can use here; --device cpu --tiny tries the commands out")
    name, driver = described()
    return {
        "device": name,
        "driver": driver,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        **system,
    }


def described() -> tuple[str, str]:
    """The GPU's name and its driver's version, without a context on it where nvidia-smi knows them."""
    import torch

    try:
        asked = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
        said = subprocess.run(asked, capture_output=True, text=True, check=True, timeout=30).stdout
        name, driver = said.splitlines()[0].split(", ")
        return name, driver
    except (OSError, subprocess.SubprocessError, IndexError, ValueError):
        return torch.cuda.get_device_name(), "unknown"


def same_machine(path: Path, here: dict[str, Any]) -> None:
    """Keep the machine beside its results, or hold it to what an earlier run has kept.

    Raises:
        UserError: figures of two machines, or of two sizes, in one folder.
    """
    if not path.exists():
        files.write_json(path, here)
        return
    before = files.read_json(path)
    for key in ("device", "size", "torch"):
        if before.get(key) != here[key]:
            raise UserError(
                f"{path.parent}: holds results of {key} {terminal.escaped(before.get(key))}, this is {here[key]}; "
                f"name another --output_dir"
            )


if __name__ == "__main__":
    sys.exit(main())
