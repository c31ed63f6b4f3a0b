"""Signals: what they do to a training in a process of its own, and a few kills at random moments."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from singlora_diffusion.training.events import Started
from singlora_diffusion.training.interrupts import SIGNALS, Interrupts

ROOT = Path(__file__).parent.parent

DRIVER = """
import os, signal, sys, time
from pathlib import Path
import torch
from benchmarks import kill_training
from singlora_diffusion import cli, models
from singlora_diffusion.training import loop, preparation

here, model, images = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
torch.set_num_threads(1)
models.load(model)
words = ["--instance_data_dir", images, "--instance_prompt", "a photo of sks dog", "--output_dir", "run[/b] of mine"]
words += ["--pretrained_model_name_or_path", model, "--max_train_steps", "100000", "--rank", "2", "--device", "cpu"]
words += ["--train_batch_size", "1", "--validation_steps", "0", "--report_to", "none"]
children = {}
for name in ("SIGINT", "SIGTERM", "SIGHUP"):
    (here / name).mkdir()
    children[name] = kill_training.fork(here / name, lambda: sys.exit(cli.run("train", words)))
for name, child in children.items():
    log = here / name / "run[/b] of mine" / "log.jsonl"
    while not log.exists() or log.read_bytes().count(b"\\n") < 3:
        time.sleep(0.01)
    os.kill(child, getattr(signal, name))
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    (here / name / "code").write_text(str(code))
kill_training.main(kill_training.Settings(kills=2, pretrained_model_name_or_path=model))
"""


@pytest.fixture(scope="module")
def stopped(tiny_model: Path, training_images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per signal, each with a training that got it after some steps."""
    here = tmp_path_factory.mktemp("stopped")
    (here / "driver.py").write_text(DRIVER)
    words = [sys.executable, str(here / "driver.py"), str(here), str(tiny_model), str(training_images)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "200"}
    done = subprocess.run(words, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (here / "output.txt").write_text(done.stdout)
    return here


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGHUP", 129)])
def test_a_signal_ends_a_training_after_the_step_with_a_checkpoint(stopped: Path, name: str, code: int) -> None:
    run = stopped / name / "run[/b] of mine"
    assert int((stopped / name / "code").read_text()) == code
    steps = [json.loads(line)["step"] for line in (run / "log.jsonl").read_text().splitlines()]
    last = json.loads((run / f"checkpoint-{steps[-1]}" / "state.json").read_text())["step"]
    assert steps == list(range(1, last + 1)) and last >= 3
    said = (stopped / name / "output.txt").read_text()
    assert f"stopped after step {last}, saved in run[/b] of mine/checkpoint-{last}" in said
    command = re.search(r"^to go on: (.*)$", said, re.MULTILINE)
    assert command is not None and "Traceback" not in said
    words = shlex.split(command[1])
    assert words[:2] == ["singlora", "train"] and words[words.index("--resume_from_checkpoint") + 1] == "latest"
    assert words[words.index("--output_dir") + 1] == "run[/b] of mine"


def test_the_first_signal_asks_and_the_second_goes_to_whoever_had_it() -> None:
    got: list[int] = []
    before = {number: signal.signal(number, lambda number, _: got.append(number)) for number in SIGNALS}
    try:
        signals = Interrupts()
        signal.raise_signal(signal.SIGTERM)
        assert got.pop() == signal.SIGTERM and not signals.asked()  # no step has begun yet
        signals(Started(0, 1))
        signal.raise_signal(signal.SIGTERM)
        assert signals.asked() and not got
        signal.raise_signal(signal.SIGINT)
        assert got.pop() == signal.SIGINT and signals.received == signal.SIGTERM
        signals = Interrupts(echo=60)
        signals(Started(0, 1))
        for _ in range(3):
            signal.raise_signal(signal.SIGINT)  # as a launcher passes it on
        assert signals.asked() and not got
        signals.close()
        signal.raise_signal(signal.SIGHUP)
        assert got == [signal.SIGHUP]  # handed back at the end
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def test_a_killed_training_ends_like_an_unbroken_one(stopped: Path) -> None:
    said = (stopped / "output.txt").read_text()
    assert re.search(r"(\d+) of \1 rounds ended with the unbroken run's adapter, optimizer and log", said)
