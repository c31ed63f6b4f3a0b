"""Trainings one after the other, kept on disk: whoever looks at the folder, at any time, sees the same.

A job is a folder QUEUE/000001 with the command in `job.json`. The worker (`worker.py`), a process of its own that
outlives whoever started it, takes them in order and is the only one to write `state.json` and `output.txt`, and to
signal a job. An empty file `stop` asks it to stop a job, or to leave it out; a file `pause` asks it to keep a job's
processes suspended for as long as the file is there.
"""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from .. import files
from ..errors import UserError

JOB, STATE, OUTPUT, STOP, PAUSE = "job.json", "state.json", "output.txt", "stop", "pause"
WORKER = "worker.json"
"""In the queue: the process that works it off."""
SHOWN = 4000
"""Bytes of a job's output that are read from its end."""
State = Literal["waiting", "running", "paused", "stopping", "done", "stopped", "failed", "lost", "withdrawn"]
"""paused: its process is suspended. lost: its process ended, and nobody was there to see how."""
OPEN: tuple[State, ...] = ("waiting", "running", "paused", "stopping")
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
    begun = _claimed(queue, {"words": list(words), "run": str(run), "cwd": os.getcwd()})
    if any(one.open and one.run == run for one in jobs(queue) if one.folder < begun):
        (begun / STOP).touch()
        raise UserError(f"{run}: a training waits or runs there already; wait for it, or choose another name")
    start_worker(queue)
    return job(begun)


def jobs(queue: Path) -> list[Job]:
    """All jobs, the oldest first."""
    folders = sorted(path for path in queue.glob("[0-9]*") if (path / JOB).is_file()) if queue.is_dir() else []
    return [job(folder) for folder in folders]


def latest(queue: Path, run: Path) -> Job | None:
    return of(jobs(queue), run)


def of(there: Sequence[Job], run: Path) -> Job | None:
    """The job of a run folder: the one that has not ended, else the youngest that was not left out, else that."""
    found = [one for one in there if one.run == run.absolute()]
    return max(found, key=lambda one: (one.open, one.state != "withdrawn", one.folder), default=None)


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
        found = process(said)
        return "lost" if found is None else "stopping" if asked else "paused" if suspended(found) else "running"
    if said["exit"] is None:
        return "lost"
    return "done" if said["exit"] == 0 else "stopped" if said["exit"] in STOPPED else "failed"


def stop(job: Job) -> None:
    """Ask for a job to be stopped after its step, with a checkpoint; one that waits is left out."""
    if job.open:
        (job.folder / STOP).touch()
        tend(job.folder.parent)


def pause(job: Job) -> None:
    """Ask for a running job to be suspended where it is. It keeps its memory."""
    if job.state == "running":
        (job.folder / PAUSE).touch()
        tend(job.folder.parent)


def go_on(job: Job) -> None:
    """Ask for a paused job to go on."""
    (job.folder / PAUSE).unlink(missing_ok=True)
    tend(job.folder.parent)


def unended(queue: Path) -> Path | None:
    """The oldest job that nobody has seen the end of."""
    for one in jobs(queue):
        path = one.folder / STATE
        if one.state != "withdrawn" and not (path.exists() and "exit" in files.read_json(path)):
            return one.folder
    return None


def tend(queue: Path) -> None:
    """Start a worker where there is something to do and the last one has ended, however it did."""
    named = queue / WORKER
    if unended(queue) is not None and not (named.exists() and process(files.read_json(named)) is not None):
        start_worker(queue)


def start_worker(queue: Path) -> None:
    """Start a process that works off the queue; where one does already, it ends at once."""
    subprocess.Popen(
        [sys.executable, "-m", "singlora_diffusion.app.worker", str(queue.absolute())],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # neither Ctrl-C nor the terminal's end reach it
    )


def identity(process: psutil.Process) -> dict[str, Any]:
    """What tells a process from others, also from later ones with its number."""
    return {"pid": process.pid, "created": process.create_time()}


def process(said: dict[str, Any]) -> psutil.Process | None:
    """The live process that an `identity` is of; None where it has ended, or another has its number by now."""
    try:
        found = psutil.Process(said["pid"])
        alive = found.create_time() == said["created"] and found.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return None
    return found if alive else None


def suspended(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_STOPPED)
    except psutil.Error:  # it has just ended
        return False


def _claimed(queue: Path, said: dict[str, Any]) -> Path:
    """A new folder with the next number. It is there with its file or not at all, and after all with lower numbers, so
    of two that ask at once each gets its own, and the second sees the first."""
    try:
        queue.mkdir(parents=True, exist_ok=True)
        made = Path(tempfile.mkdtemp(prefix=".new-", dir=queue))
        files.write_json(made / JOB, said)
        number = max((int(path.name) for path in queue.glob("[0-9]*") if path.name.isdecimal()), default=0)
        while True:
            number += 1
            try:
                return made.rename(queue / f"{number:06d}")
            except OSError as error:
                if error.errno not in (errno.EEXIST, errno.ENOTEMPTY):
                    raise
    except OSError as error:
        raise UserError(f"{queue}: cannot be written to: {files.reason(error)}") from error


def _end(path: Path) -> str:
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - SHOWN))
            return file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
