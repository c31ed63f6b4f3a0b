"""Images made for the page: the base model stays loaded, and what is made under other settings goes elsewhere."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import settings
from ..data import png
from ..errors import UserError
from ..sampling import gallery, sources
from ..sampling.generate import generate, load
from ..sampling.manifest import check_line
from ..sampling.settings import GenerateSettings, check
from ..terminal import escaped
from ..training import run_folder

if TYPE_CHECKING:
    from ..models import Family


SCHEDULERS = ("ddim", "dpm++", "euler")
"""What the model's own may be replaced by; each family takes some of them."""


class Maker:
    """Makes images, one call at a time."""

    def __init__(self) -> None:
        self.alone = threading.Lock()
        self.key: tuple[str | None, ...] = ()
        self.family: Family | None = None

    def make(self, wanted: GenerateSettings) -> list[Path]:
        """What `singlora generate` makes of the settings; images that are there already are not made again.

        Raises:
            UserError: as the command.
        """
        check(wanted)
        with self.alone:
            found = [sources.read_adapter(path) for path in wanted.adapters.adapter]
            model = wanted.model
            name = sources.base_model(model.pretrained_model_name_or_path, found)
            key = (name, model.dtype, model.quantize, model.device)
            if self.family is None or key != self.key:
                self.family, self.key = None, ()  # two do not always fit
                self.family, self.key = load(wanted, found), key
            sources.check_base(found, self.family, asked_for=model.pretrained_model_name_or_path is not None)
            records = generate(wanted, quiet=True, family=self.family)
        return [wanted.output.output_dir / record["file"] for record in records]


def wanted(folder: Path, given: Mapping[str, Any]) -> GenerateSettings:
    """Settings with a folder below this one, named for all that its images have in common, so that equal ones meet.

    Args:
        given: values by the flags' names; those that are None or () are left to the command.
    """
    values = {name: value for name, value in given.items() if value not in (None, (), "")}
    common = {name: value for name, value in values.items() if name != "seeds"}
    told = json.dumps([sorted(common.items()), [_version(path) for path in values.get("adapter", ())]], default=str)
    name = Path(values["adapter"][0]).stem if values.get("adapter") else "base"
    out = folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:8]}"
    return settings.build(GenerateSettings, output_dir=out, **values)


def restored(image: Path) -> dict[str, Any]:
    """How an image was made, from the PNG itself, by the names of the flags of `generate`; with the adapters' hashes.

    Raises:
        UserError: it does not say.
    """
    try:
        record = check_line(json.loads(png.texts(image).get(gallery.PNG_KEY, "")))
    except (ValueError, RecursionError):
        raise UserError(
            f"{escaped(image.name)}: does not say how it was made; drop a PNG that `singlora generate` wrote"
        ) from None
    return {
        "adapter": _parts(record.get("adapter")),
        "adapter_sha256": _parts(record.get("adapter_sha256")),
        "scale": tuple(float(one) for one in _parts(record.get("scale"))),
        "pretrained_model_name_or_path": record.get("base_model"),
        "prompt": record.get("prompt") or "",
        "negative_prompt": record.get("negative_prompt") or "",
        "seeds": str(record.get("seed", 0)),
        "num_inference_steps": record.get("steps"),
        "guidance_scale": record.get("guidance_scale"),
        "scheduler": record["scheduler"] if record.get("scheduler") in SCHEDULERS else None,  # else it names the class
        "width": record.get("width"),
        "height": record.get("height"),
    }


def _parts(value: Any) -> tuple[str, ...]:
    """What `records` joined: `runs/dog + runs/cat`."""
    return tuple(str(value).split(" + ")) if value not in (None, "") else ()


def file_of(adapter: Path) -> Path:
    """An adapter's file: of a run, a best step or a checkpoint, the one in the folder."""
    return adapter / run_folder.ADAPTER if adapter.is_dir() else adapter


def _version(path: Path) -> str:
    """A run that was trained anew is another adapter."""
    file = file_of(path)
    return str(file.stat().st_mtime_ns) if file.exists() else ""
