"""Free memory, folders, refused requests and seeds: `pytest tests/test_machine.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from singlora_diffusion import device, files
from singlora_diffusion.errors import UserError


@pytest.mark.parametrize("name", ["meta", "nonsense", "cpu:9:9", ""])
def test_devices_that_cannot_compute(name: str) -> None:
    assert device.choose("cpu") == "cpu"
    with pytest.raises(UserError, match=f"^--device {name} is not available here"):
        device.choose(name)


def test_what_cannot_fit_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 1 << 20 < device.free_memory("cpu") < 1 << 50
    monkeypatch.setattr(device, "free_memory", lambda _: 20_000_000_000)
    device.require(20_000_000_000, "cpu", "--rank 4")
    with pytest.raises(UserError) as error:
        device.require(190_000_000_000, "cpu", "--height 100000")
    assert str(error.value) == "--height 100000: would need about 190 GB, 20 GB are free on cpu"


def test_a_container_has_what_its_limit_leaves(tmp_path: Path) -> None:
    names = ("memory.max", "memory.current", "inactive_file")
    assert device._free_in(tmp_path, *names) > 1 << 60
    (tmp_path / "memory.stat").write_text("anon 700\ninactive_file 50\n")
    (tmp_path / "memory.current").write_text("800\n")
    (tmp_path / "memory.max").write_text("max\n")
    assert device._free_in(tmp_path, *names) > 1 << 60
    (tmp_path / "memory.max").write_text("1000\n")
    assert device._free_in(tmp_path, *names) == 250


def test_every_seed_of_64_bits_has_its_own_noise() -> None:
    import torch

    from singlora_diffusion.randomness import seeded

    def noise(seed: int) -> torch.Tensor:
        return torch.randn(8, generator=seeded(seed))

    for seed in (0, 5, 2**32 - 1):
        assert torch.equal(noise(seed), torch.randn(8, generator=torch.Generator().manual_seed(seed)))
    seeds = [low + (high << 32) for low in (0, 1, 5) for high in (0, 1, 2, 2**31, 2**32 - 1)]
    assert len({noise(seed).numpy().tobytes() for seed in seeds}) == len(seeds)
    for seed in (-1, 2**64):
        with pytest.raises(ValueError, match="64 bits"):
            seeded(seed)


def test_training_draws_are_those_of_the_lower_half_of_a_64_bit_key() -> None:
    """What torch made of the 64-bit key that the first version gave it."""
    import torch

    from singlora_diffusion.data import draws

    drawn = draws.draw(3, [0, 10**12], (4, 2, 2))
    for position, noise in zip((0, 10**12), drawn.noise, strict=True):
        key = int(np.random.SeedSequence((3, draws.INSTANCE, position)).generate_state(1, np.uint64)[0])
        assert torch.equal(noise, torch.randn(4, 2, 2, generator=torch.Generator().manual_seed(key)))


@pytest.mark.parametrize(
    ("below", "said"),
    [
        ("file", "is a file: name a folder"),
        ("file/x/y", "cannot be used: Not a directory"),
        ("x" * 300, "cannot be used: File name too long"),
        ("a\0b", "cannot be used: "),
        ("dangling", "is a file"),
    ],
)
def test_folders_that_cannot_be_written_to(tmp_path: Path, below: str, said: str) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    files.check_writable(tmp_path, "--output_dir")
    files.check_writable(tmp_path / "a" / "b", "--output_dir")
    with pytest.raises(UserError) as error:
        files.check_writable(tmp_path / below, "--output_dir")
    assert str(error.value).startswith("--output_dir ") and said in str(error.value) and "\n" not in str(error.value)
    assert len([*tmp_path.iterdir()]) == 2


def test_a_read_only_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: path != tmp_path)  # root may write everywhere
    for folder in (tmp_path, tmp_path / "a" / "b"):
        with pytest.raises(UserError, match=f"cannot be written to: check the permissions of {tmp_path}$"):
            files.check_writable(folder, "--output_dir")
