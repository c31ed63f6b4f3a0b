"""The command line as a person meets it: help without waiting, and one line with exit code 2 for what can be mended."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
from PIL import Image

from singlora_diffusion import cli
from singlora_diffusion.cli import COMMANDS, Command
from singlora_diffusion.errors import UserError

if TYPE_CHECKING:
    from conftest import MakeNetworks

ROOT = Path(__file__).parent.parent
HEAVY = {"torch", "diffusers", "transformers", "accelerate", "peft", "timm", "open_clip", "matplotlib"}

DRIVER = """
import contextlib, json, os, sys, tempfile
from singlora_diffusion.cli import run

answers = {}
for name, words in json.load(open(sys.argv[1])).items():
    with tempfile.TemporaryFile("w+") as file:
        kept = os.dup(2)
        os.dup2(file.fileno(), 2)
        try:
            code = run(words[0], words[1:])
        except SystemExit as error:
            code = error.code
        except BaseException as error:
            code = repr(error)
        finally:
            sys.stderr.flush()
            os.dup2(kept, 2)
        file.seek(0)
        answers[name] = [code, file.read()]
json.dump(answers, open(sys.argv[2], "w"))
"""


def program(*words: str) -> subprocess.CompletedProcess[str]:
    """A program of ours in a process of its own, without a network."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, check=False, cwd=ROOT, env=environment
    )


def test_help_names_every_command() -> None:
    done = program("-m", "singlora_diffusion.cli", "--help")
    assert (done.returncode, done.stderr) == (0, "")
    for name, command in COMMANDS.items():
        assert f"  {name:<10}{command.line}" in done.stdout
    assert max(map(len, done.stdout.splitlines())) <= 120


def test_help_of_every_command_imports_nothing_heavy() -> None:
    done = program(
        "-c",
        "import sys\n"
        "from singlora_diffusion.cli import COMMANDS, run\n"
        "for command in COMMANDS:\n"
        "    try:\n"
        "        run(command, ['--help'])\n"
        "    except SystemExit as error:\n"
        "        assert error.code == 0, command\n"
        f"assert not (found := {HEAVY!r} & set(sys.modules)), found\n",
    )
    assert (done.returncode, done.stderr) == (0, "")
    for command in COMMANDS:
        assert f"usage: singlora {command} " in done.stdout
    for flag in ("--instance_data_dir", "--adapter", "--references", "--subject"):
        assert flag in done.stdout


def test_scripts_are_the_same_programs() -> None:
    done = program("train_dreambooth.py", "--instance_data_dir", "nowhere", "--instance_prompt", "a sks dog")
    assert done.returncode == 2
    assert done.stderr.startswith("singlora train: ") and done.stderr.count("\n") == 1 and "nowhere" in done.stderr


@pytest.mark.parametrize("words", [[], ["trian", "--rank", "8"]])
def test_no_command(words: list[str]) -> None:
    done = program("-m", "singlora_diffusion.cli", *words)
    assert done.returncode == 2
    assert "train, generate, score" in done.stderr or "usage: singlora COMMAND" in done.stdout
    assert "Traceback" not in done.stderr


class Case(NamedTuple):
    """Words that cannot work, what the one line must say, and what must not be left behind."""

    words: list[str]
    said: list[str]
    untouched: Path | None = None


def image_folder(folder: Path, count: int = 3) -> Path:
    folder.mkdir()
    for number in range(count):
        Image.new("RGB", (40, 32), (80 * number, 40, 90)).save(folder / f"{number}.png")
    return folder


