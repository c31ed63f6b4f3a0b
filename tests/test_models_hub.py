"""Where models come from: the package, a folder, the hub's cache or the hub, and one line where there is none."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
from diffusers import DiffusionPipeline
from huggingface_hub import utils

from singlora_diffusion import models
from singlora_diffusion.errors import UserError
from singlora_diffusion.models import hub

NAMES = ["config.json", "model.safetensors"]


class Hub:
    """Stands for the hub: what the cache holds, what the repository holds, and which of the two was asked."""

    def __init__(self, cache: Path, online: Path) -> None:
        self.cache, self.online, self.asked = cache, online, list[str]()
        self.names: list[str] = []

    def download(self, repository: str, *, local_files_only: bool = False, **options: Any) -> str:
        self.asked.append("cache" if local_files_only else "hub")
        self.names = list(options.get("allow_patterns") or [])
        folder = self.cache if local_files_only else self.online
        if not folder.is_dir():
            raise OSError(f"no {repository}\nhere")
        return str(folder)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    made = Hub(tmp_path / "cache", tmp_path / "online")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", made.download)
    monkeypatch.setattr(DiffusionPipeline, "download", made.download)
    monkeypatch.setattr(hub, "_reach", lambda *about: None)
    return made


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}")


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("stabilityai/stable-diffusion-xl-base-1.0", True),
        ("owner/name", True),
        ("here/name", False),  # its folder exists: a path with a slip
        ("./owner/name", False),
        ("/owner/name", False),
        ("~/name", False),
        ("owner/name/more", False),
        ("owner--x/name", False),
        ("owner/na me", False),
        ("name", False),
        ("", False),
        ("/", False),
        ("owner/", False),
    ],
)
def test_hub_ids(name: str, expected: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert hub.is_hub_id(name) == expected


def test_files_of_the_cache_go_before_the_hubs(fake: Hub) -> None:
    fill(fake.cache, NAMES)
    assert hub.files("owner/name", NAMES) == fake.cache
    assert (fake.asked, fake.names) == (["cache"], NAMES)


def test_files_that_the_cache_lacks_are_downloaded(fake: Hub) -> None:
    fill(fake.cache, NAMES[:1])
    fill(fake.online, NAMES)
    assert hub.files("owner/name", NAMES) == fake.online
    assert fake.asked == ["cache", "hub"]
    assert hub.files("owner/name", NAMES, lambda found: (found / "config.json").is_file()) == fake.cache


def test_files_that_nobody_has(fake: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"cannot get owner/name from the hub \(no owner/name here\)") as caught:
        hub.files("owner/name", NAMES)
    assert "\n" not in str(caught.value)
    fill(fake.online, NAMES[:1])
    with pytest.raises(UserError, match=r"the hub repository lacks some of config\.json, model\.safetensors"):
        hub.files("owner/name", NAMES)


def test_a_hub_that_cannot_be_reached_is_asked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object, **options: object) -> None:
        asked.append(options)
        raise OSError("unreachable")

    asked: list[object] = []
    monkeypatch.setattr(utils, "get_session", lambda: type("Session", (), {"head": fail}))
    monkeypatch.setattr(huggingface_hub, "snapshot_download", Hub(tmp_path / "a", tmp_path / "b").download)
    with pytest.raises(
        UserError, match=r"owner/name from the hub: it is not on this machine, and \S+ cannot be reached"
    ):
        hub.files("owner/name", NAMES)
    assert len(asked) == 1


def test_a_whole_pipeline(fake: Hub, tiny_sdxl: Path) -> None:
    """One that the cache holds whole is not asked for; a torn one is."""
    shutil.copytree(tiny_sdxl, fake.online)
    assert hub.folder("owner/name") == fake.online and fake.asked == ["cache", "hub"]
    shutil.copytree(tiny_sdxl, fake.cache)
    assert hub.folder("owner/name") == fake.cache
    weights = next((fake.cache / "unet").glob("*.safetensors"))
    shard = weights.with_name("diffusion_pytorch_model-00001-of-00002.safetensors")
    weights.rename(shard)
    listing = {"weight_map": {"a": shard.name, "b": shard.name.replace("00001-of", "00002-of")}}
    (fake.cache / "unet" / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(listing))
    assert hub.folder("owner/name") == fake.online
    shutil.rmtree(fake.cache / "vae")
    assert hub.folder("owner/name") == fake.online


def test_configs_need_no_weights(fake: Hub, tiny_flux: Path) -> None:
    """Of a hub id nothing but config files is downloaded; and they do not pass for the model."""
    for file in tiny_flux.rglob("*.json"):
        fill(fake.cache, [str(file.relative_to(tiny_flux))])
        shutil.copy(file, fake.cache / file.relative_to(tiny_flux))
    assert list(models.meta_networks("owner/name")) == ["transformer", "text_encoder", "text_encoder_2"]
    assert (fake.asked, fake.names) == (["cache"], ["model_index.json", "*/config.json"])
    with pytest.raises(UserError, match="cannot get owner/name from the hub"):
        hub.folder("owner/name")


def test_meta_networks_refuse_in_one_line(tiny_model: Path, tiny_flux: Path, tmp_path: Path) -> None:
    def damaged(name: str, file: str, change: dict[str, Any] | str | None) -> Path:
        path = Path(shutil.copytree(tiny_model, tmp_path / name))
        if change is None:
            (path / file).unlink()
        else:
            known = json.loads((path / file).read_text())
            (path / file).write_text(change if isinstance(change, str) else json.dumps(known | change))
        return path

    for path, message in (
        (damaged("no index", "model_index.json", None), "has no model_index.json"),
        (damaged("no config", "unet/config.json", None), "has no unet/config.json"),
        (damaged("no JSON", "unet/config.json", "{"), "JSON"),
        (damaged("another", "unet/config.json", {"_class_name": "FluxTransformer2DModel"}), "a FluxTransformer2DModel"),
        (damaged("kind", "text_encoder/config.json", {"model_type": "t5"}), "a t5, not a clip_text_model"),
        (damaged("numbers", "unet/config.json", {"block_out_channels": [5]}), "describes no unet known here"),
        (damaged("pipeline", "model_index.json", {"_class_name": "Kandinsky"}), "is a Kandinsky; supported"),
        (tmp_path / "absent", "no model at"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            models.meta_networks(path)
        assert "\n" not in str(caught.value)
