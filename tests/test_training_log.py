"""log.jsonl: each step once and in order, whatever an earlier process left behind."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from singlora_diffusion.errors import UserError
from singlora_diffusion.training.events import Started, Step
from singlora_diffusion.training.log_file import LogFile, cut


def line(step: int, loss: float = 0.5) -> str:
    return json.dumps({"step": step, "loss": loss, "seconds": float(step)}) + "\n"


WHOLE = "".join(line(step) for step in (1, 2, 3))


@pytest.mark.parametrize(
    "content",
    [
        WHOLE,
        WHOLE + line(4) + line(5),  # steps after the checkpoint
        WHOLE + '{"step": 4, "lo',  # torn
        WHOLE.rstrip("\n") + "\n\n",
        line(1) + line(2) + line(2, loss=9.0) + line(1, loss=9.0) + line(3),  # doubled
        line(1) + '{"step": 2, "lo' + "\n" + line(2) + "nonsense\n[1]\n" + line(3),
    ],
)
def test_each_step_up_to_the_checkpoint_stays_once(tmp_path: Path, content: str) -> None:
    log = tmp_path / "log.jsonl"
    log.write_text(content)
    assert [row["step"] for row in cut(log, 3)] == [1, 2, 3]
    assert log.read_text() == WHOLE
    assert [path.name for path in tmp_path.iterdir()] == ["log.jsonl"]


def test_bytes_that_are_no_text_are_cut_out(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    log.write_bytes(line(1).encode() + b"\xff\xfe\x00\n" + line(2).encode() + b"\x80" * 100)
    assert len(cut(log, 9)) == 2 and log.read_text() == line(1) + line(2)


def test_a_begun_file_is_empty_and_a_missing_one_stays_missing(tmp_path: Path) -> None:
    log = tmp_path / "log.jsonl"
    assert cut(log, 5) == [] and not log.exists()
    log.write_text(WHOLE)
    assert cut(log, 0) == [] and log.read_text() == ""


def step(number: int) -> Step:
    return Step(number, loss=0.123456789, lr=1e-3, u=1.0, grad_norm=math.inf, seconds=0.5)


def test_every_step_is_on_disk_at_once_and_time_adds_up(tmp_path: Path) -> None:
    log = tmp_path / "run" / "log.jsonl"
    first = LogFile(log)
    for event in (Started(0, 4), step(1)):
        first(event)
    row = {"step": 1, "loss": 0.12345679, "lr": 1e-3, "u": 1.0, "grad_norm": None, "seconds": 0.5}
    assert json.loads(log.read_text()) == row  # although nobody has closed the file
    second = LogFile(log)
    for event in (Started(1, 4), step(2)):
        second(event)
    second.close()
    rows = [json.loads(text) for text in log.read_text().splitlines()]
    assert [(row["step"], row["seconds"]) for row in rows] == [(1, 0.5), (2, 1.0)]


def test_small_rates_are_kept_to_eight_digits(tmp_path: Path) -> None:
    log = LogFile(tmp_path / "log.jsonl")
    for event in (Started(0, 1), Step(1, 0.5, 2e-9, 1.0, 1.23456789e-12, 0.5)):
        log(event)
    log.close()
    row = json.loads((tmp_path / "log.jsonl").read_text())
    assert (row["lr"], row["grad_norm"]) == (2e-9, 1.2345679e-12)


def test_a_log_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "log.jsonl").mkdir()
    with pytest.raises(UserError, match=r"log\.jsonl: cannot be written"):
        LogFile(tmp_path / "log.jsonl")(Started(0, 1))
    LogFile(tmp_path / "other").close()  # without a beginning there is nothing to end