def foreign_adapter(path: Path, make_networks: MakeNetworks, base_model: Path) -> Path:
    """A file made for a UNet of other widths."""
    from diffusers import UNet2DConditionModel

    from singlora_diffusion import adapters, formats
    from singlora_diffusion.adapters.config import AdapterConfig

    config = {**make_networks()["unet"].config, "block_out_channels": (16, 32), "cross_attention_dim": 40}
    other = {"unet": UNet2DConditionModel.from_config(config)}
    attached = adapters.attach(other, AdapterConfig(rank=2))
    about = dict(family="stable_diffusion", base_model=str(base_model), identifier="sks", class_noun="dog")
    formats.save(attached, path, about=about)
    return path


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory, tiny_model: Path, make_networks: MakeNetworks) -> dict[str, Case]:
    """Mistakes that people make, by name."""
    here = tmp_path_factory.mktemp("mistakes")
    good = image_folder(here / "good")
    (here / "empty").mkdir()
    junk = here / "junk"
    (junk / "folder.png").mkdir(parents=True)
    (junk / ".DS_Store").write_bytes(b"\0\0\0\1Bud1")
    (junk / "notes.txt").write_text("no image")
    torn = image_folder(here / "torn")
    whole = (torn / "1.png").read_bytes()
    (torn / "1.png").write_bytes(whole[: len(whole) // 2])
    trained = here / "trained"
    trained.mkdir()
    (trained / "adapter.safetensors").write_bytes(b"precious")
    foreign = foreign_adapter(here / "foreign.safetensors", make_networks, tiny_model)

    def train(
        folder: Path,
        *more: str,
        prompt: str = "a photo of sks dog",
        model: str | None = None,
        run: str = "out",
        steps: int = 1,
    ) -> list[str]:
        return [
            *("train", "--instance_data_dir", str(folder), "--instance_prompt", prompt, "--device", "cpu"),
            *("--report_to", "none", "--max_train_steps", str(steps), "--output_dir", str(here / run)),
            *("--pretrained_model_name_or_path", model or str(tiny_model), *more),
        ]

    def generate(adapter: Path, *more: str) -> list[str]:
        return ["generate", "--adapter", str(adapter), "--prompt", "a sks dog", "--device", "cpu", *more]

    out, samples, others = here / "out", here / "samples", here / "others"
    return {
        "missing folder": Case(train(here / "nowhere"), [str(here / "nowhere")], out),
        "empty folder": Case(train(here / "empty"), [str(here / "empty")], out),
        "only junk": Case(train(junk), [str(junk)], out),
        "unreadable image": Case(train(torn, "--strict"), ["1.png"], out),
        "no identifier": Case(train(good, prompt="a photo of a dog"), ["identifier", "a photo of sks dog"], out),
        "no model": Case(train(good, model=str(good)), [str(good), "model_index.json"], out),
        "no such model": Case(train(good, model=str(here / "nowhere")), ["nowhere"], out),
        "hub id offline": Case(train(good, model="someone/some-model"), ["someone/some-model"], out),
        "too many targets": Case(train(good, "--targets", "to_x"), ["to_x"], out),
        "no steps": Case(train(good, steps=0), ["--max_train_steps"], out),
        "old adapter in the way": Case(train(good, run="trained"), ["adapter.safetensors", "--overwrite"]),
        "other architecture": Case(
            generate(foreign, "--output_dir", str(others)), [foreign.name], others / "000-0.png"
        ),
        "no adapter": Case(generate(here / "empty", "--output_dir", str(samples)), [str(here / "empty")], samples),
        "damaged adapter": Case(
            generate(trained, "--output_dir", str(samples)), [str(trained / "adapter.safetensors")], samples
        ),
        "no prompts": Case(
            ["generate", "--output_dir", str(samples), "--adapter", str(foreign), "--prompts", str(here / "no.txt")],
            ["no.txt"],
            samples,
        ),
        "nothing to report": Case(["report", "--runs", str(here / "nowhere")], ["nowhere"]),
        "nothing to score": Case(["score", "--images", str(here / "empty")], [str(here / "empty")]),
        "no references": Case(["score", "--images", str(good), "--references", str(here / "nowhere")], ["nowhere"]),
        "no encoders offline": Case(
            ["score", "--images", str(good), "--references", str(image_folder(here / "real")), "--metrics", "dino"],
            ["--dino"],
            good / "scores.json",
        ),
        "no such subject": Case(["demo", "--subject", "dog-77", "--output_dir", str(out)], ["dog-77", "dog-1"], out),
        "folder in use": Case(
            ["toyworld", "subject", "--name", "dog-1", "--output_dir", str(good)], [str(good), "empty folder"]
        ),
        "no such budget": Case(
            ["budget", "--match", "lora:none", "--pretrained_model_name_or_path", str(tiny_model)], ["lora:none"]
        ),
        "no adapter to look at": Case(["inspect", str(here / "nowhere")], ["nowhere"]),
    }


@pytest.fixture(scope="module")
def answers(cases: dict[str, Case], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """Exit code and stderr of each case, all in one process."""
    here = tmp_path_factory.mktemp("driver")
    (here / "driver.py").write_text(DRIVER)
    (here / "cases.json").write_text(json.dumps({name: case.words for name, case in cases.items()}))
    done = program(str(here / "driver.py"), str(here / "cases.json"), str(here / "answers.json"))
    assert done.returncode == 0, done.stderr
    found: dict[str, list[Any]] = json.loads((here / "answers.json").read_text())
    return found


def test_mistakes_end_in_one_line(cases: dict[str, Case], answers: dict[str, list[Any]]) -> None:
    wrong = {}
    for name, case in cases.items():
        code, said = answers[name]
        right = code == 2 and said.startswith(f"singlora {case.words[0]}: ") and said.count("\n") == 1
        if not right or not all(words in said for words in case.said):
            wrong[name] = (code, said[-600:])
    assert not wrong


def test_mistakes_leave_nothing_behind(cases: dict[str, Case], answers: dict[str, list[Any]]) -> None:
    assert answers.keys() == cases.keys()
    assert not [name for name, case in cases.items() if case.untouched and case.untouched.exists()]
    trained = Path(cases["old adapter in the way"].words[-3])
    assert (trained / "adapter.safetensors").read_bytes() == b"precious"
    assert [path.name for path in trained.iterdir()] == ["adapter.safetensors"]


def test_a_reader_that_has_seen_enough_is_no_error(tmp_path: Path) -> None:
    script = (
        "import sys; from singlora_diffusion import cli; cli.COMMANDS['x'] = cli.Command("
        "'singlora_diffusion.formats.settings:InspectSettings', 'os:abort', ''); "
        "cli._find = lambda place, find=cli._find: find(place) if 'Settings' in place else "
        "(lambda settings: [print('line ' * 20) for _ in range(100_000)]); sys.exit(cli.run('x', ['file']))"
    )
    command = f'{sys.executable} -c "$SCRIPT" | head -1; echo ${{PIPESTATUS[0]}}'
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, timeout=60, env={**os.environ, "SCRIPT": script}
    )
    assert done.stdout.splitlines()[-1] == "0" and done.stderr == ""


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Any], object]], None]:
    """command(work) -> `singlora x FILE` does that work."""

    def make(work: Callable[[Any], object]) -> None:
        find = cli._find
        settings = "singlora_diffusion.formats.settings:InspectSettings"
        monkeypatch.setitem(COMMANDS, "x", Command(settings, "work", ""))
        monkeypatch.setattr(cli, "_find", lambda place: work if place == "work" else find(place))

    return make


