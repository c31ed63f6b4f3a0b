"""Time, threads and memory of the process that runs a cell."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path


@contextmanager
def threads(other: bool) -> Iterator[None]:
    """Another number of threads than usual, inside."""
    import torch

    before = torch.get_num_threads()
    if other:
        torch.set_num_threads(2 if before == 1 else 1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def clock(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Note how long it takes, inside, by the clock on the wall."""
    began = time.monotonic()
    yield
    seconds[name] = time.monotonic() - began


def machine(device: str) -> str:
    """As in "NVIDIA A100-SXM4-80GB" or "2 CPU cores"."""
    import torch

    if torch.device(device).type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.get_num_threads()} of {os.cpu_count()} CPU cores"


def forget_peak(device: str) -> None:
    """Begin anew to look for the peak, as far as the system can."""
    import torch

    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return
    with suppress(OSError):  # Linux alone
        Path("/proc/self/clear_refs").write_text("5")


def peak(device: str) -> int | None:
    """Bytes at the most since `forget_peak`, the base model's among them; None where nobody says."""
    import torch

    if torch.device(device).type == "cuda":
        return int(torch.cuda.max_memory_allocated())
    with suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    return None
