"""Which device to compute on, and in which dtype."""

from __future__ import annotations

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
