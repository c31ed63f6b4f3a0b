"""--push_to_hub: a finished run as a repository on the Hugging Face hub."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp

from ..errors import UserError
from ..formats import native
from ..terminal import escaped
from . import run_folder
from .recipe import OutputSettings

SHARED = (run_folder.ADAPTER, run_folder.LORA, run_folder.CARD, f"{run_folder.PREVIEWS}/*.png")
"""What is uploaded: no checkpoints, no logs, and no recipe with this machine's paths."""


def repository(output: OutputSettings) -> str | None:
    """The repository that a run goes to, made (private) where there is none yet; its id. None: it goes to none.

    Raises:
        UserError: the hub cannot be reached, or does not let this user write there.
    """
    if not output.push_to_hub:
        return None
    import huggingface_hub

    name = output.hub_model_id or output.output_dir.absolute().name
    try:
        return str(huggingface_hub.create_repo(name, private=True, exist_ok=True).repo_id)
    except Exception as error:  # the hub's and the network's own are of many kinds
        raise UserError(f"--push_to_hub: {escaped(name)} cannot be used: {_first_line(error)}") from error


def upload(out: Path, repository: str) -> str:
    """Upload a run folder; returns the address of its page.

    Raises:
        UserError: the upload failed. What was to be uploaded stays in a folder that the message names.
    """
    import huggingface_hub

    folder = Path(mkdtemp(prefix="singlora-"))
    try:
        _copied(out, folder)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=folder, allow_patterns=list(SHARED))
    except Exception as error:
        again = f"hf upload {escaped(repository)} {escaped(folder, 1000)}"
        raise UserError(
            f"the adapter is in {escaped(out, 1000)}, but uploading it failed ({_first_line(error)}); later: {again}"
        ) from error
    shutil.rmtree(folder, ignore_errors=True)
    return f"{huggingface_hub.constants.ENDPOINT}/{repository}"


def _copied(out: Path, folder: Path) -> None:
    """What is to be uploaded, in another folder; the adapter's header names no folder of this machine."""
    for file in (path for pattern in SHARED for path in out.glob(pattern)):
        target = folder / file.relative_to(out)
        target.parent.mkdir(exist_ok=True)
        if file.name == run_folder.ADAPTER:
            native.publish(file, target)
        else:
            shutil.copyfile(file, target)


def _first_line(error: Exception) -> str:
    return escaped(next(iter(str(error).strip().splitlines()), type(error).__name__), 300)
