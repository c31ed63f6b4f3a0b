"""Which device to compute on, and in which dtype."""

from __future__ import annotations

from . import terminal
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
        torch.empty(0, device=name)
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
        wanted: what the user asked for, taken as it is; a line on stderr says so where bfloat16 gains no time. None:
            bfloat16 on a GPU that has it, float16 on an older one, float32 anywhere else. Apple's MPS has bfloat16 from
            macOS 14 on only, so it is left to whoever asks for it.
    """
    import torch

    kind, _, _ = device.partition(":")
    if wanted is None:
        if kind != "cuda":
            return "float32"
        major, _ = torch.cuda.get_device_capability(device)
        return "bfloat16" if major >= 8 else "float16"
    if wanted == "bfloat16" and kind == "cpu" and not _has_bfloat16():
        terminal.note("this CPU has no bfloat16 instructions: bfloat16 saves memory there, but float32 is faster")
    return wanted


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
