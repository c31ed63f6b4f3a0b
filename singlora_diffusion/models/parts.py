"""The parts of a stored model: networks, tokenizers, schedulers. Nothing is unpickled, nothing downloaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import DDIMScheduler
from torch import Tensor, nn

from ..errors import UserError
from ..files import read_json
from ..terminal import escaped
from . import cpu_layers, hub, quantized, single_file
from .network import Part
from .quiet import quiet
from .stored import Stored

BLOCK = 1 << 16


@contextmanager
def loading(path: Path, what: str) -> Iterator[None]:
    """Load quietly; whatever goes wrong inside is a UserError of one line that names the folder once.

    Args:
        what: the kind of model that the folder should hold: `Stable Diffusion`.
    """
    try:
        with quiet():
            yield
    except UserError:
        raise
    except Exception as error:  # damage shows in many ways, and each library has its own errors
        reason = escaped(" ".join(str(error).replace(f"{path}/", "").split()), 200)
        raise UserError(f"{escaped(path, 1000)} cannot be loaded as a {what} model: {reason}") from error


def index(path: Path) -> dict[str, Any]:
    """The folder's model_index.json.

    Raises:
        UserError: it is not JSON that names a pipeline class.
    """
    try:
        found = json.loads((path / hub.INDEX).read_text(encoding="utf-8"))
        found["_class_name"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{escaped(path, 1000)}/{hub.INDEX} is damaged: it must be JSON that names a pipeline class"
        ) from error
    return dict(found)


def hints(path: Path) -> dict[str, Any]:
    """What the folder's singlora.json says about how the model likes to be used.

    guidance_scale, learning_rate, prompts, and t5_length: how many zeros stand for an absent T5's hidden states.
    """
    file = path / "singlora.json"
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


class Origin(NamedTuple):
    """Where a model comes from, and what its folder says about its use."""

    source: str
    """What the user named: a packaged model, a folder, a hub id."""
    fingerprint: str
    """Of the denoiser's weight files, as `fingerprint` makes it."""
    vae_source: str | None
    """What the user named as another autoencoder; None: the model's own."""
    vae_fingerprint: str
    """Of the autoencoder's weight files; of a single file with all weights, that of the file."""
    text_fingerprint: str
    """Likewise of the text encoders and their tokenizers."""
    hints: Mapping[str, Any]
    """As `hints` reads them."""


def origin(stored: Stored, denoiser: str) -> Origin:
    """The origin of a base model; `denoiser` is the name of its UNet or transformer."""
    own, its = (weights(stored.path / name)[0] if stored.file is None else [stored.file] for name in (denoiser, "vae"))
    if stored.vae is not None:
        its = [stored.vae] if stored.vae.is_file() else weights(stored.vae)[0]
    text = [file for part in ("text_encoder*", "tokenizer*") for file in sorted(stored.path.glob(f"{part}/*"))]
    readers = [*text, *([] if stored.file is None else [stored.file])]
    return Origin(
        stored.source,
        fingerprint(own),
        stored.vae_source,
        fingerprint(its),
        fingerprint(readers),
        hints(stored.path),
    )


def existing(path: Path) -> Path:
    """The folder of a part.

    Raises:
        FileNotFoundError: there is none.
    """
    if not path.is_dir():
        raise FileNotFoundError(f"it has no folder {path.name}")
    return path


