"""Which device to compute on, in which dtype, and whether its memory suffices."""

from __future__ import annotations

from pathlib import Path

from .errors import UserError


def choose(name: str | None) -> str:
    """The torch device that the user named; None: the GPU (CUDA, then Apple's MPS) if there is one, else the CPU.

    Raises:
        UserError: there is no such device here.
    """
    import torch

    if name is None:
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.zeros(1, device=name).item()  # torch's "meta" device makes tensors and cannot say what is in them
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # torch raises each of them
        raise UserError(
            f"--device {name} is not available here ({str(error).strip().splitlines()[0][:120]}); "
            f"leave it out to take what there is"
        ) from error
    return name


def compute_dtype(device: str, wanted: str | None) -> str:
    """The dtype of the frozen weights: float32, bfloat16 or float16.

    Args:
        device: a torch device, as `choose` returns it.
        wanted: what the user asked for, taken as it is. None: bfloat16 on a GPU that has it, float16 on an older one,
            float32 anywhere else. Apple's MPS has bfloat16 from macOS 14 on only, so it is left to whoever asks for it.
    """
    import torch

    if wanted is not None:
        return wanted
    if device.partition(":")[0] != "cuda":
        return "float32"
    major, _ = torch.cuda.get_device_capability(device)
    return "bfloat16" if major >= 8 else "float16"


def slow_bfloat16(device: str, dtype: str) -> str | None:
    """What the user should know where bfloat16 gains no time, in one line; None elsewhere."""
    if dtype != "bfloat16" or device.partition(":")[0] != "cpu" or _has_bfloat16():
        return None
    return "this CPU has no bfloat16 instructions: bfloat16 saves memory there, but float32 is faster"


def _has_bfloat16() -> bool:
    """Whether oneDNN, PyTorch's library of CPU kernels, computes in bfloat16 here; otherwise PyTorch uses plain loops.

    It needs AVX-512 or ARM's bfloat16 instructions, and heeds ONEDNN_MAX_CPU_ISA. True where there is no oneDNN to ask,
    as on a Mac: nothing is known there.
    """
    import torch

    try:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    except (AttributeError, RuntimeError):
        return True


def require(needed: int, device: str, what: str) -> None:
    """Refuse, before it is allocated, what cannot fit.

    Args:
        needed: bytes.
        what: the request as the user made it, such as "--height 16384 --batch_size 4".

    Raises:
        UserError: the device has less free memory.
    """
    free = free_memory(device)
    if needed > free:
        raise UserError(f"{what}: would need about {size(needed)}, {size(free)} are free on {device}")


def free_memory(device: str) -> int:
    """Bytes that can still be allocated: on a CUDA GPU its own, elsewhere the machine's or the container's."""
    import torch

    if torch.device(device).type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0] + cached)
    import psutil

    return min(int(psutil.virtual_memory().available), *(_free_in(Path(group), *names) for group, *names in _CGROUPS))


_CGROUPS = (
    ("/sys/fs/cgroup", "memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Where Linux keeps a container's limit, its use, and how much of that is cached files: versions 2 and 1."""


def _free_in(group: Path, limit: str, use: str, cache: str) -> int:
    """Bytes left in a control group; as good as endless where there is none, or none with a limit."""
    try:
        cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())[cache]
        return max(0, int((group / limit).read_text()) - int((group / use).read_text()) + int(cached))
    except (OSError, ValueError, KeyError):
        return 1 << 62


def size(count: int) -> str:
    """Bytes, as people read them."""
    if count < 1e9:
        return f"{count / 1e6:.0f} MB" if count >= 10e6 else f"{count / 1e6:.1f} MB"
    return f"{count / 1e9:.1f} GB" if count < 10e9 else f"{count / 1e9:,.0f} GB"
