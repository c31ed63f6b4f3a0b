"""The wheel, built and run outside the checkout: `pytest tests/test_wheel.py`."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from email.parser import Parser
from pathlib import Path

import pytest

from singlora_diffusion.cli import COMMANDS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from the checkout without a network."""
    out = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (built,) = out.glob("*.whl")
    return built


def test_it_carries_every_module_and_data_file_and_nothing_else(wheel: Path) -> None:
    wanted = {"train_dreambooth.py"}
    for package in ("singlora_diffusion", "eval"):
        files = (path for path in (ROOT / package).rglob("*") if path.is_file())
        wanted |= {
            path.relative_to(ROOT).as_posix()
            for path in files
            if not any(part.startswith(".") or part == "__pycache__" for part in path.relative_to(ROOT).parts)
        }
    wanted |= {f"singlora_diffusion/prompt_sets/{path.name}" for path in (ROOT / "prompts").iterdir()}
    with zipfile.ZipFile(wheel) as archive:
        carried = {name for name in archive.namelist() if ".dist-info/" not in name}
    assert carried == {name for name in wanted if not name.endswith(".pyc")}


def test_its_metadata(wheel: Path) -> None:
    import singlora_diffusion

    with zipfile.ZipFile(wheel) as archive:
        (place,) = {name.partition("/")[0] for name in archive.namelist() if ".dist-info/" in name}
        about = Parser().parsestr(archive.read(f"{place}/METADATA").decode())
        licence = archive.read(f"{place}/licenses/LICENSE").decode()
        entry_points = archive.read(f"{place}/entry_points.txt").decode()
    assert about["Name"] == "singlora-diffusion" and about["Version"] == singlora_diffusion.__version__
    assert about["License-Expression"] == "Apache-2.0" and "Apache License" in licence
    assert about.get_payload() == (ROOT / "README.md").read_text()
    assert "singlora = singlora_diffusion.cli:main" in entry_points


def test_it_runs_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    packages, elsewhere = tmp_path / "packages", tmp_path / "elsewhere"
    elsewhere.mkdir()
    with zipfile.ZipFile(wheel) as archive:  # what installing a pure wheel amounts to
        archive.extractall(packages)

    def run(*code: str) -> subprocess.CompletedProcess[str]:
        environment = {**os.environ, "PYTHONPATH": str(packages)}
        return subprocess.run(
            [sys.executable, *code], cwd=elsewhere, env=environment, capture_output=True, text=True, timeout=300
        )

    where = run(
        "-c", "import singlora_diffusion, eval, train_dreambooth as t; print(singlora_diffusion.__file__, t.__file__)"
    )
    assert where.stdout.count(str(packages)) == 2, where.stdout + where.stderr
    pages = run(
        "-c",
        "from singlora_diffusion.cli import COMMANDS, run, usage\n"
        "print(usage())\n"
        "for command in COMMANDS:\n"
        "    try:\n"
        "        run(command, ['--help'])\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 0, command\n",
    )
    assert pages.returncode == 0 and "usage: singlora COMMAND" in pages.stdout, pages.stderr
    for command in COMMANDS:
        assert f"usage: singlora {command} " in pages.stdout
    sets = run(
        "-c", "from singlora_diffusion.data import prompts; print(*prompts.bundled(), len(prompts.load('object')))"
    )
    assert sets.stdout.split() == ["live_subject", "object", "toyworld", "25"], sets.stderr
    assert not any(elsewhere.iterdir())
