"""Works off a queue of jobs: `python -m singlora_diffusion.app.worker QUEUE`. It ends when nothing waits.

Each job is a session of its own as well, so that it survives this process; the next worker then waits for it.
"""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from .. import files
from ..errors import UserError
from . import jobs

LOOK = 0.25
"""Seconds between two looks for a wish to stop."""


def work(queue: Path) -> None:
    """Do what waits, in order. Where another worker does so already, return at once.

    A job that is added while the lock is released is seen by the look that follows.
    """
    while _next(queue) is not None:
        try:
            with files.locked(queue, "the queue's worker"):
                while (folder := _next(queue)) is not None:
                    _run(folder)
        except UserError:
            return


def _next(queue: Path) -> Path | None:
    """The oldest job that nobody has seen the end of."""
    for one in jobs.jobs(queue):
        path = one.folder / jobs.STATE
        if one.state != "withdrawn" and not (path.exists() and "exit" in files.read_json(path)):
            return one.folder
    return None


def _run(folder: Path) -> None:
    """Start a job, or find the one that a worker before has started, and wait for its end."""
    path = folder / jobs.STATE
    if not path.exists():
        _start(folder)
    said = files.read_json(path)
    running, asked = jobs.process(said), False
    code = None
    while running is not None:
        try:
            code = running.wait(LOOK)
            break
        except psutil.TimeoutExpired:
            if not asked and (folder / jobs.STOP).exists():
                running.send_signal(signal.SIGINT)
                asked = True
    files.write_json(path, {**said, "exit": None if code is None else int(code)})


def _start(folder: Path) -> None:
    job = json.loads((folder / jobs.JOB).read_text())
    with (folder / jobs.OUTPUT).open("wb") as output:
        started = subprocess.Popen(
            [sys.executable, "-m", "singlora_diffusion.cli", *job["words"]],
            cwd=job["cwd"],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    created = psutil.Process(started.pid).create_time()
    files.write_json(folder / jobs.STATE, {"pid": started.pid, "created": created})


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # jobs inherit it: begun in a shell's background, it would be ignored
    work(Path(sys.argv[1]))