def raising(error: BaseException) -> Callable[[Any], object]:
    def work(settings: Any) -> None:
        raise error

    return work


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (UserError("a.png: torn; remove it"), "a.png: torn; remove it"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b.png"), "a/b.png: No space left on device"),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (PermissionError(errno.EROFS, "Read-only file system", "x", None, "y"), "x -> y: Read-only file system"),
        (OSError(errno.ENAMETOOLONG, "File name too long", "n" * 5000), "n" * (cli.LONGEST - 1) + "\u2026"),
        (UserError("evil\x1b[2J\nname[/bold]\u202e"), "evil\ufffd[2J\ufffdname[/bold]\ufffd"),
        (MemoryError(), "out of memory; make batches, resolution or rank smaller"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 9 bytes\nmore"), None),
    ],
)
def test_what_is_no_bug_is_one_line(
    error: Exception, said: str | None, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    command(raising(error))
    assert cli.run("x", ["file"]) == 2
    shown = capsys.readouterr().err
    assert shown == f"singlora x: {said}\n" if said else shown.startswith("singlora x: out of memory (")
    assert shown.count("\n") == 1


def test_what_the_system_refuses_safetensors_is_one_line(
    command: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from safetensors.numpy import save_file

    command(lambda settings: save_file({}, tmp_path / "nowhere" / "x.safetensors"))
    assert cli.run("x", ["file"]) == 2
    said = capsys.readouterr().err
    assert "No such file or directory" in said and said.count("\n") == 1


def test_a_bug_keeps_its_traceback(command: Any) -> None:
    command(raising(KeyError("unexpected")))
    with pytest.raises(KeyError, match="unexpected"):
        cli.run("x", ["file"])


@pytest.mark.parametrize(
    ("number", "code", "said"), [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated")]
)
def test_signals_unwind_and_have_their_exit_codes(
    number: int, code: int, said: str, command: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    unwound = []

    def work(settings: Any) -> None:
        try:
            os.kill(os.getpid(), number)
            time.sleep(30)
        finally:
            unwound.append(True)

    before = signal.getsignal(signal.SIGTERM)
    command(work)
    usual = signal.signal(signal.SIGINT, signal.default_int_handler)  # jobs in a shell's background ignore Ctrl-C
    try:
        assert cli.run("x", ["file"]) == code
    finally:
        signal.signal(signal.SIGINT, usual)
    assert unwound and capsys.readouterr().err == f"singlora x: {said}\n"
    assert signal.getsignal(signal.SIGTERM) == before


def test_every_command_holds_its_flags_to_their_ranges(capsys: pytest.CaptureFixture[str]) -> None:
    """From the fields' declarations, before anything is imported that works."""
    for words in (["demo", "--max_train_steps", "0"], ["demo", "--learning_rate", "nan"], ["demo", "--seed", "-1"]):
        assert cli.run(words[0], words[1:]) == 2
        said = capsys.readouterr().err
        assert said.startswith(f"singlora {words[0]}: {words[1]} ") and said.count("\n") == 1
