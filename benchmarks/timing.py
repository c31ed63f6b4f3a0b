"""Fair timing: variants in turn, round after round, medians with quartiles, peak memory apart, JSON and a table.

On a machine that does other things too, what disturbs one round disturbs all its variants about equally: the ratios of
one round are compared, and their median and quartiles are what is reported.
"""

from __future__ import annotations

import json
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

Job = Callable[[], AbstractContextManager[Callable[[], object]]]
"""Opens a variant, untimed, and gives what is timed; closes it afterwards."""


class Spread(NamedTuple):
    """Quartiles of a few figures."""

    low: float
    median: float
    high: float

    def __str__(self) -> str:
        return f"{self.median:.3f} ({self.low:.3f} to {self.high:.3f})"


def spread(values: Sequence[float]) -> Spread:
    """Quartiles; of fewer than two values all three are the same."""
    if len(values) < 2:
        return Spread(values[0], values[0], values[0])
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return Spread(low, median, high)


def wall() -> float:
    """Seconds, after everything that was asked of an accelerator is done."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


CLOCKS: dict[str, Callable[[], float]] = {"wall": wall, "cpu": time.process_time}
"""`cpu` leaves out what another program took on a shared core; it means something with one thread only."""


def rounds(
    jobs: Mapping[str, Job],
    count: int,
    *,
    repeats: int = 1,
    settle: int = 0,
    warm_up: int = 1,
    clock: Callable[[], float] = wall,
) -> dict[str, list[float]]:
    """Seconds per call of each job, by round.

    Each round runs every job, and begins with another one than the round before. `warm_up` rounds come first and are
    thrown away; after `settle` untimed calls, `repeats` calls are timed together and divided.
    """
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    names = list(jobs)
    for turn in range(-warm_up, count):
        shift = turn % len(names)
        for name in names[shift:] + names[:shift]:
            with jobs[name]() as call:
                for _ in range(settle):
                    call()
                began = clock()
                for _ in range(repeats):
                    call()
                spent = (clock() - began) / repeats
            if turn >= 0:
                seconds[name].append(spent)
    return seconds


def ratios(seconds: Mapping[str, Sequence[float]], name: str, to: str) -> Spread:
    """Spread over rounds of one job's time over another's in the same round."""
    return spread([a / b for a, b in zip(seconds[name], seconds[to], strict=True)])


def peak_memory() -> int:
    """Bytes: the allocator's peak on an accelerator, else the process's peak resident set.

    The latter never falls in a process's life: one variant, one process (`apart`).
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def apart(module: str, *arguments: str) -> dict[str, Any]:
    """Run `python -m module arguments` in its own process and read the JSON object on its last line."""
    done = subprocess.run([sys.executable, "-m", module, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{module} {' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine() -> dict[str, Any]:
    """What a figure depends on besides the code."""
    import torch

    where: dict[str, Any] = {"processor": processor(), "system": platform.platform(), "python": sys.version.split()[0]}
    where["threads"] = torch.get_num_threads()
    if torch.cuda.is_available():
        where["accelerator"] = torch.cuda.get_device_name()
    for name in ("torch", "diffusers", "transformers", "peft"):
        if name in sys.modules:
            where[name] = sys.modules[name].__version__
    return where


def processor() -> str:
    """Its name and the vector and matrix instructions that decide how fast bfloat16 is."""
    file = Path("/proc/cpuinfo")
    if not file.exists():
        return platform.processor()
    lines = dict(line.split(":", 1) for line in file.read_text().splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in lines.items()}
    known = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")
    found = [flag for flag in known if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', 'unknown')} ({' '.join(found)})"


def write(path: Path, command: Sequence[str], **results: Any) -> None:
    """One JSON object: when, where, by which command, what."""
    path.parent.mkdir(parents=True, exist_ok=True)
    now = datetime.now(timezone.utc).isoformat(timespec="seconds")
    report = {"date": now, "command": " ".join(command), "machine": machine(), **results}
    path.write_text(json.dumps(report, indent=2) + "\n")


def show(title: str, columns: Sequence[str], rows: Iterator[Sequence[str]] | Sequence[Sequence[str]]) -> None:
    """Print a table: the first column names, the others are figures."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    Console(width=140).print(table)