def weights(folder: Path) -> tuple[list[Path], str | None]:
    """The weight files of a part that are read, and their variant (`fp16`); None where there are files without one."""
    variants: dict[str, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        variants.setdefault(file.stem.partition(".")[2].partition("-")[0], []).append(file)
    variant = "" if "" in variants else next(iter(variants), "")
    return variants.get(variant, []), variant or None


def fingerprint(files: Sequence[Path]) -> str:
    """sha256 of weight files: of size, head, tail and 64 blocks between, as all of some gigabytes would take long."""
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(str(size).encode())
        with file.open("rb") as stream:
            for k in range(66):
                stream.seek(k * max(size - BLOCK, 0) // 65)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def network(
    kind: Any, stored: Stored, name: str, device: str, dtype: torch.dtype, quantization: str | None = None
) -> Any:
    """One network of a diffusers or transformers class, frozen and in eval mode.

    It has its precision from the start: a full-size network in float32 first would take twice the memory.
    """
    module = (
        _out_of_folder(kind, stored.path / name, dtype)
        if stored.file is None
        else single_file.network(kind, stored.file, name, dtype)
    )
    return _ready(module, device, quantization)


def autoencoder(kind: Any, stored: Stored, device: str) -> Any:
    """The autoencoder in float32: the model's own, or the one that the user named in its place.

    Raises:
        UserError: that one cannot be loaded, or its latents are no latents of this model.
    """
    if stored.vae is None:
        return network(kind, stored, "vae", device, torch.float32)
    own = kind.load_config(stored.path, subfolder="vae", local_files_only=True)
    with loading(stored.vae, "VAE"):
        module = (
            single_file.autoencoder(kind, stored.vae, stored.path)
            if stored.vae.is_file()
            else _out_of_folder(kind, stored.vae, torch.float32)
        )
        if (theirs := _latents(module.config)) != (ours := _latents(own)):
            raise ValueError(f"its latents have {theirs}, those of the base model {ours}")
        return _ready(module, device)


def _latents(config: Mapping[str, Any]) -> str:
    """The shape of an autoencoder's latents, in words."""
    return f"{config['latent_channels']} channels at 1/{2 ** (len(config['block_out_channels']) - 1)} of a side"


def _ready(module: Any, device: str, quantization: str | None = None) -> Any:
    """Frozen, in eval mode and on its device."""
    module.requires_grad_(False).eval()
    if quantization is not None:
        quantized.quantize(module, quantization, device)
    module.to(device)
    cpu_layers.prepare(module)
    return module


def _out_of_folder(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    files, variant = weights(existing(folder))
    if not files:
        raise FileNotFoundError(f"{folder.name} has no .safetensors file, and pickled weights are not read")
    module, report = kind.from_pretrained(
        folder,
        variant=variant,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
        **{"torch_dtype" if issubclass(kind, diffusers.ModelMixin) else "dtype": dtype},
    )
    missing = sorted(report["missing_keys"])
    if missing:  # the libraries would leave them random
        raise ValueError(f"{folder.name} lacks {len(missing)} tensors, {missing[0]} for one")
    return module


def listed(index: Mapping[str, Any], name: str) -> bool:
    """Whether a model has this part; one that its index says nothing of must be there."""
    return bool(index.get(name) != [None, None])


def networks(
    table: Mapping[str, Part], stored: Stored, device: str, dtype: str, quantization: str | None = None
) -> dict[str, Any]:
    """Those that the model's index lists, by name, all in one dtype, the large ones packed if so asked."""
    listing = index(stored.path)
    return {
        name: network(part.kind, stored, name, device, getattr(torch, dtype), quantization if part.large else None)
        for name, part in table.items()
        if listed(listing, name)
    }


def without_weights(kind: Any, folder: Path) -> nn.Module:
    """One network on torch's meta device, from its config file alone.

    Raises:
        UserError: no such file, or it describes another class.
    """
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(f"{folder.parent} has no {folder.name}/config.json: it is no complete diffusers model")
    described = read_json(file)
    try:
        with quiet(), torch.device("meta"):
            if issubclass(kind, diffusers.ModelMixin):
                if described.get("_class_name") != kind.__name__:
                    raise ValueError(f"a {described.get('_class_name')}, not a {kind.__name__}")
                return kind.from_config(described)
            if described.get("model_type") != kind.config_class.model_type:
                raise ValueError(f"a {described.get('model_type')}, not a {kind.config_class.model_type}")
            return kind(kind.config_class.from_dict(described))
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        reason = escaped(" ".join(str(error).split()), 200)
        raise UserError(f"{file} describes no {folder.name} known here ({reason})") from error


def tokenizer(kind: Any, folder: Path) -> Any:
    return kind.from_pretrained(existing(folder), local_files_only=True)


def token_ids(tokenizer: Any, prompts: Sequence[str], length: int | None = None) -> Tensor:
    """(N, length), padded and cut. None: as long as the tokenizer says."""
    length = tokenizer.model_max_length if length is None else length
    cut = tokenizer(list(prompts), padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    return cut.input_ids


def overflow(tokenizer: Any, prompt: str, length: int | None = None) -> int:
    """By how many tokens a prompt is longer than that."""
    with quiet():  # the tokenizer would say so itself
        tokens = len(tokenizer(prompt).input_ids)
    return max(0, tokens - (tokenizer.model_max_length if length is None else length))


def chosen_scheduler(own: Any, others: Mapping[str, Any], name: str | None) -> Any:
    """The model's own scheduler, or another one by name with the settings of its own.

    Raises:
        UserError: no scheduler of that name.
    """
    if name is None:
        return own
    if name not in others:
        raise UserError(f"unknown scheduler {name!r} for this model: there are {', '.join(others)}")
    return others[name].from_config(own.config)


def scheduler(folder: Path) -> Any:
    """The scheduler that the model names; DDIM where diffusers has none of that name or it adds no noise."""
    config = DDIMScheduler.load_config(existing(folder), local_files_only=True)
    kind: Any = getattr(diffusers, str(config.get("_class_name")), None)
    return kind.from_config(config) if hasattr(kind, "add_noise") else DDIMScheduler.from_config(config)
