"""Trainings one after the other, kept on disk: whoever looks at the folder, at any time, sees the same.

A job is a folder QUEUE/000001 with the command in `job.json`. The worker (`worker.py`), a process of its own that
outlives whoever started it, takes them in order and is the only one to write `state.json` and `output.txt`. An empty
file `stop` asks it to stop a job, or to leave it out.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from .. import files
from ..errors import UserError

JOB, STATE, OUTPUT, STOP = "job.json", "state.json", "output.txt", "stop"
SHOWN = 4000
"""Bytes of a job's output that are read from its end."""
State = Literal["waiting", "running", "stopping", "done", "stopped", "failed", "lost", "withdrawn"]
"""lost: its process ended, and nobody was there to see how."""
OPEN: tuple[State, ...] = ("waiting", "running", "stopping")
STOPPED = (-2, -15, 130, 143)
"""What a command exits with after Ctrl-C or SIGTERM, caught or not."""


@dataclass(frozen=True)
class Job:
    """A command that waits, runs or has run."""

    folder: Path
    """In the queue."""
    words: tuple[str, ...]
    """The command line after `singlora`."""
    run: Path
    """The folder that it writes to."""
    state: State
    output: str
    """The end of what it printed."""

    @property
    def open(self) -> bool:
        """Whether it has not ended yet."""
        return self.state in OPEN


def add(queue: Path, words: Sequence[str], run: Path) -> Job:
    """Put a command at the end of the queue, and see that the queue is worked off.

    Raises:
        UserError: a job that has not ended writes to that folder, or the queue cannot be written to.
    """
    run = run.absolute()
    if any(job.open and job.run == run for job in jobs(queue)):
        raise UserError(f"{run}: a training waits or runs there already; wait for it, or choose another name")
    folder = _claimed(queue)
    files.write_json(folder / JOB, {"words": list(words), "run": str(run), "cwd": os.getcwd()})
    start_worker(queue)
    return job(folder)


def jobs(queue: Path) -> list[Job]:
    """All jobs, the oldest first."""
    folders = sorted(path for path in queue.glob("[0-9]*") if (path / JOB).is_file()) if queue.is_dir() else []
    return [job(folder) for folder in folders]


def latest(queue: Path, run: Path) -> Job | None:
    """The youngest job of a run folder."""
    return next((one for one in reversed(jobs(queue)) if one.run == run.absolute()), None)


def job(folder: Path) -> Job:
    """A job as it stands.

    Raises:
        UserError: its file is damaged.
    """
    said = files.read_json(folder / JOB)
    return Job(folder, tuple(said["words"]), Path(said["run"]), state(folder), _end(folder / OUTPUT))


def state(folder: Path) -> State:
    asked = (folder / STOP).exists()
    if not (folder / STATE).exists():
        return "withdrawn" if asked else "waiting"
    said = files.read_json(folder / STATE)
    if "exit" not in said:
        return "lost" if process(said) is None else "stopping" if asked else "running"
    if said["exit"] is None:
        return "lost"
    return "done" if said["exit"] == 0 else "stopped" if said["exit"] in STOPPED else "failed"


def stop(job: Job) -> None:
    """Ask for a job to be stopped after its step, with a checkpoint; one that waits is left out."""
    if job.open:
        (job.folder / STOP).touch()


def start_worker(queue: Path) -> None:
    """Start a process that works off the queue; where one does already, it ends at once."""
    if any(one.state in ("waiting", "lost") for one in jobs(queue)):
        subprocess.Popen(
            [sys.executable, "-m", "singlora_diffusion.app.worker", str(queue.absolute())],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # neither Ctrl-C nor the terminal's end reach it
        )


def process(said: dict[str, Any]) -> psutil.Process | None:
    """The live process that a `state.json` names; None where it has ended, or another has its number by now."""
    try:
        found = psutil.Process(said["pid"])
        alive = found.create_time() == said["created"] and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return found if alive else None


def _claimed(queue: Path) -> Path:
    """A new folder with the next number; of two that ask at once, each gets its own."""
    try:
        queue.mkdir(parents=True, exist_ok=True)
        number = max((int(path.name) for path in queue.glob("[0-9]*") if path.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                (queue / f"{number:06d}").mkdir()
            except FileExistsError:
                continue
            return queue / f"{number:06d}"
    except OSError as error:
        raise UserError(f"{queue}: cannot be written to: {files.reason(error)}") from error


def _end(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - SHOWN))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
