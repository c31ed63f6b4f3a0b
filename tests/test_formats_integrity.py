"""Nothing of an adapter file can be changed unnoticed, files of the first layout load, and no half file stays."""

from __future__ import annotations

import json
import os
import resource
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from singlora_diffusion import adapters, files, formats, models
from singlora_diffusion.adapters.config import AdapterConfig
from singlora_diffusion.errors import UserError

OLD = Path(__file__).parent / "data" / "adapter-0.1.safetensors"
CONFIG = AdapterConfig(rank=2, alpha=3.0, targets=("to_k",), text_targets=("q_proj",), ramp_steps=10)
ABOUT = {"step": 7, "base_model": "tiny", "class_noun": "dog", "recipe": {"seed": 3}}


def test_a_file_of_the_first_layout_loads_with_the_same_numbers(networks: Any, tmp_path: Path) -> None:
    header = formats.read_header(OLD)
    assert (header.version, header.u, header.step, header.trigger()) == (1, 0.7, 7, "sks dog")
    adapter = formats.load(OLD, networks)
    assert adapter.u == 0.7 and adapter.config.signature == "balanced" and adapter.config.alpha == 3.0
    for name, tensor in adapter.state_dict().items():
        count = torch.arange(tensor.numel()) * 7 % 11
        assert torch.equal(tensor, count.reshape(tensor.shape) / 8), name
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
    a = load_file(OLD)[f"{name}.A"].double()
    change = 3.0 / 2 * 0.7 * (a[:64] * torch.tensor([1.0, -1.0])) @ a[:48].T
    found = dict(adapter.delta_weights())[name].double()
    assert float((found - change).norm() / change.norm()) < 1e-6
    again = formats.save(adapter, tmp_path / "new.safetensors", about={"step": 7})
    assert again.version == 2 and formats.read_header(tmp_path / "new.safetensors") == again


def change_number(path: Path, change: Any) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    ours = json.loads(header["__metadata__"]["singlora"])
    change(ours)
    header["__metadata__"]["singlora"] = json.dumps(ours)
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])


@pytest.mark.parametrize(
    "change",
    [
        lambda h: h.update(u=0.5),
        lambda h: h["config"].update(alpha=2.0),
        lambda h: h["config"].update(ramp_steps=9),
        lambda h: h.update(step=8),
        lambda h: h.update(base_hash="1"),
        lambda h: h.update(class_noun="cat"),
        lambda h: h["recipe"].update(seed=4),
        lambda h: h.pop("identifier"),
    ],
)
def test_the_digest_covers_the_whole_header(change: Any, networks: Any, tmp_path: Path) -> None:
    adapter = adapters.attach(networks, CONFIG)
    adapter.set_step(7)
    formats.save(adapter, tmp_path / "a.safetensors", about=ABOUT)
    adapter.detach()
    change_number(tmp_path / "a.safetensors", lambda h: None)  # other spacing alone is no change
    formats.load(tmp_path / "a.safetensors", networks).detach()
    change_number(tmp_path / "a.safetensors", change)
    with pytest.raises(UserError, match="damaged or edited"):
        formats.load(tmp_path / "a.safetensors", networks)


# --- disks


@contextmanager
def small_disk(size: int) -> Iterator[None]:
    """No file grows beyond `size` bytes, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_disk_that_fills_up_leaves_the_old_file(networks: Any, tmp_path: Path) -> None:
    adapter = adapters.attach(networks, CONFIG)
    formats.save(adapter, tmp_path / "a.safetensors")
    before = (tmp_path / "a.safetensors").read_bytes()
    with small_disk(2000), pytest.raises(UserError, match="cannot be written") as caught:
        formats.save(adapter, tmp_path / "a.safetensors", about=ABOUT)
    assert "\n" not in str(caught.value)
    with small_disk(2000), pytest.raises(UserError, match="cannot be written"):
        formats.export(adapter, "kohya", tmp_path / "x.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["a.safetensors"]


@pytest.mark.parametrize("size", [100, 3000, 300_000])
def test_a_disk_that_fills_up_while_merging_leaves_nothing(size: int, tiny_model: Path, tmp_path: Path) -> None:
    family = models.load(str(tiny_model))
    adapter = adapters.attach(family.networks, CONFIG)
    weights = {name: one.module.state_dict() for name, one in family.networks.items()}
    before = {(n, k): t.clone() for n, state in weights.items() for k, t in state.items()}
    with small_disk(size), pytest.raises(UserError, match=r"merged: cannot be written") as caught:
        formats.merge_into(family, adapter, tmp_path / "merged")
    assert "\n" not in str(caught.value) and not any(tmp_path.iterdir())
    after = {(n, k): t for n, one in family.networks.items() for k, t in one.module.state_dict().items()}
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_a_folder_that_cannot_be_written_to(tiny_model: Path, tmp_path: Path) -> None:
    family = models.load(str(tiny_model))
    adapter = adapters.attach(family.networks, CONFIG)
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot be written"):
        formats.merge_into(family, adapter, tmp_path / "file" / "merged")
    with pytest.raises(UserError, match="cannot be written"):
        formats.save(adapter, tmp_path / "file" / "a.safetensors")


def test_what_killed_writers_left_goes_after_a_day(networks: Any, tmp_path: Path) -> None:
    adapter = adapters.attach(networks, CONFIG)
    old, live, other = (tmp_path / f".{name}.part-abc.safetensors" for name in ("a.safetensors", "b", "c"))
    live = tmp_path / ".a.safetensors.part-def.safetensors"
    for path in (old, live, other):
        path.write_bytes(b"half")
    day = time.time() - files.ABANDONED - 60
    for path in (old, other):
        os.utime(path, (day, day))
    formats.save(adapter, tmp_path / "a.safetensors")
    assert not old.exists() and live.exists() and other.exists()
