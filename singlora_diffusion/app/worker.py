"""Works off a queue of jobs: `python -m singlora_diffusion.app.worker QUEUE`. It ends when nothing waits.

Each job is a session of its own as well, so that it survives this process; the next worker then waits for it.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from .. import files
from ..errors import UserError
from . import jobs

LOOK = 0.25
"""Seconds between two looks for what is asked of a job."""


def work(queue: Path) -> None:
    """Do what waits, in order. Where another worker does so already, return at once.

    A job that is added while the lock is released is seen by the look that follows.
    """
    while jobs.unended(queue) is not None:
        try:
            with files.locked(queue, "the queue's worker"):
                files.write_json(queue / jobs.WORKER, jobs.identity(psutil.Process()))
                while (folder := jobs.unended(queue)) is not None:
                    _run(folder)
        except UserError:
            return


def _run(folder: Path) -> None:
    """Start a job, or find the one that a worker before has started, and wait for its end."""
    path = folder / jobs.STATE
    if not path.exists():
        _start(folder)
    said = files.read_json(path)
    running, code = jobs.process(said), None
    while running is not None:
        try:
            code = running.wait(LOOK)
            break
        except psutil.TimeoutExpired:
            stop = (folder / jobs.STOP).exists()
            suspend(running, not stop and (folder / jobs.PAUSE).exists())
            if stop and "asked" not in said:
                with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
                    running.send_signal(signal.SIGINT)
                said["asked"] = True  # a second signal, of a later worker, would end it without a checkpoint
                files.write_json(path, said)
    files.write_json(path, {**said, "exit": None if code is None else int(code)})


def suspend(process: psutil.Process, wanted: bool) -> None:
    """Suspend a process and those that it has started, or let them go on, unless it is so already.

    It comes first when they are suspended, as it could start others, and last when they go on: where this is broken
    off, its own state says that it is to be done again.
    """
    if wanted == jobs.suspended(process):
        return
    with contextlib.suppress(psutil.NoSuchProcess):
        if wanted:
            process.suspend()
        for child in process.children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                child.suspend() if wanted else child.resume()
        if not wanted:
            process.resume()


def _start(folder: Path) -> None:
    job = files.read_json(folder / jobs.JOB)
    with (folder / jobs.OUTPUT).open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "singlora_diffusion.cli", *job["words"]],
            cwd=job["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    files.write_json(folder / jobs.STATE, jobs.identity(psutil.Process(started.pid)))


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs inherit it: begun in a shell's background, it would be ignored
    work(Path(sys.argv[1]))
