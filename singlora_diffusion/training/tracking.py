"""Trackers, those of accelerate: a listener that gives them figures and previews."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from typing import Any, NamedTuple

from .. import files
from ..errors import UserError
from ..terminal import escaped
from . import run_folder
from .events import VALIDATED, Event, Preview, Started, Step
from .recipe import Recipe, recorded

CURVES = ("loss", "lr", "u", "grad_norm", *VALIDATED)


def _tensorboard(recipe: Recipe, start: int) -> Any:
    from accelerate.tracking import TensorBoardTracker

    return TensorBoardTracker(run_folder.CURVES, recipe.output.output_dir, purge_step=start + 1)


def _wandb(recipe: Recipe, start: int) -> Any:
    from accelerate.tracking import WandBTracker

    out = recipe.output.output_dir
    return WandBTracker(
        "singlora",
        name=out.name,
        dir=str(out),
        config=recorded(recipe),
        id=_wandb_run(recipe),
        resume="allow",
        allow_val_change=True,  # --max_train_steps, when resuming
    )


def _wandb_run(recipe: Recipe) -> str:
    """The id of the run on wandb, kept in the output folder so that a resumed training goes on in the same one."""
    file = recipe.output.output_dir / "wandb" / "run_id"
    if recipe.output.resume_from_checkpoint and file.is_file():
        return file.read_text(encoding="utf-8").strip()
    made = secrets.token_hex(4)
    files.write_text(file, made)
    return made


class Row(NamedTuple):
    """A tracker: the package it needs, and how one is made for a recipe whose first so many steps are done."""

    package: str
    make: Callable[[Recipe, int], Any]
    images: Mapping[str, Any] = {}
    """What it must be told of images."""


TRACKERS: Mapping[str, Row] = {
    "tensorboard": Row("tensorboard", _tensorboard, {"dataformats": "NHWC"}),
    "wandb": Row("wandb", _wandb),
}
"""By the names that `--report_to` takes."""


class Tracker:
    """A listener.

    Raises:
        UserError: the tracker's package is not installed.
    """

    def __init__(self, recipe: Recipe) -> None:
        name = recipe.output.report_to
        self.recipe, self.row = recipe, TRACKERS[name]
        self.tracker: Any = None
        if find_spec(self.row.package) is None:
            raise UserError(f"--report_to {name} needs {self.row.package}: pip install {self.row.package}")

    def __call__(self, event: Event) -> None:
        match event:
            case Started(step):
                self.tracker = self.row.make(self.recipe, step)
                try:
                    self.tracker.start()
                except Exception as error:  # of many kinds: no account, no network
                    self.tracker = None
                    name = self.recipe.output.report_to
                    raise UserError(
                        f"--report_to {name}: {escaped(error, 300)}; --report_to none does without"
                    ) from error
            case Step():
                figures = {name: value for name in CURVES if (value := getattr(event, name)) is not None}
                self.tracker.log(figures, step=event.step)
            case Preview(path, step):
                import numpy as np
                from PIL import Image

                with Image.open(path) as image:
                    shown = np.asarray(image.convert("RGB"))[None]
                self.tracker.log_images({"preview": shown}, step=step, **self.row.images)
            case _:
                pass

    def close(self) -> None:
        """Write what is buffered."""
        if self.tracker is not None:
            self.tracker.finish()
